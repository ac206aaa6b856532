"""Holds `companion.optimizers` against the Keras built-ins, against the papers, and against its own docstrings.

Every equality has a partner that must fail: the wrong rules at the end of the file go through the same comparison as
strict expected failures.
"""

import ast
import inspect
import json
import math
import pathlib
import types
from collections.abc import Callable
from functools import cache, partial
from typing import Any, NamedTuple

import keras
import numpy as np
import pytest
import tensorflow as tf
from hypothesis import given
from hypothesis import strategies as st
from keras import ops

import companion
from companion import datasets
from tests.kit.cases import thinned
from tests.kit.dtypes import set_dtype
from tests.kit.numbers import distance, identical
from tests.kit.processes import on_devices, output_of, warm
from tests.kit.ready import ready

STEPS = 200
BATCHES = 20


class Pair(NamedTuple):
    """One rule: the book's class and the Keras built-in it must equal, with a learning rate at which it trains."""

    ours: Callable[..., Any]
    builtin: Callable[..., Any]
    learning_rate: float


PAIRS = {
    "SGD": Pair(companion.SGD, keras.optimizers.SGD, 0.1),
    "Momentum": Pair(companion.Momentum, partial(keras.optimizers.SGD, momentum=0.9), 0.02),
    "Nesterov": Pair(
        partial(companion.Momentum, nesterov=True), partial(keras.optimizers.SGD, momentum=0.9, nesterov=True), 0.02
    ),
    "Adam": Pair(companion.Adam, keras.optimizers.Adam, 0.003),
    "Lion": Pair(
        partial(companion.Lion, beta_1=0.875, beta_2=0.96875),  # exact in float32, which Keras rounds them to
        partial(keras.optimizers.Lion, beta_1=0.875, beta_2=0.96875),
        0.001,
    ),
}
# Lion has a file of its own, tests/test_newer_rules.py; here it runs with the whole matrix.
every_rule = pytest.mark.parametrize("rule", thinned(PAIRS, *(rule for rule in PAIRS if rule != "Lion")))
for_one_rule = pytest.mark.parametrize("rule", thinned(PAIRS, "Adam"))  # where the surroundings are what is held

OPTIONS: dict[str, dict[str, Any]] = {
    "nothing": {},
    "clipnorm": {"clipnorm": 0.05},
    "clipvalue": {"clipvalue": 0.005},
    "global_clipnorm": {"global_clipnorm": 0.1},
    "weight_decay": {"weight_decay": 0.0625},
    "EMA": {"use_ema": True, "ema_momentum": 0.9},
    "EMA with overwrite": {"use_ema": True, "ema_momentum": 0.9, "ema_overwrite_frequency": 30},
    "constraint": {},
    "schedule": {},
    "loss_scale_factor": {"loss_scale_factor": 3.0},
    "gradient_accumulation": {"gradient_accumulation_steps": 4},
}

TOLERANCE = {"float64": 1e-14, "float32": 1e-6}
RULES = [each for name, each in vars(companion.optimizers).items() if name[0] != "_" and "update_step" in vars(each)]


pytestmark = pytest.mark.usefixtures("dtype_put_back")


@cache
def batches(dtype: str = "float32") -> list[tuple[tf.Tensor, tf.Tensor]]:
    data = datasets.digits(dtype)
    images, labels = np.split(data.x_train, BATCHES), np.split(data.y_train, BATCHES)
    return [(tf.constant(x), tf.constant(y)) for x, y in zip(images, labels, strict=True)]


def mlp(constrained: bool = False) -> keras.Model:
    """A small network for the digits, with the same weights on every call."""
    constraint = keras.constraints.MaxNorm(0.7) if constrained else None
    model = keras.Sequential(
        [
            keras.Input((64,)),
            keras.layers.Dense(32, activation="relu", kernel_constraint=constraint),
            keras.layers.Dense(10, bias_constraint=keras.constraints.NonNeg() if constrained else None),
        ]
    )
    generator = np.random.default_rng(0)
    model.set_weights([generator.normal(0, 0.1, weight.shape) for weight in model.get_weights()])
    return model


def cross_entropy(labels: Any, logits: Any) -> Any:
    return ops.mean(keras.losses.sparse_categorical_crossentropy(labels, logits, from_logits=True))


def train(model: keras.Model, optimizer: Any, steps: range, data: list[tuple[Any, Any]]) -> None:
    """Takes the given steps, compiled, one batch after the other."""
    if not optimizer.built:
        optimizer.build(model.trainable_variables)

    @tf.function(autograph=False)
    def step(inputs: tf.Tensor, labels: tf.Tensor) -> None:
        with tf.GradientTape() as tape:
            loss = optimizer.scale_loss(cross_entropy(labels, model(inputs)))
        optimizer.apply(tape.gradient(loss, model.trainable_variables), model.trainable_variables)

    for index in steps:
        step(*data[index % len(data)])


def state(model: keras.Model, optimizer: Any) -> list[np.ndarray]:
    """Every number that a training run has changed: weights, iterations, learning rate, slots."""
    values = model.get_weights() + [variable.numpy() for variable in optimizer.variables]
    return [value if value.dtype != "bfloat16" else value.astype("float32") for value in values]


