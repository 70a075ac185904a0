# SPDX-License-Identifier: GPL-2.0-or-later
"""What arming costs under KVM: to whom, and how much is sent because of it.

One guest is the bare-metal one. It writes to all of its memory, then to one page of it after
another, at a given rate, and notes the longest time in which it did not get on. It runs in user
mode, so that its writes are real ones, and its page faults too, also where KVM interprets what
kernels do. The other is Linux, and hints; it rewrites a part of its memory as fast as it can.
"""

import contextlib
import time
from pathlib import Path
from typing import Any, Dict, List, Mapping, Sequence, Tuple, Type, Union

from livebench import hostinfo
from livebench.store import write_json
from livemig import host, kvm, machine, paths, workload
from livemig.errors import LivemigError, NotPossibleHere
from livemig.guest import Guest
from livemig.machine import MIB, PAGE, Machine, trouble_with_kvm
from livemig.migration import MigrationResult, cancel, finish, query, start
from livemig.spec import GuestSpec, MigrationSpec

# Where the guest's program and its stack are not.
FIRST = 16 * MIB
# Of its memory, it does not write to this.
REST_MIB = 64
# So much is written in a second.
RATE_MIB = 20
# The Linux guest: what it has, what it writes to once, and all the time.
LINUX_MIB = 512
LINUX_STAMPED_MIB = 256
LINUX_CHURN_MIB = 64
CHURN = "churn"
# The log is cleared in chunks of 32 MiB: as many of 2 GiB as there are of 64 GiB by default.
CHUNKS = ("-global", "migration.x-clear-bitmap-shift=13")
# How long the guest is watched when its log is armed, and without a migration.
WATCH_SECONDS = 2.0
# Slow enough that nothing but arming happens to the guest meanwhile.
HELD_BACK = MIB
# What KVM counts when a guest's write or read has to wait for it.
FAULTS = "pf_taken"


# What the guest's memory is made of. That of "4k" has no transparent huge pages.
BACKINGS = {
    "4k": "memory-backend-ram",
    "thp": "memory-backend-ram",
    "memfd": "memory-backend-memfd,share=on",
    "hugetlb": "memory-backend-memfd,hugetlb=on,hugetlbsize=2M,share=off",
}

# What the source does first; QEMU before it deferred the clear again has the same switches.
OFF = {"free-page-hint": False, "skip-absent-pages": False}
ARMED = {"free-page-hint": False, "skip-absent-pages": True}
HINTS = {"free-page-hint": True, "skip-absent-pages": True}
LINUX = "linux"


def _faults(guest: Guest) -> int:
    """Page faults of all vCPUs that KVM had to look at."""
    return sum(
        stat["value"]
        for vcpu in guest.qmp("query-stats", target="vcpu")
        for stat in vcpu["stats"]
        if stat["name"] == FAULTS
    )


class MetalWriter:
    """The bare-metal guest, and its clock."""

    # The link, in a second; and what the guest can check at the destination.
    link_mib = 200
    stamps: Tuple[str, ...] = ()

    def __init__(self, guest: Guest):
        self.guest = guest
        self.machine = Machine(guest)
        self._pages = (guest.spec.mem_mib - REST_MIB) * MIB // PAGE
        self.machine.wait_ready()
        self.machine.stamp(FIRST, self._pages, 1)
        begin, ticks = time.monotonic(), self.machine.clock()
        time.sleep(1)
        passed = (self.machine.clock() - ticks) % (1 << 32) * machine.CLOCK_UNIT
        # What ends its writing.
        self._writing = 0
        self._hz = passed / (time.monotonic() - begin)

    def begin(self) -> None:
        """Let it write."""
        interval = int(self._hz / (RATE_MIB * MIB / PAGE))
        self._writing = self.machine.dirty(FIRST, self._pages, interval)

    def end(self) -> Tuple[int, float]:
        """How many pages it wrote, and for how long it did not get on, in ms."""
        written, ticks = self.machine.stop(self._writing)
        return written, ticks * machine.CLOCK_UNIT / self._hz * 1000


class LinuxWriter:
    """A Linux guest that rewrites a part of its memory as fast as it can, and has little free."""

    link_mib = 40
    stamps = ("default", CHURN)

    def __init__(self, guest: Guest):
        self.guest = guest
        guest.wait_ready()
        workload.stamp(guest, LINUX_STAMPED_MIB)
        workload.stamp(guest, LINUX_CHURN_MIB, churn=True, name=CHURN)

    def begin(self) -> None:
        """Forget what was; it writes in any case."""
        workload.gap(self.guest, CHURN)

    def end(self) -> Tuple[int, float]:
        """How many pages it wrote, and for how long it did not get on, in ms."""
        gap = workload.gap(self.guest, CHURN)
        return gap.pages, gap.longest_us / 1000


# A guest that writes all the time.
Writer = Union[MetalWriter, LinuxWriter]


def _how(capabilities: Mapping[str, bool], bandwidth: int) -> MigrationSpec:
    parameters = {"max-bandwidth": bandwidth, "downtime-limit": 300}
    return MigrationSpec(capabilities=capabilities, parameters=parameters)


