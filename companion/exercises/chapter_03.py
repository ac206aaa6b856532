"""Checks for the exercises of chapter 03: momentum, Nesterov, what a resumed run has lost, Adam's first step."""

import inspect
import itertools
import math
from typing import Any
from unittest import mock

import keras
import numpy as np
from keras.optimizers.schedules import InverseTimeDecay

from companion.exercises.answers import entries, in_fit, not_a_choice
from companion.exercises.answers import number as _number
from companion.optimizers import Momentum

_LOST = {"A": "counter", "B": "nothing", "C": "both", "D": "velocity"}


def resumed_runs() -> dict[str, np.ndarray]:
    """Runs exercise 3: four runs under a constant gradient of 1, each interrupted after ten updates and resumed.

    Returns:
        For the runs ``"A"`` to ``"D"`` the lengths of twenty steps; the resumed run begins with the eleventh.
    """
    return {run: _resumed_run(lost) for run, lost in _LOST.items()}


def _resumed_run(lost: str) -> np.ndarray:
    weight = keras.Variable([0.0], dtype="float32")
    optimizer = Momentum(InverseTimeDecay(1.0, decay_steps=5, decay_rate=1.0), momentum=0.75)
    positions = [0.0]
    for update in range(20):
        if update == 10 and lost in ("velocity", "both"):
            optimizer.velocities[0].assign([0.0])
        if update == 10 and lost in ("counter", "both"):
            optimizer.iterations.assign(0)
        optimizer.apply([np.ones(1, "float32")], [weight])
        positions.append(float(weight.numpy()[0]))
    return -np.diff(positions)


def _largest_momentum(answer: Any) -> str | None:
    h, curvature = 0.01, 4.0
    beta = _number(answer)
    if beta is None:
        return "the answer is one number, such as 0.5."
    if abs(beta - (1 - math.sqrt(h * curvature)) ** 2) <= 0.005:
        return None
    if abs(beta - (1 - math.sqrt(h * curvature))) <= 0.005:
        return "in the end each step multiplies θ by that number. β is its square."
    if not 0 <= beta < 1:
        return "a momentum lies in [0, 1)."
    theta, v, signs = 1.0, 0.0, []
    for _ in range(400):
        v = beta * v - h * curvature * theta
        theta += v
        signs.append(theta > 0)
    changes = sum(a != b for a, b in itertools.pairwise(signs))
    if changes:
        return f"with β = {beta:g} the weight changes its sign {changes} times in 400 steps. Find where that begins."
    return f"with β = {beta:g} the weight never changes its sign, but a larger β is possible. Try 0.01 more."


def _recurrence(kind: str) -> np.ndarray:
    """Six steps of the exercise's quadratic from the formulas, in float64: the right one, or a known wrong one."""
    h = 0.01 if kind == "fixed rate" else 0.125
    beta = 0.9 if kind == "fixed momentum" else 0.5
    theta, v, path = np.array([2.0, -1.0]), np.zeros(2), []
    for _ in range(6):
        pull = h * np.array([1.0, 4.0]) * theta
        new = beta * v + pull if kind == "both signs" else beta * v - pull
        steps = {
            "momentum": new,
            "sign": beta * new + pull,
            "both signs": beta * new + pull,
            "brake": -beta * new - pull,
            "no gradient": beta * new,
            "twice": new - pull,
            "plain": -pull,
        }
        v = np.zeros(2) if kind == "no memory" else new
        theta = theta + steps.get(kind, beta * new - pull)
        path.append(theta)
    return np.array(path)


_NESTEROV_HINTS = {
    "momentum": "that is plain momentum. The weight must move by β v - h g, with the new velocity v.",
    "sign": "the gradient enters the weight's step with the wrong sign: it is β v - h g.",
    "both signs": "the gradient has the wrong sign in both lines: the loss grows. Each of them has - h g.",
    "brake": "the velocity works against the gradient: a sign is wrong. Both v and the weight's step are β v - h g.",
    "no gradient": "the weight's step is β v - h g; the second part is missing.",
    "twice": "the weight's step is β v - h g: the velocity must be multiplied by β once more.",
    "no memory": "the weight's step is right, but the velocity is not kept. Assign it to the slot with self.assign.",
    "plain": "that is gradient descent: the velocity has no effect on the weight.",
    "fixed rate": "your h is always 0.01. Use the `learning_rate` that `update_step` is given.",
    "fixed momentum": "your β is always 0.9. Use `self.momentum`.",
}


