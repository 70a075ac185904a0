# SPDX-License-Identifier: GPL-2.0-or-later
"""Follows a migration: samples of QEMU's or libvirt's figures, and what they add up to."""

import contextlib
import json
import threading
import time
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Callable, Dict, List, Optional, Union

from livefph.connection import Domain, FphError, LibvirtFailure, NotRunning, ReadOnly, Socket
from livefph.status import skipped_bytes

EVENT = "MIGRATION_FREE_PAGES"
IDLE = ("none", "completed", "failed", "cancelled")
# What the expected end is judged by
WINDOW_SECONDS = 5
# The event of the end comes together with the end.
EVENT_SECONDS = 1
# virDomainJobType, virDomainJobOperation
JOB_NONE, JOB_COMPLETED, JOB_CANCELLED, MIGRATION_OUT = 0, 3, 5, 5

Source = Union[Domain, Socket]


@dataclass(frozen=True)
class Sample:
    """A migration at a moment; bytes, bytes per second, seconds since it began."""

    seconds: float
    status: str
    total: int = 0
    remaining: int = 0
    sent: int = 0
    rate: float = 0
    dirty_rate: float = 0
    round: int = 0
    # None: libvirt alone was asked, which does not know
    skipped: Optional[int] = None
    # Seconds until the end, None: not in sight
    expected: Optional[float] = None


@dataclass
class Record:
    """What was seen of a migration."""

    name: str
    status: str = "none"
    error: Optional[str] = None
    total_ms: Optional[int] = None
    downtime_ms: Optional[int] = None
    sent: Optional[int] = None
    hints: Dict[str, Any] = field(default_factory=dict)
    absent: Dict[str, Any] = field(default_factory=dict)
    samples: List[Sample] = field(default_factory=list)

    @property
    def skipped(self) -> Optional[int]:
        """Bytes that were skipped, by the last that was heard of it."""
        known = [s.skipped for s in self.samples if s.skipped]
        if known:
            return known[-1]
        info = {"free-page-hint": self.hints, "absent-pages": self.absent}
        return skipped_bytes(info) if self.hints or self.absent else None

    def as_json(self) -> str:
        """All of it, for programs."""
        return json.dumps({**asdict(self), "skipped": self.skipped}, indent=2)


def from_qmp(info: Dict[str, Any]) -> Sample:
    """A sample of query-migrate."""
    ram = info.get("ram", {})
    return Sample(
        seconds=info.get("total-time", 0) / 1000,
        status=info["status"],
        total=ram.get("total", 0),
        remaining=ram.get("remaining", 0),
        sent=ram.get("transferred", 0),
        rate=ram.get("mbps", 0) * 1e6 / 8,
        dirty_rate=ram.get("dirty-pages-rate", 0) * ram.get("page-size", 4096),
        round=ram.get("dirty-sync-count", 0),
        skipped=skipped_bytes(info),
    )


def from_job(job: Dict[str, Any]) -> Sample:
    """A sample of libvirt's statistics, which a read-only connection has too."""
    return Sample(
        seconds=job.get("time_elapsed", 0) / 1000,
        status="active",
        total=job.get("memory_total", 0),
        remaining=job.get("memory_remaining", 0),
        sent=job.get("memory_processed", 0),
        rate=job.get("memory_bps", 0),
        dirty_rate=job.get("memory_dirty_rate", 0) * job.get("memory_page_size", 4096),
        round=job.get("memory_iteration", 0),
    )


def expected_seconds(samples: List[Sample]) -> Optional[float]:
    """Seconds until the end, if all goes on as lately; None: it is not known, or not in sight."""
    last = samples[-1]
    progress, seconds = 0, 0.0
    for before, after in zip(samples[-2::-1], samples[:0:-1]):
        if last.seconds - before.seconds > WINDOW_SECONDS or not before.sent:
            break
        # What a round adds, and what the guest says is free, is no progress of the sender's.
        if (before.round, before.skipped) == (after.round, after.skipped):
            progress += before.remaining - after.remaining
            seconds += after.seconds - before.seconds
    if seconds <= 0:
        return None
    # Zero pages count here, as they do not in the bytes that were sent.
    speed = progress / seconds - last.dirty_rate
    return last.remaining / speed if speed > 0 else None


