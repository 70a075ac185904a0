# SPDX-License-Identifier: GPL-2.0-or-later
"""The command line of scripts/fph."""

import argparse
import json
import os
import shutil
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any, Callable, Dict, List, Sequence, Tuple, TypeVar

from livefph import change, estimate, show, status, watch
from livefph.connection import ConnectionLost, Domain, Failure, FphError, Host, Socket

DONE, NOT_DONE, INTERRUPTED = 0, 1, 130
SWITCH = {True: "on", False: "off", None: "-"}
Found = TypeVar("Found")


def complain(text: object) -> None:
    """Say what went wrong, in one line."""
    print(f"fph: {text}", file=sys.stderr)


def say(args: argparse.Namespace, text: str) -> None:
    """Print for people, if it is they who read."""
    if text and not args.json:
        print(text)


def chosen(args: argparse.Namespace, host: Host) -> List[Domain]:
    """The domains that are meant: those that are named, or all."""
    return [host.domain(name) for name in dict.fromkeys(args.domain)] or host.domains()


def each(
    args: argparse.Namespace, domains: Sequence[Domain], work: Callable[[Domain], Found]
) -> Tuple[Dict[str, Found], int]:
    """Do something with each domain; returns what came of it, and the worst exit status.

    For programs, it is printed.
    """
    found: Dict[str, Found] = {}
    worst = DONE
    for domain in domains:
        try:
            found[domain.name] = work(domain)
        except FphError as err:
            complain(f"{domain.name}: {err}")
            worst = max(worst, err.status)
    if args.json:
        print(json.dumps({"domains": found}, indent=2, default=asdict))
    return found, worst


def run_status(args: argparse.Namespace) -> int:
    """Show what each domain says."""
    host = Host(args.connect, args.readonly)
    found, worst = each(args, chosen(args, host), status.look)
    rows = [
        (
            seen.name,
            seen.state,
            seen.offered or seen.defined or "-",
            seen.driver or "-",
            SWITCH[seen.hints],
            SWITCH[seen.absent],
            status.last_words(seen.last),
            show.size(status.skipped_bytes(seen.last)) if seen.last else "-",
        )
        for seen in found.values()
    ]
    head = ("DOMAIN", "STATE", "OFFERED", "DRIVER", "HINTS", "ABSENT", "LAST MIGRATION", "SKIPPED")
    if not rows:
        say(args, f"{host.uri} has no domains")
        return max(worst, NOT_DONE)
    say(args, show.table(head, rows, right=(7,)))
    say(args, "\n".join(f"{s.name}: {note}" for s in found.values() for note in s.notes))
    return worst


def run_estimate(args: argparse.Namespace) -> int:
    """Show what a migration of each domain would skip."""
    host = Host(args.connect, args.readonly)
    domains = [d for d in chosen(args, host) if args.domain or d.active()]
    if not domains:
        raise FphError(f"no domain is running on {host.uri}")
    asked = {"bandwidth": args.bandwidth, "cache": args.cache}
    found, worst = each(args, domains, lambda d: estimate.estimate(d, **asked))
    if found:
        say(args, estimate_table(found))
    notes = {name: estimate.notes(e, args.cache) for name, e in found.items()}
    say(args, "\n".join(f"{n}: {note}" for n, lines in notes.items() for note in lines))
    return worst


