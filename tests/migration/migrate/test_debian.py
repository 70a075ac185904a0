# SPDX-License-Identifier: GPL-2.0-or-later
"""A Debian guest with a disk, at work while it migrates."""

from typing import Any, Dict

from livemig import workload
from livemig.checks import SMALL, WITH_HINTS, assert_hints_used, assert_intact, watched
from livemig.disk import debian_disk
from livemig.lab import Lab
from livemig.migration import migrate

# Compiles the same file over and over, and notes what comes out.
SOURCE = (
    "for i in $(seq 20); do"
    ' echo "int f$i(int x) { for (int i = 0; i < x; i++) x ^= i * $i; return x; }";'
    " done > /root/work.c"
)
BUILD = (
    "cd /root; while :; do gcc -O2 -c -o work.o work.c && sha256sum work.o; done > build.log 2>&1"
)
BUILT = "$(wc -l < /root/build.log)"


def test_compiler_runs_on(lab: Lab, measured: Dict[str, Any]) -> None:
    """A guest that compiles all the time migrates twice; every object file is the same."""
    with debian_disk() as disk:
        oracle, here = watched(lab, SMALL.but(mem_mib=2048, disk=disk))
        here.agent.run(SOURCE)
        workload.dirty_and_free(here, 1024)
        workload.stamp(here, 32)
        here.agent.run(f"setsid sh -c '{BUILD}' & until [ -s /root/build.log ]; do sleep 0.1; done")
        for hop in range(2):
            there = oracle.arrival()
            result = migrate(here, there, WITH_HINTS)
            hints = assert_hints_used(result, 512 << 20)
            seen = oracle.check()
            here = oracle.move_on()
            assert_intact(here)
            # The premise: the compiler goes on at the destination.
            arrived = int(here.agent.run(f"echo {BUILT}"))
            goes_on = f"until [ {BUILT} -gt {arrived + 2} ]; do sleep 0.1; done"
            here.agent.run(goes_on, timeout=600)
            measured[f"hop-{hop}"] = {
                "ms": result.total_ms,
                "skipped": hints.skipped_bytes,
                "kept": seen.kept,
            }
        assert here.agent.run("sort -u /root/build.log | wc -l").strip() == "1"
        assert "work.o" in here.agent.run("tail -n 1 /root/build.log")
