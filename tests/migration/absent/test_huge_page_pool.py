# SPDX-License-Identifier: GPL-2.0-or-later
"""A destination that takes its huge pages when it starts, as docs/operation.md advises.

Hinted pages are not sent, and so take no huge page from the destination's pool. If it has fewer
than the guest's memory needs, a migration without hints fails while the guest is still at the
source; with hints it completes, and the guest dies when it uses what is not there. A destination
that reserves or allocates its memory does not start then.
"""

import contextlib
from pathlib import Path
from typing import Iterator

import pytest

from livemig import workload
from livemig.checks import MIB, SMALL, WITH_HINTS, assert_hints_used, assert_intact
from livemig.checks import huge_pages_set_aside
from livemig.errors import GuestError
from livemig.lab import Lab
from livemig.migration import migrate
from livemig.spec import GuestSpec
from livemig.workload import meminfo

FREE_PAGES = Path("/sys/kernel/mm/hugepages/hugepages-2048kB/free_hugepages")
# As many as the guest's memory takes.
PAGES = 256
FREED_MIB = 192
GUEST = SMALL.but(mem_mib=512)

MEMORY = {"reserved": "reserve=on", "allocated": "reserve=on,prealloc=on"}
# What QEMU says of memory that is not there.
TOO_LITTLE = "unable to map backing store for guest RAM: Cannot allocate memory"


def in_huge_pages(how: str) -> GuestSpec:
    """The guest with its memory in a memfd of huge pages."""
    kind = "memory-backend-memfd,hugetlb=on,hugetlbsize=2M,share=on"
    return GUEST.but(mem_backend=f"{kind},{how}")


@contextlib.contextmanager
def pool(pages: int) -> Iterator[None]:
    """The host's pool has so many free huge pages, and no more; skips where it cannot."""
    with huge_pages_set_aside(2048, pages):
        if int(FREE_PAGES.read_text(encoding="ascii")) != pages:
            pytest.skip("others have set huge pages aside on this host")
        yield


@pytest.mark.parametrize("how", MEMORY)
def test_pool_too_small(lab: Lab, how: str) -> None:
    """With half of the huge pages that a guest needs, such a destination says so and ends."""
    with pool(PAGES // 2):
        # The premise: without, it starts, and the guest would be let in.
        lab.incoming(in_huge_pages("reserve=off"), "unreserved").close()
        with pytest.raises(GuestError, match=TOO_LITTLE):
            lab.incoming(in_huge_pages(MEMORY[how]))


@pytest.mark.parametrize("how", MEMORY)
def test_pool_large_enough(lab: Lab, how: str) -> None:
    """With all of them it takes the guest, with hints, and the guest can use all of its memory."""
    source = lab.boot(GUEST)
    workload.dirty_and_free(source, FREED_MIB)
    workload.stamp(source, 16)
    with pool(PAGES):
        destination = lab.incoming(in_huge_pages(MEMORY[how]))
        assert_hints_used(migrate(source, destination, WITH_HINTS), FREED_MIB * MIB)
        workload.dirty_and_free(destination, meminfo(destination)["MemAvailable"] - 32)
        assert_intact(destination)
        destination.close()
