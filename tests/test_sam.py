"""Holds `companion.SAM` against two passes in NumPy, whose answer Keras's own optimizers are handed."""

import pathlib
from collections.abc import Callable
from typing import Any

import keras
import numpy as np
import pytest

from companion import SAM, GradientAccumulation, GradientOracle, Heun, InjectedOptimizer, ParameterGroups, inject
from tests.kit.cases import wrong
from tests.kit.dtypes import set_dtype
from tests.kit.integrators import BATCHES, START, X, Y, arrays, fitted, go, gradient, prepared, sequential
from tests.kit.models import CASES
from tests.kit.numbers import assert_close

pytestmark = pytest.mark.usefixtures("float64")
P = keras.optimizers
L = keras.layers


def uphill(values: Any, slopes: Any, rho: float) -> Any:
    norm = np.sqrt(sum(np.sum(slope**2) for slope in slopes))
    return go(values, -rho / norm, (1, slopes))


def each_by_its_norm(values: Any, slopes: Any, rho: float) -> Any:
    return [v + rho * s / np.linalg.norm(s) for v, s in zip(values, slopes, strict=True)]


def downhill(values: Any, slopes: Any, rho: float) -> Any:
    return uphill(values, slopes, -rho)


def by_the_slope(values: Any, slopes: Any, rho: float) -> Any:
    return go(values, -rho, (1, slopes))


def nowhere(values: Any, slopes: Any, rho: float) -> Any:
    return values


INNER: dict[str, Callable[[], Any]] = {
    "SGD": lambda: P.SGD(0.25),
    "momentum": lambda: P.SGD(P.schedules.ExponentialDecay(0.5, 1, 0.5), momentum=0.9, global_clipnorm=0.2),
    "groups": lambda: ParameterGroups(P.SGD(0.25), {"bias": 0.5, "kernel": P.SGD(0.125, momentum=0.9)}),
    "AdamW": lambda: P.AdamW(0.05, weight_decay=0.1, use_ema=True, ema_momentum=0.5, ema_overwrite_frequency=2),
}


def by_hand(make: Callable[[], Any], where: Any, rho: float, epochs: int = 1) -> Any:
    """Keras's optimizer, handed the gradient where it is asked."""
    model, optimizer = sequential(), make()
    optimizer.build(model.trainable_variables)
    for batch in BATCHES * epochs:
        values = arrays(model)
        point = where(values, gradient(values, X[batch], Y[batch]), rho)
        answer = gradient(point, X[batch], Y[batch])
        optimizer.apply([keras.ops.convert_to_tensor(each) for each in answer], model.trainable_variables)
    return arrays(model)


@pytest.mark.parametrize(
    ("name", "where", "options"),
    [
        ("SGD", uphill, {"jit_compile": True}),
        ("momentum", uphill, {}),
        ("AdamW", uphill, {"run_eagerly": True}),
        ("groups", uphill, {"run_eagerly": True}),
        wrong("SGD", each_by_its_norm, {"run_eagerly": True}, why="each variable by its own norm"),
        wrong("SGD", downhill, {"run_eagerly": True}, why="downhill"),
        wrong("SGD", by_the_slope, {"run_eagerly": True}, why="not by a distance"),
        wrong("SGD", nowhere, {"run_eagerly": True}, why="asks here again"),
    ],
)
def test_two_passes_in_numpy(name: str, where: Any, options: dict[str, Any]) -> None:
    model = fitted(prepared(SAM(INNER[name](), rho=0.3), **options))
    assert_close(arrays(model), by_hand(INNER[name], where, 0.3), 1e-12)


def test_in_parts_it_is_as_on_the_whole_batch() -> None:
    model = fitted(prepared(SAM(INNER["momentum"](), rho=0.3), micro_batches=4, run_eagerly=True))
    assert_close(arrays(model), by_hand(INNER["momentum"], uphill, 0.3), 1e-12)


