# SPDX-License-Identifier: GPL-2.0-or-later
"""Hints under libvirt: "virsh migrate --live" between two libvirt hosts in namespaces.

libvirt knows nothing of the hints.  These tests hold what docs/libvirt.md promises: the domain
XML that switches them on, that they are used then, how to switch them off, what must match.
"""

import contextlib
import json
import os
import re
import shutil
import signal
import socket
import string
import subprocess
import time
from pathlib import Path
from types import TracebackType
from typing import Any, Dict, Iterator, List, Optional, Sequence, Tuple, Type
from xml.etree import ElementTree

import pytest

from livemig import memory, paths, workload
from livemig.guest import BOOT_RACE, KERNEL_TROUBLE
from livemig.migration import MigrationResult
from livemig.serial import Agent, Port
from livemig.spec import GuestSpec

TOOL = paths.REPO / "scripts" / "two-hosts"
DOMAIN_XML = Path(__file__).with_name("libvirt") / "domain.xml"
DOCUMENTATION = paths.REPO / "docs" / "libvirt.md"
QEMU_NAMESPACE = "http://libvirt.org/schemas/domain/qemu/1.0"
OTHER_HOST = {"a": "b", "b": "a"}
MEMORY_DIRECTORY = "/var/lib/libvirt/qemu/ram"
LIBVIRTD_LOG = "/var/log/libvirt/libvirtd.log"
# Exit status of two-hosts where the machine cannot run the hosts
UNSUPPORTED = 77
MIB = 1 << 20
STAMPED_MIB = 64
FREED_MIB = 512
SPEC = GuestSpec(mem_mib=1024, vcpus=2)


def two_hosts(*args: Any) -> "subprocess.CompletedProcess[str]":
    """Run the tool; return what it did."""
    command = [str(arg) for arg in (TOOL, *args)]
    return subprocess.run(command, capture_output=True, text=True, timeout=180, check=False)


class Hosts:
    """Two libvirt hosts, a and b."""

    def __init__(self, state: Path):
        """Use the hosts whose state directory is given."""
        self.state = state

    def call(self, host: str, *command: Any) -> "subprocess.CompletedProcess[str]":
        """Run a command on a host; return what it did."""
        return two_hosts("on", "--state", self.state, host, *command)

    def virsh(self, host: str, *args: Any) -> str:
        """Run virsh on a host, which must succeed; return what it printed."""
        done = self.call(host, "virsh", "-q", *args)
        assert done.returncode == 0, f"virsh {' '.join(map(str, args))}: {done.stderr}"
        return done.stdout

    def path(self, host: str, path: str) -> Path:
        """Return where a file of a host's libvirt is on this machine."""
        return self.state / host / path.lstrip("/")


class AgentPort(Port):
    """A guest's serial port that QEMU offers as a socket in the file system."""

    def __init__(self, path: Path):
        """Connect to the socket."""
        super().__init__(f"agent at {path}")
        self._ours.close()
        self._ours = socket.socket(socket.AF_UNIX)
        self._ours.connect(str(path))
        self.connected()


