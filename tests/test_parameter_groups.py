"""``ParameterGroups`` against NumPy, and against separate optimizers on separate lists; saved, loaded and composed."""

import pathlib
import warnings
from collections.abc import Callable
from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf

import companion
from companion import CoalesceGradients, GradientAccumulation, LocalSGD, ParameterGroups, inject
from companion.wrapping import wrapped_by
from tests.kit.cases import thinned, wrong
from tests.kit.dtypes import set_dtype
from tests.kit.numbers import assert_close, identical
from tests.kit.processes import on_devices
from tests.kit.saving import WAYS, everything

K, L = keras.optimizers, keras.layers
NAMES = ("body_kernel", "body_bias", "head_kernel", "head_bias")
SHAPES = ((3, 2), (2,), (2, 4), (4,))
X, Y = (np.random.default_rng(seed).normal(size=(24, size)).astype("float32") for seed, size in ((0, 3), (1, 1)))


pytestmark = pytest.mark.usefixtures("dtype_put_back")


def variables() -> list[Any]:
    generator, dtype = np.random.default_rng(2), keras.config.floatx()
    return [keras.Variable(generator.normal(size=s), dtype=dtype, name=n) for n, s in zip(NAMES, SHAPES, strict=True)]


def gradients(steps: int, scale: float = 1.0) -> list[list[np.ndarray]]:
    generator = np.random.default_rng(3)
    return [[scale * generator.normal(size=shape) for shape in SHAPES] for _ in range(steps)]


def arrays(of: Any) -> list[np.ndarray]:
    return [np.asarray(variable) for variable in of]


def go(optimizer: Any, steps: list[list[np.ndarray]], which: Any = range(4), start: Any = None) -> list[np.ndarray]:
    """The weights after steps on some of the four variables."""
    weights = start or variables()
    for step in steps:
        optimizer.apply([tf.constant(step[i], weights[i].dtype) for i in which], [weights[i] for i in which])
    return arrays(weights)


# The rule, written out


class DecayAtTheFullRate(ParameterGroups):
    """The factor reaches the step, and not the decay."""

    def _hooks(self, rule: Any) -> Any:
        return {**super()._hooks(rule), "_apply_weight_decay": rule._apply_weight_decay}


class ClipsEachGroup(ParameterGroups):
    """As keras.optimizers.MultiOptimizer does: each optimizer measures its own gradients."""

    def _clipped(self, pairs: Any) -> Any:
        both = [[p for p in pairs if ("bias" in p[1].name) is is_bias] for is_bias in (False, True)]
        return [pair for part in both for pair in super(ClipsEachGroup, self)._clipped(part)]


class OneRate(ParameterGroups):
    """Groups that nobody asks."""

    def _hooks(self, rule: Any) -> Any:
        return {"update_step": rule.update_step, "_apply_weight_decay": rule._apply_weight_decay}


@pytest.mark.parametrize(
    "kind",
    [
        ParameterGroups,
        wrong(DecayAtTheFullRate, why="decay by h instead of f h"),
        wrong(ClipsEachGroup, why="a norm for each optimizer"),
        wrong(OneRate, why="no factor at all"),
    ],
)
def test_equal_to_numpy(kind: Any) -> None:
    """Adam with decay, a tenth of its rate for a kernel, momentum for biases, one norm over all; rates that change."""
    set_dtype("float64")
    h, b1, b2, epsilon, decay, bound = 0.03, 0.875, 0.96875, 1e-7, 0.25, 1.5
    groups = {"body_kernel": 0.1, "bias$": K.SGD(0.02, momentum=0.75)}
    optimizer = kind(K.Adam(h, b1, b2, epsilon, weight_decay=decay), groups, global_clipnorm=bound)
    found, steps = variables(), gradients(40)
    for t, step in enumerate(steps):
        optimizer.learning_rate = h / (1 + 0.0625 * t)
        go(optimizer, [step], start=found)

    weights = arrays(variables())
    m, v, velocity = ([np.zeros(shape) for shape in SHAPES] for _ in range(3))
    for t, step in enumerate(steps):
        norm = np.sqrt(sum(np.sum(g**2) for g in step))
        rate = h / (1 + 0.0625 * t)
        for i, factor in ((0, 0.1), (2, 1.0)):
            g = step[i] * min(1, bound / norm)
            weights[i] = weights[i] * (1 - decay * factor * rate)
            m[i], v[i] = b1 * m[i] + (1 - b1) * g, b2 * v[i] + (1 - b2) * g**2
            alpha = factor * rate * np.sqrt(1 - b2 ** (t + 1)) / (1 - b1 ** (t + 1))
            weights[i] = weights[i] - alpha * m[i] / (np.sqrt(v[i]) + epsilon)
        for i in (1, 3):
            velocity[i] = 0.75 * velocity[i] - 0.02 * step[i] * min(1, bound / norm)
            weights[i] = weights[i] + velocity[i]
    assert_close(arrays(found), weights, 1e-10)


RULES = sorted(
    name
    for name in dir(K)
    if isinstance(getattr(K, name), type) and issubclass(getattr(K, name), K.Optimizer)
    if name not in ("Optimizer", "LossScaleOptimizer", "MultiOptimizer")
)
OPTIMIZERS: dict[str, Callable[..., Any]] = {name: getattr(K, name) for name in RULES}
OURS = ("Momentum", "Adam", "AdamsBashforth2", "Lion", "Muon", "ScheduleFreeAdamW")
OPTIMIZERS |= {f"companion.{name}": getattr(companion, name) for name in OURS if hasattr(companion, name)}
OPTIMIZERS["rows"] = lambda rate, **settings: CoalesceGradients(K.RMSprop(rate, **settings))


