# SPDX-License-Identifier: GPL-2.0-or-later
"""Figures in README and docs are those of the results that are committed."""

import json
from pathlib import Path

import pytest

from livebench import quotes
from livemig.errors import LivemigError


@pytest.mark.check
def test_documents_quote_what_was_measured() -> None:
    """Each figure that is quoted from committed runs is computed again, and is the same."""
    assert len(quotes.read()) >= 40
    assert {"README.md", "docs/benchmarks.md"} <= {quote["doc"] for quote in quotes.read()}
    assert not quotes.missing()


def test_a_stale_figure_is_found(tmp_path: Path) -> None:
    """A document that says something else is named, with what it should say."""
    text = "{array} ms, {array / legacy} of {legacy quartiles}, {array runs} runs"
    runs = {"from": ["modes.json.xz"], "scenario": "idle-8g"}
    quote = {"doc": "page.md", "text": text, **runs}
    right = "**106** ms, 0.22 of 490\n(442–618), 3 runs"
    data = tmp_path / "quotes.json"
    data.write_text(json.dumps([quote]), "utf-8")
    (tmp_path / "modes.json.xz").symlink_to(quotes.RESULTS / "modes.json.xz")
    page = tmp_path / "page.md"
    page.write_text(right, "utf-8")
    assert not quotes.missing(data, tmp_path)
    page.write_text(right.replace("0.22", "0.21"), "utf-8")
    said = "page.md does not say: 106 ms, 0.22 of 490 (442-618), 3 runs"
    assert quotes.missing(data, tmp_path) == [said]
    with pytest.raises(LivemigError, match="no runs of floor in idle-2g"):
        quotes.quoted({**quote, "scenario": "idle-2g", "text": "{floor}"})
