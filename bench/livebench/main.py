# SPDX-License-Identifier: GPL-2.0-or-later
"""The commands of bench/bench."""

import argparse
import lzma
import shutil
from pathlib import Path
from typing import Any, Dict, List, Mapping, Sequence

from livebench import arming, density, estimates, micro, plan, quotes, report, statistics, store
from livebench import summary
from livebench.scenarios import SCENARIOS, matching
from livebench.store import Store
from livemig.errors import LivemigError
from livemig.modes import MODES, RESTING
from livemig.options import size_mib

QUICK_RUNS = 3
ARMING_MIB = 2048
MICRO_MIB = 64 * 1024
ESTIMATES_MIB = 2048
ESTIMATES_PAIRS = 5
# Kinds of arguments.
COUNT: Mapping[str, Any] = {"type": int, "metavar": "N"}
SIZE: Mapping[str, Any] = {"type": size_mib, "metavar": "SIZE"}
DIRECTORY: Mapping[str, Any] = {"type": Path, "metavar": "DIR"}
FILES: Mapping[str, Any] = {"type": Path, "metavar": "FILE", "nargs": "+"}
# What an export into this repository may have.
EXPORT_MIB = 2


def work(args: argparse.Namespace) -> List[plan.Work]:
    """What the arguments ask for."""
    found: Dict[str, plan.Work] = {}
    for scenario in matching(args.scenario or ["*"]):
        if args.quick and not scenario.quick:
            continue
        runs = args.runs or (QUICK_RUNS if args.quick else scenario.runs)
        # Who names a mode gets it, declared or not.
        wanted = args.mode or (scenario.quick if args.quick else scenario.modes)
        modes = tuple(name for name in MODES if name in wanted)
        sized = scenario.but(mem_mib=args.mem, vcpus=args.vcpus, gbit=args.gbit)
        # With guests of another size, scenarios can be the same.
        found[sized.name] = plan.Work(sized, modes, runs)
    if not found:
        raise LivemigError("none of these scenarios is part of bench-quick")
    return list(found.values())


def _report(directory: Path) -> bool:
    """Make the report, if there is anything to report."""
    page = report.make(Store(directory))
    if page:
        print(f"bench: {page}, and summary.json beside it")
    return bool(page)


def command_run(args: argparse.Namespace) -> int:
    """Make the runs that are missing, then the report."""
    todo = work(args)
    plan.check_built(todo)
    try:
        failed = plan.carry_out(plan.order(todo), Store(args.out), args.fresh)
        whole = not (args.scenario or args.mode or args.quick or args.mem)
        if whole and (args.fresh or not (args.out / "micro.json").exists()):
            print("bench: micro-benchmarks")
            micro.run(MICRO_MIB, 4, args.out)
    finally:
        _report(args.out)
    if failed:
        print(f"bench: {failed} runs failed; the same command tries them again")
    return 1 if failed else 0


def command_density(args: argparse.Namespace) -> int:
    """Measure how much memory guests leave to their host, and make the report."""
    todo = []
    for name in args.scenario or density.SCENARIOS:
        scenario = density.SCENARIOS[name]
        modes = tuple(mode for mode in scenario.modes if mode in (args.mode or RESTING))
        sized = scenario.but(mem_mib=args.mem, vcpus=args.vcpus)
        if args.limit:
            sized = density.limited(sized, args.limit)
        if modes:
            todo.append(plan.Work(sized, modes, args.runs or scenario.runs))
    plan.check_built(todo, RESTING)
    steps = plan.order(todo, RESTING)
    try:
        failed = plan.carry_out(steps, density.store_of(args.out), args.fresh, density.run)
    finally:
        _report(args.out)
    return 1 if failed else 0


def command_report(args: argparse.Namespace) -> int:
    """Make the report of what was run."""
    if not _report(args.out):
        raise LivemigError(f"there are no runs in {args.out}: run make bench-quick")
    return 0


