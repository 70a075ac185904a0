# SPDX-License-Identifier: GPL-2.0-or-later
"""What the tests under libvirt share."""

from typing import Iterator

import pytest

from livemig.domains import Hosts, running_hosts


@pytest.fixture(name="hosts", scope="module")
def hosts_fixture() -> Iterator[Hosts]:
    """Two libvirt hosts for the tests of a file."""
    with running_hosts() as hosts:
        yield hosts
