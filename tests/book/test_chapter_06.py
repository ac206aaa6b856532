"""Chapter 06: the data under its figures, and the tests that hold its sentences."""

from collections.abc import Callable
from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf

import companion
from tests.book.reading import figure_data, line, notebook
from tests.kit.cases import wrong
from tests.kit.network import Digits, flat

CHAPTER = "06"
ROUNDING = 1e-12


# ---- figures: the race, in NumPy ------------------------------------------------------------------------------------


class NumpyRun(Digits):
    """The chapter's network, its gradient and momentum in float64, from the formulas."""

    def __init__(self, h: float = 0.05, beta: float = 0.9) -> None:
        super().__init__(rows=1400, drawn="float64")
        self.h, self.beta = h, beta
        self.velocity = [np.zeros_like(weight) for weight in self.weights]
        self.asked: list[np.ndarray] = []

    def ask(self, rows: range) -> list[np.ndarray]:
        self.asked.append(flat(self.weights))
        return self(self.weights, slice(rows.start, rows.stop))[1]

    def step(self, gradient: Any) -> None:
        self.velocity = [self.beta * v - self.h * g for v, g in zip(self.velocity, gradient, strict=True)]
        self.weights = [w + v for w, v in zip(self.weights, self.velocity, strict=True)]

    def train(self, version: str) -> np.ndarray:
        path = []
        for start in [*range(0, 1400, 64)] * 2:
            window = range(start, min(start + 64, 1400))
            parts = [range(i, min(i + 16, window.stop)) for i in window[::16]]
            if version == "large_batch":
                self.step(self.ask(window))
            elif version == "small_steps":
                for part in parts:
                    self.step([g / len(parts) for g in self.ask(part)])
            else:
                shares = [len(p) / len(window) if version == "weighted_mean" else 1 / len(parts) for p in parts]
                total = [np.zeros_like(weight) for weight in self.weights]
                for number, (part, share) in enumerate(zip(parts, shares, strict=True), 1):
                    total = [t + share * g for t, g in zip(total, self.ask(part), strict=True)]
                    if version == "zeros_between" and number < len(parts):
                        self.step([0 * t for t in total])
                self.step(total)
            path.append(flat(self.weights))
        return np.array(path)


@pytest.fixture(scope="module")
def runs() -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """For each version its weights after each window, and those at which it asked."""
    found = {}
    for version in ("large_batch", "small_steps", "zeros_between", "mean_of_means", "weighted_mean"):
        run = NumpyRun()
        found[version] = run.train(version), np.array(run.asked)
    return found


@pytest.mark.parametrize("version", ["large_batch", "small_steps", "zeros_between"])
def test_where_the_gradients_were_asked(version: str, runs: Any) -> None:
    (axes,) = figure_data(CHAPTER)[0]
    judge, asked = runs["large_batch"]
    moved = np.abs(judge[2] - asked[0]).argmax()
    expected = runs[version][1][:12, moved]
    if version == "large_batch":
        expected = np.repeat(asked[:3, moved], 4)
    question, found = line(axes, version.replace("large_batch", "the large batch"))
    np.testing.assert_array_equal(question, np.arange(1, 13))
    np.testing.assert_allclose(found, expected, atol=1e-5 * np.abs(expected).max())


def test_means_of_two_cuts() -> None:
    """The parts' means, and the mean of these: 3 for two and two, 4 for three and one."""
    for axes, means in zip(figure_data(CHAPTER)[1], ((1.5, 4.5), (2, 6)), strict=True):
        assert [height for _, height in axes["bars"]] == [1, 2, 3, 6]
        answers = [line(axes, f"part {part}")[1] for part in range(2)]
        np.testing.assert_allclose(answers, [[mean, mean] for mean in means])
        np.testing.assert_allclose(line(axes, "merged")[1], np.mean(means))


@pytest.mark.parametrize("version", ["small_steps", "zeros_between", "mean_of_means", "weighted_mean"])
def test_gaps_are_those_of_numpy(version: str, runs: Any) -> None:
    (axes,) = figure_data(CHAPTER)[2]
    gap = np.abs(runs[version][0] - runs["large_batch"][0]).max(axis=1)
    window, found = line(axes, version)
    np.testing.assert_array_equal(window, np.arange(1, 45))
    is_rounding = gap < ROUNDING
    first_wrong = {"small_steps": 0, "zeros_between": 1, "mean_of_means": 21, "weighted_mean": 44}[version]
    np.testing.assert_array_equal(is_rounding, np.arange(44) < first_wrong)
    np.testing.assert_array_equal(found[is_rounding], 1e-15)
    np.testing.assert_allclose(found[~is_rounding], gap[~is_rounding], rtol=1e-3)


