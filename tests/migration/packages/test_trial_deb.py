# SPDX-License-Identifier: GPL-2.0-or-later
"""Our QEMU as a package beside Debian's: apt installs it on a Debian 12 host, and removes it.

The host's libvirt, and its AppArmor profiles, are Debian 12's own.
"""

from typing import Any, Dict, Iterator, Set

import pytest

from livemig import paths
from livemig.debian_root import DebianRoot, host_root
from livemig.hosts_in_root import HostsInRoot, InstalledGuest, hosts_in_root

pytestmark = pytest.mark.long

PACKAGE = "qemu-system-x86-fph"
PROGRAM = "/usr/bin/qemu-system-x86_64-fph"
STOCK = "/usr/bin/qemu-system-x86_64"
MANUAL = "/usr/share/man/man1/qemu-system-x86_64-fph.1.gz"
DEB = f"/srv/deb/{PACKAGE}_{paths.version()}_amd64.deb"
# Debian's QEMU, and what ours recommends: apt installs nothing else with it then.
ALREADY = ("qemu-system-x86", "python3-libvirt")
INSTALL = f"DEBIAN_FRONTEND=noninteractive apt-get -q -y install {DEB}"
# All that there is but logs, caches and what dpkg notes; nothing that is mounted
FILES = r"""
cd /
what=(. -xdev -regextype egrep -regex '\./(run|srv|var/(log|cache|lib/dpkg))' -prune -o)
find "${what[@]}" -type f -exec sha256sum {} +
find "${what[@]}" -printf '%y %m %u %g %l %p\n'
find . -xdev -path './var/lib/dpkg/*' -not -name '*-old' -printf '%y %p\n'
dpkg-query -W -f '${Package} ${Version} ${Status}\n'
"""
# A profile as libvirt makes one for a domain, with all that it includes
PROFILE = """
sed s/LIBVIRT_TEMPLATE/domain/ /etc/apparmor.d/libvirt/TEMPLATE.qemu > /tmp/domain
apparmor_parser --skip-kernel-load --skip-cache /tmp/domain
apparmor_parser --preprocess /tmp/domain
"""
RULES = (f"  {PROGRAM} rmix,", "  owner @{PROC}/@{pid}/pagemap r,")


@pytest.fixture(name="root")
def root_fixture() -> Iterator[DebianRoot]:
    """A host without a QEMU."""
    assert paths.trial_deb()
    with host_root() as made:
        yield made


def files(root: DebianRoot) -> Set[str]:
    """The files of a host, with what is in them, and its packages."""
    return set(root.run(FILES).splitlines())


# What the domains of most hosts have
FEATURES = (
    "-vnc unix:/run/vnc -device VGA",
    "-sandbox on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny",
    "-object memory-backend-ram,id=ram,size=64M,host-nodes=0,policy=bind"
    " -machine memory-backend=ram -m 64M",
    "-drive file=/srv/disk,format=raw,if=virtio,cache=none,aio=native",
    "-drive file=/srv/disk,format=raw,if=virtio,aio=io_uring",
    "-device virtio-9p-pci,fsdev=srv,mount_tag=srv"
    " -fsdev local,id=srv,path=/srv,security_model=none",
)
DEVICES = ("vhost-user-fs-pci", "vhost-vsock-pci", "tpm-crb", "virtio-net-pci")


def assert_works(root: DebianRoot) -> None:
    """The program runs, with its firmware, and has arrays and what domains want."""
    assert "free-page-hint-arrays" in root.run(f"{PROGRAM} -device virtio-balloon-pci,help")
    devices = root.run(f"{PROGRAM} -device help")
    assert not [name for name in DEVICES if f'"{name}"' not in devices]
    root.run("truncate -s 1M /srv/disk")
    for options in FEATURES:
        machine = "-M q35 -nodefaults -display none -serial none -monitor stdio -S"
        root.run(f"set -o pipefail; echo quit | {PROGRAM} {machine} {options}")
    root.run("rm -f /srv/disk /run/vnc")
    # It ends by itself when the firmware has found nothing to boot from.
    root.run(f"{PROGRAM} -M q35 -display none -boot reboot-timeout=0 -no-reboot -net none")


def test_needs_nothing_of_another_qemu(root: DebianRoot) -> None:
    """Without Debian's QEMU, apt brings the libraries and firmware; autoremove takes all back."""
    before = files(root)
    root.apt("install", DEB)
    assert root.exec("command -v qemu-system-x86_64")[0]
    assert_works(root)
    assert "arrays" in root.run(f"zcat {MANUAL}")
    assert root.run("test -x /usr/bin/fph && zcat /usr/share/man/man1/fph.1.gz")
    root.apt("autoremove", "--purge", PACKAGE)
    assert files(root) == before


