"""Checks for the exercises of chapter 11: the best ball, the same ball, a centred quotient, a brake."""

from collections.abc import Callable
from typing import Any

import keras
import numpy as np

from companion.exercises.answers import in_fit
from companion.gradient_flow import observed_order, oscillation
from companion.optimizers import Momentum


def _numbers(answer: Any, names: str) -> tuple[float, float] | str:
    """The two numbers of an answer, or a hint that there are not two."""
    hint = f"the answer is two numbers: ({names})."
    try:
        first, second = (float(value) for value in ([] if isinstance(answer, str | dict) else answer))
    except (TypeError, ValueError):
        return hint
    return (first, second) if np.isfinite([first, second]).all() else hint


def _factor(h: float, beta: float) -> float:
    """What a step multiplies the slowest of exercise 1's curvatures by."""
    h_lambda = h * np.geomspace(0.2, 20, 401)
    half = (1 + beta - h_lambda) / 2
    root = np.emath.sqrt(half**2 - beta)
    return float(np.maximum(np.abs(half + root), np.abs(half - root)).max())


# ---- 1 --------------------------------------------------------------------------------------------------------------

_BEST_H, _BEST_BETA = (2 / (np.sqrt(0.2) + np.sqrt(20))) ** 2, (9 / 11) ** 2


def _best(answer: Any) -> str | None:
    found = _numbers(answer, "learning_rate, momentum")
    if isinstance(found, str):
        return found
    h, beta = found
    if np.allclose([h, beta], [_BEST_H, _BEST_BETA], rtol=2e-3):
        return None
    if np.allclose([beta, h], [_BEST_H, _BEST_BETA], rtol=2e-3):
        return "these are the right numbers in the wrong order: learning rate first."
    if not (h > 0 and 0 <= beta < 1):
        return "a learning rate is above 0, and a momentum is in [0, 1)."
    if np.isclose(beta, 9 / 11, rtol=2e-3):
        return "your momentum is the factor per step, √β. Square it."
    if np.isclose(beta, (99 / 101) ** 2, rtol=2e-3):
        return "that is the formula with κ. A ball's frequencies are spread by √κ only."
    if np.isclose(h, 2 / 20.2, rtol=2e-3):
        return "that is gradient descent's best learning rate. With momentum, the frequencies must fit into the V."
    if np.isclose(h, np.sqrt(_BEST_H), rtol=2e-3):
        return "your learning rate is the tick. The learning rate is its square."
    factor = _factor(h, beta)
    if factor >= 1:
        return f"here a curvature between 0.2 and 20 does not shrink: its factor per step is {factor:.3f}."
    if np.isclose(beta, _BEST_BETA, rtol=2e-3):
        return f"the momentum is right. With this learning rate one end is outside the V: its factor is {factor:.3f}."
    if factor > np.sqrt(beta) + 1e-6:
        return f"the line is lower than the V allows, so one end sticks out: its factor per step is {factor:.3f}."
    return f"all curvatures are inside the V, but the line can be lower: the factor per step is {factor:.3f}."


# ---- 2 --------------------------------------------------------------------------------------------------------------


def _same_ball(answer: Any) -> str | None:
    found = _numbers(answer, "momentum, steps")
    if isinstance(found, str):
        return found
    beta, steps = found
    if not 0 <= beta < 1:
        return "the first number is a momentum, in [0, 1); the second one is a number of steps."
    if np.isclose(beta, 0.9):
        return "with the same momentum at a quarter of the learning rate the friction is twice as large."
    if np.isclose(beta, 0.975):
        return "that keeps the clock h/(1 − β), so a light ball would not notice. The friction is (1 − β)/√h."
    if np.isclose(beta, 0.8):
        return "the wrong way round: with a shorter tick the ball loses less speed in each."
    if not np.isclose(beta, 0.95, rtol=1e-4):
        return f"with momentum {beta:g} the friction is {(1 - beta) / 0.05:.3g}. It was 1."
    if np.isclose(steps, 400):
        return "the momentum is right. But a step takes the ball on by √h, not by h."
    if np.isclose(steps, 50):
        return "the momentum is right. Shorter ticks mean more steps, not fewer."
    if not np.isclose(steps, 200):
        return "the momentum is right. The time of 100 steps is 100 ticks, 100 √0.01; how many new ticks is that?"
    return None


# ---- 3 --------------------------------------------------------------------------------------------------------------

_TICKS = np.array([0.1, 0.05, 0.025, 0.0125])


def _centred(answer: Any) -> str | None:
    if not callable(answer) or isinstance(answer, type):
        return "give the function `settings` itself: it takes a tick and a friction."
    for friction in (1.0, 3.0, 0.0):
        errors = []
        for tick in _TICKS:
            found = _numbers(answer(float(tick), friction), "learning_rate, momentum")
            if isinstance(found, str):
                return "the function must return two numbers, (learning_rate, momentum)."
            errors.append(_error(*found, tick, friction))
        if hint := _hint_for_errors(answer, errors, friction):
            return hint
    return None


