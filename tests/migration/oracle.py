# SPDX-License-Identifier: GPL-2.0-or-later
"""The oracle: what a migration may leave out, checked without knowledge of the guest.

Three checks in one: QEMU's debug build aborts at the source if a page that is still hinted when the
guest has stopped was written since the ask; the memory of source and destination is compared, and
only such pages may differ; the guest verifies its own pages, where a test asks it to.
"""

import contextlib
from typing import Optional

from conftest import Lab

from livemig import memory
from livemig.guest import Guest
from livemig.spec import GuestSpec


class Oracle(contextlib.ExitStack):
    """Watches one migration of a guest: boot() it, let it go to arrival(), then check()."""

    def __init__(self, lab: Lab, spec: GuestSpec):
        super().__init__()
        self._lab = lab
        self._spec = spec.but(qemu="debug", trace=memory.KEPT_EVENTS)
        self._files = self.enter_context(memory.memory_files("source", "destination"))
        self.source: Optional[Guest] = None
        self.destination: Optional[Guest] = None

    def boot(self) -> Guest:
        """Start the guest that is to be migrated."""
        self.source = self._lab.boot(self._spec.but(mem_file=self._files[0]))
        return self.source

    def arrival(self) -> Guest:
        """Start the QEMU that it goes to. The guest does not run there before check()."""
        self.destination = self._lab.incoming(
            self._spec.but(mem_file=self._files[1]), running=False
        )
        return self.destination

    def check(self) -> memory.Comparison:
        """After the migration: nothing is lost. Then the guest runs on at the destination."""
        assert self.source and self.destination
        result = memory.compare(*self._files, self.source.trace_log)
        assert not result.lost, f"pages differ that were not kept back on purpose: {result.lost}"
        self.destination.qmp("cont")
        return result
