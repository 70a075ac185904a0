# SPDX-License-Identifier: GPL-2.0-or-later
"""Page cache that a guest frees for a migration: cold and clean, and no more than it may.

The guest's files are on a disk that both QEMUs open; what became of their pages, the guest says.
"""

import hashlib
import re
import subprocess
from pathlib import Path
from typing import Any, Dict, Iterator

import pytest

from livemig import workload
from livemig.balloon import Balloon
from livemig.checks import INIT_ON_FREE, MIB, SMALL, STAMP_MIB, WITH_HINTS, assert_goes_on
from livemig.checks import assert_intact, finish_postcopy, hints_now, hints_of, in_check
from livemig.checks import migrate_watched, rounds, start_churn, wait_for, wait_hints_ended, watched
from livemig.disk import disk_copy
from livemig.estimate import estimate
from livemig.guest import Guest
from livemig.lab import Lab
from livemig.metal import WAIT_MS, let_go, lost_strips, metal, written_metal
from livemig.migration import Hints, MigrationResult, cancel, start
from livemig.oracle import Oracle
from livemig.spec import ARRAYS, MigrationSpec
from livemig.workload import refaults, vmstat

pytestmark = pytest.mark.integrity

BALLOON = f"{ARRAYS},free-page-hint-cache=on"
# More than the guest has.
EVERYTHING = 4096 * MIB
COLD_MIB = 192
FILES = {"cold": COLD_MIB, "hot": 32, "held": 16, "locked": 16}
DIRTY_MIB = 16
PAGES_PER_MIB = 256
# The guest looks at so much before it looks at its limits, and can be slowed down. What it can free
# begins behind the mapped file.
STEP_BYTES = MIB
# A step's last folio is freed as a whole: in a newer Linux, that may be so large.
FOLIO_BYTES = MIB
STEP_MS = 50
STEPS = 80
TRACE = "/sys/kernel/tracing/trace"
CACHE_EVENT = "/sys/kernel/tracing/events/virtio_balloon_hint/virtio_balloon_hint_cache/enable"


