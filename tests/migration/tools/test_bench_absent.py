# SPDX-License-Identifier: GPL-2.0-or-later
"""The benchmarks of absent pages, of swapped memory, and of guests that give memory back."""

import json
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any, Dict

import pytest

from livebench import density, engine, plan, report, swap
from livebench.canned import IDLE, Runner, bench, canned
from livebench.scenarios import SCENARIOS, Scenario
from livebench.store import Store, exported
from livemig import host, workload
from livemig.errors import NotEnoughMemory, NotPossibleHere
from livemig.modes import MODES, RESTING
from livemig.spec import GuestSpec

SWAPPED = SCENARIOS["freed-50-4g-2cpu-swapped"]
ABSENT_MODES = {"absent", "absent-reporting", "stock-driver-absent", "array-absent"}
ABSENT_MODES |= {"absent-ours", "block"}


def test_absent_pages_are_off_but_where_they_are_compared() -> None:
    """Every QEMU that knows the capability is told on or off; older modes stay what they were."""
    for name, mode in MODES.items():
        told = mode.capabilities.get("skip-absent-pages")
        if mode.qemu in ("ours", "floor"):
            assert told is (name in ABSENT_MODES)
        else:
            assert told is None
    assert MODES["absent"].balloon is None


def test_names_tell_what_is_special() -> None:
    """How the host and the guest's kernel are set up is in a scenario's name and description."""
    assert {SWAPPED.name, "idle-64g-1gbit-multifd2-zstd"} <= set(SCENARIOS)
    scenario = SCENARIOS["alternate-4g-2cpu-order0-small"]
    for text in "order 0", "no transparent huge pages", "every second page":
        assert text in scenario.about
    spec = engine.guest_spec(scenario, MODES["absent-reporting"])
    assert "page_reporting.page_reporting_order=0" in spec.cmdline
    assert spec.wrapper == host.NO_HUGE_PAGES
    plain = engine.guest_spec(IDLE, MODES["absent"])
    assert not plain.wrapper and plain.balloon is None
    link = SCENARIOS["idle-64g-1gbit-multifd2-zstd"]
    parameters = engine.migration_spec(link, MODES["absent"]).parameters
    assert parameters["multifd-compression"] == "zstd" and parameters["multifd-channels"] == 2


def test_metrics_of_absent_pages() -> None:
    """What was absent, and the scan's share of the total, are reported if anybody looked."""
    run = canned(IDLE, MODES["absent"], 1, 200.0)
    run["migration"][0]["absent-pages"] = {"absent-bytes": 2 << 30, "scan-time": 500}
    values = engine.metrics(run)
    assert (values["absent_mib"], values["absent_share"]) == (2048, 0.25)
    assert (values["scan_ms"], values["scan_share"]) == (0.5, 0.0025)
    assert values["rss_source_growth_mib"] == 1
    run["migration"][0]["absent-pages"] = {"absent-bytes": 0, "scan-time": 0, "reason": "disabled"}
    assert not {"absent_mib", "scan_ms"} & set(engine.metrics(run))


def test_metrics_of_swapped_memory() -> None:
    """What was swapped in is reported in MiB, and beside what is not free."""
    run = canned(SWAPPED, MODES["array"], 1, 200.0)
    run["guest_before"][0]["meminfo_mib"] = {"MemFree": 3996}
    run["swapped"] = [{"resident_mib": 1.0, "swapped_mib": 2100.0}]
    run["swapped_in_pages"] = 50 * 256
    values = engine.metrics(run)
    assert (values["swapped_out_mib"], values["swapped_in_mib"]) == (2100, 50)
    assert values["swapped_in_share"] == 0.5
    assert "swapped_in_mib" not in canned(IDLE, MODES["array"], 1, 200.0)["metrics"]