def trained(make: Callable[..., Any], learning_rate: float, option: str, dtype: str) -> list[np.ndarray]:
    """Trains for 200 steps with one of the options and returns weights and optimizer variables."""
    set_dtype(dtype)
    decaying = keras.optimizers.schedules.ExponentialDecay(learning_rate, 50, 0.5)
    rate = decaying if option == "schedule" else learning_rate
    model, optimizer = mlp(constrained=option == "constraint"), make(rate, **OPTIONS[option])
    train(model, optimizer, range(STEPS), batches(dtype))
    optimizer.finalize_variable_values(model.trainable_variables)
    return state(model, optimizer)


@cache
def builtin_trained(rule: str, option: str, dtype: str) -> list[np.ndarray]:
    return trained(PAIRS[rule].builtin, PAIRS[rule].learning_rate, option, dtype)


def assert_equals_builtin(make: Callable[..., Any], rule: str, option: str, dtype: str) -> None:
    ours = trained(make, PAIRS[rule].learning_rate, option, dtype)
    assert distance(ours, builtin_trained(rule, option, dtype)) <= TOLERANCE[dtype]


# Equal to the built-in


COMPARED = [
    pytest.param(rule, option, dtype, marks=() if keep else pytest.mark.slow)
    for rule in PAIRS
    for option in OPTIONS
    for dtype in TOLERANCE
    for keep in [(option == "nothing" and rule != "Lion") or (rule == "Adam" and dtype == "float64")]
]
"""All options for one rule, and all rules without: the rules have no option of their own (the next test)."""


@pytest.mark.parametrize(("rule", "option", "dtype"), COMPARED)
def test_equals_the_builtin_over_200_steps(rule: str, option: str, dtype: str) -> None:
    assert_equals_builtin(PAIRS[rule].ours, rule, option, dtype)


@pytest.mark.parametrize("cls", [*RULES, companion.Lion])
def test_a_rule_is_three_methods(cls: type) -> None:
    """So clipping, decay, averages, constraints and schedules can only be Keras's."""
    methods = {name for name, value in vars(cls).items() if inspect.isfunction(value)}
    assert methods <= {"__init__", "build", "update_step", "get_config"}
    assert cls.__mro__[1].__module__.startswith("keras.")


@pytest.mark.parametrize("rule", thinned(PAIRS, "Adam"))
@pytest.mark.parametrize("option", [option for option in OPTIONS if option not in ("nothing", "loss_scale_factor")])
def test_every_option_of_the_comparison_changes_the_run(rule: str, option: str) -> None:
    weights = [builtin_trained(rule, name, "float64")[:4] for name in (option, "nothing")]
    assert distance(*weights) > 1e-3


@every_rule
def test_the_compared_runs_learn(rule: str) -> None:
    set_dtype("float32")
    model = mlp()
    model.set_weights(builtin_trained(rule, "nothing", "float32")[:4])
    data = datasets.digits()
    assert np.mean(np.argmax(model(data.x_test), axis=1) == data.y_test) > 0.85


def test_defaults_are_those_of_the_builtins() -> None:
    builtin = keras.optimizers.Adam(name="same").get_config()
    config = companion.Adam(name="same").get_config()
    assert config == {key: builtin[key] for key in config}
    assert companion.SGD().get_config()["learning_rate"] == keras.optimizers.SGD().get_config()["learning_rate"]
    assert companion.Momentum(name="same").get_config() == keras.optimizers.SGD(momentum=0.9, name="same").get_config()


# Stopped and resumed


RESUMED = {
    "plain": lambda rate: {"learning_rate": rate},
    "schedule and EMA": lambda rate: {
        "learning_rate": keras.optimizers.schedules.ExponentialDecay(rate, 10, 0.5),
        "use_ema": True,
        "ema_momentum": 0.75,
        "ema_overwrite_frequency": 7,
    },
}


def compiled(rule: str, extras: str) -> keras.Model:
    pair, model = PAIRS[rule], mlp()
    model.compile(pair.ours(**RESUMED[extras](pair.learning_rate)), cross_entropy)
    model.optimizer.build(model.trainable_variables)
    return model


def through_keras_file(model: keras.Model, rule: str, extras: str, folder: pathlib.Path) -> keras.Model:
    model.save(folder / "model.keras")
    return keras.saving.load_model(folder / "model.keras", custom_objects={"cross_entropy": cross_entropy})


def through_weights_file(model: keras.Model, rule: str, extras: str, folder: pathlib.Path) -> keras.Model:
    model.save_weights(folder / "model.weights.h5")
    model = compiled(rule, extras)
    model.load_weights(folder / "model.weights.h5")
    return model


def through_checkpoint(model: keras.Model, rule: str, extras: str, folder: pathlib.Path) -> keras.Model:
    path = tf.train.Checkpoint(model=model, optimizer=model.optimizer).write(str(folder / "checkpoint"))
    model = compiled(rule, extras)
    tf.train.Checkpoint(model=model, optimizer=model.optimizer).read(path).assert_consumed()
    return model


