# SPDX-License-Identifier: GPL-2.0-or-later
"""Tables, a line of progress, and the picture of a migration."""

import math
from typing import Any, Optional, Sequence

from livefph.connection import FphError
from livefph.watch import Record, Sample

UNITS = ("B", "KiB", "MiB", "GiB", "TiB", "PiB")
BAR = 24
# Colours that are told apart by those who see few, and on paper: the skipped part is hatched too
SENT, LEFT, SKIPPED, RATE, DIRTY = "#4477aa", "#ccddee", "#ddcc77", "#4477aa", "#cc3311"


def size(count: Optional[float]) -> str:
    """Bytes, for people."""
    if count is None:
        return "-"
    unit = 0
    while count >= 1024 and unit + 1 < len(UNITS):
        count, unit = count / 1024, unit + 1
    decimals = 1 if unit > 2 and count < 100 else 0
    return f"{count:.{decimals}f} {UNITS[unit]}"


def duration(seconds: Optional[float]) -> str:
    """Seconds, for people."""
    if seconds is None:
        return "-"
    if seconds < 10:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if not minutes:
        return f"{rest} s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02} min" if hours else f"{minutes} min {rest:02} s"


def table(head: Sequence[str], rows: Sequence[Sequence[str]], right: Sequence[int] = ()) -> str:
    """Rows in columns, those of some numbers flush right."""
    columns = []
    for number, cells in enumerate(zip(head, *rows)):
        width = max(map(len, cells))
        columns.append([c.rjust(width) if number in right else c.ljust(width) for c in cells])
    return "\n".join("  ".join(line).rstrip() for line in zip(*columns))


def filled(sample: Sample, width: int = BAR) -> str:
    """How much was sent, is left, and was skipped, in this order."""
    if not sample.total:
        return "." * width
    skipped = round(width * (sample.skipped or 0) / sample.total)
    left = min(math.ceil(width * sample.remaining / sample.total), width - skipped)
    return "#" * (width - left - skipped) + "." * left + "/" * skipped


def progress(record: Record, width: int) -> str:
    """A migration in a line."""
    if not record.samples:
        status = "waits for a migration" if record.status == "none" else record.status
        return f"{record.name}  {status}"[: width - 1]
    last = record.samples[-1]
    # Of what has to be sent: what is skipped is in the bar.
    whole = max(1, last.total - (last.skipped or 0))
    share = 100 * max(0, whole - last.remaining) // whole
    line = f"{record.name}  [{filled(last)}] {share:3} % sent"
    words = [last.status]
    if last.status == "active" and last.expected is not None:
        words = [f"end in {duration(last.expected)}"]
    elif last.status == "active":
        words = ["end not in sight" if last.dirty_rate else "end not known"]
    if last.skipped is not None:
        words.append(f"skipped {size(last.skipped)}")
    words += [f"round {last.round}", f"{size(last.rate)}/s", f"dirty {size(last.dirty_rate)}/s"]
    for word in words:
        if len(line) + 2 + len(word) > width - 1:
            break
        line += "  " + word
    return line[: width - 1]


def outcome(record: Record) -> str:
    """The end of a migration in a line."""
    words = [f"{record.name}: {record.status}"]
    if record.total_ms is not None:
        words[0] += f" in {duration(record.total_ms / 1000)}"
    if record.downtime_ms is not None:
        words.append(f"of that {record.downtime_ms} ms downtime")
    total = record.samples[-1].total if record.samples else None
    if record.sent is not None:
        words.append(f"{size(record.sent)} sent")
    if record.skipped is not None:
        words.append(size(record.skipped) + (f" of {size(total)}" if total else "") + " skipped")
    for name, found in ("hints", record.hints), ("absent pages", record.absent):
        if found.get("reason"):
            words.append(f"{name} {found['reason']}")
    return ", ".join(words) + (f": {record.error}" if record.error else "")


def picture(record: Record, path: str) -> None:
    """Draw a migration: memory over time, what was skipped hatched; below, the rates."""
    try:
        # It takes a second to load, and few need it.
        # pylint: disable-next=import-outside-toplevel
        from matplotlib.figure import Figure
    except ImportError as err:
        raise FphError("no picture without it: apt install python3-matplotlib") from err
    samples = record.samples
    if len(samples) < 2:
        raise FphError("no picture: the migration was over before it was looked at twice")
    figure = Figure(figsize=(9, 6))
    memory, rates = figure.subplots(2, 1, sharex=True, gridspec_kw={"height_ratios": [2, 1]})
    _draw_memory(memory, samples)
    _draw_rates(rates, samples)
    figure.suptitle(outcome(record), fontsize=10, wrap=True)
    figure.tight_layout()
    try:
        figure.savefig(path, dpi=110)
    except OSError as err:
        raise FphError(f"{path}: {err.strerror}") from err


def _draw_memory(axes: Any, samples: Sequence[Sample]) -> None:
    times = [s.seconds for s in samples]
    unit, name = (1 << 30, "GiB") if samples[-1].total >= 4 << 30 else (1 << 20, "MiB")
    skipped = [(s.skipped or 0) / unit for s in samples]
    left = [s.remaining / unit for s in samples]
    sent = [max(0, s.total / unit - k - r) for s, k, r in zip(samples, skipped, left)]
    labels = ("sent", "left to send", "skipped")
    layers = axes.stackplot(times, sent, left, skipped, colors=(SENT, LEFT, SKIPPED), labels=labels)
    layers[2].set_hatch("///")
    layers[2].set_edgecolor("white")
    for before, after in zip(samples, samples[1:]):
        if after.round > before.round:
            top = 1 - (after.skipped or 0) / after.total
            axes.axvline(after.seconds, 0, top, color="black", linewidth=0.7, linestyle=":")
    axes.set_ylabel(f"{name} of RAM")
    axes.set_ylim(0, samples[-1].total / unit)
    axes.set_xlim(times[0], times[-1])
    handles, _ = axes.get_legend_handles_labels()
    # In the order in which they lie on each other
    axes.legend(handles=handles[::-1], loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)


def _draw_rates(axes: Any, samples: Sequence[Sample]) -> None:
    times = [s.seconds for s in samples]
    axes.plot(times, [s.rate / 2**20 for s in samples], color=RATE, label="sent")
    axes.plot(times, [s.dirty_rate / 2**20 for s in samples], color=DIRTY, label="dirtied")
    axes.set_ylabel("MiB/s")
    axes.set_xlabel("seconds since it began; dotted: a round begins")
    axes.set_ylim(bottom=0)
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)
