# SPDX-License-Identifier: GPL-2.0-or-later
"""What the guests do before, during and after a migration."""

import time
from dataclasses import dataclass
from typing import Any, ClassVar, Dict, List, Mapping, Tuple

from livebench import orders, throughput
from livebench.console import Console
from livebench.throughput import Point, Span
from livemig import workload
from livemig.errors import GuestError
from livemig.guest import BOOT_SECONDS, Guest

# Stamped in each guest before the migration, so that there is something to lose.
STAMP_MIB = 16
# What a booted guest and its QEMU use: fixed, and for each MiB of the guest (its memmap).
QEMU_MIB = 400
MEMMAP_SHARE = 0.03
# What Debian, its compiler and their files use besides.
DEBIAN_MIB = 1000
# Left free in a guest that is to have no free memory: its kernel must be able to work.
RESERVE_MIB = 64
# Linux notices memory that is to be reported after two seconds: let a boot end.
IDLE_SECONDS = 1


@dataclass(frozen=True)
class Workload:
    """Nothing: the guest has booted and is idle. The base of all others."""

    # What the properties below say, with values of the workload, {0.VALUE}.
    NAME: ClassVar[str] = "idle"
    ABOUT: ClassVar[str] = "idle after boot"
    # The names of the memory that the guest checks at the destination.
    stamps: ClassVar[Tuple[str, ...]] = ("default",)
    # Boots Debian from its disk, in place of busybox.
    debian: ClassVar[bool] = False
    # A Debian with its own kernel, as people have it (scripts/make-stock-guest). Where the mode's
    # kernel is ours, the guest package is in it (bench/make-packaged-guest).
    suite: ClassVar[str] = ""
    # A guest kernel in place of the mode's: with what the workload needs, in all modes.
    kernel: ClassVar[str] = ""
    boot_seconds: ClassVar[int] = BOOT_SECONDS
    # One of the disks that bench/make-images makes; the guest writes to it or not.
    data_disk: ClassVar[str] = ""
    data_writable: ClassVar[bool] = False
    # Seconds that it goes on before the migration, undisturbed.
    lead: ClassVar[float] = 0
    # What it takes from the host, beyond what a booted guest does: so much, and of the memory.
    hold_mib: ClassVar[int] = 0
    percent: ClassVar[int] = 0
    # The host's seconds that a run takes, with all waiting: what one run of everything took, about
    # (bench/results/whole.json.xz). Only progress uses it.
    guess: ClassVar[int] = 6

    @property
    def name(self) -> str:
        """What the scenario's name begins with."""
        return self.NAME.format(self)

    @property
    def about(self) -> str:
        """One line for people."""
        return self.ABOUT.format(self)

    def used_mib(self, mem_mib: int) -> int:
        """What it takes of so much memory."""
        return self.hold_mib + mem_mib * self.percent // 100

    def host_mib(self, mem_mib: int) -> int:
        """The host's memory that a source, or a destination without hints, needs at most."""
        debian = DEBIAN_MIB if self.debian or self.suite else 0
        most = STAMP_MIB + self.used_mib(mem_mib) + debian + int(mem_mib * MEMMAP_SHARE)
        return min(most, mem_mib) + QEMU_MIB

    def prepare(self, guest: Guest) -> None:
        """Bring a guest that has just booted into the state to be migrated."""
        time.sleep(IDLE_SECONDS)
        workload.stamp(guest, STAMP_MIB)

    def start(self, guest: Guest, console: Console) -> None:
        """Begin what goes on during the migration."""

    def finish(self, guest: Guest, console: Console, span: Span) -> Dict[str, Any]:
        """What came of it, at the destination."""
        del guest, console, span
        return {}


Idle = Workload


class Bookworm(Workload):
    """Debian 12 has booted and is idle; its kernel zeroes what it allocates."""

    NAME = "{0.suite}"
    ABOUT = "Debian {0.suite} as it comes, idle after boot"
    suite = "bookworm"
    boot_seconds = 600
    guess = 90

    def prepare(self, guest: Guest) -> None:
        # Whether well or not: something can have failed that is not ours.
        guest.agent.run("systemctl is-system-running --wait || :", self.boot_seconds)
        guest.agent.run("udevadm settle --timeout 300", self.boot_seconds)
        super().prepare(guest)