@pytest.mark.parametrize("scale", [0.0, 1e-25, 1.0, 1e25])
def test_gradients_of_any_size(scale: float) -> None:
    """Of the length it goes, nothing over- or underflows; where the slope is zero it asks here."""
    set_dtype("float32")
    far = []

    class Asked(SAM):
        def direction(self, oracle: Any, values: Any, learning_rate: Any) -> Any:
            def ask(points: Any) -> Any:
                far.append(
                    np.sqrt(sum(np.sum((np.array(p) - np.array(v)) ** 2) for p, v in zip(points, values, strict=True)))
                )
                return [scale * answer for answer in oracle(points)]

            return super().direction(ask, values, learning_rate)

    model = prepared(Asked(P.SGD(1e-30), rho=0.5), run_eagerly=True)
    model.train_on_batch(X[:6], Y[:6])
    assert far == pytest.approx([0, 0.5 if scale else 0], abs=1e-6)
    assert_close(arrays(model), START, 1e-4)


@pytest.mark.parametrize("parts", [1, 3])
def test_dropout_draws_once_and_statistics_move_once(parts: int) -> None:
    """On a loss that is linear in the weights the second answer is the first one, if the masks are the same."""
    set_dtype("float32")
    states, ends = [], []
    for make in (P.SGD, lambda rate: SAM(P.SGD(rate), rho=5.0)):
        keras.utils.set_random_seed(0)
        model = keras.Sequential(
            [keras.Input((3,)), L.BatchNormalization(scale=False, center=False), L.Dropout(0.5), L.Dense(1)]
        )
        model.compile(make(0.1), lambda y, p: keras.ops.mean(p, -1), metrics=["mae"], run_eagerly=True)
        inject(model, parts)
        logs = [model.train_on_batch(X[:6], Y[:6], return_dict=True) for _ in range(2)]
        states.append(
            [np.array(v.value) for v in model.non_trainable_variables]
            + [np.array([float(each) for each in log.values()]) for log in logs]
        )
        ends.append(arrays(model))
    assert_close(states[0], states[1], 1e-6)
    assert_close(ends[0], ends[1], 1e-6)


@pytest.mark.parametrize("how", ["file", "weights"])
def test_saved_loaded_and_resumed(how: str, tmp_path: pathlib.Path) -> None:
    model = fitted(prepared(SAM(INNER["AdamW"](), rho=0.3), run_eagerly=True))
    if how == "file":
        model.save(tmp_path / "model.keras")
        loaded = inject(keras.saving.load_model(tmp_path / "model.keras"))
    else:
        model.save_weights(tmp_path / "model.weights.h5")
        loaded = prepared(SAM(INNER["AdamW"](), rho=0.3), run_eagerly=True)
        loaded.optimizer.build(loaded.trainable_variables)
        loaded.load_weights(tmp_path / "model.weights.h5")
    assert loaded.optimizer.rho == 0.3
    for each in (model, loaded):
        fitted(each)
    assert_close(arrays(loaded), arrays(model), 0)
    assert len(model.optimizer.variables) == len(model.optimizer.inner_optimizer.variables)
    assert int(loaded.optimizer.iterations) == 8


def test_settings_reach_the_optimizer_inside_and_rho_stays_outside() -> None:
    optimizer = SAM(P.Adadelta(0.5, rho=0.9), 0.25)
    optimizer.clipnorm, optimizer.learning_rate = 0.1, 0.125
    inner = optimizer.inner_optimizer
    assert (inner.clipnorm, float(inner.learning_rate), inner.rho, optimizer.rho) == (0.1, 0.125, 0.9, 0.25)
    halved = keras.callbacks.LearningRateScheduler(lambda epoch, rate: 0.5 / 2**epoch)
    model = fitted(prepared(SAM(P.SGD(0.1), 0.3), run_eagerly=True), callbacks=[halved], epochs=2)
    assert float(model.optimizer.inner_optimizer.learning_rate) == 0.25
    ends = by_hand(lambda: P.SGD(P.schedules.PiecewiseConstantDecay([3], [0.5, 0.25])), uphill, 0.3, epochs=2)
    assert_close(arrays(model), ends, 1e-12)


def test_a_rate_that_is_called_is_called_once_a_step() -> None:
    calls: list[int] = []

    def rate() -> float:
        calls.append(1)
        return 0.25

    model = prepared(SAM(P.SGD(rate), 0.3), run_eagerly=True)
    calls.clear()
    model.train_on_batch(X[:6], Y[:6])
    assert len(calls) == 1


