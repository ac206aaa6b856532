"""Exercises of chapter 14: right answers are right, wrong ones get a hint that helps, and nothing raises."""

from typing import Any

import numpy as np
import pytest
import tensorflow as tf

from companion import merging
from companion.exercises import chapter_14
from tests.exercises.judge import judged

# ---- 1 --------------------------------------------------------------------------------------------------------------


def _merged(gradients: Any, masks: Any) -> Any:
    weights = [mask.sum() for mask in masks]
    parts = [w * g for w, g in zip(weights, gradients, strict=True) if w]
    return sum(parts) / sum(weights)


def _merged_without_nan(gradients: Any, masks: Any) -> Any:
    return np.average(np.nan_to_num(gradients), axis=0, weights=[mask.sum() for mask in masks])


def _weighed(weigh: Any, divide: Any = None) -> Any:
    def answer(gradients: Any, masks: Any) -> Any:
        weights = np.array([weigh(mask) for mask in masks], "float64")
        total = weights.sum() if divide is None else divide(masks)
        return weights @ np.array(gradients) / total

    return answer


def _counts_the_empty_one(gradients: Any, masks: Any) -> Any:
    weights = [max(mask.sum(), 1) for mask in masks]
    return np.average(np.nan_to_num(gradients), axis=0, weights=weights)


# ---- 2 --------------------------------------------------------------------------------------------------------------


def _worth(counts: Any) -> float:
    return len(counts) ** 2 / float(np.sum(1 / np.array(counts)))


def _reciprocal(counts: Any) -> float:
    return float(np.sum(1 / np.array(counts)))


# ---- 3 --------------------------------------------------------------------------------------------------------------


def _distances(gradients: Any, middle: Any) -> Any:
    return sum(np.sum((g - m) ** 2, axis=tuple(range(1, g.ndim))) for g, m in zip(gradients, middle, strict=True))


def _leaves(row: Any, weigh: bool = True) -> Any:
    """A rule that leaves out the device that ``row`` finds, in NumPy."""

    def rule(gradients: Any, weights: Any) -> Any:
        gradients, weights = [g.numpy() for g in gradients], weights.numpy()
        stays = np.arange(len(weights)) != row(gradients)
        weights = weights if weigh else np.ones(len(weights))
        return [np.average(g[stays], axis=0, weights=weights[stays]) for g in gradients]

    return rule


def _furthest(gradients: Any) -> Any:
    middle = [np.median(np.where(np.isnan(g), np.inf, g), axis=0) for g in gradients]
    return _distances(gradients, middle).argmax()  # to NumPy, NaN is the largest of all


def _nearest(gradients: Any) -> Any:
    return _distances(gradients, [np.median(g, axis=0) for g in gradients]).argmin()


def _furthest_in_one(gradients: Any) -> Any:
    rows = [np.abs(g - np.median(g, axis=0)).reshape(5, -1).max(1) for g in gradients]
    return np.max(rows, axis=0).argmax()


def _in_tensorflow(largest: float, count: Any = tf.size) -> Any:
    """A rule that takes a distance of NaN for ``largest``, and counts the devices with ``count``."""

    def rule(gradients: Any, weights: Any) -> Any:
        middle = merging.median(gradients, weights)
        squares = [tf.reshape((g - m) ** 2, (count(weights), -1)) for g, m in zip(gradients, middle, strict=True)]
        distances = tf.reduce_sum(tf.concat(squares, 1), 1)
        distances = tf.where(tf.math.is_nan(distances), tf.cast(largest, distances.dtype), distances)
        stays = tf.range(5) != tf.argmax(distances, output_type="int32")
        return merging.weighted_mean([tf.boolean_mask(g, stays) for g in gradients], tf.boolean_mask(weights, stays))

    return rule