@dataclass(frozen=True)
class Freed(Workload):
    """Memory that was written and is free again."""

    NAME = "freed-{0.percent}"
    ABOUT = "{0.percent} % of the memory were written and freed"
    percent: int = 75
    guess = 12

    def prepare(self, guest: Guest) -> None:
        workload.dirty_and_free(guest, self.used_mib(guest.spec.mem_mib))
        super().prepare(guest)


class Churn(Workload):
    """Memory that is rewritten all the time, and some that is taken and given back."""

    NAME = "churn"
    ABOUT = "memory is rewritten, freed and taken back all the time"
    stamps = ("default", "churn")
    MIB = 64
    REALLOC_MIB = 128
    hold_mib = MIB + REALLOC_MIB

    def prepare(self, guest: Guest) -> None:
        super().prepare(guest)
        workload.stamp(guest, self.MIB, churn=True, realloc_mib=self.REALLOC_MIB, name="churn")


@dataclass(frozen=True)
class Held(Workload):
    """Memory that is in use, but for a share of it."""

    NAME = "free-{0.free_percent}"
    ABOUT = "{0.free_percent} % of the memory are free, the rest holds data"
    free_percent: int = 0
    stamps = ("default", "held")
    guess = 15

    def used_mib(self, mem_mib: int) -> int:
        return mem_mib * (100 - self.free_percent) // 100

    def prepare(self, guest: Guest) -> None:
        super().prepare(guest)
        info = workload.meminfo(guest)
        wanted = info["MemFree"] - guest.spec.mem_mib * self.free_percent // 100
        held = min(wanted, info["MemAvailable"] - RESERVE_MIB)
        guest.agent.run(f"memstamp start --name held {max(held, 1)}", timeout=600)


@dataclass(frozen=True)
class Alternate(Workload):
    """Of a share of the memory, every second page holds data and the others are free."""

    NAME = "alternate"
    ABOUT = "of {0.percent} % of the memory, every second page holds data, the rest is free"
    percent: int = 75
    stamps = ("default", "held")
    guess = 50

    def prepare(self, guest: Guest) -> None:
        super().prepare(guest)
        mib = self.used_mib(guest.spec.mem_mib)
        guest.agent.run(f"memstamp start --name held --alternate {mib}", timeout=600)


@dataclass(frozen=True)
class Compile(Workload):
    """A part of the kernel is compiled; the guest moves in the middle of it."""

    # Wait for its end, to know how long it took.
    to_the_end: bool = False

    debian = True
    data_disk = "compile.ext4"
    data_writable = True
    guess = 60

    # What is compiled, and how many objects that makes.
    TARGETS = "lib/"
    OBJECTS = 85
    OBJECT = r"^  CC      \S+\.o"
    SECONDS = 900

    @property
    def name(self) -> str:
        return "compile-whole" if self.to_the_end else "compile"

    @property
    def about(self) -> str:
        whole = ", from its begin to its end" if self.to_the_end else ""
        return f"a part of the kernel is being compiled{whole}"

    def command(self) -> str:
        """Compiles, on the console."""
        make = f"make -C /mnt/linux ARCH=i386 -j4 {self.TARGETS}"
        return f"echo compile begin; {make}; echo compile end $?"

    def prepare(self, guest: Guest) -> None:
        guest.agent.run("mkdir -p /mnt && mount /dev/vdb /mnt")
        super().prepare(guest)

    def start(self, guest: Guest, console: Console) -> None:
        on_console(guest, self.command())
        # So many objects have been begun when the guest moves.
        middle = self.OBJECTS // (2 if self.to_the_end else 4)
        console.wait(self.OBJECT, guest, self.SECONDS, count=middle)

    def finish(self, guest: Guest, console: Console, span: Span) -> Dict[str, Any]:
        if not self.to_the_end:
            return {}
        ended, match = console.wait(r"compile end (\d+)", guest, self.SECONDS)
        begun = console.matches("compile begin")
        if match[1] != "0" or not begun:
            raise GuestError(
                f"{guest.name}: the kernel did not compile: make ended with {match[1]}"
            )
        points = [Point(when, 1) for when, _ in console.matches(self.OBJECT)]
        return {"compile_s": ended - begun[0][0], **throughput.judge(points, span)}


