# SPDX-License-Identifier: GPL-2.0-or-later
"""The commands of the README's "Use it on a real host and in a real guest", as they stand there.

The host is Debian 12 with its own libvirt, the guest Debian 12 with its own kernel, and neither has
anything else of ours than what these commands install.
"""

import contextlib
import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any, Dict, Iterator, List

import pytest

from livemig import paths, workload
from livemig.checks import MIB, assert_hints_used
from livemig.debian_root import YES, DebianRoot, host_root
from livemig.domains import OTHER_HOST, SPEC, Guest
from livemig.hosts_in_root import HostsInRoot, hosts_in_root
from livemig.stockguest import package_disk

pytestmark = pytest.mark.long

README = paths.REPO / "README.md"
SUITE = "bookworm"
MEM_MIB = 2048
STAMPED_MIB = 64
# Under TCG, on a busy machine
BOOT = 1200
PATIENCE = 3600
DISK = """<disk type='file' device='disk'>
  <driver name='qemu' type='raw' cache='none'/><source file='{}'/><target dev='{}' bus='virtio'/>
</disk>"""


def readme_steps() -> List[str]:
    """The numbered steps of the section."""
    text = README.read_text("utf-8")
    section = text.split("\n## Use it on a real host and in a real guest\n")[1].split("\n## ")[0]
    steps = re.split(r"^\d+\. ", section, flags=re.MULTILINE)[1:]
    assert len(steps) == 4
    return steps


def commands(step: str) -> List[str]:
    """The commands of a step: what is indented more than its text."""
    found = re.findall(r"^ {7}(\S.*)$", step, re.MULTILINE)
    assert found
    return found


class ReadmeGuest(Guest):
    """A Debian guest whose domain has what the README says, and which is migrated as it says."""

    def __init__(self, on: HostsInRoot, name: str, root: Path, archive: Path):
        super().__init__(on, name)
        self.spec = SPEC.but(mem_mib=MEM_MIB)
        made = paths.stock_guest(SUITE)
        for element, text in (
            ("kernel", made / "vmlinuz"),
            ("initrd", made / "initrd.img"),
            ("cmdline", "root=/dev/vda rw console=ttyS0 panic=-1 no_timer_check"),
        ):
            self.replace_element(element, f"<{element}>{text}</{element}>")
        self.replace_element("memory", f"<memory unit='MiB'>{MEM_MIB}</memory>")
        # All that the tests' domain has of ours
        for element in "emulator", "memballoon", "qemu:override", "qemu:commandline":
            self.replace_element(element)
        xml = r"```xml\n(.*?)(<qemu:override>.*?)```"
        snippet = re.search(xml, readme_steps()[1], re.DOTALL)
        assert snippet
        self.add("devices", DISK.format(root, "vda"), DISK.format(archive, "vdb"), snippet[1])
        self.add("domain", snippet[2])

    def _wait_ready(self, seconds: float) -> bool:
        """Wait until the guest's agent is up: it is the last thing that systemd starts."""
        self.agent.wait_ready(BOOT)
        return True

    def virsh_migrate(self, *options: Any) -> Any:
        """Run the README's command. The disk of the guest is shared, which libvirt cannot know."""
        (command,) = commands(readme_steps()[3])
        assert command == "virsh migrate --live DOMAIN qemu+ssh://other-host/system"
        command = command.replace("ssh://other-host", f"tcp://host-{OTHER_HOST[self.host]}")
        command = command.replace("DOMAIN", f"--unsafe {self.name}")
        return self.hosts.call(self.host, *command.split(), *options)


@pytest.fixture(name="root")
def root_fixture() -> Iterator[DebianRoot]:
    """A host on which the README's commands were run, by somebody who says yes."""
    with host_root() as root:
        # The premise: there is no QEMU.
        assert root.run("ls /usr/bin | grep qemu-system || :") == ""
        root.run(YES)
        for command in commands(readme_steps()[0]):
            root.run(f"cd /srv/deb && {command}")
        yield root


@pytest.fixture(name="guest")
def guest_fixture(root: DebianRoot) -> Iterator[ReadmeGuest]:
    """A running guest in which they were run too."""
    made = paths.stock_guest(SUITE)
    with contextlib.ExitStack() as stack:
        directory = stack.enter_context(tempfile.TemporaryDirectory(dir=paths.cache_dir()))
        image = Path(directory) / "disk"
        subprocess.run(["cp", "--sparse=always", made / "disk.ext4", image], check=True)
        archive = stack.enter_context(package_disk(paths.guest_deb()))
        hosts = stack.enter_context(hosts_in_root(root, made / "stamp", archive))
        guest = stack.enter_context(ReadmeGuest(hosts, "readme", image, archive))
        guest.agent.run(f"{YES}; mkdir /srv/archive && mount -o ro /dev/vdb /srv/archive")
        for command in commands(readme_steps()[2]):
            guest.agent.run(f"cd /srv/archive && {command}", PATIENCE)
        yield guest


def test_debian_migrates_with_arrays(guest: ReadmeGuest, measured: Dict[str, Any]) -> None:
    """By these commands alone, a Debian guest migrates with arrays, and its memory is intact."""
    workload.stamp(guest, STAMPED_MIB)
    workload.dirty_and_free(guest, MEM_MIB // 2)
    result = guest.migrate()
    guest.check()
    hints = assert_hints_used(result, MEM_MIB // 4 * MIB)
    # Arrays, not blocks
    assert hints.messages < hints.blocks / 10
    measured.update(total_ms=result.total_ms, sent_bytes=result.sent_bytes)
    for name in "messages hinted_bytes redirtied_bytes".split():
        measured[name] = getattr(hints, name)
