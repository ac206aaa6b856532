"""Exercises of chapter 06: right answers are right, wrong ones get a hint that helps, and nothing raises."""

from collections.abc import Callable
from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf

from companion.exercises.chapter_06 import gaps_of_faults
from tests.exercises.judge import judged

# ---- 1 --------------------------------------------------------------------------------------------------------------


def _merge(gradients: list[Any], weights: list[float]) -> list[Any]:
    counted = [(g, w) for g, w in zip(gradients, weights, strict=True) if w > 0]
    total = sum(w for _, w in counted)
    return [sum(w * g[k] for g, w in counted) / total for k in range(len(gradients[0]))]


def _merge_tensors(gradients: list[Any], weights: list[float]) -> list[Any]:
    counted = tf.constant(weights, "float64")
    parts = [tf.stack([g[k] for g in gradients]) for k in range(len(gradients[0]))]
    return [tf.tensordot(counted, tf.math.multiply_no_nan(p, _like(counted, p)), 1) / sum(weights) for p in parts]


def _like(counted: Any, parts: Any) -> Any:
    shape = [-1] + [1] * (len(parts.shape) - 1)
    return tf.ones_like(parts) * tf.reshape(tf.cast(counted > 0, "float64"), shape)


def _by_variable(combine: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
    """A merge made from a function of one variable's gradients, stacked by part, and the weights."""

    def merge(gradients: Any, weights: Any) -> Any:
        stacked = (np.stack(arrays) for arrays in zip(*gradients, strict=True))
        return [combine(parts, np.reshape(weights, [-1] + [1] * (parts.ndim - 1))) for parts in stacked]

    return merge


_mean_of_means = _by_variable(lambda g, w: g.mean(axis=0))
_sum = _by_variable(lambda g, w: g.sum(axis=0))
_not_divided = _by_variable(lambda g, w: (w * g).sum(axis=0))
_wrongly_divided = _by_variable(lambda g, w: (w * g).mean(axis=0))
_inverse = _by_variable(lambda g, w: (g / w).sum(axis=0) / (1 / w).sum())
_keeps_nan = _by_variable(lambda g, w: (w * g).sum(axis=0) / w.sum())
_nearly = _by_variable(lambda g, w: (w * g).sum(axis=0) / w.sum() * 1.0001)
_max = _by_variable(lambda g, w: g.max(axis=0))
_zero_counts = _by_variable(lambda g, w: (w * np.nan_to_num(g)).sum(axis=0) / w[w != 0].mean() / len(w))


def _by_part(gradients: Any, weights: Any) -> Any:
    return [g[0] for g in gradients]


def _flattened(gradients: Any, weights: Any) -> Any:
    return [np.ravel(array) for array in _merge(gradients, weights)]


# ---- 2 --------------------------------------------------------------------------------------------------------------


class _Accumulate:
    def __init__(self, optimizer: Any, steps: int) -> None:
        self.optimizer, self.steps = optimizer, steps
        self.start()

    def start(self) -> None:
        self.calls, self.total = 0, None

    def add(self, gradients: Any) -> None:
        self.calls += 1
        self.total = [g + t for g, t in zip(gradients, self.total or [0.0] * len(gradients), strict=True)]

    def mean(self) -> list[Any]:
        return [t / self.steps for t in self.total or []]

    def apply(self, gradients: Any, variables: Any) -> None:
        self.add(gradients)
        if self.calls == self.steps:
            self.optimizer.apply(self.mean(), variables)
            self.start()


class _ZerosBetween(_Accumulate):
    def apply(self, gradients: Any, variables: Any) -> None:
        self.add(gradients)
        is_full = self.calls == self.steps
        self.optimizer.apply(self.mean() if is_full else [0 * t for t in self.mean()], variables)
        if is_full:
            self.start()


class _NeverReset(_Accumulate):
    def apply(self, gradients: Any, variables: Any) -> None:
        self.add(gradients)
        if self.calls % self.steps == 0:
            self.optimizer.apply(self.mean(), variables)


class _Draft(_Accumulate):
    def apply(self, gradients: Any, variables: Any) -> None:
        self.add(gradients)
        is_full = self.calls % self.steps == 0
        self.optimizer.apply(self.mean() if is_full else [0 * t for t in self.mean()], variables)


class _Sum(_Accumulate):
    def mean(self) -> list[Any]:
        return list(self.total or [])


class _LastMissing(_Accumulate):
    def apply(self, gradients: Any, variables: Any) -> None:
        if self.calls == self.steps - 1:
            self.optimizer.apply(self.mean(), variables)
            self.start()
            return
        self.add(gradients)


class _LastLate(_Accumulate):
    def apply(self, gradients: Any, variables: Any) -> None:
        if self.calls and (self.calls + 1) % self.steps == 0:
            self.optimizer.apply(self.mean(), variables)
            self.total = None
        self.add(gradients)


class _Never(_Accumulate):
    def apply(self, gradients: Any, variables: Any) -> None:
        self.add(gradients)


class _Early(_Accumulate):
    def apply(self, gradients: Any, variables: Any) -> None:
        self.add(gradients)
        if self.calls == 2:
            self.optimizer.apply(self.mean(), variables)
            self.start()


class _Negative(_Accumulate):
    def mean(self) -> list[Any]:
        return [-t / self.steps for t in self.total or []]


class _FirstOnly(_Accumulate):
    """Forgets every variable but the first."""

    def mean(self) -> list[Any]:
        first, *others = super().mean()
        return [first, *(0 * other for other in others)]


class _Stacked(_Accumulate):
    """Right for variables of one shape only."""

    def add(self, gradients: Any) -> None:
        super().add(np.array(gradients))


class _NoApply:
    def __init__(self, optimizer: Any, steps: int) -> None:
        pass


class _OtherSignature(_Accumulate):
    def apply(self, gradients: Any) -> None:  # type: ignore[override]
        pass


RIGHT: list[tuple[str, Any]] = [
    ("06.1", _merge),
    ("06.1", _merge_tensors),
    ("06.2", _Accumulate),
    ("06.3", {"A": "examples", "B": "examples", "C": "sample weights", "D": "tokens", "E": "nothing"}),
    ("06.4", {"A": "never reset", "B": "mean of means", "C": "a window late", "D": "zeros between"}),
]

DENOMINATORS, FAULTS = dict(RIGHT[3][1]), dict(RIGHT[4][1])

WRONG: list[tuple[str, Any, str]] = [
    ("06.1", None, "function"),
    ("06.1", "merge", "function"),
    ("06.1", [1.0, 2.0], "function"),
    ("06.1", lambda gradients: gradients, "function"),
    ("06.1", lambda gradients, weights: None, "None"),
    ("06.1", lambda gradients, weights: 3.0, "TypeError"),
    ("06.1", lambda gradients, weights: [], "shapes"),
    ("06.1", _by_part, "zip"),
    ("06.1", _flattened, "shapes"),
    ("06.1", _mean_of_means, "mean of the means"),
    ("06.1", _sum, "that is the sum"),
    ("06.1", _not_divided, "not yet divided"),
    ("06.1", _wrongly_divided, "number of parts"),
    ("06.1", _inverse, "multiplied"),
    ("06.1", _nearly, "last digits"),
    ("06.1", _max, "A = Σ"),
    ("06.1", _keeps_nan, "NaN"),
    ("06.1", _zero_counts, "Where one has weight 0"),
    ("06.2", None, "class"),
    ("06.2", "Accumulate", "class"),
    ("06.2", _merge, "class"),
    ("06.2", _Accumulate(None, 3), "class"),
    ("06.2", _NoApply, "apply"),
    ("06.2", dict, "made from"),
    ("06.2", _OtherSignature, "TypeError"),
    ("06.2", _Draft, "step like any other"),
    ("06.2", _ZerosBetween, "step like any other"),
    ("06.2", _NeverReset, "Empty it"),
    ("06.2", _Sum, "must be their mean"),
    ("06.2", _LastMissing, "last part"),
    ("06.2", _LastLate, "last part"),
    ("06.2", _Never, "never called"),
    ("06.2", _Early, "once in each"),
    ("06.2", _Negative, "it received -3"),
    ("06.2", _FirstOnly, "Adam"),
    ("06.2", _Stacked, "inhomogeneous"),
    ("06.3", None, "dictionary"),
    ("06.3", "examples", "dictionary"),
    ("06.3", {"A": "examples"}, "dictionary"),
    ("06.3", {**DENOMINATORS, "A": "batch"}, "each value"),
    ("06.3", {**DENOMINATORS, "A": []}, "each value"),
    ("06.3", {**DENOMINATORS, "A": "nothing"}, "A is not"),
    ("06.3", {**DENOMINATORS, "B": "sample weights"}, "sum_over_batch_size"),
    ("06.3", {**DENOMINATORS, "C": "examples"}, "reduction's name"),
    ("06.3", {**DENOMINATORS, "D": "examples"}, "padding"),
    ("06.3", {**DENOMINATORS, "E": "examples"}, "no denominator"),
    ("06.4", None, "dictionary"),
    ("06.4", 4, "dictionary"),
    ("06.4", {**FAULTS, "E": "never reset"}, "dictionary"),
    ("06.4", {**FAULTS, "A": "reset"}, "each value"),
    ("06.4", {**FAULTS, "A": "zeros between", "D": "never reset"}, "not notice"),
    ("06.4", {**FAULTS, "B": "zeros between", "D": "mean of means"}, "B does not"),
    ("06.4", {**FAULTS, "C": "never reset", "A": "a window late"}, "has not moved"),
    ("06.4", {**FAULTS, "C": "mean of means"}, "parts are equal"),
]


test_right_answers, test_wrong_answers_get_a_hint = judged(RIGHT, WRONG)


# ---- what the checks rest on ----------------------------------------------------------------------------------------


def _gradient(model: keras.Model, loss: keras.losses.Loss, x: Any, y: Any, weight: Any) -> np.ndarray:
    with tf.GradientTape() as tape:
        value = loss(y, model(x), sample_weight=weight)
    gradients = tape.gradient(value, model.trainable_variables)
    return np.concatenate([np.ravel(tf.convert_to_tensor(gradient)) for gradient in gradients])


@pytest.mark.parametrize("name", DENOMINATORS)
def test_denominators_are_those_of_keras(name: str) -> None:
    """Of the four ways to merge two ragged parts, exactly the named one gives the gradient of the whole."""
    random = np.random.default_rng(0)
    regression = keras.Sequential([keras.Input((3,)), keras.layers.Dense(5, dtype="float64")])
    embedding = keras.layers.Embedding(9, 4, mask_zero=True, dtype="float64")
    tagging = keras.Sequential([keras.Input((6,)), embedding, keras.layers.Dense(3, dtype="float64")])
    tokens = random.integers(1, 9, (7, 6)) * (np.arange(6) < np.array([6, 5, 6, 4, 1, 2, 3])[:, None])
    sample_weight = random.uniform(1, 3, 7)

    losses = keras.losses
    loss = {
        "A": losses.MeanSquaredError(dtype="float64"),
        "B": losses.MeanSquaredError(dtype="float64"),
        "C": losses.MeanSquaredError(reduction="mean_with_sample_weight", dtype="float64"),
        "D": losses.SparseCategoricalCrossentropy(from_logits=True, dtype="float64"),
        "E": losses.MeanSquaredError(reduction="sum", dtype="float64"),
    }[name]
    model = tagging if name == "D" else regression
    x = tokens if name == "D" else random.normal(size=(7, 3))
    y = random.integers(0, 3, (7, 6)) if name == "D" else random.normal(size=(7, 5))
    used = sample_weight if name in "BC" else None

    parts = [slice(0, 4), slice(4, 7)]
    whole = _gradient(model, loss, x, y, used)
    gradients = np.array([_gradient(model, loss, x[p], y[p], None if used is None else used[p]) for p in parts])
    merged = {
        "examples": np.average(gradients, axis=0, weights=[4, 3]),
        "tokens": np.average(gradients, axis=0, weights=[(tokens[p] > 0).sum() for p in parts]),
        "sample weights": np.average(gradients, axis=0, weights=[sample_weight[p].sum() for p in parts]),
        "nothing": gradients.sum(axis=0),
    }
    exact = [way for way, gradient in merged.items() if np.abs(gradient - whole).max() < 1e-7 * np.abs(whole).max()]
    assert exact == [DENOMINATORS[name]]


def test_gaps_are_those_of_the_named_faults() -> None:
    """The first window with a gap, under plain SGD and under momentum, as the faults' descriptions imply."""
    first = {}
    for name, gaps in gaps_of_faults().items():
        wrong = [np.asarray(gap) > 1e-12 for gap in gaps]
        first[FAULTS[name]] = tuple(int(w.argmax()) + 1 if w.any() else None for w in wrong)
    assert first == {
        "never reset": (2, 2),
        "mean of means": (8, 8),
        "a window late": (1, 1),
        "zeros between": (None, 2),
    }
