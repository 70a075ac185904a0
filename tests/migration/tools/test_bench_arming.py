# SPDX-License-Identifier: GPL-2.0-or-later
"""The benchmark of what arming costs under KVM."""

from pathlib import Path

import pytest

from livebench import arming
from livemig.metal import usable

SET_MIB = 128


@pytest.mark.parametrize("way", ["off", "armed-ours"])
def test_arming_is_measured(tmp_path: Path, way: str) -> None:
    """The guest writes at the rate that it was told; its faults, gaps and memory are counted."""
    usable("kvm")
    qemu, capabilities = arming.ways("4k", ["ours"])[way]
    values = arming.run_metal("4k", SET_MIB, qemu, capabilities, tmp_path)
    assert values["sent_mib"] > SET_MIB
    assert values["written"] > 0 and values["gap_ms"] > 0
    assert ("arm_us_per_gib" in values) == (way != "off")
    # Each page that is written after arming is a fault; nothing of it is protected without.
    assert (values["faults"] > values["written"] / 2) == (way != "off")


# Booting, and moving at a guest's own pace.
@pytest.mark.long
@pytest.mark.parametrize("way", ["off", "armed-ours"])
def test_linux_guest_is_measured(tmp_path: Path, way: str) -> None:
    """Of the Linux guest, the same is counted, and it finds its memory as it was.

    But there is no page fault to count where its writes are interpreted.
    """
    usable("kvm")
    qemu, capabilities = arming.ways(arming.LINUX, ["ours"])[way]
    values = arming.run_linux(qemu, capabilities, tmp_path)
    assert values["sent_mib"] > arming.LINUX_STAMPED_MIB
    assert values["written"] > 0 and values["gap_ms"] > 0 and values["gap_before_ms"] > 0
    assert ("arm_us_per_gib" in values) == (way != "off")
