# SPDX-License-Identifier: GPL-2.0-or-later
"""Hints under a libvirt that knows them: ours, with the patches of libvirt/.

The domain has nothing of what libvirt warns of: no properties set behind its back, no monitor.
docs/libvirt.md explains what is used here. "make libvirt" builds it.
"""

import json
import re
from dataclasses import asdict
from pathlib import Path
from typing import Any, Dict, Iterator, Sequence

import pytest

from livemig import paths
from livemig.checks import wait_for
from livemig.domains import ANY_TIME, DOCUMENTED, MIB, OTHER_HOST, Guest, Hosts
from livemig.domains import assert_cache_freed, assert_unused, assert_used, cold_cache
from livemig.domains import running_hosts, stamped, two_hosts, xml_there
from livemig.migration import MigrationResult

ATTRIBUTES = ("freePageHinting", "freePageHintArrays", "freePageHintCache")
ARRAYS = ATTRIBUTES[:2]
# The longest wait that there is: no test is about how soon the guest answers.
WAIT = ("--free-page-hint-wait", 60000)
# What --rawstats calls the members of query-migrate's objects.
HINT_STATISTICS = {
    "hinted_bytes": "memory_free_page_hinted",
    "skipped_bytes": "memory_free_page_skipped",
    "redirtied_bytes": "memory_free_page_redirtied",
    "requested_bytes": "memory_free_page_requested",
    "ask_to_end": "memory_free_page_time",
    "reason": "memory_free_page_reason",
    "cache_freed_bytes": "memory_free_page_cache",
    "cache_time": "memory_free_page_cache_time",
}
ABSENT_STATISTICS = {
    "absent_bytes": "memory_absent",
    "scan_time": "memory_absent_time",
    "reason": "memory_absent_reason",
}
# These are left out where there is nothing to say.
IF_ANY = ("ask_to_end", "reason", "cache_freed_bytes", "cache_time")
# The lines of domjobinfo that are of hints.
OF_HINTS = ("Free memory", "Page cache")


class NativeGuest(Guest):
    """A guest whose domain XML has attributes of <memballoon> and nothing for QEMU alone."""

    def __init__(
        self, on: Hosts, name: str, attributes: Sequence[str] = ARRAYS, model: str = "virtio"
    ):
        super().__init__(on, name)
        self.replace_element("qemu:commandline")
        self.replace_element("qemu:override")
        switched_on = "".join(f" {attribute}='on'" for attribute in attributes)
        self.replace_element("memballoon", f"<memballoon model='{model}'{switched_on}/>")

    def job_info(self, host: str, *options: str) -> Dict[str, str]:
        """What domjobinfo says of the last migration, on a host."""
        words = ("domjobinfo", self.name, "--completed", "--keep-completed", *options)
        said = self.hosts.virsh(host, *words)
        return dict(re.findall(r"^ *([^:\n]+): +(.*?) *$", said, re.MULTILINE))

    def parameters(self) -> Any:
        """QEMU's migration parameters that are ours."""
        found = self.qmp("query-migrate-parameters")
        return [found[f"free-page-hint-{name}"] for name in ("wait", "cache")]


@pytest.fixture(name="hosts", scope="module")
def hosts_fixture() -> Iterator[Hosts]:
    """Two hosts with our libvirt."""
    run = paths.cache_dir() / "libvirt-ours" / "build" / "run"
    if not run.exists():
        pytest.skip(f"{run} is missing: run make libvirt")
    with running_hosts("--run", run) as hosts:
        yield hosts


def assert_reported(guest: NativeGuest, result: MigrationResult) -> None:
    """Wherever the domain is known, domjobinfo has QEMU's figures of the last migration.

    After the way back, host b knows it no more: it was not defined there.
    """
    assert result.hints and result.absent
    assert ABSENT_STATISTICS.keys() == asdict(result.absent).keys()
    wanted = {}
    for figures, names in (result.hints, HINT_STATISTICS), (result.absent, ABSENT_STATISTICS):
        for member, name in names.items():
            value = getattr(figures, member)
            if value or member not in IF_ANY:
                wanted[name] = str(value)
    ours = ("memory_free_page_", "memory_absent")
    for host in "ab" if guest.host == "b" else "a":
        raw = guest.job_info(host, "--rawstats")
        assert {n: v for n, v in raw.items() if n.startswith(ours)} == wanted, host


def assert_untainted(guest: NativeGuest) -> None:
    """No host has taken the domain for a special one but for what two-hosts and its CPU are."""
    for host in OTHER_HOST:
        taints = re.findall(r" is tainted: (\S+)", guest.qemu_log(host))
        # As root; and with mode='maximum'.
        assert "high-privileges" in taints
        assert set(taints) <= {"high-privileges", "host-cpu"}, (host, taints)
    assert "custom" not in guest.virsh("dominfo")


