"""What listening costs: an injected step with dials, or with `check_finite`, over the same step without; and `SAM`."""

from collections.abc import Callable, Iterator
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from companion import SAM
from companion.injection import inject
from tests.benchmarks.bench_oracle import convolutional, dense
from tests.benchmarks.pairs import compare

BATCH, RUNS = 128, 101
DIALS = ("gradient_norm", "update_ratio")
NETWORKS = {"CNN": lambda: convolutional(16, 32), "dense network": lambda: dense(256)}


def training(model: Any, parts: int = 1, is_sharpness_aware: bool = False, **options: Any) -> Callable[[], Any]:
    """A function that takes one step of Adam on the same batch."""
    optimizer = keras.optimizers.Adam(1e-6)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(SAM(optimizer) if is_sharpness_aware else optimizer, loss, jit_compile=False)
    model.optimizer.build(model.trainable_variables)
    model.optimizer.inject(model) if is_sharpness_aware else inject(model, parts, **options)
    generator = np.random.default_rng(0)
    x, y = generator.normal(size=(BATCH, *model.input_shape[1:])), generator.integers(0, 10, BATCH)
    data = tf.constant(x, "float32"), tf.constant(y)
    any_size = tuple(tf.TensorSpec([None, *tensor.shape[1:]], tensor.dtype) for tensor in data)  # as in `fit`
    step = tf.function(model.train_step, autograph=False, input_signature=[any_size])
    return lambda: step(data)


def results() -> Iterator[dict[str, Any]]:
    for network, build in NETWORKS.items():
        rows = {
            "two dials": (training(build(), diagnostics=DIALS), training(build())),
            "N=8, three dials": (
                training(build(), 8, diagnostics=(*DIALS, "noise_scale")),
                training(build(), 8),
            ),
            "check_finite": (training(build(), check_finite=True), training(build())),
        }
        for what, (ours, without) in rows.items():
            yield compare("diagnostics", f"diagnostics, {what}, {network}: over the step without", ours, without, RUNS)
        plain = training(build())

        def twice(plain: Callable[[], Any] = plain) -> None:
            plain()
            plain()

        what = f"SAM, {network}: over two steps of its inner optimizer"
        yield compare("SAM", what, training(build(), is_sharpness_aware=True), twice, RUNS)
