# SPDX-License-Identifier: GPL-2.0-or-later
"""A virtio balloon for the bare-metal guest to drive: any features, any descriptors, any lie."""

import struct
import time
from dataclasses import dataclass
from typing import Iterable, List, Optional, Sequence, Tuple

from livemig.errors import GuestError
from livemig.machine import ANSWER_SECONDS, MIB, PAGE, Machine

# In an array, at most.
MAX_ADDRS = 16384
# What a descriptor's flags say.
NEXT, WRITE, INDIRECT = 1, 2, 4


@dataclass(frozen=True)
class Descriptor:
    """One descriptor of a queue, as the device reads it."""

    addr: int
    length: int
    flags: int = 0
    next: int = 0

    def pack(self) -> bytes:
        """As in memory."""
        return struct.pack("<QIHH", self.addr, self.length, self.flags, self.next)


def chain(buffers: Iterable[Tuple[int, int, bool]], first: int = 0) -> List[Descriptor]:
    """Descriptors, one after another from the first, for (address, length, device may write)."""
    descriptors = [
        Descriptor(addr, length, NEXT | (WRITE if write else 0), following)
        for following, (addr, length, write) in enumerate(buffers, first + 1)
    ]
    last = descriptors.pop()
    return [*descriptors, Descriptor(last.addr, last.length, last.flags & ~NEXT)]


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
        flags = WRITE if write else 0
        self.machine.command("chain", self.descriptors, count, addr, length, flags)
        self.offer(0)

    def wait_returned(self) -> None:
        """Wait until the device has returned all chains."""
        deadline = time.monotonic() + ANSWER_SECONDS
        while self.returned() != self.offered():
            if time.monotonic() > deadline:
                count = f"{self.returned()} of {self.offered()} chains"
                raise GuestError(f"the device returned {count} within {ANSWER_SECONDS} s")

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
    CACHE_MIB = CONFIG + 16
    CACHE_MS = CONFIG + 20

    # What the status says
    ACKNOWLEDGE, DRIVER, DRIVER_OK = 1, 2, 4

    # Feature bits
    HINTS = 1 << 3
    ARRAYS = 1 << 23
    CACHE = 1 << 22
    # What our driver has.
    OURS = HINTS | ARRAYS

    # Inflate, deflate and statistics come before it.
    HINT_QUEUE = 3

    # Command ids that are none
    STOP, DONE = 0, 1

    # Where this program keeps the queue and its messages.
    QUEUE_ADDR = 1 * MIB
    MESSAGES = 2 * MIB
    MESSAGE_BYTES = 256 << 10

    def __init__(self, machine: Machine):
        self.machine = machine
        self._enable()
        self.queue = Queue(machine, self.QUEUE_ADDR, 0, (0, 0))
        # Whether hints are sent in arrays.
        self.arrays = False

    # Registers

    def _enable(self) -> None:
        """Find the device on the first bus and map its registers."""
        slot = next((slot for slot in range(32) if self._pci(slot, 0) == self.VENDOR_DEVICE), None)
        if slot is None:
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

    def start(self, features: int = OURS) -> None:
        """Negotiate features, set the hint queue up and start the device."""
        self.reset()
        self.set(self.STATUS, self.ACKNOWLEDGE, 8)
        self.set(self.STATUS, self.ACKNOWLEDGE | self.DRIVER, 8)
        offered = self.get(self.DEVICE_FEATURES)
        if features & ~offered:
            raise GuestError(f"the device offers features {offered:#x}, not {features:#x}")
        self.set(self.DRIVER_FEATURES, features)
        self.arrays = bool(features & self.ARRAYS)
        self.set(self.QUEUE_SELECT, self.HINT_QUEUE, 16)
        size = self.get(self.QUEUE_SIZE, 16)
        self.set(self.QUEUE_PAGE, self.QUEUE_ADDR // PAGE)
        kick = (self.IO_BASE + self.QUEUE_NOTIFY, self.HINT_QUEUE)
        self.queue = Queue(self.machine, self.QUEUE_ADDR, size, kick)
        self.set(self.STATUS, self.ACKNOWLEDGE | self.DRIVER | self.DRIVER_OK, 8)

    @property
    def broken(self) -> bool:
        """Whether the device has given up on its driver. Legacy drivers can only ask QEMU."""
        path = "/machine/peripheral/balloon/virtio-backend"
        return bool(self.machine.guest.qmp("x-query-virtio-status", path=path)["broken"])

    def cmd_id(self) -> int:
        """The command id that the device shows."""
        return self.get(self.CMD_ID)

    def cache_budget(self) -> Tuple[int, int]:
        """MiB of page cache that may be freed, and milliseconds that it may take."""
        return self.get(self.CACHE_MIB), self.get(self.CACHE_MS)

    def wait_asked(self) -> int:
        """Wait until the device asks for hints; returns the id."""
        deadline = time.monotonic() + ANSWER_SECONDS
        while (cmd_id := self.cmd_id()) in (self.STOP, self.DONE):
            if time.monotonic() > deadline:
                raise GuestError(f"the device asked for no hints within {ANSWER_SECONDS} s")
        return cmd_id

    # Reports, with arrays or without

    def begin(self, cmd_id: int) -> None:
        """Begin a report: nothing to do with arrays, each of which carries the id."""
        if not self.arrays:
            self.send_command(cmd_id)
            self.queue.wait_returned()

    def end(self, cmd_id: int) -> None:
        """End a report."""
        if self.arrays:
            self.send_end(cmd_id)
        else:
            self.send_command(cmd_id)

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
