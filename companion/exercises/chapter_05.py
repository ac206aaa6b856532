"""Checks for the exercises of chapter 05, and the snippets that two of them ask about.

Readers see the source of the snippets, so these have no docstrings.
"""

# ruff: noqa: D103

import functools
from collections.abc import Callable, Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf
from keras import ops

from companion.exercises.answers import entries, first_wrong, not_an_optimizer, number, several, truth


def snippet_a(due: bool) -> list[float]:
    weight = keras.Variable(5.0)

    @tf.function
    def step(due: tf.Tensor) -> tf.Tensor:
        moved = weight.assign(weight - 1.0)
        return ops.cond(due, lambda: moved, lambda: weight.value)

    step(tf.constant(due))
    return [float(weight.numpy())]


def snippet_b(due: bool) -> list[float]:
    weight = keras.Variable(5.0)

    @tf.function
    def step(due: tf.Tensor) -> tf.Tensor:
        def move() -> tf.Tensor:
            return weight.assign(weight - 1.0)

        return ops.cond(due, move, lambda: weight.value)

    step(tf.constant(due))
    return [float(weight.numpy())]


def snippet_c(due: bool) -> list[float]:
    weight = tf.Variable(5.0)

    @tf.function
    def step(due: tf.Tensor) -> tf.Tensor:
        result = tf.constant(5.0)
        moved = weight.assign(weight - 1.0)
        if due:
            result = moved
        return result

    step(tf.constant(due))
    return [weight.numpy()]


def snippet_d(due: bool) -> list[float]:
    weight = keras.Variable(5.0)
    move = functools.partial(weight.assign, weight - 1.0)
    ops.cond(due, move, lambda: weight.value)
    return [float(weight.numpy())]


def snippet_e(due: bool) -> list[float]:
    weight, velocity = keras.Variable(5.0), keras.Variable(2.0)
    velocity.assign(0.5 * velocity - 2.0)
    weight.assign(ops.where(due, weight + velocity, weight))
    return [float(weight.numpy()), float(velocity.numpy())]


def snippet_f(due: bool) -> list[float]:
    weight = keras.Variable(5.0)
    weight.assign_sub(1.0 * ops.cast(due, "float32"))
    return [float(weight.numpy())]


SNIPPETS = (snippet_a, snippet_b, snippet_c, snippet_d, snippet_e, snippet_f)
_SNIPPET_HINTS = (
    "`cond` gets two lambdas, but what do they return? Find the line that makes the assignment.",
    "when `cond` builds its true branch it calls `move`. Where does the assignment stand then?",
    "the `if` becomes a branch. Which of its lines stand inside?",
    "`partial` calls nothing. Who calls `weight.assign`, and is it harmful that the subtraction is done early?",
    "the weight is chosen by value. Is it all that the step changes?",
    "there is no branch here at all. What is subtracted if `due` is false?",
)


def line_by_line(gradients: Sequence[float]) -> list[int]:
    """The published lines, run eagerly; returns -θ after each gradient."""
    weight = tf.Variable(0.0, dtype="float64")
    total = tf.Variable(0.0, dtype="float64")
    digits = []
    for iterations, gradient in enumerate(gradients):
        due = iterations % 2 == 0
        moved = weight.assign(weight - 2.0 * total / 2.0)
        tf.where(due, moved, weight)
        restarted = total.assign(gradient)
        grown = total.assign(total + gradient)
        tf.where(due, restarted, grown)
        digits.append(round(-float(weight)))
    return digits


def _is_right(snippet: Callable[[bool], list[float]]) -> bool:
    """Whether a snippet leaves all it holds alone if no step is due, and moves the weight if one is."""
    # The values that every snippet starts from; one that holds a velocity starts it at 2.
    start = [5.0, 2.0]
    return snippet(False) == start[: len(snippet(False))] and snippet(True)[0] == 4.0


def _right_or_wrong(answer: Any) -> str | None:
    guesses = entries(answer)
    if guesses is None or len(guesses) != len(SNIPPETS):
        return f"the answer is a list of {len(SNIPPETS)} booleans, one for each snippet."
    if None in (guesses := [truth(guess) for guess in guesses]):
        return "each entry is True (right) or False."
    wrong = [index for index, snippet in enumerate(SNIPPETS) if guesses[index] != _is_right(snippet)]
    return first_wrong(wrong, _SNIPPET_HINTS)


_SIX = [10**k for k in range(6)]


def _predict(digits: Any) -> str | None:
    expected = line_by_line(_SIX)
    given = entries(digits)
    if given is None or len(given) != len(expected):
        return f"the answer is a list of {len(expected)} whole numbers, -θ after each step."
    if None in (given := [number(value) for value in given]):
        return "each entry is a number, -θ after that step."
    if given == [-value for value in expected]:
        return "asked is -θ; yours are θ."
    for step, (value, right) in enumerate(zip(given, expected, strict=True), start=1):
        if value != right:
            return (
                f"step {step} is the first that is off. Keep a slip of paper with `weight` and `total`, and change "
                "them at every `assign`, due or not."
            )
    return None


