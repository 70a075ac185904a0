# SPDX-License-Identifier: GPL-2.0-or-later
"""A Linux guest under KVM that stays for many tests, in whichever QEMU it is now.

It takes a minute or more to boot where its kernel is interpreted, so each test migrates it on, and
all that it was told to remember with it. A test that fails ends it: the next one boots another.
"""

import re
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, Dict, Iterator, List, Mapping, NamedTuple, Optional, Sequence

from livemig import host, kvm, memory, paths, workload
from livemig.checks import assert_hints_if, assert_intact, finish_postcopy, migration
from livemig.checks import wait_hints_ended, wait_requested, wait_rounds
from livemig.guest import Guest
from livemig.lab import Lab
from livemig.machine import MIB, PAGE
from livemig.metal import usable
from livemig.migration import MigrationResult, let_end, migrate, start
from livemig.oracle import Oracle
from livemig.spec import GuestSpec

# What it does all the time: pages that are rewritten in turn, pages that are taken from the
# allocator and given back, and pages that it takes when they are about to be hinted.
STAMP_MIB = 4
CHURN_MIB = 2
REALLOC_MIB = 12
TAKE_MIB = 4
# Written and freed before each migration, and again when all was hinted.
FREED_MIB = 64
TAKEN_BACK_MIB = 16
# So slow that a migration is still in its first round when the guest has used what it hinted.
HELD_BACK = MIB // 8
# So slow that the guest rewrites something in each round.
BANDWIDTH = 16 * MIB
ROUNDS = 3

COUNTS = re.compile(r"^reports=(\d+) hinted=(\d+) taken=(\d+) rewritten=(\d+)$", re.MULTILINE)


class Seen(NamedTuple):
    """What the guest says that it hinted, in pages since its boot."""

    reports: int
    hinted: int
    # Written after they were found free, and before the device was told.
    taken: int
    # Written after that.
    rewritten: int

    @classmethod
    def reported_by(cls, guest: Guest) -> "Seen":
        """Ask the guest."""
        output = guest.agent.run("memstamp hints")
        match = COUNTS.search(output)
        assert match, output
        return cls(*map(int, match.groups()))

    def since(self, before: "Seen") -> "Seen":
        """The difference."""
        return Seen(*(now - then for now, then in zip(self, before)))


def chunks(shift: int) -> Dict[str, Any]:
    """A QEMU that clears the log in chunks of so many pages, as a power of two."""
    return {"args": ("-global", f"migration.x-clear-bitmap-shift={shift}")}


NO_MANUAL_PROTECT = {"preload": "no-manual-protect.so", "qemu": "ours"}
ABSENT = {"skip_absent": True}
# How KVM logs, and what the guest's memory is made of. Not the ring, see test_kvm.
WAYS: Dict[str, Dict[str, Any]] = {
    "shift-18": chunks(18),
    "shift-6": chunks(6),
    "shift-31": chunks(31),
    "no-manual-protect": NO_MANUAL_PROTECT,
    "no-manual-protect-shift-6": {**NO_MANUAL_PROTECT, **chunks(6)},
    "small-pages": {"preload": "no-huge-pages.so"},
    "memfd": {"mem_backend": "memory-backend-memfd,share=on"},
    # Not of a memfd: comparing it populates it.
    "absent": ABSENT,
    "absent-shift-6": {**ABSENT, **chunks(6)},
}


# A source was a destination before: what another test has switched on is switched off.
PLAIN = {"postcopy-ram": False, "postcopy-preempt": False}


def busy_migration(
    common: Optional[Mapping[str, bool]] = None, hints: bool = True, **parameters: object
) -> Any:
    """A migration that does not end before it is told to."""
    limits = {"max_bandwidth": BANDWIDTH, "downtime_limit": 1, **parameters}
    return replace(migration(hints=hints, **limits), common=common or PLAIN)


