# SPDX-License-Identifier: GPL-2.0-or-later
"""One run: guests are booted, moved and checked; the result says all about itself."""

import contextlib
import mmap
import re
import time
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, Dict, Iterator, List, Optional, Tuple

from livebench import floor, hostinfo, postcopy, swap
from livebench.console import Console
from livebench.disks import attached
from livebench.scenarios import Scenario
from livebench.throughput import Span
from livemig import host, migration, paths, workload
from livemig.errors import LivemigError
from livemig.guest import Guest
from livemig.host import MIB
from livemig.migration import MigrationResult
from livemig.modes import ORDER, Mode
from livemig.spec import DOWNTIME_LIMIT_MS, UNLIMITED, GuestSpec, MigrationSpec

FORMAT = 2
# Words for the kernels of all guests. Where the host stops a vCPU's thread between two clocks, a
# guest under TCG takes its TSC for unstable and reads the HPET from then on: ten times as slow for
# a program that looks at the clock all the time, and another machine than the run before had.
CMDLINE = ("no_timer_check", "tsc=nowatchdog")
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


@dataclass(frozen=True)
class Pair:
    """A guest and where it goes."""

    source: Guest
    there: Guest
    console: Console
    # Where its source can be swapped to, if that is wanted.
    room: Optional[swap.Room]


def migration_spec(scenario: Scenario, mode: Mode) -> MigrationSpec:
    """How the guests of a scenario are moved."""
    parameters: Dict[str, Any] = {
        "max-bandwidth": scenario.gbit * 10**9 // 8 or UNLIMITED,
        "downtime-limit": DOWNTIME_LIMIT_MS,
    }
    common = {}
    if scenario.multifd:
        parameters["multifd-channels"] = scenario.multifd
        common["multifd"] = True
    if scenario.compression:
        parameters["multifd-compression"] = scenario.compression
    if scenario.postcopy is not None:
        parameters.update(postcopy.parameters(scenario.postcopy))
        common["postcopy-ram"] = True
    parameters.update(mode.parameters)
    return MigrationSpec(mode.capabilities, parameters, common)


def guest_spec(scenario: Scenario, mode: Mode) -> GuestSpec:
    """The guests of a scenario, but for their disks."""
    words = list(CMDLINE)
    if scenario.init_on_alloc:
        words.append("init_on_alloc=1")
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
    text = Path(f"/proc/{guest.pid}/cmdline").read_text(encoding="utf-8")
    for path, name in (
        (str(paths.cache_dir()), "$FPH_CACHE"),
        (str(paths.REPO), "."),
        (str(Path.home()), "~"),
    ):
        text = text.replace(path, name)
    return re.sub(r"/proc/\d+/fd/", "/proc/self/fd/", text).split("\0")[:-1]


