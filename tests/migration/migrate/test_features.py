# SPDX-License-Identifier: GPL-2.0-or-later
"""Hints work together with the other features of migration, and no write is lost."""

import secrets
import subprocess
from pathlib import Path
from typing import Any, Dict, Tuple

import pytest

from livemig import memory, workload
from livemig.checks import FREED_MIB, MIB, ROOM, SMALL, WITH_HINTS, assert_arrived, assert_arrives
from livemig.checks import assert_hints_if, assert_hints_used, assert_intact, assert_not_asked
from livemig.checks import assert_whole, busy, dimm, fill_and_free, hinted_blocks, hints_now
from livemig.checks import hints_of, huge_pages_set_aside, in_check, keep_busy, migration, plug_dimm
from livemig.checks import start_churn, wait_dirty_rate, wait_for, wait_hints_ended, wait_rounds
from livemig.checks import watched
from livemig.lab import Lab
from livemig.migration import let_end, migrate, query, restore, save, start, status_is
from livemig.workload import meminfo

pytestmark = pytest.mark.integrity

MULTIFD = {"multifd": True}


# Capabilities and parameters.
FEATURES: Dict[str, Tuple[Dict[str, bool], Dict[str, Any]]] = {
    "multifd": (MULTIFD, {"zero-page-detection": "multifd"}),
    "multifd-legacy-zero-pages": (MULTIFD, {"zero-page-detection": "legacy"}),
    "multifd-no-zero-pages": (MULTIFD, {"zero-page-detection": "none"}),
    "multifd-4-channels": (MULTIFD, {"multifd-channels": 4}),
    "no-zero-pages": ({}, {"zero-page-detection": "none"}),
    "xbzrle": ({"xbzrle": True}, {"xbzrle-cache-size": 64 * MIB}),
}
# Control runs for the ways to send that differ.
LONG = ("multifd-4-channels", "no-zero-pages-control", "xbzrle-control")
CONTROLS = ("multifd-control", "no-zero-pages-control", "xbzrle-control")


@pytest.mark.parametrize("case", in_check((*FEATURES, *CONTROLS), "multifd", long=LONG))
def test_hints_with(lab: Lab, measured: Dict[str, Any], case: str) -> None:
    """Hints are used, several rounds are sent, and every page arrives that had to."""
    name, hints_on = case.removesuffix("-control"), case not in CONTROLS
    common, parameters = FEATURES[name]
    oracle, source, destination = busy(lab)
    destination.qmp_dict("migrate-set-parameters", parameters)
    spec = migration(hints=hints_on, downtime_limit=1, max_bandwidth=400 * MIB, **parameters)
    start(source, destination, spec.with_common(**common))
    wait_rounds(source, 3)
    result = let_end(source, destination)
    hints = assert_hints_if(hints_on, result, FREED_MIB * MIB)
    measured.update(redirtied=hints.redirtied_bytes, rounds=result.rounds)
    if name == "xbzrle":
        assert result.raw["xbzrle-cache"]["pages"] > 0
    assert_arrived(oracle, measured)


@pytest.mark.parametrize("way", in_check(("hints", "control"), long=["control"]))
def test_auto_converge(lab: Lab, measured: Dict[str, Any], way: str) -> None:
    """Syncs from another thread, auto-converge's timer, lose no write either."""
    hints_on = way == "hints"
    oracle, source, destination = busy(lab)
    throttle = {"cpu_throttle_initial": 50, "throttle_trigger_threshold": 1}
    # Slower than the guest writes, as much as there is to be sent.
    bandwidth = (30 if hints_on else 100) * MIB
    spec = migration(hints=hints_on, downtime_limit=1, max_bandwidth=bandwidth, **throttle)
    start(source, destination, spec.with_common(auto_converge=True))
    if hints_on:
        wait_hints_ended(source)
    throttled = 0
    while not throttled:
        # The premise: the guest is slowed down, which starts the timer.
        wait_rounds(source, 2)
        throttled = query(source).raw.get("cpu-throttle-percentage", 0)
    assert_hints_if(hints_on, let_end(source, destination), FREED_MIB * MIB)
    measured["throttled"] = throttled
    assert_arrived(oracle, measured)


