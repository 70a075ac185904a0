# SPDX-License-Identifier: GPL-2.0-or-later
"""The protocol as a model, and every order of its steps: tests/migration/model.

Each run is a full search of one variant. What must not hold is tested too: the model without one of
its rules, a mutant, has to break the very property that the rule is there for.
"""

from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Dict, Iterator, List, Sequence, Tuple

import pytest

from livemig.checks import in_check
from livemig.model_search import Search, Verdict, search

# Searches at once
SEARCHES = 2

KVM = "KVM_MANUAL NO_DEVICE"
# Absent pages only: no guest is asked.
ABSENT = f"{KVM} ABSENT NO_ASK"
# Postcopy alone, from any state that a switch can find.
SWITCHED = f"{KVM} SWITCHED"

# What is built in, and why.
HOLDS = {
    "kvm": "KVM_MANUAL",
    "kvm-others-dma": f"{KVM} OTHERS DMA",
    "kvm-others-dma-syncs": f"{KVM} OTHERS DMA TIMER",
    "kvm-two-pages": f"{KVM} PAGES=2",
    "kvm-cancel-and-again": f"{KVM} CANCEL MIGRATIONS=2",
    "kvm-stop-and-go-on": f"{KVM} STOP_ONCE",
    "kvm-postcopy": f"{KVM} POSTCOPY TIMER CUTS=1",
    "kvm-postcopy-preempt": f"{KVM} POSTCOPY PREEMPT CUTS=1",
    "kvm-init-on-free": f"{KVM} INIT_ON_FREE TIMER",
    "kvm-init-on-free-postcopy": f"{KVM} INIT_ON_FREE POSTCOPY CUTS=1",
    "kvm-init-on-free-postcopy-preempt": f"{KVM} INIT_ON_FREE POSTCOPY PREEMPT CUTS=1",
    "kvm-leftovers": f"{KVM} LEFTOVERS INIT_ON_FREE CANCEL MIGRATIONS=2",
    "kvm-leftovers-postcopy": f"{KVM} LEFTOVERS POSTCOPY",
    "kvm-leftovers-persistent": f"{KVM} LEFTOVERS PERSISTENT",
    "kvm-stock-guest": "KVM_MANUAL BLOCKS",
    "kvm-auto-protect": "KVM_AUTO NO_DEVICE OTHERS DMA TIMER",
    "kvm-ring": "KVM_RING NO_DEVICE OTHERS TIMER",
    "kvm-ring-dma-cancel-and-again": "KVM_RING NO_DEVICE DMA CANCEL MIGRATIONS=2",
    "kvm-ring-postcopy": "KVM_RING NO_DEVICE POSTCOPY TIMER",
    "tcg": "TCG OTHERS DMA",
    "tcg-two-vcpus": "TCG NO_DEVICE VCPUS=2 OTHERS DMA",
    "tcg-two-pages": "TCG NO_DEVICE PAGES=2",
    "tcg-cancel-and-again": "TCG NO_DEVICE CANCEL MIGRATIONS=2",
    "tcg-queue-cancel-and-again": "TCG CANCEL MIGRATIONS=2",
    "tcg-postcopy": "TCG NO_DEVICE POSTCOPY",
    "tcg-postcopy-two-pages": "TCG NO_DEVICE POSTCOPY PAGES=2",
    "switched-cut-twice": f"{SWITCHED} PAGES=2 CUTS=2",
    "switched-preempt-cut-twice": f"{SWITCHED} PREEMPT CUTS=2",
    "switched-huge-page": f"{SWITCHED} PAGES=2 HUGE CUTS=2",
    "switched-huge-page-preempt": f"{SWITCHED} PAGES=2 HUGE PREEMPT CUTS=2",
    "switched-preempt-two-pages": f"{SWITCHED} PAGES=2 PREEMPT",
    "tcg-init-on-free": "TCG NO_DEVICE INIT_ON_FREE OTHERS",
    "tcg-stock-guest-cancel-and-again": "TCG BLOCKS CANCEL MIGRATIONS=2",
    "absent": f"{KVM} ABSENT",
    "absent-queue": "KVM_MANUAL ABSENT",
    "kvm-estimate": f"{KVM} ESTIMATE",
    "absent-stop-and-go-on": f"{KVM} ABSENT STOP_ONCE",
    "absent-postcopy": f"{KVM} ABSENT POSTCOPY CUTS=1",
    "absent-init-on-free": f"{KVM} ABSENT INIT_ON_FREE",
    "absent-tcg": "TCG NO_DEVICE ABSENT OTHERS DMA",
    "absent-alone": ABSENT,
    "absent-alone-dma-syncs": f"{ABSENT} DMA TIMER",
    "absent-alone-others-syncs": f"{ABSENT} OTHERS TIMER",
    "absent-alone-two-pages": f"{ABSENT} PAGES=2",
    "absent-alone-stop-and-go-on": f"{ABSENT} STOP_ONCE",
    "absent-alone-leftovers-cancel-and-again": f"{ABSENT} LEFTOVERS CANCEL MIGRATIONS=2",
    "absent-alone-postcopy-preempt": f"{ABSENT} POSTCOPY PREEMPT CUTS=1",
    "absent-alone-auto-protect": "KVM_AUTO NO_DEVICE ABSENT NO_ASK TIMER",
    "absent-alone-ring": "KVM_RING NO_DEVICE ABSENT NO_ASK DMA",
}