@dataclass(frozen=True)
class Fragmented(Compile):
    """A guest that compiled for a while and is idle now."""

    # It compiles the same again, until so many minutes are over. Once at least.
    minutes: int = 0

    guess = 240
    LOG = "/run/make.log"

    @property
    def name(self) -> str:
        return f"fragmented-{self.minutes}min" if self.minutes else "fragmented"

    @property
    def about(self) -> str:
        again = f", over and over for {self.minutes} minutes" if self.minutes else ""
        return f"idle, after a part of the kernel was compiled{again}"

    def command(self) -> str:
        """Compiles, as often as there is time for."""
        uptime = "$(cut -d. -f1 /proc/uptime)"
        clean = f"find /mnt/linux/{self.TARGETS} -name '*.o' -delete"
        over = f"[ {uptime} -ge $((begun + {60 * self.minutes})) ]"
        return f"begun={uptime}; until {clean}; {super().command()}; {over}; do :; done"

    def prepare(self, guest: Guest) -> None:
        super().prepare(guest)
        guest.agent.run(f"({self.command()}) > {self.LOG} 2>&1", self.SECONDS + 60 * self.minutes)
        if guest.agent.exec(f'! grep "compile end" {self.LOG} | grep -v " 0$"')[0]:
            raise GuestError(f"{guest.name}: the kernel did not compile")
        time.sleep(5 * IDLE_SECONDS)

    def start(self, guest: Guest, console: Console) -> None:
        pass

    def finish(self, guest: Guest, console: Console, span: Span) -> Dict[str, Any]:
        if not orders.offered(guest):
            return {}
        compiled = int(guest.agent.run(f'grep -c "compile end 0" {self.LOG}'))
        return {"compiled": compiled, "orders": orders.by_order(guest)}


class Working(Workload):
    """A program that reports how it gets on runs through the migration."""

    # How long it would run: longer than anybody watches.
    SECONDS = 900
    # What it writes, allocloop if nothing else is said. Groups: operations, and their latency (the
    # 99th percentile) or nothing; and the unit of that.
    line = r"alloc ms=\d+ ops=(\d+) p50=\d+ p99=(\d+) max=(\d+)$"
    latency_us = 0.001
    lead = throughput.BEFORE_SECONDS + 3
    guess = 30

    def command(self, guest: Guest) -> str:
        """Starts the program."""
        raise NotImplementedError

    def points(self, console: Console) -> List[Point]:
        """What it reported."""
        return [
            Point(when, float(match[1]), float(match[2]) * self.latency_us if match[2] else None)
            for when, match in console.matches(self.line)
        ]

    def start(self, guest: Guest, console: Console) -> None:
        on_console(guest, self.command(guest))
        console.wait(self.line, guest, 60)

    def finish(self, guest: Guest, console: Console, span: Span) -> Dict[str, Any]:
        enough = max(span.end + throughput.AFTER_SECONDS, span.start + throughput.WINDOW_SECONDS)
        time.sleep(max(enough + 1.5 - time.monotonic(), 0))
        return throughput.judge(self.points(console), span)


@dataclass(frozen=True)
class AllocLoop(Working):
    """Takes memory and gives it back."""

    ABOUT = "a program takes {0.share:.0%} of the memory and gives it back, again and again"
    # Of the guest's memory. QEMU can only finish if a link carries what the loop writes anew in
    # the downtime limit.
    share: float = 0.25

    @property
    def name(self) -> str:
        return "allocloop" if self.share == 0.25 else f"allocloop-{self.share:.0%}".rstrip("%")

    def used_mib(self, mem_mib: int) -> int:
        return int(mem_mib * self.share)

    def command(self, guest: Guest) -> str:
        return f"allocloop {self.SECONDS} {self.used_mib(guest.spec.mem_mib)}"