MAPPED = {"mapped-ram": True}
INTO_A_FILE: Dict[str, Dict[str, bool]] = {
    "plain": {},
    "mapped-ram": MAPPED,
    "mapped-ram-control": MAPPED,
    "mapped-ram-multifd": {**MAPPED, **MULTIFD},
}


@pytest.mark.parametrize("way", INTO_A_FILE)
def test_through_a_file(lab: Lab, measured: Dict[str, Any], tmp_path: Path, way: str) -> None:
    """A guest saved to a file while it ran, with hints, is whole when it is restored."""
    hints_on = way != "mapped-ram-control"
    spec = migration(hints=hints_on).with_common(**INTO_A_FILE[way])
    oracle, source, destination = busy(lab)
    result = save(source, tmp_path / "guest", spec)
    assert_hints_if(hints_on, result, FREED_MIB * MIB)
    restore(destination, tmp_path / "guest", spec)
    assert_arrived(oracle, measured)
    measured["file_bytes"] = (tmp_path / "guest").stat().st_blocks * 512
    # Hints keep free memory out of the file.
    assert (measured["file_bytes"] < FREED_MIB * MIB) == hints_on


DIMM = dimm(1024)
VIRTIO_MEM = (
    *("-object", "memory-backend-ram,id=vmem,size=2048M,reserve=off"),
    *("-device", "virtio-mem-pci,id=vm0,memdev=vmem,requested-size=1024M"),
)
ONLINE = ("memhp_default_state=online_movable",)
# A guest, and how many MiB it must have.
MEMORIES = {
    "memfd": (SMALL.but(mem_backend="memory-backend-memfd,share=on"), 1024),
    "private": (SMALL, 1024),
    "numa": (SMALL.but(nodes=2, mem_mib=2048), 2048),
    "dimm": (SMALL.but(args=(*ROOM, *DIMM), cmdline=ONLINE), 2048),
    "virtio-mem": (SMALL.but(args=(*ROOM, *VIRTIO_MEM), cmdline=ONLINE), 2048),
}


