# SPDX-License-Identifier: GPL-2.0-or-later
"""scripts/fph with a real libvirt, real guests and a real "virsh migrate --live"."""

import contextlib
import json
import subprocess
from pathlib import Path
from typing import Any, Dict, Iterator

import pytest

from livemig import paths
from livemig.domains import ANY_TIME, FPH, FREED_MIB, MIB, Guest, Hosts, running_hosts, stamped, uri

# MiB/s, so that a migration can be looked at
SLOW = 40


@pytest.fixture(name="guest")
def guest_fixture(hosts: Hosts, request: pytest.FixtureRequest) -> Iterator[Guest]:
    """A running guest that answers however late, with much free memory, full of old data."""
    # A console is kept, and one of another guest's would be taken for this one's.
    name = request.node.name.split("_")[1]
    with stamped(Guest(hosts, name, ANY_TIME)) as guest:
        guest.fill()
        yield guest


@contextlib.contextmanager
def watch(hosts: Hosts, host: str, *args: Any) -> Iterator["subprocess.Popen[str]"]:
    """Watch from a host, once that waits for a migration."""
    with hosts.started(host, FPH, "watch", "--wait", "120", *args) as watcher:
        assert watcher.stdout
        assert "waits for a migration" in watcher.stdout.readline()
        yield watcher


def test_what_is_estimated_is_seen_to_be_skipped(
    hosts: Hosts, guest: Guest, tmp_path: Path, measured: Dict[str, Any]
) -> None:
    """Status, estimate and watch agree on a guest that virsh migrates; its memory is unharmed.

    Of a paused guest, only absent pages are estimated.
    """
    found = hosts.fph("a", "status", guest.name)
    assert (found["offered"], found["driver"], found["hints"]) == ("arrays", "arrays", True)
    guest.virsh("suspend")
    stopped = hosts.fph("a", "estimate", guest.name)
    guest.virsh("resume")
    assert stopped["reason"] == "vm-stopped" and not stopped["free-bytes"]
    estimated = hosts.fph("a", "estimate --bandwidth 1Gbit", guest.name)
    assert estimated["free-bytes"] > 0.9 * FREED_MIB * MIB and "round-time" in estimated

    guest.virsh("migrate-setspeed", SLOW)
    base = tmp_path / "seen"
    with watch(hosts, "a", guest.name, "-o", base) as watcher:
        guest.migrate()
        out, err = watcher.communicate(timeout=120)
    guest.check()
    assert (watcher.returncode, err) == (0, "")
    assert f"{guest.name}: completed in " in out and " skipped" in out
    record = json.loads((tmp_path / "seen.json").read_text("utf-8"))
    left = [sample["remaining"] for sample in record["samples"]]
    assert len(left) > 5 and left[-1] == 0
    assert record["hints"]["complete"] and record["absent"]
    skipped = record["samples"][0]["skipped"]
    measured.update(estimated=estimated["free-bytes"] + estimated["absent-bytes"], skipped=skipped)
    assert abs(measured["estimated"] - skipped) < 0.03 * skipped
    assert (tmp_path / "seen.png").read_bytes().startswith(b"\x89PNG")
    assert hosts.fph("a", "status", guest.name)["state"] == "shut off"


def test_read_only_connection_sees_and_changes_nothing(
    hosts: Hosts, guest: Guest, tmp_path: Path
) -> None:
    """With --readonly, status has what libvirt knows, watch libvirt's figures; no more is done."""
    before = guest.virsh("dumpxml", "--inactive")
    for command in ("disable", guest.name, "--write"), ("estimate", guest.name):
        done = hosts.call("a", FPH, *command, "--readonly")
        assert (done.returncode, done.stdout, done.stderr.count("\n")) == (3, "", 1)
        assert done.stderr.startswith(f"fph: {guest.name}: the connection is read-only")
    assert guest.virsh("dumpxml", "--inactive") == before
    done = hosts.call("a", FPH, "status", guest.name, "--readonly")
    assert (done.returncode, done.stderr) == (0, "")
    lines = done.stdout.splitlines()
    assert lines[1].split() == [guest.name, "running", "arrays", *"-----"]
    assert "QEMU was not asked, the connection is read-only" in lines[2]

    guest.virsh("migrate-setspeed", SLOW)
    with watch(hosts, "a", guest.name, "--readonly", "-o", tmp_path / "seen") as watcher:
        guest.migrate()
        _, err = watcher.communicate(timeout=120)
    guest.check()
    assert (watcher.returncode, err) == (0, "")
    record = json.loads((tmp_path / "seen.json").read_text("utf-8"))
    assert record["skipped"] is None and len(record["samples"]) > 5


