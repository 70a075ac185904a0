# SPDX-License-Identifier: GPL-2.0-or-later
"""Estimates of what a migration would skip."""

import time
from typing import Any, Dict

from livemig.checks import PATIENT_MS
from livemig.guest import Guest


def begin(guest: Guest, wait_ms: int = PATIENT_MS, **arguments: Any) -> None:
    """Begin to make an estimate, with the arguments of calc-free-page-estimate."""
    guest.qmp("migrate-set-parameters", free_page_hint_wait=wait_ms)
    guest.qmp("calc-free-page-estimate", **arguments)


def ended(guest: Guest) -> Dict[str, Any]:
    """Wait until it is made, and check that it adds up: no event says so."""
    deadline = time.monotonic() + PATIENT_MS / 1000 + 10
    while (info := guest.qmp("query-free-page-estimate"))["status"] != "measured":
        assert info == {"status": "measuring"} and time.monotonic() < deadline
        time.sleep(0.01)
    found: Dict[str, Any] = info["estimate"]
    parts = ("absent-bytes", "free-bytes", "remaining-bytes")
    assert sum(found[part] for part in parts) == found["total-bytes"]
    assert found.get("cache-bytes", 0) <= found["remaining-bytes"]
    return found


def estimate(guest: Guest, wait_ms: int = PATIENT_MS, **arguments: Any) -> Dict[str, Any]:
    """Make an estimate."""
    begin(guest, wait_ms, **arguments)
    return ended(guest)
