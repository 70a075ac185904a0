# SPDX-License-Identifier: GPL-2.0-or-later
"""A domain's XML with hints on or off: text in, text out.

The text is changed where it has to be, and stays byte for byte what it was elsewhere: comments,
elements that nobody here knows, the order, the quotes.
"""

import itertools
import re
from dataclasses import dataclass
from typing import Dict, List, Optional, Sequence, Tuple
from xml.sax.saxutils import escape, unescape

from livefph.connection import FphError
from livefph.elements import Element, parse

NAMESPACE = "http://libvirt.org/schemas/domain/qemu/1.0"
HINT = "free-page-hint"
ARRAYS = "free-page-hint-arrays"
# What a libvirt that knows hints has for these, as attributes of <memballoon>
ATTRIBUTES = {HINT: "freePageHinting", ARRAYS: "freePageHintArrays"}
# Page cache is not switched on here. Without arrays, QEMU offers none, and libvirt refuses it.
CACHE = "free-page-hint-cache"
CACHE_ATTRIBUTE = "freePageHintCache"
# Of those that QEMU runs
TYPES = ("kvm", "qemu", "hvf")
MODELS = ("virtio", "virtio-transitional", "virtio-non-transitional")
# What libvirt calls the balloon if nobody else does
DEFAULT_ALIAS = "balloon0"
TRUE = ("true", "yes", "on", "1")
ATTRIBUTE = re.compile(rb"""\s+([^\s=/>]+)\s*=\s*("[^"]*"|'[^']*')""")


def qemu(name: str) -> str:
    """The name of an element of QEMU's namespace, as Element.name has it."""
    return f"{NAMESPACE} {name}"


@dataclass(frozen=True)
class Definition:
    """What a domain's XML says about hints."""

    emulator: Optional[str]
    model: Optional[str]
    hints: bool
    arrays: bool

    @property
    def offered(self) -> str:
        """In a word."""
        return "no" if not self.hints else "arrays" if self.arrays else "blocks"


