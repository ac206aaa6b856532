"""Chapter 18: the data under its figures, computed once more in NumPy, and the tests that hold its sentences."""

import re
import warnings
from collections.abc import Sequence
from typing import Any

import keras
import numpy as np
import pytest

import companion
from companion import datasets
from companion.exercises import chapter_18
from tests.book.reading import figure_data, line, markdown, notebook
from tests.kit.cases import wrong
from tests.kit.network import softmax

CHAPTER = "18"
DATA = datasets.digits("float64")
X, Y = DATA.x_train, DATA.y_train
Weights = list[np.ndarray]


def initial() -> Weights:
    """The weights from which the chapter's runs begin."""
    keras.utils.set_random_seed(1)
    sizes = {"hidden_1": 32, "hidden_2": 32, "top": 10}
    layers = [keras.layers.Dense(units, name=name, dtype="float64") for name, units in sizes.items()]
    model = keras.Sequential([keras.Input((64,)), *layers], name="network")
    return [weight.astype("float64") for weight in model.get_weights()]


def gradient(weights: Weights, x: np.ndarray, y: np.ndarray) -> tuple[float, Weights]:
    """The loss of the network of ReLUs and its gradient, by hand."""
    inputs = [x]
    for kernel, bias in zip(weights[:-2:2], weights[1:-2:2], strict=True):
        inputs.append(np.maximum(inputs[-1] @ kernel + bias, 0))
    share, rows = softmax(inputs[-1] @ weights[-2] + weights[-1]), np.arange(len(y))
    error, found = share.copy(), list[np.ndarray]()
    error[rows, y] -= 1
    error /= len(y)
    for kernel, into in zip(weights[-2::-2], inputs[::-1], strict=True):
        found = [into.T @ error, error.sum(axis=0), *found]
        error = (error @ kernel.T) * (into > 0)
    return float(-np.log(share[rows, y]).mean()), found


def test_names_of_the_runs_are_those_that_exercise_1_takes() -> None:
    (source,) = (cell.source for cell in notebook(CHAPTER).cells if cell.source.startswith("runs = {"))
    assert re.findall(r'^    "(.+)": run\(', source, re.MULTILINE) == ["healthy", *chapter_18._NAMES]


def squared(values: Sequence[np.ndarray]) -> float:
    return float(sum((value**2).sum() for value in values))


def noise(weights: Weights, batch: np.ndarray, x: np.ndarray, y: np.ndarray) -> tuple[float, float]:
    """What four parts of a batch say of the trace and of the squared norm of the true gradient."""
    parts, n = np.array_split(batch, 4), len(batch)
    each = [gradient(weights, x[part], y[part])[1] for part in parts]
    mean = [np.mean(tensors, axis=0) for tensors in zip(*each, strict=True)]
    small, big = np.mean([squared(part) for part in each]), squared(mean)
    trace = (small - big) / (4 / n - 1 / n)
    return float(trace), float(big - trace / n)


def drawn(figure: int, axes: int, label: str) -> np.ndarray:
    return line(figure_data(CHAPTER)[figure][axes], label)[1]


RUNS = (
    *("healthy", "rate too high", "rate too low", "decay too strong", "dead ReLUs", "vanishing gradients"),
    *("exploding gradients", "frozen by mistake", "float16 underflow", "wrong labels", "not shuffled"),
)


# ---- figures --------------------------------------------------------------------------------------------------------


def test_the_run_that_is_not_shuffled_is_numpys() -> None:
    """Its batches are known: loss and three dials, over the first two epochs."""
    order = np.argsort(Y, kind="stable")
    x, y, weights = X[order], Y[order], initial()
    for epoch in range(2):
        losses, norms, ratios, found = [], [], [], []
        for start in range(0, len(x), 64):
            batch = np.arange(start, min(start + 64, len(x)))
            loss, slopes = gradient(weights, x[batch], y[batch])
            losses.append((loss, len(batch)))
            norms.append(np.sqrt(squared(slopes)))
            found.append(noise(weights, batch, x, y))
            ratios.append(np.sqrt(squared([0.1 * slope for slope in slopes]) / squared(weights)))
            weights = [weight - 0.1 * slope for weight, slope in zip(weights, slopes, strict=True)]
        expected = {
            (1, 0): sum(loss * size for loss, size in losses) / len(x),
            (2, 0): np.mean(norms),
            (2, 1): np.mean(ratios),
            (2, 2): np.divide(*np.mean(found, axis=0)),
        }
        for place, value in expected.items():
            assert drawn(*place, "not shuffled")[epoch] == pytest.approx(value, rel=1e-4), place


