# SPDX-License-Identifier: GPL-2.0-or-later
"""What the tests of the bare-metal guest share: its memory, its migrations."""

import contextlib
import os
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, Dict, Iterator, List, Sequence, Tuple

import pytest

from livemig import memory
from livemig.balloon import Balloon
from livemig.checks import hints_now, hints_of, wait_hints_ended
from livemig.guest import Guest
from livemig.lab import Lab
from livemig.machine import MIB, PAGE, Machine, spec, stamped, trouble_with_kvm
from livemig.migration import Hints, MigrationResult, finish, set_capabilities, start
from livemig.spec import MigrationSpec

# Round 0 lasts until the guest ends it.
WAIT_MS = 60000
# So slow that a round goes on until it is let go.
HELD = 64 << 10
SLOW = 4 * MIB
# Shorter than any round.
DOWNTIME_MS = 1

ACCELERATORS = {"tcg": "tcg,thread=multi", "kvm": "kvm"}
CHECK_EVENT = "free_page_hint_check"


def accelerators(*names: str) -> pytest.MarkDecorator:
    """For a test with a parameter `accel`."""
    return pytest.mark.parametrize("accel", [ACCELERATORS[n] for n in names], ids=names)


each_accelerator = accelerators(*ACCELERATORS)
# Where the accelerator matters little, one is enough, unless there is time, as in make hostile.
tcg_at_least = each_accelerator if "FPH_REPEAT" in os.environ else accelerators("tcg")


def usable(accel: str) -> str:
    """Skip the test where an accelerator does not work."""
    if accel.startswith("kvm") and (trouble := trouble_with_kvm(accel)):
        pytest.skip(trouble)
    return accel


# What the test's memory is made of: strips of pages, one part after another, over and over.

REGION = 16 * MIB
REGION_BYTES = 4 * MIB
STRIP_PAGES = 16
STRIP_BYTES = STRIP_PAGES * PAGE

# Each chunk of a deferred clear, however small, has pages in it that are sent.
PARTS = {
    "kept": False,
    "free": True,
    "after the ask": True,
    "after the hint was added": True,
    "kept too": False,
    "after it was applied": True,
    "in round 1": True,
    "in a later round": True,
}
# Written in round 1 so that there is a round 2 that takes long enough.
CHURN = 64 * MIB
CHURN_PAGES = 1024


def strips(part: str) -> List[int]:
    """The addresses of a part's strips."""
    first = REGION + list(PARTS).index(part) * STRIP_BYTES
    return list(range(first, REGION + REGION_BYTES, len(PARTS) * STRIP_BYTES))


def pages_of(part: str) -> List[int]:
    """The addresses of a part's pages."""
    return [addr + i * PAGE for addr in strips(part) for i in range(STRIP_PAGES)]


HINTED_STRIPS = sorted(addr for part, hinted in PARTS.items() if hinted for addr in strips(part))
HINTED_PAGES = [addr + i * PAGE for addr in HINTED_STRIPS for i in range(STRIP_PAGES)]


@dataclass
class Metal:
    """A bare-metal guest and the files in which source and destination keep their memory."""

    lab: Lab
    source: Guest
    machine: Machine
    balloon: Balloon
    files: Tuple[Path, Path]
    # What the guest wrote last into each part.
    seeds: Dict[str, int] = field(default_factory=dict)

    def incoming(self, name: str = "destination", running: bool = False, **changes: Any) -> Guest:
        """A QEMU that waits for the guest, and will not run it when it has come unless told to."""
        there = self.source.spec.but(mem_file=self.files[1], **changes)
        return self.lab.incoming(there, name, running=running)

    def goes_on_at(self, destination: Guest) -> None:
        """It has arrived, and runs on there."""
        destination.qmp("cont")
        self.machine.moved_to(destination)

    def ask(self, name: str = "destination", **parameters: Any) -> Tuple[Guest, int]:
        """Migrate, held, until the guest is asked; returns where it goes, and the request's id."""
        destination = self.incoming(name)
        start(self.source, destination, held().with_parameters(**parameters))
        return destination, self.balloon.wait_asked()

    def write(self, part: str) -> None:
        """Write all pages of a part, with contents that they never had."""
        self.seeds[part] = len(self.seeds) + 1 + self.seeds.get(part, 0) * 16
        for addr in strips(part):
            self.machine.stamp(addr, STRIP_PAGES, self.seeds[part])

    def write_all(self) -> None:
        """Write all parts."""
        for part in PARTS:
            self.write(part)

    def lost(self, part: str, destination: bool = True, addrs: Sequence[int] = ()) -> int:
        """How many pages of a part, or these of it, do not hold what was written last."""
        seed = self.seeds[part]
        with open(self.files[int(destination)], "rb") as file:
            return sum(
                read_page(file, addr) != stamped(addr, seed) for addr in addrs or pages_of(part)
            )

    def report(self, cmd_id: int, addrs: Sequence[int]) -> Hints:
        """Answer a request with pages, in one array, and the end; returns what came of it."""
        self.balloon.send_array(cmd_id, PAGE, addrs)
        self.balloon.send_end(cmd_id)
        return wait_hints_ended(self.source)


