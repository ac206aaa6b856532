"""Holds `companion.diagnostics` against NumPy: what `fit` shows, in every mode, and which gradient broke first."""

import functools
from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf

import companion
from companion import datasets
from companion.accumulation import GradientAccumulation
from companion.injection import InjectedModel, eject, inject
from companion.runge_kutta import RK23, Heun
from tests.kit import cases as kit
from tests.kit.dtypes import set_dtype
from tests.kit.network import flat, forward, loss_and_gradient, softmax
from tests.kit.processes import on_devices
from tests.kit.ready import ready

L, P = keras.layers, keras.optimizers
DIALS = ("gradient_norm", "update_ratio", "noise_scale")
GENERATOR = np.random.default_rng(0)
X = GENERATOR.normal(size=(40, 5))
CLASSES = X[:, :3].argmax(axis=1)  # something to learn: the gradient is not lost in noise
pytestmark = pytest.mark.usefixtures("float64")


def network(optimizer: Any = None, constraint: Any = None, **options: Any) -> Any:
    keras.utils.set_random_seed(0)
    layers = [L.Dense(4, "tanh", kernel_constraint=constraint, name="hidden"), L.Dense(3, name="top")]
    model = keras.Sequential([keras.Input((5,)), *layers])
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(optimizer or P.SGD(0.5), loss, **{"jit_compile": False, **options})
    return ready(model)


def gradient(weights: Any, rows: Any = slice(None), x: Any = X, y: Any = CLASSES) -> np.ndarray:
    return flat(loss_and_gradient(weights, x[rows], y[rows])[1])


def shown(model: Any, rows: Any = slice(None), x: Any = X, y: Any = CLASSES) -> dict[str, float]:
    return model.train_on_batch(x[rows], y[rows], return_dict=True)


def moved(before: Any, after: Any) -> float:
    return float(np.linalg.norm(flat(after) - flat(before)) / np.linalg.norm(flat(before)))


# What is measured, by hand


def estimates(weights: Any, parts: list[slice]) -> tuple[float, float]:
    """The trace of the covariance of one example's gradient, and the squared norm of the true one."""
    sizes = np.array([len(X[part]) for part in parts])
    each = np.array([gradient(weights, part) for part in parts])
    mean = sizes @ each / sizes.sum()
    trace = sizes @ ((each - mean) ** 2).sum(axis=1) / (len(parts) - 1)
    return trace, mean @ mean - trace / sizes.sum()


def alike(weights: Any, parts: list[slice]) -> tuple[float, float]:
    """As if all parts were of one size, those of the whole over their number."""
    size = sum(len(X[part]) for part in parts) / len(parts)
    each = np.array([gradient(weights, part) for part in parts])
    small, big = (each**2).sum(axis=1).mean(), (each.mean(axis=0) ** 2).sum()
    return (small - big) / (1 / size - 1 / size / len(parts)), (len(parts) * big - small) / (len(parts) - 1)


def quotient_of_means(found: list[tuple[float, float]]) -> float:
    return float(np.divide(*np.mean(found, axis=0)))


def mean_of_quotients(found: list[tuple[float, float]]) -> float:
    return float(np.mean([trace / squared for trace, squared in found]))


PARTS = [[slice(i, min(i + 4, end)) for i in range(end - 14, end, 4)] for end in (14, 28)]


@functools.cache
def two_steps() -> tuple[dict[str, list[float]], list[Any]]:
    """Clipping, decay and a constraint on; parts of 4, 4, 4 and 2 examples. The history, and weights around steps."""
    set_dtype("float64")
    optimizer = P.SGD(0.5, momentum=0.9, global_clipnorm=0.3, weight_decay=0.01)
    model = inject(network(optimizer, keras.constraints.MaxNorm(0.9)), 4, diagnostics=DIALS)
    weights = [model.get_weights()]
    watch = keras.callbacks.LambdaCallback(on_train_batch_end=lambda *_, **__: weights.append(model.get_weights()))
    log = model.fit(X[:28], CLASSES[:28], 14, shuffle=False, verbose=0, callbacks=[watch]).history
    return log, weights