class Guest:
    """A guest that libvirt runs on one of the hosts; on host a first."""

    def __init__(
        self,
        hosts: Hosts,
        name: str,
        qemu_args: Sequence[str] = (),
        source: Optional[str] = None,
    ):
        """Describe the guest; entering the context starts it."""
        self.hosts = hosts
        self.name = name
        self.spec = SPEC
        self.host = "a"
        self.xml = hosts.state / f"{name}.xml"
        self.xml.write_text(domain_xml(name, qemu_args, source), encoding="utf-8")
        self._port: Optional[AgentPort] = None
        # Memory of QEMUs that is kept open to be looked at.
        self._memories = contextlib.ExitStack()

    def __enter__(self) -> "Guest":
        """Start the guest and wait until it is up."""
        done = self.hosts.call("a", "virt-xml-validate", self.xml, "domain")
        assert done.returncode == 0, done.stderr
        self.hosts.virsh("a", "define", self.xml)
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

    def __exit__(
        self,
        exc_type: Optional[Type[BaseException]],
        exc: Optional[BaseException],
        traceback: Optional[TracebackType],
    ) -> None:
        """End the guest, whose kernel should not have complained about anything."""
        consoles = [self._log(host, "console") for host in OTHER_HOST]
        said = "".join(log.read_text(errors="replace") for log in consoles if log.exists())
        trouble = [match.group(0) for match in KERNEL_TROUBLE.finditer(said)]
        self._end(failed=bool(exc_type or trouble))
        assert exc_type or not trouble, f"the guest's kernel complained: {trouble}"

    def _end(self, failed: bool) -> None:
        """End the guest; after a failure print what it and its QEMUs said."""
        self._memories.close()
        if self._port:
            self._port.close()
        for host in OTHER_HOST:
            for log in self._log(host, "console"), self._log(host, "log"):
                if failed and log.exists():
                    print(f"--- the end of {log}:\n{log.read_text(errors='replace')[-3000:]}")
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

    def qemu_log(self, host: str) -> str:
        """Return what the guest's QEMUs wrote to their log on a host so far."""
        log = self._log(host, "log")
        return log.read_text(errors="replace") if log.exists() else ""

    def hmp(self, command: str) -> str:
        """Run a command of QEMU's human monitor, through libvirt."""
        return self.hosts.virsh(self.host, "qemu-monitor-command", "--hmp", self.name, command)

    def qmp(self, command: str) -> Any:
        """Run a QMP command, through libvirt."""
        text = json.dumps({"execute": command})
        answer = self.hosts.virsh(self.host, "qemu-monitor-command", self.name, text)
        return json.loads(answer)["return"]

    def state(self) -> str:
        """Return what libvirt says about the guest where it should be."""
        return self.hosts.virsh(self.host, "domstate", self.name).strip()

    def virsh_migrate(self, *options: Any) -> "subprocess.CompletedProcess[str]":
        """Let virsh migrate the guest to the other host; return what it did."""
        uri = f"qemu+tcp://host-{OTHER_HOST[self.host]}/system"
        return self.hosts.call(self.host, "virsh", "migrate", "--live", *options, self.name, uri)

    def ram(self) -> Dict[str, memory.Block]:
        """Return the guest's RAM in its QEMU, also for after that has ended.

        The domain XML must ask for memory that is an open file of QEMU.
        """
        pids = list(processes_naming(f"guest={self.name},"))
        assert len(pids) == 1
        (file,) = (
            self._memories.enter_context(open(fd, "rb"))
            for fd in Path(f"/proc/{pids[0]}/fd").iterdir()
            if os.readlink(fd).startswith("/memfd:memory-backend-memfd")
        )
        path = Path(f"/proc/self/fd/{file.fileno()}")
        return {"pc.ram": memory.Block(path, 0, SPEC.mem_mib * MIB // memory.PAGE_BYTES)}

    def migrate_and_compare(self) -> Tuple[MigrationResult, memory.Comparison]:
        """Migrate the guest and compare the memories before it runs on."""
        source, log = self.ram(), self._log(self.host, "log")
        start = log.stat().st_size
        result = self.migrate("--suspend")
        different = memory.different_pages(source, self.ram())
        seen = memory.judge(different, memory.kept_pages(log, source, start))
        assert not seen.lost, seen
        self.hosts.virsh(self.host, "resume", self.name)
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
            text = log.read().decode(errors="replace")
        answers = re.findall(r"QEMU_MONITOR_RECV_REPLY: .* reply=(.*\"total-time\".*)", text)
        assert answers, "libvirt did not ask for the statistics of the migration"
        result = MigrationResult.from_qmp(json.loads(answers[-1])["return"])
        assert result.status == "completed"
        self.host = OTHER_HOST[self.host]
        self.hang_up()
        assert self.state() == ("paused" if "--suspend" in options else "running")
        return result

    def hang_up(self) -> None:
        """The agent's port is another QEMU's from here on."""
        if self._port:
            self._port.close()
            self._port = None

    def fill(self) -> None:
        """Leave much free memory that is full of old data, next to the stamped memory."""
        workload.dirty_and_free(self, FREED_MIB)

    def check(self) -> None:
        """Let the guest check each page that it stamped."""
        verdict = workload.verify(self)
        assert verdict.good, verdict
        assert verdict.pages >= STAMPED_MIB * MIB // 4096


def domain_xml(name: str, qemu_args: Sequence[str], source: Optional[str]) -> str:
    """Return a guest's domain XML, with more arguments for QEMU, and a type of shared memory."""
    text = string.Template(DOMAIN_XML.read_text(encoding="utf-8")).substitute(
        name=name,
        memory=SPEC.mem_mib,
        vcpus=SPEC.vcpus,
        kernel=paths.kernel_image(SPEC.kernel),
        initramfs=paths.initramfs(),
        qemu=paths.qemu_binary(SPEC.qemu),
    )
    domain = ElementTree.fromstring(text)
    arguments = domain.find(f"{{{QEMU_NAMESPACE}}}commandline")
    assert arguments is not None
    for value in qemu_args:
        ElementTree.SubElement(arguments, f"{{{QEMU_NAMESPACE}}}arg", value=value)
    if source:
        backing = ElementTree.SubElement(domain, "memoryBacking")
        ElementTree.SubElement(backing, "source", type=source)
        ElementTree.SubElement(backing, "access", mode="shared")
    return ElementTree.tostring(domain, encoding="unicode")


def start_hosts(*options: Any) -> Path:
    """Start two hosts, which end with this process at the latest; return their state directory.

    Skips the test where the machine cannot run them, but never in CI.
    """
    done = two_hosts("up", "--owner", os.getpid(), *options)
    if done.returncode == UNSUPPORTED and not os.environ.get("CI"):
        pytest.skip(done.stderr.strip())
    assert done.returncode == 0, done.stderr
    return Path(done.stdout.strip())


@pytest.fixture(name="hosts", scope="module")
def hosts_fixture() -> Iterator[Hosts]:
    """Two libvirt hosts for the tests of this file."""
    hosts = Hosts(start_hosts())
    try:
        # libvirt probes a QEMU before it first runs it: not something to do during a migration
        for host in OTHER_HOST:
            qemu = paths.qemu_binary(SPEC.qemu)
            hosts.virsh(host, "domcapabilities", "--virttype", "qemu", "--emulatorbin", qemu)
        yield hosts
    finally:
        down = two_hosts("down", "--state", hosts.state)
    assert down.returncode == 0, down.stderr


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


def test_migrate_there_and_back(hosts: Hosts, measured: Dict[str, Any]) -> None:
    """Hints from the domain XML are used; switched off on the source, that one migration has none.

    The guest is found unharmed on the other host each time.
    """
    # The test is not about how soon the guest answers: the longest wait that there is.
    more_args = ["-global", "migration.free-page-hint-wait=60000"]
    for events in (memory.KEPT_EVENTS, memory.ABSENT_EVENT):
        more_args += ["-trace", events]
    with Guest(hosts, "there-and-back", more_args, source="memfd") as guest:
        workload.stamp(guest, STAMPED_MIB)
        guest.fill()
        hinted, seen = guest.migrate_and_compare()
        guest.check()
        assert_used(hinted)
        # The premise of the comparison: what was freed is full of old data.
        assert seen.different > FREED_MIB * MIB // 2 // memory.PAGE_BYTES
        # The other place where an operator can look after the migration
        assert re.search(r"\bfree_page_hint_end\b.*complete", guest.qemu_log("a"))

        guest.fill()
        guest.hmp("migrate_set_capability free-page-hint off")
        control, seen = guest.migrate_and_compare()
        guest.check()
        assert_unused(control, "disabled")
        assert (seen.kept, seen.different) == (0, 0)
        assert control.sent_bytes - hinted.sent_bytes > 0.9 * FREED_MIB * MIB
        for name, result in ("hints", hinted), ("no hints", control):
            measured[name] = {"total_ms": result.total_ms, "sent_bytes": result.sent_bytes}

        # A migration starts a new QEMU, and what was set on the old one's monitor is gone
        assert capability(guest)
        guest.fill()
        assert_used(guest.migrate())
        guest.check()


def test_off_for_good(hosts: Hosts) -> None:
    """-global migration.free-page-hint=off in the domain XML holds on both hosts."""
    with Guest(hosts, "off", ["-global", "migration.free-page-hint=off"]) as guest:
        workload.stamp(guest, STAMPED_MIB)
        assert not capability(guest)
        guest.fill()
        assert_unused(guest.migrate(), "disabled")
        guest.check()
        assert not capability(guest)


def test_refused_migration(hosts: Hosts, tmp_path: Path) -> None:
    """A destination whose balloon has other hint properties is refused; the guest stays unharmed.

    What was set on its QEMU's monitor stays as well, parameters like capabilities.
    """
    properties = [
        f"<qemu:property name='{name}' type='bool' value='true'/>"
        for name in ("free-page-hint", "free-page-hint-arrays")
    ]
    with Guest(hosts, "refused") as guest:
        workload.stamp(guest, STAMPED_MIB)
        guest.hmp("migrate_set_capability free-page-hint off")
        guest.hmp("migrate_set_parameter free-page-hint-wait 0")
        xml = hosts.virsh("a", "dumpxml", "--migratable", guest.name)
        for number, enabled in enumerate(properties):
            assert enabled in xml
            path = tmp_path / f"{number}.xml"
            path.write_text(xml.replace(enabled, enabled.replace("true", "false")), "utf-8")
            so_far = len(guest.qemu_log("b"))
            done = guest.virsh_migrate("--xml", path)
            assert done.returncode != 0 and done.stderr
            refusal = r"error while loading state for instance \w+ of device '[^']*virtio-balloon'"
            assert re.search(refusal, guest.qemu_log("b")[so_far:])
            assert guest.state() == "running"
            guest.check()
        assert not capability(guest)
        guest.hmp("migrate_set_capability free-page-hint on")
        guest.fill()
        assert_unused(guest.migrate(), "no-wait")
        guest.check()


def test_saved_and_restored(hosts: Hosts, measured: Dict[str, Any]) -> None:
    """A guest comes back whole from a live snapshot, with hints, and from save and managedsave.

    These two stop the guest first, so that it is not asked.
    """
    directory = "/var/lib/libvirt/qemu"
    with Guest(hosts, "saved") as guest:
        workload.stamp(guest, STAMPED_MIB)
        guest.fill()
        memory_file = f"file={directory}/live,snapshot=external"
        options = ("--memspec", memory_file, "--live", "--atomic")
        hosts.virsh("a", "snapshot-create-as", guest.name, "one", *options)
        snapshot = MigrationResult.from_qmp(guest.qmp("query-migrate"))
        assert_used(snapshot)
        measured["snapshot_bytes"] = snapshot.sent_bytes
        guest.check()
        hosts.virsh("a", "snapshot-delete", guest.name, "one", "--metadata")

        for save, restore in (
            (("save", guest.name, f"{directory}/saved"), ("restore", f"{directory}/saved")),
            (("managedsave", guest.name), ("start", guest.name)),
            (("destroy", guest.name), ("restore", f"{directory}/live")),
        ):
            hosts.virsh("a", *save)
            guest.hang_up()
            hosts.virsh("a", *restore)
            assert guest.state() == "running"
            guest.check()


def test_to_stock_and_back(hosts: Hosts, tmp_path: Path) -> None:
    """A guest without arrays moves to a host with stock QEMU and back, as docs/libvirt.md says."""
    binaries = [str(paths.qemu_binary(build)) for build in ("ours", "stock")]
    guest = Guest(hosts, "to-stock")
    iothread = ":property name='iothread' type='string' value='iothread1'/>"
    assert f"<qemu{iothread}" in DOCUMENTATION.read_text("utf-8")
    xml = guest.xml.read_text("utf-8")
    xml = re.sub(r':property name="free-page-hint-arrays"[^>]*>', iothread, xml)
    # Stock QEMU does not know the trace event.
    xml = re.sub(r"(?s)<(\w+:commandline)>.*</\1>", "", xml)
    guest.xml.write_text(xml.replace("<vcpu>", "<iothreads>1</iothreads><vcpu>"), "utf-8")
    with guest:
        assert "'iothread' is deprecated" in guest.qemu_log("a")
        workload.stamp(guest, STAMPED_MIB)
        for here, there in (binaries, binaries[::-1]):
            guest.fill()
            if here == binaries[0]:
                # Nothing that is hinted shall be sent before that, however slow the guest is.
                guest.hmp("migrate_set_parameter free-page-hint-wait 60000")
            path = tmp_path / "there.xml"
            xml = hosts.virsh(guest.host, "dumpxml", "--migratable", guest.name)
            path.write_text(xml.replace(here, there), "utf-8")
            result = guest.migrate("--xml", path)
            if here == binaries[0]:
                hints = result.hints
                assert hints and hints.complete and hints.messages == hints.blocks
                # Block hints do not drain the free lists of the CPUs: up to 16 % of what was just
                # freed was not found.
                assert hints.skipped_bytes > 0.75 * FREED_MIB * MIB
            guest.check()
            assert there in hosts.virsh(guest.host, "dumpxml", guest.name)


def test_documented_xml_is_the_tested_one() -> None:
    """docs/libvirt.md shows the XML of these tests."""
    documented, tested = (
        " ".join(p.read_text("utf-8").split()) for p in (DOCUMENTATION, DOMAIN_XML)
    )
    for element in "memballoon", "qemu:override":
        match = re.search(rf"<{element}\b[^`]*?</{element}>", documented)
        assert match and match[0] in tested, f"<{element}> of {DOCUMENTATION}"


def processes_naming(text: str) -> Dict[int, str]:
    """Return the command lines of the processes that have a text among their arguments."""
    found = {}
    for name in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            command = name.read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:
            continue
        if text in command:
            found[int(name.parent.name)] = command
    return found


def assert_gone(state: Path) -> None:
    """Nothing is left of a pair of hosts."""
    assert not state.exists()
    # The parent of a host's first process ends a moment after it.
    deadline = time.monotonic() + 20
    while left := processes_naming(str(state)):
        assert time.monotonic() < deadline, left
        time.sleep(0.05)
    assert str(state) not in Path("/proc/mounts").read_text(encoding="utf-8")


def test_two_hosts_leave_nothing(
    hosts: Hosts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A second pair of hosts does not disturb the first; "down" cleans up, even after a crash."""
    other = Hosts(start_hosts("--state", tmp_path / "two-hosts-up"))
    try:
        # What a crash left of others does not keep one from finding these.
        (tmp_path / "two-hosts-left").mkdir()
        shutil.copy(other.state / "two-hosts.json", tmp_path / "two-hosts-left")
        with monkeypatch.context() as patch:
            patch.setenv("TMPDIR", str(tmp_path))
            patch.delenv("TWO_HOSTS_STATE", raising=False)
            done = two_hosts("on", "a", "hostname")
            assert (done.returncode, done.stdout.strip()) == (0, "host-a"), done.stderr
        for pair in hosts, other:
            name = pair.virsh("a", "-c", "qemu+tcp://host-b/system", "hostname")
            assert name.strip() == "host-b"
        assert len(processes_naming(str(other.state))) >= 2
        status = two_hosts("status", "--state", other.state).stdout
        match = re.search(r"a: up, first process (\d+)", status)
        assert match, status
        os.kill(int(match[1]), 9)
        deadline = time.monotonic() + 20
        while "a: down" not in two_hosts("status", "--state", other.state).stdout:
            assert time.monotonic() < deadline
        done = other.call("a", "true")
        assert done.returncode == 1 and "host a is not up" in done.stderr
    finally:
        down = two_hosts("down", "--state", other.state)
    assert down.returncode == 0, down.stderr
    assert_gone(other.state)
    assert hosts.virsh("b", "hostname").strip() == "host-b"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_interrupted_up_leaves_nothing(hosts: Hosts, tmp_path: Path, number: int) -> None:
    """A "two-hosts up" that is told to end before the hosts are up leaves nothing of them."""
    assert hosts.state.exists()
    state = tmp_path / "hosts"
    # What runs the tests may ignore signals, as nohup does.
    words = ["env", "--default-signal", TOOL, "up", "--state", state]
    with subprocess.Popen(
        words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as command:
        # From here on the hosts would live without it.
        while not all((state / host / "var/log/libvirt/libvirtd.out").exists() for host in "ab"):
            assert command.poll() is None
            time.sleep(0.01)
        command.send_signal(number)
        out, err = command.communicate(timeout=60)
    assert command.returncode == 130
    assert not out and err.strip() == "two-hosts: interrupted"
    assert_gone(state)


# Somebody else, who can read this repository though it may be in root's home directory.
NOT_ROOT = [
    *("setpriv", "--reuid=65534", "--clear-groups", "--securebits=+no_setuid_fixup"),
    *("--inh-caps=+dac_read_search", "--ambient-caps=+dac_read_search"),
]


@pytest.mark.parametrize(
    "wrapper, path, message",
    [
        (NOT_ROOT, None, "must be run as root"),
        ([], "/nowhere", "libvirtd and virsh not installed: run scripts/install-deps libvirt"),
        (["setpriv", "--bounding-set=-sys_admin"], None, "no namespaces allowed here"),
    ],
    ids=["no-root", "no-libvirt", "no-namespaces"],
)
def test_two_hosts_says_what_is_missing(
    hosts: Hosts, wrapper: List[str], path: Optional[str], message: str
) -> None:
    """One line tells what keeps the hosts from running here."""
    assert hosts.state.exists()  # where the hosts run, nothing else is missing
    command = [*wrapper, "/usr/bin/python3", str(TOOL), "up"]
    env = {**os.environ, **({"PATH": path} if path else {})}
    done = subprocess.run(command, capture_output=True, text=True, env=env, check=False)
    assert done.returncode == UNSUPPORTED
    assert message in done.stderr and done.stderr.count("\n") == 1
    assert not done.stdout


def test_memory_in_a_used_file(hosts: Hosts) -> None:
    """<source type='file'/>: what another guest left in the file does not reach the guest."""
    name = "used-file"
    left = b"another guest's " * (memory.PAGE_BYTES // 16)
    with Guest(hosts, name, source="file") as guest:
        workload.stamp(guest, STAMPED_MIB)
        guest.fill()
        directory = hosts.path("b", MEMORY_DIRECTORY)
        # Nobody knows which id the domain will have there.
        files = [directory / f"{number}-{name}" / "pc.ram" for number in range(1, 100)]
        for file in files:
            file.parent.mkdir(parents=True)
            if file != files[0]:
                os.link(files[0], file)
                continue
            with open(file, "wb") as out:
                for _ in range(SPEC.mem_mib):
                    out.write(left * (MIB // memory.PAGE_BYTES))
        with open(files[0], "rb") as used:
            assert_used(guest.migrate())
            guest.check()
            # The premise: it is the guest's memory now.
            pids = list(processes_naming(f"guest={name},"))
            maps = Path(f"/proc/{pids[0]}/maps").read_text(encoding="utf-8")
            assert f" {os.fstat(used.fileno()).st_ino} " in maps
            assert all(page != left for page in iter(lambda: used.read(len(left)), b""))
