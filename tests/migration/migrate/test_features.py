# SPDX-License-Identifier: GPL-2.0-or-later
"""Hints work together with the other features of migration, and no write is lost."""

import secrets
import subprocess
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Dict, Mapping, Tuple

import pytest

from livemig import memory, workload
from livemig.checks import FREED_MIB, MIB, SMALL, WITH_HINTS, assert_hints_if, assert_hints_used
from livemig.checks import assert_intact, assert_not_asked, assert_whole, fill_and_free, hints_now
from livemig.checks import hints_of, huge_pages_set_aside, in_check, keep_busy, migration
from livemig.checks import start_churn, wait_dirty_rate, wait_for, wait_hints_ended, wait_rounds
from livemig.guest import Guest
from livemig.lab import Lab
from livemig.migration import let_end, migrate, query, restore, save, set_capabilities, start
from livemig.migration import status_is
from livemig.oracle import Oracle
from livemig.spec import ARRAYS
from livemig.workload import meminfo

pytestmark = pytest.mark.integrity

MULTIFD = {"multifd": True}


@dataclass(frozen=True)
class Feature:
    """A feature of migration, as capabilities and parameters."""

    common: Mapping[str, bool] = field(default_factory=dict)
    parameters: Mapping[str, Any] = field(default_factory=dict)


FEATURES = {
    "multifd": Feature(MULTIFD, {"zero-page-detection": "multifd"}),
    "multifd-legacy-zero-pages": Feature(MULTIFD, {"zero-page-detection": "legacy"}),
    "multifd-no-zero-pages": Feature(MULTIFD, {"zero-page-detection": "none"}),
    "multifd-4-channels": Feature(MULTIFD, {"multifd-channels": 4}),
    "no-zero-pages": Feature({}, {"zero-page-detection": "none"}),
    "xbzrle": Feature({"xbzrle": True}, {"xbzrle-cache-size": 64 * MIB}),
}


# With the control runs for the ways to send that differ.
WITH_AND_WITHOUT = {
    **{name: (name, True) for name in FEATURES},
    **{f"{name}-control": (name, False) for name in ("multifd", "no-zero-pages", "xbzrle")},
}
control = pytest.mark.parametrize("hints_on", [True, False], ids=["hints", "control"])


@pytest.mark.parametrize("case", in_check(WITH_AND_WITHOUT, "multifd"))
def test_hints_with(lab: Lab, measured: Dict[str, Any], case: str) -> None:
    """Hints are used, several rounds are sent, and every page arrives that had to."""
    name, hints_on = WITH_AND_WITHOUT[case]
    feature = FEATURES[name]
    oracle = Oracle(lab, SMALL)
    source = keep_busy(oracle.boot())
    destination = oracle.arrival()
    destination.qmp_dict("migrate-set-parameters", dict(feature.parameters))
    spec = replace(migration(hints=hints_on), common=feature.common).with_parameters(
        **feature.parameters, downtime_limit=1, max_bandwidth=400 * MIB
    )
    start(source, destination, spec)
    wait_rounds(source, 3)
    result = let_end(source, destination)
    hints = assert_hints_if(hints_on, result, FREED_MIB * MIB)
    seen = oracle.check()
    measured.update(kept=seen.kept, redirtied=hints.redirtied_bytes, rounds=result.rounds)
    if name == "xbzrle":
        assert result.raw["xbzrle-cache"]["pages"] > 0
    assert_whole(destination)


@control
def test_auto_converge(lab: Lab, measured: Dict[str, Any], hints_on: bool) -> None:
    """Syncs from another thread, auto-converge's timer, lose no write either."""
    oracle = Oracle(lab, SMALL)
    source = keep_busy(oracle.boot())
    destination = oracle.arrival()
    spec = replace(migration(hints=hints_on), common={"auto-converge": True}).with_parameters(
        cpu_throttle_initial=50, throttle_trigger_threshold=1, downtime_limit=1
    )
    # Slower than the guest writes, as much as there is to be sent.
    bandwidth = (30 if hints_on else 100) * MIB
    start(source, destination, spec.with_parameters(max_bandwidth=bandwidth))
    if hints_on:
        wait_hints_ended(source)
    throttled = 0
    while not throttled:
        # The premise: the guest is slowed down, which starts the timer.
        wait_rounds(source, 2)
        throttled = query(source).raw.get("cpu-throttle-percentage", 0)
    assert_hints_if(hints_on, let_end(source, destination), FREED_MIB * MIB)
    measured.update(throttled=throttled, kept=oracle.check().kept)
    assert_intact(destination)
    assert_intact(destination, "churn")


