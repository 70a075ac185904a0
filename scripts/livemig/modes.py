# SPDX-License-Identifier: GPL-2.0-or-later
"""The ways to treat free memory that are compared: one table for the demo, benchmarks and tests."""

from dataclasses import dataclass, field
from typing import Any, Dict, Iterator, Mapping, Optional, Tuple

from livemig.spec import ARRAYS, BLOCKS, FAST, GuestSpec, MigrationSpec


@dataclass(frozen=True)
class Mode:
    """A QEMU, a guest kernel, and what is switched on in them."""

    name: str
    about: str
    qemu: str
    kernel: str
    # Properties of the balloon; None: there is none.
    balloon: Optional[str]
    capabilities: Mapping[str, bool] = field(default_factory=dict)
    # Of the migration, besides those of the scenario.
    parameters: Mapping[str, object] = field(default_factory=dict)
    # Wait, before the migration, until the guest has nothing more to report.
    settle: bool = False
    # Exclude a set of pages that was made beforehand, instead of asking (see floor.py).
    floor: bool = False
    # Words for the guest's kernel.
    cmdline: Tuple[str, ...] = ()

    def spec(self, base: GuestSpec) -> GuestSpec:
        """A copy of a guest with what this mode changes."""
        return base.but(
            qemu=self.qemu,
            kernel=self.kernel,
            balloon=self.balloon,
            cmdline=(*base.cmdline, *self.cmdline),
        )

    @property
    def baseline(self) -> str:
        """The mode without hints of the same build."""
        return "legacy" if self.qemu == "stock" else "none"

    @property
    def builds(self) -> Tuple[str, str]:
        """The QEMU and the kernel."""
        return f"qemu-{self.qemu}", f"kernel-{self.kernel}"


# What hints skip is to be told from what was never there: absent pages are off but where they are
# what is compared.
_CAPABILITIES = {
    "-": {},
    "off": {"free-page-hint": False, "skip-absent-pages": False},
    "hints": {"free-page-hint": True, "skip-absent-pages": False},
    "absent": {"free-page-hint": False, "skip-absent-pages": True},
    "both": {"free-page-hint": True, "skip-absent-pages": True},
    # An earlier QEMU may know nothing of absent pages.
    "hints-only": {"free-page-hint": True},
}
_BALLOONS = {
    "-": None,
    "off": "free-page-hint=off",
    "reporting": "free-page-hint=off,free-page-reporting=on",
    "blocks": BLOCKS,
    "iothread": f"{BLOCKS},iothread=hints",
    "arrays": ARRAYS,
    "cache": f"{ARRAYS},free-page-hint-cache=on",
    "arrays+reporting": f"{ARRAYS},free-page-reporting=on",
}
# The order of the smallest blocks that a guest's kernel reports.
ORDER = "page_reporting.page_reporting_order"
ORDER_0 = f"{ORDER}=0"
# As long as it takes.
_WAIT = {"free-page-hint-wait": 60000}
# What few modes have besides.
_MORE: Dict[str, Dict[str, Any]] = {
    "stock-reporting": {"settle": True},
    "absent-reporting": {"settle": True},
    "floor": {"floor": True},
    "array-cache-768m": {"parameters": {"free-page-hint-cache": 768 << 20, **_WAIT}},
    # More than there is.
    "array-cache": {"parameters": {"free-page-hint-cache": 1 << 40, **_WAIT}},
    "reporting-0": {"cmdline": (ORDER_0,)},
    "reporting-0-hints": {"cmdline": (ORDER_0,)},
}


def _modes(table: str) -> Iterator[Mode]:
    """The modes of a table: name, QEMU, kernel, balloon, capabilities; and what it is."""
    lines = table.strip().splitlines()
    for row, about in zip(lines[::2], lines[1::2]):
        name, qemu, kernel, balloon, capabilities = row.split()
        parts = (_BALLOONS[balloon], _CAPABILITIES[capabilities])
        yield Mode(name, about.strip(), qemu, kernel, *parts, **_MORE.get(name, {}))


_MODES = """
legacy              stock  stock off       -
    no hints, unpatched
stock-hints         stock  stock iothread  -
    upstream's hints, block by block, unpatched
stock-reporting     stock  stock reporting -
    upstream's free page reporting, after it has settled, unpatched
none                ours   ours  arrays    off
    no hints, our build
stock-driver        ours   stock arrays    hints
    our QEMU, unpatched guest kernel
array-before        before ours  arrays    hints-only
    an earlier QEMU of ours, our guest kernel
array               ours   ours  arrays    hints
    our QEMU and guest kernel
floor               floor  ours  arrays    hints
    every free page was excluded beforehand
absent              ours   stock -         absent
    our QEMU, absent pages; unpatched guest kernel, no balloon
absent-reporting    ours   stock reporting absent
    our QEMU, absent pages; unpatched guest kernel, free page reporting, after it has settled
stock-driver-absent ours   stock blocks    both
    our QEMU, absent pages and hints block by block, unpatched guest kernel
array-absent        ours   ours  arrays    both
    our QEMU and guest kernel, absent pages and arrays: the default
array-cache-768m    ours   ours  cache     hints
    our QEMU and guest kernel, up to 768 MiB of cold page cache freed first
array-cache         ours   ours  cache     hints
    our QEMU and guest kernel, all cold page cache freed first
block               ours   ours  blocks    both
    our QEMU and guest kernel, absent pages and hints block by block
absent-ours         ours   ours  arrays    absent
    our QEMU and guest kernel, absent pages only
"""
MODES = {mode.name: mode for mode in _modes(_MODES)}
# Guests that are not moved, but watched while they give memory back: see density.py.
_RESTING = """
plain               ours   stock off       -
    nothing is reported
reporting           ours   stock reporting -
    reporting, blocks of 2 MiB
reporting-0         ours   stock reporting -
    reporting, single pages
reporting-hints     ours   ours  arrays+reporting -
    reporting, and hints in arrays
reporting-0-hints   ours   ours  arrays+reporting -
    reporting, single pages, and hints in arrays
"""
RESTING = {mode.name: mode for mode in _modes(_RESTING)}

# What builds a QEMU that only benchmarks need.
MAKERS = {"before": "bench/build-before COMMIT"}

# What a user compares, without other guests than ours: see scripts/demo.
DEMO = ("none", "absent-ours", "block", "array-absent", "legacy", "stock-hints")


def migration_for_mode(mode: Mode) -> MigrationSpec:
    """The migration of a mode: as fast as it can go."""
    return MigrationSpec(mode.capabilities, {**FAST, **mode.parameters})
