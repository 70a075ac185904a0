# SPDX-License-Identifier: GPL-2.0-or-later
"""A migration that ended early, in whatever state, leaves nothing behind.

It is cancelled, or its destination is killed; the guest runs on where it is, and goes elsewhere
with hints afterwards. In each test the migration is held in the state that is meant.
"""

import os
import signal
import socket
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Callable, Dict, Mapping

import pytest

from livemig import memory
from livemig.checks import FREED_MIB, SMALL, assert_arrives, assert_whole, hints_now, hints_of
from livemig.checks import in_check, keep_busy, migration, wait_hints, wait_hints_ended, wait_rounds
from livemig.guest import Guest
from livemig.lab import ABSENT, Lab
from livemig.machine import MIB, PAGE
from livemig.metal import HINTED_PAGES, PARTS, WAIT_MS, let_go, wait_hinted, written_metal
from livemig.migration import query, set_capabilities, start, status_is
from livemig.oracle import Oracle

pytestmark = pytest.mark.integrity

ENDED = {"cancel": "cancelled", "destination-dies": "failed"}


def end(source: Guest, how: str, kill: Callable[[], object]) -> None:
    """End a migration early."""
    if how == "cancel":
        source.qmp("migrate_cancel")
    else:
        kill()
        if query(source).status == "pre-switchover":
            source.qmp("migrate-continue", state="pre-switchover")
    # Well before the deadline for the guest's answer.
    source.wait_event(status_is(ENDED[how]), "end of the migration", WAIT_MS / 2000)
    kill()


# States of the migration, with a guest that answers at once


# Where the debug build takes checksums, which takes a while.
ARMED = "scanning" if ABSENT else "arming"


def in_round_1(source: Guest, _: Guest) -> None:
    """The hints are there, what remains is sent slowly."""
    assert wait_hints(source, "ended").hinted_bytes > FREED_MIB * MIB
    assert query(source).rounds == 1


def before_switchover(source: Guest, _: Guest) -> None:
    """All was sent, the guest is stopped."""
    source.wait_event(status_is("pre-switchover"), "switchover", 120)
    assert source.qmp("query-status")["status"] != "running"


def in_device(source: Guest, doomed: Guest) -> None:
    """All was sent, with the devices, and the destination does not say that it has it.

    The guest writes nothing more, and what is left to be sent at the end is less than a socket
    takes: QEMU's monitor waits for a peer that does not read then, hints or not.
    """
    wait_hints_ended(source)
    source.qmp("stop")
    before_switchover(source, doomed)
    assert doomed.pid
    os.kill(doomed.pid, signal.SIGSTOP)
    source.qmp("migrate-continue", state="pre-switchover")
    source.wait_event(status_is("device"), "sending of the devices", 60)
    time.sleep(0.2)


@dataclass(frozen=True)
class State:
    """A state that a migration can be held in."""

    reach: Callable[[Guest, Guest], object]
    parameters: Mapping[str, int]
    # What query-migrate says then.
    status: str = "active"
    hints: str = "ended"
    capabilities: Mapping[str, bool] = field(default_factory=dict)


SLOW = {"max_bandwidth": 32 * MIB, "downtime_limit": 1}
HELD_BACK = {"max_bandwidth": MIB}
PAUSE = {"pause-before-switchover": True}
STATES = {
    # The dirty log was armed, and nobody was asked yet.
    "arming": State(lambda source, _: wait_hints(source, ARMED), HELD_BACK, hints=ARMED),
    "round-1": State(in_round_1, HELD_BACK),
    "later-round": State(
        lambda source, _: wait_rounds(source, 4), {**SLOW, "max_bandwidth": 100 * MIB}
    ),
    "before-switchover": State(before_switchover, {}, "pre-switchover", capabilities=PAUSE),
    "device": State(in_device, SLOW, "device", capabilities={**PAUSE, "return-path": True}),
}