CLAIMS = ("L1", "L2", "L3", "L4")
POSTCOPY_CLAIMS = ("L5", "L6")
Searches = Tuple[Search, ...]


def _claim(options: str, claims: Sequence[str]) -> Searches:
    return tuple(Search(options, claim) for claim in claims)


# 1 cancel, 2 stop and go on, 4 reset.
ENDS_WELL = {
    "cancel-and-again": _claim("NO_LOG LIFE=1 MIGRATIONS=2", CLAIMS),
    "cancel-stock-guest": _claim("NO_LOG LIFE=1 BLOCKS", ("L1", "L3")),
    "cancel-and-again-stock-guest": _claim("NO_LOG LIFE=1 MIGRATIONS=2 BLOCKS", CLAIMS),
    "cancel-stop": _claim("NO_LOG LIFE=3", CLAIMS),
    "cancel-reset": _claim("NO_LOG LIFE=5", CLAIMS),
    "stop-reset": _claim("NO_LOG LIFE=6", CLAIMS),
    # It has no right to its buffers.
    "hostile-stop": _claim("NO_LOG LIFE=2 HOSTILE", ("L1", "L2", "L4")),
    "reset": _claim("NO_LOG LIFE=4", CLAIMS),
    "absent-cancel-stop": _claim("NO_LOG LIFE=3 ABSENT", CLAIMS),
    "absent-alone-cancel-stop-reset": _claim("NO_LOG LIFE=7 ABSENT NO_ASK", ("L2", "L4")),
}

POSTCOPY_ENDS = {
    "plain-cut": _claim(f"{SWITCHED} PAGES=2 CUTS=1", POSTCOPY_CLAIMS),
    "plain-cut-twice": _claim(f"{SWITCHED} PAGES=2 CUTS=2", POSTCOPY_CLAIMS),
    "preempt-cut-twice": _claim(f"{SWITCHED} PREEMPT CUTS=2", POSTCOPY_CLAIMS),
    "huge-page": _claim(f"{SWITCHED} PAGES=2 HUGE CUTS=2", POSTCOPY_CLAIMS),
    "huge-page-preempt": _claim(f"{SWITCHED} PAGES=2 HUGE PREEMPT CUTS=1", POSTCOPY_CLAIMS),
}

# Left to "make model": the largest, where a smaller one has the same parts.
LARGE = """
    kvm-others-dma-syncs kvm-two-pages kvm-leftovers kvm-auto-protect kvm-ring
    kvm-ring-dma-cancel-and-again tcg-queue-cancel-and-again tcg-postcopy-two-pages
    tcg-stock-guest-cancel-and-again switched-preempt-two-pages absent-queue absent-stop-and-go-on
    absent-alone-others-syncs absent-alone-two-pages cancel-and-again-stock-guest cancel-stop
    cancel-reset stop-reset absent-cancel-stop plain-cut-twice
""".split()

