# SPDX-License-Identifier: GPL-2.0-or-later
"""A guest with disks goes back to what it was with "virsh snapshot-revert", or to sleep and on.

Each time it migrates with hints afterwards.
"""

import subprocess
from pathlib import Path
from typing import Any, Dict, Iterator, List

import pytest

from livemig.domains import ANY_TIME, DISK, Guest, Hosts, assert_used, stamped
from livemig.migration import MigrationResult

FORMATS = {"vda": "raw", "vdb": "qcow2"}


@pytest.fixture(name="guest", scope="module")
def guest_fixture(hosts: Hosts, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Guest]:
    """A running guest with a raw and a qcow2 disk."""
    guest = Guest(hosts, "with-disks", ANY_TIME)
    directory = tmp_path_factory.mktemp("disks")
    for name, kind in FORMATS.items():
        file = directory / name
        subprocess.run(["qemu-img", "create", "-q", "-f", kind, file, "4M"], check=True)
        guest.add("devices", DISK.format(file=file, type=kind, name=name, more=""))
    with stamped(guest):
        yield guest


def write(guest: Guest, word: str) -> None:
    """Write a word to a file in memory and to each disk."""
    guest.agent.run(f"echo {word} >/tmp/word")
    for name in FORMATS:
        guest.agent.run(f"printf %4096s {word} | dd of=/dev/{name} bs=4096 oflag=direct")


def read(guest: Guest) -> List[str]:
    """What was written last: in memory, and on each of the two disks."""
    disks = (f"dd if=/dev/{name} bs=4096 count=1 iflag=direct 2>/dev/null" for name in FORMATS)
    return [guest.agent.run(command).strip() for command in ("cat /tmp/word", *disks)]


def migrate_there_and_back(guest: Guest) -> None:
    """Use hints in both directions."""
    for _ in range(2):
        # The disks' files are shared, but libvirt does not know how.
        assert_used(guest.fill_and_migrate("--unsafe"))


def test_reverted_to_an_external_snapshot(
    guest: Guest, tmp_path: Path, measured: Dict[str, Any]
) -> None:
    """A snapshot that was taken live, with hints, brings memory and disks back to its moment."""
    write(guest, "before")
    guest.fill()
    options = ["--memspec", f"file={tmp_path}/memory,snapshot=external", "--live", "--atomic"]
    for name in FORMATS:
        options += ["--diskspec", f"{name},snapshot=external"]
    guest.virsh("snapshot-create-as", "one", *options)
    snapshot = MigrationResult.from_qmp(guest.qmp("query-migrate"))
    assert_used(snapshot)
    measured["snapshot_bytes"] = snapshot.sent_bytes
    write(guest, "after")
    assert read(guest) == ["after"] * 3

    guest.virsh("snapshot-revert", "one")
    guest.hang_up()
    guest.check()
    assert read(guest) == ["before"] * 3
    # libvirt refuses to migrate a domain that has snapshots.
    guest.virsh("snapshot-delete", "one", "--metadata")
    migrate_there_and_back(guest)
    assert read(guest) == ["before"] * 3


FILE = "/var/lib/libvirt/qemu/saved"
SAVES = {
    "managedsave": (["managedsave", "with-disks"], ["start", "with-disks"]),
    "save": (["save", "with-disks", FILE], ["restore", FILE]),
}


@pytest.mark.parametrize("save, restore", SAVES.values(), ids=SAVES)
def test_saved_and_restored(
    hosts: Hosts, guest: Guest, save: List[str], restore: List[str]
) -> None:
    """What was put away comes back, and the guest's next migration has hints.

    It is stopped before it is saved, and not asked then.
    """
    write(guest, "saved")
    guest.fill()
    hosts.virsh("a", *save)
    guest.hang_up()
    assert guest.state() == "shut off"
    hosts.virsh("a", *restore)
    guest.check()
    assert read(guest) == ["saved"] * 3
    migrate_there_and_back(guest)
