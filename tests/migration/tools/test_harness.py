# SPDX-License-Identifier: GPL-2.0-or-later
"""The harness sees what it is there to see: each check is shown a fault and must find it."""

import os
import re
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Iterator

import numpy as np
import pytest

from livebench import demo
from livebench.canned import IDLE, canned
from livemig import guest, host, memory, paths, workload
from livemig.checks import INIT_ON_FREE, SMALL, WITH_HINTS, assert_hints_used, run_script, wait_for
from livemig.errors import GuestError, MigrationError
from livemig.guest import Guest
from livemig.lab import Lab
from livemig.migration import cancel, migrate
from livemig.modes import MODES
from livemig.spec import BLOCKS

PAGE = 4096
UNIT_TESTS = paths.REPO / "tests" / "migration" / "units" / "test_unit.py"
# As stamp.h has it: the first word of every page.
MAGIC = (0x46504853544D5031).to_bytes(8, "little")
ISSUE_FIELDS = (
    "mode scenario total_ms downtime_ms sent_bytes normal_pages zero_pages hinted_bytes "
    "ask_to_end_ms messages verified"
).split()


class Memstamp:
    """A memstamp that runs on this machine, and a way into its memory."""

    def __init__(self, binary: Path):
        self._binary = binary
        self._name = ("--name", f"test-{os.getpid()}")
        # What it starts holds its output open.
        subprocess.run([binary, "start", *self._name, "1"], stdout=subprocess.DEVNULL, check=True)
        self.pid = int(subprocess.check_output(["pidof", binary]))
        self.memory = os.open(f"/proc/{self.pid}/mem", os.O_RDWR)

    def call(self, verb: str) -> "subprocess.CompletedProcess[str]":
        """Run memstamp."""
        return run_script(self._binary, verb, *self._name)

    def pages(self) -> Iterator[int]:
        """The addresses of the stamped pages."""
        maps = Path(f"/proc/{self.pid}/maps").read_text("ascii")
        anonymous = r"^([0-9a-f]+)-([0-9a-f]+) rw-p 00000000 00:00 0 *$"
        for start, end in re.findall(anonymous, maps, re.MULTILINE):
            for address in range(int(start, 16), int(end, 16), PAGE):
                if os.pread(self.memory, len(MAGIC), address) == MAGIC:
                    yield address


@pytest.fixture
def memstamp(tmp_path: Path) -> Iterator[Memstamp]:
    """A memstamp with 256 pages."""
    subprocess.run([paths.REPO / "scripts" / "guest-programs", tmp_path], check=True)
    stamp = Memstamp(tmp_path / "memstamp")
    yield stamp
    os.close(stamp.memory)
    stamp.call("stop")


@pytest.mark.parametrize("fault", ["none", "lost", "swapped", "old", "torn", "foreign"])
def test_memstamp_sees(memstamp: Memstamp, fault: str) -> None:
    """memstamp finds a page that is lost, swapped, old, torn or foreign, and names the fault."""
    first, second = list(memstamp.pages())[10:12]
    page, other = (os.pread(memstamp.memory, PAGE, address) for address in (first, second))
    pages = {
        "none": page,
        "lost": bytes(PAGE),
        "swapped": other,
        "old": page[:16] + bytes(8) + page[24:],
        "torn": page[:4000] + bytes([page[4000] ^ 1]) + page[4001:],
        "foreign": b"x" * PAGE,
    }
    os.pwrite(memstamp.memory, pages[fault], first)
    done = memstamp.call("verify")
    assert "verified=256 " in done.stdout
    assert f" errors={int(fault != 'none')} " in done.stdout
    assert fault in done.stdout.rsplit("first=", 1)[1]
    assert done.returncode == int(fault != "none")


def fill_holes(file: Path) -> int:
    """Fill what a file has no data for; returns how many bytes that were."""
    filled = 0
    with open(file, "r+b") as out:
        size = os.fstat(out.fileno()).st_size
        while (start := os.lseek(out.fileno(), 0, os.SEEK_HOLE)) < size:
            try:
                end = os.lseek(out.fileno(), start, os.SEEK_DATA)
            except OSError:
                end = size
            filled += os.pwrite(out.fileno(), b"x" * (end - start), start)
    return filled