def _weighs_with_zero(gradients: Any, weights: Any) -> Any:
    middle = merging.median(gradients, weights)
    squares = [tf.reshape((g - m) ** 2, (len(weights), -1)) for g, m in zip(gradients, middle, strict=True)]
    distances = tf.reduce_sum(tf.concat(squares, 1), 1)
    furthest = tf.argmax(tf.where(tf.math.is_nan(distances), distances.dtype.max, distances))
    return merging.weighted_mean(gradients, weights * (1 - tf.one_hot(furthest, len(weights), dtype=weights.dtype)))


def _furthest_by_lengths(gradients: Any) -> Any:
    return sum(np.sqrt(_distances([g], [np.median(g, axis=0)])) for g in gradients).argmax()


def _furthest_from_the_mean(gradients: Any) -> Any:
    weights = chapter_14._answers()[1]
    return _distances(gradients, [np.average(g, axis=0, weights=weights) for g in gradients]).argmax()


def _by_variable(gradients: Any, weights: Any) -> Any:
    return [_leaves(_furthest)([g], weights)[0] for g in gradients]


def _keeps_the_weight(gradients: Any, weights: Any) -> Any:
    gradients = [g.numpy() for g in gradients]
    stays = np.arange(5) != _furthest(gradients)
    return [np.tensordot(weights.numpy() * stays, g, 1) / weights.numpy().sum() for g in gradients]


# ---- 4 --------------------------------------------------------------------------------------------------------------

CHANGES = {"A": {"mean", "median"}, "B": {"mean", "median", "vote"}, "C": {"mean", "median"}, "D": {"mean", "median"}}

RIGHT: list[tuple[str, Any]] = [
    ("14.1", _merged),
    ("14.1", _merged_without_nan),
    ("14.2", _worth),
    ("14.2", lambda counts: len(counts) / np.mean([1 / n for n in counts])),
    ("14.3", _in_tensorflow(np.inf)),
    ("14.4", CHANGES),
    ("14.4", {key: sorted(value) for key, value in CHANGES.items()}),
]

