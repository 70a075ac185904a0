# SPDX-License-Identifier: GPL-2.0-or-later
"""Long campaigns: dozens of migrations under churn, each with the oracle.

"make test-long" runs them, FPH_MIGRATIONS and FPH_TRIPS say how many. Each migration is a line on
the console; the totals are in the results file.
"""

import collections
import itertools
import math
import os
import time
from typing import Any, Counter, Dict, Iterator, Mapping, Tuple

import pytest

from livemig import resident, workload
from livemig.checks import SMALL, assert_goes_on, assert_hints_used, assert_intact, migration
from livemig.checks import wait_hints_ended, wait_rounds, watched
from livemig.guest import Guest
from livemig.lab import Lab
from livemig.machine import MIB
from livemig.migration import MigrationResult, finish, let_end, start
from livemig.modes import MODES
from livemig.oracle import Oracle
from livemig.resident import Resident, residents

MIGRATIONS = int(os.environ.get("FPH_MIGRATIONS", "60"))
TRIPS = int(os.environ.get("FPH_TRIPS", "15"))
# After so many migrations another guest is booted.
PER_GUEST = 20

GUEST = SMALL.but(mem_mib=256)
# Written and freed before each migration, so that there is something for hints to take out.
FREED_MIB = 64
TAKEN_BACK_MIB = 64
HELD_BACK = 4 * MIB
# A boot may take a minute or more under KVM: each of these has its share of all migrations.
KVM_GUESTS: Tuple[Dict[str, Any], ...] = (
    {"vcpus": 2, "cmdline": ("movablecore=128M",)},
    {"vcpus": 2, "balloon": MODES["block"].balloon},
    {"vcpus": 1},
    {"vcpus": 1, "balloon": MODES["block"].balloon},
)
# So that memory cannot be compared.
IN_POSTCOPY = ("postcopy", "postcopy, absent", "preempt")
# A source was a destination before: what another way has switched on is switched off.
PLAIN = {"multifd": False, "xbzrle": False, "postcopy-ram": False, "postcopy-preempt": False}


# Ways to migrate, by what is switched on.
WAYS: Dict[str, Dict[str, bool]] = {
    "plain": {},
    "multifd": {"multifd": True},
    "xbzrle": {"xbzrle": True},
    "many rounds": {},
    "postcopy": {"postcopy-ram": True},
    "preempt": {"postcopy-ram": True, "postcopy-preempt": True},
}
BALLOONS = (MODES["array"].balloon, MODES["array"].balloon, MODES["block"].balloon)


def migrate_in(way: str, source: Guest, destination: Guest) -> MigrationResult:
    """Migrate a busy guest in a given way."""
    # So slow that the guest is still there for what it is told below.
    spec = migration(max_bandwidth=HELD_BACK, downtime_limit=1, max_postcopy_bandwidth=0)
    start(source, destination, spec.with_common(**(PLAIN | WAYS[way])))
    wait_hints_ended(source)
    # Takes memory back that was hinted a moment ago.
    source.agent.run(f"dirtyfree {TAKEN_BACK_MIB} 2 > /dev/null 2>&1 &")
    if way in IN_POSTCOPY:
        source.qmp("migrate-start-postcopy")
        return finish(source, destination)
    bandwidth, rounds = (128 * MIB, 8) if way == "many rounds" else (400 * MIB, 3)
    source.qmp("migrate-set-parameters", max_bandwidth=bandwidth)
    wait_rounds(source, rounds)
    return let_end(source, destination)


def add(totals: Counter[str], about: str, counts: Mapping[str, int], began: float) -> None:
    """Count a migration, and put it on the console."""
    totals["migrations"] += 1
    totals.update(counts)
    text = ", ".join(f"{name} {n}" for name, n in counts.items())
    seconds = time.monotonic() - began
    print(f"{totals['migrations']:4} {about}: {text}, {seconds:.1f} s", flush=True)


def set_out(lab: Lab, **changes: Any) -> Oracle:
    """A busy guest, to be migrated from one QEMU to the next one."""
    oracle, guest = watched(lab, GUEST.but(**changes))
    workload.stamp(guest, 16)
    workload.stamp(guest, 24, churn=True, realloc_mib=64, name="churn")
    return oracle


