# SPDX-License-Identifier: GPL-2.0-or-later
"""What estimates cost a guest that takes memory and gives it back all the while.

Phases in which one estimate follows the other alternate with phases in which QEMU is asked as often
for what it knows anyway: on a machine of few cores, to be asked costs a guest something, too.
"""

import time
from pathlib import Path
from statistics import median
from typing import Any, Dict, List

from livebench import hostinfo, throughput
from livebench.console import Console
from livebench.orders import allow_time, estimate
from livebench.store import write_json
from livebench.workloads import AllocLoop
from livemig import paths
from livemig.errors import LivemigError
from livemig.guest import Guest
from livemig.spec import ARRAYS, GuestSpec

PHASE_SECONDS = 8.0
VCPUS = 2


def _phase(guest: Guest, ask: bool) -> Dict[str, Any]:
    """One of them: when it began and ended, and how long each estimate took."""
    begin = time.monotonic()
    took: List[Dict[str, float]] = []
    while (now := time.monotonic()) < begin + PHASE_SECONDS:
        if not ask:
            guest.qmp("query-status")
            guest.qmp("query-free-page-estimate")
            time.sleep(0.01)
            continue
        found = estimate(guest)
        if not found["complete"]:
            raise LivemigError(f"{guest.name} did not answer: {found.get('reason')}")
        took.append(
            {"ms": (time.monotonic() - now) * 1000, "ask_to_end_ms": found["ask-to-end"] / 1000}
        )
    return {"begin": begin, "end": time.monotonic(), "took": took}


def run(mem_mib: int, pairs: int, out: Path) -> List[Dict[str, Any]]:
    """Pairs of phases, in one guest."""
    console = Console()
    loop = AllocLoop()
    spec = GuestSpec(mem_mib=mem_mib, vcpus=VCPUS, balloon=ARRAYS)
    logs = paths.OUT / "logs" / "bench" / "estimates"
    found: List[Dict[str, Any]] = []
    with Guest(spec, "guest", logs=logs, listener=console.listener()) as guest:
        guest.wait_ready()
        allow_time(guest)
        loop.prepare(guest)
        loop.start(guest, console)
        time.sleep(PHASE_SECONDS)
        for index in range(1, pairs + 1):
            # Which comes first changes: what drifts is nobody's.
            order = (False, True) if index % 2 else (True, False)
            phases = {ask: _phase(guest, ask) for ask in order}
            points = loop.points(console)
            rates = {
                ask: throughput.rate(points, phase["begin"], phase["end"])
                for ask, phase in phases.items()
            }
            took = phases[True]["took"]
            if not rates[False] or not rates[True]:
                raise LivemigError("the program in the guest does not get on")
            found.append(
                {
                    "run": index,
                    "estimates": len(took),
                    "ms": median(item["ms"] for item in took),
                    "ask_to_end_ms": median(item["ask_to_end_ms"] for item in took),
                    "kept": rates[True] / rates[False],
                }
            )
            print(f"bench: pair {index}: {found[-1]}")
    write_json(out / "estimates.json", [{"host": hostinfo.facts(), "mem_mib": mem_mib}, *found])
    return found
