# SPDX-License-Identifier: GPL-2.0-or-later
"""libvirt's domains and their QEMUs; what goes wrong is one line, with an exit status."""

import contextlib
import json
import socket
import threading
from typing import Any, Callable, Dict, List, Optional

try:
    import libvirt
    import libvirt_qemu
except ImportError:
    # A socket of QEMU's can be watched without it.
    libvirt = None

# Of the server's silence, until the connection counts as lost
KEEPALIVE = (5, 3)
QMP_SECONDS = 10
# As virsh calls them, by their number: virDomainState
STATES = "no state/running/idle/paused/in shutdown/shut off/crashed/pmsuspended".split("/")


class Failure(Exception):
    """Ends the tool, or what it does with one domain, with a line and an exit status."""

    status = 3


class FphError(Failure):
    """What was asked for is not possible; nothing was changed."""

    status = 1


class LibvirtFailure(FphError):
    """libvirt, or QEMU behind it, did not do what it was asked for."""

    status = 3


class ReadOnly(LibvirtFailure):
    """The connection may look, and no more."""


class NotRunning(LibvirtFailure):
    """The domain has no QEMU, or has none any more."""

    status = 1


class ConnectionLost(Failure):
    """Nobody answers any more, of whatever domain: no FphError, which would be of one of them."""


class QmpError(FphError):
    """QEMU refused a command."""

    def __init__(self, kind: str, text: str):
        super().__init__(text)
        self.missing = kind == "CommandNotFound"


def one_line(text: object) -> str:
    """A message of somebody else's, on one line."""
    return " ".join(str(text).split())


def _pack(command: str, arguments: Dict[str, Any]) -> str:
    return json.dumps({"execute": command, "arguments": arguments})


def _unpack(reply: str) -> Any:
    answer = json.loads(reply)
    if "error" in answer:
        raise QmpError(answer["error"].get("class", ""), one_line(answer["error"].get("desc", "")))
    return answer["return"]


class Domain:
    """A domain of libvirt's."""

    def __init__(self, host: "Host", domain: Any):
        self._host = host
        self._ask = host.ask
        self._domain = domain
        self.name: str = self._ask(domain.name)

    def state(self) -> str:
        """As virsh calls it."""
        number = self._ask(self._domain.state)[0]
        return STATES[number] if number < len(STATES) else STATES[0]

    def active(self) -> bool:
        """Whether a QEMU runs it."""
        return bool(self._ask(self._domain.isActive))

    def persistent(self) -> bool:
        """Whether it has a definition that outlives its QEMU."""
        return bool(self._ask(self._domain.isPersistent))

    def definition(self, secure: bool = False) -> str:
        """The XML that it is started with next time; with its passwords, to be defined again."""
        flags = libvirt.VIR_DOMAIN_XML_INACTIVE
        if secure:
            flags |= libvirt.VIR_DOMAIN_XML_SECURE
        return str(self._ask(self._domain.XMLDesc, flags))

    def qmp(self, command: str, **arguments: Any) -> Any:
        """Run a QMP command; returns what it returns."""
        request = _pack(command, arguments)
        return _unpack(self._ask(libvirt_qemu.qemuMonitorCommand, self._domain, request, 0))

    def job(self, completed: bool = False) -> Dict[str, Any]:
        """libvirt's statistics of the domain's job, or of the last one."""
        # Whoever asks for those of the last one next is to have them, too.
        keep = libvirt.VIR_DOMAIN_JOB_STATS_KEEP_COMPLETED
        flags = libvirt.VIR_DOMAIN_JOB_STATS_COMPLETED | keep if completed else 0
        return dict(self._ask(self._domain.jobStats, flags))

    def on_end(self, call: Callable[[Dict[str, Any]], None]) -> None:
        """Have libvirt's statistics of a migration reported when it ends, from another thread."""
        register = self._host.connection.domainEventRegisterAny
        event = libvirt.VIR_DOMAIN_EVENT_ID_JOB_COMPLETED
        self._ask(register, self._domain, event, lambda *arguments: call(arguments[2]), None)

    def on_event(self, event: str, call: Callable[[Any], None]) -> None:
        """Have an event of QEMU's reported, from another thread."""
        register = libvirt_qemu.qemuMonitorEventRegister
        what = (self._host.connection, self._domain, event)
        self._ask(register, *what, lambda *found: call(json.loads(found[5] or "{}")), None)


