"""Checks for the exercises of chapter 14: a merge of tokens, what it is worth, a rule, and whose step can change."""

from typing import Any

import numpy as np

from companion.exercises.answers import in_a_function, number, takes

# ---- 1 --------------------------------------------------------------------------------------------------------------

_GRADIENTS = [np.array([1.0, -2.0]), np.array([7.0, 4.0]), np.array([-3.0, 10.0])]
_MASKS = [np.array([[1, 1, 1, 0], [1, 1, 0, 0]]), np.array([[1, 0, 0, 0]]), np.array([[1, 1], [0, 0]])]


def _merged(answer: Any) -> str | None:
    if not takes(answer, 2):
        return "give the function `merged` itself: it takes the gradients and the masks."
    found = answer([g.copy() for g in _GRADIENTS], [mask.copy() for mask in _MASKS])
    if found is None:
        return "`merged` returns None. It must return one gradient."
    found = np.asarray(found, "float64")
    if found.shape != (2,):
        return f"for gradients of the shape (2,) it must return the shape (2,), not {found.shape}."
    tokens = np.array([5.0, 1.0, 2.0])
    if not np.allclose(found, tokens @ _GRADIENTS / 8):
        return _hint_for_merged(found, tokens)
    gradients, masks = [*_GRADIENTS, np.full(2, np.nan)], [*_MASKS, np.zeros((2, 4))]
    empty = answer([each.copy() for each in gradients], [each.copy() for each in masks])
    if not np.isfinite(np.asarray(empty, "float64")).all():
        return "right, unless a device has no token at all: 0 · NaN is NaN. Leave that device out."
    if not np.allclose(np.asarray(empty, "float64"), tokens @ _GRADIENTS / 8):
        return "right, unless a device has no token at all. It must not change the answer of the others."
    return None


def _hint_for_merged(found: np.ndarray, tokens: np.ndarray) -> str:
    positions = np.array([mask.size for mask in _MASKS])
    sentences = np.array([len(mask) for mask in _MASKS])
    known = {
        "that is the mean of means, which is Keras's mistake. Weigh each device by its tokens.": np.mean(
            _GRADIENTS, axis=0
        ),
        "that is the sum of the means. Weigh each by its tokens, and divide by all tokens.": np.sum(_GRADIENTS, axis=0),
        "the tokens weigh, but nothing is divided by their total.": tokens @ _GRADIENTS,
        "divide by the number of all tokens, not by the number of devices.": tokens @ _GRADIENTS / 3,
        "you count the masked positions too. Only a one in the mask is a token.": (
            positions @ _GRADIENTS / positions.sum()
        ),
        "you weigh by sentences. Each loss was divided by its unmasked tokens.": (
            sentences @ _GRADIENTS / sentences.sum()
        ),
        "a share with more tokens must count more, not less.": (1 / tokens) @ _GRADIENTS / (1 / tokens).sum(),
    }
    for hint, wrong in known.items():
        if np.allclose(found, wrong):
            return hint
    return "multiply each mean by what it was divided by, add, and divide once, by all tokens."


# ---- 2 --------------------------------------------------------------------------------------------------------------

_COUNTS: list[list[int]] = [[4, 3], [2, 2, 2, 1], [20], [63, 1], [5, 5, 5]]


