# SPDX-License-Identifier: GPL-2.0-or-later
"""How much memory guests that stay where they are leave to their host.

Two questions: how fast a guest's memory is back after a burst, with what that costs a program in
it; and how many guests that burst now and then fit into a host.
"""

import contextlib
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Dict, List, Optional, Sequence

from livebench import engine, hostinfo, summary, throughput
from livebench.console import Console
from livebench.scenarios import GIB, Scenario, short
from livebench.statistics import Spread
from livebench.store import Store
from livebench.workloads import QEMU_MIB, AllocLoop, Workload, on_console
from livemig import host, workload
from livemig.errors import LivemigError
from livemig.guest import Guest
from livemig.modes import RESTING, Mode

Record = Dict[str, Any]
SAMPLE_SECONDS = 0.25


class Resting(Workload):
    """What guests do that are not moved."""

    def measure(self, scenario: Scenario, mode: Mode, logs: Path) -> Record:
        """Do it; returns a part of the run, with its metrics."""
        raise NotImplementedError

    def watched_mib(self, scenario: Scenario) -> int:
        """The host's memory that it takes at most."""
        return scenario.mem_mib + QEMU_MIB


@dataclass(frozen=True)
class Burst(Resting):
    """A guest writes to much of its memory and frees it; then a program allocates in a loop."""

    NAME = "burst"
    ABOUT = (
        "{0.percent} % are written and freed, and nothing happens for {0.seconds} s; "
        "then a program takes {0.LOOP_SHARE:.0%} and gives it back, again and again"
    )
    percent: int = 75
    # How long it is watched after the burst, and in the loop.
    seconds: int = 60
    loop_seconds: int = 20

    # What the loop holds at most, of the memory.
    LOOP_SHARE = 0.25
    # What the boot freed is on its way back.
    REST_SECONDS = 10
    guess = 150

    def measure(self, scenario: Scenario, mode: Mode, logs: Path) -> Record:
        console = Console()
        spec = engine.guest_spec(scenario, mode)
        with Guest(spec, "guest", logs=logs, listener=console.listener()) as guest:
            guest.wait_ready()
            time.sleep(min(self.REST_SECONDS, self.seconds))
            values: Record = {"rss_before_mib": host.process_mib(guest.pid)}
            workload.dirty_and_free(guest, scenario.mem_mib * self.percent // 100)
            cpu = hostinfo.cpu_seconds(guest.pid)
            series = watch([guest], self.seconds)
            values["rest_cpu_s"] = hostinfo.cpu_seconds(guest.pid) - cpu
            values.update(self._after(series, values["rss_before_mib"]))
            values.update(self._loop(guest, console))
            check_kernels([guest])
        return {"metrics": values, "series": series}

    def _after(self, series: Sequence[Dict[str, float]], before: float) -> Record:
        """The memory at some moments after the burst, and when half of it was back, if it was."""
        values: Record = {"rss_burst_mib": series[0]["mib"]}
        moments = (2, 5, 10, *range(20, self.seconds, 20))
        for end in (*(moment for moment in moments if moment < self.seconds), self.seconds):
            values[f"rss_{end}s_mib"] = [item["mib"] for item in series if item["s"] <= end][-1]
        half = (before + series[0]["mib"]) / 2
        values["half_s"] = next((item["s"] for item in series if item["mib"] <= half), None)
        return values

    def _loop(self, guest: Guest, console: Console) -> Dict[str, Optional[float]]:
        """How fast a program allocates meanwhile, and what the guest has of the host then."""
        hold = int(guest.spec.mem_mib * self.LOOP_SHARE)
        on_console(guest, f"allocloop {self.loop_seconds} {hold}")
        rss = [sample["mib"] for sample in watch([guest], self.loop_seconds)]
        console.wait(r"alloc done ops=\d+", guest, 60)
        points = AllocLoop().points(console)
        first, last = points[0].when, points[-1].when
        found = {
            "rate": throughput.rate(points, first, last),
            **throughput.latencies(points, first, last),
            "rss_mib": Spread.from_values(rss).median,
        }
        return {f"loop_{name}": value for name, value in found.items()}


@dataclass(frozen=True)
class Crowd(Resting):
    """More and more guests, each of which bursts once a minute, until a host is full.

    Each writes to a burst and frees it at once, some seconds in each minute. A guest counts if the
    memory of all stayed within the limit, for as long as it took until the next one came.
    """

    ABOUT = (
        "bursts of {0.burst_mib} MiB once in {0.PERIOD_SECONDS} s: how many of them fit "
        "into {0.limit_mib} MiB"
    )
    limit_mib: int = 6 * GIB
    burst_mib: int = 384

    PERIOD_SECONDS = 60
    # Between the boot of a guest, with its first burst, and that of the next.
    PACE_SECONDS = 6
    MOST = 100
    guess = 400

    @property
    def name(self) -> str:
        return f"crowd-{short(self.limit_mib)}"

    def watched_mib(self, scenario: Scenario) -> int:
        # The last one is one too many.
        return self.limit_mib + super().watched_mib(scenario)

    def measure(self, scenario: Scenario, mode: Mode, logs: Path) -> Record:
        spec = engine.guest_spec(scenario, mode)
        series: List[Dict[str, float]] = []
        guests: List[Guest] = []
        begin = time.monotonic()
        with contextlib.ExitStack() as stack:
            while not series or series[-1]["peak_mib"] <= self.limit_mib:
                if len(guests) == self.MOST:
                    raise LivemigError(f"{len(guests)} guests do not fill {self.limit_mib} MiB")
                own = Guest(spec, f"guest-{len(guests)}", logs=logs)
                guests.append(stack.enter_context(own))
                guests[-1].wait_ready()
                burst = f"dirtyfree {self.burst_mib}; sleep {self.PERIOD_SECONDS}"
                guests[-1].agent.run(f"(while :; do {burst}; done) > /dev/null 2>&1 &")
                samples = [sample["mib"] for sample in watch(guests, self.PACE_SECONDS)]
                series.append(
                    {
                        "s": round(time.monotonic() - begin, 1),
                        "guests": len(guests),
                        "peak_mib": max(samples),
                        "mib": sum(samples) / len(samples),
                    }
                )
            check_kernels(guests)
        fit = series[:-1]
        values = {"guests": float(len(fit))}
        if fit:
            values["mib_each"] = fit[-1]["mib"] / len(fit)
            values["peak_mib"] = max(item["peak_mib"] for item in fit)
        return {"metrics": values, "series": series}


def check_kernels(guests: Sequence[Guest]) -> None:
    """Stop if a guest's kernel complains."""
    trouble = [line for guest in guests for line in guest.kernel_trouble()]
    if trouble:
        raise LivemigError(f"a guest's kernel complains: {trouble[0]}")


def watch(guests: Sequence[Guest], seconds: float) -> List[Dict[str, float]]:
    """What guests, with their QEMUs, have of the host's memory: their own, not what they share."""
    begin = time.monotonic()
    samples: List[Dict[str, float]] = []
    while not samples or samples[-1]["s"] < seconds:
        # What no file holds: there is that once for each QEMU.
        mib = sum(host.process_mib(guest.pid, "RssAnon", "RssShmem") for guest in guests)
        samples.append({"s": round(time.monotonic() - begin, 2), "mib": round(mib, 1)})
        time.sleep(SAMPLE_SECONDS)
    return samples


_ALONE = ("plain", "reporting", "reporting-0")
_BURST = Scenario(Burst(), tuple(RESTING), runs=3, mem_mib=4 * GIB, vcpus=2)
_CROWD = Scenario(Crowd(), _ALONE, runs=3, mem_mib=GIB // 2, vcpus=1)
SCENARIOS: Dict[str, Scenario] = {scenario.name: scenario for scenario in (_BURST, _CROWD)}


def limited(scenario: Scenario, limit_mib: int) -> Scenario:
    """The same with a smaller host, where that matters."""
    own = scenario.workload
    if not isinstance(own, Crowd):
        return scenario
    return replace(scenario, workload=replace(own, limit_mib=limit_mib))


def store_of(directory: Path) -> Store:
    """Where the runs are, beside those of guests that are moved."""
    return Store(directory / "density")


def run(scenario: Scenario, mode: Mode, index: int, logs: Path) -> Record:
    """Make one run; returns its result."""
    own = scenario.workload
    assert isinstance(own, Resting)
    host.check_memory(own.watched_mib(scenario), scenario.name)
    record = engine.header(scenario, mode, index)
    begin = time.monotonic()
    record.update(own.measure(scenario, mode, logs))
    record["seconds"] = round(time.monotonic() - begin, 1)
    found = record["metrics"].items()
    record["metrics"] = {name: round(value, 4) for name, value in found if value is not None}
    return record


def table(runs: Sequence[Record]) -> List[Dict[str, Any]]:
    """For each scenario the medians of its metrics, by mode."""
    rows = []
    for name in summary.names(runs, SCENARIOS):
        own = [run for run in runs if run["scenario"]["name"] == name]
        by_mode = {mode: summary.chosen(own, name, mode) for mode in RESTING}
        rows.append(
            {
                "scenario": name,
                "about": own[0]["scenario"]["about"],
                "metrics": list(dict.fromkeys(metric for run in own for metric in run["metrics"])),
                "modes": {mode: _row(found) for mode, found in by_mode.items() if found},
            }
        )
    return rows


def _row(runs: Sequence[Record]) -> Dict[str, Any]:
    """How many runs there are of a mode, and the median and the range of each metric."""
    found: Dict[str, List[float]] = {}
    for run in runs:
        for metric, value in run["metrics"].items():
            found.setdefault(metric, []).append(value)
    spreads = {metric: Spread.from_values(values) for metric, values in found.items()}
    return {
        "runs": len(runs),
        "spreads": {name: [own.median, own.low, own.high] for name, own in spreads.items()},
    }