def test_enabled_for_the_next_start(hosts: Hosts) -> None:
    """Without --write the definition stays as it is; with it, the next start has arrays."""
    guest = Guest(hosts, "switched")
    guest.replace_element("qemu:override")
    guest.replace("<alias name='ua-balloon0'/>")
    with guest:
        assert hosts.fph("a", "status", guest.name)["offered"] == "no"
        assert hosts.fph("a", "estimate", guest.name)["reason"] == "no-device"
        before = guest.virsh("dumpxml", "--inactive")
        shown = hosts.fph("a", "enable --arrays", guest.name)
        assert not shown["written"] and "free-page-hint-arrays" in shown["diff"]
        assert guest.virsh("dumpxml", "--inactive") == before
        written = hosts.fph("a", "enable --arrays --write", guest.name)
        assert written == {**shown, "written": True}
        after = guest.virsh("dumpxml", "--inactive")
        assert not [line for line in before.splitlines()[1:] if line not in after.splitlines()]
        assert hosts.fph("a", "enable --arrays --write", guest.name)["diff"] == ""
        found = hosts.fph("a", "status", guest.name)
        assert (found["offered"], found["defined"]) == ("no", "arrays")

        guest.virsh("destroy")
        # What is offered is known before anything runs.
        guest.virsh("start", "--paused")
        assert hosts.fph("a", "status", guest.name)["offered"] == "arrays"
        hosts.fph("a", "disable --write", guest.name)
        assert "name='free-page-hint" not in guest.virsh("dumpxml", "--inactive")


def test_stock_qemu_is_named(hosts: Hosts) -> None:
    """Of a stock QEMU, status says that it is one; it is not given what it would not start with."""
    guest = Guest(hosts, "stock")
    guest.replace(str(paths.qemu_binary("ours")), str(paths.qemu_binary("stock")))
    # Stock QEMU does not know the trace event, nor the properties.
    guest.replace_element("qemu:commandline")
    guest.replace_element("qemu:override")
    with guest:
        found = hosts.fph("a", "status", guest.name)
        assert (found["offered"], found["hints"]) == ("no", None)
        assert "stock" in found["notes"][0]
        before = guest.virsh("dumpxml", "--inactive")
        for command in (["estimate"], ["enable", "--write"]):
            done = hosts.call("a", FPH, *command, guest.name)
            assert (done.returncode, done.stdout, done.stderr.count("\n")) == (1, "", 1)
            assert "stock" in done.stderr
        assert guest.virsh("dumpxml", "--inactive") == before
        ours = paths.qemu_binary("ours")
        hosts.fph("a", f"enable --write --emulator {ours}", guest.name)
        guest.virsh("destroy")
        # What is offered is known before anything runs.
        guest.virsh("start", "--paused")
        assert hosts.fph("a", "status", guest.name)["offered"] == "blocks"


def test_connection_that_is_lost_half_way(tmp_path: Path) -> None:
    """libvirt is killed while a migration is watched: one line, and what was seen is kept."""
    there = uri("a")
    with running_hosts() as own, Guest(own, "cut", ANY_TIME) as guest:
        guest.virsh("migrate-setspeed", 1)
        # From the other host, since nothing on this one survives its libvirt.
        with watch(own, "b", "-c", there, guest.name, "-o", tmp_path / "seen") as watcher:
            with own.started("a", *guest.migration_command()):
                assert watcher.stdout
                for _ in range(2):
                    assert "round" in watcher.stdout.readline()
                pid = own.call("a", "cat", "/run/libvirtd.pid").stdout
                own.call("a", "kill", "-KILL", pid)
            _, err = watcher.communicate(timeout=120)
    assert watcher.returncode == 3
    assert err.startswith(f"fph: cut: the connection to {there} was lost: ")
    assert err.count("\n") == 1
    record = json.loads((tmp_path / "seen.json").read_text("utf-8"))
    assert record["status"] == "lost" and record["samples"]