def test_norm_and_ratio_are_what_numpy_says() -> None:
    log, weights = two_steps()
    norms = [np.linalg.norm(gradient(weights[k], slice(14 * k, 14 * k + 14))) for k in (0, 1)]
    assert log["gradient_norm"] == pytest.approx([np.mean(norms)], rel=1e-12)
    assert log["update_ratio"] == pytest.approx([np.mean([moved(*weights[k : k + 2]) for k in (0, 1)])], rel=1e-12)


EVERY = [rule for rule in vars(P).values() if isinstance(rule, type) and issubclass(rule, P.Optimizer)]
EVERY = [rule for rule in EVERY if rule.__name__ not in ("Optimizer", "LossScaleOptimizer", "MultiOptimizer")]
EVERY += [companion.Momentum, companion.Adam, companion.Lion, companion.Muon, companion.ScheduleFreeAdamW, Heun, RK23]


@pytest.mark.parametrize("rule", kit.thinned(dict.fromkeys(EVERY), P.Adam, companion.Muon, Heun))
def test_every_optimizer_is_heard(rule: Any) -> None:
    model = inject(network(rule(), run_eagerly=True), 4, diagnostics=DIALS)
    before = model.get_weights()
    log = shown(model)
    assert log["gradient_norm"] == pytest.approx(np.linalg.norm(gradient(before)), rel=1e-9)
    assert log["update_ratio"] == pytest.approx(moved(before, model.get_weights()), rel=1e-9)
    assert log["noise_scale"] > 0


def test_groups_are_heard_in_a_file_and_on_the_screen(tmp_path: Any, capsys: Any) -> None:
    groups = companion.ParameterGroups(P.SGD(0.5), {"bias": 0.1, "top/kernel": P.Adam(0.01)})
    model = inject(network(groups, run_eagerly=True), 4, diagnostics=DIALS)
    before = model.get_weights()
    logger = keras.callbacks.CSVLogger(tmp_path / "log.csv")
    log = model.fit(X, CLASSES, 40, epochs=1, callbacks=[logger], verbose=2).history
    assert log["gradient_norm"] == pytest.approx([np.linalg.norm(gradient(before))], rel=1e-9)
    assert log["update_ratio"] == pytest.approx([moved(before, model.get_weights())], rel=1e-9)
    names, numbers = (line.split(",") for line in (tmp_path / "log.csv").read_text().splitlines())
    written, said = dict(zip(names, numbers, strict=True)), capsys.readouterr().out
    for name in DIALS:
        assert float(written[name]) == log[name][0]
        assert f"{name}: {log[name][0]:.4f}" in said


@pytest.mark.parametrize(
    ("of_step", "of_steps"),
    [
        (estimates, quotient_of_means),
        kit.wrong(alike, quotient_of_means, why="the last part is smaller"),
        kit.wrong(estimates, mean_of_quotients, why="a mean of quotients is biased"),
    ],
)
def test_noise_scale_is_what_numpy_says(of_step: Any, of_steps: Any) -> None:
    log, weights = two_steps()
    expected = of_steps([of_step(*each) for each in zip(weights, PARTS, strict=False)])
    assert log["noise_scale"] == pytest.approx([expected if expected > 0 else np.inf], rel=1e-9)
    assert np.isfinite(log["noise_scale"][0])


def test_noise_scale_is_the_exact_trace_over_the_squared_gradient_on_digits() -> None:
    """Softmax regression, whose gradient for one example is a product; the weights stand still."""
    data = datasets.digits("float64")
    x, y = data.x_train, data.y_train
    keras.utils.set_random_seed(3)
    model = keras.Sequential([keras.Input((64,)), L.Dense(10)])
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(P.SGD(0.0), loss, jit_compile=False)
    weights = model.get_weights()
    error = softmax(forward(weights, x)[-1]) - np.eye(10)[y]
    squares = ((x**2).sum(axis=1) + 1) * (error**2).sum(axis=1)  # of the gradient of each example
    exact = gradient(weights, x=x, y=y)
    trace = squares.mean() - exact @ exact
    drawn = np.random.default_rng(0).integers(0, len(x), 300 * 96)  # with replacement, as the theory has it
    log = inject(model, 8, diagnostics=["noise_scale"]).fit(x[drawn], y[drawn], 96, verbose=0).history
    assert log["noise_scale"] == pytest.approx([trace / (exact @ exact)], rel=0.05)


