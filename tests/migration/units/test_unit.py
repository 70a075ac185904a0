# SPDX-License-Identifier: GPL-2.0-or-later
"""The C unit tests of QEMU's side: parsing, clearing, what is absent."""

from typing import Any, Dict

import pytest

from livemig import paths
from livemig.checks import run_script


@pytest.mark.check
@pytest.mark.parametrize("name", ["test-free-page-hint", "test-absent-pages"])
def test_c_unit_tests_pass(measured: Dict[str, Any], name: str) -> None:
    """Every case of QEMU's unit tests of the pure parts passes."""
    binary = paths.qemu_file("ours", "build", "tests", "unit", name)
    done = run_script(binary, "--tap")
    lines = done.stdout.splitlines()
    measured["passed"] = sum(line.startswith("ok ") for line in lines)
    assert measured["passed"] > 0
    assert not [line for line in lines if line.startswith("not ok")]
    assert done.returncode == 0, done.stderr
