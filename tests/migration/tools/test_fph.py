# SPDX-License-Identifier: GPL-2.0-or-later
"""scripts/fph against a libvirt that is made up: what it shows, and what it says if it cannot.

That it does so with a real one is in test_fph_libvirt.py.
"""

import json
import re
import shlex
import subprocess
from pathlib import Path
from typing import Any, Callable, Dict, List, Mapping, Tuple

import libvirt
import pytest

from livefph import change, show
from livefph.cli import parse, parser
from livefph.estimate import bandwidth
from livemig import fake_libvirt, paths
from livemig.fake_libvirt import DENIED, ESTIMATE, GIB, MIB, FakeDomain, FakeHost, error
from livemig.fake_libvirt import status_answers

# Fixtures
host = fake_libvirt.host_fixture
fph = fake_libvirt.fph_fixture


COMPLETED = {"status": "completed"}


@pytest.fixture
def said(fph: Callable[..., Tuple[int, List[str], List[str]]]) -> Callable[..., List[str]]:
    """Runs the tool, which must succeed and complain of nothing; returns its output."""

    def run(*argv: str) -> List[str]:
        status, out, err = fph(*argv)
        assert (status, err) == (0, [])
        return out

    return run


def estimated(host: FakeHost, name: str, more: Mapping[str, Any]) -> FakeDomain:
    """A domain that is estimated at once, with more or other figures."""
    found = {"status": "measured", "estimate": {**ESTIMATE, **more}}
    return host.add(name).qemu(calc_free_page_estimate={}, query_free_page_estimate=found)


# ---- what is shown -------------------------------------------------------------------------------


def test_status_of_all_kinds(host: FakeHost, said: Any) -> None:
    """Each domain has its row, whatever its QEMU, and a line for what calls for one."""
    skipped = {"free-page-hint": {"skipped-bytes": 5 * MIB, "redirtied-bytes": MIB}}
    failed = {"status": "failed", "ram": {}, "absent-pages": {"absent-bytes": MIB}, **skipped}
    host.add("ours").says({**status_answers("arrays", "arrays"), "query-migrate": failed})
    host.add("stock").says(status_answers("no", "no", ours=False))
    host.add("asleep").says({**status_answers("blocks", "none"), "query-migrate": COMPLETED})
    host.add("off", active=False)
    host.add("balloonless", model="none", active=False)
    out = said("status")
    rows = {line.split()[0]: line.split()[1:] for line in out[:6]}
    assert rows["ours"] == "running arrays arrays on on failed 5 MiB".split()
    assert rows["stock"] == "running no no - - - -".split()
    assert rows["asleep"] == "running blocks none on on completed, came in -".split()
    assert rows["off"] == "shut off no - - - - -".split()
    notes = "\n".join(out[6:])
    assert "stock: its QEMU is a stock one" in notes
    assert "balloonless: its balloon is of model 'none'" in notes
    assert "asleep: its definition has 'no', from the next start on" in notes

    for argv in ("--json", "status", "ours"), ("status", "ours", "--json"):
        assert json.loads("\n".join(said(*argv)))["domains"]["ours"]["driver"] == "arrays"


def test_estimate_of_several(host: FakeHost, fph: Any) -> None:
    """Rows and their sum; one that cannot be estimated has its line, and the others are shown."""
    for name in "a", "b":
        estimated(host, name, {"round-time": 800})
    answers = host.domains["a"].answers
    answers["query-free-page-estimate"].insert(0, {"status": "measuring"})
    host.add("stock")
    host.add("off", active=False)
    status, out, err = fph("estimate", "--all", "--bandwidth", "1Gbit")
    assert host.domains["a"].asked[0]["arguments"] == {"bandwidth": 125_000_000}
    rows = [re.split("  +", line) for line in out]
    assert [row[0] for row in rows] == ["DOMAIN", "a", "b", "all"]
    assert rows[1] == "a, 1.0 GiB, 400 MiB, 524 MiB, 100 MiB, 10 %, 0.8 s".split(", ")
    assert rows[3] == "all, 2.0 GiB, 800 MiB, 1.0 GiB, 200 MiB, 10 %, 1.6 s".split(", ")
    assert status == 1
    assert err == [
        "fph: stock: its QEMU is a stock one, which has no estimate and skips no absent pages"
    ]


