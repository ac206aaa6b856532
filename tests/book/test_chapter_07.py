"""Chapter 07: the data under its figures, and the tests that hold its sentences."""

import ast
import functools
import json
import pathlib
import statistics
import warnings
from collections.abc import Callable
from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf

import companion
from companion import datasets
from tests.book.reading import figure_data, line, notebook
from tests.kit import ROOT
from tests.kit.cases import wrong

CHAPTER = "07"
ROUNDING = 1e-12
KERNEL = np.linspace(-1, 1, 6).reshape(3, 2)


# ---- figure 2: the share of each sentence ---------------------------------------------------------------------------


def test_shares_are_those_of_words_and_of_parts() -> None:
    (axes,) = figure_data(CHAPTER)[1]
    words = np.array([2, 3, 5, 30])
    np.testing.assert_allclose([width for width, _ in axes["bars"]], [*np.full(4, 0.25), *words / 40], rtol=1e-6)


# ---- figure 4: the epoch in which nothing is learned, in NumPy ------------------------------------------------------


@pytest.mark.parametrize("name", ["Keras", "flushed"])
def test_losses_are_those_of_numpy(name: str) -> None:
    """Softmax regression from zero: an update after every eighth batch, or at the end of each epoch of six."""
    data = datasets.digits("float64")
    x, y = data.x_train[:96], data.y_train[:96]
    kernel, seen, losses = np.zeros((64, 10)), [], []

    def probabilities(rows: slice) -> np.ndarray:
        raised = np.exp(x[rows] @ kernel)
        return raised / raised.sum(axis=1, keepdims=True)

    def loss() -> float:
        return float(-np.log(probabilities(slice(None))[np.arange(96), y]).mean())

    losses.append(loss())
    for number in range(1, 25):
        rows = slice((number - 1) % 6 * 16, (number - 1) % 6 * 16 + 16)
        seen.append(x[rows].T @ (probabilities(rows) - np.eye(10)[y[rows]]) / 16)
        if number % (8 if name == "Keras" else 6) == 0:
            kernel -= np.mean(seen, axis=0)
            seen.clear()
        losses.append(loss())
    (axes,) = figure_data(CHAPTER)[3]
    batch, found = line(axes, name)
    np.testing.assert_array_equal(batch, np.arange(25))
    np.testing.assert_allclose(found, losses, rtol=1e-5)


# ---- figure 5: the matrix, in NumPy ---------------------------------------------------------------------------------


def numpy_weights(how: str, pitfall: str, windows: list[Any]) -> np.ndarray:
    """Linear regression with momentum, by the rules of the large batch, of Keras, or of a plain mean per update."""
    theta, velocity, average = KERNEL.copy(), np.zeros((3, 2)), np.zeros((3, 2))
    rate = 0.001 if "sum" in pitfall else 0.1
    size = 1 if pitfall == "masked tokens" else 4
    for update, (x, y) in enumerate(windows):
        counts = np.abs(x).sum(axis=-1) > 0
        parts = [slice(0, len(x))] if how == "large batch" else [slice(i, i + size) for i in range(0, len(x), size)]
        gradients = []
        for number, part in enumerate(parts):
            inputs, targets = x[part][counts[part]], y[part][counts[part]]
            gradient = inputs.T @ (inputs @ theta - targets)
            gradients.append(gradient if "sum" in pitfall else gradient / len(inputs))
            is_update = number == len(parts) - 1
            if is_update:
                mean = np.mean(gradients, axis=0)
                if "clipped" in pitfall:
                    mean *= 0.5 / max(np.linalg.norm(mean), 0.5)
                step = update * len(parts) + number if how == "Keras" else update
                velocity = 0.5 * velocity - rate * (0.8**step if pitfall == "schedule" else 1) * mean
                theta = theta + velocity
            if is_update or how == "Keras":
                if pitfall == "constraint":
                    norms = np.sqrt((theta**2).sum(axis=0))
                    theta = theta * (0.1 * np.clip(norms, 0.5, 0.6) + 0.9 * norms) / (norms + 1e-7)
                beta = 0.9 if update else 0.0
                average = beta * average + (1 - beta) * theta
    return average if pitfall == "moving average" else theta


