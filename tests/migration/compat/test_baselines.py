# SPDX-License-Identifier: GPL-2.0-or-later
"""Guests move between the versions of QEMU that there are patches for, in both directions."""

from typing import Any, Dict, Tuple

import pytest

from livemig import paths, workload
from livemig.checks import FREED_MIB, MIB, SMALL, WITH_HINTS, assert_hints_used, assert_intact
from livemig.checks import assert_whole, finish_postcopy, hints_now, keep_busy, switch_early
from livemig.errors import MissingArtifact
from livemig.lab import Lab
from livemig.migration import migrate

pytestmark = pytest.mark.integrity

OLD, NEW = "ours", "ours-10.2"
# The newest machine type that both know.
GUEST = SMALL.but(machine="pc-q35-10.0")
# Versions of the source and of the destination, and more capabilities
POSTCOPY: Dict[str, Tuple[str, str, Dict[str, bool]]] = {
    f"{source}-{destination}": (source, destination, {})
    for source in (OLD, NEW)
    for destination in (OLD, NEW)
}
# Where multifd and postcopy can be on together
POSTCOPY["multifd"] = (NEW, NEW, {"multifd": True})
POSTCOPY["multifd-preempt"] = (NEW, NEW, {"multifd": True, "postcopy-preempt": True})


@pytest.fixture(autouse=True)
def built() -> None:
    """Not everybody builds several versions."""
    for build in (OLD, NEW):
        try:
            paths.qemu_binary(build)
        except MissingArtifact as err:
            pytest.skip(str(err))


@pytest.mark.parametrize("qemu", [OLD, NEW])
def test_version(lab: Lab, qemu: str) -> None:
    """The premise: the builds are of the versions that they are named after."""
    version = lab.launch(GUEST.but(qemu=qemu), qemu).qmp("query-version")["qemu"]
    assert (version["major"], version["minor"]) == ((10, 0) if qemu == OLD else (10, 2))


def test_there_and_back(lab: Lab, measured: Dict[str, Any]) -> None:
    """A guest with arrays moves to another version and back; both skip what it hints."""
    here = keep_busy(lab.boot(GUEST.but(qemu=OLD)))
    for number, qemu in enumerate((NEW, NEW, OLD)):
        there = lab.incoming(here.spec.but(qemu=qemu), f"{number}-{qemu}")
        result = migrate(here, there, WITH_HINTS)
        measured[there.name] = assert_hints_used(result, FREED_MIB * MIB).skipped_bytes
        assert_whole(there)
        workload.dirty_and_free(there, FREED_MIB)
        here.close()
        here = there


@pytest.mark.parametrize("way", POSTCOPY)
def test_postcopy(lab: Lab, measured: Dict[str, Any], way: str) -> None:
    """Hinted pages can be used after a switch to postcopy, whatever version is on either side.

    A busy guest is switched when hints are there and little was sent; no write is lost.
    """
    here, there, common = POSTCOPY[way]
    source = keep_busy(lab.boot(GUEST.but(qemu=here)))
    destination = lab.incoming(source.spec.but(qemu=there))
    switch_early(source, destination, common)
    result = finish_postcopy(source, destination)
    assert (result.raw["ram"]["multifd-bytes"] > 0) == common.get("multifd", False)
    hints = assert_hints_used(result, FREED_MIB * MIB)
    measured.update(skipped=hints.skipped_bytes, requested=hints.requested_bytes)
    assert_whole(destination)
    # The guest takes back what was hinted, and works on.
    workload.dirty_and_free(destination, FREED_MIB)
    assert_intact(destination)


def test_monitor_says_what_hints_did(lab: Lab) -> None:
    """A plain "info migrate" shows what became of hints, also where it has more with -a."""
    source = keep_busy(lab.boot(GUEST.but(qemu=NEW, skip_absent=True)))
    destination = lab.incoming(source.spec)
    migrate(source, destination, WITH_HINTS)
    said = source.hmp("info migrate")
    skipped = hints_now(source).skipped_bytes // 1024
    assert f"free pages skipped: {skipped} kbytes" in said
    assert "free page hints: ended" in said
    assert "absent pages" in said