def test_rate_times_sharpness_at_the_start() -> None:
    """By power iteration on differences of gradients."""
    weights, small = initial(), 1e-6
    vector = [np.random.default_rng(0).normal(size=weight.shape) for weight in weights]
    for _ in range(150):
        length = np.sqrt(squared(vector))
        ends = []
        for sign in (1, -1):
            end = [weight + sign * small * part / length for weight, part in zip(weights, vector, strict=True)]
            ends.append(gradient(end, X, Y)[1])
        vector = [(there - back) / (2 * small) for there, back in zip(*ends, strict=True)]
    assert drawn(2, 3, "healthy")[0] == pytest.approx(0.1 * np.sqrt(squared(vector)), rel=0.01)
    assert drawn(2, 3, "rate too high")[0] == pytest.approx(15 * drawn(2, 3, "healthy")[0], rel=1e-5)


def steps_to(level: float, batch: int, rate: float, seed: int) -> float:
    weights, generator = initial(), np.random.default_rng(seed)
    for count in range(1, 251):
        rows = generator.integers(0, len(X), batch)
        slopes = gradient(weights, X[rows], Y[rows])[1]
        rate = float(np.float32(rate))
        weights = [weight - rate * slope for weight, slope in zip(weights, slopes, strict=True)]
        if count % 2 == 0 and gradient(weights, X, Y)[0] < level:
            return count
    return np.inf


@pytest.mark.parametrize(("place", "rate"), [(3, 0.4), (6, 0.5)])
def test_steps_that_a_batch_needs_are_numpys(place: int, rate: float) -> None:
    sizes, needed = line(figure_data(CHAPTER)[5][0], "steps needed")
    assert needed[place] == pytest.approx(np.mean([steps_to(0.4, int(sizes[place]), rate, seed) for seed in range(6)]))


def test_the_answers_of_four_parts() -> None:
    """Two batches with the same mean; their noise scales solve two equations, for parts of 16 and for all 64."""
    table = next(out["data"]["text/plain"] for cell in notebook(CHAPTER).cells for out in cell.get("outputs", [])
                 if "noise in it" in out.get("data", {}).get("text/plain", ""))  # fmt: skip
    for axes, row in zip(figure_data(CHAPTER)[4], table.splitlines()[1:], strict=True):
        parts = np.array([line(axes, f"part {n}")[0][1] for n in range(1, 5)])
        assert line(axes, "mean")[0][1] == parts.mean() == 2
        signal, trace = np.linalg.solve([[1, 1 / 16], [1, 1 / 64]], [np.mean(parts**2), 4])
        assert float(row.split()[-1]) == pytest.approx(trace / signal, rel=5e-3)


def test_every_run_is_drawn_in_both_figures() -> None:
    for label in RUNS:
        assert len(drawn(1, 0, label)) == 8
        assert [len(drawn(2, axes, label)) for axes in range(4)] == [8, 8, 8, 2]


# ---- sentences ------------------------------------------------------------------------------------------------------


@pytest.mark.claim("All but *rate too high* and *exploding gradients* begin near the healthy run's loss.", chapter="18")
@pytest.mark.claim(
    "Seven of the ten end close to $\\ln 10$, 2.3, the loss of a network that knows nothing.", chapter="18"
)
def test_the_losses_begin_alike() -> None:
    healthy, *others = (drawn(1, 0, label) for label in RUNS)
    apart = {name for name, run in zip(RUNS[1:], others, strict=True) if abs(run[0] / healthy[0] - 1) > 1 / 8}
    assert apart == {"rate too high", "exploding gradients"}
    assert sum(2.2 < run[-1] < 2.4 for run in others) == 7  # where a network guesses


