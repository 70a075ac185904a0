# SPDX-License-Identifier: GPL-2.0-or-later
"""A guest that lies about its free pages, in each way that there is, harms its own data only.

`make test` runs a short slice of the random part; `make hostile` runs it at length: FPH_REPEAT is
how often, from the seed FPH_SEED on, and FPH_SECONDS how long a flood lasts.
"""

import os
import random
import struct
from dataclasses import replace
from typing import Any, Callable, Counter, Dict, Iterator, List, Sequence, Set, Tuple

import pytest

from livemig import memory
from livemig.balloon import INDIRECT, MAX_ADDRS, NEXT, WRITE, Balloon, Descriptor, chain
from livemig.checks import assert_not_asked, hinted_blocks, hints_now, hints_of, in_check
from livemig.checks import wait_answered, wait_hints_ended
from livemig.guest import Guest
from livemig.host import process_mib
from livemig.lab import Lab
from livemig.machine import FIRMWARE, LOCAL_APIC, MIB, PAGE
from livemig.metal import CHECK_EVENT, FIRST_ID, REGION, STRIP_BYTES, TO_NOWHERE, WAIT_MS, Metal
from livemig.metal import addrs_of, ask_meanwhile, assert_counters_match, each_accelerator, held
from livemig.metal import let_go, let_go_but_free, lost_strips, metal, set_up, tcg_at_least
from livemig.metal import wait_hinted, written_metal
from livemig.migration import Hints, cancel, query, start

REPEAT = int(os.environ.get("FPH_REPEAT", "1"))
FIRST_SEED = int(os.environ.get("FPH_SEED", "1"))
FLOOD_SECONDS = float(os.environ.get("FPH_SECONDS", "1"))

# Not a multiple of a large block: the last one has an end without RAM.
MEM_MIB = 130
RAM_END = MEM_MIB * MIB
LARGE = 4 * MIB

IO_APIC = 0xFEC00000
NOTHING = 0x1_0000_0000

# Memory that some cases hint, well away from what they must not touch.
A = REGION
STALE_ID = 0x7FFFFFFF
MESSAGE = Balloon.MESSAGES

# An address, a length, and whether the device may write there.
Buffer = Tuple[int, int, bool]
# Invalid bytes, invalid messages, hinted pages.
Counted = Tuple[int, int, int]


@pytest.fixture
def guest(lab: Lab, accel: str) -> Iterator[Metal]:
    """A guest that has written all parts of its memory, in a QEMU that looks for its mistakes."""
    with written_metal(lab, accel=accel, mem_mib=MEM_MIB, qemu="debug") as metal_guest:
        yield metal_guest


def assert_alive(guest: Guest) -> None:
    """QEMU runs, runs the guest, and answers: what was asked before has been handled."""
    # The device handles what it is given in the order in which QEMU is asked.
    for _ in range(3):
        assert guest.qmp("query-status")["status"] == "running"
        guest.qmp("query-balloon")


# Arrays that say what cannot be

AFTER_RAM = [RAM_END, RAM_END + PAGE, 0xC0000000, NOTHING, 1 << 40, 1 << 52]
LAST_BYTES = RAM_END % LARGE

