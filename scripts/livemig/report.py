# SPDX-License-Identifier: GPL-2.0-or-later
"""Turns runs into tables."""

from statistics import median
from typing import Any, Callable, Dict, List, Mapping, Optional, Sequence, Tuple

from livemig.modes import DEMO, MODES

Run = Mapping[str, Any]
MIB = 1024 * 1024


def middle(runs: Sequence[Run], field: str) -> Optional[float]:
    """The median of a field over the runs that have it."""
    values = [run[field] for run in runs if run[field] is not None]
    return median(values) if values else None


def with_spread(runs: Sequence[Run], field: str) -> str:
    """The median of a field and, of several runs, its range."""
    values = [run[field] for run in runs if run[field] is not None]
    if not values:
        return "-"
    text = f"{median(values):.0f}"
    return text if len(values) == 1 else f"{text} ({min(values):.0f}-{max(values):.0f})"


def number(runs: Sequence[Run], field: str, scale: float = 1, digits: int = 0) -> str:
    """The median of a field as text."""
    value = middle(runs, field)
    return "-" if value is None else f"{value / scale:.{digits}f}"


def ratio(runs: Sequence[Run], base: Sequence[Run], field: str = "total_ms") -> Optional[float]:
    """The median of a field compared with that of other runs."""
    top, bottom = middle(runs, field), middle(base, field)
    return top / bottom if top is not None and bottom else None


def as_ratio(value: Optional[float]) -> str:
    """A ratio as text."""
    if value is None:
        return "-"
    return f"{value:.2f}" if value >= 0.1 else f"{value:.3f}"


def hinted_share(runs: Sequence[Run]) -> str:
    """How much of what the guest could hint was hinted, at the median."""
    shares = [
        run["hinted_bytes"] / run["guest_free_reported_bytes"]
        for run in runs
        if run["hinted_bytes"] and run["guest_free_reported_bytes"]
    ]
    return f"{100 * median(shares):.1f}" if shares else "-"


def all_verified(runs: Sequence[Run]) -> str:
    """Whether the guest's memory was right at the destination, in every run."""
    return "yes" if all(run["verified"] for run in runs) else "NO"


Column = Tuple[str, Callable[[Sequence[Run], Sequence[Run]], str]]

COLUMNS: List[Column] = [
    ("total ms", lambda runs, base: with_spread(runs, "total_ms")),
    ("ratio", lambda runs, base: as_ratio(ratio(runs, base))),
    ("downtime ms", lambda runs, base: with_spread(runs, "downtime_ms")),
    ("sent MiB", lambda runs, base: number(runs, "sent_bytes", MIB)),
    ("normal pages", lambda runs, base: number(runs, "normal_pages")),
    ("zero pages", lambda runs, base: number(runs, "zero_pages")),
    ("hinted MiB", lambda runs, base: number(runs, "hinted_bytes", MIB)),
    ("% of free", lambda runs, base: hinted_share(runs)),
    ("messages", lambda runs, base: number(runs, "messages")),
    ("first ms", lambda runs, base: number(runs, "ask_to_first_ms", digits=1)),
    ("end ms", lambda runs, base: number(runs, "ask_to_end_ms", digits=1)),
    ("verified", lambda runs, base: all_verified(runs)),
]


def by_mode(runs: Sequence[Run], scenario: str) -> Dict[str, List[Run]]:
    """The runs of one scenario, in the order of the modes."""
    found = {
        name: [run for run in runs if run["scenario"] == scenario and run["mode"] == name]
        for name in DEMO
    }
    return {name: group for name, group in found.items() if group}


def table(runs: Sequence[Run], scenario: str) -> str:
    """The runs of one scenario, one line per mode; ratios are to no hints of the same build."""
    groups = by_mode(runs, scenario)
    rows = [["mode"] + [name for name, _ in COLUMNS]]
    for name, group in groups.items():
        base = groups.get(MODES[name].baseline, [])
        rows.append([name] + [text(group, base) for _, text in COLUMNS])
    widths = [max(map(len, column)) for column in zip(*rows)]
    return "\n".join(
        row[0].ljust(widths[0])
        + "".join(f"  {cell.rjust(width)}" for cell, width in zip(row[1:], widths[1:]))
        for row in rows
    )


# What this project claims, as ratios of total times.
COMPARISONS = (
    ("array-absent", "stock-hints", "array hints / stock per-block hints"),
    ("none", "legacy", "no hints / no hints of the unpatched build"),
)


def comparisons(runs: Sequence[Run], scenario: str) -> List[str]:
    """Lines that compare the builds, as far as both were run."""
    groups = by_mode(runs, scenario)
    return [
        f"{text}: {as_ratio(ratio(groups[one], groups[other]))}"
        for one, other, text in COMPARISONS
        if one in groups and other in groups
    ]
