# SPDX-License-Identifier: GPL-2.0-or-later
"""Compares the memory of the source and of the destination of a migration, byte by byte.

Both guests keep their memory in files (GuestSpec.mem_file). The source has stopped for good and
the destination has not started yet: all pages must be equal, but for those that a hint took out
of the migration.
"""

import contextlib
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Iterator, List, Tuple

import numpy as np

PAGE_BYTES = 4096
CHUNK_PAGES = 16384

# What QEMU's trace log says about each run of pages that a hint took out of the migration. The
# block's name tells the guest's RAM from other memory (video, firmware).
HINT_EVENT = "free_page_hint_apply"
HINT_LINE = re.compile(
    HINT_EVENT + r"\s+block '(?P<block>[^']*)' first (?P<first>0x[0-9a-f]+|\d+)"
    r" pages (?P<pages>0x[0-9a-f]+|\d+)"
)


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
    hinted: int
    different: int
    # Numbers of pages that differ and were not hinted: lost.
    lost: Tuple[int, ...]


def hinted_pages(trace_log: Path, pages: int) -> "np.ndarray[Tuple[int], np.dtype[np.bool_]]":
    """Which pages of the guest's RAM the trace log of the source says were hinted."""
    hinted = np.zeros(pages, dtype=bool)
    text = trace_log.read_text(errors="replace") if trace_log.exists() else ""
    for match in HINT_LINE.finditer(text):
        if match["block"].endswith("pc.ram"):
            first, count = int(match["first"], 0), int(match["pages"], 0)
            hinted[first : first + count] = True
    return hinted


def compare(source: Path, destination: Path, trace_log: Path) -> Comparison:
    """Compare two memory files, given the trace log of the source."""
    pages = source.stat().st_size // PAGE_BYTES
    hinted = hinted_pages(trace_log, pages)
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
    return Comparison(
        pages=pages,
        hinted=int(hinted.sum()),
        different=int(different.sum()),
        lost=tuple(int(page) for page in np.flatnonzero(different & ~hinted)[:20]),
    )
