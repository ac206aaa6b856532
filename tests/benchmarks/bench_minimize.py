"""What `minimize` costs: a gradient in it, everything included, over a bare compiled one on the same data."""

import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from companion import minimize

BLOCK = 10
# Widths of the hidden layers, and examples. L-BFGS's own arithmetic goes with the number of weights only.
CASES = (((32,), 1440), ((32,), 14400), ((512, 256), 1440), ((512, 256), 14400))


class Alternating(keras.callbacks.History):
    """After every block of iterations as many bare gradients, and the ratio of the two times."""

    def __init__(self, bare: Callable[[], Any]) -> None:
        super().__init__()
        self.bare, self.ratios, self.start, self.spent = bare, list[float](), 0.0, 0

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        super().on_epoch_end(epoch, logs)
        if (epoch + 1) % BLOCK:
            return
        mine = (time.perf_counter() - self.start) / (logs["gradients"] - self.spent)
        began = time.perf_counter()
        for _ in range(BLOCK):
            self.bare()
        if self.start:
            self.ratios.append(mine * BLOCK / (time.perf_counter() - began))
        self.start, self.spent = time.perf_counter(), logs["gradients"]


def network(hidden: tuple[int, ...]) -> Any:
    keras.utils.set_random_seed(0)
    model = keras.Sequential(
        [keras.Input((64,)), *(keras.layers.Dense(width, "tanh", kernel_regularizer="l2") for width in hidden)]
    )
    model.add(keras.layers.Dense(10))
    model.compile(loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    return model


def results() -> Iterator[dict[str, Any]]:
    for hidden, rows in CASES:
        generator, model, other = np.random.default_rng(0), network(hidden), network(hidden)
        x = tf.constant(generator.normal(size=(rows, 64)), tf.float32)
        y = tf.constant(generator.integers(0, 10, rows))

        @tf.function
        def gradient(x: Any = x, y: Any = y, other: Any = other) -> Any:
            with tf.GradientTape() as tape:
                loss = other.compute_loss(x, y, other(x, training=True))
            return loss, tape.gradient(loss, other.trainable_variables)

        clock = Alternating(lambda gradient=gradient: gradient()[0].numpy())
        clock.bare()
        minimize(model, x, y, max_gradients=240, tolerance=0, callbacks=[clock], verbose=0)
        lower, median, upper = (round(quartile, 3) for quartile in statistics.quantiles(clock.ratios[1:], n=4))
        what = f"64-{'-'.join(map(str, hidden))}-10, {rows:,} examples: a gradient in L-BFGS over a bare one"
        quartiles = {"ratio_median": median, "ratio_q1": lower, "ratio_q3": upper}
        yield {"name": "minimize", "what": what, **quartiles, "runs": len(clock.ratios) - 1}
