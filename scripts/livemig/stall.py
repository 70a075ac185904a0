# SPDX-License-Identifier: GPL-2.0-or-later
"""When a controller would give a migration up: a rule like KubeVirt's, over what libvirt reports.

KubeVirt looks at how much remains. It gives up when that has not been less than ever before for a
time, or when the migration takes longer than the guest's size allows.
"""

from dataclasses import dataclass
from typing import Optional, Sequence

# KubeVirt's defaults. The second was 800 s in its older releases.
PROGRESS_SECONDS = 150.0
SECONDS_PER_GIB = 150.0
GIB = 1 << 30


@dataclass(frozen=True)
class Sample:
    """What was reported at one time, in seconds from the start."""

    seconds: float
    remaining: int
    sent: int = 0


@dataclass(frozen=True)
class GivenUp:
    """When, and for which of the two reasons."""

    seconds: float
    reason: str


def given_up(samples: Sequence[Sample], memory_bytes: int) -> Optional[GivenUp]:
    """When the migration of these samples would have been given up; None: never."""
    if not samples:
        return None
    start = since = samples[0].seconds
    least = samples[0].remaining
    for sample in samples:
        if sample.remaining < least:
            least, since = sample.remaining, sample.seconds
        if sample.seconds - start > memory_bytes / GIB * SECONDS_PER_GIB:
            return GivenUp(sample.seconds, "completion")
        if sample.seconds - since > PROGRESS_SECONDS:
            return GivenUp(sample.seconds, "progress")
    return None


def longest_standstill(samples: Sequence[Sample]) -> float:
    """The longest time between samples for which neither what remains nor what was sent changed."""
    longest = since = 0.0
    before = None
    for sample in samples:
        figures = (sample.remaining, sample.sent)
        if figures != before:
            before, since = figures, sample.seconds
        longest = max(longest, sample.seconds - since)
    return longest
