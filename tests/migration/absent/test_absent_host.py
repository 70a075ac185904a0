# SPDX-License-Identifier: GPL-2.0-or-later
"""Absent pages, and what a host does with memory besides: swap, merge, share, take back.

What is not in QEMU's page table may hold data all the same, and what is there may be nothing. Each
guest here arrives with the contents that it had, whatever the host made of them.
"""

import contextlib
import functools
import os
import threading
import time
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, Optional, Tuple

import pytest

from livemig import memory, paths, workload
from livemig.absence import ABSENT, ABSENT_AND_HINTS, absent_of, absent_pages, assert_absent_used
from livemig.absence import assert_same, in_page_table, page_out, swap_space
from livemig.checks import SMALL, STAMP_MIB, assert_intact, assert_whole, hints_of, migrate_watched
from livemig.checks import start_churn, wait_for, wait_hints_ended, watched
from livemig.guest import Guest
from livemig.lab import Lab
from livemig.machine import MIB, PAGE, Machine, spec
from livemig.memory import ram_bytes, usage
from livemig.metal import DOWNTIME_MS, HELD, let_go
from livemig.migration import ENDED, MigrationResult, finish, let_end, migrate, query, start

RAM_BYTES = 128 * MIB
# Where tests write, apart from one another, and how much.
HERE, THERE = 32 * MIB, 64 * MIB
PART = 16 * MIB
PART_PAGES = PART // PAGE

PRIVATE = "memory-backend-ram"
SHARED = "memory-backend-memfd,share=on"


def bare(lab: Lab, library: Optional[str] = None, **changes: Any) -> Tuple[Guest, Machine]:
    """A bare-metal guest, which does nothing but what it is told; its QEMU may load a library."""
    if library:
        changes["preload"] = paths.bare_metal(library)
    here = spec(trace=memory.ABSENT_EVENT).but(balloon=None, skip_absent=True, **changes)
    source = lab.launch(here, "source")
    machine = Machine(source)
    machine.wait_ready()
    return source, machine


def arrival(lab: Lab, source: Guest, **changes: Any) -> Guest:
    """A QEMU that waits for it, and will not run it when it has come."""
    there = source.spec.but(trace=None, preload=None, **changes)
    return lab.incoming(there, running=False)


def assert_arrives(lab: Lab, source: Guest) -> MigrationResult:
    """Migrate the guest, and compare its memory."""
    destination = arrival(lab, source)
    result = migrate(source, destination, ABSENT)
    assert_same(source, destination)
    return result


# Swap

SWAP_MIB = 768


