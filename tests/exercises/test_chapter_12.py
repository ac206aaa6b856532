"""Exercises of chapter 12: right answers are right, wrong ones get a hint that helps, and nothing raises."""

from typing import Any

import numpy as np
import pytest

import companion
from tests.exercises.judge import judged


def _chebyshev(rate: float, damping: float, stages: int = 10) -> companion.RungeKuttaChebyshev:
    return companion.RungeKuttaChebyshev(rate, stages=stages, damping=damping)


CHOICE = {"A": "momentum", "B": "chebyshev", "C": "extragradient", "D": "rk4"}

RIGHT: list[tuple[str, Any]] = [
    ("12.1", 0.025),
    ("12.1", np.float64(0.021)),
    ("12.2", lambda a, w: 2 * a / (a**2 + w**2)),
    ("12.3", _chebyshev(0.1755, 200 / 999)),
    ("12.3", _chebyshev(0.17, 0.21)),
    ("12.4", CHOICE),
]

WRONG: list[tuple[str, Any, str]] = [
    ("12.1", None, "a number"),
    ("12.1", "0.02", "a number"),
    ("12.1", float("nan"), "a number"),
    ("12.1", True, "a number"),
    ("12.1", -0.02, "greater than 0"),
    ("12.1", 0.01, "longer step"),
    ("12.1", 0.02, "0.980199"),  # gradient descent: 0.980198
    ("12.1", 0.02784, "shorter step"),
    ("12.1", 0.1, "too long"),
    ("12.2", None, "function"),
    ("12.2", 0.198, "function"),
    ("12.2", lambda damping: 1, "function"),
    ("12.2", lambda damping, frequency: ..., "still returns"),
    ("12.2", lambda damping, frequency: None, "None"),
    ("12.2", lambda damping, frequency: "h", "ValueError"),
    ("12.2", lambda a, w: 2 / np.hypot(a, w), "modulus"),
    ("12.2", lambda a, w: a / (a**2 + w**2), "fastest"),
    ("12.2", lambda a, w: 1.04, "without damping"),
    ("12.2", lambda a, w: 2 / a, "divides by zero"),
    ("12.2", lambda a, w: 2 * a, "must not exceed"),
    ("12.3", None, "RungeKuttaChebyshev"),
    ("12.3", 0.2, "RungeKuttaChebyshev"),
    ("12.3", _chebyshev(0.04, 0.2, stages=5), "5 gradients"),
    ("12.3", _chebyshev(0.184, 0.05), "0.952"),  # the default, at its best
    ("12.3", _chebyshev(0.184, 0.05), "more damping"),
    ("12.3", _chebyshev(0.152, 0.4), "less damping"),
    ("12.3", _chebyshev(0.1, 0.2), "longer step"),
    ("12.3", _chebyshev(0.18, 0.2), "shorter step"),
    ("12.4", None, "dictionary"),
    ("12.4", {"A": "momentum"}, "dictionary"),
    ("12.4", {**CHOICE, "A": ...}, "no answer"),
    ("12.4", {**CHOICE, "A": "adam"}, "one of"),
    ("12.4", {**CHOICE, "A": ["momentum"]}, "one of"),
    ("12.4", {**CHOICE, "A": "rk4"}, "noise"),
    ("12.4", {**CHOICE, "B": "momentum"}, "remembered"),
    ("12.4", {**CHOICE, "C": "rk4"}, "goes round"),
    ("12.4", {**CHOICE, "D": "momentum"}, "path itself"),
]


test_right_answers, test_wrong_answers_get_a_hint = judged(RIGHT, WRONG)


def test_what_exercise_1_says_of_euler() -> None:
    """Its best factor per step on curvatures from 1 to 100, and that a gradient of Runge–Kutta 4 is never worth one."""
    rates = np.linspace(0.001, 0.03, 3001)
    modes = np.geomspace(1, 100, 400)
    z = -np.multiply.outer(rates, modes)
    euler = np.abs(1 + z).max(axis=1)
    rk4 = np.abs(1 + z + z**2 / 2 + z**3 / 6 + z**4 / 24).max(axis=1)
    assert euler.min() == pytest.approx(99 / 101, abs=1e-4)
    assert (rk4 ** (1 / 4)).min() > 99 / 101
