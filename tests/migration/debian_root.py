# SPDX-License-Identifier: GPL-2.0-or-later
"""A Debian root file system to install packages in, without booting it."""

import contextlib
import os
import shlex
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Iterator, Tuple

import pytest

from livemig import paths

# What is mounted in a namespace of its own, and gone with the command. No network is there.
PREPARE = r"""
mount --make-rprivate /
mount -t overlay -o "lowerdir=$LOWER,upperdir=$STATE/upper,workdir=$STATE/work" root "$STATE/root"
mount -t proc proc "$STATE/root/proc"
mount -t tmpfs tmpfs "$STATE/root/tmp"
mkdir -p "$STATE/root/srv/pool" "$STATE/root/srv/deb"
mount --bind "$POOL" "$STATE/root/srv/pool"
mount --bind "$DEB" "$STATE/root/srv/deb"
for name in null zero urandom random; do
    mount --bind "/dev/$name" "$STATE/root/dev/$name"
done
# No initramfs is made: it takes longer than all the rest.
exec chroot "$STATE/root" env -i PATH=/usr/sbin:/usr/bin:/sbin:/bin LC_ALL=C.UTF-8 INITRD=No \
    DEBIAN_FRONTEND=noninteractive bash -c "$COMMAND"
"""
SECONDS = 1800


class DebianRoot:
    """What commands change goes into an overlay, and stays from one to the next."""

    def __init__(self, suite: str, state: Path):
        self._guest = paths.stock_guest(suite)
        self._state = state
        for name in "upper", "work", "root":
            (state / name).mkdir()
        # All is thrown away in the end: dpkg need not wait for the disk.
        self.run(
            "echo 'deb [trusted=yes] file:/srv/pool ./' > /etc/apt/sources.list; apt-get update;"
            " echo force-unsafe-io > /etc/dpkg/dpkg.cfg.d/no-sync"
        )

    def exec(self, command: str) -> Tuple[int, str]:
        """Run a shell command; returns its exit status and its output."""
        done = subprocess.run(
            ["unshare", "--mount", "--pid", "--fork", "--kill-child", "--net", "--ipc"]
            + ["bash", "-euc", PREPARE],
            env={
                **os.environ,
                "LOWER": str(self._guest / "root"),
                "POOL": str(self._guest / "pool"),
                "DEB": str(paths.guest_deb().parent),
                "STATE": str(self._state),
                "COMMAND": command,
            },
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=SECONDS,
            check=False,
        )
        return done.returncode, done.stdout

    def run(self, command: str) -> str:
        """Run a command that must succeed; returns its output."""
        status, output = self.exec(command)
        assert status == 0, f"{command!r} ended with {status}:\n{output}"
        return output.strip()

    def apt(self, *arguments: str) -> str:
        """Run apt-get, which must succeed."""
        return self.run(f"apt-get -q -y --no-install-recommends {shlex.join(arguments)}")


@contextlib.contextmanager
def debian_root(suite: str) -> Iterator[DebianRoot]:
    """A root file system of its own, in the cache, until the context ends."""
    if os.geteuid() != 0:
        pytest.skip("installing packages in a root file system needs root")
    state = Path(tempfile.mkdtemp(dir=paths.cache_dir(), prefix="debian-root."))
    try:
        yield DebianRoot(suite, state)
    finally:
        shutil.rmtree(state)
