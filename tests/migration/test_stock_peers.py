# SPDX-License-Identifier: GPL-2.0-or-later
"""Stock guests and stock QEMUs on the other side keep working."""

import time
from dataclasses import replace
from typing import Any, Dict

import pytest
from checks import FOR_STOCK, FREED_MIB, FREED_PAGES, SMALL, assert_hints_used, assert_intact
from checks import WITH_HINTS, fill_and_free, start_churn
from conftest import Lab

from livemig import workload
from livemig.errors import MigrationError
from livemig.migration import migrate
from livemig.spec import MODES

MIB = 1 << 20
STOCK_BALLOON = MODES["stock-block"].balloon
BLOCKS_ONLY = "free-page-hint=on,free-page-hint-arrays=off"


def test_stock_guest_on_our_qemu(lab: Lab, measured: Dict[str, Any]) -> None:
    """A stock guest that is offered arrays falls back to single blocks, and they are used."""
    source = lab.boot(SMALL.but(kernel="stock"))
    fill_and_free(source)
    start_churn(source)
    destination = lab.incoming(source.spec)
    result = migrate(source, destination, WITH_HINTS)
    assert_intact(destination)
    assert_intact(destination, "churn")
    hints = assert_hints_used(result, FREED_MIB * MIB)
    measured.update(blocks=hints.blocks, arrays=hints.arrays)
    # The premise: this was the old protocol, a block in each message.
    assert hints.arrays == hints.blocks


def test_our_guest_on_stock_qemu(lab: Lab, measured: Dict[str, Any]) -> None:
    """Our guest on stock QEMU speaks the old protocol, and its hints are used."""
    normal_pages = {}
    # Stock QEMU sends pages while it waits for hints: it must not be done before they come.
    slow = FOR_STOCK.with_parameters(max_bandwidth=64 * MIB)
    for name, balloon in (("off", "free-page-hint=off"), ("on", STOCK_BALLOON)):
        spec = SMALL.but(qemu="stock", balloon=balloon)
        source = lab.boot(spec, f"source-{name}")
        fill_and_free(source)
        destination = lab.incoming(spec, f"destination-{name}")
        normal_pages[name] = migrate(source, destination, slow).normal_pages
        assert_intact(destination)
        source.close()
        destination.close()
    measured.update(normal_pages)
    assert normal_pages["off"] > 0.95 * FREED_PAGES
    # Stock QEMU has no statistics, and its hints race with the sender: how many pages they save
    # varies, that they save some does not.
    assert normal_pages["on"] < 0.9 * normal_pages["off"]


@pytest.mark.parametrize("kernel", ["ours", "stock"])
def test_destination_is_stock(lab: Lab, kernel: str) -> None:
    """With arrays switched off at the source, a guest moves to a stock QEMU, hints used."""
    source = lab.boot(SMALL.but(kernel=kernel, balloon=BLOCKS_ONLY))
    fill_and_free(source)
    start_churn(source)
    destination = lab.incoming(source.spec.but(qemu="stock", balloon=STOCK_BALLOON))
    result = migrate(source, destination, WITH_HINTS)
    assert_hints_used(result, FREED_MIB * MIB)
    assert_intact(destination)
    assert_intact(destination, "churn")


def test_source_is_stock(lab: Lab) -> None:
    """A guest that started on stock QEMU moves to ours and on to another one, hints used there."""
    source = lab.boot(SMALL.but(qemu="stock", balloon=STOCK_BALLOON))
    fill_and_free(source)
    ours = SMALL.but(balloon=BLOCKS_ONLY)
    middle = lab.incoming(ours, "middle")
    migrate(source, middle, FOR_STOCK)
    assert_intact(middle)
    workload.dirty_and_free(middle, FREED_MIB)
    destination = lab.incoming(ours)
    result = migrate(middle, destination, WITH_HINTS)
    assert_hints_used(result, FREED_MIB * MIB)
    assert_intact(destination)


@pytest.mark.parametrize("return_path", [True, False], ids=["return-path", "no-return-path"])
def test_stock_destination_refuses_arrays(lab: Lab, return_path: bool) -> None:
    """A guest that uses arrays cannot move to stock QEMU: that says why, and the guest lives on.

    With the return path, which libvirt uses, the source learns of it and goes on by itself;
    without, it may take the migration for complete and has to be told to go on then.
    """
    source = lab.boot(SMALL)
    fill_and_free(source)
    refuses = lab.incoming(SMALL.but(qemu="stock", balloon=STOCK_BALLOON), "refuses")
    with pytest.raises(MigrationError, match="(?s)[Ff]eatures 0x.* unsupported"):
        migrate(source, refuses, replace(WITH_HINTS, common={"return-path": return_path}))
    # "Completed" is told a moment before the state of the guest changes.
    while (status := source.qmp("query-status")["status"]) == "finish-migrate":
        time.sleep(0.01)
    assert status == "running" or (status == "postmigrate" and not return_path)
    if status == "postmigrate":
        source.qmp("cont")
    assert_intact(source)
    # And can move to where it can go.
    destination = lab.incoming(SMALL)
    assert_hints_used(migrate(source, destination, WITH_HINTS), FREED_MIB * MIB)
    assert_intact(destination)
