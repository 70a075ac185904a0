# SPDX-License-Identifier: GPL-2.0-or-later
"""Figures that documents quote: each is computed again from the results that are committed.

bench/results/quotes.json has, for each row or sentence, the document, the files of runs, the
scenario (or several, taken together) and the text, in which these stand for figures:

- ``{MODE}``, ``{MODE METRIC}``: the median, of the total time in ms unless another metric is named
- ``{MODE range}``, ``{MODE quartiles}``: the median, and in brackets the lowest and highest value
  or the quartiles; ``{MODE quartiles METRIC}`` of another metric
- ``{MODE runs}``: how many runs there are
- ``{MODE / MODE}``, ``{MODE / MODE METRIC}``: the ratio of two medians
- ``{MODE p MODE}``: how likely such ranks are if both modes were the same

What a document emphasizes, how it breaks lines, and which dash it uses make no difference.
"""

import json
import re
from functools import lru_cache
from pathlib import Path
from typing import Any, Callable, Dict, List, Mapping, Sequence

from livebench import statistics, store, summary
from livemig import paths
from livemig.errors import LivemigError

RESULTS = paths.REPO / "bench" / "results"
QUOTES = RESULTS / "quotes.json"
FIGURE = re.compile(r"\{([^{}]+)\}")


# One file serves many quotes.
_exported = lru_cache(maxsize=None)(store.exported)


def _figure(words: Sequence[str], values: Callable[..., List[float]]) -> str:
    """What stands for these words; the values are those of a mode, and of a metric."""
    mode, what, *rest = (*words, "")
    if what in ("range", "quartiles"):
        spread = statistics.Spread.from_values(values(mode, *rest[:-1]))
        ends = (spread.low, spread.high)
        if what == "quartiles":
            ends = (spread.first_quartile, spread.third_quartile)
        return f"{spread.median:.0f} ({ends[0]:.0f}-{ends[1]:.0f})"
    if what == "/":
        base, *metric = rest[:-1]
        return statistics.ratio_text(statistics.ratio(values(mode, *metric), values(base, *metric)))
    if what == "p":
        return f"{statistics.p_value(values(mode), values(rest[0])):.1g}"
    if what == "runs":
        return str(len(values(mode)))
    return f"{statistics.Spread.from_values(values(mode, *words[1:])).median:.0f}"


def read(quotes: Path = QUOTES) -> List[Dict[str, Any]]:
    """All quotes."""
    return list(json.loads(quotes.read_text(encoding="utf-8")))


def plain(text: str) -> str:
    """A text without emphasis, line breaks and kinds of dashes."""
    return " ".join(text.replace("*", "").replace("–", "-").split())


def quoted(quote: Mapping[str, Any], results: Path = RESULTS) -> str:
    """A quote with the figures as they are computed now."""
    runs = [run for name in quote["from"] for run in _exported(results / name)]
    scenarios = quote["scenario"]
    scenarios = [scenarios] if isinstance(scenarios, str) else scenarios

    def values(mode: str, metric: str = "total_ms") -> List[float]:
        found = sum((summary.values(runs, name, mode, metric) for name in scenarios), [])
        if not found:
            raise LivemigError(f"no runs of {mode} in {' '.join(scenarios)} have {metric}")
        return found

    return FIGURE.sub(lambda match: _figure(match[1].split(), values), quote["text"])


def missing(quotes: Path = QUOTES, root: Path = paths.REPO) -> List[str]:
    """What documents should say and do not, a line each."""
    found = []
    for quote in read(quotes):
        text = quoted(quote, quotes.parent)
        if plain(text) not in plain((root / quote["doc"]).read_text(encoding="utf-8")):
            found.append(f"{quote['doc']} does not say: {text}")
    return found