@pytest.mark.long
def test_memstamp_sees_memory_that_is_not_clear(lab: Lab) -> None:
    """A guest that clears what it frees does not live with new pages that are not clear.

    What a hint took out of the migration is not zero here, as with a destination that did not
    empty its memory. memstamp finds it, if the guest's kernel does not trip over it before.
    """
    lab.trouble_expected = True
    with memory.memory_files("garbage") as (garbage,):
        source = lab.boot(SMALL.but(cmdline=INIT_ON_FREE))
        destination = lab.incoming(source.spec.but(mem_file=garbage), running=False)
        assert_hints_used(migrate(source, destination, WITH_HINTS), 512 << 20)
        assert fill_holes(garbage) >= 512 << 20
        destination.qmp("cont")
        try:
            destination.agent.run("true", timeout=20)
            # Each is done in a second or two, unless the kernel tripped.
            destination.agent.run("memstamp start 512", timeout=20)
            verdict = workload.verify(destination, timeout=20)
        except GuestError:
            return
    assert verdict.errors > 0 and "not clear" in verdict.first


def test_comparison_sees_a_lost_page(tmp_path: Path) -> None:
    """The comparison of memories tells a page that was lost from one that was kept back.

    And one that never arrived from one that was written afterwards.
    """
    one, other, log = (tmp_path / name for name in ("one", "other", "trace"))
    pages = np.full((64, PAGE), 7, dtype=np.uint8)
    pages.tofile(one)
    # The other lies elsewhere.
    pages[[10, 11]] = 0
    pages[20, 5:7] = 0
    np.concatenate([np.zeros((1, PAGE), dtype=np.uint8), pages]).tofile(other)
    blocks = {"pc.ram": memory.Block(one, 0, 32), "dimm": memory.Block(one, 32 * PAGE, 32)}
    arrived = {name: replace(b, path=other, offset=b.offset + PAGE) for name, b in blocks.items()}
    # Of two migrations, the first of which did not complete.
    log.write_text(
        "free_page_hint_kept block 'pc.ram' first 0x0 pages 0x20\n"
        "absent_pages_run block 'pc.ram' first 0x14 pages 0x1\n"
        "free_page_hint_kept_all 64 pages\n"
        "absent_pages_run block 'pc.ram' first 0xb pages 0x5\n"
        "free_page_hint_kept block 'pc.ram' first 0xa pages 0x2\n"
        "free_page_hint_kept_all 2 pages\n"
    )
    different = memory.different_pages(blocks, arrived)
    result = memory.judge(different, memory.kept_pages(log, blocks))
    assert (result.pages, result.kept, result.different) == (64, 1, 3)
    # Page 11 was left out since it was absent, and it is not zero at the source.
    assert result.lost == (("pc.ram", 11), ("pc.ram", 20))
    never, afterwards = memory.describe(result.lost, blocks, arrived).split("; ")
    assert (
        never == "page 0xb of pc.ram: 4096 bytes off, the first at [0], zeroes at the destination"
    )
    assert "page 0x14 of pc.ram: 2 bytes off, the first at [5], something else" in afterwards
    with pytest.raises(MigrationError, match="other RAM"):
        memory.different_pages(blocks, {"pc.ram": arrived["pc.ram"]})


def test_trace_event_is_the_one_that_qemu_has() -> None:
    """The comparison reads the trace events in the format that QEMU writes."""
    hooks = "".join(path.read_text() for path in (paths.REPO / "qemu" / "patches").rglob("*.patch"))
    for event, line in (
        ("free_page_hint_kept", memory.RUN_LINE),
        (memory.ABSENT_EVENT, memory.RUN_LINE),
        ("free_page_hint_kept_all", memory.KEPT_ALL_LINE),
    ):
        found = re.search(rf'^\+{event}\(.*?\) (".*)$', hooks, re.MULTILINE)
        assert found, f"QEMU's hooks do not have the trace event {event}"
        text = re.sub(r'%" PRI[xu]64( "|)', "400", found[1]).replace('"', "")
        assert line.search(f"{event} {text.replace('%s', 'pc.ram')}")
    assert f"\n+{memory.HINT_EVENT}(" in hooks


