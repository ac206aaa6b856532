"""Chapter 17: the data under its figures, and the tests that hold its sentences."""

import ast
import functools
import json
import re
from typing import Any

import keras
import numpy as np
import pytest
import scipy.optimize
import tensorflow as tf
from threadpoolctl import threadpool_limits

import companion
from tests.book.reading import figure_data, line, markdown, notebook
from tests.kit import ROOT
from tests.kit.cases import wrong
from tests.kit.network import Digits, flat, forward, unflat

CHAPTER = "17"
DECAY = 1e-4
pytestmark = pytest.mark.usefixtures("float64")


class Numpy:
    """The digits with their regularizer in NumPy, and SciPy's way down: what was asked, and where iterations end."""

    def __init__(self) -> None:
        self.net, self.asked, self.iterates, self.ends = Digits(drawn="float64"), [], [], []
        self.iterates.append(self.net.start)
        settings = {"maxiter": 100, "ftol": 0, "gtol": 1e-8}
        with threadpool_limits(1, "blas"):
            scipy.optimize.minimize(
                self.noting, self.net.start, jac=True, method="L-BFGS-B", callback=self.after, options=settings
            )

    def __call__(self, theta: Any, rows: Any = slice(None)) -> tuple[float, Any]:
        loss, gradient = self.net(unflat(theta, self.net.weights), rows)
        kernels = flat([w if w.ndim == 2 else 0 * w for w in unflat(theta, self.net.weights)])
        return loss + DECAY * kernels @ kernels, flat(gradient) + 2 * DECAY * kernels

    def noting(self, theta: Any) -> tuple[float, Any]:
        self.asked.append((theta.copy(), *self(theta)))
        return self.asked[-1][1:]

    def after(self, theta: Any) -> None:
        self.iterates.append(theta.copy())
        self.ends.append(len(self.asked))


@functools.cache
def numpy() -> Numpy:
    return Numpy()


# ---- figures --------------------------------------------------------------------------------------------------------


class Equation:
    """What is left of u'' = -π² sin πx, with derivatives of the network by hand; and the loss by TensorFlow's tape."""

    def __init__(self, seed: int = 2) -> None:
        keras.utils.set_random_seed(seed)
        layers = [*(keras.layers.Dense(20, "tanh") for _ in range(2)), keras.layers.Dense(1)]
        self.shapes = [w.shape for w in keras.Sequential([keras.Input((1,)), *layers]).get_weights()]
        keras.utils.set_random_seed(seed)
        layers = [*(keras.layers.Dense(20, "tanh") for _ in range(2)), keras.layers.Dense(1)]
        self.start = np.concatenate([np.ravel(w) for w in keras.Sequential([keras.Input((1,)), *layers]).get_weights()])
        self.ask = tf.function(self.loss_and_slope)

    def loss_and_slope(self, theta: Any) -> Any:
        x = np.linspace(0, 1, 66)[1:-1, None]
        with tf.GradientTape() as tape:
            tape.watch(theta)
            sizes = [int(np.prod(shape)) for shape in self.shapes]
            pieces = [tf.reshape(p, s) for p, s in zip(tf.split(theta, sizes), self.shapes, strict=True)]
            n, first, second = tf.constant(x), tf.ones_like(x), tf.zeros_like(x)
            for kernel, bias in zip(pieces[::2], pieces[1::2], strict=True):
                n, first, second = n @ kernel + bias, first @ kernel, second @ kernel
                if kernel is not pieces[-2]:  # tanh' = 1 - tanh², tanh'' = -2 tanh tanh'
                    t = tf.tanh(n)
                    second = (1 - t**2) * second - 2 * t * (1 - t**2) * first**2
                    n, first = t, (1 - t**2) * first
            bent = x * (1 - x) * second + 2 * (1 - 2 * x) * first - 2 * n
            loss = tf.reduce_mean((bent + np.pi**2 * np.sin(np.pi * x)) ** 2)
        return loss, tape.gradient(loss, theta)

    def u(self, theta: Any, x: Any) -> Any:
        weights = unflat(theta, [np.zeros(shape) for shape in self.shapes])
        return (x * (1 - x) * forward(weights, x[:, None])[-1][:, 0]).astype(float)


