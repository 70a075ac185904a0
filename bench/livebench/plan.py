# SPDX-License-Identifier: GPL-2.0-or-later
"""All runs in turn: which comes next, what is done already, how long it will take."""

import sys
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any, Callable, Dict, List, Mapping, NamedTuple, Sequence, Tuple

from livebench import engine
from livebench.disks import data_image
from livebench.scenarios import Scenario
from livebench.store import Store
from livemig import paths
from livemig.errors import LivemigError, NotPossibleHere
from livemig.modes import MAKERS, MODES, Mode

Runner = Callable[[Scenario, Mode, int, Path], Dict[str, Any]]


class Step(NamedTuple):
    """One run that is to be made."""

    scenario: Scenario
    mode: Mode
    index: int


@dataclass(frozen=True)
class Work:
    """A scenario, in which modes, how often."""

    scenario: Scenario
    modes: Tuple[str, ...]
    runs: int


def order(work: Sequence[Work], modes: Mapping[str, Mode] = MODES) -> List[Step]:
    """The steps: the number of the run outermost, modes innermost.

    So whatever else the host does, and however it drifts, meets all modes alike; the modes rotate,
    so that none is always the first.
    """
    steps = []
    for index in range(1, max((item.runs for item in work), default=0) + 1):
        for item in work:
            if index <= item.runs:
                shift = (index - 1) % len(item.modes)
                turn = item.modes[shift:] + item.modes[:shift]
                steps += [Step(item.scenario, modes[name], index) for name in turn]
    return steps


def check_built(todo: Sequence[Work], modes: Mapping[str, Mode] = MODES) -> None:
    """Stop before the first run if something has not been built."""
    for mode in {name: modes[name] for item in todo for name in item.modes}.values():
        if mode.qemu in MAKERS:
            qemu = paths.cache_dir() / f"qemu-{mode.qemu}" / "bin" / "qemu-system-x86_64"
            paths.require(qemu, MAKERS[mode.qemu])
        paths.qemu_binary(mode.qemu)
        paths.kernel_image(mode.kernel)
    paths.initramfs()
    for scenario in (item.scenario for item in todo):
        if scenario.workload.debian:
            paths.debian_image()
        if scenario.workload.kernel:
            paths.kernel_image(scenario.workload.kernel)
        if scenario.workload.data_disk:
            data_image(scenario.workload)


def duration(seconds: float) -> str:
    """A time for people."""
    minutes = int(seconds + 59) // 60
    return f"{minutes // 60} h {minutes % 60:02} min" if minutes >= 60 else f"{minutes} min"


def expected(step: Step, seen: Mapping[str, Mapping[str, List[float]]]) -> float:
    """The seconds that a run will take; what others took is told by scenario and mode."""
    modes = seen.get(step.scenario.name, {})
    if step.mode.name in modes:
        return mean(modes[step.mode.name])
    others = sum(modes.values(), [])
    extra = engine.SETTLE_SECONDS if step.mode.settle else 0
    return extra + (mean(others) if others else float(step.scenario.workload.guess))


def describe(run: Dict[str, Any]) -> str:
    """A run in a few words."""
    values = run["metrics"]
    if "total_ms" not in values:
        return ", ".join(f"{name} {value:.0f}" for name, value in list(values.items())[:3])
    found = {None: "", True: ", verified", False: f", NOT VERIFIED: {'; '.join(run['wrong'])}"}
    moved = f"{values['total_ms']:.0f} ms, {values['sent_mib']:.0f} MiB sent"
    return moved + found[run["verified"]]


def carry_out(steps: Sequence[Step], store: Store, fresh: bool, runner: Runner = engine.run) -> int:
    """Make the runs that are missing; returns how many failed.

    What is interrupted leaves nothing behind, and is made again the next time.
    """
    seen: Dict[str, Dict[str, List[float]]] = defaultdict(lambda: defaultdict(list))
    missing = []
    for step in steps:
        run = {} if fresh else store.made(*step)
        if run:
            seen[step.scenario.name][step.mode.name].append(run["seconds"])
        else:
            missing.append(step)
    if len(missing) < len(steps):
        print(f"bench: {len(steps) - len(missing)} of {len(steps)} runs are there already")
    failed = 0
    impossible = set()
    for number, step in enumerate(missing):
        if step.scenario.name in impossible:
            continue
        name = f"{step.scenario.name}, {step.mode.name}, run {step.index}"
        left = duration(sum(expected(other, seen) for other in missing[number:]))
        print(f"[{number + 1}/{len(missing)}, {left} left] {name}: ", end="", flush=True)
        logs = paths.OUT / "logs" / "bench" / step.scenario.name / f"{step.mode.name}-{step.index}"
        try:
            run = runner(*step, logs)
        except NotPossibleHere as err:
            impossible.add(step.scenario.name)
            print(f"{step.scenario.name} is skipped: {err}", flush=True)
            continue
        except LivemigError as err:
            failed += 1
            print("failed", flush=True)
            # What follows the first line is the guest's console, which is in the logs.
            print(f"bench: error: {name}: {str(err).splitlines()[0]} ({logs})", file=sys.stderr)
            continue
        except KeyboardInterrupt:
            print("interrupted; the same command goes on from here", flush=True)
            raise
        seen[step.scenario.name][step.mode.name].append(run["seconds"])
        store.save(*step, run)
        failed += run.get("verified") is False
        print(describe(run), flush=True)
    return failed
