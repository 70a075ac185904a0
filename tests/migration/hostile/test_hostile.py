# SPDX-License-Identifier: GPL-2.0-or-later
"""A guest that lies about its free pages, in each way that there is, harms its own data only.

`make test` runs a short slice of the random part; `make hostile` runs it at length: FPH_REPEAT is
how often, from the seed FPH_SEED on, and FPH_SECONDS how long a flood lasts.
"""

import os
import random
import re
import struct
import time
from dataclasses import dataclass
from typing import Any, Callable, Dict, List, Sequence, Tuple

import pytest

from livemig import memory
from livemig.balloon import Balloon, Descriptor, chain
from livemig.checks import assert_not_asked, hints_now, hints_of, in_check, wait_hints_ended
from livemig.guest import Guest
from livemig.host import process_mib
from livemig.lab import Lab
from livemig.machine import MIB, PAGE
from livemig.metal import CHECK_EVENT, FIRST_ID, REGION, STRIP_BYTES, TO_NOWHERE, Metal, addrs_of
from livemig.metal import ask_meanwhile, assert_counters_match, each_accelerator, held, let_go
from livemig.metal import lost_strips, metal, set_up, tcg_at_least, wait_hinted, written_metal
from livemig.migration import cancel, query, start

REPEAT = int(os.environ.get("FPH_REPEAT", "1"))
FIRST_SEED = int(os.environ.get("FPH_SEED", "1"))
FLOOD_SECONDS = float(os.environ.get("FPH_SECONDS", "1"))

# Not a multiple of a large block: the last one has an end without RAM.
MEM_MIB = 130
RAM_END = MEM_MIB * MIB
LARGE = 4 * MIB

FIRMWARE = 0xFFFF0000
IO_APIC = 0xFEC00000
LOCAL_APIC = 0xFEE00000
NOTHING = 0x1_0000_0000
MAX_ADDRS = 16384

# Memory that some cases hint, well away from what they must not touch.
A = REGION
STALE_ID = 0x7FFFFFFF


def assert_alive(guest: Guest) -> None:
    """QEMU runs, runs the guest, and answers."""
    assert guest.qmp("query-status")["status"] == "running"
    guest.qmp("query-balloon")


# Arrays that say what cannot be


@dataclass(frozen=True)
class Lie:
    """An array, and what is to become of it."""

    name: str
    size: int
    addrs: Sequence[int]
    invalid_bytes: int = 0
    # Pages that are hinted all the same.
    pages: int = 0

    @property
    def malformed(self) -> bool:
        """Whether its block size is none, so that all of it is dropped."""
        return self.size < PAGE or bool(self.size & (self.size - 1))


