# SPDX-License-Identifier: GPL-2.0-or-later
"""Hints under libvirt: "virsh migrate --live" between two libvirt hosts in namespaces.

libvirt knows nothing of the hints.  These tests hold what docs/libvirt.md promises: the domain
XML that switches them on, that they are used then, how to switch them off, what must match.
"""

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import time
from pathlib import Path
from typing import Any, Dict, List, Optional

import pytest

from livemig import memory, paths
from livemig.checks import wait_for
from livemig.domains import ANY_TIME, DOCUMENTED, DOMAIN_XML, FREED_MIB, MIB
from livemig.domains import OTHER_HOST, PROPERTY, SHARED, SPEC, TOOL, UNSUPPORTED, Guest, Hosts
from livemig.domains import assert_cache_freed, assert_unused, assert_used, capability, cold_cache
from livemig.domains import processes_naming, running_hosts, stamped, two_hosts, xml_there
from livemig.host import process_mib
from livemig.leftovers import LEFTOVER, leave_data
from livemig.migration import Hints


def test_migrate_there_and_back(hosts: Hosts, measured: Dict[str, Any]) -> None:
    """Hints from the domain XML are used; switched off on the source, that one migration has none.

    The guest is found unharmed on the other host each time.
    """
    more_args = (*ANY_TIME, "-trace", memory.KEPT_EVENTS, "-trace", memory.ABSENT_EVENT)
    guest = Guest(hosts, "there-and-back", more_args)
    guest.add("domain", SHARED.format("memfd"))
    with stamped(guest):
        hinted, seen = guest.fill_and_compare()
        assert_used(hinted)
        # The premise of the comparison: what was freed is full of old data.
        assert seen.different > FREED_MIB * MIB // 2 // memory.PAGE_BYTES
        # The other place where an operator can look after the migration
        assert re.search(r"\bfree_page_hint_end\b.*complete", guest.qemu_log("a"))

        guest.hmp("migrate_set_capability free-page-hint off")
        control, seen = guest.fill_and_compare()
        assert_unused(control, "disabled")
        assert (seen.kept, seen.different) == (0, 0)
        assert control.sent_bytes - hinted.sent_bytes > 0.9 * FREED_MIB * MIB
        for name, result in ("hints", hinted), ("no hints", control):
            measured[name] = {"total_ms": result.total_ms, "sent_bytes": result.sent_bytes}

        # A migration starts a new QEMU, and what was set on the old one's monitor is gone
        assert capability(guest)
        assert_used(guest.fill_and_migrate())


def test_off_for_good(hosts: Hosts) -> None:
    """-global migration.free-page-hint=off in the domain XML holds on both hosts.

    And -global migration.skip-absent-pages=off does.
    """
    off = ["-global", "migration.free-page-hint=off", "-global", "migration.skip-absent-pages=off"]
    with stamped(Guest(hosts, "off", off)) as guest:
        for _ in OTHER_HOST:
            assert not capability(guest)
            result = guest.fill_and_migrate()
            assert_unused(result, "disabled")
            assert result.absent and result.absent.reason == "disabled"


def test_refused_migration(hosts: Hosts) -> None:
    """A destination whose balloon has other hint properties is refused; the guest stays unharmed.

    What was set on its QEMU's monitor stays as well, parameters like capabilities.
    """
    properties = [PROPERTY.format(name) for name in ("free-page-hint", "free-page-hint-arrays")]
    with stamped(Guest(hosts, "refused")) as guest:
        guest.hmp("migrate_set_capability free-page-hint off")
        guest.hmp("migrate_set_parameter free-page-hint-wait 0")
        for enabled in properties:
            other = xml_there(guest, {enabled: enabled.replace("true", "false")})
            so_far = len(guest.qemu_log("b"))
            guest.fail_to_migrate("--xml", other)
            refusal = r"error while loading state for instance \w+ of device '[^']*virtio-balloon'"
            assert re.search(refusal, guest.qemu_log("b")[so_far:])
            guest.check()
        assert not capability(guest)
        guest.hmp("migrate_set_capability free-page-hint on")
        assert_unused(guest.fill_and_migrate(), "no-wait")


