"""Checks for the exercises of chapter 06: a merge, a wrapper for an optimizer, denominators, gaps and their faults."""

from typing import Any

import keras
import numpy as np

from companion.exercises.answers import not_a_choice, takes
from companion.optimizers import Momentum

_FAULTS = {"A": "never reset", "B": "mean of means", "C": "a window late", "D": "zeros between"}
_PARTS, _WINDOWS, _RAGGED = 4, 12, 7


def gaps_of_faults() -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Runs exercise 4: four faulty accumulations of a linear model's gradient, in float64.

    Returns:
        For ``"A"`` to ``"D"`` the gap to the large batch after each of twelve windows, under plain SGD and under
        momentum.
    """
    return {
        name: tuple(np.abs(_run(fault, beta) - _run("none", beta)).max(axis=1) for beta in (0.0, 0.9))
        for name, fault in _FAULTS.items()
    }


def _run(fault: str, beta: float) -> np.ndarray:
    """The weights after each window, by the rules written out; parts are equal, but for those of one window."""
    random = np.random.default_rng(0)
    theta, v, total, waiting, path = np.zeros(3), np.zeros(3), np.zeros(3), np.zeros(3), []
    for window in range(_WINDOWS):
        sizes = [4, 4, 4, 1] if window == _RAGGED else [4, 4, 4, 4]
        weights = np.ones(_PARTS) if fault == "mean of means" else np.array(sizes, float)
        if fault != "never reset":
            total = np.zeros(3)
        for part, (size, weight) in enumerate(zip(sizes, weights, strict=True)):
            x = random.normal(size=(size, 3))
            y = x @ np.array([1.0, -2.0, 0.5]) + random.normal(size=size)
            total = total + weight / weights.sum() * x.T @ (x @ theta - y) / size
            gradient = total if part == _PARTS - 1 else np.zeros(3)
            if fault == "a window late" and part == _PARTS - 1:
                gradient, waiting = waiting, total
            if part == _PARTS - 1 or fault == "zeros between":
                v = beta * v - 0.05 * gradient
                theta = theta + v
        path.append(theta)
    return np.array(path)


# ---- 1 --------------------------------------------------------------------------------------------------------------


def _merge(answer: Any) -> str | None:
    if not takes(answer, 2):
        return "give the function `merge` itself: it takes the gradients and the weights."
    gradients = [[np.array([[1.0, 2.0]]), np.array([8.0])], [np.array([[5.0, -2.0]]), np.array([4.0])]]
    gradients.append([np.array([[-3.0, 6.0]]), np.array([-16.0])])
    ragged = _merged(answer, gradients, [16, 16, 8])
    if isinstance(ragged, str):
        return ragged
    if not np.allclose(ragged, [1.8, 1.2, 1.6], rtol=1e-12):
        return _hint_for_merged(ragged, np.array([[1.0, 2.0, 8.0], [5.0, -2.0, 4.0], [-3.0, 6.0, -16.0]]))
    gradients[1] = [np.full((1, 2), np.nan), np.full(1, np.nan)]
    masked = _merged(answer, gradients, [16.0, 0.0, 8.0])
    if isinstance(masked, str):
        return masked
    if np.isnan(masked).any():
        return "right for parts that count. But 0 times NaN is NaN: a part of weight 0 must be left out altogether."
    if not np.allclose(masked, [-1 / 3, 10 / 3, 0.0], atol=1e-12):
        return "right where all parts count. Where one has weight 0, the others' merge is not what it is without it."
    return None


def _merged(merge: Any, gradients: list[Any], weights: list[float]) -> np.ndarray | str:
    """All numbers that a reader's function returns, or a hint on their structure."""
    found = merge([[array.copy() for array in part] for part in gradients], list(weights))
    if found is None:
        return "`merge` returns None. It must return a list with one array for each variable."
    found = list(found)
    shapes = [np.shape(array) for array in found]
    if shapes == [(1, 2), (1,)]:
        return np.concatenate([np.ravel(np.asarray(array, "float64")) for array in found])
    if len(found) == len(gradients):
        return (
            f"three parts of two variables gave {len(found)} entries. `gradients` is ordered by part, the merge by "
            "variable: zip(*gradients) turns one into the other."
        )
    return f"variables of the shapes (1, 2) and (1,) gave arrays of the shapes {shapes}."


def _hint_for_merged(found: np.ndarray, parts: np.ndarray) -> str:
    weights = np.array([16.0, 16.0, 8.0])
    known = {
        "that is the mean of the means: every part has the same say, whatever its weight.": parts.mean(axis=0),
        "that is the sum. Divide it once, by the sum of the weights.": parts.sum(axis=0),
        "the gradients are weighted and added up, but not yet divided by the sum of the weights.": weights @ parts,
        "weighted, but divided by the number of parts. Divide by the sum of the weights.": weights @ parts / 3,
        "divided by the weights where it should be multiplied: a loss is a mean already.": (
            (parts / weights[:, None]).sum(axis=0) / (1 / weights).sum()
        ),
    }
    for hint, wrong in known.items():
        if np.allclose(found, wrong, rtol=1e-6):
            return hint
    if np.allclose(found, [1.8, 1.2, 1.6], rtol=1e-3):
        return "nearly: the difference is in the last digits. Keep the dtype of the gradients."
    return "parts of 16, 16 and 8 do not become the gradient of all 40 examples. A = Σ wᵢ gᵢ, then divide by Σ wᵢ."


