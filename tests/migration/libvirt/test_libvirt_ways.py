# SPDX-License-Identifier: GPL-2.0-or-later
"""The ways to migrate that "virsh migrate" knows, each with hints, and what can happen meanwhile.

One guest goes from host to host. While something is to be looked at, RAM is sent slowly.
"""

import contextlib
import os
import re
import signal
import subprocess
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, Optional, Sequence, Set

import pytest

from livemig import workload
from livemig.checks import in_check, wait_for
from livemig.domains import ANY_TIME, FREED_MIB, MIB, OTHER_HOST, STAMPED_MIB, Guest
from livemig.domains import Hosts, assert_used, stamped, uri
from livemig.errors import GuestError
from livemig.migration import MigrationResult

# MiB/s. At the first rate the guest takes more than a minute, which no test waits for.
SLOW, MEDIUM, FAST = 1, 40, 10000
# Nothing that is waited for takes as long, unless the machine is very busy.
SECONDS = 120
# What is done with a guest
Deed = Callable[["Traveller"], None]


class Traveller(Guest):
    """A guest that can be looked at while virsh migrates it."""

    meanwhile: Optional[Deed] = None
    # Its QEMU, before there was a second one.
    before: Set[int] = set()
    # What query-migrate said when RAM was being sent.
    seen: Dict[str, Any] = {}

    def virsh_migrate(self, *options: Any) -> "subprocess.CompletedProcess[str]":
        """Let virsh migrate the guest; once RAM is being sent, do what is to be done then."""
        meanwhile, self.meanwhile = self.meanwhile, None
        if not meanwhile:
            return super().virsh_migrate(*options)
        self.before = set(self.pids())
        with self.hosts.started(self.host, *self.migration_command(*options)) as virsh:
            try:
                wait_for(lambda: self.sent_bytes() or virsh.poll() is not None, "nothing is sent")
                assert virsh.poll() is None, f"it was over too soon: {virsh.communicate()}"
                meanwhile(self)
                out, err = virsh.communicate(timeout=SECONDS)
            except BaseException:
                self.hosts.call(self.host, "virsh", "domjobabort", self.name)
                raise
        return subprocess.CompletedProcess(virsh.args, virsh.returncode, out, err)

    def migrate_and(self, meanwhile: Deed, *options: Any, rate: int = SLOW) -> MigrationResult:
        """Migrate the guest at a rate, in MiB/s, and do something when RAM is being sent."""
        self.meanwhile = meanwhile
        return self.migrate("--bandwidth", rate, *options)

    def fail_and(self, meanwhile: Deed, *options: Any) -> str:
        """The same, of a migration that is to fail; returns what virsh complained about."""
        self.meanwhile = meanwhile
        return self.fail_to_migrate("--bandwidth", SLOW, *options)

    def sent_bytes(self) -> int:
        """How much of RAM a migration has sent; nothing before the guest's free pages are known."""
        try:
            info = self.qmp("query-migrate")
        except AssertionError:
            # It cannot be asked now.
            return 0
        if info.get("free-page-hint", {}).get("state") != "ended" or info["status"] != "active":
            return 0
        self.seen = info
        return int(info["ram"]["transferred"])

    def hurry(self) -> None:
        """Let a migration end."""
        self.virsh("migrate-setspeed", FAST)


class Travellers:
    """Lends a guest that runs; a new one where a test has left none."""

    def __init__(self, hosts: Hosts, directory: Path):
        self.hosts = hosts
        self.disk = directory / "disk"
        self.disk.write_bytes(bytes(MIB))
        self.number = 0
        self.guest: Optional[Traveller] = None
        # Ends the guest.
        self.stack = contextlib.ExitStack()

    def get(self) -> Traveller:
        """A guest that is unharmed, and has much free memory full of old data."""
        with contextlib.suppress(AssertionError, GuestError), self.stack:
            assert self.guest
            self.guest.check()
            self.guest.fill()
            self.stack = self.stack.pop_all()
            return self.guest
        self.number += 1
        # The first write to the disk fails, once in the life of each QEMU. Nothing else writes.
        image = f"file.image.driver=file,file.image.filename={self.disk}"
        fault = "file.inject-error.0.event=pwritev,file.inject-error.0.once=on"
        args = [
            *("-drive", f"driver=raw,if=none,id=disk,file.driver=blkdebug,{image},{fault}"),
            *("-device", "virtio-blk-pci,drive=disk,bus=pcie.0,addr=0x1d,werror=stop"),
        ]
        guest = Traveller(self.hosts, f"traveller{self.number}", [*ANY_TIME, *args])
        self.guest = self.stack.enter_context(stamped(guest))
        self.guest.fill()
        return self.guest


