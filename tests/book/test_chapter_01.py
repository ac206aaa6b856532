"""Chapter 01: the data under its figures against independent references, and its claims against Keras."""

import itertools
import math
import pathlib
import sys
from typing import Any

import keras
import numpy as np
import pytest
from keras import ops

import companion
from companion import datasets
from tests.book.reading import figure_data, line
from tests.kit.cases import wrong
from tests.kit.network import loss_and_gradient, softmax

CROSS_ENTROPY = keras.losses.SparseCategoricalCrossentropy(from_logits=True)


def network(dtype: str = "float32") -> keras.Model:
    keras.utils.set_random_seed(1)
    hidden = keras.layers.Dense(32, activation="tanh", dtype=dtype)
    return keras.Sequential([keras.Input((64,)), hidden, keras.layers.Dense(10, dtype=dtype)])


def fit(model: keras.Model, optimizer: keras.optimizers.Optimizer, epochs: int = 1, **kwargs: Any) -> keras.Model:
    model.compile(optimizer, CROSS_ENTROPY, **kwargs)
    data = datasets.digits()
    model.fit(data.x_train, data.y_train, epochs=epochs, shuffle=False, verbose=0)
    return model


def norm(tensors: list[np.ndarray]) -> float:
    return math.sqrt(sum(float((tensor**2).sum()) for tensor in tensors))


def apply(optimizer: keras.optimizers.Optimizer, gradient: list[float], weight: keras.Variable) -> None:
    optimizer.apply([ops.convert_to_tensor(gradient, dtype=weight.dtype)], [weight])


# Figures


def test_figure_of_the_trace() -> None:
    """The bars are those that Python's own profiler sees in a training step of Keras's SGD."""
    model, events = network(), []
    model.compile(keras.optimizers.SGD(0.5), CROSS_ENTROPY, run_eagerly=True)
    names = {"train_step": model, "call": model, "compute_loss": model}
    names |= dict.fromkeys(["apply", "build", "update_step"], model.optimizer)

    def profile(frame: Any, event: str, _: Any) -> None:
        name = frame.f_code.co_name
        if event not in ("call", "return") or frame.f_locals.get("self") is not names.get(name, frame):
            return
        caller = frame.f_back
        while caller and not (caller.f_code.co_name == name and caller.f_locals.get("self") is names[name]):
            caller = caller.f_back
        if caller is None:  # not a method that its own subclass called
            variable = frame.f_locals.get("variable")
            shape = "" if name != "update_step" else " " + "×".join(map(str, variable.shape))
            events.append((event, name + shape))

    data = datasets.digits()
    sys.setprofile(profile)
    try:
        model.fit(data.x_train[:32], data.y_train[:32], batch_size=32, verbose=0)
    finally:
        sys.setprofile(None)
    first = events.index(("call", "train_step"))
    events = events[first : events.index(("return", "train_step")) + 1]

    expected = [
        (name, [entered, events.index(("return", name))])
        for entered, (event, name) in enumerate(events)
        if event == "call"
    ]
    [axes] = figure_data("01")[0]
    assert [(bar["label"], bar["x"]) for bar in axes["lines"]] == expected
    assert [bar["y"] for bar in axes["lines"]] == [[row, row] for row in range(len(expected))]


def losses_in_numpy(rate: float, updates: int = 60, batch: int = 144) -> np.ndarray:
    """The training loss of the chapter's network after each update: forward and backward pass written out."""
    data = datasets.digits("float64")
    x, y = data.x_train, data.y_train
    weights = [value.astype("float64") for value in network("float64").get_weights()]
    losses = []
    for update in range(updates + 1):
        losses.append(loss_and_gradient(weights, x, y)[0])
        rows = np.arange(update * batch, (update + 1) * batch) % len(x)
        gradient = loss_and_gradient(weights, x[rows], y[rows])[1]
        weights = [w - rate * g for w, g in zip(weights, gradient, strict=True)]
    return np.array(losses)


