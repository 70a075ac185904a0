# SPDX-License-Identifier: GPL-2.0-or-later
"""What controllers look at while a guest migrates with hints, and whether they would give it up."""

import json
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any, Dict, List, Optional, Sequence, Tuple

import pytest

from livefph.watch import MIGRATION_OUT
from livemig.domains import ANY_TIME, FREED_MIB, MIB, SPEC, Guest, Hosts, stamped

# MiB/s
RATE = 20
MEMORY_BYTES = SPEC.mem_mib * MIB
# Prints, on the source, what libvirt reports of a domain's job, until the domain is gone.
SAMPLER = """
import json, sys, time, libvirt
libvirt.registerErrorHandler(lambda *_: None, None)
domain = libvirt.open("qemu:///system").lookupByName(sys.argv[1])
while True:
    try:
        stats = domain.jobStats()
    except libvirt.libvirtError:
        break
    print(json.dumps({"seconds": time.monotonic(), **stats}), flush=True)
    time.sleep(0.02)
"""

# When a controller gives a migration up: a rule like KubeVirt's. It looks at how much remains, and
# gives up when that has not been less than ever before for a time, or when the migration takes
# longer than the guest's size allows. KubeVirt's defaults; the second was 800 s in its older
# releases.
PROGRESS_SECONDS = 150.0
SECONDS_PER_GIB = 150.0
GIB = 1 << 30


@dataclass(frozen=True)
class Sample:
    """What was reported at one time, in seconds from the start."""

    seconds: float
    remaining: int
    sent: int = 0


def given_up(samples: Sequence[Sample], memory_bytes: int) -> Optional[Tuple[float, str]]:
    """When the migration of these samples would have been given up, and why; None: never."""
    least, since = float("inf"), 0.0
    for sample in samples:
        if sample.remaining < least:
            least, since = sample.remaining, sample.seconds
        if sample.seconds - samples[0].seconds > memory_bytes / GIB * SECONDS_PER_GIB:
            return sample.seconds, "completion"
        if sample.seconds - since > PROGRESS_SECONDS:
            return sample.seconds, "progress"
    return None


def longest_standstill(samples: Sequence[Sample]) -> float:
    """The longest time between samples for which neither what remains nor what was sent changed."""
    still = groupby(samples, lambda sample: (sample.remaining, sample.sent))
    times = ([sample.seconds for sample in group] for _, group in still)
    return max((seconds[-1] - seconds[0] for seconds in times), default=0)


def line(*remaining: int) -> List[Sample]:
    """Samples of every 10 s."""
    return [Sample(10 * number, left) for number, left in enumerate(remaining)]


# Rounds of 20 s, of which each leaves less than the last one did.
ROUNDS = line(*(left for top in range(40, 0, -1) for left in (2 * top, top)))

SERIES = {
    "nothing": ([], None),
    "shrinks": (line(*range(15, 0, -1)), None),
    "rounds": (ROUNDS[:15], None),
    "stands-still": (line(9, *[5] * 16), None),
    "stands-still-too-long": (line(9, *[5] * 17), (170, "progress")),
    # It goes up and down, but is never less than it was. Who compares neighbours misses this.
    "never-less": (line(9, 5, *[8, 6] * 9), (170, "progress")),
    "as-little-as-before": (line(9, 5, *[8, 5] * 9), (170, "progress")),
    "takes-too-long": (line(*range(99, 0, -1)), (310, "completion")),
}


@pytest.mark.parametrize("samples, expected", SERIES.values(), ids=SERIES)
def test_rule(samples: List[Sample], expected: Optional[Tuple[float, str]]) -> None:
    """The rule gives up a guest of 2 GiB after 150 s without less, or after 150 s for each GiB."""
    assert given_up(samples, 2 * GIB) == expected


def test_standstill() -> None:
    """A standstill begins with the last sample before it, and ends when either figure moves."""
    moving = [Sample(second, 9, second) for second in range(5)]
    assert longest_standstill([]) == 0
    assert longest_standstill(moving) == 0
    assert longest_standstill([*moving, Sample(7, 9, 4), Sample(9, 8, 4)]) == 3


def delayed(samples: Sequence[Sample], after: int, seconds: float) -> List[Sample]:
    """The same, but that nothing happened for some time after one of them."""
    late = [replace(sample, seconds=sample.seconds + seconds) for sample in samples[after + 1 :]]
    still = replace(samples[after], seconds=samples[after].seconds + seconds)
    return [*samples[: after + 1], still, *late]


def test_no_controller_gives_up(hosts: Hosts, measured: Dict[str, Any]) -> None:
    """As libvirt reports a migration with hints, what remains shrinks, without what is skipped.

    The same samples with a standstill in them are given up.
    """
    with stamped(Guest(hosts, "watched", ANY_TIME)) as guest:
        guest.fill()
        with hosts.started("a", "/usr/bin/python3", "-c", SAMPLER, guest.name) as sampler:
            assert sampler.stdout
            # It has begun to look.
            first = sampler.stdout.readline()
            result = guest.migrate("--bandwidth", RATE)
            text, _ = sampler.communicate(timeout=60)
        guest.check()
    seen = [json.loads(text) for text in [first, *text.splitlines()]]
    jobs = [j for j in seen if j.get("operation") == MIGRATION_OUT and "data_remaining" in j]
    start = jobs[0]["seconds"]
    samples = [
        Sample(job["seconds"] - start, job["data_remaining"], job["memory_processed"])
        for job in jobs
    ]
    # Before that, what is absent can be seen to be left out already, and what is free not yet.
    sending = [job for job in jobs if job["memory_processed"] > MIB]
    assert result.hints and result.hints.complete and result.absent
    skipped = result.hints.skipped_bytes + result.absent.absent_bytes
    measured.update(
        samples=len(samples),
        total_ms=result.total_ms,
        seconds=round(samples[-1].seconds, 2),
        longest_standstill=round(longest_standstill(samples), 2),
        most_remaining=max(sample.remaining for sample in samples),
        rounds=jobs[-1]["memory_iteration"],
        skipped=skipped,
        remaining_when_ram_is_sent=sending[0]["data_remaining"],
    )
    # The premises: it was seen to shrink, step by step, while memory was skipped.
    assert skipped > 0.9 * FREED_MIB * MIB
    assert len({sample.remaining for sample in samples}) > 10
    assert sending[0]["data_remaining"] <= MEMORY_BYTES - skipped + 64 * MIB
    for field in "memory_processed", "memory_iteration":
        values = [job[field] for job in jobs]
        assert values == sorted(values), field

    assert given_up(samples, MEMORY_BYTES) is None
    middle = len(samples) // 2
    assert given_up(delayed(samples, middle, 120), 2 * MEMORY_BYTES) is None
    stuck = given_up(delayed(samples, middle, 152), 2 * MEMORY_BYTES)
    assert stuck and stuck[1] == "progress"
