# SPDX-License-Identifier: GPL-2.0-or-later
"""The guest's driver: which blocks it reports, and that it looks for them after it was asked."""

import errno
import re
from typing import Any, Dict, List, Tuple

from livemig import workload
from livemig.checks import FREED_MIB, MIB, SMALL, WITH_HINTS, assert_hints_used, assert_watched
from livemig.faults import BUFFERS, HINT_ORDER, TRACING, in_flight, load, read_number
from livemig.faults import tell_all_orders, trace_on, write
from livemig.guest import Guest
from livemig.lab import Lab
from livemig.migration import migrate

# What the driver and the walk do.
EVENTS = ("virtio_balloon_hint", "free_page_hint")
REQUEST, ARRAY, END = (f"virtio_balloon_hint_{what}" for what in ("request", "array", "end"))
BATCH = "free_page_hint_batch"
EVENT = re.compile(
    rf"^.*: (virtio_balloon_hint_\w+|{BATCH}): (?:id=(\d+))?.*?(?:err=(-?\d+))?$", re.MULTILINE
)
CHANGES = 3
DEBUG = SMALL.but(kernel="debug")


def reports(guest: Guest) -> List[List[Tuple[str, str, str]]]:
    """What the driver did since trace_on(), request by request: events, their ids and errors."""
    events = EVENT.findall(guest.agent.run(f"cat {TRACING}/trace", timeout=120))
    requests = [place for place, (name, _, _) in enumerate(events) if name == REQUEST]
    assert requests[0] == 0, "a walk that nobody asked for"
    return [events[begin:end] for begin, end in zip(requests, [*requests[1:], len(events)])]


def test_the_id_is_older_than_the_walk(lab: Lab, measured: Dict[str, Any]) -> None:
    """No array carries an id that was read after the walk that filled it, even if ids change then.

    The model's counterexample for M9: QEMU cannot tell such a hint from a good one, and loses what
    was written before it armed the dirty log.
    """
    source = lab.boot(DEBUG)
    load(source)
    # An array for each order: more than the driver has buffers.
    tell_all_orders(source)
    workload.dirty_and_free(source, FREED_MIB)
    trace_on(source, *EVENTS)
    for _ in range(CHANGES):
        with in_flight(source):
            # The device hears of the arrays with the next message, which is the end of the report.
            write(source, mute=0)
    destination = lab.incoming(DEBUG)
    assert_hints_used(migrate(source, destination, WITH_HINTS), FREED_MIB * MIB)

    cut_short = []
    for report in reports(destination):
        names = [name for name, _, _ in report]
        # No walk follows that nobody asked for.
        assert (names[-1], names.count(END)) == (END, 1), report
        assert len({number for _, number, _ in report if number}) == 1, report
        cut_short.append((BATCH in names, names.count(ARRAY), int(report[-1][2])))
    measured.update(reports=len(cut_short), arrays=sum(arrays for _, arrays, _ in cut_short))
    # The premise: the id changed during a walk, each time. The last walk came to its end.
    assert cut_short[:-1] == [(True, BUFFERS, -errno.ECANCELED)] * CHANGES
    assert cut_short[-1][2] == 0
    assert_watched(destination)


def test_the_smallest_block_is_64_kib(lab: Lab) -> None:
    """Unless told otherwise, the driver reports blocks of 64 KiB and more."""
    source = lab.boot(SMALL)
    workload.dirty_and_free(source, FREED_MIB)
    assert workload.PAGE_BYTES << read_number(source, HINT_ORDER) == 64 << 10
    # The premise: there are smaller ones, of any order.
    assert sum(workload.buddyinfo(source)[:4]) > 0
    trace_on(source, *EVENTS)
    destination = lab.incoming(SMALL)
    assert_hints_used(migrate(source, destination, WITH_HINTS), FREED_MIB * MIB)
    trace = destination.agent.run(f"cat {TRACING}/trace")
    sizes = {int(size) for size in re.findall(rf"{ARRAY}: id=\d+ size=(\d+)", trace)}
    # Those of one size may all have merged, when the driver looks, but not all of six.
    assert sizes <= set(workload.TOLD_SIZES)
    assert 4 * MIB in sizes and min(sizes) < 2 * MIB
