# SPDX-License-Identifier: GPL-2.0-or-later
"""Checks and set-ups that several test files use."""

import contextlib
import os
import re
import subprocess
import time
from dataclasses import replace
from typing import Any, Callable, Dict, Iterable, Iterator, List, Mapping, Optional, Sequence
from typing import Set, Tuple

import pytest

from livemig import host, memory, paths, workload
from livemig.errors import NotPossibleHere
from livemig.guest import Guest
from livemig.host import MIB
from livemig.lab import ABSENT, Lab
from livemig.migration import POSTCOPY, Hints, MigrationResult, cancel, finish, migrate, query
from livemig.migration import set_capabilities, start, status_is
from livemig.modes import MODES, Mode, migration_for_mode
from livemig.oracle import Oracle
from livemig.spec import GuestSpec, MigrationSpec

# A small guest boots fast, and most of it is free.
SMALL = GuestSpec(mem_mib=1024, vcpus=2)
STAMP_MIB = 16
# A guest that clears memory when it is freed, and not again when it is used: but for huge pages.
INIT_ON_FREE = ("init_on_free=1", "transparent_hugepage=never")
# What tests write and free so that there is something for hints to skip.
FREED_MIB = 512
FREED_PAGES = FREED_MIB * 256

# Room for memory that is plugged in while a guest runs.
ROOM = ("-m", "maxmem=8G,slots=4")

# As long as a migration can be told to wait: tests are not about how soon a guest answers, and on a
# machine that has other things to do it may take seconds.
PATIENT_MS = 60000

# Hints as users get them, with the default deadline.
OUT_OF_THE_BOX = replace(migration_for_mode(MODES["array"]), capabilities={"free-page-hint": True})
WITH_HINTS = OUT_OF_THE_BOX.with_parameters(free_page_hint_wait=PATIENT_MS)
NO_HINTS = migration_for_mode(MODES["none"])
# Stock QEMU does not know the capability.
FOR_STOCK = replace(OUT_OF_THE_BOX, capabilities={})


def patient(mode: Mode) -> MigrationSpec:
    """The migration of one of our modes, that waits for the guest's answer however late it is."""
    spec = migration_for_mode(mode).with_parameters(free_page_hint_wait=PATIENT_MS)
    # Whether absent pages are skipped is for the guest's QEMU to say, as in OUT_OF_THE_BOX.
    hints = mode.capabilities.get("free-page-hint")
    return spec.with_capabilities(free_page_hint=True) if hints else spec


def in_check(cases: Iterable[Any], *names: str, long: Sequence[str] = ()) -> List[Any]:
    """The cases of a test, of which these belong to "make check", or which are "long"."""
    known = {case if isinstance(case, str) else case.name: case for case in cases}
    named = {**dict.fromkeys(names, pytest.mark.check), **dict.fromkeys(long, pytest.mark.long)}
    assert set(named) <= set(known), f"no such case: {set(named) - set(known)}"
    return [
        pytest.param(case, id=name, marks=[named[name]] if name in named else [])
        for name, case in known.items()
    ]


def fill_and_free(guest: Guest) -> None:
    """Leave free memory that is not zero, and memory that knows its contents."""
    workload.dirty_and_free(guest, FREED_MIB)
    workload.stamp(guest, STAMP_MIB)


def start_churn(guest: Guest) -> None:
    """Memory of the guest is rewritten, freed and taken back from now on."""
    workload.stamp(guest, 48, churn=True, realloc_mib=128, name="churn")


def keep_busy(guest: Guest) -> Guest:
    """A guest at work, with free memory that is not zero: as most tests have it."""
    fill_and_free(guest)
    start_churn(guest)
    return guest


def watched(lab: Lab, spec: GuestSpec = SMALL) -> Tuple[Oracle, Guest]:
    """A guest that is watched, and has booted."""
    oracle = Oracle(lab, spec)
    return oracle, oracle.boot()


def busy(lab: Lab, spec: GuestSpec = SMALL) -> Tuple[Oracle, Guest, Guest]:
    """A guest at work that is watched, and the QEMU that it goes to."""
    oracle, guest = watched(lab, spec)
    return oracle, keep_busy(guest), oracle.arrival()


def dimm(mib: int) -> Tuple[str, ...]:
    """Arguments for a memory module."""
    return (
        *("-object", f"memory-backend-ram,id=dimm,size={mib}M,reserve=off"),
        *("-device", "pc-dimm,id=dimm0,memdev=dimm"),
    )


def plug_dimm(guest: Guest, mib: int) -> None:
    """Plug a memory module like this into a guest that runs."""
    backend = {"qom-type": "memory-backend-ram", "id": "dimm", "size": mib * MIB, "reserve": False}
    guest.qmp_dict("object-add", backend)
    guest.qmp("device_add", driver="pc-dimm", id="dimm0", memdev="dimm")


def assert_intact(guest: Guest, name: str = "default") -> workload.Verdict:
    """The guest finds all of its stamped memory right."""
    verdict = workload.verify(guest, name)
    assert verdict.pages > 0
    assert verdict.errors == 0, verdict.first
    return verdict


