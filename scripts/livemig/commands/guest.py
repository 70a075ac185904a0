# SPDX-License-Identifier: GPL-2.0-or-later
"""Runs a guest on the terminal; scripts/migrate moves it while it runs."""

import argparse
import contextlib
import os
import select
import socket
import sys
import termios
import tty
from typing import Sequence

from livemig import control, paths
from livemig.disk import debian_disk
from livemig.errors import LivemigError
from livemig.guest import Guest
from livemig.migration import MigrationResult, migrate
from livemig.options import add_build_options, add_guest_options, guest_spec
from livemig.spec import FAST, GuestSpec, MigrationSpec

LOGS = paths.OUT / "logs" / "guest"
QUIT = b"\x1d"  # Ctrl-]
LIVENESS_SECONDS = 0.5
# How long a client may take to say what it wants: the terminal stands still meanwhile.
REQUEST_SECONDS = 5


def show(text: str) -> None:
    """What the guest writes to its console goes to the terminal."""
    os.write(sys.stdout.fileno(), text.replace("\n", "\r\n").encode())


class Session:
    """The guest of a terminal, in whichever QEMU it is now."""

    def __init__(self, spec: GuestSpec):
        self.spec = spec
        self.number = 0
        self.guest = self._new(incoming=False)

    def _new(self, incoming: bool) -> Guest:
        self.number += 1
        name = f"guest-{self.number}"
        guest = Guest(self.spec, name, logs=LOGS, incoming=incoming, listener=show)
        guest.launch()
        return guest

    def move(self, spec: MigrationSpec) -> MigrationResult:
        """Migrate the guest to a new QEMU; if that fails, it goes on in the old one."""
        destination = self._new(incoming=True)
        try:
            result = migrate(self.guest, destination, spec)
        except BaseException:
            destination.close()
            raise
        self.guest.close()
        self.guest = destination
        return result

    def serve(self, client: socket.socket) -> None:
        """Migrate, as scripts/migrate asks. Whatever a client does, the guest lives on."""
        with client:
            client.settimeout(REQUEST_SECONDS)
            try:
                request = control.receive(client)
                if not request:
                    return
                reply = {"result": self.move(MigrationSpec(**request)).raw}
            except LivemigError as err:
                reply = {"error": str(err)}
            except (OSError, TypeError, ValueError) as err:
                reply = {"error": f"the guest was not migrated: {err}"}
            # It may have gone away.
            with contextlib.suppress(OSError):
                control.send(client, reply)

    def relay(self, server: socket.socket) -> None:
        """Pass keys to the guest until it ends or the user leaves."""
        inputs = [sys.stdin.fileno(), server]
        while not self.guest.console.closed:
            ready, _, _ = select.select(inputs, [], [], LIVENESS_SECONDS)
            if server in ready:
                self.serve(server.accept()[0])
            if sys.stdin.fileno() in ready:
                keys = os.read(sys.stdin.fileno(), 4096)
                if QUIT in keys:
                    return
                if keys:
                    self.guest.console.send(keys.decode("utf-8", "replace"))
                else:
                    inputs.remove(sys.stdin.fileno())


def unlimited() -> MigrationSpec:
    """A migration as fast as it can go; the source goes on if the destination fails."""
    return MigrationSpec(parameters=FAST, common={"return-path": True})


def main(argv: Sequence[str]) -> int:
    """Entry point of scripts/guest."""
    parser = argparse.ArgumentParser(
        prog="guest",
        description="Run a guest on this terminal. Ctrl-] ends it; scripts/migrate, "
        "on another terminal, migrates it to a new QEMU while it runs.",
    )
    add_guest_options(parser, "2G", 2)
    add_build_options(parser)
    parser.add_argument("--debian", action="store_true", help="boot Debian from a disk image")
    args = parser.parse_args(argv)
    with contextlib.ExitStack() as stack:
        spec = guest_spec(args)
        if args.debian:
            spec = spec.but(disk=stack.enter_context(debian_disk()))
        server = stack.enter_context(control.listen())
        stack.callback(control.address().unlink, missing_ok=True)
        print(f"guest: {spec.mem_mib} MiB; Ctrl-] ends it; logs in {LOGS}", flush=True)
        if sys.stdin.isatty():
            # Every key is passed on as it is.
            before = termios.tcgetattr(sys.stdin)
            stack.callback(termios.tcsetattr, sys.stdin, termios.TCSADRAIN, before)
            tty.setraw(sys.stdin)
        session = Session(spec)
        stack.callback(lambda: session.guest.close())  # pylint: disable=unnecessary-lambda
        session.relay(server)
        output = session.guest.qemu_output()
    if output:
        print(output.strip(), file=sys.stderr)
    print()
    return 0