def test_estimate_with_page_cache(host: FakeHost, said: Any) -> None:
    """A budget of page cache is handed on and has its column; a guest that frees none, its line."""
    estimated(host, "a", {"cache-bytes": 60 * MIB})
    estimated(host, "all", {})
    out = said("estimate", "--all", "--cache", "2GiB")
    assert host.domains["a"].asked[0]["arguments"] == {"cache": 2 * GIB}
    rows = [re.split("  +", line) for line in out]
    assert rows[0][3:6] == ["FREE", "TO SEND", "(CACHE)"]
    assert [row[4] for row in rows[1:4]] == ["100 MiB", "100 MiB", "200 MiB"]
    assert [row[5] for row in rows[1:4]] == ["60 MiB", "0 B", "60 MiB"]
    assert out[4:] == ["all: its page cache stays: its balloon or its driver frees none"]


def test_estimate_without_a_time(host: FakeHost, said: Any) -> None:
    """Where a domain has no time, as if somebody else asked, there is no sum of times."""
    estimated(host, "a", {"round-time": 800})
    estimated(host, "b", {})
    out = said("estimate", "a", "b", "--bandwidth", "1Gbit")
    assert [line.split()[-1] for line in out[1:]] == ["s", "-", "-"]


def test_paused_domain_is_estimated_by_what_is_absent(host: FakeHost, said: Any) -> None:
    """What a stopped guest cannot say is said to be missing."""
    missing = {"free-bytes": 0, "complete": False, "reason": "vm-stopped"}
    estimated(host, "paused", missing).number = libvirt.VIR_DOMAIN_PAUSED
    why = "the guest is stopped and cannot be asked: only absent pages are known"
    assert said("estimate", "paused")[-1] == f"paused: {why}"


AS_ASKED = ["a: its definition is like that already"]
BALLOON = "<memballoon model='virtio'/>"
NATIVE = "<memballoon model='virtio' freePageHinting='on' freePageHintArrays='on'/>"


def changed(lines: List[str], sign: str) -> List[str]:
    """What a diff adds, or takes away."""
    return [line[1:].strip() for line in lines if line[0] == sign and line[:3] != sign * 3]


def test_enable_shows_and_writes(host: FakeHost, said: Any, tmp_path: Path) -> None:
    """Without --write nothing is defined; with it, what was shown; twice changes nothing."""
    ours = fake_libvirt.make_emulator(tmp_path, "free-page-hint-arrays=<bool>")
    domain = host.add("a", emulator=ours)
    out = said("enable", "--arrays", "a")
    assert not host.defined
    assert out[-1] == "a: nothing was changed; --write defines it so"
    added = [line for line in changed(out, "+") if "property" in line]
    assert len(added) == 2

    written = said("enable", "--arrays", "--all", "--write")
    assert written[:-1] == out[:-1]
    assert "shut it down and start it" in written[-1]
    assert all(line in host.defined[0] for line in added)
    domain.xml = host.defined[0]
    assert said("enable", "--arrays", "a", "--write") == AS_ASKED
    assert len(host.defined) == 1
    said("disable", "a", "--write")
    assert "free-page-hint" not in host.defined[1]


def test_attributes_of_a_libvirt_that_knows_hints(
    host: FakeHost, said: Any, tmp_path: Path
) -> None:
    """Where libvirt has attributes for hints, they are what is shown, written, and taken away."""
    host.native = True
    ours = fake_libvirt.make_emulator(tmp_path, "free-page-hint-arrays=<bool>")
    domain = host.add("a", active=False, emulator=ours)
    off = domain.xml
    out = said("enable", "--arrays", "a")
    assert not host.defined
    assert (changed(out, "+"), changed(out, "-")) == ([NATIVE], [BALLOON])

    assert said("enable", "--arrays", "a", "--write")[:-1] == out[:-1]
    domain.xml = host.defined[0]
    assert said("status", "a")[1].split()[3] == "arrays"
    # Nothing has to be found out of what is as it was asked for: that may be read-only.
    host.inconvertible.append(DENIED)
    assert said("enable", "a", "--arrays", "--readonly") == AS_ASKED

    said("disable", "a", "--arrays", "--write")
    assert host.defined[1] == domain.xml.replace(" freePageHintArrays='on'", "")
    said("disable", "a", "--write")
    assert host.defined[2] == off