@pytest.mark.claim(
    "With the same 1,000 gradients L-BFGS ends below 10^{-8}, where the best of three Adams stays above 10^{-5}.",
    chapter="17",
)
def test_the_race_on_the_equation() -> None:
    _, axes = figure_data(CHAPTER)[0]
    counts, found = line(axes, "L-BFGS")
    assert counts[-1] == 1000
    assert found[-1] < 1e-8
    for rate in (0.003, 0.01, 0.03):
        assert line(axes, f"Adam, {rate}")[1][-1] > 1e-5
    equation, losses, asked = Equation(), [], []

    def ask(theta: Any) -> tuple[float, Any]:
        asked.append(1)
        loss, slope = equation.ask(tf.constant(theta))
        return float(loss), slope.numpy()

    def after(theta: Any) -> None:
        losses.append((len(asked) + 1, float(equation.ask(tf.constant(theta))[0])))  # the first is asked for twice

    options = {"maxiter": 60, "ftol": 0, "gtol": 0}
    scipy.optimize.minimize(ask, equation.start, jac=True, method="L-BFGS-B", callback=after, options=options)
    spent, expected = np.array(losses).T
    for count in (3, 10, 30, 50):
        at = expected[np.searchsorted(spent, count, "right") - 1]
        assert found[np.flatnonzero(counts >= count)[0] - (counts[np.flatnonzero(counts >= count)[0]] > count)] == (
            pytest.approx(at, rel=0.5)
        )
    np.testing.assert_allclose(found[0], expected[np.searchsorted(spent, counts[0], "right") - 1], rtol=1e-3)


def test_the_networks_after_thirty_gradients() -> None:
    axes, _ = figure_data(CHAPTER)[0]
    x, solution = line(axes, "the solution")
    np.testing.assert_allclose(solution, np.sin(np.pi * x), atol=1e-5)
    assert np.abs(line(axes, "L-BFGS")[1] - solution).max() < 0.02
    for rate in (0.003, 0.01, 0.03):
        equation = Equation()
        weights, optimizer = keras.Variable(equation.start), keras.optimizers.Adam(rate)
        for _ in range(30):
            optimizer.apply([equation.ask(weights.value)[1]], [weights])
        found = line(axes, f"Adam, {rate}")[1]
        np.testing.assert_allclose(found, equation.u(weights.numpy(), x), atol=1e-3)
        assert np.abs(found - solution).max() > 0.05


def test_the_residuals() -> None:
    """The network's, from the curve of u that the figure above has."""
    (axes,) = figure_data(CHAPTER)[1]
    x, of_parabola = line(axes, "parabola")
    asked = np.pi**2 * np.sin(np.pi * x)
    np.testing.assert_allclose(of_parabola, asked - 8, atol=1e-4)
    x, found = line(axes, "L-BFGS")
    u = line(figure_data(CHAPTER)[0][0], "L-BFGS")[1]
    bent = np.diff(u, 2) / (x[1] - x[0]) ** 2
    smooth = np.polyval(np.polyfit(x[1:-1], bent + asked[1:-1], 8), x)  # u is stored to a few digits
    assert np.abs(found - smooth).max() < 0.1
    assert np.abs(found).max() < 1 < 7 < np.abs(of_parabola).max()


@functools.cache
def record() -> list[dict[str, Any]]:
    """What tests/benchmarks/race_on_equation.py wrote."""
    return json.loads((ROOT / "book" / "data" / "equation.json").read_text())["results"]


