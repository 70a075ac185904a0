# SPDX-License-Identifier: GPL-2.0-or-later
"""What a migration of a domain would skip, asked of its QEMU."""

import re
import time
from typing import Any, Dict, List, Optional

from livefph.connection import Domain, FphError, QmpError
from livefph.status import REASONS, STOCK

POLL_SECONDS = 0.05
# free-page-hint-wait is a minute at most.
LIMIT_SECONDS = 90
UNITS = {"": 1, "K": 1e3, "M": 1e6, "G": 1e9, "Ki": 1 << 10, "Mi": 1 << 20, "Gi": 1 << 30}


def amount(text: str, units: str) -> int:
    """How much a number with a unit is, in bytes; ValueError if that is nothing."""
    match = re.fullmatch(rf"(\d+(?:\.\d+)?)\s*([KMG]i?|)({units})", text.strip())
    if not match:
        raise ValueError(text)
    value = int(float(match[1]) * UNITS[match[2]] / (8 if match[3].startswith("bit") else 1))
    if not value:
        raise ValueError(text)
    return value


def bandwidth(text: str) -> int:
    """Bytes per second of '1Gbit', '110MiB', '125000000'; ValueError if it is none of these."""
    return amount(text, "(?:bit|B|)(?:/s)?")


def size(text: str) -> int:
    """Bytes of '2GiB', '500MB', '1048576'; ValueError if it is none of these."""
    return amount(text, "B?")


def estimate(domain: Domain, **arguments: Optional[int]) -> Dict[str, Any]:
    """The object of query-free-page-estimate; arguments that are None are left out."""
    if not domain.active():
        raise FphError("it is not running")
    arguments = {name: value for name, value in arguments.items() if value is not None}
    try:
        domain.qmp("calc-free-page-estimate", **arguments)
    except QmpError as err:
        raise FphError(STOCK) if err.missing else err
    deadline = time.monotonic() + LIMIT_SECONDS
    while (info := domain.qmp("query-free-page-estimate"))["status"] == "measuring":
        if time.monotonic() > deadline:
            raise FphError(f"there is no estimate after {LIMIT_SECONDS} s")
        time.sleep(POLL_SECONDS)
    if info["status"] != "measured":
        raise FphError("its estimate was given up")
    return dict(info["estimate"])


def notes(found: Dict[str, Any], cache: Optional[int]) -> List[str]:
    """Why an estimate does not say all, of one that was to have page cache or not."""
    reasons = [found[key] for key in ("absent-reason", "reason") if found.get(key)]
    lines = [REASONS.get(reason, f"reason '{reason}'") for reason in dict.fromkeys(reasons)]
    if cache and found["complete"] and "cache-bytes" not in found:
        lines.append("its page cache stays: its balloon or its driver frees none")
    return lines
