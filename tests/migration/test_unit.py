# SPDX-License-Identifier: GPL-2.0-or-later
"""The C unit tests of QEMU's side: parsing, translation to runs, clearing."""

import subprocess
from typing import Any, Dict

import pytest

from livemig import paths


@pytest.mark.check
def test_c_unit_tests_pass(measured: Dict[str, Any]) -> None:
    """Every case of test-free-page-hint passes."""
    binary = paths.require(
        paths.cache_dir() / "qemu-ours" / "build" / "tests" / "unit" / "test-free-page-hint",
        "scripts/build-qemu ours",
    )
    done = subprocess.run(
        [binary, "--tap"], capture_output=True, text=True, timeout=300, check=False
    )
    lines = done.stdout.splitlines()
    measured["passed"] = sum(line.startswith("ok ") for line in lines)
    assert measured["passed"] > 0
    assert not [line for line in lines if line.startswith("not ok")]
    assert done.returncode == 0, done.stderr
