# SPDX-License-Identifier: GPL-2.0-or-later
"""The matrix: what is migrated how, in which modes, how often, and what it must show.

A scenario's name is made from its values: two that differ have different names.
"""

import fnmatch
from dataclasses import dataclass, replace
from typing import Any, Dict, Iterator, List, Optional, Sequence, Tuple

from livebench.filecache import HotAndCold, MappedHot, PageCache, WantedAgain, XfsPageCache
from livebench.workloads import QEMU_MIB, SYSBENCH, AllocLoop, Alternate, Bookworm, Compile
from livebench.workloads import Fragmented, Freed, Held, Idle, Sysbench, Touching, Workload
from livemig.errors import LivemigError

GIB = 1024

# All that the free memory can be done with; "none" adds nothing where nothing runs in the guest.
ALL = ("legacy", "stock-hints", "stock-reporting", "stock-driver", "array", "floor")
MAIN = ("legacy", "stock-hints", "array", "floor")
# The floor's destination is stopped: nothing can be watched there.
WATCHED = ("legacy", "none", "stock-hints", "stock-reporting", "stock-driver", "array")
# What is absent is known without the guest.
ABSENT = ("absent", "array-absent")
SETTLED = ("absent", "absent-reporting", "array-absent")
QUICK = (*MAIN, *ABSENT)
# Stock QEMU asks for no hints if postcopy may follow.
POSTCOPY = ("legacy", "none", "array")
# The guest's kernel zeroes what it allocates: whose driver allocates what it hints?
ZEROING = ("legacy", "stock-hints", "stock-driver", "array", "absent", "stock-driver-absent")


def short(mib: int) -> str:
    """A size in a name."""
    return f"{mib}m" if mib % GIB else f"{mib // GIB}g"


@dataclass(frozen=True)
class Target:
    """What a mode has to show: a metric, at most (at least) so many times that of another.

    Without another mode to compare with, the metric itself.
    """

    limit: float
    against: Optional[str] = None
    mode: str = "array"
    metric: str = "total_ms"
    at_least: bool = False

    def reached(self, value: float) -> bool:
        """Whether a measured ratio, or value, is good enough."""
        return value >= self.limit if self.at_least else value <= self.limit

    @property
    def text(self) -> str:
        """The target in words."""
        sign = "≥" if self.at_least else "≤"
        other = f" × {self.against}" if self.against else ""
        return f"{self.mode}: {self.metric} {sign} {self.limit:g}{other}"


@dataclass(frozen=True)
class Scenario:
    """One row of the matrix."""

    # pylint: disable=too-many-instance-attributes

    workload: Workload
    modes: Tuple[str, ...] = ALL
    runs: int = 5
    mem_mib: int = 8 * GIB
    vcpus: int = 4
    # Bandwidth limit in Gbit/s; 0: none.
    gbit: int = 0
    # Channels; 0: no multifd.
    multifd: int = 0
    # How many of these guests leave at once.
    guests: int = 1
    # The round after which it is switched to postcopy, if at all; hints are round 0.
    postcopy: Optional[int] = None
    # Of the memory-backend-* that the guest's memory is.
    backend: str = "ram"
    # The guest zeroes memory that it allocates, as most distributions' kernels do.
    init_on_alloc: bool = False
    # Whether the host may back its memory with transparent huge pages.
    huge_pages: bool = True
    # The order of the smallest blocks that are reported to the host, where it is on.
    reporting_order: Optional[int] = None
    # The host has swapped the guest's memory out.
    swapped: bool = False
    # Of multifd's channels: one of QEMU's multifd-compression.
    compression: str = ""
    targets: Tuple[Target, ...] = ()
    # The modes that bench-quick runs, if any.
    quick: Tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """Made from the values."""
        parts = ["postcopy"] if self.postcopy is not None else []
        parts += [self.workload.name, short(self.mem_mib)]
        parts += [f"{self.vcpus}cpu"] if self.vcpus != 4 else []
        return "-".join(parts + [word for word, _ in self._special() if word])

    @property
    def about(self) -> str:
        """One line for people."""
        usual = f"{self.mem_mib} MiB, {self.vcpus} vCPUs, {self.workload.about}"
        return "; ".join([usual, *(text for _, text in self._special())])

    def _special(self) -> Iterator[Tuple[str, str]]:
        """What is not as usual: how its name says so, and for people."""
        if self.gbit:
            yield f"{self.gbit}gbit", f"{self.gbit} Gbit/s"
        if self.multifd:
            word = f"multifd{self.multifd}"
            text = f"multifd, {self.multifd} channel{'s' if self.multifd > 1 else ''}"
            if self.compression:
                word, text = f"{word}-{self.compression}", f"{text}, {self.compression}"
            yield word, text
        if self.guests > 1:
            yield f"{self.guests}guests", f"{self.guests} guests at once"
        if self.postcopy is not None:
            word = "" if self.postcopy else "round0"
            yield word, f"switched to postcopy right after round {self.postcopy}"
        if self.backend != "ram":
            yield self.backend, f"memory-backend-{self.backend}"
        if self.init_on_alloc:
            yield "init_on_alloc", "init_on_alloc=1"
        if self.reporting_order is not None:
            order = self.reporting_order
            yield f"order{order}", f"blocks are reported from order {order} on"
        if not self.huge_pages:
            yield "small", "no transparent huge pages"
        if self.swapped:
            yield "swapped", "the host has swapped it out"

    @property
    def host_mib(self) -> Tuple[int, int]:
        """The host's memory that the sources, and destinations without hints, need at most."""
        # A look at a page of a memfd makes one, and QEMU looks at all.
        whole = self.mem_mib + QEMU_MIB
        there = whole if self.backend == "memfd" else self.workload.host_mib(self.mem_mib)
        here = whole if self.init_on_alloc or self.workload.suite else there
        return self.guests * here, self.guests * there

    def but(self, **wanted: Optional[int]) -> "Scenario":
        """The same with what is wanted instead, for trying: then there are no targets."""
        changes: Dict[str, Any] = {name: value for name, value in wanted.items() if value}
        return replace(self, targets=(), **changes) if changes else self


