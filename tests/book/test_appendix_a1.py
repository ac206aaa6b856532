"""Appendix A1: the data under its figure and its tables, and the tests that hold its sentences."""

import functools
import json
import statistics
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import tensorflow as tf
from scipy import stats

import companion
from companion.word_pairs import read_windows
from tests.book.reading import figure_data, notebook
from tests.kit import ROOT
from tests.kit.cases import wrong

CHAPTER = "a1"


def cell_of(start: str) -> dict[str, Any]:
    """What the first paragraph of a cell defines."""
    (cell,) = [cell for cell in notebook(CHAPTER).cells if start in cell.source]
    names: dict[str, Any] = {}
    exec(cell.source.partition("\n\n")[0], names)
    return names


@functools.cache
def profile() -> dict[str, Any]:
    """What tests/benchmarks/profile_of_a_pass.py wrote."""
    return json.loads((ROOT / "book" / "data" / "word_profile.json").read_text())


def microseconds(name: str, clock: str = "seconds") -> float:
    return round(statistics.median(profile()[clock][name]) / profile()["pairs"] * 1e6, 2)


def over_windows(name: str, clock: str = "seconds") -> np.ndarray:
    """The quartiles of a time over that of `fit` on windows in the same turn."""
    ratio = np.divide(profile()[clock][name], profile()[clock]["windows: fit"])
    return np.quantile(ratio, [0.25, 0.75])


def test_table_of_the_profile_is_the_record() -> None:
    cell = cell_of("microseconds = {")
    for layout in ("pairs", "windows"):
        assert cell["microseconds"][layout] == [microseconds(f"{layout}: {step}") for step in cell["steps"]]
    assert cell["gensim"] == microseconds("gensim, one worker")
    for shown, *how in (
        ("gensim, processor time", "gensim, one worker", "processor_seconds"),
        ("windows, autodiff", "windows: fit, autodiff"),
    ):
        np.testing.assert_allclose(cell["over_windows"][shown], over_windows(*how), atol=5.1e-3)
    for shown, name in (("pairs", "pairs: fit"), ("windows", "windows: fit"), ("gensim", "gensim, one worker")):
        assert cell["of_processor"][shown] == microseconds(name, "processor_seconds")
    assert abs(profile()["words_of_text"] - cell["text_of_profile"]) < 1500
    assert all(len(times) == profile()["rounds"] == cell["turns"] for times in profile()["seconds"].values())


@functools.cache
def similarity() -> dict[str, Any]:
    """What tests/benchmarks/quality_of_vectors.py wrote."""
    return json.loads((ROOT / "book" / "data" / "word_similarity.json").read_text())


def correlations(name: str) -> np.ndarray:
    return np.array([stats.spearmanr(similarity()["people"], row).statistic for row in similarity()["cosines"][name]])


@pytest.mark.parametrize(("shown", "name"), [("SkipGram", "companion"), ("gensim", "gensim")])
def test_table_of_correlations_is_the_record(shown: str, name: str) -> None:
    cell = cell_of("correlation = {")
    assert cell["known"] == len(similarity()["pairs"]) == len(similarity()["people"])
    np.testing.assert_allclose(cell["correlation"][shown], correlations(name), atol=5.1e-4)


def test_bars_of_rows_add_up() -> None:
    """A pair fetches seven rows, and the grid has a row for each centre and a column for each candidate."""
    (axes,), (grid,) = (figure_data(CHAPTER)[n] for n in (0, 1))
    pairs = int(np.array(grid["images"][0])[:, :32].sum())
    widths = [width for width, _ in axes["bars"]]
    assert widths == [pairs, 22, pairs, 32, 5 * pairs, 16]  # centres, neighbours, random words; by pair, at once


def test_figure_of_windows_is_a_band() -> None:
    """In the text ones around each centre, in one piece and as far as five; beside it the noise of that many pairs."""
    (axes,) = figure_data(CHAPTER)[1]
    (image,) = (np.array(values) for values in axes["images"])
    assert image.shape == (22, 48)
    for centre, row in enumerate(image[:, :32], 5):
        near = np.flatnonzero(row)
        assert set(row) <= {0, 1}
        assert row[centre] == 0
        reach = max(centre - near.min(initial=centre), near.max(initial=centre) - centre)
        assert 1 <= reach <= 5
        assert list(near) == [c for c in range(centre - reach, centre + reach + 1) if c != centre]
    pairs = image[:, :32].sum(axis=1, keepdims=True)
    missing = pairs - image[:, 32:] / (5 / 16)
    np.testing.assert_allclose(missing, np.round(missing), atol=1e-4)
    assert set(np.round(missing).ravel()) <= {0, 1}


def test_profile_says_what_the_text_makes_of_it() -> None:
    """The story needs this of a new record: windows keep up with gensim, pairs do not, and rows take half the step."""
    gensim = microseconds("gensim, one worker")
    assert microseconds("windows: fit") < gensim < microseconds("pairs: fit") / 2
    least, most = cell_of("microseconds = {")["over_windows"]["windows, autodiff"]
    assert over_windows("gensim, one worker")[0] > 1 > least
    assert most < 1.1
    assert microseconds("pairs: rows") > 0.6 * microseconds("pairs: step")
    assert 0.4 < microseconds("windows: rows") / microseconds("windows: step") < 0.6
    assert 1.15 < microseconds("windows: fit") / microseconds("windows: step") < 1.25


