# SPDX-License-Identifier: GPL-2.0-or-later
"""Hints are used, and no write is lost, in situations that users meet and other tests do not.

The balloon in other shapes, memory in other layouts, and what goes on in a guest, or is done to it,
while it is asked and while its RAM is sent.
"""

import time
from typing import Any, Callable, Counter, Dict, Tuple

import pytest

from livemig import workload
from livemig.checks import INIT_ON_FREE, ROOM, SMALL, WITH_HINTS, ask, assert_arrived
from livemig.checks import assert_arrives, assert_hints_used, assert_whole, dimm, going_on
from livemig.checks import hints_now, hints_of, in_check, migration, plug_dimm, rounds, wait_for
from livemig.checks import wait_hints_ended, watched
from livemig.errors import MigrationError
from livemig.guest import Guest
from livemig.host import process_mib
from livemig.lab import DRIVER, Lab
from livemig.machine import MIB, PAGE
from livemig.metal import HINTED_PAGES, let_go, written_metal
from livemig.migration import Hints, cancel, finish, let_end, migrate, query, set_capabilities
from livemig.migration import start
from livemig.oracle import Oracle
from livemig.spec import ARRAYS, BLOCKS, GuestSpec
from livemig.workload import meminfo

# There are many of them: smaller than elsewhere.
GUEST = SMALL.but(mem_mib=512)
FREED_MIB = 192
# So slow that there is time for what is to happen while RAM is sent.
SLOW = migration(max_bandwidth=MIB)


def prepare(guest: Guest) -> None:
    """Free memory that is not clear, memory that knows its contents, and memory in use."""
    workload.dirty_and_free(guest, FREED_MIB)
    workload.stamp(guest, 8)
    workload.stamp(guest, 16, churn=True, realloc_mib=32, name="churn")


def prepared(lab: Lab, spec: GuestSpec = GUEST) -> Tuple[Oracle, Guest]:
    """A guest like that, which is watched."""
    oracle = Oracle(lab, spec)
    prepare(oracle.boot())
    return oracle, oracle.source


def assert_moves(oracle: Oracle, measured: Dict[str, Any], least_mib: int = FREED_MIB) -> Hints:
    """Migrate what was prepared: hints take so much out, and nothing is lost."""
    oracle.arrival()
    return assert_arrives(oracle, measured, least_mib * MIB)


def assert_moves_now(source: Guest, lab: Lab) -> None:
    """The same after what went wrong before, with a guest that is not watched."""
    destination = lab.incoming(GUEST)
    assert_hints_used(migrate(source, destination, WITH_HINTS), FREED_MIB * MIB)
    assert_whole(destination)


def boot_again(guest: Guest, reset: Callable[[Guest], object]) -> None:
    """Let a guest boot anew, and prepare it."""
    so_far = len(guest.console.text())
    reset(guest)
    guest.console.wait_for(r"^READY\n", 120, so_far)
    prepare(guest)


def release(source: Guest, destination: Guest) -> Hints:
    """Let a slow migration complete; what hints took out at its start counts."""
    assert query(source).status == "active"
    return assert_hints_used(let_end(source, destination), 1)


# The balloon in other shapes

BALLOON = f"{DRIVER}/virtio*"
# Feature bits
PAGE_POISON = 4
EVENT_IDX = 29
VERSION_1 = 32
RING_PACKED = 34


def with_balloon(properties: str, **changes: Any) -> GuestSpec:
    """A guest whose balloon has these properties, too."""
    return GUEST.but(balloon=f"{ARRAYS},{properties}", **changes)


def accepted(bit: int, wanted: bool = True) -> str:
    """A shell command that succeeds if the driver has accepted a feature, or not."""
    return f"[ $(cut -c {bit + 1} {BALLOON}/features) = {int(wanted)} ]"