@pytest.mark.parametrize("name", thinned(OPTIMIZERS, "AdamW", "Muon", "SGD", "Ftrl", "rows", "companion.Adam"))
@pytest.mark.parametrize(
    "settings", [{}, {"weight_decay": 0.1, "clipnorm": 0.5, "use_ema": True}], ids=["", "settings"]
)
def test_equal_to_separate_optimizers(name: str, settings: Any) -> None:
    """A factor is another rate of the same rule; a quarter, so that rounding is the same."""
    make, steps = OPTIMIZERS[name], gradients(5)
    default = make(0.25, **settings)
    groups = {"body": 0.25, "head_bias": make(0.125, **settings)}
    ours = ParameterGroups(default, groups)
    found, expected = go(ours, steps), variables()
    for rate, which in ((0.0625, (0, 1)), (0.25, (2,)), (0.125, (3,))):
        go(make(rate, **settings), steps, which, expected)
    assert identical(found, arrays(expected))
    assert int(ours.iterations) == 5
    rule = list(wrapped_by(default))[-1]
    assert not {"update_step", "_apply_weight_decay", "_get_current_learning_rate"} & set(vars(rule))


def test_a_rule_that_asks_for_its_rate_is_told_the_groups() -> None:
    """It need not use the rate that it is handed; and what somebody has put in place of its step stays there."""

    class Asks(K.SGD):
        def update_step(self, gradient: Any, variable: Any, learning_rate: Any) -> None:
            super().update_step(gradient, variable, self.learning_rate)

    default, calls = Asks(0.5), []
    step = default.update_step
    default.update_step = lambda *arguments: [calls.append(1), step(*arguments)]
    found = go(ParameterGroups(default, {"body": 0.25}), gradients(2))
    assert len(calls) == 8
    expected = variables()
    for rate, which in ((0.125, (0, 1)), (0.5, (2, 3))):
        go(K.SGD(rate), gradients(2), which, expected)
    assert identical(found, arrays(expected))


def test_a_group_with_factor_0_stays_as_it_is() -> None:
    """Also where a rate of 0 would divide by zero, and a gradient is no number."""
    for rule in (K.Ftrl(0.1), K.AdamW(0.1)):
        weights, steps = variables(), gradients(3)
        steps[1][0][:] = np.nan
        optimizer = ParameterGroups(rule, {"body_kernel": 0}, global_clipnorm=1.0)
        before = arrays(weights)
        after = go(optimizer, steps, start=weights)
        assert identical(after[:1], before[:1])
        assert np.isfinite(after[1]).all()
        assert not np.array_equal(after[1], before[1])
        slots = [v for v in optimizer.variables if "body_kernel" in v.path and "accumulator" not in v.path]
        assert slots
        assert all(np.all(slot.numpy() == 0) for slot in slots)
    everything_is_left = ParameterGroups(K.Adam(), {".": 0})
    assert identical(go(everything_is_left, gradients(2)), arrays(variables()))
    assert int(everything_is_left.iterations) == 2


@pytest.mark.parametrize("overwrite", [None, 2])
def test_averages_do_not_move_a_group_with_factor_0(overwrite: int | None) -> None:
    """As pretrained weights that are put in after the first step, whose average is that of others."""
    weights = variables()
    rule = K.SGD(0.1, use_ema=True, ema_momentum=0.75, ema_overwrite_frequency=overwrite)
    optimizer = ParameterGroups(rule, {"body": 0.0})
    go(optimizer, gradients(1), start=weights)
    for weight in weights:
        weight.assign(weight + 1.0)
    before, after = arrays(weights), go(optimizer, gradients(3), start=weights)
    optimizer.finalize_variable_values(weights)
    assert identical(arrays(weights)[:2], before[:2])
    assert overwrite or not np.array_equal(np.asarray(weights[2]), after[2])


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float64"])
def test_every_dtype_and_their_mixture(dtype: str) -> None:
    kinds = (dtype, "float32", dtype, "float32")
    weights = [keras.Variable(v.numpy(), dtype=kind, name=v.name) for v, kind in zip(variables(), kinds, strict=True)]
    steps = gradients(1)
    norm = np.sqrt(sum(np.sum(g**2) for g in steps[0]))
    found = go(ParameterGroups(K.SGD(0.5), {"body": 0.5}, global_clipnorm=1.0), steps, start=weights)
    tolerance = {"float16": 4e-3, "bfloat16": 3e-2, "float64": 1e-6}[dtype]
    for start, g, rate, after in zip(arrays(variables()), steps[0], (0.25, 0.25, 0.5, 0.5), found, strict=True):
        np.testing.assert_allclose(after.astype("float64"), start - rate * g / norm, atol=tolerance)