@pytest.mark.claim("In processor time, all threads added up, windows and gensim are level", chapter="a1")
@pytest.mark.parametrize("clock", ["processor_seconds", wrong("seconds", why="`fit` uses both cores")])
def test_windows_and_gensim_cost_the_same_work(clock: str) -> None:
    """No quarter of the turns decides: the middle half has 1 in it."""
    least, most = over_windows("gensim, one worker", clock)
    assert least < 1 < most


def test_interval_of_the_difference_over_other_pairs_is_the_record() -> None:
    cell, random = cell_of("correlation = {"), np.random.default_rng(0)
    people, cosines = np.array(similarity()["people"]), {k: np.array(v) for k, v in similarity()["cosines"].items()}
    differences = []
    for _ in range(1000):
        drawn = random.integers(len(people), size=len(people))
        means = [
            np.mean([stats.spearmanr(people[drawn], row[drawn]).statistic for row in cosines[name]])
            for name in ("companion", "gensim")
        ]
        differences.append(means[0] - means[1])
    np.testing.assert_allclose(cell["other_pairs"], np.quantile(differences, [0.025, 0.975]), atol=0.02)


def softplus(score: np.ndarray) -> np.ndarray:
    return np.log1p(np.exp(score))


TEXT = np.array([[3, 1, 2, 1, 0, 4], [0, 0, 1, 2, 3, 2]], "int32")
LEFT, RIGHT = np.array([[1, 2], [0, 1]], "int32"), np.array([[2, 1], [1, 2]], "int32")
PAIRS = [  # piece, centre, neighbour, read off the text by hand: two centres, in places two and three of each piece
    *[(0, 2, 1), (0, 2, 1), (0, 2, 0), (0, 1, 1), (0, 1, 2), (0, 1, 0)],
    *[(1, 1, 2), (1, 2, 1), (1, 2, 3), (1, 2, 2)],
]


def all_weights_one(centres: Any, candidates: Any, near: Any, weight: Any) -> Any:
    return centres, candidates, near, tf.ones_like(weight)


@pytest.mark.claim(
    "A batch in windows has the same gradient as all its weighted pairs, added up.",
    chapter="a1",
)
@pytest.mark.parametrize(
    "counted", [lambda *read: read, wrong(all_weights_one, why="as if every candidate were a pair")]
)
def test_windows_have_the_gradient_of_their_pairs(counted: Callable[..., Any]) -> None:
    drawn = np.array([[4, 1, 3], [2, 0, 0]], "int32")
    model = companion.SkipGram(5, 3, negatives=2, dtype="float64")
    u, v = np.random.default_rng(0).normal(size=(2, 5, 3))
    model.set_weights([u, v])
    du, dv = np.zeros((2, 5, 3))
    for piece, centre, neighbour in PAIRS:
        for word, y, weight in [(neighbour, 1, 1), *((n, 0, 2 / 3 * (n != neighbour)) for n in drawn[piece])]:
            error = weight * (1 / (1 + np.exp(-u[centre] @ v[word])) - y)
            du[centre] += error * v[word]
            dv[word] += error * u[centre]
    read = read_windows(*map(tf.constant, (TEXT, LEFT, RIGHT, drawn)), 2, "float64")
    _, gradients = model.closed_form(*counted(*read))
    for found, expected in zip(gradients, (du, dv), strict=True):
        np.testing.assert_allclose(tf.convert_to_tensor(found), expected, rtol=1e-11, atol=1e-13)


@pytest.mark.claim(
    "On average the loss is the same as with five random words for each pair.",
    chapter="a1",
)
@pytest.mark.parametrize("count", [5, wrong(1, why="each shared word counts once")])
def test_expected_loss_is_that_of_five_words(count: int) -> None:
    """Every word that one place may draw, by its probability, against the sum over pairs; equal ones are left out."""
    noise = np.array([0.4, 0.3, 0.15, 0.1, 0.05])
    u, v = np.random.default_rng(0).normal(size=(2, 5, 3))
    model = companion.SkipGram(5, 3, negatives=count, dtype="float64")
    model.set_weights([u, v])
    found = 0.0
    for word, share in enumerate(noise):
        drawn = np.full((2, 1), word, "int32")
        read = read_windows(*map(tf.constant, (TEXT, LEFT, RIGHT, drawn)), count, "float64")
        found += share * float(model.closed_form(*read)[0])
    expected = 0.0
    for _, centre, neighbour in PAIRS:
        negatives = noise * softplus(v @ u[centre])
        expected += softplus(-v[neighbour] @ u[centre]) + 5 * (negatives.sum() - negatives[neighbour])
    assert found == pytest.approx(expected, rel=1e-12)


@pytest.mark.claim("`SkipGram`, trained on windows, does not rank these 46 pairs worse than gensim does.", chapter="a1")
@pytest.mark.parametrize("sign", [1, wrong(-1, why="the other way round they would be")])
def test_vectors_are_not_worse(sign: int) -> None:
    """Welch's interval of the difference over seeds: not below zero by more than a hundredth."""
    found = stats.ttest_ind(correlations("companion"), correlations("gensim"), equal_var=False).confidence_interval()
    assert sign * (found.low if sign > 0 else found.high) > -0.01
