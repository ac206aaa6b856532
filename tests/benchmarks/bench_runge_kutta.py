"""What a step of k stages costs: a step of a Runge–Kutta method over k steps of Keras's own SGD on the same batch."""

from collections.abc import Callable, Iterator
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from companion.injection import inject
from companion.runge_kutta import RungeKutta
from tests.benchmarks.pairs import compare

WIDTH = 1024
# The arithmetic between the questions is the same for any batch, so that its share falls as the batch grows.
CASES = (("euler", 1024), ("heun", 1024), ("rk4", 1024), ("dormand_prince", 1024), ("dormand_prince", 4096))


def training_step(optimizer: Any, batch: int) -> Callable[[], Any]:
    """A compiled step on a network whose time goes into its gradients."""
    hidden = [keras.layers.Dense(WIDTH, "relu") for _ in range(2)]
    model = keras.Sequential([keras.Input((WIDTH,)), *hidden, keras.layers.Dense(10)])
    model.compile(optimizer, "mse", jit_compile=False)
    optimizer.build(model.trainable_variables)
    if isinstance(optimizer, RungeKutta):
        inject(model)
    generator = np.random.default_rng(0)
    x = tf.constant(generator.normal(size=(batch, WIDTH)), tf.float32)
    y = tf.constant(generator.normal(size=(batch, 10)), tf.float32)
    step = tf.function(model.train_step, autograph=False)
    return lambda: step((x, y))


def repeated(step: Callable[[], Any], times: int) -> Callable[[], Any]:
    def steps() -> None:
        for _ in range(times):
            step()

    return steps


def results() -> Iterator[dict[str, Any]]:
    for method, batch in CASES:
        optimizer = RungeKutta(1e-6, method)
        count = len(optimizer.tableau.stages())
        what = f"RungeKutta, {method}, batch {batch}: a step over {count} of Keras's SGD"
        plain = repeated(training_step(keras.optimizers.SGD(1e-6), batch), count)
        yield compare("RungeKutta", what, training_step(optimizer, batch), plain, runs=15 if batch == 1024 else 7)
