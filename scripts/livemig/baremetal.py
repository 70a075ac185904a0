# SPDX-License-Identifier: GPL-2.0-or-later
"""The bare-metal guest (tests/migration/bare-metal) and a virtio balloon in its hands.

The guest only does what it is told, so that each step happens at a chosen moment, and no driver
stands between a test and the device: any feature bits, any descriptors, any lie.
"""

import functools
import struct
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Iterable, List, Optional, Sequence, Tuple

from livemig import paths
from livemig.errors import GuestError
from livemig.guest import Guest
from livemig.spec import CPU, GuestSpec

PAGE = 4096
MIB = 1 << 20

# A register that not every KVM has.
SPEC_CPU = f"{CPU},-arch-capabilities"

ANSWER_SECONDS = 30
# What the guest counts time in, as units of its time stamp counter: 1 << CLOCK_SHIFT there.
CLOCK_UNIT = 1024
# Words in a command line at most: MAX_WORDS in bare-metal.c.
LINE_WORDS = 192


class Machine:
    """The guest's processor, memory and ports."""

    def __init__(self, guest: Guest):
        self.guest = guest

    def wait_ready(self, timeout: float = ANSWER_SECONDS, start: int = 0) -> None:
        """Wait until the program has started."""
        self.guest.console.wait_for(r"^READY\n", timeout, start)

    def moved_to(self, guest: Guest) -> None:
        """The guest was migrated: it has another serial port now."""
        self.guest = guest

    def start(self, *words: object) -> int:
        """Begin a command; returns where its answer will be in the console's text."""
        offset = len(self.guest.console.text())
        line = " ".join(f"{word:x}" if isinstance(word, int) else str(word) for word in words)
        self.guest.console.send(line + "\n")
        return offset

    def answer(self, offset: int, timeout: float = ANSWER_SECONDS) -> List[int]:
        """Wait for the end of a command that was begun, return what it printed."""
        match = self.guest.console.wait_for(r"^((?: [0-9a-f]+)*) (ok|bad)\n", timeout, offset)
        if match.group(2) != "ok":
            raise GuestError(f"{self.guest.name}: the bare-metal guest refused a command")
        return [int(word, 16) for word in match.group(1).split()]

    def command(self, *words: object) -> List[int]:
        """Let the guest run one command, return what it printed. Numbers are sent as hex."""
        return self.answer(self.start(*words))

    def stop(self, offset: int) -> List[int]:
        """End a command that runs until a key is pressed."""
        self.guest.console.send("!")
        return self.answer(offset)

    # Memory

    def read(self, addr: int, count: int = 1, bits: int = 32) -> List[int]:
        """Read words."""
        return self.command(f"r{bits}", addr, count)

    def write(self, addr: int, values: Sequence[int], bits: int = 32) -> None:
        """Write words."""
        for start in range(0, len(values), LINE_WORDS - 1):
            part = values[start : start + LINE_WORDS - 1]
            self.command(f"w{bits}", addr + start * bits // 8, *part)

    def write_bytes(self, addr: int, data: bytes) -> None:
        """Write bytes: whole words, and then what is left."""
        whole = len(data) // 4
        self.write(addr, struct.unpack_from(f"<{whole}I", data))
        if len(data) % 4:
            self.write(addr + 4 * whole, list(data[4 * whole :]), 8)

    def stamp(self, addr: int, pages: int, seed: int) -> None:
        """Fill each page with words that hold the seed plus the page's address."""
        self.command("stamp", addr, pages, seed)

    def wrong_pages(self, addr: int, pages: int, seed: int) -> int:
        """How many pages do not hold what stamp() wrote."""
        return self.command("check", addr, pages, seed)[0]

    def clock(self) -> int:
        """The time stamp counter, in units of CLOCK_UNIT, of which 32 bits are there."""
        return self.command("clock")[0]

    def dirty(self, addr: int, pages: int, ticks: int) -> int:
        """Begin to write to pages, one in so many units of the time stamp counter.

        Machine.stop() ends it, and returns how many were written and the longest time in which the
        guest did not get on.
        """
        return self.start("dirty", addr, pages, ticks)

    # Ports

    def read_port(self, port: int, bits: int) -> int:
        """Read a port."""
        return self.command(f"i{bits}", port)[0]

    def write_port(self, port: int, value: int, bits: int) -> None:
        """Write a port."""
        self.command(f"o{bits}", port, value)


def stamped(addr: int, seed: int) -> bytes:
    """The contents of a page that Machine.stamp() wrote."""
    return struct.pack("<I", (seed + addr) & 0xFFFFFFFF) * (PAGE // 4)


@dataclass(frozen=True)
class Descriptor:
    """One descriptor of a queue, as the device reads it."""

    addr: int
    length: int
    flags: int = 0
    next: int = 0

    READ = 0
    NEXT = 1
    WRITE = 2
    INDIRECT = 4

    def pack(self) -> bytes:
        """As in memory."""
        return struct.pack("<QIHH", self.addr, self.length, self.flags, self.next)


def chain(buffers: Iterable[Tuple[int, int, bool]], first: int = 0) -> List[Descriptor]:
    """Descriptors, one after another from the first, for (address, length, device may write)."""
    buffers = list(buffers)
    last = len(buffers) - 1
    return [
        Descriptor(
            addr,
            length,
            (Descriptor.WRITE if write else 0) | (Descriptor.NEXT if i < last else 0),
            first + i + 1 if i < last else 0,
        )
        for i, (addr, length, write) in enumerate(buffers)
    ]


class Queue:
    """One virtqueue, in the layout of legacy devices."""

    def __init__(self, machine: Machine, base: int, size: int, kick: Tuple[int, int]):
        self.machine = machine
        self.size = size
        self.descriptors = base
        self.available = base + 16 * size
        self.used = (self.available + 4 + 2 * size + PAGE - 1) & -PAGE
        # The port, and the queue's number.
        self._kick = kick

    def describe(self, descriptors: Sequence[Descriptor], slot: int = 0) -> None:
        """Write descriptors into the table from a slot on."""
        data = b"".join(descriptor.pack() for descriptor in descriptors)
        self.machine.write_bytes(self.descriptors + 16 * slot, data)

    def offer(self, head: int, kick: bool = True) -> None:
        """Make the chain that begins at a slot available."""
        index = self.machine.read(self.available + 2, 1, 16)[0]
        self.machine.write(self.available + 4 + 2 * (index % self.size), [head], 16)
        self.machine.write(self.available + 2, [(index + 1) & 0xFFFF], 16)
        if kick:
            self.kick()

    def put(self, descriptors: Sequence[Descriptor], slot: int = 0, kick: bool = True) -> None:
        """Write a chain and make it available."""
        self.describe(descriptors, slot)
        self.offer(slot, kick)

    def kick(self) -> None:
        """Tell the device that there is something available."""
        port, number = self._kick
        self.machine.write_port(port, number, 16)

    def offered(self) -> int:
        """How many chains were made available, modulo 2^16."""
        return self.machine.read(self.available + 2, 1, 16)[0]

    def returned(self) -> int:
        """How many chains the device has returned, modulo 2^16."""
        return self.machine.read(self.used + 2, 1, 16)[0]

    def put_same(self, count: int, addr: int, length: int, write: bool = False) -> None:
        """Make a chain of equal buffers available."""
        flags = Descriptor.WRITE if write else 0
        self.machine.command("chain", self.descriptors, count, addr, length, flags)
        self.offer(0)

    def wait_returned(self, timeout: float = ANSWER_SECONDS) -> None:
        """Wait until the device has returned all chains."""
        deadline = time.monotonic() + timeout
        while self.returned() != self.offered():
            if time.monotonic() > deadline:
                raise GuestError(
                    f"the device returned {self.returned()} of {self.offered()} chains "
                    f"within {timeout:.0f} s"
                )

    def flood(self, head: int, *change: int) -> int:
        """Begin to offer a chain as fast as the device returns it; Machine.stop() ends it.

        With an address and two words, these are written there in turn all the while.
        """
        return self.machine.start(
            "flood", head, self.available, self.used, self.size, *self._kick, *change
        )

    def pile(self, head: int, times: int) -> None:
        """Offer a chain many times, with as many kicks, without waiting for its return."""
        self.machine.command("ring", head, times, self.available, self.size, *self._kick)


class Balloon:
    """The virtio balloon, through its legacy registers in I/O space."""

    # pylint: disable=too-many-public-methods

    VENDOR_DEVICE = 0x1002_1AF4
    IO_BASE = 0xC000

    # Registers
    DEVICE_FEATURES = 0
    DRIVER_FEATURES = 4
    QUEUE_PAGE = 8
    QUEUE_SIZE = 12
    QUEUE_SELECT = 14
    QUEUE_NOTIFY = 16
    STATUS = 18
    CONFIG = 20
    CMD_ID = CONFIG + 8
    POISON = CONFIG + 12

    ACKNOWLEDGE = 1
    DRIVER = 2
    DRIVER_OK = 4
    NEEDS_RESET = 0x40

    # Feature bits
    HINTS = 1 << 3
    PAGE_POISON = 1 << 4
    INDIRECT = 1 << 28
    ARRAYS = 1 << 23

    # Inflate, deflate and statistics come before it.
    HINT_QUEUE = 3

    # Command ids that are none
    STOP = 0
    DONE = 1

    # Where this program keeps the queue and its messages.
    QUEUE_ADDR = 1 * MIB
    MESSAGES = 2 * MIB
    MESSAGE_BYTES = 256 << 10

    def __init__(self, machine: Machine):
        self.machine = machine
        self._enable()
        self.queue = Queue(machine, self.QUEUE_ADDR, 0, (0, 0))

    # Registers

    def _enable(self) -> None:
        """Find the device on the first bus and map its registers."""
        for slot in range(32):
            if self._pci(slot, 0) == self.VENDOR_DEVICE:
                break
        else:
            raise GuestError(f"{self.machine.guest.name}: no virtio balloon on the first PCI bus")
        self._pci(slot, 0x10, self.IO_BASE)
        # I/O, memory, bus master
        self._pci(slot, 4, 7)

    def _pci(self, slot: int, register: int, value: Optional[int] = None) -> int:
        """Read or write a word of a slot's configuration."""
        self.machine.write_port(0xCF8, 0x80000000 | slot << 11 | register, 32)
        if value is None:
            return self.machine.read_port(0xCFC, 32)
        self.machine.write_port(0xCFC, value, 32)
        return value

    def get(self, register: int, bits: int = 32) -> int:
        """Read a register."""
        return self.machine.read_port(self.IO_BASE + register, bits)

    def set(self, register: int, value: int, bits: int = 32) -> None:
        """Write a register."""
        self.machine.write_port(self.IO_BASE + register, value, bits)

    def reset(self) -> None:
        """Reset the device. The queue's memory is cleared too."""
        self.set(self.STATUS, 0, 8)
        if self.queue.size:
            self.machine.command("fill", self.QUEUE_ADDR, 0x7000 // 4, 0)

    def start(self, features: int, poison: int = 0, page: Optional[int] = None) -> None:
        """Negotiate features, set the hint queue up (at any page) and start the device."""
        self.reset()
        self.set(self.STATUS, self.ACKNOWLEDGE, 8)
        self.set(self.STATUS, self.ACKNOWLEDGE | self.DRIVER, 8)
        offered = self.get(self.DEVICE_FEATURES)
        if features & ~offered:
            raise GuestError(f"the device offers features {offered:#x}, not {features:#x}")
        self.set(self.DRIVER_FEATURES, features)
        self.set(self.QUEUE_SELECT, self.HINT_QUEUE, 16)
        size = self.get(self.QUEUE_SIZE, 16)
        self.set(self.QUEUE_PAGE, self.QUEUE_ADDR // PAGE if page is None else page)
        self.queue = Queue(
            self.machine,
            self.QUEUE_ADDR,
            size,
            (self.IO_BASE + self.QUEUE_NOTIFY, self.HINT_QUEUE),
        )
        if features & self.PAGE_POISON:
            self.set(self.POISON, poison)
        self.set(self.STATUS, self.ACKNOWLEDGE | self.DRIVER | self.DRIVER_OK, 8)

    @property
    def broken(self) -> bool:
        """Whether the device has given up on its driver. Legacy drivers can only ask QEMU."""
        for device in self.machine.guest.qmp("x-query-virtio"):
            if device["name"] == "virtio-balloon":
                status = self.machine.guest.qmp("x-query-virtio-status", path=device["path"])
                return bool(status["broken"])
        raise GuestError("QEMU has no virtio balloon")

    def cmd_id(self) -> int:
        """The command id that the device shows."""
        return self.get(self.CMD_ID)

    def wait_asked(self, timeout: float = ANSWER_SECONDS) -> int:
        """Wait until the device asks for hints; returns the id."""
        deadline = time.monotonic() + timeout
        while True:
            cmd_id = self.cmd_id()
            if cmd_id not in (self.STOP, self.DONE):
                return cmd_id
            if time.monotonic() > deadline:
                raise GuestError(f"the device asked for no hints within {timeout:.0f} s")

    # Arrays

    def message_addr(self, slot: int) -> int:
        """Where the message of a descriptor's slot is kept."""
        return self.MESSAGES + slot * self.MESSAGE_BYTES

    def write_array(self, cmd_id: int, size: int, addrs: Sequence[int], slot: int = 0) -> int:
        """Write a message into a slot's memory; returns its length."""
        data = struct.pack(f"<II{len(addrs)}Q", cmd_id, size, *addrs)
        self.machine.write_bytes(self.message_addr(slot), data)
        return len(data)

    def send_array(
        self, cmd_id: int, size: int, addrs: Sequence[int], slot: int = 0, kick: bool = True
    ) -> None:
        """Send a message: free blocks of a size."""
        length = self.write_array(cmd_id, size, addrs, slot)
        self.queue.put(chain([(self.message_addr(slot), length, False)], slot), slot, kick)

    def write_series(self, cmd_id: int, size: int, first: int, step: int, count: int) -> int:
        """Write a long message into slot 0; returns its length."""
        addr = self.message_addr(0)
        self.machine.write(addr, [cmd_id, size])
        self.machine.command("series", addr + 8, count, first, step)
        return 8 + 8 * count

    def send_end(self, cmd_id: int, slot: int = 0) -> None:
        """Send the message that ends a report."""
        self.send_array(cmd_id, 0, [], slot)

    # Blocks, the protocol without arrays

    def send_command(self, cmd_id: int, slot: int = 0, kick: bool = True) -> None:
        """Send a command id, which begins or ends a report."""
        addr = self.message_addr(slot)
        self.machine.write(addr, [cmd_id])
        self.queue.put(chain([(addr, 4, False)], slot), slot, kick)

    def send_block(self, addr: int, length: int, slot: int = 0, kick: bool = True) -> None:
        """Send one free block."""
        self.queue.put(chain([(addr, length, True)], slot), slot, kick)


def spec(mem_mib: int = 128, **changes: object) -> GuestSpec:
    """A machine for the bare-metal guest."""
    return GuestSpec(
        mem_mib=mem_mib,
        vcpus=1,
        cpu=SPEC_CPU,
        firmware=paths.bare_metal("bare-metal.bin"),
    ).but(**changes)


@functools.lru_cache(maxsize=None)
def trouble_with_kvm(accel: str = "kvm") -> Optional[str]:
    """Why the bare-metal guest does not run with KVM on this machine, found out by running it."""
    device = Path("/dev/kvm")
    if not device.exists():
        return f"there is no {device} on this machine."
    with tempfile.TemporaryDirectory(prefix="livemig-") as logs:
        try:
            with Guest(spec(accel=accel), "probe", logs=Path(logs)) as guest:
                machine = Machine(guest)
                machine.wait_ready()
                machine.stamp(16 * MIB, 1, 1)
        except GuestError as err:
            return f"-accel {accel} does not run a program here: {' '.join(str(err).split())}"
    return None