@pytest.mark.parametrize("rule", thinned(PAIRS, "Momentum", "Adam"))
@pytest.mark.parametrize("extras", RESUMED)
@pytest.mark.parametrize("interrupt", [through_keras_file, through_weights_file, through_checkpoint])
def test_resumed_is_bit_identical(
    rule: str, extras: str, interrupt: Callable[..., keras.Model], tmp_path: pathlib.Path
) -> None:
    uninterrupted, interrupted = compiled(rule, extras), compiled(rule, extras)
    train(uninterrupted, uninterrupted.optimizer, range(30), batches())
    train(interrupted, interrupted.optimizer, range(17), batches())
    resumed = interrupt(interrupted, rule, extras, tmp_path)
    assert resumed.optimizer is not interrupted.optimizer
    assert type(resumed.optimizer) is type(interrupted.optimizer)
    train(resumed, resumed.optimizer, range(17, 30), batches())
    assert int(resumed.optimizer.iterations) == 30
    assert identical(state(resumed, resumed.optimizer), state(uninterrupted, uninterrupted.optimizer))


def test_losing_the_slots_is_noticed() -> None:
    uninterrupted, interrupted = compiled("Adam", "plain"), compiled("Adam", "plain")
    train(uninterrupted, uninterrupted.optimizer, range(30), batches())
    train(interrupted, interrupted.optimizer, range(17), batches())
    forgetful = compiled("Adam", "plain")
    forgetful.set_weights(interrupted.get_weights())
    train(forgetful, forgetful.optimizer, range(17, 30), batches())
    assert distance(forgetful.get_weights(), uninterrupted.get_weights()) > 1e-3


def test_fit_resumed_is_bit_identical(tmp_path: pathlib.Path) -> None:
    """The same through `fit`, which compiles in its own way."""
    fitting = {"batch_size": 72, "shuffle": False, "verbose": 0}
    uninterrupted, interrupted, data = compiled("Adam", "plain"), compiled("Adam", "plain"), datasets.digits()
    uninterrupted.fit(data.x_train, data.y_train, epochs=2, **fitting)
    interrupted.fit(data.x_train, data.y_train, epochs=1, **fitting)
    resumed = through_keras_file(interrupted, "Adam", "plain", tmp_path)
    resumed.fit(data.x_train, data.y_train, initial_epoch=1, epochs=2, **fitting)
    assert identical(state(resumed, resumed.optimizer), state(uninterrupted, uninterrupted.optimizer))


LOAD = """
import sys
import numpy as np
import companion, keras

model = keras.saving.load_model(sys.argv[1] + "/model.keras")
expected = np.load(sys.argv[1] + "/state.npz")
found = model.get_weights() + [variable.numpy() for variable in model.optimizer.variables]
assert len(found) == len(expected.files)
assert all(np.array_equal(array, expected[f"arr_{index}"]) for index, array in enumerate(found))
print(type(model.optimizer) is companion.Momentum, model.optimizer.momentum, model.optimizer.nesterov)
"""


def test_a_fresh_process_loads_without_custom_objects(tmp_path: pathlib.Path) -> None:
    model = mlp()
    model.compile(companion.Momentum(0.02, momentum=0.75, nesterov=True), "mse")
    train(model, model.optimizer, range(5), batches())
    model.save(tmp_path / "model.keras")
    np.savez(tmp_path / "state.npz", *state(model, model.optimizer))
    assert output_of(LOAD, str(tmp_path), python=warm()).split() == ["True", "0.75", "True"]


# Configuration


CONFIGURED = {
    "SGD": partial(companion.SGD, clipnorm=1.0, name="plain"),
    "Momentum": partial(companion.Momentum, momentum=0.75, nesterov=True, weight_decay=0.125),
    "Adam": partial(companion.Adam, beta_1=0.75, beta_2=0.875, epsilon=0.5, use_ema=True, ema_momentum=0.5),
}


@pytest.mark.parametrize("name", CONFIGURED)
@pytest.mark.parametrize("with_schedule", [False, True])
def test_config_makes_the_same_optimizer(name: str, with_schedule: bool) -> None:
    rate = keras.optimizers.schedules.CosineDecay(0.5, 100) if with_schedule else 0.25
    optimizer = CONFIGURED[name](learning_rate=rate)
    config = optimizer.get_config()
    assert json.loads(json.dumps(config)) == config
    again = type(optimizer).from_config(json.loads(json.dumps(config)))
    assert type(again) is type(optimizer)
    assert again.get_config() == config
    assert float(again.learning_rate) == float(optimizer.learning_rate)
    through_keras = keras.optimizers.deserialize(keras.optimizers.serialize(optimizer))
    assert type(through_keras) is type(optimizer)
    assert through_keras.get_config() == config


@pytest.mark.parametrize("name", CONFIGURED)
def test_config_holds_every_argument(name: str) -> None:
    own = set(inspect.signature(getattr(companion, name)).parameters) - {"kwargs"}
    base = set(keras.optimizers.Optimizer(learning_rate=0.1).get_config())
    assert set(getattr(companion, name)().get_config()) == own | base