# A PCI Express device, as it is not on the root bus.
EXPRESS = (
    *("-device", "pcie-root-port,id=hot,chassis=1,slot=1"),
    *("-device", f"virtio-balloon-pci,id=balloon,bus=hot,{ARRAYS},ats=on"),
)
# ATS: the extended capability with the id 15, in the registers from 256 on.
ATS_SEEN = f"od -A n -v -t x4 -w4 -j 256 {BALLOON}/../config | grep -q '1000f$'"
NEW_DEVICE = "[ $(cat /sys/bus/pci/devices/*/device | grep -c 0x1045) = 1 ]"
NO_POISON = with_balloon("page-poison=off", cmdline=INIT_ON_FREE)
# A guest with a certain balloon, and a shell command with which it can tell.
SHAPES = {
    "packed": (with_balloon("packed=on,disable-modern=off"), accepted(RING_PACKED)),
    "no-event-idx": (with_balloon("event_idx=off"), accepted(EVENT_IDX, False)),
    "legacy": (with_balloon("disable-legacy=off,disable-modern=on"), accepted(VERSION_1, False)),
    "no-vectors": (with_balloon("vectors=0"), f"! ls {BALLOON}/../msi_irqs"),
    "ats": (GUEST.but(balloon=None, args=EXPRESS), ATS_SEEN),
    "no-poison": (NO_POISON, accepted(PAGE_POISON, False)),
    # It cannot.
    "iothread": (with_balloon("iothread=hints"), "true"),
    # A device of the new kind, 1af4:1045, without legacy registers.
    "modern": (with_balloon("disable-legacy=on,disable-modern=off"), NEW_DEVICE),
}
CASES = in_check([name for name in SHAPES if name != "modern"], "packed", "legacy")


# Not here: transitional ones and those with page-poison=on are in other tests, and Linux never uses
# indirect descriptors with a balloon.
@pytest.mark.parametrize("name", [*CASES, pytest.param("modern", marks=pytest.mark.integrity)])
def test_balloon_of_shape(lab: Lab, measured: Dict[str, Any], name: str) -> None:
    """Whatever kind of virtio device the balloon is, its arrays are used."""
    guest, seen = SHAPES[name]
    oracle, source = prepared(lab, guest)
    # The premise
    source.agent.run(seen)
    backend = "/machine/peripheral/balloon/virtio-backend"
    iothread = source.qmp("qom-get", path=backend, property="iothread")
    assert bool(iothread) == (name == "iothread")
    hints = assert_moves(oracle, measured)
    measured.update(messages=hints.messages, blocks=hints.blocks)
    assert hints.messages < hints.blocks


