"""Figures inside the pages: their colours on the dark page, their words, and what a page says of itself."""

import itertools
import json
import re

import pytest
from book_pages import titled
from figure_pages import DARK, SHADES, dark, numbered, themed
from page_head import DEFAULT, description

from companion import figures
from tests.book.reading import CHAPTERS, notebook

DRAWING = """<?xml version="1.0"?>
<!DOCTYPE svg>
<svg width="360pt" height="200pt" viewBox="0 0 360 200" version="1.1">
 <defs><style type="text/css">*{stroke-linejoin: round}</style></defs>
 <g id="figure_1"><path d="M 0 0" style="fill: #ffffff"/><path clip-path="url(#p1)" style="stroke: #0072b2"/></g>
</svg>"""


def luminance(colour: str) -> float:
    parts = (int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5))
    linear = (part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts)
    return sum(weight * part for weight, part in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


def contrast(one: str, other: str) -> float:
    light, low = sorted((luminance(one), luminance(other)), reverse=True)
    return (light + 0.05) / (low + 0.05)


def test_every_colour_of_the_book_has_a_partner() -> None:
    assert {colour.lower() for colour in [*figures.COLOURS.values(), *figures.WORDS.values()]} == set(DARK)


@pytest.mark.parametrize("colour", [*DARK, *SHADES])
def test_words_can_be_read_on_the_dark_page(colour: str) -> None:
    assert contrast(dark(colour), "#121212") >= 4.5


@pytest.mark.parametrize("chapter", CHAPTERS)
def test_what_stands_out_on_the_light_page_does_on_the_dark_one(chapter: str) -> None:
    code = "".join(cell.source for cell in notebook(chapter).cells if cell.cell_type == "code").lower()
    for colour in set(re.findall("#[0-9a-f]{6}\\b", code)):
        if contrast(colour, "#ffffff") >= 4.5:
            assert contrast(dark(colour), "#121212") >= 4.5, colour


@pytest.mark.parametrize("colour", figures.WORDS.values())
def test_words_can_be_read_on_the_light_page(colour: str) -> None:
    assert contrast(colour.lower(), "#ffffff") >= 4.5


def test_partners_are_told_apart_as_well() -> None:
    for one, other in itertools.combinations(figures.COLOURS.values(), 2):
        assert DARK[one.lower()] != DARK[other.lower()]


@pytest.mark.parametrize(
    ("colour", "partner"), [("#ffffff", "#121212"), ("#000000", "#e6e6e6"), ("#ff0000", "#ff0000")]
)
def test_greys_turn_around_and_strong_colours_stay(colour: str, partner: str) -> None:
    assert dark(colour) == partner


def test_a_pale_tint_becomes_a_dark_one() -> None:
    assert contrast(dark("#f3e4de"), dark("#000000")) > 7


def test_a_drawing_becomes_part_of_the_page() -> None:
    found = themed(DRAWING, 'A line, "falling"')
    assert found.startswith('<svg class="drawing" role="img" aria-label="A line, &quot;falling&quot;" viewBox=')
    assert "fill: #ffffff; fill: light-dark(#ffffff, #121212)" in found
    assert 'clip-path="url(#p1)"' in found
    for gone in ("<style", "DOCTYPE", "width=", "figure_1"):
        assert gone not in found


@pytest.mark.parametrize("many", ["<image/>", "".join(f'<p style="fill: #{i:06x}"/>' for i in range(30))])
def test_a_drawing_with_many_colours_is_a_card(many: str) -> None:
    found = themed(DRAWING.replace("</g>", f"{many}</g>"), "")
    assert 'class="drawing card"' in found
    assert "light-dark" not in found


def test_a_page_is_described_by_its_first_paragraph() -> None:
    first = "Gradient descent is Euler\u2019s method, and your learning rate is a step of time, <em>not</em> of length."
    assert description(f"<p>Short.</p><p>{first}</p>") == first.replace("<em>", "").replace("</em>", "")
    assert len(description(f"<p>{first * 9}</p>")) <= 160
    assert description("<p>none</p>") == DEFAULT


def test_an_appendix_is_numbered_in_its_title_and_figures() -> None:
    caption = '<span class="caption-number">Fig. 4 </span>'
    assert numbered(caption * 2, "notebooks/a3_x") == caption.replace("4", "A3.1") + caption.replace("4", "A3.2")
    assert numbered(caption, "notebooks/03_x") == caption
    page = json.dumps({"cells": [{"cell_type": "markdown", "source": ["# Title\n", "# more"]}]})
    assert json.loads(titled(page, "a3_x"))["cells"][0]["source"] == "# A3. Title\n# more"
    assert json.loads(titled(page, "03_x")) == json.loads(page)