def estimate_table(found: Dict[str, Dict[str, Any]]) -> str:
    """Estimates as rows, with their sum; page cache only where a guest was asked about it."""
    columns = {"MEMORY": "total-bytes", "ABSENT": "absent-bytes", "FREE": "free-bytes"}
    columns["TO SEND"] = "remaining-bytes"
    if any("cache-bytes" in one for one in found.values()):
        columns["(CACHE)"] = "cache-bytes"
    lines = list(found.items())
    if len(lines) > 1:
        sums = {key: sum(one.get(key, 0) for one in found.values()) for key in columns.values()}
        times = [one.get("round-time") for one in found.values()]
        sums["round-time"] = None if None in times else sum(times)
        # A domain can have that name, too.
        lines.append(("all", sums))
    rows = []
    for name, one in lines:
        share = f"{100 * one['remaining-bytes'] / one['total-bytes']:.0f} %"
        time = one.get("round-time")
        sizes = (show.size(one.get(key, 0)) for key in columns.values())
        rows.append((name, *sizes, share, show.duration(None if time is None else time / 1000)))
    head = ("DOMAIN", *columns, "SHARE", "TIME")
    return show.table(head, rows, right=tuple(range(1, len(head))))


def run_change(args: argparse.Namespace) -> int:
    """Switch hints on or off in definitions, or show what would be changed."""
    host = Host(args.connect, args.readonly)
    wish = change.Wish(args.command == "enable", args.arrays, args.emulator)
    domains = chosen(args, host)
    found, worst = each(args, domains, lambda d: change.change(host, d, wish, args.write))
    for made in found.values():
        say(args, made.diff)
    for made in found.values():
        if not made.diff:
            say(args, f"{made.domain}: its definition is like that already")
        elif not made.written:
            say(args, f"{made.domain}: nothing was changed; --write defines it so")
        elif made.running:
            say(args, f"{made.domain}: defined; shut it down and start it, a reboot is not enough")
        else:
            say(args, f"{made.domain}: defined, from the next start on")
    return worst


class Screen:
    """Where a migration is followed: one line that changes, or a line for each second."""

    def __init__(self, args: argparse.Namespace):
        self._out = sys.stderr if args.json else sys.stdout
        self._drawn = ""
        self._second = -2

    def draw(self, record: watch.Record) -> None:
        """Show a migration as it is now."""
        second = int(record.samples[-1].seconds) if record.samples else -1
        if self._out.isatty():
            line = show.progress(record, shutil.get_terminal_size().columns)
            print("\r" + line.ljust(len(self._drawn)), end="", file=self._out, flush=True)
            self._drawn = line
        elif second != self._second:
            print(show.progress(record, 1000), file=self._out, flush=True)
            self._second = second

    def close(self) -> None:
        """Leave the line."""
        if self._drawn:
            print(file=self._out, flush=True)


def run_watch(args: argparse.Namespace) -> int:
    """Follow a migration."""
    if args.output:
        for suffix in ".json", ".png":
            path = Path(args.output + suffix)
            if not os.access(path if path.exists() else path.parent, os.W_OK):
                raise FphError(f"{path} cannot be written")
    source = Socket(args.qmp) if args.qmp else None
    source = source or Host(args.connect, args.readonly, events=True).domain(args.domain[0])
    screen = Screen(args)
    try:
        return _watch(args, watch.Watcher(source, screen.draw), screen)
    except Failure as err:
        complain(f"{source.name}: {err}")
        return err.status


def _watch(args: argparse.Namespace, watcher: watch.Watcher, screen: Screen) -> int:
    record = watcher.record
    try:
        watcher.follow(args.wait, args.interval)
    except ConnectionLost as err:
        record.status, record.error = "lost", str(err)
        raise
    except KeyboardInterrupt:
        record.error = "it goes on, and was not watched to its end"
        raise
    finally:
        screen.close()
        if record.samples or record.hints:
            say(args, show.outcome(record))
            if args.json:
                print(record.as_json())
            if args.output:
                save(args, record)
    return DONE if record.status == "completed" else NOT_DONE


def save(args: argparse.Namespace, record: watch.Record) -> None:
    """Write what was seen; a picture is not worth losing the rest for."""
    try:
        Path(args.output + ".json").write_text(record.as_json() + "\n", "utf-8")
    except OSError as err:
        complain(f"{args.output}.json: {err.strerror}")
        return
    try:
        show.picture(record, args.output + ".png")
        say(args, f"{record.name}: see {args.output}.png and {args.output}.json")
    except FphError as err:
        complain(f"{record.name}: {err}")
        say(args, f"{record.name}: see {args.output}.json")