def test_monitor_that_does_not_answer(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    """A QEMU that hangs fails a test, and does not hold it up for ever."""
    monkeypatch.setattr(guest, "MONITOR_SECONDS", 1)
    hangs = lab.launch(SMALL, "hangs")
    assert hangs.pid
    os.kill(hangs.pid, signal.SIGSTOP)
    with pytest.raises(GuestError, match="hangs: query-status: no answer within 1 s"):
        hangs.qmp("query-status")


def test_cancel_that_comes_too_late(lab: Lab) -> None:
    """A migration that has ended cannot be cancelled: the harness says how it ended."""
    source = lab.boot(SMALL)
    migrate(source, lab.incoming(SMALL), WITH_HINTS)
    with pytest.raises(MigrationError, match="the migration is completed"):
        cancel(source, timeout=0.1)


def test_guest_that_does_not_boot(lab: Lab) -> None:
    """A guest that does not boot is reported with the end of its console."""
    lab.trouble_expected = True
    guest = lab.launch(SMALL.but(cmdline=("rdinit=/nothing", "root=/dev/nothing")), "broken")
    with pytest.raises(GuestError, match="(?s)did not boot.*Kernel panic"):
        guest.wait_ready()
    assert guest.kernel_trouble()


@pytest.mark.parametrize(
    "function",
    ["msix_table_mmio_write", "void msix_table_mmio_write(void *, hwaddr, uint64_t, unsigned int)"],
    ids=["gcc", "clang"],
)
def test_boot_race_is_known(function: str) -> None:
    """The race that ends a booting QEMU is known by its assertion, whichever compiler wrote it."""
    assert guest.BOOT_RACE.search(
        f"qemu: ../hw/pci/msix.c:2: {function}: Assertion `a <= b' failed."
    )


def test_qemu_that_does_not_start(lab: Lab) -> None:
    """A QEMU that does not start is reported with what it says."""
    with pytest.raises(GuestError, match="(?s)does not start.*no-such-device"):
        lab.launch(SMALL.but(args=("-device", "no-such-device")), "broken")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGKILL])
def test_no_qemu_is_left(tmp_path: Path, number: int) -> None:
    """However a command ends, its QEMUs end; their directories are gone unless it was killed."""
    script = tmp_path / "command"
    script.write_text(
        "import sys, tempfile, time\n"
        f"sys.path[:0] = [{str(paths.REPO / 'scripts')!r}]\n"
        "from pathlib import Path\n"
        "from livemig import cli, guest, spec\n"
        "from livemig.commands import migrate\n"
        "def main(argv):\n"
        f"    with guest.Guest(spec.GuestSpec(), 'left', logs=Path({str(tmp_path)!r})) as g:\n"
        f"        place = tempfile.TemporaryDirectory(dir={str(tmp_path)!r}, prefix='place-')\n"
        "        g.belongings.enter_context(place)\n"
        "        print(g.pid, flush=True)\n"
        "        time.sleep(600)\n"
        "migrate.main = main\n"
        "cli.run('migrate')\n"
    )
    # What runs the tests may ignore signals, as nohup does, and so would all that they start.
    command = ["env", "--default-signal", sys.executable, script]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as process:
        assert process.stdout
        pid = int(process.stdout.readline())
        assert Path(f"/proc/{pid}/exe").readlink() == paths.qemu_binary("ours").resolve()
        process.send_signal(number)
        assert process.wait(60) != 0
    assert bool(list(tmp_path.glob("place-*"))) == (number == signal.SIGKILL)
    # A process that has ended has no program, even where nobody takes note of its end.
    wait_for(lambda: not Path(f"/proc/{pid}/exe").exists(), "a QEMU is left", 60)


def test_record_has_the_fields_that_were_agreed() -> None:
    """demo.json has these names, with and without statistics of hints, and the tables read it."""
    hints = {"state": "ended", "messages": 3, "hinted-bytes": 4 << 20, "ask-to-end": 2500}
    runs = []
    for name, extra in (("array-absent", {"free-page-hint": hints}), ("stock-hints", {})):
        run = canned(IDLE, MODES[name], 1, 1000)
        run["migration"][0].update(extra)
        runs.append(demo.record("idle", run))
        assert list(runs[-1])[: len(ISSUE_FIELDS)] == ISSUE_FIELDS
    assert (runs[0]["ask_to_end_ms"], runs[0]["messages"]) == (2.5, 3)
    groups = demo.by_mode(runs, "idle")
    rows = [line.split()[0] for line in demo.table(groups).splitlines()]
    assert rows == ["mode", "array-absent", "stock-hints"]
    assert demo.comparisons(groups) == ["array hints / stock per-block hints: 1.00"]