_GRADIENTS = [10.0**k for k in range(7)]


def _run(optimizer: Any, in_function: bool) -> tuple[np.ndarray, list[np.ndarray]]:
    """Two weights, the second with twice the gradient; returns minus the weights, and the other variables, by step."""
    variables = [keras.Variable(0.0, dtype="float64"), keras.Variable(0.0, dtype="float64")]
    optimizer.build(variables)

    def apply(gradient: Any) -> None:
        optimizer.apply([gradient, 2 * gradient], variables)

    step = tf.function(apply) if in_function else apply
    weights, slots = [], []
    for gradient in _GRADIENTS:
        step(tf.constant(gradient, "float64"))
        weights.append([-float(variable.numpy()) for variable in variables])
        slots.append(np.array([np.asarray(slot.numpy(), "float64").ravel() for slot in optimizer.variables[2:]]))
    return np.array(weights), slots


def _repair(answer: Any) -> str | None:
    if hint := not_an_optimizer(answer):
        return hint
    meant = np.array([sum(_GRADIENTS[: step - step % 3]) for step in range(1, 8)])
    grown = np.array([sum(_GRADIENTS[step - step % 3 : step]) for step in range(1, 8)])
    make: Callable[..., Any] = answer
    for in_function in (False, True):
        try:
            weights, slots = _run(make(learning_rate=3.0), in_function)
        except (tf.errors.OperatorNotAllowedInGraphError, NotImplementedError):
            if not in_function:
                raise
            return (
                "right when run eagerly. A tf.function records the step before `due` is True or False, so Python's "
                "`if` has nothing to ask. `ops.cond` and `ops.where` can wait."
            )
        except TypeError as error:
            if "type method" not in str(error):
                raise
            return (
                "right when run eagerly. In `update_step` `variable` is TensorFlow's own variable, whose `value` is a "
                "method: let the branch return ops.convert_to_tensor(variable), as the draft does."
            )
        where = "in a tf.function" if in_function else "run eagerly"
        if np.allclose(weights, np.outer(meant, [1, 2]), rtol=1e-9):
            if not all(
                len(step) == 2 and np.allclose(step.ravel(), [total, 2 * total])
                for step, total in zip(slots, grown, strict=True)
            ):
                return f"{where}, the weights are right, but the sums are not: after a window they start from zero."
            continue
        moved = np.diff(weights[:, 0], prepend=0.0) != 0
        if not moved.any():
            return f"{where}, the weight never moves. Something has to be assigned when a step is due."
        if moved.all():
            return f"{where}, the weight moves at every step. Which `assign` does no branch call?"
        if list(np.nonzero(moved)[0]) == [2, 5]:
            if np.isclose(weights[2, 0], meant[2]) and np.isclose(weights[2, 1], 2 * meant[2]):
                return f"{where}, the first window is right and the second is not. What has to happen to the sum?"
            return f"{where}, it moves at the right steps and not by the right amount: -h times the mean of the window."
        return f"{where}, the weight moves after the steps {list(np.nonzero(moved)[0] + 1)}, not after 3 and 6."
    return None


def _window(answer: Any) -> str | None:
    if not callable(answer):
        return "the answer is the function `step(weight, total, count, gradient)`."
    state: tuple[Any, ...] = (0, 0, 0)
    found, gradients = [], [10**k for k in range(9)]
    for gradient in gradients:
        state = answer(*state, gradient)
        if several(state, 3) is None:
            return "`step` returns three values: weight, total, count."
        found.append(-state[0])
    meant = [sum(gradients[: step - step % 3]) for step in range(1, 10)]
    if np.allclose(np.array(found, float), meant, rtol=1e-6):
        return None if state[2] == 9 else "the weights are right, but `count` should be 9 after nine gradients."
    if not any(found):
        return "the weight never moves."
    moved = [step for step, (old, new) in enumerate(zip([0, *found], found, strict=False), start=1) if old != new]
    if moved == [4, 7]:
        return "it moves at steps 4 and 7, one late. What is `count % 3` when nothing has been counted yet?"
    if moved == [3, 6, 9]:
        if found[2] == 11:
            return "it moves at the right steps, but -θ is 11 after the third: where is the current gradient?"
        if found[2] == 111:
            return f"the first window is right. After the second, -θ is {found[5]}: what does the sum start from?"
        return f"it moves at the right steps, but -θ is {found[2]} after the third, not 111."
    return f"it moves at steps {moved}; it should at 3, 6 and 9."


CHECKS = {"05.1": _right_or_wrong, "05.2": _predict, "05.3": _repair, "05.4": _window}