def assert_goes_on(guest: Guest, seconds: float = 120) -> workload.Verdict:
    """The guest goes on with what start_churn() began, and finds all of it right."""
    arrived = assert_intact(guest, "churn")
    deadline = time.monotonic() + seconds
    while True:
        now = assert_intact(guest, "churn")
        if now.passes > arrived.passes and now.reallocs > arrived.reallocs:
            return now
        assert time.monotonic() < deadline, f"the guest stands still: {arrived}, {now}"


def assert_whole(guest: Guest) -> None:
    """The guest finds its stamped memory right, and goes on with what start_churn() began."""
    assert_intact(guest)
    assert_goes_on(guest)


def hints_of(result: MigrationResult) -> Hints:
    """The statistics of hints, which our QEMU always gives."""
    assert result.hints is not None, "query-migrate has no free-page-hint"
    return result.hints


def hints_now(source: Guest) -> Hints:
    """The statistics of hints, so far."""
    return hints_of(query(source))


def hinted_blocks(source: Guest) -> Set[str]:
    """The blocks of RAM that something was hinted in, of a traced guest."""
    text = source.trace_log.read_text()
    return set(re.findall(rf"^{memory.HINT_EVENT} block '([^']*)'", text, re.MULTILINE))


def assert_hints_used(result: MigrationResult, least_bytes: int, too_small: bool = False) -> Hints:
    """A complete report took at least so many bytes out of the migration.

    Those that were absent are reported too, with FPH_ABSENT=1: they were out of it already.
    Some blocks are too_small where postcopy moves huge pages as a whole.
    """
    hints = hints_of(result)
    assert hints.reason is None
    assert (hints.state, hints.complete) == ("ended", True)
    assert (hints.hinted_bytes if ABSENT else hints.skipped_bytes) >= least_bytes
    assert (hints.invalid_bytes, hints.invalid_messages) == (0, 0)
    assert bool(hints.too_small_bytes) == too_small
    return hints


def assert_hints_if(wanted: bool, result: MigrationResult, least_bytes: int) -> Hints:
    """Hints were used, or, in a control run, switched off: what fails there is not their fault."""
    if wanted:
        return assert_hints_used(result, least_bytes)
    assert_not_asked(result, "disabled")
    return hints_of(result)


def assert_arrived(oracle: Oracle, measured: Dict[str, Any]) -> memory.Comparison:
    """After a migration no write is lost, and a guest at work goes on where it is now."""
    seen = oracle.check()
    measured.update(kept=seen.kept)
    assert_whole(oracle.destination)
    return seen


def assert_arrives(
    oracle: Oracle,
    measured: Dict[str, Any],
    least_bytes: int = FREED_MIB * MIB,
    spec: MigrationSpec = WITH_HINTS,
) -> Hints:
    """Migrate a guest at work: hints take out at least so many bytes, and no write is lost."""
    hints = assert_hints_used(migrate(oracle.source, oracle.destination, spec), least_bytes)
    measured.update(skipped=hints.skipped_bytes)
    assert_arrived(oracle, measured)
    return hints


def moved(lab: Lab, source: Guest, spec: MigrationSpec) -> MigrationResult:
    """Let a guest free memory, and migrate it: it arrives whole. Both QEMUs have ended then."""
    fill_and_free(source)
    destination = lab.incoming(source.spec)
    result = migrate(source, destination, spec)
    assert_intact(destination)
    source.close()
    destination.close()
    return result


def migrate_watched(
    oracle: Oracle, spec: MigrationSpec = WITH_HINTS, **changes: Any
) -> MigrationResult:
    """Migrate a guest that is watched to a QEMU that may differ: no write is lost."""
    oracle.arrival(**changes)
    result = migrate(oracle.source, oracle.destination, spec)
    oracle.check()
    return result


def assert_not_asked(result: MigrationResult, reason: str) -> None:
    """The guest was not asked, for this reason, and nothing was waited for."""
    hints = hints_of(result)
    if result.absent and result.absent.reason is None:
        # There was a round, for absent pages: it armed, and some were written later.
        hints = replace(hints, armed_bytes=0, arm_time=0, redirtied_bytes=0, requested_bytes=0)
        assert hints == Hints(state="ended", reason=reason)
    else:
        assert hints == Hints(state="idle", reason=reason)


def migration(
    base: MigrationSpec = WITH_HINTS, hints: Optional[bool] = None, **parameters: object
) -> MigrationSpec:
    """A migration with other parameters, and hints switched on or off."""
    if hints is not None:
        base = replace(base, capabilities={"free-page-hint": hints})
    return base.with_parameters(**parameters)


def wait_for(what: Callable[[], object], about: str, seconds: float = 120) -> None:
    """Wait for what no event reports."""
    deadline = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < deadline, about
        time.sleep(0.05)


def wait_dirty_rate(source: Guest, *states: str) -> None:
    """Wait until a measurement of the dirty rate has come to one of these states."""
    about = f"the dirty rate is not {' or '.join(states)}"
    wait_for(lambda: source.qmp("query-dirty-rate")["status"] in states, about, 60)


