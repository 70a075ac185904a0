# SPDX-License-Identifier: GPL-2.0-or-later
"""In postcopy, hinted and absent pages are sent only when the destination asks, as zeros.

A bare-metal guest knows exactly what it hinted, and what it touches after the switch.
"""

import contextlib
import socket
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Dict, Iterator, Tuple

import pytest

from livemig import paths
from livemig.balloon import Balloon
from livemig.checks import hints_now, wait_hints_ended
from livemig.errors import MissingArtifact
from livemig.guest import Guest
from livemig.lab import Lab
from livemig.machine import MIB, PAGE
from livemig.metal import HELD, Metal, held, metal, tcg_at_least
from livemig.migration import POSTCOPY, MigrationResult, finish, query, set_capabilities, start
from livemig.migration import status_is
from livemig.spec import BLOCKS, MigrationSpec

MEM_MIB = 256
MEM_PAGES = MEM_MIB * MIB // PAGE
# What is hinted, after the program and its queue; and what is not.
FREE = 16 * MIB
FREE_PAGES = 128 * MIB // PAGE
KEPT = 160 * MIB
KEPT_PAGES = 32 * MIB // PAGE
# Hinted pages that the guest uses after the switch. Over a slow link, an answer without preempt
# waits behind some 30 other pages: too many, and postcopy is over.
USED_PAGES = 48
USED = (FREE, USED_PAGES, 5)
# Hinted pages that it wrote again before that.
WRITTEN = FREE + 64 * MIB
WRITTEN_PAGES = 256

# Has multifd with postcopy.
MULTIFD_QEMU = "ours-10.2"
# On a busy machine, the guest is done before postcopy can be ended once in seven times.
ATTEMPTS = 6


@dataclass
class Switched:
    """A guest that runs at its destination, most of its memory not there yet."""

    guest: Metal
    destination: Guest
    # Pages that had been sent when it was switched over.
    before: int

    def let_go(self, measured: Dict[str, Any]) -> MigrationResult:
        """Let the rest come; measures pages that were sent since, and that memory is made of."""
        source = self.guest.source
        source.qmp("migrate-set-parameters", max_bandwidth=0, max_postcopy_bandwidth=0)
        result = finish(source, self.destination)
        measured.update(
            sent=result.normal_pages + result.zero_pages - self.before,
            requested=hints_now(source).requested_bytes // PAGE,
            resident=self.guest.files[1].stat().st_blocks * 512 // PAGE,
        )
        return result

    def assert_whole(self, *used: Tuple[int, int, int]) -> None:
        """What was kept, written before the switch, or used after it (addresses, pages, seeds)."""
        for stamp in ((KEPT, KEPT_PAGES, 2), (WRITTEN, WRITTEN_PAGES, 3), *used):
            assert self.guest.machine.wrong_pages(*stamp) == 0


def _spec(way: str, absent: bool = False) -> MigrationSpec:
    spec = held(free_page_hint=not absent, skip_absent_pages=absent)
    more = {"postcopy-preempt": "preempt" in way, "multifd": "multifd" in way}
    spec = spec.with_common(postcopy_ram=True, **more)
    return spec.with_parameters(max_postcopy_bandwidth=HELD)


def _hint(guest: Metal) -> None:
    balloon = guest.balloon
    cmd_id = balloon.wait_asked()
    balloon.begin(cmd_id)
    if balloon.arrays:
        balloon.send_array(cmd_id, 2 * MIB, range(FREE, FREE + FREE_PAGES * PAGE, 2 * MIB))
    else:
        balloon.send_block(FREE, FREE_PAGES * PAGE)
    balloon.queue.wait_returned()
    balloon.end(cmd_id)
    assert wait_hints_ended(guest.source).skipped_bytes == FREE_PAGES * PAGE


@contextlib.contextmanager
def switched(
    lab: Lab, accel: str, way: str, absent: bool = False, arrival: Any = None, **changes: Any
) -> Iterator[Switched]:
    """A guest whose free memory was hinted, all of it full of data, switched over in round 1.

    Or it was never populated, and is absent. The destination may differ.
    """
    with metal(lab, accel=accel, mem_mib=MEM_MIB, **changes) as guest:
        if not absent:
            guest.machine.stamp(FREE, FREE_PAGES, 1)
        guest.machine.stamp(KEPT, KEPT_PAGES, 2)
        destination = guest.incoming(running=True, **arrival or {})
        start(guest.source, destination, _spec(way, absent))
        if absent:
            wait_hints_ended(guest.source)
            found = query(guest.source).absent
            assert found and found.absent_bytes >= FREE_PAGES * PAGE
        else:
            _hint(guest)
        guest.machine.stamp(WRITTEN, WRITTEN_PAGES, 3)
        before = query(guest.source)
        assert before.status == "active"
        guest.source.qmp("migrate-start-postcopy")
        destination.wait_event(lambda event: event["event"] == "RESUME", "postcopy", 60)
        guest.machine.moved_to(destination)
        yield Switched(guest, destination, before.normal_pages + before.zero_pages)


