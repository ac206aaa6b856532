"""Checks for the exercises of chapter 08: a largest stable rate, runs that collapse, a clock, the price of a ravine."""

from typing import Any

import numpy as np
from keras.optimizers.schedules import ExponentialDecay

from companion.exercises.answers import not_a_choice, number, takes

# ---- 1 --------------------------------------------------------------------------------------------------------------

_HESSIAN = np.array([[4.0, 2.0], [2.0, 6.0]])


def _largest_rate(answer: Any) -> str | None:
    rate = number(answer)
    if rate is None:
        return "give one number, the learning rate."
    small, large = np.linalg.eigvalsh(_HESSIAN)
    if abs(rate - 2 / large) <= 2e-3 * 2 / large:
        return None
    known = {
        "that is 2 over the largest eigenvalue of the matrix of coefficients. The Hessian holds second derivatives: "
        "those of θ₁² and θ₂² are twice the coefficients.": 4 / large,
        "you took the largest number on the Hessian's diagonal. The term θ₁θ₂ couples the weights: along its steepest "
        "direction the curvature is an eigenvalue, and larger.": 2 / 6,
        "the coefficient 3 is neither a second derivative nor an eigenvalue: write the Hessian down first.": 2 / 3,
        "that is 2 over the smallest eigenvalue. Along the steepest direction such a step explodes.": 2 / small,
        "that is 1/λ, where the steepest direction is done in one step. It is stable up to twice that.": 1 / large,
        "that is λ itself, the largest curvature. How long may a step be, so that hλ = 2?": large,
        "you have taken λ for the smallest curvature, and the limit for 1/λ.": 1 / small,
        "the trace adds all curvatures. Only the largest one sets the limit.": 2 / _HESSIAN.trace(),
    }
    for hint, wrong in known.items():
        if abs(rate - wrong) <= 2e-3 * wrong:
            return hint
    if rate <= 0:
        return "a rate of zero or below goes nowhere, or uphill."
    way = "too long: the steepest direction grows" if rate > 2 / large else "stable, but not the largest"
    return f"{rate:.4g} is {way}. The limit is 2/λ, with λ the largest eigenvalue of the Hessian."


# ---- 2 --------------------------------------------------------------------------------------------------------------

_RUNS = {
    "A": "on the flow",
    "B": "unstable",
    "C": "another clock",
    "D": "another flow",
    "E": "another clock",
    "F": "another flow",
}
_RUN_HINTS = {
    "A": "A is the chapter's own case: two rates far below 2/λ.",
    "B": "in B even h/2 is too long: what is hλ/2?",
    "C": "in C look at where the velocity settles under a steady gradient g: v = βv − hg gives v = −hg/(1 − β). The "
    "direction is that of g.",
    "D": "in D each step also pulls the weights towards zero, by h times 0.5 times θ. Which velocity is that, and of "
    "which loss?",
    "E": "in E every update is a step along −∇L(θ), only of another length each time.",
    "F": "in F each weight's step is divided by the size of its own gradient: shrink h, and the direction is still "
    "not −∇L(θ).",
}


def _collapse(answer: Any) -> str | None:
    if hint := not_a_choice(answer, _RUNS, sorted(set(_RUNS.values()))):
        return hint
    return next((_RUN_HINTS[name] for name, right in _RUNS.items() if answer[name] != right), None)


# ---- 3 --------------------------------------------------------------------------------------------------------------


def _clock(answer: Any) -> str | None:
    if not takes(answer, 2):
        return "give the function `clock` itself: it takes a schedule and a number of steps."
    schedule, steps = ExponentialDecay(0.4, decay_steps=1, decay_rate=0.5), 4
    rates = np.array([0.4, 0.2, 0.1, 0.05, 0.025])
    times = answer(schedule, steps)
    if times is None:
        return "`clock` returns None. It must return an array of times."
    try:
        times = np.array([float(value) for value in times])
    except (TypeError, ValueError):
        return "`clock` must return a sequence of numbers, one for each moment."
    right = np.concatenate([[0.0], np.cumsum(rates[:4])])
    if times.shape == right.shape and np.allclose(times, right, rtol=1e-5):
        none = answer(schedule, 0)
        is_zero = none is not None and [float(value) for value in none] == [0.0]
        return None if is_zero else "right for four updates. For none it must return one time, 0."
    return _hint_for_times(times, rates)


def _hint_for_times(times: np.ndarray, rates: np.ndarray) -> str:
    k = np.arange(5)
    sums = np.cumsum(rates)
    known = {
        "these are the rates. A clock adds them up.": [rates[:4], rates, np.append(0, rates[:4])],
        "the times after each update are there, but the moment before the first one is missing: it is 0.": [sums[:4]],
        "the first update lasts as long as `schedule(0)`, and you began with `schedule(1)`.": [
            np.append(0, sums[1:] - rates[0]),
        ],
        "before any update the time is 0, not `schedule(0)`.": [sums],
        "you multiplied the latest rate by k, as if all updates before had had that rate. Add the rates up.": [
            rates * k,
            np.append(0, rates[:4]) * k,
            rates[:4] * k[:4],
            rates[:4] * k[1:],
        ],
        "you used the first rate for all updates. The schedule's later ones are shorter.": [0.4 * k, 0.4 * k[1:]],
    }
    for hint, candidates in known.items():
        if any(times.shape == wrong.shape and np.allclose(times, wrong, rtol=1e-5) for wrong in candidates):
            return hint
    if times.shape != (5,):
        return f"four updates have five moments, with the one before the first. Yours has the shape {times.shape}."
    return "with the rates 0.4, 0.2, 0.1, 0.05 the time after two updates is 0.6. Add up the rates that were used."


# ---- 4 --------------------------------------------------------------------------------------------------------------


def _price(answer: Any) -> str | None:
    try:
        first, second = (float(value) for value in answer)
    except (TypeError, ValueError):
        return "give two numbers of steps: (for 1,000, for 10,000)."
    right = np.array([np.log(1000) / -np.log1p(-1.8 / across) for across in (1e3, 1e4)])
    found = np.array([first, second])
    if np.allclose(found, right, rtol=0.02):
        return None
    if np.allclose(found[::-1], right, rtol=0.02):
        return "the other way round: first the ravine of 1,000."
    known = {
        "you took 2/λ itself for the rate. It is 90 % of that.": 0.9 * right,
        "you took 1/λ for the limit. It is 2/λ.": 2 * right,
        "that is the number of steps to a tenth. A thousandth is ln 1000 of time.": right / 3,
        "you used the decimal logarithm. The flow shrinks as e to the minus t: take the natural one.": right
        * (3 / np.log(1000)),
        "that is the time of one step's length: how much time does a thousandth take?": right / np.log(1000),
    }
    for hint, wrong in known.items():
        if np.allclose(found, wrong, rtol=0.02):
            return hint
    if abs(first - second) <= 0.02 * abs(first):
        return "the steeper wall asks for shorter steps, and along the floor just as much time has to pass."
    if np.isclose(first, right[0], rtol=0.02):
        return "the first is right. A wall ten times as steep asks for steps a tenth as long."
    if np.isclose(second, right[1], rtol=0.02):
        return "the second is right. A wall a tenth as steep allows steps ten times as long."
    return (
        "the rate is 0.9 · 2/λ with λ across. Along the floor, where the curvature is 1, each step multiplies the "
        "distance by 1 − h."
    )


CHECKS = {"08.1": _largest_rate, "08.2": _collapse, "08.3": _clock, "08.4": _price}
