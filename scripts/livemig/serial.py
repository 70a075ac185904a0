# SPDX-License-Identifier: GPL-2.0-or-later
"""The two serial ports of a guest: the console's log and the agent."""

import contextlib
import re
import secrets
import shlex
import socket
import threading
from typing import Callable, Optional, Tuple

from livemig.errors import GuestError


class Port:
    """One end of a socket pair, the other end of which is a serial port of a QEMU.

    A thread takes everything that the guest writes as it comes, so that the guest never waits
    for us; whoever waits for a text sleeps until it is there or the QEMU is gone.
    """

    def __init__(self, name: str, listener: Optional[Callable[[str], None]] = None):
        """The listener is called, in the thread that reads, with each piece of text."""
        self.name = name
        self._listener = listener
        self._ours, self._theirs = socket.socketpair()
        self._theirs.set_inheritable(True)
        # The file descriptor that QEMU is to inherit.
        self.qemu_fd = self._theirs.fileno()
        self._text = ""
        # Whether the QEMU has gone.
        self.closed = False
        self._changed = threading.Condition()
        self._reader = threading.Thread(target=self._read, name=f"port {name}", daemon=True)

    def connected(self) -> None:
        """QEMU has been started: give up its end, so that we see when it is gone."""
        self._theirs.close()
        self._reader.start()

    def _read(self) -> None:
        while not self.closed:
            try:
                data = self._ours.recv(65536)
            except OSError:
                data = b""
            text = data.decode("utf-8", "replace").replace("\r", "")
            if self._listener:
                self._listener(text)
            with self._changed:
                self._text += text
                self.closed = not data
                self._changed.notify_all()

    def text(self) -> str:
        """Everything that the guest wrote since the QEMU was started."""
        with self._changed:
            return self._text

    def tail(self) -> str:
        """The last lines that the guest wrote."""
        return "\n".join(self.text().splitlines()[-25:])

    def send(self, text: str) -> None:
        """Write to the guest."""
        try:
            self._ours.sendall(text.encode())
        except OSError as err:
            raise GuestError(f"{self.name}: the QEMU is gone") from err

    def wait_for(self, pattern: str, timeout: float, start: int = 0) -> "re.Match[str]":
        """Wait until the text from offset start on matches; raises GuestError if it cannot."""
        regex = re.compile(pattern, re.MULTILINE)
        with self._changed:
            self._changed.wait_for(lambda: self.closed or regex.search(self._text, start), timeout)
            if match := regex.search(self._text, start):
                return match
            if self.closed:
                raise GuestError(f"{self.name}: the QEMU ended before it wrote {pattern!r}")
        raise GuestError(f"{self.name}: no {pattern!r} within {timeout:.0f} s")

    def close(self) -> None:
        """Hang up."""
        # Wakes the reader, which would sleep on after a plain close().
        with contextlib.suppress(OSError):
            self._ours.shutdown(socket.SHUT_RDWR)
        if self._reader.is_alive():
            self._reader.join()
        self._ours.close()
        self._theirs.close()


class Agent:
    """A shell in the guest, on its second serial port, that runs commands for us."""

    def __init__(self, port: Port):
        self._port = port

    def wait_ready(self, timeout: float) -> None:
        """Wait until the guest's init has started the agent."""
        self._port.wait_for(r"^READY\n", timeout)

    def exec(self, command: str, timeout: float = 120) -> Tuple[int, str]:
        """Run a shell command (one line) in the guest; returns its exit status and its output."""
        if "\n" in command:
            raise ValueError(f"more than one line: {command!r}")
        nonce = secrets.token_hex(8)
        start = len(self._port.text())
        self._port.send(self._line(command, nonce) + "\n")
        match = self._port.wait_for(rf"^{nonce} (\d+)\n", timeout, start)
        output = match.string[start : match.start()]
        return int(match.group(1)), output.removesuffix("\n")

    def _line(self, command: str, nonce: str) -> str:
        """What runs a command, and ends with a line of the nonce and the exit status."""
        # In a shell of its own, a command may do what it likes: fail to parse, exit, read.
        return f"sh -c {shlex.quote(command)} </dev/null 2>&1; s=$?; echo; echo {nonce} $s"

    def run(self, command: str, timeout: float = 120) -> str:
        """Run a command that must succeed; returns its output."""
        status, output = self.exec(command, timeout)
        if status:
            raise GuestError(f"in the guest: {command!r} failed with {status}: {output}")
        return output

    def send(self, command: str) -> None:
        """Start a command that will not answer."""
        self._port.send(command + "\n")


class DriverAgent(Agent):
    """A driver in the place of the shell, in a kernel without user space. It knows few commands."""

    def _line(self, command: str, nonce: str) -> str:
        return f"{nonce} {command}"