def test_one_number_for_each_layer() -> None:
    keras.utils.set_random_seed(0)
    hidden = L.Dense(4, "tanh", name="hidden")(inputs := keras.Input((5,)))
    model = keras.Model(inputs, [L.Dense(3, name="top")(hidden), L.Dense(2, name="aside")(hidden)])
    model.compile(P.SGD(0.5), [keras.losses.SparseCategoricalCrossentropy(from_logits=True), None], jit_compile=False)
    names = tuple(f"{name}_per_layer" for name in DIALS)
    inject(model, 2, diagnostics=names)
    before = model.get_weights()
    with pytest.warns(UserWarning, match="do not exist for variables"):
        log = shown(model)
    change = [new - old for new, old in zip(model.get_weights(), before, strict=True)]
    whole = gradient(before[:4])
    sizes = {"hidden": slice(0, 24), "top": slice(24, 39)}
    for index, (name, place) in enumerate(sizes.items()):
        old, new = flat(before[2 * index : 2 * index + 2]), flat(change[2 * index : 2 * index + 2])
        assert log[f"gradient_norm/{name}"] == pytest.approx(np.linalg.norm(whole[place]))
        assert log[f"update_ratio/{name}"] == pytest.approx(np.linalg.norm(new) / np.linalg.norm(old))
        halves = [gradient(before[:4], slice(*ends))[place] for ends in ((0, 20), (20, 40))]
        trace = 20 * sum(((half - whole[place]) ** 2).sum() for half in halves)
        assert log[f"noise_scale/{name}"] == pytest.approx(trace / ((whole[place] ** 2).sum() - trace / 40))
    assert log["gradient_norm/aside"] == log["update_ratio/aside"] == 0.0  # the loss does not depend on it
    assert np.isnan(log["noise_scale/aside"])


# Every mode and every optimizer


MODES: dict[str, dict[str, Any]] = {
    "XLA": {"jit_compile": True},
    "eager": {"run_eagerly": True},
    "two steps in one": {"steps_per_execution": 2},
}


def epochs(**options: Any) -> Any:
    model = inject(network(P.Adam(0.02), metrics=["accuracy"], **options), 3, diagnostics=DIALS)
    fit = {"batch_size": 12, "epochs": 2, "shuffle": False, "verbose": 0}
    return model, model.fit(X[:36], CLASSES[:36], **fit, validation_data=(X[:12], CLASSES[:12])).history


in_a_graph = functools.cache(epochs)


@pytest.mark.parametrize("mode", MODES.values(), ids=MODES)
def test_every_mode_shows_the_same(mode: dict[str, Any]) -> None:
    (model, found), (_, expected) = epochs(**mode), in_a_graph()
    assert found.keys() == expected.keys() == {"loss", "accuracy", "val_loss", "val_accuracy", *DIALS}
    for name, values in found.items():
        np.testing.assert_allclose(values, expected[name], rtol=1e-9, err_msg=name)
    if model.run_eagerly:  # nothing is reset between these two
        shown(model)
        assert model.test_on_batch(X, CLASSES, return_dict=True).keys() == {"loss", "accuracy"}


def test_without_diagnostics_the_step_holds_no_operation_of_theirs() -> None:
    def operations(*calls: dict[str, Any]) -> list[str]:
        model = network(P.Adam())
        for options in calls:
            inject(model, **options)
        model.optimizer.build(model.trainable_variables)
        step = tf.function(lambda x, y: model.train_step((x, y)), autograph=False)
        graph = step.get_concrete_function(tf.constant(X), tf.constant(CLASSES)).graph
        return [operation.type for operation in graph.get_operations()]

    listening = {"diagnostics": DIALS[:2], "check_finite": True}
    plain = operations({})
    assert operations(listening, {}) == plain == operations({"diagnostics": ()})
    assert len(operations({"diagnostics": DIALS[:1]})) > len(plain)


@pytest.mark.parametrize("optimizer", [lambda: P.Adam(0.1, clipnorm=0.01), lambda: Heun(0.5)], ids=["clipped", "Heun"])
def test_gradient_norm_is_of_the_first_answer_before_clipping(optimizer: Any) -> None:
    model = inject(network(optimizer()), diagnostics="gradient_norm")
    expected = np.linalg.norm(gradient(model.get_weights()))
    assert shown(model)["gradient_norm"] == pytest.approx(expected)