@pytest.mark.claim(
    "At the rate that is too high a step of the first epoch moves the weights by a fifth of their length", chapter="18"
)
def test_how_far_steps_go() -> None:
    assert drawn(2, 1, "rate too high")[0] == pytest.approx(0.2, rel=0.1)
    assert drawn(2, 1, "rate too low")[0] < 1e-4
    assert 0.004 < drawn(2, 1, "healthy").min() < drawn(2, 1, "healthy").max() < 0.011
    decay = drawn(2, 1, "decay too strong")[2:]
    assert (np.diff(decay) > 0).all()
    assert decay[-1] > 5 * drawn(2, 1, "healthy").max()


@pytest.mark.claim("The first cell of this page needs fewer than ten products.", chapter="18")
@pytest.mark.parametrize("products", [9, wrong(3, why="it has to look for the direction")])
def test_how_many_products_sharpness_asks_for(products: int) -> None:
    keras.utils.set_random_seed(1)
    layers = [keras.Input((64,)), keras.layers.Dense(32, "relu"), keras.layers.Dense(10, "softmax")]
    model = keras.Sequential(layers)
    model.compile("sgd", "sparse_categorical_crossentropy")
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        companion.sharpness(model, X, Y, tolerance=1e-3, max_products=products)
    assert not any("sharpness has found" in str(each.message) for each in said)


@pytest.mark.claim(
    "A hidden layer whose gradient norm is exactly zero passes nothing back: its units are dead.", chapter="18"
)
@pytest.mark.parametrize("bias", [-3.0, wrong(0.0, why="the units are alive")])
def test_dead_units_have_no_gradient(bias: float) -> None:
    weights = initial()
    weights[1], weights[3] = np.full(32, bias), np.full(32, bias)
    slopes = gradient(weights, X, Y)[1]
    hidden = X @ weights[0] + weights[1]
    assert (np.maximum(hidden, 0) @ weights[2] + weights[3]).max() < 0  # no unit of the second layer is ever on
    assert squared(slopes[:4]) == 0 < squared(slopes[4:])


@pytest.mark.claim(
    "Its first large steps have pushed more than half of its ReLUs below zero on every image: they are dead.",
    chapter="18",
)
@pytest.mark.parametrize("rate", [1.5, wrong(0.1, why="the healthy rate")])
@pytest.mark.parametrize("seed", range(3))
def test_a_rate_that_is_too_high_kills_units(rate: float, seed: int) -> None:
    weights, generator = initial(), np.random.default_rng(seed)
    for batch in (batch for _ in range(3) for batch in np.array_split(generator.permutation(len(X)), 23)):
        slopes = gradient(weights, X[batch], Y[batch])[1]
        weights = [weight - rate * slope for weight, slope in zip(weights, slopes, strict=True)]
    first = np.maximum(X @ weights[0] + weights[1], 0)
    second = np.maximum(first @ weights[2] + weights[3], 0)
    assert sum((layer.max(axis=0) == 0).sum() for layer in (first, second)) > 64 / 2


@pytest.mark.claim(
    "In the network of sigmoids the gradient norm falls to less than a third at each of the first five steps down.",
    chapter="18",
)
def test_gradients_vanish_layer_by_layer() -> None:
    norms = line(figure_data(CHAPTER)[3][0], "vanishing gradients")[1]
    assert len(norms) == 7
    assert (norms[1:6] < norms[:5] / 3).all()
    flat = line(figure_data(CHAPTER)[3][0], "healthy")[1]
    assert flat.max() < 2 * flat.min()


@pytest.mark.claim(
    "Over 300 random batches the dial is within a few percent of the exact noise over the exact signal.",
    chapter="18",
)
def test_the_noise_scale_is_the_exact_one() -> None:
    """At the first weights; the gradient of each example is a product of what a layer gets and what it gets back."""
    weights = initial()
    whole, each = gradient(weights, X, Y)[1], 0.0
    for row in range(len(X)):
        each += squared(gradient(weights, X[row : row + 1], Y[row : row + 1])[1]) / len(X)
    exact = (each - squared(whole)) / squared(whole)
    rows = np.random.default_rng(0).integers(0, len(X), (300, 64))
    found = np.mean([noise(weights, batch, X, Y) for batch in rows], axis=0)
    assert found[0] / found[1] == pytest.approx(exact, rel=0.05)
    printed = "".join(out.get("text", "") for cell in notebook(CHAPTER).cells for out in cell.get("outputs", []))
    said, exactly = (
        float(re.findall(pattern, printed)[0]) for pattern in (r"the dial says: (\d+)", r"exactly.* = (\d+)")
    )
    assert said == pytest.approx(exactly, rel=0.05)


