# SPDX-License-Identifier: GPL-2.0-or-later
"""Absent pages are not sent, and all memory is the same at the destination, without exception.

A bare-metal guest knows which of its pages it has touched, and when.
"""

import contextlib
import os
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Dict, Iterator, List, Optional

import pytest

from livemig.absence import ABSENT, absent_of, assert_absent_used, assert_same, in_page_table
from livemig.checks import SMALL, assert_intact, fill_and_free, hints_now, hints_of
from livemig.checks import huge_pages_set_aside, in_check, wait_hints_ended, wait_rounds, watched
from livemig.guest import Guest
from livemig.lab import Lab
from livemig.leftovers import LEFTOVER, leave_data, leftovers
from livemig.machine import MIB, PAGE
from livemig.metal import CHURN, CHURN_PAGES, HELD, Metal, accelerators, each_accelerator, let_go
from livemig.metal import metal
from livemig.migration import Absent, cancel, migrate, query, restore, save, start
from livemig.spec import MigrationSpec

MEM_MIB = 128
# Never touched, but for the parts that a test writes: a part of 16 pages in each MiB.
UNTOUCHED = 80 * MIB
PART_PAGES = 16
# Written, so that the first round takes a while.
KEPT = 24 * MIB
KEPT_PAGES = 2048
# What the program, its queues and what else a test writes may populate.
USED_MIB = 24
NEVER_USED = (MEM_MIB - USED_MIB) * MIB
# What shows that a page is absent, by block.
PROOF = re.compile(r"^absent_pages_block block '(\S+)': proof is (.*)$", re.MULTILINE)


HINTS_TOO = ABSENT.with_capabilities(free_page_hint=True, skip_absent_pages=True)


