# SPDX-License-Identifier: GPL-2.0-or-later
"""The memory of the machine that the guests run on."""

import contextlib
import mmap
import sys
from pathlib import Path
from typing import Iterator, Optional

from livemig.errors import LivemigError, NotEnoughMemory, NotPossibleHere

PAGE_BYTES = 4096
MIB = 1 << 20

# A wrapper of a guest (see GuestSpec): the host gives it no transparent huge pages, whatever QEMU
# asks for. The number is PR_SET_THP_DISABLE, of the kernel's uapi headers.
NO_HUGE_PAGES = (
    sys.executable,
    "-c",
    "import ctypes, os, sys\n"
    "if ctypes.CDLL(None).prctl(41, 1, 0, 0, 0): sys.exit('cannot switch huge pages off')\n"
    "os.execvp(sys.argv[1], sys.argv[1:])",
)

# Where control groups are (version 2).
CGROUPS = Path("/sys/fs/cgroup")


def field(file: str, name: str) -> Optional[str]:
    """What follows a name in one of the files of /proc that have a name on each line."""
    for line in Path(file).read_text(encoding="utf-8", errors="replace").splitlines():
        key, _, value = line.partition(":")
        if key.strip() == name:
            return value.strip()
    return None


def process_mib(pid: Optional[int], *names: str) -> float:
    """The memory that a process occupies; or these fields of its status, in sum."""
    found = (field(f"/proc/{pid}/status", name) for name in names or ("VmRSS",))
    return sum(int((text or "0").split()[0]) for text in found) / 1024


def available_mib() -> int:
    """The memory that the host, or the container that we are in, can give without swapping."""
    found = field("/proc/meminfo", "MemAvailable")
    if not found:
        raise LivemigError("/proc/meminfo does not say how much memory is available")
    return min([int(found.split()[0]) // 1024, *_left_by_limits_mib()])


def check_memory(need_mib: int, what: str) -> None:
    """Stop before the host runs out of memory in the middle."""
    have = available_mib()
    if need_mib > have:
        raise NotEnoughMemory(f"{what} needs {need_mib} MiB of memory, {have} MiB are available")


def _left_by_limits_mib() -> Iterator[int]:
    """What is left of the memory limits of our control group and of those above it."""
    own = Path("/proc/self/cgroup").read_text(encoding="utf-8").rpartition("0::/")[2].strip()
    for group in (CGROUPS / own, *(CGROUPS / own).parents):
        # Without a file there is no limit, nor with the word "max".
        with contextlib.suppress(OSError, ValueError):
            limit = int((group / "memory.max").read_text(encoding="ascii"))
            used = int((group / "memory.current").read_text(encoding="ascii"))
            stat = (group / "memory.stat").read_text(encoding="ascii").split()
            # Cached files are dropped when there is need.
            for word in "active_file", "inactive_file":
                used -= int(stat[stat.index(word) + 1])
            yield max(limit - used, 0) // MIB


@contextlib.contextmanager
def huge_pages(size_kib: int, count: int) -> Iterator[None]:
    """So many huge pages more, until the context ends. Raises NotPossibleHere if there are not."""
    control = Path(f"/sys/kernel/mm/hugepages/hugepages-{size_kib}kB/nr_hugepages")
    if not control.exists():
        raise NotPossibleHere(f"this host has no huge pages of {size_kib} KiB")
    before = int(control.read_text(encoding="ascii"))
    try:
        control.write_text(str(before + count), encoding="ascii")
    except OSError as err:
        raise NotPossibleHere(f"huge pages cannot be set aside on this host: {err}") from err
    try:
        if int(control.read_text(encoding="ascii")) < before + count:
            raise NotPossibleHere(f"this host has no {count} free huge pages of {size_kib} KiB")
        yield
    finally:
        control.write_text(str(before), encoding="ascii")


@contextlib.contextmanager
def warmed(mib: int) -> Iterator[None]:
    """Touch so much free memory, and free it when the context ends.

    A destination populates memory that was free. If this host is a virtual machine itself, free
    memory may have been taken back by its own host, and the first write to it is then many times
    slower than on bare metal: what is measured is what happened to run before. Memory that was
    freed a moment ago is backed, and is the first to be allocated again. It does not stay so: where
    free pages are reported, much of it is gone some seconds later.
    """
    try:
        free = mmap.mmap(-1, mib * MIB, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except OSError as err:
        raise NotEnoughMemory(f"the host does not give {mib} MiB: {err.strerror}") from err
    with free as memory:
        # As QEMU does with guest RAM: the cost is in clearing huge pages. Not every host has them.
        with contextlib.suppress(OSError):
            memory.madvise(mmap.MADV_HUGEPAGE)
        for offset in range(0, mib * MIB, PAGE_BYTES):
            memory[offset] = 1
        yield
