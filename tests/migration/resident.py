# SPDX-License-Identifier: GPL-2.0-or-later
"""A Linux guest under KVM that stays for many tests, in whichever QEMU it is now.

It takes a minute or more to boot where its kernel is interpreted, so each test migrates it on, and
all that it was told to remember with it. A test that fails ends it: the next one boots another.
"""

import re
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Dict, Iterator, List, Mapping, Optional

import pytest
from checks import assert_hints_used, assert_intact, migration, wait_hints_ended, wait_rounds
from conftest import Lab
from oracle import Oracle

from livemig import kvm, memory, workload
from livemig.baremetal import trouble_with_kvm
from livemig.guest import Guest
from livemig.migration import MigrationResult, finish, start
from livemig.spec import GuestSpec

MIB = 1 << 20
PAGE = 4096

# What it does all the time: pages that are rewritten in turn, pages that are taken from the
# allocator and given back, and pages that it takes when they are about to be hinted.
STAMP_MIB = 4
CHURN_MIB = 2
REALLOC_MIB = 12
TAKE_MIB = 4
# Written and freed before each migration, and again when all was hinted.
FREED_MIB = 64
TAKEN_BACK_MIB = 16
# So slow that the guest rewrites something in each round.
BANDWIDTH = 16 * MIB
ROUNDS = 3

COUNTS = re.compile(r"^reports=(\d+) hinted=(\d+) taken=(\d+) rewritten=(\d+)$", re.MULTILINE)
HUGE = re.compile(r"^AnonHugePages:\s+(\d+) kB$", re.MULTILINE)


@dataclass(frozen=True)
class Seen:
    """What the guest says that it hinted, in pages since its boot."""

    reports: int
    hinted: int
    # Written after they were found free, and before the device was told.
    taken: int
    # Written after that.
    rewritten: int

    @classmethod
    def told_by(cls, guest: Guest) -> "Seen":
        """Ask the guest."""
        output = guest.agent.run("memstamp hints")
        match = COUNTS.search(output)
        assert match, output
        return cls(*map(int, match.groups()))

    def since(self, before: "Seen") -> "Seen":
        """The difference."""
        return Seen(
            self.reports - before.reports,
            self.hinted - before.hinted,
            self.taken - before.taken,
            self.rewritten - before.rewritten,
        )


# A source was a destination before: what another test has switched on is switched off.
PLAIN = {"postcopy-ram": False, "postcopy-preempt": False}


def busy_migration(
    common: Optional[Mapping[str, bool]] = None, hints: bool = True, **parameters: object
) -> Any:
    """A migration that does not end before it is told to."""
    limits = {"max_bandwidth": BANDWIDTH, "downtime_limit": 1, **parameters}
    spec = migration(hints=hints, **limits)
    return replace(spec, common={**PLAIN, **(common or {})})


class Resident:
    """The guest. Who has it, moves it."""

    def __init__(self, lab: Lab, spec: GuestSpec):
        self._lab = lab
        self._spec = spec
        self._oracle: Optional[Oracle] = None
        # How its QEMU differs from the spec, unless it has just booted.
        self._changes: Optional[Dict[str, Any]] = None

    @property
    def here(self) -> Guest:
        """Where it is."""
        assert self._oracle and self._oracle.source
        return self._oracle.source

    def _boot(self) -> None:
        self._changes = None
        self._oracle = Oracle(self._lab, self._spec)
        # It boots faster in a QEMU without sanitizers.
        self._oracle.source = self._lab.boot(self._spec.but(trace=memory.KEPT_EVENTS))
        workload.stamp(self.here, STAMP_MIB)
        self.here.agent.run(
            f"memstamp start --realloc {REALLOC_MIB} --take {TAKE_MIB} --name churn {CHURN_MIB}"
        )

    @contextmanager
    def living_in(self, **changes: Any) -> Iterator["Resident"]:
        """The guest, in a QEMU that differs from the spec in this way."""
        try:
            if not self._oracle:
                self._boot()
            if changes != self._changes:
                self._changes = changes
                self.arrival()
                start(self.here, self.there, migration(hints=False, downtime_limit=20000))
                finish(self.here, self.there)
                self.arrived()
            yield self
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """The end."""
        oracle, self._oracle = self._oracle, None
        if oracle:
            for guest in (oracle.source, oracle.destination):
                if guest:
                    guest.close()

    @property
    def there(self) -> Guest:
        """Where it goes."""
        assert self._oracle and self._oracle.destination
        return self._oracle.destination

    def arrival(self, running: bool = False) -> Guest:
        """Start a QEMU of the same kind for it to go to."""
        assert self._oracle and self._changes is not None
        return self._oracle.arrival(running=running, **self._changes)

    def arrived(self, compare: bool = True) -> int:
        """It is there: compare its memory, if it did not run yet; returns the pages kept back."""
        assert self._oracle
        kept = self._oracle.check().kept if compare else 0
        self._oracle.move_on()
        return kept

    def huge_mib(self) -> int:
        """How much of its memory is transparent huge pages of the host."""
        smaps = Path(f"/proc/{self.here.pid}/smaps_rollup").read_text(encoding="ascii")
        match = HUGE.search(smaps)
        assert match, smaps
        return int(match.group(1)) // 1024

    def assert_intact(self) -> List[workload.Verdict]:
        """The guest finds all that it has right."""
        return [assert_intact(self.here, name) for name in ("default", "churn")]

    def move(self, measured: Dict[str, Any], rounds: int = ROUNDS) -> MigrationResult:
        """Migrate it while it is at work, and prove the premises."""
        workload.dirty_and_free(self.here, FREED_MIB)
        before = Seen.told_by(self.here)
        self.arrival()
        # So slow that it is still there when the guest has used what it hinted.
        start(self.here, self.there, busy_migration(max_bandwidth=MIB))
        wait_hints_ended(self.here, 120)
        workload.dirty_and_free(self.here, TAKEN_BACK_MIB)
        self.here.qmp("migrate-set-parameters", max_bandwidth=BANDWIDTH)
        wait_rounds(self.here, rounds)
        self.here.qmp("migrate-set-parameters", downtime_limit=20000, max_bandwidth=0)
        result = finish(self.here, self.there)
        kept = self.arrived()
        verdicts = self.assert_intact()
        seen = Seen.told_by(self.here).since(before)
        hints = assert_hints_used(result, FREED_MIB // 2 * MIB)
        measured.update(
            ask_to_end=hints.ask_to_end,
            hinted=seen.hinted,
            kept=kept,
            redirtied=hints.redirtied_bytes // PAGE,
            rewritten=seen.rewritten,
            rounds=result.rounds,
            skipped=hints.skipped_bytes // PAGE,
            taken=seen.taken,
            verified=sum(verdict.pages for verdict in verdicts),
        )
        assert seen.reports == 1
        return result


@contextmanager
def residents(lab: Lab, *cmdline: str, **changes: Any) -> Iterator[Resident]:
    """A guest for a file's tests; skips them where KVM does not run programs."""
    trouble = trouble_with_kvm()
    if trouble:
        pytest.skip(trouble)
    resident = Resident(lab, kvm.spec(cmdline=(*kvm.CMDLINE, *cmdline), **changes))
    try:
        yield resident
    finally:
        resident.close()
