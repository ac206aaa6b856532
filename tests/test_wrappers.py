"""Holds what every optimizer around another one promises: settings reach it, no slot is lost, callbacks find it."""

import functools
import pathlib
from collections.abc import Callable, Iterator
from typing import Any

import keras
import numpy as np
import pytest

from companion import CoalesceGradients, FlushAtEpochEnd, GradientAccumulation, InjectedOptimizer
from companion.wrapping import SETTINGS, WrappingOptimizer, wrapped_by
from tests.kit.saving import by_backup, by_checkpoint, by_file, by_list, by_weights

SGD = keras.optimizers.SGD
MULTI = hasattr(keras.optimizers, "MultiOptimizer")  # since Keras 3.14
WRAPPERS: dict[str, Callable[..., Any]] = {
    "sums": lambda inner: GradientAccumulation(inner, 4, remainder="carry"),
    "rows": CoalesceGradients,
    "rows of sums": lambda inner: CoalesceGradients(GradientAccumulation(inner, 4, remainder="carry")),
    "sums of rows": lambda inner: GradientAccumulation(CoalesceGradients(inner), 4, remainder="carry"),
}
GENERATOR = np.random.default_rng(0)
X, Y = GENERATOR.normal(size=(24, 3)).astype("float32"), GENERATOR.normal(size=(24, 1)).astype("float32")
every_wrapper = pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS)


@pytest.fixture(autouse=True)
def policy() -> Iterator[None]:
    before = keras.config.dtype_policy()
    yield
    keras.config.set_dtype_policy(before)


def network(optimizer: Any, **compile: Any) -> keras.Model:
    keras.utils.set_random_seed(0)
    model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(2, "tanh", name="one"), keras.layers.Dense(1)])
    model.compile(optimizer, "mse", **compile)
    return model


def values(variables: Any) -> list[np.ndarray]:
    return [np.asarray(variable) for variable in variables]


def assert_equal(found: list[np.ndarray], expected: list[np.ndarray], tolerance: float = 0.0) -> None:
    for mine, theirs in zip(found, expected, strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=tolerance, atol=tolerance)


def go_on(model: Any, batches: Any) -> list[np.ndarray]:
    for index in batches:
        model.train_on_batch(X[4 * index : 4 * index + 4], Y[4 * index : 4 * index + 4])
    return values([*model.variables, *model.optimizer.variables])


# Saving: in every way, alone and where loss scaling is outside


SAVED = [("sums", how, True) for how in (by_file, by_weights, by_checkpoint, by_list, by_backup)]
SAVED += [("rows of sums", by_file, True), ("sums of rows", by_weights, True), ("rows", by_backup, True)]
SAVED += [("rows of sums", by_checkpoint, False), ("sums of rows", by_backup, False), ("sums", by_list, False)]


@pytest.mark.parametrize(("wrap", "how", "scaled"), [(WRAPPERS[name], how, scaled) for name, how, scaled in SAVED])
def test_a_window_survives_every_way_to_save(wrap: Any, how: Any, scaled: bool, tmp_path: pathlib.Path) -> None:
    """Two micro-batches of four before, two after: to the bit."""
    if scaled:
        keras.config.set_dtype_policy("mixed_float16")

    def fresh() -> keras.Model:
        model = network(wrap(SGD(0.1, momentum=0.9)), run_eagerly=True)
        model.optimizer.build(model.trainable_variables)
        return model

    model = fresh()
    go_on(model, [0, 1])
    resumed = how(model, fresh, tmp_path)
    resumed.compile(resumed.optimizer, "mse", run_eagerly=True)
    assert isinstance(resumed.optimizer, keras.optimizers.LossScaleOptimizer) is scaled
    assert_equal(go_on(resumed, []), go_on(model, []))
    assert_equal(go_on(resumed, [2, 3, 4]), go_on(model, [2, 3, 4]))


@every_wrapper
def test_every_slot_is_among_the_variables(wrap: Any) -> None:
    """Also where a LossScaleOptimizer builds, in which Keras tracks nothing that is assigned."""
    for outer in (lambda optimizer: optimizer, keras.optimizers.LossScaleOptimizer):
        optimizer = outer(wrap(keras.optimizers.Adam(0.1, use_ema=True)))
        optimizer.build([keras.Variable([1.0, 2.0]), keras.Variable(1.0)])
        listed = {id(variable) for variable in optimizer.variables}
        assert len(listed) == len(optimizer.variables)
        for layer in wrapped_by(optimizer):
            held = [v for value in vars(layer).values() for v in (value if isinstance(value, list) else [value])]
            theirs = {id(variable) for variable in layer._trainable_variables}
            own = [v for v in held if isinstance(v, keras.Variable) and id(v) not in theirs]
            unused = {"iteration", "learning_rate"} if isinstance(layer, CoalesceGradients) else set()
            assert all(id(variable) in listed for variable in own if variable.name not in unused)
    numbers = [np.full(variable.shape, 2) for variable in optimizer.inner_optimizer.variables]
    optimizer.inner_optimizer.set_weights(numbers)
    assert_equal(values(optimizer.inner_optimizer.variables), numbers)