LOST = "S1_no_lost_write"
ARMED = "S3_armed_when_asked"
ZERO = "S6_free_page_reads_zero"
WHOLE = "S9_host_page_whole"
EQUAL = "S10_contents_equal"
# The rule that is left out: what must notice, and where.
MUTANTS = {
    "M1-hint-clears-unarmed-log": (LOST, f"{KVM} M1"),
    "M1-hint-clears-unarmed-log-stock-guest": (LOST, "KVM_MANUAL BLOCKS M1"),
    "M2-sender-clears-unarmed-log": (LOST, f"{KVM} M2"),
    "M3-armed-after-asking": (LOST, f"{KVM} M3"),
    "M4-armed-without-tlb-flush": (LOST, f"{KVM} M4"),
    "M4-armed-without-tlb-flush-seen-at-once": (ARMED, f"{KVM} M4 CHECK_ARMED"),
    "M5-applied-after-merge": (LOST, f"{KVM} TIMER M5"),
    "M5-applied-after-merge-auto-protect": (LOST, "KVM_AUTO NO_DEVICE TIMER M5"),
    "M5-applied-after-merge-ring": (LOST, "KVM_RING NO_DEVICE TIMER M5"),
    "M6-epoch-read-without-mutex": (LOST, f"{KVM} TIMER M6"),
    "M7-hint-clears-dirty-memory": (LOST, f"{KVM} TIMER M7"),
    "M7-hint-clears-dirty-memory-tcg": (LOST, "TCG NO_DEVICE M7"),
    "M8-asked-again-unarmed": (LOST, f"{KVM} M8"),
    "M9-id-read-after-walk": (LOST, f"{KVM} M9"),
    "M9-id-read-after-walk-tcg": (LOST, "TCG NO_DEVICE M9"),
    "M10-walk-without-lock": (LOST, f"{KVM} M10"),
    "M11-buffer-freed-too-early": (LOST, "TCG M11"),
    "M12-epoch-of-first-batch-only": (LOST, f"{KVM} TIMER M12"),
    "M13-queue-served-for-stopped-vm": ("S5_stopped_vm_unchanged", "KVM_MANUAL M13"),
    "M14-no-answer": ("L6", f"{SWITCHED} M14"),
    "M14-no-answer-before-preempt-is-active": ("L6", f"{SWITCHED} PREEMPT M14"),
    "M15A-dirtied-page-stays-hinted": (LOST, f"{KVM} POSTCOPY M15A"),
    "M15B-precopy-looks-at-stale-hints": (LOST, f"{KVM} M15B"),
    "M16-counted-without-mutex": ("S4_counter_is_popcount", f"{KVM} TIMER M16"),
    "M17-device-applies-with-bql": ("L2", "NO_LOG LIFE=2 M17"),
    "M18-log-cleared-with-ones": (LOST, f"{KVM} M18"),
    "M19-ring-initially-all-set": (LOST, "KVM_RING NO_DEVICE M19"),
    "M20-tlb-reset-if-newly-dirty": (LOST, "TCG NO_DEVICE M20"),
    "M21-init-on-free-asked-again": (ZERO, f"{KVM} INIT_ON_FREE M21"),
    "M21-init-on-free-asked-again-postcopy": (ZERO, f"{KVM} INIT_ON_FREE POSTCOPY M21"),
    "M22-any-id-accepted": (LOST, f"{KVM} CANCEL MIGRATIONS=2 M22"),
    "M23-done-not-published": ("L1", "NO_LOG LIFE=2 M23"),
    "M24-no-deadline": ("L4", "NO_LOG LIFE=2 M24"),
    "M25-stale-element-kept": ("L3", "NO_LOG LIFE=2 M25"),
    "M26-done-does-not-serve-queue": ("L3", "NO_LOG LIFE=2 M26"),
    "M27-start-does-not-serve-queue": ("L3", "NO_LOG LIFE=2 M27"),
    "M28-epoch-read-after-arming": (LOST, f"{KVM} TIMER M28"),
    "M29-no-answer-by-preempt": ("L6", f"{SWITCHED} PREEMPT M29"),
    "M30-answered-page-stays-hinted": ("S7_page_placed_once", f"{SWITCHED} M30"),
    "M30-answered-page-stays-hinted-preempt": ("S7_page_placed_once", f"{SWITCHED} PREEMPT M30"),
    "M31-answered-while-it-is-sent": ("S7_page_placed_once", f"{SWITCHED} PREEMPT M31"),
    "M32-recovery-skips-what-was-dirtied": (LOST, f"{KVM} POSTCOPY CUTS=1 M32"),
    "M33-recovery-skips-what-was-answered": ("L6", f"{SWITCHED} PREEMPT CUTS=1 M33"),
    "M34-recovery-sends-what-is-hinted": ("S7_page_placed_once", f"{SWITCHED} CUTS=1 M34"),
    "M35-ends-while-devices-are-loaded": ("L6", f"{SWITCHED} M35"),
    "M36-queued-after-the-last-look": ("L6", f"{SWITCHED} PREEMPT M36"),
    "M37-nothing-emptied": ("S8_nobodys_data", f"{KVM} LEFTOVERS M37"),
    "M37-nothing-emptied-init-on-free": (ZERO, f"{KVM} LEFTOVERS INIT_ON_FREE M37"),
    "M37-nothing-emptied-second-attempt": (ZERO, f"{KVM} INIT_ON_FREE CANCEL MIGRATIONS=2 M37"),
    "M37-nothing-emptied-absent": (EQUAL, f"{ABSENT} LEFTOVERS M37"),
    "M37-nothing-emptied-absent-second-attempt": (EQUAL, f"{ABSENT} CANCEL MIGRATIONS=2 M37"),
    "M38-emptied-after-the-first-page": (LOST, f"{KVM} M38"),
    "M39-asked-though-not-all-is-armed": (LOST, f"{KVM} STOP_ONCE M39"),
    "M39-asked-though-not-all-is-armed-seen-at-once": (ARMED, f"{KVM} STOP_ONCE M39 CHECK_ARMED"),
    "M40-recovery-takes-parts-of-a-host-page": (WHOLE, f"{SWITCHED} PAGES=2 HUGE CUTS=1 M40"),
    "M41-answer-of-a-target-page": (WHOLE, f"{SWITCHED} PAGES=2 HUGE M41"),
    "M41-answer-of-a-target-page-preempt": (WHOLE, f"{SWITCHED} PAGES=2 HUGE PREEMPT M41"),
    "M42-recovery-sends-the-rest-of-a-host-page": (WHOLE, f"{SWITCHED} PAGES=2 HUGE CUTS=1 M42"),
    "M43-scanned-before-arming": (EQUAL, f"{ABSENT} M43"),
    "M43-scanned-before-arming-seen-at-once": (ARMED, f"{ABSENT} M43 CHECK_ARMED"),
    "M44-absence-applied-after-merge": (EQUAL, f"{ABSENT} TIMER M44"),
    "M45-not-in-our-page-table-taken-for-absent": (EQUAL, f"{ABSENT} DMA M45"),
    "M46-swapped-taken-for-absent": (EQUAL, f"{ABSENT} M46"),
    "M47-scanned-though-not-all-is-armed": (EQUAL, f"{ABSENT} STOP_ONCE M47"),
    "M48-scanned-again-in-a-later-round": (EQUAL, f"{ABSENT} M48"),
    "M49-dirtied-absent-page-is-not-forgotten": (LOST, f"{ABSENT} POSTCOPY M49"),
    "M50-scan-without-deadline": ("L4", "NO_LOG LIFE=2 ABSENT NO_ASK M50"),
    "M51-hint-of-absent-page-counted-again": ("S4_counter_is_popcount", f"{KVM} ABSENT M51"),
    "M52-absent-page-is-not-remembered": ("L6", f"{SWITCHED} M52"),
    "M53-hinted-pages-deferred-too": (LOST, f"{KVM} M53"),
    "M53-absent-pages-deferred-too": (EQUAL, f"{ABSENT} M53"),
    "M54-deferred-before-the-hints": (LOST, f"{KVM} M54"),
    "M55-estimate-has-the-id-of-a-migration": (LOST, f"{KVM} ESTIMATE M55"),
    "M56-hinted-though-not-emptied": ("S8_nobodys_data", f"{KVM} LEFTOVERS PERSISTENT M56"),
    "M56-absent-though-not-emptied": (EQUAL, f"{ABSENT} LEFTOVERS PERSISTENT M56"),
    "M57-tlb-entry-made-after-the-look": (LOST, "TCG NO_DEVICE NO_HINTS M57"),
}

