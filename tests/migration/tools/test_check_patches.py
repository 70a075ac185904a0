# SPDX-License-Identifier: GPL-2.0-or-later
"""check-patches builds at each patch, and says at which it did not."""

import shutil
from pathlib import Path
from typing import Any

import pytest

from livemig import paths
from livemig.checks import run_script

PATCH = """From: Somebody <somebody@localhost>
Subject: [PATCH] patch {number}

Of no use.
---
--- a/file-{number}
+++ b/file-{number}
@@ -1 +1 @@
-before
+{text}
"""
# A build notes what it sees; if it is told to, it fails from the patch on that changes this file.
BUILDER = """#!/bin/bash
cd "$FPH_CACHE/libvirt-check/src"
cat file-* | paste -sd " " >>"$LOG"
[ ! "$FAILS_AT" ] || grep before "file-$FAILS_AT"
"""


class Project:
    """A copy of our scripts, with three patches for a tree that a shell script builds."""

    def __init__(self, directory: Path):
        self._directory = directory
        self._log = directory / "log"
        shutil.copytree(paths.REPO / "scripts", directory / "scripts", symlinks=True)
        (directory / "scripts/build-libvirt").write_text(BUILDER)
        source = directory / "cache/src/libvirt-11.3.0"
        (source / "src/qemu").mkdir(parents=True)
        (source / "meson.build").write_text("  version: '11.3.0',\n")
        (source.parent / "libvirt").symlink_to(source.name)
        self._patches = directory / "libvirt/patches/11.3"
        self._patches.mkdir(parents=True)
        for number in (1, 2, 3):
            (source / f"file-{number}").write_text("before\n")
            self.write(number, "after")
        names = "".join(f"{number}.patch\n" for number in (1, 2, 3))
        (self._patches / "series").write_text(f"# base: libvirt-11.3.0\n{names}")

    def write(self, number: int, text: str) -> None:
        """Write a patch."""
        patch = PATCH.format(number=number, text=text)
        (self._patches / f"{number}.patch").write_text(patch)

    def check(self, *options: str, fails_at: str = "") -> Any:
        """Run check-patches; return what it did, and the three files' contents at each build."""
        self._log.write_text("")
        script = self._directory / "scripts/check-patches"
        environment = {"FPH_CACHE": str(self._directory / "cache"), "LOG": str(self._log)}
        done = run_script(script, *options, "libvirt", FAILS_AT=fails_at, **environment)
        return done, self._log.read_text().splitlines()


@pytest.fixture
def project(tmp_path: Path) -> Project:
    """A project whose patches were never built."""
    return Project(tmp_path)


def test_built_once_at_each_patch(project: Project) -> None:
    """Each patch is built, and what an earlier run has built is not built again."""
    done, builds = project.check("--build")
    assert done.returncode == 0, done.stderr
    assert builds == ["after before before", "after after before", "after after after"]
    assert "3 built, 0 built before, 0 not built" in done.stdout
    again, builds = project.check("--build")
    assert not builds
    assert "0 built, 3 built before, 0 not built" in again.stdout


def test_built_from_the_changed_patch_on(project: Project) -> None:
    """A changed patch is built again, and so are those on top of it; not those below."""
    project.check("--build")
    project.write(2, "other")
    done, builds = project.check("--build")
    assert builds == ["after other before", "after other after"]
    assert "2 built, 1 built before, 0 not built" in done.stdout


def test_failed_build_is_tried_again(project: Project) -> None:
    """A patch that does not build ends the check, and the next one finds that again."""
    for _ in range(2):
        done, builds = project.check("--build", fails_at="2")
        assert done.returncode != 0
        assert "applies" not in done.stdout
        assert builds[-1] == "after after before"


def test_what_was_not_built_is_named(project: Project) -> None:
    """Out of time, the patches are still applied, and those that were not built are named."""
    done, builds = project.check("--build", "--minutes", "0")
    assert done.returncode == 0, done.stderr
    assert not builds
    assert "every patch applies" in done.stdout
    assert "0 built, 0 built before, 3 not built" in done.stdout
    assert done.stdout.count("not built: libvirt: 000") == 3


def test_only_what_has_tests_is_tested(project: Project) -> None:
    """libvirt's and the kernel's patches are refused, before anything is built."""
    done, builds = project.check("--test")
    assert done.returncode != 0 and not builds
    assert "--test is for the patches of qemu" in done.stderr and done.stderr.count("\n") == 1
