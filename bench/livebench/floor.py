# SPDX-License-Identifier: GPL-2.0-or-later
"""The set of free pages that the floor is measured with.

The guest is asked once, in a migration to nowhere that is cancelled before it sends more than a few
pages, and told to report free blocks of all sizes. What it hinted is put into a file, in order and
with neighbours joined, and the QEMU of the mode "floor" applies that file in the migration that is
measured, in place of asking (bench/floor/free-page-hint-floor.patch).

Between the two the guest runs on, so that a few pages of the set are in use again: their contents
are not sent, unless they are written during the migration. So the destination stays stopped; and
the figure is a lower bound, if anything too low.
"""

import re
import time
from pathlib import Path
from typing import Dict, List, Tuple

from livemig.errors import LivemigError
from livemig.guest import Guest
from livemig.migration import Hints, cancel, query, set_capabilities

HINT_ORDER = "/sys/module/virtio_balloon_hint/parameters/hint_order"
# What the source of a measured migration traces: each run of pages, and the end.
EVENTS = "free_page_hint_apply free_page_hint_end"
APPLY = re.compile(
    r"^free_page_hint_apply block '([^']*)' first (0x[0-9a-f]+) pages (0x[0-9a-f]+)$", re.MULTILINE
)
END = re.compile(r"^free_page_hint_end ", re.MULTILINE)
WAIT_MS = 60000
# A migration at this rate stands still after its first pages. It is set in tenths of a second, and
# nothing per tenth would be no limit.
BYTES_PER_SECOND = 1000

Runs = Dict[str, List[Tuple[int, int]]]


class FloorGuest(Guest):
    """A guest whose migrations exclude the pages that the file `floor` names, once it exists.

    Its spec traces EVENTS.
    """

    @property
    def floor(self) -> Path:
        """The file."""
        return self.logs.absolute() / f"{self.name}-floor"

    def launch(self) -> None:
        self.floor.unlink(missing_ok=True)
        super().launch()

    def _wrapper(self) -> Tuple[str, ...]:
        return (*super()._wrapper(), "env", f"FPH_FLOOR={self.floor}")


def join(runs: Runs) -> Runs:
    """The same pages in order, neighbours joined: (first, pages) of each block."""
    joined: Runs = {}
    for block, unsorted in runs.items():
        result: List[Tuple[int, int]] = []
        for first, pages in sorted(unsorted):
            if result and first <= sum(result[-1]):
                before = result.pop()
                end = max(sum(before), first + pages)
                first, pages = before[0], end - before[0]
            result.append((first, pages))
        joined[block] = result
    return joined


def _traced(log: Path) -> Runs:
    deadline = time.monotonic() + WAIT_MS / 1000
    while not END.search(text := log.read_text(errors="replace") if log.exists() else ""):
        if time.monotonic() > deadline:
            raise LivemigError(f"{log} does not say which pages were hinted")
        time.sleep(0.01)
    runs: Runs = {}
    for block, first, pages in APPLY.findall(text):
        runs.setdefault(block, []).append((int(first, 0), int(pages, 0)))
    return runs


def _ask_only(guest: Guest) -> Hints:
    """Migrate to nowhere, until the guest has answered."""
    capabilities = {"free-page-hint": True, "skip-absent-pages": False}
    set_capabilities(guest, {"events": True, **capabilities})
    before = guest.qmp("query-migrate-parameters")
    guest.qmp("migrate-set-parameters", max_bandwidth=BYTES_PER_SECOND, free_page_hint_wait=WAIT_MS)
    guest.qmp("migrate", uri="exec:cat > /dev/null")
    deadline = time.monotonic() + 2 * WAIT_MS / 1000
    while (hints := query(guest).hints) is None or not (hints.reason or hints.state == "ended"):
        if time.monotonic() > deadline:
            raise LivemigError(f"{guest.name}: the guest did not report its free pages")
        time.sleep(0.005)
    cancel(guest)
    changed = ("max-bandwidth", "free-page-hint-wait")
    guest.qmp_dict("migrate-set-parameters", {name: before[name] for name in changed})
    return hints


def compute(guest: Guest) -> Dict[str, int]:
    """Make the file of a guest, a FloorGuest; returns how much is in it."""
    assert isinstance(guest, FloorGuest)
    order = guest.agent.run(f"cat {HINT_ORDER}").strip()
    guest.agent.run(f"echo 0 > {HINT_ORDER}")
    hints = _ask_only(guest)
    guest.agent.run(f"echo {order} > {HINT_ORDER}")
    if hints.state != "ended" or hints.reason:
        raise LivemigError(f"{guest.name}: no set of free pages: {hints.reason or hints.state}")
    runs = join(_traced(guest.trace_log))
    for event in EVENTS.split():
        guest.qmp("trace-event-set-state", name=event, enable=False)
    lines = [f"{block} {first} {pages}" for block, own in runs.items() for first, pages in own]
    if any(" " in block for block in runs) or not lines:
        raise LivemigError(f"{guest.name}: unexpected names of memory: {', '.join(runs)}")
    # Its name must not exist before it is complete.
    new = guest.floor.with_suffix(".new")
    new.write_text("\n".join(lines) + "\n", encoding="ascii")
    new.replace(guest.floor)
    return {
        "blocks": hints.blocks,
        "runs": len(lines),
        "bytes": 4096 * sum(pages for block in runs.values() for _, pages in block),
    }