def test_dropouts_seed_is_not_in_a_backup_of_keras(tmp_path: pathlib.Path) -> None:
    """What the docstring says of BackupAndRestore."""
    model = keras.Sequential([keras.Input((3,)), keras.layers.Dropout(0.5, seed=1), keras.layers.Dense(1)])
    model.compile("sgd", "mse", run_eagerly=True)
    seed = model.layers[0].seed_generator.state
    keep = keras.callbacks.BackupAndRestore(str(tmp_path), double_checkpoint=True)
    keep.set_model(model)
    keep.on_epoch_end(0)
    assert [path.name for path in tmp_path.glob("*.bkp")] == []
    keep.on_epoch_end(1)
    assert len(list(tmp_path.glob("*.bkp"))) == 2
    seed.assign(np.asarray(seed) + 1)
    after = values([seed])
    model.load_weights(tmp_path / "latest.weights.h5")
    assert_equal(values([seed]), after)


# Settings


@every_wrapper
def test_what_is_set_reaches_the_wrapped_optimizer(wrap: Any) -> None:
    numbers = dict.fromkeys(SETTINGS, 0.5) | {"use_ema": True, "ema_overwrite_frequency": 2, "momentum": 0.25}
    del numbers["gradient_accumulation_steps"]
    inner = SGD(0.1, momentum=0.9)
    optimizer = wrap(inner)
    for name, value in numbers.items():
        assert getattr(optimizer, name) == getattr(inner, name)
        setattr(optimizer, name, value)
        assert getattr(inner, name) == getattr(optimizer, name) == value
    optimizer.of_my_own = 3
    assert optimizer.of_my_own == 3
    assert not hasattr(inner, "of_my_own")
    assert not hasattr(optimizer, "beta_1")
    optimizer.build([keras.Variable([0.0])])
    assert len([v for v in optimizer.variables if "average" in v.name]) == 1
    with pytest.raises(ValueError, match="Received: gradient_accumulation_steps=3"):
        optimizer.gradient_accumulation_steps = 3
    later = wrap(SGD())
    later.build([keras.Variable([0.0])])
    with pytest.raises(ValueError, match=r"constructor of a new one. Received: use_ema=True"):
        later.use_ema = True


def test_a_clip_that_is_set_clips() -> None:
    for wrap in (CoalesceGradients, functools.partial(GradientAccumulation, steps=1)):
        weight, optimizer = keras.Variable([0.0]), wrap(SGD(1.0))
        optimizer.clipvalue = 0.5
        optimizer.apply([np.array([3.0])], [weight])
        assert values([weight])[0].tolist() == [-0.5]


@pytest.mark.skipif(not MULTI, reason="this Keras has no MultiOptimizer")
@pytest.mark.parametrize("wrap", [CoalesceGradients, functools.partial(GradientAccumulation, steps=2)])
def test_callbacks_find_the_optimizers_in_a_multi_optimizer(wrap: Any) -> None:
    def rates(wrap: Callable[[Any], Any]) -> Any:
        rules = keras.optimizers.OptimizerMap(default_optimizer=SGD(0.05, use_ema=True, name="slow"))
        rules[".*one.*"] = SGD(0.1, use_ema=True, name="fast")
        inner = keras.optimizers.MultiOptimizer(rules)
        model = network(wrap(inner), run_eagerly=True)
        callbacks = [
            keras.callbacks.LearningRateScheduler(lambda epoch, rate: 0.5 * rate),
            keras.callbacks.ReduceLROnPlateau("loss", factor=0.1, min_delta=1e9, patience=1, min_lr=0.0),
            keras.callbacks.SwapEMAWeights(),
        ]
        history = model.fit(X, Y, epochs=3, callbacks=callbacks, validation_data=(X, Y), verbose=0).history
        return sorted(history), [round(float(each.learning_rate), 7) for each in inner.optimizers]

    assert rates(wrap) == rates(lambda optimizer: optimizer)
    optimizer = wrap(keras.optimizers.MultiOptimizer(keras.optimizers.OptimizerMap(SGD())))
    with pytest.raises(ValueError, match=r"inner_optimizer\.optimizers"):
        optimizer.clipnorm = 1.0
    names = [type(layer).__name__ for layer in wrapped_by(CoalesceGradients(GradientAccumulation(SGD(), 2)))]
    assert names == ["CoalesceGradients", "GradientAccumulation", "SGD"]
    assert len(list(wrapped_by(optimizer))) == 3


# Averages


