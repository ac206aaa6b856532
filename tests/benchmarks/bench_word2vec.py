"""What a skip-gram step costs: by hand against autodiff, on a growing vocabulary, and against gensim on one worker."""

import importlib.util
from collections.abc import Callable
from typing import Any

import keras
import tensorflow as tf

from companion import datasets
from companion.word2vec import SkipGram
from companion.word_pairs import skip_gram_pairs, skip_gram_windows, vocabulary
from tests.benchmarks.pairs import compare
from tests.benchmarks.time_of_vocabulary import batches

DIMENSION, NEGATIVES, BATCH = 100, 5, 1024
SIZES = (1_000, 30_000, 300_000, 1_000_000)
FIT_BATCHES, FIT_RUNS, STEP_RUNS, GENSIM_RUNS = 200, 15, 31, 9
GENSIM_WORDS = 300_000
STEPS_PER_EXECUTION = 20  # otherwise what Keras does between two steps takes as long as the step


def training(words: list[str], data: tf.data.Dataset, gradients: str, jit: bool) -> Callable[[], Any]:
    """``fit`` over some batches."""
    model = SkipGram(len(words), DIMENSION, NEGATIVES, gradients, seed=0)
    model.compile(keras.optimizers.SGD(0.025), jit_compile=jit, steps_per_execution=STEPS_PER_EXECUTION)
    return lambda: model.fit(data, shuffle=False, verbose=0)


def step(model: SkipGram, data: list[Any], gradients: str, jit: bool) -> Callable[[], Any]:
    """One step of gradient descent, with nothing around it."""
    optimizer = keras.optimizers.SGD(0.025)
    optimizer.build(model.trainable_variables)
    turn = iter(range(10**9))

    @tf.function(jit_compile=jit)
    def function(centres: Any, candidates: Any) -> Any:
        loss, found = getattr(model, gradients)(centres, candidates)
        optimizer.apply(found, model.trainable_variables)
        return loss

    return lambda: function(*data[next(turn) % len(data)]).numpy()


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


def by_size() -> list[dict[str, Any]]:
    """By hand against autodiff at each size of the vocabulary, and the step by hand at each size against 30,000."""
    rows, models = [], {}
    for size in SIZES:
        models[size] = SkipGram(size, DIMENSION, NEGATIVES, seed=0), batches(size)
        for jit in (False, True):
            what = f"step at {size} words{', XLA' * jit}, by hand: over autodiff through Embedding"
            functions = [step(*models[size], gradients, jit) for gradients in ("closed_form", "autodiff")]
            rows.append(compare("SkipGram", what, *functions, runs=STEP_RUNS))
    for size in (1_000, 300_000, 1_000_000):
        for jit in (False, True):
            what = f"step by hand{', XLA' * jit}, at {size} words: over that at 30000"
            functions = [step(*models[each], "closed_form", jit) for each in (size, 30_000)]
            rows.append(compare("SkipGram", what, *functions, runs=STEP_RUNS))
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
    return [*through_fit(words, pairs), *by_size(), *against_gensim(corpus)]
