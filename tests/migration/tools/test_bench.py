# SPDX-License-Identifier: GPL-2.0-or-later
"""The benchmarks say what was measured: their statistics, their plan, their report."""

import json
import os
import re
from dataclasses import asdict
from pathlib import Path
from typing import Any, Dict, List, Optional, Tuple
from unittest import mock

import pytest

from livebench import floor, plan, postcopy, report, statistics, summary, throughput
from livebench.canned import IDLE, Runner, bench, canned
from livebench.scenarios import SCENARIOS, Target, matching
from livebench.store import Store, exported
from livemig import host, paths
from livemig.checks import in_check
from livemig.errors import LivemigError
from livemig.migration import MigrationResult
from livemig.modes import MODES

ISSUE_FIELDS = "scenario mode runs median_ms ratio_legacy ratio_stock ratio_floor".split()


def steps(runs: int = 2, modes: Tuple[str, ...] = ("legacy", "array", "floor")) -> List[plan.Step]:
    """A small plan."""
    return plan.order([plan.Work(IDLE, modes, runs), plan.Work(SCENARIOS["idle-1g"], modes, 1)])


@pytest.fixture
def store(tmp_path: Path) -> Store:
    """A store without a run."""
    return Store(tmp_path)


def save(store: Store, scenario: str, mode: str, *totals: float) -> None:
    """Put runs into a store that took so long."""
    for index, total in enumerate(totals, 1):
        run = canned(SCENARIOS[scenario], MODES[mode], index, total)
        store.save(SCENARIOS[scenario], MODES[mode], index, run)


def files(store: Store) -> List[Path]:
    """What a store has on the disk."""
    return list(store.directory.rglob("*.*"))


def test_statistics_are_right() -> None:
    """Median, quartiles and the rank test give the values of the textbook."""
    spread = statistics.Spread.from_values([5, 1, 4, 2, 3])
    assert (spread.low, spread.first_quartile, spread.median) == (1, 2, 3)
    assert (spread.third_quartile, spread.high, spread.runs) == (4, 5, 5)
    # Of the 70 ways to rank 4 + 4 values, two are as extreme as this one.
    assert statistics.p_value([1, 2, 3, 4], [5, 6, 7, 8]) == pytest.approx(2 / 70)
    assert statistics.p_value([1, 2, 3, 4], [1, 2, 3, 4]) == pytest.approx(1)
    assert statistics.p_value([1, 2, 3], [5, 6, 7]) is None
    assert statistics.ratio([1, 2, 9], [4, 4, 5]) == 0.5
    assert statistics.ratio([], [1]) is None


def test_matrix_is_sound() -> None:
    """Every scenario has modes that exist, its targets are about them, and no two share a name."""
    for name, scenario in SCENARIOS.items():
        assert name == scenario.name
        assert set(scenario.quick) <= set(scenario.modes) <= set(MODES)
        for target in scenario.targets:
            assert {target.mode, target.against or target.mode} <= set(scenario.modes), name
    assert len(SCENARIOS) == len({str(scenario) for scenario in SCENARIOS.values()})
    assert {s.name for s in matching(["idle-1g"])} == {"idle-1g"}
    assert {s.name for s in matching(["*-2g-init_on_alloc"])} == {"idle-2g-init_on_alloc"}
    assert {s.name for s in matching(["freed-5*"])} >= {"freed-50-8g"}
    with pytest.raises(LivemigError, match="there is no scenario no-such-scenario"):
        matching(["no-such-scenario"])


def test_modes_are_interleaved() -> None:
    """All modes run once before any runs again, and no mode is always the first."""
    turn = [(s.index, s.mode.name) for s in plan.order([plan.Work(IDLE, ("legacy", "array"), 3)])]
    assert [index for index, _ in turn] == [1, 1, 2, 2, 3, 3]
    assert [mode for _, mode in turn] == "legacy array array legacy legacy array".split()


