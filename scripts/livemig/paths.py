# SPDX-License-Identifier: GPL-2.0-or-later
"""Where built things are. All of it is in the cache, which FPH_CACHE moves.

FPH_QEMU and FPH_KERNEL name builds to be used in the place of ours: FPH_QEMU=debug runs all tests
with sanitizers (also those that take "checked", which is ours with the checks of hints alone),
FPH_KERNEL=debug with a guest kernel that checks itself. FPH_GUEST_KERNEL is the path of any other
guest kernel to be used in the place of ours; a modules.cpio.gz beside it goes behind the initramfs.
With FPH_QEMU_SERIES=10.2 (FPH_KERNEL_SERIES=7.3) all builds are those for
that series of versions, such as ours-10.2.
"""

import os
from pathlib import Path
from typing import List, Optional, Tuple

from livemig.errors import BadSetting, MissingArtifact

REPO = Path(__file__).resolve().parents[2]
OUT = REPO / "out"

BUILDS = ("ours", "stock")
# What is built for each series of versions.
FOR_SERIES = (*BUILDS, "checked", "debug")


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


def _chosen(build: str, variable: str) -> str:
    """What the environment has in the place of a build."""
    build = os.environ.get(variable) or build if build in ("ours", "checked") else build
    series = os.environ.get(f"{variable}_SERIES")
    return f"{build}-{series}" if series and build in FOR_SERIES else build


def qemu_file(build: str, *name: str) -> Path:
    """A file of a QEMU's build: 'ours', 'stock', or 'checked' and 'debug': ours with checks.

    These are for the default series of versions; 'ours-10.2' is for another one.
    """
    build = _chosen(build, "FPH_QEMU")
    return require(cache_dir().joinpath(f"qemu-{build}", *name), f"scripts/build-qemu {build}")


def is_arm64(build: str) -> bool:
    """Whether a build, of QEMU or of a kernel, is for guests of arm64 and not of x86-64."""
    return build.startswith("arm64")


def qemu_binary(build: str) -> Path:
    """The QEMU of a build. That of 'arm64' has the checks of 'checked'."""
    return qemu_file(build, "bin", f"qemu-system-{'aarch64' if is_arm64(build) else 'x86_64'}")


def guest_kernel() -> Optional[Path]:
    """The kernel that FPH_GUEST_KERNEL names, if it does. Raises BadSetting if it is not usable."""
    if not os.environ.get("FPH_GUEST_KERNEL"):
        return None
    path = Path(os.environ["FPH_GUEST_KERNEL"]).absolute()
    about = f"FPH_GUEST_KERNEL={path}"
    if os.environ.get("FPH_KERNEL"):
        raise BadSetting(f"{about} and FPH_KERNEL are both set: unset one of them")
    try:
        with open(path, "rb") as file:
            header = file.read(0x240)
    except OSError as err:
        raise BadSetting(f"{about}: {err.strerror}") from err
    # See Documentation/arch/x86/boot.rst of Linux: a magic number, flags of which the lowest says
    # that it is no zImage, and flags of which the lowest says that it has 64 bits.
    good = len(header) == 0x240 and header[0x202:0x206] == b"HdrS"
    if not good or not header[0x211] & header[0x236] & 1:
        raise BadSetting(f"{about} is not a bzImage of x86-64")
    return path


def kernel_image(build: str) -> Path:
    """The guest kernel of a build.

    It is 'ours', 'stock', 'debug', which is ours with all checks, 'kvm' and 'kvm-stock', which run
    without user space, or 'debian', Debian's own; and 'ours-7.3' for another series of versions.
    'arm64-4k' and 'arm64-64k' are ours for that architecture, with pages of these sizes.
    """
    other = guest_kernel()
    if build == "ours" and other:
        return other
    build = _chosen(build, "FPH_KERNEL")
    make_it = "make-other-guests" if build == "debian" else f"build-kernel {build}"
    image = {"kvm": "vmlinux", "arm64": "Image"}.get(build.split("-")[0], "bzImage")
    return require(cache_dir() / f"kernel-{build}" / image, f"scripts/{make_it}")


def is_quick(kernel: str) -> bool:
    """Whether a kernel boots in seconds: not if it checks itself, is interpreted, or is unknown."""
    if kernel == "ours" and guest_kernel():
        return False
    return _chosen(kernel, "FPH_KERNEL").split("-")[0] not in ("debug", "kvm")


def initramfs(kernel: str = "ours") -> Path:
    """The busybox guest of a kernel."""
    name, options = ("initramfs-arm64", " arm64") if is_arm64(kernel) else ("initramfs", "")
    return require(cache_dir() / "images" / f"{name}.cpio.gz", f"scripts/make-initramfs{options}")


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
    return require(cache_dir() / "images" / f"stock-{suite}" / "stamp", "make stock-guests").parent


def stock_host(suite: str) -> Path:
    """The directory of a Debian host: see scripts/make-stock-host."""
    made = cache_dir() / "images" / f"stock-host-{suite}"
    return require(made / "stamp", "make stock-hosts").parent


def all_series() -> List[Tuple[str, str]]:
    """All series of patches: the tree that each is of, and its versions, such as 10.0."""
    found = [REPO.glob(f"{tree}/patches/*") for tree in ("qemu", "kernel", "libvirt")]
    return sorted((path.parts[-3], path.name) for some in found for path in some)


def version() -> str:
    """The version of this project."""
    return (REPO / "VERSION").read_text(encoding="ascii").strip()


def packaged_guest(suite: str) -> Path:
    """The disk of such a guest with the guest package in it."""
    stamp = cache_dir() / "bench" / f"{suite}-package.stamp"
    return require(stamp, f"bench/make-packaged-guest {suite}").with_suffix(".ext4")


def guest_deb() -> Path:
    """The guest package."""
    name = f"free-page-hint-dkms_{version()}_all.deb"
    return require(OUT / "release" / name, "make guest-deb")


def trial_deb() -> Path:
    """The package of our QEMU that stands beside Debian's."""
    name = f"qemu-system-x86-fph_{version()}_amd64.deb"
    return require(OUT / "release" / name, "make trial-deb")


def host_debs() -> List[Path]:
    """Debian's QEMU for x86 with our series in it: the program, and what goes with it."""
    directory = OUT / "release"
    wanted = ("qemu-system-x86", "qemu-system-common", "qemu-utils")
    found = [next(directory.glob(f"{name}_*+fph{version()}_amd64.deb"), None) for name in wanted]
    return [require(path or directory / name, "make host-deb") for path, name in zip(found, wanted)]