def test_a_rejected_step_has_no_update() -> None:
    model = inject(network(RK23(0.5, atol=1e-30, rtol=1e-30)), diagnostics=DIALS[:2])
    log = shown(model)
    assert log["update_ratio"] == 0.0 < log["gradient_norm"]


def test_update_ratio_is_a_mean_over_updates() -> None:
    model = inject(network(GradientAccumulation(P.SGD(0.5), 2)), diagnostics=DIALS[:2])
    before = model.get_weights()
    assert shown(model, slice(0, 10))["update_ratio"] == 0.0
    assert shown(model, slice(10, 20))["update_ratio"] == pytest.approx(moved(before, model.get_weights()))
    before = model.get_weights()
    log = model.fit(X[:20], CLASSES[:20], 10, shuffle=False, verbose=0).history
    assert log["update_ratio"] == pytest.approx([moved(before, model.get_weights())])
    norms = [np.linalg.norm(gradient(before, slice(i, i + 10))) for i in (0, 10)]
    assert log["gradient_norm"] == pytest.approx([np.mean(norms)])


def test_weights_that_begin_at_zero_have_moved_by_one() -> None:
    model = network()
    model.set_weights([0 * weight for weight in model.get_weights()])
    assert shown(inject(model, diagnostics="update_ratio"))["update_ratio"] == 1.0


def test_loss_scaling_is_taken_out_and_an_overflow_does_not_count() -> None:
    model = keras.Sequential([keras.Input((5,)), L.Dense(3, kernel_initializer="zeros")])
    optimizer = P.LossScaleOptimizer(P.SGD(0.5), initial_scale=2.0**100)
    model.compile(optimizer, keras.losses.SparseCategoricalCrossentropy(from_logits=True), jit_compile=False)
    inject(model, 2, diagnostics=DIALS, check_finite=True)
    x = np.concatenate([X, 1e300 * X])
    expected = np.linalg.norm(gradient(model.get_weights()))
    assert np.isnan(shown(model, slice(40, 80), x, np.tile(CLASSES, 2))["gradient_norm"])  # there is nothing to show
    assert not np.any(model.get_weights()[0])
    assert float(optimizer.dynamic_scale) == 2.0**99
    log = model.fit(x[::-1], np.tile(CLASSES, 2)[::-1], 40, shuffle=False, verbose=0).history
    assert log["gradient_norm"] == pytest.approx([expected])
    assert np.isfinite(log["noise_scale"]).all()


def test_sparse_gradients_stay_sparse() -> None:
    seen = []

    @keras.saving.register_keras_serializable("test_diagnostics")
    class Seeing(P.SGD):
        def update_step(self, gradient: Any, variable: Any, learning_rate: Any) -> None:
            seen.append(type(gradient))
            super().update_step(gradient, variable, learning_rate)

    keras.utils.set_random_seed(0)
    model = keras.Sequential([keras.Input((4,), dtype="int32"), L.Embedding(9, 3), L.Flatten(), L.Dense(3)])
    model.compile(Seeing(0.1), keras.losses.SparseCategoricalCrossentropy(from_logits=True), jit_compile=False)
    ids = GENERATOR.integers(0, 4, (20, 4))
    table, kernel, bias = model.get_weights()
    into = table[ids].reshape(20, 12)
    error = (softmax(into @ kernel + bias) - np.eye(3)[CLASSES[:20]]) / 20

    def norms(rows: slice) -> float:
        of_table = np.zeros_like(table)
        np.add.at(of_table, ids[rows], (error[rows] @ kernel.T).reshape(-1, 4, 3))
        return sum((g**2).sum() for g in (of_table, into[rows].T @ error[rows], error[rows].sum(axis=0)))

    inject(model, 2, diagnostics=DIALS)
    log = shown(model, x=ids, y=CLASSES[:20])
    whole = norms(slice(None))
    trace = 20 * (20 * sum(norms(rows) for rows in (slice(0, 10), slice(10, 20))) / 10 - whole)
    assert seen[0] is tf.IndexedSlices
    assert log["gradient_norm"] == pytest.approx(np.sqrt(whole))
    squared = whole - trace / 20
    assert log["noise_scale"] == pytest.approx(trace / squared if squared > 0 else np.inf)


