# SPDX-License-Identifier: GPL-2.0-or-later
"""Micro-benchmarks: what a hint costs the host, and what it costs the guest to find it.

On the host, a C program (bench/micro/hint-apply.c) made of QEMU's own parser and bitmap code. Then
a real round of a large guest: its tracepoints say what the walk of the free lists takes, and
QEMU's trace when an array came in and when its blocks were out of the migration.
"""

import json
import re
import shlex
import subprocess
from pathlib import Path
from typing import Any, Dict, List

import numpy as np
from livebench import engine, hostinfo
from livebench.store import OUT, write_json
from livemig import migration, paths
from livemig.errors import LivemigError
from livemig.guest import Guest
from livemig.modes import MODES, migration_for_mode
from livemig.spec import GuestSpec

SOURCE = Path(__file__).resolve().parents[1] / "micro" / "hint-apply.c"
# Of our QEMU, what it is built of besides.
SOURCES = """
hw/virtio/virtio-balloon-hint-parse.c migration/free-page-hint-bitmap.c util/bitmap.c util/bitops.c
"""
INCLUDES = "build src/include src src/host/include/x86_64 src/host/include/generic"
# 1 TiB, and the 64 GiB of the largest guest.
BLOCKS = (2**14, 2**18)
REPEAT = 7
HOST_NS_LIMIT = 50

# What the report shows of them.
HOST_ROWS = (
    ("sorted_ns", "parse and apply, in order"),
    ("shuffled_ns", "parse and apply, in random order"),
    ("memory_ns", "lower bound: move the words of the bitmaps"),
    ("shuffled_memory_ns", "lower bound of that: move them in random order"),
    ("bits_ns", "for comparison: one bit operation for each page"),
)
VIVO_ROWS = (
    ("array_to_end_ns", "from the first array's arrival to the end of the round", "ns per block"),
    ("walk_ns", "walk of the free lists, lock held", "ns per entry"),
    ("full_batch_ns", "the same, full batches", "ns per entry"),
    ("line_ns", "lower bound: follow as many pointers, as far apart", "ns per entry"),
    ("max_hold_us", "longest hold of a zone's lock", "us"),
    ("ask_to_end_ms", "ask to end", "ms"),
    ("arm_ms", "arming", "ms"),
)

# The struct pages of two blocks of 4 MiB that are neighbours are 1024 of 64 bytes apart.
LINE_STRIDE = 1024 * 64


