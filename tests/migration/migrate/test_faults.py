# SPDX-License-Identifier: GPL-2.0-or-later
"""Whatever goes wrong while hints are in flight, the guest runs on and nothing is lost."""

import os
import signal
import socket
import time
from pathlib import Path
from typing import Any, Dict

import pytest

from livemig import workload
from livemig.checks import SMALL, assert_intact, assert_whole, hints_of, in_check, keep_busy
from livemig.checks import migrate_watched, migration, wait_hints_ended, watched
from livemig.guest import Guest
from livemig.lab import Lab
from livemig.machine import MIB, PAGE
from livemig.metal import HINTED_PAGES, WAIT_MS, wait_hinted, written_metal
from livemig.migration import query, set_capabilities, start, status_is
from livemig.workload import meminfo

pytestmark = pytest.mark.integrity

# A command that has to wait for a stalled link waits for ever; one that does not is done in
# milliseconds. A machine that is busy with other things is not counted as a stall.
ANSWER_SECONDS = 10


@pytest.mark.check
def test_source_dies(lab: Lab) -> None:
    """A destination whose source is killed says so and ends; it does not run half a guest."""
    source = keep_busy(lab.boot(SMALL))
    destination = lab.incoming(SMALL)
    start(source, destination, migration(max_bandwidth=MIB))
    wait_hints_ended(source)
    assert source.pid
    os.kill(source.pid, signal.SIGKILL)
    destination.machine.wait(timeout=60)
    assert destination.machine.exitcode() == 1
    assert "load of migration failed" in destination.qemu_output()


# And why the hints have ended then.
COMMANDS = {
    "stop": ("stop", "vm-stopped"),
    "reset": ("system_reset", "reset"),
    "cancel": ("migrate_cancel", "cancelled"),
}


def assert_answers(source: Guest, command: str, measured: Dict[str, Any]) -> None:
    """The monitor does not wait for the link."""
    began = time.monotonic()
    source.qmp(COMMANDS[command][0])
    source.qmp("query-status")
    measured["answer_ms"] = round((time.monotonic() - began) * 1000)
    assert measured["answer_ms"] < ANSWER_SECONDS * 1000


@pytest.mark.parametrize("command", COMMANDS)
def test_stalled_link(lab: Lab, measured: Dict[str, Any], command: str) -> None:
    """While the link stalls, in the round after the hints, the monitor answers all the same."""
    source = lab.boot(SMALL.but(qemu="debug"))
    source.qmp("set-action", reboot="reset")
    keep_busy(source)
    destination = lab.incoming(SMALL)
    start(source, destination, migration(max_bandwidth=8 * MIB))
    assert destination.pid
    os.kill(destination.pid, signal.SIGSTOP)
    wait_hints_ended(source)
    # The premise: nothing is sent any more.
    sent = -1
    while sent != (now := query(source).sent_bytes):
        sent = now
        time.sleep(1)
    assert_answers(source, command, measured)
    if command == "cancel":
        source.wait_event(status_is("cancelled"), "end of the cancelled migration", 60)
        assert_whole(source)
    os.kill(destination.pid, signal.SIGKILL)


@pytest.mark.parametrize("command", in_check(COMMANDS, "reset"))
def test_stalled_link_while_reporting(
    lab: Lab, measured: Dict[str, Any], tmp_path: Path, command: str
) -> None:
    """With a link that stalls from the start and a report half done, the monitor answers."""
    # Whoever connects is never read from.
    deaf = socket.create_server(str(tmp_path / "deaf"), family=socket.AF_UNIX)
    with deaf, written_metal(lab, qemu="debug") as guest:
        source = guest.source
        source.qmp("set-action", reboot="reset")
        set_capabilities(source, {"events": True})
        source.qmp("migrate-set-parameters", free_page_hint_wait=WAIT_MS)
        source.qmp("migrate", uri=f"unix:{tmp_path}/deaf")
        cmd_id = guest.balloon.wait_asked()
        guest.balloon.send_array(cmd_id, PAGE, HINTED_PAGES)
        assert wait_hinted(source, len(HINTED_PAGES) * PAGE).state == "reporting"
        # The queue is full of arrays when the command comes.
        guest.balloon.queue.flood(0)
        assert_answers(source, command, measured)
        assert wait_hints_ended(source).reason == COMMANDS[command][1]


@pytest.mark.check
def test_no_memory_left(lab: Lab, measured: Dict[str, Any]) -> None:
    """A guest whose memory is nearly all in use answers, if only that nothing is free."""
    oracle, source = watched(lab)
    workload.stamp(source, meminfo(source)["MemAvailable"] - 64)
    hints = hints_of(migrate_watched(oracle))
    assert (hints.state, hints.complete, hints.reason) == ("ended", True, None)
    measured.update(hinted=hints.hinted_bytes)
    assert hints.hinted_bytes < 128 * MIB
    assert_intact(oracle.destination)