# ---- a small problem for the sentences ------------------------------------------------------------------------------


SIZES = (4, 4, 4, 4)
RAGGED = (4, 4, 4, 1)


def batches(windows: int, sizes: tuple[int, ...] = SIZES) -> list[tuple[np.ndarray, np.ndarray]]:
    """Random windows of examples with three inputs and two targets; each is to be split into parts of these sizes."""
    random = np.random.default_rng(0)
    return [(random.normal(size=(sum(sizes), 3)), random.normal(size=(sum(sizes), 2))) for _ in range(windows)]


def split(arrays: Any, sizes: tuple[int, ...]) -> list[Any]:
    ends = np.cumsum(sizes)
    return [[a[end - size : end] for a in arrays] for size, end in zip(sizes, ends, strict=True)]


def linear_model() -> keras.Model:
    kernel = keras.initializers.Constant(np.linspace(-1, 1, 6).reshape(3, 2))
    dense = keras.layers.Dense(2, kernel_initializer=kernel, dtype="float64")
    return keras.Sequential([keras.Input((3,), dtype="float64"), dense])


def gradient(
    model: keras.Model, x: Any, y: Any, reduction: str = "sum_over_batch_size", weight: Any = None
) -> list[Any]:
    loss = keras.losses.MeanSquaredError(reduction=reduction, dtype="float64")
    with tf.GradientTape() as tape:
        value = loss(y, model(x), sample_weight=weight)
    return tape.gradient(value, model.trainable_variables)


def merged(parts: list[list[Any]], weights: Any) -> np.ndarray:
    return np.average([flat(part) for part in parts], axis=0, weights=weights)


def run(optimizer: Any, how: str, windows: int = 3, sizes: tuple[int, ...] = SIZES) -> np.ndarray:
    """The weights after each window: of the large batch, or of parts handed to the optimizer in some way."""
    model, path = linear_model(), []
    variables = model.trainable_variables
    for window in batches(windows, sizes):
        parts = split(window, sizes)
        if how == "large batch":
            optimizer.apply(gradient(model, *window), variables)
        elif how == "every part":
            for x, y in parts:
                optimizer.apply(gradient(model, x, y), variables)
        elif how == "zeros between":
            gradients = [gradient(model, x, y) for x, y in parts[:1]]
            for x, y in parts[1:]:
                optimizer.apply([0 * g for g in gradients[0]], variables)
                gradients.append(gradient(model, x, y))
            optimizer.apply([sum(g) / len(parts) for g in zip(*gradients, strict=True)], variables)
        path.append(flat(variables))
    return np.array(path)


def first_wrong(path: np.ndarray, reference: np.ndarray) -> int | None:
    is_wrong = np.abs(path - reference).max(axis=1) > ROUNDING
    return int(is_wrong.argmax()) + 1 if is_wrong.any() else None


# ---- sentences ------------------------------------------------------------------------------------------------------


@pytest.mark.claim("The mean of the gradients of equal parts is the gradient of the whole batch.", chapter="06")
@pytest.mark.parametrize("sizes", [SIZES, (8, 8), wrong(RAGGED, why="the parts are not equal")])
def test_mean_of_equal_parts_is_the_whole(sizes: tuple[int, ...]) -> None:
    model, (window,) = linear_model(), batches(1, sizes)
    parts = [gradient(model, x, y) for x, y in split(window, sizes)]
    np.testing.assert_allclose(merged(parts, None), flat(gradient(model, *window)), atol=ROUNDING)


@pytest.mark.claim(
    "A gradient of zero is not nothing: it moves a weight that has a velocity, shrinks that velocity, and is counted "
    "as an update.",
    chapter="06",
)
@pytest.mark.parametrize(
    "make",
    [
        lambda: companion.Momentum(0.5, momentum=0.5),
        lambda: keras.optimizers.SGD(0.5, momentum=0.5),
        wrong(lambda: keras.optimizers.SGD(0.5), why="it has no velocity"),
    ],
)
def test_a_gradient_of_zero_is_not_nothing(make: Callable[[], Any]) -> None:
    weight, optimizer = keras.Variable([0.0]), make()
    optimizer.apply([np.array([-4.0], "float32")], [weight])
    optimizer.apply([np.array([0.0], "float32")], [weight])
    assert weight.numpy()[0] == 2 + 1
    slots = [v for v in optimizer.variables if v.shape == (1,)]
    assert [float(slot.numpy()[0]) for slot in slots] == [1.0]
    assert int(optimizer.iterations) == 2


