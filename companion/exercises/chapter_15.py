"""Checks for the exercises of chapter 15: traffic, an outer step, a choice of k, and where to go on."""

from collections.abc import Callable
from typing import Any

import numpy as np

from companion.exercises.answers import number, several, takes

# ---- 1 --------------------------------------------------------------------------------------------------------------

_SCHEDULES = [
    (100, 1, 0),
    (100, 5, 0),
    (100, 20, 0),
    (103, 5, 0),
    (100, 20, 40),
    (113, 20, 13),
    (30, 20, 50),
    (3, 5, 0),
]
_WEIGHTS = 2410


def _exchanges(steps: int, every: int, warmup: int) -> int:
    return sum(
        step <= warmup or (step - warmup) % every == 0 or step == steps  # in this order, as one walks
        for step in range(1, steps + 1)
    )


def _traffic(answer: Any) -> str | None:
    if not takes(answer, 4):
        return "give the function `traffic` itself: it takes steps, every, warmup and weights."
    found = []
    for schedule in _SCHEDULES:
        given = answer(*schedule, _WEIGHTS)
        if given is None or given is ...:
            return "`traffic` returns nothing yet. It must return two numbers, exchanges and bytes."
        if several(given, 2) is None:
            return "`traffic` must return two numbers, exchanges and bytes."
        pair = [number(value) for value in given]
        if None in pair:
            return "both must be numbers."
        found.append(pair)
    exchanges, size = np.array(found, "float64").T
    expected = np.array([_exchanges(*schedule) for schedule in _SCHEDULES])
    if np.array_equal(size, expected) and np.array_equal(exchanges, 4 * _WEIGHTS * expected):
        return "the two numbers are right, in the other order: exchanges first."
    if not np.array_equal(exchanges, expected):
        return _hint_for_exchanges(exchanges)
    if np.array_equal(size, 4 * _WEIGHTS * expected):
        return None
    if np.array_equal(size, _WEIGHTS * expected):
        return "the exchanges are right. A float32 has four bytes."
    if np.array_equal(size, 8 * _WEIGHTS * expected):
        return "the exchanges are right. Count what one worker gives, not what it gets back; a float32 has four bytes."
    if np.array_equal(size, np.full(len(size), 4 * _WEIGHTS)):
        return "the exchanges are right. The bytes are those of one exchange; all of them are asked for."
    return "the exchanges are right, the bytes are not: in each exchange all weights travel, at four bytes each."


