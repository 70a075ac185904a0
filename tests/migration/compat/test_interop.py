# SPDX-License-Identifier: GPL-2.0-or-later
"""Stock guests and stock QEMUs on either side keep working, with the hints that both sides know.

What is left out of a migration from our QEMU is judged as everywhere else, see oracle.py. Stock
QEMU cannot be asked what it left out, but the guest can: under the old protocol, its balloon takes
the blocks that it hints out of the allocator and gives them back when the migration is over. So
each page that differs has to lie in a block that the balloon holds when the guest is stopped at the
source, as the guest kernel's array of struct page tells. Nobody may want the contents of such a
page; everything else has to be equal.
"""

import json
import struct
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, Dict, Tuple

import numpy as np
import pytest

from livemig import memory, paths, workload
from livemig.balloon import Balloon
from livemig.checks import FOR_STOCK, FREED_MIB, FREED_PAGES, SMALL, WITH_HINTS, assert_goes_on
from livemig.checks import assert_hints_used, assert_intact, assert_whole, fill_and_free, in_check
from livemig.checks import keep_busy, migrate_watched, moved, start_churn, wait_for, watched
from livemig.errors import MigrationError
from livemig.guest import Guest
from livemig.lab import Lab
from livemig.machine import MIB, Machine, spec as bare_metal
from livemig.migration import MigrationResult, migrate, save
from livemig.modes import MODES
from livemig.oracle import Oracle
from livemig.spec import ARRAYS, BLOCKS, MigrationSpec

pytestmark = pytest.mark.integrity

BUILDS = ("stock", "ours")
STOCK_BALLOON = MODES["stock-hints"].balloon
# Stock QEMU sends pages while it waits for hints: it must not be done before they come.
STOCK_SLOW = FOR_STOCK.with_parameters(max_bandwidth=64 * MIB)

# Where a 64-bit guest kernel keeps its array of struct page, and what is where in one: 64 bytes.
VMEMMAP = 0xFFFFEA0000000000
STRUCT_PAGE = np.dtype("V8, u8, V36, i4, V8")
STRUCT_PAGE.names = ("flags", "compound_head", "others", "refcount", "last")


def held_by_balloon(guest: Guest, file: Path) -> memory.Masks:
    """The pages that a stopped guest's balloon holds, with the help of a file.

    Its blocks are allocated as nobody else does it: of the largest order and not as compound pages,
    so that the first page has a reference and the others have none.
    """
    pages = guest.spec.mem_mib * MIB // memory.PAGE_BYTES
    size = pages * STRUCT_PAGE.itemsize
    guest.qmp("memsave", val=VMEMMAP, size=size, filename=str(file))
    page = np.fromfile(file, dtype=STRUCT_PAGE).reshape(-1, workload.MAX_ORDER_PAGES)
    alone = (page["compound_head"][:, 1:] & 1 == 0).all(axis=1)
    unused = (page["refcount"][:, 1:] == 0).all(axis=1)
    blocks = (page["refcount"][:, 0] == 1) & unused & alone
    return {"pc.ram": np.repeat(blocks, workload.MAX_ORDER_PAGES)}


@pytest.fixture(scope="module")
def stock_without_hints(module_lab: Lab) -> MigrationResult:
    """The control: a migration between stock QEMUs, with hints switched off."""
    spec = SMALL.but(qemu="stock", kernel="stock", balloon="free-page-hint=off")
    return moved(module_lab, module_lab.boot(spec), STOCK_SLOW)


# The balloons that an operator would give a source and a destination. A guest that came up in a
# stock QEMU does not use arrays; the destination may offer them.
BALLOONS = {
    ("stock", "stock"): (STOCK_BALLOON, STOCK_BALLOON),
    ("stock", "ours"): (STOCK_BALLOON, ARRAYS),
    ("ours", "stock"): (BLOCKS, STOCK_BALLOON),
    ("ours", "ours"): (ARRAYS, ARRAYS),
}