@pytest.mark.claim(
    "With momentum, zeros between the updates are exact for one window and wrong forever after.", chapter="06"
)
@pytest.mark.parametrize("make", [companion.Momentum, keras.optimizers.SGD])
def test_zeros_are_exact_for_one_window(make: Callable[..., Any]) -> None:
    windows = 30
    path, reference = (run(make(0.05, momentum=0.9), how, windows) for how in ("zeros between", "large batch"))
    is_wrong = np.abs(path - reference).max(axis=1) > 1e-4
    np.testing.assert_array_equal(is_wrong, np.arange(windows) > 0)
    assert first_wrong(path, reference) == 2


@pytest.mark.claim(
    "With momentum 0.66, and h chosen so that h/(1 − momentum) stays the same, the large batch ends as low as "
    "versions one and two.",
    chapter="06",
)
@pytest.mark.parametrize("power", [4, wrong(1, why="its velocity fades once in a window")])
def test_a_velocity_that_fades_sooner_ends_lower(power: int) -> None:
    beta = 0.9**power
    losses = []
    for version, run in (
        ("large_batch", NumpyRun(0.05 * (1 - beta) / (1 - 0.9), beta)),
        ("small_steps", NumpyRun()),
        ("zeros_between", NumpyRun()),
    ):
        run.train(version)
        losses.append(run(run.weights)[0])
    assert round(0.9**4, 2) == 0.66
    assert losses[0] < min(losses[1:])
    assert max(losses) - min(losses) < 0.02


@pytest.mark.claim("An `Input` without a dtype rounds whatever comes in to float32.", chapter="06")
@pytest.mark.parametrize("functional", [False, True])
@pytest.mark.parametrize("dtype", [None, wrong("float64", why="this one has a dtype")])
def test_input_rounds(dtype: str | None, functional: bool) -> None:
    inputs = keras.Input((1,), dtype=dtype)
    layer = keras.layers.Identity(dtype="float64")
    model = keras.Model(inputs, layer(inputs)) if functional else keras.Sequential([inputs, layer])
    third = tf.constant([[1 / 3]], "float64")
    assert float(model(third)[0, 0]) == float(np.float32(1 / 3))


@pytest.mark.claim("Plain SGD remembers nothing, so it never notices a gradient of zero.", chapter="06")
@pytest.mark.parametrize(
    "make", [companion.SGD, keras.optimizers.SGD, wrong(keras.optimizers.Adam, why="it remembers")]
)
def test_plain_sgd_never_notices_zeros(make: Callable[..., Any]) -> None:
    path, reference = (run(make(0.05), how, windows=10) for how in ("zeros between", "large batch"))
    assert first_wrong(path, reference) is None


@pytest.mark.claim("Three zeros before it cut Adam's first step to 0.58 of its length.", chapter="06")
@pytest.mark.parametrize("make", [companion.Adam, keras.optimizers.Adam])
def test_zeros_shorten_the_first_step_of_adam(make: Callable[..., Any]) -> None:
    weight, optimizer = keras.Variable([0.0]), make(1.0)
    for value in (0.0, 0.0, 0.0, -1.0):
        optimizer.apply([np.array([value], "float32")], [weight])
    closed_form = np.sqrt(1 - 0.999**4) / (1 - 0.9**4) * 0.1 / np.sqrt(0.001)
    assert weight.numpy()[0] == pytest.approx(closed_form, rel=1e-3)
    assert round(closed_form, 2) == 0.58


@pytest.mark.claim(
    "With `sample_weight`, Keras's default reduction divides by the number of examples, not by the sum of the weights.",
    chapter="06",
)
@pytest.mark.parametrize("by", ["examples", wrong("sum of weights", why="this is another reduction's denominator")])
def test_default_reduction_divides_by_examples(by: str) -> None:
    model, (window,) = linear_model(), batches(1, (4, 1))
    weight = np.array([1.0, 2.0, 3.0, 4.0, 5.0])
    parts = split((*window, weight), (4, 1))
    gradients = [gradient(model, x, y, weight=w) for x, y, w in parts]
    weights = [len(w) if by == "examples" else w.sum() for _, _, w in parts]
    whole = flat(gradient(model, *window, weight=weight))
    np.testing.assert_allclose(merged(gradients, weights), whole, atol=ROUNDING)