def test_to_stock_and_back(hosts: Hosts) -> None:
    """A guest without arrays moves to a host with stock QEMU and back, as docs/libvirt.md says."""
    ours, stock = (str(paths.qemu_binary(build)) for build in ("ours", "stock"))
    guest = Guest(hosts, "to-stock")
    iothread = "<qemu:property name='iothread' type='string' value='iothread1'/>"
    assert iothread in DOCUMENTED
    guest.replace(PROPERTY.format("free-page-hint-arrays"), iothread)
    guest.add("domain", "<iothreads>1</iothreads>")
    # Stock QEMU does not know the trace event.
    guest.replace_element("qemu:commandline")

    def move(here: str, there: str) -> Optional[Hints]:
        result = guest.fill_and_migrate("--xml", xml_there(guest, {here: there}))
        assert there in guest.virsh("dumpxml")
        return result.hints

    with stamped(guest):
        assert "'iothread' is deprecated" in guest.qemu_log("a")
        # Nothing that is hinted shall be sent before that, however slow the guest is.
        guest.hmp("migrate_set_parameter free-page-hint-wait 60000")
        hints = move(ours, stock)
        assert hints and hints.complete and hints.messages == hints.blocks
        # Block hints do not drain the free lists of the CPUs: up to 16 % of what was just freed was
        # not found.
        assert hints.skipped_bytes > 0.75 * FREED_MIB * MIB
        move(stock, ours)


def test_documented_xml_is_the_tested_one() -> None:
    """docs/libvirt.md shows the XML of these tests."""
    texts = (DOCUMENTED, DOMAIN_XML.read_text("utf-8"))
    documented, tested = (" ".join(text.split()) for text in texts)
    for element in "memballoon", "qemu:override":
        match = re.search(rf"<{element}\b[^`]*?</{element}>", documented)
        assert match and match[0] in tested, f"<{element}> of docs/libvirt.md"


def assert_gone(state: Path) -> None:
    """Nothing is left of a pair of hosts."""
    assert not state.exists()
    # The parent of a host's first process ends a moment after it.
    wait_for(lambda: not processes_naming(str(state)), f"something runs in {state}", 20)
    assert str(state) not in Path("/proc/mounts").read_text(encoding="utf-8")


def test_two_hosts_leave_nothing(hosts: Hosts, tmp_path: Path) -> None:
    """A second pair of hosts does not disturb the first; "down" cleans up, even after a crash."""
    with running_hosts("--state", tmp_path / "two-hosts-up") as other:
        # What a crash left of others does not keep one from finding these.
        (tmp_path / "two-hosts-left").mkdir()
        shutil.copy(other.state / "two-hosts.json", tmp_path / "two-hosts-left")
        done = two_hosts("on", "a", "hostname", TMPDIR=str(tmp_path), TWO_HOSTS_STATE="")
        assert (done.returncode, done.stdout.strip()) == (0, "host-a"), done.stderr
        for pair in hosts, other:
            name = pair.virsh("a", "-c", "qemu+tcp://host-b/system", "hostname")
            assert name.strip() == "host-b"
        assert len(processes_naming(str(other.state))) >= 2
        status = ("status", "--state", other.state)
        said = two_hosts(*status).stdout
        match = re.search(r"a: up, first process (\d+)", said)
        assert match, said
        os.kill(int(match[1]), 9)
        wait_for(lambda: "a: down" in two_hosts(*status).stdout, "host a does not end", 20)
        done = other.call("a", "true")
        assert done.returncode == 1 and "host a is not up" in done.stderr
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
NOT_ROOT = """setpriv --reuid=65534 --clear-groups --securebits=+no_setuid_fixup
    --inh-caps=+dac_read_search --ambient-caps=+dac_read_search"""
NOT_INSTALLED = "libvirtd and virsh not installed: run scripts/install-deps libvirt"
MISSING = {
    "no-root": (NOT_ROOT, "must be run as root"),
    "no-libvirt": ("env PATH=/nowhere", NOT_INSTALLED),
    "no-namespaces": ("setpriv --bounding-set=-sys_admin", "no namespaces allowed here"),
}


