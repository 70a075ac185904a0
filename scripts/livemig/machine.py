# SPDX-License-Identifier: GPL-2.0-or-later
"""The bare-metal guest (tests/migration/guest/bare-metal): its processor, memory and ports.

It only does what it is told, so that each step happens at a chosen moment, and no driver stands
between a test and a device.
"""

import functools
import struct
import tempfile
from pathlib import Path
from typing import List, Optional, Sequence

from livemig import paths
from livemig.errors import GuestError
from livemig.guest import Guest
from livemig.host import MIB, PAGE_BYTES
from livemig.spec import CPU, GuestSpec

PAGE = PAGE_BYTES

ANSWER_SECONDS = 30
# Where it has no RAM.
FIRMWARE = 0xFFFF0000
LOCAL_APIC = 0xFEE00000
# What the guest counts time in, as units of its time stamp counter: 1 << CLOCK_SHIFT there.
CLOCK_UNIT = 1024
# Words in a command line at most: MAX_WORDS in bare-metal.c.
LINE_WORDS = 192


class Machine:
    """The guest's processor, memory and ports."""

    def __init__(self, guest: Guest):
        self.guest = guest

    def wait_ready(self) -> None:
        """Wait until the program has started."""
        self.guest.console.wait_for(r"^READY\n", ANSWER_SECONDS, 0)

    def moved_to(self, guest: Guest) -> None:
        """The guest was migrated: it has another serial port now."""
        self.guest = guest

    def start(self, *words: object) -> int:
        """Begin a command; returns where its answer will be in the console's text."""
        offset = len(self.guest.console.text())
        line = " ".join(f"{word:x}" if isinstance(word, int) else str(word) for word in words)
        self.guest.console.send(line + "\n")
        return offset

    def answer(self, offset: int) -> List[int]:
        """Wait for the end of a command that was begun, return what it printed."""
        words = r"^((?: [0-9a-f]+)*) (ok|bad)\n"
        match = self.guest.console.wait_for(words, ANSWER_SECONDS, offset)
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


def spec(mem_mib: int = 128, **changes: object) -> GuestSpec:
    """A machine for the bare-metal guest."""
    # Without a register that not every KVM has.
    cpu = f"{CPU},-arch-capabilities"
    program = paths.bare_metal("bare-metal.bin")
    return GuestSpec(mem_mib=mem_mib, vcpus=1, cpu=cpu, firmware=program).but(**changes)


@functools.lru_cache(maxsize=None)
def trouble_with_kvm(accel: str = "kvm") -> Optional[str]:
    """Why the bare-metal guest does not run with KVM on this machine, found out by running it."""
    if not Path("/dev/kvm").exists():
        return "there is no /dev/kvm on this machine."
    with tempfile.TemporaryDirectory(prefix="livemig-") as logs:
        try:
            with Guest(spec(accel=accel), "probe", logs=Path(logs)) as guest:
                machine = Machine(guest)
                machine.wait_ready()
                machine.stamp(16 * MIB, 1, 1)
        except GuestError as err:
            return f"-accel {accel} does not run a program here: {' '.join(str(err).split())}"
    return None
