"""Draws measured ratios for the page on performance: tables with an axis, which narrow with the page and read aloud."""

import html
import math
import re
from collections.abc import Iterable
from typing import NamedTuple

# Ticks of an axis, by how many times its beginning its end is.
TICKS = {
    30: (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10),
    3: (0.1, 0.2, 0.5, 1, 2, 5, 10),
    1: (0.8, 0.9, 1, 1.1, 1.25),
}


class Ratio(NamedTuple):
    """A measured ratio: what it is of, over what, its median, and the ends of its middle half."""

    label: str
    group: str
    median: float
    low: float
    high: float


class Subject(NamedTuple):
    """A row of the overview: what one uses, what it was measured against, and medians of time and of memory."""

    label: str
    over: str
    time: list[float]
    memory: list[float]


def ratio(row: dict[str, float | str]) -> Ratio:
    """A row of the record, its text divided into what is measured and what it is compared with."""
    what, name = str(row["what"]), str(row["name"])
    label, colon, group = what.partition(": ")
    if colon:
        label = label.removeprefix(f"{name}, ")
    else:
        label, group = name, what.removeprefix(name).lstrip(", ")
    return Ratio(label, group, *(float(row[f"ratio_{key}"]) for key in ("median", "q1", "q3")))


def _words(text: str) -> str:
    """Text for HTML, with code between backticks and a letter between dollars."""
    text = re.sub(r"`(.+?)`", r"<code>\1</code>", html.escape(text, quote=False))
    return re.sub(r"\$(.+?)\$", r"<i>\1</i>", text)


class _Axis:
    """A logarithmic axis: places in percent of its width."""

    def __init__(self, values: Iterable[float]) -> None:
        values = [0.8, 1.25, *values]
        self.low, self.high = min(values) / 1.2, max(values) * 1.2
        ticks = next(ticks for width, ticks in TICKS.items() if self.high > width * self.low)
        self.ticks = [tick for tick in ticks if self.low <= tick <= self.high]

    def place(self, value: float) -> float:
        return 100 * math.log(value / self.low) / math.log(self.high / self.low)

    def head(self) -> str:
        kept: list[float] = []  # what a phone has room for: 1, and from there outwards what is not close to another
        for tick in sorted(self.ticks, key=lambda tick: abs(math.log(tick))):
            if all(abs(self.place(tick) - self.place(other)) > 25 for other in kept):
                kept.append(tick)
        close = {tick: "" if tick in kept else 'class="close" ' for tick in self.ticks}
        marks = (f'<b {close[tick]}style="left: {self.place(tick):.1f}%">{tick:g}</b> ' for tick in self.ticks)
        return f'<th class="axis" scope="col"><span class="strip">{"".join(marks)}</span></th>'

    def strip(self, low: float, high: float, points: Iterable[float], kind: str = "time") -> str:
        drawn = [
            f'<i class="{"one" if tick == 1 else "tick"}" style="left: {self.place(tick):.1f}%"></i>'
            for tick in self.ticks
        ]
        if high > low:
            left, right = self.place(low), self.place(high)
            drawn.append(f'<i class="bar {kind}" style="left: {left:.1f}%; width: {right - left:.1f}%"></i>')
        drawn += [f'<i class="dot {kind}" style="left: {self.place(point):.1f}%"></i>' for point in points]
        return f'<td class="axis"><span class="strip">{"".join(drawn)}</span></td>'


def _table(head: str, groups: dict[str, list[str]]) -> str:
    bodies = (
        f'<tbody><tr><th class="group" colspan="3" scope="rowgroup">{_words(group)}</th></tr>{"".join(rows)}</tbody>'
        for group, rows in groups.items()
    )
    return f'<table class="table ratios"><thead><tr>{head}</tr></thead>{"".join(bodies)}</table>'


