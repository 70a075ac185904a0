# SPDX-License-Identifier: GPL-2.0-or-later
"""The destination's memory is the source's, but for what was hinted and not written since."""

from typing import Any, Dict

import pytest

from livemig.checks import SMALL, assert_arrived, busy, in_check, patient
from livemig.lab import Lab
from livemig.migration import migrate
from livemig.modes import MODES

pytestmark = pytest.mark.integrity


@pytest.mark.parametrize("mode_name", in_check(["array", "block", "none"], "array"))
def test_equal_but_for_kept_pages(lab: Lab, measured: Dict[str, Any], mode_name: str) -> None:
    """Source and destination hold the same bytes in every page that was not kept back."""
    mode = MODES[mode_name]
    oracle, source, destination = busy(lab, mode.spec(SMALL))
    migrate(source, destination, patient(mode))
    result = assert_arrived(oracle, measured)
    measured["different"] = result.different
    # The premise: hinted pages are not sent, so that freed memory does differ.
    assert (result.kept > 0) == (mode_name != "none")
    assert (result.different > 0) == (mode_name != "none")
