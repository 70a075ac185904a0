# SPDX-License-Identifier: GPL-2.0-or-later
"""Debian guests as they are, with their own kernel and systemd, get the guest package from apt.

Their kernels zero what they allocate (init_on_alloc), as Debian ships them.
"""

import base64
import contextlib
import re
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Dict, Iterator, Tuple

import pytest

from livemig import paths, workload
from livemig.checks import MIB, WITH_HINTS, assert_hints_used, assert_intact, wait_for
from livemig.disk import disk_copy
from livemig.guest import Guest
from livemig.host import PAGE_BYTES
from livemig.lab import Lab
from livemig.migration import Hints, migrate
from livemig.spec import ARRAYS, GuestSpec
from livemig.stockguest import package_disk, stock_disk, stock_software
from livemig.workload import meminfo, vmstat

pytestmark = pytest.mark.long

MEM_MIB = 2048
PACKAGE = "free-page-hint-dkms"
APT = "DEBIAN_FRONTEND=noninteractive apt-get -q -y --no-install-recommends"
# The guest has dkms build two modules. Under TCG, on a busy machine, all of this takes minutes.
PATIENCE = 3600
BOOT = 1200
VERSION = "/sys/module/virtio_balloon/version"
# Of the package ovmf: firmware with Secure Boot, variables with an example's key, and that key.
FIRMWARE = Path("/usr/share/OVMF/OVMF_CODE_4M.secboot.fd")
VARIABLES = Path("/usr/share/OVMF/OVMF_VARS_4M.snakeoil.fd")
KEY = Path("/usr/share/ovmf/PkKek-1-snakeoil.key")
CERTIFICATE = KEY.with_suffix(".pem")
SIGNING = b"mok_signing_key=/root/key\nmok_certificate=/root/key.der\n"
# The feature bits of both kinds of hints, and of page cache, from the left.
BLOCKS_BIT, ARRAYS_BIT, CACHE_BIT = 3, 23, 22