def test_clipping_over_all_is_that_of_one_optimizer() -> None:
    """Loss scaling, a loss scale of its own, and rows that repeat."""
    steps = gradients(3, 4.0)
    one = go(K.SGD(0.25, global_clipnorm=1.0), steps)
    assert_close(go(ParameterGroups(K.SGD(0.25), {"bias": K.SGD(0.25)}, 1.0), steps), one, 1e-6)
    later = ParameterGroups(K.SGD(0.25), {"bias": K.SGD(0.25)})
    later.loss_scale_factor, later.global_clipnorm = 8.0, 1.0
    assert_close(go(later, gradients(3, 32.0)), one, 1e-6)
    assert float(later.scale_loss(1.0)) == 8.0
    weight = keras.Variable(np.zeros((3, 1)), name="table")
    rows = tf.IndexedSlices(tf.constant([[3.0], [4.0], [-1.0]]), [0, 2, 0], [3, 1])
    ParameterGroups(K.SGD(1.0), {}, global_clipnorm=1.0).apply([rows], [weight])
    np.testing.assert_allclose(weight.numpy().ravel(), [-2 / 20**0.5, 0, -4 / 20**0.5], rtol=1e-6)


# Saved and loaded


@keras.saving.register_keras_serializable("tests")
class Subclassed(keras.Model):
    """Loading gives its layers other numbers."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.body, self.head = L.Dense(4, "tanh"), L.Dense(1)

    def call(self, inputs: Any) -> Any:
        return self.head(self.body(inputs))


def sequential() -> keras.Model:
    return keras.Sequential([keras.Input((3,)), L.Dense(4, "tanh", name="body"), L.Dense(1, name="head")], name="net")


def nested() -> keras.Model:
    inputs = keras.Input((3,))
    body = keras.Sequential([keras.Input((3,)), L.Dense(4, "tanh", name="dense")], name="body")
    return keras.Model(inputs, L.Dense(1, name="head")(body(inputs)), name="net")


def subclassed() -> keras.Model:
    model = Subclassed(name="net")
    model(X[:1])
    return model


def compiled(optimizer: Any, make: Callable[[], keras.Model] = sequential, **options: Any) -> keras.Model:
    keras.utils.set_random_seed(0)
    model = make()
    model.compile(optimizer, "mse", **{"run_eagerly": True, **options})
    return model


def go_on(model: Any, batches: Any) -> list[np.ndarray]:
    for index in batches:
        model.train_on_batch(X[4 * index : 4 * index + 4], Y[4 * index : 4 * index + 4])
    return arrays(everything(model))


def layered(body: str = "^net/body", head: str = "^net/head/kernel") -> ParameterGroups:
    """The patterns hold in the model as it is made, and in none that is loaded."""
    groups = {body: 0.25, head: CoalesceGradients(K.SGD(0.1, momentum=0.9))}
    return ParameterGroups(K.Adam(0.1, use_ema=True, ema_momentum=0.5), groups, global_clipnorm=0.5)


SAVED = [("file", True), ("weights", False), ("checkpoint", True), ("list", False), ("backup", True)]
SAVED += [pytest.param(name, not scaled, marks=pytest.mark.slow) for name, scaled in SAVED]


@pytest.mark.parametrize(("way", "scaled"), SAVED)
def test_the_state_survives_every_way_to_save(way: str, scaled: bool, tmp_path: pathlib.Path) -> None:
    """Two steps before, two after: to the bit, and without a warning."""
    if scaled:
        keras.config.set_dtype_policy("mixed_float16")

    def fresh() -> keras.Model:
        model = compiled(layered())
        model.optimizer.build(model.trainable_variables)
        return model

    model = fresh()
    go_on(model, [0, 1])
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "Skipping variable loading")
        resumed = WAYS[way](model, fresh, tmp_path)
    resumed.compile(resumed.optimizer, "mse", run_eagerly=True)
    assert isinstance(resumed.optimizer, K.LossScaleOptimizer) is scaled
    assert identical(go_on(resumed, []), go_on(model, []))
    assert identical(go_on(resumed, [2, 3]), go_on(model, [2, 3]))


@pytest.mark.parametrize("make", [nested, subclassed])
def test_groups_stay_where_they_are_though_paths_change(make: Any, tmp_path: pathlib.Path) -> None:
    model = compiled("sgd", make)
    kernel, *_, bias = (v.path for v in model.trainable_variables)
    groups = {"body/" if make is nested else kernel: 0.25, f"{bias}$": K.SGD(0.1, momentum=0.9)}
    model.compile(ParameterGroups(K.Adam(0.1), groups), "mse", run_eagerly=True)
    go_on(model, [0])
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    paths = [[v.path for v in each.trainable_variables] for each in (model, loaded)]
    assert paths[0] != paths[1]
    loaded.compile(loaded.optimizer, "mse", run_eagerly=True)
    assert identical(go_on(loaded, [1, 2]), go_on(model, [1, 2]))
    again = keras.saving.load_model(tmp_path / "model.keras")
    again.save(tmp_path / "again.keras")
    again = keras.saving.load_model(tmp_path / "again.keras")
    again.compile(again.optimizer, "mse", run_eagerly=True)
    assert identical(go_on(again, [1, 2]), go_on(model, []))


@pytest.mark.skipif(not hasattr(K, "MultiOptimizer"), reason="this Keras has no MultiOptimizer")
def test_keras_loses_what_is_kept_here(tmp_path: pathlib.Path) -> None:
    rules = K.OptimizerMap(K.Adam(0.1))
    rules["net/head/kernel"] = K.SGD(0.1, momentum=0.9)
    model = compiled(K.MultiOptimizer(rules))
    go_on(model, [0])
    model.save(tmp_path / "model.keras")
    with pytest.warns(UserWarning, match="Skipping variable loading"):
        keras.saving.load_model(tmp_path / "model.keras")


def test_a_frozen_group_is_no_other_group_when_it_is_loaded(tmp_path: pathlib.Path) -> None:
    model = compiled(layered())
    go_on(model, [0])
    model.layers[0].trainable = False
    model.compile(model.optimizer, "mse", run_eagerly=True)
    go_on(model, [1])
    model.save(tmp_path / "model.keras")
    with pytest.warns(UserWarning, match="Skipping variable loading"):  # of Adam's, as Keras does with any optimizer
        loaded = keras.saving.load_model(tmp_path / "model.keras")
    head = loaded.optimizer.groups["^net/head/kernel"]
    assert [v.path for v in head._trainable_variables] == ["head/kernel"]
    assert np.any(head.variables[2].numpy())
    assert identical(arrays(head.variables), arrays(model.optimizer.groups["^net/head/kernel"].variables))


def test_an_optimizer_in_use_can_be_put_into_groups_and_saved(tmp_path: pathlib.Path) -> None:
    """It knows more variables than its group has, and so it does when it is loaded; and factors can be others."""
    model = compiled(K.Adam(0.1))
    go_on(model, [0])
    for groups in ({"body": 0.5}, {"body": 0.25, "head/bias": K.SGD(0.1, momentum=0.9)}):
        adam = getattr(model.optimizer, "default", model.optimizer)
        model.compile(ParameterGroups(adam, groups), "mse", run_eagerly=True)
        go_on(model, [1])
    assert int(model.optimizer.iterations) == 3
    model.save(tmp_path / "model.keras")
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "Skipping variable loading")
        loaded = keras.saving.load_model(tmp_path / "model.keras")
    loaded.compile(loaded.optimizer, "mse", run_eagerly=True)
    assert identical(go_on(loaded, [2]), go_on(model, [2]))


def test_a_model_made_again_has_the_same_groups() -> None:
    """As where the cell of a notebook is run twice: Keras gives the second model other numbers."""
    for _ in range(2):
        model = keras.Sequential([keras.Input((3,)), L.Dense(4), L.Dense(1)])
        model.compile(ParameterGroups(K.Adam(0.1), {"dense/": 0.5, "dense_1/kernel": K.SGD()}), "mse", run_eagerly=True)
        go_on(model, [0])
        assert model.optimizer._assignment == [1, 1, 2, 0]
    assert "dense/" not in model.layers[0].kernel.path
    with pytest.raises(ValueError, match=r"nothing matches.*'third/'\].*paths=\['sequential"):
        ParameterGroups(K.Adam(0.1), {"dense/": 0.5, "third/": 1}).build(model.trainable_variables)


def test_keras_loses_what_was_excluded_from_decay_and_a_group_keeps_it() -> None:
    excluding = K.AdamW(0.5, weight_decay=0.5)
    excluding.exclude_from_weight_decay(var_names=["bias"])
    grouped = ParameterGroups(K.AdamW(0.5, weight_decay=0.5), {"bias": K.Adam(0.5)})
    for optimizer, kept in ((excluding, False), (grouped, True)):
        loaded = type(optimizer).from_config(optimizer.get_config())
        weights = [keras.Variable([1.0], name=name) for name in ("kernel", "bias")]
        loaded.apply([np.zeros(1)] * 2, weights)
        assert [float(weight[0]) for weight in weights] == [0.75, 1.0 if kept else 0.75]


def test_a_round_trip_of_the_configuration() -> None:
    @keras.saving.register_keras_serializable("tests")
    class Mine(K.SGD):
        pass

    schedule = keras.optimizers.schedules.ExponentialDecay(0.5, 10, 0.5)
    groups = {"a": np.float32(0.5), "b|c": Mine(0.25, momentum=0.5), "class_name": 2}
    optimizer = ParameterGroups(K.Adam(schedule, weight_decay=0.25), groups, global_clipnorm=2, name="mine")
    for make in (
        lambda: keras.saving.deserialize_keras_object(keras.saving.serialize_keras_object(optimizer)),
        lambda: K.deserialize(K.serialize(optimizer)),
        lambda: ParameterGroups.from_config(optimizer.get_config()),
    ):
        again = make()
        assert again.get_config() == optimizer.get_config()
        assert (again.name, again.global_clipnorm) == ("mine", 2.0)
        assert again.groups["class_name"] == 2.0
        assert isinstance(again.groups["b|c"], Mine)
        assert isinstance(again.default._learning_rate, keras.optimizers.schedules.ExponentialDecay)
    model = compiled(layered())
    go_on(model, [0])
    other = compiled(ParameterGroups.from_config(model.optimizer.get_config()), nested)  # the same shapes
    go_on(other, [0])
    wider = keras.Sequential([keras.Input((3,)), L.Dense(5, name="body"), L.Dense(1, name="head")], name="net")
    wider.compile(ParameterGroups.from_config(model.optimizer.get_config()), "mse", run_eagerly=True)
    go_on(wider, [0])
    assert [v.path for v in wider.optimizer.groups["^net/head/kernel"]._trainable_variables] == ["net/head/kernel"]


def test_weights_of_other_groups_are_refused(tmp_path: pathlib.Path) -> None:
    first, second = (compiled(ParameterGroups(K.SGD(0.1, momentum=0.9), {name: K.SGD()})) for name in ("body", "head"))
    for model in (first, second):
        go_on(model, [0])
    first.save_weights(tmp_path / "first.weights.h5")
    before = arrays(second.optimizer.variables)
    with pytest.raises(ValueError, match=r"(?s)other groups.*net/body/kernel"):
        second.load_weights(tmp_path / "first.weights.h5")
    assert identical(arrays(second.optimizer.variables), before)


# Learning rates, settings, averages


def test_schedulers_set_the_defaults_rate_and_factors_follow() -> None:
    def ends(optimizer: Any) -> Any:
        model = compiled(optimizer, run_eagerly=False)
        callbacks = [
            keras.callbacks.LearningRateScheduler(lambda epoch, rate: 0.5 * rate),
            keras.callbacks.ReduceLROnPlateau("loss", factor=0.25, min_delta=1e9, patience=1, min_lr=0.0),
        ]
        history = model.fit(X, Y, 12, epochs=3, shuffle=False, callbacks=callbacks, verbose=0).history
        return history["learning_rate"], model

    own = K.SGD(0.125)
    rates, model = ends(ParameterGroups(K.SGD(0.5), {"body/kernel": 0.25, "bias": own}))
    expected = ends(K.SGD(0.5))[0]
    assert rates == expected
    assert float(own.learning_rate) == 0.125
    assert int(model.optimizer.iterations) == 6
    steps = gradients(3)
    schedule = keras.optimizers.schedules.PiecewiseConstantDecay([0, 1], [0.5, 0.25, 1.0])
    found = go(ParameterGroups(K.SGD(schedule), {"body": 0.25}), steps)
    slow = keras.optimizers.schedules.PiecewiseConstantDecay([0, 1], [0.125, 0.0625, 0.25])
    assert identical(found[:2], go(K.SGD(slow), steps)[:2])
    assert identical(found[2:], go(K.SGD(schedule), steps)[2:])
    asked = iter([0.5, 0.25])
    called = ParameterGroups(K.SGD(lambda: next(asked)), {"body": 0.5})
    assert_close(go(called, gradients(2)), go(ParameterGroups(K.SGD(0.5), {"body": 0.5}), gradients(1)), 10)


def test_settings_reach_every_optimizer() -> None:
    rules = K.Adam(0.1), K.SGD(0.1, momentum=0.9), CoalesceGradients(K.SGD(0.1))
    optimizer = ParameterGroups(rules[0], {"body": 0.5, "head_kernel": rules[1], "head_bias": rules[2]})
    around = GradientAccumulation(optimizer, 2)
    for outer in (optimizer, around):
        values = {"weight_decay": 0.5, "clipnorm": 0.5, "clipvalue": 0.5, "use_ema": True, "ema_momentum": 0.5}
        for name, value in (values | {"ema_overwrite_frequency": 2, "loss_scale_factor": 8.0}).items():
            setattr(outer, name, value)
            assert [getattr(each, name) for each in (outer, *rules)] == [value] * 4
            setattr(outer, name, None)
        outer.global_clipnorm = 0.25
        assert (outer.global_clipnorm, optimizer.global_clipnorm) == (0.25, 0.25)
        assert [rule.global_clipnorm for rule in rules] == [None] * 3
        with pytest.raises(ValueError, match=r"`gradient_accumulation_steps`|`steps` here"):
            outer.gradient_accumulation_steps = 2
    optimizer.beta_1, optimizer.learning_rate, optimizer.of_my_own = 0.5, 0.75, 3
    assert (rules[0].beta_1, float(rules[0].learning_rate), float(rules[1].learning_rate)) == (
        0.5,
        0.75,
        np.float32(0.1),
    )
    assert not hasattr(rules[0], "of_my_own")
    optimizer.exclude_from_weight_decay(var_names=["bias"])
    go(optimizer, gradients(1))
    assert not rules[2].inner_optimizer._use_weight_decay(rules[2]._trainable_variables[0])
    with pytest.raises(ValueError, match="constructor of a new one"):
        optimizer.use_ema = True
    assert [layer.use_ema for layer in rules] == [None] * 3
    assert [type(layer).__name__ for layer in wrapped_by(around)] == [
        *("GradientAccumulation", "ParameterGroups", "Adam", "SGD", "CoalesceGradients", "SGD")
    ]
    for name, value in (("default", K.SGD()), ("groups", {})):
        with pytest.raises(ValueError, match=f"`{name}` cannot be set"):
            setattr(optimizer, name, value)


@pytest.mark.parametrize("mixed", [False, True], ids=["", "mixed"])
def test_swapped_averages_are_those_of_one_optimizer(mixed: bool) -> None:
    keras.config.set_dtype_policy("mixed_float16" if mixed else "float32")

    def sgd() -> Any:
        return K.SGD(0.25, use_ema=True, ema_momentum=0.5)

    ends = []
    for optimizer in (sgd(), ParameterGroups(sgd(), {"body": sgd(), "head/bias": 1})):
        model = compiled(optimizer)
        swap = keras.callbacks.SwapEMAWeights(swap_on_epoch=True)
        history = model.fit(X, Y, 8, 2, validation_data=(X, Y), shuffle=False, callbacks=[swap], verbose=0).history
        ends.append([*map(np.array, history.values()), *arrays(model.weights)])
    assert identical(ends[0], ends[1])
    model = compiled(ParameterGroups(sgd(), {"body": K.SGD(0.25)}))
    with pytest.raises(ValueError, match="`use_ema` must be the same in all groups"):
        model.fit(X, Y, validation_data=(X, Y), verbose=0, callbacks=[keras.callbacks.SwapEMAWeights()])


def test_a_group_can_be_frozen_and_trained_again() -> None:
    model = compiled(layered())
    go_on(model, [0])
    for frozen in (True, False):
        model.layers[0].trainable = not frozen
        model.compile(model.optimizer, "mse", run_eagerly=True)
        before = arrays(model.layers[0].weights)
        model.fit(X[:8], Y[:8], 4, verbose=0)
        assert identical(arrays(model.layers[0].weights), before) is frozen
    assert int(model.optimizer.iterations) == 5


def test_a_group_frozen_from_the_start_is_named_and_the_way_out_works() -> None:
    model = compiled(layered())
    model.layers[0].trainable = False
    model.compile(model.optimizer, "mse", run_eagerly=True)
    with pytest.raises(ValueError, match=r"`groups` must match.*\['\^net/body'\].*frozen.*net/head/bias"):
        go_on(model, [0])
    model.layers[0].trainable = True
    model.compile(model.optimizer, "mse", run_eagerly=True)
    model.optimizer.build(model.trainable_variables)
    model.layers[0].trainable = False
    model.compile(model.optimizer, "mse", run_eagerly=True)
    go_on(model, [0])
    model.layers[0].trainable = True
    model.compile(model.optimizer, "mse", run_eagerly=True)
    go_on(model, [1])


# With everything else


def twins() -> tuple[Any, Any]:
    """One optimizer, and the same in groups."""
    return K.AdamW(0.0625), ParameterGroups(K.AdamW(0.0625), {"body": K.AdamW(0.0625), "head/bias": 1.0})


COMPOSED: dict[str, tuple[Callable[[Any], Any], Callable[[Any], Any], dict[str, Any]]] = {
    "accumulated": (lambda optimizer: GradientAccumulation(optimizer, 2), lambda model: model, {}),
    "coalesced": (CoalesceGradients, lambda model: model, {}),
    "injected": (lambda optimizer: optimizer, inject, {}),
    "in parts": (lambda optimizer: optimizer, lambda model: inject(model, 2), {}),
    "scaled": (K.LossScaleOptimizer, lambda model: model, {}),
    "compiled": (lambda optimizer: optimizer, lambda model: model, {"jit_compile": True, "run_eagerly": False}),
    "all": (
        lambda optimizer: K.LossScaleOptimizer(GradientAccumulation(optimizer, 2, normalize="weight")),
        lambda model: inject(model, 2),
        {},
    ),
}


@pytest.mark.parametrize(("wrap", "prepare", "options"), COMPOSED.values(), ids=COMPOSED)
def test_the_same_rule_in_groups_is_one_rule(wrap: Any, prepare: Any, options: Any) -> None:
    ends = []
    for optimizer in twins():
        model = prepare(compiled(wrap(optimizer), **options))
        go_on(model, range(6))
        ends.append(arrays(model.weights))
    assert_close(ends[0], ends[1], 1e-6 if options.get("jit_compile") else 0)


def test_windows_of_summed_rows_are_compiled() -> None:
    """An embedding behind ``inject``, in windows, under XLA: a switch of three branches there aborts the process."""
    ids, ends = np.random.default_rng(0).integers(0, 9, (24, 5)), []
    for jit_compile in (False, True):
        keras.utils.set_random_seed(0)
        layers = [L.Embedding(9, 4, name="table"), L.Flatten(), L.Dense(1, name="head")]
        model = keras.Sequential([keras.Input((5,), dtype="int32"), *layers])
        optimizer = ParameterGroups(K.AdamW(0.1), {"table": K.Adagrad(0.1), "bias": 0.5}, global_clipnorm=0.1)
        model.compile(GradientAccumulation(optimizer, 2), "mse", jit_compile=jit_compile)
        inject(model).fit(ids, Y, 6, shuffle=False, verbose=0)
        ends.append(arrays(model.weights))
    assert_close(ends[0], ends[1], 1e-5)


def test_rows_that_repeat_are_summed_inside_and_outside() -> None:
    """Equal to a dense gradient: the wrapper around all, around the default with a factor, around one group."""
    sparse = tf.IndexedSlices(tf.constant([[1.0], [2.0], [4.0]]), tf.constant([2, 0, 2]), tf.constant([3, 1]))
    dense = tf.convert_to_tensor(sparse)

    def after(optimizer: Any, gradient: Any) -> np.ndarray:
        weights = [keras.Variable(np.zeros((3, 1)), name="table"), keras.Variable(np.zeros((3, 1)), name="other")]
        for _ in range(2):
            optimizer.apply([gradient, dense], weights)
        return weights[0].numpy()

    for make in (
        lambda wrap: wrap(ParameterGroups(K.Adam(0.5), {"table": 0.25})),
        lambda wrap: ParameterGroups(wrap(K.Adam(0.5)), {"table": 0.25}),
        lambda wrap: ParameterGroups(K.SGD(0.5), {"table": wrap(K.Adam(0.125))}),
    ):
        expected = after(K.Adam(0.125), dense)
        np.testing.assert_allclose(after(make(CoalesceGradients), sparse), expected, rtol=1e-6)
        assert not np.allclose(after(make(lambda optimizer: optimizer), sparse), expected, rtol=1e-3)


def test_workers_keep_their_backups(tmp_path: pathlib.Path) -> None:
    """A run that was cut off ends as one that was not."""
    ends = []
    for parts in ((3,), (1, 3)):
        for epochs in parts:
            model = compiled(layered())
            local = LocalSGD(
                2, outer_optimizer=ParameterGroups(K.SGD(0.5), {"head": 0.5}), backup_dir=tmp_path / str(parts)
            )
            model.fit(X, Y, 8, epochs, shuffle=False, callbacks=[local], verbose=0)
        ends.append(arrays(everything(model)))
    assert identical(ends[0], ends[1])


REPLICAS = """
import keras, numpy as np
from companion import CoalesceGradients, GradientAccumulation, ParameterGroups, inject
K = keras.optimizers
X, Y = np.random.default_rng(0).normal(size=(24, 3)), np.random.default_rng(1).normal(size=(24, 1))
strategy = tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"])

