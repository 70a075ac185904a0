# SPDX-License-Identifier: GPL-2.0-or-later
"""Where hints are switched off or impossible, nothing is asked and nothing is waited for."""

from dataclasses import dataclass, replace
from typing import Any, Dict, Mapping

import pytest

from livemig.checks import FREED_PAGES, OUT_OF_THE_BOX, SMALL, WITH_HINTS, assert_hints_used
from livemig.checks import assert_intact, assert_not_asked, fill_and_free, in_check, migration
from livemig.lab import Lab
from livemig.migration import migrate
from livemig.spec import ARRAYS

pytestmark = pytest.mark.integrity


@dataclass(frozen=True)
class Case:
    """One way not to have hints."""

    name: str
    reason: str
    guest: Mapping[str, Any]
    hints: bool = True
    wait: int = 500


CASES = [
    Case("capability-off", "disabled", {}, hints=False),
    Case("wait-0", "no-wait", {}, wait=0),
    Case("property-off", "no-device", {"balloon": "free-page-hint=off"}),
    Case("no-balloon", "no-device", {"balloon": None}),
    Case("no-driver", "no-driver", {"cmdline": ("initcall_blacklist=virtio_balloon_driver_init",)}),
    Case("poison", "poison", {"cmdline": ("page_poison=1",)}),
]


@pytest.mark.parametrize("case", in_check(CASES, "capability-off", "no-driver", "poison"))
def test_no_hints(lab: Lab, case: Case) -> None:
    """The migration says why there are no hints, asks nothing, sends everything, loses nothing."""
    source = lab.boot(SMALL.but(**case.guest))
    fill_and_free(source)
    destination = lab.incoming(source.spec)
    spec = migration(hints=case.hints, free_page_hint_wait=case.wait)
    result = migrate(source, destination, spec)
    assert_intact(destination)
    assert_not_asked(result, case.reason)
    assert result.normal_pages > 0.95 * FREED_PAGES


@pytest.mark.parametrize("kernel", ["stock", "ours"])
def test_iommu_platform(lab: Lab, kernel: str) -> None:
    """Behind an IOMMU there are no hints: Linux does not take such a balloon, and QEMU says why."""
    balloon = f"{ARRAYS},iommu_platform=on,disable-legacy=on"
    source = lab.boot(SMALL.but(kernel=kernel, balloon=balloon))
    fill_and_free(source)
    # The premise: it is there, and has no driver.
    assert "0x0005" in source.agent.run("cat /sys/bus/virtio/devices/*/device")
    assert not source.agent.run("ls /sys/bus/virtio/drivers/virtio_balloon/ | grep ^virtio || true")
    destination = lab.incoming(source.spec)
    result = migrate(source, destination, WITH_HINTS)
    assert_intact(destination)
    assert_not_asked(result, "unsupported")


def test_old_preempt(lab: Lab) -> None:
    """With a machine type that stops answering postcopy's requests early, all pages are sent."""
    args = ("-global", "migration.x-preempt-pre-7-2=on")
    source = lab.boot(SMALL.but(args=args))
    fill_and_free(source)
    destination = lab.incoming(source.spec)
    spec = WITH_HINTS.with_capabilities(free_page_hint=True, skip_absent_pages=True)
    preempt = {"postcopy-ram": True, "postcopy-preempt": True}
    result = migrate(source, destination, replace(spec, common=preempt))
    assert_intact(destination)
    assert_not_asked(result, "unsupported")
    assert result.raw["absent-pages"]["reason"] == "unsupported"
    assert result.normal_pages > 0.95 * FREED_PAGES


def test_off_for_good(lab: Lab) -> None:
    """-global migration.free-page-hint=off switches hints off for every migration."""
    source = lab.boot(SMALL.but(args=("-global", "migration.free-page-hint=off")))
    fill_and_free(source)
    destination = lab.incoming(SMALL)
    # No capability is set, as libvirt does.
    result = migrate(source, destination, migration().with_capabilities())
    assert_intact(destination)
    assert_not_asked(result, "disabled")


@pytest.mark.check
def test_on_by_default(lab: Lab, measured: Dict[str, Any]) -> None:
    """A balloon with free-page-hint=on is all that hints need; the default deadline is enough."""
    source = lab.boot(SMALL)
    fill_and_free(source)
    destination = lab.incoming(SMALL)
    result = migrate(source, destination, OUT_OF_THE_BOX.with_capabilities())
    assert_intact(destination)
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
