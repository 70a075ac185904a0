# SPDX-License-Identifier: GPL-2.0-or-later
"""The oracle: what a migration may leave out, checked without knowledge of the guest.

Three checks in one: QEMU's debug build aborts at the source if a page that is still hinted when the
guest has stopped was written since the ask; the memory of source and destination is compared, and
only such pages may differ; the guest verifies its own pages, where a test asks it to.

After postcopy, the memory can be compared only if the guest did not run at the destination in the
meantime. Where it did, which is what postcopy is for, the debug build's check at the source (what
is hinted when the guest has stopped is the same as without postcopy) and the guest itself have to
do. Nor is memory compared that does not lie in one file: several NUMA nodes, DIMMs and the like.

Control runs, with the same checks and hints switched off, are in test_memory_equal, test_churn,
test_postcopy, for each way to send in test_features, and, between stock QEMUs, in test_interop.
"""

import contextlib
from typing import Any, Optional

from conftest import Lab

from livemig import memory
from livemig.guest import Guest
from livemig.spec import GuestSpec


class Oracle(contextlib.ExitStack):
    """Watches migrations of a guest: boot() it, let it go to arrival(), then check().

    move_on() makes the destination the source of the next one.
    """

    def __init__(self, lab: Lab, spec: GuestSpec):
        super().__init__()
        self._lab = lab
        self._spec = spec
        self.source: Optional[Guest] = None
        self.destination: Optional[Guest] = None
        self._moves = 0
        # Each is closed with the guest that keeps its memory there.
        self._source_file = self.enter_context(contextlib.ExitStack())
        self._destination_file = self.enter_context(contextlib.ExitStack())
        # Where the source's trace log ended when the destination was started.
        self._log_start = 0

    def _watched(self, name: str, file: contextlib.ExitStack, changes: Any) -> GuestSpec:
        (path,) = file.enter_context(memory.memory_files(name))
        spec = self._spec.but(mem_file=path, **changes)
        if spec.qemu == "stock":
            return spec
        return spec.but(qemu="debug", trace=spec.trace or memory.KEPT_EVENTS)

    def boot(self, **changes: Any) -> Guest:
        """Start the guest that is to be migrated, which may differ from the destination."""
        spec = self._watched("source", self._source_file, changes)
        self.source = self._lab.boot(spec)
        return self.source

    def arrival(self, *, running: bool = False, **changes: Any) -> Guest:
        """Start the QEMU that it goes to, in the place of one that it did not reach.

        The guest does not run there before check(), unless it is told to.
        """
        assert self.source
        if self.destination:
            self.destination.close()
            self._destination_file.close()
        log = self.source.trace_log
        self._log_start = log.stat().st_size if log.exists() else 0
        self._moves += 1
        name = "destination" if self._moves == 1 else f"destination-{self._moves}"
        spec = self._watched("destination", self._destination_file, changes)
        self.destination = self._lab.incoming(spec, name, running=running)
        return self.destination

    def different(self) -> memory.Mask:
        """Which pages differ between source and destination."""
        assert self.source and self.source.spec.mem_file
        assert self.destination and self.destination.spec.mem_file
        return memory.different_pages(self.source.spec.mem_file, self.destination.spec.mem_file)

    def kept(self) -> memory.Mask:
        """Which pages the source kept back, as it says."""
        assert self.source and self.source.spec.mem_file
        pages = self.source.spec.mem_file.stat().st_size // memory.PAGE_BYTES
        return memory.kept_pages(self.source.trace_log, pages, self._log_start)

    def check(self, kept: Optional[memory.Mask] = None) -> memory.Comparison:
        """After the migration: nothing is lost. Then the guest runs on at the destination.

        If the source is stock, which does not say what it kept back, that has to be given.
        """
        assert self.destination
        result = memory.judge(self.different(), self.kept() if kept is None else kept)
        assert not result.lost, f"pages differ that were not kept back on purpose: {result.lost}"
        self.destination.qmp("cont")
        return result

    def move_on(self) -> Guest:
        """The guest is to be migrated again, from where it is now."""
        assert self.source and self.destination
        self.source.close()
        self._source_file.close()
        self.source, self.destination = self.destination, None
        self._source_file = self.enter_context(self._destination_file.pop_all())
        self._destination_file = self.enter_context(contextlib.ExitStack())
        return self.source