@pytest.mark.parametrize("name", CONFIGURED)
def test_registered_name(name: str) -> None:
    assert keras.saving.get_registered_name(getattr(companion, name)) == f"companion>{name}"
    assert keras.saving.get_registered_object(f"companion>{name}") is getattr(companion, name)


# Drop-in: whatever the built-in can be put into


class LearningRates(keras.callbacks.Callback):
    """Notes the learning rate after every epoch."""

    def on_train_begin(self, logs: Any = None) -> None:
        self.seen: list[float] = []

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        self.seen.append(float(self.model.optimizer.learning_rate))


def fitted(optimizer: Any, epochs: int = 1, callbacks: Any = (), **compile_arguments: Any) -> keras.Model:
    data, model = datasets.digits(), mlp()
    model.compile(optimizer, cross_entropy, **compile_arguments)
    ready(model)
    model.fit(
        data.x_train[:480],
        data.y_train[:480],
        batch_size=48,
        epochs=epochs,
        shuffle=False,
        verbose=0,
        callbacks=list(callbacks),
    )
    return model


def assert_fits_equal(
    rule: str, tolerance: float, hyperparameters: dict[str, float] | None = None, **compile_arguments: Any
) -> keras.Model:
    pair, hyperparameters = PAIRS[rule], hyperparameters or {}
    ours, builtin = (
        fitted(make(pair.learning_rate, **hyperparameters), **compile_arguments) for make in (pair.ours, pair.builtin)
    )
    states = [state(model, model.optimizer) for model in (ours, builtin)]
    assert distance(states[0][:4], [weight.astype("float32") for weight in mlp().get_weights()]) > 1e-3
    assert distance(*states) <= tolerance
    return ours


@for_one_rule
def test_jit_compiled_fit(rule: str) -> None:
    assert_fits_equal(rule, 1e-6, jit_compile=True)


@for_one_rule
def test_eager_fit(rule: str) -> None:
    assert_fits_equal(rule, 1e-6, run_eagerly=True)


@for_one_rule
def test_mixed_precision_fit(rule: str) -> None:
    keras.config.set_dtype_policy("mixed_float16")
    ours = assert_fits_equal(rule, 1e-6, jit_compile=False)
    assert isinstance(ours.optimizer, keras.optimizers.LossScaleOptimizer)
    assert isinstance(ours.optimizer.inner_optimizer, PAIRS[rule].ours().__class__)
    assert ours.layers[0].compute_dtype == "float16"


@for_one_rule
def test_half_precision_variables(rule: str) -> None:
    set_dtype("bfloat16")
    ours = assert_fits_equal(rule, 0, {"beta_2": 0.9375} if rule == "Adam" else None, jit_compile=False)
    assert {variable.dtype for variable in ours.trainable_variables} == {"bfloat16"}


@pytest.mark.parametrize("make", PAIRS["Adam"][:2])
def test_adams_default_is_too_fine_for_half_precision(make: Callable[..., Any]) -> None:
    """In bfloat16 the default `beta_2`, 0.999, rounds to 1: its correction is 0 and nothing moves, as in Keras."""
    weight, optimizer = keras.Variable([1.0], dtype="bfloat16"), make(0.5)
    for _ in range(3):
        optimizer.apply([np.array([1.0])], [weight])
    assert float(ops.cast(0.999, "bfloat16")) == 1
    assert float(weight[0]) == 1


CALLBACKS: dict[str, Callable[[], keras.callbacks.Callback]] = {
    "LearningRateScheduler": lambda: keras.callbacks.LearningRateScheduler(lambda epoch, rate: rate / (epoch + 1)),
    "ReduceLROnPlateau": lambda: keras.callbacks.ReduceLROnPlateau("loss", factor=0.5, patience=1, min_delta=100),
}


@pytest.mark.parametrize("rule", thinned(["Momentum", "Adam"], "Adam"))
@pytest.mark.parametrize("callback", CALLBACKS)
def test_callbacks_set_the_learning_rate(rule: str, callback: str) -> None:
    rates = [LearningRates(), LearningRates()]
    models = [
        fitted(make(PAIRS[rule].learning_rate), 3, [CALLBACKS[callback](), seen], jit_compile=False)
        for make, seen in zip((PAIRS[rule].ours, PAIRS[rule].builtin), rates, strict=True)
    ]
    assert rates[0].seen == rates[1].seen
    assert len(set(rates[0].seen)) == 3
    assert distance(*(state(model, model.optimizer) for model in models)) <= 1e-6


@every_rule
def test_a_callable_learning_rate(rule: str) -> None:
    rate = ops.convert_to_tensor(0.25)
    ours, builtin = (keras.Variable([1.0, -2.0]) for _ in range(2))
    PAIRS[rule].ours(lambda: rate).apply([np.array([0.5, 1.0])], [ours])
    PAIRS[rule].builtin(lambda: rate).apply([np.array([0.5, 1.0])], [builtin])
    assert distance([ours.numpy()], [np.array([1.0, -2.0])]) > 0.1
    assert distance([ours.numpy()], [builtin.numpy()]) <= 1e-6


