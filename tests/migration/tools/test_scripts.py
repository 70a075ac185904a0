# SPDX-License-Identifier: GPL-2.0-or-later
"""The commands that people type."""

import json
import os
import signal
import subprocess
from contextlib import closing
from pathlib import Path
from typing import Any, Dict

import pytest

from livebench import demo
from livebench.canned import canned
from livebench.scenarios import Scenario
from livemig import control, paths
from livemig.checks import run_script
from livemig.commands import guest
from livemig.errors import MigrationError, MissingArtifact
from livemig.modes import Mode
from livemig.serial import Port
from livemig.spec import BLOCKS, GuestSpec

SCRIPTS = paths.REPO / "scripts"
QUIT = "\x1d"
# How long a guest may take to boot, or to answer
SECONDS = 120


# What clients of scripts/guest may do that scripts/migrate does not: leave before they get an
# answer, send nonsense, say nothing at all.
RUDE = (b'{"capabilities": {}}\n', b"nonsense\n", b"[1]\n", b'{"unknown": 1}\n', b"")


class Terminal(Port):
    """A command on a terminal of its own."""

    def __init__(self, command: str):
        super().__init__(command)
        script = ["script", "--quiet", "--return", "--command", command, "/dev/null"]
        theirs = self.qemu_fd
        # pylint: disable=consider-using-with  # ended by close()
        self.process = subprocess.Popen(script, stdin=theirs, stdout=theirs, stderr=theirs)
        self.connected()

    def close(self) -> None:
        """End the command."""
        self.process.terminate()
        self.process.wait(60)
        super().close()


def test_guest_is_moved_under_its_user() -> None:
    """scripts/migrate moves the guest of scripts/guest; its shell goes on, whatever clients do."""
    if control.connect():
        pytest.skip("a guest of scripts/guest runs on this machine")
    with closing(Terminal(f"{SCRIPTS}/guest --mem 512M")) as terminal:
        terminal.wait_for("/root # ", SECONDS)
        terminal.send("x=42; echo first $((x + 1))\r")
        terminal.wait_for("first 43", SECONDS)
        for options in ([], ["--no-hints"]):
            done = run_script("migrate", *options)
            assert done.returncode == 0, done.stderr
            assert ("disabled" in done.stdout) == bool(options)
            assert "total time:" in done.stdout
            marker = f"after{''.join(options)}"
            terminal.send(f"echo {marker} $((x + 2))\r")
            terminal.wait_for(f"{marker} 44", SECONDS)
        for number, request in enumerate(RUDE):
            client = control.connect()
            assert client
            with client:
                client.sendall(request)
                # The last one says nothing, and stays.
                if request:
                    client.close()
                terminal.send(f"echo rude{number} $((x + 3))\r")
                terminal.wait_for(f"rude{number} 45", SECONDS)
        refused = run_script("guest")
        assert refused.returncode != 0
        assert "only one at a time" in refused.stderr
        terminal.send(QUIT)
        assert terminal.process.wait(60) == 0


