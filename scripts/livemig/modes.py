# SPDX-License-Identifier: GPL-2.0-or-later
"""The ways to treat free memory that are compared: one table for the demo, benchmarks and tests."""

from dataclasses import dataclass, field
from typing import Dict, Mapping, Optional, Tuple

from livemig.spec import ARRAYS, BLOCKS, DOWNTIME_LIMIT_MS, UNLIMITED, GuestSpec, MigrationSpec


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


def _capabilities(hints: bool, absent: bool) -> Dict[str, bool]:
    return {"free-page-hint": hints, "skip-absent-pages": absent}


# What hints skip is to be told from what was never there: absent pages are off but where they are
# what is compared.
_ON = _capabilities(hints=True, absent=False)
_OFF = _capabilities(hints=False, absent=False)
_CACHE = f"{ARRAYS},free-page-hint-cache=on"
_REPORTING = "free-page-hint=off,free-page-reporting=on"

_MODES = (
    Mode("legacy", "no hints, unpatched", "stock", "stock", "free-page-hint=off"),
    Mode(
        "stock-hints",
        "upstream's hints, block by block, unpatched",
        "stock",
        "stock",
        f"{BLOCKS},iothread=hints",
    ),
    Mode(
        "stock-reporting",
        "upstream's free page reporting, after it has settled, unpatched",
        "stock",
        "stock",
        _REPORTING,
        settle=True,
    ),
    Mode("none", "no hints, our build", "ours", "ours", ARRAYS, _OFF),
    Mode(
        "stock-driver",
        "our QEMU, unpatched guest kernel",
        "ours",
        "stock",
        ARRAYS,
        _ON,
    ),
    Mode(
        "array-before",
        "an earlier QEMU of ours, our guest kernel",
        "before",
        "ours",
        ARRAYS,
        # It may know nothing of absent pages.
        {"free-page-hint": True},
    ),
    Mode("array", "our QEMU and guest kernel", "ours", "ours", ARRAYS, _ON),
    Mode(
        "floor",
        "every free page was excluded beforehand",
        "floor",
        "ours",
        ARRAYS,
        _ON,
        floor=True,
    ),
    Mode(
        "absent",
        "our QEMU, absent pages; unpatched guest kernel, no balloon",
        "ours",
        "stock",
        None,
        _capabilities(hints=False, absent=True),
    ),
    Mode(
        "absent-reporting",
        "our QEMU, absent pages; unpatched guest kernel, free page reporting, after it has settled",
        "ours",
        "stock",
        _REPORTING,
        _capabilities(hints=False, absent=True),
        settle=True,
    ),
    Mode(
        "stock-driver-absent",
        "our QEMU, absent pages and hints block by block, unpatched guest kernel",
        "ours",
        "stock",
        BLOCKS,
        _capabilities(hints=True, absent=True),
    ),
    Mode(
        "array-absent",
        "our QEMU and guest kernel, absent pages and arrays: the default",
        "ours",
        "ours",
        ARRAYS,
        _capabilities(hints=True, absent=True),
    ),
    Mode(
        "array-cache-768m",
        "our QEMU and guest kernel, up to 768 MiB of cold page cache freed first",
        "ours",
        "ours",
        _CACHE,
        _ON,
        {"free-page-hint-cache": 768 << 20, "free-page-hint-wait": 60000},
    ),
    Mode(
        "array-cache",
        "our QEMU and guest kernel, all cold page cache freed first",
        "ours",
        "ours",
        _CACHE,
        _ON,
        # More than there is, and as long as it takes.
        {"free-page-hint-cache": 1 << 40, "free-page-hint-wait": 60000},
    ),
    Mode(
        "block",
        "our QEMU and guest kernel, absent pages and hints block by block",
        "ours",
        "ours",
        BLOCKS,
        _capabilities(hints=True, absent=True),
    ),
    Mode(
        "absent-ours",
        "our QEMU and guest kernel, absent pages only",
        "ours",
        "ours",
        ARRAYS,
        _capabilities(hints=False, absent=True),
    ),
)

# What builds a QEMU that only benchmarks need.
MAKERS = {"before": "bench/build-before COMMIT"}

MODES: Dict[str, Mode] = {mode.name: mode for mode in _MODES}
# What a user compares, without other guests than ours: see scripts/demo.
DEMO = ("none", "absent-ours", "block", "array-absent", "legacy", "stock-hints")


def migration_for_mode(mode: Mode) -> MigrationSpec:
    """The migration of a mode: as fast as it can go."""
    return MigrationSpec(
        capabilities=mode.capabilities,
        parameters={
            "max-bandwidth": UNLIMITED,
            "downtime-limit": DOWNTIME_LIMIT_MS,
            **mode.parameters,
        },
    )


# The order of the smallest blocks that a guest's kernel reports.
ORDER = "page_reporting.page_reporting_order"
ORDER_0 = f"{ORDER}=0"
_BOTH = f"{ARRAYS},free-page-reporting=on"

# Guests that are not moved, but watched while they give memory back: see density.py.
_RESTING = (
    Mode("plain", "nothing is reported", "ours", "stock", "free-page-hint=off"),
    Mode("reporting", "reporting, blocks of 2 MiB", "ours", "stock", _REPORTING),
    Mode("reporting-0", "reporting, single pages", "ours", "stock", _REPORTING, cmdline=(ORDER_0,)),
    Mode("reporting-hints", "reporting, and hints in arrays", "ours", "ours", _BOTH),
    Mode(
        "reporting-0-hints",
        "reporting, single pages, and hints in arrays",
        "ours",
        "ours",
        _BOTH,
        cmdline=(ORDER_0,),
    ),
)
RESTING: Dict[str, Mode] = {mode.name: mode for mode in _RESTING}
