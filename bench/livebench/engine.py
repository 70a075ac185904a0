# SPDX-License-Identifier: GPL-2.0-or-later
"""One run: guests are booted, moved and checked; the result says all about itself."""

import contextlib
import mmap
import re
import time
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, Dict, Iterator, List, Optional

from livebench import floor, hostinfo, postcopy, swap
from livebench.console import Console
from livebench.disks import attached
from livebench.scenarios import Scenario
from livebench.throughput import Span
from livemig import host, migration, paths, workload
from livemig.errors import LivemigError
from livemig.guest import Guest
from livemig.migration import MigrationResult
from livemig.modes import ORDER, Mode
from livemig.spec import DOWNTIME_LIMIT_MS, UNLIMITED, GuestSpec, MigrationSpec

FORMAT = 2
# Words for the kernels of all guests. Where the host stops a vCPU's thread between two clocks, a
# guest under TCG takes its TSC for unstable and reads the HPET from then on: ten times as slow for
# a program that looks at the clock all the time, and another machine than the run before had.
CMDLINE = ("no_timer_check", "tsc=nowatchdog")
INIT_ON_ALLOC = "init_on_alloc=1"
CLOCKSOURCE = "/sys/devices/system/clocksource/clocksource0/current_clocksource"
# How often a migration is looked at: more often at first, where a short one would be over.
SAMPLE_SECONDS = 0.05
FIRST_SAMPLE_SECONDS = 0.02
FIRST_SECONDS = 0.5
TIMEOUT_SECONDS = 900

# Reporting covers a sixteenth of the free memory every two seconds, and is quiet when the source's
# memory has stopped shrinking. An idle guest has nothing to give back: it gets the time too.
SETTLE_SECONDS = 34
QUIET_SECONDS = 6
QUIET_MIB = 2

DEBUGFS = "/sys/kernel/debug/virtio_balloon_hint"
TRACEFS = "/sys/kernel/tracing"
END_EVENT = f"{TRACEFS}/events/virtio_balloon_hint/virtio_balloon_hint_end/enable"
# How long the last report took; kernels of ours say so in a trace from the first look on.
LAST_NS = f"sed -n 's/.*hint_end: .* ns=\\([0-9]*\\) .*/last_ns \\1/p' {TRACEFS}/trace | tail -n 1"

# What workloads report besides the rates of each phase.
FIGURES = (
    *("compile_s", "stall_before_ms", "stall_ms", "slowest_touch_ms"),
    *("after10_rate", "after10_kept", "refaulted_pages", "again_s", "cached_s"),
)


@dataclass
class Pair:
    """A guest and where it goes."""

    spec: GuestSpec
    source: Guest
    console: Console
    # Where its source can be swapped to, if that is wanted.
    room: Optional[swap.Room] = None
    destination: Optional[Guest] = None
    command_lines: Optional[Dict[str, List[str]]] = None

    @property
    def there(self) -> Guest:
        """The destination, once there is one."""
        if not self.destination:
            raise LivemigError(f"{self.source.name} has no destination yet")
        return self.destination


def check_memory(scenario: Scenario) -> None:
    """Stop before the host runs out of memory."""
    host.check_memory(sum(scenario.host_mib), scenario.name)


def migration_spec(scenario: Scenario, mode: Mode) -> MigrationSpec:
    """How the guests of a scenario are moved."""
    parameters: Dict[str, Any] = {
        "max-bandwidth": scenario.gbit * 10**9 // 8 or UNLIMITED,
        "downtime-limit": DOWNTIME_LIMIT_MS,
    }
    if scenario.multifd:
        parameters["multifd-channels"] = scenario.multifd
    if scenario.compression:
        parameters["multifd-compression"] = scenario.compression
    common = {"multifd": True} if scenario.multifd else {}
    if scenario.postcopy is not None:
        parameters.update(postcopy.parameters(scenario.postcopy))
        common["postcopy-ram"] = True
    parameters.update(mode.parameters)
    return MigrationSpec(mode.capabilities, parameters, common)


