# SPDX-License-Identifier: GPL-2.0-or-later
"""A Debian root file system to install packages in, without booting it."""

import contextlib
import os
import shlex
import subprocess
import tempfile
from pathlib import Path
from typing import ContextManager, Iterable, Iterator, Sequence, Tuple

import pytest

from livemig import paths

# What is mounted in a namespace of its own, and gone with the last process in it.
MOUNTS = r"""
mount --make-rprivate /
if [ "$SPACE" ]; then
    mkdir -p "$STATE/space"
    mount -t tmpfs -o "size=$SPACE" tmpfs "$STATE/space"
    mkdir "$STATE/space/upper" "$STATE/space/work"
    LOWER=$STATE/upper:$LOWER UPPER=$STATE/space/upper WORK=$STATE/space/work
fi
mount -t overlay -o "lowerdir=$LOWER,upperdir=$UPPER,workdir=$WORK" root "$STATE/root"
mount -t proc proc "$STATE/root/proc"
mount -t tmpfs tmpfs "$STATE/root/tmp"
mkdir -p "$STATE/root/srv/pool" "$STATE/root/srv/deb" "$STATE/root/srv/space"
mount --bind "$POOL" "$STATE/root/srv/pool"
mount --bind "$DEB" "$STATE/root/srv/deb"
[ ! "$SPACE" ] || mount --bind "$STATE/space" "$STATE/root/srv/space"
"""
# No network is there, and no initramfs is made: it takes longer than all the rest.
COMMAND = r"""
for name in null zero urandom random; do
    mount --bind "/dev/$name" "$STATE/root/dev/$name"
done
exec chroot "$STATE/root" env -i PATH=/usr/sbin:/usr/bin:/sbin:/bin LC_ALL=C.UTF-8 INITRD=No \
    DEBIAN_FRONTEND=noninteractive bash -c "$COMMAND"
"""
# What is shared has the same path inside. The command's own processes are born in this root.
ENTER = r"""
mount --rbind /dev "$STATE/root/dev"
mount --rbind /sys "$STATE/root/sys"
for directory in $SHARED; do
    mkdir -p "$STATE/root$directory"
    mount --bind "$directory" "$STATE/root$directory"
done
mkdir -p "$STATE/root/.old"
cd "$STATE/root"
pivot_root . .old
umount -l /.old
rmdir /.old
exec env -i PATH=/usr/sbin:/usr/bin:/sbin:/bin LC_ALL=C.UTF-8 "$@"
"""
# For commands that are run as they are documented
YES = "echo 'APT::Get::Assume-Yes \"true\";' > /etc/apt/apt.conf.d/90yes"
SECONDS = 1800


class DebianRoot:
    """What commands change goes into an overlay, and stays from one to the next."""

    def __init__(self, lower: Path, pool: Path, state: Path):
        self._lower = lower
        self._pool = pool
        self._state = state
        for name in "upper", "work", "root":
            (state / name).mkdir()
        # All is thrown away in the end: dpkg need not wait for the disk.
        self.run(
            "echo 'deb [trusted=yes] file:/srv/pool ./' > /etc/apt/sources.list; apt-get update;"
            " echo force-unsafe-io > /etc/dpkg/dpkg.cfg.d/no-sync"
        )

    def _unshare(
        self, flags: Sequence[str], script: str, *words: str, **environment: str
    ) -> "subprocess.CompletedProcess[str]":
        return subprocess.run(
            ["unshare", "--mount", *flags, "bash", "-euc", MOUNTS + script, "bash", *words],
            env={
                **os.environ,
                "LOWER": str(self._lower),
                "UPPER": str(self._state / "upper"),
                "WORK": str(self._state / "work"),
                "POOL": str(self._pool),
                "DEB": str(paths.require(paths.OUT / "release", "make guest-deb trial-deb")),
                "STATE": str(self._state),
                "SPACE": "",
                **environment,
            },
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=SECONDS,
            check=False,
        )

    def exec(self, command: str, space: str = "") -> Tuple[int, str]:
        """Run a shell command; returns its exit status and its output.

        If it is given so much space only, that is /srv/space, and what it changes is gone with it.
        """
        flags = ("--pid", "--fork", "--kill-child", "--net", "--ipc")
        done = self._unshare(flags, COMMAND, COMMAND=command, SPACE=space)
        return done.returncode, done.stdout

    def run(self, command: str) -> str:
        """Run a command that must succeed; returns its output."""
        status, output = self.exec(command)
        assert status == 0, f"{command!r} ended with {status}:\n{output}"
        return output.strip()

    def apt(self, *arguments: str) -> str:
        """Run apt-get, which must succeed."""
        return self.run(f"apt-get -q -y --no-install-recommends {shlex.join(arguments)}")

    def kill_install(self, package: str, deb: str, moment: str) -> None:
        """Begin to install a package, and kill that when a shell's command succeeds."""
        # All of the namespace but the shell: apt, dpkg and what these run.
        said = self.run(
            f"apt-get -q -y install {deb} > /var/log/killed 2>&1 & until {moment}; do :; done;"
            f" kill -KILL -1; dpkg -s {package} | grep Status"
        )
        # The premise: it was not done.
        assert "install ok installed" not in said

    def start(self, shared: Iterable[Path], *command: str) -> "subprocess.CompletedProcess[str]":
        """Run a command that may leave processes, in this root, with some directories of outside.

        While there are any, nothing else can be run here: use nsenter.
        """
        directories = " ".join(sorted({str(path) for path in shared}))
        return self._unshare((), ENTER, *command, SHARED=directories)


@contextlib.contextmanager
def _root(made: Path) -> Iterator[DebianRoot]:
    if os.geteuid() != 0:
        pytest.skip("installing packages in a root file system needs root")
    with tempfile.TemporaryDirectory(dir=paths.cache_dir(), prefix="debian-root.") as state:
        yield DebianRoot(made / "root", made / "pool", Path(state))


def debian_root(suite: str) -> ContextManager[DebianRoot]:
    """A guest's root file system of its own, in the cache, until the context ends."""
    return _root(paths.stock_guest(suite))


def host_root(suite: str = "bookworm") -> ContextManager[DebianRoot]:
    """A host's root file system: Debian with libvirt, and Debian's QEMU in its pool."""
    return _root(paths.stock_host(suite))
