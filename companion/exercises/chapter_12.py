"""Checks for the exercises of chapter 12: a rate between two budgets, a game's limit, a damping, a choice."""

from typing import Any

import numpy as np

from companion import gradient_flow
from companion.exercises.answers import not_a_choice, number, takes
from companion.runge_kutta import RungeKuttaChebyshev

_CURVATURES, _STEEPER = np.geomspace(1, 100, 400), np.geomspace(1, 1000, 2000)
_BEST_OF_EULER = 99 / 101
_CHOICE = {"A": "momentum", "B": "chebyshev", "C": "extragradient", "D": "rk4"}


# ---- 1 --------------------------------------------------------------------------------------------------------------


def _rate(answer: Any) -> str | None:
    rate = number(answer)
    if rate is None:
        return "give one learning rate, a number."
    if rate <= 0:
        return "a learning rate is greater than 0."
    factors = np.abs(gradient_flow.stability_polynomial("rk4")(-rate * _CURVATURES))
    worst = factors.max()
    if worst >= 1:
        return f"too long a step: the steepest direction has hλ = {100 * rate:.4g}, and the limit is 2.785."
    if worst >= _BEST_OF_EULER:
        which = "flattest" if factors.argmax() < len(factors) // 2 else "steepest"
        return (
            f"one step of RK4 leaves {worst:.6f} of the {which} direction, and gradient descent, at its best "
            f"rate, {_BEST_OF_EULER:.6f}. A {'longer' if which == 'flattest' else 'shorter'} step shrinks it more."
        )
    return None  # per gradient it is worse at every stable rate


# ---- 2 --------------------------------------------------------------------------------------------------------------


def _largest_stable(answer: Any) -> str | None:
    if not takes(answer, 2):
        return "give the function `largest_stable` itself: it takes the damping and the frequency."
    cases = np.array([(0.1, 1.0), (0.5, 2.0), (2.0, 0.0), (0.0, 3.0)])
    try:
        found = [answer(float(damping), float(frequency)) for damping, frequency in cases]
    except ZeroDivisionError:
        return "it divides by zero for a game without damping, or without frequency. Solve |1 + h(−c + iω)|² = 1 for h."
    if any(value is ... for value in found):
        return "`largest_stable` still returns `...`."
    if any(value is None for value in found):
        return "`largest_stable` returns None. It must return a number."
    values = np.array(found, float)
    damping, frequency = cases.T
    size = damping**2 + frequency**2
    if np.allclose(values, 2 * damping / size, rtol=1e-3, atol=1e-3):
        return None
    if np.allclose(values, 2 / np.sqrt(size), rtol=1e-3):
        return "that is 2 over the modulus of −c + iω, right only without a rotation. Solve |1 + h(−c + iω)|² = 1."
    if np.allclose(values, damping / size, rtol=1e-3, atol=1e-3):
        return "that is where it shrinks fastest. The limit is further out."
    if values[3] > 1e-3:
        return "without damping every step leads outwards, however short: the limit is 0 there."
    return (
        f"for damping 0.1 and frequency 1 you give {values[0]:.4g}. The square (1 − h·damping)² + (h·frequency)² "
        "must not exceed 1."
    )


# ---- 3 --------------------------------------------------------------------------------------------------------------


def _optimizer(answer: Any) -> str | None:
    if not isinstance(answer, RungeKuttaChebyshev):
        return "give a `companion.RungeKuttaChebyshev`, with its learning rate, stages and damping."
    if answer.stages != 10:
        return f"it asks for {answer.stages} gradients a step. Ten are asked for: stages=10."
    rate, damping = float(answer.learning_rate), answer.damping
    factors = np.abs(gradient_flow.stability_polynomial(gradient_flow.chebyshev(10, damping))(-rate * _STEEPER))
    worst = factors.max()
    if worst <= 0.84:
        return None
    said = f"one step leaves {worst:.4g} of the distance along some direction. "
    if factors[-1] > 0.9999 * worst and factors[-1] > 0.95:
        return f"{said}It is the steepest: a shorter step, a little below the limit of stability over 1000."
    if damping < 0.17:
        return f"{said}With a damping of {damping:g} the method stays too near ±1: more damping."
    if damping > 0.25:
        return f"{said}A damping of {damping:g} makes the stable range, and so the step, too short: less damping."
    return f"{said}It is the flattest: a longer step, nearly the limit of stability over 1000."


# ---- 4 --------------------------------------------------------------------------------------------------------------


def _which(answer: Any) -> str | None:
    if isinstance(answer, dict) and any(value is ... for value in answer.values()):
        return "some cases have no answer yet."
    if hint := not_a_choice(answer, _CHOICE, sorted(_CHOICE.values())):
        return hint
    hints = {
        "A": "A: noise hides any truncation error. Which method won the race on batches of 32?",
        "B": "B: κ is large, and nothing may be remembered. Which of these has the most stability per gradient?",
        "C": "C: with several frequencies an accurate method goes round. Whose error points inwards?",
        "D": "D: here the path itself is wanted. Which method follows it most closely?",
    }
    return next((hints[key] for key, right in _CHOICE.items() if answer[key] != right), None)


CHECKS = {"12.1": _rate, "12.2": _largest_stable, "12.3": _optimizer, "12.4": _which}