class _Editor:
    """One text with its elements, and what is to be changed in it."""

    def __init__(self, text: str):
        self.data = text.encode()
        self.domain = parse(self.data)
        self._edits: List[Tuple[int, int, bytes]] = []

    def result(self) -> str:
        """The text with all changes."""
        data = self.data
        # From the end; of those at one place, the one that was made first is to be in front.
        for start, end, new in reversed(sorted(self._edits, key=lambda edit: edit[:2])):
            data = data[:start] + new + data[end:]
        return data.decode()

    def balloon(self) -> Element:
        """The balloon, if hints can be had with it."""
        kind = self.domain.attributes.get("type")
        if kind not in TYPES:
            raise FphError(f"it is of type '{kind}', hints need QEMU")
        balloon = self.domain.find("devices", "memballoon")
        if not balloon:
            raise FphError("it has no <memballoon>")
        model = balloon.attributes.get("model")
        if model not in MODELS:
            raise FphError(f"its <memballoon> has model '{model}', hints need 'virtio'")
        return balloon

    def alias(self, balloon: Element) -> Tuple[str, bool]:
        """The name of the balloon in overrides, and whether it has to be given that yet."""
        alias = balloon.find("alias")
        name = alias.attributes.get("name", "") if alias else ""
        if name.startswith("ua-"):
            return name, False
        if self.device(DEFAULT_ALIAS):
            return DEFAULT_ALIAS, False
        taken = {a.attributes.get("name") for a in self.domain.descendants("alias")}
        names = (f"ua-balloon{number}" for number in itertools.count())
        return next(name for name in names if name not in taken), True

    def device(self, alias: str) -> Optional[Element]:
        """What is overridden of a device."""
        return self.domain.find(qemu("override"), qemu("device"), alias=alias)

    def around(self, alias: str) -> List[Element]:
        """Of the elements around a device's properties, those that are there; the outer first."""
        device = self.device(alias)
        frontend = device and device.find(qemu("frontend"))
        return [e for e in (self.domain.find(qemu("override")), device, frontend) if e]

    def property(self, alias: str, name: str) -> List[Element]:
        """A property of a device, once for each time that it is there."""
        frontends = self.around(alias)[2:]
        return [p for f in frontends for p in f.find_all(qemu("property"), name=name)]

    def emulator(self) -> Optional[str]:
        """The path of its QEMU."""
        element = self.domain.find("devices", "emulator")
        return element and unescape(self.text(element.content, element.content_end).strip())

    def text(self, start: int, end: int) -> str:
        """A part of the text."""
        return self.data[start:end].decode()

    def is_on(self, balloon: Element, name: str) -> bool:
        """Whether QEMU will have a property on: an override has the last word."""
        found = self.property(self.alias(balloon)[0], name)
        if found:
            return all(p.attributes.get("value", "").lower() in TRUE for p in found)
        return balloon.attributes.get(ATTRIBUTES[name]) == "on"

    def indent(self, element: Element) -> str:
        """The white space in front of an element, if that begins a line."""
        line = self.data[self.data.rfind(b"\n", 0, element.start) + 1 : element.start].decode()
        return line if not line.strip() else ""

    def add(self, parent: Element, lines: Sequence[str]) -> None:
        """Add lines at the end of an element."""
        indent = self.indent(parent)
        text = "".join(f"\n{indent}  {line}" for line in lines).encode()
        if parent.empty:
            slash = self.data.rindex(b"/>", parent.start, parent.content)
            text = b">" + text + f"\n{indent}</".encode() + parent.tag + b">"
            self._edits.append((slash, parent.content, text))
        else:
            inside = self.data[parent.content : parent.content_end].rstrip()
            where = parent.content + len(inside)
            if where == parent.content_end:
                text += f"\n{indent}".encode()
            self._edits.append((where, where, text))

    def _attributes(self, element: Element) -> "Dict[str, re.Match[bytes]]":
        found = ATTRIBUTE.finditer(self.data, element.start, element.content)
        return {match[1].decode(): match for match in found}

    def set_attribute(self, element: Element, name: str, value: str) -> None:
        """Give an attribute a value."""
        if match := self._attributes(element).get(name):
            self._edits.append((*match.span(2), f"'{value}'".encode()))
            return
        tag = self.data[element.start : element.content - (2 if element.empty else 1)]
        where = element.start + len(tag.rstrip())
        self._edits.append((where, where, f" {name}='{value}'".encode()))

    def remove_attribute(self, element: Element, name: str) -> None:
        """Take out an attribute, if it is there, and the white space in front of it."""
        if match := self._attributes(element).get(name):
            self._edits.append((*match.span(), b""))

    def set_text(self, element: Element, text: str) -> None:
        """Give an element that has only text another one."""
        self._edits.append((element.content, element.content_end, escape(text).encode()))

    def remove(self, element: Element) -> None:
        """Take out an element, and its line with it."""
        start = element.start
        while start and self.data[start - 1 : start].isspace():
            start -= 1
        self._edits.append((start, element.end, b""))

    def qemu_prefix(self) -> str:
        """A prefix for QEMU's namespace where the domain ends."""
        spaces = {
            name.removeprefix("xmlns:"): match[2].decode()[1:-1]
            for name, match in self._attributes(self.domain).items()
            if name.startswith("xmlns:")
        }
        for prefix, uri in spaces.items():
            if uri == NAMESPACE:
                return prefix + ":"
        prefix = "qemu"
        while prefix in spaces:
            prefix += "1"
        where = self.domain.content - 1
        self._edits.append((where, where, f" xmlns:{prefix}='{NAMESPACE}'".encode()))
        return prefix + ":"


def read(text: str) -> Definition:
    """What a domain's XML says."""
    editor = _Editor(text)
    balloon = editor.domain.find("devices", "memballoon")
    if not balloon:
        return Definition(editor.emulator(), None, False, False)
    hints = editor.is_on(balloon, HINT)
    arrays = hints and editor.is_on(balloon, ARRAYS)
    return Definition(editor.emulator(), balloon.attributes.get("model"), hints, arrays)