@pytest.mark.parametrize("wrapper, message", MISSING.values(), ids=MISSING)
def test_two_hosts_says_what_is_missing(hosts: Hosts, wrapper: str, message: str) -> None:
    """One line says what keeps the hosts from running here."""
    assert hosts.state.exists()  # where the hosts run, nothing else is missing
    command = [*wrapper.split(), "/usr/bin/python3", str(TOOL), "up"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == UNSUPPORTED
    assert message in done.stderr and done.stderr.count("\n") == 1
    assert not done.stdout


def test_memory_in_a_used_file(hosts: Hosts) -> None:
    """<source type='file'/>: what another guest left in the file does not reach the guest."""
    name = "used-file"
    guest = Guest(hosts, name)
    guest.add("domain", SHARED.format("file"))
    with stamped(guest):
        guest.fill()
        directory = hosts.path("b", "/var/lib/libvirt/qemu/ram")
        # Nobody knows which id the domain will have there.
        files = [directory / f"{number}-{name}" / "pc.ram" for number in range(1, 100)]
        for file in files:
            file.parent.mkdir(parents=True)
        leave_data(files[0], SPEC.mem_mib * MIB)
        for file in files[1:]:
            os.link(files[0], file)
        with open(files[0], "rb") as used:
            assert_used(guest.migrate())
            guest.check()
            # The premise: it is the guest's memory now.
            maps = Path(f"/proc/{guest.pids()[0]}/maps").read_text(encoding="utf-8")
            assert f" {os.fstat(used.fileno()).st_ino} " in maps
            assert all(page != LEFTOVER for page in iter(lambda: used.read(len(LEFTOVER)), b""))


def test_page_cache(hosts: Hosts, tmp_path: Path, measured: Dict[str, Any]) -> None:
    """Cold page cache is freed for the one migration that it is asked for, as in the guide."""
    guest = Guest(hosts, "page-cache", ANY_TIME)
    guest.add("qemu:frontend", PROPERTY.format("free-page-hint-cache"))
    with cold_cache(guest, tmp_path):
        # Nobody asks for it.
        kept = guest.migrate()
        guest.hmp("migrate_set_parameter free-page-hint-cache 1G")
        freed = guest.migrate()
    for name, result in ("kept", kept), ("freed", freed):
        assert result.hints and result.hints.complete, result
        freed_bytes = result.hints.cache_freed_bytes
        measured[name] = {"sent_bytes": result.sent_bytes, "cache_freed_bytes": freed_bytes}
    assert_cache_freed(kept, freed)


EVENT = "MIGRATION_FREE_PAGES"


def documented(words: str, name: str) -> List[str]:
    """The command of virsh of the guide that has these words, for a domain."""
    (line,) = re.findall(rf"^ {{4,}}virsh (.*{words}.*)$", DOCUMENTED, re.MULTILINE)
    return shlex.split(line.replace("DOMAIN", name))


def test_planned_and_accounted_for(hosts: Hosts, measured: Dict[str, Any]) -> None:
    """What was estimated is what the event says was skipped, when the source's QEMU is gone.

    The commands are those of docs/libvirt.md.
    """
    with stamped(Guest(hosts, "planned", ANY_TIME)) as guest:
        guest.fill()
        hosts.virsh("a", *documented("calc-free-page-estimate", guest.name))
        command = documented("query-free-page-estimate", guest.name)
        while (info := json.loads(hosts.virsh("a", *command))["return"])["status"] != "measured":
            assert info["status"] == "measuring"
        found = info["estimate"]
        assert found["complete"] and found["free-bytes"] > 0.9 * FREED_MIB * MIB

        listener = documented("qemu-monitor-event", guest.name)
        assert listener[-4:] == ["--event", EVENT, "--timeout", "600"]
        # Of all events, so that one of them shows that it listens.
        command = ("virsh", *listener[:-4], "--loop", "--timeout", "600")
        with hosts.started("a", *command) as virsh:
            assert virsh.stdout
            heard = ""
            while "RESUME" not in heard:
                guest.virsh("suspend")
                guest.virsh("resume")
                heard = virsh.stdout.readline()
            result = guest.migrate()
            while EVENT not in heard:
                heard = virsh.stdout.readline()
        guest.check()
    match = re.search(r"(\{.*\})", heard)
    assert match and result.hints and result.absent
    data = json.loads(match.group(1))
    skipped = data["free-page-hint"]["skipped-bytes"] + data["absent-pages"]["absent-bytes"]
    assert data["free-page-hint"]["skipped-bytes"] == result.hints.skipped_bytes
    measured.update(skipped=skipped, estimated=found["free-bytes"] + found["absent-bytes"])
    assert abs(measured["estimated"] - skipped) < 0.03 * skipped


# Of what was given back, nearly all: the guest goes on allocating.
MOST_MIB = 400


def test_reporting_pays(hosts: Hosts, measured: Dict[str, Any]) -> None:
    """What was freed and reported is skipped; with the capability switched off it is looked at."""
    # The domain has no more of ours than the <emulator>, and libvirt's own free page reporting.
    guest = Guest(hosts, "stock")
    guest.replace_element("qemu:override")
    guest.replace_element("memballoon", "<memballoon model='virtio' freePageReporting='on'/>")
    with stamped(guest):
        (pid,) = guest.pids()
        most = process_mib(pid) + FREED_MIB - MOST_MIB
        guest.fill()
        wait_for(lambda: process_mib(pid) <= most, "the guest does not report what it freed")
        rss = int(process_mib(pid))
        result = guest.migrate()
        guest.check()
        assert result.absent and result.absent.reason is None
        absent_mib = result.absent.absent_bytes // MIB
        # QEMU itself is in its memory, too.
        assert absent_mib >= SPEC.mem_mib - rss - 8
        measured["absent"] = {"rss_mib": rss, "absent_mib": absent_mib, "ms": result.total_ms}

        guest.hmp("migrate_set_capability skip-absent-pages off")
        result = guest.migrate()
        guest.check()
        assert result.absent
        assert (result.absent.reason, result.absent.absent_bytes) == ("disabled", 0)
        measured["off"] = {"ms": result.total_ms, "zero_pages": result.zero_pages}
