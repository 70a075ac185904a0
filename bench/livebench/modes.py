# SPDX-License-Identifier: GPL-2.0-or-later
"""The ways to treat free memory that are compared."""

from dataclasses import dataclass, field
from typing import Dict, Mapping, Tuple

from livemig.spec import ARRAYS, BLOCKS, GuestSpec


@dataclass(frozen=True)
class Mode:
    """A QEMU, a guest kernel, and what is switched on in them."""

    name: str
    about: str
    qemu: str
    kernel: str
    balloon: str
    capabilities: Mapping[str, bool] = field(default_factory=dict)
    # Wait, before the migration, until the guest has nothing more to report.
    settle: bool = False
    # Exclude a set of pages that was made beforehand, instead of asking (see floor.py).
    floor: bool = False

    def spec(self, base: GuestSpec) -> GuestSpec:
        """A copy of a guest with what this mode changes."""
        return base.but(qemu=self.qemu, kernel=self.kernel, balloon=self.balloon)

    @property
    def builds(self) -> Tuple[str, str]:
        """The QEMU and the kernel."""
        return f"qemu-{self.qemu}", f"kernel-{self.kernel}"


_ON = {"free-page-hint": True}
_OFF = {"free-page-hint": False}

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
        "free-page-hint=off,free-page-reporting=on",
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
        _ON,
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
)

# What builds a QEMU that only benchmarks need.
MAKERS = {"floor": "bench/build-floor", "before": "bench/build-before COMMIT"}

MODES: Dict[str, Mode] = {mode.name: mode for mode in _MODES}