def test_migrate_there_and_back(hosts: Hosts, measured: Dict[str, Any]) -> None:
    """Attributes in the XML, nothing else: hints are used, nothing is tainted, the guest unharmed.

    virsh domjobinfo has QEMU's figures afterwards, at both ends, with hints and without.
    """
    with stamped(NativeGuest(hosts, "native")) as guest:
        xml = guest.virsh("dumpxml", "--migratable")
        assert "qemu:" not in xml and "freePageHintArrays='on'" in xml
        for name, wait in ("hints", WAIT), ("no hints", ("--free-page-hint-wait", 0)):
            result = guest.fill_and_migrate(*wait)
            if name == "hints":
                assert_used(result)
            else:
                assert_unused(result, "no-wait")
            assert_reported(guest, result)
            assert_untainted(guest)
            info = guest.job_info("a")
            seen = {k: v for k, v in info.items() if re.match("Free|Absent|Page cache", k)}
            measured[name] = {"total_ms": result.total_ms, "sent_bytes": result.sent_bytes, **seen}
            assert len(seen) >= 5 and all(f"\n    {label}: " in DOCUMENTED for label in seen)


def test_stock_format(hosts: Hosts) -> None:
    """With freePageHinting alone, the guest hints block by block."""
    with stamped(NativeGuest(hosts, "blocks", ATTRIBUTES[:1])) as guest:
        result = guest.fill_and_migrate(*WAIT)
        assert result.hints and result.hints.complete, result
        assert result.hints.messages == result.hints.blocks > 0
        assert_reported(guest, result)
        assert_untainted(guest)


@pytest.mark.parametrize("model", ["none", "virtio"])
def test_nobody_wanted_hints(hosts: Hosts, model: str) -> None:
    """Of a balloon that offers no hints domjobinfo does not speak, although QEMU does.

    Nor after a save, which stops the guest before QEMU looks for a balloon.
    """
    with NativeGuest(hosts, f"unwanted-{model}", (), model=model) as guest:
        result = guest.migrate()
        assert result.hints and result.hints.reason == "no-device"
        for host in OTHER_HOST:
            info = guest.job_info(host)
            assert info["Operation"].endswith(" migration") and "Absent memory skipped" in info
            assert not [label for label in info if label.startswith(OF_HINTS)], info
        guest.migrate()
        guest.virsh("managedsave")
        info = guest.job_info("a")
        assert info["Operation"] == "Save" and "Absent memory skipped" in info
        assert not [label for label in info if label.startswith(OF_HINTS)], info
        guest.virsh("managedsave-remove")


def test_parameters_of_one_migration(hosts: Hosts) -> None:
    """The wait and the budget of virsh migrate are QEMU's for this migration, and no longer."""
    with stamped(NativeGuest(hosts, "parameters", ATTRIBUTES)) as guest:
        before = guest.parameters()
        wanted = [1234, 7 * MIB]
        assert all(is_now != shall_be for is_now, shall_be in zip(before, wanted))
        options = ("--free-page-hint-wait", wanted[0], "--free-page-hint-cache", "7MiB")
        # Slow enough to be looked at
        command = guest.migration_command(*options, "--bandwidth", 1)
        with hosts.started("a", *command) as virsh:
            query = "query-migrate"
            wait_for(lambda: guest.qmp(query).get("status") == "active", "nothing migrates")
            assert guest.parameters() == wanted
            guest.virsh("domjobabort")
            assert "canceled by client" in virsh.communicate(timeout=60)[1]
        assert guest.parameters() == before
        said = guest.fail_to_migrate("--free-page-hint-wait=-1")
        assert "'free_page_hint.wait' must not be negative" in said
        guest.check()


def test_page_cache(hosts: Hosts, tmp_path: Path, measured: Dict[str, Any]) -> None:
    """Cold page cache is dropped for the migration that says how much, and domjobinfo says so."""
    guest = NativeGuest(hosts, "page-cache", ATTRIBUTES)
    with cold_cache(guest, tmp_path):
        kept = guest.migrate(*WAIT)
        assert_reported(guest, kept)
        dropped = guest.migrate(*WAIT, "--free-page-hint-cache", 1 << 30)
        assert_reported(guest, dropped)
        assert_untainted(guest)
        info = guest.job_info("a")
    assert_cache_freed(kept, dropped)
    measured.update({label: info[label] for label in info if label.startswith("Page cache")})
    assert len(measured) == 2 and all(f"*{label}*" in DOCUMENTED for label in measured)


