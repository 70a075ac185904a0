# SPDX-License-Identifier: GPL-2.0-or-later
"""Where built things are. All of it is in the cache, which FPH_CACHE moves.

FPH_QEMU and FPH_KERNEL name builds to be used in the place of ours: FPH_QEMU=debug runs all tests
with sanitizers, FPH_KERNEL=debug with a guest kernel that checks itself.
"""

import os
import sys
from pathlib import Path

from livemig.errors import MissingArtifact

REPO = Path(__file__).resolve().parents[2]
OUT = REPO / "out"

BUILDS = ("ours", "stock")


def cache_dir() -> Path:
    """The directory of sources, builds and images."""
    if os.environ.get("FPH_CACHE"):
        return Path(os.environ["FPH_CACHE"]).absolute()
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "free-page-hint"


def require(path: Path, make_it: str) -> Path:
    """Return path if it exists; otherwise say which command makes it."""
    if not path.exists():
        raise MissingArtifact(f"{path} is missing: run {make_it}")
    return path


def _in_place_of_ours(build: str, variable: str) -> str:
    return os.environ.get(variable) or build if build == "ours" else build


def qemu_binary(build: str) -> Path:
    """The QEMU of a build: 'ours', 'stock', or 'debug', which is ours with all checks."""
    build = _in_place_of_ours(build, "FPH_QEMU")
    path = cache_dir() / f"qemu-{build}" / "bin" / "qemu-system-x86_64"
    return require(path, f"scripts/build-qemu {build}")


def kernel_image(build: str) -> Path:
    """The guest kernel of a build.

    It is 'ours', 'stock', 'debug', which is ours with all checks, 'kvm', or 'debian', Debian's own.
    """
    build = _in_place_of_ours(build, "FPH_KERNEL")
    make_it = "make-other-guests" if build == "debian" else f"build-kernel {build}"
    image = "vmlinux" if build == "kvm" else "bzImage"
    return require(cache_dir() / f"kernel-{build}" / image, f"scripts/{make_it}")


def is_quick(kernel: str) -> bool:
    """Whether a kernel boots in seconds: not if it checks itself, or is interpreted."""
    return _in_place_of_ours(kernel, "FPH_KERNEL") not in ("debug", "kvm")


def initramfs() -> Path:
    """The busybox guest."""
    return require(cache_dir() / "images" / "initramfs.cpio.gz", "scripts/make-initramfs")


def bare_metal(name: str) -> Path:
    """The bare-metal guest (a .bin) or a library that goes with it (a .so)."""
    return require(cache_dir() / "images" / "bare-metal" / name, "scripts/make-bare-metal")


def other_guest(name: str) -> Path:
    """A program of Debian's that runs without a system."""
    return require(cache_dir() / "images" / "others" / name, "scripts/make-other-guests")


def debian_image() -> Path:
    """The Debian guest's root file system."""
    return require(cache_dir() / "images" / "debian.ext4", "scripts/make-debian-image")


def stock_guest(suite: str) -> Path:
    """The directory of a Debian guest with a kernel of its own: see scripts/make-stock-guest."""
    made = require(cache_dir() / "images" / f"stock-{suite}" / "stamp", "make stock-guests")
    return made.parent


def guest_deb() -> Path:
    """The guest package."""
    version = (REPO / "VERSION").read_text(encoding="ascii").strip()
    name = f"free-page-hint-dkms_{version}_all.deb"
    return require(OUT / "release" / name, "make guest-deb")


def add_qemu_python() -> None:
    """Make the packages `qemu.machine` and `qemu.qmp` of QEMU's source importable."""
    path = require(cache_dir() / "src" / "qemu" / "python", "scripts/fetch qemu")
    if str(path) not in sys.path:
        sys.path.insert(0, str(path))
