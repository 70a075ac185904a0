# SPDX-License-Identifier: GPL-2.0-or-later
"""Guests whose memory is full of files: read once, or read again and again."""

import time
from dataclasses import dataclass
from typing import Any, Dict

from livebench import throughput
from livebench.console import Console
from livebench.throughput import Span
from livebench.workloads import Sysbench, Working, Workload, on_console
from livemig.guest import Guest
from livemig.workload import refaults

# Of the files on the disk: 0, 1, ...
FILE_MIB = 64


def mount(guest: Guest, disk: str) -> None:
    """Mount the disk that has the files."""
    guest.agent.run(f"mkdir -p /mnt && mount -o ro /dev/{disk} /mnt")


def file_names(begin: int, end: int) -> str:
    """The words for a shell."""
    return " ".join(f"/mnt/{number}" for number in range(begin, end))


def read_once(guest: Guest, names: str) -> None:
    """Read files of the guest, so that they are cold.

    Not as cat does, by sendfile(): that marks a large folio anew for each piece that it takes.
    """
    loop = f"for f in {names}; do dd if=$f of=/dev/null bs=64k || exit; done"
    guest.agent.run(f"({loop}) 2> /run/read || (cat /run/read; false)", timeout=600)


class PageCache(Workload):
    """Memory full of files that were read."""

    NAME = "pagecache"
    ABOUT = "the page cache is full of files"
    data_disk = "pagecache.ext4"
    percent = 100
    guess = 30

    def read(self, guest: Guest) -> None:
        """Fill the page cache."""
        files = guest.spec.mem_mib // FILE_MIB
        read_once(guest, f"$(ls /mnt/[0-9]* | head -n {files})")

    def prepare(self, guest: Guest) -> None:
        mount(guest, "vda")
        self.read(guest)
        super().prepare(guest)


class XfsPageCache(PageCache):
    """The same on a file system whose page cache has large folios in Linux 6.12 already."""

    NAME = "pagecache-xfs"
    ABOUT = "the page cache is full of files of XFS"
    data_disk = "pagecache.xfs"
    kernel = "xfs"


class Refaulting(PageCache):
    """Files that are wanted again: those that had to be read again are counted."""

    guess = 60
    # What is left to the rest: then nothing has to be evicted before the migration.
    SPARE_MIB = 512

    def files(self, guest: Guest) -> int:
        """How many there are: nothing has to be evicted for them."""
        return (guest.spec.mem_mib - self.SPARE_MIB) // FILE_MIB

    def start(self, guest: Guest, console: Console) -> None:
        super().start(guest, console)
        guest.agent.run(f"echo {refaults(guest)} > /run/refaults")

    def finish(self, guest: Guest, console: Console, span: Span) -> Dict[str, Any]:
        result = super().finish(guest, console, span)
        result["refaulted_pages"] = refaults(guest) - int(guest.agent.run("cat /run/refaults"))
        return result


class HotAndCold(Refaulting, Working):
    """Files that are read again and again, beside many that were read once."""

    HOT_FILES = 6
    AFTER_SECONDS = 10
    line = r"^hot (\d+)()"
    NAME = "hotcold"
    ABOUT = (
        f"{HOT_FILES * FILE_MIB} MiB of files are read again and again, the others were read once"
    )

    def read(self, guest: Guest) -> None:
        hot = file_names(0, self.HOT_FILES)
        guest.agent.run(f"cat {hot} {hot} > /dev/null", timeout=600)
        read_once(guest, file_names(self.HOT_FILES, self.files(guest)))

    def command(self, guest: Guest) -> str:
        names = file_names(0, self.HOT_FILES)
        return (
            f"while :; do for f in {names}; do cat $f > /dev/null; echo hot {FILE_MIB}; done; done"
        )

    def finish(self, guest: Guest, console: Console, span: Span) -> Dict[str, Any]:
        time.sleep(max(span.end + self.AFTER_SECONDS + 1.5 - time.monotonic(), 0))
        result = super().finish(guest, console, span)
        points = self.points(console)
        before = throughput.rate(points, span.start - throughput.BEFORE_SECONDS, span.start)
        after = throughput.rate(points, span.end, span.end + self.AFTER_SECONDS)
        result["after10_rate"] = after
        result["after10_kept"] = after / before if after and before else None
        return result


@dataclass(frozen=True)
class WantedAgain(Refaulting):
    """Files that were read once, and are wanted after the migration, one after the other, twice.

    The first time they are read from the disk, as far as their cache was freed. The second time is
    what they take from the cache.
    """

    # What the destination's disk gives, in bytes per second; 0: as much as it can.
    limit: int = 0

    SECONDS = 600

    @property
    def name(self) -> str:
        return "wanted-again" + (f"-{self.limit // 10**6}mbs" if self.limit else "")

    @property
    def about(self) -> str:
        disk = f" from a disk of {self.limit // 10**6} MB/s" if self.limit else ""
        return f"files were read once, and are read again after the migration{disk}"

    def read(self, guest: Guest) -> None:
        read_once(guest, file_names(0, self.files(guest)))

    def finish(self, guest: Guest, console: Console, span: Span) -> Dict[str, Any]:
        if self.limit:
            others = {name: 0 for name in ("bps_rd", "bps_wr", "iops", "iops_rd", "iops_wr")}
            limits = {"device": "data", "bps": self.limit, **others}
            guest.qmp_dict("block_set_io_throttle", limits)
        files = self.files(guest)
        names = file_names(0, files)
        on_console(
            guest,
            "echo again begin; "
            f"for f in {names} {names}; do cat $f > /dev/null; echo again {FILE_MIB}; done",
        )
        line = rf"^again {FILE_MIB}"
        begun, _ = console.wait("^again begin", guest, self.SECONDS)
        first, _ = console.wait(line, guest, self.SECONDS, count=files)
        second, _ = console.wait(line, guest, self.SECONDS, count=2 * files)
        timing = {"again_s": first - begun, "cached_s": second - first}
        return {**timing, **super().finish(guest, console, span)}


@dataclass(frozen=True)
class MappedHot(Refaulting, Sysbench):
    """A program that has mapped its files, as databases do, beside files that were read once."""

    COLD_FILES = 24
    NAME = "mappedcold"
    ABOUT = (
        "files are mapped, read and written all the time; "
        f"{COLD_FILES * FILE_MIB} MiB of others were read once"
    )
    test: str = "mmap"
    guess = 120

    def prepare(self, guest: Guest) -> None:
        Sysbench.prepare(self, guest)
        mount(guest, "vdb")
        read_once(guest, file_names(0, self.COLD_FILES))