def move(oracle: Oracle, way: str, totals: Counter[str]) -> None:
    """Migrate it once: it loses no write."""
    compared = way not in IN_POSTCOPY
    began = time.monotonic()
    workload.dirty_and_free(oracle.source, FREED_MIB)
    before = assert_intact(oracle.source, "churn")
    there = oracle.arrival(running=not compared)
    result = migrate_in(way, oracle.source, there)
    hints = assert_hints_used(result, 0)
    absent_bytes = result.absent.absent_bytes if result.absent else 0
    # The premise: there was something to take out.
    assert hints.skipped_bytes + absent_bytes >= FREED_MIB // 2 * MIB
    kept = oracle.check().kept if compared else 0
    oracle.move_on()
    verdicts = [assert_intact(there), assert_goes_on(there)]
    counts = {
        "compared": int(compared),
        "rounds": result.rounds,
        "absent_mib": absent_bytes // MIB,
        "skipped_mib": hints.skipped_bytes // MIB,
        "redirtied_mib": hints.redirtied_bytes // MIB,
        "kept_pages": kept,
        "stale_bytes": hints.stale_bytes,
        "blocks_reallocated": verdicts[1].reallocs - before.reallocs,
        "pages_verified": sum(verdict.pages for verdict in verdicts),
    }
    add(totals, way, counts, began)


@pytest.fixture
def totals(measured: Dict[str, Any]) -> Iterator[Counter[str]]:
    """What is counted over all migrations, also of a campaign that failed."""
    counts: Counter[str] = collections.Counter()
    began = time.monotonic()
    yield counts
    measured.update(counts, seconds=round(time.monotonic() - began))
    print(f"totals: {measured}")


def test_every_way(lab: Lab, totals: Counter[str]) -> None:
    """No write is lost in hundreds of migrations, in all ways in turn, with and without arrays.

    Nor with and without absent pages.
    """
    ways = itertools.cycle(WAYS)
    numbers = range(0, MIGRATIONS, PER_GUEST)
    absent = itertools.cycle((True, False))
    for number, balloon, skip in zip(numbers, itertools.cycle(BALLOONS), absent):
        oracle = set_out(lab, balloon=balloon, skip_absent=skip)
        for way in itertools.islice(ways, min(PER_GUEST, MIGRATIONS - number)):
            move(oracle, way, totals)
        oracle.close()
    assert totals["migrations"] == MIGRATIONS
    # The premises: the guest took back and wrote what it had hinted; something was absent.
    assert totals["redirtied_mib"] > 0 and totals["absent_mib"] > 0


def test_there_and_back(lab: Lab, totals: Counter[str]) -> None:
    """A guest that goes there and back many times keeps all that it has, and hints each time."""
    oracle = set_out(lab, skip_absent=True)
    for _ in range(2 * TRIPS):
        move(oracle, "plain", totals)
    assert totals["migrations"] == 2 * TRIPS
    assert totals["redirtied_mib"] > 0


# QEMUs that a guest leaves under KVM.
KVM_WAYS: Dict[str, Dict[str, Any]] = {
    **resident.WAYS,
    "postcopy": {},
    "postcopy, absent": {"skip_absent": True},
    "preempt": {},
}


def migrate_under_kvm(guest: Resident, name: str, then: str, totals: Counter[str]) -> None:
    """Migrate a guest in a given way, into the QEMU of the next one."""
    began = time.monotonic()
    into = KVM_WAYS[then]
    counts = {"compared": int(name not in IN_POSTCOPY)}
    if name in IN_POSTCOPY:
        guest.move_in_postcopy(counts, preempt=name == "preempt", into=into)
    else:
        guest.move(counts, into=into)
    # A time.
    del counts["ask_to_end"]
    add(totals, name, counts, began)


def test_every_way_under_kvm(lab: Lab, totals: Counter[str]) -> None:
    """No Linux guest under KVM loses a write, with arrays and blocks, however writes are logged."""
    names = list(KVM_WAYS)
    share = math.ceil(MIGRATIONS / len(KVM_GUESTS))
    for number, changes in zip(range(0, MIGRATIONS, share), KVM_GUESTS):
        numbers = range(number, min(number + share, MIGRATIONS))
        way = KVM_WAYS[names[number % len(names)]]
        with residents(lab, **changes) as guest, guest.living_in(**way):
            for i in numbers:
                name, then = names[i % len(names)], names[(i + 1) % len(names)]
                migrate_under_kvm(guest, name, then, totals)
    assert totals["migrations"] == MIGRATIONS
    # The premises: hinted pages were written before the host knew, and again after that.
    assert totals["taken"] > 0 and totals["rewritten"] > 0 and totals["redirtied"] > 0
    assert MIGRATIONS < len(names) or (totals["absent"] > 0 and totals["requested"] > 0)