def _worth(answer: Any) -> str | None:
    if not takes(answer, 1):
        return "give the function `worth` itself: it takes the list of counts."
    found = []
    for counts in _COUNTS:
        try:
            found.append(number(answer(list(counts))))
        except (IndexError, ValueError) as error:
            return f"for the counts {counts} it raises {type(error).__name__}: there may be any number of devices."
    if any(value is None for value in found):
        return "`worth` must return one number for each list of counts."
    values = np.array(found, "float64")
    if np.allclose(values, [len(n) ** 2 / np.sum(1 / np.array(n)) for n in _COUNTS]):
        return None
    known = {
        "that is what the weighted mean is worth: all samples.": [np.sum(n) for n in _COUNTS],
        "that is the share that is left. Multiply it by the number of samples.": [
            len(n) ** 2 / np.sum(1 / np.array(n)) / np.sum(n) for n in _COUNTS
        ],
        "a mean of R numbers has the sum of their variances over R², not over R.": [
            len(n) / np.sum(1 / np.array(n)) for n in _COUNTS
        ],
        "a mean of R numbers has the sum of their variances over R²; you left R out.": [
            1 / np.sum(1 / np.array(n)) for n in _COUNTS
        ],
        "that is the reciprocal: the noise, not the size of a batch with that noise.": [
            np.sum(1 / np.array(n)) / len(n) ** 2 for n in _COUNTS
        ],
        "that treats the smallest share as if all were like it. The large shares are less noisy.": [
            len(n) * min(n) for n in _COUNTS
        ],
        "you took the noise of a weight, Σ n² / N². Every device has the same weight here, 1 / R.": [
            np.sum(n) ** 2 / np.sum(np.square(n)) for n in _COUNTS
        ],
    }
    for hint, wrong in known.items():
        if np.allclose(values, wrong):
            return hint
    if np.allclose(values[[0, 3]], [48 / 7, 63 / 16]):
        return "right for two devices. Do it for R: the mean of R means, each with the variance s²/nᵣ."
    return "for shares of 4 and 3 it is 48/7. Write the variance of each share's mean, then that of their mean."


# ---- 3 --------------------------------------------------------------------------------------------------------------


def _answers() -> tuple[list[np.ndarray], np.ndarray]:
    """Five devices and two variables. The third is furthest over all, the fifth in one coordinate.

    The second is furthest from the mean, and if the two lengths are added up.
    """
    random = np.random.default_rng(3)
    matrix, vector = random.normal(size=(5, 3, 2)), random.normal(size=(5, 4))
    matrix[2] += 6.0
    matrix[1] -= 3.0
    vector[1] -= 4.0
    vector[4, 0] += 9.0
    return [matrix, vector], np.array([4.0, 2.0, 3.0, 1.0, 5.0])


def _without_the_furthest(answer: Any) -> str | None:
    import tensorflow as tf

    if not takes(answer, 2):
        return "give the function itself: it takes the gradients and the weights."
    gradients, weights = _answers()
    found = answer([tf.constant(g) for g in gradients], tf.constant(weights))
    if not isinstance(found, list | tuple):
        return "a rule must return a list with one tensor for each variable."
    found = [np.asarray(each) for each in found]
    shapes = [each.shape for each in found]
    if shapes != [(3, 2), (4,)]:
        return f"for variables of the shapes [(3, 2), (4,)] it must return these shapes, not {shapes}."
    if _equal(found, _mean_without(gradients, weights, 2)):
        right = _mean_without(gradients, weights, 1)
        if not _equal(_with_a_faulty_device(answer, gradients, weights, np.nan), right):
            if not _equal(_with_a_faulty_device(answer, gradients, weights, np.inf), right):
                return "right, until a device sends NaN or ∞: 0 · NaN is NaN. Drop its row, do not weigh it with 0."
            return (
                "right, until a device sends NaN: its distance is NaN, too. Count that as the largest of all. (And "
                "measure from `merging.median`, which stays a number.)"
            )
        return in_a_function(lambda: answer([tf.constant(g) for g in gradients], tf.constant(weights)))
    by_variable = [_mean_without([gradients[0]], weights, 2)[0], _mean_without([gradients[1]], weights, 4)[0]]
    known = {
        "nobody has been left out.": _mean_without(gradients, weights, None),
        "the right one is left out, but the others must count by their weights.": (
            _mean_without(gradients, np.ones(5), 2)
        ),
        "the gradient is left out, but its weight still divides: drop it there, too.": [
            each * (weights.sum() - 3) / weights.sum() for each in _mean_without(gradients, weights, 2)
        ],
        "you left out a device that is far off in one coordinate. Add the squares up over all of them.": (
            _mean_without(gradients, weights, 4)
        ),
        "another device is left out in each variable. Add the distances up over all variables first.": by_variable,
        "that is the median itself. Use it as the middle to measure from.": [np.median(g, axis=0) for g in gradients],
        "that is only the furthest device's gradient.": [g[2] for g in gradients],
    }
    for hint, wrong in known.items():
        if _equal(found, wrong):
            return hint
    if _equal(found, _mean_without(gradients, weights, 1)):
        return "measure from the median, not from a mean; and over all variables add up squares, not lengths."
    nearest = [_mean_without(gradients, weights, row) for row in (0, 3)]
    if any(_equal(found, wrong) for wrong in nearest):
        return "the wrong device is left out. The furthest has the *largest* distance from the median."
    return "measure each device's distance from the median over all variables, and drop its row everywhere."


