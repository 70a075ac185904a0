# SPDX-License-Identifier: GPL-2.0-or-later
"""A guest that does not answer is migrated without hints after the deadline."""

import pytest

from livemig.checks import FREED_MIB, FREED_PAGES, MIB, SMALL, WITH_HINTS, assert_hints_used
from livemig.checks import hints_of, migration, moved, wait_asked, wait_hints_ended
from livemig.errors import GuestError
from livemig.lab import Lab
from livemig.migration import cancel, finish, migrate, start
from livemig.modes import MODES

pytestmark = pytest.mark.integrity

# More than fits into 32 bits as nanoseconds.
WAIT_MS = 4500


@pytest.mark.parametrize("mode", ["array", "block"])
def test_crashed_guest_migrates(lab: Lab, mode: str) -> None:
    """A guest that has crashed and never answers is migrated whole after the deadline."""
    spec = MODES[mode].spec(SMALL)
    source = lab.boot_crashed(spec, FREED_MIB)
    destination = lab.incoming(spec)
    result = migrate(source, destination, migration(free_page_hint_wait=WAIT_MS))
    hints = hints_of(result)
    assert (hints.state, hints.reason) == ("ended", "timeout")
    assert (hints.complete, hints.messages, hints.hinted_bytes) == (False, 0, 0)
    # The premise: the deadline was waited for.
    assert result.total_ms > WAIT_MS
    assert result.normal_pages > 0.95 * FREED_PAGES
    assert destination.qmp("query-status")["status"] == "running"


@pytest.mark.check
def test_stop_ends_the_wait(lab: Lab) -> None:
    """Stopping a guest that was asked ends the wait for its answer, and it is migrated whole."""
    source = lab.boot_crashed(SMALL, FREED_MIB)
    destination = lab.incoming(SMALL)
    start(source, destination, WITH_HINTS)
    wait_asked(source)
    source.qmp("stop")
    result = finish(source, destination)
    hints = hints_of(result)
    assert (hints.state, hints.reason, hints.hinted_bytes) == ("ended", "vm-stopped", 0)
    assert result.normal_pages > 0.95 * FREED_PAGES
    assert destination.qmp("query-status")["status"] == "paused"


@pytest.mark.check
def test_reset_ends_the_wait(lab: Lab) -> None:
    """Resetting a guest that was asked ends the wait; it boots, and migrates with hints later."""
    source = lab.boot_crashed(SMALL, FREED_MIB)
    # The harness lets a QEMU end when its guest reboots.
    source.qmp("set-action", reboot="reset")
    abandoned = lab.incoming(SMALL, "abandoned")
    # So slow that it cannot complete.
    start(source, abandoned, migration(max_bandwidth=MIB))
    wait_asked(source)
    so_far = len(source.console.text())
    source.qmp("system_reset")
    hints = wait_hints_ended(source)
    assert (hints.reason, hints.hinted_bytes) == ("reset", 0)
    cancel(source)
    abandoned.close()

    source.console.wait_for(r"^READY\n", 120, so_far)
    assert_hints_used(moved(lab, source, WITH_HINTS), FREED_MIB * MIB)


@pytest.mark.check
def test_deadline_has_a_maximum(lab: Lab) -> None:
    """A wait of more than a minute is refused, on the command line too, with the range named."""
    named = "expects a value between 0 and 60000 milliseconds"
    guest = lab.launch(SMALL, "guest", running=False)
    guest.qmp("migrate-set-parameters", free_page_hint_wait=60000)
    with pytest.raises(GuestError, match=named):
        guest.qmp("migrate-set-parameters", free_page_hint_wait=60001)
    assert guest.qmp("query-migrate-parameters")["free-page-hint-wait"] == 60000
    too_long = SMALL.but(args=("-global", "migration.free-page-hint-wait=60001"))
    with pytest.raises(GuestError, match=named):
        lab.launch(too_long, "too-long")
