# SPDX-License-Identifier: GPL-2.0-or-later
"""The destination's memory is the source's, but for what was hinted."""

from typing import Any, Dict

import pytest
from checks import SMALL, assert_intact, fill_and_free, start_churn
from conftest import Lab

from livemig import memory
from livemig.migration import migrate
from livemig.spec import MODES, migration_for_mode


@pytest.mark.parametrize("mode_name", ["array", "block", "none"])
def test_equal_outside_hinted_pages(lab: Lab, measured: Dict[str, Any], mode_name: str) -> None:
    """Source and destination hold the same bytes in every page that no hint took out."""
    mode = MODES[mode_name]
    with memory.memory_files("source", "destination") as (one, other):
        spec = SMALL.for_mode(mode).but(trace=memory.HINT_EVENT)
        source = lab.boot(spec.but(mem_file=one))
        fill_and_free(source)
        start_churn(source)
        destination = lab.incoming(spec.but(mem_file=other), running=False)
        migrate(source, destination, migration_for_mode(mode))
        result = memory.compare(one, other, source.trace_log)
        measured.update(hinted=result.hinted, different=result.different)
        assert not result.lost, f"pages differ that were not hinted: {result.lost}"
        # The premise: hinted pages are not sent, so that freed memory does differ.
        assert (result.hinted > 0) == (mode_name != "none")
        assert (result.different > 0) == (mode_name != "none")
        destination.qmp("cont")
        assert_intact(destination)
        assert_intact(destination, "churn")
