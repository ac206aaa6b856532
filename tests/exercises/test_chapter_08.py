"""Exercises of chapter 08: right answers are right, wrong ones get a hint that helps, and nothing raises."""

import itertools
from collections.abc import Callable
from typing import Any

import keras
import numpy as np
import pytest
from keras.optimizers import SGD, Adam
from keras.optimizers.schedules import ExponentialDecay

from companion import exercises, gradient_flow
from companion.exercises.chapter_08 import _HESSIAN, _RUNS
from tests.exercises.judge import judged

LARGE, SMALL = 5 + 5**0.5, 5 - 5**0.5  # the eigenvalues of the Hessian of 08.1


def _rates(schedule: Any, steps: int) -> np.ndarray:
    return np.array([float(schedule(k)) for k in range(steps)])


def _clock(schedule: Any, steps: int) -> Any:
    return np.append(0.0, np.cumsum(_rates(schedule, steps)))


def _clock_list(schedule: Any, steps: int) -> list[Any]:
    times = [0.0]
    for k in range(steps):
        times.append(times[-1] + schedule(k))
    return times


RIGHT: list[tuple[str, Any]] = [
    ("08.1", 2 / LARGE),
    ("08.1", 0.2764),
    ("08.1", np.float64(0.2764)),
    ("08.2", dict(_RUNS)),
    ("08.3", _clock),
    ("08.3", _clock_list),
    ("08.3", lambda schedule, steps: itertools.accumulate([0.0, *_rates(schedule, steps)])),
    ("08.4", (3838, 38376)),
    ("08.4", [3835, 38373]),
    ("08.4", np.array([3840.0, 38400.0])),
]

WRONG: list[tuple[str, Any, str]] = [
    ("08.1", None, "one number"),
    ("08.1", "fast", "one number"),
    ("08.1", [0.1, 0.2], "one number"),
    ("08.1", float("nan"), "one number"),
    ("08.1", 4 / LARGE, "second derivatives"),
    ("08.1", 2 / 6, "diagonal"),
    ("08.1", 2 / 3, "coefficient 3"),
    ("08.1", 2 / SMALL, "smallest eigenvalue"),
    ("08.1", 1 / LARGE, "1/λ"),
    ("08.1", LARGE, "λ itself"),
    ("08.1", 0.2, "trace"),
    ("08.1", -0.1, "uphill"),
    ("08.1", 0.25, "not the largest"),
    ("08.1", 0.3, "too long"),
    ("08.2", None, "dictionary"),
    ("08.2", "on the flow", "dictionary"),
    ("08.2", {"A": "on the flow"}, "dictionary"),
    ("08.2", {**_RUNS, "A": "yes"}, "each value"),
    ("08.2", {**_RUNS, "A": ["on the flow"]}, "each value"),
    ("08.2", {**_RUNS, "A": "another flow"}, "own case"),
    ("08.2", {**_RUNS, "B": "on the flow"}, "too long"),
    ("08.2", {**_RUNS, "C": "another flow"}, "velocity settles"),
    ("08.2", {**_RUNS, "D": "on the flow"}, "towards zero"),
    ("08.2", {**_RUNS, "E": "another flow"}, "another length"),
    ("08.2", {**_RUNS, "F": "another clock"}, "own gradient"),
    ("08.3", None, "function"),
    ("08.3", [0.0, 0.1], "function"),
    ("08.3", lambda schedule: None, "function"),
    ("08.3", lambda schedule, steps: None, "returns None"),
    ("08.3", lambda schedule, steps: 3.0, "sequence"),
    ("08.3", lambda schedule, steps: ["a"] * 5, "sequence"),
    ("08.3", lambda schedule, steps: schedule("a"), "raised"),
    ("08.3", _rates, "adds them up"),
    ("08.3", lambda schedule, steps: np.cumsum(_rates(schedule, steps)), "missing"),
    ("08.3", lambda schedule, steps: np.cumsum(_rates(schedule, steps + 1)), "not `schedule(0)`"),
    (
        "08.3",
        lambda schedule, steps: np.append(0, np.cumsum(_rates(schedule, steps + 1)[1:])),
        "began with `schedule(1)`",
    ),
    ("08.3", lambda schedule, steps: _rates(schedule, steps + 1) * np.arange(steps + 1), "latest rate"),
    ("08.3", lambda schedule, steps: float(schedule(0)) * np.arange(steps + 1), "first rate"),
    ("08.3", lambda schedule, steps: np.zeros(3), "five moments"),
    ("08.3", lambda schedule, steps: np.zeros(5), "0.6"),
    ("08.3", lambda schedule, steps: _clock(schedule, steps) if steps else None, "For none"),
    ("08.4", None, "two numbers"),
    ("08.4", 3838, "two numbers"),
    ("08.4", "many", "two numbers"),
    ("08.4", (38376, 3838), "other way round"),
    ("08.4", (3454, 34538), "90 %"),
    ("08.4", (7676, 76750), "1/λ"),
    ("08.4", (1279, 12792), "tenth"),
    ("08.4", (1667, 16667), "natural"),
    ("08.4", (3838, 3838), "as much time"),
    ("08.4", (3838, 3838000), "tenth as long"),
    ("08.4", (100, 38376), "second is right"),
    ("08.4", (1, 2), "1 − h"),
]


