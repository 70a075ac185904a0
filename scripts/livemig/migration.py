# SPDX-License-Identifier: GPL-2.0-or-later
"""Migrates a guest from one QEMU to another one and reports what happened."""

import tempfile
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Dict, Mapping, Optional

from livemig.errors import GuestError, MigrationError
from livemig.guest import Event, Guest
from livemig.spec import MigrationSpec

TIMEOUT_SECONDS = 300
ENDED = ("completed", "failed", "cancelled")
# Since QEMU 10.2, the first is the state until the destination has loaded its devices.
POSTCOPY = ("postcopy-device", "postcopy-active")


def _fields(cls: Any, data: Mapping[str, Any]) -> Any:
    names = {item.name.replace("_", "-"): item.name for item in fields(cls)}
    return cls(**{names[key]: value for key, value in data.items() if key in names})


@dataclass(frozen=True)
class Hints:
    """The `free-page-hint` object of query-migrate; times are in microseconds."""

    # pylint: disable=too-many-instance-attributes

    state: str
    reason: Optional[str] = None
    complete: bool = False
    messages: int = 0
    blocks: int = 0
    hinted_bytes: int = 0
    skipped_bytes: int = 0
    redirtied_bytes: int = 0
    requested_bytes: int = 0
    too_small_bytes: int = 0
    cache_freed_bytes: int = 0
    cache_time: int = 0
    stale_bytes: int = 0
    invalid_bytes: int = 0
    invalid_messages: int = 0
    armed_bytes: int = 0
    arm_time: int = 0
    ask_to_first: int = 0
    ask_to_end: int = 0

    @classmethod
    def from_qmp(cls, data: Mapping[str, Any]) -> "Hints":
        """Take the fields that are known here."""
        # As it was called when the first benchmarks were recorded.
        old = {"messages": data["arrays"]} if "arrays" in data else {}
        hints: Hints = _fields(cls, {**old, **data})
        return hints


@dataclass(frozen=True)
class Absent:
    """The `absent-pages` object of query-migrate; the time is in microseconds."""

    reason: Optional[str] = None
    absent_bytes: int = 0
    scan_time: int = 0


@dataclass(frozen=True)
class MigrationResult:
    """The end of a migration, as the source's query-migrate reports it."""

    # pylint: disable=too-many-instance-attributes

    status: str
    total_ms: int
    setup_ms: int
    downtime_ms: int
    sent_bytes: int
    normal_pages: int
    zero_pages: int
    rounds: int
    hints: Optional[Hints]
    absent: Optional[Absent] = None
    error: Optional[str] = None
    raw: Dict[str, Any] = field(default_factory=dict, repr=False)

    @classmethod
    def from_qmp(cls, info: Dict[str, Any]) -> "MigrationResult":
        """Read a query-migrate reply; what is absent counts as 0."""
        ram = info.get("ram", {})
        hints = info.get("free-page-hint")
        absent = info.get("absent-pages")
        return cls(
            status=info.get("status", "none"),
            total_ms=info.get("total-time", 0),
            setup_ms=info.get("setup-time", 0),
            downtime_ms=info.get("downtime", 0),
            sent_bytes=ram.get("transferred", 0),
            normal_pages=ram.get("normal", 0),
            zero_pages=ram.get("duplicate", 0),
            rounds=ram.get("dirty-sync-count", 0),
            hints=Hints.from_qmp(hints) if hints else None,
            absent=_fields(Absent, absent) if absent else None,
            error=info.get("error-desc"),
            raw=info,
        )


def query(guest: Guest) -> MigrationResult:
    """The state of a guest's migration, running or ended."""
    return MigrationResult.from_qmp(guest.qmp("query-migrate"))


def set_capabilities(guest: Guest, capabilities: Mapping[str, bool]) -> None:
    """Switch migration capabilities."""
    guest.qmp(
        "migrate-set-capabilities",
        capabilities=[{"capability": k, "state": v} for k, v in capabilities.items()],
    )


