# SPDX-License-Identifier: GPL-2.0-or-later
"""Two libvirt hosts in a Debian root: what apt installed there is what they have."""

import contextlib
import os
import tempfile
from pathlib import Path
from typing import Dict, Iterator

import pytest

from livemig import paths, workload
from livemig.debian_root import DebianRoot
from livemig.domains import FREED_MIB, MIB, SPEC, STAMPED_MIB, UNSUPPORTED, Guest, Hosts, two_hosts


class HostsInRoot(Hosts):
    """They share one file system, but for what libvirt keeps."""

    def run(self, host: str, command: str) -> str:
        """Run a shell command on a host, which must succeed; returns its output."""
        done = self.call(host, "bash", "-euc", command)
        assert done.returncode == 0, f"{command!r} ended with {done.returncode}: {done.stderr}"
        return done.stdout.strip()


class InstalledGuest(Guest):
    """A guest whose <emulator> is one that is installed there."""

    def __init__(self, on: HostsInRoot, name: str, emulator: str):
        super().__init__(on, name)
        self.replace(str(paths.qemu_binary(SPEC.qemu)), emulator)

    def migrates_with_hints(self) -> Dict[str, int]:
        """There with hints, back without; returns what was measured."""
        workload.stamp(self, STAMPED_MIB)
        result = self.fill_and_migrate()
        assert result.hints and result.absent
        assert result.hints.reason is None and result.hints.complete
        assert result.hints.hinted_bytes > FREED_MIB * MIB
        assert result.absent.reason is None and result.absent.absent_bytes
        self.hmp("migrate_set_capability free-page-hint off")
        self.migrate()
        self.check()
        return {
            "sent_bytes": result.sent_bytes,
            "hinted_bytes": result.hints.hinted_bytes,
            "absent_bytes": result.absent.absent_bytes,
            "total_ms": result.total_ms,
        }


@contextlib.contextmanager
def hosts_in_root(root: DebianRoot, *files: Path) -> Iterator[HostsInRoot]:
    """Start them, with the cache and some files of this machine."""
    # A short name: that of a socket has little room.
    with tempfile.TemporaryDirectory(prefix="fph-hosts.") as directory:
        state = Path(directory) / "hosts"
        shared = [paths.REPO, paths.cache_dir(), state.parent]
        # In a cache, there may be links to another one's.
        shared += [path.resolve().parent for path in files]
        start = (paths.REPO / "scripts/two-hosts", "up", "--state", state, "--owner", os.getpid())
        done = root.start(shared, "/usr/bin/python3", *map(str, start))
        if done.returncode == UNSUPPORTED and not os.environ.get("CI"):
            pytest.skip(done.stdout.strip())
        assert done.returncode == 0, done.stdout
        try:
            yield HostsInRoot(state)
        finally:
            down = two_hosts("down", "--state", state)
        assert down.returncode == 0, down.stderr
