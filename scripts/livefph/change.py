# SPDX-License-Identifier: GPL-2.0-or-later
"""Switches hints on or off in a domain's definition."""

import difflib
import os
import re
import subprocess
from dataclasses import dataclass, replace
from typing import Optional
from urllib.parse import urlsplit

from livefph import domainxml
from livefph.connection import Domain, FphError, Host, LibvirtFailure

PROBE_SECONDS = 30


@dataclass(frozen=True)
class Wish:
    """How the definitions should be."""

    hints: bool
    arrays: bool
    emulator: Optional[str] = None


@dataclass(frozen=True)
class Change:
    """What was, or would be, changed in a domain's definition."""

    domain: str
    diff: str
    written: bool
    # Its QEMU goes on as it was started.
    running: bool


def is_here(uri: str) -> bool:
    """Whether the emulators of a connection are files of this machine."""
    return not urlsplit(uri).hostname


def has_arrays(emulator: str) -> bool:
    """Whether a QEMU of this machine is ours: a stock one does not start with our properties."""
    command = [emulator, "-device", "virtio-balloon-pci,help"]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=PROBE_SECONDS, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as err:
        raise FphError(f"its <emulator> {emulator} cannot be run: {err}") from err
    return domainxml.ARRAYS in done.stdout


def _check_emulator(host: Host, path: Optional[str]) -> None:
    if path and is_here(host.uri) and os.path.isabs(path) and not has_arrays(path):
        raise FphError(
            f"its <emulator> {path} is a stock QEMU, and would not start with this: "
            "name another one with --emulator"
        )


def _knows_attributes(host: Host, text: str) -> bool:
    """Whether a libvirt makes QEMU's properties of the attributes, for a domain of this kind.

    Its version does not say so, nor do its capabilities. It leaves out what it does not know, so
    that it can be asked for the command line of a domain which is never defined.
    """
    try:
        command_line = host.command_line(domainxml.probe(text, attributes=True))
        return bool(re.search(rf'"{domainxml.ARRAYS}"\s*:\s*true', command_line))
    except LibvirtFailure as err:
        # If it does not take that domain without them either, this is what it has to say.
        host.command_line(domainxml.probe(text, attributes=False))
        emulator = domainxml.read(text).emulator
        raise FphError(f"its <emulator> {emulator} has no hints, as libvirt says: {err}") from err


def _wanted(text: str, wish: Wish, attributes: bool = False) -> str:
    before = domainxml.read(text)
    right = replace(before, emulator=wish.emulator or before.emulator)
    if wish.hints:
        new = domainxml.enable(text, wish.arrays, wish.emulator, attributes)
        right = replace(right, hints=True, arrays=wish.arrays or before.arrays)
    else:
        new = domainxml.disable(text, arrays_only=wish.arrays, emulator=wish.emulator)
        right = replace(right, hints=before.hints and wish.arrays, arrays=False)
    # Whatever else is in a definition, nothing is written that is not what was asked for.
    if domainxml.read(new) != right:
        raise FphError("its XML is of a kind that cannot be changed here: see 'virsh edit'")
    return new


def change(host: Host, domain: Domain, wish: Wish, write: bool) -> Change:
    """Find out what a domain's definition lacks of a wish; with write, define it so."""
    if not domain.persistent():
        raise FphError("it is transient, and has no definition that could be changed")
    # Passwords are seen by libvirt alone: the diff shows the definition without them.
    public = domain.definition()
    new, attributes = _wanted(public, wish), False
    if wish.hints and new != public:
        _check_emulator(host, domainxml.read(new).emulator)
        attributes = _knows_attributes(host, new)
        new = _wanted(public, wish, attributes)
    names = (f"{domain.name}, now", f"{domain.name}, then")
    diff = difflib.unified_diff(public.splitlines(), new.splitlines(), *names, lineterm="")
    running = domain.active()
    written = write and new != public
    if written:
        complete = _wanted(domain.definition(secure=True), wish, attributes)
        if domain.definition() != public:
            raise FphError("its definition was changed by somebody else meanwhile")
        host.define(complete)
    return Change(domain.name, "\n".join(diff), written, running)
