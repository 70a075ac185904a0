# SPDX-License-Identifier: GPL-2.0-or-later
"""How scripts/migrate reaches the guest that scripts/guest runs: one JSON line each way."""

import json
import os
import socket
from pathlib import Path
from typing import Any, Dict, Optional

from livemig import paths
from livemig.errors import LivemigError


def address() -> Path:
    """The socket of the running guest."""
    return paths.cache_dir() / "guest.sock"


def listen() -> socket.socket:
    """Become the running guest; raises LivemigError if there is one."""
    path = address()
    if connect():
        raise LivemigError("a guest is running already: only one at a time")
    path.unlink(missing_ok=True)
    server = socket.socket(socket.AF_UNIX)
    # Whoever may connect may migrate the guest: nobody but the user.
    mask = os.umask(0o077)
    try:
        server.bind(str(path))
    except OSError as err:
        # Too long, most likely: a socket's path has 107 bytes at most.
        raise LivemigError(f"{path}: {err}: set FPH_CACHE to another directory") from err
    finally:
        os.umask(mask)
    server.listen()
    return server


def connect() -> Optional[socket.socket]:
    """A connection to the running guest, or None if there is none."""
    client = socket.socket(socket.AF_UNIX)
    try:
        client.connect(str(address()))
    except OSError:
        client.close()
        return None
    return client


def send(connection: socket.socket, message: Dict[str, Any]) -> None:
    """Send one message."""
    connection.sendall(json.dumps(message).encode() + b"\n")


def receive(connection: socket.socket) -> Dict[str, Any]:
    """Receive one message; an empty one if the other side went away."""
    with connection.makefile("r") as lines:
        line = lines.readline()
    message: Dict[str, Any] = json.loads(line) if line else {}
    return message