# For "make check".
QUICK = ("kvm", "kvm-cancel-and-again", "tcg-init-on-free", "absent-alone")
# Of the mutants: a rule of each hazard in docs/correctness.md, and those that are found at once.
QUICK_MUTANTS = """
    M1-hint-clears-unarmed-log M3-armed-after-asking M4-armed-without-tlb-flush
    M5-applied-after-merge M7-hint-clears-dirty-memory-tcg M9-id-read-after-walk
    M10-walk-without-lock M13-queue-served-for-stopped-vm M15A-dirtied-page-stays-hinted
    M16-counted-without-mutex M17-device-applies-with-bql M19-ring-initially-all-set
    M20-tlb-reset-if-newly-dirty M22-any-id-accepted M24-no-deadline M27-start-does-not-serve-queue
    M43-scanned-before-arming M46-swapped-taken-for-absent M53-hinted-pages-deferred-too
    M57-tlb-entry-made-after-the-look
""".split()

# Where the model has to get to. L4 has no part in it, but LIFE is for such.
REACHED = {
    "KVM_MANUAL": "queue_full",
    KVM: "hint_applied hint_redirtied deadline_passed report_complete sent_once",
    f"{KVM} TIMER": "hint_after_merge",
    f"{KVM} CANCEL MIGRATIONS=2": "hint_of_earlier_request",
    f"{KVM} STOP_ONCE": "arming_cut_off",
    f"{KVM} ABSENT": "absent_page_hinted",
    f"{KVM} POSTCOPY": "hinted_page_asked_for asked_for_twice woken_by_the_end",
    f"{KVM} POSTCOPY CUTS=1": "link_recovered",
    f"{KVM} POSTCOPY PREEMPT": "queued_too_late",
    ABSENT: "absent_applied scan_cut_off populated_meanwhile given_back_meanwhile",
    f"{ABSENT} TIMER": "absent_after_merge",
    f"{ABSENT} STOP_ONCE": "stopped_vm_scanned",
    "NO_LOG LIFE=2": "link_stalled guest_hangs",
}