@pytest.mark.claim(
    r'With `reduction="sum"` nothing is divided, and $G = \sum_i \nabla L_i(\theta)$.',
    chapter="06",
)
@pytest.mark.parametrize("reduction", ["sum", wrong("mean", why="a mean must be weighted")])
def test_gradients_of_sums_are_added(reduction: str) -> None:
    model, (window,) = linear_model(), batches(1, RAGGED)
    parts = [flat(gradient(model, x, y, reduction)) for x, y in split(window, RAGGED)]
    np.testing.assert_allclose(sum(parts), flat(gradient(model, *window, reduction)), atol=ROUNDING)


@pytest.mark.claim(
    "Keras's `gradient_accumulation_steps` takes the mean of the means, whatever the sizes of the parts.", chapter="06"
)
@pytest.mark.parametrize("sizes", [SIZES, RAGGED])
def test_keras_takes_the_mean_of_the_means(sizes: tuple[int, ...]) -> None:
    model, (window,) = linear_model(), batches(1, sizes)
    parts = [gradient(model, x, y) for x, y in split(window, sizes)]
    before = flat(model.trainable_variables)
    after = run(keras.optimizers.SGD(0.5, gradient_accumulation_steps=4), "every part", windows=1, sizes=sizes)[0]
    np.testing.assert_allclose(after, before - 0.5 * merged(parts, None), atol=ROUNDING)
    weighted_is_the_same = np.allclose(merged(parts, None), merged(parts, sizes), atol=ROUNDING)
    assert weighted_is_the_same is (sizes == SIZES)


class ZerosBetween:
    """The chapter's second version as a wrapper."""

    def __init__(self, optimizer: Any, steps: int, **kwargs: Any) -> None:
        self.inner_optimizer, self.steps = optimizer, steps
        self.calls, self.total = 0, 0.0

    def apply(self, gradients: Any, variables: Any, weight: Any = None) -> None:
        self.calls += 1
        self.total = self.total + gradients[0]
        is_full = self.calls % self.steps == 0
        self.inner_optimizer.apply([self.total / self.steps if is_full else 0 * self.total], variables)


class Faulty:
    """Adds up the gradients of four parts, with one fault."""

    def __init__(self, fault: str, optimizer: Any, variables: list[Any]) -> None:
        self.fault, self.optimizer, self.variables = fault, optimizer, variables
        self.total, self.count, self.late = [0.0] * len(variables), 0, None

    def window(self, parts: list[Any], ask: Callable[..., list[Any]]) -> None:
        for number, (x, y) in enumerate(parts, 1):
            weight = 1 if self.fault == "mean of means" else len(x)
            self.total = [t + weight * g for t, g in zip(self.total, ask(x, y), strict=True)]
            self.count += weight
            if self.fault == "zeros between" and number < len(parts):
                self.optimizer.apply([0 * t for t in self.total], self.variables)
        mean = [t / self.count for t in self.total]
        if self.fault == "a window late":
            mean, self.late = self.late or [0 * g for g in mean], mean
        self.optimizer.apply(mean, self.variables)
        if self.fault != "never reset":
            self.total, self.count = [0.0] * len(self.variables), 0


@pytest.mark.parametrize("fault", ["none", "mean of means", "zeros between", "never reset", "a window late"])
def test_the_test_to_take_away_stands_alone_and_finds_each_fault(fault: str) -> None:
    """``is_exact``, with nothing but Keras and NumPy beside it, on another model, loss and data."""
    (code,) = [cell.source for cell in notebook(CHAPTER).cells if cell.source.startswith("def is_exact(")]
    names: dict[str, Any] = {"keras": keras, "np": np}
    exec(code, names)
    model, loss = linear_model(), keras.losses.MeanSquaredError(dtype="float64")
    x, y = batches(1, (48,))[0]

    def train(model: Any, optimizer: Any, windows: Any) -> None:
        accumulation = Faulty(fault, optimizer, model.trainable_variables)
        for parts in windows:
            accumulation.window(parts, lambda x, y: gradient(model, x, y))

    before = flat(model.get_weights())
    assert bool(names["is_exact"](train, model, loss, x.astype("float32"), y.astype("float32"))) is (fault == "none")
    np.testing.assert_array_equal(flat(model.get_weights()), before)