def test_resume(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was run is not run again, unless the build has changed or it is asked for."""
    runner = Runner()
    assert plan.carry_out(steps(1), store, False, runner) == 0
    assert len(runner.calls) == len(steps(1))
    plan.carry_out(steps(2), store, False, runner)
    assert len(runner.calls) == len(steps(2))
    assert len(set(runner.calls)) == len(runner.calls)
    plan.carry_out(steps(2), store, True, runner)
    assert len(runner.calls) == 2 * len(steps(2))
    monkeypatch.setattr(plan.engine.hostinfo, "stamp", lambda build: "new" * (build == "qemu-ours"))
    plan.carry_out(steps(2, ("array",)), store, False, runner)
    assert len(runner.calls) == 2 * len(steps(2)) + len(steps(2, ("array",)))


def test_interrupted_run_leaves_nothing(store: Store) -> None:
    """Ctrl-C leaves the runs that were complete, no half file, and the rest for the next time."""

    def interrupt(call: int) -> None:
        if call == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        plan.carry_out(steps(), store, False, Runner(interrupt))
    assert len(files(store)) == 2
    with pytest.raises(TypeError):
        store.save(IDLE, MODES["array"], 9, {"not": {"JSON"}})
    assert len(files(store)) == 2
    again = Runner()
    plan.carry_out(steps(), store, False, again)
    assert len(again.calls) == len(steps()) - 2
    assert len(files(store)) == len(steps())


def test_half_file_of_another_is_no_run(store: Store) -> None:
    """A file that is cut short, or is something else, counts as a run that was not made."""
    plan.carry_out(steps(1), store, False, Runner())
    path = store.path(IDLE, MODES["array"], 1)
    path.write_text(path.read_text()[:100])
    store.path(IDLE, MODES["floor"], 1).write_text("[]")
    assert len(store.runs()) == len(steps(1)) - 2
    again = Runner()
    plan.carry_out(steps(1), store, False, again)
    assert {mode for _, mode, _ in again.calls} == {"array", "floor"}


def test_failed_run_is_told(store: Store, capsys: pytest.CaptureFixture[str]) -> None:
    """A run that fails is one line, the others are made, and it is tried the next time."""

    def fail(call: int) -> None:
        if call == 2:
            raise LivemigError("the guest did not boot")

    assert plan.carry_out(steps(1), store, False, Runner(fail)) == 1
    assert len(store.runs()) == len(steps(1)) - 1
    errors = capsys.readouterr().err
    assert errors.count("\n") == 1 and "the guest did not boot" in errors
    again = Runner()
    assert plan.carry_out(steps(1), store, False, again) == 0
    assert len(again.calls) == 1


def test_summary(store: Store) -> None:
    """A row has what was agreed, with ratios of medians; targets are judged by them."""
    save(store, IDLE.name, "legacy", 100, 200, 300)
    save(store, IDLE.name, "array", 20, 30, 90)
    save(store, IDLE.name, "floor", 10, 20, 15)
    rows = summary.table(store.runs())
    assert all(list(row)[: len(ISSUE_FIELDS)] == ISSUE_FIELDS for row in rows)
    row = next(row for row in rows if row["mode"] == "array")
    assert [row[name] for name in ISSUE_FIELDS] == ["idle-8g", "array", 3, 30, 0.15, None, 2]
    assert row["medians"]["ask_to_end_ms"] == 9
    found = {item["target"]: item["reached"] for item in summary.targets(store.runs())}
    # None of the runs is of the mode that the third target is against.
    assert found == {
        "array: total_ms ≤ 0.28 × legacy": True,
        "array: total_ms ≤ 1.15 × floor": False,
    }
    assert Target(0.95, "legacy", at_least=True).reached(0.96)


def test_report_is_one_file(store: Store, tmp_path: Path) -> None:
    """The report renders from runs of all kinds, holds its figures, and refers to nothing else."""
    for name in ("idle-1g", "idle-8g", "idle-64g", "freed-75-8g", "allocloop-4g", "idle-4g"):
        for mode in ("legacy", "stock-hints", "array", "floor"):
            save(store, name, mode, *(150.0 + index * len(mode) for index in range(1, 5)))
    row = {"what": "walk", "value": 1.5, "unit": "ns", "digits": 1}
    target = {"target": "fast", "value": 1.5, "reached": True, "runs": 1}
    (tmp_path / "micro.json").write_text(json.dumps({"rows": [row], "targets": [target]}))
    page = report.make(store)
    assert page
    text = page.read_text(encoding="utf-8")
    sources = re.findall(r'(?:src|href)="([^"]{0,30})', text)
    assert sources and all(source.startswith("data:image/png;base64,") for source in sources)
    assert "12 TiB (extrapolated)" in text and "not reached" in text
    names = {path.stem for path in tmp_path.glob("*.png")}
    assert {"total-idle", "ratio-floor", "scaling-cost", "pages-idle-8g"} <= names
    assert "throughput-allocloop-4g" in names
    assert json.loads((tmp_path / "summary.json").read_text())[0]["scenario"] == "idle-8g"


def test_throughput() -> None:
    """Rates are reported from point to point, so that no part of an interval counts for another."""
    points = [throughput.Point(t / 2, 10 if t <= 20 else 5, 100.0 + t) for t in range(41)]
    span = throughput.Span(10.1, 12.0)
    result = throughput.judge(points, span)
    assert result["before"]["rate"] == pytest.approx(20)
    assert result["during"]["kept"] == pytest.approx(0.5)
    assert result["window"]["rate"] == pytest.approx(10)
    assert result["during"]["worst_p99_us"] == 125
    assert throughput.rate(points, 50, 60) is None


def test_longest_gap() -> None:
    """A silence counts in its whole length if any part of it lies in the time that is asked for."""
    times = [0.0, 1.0, 1.1, 3.1, 3.2, 9.2]
    assert throughput.longest_gap(times, 1.05, 3.15) == pytest.approx(2)
    assert throughput.longest_gap(times, 0.5, 1.05) == pytest.approx(1)
    assert throughput.longest_gap(times, 3.15, 8) == pytest.approx(6)
    assert throughput.longest_gap([1.0], 0, 2) is None


def test_switch_is_due_after_its_round() -> None:
    """A guest is switched to postcopy when the hints are there, or when a whole round was sent."""

    def due(after_round: int, rounds: int, hints: Optional[Dict[str, str]]) -> bool:
        info: Dict[str, Any] = {"status": "active", "ram": {"dirty-sync-count": rounds}}
        if hints:
            info["free-page-hint"] = hints
        return postcopy.due(after_round, MigrationResult.from_qmp(info))

    ended = {"state": "ended"}
    off = {"state": "idle", "reason": "disabled"}
    assert due(0, 1, None) and due(0, 1, ended) and due(0, 1, off)
    assert not due(0, 0, None) and not due(0, 1, {"state": "asked"})
    assert due(1, 2, None) and due(1, 2, ended) and due(1, 2, off)
    assert not due(1, 1, None) and not due(1, 1, ended) and not due(1, 1, off)


def test_a_switch_that_came_too_late_is_no_result() -> None:
    """A migration that was over before it could be switched to postcopy is not reported as one."""

    ram = {"postcopy-bytes": 4096, "duplicate": 5, "postcopy-requests": 2}

    def event(name: str, seconds: int, **data: str) -> Dict[str, Any]:
        return {"event": name, "data": data, "timestamp": {"seconds": seconds, "microseconds": 0}}

    def outcome(*statuses: str) -> Dict[str, float]:
        # Guests whose migration has completed: all events have come already.
        source, there = mock.Mock(), mock.Mock(events=[event("RESUME", 1)])
        source.events = [event("STOP", 1), *(event("MIGRATION", 2, status=s) for s in statuses)]
        source.qmp.return_value = {"ram": ram}
        return postcopy.outcome(source, there, MigrationResult.from_qmp({"ram": {"duplicate": 3}}))

    found = outcome("postcopy-active", "completed")
    assert (found["postcopy_ms"], found["postcopy_zero_pages"]) == (1000, 2)
    with pytest.raises(LivemigError, match="before the switch"):
        outcome("completed")


def test_special_rows_stay_out_of_the_others() -> None:
    """Guests that are switched to postcopy, or zero memory, are no points of the plain curves."""
    plain = [name for name, one in SCENARIOS.items() if summary.plain(asdict(one))]
    assert "idle-8g" in plain and "freed-75-8g" in plain
    for name in plain:
        assert not name.startswith("postcopy-") and not name.endswith("-init_on_alloc")
    # A run that was recorded before there were any.
    assert summary.plain({"guests": 1, "gbit": 0, "multifd": 0})
    # The files that the first stage exported are still read.
    for file in (paths.REPO / "bench" / "results").glob("*.json.xz"):
        assert exported(file)


def test_floor_joins_runs() -> None:
    """Runs of free pages are joined to as few as there can be, whatever their order."""
    runs = {"pc.ram": [(8, 4), (0, 4), (4, 4), (20, 4), (22, 1)]}
    assert floor.join(runs) == {"pc.ram": [(0, 12), (20, 4)]}


def test_compare(store: Store, tmp_path: Path) -> None:
    """Two modes are compared in each scenario with runs of both, and over all of these together."""
    save(store, "idle-8g", "array", 1, 2, 3)
    save(store, "idle-8g", "legacy", 50, 60, 70)
    save(store, "idle-1g", "array", 4)
    save(store, "idle-1g", "legacy", 80)
    save(store, "idle-2g", "array", 1000)
    here = bench("compare", "array", "legacy", "--scenario", "idle*", "--out", str(tmp_path))
    assert here.stdout.splitlines() == [
        "idle-8g: array 3 runs, 2 (1.5-2.5); legacy 3 runs, 60 (55-65); 0.033",
        "idle-1g: array 1 runs, 4 (4-4); legacy 1 runs, 80 (80-80); 0.050",
        "together: array 4 runs, 2.5 (1.75-3.25); legacy 4 runs, 65 (57.5-72.5); 0.038, p = 0.029",
    ]
    assert bench("export", str(tmp_path / "to"), "--out", str(tmp_path)).returncode == 0
    packed = str(tmp_path / "to" / "runs.json.xz")
    assert bench("compare", "array", "legacy", "--from", packed).stdout == here.stdout
    twice = bench("compare", "array", "legacy", "--scenario", "idle-1g", "--from", packed, packed)
    assert twice.stdout == "idle-1g: array 2 runs, 4 (4-4); legacy 2 runs, 80 (80-80); 0.050\n"


def test_errors_are_one_line(tmp_path: Path) -> None:
    """What a user gets wrong is reported in one line, without a traceback."""
    (tmp_path / "no-runs").write_text("text")
    for arguments, what in (
        ("run --scenario no-such", "no scenario no-such"),
        (f"report --out {tmp_path}", f"no runs in {tmp_path}"),
        (f"compare array floor --out {tmp_path}", "no runs of array and floor"),
        (f"compare array floor --from {tmp_path}/no-such", "No such file"),
        (f"compare array floor --from {tmp_path}/no-runs", "is no file of runs"),
        # The guest could not walk such a set of pages.
        ("arming --mem 768M", "a power of two is wanted"),
    ):
        done = bench(*arguments.split())
        assert done.returncode and done.stderr.startswith("bench: error: ")
        assert what in done.stderr and done.stderr.count("\n") == 1


@pytest.mark.parametrize("option", ["--runs 0", "--vcpus 0", "--gbit 0", "--mem 0", "--mem 511M"])
def test_too_little(option: str) -> None:
    """No run, no CPU and hardly any memory are no default, and refused at once."""
    done = bench("run", "--scenario", "no-such", *option.split())
    assert done.returncode == 2 and f"{option.split()[0]}: at least " in done.stderr


def test_one_run(tmp_path: Path) -> None:
    """A small guest is booted, moved, checked and reported, and not a second time."""
    command = f"run --scenario idle-8g --mode array --mem 512M --vcpus 1 --runs 1 --out {tmp_path}"
    done = bench(*command.split())
    assert done.returncode == 0, done.stderr
    (run,) = Store(tmp_path).runs()
    assert run["verified"] and run["metrics"]["hint_blocks"] > 0 and run["samples"][0]
    # Another clock would be another machine. Under KVM, guests that can have its own.
    clocks = {fact["clocksource"] for fact in run["guest_before"] + run["guest_after"]}
    assert clocks in ({"tsc"}, {"kvm-clock"})
    assert str(Path.home()) not in json.dumps(run)
    assert "1 of 1 runs are there already" in bench(*command.split()).stdout


EARLY = "postcopy-freed-8g-round0"
# Precopy of less than 100 ms ends after round 1, as QEMU knows no bandwidth until then. What is in
# use of a small guest, 64 MiB and more, takes longer than that on this link.
SLOW = ("--gbit", "2")


@pytest.mark.parametrize("scenario", in_check((EARLY, "postcopy-idle-4g-memfd"), long=[EARLY]))
def test_one_postcopy_run(one_run: Any, scenario: str) -> None:
    """A guest is switched to postcopy after its round; what came then, and its stall, is shown."""
    early = scenario == EARLY
    run = one_run(scenario, "array", *(() if early else SLOW))
    values = run["metrics"]
    # The premises: it was switched, after that round, with hints, while its program ran.
    raw = run["migration"][0]
    assert raw["ram"]["postcopy-bytes"] == pytest.approx(values["postcopy_mib"] * 2**20, abs=1000)
    assert values["postcopy_mib"] > 0 and values["hinted_mib"] > 0
    # Nearly nothing was sent before the switch after round 0, and most after round 1.
    share = values["postcopy_mib"] / values["sent_mib"]
    assert share > 0.9 if early else share < 0.7
    for metric in "stopped_ms", "postcopy_ms", "stall_ms", "stall_before_ms", "slowest_touch_ms":
        assert values[metric] > 0
    assert values["postcopy_ms"] < values["total_ms"]
    assert 0 <= values["postcopy_zero_pages"] <= values["zero_pages"]
    memfd = values.get("memfd_destination_after_mib")
    assert memfd is None if early else 64 < memfd <= 512


def test_one_run_that_zeroes(one_run: Any) -> None:
    """The guest's kernel zeroes what it allocates; how much is dirtied again is reported."""
    values = one_run("idle-2g-init_on_alloc", "array")["metrics"]
    log = paths.OUT / "logs" / "bench" / "idle-512m-init_on_alloc" / "array-1"
    console = (log / "source-0-console.log").read_text(errors="replace")
    assert re.search(r"auto-init: .*heap alloc:on", console)
    # Arrays have the guest allocate nothing.
    assert values["redirtied_mib"] < 0.1 * values["hinted_mib"]


def test_memory_is_warm_until_it_is_wanted() -> None:
    """Memory that was touched for a destination is held until it is wanted, and free then."""
    rss = [host.process_mib(os.getpid())]
    with host.warmed(64):
        rss.append(host.process_mib(os.getpid()))
    rss.append(host.process_mib(os.getpid()))
    assert rss[1] - rss[0] >= 64
    assert rss[1] - rss[2] >= 64
