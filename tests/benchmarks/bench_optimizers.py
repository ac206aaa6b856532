"""One update by each optimizer against the Keras built-in's: `apply` alone, without a model around it to dilute it."""

import itertools
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import keras
import numpy as np
import tensorflow as tf

import companion
from tests.benchmarks.pairs import compare

BUILTIN_ADAM, BUILTIN_SGD = keras.optimizers.Adam, keras.optimizers.SGD
PAIRS: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
    "SGD": (companion.SGD, BUILTIN_SGD),
    "Momentum": (companion.Momentum, partial(BUILTIN_SGD, momentum=0.9)),
    "Nesterov": (partial(companion.Momentum, nesterov=True), partial(BUILTIN_SGD, momentum=0.9, nesterov=True)),
    "Adam": (companion.Adam, BUILTIN_ADAM),
    "Lion": (companion.Lion, keras.optimizers.Lion),
    "Muon": (companion.Muon, partial(keras.optimizers.Muon, weight_decay=None, adam_weight_decay=None)),
    "Keras's own Adam against itself": (BUILTIN_ADAM, BUILTIN_ADAM),
}
NETWORKS = {"64–32–10": [64, 32, 10], "1024–1024–1024": [1024] * 3}
COMPILERS = {"graph": False, "XLA": True}


def update(optimizer: Any, widths: list[int], jit_compile: bool) -> Callable[[], Any]:
    """A compiled update of all weights of a dense network, with the same gradients on every call."""
    generator = np.random.default_rng(0)
    shapes = [shape for rows, columns in itertools.pairwise(widths) for shape in ((rows, columns), (columns,))]
    variables = [keras.Variable(generator.normal(size=shape), dtype="float32") for shape in shapes]
    gradients = [tf.constant(generator.normal(size=shape) * 1e-3, "float32") for shape in shapes]
    optimizer.build(variables)

    @tf.function(jit_compile=jit_compile, autograph=False)
    def apply(gradients: list[tf.Tensor]) -> None:
        optimizer.apply(gradients, variables)

    return partial(apply, gradients)


def results() -> Iterator[dict[str, Any]]:
    for network, widths in NETWORKS.items():
        for compiler, jit_compile in COMPILERS.items():
            for name, pair in PAIRS.items():
                ours, builtin = (update(make(1e-3), widths, jit_compile) for make in pair)
                yield compare(name, f"{name}, {network}, {compiler}", ours, builtin)
