# SPDX-License-Identifier: GPL-2.0-or-later
"""Linux guests under KVM lose no write, however KVM logs what they write.

The dirty log, its deferred clear, the memory slots and the pages are KVM's own. Where the
processor's kernel mode is interpreted, the guest is slow, but all that it writes is logged.
"""

from collections import Counter
from typing import Any, Dict, Iterator

import pytest

from livemig import memory, workload
from livemig.checks import in_check, wait_hints_ended
from livemig.lab import Lab
from livemig.migration import cancel, start
from livemig.resident import FREED_MIB, MIB, WAYS, Resident, busy_migration, residents
from livemig.spec import BLOCKS

pytestmark = pytest.mark.integrity

# Postcopy was over before a hinted page was used once in 60 migrations.
ATTEMPTS = 4


@pytest.fixture(scope="module")
def guest(module_lab: Lab) -> Iterator[Resident]:
    """A guest with two vCPUs and movable memory, that hints in arrays."""
    with residents(module_lab, ("movablecore=128M",), vcpus=2) as resident:
        yield resident


@pytest.fixture(scope="module")
def block_guest(module_lab: Lab) -> Iterator[Resident]:
    """A guest that hints block by block."""
    with residents(module_lab, vcpus=2, balloon=BLOCKS) as resident:
        yield resident


# Huge pages of QEMU itself, at most: its heap, and its threads' arenas.
OF_QEMU_MIB = 16

# Ways in which nothing is hinted: the load and the checks are the same.
CONTROLS = ("shift-18", "shift-6", "no-manual-protect", "memfd")
# Ways that only combine, or vary, what others do.
VARIED = ("shift-31", "memfd", "no-manual-protect-shift-6", "absent-shift-6")


def assert_busy(measured: Dict[str, Any]) -> None:
    """The premises: hinted pages were written, before the host knew of the hint and after that."""
    assert measured["taken"] > 0
    assert measured["rewritten"] > 0
    assert measured["redirtied"] >= measured["taken"]


@pytest.mark.parametrize("way", in_check(WAYS, long=VARIED))
def test_arrays(guest: Resident, measured: Dict[str, Any], way: str) -> None:
    """Arrays of hints take out what is free, and nothing that is written before or after."""
    with guest.living_in(**WAYS[way]) as resident:
        huge = resident.huge_mib()
        resident.move(measured)
        measured["huge_mib"] = huge
    assert_busy(measured)
    # The premise, if absent pages are looked up: there are some.
    assert "skip_absent" not in WAYS[way] or measured["absent"] > 0
    # The premise: what the guest's memory is made of. QEMU's own may be a few huge pages.
    assert (huge > OF_QEMU_MIB) == ("small-pages" not in way and "memfd" not in way)


# Where writes are interpreted, each takes an entry, and one instruction may write 512 times. KVM
# only looks between instructions whether the ring is full. Once it ran over, QEMU and KVM seem not
# to agree any more on where it begins: it stays full, and the guest hardly gets on. So this guest
# writes so little that what QEMU takes out each second never fills it; and it hints the small
# blocks, too, which is where so little comes from. See test_bare_metal for more.
@pytest.mark.long
def test_dirty_ring(lab: Lab, measured: Dict[str, Any]) -> None:
    """With a dirty ring, arrays of hints take out what is free, and nothing that is written."""
    events = f"{memory.KEPT_EVENTS} kvm_dirty_ring_reap kvm_dirty_ring_full"
    ring = {"accel": "kvm,dirty-ring-size=65536", "trace": events}
    small = ("virtio_balloon_hint.hint_order=0",)
    with residents(lab, small, vcpus=2, busy=False) as guest, guest.living_in(**ring) as resident:
        log = resident.here.trace_log
        resident.move(measured, taken_back=[1] * 8, rounds=2)
        text = log.read_text(errors="replace")
        measured["full"] = text.count("kvm_dirty_ring_full")
    # The premises: the ring was used, and hinted pages were written.
    assert "kvm_dirty_ring_reap" in text
    assert measured["rewritten"] > 0


@pytest.mark.parametrize("way", in_check(CONTROLS, long=CONTROLS[1:]))
def test_control(guest: Resident, measured: Dict[str, Any], way: str) -> None:
    """Without hints, memory is equal and intact under the same load, however writes are logged."""
    with guest.living_in(**WAYS[way]) as resident:
        resident.move(measured, hints=False)
    assert (measured["skipped"], measured["kept"]) == (0, 0)


# It boots a guest of its own.
@pytest.mark.long
def test_one_processor(lab: Lab, measured: Dict[str, Any]) -> None:
    """A guest with one vCPU loses nothing."""
    with residents(lab, vcpus=1) as guest, guest.living_in() as resident:
        resident.move(measured)
    assert_busy(measured)


@pytest.mark.parametrize("way", in_check(("shift-18", "shift-6", "absent"), long=["shift-6"]))
def test_blocks(block_guest: Resident, measured: Dict[str, Any], way: str) -> None:
    """Hints block by block take out what is free, and nothing that is written after that."""
    with block_guest.living_in(**WAYS[way]) as resident:
        resident.move(measured)
    # The premise. Nothing can be taken before: blocks are allocated when they are hinted.
    assert measured["rewritten"] > 0
    assert "skip_absent" not in WAYS[way] or measured["absent"] > 0


@pytest.mark.long
def test_blocks_control(block_guest: Resident, measured: Dict[str, Any]) -> None:
    """Without hints, memory of a guest that could hint block by block is equal and intact."""
    with block_guest.living_in() as resident:
        resident.move(measured, hints=False)
    assert (measured["skipped"], measured["kept"]) == (0, 0)


@pytest.mark.parametrize("way", ["plain", "preempt"])
def test_postcopy(guest: Resident, measured: Dict[str, Any], way: str) -> None:
    """A guest that uses hinted pages while the rest comes in postcopy loses nothing."""
    with guest.living_in() as resident:
        for _ in range(ATTEMPTS):
            resident.move_in_postcopy(measured, preempt=way == "preempt")
            if measured["requested"]:
                return
    pytest.fail("the premise: each time, postcopy was over before a hinted page was used")


def test_postcopy_control(guest: Resident, measured: Dict[str, Any]) -> None:
    """Without hints, a guest that comes in postcopy is intact under the same load."""
    with guest.living_in() as resident:
        resident.move_in_postcopy(measured, hints=False)
    assert measured["skipped"] == 0
    # Absent pages that are asked for count there, too.
    assert measured["requested"] == 0 or measured["absent"] > 0


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


@pytest.mark.parametrize("trips", [1, pytest.param(20, marks=pytest.mark.long)])
def test_there_and_back(guest: Resident, measured: Dict[str, Any], trips: int) -> None:
    """A guest that goes there and back many times keeps all that it has, and hints each time."""
    totals: Counter[str] = Counter()
    with guest.living_in() as resident:
        for _ in range(2 * trips):
            resident.move(measured, taken_back=[4], rounds=1, bandwidth=64 * MIB, freed_mib=16)
            totals.update(measured)
    measured.update(totals)
    assert_busy(measured)