def command_micro(args: argparse.Namespace) -> int:
    """Make the micro-benchmarks."""
    measured = micro.run(args.mem or MICRO_MIB, args.vcpus or 4, args.out)
    for row in measured["rows"]:
        print(f"{row['what']}: {row['value']:.{row['digits']}f} {row['unit']}")
    return 0


def _show(spreads: Mapping[str, statistics.Spread], indent: str = "") -> None:
    for name, spread in spreads.items():
        print(f"{indent}{name:16} {spread.median:10.4g} ({spread.low:.4g}-{spread.high:.4g})")


def command_arming(args: argparse.Namespace) -> int:
    """Measure what arming costs under KVM."""
    if args.mem and args.mem & (args.mem - 1):
        raise LivemigError("--mem: a power of two is wanted here")
    found = arming.run(args.mem or ARMING_MIB, args.runs or QUICK_RUNS, args.qemu, args.out)
    for what, way in dict.fromkeys((run["what"], run["way"]) for run in found):
        own = [run for run in found if (run["what"], run["way"]) == (what, way)]
        print(f"{what}, {way}:")
        _show(statistics.spreads(own, "what", "way", "run"), "  ")
    return 0


def command_estimates(args: argparse.Namespace) -> int:
    """Measure what estimates cost a guest at work."""
    found = estimates.run(args.mem or ESTIMATES_MIB, args.runs or ESTIMATES_PAIRS, args.out)
    _show(statistics.spreads(found, "run"))
    return 0


def command_list(_args: argparse.Namespace) -> int:
    """List scenarios and modes."""
    for title, scenarios in (("", SCENARIOS), ("\nbench/bench density:\n", density.SCENARIOS)):
        print(title, end="")
        for scenario in scenarios.values():
            print(f"{scenario.name:24} {scenario.runs:2} runs; {scenario.about}")
            print(f"{'':24} {' '.join(scenario.modes)}" + (" (quick)" if scenario.quick else ""))
    print("\nmodes:")
    for mode in (*MODES.values(), *RESTING.values()):
        print(f"{mode.name:24} {mode.about}")
    return 0


def command_compare(args: argparse.Namespace) -> int:
    """Compare two modes, over the runs of several scenarios and files together."""
    runs = [run for path in args.files for run in store.exported(path)]
    runs = runs or Store(args.out).runs()
    names = [scenario.name for scenario in matching(args.scenario or ["*"])]
    found = summary.compare(runs, names, (args.mode, args.base), args.metric)
    if not found:
        raise LivemigError(
            f"no runs of {args.mode} and {args.base} in one scenario have {args.metric}"
        )
    for name, sides in found.items():
        said = []
        for mode, values in zip((args.mode, args.base), sides):
            spread = statistics.Spread.from_values(values)
            quartiles = f"{spread.first_quartile:g}-{spread.third_quartile:g}"
            said.append(f"{mode} {spread.runs} runs, {spread.median:g} ({quartiles})")
        said.append(statistics.ratio_text(statistics.ratio(*sides)))
        p_value = statistics.p_value(*sides)
        print(
            f"{name}: {'; '.join(said)}" + (f", p = {p_value:.2g}" if p_value is not None else "")
        )
    return 0


def command_export(args: argparse.Namespace) -> int:
    """Copy the report into a directory, with all runs in compressed files."""
    command_report(args)
    args.to.mkdir(parents=True, exist_ok=True)
    for old in args.to.glob("*.png"):
        old.unlink()
    for pattern in ("report.html", "summary.json", "targets.json", "micro.json", "*.png"):
        for file in args.out.glob(pattern):
            shutil.copy(file, args.to)
    for name, kept in (("runs", Store(args.out)), ("density", density.store_of(args.out))):
        found = kept.runs()
        if found or name == "runs":
            packed = lzma.compress(store.as_json(found).encode(), preset=9)
            (args.to / f"{name}.json.xz").write_bytes(packed)
    size = sum(path.stat().st_size for path in args.to.iterdir()) / 2**20
    print(f"bench: {args.to}: {size:.2f} MiB")
    if size > EXPORT_MIB:
        print(f"bench: that is more than {EXPORT_MIB} MiB: remove figures that are not referred to")
    return 0