@pytest.mark.skipif(not hasattr(P, "MultiOptimizer"), reason="this Keras has no MultiOptimizer")
def test_around_an_optimizer_without_one_rate() -> None:
    multi = P.MultiOptimizer(P.OptimizerMap(P.SGD(0.25)))
    model = fitted(prepared(SAM(multi, 0.3), run_eagerly=True))
    assert_close(arrays(model), by_hand(INNER["SGD"], uphill, 0.3), 1e-12)


def test_an_accumulation_inside_takes_the_answers_of_its_window() -> None:
    model = fitted(prepared(SAM(GradientAccumulation(P.SGD(0.25), 2), 0.3), run_eagerly=True))
    values = START
    for pair in (BATCHES[:2], BATCHES[2:]):
        answers = []
        for batch in pair:
            slopes = gradient(values, X[batch], Y[batch])
            answers.append(gradient(uphill(values, slopes, 0.3), X[batch], Y[batch]))
        values = go(values, 0.125, (1, answers[0]), (1, answers[1]))
    assert_close(arrays(model), values, 1e-12)


def test_an_overflow_lowers_the_scale_and_moves_nothing() -> None:
    set_dtype("float32")
    keras.config.set_dtype_policy("mixed_float16")
    model = prepared(SAM(P.SGD(1e-4), 0.05), run_eagerly=True)
    assert isinstance(model.optimizer, P.LossScaleOptimizer)
    model.optimizer.build(model.trainable_variables)
    before, scale = arrays(model), float(model.optimizer.dynamic_scale)
    model.train_on_batch(X[:6], Y[:6] * 2e2)
    assert float(model.optimizer.dynamic_scale) == scale / 2
    assert_close(arrays(model), before, 0)
    for _ in range(12):
        model.train_on_batch(X[:6], Y[:6] * 2e2)
    assert 0 < int(model.optimizer.iterations) < 12


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: SAM("adam"), "`optimizer` must be an instance of keras.optimizers.Optimizer"),
        (lambda: SAM(SAM(P.SGD())), "`optimizer` asks uphill already: wrap it once"),
        (lambda: SAM(P.LossScaleOptimizer(P.SGD())), "must not be a LossScaleOptimizer, which belongs outside"),
        (lambda: SAM(P.SGD(), -0.1), r"`rho` must be a number in \[0, inf\). Received: rho=-0.1"),
        (lambda: SAM(P.SGD(), float("nan")), "`rho` must be a number"),
        (lambda: prepared(SAM(Heun(0.1))), "Heun asks for several gradients.*wrapped by SAM"),
        (lambda: prepared(GradientAccumulation(SAM(P.SGD(0.1)), 2)), "SAM asks for several.*by GradientAccumulation"),
        (lambda: prepared(SAM(P.SGD(gradient_accumulation_steps=2))), "pass `micro_batches`"),
    ],
)
def test_what_is_refused(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_a_step_of_ones_own() -> None:
    model = sequential()
    model.compile(SAM(P.SGD(0.25), 0.3), "mse")
    model.optimizer.step(GradientOracle(model, (X[:6], Y[:6])))
    slopes = gradient(START)
    assert_close(arrays(model), go(START, 0.25, (1, gradient(uphill(START, slopes, 0.3)))), 1e-12)
    assert isinstance(model.optimizer, InjectedOptimizer)


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_on_every_kind_of_model_it_is_the_optimizer_inside_if_it_goes_nowhere(name: str) -> None:
    set_dtype("float32")
    found = []
    for wrap in (lambda inner: inner, lambda inner: SAM(inner, 0.0)):
        case = CASES[name]()
        if not case.again:
            pytest.skip("this model cannot be asked again")
        outside = case.model.optimizer
        if any(variable.constraint is not None for variable in case.model.variables):
            pytest.skip("it asks at the nearest point that meets the constraints")
        is_scaled = isinstance(outside, P.LossScaleOptimizer)
        case.model.optimizer = P.LossScaleOptimizer(wrap(outside.inner_optimizer)) if is_scaled else wrap(outside)
        logs = inject(case.model).train_step(case.batch)
        numbers = [np.asarray(value, "float64") for value in keras.tree.flatten(logs)]
        found.append([*(np.asarray(variable.value, "float64") for variable in case.model.variables), *numbers])
    assert_close(found[0], found[1], 1e-5)
