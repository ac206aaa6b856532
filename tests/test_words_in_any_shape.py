"""Holds what `SkipGram` makes of data, settings and words of any shape: used as they are meant, or refused in words."""

import itertools
import os
import pathlib
import re
import time
from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf

import companion
from companion import word_pairs
from companion.word2vec import SkipGram, _adds_up
from companion.word_pairs import skip_gram_pairs, skip_gram_windows, vocabulary
from companion.wrapping import WrappingOptimizer, wrapped_by

BATCH = (np.array([0, 3, 3, 1]), np.array([[1, 2, 2], [0, 2, 1], [1, 1, 1], [4, 0, 2]]))


def model_of(optimizer: Any, **compiled: Any) -> SkipGram:
    model = SkipGram(5, 3, negatives=2, seed=0)
    random = np.random.default_rng(0)
    model.set_weights([random.normal(size=(5, 3)) for _ in range(2)])
    model.compile(optimizer, **compiled)
    return model


def count_of_words(data: tf.data.Dataset, size: int) -> np.ndarray:
    return sum(np.bincount(batch[0][0], minlength=size) for batch in data.as_numpy_iterator())


# ---- the scale of the loss ------------------------------------------------------------------------------------------


def accumulated(optimizer: Any) -> Any:
    return companion.GradientAccumulation(optimizer, 1, normalize="sum")


SCALED = {
    "factor": lambda: keras.optimizers.SGD(0.1, loss_scale_factor=1024.0),
    "Adam": lambda: keras.optimizers.Adam(0.1, loss_scale_factor=1024.0),
    "coalesced": lambda: companion.CoalesceGradients(keras.optimizers.SGD(0.1, loss_scale_factor=1024.0)),
    "dynamic": lambda: keras.optimizers.LossScaleOptimizer(keras.optimizers.SGD(0.1)),
    "dynamic, coalesced": lambda: keras.optimizers.LossScaleOptimizer(
        companion.CoalesceGradients(keras.optimizers.SGD(0.1))
    ),
    "dynamic, accumulated": lambda: keras.optimizers.LossScaleOptimizer(accumulated(keras.optimizers.SGD(0.1))),
    "accumulated": lambda: accumulated(keras.optimizers.SGD(0.1, loss_scale_factor=64.0)),
}


@pytest.mark.parametrize("name", SCALED)
def test_scaled_loss_makes_the_same_step(name: str) -> None:
    """The scales are powers of two, so that nothing is rounded by them. The first step of a new optimizer counts."""
    plain = keras.optimizers.Adam(0.1) if name == "Adam" else keras.optimizers.SGD(0.1)
    expected, found = model_of(plain, jit_compile=False), model_of(SCALED[name](), jit_compile=False)
    for model in (expected, found):
        for _ in range(2):
            model.train_on_batch(BATCH)
    for ours, theirs in zip(found.get_weights(), expected.get_weights(), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-6)


# ---- optimizers that add up -----------------------------------------------------------------------------------------

WRAPPERS = companion.InjectedOptimizer, WrappingOptimizer
OPTIMIZERS = {
    **{name: rule for name in companion.__all__ if isinstance(rule := getattr(companion, name), type)},
    **{f"keras.{name}": getattr(keras.optimizers, name) for name in ("SGD", "Lion", "Adam", "Adagrad")},
}
OPTIMIZERS = {
    name: rule
    for name, rule in OPTIMIZERS.items()
    if issubclass(rule, keras.optimizers.Optimizer) and not issubclass(rule, WRAPPERS)
}


def moved_by(optimizer: Any, rows: list[float]) -> np.ndarray:
    """Where three steps lead whose gradient, of one row of three, comes in these pieces."""
    weight = keras.Variable(np.ones((3, 1)), dtype="float64")
    for scale in (1.0, -0.25, 3.0):
        values = tf.constant(scale * np.array(rows)[:, None])
        optimizer.apply([tf.IndexedSlices(values, [1] * len(rows), tf.constant([3, 1]))], [weight])
    return weight.numpy()


