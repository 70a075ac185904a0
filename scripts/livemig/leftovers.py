# SPDX-License-Identifier: GPL-2.0-or-later
"""What another guest left in a file that becomes a guest's memory."""

import contextlib
import tempfile
from pathlib import Path
from typing import Iterator, Optional

from livemig.machine import MIB, PAGE

# As much as the guests of these tests have.
RAM_BYTES = 128 * MIB
# What another guest left in each page.
LEFTOVER = b"another guest's " * (PAGE // 16)


def leave_data(file: Path, size: int = RAM_BYTES) -> None:
    """Let a file hold what another guest left."""
    with open(file, "r+b" if file.exists() else "wb") as out:
        for _ in range(size // MIB):
            out.write(LEFTOVER * (MIB // PAGE))


@contextlib.contextmanager
def leftovers(directory: Optional[str]) -> Iterator[Path]:
    """A file of another guest's data."""
    with tempfile.TemporaryDirectory(prefix="livemig-", dir=directory) as name:
        file = Path(name) / "memory"
        leave_data(file)
        yield file
