"""What training word vectors costs: by hand against autodiff, and against gensim on one worker.

What a step costs on a growing vocabulary is recorded by time_of_vocabulary.py, for chapter 04 and for the page.
"""

import importlib.util
from collections.abc import Callable
from typing import Any

import keras
import tensorflow as tf

from companion import datasets
from companion.word2vec import SkipGram
from companion.word_pairs import skip_gram_pairs, skip_gram_windows, vocabulary
from tests.benchmarks.pairs import compare

DIMENSION, NEGATIVES, BATCH = 100, 5, 1024
FIT_BATCHES, FIT_RUNS, GENSIM_RUNS = 200, 15, 9
GENSIM_WORDS = 300_000
STEPS_PER_EXECUTION = 20  # otherwise what Keras does between two steps takes as long as the step


def training(words: list[str], data: tf.data.Dataset, gradients: str, jit: bool) -> Callable[[], Any]:
    """``fit`` over some batches."""
    model = SkipGram(len(words), DIMENSION, NEGATIVES, gradients, seed=0)
    model.compile(keras.optimizers.SGD(0.025), jit_compile=jit, steps_per_execution=STEPS_PER_EXECUTION)
    return lambda: model.fit(data, shuffle=False, verbose=0)


def through_fit(words: list[str], pairs: tf.data.Dataset) -> list[dict[str, Any]]:
    """By hand against autodiff, through ``fit``, on batches of real text that are ready in memory."""
    data = tf.data.Dataset.from_tensor_slices(
        tuple(tf.stack(arrays) for arrays in zip(*(batch for (batch,) in pairs.take(FIT_BATCHES)), strict=True))
    ).map(lambda centres, candidates: ((centres, candidates),))
    rows = []
    for ours, other in (
        (("closed_form", False), ("autodiff", False)),
        (("closed_form", True), ("autodiff", True)),
        (("closed_form", True), ("closed_form", False)),
    ):
        names = [("by hand" if how == "closed_form" else "autodiff") + ", XLA" * jit for how, jit in (ours, other)]
        what = f"fit, {len(words)} words, {names[0]}: over {names[1]}"
        functions = [training(words, data, *way) for way in (ours, other)]
        rows.append(compare("SkipGram", what, *functions, runs=FIT_RUNS))
    return rows


def against_gensim(corpus: list[list[str]]) -> list[dict[str, Any]]:
    """One pass over the same text, pairs made on the way, with one worker; nothing where gensim is not installed."""
    if importlib.util.find_spec("gensim") is None:
        return []
    from gensim.models import Word2Vec

    text, total = [], 0
    for document in corpus:
        if total < GENSIM_WORDS:
            text.append(document)
            total += len(document)
    words = vocabulary(text)
    layouts = {"pairs": skip_gram_pairs(text, words, batch_size=BATCH), "windows": skip_gram_windows(text, words)}
    settings = {"vector_size": DIMENSION, "negative": NEGATIVES, "window": 5, "sample": 1e-3, "min_count": 5}
    peer = Word2Vec(sg=1, workers=1, seed=0, **settings)
    peer.build_vocab(text)
    return [
        compare(
            "SkipGram",
            f"pass over {total} words in {layout}, SkipGram with XLA: over gensim with one worker",
            training(words, data, "closed_form", True),
            lambda: peer.train(text, total_examples=len(text), epochs=1),
            runs=GENSIM_RUNS,
        )
        for layout, data in layouts.items()
    ]


def results() -> list[dict[str, Any]]:
    """Returns one row for each comparison."""
    corpus = datasets.documentation_corpus()
    words = vocabulary(corpus)
    pairs = skip_gram_pairs(corpus, words, batch_size=BATCH)
    return [*through_fit(words, pairs), *against_gensim(corpus)]
