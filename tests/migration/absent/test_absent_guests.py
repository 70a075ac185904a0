# SPDX-License-Identifier: GPL-2.0-or-later
"""Absent pages of guests that know nothing of us.

No guest takes part: without a balloon, with the drivers that every distribution has, or with no
Linux in it, what the host never populated is skipped, and the memory arrives as it was.
"""

import re
from typing import Any, Dict

import pytest

from livemig import paths, workload
from livemig.absence import ABSENT, ABSENT_AND_HINTS, assert_absent_used
from livemig.checks import SMALL, STAMP_MIB, assert_intact, assert_whole, fill_and_free, hints_now
from livemig.checks import hints_of, migrate_watched, start_churn, wait_for, watched
from livemig.guest import Guest
from livemig.host import process_mib
from livemig.lab import Lab
from livemig.machine import MIB
from livemig.memory import ram_bytes, usage
from livemig.migration import MigrationResult, let_end, migrate, start
from livemig.oracle import Oracle
from livemig.spec import BLOCKS, CPU, GuestSpec, MigrationSpec

BURST_MIB = 512
# Of what is not populated, nearly all is skipped: the guest populates more meanwhile.
NEARLY = 0.95


def never_populated(guest: Guest) -> int:
    """How much of a guest's private memory has no page behind it."""
    return ram_bytes(guest) - usage(guest)["Rss"]


def assert_moves(
    oracle: Oracle, measured: Dict[str, Any], spec: MigrationSpec = ABSENT_AND_HINTS
) -> MigrationResult:
    """Migrate: nearly all that the guest never populated is skipped, and no write is lost."""
    never = never_populated(oracle.source)
    result = migrate_watched(oracle, spec)
    absent = assert_absent_used(result, int(NEARLY * never))
    measured.update(never=never, absent=absent.absent_bytes, us=absent.scan_time)
    return result


def screen(guest: Guest) -> str:
    """All that was written to a screen, in order, without the movements of its cursor."""
    return re.sub(r"\x1b\[[\d;?]*[A-Za-z]", "", guest.console.text())


def wait_screen(guest: Guest, pattern: str, seconds: float = 120) -> None:
    """Wait until something is on a screen."""
    about = f"{guest.name}: no {pattern!r} on the screen"
    wait_for(lambda: re.search(pattern, screen(guest)) is not None, about, seconds)


def test_no_balloon(lab: Lab, measured: Dict[str, Any]) -> None:
    """A guest without a balloon, that works all the time, migrates without its untouched memory."""
    oracle, source = watched(lab, SMALL.but(kernel="stock", balloon=None, skip_absent=True))
    workload.stamp(source, STAMP_MIB)
    start_churn(source)
    result = assert_moves(oracle, measured)
    assert hints_of(result).reason == "no-device"
    # The premise: most of this guest is not there.
    assert measured["never"] > 0.5 * ram_bytes(source)
    assert_whole(oracle.destination)


def test_stock_reporting(lab: Lab, measured: Dict[str, Any]) -> None:
    """What a stock guest freed and reported, and the host took back, is not looked at."""
    guest = SMALL.but(kernel="stock", balloon="free-page-reporting=on", skip_absent=True)
    oracle, source = watched(lab, guest)
    before = never_populated(source)
    workload.dirty_and_free(source, BURST_MIB)
    wait_for(
        lambda: never_populated(source) > before - BURST_MIB * MIB // 10,
        "the guest does not report what it freed",
    )
    workload.stamp(source, STAMP_MIB)
    assert_moves(oracle, measured, ABSENT)
    measured["before"] = before
    # The premise: it was there once, and without what was given back the rest would be less.
    most = process_mib(source.pid, "VmHWM") * MIB
    assert most - usage(source)["Rss"] > BURST_MIB * MIB // 2
    assert measured["absent"] > before - BURST_MIB * MIB // 4
    assert_intact(oracle.destination)


def test_stopped(lab: Lab) -> None:
    """A guest that is stopped cannot be asked, and its absent pages are skipped all the same."""
    oracle, source = watched(lab, SMALL.but(skip_absent=True))
    fill_and_free(source)
    never = never_populated(source)
    source.qmp("stop")
    result = migrate_watched(oracle, ABSENT_AND_HINTS)
    # Nobody runs: it is exact.
    assert_absent_used(result, never)
    assert hints_of(result).reason == "vm-stopped"
    assert hints_of(result).skipped_bytes == 0
    assert_intact(oracle.destination)


