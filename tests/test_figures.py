"""Holds `companion.figures`: what a figure shows is read back, compared with a tolerance, and told apart by colour."""

import itertools
import math
import re
from collections.abc import Iterator
from typing import Any

import IPython.display
import matplotlib as mpl
import numpy as np
import pytest

from companion import figures
from tools.figure_data import differences

mpl.use("agg")
import matplotlib.pyplot as plt


@pytest.fixture
def axes() -> Iterator[Any]:
    figure, axes = plt.subplots()
    yield axes
    plt.close(figure)


# What a figure shows


def test_titles_and_labels(axes: Any) -> None:
    axes.set(xlabel="step", ylabel="loss")
    axes.set_title("A title on the left", loc="left")
    assert figures.data(axes.figure) == [{"title": "A title on the left", "xlabel": "step", "ylabel": "loss"}]


def test_a_title_in_the_middle(axes: Any) -> None:
    axes.set_title("In the middle", loc="center")
    assert figures.data(axes.figure)[0]["title"] == "In the middle"


def test_lines_to_six_digits_with_gaps(axes: Any) -> None:
    axes.plot([1, 2, 3], [1 / 3, math.nan, 1e9 + 1], label="loss")
    axes.plot([1, 2], [math.inf, -0.5])
    axes.plot([1, 2], np.ma.masked_equal([7, 8], 8))
    first, second, third = figures.data(axes.figure)[0]["lines"]
    assert first == {"label": "loss", "x": [1.0, 2.0, 3.0], "y": [0.333333, None, 1e9]}
    assert second["y"] == [None, -0.5]
    assert third["y"] == [7.0, None]


def test_scatter(axes: Any) -> None:
    axes.scatter([1, 2, 3], [4, 5, math.nan])
    assert figures.data(axes.figure)[0]["points"] == [[[1.0, 4.0], [2.0, 5.0], [3.0, None]]]


def test_contours_lie_on_their_levels(axes: Any) -> None:
    x = np.linspace(-2, 2, 81)
    axes.contour(x, x, x**2 + x[:, None] ** 2, levels=[1.0, 2.0])
    contours = figures.data(axes.figure)[0]["contours"]
    assert [contour["level"] for contour in contours] == [1.0, 2.0]
    for contour in contours:
        np.testing.assert_allclose(np.square(contour["points"]).sum(1), contour["level"], rtol=1e-3)


def test_error_bars_and_names_on_an_axis_are_lines(axes: Any) -> None:
    axes.errorbar(["SGD", "Adam"], [1.0, 2.0], yerr=[0.1, 0.2], capsize=3)
    found = figures.data(axes.figure)[0]
    assert found["lines"][0]["y"] == [1.0, 2.0]
    assert "bars" not in found


@pytest.mark.parametrize(
    ("method", "expected"), [("bar", [[0.8, 3.0], [0.8, 4.0]]), ("barh", [[3.0, 0.8], [4.0, 0.8]])]
)
def test_bars(axes: Any, method: str, expected: list[list[float]]) -> None:
    getattr(axes, method)(["SGD", "Adam"], [3, 4])
    assert figures.data(axes.figure)[0]["bars"] == expected


def test_images(axes: Any) -> None:
    axes.imshow([[1, math.nan], [3, 4]])
    assert figures.data(axes.figure)[0]["images"] == [[[1.0, None], [3.0, 4.0]]]


def test_one_entry_for_each_axes() -> None:
    figure, (left, right) = plt.subplots(1, 2)
    left.plot([0, 1], [0, 1])
    right.imshow([[0]])
    assert [sorted(entry.keys() & {"lines", "images"}) for entry in figures.data(figure)] == [["lines"], ["images"]]
    plt.close(figure)


# Comparing


def curve(*numbers: float | None, title: str = "t") -> list[dict[str, Any]]:
    return [{"title": title, "lines": [{"label": "l", "x": [0.0] * len(numbers), "y": list(numbers)}]}]


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        (curve(1, 100), curve(1, 100)),
        (curve(1.9, 100.9), curve(1, 100)),
        (curve(1, None), curve(1, None)),
        (curve(), curve()),
        ([], []),
        ([{"images": [[[1.0, 2.0]], [[3.0], [4.0]]]}], [{"images": [[[1.0, 2.0]], [[3.0], [4.0]]]}]),
    ],
)
def test_no_difference_within_a_hundredth_of_the_range(found: list[Any], expected: list[Any]) -> None:
    assert differences(found, expected) == []


