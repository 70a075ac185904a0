# SPDX-License-Identifier: GPL-2.0-or-later
"""The guest's driver: which blocks it reports, and that it looks for them after it was asked."""

import errno
import re
from dataclasses import dataclass, field
from typing import Any, Dict, List, Optional

from livemig import workload
from livemig.checks import FREED_MIB, MIB, SMALL, WITH_HINTS, assert_hints_used, assert_watched
from livemig.faults import BUFFERS, TRACING, in_flight, load, tell_all_orders, trace_on, write
from livemig.guest import Guest
from livemig.lab import Lab
from livemig.migration import cancel, migrate

# What the driver and the walk do.
EVENTS = ("virtio_balloon_hint", "free_page_hint")
HINT_ORDER = "/sys/module/virtio_balloon_hint/parameters/hint_order"
ARRAY = re.compile(r"virtio_balloon_hint_array: id=\d+ size=(\d+)")
EVENT = re.compile(
    r"^.*: (virtio_balloon_hint_\w+|free_page_hint_batch): (?:id=(\d+))?.*?(?:err=(-?\d+))?$",
    re.MULTILINE,
)
# Of the blocks that are reported by default
SMALLEST = 64 * 1024
CHANGES = 3
DEBUG = SMALL.but(kernel="debug")


@dataclass
class Report:
    """What the driver did for one request."""

    request: int
    # Batches read from the free lists, and the ids of the arrays that were sent.
    batches: int = 0
    arrays: List[int] = field(default_factory=list)
    end: Optional[int] = None
    error: int = 0


def reports(guest: Guest) -> List[Report]:
    """What the driver did since trace_on(), request by request."""
    found: List[Report] = []
    for name, number, error in EVENT.findall(guest.agent.run(f"cat {TRACING}/trace", timeout=120)):
        if name == "virtio_balloon_hint_request":
            found.append(Report(int(number)))
        elif name == "free_page_hint_batch":
            assert found and found[-1].end is None, "a walk that nobody asked for"
            found[-1].batches += 1
        elif name == "virtio_balloon_hint_array":
            found[-1].arrays.append(int(number))
        else:
            found[-1].end, found[-1].error = int(number), int(error)
    return found


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
            cancel(source)
    destination = lab.incoming(DEBUG)
    assert_hints_used(migrate(source, destination, WITH_HINTS), FREED_MIB * MIB)

    seen = reports(destination)
    measured.update(reports=len(seen), arrays=sum(len(report.arrays) for report in seen))
    assert not [report for report in seen if {*report.arrays, report.end} != {report.request}]
    # The premise: the id changed during a walk, each time. The last walk came to its end.
    cut_short = [(bool(report.batches), len(report.arrays), report.error) for report in seen]
    assert cut_short[:-1] == [(True, BUFFERS, -errno.ECANCELED)] * CHANGES
    assert cut_short[-1][2] == 0
    assert_watched(destination)


def test_the_smallest_block_is_64_kib(lab: Lab) -> None:
    """Unless told otherwise, the driver reports blocks of 64 KiB and more."""
    source = lab.boot(SMALL)
    workload.dirty_and_free(source, FREED_MIB)
    order = int(source.agent.run(f"cat {HINT_ORDER}"))
    assert workload.PAGE_BYTES << order == SMALLEST
    # The premise: there are smaller ones, of any order.
    smaller = "awk '{for (i = 5; i <= 8; i++) sum += $i} END {print sum}' /proc/buddyinfo"
    assert int(source.agent.run(smaller)) > 0
    trace_on(source, *EVENTS)
    destination = lab.incoming(SMALL)
    assert_hints_used(migrate(source, destination, WITH_HINTS), FREED_MIB * MIB)
    sizes = {int(size) for size in ARRAY.findall(destination.agent.run(f"cat {TRACING}/trace"))}
    # Those of one size may all have merged, when the driver looks, but not all of six.
    assert sizes <= set(workload.TOLD_SIZES)
    assert 4 * MIB in sizes and min(sizes) < 2 * MIB
