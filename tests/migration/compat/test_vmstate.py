# SPDX-License-Identifier: GPL-2.0-or-later
"""The devices' state in the migration stream is the same, with our patches and without."""

import json
import subprocess
from pathlib import Path

import pytest

from livemig import paths


def described(build: str, machine: str, directory: Path) -> Path:
    """What a QEMU says of its devices' state, as a file."""
    path = directory / f"{build}.json"
    command = [paths.qemu_binary(build), "-display", "none", "-M", machine, "-dump-vmstate", path]
    subprocess.run(command, check=True, timeout=60)
    return path


def differences(source: Path, destination: Path) -> str:
    """What QEMU's own checker says against a migration from one to the other."""
    checker = paths.cache_dir() / "src" / "qemu" / "scripts" / "vmstate-static-checker.py"
    command = ["/usr/bin/python3", checker, "-s", source, "-d", destination]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert bool(done.returncode) == bool(done.stdout) and not done.stderr, done
    return done.stdout


@pytest.mark.parametrize("machine", ["pc-q35-9.2", "pc-q35-10.0", "pc-i440fx-10.0"])
def test_same_as_stock(tmp_path: Path, machine: str) -> None:
    """vmstate-static-checker finds nothing, whichever of the two a guest comes from.

    It does find a field of the balloon's state that has another name.
    """
    ours, stock = (described(build, machine, tmp_path) for build in ("ours", "stock"))
    assert differences(stock, ours) == differences(ours, stock) == ""

    devices = json.loads(stock.read_text("utf-8"))
    devices["virtio-balloon-device"]["Description"]["Fields"][0]["field"] = "another"
    changed = tmp_path / "changed.json"
    changed.write_text(json.dumps(devices), "utf-8")
    assert "another" in differences(stock, changed)
