# SPDX-License-Identifier: GPL-2.0-or-later
"""The guest package is installed, upgraded around, interrupted and removed, without booting.

The kernels and their headers are Debian's own. What the modules do is in test_guest_deb_boot.py.
"""

import re
from typing import Iterator, List

import pytest

from livemig import paths
from livemig.debian_root import DebianRoot, debian_root

pytestmark = pytest.mark.long

PACKAGE = "free-page-hint-dkms"
VERSION = paths.version()
DEB = f"/srv/deb/{PACKAGE}_{VERSION}_all.deb"
MODULES = ("virtio_balloon_hint", "virtio_balloon")
# Debian's kernels that the package must not touch: not of its lines, or with another scheduler.
FOREIGN = re.compile(r"^7\.2\.|-rt-")


@pytest.fixture(params=["bookworm", "trixie"])
def root(request: pytest.FixtureRequest) -> Iterator[DebianRoot]:
    """A root file system with a kernel, its headers and dkms."""
    assert paths.guest_deb()
    with debian_root(request.param) as made:
        # For assert_stock()
        made.run("sha256sum /lib/modules/*/kernel/drivers/virtio/virtio_balloon.ko* > /root/stock")
        yield made


def kernels(root: DebianRoot) -> List[str]:
    """The kernels for which modules can be built."""
    return root.run("cd /lib/modules && ls -d */build | cut -d/ -f1").split()


def driver(root: DebianRoot, kernel: str) -> str:
    """The file that modprobe loads as the balloon's driver, or nothing."""
    return root.run(f"modinfo -k {kernel} -n virtio_balloon 2>/dev/null || :")


def ours(root: DebianRoot, kernel: str) -> List[str]:
    """The package's modules for a kernel."""
    found = root.run(f"find /lib/modules/{kernel}/updates -type f 2>/dev/null || :").split()
    return sorted(re.sub(r".*/|\.ko(\.xz)?$", "", file) for file in found)


def has_image(root: DebianRoot, kernel: str) -> bool:
    """Whether the kernel itself is there, not only its headers."""
    return root.exec(f"test -d /lib/modules/{kernel}/kernel")[0] == 0


def assert_stock(root: DebianRoot, kernel: str) -> None:
    """The kernel has its own driver, as it came, and nothing of the package."""
    assert not ours(root, kernel)
    assert "/kernel/drivers/virtio/" in driver(root, kernel)
    root.run("sha256sum --check --strict /root/stock")


def assert_ours(root: DebianRoot, kernel: str) -> None:
    """Both modules are there, whole, with all of their symbols, and are what is loaded."""
    assert ours(root, kernel) == sorted(MODULES)
    image = has_image(root, kernel)
    if not image:
        # As the kernel does when it is installed.
        root.run(f"depmod {kernel}")
    assert "/updates/dkms/" in driver(root, kernel)
    told = {name: root.run(f"modinfo -k {kernel} {name}") for name in MODULES}
    assert re.search(rf"^version: +{re.escape(VERSION)}$", told["virtio_balloon"], re.MULTILINE)
    assert re.search(r"^depends:.*\bvirtio_balloon_hint\b", told["virtio_balloon"], re.MULTILINE)
    for text in told.values():
        assert re.search(rf"^vermagic: +{re.escape(kernel)} ", text, re.MULTILINE)
        assert re.search(r"^signer: +DKMS module signing key$", text, re.MULTILINE)
    # Without the modules whose symbols these need, it is only modpost, whose words are in the log,
    # that has compared them with Module.symvers.
    if image:
        symvers = f"/lib/modules/{kernel}/build/Module.symvers"
        assert root.run(f"depmod -n -e -E {symvers} {kernel} 2>&1 >/dev/null") == ""
    log = root.run(f"cat /var/lib/dkms/free-page-hint/{VERSION}/{kernel}/*/log/make.log")
    assert "CC [M]" in log
    assert not re.search(r"warning:|WARNING|undefined", log), log


def test_each_kernel_of_the_list_is_built_for(root: DebianRoot) -> None:
    """Kernels that come later get the modules, others do not; a purge leaves nothing."""
    (first,) = kernels(root)
    root.apt("install", DEB)
    assert_ours(root, first)

    root.apt("install", *root.run("sed -n 's/^Package: //p' /srv/pool/Packages").split())
    after = kernels(root)
    foreign = [kernel for kernel in after if FOREIGN.search(kernel)]
    assert foreign and len(after) - len(foreign) > 3
    for kernel in after:
        if kernel in foreign:
            assert not ours(root, kernel)
        else:
            assert_ours(root, kernel)

    root.apt("purge", PACKAGE)
    assert_stock(root, first)
    for kernel in after:
        assert not ours(root, kernel)
        assert "updates" not in driver(root, kernel) or not has_image(root, kernel)
    assert root.run("find /usr/src /var/lib/dkms /usr/lib -name 'free-page-hint*'") == ""


