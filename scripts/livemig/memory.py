# SPDX-License-Identifier: GPL-2.0-or-later
"""Compares the memory of the source and of the destination of a migration, byte by byte.

The source has stopped for good and the destination has not started yet: all pages of all blocks of
RAM must be equal, but for those that a hint took out of the migration and that were not written
since.
"""

import contextlib
import os
import re
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Dict, Iterable, Iterator, List, Mapping, Optional, Tuple

import numpy as np

from livemig.errors import GuestError, MigrationError
from livemig.guest import Guest
from livemig.host import PAGE_BYTES

CHUNK_PAGES = 16384

# What the source's trace log says, when the migration has ended, about each run of pages that were
# kept from the destination: hinted, and not written since.
# A spec that is to be compared has them in its `trace`.
KEPT_EVENTS = "free_page_hint_kept*"
# One for each run of pages that were found to be absent. They have to arrive as zeroes.
ABSENT_EVENT = "absent_pages_run"
# One for each run of pages that were taken out, hinted or absent, when that happens.
HINT_EVENT = "free_page_hint_apply"
# What stands before an event if messages have times, as libvirt wants it.
TIME = r"(?:\d+@[\d.]+:)?"
RUN_LINE = re.compile(
    rf"^{TIME}(?P<event>free_page_hint_kept|{ABSENT_EVENT}) block '(?P<block>[^']*)'"
    r" first (?P<first>0x[0-9a-f]+) pages (?P<pages>0x[0-9a-f]+)$",
    re.MULTILINE,
)
KEPT_ALL_LINE = re.compile(rf"^{TIME}free_page_hint_kept_all \d+ pages$", re.MULTILINE)
LOG_SECONDS = 60

# A line of "info ramblock": name, page size, offset, used, total, host address, ro or rw.
BLOCK_LINE = re.compile(
    r"^ *(?P<name>\S+) +\d+ .iB +0x[0-9a-f]+ +(?P<used>0x[0-9a-f]+) +0x[0-9a-f]+"
    r" +(?P<address>0x[0-9a-f]+) ",
    re.MULTILINE,
)

# For each page of a block of RAM, whether something is true of it; and that for all blocks by name.
Mask = np.ndarray[Tuple[int], np.dtype[np.bool_]]
Masks = Dict[str, Mask]


@dataclass(frozen=True)
class Block:
    """A block of a guest's RAM, as a part of a file: the memory of its QEMU."""

    path: Path
    offset: int
    pages: int


