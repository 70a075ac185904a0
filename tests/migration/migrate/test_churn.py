# SPDX-License-Identifier: GPL-2.0-or-later
"""A guest that uses its memory while it migrates loses none of it."""

from typing import Any, Dict

import pytest

from livemig import workload
from livemig.checks import INIT_ON_FREE, MIB, SMALL, assert_goes_on, assert_intact, hints_of
from livemig.checks import in_check, migration, patient, start_churn, wait_rounds, watched
from livemig.lab import Lab
from livemig.migration import let_end, start
from livemig.modes import MODES

pytestmark = pytest.mark.integrity

ROUNDS = 5
# "none" is the control: what fails there too is not the hints' fault.
CASES = ("array", "block", "none", "init-on-free")


@pytest.mark.parametrize("name", in_check(CASES, "array", "init-on-free", long=["block"]))
def test_memory_survives_churn(lab: Lab, measured: Dict[str, Any], name: str) -> None:
    """Pages rewritten, freed and taken back during migrations there and back arrive as written."""
    mode = MODES[name if name in MODES else "array"]
    # What was not sent must read as zero, or such a guest hands out memory that is not clear.
    cmdline = INIT_ON_FREE if name == "init-on-free" else ()
    oracle, here = watched(lab, mode.spec(SMALL).but(cmdline=cmdline))
    workload.dirty_and_free(here, 256)
    workload.stamp(here, 32)
    start_churn(here)

    # With such limits, it is ready to be stopped only if it wrote less than 32 pages in a round, as
    # even a guest does not that hardly runs on a busy machine.
    spec = migration(patient(mode), downtime_limit=1, max_bandwidth=128 * MIB)
    redirtied = 0
    for hop in range(2):
        before = assert_intact(here, "churn")
        there = oracle.arrival()
        start(here, there, spec)
        wait_rounds(here, ROUNDS)
        result = let_end(here, there)
        seen = oracle.check()
        here = oracle.move_on()
        assert_intact(here)
        after = assert_goes_on(here)
        # The premise: the guest wrote all the while, or there would have been one round.
        assert result.rounds >= ROUNDS
        hints = hints_of(result)
        assert (hints.reason is None) == (name != "none")
        redirtied += hints.redirtied_bytes
        measured[f"hop-{hop}"] = {
            "rounds": result.rounds,
            "reallocs": after.reallocs - before.reallocs,
            "skipped": hints.skipped_bytes,
            "redirtied": hints.redirtied_bytes,
            "kept": seen.kept,
            "different": seen.different,
        }
    # What was not sent can be used, and is clear.
    workload.stamp(here, 256, name="new")
    assert_intact(here, "new")
    # The premise: hinted pages were taken back and written.
    assert (redirtied > 0) == (name != "none")