@pytest.mark.parametrize("name", in_check(STATES, "round-1", long=("later-round",)))
def test_ended_early(lab: Lab, measured: Dict[str, Any], name: str) -> None:
    """After migrations that ended in this state the guest is whole, and hints are used anew."""
    state = STATES[name]
    oracle = Oracle(lab, SMALL)
    source = keep_busy(oracle.boot(trace="free_page_hint_*"))
    for how in ENDED:
        doomed = lab.incoming(SMALL, how)
        for guest in (source, doomed):
            set_capabilities(guest, state.capabilities)
        start(source, doomed, migration(**state.parameters))
        state.reach(source, doomed)
        # The premise: this is when it ends.
        now = query(source)
        assert (now.status, hints_of(now).state) == (state.status, state.hints)
        end(source, how, doomed.close)
        measured[how] = hints_now(source).reason
        if source.qmp("query-status")["status"] == "paused":
            source.qmp("cont")
        assert_whole(source)
    if name == "arming":
        # Nobody was asked by what was cancelled then.
        assert measured["cancel"] == "cancelled"
        assert source.trace_log.read_text().count("free_page_hint_ask ") == 1
    set_capabilities(source, dict.fromkeys(state.capabilities, False))
    oracle.arrival()
    assert_arrives(oracle, measured)


@pytest.mark.parametrize("how", ENDED)
def test_ended_in_setup(lab: Lab, measured: Dict[str, Any], tmp_path: Path, how: str) -> None:
    """A migration that ends before it is connected asks for nothing, and the next one does."""
    oracle = Oracle(lab, SMALL)
    peer = str(tmp_path / "busy")
    # It takes no connection, and one may wait for that: who connects next has to wait.
    listener = socket.create_server(peer, family=socket.AF_UNIX, backlog=0)
    with listener, socket.socket(socket.AF_UNIX) as first:
        first.connect(peer)
        source = keep_busy(oracle.boot())
        set_capabilities(source, {"events": True, "free-page-hint": True})
        source.qmp("migrate", uri=f"unix:{peer}")
        # The premise: it is not further, and will not be.
        time.sleep(0.5)
        assert (query(source).status, hints_now(source).state) == ("setup", "idle")
        end(source, how, listener.close)
        assert hints_now(source).messages == 0
        oracle.arrival()
        assert_arrives(oracle, measured)


# States of the hints, with a guest that does one step at a time


@pytest.mark.parametrize("how", in_check(ENDED, "cancel"))
@pytest.mark.parametrize("state", ["asked", "reporting"])
def test_ended_while(lab: Lab, state: str, how: str) -> None:
    """A migration that ends while its guest answers takes no page out of the next one."""
    with written_metal(lab) as guest:
        doomed, old_id = guest.ask("doomed")
        if state == "reporting":
            # One array, and no end.
            guest.balloon.send_array(old_id, PAGE, HINTED_PAGES)
            wait_hinted(guest.source, len(HINTED_PAGES) * PAGE)
        hints = hints_now(guest.source)
        assert hints.state == state
        assert hints.skipped_bytes == (len(HINTED_PAGES) * PAGE if state == "reporting" else 0)
        if how == "destination-dies":
            doomed.close()
            # Nothing is sent while the guest is waited for, so that nobody notices.
            assert hints_now(guest.source).state == state
            guest.balloon.send_end(old_id)
        end(guest.source, how, doomed.close)
        hints = wait_hints_ended(guest.source)
        assert hints.reason == ("cancelled" if how == "cancel" else None)
        assert guest.source.qmp("query-status")["status"] == "running"

        # What was hinted is kept by its owner now, and some of it written.
        guest.write("in round 1")
        destination, cmd_id = guest.ask()
        assert cmd_id != old_id
        # An answer that is late.
        guest.balloon.send_array(old_id, PAGE, HINTED_PAGES)
        guest.balloon.queue.wait_returned()
        free = HINTED_PAGES[:16]
        guest.report(cmd_id, free)
        hints = hints_of(let_go(guest.source, destination))
        assert (hints.complete, hints.reason) == (True, None)
        assert hints.skipped_bytes == len(free) * PAGE
        assert hints.stale_bytes == len(HINTED_PAGES) * PAGE
        seen = memory.compare(guest.source, destination)
        assert not seen.lost
        # With absent pages on, they were kept back too.
        assert seen.kept > len(free) if ABSENT else seen.kept == len(free)
        assert sum(guest.lost(part) for part in PARTS) == len(free)