@for_one_rule
def test_rows_of_an_embedding(rule: str) -> None:
    def words() -> keras.Model:
        keras.utils.set_random_seed(0)
        return keras.Sequential(
            [keras.layers.Embedding(12, 4), keras.layers.GlobalAveragePooling1D(), keras.layers.Dense(3)]
        )

    generator = np.random.default_rng(0)
    ids, labels = generator.integers(0, 9, (20, 8, 6)), generator.integers(0, 3, (20, 8))
    data = [(tf.constant(x), tf.constant(y)) for x, y in zip(ids, labels, strict=True)]
    assert all(len(set(batch.flat)) < batch.size for batch in ids)
    results = []
    for make in (PAIRS[rule].ours, PAIRS[rule].builtin):
        model, optimizer = words(), make(PAIRS[rule].learning_rate)
        model.build((None, 6))
        before = model.get_weights()[0]
        with tf.GradientTape() as tape:
            loss = cross_entropy(data[0][1], model(data[0][0]))
        assert isinstance(tape.gradient(loss, model.trainable_variables)[0], tf.IndexedSlices)
        train(model, optimizer, range(40), data)
        np.testing.assert_array_equal(model.get_weights()[0][9:], before[9:])
        results.append(state(model, optimizer))
    assert distance(*results) <= 1e-6


@for_one_rule
def test_frozen_variables_stay(rule: str) -> None:
    results = []
    for make in (PAIRS[rule].ours, PAIRS[rule].builtin):
        model = mlp()
        model.layers[0].trainable = False
        optimizer = make(PAIRS[rule].learning_rate)
        train(model, optimizer, range(10), batches())
        results.append(state(model, optimizer))
    assert identical(results[0][:2], mlp().get_weights()[:2])
    assert distance(results[0][2:4], mlp().get_weights()[2:4]) > 1e-3
    assert distance(*results) <= 1e-6


@for_one_rule
def test_excluded_from_weight_decay(rule: str) -> None:
    results = []
    for make in (PAIRS[rule].ours, PAIRS[rule].builtin, PAIRS[rule].ours):
        model, optimizer = mlp(), make(PAIRS[rule].learning_rate, weight_decay=0.5)
        if len(results) < 2:
            optimizer.exclude_from_weight_decay(var_names=["bias"])
        train(model, optimizer, range(10), batches())
        results.append(state(model, optimizer))
    excluded, builtin, everything = results
    assert distance(excluded, builtin) <= 1e-6
    assert distance(excluded[:4], everything[:4]) > 1e-3


@for_one_rule
def test_accumulates_gradients(rule: str) -> None:
    """Four quarters of a batch, accumulated, are the batch."""
    set_dtype("float64")
    x, y = batches("float64")[0]
    quarters = list(zip(tf.split(x, 4), tf.split(y, 4), strict=True))
    whole, pieces = mlp(), mlp()
    train(whole, PAIRS[rule].ours(0.125), range(5), [(x, y)])
    train(pieces, PAIRS[rule].ours(0.125, gradient_accumulation_steps=4), range(20), quarters)
    assert distance(whole.get_weights(), pieces.get_weights()) <= 1e-12


MIRRORED = """
import numpy as np
from tests.test_optimizers import PAIRS, cross_entropy, datasets, distance, mlp, state

data = datasets.digits()
strategy = tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"])


def fitted(optimizer_class, learning_rate):
    with strategy.scope():
        model = mlp()
        model.compile(optimizer_class(learning_rate), cross_entropy, jit_compile=False)
    model.fit(data.x_train[:480], data.y_train[:480], batch_size=48, shuffle=False, verbose=0)
    return model


found = {"replicas": strategy.num_replicas_in_sync, "difference": {}, "moved": {}}
for rule, pair in PAIRS.items():
    ours, builtin = (fitted(make, pair.learning_rate) for make in (pair.ours, pair.builtin))
    found["difference"][rule] = distance(state(ours, ours.optimizer), state(builtin, builtin.optimizer))
    found["moved"][rule] = distance(ours.get_weights(), mlp().get_weights())
print(json.dumps(found))
"""


def test_two_devices() -> None:
    """Runs in its own process: logical devices must exist before TensorFlow starts."""
    found = on_devices(2, MIRRORED)
    assert found["replicas"] == 2
    assert found["difference"].keys() == PAIRS.keys()
    assert max(found["difference"].values()) <= 1e-6
    assert min(found["moved"].values()) > 1e-3


# From the papers, in NumPy


RATE, BETA, BETA_1, BETA_2, EPSILON = 0.125, 0.875, 0.75, 0.9375, 2.0**-10
"""Exactly representable in float32, through which Keras casts hyper-parameters."""


@pytest.mark.xfail(strict=True, reason="Keras 3.15 casts a Python float through float32; then the line above is free")
def test_keras_casts_hyper_parameters_exactly() -> None:
    assert float(ops.cast(0.9, "float64")) == 0.9