def test_what_cannot_be_run_is_skipped(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A scenario that this machine cannot run is one line, no failure, and no result."""

    def unable(_: int) -> None:
        if runner.calls[-1][0] == SWAPPED.name:
            raise NotPossibleHere("only root can swap a guest's memory out")

    work = [plan.Work(SWAPPED, ("legacy", "array"), 2), plan.Work(IDLE, ("array",), 1)]
    store, runner = Store(tmp_path), Runner(unable)
    assert plan.carry_out(plan.order(work), store, False, runner) == 0
    output = capsys.readouterr()
    assert output.out.count("is skipped: only root") == 1 and not output.err
    # Once is enough to know it.
    assert sorted(call[0] for call in runner.calls) == [SWAPPED.name, "idle-8g"]
    assert len(store.runs()) == 1


def test_swap_needs_a_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a control group, or room for a file, the reason is reported, nothing is left."""
    monkeypatch.setattr(swap, "FILE", tmp_path / "swap")
    with pytest.raises(NotPossibleHere, match="MiB of disk"):
        with swap.room(1 << 40):
            pass
    monkeypatch.setattr(host, "CGROUPS", tmp_path / "none")
    monkeypatch.setattr(swap, "_run", lambda *_: "")
    with pytest.raises(NotPossibleHere, match="control group"):
        with swap.room(16):
            pass
    assert not list(tmp_path.iterdir())


def test_a_guest_without_huge_pages() -> None:
    """What NO_HUGE_PAGES starts may have none, whatever it asks for."""
    show = ["grep", "THP_enabled", "/proc/self/status"]
    for wrapper, enabled in (((), "1"), (host.NO_HUGE_PAGES, "0")):
        done = subprocess.run([*wrapper, *show], capture_output=True, text=True, check=True)
        assert done.stdout.split() == ["THP_enabled:", enabled]


def test_every_second_page_is_given_back(lab: Any) -> None:
    """memstamp --alternate keeps every second page, and what is free are single pages."""
    mib = 256
    source = lab.boot(GuestSpec(mem_mib=512, vcpus=1, kernel="stock", balloon=None))
    singles = workload.buddyinfo(source)[0]
    source.agent.run(f"memstamp start --name held --alternate {mib}")
    free = workload.buddyinfo(source)[0] - singles
    kept = workload.verify(source, "held").pages
    # Odd numbers are as many as even ones, but at the ends of what it got.
    assert kept == pytest.approx(mib * 128, rel=0.05)
    # Each CPU keeps some for itself, which are in no list.
    assert free > 0.4 * kept
    assert workload.verify(source, "held").good
    status, _ = source.agent.exec(f"memstamp start --name no --alternate --churn {mib}")
    assert status == 2


def test_one_absent_run(one_run: Any) -> None:
    """Of a guest without a balloon, what is absent is reported, and how long the scan took."""
    run = one_run("idle-8g", "absent")
    values = run["metrics"]
    assert not any("balloon" in word for word in run["command_lines"]["source"])
    assert values["absent_mib"] > 0.6 * 512
    assert 0 < values["scan_ms"] and values["scan_share"] < 1
    assert "hinted_mib" not in values


def test_one_swapped_run(one_run: Any) -> None:
    """The host swaps a guest's memory out; who knows what is free swaps little of it in."""
    values = one_run(SWAPPED.name, "array", "--vcpus", "1")["metrics"]
    # The premise: what was freed is in swap.
    assert values["swapped_out_mib"] > 256
    assert 0 < values["swapped_in_mib"] < 0.5 * values["swapped_out_mib"]
    assert str(swap.FILE) not in Path("/proc/swaps").read_text(encoding="utf-8")
    assert not swap.FILE.exists()
    assert not [path for path in host.CGROUPS.glob("*/livemig-swap") if path.is_dir()]


@pytest.mark.long
@pytest.mark.parametrize("backend", ["", "-memfd"])
def test_one_alternate_run(one_run: Any, backend: str) -> None:
    """Every second page of most of the memory is absent, and the scan finds them one by one."""
    run = one_run(f"alternate-4g-2cpu{backend}-order0-small", "absent-reporting")
    values = run["metrics"]
    singles = run["guest_before"][0]["free_blocks"][0]
    assert singles > 0.9 * 0.75 * 512 * 128
    assert values["absent_mib"] > 0.9 * values["free_mib"]


def small(own: density.Resting, **changes: Any) -> Scenario:
    """A guest of 512 MiB that rests."""
    return Scenario(own, tuple(RESTING), mem_mib=512, vcpus=1, **changes)


@pytest.mark.long
def test_one_burst(tmp_path: Path, measured: Dict[str, Any]) -> None:
    """With reporting, a guest's memory is back some time after a burst; without, it is not."""
    scenario = small(density.Burst(percent=50, seconds=15, loop_seconds=2))
    found = {}
    for name in "plain", "reporting":
        run = density.run(scenario, RESTING[name], 1, tmp_path)
        found[name] = values = run["metrics"]
        measured[name] = values
        assert values["rss_burst_mib"] - values["rss_before_mib"] > 200
        assert values["loop_rate"] > 0 and values["rest_cpu_s"] >= 0
        assert run["series"][-1]["s"] >= 15
    assert "half_s" not in found["plain"] and 0 < found["reporting"]["half_s"] <= 15


@pytest.mark.long
def test_one_crowd(tmp_path: Path, measured: Dict[str, Any]) -> None:
    """Guests come until their memory exceeds the limit, and those before the last one count."""
    scenario = small(density.Crowd(limit_mib=800, burst_mib=256))
    run = density.run(scenario, RESTING["plain"], 1, tmp_path)
    measured.update(run["metrics"])
    *fit, last = run["series"]
    assert last["peak_mib"] > 800 and len(fit) == run["metrics"]["guests"] == last["guests"] - 1 > 0
    assert all(item["peak_mib"] <= 800 for item in fit)
    with pytest.raises(NotEnoughMemory):
        density.run(small(density.Crowd(limit_mib=1 << 30)), RESTING["plain"], 1, tmp_path)


def test_memory_after_a_burst(tmp_path: Path) -> None:
    """The memory at its moments and the time until half of it is back; medians and ranges of it."""
    own = density.Burst(seconds=6)
    scenario = replace(density.SCENARIOS["burst-4g-2cpu"], workload=own)
    runs = []
    for index, low in (1, 500), (2, 501):
        # As density.run() returns it
        run = canned(scenario, RESTING["reporting"], index, 1.0)
        for name in "migration", "samples", "command_lines", "verified", "rss_mib":
            del run[name]
        values = (900, 850, 600, low, 200, 150, 100)
        run["series"] = [{"s": float(second), "mib": mib} for second, mib in enumerate(values)]
        # pylint: disable-next=protected-access
        run["metrics"] = own._after(run["series"], 100.0)
        runs.append(run)
    expected = {"rss_burst_mib": 900, "rss_2s_mib": 600, "rss_5s_mib": 150, "rss_6s_mib": 100}
    assert runs[0]["metrics"] == {**expected, "half_s": 3}
    table = density.table(runs)[0]
    row = table["modes"]["reporting"]
    assert row["runs"] == 2 and row["spreads"]["half_s"] == [3.5, 3, 4]
    store = density.store_of(tmp_path)
    for run in runs:
        store.save(scenario, RESTING["reporting"], run["index"], run)
    # A report needs no guest that was moved.
    page = report.make(Store(tmp_path))
    assert page and "burst-4g-2cpu" in page.read_text(encoding="utf-8")
    assert (tmp_path / "density-burst-4g-2cpu.png").exists()
    assert bench("export", str(tmp_path / "to"), "--out", str(tmp_path)).returncode == 0
    assert exported(tmp_path / "to" / "density.json.xz") == json.loads(
        json.dumps([{"key": run["key"], **run} for run in store.runs()])
    )


def test_limits_of_resting_guests() -> None:
    """Every such scenario has modes that exist; a smaller host is one of its own."""
    for scenario in density.SCENARIOS.values():
        assert set(scenario.modes) <= set(RESTING)
    crowd = density.SCENARIOS["crowd-6g-512m-1cpu"]
    assert density.limited(crowd, 1536).name == "crowd-1536m-512m-1cpu"
    burst = density.SCENARIOS["burst-4g-2cpu"]
    assert density.limited(burst, 1536) is burst