def test_apparmor_profile(root: DebianRoot) -> None:
    """libvirt's profile of a domain has our rules, after the one command that apt names.

    That it is enforced was not seen: it takes a kernel with AppArmor.
    """
    before = files(root)
    stock = root.run(PROFILE)
    lines = root.apt("install", DEB).splitlines()
    (line,) = [line for line in lines if line.startswith(f"{PACKAGE}: ")]
    command = line.split("run: ")[1]
    manual = root.run(f"zcat {MANUAL}").replace(r"\(aq", "'").replace("\\", "")
    assert command in manual
    # The premise: this libvirt does not read the directory.
    assert root.run(PROFILE) == stock
    root.run(command)
    profile = root.run(PROFILE)
    assert all(rule in profile and rule not in stock for rule in RULES)

    assert PACKAGE + ": " not in root.apt("install", "--reinstall", DEB)
    root.apt("autoremove", "--purge", PACKAGE)
    profile = root.run(PROFILE)
    assert not any(rule in profile for rule in RULES)
    changed = {line.split()[-1] for line in files(root) ^ before}
    assert changed == {"./etc/apparmor.d/local/abstractions/libvirt-qemu"}


def test_no_space(root: DebianRoot) -> None:
    """Where it does not fit, apt fails and all is as before; with more space, it works."""
    root.apt("install", *ALREADY)
    before = files(root)
    status, said = root.exec(
        f"cd /srv/space; {INSTALL} > said 2>&1 && exit 1; ({FILES}) > files;"
        " cat said; echo ---; cat files; echo ---;"
        f" mount -o remount,size=64M /srv/space && {INSTALL} && {PROGRAM} --version",
        space="8M",
    )
    assert status == 0, said
    failed, left, works = said.split("---\n")
    assert "No space left on device" in failed
    assert set(left.splitlines()) == before
    assert "QEMU emulator version" in works


# What is there when the install is killed
MOMENTS = {"unpacking": f"{PROGRAM}.dpkg-new", "unpacked": PROGRAM}


@pytest.mark.parametrize("moment", MOMENTS)
def test_killed_install_can_be_resumed(root: DebianRoot, moment: str) -> None:
    """Killed at any moment, the installation can be done again; a purge leaves what was before."""
    root.apt("install", *ALREADY)
    before = files(root)
    root.kill_install(PACKAGE, DEB, f"[ -e {MOMENTS[moment]} ]")
    root.run("dpkg --configure -a || :")
    root.run(INSTALL)
    assert_works(root)
    root.apt("purge", PACKAGE)
    assert files(root) == before


def define_with_fph(hosts: HostsInRoot, guest: InstalledGuest) -> None:
    """Take hints and our QEMU out of its definition, and have them back, as docs say."""
    hosts.virsh("a", "define", "--validate", guest.xml)
    hosts.run("a", f"fph disable {guest.name} --emulator {STOCK} --write")
    text = hosts.virsh("a", "dumpxml", "--inactive", guest.name)
    assert "name='free-page-hint" not in text and f"<emulator>{STOCK}<" in text
    hosts.run("a", f"fph enable {guest.name} --arrays --emulator {PROGRAM} --write")
    guest.xml.write_text(hosts.virsh("a", "dumpxml", "--inactive", guest.name), "utf-8")


def test_migrates_beside_debians_qemu(root: DebianRoot, measured: Dict[str, Any]) -> None:
    """libvirt migrates with hints beside Debian's QEMU, which stays as it is; a purge is clean.

    fph of the package changes domains with this libvirt and its Python binding, too.
    """
    root.apt("install", *ALREADY)
    with hosts_in_root(root, paths.kernel_image("ours"), paths.initramfs()) as hosts:
        before = set(hosts.run("a", FILES).splitlines())
        said = hosts.run("a", INSTALL)
        assert "0 upgraded, 1 newly installed, 0 to remove" in said
        # Nothing else was changed.
        assert not before - set(hosts.run("a", FILES).splitlines())
        assert hosts.run("a", f"dpkg --verify qemu-system-x86 {PACKAGE}") == ""

        guest = InstalledGuest(hosts, "trial", PROGRAM)
        # One that both QEMUs have
        guest.replace("machine='q35'", "machine='pc-q35-7.2'")
        define_with_fph(hosts, guest)
        with guest:
            measured.update(guest.migrates_with_hints())

        hosts.run("a", f"DEBIAN_FRONTEND=noninteractive apt-get -q -y purge {PACKAGE}")
        assert set(hosts.run("a", FILES).splitlines()) == before
        assert hosts.call("a", PROGRAM, "--version").returncode