test_right_answers, test_wrong_answers_get_a_hint = judged(RIGHT, WRONG)


# ---- what the checks rest on ----------------------------------------------------------------------------------------


def test_hessian_is_that_of_the_loss() -> None:
    def loss(a: float, b: float) -> float:
        return 2 * a**2 + 2 * a * b + 3 * b**2

    mixed = loss(1, 1) - loss(1, 0) - loss(0, 1)
    np.testing.assert_allclose(_HESSIAN, [[2 * loss(1, 0), mixed], [mixed, 2 * loss(0, 1)]])
    for rate, is_stable in ((0.27, True), (0.28, False)):
        end = gradient_flow.integrate(lambda theta: _HESSIAN @ theta, [1.0, 1.0], rate, 2000)[-1]
        assert (np.abs(end).max() < 1) == is_stable


CURVATURE = np.array([0.5, 2.0])
START = np.array([1.5, -1.0])


def _losses(optimizer: Any, time: float, h: float) -> np.ndarray:
    """The loss at ten equally spaced times h·k."""
    variable, losses = keras.Variable(START, dtype="float64"), []
    steps = round(time / h)
    for k in range(1, steps + 1):
        gradient = keras.ops.convert_to_tensor(CURVATURE * variable.numpy(), "float64")
        optimizer.apply([gradient], [variable])
        if k % (steps // 10) == 0:
            losses.append(float(0.5 * CURVATURE @ variable.numpy() ** 2))
    return np.array(losses)


RUNS: dict[str, Callable[[float], Any]] = {
    "A": SGD,
    "B": SGD,
    "C": lambda h: SGD(h, momentum=0.9),
    "D": lambda h: SGD(h, weight_decay=0.5),
    "E": lambda h: SGD(ExponentialDecay(h, round(0.5 / h), 0.5)),
    "F": Adam,
}


@pytest.mark.parametrize("name", RUNS)
def test_runs_collapse_as_said(name: str) -> None:
    """Two rates, run with Keras: on the flow's curve, on each other, or neither."""
    h = {"B": 2.5, "C": 4e-3}.get(name, 1e-2)  # hλ = 5, or far below 2
    time = 50 * h if name == "B" else 1.0
    times = np.linspace(time / 10, time, 10)
    exact = 0.5 * np.exp(-2 * np.multiply.outer(times, CURVATURE)) @ (CURVATURE * START**2)
    coarse, fine = (_losses(RUNS[name](rate), time, rate) for rate in (h, h / 2))
    on_the_flow = np.abs(fine - exact).max() < 0.01
    on_each_other = np.abs(fine - coarse).max() < 0.05
    found = {(True, True): "on the flow", (False, True): "another flow"}.get((on_the_flow, on_each_other), "unstable")
    if name == "B":
        assert coarse[-1] > 1e3
        assert fine[-1] > 1e3
    if name == "C":
        faster = 0.5 * np.exp(-2 * np.multiply.outer(10 * times, CURVATURE)) @ (CURVATURE * START**2)
        assert not on_the_flow
        far, near = (np.abs(losses - faster).max() for losses in (coarse, fine))
        assert near < 0.6 * far  # on the way to it as h shrinks
        found = "another clock"
    if name == "E":
        passed = times * 0 + 0.5 / np.log(2) * (1 - 0.5 ** (times / 0.5))  # the integral of the schedule
        slower = 0.5 * np.exp(-2 * np.multiply.outer(passed, CURVATURE)) @ (CURVATURE * START**2)
        assert not on_the_flow
        assert np.abs(fine - slower).max() < 0.01
        found = "another clock"
    assert found == _RUNS[name]


def test_the_price_counted_step_by_step() -> None:
    counted = []
    for across in (1e3, 1e4):
        distance, steps = 1.0, 0
        while distance > 1e-3:
            distance, steps = distance * (1 - 0.9 * 2 / across), steps + 1
        counted.append(steps)
    assert exercises.check("08.4", counted).correct