def guest_spec(scenario: Scenario, mode: Mode) -> GuestSpec:
    """The guests of a scenario, but for their disks."""
    words = list(CMDLINE)
    if scenario.init_on_alloc:
        words.append(INIT_ON_ALLOC)
    if scenario.reporting_order is not None:
        words.append(f"{ORDER}={scenario.reporting_order}")
    return mode.spec(
        GuestSpec(
            mem_mib=scenario.mem_mib,
            vcpus=scenario.vcpus,
            cmdline=tuple(words),
            mem_backend=f"memory-backend-{scenario.backend}",
            wrapper=() if scenario.huge_pages else host.NO_HUGE_PAGES,
        )
    )


def _command_line(guest: Guest) -> List[str]:
    """Without what differs from one machine to the next."""
    words = Path(f"/proc/{guest.pid}/cmdline").read_text(encoding="utf-8").split("\0")[:-1]
    for path, name in (
        (str(paths.cache_dir()), "$FPH_CACHE"),
        (str(paths.REPO), "."),
        (str(Path.home()), "~"),
    ):
        words = [word.replace(path, name) for word in words]
    return [re.sub(r"/proc/\d+/fd/", "/proc/self/fd/", word) for word in words]


@contextlib.contextmanager
def _booted(scenario: Scenario, mode: Mode, logs: Path) -> Iterator[List[Pair]]:
    """The guests of a scenario, each in the state to be migrated but for what runs."""
    spec = guest_spec(scenario, mode)
    kind = floor.FloorGuest if mode.floor else Guest
    with contextlib.ExitStack() as stack:
        # It goes when the guests have ended: else all would be swapped in for it.
        room = stack.enter_context(swap.room(scenario.host_mib[0])) if scenario.swapped else None
        pairs = []
        for number in range(scenario.guests):
            own = stack.enter_context(attached(spec, scenario.workload))
            console = Console()
            launched = floor.traced(own) if mode.floor else own
            if room:
                launched = launched.but(wrapper=(*launched.wrapper, *room.wrapper))
            source = kind(launched, f"source-{number}", logs=logs, listener=console.listener())
            pairs.append(Pair(own, stack.enter_context(source), console, room))
        for pair in pairs:
            pair.source.wait_ready(scenario.workload.boot_seconds)
        for pair in pairs:
            scenario.workload.prepare(pair.source)
        for number, pair in enumerate(pairs):
            pair.destination = stack.enter_context(
                Guest(
                    pair.spec,
                    f"destination-{number}",
                    logs=logs,
                    incoming=True,
                    running=not mode.floor,
                    listener=pair.console.listener(),
                )
            )
            pair.command_lines = {
                "source": _command_line(pair.source),
                "destination": _command_line(pair.there),
            }
        yield pairs


def settle(guest: Guest) -> float:
    """Wait until free page reporting is quiet; returns how long that took."""
    start = time.monotonic()
    least, since = host.process_mib(guest.pid), start
    while (now := time.monotonic()) < max(start + SETTLE_SECONDS, since + QUIET_SECONDS):
        if (rss := host.process_mib(guest.pid)) < least - QUIET_MIB:
            least, since = rss, now
        time.sleep(0.5)
    return time.monotonic() - start


def guest_facts(guest: Guest) -> Dict[str, Any]:
    """What the guest says of its memory, of its hints and of its clock."""
    blocks = workload.buddyinfo(guest)
    pages = [count << order for order, count in enumerate(blocks)]
    info = workload.meminfo(guest)
    files = guest.agent.run(
        f"for f in {DEBUGFS}/*/*; do [ ! -e $f ] || echo ${{f##*/}} $(cat $f); done;"
        f" if [ -e {END_EVENT} ]; then echo 1 > {END_EVENT}; {LAST_NS}; fi"
    )
    return {
        "free_blocks": blocks,
        "max_order_share": pages[-1] / sum(pages),
        "free_max_order_mib": pages[-1] // 256,
        "meminfo_mib": {key: info[key] for key in ("MemTotal", "MemFree", "MemAvailable")},
        "hint": {line.split()[0]: int(line.split()[1]) for line in files.split("\n") if line},
        "kernel": guest.agent.run("uname -r").strip(),
        "clocksource": guest.agent.run(f"cat {CLOCKSOURCE}").strip(),
    }


