# SPDX-License-Identifier: GPL-2.0-or-later
"""Absent pages are not sent, and all memory is the same at the destination, without exception.

A bare-metal guest knows which of its pages it has touched, and when.
"""

import os
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Dict, Iterator, List, Optional, Tuple

import pytest

from livemig.absence import absent_of, assert_same
from livemig.checks import SMALL, assert_intact, fill_and_free, hints_now, hints_of
from livemig.checks import huge_pages_set_aside, in_check, wait_hints_ended, wait_rounds
from livemig.guest import Guest
from livemig.lab import Lab
from livemig.leftovers import LEFTOVER, leave_data, leftovers
from livemig.machine import MIB, PAGE
from livemig.metal import CHURN, CHURN_PAGES, HELD, WAIT_MS, Metal, accelerators, each_accelerator
from livemig.metal import let_go, metal
from livemig.migration import Absent, cancel, finish, migrate, query, restore, save, start
from livemig.oracle import Oracle
from livemig.spec import MigrationSpec

MEM_MIB = 128
# Never touched, but for the parts that a test writes: a part of 16 pages in each MiB.
ABSENT = 80 * MIB
PART_PAGES = 16
# Written, so that the first round takes a while.
KEPT = 24 * MIB
KEPT_PAGES = 2048
# What the program, its queues and what else a test writes may populate.
USED_MIB = 24
PROOF = re.compile(r"^absent_pages_block block '(\S+)': proof is (.*)$", re.MULTILINE)


def absent(hints: bool = False, **common: bool) -> MigrationSpec:
    """A migration without absent pages, as fast as it can."""
    return MigrationSpec(
        capabilities={"free-page-hint": hints, "skip-absent-pages": True},
        parameters={"max-bandwidth": 0, "downtime-limit": 2000, "free-page-hint-wait": WAIT_MS},
        common={name.replace("_", "-"): value for name, value in common.items()},
    )


def proofs(source: Guest) -> Dict[str, str]:
    """What shows that a page is absent, by block."""
    return dict(PROOF.findall(source.trace_log.read_text()))


