# SPDX-License-Identifier: GPL-2.0-or-later
"""In postcopy, hinted and absent pages are sent only when the destination asks, as zeros.

A bare-metal guest knows exactly what it hinted, and what it touches after the switch.
"""

import contextlib
import socket
import threading
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Dict, Iterator, Optional

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
from livemig.spec import MigrationSpec

MEM_MIB = 256
# What is hinted, after the program and its queue; and what is not.
FREE = 16 * MIB
FREE_PAGES = 128 * MIB // PAGE
KEPT = 160 * MIB
KEPT_PAGES = 32 * MIB // PAGE
# Hinted pages that the guest uses after the switch. Over a slow link, an answer without preempt
# waits behind some 30 other pages: too many, and postcopy is over.
USED_PAGES = 48
# Hinted pages that it wrote again before that.
WRITTEN = FREE + 64 * MIB
WRITTEN_PAGES = 256

# Capabilities on both sides.
WAYS = {
    "plain": {},
    "preempt": {"postcopy-preempt": True},
    "multifd": {"multifd": True},
    "multifd-preempt": {"multifd": True, "postcopy-preempt": True},
}
# Has multifd with postcopy.
MULTIFD_QEMU = "ours-10.2"
# On a busy machine, the guest is done before postcopy can be ended once in seven times.
ATTEMPTS = 6


@dataclass
class Switched:
    """A guest that runs at its destination, most of its memory not there yet."""

    guest: Metal
    destination: Guest
    # What had been sent when it was switched over.
    before: MigrationResult

    def let_go(self) -> MigrationResult:
        """Let the rest come."""
        source = self.guest.source
        source.qmp("migrate-set-parameters", max_bandwidth=0, max_postcopy_bandwidth=0)
        return finish(source, self.destination)

    def sent_since(self, result: MigrationResult) -> int:
        """Pages that were sent after the switch."""
        before = self.before.normal_pages + self.before.zero_pages
        return result.normal_pages + result.zero_pages - before

    def resident_pages(self) -> int:
        """Pages that the destination's memory is made of."""
        return Path(self.guest.files[1]).stat().st_blocks * 512 // PAGE


def _spec(way: str, absent: bool = False) -> MigrationSpec:
    return replace(
        held(free_page_hint=not absent, skip_absent_pages=absent),
        common={"postcopy-ram": True, **WAYS[way]},
    ).with_parameters(max_postcopy_bandwidth=HELD)


def _hint(guest: Metal) -> None:
    cmd_id = guest.balloon.wait_asked()
    guest.balloon.send_array(cmd_id, 2 * MIB, range(FREE, FREE + FREE_PAGES * PAGE, 2 * MIB))
    guest.balloon.send_end(cmd_id)
    assert wait_hints_ended(guest.source).skipped_bytes == FREE_PAGES * PAGE


@contextlib.contextmanager
def switched(
    lab: Lab, accel: str, way: str, absent: bool = False, **changes: Any
) -> Iterator[Switched]:
    """A guest whose free memory was hinted, all of it full of data, switched over in round 1.

    Or it was never populated, and is absent.
    """
    with metal(lab, accel=accel, mem_mib=MEM_MIB, **changes) as guest:
        if not absent:
            guest.machine.stamp(FREE, FREE_PAGES, 1)
        guest.machine.stamp(KEPT, KEPT_PAGES, 2)
        there = guest.source.spec.but(mem_file=guest.files[1])
        destination = lab.incoming(there, "destination")
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
        yield Switched(guest, destination, before)


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
        result = there.let_go()
        hints = hints_now(there.guest.source)
        resident = there.resident_pages()
        measured.update(sent=there.sent_since(result), resident=resident)
        assert hints.requested_bytes == 0
        hinted = FREE_PAGES - WRITTEN_PAGES
        assert there.sent_since(result) <= MEM_MIB * 256 - hinted
        assert resident <= MEM_MIB * 256 - hinted
        machine = there.guest.machine
        assert machine.wrong_pages(KEPT, KEPT_PAGES, 2) == 0
        assert machine.wrong_pages(WRITTEN, WRITTEN_PAGES, 3) == 0


