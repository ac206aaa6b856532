"""Draws measured ratios for the page on performance: a point for the median, a bar for the middle half, a line at 1."""

import html
import math
import textwrap
from typing import NamedTuple

from figure_pages import themed

LABELS, TRACK, VALUES = 236, 186, 92  # the three columns, in pixels of the drawing
LINE, GAP, FOOT = 15, 9, 28
TICKS, FINE_TICKS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20), (0.8, 0.9, 1, 1.1, 1.25)
INK, GREY, PALE = "#0072b2", "#6b6b6b", "#d0d0d0"


class Ratio(NamedTuple):
    """A measured ratio: what it is of, over what, its median, and the ends of its middle half."""

    label: str
    group: str
    median: float
    low: float
    high: float


def ratio(row: dict[str, float | str]) -> Ratio:
    """A row of the record, its text divided into what is measured and what it is compared with."""
    what, name = str(row["what"]), str(row["name"])
    label, colon, group = what.partition(": ")
    if colon:
        label = label.removeprefix(f"{name}, ")
    else:
        label, group = name, what.removeprefix(name).lstrip(", ")
    return Ratio(label, group, *(float(row[f"ratio_{key}"]) for key in ("median", "q1", "q3")))


def words(ratios: list[Ratio]) -> str:
    """What is read aloud in a chart's place."""
    said = "; ".join(f"{each.label}, {each.group}: {each.median:.2f}" for each in ratios)
    return f"Median ratios. {said}."


def chart(ratios: list[Ratio]) -> str:
    """A drawing of ratios on one logarithmic axis, as part of a page.

    Args:
        ratios: those of a group stand together, under what they are compared with.

    Returns:
        A ``figure`` of HTML on one line, in the colours of the light and of the dark page.
    """
    groups = list(dict.fromkeys(each.group for each in ratios))
    ratios = sorted(ratios, key=lambda each: groups.index(each.group))
    low = min(0.8, *(each.low for each in ratios)) / 1.1
    high = max(1.25, *(each.high for each in ratios)) * 1.1

    def place(value: float) -> float:
        return LABELS + TRACK * math.log(value / low) / math.log(high / low)

    def text(x: float, y: float, said: str, style: str = "font-size: 12px", end: str = "start") -> str:
        return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{end}" style="{style}">{html.escape(said)}</text>'

    def stroke(x: float, y: float, to_x: float, to_y: float, style: str) -> str:
        return f'<line x1="{x:.1f}" y1="{y:.1f}" x2="{to_x:.1f}" y2="{to_y:.1f}" style="{style}"/>'

    drawn, y = [], 4.0
    for group in groups:
        y += LINE + GAP
        drawn.append(text(0, y - 4, group, "font-size: 12px; font-weight: 600"))
        for each in (each for each in ratios if each.group == group):
            lines = textwrap.wrap(each.label, 35)
            middle = y + GAP / 2 + LINE * len(lines) / 2
            for number, line in enumerate(lines):
                drawn.append(text(8, y + GAP / 2 + LINE * (number + 0.78), line))
            if each.high > each.low:
                bar = f"stroke: {INK}; stroke-width: 6; stroke-opacity: 0.4"
                drawn.append(stroke(place(each.low), middle, place(each.high), middle, bar))
            drawn.append(f'<circle cx="{place(each.median):.1f}" cy="{middle:.1f}" r="3.5" style="fill: {INK}"/>')
            spread = f" ({each.low:.2f}–{each.high:.2f})" if each.high > each.low else ""
            drawn.append(
                text(LABELS + TRACK + VALUES, middle + 4, f"{each.median:.2f}{spread}", "font-size: 11px", "end")
            )
            y += LINE * len(lines) + GAP / 2
    axis = []
    for tick in TICKS if high > 3 * low else FINE_TICKS:
        if low <= tick <= high:
            line = f"stroke: {GREY}; stroke-width: 1.5" if tick == 1 else f"stroke: {PALE}; stroke-width: 1"
            axis.append(stroke(place(tick), 8, place(tick), y + 6, line))
            axis.append(text(place(tick), y + 20, f"{tick:g}", f"font-size: 11px; fill: {GREY}", "middle"))
    size = f"0 0 {LABELS + TRACK + VALUES} {y + FOOT:.0f}"
    drawing = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="{size}">{"".join(axis + drawn)}</svg>'
    return f'<figure class="ratios">{themed(drawing, words(ratios))}</figure>'
