# SPDX-License-Identifier: GPL-2.0-or-later
"""What tests of absent pages share: how much of a guest is there, and what was skipped of it."""

import contextlib
import ctypes
import os
import struct
import subprocess
import tempfile
from typing import Iterator

import pytest

from livemig import memory, paths
from livemig.checks import PATIENT_MS
from livemig.guest import Guest
from livemig.migration import Absent, MigrationResult
from livemig.modes import MODES, migration_for_mode

# Absent pages alone, and with hints. Guests have to be started with skip_absent=True.
ABSENT = migration_for_mode(MODES["absent"]).with_parameters(free_page_hint_wait=PATIENT_MS)
ABSENT_AND_HINTS = ABSENT.with_capabilities(free_page_hint=True)


def absent_of(result: MigrationResult) -> Absent:
    """The statistics of absent pages, which our QEMU always gives."""
    assert result.absent is not None, "query-migrate has no absent-pages"
    return result.absent


def assert_absent_used(result: MigrationResult, least_bytes: int) -> Absent:
    """The host was asked for all memory, and at least so many bytes were skipped."""
    absent = absent_of(result)
    assert absent.reason is None
    assert absent.absent_bytes >= least_bytes > 0
    return absent


def assert_same(source: Guest, destination: Guest) -> None:
    """All memory is the same on both sides, and no page is excepted."""
    here, there = memory.ram_blocks(source), memory.ram_blocks(destination)
    different = memory.different_pages(here, there)
    assert {name: mask.nonzero()[0][:20].tolist() for name, mask in different.items()} == {
        name: [] for name in here
    }


def absent_pages(guest: Guest) -> memory.Mask:
    """Which pages of its memory a traced guest's migration has found to be absent."""
    log = guest.trace_log.read_text(encoding="utf-8")
    return memory.runs(log, 0, memory.ABSENT_EVENT, memory.ram_blocks(guest))["pc.ram"]


# The host's swap

PAGEMAP_PRESENT = 1 << 63
SYS_PROCESS_MADVISE = 440
MADV_PAGEOUT = 21


def in_page_table(guest: Guest, addr: int) -> bool:
    """Whether the page table of a QEMU has a page of the guest's memory."""
    page = (memory.main_block(guest).offset + addr) // memory.PAGE_BYTES
    with open(f"/proc/{guest.pid}/pagemap", "rb") as file:
        file.seek(page * 8)
        return bool(int.from_bytes(file.read(8), "little") & PAGEMAP_PRESENT)


def page_out(guest: Guest) -> None:
    """Take as much of the guest's memory from the QEMU as the kernel takes."""
    block = memory.main_block(guest)
    start, end = block.offset, block.offset + block.pages * memory.PAGE_BYTES
    syscall = ctypes.CDLL(None, use_errno=True).syscall
    syscall.restype = ctypes.c_long
    assert guest.pid
    process = os.pidfd_open(guest.pid)
    try:
        # It may stop anywhere.
        while start < end:
            iovec = struct.pack("NN", start, end - start)
            done = syscall(SYS_PROCESS_MADVISE, process, iovec, 1, MADV_PAGEOUT, ctypes.c_uint(0))
            if done <= 0:
                raise OSError(ctypes.get_errno(), "process_madvise")
            start += done
    finally:
        os.close(process)


@contextlib.contextmanager
def swap_space(mib: int) -> Iterator[None]:
    """A file to swap to; skips the test where there can be none."""
    paths.OUT.mkdir(exist_ok=True)
    handle, file = tempfile.mkstemp(dir=paths.OUT, prefix="swap.")
    with contextlib.ExitStack() as stack:
        stack.callback(os.unlink, file)
        with os.fdopen(handle, "wb") as out:
            os.posix_fallocate(out.fileno(), 0, mib << 20)
        for command in ("mkswap", "swapon"):
            done = subprocess.run([command, file], capture_output=True, text=True, check=False)
            if done.returncode:
                pytest.skip(f"this host cannot swap to a file: {command}: {done.stderr.strip()}")
        stack.callback(subprocess.run, ["swapoff", file], check=True)
        yield