@dataclass
class Parts:
    """Parts of a guest's memory, each written at a moment of its own."""

    guest: Metal
    addrs: Dict[str, int] = field(default_factory=dict)

    def addr(self, part: str) -> int:
        """Where a part is."""
        return self.addrs.setdefault(part, UNTOUCHED + len(self.addrs) * MIB)

    def write(self, part: str) -> None:
        """Write a part that was never touched."""
        self.guest.machine.stamp(self.addr(part), PART_PAGES, self.addr(part) // MIB)

    def read(self, part: str) -> None:
        """Read a part that was never touched."""
        for page in range(PART_PAGES):
            assert self.guest.machine.read(self.addr(part) + page * PAGE, 2) == [0, 0]

    def wrong(self, *unwritten: str) -> List[str]:
        """The parts in which the guest does not find what it wrote."""
        machine = self.guest.machine
        return [
            part
            for part, addr in self.addrs.items()
            if (
                any(machine.read(addr, 4))
                if part in unwritten
                else machine.wrong_pages(addr, PART_PAGES, addr // MIB)
            )
        ]


@contextlib.contextmanager
def parts_written(lab: Lab, **changes: Any) -> Iterator[Parts]:
    """A bare-metal guest with private memory, which has written a part of it."""
    with metal(lab, **{"mem_file": None, **changes}) as guest:
        parts = Parts(guest)
        parts.write("before the migration")
        yield parts


@pytest.fixture(name="parts")
def parts_fixture(lab: Lab, accel: str) -> Iterator[Parts]:
    """See parts_written()."""
    with parts_written(lab, accel=accel) as parts:
        yield parts


def arrival(guest: Metal, **changes: Any) -> Guest:
    """A QEMU that waits for the guest, with memory of the same kind but for changes."""
    return guest.lab.incoming(guest.source.spec.but(**changes), running=False)


def move(guest: Metal, destination: Guest, spec: MigrationSpec = ABSENT) -> None:
    """Migrate: what the guest never used is skipped, and all memory is the same."""
    result = migrate(guest.source, destination, spec)
    assert_absent_used(result, NEVER_USED)
    assert_same(guest.source, destination)


MEMORIES = {
    "private": "memory-backend-ram",
    "memfd": "memory-backend-memfd,share=on",
    "private-memfd": "memory-backend-memfd,share=off",
}


@each_accelerator
@pytest.mark.parametrize("name", in_check(MEMORIES, "private", "memfd"))
def test_whenever_it_is_populated(
    lab: Lab, measured: Dict[str, Any], accel: str, name: str
) -> None:
    """What is written at any moment arrives, in memory that was absent when it was looked at."""
    with parts_written(lab, accel=accel, mem_backend=MEMORIES[name]) as parts:
        guest = parts.guest
        guest.machine.stamp(KEPT, KEPT_PAGES, 2)
        parts.read("read before the look")
        # The premises: the page table has something here, and nothing there.
        assert in_page_table(guest.source, parts.addr("read before the look"))
        assert not in_page_table(guest.source, parts.addr("after the look"))
        destination = arrival(guest)
        spec = HINTS_TOO.with_parameters(max_bandwidth=HELD, downtime_limit=1)
        start(guest.source, destination, spec)
        cmd_id = guest.balloon.wait_asked()
        looked = absent_of(query(guest.source))
        parts.write("after the look")
        parts.write("read before the look")
        parts.read("read after the look")
        parts.read("read and written")
        guest.balloon.send_end(cmd_id)
        assert wait_hints_ended(guest.source).reason is None
        parts.write("in round 1")
        parts.write("read and written")
        guest.machine.stamp(CHURN, CHURN_PAGES, 1)
        guest.source.qmp("migrate-set-parameters", max_bandwidth=4 * MIB)
        wait_rounds(guest.source, 2)
        # On a busy machine it takes a second to read a part.
        guest.source.qmp("migrate-set-parameters", max_bandwidth=HELD)
        parts.write("in a later round")
        parts.read("read in a later round")
        result = let_go(guest.source, destination)
        redirtied = hints_of(result).redirtied_bytes // PAGE
        measured.update(
            absent=looked.absent_bytes, us=looked.scan_time, rounds=result.rounds, again=redirtied
        )
        assert_same(guest.source, destination)
        # The premises: what was written after the look was absent, and the rest is.
        assert looked.reason is None
        assert NEVER_USED <= looked.absent_bytes < MEM_MIB * MIB
        assert redirtied >= CHURN_PAGES + 3 * PART_PAGES
        assert result.rounds >= 3
        assert result.zero_pages * PAGE <= USED_MIB * MIB
        guest.goes_on_at(destination)
        assert not parts.wrong("read after the look", "read in a later round")


FILE = "mapping and file"
# A memory backend, and what shows that a page of it is absent.
KINDS = {
    "private": ("memory-backend-ram", "mapping"),
    "prealloc": ("memory-backend-ram,prealloc=on", "mapping"),
    "memfd": ("memory-backend-memfd,share=on", FILE),
    "private-memfd": ("memory-backend-memfd,share=off", FILE),
    "shm": ("memory-backend-shm", FILE),
    "tmpfs": ("memory-backend-file,share=on,mem-path=/dev/shm/{name}", FILE),
    "private-tmpfs": ("memory-backend-file,share=off,mem-path=/dev/shm/{name}", FILE),
    "disk": ("memory-backend-file,share=on,mem-path={disk}/{name}", "nothing"),
    "private-disk": ("memory-backend-file,share=off,mem-path={disk}/{name}", "nothing"),
    "huge": ("memory-backend-memfd,hugetlb=on,share=on", "nothing"),
    "private-huge": ("memory-backend-memfd,hugetlb=on,share=off", "mapping"),
    "nodes": ("memory-backend-ram", "mapping"),
}


@pytest.mark.parametrize("name", in_check(KINDS, "private", "shm", "private-tmpfs", "disk"))
def test_kind_of_memory(lab: Lab, measured: Dict[str, Any], tmp_path: Path, name: str) -> None:
    """Of each kind of memory, what is known to be absent is skipped, and all arrives."""
    backend, proof = KINDS[name]
    prefix = f"livemig-{os.getpid()}"
    here, there = (
        backend.format(disk=tmp_path, name=f"{prefix}-{end}") for end in ("here", "there")
    )
    nodes = 2 if name == "nodes" else 1
    # For both guests.
    pages = 2 * MEM_MIB // 2 if "hugetlb" in here else 0
    with huge_pages_set_aside(2048, pages), parts_written(
        lab, mem_backend=here, nodes=nodes, trace="free_page_hint_* absent_pages_block"
    ) as parts:
        guest = parts.guest
        destination = arrival(guest, mem_backend=there)
        for path in (tmp_path, Path("/dev/shm")):
            for file in path.glob(f"{prefix}-*"):
                file.unlink()
        result = migrate(guest.source, destination, ABSENT)
        looked = absent_of(result)
        measured.update(absent=looked.absent_bytes, us=looked.scan_time)
        assert_same(guest.source, destination)
        known = dict(PROOF.findall(guest.source.trace_log.read_text()))
        own = [known.pop(block) for block in list(known) if block.startswith("pc.ram")]
        assert own == [proof] * nodes
        # Firmware, tables, video memory: the destination's may be another version's.
        assert len(known) > 2 and set(known.values()) == {"nothing"}
        if proof == "nothing":
            assert looked == Absent(reason="no-proof")
            assert hints_of(result).state == "idle"
        else:
            assert looked.reason is None
            assert hints_of(result).state == "ended"
            if name == "prealloc":
                assert looked.absent_bytes == 0
            else:
                assert looked.absent_bytes >= NEVER_USED
        guest.goes_on_at(destination)
        assert not parts.wrong()
        guest.source.close()
        destination.close()


@accelerators("tcg")
@pytest.mark.parametrize("common", [{}, {"multifd": True}], ids=["plain", "multifd"])
@pytest.mark.parametrize("directory", [None, "/dev/shm"], ids=["disk", "tmpfs"])
def test_leftovers_at_the_destination(
    parts: Parts, tmp_path: Path, common: Dict[str, bool], directory: Optional[str]
) -> None:
    """Where the source's pages are absent, the destination's are zero, whatever was there before.

    Its file was another guest's memory, and a program was loaded into it.
    """
    program = tmp_path / "program"
    program.write_bytes(LEFTOVER * 8)
    args = ("-device", f"loader,file={program},addr={UNTOUCHED:#x},force-raw=on")
    parts.read("never written")
    with leftovers(directory) as file:
        backend = f"memory-backend-file,share=on,mem-path={file}"
        destination = arrival(parts.guest, mem_backend=backend, args=args)
        move(parts.guest, destination, ABSENT.with_common(**common))


@accelerators("tcg")
@pytest.mark.parametrize("mapped", [True, False], ids=["mapped-ram", "stream"])
def test_through_a_file(
    parts: Parts, measured: Dict[str, Any], tmp_path: Path, mapped: bool
) -> None:
    """A guest that is saved to a file and restored is the same, over another guest's leftovers."""
    guest, saved = parts.guest, tmp_path / "saved"
    spec = ABSENT.with_common(mapped_ram=mapped, multifd=mapped)
    looked = assert_absent_used(save(guest.source, saved, spec), NEVER_USED)
    measured.update(file=saved.stat().st_blocks * 512, absent=looked.absent_bytes)
    leave_data(guest.files[1])
    destination = guest.incoming()
    restore(destination, saved, spec)
    assert_same(guest.source, destination)


@accelerators("tcg")
def test_stock_destination(lab: Lab, accel: str) -> None:
    """A QEMU without our patches takes a guest without its absent pages."""
    plain = {"features": 0, "balloon": "free-page-hint=off"}
    with parts_written(lab, accel=accel, **plain) as parts:
        destination = arrival(parts.guest, qemu="stock", trace=None)
        move(parts.guest, destination)
        parts.guest.goes_on_at(destination)
        assert not parts.wrong()


NEITHER = ABSENT.with_capabilities(free_page_hint=False, skip_absent_pages=False)
REFUSALS = {
    "switched-off": ("disabled", NEITHER),
    "no-wait": ("no-wait", ABSENT.with_parameters(free_page_hint_wait=0)),
    "ignore-shared": ("unsupported", ABSENT.with_common(x_ignore_shared=True)),
}


@accelerators("tcg")
@pytest.mark.parametrize("name", in_check(REFUSALS, *REFUSALS))
def test_not_looked_for(parts: Parts, name: str) -> None:
    """Where absent pages cannot be used, all is sent, and the reason is given."""
    reason, spec = REFUSALS[name]
    destination = arrival(parts.guest)
    result = migrate(parts.guest.source, destination, spec)
    assert absent_of(result) == Absent(reason=reason)
    assert hints_of(result).state == "idle"
    assert result.zero_pages * PAGE >= NEVER_USED
    assert_same(parts.guest.source, destination)


@accelerators("tcg")
def test_background_snapshot(parts: Parts, tmp_path: Path) -> None:
    """A background snapshot, which write-protects memory with userfaultfd, has all pages."""
    spec = ABSENT.with_common(background_snapshot=True)
    result = save(parts.guest.source, tmp_path / "saved", spec)
    assert absent_of(result) == Absent(reason="unsupported")
    assert result.zero_pages * PAGE >= NEVER_USED


@contextlib.contextmanager
def hard_to_search(lab: Lab, accel: str, mem_mib: int = 1024) -> Iterator[Metal]:
    """A guest that has every second page, so that a search takes as long as it can."""
    with metal(lab, accel=accel, mem_mib=mem_mib) as guest:
        with open(guest.files[0], "r+b", buffering=0) as file:
            # Not the program's, nor what a firmware's shadow or a queue may use.
            for offset in range(16 * MIB, mem_mib * MIB, 2 * PAGE):
                os.pwrite(file.fileno(), b"x", offset)
        yield guest


def search(guest: Metal, measured: Dict[str, Any], wait_ms: int) -> Absent:
    """Migrate with a search that takes too long: nothing is lost."""
    destination = guest.incoming()
    spec = HINTS_TOO.with_parameters(free_page_hint_wait=wait_ms)
    looked = absent_of(migrate(guest.source, destination, spec))
    measured.update(absent=looked.absent_bytes, us=looked.scan_time)
    # The premise; it has 131 072 pages to look up, a microsecond each.
    assert looked.reason == "timeout"
    assert_same(guest.source, destination)
    return looked


@accelerators("tcg")
def test_time_is_over(lab: Lab, measured: Dict[str, Any], accel: str) -> None:
    """A search that takes too long is given up, what it found is used, and nothing is lost."""
    with hard_to_search(lab, accel) as guest:
        assert 0 < search(guest, measured, 1).absent_bytes < 496 * MIB


@accelerators("tcg")
def test_a_long_search_leaves_time_to_ask(lab: Lab, measured: Dict[str, Any], accel: str) -> None:
    """A search that finds little and takes long has half of the time; then the guest is asked."""
    with hard_to_search(lab, accel) as guest:
        search(guest, measured, 80)
        assert "free_page_hint_ask" in guest.source.trace_log.read_text()


@accelerators("tcg")
def test_cancelled(lab: Lab, measured: Dict[str, Any], accel: str) -> None:
    """A migration that is cancelled while it looks for absent pages ends, and another one works."""
    with hard_to_search(lab, accel, 3072) as guest:
        source = guest.source
        abandoned = guest.incoming("abandoned")
        start(source, abandoned, ABSENT)
        while (state := hints_now(source).state) != "scanning":
            assert state in ("idle", "arming")
        cancel(source)
        looked = absent_of(query(source))
        measured.update(absent=looked.absent_bytes, us=looked.scan_time)
        assert looked.reason == "cancelled"
        assert looked.absent_bytes < (3072 - 16) // 2 * MIB
        abandoned.close()
        destination = guest.incoming()
        result = migrate(source, destination, ABSENT)
        measured["second"] = absent_of(result).scan_time
        assert absent_of(result).reason is None
        assert_same(source, destination)


@pytest.mark.integrity
@pytest.mark.parametrize("hints", [True, False], ids=["hints", "absent-only"])
def test_linux_guest(lab: Lab, measured: Dict[str, Any], hints: bool) -> None:
    """A Linux guest arrives whole, with absent pages alone and together with hints."""
    oracle, source = watched(lab, SMALL.but(skip_absent=True))
    fill_and_free(source)
    destination = oracle.arrival()
    result = migrate(source, destination, HINTS_TOO if hints else ABSENT)
    looked, told = absent_of(result), hints_of(result)
    measured.update(
        absent=looked.absent_bytes, skipped=told.skipped_bytes, again=told.redirtied_bytes
    )
    seen = oracle.check()
    # What the guest never touched, which is less with the debug kernel.
    assert looked.absent_bytes >= 192 * MIB
    if hints:
        assert told.skipped_bytes >= 400 * MIB
        assert told.hinted_bytes > told.skipped_bytes
    else:
        assert (told.reason, seen.different) == ("disabled", 0)
    assert_intact(destination)


@accelerators("tcg")
def test_postcopy_advised(parts: Parts) -> None:
    """With postcopy-ram on, a migration that ends before the switch is a migration like any."""
    move(parts.guest, arrival(parts.guest), ABSENT.with_common(postcopy_ram=True))
