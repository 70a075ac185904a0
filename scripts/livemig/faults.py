# SPDX-License-Identifier: GPL-2.0-or-later
"""Arrays that are in flight for as long as a test needs, in guests with the debug kernel.

Its module hint_faults (tests/migration/guest/modules) lets messages fail, or keeps the device from
hearing of them.
"""

import contextlib
from typing import Iterator

from livemig.checks import begin, hints_now, wait_for
from livemig.guest import Guest
from livemig.migration import cancel

HINT_ORDER = "/sys/module/virtio_balloon_hint/parameters/hint_order"
FAULTS = "/sys/module/hint_faults/parameters"
TRACING = "/sys/kernel/tracing"
# What the driver has: four buffers.
BUFFERS = 4


def load(guest: Guest) -> None:
    """Load the module for faults."""
    guest.agent.run("insmod /lib/modules/hint_faults.ko")


def tell_all_orders(guest: Guest) -> None:
    """A report becomes an array for each order that has free blocks."""
    guest.agent.run(f"echo 0 > {HINT_ORDER}")


def trace_on(guest: Guest, *events: str) -> None:
    """Record groups of the kernel's events from now on."""
    guest.agent.run(f"echo 65536 > {TRACING}/buffer_size_kb")
    for event in events:
        guest.agent.run(f"echo 1 > {TRACING}/events/{event}/enable")


def read_number(guest: Guest, path: str) -> int:
    """The number in a file of the guest."""
    return int(guest.agent.run(f"cat {path}"))


def write(guest: Guest, **files: object) -> None:
    """Set parameters of the module for faults."""
    guest.agent.run("; ".join(f"echo {value} > {FAULTS}/{name}" for name, value in files.items()))


@contextlib.contextmanager
def in_flight(source: Guest, messages: int = BUFFERS) -> Iterator[None]:
    """A migration asks, and the driver waits for the device to return so many messages.

    It is cancelled at the end.
    """
    write(source, muted=0, mute=1)
    begin(source)
    muted = f"{FAULTS}/muted"
    wait_for(lambda: read_number(source, muted) >= messages, "the driver sends no messages", 60)
    # The premise: the device has not heard of them.
    hints = hints_now(source)
    assert (hints.state, hints.messages) == ("asked", 0)
    # Nor is a buffer used twice.
    assert read_number(source, muted) == messages
    yield
    cancel(source)
