# SPDX-License-Identifier: GPL-2.0-or-later
"""Migrations that are switched to postcopy: when, and what came after the switch."""

from typing import Any, Callable, Dict

from livebench.floor import BYTES_PER_SECOND
from livemig.errors import LivemigError
from livemig.guest import Event, Guest
from livemig.migration import ENDED, MigrationResult, status_is

# Round 1 would be the last one if what is left then could be sent within this.
DOWNTIME_LIMIT_MS = 1
WAIT_SECONDS = 60


def parameters(after_round: int) -> Dict[str, Any]:
    """What keeps precopy from going on, or from ending, before the switch. It ends there."""
    if after_round == 0:
        return {"max-bandwidth": BYTES_PER_SECOND}
    return {"downtime-limit": DOWNTIME_LIMIT_MS}


def due(after_round: int, result: MigrationResult) -> bool:
    """Whether a round is over, and it is time to switch. Without hints there is no round 0."""
    hints = result.hints
    if hints and hints.state != "ended" and not hints.reason:
        return False
    # The dirty log is synchronised once before round 1.
    return result.rounds > after_round


def _moment(guest: Guest, match: Callable[[Event], bool]) -> float:
    """When an event was sent, by the host's clock."""
    stamp = next(event for event in guest.events if match(event))["timestamp"]
    return float(stamp["seconds"] + stamp["microseconds"] / 1e6)


def outcome(source: Guest, there: Guest, before: MigrationResult) -> Dict[str, float]:
    """What came after the switch, of a migration that has completed.

    `before` is how far it was when it was told to switch. Pages that precopy sent between that and
    the switch count: a few, or in round 0 next to none.
    """
    source.wait_event(status_is(*ENDED), "end of postcopy", WAIT_SECONDS)
    if not any(status_is("postcopy-active")(event) for event in source.events):
        # The guest stood still, and nothing was left to send. Or all was sent within 100 ms: QEMU
        # knows no bandwidth then, and does not look for what was written since.
        raise LivemigError(f"{source.name}: precopy was over before the switch: try a slow --gbit")
    stopped = _moment(source, lambda event: event["event"] == "STOP")
    resumed = _moment(there, lambda event: event["event"] == "RESUME")
    ended = _moment(source, status_is(*ENDED))
    ram = source.qmp("query-migrate")["ram"]
    return {
        "postcopy_ms": (ended - stopped) * 1000,
        "stopped_ms": (resumed - stopped) * 1000,
        "postcopy_mib": ram["postcopy-bytes"] / 2**20,
        "postcopy_zero_pages": ram["duplicate"] - before.zero_pages,
        "page_requests": ram["postcopy-requests"],
    }
