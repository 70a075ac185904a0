# SPDX-License-Identifier: GPL-2.0-or-later
"""Where runs are kept: one JSON file each. A reader never sees half a file."""

import hashlib
import json
import lzma
from dataclasses import asdict
from pathlib import Path
from typing import Any, Dict, List, Mapping

from livebench import engine, hostinfo
from livebench.scenarios import Scenario
from livemig import paths
from livemig.errors import LivemigError
from livemig.modes import Mode

OUT = paths.OUT / "bench"


def write(path: Path, text: str) -> None:
    """Write a file so that it is there whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_name(path.name + ".new")
    try:
        new.write_text(text, encoding="utf-8")
        new.replace(path)
    finally:
        new.unlink(missing_ok=True)


def as_json(data: Any) -> str:
    """JSON, with one item of a list per line."""
    if isinstance(data, list):
        return "[\n" + ",\n".join(json.dumps(item) for item in data) + "\n]\n"
    return json.dumps(data) + "\n"


def write_json(path: Path, data: Any) -> None:
    """The same, for what can be said in JSON."""
    write(path, as_json(data))


def key(scenario: Scenario, mode: Mode) -> str:
    """What a run depends on, its number left out: the same key, the same experiment."""
    what: Dict[str, Any] = {
        "format": engine.FORMAT,
        "name": scenario.name,
        "cmdline": engine.CMDLINE,
        "workload": [scenario.workload.name, asdict(scenario.workload)],
        "mode": asdict(mode),
        "builds": [hostinfo.stamp(build) for build in mode.builds],
    }
    text = json.dumps(what, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _usable(run: Any) -> bool:
    return isinstance(run, dict) and run.get("format") == engine.FORMAT


def exported(path: Path) -> List[Dict[str, Any]]:
    """The runs of a file that an export has written."""
    try:
        runs = json.loads(lzma.decompress(path.read_bytes()))
    except OSError as err:
        raise LivemigError(f"{path}: {err.strerror}") from err
    except (lzma.LZMAError, ValueError) as err:
        raise LivemigError(f"{path} is no file of runs: see bench/bench export") from err
    found = [run for run in runs if _usable(run)]
    if not found:
        raise LivemigError(f"{path} has no runs of this format ({engine.FORMAT})")
    return found


class Store:
    """The runs of a directory."""

    def __init__(self, directory: Path = OUT):
        self.directory = directory

    def path(self, scenario: Scenario, mode: Mode, index: int) -> Path:
        """Where a run is, or will be."""
        return self.directory / "runs" / scenario.name / f"{mode.name}-{index}.json"

    def made(self, scenario: Scenario, mode: Mode, index: int) -> Dict[str, Any]:
        """A run that was made of the builds that there are now; nothing if there is none."""
        run = self._read(self.path(scenario, mode, index))
        return run if run.get("key") == key(scenario, mode) else {}

    @staticmethod
    def _read(path: Path) -> Dict[str, Any]:
        """One run; nothing if it is of no use."""
        try:
            run: Dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        except (FileNotFoundError, ValueError):
            return {}
        return run if _usable(run) else {}

    def save(self, scenario: Scenario, mode: Mode, index: int, run: Mapping[str, Any]) -> None:
        """Keep a run."""
        write_json(self.path(scenario, mode, index), {"key": key(scenario, mode), **run})

    def runs(self) -> List[Dict[str, Any]]:
        """All that there are."""
        found = map(self._read, sorted(self.directory.glob("runs/*/*.json")))
        return [run for run in found if run]