def _hint_for_exchanges(exchanges: np.ndarray) -> str:
    known: list[tuple[str, Callable[[int, int, int], float]]] = [
        ("the last step is missing, if no exchange follows it: at the end there is one more.", _without_the_last),
        ("there is one more at the end only if the last step was not exchanged anyway.", _one_more),
        ("that forgets the warm-up.", lambda steps, every, warmup: -(-steps // every)),
        ("after the warm-up one counts anew: every `every`-th step from there.", _counted_from_the_start),
        ("the warm-up can be longer than the whole run; there are no more exchanges than steps.", _long_warmup),
        ("an exchange is one event, not a step that is left out.", lambda steps, every, warmup: steps / every),
    ]
    for hint, wrong in known:
        if np.allclose(exchanges, [wrong(*schedule) for schedule in _SCHEDULES]):
            return hint
    for schedule, given in zip(_SCHEDULES, exchanges, strict=True):
        if given != _exchanges(*schedule):
            steps, every, warmup = schedule
            return (
                f"for steps={steps}, every={every}, warmup={warmup} there are {_exchanges(*schedule)} exchanges, "
                f"not {given:g}."
            )
    raise AssertionError("unreachable")


def _without_the_last(steps: int, every: int, warmup: int) -> float:
    return min(steps, warmup) + max(0, steps - warmup) // every


def _one_more(steps: int, every: int, warmup: int) -> float:
    return _without_the_last(steps, every, warmup) + 1


def _counted_from_the_start(steps: int, every: int, warmup: int) -> float:
    return sum(step <= warmup or step % every == 0 or step == steps for step in range(1, steps + 1))


def _long_warmup(steps: int, every: int, warmup: int) -> float:
    return warmup + -(-max(0, steps - warmup) // every)


# ---- 2 --------------------------------------------------------------------------------------------------------------

_ANCHOR, _VELOCITY = np.array([1.0, -2.0, 0.5]), np.array([0.3, 0.1, -0.2])
_WORKERS = np.array([[0.4, -1.0, 0.7], [0.8, -1.4, 0.1], [0.3, -1.2, 0.4]])
_RATE, _MOMENTUM = 0.7, 0.9


def _outer_step(answer: Any) -> str | None:
    if not takes(answer, 5):
        return "give the function `outer_step` itself: it takes anchor, workers, velocity, rate and momentum."
    given = answer(_ANCHOR.copy(), _WORKERS.copy(), _VELOCITY.copy(), _RATE, _MOMENTUM)
    if given is None or given is ...:
        return "`outer_step` returns nothing yet. It must return the new weights and the new velocity."
    if several(given, 2) is None:
        return "`outer_step` must return two arrays, the new weights and the new velocity."
    weights, velocity = (np.asarray(part, "float64") for part in given)
    if weights.shape != (3,) or velocity.shape != (3,):
        return f"both must have the shape of the anchor, (3,). They have {weights.shape} and {velocity.shape}."
    delta = _ANCHOR - _WORKERS.mean(axis=0)
    new = _MOMENTUM * _VELOCITY - _RATE * delta
    right = _ANCHOR + _MOMENTUM * new - _RATE * delta
    if np.allclose(weights, right) and np.allclose(velocity, new):
        return None
    if np.allclose(weights, new) and np.allclose(velocity, right):
        return "the two results are right, in the other order: weights first."
    if np.allclose(weights, right):
        return "the weights are right. The velocity to return is the new one, βv − ηΔ."
    known = {
        "the sign: Δ is anchor minus mean, and one descends along it.": (
            _ANCHOR + _MOMENTUM * (_MOMENTUM * _VELOCITY + _RATE * delta) + _RATE * delta
        ),
        "that is plain momentum. Nesterov's step looks one step ahead: βv − ηΔ with the new v.": _ANCHOR + new,
        "that is the plain average: no rate and no momentum.": _WORKERS.mean(axis=0),
        "that is a step without momentum.": _ANCHOR - _RATE * delta,
        "the weights move by βv − ηΔ with the new v, not the old one.": (
            _ANCHOR + _MOMENTUM * _VELOCITY - _RATE * delta + 0 * new
        ),
        "the step begins at the anchor, not at the workers' mean.": (
            _WORKERS.mean(axis=0) + _MOMENTUM * new - _RATE * delta
        ),
        "the workers' moves are to be averaged, not added up.": _sum_of_moves(),
    }
    for hint, wrong in known.items():
        if np.allclose(weights, wrong):
            return hint
    return "first Δ = anchor − mean of the workers' rows, then v, then the weights: anchor + βv − ηΔ."


def _sum_of_moves() -> np.ndarray:
    delta = (_ANCHOR - _WORKERS).sum(axis=0)
    return _ANCHOR + _MOMENTUM * (_MOMENTUM * _VELOCITY - _RATE * delta) - _RATE * delta


# ---- 3 --------------------------------------------------------------------------------------------------------------

_NETWORKS = [
    (2, 4e8, 1e-2, 1.25e8, 0.5, 0.1),
    (8, 4e8, 1e-3, 1.25e9, 0.3, 0.05),
    (64, 4e6, 2e-2, 1.25e8, 0.1, 0.2),
    (1000, 4e8, 1e-2, 1.25e8, 0.5, 0.25),
    (4, 4e6, 1e-5, 2.5e10, 0.5, 0.1),
    (1, 4e8, 1e-2, 1.25e8, 0.5, 0.1),
]


def _exchange(workers: int, size: float, latency: float, bandwidth: float) -> float:
    return 2 * (workers - 1) * (latency + size / workers / bandwidth)


def _smallest_k(answer: Any) -> str | None:
    if not takes(answer, 6):
        return "give the function `smallest_k` itself: it takes workers, size, latency, bandwidth, step and share."
    given = [answer(*network) for network in _NETWORKS]
    if any(value is None or value is ... for value in given):
        return "`smallest_k` returns nothing yet. It must return k."
    values = [number(value) for value in given]
    if None in values:
        return "it must return a number."
    found = np.array(values, "float64")
    exact = np.array([_exchange(*network[:4]) / (network[4] * network[5]) for network in _NETWORKS])
    if np.array_equal(found, np.maximum(1, np.ceil(exact))):
        return None
    workers, size, latency, bandwidth, step, share = np.array(_NETWORKS).T
    known = {
        "k is a number of steps: round up, and never below 1.": exact,
        "right for two workers and more. For one worker it says 0; there is no less than 1.": np.ceil(exact),
        "round up: with a smaller k the exchanges take more than their share.": np.maximum(1, np.floor(exact)),
        "that rounds to the nearest. Below the exact value the share is exceeded: round up.": (
            np.maximum(1, np.round(exact))
        ),
        "that allows a whole step's time for each exchange. Only a share of it is free.": (
            np.maximum(1, np.ceil(exact * share))
        ),
        "around a ring there are 2(R − 1) turns: once to sum, once to spread.": np.maximum(1, np.ceil(exact / 2)),
        "in each turn a worker sends one piece, n/R bytes, not all of them.": np.maximum(
            1, np.ceil(2 * (workers - 1) * (latency + size / bandwidth) / (step * share))
        ),
        "`size` is in bytes already: it does not count weights.": np.maximum(
            1, np.ceil(2 * (workers - 1) * (latency + 4 * size / workers / bandwidth) / (step * share))
        ),
        "that leaves out the latency.": np.maximum(
            1, np.ceil(2 * (workers - 1) * size / workers / bandwidth / (step * share))
        ),
        "each of the 2(R − 1) turns has its latency.": np.maximum(
            1, np.ceil((latency + 2 * (workers - 1) * size / workers / bandwidth) / (step * share))
        ),
    }
    for hint, wrong in known.items():
        if np.allclose(found, wrong, rtol=1e-9):
            return hint
    return (
        "the exchange takes T = 2(R − 1)(α + n/(Rb)). Once in k steps, that adds T/k to each; T/k ≤ share · step. "
        f"smallest_k({', '.join(f'{value:g}' for value in _NETWORKS[0])}) is {np.ceil(exact[0]):g}."
    )


# ---- 4 --------------------------------------------------------------------------------------------------------------

_BACKUPS: list[tuple[list[list[int]], int | None, str]] = [
    ([[2], [2]], 2, "all have finished epoch 2 and nothing later: go on from there."),
    ([[], []], 0, "nobody has a backup: that is the beginning, 0."),
    ([[2, 3], [2]], 2, "worker 1 has not finished epoch 3. The last that all have finished counts, not the newest."),
    ([[2], [2, 3]], 2, "worker 0 has not finished epoch 3; it need not be worker 1 that is behind."),
    ([[2, 3], [2, 3], [2, 3]], 3, "all have written epoch 3, and nobody has deleted epoch 2 yet: go on from 3."),
    ([[3], [2, 3]], 3, "all have epoch 3. Worker 1 has only not deleted epoch 2 yet."),
    ([[1], []], 0, "worker 1 was killed before its first backup: all begin anew, at 0."),
    ([[10, 9], [9]], 9, "the order in a list means nothing: look for the largest."),
    ([[4], [2]], None, "nobody is ever two epochs ahead: these are not of one run. Return None."),
    ([[3], [2]], None, "worker 0 is ahead and has deleted epoch 2 before worker 1 had 3. In one run that cannot be."),
    ([[2], []], None, "epoch 2 on one worker and nothing on the other: a worker has lost its folder. Return None."),
]


def _epoch_to_resume(answer: Any) -> str | None:
    if not takes(answer, 1):
        return "give the function `epoch_to_resume` itself: it takes the lists of all workers."
    if answer([[2], [2]]) is ...:
        return "`epoch_to_resume` returns nothing yet."
    for backups, expected, hint in _BACKUPS:
        try:
            given = answer([list(epochs) for epochs in backups])
        except ValueError as error:
            return f"for {backups} it raises {type(error).__name__}, {error}. An empty list is epoch 0."
        if (given is None) != (expected is None) or (given is not None and number(given) != expected):
            return f"for {backups} it returns {given!r}. But {hint}"
    return None


CHECKS = {"15.1": _traffic, "15.2": _outer_step, "15.3": _smallest_k, "15.4": _epoch_to_resume}