def _sample(result: MigrationResult, since: float) -> Dict[str, Any]:
    ram = result.raw.get("ram", {})
    return {
        "ms": round((time.monotonic() - since) * 1000),
        "round": result.rounds,
        "normal": result.normal_pages,
        "zero": result.zero_pages,
        "sent": result.sent_bytes,
        "left": ram.get("remaining", 0),
    }


def _move(pairs: List[Pair], spec: MigrationSpec, after_round: Optional[int]) -> Dict[str, Any]:
    """Migrate all guests at once; returns when they run at their destinations.

    And, if they are switched to postcopy after a round, when they have all of their memory.
    """
    for pair in pairs:
        if spec.common.get("multifd"):
            multifd = {k: v for k, v in spec.parameters.items() if k.startswith("multifd-")}
            pair.there.qmp_dict("migrate-set-parameters", multifd)
    begin = time.monotonic()
    for pair in pairs:
        migration.start(pair.source, pair.there, spec)
    samples: List[List[Dict[str, Any]]] = [[] for _ in pairs]
    running = list(range(len(pairs)))
    switch: Optional[float] = None
    switched: Dict[int, MigrationResult] = {}
    ended = begin
    while running:
        for number in list(running):
            result = migration.query(pairs[number].source)
            samples[number].append(_sample(result, begin))
            if after_round is not None and number not in switched:
                if postcopy.due(after_round, result):
                    switch = time.monotonic()
                    pairs[number].source.qmp("migrate-start-postcopy")
                    switched[number] = result
            if result.status in migration.ENDED:
                running.remove(number)
                ended = time.monotonic()
        if running:
            seconds = time.monotonic() - begin
            if seconds > TIMEOUT_SECONDS:
                raise LivemigError(f"the migration does not end within {TIMEOUT_SECONDS} s")
            early = seconds < FIRST_SECONDS or (after_round is not None and not switched)
            time.sleep(FIRST_SAMPLE_SECONDS if early else SAMPLE_SECONDS)
    results = [migration.finish(pair.source, pair.there) for pair in pairs]
    return {
        "span": Span(begin, ended, switch),
        "results": results,
        "samples": samples,
        "all_ms": round((ended - begin) * 1000),
        "postcopy": [
            postcopy.outcome(pairs[number].source, pairs[number].there, before)
            for number, before in switched.items()
        ],
    }


def _rss(pairs: List[Pair]) -> Dict[str, float]:
    return {
        "source": sum(host.process_mib(pair.source.pid) for pair in pairs),
        "destination": sum(host.process_mib(pair.there.pid) for pair in pairs),
    }


def _verify(scenario: Scenario, pairs: List[Pair]) -> List[workload.Verdict]:
    """What the guests say about their memory at their destinations."""
    return [workload.verify(p.there, name) for p in pairs for name in scenario.workload.stamps]


def header(scenario: Scenario, mode: Mode, index: int) -> Dict[str, Any]:
    """What a run says of itself before it is made."""
    return {
        "format": FORMAT,
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "scenario": {
            **asdict(scenario),
            "name": scenario.name,
            "about": scenario.about,
            "workload": {"name": scenario.workload.name, **asdict(scenario.workload)},
        },
        "mode": asdict(mode),
        "index": index,
        "host": hostinfo.facts(),
        "versions": hostinfo.versions(mode.qemu, scenario.workload.kernel or mode.kernel),
    }