def _error(h: float, beta: float, tick: float, friction: float) -> float:
    """The largest distance from the exact ball on a parabola of curvature 4, up to time 4."""
    theta, v, path = 1.0, h / (1 + beta) * 4 if beta > -1 else 0.0, [1.0]
    for _ in range(round(4 / tick)):
        v = beta * v - h * 4 * theta
        theta += v
        path.append(theta)
        if not abs(theta) < 1e6:
            return 1e6
    return float(np.abs(path - oscillation(4.0, friction, 1.0, tick * np.arange(len(path)))).max())


def _hint_for_errors(settings: Callable[[float, float], Any], errors: list[float], friction: float) -> str | None:
    order = observed_order(_TICKS, np.maximum(errors, 1e-15))
    if order > 1.9 and errors[-1] < 1e-3:
        return None
    h, beta = (float(value) for value in settings(0.1, 1.0))
    if np.allclose([beta, h], [0.01 / 1.05, 0.95 / 1.05]):
        return "these are the right numbers in the wrong order: learning rate first."
    if np.allclose([h, beta], [0.01, 0.9]):
        return f"these are the settings of the chapter: with friction {friction:g} their order is {order:.1f}."
    if np.isclose(beta, 0.95 / 1.05):
        return "the momentum is right. The factor before θₖ₊₁ divides the gradient's term, too."
    if np.isclose(h, 0.01 / 1.05):
        return "the learning rate is right. Which factor stands before the last step, θₖ − θₖ₋₁?"
    if max(errors) > 10:
        return "the ball leaves the parabola. Look at the signs."
    return (
        f"with friction {friction:g} the measured order is {max(order, 0):.1f}; solved for θₖ₊₁, the equation gives 2."
    )


# ---- 4 --------------------------------------------------------------------------------------------------------------

_CURVATURE, _START = np.array([1.0, 9.0]), np.array([1.0, -2.0])


def _reference(kind: str) -> np.ndarray:
    """The path of a variant of the brake, by the rule written out."""
    theta, v, path = _START, np.zeros(2), []
    for _ in range(60):
        gradient = _CURVATURE * theta
        uphill: Any = gradient @ v > 0
        if kind == "each entry":
            uphill = gradient * v > 0
        elif kind == "downhill":
            uphill = gradient @ v < 0
        elif kind == "none":
            uphill = False
        old = np.where(uphill, 0.0, v)
        if kind == "new velocity":
            v = 0.9 * v - 0.02 * gradient
            v = np.where(gradient @ v > 0, 0.0, v)
        elif kind == "stops":
            v = np.where(uphill, 0.0, 0.9 * v - 0.02 * gradient)
        else:
            v = 0.9 * old - 0.02 * gradient
        theta = theta + v
        path.append(theta)
    return np.array(path)


_BRAKE_HINTS = {
    "none": "this is momentum, without a brake: the velocity never becomes zero.",
    "each entry": "your brake asks each entry by itself. There is one ball: sum g·v over all entries of the weight.",
    "downhill": "the brake works downhill. Where the sum of g·v is above 0, the ball moves up: v points where θ goes.",
    "new velocity": "your brake looks at the new velocity. Ask whether the old one leads uphill, then update it.",
    "stops": "where it brakes the ball stands still. Set only the old velocity to zero: the gradient still pulls.",
}


def _brake(answer: Any) -> str | None:
    if not (isinstance(answer, type) and issubclass(answer, Momentum)):
        return "give the class `Brake` itself, a subclass of companion.Momentum."
    optimizer = answer(0.02, momentum=0.9)
    weight, path = keras.Variable(_START, dtype="float64"), []
    for _ in range(60):
        optimizer.apply([keras.ops.convert_to_tensor(_CURVATURE * weight.numpy())], [weight])
        path.append(weight.numpy())
    found = np.array(path)
    if np.allclose(found, _reference("brake"), atol=1e-6):
        return in_fit(answer(0.01, momentum=0.9))
    if np.array_equal(found[-1], _START):
        return "the weight does not move. After the brake, do what momentum does: two assignments."
    for kind, hint in _BRAKE_HINTS.items():
        if np.allclose(found, _reference(kind), atol=1e-6):
            return hint
    if not np.isfinite(found).all() or np.abs(found).max() > 1e3:
        return "the weight runs away. Look at the signs."
    first = int((np.abs(found - _reference("brake")).max(axis=1) > 1e-6).argmax()) + 1
    return f"on a quadratic of two weights, step {first} of 60 is the first that is not the rule's."


CHECKS = {"11.1": _best, "11.2": _same_ball, "11.3": _centred, "11.4": _brake}
