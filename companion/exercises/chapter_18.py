"""Checks for the exercises of chapter 18: five diagnoses, the norm of a gradient, the noise scale from two lengths."""

from typing import Any

import numpy as np
import tensorflow as tf

from companion.exercises.answers import number as _number
from companion.exercises.answers import takes as _takes

# ---- 1 --------------------------------------------------------------------------------------------------------------

_DISEASES = {
    "A": ("rate too low", "its gradient is of ordinary size. How far does a step move the weights?"),
    "B": ("dead ReLUs", "two layers say exactly zero. Which units pass nothing back, however loud the top is?"),
    "C": ("frozen by mistake", "two layers are not there at all. Why would nobody ask them?"),
    "D": ("decay too strong", "hardly any gradient, and the weights move further and further. What else moves them?"),
    "E": ("not shuffled", "a loud gradient, and parts that agree. What is a batch like whose examples all agree?"),
}


_NAMES = (
    *("rate too high", "rate too low", "decay too strong", "dead ReLUs", "vanishing gradients"),
    *("exploding gradients", "frozen by mistake", "float16 underflow", "wrong labels", "not shuffled"),
)


def _diagnoses(a: Any, b: Any, c: Any, d: Any, e: Any) -> str | None:
    given = dict(zip("ABCDE", (a, b, c, d, e), strict=True))
    for run, name in given.items():
        if str(name).strip().lower() not in map(str.lower, _NAMES):
            return f"{run}: {name!r} is no run of the table with the dials. It has {', '.join(_NAMES)}."
    for run, (disease, hint) in _DISEASES.items():
        if str(given[run]).strip().lower() != disease.lower():
            return f"{run}: {hint}"
    return None


# ---- 2 --------------------------------------------------------------------------------------------------------------


def _norm(answer: Any) -> str | None:
    if not (callable(answer) and _takes(answer, 1)):
        return "give the function itself, which takes a list of gradients."

    def says(gradients: list[Any], expected: float) -> bool:
        found = _number(answer(gradients))
        return found is not None and abs(found - expected) < 1e-5

    two = [tf.constant([[3.0, 0.0]]), tf.constant([4.0])]
    if not says(two, 5.0):
        found = _number(answer(two))
        if found is None:
            return "it must return one number, for all tensors together."
        hints = {7.0: "you add up norms. Add up squares, and take one root.", 25.0: "the root is missing."}
        return next((hint for value, hint in hints.items() if abs(found - value) < 1e-5), "for (3, 0) and (4) it is 5.")
    if not says([None, tf.constant([3.0, 4.0])], 5.0):
        return "a gradient may be `None`: it adds nothing."
    once = tf.IndexedSlices(tf.constant([[3.0], [4.0]]), tf.constant([2, 0]), tf.constant([5, 1]))
    if not says([once], 5.0):
        return "a `tf.IndexedSlices` holds its rows in `values`."
    twice = tf.IndexedSlices(tf.constant([[1.0], [2.0], [4.0]]), tf.constant([2, 2, 0]), tf.constant([5, 1]))
    if not says([twice], 5.0):
        return "rows of the same id are one row of the gradient: add them before you square."
    return None


# ---- 3 --------------------------------------------------------------------------------------------------------------


_EQUATIONS = (
    "put the means over the steps into the two equations of the fold Why these formulas?, solve them for tr Σ and "
    "‖∇L‖², and divide."
)


def _noise_scale(answer: Any) -> str | None:
    if not (callable(answer) and _takes(answer, 4)):
        return "give the function itself, which takes small, big, b and B."
    small, big, b, batch = np.array([6.0, 3.0, 7.0]), np.array([2.0, 1.0, 3.0]), 4, 16
    traces = (small - big) / (1 / b - 1 / batch)
    squares = (batch * big - b * small) / (batch - b)
    found = _number(answer(small, big, b, batch))
    if found is None:
        return "it must return one number for all steps."
    expected = traces.mean() / squares.mean()
    if abs(found - expected) < 1e-5 * expected:
        other = _number(answer(small, big, 8, 64))
        if other is None or abs(other - 64 * 8 * (small - big).mean() / (64 * big - 8 * small).mean()) > 1e-4:
            return "right for parts of a quarter of the batch. Use b and B: there may be another number of parts."
        return None
    hints = (
        (np.mean(traces / squares), "you divide in each step and average then. Average first, divide then."),
        (1 / expected, "it is the noise over the signal, not the other way round."),
        (traces.mean(), "that is tr Σ, the noise. Divide it by the signal, ‖∇L‖²."),
        (
            traces.mean() / big.mean(),
            "the batch's squared norm still holds noise. Take it out, to have the signal.",
        ),
        (expected / batch, "that is a share of the batch. The noise scale is a number of examples."),
    )
    near = [hint for value, hint in hints if abs(found - value) < 1e-6 * abs(value)]
    return near[0] if near else _EQUATIONS


CHECKS = {"18.1": _diagnoses, "18.2": _norm, "18.3": _noise_scale}
