"""Checks for the exercises of chapter 07: denominators, counts of updates, resumed windows, errors and their makers."""

from typing import Any

import numpy as np

from companion.exercises.answers import not_a_choice, whole

_MAKERS = {"A": "plain", "B": "undivided", "C": "told", "D": "Keras"}
_PARTS, _WINDOWS = 4, 6


def errors_by_situation() -> dict[str, dict[str, float]]:
    """Runs exercise 4: four accumulations of a linear model's gradient in three situations, in float64.

    Returns:
        For ``"A"`` to ``"D"`` the distance from the large batch in each situation, divided by the way that it went.
    """
    situations = {"equal": (16, 1.0), "ragged": (13, 1.0), "schedule": (16, 0.8)}
    found: dict[str, dict[str, float]] = {name: {} for name in _MAKERS}
    for situation, (size, decay) in situations.items():
        judge = _run("told", size, decay)
        for name, maker in _MAKERS.items():
            gap = _run(maker, size, decay) - judge
            found[name][situation] = float(np.linalg.norm(gap) / np.linalg.norm(judge))
    return found


def _run(maker: str, size: int, decay: float) -> np.ndarray:
    """The weights after all windows, by the rules written out. They begin at zero."""
    random, theta = np.random.default_rng(0), np.zeros(3)
    for window in range(_WINDOWS):
        x = random.normal(size=(size, 3))
        y = x @ np.array([1.0, -2.0, 0.5]) + random.normal(size=size)
        parts = [slice(begin, begin + _PARTS) for begin in range(0, size, _PARTS)]
        gradients = np.array([x[part].T @ (x[part] @ theta - y[part]) / len(y[part]) for part in parts])
        shares = np.array([len(y[part]) / size if maker == "told" else 1 / len(parts) for part in parts])
        if maker == "undivided":
            shares = np.ones(len(parts))
        step = (window + 1) * len(parts) - 1 if maker == "Keras" else window
        theta = theta - 0.05 * decay**step * shares @ gradients
    return theta


def _wrong(answer: Any, expected: dict[str, Any]) -> list[str]:
    return [key for key, right in expected.items() if answer[key] != right]


def _not_counts(answer: Any, expected: dict[str, int]) -> str | None:
    if not isinstance(answer, dict) or set(answer) != set(expected):
        return f"the answer is a dictionary with the keys {', '.join(map(repr, expected))}."
    if any(whole(value) is None for value in answer.values()):
        return "each value is a whole number."
    return None


_DENOMINATORS = {"A": "examples", "B": "tokens", "C": "positions", "D": "tokens", "E": "impossible"}
_DENOMINATOR_HINTS = {
    "A": "one class for each text is one term of the loss for each text, however long it is.",
    "B": "ignore_class masks these positions: they count neither in the sum nor in what it is divided by.",
    "C": "a weight of 0 takes a position out of the sum. Does the default reduction know that it is gone?",
    "D": "the reduction divides by the sum of the weights. What is that, if each weight is 0 or 1?",
    "E": "one loss wants to be weighed by one count, the other one by another. What one number does both?",
}


def _denominators(answer: Any) -> str | None:
    choices = ("examples", "positions", "tokens", "nothing", "impossible")
    hint = not_a_choice(answer, _DENOMINATORS, choices)
    if hint:
        return hint
    wrong = _wrong(answer, _DENOMINATORS)
    return f"{wrong[0]} is not weighed by that: {_DENOMINATOR_HINTS[wrong[0]]}" if wrong else None


_UPDATES = {"flush": 5, "carry": 3, "drop": 0}


def _updates(answer: Any) -> str | None:
    hint = _not_counts(answer, _UPDATES)
    if hint:
        return hint
    wrong = _wrong(answer, _UPDATES)
    if not wrong:
        return None
    hints = {
        "flush": "the callback closes the window at the end of each epoch: how many windows are closed in five?",
        "carry": "the window goes on in the next epoch. How often does eight go into all the batches there are?",
        "drop": "six batches do not fill a window of eight, and the epoch's end forgets them.",
    }
    if wrong[0] == "carry" and answer["carry"] == 4:
        return '"carry" keeps what is left at the end of `fit` as well: an open window makes no update.'
    return f'"{wrong[0]}" is not right: {hints[wrong[0]]}'


_RESUMED = {"everything": 2, "steps=2": 1, "steps=8": 6, "weights": 4}


def _resumed(answer: Any) -> str | None:
    hint = _not_counts(answer, _RESUMED)
    if hint:
        return hint
    wrong = _wrong(answer, _RESUMED)
    if not wrong:
        return None
    hints = {
        "everything": "after six parts one window of four has been used. How many parts wait in the next one?",
        "steps=2": "the parts that wait fill this window already. But who makes the update, before a part comes?",
        "steps=8": "the window that is open grows to eight, with the parts that wait in it.",
        "weights": "the parts that waited were in the optimizer's state, and that was not saved.",
    }
    if wrong[0] == "steps=2" and answer["steps=2"] == 0:
        return '"steps=2": loading moves nothing. The update comes with the next part, which is the third one in it.'
    return f'"{wrong[0]}" is not right: {hints[wrong[0]]}'


_MAKER_HINTS = {
    "undivided": "Who never divides is wrong on equal parts already.",
    "Keras": "Keras is exact on equal parts, takes a mean of means, and reads the schedule at every part.",
    "plain": "Plain GradientAccumulation counts updates, but to it all parts weigh alike.",
    "told": "Told what its parts weigh, it has no error in any situation.",
}


def _makers(answer: Any) -> str | None:
    hint = not_a_choice(answer, _MAKERS, tuple(_MAKER_HINTS))
    if hint:
        return hint
    wrong = _wrong(answer, _MAKERS)
    return f"{wrong[0]} was not made by what you say. {_MAKER_HINTS[answer[wrong[0]]]}" if wrong else None


CHECKS = {"07.1": _denominators, "07.2": _updates, "07.3": _resumed, "07.4": _makers}