def test_other_features_at_the_destination(hosts: Hosts) -> None:
    """An XML for the destination with other hint features is refused, and nothing has begun."""
    with stamped(NativeGuest(hosts, "changed", ATTRIBUTES)) as guest:
        for number, attribute in enumerate(ATTRIBUTES):
            # Those that depend on it have to be off, too.
            off = {f"{name}='on'": f"{name}='off'" for name in ATTRIBUTES[number:]}
            message = f"Target balloon {attribute} attribute value 'off' does not match source 'on'"
            assert message in guest.fail_to_migrate("--xml", xml_there(guest, off))
        assert guest.qemu_log("b") == ""
        guest.check()
        # The premise: as it is, it is taken.
        guest.migrate("--xml", xml_there(guest, {}))
        guest.check()


def test_stock_qemu(hosts: Hosts) -> None:
    """Of a QEMU without hints nothing is asked for: attributes and parameters are refused."""
    guest = NativeGuest(hosts, "on-stock")
    guest.replace(str(paths.qemu_binary("ours")), str(paths.qemu_binary("stock")))
    done = hosts.call("a", "virsh", "define", guest.xml)
    assert done.returncode
    assert "freePageHinting requires virtio-balloon with 'free-page-hint-arrays'" in done.stderr
    # Off, the first one is no more than what it knows.
    guest.replace("freePageHinting='on' freePageHintArrays='on'", "freePageHinting='off'")
    with guest:
        for name in "wait", "cache":
            said = guest.fail_to_migrate(f"--free-page-hint-{name}", 1)
            assert f"'free-page-hint-{name}' is not supported by QEMU binary" in said
        assert guest.state() == "running"
        # The premise: without them, it is taken.
        done = guest.virsh_migrate()
        assert done.returncode == 0, done.stderr


def test_to_a_libvirt_without_hints(hosts: Hosts, tmp_path: Path) -> None:
    """A host whose libvirt knows nothing of the attributes refuses the guest, which runs on.

    A guest with an override for QEMU goes there and back, with hints.
    """
    run = json.loads((hosts.state / "two-hosts.json").read_text("utf-8"))["run"][0]
    either = tmp_path / "run"
    either.write_text(f'#!/bin/sh\n[ "$(hostname)" = host-b ] || set -- {run} "$@"\nexec "$@"\n')
    either.chmod(0o755)
    with running_hosts("--run", either) as mixed:
        helps = [mixed.virsh(host, "help", "migrate") for host in OTHER_HOST]
        assert [("free-page-hint" in text) for text in helps] == [True, False]
        with stamped(NativeGuest(mixed, "mixed")) as guest:
            for options, message in (
                ((), "load of migration failed"),
                (WAIT, "parameter 'free_page_hint.wait' not supported"),
            ):
                assert message in guest.fail_to_migrate(*options)
            guest.check()
        with stamped(Guest(mixed, "override", ANY_TIME)) as overridden:
            for _ in OTHER_HOST:
                assert_used(overridden.fill_and_migrate())


def test_no_such_libvirt(tmp_path: Path) -> None:
    """two-hosts says in one line that there is no program to run a libvirt with."""
    done = two_hosts("up", "--state", tmp_path / "hosts", "--run", tmp_path / "run")
    assert done.returncode == 1
    assert done.stderr == f"two-hosts: error: --run {tmp_path / 'run'}: no such program\n"
    assert not (tmp_path / "hosts").exists()


def test_switched_by_fph(hosts: Hosts) -> None:
    """scripts/fph switches hints on and off by attributes, of which nothing is tainted.

    Without --write nothing is defined. What has an override keeps it.
    """
    guest, overridden = NativeGuest(hosts, "switched", ()), Guest(hosts, "kept")

    def definition(name: str) -> str:
        return hosts.virsh("a", "dumpxml", "--inactive", name)

    for defined in guest, overridden:
        hosts.virsh("a", "define", "--validate", defined.xml)
    before = definition(guest.name)
    shown = hosts.fph("a", "enable --arrays", guest.name)
    assert shown["diff"] and definition(guest.name) == before
    written = hosts.fph("a", "enable --arrays --write", guest.name)
    assert written == {**shown, "written": True}
    after = definition(guest.name)
    assert after.replace(" freePageHinting='on' freePageHintArrays='on'", "") == before != after
    assert hosts.fph("a", "status", guest.name)["defined"] == "arrays"
    assert hosts.fph("a", "enable --arrays", overridden.name)["diff"] == ""
    hosts.virsh("a", "undefine", overridden.name)

    guest.xml.write_text(after, "utf-8")
    with stamped(guest):
        assert_used(guest.fill_and_migrate(*WAIT))
        # Whoever asks QEMU taints the domain.
        assert_untainted(guest)
        found = hosts.fph("b", "status", guest.name)
        assert (found["offered"], found["driver"], found["hints"]) == ("arrays", "arrays", True)
        assert hosts.fph("a", "disable --write", guest.name)["written"]
        assert definition(guest.name) == before
