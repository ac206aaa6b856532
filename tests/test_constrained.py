"""Holds that every method rests where constrained gradient descent rests, and asks only where constraints allow."""

import itertools
from collections.abc import Callable
from typing import Any

import keras
import numpy as np
import pytest
import scipy.optimize

import companion
from companion import Heun, ImplicitEuler, InjectedOptimizer, RungeKutta, RungeKuttaChebyshev, inject
from companion.oracle import GradientOracle

RANDOM = np.random.default_rng(0)
X, Y = RANDOM.normal(size=(8, 3)), RANDOM.normal(size=(8, 1))
METHODS: dict[str, Callable[[], Any]] = {
    "Heun": lambda: Heun(0.1),
    "extragradient": lambda: RungeKutta(0.1, "extragradient"),
    "kutta3": lambda: RungeKutta(0.1, "kutta3"),
    "rk4": lambda: RungeKutta(0.1, "rk4"),
    "rk45": lambda: RungeKutta(0.1, "rk45"),
    "Chebyshev": lambda: RungeKuttaChebyshev(0.1, 3),
    "implicit": lambda: ImplicitEuler(0.1),
    "implicit, long steps": lambda: ImplicitEuler(4.0),
    "implicit, fixed point": lambda: ImplicitEuler(0.1, "fixed_point", iterations=5),
}
CONSTRAINTS: dict[str, tuple[Any, Callable[[Any], Any], Callable[[Any], float]]] = {
    "non_neg": (keras.constraints.NonNeg(), lambda w: np.maximum(w, 0), lambda w: min(w.min(), 0)),
    "max_norm": (
        keras.constraints.MaxNorm(0.4),
        lambda w: w * min(1, 0.4 / max(np.linalg.norm(w), 1e-12)),
        lambda w: min(0.4 - np.linalg.norm(w), 0),
    ),
    "unit_norm": (
        keras.constraints.UnitNorm(),
        lambda w: w / np.linalg.norm(w),
        lambda w: -abs(np.linalg.norm(w) - 1),
    ),
}


def least_squares(optimizer: Any, constraint: Any, kernel: Any = "zeros") -> Any:
    dense = keras.layers.Dense(1, None, False, kernel, kernel_constraint=constraint, dtype="float64")
    model = keras.Sequential([keras.Input((3,), dtype="float64"), dense])
    loss = keras.losses.MeanSquaredError(dtype="float64")
    model.compile(optimizer, loss, jit_compile=False)
    return inject(model)


def rest(project: Callable[[Any], Any]) -> Any:
    """Where projected gradient descent rests, in NumPy."""
    w = np.zeros(3)
    for _ in range(5000):
        w = project(w - 0.1 * 2 / 8 * X.T @ (X @ w - Y[:, 0]))
    return w


def test_the_reference_is_right() -> None:
    np.testing.assert_allclose(rest(CONSTRAINTS["non_neg"][1]), scipy.optimize.nnls(X, Y[:, 0])[0], atol=1e-9)


BY_DEFAULT = [("Heun", "non_neg"), ("implicit, long steps", "non_neg"), ("extragradient", "max_norm")]
THE_REST = [pair for pair in itertools.product(METHODS, CONSTRAINTS) if pair not in BY_DEFAULT]


@pytest.mark.parametrize(
    ("method", "name"), [*BY_DEFAULT, *(pytest.param(*pair, marks=pytest.mark.slow) for pair in THE_REST)]
)
def test_it_rests_where_constrained_descent_rests(method: str, name: str) -> None:
    constraint, project, _ = CONSTRAINTS[name]
    model = least_squares(METHODS[method](), constraint)
    for _ in range(250):
        model.train_on_batch(X, Y)
    np.testing.assert_allclose(model.get_weights()[0][:, 0], rest(project), rtol=0, atol=2e-5)


class AsksAnywhere(Heun):
    """Known wrong: the second question is asked where the constraint does not hold."""

    def direction(self, oracle: Any, values: Any, learning_rate: Any) -> Any:
        first = oracle(values)
        second = oracle._oracle(companion.moved(values, -learning_rate, first))
        return [(a + b) / 2 for a, b in zip(first, second, strict=True)]


class SharpnessAware(InjectedOptimizer):
    def direction(self, oracle: Any, values: Any, learning_rate: Any) -> Any:
        return oracle(companion.moved(values, 0.5, oracle(values)))


@pytest.mark.parametrize(
    "make",
    [
        *METHODS.values(),
        lambda: companion.RK23(1e-5),
        lambda: SharpnessAware(0.1),
        pytest.param(lambda: AsksAnywhere(0.1), marks=pytest.mark.xfail(strict=True, raises=AssertionError)),
    ],
)
def test_every_question_but_the_first_meets_the_constraint(make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first is Keras's own step's: at the weights as they are."""
    start = np.array([[-1.0], [0.5], [2.0]])
    asked: list[Any] = []
    answer = GradientOracle.__call__

    def listening(self: Any, values: Any = None) -> Any:
        asked.append(np.array(values[0]))
        return answer(self, values)

    monkeypatch.setattr(GradientOracle, "__call__", listening)
    for constraint, _, breach in CONSTRAINTS.values():
        model = least_squares(make(), constraint)
        model.run_eagerly = True
        model.set_weights([start])
        asked.clear()
        model.train_on_batch(X, Y)
        np.testing.assert_array_equal(asked[0], start)
        assert len(asked) > 1
        assert min(breach(point) for point in asked[1:]) > -1e-6
        assert breach(model.get_weights()[0]) > -1e-6


def test_one_question_is_the_step_of_keras_from_anywhere() -> None:
    ends = []
    for optimizer in (RungeKutta(0.1, "euler"), keras.optimizers.SGD(0.1)):
        model = least_squares(optimizer, "non_neg", keras.initializers.Constant(-1.0))
        model.train_on_batch(X, Y)
        ends.append(model.get_weights()[0])
    np.testing.assert_array_equal(*ends)
