# SPDX-License-Identifier: GPL-2.0-or-later
"""Runs a command: one-line errors, and guests that end with it."""

import importlib
import signal
import sys
from pathlib import Path
from typing import NoReturn

from livemig.errors import LivemigError


def _terminated(number: int, _frame: object) -> None:
    # An exception, unlike the default, lets every guest be ended in order.
    sys.exit(128 + number)


def run(module: str, package: str = "livemig.commands") -> NoReturn:
    """Run main() of PACKAGE.MODULE with this process's arguments, and exit with what it returns."""
    command = Path(sys.argv[0]).name
    signal.signal(signal.SIGTERM, _terminated)
    # Unless it is ignored, as under nohup
    if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
        signal.signal(signal.SIGHUP, _terminated)
    try:
        sys.exit(importlib.import_module(f"{package}.{module}").main(sys.argv[1:]))
    except LivemigError as err:
        sys.exit(f"{command}: error: {err}")
    except KeyboardInterrupt:
        sys.exit(f"\n{command}: interrupted")