def other_guest(program: str, *software: str, **changes: Any) -> GuestSpec:
    """A machine for a program, whose path {} stands for, with its console on a serial port."""
    path = paths.other_guest(program)
    words = tuple(word.format(path) for word in software)
    spec = GuestSpec(mem_mib=512, vcpus=1, balloon=None, software=words, skip_absent=True)
    return spec.but(**changes)


DRIVE = ("grub.img", "-drive", "file={},format=raw,if=virtio,readonly=on")
MENU = ("-boot", "menu=on,splash-time=60000")
# What runs; patterns of the console and what is typed at each, shorter than the BIOS's buffer; and
# what it says in the end. At the last pattern it is migrated.
OTHERS = {
    "seabios": ((*DRIVE, *MENU), [(r"Press ESC for boot menu", "\x1b")], r"Select boot device"),
    "ipxe": (
        ("ipxe.lkrn", "-kernel", "{}"),
        [(r"Press Ctrl-B", "\x02"), (r"iPXE>", "show version\r")],
        r"version\S* = 1\.",
    ),
    "grub": (
        DRIVE,
        [(r"will be executed automatically", "c"), (r"grub>", "echo $grub_cpu\r")],
        r"\ni386\b",
    ),
}


@pytest.mark.parametrize("name", OTHERS)
def test_firmware(lab: Lab, measured: Dict[str, Any], name: str) -> None:
    """A guest that is no more than firmware or a boot loader arrives whole, and answers there."""
    software, (*before, (until, keys)), answer = OTHERS[name]
    oracle = Oracle(lab, other_guest(*software, args=("-machine", "graphics=off")))
    source = oracle.start()
    for pattern, typed in before:
        wait_screen(source, pattern)
        source.console.send(typed)
    wait_screen(source, until)
    result = assert_moves(oracle, measured)
    assert hints_of(result).reason == "no-device"
    measured["normal"] = result.normal_pages
    assert measured["never"] > 0.9 * ram_bytes(source)
    oracle.destination.console.send(keys)
    wait_screen(oracle.destination, answer)


@pytest.mark.long
def test_memory_tester(lab: Lab, measured: Dict[str, Any]) -> None:
    """A tester that is writing and reading all memory while it migrates finds no error in it."""
    software = ("-kernel", "{}", "-append", "console=ttyS0,115200 nobench")
    # It measures the third cache at its start, which takes minutes under TCG.
    cpu = f"{CPU},l3-cache=off"
    oracle = Oracle(lab, other_guest("memtest.bin", *software, mem_mib=128, cpu=cpu))
    source = oracle.start()
    destination = oracle.arrival()
    wait_screen(source, r"Memtest86\+ v")
    # So slow that one page keeps it from being stopped, and that much is written in round 1.
    slow = ABSENT.with_parameters(max_bandwidth=2 * MIB, downtime_limit=1)
    start(source, destination, slow)
    # The premise: it had not come to all of its memory yet, and has now.
    wait_for(lambda: hints_now(source).redirtied_bytes > 0, "nothing is written")
    result = let_end(source, destination)
    absent = assert_absent_used(result, 16 * MIB)
    measured.update(absent=absent.absent_bytes, redirtied=hints_of(result).redirtied_bytes)
    oracle.check()
    # Some tests later; the last one alone lasts for minutes.
    wait_screen(destination, r"#6 +\[", 600)
    assert set(re.findall(r"Errors: +(\d+)", screen(destination))) == {"0"}


def test_debian_kernel(lab: Lab, measured: Dict[str, Any]) -> None:
    """Debian's kernel zeroes what its driver hints: it is not asked for long, and stays small."""
    spec = GuestSpec(mem_mib=2048, kernel="debian", balloon=BLOCKS, skip_absent=True)
    oracle, source = watched(lab, spec)
    source.agent.run("sh /lib/modules/debian/load")
    # The premise
    assert "heap alloc:on" in source.agent.run("dmesg | grep auto-init")
    workload.stamp(source, STAMP_MIB)
    before = usage(source)["Rss"]
    destination = oracle.arrival()
    result = migrate(source, destination, ABSENT_AND_HINTS)
    after = usage(source)["Rss"]
    measured.update(before=before, after=after, hinted=hints_of(result).hinted_bytes)
    assert hints_of(result).reason == "dirtied"
    assert after - before <= 64 * MIB
    assert_absent_used(result, 1024 * MIB)
    oracle.check()
    assert_intact(destination)
