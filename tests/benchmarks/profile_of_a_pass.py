"""Measures where the time of one pass through a text goes, for chapter 04: in pairs, in windows, and by gensim.

What is timed is nested: looking up the rows, the gradient with that, the step with that, `fit` on batches that lie
ready, and `fit` with the making of the batches. All take turns in random order, so that what slows the machine slows
all of them; the processor's seconds, of all threads together, are kept as well. The chapter draws what was recorded
here. About five minutes. Usage, from the repository's root:
python -m tests.benchmarks.profile_of_a_pass
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
from gensim.models import Word2Vec

from companion import datasets
from companion.word2vec import SkipGram
from companion.word_pairs import skip_gram_pairs, skip_gram_windows, vocabulary
from tests.benchmarks.__main__ import processor

OUTPUT = pathlib.Path(__file__).parent.parent.parent / "book" / "data" / "word_profile.json"
DIMENSION, NEGATIVES, WINDOW, SUBSAMPLE, RATE = 100, 5, 5, 1e-3, 0.025
TEXT = 150_000  # words
READY = 100  # batches of pairs that lie ready: the time for them is scaled to a pass
ROUNDS = 21
STEPS_PER_EXECUTION = 20


def some_text() -> list[list[str]]:
    """The first documents of the corpus."""
    text, total = [], 0
    for document in datasets.documentation_corpus():
        if total < TEXT:
            text.append(document)
            total += len(document)
    return text


def training(size: int, data: Any, gradients: str = "closed_form", jit: bool = True) -> Callable[[], Any]:
    """A pass with ``fit``."""
    model = SkipGram(size, DIMENSION, NEGATIVES, gradients, seed=0)
    model.compile(keras.optimizers.SGD(RATE), jit_compile=jit, steps_per_execution=STEPS_PER_EXECUTION)
    return lambda: model.fit(data, shuffle=False, verbose=0)


def part(size: int, data: Any, what: str) -> Callable[[], Any]:
    """A loop in a graph, without Keras around it, over a part of the step that XLA has compiled."""
    model = SkipGram(size, DIMENSION, NEGATIVES, seed=0)
    model.compile(keras.optimizers.SGD(RATE))
    model.optimizer.build(model.trainable_variables)

    @tf.function(jit_compile=True)
    def inner(batch: Any) -> Any:
        arguments, _ = model._unpack(batch)
        if what == "rows":
            u = tf.gather(model.centres.embeddings.value, arguments[0])
            v = tf.gather(model.contexts.embeddings.value, arguments[1])
            return tf.reduce_sum(u) + tf.reduce_sum(v)
        loss, gradients = model.closed_form(*arguments)
        if what == "gradient":
            return [gradient.values for gradient in gradients]
        model.optimizer.apply(gradients, model.trainable_variables)
        return loss

    @tf.function
    def outer() -> None:
        for batch in data:
            inner(batch)

    return outer


def ready(data: tf.data.Dataset, batches: int) -> tf.data.Dataset:
    """The first batches, in memory."""
    kept = [batch for (batch,) in data.take(batches)]
    stacked = tuple(tf.stack(arrays) for arrays in zip(*kept, strict=True))
    return tf.data.Dataset.from_tensor_slices(stacked).map(lambda *batch: (batch,))


def ways(text: list[list[str]]) -> tuple[dict[str, tuple[Callable[[], Any], float]], int]:
    """What is timed, with what its time must be multiplied by to be that of a pass; and the pairs in a pass."""
    words = vocabulary(text)
    size = len(words)
    pairs = skip_gram_pairs(text, words, WINDOW, NEGATIVES, subsample=SUBSAMPLE)
    windows = skip_gram_windows(text, words, WINDOW, subsample=SUBSAMPLE)
    found: dict[str, tuple[Callable[[], Any], float]] = {}
    for name, data in (("pairs", pairs), ("windows", windows)):
        total = int(data.cardinality())
        batches = READY if name == "pairs" else total
        in_memory = ready(data, batches)
        for what in ("rows", "gradient", "step"):
            found[f"{name}: {what}"] = part(size, in_memory, what), total / batches
        found[f"{name}: fit, batches ready"] = training(size, in_memory), total / batches
        found[f"{name}: fit"] = training(size, data), 1
        found[f"{name}: making the batches"] = (lambda data=data: data.reduce(0, lambda n, _: n + 1).numpy()), 1
    found["windows: fit, autodiff"] = training(size, windows, "autodiff"), 1
    found["windows: fit, no XLA"] = training(size, windows, jit=False), 1
    found["windows: fit, autodiff, no XLA"] = training(size, windows, "autodiff", jit=False), 1
    settings = {"vector_size": DIMENSION, "negative": NEGATIVES, "window": WINDOW, "sample": SUBSAMPLE, "min_count": 5}
    peer = Word2Vec(sg=1, workers=1, seed=0, alpha=RATE, min_alpha=RATE, **settings)
    peer.build_vocab(text)
    found["gensim, one worker"] = (lambda: peer.train(text, total_examples=len(text), epochs=1)), 1
    return found, int(pairs.cardinality()) * 1024


def main() -> None:
    """Measures, prints a line for each way and writes the record."""
    text, random = some_text(), np.random.default_rng(0)
    timed, pairs = ways(text)
    seconds: dict[str, list[float]] = {name: [] for name in timed}
    of_processor: dict[str, list[float]] = {name: [] for name in timed}
    for turn in range(-1, ROUNDS):  # the first round, which compiles, does not count
        for name in random.permutation(list(timed)):
            function, factor = timed[name]
            started = time.perf_counter(), time.process_time()
            function()
            ended = time.perf_counter(), time.process_time()
            if turn >= 0:
                for kept, start, end in zip((seconds, of_processor), started, ended, strict=True):
                    kept[name].append(round((end - start) * factor, 4))
    for name, values in seconds.items():
        print(f"{name:32} {pairs / statistics.median(values) / 1e3:6.0f} thousand pairs a second")
    report = {
        "date": datetime.datetime.now(tz=datetime.UTC).date().isoformat(),
        "processor": processor(),
        "cores": os.cpu_count(),
        "versions": {name: importlib.metadata.version(name) for name in ("tensorflow", "keras", "gensim", "numpy")},
        "words_of_text": sum(len(document) for document in text),
        "pairs": pairs,
        "rounds": ROUNDS,
        "seconds": seconds,
        "processor_seconds": of_processor,
    }
    OUTPUT.write_text(json.dumps(report) + "\n")


if __name__ == "__main__":
    main()