def status_is(*statuses: str) -> Any:
    """A match for wait_event: the migration has one of these states."""

    def match(event: Event) -> bool:
        return event["event"] == "MIGRATION" and event["data"]["status"] in statuses

    return match


def _prepare(source: Guest, spec: MigrationSpec) -> None:
    set_capabilities(source, {"events": True, **spec.common, **spec.capabilities})
    if spec.parameters:
        source.qmp_dict("migrate-set-parameters", dict(spec.parameters))


def start(source: Guest, destination: Guest, spec: MigrationSpec) -> None:
    """Start a migration and return at once."""
    # A unix socket's path is short of 108 bytes; logs can be deep in the file system. It stays as
    # long as the source: postcopy connects again.
    # pylint: disable-next=consider-using-with
    directory = source.belongings.enter_context(tempfile.TemporaryDirectory(prefix="livemig-"))
    uri = f"unix:{directory}/migration"
    set_capabilities(destination, {"events": True, **spec.common})
    destination.qmp("migrate-incoming", uri=uri)
    _prepare(source, spec)
    source.qmp("migrate", uri=uri)
    source.wait_event(status_is("active", *ENDED), "start of the migration", 60)


def cancel(source: Guest, timeout: float = 60) -> None:
    """Cancel a migration and wait for its end. Raises MigrationError if it ends in another way."""
    source.qmp("migrate_cancel")
    try:
        source.wait_event(status_is("cancelled"), "end of the cancelled migration", timeout)
    except GuestError as error:
        result = query(source)
        raise MigrationError(
            f"{error}: the migration is {result.status} ({result.error or 'no reason given'})"
        ) from None


def _completed(source: Guest, timeout: float, *others: Guest) -> MigrationResult:
    result = query(source)
    if result.status not in ENDED:
        source.wait_event(status_is(*ENDED), "end of the migration", timeout)
        result = query(source)
    if result.status != "completed":
        output = "".join(guest.qemu_output() for guest in (source, *others))
        reason = result.error or "no reason given"
        raise MigrationError(f"the migration {result.status}: {reason}{output}")
    return result


def finish(source: Guest, destination: Guest, timeout: float = TIMEOUT_SECONDS) -> MigrationResult:
    """Wait for the end of a migration. Raises MigrationError unless it completed."""
    result = _completed(source, timeout, destination)
    try:
        destination.wait_event(status_is("completed"), "end of the incoming migration", timeout)
    except GuestError as err:
        raise MigrationError(f"the destination failed: {err}") from err
    return result


def let_end(source: Guest, destination: Guest) -> MigrationResult:
    """Let a migration end that was held back, however much the guest writes."""
    source.qmp("migrate-set-parameters", max_bandwidth=0, downtime_limit=20000)
    return finish(source, destination)


def migrate(source: Guest, destination: Guest, spec: MigrationSpec) -> MigrationResult:
    """Migrate a guest. When this returns, it runs at the destination (unless that starts stopped).

    The source remains, stopped. Raises MigrationError if the migration did not complete.
    """
    start(source, destination, spec)
    return finish(source, destination)


def save(source: Guest, file: Path, spec: MigrationSpec) -> MigrationResult:
    """Migrate a guest to a file. Raises MigrationError unless it completed."""
    _prepare(source, spec)
    source.qmp("migrate", uri=f"file:{file}")
    source.wait_event(status_is(*ENDED), "end of the migration", TIMEOUT_SECONDS)
    return _completed(source, TIMEOUT_SECONDS)


def restore(destination: Guest, file: Path, spec: MigrationSpec) -> None:
    """Let an incoming guest take what save() wrote."""
    set_capabilities(destination, {"events": True, **spec.common})
    destination.qmp("migrate-incoming", uri=f"file:{file}")
    destination.wait_event(status_is("completed"), "end of the restore", TIMEOUT_SECONDS)