each_way = pytest.mark.parametrize("way", ["plain", "preempt"])
each_source = pytest.mark.parametrize("absent", [False, True], ids=["hinted", "absent"])


@tcg_at_least
@each_way
@each_source
def test_nobody_asks(
    lab: Lab, measured: Dict[str, Any], accel: str, way: str, absent: bool
) -> None:
    """Hinted pages that nobody asks for are not sent, and not populated; all others arrive."""
    with switched(lab, accel, way, absent) as there:
        there.let_go(measured)
        assert measured["requested"] == 0
        hinted = FREE_PAGES - WRITTEN_PAGES
        assert measured["sent"] <= MEM_PAGES - hinted
        assert measured["resident"] <= MEM_PAGES - hinted
        there.assert_whole()


def use_and_let_go(there: Switched, measured: Dict[str, Any]) -> MigrationResult:
    """Use hinted pages, which come at once and as zeros, then let the rest come."""
    machine, source = there.guest.machine, there.guest.source
    for page in range(0, USED_PAGES, 16):
        assert machine.read(FREE + page * PAGE, 2) == [0, 0]
    machine.stamp(*USED)
    assert machine.wrong_pages(WRITTEN, WRITTEN_PAGES, 3) == 0
    # The premise: postcopy is far from its end.
    assert query(source).status in POSTCOPY
    assert hints_now(source).requested_bytes == USED_PAGES * PAGE
    result = there.let_go(measured)
    there.assert_whole(USED)
    # What nobody asked for is zero as well, now that nobody can be asked.
    assert machine.read(FREE + USED_PAGES * PAGE, 2) == [0, 0]
    return result


@tcg_at_least
@each_way
@each_source
def test_asked_for(lab: Lab, measured: Dict[str, Any], accel: str, way: str, absent: bool) -> None:
    """A hinted page that the guest uses after the switch comes at once, once, and as zeros.

    A hinted page that was written before the switch comes with what was written.
    """
    with switched(lab, accel, way, absent) as there:
        use_and_let_go(there, measured)
        assert measured["sent"] <= MEM_PAGES - (FREE_PAGES - USED_PAGES)


@tcg_at_least
@pytest.mark.parametrize("way", ["multifd", "multifd-preempt"])
def test_asked_for_with_multifd(lab: Lab, measured: Dict[str, Any], accel: str, way: str) -> None:
    """Also where multifd has sent the rest, a hinted page that is asked for comes as zeros.

    It has contents at the source, and multifd looks for zeros itself, as long as it sends.
    """
    try:
        paths.qemu_binary(MULTIFD_QEMU)
    except MissingArtifact as err:
        pytest.skip(str(err))
    with switched(lab, accel, way, qemu=MULTIFD_QEMU) as there:
        result = use_and_let_go(there, measured)
        # The premise: multifd had a part in it.
        measured["multifd"] = result.raw["ram"]["multifd-bytes"]
        assert measured["multifd"] > 0


