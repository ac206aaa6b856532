"""What accumulation costs: a window of ``GradientAccumulation`` over one of Keras's ``gradient_accumulation_steps``.

A window is ``STEPS`` micro-steps, of which the last updates. Ours looks at every micro-batch for infinities and NaN,
which Keras's does not; with ``on_nonfinite="skip_window"`` it looks once in a window.
"""

from collections.abc import Callable, Iterator
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from companion.accumulation import GradientAccumulation
from tests.benchmarks import bench_oracle
from tests.benchmarks.pairs import compare

STEPS, BATCH, SLOW_RUNS = 8, 16, 15
ROWS, WIDTH, IDS = 500_000, 64, 256
OPTIMIZERS = {"SGD": keras.optimizers.SGD, "Adam": keras.optimizers.Adam}
MODES: dict[str, dict[str, Any]] = {"": {}, ", skip_window": {"on_nonfinite": "skip_window"}}


def convolutional() -> keras.Model:
    """Most of the time goes into activations."""
    layers = keras.layers
    hidden = [layers.Conv2D(32, 3, activation="relu"), layers.Conv2D(32, 3, 2, activation="relu")]
    hidden += [layers.Conv2D(64, 3, activation="relu"), layers.GlobalAveragePooling2D()]
    return keras.Sequential([keras.Input((24, 24, 3)), *hidden, layers.Dense(10)])


def dense() -> keras.Model:
    """A million parameters for 16 examples: most of the time goes into parameters."""
    hidden = [keras.layers.Dense(512, activation="relu") for _ in range(5)]
    return keras.Sequential([keras.Input((64,)), *hidden, keras.layers.Dense(10)])


NETWORKS = {"CNN": convolutional, "dense network": dense}


def micro_step(model: keras.Model, optimizer: Any) -> Callable[[], Any]:
    """A compiled training step on one micro-batch."""
    generator = np.random.default_rng(0)
    inputs = tf.constant(generator.normal(size=(BATCH, *model.input_shape[1:])), tf.float32)
    targets = tf.constant(generator.integers(0, 10, BATCH))
    variables = model.trainable_variables
    optimizer.build(variables)

    @tf.function(autograph=False)
    def step() -> None:
        with tf.GradientTape() as tape:
            losses = keras.losses.sparse_categorical_crossentropy(targets, model(inputs), from_logits=True)
            loss = tf.reduce_mean(losses)
        optimizer.apply(tape.gradient(loss, variables), variables)

    return step


def sparse_micro_step(optimizer: Any) -> Callable[[], Any]:
    """A lookup in a large table, and the update of its rows."""
    table = keras.Variable(np.zeros((ROWS, WIDTH), "float32"))
    optimizer.build([table])
    ids = tf.constant(np.random.default_rng(0).integers(0, ROWS, IDS))

    @tf.function(autograph=False)
    def step() -> None:
        with tf.GradientTape() as tape:
            loss = tf.reduce_mean((tf.gather(table.value, ids) - 1) ** 2)
        optimizer.apply(tape.gradient(loss, [table.value]), [table])

    return step


def in_a_layer(optimizer: Any) -> Callable[[], Any]:
    """A window of training steps on the same table in Keras's layer, with the batches of `bench_oracle`."""
    return bench_oracle.training(bench_oracle.embedding(), 1024, STEPS, optimizer=optimizer)


def window(step: Callable[[], Any]) -> Callable[[], Any]:
    def steps() -> None:
        for _ in range(STEPS):
            step()

    return steps


def results() -> Iterator[dict[str, Any]]:
    for network, build in NETWORKS.items():
        for name, factory in OPTIMIZERS.items():
            for mode, options in MODES.items():
                ours = micro_step(build(), GradientAccumulation(factory(1e-9), STEPS, **options))
                builtin = micro_step(build(), factory(1e-9, gradient_accumulation_steps=STEPS))
                what = f"GradientAccumulation, {network}, {name}{mode}: over the built-in, batch {BATCH}"
                yield compare("GradientAccumulation", what, window(ours), window(builtin))
    table = f"GradientAccumulation, {IDS} of {ROWS} rows by tf.gather, SGD"
    ours = sparse_micro_step(GradientAccumulation(keras.optimizers.SGD(1e-9), STEPS))
    plain = sparse_micro_step(keras.optimizers.SGD(1e-9))
    yield compare(
        "GradientAccumulation", f"{table}: over {STEPS} steps without accumulation", window(ours), window(plain)
    )
    builtin = sparse_micro_step(keras.optimizers.SGD(1e-9, gradient_accumulation_steps=STEPS))
    yield compare("GradientAccumulation", f"{table}: over the built-in, which makes it dense", ours, builtin)
    layer = f"GradientAccumulation, Embedding layer of {ROWS} × {WIDTH}, SGD"
    ours = in_a_layer(GradientAccumulation(keras.optimizers.SGD(1e-6), STEPS))
    plain = in_a_layer(keras.optimizers.SGD(1e-6))
    yield compare("GradientAccumulation", f"{layer}: over {STEPS} steps without accumulation", ours, plain, SLOW_RUNS)
    builtin = in_a_layer(keras.optimizers.SGD(1e-6, gradient_accumulation_steps=STEPS))
    yield compare("GradientAccumulation", f"{layer}: over the built-in", ours, builtin, SLOW_RUNS)