@dataclass
class Parts:
    """Parts of a guest's memory, each written at a moment of its own."""

    guest: Metal
    addrs: Dict[str, int] = field(default_factory=dict)

    def _addr(self, part: str) -> int:
        return self.addrs.setdefault(part, ABSENT + len(self.addrs) * MIB)

    def write(self, part: str) -> None:
        """Write a part that was never touched."""
        self.guest.machine.stamp(self._addr(part), PART_PAGES, self._addr(part) // MIB)

    def read(self, part: str) -> None:
        """Read a part that was never touched."""
        for page in range(PART_PAGES):
            assert self.guest.machine.read(self._addr(part) + page * PAGE, 2) == [0, 0]

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


PRIVATE = {"mem_file": None}
MEMORIES: Dict[str, Dict[str, Any]] = {
    "private": PRIVATE,
    "memfd": {"mem_file": None, "mem_backend": "memory-backend-memfd,share=on"},
    "private-memfd": {"mem_file": None, "mem_backend": "memory-backend-memfd,share=off"},
}


@each_accelerator
@pytest.mark.parametrize("name", in_check(MEMORIES, "private", "memfd"))
def test_whenever_it_is_populated(
    lab: Lab, measured: Dict[str, Any], accel: str, name: str
) -> None:
    """What is written at any moment arrives, in memory that was absent when it was looked at."""
    with metal(lab, accel=accel, **MEMORIES[name]) as guest:
        parts = Parts(guest)
        parts.write("before the migration")
        guest.machine.stamp(KEPT, KEPT_PAGES, 2)
        destination = lab.incoming(guest.source.spec, "destination", running=False)
        spec = absent(True).with_parameters(max_bandwidth=HELD, downtime_limit=1)
        start(guest.source, destination, spec)
        cmd_id = guest.balloon.wait_asked()
        looked = absent_of(query(guest.source))
        parts.write("after the look")
        parts.read("read after the look")
        guest.balloon.send_end(cmd_id)
        assert wait_hints_ended(guest.source).reason is None
        parts.write("in round 1")
        guest.machine.stamp(CHURN, CHURN_PAGES, 1)
        guest.source.qmp("migrate-set-parameters", max_bandwidth=4 * MIB)
        wait_rounds(guest.source, 2)
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
        assert (MEM_MIB - USED_MIB) * MIB <= looked.absent_bytes < MEM_MIB * MIB
        assert redirtied >= CHURN_PAGES + 2 * PART_PAGES
        assert result.rounds >= 3
        assert result.zero_pages * PAGE <= USED_MIB * MIB
        guest.goes_on_at(destination)
        assert not parts.wrong("read after the look", "read in a later round")


@dataclass(frozen=True)
class Kind:
    """A kind of memory."""

    backend: Optional[str]
    proof: str
    # In front of it
    directory: Optional[str] = None
    changes: Dict[str, Any] = field(default_factory=dict)
    huge_kib: int = 0
    # All of it is populated.
    populated: bool = False


KINDS = {
    "private": Kind("memory-backend-ram", "mapping"),
    "prealloc": Kind("memory-backend-ram,prealloc=on", "mapping", populated=True),
    "memfd": Kind("memory-backend-memfd,share=on", "mapping and file"),
    "private-memfd": Kind("memory-backend-memfd,share=off", "mapping and file"),
    "shm": Kind("memory-backend-shm", "mapping and file"),
    "tmpfs": Kind("memory-backend-file,share=on", "mapping and file", "/dev/shm"),
    "private-tmpfs": Kind("memory-backend-file,share=off", "mapping and file", "/dev/shm"),
    "disk": Kind("memory-backend-file,share=on", "nothing", "."),
    "private-disk": Kind("memory-backend-file,share=off", "nothing", "."),
    "huge": Kind("memory-backend-memfd,hugetlb=on,share=on", "nothing", huge_kib=2048),
    "private-huge": Kind("memory-backend-memfd,hugetlb=on,share=off", "mapping", huge_kib=2048),
    "nodes": Kind("memory-backend-ram", "mapping", changes={"nodes": 2}),
}


def backends(kind: Kind, tmp_path: Path) -> Iterator[str]:
    """The memory backends of the source and the destination."""
    for name in ("source", "destination"):
        if kind.directory:
            directory = tmp_path if kind.directory == "." else Path(kind.directory)
            path = directory / f"livemig-{os.getpid()}-{name}"
            yield f"{kind.backend},mem-path={path}"
        else:
            assert kind.backend
            yield kind.backend


@pytest.mark.parametrize("name", in_check(KINDS, "private", "shm", "private-tmpfs", "disk"))
def test_kind_of_memory(lab: Lab, measured: Dict[str, Any], tmp_path: Path, name: str) -> None:
    """Of each kind of memory, what is known to be absent is skipped, and all arrives."""
    kind = KINDS[name]
    pages = 2 * MEM_MIB * 1024 // kind.huge_kib if kind.huge_kib else 0
    here, there = backends(kind, tmp_path)
    events = "free_page_hint_* absent_pages_block"
    changes = {"mem_file": None, "mem_backend": here, "trace": events, **kind.changes}
    with huge_pages_set_aside(kind.huge_kib or 2048, pages):
        with metal(lab, **changes) as guest:
            parts = Parts(guest)
            parts.write("before the migration")
            arrival = guest.source.spec.but(mem_backend=there)
            destination = lab.incoming(arrival, "destination", running=False)
            for path in (tmp_path, Path("/dev/shm")):
                for file in path.glob(f"livemig-{os.getpid()}-*"):
                    file.unlink()
            result = migrate(guest.source, destination, absent())
            looked = absent_of(result)
            measured.update(absent=looked.absent_bytes, us=looked.scan_time)
            assert_same(guest.source, destination)
            known = proofs(guest.source)
            blocks = ("pc.ram0", "pc.ram1") if kind.changes else ("pc.ram",)
            assert {known.pop(block) for block in blocks} == {kind.proof}
            # Firmware, tables, video memory: the destination's may be another version's.
            assert len(known) > 2 and set(known.values()) == {"nothing"}
            if kind.proof == "nothing":
                assert looked == Absent(reason="no-proof")
                assert hints_of(result).state == "idle"
            else:
                assert looked.reason is None
                assert hints_of(result).state == "ended"
                assert (looked.absent_bytes == 0) == kind.populated
                if not kind.populated:
                    assert looked.absent_bytes >= (MEM_MIB - USED_MIB) * MIB
            guest.goes_on_at(destination)
            assert not parts.wrong()
            guest.source.close()
            destination.close()


@accelerators("tcg")
@pytest.mark.parametrize("common", [{}, {"multifd": True}], ids=["plain", "multifd"])
@pytest.mark.parametrize("directory", [None, "/dev/shm"], ids=["disk", "tmpfs"])
def test_leftovers_at_the_destination(
    lab: Lab, accel: str, tmp_path: Path, common: Dict[str, bool], directory: Optional[str]
) -> None:
    """Where the source's pages are absent, the destination's are zero, whatever was there before.

    Its file was another guest's memory, and a program was loaded into it.
    """
    program = tmp_path / "program"
    program.write_bytes(LEFTOVER * 8)
    args = ("-device", f"loader,file={program},addr={ABSENT:#x},force-raw=on")
    with metal(lab, accel=accel, **PRIVATE) as guest, leftovers(directory) as file:
        parts = Parts(guest)
        parts.read("never written")
        parts.write("before the migration")
        there = guest.source.spec.but(
            mem_backend=f"memory-backend-file,share=on,mem-path={file}", args=args
        )
        destination = lab.incoming(there, "destination", running=False)
        result = migrate(guest.source, destination, absent(**common))
        assert absent_of(result).absent_bytes >= (MEM_MIB - USED_MIB) * MIB
        assert_same(guest.source, destination)


@accelerators("tcg")
@pytest.mark.parametrize("mapped", [True, False], ids=["mapped-ram", "stream"])
def test_through_a_file(
    lab: Lab, measured: Dict[str, Any], accel: str, tmp_path: Path, mapped: bool
) -> None:
    """A guest that is saved to a file and restored is the same, over another guest's leftovers."""
    with metal(lab, accel=accel, **PRIVATE) as guest:
        parts = Parts(guest)
        parts.write("before the migration")
        spec = absent(mapped_ram=mapped, multifd=mapped)
        saved = tmp_path / "saved"
        result = save(guest.source, saved, spec)
        measured.update(file=saved.stat().st_blocks * 512, absent=absent_of(result).absent_bytes)
        assert absent_of(result).absent_bytes >= (MEM_MIB - USED_MIB) * MIB
        leave_data(guest.files[1])
        there = guest.source.spec.but(mem_file=guest.files[1])
        destination = lab.incoming(there, "destination", running=False)
        restore(destination, saved, spec)
        assert_same(guest.source, destination)


@accelerators("tcg")
def test_stock_destination(lab: Lab, accel: str) -> None:
    """A QEMU without our patches takes a guest without its absent pages."""
    with metal(lab, 0, accel=accel, balloon="free-page-hint=off", **PRIVATE) as guest:
        parts = Parts(guest)
        parts.write("before the migration")
        there = guest.source.spec.but(qemu="stock", trace=None)
        destination = lab.incoming(there, "destination", running=False)
        result = migrate(guest.source, destination, absent())
        assert absent_of(result).absent_bytes >= (MEM_MIB - USED_MIB) * MIB
        assert_same(guest.source, destination)
        guest.goes_on_at(destination)
        assert not parts.wrong()


REFUSALS: Dict[str, Tuple[str, Dict[str, bool], Dict[str, Any]]] = {
    "switched-off": ("disabled", {"skip-absent-pages": False}, {}),
    "no-wait": ("no-wait", {}, {"free-page-hint-wait": 0}),
    "ignore-shared": ("unsupported", {"x-ignore-shared": True}, {}),
}


@accelerators("tcg")
@pytest.mark.parametrize("name", in_check(REFUSALS, *REFUSALS))
def test_not_looked_for(lab: Lab, accel: str, name: str) -> None:
    """Where absent pages cannot be used, all is sent, and the reason is given."""
    reason, capabilities, parameters = REFUSALS[name]
    common = {key: value for key, value in capabilities.items() if key.startswith("x-")}
    with metal(lab, accel=accel, **PRIVATE) as guest:
        spec = absent()
        spec = MigrationSpec(
            capabilities={**spec.capabilities, **capabilities},
            parameters={**spec.parameters, **parameters},
            common=common,
        )
        destination = lab.incoming(guest.source.spec, "destination", running=False)
        result = migrate(guest.source, destination, spec)
        assert absent_of(result) == Absent(reason=reason)
        assert hints_of(result).state == "idle"
        assert result.zero_pages * PAGE >= (MEM_MIB - USED_MIB) * MIB
        assert_same(guest.source, destination)


@accelerators("tcg")
def test_background_snapshot(lab: Lab, accel: str, tmp_path: Path) -> None:
    """A background snapshot, which write-protects memory with userfaultfd, has all pages."""
    with metal(lab, accel=accel, **PRIVATE) as guest:
        result = save(guest.source, tmp_path / "saved", absent(background_snapshot=True))
        assert absent_of(result) == Absent(reason="unsupported")
        assert result.zero_pages * PAGE >= (MEM_MIB - USED_MIB) * MIB


def populate_every_second_page(file: Path) -> None:
    """Populate a file so that looking for what is absent takes as long as it can."""
    with open(file, "r+b", buffering=0) as memory_file:
        # Not the program's, nor what a firmware's shadow or a queue may use.
        for offset in range(16 * MIB, os.fstat(memory_file.fileno()).st_size, 2 * PAGE):
            os.pwrite(memory_file.fileno(), b"x", offset)


@accelerators("tcg")
def test_time_is_over(lab: Lab, measured: Dict[str, Any], accel: str) -> None:
    """A search that takes too long is given up, what it found is used, and nothing is lost."""
    with metal(lab, accel=accel, mem_mib=1024) as guest:
        populate_every_second_page(guest.files[0])
        destination = guest.incoming()
        spec = absent(True).with_parameters(free_page_hint_wait=1)
        result = migrate(guest.source, destination, spec)
        looked = absent_of(result)
        measured.update(absent=looked.absent_bytes, us=looked.scan_time)
        assert looked.reason == "timeout"
        assert 0 < looked.absent_bytes < 496 * MIB
        assert_same(guest.source, destination)


@accelerators("tcg")
def test_a_long_search_leaves_time_to_ask(lab: Lab, measured: Dict[str, Any], accel: str) -> None:
    """A search that finds little and takes long has half of the time; then the guest is asked."""
    with metal(lab, accel=accel, mem_mib=1024) as guest:
        populate_every_second_page(guest.files[0])
        destination = guest.incoming()
        spec = absent(True).with_parameters(free_page_hint_wait=80)
        result = migrate(guest.source, destination, spec)
        measured.update(us=absent_of(result).scan_time)
        # The premise; it has 131 072 pages to look up, a microsecond each.
        assert absent_of(result).reason == "timeout"
        assert "free_page_hint_ask" in guest.source.trace_log.read_text()
        assert_same(guest.source, destination)


@accelerators("tcg")
def test_cancelled(lab: Lab, measured: Dict[str, Any], accel: str) -> None:
    """A migration that is cancelled while it looks for absent pages ends, and another one works."""
    with metal(lab, accel=accel, mem_mib=3072) as guest:
        populate_every_second_page(guest.files[0])
        source = guest.source
        abandoned = guest.incoming("abandoned")
        start(source, abandoned, absent())
        while (state := hints_now(source).state) != "scanning":
            assert state in ("idle", "arming")
        cancel(source)
        looked = absent_of(query(source))
        measured.update(absent=looked.absent_bytes, us=looked.scan_time)
        assert looked.reason == "cancelled"
        assert looked.absent_bytes < (3072 - 16) // 2 * MIB
        abandoned.close()
        destination = guest.incoming()
        result = migrate(source, destination, absent())
        measured["second"] = absent_of(result).scan_time
        assert absent_of(result).reason is None
        assert_same(source, destination)


@pytest.mark.integrity
@pytest.mark.parametrize("hints", [True, False], ids=["hints", "absent-only"])
def test_linux_guest(lab: Lab, measured: Dict[str, Any], hints: bool) -> None:
    """A Linux guest arrives whole, with absent pages alone and together with hints."""
    oracle = Oracle(lab, SMALL.but(skip_absent=True))
    source = oracle.boot()
    fill_and_free(source)
    destination = oracle.arrival()
    result = migrate(source, destination, absent(hints))
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
def test_postcopy_advised(lab: Lab, accel: str) -> None:
    """With postcopy-ram on, a migration that ends before the switch is a migration like any."""
    with metal(lab, accel=accel, **PRIVATE) as guest:
        parts = Parts(guest)
        parts.write("before the migration")
        destination = lab.incoming(guest.source.spec, "destination", running=False)
        start(guest.source, destination, absent(postcopy_ram=True))
        result = finish(guest.source, destination)
        assert absent_of(result).absent_bytes >= (MEM_MIB - USED_MIB) * MIB
        assert_same(guest.source, destination)
