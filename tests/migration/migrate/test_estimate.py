# SPDX-License-Identifier: GPL-2.0-or-later
"""An estimate says what a migration would skip, and changes nothing."""

import os
import re
from typing import Any, Dict, Iterator, List, Optional

import pytest

from livemig import workload
from livemig.balloon import Balloon
from livemig.checks import FREED_MIB, MIB, PATIENT_MS, SMALL, WITH_HINTS, assert_hints_used
from livemig.checks import assert_intact, fill_and_free, hints_now, hints_of, in_check, keep_busy
from livemig.checks import migrate_watched, watched
from livemig.errors import GuestError
from livemig.estimate import begin, ended, estimate
from livemig.guest import Guest
from livemig.host import process_mib
from livemig.lab import Lab
from livemig.machine import PAGE
from livemig.metal import FIRST_ID, HINTED_PAGES, Metal, held, let_go, metal, set_up, written_metal
from livemig.migration import migrate, start
from livemig.spec import ARRAYS, BLOCKS

# How often a guest that works is asked, one time after the other.
TIMES = int(os.environ.get("FPH_ESTIMATES", "50"))
# Of what an estimate says, a migration may skip so much more or less.
PERCENT = 3


@pytest.fixture(name="asked")
def asked_guest(lab: Lab) -> Iterator[Metal]:
    """A bare-metal guest of which an estimate is wanted, and that has not answered yet."""
    with metal(lab, trace="free_page_* virtio_balloon_hint_*", qemu="debug") as guest:
        assert guest.source.qmp("query-free-page-estimate") == {"status": "unstarted"}
        guest.write_all()
        set_up(guest.source)
        begin(guest.source)
        guest.balloon.wait_asked()
        yield guest


def answer(guest: Metal) -> None:
    """Let a guest that is asked answer that nothing is free."""
    guest.balloon.send_end(guest.balloon.wait_asked())
    assert ended(guest.source)["complete"]


CACHE = f"{ARRAYS},free-page-hint-cache=on"


@pytest.mark.parametrize("kind", in_check(("fresh", "filled", "memfd"), "filled"))
def test_agrees_with_the_migration(lab: Lab, measured: Dict[str, Any], kind: str) -> None:
    """A migration skips what was estimated, to a few percent: absent pages, and free ones."""
    backend = "memory-backend-memfd,share=on" if kind == "memfd" else "memory-backend-ram"
    oracle, source = watched(lab, SMALL.but(skip_absent=True, mem_backend=backend))
    if kind != "fresh":
        fill_and_free(source)
    # The first time, the guest's code is translated.
    measured.update(first_us=estimate(source)["ask-to-end"])
    before = estimate(source, bandwidth=125000000)
    result = migrate_watched(oracle)
    hints = hints_of(result)
    assert result.absent and before["complete"] and "reason" not in before
    skipped = result.absent.absent_bytes + hints.skipped_bytes
    estimated = before["absent-bytes"] + before["free-bytes"]
    measured.update(skipped=skipped, estimated=estimated, migration_us=hints.ask_to_end)
    measured.update(scan_us=before["scan-time"], ask_us=before["ask-to-end"])
    assert abs(skipped - estimated) < skipped * PERCENT / 100
    # The premise: both sources are there, in the guest that was filled.
    assert before["absent-bytes"] > 64 * MIB
    assert (before["free-bytes"] > FREED_MIB * MIB * 0.9) == (kind != "fresh")
    # By size, free blocks are reported whether they are absent or not.
    sizes = [blocks["block-size"] for blocks in before["blocks"]]
    assert sizes == sorted(sizes) and sizes[-1] == 4 * MIB
    assert set(sizes) <= set(workload.TOLD_SIZES)
    reported = sum(blocks["bytes"] for blocks in before["blocks"])
    assert abs(reported - hints.hinted_bytes) < hints.hinted_bytes * PERCENT / 100
    assert before["round-time"] == before["remaining-bytes"] // 125000