@pytest.mark.parametrize("kernel", ["ours", "stock"])
@pytest.mark.parametrize("machine", ["pc", "q35"])
def test_with_reporting(lab: Lab, measured: Dict[str, Any], machine: str, kernel: str) -> None:
    """A guest that reports its free pages to the host, all the time, has hints as well."""
    balloon = f"{ARRAYS},free-page-reporting=on"
    spec = GUEST.but(kernel=kernel, balloon=balloon, args=("-machine", machine))
    oracle, source = watched(lab, spec)
    before = process_mib(source.pid)
    workload.dirty_and_free(source, FREED_MIB)
    # The premise: what was written has been taken back by the host.
    wait_for(lambda: process_mib(source.pid) < before + FREED_MIB // 2, "nothing is reported")
    measured["resident_mib"] = (before, process_mib(source.pid))
    prepare(source)
    hints = assert_moves(oracle, measured)
    assert (hints.messages < hints.blocks) == (kernel == "ours")


# Memory in other layouts

MOVABLE_KIB = (
    "awk '/^Node/ {zone = $4} /managed/ && zone == \"Movable\" {print $2 * 4}' /proc/zoneinfo"
)
# A third node, which has a processor and no memory.
THIRD_NODE = (
    *("-smp", "2,sockets=2", "-numa", "node,nodeid=2"),
    *("-numa", "cpu,node-id=0,socket-id=0", "-numa", "cpu,node-id=2,socket-id=1"),
)
EMPTY_NODES = "cat /sys/devices/system/node/node*/meminfo | grep -c 'MemTotal: *0 kB'"
# A guest, a shell command that prints a number, which must not be 0, how many MiB are freed, and
# how many hints must take out at least.
LAYOUTS = {
    # More is freed than there is in all other zones.
    "movable-zone": (GUEST.but(cmdline=("movablecore=384M",)), MOVABLE_KIB, 256, 192),
    "node-without-memory": (GUEST.but(nodes=2, args=THIRD_NODE), EMPTY_NODES, FREED_MIB, FREED_MIB),
    "96-mib": (GUEST.but(mem_mib=96), "echo 1", 24, 8),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_memory_of_layout(lab: Lab, measured: Dict[str, Any], name: str) -> None:
    """Free memory is hinted wherever it is, and however little there is."""
    spec, premise, freed_mib, skipped_mib = LAYOUTS[name]
    oracle, source = watched(lab, spec)
    measured["premise"] = int(source.agent.run(premise))
    assert measured["premise"] > 0
    workload.dirty_and_free(source, freed_mib)
    workload.stamp(source, 8)
    workload.stamp(source, 8, churn=True, realloc_mib=8, name="churn")
    assert_moves(oracle, measured, skipped_mib)


DIMM_MIB = 512


def test_memory_plugged_a_moment_before(lab: Lab, measured: Dict[str, Any]) -> None:
    """Memory that the guest is still taking into use when it is asked arrives and is used."""
    online = ("memhp_default_state=online_movable",)
    oracle, source = prepared(lab, GUEST.but(args=ROOM, cmdline=online))
    before = meminfo(source)["MemTotal"]
    destination = oracle.arrival(args=(*ROOM, *dimm(DIMM_MIB)))
    plug_dimm(source, DIMM_MIB)
    hints = assert_hints_used(migrate(source, destination, WITH_HINTS), FREED_MIB * MIB)
    measured["skipped"] = hints.skipped_bytes
    oracle.check()
    more = before + DIMM_MIB // 2
    wait_for(lambda: meminfo(destination)["MemTotal"] > more, "the memory does not come")
    # More than there was before.
    workload.dirty_and_free(destination, before + 64)
    assert_whole(destination)


# What goes on meanwhile


def test_vcpus_come_and_go(lab: Lab, measured: Dict[str, Any]) -> None:
    """Processors that go off- and online while the guest is asked keep no page from a report."""
    oracle, source = prepared(lab, GUEST.but(vcpus=4))
    online = "/sys/devices/system/cpu/cpu$cpu/online"
    command = f"for cpu in 1 2 3; do echo 0 > {online}; echo 1 > {online}; done"
    with going_on(source, command):
        wait_for(lambda: rounds(source) > 0, "no processor goes")
        so_far = rounds(source)
        measured["asked"] = 0
        # The premise: some went between the first and the last request.
        while measured["asked"] < 6 or rounds(source) < so_far + 2:
            hints = ask(source)
            assert (hints.state, hints.reason) == ("ended", None)
            assert hints.hinted_bytes > FREED_MIB * MIB
            measured["asked"] += 1
        measured["rounds"] = rounds(source) - so_far
    assert_moves(oracle, measured)


@pytest.mark.check
def test_driver_comes_and_goes(lab: Lab, measured: Dict[str, Any]) -> None:
    """A driver that is unbound and bound while it is asked is there for the next request.

    The same with arrays in flight and with a kernel that checks itself is in test_guest_faults.
    """
    oracle, source = prepared(lab)
    dev = source.agent.run(f"basename {BALLOON}").strip()
    reasons = set()
    with going_on(source, f"echo {dev} > {DRIVER}/unbind; echo {dev} > {DRIVER}/bind"):
        while not {"no-driver", "reset"} & reasons:
            reasons.add(ask(source, wait_ms=2000).reason)
    measured["reasons"] = sorted(map(str, reasons))
    assert_moves(oracle, measured)


def balloon_mib(guest: Guest) -> int:
    """What the balloon leaves to the guest."""
    return int(guest.qmp("query-balloon")["actual"]) // MIB


def inflate_to(guest: Guest, mib: int) -> None:
    """Let the balloon leave so much to the guest."""
    guest.qmp("balloon", value=mib * MIB)
    wait_for(lambda: balloon_mib(guest) == mib, f"the balloon does not leave {mib} MiB")


def test_balloon_grows_and_shrinks(lab: Lab, measured: Dict[str, Any]) -> None:
    """A balloon may grow while the guest is asked, and shrink and grow while RAM is sent.

    What is in the balloon has no contents, so that only the guest can be asked what was lost.
    """
    spec = GUEST.but(qemu="checked")
    source = lab.boot(spec)
    prepare(source)
    destination = lab.incoming(spec)
    source.qmp("balloon", value=256 * MIB)
    start(source, destination, SLOW)
    wait_hints_ended(source)
    measured["mib_when_hinted"] = balloon_mib(source)
    for target in (256, 480, 320):
        inflate_to(source, target)
    measured["skipped_mib"] = release(source, destination).skipped_bytes // MIB
    assert balloon_mib(destination) == 320
    assert_whole(destination)
    inflate_to(destination, 512)
    workload.dirty_and_free(destination, FREED_MIB)
    assert_whole(destination)


RESETS: Dict[str, Callable[[Guest], object]] = {
    "reset": lambda guest: guest.qmp("system_reset"),
    "reboot": lambda guest: guest.agent.send("echo b > /proc/sysrq-trigger"),
}


@pytest.mark.parametrize("how", in_check(RESETS, "reset", long=("reboot",)))
def test_boots_again_while_ram_is_sent(lab: Lab, measured: Dict[str, Any], how: str) -> None:
    """A guest that boots again in memory that it had hinted arrives whole."""
    oracle, source = watched(lab, GUEST)
    workload.dirty_and_free(source, FREED_MIB)
    destination = oracle.arrival()
    for guest in (source, destination):
        # The harness lets a QEMU end when its guest reboots.
        guest.qmp("set-action", reboot="reset")
    start(source, destination, SLOW)
    wait_hints_ended(source)
    boot_again(source, RESETS[how])
    hints = release(source, destination)
    measured["redirtied_mib"] = hints.redirtied_bytes // MIB
    # The premise
    assert measured["redirtied_mib"] > FREED_MIB // 2
    assert_arrived(oracle, measured)


@pytest.mark.check
def test_network_card_goes_while_asked(lab: Lab) -> None:
    """A device that the guest ejects while it is asked, with RAM of its own, ends nothing.

    Not with the debug build: QEMU goes on counting the dirty pages of RAM that is gone, with hints
    and without, and the check of the counter finds that.
    """
    args = ("-machine", "pc", "-device", "virtio-net-pci,id=nic,addr=10")
    with written_metal(lab, args=args) as guest:
        source = guest.source
        # The premise: its ROM is a block of RAM that is sent.
        assert "/virtio-net-pci.rom" in source.hmp("info ramblock")
        destination, cmd_id = guest.ask()
        # The chipset's register for this: slot 16 of the first bus.
        guest.machine.write_port(0xAE10, 0, 32)
        guest.machine.write_port(0xAE08, 1 << 16, 32)
        source.wait_event(lambda e: e["event"] == "DEVICE_DELETED", "end of the card", 60)
        wait_for(lambda: "virtio-net" not in source.hmp("info ramblock"), "its ROM stays")
        guest.report(cmd_id, HINTED_PAGES)
        guest.write("in round 1")
        hints = hints_of(let_go(source, destination))
        assert (hints.reason, hints.hinted_bytes) == (None, len(HINTED_PAGES) * PAGE)
        # What it wrote and did not write again after it had hinted it.
        assert (guest.lost("kept"), guest.lost("kept too"), guest.lost("in round 1")) == (0, 0, 0)
        assert guest.lost("free") > 0


# Migrations that do not come to their end


@pytest.mark.check
def test_a_hundred_cancels(lab: Lab, measured: Dict[str, Any]) -> None:
    """After a hundred migrations that were cancelled within 20 ms, the next one is as ever."""
    source = lab.boot(GUEST)
    prepare(source)
    set_capabilities(source, {"events": True})
    source.qmp_dict("migrate-set-parameters", dict(SLOW.parameters))
    states: Counter[str] = Counter()
    for number in range(100):
        source.qmp("migrate", uri="exec:cat > /dev/null")
        time.sleep(number % 20 / 1000)
        cancel(source)
        hints = hints_now(source)
        states[hints.reason or hints.state] += 1
    measured.update(states)
    # The premise: some were cancelled before the guest had answered.
    assert states["cancelled"] > 0
    assert_whole(source)
    assert_moves_now(source, lab)


def test_twenty_requests_without_an_answer(lab: Lab) -> None:
    """After twenty requests that nobody answered, the guest boots anew and answers the next one."""
    source = lab.boot_crashed(GUEST, FREED_MIB)
    source.qmp("set-action", reboot="reset")
    for _ in range(20):
        hints = ask(source, wait_ms=20)
        assert (hints.state, hints.reason, hints.hinted_bytes) == ("ended", "timeout", 0)
    boot_again(source, RESETS["reset"])
    assert_moves_now(source, lab)


# Other ways to go


def test_zero_copy_multifd(lab: Lab, measured: Dict[str, Any]) -> None:
    """Pages that the kernel sends from the guest's memory itself are left out by hints too."""
    oracle, source = prepared(lab)
    destination = oracle.arrival()
    set_capabilities(destination, {"events": True, "multifd": True})
    destination.qmp("migrate-incoming", uri="tcp:127.0.0.1:0")
    (address,) = destination.qmp("query-migrate")["socket-address"]
    capabilities = {"multifd": True, "zero-copy-send": True, "free-page-hint": True}
    known = {c["capability"] for c in source.qmp("query-migrate-capabilities")}
    if "zero-copy-send" not in known:
        pytest.skip("this QEMU is built without zero copy")
    set_capabilities(source, {"events": True, **capabilities})
    source.qmp_dict("migrate-set-parameters", dict(WITH_HINTS.parameters))
    source.qmp("migrate", uri=f"tcp:127.0.0.1:{address['port']}")
    try:
        result = finish(source, destination)
    except MigrationError as err:
        if "Zero copy send feature not detected" in str(err):
            pytest.skip(f"this host cannot send without a copy: {err}")
        raise
    assert_hints_used(result, FREED_MIB * MIB)
    measured["copied_all_the_same"] = result.raw["ram"]["dirty-sync-missed-zero-copy"]
    assert_arrived(oracle, measured)


@pytest.mark.long
def test_ten_moves_with_little_memory(lab: Lab, measured: Dict[str, Any]) -> None:
    """A stock guest with little free memory, all of which its driver takes, survives ten moves."""
    oracle, source = watched(lab, GUEST.but(mem_mib=384, kernel="stock", balloon=BLOCKS))
    workload.stamp(source, 24, churn=True, realloc_mib=4, name="churn")
    workload.stamp(source, meminfo(source)["MemAvailable"] - 48)
    measured["skipped_mib"] = []
    for _ in range(10):
        oracle.arrival()
        hints = assert_arrives(oracle, measured, 1)
        measured["skipped_mib"].append(hints.skipped_bytes // MIB)
        source = oracle.move_on()
        assert "Out of memory" not in source.console.text()