def test_back_to_another_emulator(host: FakeHost, said: Any) -> None:
    """Hints are switched off and another QEMU is named in one step; a second changes nothing."""
    domain = host.add("a", emulator="relative/qemu")
    said("enable", "a", "--arrays", "--write")
    domain.xml = host.defined[0]
    back = ("disable", "a", "--emulator", "/usr/bin/qemu-system-x86_64")
    out = said(*back, "--write")
    assert changed(out, "+")[0] == "<emulator>/usr/bin/qemu-system-x86_64</emulator>"
    domain.xml = host.defined[1]
    assert not re.search("free-?page", domain.xml, re.IGNORECASE)
    assert said(*back) == AS_ASKED


def test_override_stays_with_a_libvirt_that_knows_hints(host: FakeHost, said: Any) -> None:
    """A domain with an override keeps it: arrays are added there, and off is off in both ways."""
    domain = host.add("a", emulator="relative/qemu")
    before = domain.xml
    said("enable", "a", "--write")
    domain.xml = host.defined[0]
    host.native = True
    assert said("enable", "a") == AS_ASKED
    out = said("enable", "a", "--arrays", "--write")
    (added,) = changed(out, "+")
    assert "qemu:property name='free-page-hint-arrays'" in added and not changed(out, "-")

    domain.xml = host.defined[1].replace("model='virtio'", NATIVE[12:-2])
    said("disable", "a", "--write")
    assert not re.search("free-?page", host.defined[2], re.IGNORECASE)
    # After that, its hints are attributes.
    domain.xml = before
    assert changed(said("enable", "a", "--arrays"), "+") == [NATIVE]


# ---- bad input: one line, an exit status, nothing changed ----------------------------------------


def changed_meanwhile(_: FakeHost, domain: FakeDomain) -> None:
    """Somebody else defines the domain while we think."""

    def change(time: int) -> None:
        if time > 2:
            domain.xml = domain.xml.replace("<name>", "<name><!-- -->")

    domain.on_read = change


def cut_when_read_again(host: FakeHost, domain: FakeDomain) -> None:
    """The connection breaks before the definition is read again."""

    def cut(time: int) -> None:
        if time > 1:
            raise host.cut()

    domain.on_read = cut


def failure(desc: str) -> Dict[str, Any]:
    """How QEMU says that a command failed."""
    return {"error": {"class": "GenericError", "desc": desc}}