def run(scenario: Scenario, mode: Mode, index: int, logs: Path) -> Dict[str, Any]:
    """Make one run; returns its result."""
    check_memory(scenario)
    record = header(scenario, mode, index)
    begin = time.monotonic()
    with _booted(scenario, mode, logs) as pairs:
        if mode.settle:
            record["settle_s"] = [settle(pair.source) for pair in pairs]
        record["guest_before"] = [guest_facts(pair.source) for pair in pairs]
        for pair in pairs:
            scenario.workload.start(pair.source, pair.console)
        # Until the destinations want it: what is free grows cold.
        with host.warmed(max(scenario.host_mib)):
            time.sleep(scenario.workload.lead)
            record["swapped"] = [
                asdict(pair.room.swap_out(pair.source)) for pair in pairs if pair.room
            ]
            rss_before = _rss(pairs)
            if mode.floor:
                record["floor"] = [
                    floor.compute(pair.source)
                    for pair in pairs
                    if isinstance(pair.source, floor.FloorGuest)
                ]
        swapped_in = swap.pages_in()
        moved = _move(pairs, migration_spec(scenario, mode), scenario.postcopy)
        record["swapped_in_pages"] = swap.pages_in() - swapped_in
        record["rss_mib"] = {"before": rss_before, "after": _rss(pairs)}
        if scenario.backend == "memfd":
            record["memfd_mib"] = sum(hostinfo.memfd_mib(pair.there.pid) for pair in pairs)
        wrong: List[str] = []
        if not mode.floor:
            record["workload"] = [
                scenario.workload.finish(pair.there, pair.console, moved["span"]) for pair in pairs
            ]
            verdicts = _verify(scenario, pairs)
            wrong = [verdict.first for verdict in verdicts if not verdict.good]
            record["verified_pages"] = sum(verdict.pages for verdict in verdicts)
            record["checked_pages"] = sum(verdict.checked for verdict in verdicts)
            record["guest_after"] = [guest_facts(pair.there) for pair in pairs]
        for pair in pairs:
            wrong += pair.source.kernel_trouble() + pair.there.kernel_trouble()
        record["command_lines"] = pairs[0].command_lines
        record["parameters"] = pairs[0].source.qmp("query-migrate-parameters")
    record["migration"] = [result.raw for result in moved["results"]]
    record["samples"] = moved["samples"]
    record["all_ms"] = moved["all_ms"]
    record["postcopy"] = moved["postcopy"]
    # Nothing runs at the floor's destination.
    record["verified"] = None if mode.floor else not wrong
    record["wrong"] = wrong
    record["seconds"] = round(time.monotonic() - begin, 1)
    record["metrics"] = metrics(record)
    return record


def _total(record: Dict[str, Any]) -> int:
    """The time until the last guest had moved."""
    raw = record["migration"]
    return int(raw[0]["total-time"]) if len(raw) == 1 else int(record["all_ms"])


def _swap_metrics(record: Dict[str, Any]) -> Dict[str, float]:
    """What the host swapped in during the migration; reading ahead counts."""
    if not record.get("swapped"):
        return {}
    swapped_in = record["swapped_in_pages"] * mmap.PAGESIZE / 2**20
    free = sum(facts["meminfo_mib"]["MemFree"] for facts in record["guest_before"])
    used = record["scenario"]["guests"] * record["scenario"]["mem_mib"] - free
    return {
        "swapped_out_mib": sum(where["swapped_mib"] for where in record["swapped"]),
        "swapped_in_mib": swapped_in,
        # Of what is not free.
        "swapped_in_share": swapped_in / used,
    }