@pytest.mark.claim(
    "Up to half the noise scale each doubling saves about a quarter of the steps; beyond the noise scale, less than a "
    "tenth.",
    chapter="18",
)
@pytest.mark.claim(
    "at an eighth of the noise scale it expects more than three times the steps that were needed.", chapter="18"
)
@pytest.mark.claim("(With a noise scale five times smaller it would fit.)", chapter="18")
def test_where_doubling_stops_paying() -> None:
    sizes, needed = line(figure_data(CHAPTER)[5][0], "steps needed")
    np.testing.assert_allclose(sizes / sizes[3], [1 / 8, 1 / 4, 1 / 2, 1, 2, 4, 8], rtol=0.02)
    assert sizes[3] == round(np.mean(drawn(2, 2, "healthy")))
    saved = 1 - needed[1:] / needed[:-1]
    assert (abs(saved[:2] - 0.25) < 0.05).all()
    assert (saved[3:] < 0.1).all()
    assert (np.diff(sizes * needed) > 0).all()  # in examples, the smallest is the cheapest

    def theory(scale: float) -> np.ndarray:
        return needed[-1] * (1 + scale / sizes) / (1 + scale / sizes[-1])

    assert theory(sizes[3])[0] > 3 * needed[0]
    np.testing.assert_allclose(theory(sizes[3] / 5), needed, rtol=0.08)
    at, dashed = line(figure_data(CHAPTER)[5][0], "theory")
    assert dashed[0] == pytest.approx(needed[-1] * (1 + sizes[3] / at[0]) / (1 + sizes[3] / sizes[-1]), rel=1e-4)


def first_line(name: str) -> int | None:
    """The line of the chapter's list that fits a run first; 5 is what its layers have to say."""
    norm, ratio, scale, steep = (drawn(2, axes, name) for axes in range(4))
    if np.isnan(norm).all():  # zero, which a logarithmic axis leaves out
        return 1
    if steep.max() > 2:
        return 2
    if ratio.max() >= 0.1 or ratio.max() < 1e-4:
        return 3
    if scale.max() <= 6:
        return 4
    return None


def test_the_picture_is_the_list() -> None:
    """Line by line the same dial and the same limit; the three rows of line 5 are one box."""
    (source,) = (cell.source for cell in notebook(CHAPTER).cells if cell.source.startswith("# @title Draw the list"))
    boxes = re.findall(r'^    "(\d)  (.+?):(.+?)":', source, re.MULTILINE)
    rows = re.findall(r"^\| (\d) \| (.*?) \| (.*?) \|", markdown(CHAPTER), re.MULTILINE)
    rows = [row for row in rows if row[0] != "5"] + [next(row for row in rows if row[0] == "5")]
    assert len(boxes) == len(rows) == 7
    for (number, dial, sign), (line_, look, limit) in zip(boxes, sorted(rows, key=lambda row: row[0]), strict=True):
        assert number == line_
        assert dial.lower().replace("a layer", "each layer") in look
        assert set(re.findall(r"[\d.]*\d", sign)) == set(re.findall(r"[\d.]*\d", limit))


@pytest.mark.claim("The list finds all ten.", chapter="18")
def test_the_list_finds_every_disease() -> None:
    lines = {name: first_line(name) for name in RUNS}
    said = {"float16 underflow": 1, "rate too high": 2, "exploding gradients": 2, "rate too low": 3}
    said |= {"decay too strong": 3, "not shuffled": 4}
    assert lines == dict.fromkeys(RUNS) | said
    norms = line(figure_data(CHAPTER)[3][0], "vanishing gradients")[1]
    assert norms[1] < norms[0] / 3  # line 5, as are the zeros and the missing layers that the chapter prints
    printed = "".join(out.get("text", "") for cell in notebook(CHAPTER).cells for out in cell.get("outputs", []))
    assert "dead ReLUs: top 0.1, hidden_2 0, hidden_1 0" in printed
    assert re.search(r"frozen by mistake: top 0\.\d\n", printed)
    labels = drawn(2, 2, "wrong labels")
    assert labels.min() > 5 * 64  # line 6
    assert drawn(1, 0, "wrong labels")[-1] > 0.9 * drawn(1, 0, "wrong labels")[0]
    table = next(out["data"]["text/plain"] for cell in notebook(CHAPTER).cells for out in cell.get("outputs", [])
                 if "not shuffled (4)" in out.get("data", {}).get("text/plain", ""))  # fmt: skip
    numbers = {name: re.search(rf"^{name} \((\d)\)", table, re.MULTILINE) for name in RUNS[1:]}
    found = {name: int(match[1]) for name, match in numbers.items() if match}
    five = dict.fromkeys(("dead ReLUs", "vanishing gradients", "frozen by mistake"), 5)
    assert found == said | five | {"wrong labels": 6}