def _run(command: List[str], what: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise LivemigError(f"{what} failed: {(done.stderr or done.stdout).strip()[-400:]}")
    return done.stdout


def build() -> Path:
    """Build the C program against our QEMU's source."""
    qemu = paths.cache_dir() / "qemu-ours"
    paths.require(qemu / "build" / "config-host.h", "scripts/build-qemu ours")
    program = paths.cache_dir() / "bench" / "hint-apply"
    program.parent.mkdir(parents=True, exist_ok=True)
    includes = [f"-I{qemu / directory}" for directory in INCLUDES.split()]
    sources = [str(SOURCE), *(str(qemu / "src" / file) for file in SOURCES.split())]
    flags = shlex.split(_run(["pkg-config", "--cflags", "--libs", "glib-2.0"], "pkg-config"))
    command = ["gcc", "-std=gnu11", "-O2", "-g", "-o", str(program)]
    _run([*command, *includes, *sources, *flags], f"building {SOURCE.name}")
    return program


def _batches(trace: str) -> "np.ndarray[Any, Any]":
    """What free_page_hint_batch reported: entries and nanoseconds of each hold of a zone's lock."""
    found = re.findall(r"free_page_hint_batch: .*?\bnr=(\d+)\b.*?\bhold_ns=(\d+)", trace)
    if not found:
        raise LivemigError("the guest traced no free_page_hint_batch")
    return np.array(found, dtype=float)


def _seconds(log: str, event: str) -> List[float]:
    """When an event was traced by QEMU."""
    return [float(when) for when in re.findall(rf"^\d+@(\d+\.\d+):{event}", log, re.MULTILINE)]


def in_vivo(mem_mib: int, vcpus: int, logs: Path) -> Dict[str, Any]:
    """One round of a guest, traced on both sides."""
    mode = MODES["array"]
    spec = mode.spec(GuestSpec(mem_mib=mem_mib, vcpus=vcpus)).but(
        trace="virtio_balloon_hint_* free_page_hint_state", args=("-msg", "timestamp=on")
    )
    with Guest(spec, "source", logs=logs) as source:
        source.wait_ready()
        events = f"{engine.TRACEFS}/events/free_page_hint/free_page_hint_batch/enable"
        source.agent.run(f"echo 1 > {events}")
        with Guest(spec.but(trace=None, args=()), "destination", logs=logs, incoming=True) as there:
            result = migration.migrate(source, there, migration_for_mode(mode))
            batches = _batches(there.agent.run(f"cat {engine.TRACEFS}/trace"))
            bound = there.agent.run(f"linewalk {batches[:, 0].sum():.0f} {LINE_STRIDE} {REPEAT}")
        log = source.trace_log.read_text(errors="replace")
    hints = result.hints
    if not hints or not hints.blocks:
        raise LivemigError(f"the guest reported no blocks: {hints}")
    arrays = _seconds(log, r"virtio_balloon_hint_array\b")
    ended = _seconds(log, ".* to ended$")
    took = (ended[-1] - arrays[0]) * 1e9 / hints.blocks if arrays and ended else None
    entries, holds = batches[:, 0], batches[:, 1]
    full = entries >= entries.max()
    return {
        "mem_mib": mem_mib,
        "blocks": hints.blocks,
        "messages": hints.messages,
        "array_to_end_ns": took,
        "holds": len(batches),
        "entries": float(entries.sum()),
        "walk_ns": float(holds.sum() / entries.sum()),
        "line_ns": float(bound.split("ns=")[1]),
        "full_batch_ns": float(np.median(holds[full] / entries[full])),
        "max_hold_us": float(holds.max() / 1000),
        "ask_to_end_ms": hints.ask_to_end / 1000,
        "arm_ms": hints.arm_time / 1000,
    }


def _rows(measured: Dict[str, Any]) -> List[Dict[str, Any]]:
    rows = []
    for numbers in measured["host"]:
        blocks = int(numbers["blocks"])
        name = f"host, {blocks} blocks of 4 MiB ({blocks // 256} GiB)"
        rows += [(f"{name}: {what}", numbers[key], "ns per block") for key, what in HOST_ROWS]
    vivo = measured["in_vivo"]
    name = f"a round of a guest of {vivo['mem_mib']} MiB, under TCG"
    rows += [(f"{name}: {what}", vivo[key], unit) for key, what, unit in VIVO_ROWS]
    return [
        {"what": what, "value": value, "unit": unit, "digits": 1}
        for what, value, unit in rows
        if value is not None
    ]


def run(mem_mib: int, vcpus: int, directory: Path = OUT) -> Dict[str, Any]:
    """Make all of them and write micro.json."""
    program = build()
    measured: Dict[str, Any] = {
        "facts": hostinfo.facts(),
        "versions": hostinfo.versions("ours", "ours"),
        # Nanoseconds per block.
        "host": [
            json.loads(_run([str(program), str(blocks), str(REPEAT)], SOURCE.name))
            for blocks in BLOCKS
        ],
        "in_vivo": in_vivo(mem_mib, vcpus, paths.OUT / "logs" / "bench" / "micro"),
        "format": engine.FORMAT,
    }
    measured["targets"] = [
        {
            "target": f"{int(numbers['blocks'])} blocks {how}, parsed and applied: "
            f"≤ {HOST_NS_LIMIT} ns per block of 4 MiB",
            "value": numbers[key],
            "reached": numbers[key] <= HOST_NS_LIMIT,
            "runs": REPEAT,
        }
        for numbers in measured["host"]
        for key, how in (("sorted_ns", "in order"), ("shuffled_ns", "in random order"))
    ]
    measured["rows"] = _rows(measured)
    write_json(directory / "micro.json", measured)
    return measured