@pytest.mark.parametrize(
    ("wrap", "on_epoch", "mixed"),
    [
        (WRAPPERS["sums"], True, False),
        (WRAPPERS["sums"], True, True),
        (WRAPPERS["sums of rows"], False, True),
        (WRAPPERS["rows of sums"], True, False),
        (WRAPPERS["rows"], False, True),
    ],
)
def test_swapped_averages_are_those_of_the_large_batch(wrap: Any, on_epoch: bool, mixed: bool) -> None:
    """Six micro-batches of 4 in an epoch, 4 in a window: flushed before the swap, or by `fit` after it."""
    keras.config.set_dtype_policy("mixed_float16" if mixed else "float32")
    histories, ends = [], []
    accumulates = any(isinstance(layer, GradientAccumulation) for layer in wrapped_by(wrap(SGD())))
    for ours in (False, True):
        optimizer = SGD(0.3, use_ema=True, ema_momentum=0.5)
        model = network(wrap(optimizer) if ours else optimizer, run_eagerly=True)
        callbacks: list[Any] = [keras.callbacks.SwapEMAWeights(swap_on_epoch=on_epoch)]
        if ours and accumulates:
            next(o for o in wrapped_by(model.optimizer) if isinstance(o, GradientAccumulation)).remainder = "flush"
        batch = 16 if accumulates and not ours else 4
        whole = model.fit(X, Y, batch, epochs=1, shuffle=False, callbacks=callbacks, verbose=0)
        histories.append(whole.history)
        ends.append(values(model.weights))
    assert_equal(ends[1], ends[0], 2e-3 if mixed else 1e-6)


def test_a_frozen_weight_is_not_its_average() -> None:
    """Keras pairs the averages with the weights that are trained by their places, and mixes them up."""
    for wrap in (CoalesceGradients, functools.partial(GradientAccumulation, steps=2)):
        for settings in ({}, {"ema_overwrite_frequency": 2}):
            model = network(wrap(SGD(0.5, use_ema=True, ema_momentum=0.9, **settings)), run_eagerly=True)
            go_on(model, [0, 1, 2, 3, 4])
            model.layers[0].trainable = False
            model.compile(model.optimizer, "mse", run_eagerly=True)
            frozen, head = values(model.layers[0].weights), values(model.layers[1].weights)
            model.fit(X, Y, 8, verbose=0)
            if wrap is not CoalesceGradients or not settings:  # there Keras's own step moves it
                assert_equal(values(model.layers[0].weights), frozen)
            assert not np.array_equal(values(model.layers[1].weights)[0], head[0])


# Errors


@pytest.mark.parametrize("wrap", [CoalesceGradients, lambda optimizer: GradientAccumulation(optimizer, 2)])
def test_what_cannot_be_wrapped_is_refused_in_the_same_words(wrap: Any) -> None:
    for wrong in ("adam", None, SGD, 3):
        with pytest.raises(ValueError, match=r"`optimizer` must be an instance of.*get.*Received: optimizer="):
            wrap(wrong)
    with pytest.raises(ValueError, match=r"put that outside, LossScaleOptimizer\((Coal|Grad)"):
        wrap(keras.optimizers.LossScaleOptimizer(SGD()))
    with pytest.raises(ValueError, match="already"):
        wrap(wrap(SGD()))
    inner = SGD()
    inner.build([keras.Variable(1.0)])
    with pytest.raises(ValueError, match=r"Unknown variable.*Received: variable='stranger'"):
        wrap(inner).build([keras.Variable(1.0, name="stranger")])


def test_names_of_keras_that_wrappers_use_are_there() -> None:
    optimizer = SGD(use_ema=True)
    optimizer.build([keras.Variable(1.0)])
    assert len(optimizer._model_variables_moving_average) == len(optimizer._trainable_variables) == 1
    assert {*SETTINGS, "learning_rate", "name"} == set(optimizer.get_config()) - {"momentum", "nesterov"}
    with pytest.raises(ValueError, match="must be compiled with a GradientAccumulation"):
        network(SGD()).fit(X, Y, verbose=0, callbacks=[FlushAtEpochEnd()])
    assert issubclass(CoalesceGradients, WrappingOptimizer)


# The smallest changes elsewhere


def test_a_weight_comes_from_around() -> None:
    weight = keras.Variable([0.0])
    optimizer = GradientAccumulation(SGD(1.0), 2, normalize="weight")
    for gradient, share in ((1.0, 3.0), (5.0, 1.0)):
        with optimizer.weighed(9.0), optimizer.weighed(share):
            optimizer.apply([np.array([gradient])], [weight])
    assert values([weight])[0].tolist() == [-2.0]
    with pytest.raises(ValueError, match="weight=None"):
        optimizer.apply([np.array([1.0])], [weight])


def test_a_rule_that_would_never_run_is_refused() -> None:
    with pytest.raises(TypeError, match="Both would move by the rule of InjectedOptimizer and never by that of Adam"):
        type("Both", (InjectedOptimizer, keras.optimizers.Adam), {})

    class Same(keras.optimizers.Adam, InjectedOptimizer):
        def direction(self, oracle: Any, values: Any, learning_rate: Any) -> Any:
            return oracle(values)

    ends = []
    for kind in (keras.optimizers.Adam, Same):
        model = network(kind(0.1), run_eagerly=True)
        if kind is Same:
            model.optimizer.inject(model)
        go_on(model, [0, 1])
        ends.append(values(model.weights))
    assert_equal(ends[1], ends[0], 1e-6)
