"""Chapter 16: the data under its figures, and the tests that hold its sentences."""

from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import ops

import companion
from companion import datasets
from tests.book.reading import figure_data, line, notebook
from tests.kit.numbers import identical

CHAPTER = "16"


# ---- figures --------------------------------------------------------------------------------------------------------


def answers() -> list[np.ndarray]:
    """The gradients of the hidden kernel on twenty batches, differentiated by hand."""
    data, draw = datasets.digits(), np.random.default_rng(0)
    hidden, head = draw.normal(0, 0.1, (64, 32)), draw.normal(0, 0.1, (32, 10))
    found = []
    for x, y in zip(np.split(data.x_train, 20), np.split(data.y_train, 20), strict=True):
        h = np.tanh(x @ hidden)
        error = np.exp(h @ head)
        error = error / error.sum(1, keepdims=True) - np.eye(10)[y]
        found.append(x.T @ ((error @ head.T) * (1 - h**2)) / len(x))
    return found


def newton_schulz(matrix: np.ndarray, rounds: int = 5) -> np.ndarray:
    left, s, right = np.linalg.svd(matrix, full_matrices=False)
    s = s / np.linalg.norm(s)
    for _ in range(rounds):
        s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
    return (left * s) @ right


def last_steps() -> dict[str, np.ndarray]:
    """What each rule makes of the twenty answers in the end, up to its length."""
    m = v = lion = momentum = np.zeros((64, 32))
    for g in answers():
        before, m, v = lion, 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g**2
        lion, momentum = 0.99 * lion + 0.01 * g, 0.95 * momentum + g
    correction = np.sqrt(1 - 0.999**20) / (1 - 0.9**20)
    return {
        "SGD": g,
        "Adam": correction * m / (np.sqrt(v) + 1e-7),
        "Lion": np.sign(0.9 * before + 0.1 * g),
        "Muon": newton_schulz(g + 0.95 * momentum),
    }