def numpy_windows() -> dict[str, list[Any]]:
    """The chapter's random numbers, in the order in which it draws them."""
    random = np.random.default_rng(0)

    def noise(count: int, size: int) -> list[Any]:
        return [(random.normal(size=(size, 3)), random.normal(size=(size, 2))) for _ in range(count)]

    equal, ragged, masked = noise(5, 16), noise(5, 13), []
    for _ in range(5):
        x, y = random.normal(size=(4, 32, 3)), random.normal(size=(4, 32, 2))
        masked.append((x * (np.arange(32) < random.integers(1, 33, size=(4, 1)))[..., None], y))
    names = ["equal, clipped", 'reduction="sum"', "schedule", "moving average", "constraint"]
    return {**dict.fromkeys(names, equal), "ragged parts": ragged, "masked tokens": masked}


ROWS = [
    "equal, clipped",
    "ragged parts",
    "masked tokens",
    'reduction="sum"',
    "schedule",
    "moving average",
    "constraint",
]


def matrix() -> np.ndarray:
    (axes,) = figure_data(CHAPTER)[4]
    return np.array(axes["images"][0]) ** 2


@pytest.mark.parametrize("pitfall", ROWS)
@pytest.mark.parametrize(("column", "how"), list(enumerate(["Keras", "plain"])))
def test_errors_are_those_of_numpy(pitfall: str, column: int, how: str) -> None:
    windows = numpy_windows()[pitfall]
    judge = numpy_weights("large batch", pitfall, windows)
    gap = np.linalg.norm(numpy_weights(how, pitfall, windows) - judge) / np.linalg.norm(judge - KERNEL)
    found = matrix()[ROWS.index(pitfall), column]
    assert found == pytest.approx(gap if gap > ROUNDING else 0, rel=1e-4)


def test_the_last_rows_have_closed_forms() -> None:
    np.testing.assert_allclose(matrix()[7:, 0], [1, 0.5], rtol=1e-5)  # nothing learned; 256 of 512
    assert not matrix()[7:, 1:].any()


def test_who_is_exact_where() -> None:
    is_exact = matrix() == 0
    assert is_exact[:, 2:].all()
    assert is_exact[:, 0].tolist() == [True] + [False] * 8
    assert is_exact[:, 1].tolist() == [True, False, False, False] + [True] * 5


# ---- figure 1: the memory of parts, as recorded ---------------------------------------------------------------------


@functools.cache
def record() -> dict[str, Any]:
    """What tests/benchmarks/memory_of_parts.py wrote."""
    return json.loads((ROOT / "book" / "data" / "memory_of_parts.json").read_text())


def medians(network: str) -> list[float]:
    return [statistics.median(entry["megabytes"]) for entry in record()["results"] if entry["network"] == network]


def in_the_chapter(name: str) -> Any:
    """What the chapter writes down under that name."""
    codes = [cell.source for cell in notebook(CHAPTER).cells if cell.cell_type == "code"]
    (code,) = (code for code in codes if f"\n{name} = {{" in code)
    statements = [node for node in ast.parse(code).body if isinstance(node, ast.Assign)]
    (value,) = (node.value for node in statements if getattr(node.targets[0], "id", "") == name)
    return ast.literal_eval(value)


def test_memory_is_recorded_completely() -> None:
    assert record().keys() == {
        "date",
        "processor",
        "cores",
        "versions",
        "batch",
        "steps",
        "parameters",
        "results",
    }
    assert record()["versions"].keys() == {"tensorflow", "keras"}
    measured = [(entry["network"], entry["parts"]) for entry in record()["results"]]
    assert measured == [(network, n) for network in ("convolutional", "dense") for n in (1, 2, 4, 8, 16)]
    for entry in record()["results"]:
        assert len(entry["megabytes"]) == 3
        assert min(entry["megabytes"]) > 0
        assert entry["megabytes"] == sorted(entry["megabytes"])


