# SPDX-License-Identifier: GPL-2.0-or-later
"""What the runs say: one row for each scenario and mode, and which targets are reached."""

from typing import Any, Dict, Iterable, List, Optional, Sequence

from livebench import statistics
from livebench.scenarios import SCENARIOS, Target
from livemig.modes import MODES

Run = Dict[str, Any]
# Modes that the others are compared with, by the names that their ratios have.
BASES = {"legacy": "legacy", "stock": "stock-hints", "floor": "floor"}


def plain(scenario: Dict[str, Any]) -> bool:
    """Whether one guest is moved in the usual way, of a scenario as a run has it."""
    # Runs that are older than some of these do not have them.
    special = (scenario.get(name) for name in ("gbit", "multifd", "init_on_alloc", "swapped"))
    return scenario["guests"] == 1 and scenario.get("postcopy") is None and not any(special)


def chosen(runs: Sequence[Run], scenario: str, mode: str) -> List[Run]:
    """The runs of a scenario in a mode."""
    return [r for r in runs if (r["scenario"]["name"], r["mode"]["name"]) == (scenario, mode)]


def values(runs: Sequence[Run], scenario: str, mode: str, metric: str) -> List[float]:
    """A metric of all runs of a mode."""
    own = chosen(runs, scenario, mode)
    return [run["metrics"][metric] for run in own if metric in run["metrics"]]


def names(runs: Sequence[Run], declared: Iterable[str] = SCENARIOS) -> List[str]:
    """The scenarios that were run, in the order in which they are declared; others last."""
    found = {run["scenario"]["name"] for run in runs}
    known = [name for name in declared if name in found]
    return known + sorted(found - set(known))


def modes_of(runs: Sequence[Run], scenario: str) -> List[str]:
    """The modes in which a scenario was run."""
    found = {run["mode"]["name"] for run in runs if run["scenario"]["name"] == scenario}
    return [name for name in MODES if name in found]


def _rounded(value: Optional[float], digits: int = 4) -> Optional[float]:
    return None if value is None else round(value, digits)


def row(runs: Sequence[Run], scenario: str, mode: str) -> Dict[str, Any]:
    """The row of a scenario and a mode."""
    own = chosen(runs, scenario, mode)
    totals = values(own, scenario, mode, "total_ms")
    spread = statistics.Spread.from_values(totals)
    bases = {name: values(runs, scenario, base, "total_ms") for name, base in BASES.items()}
    result: Dict[str, Any] = {
        "scenario": scenario,
        "mode": mode,
        "runs": spread.runs,
        "median_ms": spread.median,
    }
    for name, base in bases.items():
        result[f"ratio_{name}"] = _rounded(statistics.ratio(totals, base))
    for name, base in bases.items():
        other = mode != BASES[name]
        result[f"p_{name}"] = _rounded(statistics.p_value(totals, base), 6) if other else None
    result["quartiles_ms"] = [spread.first_quartile, spread.third_quartile]
    result["range_ms"] = [spread.low, spread.high]
    result["verified"] = None if own[0]["verified"] is None else all(run["verified"] for run in own)
    result["medians"] = {
        metric: _rounded(statistics.Spread.from_values(values(own, scenario, mode, metric)).median)
        for metric in sorted({metric for run in own for metric in run["metrics"]})
    }
    return result


def table(runs: Sequence[Run]) -> List[Dict[str, Any]]:
    """All rows."""
    return [row(runs, name, mode) for name in names(runs) for mode in modes_of(runs, name)]


def compare(
    runs: Sequence[Run], scenarios: Sequence[str], modes: Sequence[str], metric: str
) -> Dict[str, List[List[float]]]:
    """A metric in two modes, by scenario, where there are runs of both; then in all together.

    Together says something only of scenarios in which the metric should be the same.
    """
    found = {name: [values(runs, name, mode, metric) for mode in modes] for name in scenarios}
    found = {name: sides for name, sides in found.items() if all(sides)}
    if len(found) > 1:
        found["together"] = [sum(side, []) for side in zip(*found.values())]
    return found


def judge(runs: Sequence[Run], scenario: str, target: Target) -> Optional[Dict[str, Any]]:
    """Whether a target is reached; None if it was not measured."""
    measured = values(runs, scenario, target.mode, target.metric)
    # Without another mode, the metric itself counts.
    base = [1.0] * len(measured)
    if target.against:
        base = values(runs, scenario, target.against, target.metric)
    value = statistics.ratio(measured, base)
    if value is None:
        return None
    return {
        "scenario": scenario,
        "target": target.text,
        "value": _rounded(value),
        "reached": target.reached(value),
        "runs": min(len(measured), len(base)),
    }


def targets(runs: Sequence[Run]) -> List[Dict[str, Any]]:
    """All targets of the scenarios that were run at their declared size."""
    declared = [name for name in names(runs) if name in SCENARIOS]
    found = [judge(runs, name, target) for name in declared for target in SCENARIOS[name].targets]
    return [item for item in found if item]
