# SPDX-License-Identifier: GPL-2.0-or-later
"""scripts/demo: live-migrate a guest in each mode that a user has, and compare.

Its runs are those of the benchmarks, of a few scenarios and in a guest of any size. What is kept of
them is less: one list, of which the tables are made.
"""

import argparse
import tempfile
from pathlib import Path
from typing import Any, Callable, Dict, List, Mapping, Optional, Sequence, Tuple

from livebench import engine, plan, statistics
from livebench.scenarios import Scenario
from livebench.statistics import Spread
from livebench.store import write_json
from livebench.workloads import Churn, Freed, Idle, Workload
from livefph.show import table as in_columns
from livemig import host, paths, workload
from livemig.errors import LivemigError, NotEnoughMemory
from livemig.host import MIB
from livemig.migration import Hints, MigrationResult
from livemig.modes import DEMO, MODES
from livemig.options import add_guest_options

Run = Mapping[str, Any]
WORKLOADS: Mapping[str, Workload] = {"idle": Idle(), "freed": Freed(75), "churn": Churn()}


def record(name: str, run: Run) -> Dict[str, Any]:
    """What is written to the JSON file of a run of the engine."""
    result = MigrationResult.from_qmp(run["migration"][0])
    hints = result.hints or Hints(state="idle")
    asked = hints.ask_to_end > 0
    return {
        "mode": run["mode"]["name"],
        "scenario": name,
        "total_ms": result.total_ms,
        "downtime_ms": result.downtime_ms,
        "sent_bytes": result.sent_bytes,
        "normal_pages": result.normal_pages,
        "zero_pages": result.zero_pages,
        # Stock QEMU does not count its hints.
        "hinted_bytes": hints.hinted_bytes if result.hints else None,
        "ask_to_end_ms": hints.ask_to_end / 1000 if asked else None,
        "messages": hints.messages if result.hints else None,
        "verified": run["verified"],
        "ask_to_first_ms": hints.ask_to_first / 1000 if asked else None,
        "arm_ms": hints.arm_time / 1000 if asked else None,
        "setup_ms": result.setup_ms,
        "rounds": result.rounds,
        "hint_state": hints.state if result.hints else None,
        "hint_reason": hints.reason,
        "run": run["index"],
        "mem_mib": run["scenario"]["mem_mib"],
        "vcpus": run["scenario"]["vcpus"],
        "guest_free_reported_bytes": workload.reported_bytes(run["guest_before"][0]["free_blocks"]),
        "verified_pages": run["verified_pages"],
        "checked_pages": run["checked_pages"],
    }


# Tables


def values(runs: Sequence[Run], field: str, scale: float = 1) -> List[float]:
    """A field of the runs that have it."""
    return [run[field] / scale for run in runs if run[field] is not None]


def median(found: Sequence[float], digits: int = 0) -> str:
    """The median as text."""
    return f"{Spread.from_values(found).median:.{digits}f}" if found else "–"


def with_range(found: Sequence[float]) -> str:
    """The median and, of several values, their range."""
    ends = f" ({min(found):.0f}-{max(found):.0f})" if len(found) > 1 else ""
    return median(found) + ends


def ratio(runs: Sequence[Run], base: Sequence[Run]) -> Optional[float]:
    """The median of the total time compared with that of other runs."""
    return statistics.ratio(values(runs, "total_ms"), values(base, "total_ms"))


def hinted_percent(runs: Sequence[Run]) -> List[float]:
    """How much of what the guest could hint was hinted."""
    return [
        100 * run["hinted_bytes"] / run["guest_free_reported_bytes"]
        for run in runs
        if run["hinted_bytes"] and run["guest_free_reported_bytes"]
    ]


COLUMNS: Mapping[str, Callable[[Sequence[Run], Sequence[Run]], str]] = {
    "total ms": lambda runs, base: with_range(values(runs, "total_ms")),
    "ratio": lambda runs, base: statistics.ratio_text(ratio(runs, base)),
    "downtime ms": lambda runs, base: with_range(values(runs, "downtime_ms")),
    "sent MiB": lambda runs, base: median(values(runs, "sent_bytes", MIB)),
    "normal pages": lambda runs, base: median(values(runs, "normal_pages")),
    "zero pages": lambda runs, base: median(values(runs, "zero_pages")),
    "hinted MiB": lambda runs, base: median(values(runs, "hinted_bytes", MIB)),
    "% of free": lambda runs, base: median(hinted_percent(runs), 1),
    "messages": lambda runs, base: median(values(runs, "messages")),
    "first ms": lambda runs, base: median(values(runs, "ask_to_first_ms"), 1),
    "end ms": lambda runs, base: median(values(runs, "ask_to_end_ms"), 1),
    "verified": lambda runs, base: "yes" if all(run["verified"] for run in runs) else "NO",
}
# What this project claims, as ratios of total times.
COMPARISONS = (
    ("array-absent", "stock-hints", "array hints / stock per-block hints"),
    ("none", "legacy", "no hints / no hints of the unpatched build"),
)


