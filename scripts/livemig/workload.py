# SPDX-License-Identifier: GPL-2.0-or-later
"""What a guest does before and during a migration, and how it is checked afterwards."""

import re
from dataclasses import dataclass
from typing import Dict, List, Sequence

from livemig.errors import GuestError
from livemig.guest import Guest
from livemig.host import PAGE_BYTES

# The last column of /proc/buddyinfo counts blocks of this many pages on x86-64.
MAX_ORDER_PAGES = 1024
# The orders that the driver reports by default (hint_order): blocks of 4 MiB to 64 KiB.
TOLD_ORDERS = 7
TOLD_SIZES = [MAX_ORDER_PAGES * PAGE_BYTES >> below for below in range(TOLD_ORDERS)]


@dataclass(frozen=True)
class Verdict:
    """What memstamp says about its memory."""

    pages: int
    errors: int
    checked: int
    passes: int
    reallocs: int
    first: str

    @property
    def good(self) -> bool:
        """Every page was there and right."""
        return self.pages > 0 and self.errors == 0


def stamp(
    guest: Guest, mib: int, *, churn: bool = False, realloc_mib: int = 0, name: str = "default"
) -> None:
    """Fill memory of the guest with pages that know what they must contain.

    With churn, it is checked and rewritten all the time; realloc_mib is taken from the guest's
    allocator and given back over and over besides.
    """
    options = f"--name {name}"
    if churn:
        options += " --churn"
    if realloc_mib:
        options += f" --realloc {realloc_mib}"
    guest.agent.run(f"memstamp start {options} {mib}")


def _memstamp(guest: Guest, command: str, answer: str, timeout: float = 120) -> Sequence[str]:
    status, output = guest.agent.exec(f"memstamp {command}", timeout)
    match = re.search(f"^{answer}$", output, re.MULTILINE)
    if not match:
        raise GuestError(f"{guest.name}: memstamp does not answer ({status}): {output!r}")
    return match.groups()


def verify(guest: Guest, name: str = "default", timeout: float = 120) -> Verdict:
    """Let the guest check all pages that `stamp` filled."""
    answer = r"verified=(\d+) errors=(\d+) checked=(\d+) passes=(\d+) reallocs=(\d+) first=(.*)"
    *numbers, first = _memstamp(guest, f"verify --name {name}", answer, timeout)
    return Verdict(*map(int, numbers), first=first)


@dataclass(frozen=True)
class Gap:
    """How memory that is rewritten all the time got on since it was last asked."""

    longest_us: int
    pages: int


def gap(guest: Guest, name: str) -> Gap:
    """Ask for the longest time between two steps of 16 pages; in guests for KVM only."""
    return Gap(*map(int, _memstamp(guest, f"gap --name {name}", r"gap=(\d+) written=(\d+)")))


def dirty_and_free(guest: Guest, mib: int) -> None:
    """Fill memory of the guest with data and free it."""
    guest.agent.run(f"dirtyfree {mib} {guest.spec.vcpus}", timeout=600)


def meminfo(guest: Guest) -> Dict[str, int]:
    """The guest's /proc/meminfo, in MiB."""
    words = [line.split() for line in guest.agent.run("cat /proc/meminfo").splitlines()]
    return {line[0].rstrip(":"): int(line[1]) // 1024 for line in words if len(line) == 3}


def vmstat(guest: Guest, name: str) -> int:
    """A counter of the guest's /proc/vmstat, since it has booted."""
    lines = guest.agent.run("cat /proc/vmstat").splitlines()
    return int(dict(line.split() for line in lines)[name])


def refaults(guest: Guest) -> int:
    """Pages of files that were read again after they had been freed."""
    return vmstat(guest, "workingset_refault_file")


def buddyinfo(guest: Guest) -> List[int]:
    """The guest's free blocks of each order, over all zones."""
    lines = guest.agent.run("cat /proc/buddyinfo").splitlines()
    return [sum(int(count) for count in order) for order in zip(*(ln.split()[4:] for ln in lines))]


def reported_bytes(blocks: Sequence[int]) -> int:
    """Of free blocks, as buddyinfo() has them, those that the driver reports by default."""
    return sum(count * size for count, size in zip(reversed(blocks), TOLD_SIZES))


def free_reported_bytes(guest: Guest) -> int:
    """The guest's free memory in blocks of the orders that its driver reports by default."""
    return reported_bytes(buddyinfo(guest))
