# SPDX-License-Identifier: GPL-2.0-or-later
"""Disks for guests."""

import contextlib
import os
import subprocess
import tempfile
from pathlib import Path
from typing import ContextManager, Iterator, Optional

from livemig import paths
from livemig.errors import LivemigError


@contextlib.contextmanager
def disk_copy(image: Path, directory: Optional[Path] = None) -> Iterator[Path]:
    """A copy of a disk image that a guest may write to, beside it or in another directory.

    It has no name in the file system, so that it is gone with us however we end. Source and
    destination open the same file: QEMU hands its lock over at the end of a migration.
    """
    with tempfile.TemporaryFile(dir=directory or image.parent) as copy:
        path = Path(f"/proc/{os.getpid()}/fd/{copy.fileno()}")
        # In place: the copy is the file that is open.
        command = ["cp", "--sparse=always", str(image), str(path)]
        done = subprocess.run(command, stderr=subprocess.PIPE, text=True, check=False)
        if done.returncode:
            raise LivemigError(f"cannot copy {image}: {done.stderr.strip()}")
        yield path


def debian_disk() -> ContextManager[Path]:
    """A copy of the Debian image that a guest may write to."""
    return disk_copy(paths.debian_image())