LIES = [
    Lie("unaligned", PAGE, [A + 1, A + 0x800, A + PAGE - 1], 3 * PAGE),
    Lie("unaligned-large", LARGE, [A + PAGE, A + LARGE - 1, A + LARGE // 2], 3 * LARGE),
    Lie("some-unaligned", PAGE, [A + 1, A, A + 2 * PAGE + 8, A + PAGE], 2 * PAGE, 2),
    Lie("size-0", 0, [A]),
    Lie("size-1", 1, [A]),
    Lie("size-3", 3, [A]),
    Lie("size-below-a-page", PAGE // 2, [A]),
    Lie("size-not-a-power", 3 * PAGE, [A]),
    Lie("size-almost", 0xFFFFFFFF, [A]),
    Lie("size-and-a-bit", 0x80000001, [A]),
    Lie(
        "after-ram",
        PAGE,
        [RAM_END, RAM_END + PAGE, 0xC0000000, NOTHING, 1 << 40, 1 << 52],
        6 * PAGE,
    ),
    Lie("last-page", PAGE, [RAM_END - PAGE], 0, 1),
    Lie(
        "end-of-ram", LARGE, [RAM_END & -LARGE], LARGE - RAM_END % LARGE, (RAM_END % LARGE) // PAGE
    ),
    Lie("wraps", PAGE, [(1 << 64) - PAGE], PAGE),
    Lie("wraps-large", 0x80000000, [(1 << 64) - 0x80000000], 0x80000000),
    Lie("wraps-to-0", PAGE, [0, (1 << 64) - PAGE], PAGE, 1),
    Lie("top", PAGE, [(1 << 64) - 2 * PAGE, (1 << 63)], 2 * PAGE),
    Lie("mmio", PAGE, [LOCAL_APIC, IO_APIC, 0xFED00000], 3 * PAGE),
    Lie("rom", PAGE, [FIRMWARE + i * PAGE for i in range(16)], 16 * PAGE),
    Lie("rom-below-1-mib", PAGE, [0xF0000, 0xFF000], 2 * PAGE),
    Lie("ram-rom-ram", PAGE, [A, FIRMWARE, A + PAGE], PAGE, 2),
    Lie("nothing", PAGE, [], 0),
    Lie("duplicates", PAGE, [A] * 100, 0, 100),
    Lie("overlapping", 2 * PAGE, [A, A, A + 2 * PAGE, A], 0, 8),
    Lie("backwards", PAGE, [A + i * PAGE for i in reversed(range(64))], 0, 64),
    Lie("scattered", PAGE, [A + i * 2 * PAGE for i in range(500)], 0, 500),
    Lie("1-gib", 1 << 30, [1 << 30, 1 << 31], 2 << 30),
]


@pytest.mark.check
@each_accelerator
def test_lies_are_counted(lab: Lab, accel: str) -> None:
    """Addresses that are no RAM and sizes that are none are dropped and counted, one by one.

    What is not hinted arrives, whatever was said beside it.
    """
    with metal(lab, accel=accel, mem_mib=MEM_MIB, qemu="debug") as guest:
        # All RAM but the first 3 MiB, in which the program and its queue live.
        guest.machine.stamp(3 * MIB, (MEM_MIB - 3) * 256, 1)
        destination, cmd_id = guest.ask()
        wrong = {}
        for lie in LIES:
            before = hints_now(guest.source)
            guest.balloon.send_array(cmd_id, lie.size, lie.addrs)
            guest.balloon.queue.wait_returned()
            hinted = before.hinted_bytes + lie.pages * PAGE
            after = wait_hinted(guest.source, hinted)
            expected = (
                before.invalid_bytes + lie.invalid_bytes,
                before.invalid_messages + lie.malformed,
                hinted,
            )
            found = (after.invalid_bytes, after.invalid_messages, after.hinted_bytes)
            if found != expected:
                wrong[lie.name] = {"expected": expected, "found": found}
        assert not wrong
        guest.balloon.send_end(cmd_id)
        assert wait_hints_ended(guest.source).reason is None
        assert hints_of(let_go(guest.source, destination)).stale_bytes == 0
        assert_only_ram(guest, destination)
        assert_counters_match(guest.source)


def assert_only_ram(guest: Metal, destination: Guest) -> None:
    """Pages of the guest's RAM were taken out only, and all others arrived."""
    text = guest.source.trace_log.read_text()
    blocks = set(re.findall(rf"^{memory.HINT_EVENT} block '([^']*)'", text, re.MULTILINE))
    assert blocks == {"pc.ram"}
    result = memory.compare(guest.source, destination)
    assert not result.lost
    assert result.different > 0


# Messages of the wrong shape


def message(cmd_id: int, size: int = PAGE, addrs: Sequence[int] = (A,)) -> bytes:
    """An array."""
    return struct.pack(f"<II{len(addrs)}Q", cmd_id, size, *addrs)


@dataclass(frozen=True)
class Shape:
    """A chain of descriptors for a message, and what is to become of it."""

    name: str
    # Makes the buffers, given the address and the length of a good message.
    buffers: Callable[[int, int], List[Tuple[int, int, bool]]]
    invalid: int = 1
    pages: int = 0


SHAPES = [
    Shape("good", lambda addr, length: [(addr, length, False)], 0, 1),
    *(
        Shape(f"{size}-bytes", lambda addr, length, size=size: [(addr, size, False)])
        for size in (1, 4, 7, 9, 12, 15, 17)
    ),
    Shape("writable", lambda addr, length: [(addr, length, True)]),
    Shape("writable-block", lambda addr, length: [(A, LARGE, True)]),
    Shape("both", lambda addr, length: [(addr, length, False), (A, PAGE, True)]),
    Shape("too-long", lambda addr, length: [(addr, 8 + 8 * (MAX_ADDRS + 1), False)]),
    Shape("much-too-long", lambda addr, length: [(0, RAM_END, False)]),
    Shape(
        "byte-by-byte",
        lambda addr, length: [(addr + i, 1, False) for i in range(length)],
        0,
        1,
    ),
    Shape("1024-descriptors", lambda addr, length: [(addr, RAM_END // 2, False)] * 1024),
    Shape("1024-writable", lambda addr, length: [(A, RAM_END // 2, True)] * 1024),
    # Reads from there are zeros: the end of a report that was never asked for.
    Shape("no-memory", lambda addr, length: [(NOTHING, 8, False)], 0),
    Shape("runs-out-of-memory", lambda addr, length: [(RAM_END - 8, 4096, False)], 1),
]


@tcg_at_least
def test_shapes_are_counted(lab: Lab, accel: str, measured: Dict[str, Any]) -> None:
    """Messages that are too short or too long, that the device could write, or in pieces."""
    with written_metal(lab, accel=accel, mem_mib=MEM_MIB, qemu="debug") as guest:
        destination, cmd_id = guest.ask()
        wrong = {}
        for shape in SHAPES:
            before = hints_now(guest.source)
            data = message(cmd_id)
            addr = guest.balloon.message_addr(0)
            guest.machine.write_bytes(addr, data)
            buffers = shape.buffers(addr, len(data))
            if len(buffers) > 1 and len(set(buffers)) == 1:
                guest.balloon.queue.put_same(len(buffers), *buffers[0])
            else:
                guest.balloon.queue.put(chain(buffers))
            if not returned_or_broken(guest):
                wrong[shape.name] = "broken"
                break
            hinted = before.hinted_bytes + shape.pages * PAGE
            after = wait_hinted(guest.source, hinted)
            expected = (before.invalid_messages + shape.invalid, hinted)
            found = (after.invalid_messages, after.hinted_bytes)
            if found != expected:
                wrong[shape.name] = {"expected": expected, "found": found}
        measured.update(wrong)
        assert not wrong
        guest.balloon.send_end(cmd_id)
        assert wait_hints_ended(guest.source).reason is None
        let_go(guest.source, destination)
        assert_only_ram(guest, destination)
        assert_counters_match(guest.source)


def returned_or_broken(guest: Metal) -> bool:
    """Wait until the device has returned everything; False if it gives up instead."""
    while guest.balloon.queue.returned() != guest.balloon.queue.offered():
        if guest.balloon.broken:
            return False
    return True


# Chains that no driver makes


def table(guest: Metal, descriptors: Sequence[Descriptor]) -> Tuple[int, int]:
    """Write an indirect table; returns its address and length."""
    addr = guest.balloon.message_addr(8)
    guest.machine.write_bytes(addr, b"".join(item.pack() for item in descriptors))
    return addr, 16 * len(descriptors)


def put(*descriptors: Descriptor) -> Callable[[Metal], None]:
    """A break: make a chain of descriptors available."""
    return lambda guest: guest.balloon.queue.put(descriptors)


def put_indirect(*descriptors: Descriptor, flags: int = 0) -> Callable[[Metal], None]:
    """A break: the same, from an indirect table."""

    def break_it(guest: Metal) -> None:
        addr, length = table(guest, descriptors)
        guest.balloon.queue.put([Descriptor(addr, length, Descriptor.INDIRECT | flags)])

    return break_it


def jump_ahead(guest: Metal) -> None:
    """Say that there are more chains than descriptors."""
    queue = guest.balloon.queue
    guest.machine.write(queue.available + 2, [(queue.offered() + 2000) & 0xFFFF], 16)
    queue.kick()


def move_queue(page: int) -> Callable[[Metal], None]:
    """A break: move a queue that is in use."""

    def break_it(guest: Metal) -> None:
        guest.balloon.set(Balloon.QUEUE_SELECT, Balloon.HINT_QUEUE, 16)
        guest.balloon.set(Balloon.QUEUE_PAGE, page)
        guest.balloon.queue.kick()

    return break_it


# An address with nothing of interest.
B = A + LARGE
READ, NEXT, WRITE, INDIRECT = 0, Descriptor.NEXT, Descriptor.WRITE, Descriptor.INDIRECT

BREAKS: Dict[str, Callable[[Metal], None]] = {
    "looped": put(Descriptor(B, 16, NEXT, 0)),
    "looped-far": put(Descriptor(B, 16, NEXT, 1), Descriptor(B, 16, NEXT, 0)),
    "next-out-of-range": put(Descriptor(B, 16, NEXT, 5000)),
    "head-out-of-range": lambda guest: guest.balloon.queue.offer(5000),
    "index-jumps": jump_ahead,
    "empty-buffer": put(Descriptor(B, 0)),
    "empty-writable-buffer": put(Descriptor(B, 0, WRITE)),
    "writable-first": put(Descriptor(B, 16, WRITE | NEXT, 1), Descriptor(B, 16)),
    "indirect-looped": put_indirect(Descriptor(B, 16, NEXT, 0)),
    "indirect-out-of-range": put_indirect(Descriptor(B, 16, NEXT, 700)),
    "indirect-in-indirect": put_indirect(Descriptor(B, 16, INDIRECT)),
    "indirect-and-next": put_indirect(Descriptor(B, 16), flags=NEXT),
    "indirect-empty": put(Descriptor(B, 0, INDIRECT)),
    "indirect-odd": put(Descriptor(B, 17, INDIRECT)),
    "indirect-in-mmio": put(Descriptor(LOCAL_APIC, 16, INDIRECT)),
    "indirect-in-nothing": put(Descriptor(NOTHING, 16, INDIRECT)),
    "indirect-huge": put(Descriptor(B, 0xFFFFFFF0, INDIRECT)),
    "in-mmio": put(Descriptor(LOCAL_APIC, 16)),
    "in-mmio-many": lambda guest: guest.balloon.queue.put_same(100, LOCAL_APIC, 4096),
    "in-mmio-large": put(Descriptor(LOCAL_APIC, 8 + 8 * MAX_ADDRS)),
    "in-rom": put(Descriptor(FIRMWARE, 4096)),
    "in-nothing": put(Descriptor(NOTHING, 4096)),
    "in-nothing-huge": put(Descriptor(NOTHING, 0xFFFFFFFF)),
    "writable-rom": put(Descriptor(FIRMWARE, 4096, WRITE)),
    "at-the-top": put(Descriptor((1 << 64) - 4096, 4096)),
    "over-the-top": put(Descriptor((1 << 64) - 16, 4096)),
    "4-gib": lambda guest: guest.balloon.queue.put_same(1024, 0, 0xFFFFFFFF),
    "4-gib-writable": lambda guest: guest.balloon.queue.put_same(1024, 0, 0xFFFFFFFF, True),
    "queue-in-mmio": move_queue(LOCAL_APIC // PAGE),
    "queue-in-rom": move_queue(FIRMWARE // PAGE),
    "queue-in-nothing": move_queue(NOTHING // PAGE),
    "queue-over-the-end": move_queue(RAM_END // PAGE - 1),
    "queue-far-away": move_queue(0xFFFFFFFF),
}


@pytest.mark.check
@tcg_at_least
def test_broken_chains(lab: Lab, accel: str, measured: Dict[str, Any]) -> None:
    """Chains that break the rules of virtio stop the device at most; after a reset it works again.

    While hints are waited for, and also when nobody wants any.
    """
    broke = []
    with written_metal(lab, accel=accel, mem_mib=MEM_MIB, qemu="debug") as guest:
        set_up(guest.source)
        for name, break_it in BREAKS.items():
            for asked in (True, False):
                if asked:
                    guest.source.qmp("migrate", uri=TO_NOWHERE)
                    guest.balloon.wait_asked()
                break_it(guest)
                # The device handles what it is given in the order in which QEMU is asked.
                for _ in range(3):
                    assert_alive(guest.source)
                if guest.balloon.broken:
                    broke.append((name, asked))
                if asked and not guest.balloon.broken:
                    assert hints_now(guest.source).state in ("asked", "reporting")
                guest.balloon.start()
                assert not guest.balloon.broken
                if asked:
                    assert wait_hints_ended(guest.source).reason in ("broken", "reset")
                    assert hints_now(guest.source).hinted_bytes == 0
                    cancel(guest.source)
        measured.update(broke=sorted(name for name, asked in broke if asked))
        # What breaks the device does so whether hints are wanted or not.
        assert {name for name, asked in broke if asked} == {
            name for name, asked in broke if not asked
        }
        assert_hints_work(guest)


def assert_hints_work(guest: Metal) -> None:
    """The next migration asks this guest for hints and uses them, and all else arrives."""
    destination, cmd_id = guest.ask()
    guest.balloon.send_array(cmd_id, PAGE, addrs_of("free"))
    guest.balloon.send_end(cmd_id)
    hints = wait_hints_ended(guest.source)
    assert (hints.reason, hints.skipped_bytes) == (None, STRIP_BYTES)
    let_go(guest.source, destination)
    assert lost_strips(guest) == ["free"]
    assert_counters_match(guest.source)


@tcg_at_least
@pytest.mark.parametrize("how", ["looped", "in-nothing-huge"])
def test_a_device_that_breaks_ends_the_round(lab: Lab, accel: str, how: str) -> None:
    """When the device gives up on its driver while it is asked, RAM is sent at once."""
    with written_metal(lab, accel=accel, mem_mib=MEM_MIB, qemu="debug") as guest:
        destination, _ = guest.ask()
        BREAKS[how](guest)
        hints = wait_hints_ended(guest.source)
        # Not the deadline, which is a minute.
        assert (hints.reason, hints.hinted_bytes) == ("broken", 0)
        let_go(guest.source, destination)
        assert lost_strips(guest) == []


@tcg_at_least
@pytest.mark.parametrize("how", ["looped", "in-nothing-huge"])
def test_a_broken_device_is_not_asked(lab: Lab, accel: str, how: str) -> None:
    """A device that has given up on its driver costs no wait; after a reset it is asked again."""
    with written_metal(lab, accel=accel, mem_mib=MEM_MIB, qemu="debug") as guest:
        set_up(guest.source)
        BREAKS[how](guest)
        # The device handles what it is given in the order in which QEMU is asked.
        for _ in range(3):
            assert_alive(guest.source)
        assert guest.balloon.broken
        asked = guest.balloon.cmd_id()
        guest.source.qmp("migrate", uri=TO_NOWHERE)
        # Why, or that it was asked: whatever comes of round 0 comes soon.
        while (hints := hints_now(guest.source)).state == "idle" and hints.reason is None:
            time.sleep(0.01)
        assert_not_asked(query(guest.source), "broken")
        assert guest.balloon.cmd_id() == asked
        cancel(guest.source)
        guest.balloon.start()
        assert_hints_work(guest)


@tcg_at_least
def test_a_queue_in_nothing_costs_the_deadline(lab: Lab, accel: str) -> None:
    """A device whose queue is where no memory is does not give up: its driver is merely silent."""
    with written_metal(lab, accel=accel, mem_mib=MEM_MIB, qemu="debug") as guest:
        destination, _ = guest.ask(free_page_hint_wait=1000)
        BREAKS["queue-in-nothing"](guest)
        hints = wait_hints_ended(guest.source)
        assert not guest.balloon.broken
        assert (hints.reason, hints.hinted_bytes) == ("timeout", 0)
        let_go(guest.source, destination)
        assert lost_strips(guest) == []


# Too much


def resident_mib(guest: Guest) -> float:
    """The memory that QEMU itself uses, without the guest's."""
    return process_mib(guest.pid, "RssAnon")


def prepare_flood(guest: Metal, kind: str, cmd_id: int) -> Tuple[int, ...]:
    """Write the message of a flood into slot 0; returns what is to change in it meanwhile."""
    balloon = guest.balloon
    addr = balloon.message_addr(0)
    change: Tuple[int, ...] = ()
    if kind == "stale":
        length = balloon.write_array(STALE_ID, PAGE, [A])
    elif kind == "invalid":
        length = balloon.write_array(cmd_id, PAGE, [A + 1] * 500)
    elif kind == "large":
        length = balloon.write_series(cmd_id, PAGE, A, 2 * PAGE, (RAM_END - A) // (2 * PAGE))
    else:
        length = balloon.write_array(cmd_id, PAGE, [A + i * PAGE for i in range(64)])
    if kind == "id-changes":
        change = (addr, cmd_id, STALE_ID)
    elif kind == "size-changes":
        change = (addr + 4, PAGE, 0)
    elif kind == "size-grows":
        change = (addr + 4, PAGE, LARGE)
    elif kind == "address-changes":
        change = (addr + 8, A, LOCAL_APIC)
    balloon.queue.describe(chain([(addr, length, False)]))
    return change


@tcg_at_least
@pytest.mark.parametrize("kind", ["small", "stale", "large"])
def test_flood_without_migration(lab: Lab, accel: str, measured: Dict[str, Any], kind: str) -> None:
    """A guest that fills the queue all the time, unasked, keeps QEMU from nothing."""
    with written_metal(lab, accel=accel, mem_mib=MEM_MIB) as guest:
        change = prepare_flood(guest, kind, STALE_ID)
        before = resident_mib(guest.source)
        flood = guest.balloon.queue.flood(0, *change)
        longest = ask_meanwhile(guest.source, FLOOD_SECONDS)
        grown = resident_mib(guest.source) - before
        times = guest.machine.stop(flood)[0]
        measured.update(messages=times, longest_answer_ms=longest, grown_mib=grown)
        assert times > 100
        assert grown < 32
        guest.balloon.queue.wait_returned()
        assert_hints_work(guest)


FLOODS = ["small", "stale", "invalid", "large", "id-changes", "size-changes", "size-grows"]
FLOODS += ["address-changes"]


@each_accelerator
@pytest.mark.parametrize("kind", in_check(FLOODS, "id-changes"))
def test_flood_in_migration(lab: Lab, accel: str, measured: Dict[str, Any], kind: str) -> None:
    """A report without an end, as fast as the guest can and changing while it is read, is cut off.

    The guest goes on while its memory is sent, and at the destination. What it writes meanwhile,
    into pages that it has hinted, arrives.
    """
    # Each hint of a flood is too much to trace.
    changes: Dict[str, Any] = {"trace": memory.KEPT_EVENTS, "args": ("-trace", CHECK_EVENT)}
    with written_metal(lab, accel=accel, mem_mib=MEM_MIB, **changes) as guest:
        destination = guest.incoming()
        # All of it is there before the deadline begins.
        change = prepare_flood(guest, kind, FIRST_ID)
        wait_ms = 1000 + round(FLOOD_SECONDS * 1000)
        start(guest.source, destination, held().with_parameters(free_page_hint_wait=wait_ms))
        assert guest.balloon.wait_asked() == FIRST_ID
        before = resident_mib(guest.source)
        flood = guest.balloon.queue.flood(0, *change)
        longest = ask_meanwhile(guest.source, FLOOD_SECONDS)
        grown = resident_mib(guest.source) - before
        hints = wait_hints_ended(guest.source)
        times = guest.machine.stop(flood)[0]
        measured.update(
            messages=times,
            longest_answer_ms=longest,
            grown_mib=grown,
            blocks=hints.blocks,
            stale_bytes=hints.stale_bytes,
            invalid_bytes=hints.invalid_bytes,
            invalid_messages=hints.invalid_messages,
        )
        assert (hints.reason, hints.complete) == ("timeout", False)
        assert times > 10
        assert grown < 32
        # The premises: a message that changes was seen both ways.
        assert (hints.blocks > 0) == (kind != "stale")
        assert (hints.stale_bytes > 0) >= (kind in ("stale", "id-changes"))
        wrong = hints.invalid_bytes + hints.invalid_messages
        assert (wrong > 0) >= (kind in ("invalid", "size-changes", "address-changes"))

        # Goes on while memory is sent, with other memory written meanwhile.
        guest.write("in round 1")
        guest.balloon.queue.flood(0, *change)
        let_go(guest.source, destination)
        assert "in round 1" not in lost_strips(guest)
        assert not memory.compare(guest.source, destination).lost
        assert_counters_match(guest.source)
        guest.goes_on_at(destination)
        # Its answer is the first thing on the new serial port.
        assert guest.machine.stop(0)[0] > 0
        guest.balloon.queue.wait_returned()
        assert_alive(destination)


@tcg_at_least
def test_reset_with_a_full_queue(lab: Lab, accel: str) -> None:
    """A device that is reset with its queue full drops what is queued, and ends the round."""
    with written_metal(lab, accel=accel, mem_mib=MEM_MIB, qemu="debug") as guest:
        set_up(guest.source)
        for kind in ("small", "large", "invalid"):
            guest.source.qmp("migrate", uri=TO_NOWHERE)
            prepare_flood(guest, kind, guest.balloon.wait_asked())
            guest.balloon.queue.pile(0, 1000)
            guest.balloon.start()
            assert wait_hints_ended(guest.source).reason == "reset"
            blocks = hints_now(guest.source).blocks
            assert guest.balloon.queue.returned() == 0
            assert hints_now(guest.source).blocks == blocks
            cancel(guest.source)
        assert_hints_work(guest)


@pytest.mark.check
@tcg_at_least
def test_a_stopped_guest_is_left_alone(lab: Lab, measured: Dict[str, Any], accel: str) -> None:
    """Nothing of a full queue is handled while its guest is stopped, and all of it afterwards.

    What the device writes into the memory of a guest that was stopped for good is not sent.
    """
    measured["left"] = []
    with written_metal(lab, accel=accel, mem_mib=MEM_MIB, qemu="debug") as guest:
        set_up(guest.source)
        for _ in range(3):
            guest.source.qmp("migrate", uri=TO_NOWHERE)
            prepare_flood(guest, "large", guest.balloon.wait_asked())
            guest.balloon.queue.pile(0, 1000)
            guest.source.qmp("stop")
            handled = returned_says_memory(guest)
            blocks = hints_now(guest.source).blocks
            for _ in range(10):
                assert guest.source.qmp("query-status")["status"] == "paused"
            assert returned_says_memory(guest) == handled
            assert hints_now(guest.source).blocks == blocks
            guest.source.qmp("cont")
            measured["left"].append((guest.balloon.queue.offered() - handled) & 0xFFFF)
            guest.balloon.queue.wait_returned()
            assert wait_hints_ended(guest.source).reason == "vm-stopped"
            cancel(guest.source)
        # The premise: there was something left to handle.
        assert all(measured["left"])
        assert_hints_work(guest)


def returned_says_memory(guest: Metal) -> int:
    """How many chains the device has returned, modulo 2^16, without asking the guest."""
    with open(guest.files[0], "rb") as file:
        file.seek(guest.balloon.queue.used + 2)
        return struct.unpack("<H", file.read(2))[0]  # type: ignore[no-any-return]


# All of it, at random

MESSAGES = 60
ADDRESSES = [0, A, B, RAM_END - PAGE, RAM_END, FIRMWARE, LOCAL_APIC, NOTHING, 1 << 63]
SIZES = [0, 1, PAGE, PAGE, PAGE, 2 * PAGE, 1 << 16, 1 << 21, LARGE, 1 << 30, 0xFFFFFFFF]


def random_address(rng: random.Random) -> int:
    """An address somewhere near a border, or anywhere."""
    addr = rng.choice([*ADDRESSES, rng.getrandbits(64), rng.randrange(RAM_END)])
    addr += rng.choice([0, 0, PAGE, -PAGE, rng.randrange(-LARGE, LARGE)])
    return addr & rng.choice([~0, -PAGE, -PAGE, -LARGE]) & ((1 << 64) - 1)


def random_message(rng: random.Random, cmd_id: int) -> bytes:
    """An array, right or wrong; now and then just bytes."""
    if rng.random() < 0.1:
        return rng.randbytes(rng.randrange(1, 200))
    if rng.random() < 0.15:
        cmd_id = rng.choice([0, 1, cmd_id - 1, cmd_id + 1, rng.getrandbits(32)])
    first = random_address(rng)
    addrs = [
        (first + i * PAGE) & ((1 << 64) - 1) if rng.random() < 0.6 else random_address(rng)
        for i in range(rng.choice([0, 1, 2, rng.randrange(80)]))
    ]
    data = message(cmd_id & 0xFFFFFFFF, rng.choice(SIZES), addrs)
    return data + rng.choice([b"", b"", b"", rng.randbytes(rng.randrange(8))])


def random_chain(rng: random.Random, addr: int, length: int) -> List[Descriptor]:
    """The message, in some pieces, now and then with one thing changed."""
    cuts = sorted({0, length, *(rng.randrange(length) for _ in range(rng.choice([0, 0, 1, 5])))})
    buffers = [(addr + a, b - a, rng.random() < 0.02) for a, b in zip(cuts, cuts[1:])]
    descriptors = chain(buffers)
    if rng.random() < 0.05:
        i = rng.randrange(len(descriptors))
        whole = descriptors[i]
        descriptors[i] = rng.choice(
            [
                Descriptor(random_address(rng), whole.length, whole.flags, whole.next),
                Descriptor(whole.addr, rng.getrandbits(32), whole.flags, whole.next),
                Descriptor(whole.addr, whole.length, rng.getrandbits(16), whole.next),
                Descriptor(whole.addr, whole.length, whole.flags, rng.getrandbits(16)),
            ]
        )
    return descriptors


def random_blocks(rng: random.Random) -> List[Descriptor]:
    """Blocks of the protocol without arrays, most of them in RAM; or a command."""
    if rng.random() < 0.03:
        return [Descriptor(Balloon.MESSAGES, rng.choice([4, 4, 1, 3, 5, 4096]))]
    return chain(
        (
            random_address(rng) if rng.random() < 0.02 else rng.randrange(RAM_END),
            rng.choice([1, PAGE, LARGE, rng.randrange(1, LARGE), rng.getrandbits(20) + 1]),
            True,
        )
        for _ in range(rng.choice([1, 1, 2, 20]))
    )


@each_accelerator
@pytest.mark.parametrize("features", in_check(["arrays", "blocks"], "arrays"))
def test_random_messages(lab: Lab, accel: str, measured: Dict[str, Any], features: str) -> None:
    """Whatever a guest sends, pages that no hint took out arrive, and each later write does.

    The device is reset when it gives up, which ends round 0.
    """
    totals: Dict[str, int] = {}
    for attempt in range(REPEAT):
        seed = FIRST_SEED + attempt
        measured["last_seed"] = seed
        bits = Balloon.HINTS | (Balloon.ARRAYS if features == "arrays" else 0)
        with metal(
            lab, bits, accel=accel, mem_mib=MEM_MIB, qemu="debug", trace=memory.KEPT_EVENTS
        ) as guest:
            guest.machine.stamp(3 * MIB, (MEM_MIB - 3) * 256, 1)
            destination = guest.incoming(f"destination-{attempt}")
            counts = send_random(guest, destination, random.Random(seed), bits)
            for name, count in counts.items():
                totals[name] = totals.get(name, 0) + count
            guest.source.close()
            destination.close()
    measured.update(totals)
    assert totals["hinted"] > 0
    assert totals["stale"] > 0


def end_report(guest: Metal, cmd_id: int, features: int) -> None:
    """End the report, or the round with a reset if that does not help."""
    if features == Balloon.HINTS:
        guest.balloon.send_command(cmd_id)
    else:
        guest.balloon.send_end(cmd_id)
    if not returned_or_broken(guest):
        guest.balloon.start(features)
    wait_hints_ended(guest.source)


def send_random(
    guest: Metal, destination: Guest, rng: random.Random, features: int
) -> Dict[str, int]:
    """One migration with random messages in round 0, and in round 1; compares all memory."""
    start(guest.source, destination, held())
    cmd_id = guest.balloon.wait_asked()
    if features == Balloon.HINTS:
        guest.balloon.send_command(cmd_id)
        guest.balloon.send_block(addrs_of("free")[0], STRIP_BYTES)
    else:
        guest.balloon.send_array(cmd_id, PAGE, addrs_of("free"))
    guest.balloon.queue.wait_returned()
    resets = 0
    for i in range(MESSAGES):
        if i == MESSAGES * 3 // 4 and hints_now(guest.source).state != "ended":
            end_report(guest, cmd_id, features)
            guest.write_all()
        if features == Balloon.HINTS:
            guest.balloon.queue.put(random_blocks(rng))
        else:
            data = random_message(rng, cmd_id)
            addr = guest.balloon.message_addr(1)
            guest.machine.write_bytes(addr, data)
            guest.balloon.queue.put(random_chain(rng, addr, len(data)))
        if not returned_or_broken(guest):
            resets += 1
            guest.balloon.start(features)
    assert_alive(guest.source)
    guest.write_all()
    hints = hints_of(let_go(guest.source, destination))
    assert not memory.compare(guest.source, destination).lost
    # Also where it was hinted: it was written after that.
    assert lost_strips(guest) == []
    return {
        "messages": MESSAGES,
        "resets": resets,
        "hinted": hints.hinted_bytes,
        "invalid": hints.invalid_bytes + hints.invalid_messages,
        "stale": hints.stale_bytes,
    }
