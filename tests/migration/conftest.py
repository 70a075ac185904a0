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
from typing import Any, Dict, Iterator, List, Optional

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts"))
# pylint: disable=wrong-import-position
from livemig import paths, workload  # noqa: E402
from livemig.errors import BadSetting  # noqa: E402
from livemig.guest import BOOT_SECONDS, Guest  # noqa: E402
from livemig.spec import GuestSpec  # noqa: E402

# Most tests are about hints: what those skip should not depend on what was absent before. With
# FPH_ABSENT=1 everything runs with both.
ABSENT = bool(os.environ.get("FPH_ABSENT"))

# Where a guest's kernel reports the features that it agreed on with the balloon, and their bits.
DRIVER = "/sys/bus/virtio/drivers/virtio_balloon"
FEATURES = {"free-page-hint=on": 3, "free-page-hint-arrays=on": 23, "free-page-reporting=on": 5}

RESULTS: List[Dict[str, Any]] = []

# What a QEMU with sanitizers says when it finds something, but for how QEMU 10.0 reads a vmlinux.
SANITIZERS = re.compile(
    r"^(?!.*/x86-common\.c:\d+:\d+: runtime error: load of misaligned).*"
    r"(?:runtime error|ERROR: AddressSanitizer).*$",
    re.MULTILINE,
)


def pytest_configure() -> None:
    """End in order when told to, as after Ctrl-C: else directories of guests are left."""
    signal.signal(signal.SIGTERM, lambda number, _: pytest.exit("terminated", 128 + number))
    try:
        paths.guest_kernel()
    except BadSetting as err:
        raise pytest.UsageError(str(err)) from err


def missing_in_kernel(guest: Guest) -> Optional[str]:
    """What a guest's kernel lacks of what its balloon offers it, as the kernel itself reports."""
    status, features = guest.agent.exec(f"cat {DRIVER}/virtio*/features")
    if status:
        return "driver for the balloon"
    offered = (guest.spec.balloon or "").split(",")
    for option, bit in FEATURES.items():
        if option in offered and features[bit] != "1":
            return f"{option} in its driver for the balloon"
    return None


class Lab:
    """Starts guests for one test and ends them all after it."""

    def __init__(self, logs: Path, stack: contextlib.ExitStack):
        self.logs = logs
        self.guests: List[Guest] = []
        # Whether the test wants its guest's kernel to complain.
        self.trouble_expected = False
        self._stack = stack

    def launch(self, spec: GuestSpec, name: str, **options: Any) -> Guest:
        """Start a guest without waiting for it to boot."""
        if spec.skip_absent is None:
            spec = spec.but(skip_absent=ABSENT)
        guest = self._stack.enter_context(Guest(spec, name, logs=self.logs, **options))
        self.guests.append(guest)
        return guest

    def boot(self, spec: GuestSpec, name: str = "source") -> Guest:
        """Start a guest and wait until it has booted."""
        guest = self.launch(spec, name)
        guest.wait_ready(BOOT_SECONDS * (1 if paths.is_quick(spec.kernel) else 5))
        # Nobody knows what somebody else's kernel has before it runs.
        if spec.kernel == "ours" and spec.balloon and paths.guest_kernel():
            missing = missing_in_kernel(guest)
            if missing:
                pytest.skip(f"the kernel of FPH_GUEST_KERNEL has no {missing}")
        return guest

    def incoming(self, spec: GuestSpec, name: str = "destination", running: bool = True) -> Guest:
        """Start a QEMU that waits for a guest to come in."""
        return self.launch(spec, name, incoming=True, running=running)

    def boot_crashed(self, spec: GuestSpec, freed_mib: int) -> Guest:
        """A guest that wrote and freed memory and has halted: its driver is there, and silent."""
        self.trouble_expected = True
        guest = self.boot(spec.but(cmdline=("panic=0",)))
        workload.dirty_and_free(guest, freed_mib)
        guest.agent.send("echo c > /proc/sysrq-trigger")
        guest.console.wait_for("end Kernel panic", 60)
        return guest

    def trouble(self) -> List[str]:
        """What the guests' kernels complained about."""
        return [f"{guest.name}: {line}" for guest in self.guests for line in guest.kernel_trouble()]

    def findings(self) -> List[str]:
        """What the sanitizers of the QEMUs found."""
        return [
            f"{guest.name}: {line}"
            for guest in self.guests
            for line in SANITIZERS.findall(guest.qemu_output())
        ]


def _lab(name: str) -> Iterator[Lab]:
    logs = paths.OUT / "logs" / "tests" / re.sub(r"[^\w.-]+", "-", name)
    shutil.rmtree(logs, ignore_errors=True)
    with contextlib.ExitStack() as stack:
        lab = Lab(logs, stack)
        yield lab
        trouble = lab.trouble()
        findings = lab.findings()
    assert lab.trouble_expected or not trouble, "a guest's kernel complained: " + "; ".join(trouble)
    assert not findings, "a sanitizer complained: " + "; ".join(findings)


@pytest.fixture
def lab(request: pytest.FixtureRequest) -> Iterator[Lab]:
    """A lab of the test's own.

    The test fails if a guest's kernel says WARNING, BUG or the like, or a QEMU's sanitizer does.
    """
    yield from _lab(request.node.name)


@pytest.fixture(scope="module")
def module_lab(request: pytest.FixtureRequest) -> Iterator[Lab]:
    """A lab that the tests of a file share."""
    yield from _lab(request.node.name)


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