def read_page(file: BinaryIO, addr: int) -> bytes:
    """A page of a guest's memory."""
    return os.pread(file.fileno(), PAGE, addr)


@contextlib.contextmanager
def metal(lab: Lab, features: int = Balloon.OURS, **changes: Any) -> Iterator[Metal]:
    """A bare-metal guest that has set its balloon up; skips where its accelerator does not work."""
    usable(changes.get("accel", ""))
    with memory.memory_files("source", "destination") as files:
        changes = {"trace": "free_page_hint_*", "mem_file": files[0], **changes}
        source = lab.launch(spec().but(**changes), "source")
        machine = Machine(source)
        machine.wait_ready()
        balloon = Balloon(machine)
        balloon.start(features)
        yield Metal(lab, source, machine, balloon, (files[0], files[1]))


@contextlib.contextmanager
def written_metal(lab: Lab, features: int = Balloon.OURS, **changes: Any) -> Iterator[Metal]:
    """The same, and it has written all parts of its memory."""
    with metal(lab, features, **changes) as guest:
        guest.write_all()
        yield guest


# Stock QEMU does not wait for the guest in round 0.
STOCK_HELD = MigrationSpec(parameters={"max-bandwidth": HELD, "downtime-limit": DOWNTIME_MS})


def held(**capabilities: bool) -> MigrationSpec:
    """A migration that waits for the guest in round 0, and stays in round 1 until it is let go."""
    waits = STOCK_HELD.with_parameters(free_page_hint_wait=WAIT_MS)
    return waits.with_capabilities(**capabilities)


# A migration that nobody receives.
TO_NOWHERE = "exec:cat > /dev/null"
# What a new QEMU asks with first.
FIRST_ID = 0x80000001


def set_up(source: Guest, **parameters: Any) -> None:
    """Set for all migrations what start() sets for one."""
    set_capabilities(source, {"events": True})
    source.qmp_dict("migrate-set-parameters", dict(held().with_parameters(**parameters).parameters))


def let_go(source: Guest, destination: Guest) -> MigrationResult:
    """Let a migration that was held complete."""
    source.qmp("migrate-set-parameters", max_bandwidth=0, downtime_limit=2000)
    return finish(source, destination)


def ask_meanwhile(guest: Guest, seconds: float) -> float:
    """Let some time pass, and QEMU answer all the while; returns its longest answer, in ms."""
    longest = 0.0
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        asked = time.monotonic()
        assert guest.qmp("query-status")["running"]
        longest = max(longest, time.monotonic() - asked)
    return longest * 1000


def wait_hinted(source: Guest, hinted_bytes: int, seconds: float = 10) -> Hints:
    """Wait until what the guest was told to hint has been applied, but not for ever."""
    deadline = time.monotonic() + seconds
    while (hints := hints_now(source)).hinted_bytes < hinted_bytes and time.monotonic() < deadline:
        time.sleep(0.01)
    return hints


def assert_counters_match(source: Guest) -> None:
    """At each sync, as many pages were counted dirty as bits were set."""
    lines = source.trace_log.read_text().splitlines()
    checks = [line.split() for line in lines if line.startswith(CHECK_EVENT)]
    assert len(checks) >= 2
    assert all(words[2] == words[4] for words in checks), checks


def addrs_of(part: str) -> List[int]:
    """The first strip of a part, as blocks of a page."""
    return [strips(part)[0] + i * PAGE for i in range(STRIP_PAGES)]


def lost_strips(guest: Metal) -> List[str]:
    """The parts whose first strip did not arrive."""
    return [part for part in PARTS if guest.lost(part, addrs=addrs_of(part))]


def let_go_but_free(guest: Metal, destination: Guest) -> Hints:
    """Let a migration complete: of the first strips, all arrive but the one of "free"."""
    result = let_go(guest.source, destination)
    assert lost_strips(guest) == ["free"]
    assert_counters_match(guest.source)
    return hints_of(result)
