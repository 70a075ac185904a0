# SPDX-License-Identifier: GPL-2.0-or-later
"""One HTML file that needs no other, with the tables and figures; and the figures beside it."""

import base64
import io
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Callable, Dict, List, Optional, Sequence, Tuple

import jinja2
from livebench import density, plots, statistics, store, summary
from livebench.store import Store
from livemig.modes import MODES, RESTING
from matplotlib.figure import Figure
from PIL import Image
from scipy import stats

TEMPLATE = Path(__file__).resolve().parent / "report.html.j2"
# Sizes that no machine here has.
EXTRAPOLATED_GIB = (1024, 12 * 1024)
Run = Dict[str, Any]


@dataclass(frozen=True)
class Chapter:
    """Scenarios that are looked at together."""

    key: str
    title: str
    # Of the scenario as a run has it.
    wanted: Callable[[Dict[str, Any]], bool]
    log: bool = False


def _workload(*names: str) -> Callable[[Dict[str, Any]], bool]:
    def wanted(scenario: Dict[str, Any]) -> bool:
        return summary.plain(scenario) and scenario["workload"]["name"].startswith(names)

    return wanted


CHAPTERS = (
    Chapter("idle", "Idle guests", _workload("idle"), log=True),
    Chapter("compile", "A compilation", _workload("compile")),
    Chapter("freed", "Memory that was written and freed", _workload("freed"), log=True),
    Chapter("free", "A share of the memory is free", _workload("free-")),
    Chapter(
        "honest", "Few blocks of the largest order", _workload("pagecache", "hotcold", "fragmented")
    ),
    Chapter("working", "A program goes on", _workload("allocloop", "sysbench")),
    Chapter("link", "Bandwidth", lambda s: s["gbit"] > 0, log=True),
    Chapter("multifd", "Multifd", lambda s: s["multifd"] > 0),
    Chapter("evacuation", "Several guests at once", lambda s: s["guests"] > 1),
    Chapter("postcopy", "Postcopy", lambda s: s.get("postcopy") is not None, log=True),
    Chapter(
        "zeroing", "Guests that zero what they allocate", lambda s: s.get("init_on_alloc"), log=True
    ),
    Chapter("package", "Debian, without and with the guest package", _workload("bookworm")),
    Chapter("alternate", "Every second page is absent", _workload("alternate"), log=True),
    Chapter("swapped", "Memory that the host has swapped out", lambda s: s.get("swapped")),
)

# Shown for each mode of a scenario, if any of its runs has it: title, metric, digits.
COLUMNS: Tuple[Tuple[str, str, int], ...] = (
    ("downtime ms", "downtime_ms", 0),
    ("sent MiB", "sent_mib", 0),
    ("normal pages", "normal_pages", 0),
    ("zero pages", "zero_pages", 0),
    ("hinted MiB", "hinted_mib", 0),
    ("absent MiB", "absent_mib", 0),
    ("scan ms", "scan_ms", 2),
    ("of the total", "scan_share", 4),
    ("dirtied again", "redirtied_mib", 0),
    ("free MiB", "free_mib", 0),
    ("of that max. order", "free_max_order_mib", 0),
    ("ask to end ms", "ask_to_end_ms", 1),
    ("arm ms", "arm_ms", 2),
    ("max. hold us", "max_hold_us", 1),
    ("RSS source MiB", "rss_source_after_mib", 0),
    ("before", "rss_source_before_mib", 0),
    ("RSS dest. MiB", "rss_destination_after_mib", 0),
    ("before", "rss_destination_before_mib", 0),
    ("after the switch: ms", "postcopy_ms", 0),
    ("MiB", "postcopy_mib", 1),
    ("zero pages", "postcopy_zero_pages", 0),
    ("requests", "page_requests", 0),
    ("hinted, requested MiB", "requested_mib", 1),
    ("swapped out MiB", "swapped_out_mib", 0),
    ("swapped in MiB", "swapped_in_mib", 0),
    ("of what is not free", "swapped_in_share", 2),
    ("memfd dest. MiB", "memfd_destination_after_mib", 0),
    ("longest stall ms", "stall_ms", 0),
    ("before", "stall_before_ms", 0),
    ("longest touch ms", "slowest_touch_ms", 1),
    ("rate before", "before_rate", 0),
    ("during", "during_kept", 2),
    ("after", "after_kept", 2),
    ("10 s window", "window_kept", 2),
    ("p99 before us", "before_p99_us", 0),
    ("during", "during_p99_us", 0),
    ("after", "after_p99_us", 0),
    ("worst during", "during_worst_p99_us", 0),
    ("compile s", "compile_s", 1),
)


def number(value: Optional[float], digits: int = 0) -> str:
    """A figure of a table."""
    return "–" if value is None else f"{value:,.{digits}f}"


def extrapolations(runs: Sequence[Run]) -> List[Dict[str, Any]]:
    """A straight line through what was measured, and where it would go."""
    rows = []
    # A hold of the lock has a bound, and its longest is the worst of all noise: no line fits it.
    growing = {key: label for key, label in plots.SCALING.items() if key != "max_hold_us"}
    metrics = {"total_ms": "total, ms", **growing}
    for mode in "array", "legacy":
        for metric, label in metrics.items():
            gib, medians = plots.line(runs, mode, metric)
            if len(gib) < 3:
                continue
            fit = stats.linregress(gib, medians)
            rows.append(
                {
                    "mode": mode,
                    "label": label,
                    "slope": fit.slope,
                    "r2": fit.rvalue**2,
                    "values": [fit.intercept + fit.slope * size for size in EXTRAPOLATED_GIB],
                }
            )
    return rows


