"""Holds `companion.runge_kutta` against the methods written out in NumPy, on a network differentiated by hand."""

import copy
import functools
import re
from collections.abc import Callable
from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf

import companion
from companion import RK23, RK45, Heun, RungeKutta, RungeKuttaChebyshev, gradient_flow, inject
from companion.gradient_flow import ButcherTableau
from companion.oracle import GradientOracle
from tests.kit.dtypes import set_dtype
from tests.kit.integrators import (
    BATCHES,
    CLASSES,
    METHODS,
    START,
    Subclassed,
    Values,
    X,
    Y,
    arrays,
    bogacki_shampine,
    bogacki_shampine_pair,
    fitted,
    functional,
    go,
    gradient,
    heun,
    loss,
    numpy_epochs,
    optimizer_of,
    prepared,
    sequential,
    unbuilt,
)
from tests.kit.numbers import assert_close

L = keras.layers
pytestmark = pytest.mark.usefixtures("float64")


def test_every_method_is_tested() -> None:
    assert set(METHODS) == {*gradient_flow.TABLEAUX, "chebyshev"}


@functools.cache
def compiled(method: str, dtype: str) -> Any:
    set_dtype(dtype)
    return prepared(optimizer_of(method))


@pytest.mark.parametrize(("dtype", "tolerance"), [("float64", 1e-12), ("float32", 2e-7)])
@pytest.mark.parametrize("method", METHODS)
def test_every_method_is_that_of_numpy(method: str, dtype: str, tolerance: float) -> None:
    model = compiled(method, dtype)
    model.set_weights(START)
    assert_close(arrays(fitted(model)), numpy_epochs(method), tolerance)
    assert {variable.dtype for variable in model.trainable_variables} == {dtype}


def logistic_gradient(weight: Any) -> Any:
    return X[:6].T @ (1 / (1 + np.exp(-(X[:6] @ weight))) - CLASSES) / 6


@functools.cache
def logistic_flow() -> Any:
    """Where the flow of a logistic regression is at time 4."""
    import scipy.integrate

    return scipy.integrate.solve_ivp(
        lambda time, w: -logistic_gradient(w[:, None])[:, 0], (0, 4), START[0][:, 0], "DOP853", rtol=1e-13, atol=1e-15
    ).y[:, -1:]


@pytest.mark.parametrize("method", METHODS)
def test_observed_order(method: str) -> None:
    model = keras.Sequential([keras.Input((3,)), L.Dense(1, None, False)])
    model.compile(optimizer_of(method), keras.losses.BinaryCrossentropy(from_logits=True), jit_compile=False)
    inject(model)
    batch, errors, counts = tf.data.Dataset.from_tensors((X[:6], CLASSES)), [], np.array([32, 128])
    for count in counts:
        model.set_weights([START[0][:, :1]])
        model.optimizer.learning_rate = 4 / count
        model.fit(batch.repeat(count), verbose=0)
        errors.append(np.linalg.norm(arrays(model)[0] - logistic_flow()))
    assert gradient_flow.observed_order(4 / counts, errors) == pytest.approx(METHODS[method][1], abs=0.1)


# Every kind of model, every way to run


@pytest.mark.parametrize(
    ("build", "options"),
    [
        (sequential, {"jit_compile": True}),
        (functional, {"run_eagerly": True}),
        (Subclassed, {"steps_per_execution": 2}),
        (Subclassed, {"run_eagerly": True}),
        (unbuilt, {"steps_per_execution": 3}),
        (unbuilt, {"jit_compile": True}),
    ],
)
def test_models_and_modes(build: Callable[[], Any], options: dict[str, Any]) -> None:
    model = fitted(prepared(RungeKutta(0.25, "kutta3"), build, **options), epochs=2)
    assert_close(arrays(model), numpy_epochs("kutta3", epochs=2))
    assert int(model.optimizer.iterations) == 8


def test_train_on_batch_and_the_size_of_a_batch_may_change() -> None:
    model, values = prepared(Heun(0.25)), START
    for size in (3, 14, 1, 24):
        shown = model.train_on_batch(X[:size], Y[:size])
        assert shown == pytest.approx(loss(values, X[:size], Y[:size]), rel=1e-9) or size != 3  # later: a running mean
        values = heun(lambda v, n=size: gradient(v, X[:n], Y[:n]), values, 0.25)
    assert_close(arrays(model), values)


