"""Checks for the exercises of chapter 04: a gradient, a sampler, and a step on rows that repeat."""

from typing import Any

import numpy as np

from companion.exercises.answers import takes

# ---- 1 --------------------------------------------------------------------------------------------------------------


def _context_gradients(answer: Any) -> str | None:
    if not takes(answer, 3):
        return "give the function `context_gradients` itself: it takes u, v and w."
    random = np.random.default_rng(4)
    u, v, w = random.normal(size=3), random.normal(size=(5, 3)), random.uniform(0.5, 2, 5)
    returned = answer(u.copy(), v.copy(), w.copy())
    if returned is None:
        return "`context_gradients` returns None. It must return an array of the shape of `v`."
    found = np.asarray(returned, "float64")
    if found.shape == (3,):
        return "that is one row. Each candidate has a vector of its own, so nothing is summed: a row for each."
    if found.shape != v.shape:
        return f"`v` has the shape {v.shape} and so has its gradient; the answer has {found.shape}."
    y = np.eye(5)[0]
    sigma = 1 / (1 + np.exp(-v @ u))
    right = np.outer(w * (sigma - y), u)
    if np.allclose(found, right, rtol=1e-5, atol=1e-6):
        return None
    known = {
        "that is the gradient for all weights one. A weight is a factor of its term of the loss.": (sigma - y, u),
        "the sign is turned: that is the direction to go, not the gradient.": (w * (y - sigma), u),
        "candidate 0 is the neighbour, and its label is 1: σ(s) − y.": (w * sigma, u),
        "the negatives are right, the neighbour is not: here its weight multiplies the label too, w₀(σ − 1). "
        "(In `closed_form`, `weight` means something else.)": (w * sigma - y, u),
        "the label is weighted, but the weight belongs to the whole of σ(s) − y.": (sigma - w * y, u),
    }
    for hint, (error, vector) in known.items():
        if np.allclose(found, np.outer(error, vector), rtol=1e-6):
            return hint
    if np.allclose(found, (w * (sigma - y))[:, None] * v, rtol=1e-6):
        return "the factor is right, the vector is not: s = u · v, so the derivative with respect to v is u."
    if np.allclose(found[1:], right[1:], rtol=1e-6):
        return "the rows of the negatives are right, the neighbour's is not. Its label is 1."
    return "the rows are not the slopes of the loss. Start from ∂L/∂s for one candidate, then s = u · v."


# ---- 2 --------------------------------------------------------------------------------------------------------------

_COUNTS = np.array([4000.0, 1500.0, 900.0, 300.0, 100.0, 30.0])
_DRAWS, _NEIGHBOUR = 60_000, 1


def _draw_negatives(answer: Any) -> str | None:
    if not takes(answer, 4):
        return "give the function `draw_negatives` itself: it takes counts, neighbour, size and random."
    counts = _COUNTS.copy()
    drawn = answer(counts, _NEIGHBOUR, _DRAWS, np.random.default_rng(0))
    if drawn is None:
        return "`draw_negatives` returns None. It must return an array of ids."
    drawn = np.asarray(drawn)
    if drawn.shape != (_DRAWS,):
        return f"asked for {_DRAWS} ids, it returned something of the shape {drawn.shape}."
    if not np.issubdtype(drawn.dtype, np.integer) or drawn.min() < 0 or drawn.max() >= len(counts):
        return f"an id is an integer from 0 to {len(counts) - 1} here; some of what was drawn is not."
    if not np.array_equal(counts, _COUNTS):
        return "the function changes `counts`, and the next draw starts from something else. Work on a copy."
    found = np.bincount(drawn, minlength=len(counts)) / _DRAWS
    if found[_NEIGHBOUR] > 0:
        return "the neighbour is still among the negatives."
    right = _shares(0.75)
    if np.abs(found - right).max() < 0.012:
        return None
    known = {
        "the neighbour never comes, but the others come in proportion to their counts. Where is the power?": _shares(1),
        "every word comes equally often. Frequent ones should come more often, but less than in proportion.": _shares(
            0
        ),
    }
    for hint, wrong in known.items():
        if np.abs(found - wrong).max() < 0.012:
            return hint
    if found[_NEIGHBOUR + 1] > right[_NEIGHBOUR + 1] + 0.05:
        return "the word after the neighbour gets the neighbour's share as well as its own. Draw again instead."
    others = right > 0
    if found[others].all():
        power = np.polyfit(np.log(_COUNTS[others]), np.log(found[others]), 1)[0]
        if np.abs(found - _shares(power)).max() < 0.012:
            return f"the shares are those of counts to the power of {power:.1f}. Check the power."
    largest = int(np.abs(found - right).argmax())
    return f"word {largest} comes with a share of {found[largest]:.3f}; it should be {right[largest]:.3f}."


def _shares(power: float) -> np.ndarray:
    shares = np.where(np.arange(len(_COUNTS)) == _NEIGHBOUR, 0, _COUNTS**power)
    return shares / shares.sum()


# ---- 3 --------------------------------------------------------------------------------------------------------------


def _descend(answer: Any) -> str | None:
    if not takes(answer, 4):
        return "give the function `descend` itself: it takes table, ids, rows and learning_rate."
    random = np.random.default_rng(0)
    ids, rows = np.array([2, 0, 2, 5, 2, 0]), random.normal(size=(6, 3))
    before = random.normal(size=(7, 3))
    table, given = before.copy(), rows.copy()
    answer(table, ids.copy(), given, 0.5)
    step, mean = np.zeros_like(before), np.zeros_like(before)
    for number, row in zip(ids, rows, strict=True):
        step[number] += row
        mean[number] += row / np.sum(ids == number)
    right = before - 0.5 * step
    if not np.array_equal(given, rows):
        return "the function changes `rows`, which belong to whoever called it."
    if np.array_equal(table, before):
        return "`table` has not moved. It must be changed in place; a new array with that name is another one."
    if np.allclose(table, right, rtol=1e-9):
        return None
    if not np.array_equal(table[[1, 3, 4, 6]], before[[1, 3, 4, 6]]):
        return "rows that are not in `ids` have moved."
    if np.allclose(table, before + 0.5 * step, rtol=1e-9):
        return "the rows are added. Gradient descent goes against the gradient."
    if np.allclose(table, before - 0.5 * mean, rtol=1e-9):
        return "of an id that repeats, the rows are averaged. Their sum counts, not their mean."
    if np.allclose(table[5], right[5], rtol=1e-9):
        return "right for the row whose id occurs once. Of an id that repeats, every row must count, not one of them."
    return "the rows do not move by the learning rate times the sum of their gradients."


CHECKS = {"04.1": _context_gradients, "04.2": _draw_negatives, "04.3": _descend}
