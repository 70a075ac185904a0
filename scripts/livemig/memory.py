# SPDX-License-Identifier: GPL-2.0-or-later
"""Compares the memory of the source and of the destination of a migration, byte by byte.

Both guests keep their memory in files (GuestSpec.mem_file). The source has stopped for good and
the destination has not started yet: all pages must be equal, but for those that a hint took out
of the migration and that were not written since.
"""

import contextlib
import os
import re
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Iterator, List, Tuple

import numpy as np

from livemig.errors import MigrationError

PAGE_BYTES = 4096
CHUNK_PAGES = 16384

# What the source's trace log says, when the migration has ended, about each run of pages that were
# kept from the destination: hinted, and not written since. The block's name tells the guest's RAM
# from other memory (video, firmware).
# A spec that is to be compared has them in its `trace`.
KEPT_EVENTS = "free_page_hint_kept*"
# One for each run of pages that a hint took out, when that happens.
HINT_EVENT = "free_page_hint_apply"
KEPT_LINE = re.compile(
    r"^free_page_hint_kept block '(?P<block>[^']*)' first (?P<first>0x[0-9a-f]+)"
    r" pages (?P<pages>0x[0-9a-f]+)$",
    re.MULTILINE,
)
KEPT_ALL_LINE = re.compile(r"^free_page_hint_kept_all \d+ pages$", re.MULTILINE)
LOG_SECONDS = 60

Mask = np.ndarray[Tuple[int], np.dtype[np.bool_]]


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
    # Numbers of pages that differ and were not kept back on purpose: lost.
    lost: Tuple[int, ...]


def _finished_log(trace_log: Path, start: int) -> str:
    """The source's trace log from an offset; it is complete a moment after the migration."""
    deadline = time.monotonic() + LOG_SECONDS
    while time.monotonic() < deadline:
        text = trace_log.read_text(errors="replace")[start:]
        if KEPT_ALL_LINE.search(text):
            return text
        time.sleep(0.01)
    raise MigrationError(f"{trace_log} does not tell which pages were kept back")


def kept_pages(trace_log: Path, pages: int, start: int = 0) -> Mask:
    """Which pages of the guest's RAM were kept from the destination of the last migration.

    The log is read from an offset, which lies before the migration's start.
    """
    kept = np.zeros(pages, dtype=bool)
    text = _finished_log(trace_log, start)
    ends = [match.end() for match in KEPT_ALL_LINE.finditer(text)]
    for match in KEPT_LINE.finditer(text, ends[-2] if len(ends) > 1 else 0):
        if match["block"].endswith("pc.ram"):
            first, count = int(match["first"], 0), int(match["pages"], 0)
            kept[first : first + count] = True
    return kept


def different_pages(source: Path, destination: Path) -> Mask:
    """Which pages of two memory files differ."""
    pages = source.stat().st_size // PAGE_BYTES
    different = np.zeros(pages, dtype=bool)
    # Read, not mapped: reading a hole of a file in memory this way does not fill it.
    with open(source, "rb") as one, open(destination, "rb") as other:
        for start in range(0, pages, CHUNK_PAGES):
            left, right = (
                np.frombuffer(file.read(CHUNK_PAGES * PAGE_BYTES), dtype=np.uint64)
                for file in (one, other)
            )
            differs = (left != right).reshape(-1, PAGE_BYTES // 8).any(axis=1)
            different[start : start + len(differs)] = differs
    return different


def judge(different: Mask, kept: Mask) -> Comparison:
    """Which of the pages that differ were not kept back on purpose."""
    return Comparison(
        pages=len(different),
        kept=int(kept.sum()),
        different=int(different.sum()),
        lost=tuple(int(page) for page in np.flatnonzero(different & ~kept)[:20]),
    )


def compare(source: Path, destination: Path, trace_log: Path, start: int = 0) -> Comparison:
    """Compare two memory files, given the trace log of the source (from an offset)."""
    different = different_pages(source, destination)
    return judge(different, kept_pages(trace_log, len(different), start))
