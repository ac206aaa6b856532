"""Holds `companion.word2vec`: gradients against NumPy, steps against dense gradients, vectors against gensim."""

import pathlib
from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf
from hypothesis import given
from hypothesis import strategies as st

import companion
from companion import word2vec
from companion.word2vec import SkipGram
from companion.word_pairs import read_windows, skip_gram_pairs, skip_gram_windows, vocabulary
from tests.kit.cases import thinned, who

ROUNDING = {"float32": 1e-6, "float64": 1e-12}


def reference(u: np.ndarray, v: np.ndarray, centres: Any, candidates: Any) -> tuple[float, np.ndarray, np.ndarray]:
    """The loss and both dense gradients in float64, one pair and one candidate at a time."""
    u, v = u.astype("float64"), v.astype("float64")
    loss, du, dv = 0.0, np.zeros_like(u), np.zeros_like(v)
    for centre, row in zip(centres, candidates, strict=True):
        for k, candidate in enumerate(row):
            score = u[centre] @ v[candidate]
            sigma = 1 / (1 + np.exp(-score))
            loss -= np.log(sigma if k == 0 else 1 - sigma)
            error = sigma - (k == 0)
            du[centre] += error * v[candidate]
            dv[candidate] += error * u[centre]
    return loss, du, dv


def model_of(
    rows: int = 7, dimension: int = 3, negatives: int = 2, dtype: str = "float64", **arguments: Any
) -> SkipGram:
    """A model whose vectors are all of size one, so that no gradient vanishes."""
    model = SkipGram(rows, dimension, negatives, dtype=dtype, seed=0, **arguments)
    random = np.random.default_rng(rows)
    model.set_weights([random.normal(size=(rows, dimension)) for _ in range(2)])
    return model