@pytest.fixture(name="travellers", scope="module")
def travellers_fixture(
    hosts: Hosts, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Travellers]:
    """The guest of this file's tests."""
    travellers = Travellers(hosts, tmp_path_factory.mktemp("ways"))
    yield travellers
    travellers.stack.close()


@pytest.fixture
def guest(travellers: Travellers) -> Traveller:
    """A running guest, on one of the hosts."""
    return travellers.get()


# ---- Ways to migrate: what is looked at while RAM is sent, and after --------------------------


@dataclass(frozen=True)
class Way:
    """One way to migrate, and the proof that it was this one."""

    options: Sequence[str]
    meanwhile: Deed
    proof: Callable[[Traveller, MigrationResult], None] = lambda guest, result: None
    rate: int = SLOW


def switched(guest: Traveller, result: MigrationResult) -> None:
    """It ran there before it had all."""
    assert '"status": "postcopy-active"' in guest.libvirt_said
    assert result.raw["ram"]["postcopy-bytes"] > 0


def in_parallel(guest: Traveller) -> None:
    """Two channels of their own carry RAM, beside the stream."""
    # QEMU's connections to the other host
    command = "ss -tinH state established dport >= 49152".split()

    def two_busy() -> bool:
        states = guest.hosts.call(guest.host, *command)
        sent = sorted(map(int, re.findall(r"\bbytes_sent:(\d+)", states.stdout)))
        assert len(sent) == 3, states
        return sent[1] > MIB // 4

    wait_for(two_busy, "no two channels are busy")
    guest.hurry()


def by_channels(_: Traveller, result: MigrationResult) -> None:
    """Nearly all of RAM came through the channels."""
    ram = result.raw["ram"]
    assert ram["multifd-bytes"] > 0.9 * ram["transferred"]


def limited(guest: Traveller) -> None:
    """QEMU has the limit."""
    assert guest.qmp("query-migrate-parameters")["max-bandwidth"] == SLOW * MIB
    guest.hurry()


def throttled(guest: Traveller) -> None:
    """The guest's vCPUs are slowed down, as it writes faster than RAM is sent."""
    now = "query-migrate"
    wait_for(lambda: guest.qmp(now).get("cpu-throttle-percentage", 0) >= 30, "it is not slowed")
    guest.hurry()


def moved_for_good(guest: Traveller, _: MigrationResult) -> None:
    """The domain is defined here, with its hints, and over there it is not known any more."""
    for host in OTHER_HOST:
        names = guest.hosts.virsh(host, "list", "--all", "--persistent", "--name").split()
        assert (guest.name in names) == (host == guest.host)
    xml = guest.virsh("dumpxml", "--inactive")
    assert xml.count("name='free-page-hint") == 2


WAYS = {
    "postcopy": Way(["--postcopy"], lambda guest: guest.virsh("migrate-postcopy"), switched),
    "parallel": Way(["--parallel", "--parallel-connections", "2"], in_parallel, by_channels),
    "persistent": Way(["--persistent", "--undefinesource"], Traveller.hurry, moved_for_good),
    "auto-converge": Way(
        ["--auto-converge", "--auto-converge-initial", "30"], throttled, rate=MEDIUM
    ),
    "bandwidth": Way([], limited),
    "abort-on-error": Way(["--abort-on-error"], Traveller.hurry),
}


SLOWEST = "auto-converge"


@pytest.mark.parametrize("name", in_check(WAYS, long=[SLOWEST]))
def test_way(guest: Traveller, measured: Dict[str, Any], name: str) -> None:
    """Hints are used in each way to migrate, and the guest arrives whole."""
    way = WAYS[name]
    busy = name == SLOWEST
    if busy:
        workload.stamp(guest, STAMPED_MIB, churn=True, name="busy")
        # What that took had been free.
        guest.fill()
    result = guest.migrate_and(way.meanwhile, *way.options, rate=way.rate)
    guest.check()
    way.proof(guest, result)
    hints = result.hints
    assert hints and hints.complete and hints.skipped_bytes > 0.9 * FREED_MIB * MIB
    measured.update(sent_bytes=result.sent_bytes, skipped_bytes=hints.skipped_bytes)
    if not busy:
        assert_used(result)
        return
    # What it goes on writing is sent over and over.
    assert workload.verify(guest, name="busy").good
    guest.agent.run("memstamp stop --name busy")


# ---- What can happen meanwhile -------------------------------------------------------------------


def abort(guest: Traveller) -> None:
    """The operator thinks better of it."""
    guest.virsh("domjobabort")


def kill_destination(guest: Traveller) -> None:
    """The QEMU at the destination dies."""
    (pid,) = set(guest.pids()) - guest.before
    os.kill(pid, signal.SIGKILL)