def _wait_hints(source: Guest, there: Callable[[Hints], object], seconds: float) -> Hints:
    deadline = time.monotonic() + seconds
    while not there(hints := hints_now(source)):
        assert time.monotonic() < deadline, f"the hints are still {hints.state}"
        time.sleep(0.01)
    return hints


def wait_hints(source: Guest, state: str, seconds: float = 60) -> Hints:
    """Wait until the hints of a migration have come to a state: no event says so."""
    return _wait_hints(source, lambda hints: hints.state == state, seconds)


def wait_hints_ended(source: Guest, seconds: float = 60) -> Hints:
    """Wait until a migration is done with asking for hints."""
    return wait_hints(source, "ended", seconds)


def wait_asked(source: Guest) -> None:
    """Wait until the guest has been asked."""
    wait_hints(source, "asked")


def wait_rounds(source: Guest, rounds: int) -> None:
    """Wait until memory is sent for the rounds-th time."""
    source.wait_event(
        lambda event: event["event"] == "MIGRATION_PASS" and event["data"]["pass"] >= rounds,
        f"round {rounds}",
        120,
    )


def begin(source: Guest, wait_ms: int = PATIENT_MS) -> None:
    """Start a migration that is so slow that it cannot complete."""
    set_capabilities(source, {"events": True})
    source.qmp("migrate-set-parameters", free_page_hint_wait=wait_ms, max_bandwidth=MIB)
    source.qmp("migrate", uri="exec:cat > /dev/null")
    source.wait_event(status_is("active"), "start of the migration", 60)


def wait_answered(source: Guest) -> Hints:
    """Wait until the guest is not asked any more, or could not be asked."""
    return _wait_hints(
        source,
        # The reason is there a moment before the round has ended.
        lambda hints: hints.state == "ended" or (hints.state == "idle" and hints.reason),
        PATIENT_MS / 1000 + 10,
    )


def ask(source: Guest, wait_ms: int = PATIENT_MS) -> Hints:
    """Ask once, without migrating."""
    begin(source, wait_ms)
    hints = wait_answered(source)
    cancel(source)
    return hints


def switch_early(
    source: Guest,
    destination: Guest,
    common: Mapping[str, bool],
    hints_on: bool = True,
    **parameters: object,
) -> None:
    """Start a migration, and switch to postcopy when the hints are there and little was sent."""
    # So slow that the first round is far from its end when the guest is switched over.
    spec = migration(hints=hints_on, max_bandwidth=MIB, **parameters)
    start(source, destination, replace(spec, common={"postcopy-ram": True, **common}))
    if hints_on:
        wait_hints_ended(source)
    assert query(source).status == "active"
    source.qmp("migrate-start-postcopy")


def wait_requested(source: Guest) -> None:
    """Wait until the guest has asked for a hinted page, or until postcopy ends if that is first.

    QEMU answers some ten to twenty requests a second while it holds back the rest, hints or not: it
    can take long until a guest has started a program.
    """
    while not hints_now(source).requested_bytes and query(source).status in POSTCOPY:
        time.sleep(0.1)


def finish_postcopy(source: Guest, destination: Guest) -> MigrationResult:
    """Let postcopy complete."""
    source.qmp("migrate-set-parameters", max_postcopy_bandwidth=0)
    result = finish(source, destination)
    # The premise: the guest was switched over.
    assert result.raw["ram"]["postcopy-bytes"] > 0
    return result


@contextlib.contextmanager
def going_on(guest: Guest, command: str) -> Iterator[None]:
    """Run a command in the guest over and over meanwhile; /tmp/rounds has a line for each time."""
    guest.agent.run(
        f"(while [ ! -e /tmp/enough ]; do {command}; echo >> /tmp/rounds; done;"
        " touch /tmp/done) > /tmp/loop 2>&1 &"
    )
    yield
    guest.agent.run("touch /tmp/enough; until [ -e /tmp/done ]; do sleep 0.1; done")
    assert not guest.agent.run("cat /tmp/loop")


def rounds(guest: Guest) -> int:
    """How often the command of going_on() was run."""
    return int(guest.agent.run("cat /tmp/rounds 2> /dev/null | wc -l"))


def assert_watched(guest: Guest) -> None:
    """Lockdep of the debug kernel looks on: it stops after its first complaint."""
    stats = guest.agent.run("cat /proc/lockdep_stats")
    assert re.search(r"debug_locks: +1$", stats, re.MULTILINE), stats


def run_script(*command: Any, **environment: str) -> "subprocess.CompletedProcess[str]":
    """Run one of scripts/, or a program by its whole path; return what it did and said."""
    return subprocess.run(
        [str(word) for word in (paths.REPO / "scripts" / command[0], *command[1:])],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


@contextlib.contextmanager
def huge_pages_set_aside(size_kib: int, count: int) -> Iterator[None]:
    """Huge pages of the host for a test; skips it if there are not so many."""
    try:
        with host.huge_pages(size_kib, count):
            yield
    except NotPossibleHere as err:
        pytest.skip(str(err))