def contents(name: str) -> bytes:
    """A file's contents: no page of it is zero or another's."""
    seed = hashlib.sha256(name.encode()).digest() * (4096 // 32)
    pages = range(FILES[name] * PAGES_PER_MIB)
    return b"".join(page.to_bytes(8, "little") + seed[8:] for page in pages)


@pytest.fixture(name="image", scope="module")
def image_fixture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A disk image with the files."""
    path = tmp_path_factory.mktemp("disk")
    (path / "files").mkdir()
    for name in FILES:
        (path / "files" / name).write_bytes(contents(name))
    image = path / "image"
    command = ["/sbin/mke2fs", "-q", "-t", "ext4", "-d", path / "files", image, "384M"]
    subprocess.run(command, check=True)
    return image


@pytest.fixture(name="disk")
def disk_fixture(image: Path) -> Iterator[Path]:
    """A copy that a guest may write to."""
    with disk_copy(image) as disk:
        yield disk


def resident(guest: Guest, name: str) -> int:
    """How many MiB of a file are in the guest's page cache."""
    output = guest.agent.run(f"filepages resident /mnt/{name}")
    match = re.search(r"^resident=(\d+) pages=\d+$", output, re.MULTILINE)
    assert match, output
    return int(match[1]) // PAGES_PER_MIB


def with_cache(budget: int, **parameters: Any) -> MigrationSpec:
    """A migration for which so many bytes of page cache may be freed."""
    spec = WITH_HINTS.with_capabilities(free_page_hint=True, skip_absent_pages=False)
    return spec.with_parameters(free_page_hint_cache=budget, **parameters)


def boot(lab: Lab, disk: Path, before: str = "true", **changes: Any) -> Oracle:
    """A guest that has the files mounted, after a command."""
    args = ("-drive", f"file={disk},format=raw,if=virtio")
    oracle, guest = watched(lab, SMALL.but(**{"balloon": BALLOON, "args": args, **changes}))
    workload.stamp(guest, STAMP_MIB)
    guest.agent.run(before)
    guest.agent.run("mkdir -p /mnt && mount -t ext4 /dev/vda /mnt")
    # What is dirty is to stay so until it is looked at.
    guest.agent.run("echo 100000 | tee /proc/sys/vm/dirty_expire_centisecs")
    guest.agent.run("echo 0 > /proc/sys/vm/dirty_writeback_centisecs")
    return oracle


def boot_full(lab: Lab, disk: Path, before: str = "true", **changes: Any) -> Oracle:
    """A guest whose page cache has the files."""
    oracle = boot(lab, disk, before, **changes)
    guest = oracle.source
    guest.agent.run("cat /mnt/hot /mnt/hot /mnt/hot > /dev/null")
    guest.agent.run("filepages hold /mnt/held && filepages lock /mnt/locked")
    read_cold(guest)
    return oracle


def read_cold(guest: Guest) -> None:
    """Have a file that was read once in the page cache."""
    # Not by sendfile(), as cat does: that marks a large folio anew for each piece of it.
    guest.agent.run("dd if=/mnt/cold of=/dev/null bs=64k", timeout=300)
    assert resident(guest, "cold") == COLD_MIB


def move(oracle: Oracle, spec: MigrationSpec) -> MigrationResult:
    """Migrate it; its memory is compared, and found intact by itself."""
    result = migrate_watched(oracle, spec)
    assert_intact(oracle.destination)
    return result


def move_without_cache(oracle: Oracle, measured: Dict[str, Any], budget: int = EVERYTHING) -> Hints:
    """The same; the guest may free so much of its cache, and gives a whole answer."""
    result = move(oracle, with_cache(budget))
    hints = hints_of(result)
    assert hints.complete and hints.reason is None and hints.invalid_messages == 0, hints
    measured.update(freed=hints.cache_freed_bytes, us=hints.cache_time, sent=result.sent_bytes)
    return hints


def assert_files(guest: Guest) -> None:
    """All files are what they were."""
    for name in FILES:
        output = guest.agent.run(f"sha256sum /mnt/{name}", timeout=300)
        assert output.split()[0] == hashlib.sha256(contents(name)).hexdigest(), name


# The other LRU keeps what is hot and what is cold in one list. Only the debug kernel has it.
SWITCH = "/sys/kernel/mm/lru_gen/enabled"
GENERATIONS = f"echo y > {SWITCH} && grep -q 0x000[1-9a-f] {SWITCH}"
LRUS = {"lists": ("ours", "true"), "generations": ("debug", GENERATIONS)}


@pytest.mark.parametrize("lru", LRUS)
def test_cold_cache_is_not_sent(lab: Lab, disk: Path, measured: Dict[str, Any], lru: str) -> None:
    """What was read once is freed and not sent; what is hot, mapped, locked or dirty stays.

    Files are whole at the destination, those too that are only in memory, and what is read again
    is known to have been there.
    """
    kernel, before = LRUS[lru]
    oracle = boot_full(lab, disk, before, kernel=kernel)
    source = oracle.source
    for file in ("/mnt/dirty", "/tmp/shmem"):
        source.agent.run(f"dd if=/dev/urandom of={file} bs=1M count={DIRTY_MIB}")
    sums = source.agent.run("sha256sum /mnt/dirty /tmp/shmem")
    kept = {name: resident(source, name) for name in ("hot", "held", "locked", "dirty")}
    stolen = vmstat(source, "pgsteal_file")
    hints = move_without_cache(oracle, measured)
    there = oracle.destination
    # Whoever looks for where the cache went finds it there.
    stolen = vmstat(there, "pgsteal_file") - stolen
    assert stolen / PAGES_PER_MIB >= hints.cache_freed_bytes / MIB
    measured.update(kept)
    assert hints.cache_freed_bytes > 0.9 * COLD_MIB * MIB
    assert resident(there, "cold") < COLD_MIB // 10
    left = {name: resident(there, name) for name in kept}
    # A page that still waits in one CPU's batch when another reads it is not made active by that: a
    # few of the hot ones may be gone.
    assert kept["hot"] - left.pop("hot") <= 1 and left.items() <= kept.items(), left
    assert there.agent.run("sha256sum /mnt/dirty /tmp/shmem") == sums
    refaulted = refaults(there)
    assert_files(there)
    measured["refaulted"] = (refaults(there) - refaulted) // PAGES_PER_MIB
    assert measured["refaulted"] > 0.9 * hints.cache_freed_bytes / MIB
    there.agent.run("sync")
    assert there.agent.run("sha256sum /mnt/dirty /tmp/shmem") == sums


@pytest.mark.parametrize("budget", [0, 64 * MIB], ids=["none", "a-part"])
def test_budget(lab: Lab, disk: Path, measured: Dict[str, Any], budget: int) -> None:
    """No more is freed than the operator allows, nor disturbed: nothing unless asked for."""
    oracle = boot_full(lab, disk, f"echo 1 > {CACHE_EVENT}")
    hints = move_without_cache(oracle, measured, budget)
    there = oracle.destination
    trace = there.agent.run(f"cat {TRACE}")
    scanned = sum(map(int, re.findall(r"virtio_balloon_hint_cache: .* scanned=(\d+)", trace)))
    kept = scanned * MIB // PAGES_PER_MIB - hints.cache_freed_bytes
    measured["kept"] = kept
    assert budget * 0.9 <= hints.cache_freed_bytes <= budget
    # What is looked at and kept moves on its list: the mapped file, and hardly a page that is cold.
    assert bool(scanned) == bool(budget) and kept <= FILES["held"] * MIB + MIB // 8
    left = resident(there, "cold")
    assert COLD_MIB - budget // MIB <= left + 1
    assert_files(there)


@pytest.mark.parametrize("lru", ["lists", pytest.param("generations", marks=pytest.mark.long)])
def test_estimate_frees_nothing(lab: Lab, disk: Path, measured: Dict[str, Any], lru: str) -> None:
    """An estimate says how much could be freed, and frees nothing; a migration frees that."""
    kernel, before = LRUS[lru]
    oracle = boot_full(lab, disk, before, kernel=kernel)
    source = oracle.source
    source.agent.run(f"dd if=/dev/urandom of=/mnt/dirty bs=1M count={DIRTY_MIB}")
    names = (*FILES, "dirty")
    had = {name: resident(source, name) for name in names}
    scanned = vmstat(source, "pgscan_file")
    parts = {budget: estimate(source, cache=budget) for budget in (EVERYTHING, 64 * MIB, 0)}
    assert {name: resident(source, name) for name in names} == had
    assert vmstat(source, "pgscan_file") == scanned
    found = {budget: part.get("cache-bytes") for budget, part in parts.items()}
    hints = move_without_cache(oracle, measured)
    measured["estimated"] = found[EVERYTHING]
    assert (found[64 * MIB], found[0]) == (64 * MIB, None)
    # What is in the lists that are added up, and stays: a dirty file, and a mapped one; with
    # generations what was read again, too, and the mapped one's may be younger.
    listed = {"lists": [FILES["held"]], "generations": [FILES["hot"], FILES["hot"] + FILES["held"]]}
    stays = (found[EVERYTHING] - hints.cache_freed_bytes) / MIB - DIRTY_MIB
    assert round(stays) in listed[lru]
    # Estimates before do not keep what is freed on a CPU's list, where no hint finds it.
    measured.update(skipped=hints.skipped_bytes, free=parts[0]["free-bytes"])
    assert hints.skipped_bytes > parts[0]["free-bytes"] + 0.9 * hints.cache_freed_bytes
    assert hints.cache_freed_bytes > 0.9 * COLD_MIB * MIB


@pytest.mark.parametrize("percent", [0, 10])
def test_owner_limits_it(lab: Lab, disk: Path, measured: Dict[str, Any], percent: int) -> None:
    """The guest's owner decides how much of the cache a host may have freed."""
    parameter = "/sys/module/virtio_balloon_hint/parameters/cache_percent"
    oracle = boot_full(lab, disk, f"echo {percent} > {parameter}")
    measured["estimated"] = estimate(oracle.source, cache=EVERYTHING)["cache-bytes"]
    move_without_cache(oracle, measured)
    cache = (sum(FILES.values()) + 16) * MIB
    for size in measured["freed"], measured["estimated"]:
        assert size <= cache * percent // 100 and (size > 0) == (percent > 0)


def test_time_is_limited(lab: Lab, disk: Path, measured: Dict[str, Any]) -> None:
    """Half of the wait is for the cache at most, by the guest's clock."""
    slow = f"insmod /lib/modules/hint_faults.ko cache_delay={STEP_MS}"
    oracle = boot_full(lab, disk, f"{slow} && echo 1 > {CACHE_EVENT}", kernel="debug")
    result = move(oracle, with_cache(EVERYTHING, free_page_hint_wait=2 * STEPS * STEP_MS))
    there = oracle.destination
    # Whether or not the guest could tell the host so in time.
    match = re.search(r"virtio_balloon_hint_cache: .* freed=(\d+)", there.agent.run(f"cat {TRACE}"))
    assert match
    freed = int(match.group(1)) // PAGES_PER_MIB * MIB
    measured.update(freed=freed, us=hints_of(result).cache_time)
    assert 0 < freed <= (STEPS + 1) * (STEP_BYTES + FOLIO_BYTES) < 0.9 * COLD_MIB * MIB


@pytest.mark.parametrize("balloon", [ARRAYS, None], ids=["off", "no-device"])
def test_not_offered(lab: Lab, disk: Path, balloon: Any) -> None:
    """Without the device's property, the parameter does nothing."""
    oracle = boot_full(lab, disk, balloon=balloon)
    result = move(oracle, with_cache(EVERYTHING))
    assert hints_of(result).cache_freed_bytes == 0
    assert resident(oracle.destination, "cold") == COLD_MIB


def test_stock_driver(lab: Lab, disk: Path, measured: Dict[str, Any]) -> None:
    """A driver that does not know of it hints as ever."""
    oracle = boot_full(lab, disk, kernel="stock")
    hints = move_without_cache(oracle, measured)
    assert hints.cache_freed_bytes == 0 and hints.blocks == hints.messages > 0
    assert_files(oracle.destination)


# Writes a file and reads it again, and a cold one; says what it found.
WORK = (
    "(while :; do"
    " dd if=/dev/urandom bs=64k count=16 2>/dev/null | tee /mnt/work | sha256sum > /tmp/sum;"
    " sha256sum < /mnt/work | cmp -s - /tmp/sum || echo wrong >> /tmp/wrong;"
    " dd if=/mnt/cold of=/dev/null bs=1M count=32 2>/dev/null;"
    " echo >> /tmp/rounds;"
    " done) > /dev/null 2>&1 &"
)


CMDLINES = {"plain": (), "init-on-free": INIT_ON_FREE}


def wait_work(guest: Guest) -> None:
    """Wait until the work was done twice, without a mistake so far."""
    before = rounds(guest)
    wait_for(lambda: rounds(guest) >= before + 2, "the work stands still", 600)
    assert not guest.agent.run("cat /tmp/wrong 2> /dev/null || true")


@pytest.mark.parametrize("name", in_check(CMDLINES, long=["init-on-free"]))
def test_at_work(lab: Lab, disk: Path, measured: Dict[str, Any], name: str) -> None:
    """A guest that writes and reads files and takes memory back all the while loses nothing."""
    oracle = boot_full(lab, disk, cmdline=CMDLINES[name])
    source = oracle.source
    start_churn(source)
    source.agent.run(WORK)
    wait_work(source)
    # The premise.
    assert move_without_cache(oracle, measured).cache_freed_bytes > 0
    there = oracle.destination
    wait_work(there)
    assert_goes_on(there)
    assert_files(there)


def test_cancelled(lab: Lab, disk: Path, measured: Dict[str, Any]) -> None:
    """A migration that is cancelled costs the guest nothing but cache, and another one works."""
    oracle = boot_full(lab, disk)
    source = oracle.source
    abandoned = lab.incoming(source.spec, "abandoned")
    start(source, abandoned, with_cache(EVERYTHING, max_bandwidth=MIB))
    while hints_now(source).state in ("idle", "arming", "scanning"):
        pass
    cancel(source)
    abandoned.close()
    measured["left"] = resident(source, "cold")
    assert_intact(source)
    assert_files(source)
    # By now it was read twice, where it had stayed.
    source.agent.run("echo 1 > /proc/sys/vm/drop_caches")
    read_cold(source)
    assert move_without_cache(oracle, measured).cache_freed_bytes > 0
    assert_files(oracle.destination)


def test_postcopy(lab: Lab, disk: Path, measured: Dict[str, Any]) -> None:
    """What was freed, and is asked for at the destination, is read from the disk again."""
    oracle = boot_full(lab, disk)
    source = oracle.source
    destination = oracle.arrival(running=True)
    spec = with_cache(EVERYTHING, max_bandwidth=MIB, max_postcopy_bandwidth=0)
    start(source, destination, spec.with_common(postcopy_ram=True))
    hints = wait_hints_ended(source)
    source.qmp("migrate-start-postcopy")
    finish_postcopy(source, destination)
    measured.update(freed=hints.cache_freed_bytes)
    assert hints.cache_freed_bytes > 0.9 * COLD_MIB * MIB
    assert_intact(destination)
    assert_files(destination)


# A group that may not have much, one that is to keep what it has, within one that has nothing by
# itself, a file system on top of the disk's, and one of huge pages.
OTHERS = (
    # First: to look for them reclaims memory, and works out anew what is protected.
    "mkdir /huge && mount -t hugetlbfs none /huge && echo 8 > /proc/sys/vm/nr_hugepages",
    "mount -t cgroup2 none /sys/fs/cgroup && cd /sys/fs/cgroup && mkdir limited kept",
    "echo +memory > cgroup.subtree_control && echo +memory > kept/cgroup.subtree_control",
    "mkdir kept/inner",
    "echo 64M > kept/memory.low && echo 64M > kept/inner/memory.low",
    "echo 48M > limited/memory.max",
    "sh -c 'echo $$ > kept/inner/cgroup.procs; cat /mnt/hot > /dev/null'",
    "mkdir /over /tmp/upper /tmp/work",
    "mount -t overlay none -o lowerdir=/mnt,upperdir=/tmp/upper,workdir=/tmp/work /over",
    "dd if=/dev/urandom of=/over/new bs=1M count=16",
    # Not by cat, see read_cold().
    "sh -c 'echo $$ > limited/cgroup.procs; dd if=/over/cold of=/dev/null bs=64k;"
    " dd if=/dev/urandom of=/tmp/limited bs=1M count=16'",
    "truncate -s 8M /huge/file && filepages fill /huge/file",
)
LIMITED = "cat /sys/fs/cgroup/limited/memory.events"
OF_OTHERS = "sha256sum /tmp/limited /tmp/upper/new /over/new /huge/file"


@pytest.mark.long
def test_other_kinds(lab: Lab, disk: Path, measured: Dict[str, Any]) -> None:
    """What a control group limits or protects, and files on tmpfs, overlays and huge pages."""
    oracle = boot(lab, disk, kernel="debug")
    source = oracle.source
    source.agent.run(" && ".join(OTHERS), timeout=300)
    sums = source.agent.run(OF_OTHERS)
    assert len(sums.splitlines()) == 4
    cold = resident(source, "cold")
    # The premise: the group has reached its limit, by what it read.
    assert 0 < cold <= 48 and "max 0" not in source.agent.run(LIMITED)
    move_without_cache(oracle, measured)
    there = oracle.destination
    measured["cold"] = cold
    assert resident(there, "cold") < cold // 4
    # As cold, but protected.
    assert resident(there, "hot") == FILES["hot"]
    assert there.agent.run(OF_OTHERS) == sums
    assert "oom_kill 0" in there.agent.run(LIMITED)
    assert_files(there)


MOST = (1 << 64) - 1


@pytest.mark.parametrize("words", [(0, 0), (1 << 63, 7), (MOST, MOST)], ids=["0", "large", "most"])
def test_any_value_is_a_number(lab: Lab, words: Any) -> None:
    """What a guest says that it freed is in a statistic, whatever it is, and nowhere else."""
    with written_metal(lab, Balloon.OURS | Balloon.CACHE, balloon=BALLOON) as guest:
        destination, cmd_id = guest.ask(free_page_hint_cache=100 * MIB)
        mib, budget_ms = guest.balloon.cache_budget()
        assert mib == 100 and 0 < budget_ms <= WAIT_MS // 2
        guest.balloon.send_array(cmd_id, 0, words)
        hints = wait_hints_ended(guest.source)
        assert (hints.cache_freed_bytes, hints.cache_time) == words
        assert hints.complete and hints.invalid_messages == 0
        let_go(guest.source, destination)
        assert lost_strips(guest) == []


@pytest.mark.parametrize(
    ("features", "words"),
    [(Balloon.CACHE, [1]), (Balloon.CACHE, [1, 2, 3]), (0, [1, 2])],
    ids=["too-short", "too-long", "not-negotiated"],
)
def test_an_end_of_another_length_is_none(lab: Lab, features: int, words: Any) -> None:
    """A last message that says more, or less, than was agreed on ends nothing, and is counted."""
    with metal(lab, Balloon.OURS | features, balloon=BALLOON) as guest:
        destination, cmd_id = guest.ask()
        assert guest.balloon.cache_budget()[0] == 0
        guest.balloon.send_array(cmd_id, 0, words)
        guest.balloon.queue.wait_returned()
        hints = hints_now(guest.source)
        assert (hints.complete, hints.invalid_messages, hints.cache_freed_bytes) == (False, 1, 0)
        guest.balloon.send_end(cmd_id)
        assert wait_hints_ended(guest.source).complete
        let_go(guest.source, destination)