WRONG: list[tuple[str, Any, str]] = [
    ("14.1", None, "function"),
    ("14.1", lambda gradients: 0, "function"),
    ("14.1", lambda gradients, masks: None, "None"),
    ("14.1", lambda gradients, masks: 1.0, "shape"),
    ("14.1", lambda gradients, masks: "g", "ValueError"),
    ("14.1", lambda gradients, masks: np.mean(gradients, axis=0), "mean of means"),
    ("14.1", lambda gradients, masks: np.sum(gradients, axis=0), "sum of the means"),
    ("14.1", _weighed(np.sum, lambda masks: 1), "their total"),
    ("14.1", _weighed(np.sum, len), "not by the number of devices"),
    ("14.1", _weighed(np.size), "masked positions"),
    ("14.1", _weighed(len), "sentences"),
    ("14.1", _weighed(lambda mask: 1 / mask.sum()), "not less"),
    ("14.1", lambda gradients, masks: gradients[0], "divide once"),
    ("14.1", _weighed(np.sum), "0 · NaN"),
    ("14.1", _counts_the_empty_one, "of the others"),
    ("14.2", None, "function"),
    ("14.2", lambda counts: None, "one number"),
    ("14.2", lambda counts: counts, "one number"),
    ("14.2", sum, "all samples"),
    ("14.2", lambda counts: _worth(counts) / sum(counts), "Multiply it"),
    ("14.2", lambda counts: len(counts) / _reciprocal(counts), "not over R"),
    ("14.2", lambda counts: 1 / _reciprocal(counts), "left R out"),
    ("14.2", lambda counts: 1 / _worth(counts), "reciprocal"),
    ("14.2", lambda counts: len(counts) * min(counts), "smallest share"),
    ("14.2", lambda counts: sum(counts) ** 2 / sum(n * n for n in counts), "same weight"),
    ("14.2", lambda counts: 4 * counts[0] * counts[-1] / (counts[0] + counts[-1]), "right for two devices"),
    ("14.2", lambda counts: 7.0, "48/7"),
    ("14.2", lambda counts: 4 * counts[0] * counts[1] / sum(counts), "for the counts [20] it raises IndexError"),
    ("14.3", None, "function"),
    ("14.3", lambda gradients: gradients, "function"),
    ("14.3", lambda gradients, weights: None, "list"),
    ("14.3", lambda gradients, weights: gradients, "shapes"),
    ("14.3", _in_tensorflow(0.0), "NaN"),
    ("14.3", merging.weighted_mean, "nobody"),
    ("14.3", _leaves(_furthest, weigh=False), "by their weights"),
    ("14.3", _keeps_the_weight, "still divides"),
    ("14.3", _leaves(_furthest), "right when called directly"),
    ("14.3", _in_tensorflow(np.inf, count=len), "right when called directly"),
    ("14.3", _weighs_with_zero, "do not weigh it with 0"),
    ("14.3", _leaves(_furthest_by_lengths), "squares, not lengths"),
    ("14.3", _leaves(_furthest_from_the_mean), "not from a mean"),
    ("14.3", _leaves(_furthest_in_one), "one coordinate"),
    ("14.3", _by_variable, "over all variables"),
    ("14.3", merging.median, "median itself"),
    ("14.3", lambda gradients, weights: [g[2] for g in gradients], "only the furthest"),
    ("14.3", _leaves(_nearest), "largest"),
    ("14.3", merging.sum, "everywhere"),
    ("14.4", None, "dictionary"),
    ("14.4", {"A": {"mean"}}, "dictionary"),
    ("14.4", {**CHANGES, "A": "mean"}, "set"),
    ("14.4", {**CHANGES, "A": {"sum"}}, "may hold"),
    ("14.4", {**CHANGES, "A": {"mean"}}, "in the middle"),
    ("14.4", {**CHANGES, "A": {"mean", "median", "vote"}}, "which sign"),
    ("14.4", {**CHANGES, "B": {"mean", "median"}}, "three against two"),
    ("14.4", {**CHANGES, "C": {"median"}}, "So is their mean"),
    ("14.4", {**CHANGES, "D": {"mean"}}, "0.001"),
    ("14.4", {**CHANGES, "D": {"mean", "median", "vote"}}, "sign of a sign"),
]


test_right_answers, test_wrong_answers_get_a_hint = judged(RIGHT, WRONG)


# ---- what the checks rest on ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("event", CHANGES)
def test_whose_step_can_change(event: str) -> None:
    """Tried out on 1,000 coordinates, each event by each device."""
    rules = {"mean": np.mean, "median": np.median, "vote": lambda rows, axis: np.sign(np.sign(rows).sum(axis))}
    rows, changed = np.random.default_rng(0).normal(size=(5, 1000)), set()
    for device in range(5):
        sent = rows.copy()
        if event == "C":
            sent *= 10
        else:
            sent[device] = {"A": 10 * rows, "B": -rows, "D": np.sign(rows)}[event][device]
        changed |= {name for name, rule in rules.items() if (rule(sent, axis=0) != rule(rows, axis=0)).any()}
    assert changed == CHANGES[event]


def test_who_is_furthest() -> None:
    """Over all variables the third device, in one coordinate the fifth, else the second: the mistakes differ."""
    gradients, _ = chapter_14._answers()
    assert _furthest(gradients) == 2
    assert _furthest_in_one(gradients) == 4
    assert _furthest_by_lengths(gradients) == _furthest_from_the_mean(gradients) == 1


def test_noise_of_shares() -> None:
    counts = [5, 2, 1]
    samples = np.random.default_rng(0).normal(size=(200_000, 8))
    means = [samples[:, :5].mean(1), samples[:, 5:7].mean(1), samples[:, 7]]
    assert 1 / np.mean(means, axis=0).var() == pytest.approx(_worth(counts), rel=0.02)