def chart(ratios: list[Ratio]) -> str:
    """Ratios on one logarithmic axis: a point for the median, a bar for the middle half.

    Args:
        ratios: those of a group stand together, under what they are compared with.

    Returns:
        A ``table`` of HTML on one line.
    """
    axis = _Axis(end for each in ratios for end in (each.low, each.high))
    groups: dict[str, list[str]] = {}
    for each in ratios:
        said = f"<b>{each.median:.2f}</b>" + (f" ({each.low:.2f}–{each.high:.2f})" if each.high > each.low else "")
        cells = f'<th scope="row">{_words(each.label)}</th>{axis.strip(each.low, each.high, [each.median])}'
        groups.setdefault(each.group, []).append(f'<tr>{cells}<td class="said">{said}</td></tr>')
    return _table(f'<th scope="col">measured</th>{axis.head()}<th scope="col">median (middle half)</th>', groups)


def overview(groups: dict[str, list[Subject]]) -> str:
    """Medians of time and of memory on one logarithmic axis, for everything that was measured.

    Args:
        groups: subjects by heading. Several medians are drawn as a bar from the least to the largest.

    Returns:
        A ``table`` of HTML on one line.
    """
    subjects = [subject for group in groups.values() for subject in group]
    axis = _Axis(median for subject in subjects for median in subject.time + subject.memory)
    rows: dict[str, list[str]] = {}
    for group, members in groups.items():
        for subject in members:
            kinds = {"time": subject.time, "memory": subject.memory}
            drawn = {kind: medians for kind, medians in kinds.items() if medians}
            label = f"{_words(subject.label)} <small>over {_words(subject.over)}</small>"
            cells = f'<th scope="row" rowspan="{len(drawn) or 1}">{label}</th>'
            for kind, medians in drawn.items():
                low, high = min(medians), max(medians)
                ends = dict.fromkeys((low, high))
                said = "–".join(dict.fromkeys(f"{end:.2f}" for end in ends))
                strip = axis.strip(low, high, ends, kind)
                rows.setdefault(group, []).append(f'<tr>{cells}{strip}<td class="said">{kind} <b>{said}</b></td></tr>')
                cells = ""
    return _table(f'<th scope="col">you use</th>{axis.head()}<th scope="col">ratio</th>', rows)


def stacks(head: str, rows: dict[str, dict[str, str]]) -> str:
    """Amounts end to end on one axis from zero, to scale, with a line where the whole was measured.

    Args:
        head: what the rows are of.
        rows: for each bar its parts, by name, from left to right, and after them what was ``measured``.

    Returns:
        A ``table`` of HTML on one line.
    """
    counted = {label: {kind: float(part) for kind, part in parts.items()} for label, parts in rows.items()}
    measured = {label: parts.pop("measured") for label, parts in counted.items()}
    sums = {label: sum(parts.values()) for label, parts in counted.items()}
    longest = max(*sums.values(), *measured.values())
    kinds = list(dict.fromkeys(kind for parts in counted.values() for kind in parts))
    lines = []
    for label, parts in counted.items():
        left, drawn = 0.0, []
        for kind, amount in parts.items():
            width = 100 * amount / longest
            place = f'style="left: {left:.1f}%; width: {width:.1f}%"'
            drawn.append(f'<i class="part of-{kinds.index(kind)}" {place}></i>')
            left += width
        drawn.append(f'<i class="found" style="left: {100 * measured[label] / longest:.1f}%"></i>')
        strip = f'<td class="axis"><span class="strip">{"".join(drawn)}</span></td>'
        said = "".join(f'<td class="said">{value:g}</td>' for value in (sums[label], measured[label]))
        lines.append(f'<tr><th scope="row">{_words(label)}</th>{strip}{said}</tr>')
    key = " ".join(f'<span><i class="of-{place}"></i>{_words(kind)}</span>' for place, kind in enumerate(kinds))
    heads = "".join(f'<th scope="col">{text}</th>' for text in ("counted", "measured"))
    head = f'<th scope="col">{_words(head)}</th><th class="axis" scope="col">to scale</th>{heads}'
    body = f"<thead><tr>{head}</tr></thead><tbody>{''.join(lines)}</tbody>"
    return f'<table class="table ratios stacked"><caption>{key}</caption>{body}</table>'