@contextlib.contextmanager
def _booted(scenario: Scenario, mode: Mode, logs: Path) -> Iterator[List[Pair]]:
    """The guests of a scenario, each in the state to be migrated but for what runs."""
    spec = guest_spec(scenario, mode)
    kind = floor.FloorGuest if mode.floor else Guest
    with contextlib.ExitStack() as stack:
        # It goes when the guests have ended: else all would be swapped in for it.
        room = stack.enter_context(swap.room(scenario.host_mib[0])) if scenario.swapped else None
        # What each is, without what is only for its source.
        sources: List[Tuple[GuestSpec, Guest, Console]] = []
        for number in range(scenario.guests):
            own = stack.enter_context(attached(spec, scenario.workload))
            console = Console()
            launched = own.but(trace=floor.EVENTS) if mode.floor else own
            if room:
                launched = launched.but(wrapper=(*launched.wrapper, *room.wrapper))
            source = kind(launched, f"source-{number}", logs=logs, listener=console.listener())
            sources.append((own, stack.enter_context(source), console))
        for _, source, _ in sources:
            source.wait_ready(scenario.workload.boot_seconds)
        for _, source, _ in sources:
            scenario.workload.prepare(source)
        pairs = []
        for number, (own, source, console) in enumerate(sources):
            there = Guest(
                own,
                f"destination-{number}",
                logs=logs,
                incoming=True,
                running=not mode.floor,
                listener=console.listener(),
            )
            pairs.append(Pair(source, stack.enter_context(there), console, room))
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
    return {
        "ms": round((time.monotonic() - since) * 1000),
        "round": result.rounds,
        "normal": result.normal_pages,
        "zero": result.zero_pages,
        "sent": result.sent_bytes,
        "left": result.raw.get("ram", {}).get("remaining", 0),
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
    return {
        "span": Span(begin, ended, switch),
        "results": [migration.finish(pair.source, pair.there) for pair in pairs],
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


def described(scenario: Scenario) -> Dict[str, Any]:
    """A scenario as its runs have it."""
    own = scenario.workload
    return {
        **asdict(scenario),
        "name": scenario.name,
        "about": scenario.about,
        "workload": {"name": own.name, **asdict(own)},
    }


def header(scenario: Scenario, mode: Mode, index: int) -> Dict[str, Any]:
    """What a run says of itself before it is made."""
    return {
        "format": FORMAT,
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "scenario": described(scenario),
        "mode": asdict(mode),
        "index": index,
        "host": hostinfo.facts(),
        "versions": hostinfo.versions(mode.qemu, scenario.workload.kernel or mode.kernel),
    }


def run(scenario: Scenario, mode: Mode, index: int, logs: Path) -> Dict[str, Any]:
    """Make one run; returns its result."""
    host.check_memory(sum(scenario.host_mib), scenario.name)
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
            record["swapped"] = [pair.room.swap_out(pair.source) for pair in pairs if pair.room]
            rss_before = _rss(pairs)
            if mode.floor:
                record["floor"] = [floor.compute(pair.source) for pair in pairs]
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
            stamps = scenario.workload.stamps
            verdicts = [workload.verify(pair.there, name) for pair in pairs for name in stamps]
            wrong = [verdict.first for verdict in verdicts if not verdict.good]
            record["verified_pages"] = sum(verdict.pages for verdict in verdicts)
            record["checked_pages"] = sum(verdict.checked for verdict in verdicts)
            record["guest_after"] = [guest_facts(pair.there) for pair in pairs]
        for pair in pairs:
            wrong += pair.source.kernel_trouble() + pair.there.kernel_trouble()
        source, there = pairs[0].source, pairs[0].there
        record["command_lines"] = {
            "source": _command_line(source),
            "destination": _command_line(there),
        }
        record["parameters"] = source.qmp("query-migrate-parameters")
    record["migration"] = [result.raw for result in moved["results"]]
    record.update({name: moved[name] for name in ("samples", "all_ms", "postcopy")})
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


def _whole_mib(record: Dict[str, Any]) -> int:
    """The size of all guests."""
    return int(record["scenario"]["guests"] * record["scenario"]["mem_mib"])


def _free_mib(record: Dict[str, Any]) -> int:
    return sum(facts["meminfo_mib"]["MemFree"] for facts in record["guest_before"])


def _swap_metrics(record: Dict[str, Any]) -> Dict[str, float]:
    """What the host swapped in during the migration; reading ahead counts."""
    if not record.get("swapped"):
        return {}
    swapped_in = record["swapped_in_pages"] * mmap.PAGESIZE / MIB
    used = _whole_mib(record) - _free_mib(record)
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
    absent = sum(item.absent_bytes for item in found) / MIB
    scan = max(item.scan_time for item in found) / 1000
    hints = [result.hints for result in results if result.hints]
    return {
        "absent_mib": absent,
        "absent_share": absent / _whole_mib(record),
        "scan_ms": scan,
        "scan_share": scan / _total(record) if _total(record) else 0,
        "redirtied_mib": sum(hint.redirtied_bytes for hint in hints) / MIB,
    }


def metrics(record: Dict[str, Any]) -> Dict[str, float]:
    """The figures of a run that are compared: sums and maxima over its guests."""
    results = [MigrationResult.from_qmp(raw) for raw in record["migration"]]
    values: Dict[str, Optional[float]] = {
        "total_ms": _total(record),
        "downtime_ms": max(result.downtime_ms for result in results),
        "sent_mib": sum(result.sent_bytes for result in results) / MIB,
        "normal_pages": sum(result.normal_pages for result in results),
        "zero_pages": sum(result.zero_pages for result in results),
        "rounds": max(result.rounds for result in results),
        "free_mib": _free_mib(record),
        "free_max_order_mib": sum(facts["free_max_order_mib"] for facts in record["guest_before"]),
        "memfd_destination_after_mib": record.get("memfd_mib"),
    }
    for outcome in record.get("postcopy", [])[:1]:
        values.update(outcome)
    rss = record["rss_mib"]
    for when, sides in rss.items():
        values.update({f"rss_{side}_{when}_mib": mib for side, mib in sides.items()})
    values["rss_source_growth_mib"] = rss["after"]["source"] - rss["before"]["source"]
    values.update(_swap_metrics(record))
    values.update(_absent_metrics(record, results))
    hints = [result.hints for result in results if result.hints]
    if hints and not record["mode"]["floor"] and all(hint.blocks for hint in hints):
        values.update(
            arm_ms=max(hint.arm_time for hint in hints) / 1000,
            ask_to_first_ms=max(hint.ask_to_first for hint in hints) / 1000,
            ask_to_end_ms=max(hint.ask_to_end for hint in hints) / 1000,
            hinted_mib=sum(hint.hinted_bytes for hint in hints) / MIB,
            redirtied_mib=sum(hint.redirtied_bytes for hint in hints) / MIB,
            requested_mib=sum(hint.requested_bytes for hint in hints) / MIB,
            hint_blocks=sum(hint.blocks for hint in hints),
            # One bit for each page, while the migration runs.
            qemu_hint_mib=_whole_mib(record) / 4096 / 8,
        )
        if freed := sum(hint.cache_freed_bytes for hint in hints) / MIB:
            time_ms = max(hint.cache_time for hint in hints) / 1000
            values.update(
                cache_freed_mib=freed,
                cache_ms=time_ms,
                cache_gib_s=freed / 1024 / time_ms * 1000 if time_ms else None,
            )
    after = [facts["hint"] for facts in record.get("guest_after", []) if facts["hint"]]
    if after and any(hint["reports"] for hint in after):
        walks = [hint["last_ns"] for hint in after if "last_ns" in hint]
        values["walk_ms"] = max(walks) / 1e6 if walks else None
    for result in record.get("workload", [])[:1]:
        values.update({name: result.get(name) for name in FIGURES})
        for phase in "before", "during", "after", "window":
            found = result.get(phase, {})
            values.update({f"{phase}_{name}": value for name, value in found.items()})
    return {name: round(value, 4) for name, value in values.items() if value is not None}