BUSY = failure("an estimate is being made already")
INVALID = error(libvirt.VIR_ERR_XML_INVALID_SCHEMA, "XML document failed\n to validate")
UNKNOWN = error(libvirt.VIR_ERR_INVALID_ARG, "could not find\n capabilities")
# What is wrong with the libvirt, or with its domain "a", whose QEMU cannot be run from here.
PREPARED: Dict[str, Callable[[FakeHost, FakeDomain], Any]] = {
    "no balloon": lambda _, a: vars(a).update(xml=a.xml.replace(BALLOON, "")),
    "model none": lambda host, _: host.add("a", model="none"),
    "stock emulator": lambda host, _: host.add("a", emulator="/bin/true"),
    "no emulator": lambda host, _: host.add("a", emulator="/nowhere/qemu"),
    "transient": lambda _, a: vars(a).update(permanent=False),
    "two at once": changed_meanwhile,
    "two estimates": lambda _, a: a.qemu(calc_free_page_estimate=BUSY),
    "shut off": lambda host, _: host.add("a", active=False),
    "none runs": lambda host, _: host.add("a", active=False),
    "not valid": lambda host, _: host.refusals.append(INVALID),
    "read-only": lambda host, _: host.refusals.append(DENIED),
    # libvirt refuses to say whether it knows hints.
    "read-only dry run": lambda host, _: host.inconvertible.append(DENIED),
    "stock at a distance": lambda host, _: vars(host).update(native=True, ours=False),
    # libvirt starts no domain of this kind, with hints or without.
    "unknown machine": lambda host, _: host.inconvertible.append(UNKNOWN),
    "read-only QEMU": lambda _, a: a.qemu(calc_free_page_estimate=DENIED),
    "cut": lambda host, a: a.qemu(calc_free_page_estimate={}, query_free_page_estimate=host.cut),
    "cut before": lambda host, _: vars(host).update(alive=False),
    "cut write": cut_when_read_again,
    "no migration": lambda _, a: a.qemu(query_migrate=COMPLETED),
    "refused": lambda _, a: a.qemu(query_migrate=failure("not\n now")),
}
ENABLE = "enable a --write"
BAD = {
    "unknown domain": ("status b", 1, "b: qemu:///fake has no such domain"),
    "no balloon": (ENABLE, 1, "a: it has no <memballoon>"),
    "model none": (ENABLE, 1, "a: its <memballoon> has model 'none', hints need"),
    "stock emulator": (ENABLE, 1, "a: its <emulator> /bin/true is a stock QEMU"),
    "no emulator": (ENABLE, 1, "a: its <emulator> /nowhere/qemu cannot be run"),
    "transient": (ENABLE, 1, "a: it is transient"),
    "two at once": (ENABLE, 1, "a: its definition was changed by somebody else"),
    "two estimates": ("estimate a", 1, "a: an estimate is being made already"),
    "stock QEMU": ("estimate a", 1, "a: its QEMU is a stock one"),
    "shut off": ("estimate a", 1, "a: it is not running"),
    "none runs": ("estimate --all", 1, "no domain is running on qemu:///fake"),
    "not valid": (ENABLE, 3, "a: XML document failed to validate"),
    "read-only": (ENABLE, 3, "a: the connection is read-only: operation"),
    "read-only dry run": ("enable a --readonly", 3, "a: the connection is read-only: operation"),
    "stock at a distance": (
        ENABLE,
        1,
        "a: its <emulator> relative/qemu has no hints, as libvirt says: unsupported configuration",
    ),
    "unknown machine": (ENABLE, 3, "a: could not find capabilities"),
    "read-only QEMU": ("estimate a", 3, "a: the connection is read-only: operation"),
    "cut": ("estimate a", 3, "the connection to qemu:///fake was lost: client socket"),
    "cut before": ("estimate a", 3, "the connection to qemu:///fake was lost: client"),
    "cut write": (ENABLE, 3, "the connection to qemu:///fake was lost: client socket"),
    "no migration": ("watch a", 1, "a: no migration is running"),
    "refused": ("watch a", 1, "fph: a: not now"),
    "watch unknown": ("watch b", 1, "b: qemu:///fake has no such domain"),
    "unwritable": ("watch a -o /nowhere/x", 1, "/nowhere/x.json cannot be written"),
    "no socket": ("watch --qmp /nowhere/s", 3, "/nowhere/s: No such file"),
    "no domain named": ("enable", 2, "error: enable: name domains, or --all"),
    "both": ("disable --all a", 2, "error: disable: name domains, or --all"),
    "two watched": ("watch a b", 2, "error: watch: name one domain"),
    "bandwidth": ("estimate a --bandwidth 0", 2, "'0' is no bandwidth such as"),
    "cache": ("estimate a --cache 2Gbit", 2, "'2Gbit' is no size such as"),
    "seconds": ("watch a --wait -1", 2, "'-1' is no number of seconds"),
    "no command": ("", 2, "the following arguments are required: COMMAND"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(host: FakeHost, fph: Any, case: str) -> None:
    """One line says what is wrong, the exit status what kind of thing, and nothing was changed."""
    domain = host.add("a", emulator="relative/qemu")
    if case in PREPARED:
        PREPARED[case](host, domain)
    command, status, line = BAD[case]
    got, out, err = fph(*command.split())
    assert got == status, err
    usage = [text for text in err if text.startswith(("usage:", " "))]
    assert len(err) - len(usage) == 1 and bool(usage) == (status == 2), err
    assert line in err[-1]
    assert not out and not host.defined


def test_libvirt_down(fph: Any, tmp_path: Path) -> None:
    """Without a libvirt, one line says where it was looked for."""
    uri = f"qemu+unix:///system?socket={tmp_path}/none"
    status, out, err = fph("status", "-c", uri)
    assert (status, out) == (3, [])
    assert len(err) == 1 and err[0].startswith(f"fph: no connection to {uri}: ")


def test_status_through_a_read_only_connection(host: FakeHost, said: Any) -> None:
    """What the definition says is shown, and that QEMU was not asked."""
    host.add("a").qemu(query_migrate_capabilities=DENIED)
    out = said("status", "--readonly")
    assert out[1].split() == "a running no - - - - -".split()
    assert out[2].startswith("a: QEMU was not asked, the connection is read-only")


def test_figures_for_people() -> None:
    """Sizes, times and rates as people write them."""
    sizes = {0: "0 B", 1023: "1023 B", 1024: "1 KiB", 5 * GIB: "5.0 GiB", 200 * GIB: "200 GiB"}
    assert {n: show.size(n) for n in sizes} == sizes
    times = {0.51: "0.5 s", 59.2: "59 s", 59.6: "1 min 00 s", 61: "1 min 01 s", 3700: "1 h 01 min"}
    assert {s: show.duration(s) for s in times} == times
    assert show.size(None) == show.duration(None) == "-"
    rates = {"1Gbit": 125e6, "100MiB": 100 * MIB, "1.5G": 1.5e9, "7": 7, "1KB/s": 1000}
    assert {text: bandwidth(text) for text in rates} == rates
    for text in "", "0", "x", "1Tbit", "-1", "1 bits":
        with pytest.raises(ValueError):
            bandwidth(text)


def test_emulators_of_other_machines_are_not_run() -> None:
    """What is checked by running it is a file of this machine."""
    assert change.is_here("qemu:///system") and change.is_here("qemu+unix:///system?socket=/x")
    assert not change.is_here("qemu+ssh://other/system")


COMPLETIONS = {
    "fph ": "status estimate enable disable watch --help",
    "fph e": "estimate enable",
    "fph status": "status",
    "fph status w": "web1 web2",
    "fph enable -c qemu:///other ": "-q -r -c qemu:///other list --all --name",
    "fph -c qemu:///other status -": "--connect --readonly --json --help",
    "fph disable web1 --a": "--all --arrays",
    "fph estimate --all --bandwidth ": "",
    "fph estimate --all --cache ": "",
    "fph watch --qmp /etc/hostn": "/etc/hostname",
}
COMPLETE = """
. {script}
virsh() {{ case $* in *other*) echo "$*" ;; *) printf 'web1\\nweb2\\ndb\\n' ;; esac }}
COMP_LINE=$1 COMP_POINT=${{#1}}
# As readline splits it, for which a colon ends a word
mapfile -t COMP_WORDS < <(grep -oE '[^ :]+|:' <<<"$1")
[ "${{1: -1}}" != ' ' ] || COMP_WORDS+=('')
COMP_CWORD=$((${{#COMP_WORDS[@]}} - 1))
_fph
echo "${{COMPREPLY[*]}}"
"""


@pytest.mark.parametrize("line, words", COMPLETIONS.items(), ids=COMPLETIONS)
def test_completion(line: str, words: str) -> None:
    """bash completes commands, options, files, and domains of the libvirt that is meant."""
    script = paths.REPO / "packaging" / "completion" / "fph"
    command = ["bash", "-c", COMPLETE.format(script=script), "bash", line]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert (done.stdout.strip(), done.stderr) == (words, "")


def test_documented_commands_are_understood() -> None:
    """The command lines of docs/libvirt.md and of fph(1) are such as the tool takes."""
    text = "".join(
        (paths.REPO / name).read_text("utf-8")
        for name in ("docs/libvirt.md", "packaging/man/fph.1.rst")
    )
    lines = re.findall(r"^    (?:# )?fph (.*)$", text, re.MULTILINE)
    lines += re.findall(r"`fph ([^`]*)`", text)
    assert len(lines) > 10
    for line in lines:
        # A command that is only named has its operands behind it.
        words = shlex.split(line)
        parse(words if len(words) > 1 or words == ["status"] else [*words, "DOMAIN"])


def test_manual_has_every_option() -> None:
    """fph(1) names each command and each option, and no other."""
    manual = (paths.REPO / "packaging" / "man" / "fph.1.rst").read_text("utf-8")
    # pylint: disable=protected-access
    commands = next(a for a in parser()._actions if a.dest == "command").choices
    options = {
        text
        for command in commands.values()
        for action in command._actions
        for text in action.option_strings
        if text.startswith("--") and text != "--help"
    }
    named = set(re.findall(r"\*\*(--?[a-z]+)\*\*", manual))
    assert options - named == {"--output"}
    assert {text for text in named if text.startswith("--")} <= options
    assert all(f"\n**{name}**" in manual or f", **{name}**" in manual for name in commands)


def test_output_that_nobody_reads() -> None:
    """A reader that has seen enough is no reason for a traceback."""
    uri = "test:///default"
    for command in f"status -c {uri}", f"status --json -c {uri}":
        # A pipe whose reading end is closed before anything is written
        shell = f"exec 3> >(:); wait $!; {paths.REPO}/scripts/fph {command} >&3"
        done = subprocess.run(["bash", "-c", shell], capture_output=True, text=True, check=False)
        assert (done.returncode, done.stderr) == (1, "")