def by_mode(runs: Sequence[Run], scenario: str) -> Dict[str, List[Run]]:
    """The runs of one scenario, in the order of the modes."""
    own = [run for run in runs if run["scenario"] == scenario]
    found = {name: [run for run in own if run["mode"] == name] for name in DEMO}
    return {name: group for name, group in found.items() if group}


def table(groups: Mapping[str, Sequence[Run]]) -> str:
    """The runs of one scenario, one line per mode; ratios are to no hints of the same build."""
    rows = []
    for name, group in groups.items():
        base = groups.get(MODES[name].baseline, [])
        rows.append([name, *(text(group, base) for text in COLUMNS.values())])
    return in_columns(["mode", *COLUMNS], rows, right=range(1, len(COLUMNS) + 1))


def comparisons(groups: Mapping[str, Sequence[Run]]) -> List[str]:
    """Lines that compare the builds, as far as both were run."""
    return [
        f"{text}: {statistics.ratio_text(ratio(groups[one], groups[other]))}"
        for one, other, text in COMPARISONS
        if one in groups and other in groups
    ]


def show(args: argparse.Namespace, runs: Sequence[Run]) -> None:
    """Print the tables."""
    for name in args.scenarios:
        print(f"\n{name}: {WORKLOADS[name].about}; {args.mem} MiB, {args.vcpus} vCPUs", end="")
        print(f", medians of {args.runs} runs (range)" if args.runs > 1 else "")
        groups = by_mode(runs, name)
        print("\n".join([table(groups), *comparisons(groups)]))
    print(f"\nwritten to {args.out}")


# The command


def parse_arguments(argv: Sequence[str]) -> argparse.Namespace:
    """Read the command line."""
    modes = "\n".join(f"  {name:12} {MODES[name].about}" for name in DEMO)
    scenarios = "\n".join(f"  {name:12} {own.about}" for name, own in WORKLOADS.items())
    parser = argparse.ArgumentParser(
        prog="demo",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Live-migrate a guest in each mode and compare.",
        epilog=f"modes:\n{modes}\nscenarios:\n{scenarios}",
    )
    add_guest_options(parser, "8G", 4)
    parser.add_argument("--runs", type=int, default=1, metavar="N", help="of each; default 1")
    about = "also run the unpatched QEMU and kernel"
    parser.add_argument("--stock", action="store_true", help=about)
    about = "default: all of our build, with --stock all"
    parser.add_argument("--modes", nargs="+", choices=DEMO, metavar="MODE", help=about)
    parser.add_argument(
        "--scenarios",
        nargs="+",
        choices=WORKLOADS,
        default=list(WORKLOADS),
        metavar="SCENARIO",
        help="default: all",
    )
    parser.add_argument("--out", type=Path, default=paths.OUT / "demo.json", metavar="FILE")
    args = parser.parse_args(argv)
    if min(args.runs, args.vcpus) < 1 or args.mem < 512:
        parser.error("at least 1 run, 1 vCPU and 512 MiB")
    return args


def check_writable(path: Path) -> None:
    """Stop before the first run if its record could not be written."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.is_dir():
            raise IsADirectoryError("it is a directory")
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as err:
        raise LivemigError(f"cannot write --out {path}: {err.strerror or err}") from err


def prepared(args: argparse.Namespace) -> Tuple[Dict[str, Scenario], List[str]]:
    """The scenarios and modes that were asked for, all of which can be run."""
    wanted = args.modes or [name for name in DEMO if args.stock or MODES[name].qemu == "ours"]
    modes = [name for name in DEMO if name in wanted]
    scenarios = {
        name: Scenario(WORKLOADS[name], tuple(modes), args.runs, args.mem, args.vcpus)
        for name in args.scenarios
    }
    plan.check_built([plan.Work(own, own.modes, own.runs) for own in scenarios.values()])
    largest = max(scenarios.values(), key=lambda scenario: sum(scenario.host_mib))
    try:
        host.check_memory(sum(largest.host_mib), largest.name)
    except NotEnoughMemory as err:
        raise NotEnoughMemory(f"{err}: use a smaller --mem, or other --scenarios") from err
    check_writable(args.out)
    return scenarios, modes


def main(argv: Sequence[str]) -> int:
    """Entry point of scripts/demo."""
    args = parse_arguments(argv)
    scenarios, modes = prepared(args)
    # Modes in turn, so that whatever else the host does meets all of them.
    steps = [(i, s, m) for i in range(1, args.runs + 1) for s in scenarios for m in modes]
    runs: List[Run] = []
    for done, (index, name, mode) in enumerate(steps, 1):
        print(f"[{done}/{len(steps)}] {name}, {mode} ...", end="", flush=True)
        logs = paths.OUT / "logs" / "demo" / f"{name}-{mode}-{index}"
        run = engine.run(scenarios[name], MODES[mode], index, logs)
        runs.append(record(name, run))
        write_json(args.out, runs)
        print(f" {plan.describe(run)}" + ("" if run["verified"] else f" (logs: {logs})"))
    show(args, runs)
    return 0 if all(run["verified"] for run in runs) else 1
