# SPDX-License-Identifier: GPL-2.0-or-later
"""The guests of one test: started as it wants them, watched for complaints, and ended with it."""

import contextlib
import os
import re
from pathlib import Path
from typing import Any, List, Optional

import pytest

from livemig import paths, workload
from livemig.guest import BOOT_SECONDS, Guest
from livemig.spec import GuestSpec

# Most tests are about hints: what those skip should not depend on what was absent before. With
# FPH_ABSENT=1 everything runs with both.
ABSENT = bool(os.environ.get("FPH_ABSENT"))

# Where a guest's kernel reports the features that it agreed on with the balloon, and their bits.
DRIVER = "/sys/bus/virtio/drivers/virtio_balloon"
FEATURES = {"free-page-hint=on": 3, "free-page-hint-arrays=on": 23, "free-page-reporting=on": 5}

# What a QEMU with sanitizers says when it finds something, but for how QEMU 10.0 reads a vmlinux.
SANITIZERS = re.compile(
    r"^(?!.*/x86-common\.c:\d+:\d+: runtime error: load of misaligned).*"
    r"(?:runtime error|ERROR: AddressSanitizer).*$",
    re.MULTILINE,
)


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
            if missing := missing_in_kernel(guest):
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