def test_changes_nothing(lab: Lab) -> None:
    """Nothing is logged or populated, and what the latest migration did is reported as before."""
    source = keep_busy(lab.boot(SMALL.but(trace="global_dirty_changed free_page_*")))
    destination = lab.incoming(SMALL)
    # One that fails.
    start(source, destination, WITH_HINTS.with_parameters(max_bandwidth=MIB))
    destination.close()
    source.wait_event(lambda e: e.get("data") == {"status": "failed"}, "failure", 60)
    told = source.qmp("query-migrate")
    events = source.trace_log.read_text().count("global_dirty_changed")
    # The premise.
    assert events > 0
    resident = process_mib(source.pid)
    # No more often: there is a pause in between, in which the guest itself takes some.
    for _ in range(2):
        assert estimate(source)["complete"]
    assert source.qmp("query-migrate") == told
    assert source.trace_log.read_text().count("global_dirty_changed") == events
    assert source.trace_log.read_text().count("free_page_hint_ask ") == 1
    # What the guest itself takes in the meantime is less than what the freed memory would be.
    assert process_mib(source.pid) - resident < FREED_MIB // 4
    assert_intact(source)
    oracle_destination = lab.incoming(SMALL, "next")
    assert_hints_used(migrate(source, oracle_destination, WITH_HINTS), FREED_MIB // 2 * MIB)
    assert_intact(oracle_destination, "churn")


def test_many_in_a_row(lab: Lab, measured: Dict[str, Any]) -> None:
    """A guest at work is asked time and again, and goes on with all its memory as it was."""
    source = keep_busy(lab.boot(SMALL))
    before = assert_intact(source, "churn")
    for _ in range(TIMES):
        found = estimate(source)
        assert found["complete"], found
    after = assert_intact(source, "churn")
    measured.update(times=TIMES, reallocs=after.reallocs - before.reallocs)
    # The premise: it was at work.
    assert after.reallocs > before.reallocs
    assert_intact(source)


@pytest.mark.parametrize(
    "balloon, reason",
    [(BLOCKS, "no-arrays"), (None, "no-device"), ("", "no-device")],
    ids=["blocks", "no-balloon", "no-hints"],
)
def test_who_is_not_asked(lab: Lab, balloon: Optional[str], reason: str) -> None:
    """Who would have to allocate what it hints, or cannot answer, is not asked; absent pages are
    found."""
    guest = lab.boot(SMALL.but(balloon=balloon, trace="virtio_balloon_hint_status free_page_*"))
    before = guest.trace_log.read_text().count("virtio_balloon_hint_status")
    found = estimate(guest)
    assert (found["reason"], found["complete"], found["free-bytes"]) == (reason, False, 0)
    assert found["absent-bytes"] > 256 * MIB and "absent-reason" not in found
    assert guest.trace_log.read_text().count("virtio_balloon_hint_status") == before


def assert_refused(guest: Guest, why: str, **arguments: Any) -> None:
    """There is no estimate, and the reason is given."""
    with pytest.raises(GuestError, match=why):
        guest.qmp("calc-free-page-estimate", **arguments)


def test_refused(asked: Metal) -> None:
    """There is one at a time, none with a bandwidth of 0, and none while a guest is moved."""
    assert_refused(asked.source, "an estimate is being made already")
    answer(asked)
    assert_refused(asked.source, "must not be 0", bandwidth=0)
    destination = asked.incoming()
    start(asked.source, destination, held())
    for guest in asked.source, destination:
        assert_refused(guest, "during a migration")


def test_stopped(asked: Metal) -> None:
    """A guest that is stopped while it is asked, or before, is not waited for."""
    asked.source.qmp("stop")
    assert ended(asked.source)["reason"] == "vm-stopped"
    begin(asked.source)
    assert ended(asked.source)["reason"] == "vm-stopped"
    asked.source.qmp("cont")
    begin(asked.source)
    answer(asked)


def test_reset(asked: Metal) -> None:
    """A device that is reset while its guest is asked ends the estimate."""
    asked.balloon.reset()
    found = ended(asked.source)
    assert (found["reason"], found["complete"]) == ("reset", False)


def test_migration_begins_meanwhile(asked: Metal) -> None:
    """A migration ends the estimate, and an answer to that takes nothing out of the migration."""
    estimate_id = asked.balloon.cmd_id()
    destination = asked.incoming()
    start(asked.source, destination, held())
    assert ended(asked.source)["reason"] == "cancelled"
    cmd_id = asked.balloon.wait_asked()
    assert estimate_id >= FIRST_ID and cmd_id != estimate_id
    # What the estimate would have been told was written since.
    asked.write("in round 1")
    asked.balloon.send_array(estimate_id, PAGE, HINTED_PAGES)
    asked.balloon.queue.wait_returned()
    asked.balloon.send_end(estimate_id)
    asked.balloon.queue.wait_returned()
    assert hints_now(asked.source).state == "asked"
    asked.balloon.send_end(cmd_id)
    hints = hints_of(let_go(asked.source, destination))
    assert (hints.complete, hints.skipped_bytes) == (True, 0)
    assert hints.stale_bytes == len(HINTED_PAGES) * PAGE
    assert not any(asked.lost(part) for part in ("kept", "in round 1", "free"))


def test_pause_in_between(asked: Metal) -> None:
    """A guest that is asked again has a pause first; it is not asked if a migration begins then."""

    def pauses() -> List[int]:
        text = asked.source.trace_log.read_text()
        return [int(us) for us in re.findall(r"free_page_estimate_pause (\d+) us", text)]

    assert not pauses()
    cmd_id = asked.balloon.cmd_id()
    # That takes longer than a hundredth of the longest pause, a second, in which the rest is done.
    destination = asked.incoming()
    answer(asked)
    begin(asked.source)
    start(asked.source, destination, held())
    assert ended(asked.source)["reason"] == "cancelled"
    asks = re.findall(r"free_page_estimate_ask id (\w+)", asked.source.trace_log.read_text())
    assert asks == [hex(cmd_id), "0x0"]
    assert [us <= 1000000 for us in pauses()] == [True]
    asked.balloon.send_end(asked.balloon.wait_asked())
    assert hints_of(let_go(asked.source, destination)).complete


def test_anything_is_counted_once(asked: Metal) -> None:
    """Memory that is hinted twice, that is not there, or in a huge block counts for what it is."""
    cmd_id = asked.balloon.cmd_id()
    for size, addrs in (
        (PAGE, HINTED_PAGES),
        (PAGE, HINTED_PAGES),
        (1 << 30, [1 << 40]),
        (2 * MIB, [32 * MIB, 32 * MIB]),
    ):
        asked.balloon.send_array(cmd_id, size, addrs)
        asked.balloon.queue.wait_returned()
    asked.balloon.send_end(cmd_id)
    found = ended(asked.source)
    # Of the block of 2 MiB nothing was ever written.
    assert found["free-bytes"] + found["absent-bytes"] <= found["total-bytes"]
    assert found["free-bytes"] == len(HINTED_PAGES) * PAGE
    assert found["complete"]


@pytest.fixture(name="with_cache")
def guest_with_cache(lab: Lab) -> Iterator[Metal]:
    """A guest that can be asked for its page cache."""
    with written_metal(lab, Balloon.OURS | Balloon.CACHE, balloon=CACHE, qemu="debug") as guest:
        yield guest


CLAIMS = {"nothing": 0, "some": MIB, "more-than-asked-for": 40 * MIB, "most": (1 << 64) - 1}


@pytest.mark.parametrize("claim", CLAIMS.values(), ids=CLAIMS)
def test_cache_is_what_the_guest_says(with_cache: Metal, claim: int) -> None:
    """Page cache that a guest could free is estimated by its word: within what it was asked for."""
    # No budget is the parameter's, which is none.
    for cache, budget in ({"cache": 2 * MIB}, (2, 0)), ({}, (0, 0)), ({"cache": 0}, (0, 0)):
        begin(with_cache.source, **cache)
        cmd_id = with_cache.balloon.wait_asked()
        assert with_cache.balloon.cache_budget() == budget
        with_cache.balloon.send_array(cmd_id, 0, (claim, 7))
        expected = min(claim, 2 * MIB) if budget[0] else None
        assert ended(with_cache.source).get("cache-bytes") == expected


def test_more_cache_than_memory(with_cache: Metal) -> None:
    """Whatever the guest says, no more is page cache than what is neither absent nor free."""
    begin(with_cache.source, cache=1 << 40)
    cmd_id = with_cache.balloon.wait_asked()
    with_cache.balloon.send_array(cmd_id, PAGE, HINTED_PAGES)
    with_cache.balloon.queue.wait_returned()
    with_cache.balloon.send_array(cmd_id, 0, (1 << 63, 7))
    found = ended(with_cache.source)
    assert found["free-bytes"] > 0
    assert found["cache-bytes"] == found["remaining-bytes"] > 0


def test_nobody_waits_for_ever(asked: Metal) -> None:
    """A guest that does not answer is given up at the deadline, and asked again the next time."""
    answer(asked)
    assert estimate(asked.source, wait_ms=300)["reason"] == "timeout"
    assert asked.balloon.cmd_id() == asked.balloon.DONE
    begin(asked.source)
    answer(asked)


def test_human_monitor(lab: Lab) -> None:
    """The human monitor has it too."""
    guest = lab.boot(SMALL.but(balloon=CACHE))
    settings = {"free_page_hint_wait": PATIENT_MS, "free_page_hint_cache": MIB}
    guest.qmp("migrate-set-parameters", **settings)
    assert "unstarted" in guest.hmp("info free_page_estimate")
    assert not guest.hmp("calc_free_page_estimate")
    ended(guest)
    text = guest.hmp("info free_page_estimate")
    for words in "absent: ", "free besides: ", "complete", "blocks of 4096 kbytes", "to be sent: ":
        assert words in text
    assert "page cache in that: " in text


def test_migrations_go_on_as_before(lab: Lab) -> None:
    """After an estimate that found nothing, a migration asks anew and uses what it hears."""
    with written_metal(lab, qemu="debug") as guest:
        set_up(guest.source)
        assert estimate(guest.source, wait_ms=200)["reason"] == "timeout"
        destination, cmd_id = guest.ask()
        guest.report(cmd_id, HINTED_PAGES)
        hints = hints_of(let_go(guest.source, destination))
        assert hints.complete and hints.skipped_bytes == len(HINTED_PAGES) * PAGE
        assert guest.lost("free") > 0 and not guest.lost("kept")