def test_figure_of_the_losses() -> None:
    above, below = figure_data("01")[1]
    # Keras keeps the learning rate in float32.
    exact, off = (losses_in_numpy(float(np.float32(rate))) for rate in (0.1, 0.1 * (1 + 1e-6)))
    for label in ("companion.SGD", "keras.optimizers.SGD"):
        np.testing.assert_allclose(line(above, label)[1], exact, rtol=1e-5)
    assert not line(below, "companion.SGD")[1].any()
    found = line(below, "learning rate off by a millionth")[1]
    np.testing.assert_allclose(found, 1e6 * (off - exact), atol=1e-4)
    assert found.min() == pytest.approx(-0.7, abs=0.05)  # as its alt text says


def test_figure_of_the_quadratics() -> None:
    near, far = figure_data("01")[2]
    for curvature, axes, points in (
        (1, near, near["points"][0]),
        (6, near, near["points"][1]),
        (9, far, far["points"][0]),
    ):
        expected = [(1 - 0.25 * curvature) ** k for k in range(9)]
        np.testing.assert_allclose(line(axes, f"λ = {curvature}")[1], expected, rtol=1e-5)
        np.testing.assert_allclose(np.array(points), list(enumerate(expected)), rtol=1e-5)


def test_figure_of_the_norms() -> None:
    """A linear softmax classifier in NumPy, float64, with the gradient in closed form."""
    data, bound, decay = datasets.digits("float64"), 0.75, 0.1
    x, labels = data.x_train.copy(), np.eye(10)[data.y_train]
    x[720:744] *= 16
    kernel, bias = np.zeros((64, 10)), np.zeros(10)
    raw, clipped, steps = [], [], []
    for rows in np.arange(1440).reshape(60, 24):
        error = (softmax(x[rows] @ kernel + bias) - labels[rows]) / 24
        gradient = [x[rows].T @ error, error.sum(axis=0)]
        raw.append(norm(gradient))
        gradient = [part * min(1, bound / raw[-1]) for part in gradient]
        clipped.append(norm(gradient))
        step = [gradient[0] + decay * kernel, gradient[1] + decay * bias]
        steps.append(norm(step))
        kernel, bias = kernel - step[0], bias - step[1]
    above, below = figure_data("01")[3]
    np.testing.assert_allclose(line(above, "raw gradient")[1], raw, rtol=1e-3)
    np.testing.assert_allclose(line(above, "clipped gradient")[1], clipped, rtol=1e-3)
    np.testing.assert_allclose(line(below, "clipped gradient")[1], clipped, rtol=1e-3)
    np.testing.assert_allclose(line(below, "weight change / h")[1], steps, rtol=1e-3)
    # The chapter counts these. No step is so close to the bound that another processor could count otherwise.
    surplus = np.array(steps[1:]) - bound
    assert (surplus > 0).sum() == 17
    assert np.abs(surplus).min() > 5e-5
    assert np.sum(np.array(steps) < np.array(clipped)) == 42


def test_figure_of_the_schedule() -> None:
    [axes] = figure_data("01")[4]
    expected = [k / 30 if k < 15 else 0.5 * math.cos(math.pi * (k - 15) / 90) ** 2 for k in range(61)]
    np.testing.assert_allclose(line(axes, "formula")[1], expected, atol=1e-6)
    np.testing.assert_allclose(line(axes, "measured")[1], expected[:60], atol=1e-6)
    schedule = keras.optimizers.schedules.CosineDecay(0.0, 45, warmup_target=0.5, warmup_steps=15)
    assert [float(schedule(k)) for k in (60, 61, 1000)] == [0, 0, 0]


# Claims


@pytest.mark.claim(
    "The 96 weights that `fit` left alone belong to the three pixels that are blank in every training image, each "
    "pixel tied to 32 units.",
    chapter="01",
)
def test_weights_of_blank_pixels_do_not_move() -> None:
    model = network()
    before = model.get_weights()
    fit(model, keras.optimizers.SGD(0.5))
    changed = [old != new for old, new in zip(before, model.get_weights(), strict=True)]
    inked = datasets.digits().x_train.max(axis=0) > 0
    assert ((~inked).sum(), sum((~part).sum() for part in changed)) == (3, 96)
    assert np.array_equal(changed[0], np.repeat(inked[:, None], 32, axis=1))
    assert all(part.all() for part in changed[1:])


