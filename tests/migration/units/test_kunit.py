# SPDX-License-Identifier: GPL-2.0-or-later
"""The guest kernel's own unit tests, in a booted guest."""

import re
from typing import Any, Dict

import pytest

from livemig.checks import SMALL, assert_watched, in_check
from livemig.lab import Lab


@pytest.mark.parametrize("kernel", in_check(["ours", "debug"], "ours"))
def test_kunit_passes(lab: Lab, measured: Dict[str, Any], kernel: str) -> None:
    """Every KUnit case of the walker runs and passes, in a guest with memory of all kinds."""
    # Two nodes, movable memory, and memory above 4 GiB.
    spec = SMALL.but(mem_mib=4096, nodes=2, cmdline=("kunit.enable=1", "movablecore=1024M"))
    guest = lab.launch(spec.but(kernel=kernel), "kunit")
    guest.wait_ready(300)
    console = guest.console.text()
    passed = re.findall(r"^(?:\[.*?\] )? +ok \d+ (\w+)(?!.*# SKIP)", console, re.MULTILINE)
    skipped = re.findall(r"^.*# SKIP.*$", console, re.MULTILINE)
    failed = re.findall(r"^.*\bnot ok \d+ .*$", console, re.MULTILINE)
    measured.update(passed=len(passed), skipped=len(skipped))
    assert re.search(r"ok \d+ free_page_hint$", console, re.MULTILINE), "the suite did not run"
    assert passed
    assert not failed, failed
    assert not skipped, skipped
    if kernel == "debug":
        assert_watched(guest)
