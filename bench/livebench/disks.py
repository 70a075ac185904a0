# SPDX-License-Identifier: GPL-2.0-or-later
"""The disks of a benchmark's guests. See bench/make-images."""

import contextlib
from pathlib import Path
from typing import Iterator

from livebench.workloads import Workload
from livemig import paths
from livemig.disk import debian_disk, disk_copy
from livemig.errors import LivemigError, NotPossibleHere
from livemig.spec import GuestSpec
from livemig.stockguest import stock_disk, stock_software


def data_image(workload: Workload) -> Path:
    """The disk with a workload's data."""
    return paths.require(paths.cache_dir() / "bench" / workload.data_disk, "bench/make-images")


@contextlib.contextmanager
def attached(spec: GuestSpec, workload: Workload) -> Iterator[GuestSpec]:
    """A guest with the disks that a workload needs, as long as the block lasts."""
    with contextlib.ExitStack() as stack:
        if workload.debian:
            spec = spec.but(disk=stack.enter_context(debian_disk()))
        if workload.suite:
            suite, words = workload.suite, " ".join(spec.cmdline)
            packaged = spec.kernel == "ours"
            try:
                copy = disk_copy(paths.packaged_guest(suite)) if packaged else stock_disk(suite)
            except LivemigError as err:
                # Making them takes root.
                raise NotPossibleHere(str(err)) from err
            disk = stack.enter_context(copy)
            spec = spec.but(software=stock_software(suite, disk, cmdline=words))
        if workload.kernel:
            spec = spec.but(kernel=workload.kernel)
        if workload.data_disk:
            image = data_image(workload)
            # Read-only, both sides may have the one file open.
            mode = "readonly=on"
            if workload.data_writable:
                image, mode = stack.enter_context(disk_copy(image)), "cache=writeback"
            drive = ("-drive", f"file={image},format=raw,if=none,id=data,{mode}")
            spec = spec.but(args=(*spec.args, *drive, "-device", "virtio-blk-pci,drive=data"))
        yield spec