class Counting(companion.SGD):
    """Counts the calls of its Python."""

    calls = 0

    def update_step(self, gradient: Any, variable: Any, learning_rate: Any) -> None:
        self.calls += 1
        super().update_step(gradient, variable, learning_rate)


@pytest.mark.claim(
    "By default the Python of `update_step` runs only while TensorFlow traces the step, here once for each weight "
    "tensor. The weights change at every batch.",
    chapter="01",
)
def test_python_runs_only_while_tracing() -> None:
    model, seen = network(), [np.zeros(1)]
    model.compile(Counting(0.5), CROSS_ENTROPY)
    note = keras.callbacks.LambdaCallback(on_train_batch_end=lambda batch, logs: seen.append(model.get_weights()[0]))
    data = datasets.digits()
    model.fit(data.x_train, data.y_train, epochs=2, verbose=0, callbacks=[note])
    assert model.optimizer.calls == 4
    assert len(seen) == 91
    assert all((old != new).any() for old, new in itertools.pairwise(seen))


@pytest.mark.claim(
    'A metric given by name, as in `metrics=["accuracy"]`, brings a second trace and doubles the calls of '
    "`update_step`; a metric object does not.",
    chapter="01",
)
def test_a_metric_brings_a_second_trace() -> None:
    metrics = ["accuracy"], [keras.metrics.SparseCategoricalAccuracy()], None
    by_name, by_object, without = (fit(network(), Counting(0.5), metrics=metric) for metric in metrics)
    assert [model.optimizer.calls for model in (by_name, by_object, without)] == [8, 4, 4]
    for one, other in zip(by_name.get_weights(), without.get_weights(), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5)


@pytest.mark.claim(
    "On a CPU, `companion.SGD` and `keras.optimizers.SGD` give the same weights, to the last bit.", chapter="01"
)
@pytest.mark.parametrize("error", [0, pytest.param(1e-6, marks=pytest.mark.xfail(strict=True, raises=AssertionError))])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_same_weights_as_keras(dtype: str, error: float) -> None:
    ours = fit(network(dtype), companion.SGD(0.1 * (1 + error)))
    theirs = fit(network(dtype), keras.optimizers.SGD(0.1))
    for one, other in zip(ours.get_weights(), theirs.get_weights(), strict=True):
        assert one.dtype == dtype
        assert np.array_equal(one, other)


class Restless(companion.SGD):
    """Has something else to go by: a source of random numbers."""

    def update_step(self, gradient: Any, variable: Any, learning_rate: Any) -> None:
        super().update_step(gradient + 1e-3 * keras.random.normal(variable.shape), variable, learning_rate)


@pytest.mark.claim(
    "Given the same start and the same gradients, an optimizer makes the same steps, for the gradients are all that it "
    "knows of the loss.",
    chapter="01",
)
@pytest.mark.parametrize(
    "optimizer_class",
    [
        companion.SGD,
        companion.Momentum,
        companion.Adam,
        keras.optimizers.SGD,
        keras.optimizers.Adam,
        pytest.param(Restless, marks=pytest.mark.xfail(strict=True, raises=AssertionError)),
    ],
)
def test_replayed_answers_give_the_same_steps(optimizer_class: type) -> None:
    answers: list[list[np.ndarray]] = []

    class Recording(optimizer_class):  # type: ignore[misc]
        def apply(self, grads: Any, trainable_variables: Any = None) -> None:
            answers.append([np.array(gradient) for gradient in grads])
            super().apply(grads, trainable_variables)

    model = network()
    start = model.get_weights()
    data = datasets.digits()
    model.compile(Recording(0.01), CROSS_ENTROPY, run_eagerly=True)
    model.fit(data.x_train[:320], data.y_train[:320], verbose=0)

    variables, replaying = [keras.Variable(value) for value in start], optimizer_class(0.01)
    for answer in answers:
        replaying.apply(answer, variables)
    assert len(answers) == 10
    for variable, weight in zip(variables, model.get_weights(), strict=True):
        assert np.array_equal(variable.numpy(), weight)