@pytest.mark.parametrize(
    "backend, library",
    [(PRIVATE, None), (PRIVATE, "no-pagemap-scan.so"), (SHARED, None)],
    ids=["private", "old-kernel", "shared"],
)
def test_swapped_pages_arrive(
    lab: Lab, measured: Dict[str, Any], backend: str, library: Optional[str]
) -> None:
    """What the host has swapped out is data."""
    with swap_space(SWAP_MIB):
        source, machine = bare(lab, library, mem_backend=backend)
        machine.stamp(HERE, PART_PAGES, 1)
        page_out(source)
        swapped = usage(source)["Swap"]
        # The premise
        assert not in_page_table(source, HERE)
        assert swapped >= 0.9 * PART
        absent = assert_absent_used(assert_arrives(lab, source), RAM_BYTES // 2)
        assert absent.absent_bytes <= RAM_BYTES - PART
        assert not absent_pages(source)[HERE // PAGE : (HERE + PART) // PAGE].any()
        measured.update(swapped=swapped, absent=absent.absent_bytes)


@pytest.mark.parametrize("hints", [True, False], ids=["hints", "no-hints"])
def test_swapped_free_memory(lab: Lab, measured: Dict[str, Any], hints: bool) -> None:
    """Free memory in the host's swap stays there with hints; absent pages alone do not help it."""
    freed = 384
    with swap_space(SWAP_MIB):
        guest = SMALL.but(skip_absent=True)
        source = lab.boot(guest)
        workload.stamp(source, STAMP_MIB)
        workload.dirty_and_free(source, freed)
        page_out(source)
        before = usage(source)
        # The premise
        assert before["Swap"] >= 0.8 * freed * MIB
        destination = lab.incoming(guest)
        result = migrate(source, destination, ABSENT_AND_HINTS if hints else ABSENT)
        left = usage(source)["Swap"]
        skipped = hints_of(result).skipped_bytes
        measured.update(swapped=before["Swap"], left=left, skipped=skipped, ms=result.total_ms)
        assert_absent_used(result, MIB)
        if hints:
            # What was hinted and not in memory; the guest may use some of it again.
            assert left >= skipped - before["Rss"] - 16 * MIB >= freed * MIB // 2
        else:
            assert left <= 16 * MIB
        assert_intact(destination)


# The kernel's ways with pages


@contextlib.contextmanager
def ksm() -> Iterator[None]:
    """The kernel merges equal pages as fast as it can, and pages of zeroes into the zero page."""
    directory = Path("/sys/kernel/mm/ksm")
    wanted = {"use_zero_pages": "1", "pages_to_scan": "20000", "sleep_millisecs": "1", "run": "1"}
    if not all((directory / name).exists() for name in wanted):
        pytest.skip("this host's kernel does not merge pages")
    before = {name: (directory / name).read_text(encoding="ascii") for name in wanted}
    try:
        for name, value in wanted.items():
            try:
                (directory / name).write_text(value, encoding="ascii")
            except OSError as err:
                pytest.skip(f"KSM cannot be switched on: {err}")
        yield
    finally:
        (directory / "run").write_text("2", encoding="ascii")
        for name, value in before.items():
            (directory / name).write_text(value, encoding="ascii")


def test_merged_pages(lab: Lab, measured: Dict[str, Any]) -> None:
    """Equal pages that were merged arrive; pages of zeroes that were are absent, until written."""
    with ksm():
        source, machine = bare(lab, mem_backend=f"{PRIVATE},merge=on")
        if "KSM" not in usage(source):
            pytest.skip("this host's kernel does not tell what it merged (Linux before 6.6)")
        machine.command("fill", HERE, PART // 4, 0x5EED)
        machine.command("fill", THERE, PART // 4, 0)
        # The premise. What is the zero page, made so by KSM or in a split of a huge page, is not
        # resident.
        wait_for(
            lambda: usage(source)["KSM"] >= 0.9 * PART and usage(source)["Rss"] <= 1.1 * PART,
            "the kernel does not merge the pages",
            300,
        )
        assert in_page_table(source, THERE)
        measured.update(usage(source))
        destination = arrival(lab, source)
        # Round 1 goes on until it is let go.
        spec = ABSENT.with_parameters(max_bandwidth=HELD, downtime_limit=DOWNTIME_MS)
        start(source, destination, spec)
        wait_hints_ended(source)
        written = THERE + PART // 2
        machine.stamp(written, 64, 7)
        result = let_go(source, destination)
        mask = absent_pages(source)
        measured["absent_zeroes"] = int(mask[THERE // PAGE :][:PART_PAGES].sum())
        assert measured["absent_zeroes"] >= 0.9 * PART_PAGES
        assert not mask[HERE // PAGE :][:PART_PAGES].any()
        assert mask[written // PAGE] and hints_of(result).redirtied_bytes >= 64 * PAGE
        assert_same(source, destination)


def test_huge_pages(lab: Lab, measured: Dict[str, Any]) -> None:
    """In transparent huge pages, what the guest did not touch of one is there, and the rest not."""
    source, machine = bare(lab, mem_backend=PRIVATE)
    for addr in range(HERE, HERE + PART, 4 * MIB):
        machine.stamp(addr, 1, 1)
    there = usage(source)
    if not there["AnonHugePages"]:
        pytest.skip("this host gives no transparent huge pages to guests")
    measured.update(there)
    absent = absent_of(assert_arrives(lab, source))
    assert absent.absent_bytes == RAM_BYTES - there["Rss"]
    mask = absent_pages(source)
    assert not mask[HERE // PAGE : (HERE + 2 * MIB) // PAGE].any()
    assert mask[(HERE + 2 * MIB) // PAGE : (HERE + 4 * MIB) // PAGE].all()


@pytest.mark.check
def test_memory_of_another_process(lab: Lab, measured: Dict[str, Any]) -> None:
    """What another process has written into shared memory arrives, in our page table or not."""
    with memory.memory_files("source") as (file,):
        source, machine = bare(lab, mem_file=file)
        machine.stamp(HERE, 64, 1)
        data = os.urandom(PART)
        with open(file, "r+b") as other:
            os.pwrite(other.fileno(), data, THERE)
        # The premise: it is known only to the file.
        assert not in_page_table(source, THERE)
        destination = arrival(lab, source, mem_file=None)
        enough = threading.Event()

        def populate() -> None:
            """Populate memory all the while, without a change: that is not logged."""
            with open(file, "r+b") as other:
                while not enough.is_set():
                    for addr in range(THERE + PART, RAM_BYTES, 64 * PAGE):
                        os.pwrite(other.fileno(), bytes(PAGE), addr)

        thread = threading.Thread(target=populate)
        thread.start()
        try:
            result = migrate(source, destination, ABSENT)
        finally:
            enough.set()
            thread.join()
        absent = assert_absent_used(result, RAM_BYTES // 4)
        measured.update(absent=absent.absent_bytes)
        assert_same(source, destination)
        there = memory.ram_blocks(destination)["pc.ram"]
        with open(there.path, "rb") as memory_there:
            memory_there.seek(there.offset + THERE)
            assert memory_there.read(PART) == data


def test_freed_when_there_is_need(lab: Lab, measured: Dict[str, Any]) -> None:
    """Pages that may be taken back (MADV_FREE) are there until they are, and then absent."""
    library = paths.bare_metal("lazy-free.so")
    guest = SMALL.but(kernel="stock", balloon="free-page-hint=off", skip_absent=True)
    source = lab.boot(guest.but(preload=library, trace=memory.ABSENT_EVENT))
    workload.stamp(source, STAMP_MIB)
    workload.dirty_and_free(source, 512)
    source.qmp("balloon", value=512 * MIB)
    wait_for(lambda: source.qmp("query-balloon")["actual"] <= 512 * MIB, "the balloon is too small")
    lazy = usage(source)["LazyFree"]
    # The premise: the balloon has pages that hold what was in them.
    assert lazy > 128 * MIB
    page_out(source)
    taken = lazy - usage(source)["LazyFree"]
    measured.update(lazy=lazy, taken=taken, rss=usage(source)["Rss"])
    assert taken > 0
    source.qmp("stop")
    destination = lab.incoming(guest, running=False)
    result = migrate(source, destination, ABSENT)
    # Nobody runs, so it is exact, and there is no need: no page was taken back meanwhile.
    assert absent_of(result).absent_bytes == ram_bytes(source) - measured["rss"]
    assert_same(source, destination)
    destination.qmp("cont")
    assert_intact(destination)


# What a guest gives back and takes meanwhile


DISCARDED = "ram_block_discard_range"
SCANNED = "absent_pages_scan"
AT_WORK = SMALL.but(
    kernel="stock", qemu="checked", skip_absent=True, trace=f"{DISCARDED} {SCANNED}"
)
# It lasts for some rounds, and may stop a guest that writes as fast as it is sent.
LASTING = ABSENT.with_parameters(max_bandwidth=100 * MIB, downtime_limit=300)


def swing_balloon(guest: Guest, actual: List[int]) -> None:
    """Note a balloon's size, and set it: half of the time to less than it can reach till then."""
    actual.append(guest.qmp("query-balloon")["actual"] // MIB)
    guest.qmp("balloon", value=(600 if len(actual) % 10 < 5 else 1024) * MIB)
    time.sleep(0.05)


def swinging(measured: Dict[str, Any], here: Guest, there: Guest) -> MigrationResult:
    """Migrate, and let the balloon go up and down from before the first moment on."""
    actual: List[int] = []
    measured.setdefault("actual", []).append(actual)
    for _ in range(8):
        swing_balloon(here, actual)
    start(here, there, LASTING)
    rounds = 0
    while query(here).status not in ENDED:
        if rounds == 30:
            here.qmp("migrate-set-parameters", max_bandwidth=0, downtime_limit=20000)
        rounds += 1
        swing_balloon(here, actual)
    return finish(here, there)


def reporting(here: Guest, there: Guest) -> MigrationResult:
    """Migrate, until the guest has reported before the look and after it."""
    wait_for(lambda: discards(here)[0] > 0, "the guest reports nothing")
    start(here, there, LASTING)
    wait_for(lambda: discards(here)[1] > 0, "the guest reports nothing now")
    return let_end(here, there)


def discards(guest: Guest) -> Tuple[int, int]:
    """How often a QEMU gave memory back before it looked for absent pages, and after that."""
    before, _, after = guest.trace_log.read_text(encoding="utf-8").partition(SCANNED)
    return before.count(DISCARDED), after.count(DISCARDED)


def assert_moves(
    lab: Lab, here: Guest, measured: Dict[str, Any], move: Callable[[Guest, Guest], MigrationResult]
) -> None:
    """A guest at work finds its memory after each of three moves."""
    workload.stamp(here, STAMP_MIB)
    start_churn(here)
    measured.update(absent=[], discards=[])
    for number in range(3):
        there = lab.incoming(here.spec, f"destination-{number}")
        result = move(here, there)
        measured["absent"].append(assert_absent_used(result, MIB).absent_bytes)
        measured["discards"].append(discards(here))
        # The premise: memory was given back before the look and after it.
        assert all(discards(here))
        assert_whole(there)
        here.close()
        here = there


def test_balloon_at_the_same_time(lab: Lab, measured: Dict[str, Any]) -> None:
    """A guest whose balloon goes up and down all the while finds its memory after each move."""
    here = lab.boot(AT_WORK.but(balloon="free-page-hint=off"))
    assert_moves(lab, here, measured, functools.partial(swinging, measured))


def test_reporting_at_the_same_time(lab: Lab, measured: Dict[str, Any]) -> None:
    """A guest that writes, frees and reports memory all the while finds its own after each move."""
    here = lab.boot(AT_WORK.but(balloon="free-page-reporting=on"))
    here.agent.run("(while :; do dirtyfree 256 2; sleep 0.2; done) > /dev/null 2>&1 &")
    assert_moves(lab, here, measured, reporting)


@pytest.mark.long
def test_there_and_back(lab: Lab, measured: Dict[str, Any]) -> None:
    """A guest at work goes to and fro twenty times, and finds all of its memory each time."""
    oracle, here = watched(lab, SMALL.but(kernel="stock", balloon=None, skip_absent=True))
    workload.stamp(here, STAMP_MIB)
    start_churn(here)
    measured.update(absent=[])
    for _ in range(20):
        absent = assert_absent_used(migrate_watched(oracle, ABSENT), 256 * MIB)
        measured["absent"].append(absent.absent_bytes)
        here = oracle.move_on()
        assert_whole(here)


# A host that does not say


@pytest.mark.parametrize("backend", [PRIVATE, SHARED], ids=["private", "shared"])
def test_page_table_denied(lab: Lab, backend: str) -> None:
    """Where /proc/self/pagemap may not be opened, all private memory is sent, and that is said.

    Absent pages of shared memory are skipped all the same.
    """
    source, machine = bare(lab, "no-pagemap.so", mem_backend=backend)
    machine.stamp(HERE, PART_PAGES, 1)
    there = usage(source)["Rss"]
    absent = absent_of(assert_arrives(lab, source))
    expected = ("denied", 0) if backend == PRIVATE else (None, RAM_BYTES - there)
    assert (absent.reason, absent.absent_bytes) == expected


@pytest.mark.check
def test_old_kernel(lab: Lab, measured: Dict[str, Any]) -> None:
    """Before Linux 6.7, which has no PAGEMAP_SCAN, the same is found, page by page."""
    found = []
    for library in (None, "no-pagemap-scan.so"):
        source, machine = bare(lab, library, mem_backend=PRIVATE)
        machine.stamp(HERE, PART_PAGES, 1)
        there = usage(source)["Rss"]
        absent = assert_absent_used(assert_arrives(lab, source), RAM_BYTES // 2)
        assert absent.absent_bytes == RAM_BYTES - there
        found.append(absent.absent_bytes)
        measured[f"us-{len(found)}"] = absent.scan_time
        for guest in lab.guests:
            guest.close()
    assert found[0] == found[1]