def test_replicas_show_what_one_device_shows() -> None:
    program = """
import keras, numpy as np
from companion import inject
keras.config.set_floatx("float64")
x, y = np.random.default_rng(0).normal(size=(24, 5)), np.arange(24.0)[:, None] % 3
def train(parts, strategy):
    keras.utils.set_random_seed(0)
    with strategy.scope():
        layers = [keras.layers.Dense(4, "tanh", name="a"), keras.layers.Dense(1, name="b")]
        model = keras.Sequential([keras.Input((5,)), *layers], name="m")
        model.compile(keras.optimizers.SGD(0.1, momentum=0.9), "mse", jit_compile=False)
    names = ("gradient_norm", "update_ratio", "noise_scale", "gradient_norm_per_layer")
    inject(model, parts, diagnostics=names, check_finite=True)
    return model.fit(x, y, batch_size=12, epochs=2, shuffle=False, verbose=0).history
both = tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"])
print(json.dumps([train(2, both), train(4, tf.distribute.get_strategy())]))
"""
    found, expected = on_devices(2, program)
    assert found.keys() == expected.keys()
    for name, values in found.items():
        np.testing.assert_allclose(values, expected[name], rtol=1e-9, err_msg=name)


def test_a_model_can_listen_at_class_level() -> None:
    class Listening(InjectedModel, keras.Sequential):
        micro_batches = 2
        diagnostics = DIALS
        check_finite = True

    keras.utils.set_random_seed(0)
    model = Listening([keras.Input((5,)), L.Dense(3)])
    model.compile("sgd", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    log = model.fit(X, CLASSES, verbose=0, validation_data=(X, CLASSES)).history
    assert log.keys() == {"loss", "val_loss", *DIALS}
    with pytest.raises(ValueError, match="was infinite or NaN at update 3"):
        shown(model, x=X * np.inf)


def test_what_is_set_on_a_model_acts_from_the_next_fit_on() -> None:
    class Late(InjectedModel, keras.Sequential):
        pass

    model, asked = Late([keras.Input((5,)), L.Dense(3)]), list[Any]()
    model.compile("sgd", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    assert shown(model).keys() == {"loss"}
    model.micro_batches, model.diagnostics = 2, ("noise_scale",)
    assert shown(model).keys() == {"loss", "noise_scale"}
    model.weight_fn = lambda *batch: asked.append(batch) or keras.ops.shape(batch[0])[0]
    shown(model)
    assert asked


def test_eject_removes_it() -> None:
    model = network()
    own = set(vars(model))
    eject(inject(model, diagnostics=DIALS[:2], check_finite=True))
    assert set(vars(model)) == own
    assert shown(model).keys() == {"loss"}


def test_what_cannot_be_shown_is_refused() -> None:
    for wrong, message in [
        (
            {"diagnostics": ("gradient_nrom",)},
            r"`diagnostics` must hold some of .* Received: diagnostics=\('gradient_nrom",
        ),
        ({"diagnostics": ("update_ratio", "update_ratio")}, "each once"),
        ({"diagnostics": 3}, "`diagnostics` must hold"),
        ({"diagnostics": "noise_scale"}, "pass `micro_batches` of at least 2. Received: micro_batches=1"),
        ({"diagnostics": "noise_scale", "micro_batches": 2, "merge": max}, "leave `merge` at its default"),
        ({"check_finite": 1}, "`check_finite` must be True or False. Received: check_finite=1"),
    ]:
        model = network()
        with pytest.raises(ValueError, match=message):
            inject(model, **wrong)
        assert shown(model).keys() == {"loss"}


@pytest.mark.parametrize("eager", [False, True], ids=["compiled", "eager"])
def test_a_metric_of_the_same_name_is_refused(eager: bool) -> None:
    metric = keras.metrics.SparseCategoricalAccuracy(name="gradient_norm")
    with pytest.raises(ValueError, match="give those metrics other names"):
        inject(network(metrics=[metric]), diagnostics="gradient_norm")

    class Measuring(L.Dense):
        def __init__(self, units: int) -> None:
            super().__init__(units)
            self.own = metric

    model = keras.Sequential([keras.Input((5,)), Measuring(3)])
    model.compile("sgd", keras.losses.SparseCategoricalCrossentropy(from_logits=True), run_eagerly=eager)
    inject(model, diagnostics="gradient_norm")
    before = model.get_weights()
    for _ in range(1 + eager):
        with pytest.raises(ValueError, match=r"give those metrics other names. Received: .*'gradient_norm'"):
            shown(model)
    np.testing.assert_array_equal(flat(before), flat(model.get_weights()))


# Which gradient broke first


class Root(L.Layer):
    """Its derivative at zero is 0/0."""

    def call(self, x: Any) -> Any:
        return keras.ops.sqrt(keras.ops.abs(x))


BROKEN = X.copy()
BROKEN[30] = 0.0


@pytest.mark.parametrize(
    "mode",
    [
        pytest.param(mode, id=name, marks=[pytest.mark.slow] if name in ("graph", "eager") else [])
        for name, mode in {"graph": dict[str, Any](), **MODES}.items()
    ],
)
def test_the_layer_and_the_update_are_named_and_nothing_moves(mode: dict[str, Any]) -> None:
    keras.utils.set_random_seed(0)
    layers = [L.Dense(4, use_bias=False, name="below"), Root(), L.BatchNormalization(name="norm")]
    noise = [] if mode.get("jit_compile") else [L.Dropout(0.1)]  # which XLA takes seconds to compile
    model = keras.Sequential([keras.Input((5,)), *layers, *noise, L.Dense(3, name="above")], name="m")
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(P.Adam(0.02), loss, **{"jit_compile": False, **mode})
    inject(model, check_finite=True, diagnostics="gradient_norm")
    model.fit(X, CLASSES, 20, verbose=0)
    before = [variable.numpy() for variable in [*model.variables, *model.optimizer.variables]]
    with pytest.raises(ValueError, match="was infinite or NaN at update 3") as caught:
        model.fit(BROKEN[20:], CLASSES[20:], 20, verbose=0)
    words = str(caught.value)
    assert "'m/below/kernel' was infinite" in words
    assert "first on the way back from the loss; these were still finite: m/norm/gamma, m/norm/beta, m/above" in words
    after = [variable.numpy() for variable in [*model.variables, *model.optimizer.variables]]
    assert all(np.array_equal(old, new) for old, new in zip(before, after, strict=True))
    assert np.isfinite(shown(model)["gradient_norm"])  # and it goes on
    assert int(model.optimizer.iterations) == 3


@pytest.mark.parametrize("steps", [1, 3])
def test_a_step_that_is_refused_leaves_no_trace_in_an_optimizer_that_adapts(steps: int) -> None:
    optimizer = RK23(0.02)
    model = inject(network(optimizer), check_finite=True)
    model.compile(optimizer, model.loss, jit_compile=False, steps_per_execution=steps)
    before = [variable.numpy() for variable in optimizer.variables]
    with pytest.raises(ValueError, match="was infinite or NaN at update 1"):
        model.fit(X * np.nan, CLASSES, 20, verbose=0)
    np.testing.assert_array_equal([variable.numpy() for variable in optimizer.variables[: len(before)]], before)


def test_a_loss_that_is_not_finite_is_said() -> None:
    model = inject(network(), 2, check_finite=True)
    with pytest.raises(ValueError, match="So was every other, and the loss was not finite either"):
        shown(model, x=X * np.nan)


def test_an_overflow_is_an_error_when_the_scale_has_fallen_to_one() -> None:
    optimizer = P.LossScaleOptimizer(P.SGD(0.5), initial_scale=2.0)
    model = inject(network(optimizer), check_finite=True)
    shown(model, x=X * np.nan)
    assert float(optimizer.dynamic_scale) == 1.0
    with pytest.raises(ValueError, match="was infinite or NaN at update 1"):
        shown(model, x=X * np.nan)


def test_checking_changes_no_bit_of_a_healthy_run() -> None:
    def train(**options: Any) -> Any:
        model = inject(network(P.Adam(0.02)), 3, **options)
        model.fit(X, CLASSES, 14, epochs=2, shuffle=False, verbose=0)
        return model.get_weights()

    for checked, plain in zip(train(check_finite=True, diagnostics=DIALS), train(), strict=True):
        np.testing.assert_array_equal(checked, plain)
