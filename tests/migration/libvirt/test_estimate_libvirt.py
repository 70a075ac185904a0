# SPDX-License-Identifier: GPL-2.0-or-later
"""What virsh shows of hints without libvirt knowing of them: an estimate before, an event after.

The commands are those of docs/libvirt.md.
"""

import json
import re
import shlex
from typing import Any, Dict, Iterator, List

import pytest

from livemig.domains import ANY_TIME, DOCUMENTATION, FREED_MIB, MIB, Guest, Hosts, stamped

EVENT = "MIGRATION_FREE_PAGES"


def documented(words: str, name: str) -> List[str]:
    """The command of the guide that has these words, for a domain."""
    (line,) = (
        text.strip()
        for text in DOCUMENTATION.read_text("utf-8").splitlines()
        if text.startswith("    ") and "virsh " in text and words in text
    )
    return shlex.split(line.replace("DOMAIN", name))[1:]


@pytest.fixture(name="guest")
def guest_fixture(hosts: Hosts) -> Iterator[Guest]:
    """A running guest, that answers however late."""
    with stamped(Guest(hosts, "planned", ANY_TIME)) as guest:
        guest.fill()
        yield guest


def test_planned_and_accounted_for(hosts: Hosts, guest: Guest, measured: Dict[str, Any]) -> None:
    """What was estimated is what the event says was skipped, when the source's QEMU is gone."""
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
    with hosts.start("a", *command) as virsh:
        try:
            assert virsh.stdout
            heard = ""
            while "RESUME" not in heard:
                guest.virsh("suspend")
                guest.virsh("resume")
                heard = virsh.stdout.readline()
            result = guest.migrate()
            while EVENT not in heard:
                heard = virsh.stdout.readline()
        finally:
            virsh.terminate()
    guest.check()
    match = re.search(r"(\{.*\})", heard)
    assert match and result.hints and result.absent
    data = json.loads(match.group(1))
    skipped = data["free-page-hint"]["skipped-bytes"] + data["absent-pages"]["absent-bytes"]
    assert data["free-page-hint"]["skipped-bytes"] == result.hints.skipped_bytes
    measured.update(skipped=skipped, estimated=found["free-bytes"] + found["absent-bytes"])
    assert abs(measured["estimated"] - skipped) < 0.03 * skipped