class Host:
    """A connection to libvirt."""

    def __init__(self, uri: Optional[str], read_only: bool = False, events: bool = False):
        if libvirt is None:
            raise LibvirtFailure("no Python binding of libvirt: apt install python3-libvirt")
        # Without this, libvirt writes what it raises to stderr too.
        libvirt.registerErrorHandler(lambda *_: None, None)
        self.connection: Any = None
        # Where libvirt is
        self.uri = uri or "libvirt"
        if events:
            libvirt.virEventRegisterDefaultImpl()
            threading.Thread(target=_run_events, daemon=True).start()
        self.connection = self.ask(libvirt.openReadOnly if read_only else libvirt.open, uri)
        self.uri = self.ask(self.connection.getURI)
        if events:
            # Not all of libvirt's drivers have a server that could fall silent.
            with contextlib.suppress(libvirt.libvirtError):
                self.connection.setKeepAlive(*KEEPALIVE)

    def domains(self) -> List[Domain]:
        """All domains, by name."""
        found = self.ask(self.connection.listAllDomains)
        return sorted((Domain(self, domain) for domain in found), key=lambda d: d.name)

    def domain(self, name: str) -> Domain:
        """The domain of a name, or of a UUID."""
        for lookup in self.connection.lookupByName, self.connection.lookupByUUIDString:
            with contextlib.suppress(libvirt.libvirtError):
                return Domain(self, lookup(name))
        # Or nobody was there to find it.
        self.ask(self.connection.getLibVersion)
        raise FphError(f"{name}: {self.uri} has no such domain")

    def define(self, text: str) -> None:
        """Replace a domain's definition, if libvirt finds it valid."""
        self.ask(self.connection.defineXMLFlags, text, libvirt.VIR_DOMAIN_DEFINE_VALIDATE)

    def command_line(self, text: str) -> str:
        """What libvirt would start the QEMU of a domain with; there need not be such a domain."""
        return str(self.ask(self.connection.domainXMLToNative, "qemu-argv", text, 0))

    def _lost(self) -> bool:
        try:
            return self.connection is not None and not self.connection.isAlive()
        except libvirt.libvirtError:
            return True

    def ask(self, call: Callable[..., Any], *arguments: Any) -> Any:
        """Call a function of libvirt's, and turn its errors into ours."""
        try:
            return call(*arguments)
        except libvirt.libvirtError as err:
            text = one_line(err.get_error_message() or err)
            code = err.get_error_code()
            if self.connection is None:
                raise LibvirtFailure(f"no connection to {self.uri}: {text}") from err
            if self._lost():
                raise ConnectionLost(f"the connection to {self.uri} was lost: {text}") from err
            if code == libvirt.VIR_ERR_OPERATION_DENIED:
                raise ReadOnly(f"the connection is read-only: {text}") from err
            if code in (libvirt.VIR_ERR_OPERATION_INVALID, libvirt.VIR_ERR_NO_DOMAIN):
                raise NotRunning(text) from err
            raise LibvirtFailure(text) from err


def _run_events() -> None:
    while True:
        with contextlib.suppress(libvirt.libvirtError):
            libvirt.virEventRunDefaultImpl()


class Socket:
    """A QMP socket of a QEMU that libvirt does not run."""

    def __init__(self, path: str):
        self.name = path
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.settimeout(QMP_SECONDS)
        self._lines = self._socket.makefile("r", encoding="utf-8")
        self._call: Dict[str, Callable[[Any], None]] = {}
        try:
            self._socket.connect(path)
        except OSError as err:
            raise LibvirtFailure(f"{path}: {err.strerror or err}") from err
        if "QMP" not in self._read():
            raise LibvirtFailure(f"{path}: this is no QMP socket")
        self.qmp("qmp_capabilities")

    def on_end(self, call: Callable[[Dict[str, Any]], None]) -> None:
        """Nobody keeps statistics of a migration but QEMU."""

    def on_event(self, event: str, call: Callable[[Any], None]) -> None:
        """Have an event reported, when an answer is waited for."""
        self._call[event] = call

    def _read(self) -> Dict[str, Any]:
        try:
            line = self._lines.readline()
            message: Dict[str, Any] = json.loads(line) if line else {}
        except socket.timeout as err:
            raise LibvirtFailure(f"{self.name}: no answer; is somebody connected to it?") from err
        except (OSError, ValueError) as err:
            raise ConnectionLost(f"{self.name}: {err}") from err
        if not message:
            raise NotRunning(f"{self.name}: QEMU has ended")
        return message

    def qmp(self, command: str, **arguments: Any) -> Any:
        """Run a command; returns what it returns."""
        try:
            self._socket.sendall(_pack(command, arguments).encode() + b"\n")
        except OSError as err:
            raise NotRunning(f"{self.name}: QEMU has ended") from err
        while True:
            message = self._read()
            if "event" in message:
                self._call.get(message["event"], lambda _: None)(message.get("data", {}))
            else:
                return _unpack(json.dumps(message))

    def job(self, completed: bool = False) -> Dict[str, Any]:
        """As on_end()."""
        del completed
        return {}
