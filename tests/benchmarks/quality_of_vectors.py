"""Trains word vectors with `SkipGram` and with gensim alike, and asks people's judgement of both, for chapter 04.

Both see the same text, with the same settings and as many passes, in turn for each seed. People have said of pairs of
words how similar they are (wordsim353, which gensim carries); the rank correlation with the cosines says how far the
vectors agree. The chapter draws what was recorded here. About a quarter of an hour. Usage, from the repository's root:
python -m tests.benchmarks.quality_of_vectors
"""

import datetime
import importlib.metadata
import json
import pathlib

import keras
import numpy as np
from gensim.models import Word2Vec
from gensim.test.utils import datapath
from scipy.stats import spearmanr

from companion import datasets
from companion.word2vec import SkipGram
from companion.word_pairs import skip_gram_windows, vocabulary
from tests.benchmarks.__main__ import processor

OUTPUT = pathlib.Path(__file__).parent.parent.parent / "book" / "data" / "word_similarity.json"
SEEDS = (1, 2, 3, 4, 5, 6)
DIMENSION, NEGATIVES, WINDOW, SUBSAMPLE, PASSES = 100, 5, 5, 1e-3, 5
FIRST_RATE, LAST_RATE = 0.025, 0.0001


def of_companion(corpus: list[list[str]], words: list[str], seed: int) -> np.ndarray:
    """The vectors of `SkipGram`, a row for each word."""
    windows = skip_gram_windows(corpus, words, WINDOW, subsample=SUBSAMPLE, seed=seed)
    steps = PASSES * int(windows.cardinality())
    model = SkipGram(len(words), DIMENSION, NEGATIVES, seed=seed)
    rate = keras.optimizers.schedules.PolynomialDecay(FIRST_RATE, steps, LAST_RATE)
    model.compile(keras.optimizers.SGD(rate), jit_compile=True, steps_per_execution=50)
    model.fit(windows, epochs=PASSES, shuffle=False, verbose=0)
    return model.centres.embeddings.numpy()


def of_gensim(corpus: list[list[str]], words: list[str], seed: int) -> np.ndarray:
    """Those of gensim with one worker, in the order of ``words``."""
    settings = {"vector_size": DIMENSION, "negative": NEGATIVES, "window": WINDOW, "sample": SUBSAMPLE, "min_count": 5}
    rates = {"alpha": FIRST_RATE, "min_alpha": LAST_RATE}
    model = Word2Vec(corpus, sg=1, workers=1, seed=seed, epochs=PASSES, **settings, **rates)
    return model.wv[words]


def unit(vectors: np.ndarray) -> np.ndarray:
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def judged(words: list[str]) -> tuple[list[tuple[str, str]], list[float]]:
    """The pairs of wordsim353 of which both words are known, and what people said, from 0 to 10."""
    lines = pathlib.Path(datapath("wordsim353.tsv")).read_text(encoding="utf-8").lower().splitlines()
    rows = [line.split("\t") for line in lines if not line.startswith("#")]
    known = [(one, other, float(score)) for one, other, score in rows if {one, other} <= set(words)]
    return [(one, other) for one, other, _ in known], [score for *_, score in known]


def main() -> None:
    """Trains both for every seed, prints a line for each and writes the record."""
    corpus = datasets.documentation_corpus()
    words = vocabulary(corpus)
    row = {word: number for number, word in enumerate(words)}
    pairs, people = judged(words)
    cosines: dict[str, list[list[float]]] = {"companion": [], "gensim": []}
    for seed in SEEDS:
        for name, train in (("companion", of_companion), ("gensim", of_gensim)):
            vectors = train(corpus, words, seed)
            one, other = (unit(vectors)[[row[pair[side]] for pair in pairs]] for side in (0, 1))
            cosines[name].append([round(float(cosine), 4) for cosine in (one * other).sum(axis=1)])
            print(seed, name, len(pairs), f"{spearmanr(people, cosines[name][-1])[0]:.4f}", flush=True)
    report = {
        "date": datetime.datetime.now(tz=datetime.UTC).date().isoformat(),
        "processor": processor(),
        "versions": {name: importlib.metadata.version(name) for name in ("tensorflow", "keras", "gensim", "numpy")},
        "words_of_text": sum(len(document) for document in corpus),
        "vocabulary": len(words),
        "passes": PASSES,
        "seeds": SEEDS,
        "pairs": [" ".join(pair) for pair in pairs],
        "people": people,
        "cosines": cosines,
    }
    OUTPUT.write_text(json.dumps(report) + "\n")


if __name__ == "__main__":
    main()