def fail_a_write(guest: Traveller) -> None:
    """The guest cannot write to its disk, and is stopped for that."""
    guest.agent.send("dd if=/dev/zero of=/dev/vda bs=4096 count=1 oflag=direct")


FAILURES = {
    # QEMU shuts the way back down before it says that it cancels: a write that fails in between has
    # the migration fail. Both are the operator's doing, of which virsh has said that it was done.
    "domjobabort": ([], abort, "canceled by client|job 'migration out' failed"),
    "destination-dies": ([], kill_destination, "(?s)."),
    "abort-on-error": (["--abort-on-error"], fail_a_write, "failed due to I/O error"),
}


@pytest.mark.parametrize("name", FAILURES)
def test_source_runs_on(guest: Traveller, measured: Dict[str, Any], name: str) -> None:
    """A migration fails while RAM is sent: the guest runs on at the source, and the next works."""
    options, meanwhile, message = FAILURES[name]
    there = OTHER_HOST[guest.host]
    measured["message"] = guest.fail_and(meanwhile, *options)
    assert re.search(message, measured["message"]), measured
    if name == "abort-on-error":
        assert guest.state() == "paused"
        guest.virsh("resume")
    listed = ("list", "--name")
    wait_for(lambda: guest.name not in guest.hosts.virsh(there, *listed), "it is on both hosts")
    guest.check()
    # Pages had been taken out by then, all of which the next migration has to ask for anew.
    assert guest.seen["free-page-hint"]["skipped-bytes"] > 0.9 * FREED_MIB * MIB

    assert_used(guest.fill_and_migrate("--bandwidth", FAST))


def link(guest: Traveller, state: str) -> None:
    """Pull the cable out of a host, or put it in again."""
    done = guest.hosts.call(guest.host, "ip", "link", "set", "eth0", state)
    assert done.returncode == 0, done.stderr


def stands_still(guest: Traveller) -> bool:
    """Nothing gets out any more: what QEMU wrote waits in the kernel."""
    before = guest.sent_bytes()
    time.sleep(2)
    return before == guest.sent_bytes()


def test_link_comes_back(guest: Traveller) -> None:
    """The link is lost for some seconds while RAM is sent: the migration waits, and goes on."""

    def lose(guest: Traveller) -> None:
        link(guest, "down")
        try:
            wait_for(lambda: stands_still(guest), "the link is not lost")
        finally:
            link(guest, "up")
        guest.hurry()

    result = guest.migrate_and(lose)
    guest.check()
    assert_used(result)


@pytest.mark.long
def test_link_stays_away(guest: Traveller, measured: Dict[str, Any]) -> None:
    """With --p2p the source's libvirt gives the migration up; the guest runs on at the source."""
    here = guest.host
    try:
        measured["message"] = guest.fail_and(lambda guest: link(guest, "down"), "--p2p")
    finally:
        link(guest, "up")
    assert re.search("keepalive|connection|socket is closed", measured["message"]), measured
    assert guest.host == here
    guest.check()

    connect = ("virsh", "-c", uri(OTHER_HOST[here]), "list")
    wait_for(lambda: not guest.hosts.call(here, *connect).returncode, "the link stays away")
    assert_used(guest.fill_and_migrate("--bandwidth", FAST))


@pytest.mark.long
def test_three_leave_at_once(hosts: Hosts, measured: Dict[str, Any]) -> None:
    """Three guests leave a host at the same time, each with hints of its own."""
    guests = [Traveller(hosts, f"leaver{number}", ANY_TIME) for number in range(3)]
    # All three are at it before one may end.
    together = threading.Barrier(len(guests))

    def leave(guest: Traveller) -> MigrationResult:
        def look(guest: Traveller) -> None:
            together.wait(SECONDS)
            guest.hurry()

        guest.meanwhile = look
        done = guest.virsh_migrate("--bandwidth", SLOW)
        assert done.returncode == 0, done.stderr
        guest.arrived()
        # Whose final statistics are whose cannot be seen in libvirt's log.
        job = guest.virsh("domjobinfo", "--completed", "--rawstats")
        sent = re.search(r"memory_processed: +(\d+)", job)
        assert sent, job
        return replace(MigrationResult.from_qmp(guest.seen), sent_bytes=int(sent[1]))

    def start(guest: Traveller) -> None:
        stack.enter_context(stamped(guest))
        guest.fill()

    with contextlib.ExitStack() as stack, ThreadPoolExecutor(len(guests)) as pool:
        list(pool.map(start, guests))
        for guest, result in zip(guests, pool.map(leave, guests)):
            guest.check()
            assert_used(result)
            measured[guest.name] = result.sent_bytes