CURVATURES = np.array([1.0, 0.3, 0.01])
START = np.array([1.0, -2.0, 3.0])


def descent(optimizer: Any, steps: int) -> np.ndarray:
    """The path of an optimizer on the quadratic with these curvatures, in float64."""
    weight = keras.Variable(START, dtype="float64")
    path = [weight.numpy()]
    for _ in range(steps):
        optimizer.apply([CURVATURES * path[-1]], [weight])
        path.append(weight.numpy())
    return np.array(path)


def test_sgd_is_robbins_and_monro() -> None:
    set_dtype("float64")
    expected = START * (1 - RATE * CURVATURES) ** np.arange(31)[:, None]
    np.testing.assert_allclose(descent(companion.SGD(RATE), 30), expected, rtol=0, atol=1e-13)


def test_momentum_is_polyaks_heavy_ball() -> None:
    """Polyak writes the rule without a velocity: with the last two points."""
    set_dtype("float64")
    path = [START, START - RATE * CURVATURES * START]
    for _ in range(29):
        path.append(path[-1] - RATE * CURVATURES * path[-1] + BETA * (path[-1] - path[-2]))
    np.testing.assert_allclose(descent(companion.Momentum(RATE, BETA), 30), path, rtol=0, atol=1e-13)


def test_nesterov_is_that_of_sutskever_and_others() -> None:
    """They take the gradient at the point looked ahead to; Keras keeps that point as the weights."""
    set_dtype("float64")
    position, velocity, path = START, np.zeros(3), []
    for _ in range(31):
        ahead = position + BETA * velocity
        path.append(ahead)
        velocity = BETA * velocity - RATE * CURVATURES * ahead
        position = position + velocity
    optimizer = companion.Momentum(RATE, BETA, nesterov=True)
    np.testing.assert_allclose(descent(optimizer, 30), path, rtol=0, atol=1e-13)


def test_adam_is_that_of_kingma_and_ba() -> None:
    """Algorithm 1, with its epsilon replaced as Section 2.1 says: the corrected root is added to a smaller one."""
    set_dtype("float64")
    weight, first, second, path = START, np.zeros(3), np.zeros(3), [START]
    for t in range(1, 31):
        gradient = CURVATURES * weight
        first = BETA_1 * first + (1 - BETA_1) * gradient
        second = BETA_2 * second + (1 - BETA_2) * gradient**2
        first_corrected, second_corrected = first / (1 - BETA_1**t), second / (1 - BETA_2**t)
        epsilon = EPSILON / math.sqrt(1 - BETA_2**t)
        weight = weight - RATE * first_corrected / (np.sqrt(second_corrected) + epsilon)
        path.append(weight)
    optimizer = companion.Adam(RATE, BETA_1, BETA_2, EPSILON)
    np.testing.assert_allclose(descent(optimizer, 30), path, rtol=0, atol=1e-13)


# Properties


finite = st.floats(-4, 4, width=32)
vectors = st.lists(finite, min_size=1, max_size=4).map(lambda entries: np.array(entries, dtype="float64"))
OURS = {name: PAIRS[name].ours for name in PAIRS}


def steps_of(optimizer: Any, start: np.ndarray, gradients: list[np.ndarray]) -> np.ndarray:
    weight = keras.Variable(start, dtype="float64")
    for gradient in gradients:
        optimizer.apply([gradient], [weight])
    return weight.numpy()


@given(start=vectors, rate=st.floats(0, 1, width=32), curvature=st.floats(0, 2, width=32), steps=st.integers(0, 20))
def test_sgd_shrinks_a_quadratic_geometrically(start: np.ndarray, rate: float, curvature: float, steps: int) -> None:
    set_dtype("float64")
    weight, optimizer = keras.Variable(start, dtype="float64"), companion.SGD(rate)
    for _ in range(steps):
        optimizer.apply([curvature * weight.numpy()], [weight])
    np.testing.assert_allclose(weight.numpy(), start * (1 - rate * curvature) ** steps, rtol=0, atol=1e-13)


@given(
    gradient=vectors,
    momentum=st.sampled_from([0.0, 0.5, 0.75, 0.875]),
    steps=st.integers(1, 20),
    nesterov=st.booleans(),
)
def test_momentum_under_a_constant_gradient(gradient: np.ndarray, momentum: float, steps: int, nesterov: bool) -> None:
    """A geometric series: the speed grows towards the 1 / (1 - momentum) fold."""
    set_dtype("float64")
    found = steps_of(companion.Momentum(0.5, momentum, nesterov), np.zeros_like(gradient), [gradient] * steps)
    powers = np.arange(1, steps + 1) + (1 if nesterov else 0)
    expected = -0.5 * gradient * np.sum((1 - momentum**powers) / (1 - momentum))
    np.testing.assert_allclose(found, expected, rtol=1e-13, atol=1e-13)


