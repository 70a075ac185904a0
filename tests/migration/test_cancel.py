# SPDX-License-Identifier: GPL-2.0-or-later
"""A migration that was cancelled leaves nothing behind."""

from typing import Any, Dict

from checks import FREED_MIB, WITH_HINTS, SMALL, assert_hints_used, assert_intact
from checks import fill_and_free, migration, start_churn, wait_hints_ended
from conftest import Lab

from livemig.migration import migrate, query, start, status_is

MIB = 1 << 20


def test_cancel_and_migrate_again(lab: Lab, measured: Dict[str, Any]) -> None:
    """After a migration was cancelled the guest is whole, and the next one asks for hints anew."""
    source = lab.boot(SMALL)
    fill_and_free(source)
    start_churn(source)

    for attempt in range(2):
        abandoned = lab.incoming(SMALL, f"abandoned-{attempt}")
        # So slow that it cannot complete; the hints still come first.
        start(source, abandoned, migration(max_bandwidth=MIB))
        hints = wait_hints_ended(source)
        assert query(source).status == "active"
        assert hints.skipped_bytes > FREED_MIB * MIB
        source.qmp("migrate_cancel")
        source.wait_event(status_is("cancelled"), "end of the cancelled migration", 60)
        abandoned.close()
        assert_intact(source)
        assert_intact(source, "churn")
        measured[f"cancelled-{attempt}"] = hints.skipped_bytes

    destination = lab.incoming(SMALL)
    result = migrate(source, destination, WITH_HINTS)
    assert_hints_used(result, FREED_MIB * MIB)
    assert_intact(destination)
    assert_intact(destination, "churn")


def test_destination_dies(lab: Lab) -> None:
    """When the destination is killed, the guest runs on, and migrates with hints afterwards."""
    source = lab.boot(SMALL)
    fill_and_free(source)
    start_churn(source)
    doomed = lab.incoming(SMALL, "doomed")
    start(source, doomed, migration(max_bandwidth=MIB))
    doomed.close()
    source.wait_event(status_is("failed"), "failure of the migration", 60)
    assert_intact(source)
    assert_intact(source, "churn")

    destination = lab.incoming(SMALL)
    result = migrate(source, destination, WITH_HINTS)
    assert_hints_used(result, FREED_MIB * MIB)
    assert_intact(destination)
    assert_intact(destination, "churn")