@pytest.mark.parametrize(
    ("found", "expected", "sentence"),
    [
        (curve(1, 101.1), curve(1, 100), "[0].lines[0].y: numbers differ by up to 1.1"),
        (curve(1, None), curve(1, 100), "[0].lines[0].y: "),
        (curve(1, 2), curve(1, 2, 3), "[0].lines[0].y: "),
        (curve(1e-9), curve(0), "[0].lines[0].y: numbers differ by up to 1e-09"),
        (curve(1, title="a"), curve(1, title="b"), "[0].title: 'a' instead of 'b'"),
        ([{"title": "a"}], [{"title": "a", "bars": [[1.0, 2.0]]}], "[0]: "),
        ([], [{"title": "a"}], ": [] instead of "),
        ([{"images": [[[1.0, 2.0]]]}], [{"images": [[[1.0], [2.0]]]}], "[0].images"),
        ([{"images": [[[1.0, 2.0], [3.0, 4.0]]]}], [{"images": [[[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]]]}], "[0].images"),
        ([{"images": [[[1.0, 1.0], [3.0, 3.0]]]}], [{"images": [[[1.0], [3.0]]]}], "[0].images"),
    ],
)
def test_a_difference_is_placed_and_sized(found: list[Any], expected: list[Any], sentence: str) -> None:
    sentences = differences(found, expected)
    assert any(line.startswith(sentence) for line in sentences), sentences


def test_the_tolerance_is_the_readers() -> None:
    assert differences(curve(1, 110), curve(1, 100), rtol=0.2) == []
    assert differences(curve(1, 100.01), curve(1, 100), rtol=1e-6)


# The style


@pytest.mark.parametrize("before", plt.style.available)
def test_no_colour_of_another_style_remains(before: str) -> None:
    """Whatever style a reader has set before; classic's box plots aside, of which the book has none."""

    def colours(*styles: Any) -> dict[str, Any]:
        with plt.style.context(["default", *styles]):
            return {
                name: value
                for name, value in mpl.rcParams.items()
                if ("color" in name or name in ("axes.prop_cycle", "image.cmap"))
                and not ("boxplot" in name and before == "classic")
            }

    expected = colours(figures.STYLE)
    unused = {"legend.edgecolor", "patch.force_edgecolor", "hatch.color"}  # classic's; our legends have no frame
    found = colours(before, figures.STYLE)
    assert {name for name in found if found[name] != expected[name]} <= unused


def test_style_keeps_matplotlibs_own_order_of_colours() -> None:
    with plt.style.context(["default", figures.STYLE]):
        used = [mpl.colors.to_rgb(each["color"]) for each in mpl.rcParams["axes.prop_cycle"]]
    assert used == [mpl.colors.to_rgb(each["color"]) for each in mpl.rcParamsDefault["axes.prop_cycle"]]


def test_labels_are_dark_on_a_light_figure_after_a_dark_style() -> None:
    with plt.style.context(["dark_background", figures.STYLE]):
        figure, axes = plt.subplots()
        axes.set(xlabel="x", title="t")
        texts = [axes.xaxis.label, axes.title, axes.text(0, 0, "here"), *axes.get_xticklabels()]
        ink = [sum(mpl.colors.to_rgb(text.get_color())) for text in texts]
        paper = [sum(mpl.colors.to_rgb(each.get_facecolor())) for each in (figure, axes)]
        plt.close(figure)
    assert max(ink) < 1.0 < 2.9 < min(paper)


# Showing and labelling


