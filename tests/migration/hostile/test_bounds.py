# SPDX-License-Identifier: GPL-2.0-or-later
"""A guest of 256 GiB that hints as much as it can, as often as it can, delays QEMU a moment only.

Nothing of this memory is populated, so that any machine can run it: it is the bitmaps that are
large. Times are recorded and printed (pytest -s), not judged.
"""

import re
import struct
import time
from typing import Any, Callable, Dict, Iterator, List, Tuple

import pytest

from livemig import paths
from livemig.balloon import MAX_ADDRS, NEXT, Balloon, Descriptor, chain
from livemig.checks import hints_now, wait_hints_ended
from livemig.lab import Lab
from livemig.machine import FIRMWARE, LOCAL_APIC, MIB, PAGE, Machine, spec
from livemig.metal import FIRST_ID, TO_NOWHERE, Metal, ask_meanwhile, metal, set_up, tcg_at_least
from livemig.metal import usable
from livemig.migration import cancel, query, set_capabilities, status_is

GIB = 1 << 30
MEM_MIB = 256 << 10
# What does not fit below the PCI hole is above 4 GiB.
ABOVE = 4 * GIB
LOW_GIB = 2
HIGH_BYTES = MEM_MIB * MIB - LOW_GIB * GIB
# Armed in pieces of 1 GiB.
ARMED_MIB = 4096
WAIT_MS = 500
# What the guest keeps.
KEPT = 16 * MIB
KEPT_PAGES = 1024

# VIRTQUEUE_MAX_SIZE
MAX_DESCRIPTORS = 1024
# TURN_BUDGET of the device
TURN_BUDGET = 256

# HOLD_PAGES of the engine
HOLD_PAGES = 4 << 20

EVENTS = "free_page_hint_ask free_page_hint_end virtio_balloon_hint_turn free_page_hint_hold"
ASK, END, TURN, HOLD = EVENTS.split()


def repeat(balloon: Balloon, size: int, count: int) -> None:
    """Describe an array in slot 0 whose addresses are these of the pattern, over and over."""
    header, pattern = (balloon.message_addr(i) for i in range(2))
    balloon.machine.write(header, [FIRST_ID, size])
    times = MAX_ADDRS // count
    balloon.machine.command("chain", balloon.queue.descriptors, 1 + times, pattern, 8 * count, 0)
    balloon.queue.describe([Descriptor(header, 8, NEXT, 1)])


def consecutive(balloon: Balloon) -> None:
    """Blocks of 2 GiB, one after another: all memory above 4 GiB, 128 times in each array."""
    # The first is the PCI hole: what the guest's program is given has 32 bits.
    count = 1 + HIGH_BYTES // (2 * GIB)
    balloon.machine.command("series", balloon.message_addr(1), count, 2 * GIB, 2 * GIB)
    repeat(balloon, 2 * GIB, count)


