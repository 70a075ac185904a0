# SPDX-License-Identifier: GPL-2.0-or-later
"""How much of a guest's free memory is hinted from which order up, and what that takes."""

import time
from typing import Any, Dict, List

from livemig.errors import LivemigError
from livemig.guest import Guest

PARAMETER = "/sys/module/virtio_balloon_hint/parameters/hint_order"
LARGEST = 10
SECONDS = 30


def offered(guest: Guest) -> bool:
    """Whether it has our driver, and can be asked."""
    arrays = "free-page-hint-arrays=on" in (guest.spec.balloon or "")
    return arrays and guest.agent.exec(f"test -w {PARAMETER}")[0] == 0


def allow_time(guest: Guest) -> None:
    """Let its estimates take as long as the machine makes them."""
    guest.qmp("migrate-set-parameters", free_page_hint_wait=SECONDS * 1000)


def estimate(guest: Guest) -> Dict[str, Any]:
    """Ask the guest once, as a migration would."""
    guest.qmp("calc-free-page-estimate")
    deadline = time.monotonic() + SECONDS
    while (info := guest.qmp("query-free-page-estimate"))["status"] != "measured":
        if time.monotonic() > deadline:
            raise LivemigError(f"{guest.name} makes no estimate")
        time.sleep(0.01)
    return dict(info["estimate"])


def by_order(guest: Guest) -> List[Dict[str, Any]]:
    """For each order: the bytes that are reported from it up, of how many that are free."""
    before = guest.agent.run(f"cat {PARAMETER}").strip()
    allow_time(guest)
    result = []
    for order in range(LARGEST, -1, -1):
        guest.agent.run(f"echo {order} > {PARAMETER}")
        free_kib = int(guest.agent.run("grep MemFree /proc/meminfo").split()[1])
        found = estimate(guest)
        result.append(
            {
                "order": order,
                "free_mib": free_kib / 1024,
                # Not "free-bytes": what is absent besides is not in that.
                "hinted_mib": sum(item["bytes"] for item in found["blocks"]) / 2**20,
                "blocks": sum(item["bytes"] // item["block-size"] for item in found["blocks"]),
                "ask_to_end_ms": found["ask-to-end"] / 1000,
                "complete": found["complete"],
            }
        )
    guest.agent.run(f"echo {before} > {PARAMETER}")
    return result
