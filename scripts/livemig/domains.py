# SPDX-License-Identifier: GPL-2.0-or-later
"""Two libvirt hosts in namespaces, made by scripts/two-hosts, and a guest that one of them runs."""

import contextlib
import json
import os
import re
import socket
import string
import subprocess
import time
from pathlib import Path
from typing import Any, Dict, Iterator, List, Mapping, Optional, Sequence, Tuple, TypeVar
from xml.sax.saxutils import quoteattr

import pytest

from livemig import memory, paths, workload
from livemig.checks import assert_intact, run_script
from livemig.guest import BOOT_RACE, KERNEL_TROUBLE
from livemig.host import MIB
from livemig.migration import MigrationResult
from livemig.serial import Agent, Port
from livemig.spec import GuestSpec

TOOL = paths.REPO / "scripts" / "two-hosts"
FPH = paths.REPO / "scripts" / "fph"
DOMAIN_XML = paths.REPO / "tests" / "migration" / "libvirt" / "domain.xml"
DOCUMENTED = (paths.REPO / "docs" / "libvirt.md").read_text("utf-8")
QEMU_NAMESPACE = "http://libvirt.org/schemas/domain/qemu/1.0"
PROPERTY = "<qemu:property name='{}' type='bool' value='true'/>"
OTHER_HOST = {"a": "b", "b": "a"}
LIBVIRTD_LOG = "/var/log/libvirt/libvirtd.log"
# Exit status of two-hosts where the machine cannot run the hosts
UNSUPPORTED = 77
STAMPED_MIB = 64
FREED_MIB = 512
COLD_MIB = 128
# For tests that are not about how soon a guest answers: the longest wait that there is.
ANY_TIME = ("-global", "migration.free-page-hint-wait=60000")
SPEC = GuestSpec(mem_mib=1024, vcpus=2)
# Memory of a guest that somebody else can look at, of a type
SHARED = "<memoryBacking><source type='{}'/><access mode='shared'/></memoryBacking>"
DISK = """<disk type='file' device='disk'><driver name='qemu' type='{type}'/>
<source file='{file}'/><target dev='{name}' bus='virtio'/>{more}</disk>"""
AnyGuest = TypeVar("AnyGuest", bound="Guest")


def two_hosts(*args: Any, **environment: str) -> "subprocess.CompletedProcess[str]":
    """Run the tool; return what it did."""
    return run_script(TOOL, *args, **environment)


def uri(host: str) -> str:
    """Return where a host's libvirt is for the other one."""
    return f"qemu+tcp://host-{host}/system"


class Hosts:
    """Two libvirt hosts, a and b."""

    def __init__(self, state: Path):
        self.state = state

    def call(self, host: str, *command: Any) -> "subprocess.CompletedProcess[str]":
        """Run a command on a host; return what it did."""
        return two_hosts("on", "--state", self.state, host, *command)

    @contextlib.contextmanager
    def started(self, host: str, *command: Any) -> Iterator["subprocess.Popen[str]"]:
        """A command that runs on a host, until the context ends."""
        words = [str(word) for word in (TOOL, "on", "--state", self.state, host, *command)]
        pipe = subprocess.PIPE
        with subprocess.Popen(words, stdout=pipe, stderr=pipe, text=True) as process:
            try:
                yield process
            finally:
                process.terminate()

    def virsh(self, host: str, *args: Any) -> str:
        """Run virsh on a host, which must succeed; return what it printed."""
        done = self.call(host, "virsh", "-q", *args)
        assert done.returncode == 0, f"virsh {' '.join(map(str, args))}: {done.stderr}"
        return done.stdout

    def fph(self, host: str, command: str, name: str) -> Any:
        """Return what scripts/fph says of a domain; it must succeed."""
        done = self.call(host, FPH, *command.split(), name, "--json")
        assert (done.returncode, done.stderr) == (0, ""), done.stderr
        return json.loads(done.stdout)["domains"][name]

    def path(self, host: str, path: str) -> Path:
        """Return where a file of a host's libvirt is on this machine."""
        return self.state / host / path.lstrip("/")


class AgentPort(Port):
    """A guest's serial port that QEMU offers as a socket in the file system."""

    def __init__(self, path: Path):
        super().__init__(f"agent at {path}")
        self._ours.close()
        self._ours = socket.socket(socket.AF_UNIX)
        self._ours.connect(str(path))
        self.connected()