def _wait_armed(source: Guest, has_round: bool) -> MigrationResult:
    """Round 0 is over, if there is one, and RAM is being sent.

    What is sent before round 0 counts as sent, too, and its state is "idle" until then.
    """
    while True:
        result = query(source)
        ended = not has_round or (result.hints and result.hints.state == "ended")
        if ended and result.sent_bytes:
            return result
        time.sleep(0.01)


def _watch(writer: Writer, there: Guest, capabilities: Mapping[str, bool]) -> Dict[str, float]:
    """What the guest sees of the beginning of a migration, which is cancelled then."""
    writer.begin()
    faults = _faults(writer.guest)
    start(writer.guest, there, _how(capabilities, HELD_BACK))
    result = _wait_armed(writer.guest, any(capabilities.values()))
    time.sleep(WATCH_SECONDS)
    faults = _faults(writer.guest) - faults
    written, gap_ms = writer.end()
    cancel(writer.guest)
    values = {"gap_ms": gap_ms, "faults": float(faults), "written": float(written)}
    if result.hints and result.hints.armed_bytes:
        gib = result.hints.armed_bytes / MIB / 1024
        values["arm_us_per_gib"] = result.hints.arm_time / gib
    return values


def _send(writer: Writer, there: Guest, capabilities: Mapping[str, bool]) -> Dict[str, float]:
    """What a whole migration sends."""
    writer.begin()
    start(writer.guest, there, _how(capabilities, writer.link_mib * MIB))
    result = finish(writer.guest, there)
    if not all(workload.verify(there, name).good for name in writer.stamps):
        raise LivemigError("the guest did not find its memory as it was")
    looked = {}
    if result.absent and result.absent.scan_time:
        looked["scan_ms"] = result.absent.scan_time / 1000
        looked["absent_mib"] = result.absent.absent_bytes / MIB
        looked["scan_percent"] = looked["scan_ms"] / result.total_ms * 100
    return {
        **looked,
        "sent_mib": result.sent_bytes / MIB,
        "pages": float(result.normal_pages),
        "rounds": float(result.rounds),
        "downtime_ms": float(result.downtime_ms),
        "total_ms": float(result.total_ms),
    }


def _run(
    spec: GuestSpec, kind: Type[Writer], capabilities: Mapping[str, bool], logs: Path
) -> Dict[str, float]:
    """One guest: watched without a migration, at the beginning of one, and migrated."""
    with Guest(spec, "source", logs=logs) as source:
        writer = kind(source)
        writer.begin()
        time.sleep(WATCH_SECONDS)
        values = {"gap_before_ms": writer.end()[1]}
        for part in (_watch, _send):
            with Guest(spec, "destination", logs=logs, incoming=True) as there:
                values.update(part(writer, there, capabilities))
    return values


def run_metal(
    name: str, set_mib: int, qemu: str, capabilities: Mapping[str, bool], logs: Path
) -> Dict[str, float]:
    """The bare-metal guest writes to @set_mib of its memory, made of what BACKINGS names."""
    spec = machine.spec(
        mem_mib=set_mib + REST_MIB,
        accel="kvm",
        args=CHUNKS,
        qemu=qemu,
        mem_backend=BACKINGS[name],
        preload=paths.bare_metal("no-huge-pages.so") if name == "4k" else None,
    )
    return _run(spec, MetalWriter, capabilities, logs)


def run_linux(qemu: str, capabilities: Mapping[str, bool], logs: Path) -> Dict[str, float]:
    """The Linux guest."""
    spec = kvm.spec(mem_mib=LINUX_MIB, qemu=qemu, args=CHUNKS)
    return _run(spec, LinuxWriter, capabilities, logs)


def ways(what: str, qemus: Sequence[str]) -> Dict[str, Tuple[str, Mapping[str, bool]]]:
    """What is compared: no round 0, and one, with each QEMU."""
    how = HINTS if what == LINUX else ARMED
    return {"off": (qemus[0], OFF), **{f"armed-{qemu}": (qemu, how) for qemu in qemus}}


def run(set_mib: int, runs: int, qemus: Sequence[str], out: Path) -> List[Dict[str, Any]]:
    """All of them, interleaved; a guest writes to @set_mib, a power of two.

    Raises NotPossibleHere where there is no KVM.
    """
    if trouble := trouble_with_kvm():
        raise NotPossibleHere(trouble)
    found: List[Dict[str, Any]] = []
    for index in range(1, runs + 1):
        for what in (*BACKINGS, LINUX):
            for way, (qemu, capabilities) in ways(what, qemus).items():
                logs = paths.OUT / "logs" / "bench" / f"arming-{what}-{way}-{index}"
                # Both sides, in pages of 2 MiB.
                huge = host.huge_pages(2048, set_mib + REST_MIB)
                with huge if what == "hugetlb" else contextlib.nullcontext():
                    if what == LINUX:
                        values = run_linux(qemu, capabilities, logs)
                    else:
                        values = run_metal(what, set_mib, qemu, capabilities, logs)
                found.append({"what": what, "way": way, "run": index, **values})
                print(f"bench: {what}, {way}, run {index}: {values['sent_mib']:.0f} MiB sent")
    write_json(out / "arming.json", [{"host": hostinfo.facts(), "set_mib": set_mib}, *found])
    return found