def test_the_chapter_shows_the_record() -> None:
    codes = [cell.source for cell in notebook(CHAPTER).cells if cell.cell_type == "code"]
    (code,) = (code for code in codes if "\nrecord = {" in code)
    shown = next(node.value for node in ast.parse(code).body if isinstance(node, ast.Assign))
    for row, (seed, pairs) in zip(record(), ast.literal_eval(shown).items(), strict=True):
        assert seed == row["seed"]
        best = min(row["adam"], key=lambda each: each["loss"])
        for pair, run in zip(pairs, (best, row["lbfgs"], row["lbfgs_20"]), strict=True):
            np.testing.assert_allclose(pair, [run["loss"], run["error"]], rtol=0.05)  # two digits


@pytest.mark.claim(
    "From each of the five starts L-BFGS ends with a loss at least a thousand times lower.", chapter="17"
)
def test_every_start_is_won() -> None:
    assert [row["seed"] for row in record()] == [0, 1, 2, 3, 4]
    assert all(row["lbfgs"]["loss"] < 1e-3 * min(run["loss"] for run in row["adam"]) for row in record())


@pytest.mark.claim("Then all five end below 10^{-8}.", chapter="17")
@pytest.mark.parametrize("pairs", ["lbfgs_20", wrong("lbfgs", why="ten pairs: start 3 ends at 3e-8")])
def test_with_twenty_pairs_every_start_gets_there(pairs: str) -> None:
    assert max(row[pairs]["loss"] for row in record()) < 1e-8


def test_two_slopes_lead_to_the_minimum() -> None:
    (axes,) = figure_data(CHAPTER)[2]
    theta, loss = line(axes, "loss")
    np.testing.assert_allclose(loss, theta**2, rtol=1e-5)
    slopes = [np.diff(y)[0] / np.diff(x)[0] for x, y in (line(axes, name) for name in ("asked first", "then here"))]
    np.testing.assert_allclose(slopes, [6, 2], rtol=1e-4)
    (one, to), _ = line(axes, "the jump")
    curvature = (slopes[1] - slopes[0]) / (1 - 3)
    assert one - slopes[1] / curvature == pytest.approx(to, abs=1e-9) == 0


def bfgs(inverse: Any, s: Any, y: Any) -> Any:
    """The update of Broyden, Fletcher, Goldfarb and Shanno, as Nocedal and Wright have it (6.17)."""
    left = np.eye(2) - np.outer(s, y) / (s @ y)
    return left @ inverse @ left.T + np.outer(s, s) / (s @ y)


def test_what_one_pair_does_to_the_direction_and_the_next_one_to_that_pair() -> None:
    (axes,) = figure_data(CHAPTER)[3]
    first, slope = np.array([0.0, 1.0]), np.array([1.0, 30.0])
    learned = bfgs(np.eye(2), first, slope * first)
    for name, inverse in (("H is the identity", np.eye(2)), ("H after the pair", learned)):
        way = np.diff(line(axes, name))[:, 0]
        direction = -inverse @ slope
        np.testing.assert_allclose(way / np.linalg.norm(way), direction / np.linalg.norm(direction), atol=1e-5)
    np.testing.assert_allclose(learned @ slope, [1, 1])
    angle = np.array([1.0, 1.0])
    spoilt = bfgs(learned, angle, np.array([2.0, 30.0]) * angle)
    (said,) = re.findall(r"`\((-[\d.]+), ([\d.]+)\)`, no longer into", markdown(CHAPTER))
    np.testing.assert_allclose(spoilt @ (30 * first), [float(each) for each in said], atol=5e-3)


def test_both_methods_in_the_ravine() -> None:
    """Gradient descent in closed form; L-BFGS ends far closer after as many questions."""
    (axes,) = figure_data(CHAPTER)[4]
    descent, found = (np.stack(line(axes, name)) for name in ("gradient descent", "L-BFGS"))
    steps = np.arange(descent.shape[1])
    factors = 1 - 2 / 31 * np.array([[1.0], [30.0]])
    np.testing.assert_allclose(descent, np.array([[3.0], [0.5]]) * factors**steps, rtol=1e-4)
    assert found.shape == descent.shape
    assert np.linalg.norm(found[:, -1]) < 1e-3 < 1 < np.linalg.norm(descent[:, -1])


