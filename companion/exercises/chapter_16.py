"""Checks for the exercises of chapter 16: Lion, three Muons, what is left of a warm-up."""

from typing import Any

import numpy as np

from companion.exercises.answers import number as _number
from companion.exercises.answers import several
from companion.exercises.answers import takes as _takes

# ---- 1 --------------------------------------------------------------------------------------------------------------

_THETA, _M, _G = np.random.default_rng(0).normal(size=(3, 40))
_H, _BETA_1, _BETA_2 = 0.25, 0.8, 0.6


def _step(first: float, second: float, theta: np.ndarray = _THETA) -> tuple[np.ndarray, np.ndarray]:
    return theta - _H * np.sign(first * _M + (1 - first) * _G), second * _M + (1 - second) * _G


def _lion(answer: Any) -> str | None:
    if not _takes(answer, 6):
        return "give the function itself, of (theta, m, g, h, beta_1, beta_2)."
    given = [_THETA.copy(), _M.copy(), _G.copy()]
    found = answer(*given, _H, _BETA_1, _BETA_2)
    if several(found, 2) is None:
        return "return two things: the new theta and the new m."
    theta, m = (np.asarray(each, dtype=float) for each in found)
    (right_theta, right_m), (swapped_theta, swapped_m) = _step(_BETA_1, _BETA_2), _step(_BETA_2, _BETA_1)
    if theta.shape != _THETA.shape or m.shape != _M.shape:
        return "the new theta and the new m have the shape of the old ones."
    if np.allclose(theta, right_m) and np.allclose(m, right_theta):
        return "the two are right, in the other order: theta first."
    if np.allclose(theta, swapped_theta) and np.allclose(m, swapped_m):
        return "the two betas have changed places: the step mixes with β₁, the memory with β₂."
    if np.allclose(theta, 2 * _THETA - right_theta):
        return "the step goes up the slope: θ minus, not plus."
    if np.allclose(theta, _THETA - _H * np.sign(_BETA_1 * right_m + (1 - _BETA_1) * _G)):
        return "the step looks at the new memory. In the formula the memory is written last."
    if np.allclose(theta, _THETA - _H * np.sign(right_m)):
        return "the step takes the sign of the new memory. It has a mixture of its own, with β₁ and the old memory."
    if np.allclose(theta, _THETA - _H * (_BETA_1 * _M + (1 - _BETA_1) * _G)):
        return "that is a momentum: take the sign of the mixture."
    if not np.allclose(theta, right_theta):
        return "the new theta is not θ − h sign(β₁ m + (1 − β₁) g). Do one entry by hand."
    if not np.allclose(m, right_m):
        return "the weight is right. The memory is not β₂ m + (1 − β₂) g."
    if not np.array_equal(given[1], _M) or not np.array_equal(given[0], _THETA):
        return "right, but the arrays that were given are changed in place: return new ones."
    return None


# ---- 2 --------------------------------------------------------------------------------------------------------------


def _muon(answer: Any) -> str | None:
    letter = str(answer).strip().lower()
    if letter not in {"a", "b", "c"}:
        return 'give one letter: "a", "b" or "c".'
    hints = {
        "a": "a is the method: the momentum takes in the raw gradient, and what the step would be is orthogonalised.",
        "c": "c scales the momentum by 1 − μ. What does `polar` make of a factor?",
    }
    return hints.get(letter)


# ---- 3 --------------------------------------------------------------------------------------------------------------


def _share(answer: Any) -> str | None:
    value = _number(answer)
    if value is None:
        return "give a number: the share of the warm-up's iterates in x."
    ramp = np.minimum(np.arange(1, 401) / 100, 1)
    shares = [float(np.sum(ramp[:100] ** power) / np.sum(ramp**power)) for power in (0, 1, 2)]
    if abs(value - shares[2]) < 2e-4:
        return None
    if value == round(shares[2], 3):
        return "right to three decimals: give one more."
    if abs(value - shares[0]) < 1e-6:
        return "that is the share where iterates weigh alike. Here each weighs the square of its learning rate."
    if abs(value - shares[1]) < 2e-4:
        return "each weighs the square of its learning rate, not the rate."
    if abs(value - 100 * shares[2]) < 2e-2:
        return "that is the share in per cent: give it between 0 and 1."
    if abs(value - shares[2] / (1 - shares[2])) < 2e-4:
        return "divide by the weights of all 400 iterates, not of the last 300."
    return "iterate t of the warm-up weighs (t / 100)², each later one 1. Divide the first sum by the sum of all."


CHECKS = {"16.1": _lion, "16.2": _muon, "16.3": _share}
