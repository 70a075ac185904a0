# SPDX-License-Identifier: GPL-2.0-or-later
"""A libvirt that says and refuses what a test wants, with domains and QEMUs that are no more."""

import json
from pathlib import Path
from typing import Any, Callable, Dict, List, Mapping, Tuple, Union
from xml.etree import ElementTree

import libvirt
import libvirt_qemu
import pytest

from livefph.cli import main
from livefph.domainxml import ATTRIBUTES

GIB = 1 << 30
MIB = 1 << 20
EMULATOR = "/nowhere/qemu"
XML = """<domain type='kvm'>
  <name>{name}</name>
  <devices>
    <emulator>{emulator}</emulator>
    <memballoon model='{model}'/>
  </devices>
</domain>
"""
NAMES = {
    "blocks": ["VIRTIO_BALLOON_F_FREE_PAGE_HINT: hints"],
    "arrays": ["VIRTIO_BALLOON_F_FREE_PAGE_HINT: hints", "VIRTIO_BALLOON_F_HINT_ARRAYS: arrays"],
    "no": [],
}
ESTIMATE = {
    "total-bytes": GIB,
    "absent-bytes": 400 * MIB,
    "scan-time": 120,
    "free-bytes": 524 * MIB,
    "complete": True,
    "ask-to-end": 1830,
    "blocks": [],
    "remaining-bytes": 100 * MIB,
}
Answer = Union[Mapping[str, Any], List[Any], Exception, Callable[[], Any]]


def error(code: int, text: str) -> libvirt.libvirtError:
    """An error as libvirt raises it."""
    err = libvirt.libvirtError(text)
    err.err = (code, libvirt.VIR_FROM_QEMU, text, libvirt.VIR_ERR_ERROR, "", "", "", 0, 0)
    return err


DENIED = error(libvirt.VIR_ERR_OPERATION_DENIED, "operation forbidden for read only access")
GONE = error(libvirt.VIR_ERR_OPERATION_INVALID, "domain is not running")
UNSUPPORTED = error(
    libvirt.VIR_ERR_CONFIG_UNSUPPORTED,
    "unsupported configuration: freePageHinting is not supported by this QEMU binary",
)


def status_answers(offered: str, driver: str, ours: bool = True) -> Dict[str, Answer]:
    """What a QEMU says about its balloon and capabilities."""
    names = ["free-page-hint", "skip-absent-pages"] if ours else ["xbzrle"]
    states = ["VIRTIO_CONFIG_S_DRIVER_OK: ready"] if driver != "none" else []
    return {
        "query-migrate-capabilities": [{"capability": n, "state": True} for n in names],
        "x-query-virtio": [{"name": f"virtio-{n}", "path": n} for n in ("net", "balloon")],
        "x-query-virtio-status": {
            "host-features": {"dev-features": NAMES[offered]},
            "guest-features": {"dev-features": NAMES.get(driver, [])},
            "status": {"statuses": states},
        },
        "query-migrate": {},
    }


class FakeDomain:
    """A domain; `answers` are its QEMU's, by command, the last one again and again."""

    # pylint: disable=invalid-name,missing-function-docstring,too-many-instance-attributes

    def __init__(
        self, name: str, active: bool = True, model: str = "virtio", emulator: str = EMULATOR
    ):
        self._name = name
        self.active = active
        self.permanent = True
        self.number = libvirt.VIR_DOMAIN_RUNNING if active else libvirt.VIR_DOMAIN_SHUTOFF
        self.xml = XML.format(name=name, model=model, emulator=emulator)
        self.answers: Dict[str, List[Answer]] = {}
        self.jobs: List[Any] = [{"type": 0}]
        self.completed: Dict[str, Any] = {"type": 0}
        self.asked: List[Dict[str, Any]] = []
        # Called when the definition is read, with the number of the time
        self.on_read: Callable[[int], None] = lambda _: None
        self._reads = 0

    def qemu(self, **answers: Any) -> "FakeDomain":
        """Have its QEMU answer so; those of InTurn one by one."""
        return self.says({name.replace("_", "-"): answer for name, answer in answers.items()})

    def says(self, answers: Mapping[str, Any]) -> "FakeDomain":
        for command, answer in answers.items():
            self.answers[command] = answer if isinstance(answer, InTurn) else [answer]
        return self

    def name(self) -> str:
        return self._name

    def isActive(self) -> int:
        return int(self.active)

    def isPersistent(self) -> int:
        return int(self.permanent)

    def state(self) -> List[int]:
        return [self.number, 0]

    def XMLDesc(self, _flags: int) -> str:
        self._reads += 1
        self.on_read(self._reads)
        return self.xml

    def jobStats(self, flags: int) -> Any:
        keep = libvirt.VIR_DOMAIN_JOB_STATS_KEEP_COMPLETED
        assert flags in (0, libvirt.VIR_DOMAIN_JOB_STATS_COMPLETED | keep)
        return self.completed if flags else self._next(self.jobs)

    def _next(self, answers: List[Any]) -> Any:
        answer = answers.pop(0) if len(answers) > 1 else answers[0]
        if callable(answer):
            answer = answer()
        if isinstance(answer, Exception):
            raise answer
        return answer

    def monitor(self, text: str) -> str:
        """What QEMU answers to a command."""
        if not self.active:
            raise GONE
        request = json.loads(text)
        self.asked.append(request)
        unknown = {"error": {"class": "CommandNotFound", "desc": "The command has not been found"}}
        answer = self._next(self.answers.get(request["execute"], [unknown]))
        wrapped = isinstance(answer, dict) and "error" in answer
        return json.dumps(answer if wrapped else {"return": answer})


