# SPDX-License-Identifier: GPL-2.0-or-later
"""Runs that nobody measured, for tests of what is made of runs."""

import subprocess
from dataclasses import asdict
from pathlib import Path
from typing import Any, Callable, Dict, List, Optional, Tuple

from livebench import engine, hostinfo
from livebench.scenarios import SCENARIOS, Scenario
from livemig import paths
from livemig.checks import run_script
from livemig.modes import Mode

IDLE = SCENARIOS["idle-8g"]


def canned(scenario: Scenario, mode: Mode, index: int, total_ms: float) -> Dict[str, Any]:
    """A run as engine.run() returns it."""
    ram = {"transferred": 1 << 27, "normal": 30000, "duplicate": 40000, "dirty-sync-count": 3}
    raw = {"status": "completed", "total-time": total_ms, "downtime": 5, "ram": ram}
    if mode.name == "array":
        raw["free-page-hint"] = {"state": "ended", "messages": 1, "blocks": 9, "ask-to-end": 9000}
    series = [{"when": t / 10, "ops": 9.0, "p99_us": 30.0} for t in range(-60, 100)]
    phase = {"rate": 90.0, "kept": 1.0, "p99_us": 30.0, "worst_p99_us": 31.0}
    work = {"before": phase, "during": phase, "window": phase, "series": series}
    samples = [
        {"ms": ms, "round": 1 + ms // 60, "normal": ms, "zero": ms, "sent": 0, "left": 0}
        for ms in range(0, int(total_ms), 50)
    ]
    facts = {
        "meminfo_mib": {"MemFree": 7000},
        "free_blocks": [*[0] * 10, 1725],
        "free_max_order_mib": 6900,
        "hint": {},
    }
    run: Dict[str, Any] = {
        "format": engine.FORMAT,
        "date": "2025-01-01T00:00:00+00:00",
        "scenario": engine.described(scenario),
        "mode": asdict(mode),
        "index": index,
        "host": hostinfo.facts(),
        "versions": {"qemu": "QEMU", "qemu_stamp": "", "kernel_stamp": "", "commit": "abc"},
        "command_lines": {"source": ["qemu"], "destination": ["qemu"]},
        "migration": [raw],
        "all_ms": total_ms,
        "samples": [samples],
        "guest_before": [facts],
        "guest_after": [facts],
        "rss_mib": {
            "before": {"source": 200.0, "destination": 40.0},
            "after": {"source": 201.0, "destination": 99.0},
        },
        "workload": [work if scenario.workload.name == "allocloop" else {}],
        "verified": None if mode.floor else True,
        "wrong": [],
        "verified_pages": 4096,
        "checked_pages": 4096,
        "seconds": 12.5,
    }
    run["metrics"] = engine.metrics(run)
    return run


class Runner:
    """Stands in for engine.run(): hands out canned runs and notes what it was asked for."""

    def __init__(self, on_call: Optional[Callable[[int], None]] = None):
        self.calls: List[Tuple[str, str, int]] = []
        self._on_call = on_call

    def __call__(self, scenario: Scenario, mode: Mode, index: int, logs: Path) -> Dict[str, Any]:
        del logs
        self.calls.append((scenario.name, mode.name, index))
        if self._on_call:
            self._on_call(len(self.calls))
        return canned(scenario, mode, index, 100.0 + index)


def bench(*arguments: str) -> "subprocess.CompletedProcess[str]":
    """Run bench/bench."""
    return run_script(paths.REPO / "bench" / "bench", *arguments)