@tcg_at_least
@each_way
def test_asked_for_at_the_end(lab: Lab, measured: Dict[str, Any], accel: str, way: str) -> None:
    """A guest that uses hinted pages while postcopy ends is not left waiting, nor is postcopy."""
    used = (FREE, FREE_PAGES // 2, 6)
    for attempt in range(ATTEMPTS):
        measured["attempt"] = attempt
        with switched(lab, accel, way) as there:
            machine = there.guest.machine
            using = machine.start("stamp", *used)
            while hints_now(there.guest.source).requested_bytes == 0:
                pass
            there.let_go(measured)
            machine.answer(using)
            there.assert_whole(used)
        # The premise: it asked before the end, and was not done by then.
        assert measured["requested"] > 0
        if measured["requested"] < FREE_PAGES // 2:
            return
    pytest.fail("each time, the guest was done before the end")


@tcg_at_least
@each_way
@each_source
def test_asked_for_around_a_cut_link(
    lab: Lab, measured: Dict[str, Any], accel: str, way: str, absent: bool
) -> None:
    """After a cut link, hinted pages still come when they are asked for, and only then."""
    with switched(lab, accel, way, absent) as there:
        source, destination = there.guest.source, there.destination
        machine = there.guest.machine
        machine.stamp(*USED)
        source.qmp_oob("migrate-pause")
        source.wait_event(status_is("postcopy-paused"), "the source's pause", 60)
        destination.wait_event(status_is("postcopy-paused"), "the destination's pause", 60)
        # Waits for a page while there is nobody to ask.
        used_then = (FREE + USED_PAGES * PAGE, USED_PAGES, 6)
        using = machine.start("stamp", *used_then)
        uri = f"unix:{lab.logs}/again"
        destination.qmp_oob("migrate-recover", uri=uri)
        source.qmp("migrate", uri=uri, resume=True)
        machine.answer(using)
        there.let_go(measured)
        assert "free_page_hint_reloaded block 'pc.ram'" in source.trace_log.read_text()
        assert measured["requested"] >= 2 * USED_PAGES
        untouched = FREE_PAGES - 2 * USED_PAGES - WRITTEN_PAGES
        assert measured["resident"] <= MEM_PAGES - untouched
        there.assert_whole(USED, used_then)


@tcg_at_least
@each_way
def test_stock_destination(lab: Lab, measured: Dict[str, Any], accel: str, way: str) -> None:
    """A destination without our patches gets its hinted pages all the same."""
    stock = {"qemu": "stock", "trace": None, "balloon": f"{BLOCKS},iothread=hints"}
    here = {"features": Balloon.HINTS, "balloon": BLOCKS}
    with switched(lab, accel, way, arrival=stock, **here) as there:
        there.guest.machine.stamp(*USED)
        assert hints_now(there.guest.source).requested_bytes == USED_PAGES * PAGE
        there.let_go(measured)
        untouched = FREE_PAGES - USED_PAGES - WRITTEN_PAGES
        assert measured["resident"] <= MEM_PAGES - untouched
        there.assert_whole(USED)


def pass_on(one: socket.socket, other: socket.socket, gate: threading.Event) -> None:
    """Pass on what comes from one end to the other one, while the gate is open."""
    with contextlib.suppress(OSError):
        while data := one.recv(1 << 16):
            gate.wait()
            other.sendall(data)
        other.shutdown(socket.SHUT_WR)


def relay(listener: socket.socket, there: Path) -> threading.Event:
    """Pass a migration on; returns the gate that the destination's answers go through."""
    source, _ = listener.accept()
    destination = socket.socket(socket.AF_UNIX)
    destination.connect(str(there))
    way_there, way_back = threading.Event(), threading.Event()
    for one, other, gate in (source, destination, way_there), (destination, source, way_back):
        gate.set()
        threading.Thread(target=pass_on, args=(one, other, gate), daemon=True).start()
    return way_back


@tcg_at_least
def test_asked_for_by_a_device(lab: Lab, measured: Dict[str, Any], accel: str) -> None:
    """A hinted page that a device of the destination looks at while it is loaded is sent too.

    Even if its request comes when all else was sent, and postcopy could end.
    """
    with metal(lab, accel=accel, mem_mib=MEM_MIB) as guest:
        source = guest.source
        guest.machine.stamp(KEPT, KEPT_PAGES, 2)
        # A queue that nobody ever wrote to, in memory that is hinted.
        guest.balloon.set(Balloon.QUEUE_SELECT, 0, 16)
        guest.balloon.set(Balloon.QUEUE_PAGE, FREE // PAGE)
        destination = guest.incoming(running=True)
        here, there = (lab.logs / name for name in ("relay", "there"))
        listener = socket.create_server(str(here), family=socket.AF_UNIX)
        listener.settimeout(60)
        spec = _spec("plain")
        for side in (source, destination):
            set_capabilities(side, {"events": True, **spec.common})
        destination.qmp("migrate-incoming", uri=f"unix:{there}")
        source.qmp_dict("migrate-set-parameters", dict(spec.parameters))
        source.qmp("migrate", uri=f"unix:{here}")
        way_back = relay(listener, there)
        _hint(guest)
        way_back.clear()
        source.qmp("migrate-start-postcopy")
        source.wait_event(status_is(*POSTCOPY), "postcopy", 60)
        source.qmp("migrate-set-parameters", max_bandwidth=0, max_postcopy_bandwidth=0)
        # The premise: all is sent, for a while already, and the destination's answers are not here.
        while query(source).raw["ram"]["remaining"]:
            time.sleep(0.1)
        time.sleep(0.5)
        assert query(source).status in POSTCOPY
        assert hints_now(source).requested_bytes == 0
        way_back.set()
        finish(source, destination, timeout=30)
        measured["requested"] = hints_now(source).requested_bytes // PAGE
        # The premise: the device did look.
        assert measured["requested"] > 0
        guest.machine.moved_to(destination)
        assert guest.machine.wrong_pages(KEPT, KEPT_PAGES, 2) == 0
