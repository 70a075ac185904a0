# SPDX-License-Identifier: GPL-2.0-or-later
"""Whatever goes wrong while hints are in flight, the guest runs on and nothing is lost."""

import os
import signal
import time
from dataclasses import replace
from typing import Any, Callable, Dict

import pytest
from checks import FREED_MIB, FREED_PAGES, SMALL, WITH_HINTS, assert_goes_on, assert_hints_used
from checks import assert_intact, fill_and_free, hints_of, migration, start_churn
from checks import wait_asked, wait_hints_ended
from conftest import Lab

from livemig import workload
from livemig.guest import Guest
from livemig.migration import migrate, query, start, status_is

MIB = 1 << 20
# A command that has to wait for a stalled link waits for ever; one that does not is done in
# milliseconds. A machine that is busy with other things is not counted as a stall.
ANSWER_SECONDS = 10


def test_cancel_while_asked(lab: Lab) -> None:
    """A migration that is cancelled while its guest is asked ends then, not at the deadline."""
    source = lab.boot_crashed(SMALL, FREED_MIB)
    abandoned = lab.incoming(SMALL, "abandoned")
    start(source, abandoned, WITH_HINTS)
    wait_asked(source)
    source.qmp("migrate_cancel")
    source.wait_event(status_is("cancelled"), "end of the cancelled migration", 30)
    hints = hints_of(query(source))
    assert (hints.state, hints.reason, hints.hinted_bytes) == ("ended", "cancelled", 0)
    abandoned.close()

    destination = lab.incoming(SMALL)
    result = migrate(source, destination, migration(free_page_hint_wait=10))
    assert hints_of(result).reason == "timeout"
    assert result.normal_pages > 0.95 * FREED_PAGES


def test_destination_dies_while_asked(lab: Lab) -> None:
    """A destination that dies while the guest is asked fails the migration, and no more."""
    source = lab.boot_crashed(SMALL, FREED_MIB)
    doomed = lab.incoming(SMALL, "doomed")
    start(source, doomed, migration(free_page_hint_wait=1000))
    wait_asked(source)
    doomed.close()
    source.wait_event(status_is("failed"), "failure of the migration", 60)
    assert source.qmp("query-status")["status"] == "running"


def test_source_dies(lab: Lab) -> None:
    """A destination whose source is killed says so and ends; it does not run half a guest."""
    source = lab.boot(SMALL)
    fill_and_free(source)
    start_churn(source)
    destination = lab.incoming(SMALL)
    start(source, destination, migration(max_bandwidth=MIB))
    wait_hints_ended(source)
    assert source.pid
    os.kill(source.pid, signal.SIGKILL)
    destination.machine.wait(timeout=60)
    assert destination.machine.exitcode() == 1
    assert "load of migration failed" in destination.qemu_output()


COMMANDS: Dict[str, Callable[[Guest], Any]] = {
    "stop": lambda source: source.qmp("stop"),
    "reset": lambda source: source.qmp("system_reset"),
    "cancel": lambda source: source.qmp("migrate_cancel"),
}


@pytest.mark.parametrize("command", COMMANDS)
def test_stalled_link(lab: Lab, measured: Dict[str, Any], command: str) -> None:
    """While the link stalls, with hints in or behind, the monitor answers all the same."""
    source = lab.boot(SMALL)
    source.qmp("set-action", reboot="reset")
    fill_and_free(source)
    start_churn(source)
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
    began = time.monotonic()
    COMMANDS[command](source)
    source.qmp("query-status")
    measured["answer_ms"] = round((time.monotonic() - began) * 1000)
    assert measured["answer_ms"] < ANSWER_SECONDS * 1000
    if command == "cancel":
        source.wait_event(status_is("cancelled"), "end of the cancelled migration", 60)
        assert_intact(source)
        assert_goes_on(source)
    os.kill(destination.pid, signal.SIGKILL)


def test_driver_comes_and_goes(lab: Lab, measured: Dict[str, Any]) -> None:
    """A driver that is unbound and bound all the time while hints are asked for harms nobody."""
    source = lab.boot(SMALL)
    fill_and_free(source)
    start_churn(source)
    source.agent.run(
        "cd /sys/bus/virtio/drivers/virtio_balloon; "
        "dev=$(basename $(readlink -f virtio*/ | head -1));"
        "(while [ ! -e /tmp/enough ]; do echo $dev > unbind; echo $dev > bind; done;"
        " touch /tmp/done) > /dev/null 2>&1 & cd /"
    )
    reasons = []
    for attempt in range(10):
        abandoned = lab.incoming(SMALL, f"abandoned-{attempt}")
        start(source, abandoned, migration(max_bandwidth=MIB, free_page_hint_wait=2000))
        deadline = time.monotonic() + 60
        while (hints := hints_of(query(source))).state != "ended" and not hints.reason:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        reasons.append(hints.reason)
        source.qmp("migrate_cancel")
        source.wait_event(status_is("cancelled"), "end of the cancelled migration", 60)
        abandoned.close()
    measured["reasons"] = reasons
    # The premise: the guest was caught without a driver, or lost it while it was asked.
    assert {"no-driver", "reset"} & set(reasons)
    source.agent.run("touch /tmp/enough; until [ -e /tmp/done ]; do sleep 0.1; done")
    destination = lab.incoming(SMALL)
    assert_hints_used(migrate(source, destination, WITH_HINTS), FREED_MIB * MIB)
    assert_intact(destination)
    assert_goes_on(destination)


def test_no_memory_left(lab: Lab, measured: Dict[str, Any]) -> None:
    """A guest whose memory is nearly all in use answers, if only that nothing is free."""
    source = lab.boot(SMALL)
    workload.stamp(source, 850)
    destination = lab.incoming(SMALL)
    result = migrate(source, destination, WITH_HINTS)
    hints = hints_of(result)
    assert (hints.state, hints.reports, hints.reason) == ("ended", 1, None)
    measured.update(hinted=hints.hinted_bytes)
    assert hints.hinted_bytes < 128 * MIB
    assert_intact(destination)


def test_source_runs_on_after_failure(lab: Lab) -> None:
    """A guest whose destination could not load it goes on at the source, with all it wrote."""
    source = lab.boot(SMALL)
    fill_and_free(source)
    start_churn(source)
    other = SMALL.but(balloon="free-page-hint=on,free-page-hint-arrays=off")
    destination = lab.incoming(other, "refuses")
    start(source, destination, replace(WITH_HINTS, common={"return-path": True}))
    source.wait_event(status_is("failed"), "failure of the migration", 60)
    assert source.qmp("query-status")["status"] == "running"
    assert_intact(source)
    assert_goes_on(source)
    good = lab.incoming(SMALL)
    assert_hints_used(migrate(source, good, WITH_HINTS), FREED_MIB * MIB)
    assert_intact(good)
    assert_goes_on(good)