@pytest.mark.parametrize("name", ["SGD", "Adam", "Lion", "Muon"])
def test_steps_entry_by_entry_and_direction_by_direction(name: str) -> None:
    (entries,), (directions,) = (figure_data(CHAPTER)[place] for place in (1, 4))
    step, size = last_steps()[name], np.abs(answers()[-1]).ravel()
    values = np.linalg.svd(step, compute_uv=False)
    _, drawn = line(directions, name)
    np.testing.assert_allclose(drawn[:20], (values / values[0])[:20], rtol=0.02)
    at, mean = line(entries, name)
    assert at[0] < 0.05
    assert at[-1] > 2
    moved = np.abs(step).ravel()
    largest = np.argsort(size)[-len(np.flatnonzero(size)) // 16 :]
    assert mean[-1] == pytest.approx(moved[largest].mean() / moved[size > 0].mean(), rel=0.03)
    if name == "Lion":
        np.testing.assert_allclose(mean, 1, atol=0.05)


@pytest.mark.claim("(Adam's line still rises, because on these batches larger entries agree more.)", chapter="16")
def test_larger_entries_agree_more() -> None:
    *before, last = (answer.ravel() for answer in answers())
    order = np.argsort(np.abs(last))[np.count_nonzero(last == 0) :]
    agreement = np.abs(np.mean(before, 0)) / np.maximum(np.sqrt(np.mean(np.square(before), 0)), 1e-12)
    means = [agreement[part].mean() for part in np.array_split(order, 4)]
    assert means == sorted(means)
    assert means[-1] > 1.4 * means[0]


def path(warmup: int = 0, alike: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """Theta and the average of schedulefree 1.4.1, in the order of that package: theta moves, x is read off."""
    curvatures, y = np.geomspace(1, 10, 20), np.random.default_rng(0).normal(size=20)
    z, v, total, points, averages = y.copy(), np.zeros(20), 0.0, [], []
    for k, noise in enumerate(np.random.default_rng(1).normal(0, 0.1, (400, 20))):
        h = 0.1 * min(1, (k + 1) / warmup) if warmup else 0.1  # never falls: the largest so far
        g = curvatures * y + noise
        v = 0.999 * v + 0.001 * g**2
        g = g / (np.sqrt(v / (1 - 0.999 ** (k + 1))) + 1e-8)
        weight = 1 if alike else h**2
        total += weight
        c = weight / total
        y = y + c * (z - y) + h * (0.9 * (1 - c) - 1) * g
        z = z - h * g
        points.append(y)
        averages.append(y + (1 - 1 / 0.9) * (z - y))
    return np.array(points), np.array(averages)


def test_what_each_rule_makes_of_a_circle() -> None:
    """The half-axes that are drawn, from the gradient by hand: a thin ellipse, a line, a rounder ellipse."""
    small = np.array([[2.0, 1.0], [1.0, 0.6]])
    expected = {"SGD": small, "Lion, Adam": np.ones((2, 2)), "Muon": newton_schulz(small)}
    for axes, (name, step) in zip(figure_data(CHAPTER)[0], expected.items(), strict=True):
        half = np.linalg.svd(step, compute_uv=False)
        lengths = np.hypot(*line(axes, name))
        assert lengths.max() == pytest.approx(1, abs=0.01)
        assert lengths.min() == pytest.approx(half[1] / half[0], abs=0.02)


def test_a_matrix_is_a_turn_a_stretch_and_a_turn() -> None:
    """The last panels are one matrix, and that matrix with the same singular vectors and all singular values 1."""
    *_, whole = figure_data(CHAPTER)[2][:4]
    *_, wanted = figure_data(CHAPTER)[2][4:]
    long, short = np.sqrt(3) / 2, 0.5  # the cosine and the sine of 30 degrees
    matrix = np.outer([short, long], [long, short]) + 0.25 * np.outer([-long, short], [-short, long])
    left, stretches, right = np.linalg.svd(matrix)
    np.testing.assert_allclose(stretches, [1, 0.25])
    inputs = np.transpose(line(figure_data(CHAPTER)[2][0], "all"))
    for axes, product in ((whole, matrix), (wanted, left @ right)):
        np.testing.assert_allclose(np.transpose(line(axes, "all")), inputs @ product, atol=1e-4)


def test_the_ellipse_after_each_round() -> None:
    small = np.array([[2.0, 1.0], [1.0, 0.6]])
    for rounds, axes in enumerate(figure_data(CHAPTER)[3]):
        half = np.linalg.svd(newton_schulz(small, rounds), compute_uv=False)
        lengths = np.hypot(*line(axes, f"after {rounds} round{'s' * (rounds != 1)}"))
        assert [lengths.max(), lengths.min()] == pytest.approx([half.max(), half.min()], abs=0.01)


def test_two_ways_to_settle() -> None:
    """In closed form: what noise leaves of a start and of itself; the average is that of the points before."""
    (axes,) = figure_data(CHAPTER)[5]
    noise, steps = np.random.default_rng(3).normal(0, 1.0, 100), np.arange(1, 101)
    kept = np.where(steps[:, None] >= steps, 0.7 ** (steps[:, None] - steps), 0)
    constant = 4 * 0.7**steps - 0.3 * kept @ noise
    np.testing.assert_allclose(line(axes, "constant rate")[1], constant, atol=1e-4)
    np.testing.assert_allclose(line(axes, "average")[1], [constant[:end].mean() for end in steps], atol=1e-4)
    slower = line(axes, "falling rate")[1]
    assert np.abs(np.diff(slower[-20:])).max() < 0.1 < np.abs(np.diff(constant[-20:])).max()


def test_three_points() -> None:
    (axes,) = figure_data(CHAPTER)[6]
    z, x = (np.transpose(line(axes, name)) for name in ("z", "x"))
    np.testing.assert_allclose(x[-1], z[1:].mean(0), atol=1e-4)
    last = {name: np.ravel(line(axes, f"last {name}")) for name in ("z", "x", "θ")}
    np.testing.assert_allclose(last["θ"], 0.1 * last["z"] + 0.9 * last["x"], atol=1e-4)
    assert np.linalg.norm(np.diff(x[7:], axis=0)) < 0.3 * np.linalg.norm(np.diff(z[7:], axis=0))


def test_distances_from_the_paper() -> None:
    (table,) = (
        out["data"]["text/plain"]
        for cell in notebook(CHAPTER).cells
        for out in cell.get("outputs", [])
        if "at update 10" in out.get("data", {}).get("text/plain", "")
    )
    found = [[float(number) for number in row.split()[-3:] if number != "–"] for row in table.splitlines()[1:]]
    late, start = run(shown_class("AsInKeras")(0.1)), np.random.default_rng(0).normal(size=20)
    off, moved = np.abs(late - path()[0]).max(1), np.abs(path()[0] - start).max(1)
    for row, values in zip((found[0], found[3]), (off, moved), strict=True):
        assert row[:2] == [pytest.approx(values[9], abs=1e-3), pytest.approx(values.max(), abs=3e-3)]
    losses = [points[-1] ** 2 @ np.geomspace(1, 10, 20) / 2 for points in (late, path()[0])]
    assert found[0][2] == pytest.approx(1000 * losses[0], abs=0.1)
    assert found[1] == found[2] == [0, 0, pytest.approx(1000 * losses[1], abs=0.06)]
    assert losses[0] > 9 * losses[1]


@pytest.mark.parametrize(("panel", "warmup"), [(0, 0), (1, 100)])
def test_losses_at_each_point(panel: int, warmup: int) -> None:
    axes, curvatures = figure_data(CHAPTER)[7][panel], np.geomspace(1, 10, 20)
    expected = dict(zip(("theta", "x"), path(warmup), strict=True)) | {"x, all alike": path(warmup, alike=True)[1]}
    for name, points in expected.items():
        np.testing.assert_allclose(line(axes, name)[1], points**2 @ curvatures / 2, rtol=1e-3)
    assert line(axes, "x")[1][-1] < 0.5 * line(axes, "theta")[1][-1]


# ---- sentences ------------------------------------------------------------------------------------------------------


def shown_class(name: str) -> Any:
    """A class that the chapter defines."""
    names: dict[str, Any] = {"keras": keras, "ops": ops}
    for cell in notebook(CHAPTER).cells:
        if cell.cell_type == "code" and "class AsInKeras" in cell.source:
            exec(cell.source, names)
    return names[name]


def run(optimizer: Any) -> np.ndarray:
    weight = keras.Variable(np.random.default_rng(0).normal(size=20).astype("float32"))
    optimizer.build([weight])
    curvatures, found = tf.constant(np.geomspace(1, 10, 20), "float32"), []

    @tf.function(autograph=False)
    def step(noise: Any) -> Any:
        optimizer.apply([curvatures * weight.value + noise], [weight])
        return tf.identity(weight.value)

    for noise in tf.constant(np.random.default_rng(1).normal(0, 0.1, (400, 20)), "float32"):
        found.append(step(noise).numpy())
    return np.array(found)


@pytest.mark.claim("But on TensorFlow `z.value` is the variable, not a copy of what it holds.", chapter="16")
def test_the_read_that_comes_too_late() -> None:
    variable = keras.Variable([1.0])
    read = variable.value
    variable.assign([2.0])
    assert float(read[0]) == 2.0
    late = run(shown_class("AsInKeras")(0.1))
    assert np.abs(late - path()[0]).max() > 0.05
    assert np.abs(run(shown_class("OneLineMended")(0.1)) - path()[0]).max() < 1e-4
    if hasattr(keras.optimizers, "ScheduleFreeAdamW"):  # new in Keras 3.14
        np.testing.assert_allclose(run(keras.optimizers.ScheduleFreeAdamW(0.1)), late, atol=1e-5)


@pytest.mark.claim("Where the rate is constant, $c = 1/t$.", chapter="16")
def test_a_constant_rate_weighs_all_alike() -> None:
    np.testing.assert_allclose(path()[1], path(alike=True)[1], atol=1e-12)


@pytest.mark.claim("What is orthogonalised is the momentum.", chapter="16")
def test_singular_values_of_a_later_step_are_near_one() -> None:
    weight, optimizer = keras.Variable(np.zeros((6, 6))), companion.Muon(1.0, scale="original")
    added = np.zeros((6, 6))
    for gradient in np.random.default_rng(0).normal(size=(9, 6, 6)):
        before = weight.numpy()
        optimizer.apply([gradient], [weight])
        added = 0.95 * added + newton_schulz(gradient)
    values = np.linalg.svd(before - weight.numpy(), compute_uv=False)
    assert 0.6 < values.min() < values.max() < 1.25
    assert np.linalg.svd(newton_schulz(gradient) + 0.95 * added)[1].max() > 2


@pytest.mark.claim(
    "five rounds bring every singular value above a hundredth of the matrix's norm to between about 0.7 and 1.1.",
    chapter="16",
)
def test_five_rounds() -> None:
    s = np.geomspace(0.01, 1, 1000)
    for _ in range(5):
        s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
    assert 0.68 < s.min() < s.max() < 1.14


@pytest.mark.claim(
    "only for weights with two axes (no convolutions); float64 raises an error; spots embeddings only by the word "
    '"embedding" in their path',
    chapter="16",
)
def test_which_weights_kerass_muon_takes() -> None:
    takes = {}
    for name, shape in {"embedding": (5, 3), "tokens": (5, 3), "convolution": (3, 3, 2, 4)}.items():
        optimizer = keras.optimizers.Muon(0.1)
        optimizer.build([keras.Variable(np.ones(shape), name=name)])
        takes[name] = not any("velocity" in variable.name for variable in optimizer.variables)
    assert takes == {"embedding": False, "tokens": True, "convolution": False}


@pytest.mark.claim("Showing the average changes nothing in training.", chapter="16")
def test_training_with_and_without_the_callback() -> None:
    x, y, found = np.ones((8, 2)), np.arange(8.0)[:, None], []
    for callbacks in ([], [companion.SwapAverage()]):
        keras.utils.set_random_seed(1)
        model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1)])
        model.compile(companion.ScheduleFreeAdamW(0.1), "mse")
        loss = model.fit(x, y, 4, epochs=3, shuffle=False, callbacks=callbacks, verbose=0).history["loss"]
        model.optimizer.train()
        found.append((loss, model.get_weights()))
    assert found[0][0] == found[1][0]
    assert identical(found[0][1], found[1][1])


@pytest.mark.claim(
    "In `companion.ScheduleFreeAdamW` the decay is inside, and that of the base class is off, so that nothing decays "
    "twice.",
    chapter="16",
)
def test_decay_is_inside_and_once() -> None:
    weight, optimizer = keras.Variable([1.0]), companion.ScheduleFreeAdamW(0.5, weight_decay=0.5)
    optimizer.apply([np.zeros(1)], [weight])
    assert float(weight.value[0]) == float(optimizer.iterates[0].value[0]) == 0.75


@pytest.mark.claim("A callback that sets `learning_rate` sets Adam's, and the tenth follows.", chapter="16")
def test_a_factor_follows() -> None:
    weights = [keras.Variable([0.0], name=name) for name in ("kernel", "bias")]
    optimizer = companion.ParameterGroups(companion.SGD(1.0), {"bias": 0.1})
    optimizer.apply([np.ones(1)] * 2, weights)
    optimizer.learning_rate = 3.0
    optimizer.apply([np.ones(1)] * 2, weights)
    np.testing.assert_allclose([float(weight.value[0]) for weight in weights], [-4, -0.4], rtol=1e-6)
