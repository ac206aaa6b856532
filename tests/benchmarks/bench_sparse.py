"""What summing repeated rows costs: a training step with ``CoalesceGradients`` over the same step without it.

The pairs are measured in turns, so that whatever else the machine does falls on both.
"""

import time
from collections.abc import Callable
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from companion.wrapping import CoalesceGradients

ROWS, WIDTH, BATCH = 500_000, 64, 256


def training_step(optimizer: Any) -> Callable[[], Any]:
    """One step of a compiled Keras model that begins with an ``Embedding``."""
    keras.utils.set_random_seed(0)
    inputs = keras.Input((1,), dtype="int32")
    outputs = keras.layers.Dense(1)(keras.layers.Flatten()(keras.layers.Embedding(ROWS, WIDTH)(inputs)))
    model = keras.Model(inputs, outputs)
    model.compile(optimizer, "mse", jit_compile=False)
    ids = tf.constant(np.random.default_rng(0).zipf(1.3, (BATCH, 1)) % ROWS, tf.int32)
    targets = tf.ones((BATCH, 1))
    return lambda: model.train_on_batch(ids, targets)


def bare_update(optimizer: Any) -> Callable[[], Any]:
    """One update from a given sparse gradient, with nothing around it: the worst case."""
    variable = keras.Variable(np.zeros((ROWS, WIDTH), "float32"))
    optimizer.build([variable])
    ids = tf.constant(np.random.default_rng(0).zipf(1.3, BATCH) % ROWS, tf.int32)
    rows, shape = tf.ones((BATCH, WIDTH)), tf.constant([ROWS, WIDTH])

    @tf.function
    def update() -> Any:
        optimizer.apply([tf.IndexedSlices(rows, ids, shape)], [variable])
        return optimizer.iterations + 0

    return lambda: update().numpy()


def ratios(ours: Callable[[], Any], theirs: Callable[[], Any], steps: int, runs: int) -> np.ndarray:
    """Returns the time of ``steps`` calls of ``ours`` over that of ``theirs``, for each run."""
    found = []
    for run in range(-1, runs):  # the first, which also compiles, does not count
        seconds = {}
        for call in (ours, theirs) if run % 2 else (theirs, ours):
            start = time.perf_counter()
            for _ in range(steps):
                call()
            seconds[call] = time.perf_counter() - start
        found.append(seconds[ours] / seconds[theirs])
    return np.array(found[1:])


def results() -> list[dict[str, Any]]:
    """Returns one row for each comparison, with the median and the quartiles of its ratio."""
    rows = []
    for what, workload, factory, steps, runs in (
        ("training step, SGD", training_step, keras.optimizers.SGD, 5, 15),
        ("training step, Adam", training_step, keras.optimizers.Adam, 2, 11),
        ("update alone, SGD", bare_update, keras.optimizers.SGD, 50, 15),
        ("update alone, Adam", bare_update, keras.optimizers.Adam, 2, 11),
    ):
        found = ratios(workload(CoalesceGradients(factory(0.01))), workload(factory(0.01)), steps, runs)
        q1, median, q3 = np.quantile(found, [0.25, 0.5, 0.75])
        rows.append(
            {
                "name": "CoalesceGradients",
                "what": f"CoalesceGradients, {what}, {BATCH} of {ROWS} rows: over the same without it",
                "ratio_median": float(median),
                "ratio_q1": float(q1),
                "ratio_q3": float(q3),
                "runs": runs,
            }
        )
    return rows
