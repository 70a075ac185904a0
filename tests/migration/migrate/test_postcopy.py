# SPDX-License-Identifier: GPL-2.0-or-later
"""Hints work together with postcopy."""

from typing import Any, Dict

import pytest

from livemig import workload
from livemig.checks import FREED_MIB, MIB, SMALL, assert_hints_if, assert_hints_used, assert_intact
from livemig.checks import assert_whole, finish_postcopy, huge_pages_set_aside, in_check, keep_busy
from livemig.checks import switch_early, wait_requested, watched
from livemig.host import process_mib
from livemig.lab import Lab
from livemig.migration import Hints, status_is

pytestmark = pytest.mark.integrity

# What QEMU itself is made of, with sanitizers.
QEMU_MIB = 256
PREEMPT = {"postcopy-preempt": True}


# What nobody asks for comes so slowly that a guest can start a program before it is all there, at
# least in most attempts: on a busy machine, it was there first after 51 s.
BACKGROUND = 4 * MIB
ATTEMPTS = 4


with_preempt = pytest.mark.parametrize("common", [{}, PREEMPT], ids=["plain", "preempt"])


@pytest.mark.parametrize("name", in_check(("plain", "preempt", "compared", "control"), "compared"))
def test_switch_right_after_the_hints(lab: Lab, measured: Dict[str, Any], name: str) -> None:
    """A switch to postcopy before hinted pages could be sent: each can be used, none is lost."""
    hints_on = name != "control"
    # While its memory comes. If not, memory can be compared.
    runs_there = name != "compared"
    oracle, source = watched(lab, SMALL.but(trace="free_page_hint_*"))
    keep_busy(source)
    destination = oracle.arrival(running=runs_there)
    switch_early(source, destination, PREEMPT if name == "preempt" else {}, hints_on)
    result = finish_postcopy(source, destination)
    hints = assert_hints_if(hints_on, result, FREED_MIB * MIB)
    measured.update(redirtied=hints.redirtied_bytes, requested=hints.requested_bytes)
    # Of what was skipped, that alone was sent which was written again or asked for.
    kept = hints.skipped_bytes - hints.redirtied_bytes - hints.requested_bytes
    measured["resident_mib"] = process_mib(destination.pid, "RssAnon")
    if not runs_there:
        seen = oracle.check()
        measured.update(kept=seen.kept, different=seen.different)
        assert seen.different > 0
        assert (hints.requested_bytes, kept) == (0, seen.kept * 4096)
        assert measured["resident_mib"] < SMALL.mem_mib + QEMU_MIB - kept // MIB
    assert_whole(destination)
    # The guest takes back what was hinted, and works on.
    workload.dirty_and_free(destination, FREED_MIB)
    assert_intact(destination)


def test_release_ram(lab: Lab, measured: Dict[str, Any]) -> None:
    """A source that drops what it sent has given everything to a postcopy destination."""
    source = keep_busy(lab.boot(SMALL.but(qemu="checked")))
    destination = lab.incoming(source.spec)
    switch_early(source, destination, {"release-ram": True})
    result = finish_postcopy(source, destination)
    measured["skipped"] = assert_hints_used(result, FREED_MIB * MIB).skipped_bytes
    assert_whole(destination)


@with_preempt
def test_postcopy_recovers(lab: Lab, common: Dict[str, bool]) -> None:
    """Postcopy that was cut off after hints goes on over a new connection, nothing lost."""
    source = keep_busy(lab.boot(SMALL.but(qemu="checked")))
    destination = lab.incoming(source.spec)
    switch_early(source, destination, common, max_postcopy_bandwidth=MIB)
    # Before it runs there, a guest that is cut off is lost, hints or not.
    destination.wait_event(lambda event: event["event"] == "RESUME", "postcopy", 60)
    source.qmp_oob("migrate-pause")
    source.wait_event(status_is("postcopy-paused"), "the source's pause", 60)
    destination.wait_event(status_is("postcopy-paused"), "the destination's pause", 60)
    uri = f"unix:{lab.logs}/again"
    # A vCPU that waits for a page that was not sent holds up all other commands.
    destination.qmp_oob("migrate-recover", uri=uri)
    source.qmp("migrate-set-parameters", max_postcopy_bandwidth=0)
    source.qmp("migrate", uri=uri, resume=True)
    assert_hints_used(finish_postcopy(source, destination), FREED_MIB * MIB)
    assert_whole(destination)


def take_back(lab: Lab, measured: Dict[str, Any], common: Dict[str, bool], **changes: Any) -> Hints:
    """Let a guest use memory that was hinted while most of what was not is still to come."""
    for _ in range(ATTEMPTS):
        source = keep_busy(lab.boot(SMALL.but(qemu="checked", **changes)))
        destination = lab.incoming(source.spec)
        switch_early(source, destination, common, max_postcopy_bandwidth=BACKGROUND)
        destination.wait_event(lambda event: event["event"] == "RESUME", "postcopy", 60)
        command = f"dirtyfree {FREED_MIB // 2} 2 > /dev/null 2>&1 &"
        destination.agent.run(command, timeout=300)
        wait_requested(source)
        result = finish_postcopy(source, destination)
        hints = assert_hints_used(result, FREED_MIB * MIB, too_small="mem_backend" in changes)
        assert_whole(destination)
        source.close()
        destination.close()
        if hints.requested_bytes:
            measured.update(requested=hints.requested_bytes, skipped=hints.skipped_bytes)
            return hints
    raise AssertionError("each time, postcopy was over before a hinted page was used")


@with_preempt
def test_taken_back_in_postcopy(
    lab: Lab, measured: Dict[str, Any], common: Dict[str, bool]
) -> None:
    """A guest that takes back hinted memory while the rest of it comes gets zeros, and works on."""
    take_back(lab, measured, common)


@with_preempt
def test_huge_pages_taken_back(lab: Lab, measured: Dict[str, Any], common: Dict[str, bool]) -> None:
    """With huge pages behind the guest, one that is used in postcopy comes as a whole."""
    with huge_pages_set_aside(2048, SMALL.mem_mib):
        backend = "memory-backend-memfd,hugetlb=on,hugetlbsize=2M,share=on"
        hints = take_back(lab, measured, common, mem_backend=backend)
        assert hints.requested_bytes % (2 * MIB) == 0