class Guest:
    """A guest that libvirt runs on one of the hosts; on host a first."""

    def __init__(self, hosts: Hosts, name: str, qemu_args: Sequence[str] = ()):
        """Describe the guest, with more arguments for QEMU; entering the context starts it."""
        self.hosts = hosts
        self.name = name
        self.spec = SPEC
        self.host = "a"
        self.xml = hosts.state / f"{name}.xml"
        text = string.Template(DOMAIN_XML.read_text("utf-8")).substitute(
            name=name,
            memory=SPEC.mem_mib,
            vcpus=SPEC.vcpus,
            kernel=paths.kernel_image(SPEC.kernel),
            initramfs=paths.initramfs(),
            qemu=paths.qemu_binary(SPEC.qemu),
        )
        self.xml.write_text(text, "utf-8")
        self.add("qemu:commandline", *(f"<qemu:arg value={quoteattr(arg)}/>" for arg in qemu_args))
        self._port: Optional[AgentPort] = None
        # Memory of QEMUs that is kept open to be looked at.
        self._memories = contextlib.ExitStack()
        # What libvirt's log has of the last migration, on the host that the guest left.
        self.libvirt_said = ""

    def replace(self, old: str, new: str = "") -> None:
        """Replace something that is in its domain XML once."""
        text = self.xml.read_text("utf-8")
        assert text.count(old) == 1, old
        self.xml.write_text(text.replace(old, new), "utf-8")

    def replace_element(self, element: str, new: str = "") -> None:
        """Replace a whole element of its domain XML."""
        text = self.xml.read_text("utf-8")
        (old,) = re.findall(rf"(?s)<{element}\b.*?</{element}>", text)
        self.replace(old, new)

    def add(self, element: str, *children: str) -> None:
        """Add to an element of its domain XML, at the end."""
        end = f"</{element}>"
        self.replace(end, "".join(children) + end)

    def __enter__(self) -> "Guest":
        """Start the guest and wait until it is up."""
        self.hosts.virsh("a", "define", "--validate", self.xml)
        self.hosts.virsh("a", "start", self.name)
        try:
            if not self._wait_ready(120) and BOOT_RACE.search(self.qemu_log("a")):
                self.hosts.virsh("a", "start", self.name)
                self._wait_ready(120)
            assert self.state() == "running", "the guest did not boot"
        except BaseException:
            self._end(failed=True)
            raise
        return self

    def __exit__(self, exc_type: object, *_: object) -> None:
        """End the guest, whose kernel should not have complained about anything."""
        said = "".join(self.qemu_log(host, "console") for host in OTHER_HOST)
        trouble = [match.group(0) for match in KERNEL_TROUBLE.finditer(said)]
        self._end(failed=bool(exc_type or trouble))
        assert exc_type or not trouble, f"the guest's kernel complained: {trouble}"

    def _end(self, failed: bool) -> None:
        """End the guest; after a failure print what it and its QEMUs said."""
        self._memories.close()
        self.hang_up()
        for host in OTHER_HOST:
            for kind in "console", "log":
                if failed and (said := self.qemu_log(host, kind)):
                    print(f"--- the end of {self._log(host, kind)}:\n{said[-3000:]}")
            self.hosts.call(host, "virsh", "destroy", self.name)
            self.hosts.call(host, "virsh", "undefine", self.name)

    def _log(self, host: str, suffix: str) -> Path:
        """Return the guest's console or its QEMU's log on a host."""
        return self.hosts.path(host, f"/var/log/libvirt/qemu/{self.name}.{suffix}")

    def _wait_ready(self, seconds: float) -> bool:
        """Wait for the console's line that says that the agent is up; False if its QEMU ended."""
        deadline = time.monotonic() + seconds
        while not re.search(r"^READY\b", self._log("a", "console").read_text(), re.MULTILINE):
            assert time.monotonic() < deadline, f"the guest was not up in {seconds} s"
            if self.state() != "running":
                return False
            time.sleep(0.3)
        return True

    @property
    def agent(self) -> Agent:
        """The guest's agent, through the QEMU that runs the guest now."""
        if not self._port:
            path = f"/var/lib/libvirt/qemu/{self.name}.agent"
            self._port = AgentPort(self.hosts.path(self.host, path))
        return Agent(self._port)

    def qemu_log(self, host: str, kind: str = "log") -> str:
        """Return what the guest's QEMUs wrote to their log or its console on a host so far."""
        log = self._log(host, kind)
        return log.read_text(errors="replace") if log.exists() else ""

    def virsh(self, command: str, *args: Any) -> str:
        """Run a command of virsh for the guest where it should be."""
        return self.hosts.virsh(self.host, command, self.name, *args)

    def hmp(self, command: str) -> str:
        """Run a command of QEMU's human monitor, through libvirt."""
        return self.virsh("qemu-monitor-command", "--hmp", command)

    def qmp(self, command: str) -> Any:
        """Run a QMP command, through libvirt."""
        answer = self.virsh("qemu-monitor-command", json.dumps({"execute": command}))
        return json.loads(answer)["return"]

    def state(self) -> str:
        """Return what libvirt says about the guest."""
        return self.virsh("domstate").strip()

    def virsh_migrate(self, *options: Any) -> "subprocess.CompletedProcess[str]":
        """Let virsh migrate the guest to the other host; return what it did."""
        return self.hosts.call(self.host, *self.migration_command(*options))

    def fail_to_migrate(self, *options: Any) -> str:
        """Let virsh try in vain; return what it complained about."""
        done = self.virsh_migrate(*options)
        assert done.returncode and done.stderr, "the guest was migrated"
        return done.stderr

    def migration_command(self, *options: Any) -> Tuple[Any, ...]:
        """What lets virsh migrate the guest to the other host."""
        return ("virsh", "migrate", "--live", *options, self.name, uri(OTHER_HOST[self.host]))

    def pids(self) -> List[int]:
        """Return the processes of its QEMUs."""
        return processes_naming(f"guest={self.name},")

    def _ram(self) -> Dict[str, memory.Block]:
        """Return the guest's RAM in its QEMU, also for after that has ended.

        The domain XML must ask for memory that is an open file of QEMU.
        """
        (pid,) = self.pids()
        (file,) = (
            self._memories.enter_context(open(fd, "rb"))
            for fd in Path(f"/proc/{pid}/fd").iterdir()
            if os.readlink(fd).startswith("/memfd:memory-backend-memfd")
        )
        path = Path(f"/proc/self/fd/{file.fileno()}")
        return {"pc.ram": memory.Block(path, 0, SPEC.mem_mib * MIB // memory.PAGE_BYTES)}

    def fill_and_compare(self) -> Tuple[MigrationResult, memory.Comparison]:
        """Do what fill_and_migrate() does, and compare the memories before it runs on."""
        self.fill()
        source, log = self._ram(), self._log(self.host, "log")
        start = log.stat().st_size
        result = self.migrate("--suspend")
        different = memory.different_pages(source, self._ram())
        seen = memory.judge(different, memory.kept_pages(log, source, start))
        assert not seen.lost, seen
        self.virsh("resume")
        self.check()
        return result, seen

    def migrate(self, *options: Any) -> MigrationResult:
        """Migrate the guest to the other host, which must succeed; return QEMU's statistics.

        After a success libvirt ends the source's QEMU, so nobody can ask it any more. But first
        it asks itself, and the answer is in its log (log_filters has 1:qemu.qemu_monitor).
        """
        with open(self.hosts.path(self.host, LIBVIRTD_LOG), "rb") as log:
            log.seek(0, os.SEEK_END)
            done = self.virsh_migrate(*options)
            assert done.returncode == 0, done.stderr
            self.libvirt_said = log.read().decode(errors="replace")
        reply = r"QEMU_MONITOR_RECV_REPLY: .* reply=(.*\"total-time\".*)"
        answers = re.findall(reply, self.libvirt_said)
        assert answers, "libvirt did not ask for the statistics of the migration"
        result = MigrationResult.from_qmp(json.loads(answers[-1])["return"])
        assert result.status == "completed"
        self.arrived()
        assert self.state() == ("paused" if "--suspend" in options else "running")
        return result

    def arrived(self) -> None:
        """It is on the other host from here on."""
        self.host = OTHER_HOST[self.host]
        self.hang_up()

    def hang_up(self) -> None:
        """The agent's port is another QEMU's from here on."""
        if self._port:
            self._port.close()
            self._port = None

    def fill(self) -> None:
        """Leave much free memory that is full of old data, next to the stamped memory."""
        workload.dirty_and_free(self, FREED_MIB)

    def fill_and_migrate(self, *options: Any) -> MigrationResult:
        """Migrate the guest with much old data in its free memory; it arrives unharmed."""
        self.fill()
        result = self.migrate(*options)
        self.check()
        return result

    def check(self) -> None:
        """Let the guest, which runs where it should be, check each page that it stamped."""
        assert self.state() == "running"
        assert assert_intact(self).pages >= STAMPED_MIB * MIB // 4096


@contextlib.contextmanager
def running_hosts(*options: Any) -> Iterator[Hosts]:
    """Two libvirt hosts that are ready to run guests, and that leave nothing.

    Skips the test where the machine cannot run them, but never in CI.
    """
    # They end with this process at the latest.
    done = two_hosts("up", "--owner", os.getpid(), *options)
    if done.returncode == UNSUPPORTED and not os.environ.get("CI"):
        pytest.skip(done.stderr.strip())
    assert done.returncode == 0, done.stderr
    hosts = Hosts(Path(done.stdout.strip()))
    try:
        # libvirt probes a QEMU before it first runs it: not something to do during a migration
        for host in OTHER_HOST:
            qemu = paths.qemu_binary(SPEC.qemu)
            hosts.virsh(host, "domcapabilities", "--virttype", "qemu", "--emulatorbin", qemu)
        yield hosts
    finally:
        down = two_hosts("down", "--state", hosts.state)
    assert down.returncode == 0, down.stderr


def xml_there(guest: Guest, changes: Mapping[str, str]) -> Path:
    """A file with a guest's XML for the destination, in which some texts are others."""
    text = guest.virsh("dumpxml", "--migratable")
    for old, new in changes.items():
        assert old in text
        text = text.replace(old, new)
    path = guest.xml.with_suffix(".there")
    path.write_text(text, "utf-8")
    return path


@contextlib.contextmanager
def stamped(guest: AnyGuest) -> Iterator[AnyGuest]:
    """A running guest that has data of its own, and can check it."""
    with guest:
        workload.stamp(guest, STAMPED_MIB)
        yield guest


@contextlib.contextmanager
def cold_cache(guest: Guest, directory: Path) -> Iterator[None]:
    """A running guest that has read the file of its only disk, and finds it whole in the end."""
    (directory / "files").mkdir()
    (directory / "files" / "cold").write_bytes(os.urandom(COLD_MIB * MIB))
    image = directory / "image"
    command = ["/sbin/mke2fs", "-q", "-t", "ext4", "-d", directory / "files", image, "192M"]
    subprocess.run(command, check=True)
    guest.add("devices", DISK.format(file=image, type="raw", name="vda", more="<readonly/>"))
    read = "sha256sum /mnt/cold"
    with stamped(guest):
        guest.agent.run("mkdir -p /mnt && mount -t ext4 -o ro /dev/vda /mnt")
        before = guest.agent.run(read)
        yield
        guest.check()
        assert guest.agent.run(read) == before


def assert_cache_freed(kept: MigrationResult, freed: MigrationResult) -> None:
    """Of two migrations in cold_cache(), the second had page cache freed, and did not send it."""
    assert kept.hints and freed.hints
    assert kept.hints.cache_freed_bytes == 0
    assert freed.hints.cache_freed_bytes > 0.9 * COLD_MIB * MIB
    assert kept.sent_bytes - freed.sent_bytes > 0.8 * COLD_MIB * MIB


def assert_used(result: MigrationResult) -> None:
    """The guest's free memory was hinted, and not sent."""
    hints = result.hints
    assert hints and hints.state == "ended" and hints.reason is None, hints
    assert hints.complete and hints.blocks > 10 * hints.messages > 0, hints
    assert hints.hinted_bytes > FREED_MIB * MIB, hints
    assert result.sent_bytes < FREED_MIB * MIB // 2, result


def assert_unused(result: MigrationResult, reason: str) -> None:
    """Nothing was hinted, for the reason given; the old data was sent."""
    assert result.hints and result.hints.reason == reason, result.hints
    assert result.hints.hinted_bytes == 0, result.hints
    assert result.sent_bytes > FREED_MIB * MIB, result


def capability(guest: Guest) -> bool:
    """Return whether the capability is on in the QEMU that runs the guest now."""
    states = {c["capability"]: c["state"] for c in guest.qmp("query-migrate-capabilities")}
    return bool(states["free-page-hint"])


def processes_naming(text: str) -> List[int]:
    """Return the processes that have a text in one of their arguments."""
    found = []
    for file in Path("/proc").glob("[0-9]*/cmdline"):
        # It may have ended.
        with contextlib.suppress(OSError):
            if text.encode() in file.read_bytes():
                found.append(int(file.parent.name))
    return sorted(found)