def value(read: Callable[[str], float], what: str) -> Callable[[str], float]:
    """A type of options; where reading raises ValueError, it is said what it should be."""

    def parsed(text: str) -> float:
        try:
            return read(text)
        except ValueError as err:
            raise argparse.ArgumentTypeError(f"{text!r} is no {what}") from err

    return parsed


def seconds(text: str) -> float:
    """A time; ValueError if it is none."""
    time = float(text)
    if not 0 <= time < float("inf"):
        raise ValueError(text)
    return time


def parser() -> argparse.ArgumentParser:
    """The options."""
    # Before the command or behind it, where what was said before must not be forgotten.
    common = argparse.ArgumentParser(add_help=False, argument_default=argparse.SUPPRESS)
    common.add_argument("-c", "--connect", metavar="URI", help="of libvirt; default: as virsh")
    common.add_argument("-r", "--readonly", action="store_true", help="connect read-only")
    common.add_argument("--json", action="store_true", help="print JSON")
    top = argparse.ArgumentParser(
        prog="fph",
        description="Free page hints of libvirt's domains; see fph(1).",
        parents=[common],
    )
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")

    bandwidth = value(estimate.bandwidth, "bandwidth such as 1Gbit or 100MiB")
    size = value(estimate.size, "size such as 2GiB or 500MiB")
    time = value(seconds, "number of seconds")

    def command(name: str, run: Callable[..., int], what: str) -> Callable[..., argparse.Action]:
        added = commands.add_parser(name, parents=[common], help=what)
        added.set_defaults(run=run)
        added.add_argument("domain", nargs="*", metavar="DOMAIN")
        return added.add_argument

    command("status", run_status, "what each domain offers, uses, and has done")
    add = command("estimate", run_estimate, "what a migration would skip")
    add("--all", action="store_true", help="all domains that run")
    add("--bandwidth", type=bandwidth, metavar="RATE", help="for the time: 1Gbit, 100MiB")
    add("--cache", type=size, metavar="SIZE", help="page cache to free: 2GiB")
    for name, text in ("enable", "switch hints on"), ("disable", "switch hints off"):
        add = command(name, run_change, f"{text}, from a domain's next start on")
        add("--all", action="store_true", help="all domains")
        what = "with arrays" if name == "enable" else "only the arrays"
        add("--arrays", action="store_true", help=what)
        add("--write", action="store_true", help="do it: else it is only shown")
        add("--emulator", metavar="PATH", help="name this QEMU, too")
    add = command("watch", run_watch, "follow a migration")
    add("--qmp", metavar="SOCKET", help="in place of a domain, a QEMU's own socket")
    add("--wait", type=time, default=0, metavar="S", help="for it to begin")
    add("--interval", type=time, default=0.2, metavar="S", help="default: 0.2")
    add("-o", "--output", metavar="NAME", help="write NAME.json and NAME.png")
    return top


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Read the command line, and exit with 2 if it makes no sense."""
    top = parser()
    args = top.parse_args(argv, argparse.Namespace(connect=None, readonly=False, json=False))
    if args.command == "watch":
        if len(args.domain) + bool(args.qmp) != 1:
            top.error("watch: name one domain, or --qmp SOCKET")
    elif args.command != "status" and bool(args.domain) == args.all:
        top.error(f"{args.command}: name domains, or --all")
    return args


def main(argv: Sequence[str]) -> int:
    """Run a command."""
    args = parse(argv)
    try:
        code: int = args.run(args)
        sys.stdout.flush()
        return code
    except Failure as err:
        complain(err)
        return err.status
    except KeyboardInterrupt:
        complain("interrupted")
        return INTERRUPTED
    except BrokenPipeError:
        # Whoever read this has seen enough; what is left must not be written when Python ends.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return NOT_DONE