@pytest.mark.claim("Under Adam, without line 2, the list finds eight of the ten.", chapter="18")
def test_what_the_list_finds_under_adam() -> None:
    """From the recorded dials; the run whose batches are known is NumPy's, with Adam's rule from its paper."""
    (table,) = (out["data"]["text/plain"] for cell in notebook(CHAPTER).cells for out in cell.get("outputs", [])
                if "@title Recorded: the same runs" in cell.source)  # fmt: skip
    dials, said = {}, {}
    for name, *pairs, number in (re.split(r" {2,}", row) for row in table.splitlines()[1:]):
        numbers = (pair.replace("∞", "inf").replace("–", "nan").split(" → ") for pair in pairs)
        dials[name], said[name] = np.array([[float(value) for value in pair] for pair in numbers]), number
    assert list(dials) == list(RUNS)
    for name, (norm, ratio, scale) in dials.items():
        if not norm.any():
            found = "1"
        elif ratio.max() >= 0.1 or ratio.max() < 1e-4:
            found = "3"
        elif scale.max() <= 6:
            found = "4"
        else:
            found = "6" if scale.min() > 5 * 64 else "none"
        assert said[name] == found or (said[name] == "5" and found == "none") or name == "dead ReLUs", name
    assert sum(number != "none" for number in said.values()) == 8

    order, weights = np.argsort(Y, kind="stable"), initial()
    moments = [[np.zeros_like(weight) for weight in weights] for _ in range(2)]
    norms, ratios, heard = [], [], []
    for t, batch in enumerate(np.split(order, range(64, len(order), 64)), start=1):
        heard.append(noise(weights, batch, X, Y))
        slopes = gradient(weights, X[batch], Y[batch])[1]
        for at, (beta, powers) in enumerate(((0.9, slopes), (0.999, [slope**2 for slope in slopes]))):
            moments[at] = [beta * old + (1 - beta) * new for old, new in zip(moments[at], powers, strict=True)]
        scale = 0.003 * np.sqrt(1 - 0.999**t) / (1 - 0.9**t)
        step = [scale * m / (np.sqrt(v) + 1e-7) for m, v in zip(*moments, strict=True)]
        norms.append(np.sqrt(squared(slopes)))
        ratios.append(np.sqrt(squared(step) / squared(weights)))
        weights = [weight - part for weight, part in zip(weights, step, strict=True)]
    expected = [np.mean(norms), np.mean(ratios), np.divide(*np.mean(heard, axis=0))]
    np.testing.assert_allclose(dials["not shuffled"][:, 0], expected, rtol=0.02)


@pytest.mark.claim(
    "When a gradient is not finite, weights, slots and counters stay as they were before that update", chapter="18"
)
@pytest.mark.parametrize("checks", [True, wrong(False, why="nobody looks", raises=pytest.fail.Exception)])
def test_a_gradient_that_is_not_finite_moves_nothing(checks: bool) -> None:
    model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(2), keras.layers.Dense(1)])
    model.compile("adam", "mse", jit_compile=False)
    companion.inject(model, check_finite=checks)
    model.train_on_batch(np.ones((2, 2)), np.ones((2, 1)))
    variables: list[Any] = [*model.variables, *model.optimizer.variables]
    before = [variable.numpy() for variable in variables]
    with pytest.raises(ValueError, match="was infinite or NaN at update 2"):
        model.train_on_batch(np.full((2, 2), np.inf), np.ones((2, 1)))
    assert all(np.array_equal(old, new.numpy()) for old, new in zip(before, variables, strict=True))