@given(gradients=st.lists(finite.filter(lambda g: abs(g) > 1e-2), min_size=1, max_size=8), scale=st.floats(0.25, 1e4))
def test_adam_ignores_the_scale_of_the_gradient(gradients: list[float], scale: float) -> None:
    set_dtype("float64")
    found = [
        steps_of(companion.Adam(0.5, epsilon=1e-30), np.zeros(1), [np.array([factor * g]) for g in gradients])
        for factor in (1.0, scale)
    ]
    np.testing.assert_allclose(found[0], found[1], rtol=0, atol=1e-9)


@given(gradient=finite.filter(lambda g: abs(g) > 1e-3))
def test_adam_first_step_is_one_learning_rate_long(gradient: float) -> None:
    set_dtype("float64")
    found = steps_of(companion.Adam(0.5, BETA_1, BETA_2, 1e-12), np.zeros(1), [np.array([gradient])])
    np.testing.assert_allclose(found, -0.5 * np.sign(gradient), rtol=1e-7)


@every_rule
@given(start=vectors, steps=st.integers(1, 3))
def test_a_zero_gradient_moves_nothing_at_rest(rule: str, start: np.ndarray, steps: int) -> None:
    set_dtype("float64")
    np.testing.assert_array_equal(steps_of(OURS[rule](0.5), start, [np.zeros_like(start)] * steps), start)


@every_rule
@given(data=st.lists(st.tuples(finite, finite, finite), min_size=1, max_size=5), seed=st.integers(0, 100))
def test_variables_do_not_see_each_other(rule: str, data: list[tuple[float, float, float]], seed: int) -> None:
    """One variable or many, in any order, also in another one than at `build`: the same weights."""
    set_dtype("float64")
    start, *gradients = (np.array(column) for column in zip(*data, strict=True))
    together = steps_of(OURS[rule](0.5), start, gradients)
    weights, optimizer = [keras.Variable(value, dtype="float64") for value in start], OURS[rule](0.5)
    optimizer.build([weights[index] for index in np.random.default_rng(seed).permutation(len(weights))])
    for number, gradient in enumerate(gradients):
        order = np.random.default_rng(seed + number).permutation(len(weights))
        optimizer.apply([gradient[index] for index in order], [weights[index] for index in order])
    np.testing.assert_allclose([float(weight) for weight in weights], together, rtol=1e-14, atol=1e-14)


# Arguments


NOT_NUMBERS = [
    "0.1",
    None,
    True,
    [0.1],
    {},
    float("nan"),
    float("inf"),
    float("-inf"),
    -0.1,
    1j,
    b"0.1",
    np.True_,
    10**400,
]
WRONG = {
    (companion.SGD, "learning_rate"): NOT_NUMBERS,
    (companion.Momentum, "learning_rate"): NOT_NUMBERS,
    (companion.Momentum, "momentum"): [*NOT_NUMBERS, 1.0, 1, 1.5],
    (companion.Adam, "learning_rate"): NOT_NUMBERS,
    (companion.Adam, "beta_1"): [*NOT_NUMBERS, 1.0, 1, 1.5],
    (companion.Adam, "beta_2"): [*NOT_NUMBERS, 1.0, 1, 1.5],
    (companion.Adam, "epsilon"): [*NOT_NUMBERS, 0, 0.0],
}


@pytest.mark.parametrize("cls", RULES)
def test_every_rule_has_its_rows(cls: type) -> None:
    """PAIRS compares it with Keras's, CONFIGURED saves it, WRONG gives it wrong numbers."""
    name, arguments = cls.__name__, inspect.signature(cls).parameters
    compared = {getattr(pair.ours, "func", pair.ours) for pair in PAIRS.values()}
    assert cls in compared or name.lower() not in map(str.lower, dir(keras.optimizers)), f"{name}: no row in PAIRS"
    assert name in CONFIGURED, f"{name}: no row in CONFIGURED"
    for argument in arguments.keys() - {"kwargs", "nesterov"}:
        assert (cls, argument) in WRONG, f"{name}: no row in WRONG for `{argument}`"


@pytest.mark.parametrize(
    ("optimizer", "argument", "value"),
    [(*where, value) for where, values in WRONG.items() for value in values],
    ids=lambda value: value.__name__ if isinstance(value, type) else str(value)[:20],
)
def test_a_wrong_argument_is_named(optimizer: type, argument: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"^`{argument}` must be a number in ") as caught:
        optimizer(**{argument: value})
    assert str(caught.value).endswith(f". Received: {argument}={value!r}")


@pytest.mark.parametrize("rate", [0, 1, np.float32(0.25), np.float64(0.25), np.int64(2), np.array(0.5), 0.0])
@every_rule
def test_numbers_of_every_kind_are_learning_rates(rule: str, rate: Any) -> None:
    assert float(PAIRS[rule].ours(rate).learning_rate) == float(rate)


@pytest.mark.parametrize("value", [0, 0.0, 0.5, np.float32(0.5), np.array(0.5)])
def test_numbers_of_every_kind_are_shares(value: Any) -> None:
    config = companion.Momentum(momentum=value).get_config() | companion.Adam(beta_1=value, beta_2=value).get_config()
    assert [(type(config[key]), config[key]) for key in ("momentum", "beta_1", "beta_2")] == [(float, value)] * 3