@pytest.mark.parametrize(
    ("common", "hints_on"),
    [
        ({}, True),
        ({"mapped-ram": True}, True),
        ({"mapped-ram": True}, False),
        ({"mapped-ram": True, "multifd": True}, True),
    ],
    ids=["plain", "mapped-ram", "mapped-ram-control", "mapped-ram-multifd"],
)
def test_through_a_file(
    lab: Lab, measured: Dict[str, Any], tmp_path: Path, common: Dict[str, bool], hints_on: bool
) -> None:
    """A guest saved to a file while it ran, with hints, is whole when it is restored."""
    spec = replace(migration(hints=hints_on), common=common)
    oracle = Oracle(lab, SMALL)
    source = keep_busy(oracle.boot())
    destination = oracle.arrival()
    result = save(source, tmp_path / "guest", spec)
    assert_hints_if(hints_on, result, FREED_MIB * MIB)
    restore(destination, tmp_path / "guest", spec)
    seen = oracle.check()
    file_bytes = (tmp_path / "guest").stat().st_blocks * 512
    measured.update(kept=seen.kept, file_bytes=file_bytes)
    # Hints keep free memory out of the file.
    assert (file_bytes < FREED_MIB * MIB) == hints_on
    assert_whole(destination)


@dataclass(frozen=True)
class Memory:
    """A way to give a guest its memory."""

    guest: Mapping[str, Any]
    # What the guest must have.
    total_mib: int = 1024


def _dimm(size_mib: int) -> Tuple[str, ...]:
    return (
        *("-object", f"memory-backend-ram,id=dimm,size={size_mib}M,reserve=off"),
        *("-device", "pc-dimm,id=dimm0,memdev=dimm"),
    )


def _virtio_mem(size_mib: int, plugged_mib: int) -> Tuple[str, ...]:
    return (
        *("-object", f"memory-backend-ram,id=vmem,size={size_mib}M,reserve=off"),
        *("-device", f"virtio-mem-pci,id=vm0,memdev=vmem,requested-size={plugged_mib}M"),
    )


ROOM = ("-m", "maxmem=8G,slots=4")
ONLINE = ("memhp_default_state=online_movable",)
MEMORIES = {
    "memfd": Memory({"mem_backend": "memory-backend-memfd,share=on"}),
    "private": Memory({}),
    "numa": Memory({"nodes": 2, "mem_mib": 2048}, 2048),
    "dimm": Memory({"args": (*ROOM, *_dimm(1024)), "cmdline": ONLINE}, 2048),
    "virtio-mem": Memory({"args": (*ROOM, *_virtio_mem(2048, 1024)), "cmdline": ONLINE}, 2048),
}


