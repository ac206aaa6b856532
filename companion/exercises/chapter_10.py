"""Checks for the exercises of chapter 10: a tableau, orders found by their slopes, a limit of stability, a budget."""

import functools
from collections.abc import Callable
from typing import Any

import numpy as np

from companion.exercises.answers import number as _number
from companion.gradient_flow import ButcherTableau, chebyshev, integrate, order_of, stability_limit, tableau

# ---- 1 --------------------------------------------------------------------------------------------------------------


def _heun_of_order_three(answer: Any) -> str | None:
    if not isinstance(answer, ButcherTableau):
        return "give a ButcherTableau: its constructor checks the equations and says what order it finds."
    if len(answer.b) != 3:
        return f"the method asks three times; yours has {len(answer.b)} stages."
    if not np.allclose(answer.c, [0, 1 / 3, 2 / 3]):
        return "the questions are to be asked at the times 0, 1/3 and 2/3: `c` says otherwise."
    if order_of(answer.a, answer.b) >= 3:
        return None if answer.order == 3 else "the coefficients have order three: say so, with order=3."
    b, c = np.array(answer.b), np.array(answer.c)
    if not np.isclose(b @ c, 1 / 2):
        return "order one only: Σ bᵢcᵢ is not 1/2."
    if not np.isclose(b @ c**2, 1 / 3):
        return "order two only: Σ bᵢcᵢ² is not 1/3."
    return "the weights are right. But b₃a₃₂c₂ is not 1/6: how far does the third question go along the second answer?"


# ---- 2 --------------------------------------------------------------------------------------------------------------

_A, _C = [[0, 0, 0, 0], [1 / 2, 0, 0, 0], [0, 1 / 2, 0, 0], [0, 0, 1, 0]], [0, 1 / 2, 1 / 2, 1]
_SUSPECTS = {
    "A": ButcherTableau([*_A[:3], [0, 1, 0, 0]], [1 / 6, 1 / 3, 1 / 3, 1 / 6], _C, order=3),
    "B": ButcherTableau(
        [[0, 0, 0, 0], [1 / 3, 0, 0, 0], [-1 / 3, 1, 0, 0], [1, -1, 1, 0]],
        [1 / 8, 3 / 8, 3 / 8, 1 / 8],
        [0, 1 / 3, 2 / 3, 1],
        order=4,
    ),
    "C": ButcherTableau(_A, [1 / 3, 1 / 3, 1 / 6, 1 / 6], _C, order=1),
    "D": ButcherTableau(
        [[0, 0, 0, 0], [1 / 4, 0, 0, 0], [0, 1 / 3, 0, 0], [0, 0, 1 / 2, 0]],
        [0, 0, 0, 1],
        [0, 1 / 4, 1 / 3, 1 / 2],
        order=2,
    ),
}
_FAULTS = {
    "A": "A is nearly right: one of its questions is asked in the wrong place. Halve the step where rounding is far.",
    "B": "B keeps what it promises. Are your errors still above rounding, some 1e-14?",
    "C": "C weighs its answers in the wrong order. Halve the step until its slope is steady.",
    "D": "D is not what you say.",
}


def suspects() -> dict[str, Callable[[Any, Any, float], Any]]:
    """The methods of exercise 2.

    Returns:
        For ``"A"`` to ``"D"`` a function of a gradient, the values and a step size that returns the values after one
        step.
    """
    return {name: functools.partial(_step, method) for name, method in _SUSPECTS.items()}


def _step(method: ButcherTableau, gradient: Any, theta: Any, h: float) -> Any:
    return integrate(gradient, theta, h, 1, method)[-1]


