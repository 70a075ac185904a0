# SPDX-License-Identifier: GPL-2.0-or-later
"""The figures of a migration come as an event too, once."""

from typing import Any, Dict, List

import pytest

from livemig.checks import FREED_MIB, MIB, SMALL, WITH_HINTS, assert_hints_used, fill_and_free
from livemig.checks import wait_for
from livemig.guest import Guest
from livemig.lab import Lab
from livemig.migration import Absent, Hints, MigrationResult, migrate, query, set_capabilities

EVENT = "MIGRATION_FREE_PAGES"


def told(guest: Guest) -> List[Dict[str, Any]]:
    """What the events said, so far."""
    return [event["data"] for event in guest.events if event["event"] == EVENT]


def test_event_has_the_figures(lab: Lab) -> None:
    """What was hinted and what was absent is reported when RAM begins to be sent."""
    source = lab.boot(SMALL.but(skip_absent=True))
    fill_and_free(source)
    result = migrate(source, lab.incoming(SMALL), WITH_HINTS)
    (data,) = told(source)
    assert data["free-page-hint"]["redirtied-bytes"] == 0
    # What is dirtied later is all that changes later.
    hints = {**result.raw["free-page-hint"], "redirtied-bytes": 0}
    assert data == {"free-page-hint": hints, "absent-pages": result.raw["absent-pages"]}
    assert_hints_used(result, FREED_MIB // 2 * MIB)
    assert MigrationResult.from_qmp(data).absent == result.absent


@pytest.mark.parametrize("events", [True, False], ids=["events", "no-events"])
def test_event_has_the_reason(lab: Lab, events: bool) -> None:
    """Why nothing was asked nor looked up is reported as well, if events are wanted at all."""
    source = lab.launch(SMALL.but(balloon=None, skip_absent=False, args=("-S",)), "source")
    destination = lab.incoming(SMALL.but(balloon=None), running=False)
    set_capabilities(source, {"events": events})
    uri = f"unix:{source.logs / 'migration'}"
    destination.qmp("migrate-incoming", uri=uri)
    source.qmp("migrate", uri=uri)
    wait_for(lambda: query(source).status == "completed", "the migration does not end")
    # An event that comes after all others.
    source.qmp("cont")
    source.wait_event(lambda event: event["event"] == "RESUME", "resume", 60)
    found = [MigrationResult.from_qmp(data) for data in told(source)]
    expected = (Hints(state="idle", reason="vm-stopped"), Absent(reason="disabled"))
    assert [(result.hints, result.absent) for result in found] == [expected] * events
