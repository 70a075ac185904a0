# SPDX-License-Identifier: GPL-2.0-or-later
"""Guests of arm64, with pages of 4 KiB and of 64 KiB: "make arm64" builds and runs them.

QEMU's pages have 4 KiB in both: it counts and sends what the machine "virt" has at least.
"""

import re
from typing import Any, Dict

import pytest

from livemig import memory, paths
from livemig.checks import FREED_PAGES, MIB, NO_HINTS, SMALL, WITH_HINTS, assert_hints_if
from livemig.checks import assert_whole, keep_busy, watched
from livemig.errors import MissingArtifact
from livemig.faults import HINT_ORDER, read_number
from livemig.lab import Lab
from livemig.migration import migrate
from livemig.spec import GuestSpec

pytestmark = pytest.mark.long

PAGE_KIB = {"4k": 4, "64k": 64}
# The largest block that there is, and one that is free for sure: the kernel and what the guest uses
# lie somewhere in its 2 GiB.
LARGEST_MIB = {"4k": 4, "64k": 512}
FREE_MIB = {"4k": 4, "64k": 128}
ARRAY_LINE = re.compile(r"^virtio_balloon_hint_array id \S+ block (\d+) addresses (\d+)$", re.M)


@pytest.fixture(name="spec", params=PAGE_KIB)
def spec_of_size(request: pytest.FixtureRequest) -> GuestSpec:
    """A guest with pages of each size."""
    spec = SMALL.but(
        mem_mib=2048,
        machine="virt,gic-version=3",
        cpu="cortex-a72",
        qemu="arm64",
        kernel=f"arm64-{request.param}",
    )
    try:
        paths.qemu_binary(spec.qemu)
        paths.kernel_image(spec.kernel)
        paths.initramfs(spec.kernel)
    except MissingArtifact as err:
        pytest.skip(f"{err} (make arm64)")
    return spec


@pytest.mark.parametrize("hints", [True, False], ids=["arrays", "none"])
def test_arm64_arrives_intact(
    lab: Lab, measured: Dict[str, Any], spec: GuestSpec, hints: bool
) -> None:
    """A guest of arm64 that rewrites memory all the time arrives intact, without what it freed.

    It reports free memory in arrays, in blocks of 64 KiB and more, whatever the size of its pages.
    """
    size = spec.kernel.removeprefix("arm64-")
    oracle, source = watched(lab, spec.but(trace=f"{memory.KEPT_EVENTS} virtio_balloon_hint_*"))
    seen = source.agent.run("grep -m 1 KernelPageSize /proc/self/smaps")
    assert int(seen.split()[1]) == PAGE_KIB[size]
    least_bytes = PAGE_KIB[size] * 1024 << read_number(source, HINT_ORDER)
    assert least_bytes == MIB // 16
    keep_busy(source)
    destination = oracle.arrival()
    result = migrate(source, destination, WITH_HINTS if hints else NO_HINTS)
    told = assert_hints_if(hints, result, spec.mem_mib * MIB // 2)
    compared = oracle.check()
    assert_whole(destination)

    blocks = [int(bytes_) for bytes_, _ in ARRAY_LINE.findall(source.trace_log.read_text())]
    measured.update(
        blocks=sorted(set(blocks)),
        messages=told.messages,
        skipped=told.skipped_bytes,
        normal_pages=result.normal_pages,
        different=compared.different,
        kept=compared.kept,
    )
    assert len(blocks) == told.messages
    if hints:
        assert min(blocks) == least_bytes
        assert FREE_MIB[size] * MIB <= max(blocks) <= LARGEST_MIB[size] * MIB
        # Most of what was freed stayed behind, with its data: 192 MiB at most are in use again.
        assert compared.different > 0.5 * FREED_PAGES
    else:
        assert (compared.different, compared.kept) == (0, 0)
        assert result.normal_pages > FREED_PAGES, "nothing to save in the control run"
