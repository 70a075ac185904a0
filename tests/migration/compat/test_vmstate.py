# SPDX-License-Identifier: GPL-2.0-or-later
"""The devices' state in the migration stream is the same, with our patches and without."""

import json
import subprocess
from pathlib import Path
from typing import Callable

import pytest

from livemig import paths


@pytest.fixture(name="described", scope="module")
def described_fixture(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], Path]:
    """What a QEMU says of its devices' state, as a file."""
    directory = tmp_path_factory.mktemp("vmstate")

    def describe(build: str, machine: str) -> Path:
        path = directory / f"{build}-{machine}.json"
        if not path.exists():
            qemu = paths.qemu_binary(build)
            command = [qemu, "-display", "none", "-M", machine, "-dump-vmstate", path]
            subprocess.run(list(map(str, command)), check=True, timeout=60)
        return path

    return describe


def differences(source: Path, destination: Path) -> str:
    """What QEMU's own checker says against a migration from one to the other."""
    checker = paths.cache_dir() / "src" / "qemu" / "scripts" / "vmstate-static-checker.py"
    done = subprocess.run(
        ["/usr/bin/python3", str(checker), "-s", str(source), "-d", str(destination)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert bool(done.returncode) == bool(done.stdout) and not done.stderr, done
    return done.stdout


@pytest.mark.parametrize("machine", ["pc-q35-9.2", "pc-q35-10.0", "pc-i440fx-10.0"])
def test_same_as_stock(described: Callable[[str, str], Path], machine: str) -> None:
    """vmstate-static-checker finds nothing, whichever of the two a guest comes from."""
    ours, stock = described("ours", machine), described("stock", machine)
    assert differences(stock, ours) == differences(ours, stock) == ""


def test_a_difference_is_found(described: Callable[[str, str], Path], tmp_path: Path) -> None:
    """The premise: a field that has another name in the balloon's state is named."""
    stock = described("stock", "pc-q35-10.0")
    devices = json.loads(stock.read_text("utf-8"))
    devices["virtio-balloon-device"]["Description"]["Fields"][0]["field"] = "another"
    changed = tmp_path / "changed.json"
    changed.write_text(json.dumps(devices), "utf-8")
    assert "another" in differences(stock, changed)
