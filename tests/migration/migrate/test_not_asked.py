# SPDX-License-Identifier: GPL-2.0-or-later
"""Where hints are switched off or impossible, nothing is asked and nothing is waited for."""

from typing import Any, Dict, Tuple

import pytest

from livemig.checks import FREED_PAGES, OUT_OF_THE_BOX, SMALL, WITH_HINTS, assert_hints_used
from livemig.checks import assert_intact, assert_not_asked, fill_and_free, in_check, migration
from livemig.checks import moved
from livemig.lab import Lab
from livemig.migration import migrate
from livemig.spec import ARRAYS, GuestSpec, MigrationSpec

pytestmark = pytest.mark.integrity


SOON = migration(free_page_hint_wait=500)
NO_DRIVER = ("initcall_blacklist=virtio_balloon_driver_init",)
# Why there are none, in which guest, and in which migration.
CASES: Dict[str, Tuple[str, GuestSpec, MigrationSpec]] = {
    "capability-off": ("disabled", SMALL, migration(SOON, hints=False)),
    "wait-0": ("no-wait", SMALL, migration(free_page_hint_wait=0)),
    "property-off": ("no-device", SMALL.but(balloon="free-page-hint=off"), SOON),
    "no-balloon": ("no-device", SMALL.but(balloon=None), SOON),
    "no-driver": ("no-driver", SMALL.but(cmdline=NO_DRIVER), SOON),
    "poison": ("poison", SMALL.but(cmdline=("page_poison=1",)), SOON),
}


@pytest.mark.parametrize("name", in_check(CASES, "capability-off", "no-driver", "poison"))
def test_no_hints(lab: Lab, name: str) -> None:
    """The migration says why there are no hints, asks nothing, sends everything, loses nothing."""
    reason, guest, spec = CASES[name]
    result = moved(lab, lab.boot(guest), spec)
    assert_not_asked(result, reason)
    assert result.normal_pages > 0.95 * FREED_PAGES


@pytest.mark.parametrize("kernel", ["stock", "ours"])
def test_iommu_platform(lab: Lab, kernel: str) -> None:
    """Behind an IOMMU there are no hints: Linux does not take such a balloon, and QEMU says why."""
    balloon = f"{ARRAYS},iommu_platform=on,disable-legacy=on"
    source = lab.boot(SMALL.but(kernel=kernel, balloon=balloon))
    # The premise: it is there, and has no driver.
    assert "0x0005" in source.agent.run("cat /sys/bus/virtio/devices/*/device")
    assert not source.agent.run("ls /sys/bus/virtio/drivers/virtio_balloon/ | grep ^virtio || true")
    assert_not_asked(moved(lab, source, WITH_HINTS), "unsupported")


def test_old_preempt(lab: Lab) -> None:
    """With a machine type that stops answering postcopy's requests early, all pages are sent."""
    guest = SMALL.but(args=("-global", "migration.x-preempt-pre-7-2=on"))
    spec = WITH_HINTS.with_capabilities(free_page_hint=True, skip_absent_pages=True)
    spec = spec.with_common(postcopy_ram=True, postcopy_preempt=True)
    result = moved(lab, lab.boot(guest), spec)
    assert_not_asked(result, "unsupported")
    assert result.raw["absent-pages"]["reason"] == "unsupported"
    assert result.normal_pages > 0.95 * FREED_PAGES


def test_off_for_good(lab: Lab) -> None:
    """-global migration.free-page-hint=off switches hints off for every migration."""
    guest = SMALL.but(args=("-global", "migration.free-page-hint=off"))
    # No capability is set, as libvirt does.
    assert_not_asked(moved(lab, lab.boot(guest), WITH_HINTS.with_capabilities()), "disabled")


@pytest.mark.check
def test_on_by_default(lab: Lab, measured: Dict[str, Any]) -> None:
    """A balloon with free-page-hint=on is all that hints need; the default deadline is enough."""
    result = moved(lab, lab.boot(SMALL), OUT_OF_THE_BOX.with_capabilities())
    assert result.hints and result.hints.reason is None
    measured["skipped_bytes"] = result.hints.skipped_bytes
    assert result.normal_pages < 0.5 * FREED_PAGES


@pytest.mark.check
def test_stopped_guest(lab: Lab) -> None:
    """A guest that is stopped is not asked, arrives stopped and whole, and has hints next time."""
    source = lab.boot(SMALL)
    fill_and_free(source)
    source.qmp("stop")
    middle = lab.incoming(SMALL, "middle")
    result = migrate(source, middle, WITH_HINTS)
    assert_not_asked(result, "vm-stopped")
    assert result.normal_pages > 0.95 * FREED_PAGES
    assert middle.qmp("query-status")["status"] == "paused"
    middle.qmp("cont")
    assert_intact(middle)

    destination = lab.incoming(SMALL)
    assert_hints_used(migrate(middle, destination, WITH_HINTS), FREED_PAGES * 4096)
    assert_intact(destination)