def test_adam_begins_where_keras_takes_it() -> None:
    _, axes = figure_data(CHAPTER)[0]
    equation = Equation()
    weights = keras.Variable(equation.start)
    optimizer = keras.optimizers.Adam(0.01)
    losses = []
    for _ in range(10):
        loss, slope = equation.ask(weights.value)
        losses.append(float(loss))
        optimizer.apply([slope], [weights])
    counts, found = line(axes, "Adam, 0.01")
    for count, value in zip(counts[counts <= 10].astype(int), found, strict=False):
        assert value == pytest.approx(losses[count - 1], rel=1e-4)


def test_the_line_search() -> None:
    (axes,) = figure_data(CHAPTER)[5]
    digits = numpy()
    per_iteration = np.diff([1, *digits.ends])
    k = int(np.argmax(per_iteration > 1))
    first = digits.asked[digits.ends[k - 1] :][0][0] - digits.iterates[k]
    t, along = line(axes, "loss along the line")
    np.testing.assert_allclose(along, [digits(digits.iterates[k] + each * first)[0] for each in t], rtol=1e-4)
    (start, one, two) = (line(axes, name) for name in ("start", "1", "2"))
    assert one[0][0] == 1
    assert two[1][0] < min(start[1][0], one[1][0])
    for name, at in (("start", start), ("1", one), ("2", two)):
        x, y = line(axes, f"slope at {name}")
        rise = (np.interp(at[0][0] + 0.03, t, along) - np.interp(at[0][0] - 0.03, t, along)) / 0.06
        assert (y[1] - y[0]) / (x[1] - x[0]) == pytest.approx(rise, abs=3e-3)


def test_what_was_measured_of_the_curvature() -> None:
    (axes,) = figure_data(CHAPTER)[6]
    for name in ("one batch", "fresh batches"):
        middle, heights = line(axes, name)
        assert 195 <= heights.sum() <= 200
        assert np.average(middle, weights=heights) == pytest.approx(1, abs=0.3)


def test_the_runs_on_minibatches() -> None:
    (axes,) = figure_data(CHAPTER)[7]
    digits = numpy()
    clear = [digits(theta)[0] for theta in digits.iterates]
    passes, full = line(axes, "L-BFGS, all data")
    expected = [clear[np.searchsorted(digits.ends, count, "right")] for count in passes.astype(int)]
    np.testing.assert_allclose(full[:60], expected[:60], rtol=1e-2)
    adam, fresh = (line(axes, name)[1] for name in ("Adam, minibatches", "L-BFGS, fresh batches"))
    assert (adam[:40] < full[:40]).all()
    assert full[-1] < adam[-1] < fresh[-1] / 2


# ---- sentences ------------------------------------------------------------------------------------------------------


def test_what_sam_sees() -> None:
    """Two dips of one depth; within ρ of the bottom the loss rises by what the bell falls over ρ."""
    (axes,) = figure_data(CHAPTER)[8]
    theta, loss = line(axes, "loss")
    highest = line(axes, "highest within ρ")[1]
    for bottom, width, other in ((-1.0, 0.15, 0.6), (1.0, 0.6, 0.15)):
        k = np.argmin(np.abs(theta - bottom))
        assert loss[k] == pytest.approx(0.2, abs=0.01)
        towards = np.exp(-((2 / other) ** 2) / 2), np.exp(-((1.7 / other) ** 2) / 2), np.exp(-((2.3 / other) ** 2) / 2)
        worst = max(1 - 0.8 * (np.exp(-((0.3 / width) ** 2) / 2) + far) for far in towards)
        assert highest[k] == pytest.approx(worst, abs=1e-4)
    assert np.all(highest >= loss)