OPERATIONS = ["unscale", "clip", "decay", "rule", "average", "overwrite", "constrain", "count"]
RATES, SCALE, BOUND, DECAY, BETA, EVERY = np.array([1.0, 0.5, 0.25, 0.25]), 8.0, 2.0, 0.5, 0.75, 2
START, GRADIENTS = [0.5, 1.0, -0.25], [[32.0, 4.0, -8.0], [-4.0, 24.0, 8.0], [12.0, -2.0, -64.0]]


def all_at_once(orders: np.ndarray) -> np.ndarray:
    """Weight and average after each update, for every order side by side: ``(orders, updates, 2, weights)``."""
    number = len(orders)
    weight, average = np.tile(START, (number, 1)), np.zeros((number, 3))
    count, seen = np.zeros(number, dtype=int), []
    for answer in GRADIENTS:
        gradient = np.tile(answer, (number, 1))
        for place in range(8):
            rate = RATES[count][:, None]
            first, due = (count == 0)[:, None], ((count + 1) % EVERY == 0)[:, None]
            results = {
                "unscale": (gradient / SCALE, weight, average),
                "clip": (np.clip(gradient, -BOUND, BOUND), weight, average),
                "decay": (gradient, weight - rate * DECAY * weight, average),
                "rule": (gradient, weight - rate * gradient, average),
                "average": (gradient, weight, np.where(first, weight, BETA * average + (1 - BETA) * weight)),
                "overwrite": (gradient, np.where(due, average, weight), average),
                "constrain": (gradient, np.maximum(weight, 0), average),
                "count": (gradient, weight, average),
            }
            now = orders[:, place]
            picked = [np.choose(now[:, None], [results[name][i] for name in OPERATIONS]) for i in range(3)]
            gradient, weight, average = picked
            count = count + (now == OPERATIONS.index("count"))
        seen.append(np.stack([weight, average], axis=1))
    return np.stack(seen, axis=1)


def observed_in_keras() -> np.ndarray:
    """The same for Keras's own SGD."""
    weight = keras.Variable(START)
    weight.constraint = keras.constraints.NonNeg()
    optimizer = keras.optimizers.SGD(
        learning_rate=keras.optimizers.schedules.PiecewiseConstantDecay([0, 1], RATES[:3].tolist()),
        loss_scale_factor=SCALE,
        clipvalue=BOUND,
        weight_decay=DECAY,
        use_ema=True,
        ema_momentum=BETA,
        ema_overwrite_frequency=EVERY,
    )
    seen = []
    for gradient in GRADIENTS:
        apply(optimizer, gradient, weight)
        seen.append([weight.numpy(), optimizer.variables[-1].numpy()])
    return np.array(seen)


@pytest.mark.claim("Of all 40,320 orders of the eight operations of an update, six give Keras's numbers.", chapter="01")
def test_six_orders_give_the_numbers_of_keras() -> None:
    orders = np.array(list(itertools.permutations(range(8))))
    matching = orders[(all_at_once(orders) == observed_in_keras()).all(axis=(1, 2, 3))]
    names = {tuple(OPERATIONS[i] for i in order) for order in matching}
    middle = ("rule", "average", "overwrite")
    starts = set(itertools.permutations(OPERATIONS[:3]))
    starts = {start for start in starts if start.index("unscale") < start.index("clip")}
    assert names == {
        (*start, *middle, *end) for start in starts for end in (("constrain", "count"), ("count", "constrain"))
    }
    assert (len(orders), len(names)) == (40320, 6)


