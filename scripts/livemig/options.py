# SPDX-License-Identifier: GPL-2.0-or-later
"""Command-line options that several commands share."""

import argparse
import re

from livemig.modes import MODES
from livemig.paths import BUILDS
from livemig.spec import GuestSpec


def size_mib(text: str) -> int:
    """Read a memory size such as 1536M or 8G; a number alone is in GiB."""
    match = re.fullmatch(r"(\d+)([MG]?)", text.strip().upper())
    if not match:
        raise argparse.ArgumentTypeError(f"not a size such as 1536M or 8G: {text}")
    return int(match[1]) * (1 if match[2] == "M" else 1024)


def add_guest_options(parser: argparse.ArgumentParser, mem: str, vcpus: int) -> None:
    """Add --mem and --vcpus."""
    parser.add_argument(
        "--mem",
        type=size_mib,
        default=mem,
        metavar="SIZE",
        help=f"such as 1536M or 8G (default {mem})",
    )
    parser.add_argument("--vcpus", type=int, default=vcpus, metavar="N", help=f"(default {vcpus})")


def add_build_options(parser: argparse.ArgumentParser) -> None:
    """Add what chooses QEMU, the guest kernel and the balloon."""
    for what in ("qemu", "kernel"):
        parser.add_argument(
            f"--{what}", choices=BUILDS, default="ours", help=f"which {what} (default ours)"
        )
    parser.add_argument(
        "--balloon",
        metavar="PROPERTIES",
        help=f"of the balloon device (default {MODES['array'].balloon}; "
        f"stock QEMU: {MODES['stock-hints'].balloon})",
    )
    parser.add_argument(
        "--append", default="", metavar="WORDS", help="more for the guest kernel's command line"
    )


def guest_spec(args: argparse.Namespace) -> GuestSpec:
    """The guest that the options describe."""
    default = MODES["array" if args.qemu == "ours" else "stock-hints"].balloon
    return GuestSpec(
        mem_mib=args.mem,
        vcpus=args.vcpus,
        qemu=args.qemu,
        kernel=args.kernel,
        balloon=args.balloon or default,
        cmdline=tuple(args.append.split()),
    )
