# SPDX-License-Identifier: GPL-2.0-or-later
"""What the tests of the benchmarks share."""

from pathlib import Path
from typing import Any, Callable, Dict

import pytest

from livebench.canned import bench
from livebench.store import Store


@pytest.fixture
def one_run(tmp_path: Path, measured: Dict[str, Any]) -> Callable[..., Dict[str, Any]]:
    """Makes one run of a scenario with a small guest, which is verified; returns it.

    Its metrics are what the test measured. Skips the test where this machine cannot run it.
    """

    def run(scenario: str, mode: str, *options: str) -> Dict[str, Any]:
        small = ("--mem", "512M", "--runs", "1", "--out", str(tmp_path))
        done = bench("run", "--scenario", scenario, "--mode", mode, *small, *options)
        assert done.returncode == 0, done.stderr
        if "is skipped: " in done.stdout:
            pytest.skip(done.stdout.split("is skipped: ")[1].splitlines()[0])
        (made,) = Store(tmp_path).runs()
        assert made["verified"]
        measured.update(made["metrics"])
        return made

    return run