@pytest.mark.claim(
    "Between updates, `GradientAccumulation` leaves weights, slots and counter as they are, to the last bit.",
    chapter="06",
)
@pytest.mark.parametrize("normalize", ["mean", "weight"])
@pytest.mark.parametrize("make", [companion.Momentum, companion.Adam, keras.optimizers.AdamW, keras.optimizers.Adagrad])
@pytest.mark.parametrize("wrapper", [companion.GradientAccumulation, wrong(ZerosBetween, why="it applies zeros")])
def test_nothing_moves_between_updates(wrapper: Any, make: Callable[..., Any], normalize: str) -> None:
    weight, inner = keras.Variable([1.0, -2.0], dtype="float64"), make(0.1)
    optimizer = wrapper(inner, 3, normalize=normalize)
    inner.build([weight])

    def state() -> list[Any]:
        return [weight.numpy().tolist(), *(variable.numpy().tolist() for variable in inner.variables)]

    random, moved = np.random.default_rng(0), []
    for _ in range(9):
        before = state()
        optimizer.apply([random.normal(size=2)], [weight], weight=5.0)
        moved.append(state() != before)
    assert moved == [False, False, True] * 3


@pytest.mark.claim(
    "`fit` hands NumPy arrays to the training step in Keras's default dtype, float32, whatever they were.",
    chapter="06",
)
@pytest.mark.parametrize("batched", [np.asarray, wrong(tf.data.Dataset.from_tensors, why="a dataset keeps its dtypes")])
def test_fit_casts_arrays(batched: Callable[..., Any]) -> None:
    seen = []

    class Watched(keras.Sequential):
        def train_step(self, data: Any) -> Any:
            seen.append(tf.nest.flatten(data)[0].dtype.name)
            return super().train_step(data)

    model = Watched([keras.Input((3,)), keras.layers.Dense(2, dtype="float64")])
    model.compile("sgd", keras.losses.MeanSquaredError(dtype="float64"))
    (window,) = batches(1)
    model.fit(*(window if batched is np.asarray else [batched(window)]), shuffle=False, verbose=0)
    assert set(seen) == {"float32"}


@pytest.mark.claim(
    "Through `inject`, every window ends on the weights of the large batch, to the last digits.", chapter="06"
)
@pytest.mark.parametrize("accumulate", [False, True])
@pytest.mark.parametrize(
    "make",
    [
        lambda: keras.optimizers.SGD(0.05, momentum=0.9, nesterov=True),
        lambda: keras.optimizers.AdamW(0.01),
        lambda: companion.Adam(keras.optimizers.schedules.ExponentialDecay(0.01, 2, 0.5)),
    ],
)
def test_inject_ends_on_the_large_batch(make: Callable[[], Any], accumulate: bool) -> None:
    """Against a loop over large batches; an epoch of 44 examples ends in a batch of 12, in parts of 5, 5 and 2."""
    random = np.random.default_rng(1)
    x, y = (random.normal(size=(44, n)).astype("float32").astype("float64") for n in (3, 2))  # as `fit` hands it over
    reference, optimizer, expected = linear_model(), make(), []
    for start in [0, 16, 32] * 2:
        rows = slice(start, start + 16)
        optimizer.apply(gradient(reference, x[rows], y[rows]), reference.trainable_variables)
        expected.append(flat(reference.trainable_variables))

    model, found = linear_model(), []
    steps = 4 if accumulate else 1
    wrapped = companion.GradientAccumulation(make(), steps, normalize="weight") if accumulate else make()
    model.compile(wrapped, keras.losses.MeanSquaredError(dtype="float64"))
    companion.inject(model, micro_batches=1 if accumulate else 4)
    note = keras.callbacks.LambdaCallback(
        on_train_batch_end=lambda batch, logs: found.append(flat(model.get_weights()))
    )
    flush = [companion.FlushAtEpochEnd()] if accumulate else []
    if accumulate:
        note.on_epoch_end = lambda epoch, logs=None: found.append(flat(model.get_weights()))
    model.fit(x, y, 16 // steps, epochs=2, shuffle=False, verbose=0, callbacks=[*flush, note])
    if accumulate:  # batches 4 and 8 of an epoch fill a window; its end flushes three more
        found = [point for epoch in (found[:12], found[12:]) for point in (epoch[3], epoch[7], epoch[11])]
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-13)