@pytest.mark.parametrize("network", ["convolutional", "dense"])
def test_the_chapter_shows_the_record(network: str) -> None:
    np.testing.assert_allclose(in_the_chapter("memory")[network], medians(network), atol=0.51)  # whole megabytes
    assert in_the_chapter("parameters") == record()["parameters"]
    (axes,) = figure_data(CHAPTER)[0]
    parts, share = line(axes, network)
    assert parts.tolist() == [1, 2, 4, 8, 16]
    np.testing.assert_allclose(share, np.divide(medians(network), medians(network)[0]), atol=0.02)


def printed(heading: str) -> list[list[str]]:
    """The rows of the table whose first line begins with that heading, in words."""
    outputs = [out for cell in notebook(CHAPTER).cells for out in cell.get("outputs", []) if "data" in out]
    (table,) = [text for out in outputs if (text := out.data["text/plain"]).startswith(heading)]
    return [row.split() for row in table.splitlines()[1:]]


def test_what_a_step_holds_is_counted_from_the_networks() -> None:
    """Rows: activations, their gradient in one of four equal layers, gradient, sum of gradients, all."""
    found = np.array([[float(word.strip("*")) for word in row[-4:]] for row in printed("MB ")])
    for column, (network, parts) in enumerate([("convolutional", 1), ("convolutional", 8), ("dense", 1), ("dense", 8)]):
        layer = 32 * 64 * 64 if network == "convolutional" else 2048
        gradient = record()["parameters"][network]
        numbers = [4 * layer * 256 / parts, layer * 256 / parts, gradient, gradient * (parts > 1)]
        counted = 4 / 1024**2 * np.array([*numbers, sum(numbers)])
        np.testing.assert_allclose(found[:5, column], counted, atol=0.5)
        assert found[5, column] == pytest.approx(medians(network)[[1, 2, 4, 8, 16].index(parts)], abs=0.51)


def test_time_of_eight_parts_is_as_recorded() -> None:
    """Hardly longer, and more than twice as long."""
    recorded = json.loads((ROOT / "book" / "performance.json").read_text())
    ratio = {entry["what"]: entry["ratio_median"] for entry in recorded}
    assert ratio["inject, N=8, CNN, time: over the batch of 256 in one piece"] < 1.15
    assert 2 < ratio["inject, N=8, dense network, time: over the batch of 256 in one piece"] < 3.5


@pytest.mark.claim("Where parameters fill the memory, accumulation needs more of it, not less.", chapter="07")
@pytest.mark.parametrize("network", ["dense", wrong("convolutional", why="there activations fill it")])
def test_parameters_need_more_memory_in_parts(network: str) -> None:
    whole, *in_parts = (entry["megabytes"] for entry in record()["results"] if entry["network"] == network)
    assert 4 * record()["parameters"][network] / 1024**2 > 0.5 * max(whole)  # mostly the gradient
    assert min(min(megabytes) for megabytes in in_parts) > 1.2 * max(whole)


def test_activations_need_less_memory_in_parts() -> None:
    found = dict(zip((1, 2, 4, 8, 16), medians("convolutional"), strict=True))
    assert found[8] <= 0.30 * found[1]
    assert found[16] <= 0.18 * found[1]


# ---- sentences ------------------------------------------------------------------------------------------------------


def keras_accumulation(optimizer: Callable[..., Any], steps: int) -> Any:
    return optimizer(gradient_accumulation_steps=steps)


def ours(normalize: str = "mean") -> Callable[..., Any]:
    def accumulation(optimizer: Callable[..., Any], steps: int) -> Any:
        return companion.GradientAccumulation(optimizer(), steps, normalize=normalize)

    return accumulation


def sgd(rate: Any = 1.0, **options: Any) -> Callable[..., Any]:
    return lambda **more: keras.optimizers.SGD(rate, **options, **more)