@tcg_at_least
@each_way
@each_source
def test_asked_for(lab: Lab, measured: Dict[str, Any], accel: str, way: str, absent: bool) -> None:
    """A hinted page that the guest uses after the switch comes at once, once, and as zeros.

    A hinted page that was written before the switch comes with what was written.
    """
    with switched(lab, accel, way, absent) as there:
        machine = there.guest.machine
        for page in range(0, USED_PAGES, 16):
            assert machine.read(FREE + page * PAGE, 2) == [0, 0]
        machine.stamp(FREE, USED_PAGES, 5)
        assert machine.wrong_pages(WRITTEN, WRITTEN_PAGES, 3) == 0
        # The premise: postcopy is far from its end.
        assert query(there.guest.source).status in POSTCOPY
        hints = hints_now(there.guest.source)
        assert hints.requested_bytes == USED_PAGES * PAGE
        result = there.let_go()
        measured.update(sent=there.sent_since(result), resident=there.resident_pages())
        assert there.sent_since(result) <= MEM_MIB * 256 - (FREE_PAGES - USED_PAGES)
        assert machine.wrong_pages(FREE, USED_PAGES, 5) == 0
        assert machine.wrong_pages(KEPT, KEPT_PAGES, 2) == 0
        # What nobody asked for is zero as well, now that nobody can be asked.
        assert machine.read(FREE + USED_PAGES * PAGE, 2) == [0, 0]


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
        machine = there.guest.machine
        for page in range(0, USED_PAGES, 16):
            assert machine.read(FREE + page * PAGE, 2) == [0, 0]
        machine.stamp(FREE, USED_PAGES, 5)
        assert machine.wrong_pages(WRITTEN, WRITTEN_PAGES, 3) == 0
        assert hints_now(there.guest.source).requested_bytes == USED_PAGES * PAGE
        result = there.let_go()
        # The premise: multifd had a part in it.
        measured["multifd"] = result.raw["ram"]["multifd-bytes"]
        assert measured["multifd"] > 0
        assert machine.wrong_pages(FREE, USED_PAGES, 5) == 0
        assert machine.wrong_pages(KEPT, KEPT_PAGES, 2) == 0
        assert machine.read(FREE + USED_PAGES * PAGE, 2) == [0, 0]