@pytest.mark.parametrize("builds", BALLOONS, ids="-".join)
@pytest.mark.parametrize("kernel", BUILDS)
def test_matrix(
    lab: Lab,
    stock_without_hints: MigrationResult,
    measured: Dict[str, Any],
    tmp_path: Path,
    kernel: str,
    builds: Tuple[str, str],
) -> None:
    """Any guest moves from any QEMU to any other one, hints are used, and no write is lost."""
    (source_build, destination_build), (here, there) = builds, BALLOONS[builds]
    oracle = Oracle(lab, SMALL.but(kernel=kernel))
    kept = None
    source = oracle.boot(qemu=source_build, balloon=here)
    fill_and_free(source)
    if source_build == "ours":
        start_churn(source)
    else:
        # While stock hints are out, the balloon has all memory: nothing is left to take back.
        workload.stamp(source, 48, churn=True, name="churn")
    destination = oracle.arrival(qemu=destination_build, balloon=there)
    if source_build == "ours":
        result = migrate(source, destination, WITH_HINTS)
        # A debug kernel keeps more for itself, and churn takes some of what was freed.
        hints = assert_hints_used(result, FREED_MIB * MIB * 3 // 4)
        measured.update(blocks=hints.blocks, messages=hints.messages)
        # As many messages as blocks: the old protocol.
        with_arrays = kernel == destination_build == "ours"
        assert (hints.messages < hints.blocks) == with_arrays
    else:
        result = migrate(source, destination, STOCK_SLOW)
        kept = held_by_balloon(source, tmp_path / "pages")
        measured.update(normal_pages=result.normal_pages)
        assert stock_without_hints.normal_pages > 0.95 * FREED_PAGES
        # Stock hints race with the sender: how many pages they save varies, not that they do.
        assert result.normal_pages < 0.9 * stock_without_hints.normal_pages
    seen = oracle.check(kept)
    measured.update(kept=seen.kept, different=seen.different)
    # The premise: freed memory was not sent, and a good part of all was compared.
    assert seen.different > 0.1 * FREED_PAGES
    assert seen.kept < 0.95 * seen.pages
    assert_intact(destination)
    assert_intact(destination, "churn")


@pytest.mark.parametrize("kernel", in_check(BUILDS, "ours"))
def test_on_from_stock(lab: Lab, measured: Dict[str, Any], kernel: str) -> None:
    """A guest that came from stock QEMU moves on from ours with hints, and back to stock."""
    oracle = Oracle(lab, SMALL.but(kernel=kernel))
    source = keep_busy(oracle.boot(qemu="stock", balloon=STOCK_BALLOON))
    migrate(source, oracle.arrival(running=True), FOR_STOCK)
    for build, balloon in (("ours", ARRAYS), ("stock", STOCK_BALLOON)):
        source = oracle.move_on()
        assert_whole(source)
        workload.dirty_and_free(source, FREED_MIB)
        result = migrate_watched(oracle, qemu=build, balloon=balloon)
        measured[build] = assert_hints_used(result, FREED_MIB * MIB).skipped_bytes
    assert_whole(oracle.destination)


# Where the balloon's statistics are.
POLLED = {"path": "/machine/peripheral/balloon"}
INTERVAL = "guest-stats-polling-interval"


def poll(guest: Guest) -> None:
    """Have statistics polled, and wait for new ones."""

    def last_update() -> Any:
        return guest.qmp("qom-get", **POLLED, property="guest-stats")["last-update"]

    guest.qmp("qom-set", **POLLED, property=INTERVAL, value=1)
    before = last_update()
    wait_for(lambda: last_update() > before, "no statistics come", 60)


@pytest.mark.parametrize("build", BUILDS)
def test_statistics_have_to_be_asked_for_again(lab: Lab, build: str) -> None:
    """At the destination nobody polls the balloon's statistics until told to, as with stock QEMU.

    With stock QEMU and without hints it is the same: hints have no part in it.
    """
    balloon = ARRAYS if build == "ours" else "free-page-hint=off"
    spec = SMALL.but(qemu=build, kernel=build, balloon=balloon)
    source = lab.boot(spec)
    workload.stamp(source, 16)
    poll(source)
    destination = lab.incoming(spec)
    result = migrate(source, destination, WITH_HINTS if build == "ours" else FOR_STOCK)
    if build == "ours":
        assert_hints_used(result, FREED_MIB * MIB)
    assert destination.qmp("qom-get", **POLLED, property=INTERVAL) == 0
    poll(destination)
    assert_intact(destination)


@pytest.mark.parametrize("return_path", [True, False], ids=["return-path", "no-return-path"])
def test_stock_destination_refuses_arrays(lab: Lab, return_path: bool) -> None:
    """A guest that uses arrays cannot move to stock QEMU: that says why, and the guest lives on.

    With the return path, which libvirt uses, the source learns of it and goes on by itself;
    without, it may take the migration for complete and has to be told to go on then.
    """
    oracle, source = watched(lab)
    keep_busy(source)
    refuses = oracle.arrival(qemu="stock", balloon=STOCK_BALLOON)
    with pytest.raises(MigrationError, match="(?s)[Ff]eatures 0x.* unsupported"):
        migrate(source, refuses, WITH_HINTS.with_common(return_path=return_path))
    # "Completed" is reported a moment before the state of the guest changes.
    while (status := source.qmp("query-status")["status"]) == "finish-migrate":
        time.sleep(0.01)
    assert status == "running" or (status == "postmigrate" and not return_path)
    if status == "postmigrate":
        source.qmp("cont")
    assert_whole(source)
    # And can move to where it can go.
    assert_hints_used(migrate_watched(oracle), FREED_MIB * MIB)
    assert_whole(oracle.destination)


# The device, as a guest and as a destination see it. A machine type is the promise of one.

# What stock QEMU knows, and what is the same with ours: only the iothread is not needed.
SAME = {"off": ("free-page-hint=off", "free-page-hint=off"), "on": (STOCK_BALLOON, BLOCKS)}
MACHINES = ("pc-q35-10.0", "pc-q35-9.2", "pc-i440fx-10.0", "pc-i440fx-9.2")
each_machine = pytest.mark.parametrize("machine", MACHINES)
# A clock that is the same each time.
CLOCK = ("-rtc", "base=2000-01-01,clock=vm")
CONFIG_BYTES = 256
# The name, behind its length, of what is sent first when the guest has stopped.
FIRST_DEVICE = b"\x05timer"
QUEUES = 8
# The ports of its largest layout, and more.
PORTS = 128


def balloon_in(guest: Guest) -> Balloon:
    """The balloon of a bare-metal guest that has just been started."""
    machine = Machine(guest)
    machine.wait_ready()
    return Balloon(machine)


def seen_by_guest(lab: Lab, name: str, **changes: Any) -> Dict[str, Any]:
    """The balloon's PCI configuration, registers and features, read by a guest's program."""
    guest = lab.launch(bare_metal(**changes), name)
    device = balloon_in(guest)

    def pci(slot: int, register: int) -> int:
        device.machine.write_port(0xCF8, 0x80000000 | slot << 11 | register, 32)
        return device.machine.read_port(0xCFC, 32)

    slot = next(slot for slot in range(32) if pci(slot, 0) == Balloon.VENDOR_DEVICE)
    seen: Dict[str, Any] = {"features": device.get(Balloon.DEVICE_FEATURES)}
    seen["PCI configuration"] = [pci(slot, register) for register in range(0, CONFIG_BYTES, 4)]
    for queue in range(QUEUES):
        device.set(Balloon.QUEUE_SELECT, queue, 16)
        seen[f"size of queue {queue}"] = device.get(Balloon.QUEUE_SIZE, 16)
    seen["registers"] = [device.get(port, 8) for port in range(Balloon.CONFIG, PORTS)]
    known = guest.qmp("x-query-virtio")
    (path,) = (entry["path"] for entry in known if entry["name"] == "virtio-balloon")
    status = guest.qmp("x-query-virtio-status", path=path)
    guest.close()
    return {**seen, "host-features": status["host-features"], "num-vqs": status["num-vqs"]}


@pytest.mark.check
@pytest.mark.parametrize("name", SAME)
@each_machine
def test_guest_sees_the_same_device(lab: Lab, machine: str, name: str) -> None:
    """With a machine type, registers, queues and features are the same as stock QEMU's with it.

    Unless arrays are asked for: no machine type has them by itself.
    """
    stock, ours = (
        seen_by_guest(lab, build, qemu=build, machine=machine, balloon=balloon)
        for build, balloon in zip(BUILDS, SAME[name])
    )
    assert ours == stock
    assert stock["num-vqs"] == (4 if name == "on" else 3)
    # The premise: a difference would be seen. With arrays, there is one feature more.
    arrays = seen_by_guest(lab, "arrays", machine=machine, balloon=ARRAYS)
    assert arrays["features"] == stock["features"] | Balloon.HINTS | Balloon.ARRAYS


def test_machine_types_differ(lab: Lab) -> None:
    """The premise of all that is done with several machine types: their balloons are not the same.

    Nor is it a premise only: a balloon of 9.2 has no interrupt vectors, one of 10.0 has.
    """
    old, new = (
        seen_by_guest(lab, machine, machine=machine, balloon=BLOCKS)
        for machine in ("pc-q35-9.2", "pc-q35-10.0")
    )
    assert old != new
    assert old["features"] == new["features"]


@pytest.mark.check
@pytest.mark.parametrize("name", SAME)
@each_machine
def test_stream_is_the_same(lab: Lab, tmp_path: Path, machine: str, name: str) -> None:
    """Byte by byte, the devices of a guest that never ran are sent as stock QEMU sends them."""
    streams = {}
    for run, build, balloon in (
        ("stock", "stock", SAME[name][0]),
        ("stock again", "stock", SAME[name][0]),
        ("ours", "ours", SAME[name][1]),
        ("arrays", "ours", ARRAYS),
    ):
        spec = bare_metal(qemu=build, machine=machine, balloon=balloon, args=CLOCK)
        guest = lab.launch(spec, run.replace(" ", "-"), running=False)
        save(guest, tmp_path / run, MigrationSpec())
        stream = (tmp_path / run).read_bytes()
        # How the pages of RAM, which are sent before, are cut into sections is a matter of time.
        streams[run] = stream[stream.index(FIRST_DEVICE) :]
        guest.close()
    # The premise: it can be compared.
    assert streams["stock"] == streams["stock again"]
    assert streams["ours"] == streams["stock"]
    # A queue more is seen. Arrays change nothing: they are a feature, and no state.
    assert (streams["arrays"] == streams["stock"]) == (name == "on")


SUBSECTION = b"virtio-balloon-device/free-page-report" + struct.pack(">I", 1)
# After it: the id of the last request, and whether it is over.
REQUEST_BYTES = 4
VERSION = ("name", "instance_id", "vmsd_name", "version")


def balloon_section(lab: Lab, file: Path, **changes: Any) -> Dict[str, Any]:
    """The stream's description and the balloon in it, for a guest that was asked for hints."""
    guest = lab.launch(bare_metal(**changes), file.name)
    device = balloon_in(guest)
    device.start(Balloon.HINTS & device.get(Balloon.DEVICE_FEATURES))
    # The guest does not answer.
    wait = {"free-page-hint-wait": 1} if guest.spec.qemu == "ours" else {}
    save(guest, file, MigrationSpec(parameters=wait))
    guest.close()
    tool = paths.cache_dir() / "src" / "qemu" / "scripts" / "analyze-migration.py"
    state, description = (
        json.loads(subprocess.check_output([sys.executable, tool, "-f", file, "-d", what]))
        for what in ("state", "desc")
    )
    (section,) = (name for name in state if "virtio-balloon" in name)
    return {
        "sections": list(state),
        "versions": [[d.get(key) for key in VERSION] for d in description["devices"]],
        "description": [d for d in description["devices"] if "balloon" in d["name"]],
        "bytes": bytearray.fromhex(state[section]["virtio"]),
    }


@pytest.mark.check
@pytest.mark.parametrize("name", SAME)
@each_machine
def test_state_of_a_used_balloon_is_the_same(
    lab: Lab, tmp_path: Path, machine: str, name: str
) -> None:
    """A balloon that its guest has set up, and was asked through, is saved as stock QEMU saves it.

    The same sections and versions, the same bytes: all but the number of requests that were made,
    which is one with us and may be more with stock QEMU.
    """
    stock, ours = (
        balloon_section(lab, tmp_path / build, qemu=build, machine=machine, balloon=balloon)
        for build, balloon in zip(BUILDS, SAME[name])
    )
    # The premise: both have the subsection, if they have hints.
    offset = stock["bytes"].find(SUBSECTION)
    assert (offset > 0) == (name == "on")
    if name == "on":
        offset += len(SUBSECTION)
        for section in (stock, ours):
            section["bytes"][offset : offset + REQUEST_BYTES] = bytes(REQUEST_BYTES)
    assert ours == stock


@pytest.mark.parametrize("machine", in_check(MACHINES, long=MACHINES[2:]))
def test_machine_type_moves_both_ways(lab: Lab, measured: Dict[str, Any], machine: str) -> None:
    """A guest with our driver moves to stock QEMU with the same machine type, and back, with hints.

    Nothing is set on our QEMU but that there are hints: what stock does not know is off.
    """
    spec = SMALL.but(machine=machine, balloon=BLOCKS)
    source = keep_busy(lab.boot(spec))
    stock = lab.incoming(spec.but(qemu="stock", balloon=STOCK_BALLOON), "stock")
    hints = assert_hints_used(migrate(source, stock, WITH_HINTS), FREED_MIB * MIB)
    # The driver that knows arrays did not use them: a message for each block.
    assert hints.messages == hints.blocks
    source.close()
    assert_goes_on(stock)

    destination = lab.incoming(spec)
    migrate(stock, destination, FOR_STOCK)
    stock.close()
    assert_goes_on(destination)
    workload.dirty_and_free(destination, FREED_MIB)
    onward = lab.incoming(spec, "onward")
    hints = assert_hints_used(migrate(destination, onward, WITH_HINTS), FREED_MIB * MIB)
    measured.update(blocks=hints.blocks, skipped_bytes=hints.skipped_bytes)
    assert_whole(onward)


def test_iothread_is_deprecated(lab: Lab, tmp_path: Path) -> None:
    """The iothread that stock QEMU demands is accepted with a warning, and changes nothing else."""
    seen, sections = [], []
    for name, balloon in ("without", BLOCKS), ("with", STOCK_BALLOON):
        seen.append(seen_by_guest(lab, name, balloon=balloon))
        warning = "warning: virtio-balloon: 'iothread' is deprecated"
        assert (warning in lab.guests[-1].qemu_output()) == (name == "with")
        sections.append(balloon_section(lab, tmp_path / name, balloon=balloon))
    assert seen[0] == seen[1]
    assert sections[0] == sections[1]
