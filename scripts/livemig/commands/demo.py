# SPDX-License-Identifier: GPL-2.0-or-later
"""The main job: live-migrate one guest with and without hints, and compare.

Every run boots a guest afresh: after a migration, a guest's memory at the destination holds only
what was sent, which would make the next migration look better than it is.
"""

import argparse
import json
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Dict, List, Sequence

from livemig import host, paths, report, workload
from livemig.errors import LivemigError, NotEnoughMemory
from livemig.guest import Guest
from livemig.migration import Hints, MigrationResult, migrate
from livemig.modes import DEMO, MODES, Mode, migration_for_mode
from livemig.options import add_guest_options
from livemig.spec import GuestSpec

# Stamped in each guest before the migration, so that there is something to lose.
STAMP_MIB = 16
# What the churn scenario rewrites, and takes from the allocator and gives back, all the time.
CHURN_MIB = 64
REALLOC_MIB = 128

# What a booted guest and its QEMU use: fixed, and for each MiB of the guest (its memmap).
QEMU_MIB = 400
MEMMAP_SHARE = 0.03


@dataclass(frozen=True)
class Scenario:
    """What the guest did before, and does during, the migration."""

    name: str
    about: str
    # Memory that is written and freed before the migration, as a share of the guest's.
    freed_share: float = 0.0
    churn: bool = False

    def prepare(self, guest: Guest) -> None:
        """Bring a guest that has just booted into the state to be migrated."""
        if self.freed_share:
            workload.dirty_and_free(guest, self.freed_mib(guest.spec.mem_mib))
        workload.stamp(guest, STAMP_MIB)
        if self.churn:
            workload.stamp(guest, CHURN_MIB, churn=True, realloc_mib=REALLOC_MIB, name="churn")

    def verify(self, guest: Guest) -> Dict[str, workload.Verdict]:
        """Let the guest check its memory."""
        names = ["default", "churn"] if self.churn else ["default"]
        return {name: workload.verify(guest, name) for name in names}

    def freed_mib(self, mem_mib: int) -> int:
        """How much is written and freed in a guest of this size."""
        return int(mem_mib * self.freed_share)

    def host_mib(self, mem_mib: int) -> int:
        """The host's memory that a source, or a destination without hints, needs at most."""
        used = STAMP_MIB + (CHURN_MIB + REALLOC_MIB if self.churn else 0)
        return used + self.freed_mib(mem_mib) + int(mem_mib * MEMMAP_SHARE) + QEMU_MIB


SCENARIOS = {
    scenario.name: scenario
    for scenario in (
        Scenario("idle", "idle after boot"),
        Scenario("freed", "three quarters of the memory were written and freed", freed_share=0.75),
        Scenario("churn", "memory is rewritten, freed and taken back all the time", churn=True),
    )
}


def record(
    mode: Mode, scenario: Scenario, result: MigrationResult, verified: bool, **extra: Any
) -> Dict[str, Any]:
    """One run as it is written to the JSON file."""
    hints = result.hints or Hints(state="idle")
    asked = hints.ask_to_end > 0
    return {
        "mode": mode.name,
        "scenario": scenario.name,
        "total_ms": result.total_ms,
        "downtime_ms": result.downtime_ms,
        "sent_bytes": result.sent_bytes,
        "normal_pages": result.normal_pages,
        "zero_pages": result.zero_pages,
        # Stock QEMU does not count its hints.
        "hinted_bytes": hints.hinted_bytes if result.hints else None,
        "ask_to_end_ms": hints.ask_to_end / 1000 if asked else None,
        "messages": hints.messages if result.hints else None,
        "verified": verified,
        "ask_to_first_ms": hints.ask_to_first / 1000 if asked else None,
        "arm_ms": hints.arm_time / 1000 if asked else None,
        "setup_ms": result.setup_ms,
        "rounds": result.rounds,
        "hint_state": hints.state if result.hints else None,
        "hint_reason": hints.reason,
        **extra,
    }


def run_once(
    spec: GuestSpec, mode: Mode, scenario: Scenario, index: int, logs: Path
) -> Dict[str, Any]:
    """Boot a guest, migrate it, verify it, and return the record."""
    spec = mode.spec(spec)
    with Guest(spec, "source", logs=logs) as source:
        source.wait_ready()
        scenario.prepare(source)
        with Guest(spec, "destination", logs=logs, incoming=True) as destination:
            with host.warmed(scenario.host_mib(spec.mem_mib)):
                free_bytes = workload.free_reported_bytes(source)
            result = migrate(source, destination, migration_for_mode(mode))
            verdicts = scenario.verify(destination)
            trouble = source.kernel_trouble() + destination.kernel_trouble()
    complaints = [v.first for v in verdicts.values() if not v.good] + trouble
    for complaint in complaints:
        print(f"demo: {mode.name}, {scenario.name}: {complaint} (logs: {logs})", file=sys.stderr)
    return record(
        mode,
        scenario,
        result,
        not complaints,
        run=index,
        mem_mib=spec.mem_mib,
        vcpus=spec.vcpus,
        guest_free_reported_bytes=free_bytes,
        verified_pages=sum(verdict.pages for verdict in verdicts.values()),
        checked_pages=sum(verdict.checked for verdict in verdicts.values()),
    )