# ---- 2 --------------------------------------------------------------------------------------------------------------


class _Spy(Momentum):
    """Notes which gradients reach it."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.received: list[float] = []

    def apply(self, grads: Any, trainable_variables: Any = None) -> None:
        grads = list(grads)
        self.received.append(float(np.ravel(keras.ops.convert_to_numpy(grads[0]))[0]))
        super().apply(grads, trainable_variables)


_STREAM = [1.0, 2.0, 6.0, -4.0, 0.0, 10.0, 3.0, 3.0, -3.0, 8.0, 8.0, 2.0]  # means of three: 3, 2, 1, 6


def _accumulate(answer: Any) -> str | None:
    if not isinstance(answer, type):
        return "give the class `Accumulate` itself, not an instance and not a function."
    if not takes(answer, 2) or not callable(getattr(answer, "apply", None)):
        return "the class must be made from (optimizer, steps) and have a method `apply(gradients, variables)`."
    spy = _Spy(learning_rate=0.5, momentum=0.5)
    variable = keras.Variable([0.0], dtype="float64")
    wrapper: Any = answer(spy, 3)
    for gradient in _STREAM:
        wrapper.apply([np.array([gradient])], [variable])
    if len(spy.received) != 4 or not np.allclose(spy.received, [3.0, 2.0, 1.0, 6.0], rtol=1e-12):
        return _hint_for_received(spy.received)
    return _around_adam(answer)


def _hint_for_received(received: list[float]) -> str:
    if not received:
        return "in four windows of three calls the wrapped optimizer was never called."
    if len(received) == len(_STREAM):
        return (
            f"the wrapped optimizer was called {len(received)} times in four windows. A gradient of zero is a step "
            "like any other: do not call the optimizer before the window is full."
        )
    if len(received) != 4:
        return f"the wrapped optimizer was called {len(received)} times in four windows; once in each is right."
    if np.allclose(received, [9.0, 6.0, 3.0, 18.0]):
        return "the optimizer receives the sum of each window; the parts are of one size, so it must be their mean."
    if np.allclose(received[:2], [3.0, 5.0]):
        return "the first window is right, the second one still holds the first one's sum. Empty it after an update."
    if received[0] == 1.0:
        return "the last part of a window is missing from its mean: add first, then update."
    found = ", ".join(f"{gradient:g}" for gradient in received)
    return f"the wrapped optimizer must receive the means 3, 2, 1 and 6 here; it received {found}."


def _around_adam(answer: Any) -> str | None:
    """The right means arrive for one weight: does it also work for a kernel and a bias, around Adam?"""
    random, rule = np.random.default_rng(0), keras.optimizers.Adam
    shapes = [(3, 2), (2,)]
    weights, large = ([keras.Variable(np.ones(shape), dtype="float64") for shape in shapes] for _ in range(2))
    inner, reference = rule(0.1), rule(0.1)
    wrapper = answer(inner, 2)
    for _ in range(3):
        parts = [random.normal(size=(2, *shape)) for shape in shapes]
        for number in range(2):
            wrapper.apply([keras.ops.convert_to_tensor(part[number]) for part in parts], weights)
        reference.apply([keras.ops.convert_to_tensor(part.mean(axis=0)) for part in parts], large)
    if not all(np.allclose(a.numpy(), b.numpy(), atol=1e-12) for a, b in zip(weights, large, strict=True)):
        return "right for one weight under momentum, but two weights under Adam are not those of the large batch."
    return None


# ---- 3 and 4 --------------------------------------------------------------------------------------------------------

_DENOMINATORS = {"A": "examples", "B": "examples", "C": "sample weights", "D": "tokens", "E": "nothing"}
_DENOMINATOR_HINTS = {
    "A": "the mean over five outputs is the same for every example, so only one count is left.",
    "B": "the weights scale each example's loss. What does the default reduction, sum_over_batch_size, divide by then?",
    "C": "read the reduction's name: a mean *with* the sample weights divides by their sum.",
    "D": "the embedding masks the padding, and a masked position neither counts in the sum nor in the denominator.",
    "E": "a sum has no denominator.",
}


def _denominators(answer: Any) -> str | None:
    choices = ("examples", "tokens", "sample weights", "nothing")
    hint = not_a_choice(answer, _DENOMINATORS, choices)
    if hint:
        return hint
    wrong = [name for name, right in _DENOMINATORS.items() if answer[name] != right]
    return f"{wrong[0]} is not merged by that: {_DENOMINATOR_HINTS[wrong[0]]}" if wrong else None


_FAULT_HINTS = {
    "never reset": "A sum that is never emptied is right in the first window and in no other, whatever the optimizer.",
    "mean of means": "A mean of means is right as long as the parts are equal.",
    "a window late": "A version that is a window late cannot be right after the first window: it has not moved.",
    "zeros between": "Which optimizer does not notice a gradient of zero?",
}


def _faults(answer: Any) -> str | None:
    hint = not_a_choice(answer, _FAULTS, tuple(_FAULT_HINTS))
    if hint:
        return hint
    wrong = [name for name, right in _FAULTS.items() if answer[name] != right]
    return f"{wrong[0]} does not have the fault that you say. {_FAULT_HINTS[answer[wrong[0]]]}" if wrong else None


CHECKS = {"06.1": _merge, "06.2": _accumulate, "06.3": _denominators, "06.4": _faults}