@pytest.mark.claim("The moving average is taken before the constraint, so it may break the constraint.", chapter="01")
@pytest.mark.parametrize(
    "order",
    [
        tuple(OPERATIONS),
        *(
            wrong(tuple(names.split()), why=why)
            for names, why in (
                ("unscale clip decay rule constrain average overwrite count", "constrained, then averaged"),
                ("clip unscale decay rule average overwrite constrain count", "clipped while it is scaled"),
                ("unscale clip rule decay average overwrite constrain count", "the rule, then the decay"),
                ("count unscale clip decay rule average overwrite constrain", "counted first"),
            )
        ),
    ],
)
def test_order(order: tuple[str, ...]) -> None:
    expected = all_at_once(np.array([[OPERATIONS.index(name) for name in order]]))[0]
    assert np.array_equal(observed_in_keras(), expected)
    assert (expected[:, 0] >= 0).all()
    assert (expected[:, 1] < 0).any()


@pytest.mark.claim(
    "At the end of `fit` with `use_ema=True`, Keras replaces the weights by their average and applies no constraint "
    "to it.",
    chapter="01",
)
def test_fit_with_an_average_breaks_the_constraint() -> None:
    layer = keras.layers.Dense(10, kernel_initializer="zeros", kernel_constraint="non_neg")
    optimizer = keras.optimizers.SGD(0.5, use_ema=True, ema_momentum=0.9)
    lowest: list[float] = []
    note = keras.callbacks.LambdaCallback(
        on_train_batch_end=lambda batch, logs: lowest.append(float(layer.kernel.numpy().min()))
    )
    model = keras.Sequential([keras.Input((64,)), layer])
    model.compile(optimizer, CROSS_ENTROPY)
    data = datasets.digits()
    model.fit(data.x_train, data.y_train, verbose=0, callbacks=[note])
    average = next(variable for variable in optimizer.variables if "kernel_average" in variable.path)
    assert min(lowest) == 0
    assert np.array_equal(layer.kernel.numpy(), average.numpy())
    assert layer.kernel.numpy().min() < -1e-3
    layer.kernel.assign(layer.kernel_constraint(layer.kernel))  # the chapter's remedy
    assert layer.kernel.numpy().min() == 0


@pytest.mark.claim("Clipping bounds the gradient, not the step", chapter="01")
@pytest.mark.parametrize("clipping", ["clipnorm", "global_clipnorm", "clipvalue"])
def test_a_step_may_be_longer_than_the_bound(clipping: str) -> None:
    weight = keras.Variable([2.0])
    apply(keras.optimizers.SGD(0.5, weight_decay=0.25, **{clipping: 1.0}), [8.0], weight)
    assert (2.0 - weight.numpy()[0]) / 0.5 == 1 + 0.25 * 2


@keras.saving.register_keras_serializable(package="test_chapter_01")
class Halving(keras.optimizers.schedules.LearningRateSchedule):
    """1, 1/2, 1/4, …, and ``late`` updates ahead of it."""

    def __init__(self, late: int = 0) -> None:
        self.late = late

    def __call__(self, step: Any) -> Any:
        return 0.5 ** ops.cast(step + self.late, "float32")

    def get_config(self) -> dict[str, Any]:
        return {"late": self.late}


@pytest.mark.claim(
    "A schedule is a function of the update's number: without accumulation, Keras evaluates it at "
    "`optimizer.iterations`, once for each update.",
    chapter="01",
)
@pytest.mark.claim("The count comes after the rule, so the first update has number zero.", chapter="01")
@pytest.mark.parametrize("late", [0, pytest.param(1, marks=pytest.mark.xfail(strict=True))])
@pytest.mark.parametrize("optimizer_class", [companion.SGD, keras.optimizers.SGD])
def test_schedule_is_read_before_the_count(optimizer_class: type, late: int) -> None:
    weight, optimizer = keras.Variable([0.0]), optimizer_class(Halving(late))
    for expected in (1.0, 1.5, 1.75, 1.875):
        apply(optimizer, [-1.0], weight)
        assert weight.numpy()[0] == expected


@pytest.mark.claim(
    "The first update of a warm-up from zero moves no weight: its number is zero, and so is its learning rate.",
    chapter="01",
)
@pytest.mark.parametrize("initial", [0.0, pytest.param(0.1, marks=pytest.mark.xfail(strict=True))])
def test_first_update_of_a_warm_up(initial: float) -> None:
    schedule = keras.optimizers.schedules.CosineDecay(initial, 10, warmup_target=0.5, warmup_steps=5)
    weight, optimizer = keras.Variable([1.0]), keras.optimizers.SGD(schedule)
    apply(optimizer, [3.0], weight)
    assert weight.numpy()[0] == 1.0
    apply(optimizer, [3.0], weight)
    assert weight.numpy()[0] == pytest.approx(1.0 - 3 * 0.1)