def test_failed_move(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A guest on a terminal goes on where it is when a move fails, and can be moved later."""
    monkeypatch.setattr(guest, "LOGS", tmp_path)
    spec = GuestSpec(mem_mib=512)
    session = guest.Session(spec)
    try:
        session.guest.wait_ready()
        # Such a device cannot take over from one that has agreed on arrays.
        session.spec = spec.but(balloon=BLOCKS)
        with pytest.raises(MigrationError):
            session.move(guest.unlimited())
        assert session.guest.qmp("query-status")["status"] == "running"
        assert session.guest.agent.run("echo here").strip() == "here"
        session.spec = spec
        session.move(guest.unlimited())
        assert session.guest.agent.run("echo there").strip() == "there"
    finally:
        session.guest.close()


def test_demo_writes_what_it_says(tmp_path: Path, measured: Dict[str, Any]) -> None:
    """demo prints a line for each mode and writes an object for each run."""
    out = tmp_path / "demo.json"
    arguments = "--mem 1G --vcpus 2 --runs 2 --scenarios churn --modes none array-absent --out"
    done = run_script("demo", *arguments.split(), out)
    assert done.returncode == 0, done.stderr
    runs = json.loads(out.read_text())
    assert [r["mode"] for r in runs] == ["none", "array-absent"] * 2
    assert [r["run"] for r in runs] == [1, 1, 2, 2]
    assert all(r["verified"] and r["checked_pages"] > r["verified_pages"] > 0 for r in runs)
    assert runs[1]["hinted_bytes"] > 0 and runs[0]["hinted_bytes"] == 0
    rows = [line.split()[0] for line in done.stdout.splitlines() if line.endswith(" yes")]
    assert rows == ["none", "array-absent"]
    assert "medians of 2 runs" in done.stdout
    measured.update({r["mode"]: r["total_ms"] for r in runs})


def test_demo_fails_when_memory_is_wrong(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """demo ends with an error, and says so in the table, if a guest lost memory."""
    out = tmp_path / "demo.json"

    def lossy(scenario: Scenario, mode: Mode, index: int, _: Path) -> Dict[str, Any]:
        return {**canned(scenario, mode, index, 100), "verified": False, "wrong": ["lost"]}

    monkeypatch.setattr(demo.engine, "run", lossy)
    arguments = ["--mem", "1G", "--modes", "none", "--scenarios", "idle", "--out", str(out)]
    assert demo.main(arguments) == 1
    assert "NOT VERIFIED" in capsys.readouterr().out
    assert json.loads(out.read_text())[0]["verified"] is False


def test_made_once(tmp_path: Path) -> None:
    """An image is made once; a run that was killed leaves nothing that the next one trips over."""
    cache = {"FPH_CACHE": str(tmp_path)}
    first = run_script("make-initramfs", **cache)
    assert first.returncode == 0, first.stderr
    assert "made" in first.stdout
    assert "up to date" in run_script("make-initramfs", **cache).stdout

    images = tmp_path / "images"
    stamp, image = images / "initramfs.cpio.gz.stamp", images / "initramfs.cpio.gz"
    before, files = image.read_bytes(), set(images.iterdir())
    # Make it again, and be killed on the way.
    stamp.unlink()
    command = SCRIPTS / "make-initramfs"
    with subprocess.Popen(command, env={**os.environ, **cache}, start_new_session=True) as killed:
        while set(images.iterdir()) <= files:
            assert killed.poll() is None, "it ended before it could be killed"
        os.killpg(killed.pid, signal.SIGKILL)
    assert not stamp.exists()
    assert "made" in run_script("make-initramfs", **cache).stdout
    assert image.read_bytes() == before, "the same input makes another image"
    assert set(images.iterdir()) == files


def test_export_spares_what_it_did_not_write(tmp_path: Path) -> None:
    """export-patches replaces a series that it wrote, and deletes nothing else."""
    directory = tmp_path / "qemu"
    directory.mkdir()
    kept = directory / "kept.c"
    kept.touch()
    foreign = run_script("export-patches", tmp_path, "qemu")
    assert foreign.returncode != 0 and "choose another OUTDIR" in foreign.stderr
    assert list(directory.iterdir()) == [kept]

    (directory / "series").write_text("# base: qemu-10.0.0\n")
    own = run_script("export-patches", tmp_path, "qemu")
    assert own.returncode == 0, own.stderr
    assert not kept.exists() and list(directory.glob("0001-*.patch"))


@pytest.mark.parametrize("tree, series", paths.all_series())
def test_export_of_each_series(tmp_path: Path, tree: str, series: str) -> None:
    """The patches for each series of versions apply, and all new files are in them."""
    done = run_script("export-patches", tmp_path, f"{tree}={series}")
    if "run scripts/fetch" in done.stderr:
        pytest.skip(done.stderr.strip())
    assert done.returncode == 0, done.stderr
    (out,) = tmp_path.iterdir()
    assert out.name in (tree, f"{tree}-{series}")
    base, *names = (out / "series").read_text().splitlines()
    assert f"-{series}." in base
    hooks = (paths.REPO / tree / "patches" / series / "series").read_text().splitlines()
    assert len(names) == len([line for line in hooks if not line.startswith("#")]) > 0
    added = "".join((out / name).read_text() for name in names).splitlines()
    ours = [p.relative_to(paths.REPO / tree) for p in (paths.REPO / tree).rglob("*") if p.is_file()]
    assert {f"+++ b/{path}" for path in ours if path.parts[0] != "patches"} <= set(added)


def test_builds_of_a_series(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A series that the environment names is what tests run with, whatever stands in for ours."""
    monkeypatch.setenv("FPH_CACHE", str(tmp_path))
    monkeypatch.setenv("FPH_QEMU_SERIES", "10.2")
    monkeypatch.setenv("FPH_KERNEL_SERIES", "7.3")
    asked = ("ours", "checked", "stock", "ours-9.9")
    for stands_in, meant in (
        ("", ("ours-10.2", "checked-10.2", "stock-10.2", "ours-9.9")),
        ("debug", ("debug-10.2", "debug-10.2", "stock-10.2", "ours-9.9")),
    ):
        monkeypatch.setenv("FPH_QEMU", stands_in)
        for build, expected in zip(asked, meant):
            with pytest.raises(MissingArtifact, match=f"run scripts/build-qemu {expected}$"):
                paths.qemu_binary(build)
    for build, made_by in (("ours", "build-kernel ours-7.3"), ("debian", "make-other-guests")):
        with pytest.raises(MissingArtifact, match=f"run scripts/{made_by}$"):
            paths.kernel_image(build)
    assert paths.is_quick("ours") and not paths.is_quick("debug")