@dataclass
class Debian:
    """A Debian guest, booted again and again from one disk."""

    lab: Lab
    suite: str
    disk: Path
    archive: Path
    boots: int = 0

    def boot(self, cmdline: str = "", **machine: Any) -> Guest:
        """Boot from the disk, on a machine that may be another one than usual."""
        self.boots += 1
        software = stock_software(self.suite, self.disk, self.archive, cmdline)
        balloon = f"{ARRAYS},free-page-hint-cache=on"
        spec = GuestSpec(mem_mib=MEM_MIB, vcpus=2, software=software, balloon=balloon, **machine)
        guest = self.lab.launch(spec, f"{self.suite}-{self.boots}")
        guest.wait_ready(BOOT)
        # Drivers are loaded in the background.
        guest.agent.run("udevadm settle --timeout 900", BOOT)
        return guest

    def power_off(self, guest: Guest) -> None:
        """Let the guest end in order, so that it can be booted again."""
        guest.agent.send("systemctl poweroff")
        guest.wait_event(lambda event: event["event"] == "SHUTDOWN", "end of the guest", BOOT)
        guest.close()

    def migrate(self, guest: Guest) -> Tuple[Guest, Hints, Dict[str, int]]:
        """Migrate with memory that was written and freed; the guest verifies what it keeps.

        Returns the guest, what became of its hints, and what was measured: also where its free
        memory was before.
        """
        workload.dirty_and_free(guest, MEM_MIB // 2)
        workload.stamp(guest, 32)
        measured = {
            "free_reported_bytes": workload.free_reported_bytes(guest),
            "free_bytes_on_cpus": bytes_on_cpus(guest),
        }
        there = self.lab.incoming(guest.spec, f"{guest.name}-destination")
        result = migrate(guest, there, WITH_HINTS)
        assert_intact(there)
        guest.close()
        hints = assert_hints_used(result, MEM_MIB // 4 * MIB)
        for name in "messages blocks hinted_bytes skipped_bytes redirtied_bytes".split():
            measured[name] = getattr(hints, name)
        return there, hints, {**measured, "ask_to_end_us": hints.ask_to_end}


@pytest.fixture(scope="module", name="archive")
def archive_fixture() -> Iterator[Path]:
    """An archive with the package, for the guest's apt."""
    with package_disk(paths.guest_deb()) as made:
        yield made


def speaks_arrays(guest: Guest) -> bool:
    """Whether the guest's driver is the package's, and took the feature of arrays.

    None takes that of page cache: only a kernel of its own can free some.
    """
    bits = guest.agent.run("cat /sys/bus/virtio/drivers/virtio_balloon/virtio*/features")
    assert (bits[BLOCKS_BIT], bits[CACHE_BIT]) == ("1", "0")
    arrays = bits[ARRAYS_BIT] == "1"
    assert (guest.agent.exec(f"test -e {VERSION}")[0] == 0) == arrays
    return arrays


@contextlib.contextmanager
def installed_disk(lab: Lab, suite: str, archive: Path) -> Iterator[Path]:
    """The disk of a Debian guest in which apt installed the package, in the running guest."""
    with stock_disk(suite) as disk:
        debian = Debian(lab, suite, disk, archive)
        guest = debian.boot()
        # The premises: it is as Debian ships it.
        assert guest.agent.run("grep -c CONFIG_INIT_ON_ALLOC_DEFAULT_ON=y /boot/config-$(uname -r)")
        assert not speaks_arrays(guest)
        # What a user does, from an archive on a disk
        guest.agent.run("echo 'deb [trusted=yes] file:/srv/archive ./' > /etc/apt/sources.list")
        guest.agent.run("mkdir -p /srv/archive && mount -o ro /dev/vdb /srv/archive")
        guest.agent.run(f"apt-get -q update && {APT} install {PACKAGE}", PATIENCE)
        # The driver that was loaded stays until it is loaded anew.
        assert not speaks_arrays(guest)
        debian.power_off(guest)
        yield disk


@pytest.fixture(scope="module", params=["bookworm", "trixie"], name="installed")
def installed_fixture(
    request: pytest.FixtureRequest, module_lab: Lab, archive: Path
) -> Iterator[Tuple[str, Path]]:
    """A suite, and the disk of its guest with the package."""
    with installed_disk(module_lab, request.param, archive) as disk:
        yield request.param, disk


@pytest.fixture(name="debian")
def debian_fixture(lab: Lab, archive: Path, installed: Tuple[str, Path]) -> Iterator[Debian]:
    """A guest in which the package is installed, on a disk of its own."""
    suite, image = installed
    with disk_copy(image, paths.cache_dir()) as disk:
        yield Debian(lab, suite, disk, archive)


def balloon_to(guest: Guest, mib: int) -> None:
    """Let the guest have so much memory."""
    guest.qmp("balloon", value=mib * MIB)
    wait_for(lambda: guest.qmp("query-balloon")["actual"] == mib * MIB, "balloon", BOOT)


def test_migrates_with_arrays_then_purged_with_blocks(
    debian: Debian, measured: Dict[str, Any]
) -> None:
    """After a reboot it migrates with arrays, loses nothing, and after a purge as a stock guest."""
    guest = debian.boot()
    assert speaks_arrays(guest)
    guest, hints, measured["arrays"] = debian.migrate(guest)
    assert hints.messages < hints.blocks / 10
    assert int(guest.agent.run("cat /sys/kernel/debug/virtio_balloon_hint/*/reports")) == 1
    for times in range(3):
        workload.dirty_and_free(guest, MEM_MIB // 2)
        measured[f"drained-{times}"] = drain_a_cpu(guest)

    guest.agent.run(f"{APT} purge {PACKAGE}", PATIENCE)
    debian.power_off(guest)
    guest = debian.boot()
    assert not speaks_arrays(guest)
    assert guest.agent.exec("modinfo virtio_balloon_hint")[0]
    guest, hints, measured["blocks"] = debian.migrate(guest)
    assert hints.messages >= hints.blocks


def test_newest_kernel_migrates_with_arrays(
    lab: Lab, archive: Path, measured: Dict[str, Any]
) -> None:
    """So does Debian's newest kernel, that of its backports, after a reboot."""
    suite = "trixie-backports"
    with installed_disk(lab, suite, archive) as disk:
        debian = Debian(lab, suite, disk, archive)
        guest = debian.boot()
        assert guest.agent.run("uname -r").startswith("7.3.")
        assert speaks_arrays(guest)
        _, hints, measured["arrays"] = debian.migrate(guest)
        assert hints.messages < hints.blocks / 10


def in_balloon_mib(guest: Guest) -> int:
    """The memory in balloons, as the kernel counts what drivers take and give back."""
    pages = vmstat(guest, "balloon_inflate") - vmstat(guest, "balloon_deflate")
    return pages * PAGE_BYTES // MIB


def assert_balloon_is_gone(guest: Guest, available: int) -> None:
    """The driver is, and the guest has its memory back, of which so much was available in MiB."""
    assert guest.agent.exec("grep -q ^virtio_balloon /proc/modules")[0]
    assert in_balloon_mib(guest) == 0
    # A guest that has just booted uses some more by itself.
    assert meminfo(guest)["MemAvailable"] > available - MEM_MIB // 8


def test_driver_can_be_unloaded_while_inflated(debian: Debian) -> None:
    """Unloaded with its balloon inflated, or on its way, the driver gives all memory back."""
    guest = debian.boot()
    workload.stamp(guest, 32, name="kept")
    before = meminfo(guest)["MemAvailable"]
    balloon_to(guest, MEM_MIB // 2)
    # The premise.
    assert in_balloon_mib(guest) == MEM_MIB // 2
    guest.agent.run("modprobe -r virtio_balloon")
    assert_balloon_is_gone(guest, before)

    # It begins anew, as that is what the host wants.
    guest.agent.run("modprobe virtio_balloon; modprobe -r virtio_balloon")
    assert_balloon_is_gone(guest, before)
    guest.agent.run("modprobe virtio_balloon")
    assert speaks_arrays(guest)
    balloon_to(guest, MEM_MIB)
    guest, hints, _ = debian.migrate(guest)
    assert hints.messages < hints.blocks
    assert_intact(guest, "kept")


def bytes_on_cpus(guest: Guest) -> int:
    """The free memory that is in the CPUs' own lists, where the package's walk cannot find it."""
    counts = re.findall(r"^ +count: +(\d+)$", guest.agent.run("cat /proc/zoneinfo"), re.MULTILINE)
    return sum(map(int, counts)) * workload.PAGE_BYTES


def drain_a_cpu(guest: Guest) -> Dict[str, int]:
    """How much more there is to hint when CPU 1 has gone offline, and its lists with it."""
    on_cpus, free = bytes_on_cpus(guest), workload.free_reported_bytes(guest)
    guest.agent.run("echo 0 > /sys/devices/system/cpu/cpu1/online")
    measured = {
        "on_cpus_bytes": on_cpus,
        "left_there_bytes": bytes_on_cpus(guest),
        "more_to_hint_bytes": workload.free_reported_bytes(guest) - free,
    }
    guest.agent.run("echo 1 > /sys/devices/system/cpu/cpu1/online")
    return measured


def openssl(*arguments: str) -> bytes:
    """What openssl prints."""
    return subprocess.run(["openssl", *arguments], stdout=subprocess.PIPE, check=True).stdout


def assert_fell_back(guest: Guest) -> None:
    """The kernel's own driver is used, and one line says why."""
    assert not speaks_arrays(guest)
    lines = guest.agent.run("dmesg | grep free-page-hint").splitlines()
    assert len(lines) == 1 and "own balloon driver is used" in lines[0], lines


def test_secure_boot_takes_modules_of_a_trusted_key(debian: Debian) -> None:
    """With Secure Boot, the stock driver is used until DKMS signs with a key that is trusted."""
    if not (FIRMWARE.exists() and KEY.exists()):
        pytest.skip("the firmware for Secure Boot is missing: make deps")
    with disk_copy(VARIABLES, paths.cache_dir()) as variables:
        flash = "if=pflash,format=raw"
        secure = (
            *("-global", "driver=cfi.pflash01,property=secure,value=on"),
            *("-drive", f"{flash},unit=0,readonly=on,file={FIRMWARE}"),
            *("-drive", f"{flash},unit=1,file={variables}"),
        )
        # It needs SMM to keep the variables safe.
        guest = debian.boot(machine="q35,smm=on", args=secure)
        # The premise: this is what Debian's kernels do then.
        assert "[integrity]" in guest.agent.run("cat /sys/kernel/security/lockdown")
        assert_fell_back(guest)

        for file, data in (
            ("/root/key", openssl("pkey", "-in", str(KEY), "-passin", "pass:snakeoil")),
            ("/root/key.der", openssl("x509", "-in", str(CERTIFICATE), "-outform", "DER")),
            ("/etc/dkms/framework.conf.d/key.conf", SIGNING),
        ):
            guest.agent.run(f"echo {base64.b64encode(data).decode()} | base64 -d > {file}")
        guest.agent.run(f"dpkg-reconfigure -f noninteractive {PACKAGE}", PATIENCE)
        guest.agent.run("modprobe -r virtio_balloon && modprobe virtio_balloon")
        assert speaks_arrays(guest)
        assert "[integrity]" in guest.agent.run("cat /sys/kernel/security/lockdown")
        debian.power_off(guest)


def test_kernel_that_refuses_the_signature_uses_its_own_driver(debian: Debian) -> None:
    """Where only trusted signatures count, the stock driver is loaded, and one line says why."""
    guest = debian.boot("module.sig_enforce=1")
    assert guest.agent.run("cat /sys/module/module/parameters/sig_enforce").strip() == "Y"
    assert_fell_back(guest)
    balloon_to(guest, MEM_MIB // 2)
    debian.power_off(guest)
