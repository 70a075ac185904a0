# SPDX-License-Identifier: GPL-2.0-or-later
"""Linux guests under KVM lose no write, however KVM logs what they write.

The dirty log, its deferred clear, the memory slots and the pages are KVM's own. Where the
processor's kernel mode is interpreted, the guest is slow, but all that it writes is logged.
"""

import os
import time
from typing import Any, Dict, Iterator

import pytest
from checks import hints_of, wait_hints_ended
from conftest import Lab
from resident import FREED_MIB, MIB, PAGE, TAKEN_BACK_MIB, Resident, busy_migration
from resident import residents

from livemig import paths, workload
from livemig.migration import cancel, finish, query, start
from livemig.spec import BLOCKS

# An emulated kernel is slow.
pytestmark = [pytest.mark.integrity, pytest.mark.long]

TRIPS = int(os.environ.get("FPH_TRIPS", "20"))


@pytest.fixture(scope="module")
def guest(module_lab: Lab) -> Iterator[Resident]:
    """A guest with two vCPUs and movable memory, that hints in arrays."""
    with residents(module_lab, "movablecore=128M", vcpus=2) as resident:
        yield resident


@pytest.fixture(scope="module")
def small_guest(module_lab: Lab) -> Iterator[Resident]:
    """A guest with one vCPU, that hints block by block."""
    with residents(module_lab, vcpus=1, balloon=BLOCKS) as resident:
        yield resident


def chunks(shift: int) -> Dict[str, Any]:
    """A QEMU that clears the log in chunks of so many pages, as a power of two."""
    return {"args": ("-global", f"migration.x-clear-bitmap-shift={shift}")}


NO_MANUAL_PROTECT = {"preload": "no-manual-protect.so", "qemu": "ours"}
MEMFD = "memory-backend-memfd,share=on"
# How KVM logs, and what the guest's memory is made of. Not the ring: each write that is interpreted
# takes an entry of it, and a guest that can do nothing else does not get on. See test_bare_metal.
WAYS: Dict[str, Dict[str, Any]] = {
    "shift-18": chunks(18),
    "shift-6": chunks(6),
    "shift-31": chunks(31),
    "no-manual-protect": NO_MANUAL_PROTECT,
    "no-manual-protect-shift-6": {**NO_MANUAL_PROTECT, **chunks(6)},
    "small-pages": {"preload": "no-huge-pages.so"},
    "memfd": {"mem_backend": MEMFD},
}


def with_libraries(way: Dict[str, Any]) -> Dict[str, Any]:
    """A way, with paths in place of names."""
    if "preload" not in way:
        return way
    return {**way, "preload": paths.bare_metal(way["preload"])}


def assert_busy(measured: Dict[str, Any]) -> None:
    """The premises: hinted pages were written, before the host knew of the hint and after that."""
    assert measured["taken"] > 0
    assert measured["rewritten"] > 0
    assert measured["redirtied"] >= measured["taken"]


@pytest.mark.parametrize("way", WAYS)
def test_arrays(guest: Resident, measured: Dict[str, Any], way: str) -> None:
    """Arrays of hints take out what is free, and nothing that is written before or after."""
    with guest.living_in(**with_libraries(WAYS[way])) as resident:
        huge = resident.huge_mib()
        resident.move(measured)
        measured["huge_mib"] = huge
    assert_busy(measured)
    # The premise: what the guest's memory is made of.
    assert (huge > 0) == (way not in ("small-pages", "memfd"))


def test_one_processor(lab: Lab, measured: Dict[str, Any]) -> None:
    """A guest with one vCPU, loses nothing."""
    with residents(lab, vcpus=1) as guest, guest.living_in() as resident:
        resident.move(measured)
    assert_busy(measured)


@pytest.mark.parametrize("way", ["shift-18", "shift-6"])
def test_blocks(small_guest: Resident, measured: Dict[str, Any], way: str) -> None:
    """Hints block by block take out what is free, and nothing that is written after that."""
    with small_guest.living_in(**WAYS[way]) as resident:
        resident.move(measured)
    # The premise. Nothing can be taken before: blocks are allocated when they are hinted.
    assert measured["rewritten"] > 0


@pytest.mark.parametrize("way", ["plain", "preempt"])
def test_postcopy(guest: Resident, measured: Dict[str, Any], way: str) -> None:
    """A guest that uses hinted pages while the rest comes in postcopy loses nothing."""
    common = {"postcopy-ram": True, "postcopy-preempt": way == "preempt"}
    with guest.living_in() as resident:
        workload.dirty_and_free(resident.here, FREED_MIB)
        resident.arrival(running=True)
        start(
            resident.here,
            resident.there,
            busy_migration(common, max_bandwidth=MIB, max_postcopy_bandwidth=2 * MIB),
        )
        wait_hints_ended(resident.here)
        resident.here.qmp("migrate-start-postcopy")
        resident.there.wait_event(lambda event: event["event"] == "RESUME", "postcopy", 60)
        # Nobody waits for the answer: its word is nobody's.
        resident.there.agent.send(f"unheard dirtyfree {TAKEN_BACK_MIB}")
        while not hints_of(query(resident.here)).requested_bytes:
            assert query(resident.here).status == "postcopy-active"
            time.sleep(0.1)
        resident.here.qmp("migrate-set-parameters", max_postcopy_bandwidth=0)
        result = finish(resident.here, resident.there)
        hints = hints_of(result)
        measured.update(
            requested=hints.requested_bytes // PAGE, skipped=hints.skipped_bytes // PAGE
        )
        resident.arrived(compare=False)
        resident.assert_intact()


def test_cancelled_and_again(guest: Resident, measured: Dict[str, Any]) -> None:
    """A migration after one that was cancelled, while asked or later, loses nothing."""
    with guest.living_in() as resident:
        for wait_for in (lambda: None, lambda: wait_hints_ended(resident.here)):
            workload.dirty_and_free(resident.here, FREED_MIB)
            resident.arrival()
            start(resident.here, resident.there, busy_migration(max_bandwidth=MIB))
            wait_for()
            cancel(resident.here)
            resident.assert_intact()
        resident.move(measured)
    assert_busy(measured)


@pytest.mark.long
def test_there_and_back(guest: Resident, measured: Dict[str, Any]) -> None:
    """A guest that goes there and back many times keeps all that it has, and hints each time."""
    totals: Dict[str, int] = {}
    with guest.living_in() as resident:
        for _ in range(2 * TRIPS):
            resident.move(measured)
            assert_busy(measured)
            for name, count in measured.items():
                totals[name] = totals.get(name, 0) + count
    measured.update(totals)