def test_unknown_arguments_are_refused_by_keras() -> None:
    with pytest.raises(ValueError, match="lr"):
        companion.SGD(lr=0.1)


# Private names


def test_one_private_name_of_keras() -> None:
    tree = ast.parse(inspect.getsource(companion.optimizers))
    attributes = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    imported = {alias.name for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) for alias in node.names}
    private = {name for name in attributes | imported if name.startswith("_") and not name.endswith("__")}
    assert {name for name in private if hasattr(keras.optimizers.Optimizer, name)} == {"_get_variable_index"}
    assert isinstance(keras.optimizers.Optimizer._get_variable_index, types.FunctionType)


# Known-wrong rules (SGD has no slot, so coupled decay is the same rule there)


class WrongMomentum(companion.Momentum):
    """Momentum and Nesterov with one named mistake; with none, the right rule."""

    def __init__(self, *args: Any, mistake: str = "", weight_decay: float | None = None, **kwargs: Any) -> None:
        coupled = mistake == "decay through the slot"
        super().__init__(*args, weight_decay=None if coupled else weight_decay, **kwargs)
        self.mistake, self.coupled_decay = mistake, weight_decay if coupled else 0.0

    def update_step(self, gradient: Any, variable: Any, learning_rate: Any) -> None:
        h, beta = (ops.cast(value, variable.dtype) for value in (learning_rate, self.momentum))
        gradient = gradient + self.coupled_decay * variable
        v = self.velocities[self._get_variable_index(variable)]
        last = ops.copy(v)
        self.assign(v, (-v if self.mistake == "sign of the velocity" else v) * beta - h * gradient)
        ahead = last if self.mistake == "looks ahead with the last velocity" else v
        sign = -1 if self.mistake == "sign of the gradient" else 1
        self.assign_add(variable, beta * ahead - sign * h * gradient if self.nesterov else v)


class WrongAdam(companion.Adam):
    """Adam with one named mistake; with none, the right rule."""

    def __init__(self, *args: Any, mistake: str = "", weight_decay: float | None = None, **kwargs: Any) -> None:
        coupled = mistake == "decay through the slot"
        super().__init__(*args, weight_decay=None if coupled else weight_decay, **kwargs)
        self.mistake, self.coupled_decay = mistake, weight_decay if coupled else 0.0

    def update_step(self, gradient: Any, variable: Any, learning_rate: Any) -> None:
        late = self.mistake == "counts updates from zero"
        h, t, beta_1, beta_2 = (
            ops.cast(value, variable.dtype)
            for value in (learning_rate, self.iterations + (0 if late else 1), self.beta_1, self.beta_2)
        )
        if late:
            t = ops.maximum(t, 1)
        gradient = gradient + self.coupled_decay * variable
        m, v = (slots[self._get_variable_index(variable)] for slots in (self.momentums, self.velocities))
        self.assign_add(m, (gradient - m) * (1 - self.beta_1))
        self.assign_add(v, (ops.square(gradient) - v) * (1 - self.beta_2))
        one = ops.ones_like(h)
        first = one if self.mistake == "no first correction" else one - ops.power(beta_1, t)
        second = one if self.mistake == "no second correction" else one - ops.power(beta_2, t)
        inside = self.mistake == "epsilon inside the root"
        root = ops.sqrt(v + self.epsilon) if inside else ops.sqrt(v) + self.epsilon
        self.assign_sub(variable, h * ops.sqrt(second) / first * m / root)


WRONG_RULES = [
    ("Momentum", "nothing", "sign of the velocity"),
    ("Momentum", "weight_decay", "decay through the slot"),
    ("Nesterov", "nothing", "sign of the velocity"),
    ("Nesterov", "nothing", "sign of the gradient"),
    ("Nesterov", "nothing", "looks ahead with the last velocity"),
    ("Nesterov", "weight_decay", "decay through the slot"),
    ("Adam", "nothing", "no first correction"),
    ("Adam", "nothing", "no second correction"),
    ("Adam", "nothing", "counts updates from zero"),
    ("Adam", "nothing", "epsilon inside the root"),
    ("Adam", "weight_decay", "decay through the slot"),
]
wrong_if_mistaken = pytest.mark.xfail(strict=True, raises=AssertionError, reason="a known-wrong rule")


@pytest.mark.parametrize("dtype", thinned(TOLERANCE, "float64"))
@pytest.mark.parametrize(
    ("rule", "option", "mistake"),
    [
        *((rule, option, "") for rule, option in dict.fromkeys(case[:2] for case in WRONG_RULES)),
        *(pytest.param(*case, marks=wrong_if_mistaken) for case in WRONG_RULES),
    ],
)
def test_the_comparison_tells_right_from_wrong(rule: str, option: str, mistake: str, dtype: str) -> None:
    make = partial(WrongAdam if rule == "Adam" else WrongMomentum, mistake=mistake)
    assert_equals_builtin(partial(make, nesterov=True) if rule == "Nesterov" else make, rule, option, dtype)
