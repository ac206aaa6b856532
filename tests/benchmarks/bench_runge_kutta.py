"""What a step of k stages costs: a step of a Runge–Kutta method over k steps of Keras's own SGD on the same batch."""

from collections.abc import Callable, Iterator
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from companion.injection import inject
from companion.runge_kutta import RungeKutta
from tests.benchmarks.pairs import compare

WIDTH, BATCH = 1024, 1024
METHODS = ("euler", "heun", "rk4", "dormand_prince")


def training_step(optimizer: Any) -> Callable[[], Any]:
    """A compiled step on a network whose time goes into its gradients."""
    hidden = [keras.layers.Dense(WIDTH, "relu") for _ in range(2)]
    model = keras.Sequential([keras.Input((WIDTH,)), *hidden, keras.layers.Dense(10)])
    model.compile(optimizer, "mse", jit_compile=False)
    optimizer.build(model.trainable_variables)
    if isinstance(optimizer, RungeKutta):
        inject(model)
    generator = np.random.default_rng(0)
    x = tf.constant(generator.normal(size=(BATCH, WIDTH)), tf.float32)
    y = tf.constant(generator.normal(size=(BATCH, 10)), tf.float32)
    step = tf.function(model.train_step, autograph=False)
    return lambda: step((x, y))


def repeated(step: Callable[[], Any], times: int) -> Callable[[], Any]:
    def steps() -> None:
        for _ in range(times):
            step()

    return steps


def results() -> Iterator[dict[str, Any]]:
    plain = training_step(keras.optimizers.SGD(1e-6))
    for method in METHODS:
        optimizer = RungeKutta(1e-6, method)
        count = len(optimizer.tableau.stages())
        what = f"RungeKutta, {method}: a step over {count} of Keras's SGD"
        yield compare("RungeKutta", what, training_step(optimizer), repeated(plain, count), runs=15)