def pages_asked_for_at_the_end(lab: Lab, accel: str, way: str) -> int:
    """End postcopy while the guest uses hinted pages; returns how many it had to ask for."""
    with switched(lab, accel, way) as there:
        machine = there.guest.machine
        using = machine.start("stamp", FREE, FREE_PAGES // 2, 6)
        while hints_now(there.guest.source).requested_bytes == 0:
            pass
        there.let_go()
        machine.answer(using)
        assert machine.wrong_pages(FREE, FREE_PAGES // 2, 6) == 0
        assert machine.wrong_pages(KEPT, KEPT_PAGES, 2) == 0
        assert machine.wrong_pages(WRITTEN, WRITTEN_PAGES, 3) == 0
        return hints_now(there.guest.source).requested_bytes // PAGE


@tcg_at_least
@each_way
def test_asked_for_at_the_end(lab: Lab, measured: Dict[str, Any], accel: str, way: str) -> None:
    """A guest that uses hinted pages while postcopy ends is not left waiting, nor is postcopy."""
    for attempt in range(ATTEMPTS):
        requested = pages_asked_for_at_the_end(lab, accel, way)
        measured.update(requested=requested, attempt=attempt)
        # The premise: it asked before the end, and was not done by then.
        assert requested > 0
        if requested < FREE_PAGES // 2:
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
        machine.stamp(FREE, USED_PAGES, 5)
        source.qmp_oob("migrate-pause")
        source.wait_event(status_is("postcopy-paused"), "the source's pause", 60)
        destination.wait_event(status_is("postcopy-paused"), "the destination's pause", 60)
        # Waits for a page while there is nobody to ask.
        using = machine.start("stamp", FREE + USED_PAGES * PAGE, USED_PAGES, 6)
        uri = f"unix:{lab.logs}/again"
        destination.qmp_oob("migrate-recover", uri=uri)
        source.qmp("migrate", uri=uri, resume=True)
        machine.answer(using)
        result = there.let_go()
        hints = hints_now(source)
        measured.update(
            sent=there.sent_since(result),
            requested=hints.requested_bytes // PAGE,
            resident=there.resident_pages(),
        )
        assert "free_page_hint_reloaded block 'pc.ram'" in source.trace_log.read_text()
        assert hints.requested_bytes >= 2 * USED_PAGES * PAGE
        untouched = FREE_PAGES - 2 * USED_PAGES - WRITTEN_PAGES
        assert there.resident_pages() <= MEM_MIB * 256 - untouched
        assert machine.wrong_pages(FREE, USED_PAGES, 5) == 0
        assert machine.wrong_pages(FREE + USED_PAGES * PAGE, USED_PAGES, 6) == 0
        assert machine.wrong_pages(KEPT, KEPT_PAGES, 2) == 0
        assert machine.wrong_pages(WRITTEN, WRITTEN_PAGES, 3) == 0


@tcg_at_least
@each_way
def test_stock_destination(lab: Lab, accel: str, way: str) -> None:
    """A destination without our patches gets its hinted pages all the same."""
    blocks = "free-page-hint=on"
    with metal(lab, Balloon.HINTS, accel=accel, mem_mib=MEM_MIB, balloon=blocks) as guest:
        guest.machine.stamp(FREE, FREE_PAGES, 1)
        guest.machine.stamp(KEPT, KEPT_PAGES, 2)
        stock = guest.source.spec.but(
            qemu="stock", mem_file=guest.files[1], trace=None, balloon=f"{blocks},iothread=hints"
        )
        destination = lab.incoming(stock, "destination")
        start(guest.source, destination, _spec(way))
        cmd_id = guest.balloon.wait_asked()
        guest.balloon.send_command(cmd_id)
        guest.balloon.send_block(FREE, FREE_PAGES * PAGE)
        guest.balloon.queue.wait_returned()
        guest.balloon.send_command(cmd_id)
        assert wait_hints_ended(guest.source).skipped_bytes == FREE_PAGES * PAGE
        guest.source.qmp("migrate-start-postcopy")
        destination.wait_event(lambda event: event["event"] == "RESUME", "postcopy", 60)
        guest.machine.moved_to(destination)
        guest.machine.stamp(FREE, USED_PAGES, 5)
        assert hints_now(guest.source).requested_bytes == USED_PAGES * PAGE
        there = Switched(guest, destination, query(guest.source))
        there.let_go()
        assert there.resident_pages() <= MEM_MIB * 256 - (FREE_PAGES - USED_PAGES)
        assert guest.machine.wrong_pages(FREE, USED_PAGES, 5) == 0
        assert guest.machine.wrong_pages(KEPT, KEPT_PAGES, 2) == 0


class SlowWayBack:
    """Passes a migration on, and what the destination answers only while it is let through."""

    def __init__(self, here: Path, there: Path):
        self.open = threading.Event()
        self.open.set()
        self._there = there
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(here))
        self._listener.listen(1)
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        source, _ = self._listener.accept()
        destination = socket.socket(socket.AF_UNIX)
        destination.connect(str(self._there))
        threading.Thread(target=self._pass, args=(source, destination), daemon=True).start()
        self._pass(destination, source, self.open)

    @staticmethod
    def _pass(one: socket.socket, other: socket.socket, gate: Optional[Any] = None) -> None:
        with contextlib.suppress(OSError):
            while data := one.recv(1 << 16):
                if gate:
                    gate.wait()
                other.sendall(data)
            other.shutdown(socket.SHUT_WR)


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
        destination = lab.incoming(source.spec.but(mem_file=guest.files[1]), "destination")
        relay = SlowWayBack(lab.logs / "relay", lab.logs / "there")
        spec = _spec("plain")
        for side in (source, destination):
            set_capabilities(side, {"events": True, **spec.common})
        destination.qmp("migrate-incoming", uri=f"unix:{lab.logs}/there")
        source.qmp_dict("migrate-set-parameters", dict(spec.parameters))
        source.qmp("migrate", uri=f"unix:{lab.logs}/relay")
        _hint(guest)
        relay.open.clear()
        source.qmp("migrate-start-postcopy")
        source.wait_event(status_is(*POSTCOPY), "postcopy", 60)
        source.qmp("migrate-set-parameters", max_bandwidth=0, max_postcopy_bandwidth=0)
        # The premise: all is sent, for a while already, and the destination's answers are not here.
        while query(source).raw["ram"]["remaining"]:
            time.sleep(0.1)
        time.sleep(0.5)
        assert query(source).status in POSTCOPY
        assert hints_now(source).requested_bytes == 0
        relay.open.set()
        finish(source, destination, timeout=30)
        measured["requested"] = hints_now(source).requested_bytes // PAGE
        # The premise: the device did look.
        assert measured["requested"] > 0
        guest.machine.moved_to(destination)
        assert guest.machine.wrong_pages(KEPT, KEPT_PAGES, 2) == 0
