# SPDX-License-Identifier: GPL-2.0-or-later
"""The oracle: what a migration may leave out, checked without knowledge of the guest.

Three checks in one: a build of QEMU with checks aborts at the source if a page that is still hinted
when the guest has stopped was written since the ask; all RAM of source and destination is compared,
and only such pages may differ, but not those that were absent; the guest verifies its own pages,
where a test asks it to.

After postcopy, the memory can be compared only if the guest did not run at the destination in the
meantime. Where it did, which is what postcopy is for, the check at the source (what is hinted when
the guest has stopped is the same as without postcopy) and the guest itself have to do.

Control runs, with the same checks and hints switched off, are in test_memory_equal, test_churn,
test_postcopy, for each way to send in test_features, and, between stock QEMUs, in test_interop.
"""

from typing import Any, Optional

from livemig import memory, paths
from livemig.guest import Guest
from livemig.lab import Lab
from livemig.spec import GuestSpec


class Oracle:
    """Watches migrations of a guest: boot() it, let it go to arrival(), then check().

    move_on() makes the destination the source of the next one.
    """

    def __init__(self, lab: Lab, spec: GuestSpec):
        self._lab = lab
        self._spec = spec
        self._source: Optional[Guest] = None
        self._destination: Optional[Guest] = None
        self._moves = 0
        # Where the source's trace log ended when the destination was started.
        self._log_start = 0

    @property
    def source(self) -> Guest:
        """Where the guest is."""
        assert self._source
        return self._source

    @property
    def destination(self) -> Guest:
        """Where it goes."""
        assert self._destination
        return self._destination

    def _watched(self, changes: Any) -> GuestSpec:
        spec = self._spec.but(**changes)
        if spec.qemu == "stock":
            return spec
        events = spec.trace or memory.KEPT_EVENTS
        # The build for arm64 has those checks, too.
        qemu = spec.qemu if paths.is_arm64(spec.qemu) else "checked"
        return spec.but(qemu=qemu, trace=f"{events} {memory.ABSENT_EVENT}")

    def boot(self, **changes: Any) -> Guest:
        """Start the guest that is to be migrated, which may differ from the destination."""
        return self.take(self._lab.boot(self._watched(changes)))

    def start(self) -> Guest:
        """Start a guest that does not say when it has booted."""
        return self.take(self._lab.launch(self._watched({}), "source"))

    def take(self, guest: Guest) -> Guest:
        """Watch a guest that somebody else has started."""
        self._source = guest
        return guest

    def arrival(self, *, running: bool = False, **changes: Any) -> Guest:
        """Start the QEMU that it goes to, in the place of one that it did not reach.

        The guest does not run there before check(), unless it is told to.
        """
        if self._destination:
            self._destination.close()
        log = self.source.trace_log
        self._log_start = log.stat().st_size if log.exists() else 0
        self._moves += 1
        name = "destination" if self._moves == 1 else f"destination-{self._moves}"
        self._destination = self._lab.incoming(self._watched(changes), name, running=running)
        return self._destination

    def check(self, kept: Optional[memory.Masks] = None) -> memory.Comparison:
        """After the migration: nothing is lost. Then the guest runs on at the destination.

        If the source is stock, which does not say what it kept back, that has to be given.
        """
        result = memory.compare(self.source, self.destination, start=self._log_start, kept=kept)
        if result.lost:
            blocks = [memory.ram_blocks(guest) for guest in (self.source, self.destination)]
            what = memory.describe(result.lost, *blocks)
            raise AssertionError(f"pages differ that were not kept back on purpose: {what}")
        self.destination.qmp("cont")
        return result

    def move_on(self) -> Guest:
        """The guest is to be migrated again, from where it is now."""
        self.source.close()
        self._source, self._destination = self.destination, None
        return self.source

    def close(self) -> None:
        """End the guests that there are."""
        for guest in (self._source, self._destination):
            if guest:
                guest.close()