class Report:
    """Writes a report of runs, and of guests that rest, into their directory."""

    def __init__(self, runs: Store):
        self.directory = runs.directory
        self.runs = runs.runs()
        self.resting = density.store_of(runs.directory).runs()
        self.rows = summary.table(self.runs)

    def _figure(self, name: str, figure: Figure) -> Tuple[str, str]:
        """Write a figure; returns its name, and a URL that holds it."""
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", dpi=90)
        # Few colours make a small file.
        small = Image.open(buffer).convert("RGB").quantize(64)
        buffer = io.BytesIO()
        small.save(buffer, format="png", optimize=True)
        (self.directory / f"{name}.png").write_bytes(buffer.getvalue())
        return name, "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()

    def _chapter(self, chapter: Chapter) -> Optional[Dict[str, Any]]:
        own = [run for run in self.runs if chapter.wanted(run["scenario"])]
        names = summary.names(own)
        if not names:
            return None
        figures = []
        for what, unit in ("total", "ms"), ("sent", "MiB"):
            metric, label = f"{what}_{unit.lower()}", f"{what} {unit}"
            bars = plots.bars(own, names, metric, label, chapter.log)
            figures.append(self._figure(f"{what}-{chapter.key}", bars))
        for name in names:
            of_it = [run for run in own if run["scenario"]["name"] == name]
            if any(item.get("series") for run in of_it for item in run.get("workload", [])):
                figures.append(self._figure(f"throughput-{name}", plots.throughput(own, name)))
            elif chapter.key in ("idle", "compile", "freed"):
                figures.append(self._figure(f"pages-{name}", plots.pages(own, name)))
        return {
            "title": chapter.title,
            "scenarios": [self._scenario(name) for name in names],
            "figures": figures,
        }

    def _scenario(self, name: str) -> Dict[str, Any]:
        rows = [row for row in self.rows if row["scenario"] == name]
        seen = {metric for row in rows for metric in row["medians"]}
        columns = [column for column in COLUMNS if column[1] in seen]
        about = next(r["scenario"]["about"] for r in self.runs if r["scenario"]["name"] == name)
        return {
            "name": name,
            "about": about,
            "rows": rows,
            "columns": [title for title, _, _ in columns],
            "cells": {
                row["mode"]: [number(row["medians"].get(m), digits) for _, m, digits in columns]
                for row in rows
            },
        }

    def _density(self) -> List[Dict[str, Any]]:
        """The tables of guests that rest, each with its figure."""
        tables = density.table(self.resting)
        for item in tables:
            figure = plots.density(self.resting, item["scenario"])
            item["figure"] = self._figure("density-" + item["scenario"], figure)
        return tables

    def write(self) -> Path:
        """Write summary.json, report.html and the figures; returns the report."""
        for old in self.directory.glob("*.png"):
            old.unlink()
        store.write_json(self.directory / "summary.json", self.rows)
        targets = summary.targets(self.runs)
        store.write_json(self.directory / "targets.json", targets)
        environment = jinja2.Environment(
            loader=jinja2.FileSystemLoader(TEMPLATE.parent),
            autoescape=True,
            undefined=jinja2.StrictUndefined,
            trim_blocks=True,
            lstrip_blocks=True,
        )
        environment.filters["number"] = number
        environment.filters["ratio"] = statistics.ratio_text
        floors = [r for r in self.rows if r["mode"] == "array" and r["ratio_floor"] is not None]
        micro = self.directory / "micro.json"
        curves = {"scaling-total": plots.scaling_total, "scaling-cost": plots.scaling_cost}
        if len(plots.sizes(self.runs)) < 2:
            curves = {}
        every = [*self.runs, *self.resting]
        versions = {json.dumps(run["versions"], sort_keys=True) for run in every}
        html = environment.get_template(TEMPLATE.name).render(
            targets=targets,
            chapters=list(filter(None, map(self._chapter, CHAPTERS))),
            floor=self._figure("ratio-floor", plots.floor_ratios(floors)) if floors else None,
            scaling=[self._figure(name, draw(self.runs)) for name, draw in curves.items()],
            extrapolations=extrapolations(self.runs),
            extrapolated=EXTRAPOLATED_GIB,
            micro=json.loads(micro.read_text(encoding="utf-8")) if micro.exists() else None,
            density=self._density(),
            modes=[*MODES.values(), *(RESTING.values() if self.resting else ())],
            first=every[0],
            versions=[json.loads(text) for text in sorted(versions)],
            dates=(min(r["date"] for r in every), max(r["date"] for r in every)),
            count=len(every),
            loads=[run["host"]["load"][0] for run in every],
            wrong=[run for run in self.runs if run["verified"] is False],
        )
        path = self.directory / "report.html"
        store.write(path, html)
        return path


def make(runs: Store) -> Optional[Path]:
    """Write the report of a directory of runs; None if there are no runs."""
    report = Report(runs)
    return report.write() if report.runs or report.resting else None
