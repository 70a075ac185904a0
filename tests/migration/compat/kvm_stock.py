# SPDX-License-Identifier: GPL-2.0-or-later
"""An experiment: a stock Linux guest under KVM that runs short of memory while it hints.

The stock driver allocates each block that it hints, and its shrinker hands blocks back when memory
is short. One that is written again before QEMU has looked at its hint is not free any more, but
stock QEMU takes it for free: see "The lost write of upstream's hints" in docs/correctness.md. Here
nobody helps: no message is held up, and the host is as busy as it is. The guest boots once, and is
restored from a file for each try. FPH_TRIES says how many there are. By hand:

    scripts/build-kernel kvm-stock
    /usr/bin/python3 -m pytest -s tests/migration/compat/kvm_stock.py

What comes out is counted: hinted pages, those of them that were written again while the first round
went on, tries in which the guest found a page wrong, and such pages.
"""

import os
import time
from pathlib import Path
from typing import Any, Dict, Iterator

import pytest

from livemig import kvm, workload
from livemig.checks import FOR_STOCK
from livemig.lab import Lab
from livemig.machine import MIB, trouble_with_kvm
from livemig.migration import let_end, restore, save, start
from livemig.modes import MODES
from livemig.resident import Seen
from livemig.spec import BLOCKS, GuestSpec

TRIES = int(os.environ.get("FPH_TRIES", "10"))
# Taken in blocks of 4 MiB and written, given back, and taken again.
PRESSURE_MIB = 240
FREED_MIB = 300
# So slow that the first round goes on while the guest takes back what it has hinted.
SLOW = FOR_STOCK.with_parameters(max_bandwidth=8 * MIB, downtime_limit=1)
# For as long, in s.
PRESSED = 4
BALLOONS = {"stock": MODES["stock-hints"].balloon, "ours": BLOCKS}


def spec(qemu: str, shift: int = 18) -> GuestSpec:
    """The guest, in this QEMU."""
    chunks = ("-global", f"migration.x-clear-bitmap-shift={shift}")
    return kvm.spec(
        kernel="kvm-stock",
        vcpus=2,
        qemu=qemu,
        balloon=BALLOONS[qemu],
        args=chunks,
        skip_absent=False,
    )


@pytest.fixture(scope="module")
def saved(module_lab: Lab, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A guest that has booted, and takes and gives back memory, in a file."""
    if trouble := trouble_with_kvm():
        pytest.skip(trouble)
    file = tmp_path_factory.mktemp("saved") / "guest"
    guest = module_lab.boot(spec("stock"))
    workload.dirty_and_free(guest, FREED_MIB)
    workload.stamp(guest, 2, churn=True, realloc_mib=PRESSURE_MIB)
    save(guest, file, FOR_STOCK)
    guest.close()
    yield file
    file.unlink()


@pytest.mark.parametrize("shift", [6, 18])
@pytest.mark.parametrize("qemu", ["stock", "ours"])
def test_short_of_memory(
    lab: Lab, saved: Path, measured: Dict[str, Any], qemu: str, shift: int
) -> None:
    """A guest whose shrinker hands hinted blocks back loses nothing, unless QEMU is a stock one.

    No premise is asserted: how much is written again in time is what is to be found out.
    """
    measured.update(tries=TRIES, losing=0, lost=0, hinted=0, rewritten=0)
    for number in range(TRIES):
        source = lab.incoming(spec(qemu, shift), "source")
        restore(source, saved, FOR_STOCK)
        # Another moment in the guest's life each time.
        time.sleep(0.5 * number)
        destination = lab.incoming(spec(qemu, shift))
        before = Seen.reported_by(source)
        start(source, destination, SLOW)
        time.sleep(PRESSED)
        # What the guest did with hinted blocks in the first round
        seen = Seen.reported_by(source).since(before)
        let_end(source, destination)
        verdict = workload.verify(destination)
        measured["losing"] += verdict.errors > 0
        measured["lost"] += verdict.errors
        measured["hinted"] += seen.hinted
        measured["rewritten"] += seen.rewritten
        source.close()
        destination.close()
    print(measured)
    assert qemu == "stock" or not measured["lost"]