def probe(text: str, attributes: bool) -> str:
    """A domain of this one's kind with nothing but its balloon, with the attributes or without."""
    editor = _Editor(text)

    def copy(*path: str) -> str:
        element = editor.domain.find(*path)
        return editor.text(element.start, element.end) if element else ""

    model = editor.balloon().attributes["model"]
    switched_on = "".join(f" {name}='on'" for name in ATTRIBUTES.values() if attributes)
    return f"""<domain type='{editor.domain.attributes["type"]}'>
  <name>fph</name>
  <memory unit='GiB'>1</memory>
  <os>{copy("os", "type")}</os>
  <devices>
    {copy("devices", "emulator")}
    <controller type='usb' model='none'/>
    <memballoon model='{model}'{switched_on}/>
  </devices>
</domain>
"""


def enable(
    text: str, arrays: bool, emulator: Optional[str] = None, attributes: bool = False
) -> str:
    """The XML with hints, and maybe another emulator; the same text if that is how it is.

    With attributes, where libvirt knows them, they are used rather than an override. Where there is
    an override already, that is completed: it goes to hosts whose libvirt does not know them, too.
    """
    editor = _Editor(text)
    balloon = editor.balloon()
    alias, _ = editor.alias(balloon)
    wanted = (HINT, ARRAYS) if arrays else (HINT,)
    missing = [name for name in wanted if not editor.is_on(balloon, name)]
    if attributes and not any(editor.property(alias, name) for name in ATTRIBUTES):
        for name in missing:
            editor.set_attribute(balloon, ATTRIBUTES[name], "on")
    elif missing:
        _override(editor, balloon, missing)
    _set_emulator(editor, emulator)
    return editor.result()


def _set_emulator(editor: _Editor, emulator: Optional[str]) -> None:
    devices = editor.domain.find("devices")
    assert devices
    if not emulator or editor.emulator() == emulator:
        return
    if old := devices.find("emulator"):
        editor.set_text(old, emulator)
    else:
        editor.add(devices, [f"<emulator>{escape(emulator)}</emulator>"])


def _override(editor: _Editor, balloon: Element, names: Sequence[str]) -> None:
    alias, new = editor.alias(balloon)
    if new:
        # libvirt forgets an alias of another kind when it defines the domain.
        if old := balloon.find("alias"):
            editor.set_attribute(old, "name", alias)
        else:
            editor.add(balloon, [f"<alias name='{alias}'/>"])
    for element in (p for name in names for p in editor.property(alias, name)):
        editor.set_attribute(element, "type", "bool")
        editor.set_attribute(element, "value", "true")
    if missing := [name for name in names if not editor.property(alias, name)]:
        _add_properties(editor, alias, missing)


def _add_properties(editor: _Editor, alias: str, names: Sequence[str]) -> None:
    there = editor.around(alias)
    if there:
        prefix = "".join(there[-1].tag.decode().rpartition(":")[:2])
    else:
        prefix = editor.qemu_prefix()
    lines = [f"<{prefix}property name='{name}' type='bool' value='true'/>" for name in names]
    for around in reversed(("override", "device", "frontend")[len(there) :]):
        attribute = f" alias='{alias}'" if around == "device" else ""
        inside = [f"  {line}" for line in lines]
        lines = [f"<{prefix}{around}{attribute}>", *inside, f"</{prefix}{around}>"]
    editor.add(there[-1] if there else editor.domain, lines)


def disable(text: str, arrays_only: bool = False, emulator: Optional[str] = None) -> str:
    """The XML without hints, or without arrays, and maybe another emulator; an alias stays.

    Page cache goes in both cases.
    """
    editor = _Editor(text)
    balloon = editor.balloon()
    _set_emulator(editor, emulator)
    alias, _ = editor.alias(balloon)
    names = (ARRAYS,) if arrays_only else (HINT, ARRAYS)
    for attribute in (*(ATTRIBUTES[name] for name in names), CACHE_ATTRIBUTE):
        # Even one that is off keeps libvirt from starting a stock QEMU.
        editor.remove_attribute(balloon, attribute)
    found = (element for name in (*names, CACHE) for element in editor.property(alias, name))
    gone = sorted(found, key=lambda element: element.start)
    # An element that would be left empty goes as a whole, but for one with a comment in it.
    for outer in reversed(editor.around(alias)):
        left = editor.data[outer.content : outer.content_end]
        for element in reversed(gone):
            start, end = element.start - outer.content, element.end - outer.content
            left = left[:start] + left[end:]
        if left.strip() or not gone:
            break
        gone = [outer]
    for element in gone:
        editor.remove(element)
    return editor.result()
