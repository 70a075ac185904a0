# SPDX-License-Identifier: GPL-2.0-or-later
"""What a result has to say about the machine and the software that it was made with."""

import contextlib
import os
import platform
import subprocess
from pathlib import Path
from typing import Any, Dict, Optional

from livemig import host, paths


def facts() -> Dict[str, Any]:
    """The machine, and how busy it is."""
    total = host.field("/proc/meminfo", "MemTotal") or "0"
    return {
        "cpu": host.field("/proc/cpuinfo", "model name"),
        "cpus": len(os.sched_getaffinity(0)),
        "memory_mib": int(total.split()[0]) // 1024,
        "available_mib": host.available_mib(),
        "kernel": platform.release(),
        "load": list(os.getloadavg()),
        "hypervisor": "hypervisor" in (host.field("/proc/cpuinfo", "flags") or "").split(),
    }


def cpu_seconds(pid: Optional[int]) -> float:
    """How long a process has run, on all CPUs together."""
    stat = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
    # utime and stime, the 14th and 15th of all words.
    return (int(stat[11]) + int(stat[12])) / os.sysconf("SC_CLK_TCK")


def memfd_mib(pid: Optional[int]) -> float:
    """What a QEMU's memory-backend-memfd has allocated, mapped by anybody or not."""
    total = 0
    for file in Path(f"/proc/{pid}/fd").iterdir():
        # Files come and go meanwhile.
        with contextlib.suppress(FileNotFoundError):
            if os.readlink(file).startswith("/memfd:memory-backend"):
                total += file.stat().st_blocks * 512
    return total / 2**20


def stamp(build: str) -> str:
    """What a build in the cache, such as qemu-ours, was made from."""
    file = paths.cache_dir() / build / "stamp"
    return file.read_text(encoding="utf-8").strip() if file.exists() else "unknown"


def _output(*command: str) -> str:
    done = subprocess.run(
        command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, check=False
    )
    return done.stdout.strip()


def versions(qemu: str, kernel: str) -> Dict[str, str]:
    """What a QEMU and a guest kernel are, and the commit of this repository."""
    git = ("git", "-C", str(paths.REPO))
    changed = "+" if _output(*git, "status", "--porcelain") else ""
    version = _output(str(paths.qemu_binary(qemu)), "--version")
    return {
        "qemu": version.partition("\n")[0] or "unknown",
        "qemu_stamp": stamp(f"qemu-{qemu}"),
        "kernel_stamp": stamp(f"kernel-{kernel}"),
        "commit": (_output(*git, "rev-parse", "HEAD") or "unknown") + changed,
    }
