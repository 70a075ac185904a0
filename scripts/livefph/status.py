# SPDX-License-Identifier: GPL-2.0-or-later
"""What a domain and its QEMU say about hints."""

from dataclasses import dataclass, field
from typing import Any, Dict, List, Optional

from livefph import domainxml
from livefph.connection import Domain, FphError, NotRunning, QmpError

BALLOON = "virtio-balloon"
FEATURES = (
    ("arrays", "VIRTIO_BALLOON_F_HINT_ARRAYS"),
    ("blocks", "VIRTIO_BALLOON_F_FREE_PAGE_HINT"),
)
STOCK = "its QEMU is a stock one, which has no estimate and skips no absent pages"
# The reasons of QEMU's that call for some explanation
REASONS = {
    "no-arrays": "the guest's driver has no arrays and was not asked: only absent pages are known",
    "no-device": "its balloon offers no hints: 'fph enable' it, and start it anew",
    "no-driver": "the guest has no driver for the balloon",
    "vm-stopped": "the guest is stopped and cannot be asked: only absent pages are known",
    "timeout": "the guest did not answer in time (free-page-hint-wait)",
    "poison": "the guest poisons its free pages",
    "denied": "QEMU may not read /proc/self/pagemap, so that absent pages are not known",
    "no-proof": "nothing shows which pages of this kind of memory are absent",
    "cancelled": "a migration began meanwhile",
}


@dataclass
class Status:
    """One domain; None is what could not be found out."""

    name: str
    state: str
    # After the next start: "no", "blocks", "arrays"
    defined: Optional[str] = None
    # The same, of the QEMU that runs now; and what the guest's driver uses of it
    offered: Optional[str] = None
    driver: Optional[str] = None
    # Migration capabilities
    hints: Optional[bool] = None
    absent: Optional[bool] = None
    # Of query-migrate, if its QEMU has migrated or tried to
    last: Dict[str, Any] = field(default_factory=dict)
    notes: List[str] = field(default_factory=list)


def skipped_bytes(info: Dict[str, Any]) -> Optional[int]:
    """How much a query-migrate says was skipped and stayed so."""
    hints, absent = info.get("free-page-hint"), info.get("absent-pages")
    if hints is None and absent is None:
        return None
    hints, absent = hints or {}, absent or {}
    skipped: int = hints.get("skipped-bytes", 0) + absent.get("absent-bytes", 0)
    return max(0, skipped - hints.get("redirtied-bytes", 0) - hints.get("requested-bytes", 0))


def _features(of_device: Dict[str, Any]) -> str:
    names = {text.split(":")[0] for text in of_device.get("dev-features", [])}
    return next((word for word, name in FEATURES if name in names), "no")


def _ask_balloon(domain: Domain, status: Status) -> None:
    paths = [d["path"] for d in domain.qmp("x-query-virtio") if d["name"] == BALLOON]
    if not paths:
        status.offered = "no"
        status.notes.append("it has no virtio balloon")
        return
    device = domain.qmp("x-query-virtio-status", path=paths[0])
    status.offered = _features(device.get("host-features", {}))
    states = {text.split(":")[0] for text in device.get("status", {}).get("statuses", [])}
    ready = "VIRTIO_CONFIG_S_DRIVER_OK" in states
    status.driver = _features(device.get("guest-features", {})) if ready else "none"


def _ask_capabilities(domain: Domain, status: Status) -> None:
    found = {c["capability"]: c["state"] for c in domain.qmp("query-migrate-capabilities")}
    status.hints = found.get("free-page-hint")
    status.absent = found.get("skip-absent-pages")
    if status.hints is None:
        status.notes.append(STOCK)


def look(domain: Domain) -> Status:
    """Ask a domain; only a lost connection is an error here."""
    status = Status(domain.name, domain.state())
    try:
        definition = domainxml.read(domain.definition())
        if domain.persistent():
            status.defined = definition.offered
        if definition.model not in domainxml.MODELS:
            status.notes.append(f"its balloon is of model '{definition.model}': no hints")
    except FphError as err:
        status.notes.append(str(err))
    if not domain.active():
        return status
    try:
        _ask_capabilities(domain, status)
        _ask_balloon(domain, status)
        status.last = domain.qmp("query-migrate")
    except NotRunning:
        status.state = domain.state()
    except QmpError as err:
        status.notes.append(f"its QEMU does not say: {err}")
    except FphError as err:
        status.notes.append(f"QEMU was not asked, {err}")
    if status.offered and status.defined not in (None, status.offered):
        status.notes.append(f"its definition has '{status.defined}', from the next start on")
    return status


def last_words(info: Dict[str, Any]) -> str:
    """What became of the last migration of a QEMU, in a few words."""
    status = str(info.get("status", "none"))
    if status == "none":
        return "-"
    # A QEMU that a guest has come to has no figures.
    return status if "ram" in info else f"{status}, came in"