def batch_of(rows: int, pairs: int, negatives: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(seed)
    return random.integers(rows, size=pairs), random.integers(rows, size=(pairs, 1 + negatives))


def dense(gradient: Any) -> np.ndarray:
    return tf.convert_to_tensor(gradient).numpy()


def relative(found: np.ndarray, expected: np.ndarray) -> float:
    return float(np.abs(found - expected).max() / np.abs(expected).max())


# ---- the gradient ---------------------------------------------------------------------------------------------------


def wrong_sign_of_negatives(model: SkipGram, centres: Any, candidates: Any) -> Any:
    loss, (du, dv) = model.closed_form(centres, candidates)
    return loss, [tf.IndexedSlices(-du.values, du.indices, du.dense_shape), dv]


def last_occurrence_only(model: SkipGram, centres: Any, candidates: Any) -> Any:
    """What assigning rows instead of adding them gives."""
    loss, gradients = model.closed_form(centres, candidates)
    kept = []
    for gradient in gradients:
        rows = np.zeros(gradient.dense_shape, gradient.values.dtype.as_numpy_dtype)
        rows[gradient.indices] = gradient.values
        kept.append(tf.constant(rows))
    return loss, kept


def mean_over_batch(model: SkipGram, centres: Any, candidates: Any) -> Any:
    loss, gradients = model.closed_form(centres, candidates)
    return loss, [tf.convert_to_tensor(gradient) / len(centres) for gradient in gradients]


ANSWERS = [SkipGram.closed_form, SkipGram.autodiff]


@pytest.mark.parametrize("jit", [False, True], ids=["graph", "xla"])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("answer", ANSWERS)
def test_gradient_is_that_of_numpy(answer: Any, dtype: str, jit: bool) -> None:
    """Seven rows and forty pairs: every id repeats, also within one pair."""
    model, (centres, candidates) = model_of(dtype=dtype), batch_of(7, 40, 2)
    compiled = tf.function(lambda *batch: answer(model, *batch), jit_compile=jit)
    loss, gradients = compiled(tf.constant(centres), tf.constant(candidates))
    expected_loss, *expected = reference(*model.get_weights(), centres, candidates)
    assert abs(float(loss) / expected_loss - 1) < ROUNDING[dtype]
    for gradient, wanted in zip(gradients, expected, strict=True):
        assert relative(dense(gradient), wanted) < ROUNDING[dtype]


@who("answer", SkipGram.closed_form, wrong=(wrong_sign_of_negatives, last_occurrence_only, mean_over_batch))
def test_known_mistakes_are_told_apart(answer: Any) -> None:
    model, (centres, candidates) = model_of(), batch_of(7, 40, 2)
    _, gradients = answer(model, tf.constant(centres), tf.constant(candidates))
    _, *expected = reference(*model.get_weights(), centres, candidates)
    for gradient, wanted in zip(gradients, expected, strict=True):
        assert relative(dense(gradient), wanted) < 1e-12


@given(
    rows=st.integers(2, 9),
    pairs=st.integers(1, 12),
    negatives=st.integers(1, 4),
    dimension=st.integers(1, 5),
    scale=st.floats(0.01, 6.0),
    seed=st.integers(0, 99),
)
def test_closed_form_is_autodiff(
    rows: int, pairs: int, negatives: int, dimension: int, scale: float, seed: int
) -> None:
    model = model_of(rows, dimension, negatives)
    model.set_weights([scale * weight for weight in model.get_weights()])
    batch = [tf.constant(ids) for ids in batch_of(rows, pairs, negatives, seed)]
    loss, by_hand = model.closed_form(*batch)
    tape_loss, by_tape = model.autodiff(*batch)
    np.testing.assert_allclose(loss, tape_loss, rtol=1e-12)
    for hand, tape, others in zip(by_hand, by_tape, reversed(model.get_weights()), strict=True):
        assert hand.dtype == tape.dtype
        np.testing.assert_allclose(dense(hand), dense(tape), rtol=1e-12, atol=1e-12 * np.abs(others).max())


def test_loss_is_finite_where_scores_are_large() -> None:
    model = model_of(dtype="float32")
    model.set_weights([100 * weight for weight in model.get_weights()])
    loss, gradients = model.closed_form(*(tf.constant(ids) for ids in batch_of(7, 40, 2)))
    assert np.isfinite(loss)
    assert all(np.isfinite(dense(gradient)).all() for gradient in gradients)


# ---- the step -------------------------------------------------------------------------------------------------------


def pairs_as_data(centres: np.ndarray, candidates: np.ndarray, batches: int = 1) -> tf.data.Dataset:
    data = tf.data.Dataset.from_tensors(((centres, candidates),))
    return data.repeat(batches)


OPTIMIZERS = {
    "SGD": (lambda: keras.optimizers.SGD(0.1), True),
    "momentum": (lambda: keras.optimizers.SGD(0.1, momentum=0.9), True),
    "nesterov": (lambda: keras.optimizers.SGD(0.1, momentum=0.9, nesterov=True), True),
    "companion.SGD": (lambda: companion.SGD(0.1), True),
    "companion.Momentum": (lambda: companion.Momentum(0.1), True),
    "companion.Lion": (lambda: companion.Lion(0.1), True),
    "clipped SGD": (lambda: keras.optimizers.SGD(0.1, global_clipnorm=0.5), False),
    "Adam": (lambda: keras.optimizers.Adam(0.1), False),
    "Adagrad": (lambda: keras.optimizers.Adagrad(0.1), False),
    "RMSprop": (lambda: keras.optimizers.RMSprop(0.1), False),
}


gradients_and_compiler = pytest.mark.parametrize(
    ("gradients", "jit"),
    [
        pytest.param("closed_form", False, id="closed_form-graph"),
        pytest.param("autodiff", True, id="autodiff-xla"),
        pytest.param("closed_form", True, id="closed_form-xla", marks=pytest.mark.slow),
        pytest.param("autodiff", False, id="autodiff-graph", marks=pytest.mark.slow),
    ],
)


@gradients_and_compiler
@pytest.mark.parametrize("name", thinned(OPTIMIZERS, "momentum", "companion.SGD", "clipped SGD", "Adam"))
def test_fit_steps_as_with_a_dense_gradient(name: str, gradients: str, jit: bool) -> None:
    make, _ = OPTIMIZERS[name]
    centres, candidates = batch_of(7, 40, 2)
    model = model_of(gradients=gradients)
    weights = [keras.Variable(weight, dtype="float64") for weight in model.get_weights()]
    judge = make()
    for _ in range(3):
        _, *gradient = reference(*(weight.numpy() for weight in weights), centres, candidates)
        judge.apply([tf.constant(g) for g in gradient], weights)
    model.compile(make(), jit_compile=jit)
    model.fit(pairs_as_data(centres, candidates, 3), shuffle=False, verbose=0)
    for found, expected in zip(model.get_weights(), weights, strict=True):
        np.testing.assert_allclose(found, expected.numpy(), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_rows_are_summed_only_where_it_matters(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []
    monkeypatch.setattr(word2vec, "coalesce", lambda gradient: calls.append(gradient) or gradient)
    model = model_of()
    make, adds_up = OPTIMIZERS[name]
    model.compile(make(), jit_compile=False)
    model.train_on_batch(tuple(batch_of(7, 5, 2)))
    assert (not calls) == adds_up


@pytest.mark.parametrize("gradients", ["closed_form", "autodiff"])
def test_rows_that_are_not_in_the_batch_do_not_move(gradients: str) -> None:
    model = model_of(rows=50, gradients=gradients)
    before = model.get_weights()
    model.compile(keras.optimizers.SGD(0.1))
    model.train_on_batch((np.array([3, 3, 7]), np.array([[1, 2, 2], [4, 3, 1], [1, 1, 1]])))
    moved = [set(np.flatnonzero((a != b).any(axis=1))) for a, b in zip(before, model.get_weights(), strict=True)]
    assert moved == [{3, 7}, {1, 2, 3, 4}]


def test_closed_form_asks_for_no_whole_table() -> None:
    """In its graph no operation but the variables' own handles gives anything of the vocabulary's length."""
    rows = 4321
    model = model_of(rows=rows)
    batch = [tf.constant(ids) for ids in batch_of(rows, 5, 2)]
    large = {}
    for answer in (SkipGram.closed_form, SkipGram.autodiff):
        graph = tf.function(lambda *ids, answer=answer: answer(model, *ids)[0]).get_concrete_function(*batch).graph
        outputs = [tensor for op in graph.get_operations() for tensor in op.outputs]
        large[answer.__name__] = [t.op.type for t in outputs if t.shape.rank and t.shape[0] == rows]
    assert large["closed_form"] == []
    assert "ReadVariableOp" in large["autodiff"]


def test_frozen_table_stays() -> None:
    model = model_of()
    before = model.get_weights()
    model.contexts.trainable = False
    model.compile(keras.optimizers.SGD(0.1))
    model.train_on_batch(tuple(batch_of(7, 5, 2)))
    assert (model.get_weights()[1] == before[1]).all()
    assert (model.get_weights()[0] != before[0]).any()


def test_loss_shown_is_the_mean_over_pairs() -> None:
    model = model_of()
    model.compile(keras.optimizers.SGD(0.0))
    batches = [batch_of(7, size, 2, seed=size) for size in (8, 24)]
    shapes = (tf.TensorSpec((None,), tf.int64), tf.TensorSpec((None, 3), tf.int64))
    data = tf.data.Dataset.from_generator(lambda: ((batch,) for batch in batches), output_signature=(shapes,))
    expected = sum(reference(*model.get_weights(), *batch)[0] for batch in batches) / 32
    history = model.fit(data, steps_per_epoch=2, shuffle=False, verbose=0).history
    assert abs(history["loss"][0] - expected) < 1e-5
    assert list(history) == ["loss"]
    assert abs(model.evaluate(data, steps=2, verbose=0) - expected) < 1e-5


def test_scores_are_what_predict_returns() -> None:
    model, (centres, candidates) = model_of(), batch_of(7, 5, 2)
    u, v = model.get_weights()
    expected = (u[centres][:, None] * v[candidates]).sum(axis=2)
    np.testing.assert_allclose(model.predict((centres, candidates), verbose=0), expected, rtol=1e-6)


# ---- windows --------------------------------------------------------------------------------------------------------


def windows_of(rows: int, pieces: int = 3, length: int = 4, window: int = 2, shared: int = 3) -> list[np.ndarray]:
    """Pieces in which words repeat, random words that are neighbours, and windows cut short at either side."""
    random = np.random.default_rng(0)
    text = random.integers(rows, size=(pieces, length + 2 * window))
    left, right = random.integers(0, window + 1, size=(2, pieces, length))
    return [array.astype("int32") for array in (text, left, right, random.integers(rows, size=(pieces, shared)))]


def reference_of_windows(
    u: np.ndarray, v: np.ndarray, negatives: int, batch: list[np.ndarray]
) -> tuple[float, np.ndarray, np.ndarray, int]:
    """As ``reference``, pair by pair from the definition; and the number of pairs."""
    text, left, right, drawn = batch
    window = (text.shape[1] - left.shape[1]) // 2
    loss, du, dv, pairs = 0.0, np.zeros(u.shape), np.zeros(v.shape), 0
    for words, before, behind, noise in zip(text, left, right, drawn, strict=True):
        for place, (to_left, to_right) in enumerate(zip(before, behind, strict=True), window):
            for other in range(place - to_left, place + to_right + 1):
                if other == place:
                    continue
                pairs += 1
                centre, context = words[place], words[other]
                share = negatives / len(noise)
                for candidate, y, weight in [(context, 1, 1.0), *((n, 0, share * (n != context)) for n in noise)]:
                    score = u[centre].astype("float64") @ v[candidate]
                    sigma = 1 / (1 + np.exp(-score))
                    loss -= weight * np.log(sigma if y else 1 - sigma)
                    du[centre] += weight * (sigma - y) * v[candidate]
                    dv[candidate] += weight * (sigma - y) * u[centre]
    return loss, du, dv, pairs


def neighbour_as_noise(text: Any, left: Any, right: Any, drawn: Any, negatives: int, dtype: str) -> Any:
    centres, candidates, near, weight = read_windows(text, left, right, drawn, negatives, dtype)
    noise = tf.reduce_sum(near, axis=2, keepdims=True) * (negatives / drawn.shape[1])
    noise = tf.repeat(noise, drawn.shape[1], axis=2)
    return centres, candidates, near, tf.concat([weight[:, :, : text.shape[1]], noise], axis=2)


def every_word_near_itself(text: Any, left: Any, right: Any, drawn: Any, negatives: int, dtype: str) -> Any:
    centres, candidates, near, weight = read_windows(text, left, right, drawn, negatives, dtype)
    itself = tf.linalg.diag(tf.ones(left.shape, dtype), k=2, num_rows=left.shape[1], num_cols=candidates.shape[1])
    return centres, candidates, near + itself, weight + itself


def noise_that_counts_one(text: Any, left: Any, right: Any, drawn: Any, negatives: int, dtype: str) -> Any:
    return read_windows(text, left, right, drawn, drawn.shape[1], dtype)


@pytest.mark.parametrize("jit", [False, True], ids=["graph", "xla"])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("answer", ANSWERS)
def test_gradient_of_windows_is_that_of_their_pairs(answer: Any, dtype: str, jit: bool) -> None:
    model, batch = model_of(dtype=dtype), windows_of(7)
    compiled = tf.function(lambda *arrays: answer(model, *read_windows(*arrays, 2, dtype)), jit_compile=jit)
    loss, gradients = compiled(*map(tf.constant, batch))
    expected_loss, *expected, _ = reference_of_windows(*model.get_weights(), 2, batch)
    assert abs(float(loss) / expected_loss - 1) < ROUNDING[dtype]
    for gradient, wanted in zip(gradients, expected, strict=True):
        assert relative(dense(gradient), wanted) < ROUNDING[dtype]


@who("read", read_windows, wrong=(neighbour_as_noise, every_word_near_itself, noise_that_counts_one))
def test_known_mistakes_with_windows_are_told_apart(read: Any) -> None:
    model, batch = model_of(), windows_of(7)
    _, gradients = model.closed_form(*read(*map(tf.constant, batch), 2, "float64"))
    _, *expected, _ = reference_of_windows(*model.get_weights(), 2, batch)
    for gradient, wanted in zip(gradients, expected, strict=True):
        assert relative(dense(gradient), wanted) < 1e-12


@gradients_and_compiler
@pytest.mark.parametrize("name", ["SGD", "Adam"])
def test_fit_on_windows_steps_as_with_a_dense_gradient(name: str, gradients: str, jit: bool) -> None:
    make, _ = OPTIMIZERS[name]
    batch, model = windows_of(7), model_of(gradients=gradients)
    weights = [keras.Variable(weight, dtype="float64") for weight in model.get_weights()]
    loss, *gradient, pairs = reference_of_windows(*model.get_weights(), 2, batch)
    make().apply([tf.constant(g) for g in gradient], weights)
    model.compile(make(), jit_compile=jit)
    data = tf.data.Dataset.from_tensors((tuple(batch),))
    assert abs(model.evaluate(data, verbose=0) - loss / pairs) < 1e-5
    assert abs(model.fit(data, shuffle=False, verbose=0).history["loss"][0] - loss / pairs) < 1e-5
    for found, expected in zip(model.get_weights(), weights, strict=True):
        np.testing.assert_allclose(found, expected.numpy(), rtol=1e-9, atol=1e-9)


# ---- vectors --------------------------------------------------------------------------------------------------------

WORDS = ("north", "naïve", "east", "south")
VECTORS = np.array([[0.0, 2.0], [1.0, 1.5], [3.0, 0.0], [0.0, -0.1]])


def compass(**arguments: Any) -> SkipGram:
    model = SkipGram(4, 2, words=WORDS, dtype="float64", **arguments)
    model.centres.set_weights([VECTORS])
    return model


def test_most_similar_are_the_smallest_angles() -> None:
    found = compass().most_similar("north")
    assert [word for word, _ in found] == ["naïve", "east", "south"]
    np.testing.assert_allclose([cosine for _, cosine in found], [1.5 / np.hypot(1, 1.5), 0, -1], atol=1e-12)
    assert compass().most_similar(2, count=1)[0][0] == "naïve"
    numbers = SkipGram(4, 2, dtype="float64")
    numbers.centres.set_weights([VECTORS])
    assert [row for row, _ in numbers.most_similar(0)] == [1, 2, 3]


@pytest.mark.parametrize("word", ["west", 4, -1, None, 1.5])
def test_word_that_is_not_there(word: Any) -> None:
    with pytest.raises(KeyError, match="is not in the vocabulary"):
        compass().most_similar(word)


def test_gensim_reads_the_vectors_and_finds_the_same_neighbours(tmp_path: pathlib.Path) -> None:
    gensim = pytest.importorskip("gensim.models")
    model = compass()
    model.save_word2vec_format(tmp_path / "vectors.txt")
    vectors = gensim.KeyedVectors.load_word2vec_format(tmp_path / "vectors.txt")
    assert tuple(vectors.index_to_key) == WORDS
    np.testing.assert_array_equal(vectors.vectors, VECTORS.astype("float32"))
    for word in WORDS:
        ours, theirs = model.most_similar(word), vectors.most_similar(word)
        assert [name for name, _ in ours] == [name for name, _ in theirs]
        np.testing.assert_allclose([c for _, c in ours], [c for _, c in theirs], atol=1e-6)


def test_text_format_is_that_of_word2vec(tmp_path: pathlib.Path) -> None:
    compass().save_word2vec_format(tmp_path / "vectors.txt")
    lines = (tmp_path / "vectors.txt").read_text(encoding="utf-8").splitlines()
    assert lines == ["4 2", "north 0.0 2.0", "naïve 1.0 1.5", "east 3.0 0.0", "south 0.0 -0.1"]


def test_saved_model_is_the_same_and_trains_on_alike(tmp_path: pathlib.Path) -> None:
    model = compass(gradients="autodiff", negatives=2, seed=7)
    model.compile(keras.optimizers.SGD(0.1, momentum=0.9))
    batch = batch_of(4, 6, 2)
    model.train_on_batch(batch)
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    assert loaded.get_config() == model.get_config()
    assert loaded.most_similar("north") == model.most_similar("north")
    for each in (model, loaded):
        each.train_on_batch(batch)
    for ours, theirs in zip(model.get_weights(), loaded.get_weights(), strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_initial_vectors_are_those_of_the_paper_and_follow_the_seed() -> None:
    one, same, other = (SkipGram(300, 10, seed=seed).get_weights() for seed in (1, 1, 2))
    assert np.abs(one[0]).max() <= 0.05
    assert np.abs(one[0]).max() > 0.049
    assert (one[1] == 0).all()
    assert (one[0] == same[0]).all()
    assert (one[0] != other[0]).any()


@pytest.mark.parametrize("layout", ["pairs", "windows"])
def test_training_finds_who_keeps_the_same_company(layout: str) -> None:
    """Two groups of words that never meet: every nearest neighbour is of a word's own group."""
    random = np.random.default_rng(0)
    groups = [[f"{name}{number}" for number in range(4)] for name in "ab"]
    texts = [list(random.choice(groups[number % 2], 12)) for number in range(400)]
    words = vocabulary(texts)
    model = SkipGram(len(words), 8, words=words, seed=0)
    model.compile(keras.optimizers.SGD(0.05 if layout == "pairs" else 0.02))
    if layout == "pairs":
        data = skip_gram_pairs(texts, words, batch_size=64, subsample=None)
    else:
        data = skip_gram_windows(texts, words, length=12, batch_size=1, subsample=None)
    losses = model.fit(data, epochs=3, shuffle=False, verbose=0).history["loss"]
    assert losses[-1] < losses[0]
    assert all(model.most_similar(word, 1)[0][0][0] == word[0] for word in words)


# ---- errors ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"vocabulary_size": 1}, r"`vocabulary_size` must be an integer of at least 2\. Received: vocabulary_size=1"),
        ({"vocabulary_size": 2.5}, "`vocabulary_size` must be an integer"),
        ({"dimension": 0}, "`dimension` must be an integer of at least 1"),
        ({"dimension": True}, "`dimension` must be an integer of at least 1"),
        ({"negatives": 0}, "`negatives` must be an integer of at least 1"),
        ({"gradients": "by_hand"}, r"must be one of \('closed_form', 'autodiff'\)\. Received: gradients='by_hand'"),
        ({"words": ["a", "b"]}, r"`words` must be a list of `vocabulary_size` = 3 different words\. Received: 2"),
        ({"words": ["a", "b", "a"]}, "3 different words. Received: 2"),
        ({"dtype": "float16"}, r"`dtype` must be float32 or float64\. Received: dtype=float16"),
        ({"dtype": "mixed_float16"}, "mixed_float16"),
    ],
)
def test_bad_model(arguments: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        SkipGram(**{"vocabulary_size": 3, **arguments})


def test_loss_is_refused_before_a_weight_moves() -> None:
    model = model_of()
    before = model.get_weights()
    model.compile("sgd", loss="mse")
    with pytest.raises(ValueError, match=r"`loss` must be left out.*Received: compile\(loss='mse'\)"):
        model.train_on_batch(tuple(batch_of(7, 5, 2)))
    assert all((a == b).all() for a, b in zip(before, model.get_weights(), strict=True))


def test_data_with_another_number_of_negatives_are_refused_before_a_weight_moves() -> None:
    model = model_of()
    before = model.get_weights()
    model.compile(keras.optimizers.SGD(0.1))
    with pytest.raises(ValueError, match=r"`negatives` = 2 .*Received: 4"):
        model.train_on_batch(tuple(batch_of(7, 5, 4)))
    assert all((a == b).all() for a, b in zip(before, model.get_weights(), strict=True))


@pytest.mark.parametrize("words", [None, ("a b", "c", "d", "e"), ("", "c", "d", "e")])
def test_what_cannot_be_written_leaves_no_file(words: Any, tmp_path: pathlib.Path) -> None:
    with pytest.raises(ValueError, match=r"made with `words`|white space"):
        SkipGram(4, 2, words=words).save_word2vec_format(tmp_path / "vectors.txt")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("words", [[("a", "b"), ("c",)], [b"a", b"b"]])
def test_words_of_any_kind_are_read_back(words: Any, tmp_path: pathlib.Path) -> None:
    companion.SkipGram(2, 3, words=words).save(tmp_path / "words.keras")
    loaded = keras.saving.load_model(tmp_path / "words.keras")
    assert loaded.vocabulary == tuple(words)
    assert loaded.most_similar(words[0])[0][0] == words[1]


@pytest.mark.parametrize("unit", [1e-37, 1e-25, 1e25, 1e38])
def test_angles_do_not_depend_on_the_length_of_vectors(unit: float) -> None:
    model = companion.SkipGram(4, 2)
    model.centres.embeddings.assign(np.array([[1, 0], [1, 1], [0, 0], [-2, 0]], "float32") * np.float32(unit))
    found = model.most_similar(0)
    assert [row for row, _ in found] == [1, 2, 3]
    np.testing.assert_allclose([cosine for _, cosine in found], [np.sqrt(0.5), 0, -1], rtol=1e-6)


def test_weights_are_refused_where_they_stand_by_their_place() -> None:
    model, weights = companion.SkipGram(4, 2), np.ones(1)
    model.compile("sgd")
    pair = (np.array([0]), np.array([[1, 2, 3, 0, 1, 2]]))
    with pytest.raises(ValueError, match="`sample_weight` must be left out"):
        model.fit(pair, None, 1, 1, 0, None, 0.0, None, True, None, weights)
    with pytest.raises(ValueError, match="`class_weight` must be left out"):
        model.fit(pair, None, 1, 1, 0, None, 0.0, None, True, {0: 2.0})
    with pytest.raises(ValueError, match="`sample_weight` must be left out"):
        model.evaluate(pair, None, 1, 0, weights)