def _nesterov(answer: Any) -> str | None:
    if isinstance(answer, keras.optimizers.Optimizer):
        return "give the class itself, not an instance of it."
    if not (inspect.isclass(answer) and issubclass(answer, Momentum)):
        return "give a class that inherits from `companion.Momentum`."
    borrowed: list[bool] = []
    rule = Momentum.update_step

    def watched(self: Momentum, *args: Any, **kwargs: Any) -> None:
        borrowed.append(self.nesterov)
        rule(self, *args, **kwargs)

    with mock.patch.object(Momentum, "update_step", watched):
        path = _six_steps(answer)
    if any(borrowed):
        return "that is the `nesterov` argument at work. Write both lines of the rule yourself."
    if np.allclose(path, _recurrence("right"), atol=1e-5):
        return in_fit(answer(learning_rate=0.125, momentum=0.5))
    if np.allclose(path, [2.0, -1.0], atol=1e-7):
        return "the weight does not move. `update_step` returns nothing; it must call self.assign_add(variable, …)."
    for kind, hint in _NESTEROV_HINTS.items():
        if np.allclose(path, _recurrence(kind), atol=1e-5):
            return hint
    wrong = int(np.argmax(~np.isclose(path, _recurrence("right"), atol=1e-5).all(axis=1))) + 1
    return f"update {wrong} is the first that differs from the formula. First v ← β v - h g, then θ ← θ + β v - h g."


def _six_steps(make: Any) -> np.ndarray:
    """The walk of a reader's optimizer that :func:`_recurrence` predicts."""
    weight = keras.Variable([2.0, -1.0], dtype=keras.config.floatx())
    optimizer = make(learning_rate=0.125, momentum=0.5)
    path = []
    for _ in range(6):
        optimizer.apply([np.array([1.0, 4.0], keras.config.floatx()) * weight.numpy()], [weight])
        path.append(weight.numpy())
    return np.array(path)


def _lost_state(answer: Any) -> str | None:
    hint = not_a_choice(answer, _LOST, ("velocity", "counter", "both", "nothing"))
    if hint:
        return hint
    wrong = [run for run, lost in _LOST.items() if answer[run] != lost]
    if not wrong:
        return None
    advice = {
        "nothing": "Do its steps go on falling as before?",
        "both": "Compare its steps after the interruption with those of a run that has just begun.",
        "velocity": "Does its step jump at the interruption? Without a velocity the step is the learning rate alone.",
        "counter": "Without the counter the learning rate starts again at its top, but the velocity is still there.",
    }
    return f"run {wrong[0]} did not lose what you say. {advice[answer[wrong[0]]]}"


def _first_step(answer: Any) -> str | None:
    parts = [_number(part) for part in entries(answer) or []]
    if len(parts) != 2 or None in parts:
        return "the answer is two numbers: (after 4000, after -0.4)."
    large, small = (float(part) for part in parts if part is not None)
    if abs(large - 4.75) <= 1e-3 and abs(small - 5.25) <= 1e-3:
        return None
    if abs(large - 5.25) <= 1e-3 and abs(small - 4.75) <= 1e-3:
        return "the length is right, the direction is not: minimisation goes against the gradient."
    if abs(large - (5 - 0.25 * 4000)) <= 1e-3 or abs(small - (5 + 0.25 * 0.4)) <= 1e-3:
        return "that is the step of SGD. Adam divides by the root of the mean of g²."
    if abs(abs(large) - 0.25) <= 1e-3 and abs(abs(small) - 0.25) <= 1e-3:
        return "that is how far the weight moves. It stood at 5: where does it stand now?"
    if abs(abs(large - 5) - 0.25 * 0.1 / math.sqrt(0.001)) <= 1e-2:
        return "that is the step without the bias corrections."
    if abs(large - 4.75) <= 1e-3:
        return "the first number is right. Does the second gradient's size matter?"
    return "put t = 1 into the rule: what are m and q, and what is left of g after the correction?"


CHECKS = {"03.1": _largest_momentum, "03.2": _nesterov, "03.3": _lost_state, "03.4": _first_step}