def _absent_metrics(record: Dict[str, Any], results: List[MigrationResult]) -> Dict[str, float]:
    """What was absent, and what it took to find that out, if anybody looked."""
    found = [result.absent for result in results if result.absent and result.absent.scan_time]
    if not found:
        return {}
    absent = sum(item.absent_bytes for item in found) / 2**20
    scan = max(item.scan_time for item in found) / 1000
    hints = [result.hints for result in results if result.hints]
    whole = record["scenario"]["guests"] * record["scenario"]["mem_mib"]
    return {
        "absent_mib": absent,
        "absent_share": absent / whole,
        "scan_ms": scan,
        "scan_share": scan / _total(record) if _total(record) else 0,
        "redirtied_mib": sum(hint.redirtied_bytes for hint in hints) / 2**20,
    }


def metrics(record: Dict[str, Any]) -> Dict[str, float]:
    """The figures of a run that are compared: sums and maxima over its guests."""
    results = [MigrationResult.from_qmp(raw) for raw in record["migration"]]
    values: Dict[str, Optional[float]] = {
        "total_ms": _total(record),
        "downtime_ms": max(result.downtime_ms for result in results),
        "sent_mib": sum(result.sent_bytes for result in results) / 2**20,
        "normal_pages": sum(result.normal_pages for result in results),
        "zero_pages": sum(result.zero_pages for result in results),
        "rounds": max(result.rounds for result in results),
        "free_mib": sum(facts["meminfo_mib"]["MemFree"] for facts in record["guest_before"]),
        "free_max_order_mib": sum(facts["free_max_order_mib"] for facts in record["guest_before"]),
        "memfd_destination_after_mib": record.get("memfd_mib"),
    }
    for outcome in record.get("postcopy", [])[:1]:
        values.update(outcome)
    rss = record["rss_mib"]
    for when in "before", "after":
        for side, mib in rss[when].items():
            values[f"rss_{side}_{when}_mib"] = mib
    values["rss_source_growth_mib"] = rss["after"]["source"] - rss["before"]["source"]
    values.update(_swap_metrics(record))
    values.update(_absent_metrics(record, results))
    hints = [result.hints for result in results if result.hints]
    if hints and not record["mode"]["floor"] and all(hint.blocks for hint in hints):
        values.update(
            arm_ms=max(hint.arm_time for hint in hints) / 1000,
            ask_to_first_ms=max(hint.ask_to_first for hint in hints) / 1000,
            ask_to_end_ms=max(hint.ask_to_end for hint in hints) / 1000,
            hinted_mib=sum(hint.hinted_bytes for hint in hints) / 2**20,
            redirtied_mib=sum(hint.redirtied_bytes for hint in hints) / 2**20,
            requested_mib=sum(hint.requested_bytes for hint in hints) / 2**20,
            hint_blocks=sum(hint.blocks for hint in hints),
            # One bit for each page, while the migration runs.
            qemu_hint_mib=record["scenario"]["guests"] * record["scenario"]["mem_mib"] / 4096 / 8,
        )
        if freed := sum(hint.cache_freed_bytes for hint in hints) / 2**20:
            time_ms = max(hint.cache_time for hint in hints) / 1000
            values.update(
                cache_freed_mib=freed,
                cache_ms=time_ms,
                cache_gib_s=freed / 1024 / time_ms * 1000 if time_ms else None,
            )
    after = [facts["hint"] for facts in record.get("guest_after", []) if facts["hint"]]
    if after and any(hint["reports"] for hint in after):
        # Earlier kernels of ours timed each hold, traced or not.
        holds = [hint["max_hold_ns"] for hint in after if "max_hold_ns" in hint]
        values["max_hold_us"] = max(holds) / 1000 if holds else None
        walks = [hint["last_ns"] for hint in after if "last_ns" in hint]
        values["walk_ms"] = max(walks) / 1e6 if walks else None
    for result in record.get("workload", [])[:1]:
        for name in FIGURES:
            values[name] = result.get(name)
        for phase in "before", "during", "after", "window":
            for name, value in result.get(phase, {}).items():
                values[f"{phase}_{name}"] = value
    return {name: round(value, 4) for name, value in values.items() if value is not None}
