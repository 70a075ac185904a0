# SPDX-License-Identifier: GPL-2.0-or-later
"""What guests write to their consoles, with the time at which it came.

The guest's own clock stands still while it is moved; ours does not. So what a program in the guest
says about its work is put in order by the moment at which it arrives here.
"""

import re
import time
from typing import Callable, List, Tuple

from livemig.errors import GuestError
from livemig.guest import Guest

# When a line came, and what of it matched.
Match = Tuple[float, "re.Match[str]"]


class Console:
    """The lines of one guest, wherever it is at the time."""

    def __init__(self) -> None:
        self.lines: List[Tuple[float, str]] = []

    def listener(self) -> Callable[[str], None]:
        """What takes the text of one QEMU; a line may come in pieces."""
        rest = ""

        def take(text: str) -> None:
            nonlocal rest
            now = time.monotonic()
            *whole, rest = (rest + text).split("\n")
            self.lines += [(now, line) for line in whole]

        return take

    def matches(self, pattern: str) -> List[Match]:
        """The lines in which a pattern is found."""
        found = [(when, re.search(pattern, line)) for when, line in list(self.lines)]
        return [(when, match) for when, match in found if match]

    def wait(self, pattern: str, guest: Guest, timeout: float, count: int = 1) -> Match:
        """Wait until so many lines match, the last of which came from this guest."""
        deadline = time.monotonic() + timeout
        while len(found := self.matches(pattern)) < count:
            if time.monotonic() > deadline or guest.console.closed:
                what = "ended" if guest.console.closed else f"wrote nothing for {timeout:.0f} s"
                raise GuestError(
                    f"{guest.name}: waiting for {pattern!r}: the guest {what}\n"
                    f"--- the end of its console:\n{guest.console.tail()}"
                )
            time.sleep(0.02)
        return found[count - 1]
