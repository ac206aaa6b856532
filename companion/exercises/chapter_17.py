"""Checks for the exercises of chapter 17: the two loops of L-BFGS, where it applies, a step of SAM."""

from typing import Any

import numpy as np

from companion.exercises.answers import number as _number
from companion.exercises.answers import takes as _takes

# ---- 1 --------------------------------------------------------------------------------------------------------------


def _dense(gradient: np.ndarray, pairs: list[Any], scale: str = "newest", order: int = 1) -> np.ndarray:
    """H g with the matrix written out: Nocedal and Wright, (7.16) by (6.17)."""
    n = gradient.size
    inverse = np.eye(n)
    if pairs and scale != "none":
        s, y = pairs[-1 if scale == "newest" else 0]
        inverse *= (s @ y) / (y @ y)
    for s, y in pairs[::order]:
        turn = np.eye(n) - np.outer(s, y) / (s @ y)
        inverse = turn @ inverse @ turn.T + np.outer(s, s) / (s @ y)
    return inverse @ gradient


def _problem(count: int) -> tuple[np.ndarray, list[Any]]:
    generator = np.random.default_rng(count)
    root = generator.normal(size=(6, 6))
    matrix = root @ root.T + np.eye(6)
    steps = generator.normal(size=(count, 6))
    return generator.normal(size=6), [(step, matrix @ step) for step in steps]


def _two_loop(answer: Any) -> str | None:
    if not callable(answer):
        return "give the function itself, without parentheses."
    if not _takes(answer, 2):
        return "the function takes two arguments: the gradient, and the list of pairs."
    for count in (3, 1, 0):
        gradient, pairs = _problem(count)
        kept = gradient.copy(), [(s.copy(), y.copy()) for s, y in pairs]
        try:
            found = answer(gradient, pairs)
        except (IndexError, NameError):
            if pairs:
                raise
            return "with pairs it is right. With none there is no newest pair to scale with: return the gradient."
        if found is None:
            return "your function returns nothing yet."
        found = np.asarray(found, dtype=float)
        if found.shape != gradient.shape:
            return f"with {count} pairs the shape is {found.shape}; H g has that of the gradient, {gradient.shape}."
        moved = any(
            not np.array_equal(*pair) for pair in zip((s for s, _ in pairs), (s for s, _ in kept[1]), strict=True)
        )
        if not np.array_equal(gradient, kept[0]) or len(pairs) != len(kept[1]) or moved:
            return "your function changes what it was given: begin with a copy of the gradient."
        hints = (
            (_dense(gradient, pairs), None),
            (-_dense(gradient, pairs), "this is −H g, the direction. `two_loop` returns H g."),
            (_dense(gradient, pairs, "none"), "the scaling between the loops is missing: (s·y) / (y·y), newest pair."),
            (_dense(gradient, pairs, "oldest"), "scale with the newest pair, the last one of the list."),
            (_dense(gradient, pairs, "newest", -1), "the order is turned round: the first loop begins at the newest."),
            (gradient, f"with {count} pairs this is the gradient itself: what do the pairs change?"),
        )
        right, *wrong = hints
        if not np.allclose(found, right[0], rtol=1e-6, atol=1e-8):
            near = [hint for value, hint in wrong if np.allclose(found, value, rtol=1e-6, atol=1e-8)]
            return near[0] if near else f"with {count} pairs it is not H g. H y must be s for the newest pair: is it?"
    return None


# ---- 2 --------------------------------------------------------------------------------------------------------------


def _applies(answer: Any) -> str | None:
    try:
        letters = {str(letter).strip().lower() for letter in answer} - {"", ","}
    except TypeError:
        letters = {""}
    if not letters <= set("abcde"):
        return 'give the letters of those that it would train, such as "abcde".'
    hints = (
        ("b" in letters, "b: with dropout the same weights have another loss with each mask."),
        ("d" in letters, "d: what do the statistics of BatchNorm do at each question?"),
        ("e" in letters, "e: the angle is drawn anew each time the images are read. Is it still the same question?"),
        ("a" not in letters, "a: more points, but the same ones at each question, and nothing is drawn."),
        ("c" not in letters, "c: must data fit into memory, or must they be the same ones?"),
    )
    return next((hint for applies, hint in hints if applies), None)


# ---- 3 --------------------------------------------------------------------------------------------------------------


def _uphill(answer: Any) -> str | None:
    number = _number(answer)
    if number is None:
        return "give a number: the weight after one step."
    if abs(number + 0.14) < 1e-5:
        return None
    hints = {
        0.06: "that is gradient descent. SAM steps with the gradient from 0.5 further uphill.",
        0.36: "the step begins at 0.6 here. It begins at the weight: SAM only asks uphill.",
        0.26: "that is downhill: SAM asks where the loss is higher, to the right.",
        -0.02: "the slope is divided by its norm: SAM walks 0.5, whatever the slope is.",
    }
    near = [hint for value, hint in hints.items() if abs(number - value) < 1e-5]
    return near[0] if near else "where is uphill of 0.1, and what is the slope λθ there? The step begins at 0.1."


CHECKS = {"17.1": _two_loop, "17.2": _applies, "17.3": _uphill}