def test_medians_have_their_range() -> None:
    """Several runs are shown as their median and range."""
    assert demo.with_range([5, 1, 9]) == "5 (1-9)"
    assert demo.with_range([5]) == "5"


def test_too_little_memory() -> None:
    """demo says how much memory it needs before it starts, not by failing in the middle."""
    done = run_script("demo", "--mem", "100000G")
    assert done.returncode != 0
    assert re.search(r"needs \d+ MiB of memory, \d+ MiB are available", done.stderr)


def test_memory_limit_of_a_container(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The memory that is available is that of the host, or less in a container with a limit."""
    free = host.available_mib()
    monkeypatch.setattr(host, "CGROUPS", tmp_path)
    for limit, expected in (("max", free), (str(300 << 20), 250)):
        (tmp_path / "memory.max").write_text(limit)
        (tmp_path / "memory.current").write_text(str(100 << 20))
        stat = f"anon 1\nactive_file {30 << 20}\ninactive_file {20 << 20}\n"
        (tmp_path / "memory.stat").write_text(stat)
        assert host.available_mib() == pytest.approx(expected, abs=expected // 10)


def test_unwritable_output(tmp_path: Path) -> None:
    """demo says before the first run that it could not write its record."""
    (tmp_path / "file").touch()
    for out in tmp_path / "file" / "demo.json", tmp_path:
        done = run_script("demo", "--mem", "512M", "--out", out)
        assert done.returncode != 0
        assert f"error: cannot write --out {out}" in done.stderr and not done.stdout


def test_missing_build(tmp_path: Path) -> None:
    """A command that misses a build says which command makes it."""
    (tmp_path / "src").symlink_to(paths.cache_dir() / "src")
    done = run_script("demo", FPH_CACHE=str(tmp_path))
    assert done.returncode != 0
    assert "is missing: run scripts/build-" in done.stderr


@pytest.mark.parametrize("what", ["missing", "no-kernel", "short", "twice"])
def test_unusable_guest_kernel(tmp_path: Path, what: str) -> None:
    """A guest kernel that cannot be used is refused in one line, by commands and by tests."""
    kernel = tmp_path / "kernel"
    good = paths.require(paths.cache_dir() / "kernel-stock" / "bzImage", "make kernel-stock")
    if what != "missing":
        contents = {"no-kernel": bytes(4096), "short": b"x", "twice": good.read_bytes()}
        kernel.write_bytes(contents[what])
    why = {
        "missing": ": No such file or directory",
        "twice": " and FPH_KERNEL are both set: unset one of them",
    }.get(what, " is not a bzImage of x86-64")
    kernels = {"FPH_GUEST_KERNEL": str(kernel), "FPH_KERNEL": "stock" if what == "twice" else ""}
    for command, prefix in (
        (["guest"], "guest: error"),
        ([sys.executable, "-m", "pytest", UNIT_TESTS], "ERROR"),
    ):
        done = run_script(*command, **kernels)
        assert done.returncode != 0
        assert done.stderr.strip() == f"{prefix}: FPH_GUEST_KERNEL={kernel}{why}"


def test_another_guest_kernel(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    """A user's guest kernel takes the place of ours, but in tests of what it does not have."""
    stock = paths.kernel_image("stock")
    monkeypatch.setenv("FPH_GUEST_KERNEL", str(stock))
    monkeypatch.delenv("FPH_KERNEL", raising=False)
    with pytest.raises(pytest.skip.Exception, match="no free-page-hint-arrays=on in"):
        lab.boot(SMALL)
    other = lab.boot(SMALL.but(balloon=BLOCKS), "other")
    assert str(stock) in other.arguments()


def test_closed_guest_says_so() -> None:
    """A guest that is not running is not talked to."""
    with pytest.raises(GuestError, match="not running"):
        Guest(SMALL, "never").qmp("query-status")
