# SPDX-License-Identifier: GPL-2.0-or-later
"""What to run, as data: guests and migrations; the modes that are compared are in modes.py."""

import os
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Dict, Mapping, Optional, Tuple

# REP MOVSB/STOSB are slow under TCG, and with erms or fsrm that is what the guest's kernel and libc
# fill and copy pages with: writing 6 GiB takes six times as long.
CPU = "max,-erms,-fsrm"

# What guests run with. FPH_ACCEL=kvm is for machines whose KVM runs Linux guests.
ACCEL = os.environ.get("FPH_ACCEL", "tcg,thread=multi")

# A migration goes as fast as it can and may stop the guest for as long as this.
UNLIMITED = 0
DOWNTIME_LIMIT_MS = 2000
FAST = {"max-bandwidth": UNLIMITED, "downtime-limit": DOWNTIME_LIMIT_MS}


def dashed(arguments: Mapping[str, Any]) -> Dict[str, Any]:
    """Python's arguments, with the dashes of QMP's names."""
    return {name.replace("_", "-"): value for name, value in arguments.items()}


@dataclass(frozen=True)
class MigrationSpec:
    """How to migrate: what is set with QMP before it starts."""

    # Both on the source only, which is where free page hints are.
    capabilities: Mapping[str, bool] = field(default_factory=dict)
    parameters: Mapping[str, Any] = field(default_factory=dict)
    # Capabilities that source and destination must agree on.
    common: Mapping[str, bool] = field(default_factory=dict)

    def with_parameters(self, **parameters: Any) -> "MigrationSpec":
        """A copy with more parameters; underscores stand for QMP's dashes."""
        return replace(self, parameters={**self.parameters, **dashed(parameters)})

    def with_capabilities(self, **capabilities: bool) -> "MigrationSpec":
        """A copy with these capabilities only; underscores stand for QMP's dashes."""
        return replace(self, capabilities=dashed(capabilities))

    def with_common(self, **capabilities: bool) -> "MigrationSpec":
        """The same for those of both sides."""
        return replace(self, common=dashed(capabilities))


# Properties of virtio-balloon-pci, for hints block by block and for hints in arrays.
BLOCKS = "free-page-hint=on"
ARRAYS = f"{BLOCKS},free-page-hint-arrays=on"


@dataclass(frozen=True)
class GuestSpec:
    """A virtual machine, the same for the source and the destination of a migration."""

    # pylint: disable=too-many-instance-attributes

    mem_mib: int = 1024
    vcpus: int = 2
    qemu: str = "ours"
    machine: str = "q35"
    accel: str = ACCEL
    cpu: str = CPU
    kernel: str = "ours"
    # Without, a driver in the kernel is the agent, and memstamp.
    user_space: bool = True
    # A program to run in place of the BIOS, and of a kernel and all that follows.
    firmware: Optional[Path] = None
    # Or arguments for QEMU that say what to run, in their place; none: firmware alone.
    software: Optional[Tuple[str, ...]] = None
    # Properties of virtio-balloon-pci; None leaves the device out.
    balloon: Optional[str] = ARRAYS
    # NUMA nodes that share the memory and the vCPUs out.
    nodes: int = 1
    # Words for the guest kernel's command line.
    cmdline: Tuple[str, ...] = ()
    # More arguments for QEMU.
    args: Tuple[str, ...] = ()
    # A root file system to boot instead of the initramfs.
    disk: Optional[Path] = None
    # Keep the guest's memory in a file here, so that it can be read from outside.
    mem_file: Optional[Path] = None
    # Or what it is made of: a type of memory backend and its properties.
    mem_backend: str = "memory-backend-ram"
    # Whether QEMU skips absent pages, unless a migration says otherwise; None: as it likes.
    skip_absent: Optional[bool] = None
    # Trace events (patterns, with spaces between them) for the guest's trace log.
    trace: Optional[str] = None
    # A shared library for QEMU to load before its own.
    preload: Optional[Path] = None
    # A command that starts the one that it is given.
    wrapper: Tuple[str, ...] = ()

    def but(self, **changes: Any) -> "GuestSpec":
        """A copy with some fields changed."""
        return replace(self, **changes)
