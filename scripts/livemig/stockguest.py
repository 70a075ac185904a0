# SPDX-License-Identifier: GPL-2.0-or-later
"""Debian guests with a kernel of their own, as scripts/make-stock-guest makes them."""

import contextlib
import subprocess
import tempfile
from pathlib import Path
from typing import ContextManager, Iterator, Optional, Tuple

from livemig import paths
from livemig.disk import disk_copy
from livemig.errors import LivemigError


def _drive(file: Path, name: str) -> Tuple[str, ...]:
    return (
        *("-drive", f"file={file},format=raw,if=none,id={name}"),
        *("-device", f"virtio-blk-pci,drive={name}"),
    )


@contextlib.contextmanager
def package_disk(package: Path) -> Iterator[Path]:
    """A disk that is an archive for apt, with one package."""
    with tempfile.TemporaryDirectory(prefix="fph-archive.") as directory:
        root = Path(directory) / "root"
        root.mkdir()
        (root / package.name).write_bytes(package.read_bytes())
        disk = Path(directory) / "disk"
        command = f"cd {root} && dpkg-scanpackages . > Packages && truncate -s 8M {disk}"
        command += f" && mke2fs -q -t ext4 -d {root} {disk}"
        done = subprocess.run(["sh", "-c", command], stderr=subprocess.PIPE, text=True, check=False)
        if done.returncode:
            raise LivemigError(f"cannot make an archive of {package}: {done.stderr.strip()}")
        yield disk


def stock_disk(suite: str) -> ContextManager[Path]:
    """A copy of the root file system of a Debian guest that it may write to."""
    return disk_copy(paths.stock_guest(suite) / "disk.ext4")


def stock_software(
    suite: str, disk: Path, archive: Optional[Path] = None, cmdline: str = ""
) -> Tuple[str, ...]:
    """What GuestSpec.software takes: a Debian guest on its disk.

    Its kernel and initramfs are what is in its /boot; /dev/vdb is the archive that package_disk()
    made, if any.
    """
    made = paths.stock_guest(suite)
    return (
        *("-kernel", str(made / "vmlinuz"), "-initrd", str(made / "initrd.img")),
        # As any guest of tests: see Guest.
        *("-append", f"root=/dev/vda rw console=ttyS0 panic=-1 no_timer_check {cmdline}"),
        *_drive(disk, "root"),
        *(_drive(archive, "archive") if archive else ()),
    )