def command_quote(args: argparse.Namespace) -> int:
    """Compute the figures that documents quote, from the results that are committed."""
    if not args.check:
        for quote in quotes.read():
            print(f"{quote['doc']}: {quotes.quoted(quote)}")
        return 0
    found = quotes.missing()
    for line in found:
        print(f"bench: {line}")
    print(f"bench: {len(quotes.read()) - len(found)} quotes hold, {len(found)} do not")
    return 1 if found else 0


COMMANDS = (
    *(command_run, command_report, command_micro, command_arming, command_estimates),
    *(command_density, command_list, command_compare, command_export, command_quote),
)


def parse_arguments(argv: Sequence[str]) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(prog="bench", description="Benchmarks of live migrations.")
    commands = parser.add_subparsers(dest="command", required=True)
    parsers: Dict[str, argparse.ArgumentParser] = {}
    for function in COMMANDS:
        name = function.__name__.removeprefix("command_")
        one = commands.add_parser(name, help=function.__doc__, description=function.__doc__)
        one.set_defaults(function=function)
        one.add_argument("--out", **DIRECTORY, default=store.OUT, help="default: out/bench")
        parsers[name] = one

    def add(names: str, option: str, **settings: Any) -> None:
        for name in names.split():
            parsers[name].add_argument(option, **settings)

    add("arming", "--runs", **COUNT, help=f"default: {QUICK_RUNS}")
    about = "builds to compare; default: ours"
    add("arming", "--qemu", nargs="+", default=["ours"], choices=["ours", "before"], help=about)
    add("estimates", "--runs", **COUNT, help=f"pairs, default: {ESTIMATES_PAIRS}")
    add("run micro density arming estimates", "--mem", **SIZE, help="for trying: smaller guests")
    about = "for trying: another number"
    add("run micro density arming estimates", "--vcpus", **COUNT, help=about)
    add("run", "--gbit", **COUNT, help="for trying: a link of so many Gbit/s")
    add("export", "to", type=Path, metavar="TO", help="a directory")
    add("density", "--scenario", nargs="+", choices=list(density.SCENARIOS))
    add("density", "--limit", **SIZE, help="for trying: a smaller host")
    add("run", "--quick", action="store_true", help="the main rows, 3 runs")
    for name, modes in ("run", MODES), ("density", RESTING):
        add(name, "--mode", nargs="+", choices=list(modes), metavar="MODE", help="default: all")
    add("run density", "--runs", **COUNT, help="default: as declared")
    add("run density", "--fresh", action="store_true", help="make runs again that are there")
    about = 'or a pattern, "idle-*"; default: all'
    add("run compare", "--scenario", nargs="+", metavar="NAME", help=about)
    for which in ("mode", "base"):
        add("compare", which, choices=list(MODES), metavar=which.upper())
    add("compare", "--metric", default="total_ms", metavar="NAME", help="default: total_ms")
    about = "runs.json.xz of an export; default: what is in out/bench"
    add("compare", "--from", **FILES, dest="files", default=[], help=about)
    add("quote", "--check", action="store_true", help="whether documents say the same")
    args = parser.parse_args(argv)
    for name, least, unit in ("runs", 1, ""), ("vcpus", 1, ""), ("gbit", 1, ""), ("mem", 512, "M"):
        value = getattr(args, name, None)
        if value is not None and value < least:
            parser.error(f"--{name}: at least {least}{unit}")
    return args


def main(argv: Sequence[str]) -> int:
    """Entry point of bench/bench."""
    args = parse_arguments(argv)
    return int(args.function(args))