# Only manual protection leaves pages writable that the log has no trace of.
LOGS = {"kvm-auto-protect": "KVM_AUTO", "kvm-ring": "KVM_RING", "tcg": "TCG"}
NEED_NOT_ARM = {name: f"{log} NO_DEVICE OTHERS M2" for name, log in LOGS.items()}

# What QEMU has without hints too, and the model therefore leaves out.
UPSTREAM = {"tcg-sync-in-main-loop": "TCG NO_DEVICE NO_HINTS TIMER"}

# Too little for the model without any option, which needs a depth of some hundreds.
TOO_SMALL = {
    "depth": (Search(KVM, depth=100),),
    "memory": (Search("KVM_MANUAL", mib=245),),
}


def _each(
    cases: Dict[str, Searches], *quick: str, large: Sequence[str] = ()
) -> pytest.MarkDecorator:
    """A test of cases: @quick are for "make check", and @large for "make model" only."""
    known = in_check(cases, *quick, long=[case for case in cases if case in large])
    params = [pytest.param(cases[case.id], id=case.id, marks=case.marks) for case in known]
    return pytest.mark.parametrize("wanted", params)


def _holds(cases: Dict[str, str]) -> Dict[str, Searches]:
    return {case: (Search(f"{options} CHECK_ARMED"),) for case, options in cases.items()}