@pytest.mark.parametrize("clip", [{}, {"clipvalue": 0.5}], ids=["plain", "clipped"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_rows_come_in_parts_only_to_who_adds_them_up(name: str, clip: dict[str, float]) -> None:
    """A new rule of this package that adds up must be named where `_adds_up` looks; Keras's may take the slow way."""
    optimizers = [OPTIMIZERS[name](learning_rate=0.1, **clip) for _ in range(2)]
    adds_up = np.allclose(*map(moved_by, optimizers, ([3.0, 1.0, -2.0], [2.0])), rtol=1e-9)
    says_so = _adds_up(list(wrapped_by(optimizers[0])))
    assert says_so <= adds_up
    if not name.startswith("keras.") and name != "Muon":  # which leaves the embeddings named in `exclude` to Adam
        assert says_so == (adds_up and not clip)


# ---- what is used or refused ----------------------------------------------------------------------------------------


def pairs(*others: Any) -> tf.data.Dataset:
    return tf.data.Dataset.from_tensors((BATCH, *others))


def windows() -> tuple[np.ndarray, ...]:
    shapes = (2, 8), (2, 4), (2, 4), (2, 3)
    return tuple(np.ones(shape, "int32") for shape in shapes)


REFUSED: dict[str, tuple[Any, str]] = {
    "labels": (lambda model: model.fit(pairs(np.ones(4)), verbose=0), "without labels"),
    "labels of a batch": (lambda model: model.train_on_batch(BATCH, np.ones(4)), "without labels"),
    "sample_weight": (lambda model: model.fit(pairs(np.ones(4), np.ones(4)), verbose=0), "without `sample_weight`"),
    "sample_weight alone": (lambda model: model.fit(BATCH, sample_weight=np.ones(4), verbose=0), "`sample_weight`"),
    "sample_weight to evaluate": (
        lambda model: model.evaluate(BATCH, sample_weight=np.ones(4), verbose=0),
        "`sample_weight`",
    ),
    "no inner tuple": (lambda model: model.fit(tf.data.Dataset.from_tensors(BATCH), verbose=0), "one tuple in another"),
    "windows, no inner tuple": (
        lambda model: model.fit(tf.data.Dataset.from_tensors(windows()), verbose=0),
        "one tuple in another",
    ),
    "one array": (lambda model: model.fit(BATCH[0], verbose=0), "one tuple in another"),
    "three arrays": (lambda model: model.fit((*BATCH, BATCH[0]), verbose=0), "one tuple in another"),
    "predict on windows": (lambda model: model.predict(windows(), verbose=0), r"read_windows\(.*Received: 4 arrays"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_data_that_are_no_pairs(name: str) -> None:
    model = model_of(keras.optimizers.SGD(0.1), run_eagerly=True)
    before = model.get_weights()
    act, words = REFUSED[name]
    with pytest.raises(ValueError, match=words):
        act(model)
    assert all((a == b).all() for a, b in zip(before, model.get_weights(), strict=True))


@pytest.mark.parametrize("given", [{"metrics": ["mae"]}, {"weighted_metrics": ["mae"]}, {"metrics": [[], ["mae"]]}])
@pytest.mark.parametrize("method", ["train_on_batch", "test_on_batch"])
def test_metrics_are_refused(method: str, given: dict[str, Any]) -> None:
    model = model_of(keras.optimizers.SGD(0.1), **given)
    with pytest.raises(ValueError, match="`metrics` must be left out"):
        getattr(model, method)(BATCH)


def test_metrics_of_a_subclass_are_its_own() -> None:
    class Counting(SkipGram):
        def __init__(self, **arguments: Any) -> None:
            super().__init__(5, 3, negatives=2, **arguments)
            self.steps = keras.metrics.Sum(name="steps")

    model = Counting()
    model.compile(keras.optimizers.SGD(0.1))
    model.train_on_batch(BATCH)


@pytest.mark.parametrize("freeze", [("self",), ("centres", "contexts")])
def test_nothing_to_train(freeze: tuple[str, ...]) -> None:
    model = model_of(keras.optimizers.SGD(0.1))
    for name in freeze:
        (model if name == "self" else getattr(model, name)).trainable = False
    with pytest.raises(ValueError, match=r"Nothing is trainable: set `trainable`"):
        model.train_on_batch(BATCH)
    assert np.isfinite(model.evaluate(BATCH, verbose=0))


@pytest.mark.parametrize("wrap", [lambda it: it, keras.optimizers.LossScaleOptimizer])
def test_a_sum_has_no_weight(wrap: Any) -> None:
    model = model_of(wrap(companion.GradientAccumulation(keras.optimizers.SGD(0.1), 2, normalize="weight")))
    with pytest.raises(ValueError, match=r"`normalize` must be 'sum' or 'mean' for a SkipGram"):
        model.train_on_batch(BATCH)


def test_scores_of_windows_are_predicted_as_the_error_says() -> None:
    model, arrays = model_of(keras.optimizers.SGD(0.1)), windows()
    inputs = word_pairs.read_windows(*map(tf.constant, arrays), 2)[:2]
    assert model.predict(inputs, verbose=0).shape == (2, 4, 11)


# ---- passes through a text ------------------------------------------------------------------------------------------

SMALL = 1000


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(word_pairs, "CHUNK", SMALL)
    monkeypatch.setattr(word_pairs, "SECTION", SMALL // 8)


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("seed", [None, 5])
@pytest.mark.parametrize("make", [skip_gram_pairs, skip_gram_windows])
def test_every_document_comes_in_every_pass(make: Any, seed: int | None) -> None:
    """Eight chunks and one order: each of the texts, of two words, has its share of the pass."""
    documents = [[f"d{number}", f"e{number}"] * 20 for number in range(200)]
    words = vocabulary(documents)
    batch_size = 100 if make is skip_gram_pairs else 1
    data = make(documents, words, batch_size=batch_size, subsample=None, seed=seed)
    for _ in range(2):
        found = count_of_words(data, len(words)) if make is skip_gram_pairs else centres_of(data, len(words))
        assert (found > 0.5 * found.mean()).mean() > 0.95  # a pass is cut after the expected number of batches


def centres_of(data: tf.data.Dataset, size: int) -> np.ndarray:
    """How often a word is a centre."""
    counts = np.zeros(size, int)
    for ((text, left, right, _),) in data.as_numpy_iterator():
        window = (text.shape[1] - left.shape[1]) // 2
        np.add.at(counts, text[:, window : window + left.shape[1]][left + right > 0], 1)
    return counts


def test_without_a_seed_no_two_datasets_are_alike() -> None:
    arguments: dict[str, Any] = {"batch_size": 64, "subsample": None, "seed": None}
    texts = [["a", "b", "c", "d"] * 90]
    one, other = (next(iter(skip_gram_pairs(texts, list("abcd"), **arguments)))[0][1].numpy() for _ in range(2))
    assert (one != other).any()


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("make", [skip_gram_pairs, skip_gram_windows])
@pytest.mark.parametrize("lengths", [[2_999], [1, 1_700, 3, 0, 500], [125] * 8])
def test_document_of_any_length_is_read_in_chunks(make: Any, lengths: list[int], monkeypatch: Any) -> None:
    """No chunk is longer than promised, no neighbour comes from further than the window, and all words come."""
    words = [f"w{number}" for number in range(sum(lengths))]
    ends = np.cumsum([0, *lengths])
    documents = [words[start:end] for start, end in itertools.pairwise(ends)]
    sizes: list[int] = []
    chunk = word_pairs._Text.chunk
    monkeypatch.setattr(
        word_pairs._Text, "chunk", lambda *those: [sizes.append(len((found := chunk(*those))[0])), found][1]
    )
    data = make(documents, words, window=2, batch_size=50 if make is skip_gram_pairs else 1, subsample=None)
    if make is skip_gram_pairs:
        batches = [(centres, candidates[:, 0]) for ((centres, candidates),) in data.as_numpy_iterator()]
        assert max(abs(centres - near).max() for centres, near in batches) <= 2
        found = count_of_words(data, len(words))
        assert (found > 0).mean() > 0.95  # a pass has the expected number of batches, not each pair
    else:
        found = centres_of(data, len(words))
        assert (found > 0).mean() > 0.95
        assert found.max() == 1
    assert max(sizes) <= SMALL + SMALL // 8


@pytest.mark.parametrize("make", [skip_gram_pairs, skip_gram_windows])
def test_chunk_of_which_nothing_is_kept(make: Any, small_chunks: None) -> None:
    """Of a word that fills many chunks alone next to nothing is left."""
    documents = [["often"] * 125] * 400 + [[f"rare{number}" for number in range(120)]]
    data = make(documents, ["often", *documents[-1]], batch_size=1, subsample=1e-5, window=1)
    assert sum(1 for _ in data) == len(data)


# ---- random words ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("skew", [2_000, 10_000_000])
def test_negatives_beside_a_word_that_is_nearly_all_of_the_noise(skew: int) -> None:
    """Drawn again until none is left, the first batch would take a minute, and ever longer."""
    text = ["often"] * 20_000 + ["rare", "often", "seldom", "often"] * 3
    power = np.log(skew) / np.log(20_006 / 3)  # makes the ratio of the chances that of the parameter
    started = time.process_time()
    data = skip_gram_pairs([text], ["often", "rare", "seldom"], subsample=None, power=power, batch_size=512)
    ((_, candidates),) = next(iter(data))
    assert time.process_time() - started < 20
    near, drawn = candidates.numpy()[:, :1], candidates.numpy()[:, 1:]
    assert (near != drawn).all()
    beside = drawn[near[:, 0] == 0]
    assert abs((beside == 1).mean() - 0.5) < 5 * 0.5 / np.sqrt(beside.size)


def test_draw_of_another_word_is_that_of_the_others() -> None:
    """Against NumPy's choice without the word; one of the words has no chance at all."""
    text = word_pairs._Text([list("aaaaabbbcc" * 9)], list("abzc"), 1, None, 0.75, 0)
    for word in range(4):
        found = text.draw_others(np.random.default_rng(word), np.full(40_000, word))
        expected = np.where(np.arange(4) == word, 0, text.noise)
        expected /= expected.sum()
        shares = np.bincount(found, minlength=4) / len(found)
        assert (np.abs(shares - expected) <= 5 * np.sqrt(expected / len(found))).all()


# ---- words and documents --------------------------------------------------------------------------------------------

TEXT = [["a", "b"] * 30]


@pytest.mark.parametrize(
    "documents", [["the cat sat"] * 9, "the cat sat", [b"the cat"], [["a"], "bc"], [1, 2], 5, None]
)
@pytest.mark.parametrize("make", [vocabulary, lambda it: skip_gram_pairs(it, ["a", "b"])], ids=["words", "pairs"])
def test_string_is_no_list_of_words(make: Any, documents: Any) -> None:
    with pytest.raises(ValueError, match=r"`documents` must be a list of (lists of )?words.* Received: documents"):
        make(documents)


@pytest.mark.parametrize("document", [{"a": 3}, {"a", "b"}, frozenset("ab")])
@pytest.mark.parametrize("make", [vocabulary, lambda it: skip_gram_pairs(it, ["a", "b"])], ids=["words", "pairs"])
def test_what_has_no_order_or_counts_is_no_list_of_words(make: Any, document: Any) -> None:
    for documents in ([document] * 9, {"title": document}):
        with pytest.raises(ValueError, match=r"`documents` must be a list of (lists of )?words"):
            make(documents)


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (lambda: vocabulary([["a", 1, None] * 9]), "documents"),
        (lambda: vocabulary([[["a"], ["b"]] * 9]), "documents"),
        (lambda: vocabulary(tf.constant([["a", "b"]] * 9)), "documents"),
        (lambda: skip_gram_pairs([[["a"], "b"] * 9], ["a", "b"]), "documents"),
        (lambda: skip_gram_windows(TEXT, [["a"], ["b"]]), "words"),
        (lambda: skip_gram_pairs(TEXT, None), "words"),  # type: ignore[arg-type]
        (lambda: SkipGram(2, words=[["a"], ["b"]]), "words"),
        (lambda: SkipGram(2, words=2), "words"),  # type: ignore[arg-type]
    ],
)
def test_words_of_kinds_that_cannot_be_counted(make: Any, name: str) -> None:
    with pytest.raises(ValueError, match=f"`{name}` must hold words: all of them strings"):
        make()


def test_a_window_longer_than_any_document_holds_all_pairs_of_it() -> None:
    """As those use it for whom all items of a basket stand beside each other."""
    pairs = skip_gram_pairs([["a", "b", "c"], ["c", "a"]] * 50, ["a", "b", "c"], 10**9, batch_size=1, subsample=None)
    found = np.array([(centres[0], candidates[0, 0]) for ((centres, candidates),) in pairs.as_numpy_iterator()])
    assert len(found) == 399  # one less than all, with a probability of 1e-9 that a window is short
    shares = {(0, 1): 50, (1, 0): 50, (1, 2): 50, (2, 1): 50, (0, 2): 100, (2, 0): 100}
    assert all(0 <= count - (found == pair).all(1).sum() <= 1 for pair, count in shares.items())


@pytest.mark.parametrize("jit", [True, False])
@pytest.mark.parametrize("make", [skip_gram_pairs, skip_gram_windows])
def test_rows_that_are_not_there_are_refused_under_xla_too(make: Any, jit: bool) -> None:
    data = make([list("abcdef")] * 20, list("abcdef"), batch_size=2, subsample=None)
    model = SkipGram(5, 4, seed=0)
    model.compile(keras.optimizers.SGD(0.1), jit_compile=jit)
    before = model.get_weights()
    for call in (model.fit, model.evaluate):
        with pytest.raises(tf.errors.InvalidArgumentError, match=r"`vocabulary_size` - 1 = 4\. Received"):
            call(data, verbose=0, **({"shuffle": False} if call == model.fit else {}))
    for old, new in zip(before, model.get_weights(), strict=True):
        assert (old == new).all()


@pytest.mark.parametrize("number", [-1, 5])
def test_numbers_in_arrays_are_looked_at(number: int) -> None:
    model = SkipGram(5, 4)
    model.compile("sgd", jit_compile=True)
    with pytest.raises(tf.errors.InvalidArgumentError, match="Numbers of words must be from 0 to"):
        model.fit((np.array([0, number]), np.zeros((2, 6), int)), verbose=0)


@pytest.mark.parametrize(
    ("centres", "candidates", "words"),
    [(np.zeros(2), np.zeros((2, 6), int), "int32 or int64"), (np.zeros((2, 1), int), np.zeros((2, 6), int), "shapes")],
)
def test_arrays_that_are_no_numbers_of_words(centres: Any, candidates: Any, words: str) -> None:
    model = SkipGram(5, 4)
    model.compile("sgd")
    with pytest.raises(ValueError, match=words):
        model.train_on_batch((centres, candidates))


@pytest.mark.parametrize("words", ["ab", b"ab", ["a", "b", "a"]])
def test_vocabulary_is_a_list_of_different_words(words: Any) -> None:
    with pytest.raises(ValueError, match="`words` must be a list of"):
        skip_gram_pairs(TEXT, words)
    with pytest.raises(ValueError, match="`words` must be a list of"):
        SkipGram(len(words), words=words)


def test_generator_is_read_once_and_says_so_the_second_time() -> None:
    documents = ((word for word in text) for text in TEXT)
    words = vocabulary(documents)
    assert words == ["a", "b"]
    with pytest.raises(ValueError, match="come from a generator, make lists"):
        skip_gram_pairs(documents, words)
    fresh = ((word for word in text) for text in TEXT)
    assert len(skip_gram_pairs(fresh, iter(words), batch_size=4, subsample=None))


@pytest.mark.parametrize(
    ("function", "arguments", "words"),
    [
        (vocabulary, {"min_count": "5"}, "`min_count`"),
        (vocabulary, {"max_size": -1}, "`max_size` must be an integer of at least 1"),
        (skip_gram_pairs, {"seed": -1}, "`seed` must be an integer of at least 0"),
        (skip_gram_pairs, {"seed": 0.5}, "`seed`"),
        (skip_gram_pairs, {"power": "0.75"}, "`power` must be a number"),
        (skip_gram_pairs, {"power": np.nan}, "`power` must be a number"),
        (skip_gram_windows, {"subsample": "much"}, "`subsample` must be a number"),
    ],
)
def test_numbers_in_words(function: Any, arguments: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        function(*([TEXT] if function is vocabulary else [TEXT, ["a", "b"]]), **arguments)


# ---- items ----------------------------------------------------------------------------------------------------------

ITEMS = (30, 4, 0, 2, 1)


@pytest.mark.parametrize("words", [ITEMS, np.array(ITEMS), [np.int32(item) for item in ITEMS]])
def test_items_are_asked_by_their_number(words: Any, tmp_path: pathlib.Path) -> None:
    model = SkipGram(5, 4, words=words, seed=0)
    vectors = model.centres.embeddings.numpy()
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    for row, item in enumerate(ITEMS):
        cosines = vectors @ vectors[row]
        ranked = [ITEMS[other] for other in np.argsort(-cosines) if other != row]
        assert [name for name, _ in model.most_similar(item)] == ranked
        assert [name for name, _ in model.most_similar(np.int64(item), count=2)] == ranked[:2]
    with pytest.raises(KeyError, match="3 is not in the vocabulary"):
        model.most_similar(3)
    model.save(tmp_path / "items.keras")
    assert keras.saving.load_model(tmp_path / "items.keras").most_similar(30) == model.most_similar(30)


@pytest.mark.parametrize("count", [-1, 1.5, "3", None])
def test_number_of_neighbours(count: Any) -> None:
    with pytest.raises(ValueError, match="`count` must be an integer of at least 0"):
        SkipGram(3, 2).most_similar(0, count)


# ---- the file -------------------------------------------------------------------------------------------------------


def test_gensim_reads_items(tmp_path: pathlib.Path) -> None:
    gensim = pytest.importorskip("gensim.models")
    model = SkipGram(5, 4, words=ITEMS, seed=0)
    model.save_word2vec_format(tmp_path / "items.txt")
    vectors = gensim.KeyedVectors.load_word2vec_format(tmp_path / "items.txt")
    assert [int(key) for key in vectors.index_to_key] == list(ITEMS)
    np.testing.assert_array_equal(vectors.vectors, model.centres.embeddings.numpy())


class Full:
    """Vectors that come to an end too early, as a disk may."""

    def numpy(self) -> np.ndarray:
        return np.ones((2, 4))


@pytest.mark.parametrize("old", ["old vectors", None])
@pytest.mark.parametrize("fault", ["surrogate", "disk", "moved"])
def test_file_is_whole_or_as_it_was(old: str | None, fault: str, tmp_path: pathlib.Path, monkeypatch: Any) -> None:
    path = tmp_path / "vectors.txt"
    if old:
        path.write_text(old)
    model = SkipGram(3, 4, words=("a", "b", "\ud800" if fault == "surrogate" else "c"))
    if fault == "disk":
        monkeypatch.setattr(type(model.centres), "embeddings", Full())
    if fault == "moved":
        monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError("no")))
        monkeypatch.setattr(pathlib.Path, "replace", lambda *_: (_ for _ in ()).throw(OSError("no")))
    with pytest.raises((UnicodeError, ValueError, OSError)):
        model.save_word2vec_format(path)
    assert [file.read_text() for file in tmp_path.iterdir()] == ([old] if old else [])


def test_words_that_are_written_alike(tmp_path: pathlib.Path) -> None:
    with pytest.raises(ValueError, match=re.escape("1 and '1'")):
        SkipGram(2, 2, words=(1, "1")).save_word2vec_format(tmp_path / "vectors.txt")
    assert list(tmp_path.iterdir()) == []


def test_a_file_is_written_where_a_link_leads(tmp_path: pathlib.Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "file")
    SkipGram(2, 4, words=["a", "b"]).save_word2vec_format(tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "file").read_text().startswith("2 4\na ")
