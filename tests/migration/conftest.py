# SPDX-License-Identifier: GPL-2.0-or-later
"""Fixtures of the migration tests.

A test's docstring is its promise. What was promised, how it ended and what was measured is
written to out/test-results.json (a run of some of the tests replaces it with those), or to
out/$FPH_RESULTS; the logs of a test's guests are in out/logs/tests/TEST.
"""

import contextlib
import json
import os
import re
import shutil
import signal
import sys
from pathlib import Path
from typing import Any, Dict, Iterator, List

import pytest

REPO = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(REPO / "scripts"), str(REPO / "bench")]
# pylint: disable=wrong-import-position
from livemig import paths  # noqa: E402
from livemig.errors import BadSetting  # noqa: E402
from livemig.lab import Lab  # noqa: E402

RESULTS: List[Dict[str, Any]] = []


def pytest_configure() -> None:
    """End in order when told to, as after Ctrl-C: else directories of guests are left."""
    signal.signal(signal.SIGTERM, lambda number, _: pytest.exit("terminated", 128 + number))
    try:
        paths.guest_kernel()
    except BadSetting as err:
        raise pytest.UsageError(str(err)) from err


def _lab(request: pytest.FixtureRequest) -> Iterator[Lab]:
    """A lab, whose guests are watched.

    The test fails if a guest's kernel says WARNING, BUG or the like, or a QEMU's sanitizer does.
    """
    logs = paths.OUT / "logs" / "tests" / re.sub(r"[^\w.-]+", "-", request.node.name)
    shutil.rmtree(logs, ignore_errors=True)
    with contextlib.ExitStack() as stack:
        lab = Lab(logs, stack)
        yield lab
        trouble = lab.trouble()
        findings = lab.findings()
    assert lab.trouble_expected or not trouble, "a guest's kernel complained: " + "; ".join(trouble)
    assert not findings, "a sanitizer complained: " + "; ".join(findings)


# A test's own, and one that the tests of a file share.
lab = pytest.fixture(_lab)
module_lab = pytest.fixture(_lab, scope="module")


@pytest.fixture
def measured(request: pytest.FixtureRequest) -> Dict[str, Any]:
    """A dictionary for what the test measured; it goes into the results file."""
    values: Dict[str, Any] = {}
    request.node.user_properties.append(("measured", values))
    return values


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Iterator[None]:
    """Note how a test ended."""
    outcome = yield
    report = outcome.get_result()
    if report.when != "call" and report.passed:
        return
    promise = getattr(getattr(item, "obj", None), "__doc__", None) or ""
    RESULTS.append(
        {
            "test": item.nodeid,
            "promise": " ".join(promise.split()),
            "outcome": report.outcome if report.when == "call" or report.skipped else "error",
            "why": report.longrepr[2] if report.skipped and report.longrepr else None,
            "seconds": round(report.duration, 1),
            "measured": dict(item.user_properties).get("measured", {}),
        }
    )


def pytest_sessionfinish() -> None:
    """Write the results file."""
    if RESULTS:
        paths.OUT.mkdir(exist_ok=True)
        name = os.environ.get("FPH_RESULTS", "test-results.json")
        (paths.OUT / name).write_text(json.dumps(RESULTS, indent=1) + "\n")