class Watcher:
    """Follows one migration of one source."""

    def __init__(self, source: Source, seen: Callable[[Record], None]):
        self.record = Record(source.name)
        self._source = source
        self._seen = seen
        # What an earlier migration left in query-migrate
        self._old: Optional[Dict[str, Any]] = None
        self._plain = False
        self._end: Dict[str, Any] = {}
        self._ended = threading.Event()

    def follow(self, wait: float, interval: float) -> None:
        """Look until the migration has ended; wait so many seconds for it to begin."""
        self._listen()
        deadline = time.monotonic() + wait
        while True:
            try:
                running = self._look()
            except NotRunning as err:
                self._gone(err)
                return
            if not running:
                if self.record.status != "none":
                    return
                if time.monotonic() >= deadline:
                    raise FphError("no migration is running")
            self._seen(self.record)
            time.sleep(interval)

    def _listen(self) -> None:
        # Not everybody may listen: then there is what is seen by looking.
        with contextlib.suppress(FphError):
            self._source.on_end(self._over)
        with contextlib.suppress(FphError):
            self._source.on_event(EVENT, self._heard)

    def _over(self, job: Dict[str, Any]) -> None:
        self._end = job
        self._ended.set()

    def _heard(self, data: Dict[str, Any]) -> None:
        self.record.hints = data.get("free-page-hint", {})
        self.record.absent = data.get("absent-pages", {})

    def _look(self) -> bool:
        if not self._plain:
            try:
                return self._look_at_qemu(self._source.qmp("query-migrate"))
            except ReadOnly:
                self._plain = True
        job = self._source.job()
        if job.get("type", JOB_NONE) == JOB_NONE or job.get("operation") != MIGRATION_OUT:
            if self.record.samples:
                raise NotRunning("the migration has ended")
            return False
        self._add(from_job(job))
        return True

    def _look_at_qemu(self, info: Dict[str, Any]) -> bool:
        status = info.get("status", "none")
        if not self.record.samples and status in IDLE:
            if self._old is None or info == self._old:
                self._old = info
                return False
        record = self.record
        record.hints = info.get("free-page-hint", record.hints)
        record.absent = info.get("absent-pages", record.absent)
        record.error = info.get("error-desc")
        self._add(from_qmp({"status": status, **info}))
        if status not in IDLE:
            return True
        record.total_ms = info.get("total-time")
        record.downtime_ms = info.get("downtime")
        record.sent = info.get("ram", {}).get("transferred")
        return False

    def _add(self, sample: Sample) -> None:
        record = self.record
        record.status = sample.status
        if sample.total:
            expected = expected_seconds([*record.samples, sample])
            record.samples.append(replace(sample, expected=expected))

    def _last_job(self) -> Dict[str, Any]:
        """What libvirt says of a migration that has ended."""
        if self._ended.wait(EVENT_SECONDS):
            return self._end
        with contextlib.suppress(LibvirtFailure):
            return self._source.job(completed=True)
        # A transient domain has gone, and what libvirt knew of it.
        return {}

    def _gone(self, err: NotRunning) -> None:
        """The domain's QEMU is no more here: libvirt may know how that came."""
        if not self.record.samples and not self.record.hints and not self._old:
            raise err
        job = self._last_job()
        record = self.record
        if job.get("operation") != MIGRATION_OUT:
            record.status = "gone"
            record.error = str(err)
            return
        # An event has no type: it is of a migration that was completed.
        kinds = {JOB_COMPLETED: "completed", JOB_CANCELLED: "cancelled"}
        record.status = kinds.get(job.get("type", JOB_COMPLETED), "failed")
        record.error = job.get("errmsg")
        record.total_ms = job.get("time_elapsed")
        record.downtime_ms = job.get("downtime")
        record.sent = job.get("memory_processed")
        if record.samples and record.status == "completed":
            last = record.samples[-1]
            end = replace(last, status="completed", remaining=0, expected=None)
            seconds = max(last.seconds, (record.total_ms or 0) / 1000)
            record.samples.append(replace(end, seconds=seconds, sent=record.sent or last.sent))