def test_the_named_classes() -> None:
    for named, method in ((Heun, "heun"), (RK23, "bogacki_shampine"), (RK45, "dormand_prince")):
        optimizer = named(0.25, rtol=None)
        assert optimizer.tableau is gradient_flow.TABLEAUX[method]
        model = fitted(prepared(optimizer, run_eagerly=True))
        assert_close(arrays(model), numpy_epochs(method))
    assert RK23().rtol == RK45().rtol == 1e-3
    assert Heun().rtol is None
    assert RungeKutta().tableau is gradient_flow.TABLEAUX["heun"]
    assert RungeKutta(method="rk45").tableau is gradient_flow.TABLEAUX["dormand_prince"]


THREE_EIGHTHS = ButcherTableau(
    [[0, 0, 0, 0], [1 / 3, 0, 0, 0], [-1 / 3, 1, 0, 0], [1, -1, 1, 0]],
    [1 / 8, 3 / 8, 3 / 8, 1 / 8],
    [0, 1 / 3, 2 / 3, 1],
    4,
)


def test_a_tableau_of_the_users_own() -> None:
    model = fitted(prepared(RungeKutta(0.25, THREE_EIGHTHS), run_eagerly=True))
    values = START
    for batch in BATCHES:
        f = lambda v, b=batch: gradient(v, X[b], Y[b])  # noqa: E731
        k1 = f(values)
        k2 = f(go(values, 0.25 / 3, (1, k1)))
        k3 = f(go(values, 0.25 / 3, (-1, k1), (3, k2)))
        k4 = f(go(values, 0.25, (1, k1), (-1, k2), (1, k3)))
        values = go(values, 0.25 / 8, (1, k1), (3, k2), (3, k3), (1, k4))
    assert_close(arrays(model), values)
    again = keras.optimizers.deserialize(keras.optimizers.serialize(model.optimizer))
    assert again.tableau == THREE_EIGHTHS


def test_configurations_come_back() -> None:
    for optimizer in (
        RungeKutta(0.5, "rk4", clipnorm=2.0, name="mine"),
        RungeKutta(0.5, "rk45", rtol=0.01, atol=1e-4),
        RungeKutta(keras.optimizers.schedules.ExponentialDecay(0.5, 10, 0.9), "rk23"),
        Heun(0.5, weight_decay=0.25),
        RK23(0.5, rtol=0.125),
        RK45(0.5, atol=0.0),
        RungeKuttaChebyshev(0.5, stages=3, damping=0.25),
    ):
        serialized = keras.optimizers.serialize(optimizer)
        again = keras.optimizers.deserialize(copy.deepcopy(serialized))  # Keras changes what it reads
        assert type(again) is type(optimizer)
        assert keras.optimizers.serialize(again) == serialized
    assert RK23(0.5).get_config()["learning_rate"] == 0.5


# The number of questions


