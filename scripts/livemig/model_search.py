# SPDX-License-Identifier: GPL-2.0-or-later
"""One search of the model with spin."""

import re
import shutil
import subprocess
import tempfile
import time
from dataclasses import dataclass

from livemig import paths

MODEL = paths.REPO / "tests" / "migration" / "model" / "free_page_hint.pml"

TIMEOUT_S = 1200

SAFETY = "-DSAFETY -DNOFAIR -DNOCLAIM"
# Weak fairness for more than six processes.
LIVENESS = "-DNFAIR=3"


@dataclass(frozen=True)
class Search:
    """A full search of the model with @options, for a violation of @claim if that is given."""

    options: str
    claim: str = ""
    # A violation ends it early: compiling it well, or much memory, would take longer.
    short: bool = False
    # What it may use. The largest needs a third of that.
    depth: int = 2_000_000
    mib: int = 3500


@dataclass(frozen=True)
class Verdict:
    """What spin's verifier said."""

    # What does not hold: the name of a property, or "" if all of them do.
    violated: str
    # Every state was visited, or all up to the violation.
    complete: bool
    states: int
    depth: int
    mib: float
    seconds: float
    output: str


def _run(command: str, directory: str) -> str:
    done = subprocess.run(
        command.split(),
        cwd=directory,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=TIMEOUT_S,
        check=False,
    )
    assert done.returncode == 0, f"{command}:\n{done.stdout[-4000:]}"
    return done.stdout


def _number(pattern: str, output: str) -> str:
    found = re.search(pattern, output)
    assert found, output
    return found.group(1)


def search(what: Search) -> Verdict:
    """Build the verifier and run it."""
    for tool in ("spin", "gcc"):
        assert shutil.which(tool), f"there is no {tool}: run scripts/install-deps test"
    defines = " ".join(f"-D{option}" for option in what.options.split())
    start = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="free-page-hint-model-") as directory:
        _run(f"spin {defines} -a {MODEL}", directory)
        mode = LIVENESS if what.claim else SAFETY
        level, room = ("-O0", "-w18") if what.short else ("-O1", "")
        _run(f"gcc -w {level} {mode} -DNOREDUCE -DMEMLIM={what.mib} -o pan pan.c", directory)
        flags = f"-a -f -N {what.claim}" if what.claim else ""
        output = _run(f"./pan -n -E -m{what.depth} {room} {flags}", directory)
    violated = ""
    if int(_number(r"errors: (\d+)", output)):
        violated = what.claim
        if not re.search(r"pan:1: acceptance cycle", output):
            violated = _number(r"pan:1: assertion violated (.*) \(at depth", output)
    checked = r"acceptance +cycles\s+\+ \(fairness" if what.claim else r"assertion violations\s+\+$"
    return Verdict(
        violated=violated,
        complete="Full statespace search for:" in output
        and not re.search(r"too small|MEMLIM|out of memory|interrupted|hash-compact", output)
        and bool(re.search(checked, output, re.MULTILINE))
        and ("Search not completed" in output) == bool(violated),
        states=int(_number(r"(\d+) states, stored", output)),
        depth=int(_number(r"depth reached (\d+)", output)),
        mib=float(_number(r"([\d.]+)\s+total actual memory usage", output)),
        seconds=round(time.monotonic() - start, 1),
        output=output,
    )