def test_show_gives_picture_and_data_and_closes(monkeypatch: pytest.MonkeyPatch) -> None:
    shown = []
    monkeypatch.setattr(IPython.display, "display", lambda *args, **kwargs: shown.append((args, kwargs)))
    for _ in range(2):
        figure, axes = plt.subplots()
        axes.plot([0, 1], [2, 3], label="loss")
        axes.set_xticks([0.0625], ["0.0625"])
        expected = figures.data(figure)
        figures.show(figure)
        assert figure.number not in plt.get_fignums()
    (((bundle,), arguments), again) = shown
    assert arguments == {"raw": True, "metadata": {"figure": expected}}
    drawing = bundle["image/svg+xml"]
    assert drawing.startswith("<?xml")
    assert "Verdana" in drawing
    assert ">0.0625<" in drawing, "words are no places"
    places = drawing.split("<svg", 1)[1].split(">", 1)[1].replace(">0.0625<", "")
    assert not re.search(r"\d\.\d{3}", places), "finer than a screen"
    assert bundle["text/plain"] == "<Figure>"
    assert again == ((bundle,), arguments)


@pytest.mark.parametrize(("colour", "expected"), [("heun", figures.WORDS["heun"]), ("black", "black")])
def test_label_takes_the_lines_colour(axes: Any, colour: str, expected: str) -> None:
    figures.label(axes, 1, 2, "SGD", colour)
    (text,) = axes.texts
    assert (text.get_text(), text.xy, text.get_color()) == ("SGD", (1, 2), expected)


def test_a_table_is_one_on_a_page_and_aligned_as_text() -> None:
    table = figures.Table(["h", "ends at"], [["0.1", "**1.50**"], ["0.25", "never"]])
    assert table._repr_markdown_() == "| h | ends at |\n| ---: | --- |\n| 0.1 | **1.50** |\n| 0.25 | never |"
    assert repr(table) == "   h  ends at\n 0.1  1.50\n0.25  never"


def test_the_style_is_matplotlibs() -> None:
    with plt.style.context(figures.STYLE):
        assert plt.rcParams["figure.dpi"] == figures.STYLE["figure.dpi"]


# Colours

# Full dichromacy in linear RGB: Machado, Oliveira and Fernandes, 2009, "A physiologically-based model for simulation of
# color vision deficiency", severity 1.
SIGHT = {
    "trichromat": np.eye(3),
    "protanopia": np.array(
        [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]]
    ),
    "deuteranopia": np.array(
        [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]]
    ),
    "tritanopia": np.array(
        [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]]
    ),
}
TO_XYZ = np.array(
    [[0.4124564, 0.3575761, 0.1804375], [0.2126729, 0.7151522, 0.0721750], [0.0193339, 0.1191920, 0.9503041]]
)
JUST_NOTICEABLE = 2.3
"""Distance in CIE L*a*b* that is just noticed; two colours of the book are at least four times as far apart."""


def linear(colour: str) -> np.ndarray:
    encoded = np.array(mpl.colors.to_rgb(colour))
    return np.where(encoded <= 0.04045, encoded / 12.92, ((encoded + 0.055) / 1.055) ** 2.4)


def lab(rgb: np.ndarray) -> np.ndarray:
    ratio = TO_XYZ @ np.clip(rgb, 0, 1) / TO_XYZ.sum(axis=1)
    x, y, z = np.where(ratio > (6 / 29) ** 3, np.cbrt(ratio), ratio / (3 * (6 / 29) ** 2) + 4 / 29)
    return np.array([116 * y - 16, 500 * (x - y), 200 * (y - z)])


def test_the_distance_is_that_of_cie_lab() -> None:
    np.testing.assert_allclose(lab(linear("white")), [100, 0, 0], atol=1e-3)
    np.testing.assert_allclose(lab(linear("red")), [53.24, 80.09, 67.20], atol=0.02)


@pytest.mark.parametrize("sight", SIGHT)
@pytest.mark.parametrize("pair", list(itertools.combinations(figures.COLOURS, 2)), ids="-".join)
def test_two_methods_have_two_colours_for_every_eye(pair: tuple[str, str], sight: str) -> None:
    left, right = (lab(SIGHT[sight] @ linear(figures.COLOURS[name])) for name in pair)
    assert np.linalg.norm(left - right) >= 4 * JUST_NOTICEABLE


@pytest.mark.parametrize("name", figures.COLOURS)
def test_every_colour_stands_out_from_the_page(name: str) -> None:
    """A contrast of 3 : 1 with white, as WCAG 2.1 asks of graphics and of large or bold text."""
    luminance = TO_XYZ[1] @ linear(figures.COLOURS[name])
    assert 1.05 / (luminance + 0.05) >= 3
