# SPDX-License-Identifier: GPL-2.0-or-later
"""The report's figures."""

from typing import Any, Dict, List, Sequence, Tuple

import numpy as np
from livebench import statistics, summary
from livebench.throughput import Point, rate
from livemig.modes import MODES, RESTING
from matplotlib.figure import Figure

Run = Dict[str, Any]

# Over how long a guest's work is averaged.
BIN_SECONDS = 0.5

# Tells the modes apart in all figures, also for the colour-blind (Okabe and Ito, then Tol).
_PALETTE = (
    *("#000000", "#e69f00", "#56b4e9", "#999999"),
    *("#cc79a7", "#f0e442", "#d55e00", "#009e73"),
    *("#0072b2", "#882255", "#999933", "#332288"),
    *("#44aa99", "#aa4499", "#661100", "#6699cc"),
)
COLOURS = {**dict(zip(MODES, _PALETTE)), **dict(zip(RESTING, _PALETTE))}


def _styled(xlabel: str, ylabel: str, title: str = "", height: float = 4) -> Tuple[Figure, Any]:
    figure = Figure(figsize=(9, height), layout="constrained")
    axes = figure.add_subplot()
    axes.grid(axis="both", alpha=0.3)
    axes.set_axisbelow(True)
    axes.set(xlabel=xlabel, ylabel=ylabel, title=title)
    return figure, axes


def bars(runs: Sequence[Run], names: Sequence[str], metric: str, label: str, log: bool) -> Figure:
    """Medians of a metric, with quartiles, by scenario and mode."""
    figure, axes = _styled("", label, height=4.2)
    modes = [mode for mode in MODES if any(mode in summary.modes_of(runs, n) for n in names)]
    width = 0.85 / max(len(modes), 1)
    for number, mode in enumerate(modes):
        measured = [summary.values(runs, name, mode, metric) for name in names]
        right = (number + 0.5) * width
        places = [place - 0.425 + right for place, values in enumerate(measured) if values]
        spreads = [statistics.Spread.from_values(values) for values in measured if values]
        heights = [spread.median for spread in spreads]
        errors = [
            [spread.median - spread.first_quartile for spread in spreads],
            [spread.third_quartile - spread.median for spread in spreads],
        ]
        axes.bar(places, heights, width, yerr=errors, label=mode, color=COLOURS[mode], capsize=2)
    if log:
        axes.set_yscale("log")
    axes.set_xticks(range(len(names)), names, rotation=20 if len(names) > 4 else 0)
    axes.legend(ncols=4, fontsize="small")
    return figure


def _typical(runs: Sequence[Run], name: str, mode: str) -> Run:
    """The run whose total time is nearest to the median."""
    own = summary.chosen(runs, name, mode)
    middle = statistics.Spread.from_values([run["metrics"]["total_ms"] for run in own]).median
    return min(own, key=lambda run: abs(float(run["metrics"]["total_ms"]) - middle))


def pages(runs: Sequence[Run], name: str) -> Figure:
    """Pages sent over time, in the typical run of each mode; a dot where a round begins."""
    figure, axes = _styled("ms since the migration began", "pages sent, thousands", name)
    for mode in summary.modes_of(runs, name):
        samples = _typical(runs, name, mode)["samples"][0]
        times = [0.0] + [sample["ms"] for sample in samples]
        sent = [0.0] + [(sample["normal"] + sample["zero"]) / 1000 for sample in samples]
        axes.plot(times, sent, label=mode, color=COLOURS[mode])
        rounds = [0] + [sample["round"] for sample in samples]
        new = [i for i in range(1, len(rounds)) if rounds[i] != rounds[i - 1]]
        axes.plot([times[i] for i in new], [sent[i] for i in new], ".", color=COLOURS[mode])
    axes.legend(fontsize="small")
    return figure


