"""Exercises of chapter 13: right answers are right, wrong ones get a hint that helps, and nothing raises."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from companion.gradient_flow import integrate
from tests.exercises.judge import judged

# ---- 1 --------------------------------------------------------------------------------------------------------------


def _loss(theta: Any) -> Any:
    return (theta**2 - 1) ** 2 / 4


def _slope(theta: Any) -> Any:
    return theta**3 - theta


def _modified(theta: Any, h: float) -> Any:
    return _loss(theta) + h / 4 * _slope(theta) ** 2


# ---- 2 --------------------------------------------------------------------------------------------------------------


def _flow_through(curvature: float, h: float) -> float | None:
    return -np.log(1 - h * curvature) / h if h * curvature < 1 else None


def _flow_through_by_log1p(curvature: float, h: float) -> float | None:
    return None if curvature >= 1 / h else float(-np.log1p(-h * curvature) / h)


def _no_limit(curvature: float, h: float) -> Any:
    return -np.log(1 - h * curvature) / h


def _infinite_at_one(curvature: float, h: float) -> Any:
    return None if h * curvature > 1 else -np.log(1 - h * curvature) / h


def _absolute(curvature: float, h: float) -> Any:
    return None if h * curvature == 1 else -np.log(abs(1 - h * curvature)) / h


# ---- 3 --------------------------------------------------------------------------------------------------------------


def _uphill(gradient: Any, c: float) -> Callable[[Any], Any]:
    return lambda values: gradient(values + 2 * c * gradient(values))


def _by_difference(gradient: Any, c: float) -> Callable[[Any], Any]:
    def answer(values: Any) -> Any:
        slope = gradient(values)
        return slope + 2 * c * (gradient(values + 1e-6 * slope) - slope) / 1e-6

    return answer


def _asks(distance: float) -> Any:
    return lambda gradient, c: lambda values: gradient(values + distance * c * gradient(values))


def _three_questions(gradient: Any, c: float) -> Callable[[Any], Any]:
    def answer(values: Any) -> Any:
        slope, small = gradient(values), 1e-4
        return slope + c / small * (gradient(values + small * slope) - gradient(values - small * slope))

    return answer


def _frozen_curvature(gradient: Any, c: float) -> Callable[[Any], Any]:
    """Takes the curvature at 0 for that at the point: exact on a quadratic, wrong in first order elsewhere."""

    def answer(values: Any) -> Any:
        slope = gradient(values)
        return slope + 2 * c * gradient(slope * 1e-6) / 1e-6

    return answer


# ---- 4 --------------------------------------------------------------------------------------------------------------

SAY = {"A": False, "B": True, "C": False, "D": False, "E": True}

RIGHT: list[tuple[str, Any]] = [
    ("13.1", _modified),
    ("13.1", lambda theta, h: (theta**2 - 1) ** 2 * (1 + h * theta**2) / 4),
    ("13.2", _flow_through),
    ("13.2", _flow_through_by_log1p),
    ("13.3", _uphill),
    ("13.3", _by_difference),
    ("13.4", SAY),
    ("13.4", {key: np.bool_(value) for key, value in SAY.items()}),
]

WRONG: list[tuple[str, Any, str]] = [
    ("13.1", None, "function"),
    ("13.1", "L", "function"),
    ("13.1", 0.5, "function"),
    ("13.1", lambda theta: theta, "function"),
    ("13.1", lambda theta, h: None, "None"),
    ("13.1", lambda theta, h: "L", "ValueError"),
    ("13.1", lambda theta, h: [theta, h], "one number"),
    ("13.1", lambda theta, h: _loss(theta), "L itself"),
    ("13.1", lambda theta, h: h / 4 * _slope(theta) ** 2, "penalty alone"),
    ("13.1", lambda theta, h: _loss(theta) + h / 2 * _slope(theta) ** 2, "h/2"),
    ("13.1", lambda theta, h: _loss(theta) + h * _slope(theta) ** 2, "a quarter"),
    ("13.1", lambda theta, h: _loss(theta) - h / 4 * _slope(theta) ** 2, "sign"),
    ("13.1", lambda theta, h: _loss(theta) + h / 4 * _slope(theta), "squared"),
    ("13.1", lambda theta, h: _loss(theta) + h / 4 * abs(_slope(theta)), "absolute"),
    ("13.1", lambda theta, h: _loss(theta) + h / 4 * _loss(theta) ** 2, "L itself"),
    ("13.1", lambda theta, h: _slope(theta) * (1 + h / 2 * (3 * theta**2 - 1)), "not a loss"),
    ("13.1", lambda theta, h: _loss(theta) + h**2 / 4 * _slope(theta) ** 2, "h/4, not"),
    ("13.1", lambda theta, h: _loss(theta) + h / 4 * ((theta**2 - 1) / 2) ** 2, "inner derivative"),
    ("13.1", lambda theta, h: theta + h, "0.2089"),
    ("13.2", None, "function"),
    ("13.2", 2.0, "function"),
    ("13.2", lambda curvature: curvature, "function"),
    ("13.2", lambda curvature, h: None, "below 1"),
    ("13.2", lambda curvature, h: "none", "ValueError"),
    ("13.2", lambda curvature, h: np.ones(2), "one number"),
    ("13.2", lambda curvature, h: curvature, "beside the points"),
    ("13.2", lambda curvature, h: curvature * (1 + h * curvature / 2), "first term"),
    ("13.2", lambda curvature, h: curvature * (1 + h * curvature / 2 + (h * curvature) ** 2 / 3), "logarithm"),
    ("13.2", lambda curvature, h: np.log(1 - h * curvature) / h, "sign"),
    ("13.2", lambda curvature, h: -np.log(1 - h * curvature), "time"),
    ("13.2", lambda curvature, h: 1 - h * curvature, "factor of one step"),
    ("13.2", lambda curvature, h: np.log(1 + h * curvature) / h, "not 1 + hλ"),
    ("13.2", lambda curvature, h: 7.0, "Solve"),
    ("13.2", _no_limit, "change sides"),
    ("13.2", lambda curvature, h: -math.log(1 - h * curvature) / h, "change sides"),
    ("13.2", _infinite_at_one, "one step lands"),
    ("13.2", _absolute, "change sides"),
    ("13.3", None, "function"),
    ("13.3", [1, 2], "function"),
    ("13.3", lambda gradient: gradient, "function"),
    ("13.3", lambda gradient, c: None, "return a function"),
    ("13.3", lambda gradient, c: lambda: 0, "TypeError"),
    ("13.3", lambda gradient, c: lambda values: None, "gives None"),
    ("13.3", lambda gradient, c: lambda values: 1.0, "shape (2,)"),
    ("13.3", lambda gradient, c: gradient, "without a penalty"),
    ("13.3", _asks(-2), "sign"),
    ("13.3", _asks(1), "twice as far"),
    ("13.3", _asks(0.5), "half of the chapter's h"),
    ("13.3", _asks(4), "Half of it"),
    ("13.3", lambda g, c: lambda values: g(values) + g(values + 2 * c * g(values)), "both questions"),
    ("13.3", lambda g, c: lambda values: g(values + 2 * c * g(values)) - g(values), "alone"),
    ("13.3", lambda g, c: lambda values: g(values) * (1 + c * g(values) @ g(values)), "its derivative"),
    ("13.3", lambda g, c: lambda values: g(values) * (1 + 2 * c), "another direction"),
    ("13.3", lambda g, c: lambda values: values, "multiplies by"),
    ("13.3", _three_questions, "3 times"),
    ("13.3", _frozen_curvature, "curvature changes"),
    ("13.4", None, "dictionary"),
    ("13.4", "B and E", "dictionary"),
    ("13.4", {"B": True, "E": True}, "dictionary"),
    ("13.4", {**SAY, "A": "no"}, "True or False"),
    ("13.4", {**SAY, "A": []}, "True or False"),
    ("13.4", {**SAY, "A": True}, "one minimum"),
    ("13.4", {**SAY, "B": False}, "its tables"),
    ("13.4", {**SAY, "C": True}, "directions"),
    ("13.4", {**SAY, "D": True}, "weight decay"),
    ("13.4", {**SAY, "E": False}, "two rates"),
]


test_right_answers, test_wrong_answers_get_a_hint = judged(RIGHT, WRONG)


# ---- what the checks rest on ----------------------------------------------------------------------------------------


def test_the_hint_of_exercise_1_names_the_right_value() -> None:
    assert round(_modified(0.3, 0.1), 4) == 0.2089


def _numerical(loss: Callable[[Any], Any]) -> Callable[[Any], np.ndarray]:
    return lambda v: np.array([(loss(v + e) - loss(v - e)) / 2e-5 for e in 1e-5 * np.eye(2)])


@pytest.mark.parametrize("name", SAY)
def test_where_the_learning_rate_has_a_say(name: str) -> None:
    """Two rates with hλ below 1, run until nothing moves, on losses written anew; their gradients by differences."""
    losses: dict[str, Callable[[Any], Any]] = {
        "A": lambda v: v[0] ** 2 / 2 + 5 * v[1] ** 2,
        "B": lambda v: (v[0] * v[1] - 0.6) ** 2 / 2,
        "C": lambda v: (v[0] + 2 * v[1] - 0.6) ** 2 / 2,
        "D": lambda v: (v[0] * v[1] - 0.6) ** 2 / 2 + (v @ v) / 20,
        "E": lambda v: (v[0] ** 2 * v[1] - 0.6) ** 2 / 2,
    }
    gradient = _numerical(losses[name])
    rates = (0.0004, 0.0012) if name == "E" else (0.01, 0.03)
    time = {"D": 120, "E": 5}.get(name, 20)
    ends = [integrate(gradient, [2.8, 3.5], rate, round(time / rate))[-1] for rate in rates]
    assert all(np.abs(gradient(end)).max() < 1e-5 for end in ends)
    assert (np.abs(ends[0] - ends[1]).max() > 1e-2) == SAY[name]


def test_a_long_step_on_d_jumps_across_the_hill() -> None:
    """Why exercise 4 asks for short steps, and its solution names this rate."""

    def gradient(v: Any) -> Any:
        return (v[0] * v[1] - 0.6) * v[::-1] + v / 10

    ends = [integrate(gradient, np.array([2.8, 3.5]), rate, 1500)[-1] for rate in (0.1, 0.15)]
    near = np.sqrt(0.5)
    np.testing.assert_allclose(ends, [[near, near], [-near, -near]], atol=1e-6)