@pytest.mark.parametrize(
    ("make", "questions"),
    [
        (lambda: RungeKutta(0.1, "euler"), 1),
        (lambda: Heun(0.1), 2),
        (lambda: Heun(0.1, rtol=0.1), 2),
        (lambda: RungeKutta(0.1, "extragradient"), 2),
        (lambda: RungeKutta(0.1, "rk4"), 4),
        (lambda: RK23(0.1, rtol=None), 3),
        (lambda: RK23(0.1), 4),
        (lambda: RK45(0.1, rtol=None), 6),
        (lambda: RK45(0.1), 7),
        (lambda: RungeKuttaChebyshev(0.1, stages=3), 3),
        (lambda: companion.ImplicitEuler(0.1), 12),
        (lambda: companion.ImplicitEuler(0.1, iterations=1, krylov_iterations=3), 4),
        (lambda: companion.ImplicitEuler(0.1, "fixed_point", iterations=3), 4),
    ],
)
def test_no_needless_question(make: Callable[[], Any], questions: int, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    answer = GradientOracle.__call__

    def counting(self: Any, values: Any = None) -> Any:
        asked.append(values)
        return answer(self, values)

    monkeypatch.setattr(GradientOracle, "__call__", counting)
    fitted(prepared(make(), run_eagerly=True))
    assert len(asked) == 4 * questions


class ReusesTheLastStage(RungeKutta):
    """Known wrong: the last question of a step as the first of the next. That one is about another batch."""

    last: Any = None

    def direction(self, oracle: Any, values: Any, learning_rate: Any) -> Any:
        answers: list[Any] = []

        def ask(at: Any) -> Any:
            answers.append(self.last if not answers and self.last else oracle(at))
            return answers[-1]

        found = super().direction(ask, values, learning_rate)
        self.last = oracle([v - learning_rate * d for v, d in zip(values, found, strict=True)])
        return found


@pytest.mark.parametrize(
    "kind", [RungeKutta, pytest.param(ReusesTheLastStage, marks=pytest.mark.xfail(strict=True, raises=AssertionError))]
)
@pytest.mark.parametrize("method", ["bogacki_shampine", "dormand_prince"])
def test_first_same_as_last_is_not_used_across_batches(kind: Any, method: str) -> None:
    model = fitted(prepared(kind(0.25, method), run_eagerly=True))
    assert_close(arrays(model), numpy_epochs(method))


# Adaptive steps


class Control:
    """Integral control of the pair of Bogacki and Shampine, written from Hairer, Nørsett and Wanner, II.4."""

    def __init__(self, first: float, rtol: float, atol: float) -> None:
        self.size, self.floor, self.rtol, self.atol, self.rejected = first, 1e-6 * first, rtol, atol, 0

    def step(self, f: Any, values: Values) -> Values:
        h = float(np.float32(self.size))  # Keras's learning rate
        end, other = bogacki_shampine_pair(f, values, h)
        shares = [
            (a - b) / (self.atol + self.rtol * np.maximum(abs(v), abs(a)))
            for a, b, v in zip(end, other, values, strict=True)
        ]
        error = float(np.sqrt(np.mean(np.concatenate([share.ravel() for share in shares]) ** 2)))
        factor = min(5.0, max(0.2, 0.9 * error ** (-1 / 3)))
        self.size = max(self.size * factor, self.floor)
        if error <= 1:
            return end
        self.rejected += 1
        return values


@pytest.mark.parametrize(
    ("first", "options"), [(1e-3, {}), (64.0, {"jit_compile": True}), (0.5, {"run_eagerly": True})]
)
def test_adaptive_steps_are_those_of_the_rule(first: float, options: dict[str, Any]) -> None:
    model = prepared(RK23(first, rtol=1e-3, atol=1e-4), **options)
    control, values, sizes = Control(float(np.float32(first)), 1e-3, 1e-4), START, list[float]()
    assert float(model.optimizer.step_size) == control.size
    for index in range(20):
        batch = BATCHES[index % 4]
        model.train_on_batch(X[batch], Y[batch])
        tried, before = control.size, control.rejected
        values = control.step(lambda v, b=batch: gradient(v, X[b], Y[b]), values)
        assert float(model.optimizer.step_size) == pytest.approx(control.size, rel=1e-9)
        assert int(model.optimizer.rejected) == control.rejected
        assert float(model.optimizer.learning_rate) == pytest.approx(tried, rel=1e-7)
        assert_close(arrays(model), values)
        sizes += [tried] if control.rejected == before else []
    assert int(model.optimizer.iterations) == 20 - control.rejected
    assert control.rejected >= (2 if first > 1 else 0)
    assert sizes


@pytest.mark.parametrize("options", [{}, {"run_eagerly": True}], ids=str)
def test_what_is_not_finite_is_a_rejected_step(options: dict[str, Any]) -> None:
    model = prepared(RK23(0.25, rtol=10.0), **options)
    bad = X[:6].copy()
    bad[2, 1] = np.nan
    for rejected in (1, 2):
        model.train_on_batch(bad, Y[:6])
        assert_close(arrays(model), START, 0)
        assert int(model.optimizer.rejected) == rejected
        assert float(model.optimizer.step_size) == pytest.approx(0.25 * 0.2**rejected)
    model.train_on_batch(X[:6], Y[:6])
    assert_close(arrays(model), bogacki_shampine(gradient, START, float(np.float32(0.01))), 1e-9)
    assert int(model.optimizer.rejected) == 2
    for _ in range(15):
        model.train_on_batch(bad, Y[:6])
    assert float(model.optimizer.step_size) == pytest.approx(0.25e-6)
    assert all(np.isfinite(value).all() for value in arrays(model))


def test_at_the_floor_every_finite_step_is_taken() -> None:
    model = prepared(RK23(0.25, rtol=1e-30, atol=0.0), run_eagerly=True)
    for _ in range(9):
        model.train_on_batch(X[:6], Y[:6])
    assert int(model.optimizer.rejected) == 9
    assert_close(arrays(model), START, 0)
    assert float(model.optimizer.step_size) == pytest.approx(0.25e-6)
    model.train_on_batch(X[:6], Y[:6])
    assert int(model.optimizer.rejected) == 9
    assert float(model.optimizer.step_size) == pytest.approx(0.25e-6)
    assert_close(arrays(model), go(START, 0.25e-6, (1, gradient(START))), 1e-11)


def test_an_error_of_zero_lets_the_step_grow() -> None:
    model = keras.Sequential([keras.Input((1,)), L.Dense(1, None, False, "ones")])
    model.compile(Heun(0.5, rtol=1e-3), lambda y, p: keras.ops.mean(p), run_eagerly=True)
    inject(model).train_on_batch(np.ones((1, 1)), np.ones((1, 1)))
    assert float(model.optimizer.step_size) == 2.5
    assert float(model.layers[0].kernel[0, 0]) == 0.5
    model.set_weights([np.zeros((1, 1))])  # values of 0, and nothing allowed of them
    model.compile(Heun(0.5, rtol=1e-3, atol=0.0), lambda y, p: keras.ops.sum(0 * p), run_eagerly=True)
    inject(model).train_on_batch(np.ones((1, 1)), np.ones((1, 1)))
    assert float(model.optimizer.step_size) == 2.5
    assert int(model.optimizer.rejected) == 0


def test_adaptive_steps_end_up_at_the_limit_of_stability() -> None:
    """On a quadratic of curvature 2 the mean of h λ is near 2.51, whatever the tolerance."""
    model = keras.Sequential([keras.Input((2,)), L.Dense(1, None, False, "ones")])
    model.compile(RK23(0.01, rtol=1e-3), "mse", jit_compile=False)
    inject(model)
    x, y = np.diag([2**0.5, 0.05]), np.zeros((2, 1))  # curvatures 2 and 0.0025
    sizes = []
    for _ in range(200):
        model.train_on_batch(x, y)
        sizes.append(float(model.optimizer.step_size))
    assert 2.3 < np.median(sizes[100:]) * 2 < 2.7


# Errors


SCHEDULE = keras.optimizers.schedules.ExponentialDecay(0.1, 10, 0.9)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"method": "heum"}, "`method` must be a ButcherTableau or one of 'euler', 'midpoint', 'heun'"),
        ({"method": None}, "Received: method=None"),
        ({"method": "rk4", "rtol": 1e-3}, "needs a method with embedded weights, such as 'midpoint', 'heun'"),
        ({"method": THREE_EIGHTHS, "rtol": 1e-3}, "needs a method with embedded weights"),
        ({"rtol": -1e-3}, "`rtol` must be a finite number greater than 0. Received: rtol=-0.001"),
        ({"rtol": 0.0}, "Received: rtol=0.0"),
        ({"rtol": True}, "Received: rtol=True"),
        ({"rtol": "1e-3"}, "Received: rtol='1e-3'"),
        ({"rtol": float("nan")}, "Received: rtol=nan"),
        ({"rtol": float("inf")}, "Received: rtol=inf"),
        ({"rtol": 1e-3, "atol": -1.0}, "`atol` must be a finite number of at least 0. Received: atol=-1.0"),
        ({"rtol": 1e-3, "atol": None}, "Received: atol=None"),
        ({"rtol": 1e-3, "learning_rate": SCHEDULE}, "`learning_rate` is the size of the first step"),
        ({"rtol": 1e-3, "learning_rate": 0.0}, "greater than 0. Received: learning_rate=0.0"),
        ({"rtol": 1e-3, "weight_decay": 0.01}, "`weight_decay` and `rtol` do not go together"),
        ({"learning_rate": -0.1}, "Received: learning_rate=-0.1"),
        ({"learning_rate": float("nan")}, "Received: learning_rate=nan"),
        ({"learning_rate": "fast"}, "Received: learning_rate='fast'"),
    ],
)
def test_wrong_arguments(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message) if "." in message else message):
        RungeKutta(**arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [({"stages": 0}, "stages=0"), ({"stages": 2.0}, "stages=2.0"), ({"damping": -1}, "damping=-1")],
)
def test_wrong_arguments_of_chebyshev(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"Received: {message}"):
        RungeKuttaChebyshev(**arguments)