# Looking for what is absent costs next to nothing where nothing is.
SCAN = Target(0.01, mode="absent", metric="scan_share")


def _against(legacy: float, stock: float, floor: Optional[float] = None) -> Tuple[Target, ...]:
    targets = (Target(legacy, "legacy"), Target(stock, "stock-hints"))
    return targets + ((Target(floor, "floor"),) if floor else ())


def _declared() -> Iterator[Scenario]:
    # The 2018 table's first row: 1757 to 284 ms.
    targets = (*_against(0.28, 0.8, 1.15), Target(0.35, "legacy", "absent"))
    yield Scenario(Idle(), (*ALL, *SETTLED), runs=10, targets=targets, quick=QUICK)
    # Its second row: 2528 to 1402 ms.
    quick = ("legacy", "stock-hints", "array")
    yield Scenario(Compile(), runs=10, targets=_against(0.56, 1.0), quick=quick)
    # And how long the compilation takes: 5:12 and 5:06.
    targets = (Target(1.02, "legacy", metric="compile_s"),)
    yield Scenario(Compile(to_the_end=True), (*WATCHED, "array-cache"), targets=targets)

    # Memory that was written and freed is what only hints can skip.
    for percent in (25, 50):
        yield Scenario(Freed(percent), (*ALL, *SETTLED), targets=(Target(1.10, "floor"),))
    targets = (
        *_against(0.05, 0.5, 1.10),
        Target(0.35, "stock-reporting", "absent-reporting"),
        Target(1.3, "array", "absent-reporting"),
    )
    yield Scenario(Freed(75), (*ALL, *SETTLED), targets=targets)

    # How much is free. At 0 %, asking is all cost, and so is looking for what is absent.
    targets = (Target(1.02, "legacy"), SCAN)
    yield Scenario(Held(0), (*MAIN, "none", *ABSENT), mem_mib=4 * GIB, vcpus=2, targets=targets)
    for percent in (25, 50, 75, 95):
        yield Scenario(Held(percent), (*MAIN, "none"), mem_mib=4 * GIB, vcpus=2)

    yield from _page_cache()
    yield Scenario(Fragmented(), MAIN, runs=3, mem_mib=2 * GIB)
    yield Scenario(Fragmented(minutes=60), ("array",), runs=1, mem_mib=640)

    # What the guest loses while it is moved. Over a slow link, stock hints keep its free memory
    # for seconds.
    targets = (Target(0.95, "legacy", metric="window_kept", at_least=True),)
    for loop, gbit in ((AllocLoop(), 0), (AllocLoop(0.05), 1)):
        yield Scenario(loop, WATCHED, mem_mib=4 * GIB, gbit=gbit, targets=targets)
    targets = (Target(0.98, "legacy", metric="window_kept", at_least=True),)
    for test in SYSBENCH:
        yield Scenario(Sysbench(test), WATCHED, runs=3, mem_mib=2 * GIB, targets=targets)

    # How the cost grows with the guest; 8 GiB is above.
    for gib in (1, 2, 4, 16, 32):
        quick = QUICK if gib == 1 else ()
        yield Scenario(Idle(), (*MAIN, *ABSENT), mem_mib=gib * GIB, quick=quick)
    targets = (
        *_against(0.22, 0.75, 1.15),
        Target(50, metric="ask_to_end_ms"),
        Target(0.2, "legacy", "absent"),
        Target(5, mode="absent", metric="scan_ms"),
    )
    yield Scenario(Idle(), (*MAIN, *ABSENT), mem_mib=64 * GIB, targets=targets, quick=QUICK)

    # Slow links make what is not sent worth more; memory was written and freed.
    for gbit in (1, 10, 25, 0):
        yield Scenario(Freed(50), MAIN, runs=3, mem_mib=2 * GIB, gbit=gbit)

    # More channels send faster what there is to send.
    for channels in (1, 2, 4, 0):
        yield Scenario(Freed(50), MAIN, runs=3, mem_mib=4 * GIB, multifd=channels)

    # A host that is evacuated: small guests leave all at once.
    for guests in (2, 4, 8):
        yield Scenario(Freed(50), MAIN, runs=3, mem_mib=GIB // 2, vcpus=1, guests=guests)

    # Postcopy: while the guest runs at the destination already, hints should cost nothing.
    metrics = ("postcopy_ms", "rss_destination_after_mib")
    targets = tuple(Target(1.05, "none", metric=metric) for metric in metrics)
    for percent in (0, 75):
        for after in (1, 0):
            yield Scenario(Touching(percent), POSTCOPY, runs=3, postcopy=after, targets=targets)
    yield Scenario(
        Touching(), POSTCOPY, mem_mib=4 * GIB, postcopy=1, backend="memfd", targets=targets
    )

    # A stock driver allocates what it hints, and such a guest writes to what it allocates.
    # Where nothing was touched, its hints may do no harm.
    targets = (
        Target(1.1, "absent", "stock-driver-absent"),
        Target(64, mode="stock-driver-absent", metric="rss_source_growth_mib"),
    )
    yield Scenario(Idle(), ZEROING, mem_mib=2 * GIB, init_on_alloc=True, targets=targets)
    for workload in (Idle(), Freed(75)):
        yield Scenario(workload, ZEROING, init_on_alloc=True)

    # And a guest that people have, without and with the guest package.
    modes = ("legacy", "stock-hints", "array", *ABSENT)
    targets = (
        Target(0.5, "stock-hints"),
        Target(0, metric="redirtied_mib"),
        Target(16, metric="rss_source_growth_mib"),
    )
    yield Scenario(Bookworm(), modes, runs=3, mem_mib=4 * GIB, vcpus=2, targets=targets)

    yield from _absent()


def _page_cache() -> Iterator[Scenario]:
    # Where blocks of the largest order are few, and hints alone help little.
    full = tuple(
        Target(0.35, "legacy", "array-cache", metric) for metric in ("total_ms", "sent_mib")
    )
    caches = ("array-cache-768m", "array-cache")
    mib = 3 * GIB
    yield Scenario(PageCache(), (*MAIN, *caches), mem_mib=mib, targets=full)
    yield Scenario(XfsPageCache(), ("legacy", "array-cache"), runs=3, mem_mib=mib, targets=full)
    # What has to be freed takes longer than to send it where nothing limits the link.
    modes = ("legacy", "array", "array-cache")
    for gbit in (1, 10):
        yield Scenario(PageCache(), modes, runs=3, mem_mib=mib, gbit=gbit)
    for workload, metric in ((HotAndCold(), "after10_rate"), (MappedHot(), "window_kept")):
        targets = (Target(0.95, "legacy", "array-cache", metric, at_least=True),)
        yield Scenario(workload, modes, runs=3, mem_mib=mib, targets=targets)
    # What it costs if the cache that was freed is wanted again at once.
    for limit in (0, 100 * 10**6):
        yield Scenario(WantedAgain(limit=limit), ("legacy", "array", *caches), runs=3, mem_mib=mib)


def _absent() -> Iterator[Scenario]:
    # What is left of a large idle guest is its memmap, which compresses.
    usual = Scenario(Idle(), ("legacy", "array", *ABSENT), runs=3, mem_mib=64 * GIB, gbit=1)
    yield usual
    for compression in ("zlib", "zstd"):
        yield replace(usual, multifd=2, compression=compression)

    # The worst that a scan can meet: every second page is absent. Only the guest can give single
    # pages back.
    for backend in ("ram", "memfd"):
        yield Scenario(
            Alternate(),
            ("stock-reporting", "absent-reporting"),
            runs=3,
            mem_mib=4 * GIB,
            vcpus=2,
            backend=backend,
            reporting_order=0,
            huge_pages=False,
            targets=(Target(1, "stock-reporting", "absent-reporting"),),
        )

    # A scan must swap in what it looks at; who knows that it is free need not look.
    targets = tuple(
        target
        for mode in ("array", "array-absent")
        for target in (
            Target(0.5, "legacy", mode),
            Target(1, mode=mode, metric="swapped_in_share"),
        )
    )
    modes = ("legacy", "stock-hints", "array", *ABSENT)
    yield Scenario(
        Freed(50), modes, runs=3, mem_mib=4 * GIB, vcpus=2, swapped=True, targets=targets
    )


SCENARIOS: Dict[str, Scenario] = {scenario.name: scenario for scenario in _declared()}


def matching(patterns: Sequence[str]) -> List[Scenario]:
    """The scenarios whose names are as the shell's patterns say, such as "idle-*g"."""
    found: List[Scenario] = []
    for pattern in patterns:
        hits = [own for name, own in SCENARIOS.items() if fnmatch.fnmatchcase(name, pattern)]
        if not hits:
            raise LivemigError(f"there is no scenario {pattern}: see bench/bench list")
        found += [scenario for scenario in hits if scenario not in found]
    return found
