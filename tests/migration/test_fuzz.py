# SPDX-License-Identifier: GPL-2.0-or-later
"""A slice of the fuzzing that "make fuzz" does for longer."""

import subprocess

from livemig import paths

EXECUTIONS = 200000


def test_messages_are_taken_as_they_are_meant() -> None:
    """Parsing, trimming and clearing agree with slow, simple versions of them on any message."""
    done = subprocess.run(
        [paths.REPO / "scripts" / "fuzz", f"-runs={EXECUTIONS}"],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        check=False,
    )
    assert done.returncode == 0, done.stdout[-4000:]
    assert f"Done {EXECUTIONS} runs" in done.stdout