def _orders(answer: Any) -> str | None:
    if not isinstance(answer, dict) or set(answer) != set(_SUSPECTS):
        return "the answer is a dictionary with the keys A, B, C, D."
    orders = {name: _number(order) for name, order in answer.items()}
    if any(order is None or order != round(order) for order in orders.values()):
        return "each order is an integer: round the slope."
    if orders["D"] == 4:
        return (
            "D has order four on a quadratic, where curvature is the same everywhere. Measure again on a loss whose "
            "curvature changes, such as ln cosh θ, whose gradient is tanh θ."
        )
    if all(orders[name] == method.order + 1 for name, method in _SUSPECTS.items()):
        return "these are the slopes for one step. Over a fixed time there are 1/h of them: one order less."
    wrong = [name for name, method in _SUSPECTS.items() if orders[name] != method.order]
    if wrong and orders[wrong[0]] > 4:  # type: ignore[operator]
        return (
            f"{wrong[0]}: with four questions no method has an order above four. Halve the step until the slope is "
            "steady, while the errors stay above rounding, some 1e-14; or take another loss."
        )
    return _FAULTS[wrong[0]] if wrong else None


# ---- 3 --------------------------------------------------------------------------------------------------------------


def _three_gradients(limit: Any, per_gradient: Any) -> str | None:
    reach, worth = _number(limit), _number(per_gradient)
    if reach is None or worth is None:
        return "give two numbers: the limit, and the limit per gradient."
    if abs(reach - 4.5) < 0.01 or abs(reach - 13.5) < 0.01:
        return f"at {reach:g} the factor touches the edge of the band and turns back. Look further."
    if abs(reach - 8) < 0.01:
        return "that is the limit of two gradients. Here there are three."
    if abs(reach + 18) < 0.01:
        return "x = hλ is positive here: the signs are in the polynomial already."
    if abs(reach - 18) >= 0.01:
        return f"at {reach:g} it is not where |factor(x)| passes 1 for good. Draw it for x from 0 to 20."
    if abs(worth - 18) < 0.01:
        return "the limit is right. A step costs three gradients."
    return None if abs(worth - 6) < 0.01 else "the limit is right. Divide it by the number of gradients in a step."


# ---- 4 --------------------------------------------------------------------------------------------------------------

_CURVATURE, _BUDGET = 4.0, 600


def _methods() -> dict[str, ButcherTableau]:
    return {**{name: tableau(name) for name in ("euler", "heun", "rk4", "rk45")}, "chebyshev(10)": chebyshev(10)}


def _times(answer: Any) -> str | None:
    methods = _methods()
    if not isinstance(answer, dict) or set(answer) != set(methods):
        return f"the answer is a dictionary with the keys {', '.join(map(repr, methods))}."
    times = {name: _number(time) for name, time in answer.items()}
    if any(time is None for time in times.values()):
        return "each value is a number: a time."
    limits = {name: stability_limit(method) for name, method in methods.items()}
    costs = {name: len(method.stages()) for name, method in methods.items()}
    right = {name: limits[name] / _CURVATURE * _BUDGET / costs[name] for name in methods}
    known: list[tuple[dict[str, float], str]] = [
        (
            {name: _BUDGET * limits[name] / _CURVATURE for name in methods},
            "that is for 600 steps. A step costs as many gradients as the method asks.",
        ),
        (
            {name: right[name] * _CURVATURE for name in methods},
            "these are hλ times steps. Divide by the curvature: the limit is one of hλ, not of h.",
        ),
        ({name: right[name] * _CURVATURE**2 for name in methods}, "the curvature shortens the step: divide by it."),
        ({name: float(_BUDGET // costs[name]) for name in methods}, "these are the steps. How long is each?"),
    ]
    for wrong, hint in known:
        if all(abs(times[name] - wrong[name]) <= 0.01 * wrong[name] for name in methods):  # type: ignore[operator]
            return hint
    off = [name for name in methods if abs(times[name] - right[name]) > 0.01 * right[name]]  # type: ignore[operator]
    if not off:
        return None
    if off == ["rk45"]:
        return "all are right but 'rk45': with a fixed step it leaves its seventh question out."
    return f"{off[0]!r} is off by more than a hundredth: limit of hλ, over 4, times 600, over the gradients of a step."


CHECKS = {"10.1": _heun_of_order_three, "10.2": _orders, "10.3": _three_gradients, "10.4": _times}