def _with_a_faulty_device(
    answer: Any, gradients: list[np.ndarray], weights: np.ndarray, says: float
) -> list[np.ndarray]:
    """What a rule makes of the answers if the second device says nothing but this."""
    import tensorflow as tf

    broken = [gradient.copy() for gradient in gradients]
    for gradient in broken:
        gradient[1] = says
    with np.errstate(all="ignore"):
        return [np.asarray(each) for each in answer([tf.constant(g) for g in broken], tf.constant(weights))]


def _mean_without(gradients: list[np.ndarray], weights: np.ndarray, row: int | None) -> list[np.ndarray]:
    stays = np.arange(len(weights)) != (-1 if row is None else row)
    return [np.average(gradient[stays], axis=0, weights=weights[stays]) for gradient in gradients]


def _equal(found: list[np.ndarray], expected: list[Any]) -> bool:
    return all(np.allclose(a, b, rtol=1e-5) for a, b in zip(found, expected, strict=True))


# ---- 4 --------------------------------------------------------------------------------------------------------------

_RULES = {"mean", "median", "vote"}
_CHANGES = {"A": {"mean", "median"}, "B": set(_RULES), "C": {"mean", "median"}, "D": {"mean", "median"}}
_MISSED = {
    "A": {
        "mean": "A: a mean adds everything up that it is sent.",
        "median": "A: the device in the middle may be the one that sends ten times as much. Is it still in the middle?",
        "vote": "A: which sign has ten times a gradient?",
    },
    "B": {
        "mean": "B: a mean adds everything up that it is sent.",
        "median": "B: the middle of five may move if one of them changes sides.",
        "vote": "B: three against two, and one of the three changes sides.",
    },
    "C": {
        "mean": "C: all are ten times as large. So is their mean.",
        "median": "C: all are ten times as large. So is the one in the middle.",
        "vote": "C: which sign has ten times a gradient?",
    },
    "D": {
        "mean": "D: a mean of other numbers is another mean.",
        "median": "D: a gradient of 0.001 becomes 1, and the middle of five may be another.",
        "vote": "D: the vote takes the sign of what it is sent. What is the sign of a sign?",
    },
}


def _whose_step(answer: Any) -> str | None:
    if not isinstance(answer, dict) or set(answer) != set(_CHANGES):
        return "give a dictionary with the keys A, B, C and D."
    if not all(isinstance(value, set | frozenset | list | tuple) for value in answer.values()):
        return "each value must be a set, such as {'mean', 'vote'}."
    if not all(set(value) <= _RULES for value in answer.values()):
        return "each set may hold 'mean', 'median' and 'vote'."
    for event, rules in _CHANGES.items():
        for rule in sorted(_RULES):
            if (rule in answer[event]) != (rule in rules):
                return _MISSED[event][rule]
    return None


CHECKS = {"14.1": _merged, "14.2": _worth, "14.3": _without_the_furthest, "14.4": _whose_step}
