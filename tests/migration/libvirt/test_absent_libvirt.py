# SPDX-License-Identifier: GPL-2.0-or-later
"""Absent pages under libvirt: what docs/libvirt.md says about guests that know nothing of us.

The domain has no more of ours than the <emulator>, and libvirt's own free page reporting.
"""

from typing import Any, Dict

from livemig.checks import wait_for
from livemig.domains import FREED_MIB, MIB, SPEC, Guest, Hosts, stamped
from livemig.host import process_mib

REPORTING = "<memballoon model='virtio' freePageReporting='on'/>"
# Of what was given back, nearly all: the guest goes on allocating.
MOST_MIB = 400


def test_reporting_pays(hosts: Hosts, measured: Dict[str, Any]) -> None:
    """What was freed and reported is skipped; with the capability switched off it is looked at."""
    guest = Guest(hosts, "stock")
    guest.replace_element("qemu:override")
    guest.replace_element("memballoon", REPORTING)
    with stamped(guest):
        (pid,) = guest.pids()
        most = process_mib(pid) + FREED_MIB - MOST_MIB
        guest.fill()
        wait_for(lambda: process_mib(pid) <= most, "the guest does not report what it freed")
        rss = int(process_mib(pid))
        result = guest.migrate()
        guest.check()
        assert result.absent and result.absent.reason is None
        absent_mib = result.absent.absent_bytes // MIB
        # QEMU itself is in its memory, too.
        assert absent_mib >= SPEC.mem_mib - rss - 8
        measured["absent"] = {"rss_mib": rss, "absent_mib": absent_mib, "ms": result.total_ms}

        guest.hmp("migrate_set_capability skip-absent-pages off")
        result = guest.migrate()
        guest.check()
        assert result.absent
        assert (result.absent.reason, result.absent.absent_bytes) == ("disabled", 0)
        measured["off"] = {"ms": result.total_ms, "zero_pages": result.zero_pages}
