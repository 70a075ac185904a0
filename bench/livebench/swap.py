# SPDX-License-Identifier: GPL-2.0-or-later
"""Swap space of the host, and a guest's memory in it."""

import contextlib
import os
import shutil
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Dict, Iterator, Tuple

from livemig import host, memory, paths
from livemig.errors import LivemigError, NotPossibleHere
from livemig.guest import Guest
from livemig.host import MIB

FILE = paths.OUT / "swap"
# What is swapped out besides what a scenario wants, and what a file system keeps for others.
SPARE_MIB = 512

# Some of it is under writeback when it is tried first, and what a running guest uses comes back.
ATTEMPTS = 50
ATTEMPT_SECONDS = 0.2
ENOUGH = 0.95


def _run(*command: str) -> str:
    """Run a command; returns what it wrote. Raises NotPossibleHere if it fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError as err:
        raise NotPossibleHere(f"there is no {command[0]}") from err
    if done.returncode:
        raise NotPossibleHere(f"{' '.join(command)}: {done.stderr.strip()}")
    return done.stdout.strip()


def _forget_old() -> None:
    """Remove what a run left that was killed."""
    used = [line.split() for line in Path("/proc/swaps").read_text(encoding="utf-8").splitlines()]
    if any(words[0] == str(FILE) for words in used):
        _run("swapoff", str(FILE))
    FILE.unlink(missing_ok=True)


@contextlib.contextmanager
def _space(mib: int) -> Iterator[None]:
    """So much swap space, until the context ends."""
    if os.geteuid():
        raise NotPossibleHere("only root can swap a guest's memory out")
    FILE.parent.mkdir(parents=True, exist_ok=True)
    _forget_old()
    if shutil.disk_usage(FILE.parent).free < (mib + SPARE_MIB) * MIB:
        raise NotPossibleHere(f"there are no {mib + SPARE_MIB} MiB of disk for a swap file")
    with contextlib.ExitStack() as stack:
        stack.callback(FILE.unlink, missing_ok=True)
        # A swap file has no holes, and nobody else may read it.
        with open(os.open(FILE, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600), "wb") as file:
            os.posix_fallocate(file.fileno(), 0, mib * MIB)
        where = str(FILE)
        _run("mkswap", where)
        try:
            _run("swapon", where)
        except NotPossibleHere:
            # Of some file systems, only a block device can be swapped to.
            where = _run("losetup", "--find", "--show", where)
            stack.callback(_run, "losetup", "--detach", where)
            _run("swapon", where)
        stack.callback(_run, "swapoff", where)
        yield


@dataclass(frozen=True)
class Room:
    """A control group whose processes can be swapped out."""

    directory: Path
    # The file that takes memory from them, and what is written to it for as much as goes.
    file: str
    text: str

    @property
    def wrapper(self) -> Tuple[str, ...]:
        """Starts a guest in it (see GuestSpec)."""
        return ("sh", "-c", f'echo 0 > "{self.directory}/cgroup.procs" && exec "$@"', "sh")

    def swap_out(self, guest: Guest) -> Dict[str, float]:
        """Swap out all of a guest's RAM that is populated, and nothing of it stays cached.

        MADV_PAGEOUT would leave it in the cache of swapped pages, where reading is for nothing.
        """
        for _ in range(ATTEMPTS):
            # It ends with an error if something is left, as it always is of programs that run.
            with contextlib.suppress(OSError):
                (self.directory / self.file).write_text(self.text, encoding="ascii")
            used = memory.usage(guest)
            resident, swapped = used["Rss"] / MIB, used["Swap"] / MIB
            if swapped >= ENOUGH * (resident + swapped):
                return {"resident_mib": resident, "swapped_mib": swapped}
            time.sleep(ATTEMPT_SECONDS)
        raise LivemigError(
            f"{guest.name}: the host has swapped {swapped:.0f} MiB of its memory out and "
            f"keeps {resident:.0f}"
        )


@contextlib.contextmanager
def room(mib: int) -> Iterator[Room]:
    """So much swap space, and a control group, until the context ends: its processes must, before.

    Raises NotPossibleHere, with the reason, if that cannot be.
    """
    with _space(mib):
        # Versions 1 and 2.
        for directory, file, text in (
            (host.CGROUPS / "memory", "memory.force_empty", "0"),
            (host.CGROUPS, "memory.reclaim", "1T"),
        ):
            # What was killed may have left one of this name.
            group = directory / "livemig-swap"
            with contextlib.suppress(OSError):
                group.mkdir(exist_ok=True)
                if (group / file).exists():
                    break
                group.rmdir()
        else:
            raise NotPossibleHere("there is no control group for memory to be had")
        try:
            yield Room(group, file, text)
        finally:
            group.rmdir()


def pages_in() -> int:
    """How many pages the host has read from its swap space since it booted."""
    counters = Path("/proc/vmstat").read_text(encoding="utf-8").splitlines()
    return int(dict(line.split() for line in counters).get("pswpin", 0))