def ends(make, prepare=lambda model: model, devices=True):
    keras.utils.set_random_seed(0)
    with (strategy if devices else tf.distribute.get_strategy()).scope():
        model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(4, "tanh", name="body"),
                                  keras.layers.Dense(1, name="head")])
        model.compile(make(), "mse")
    prepare(model).fit(X, Y, batch_size=8, epochs=2, shuffle=False, verbose=0)
    return [np.asarray(variable) for variable in (*model.weights, *model.optimizer.variables)]

def groups(**options):
    rules = {"body/kernel": 0.25, "body/bias": 0, "head/bias": K.SGD(0.1, momentum=0.9)}
    return ParameterGroups(K.AdamW(0.1, weight_decay=0.5), rules, **options)

def off(make, *arguments):
    pairs = zip(ends(make, *arguments), ends(make, *arguments, devices=False))
    return max(float(np.max(np.abs(a - b))) for a, b in pairs)

accumulated = lambda: GradientAccumulation(groups(global_clipnorm=0.1), 2)
print(json.dumps([off(lambda: CoalesceGradients(groups())), off(accumulated, lambda model: inject(model, 2))]))
"""


def test_replicas_end_where_one_device_does() -> None:
    found = on_devices(2, REPLICAS)
    assert max(found) < 1e-5, found


# Errors


class AsksTwice(companion.InjectedOptimizer):
    def direction(self, oracle: Any, values: Any, learning_rate: Any) -> Any:
        return oracle(values)


TWICE = K.SGD()
REFUSED: list[tuple[Callable[[], Any], str]] = [
    (lambda: ParameterGroups("adam", {}), r"`default` must be an instance of.*get\(name\).*Received: default='adam'"),
    (lambda: ParameterGroups(K.SGD(), [("a", 1)]), r"`groups` must be a dictionary.*Received: groups=\[\('a', 1\)\]"),
    (lambda: ParameterGroups(K.SGD(), None), "`groups` must be a dictionary.*Received: groups=None"),
    *(
        (
            lambda value=value: ParameterGroups(K.SGD(), {"a": value}),
            r"A value of `groups`.*factor.*Received: groups=\{'a'",
        )
        for value in ("sgd", None, -1, np.nan, np.inf, True, K.SGD, [1.0])
    ),
    *(
        (
            lambda key=key: ParameterGroups(K.SGD(), {key: 1}),
            r"A key of `groups`.*regular expression.*Received: groups=\{",
        )
        for key in ("(", 3, None)
    ),
    (lambda: ParameterGroups(TWICE, {"a": TWICE}), r"`groups` must not hold one optimizer twice.*'a\|b'"),
    (lambda: ParameterGroups(K.SGD(), {"a": TWICE, "b": CoalesceGradients(TWICE)}), "one optimizer twice"),
    (lambda: ParameterGroups(K.LossScaleOptimizer(K.SGD()), {}), r"`default` must not.*LossScaleOptimizer\(ParameterG"),
    (lambda: ParameterGroups(K.SGD(), {"a": K.LossScaleOptimizer(K.SGD())}), r"`groups` must not.*mixed_float16"),
    (lambda: ParameterGroups(K.SGD(), {"a": ParameterGroups(K.SGD(), {})}), "groups of their own"),
    (lambda: ParameterGroups(ParameterGroups(K.SGD(), {}), {}), "`default` must not hold groups of their own"),
    (lambda: ParameterGroups(GradientAccumulation(K.SGD(), 2), {}), r"GradientAccumulation\(ParameterGroups\(\.\.\.\)"),
    (lambda: ParameterGroups(K.SGD(), {"a": K.SGD(gradient_accumulation_steps=2)}), r"`gradient_accumulation_steps` m"),
    (lambda: ParameterGroups(K.SGD(), {"a": AsksTwice()}), "`groups` must not hold a AsksTwice, which asks"),
    (lambda: ParameterGroups(companion.Heun(), {"a": 0.5}), "`default` must not hold a Heun, which asks"),
    (lambda: ParameterGroups(K.SGD(loss_scale_factor=2.0), {"a": K.SGD()}), r"`loss_scale_factor`.*\[2\.0, None\]"),
    (lambda: ParameterGroups(K.SGD(), {}, global_clipnorm=-1), "`global_clipnorm` must be a number"),
    (lambda: CoalesceGradients(ParameterGroups(K.SGD(), {"a": CoalesceGradients(K.SGD())})), "already"),
]


@pytest.mark.parametrize(("make", "words"), REFUSED)
def test_what_cannot_be_in_groups_is_refused_in_words(make: Any, words: str) -> None:
    with pytest.raises(ValueError, match=f"(?s){words}"):
        make()


def test_a_step_that_fails_moves_nothing() -> None:
    weights, steps = variables(), gradients(1)
    before = arrays(weights)
    missed = ParameterGroups(K.SGD(0.1), {"body": 0.5, "heed": K.SGD()})
    with pytest.raises(
        ValueError, match=r"nothing matches \['heed'\].*give them names.*paths=\['body_kernel', 'body_bias'"
    ):
        go(missed, steps, start=weights)
    double = ParameterGroups(K.SGD(0.1), {"body": 0.5, "bias": K.SGD()})
    with pytest.raises(ValueError, match=r"twice.*Received: \{'body_bias': \['body', 'bias'\]\}"):
        go(double, steps, start=weights)
    optimizer = ParameterGroups(K.SGD(0.1, momentum=0.9), {"head": K.SGD(0.1, momentum=0.9)})
    with pytest.raises(ValueError, match="`trainable_variables` must be given"):
        optimizer.apply(steps[0])
    go(optimizer, gradients(1), start=weights)
    before, slots = arrays(weights), arrays(optimizer.variables)
    stranger = keras.Variable(np.zeros(4), name="stranger")

    class Fails(K.SGD):
        def update_step(self, gradient: Any, variable: Any, learning_rate: Any) -> None:
            super().update_step(gradient, variable, learning_rate)
            raise RuntimeError("in the middle")

    failing = ParameterGroups(K.SGD(0.1, momentum=0.9), {"head_bias": Fails(0.1), "body": 0.5})
    with pytest.raises(RuntimeError, match="in the middle"):
        go(failing, steps, start=weights)
    assert identical(arrays(weights), before)
    assert int(failing.iterations) == 0
    assert not any(np.any(slot.numpy()) for slot in failing.variables if "momentum" in slot.path)
    assert "update_step" not in vars(failing.default)
    bad = [*steps[0][:3], np.zeros(5)]
    for grads, theirs, words in (
        (bad, weights, "shape of its variable.*head_bias"),
        (steps[0][:3], weights, "3 gradients for 4 variables"),
        (steps[0], [*weights[:3], stranger], "Unknown variable.*stranger"),
        ([None] * 4, weights, "No gradients provided"),
    ):
        with pytest.raises(ValueError, match=words):
            optimizer.apply([g if g is None else tf.constant(g, "float32") for g in grads], theirs)
        assert identical(arrays(weights), before)
        assert identical(arrays(optimizer.variables), slots)


def test_gradients_that_are_missing_are_named() -> None:
    weights, step = variables(), gradients(1)[0]
    optimizer = ParameterGroups(K.SGD(0.1), {"body": K.SGD(0.1)})
    before = arrays(weights)
    with pytest.warns(UserWarning, match=r"\['body_kernel', 'body_bias', 'head_bias'\]"):
        optimizer.apply([None, None, tf.constant(step[2], "float32"), None], weights)
    moved = [not np.array_equal(a, b) for a, b in zip(arrays(weights), before, strict=True)]
    assert moved == [False, False, True, False]
    with pytest.warns(UserWarning, match="head_kernel"):  # the default has nothing, and counts
        optimizer.apply([tf.constant(step[0], "float32"), None, None, None], weights)
    assert int(optimizer.iterations) == 2


def test_what_an_optimizer_does_not_know_is_not_finalized() -> None:
    """A step of one's own may train a part of the model with it; ``fit`` ends with all weights."""
    for wrap in (
        CoalesceGradients,
        lambda inner: GradientAccumulation(inner, 1),
        lambda inner: ParameterGroups(inner, {}),
    ):
        weights, optimizer = variables(), wrap(K.SGD(0.5, use_ema=True))
        go(optimizer, gradients(1), range(2), weights)
        before = arrays(weights[2:])
        optimizer.finalize_variable_values(weights)
        assert identical(arrays(weights[2:]), before)


def test_each_group_ends_with_its_own_average() -> None:
    """Also where the default was in use for all variables, and has averages of those that are now another's."""
    weights, adam = variables(), K.Adam(0.1, use_ema=True)
    go(adam, gradients(2), start=weights)
    optimizer = ParameterGroups(adam, {"head": K.SGD(0.1, use_ema=True), "body_bias": 0.5})
    go(optimizer, gradients(3), start=weights)
    expected = arrays(optimizer._model_variables_moving_average)
    assert not any(np.array_equal(a, b) for a, b in zip(arrays(weights), expected, strict=True))
    optimizer.finalize_variable_values(weights)
    assert identical(arrays(weights), expected)


def test_names_of_keras_that_groups_use_are_there() -> None:
    for name in ("_get_current_learning_rate", "_apply_weight_decay", "_var_key"):
        assert callable(getattr(K.SGD(), name))
    decayed = go(ParameterGroups(K.SGD(0.5, weight_decay=0.5), {".": 0.5}), [[0 * g for g in gradients(1)[0]]])
    assert_close(decayed, [0.875 * start for start in arrays(variables())], 1e-6)
