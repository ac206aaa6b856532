"""Exercises of chapter 04: right answers are right, wrong ones get a hint that helps, and nothing raises."""

from typing import Any

import numpy as np

from tests.exercises.judge import judged


def _error(u: Any, v: Any, w: Any) -> Any:
    return w * (1 / (1 + np.exp(-v @ u)) - np.eye(len(v))[0])


def _sigma(u: Any, v: Any) -> Any:
    return 1 / (1 + np.exp(-v @ u))


def _by_share(counts: Any, neighbour: int, size: int, random: Any, power: float = 0.75, zero: bool = True) -> Any:
    share = counts**power
    if zero:
        share[neighbour] = 0
    return random.choice(len(counts), size, p=share / share.sum())


def _by_drawing_again(counts: Any, neighbour: int, size: int, random: Any) -> Any:
    share = counts**0.75
    ids = random.choice(len(counts), size, p=share / share.sum())
    while (ids == neighbour).any():
        ids[ids == neighbour] = random.choice(len(counts), (ids == neighbour).sum(), p=share / share.sum())
    return ids


def _next_word(counts: Any, neighbour: int, size: int, random: Any) -> Any:
    ids = _by_share(counts, neighbour, size, random, zero=False)
    ids[ids == neighbour] += 1
    return ids % len(counts)


def _one_word(counts: Any, neighbour: int, size: int, random: Any) -> Any:
    return np.zeros(size, int)


def _a_little_uniform(counts: Any, neighbour: int, size: int, random: Any) -> Any:
    ids = _by_share(counts, neighbour, size, random)
    ids[: size // 3] = 5
    return ids


def _spoils_counts(counts: Any, neighbour: int, size: int, random: Any) -> Any:
    counts[neighbour] = 0
    return _by_share(counts, neighbour, size, random)


def _one_by_one(table: Any, ids: Any, rows: Any, rate: float) -> None:
    for number, row in zip(ids, rows, strict=True):
        table[number] -= rate * row


def _last_wins(table: Any, ids: Any, rows: Any, rate: float) -> None:
    table[ids] -= rate * rows


def _averages(table: Any, ids: Any, rows: Any, rate: float) -> None:
    for number in set(ids):
        table[number] -= rate * rows[ids == number].mean(axis=0)


def _upwards(table: Any, ids: Any, rows: Any, rate: float) -> None:
    np.add.at(table, ids, rate * rows)


def _spoils_rows(table: Any, ids: Any, rows: Any, rate: float) -> None:
    rows *= rate
    np.subtract.at(table, ids, rows)


def _everywhere(table: Any, ids: Any, rows: Any, rate: float) -> None:
    table -= rate * rows.sum(axis=0)


RIGHT = [
    ("04.1", lambda u, v, w: np.outer(_error(u, v, w), u)),
    ("04.1", lambda u, v, w: [list(e * u) for e in _error(u, v, w)]),
    ("04.2", _by_share),
    ("04.2", _by_drawing_again),
    ("04.3", lambda table, ids, rows, rate: np.subtract.at(table, ids, rate * rows)),
    ("04.3", _one_by_one),
]
WRONG = [
    *((number, answer, "give the function") for number in ("04.1", "04.2", "04.3") for answer in (None, "x", 3, len)),
    *((number, ..., "not answered yet") for number in ("04.1", "04.2", "04.3")),
    ("04.1", lambda u, v, w: None, "returns None"),
    ("04.1", lambda u, v, w: _error(u, v, w) @ v, "nothing is summed"),
    ("04.1", lambda u, v, w: np.outer(u, _error(u, v, w)), "shape (5, 3)"),
    ("04.1", lambda u, v, w: np.outer(_error(u, v, 1), u), "A weight is a factor"),
    ("04.1", lambda u, v, w: -np.outer(_error(u, v, w), u), "sign is turned"),
    ("04.1", lambda u, v, w: np.outer(w * _sigma(u, v), u), "its label is 1"),
    ("04.1", lambda u, v, w: np.outer(_sigma(u, v) - w * np.eye(5)[0], u), "the whole of"),
    ("04.1", lambda u, v, w: np.outer(w * _sigma(u, v) - np.eye(5)[0], u), "multiplies the label too"),
    ("04.1", lambda u, v, w: _error(u, v, w)[:, None] * v, "the vector is not"),
    ("04.1", lambda u, v, w: np.outer(w * (_sigma(u, v) + np.eye(5)[0]), u), "the neighbour's is not"),
    ("04.1", lambda u, v, w: np.zeros((5, 3)), "not the slopes"),
    ("04.1", lambda u, v, w: 1 / 0, "ZeroDivisionError"),
    ("04.2", lambda *_: None, "returns None"),
    ("04.2", lambda *_: 3, "of the shape ()"),
    ("04.2", lambda counts, neighbour, size, random: random.random(size), "an id is an integer"),
    ("04.2", lambda counts, neighbour, size, random: np.full(size, 6), "an id is an integer"),
    ("04.2", lambda *given: _by_share(*given, zero=False), "still among"),
    ("04.2", lambda *given: _by_share(*given, power=1), "Where is the power"),
    ("04.2", lambda *given: _by_share(*given, power=0), "equally often"),
    ("04.2", lambda *given: _by_share(*given, power=0.3), "to the power of 0.3"),
    ("04.2", _one_word, "with a share of"),
    ("04.2", _a_little_uniform, "with a share of"),
    ("04.2", _next_word, "the word after the neighbour"),
    ("04.2", _spoils_counts, "changes `counts`"),
    ("04.3", lambda table, ids, rows, rate: None, "has not moved"),
    ("04.3", _last_wins, "every row must count"),
    ("04.3", _averages, "not their mean"),
    ("04.3", _upwards, "against the gradient"),
    ("04.3", _spoils_rows, "changes `rows`"),
    ("04.3", _everywhere, "not in `ids`"),
    ("04.3", lambda table, ids, rows, rate: np.subtract.at(table, ids, rows), "by the learning rate"),
]


test_right_answers, test_wrong_answers_get_a_hint = judged(RIGHT, WRONG)