@pytest.mark.claim("companion.minimize is SciPy's method, asked through the oracle.", chapter="17")
def test_the_iterates_are_those_of_scipy() -> None:
    digits = numpy()
    decay = keras.regularizers.L2(DECAY)
    layers = [keras.layers.Dense(n, a, kernel_regularizer=decay) for n, a in ((32, "tanh"), (10, None))]
    model = keras.Sequential([keras.Input((64,)), *layers])
    model.compile(loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    model.set_weights(digits.net.weights)
    found = companion.minimize(model, digits.net.x, digits.net.y, max_gradients=30, verbose=0).history["loss"]
    np.testing.assert_allclose(found, [digits(theta)[0] for theta in digits.iterates[1 : len(found) + 1]], rtol=1e-6)


@pytest.mark.claim("So only for the newest pair is H y = s sure to be exact.", chapter="17")
def test_which_pairs_the_inverse_fits() -> None:
    digits = numpy()
    points = digits.iterates[-11:]
    steps = np.diff(points, axis=0)
    changes = np.diff([digits(theta)[1] for theta in points], axis=0)
    inverse = scipy.optimize.LbfgsInvHessProduct(steps, changes)
    far = [np.linalg.norm(inverse.matvec(y) - s) / np.linalg.norm(s) for s, y in zip(steps, changes, strict=True)]
    assert far[-1] < 1e-9
    assert min(far[:-1]) > 1e-3


@pytest.mark.claim("More than nine of ten line searches are over after one question", chapter="17")
def test_most_line_searches_ask_once() -> None:
    assert np.mean(np.diff([1, *numpy().ends]) == 1) > 0.9


@pytest.mark.claim(
    "With fresh batches the spread of a measured curvature is larger than the curvature itself.", chapter="17"
)
def test_curvature_from_fresh_batches_is_noise() -> None:
    digits, generator = numpy(), np.random.default_rng(1)
    here, step = digits.iterates[60], digits.iterates[61] - digits.iterates[60]

    def curvature(first: Any, second: Any) -> float:
        return (digits(here + step, second)[1] - digits(here, first)[1]) @ step / (step @ step)

    draw = lambda: generator.choice(1440, 64, replace=False)  # noqa: E731
    exact, batches = curvature(slice(None), slice(None)), [(draw(), draw()) for _ in range(100)]
    fresh = np.array([curvature(*both) for both in batches]) / exact
    one = np.array([curvature(first, first) for first, _ in batches]) / exact
    assert fresh.std() > 1 > 2 * one.std()
    assert np.mean(fresh < 0) > 0.1
    assert (one > 0).mean() > 0.95


@pytest.mark.claim("With dropout, BatchNorm or random augmentation it refuses to start", chapter="17")
@pytest.mark.parametrize("layer", [keras.layers.Dropout, keras.layers.BatchNormalization, keras.layers.GaussianNoise])
def test_where_the_loss_is_no_function_it_refuses(layer: Any) -> None:
    model = keras.Sequential([keras.Input((3,)), layer(**({} if "Batch" in layer.__name__ else _rate(layer)))])
    model.add(keras.layers.Dense(1))
    model.compile(loss="mse")
    before = model.get_weights()
    with pytest.raises(ValueError, match="must be a function of the weights"):
        companion.minimize(model, np.ones((4, 3)), np.ones((4, 1)), verbose=0)
    assert all(np.array_equal(*pair) for pair in zip(before, model.get_weights(), strict=True))


def _rate(layer: Any) -> dict[str, float]:
    return {"stddev" if "Noise" in layer.__name__ else "rate": 0.5}


@pytest.mark.claim(
    "Where labels are wrong, SAM with ρ = 1 finds weights that generalise better here; where they are right, it "
    "changes little.",
    chapter="17",
)
def test_the_table_of_sam() -> None:
    texts = [
        out.get("data", {}).get("text/plain", "") for cell in notebook(CHAPTER).cells for out in cell.get("outputs", [])
    ]
    (table,) = (text for text in texts if "SAM around Adam" in text)
    right, spoilt = ([float(each) for each in re.findall(r"\d\.\d+", row)] for row in table.splitlines()[1:])
    assert abs(right[-1] - right[0]) <= 0.02
    assert spoilt[-1] > max(spoilt[:-1]) + 0.05
