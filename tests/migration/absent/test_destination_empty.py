# SPDX-License-Identifier: GPL-2.0-or-later
"""Nobody's data at the destination: its RAM is empty before the first page is loaded.

A page that is not sent shows what the destination's RAM held before. Here that is another guest's
data, in a file that is used again; after the migration each page is the source's, or zero.
"""

import mmap
import re
import subprocess
from pathlib import Path
from typing import Any, Dict, Iterator, Tuple

import pytest

from livemig import memory, paths, workload
from livemig.checks import FREED_MIB, INIT_ON_FREE, NO_HINTS, SMALL, WITH_HINTS, assert_hints_if
from livemig.checks import assert_intact, fill_and_free, huge_pages_set_aside, migration
from livemig.checks import wait_rounds
from livemig.errors import MigrationError
from livemig.guest import Guest
from livemig.lab import Lab
from livemig.leftovers import LEFTOVER, RAM_BYTES, leave_data, leftovers
from livemig.machine import MIB, PAGE
from livemig.metal import CHURN, CHURN_PAGES, DOWNTIME_MS, HELD, HINTED_PAGES, SLOW, STRIP_PAGES
from livemig.metal import Metal, metal, read_page, strips, written_metal
from livemig.migration import cancel, finish, migrate, restore, set_capabilities, start, status_is

EMPTIED = re.compile(r"^ram_make_empty block '(\S+)' (\w+) (\d+) bytes$", re.MULTILINE)


def emptied(destination: Guest) -> Dict[str, Tuple[str, int]]:
    """How a QEMU emptied its files, and how many bytes of data it found, by block."""
    text = destination.trace_log.read_text()
    return {match[1]: (match[2], int(match[3])) for match in EMPTIED.finditer(text)}


def arrival(guest: Metal, **changes: Any) -> Guest:
    """A QEMU that waits for the guest, with other memory."""
    there = guest.source.spec.but(mem_file=None, trace="ram_make_empty").but(**changes)
    return guest.lab.incoming(there, running=False)


def in_leftovers(guest: Metal) -> Guest:
    """One whose memory is a file with another guest's data."""
    leave_data(guest.files[1])
    return arrival(guest, mem_file=guest.files[1])


@pytest.fixture(name="guest")
def guest_fixture(lab: Lab) -> Iterator[Metal]:
    """A guest that has written its memory."""
    with written_metal(lab) as guest:
        yield guest


def hint(guest: Metal) -> None:
    """Let the guest hint pages that hold data."""
    hints = guest.report(guest.balloon.wait_asked(), HINTED_PAGES)
    assert hints.skipped_bytes == len(HINTED_PAGES) * PAGE


def assert_empty_or_sent(guest: Metal, destination: Guest, hints: bool = True) -> None:
    """Each page at the destination is the source's, but that hinted ones are zero."""
    here, there = memory.ram_blocks(guest.source), memory.ram_blocks(destination)
    different = {
        (name, page * PAGE)
        for name, mask in memory.different_pages(here, there).items()
        for page in mask.nonzero()[0]
    }
    # The premise is in this too: what was hinted held data.
    assert different == ({("pc.ram", addr) for addr in HINTED_PAGES} if hints else set())
    with open(there["pc.ram"].path, "rb") as file:
        for addr in HINTED_PAGES if hints else []:
            assert read_page(file, there["pc.ram"].offset + addr) == bytes(PAGE)


def move(guest: Metal, destination: Guest, hints: bool = True, **common: bool) -> None:
    """Migrate, with hints for pages that hold data, or without: nothing is left."""
    start(guest.source, destination, migration(hints=hints).with_common(**common))
    if hints:
        hint(guest)
    finish(guest.source, destination)
    assert_empty_or_sent(guest, destination, hints)


LOCKED = ("-overcommit", "mem-lock=on")
# What somebody else's data can be in: properties of a memory backend, where its file is, and how it
# is emptied.
KINDS = {
    "tmpfs": ("share=on", "/dev/shm", "punched"),
    "disk": ("share=on", None, "punched"),
    "cannot-punch": ("share=on", None, "zeroed"),
    "preallocated": ("share=on,prealloc=on", "/dev/shm", "zeroed"),
    "locked": ("share=on", "/dev/shm", "zeroed"),
    "private": ("share=off", None, "zeroed"),
    "read-only-file": ("share=off,readonly=on,rom=off", None, "zeroed"),
}