def ram_blocks(guest: Guest) -> Dict[str, Block]:
    """The blocks of a guest's RAM by name, firmware and video memory among them."""
    memory = Path(f"/proc/{guest.pid}/mem")
    lines = guest.hmp("info ramblock").replace("\r", "")
    blocks = {
        match["name"]: Block(memory, int(match["address"], 0), int(match["used"], 0) // PAGE_BYTES)
        for match in BLOCK_LINE.finditer(lines)
    }
    if len(blocks) != len(lines.splitlines()) - 1:
        raise GuestError(f"{guest.name}: cannot tell the blocks of RAM from this:\n{lines}")
    return blocks


def main_block(guest: Guest) -> Block:
    """The block of a guest's RAM that is its memory."""
    return ram_blocks(guest)["pc.ram"]


def usage(guest: Guest) -> Dict[str, int]:
    """What /proc/PID/smaps says about a guest's memory, in bytes: Rss, Swap, ..."""
    block = main_block(guest)
    begin, end = block.offset, block.offset + block.pages * PAGE_BYTES
    counts: Dict[str, int] = {}
    inside = False
    for line in Path(f"/proc/{guest.pid}/smaps").read_text(encoding="utf-8").splitlines():
        if mapping := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
            inside = begin <= int(mapping[1], 16) and int(mapping[2], 16) <= end
        elif inside and (count := re.fullmatch(r"(\w+): +(\d+) kB", line)):
            counts[count[1]] = counts.get(count[1], 0) + int(count[2]) * 1024
    if "Rss" not in counts:
        raise GuestError(f"{guest.name}: no mapping of pc.ram")
    return counts


def ram_bytes(guest: Guest) -> int:
    """The size of a guest's memory."""
    return main_block(guest).pages * PAGE_BYTES


@contextlib.contextmanager
def memory_files(*names: str) -> Iterator[List[Path]]:
    """Files for guests to keep their memory in. They have no names and are gone with us."""
    with contextlib.ExitStack() as stack:
        files = [stack.enter_context(os.fdopen(os.memfd_create(name), "r+b")) for name in names]
        yield [Path(f"/proc/{os.getpid()}/fd/{file.fileno()}") for file in files]


@dataclass(frozen=True)
class Comparison:
    """How the memory of two guests differs."""

    pages: int
    kept: int
    different: int
    # Blocks and numbers of pages that differ and were not kept back on purpose: lost.
    lost: Tuple[Tuple[str, int], ...]


def _finished_log(trace_log: Path, start: int) -> str:
    """The source's trace log from an offset; it is complete a moment after the migration."""
    deadline = time.monotonic() + LOG_SECONDS
    while time.monotonic() < deadline:
        text = trace_log.read_text(errors="replace")[start:]
        if KEPT_ALL_LINE.search(text):
            return text
        time.sleep(0.01)
    raise MigrationError(f"{trace_log} does not say which pages were kept back")


def runs(text: str, begin: int, event: str, blocks: Mapping[str, Block]) -> Masks:
    """The pages that events in a trace log name, from an offset."""
    masks = {name: np.zeros(block.pages, dtype=bool) for name, block in blocks.items()}
    for match in RUN_LINE.finditer(text, begin):
        if match["event"] == event:
            first, count = int(match["first"], 0), int(match["pages"], 0)
            masks[match["block"]][first : first + count] = True
    return masks


def kept_pages(trace_log: Path, blocks: Mapping[str, Block], start: int = 0) -> Masks:
    """Which pages of a guest's RAM were kept from the destination of the last migration.

    Those that were absent are not among them, as the destination has the same: zeroes.
    The log is read from an offset, which lies before the migration's start.
    """
    text = _finished_log(trace_log, start)
    ends = [0, *(match.end() for match in KEPT_ALL_LINE.finditer(text))]
    hinted = runs(text, ends[-2], "free_page_hint_kept", blocks)
    absent = runs(text, ends[-2], ABSENT_EVENT, blocks)
    return {name: mask & ~absent[name] for name, mask in hinted.items()}


def _page(block: Block, number: int) -> np.ndarray[Tuple[int], np.dtype[np.uint8]]:
    with open(block.path, "rb") as file:
        file.seek(block.offset + number * PAGE_BYTES)
        return np.frombuffer(file.read(PAGE_BYTES), dtype=np.uint8)


def _different(one: Block, other: Block) -> Mask:
    different = np.zeros(one.pages, dtype=bool)
    with open(one.path, "rb") as here, open(other.path, "rb") as there:
        here.seek(one.offset)
        there.seek(other.offset)
        for start in range(0, one.pages, CHUNK_PAGES):
            count = min(CHUNK_PAGES, one.pages - start) * PAGE_BYTES
            left, right = (
                np.frombuffer(file.read(count), dtype=np.uint64) for file in (here, there)
            )
            differs = (left != right).reshape(-1, PAGE_BYTES // 8).any(axis=1)
            different[start : start + len(differs)] = differs
    return different


def different_pages(source: Mapping[str, Block], destination: Mapping[str, Block]) -> Masks:
    """Which pages of two guests' RAM differ. The blocks must have the same names and sizes."""
    sizes = [{name: block.pages for name, block in of.items()} for of in (source, destination)]
    if sizes[0] != sizes[1]:
        raise MigrationError(f"source and destination have other RAM: {sizes[0]} and {sizes[1]}")
    return {name: _different(block, destination[name]) for name, block in source.items()}


def judge(different: Masks, kept: Masks) -> Comparison:
    """Which of the pages that differ were not kept back on purpose."""
    lost = {
        name: np.flatnonzero(mask & ~kept[name] if name in kept else mask)[:20]
        for name, mask in different.items()
    }
    return Comparison(
        pages=sum(len(mask) for mask in different.values()),
        kept=sum(int(mask.sum()) for mask in kept.values()),
        different=sum(int(mask.sum()) for mask in different.values()),
        lost=tuple((name, int(page)) for name, pages in lost.items() for page in pages),
    )


def describe(
    lost: Iterable[Tuple[str, int]], source: Mapping[str, Block], destination: Mapping[str, Block]
) -> str:
    """How pages that were lost differ: one that never arrived is zero at the destination."""
    texts = []
    for name, number in lost:
        here, there = (_page(blocks[name], number) for blocks in (source, destination))
        bytes_off = np.flatnonzero(here != there)
        where = f"{len(bytes_off)} bytes off, the first at {bytes_off[:1]}"
        what = "something else" if there.any() else "zeroes"
        texts.append(f"page {number:#x} of {name}: {where}, {what} at the destination")
    return "; ".join(texts)


def compare(
    source: Guest, destination: Guest, *, start: int = 0, kept: Optional[Masks] = None
) -> Comparison:
    """Compare the RAM of two guests, after the last migration of the source.

    Which pages were kept back is in the source's trace log, from an offset, or is given.
    """
    blocks = ram_blocks(source)
    different = different_pages(blocks, ram_blocks(destination))
    return judge(different, kept or kept_pages(source.trace_log, blocks, start))