def batches(count: int, size: int = 8) -> list[tuple[np.ndarray, np.ndarray]]:
    random = np.random.default_rng(3)
    return [(random.normal(size=(size, 3)), random.normal(size=(size, 2))) for _ in range(count)]


def linear(*before: Any, constraint: Any = None) -> keras.Model:
    options = {"kernel_initializer": keras.initializers.Constant(KERNEL), "dtype": "float64"}
    dense = keras.layers.Dense(2, use_bias=False, kernel_constraint=constraint, **options)
    return keras.Sequential([keras.Input((3,), dtype="float64"), *before, dense])


def fit_parts(
    model: keras.Model, optimizer: Any, windows: list[Any], size: int, reduction: str = "sum_over_batch_size"
) -> np.ndarray:
    """The weights after windows that come in parts."""
    model.compile(optimizer, keras.losses.MeanSquaredError(reduction=reduction, dtype="float64"), run_eagerly=True)
    for x, y in windows:
        for i in range(0, len(x), size):
            model.train_on_batch(x[i : i + size], y[i : i + size])
    optimizer.finalize_variable_values(model.trainable_variables)
    return np.array(model.trainable_variables[0].numpy())


@pytest.mark.claim(
    "Keras's `gradient_accumulation_steps` gives every part the same say, however few of its tokens count.",
    chapter="07",
)
@pytest.mark.parametrize("make", [keras_accumulation, wrong(ours("weight"), why="it was told what the parts weigh")])
def test_every_part_has_the_same_say(make: Callable[..., Any]) -> None:
    """One weight for each of two texts, of 1 and of 9 tokens, and a gradient of 1 for each token."""
    x = np.zeros((2, 9, 2))
    x[0, :1, 0] = x[1, :, 1] = 1
    dense = keras.layers.Dense(1, use_bias=False, kernel_initializer="zeros", dtype="float64")
    model = keras.Sequential([keras.Input((9, 2)), keras.layers.Masking(dtype="float64"), dense])
    model.compile(make(sgd(), 2), keras.losses.MeanSquaredError(dtype="float64"), run_eagerly=True)
    if not model.optimizer.gradient_accumulation_steps:
        companion.inject(model)
    for text in x:
        model.train_on_batch(text[None], np.full((1, 9, 1), -0.5))
    np.testing.assert_allclose(np.ravel(model.get_weights()[0]), [-0.5, -0.5], atol=ROUNDING)


@pytest.mark.claim(
    "With `gradient_accumulation_steps=8` and six batches an epoch, Keras moves no weight in the first epoch, and says "
    "nothing.",
    chapter="07",
)
@pytest.mark.parametrize("make", [keras_accumulation, wrong(ours(), why="it flushes")])
def test_an_epoch_in_which_nothing_is_learned(make: Callable[..., Any], capfd: pytest.CaptureFixture[str]) -> None:
    model = linear()
    model.compile(make(sgd(), 8), "mse", run_eagerly=True)
    capfd.readouterr()
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        model.fit(*batches(1, 12)[0], 2, verbose=0)
    assert (model.get_weights()[0] == KERNEL).all()
    assert not [warning for warning in said if "accumul" in str(warning.message).lower()]
    assert "accumul" not in "".join(capfd.readouterr()).lower()


@pytest.mark.claim("A flush is the update that one batch of just these parts would have made.", chapter="07")
@pytest.mark.parametrize("make", [ours(), ours("weight"), wrong(keras_accumulation, why="it has none")])
def test_a_flush_is_one_short_batch(make: Callable[..., Any]) -> None:
    (window,) = batches(1, 6)
    judge = fit_parts(linear(), sgd(0.1)(), [window], 6)
    model, optimizer = linear(), make(sgd(0.1), 8)
    model.compile(optimizer, keras.losses.MeanSquaredError(dtype="float64"), run_eagerly=True)
    if getattr(optimizer, "normalize", "") == "weight":
        companion.inject(model)
    for i in range(0, 6, 2):
        model.train_on_batch(window[0][i : i + 2], window[1][i : i + 2])
    optimizer.finalize_variable_values(model.trainable_variables)
    np.testing.assert_allclose(model.get_weights()[0], judge, atol=ROUNDING)