def check_memory(mem_mib: int, scenarios: Sequence[Scenario]) -> None:
    """Stop before the host runs out of memory in the middle."""
    greediest = max(scenarios, key=lambda scenario: scenario.host_mib(mem_mib))
    need, have = 2 * greediest.host_mib(mem_mib), host.available_mib()
    if need > have:
        raise NotEnoughMemory(
            f"two {mem_mib} MiB guests in scenario {greediest.name} need {need} MiB of memory, "
            f"{have} MiB are available: use a smaller --mem, or other --scenarios"
        )


def parse_arguments(argv: Sequence[str]) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        prog="demo",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Live-migrate a guest in each mode and compare.",
        epilog="modes:\n"
        + "\n".join(f"  {mode.name:12} {mode.about}" for mode in (MODES[name] for name in DEMO))
        + "\nscenarios:\n"
        + "\n".join(f"  {scenario.name:12} {scenario.about}" for scenario in SCENARIOS.values()),
    )
    add_guest_options(parser, "8G", 4)
    parser.add_argument("--runs", type=int, default=1, metavar="N", help="of each; default 1")
    parser.add_argument(
        "--stock", action="store_true", help="also run the unpatched QEMU and kernel"
    )
    parser.add_argument(
        "--modes",
        nargs="+",
        choices=DEMO,
        metavar="MODE",
        help="default: all of our build, with --stock all",
    )
    parser.add_argument(
        "--scenarios",
        nargs="+",
        choices=list(SCENARIOS),
        default=list(SCENARIOS),
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


def write_json(path: Path, runs: List[Dict[str, Any]]) -> None:
    """Write what there is so far; a reader never sees half a file."""
    new = path.with_name(path.name + ".new")
    new.write_text(json.dumps(runs, indent=1) + "\n", encoding="ascii")
    new.replace(path)


def show(args: argparse.Namespace, runs: List[Dict[str, Any]]) -> None:
    """Print the tables."""
    for name in args.scenarios:
        print(f"\n{name}: {SCENARIOS[name].about}; {args.mem} MiB, {args.vcpus} vCPUs", end="")
        print(f", medians of {args.runs} runs (range)" if args.runs > 1 else "")
        print(report.table(runs, name))
        for line in report.comparisons(runs, name):
            print(line)
    print(f"\nwritten to {args.out}")


def run_all(args: argparse.Namespace) -> int:
    """Run everything that was asked for; returns the exit status."""
    wanted = args.modes or [m for m in DEMO if args.stock or MODES[m].qemu == "ours"]
    modes = [MODES[name] for name in DEMO if name in wanted]
    scenarios = [SCENARIOS[name] for name in args.scenarios]
    for mode in modes:
        paths.qemu_binary(mode.qemu)
        paths.kernel_image(mode.kernel)
    paths.initramfs()
    check_memory(args.mem, scenarios)
    check_writable(args.out)

    spec = GuestSpec(mem_mib=args.mem, vcpus=args.vcpus)
    # Modes in turn, so that whatever else the host does meets all of them.
    plan = [(i, s, m) for i in range(1, args.runs + 1) for s in scenarios for m in modes]
    runs: List[Dict[str, Any]] = []
    for done, (index, scenario, mode) in enumerate(plan, 1):
        logs = paths.OUT / "logs" / "demo" / f"{scenario.name}-{mode.name}-{index}"
        print(f"[{done}/{len(plan)}] {scenario.name}, {mode.name} ...", end="", flush=True)
        run = run_once(spec, mode, scenario, index, logs)
        runs.append(run)
        write_json(args.out, runs)
        print(
            f" {run['total_ms']} ms, {run['sent_bytes'] // report.MIB} MiB sent, "
            + ("verified" if run["verified"] else "NOT VERIFIED")
        )
    show(args, runs)
    return 0 if all(run["verified"] for run in runs) else 1


def main(argv: Sequence[str]) -> int:
    """Entry point of scripts/demo."""
    return run_all(parse_arguments(argv))