class InTurn(list):  # type: ignore[type-arg]
    """Answers that follow each other."""


class FakeHost:
    """A connection."""

    # pylint: disable=invalid-name,missing-function-docstring

    def __init__(self) -> None:
        self.domains: Dict[str, FakeDomain] = {}
        self.alive = True
        # Whether it has attributes for hints, and whether it takes them for its domains' QEMU
        self.native = False
        self.ours = True
        self.defined: List[str] = []
        self.refusals: List[Exception] = []
        self.inconvertible: List[Exception] = []
        self.listeners: Dict[str, Callable[..., None]] = {}

    def add(self, *args: Any, **options: Any) -> FakeDomain:
        domain = FakeDomain(*args, **options)
        self.domains[domain.name()] = domain
        return domain

    def cut(self) -> Exception:
        """The connection breaks."""
        self.alive = False
        return error(libvirt.VIR_ERR_INTERNAL_ERROR, "client socket is closed")

    def getURI(self) -> str:
        return "qemu:///fake"

    def getLibVersion(self) -> int:
        if not self.alive:
            raise self.cut()
        return 1

    def isAlive(self) -> int:
        return int(self.alive)

    def setKeepAlive(self, *_: int) -> None:
        pass

    def domainEventRegisterAny(self, domain: Any, _event: int, call: Any, opaque: Any) -> None:
        self.listen(self, domain, "end", call, opaque)

    def listen(self, _host: Any, _domain: Any, event: str, call: Any, _opaque: Any) -> None:
        self.listeners[event] = call

    def listAllDomains(self) -> List[FakeDomain]:
        return list(self.domains.values())

    def lookupByName(self, name: str) -> FakeDomain:
        if name not in self.domains or not self.alive:
            raise error(libvirt.VIR_ERR_NO_DOMAIN, "Domain not found")
        return self.domains[name]

    def lookupByUUIDString(self, _uuid: str) -> FakeDomain:
        raise error(libvirt.VIR_ERR_INVALID_ARG, "malformed UUID")

    def domainXMLToNative(self, form: str, text: str, flags: int) -> str:
        assert (form, flags) == ("qemu-argv", 0)
        for refusal in self.inconvertible:
            raise refusal
        balloon = ElementTree.fromstring(text).find("devices/memballoon")
        assert balloon is not None
        device: Dict[str, Any] = {"driver": "virtio-balloon-pci"}
        # One that it does not know is nothing to it.
        if self.native and {balloon.get(name) for name in ATTRIBUTES.values()} == {"on"}:
            if not self.ours:
                raise UNSUPPORTED
            device.update({"free-page-hint": True, "free-page-hint-arrays": True})
        words = json.dumps(device, separators=(",", ":"))
        return f"LC_ALL=C /opt/free-page-hint-arrays/qemu -device '{words}' -msg timestamp=on"

    def defineXMLFlags(self, text: str, flags: int) -> None:
        assert flags == libvirt.VIR_DOMAIN_DEFINE_VALIDATE
        if not self.native and "freePageHint" in text:
            raise error(libvirt.VIR_ERR_XML_INVALID_SCHEMA, "Extra element devices in interleave")
        for refusal in self.refusals:
            raise refusal
        self.defined.append(text)


@pytest.fixture(name="host")
def host_fixture(monkeypatch: pytest.MonkeyPatch) -> FakeHost:
    """A libvirt that is what everybody connects to."""
    host = FakeHost()
    for name in "open", "openReadOnly":
        monkeypatch.setattr(libvirt, name, lambda _uri: host)

    monkeypatch.setattr(libvirt_qemu, "qemuMonitorCommand", lambda d, text, _: d.monitor(text))
    monkeypatch.setattr(libvirt_qemu, "qemuMonitorEventRegister", host.listen)
    return host


@pytest.fixture(name="fph")
def fph_fixture(capsys: pytest.CaptureFixture[str]) -> Any:
    """Runs the tool; returns its exit status, and the lines of its output and of its errors."""

    def run(*argv: str) -> Tuple[int, List[str], List[str]]:
        try:
            status = main(argv)
        except SystemExit as err:
            status = int(err.code or 0)
        out, err_text = capsys.readouterr()
        return status, out.splitlines(), err_text.splitlines()

    return run


def make_emulator(directory: Path, properties: str) -> str:
    """A program that has these properties of the balloon to offer."""
    path = directory / "qemu"
    path.write_text(f"#!/bin/sh\necho '{properties}'\n", "utf-8")
    path.chmod(0o755)
    return str(path)
