# SPDX-License-Identifier: GPL-2.0-or-later
"""A guest that does not answer costs the deadline and no more."""

import pytest
from checks import FREED_PAGES, SMALL, fill_and_free, hints_of, migration
from conftest import Lab

from livemig.migration import migrate

WAIT_MS = 1500


@pytest.mark.parametrize("arrays", ["on", "off"])
def test_crashed_guest_migrates(lab: Lab, arrays: str) -> None:
    """A guest that has crashed and never answers is migrated whole after the deadline."""
    lab.trouble_expected = True
    # The kernel halts when it panics: its driver stays as it is, and silent.
    spec = SMALL.but(
        balloon=f"free-page-hint=on,free-page-hint-arrays={arrays}", cmdline=("panic=0",)
    )
    source = lab.boot(spec)
    fill_and_free(source)
    source.agent.send("echo c > /proc/sysrq-trigger")
    source.console.wait_for("end Kernel panic", 60)

    destination = lab.incoming(spec)
    result = migrate(source, destination, migration(free_page_hint_wait=WAIT_MS))
    hints = hints_of(result)
    assert (hints.state, hints.reason) == ("ended", "timeout")
    assert (hints.reports, hints.arrays, hints.hinted_bytes) == (0, 0, 0)
    # The premise: the deadline was waited for.
    assert result.total_ms > WAIT_MS
    assert result.normal_pages > 0.95 * FREED_PAGES
    assert destination.qmp("query-status")["status"] == "running"