@pytest.mark.claim(
    "Training saved after 90 updates, loaded and continued ends at the same weights, to the last bit.", chapter="01"
)
@pytest.mark.parametrize(
    "forget", [False, pytest.param(True, marks=pytest.mark.xfail(strict=True, raises=AssertionError))]
)
def test_resumed_is_uninterrupted(tmp_path: pathlib.Path, forget: bool) -> None:
    schedule = keras.optimizers.schedules.CosineDecay(0.5, 180)
    uninterrupted = fit(network(), companion.SGD(schedule), epochs=4)
    fit(network(), companion.SGD(schedule), epochs=2).save(tmp_path / "half.keras")
    resumed = keras.saving.load_model(tmp_path / "half.keras")
    assert [int(variable.numpy()) for variable in resumed.optimizer.variables] == [90]
    if forget:
        resumed.optimizer.variables[0].assign(0)
    data = datasets.digits()
    resumed.fit(data.x_train, data.y_train, epochs=2, shuffle=False, verbose=0)
    for one, other in zip(uninterrupted.get_weights(), resumed.get_weights(), strict=True):
        assert np.array_equal(one, other)


@pytest.mark.claim(
    "`SGD(1.0, clipnorm=0.05)` moves each tensor by 0.05 wherever its gradient is longer than that, and by less "
    "wherever it is shorter.",
    chapter="01",
)
@pytest.mark.parametrize(
    "clipping",
    ["clipnorm", pytest.param("global_clipnorm", marks=pytest.mark.xfail(strict=True, raises=AssertionError))],
)
def test_clipping_normalises_long_gradients(clipping: str) -> None:
    gradients = [[3.0, 4.0], [0.06, 0.08], [300.0, -400.0], [0.003, 0.004]]
    weights = [keras.Variable([0.0, 0.0]) for _ in gradients]
    optimizer = companion.SGD(1.0, **{clipping: 0.05})
    optimizer.apply([ops.convert_to_tensor(gradient) for gradient in gradients], weights)
    lengths = [np.linalg.norm(weight.numpy()) for weight in weights]
    np.testing.assert_allclose(lengths, [0.05, 0.05, 0.05, 0.005], rtol=1e-5)


@pytest.mark.claim("A second `fit` goes on counting where the first stopped.", chapter="01")
def test_iterations_over_two_fits() -> None:
    model = network()
    model.compile(companion.SGD(0.5), CROSS_ENTROPY)
    data = datasets.digits()
    counts = []
    for epochs in (3, 1):
        model.fit(data.x_train, data.y_train, batch_size=64, epochs=epochs, verbose=0)
        counts.append(int(model.optimizer.iterations))
    assert counts == [3 * math.ceil(1440 / 64), 4 * math.ceil(1440 / 64)]


@pytest.mark.claim(
    "Under the policy `mixed_float16` the weights stay float32, so there LARS needs no cast.", chapter="01"
)
@pytest.mark.parametrize("policy", ["mixed_float16", pytest.param("float16", marks=pytest.mark.xfail(strict=True))])
def test_a_missing_cast_in_mixed_precision(policy: str) -> None:
    class Draft(keras.optimizers.Optimizer):
        def update_step(self, gradient: Any, variable: Any, learning_rate: Any) -> None:
            ratio = ops.norm(variable) / (ops.norm(gradient) + 1e-8)
            variable.assign_sub(learning_rate * ratio * gradient)

    model = network(policy)
    assert {variable.dtype for variable in model.variables} == {"float32"}
    before = model.get_weights()
    fit(model, Draft(0.05))
    assert (model.get_weights()[0] != before[0]).any()
    assert all(np.isfinite(value).all() for value in model.get_weights())
