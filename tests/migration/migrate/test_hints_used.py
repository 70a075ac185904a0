# SPDX-License-Identifier: GPL-2.0-or-later
"""Hints arrive and are used."""

from typing import Any, Dict

import pytest

from livemig import workload
from livemig.checks import FREED_MIB, FREED_PAGES, MIB, NO_HINTS, SMALL, WITH_HINTS, assert_arrives
from livemig.checks import assert_hints_used, assert_intact, busy, fill_and_free, hints_of, in_check
from livemig.checks import migrate_watched, moved, patient, watched
from livemig.faults import HINT_ORDER, read_number
from livemig.lab import Lab
from livemig.metal import assert_counters_match
from livemig.migration import MigrationResult, migrate
from livemig.modes import MODES

pytestmark = pytest.mark.integrity


@pytest.fixture(scope="module")
def without_hints(module_lab: Lab) -> MigrationResult:
    """The control: the same guest, migrated with hints switched off."""
    return moved(module_lab, module_lab.boot(MODES["none"].spec(SMALL)), NO_HINTS)


@pytest.mark.parametrize("mode_name", in_check(["array", "block"], "block"))
def test_freed_memory_is_not_sent(
    lab: Lab, without_hints: MigrationResult, measured: Dict[str, Any], mode_name: str
) -> None:
    """A guest that wrote and freed half of its memory migrates without sending that memory."""
    assert hints_of(without_hints).reason == "disabled"
    assert without_hints.normal_pages > 0.95 * FREED_PAGES, "nothing to save in the control run"

    mode = MODES[mode_name]
    oracle, source = watched(lab, mode.spec(SMALL))
    fill_and_free(source)
    free_bytes = workload.free_reported_bytes(source)
    result = migrate_watched(oracle, patient(mode))
    assert_intact(oracle.destination)

    hints = assert_hints_used(result, FREED_MIB * MIB)
    measured.update(
        hinted_share=hints.hinted_bytes / free_bytes,
        sent_share=result.sent_bytes / without_hints.sent_bytes,
        arrays=hints.messages,
        blocks=hints.blocks,
    )
    # The guest took some of it when it was connected to and while it answered.
    assert hints.hinted_bytes >= 0.9 * free_bytes
    # Not all that was freed lies in blocks that large.
    assert without_hints.sent_bytes - result.sent_bytes > 0.8 * FREED_MIB * MIB
    assert without_hints.normal_pages - result.normal_pages > 0.8 * FREED_PAGES


def test_many_blocks_share_a_message(lab: Lab, measured: Dict[str, Any]) -> None:
    """A report takes one queue element per 8192 blocks, and one more per reported order at most."""
    source = lab.boot(SMALL.but(mem_mib=4096))
    order = read_number(source, HINT_ORDER)
    assert workload.MAX_ORDER_PAGES >> order == 1 << workload.TOLD_ORDERS - 1
    result = migrate(source, lab.incoming(source.spec), WITH_HINTS)
    hints = assert_hints_used(result, 3 << 30)
    measured.update(arrays=hints.messages, blocks=hints.blocks)
    assert hints.blocks > 700
    assert hints.messages <= workload.TOLD_ORDERS + hints.blocks // 8192


@pytest.mark.check
def test_counter_matches_bitmap(lab: Lab, measured: Dict[str, Any]) -> None:
    """After round 0 and each sync, the counter of dirty pages is the number of bits set."""
    oracle, source, _ = busy(lab, SMALL.but(trace="free_page_hint_*"))
    assert_arrives(oracle, measured)
    # One before round 1, and one in the last sync at least.
    assert_counters_match(source)
