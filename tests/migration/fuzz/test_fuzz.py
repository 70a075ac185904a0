# SPDX-License-Identifier: GPL-2.0-or-later
"""Slices of the fuzzing that "make fuzz" does for longer."""

import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from livemig import paths

PARSER_EXECUTIONS = 200000
# About half a minute, most of it for what is new.
DEVICE_EXECUTIONS = 1000
# Each input of the device's fuzzer has a migration of its own: what must have come of some.
REACHED = """
    asked applied redirtied invalid stale starved reported completed
    reset vm-stopped cancelled cached
""".split()


def fuzz(what: str, executions: int, *inputs: Any) -> str:
    """Run scripts/fuzz and return what it printed."""
    done = subprocess.run(
        [paths.REPO / "scripts" / "fuzz", what, f"-runs={executions}", *inputs],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        check=False,
    )
    assert done.returncode == 0, done.stdout[-4000:]
    assert f"Done {executions} runs" in done.stdout
    return done.stdout


@pytest.mark.check
def test_messages_are_taken_as_they_are_meant() -> None:
    """Parsing, trimming and clearing agree with slow, simple versions of them on any message."""
    fuzz("parser", PARSER_EXECUTIONS)


def test_the_device_withstands_any_guest(tmp_path: Path) -> None:
    """Whatever a guest does while a migration waits for its hints, QEMU goes on, the migration
    ends, no write is lost to a hint, and the device serves the next driver."""
    corpus = tmp_path / "corpus"
    shutil.copytree(paths.REPO / "tests" / "migration" / "fuzz" / "corpus-device", corpus)
    output = fuzz("device", DEVICE_EXECUTIONS, corpus)
    reached = dict(re.findall(r" ([a-z-]+) (\d+)", output[output.rindex("reached:") :]))
    assert not [what for what in REACHED if int(reached.get(what, 0)) == 0], reached
