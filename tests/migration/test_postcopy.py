# SPDX-License-Identifier: GPL-2.0-or-later
"""Hints work together with postcopy."""

import re
from dataclasses import replace
from typing import Any, Dict

import pytest
from checks import FREED_MIB, WITH_HINTS, SMALL, assert_hints_used, assert_intact
from checks import fill_and_free, start_churn, wait_hints_ended
from conftest import Lab

from livemig import workload
from livemig.migration import finish, query, start

MIB = 1 << 20
RESTORED = re.compile(r"^free_page_hint_restore (\d+) pages$", re.MULTILINE)


@pytest.mark.parametrize("preempt", [False, True], ids=["plain", "preempt"])
def test_switch_right_after_the_hints(lab: Lab, measured: Dict[str, Any], preempt: bool) -> None:
    """A switch to postcopy before hinted pages could be sent: each can be used, none is lost."""
    spec = SMALL.but(trace="free_page_hint_restore")
    source = lab.boot(spec)
    fill_and_free(source)
    start_churn(source)
    destination = lab.incoming(spec)
    # So slow that the first round is far from its end when the guest is switched over.
    start(
        source,
        destination,
        replace(
            WITH_HINTS,
            common={"postcopy-ram": True, "postcopy-preempt": preempt},
            parameters={**WITH_HINTS.parameters, "max-bandwidth": MIB},
        ),
    )
    wait_hints_ended(source)
    assert query(source).status == "active"
    source.qmp("migrate-start-postcopy")
    source.qmp("migrate-set-parameters", max_postcopy_bandwidth=0)
    result = finish(source, destination)

    hints = assert_hints_used(result, FREED_MIB * MIB)
    # The premise: the guest was switched over, with pages that were hinted and never sent.
    assert result.raw["ram"]["postcopy-bytes"] > 0
    restored = [int(pages) for pages in RESTORED.findall(source.trace_log.read_text())]
    assert restored and restored[0] * 4096 >= FREED_MIB * MIB
    measured.update(restored=restored[0], redirtied=hints.redirtied_bytes)
    # They are sent without a look at them: freed memory was full of data.
    assert result.zero_pages >= restored[0]
    assert_intact(destination)
    assert_intact(destination, "churn")
    # The guest takes back what was hinted, and works on.
    workload.dirty_and_free(destination, FREED_MIB)
    assert_intact(destination)