def test_explicit_build_for_another_kernel_is_refused(root: DebianRoot) -> None:
    """Told to build for a kernel outside its list, DKMS says so and builds nothing."""
    name = root.run(
        "sed -n 's/^Package: linux-headers-//p' /srv/pool/Packages | grep -E -e '^7.2.*amd|-rt-amd'"
    )
    root.apt("install", DEB, f"linux-headers-{name}")
    status, said = root.exec(f"dkms install free-page-hint/{VERSION} -k {name}")
    assert status == 77
    assert "BUILD_EXCLUSIVE" in said
    assert not ours(root, name)


# Makes the package of an earlier version: as it is now, but for the number.
OLDER = "0.0.9"
MAKE_OLDER = rf"""
dpkg-deb -R {DEB} /srv/old
cd /srv/old
grep -rlF {VERSION} . | xargs sed -i 's/{re.escape(VERSION)}/{OLDER}/g'
mv usr/src/free-page-hint-{VERSION} usr/src/free-page-hint-{OLDER}
dpkg-deb -b . /srv/older.deb
"""


def test_newer_version_takes_the_place_of_an_older_one(root: DebianRoot) -> None:
    """An upgrade of the package builds the modules anew, and leaves nothing of the older ones.

    A reinstallation does the same, for what was built anew and has the same version.
    """
    (kernel,) = kernels(root)
    root.run(MAKE_OLDER)
    root.apt("install", "/srv/older.deb")
    assert root.run(f"modinfo -k {kernel} -F version virtio_balloon") == OLDER

    root.apt("install", DEB)
    assert_ours(root, kernel)
    assert re.findall(r"free-page-hint/(\S+),", root.run("dkms status")) == [VERSION]
    assert root.run(f"find /usr/src /var/lib/dkms -name '*{OLDER}*'") == ""

    before = root.run(f"stat -c '%i %y' {driver(root, kernel)}")
    root.apt("install", "--reinstall", DEB)
    assert_ours(root, kernel)
    assert root.run(f"stat -c '%i %y' {driver(root, kernel)}") != before

    # What the older one put aside, if it did, was not lost.
    root.apt("purge", PACKAGE)
    assert_stock(root, kernel)


def test_headers_can_come_later(root: DebianRoot) -> None:
    """Without the kernel's headers, it is installed and says so; they bring the modules."""
    (kernel,) = kernels(root)
    headers = f"linux-headers-{kernel}"
    # The files of the package go with it: it is not in the pool.
    root.run(f"mkdir /saved && cp -a /usr/src/{headers} /lib/modules/{kernel}/build /saved")
    root.apt("purge", "linux-headers-cloud-amd64", headers)
    said = root.apt("install", DEB)
    # Two generations of DKMS: "was skipped", "skipping module build".
    skipped = r"kernel headers.*skipp(ed|ing)|skipped.*kernel headers"
    # Wherever it was wrapped
    assert re.search(skipped, " ".join(said.split())), said
    assert_stock(root, kernel)

    root.run(f"cp -a /saved/{headers} /usr/src; cp -a /saved/build /lib/modules/{kernel}")
    root.run(f"/etc/kernel/header_postinst.d/dkms {kernel}")
    assert_ours(root, kernel)


@pytest.mark.parametrize("full", ["/var/lib/dkms", "/lib/modules/KERNEL/updates/dkms"])
def test_full_disk_leaves_the_stock_driver(root: DebianRoot, full: str) -> None:
    """With no space to build or to install, apt fails, and works once there is some."""
    (kernel,) = kernels(root)
    full = full.replace("KERNEL", kernel)
    # For one of the modules at most.
    status, said = root.exec(
        f"mkdir -p {full} && mount -t tmpfs -o size=64k tmpfs {full} &&"
        f" apt-get -q -y install {DEB}; s=$?; umount {full}; exit $s"
    )
    assert status, said
    assert re.search(r"(?i)no space left on device|\d+ KiB are needed .* keeps its own", said), said
    assert_stock(root, kernel)

    root.run("dpkg --configure -a")
    assert_ours(root, kernel)
    root.apt("purge", PACKAGE)
    assert_stock(root, kernel)


# What is there when the install is killed.
MOMENTS = {
    "unpacked": "/usr/src/free-page-hint-*/dkms.conf",
    "building": "/var/lib/dkms/free-page-hint/*/build/mm/free_page_hint.o",
    "installing": "/lib/modules/*/updates/dkms/virtio_balloon_hint.ko*",
}


@pytest.mark.parametrize("moment", MOMENTS)
def test_killed_install_can_be_resumed(root: DebianRoot, moment: str) -> None:
    """Killed at any moment, the installation can be gone on with, and purged."""
    (kernel,) = kernels(root)
    root.kill_install(PACKAGE, DEB, f"compgen -G '{MOMENTS[moment]}' > /dev/null")
    assert not ours(root, kernel) or moment == "installing"

    root.run("dpkg --configure -a")
    # With its files half unpacked, it must be unpacked again; else this finds it installed.
    root.apt("install", DEB)
    assert_ours(root, kernel)
    root.apt("purge", PACKAGE)
    assert_stock(root, kernel)