def throughput(runs: Sequence[Run], name: str) -> Figure:
    """What a program in the guest did, compared with before, in the typical run of each mode."""
    xlabel = "s since the migration began (dotted: its end)"
    figure, axes = _styled(xlabel, "% of the rate before", name)
    for mode in summary.modes_of(runs, name):
        run = _typical(runs, name, mode)
        result = (run.get("workload") or [{}])[0]
        before = result.get("before", {}).get("rate")
        series = result.get("series", [])
        if not before or len(series) < 3:
            continue
        points = [Point(**item) for item in series]
        edges = np.arange(points[0].when, points[-1].when, BIN_SECONDS)
        rates = [(end, rate(points, start, end)) for start, end in zip(edges, edges[1:])]
        shown = [(end, 100 * value / before) for end, value in rates if value is not None]
        if not shown:
            continue
        axes.step(*zip(*shown), where="pre", label=mode, color=COLOURS[mode], linewidth=1)
        end = run["metrics"]["total_ms"] / 1000
        axes.axvline(end, color=COLOURS[mode], linestyle=":", linewidth=1)
    axes.axvline(0, color="grey", linewidth=1)
    axes.set_ylim(bottom=0, top=200)
    axes.legend(fontsize="small", ncols=3)
    return figure


def sizes(runs: Sequence[Run]) -> Dict[float, str]:
    """The idle guests of all sizes: GiB, and the name of the scenario."""
    found = {
        run["scenario"]["mem_mib"] / 1024: run["scenario"]["name"]
        for run in runs
        if summary.plain(run["scenario"]) and run["scenario"]["workload"]["name"] == "idle"
    }
    return dict(sorted(found.items()))


def line(runs: Sequence[Run], mode: str, metric: str) -> Tuple[List[float], List[float]]:
    """Medians of a metric of the idle guests over their size in GiB."""
    points = [
        (gib, statistics.Spread.from_values(measured).median)
        for gib, name in sizes(runs).items()
        if (measured := summary.values(runs, name, mode, metric))
    ]
    return [gib for gib, _ in points], [value for _, value in points]


def scaling_total(runs: Sequence[Run]) -> Figure:
    """Total time over the size of an idle guest."""
    figure, axes = _styled("GiB of an idle guest", "total ms")
    for mode in MODES:
        places, medians = line(runs, mode, "total_ms")
        if len(places) > 1:
            axes.plot(places, medians, "o-", label=mode, color=COLOURS[mode])
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.legend(fontsize="small")
    return figure


SCALING = {
    "ask_to_end_ms": "ask to end, ms",
    "arm_ms": "arming, ms",
    "max_hold_us": "longest hold of a zone's lock, us",
    "qemu_hint_mib": "memory for hints in QEMU, MiB",
}


def scaling_cost(runs: Sequence[Run]) -> Figure:
    """What arrays of hints cost, over the size of an idle guest."""
    figure = Figure(figsize=(9, 6), layout="constrained")
    for axes, (metric, label) in zip(np.ravel(figure.subplots(2, 2)), SCALING.items()):
        axes.plot(*line(runs, "array", metric), "o-", color=COLOURS["array"])
        axes.grid(alpha=0.3)
        axes.set_ylim(bottom=0)
        axes.set(xlabel="GiB of an idle guest", ylabel=label)
    return figure


def floor_ratios(rows: Sequence[Dict[str, Any]]) -> Figure:
    """How near to the floor each scenario comes, of the rows of arrays that have a floor."""
    label = "array / floor, medians of total time"
    figure, axes = _styled(label, "", height=1 + 0.3 * len(rows))
    names, ratios = zip(*((row["scenario"], row["ratio_floor"]) for row in rows))
    axes.barh(names, ratios, color=COLOURS["array"])
    axes.axvline(1, color=COLOURS["floor"])
    axes.invert_yaxis()
    return figure


def density(runs: Sequence[Run], name: str) -> Figure:
    """What guests that rest have of the host's memory over time, the first run of each mode."""
    figure, axes = _styled("s", "MiB of the host", name)
    for mode in RESTING:
        for run in summary.chosen(runs, name, mode)[:1]:
            points = [(item["s"], item.get("peak_mib", item["mib"])) for item in run["series"]]
            axes.plot(*zip(*points), label=mode, color=COLOURS[mode])
    axes.set_ylim(bottom=0)
    axes.legend(fontsize="small")
    return figure
