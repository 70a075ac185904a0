# SPDX-License-Identifier: GPL-2.0-or-later
"""The elements of an XML text, and where in the text they are."""

import re
from dataclasses import dataclass, field
from typing import Dict, Iterator, List, Optional
from xml.parsers import expat

from livefph.connection import FphError

START_TAG = re.compile(rb"""<([^\s/>]+)(?:"[^"]*"|'[^']*'|[^>"'])*>""")


@dataclass
class Element:
    """An element, and where in the text it is: its start tag, its content, its end."""

    name: str
    tag: bytes
    attributes: Dict[str, str]
    start: int
    content: int
    empty: bool
    content_end: int = 0
    end: int = 0
    children: List["Element"] = field(default_factory=list)

    def find_all(self, name: str, /, **attributes: str) -> Iterator["Element"]:
        """The children of a name with these attributes."""
        for child in self.children:
            if child.name == name and attributes.items() <= child.attributes.items():
                yield child

    def find(self, *path: str, **attributes: str) -> Optional["Element"]:
        """The first one of these in the first one of each name before."""
        *outer, last = path
        inside: Optional[Element] = self
        for name in outer:
            inside = inside and next(inside.find_all(name), None)
        return inside and next(inside.find_all(last, **attributes), None)

    def descendants(self, name: str) -> Iterator["Element"]:
        """All elements of a name in this one."""
        for child in self.children:
            if child.name == name:
                yield child
            yield from child.descendants(name)


def parse(data: bytes) -> Element:
    """The elements of a domain's XML; the names of those in a namespace begin with that."""
    parser = expat.ParserCreate("utf-8", " ")
    top = Element("", b"", {}, 0, 0, False)
    path = [top]

    def start(name: str, attributes: Dict[str, str]) -> None:
        where = parser.CurrentByteIndex
        match = START_TAG.match(data, where)
        assert match
        empty = match[0].endswith(b"/>")
        element = Element(name, match[1], attributes, where, match.end(), empty)
        path[-1].children.append(element)
        path.append(element)

    def end(_name: str) -> None:
        element = path.pop()
        element.content_end = element.end = element.content
        if not element.empty:
            element.content_end = parser.CurrentByteIndex
            element.end = data.index(b">", element.content_end) + 1

    parser.StartElementHandler = start
    parser.EndElementHandler = end
    try:
        parser.Parse(data, True)
    except expat.ExpatError as err:
        raise FphError(f"the XML cannot be read: {err}") from err
    domain = top.children[0]
    if domain.name != "domain":
        raise FphError(f"the XML is not a domain's, but of <{domain.name}>")
    return domain
