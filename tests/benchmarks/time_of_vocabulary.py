"""Measures what a step of word2vec takes against the size of the vocabulary, for chapter 04.

All ways of making the step take turns on the same tables and batches, in random order. The times depend on the
machine, so the chapter draws what was recorded here and a test holds the two together. Usage, from the repository's
root: python -m tests.benchmarks.time_of_vocabulary
"""

import datetime
import importlib.metadata
import json
import os
import pathlib
import statistics
import time
from collections.abc import Callable
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from companion.word2vec import SkipGram
from tests.benchmarks.__main__ import processor

OUTPUT = pathlib.Path(__file__).parent.parent.parent / "book" / "data" / "time_of_vocabulary.json"
SIZES = (1_000, 3_000, 10_000, 30_000, 100_000, 300_000, 1_000_000)
DIMENSION, NEGATIVES, BATCH = 100, 5, 1024
BATCHES, ROUNDS = 8, 25


def batches(size: int) -> list[tuple[tf.Tensor, tf.Tensor]]:
    """Batches of ids as frequent as the words of a text: the k-th most frequent one in proportion to 1/k."""
    random = np.random.default_rng(0)
    share = 1 / np.arange(1, size + 1)
    noise = share**0.75
    centres = random.choice(size, (BATCHES, BATCH), p=share / share.sum())
    candidates = random.choice(size, (BATCHES, BATCH, 1 + NEGATIVES), p=noise / noise.sum())
    return [(tf.constant(c, tf.int32), tf.constant(k, tf.int32)) for c, k in zip(centres, candidates, strict=True)]


def gathered(model: SkipGram, centres: Any, candidates: Any) -> tuple[Any, list[Any]]:
    """The same as ``model.autodiff``, with the rows taken by ``tf.gather`` instead of the ``Embedding`` layer."""
    tables = [model.centres.embeddings.value, model.contexts.embeddings.value]
    with tf.GradientTape() as tape:
        u, v = tf.gather(tables[0], centres), tf.gather(tables[1], candidates)
        scores = tf.einsum("bd,bkd->bk", u, v)
        signs = 1 - 2 * tf.one_hot(0, 1 + NEGATIVES)
        loss = tf.reduce_sum(tf.nn.softplus(scores * signs))
    return loss, tape.gradient(loss, tables)


def steps(size: int) -> dict[str, Callable[..., Any]]:
    """The ways to make one step of gradient descent, on one model."""
    model = SkipGram(size, DIMENSION, NEGATIVES, seed=0)

    def step(answer: Callable[..., Any], optimizer: Any, jit: bool) -> Callable[..., Any]:
        optimizer.build(model.trainable_variables)

        def function(centres: Any, candidates: Any) -> Any:
            loss, gradients = answer(centres, candidates)
            optimizer.apply(gradients, model.trainable_variables)
            return loss

        return tf.function(function, jit_compile=jit)

    sgd = keras.optimizers.SGD(0.025)
    return {
        "Embedding, autodiff": step(model.autodiff, sgd, False),
        "gather, autodiff": step(lambda *batch: gathered(model, *batch), sgd, False),
        "by hand": step(model.closed_form, sgd, False),
        "Embedding, autodiff, XLA": step(model.autodiff, sgd, True),
        "by hand, XLA": step(model.closed_form, sgd, True),
    }


def times(size: int) -> dict[str, float]:
    """The median time of one step in microseconds, for each way."""
    data, ways, random = batches(size), steps(size), np.random.default_rng(1)
    found: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(-2, ROUNDS):  # the first two rounds, one of which compiles, do not count
        for name in random.permutation(list(ways)):  # who follows whom matters: the caches remember
            function = ways[name]
            started = time.perf_counter()
            for batch in data[: 2 if turn < 0 else BATCHES]:
                function(*batch).numpy()
            if turn >= 0:
                found[name].append((time.perf_counter() - started) / BATCHES * 1e6)
    return {name: round(statistics.median(seconds), 1) for name, seconds in found.items()}


def main() -> None:
    """Measures every size, prints a line for each and writes the record."""
    results: dict[str, list[float]] = {}
    for size in SIZES:
        found = times(size)
        print(size, found, flush=True)
        for name, value in found.items():
            results.setdefault(name, []).append(value)
    report = {
        "date": datetime.datetime.now(tz=datetime.UTC).date().isoformat(),
        "processor": processor(),
        "cores": os.cpu_count(),
        "versions": {name: importlib.metadata.version(name) for name in ("tensorflow", "keras")},
        "dimension": DIMENSION,
        "negatives": NEGATIVES,
        "batch": BATCH,
        "rounds": ROUNDS,
        "sizes": SIZES,
        "microseconds": results,
    }
    OUTPUT.write_text(json.dumps(report) + "\n")


if __name__ == "__main__":
    main()
