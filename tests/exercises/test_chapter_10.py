"""Exercises of chapter 10: right answers are right, wrong ones get a hint that helps, and nothing raises."""

from typing import Any

import numpy as np
import pytest

from companion.exercises.chapter_10 import suspects
from companion.gradient_flow import ButcherTableau, tableau
from tests.exercises.judge import judged

NODES = [0, 1 / 3, 2 / 3]
HEUN3 = ButcherTableau([[0, 0, 0], [1 / 3, 0, 0], [0, 2 / 3, 0]], [1 / 4, 0, 3 / 4], NODES, order=3)
ORDERS = {"A": 3, "B": 4, "C": 1, "D": 2}
TIMES = {"euler": 300.0, "heun": 150.0, "rk4": 104.45, "rk45": 82.66, "chebyshev(10)": 2904.8}
COSTS = {"euler": 1, "heun": 2, "rk4": 4, "rk45": 6, "chebyshev(10)": 10}


def three(a: Any, b: Any, c: Any = NODES, order: int = 1) -> ButcherTableau:
    return ButcherTableau([[0, 0, 0], [c[1], 0, 0], a], b, c, order=order)


def changed(answer: dict[str, Any], **values: Any) -> dict[str, Any]:
    return {**answer, **values}


RIGHT: list[tuple[str, tuple[Any, ...]]] = [
    ("10.1", (HEUN3,)),
    ("10.2", (ORDERS,)),
    ("10.2", ({name: np.float64(order) for name, order in ORDERS.items()},)),
    ("10.3", (18, 6)),
    ("10.3", (np.float64(18.0001), 6.00003)),
    ("10.4", (TIMES,)),
    ("10.4", ({name: round(time) for name, time in TIMES.items()},)),
]
WRONG: list[tuple[str, tuple[Any, ...], str]] = [
    ("10.1", (None,), "constructor"),
    ("10.1", ("heun",), "constructor"),
    ("10.1", (([[0]], [1], [0]),), "constructor"),
    ("10.1", (tableau("rk4"),), "three times"),
    ("10.1", (tableau("kutta3"),), "times 0, 1/3 and 2/3"),
    ("10.1", (three([0, 2 / 3, 0], [1 / 4, 0, 3 / 4], order=2),), "say so"),
    ("10.1", (three([0, 2 / 3, 0], [1 / 3, 1 / 3, 1 / 3]),), "Σ bᵢcᵢ is not"),
    ("10.1", (three([0, 2 / 3, 0], [0, 1 / 2, 1 / 2]),), "Σ bᵢcᵢ² is not"),
    ("10.1", (three([1 / 3, 1 / 3, 0], [1 / 4, 0, 3 / 4]),), "b₃a₃₂c₂"),
    ("10.2", (None,), "dictionary"),
    ("10.2", ([3, 4, 1, 2],), "dictionary"),
    ("10.2", ({"A": 3},), "dictionary"),
    ("10.2", (changed(ORDERS, A=2.97),), "round"),
    ("10.2", (changed(ORDERS, A="three"),), "round"),
    ("10.2", (changed(ORDERS, A=[3]),), "round"),
    ("10.2", (changed(ORDERS, D=4),), "quadratic"),
    ("10.2", ({"A": 4, "B": 5, "C": 2, "D": 3},), "one step"),
    ("10.2", (changed(ORDERS, A=4),), "nearly right"),
    ("10.2", (changed(ORDERS, B=3),), "rounding"),
    ("10.2", (changed(ORDERS, C=4),), "steady"),
    ("10.2", (changed(ORDERS, B=5),), "no method has an order above four"),
    ("10.2", (changed(ORDERS, D=1),), "D is not"),
    ("10.3", (None, None), "two numbers"),
    ("10.3", ("eighteen", 6), "two numbers"),
    ("10.3", (True, 6), "two numbers"),
    ("10.3", (float("nan"), 6), "two numbers"),
    ("10.3", (4.5, 1.5), "touches"),
    ("10.3", (13.5, 4.5), "touches"),
    ("10.3", (8, 4), "two gradients"),
    ("10.3", (-18, -6), "positive"),
    ("10.3", (7, 3.5), "Draw"),
    ("10.3", (18, 18), "three gradients"),
    ("10.3", (18, 3), "Divide"),
    ("10.4", (None,), "dictionary"),
    ("10.4", ({"euler": 300},), "dictionary"),
    ("10.4", (changed(TIMES, euler="long"),), "a number"),
    ("10.4", ({name: time * COSTS[name] for name, time in TIMES.items()},), "600 steps"),
    ("10.4", ({name: time * 4 for name, time in TIMES.items()},), "Divide by the curvature"),
    ("10.4", ({name: time * 16 for name, time in TIMES.items()},), "shortens"),
    ("10.4", ({name: 600 // cost for name, cost in COSTS.items()},), "How long"),
    ("10.4", (changed(TIMES, rk45=TIMES["rk45"] * 6 / 7),), "seventh"),
    ("10.4", (changed(TIMES, heun=300),), "heun"),
]


test_right_answers, test_wrong_answers_get_a_hint_that_fits = judged(RIGHT, WRONG, unpack=True)


# ---- what the checks rest on ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "order"), ORDERS.items())
def test_suspects_have_their_orders(name: str, order: int) -> None:
    """On two coupled weights, against SciPy; D has order four where the curvature is the same everywhere."""
    from scipy.integrate import solve_ivp

    def gradient(theta: np.ndarray) -> np.ndarray:
        return np.tanh(theta.sum()) + np.array([0.5, 2.0]) * np.sin(theta)

    def quadratic(theta: np.ndarray) -> np.ndarray:
        return np.array([[2.0, 1.0], [1.0, 1.5]]) @ theta

    def slope(gradient: Any) -> float:
        start = np.array([1.2, -0.4])
        exact = solve_ivp(lambda _, theta: -gradient(theta), (0, 1), start, "DOP853", rtol=1e-13, atol=1e-14).y[:, -1]
        errors = []
        for steps in (16, 32, 64):
            theta = start
            for _ in range(steps):
                theta = suspects()[name](gradient, theta, 1 / steps)
            errors.append(np.linalg.norm(theta - exact))
        return float(np.log2(errors[0] / errors[-1]) / 2)

    assert slope(gradient) == pytest.approx(order, abs=0.25)
    assert slope(quadratic) == pytest.approx(4 if name == "D" else order, abs=0.25)


def test_two_gradients_make_a_chebyshev_polynomial() -> None:
    x = np.linspace(0, 9, 901)
    np.testing.assert_allclose(1 - x + x**2 / 8, np.polynomial.Chebyshev.basis(2)(1 - x / 4), atol=1e-12)