# A size, addresses, and what is counted: bytes and messages as invalid, and pages as hinted.
LIES: Dict[str, Tuple[int, Sequence[int], Counted]] = {
    "unaligned": (PAGE, [A + 1, A + 0x800, A + PAGE - 1], (3 * PAGE, 0, 0)),
    "unaligned-large": (LARGE, [A + PAGE, A + LARGE - 1, A + LARGE // 2], (3 * LARGE, 0, 0)),
    "some-unaligned": (PAGE, [A + 1, A, A + 2 * PAGE + 8, A + PAGE], (2 * PAGE, 0, 2)),
    "size-0": (0, [A], (0, 1, 0)),
    "size-1": (1, [A], (0, 1, 0)),
    "size-3": (3, [A], (0, 1, 0)),
    "size-below-a-page": (PAGE // 2, [A], (0, 1, 0)),
    "size-not-a-power": (3 * PAGE, [A], (0, 1, 0)),
    "size-almost": (0xFFFFFFFF, [A], (0, 1, 0)),
    "size-and-a-bit": (0x80000001, [A], (0, 1, 0)),
    "after-ram": (PAGE, AFTER_RAM, (len(AFTER_RAM) * PAGE, 0, 0)),
    "last-page": (PAGE, [RAM_END - PAGE], (0, 0, 1)),
    "end-of-ram": (LARGE, [RAM_END & -LARGE], (LARGE - LAST_BYTES, 0, LAST_BYTES // PAGE)),
    "wraps": (PAGE, [(1 << 64) - PAGE], (PAGE, 0, 0)),
    "wraps-large": (0x80000000, [(1 << 64) - 0x80000000], (0x80000000, 0, 0)),
    "wraps-to-0": (PAGE, [0, (1 << 64) - PAGE], (PAGE, 0, 1)),
    "top": (PAGE, [(1 << 64) - 2 * PAGE, (1 << 63)], (2 * PAGE, 0, 0)),
    "mmio": (PAGE, [LOCAL_APIC, IO_APIC, 0xFED00000], (3 * PAGE, 0, 0)),
    "rom": (PAGE, [FIRMWARE + i * PAGE for i in range(16)], (16 * PAGE, 0, 0)),
    "rom-below-1-mib": (PAGE, [0xF0000, 0xFF000], (2 * PAGE, 0, 0)),
    "ram-rom-ram": (PAGE, [A, FIRMWARE, A + PAGE], (PAGE, 0, 2)),
    "nothing": (PAGE, [], (0, 0, 0)),
    "duplicates": (PAGE, [A] * 100, (0, 0, 100)),
    "overlapping": (2 * PAGE, [A, A, A + 2 * PAGE, A], (0, 0, 8)),
    "backwards": (PAGE, [A + i * PAGE for i in reversed(range(64))], (0, 0, 64)),
    "scattered": (PAGE, [A + i * 2 * PAGE for i in range(500)], (0, 0, 500)),
    "1-gib": (1 << 30, [1 << 30, 1 << 31], (2 << 30, 0, 0)),
}


def counted(source: Guest, before: Hints, pages: int) -> Counted:
    """What was counted since then, when so many pages are hinted that were to be hinted."""
    after = wait_hinted(source, before.hinted_bytes + pages * PAGE)
    return (
        after.invalid_bytes - before.invalid_bytes,
        after.invalid_messages - before.invalid_messages,
        (after.hinted_bytes - before.hinted_bytes) // PAGE,
    )


def assert_rest_arrives(guest: Metal, destination: Guest, cmd_id: int) -> Hints:
    """End the report: pages of the guest's RAM were taken out only, and all others arrive."""
    guest.balloon.send_end(cmd_id)
    assert wait_hints_ended(guest.source).reason is None
    hints = hints_of(let_go(guest.source, destination))
    assert hinted_blocks(guest.source) == {"pc.ram"}
    result = memory.compare(guest.source, destination)
    assert not result.lost
    assert result.different > 0
    assert_counters_match(guest.source)
    return hints


@pytest.mark.check
@each_accelerator
def test_lies_are_counted(guest: Metal) -> None:
    """Addresses that are no RAM and sizes that are none are dropped and counted, one by one.

    What is not hinted arrives, whatever was said beside it.
    """
    # All RAM but the first 3 MiB, in which the program and its queue live.
    guest.machine.stamp(3 * MIB, (MEM_MIB - 3) * 256, 1)
    destination, cmd_id = guest.ask()
    found = {}
    for name, (size, addrs, (_, _, pages)) in LIES.items():
        before = hints_now(guest.source)
        guest.balloon.send_array(cmd_id, size, addrs)
        guest.balloon.queue.wait_returned()
        found[name] = counted(guest.source, before, pages)
    assert found == {name: expected for name, (_, _, expected) in LIES.items()}
    assert assert_rest_arrives(guest, destination, cmd_id).stale_bytes == 0


# Messages of the wrong shape


# The buffers of a message, of which the good one is SIZE bytes, and what is counted for it:
# messages as invalid, and pages as hinted.
SIZE = 16
SHAPES: Dict[str, Tuple[Sequence[Buffer], Tuple[int, int]]] = {
    "good": ([(MESSAGE, SIZE, False)], (0, 1)),
    **{f"{size}-bytes": ([(MESSAGE, size, False)], (1, 0)) for size in (1, 4, 7, 9, 12, 15, 17)},
    "writable": ([(MESSAGE, SIZE, True)], (1, 0)),
    "writable-block": ([(A, LARGE, True)], (1, 0)),
    "both": ([(MESSAGE, SIZE, False), (A, PAGE, True)], (1, 0)),
    "too-long": ([(MESSAGE, 8 + 8 * (MAX_ADDRS + 1), False)], (1, 0)),
    "much-too-long": ([(0, RAM_END, False)], (1, 0)),
    "byte-by-byte": ([(MESSAGE + i, 1, False) for i in range(SIZE)], (0, 1)),
    "1024-descriptors": ([(MESSAGE, RAM_END // 2, False)] * 1024, (1, 0)),
    "1024-writable": ([(A, RAM_END // 2, True)] * 1024, (1, 0)),
    # Reads from there are zeros: the end of a report that was never asked for.
    "no-memory": ([(NOTHING, 8, False)], (0, 0)),
    "runs-out-of-memory": ([(RAM_END - 8, 4096, False)], (1, 0)),
}


@tcg_at_least
def test_shapes_are_counted(guest: Metal) -> None:
    """Messages that are too short or too long, that the device could write, or in pieces."""
    destination, cmd_id = guest.ask()
    found = {}
    for name, (buffers, (_, pages)) in SHAPES.items():
        before = hints_now(guest.source)
        assert guest.balloon.write_array(cmd_id, PAGE, [A]) == SIZE
        if len(buffers) > 1 and len(set(buffers)) == 1:
            guest.balloon.queue.put_same(len(buffers), *buffers[0])
        else:
            guest.balloon.queue.put(chain(buffers))
        assert returned_or_broken(guest), f"{name} broke the device"
        found[name] = counted(guest.source, before, pages)[1:]
    assert found == {name: expected for name, (_, expected) in SHAPES.items()}
    assert_rest_arrives(guest, destination, cmd_id)


def returned_or_broken(guest: Metal) -> bool:
    """Wait until the device has returned everything; False if it gives up instead."""
    while guest.balloon.queue.returned() != guest.balloon.queue.offered():
        if guest.balloon.broken:
            return False
    return True


# Chains that no driver makes


def put(*descriptors: Descriptor) -> Callable[[Metal], None]:
    """A break: make a chain of descriptors available."""
    return lambda guest: guest.balloon.queue.put(descriptors)


def put_indirect(*descriptors: Descriptor, flags: int = 0) -> Callable[[Metal], None]:
    """A break: the same, from an indirect table."""

    def break_it(guest: Metal) -> None:
        addr = guest.balloon.message_addr(8)
        guest.machine.write_bytes(addr, b"".join(item.pack() for item in descriptors))
        guest.balloon.queue.put([Descriptor(addr, 16 * len(descriptors), INDIRECT | flags)])

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
def test_broken_chains(guest: Metal, measured: Dict[str, Any]) -> None:
    """Chains that break the rules of virtio stop the device at most; after a reset it works again.

    While hints are waited for, and also when nobody wants any.
    """
    # By whether hints were asked for.
    broke: Dict[bool, Set[str]] = {True: set(), False: set()}
    set_up(guest.source)
    for name, break_it in BREAKS.items():
        for asked in (True, False):
            if asked:
                guest.source.qmp("migrate", uri=TO_NOWHERE)
                guest.balloon.wait_asked()
            break_it(guest)
            assert_alive(guest.source)
            if guest.balloon.broken:
                broke[asked].add(name)
            if asked and not guest.balloon.broken:
                assert hints_now(guest.source).state in ("asked", "reporting")
            guest.balloon.start()
            assert not guest.balloon.broken
            if asked:
                assert wait_hints_ended(guest.source).reason in ("broken", "reset")
                assert hints_now(guest.source).hinted_bytes == 0
                cancel(guest.source)
    measured.update(broke=sorted(broke[True]))
    # What breaks the device does so whether hints are wanted or not.
    assert broke[True] == broke[False]
    assert_hints_work(guest)


def assert_hints_work(guest: Metal) -> None:
    """The next migration asks this guest for hints and uses them, and all else arrives."""
    destination, cmd_id = guest.ask()
    hints = guest.report(cmd_id, addrs_of("free"))
    assert (hints.reason, hints.skipped_bytes) == (None, STRIP_BYTES)
    let_go_but_free(guest, destination)


# What ends the round: the deadline does if no memory is where the queue should be, as the device
# does not give up then.
ENDS = {"looped": "broken", "in-nothing-huge": "broken", "queue-in-nothing": "timeout"}


@tcg_at_least
@pytest.mark.parametrize("how", ENDS)
def test_a_device_that_breaks_ends_the_round(guest: Metal, how: str) -> None:
    """When the device gives up on its driver while it is asked, RAM is sent at once.

    A driver that is merely silent costs the deadline.
    """
    destination, _ = guest.ask(free_page_hint_wait=1000 if ENDS[how] == "timeout" else WAIT_MS)
    BREAKS[how](guest)
    hints = wait_hints_ended(guest.source)
    assert guest.balloon.broken == (ENDS[how] == "broken")
    assert (hints.reason, hints.hinted_bytes) == (ENDS[how], 0)
    let_go(guest.source, destination)
    assert lost_strips(guest) == []


@tcg_at_least
@pytest.mark.parametrize("how", ["looped", "in-nothing-huge"])
def test_a_broken_device_is_not_asked(guest: Metal, how: str) -> None:
    """A device that has given up on its driver costs no wait; after a reset it is asked again."""
    set_up(guest.source)
    BREAKS[how](guest)
    assert_alive(guest.source)
    assert guest.balloon.broken
    asked = guest.balloon.cmd_id()
    guest.source.qmp("migrate", uri=TO_NOWHERE)
    wait_answered(guest.source)
    assert_not_asked(query(guest.source), "broken")
    assert guest.balloon.cmd_id() == asked
    cancel(guest.source)
    guest.balloon.start()
    assert_hints_work(guest)


# Too much


# What changes in the message all the while: an address, and the words that are there in turn.
FLOODS: Dict[str, Tuple[int, ...]] = {
    **dict.fromkeys(("small", "stale", "invalid", "large"), ()),
    "id-changes": (MESSAGE, FIRST_ID, STALE_ID),
    "size-changes": (MESSAGE + 4, PAGE, 0),
    "size-grows": (MESSAGE + 4, PAGE, LARGE),
    "address-changes": (MESSAGE + 8, A, LOCAL_APIC),
}


def prepare_flood(guest: Metal, kind: str, cmd_id: int) -> None:
    """Write the message of a flood into slot 0."""
    balloon = guest.balloon
    if kind == "stale":
        length = balloon.write_array(STALE_ID, PAGE, [A])
    elif kind == "invalid":
        length = balloon.write_array(cmd_id, PAGE, [A + 1] * 500)
    elif kind == "large":
        length = balloon.write_series(cmd_id, PAGE, A, 2 * PAGE, (RAM_END - A) // (2 * PAGE))
    else:
        length = balloon.write_array(cmd_id, PAGE, [A + i * PAGE for i in range(64)])
    balloon.queue.describe(chain([(MESSAGE, length, False)]))


def begin_flood(guest: Metal, kind: str, measured: Dict[str, Any]) -> int:
    """Let a flood go on for a while, in which QEMU does not grow; returns what is to be stopped."""
    # The memory that QEMU itself uses, without the guest's.
    before = process_mib(guest.source.pid, "RssAnon")
    flood = guest.balloon.queue.flood(0, *FLOODS[kind])
    measured["longest_answer_ms"] = ask_meanwhile(guest.source, FLOOD_SECONDS)
    measured["grown_mib"] = process_mib(guest.source.pid, "RssAnon") - before
    assert measured["grown_mib"] < 32
    return flood


@tcg_at_least
@pytest.mark.parametrize("kind", ["small", "stale", "large"])
def test_flood_without_migration(lab: Lab, accel: str, measured: Dict[str, Any], kind: str) -> None:
    """A guest that fills the queue all the time, unasked, keeps QEMU from nothing."""
    with written_metal(lab, accel=accel, mem_mib=MEM_MIB) as guest:
        prepare_flood(guest, kind, STALE_ID)
        flood = begin_flood(guest, kind, measured)
        measured["messages"] = guest.machine.stop(flood)[0]
        assert measured["messages"] > 100
        guest.balloon.queue.wait_returned()
        assert_hints_work(guest)


@tcg_at_least
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
        prepare_flood(guest, kind, FIRST_ID)
        wait_ms = 1000 + round(FLOOD_SECONDS * 1000)
        start(guest.source, destination, held().with_parameters(free_page_hint_wait=wait_ms))
        assert guest.balloon.wait_asked() == FIRST_ID
        flood = begin_flood(guest, kind, measured)
        hints = wait_hints_ended(guest.source)
        measured["messages"] = guest.machine.stop(flood)[0]
        for name in ("blocks", "stale_bytes", "invalid_bytes", "invalid_messages"):
            measured[name] = getattr(hints, name)
        assert (hints.reason, hints.complete) == ("timeout", False)
        assert measured["messages"] > 10
        # The premises: a message that changes was seen both ways.
        assert (hints.blocks > 0) == (kind != "stale")
        assert (hints.stale_bytes > 0) >= (kind in ("stale", "id-changes"))
        wrong = hints.invalid_bytes + hints.invalid_messages
        assert (wrong > 0) >= (kind in ("invalid", "size-changes", "address-changes"))

        # Goes on while memory is sent, with other memory written meanwhile.
        guest.write("in round 1")
        guest.balloon.queue.flood(0, *FLOODS[kind])
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
def test_reset_with_a_full_queue(guest: Metal) -> None:
    """A device that is reset with its queue full drops what is queued, and ends the round."""
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
def test_a_stopped_guest_is_left_alone(guest: Metal, measured: Dict[str, Any]) -> None:
    """Nothing of a full queue is handled while its guest is stopped, and all of it afterwards.

    What the device writes into the memory of a guest that was stopped for good is not sent.
    """
    measured["left"] = []
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
        return int.from_bytes(os.pread(file.fileno(), 2, guest.balloon.queue.used + 2), "little")


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
    size = rng.choice(SIZES)
    data = struct.pack(f"<II{len(addrs)}Q", cmd_id & 0xFFFFFFFF, size, *addrs)
    return data + rng.choice([b"", b"", b"", rng.randbytes(rng.randrange(8))])


def random_chain(rng: random.Random, addr: int, length: int) -> List[Descriptor]:
    """The message, in some pieces, now and then with one thing changed."""
    cuts = sorted({0, length, *(rng.randrange(length) for _ in range(rng.choice([0, 0, 1, 5])))})
    buffers = [(addr + a, b - a, rng.random() < 0.02) for a, b in zip(cuts, cuts[1:])]
    descriptors = chain(buffers)
    if rng.random() < 0.05:
        i = rng.randrange(len(descriptors))
        changes = [("addr", random_address(rng)), ("length", rng.getrandbits(32))]
        changes += [("flags", rng.getrandbits(16)), ("next", rng.getrandbits(16))]
        descriptors[i] = replace(descriptors[i], **dict([rng.choice(changes)]))
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
    totals: Counter[str] = Counter()
    for seed in range(FIRST_SEED, FIRST_SEED + REPEAT):
        measured["last_seed"] = seed
        bits = Balloon.OURS if features == "arrays" else Balloon.HINTS
        with metal(
            lab, bits, accel=accel, mem_mib=MEM_MIB, qemu="debug", trace=memory.KEPT_EVENTS
        ) as guest:
            guest.machine.stamp(3 * MIB, (MEM_MIB - 3) * 256, 1)
            destination = guest.incoming(f"destination-{seed}")
            totals.update(send_random(guest, destination, random.Random(seed), bits))
            guest.source.close()
            destination.close()
    measured.update(totals)
    assert totals["hinted"] > 0
    assert totals["stale"] > 0


def send_random(
    guest: Metal, destination: Guest, rng: random.Random, features: int
) -> Dict[str, int]:
    """One migration with random messages in round 0, and in round 1; compares all memory."""
    start(guest.source, destination, held())
    cmd_id = guest.balloon.wait_asked()
    guest.balloon.begin(cmd_id)
    if guest.balloon.arrays:
        guest.balloon.send_array(cmd_id, PAGE, addrs_of("free"))
    else:
        guest.balloon.send_block(addrs_of("free")[0], STRIP_BYTES)
    guest.balloon.queue.wait_returned()
    resets = 0
    for i in range(MESSAGES):
        if i == MESSAGES * 3 // 4 and hints_now(guest.source).state != "ended":
            guest.balloon.end(cmd_id)
            if not returned_or_broken(guest):
                guest.balloon.start(features)
            wait_hints_ended(guest.source)
            guest.write_all()
        if guest.balloon.arrays:
            data = random_message(rng, cmd_id)
            addr = guest.balloon.message_addr(1)
            guest.machine.write_bytes(addr, data)
            guest.balloon.queue.put(random_chain(rng, addr, len(data)))
        else:
            guest.balloon.queue.put(random_blocks(rng))
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
