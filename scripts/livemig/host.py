# SPDX-License-Identifier: GPL-2.0-or-later
"""The memory of the machine that the guests run on."""

import mmap
from pathlib import Path

from livemig.errors import LivemigError

PAGE_BYTES = 4096
MIB = 1 << 20


def available_mib() -> int:
    """The memory that the host can give without swapping."""
    for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) // 1024
    raise LivemigError("/proc/meminfo does not tell how much memory is available")


def warm(mib: int) -> None:
    """Touch so much free memory, and free it again.

    A destination populates memory that was free. If this host is a virtual machine itself, free
    memory may have been taken back by its own host, and the first write to it is then many times
    slower than on bare metal: what is measured is what happened to run before. Memory that was
    freed a moment ago is backed, and is the first to be allocated again.
    """
    with mmap.mmap(-1, mib * MIB, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as memory:
        # As QEMU does with guest RAM: the cost is in clearing huge pages.
        memory.madvise(mmap.MADV_HUGEPAGE)
        for offset in range(0, mib * MIB, PAGE_BYTES):
            memory[offset] = 1
