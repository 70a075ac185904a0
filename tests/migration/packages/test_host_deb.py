# SPDX-License-Identifier: GPL-2.0-or-later
"""Debian's own QEMU with our series in it, on a Debian 13 host with its own libvirt."""

import re
from typing import Any, Dict, Iterator

import pytest

from livemig import paths
from livemig.debian_root import YES, DebianRoot, host_root
from livemig.errors import MissingArtifact
from livemig.hosts_in_root import InstalledGuest, hosts_in_root

pytestmark = pytest.mark.long

GUIDE = (paths.REPO / "docs" / "host-package.md").read_text("utf-8")
PREFERENCES = "/etc/apt/preferences.d/qemu-fph"
POLICY = "apt-cache policy qemu-system-x86"
# The index of an archive with Debian's next version of QEMU: enough for apt to plan with
NEXT = r"""
mkdir /next
dpkg -s qemu-system-x86 qemu-system-common qemu-utils |
    sed -E -e 's/(1:10[^ )]*\+deb13u)[0-9]+(\+fph[0-9.]+)?/\199/' \
        -e '/^Status:/d; s/^Package: .*/&\nFilename: .\/none\nSize: 1/' > /next/Packages
echo 'deb [trusted=yes] file:/next ./' > /etc/apt/sources.list.d/next.list
apt-get -q update
"""


@pytest.fixture(name="root")
def root_fixture() -> Iterator[DebianRoot]:
    """A host with Debian's QEMU, and ours installed over it."""
    try:
        debs = paths.host_debs()
    except MissingArtifact as err:
        # They take long to build, so that "make test-packages" does not.
        pytest.skip(str(err))
    install = re.search(r"^    (apt install \./qemu-system-x86_.*)$", GUIDE, re.MULTILINE)
    assert install
    with host_root("trixie") as made:
        made.apt("install", "qemu-system-x86", "qemu-utils")
        # The premise.
        assert "+fph" not in made.run(POLICY)
        made.run(YES)
        said = made.run(f"cd /srv/deb && {install[1]}")
        assert f"Upgrading: {len(debs)}, Installing: 0, Removing: 0" in said, said
        yield made


def candidate(root: DebianRoot) -> str:
    """The version that apt would install."""
    return root.run(f"{POLICY} | sed -n 's/^ *Candidate: //p'")


def test_pin_keeps_the_hints(root: DebianRoot) -> None:
    """Debian's next version replaces it in an upgrade, and not with the pin that the guide has."""
    ours = candidate(root)
    assert f"+fph{paths.version()}" in ours
    root.run(NEXT)
    assert candidate(root).endswith("deb13u99")
    assert re.search(r"^Inst qemu-system-x86 ", root.run("apt-get -s upgrade"), re.MULTILINE)

    pin = re.search(rf"^    # {PREFERENCES}\n((?:    \S.*\n)+)", GUIDE, re.MULTILINE)
    assert pin
    root.run(f"cat > {PREFERENCES} <<EOF\n{re.sub('^    ', '', pin[1], flags=re.MULTILINE)}EOF")
    assert candidate(root) == ours
    assert "Inst qemu" not in root.run("apt-get -s upgrade")


def test_migrates(root: DebianRoot, measured: Dict[str, Any]) -> None:
    """libvirt migrates a guest with hints, and absent pages are found."""
    with hosts_in_root(root, paths.kernel_image("ours"), paths.initramfs()) as hosts:
        with InstalledGuest(hosts, "host", "/usr/bin/qemu-system-x86_64") as guest:
            measured.update(guest.migrates_with_hints())