@pytest.mark.claim(
    "With equal parts, a constant rate and nothing else of the table, Keras is exact, clipping included: it clips the "
    "mean of the window, as it should.",
    chapter="07",
)
@pytest.mark.parametrize("clip", [{}, {"clipnorm": 0.3}, {"global_clipnorm": 0.3}, {"clipvalue": 0.1}])
@pytest.mark.parametrize("size", [2, wrong(3, why="the parts are not equal")])
def test_keras_is_exact_on_equal_parts(clip: dict[str, float], size: int) -> None:
    optimizer, windows = sgd(0.1, momentum=0.5, **clip), batches(3)
    steps = -(-8 // size)
    judge = fit_parts(linear(), optimizer(), windows, 8)
    found = fit_parts(linear(), keras_accumulation(optimizer, steps), windows, size)
    np.testing.assert_allclose(found, judge, atol=ROUNDING)


@pytest.mark.claim('In Keras a loss with `reduction="sum"` is still divided by N.', chapter="07")
@pytest.mark.parametrize("make", [keras_accumulation, wrong(ours("sum"), why="it was told that the loss is a sum")])
def test_a_sum_is_divided(make: Callable[..., Any]) -> None:
    windows = batches(1)
    step = fit_parts(linear(), sgd(0.01)(), windows, 8, "sum") - KERNEL
    found = fit_parts(linear(), make(sgd(0.01), 4), windows, 2, "sum") - KERNEL
    np.testing.assert_allclose(found, step / 4, atol=ROUNDING)


@pytest.mark.claim(
    'With `inject(model)`, `normalize="weight"` raises an error for a loss with `reduction="sum"`, and for two losses '
    "that divide by different numbers.",
    chapter="07",
)
@pytest.mark.parametrize(("normalize", "is_told"), [("weight", True), ("mean", False), ("sum", False)])
def test_a_wrong_weight_is_noticed(normalize: str, is_told: bool) -> None:
    inputs = keras.Input((3,))
    outputs = [keras.layers.Dense(1)(inputs) for _ in range(2)]
    mse, masked = keras.losses.MeanSquaredError, {"reduction": "mean_with_sample_weight"}
    x, y, weight = np.ones((4, 3)), np.ones((4, 1)), np.array([0.0, 1.0, 1.0, 1.0])
    for model, losses in (
        (keras.Model(inputs, outputs[0]), mse(reduction="sum")),
        (keras.Model(inputs, outputs), [mse(), mse(**masked)]),
    ):
        model.compile(ours(normalize)(sgd(), 4), losses, run_eagerly=True)
        companion.inject(model)
        several = len(model.outputs)
        given = (x, [y] * several, [weight] * several) if several > 1 else (x, y)
        if is_told:
            with pytest.raises(ValueError, match="One number cannot weigh this batch"):
                model.train_on_batch(*given)
        else:
            model.train_on_batch(*given)


@pytest.mark.claim(
    "Keras adds gradients up in the dtype of the variable, so 512 bfloat16 gradients of 1 average to 0.5.", chapter="07"
)
@pytest.mark.parametrize("make", [keras_accumulation, wrong(ours(), why="it adds up in float32")])
def test_bfloat16_loses_gradients(make: Callable[..., Any]) -> None:
    weight, one = keras.Variable([0.0], dtype="bfloat16"), tf.ones((1,), "bfloat16")
    optimizer = make(sgd(), 512)
    optimizer.build([weight])

    @tf.function
    def window() -> None:
        for _ in tf.range(512):
            optimizer.apply([one], [weight])

    window()
    assert float(weight.numpy()[0]) == -0.5


@pytest.mark.claim(
    "Keras reads the schedule at every part: after twelve updates with `gradient_accumulation_steps=3` it stands at "
    "step 36.",
    chapter="07",
)
@pytest.mark.parametrize("make", [keras_accumulation, wrong(ours(), why="it counts updates")])
def test_the_schedule_runs_ahead(make: Callable[..., Any]) -> None:
    weight, asked = keras.Variable([0.0]), keras.optimizers.schedules.PolynomialDecay(100.0, 100, 0.0)
    optimizer = make(sgd(asked), 3)
    for _ in range(36):
        optimizer.apply([np.array([0.0], "float32")], [weight])
    assert int(optimizer.iterations) == 12
    assert float(optimizer.learning_rate) == pytest.approx(100 - 36)


@pytest.mark.claim("Stretching the schedule by N repairs one that moves in stairs.", chapter="07")
@pytest.mark.parametrize("stairs", [True, wrong(False, why="it is read at the last part of a window")])
def test_stretching_repairs_stairs(stairs: bool) -> None:
    weight, steps = keras.Variable([0.0]), []
    stretched = keras.optimizers.schedules.ExponentialDecay(1.0, 3, 0.5, staircase=stairs)
    optimizer = keras_accumulation(sgd(stretched), 3)
    for part in range(12):
        before = float(weight.numpy()[0])
        optimizer.apply([np.array([1.0], "float32")], [weight])
        if part % 3 == 2:
            steps.append(before - float(weight.numpy()[0]))
    np.testing.assert_allclose(steps, [1, 0.5, 0.25, 0.125], rtol=1e-5)


class ByUpdates(keras.optimizers.schedules.LearningRateSchedule):
    def __init__(self, schedule: Any, parts: int) -> None:
        self.schedule, self.parts = schedule, parts

    def __call__(self, step: Any) -> Any:
        return self.schedule(step // self.parts)


def halved(steps: int, stairs: bool) -> Any:
    return keras.optimizers.schedules.ExponentialDecay(0.1, 4 * steps, 0.5, staircase=stairs)


def cosine(steps: int) -> Any:
    return keras.optimizers.schedules.CosineDecay(0.1, 12 * steps)


def warmed_up(steps: int) -> Any:
    return keras.optimizers.schedules.CosineDecay(0.0, 8 * steps, warmup_target=0.1, warmup_steps=4 * steps)


SCHEDULES = {
    "staircase": (lambda n: halved(n, True), lambda t: 0.1 * 0.5 ** (t // 4)),
    "exponential": (lambda n: halved(n, False), lambda t: 0.1 * 0.5 ** (t / 4)),
    "cosine": (cosine, lambda t: 0.05 * (1 + np.cos(np.pi * min(t / 12, 1)))),
    "warm-up and cosine": (
        warmed_up,
        lambda t: 0.1 * t / 4 if t < 4 else 0.05 * (1 + np.cos(np.pi * min((t - 4) / 8, 1))),
    ),
}


@pytest.mark.claim(
    "A schedule of `step // N` gives every update of Keras's accumulation the rate that was meant for it.", chapter="07"
)
@pytest.mark.parametrize(
    "of", ["ByUpdates", wrong("untouched", why="it counts parts"), wrong("stretched", why="read at the last part")]
)
@pytest.mark.parametrize("name", ["exponential", "cosine", "warm-up and cosine"])
def test_a_schedule_by_updates(name: str, of: str) -> None:
    make, meant = SCHEDULES[name]
    schedule = {"ByUpdates": ByUpdates(make(1), 3), "untouched": make(1), "stretched": make(3)}[of]
    weight, optimizer, used = keras.Variable([0.0]), keras_accumulation(sgd(schedule), 3), []
    for _ in range(12):
        before = float(weight.numpy()[0])
        for _ in range(3):
            optimizer.apply([np.array([1.0], "float32")], [weight])
        used.append(before - float(weight.numpy()[0]))
    np.testing.assert_allclose(used, [meant(t) for t in range(12)], atol=1e-6)


def test_the_rates_drawn_have_closed_forms() -> None:
    """Keras reads an update's rate at its last part: at step 2, 5, 8 and so on."""
    (axes,) = figure_data(CHAPTER)[2]
    _, rule = SCHEDULES["warm-up and cosine"]
    for name, steps in {"as meant": range(12), "Keras": range(2, 36, 3)}.items():
        np.testing.assert_allclose(line(axes, name)[1], [rule(min(step, 12)) for step in steps], atol=1e-6)


def test_the_table_of_schedules_has_closed_forms() -> None:
    """Untouched, an update is read at its last part; stretched, at a third of that; by updates, at its own number."""
    asked = [("staircase", 6), ("exponential", 6), ("cosine", 6), ("warm-up", 1)]
    rows = printed("rate used ")
    assert len(rows) == 5
    for place, (name, update) in enumerate(asked):
        (rule,) = [rule for each, (_, rule) in SCHEDULES.items() if each.startswith(name)]
        last = 3 * update - 1
        meant = [rule(t) for t in (update - 1, last, last / 3, update - 1, update - 1)]
        assert [row[-4:][place] for row in rows] == [f"{rate:.3f}" for rate in meant]


@pytest.mark.claim(
    "In `GradientAccumulation` and through `inject`, schedules, moving averages and constraints follow updates.",
    chapter="07",
)
@pytest.mark.parametrize("pitfall", ["schedule", "moving average", "constraint"])
@pytest.mark.parametrize("how", ["wrapper", "inject", wrong("Keras", why="there they follow parts")])
def test_everything_follows_updates(how: str, pitfall: str) -> None:
    """Against the rules in NumPy."""
    decay = keras.optimizers.schedules.ExponentialDecay(0.1, 1, 0.8)
    average = {"use_ema": True, "ema_momentum": 0.9} if pitfall == "moving average" else {}
    optimizer = sgd(decay if pitfall == "schedule" else 0.1, momentum=0.5, **average)
    limits = keras.constraints.MinMaxNorm(0.5, 0.6, rate=0.1) if pitfall == "constraint" else None
    windows, model = batches(4, 16), linear(constraint=limits)
    if how == "inject":
        chosen = optimizer()
        model.compile(chosen, keras.losses.MeanSquaredError(dtype="float64"), run_eagerly=True)
        companion.inject(model, micro_batches=4)
        for window in windows:
            model.train_on_batch(*window)
        chosen.finalize_variable_values(model.trainable_variables)
        found = model.get_weights()[0]
    else:
        found = fit_parts(model, (ours() if how == "wrapper" else keras_accumulation)(optimizer, 4), windows, 4)
    np.testing.assert_allclose(found, numpy_weights("large batch", pitfall, windows), atol=1e-7)


def test_the_table_of_batch_norm_has_closed_forms() -> None:
    values = np.array([1.0, 3, 5, 7])
    for row, size in zip(printed("example "), (4, 2), strict=True):
        parts = [values[i : i + size] for i in range(0, 4, size)]
        expected = np.concatenate([(part - part.mean()) / np.sqrt(part.var() + 1e-3) for part in parts])
        assert row[-4:] == [f"{z:.2f}" for z in expected]


@pytest.mark.claim("BatchNorm normalises each part by the part's own statistics, whatever accumulates.", chapter="07")
@pytest.mark.parametrize(
    "layer",
    [keras.layers.BatchNormalization, wrong(keras.layers.LayerNormalization, why="it sees one example at a time")],
)
def test_batch_norm_sees_parts(layer: Any) -> None:
    """In each form the merged gradient is the mean over parts, asked one by one, and not that of the large batch."""
    model, (window,) = linear(layer(scale=False, center=False, dtype="float64")), batches(1)
    parts = [[array[i : i + 2] for array in window] for i in range(0, 8, 2)]
    loss = keras.losses.MeanSquaredError(dtype="float64")

    def gradient(x: Any, y: Any) -> np.ndarray:
        with tf.GradientTape() as tape:
            value = loss(y, model(x, training=True))
        return np.array(tape.gradient(value, model.trainable_variables[0]))

    by_part, whole = np.mean([gradient(*part) for part in parts], axis=0), gradient(*window)
    start = model.get_weights()
    for accumulation in (keras_accumulation(sgd(), 4), ours()(sgd(), 4)):
        model.set_weights(start)
        np.testing.assert_allclose(KERNEL - fit_parts(model, accumulation, [window], 2), by_part, atol=ROUNDING)
    model.set_weights(start)
    model.compile(sgd()(), loss)
    oracle = companion.GradientOracle(model, window, micro_batches=4)
    np.testing.assert_allclose(oracle()[0], by_part, atol=ROUNDING)
    assert np.abs(by_part - whole).max() > 0.01


@pytest.mark.claim(
    "Under the `mixed_float16` policy `compile` puts a `LossScaleOptimizer` around the optimizer you give.",
    chapter="07",
)
@pytest.mark.parametrize("policy", ["mixed_float16", wrong("mixed_bfloat16", why="it needs no loss scaling")])
def test_compile_puts_loss_scaling_outside(policy: str) -> None:
    class Mixed(keras.Model):
        """A model with that policy, and nothing else."""

    model, optimizer = Mixed(dtype=policy), ours()(sgd(), 4)
    model.compile(optimizer, "mse")
    assert isinstance(model.optimizer, keras.optimizers.LossScaleOptimizer)
    assert model.optimizer.inner_optimizer is optimizer


@pytest.mark.claim(
    "Keras's Adam squares each occurrence of an id by itself, so an embedding with repeated ids does not train as a "
    "dense lookup does.",
    chapter="07",
)
@pytest.mark.parametrize(
    "make",
    [
        keras.optimizers.Adam,
        wrong(lambda rate: companion.CoalesceGradients(keras.optimizers.Adam(rate)), why="it sums them first"),
        wrong(keras.optimizers.SGD, why="it squares nothing"),
    ],
)
def test_repeated_ids_are_squared_one_by_one(make: Callable[[float], Any]) -> None:
    rows, ids = np.array([[3.0], [1.0], [2.0]]), np.array([2, 2, 0])
    sparse, dense = (keras.Variable(np.zeros((3, 1))) for _ in range(2))
    optimizer, judge = make(0.1), make(0.1)
    for _ in range(2):
        gradient = tf.IndexedSlices(tf.constant(rows, "float32"), tf.constant(ids), tf.constant([3, 1]))
        optimizer.apply([gradient], [sparse])
        judge.apply([tf.constant(np.eye(3)[ids].T @ rows, "float32")], [dense])
    squares = [v for v in optimizer.variables if "velocity" in v.path]
    assert len(squares) == 1
    np.testing.assert_allclose(squares[0].numpy()[2, 0], (1 + 0.999) * 0.001 * (3**2 + 1**2), rtol=1e-5)
    assert abs(float(sparse.numpy()[2, 0] - dense.numpy()[2, 0])) > 0.01


@pytest.mark.claim(
    "A `GradientAccumulation` that is saved in mid-window and resumed ends on the same bits.", chapter="07"
)
@pytest.mark.parametrize("with_state", [True, wrong(False, why="the window is state, and weights alone lack it")])
@pytest.mark.parametrize("position", [1, 6, 7])
def test_resumed_in_mid_window(position: int, with_state: bool, tmp_path: pathlib.Path) -> None:
    parts = batches(12, 2)

    def go_on(model: keras.Model, parts: list[Any]) -> keras.Model:
        for part in parts:
            model.train_on_batch(*part)
        return model

    def start() -> keras.Model:
        model = linear()
        model.compile(ours()(sgd(0.1, momentum=0.5), 4), "mse", run_eagerly=True)
        return model

    go_on(stopped := start(), parts[:position]).save(tmp_path / "model.keras")
    resumed = keras.saving.load_model(tmp_path / "model.keras") if with_state else start()
    resumed.set_weights(stopped.get_weights())
    expected = go_on(start(), parts).get_weights()[0]
    assert (go_on(resumed, parts[position:]).get_weights()[0] == expected).all()
