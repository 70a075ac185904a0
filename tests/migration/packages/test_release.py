# SPDX-License-Identifier: GPL-2.0-or-later
"""What a release consists of: packages, all series, checksums, texts that fit the code."""

import re
import shutil
import subprocess
from pathlib import Path
from typing import Iterator

import pytest

from livemig import paths
from livemig.checks import run_script

MAN = paths.REPO / "packaging" / "man"
# Where settings have their names in our code: parameters of modules, properties of QEMU's objects
PARAMETER = re.compile(r"^module_param\w*\((\w+),", re.MULTILINE)
PROPERTY = re.compile(
    r'^\+ +DEFINE_PROP_\w+\("((?:free-page-hint|skip-absent)[\w-]*)"', re.MULTILINE
)


@pytest.fixture(name="repo")
def repo_fixture(tmp_path: Path) -> Iterator[Path]:
    """A copy of this repository, and a file of each name that a release has."""
    command = ["git", "ls-files", "-co", "--exclude-standard"]
    for name in subprocess.check_output(command, cwd=paths.REPO, text=True).splitlines():
        # Not those that were deleted, and not yet committed
        if (paths.REPO / name).exists():
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(paths.REPO / name, tmp_path / name)
    release = tmp_path / "out" / "release"
    release.mkdir(parents=True)
    version = (paths.cache_dir() / "src" / "qemu").resolve().name.removeprefix("qemu-")
    host = f"{version}+fph{paths.version()}"
    for name in (
        f"free-page-hint-dkms_{paths.version()}_all.deb",
        f"qemu-system-x86-fph_{paths.version()}_amd64.deb",
        f"qemu_{host}.dsc",
        f"qemu_{host}.debian.tar.xz",
        f"qemu_{version.rsplit('-', 1)[0]}.orig.tar.xz",
        *(f"qemu-{name}_{host}_amd64.deb" for name in ("system-x86", "system-common", "utils")),
        # Of an earlier release
        "qemu-system-x86-fph_0.0.1_amd64.deb",
    ):
        (release / name).write_text(name)
    yield tmp_path


def test_release_is_complete(repo: Path) -> None:
    """Each file of a release has its checksum, and each patch its line in a cover letter.

    A series whose base is not there is left out, which is said.
    """
    done = run_script(repo / "scripts" / "release", FPH_CACHE=str(paths.cache_dir()))
    assert done.returncode == 0, done.stderr
    release = repo / "out" / "release"
    sums = (release / "SHA256SUMS").read_text("ascii")
    subprocess.run(["sha256sum", "--strict", "-c", "SHA256SUMS"], cwd=release, check=True)
    listed = {line.split("  ")[1] for line in sums.splitlines()}
    there = {str(path.relative_to(release)) for path in release.rglob("*") if path.is_file()}
    assert there - listed == {"SHA256SUMS", "qemu-system-x86-fph_0.0.1_amd64.deb"}

    said = done.stdout + done.stderr
    left_out = set(re.findall(r"leaving the series for (\w+) ([\d.]+) out", said))
    bases = set(paths.all_series())
    assert len(left_out) <= len(bases) - 2
    for tree, base in bases - left_out:
        parts = sorted((release / f"series-{paths.version()}" / f"{tree}-{base}").iterdir())
        patches = list((paths.REPO / tree / "patches" / base).glob("*.patch"))
        assert sum(len(list(part.glob("*.patch"))) for part in parts) == len(patches)
        for part in parts:
            assert_series(part)


def assert_series(part: Path) -> None:
    """A series is numbered, with a cover letter that names each patch and each file."""
    patches = sorted(part.glob("*.patch"))
    cover = (part / "cover-letter").read_text("utf-8")
    assert f"[PATCH 0/{len(patches)}] " in cover
    assert re.match(r"From: .* <.*@.*>\nDate: .*\nSubject: ", cover)
    assert ("after the series before" in cover) == (not part.name.startswith("1-"))
    totals = re.findall(r"^ (\d+) files changed, \d+ insertions", cover, re.MULTILINE)
    files = re.findall(r"^ (\S+) +\| \+\d+ -\d+$", cover, re.MULTILINE)
    assert totals == [str(len(set(files)))] and len(set(files)) == len(files)
    for number, patch in enumerate(patches, 1):
        mail = patch.read_text("utf-8")
        place = rf"\[PATCH {number}/{len(patches)}\]"
        subject = re.search(rf"^Subject: {place} (.*\n(?: .*\n)*)", mail, re.MULTILINE)
        assert subject and f"\n  {' '.join(subject[1].split())}\n" in cover


@pytest.mark.parametrize(
    "wrong, message",
    [
        ("no-package", "run make guest-deb"),
        ("other-version", 'CHANGELOG.md begins with "## '),
        ("no-text", "no text in packaging/cover-letters/kernel is about 0007-"),
        ("two-texts", "kernel/2-page-cache is about 6-8: there is no 0006-"),
    ],
)
def test_release_refuses_what_is_not_whole(repo: Path, wrong: str, message: str) -> None:
    """What is missing, or in no series or two, is named in one line; nothing is completed."""
    letters = repo / "packaging" / "cover-letters" / "kernel"
    if wrong == "no-package":
        next((repo / "out" / "release").glob("free-page-hint-dkms_*")).unlink()
    elif wrong == "no-text":
        (letters / "2-page-cache").unlink()
    elif wrong == "two-texts":
        text = letters / "2-page-cache"
        text.write_text(text.read_text().replace("Patches: 7-8", "Patches: 6-8"))
    else:
        changes = repo / "CHANGELOG.md"
        changes.write_text(changes.read_text().replace(f"## {paths.version()} ", "## 99.9 "))
    done = run_script(repo / "scripts" / "release", FPH_CACHE=str(paths.cache_dir()))
    assert done.returncode == 1
    assert message in done.stderr and done.stderr.count("\n") == 1, done.stderr
    assert not list((repo / "out" / "release").glob("SHA256SUMS*"))


def test_manual_pages_name_each_setting() -> None:
    """What can be set of our modules and our QEMU is in manual pages, which are well-formed."""
    module = (MAN / "virtio_balloon_hint.4.rst").read_text("utf-8")
    sources = (paths.REPO / "kernel").rglob("*.c")
    parameters = {name for path in sources for name in PARAMETER.findall(path.read_text("utf-8"))}
    assert parameters and all(f"**{name}**" in module for name in parameters)

    program = (MAN / "qemu-system-x86_64-fph.1.rst").read_text("utf-8")
    patches = (paths.REPO / "qemu" / "patches").rglob("*.patch")
    properties = {name for path in patches for name in PROPERTY.findall(path.read_text("utf-8"))}
    assert len(properties) >= 4
    for name in properties:
        assert re.search(rf"[.,]{name}=", program), name

    for page in MAN.glob("*.rst"):
        subprocess.run(
            ["rst2man", "--halt=warning", str(page), "/dev/null"], check=True, timeout=60
        )
