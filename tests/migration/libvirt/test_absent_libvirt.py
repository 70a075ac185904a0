# SPDX-License-Identifier: GPL-2.0-or-later
"""Absent pages under libvirt: what docs/libvirt.md says about guests that know nothing of us.

The domain has no more of ours than the <emulator>, and libvirt's own free page reporting.
"""

from typing import Any, Dict, Iterator, Sequence

import pytest

from livemig.checks import wait_for
from livemig.domains import FREED_MIB, MIB, SPEC, Guest, Hosts, stamped
from livemig.host import process_mib
from livemig.migration import MigrationResult

REPORTING = "<memballoon model='virtio' freePageReporting='on'/>"
# Of what was given back, nearly all: the guest goes on allocating.
MOST_MIB = 400


class StockGuest(Guest):
    """A guest whose domain XML does not mention hints, with the kernel that it likes."""

    def __init__(self, on: Hosts, name: str, qemu_args: Sequence[str] = ()):
        super().__init__(on, name, qemu_args)
        self.replace_element("qemu:override")
        self.replace_element("memballoon", REPORTING)

    def rss_mib(self) -> int:
        """The memory of its QEMU."""
        (pid,) = self.pids()
        return int(process_mib(pid))

    def free_and_report(self) -> int:
        """Write and free memory, and wait until the host has it back; returns what is left."""
        before = self.rss_mib()
        self.fill()
        most = before + FREED_MIB - MOST_MIB
        wait_for(lambda: self.rss_mib() <= most, "the guest does not report what it freed")
        return self.rss_mib()


def absent_mib(result: MigrationResult) -> int:
    """What was skipped since it was absent."""
    assert result.absent
    return result.absent.absent_bytes // MIB


@pytest.fixture(name="guest")
def guest_fixture(hosts: Hosts) -> Iterator[StockGuest]:
    """A running guest."""
    with stamped(StockGuest(hosts, "stock")) as guest:
        yield guest


def test_reporting_pays(guest: StockGuest, measured: Dict[str, Any]) -> None:
    """What was freed and reported is skipped; with the capability switched off it is looked at."""
    rss = guest.free_and_report()
    result = guest.migrate()
    guest.check()
    assert result.absent and result.absent.reason is None
    # QEMU itself is in its memory, too.
    assert absent_mib(result) >= SPEC.mem_mib - rss - 8
    measured["absent"] = {"rss_mib": rss, "absent_mib": absent_mib(result), "ms": result.total_ms}

    guest.hmp("migrate_set_capability skip-absent-pages off")
    result = guest.migrate()
    guest.check()
    assert result.absent and (result.absent.reason, absent_mib(result)) == ("disabled", 0)
    measured["off"] = {"ms": result.total_ms, "zero_pages": result.zero_pages}


def test_switched_off_for_good(hosts: Hosts) -> None:
    """-global migration.skip-absent-pages=off in the domain XML holds on both hosts."""
    arguments = ["-global", "migration.skip-absent-pages=off"]
    with stamped(StockGuest(hosts, "stock-off", arguments)) as guest:
        for _ in range(2):
            result = guest.migrate()
            assert result.absent and result.absent.reason == "disabled"
            guest.check()