@pytest.mark.parametrize("name", in_check(MEMORIES, "numa"))
def test_memory_of_kind(lab: Lab, measured: Dict[str, Any], name: str) -> None:
    """Free memory of each kind is hinted, and every page arrives that had to."""
    kind = MEMORIES[name]
    oracle = Oracle(lab, SMALL.but(trace="free_page_hint_*", **kind.guest))
    source = oracle.boot()
    # KASAN has an eighth of it for itself.
    assert meminfo(source)["MemTotal"] > 0.75 * kind.total_mib
    workload.dirty_and_free(source, kind.total_mib // 2)
    workload.stamp(source, kind.total_mib // 4)
    start_churn(source)
    destination = oracle.arrival()
    result = migrate(source, destination, WITH_HINTS)
    hints = assert_hints_used(result, kind.total_mib // 4 * MIB)
    # The premise: the blocks of RAM that were hinted in, and more than one where there are more.
    blocks = {
        line.split("'")[1]
        for line in source.trace_log.read_text().splitlines()
        if line.startswith(f"{memory.HINT_EVENT} ")
    }
    assert (len(blocks) > 1) == (name in ("numa", "dimm", "virtio-mem"))
    seen = oracle.check()
    assert seen.pages >= kind.total_mib * MIB // memory.PAGE_BYTES
    measured.update(blocks=sorted(blocks), skipped=hints.skipped_bytes, kept=seen.kept)
    assert_whole(destination)


def test_hot_plugged_memory(lab: Lab, measured: Dict[str, Any]) -> None:
    """Memory that came while the guest ran is hinted like the rest."""
    oracle = Oracle(lab, SMALL.but(args=ROOM, cmdline=ONLINE, trace="free_page_hint_*"))
    source = oracle.boot()
    before = meminfo(source)["MemTotal"]
    source.qmp_dict(
        "object-add",
        {"qom-type": "memory-backend-ram", "id": "dimm", "size": 1024 * MIB, "reserve": False},
    )
    source.qmp("device_add", driver="pc-dimm", id="dimm0", memdev="dimm")
    wait_for(lambda: meminfo(source)["MemTotal"] >= before + 768, "the memory does not come")
    workload.dirty_and_free(source, 1200)
    workload.stamp(source, 500)
    start_churn(source)
    destination = oracle.arrival(args=(*ROOM, *_dimm(1024)))
    hints = assert_hints_used(migrate(source, destination, WITH_HINTS), 500 * MIB)
    measured.update(skipped=hints.skipped_bytes, kept=oracle.check().kept)
    assert re_dimm(source) > 0, "nothing of the new memory was hinted"
    assert_whole(destination)


def re_dimm(source: Guest) -> int:
    """How many runs were hinted in the block of RAM called dimm."""
    return source.trace_log.read_text().count(f"{memory.HINT_EVENT} block 'dimm'")


@dataclass(frozen=True)
class HugePages:
    """Huge pages behind a guest, and how it is sent."""

    size: str
    kib: int
    mem_mib: int
    postcopy_ram: bool = False


HUGE_PAGES = {
    "2m": HugePages("2M", 2048, 1024),
    "2m-postcopy-ram": HugePages("2M", 2048, 1024, postcopy_ram=True),
    "1g": HugePages("1G", 1 << 20, 1024),
    "1g-postcopy-ram": HugePages("1G", 1 << 20, 1024, postcopy_ram=True),
}


@pytest.mark.parametrize("name", HUGE_PAGES)
def test_huge_pages(lab: Lab, measured: Dict[str, Any], name: str) -> None:
    """Hints smaller than the huge pages behind the guest are used, and nothing is lost.

    Not if the guest could be switched to postcopy, which moves huge pages as a whole: then what is
    smaller is sent, and counted.
    """
    case = HUGE_PAGES[name]
    with huge_pages_set_aside(case.kib, 2 * case.mem_mib * 1024 // case.kib):
        backend = f"memory-backend-memfd,hugetlb=on,hugetlbsize={case.size},share=on"
        oracle = Oracle(lab, SMALL.but(mem_mib=case.mem_mib, mem_backend=backend))
        source = keep_busy(oracle.boot())
        free = workload.free_reported_bytes(source)
        destination = oracle.arrival()
        spec = replace(WITH_HINTS, common={"postcopy-ram": case.postcopy_ram})
        hints = hints_of(migrate(source, destination, spec))
        measured.update(
            free=free,
            skipped=hints.skipped_bytes,
            too_small=hints.too_small_bytes,
            kept=oracle.check().kept,
        )
        assert (hints.reason, hints.complete, hints.invalid_bytes) == (None, True, 0)
        if case.size == "1G" and case.postcopy_ram:
            assert hints.skipped_bytes <= free and hints.too_small_bytes > 0
        else:
            # The guest goes on allocating while it is asked.
            assert hints.skipped_bytes >= 0.95 * (free - 128 * MIB)
            assert case.postcopy_ram or hints.too_small_bytes == 0
        assert hints.skipped_bytes + hints.too_small_bytes >= 0.95 * (free - 128 * MIB)
        assert_whole(destination)
        source.close()
        destination.close()


@pytest.mark.parametrize("huge", [True, False], ids=["huge", "small"])
def test_transparent_huge_pages(lab: Lab, measured: Dict[str, Any], huge: bool) -> None:
    """With its memory in transparent huge pages or not, a guest arrives whole."""
    backend = "memory-backend-ram" if huge else "memory-backend-memfd,share=on"
    oracle = Oracle(lab, SMALL.but(mem_backend=backend))
    source = keep_busy(oracle.boot())
    # The premise
    measured["huge_bytes"] = memory.usage(source)["AnonHugePages"]
    assert measured["huge_bytes"] > 64 * MIB if huge else not measured["huge_bytes"]
    destination = oracle.arrival()
    assert_hints_used(migrate(source, destination, WITH_HINTS), FREED_MIB * MIB)
    measured.update(kept=oracle.check().kept)
    assert_whole(destination)


def test_shared_memory_that_stays(lab: Lab) -> None:
    """With x-ignore-shared, hints in memory that is not sent are dropped, and all is well."""
    with memory.memory_files("guest") as (file,):
        spec = SMALL.but(qemu="checked", mem_file=file)
        source = keep_busy(lab.boot(spec))
        destination = lab.incoming(spec)
        result = migrate(source, destination, replace(WITH_HINTS, common={"x-ignore-shared": True}))
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
    oracle = Oracle(lab, SMALL.but(args=("-device", "VGA")))
    source = keep_busy(oracle.boot())
    destination = oracle.arrival()
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
    measured.update(kept=oracle.check().kept)
    assert_whole(destination)


@pytest.mark.parametrize("mode", ["page-sampling", "dirty-bitmap"])
def test_calc_dirty_rate(lab: Lab, measured: Dict[str, Any], mode: str) -> None:
    """A measurement of the dirty rate, over before the migration or not, takes nothing away."""
    oracle = Oracle(lab, SMALL)
    source = keep_busy(oracle.boot())
    destination = oracle.arrival()
    # One that has ended, and one that goes on while the guest is asked.
    for seconds in (1, 3):
        source.qmp("calc-dirty-rate", calc_time=seconds, mode=mode)
        if seconds == 1:
            wait_dirty_rate(source, "measured")
    wait_dirty_rate(source, "measuring")
    start(source, destination, migration(downtime_limit=1, max_bandwidth=50 * MIB))
    wait_hints_ended(source)
    measured["when_hinted"] = source.qmp("query-dirty-rate")["status"]
    wait_dirty_rate(source, "measured")
    measured["dirty_mib_s"] = source.qmp("query-dirty-rate")["dirty-rate"]
    assert query(source).status == "active"
    assert_hints_used(let_end(source, destination), FREED_MIB * MIB)
    measured.update(kept=oracle.check().kept)
    assert_whole(destination)


def test_modern_virtio(lab: Lab, measured: Dict[str, Any]) -> None:
    """A balloon without legacy registers gives hints like the others."""
    balloon = f"{ARRAYS},disable-legacy=on,disable-modern=off"
    oracle = Oracle(lab, SMALL.but(balloon=balloon))
    source = keep_busy(oracle.boot())
    # The premise: a device of the new kind, 1af4:1045.
    assert source.agent.run("cat /sys/bus/pci/devices/*/device").split().count("0x1045") == 1
    destination = oracle.arrival()
    hints = assert_hints_used(migrate(source, destination, WITH_HINTS), FREED_MIB * MIB)
    assert hints.messages < hints.blocks
    measured.update(arrays=hints.messages, kept=oracle.check().kept)
    assert_whole(destination)


def test_tls(lab: Lab, tmp_path: Path) -> None:
    """Hints are used over an encrypted connection."""
    (tmp_path / "keys.psk").write_text(f"qemu:{secrets.token_hex(32)}\n")
    oracle = Oracle(lab, SMALL)
    source = keep_busy(oracle.boot())
    destination = oracle.arrival()
    for guest, endpoint in ((source, "client"), (destination, "server")):
        credentials = {"qom-type": "tls-creds-psk", "id": "tls", "dir": str(tmp_path)}
        credentials["endpoint"] = endpoint
        if endpoint == "client":
            credentials["username"] = "qemu"
        guest.qmp_dict("object-add", credentials)
    destination.qmp("migrate-set-parameters", tls_creds="tls")
    # Encryption is slow: let it end although the guest goes on writing.
    spec = migration(tls_creds="tls", tls_hostname="localhost", downtime_limit=100000)
    result = migrate(source, destination, spec)
    assert_hints_used(result, FREED_MIB * MIB)
    oracle.check()
    assert_whole(destination)


def test_background_snapshot_is_refused(lab: Lab, tmp_path: Path) -> None:
    """A background snapshot sends each page as it was at its start, and asks for no hints."""
    source = lab.boot(SMALL.but(qemu="checked"))
    fill_and_free(source)
    set_capabilities(source, {"background-snapshot": True, "events": True})
    result = save(source, tmp_path / "snapshot", WITH_HINTS)
    assert_not_asked(result, "unsupported")
    # Zero pages are most of it; what was written and freed is not left out.
    assert result.normal_pages > 0.95 * FREED_MIB * 256
    assert_intact(source)


def test_colo_is_refused(lab: Lab) -> None:
    """With COLO, which sends the same memory again and again, the guest is not asked."""
    spec = SMALL.but(qemu="checked")
    source = lab.boot(spec)
    destination = lab.incoming(spec)
    start(source, destination, replace(WITH_HINTS, common={"x-colo": True}))
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