def _first(claim: str, options: str) -> Searches:
    """For what is found soon: a violation of a claim, or of another property."""
    return (Search(options, claim if claim in CLAIMS + POSTCOPY_CLAIMS else "", short=True),)


@pytest.fixture(scope="module")
def searches(request: pytest.FixtureRequest) -> Iterator[Dict[Search, "Future[Verdict]"]]:
    """The searches of all tests of this file that were selected, under way."""
    with ThreadPoolExecutor(SEARCHES) as pool:
        selected = [item for item in request.session.items if item.path == request.node.path]
        wanted = [what for item in selected for what in getattr(item, "callspec").params["wanted"]]
        yield {what: pool.submit(search, what) for what in dict.fromkeys(wanted)}
        pool.shutdown(cancel_futures=True)


@pytest.fixture
def verdicts(
    wanted: Searches, searches: Dict[Search, "Future[Verdict]"], measured: Dict[str, Any]
) -> Tuple[Verdict, ...]:
    """What the searches of this test have found."""
    found = tuple(searches[what].result() for what in wanted)
    for name in ("states", "depth", "mib", "seconds"):
        measured[name] = [getattr(verdict, name) for verdict in found]
    print(f"{sum(measured['states']):,} states, {sum(measured['seconds']):.1f} s", end=" ")
    return found


@pytest.fixture
def violated(verdicts: Tuple[Verdict, ...]) -> List[str]:
    """The properties that the searches of this test have found not to hold."""
    for verdict in verdicts:
        assert verdict.complete, verdict.output
    return [verdict.violated for verdict in verdicts if verdict.violated]


@_each(_holds(HOLDS), *QUICK, large=LARGE)
def test_no_write_is_lost(violated: List[str]) -> None:
    """No order of the steps of guest, log, device and migration breaks a property."""
    assert not violated


@_each(ENDS_WELL, large=LARGE)
def test_ends_well(violated: List[str]) -> None:
    """The guest is answered, commands return, buffers come back and round 0 ends, always."""
    assert not violated


@_each(POSTCOPY_ENDS, large=LARGE)
def test_postcopy_ends(violated: List[str]) -> None:
    """Each page that is asked for comes, or the end does, which wakes who waits; and it comes."""
    assert not violated


@_each({case: _first(*how) for case, how in MUTANTS.items()}, *QUICK_MUTANTS)
def test_mutant_is_caught(request: pytest.FixtureRequest, violated: List[str]) -> None:
    """Without one of the rules, the property that it is there for does not hold."""
    assert violated == [MUTANTS[request.node.callspec.id][0]]


@_each(
    {
        place: _first("L4" if "LIFE" in options else "", f"{options} REACHED={place}")
        for options, places in REACHED.items()
        for place in places.split()
    }
)
def test_gets_there(violated: List[str]) -> None:
    """What the properties speak of does happen."""
    assert ["never_reached" in name for name in violated] == [True]


@_each(_holds(NEED_NOT_ARM))
def test_need_not_arm(violated: List[str]) -> None:
    """Arming changes nothing where no clear is deferred: it is a second lock there."""
    assert not violated


@_each({case: _first(LOST, options) for case, options in UPSTREAM.items()})
def test_upstream_race(violated: List[str]) -> None:
    """A race that the model leaves out loses a write without any hint."""
    assert violated == [LOST]


@_each(TOO_SMALL)
def test_incomplete_is_noticed(verdicts: Tuple[Verdict, ...]) -> None:
    """A search that could not visit every state does not pass for one that found nothing."""
    assert [(verdict.violated, verdict.complete) for verdict in verdicts] == [("", False)]
