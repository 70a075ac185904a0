# SPDX-License-Identifier: GPL-2.0-or-later
"""What several runs say together. All of it is numpy's and scipy's."""

from dataclasses import dataclass
from typing import Any, Dict, Mapping, Optional, Sequence

import numpy as np
from scipy import stats

# Below this, a rank test cannot tell anything apart at the usual 5 %.
LEAST_RUNS = 4


@dataclass(frozen=True)
class Spread:
    """A sample in five numbers, and its size."""

    runs: int
    median: float
    low: float
    high: float
    first_quartile: float
    third_quartile: float

    @classmethod
    def from_values(cls, values: Sequence[float]) -> "Spread":
        """Describe at least one value."""
        low, first, middle, third, high = np.percentile(values, (0, 25, 50, 75, 100))
        return cls(len(values), *(float(x) for x in (middle, low, high, first, third)))


def spreads(runs: Sequence[Mapping[str, Any]], *without: str) -> Dict[str, Spread]:
    """The spread of each figure of some runs, but of those that only tell them apart."""
    names = [name for name in runs[0] if name not in without]
    return {name: Spread.from_values([run[name] for run in runs]) for name in names}


def ratio(values: Sequence[float], base: Sequence[float]) -> Optional[float]:
    """The median compared with that of other runs."""
    if not values or not base:
        return None
    bottom = float(np.median(base))
    return float(np.median(values)) / bottom if bottom else None


def ratio_text(value: Optional[float]) -> str:
    """A ratio as text: more digits where it is small."""
    return "–" if value is None else f"{value:.2f}" if value >= 0.1 else f"{value:.3f}"


def p_value(values: Sequence[float], base: Sequence[float]) -> Optional[float]:
    """How likely such ranks are if both were the same: Mann-Whitney's test, two-sided."""
    if min(len(values), len(base)) < LEAST_RUNS:
        return None
    return float(stats.mannwhitneyu(values, base, alternative="two-sided").pvalue)