def scattered(balloon: Balloon) -> None:
    """Pages of memory, ROM, devices and nothing, in turn: none is where the one before it was."""
    places = [KEPT - PAGE, FIRMWARE, 3 * GIB, LOCAL_APIC, LOW_GIB * GIB - PAGE]
    data = struct.pack(f"<{len(places)}Q", *places) * 20
    balloon.machine.write_bytes(balloon.message_addr(1), data)
    repeat(balloon, PAGE, len(data) // 8)


def descriptors(balloon: Balloon) -> None:
    """Blocks of almost 4 GiB, as large as a descriptor can be: as many as there are descriptors."""
    balloon.machine.write(balloon.message_addr(0), [FIRST_ID])
    length = 4 * GIB - PAGE
    places = HIGH_BYTES // length
    blocks = [(ABOVE + i % places * length, length, True) for i in range(balloon.queue.size - 1)]
    balloon.queue.describe(chain([(balloon.message_addr(0), 4, False)]))
    balloon.queue.describe(chain(blocks, 1), 1)


# Features, what describes the message, and the slot that it begins in.
PROTOCOLS: Dict[str, Tuple[int, Callable[[Balloon], None], int]] = {
    "arrays": (Balloon.OURS, consecutive, 0),
    "arrays-scattered": (Balloon.OURS, scattered, 0),
    "blocks": (Balloon.HINTS, descriptors, 1),
}
each_protocol = pytest.mark.parametrize("protocol", PROTOCOLS)


class Liar:
    """A large guest with its message prepared, to be sent as often as it can."""

    def __init__(self, guest: Metal, head: int):
        self.source, self.machine, self.balloon = guest.source, guest.machine, guest.balloon
        self.head = head

    def begin(self, **parameters: Any) -> None:
        """Migrate to nowhere, wait to be asked, and begin the report."""
        set_up(self.source, **parameters)
        self.source.qmp("migrate", uri=TO_NOWHERE)
        assert self.balloon.wait_asked() == FIRST_ID
        if not self.balloon.arrays:
            self.balloon.queue.offer(0)

    def lie(self, **parameters: Any) -> int:
        """The same, and begin to lie; returns what is to be stopped."""
        self.begin(**parameters)
        return self.balloon.queue.flood(self.head)

    def stop(self, flood: int) -> None:
        """Stop, and find what was kept unharmed."""
        self.machine.stop(flood)
        assert self.source.qmp("query-status")["status"] == "running"
        assert self.machine.wrong_pages(KEPT, KEPT_PAGES, 1) == 0

    def events(self, name: str) -> List[Tuple[float, List[int]]]:
        """When an event was traced, in seconds, and the numbers in what it says."""
        text = self.source.trace_log.read_text()
        lines = re.findall(rf"^\d+@(\d+\.\d+):{name} (.*)$", text, re.MULTILINE)
        return [(float(when), list(map(int, re.findall(r"\d+", rest)))) for when, rest in lines]


@pytest.fixture
def liar(lab: Lab, accel: str, protocol: str) -> Iterator[Liar]:
    """A large guest that will lie."""
    features, prepare, head = PROTOCOLS[protocol]
    changes: Dict[str, Any] = {"trace": EVENTS, "args": ("-msg", "timestamp=on")}
    with metal(lab, features, accel=accel, mem_mib=MEM_MIB, mem_file=None, **changes) as guest:
        guest.machine.stamp(KEPT, KEPT_PAGES, 1)
        # All of it is there before the deadline begins.
        prepare(guest.balloon)
        yield Liar(guest, head)


def show(measured: Dict[str, Any], what: str, **values: float) -> None:
    """Keep what was measured, and print it."""
    measured.update(values)
    print(f"\n{what}:", ", ".join(f"{name} {value:.1f}" for name, value in values.items()))


@tcg_at_least
@each_protocol
def test_the_deadline_holds(liar: Liar, measured: Dict[str, Any], protocol: str) -> None:
    """A report without an end is cut off at the deadline, and QEMU answers all the while.

    The lock of the dirty bitmaps is held for a bounded number of pages at a time.
    """
    flood = liar.lie(free_page_hint_wait=WAIT_MS)
    longest = 0.0
    while hints_now(liar.source).state != "ended":
        longest = max(longest, ask_meanwhile(liar.source, 0.05))
    hints = hints_now(liar.source)
    liar.stop(flood)
    assert hints.reason == "timeout"
    # The premise: there was a lot to do.
    assert hints.messages > 1
    assert hints.hinted_bytes > (0 if protocol == "arrays-scattered" else HIGH_BYTES)
    cancel(liar.source)
    # The premise: messages that a hold has no room for.
    assert max(work for _, (_, work, _) in liar.events(HOLD)) == HOLD_PAGES
    (asked, _), (ended, _) = (liar.events(event)[-1] for event in (ASK, END))
    show(
        measured,
        f"{protocol}, deadline {WAIT_MS} ms",
        overrun_ms=(ended - asked) * 1000 - WAIT_MS,
        longest_answer_ms=longest,
        messages=hints.messages,
        hinted_gib=hints.hinted_bytes / GIB,
    )


@tcg_at_least
@each_protocol
def test_cancel_is_not_kept_waiting(liar: Liar, measured: Dict[str, Any], protocol: str) -> None:
    """A migration can be cancelled in the middle of such a report, and the guest lives on."""
    flood = liar.lie()
    # The premise: in the middle of it.
    while hints_now(liar.source).hinted_bytes == 0:
        time.sleep(0.01)
    asked = time.monotonic()
    liar.source.qmp("migrate_cancel")
    answered = time.monotonic()
    liar.source.wait_event(status_is("cancelled"), "end of the cancelled migration", 60)
    done = time.monotonic()
    hints = wait_hints_ended(liar.source)
    liar.stop(flood)
    assert hints.reason == "cancelled"
    show(
        measured,
        f"{protocol}, cancelled",
        answer_ms=(answered - asked) * 1000,
        cancelled_ms=(done - asked) * 1000,
        messages=hints.messages,
    )


def test_cancelled_while_arming(lab: Lab, measured: Dict[str, Any]) -> None:
    """A migration that is cancelled before the log is armed looks for nothing, and says why."""
    armed = spec(
        ARMED_MIB, accel=usable("kvm"), trace=ASK, preload=paths.bare_metal("slow-clear.so")
    )
    source = lab.launch(armed, "source")
    Machine(source).wait_ready()
    set_up(source)
    set_capabilities(source, {"skip-absent-pages": True})
    source.qmp("migrate", uri=TO_NOWHERE)
    while (state := hints_now(source).state) != "arming":
        assert state == "idle"
    cancel(source)
    result = query(source)
    assert result.hints and result.absent
    measured.update(armed_mib=result.hints.armed_bytes // MIB)
    # The premise: it did not come to an end.
    assert result.hints.armed_bytes < ARMED_MIB * MIB
    assert (result.hints.reason, result.absent.reason) == ("no-driver", "cancelled")
    assert (result.absent.scan_time, result.absent.absent_bytes) == (0, 0)
    assert ASK not in source.trace_log.read_text()


@tcg_at_least
@pytest.mark.parametrize("protocol", ["arrays-scattered", "blocks"])
def test_turns_are_bounded(liar: Liar, measured: Dict[str, Any]) -> None:
    """The device handles so many descriptors and addresses in one turn, and one element more.

    In between, QEMU's main loop has the chance to do something else.
    """
    liar.begin()
    # Asked and unasked, many at a time.
    liar.balloon.queue.pile(liar.head, 40)
    liar.balloon.queue.wait_returned()
    messages = hints_now(liar.source).messages
    cancel(liar.source)
    liar.balloon.queue.pile(liar.head, liar.balloon.queue.size)
    liar.balloon.queue.wait_returned()
    turns = [work for _, (work,) in liar.events(TURN)]
    measured.update(turns=len(turns), most=max(turns))
    element = MAX_DESCRIPTORS + (MAX_ADDRS if liar.balloon.arrays else 0)
    assert max(turns) < TURN_BUDGET + element
    # The premise: elements that are larger than a turn, and all were looked at.
    assert messages == 40
    assert sum(turn > TURN_BUDGET for turn in turns) >= 40
