# SPDX-License-Identifier: GPL-2.0-or-later
"""Migrates one guest once and shows what happened."""

import argparse
from dataclasses import asdict, replace
from typing import Any, Dict, Sequence

from livemig import control, paths, workload
from livemig.commands.guest import unlimited
from livemig.errors import MigrationError
from livemig.guest import Guest
from livemig.migration import MigrationResult, migrate
from livemig.options import add_build_options, add_guest_options, guest_spec
from livemig.spec import GuestSpec, MigrationSpec

LOGS = paths.OUT / "logs" / "migrate"
STAMP_MIB = 16


def migrate_running(client: Any, spec: MigrationSpec) -> MigrationResult:
    """Migrate the guest that scripts/guest runs."""
    with client:
        control.send(client, asdict(spec))
        reply: Dict[str, Any] = control.receive(client)
    if "result" not in reply:
        raise MigrationError(reply.get("error", "the guest ended"))
    return MigrationResult.from_qmp(reply["result"])


def migrate_new(guest: GuestSpec, spec: MigrationSpec, freed_mib: int) -> MigrationResult:
    """Boot a guest, migrate it and let it check its memory."""
    with Guest(guest, "source", logs=LOGS) as source:
        source.wait_ready()
        if freed_mib:
            workload.dirty_and_free(source, freed_mib)
        workload.stamp(source, STAMP_MIB)
        with Guest(guest, "destination", logs=LOGS, incoming=True) as destination:
            result = migrate(source, destination, spec)
            verdict = workload.verify(destination)
    if not verdict.good:
        raise MigrationError(f"the guest's memory is wrong at the destination: {verdict.first}")
    print(f"verified:        {verdict.pages} pages, in the guest, at the destination")
    return result


def show(result: MigrationResult) -> None:
    """Print a result, one value per line."""
    print(f"total time:      {result.total_ms} ms, of that setup {result.setup_ms} ms")
    print(f"downtime:        {result.downtime_ms} ms")
    print(f"sent:            {result.sent_bytes / 2**20:.1f} MiB in {result.rounds} rounds")
    print(f"normal pages:    {result.normal_pages}")
    print(f"zero pages:      {result.zero_pages}")
    if not result.hints:
        print("free page hints: this QEMU does not report any")
        return
    hints = result.hints
    print(f"free page hints: {hints.state}" + (f", {hints.reason}" if hints.reason else ""))
    print(f"  hinted:        {hints.hinted_bytes / 2**20:.1f} MiB in {hints.messages} messages")
    print(f"  skipped:       {hints.skipped_bytes / 2**20:.1f} MiB")
    print(f"  redirtied:     {hints.redirtied_bytes / 2**20:.1f} MiB")
    print(f"  arm:           {hints.arm_time / 1000:.1f} ms")
    print(f"  ask to first:  {hints.ask_to_first / 1000:.1f} ms")
    print(f"  ask to end:    {hints.ask_to_end / 1000:.1f} ms")
    print(f"  stale/invalid: {hints.stale_bytes / 2**20:.1f}/{hints.invalid_bytes / 2**20:.1f} MiB")


def main(argv: Sequence[str]) -> int:
    """Entry point of scripts/migrate."""
    parser = argparse.ArgumentParser(
        prog="migrate",
        description="Migrate the guest that scripts/guest runs; if there is none, boot one, "
        "migrate it and check its memory.",
    )
    parser.add_argument("--no-hints", action="store_true", help="without free page hints")
    parser.add_argument("--wait", type=int, metavar="MS", help="parameter free-page-hint-wait")
    new = parser.add_argument_group("for a guest of its own")
    add_guest_options(new, "2G", 2)
    add_build_options(new)
    new.add_argument(
        "--freed", type=int, default=0, metavar="MIB", help="written and freed before it migrates"
    )
    args = parser.parse_args(argv)

    spec = unlimited()
    if args.no_hints:
        spec = replace(spec, capabilities={"free-page-hint": False})
    if args.wait is not None:
        spec = spec.with_parameters(free_page_hint_wait=args.wait)
    if client := control.connect():
        show(migrate_running(client, spec))
    else:
        show(migrate_new(guest_spec(args), spec, args.freed))
    return 0