@pytest.mark.parametrize("name", KINDS)
def test_leftovers_of_another_guest(guest: Metal, measured: Dict[str, Any], name: str) -> None:
    """A guest that hints pages to read what was in the destination's memory reads zeroes."""
    properties, directory, how = KINDS[name]
    with leftovers(directory) as file:
        backend = f"memory-backend-file,mem-path={file},{properties}"
        preload = paths.bare_metal("no-punch-hole.so") if name == "cannot-punch" else None
        args = LOCKED if name == "locked" else ()
        destination = arrival(guest, mem_backend=backend, preload=preload, args=args)
        move(guest, destination)
        measured.update(emptied=emptied(destination))
        assert emptied(destination)["pc.ram"] == (how, RAM_BYTES)
        if name in ("preallocated", "locked"):
            # It was populated, and that was paid for.
            assert file.stat().st_blocks * 512 == RAM_BYTES
        # Contents of a file that is mapped privately are its owner's.
        if "share=off" in properties:
            assert file.read_bytes() == LEFTOVER * (RAM_BYTES // PAGE)
        # The guest itself sees the same.
        guest.goes_on_at(destination)
        assert guest.machine.read(HINTED_PAGES[0], 4) == [0] * 4


@pytest.mark.parametrize("hints", [True, False], ids=["hints", "no-hints"])
@pytest.mark.parametrize("common", [{}, {"multifd": True}], ids=["plain", "multifd"])
def test_ways_to_migrate(guest: Metal, common: Dict[str, bool], hints: bool) -> None:
    """Nothing is left by any way to send RAM, with hints and without.

    multifd does not write a zero page that is sent first, so that it needs this without hints too.
    """
    move(guest, in_leftovers(guest), hints, **common)


@pytest.mark.parametrize("hints", [True, False], ids=["hints", "no-hints"])
@pytest.mark.parametrize("mapped", [True, False], ids=["mapped-ram", "stream"])
def test_saved_to_a_file(guest: Metal, tmp_path: Path, mapped: bool, hints: bool) -> None:
    """A saved guest, whose file lacks what was hinted or is zero, comes back as it was."""
    saved = tmp_path / "saved"
    spec = migration(hints=hints).with_common(mapped_ram=mapped)
    # As migration.save() does, but for the guest that has to answer meanwhile.
    set_capabilities(guest.source, {**spec.capabilities, **spec.common, "events": True})
    guest.source.qmp_dict("migrate-set-parameters", dict(spec.parameters))
    guest.source.qmp("migrate", uri=f"file:{saved}")
    if hints:
        hint(guest)
    guest.source.wait_event(status_is("completed"), "end of the save", 60)

    destination = in_leftovers(guest)
    restore(destination, saved, spec)
    assert_empty_or_sent(guest, destination, hints)


def test_postcopy(guest: Metal) -> None:
    """After a switch to postcopy nothing is left either."""
    destination = in_leftovers(guest)
    start(guest.source, destination, migration(max_bandwidth=HELD).with_common(postcopy_ram=True))
    hint(guest)
    guest.source.qmp("migrate-start-postcopy")
    assert finish(guest.source, destination).raw["ram"]["postcopy-bytes"] > 0
    assert_empty_or_sent(guest, destination)


def test_second_attempt(guest: Metal) -> None:
    """What an attempt that was cancelled has left is gone when the next one begins."""
    first = guest.incoming("abandoned")
    held = migration(hints=False, downtime_limit=DOWNTIME_MS, max_bandwidth=SLOW)
    start(guest.source, first, held)
    guest.machine.stamp(CHURN, CHURN_PAGES, 1)
    wait_rounds(guest.source, 2)
    cancel(guest.source)
    first.close()
    # The premise: what is hinted in the second attempt was sent in the first one.
    with open(guest.files[1], "rb") as file:
        assert read_page(file, HINTED_PAGES[0]) != bytes(PAGE)
    move(guest, arrival(guest, mem_file=guest.files[1]))


# Where memory stays populated, and where QEMU's own memory is shared, too
AT_THE_DESTINATION = {
    "plain": (),
    "mem-lock": LOCKED,
    "aux-ram-share": ("-machine", "aux-ram-share=on"),
}


@pytest.mark.parametrize("name", AT_THE_DESTINATION)
def test_what_qemu_itself_put_there(lab: Lab, tmp_path: Path, name: str) -> None:
    """A table that the destination's QEMU has made, and a program for it, do not show through.

    ACPI tables cannot be hinted, but multifd does not write their zero pages. Where memory stays
    populated, they are written over.
    """
    files = [tmp_path / "here", tmp_path / "there"]
    files[0].write_bytes(bytes(32 << 10))
    files[1].write_bytes(LEFTOVER * 8)
    tables = [("-acpitable", f"sig=TEST,data={file}") for file in files]
    program = ("-device", f"loader,file={files[1]},addr={HINTED_PAGES[0]:#x},force-raw=on")
    with written_metal(lab, args=tables[0]) as guest:
        destination = arrival(guest, args=(*tables[1], *program, *AT_THE_DESTINATION[name]))
        # The premise: it is there before the guest comes.
        block = memory.ram_blocks(destination)["/rom@etc/acpi/tables"]
        with open(block.path, "rb") as file:
            file.seek(block.offset)
            assert LEFTOVER in file.read(block.pages * PAGE)
        move(guest, destination, multifd=True)


@pytest.mark.parametrize("template", [False, True], ids=["moved", "template"])
def test_memory_that_stays(guest: Metal, template: bool) -> None:
    """With x-ignore-shared, a file is the guest's memory, also for clones that only read it."""
    changes: Dict[str, Any] = {"mem_file": guest.files[0]}
    if template:
        properties = f"mem-path={guest.files[0]},share=off,readonly=on,rom=off"
        changes = {"mem_backend": f"memory-backend-file,{properties}"}
    destination = arrival(guest, **changes)
    move(guest, destination, hints=False, x_ignore_shared=True)
    assert "pc.ram" not in emptied(destination)
    assert not any(guest.lost(part, destination=False) for part in guest.seeds)
    guest.goes_on_at(destination)
    for part, seed in guest.seeds.items():
        assert guest.machine.wrong_pages(strips(part)[0], STRIP_PAGES, seed) == 0


NVDIMM = ("-machine", "nvdimm=on", "-m", "slots=1,maxmem=1G")


@pytest.mark.parametrize("contents", [True, False], ids=["contents", "zero"])
def test_read_only_memory(lab: Lab, tmp_path: Path, contents: bool) -> None:
    """Memory that is read-only and not empty is refused, with its name, and the source runs on."""
    files = [tmp_path / "here", tmp_path / "there"]
    for file in files:
        file.write_bytes(bytes(2 * MIB))
    if contents:
        leave_data(files[1], 2 * MIB)
    args = [
        (*NVDIMM, "-device", "nvdimm,id=dimm,memdev=rom,unarmed=on")
        + ("-object", f"memory-backend-file,id=rom,mem-path={file},size=2M,share=on,readonly=on")
        for file in files
    ]
    with written_metal(lab, args=args[0]) as guest:
        destination = arrival(guest, args=args[1])
        if not contents:
            move(guest, destination)
            return
        with pytest.raises(MigrationError):
            move(guest, destination, False, return_path=True)
        message = "RAM block 'rom' has contents and is read-only"
        assert message in destination.qemu_output()
        assert guest.source.qmp("query-status")["status"] == "running"
        assert guest.machine.wrong_pages(strips("free")[0], 1, guest.seeds["free"]) == 0


FRESH = {
    "memfd": "memory-backend-memfd,share=on",
    "private": "memory-backend-ram",
    "preallocated": "memory-backend-memfd,share=on,prealloc=on",
    "new-file": "memory-backend-file,share=on,prealloc=on,mem-path={}/new",
    "directory": "memory-backend-file,share=on,prealloc=on,mem-path={}",
}


@pytest.mark.parametrize("name", FRESH)
def test_fresh_memory_is_left_alone(guest: Metal, tmp_path: Path, name: str) -> None:
    """Memory that nobody else has used is not looked at, and remains populated if it was."""
    destination = arrival(guest, mem_backend=FRESH[name].format(tmp_path))
    move(guest, destination)
    assert emptied(destination) == {}
    if name == "new-file":
        assert (tmp_path / "new").stat().st_blocks * 512 >= RAM_BYTES


@pytest.fixture(name="huge_pages")
def _huge_pages(tmp_path: Path) -> Iterator[Path]:
    """A hugetlbfs whose pool has two guests' memory, and some more: it is given back late."""
    where = tmp_path / "huge"
    where.mkdir()
    with huge_pages_set_aside(2048, 2 * RAM_BYTES // (2 * MIB) + 16):
        subprocess.run(["mount", "-t", "hugetlbfs", "-o", "pagesize=2M", "none", where], check=True)
        try:
            yield where
        finally:
            subprocess.run(["umount", where], check=True)


HUGE = {
    "reserved": ("share=on,reserve=on", "zeroed"),
    "not-reserved": ("share=on,reserve=off", "punched"),
    "preallocated": ("share=on,prealloc=on", "zeroed"),
    "private": ("share=off,reserve=on", "zeroed"),
}


# The pages come first, as they are given back when the lab has ended its guests.
@pytest.mark.parametrize("name", HUGE)
def test_huge_pages(huge_pages: Path, guest: Metal, name: str) -> None:
    """Nothing is left in hugetlbfs, and pages that were reserved remain so."""
    file = huge_pages / "memory"
    properties, how = HUGE[name]
    with open(file, "w+b") as pages:
        pages.truncate(RAM_BYTES)
        with mmap.mmap(pages.fileno(), RAM_BYTES) as view:
            view.write(LEFTOVER * (RAM_BYTES // PAGE))
    backend = f"memory-backend-file,mem-path={file},{properties}"
    destination = arrival(guest, mem_backend=backend)
    move(guest, destination)
    assert emptied(destination)["pc.ram"] == (how, RAM_BYTES)


@pytest.mark.parametrize("name", ["init-on-free", "two-nodes", "no-hints"])
def test_linux_guest(lab: Lab, measured: Dict[str, Any], name: str) -> None:
    """A Linux guest lives on in a file of another guest's data, and has none of it.

    One that clears memory when it frees it gives what was hinted to its programs as it is.
    """
    hints = name != "no-hints"
    spec = SMALL.but(nodes=2) if name == "two-nodes" else SMALL.but(cmdline=INIT_ON_FREE)
    with memory.memory_files("memory") as (file,):
        leave_data(file, spec.mem_mib * MIB)
        source = lab.boot(spec)
        fill_and_free(source)
        destination = lab.incoming(spec.but(mem_file=file, trace="ram_make_empty"))
        result = migrate(source, destination, WITH_HINTS if hints else NO_HINTS)
        assert_hints_if(hints, result, FREED_MIB * MIB)
        measured.update(emptied=emptied(destination))
        assert_intact(destination)
        workload.stamp(destination, FREED_MIB, name="new")
        assert_intact(destination, "new")
        with open(file, "rb") as pages:
            left = sum(page == LEFTOVER for page in iter(lambda: pages.read(PAGE), b""))
        assert left == 0


PERSISTENT = {
    "nvdimm": (*NVDIMM, "-device", "nvdimm,memdev=nv"),
    "acpi-erst": ("-device", "acpi-erst,memdev=nv"),
}
# Of records of errors, QEMU writes the header itself, where there is none.
ERST_HEADER = 64 << 10


def persistent(name: str, file: Path, mib: int) -> Tuple[str, ...]:
    """Arguments for a device that keeps a file."""
    backend = f"memory-backend-file,id=nv,mem-path={file},size={mib}M,share=on"
    return ("-object", backend, *PERSISTENT[name])


@pytest.mark.parametrize("name", PERSISTENT)
def test_persistent_memory_is_not_ours(lab: Lab, tmp_path: Path, name: str) -> None:
    """A file of persistent memory that source and destination share keeps what is in it."""
    header = ERST_HEADER if name == "acpi-erst" else 0
    file = tmp_path / "nv"
    file.write_bytes(bytes(header) + LEFTOVER * ((16 * MIB - header) // PAGE))
    args = persistent(name, file, 16)
    with written_metal(lab, args=args) as guest:
        destination = arrival(guest, args=args)
        # Nothing of it was lost while it could be seen from both sides.
        move(guest, destination)
        assert "nv" not in emptied(destination)
        assert file.read_bytes()[header:] == LEFTOVER * ((16 * MIB - header) // PAGE)


def test_persistent_memory_cannot_be_hinted(lab: Lab, tmp_path: Path) -> None:
    """What a destination leaves as it is, is sent whatever a guest hints: no leftovers are read."""
    here, there = tmp_path / "here", tmp_path / "there"
    here.write_bytes(bytes(2 * MIB))
    leave_data(there, 2 * MIB)
    with metal(lab, args=persistent("nvdimm", here, 2)) as guest:
        destination = arrival(guest, args=persistent("nvdimm", there, 2))
        start(guest.source, destination, WITH_HINTS)
        (dimm,) = guest.source.qmp("query-memory-devices")
        first = dimm["data"]["addr"]
        addrs = range(first, first + 2 * MIB, PAGE)
        hints = guest.report(guest.balloon.wait_asked(), addrs)
        finish(guest.source, destination)
        assert there.read_bytes() == bytes(2 * MIB)
        assert (hints.skipped_bytes, hints.invalid_bytes) == (0, 2 * MIB)
