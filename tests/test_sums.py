"""Sums of gradients against NumPy: dense and sparse, weighted or not, in eager mode and compiled."""

from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf

from companion.gradients import all_finite
from companion.sums import GradientSums, MicroBatch

SHAPES = ((6, 2), (3,), ())


def gradients_of(generator: np.random.Generator) -> list[Any]:
    """A sparse gradient, in which ids may repeat, and two dense ones."""
    rows, ids = generator.normal(size=(4, 2)), generator.integers(0, 6, 4)
    return [
        tf.IndexedSlices(tf.constant(rows), tf.constant(ids), tf.constant([6, 2], tf.int64)),
        *(tf.constant(generator.normal(size=shape)) for shape in SHAPES[1:]),
    ]


def dense(gradient: Any) -> np.ndarray:
    if not isinstance(gradient, tf.IndexedSlices):
        return np.array(gradient)
    total = np.zeros(gradient.dense_shape)
    np.add.at(total, np.array(gradient.indices), np.array(gradient.values))
    return total


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("weights", [None, (0.5, 2.0, 0.0, 3.0)])
def test_sums_are_those_of_numpy(weights: Any, compiled: bool) -> None:
    sums = GradientSums([keras.Variable(np.zeros(shape, "float32")) for shape in SHAPES], "float64")
    sums.sparse = frozenset({0})
    everything, generator = (0, 1, 2), np.random.default_rng(0)
    expected = [np.zeros(shape) for shape in SHAPES]
    add, read, clear = ((tf.function(f, autograph=False) if compiled else f) for f in (sums.add, sums.read, sums.clear))
    for step in range(4):
        gradients, weight = gradients_of(generator), None if weights is None else tf.constant(weights[step], "float64")
        expected = [
            e + (1 if weights is None else weights[step]) * dense(g) for e, g in zip(expected, gradients, strict=True)
        ]
        batch = MicroBatch(everything, tuple(gradients), weight)
        found = read(batch) if step == 3 else add(batch)
    for total, reference in zip(found, expected, strict=True):
        np.testing.assert_allclose(dense(total), reference, atol=1e-14)
    assert len(set(found[0].indices.numpy().tolist())) == len(found[0].indices)
    clear(everything)
    for variable in (*sums.accumulators, sums.touched):
        assert not np.any(variable.numpy())


@pytest.mark.parametrize(
    ("of_variable", "asked", "kept"),
    [
        ("float32", "float32", "float32"),
        ("bfloat16", "float32", "float32"),
        ("float32", "float64", "float64"),
        ("float64", "float32", "float64"),
    ],
)
def test_a_sum_has_the_wider_dtype(of_variable: str, asked: str, kept: str) -> None:
    assert GradientSums([keras.Variable(np.zeros(2), dtype=of_variable)], asked).accumulators[0].dtype == kept


@pytest.mark.parametrize("shape", [(), (3,), (2, 3), (2, 0), (2, 2, 3)])
@pytest.mark.parametrize("kind", [1.0, np.inf, -np.inf, np.nan])
def test_all_finite(shape: tuple[int, ...], kind: float) -> None:
    values = np.ones(shape)
    values.reshape(-1)[-1:] = kind
    expected = bool(np.isfinite(values).all())
    assert bool(all_finite([tf.ones(2), tf.constant(values)])) is expected
    if len(shape) == 2:
        assert bool(all_finite([tf.IndexedSlices(tf.constant(values), tf.constant([0, 0]), [5, shape[1]])])) is expected
