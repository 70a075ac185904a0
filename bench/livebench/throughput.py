# SPDX-License-Identifier: GPL-2.0-or-later
"""How fast a program in the guest got on before, during and after the guest was moved."""

from dataclasses import asdict, dataclass
from statistics import median
from typing import Any, Dict, Optional, Sequence

# How much is looked at before and after the migration. The window begins with the migration and is
# the same for all modes, however long each takes: what a guest's user lost in it can be compared.
BEFORE_SECONDS = 5.0
AFTER_SECONDS = 5.0
WINDOW_SECONDS = 10.0


@dataclass(frozen=True)
class Point:
    """What was done since the point before it. The times are the host's."""

    when: float
    ops: float
    p99_us: Optional[float] = None


@dataclass(frozen=True)
class Span:
    """When a migration began and ended, and when it was told to switch to postcopy, if it was."""

    start: float
    end: float
    switch: Optional[float] = None


def rate(points: Sequence[Point], start: float, end: float) -> Optional[float]:
    """Operations per second, from the last point before a time to the last one before another."""
    before = [point for point in points if point.when <= start]
    inside = [point for point in points if start < point.when <= end]
    if not before or not inside:
        return None
    seconds = inside[-1].when - before[-1].when
    return sum(point.ops for point in inside) / seconds if seconds > 0 else None


def latencies(points: Sequence[Point], start: float, end: float) -> Dict[str, Optional[float]]:
    """The 99th percentiles that were reported in a time: the median and the worst."""
    told = [p.p99_us for p in points if start < p.when <= end and p.p99_us is not None]
    return {
        "p99_us": median(told) if told else None,
        "worst_p99_us": max(told) if told else None,
    }


def longest_gap(times: Sequence[float], start: float, end: float) -> Optional[float]:
    """The longest time between two neighbours, of those that touch a time; they are in order."""
    gaps = [after - before for before, after in zip(times, times[1:])]
    touching = [gap for gap, at in zip(gaps, times) if at <= end and at + gap >= start]
    return max(touching, default=None)


def _first_after(points: Sequence[Point], when: float) -> float:
    """When the first point after a time came: it says what was going on at that time."""
    return min((point.when for point in points if point.when > when), default=when)


def judge(points: Sequence[Point], span: Span) -> Dict[str, Any]:
    """The rates and latencies of each phase, and the series itself, from the migration's start."""
    phases = {
        "before": (span.start - BEFORE_SECONDS, span.start),
        "during": (span.start, _first_after(points, span.end)),
        "after": (_first_after(points, span.end), span.end + AFTER_SECONDS),
        "window": (span.start, span.start + WINDOW_SECONDS),
    }
    result: Dict[str, Any] = {
        name: {"rate": rate(points, *ends), **latencies(points, *ends)}
        for name, ends in phases.items()
    }
    before = result["before"]["rate"]
    for name in ("during", "after", "window"):
        value = result[name]["rate"]
        result[name]["kept"] = value / before if value is not None and before else None
    result["series"] = [
        {**asdict(point), "when": round(point.when - span.start, 3)}
        for point in points
        if point.when > span.start - 2 * BEFORE_SECONDS
    ]
    return result
