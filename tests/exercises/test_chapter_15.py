"""Exercises of chapter 15: right answers are right, wrong ones get a hint that helps, and nothing raises."""

import math
from typing import Any

import keras
import numpy as np
import pytest

import companion
from companion.exercises import chapter_15
from tests.exercises.judge import judged

# ---- 1 --------------------------------------------------------------------------------------------------------------


def _traffic(steps: int, every: int, warmup: int, weights: int) -> tuple[int, int]:
    early = min(steps, warmup)
    exchanges = early + -(-(steps - early) // every)
    return exchanges, exchanges * 4 * weights


def _by_walking(steps: int, every: int, warmup: int, weights: int) -> Any:
    last = found = 0
    for step in range(1, steps + 1):
        if step <= warmup or (step - warmup) % every == 0:
            last, found = step, found + 1
    found += last < steps
    return [np.int64(found), 4.0 * weights * found]


def _exchanges(count: Any, size: Any = lambda exchanges, weights: 4 * exchanges * weights) -> Any:
    """An answer with another number of exchanges, or of bytes."""

    def traffic(steps: int, every: int, warmup: int, weights: int) -> tuple[float, float]:
        exchanges = count(steps, every, warmup)
        return exchanges, size(exchanges, weights)

    return traffic


def _right(steps: int, every: int, warmup: int) -> int:
    return _traffic(steps, every, warmup, 1)[0]


# ---- 2 --------------------------------------------------------------------------------------------------------------


def _outer_step(anchor: Any, workers: Any, velocity: Any, rate: float, momentum: float) -> Any:
    delta = anchor - workers.mean(axis=0)
    velocity = momentum * velocity - rate * delta
    return anchor + momentum * velocity - rate * delta, velocity


def _in_keras(anchor: Any, workers: Any, velocity: Any, rate: float, momentum: float) -> Any:
    variable, optimizer = keras.Variable(anchor, dtype="float64"), keras.optimizers.SGD(rate, momentum, True)
    optimizer.build([variable])
    optimizer.momentums[0].assign(velocity)
    optimizer.apply([anchor - workers.mean(axis=0)], [variable])
    return variable.numpy(), optimizer.momentums[0].numpy()


def _outer(weights: Any, velocity: Any = None) -> Any:
    """An answer made of Δ, v and the rest."""

    def outer_step(anchor: Any, workers: Any, old: Any, rate: float, momentum: float) -> Any:
        delta = anchor - workers.mean(axis=0)
        new = momentum * old - rate * delta
        named = {"a": anchor, "w": workers, "d": delta, "old": old, "v": new, "r": rate, "m": momentum}
        return weights(**named), new if velocity is None else velocity(**named)

    return outer_step


# ---- 3 --------------------------------------------------------------------------------------------------------------


def _seconds(workers: int, size: float, latency: float, bandwidth: float) -> float:
    return 2 * (workers - 1) * (latency + size / workers / bandwidth)


def _k(rule: Any = lambda x: max(1, math.ceil(x)), seconds: Any = _seconds) -> Any:
    return lambda workers, size, latency, bandwidth, step, share: rule(
        seconds(workers, size, latency, bandwidth) / (step * share)
    )


def _by_search(workers: int, size: float, latency: float, bandwidth: float, step: float, share: float) -> int:
    k = 1
    while _seconds(workers, size, latency, bandwidth) / k > share * step:
        k += 1
    return k


# ---- 4 --------------------------------------------------------------------------------------------------------------


def _epoch_to_resume(backups: list[list[int]]) -> int | None:
    newest = [max(epochs, default=0) for epochs in backups]
    least = min(newest)
    if max(newest) > least + 1 or (least and any(least not in epochs for epochs in backups)):
        return None
    return least


def _common(backups: list[list[int]]) -> int | None:
    """By the epochs that all hold."""
    held = [{0, *epochs} if epochs in ([], [1]) else set(epochs) for epochs in backups]
    return max(set.intersection(*held), default=None)


RIGHT = [
    ("15.1", _traffic),
    ("15.1", _by_walking),
    ("15.2", _outer_step),
    ("15.2", _in_keras),
    ("15.3", _k()),
    ("15.3", _by_search),
    ("15.4", _epoch_to_resume),
    ("15.4", _common),
]

WRONG: list[tuple[str, Any, str]] = [
    ("15.1", None, "function"),
    ("15.1", lambda steps: steps, "function"),
    ("15.1", lambda *given: ..., "nothing yet"),
    ("15.1", lambda *given: None, "nothing yet"),
    ("15.1", lambda *given: 7, "two numbers"),
    ("15.1", lambda *given: (1, "many"), "numbers"),
    ("15.1", _exchanges(lambda s, k, w: min(s, w) + max(0, s - w) // k), "last step is missing"),
    ("15.1", _exchanges(lambda s, k, w: min(s, w) + max(0, s - w) // k + 1), "only if the last step"),
    ("15.1", _exchanges(lambda s, k, w: math.ceil(s / k)), "forgets the warm-up"),
    (
        "15.1",
        _exchanges(lambda s, k, w: sum(i <= w or i % k == 0 or i == s for i in range(1, s + 1))),
        "one counts anew",
    ),
    ("15.1", _exchanges(lambda s, k, w: w + math.ceil(max(0, s - w) / k)), "longer than the whole run"),
    ("15.1", _exchanges(lambda s, k, w: s / k), "one event"),
    ("15.1", _exchanges(lambda s, k, w: s), "steps=100, every=5, warmup=0 there are 20 exchanges, not 100"),
    ("15.1", lambda *given: _traffic(*given)[::-1], "exchanges first"),
    ("15.1", _exchanges(_right, lambda e, n: e * n), "four bytes"),
    ("15.1", _exchanges(_right, lambda e, n: 8 * e * n), "gives"),
    ("15.1", _exchanges(_right, lambda e, n: 4 * n), "those of one exchange"),
    ("15.1", _exchanges(_right, lambda e, n: 0), "the bytes are not"),
    ("15.2", None, "function"),
    ("15.2", lambda anchor: anchor, "function"),
    ("15.2", lambda *given: ..., "nothing yet"),
    ("15.2", lambda *given: given[0], "two arrays"),
    ("15.2", lambda *given: (given[1], given[2]), "shape"),
    ("15.2", lambda *given: _outer_step(*given)[::-1], "other order"),
    ("15.2", lambda *given: (_outer_step(*given)[0], given[2]), "velocity to return"),
    ("15.2", _outer(lambda a, d, r, m, old, **_: a + m * (m * old + r * d) + r * d), "sign"),
    ("15.2", _outer(lambda a, v, **_: a + v), "plain momentum"),
    ("15.2", _outer(lambda a, d, **_: a - d), "plain average"),
    ("15.2", _outer(lambda a, d, r, **_: a - r * d), "without momentum"),
    ("15.2", _outer(lambda a, d, r, m, old, **_: a + m * old - r * d, lambda v, **_: v), "plain momentum"),
    ("15.2", _outer(lambda a, d, r, m, v, **_: a - d + m * v - r * d), "begins at the anchor"),
    (
        "15.2",
        _outer(lambda a, w, r, m, old, **_: a + m * (m * old - r * (a - w).sum(0)) - r * (a - w).sum(0)),
        "not added up",
    ),
    ("15.2", _outer(lambda a, **_: 0 * a), "first Δ"),
    ("15.3", None, "function"),
    ("15.3", lambda workers: workers, "function"),
    ("15.3", lambda *given: ..., "nothing yet"),
    ("15.3", lambda *given: "many", "a number"),
    ("15.3", _k(lambda x: x), "round up"),
    ("15.3", _k(seconds=lambda workers, size, *network: _seconds(workers, 4 * size, *network)), "bytes already"),
    ("15.3", _k(math.ceil), "no less than 1"),
    ("15.3", _k(lambda x: max(1, math.floor(x))), "round up"),
    ("15.3", _k(lambda x: max(1, round(x))), "nearest"),
    ("15.3", lambda w, n, a, b, step, share: max(1, math.ceil(_seconds(w, n, a, b) / step)), "a share of it"),
    ("15.3", _k(seconds=lambda w, n, a, b: _seconds(w, n, a, b) / 2), "2(R − 1) turns"),
    ("15.3", _k(seconds=lambda w, n, a, b: 2 * (w - 1) * (a + n / b)), "one piece"),
    ("15.3", _k(seconds=lambda w, n, a, b: 2 * (w - 1) * n / w / b), "leaves out the latency"),
    ("15.3", _k(seconds=lambda w, n, a, b: a + 2 * (w - 1) * n / w / b), "has its latency"),
    ("15.3", _k(lambda x: 7), "is 65"),
    ("15.4", None, "function"),
    ("15.4", lambda: 0, "function"),
    ("15.4", lambda backups: ..., "nothing yet"),
    ("15.4", lambda backups: max(map(max, backups)), "for [[], []] it raises ValueError"),
    ("15.4", lambda backups: max(max(epochs, default=0) for epochs in backups), "not the newest"),
    ("15.4", lambda backups: max(backups[-1], default=0), "need not be worker 1"),
    ("15.4", lambda backups: max(backups[0], default=0), "not the newest"),
    ("15.4", lambda backups: min(min(epochs, default=0) for epochs in backups), "nobody has deleted"),
    ("15.4", lambda backups: min(max(epochs, default=0) for epochs in backups), "two epochs ahead"),
    ("15.4", lambda backups: min(epochs[-1] if epochs else 0 for epochs in backups), "two epochs ahead"),
    ("15.4", lambda backups: max(set.intersection(*map(set, backups)), default=None), "that is the beginning"),
    ("15.4", lambda backups: max(set.intersection(*({0, *epochs} for epochs in backups))), "two epochs ahead"),
]


test_right_answers, test_wrong_answers_get_a_hint = judged(RIGHT, WRONG)


# ---- what the checks rest on ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("schedule", chapter_15._SCHEDULES)
def test_exchanges_are_those_of_the_callback(schedule: tuple[int, int, int]) -> None:
    steps, every, warmup = schedule
    local = companion.LocalSGD(every, warmup=warmup)
    model = keras.Sequential([keras.Input((1,)), keras.layers.Dense(2)])
    model.compile("sgd", "mse")
    model.fit(np.ones((steps, 1)), np.ones((steps, 2)), batch_size=1, verbose=0, callbacks=[local])
    assert (local.exchanges, local.bytes) == _traffic(*schedule, 4)


def test_where_to_go_on_is_what_a_run_can_leave() -> None:
    """All moments at which a run of two workers can be cut off, by its rules: write, wait for all, delete."""
    seen, open_states = set(), [((), (), "write", "write", 1, 1)]
    while open_states:
        state = open_states.pop()
        if state in seen:
            continue
        seen.add(state)
        for rank in (0, 1):
            held, does, epoch = [list(state[:2]), list(state[2:4]), list(state[4:])]
            other = 1 - rank
            if does[rank] == "write" and epoch[rank] <= 4:
                held[rank], does[rank] = (*held[rank], epoch[rank]), "wait"
            elif does[rank] == "wait" and (epoch[other] > epoch[rank] or epoch[rank] in held[other]):
                does[rank] = "delete"
            elif does[rank] == "delete":
                held[rank], does[rank], epoch[rank] = (epoch[rank],), "write", epoch[rank] + 1
            else:
                continue
            open_states.append((*held, *does, *epoch))
    possible = {state[:2] for state in seen}
    assert all(_epoch_to_resume([list(held) for held in state]) is not None for state in possible)
    for backups, expected, _ in chapter_15._BACKUPS:
        if len(backups) == 2 and max(map(max, ([0, *epochs] for epochs in backups))) <= 4:
            assert (tuple(map(tuple, map(sorted, backups))) in possible) == (expected is not None), backups