@pytest.mark.parametrize("name", in_check(MEMORIES, "numa"))
def test_memory_of_kind(lab: Lab, measured: Dict[str, Any], name: str) -> None:
    """Free memory of each kind is hinted, and every page arrives that had to.

    That which is private is in transparent huge pages, and a memfd is not.
    """
    spec, total_mib = MEMORIES[name]
    oracle, source = watched(lab, spec.but(trace="free_page_hint_*"))
    # KASAN has an eighth of it for itself.
    assert meminfo(source)["MemTotal"] > 0.75 * total_mib
    workload.dirty_and_free(source, total_mib // 2)
    workload.stamp(source, total_mib // 4)
    start_churn(source)
    if name in ("memfd", "private"):
        # The premise
        measured["huge_bytes"] = huge = memory.usage(source)["AnonHugePages"]
        assert huge > 64 * MIB if name == "private" else not huge
    result = migrate(source, oracle.arrival(), WITH_HINTS)
    hints = assert_hints_used(result, total_mib // 4 * MIB)
    # The premise: the blocks of RAM that were hinted in, and more than one where there are more.
    blocks = hinted_blocks(source)
    assert (len(blocks) > 1) == (name in ("numa", "dimm", "virtio-mem"))
    measured.update(blocks=sorted(blocks), skipped=hints.skipped_bytes)
    assert assert_arrived(oracle, measured).pages >= total_mib * MIB // memory.PAGE_BYTES


def test_hot_plugged_memory(lab: Lab, measured: Dict[str, Any]) -> None:
    """Memory that came while the guest ran is hinted like the rest."""
    oracle, source = watched(lab, SMALL.but(args=ROOM, cmdline=ONLINE, trace="free_page_hint_*"))
    before = meminfo(source)["MemTotal"]
    plug_dimm(source, 1024)
    wait_for(lambda: meminfo(source)["MemTotal"] >= before + 768, "the memory does not come")
    workload.dirty_and_free(source, 1200)
    workload.stamp(source, 500)
    start_churn(source)
    oracle.arrival(args=(*ROOM, *DIMM))
    assert_arrives(oracle, measured, 500 * MIB)
    assert "dimm" in hinted_blocks(source), "nothing of the new memory was hinted"


# Their size in KiB, and whether the guest could be switched to postcopy.
HUGE_PAGES = {
    "2m": (2048, False),
    "2m-postcopy-ram": (2048, True),
    "1g": (1 << 20, False),
    "1g-postcopy-ram": (1 << 20, True),
}


@pytest.mark.parametrize("name", HUGE_PAGES)
def test_huge_pages(lab: Lab, measured: Dict[str, Any], name: str) -> None:
    """Hints smaller than the huge pages behind the guest are used, and nothing is lost.

    Not if the guest could be switched to postcopy, which moves huge pages as a whole: then what is
    smaller is sent, and counted.
    """
    kib, postcopy_ram = HUGE_PAGES[name]
    with huge_pages_set_aside(kib, 2 * SMALL.mem_mib * 1024 // kib):
        backend = f"memory-backend-memfd,hugetlb=on,hugetlbsize={kib}K,share=on"
        oracle, source = watched(lab, SMALL.but(mem_backend=backend))
        keep_busy(source)
        free = workload.free_reported_bytes(source)
        destination = oracle.arrival()
        spec = WITH_HINTS.with_common(postcopy_ram=postcopy_ram)
        hints = hints_of(migrate(source, destination, spec))
        measured.update(free=free, skipped=hints.skipped_bytes, too_small=hints.too_small_bytes)
        assert (hints.reason, hints.complete, hints.invalid_bytes) == (None, True, 0)
        if name == "1g-postcopy-ram":
            assert hints.skipped_bytes <= free and hints.too_small_bytes > 0
        else:
            # The guest goes on allocating while it is asked.
            assert hints.skipped_bytes >= 0.95 * (free - 128 * MIB)
            assert postcopy_ram or hints.too_small_bytes == 0
        assert hints.skipped_bytes + hints.too_small_bytes >= 0.95 * (free - 128 * MIB)
        assert_arrived(oracle, measured)
        source.close()
        destination.close()


def test_shared_memory_that_stays(lab: Lab) -> None:
    """With x-ignore-shared, hints in memory that is not sent are dropped, and all is well."""
    with memory.memory_files("guest") as (file,):
        spec = SMALL.but(qemu="checked", mem_file=file)
        source = keep_busy(lab.boot(spec))
        destination = lab.incoming(spec)
        result = migrate(source, destination, WITH_HINTS.with_common(x_ignore_shared=True))
        hints = hints_of(result)
        assert hints.complete
        # The premise: the memory itself was not sent.
        assert result.normal_pages < 16 * 256
        assert (hints.skipped_bytes, hints.hinted_bytes) == (0, 0)
        assert hints.invalid_bytes > 0
        assert_whole(destination)


@pytest.mark.check
def test_screendump(lab: Lab, measured: Dict[str, Any], tmp_path: Path) -> None:
    """Pictures of a VGA screen, which read and clear the dirty log too, take nothing away."""
    oracle, source, destination = busy(lab, SMALL.but(args=("-device", "VGA")))
    start(source, destination, migration(downtime_limit=1, max_bandwidth=100 * MIB))
    pictures = {"arming": 0, "scanning": 0, "asked": 0, "reporting": 0, "ended": 0}
    while query(source).rounds < 4:
        source.qmp("screendump", filename=str(tmp_path / "screen"))
        pictures[hints_now(source).state] += 1
    measured.update(pictures)
    # The premise: the screen was looked at in several rounds.
    assert sum(pictures.values()) >= 4
    assert (tmp_path / "screen").read_bytes().startswith(b"P6")
    assert_hints_used(let_end(source, destination), FREED_MIB * MIB)
    assert_arrived(oracle, measured)


@pytest.mark.parametrize("mode", ["page-sampling", "dirty-bitmap"])
def test_calc_dirty_rate(lab: Lab, measured: Dict[str, Any], mode: str) -> None:
    """A measurement of the dirty rate, over before the migration or not, takes nothing away."""
    oracle, source, destination = busy(lab)
    # One that has ended, and one that goes on while the guest is asked.
    source.qmp("calc-dirty-rate", calc_time=1, mode=mode)
    wait_dirty_rate(source, "measured")
    source.qmp("calc-dirty-rate", calc_time=3, mode=mode)
    wait_dirty_rate(source, "measuring")
    start(source, destination, migration(downtime_limit=1, max_bandwidth=50 * MIB))
    wait_hints_ended(source)
    measured["when_hinted"] = source.qmp("query-dirty-rate")["status"]
    wait_dirty_rate(source, "measured")
    measured["dirty_mib_s"] = source.qmp("query-dirty-rate")["dirty-rate"]
    assert query(source).status == "active"
    assert_hints_used(let_end(source, destination), FREED_MIB * MIB)
    assert_arrived(oracle, measured)


def test_tls(lab: Lab, measured: Dict[str, Any], tmp_path: Path) -> None:
    """Hints are used over an encrypted connection."""
    (tmp_path / "keys.psk").write_text(f"qemu:{secrets.token_hex(32)}\n")
    oracle, source, destination = busy(lab)
    credentials = {"qom-type": "tls-creds-psk", "id": "tls", "dir": str(tmp_path)}
    source.qmp_dict("object-add", {**credentials, "endpoint": "client", "username": "qemu"})
    destination.qmp_dict("object-add", {**credentials, "endpoint": "server"})
    destination.qmp("migrate-set-parameters", tls_creds="tls")
    # Encryption is slow: let it end although the guest goes on writing.
    spec = migration(tls_creds="tls", tls_hostname="localhost", downtime_limit=100000)
    assert_arrives(oracle, measured, spec=spec)


def test_background_snapshot_is_refused(lab: Lab, tmp_path: Path) -> None:
    """A background snapshot sends each page as it was at its start, and asks for no hints."""
    source = lab.boot(SMALL.but(qemu="checked"))
    fill_and_free(source)
    spec = WITH_HINTS.with_common(background_snapshot=True)
    result = save(source, tmp_path / "snapshot", spec)
    assert_not_asked(result, "unsupported")
    # Zero pages are most of it; what was written and freed is not left out.
    assert result.normal_pages > 0.95 * FREED_MIB * 256
    assert_intact(source)


def test_colo_is_refused(lab: Lab) -> None:
    """With COLO, which sends the same memory again and again, the guest is not asked."""
    source = lab.boot(SMALL.but(qemu="checked"))
    start(source, lab.incoming(source.spec), WITH_HINTS.with_common(x_colo=True))
    source.wait_event(status_is("colo"), "COLO", 120)
    assert_not_asked(query(source), "unsupported")


def test_savevm(lab: Lab, tmp_path: Path) -> None:
    """A snapshot in an image asks for no hints, and the guest is whole when it is loaded."""
    image = tmp_path / "snapshots.qcow2"
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", image, "1G"], check=True)
    drive = ("-drive", f"file={image},if=none,id=snapshots")
    source = keep_busy(lab.boot(SMALL.but(qemu="checked", args=drive)))
    assert source.hmp("savevm one") == ""
    assert hints_now(source).state == "idle"
    workload.dirty_and_free(source, FREED_MIB)
    assert source.hmp("loadvm one") == ""
    source.qmp("cont")
    assert_whole(source)