class Resident(Oracle):
    """The guest, watched. Who has it, moves it."""

    # Where it is, and where it goes.
    here, there = Oracle.source, Oracle.destination

    def __init__(self, lab: Lab, spec: GuestSpec, busy: bool):
        super().__init__(lab, spec)
        # Whether it writes also what it is not told to.
        self._busy = busy
        # How its QEMU differs from the spec; None before it was migrated into one of tests.
        self._changes: Optional[Dict[str, Any]] = None

    def _boot(self) -> None:
        # It boots faster in a QEMU without sanitizers.
        self.take(self._lab.boot(self._spec.but(trace=memory.KEPT_EVENTS)))
        workload.stamp(self.here, STAMP_MIB)
        if self._busy:
            self.here.agent.run(
                f"memstamp start --realloc {REALLOC_MIB} --take {TAKE_MIB} --name churn {CHURN_MIB}"
            )

    @contextmanager
    def living_in(self, **changes: Any) -> Iterator["Resident"]:
        """The guest, in a QEMU that differs from the spec in this way."""
        try:
            if self._changes is None:
                self._boot()
            if changes != self._changes:
                self._changes = changes
                self.arrival()
                migrate(self.here, self.there, migration(hints=False, downtime_limit=20000))
                self.arrived()
            yield self
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """The end."""
        super().close()
        self._changes = None

    def arrival(self, *, running: bool = False, **changes: Any) -> Guest:
        """Start a QEMU of the same kind for it to go to."""
        changes = {**(self._changes or {}), **changes}
        if "preload" in changes:
            changes["preload"] = paths.bare_metal(changes["preload"])
        return super().arrival(running=running, **changes)

    def arrived(self, compare: bool = True) -> int:
        """It is there: compare its memory, if it did not run yet; returns the pages kept back."""
        kept = self.check().kept if compare else 0
        self.move_on()
        return kept

    def huge_mib(self) -> int:
        """How much of its memory is transparent huge pages of the host."""
        huge = host.field(f"/proc/{self.here.pid}/smaps_rollup", "AnonHugePages")
        assert huge, "smaps_rollup has no AnonHugePages"
        return int(huge.split()[0]) // 1024

    def assert_intact(self) -> List[workload.Verdict]:
        """The guest finds all that it has right."""
        return [assert_intact(self.here, name) for name in ("default", "churn")[: 1 + self._busy]]

    def _set_off(
        self,
        hints: bool,
        into: Optional[Dict[str, Any]],
        running: bool = False,
        freed_mib: int = FREED_MIB,
        **spec: Any,
    ) -> Seen:
        """Begin a migration that does not end yet; returns what was seen before."""
        workload.dirty_and_free(self.here, freed_mib)
        before = Seen.reported_by(self.here)
        if into is not None:
            self._changes = into
        self.arrival(running=running)
        start(self.here, self.there, busy_migration(hints=hints, max_bandwidth=HELD_BACK, **spec))
        if hints:
            wait_hints_ended(self.here, 120)
        return before

    def _has_come(
        self,
        asked: bool,
        result: MigrationResult,
        seen_before: Seen,
        measured: Dict[str, Any],
        freed_mib: int = FREED_MIB,
    ) -> None:
        """Look at what came, and count it. Of what was freed before, hints took out the most."""
        verdicts = self.assert_intact()
        seen = Seen.reported_by(self.here).since(seen_before)._asdict()
        assert seen.pop("reports") == int(asked)
        hints = assert_hints_if(asked, result, freed_mib // 2 * MIB)
        measured.update(
            seen,
            absent=result.absent.absent_bytes // PAGE if result.absent else 0,
            ask_to_end=hints.ask_to_end,
            redirtied=hints.redirtied_bytes // PAGE,
            requested=hints.requested_bytes // PAGE,
            rounds=result.rounds,
            skipped=hints.skipped_bytes // PAGE,
            verified=sum(verdict.pages for verdict in verdicts),
        )

    def move(
        self,
        measured: Dict[str, Any],
        hints: bool = True,
        into: Optional[Dict[str, Any]] = None,
        taken_back: Sequence[int] = (TAKEN_BACK_MIB,),
        rounds: int = ROUNDS,
        bandwidth: int = BANDWIDTH,
        freed_mib: int = FREED_MIB,
    ) -> MigrationResult:
        """Migrate it while it is at work, into a QEMU of the same kind, or of another one.

        Once all was hinted, it takes back so many MiB at a time.
        """
        before = self._set_off(hints, into, freed_mib=freed_mib)
        for mib in taken_back:
            workload.dirty_and_free(self.here, mib)
        self.here.qmp("migrate-set-parameters", max_bandwidth=bandwidth)
        wait_rounds(self.here, rounds)
        result = let_end(self.here, self.there)
        measured["kept"] = self.arrived()
        self._has_come(hints, result, before, measured, freed_mib)
        return result

    def move_in_postcopy(
        self,
        measured: Dict[str, Any],
        preempt: bool = False,
        hints: bool = True,
        into: Optional[Dict[str, Any]] = None,
    ) -> MigrationResult:
        """Migrate it so that it uses hinted pages at the destination while the rest comes.

        On a busy machine the rest is there first, at times: then it has requested none.
        """
        common = {"postcopy-ram": True, "postcopy-preempt": preempt}
        before = self._set_off(
            hints, into, running=True, common=common, max_postcopy_bandwidth=2 * MIB
        )
        self.here.qmp("migrate-start-postcopy")
        self.there.wait_event(lambda event: event["event"] == "RESUME", "postcopy", 60)
        # Nobody waits for the answer: its word is nobody's.
        self.there.agent.send(f"unheard dirtyfree {TAKEN_BACK_MIB}")
        if hints:
            wait_requested(self.here)
        result = finish_postcopy(self.here, self.there)
        self.arrived(compare=False)
        self._has_come(hints, result, before, measured)
        return result


@contextmanager
def residents(
    lab: Lab, cmdline: Sequence[str] = (), busy: bool = True, **changes: Any
) -> Iterator[Resident]:
    """A guest for a file's tests; skips them where KVM does not run programs."""
    usable("kvm")
    resident = Resident(lab, kvm.spec(cmdline=(*kvm.CMDLINE, *cmdline), **changes), busy)
    try:
        yield resident
    finally:
        resident.close()