@dataclass(frozen=True)
class Touching(Working):
    """A program touches memory all the time; how long it stood still at most is what is asked.

    It writes a line every 10 ms. By the host's clock, the longest time without one, from the switch
    to postcopy on, is a stall whatever the reason: the guest was stopped, or waited for a page. The
    longest of its operations by the guest's own clock tells of the pages alone, as that clock
    stands still with the guest.
    """

    # Of the memory, written and freed before.
    percent: int = 0

    hold_mib = 64
    BEAT_MS = 10
    WATCHED_SECONDS = 1
    lead = 3
    guess = 14

    @property
    def name(self) -> str:
        return {0: "idle", 75: "freed"}.get(self.percent, f"freed-{self.percent}")

    @property
    def about(self) -> str:
        text = f"a program touches {self.hold_mib} MiB all the time"
        return text + (f", {self.percent} % were written and freed" if self.percent else "")

    def prepare(self, guest: Guest) -> None:
        if self.percent:
            workload.dirty_and_free(guest, guest.spec.mem_mib * self.percent // 100)
        super().prepare(guest)

    def command(self, guest: Guest) -> str:
        return f"allocloop {self.SECONDS} {self.hold_mib} {self.BEAT_MS}"

    def finish(self, guest: Guest, console: Console, span: Span) -> Dict[str, Any]:
        enough = span.end + self.WATCHED_SECONDS
        time.sleep(max(enough - time.monotonic(), 0))
        console.wait(self.line, guest, 60, count=len(console.matches(self.line)) + 1)
        beats = console.matches(self.line)
        times = [when for when, _ in beats]
        before = throughput.longest_gap(times, span.start - self.WATCHED_SECONDS, span.start)
        begin = span.switch or span.start
        stall = throughput.longest_gap(times, begin, enough)
        slowest = max(int(match[3]) for when, match in beats if begin <= when <= enough)
        return {
            "stall_before_ms": before and before * 1000,
            "stall_ms": stall and stall * 1000,
            "slowest_touch_ms": slowest / 1e6,
        }


_EVENTS = r"\[ \d+s \] thds: \d+ eps: ([\d.]+) lat \(ms,99%\): ([\d.]+)"
_FILES = "--file-total-size=512M --file-num=8 --file-test-mode=rndrw"
_RATES = r"\[ \d+s \] reads: ([\d.]+) MiB/s writes: [\d.]+ MiB/s .* latency \(ms,99%\): ([\d.]+)"
# The options of sysbench's tests, and what they report each second.
SYSBENCH: Mapping[str, Tuple[str, str]] = {
    "memory": ("memory --memory-total-size=1000T", r"\[ \d+s \] ([\d.]+) MiB/sec()"),
    "cpu": ("cpu", _EVENTS),
    "fileio": (f"fileio {_FILES}", _RATES),
    "mmap": (f"fileio {_FILES} --file-io-mode=mmap", _RATES),
    "threads": ("threads", _EVENTS),
}


@dataclass(frozen=True)
class Sysbench(Working):
    """One of sysbench's tests."""

    NAME = "sysbench-{0.test}"
    ABOUT = "sysbench's test {0.test} goes on"
    test: str = "cpu"
    debian = True
    latency_us = 1000

    @property
    def line(self) -> str:
        """What the test writes."""
        return SYSBENCH[self.test][1]

    @property
    def hold_mib(self) -> int:
        """What it takes, with its files."""
        return 600 if _FILES in SYSBENCH[self.test][0] else 100

    def prepare(self, guest: Guest) -> None:
        if _FILES in SYSBENCH[self.test][0]:
            guest.agent.run(f"cd /root && sysbench fileio {_FILES} prepare", timeout=300)
        super().prepare(guest)

    def command(self, guest: Guest) -> str:
        return (
            f"cd /root; sysbench {SYSBENCH[self.test][0]} --threads=4 --time={self.SECONDS} "
            "--events=0 --report-interval=1 --percentile=99 run"
        )


def on_console(guest: Guest, command: str) -> None:
    """Start a command that writes to the console, and let it run."""
    guest.agent.run(f"setsid sh -c '{command}' > /dev/ttyS0 2>&1 &")
