"""What chapter 04 claims, tried on the real Keras; and the data under its figures against the record and a formula."""

import functools
import json
import statistics
from collections.abc import Callable
from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf
from scipy import stats

import companion
from companion.word_pairs import read_windows
from tests.book.reading import figure_data, line, notebook
from tests.kit import ROOT
from tests.kit.cases import wrong

CHAPTER = "04"


# ---- figures --------------------------------------------------------------------------------------------------------


@functools.cache
def record() -> dict[str, Any]:
    """What tests/benchmarks/time_of_vocabulary.py wrote."""
    return json.loads((ROOT / "book" / "data" / "time_of_vocabulary.json").read_text())


def milliseconds(name: str) -> list[float]:
    return [float(f"{value / 1000:.1f}") for value in record()["microseconds"][name]]


@pytest.mark.parametrize("name", ["Embedding, autodiff", "gather, autodiff", "by hand", "by hand, XLA"])
def test_figure_of_times_is_the_record(name: str) -> None:
    (axes,) = figure_data(CHAPTER)[0]
    sizes, times = line(axes, name)
    np.testing.assert_array_equal(sizes, record()["sizes"])
    np.testing.assert_array_equal(times, milliseconds(name))


def test_table_of_times_is_the_record() -> None:
    (cell,) = [cell for cell in notebook(CHAPTER).cells if "milliseconds = {" in cell.source]
    names: dict[str, Any] = {}
    exec(cell.source.partition("\n\n")[0], names)
    assert names["sizes"] == record()["sizes"]
    assert names["milliseconds"] == {name: milliseconds(name) for name in record()["microseconds"]}


def test_record_says_what_the_text_makes_of_it() -> None:
    """The story needs this of a new record: the table costs, the derivative does not, compilation helps."""
    stock, gather, by_hand, stock_xla, by_hand_xla = (np.array(times) for times in record()["microseconds"].values())
    assert stock[-1] > 5 * gather[-1]
    assert (np.abs(np.log(gather / by_hand)) < np.log(1.15)).all()
    assert (by_hand > 1.5 * by_hand_xla).all()
    assert (stock_xla < 1.15 * by_hand_xla).all()


@pytest.mark.parametrize("name", ["Adam", "RMSprop", "Adagrad"])
def test_figure_of_first_steps_is_the_square_root(name: str) -> None:
    (axes,) = figure_data(CHAPTER)[1]
    occurrences, steps = line(axes, name)
    np.testing.assert_allclose(steps, np.sqrt(occurrences), rtol=1e-4)
    assert occurrences.max() == 100
    np.testing.assert_allclose(line(axes, "CoalesceGradients(Adam)")[1], 1, rtol=1e-4)


def cell_of(start: str) -> dict[str, Any]:
    """What the first paragraph of a cell defines."""
    (cell,) = [cell for cell in notebook(CHAPTER).cells if start in cell.source]
    names: dict[str, Any] = {}
    exec(cell.source.partition("\n\n")[0], names)
    return names


@functools.cache
def profile() -> dict[str, Any]:
    """What tests/benchmarks/profile_of_a_pass.py wrote."""
    return json.loads((ROOT / "book" / "data" / "word_profile.json").read_text())


def microseconds(name: str, clock: str = "seconds") -> float:
    return round(statistics.median(profile()[clock][name]) / profile()["pairs"] * 1e6, 2)


def over_windows(name: str, clock: str = "seconds") -> np.ndarray:
    """The quartiles of a time over that of `fit` on windows in the same turn."""
    ratio = np.divide(profile()[clock][name], profile()[clock]["windows: fit"])
    return np.quantile(ratio, [0.25, 0.75])


def test_table_of_the_profile_is_the_record() -> None:
    cell = cell_of("microseconds = {")
    for layout in ("pairs", "windows"):
        assert cell["microseconds"][layout] == [microseconds(f"{layout}: {step}") for step in cell["steps"]]
        assert cell["making"][layout] == microseconds(f"{layout}: making the batches")
    assert cell["gensim"] == microseconds("gensim, one worker")
    for shown, *how in (
        ("gensim", "gensim, one worker"),
        ("gensim, processor", "gensim, one worker", "processor_seconds"),
        ("windows, autodiff", "windows: fit, autodiff"),
    ):
        np.testing.assert_allclose(cell["over_windows"][shown], over_windows(*how), atol=5.1e-3)
    for shown, name in (("windows", "windows: fit"), ("gensim", "gensim, one worker")):
        assert cell["of_processor"][shown] == microseconds(name, "processor_seconds")
    pairs_of_times = zip(profile()["seconds"]["gensim, one worker"], profile()["seconds"]["windows: fit"], strict=True)
    assert cell["gensim_first"] == sum(theirs < ours for theirs, ours in pairs_of_times)
    assert abs(profile()["words_of_text"] - cell["text_of_profile"]) < 1500
    assert all(len(times) == profile()["rounds"] == cell["turns"] for times in profile()["seconds"].values())


@functools.cache
def similarity() -> dict[str, Any]:
    """What tests/benchmarks/quality_of_vectors.py wrote."""
    return json.loads((ROOT / "book" / "data" / "word_similarity.json").read_text())


def correlations(name: str) -> np.ndarray:
    return np.array([stats.spearmanr(similarity()["people"], row).statistic for row in similarity()["cosines"][name]])


@pytest.mark.parametrize(("shown", "name"), [("SkipGram", "companion"), ("gensim", "gensim")])
def test_table_of_correlations_is_the_record(shown: str, name: str) -> None:
    cell = cell_of("correlation = {")
    assert cell["known"] == len(similarity()["pairs"]) == len(similarity()["people"])
    np.testing.assert_allclose(cell["correlation"][shown], correlations(name), atol=5.1e-4)


def test_figure_of_windows_is_a_band() -> None:
    """In the text ones around each centre, in one piece and as far as five; beside it the noise of that many pairs."""
    (axes,) = figure_data(CHAPTER)[2]
    (image,) = (np.array(values) for values in axes["images"])
    assert image.shape == (22, 48)
    for centre, row in enumerate(image[:, :32], 5):
        near = np.flatnonzero(row)
        assert set(row) <= {0, 1}
        assert row[centre] == 0
        reach = max(centre - near.min(initial=centre), near.max(initial=centre) - centre)
        assert 1 <= reach <= 5
        assert list(near) == [c for c in range(centre - reach, centre + reach + 1) if c != centre]
    pairs = image[:, :32].sum(axis=1, keepdims=True)
    missing = pairs - image[:, 32:] / (5 / 16)
    np.testing.assert_allclose(missing, np.round(missing), atol=1e-4)
    assert set(np.round(missing).ravel()) <= {0, 1}


def test_profile_says_what_the_text_makes_of_it() -> None:
    """The story needs this of a new record: windows keep up with gensim, pairs do not, and rows take half the step."""
    gensim = microseconds("gensim, one worker")
    assert microseconds("windows: fit") < gensim < microseconds("pairs: fit") / 2
    ratios = cell_of("microseconds = {")["over_windows"]
    assert ratios["gensim"][0] > 1 > ratios["windows, autodiff"][0]
    assert ratios["windows, autodiff"][1] < 1.1
    assert microseconds("pairs: rows") > 0.6 * microseconds("pairs: step")
    assert 0.4 < microseconds("windows: rows") / microseconds("windows: step") < 0.6
    assert 1.15 < microseconds("windows: fit") / microseconds("windows: step") < 1.25


@pytest.mark.claim("In processor time, all threads added up, windows and gensim are level", chapter="04")
@pytest.mark.parametrize("clock", ["processor_seconds", wrong("seconds", why="`fit` uses both cores")])
def test_windows_and_gensim_cost_the_same_work(clock: str) -> None:
    """No quarter of the turns decides: the middle half has 1 in it."""
    least, most = over_windows("gensim, one worker", clock)
    assert least < 1 < most


def test_interval_of_the_difference_over_other_pairs_is_the_record() -> None:
    cell, random = cell_of("correlation = {"), np.random.default_rng(0)
    people, cosines = np.array(similarity()["people"]), {k: np.array(v) for k, v in similarity()["cosines"].items()}
    differences = []
    for _ in range(1000):
        drawn = random.integers(len(people), size=len(people))
        means = [
            np.mean([stats.spearmanr(people[drawn], row[drawn]).statistic for row in cosines[name]])
            for name in ("companion", "gensim")
        ]
        differences.append(means[0] - means[1])
    np.testing.assert_allclose(cell["other_pairs"], np.quantile(differences, [0.025, 0.975]), atol=0.02)


# ---- claims ---------------------------------------------------------------------------------------------------------


def assigned(gradient: tf.IndexedSlices) -> np.ndarray:
    """What remains if the rows of one id overwrite each other."""
    table = np.zeros(gradient.dense_shape)
    table[gradient.indices] = gradient.values
    return table


@pytest.mark.claim(
    "The gradient by hand equals that of automatic differentiation, repeated ids included.", chapter="04"
)
@pytest.mark.parametrize("to_dense", [tf.convert_to_tensor, wrong(assigned, why="the last occurrence wins")])
def test_by_hand_equals_autodiff(to_dense: Callable[..., Any]) -> None:
    """The other side is a tape around a dense one-hot product: no lookup, no ids."""
    random = np.random.default_rng(0)
    centres, candidates = random.integers(5, size=30), random.integers(5, size=(30, 4))
    model = companion.SkipGram(5, 3, negatives=3, dtype="float64")
    model.set_weights([random.normal(size=(5, 3)) for _ in range(2)])
    _, by_hand = model.closed_form(tf.constant(centres), tf.constant(candidates))
    tables = [tf.Variable(weight) for weight in model.get_weights()]
    with tf.GradientTape() as tape:
        u, v = (
            tf.one_hot(centres, 5, dtype="float64") @ tables[0],
            tf.one_hot(candidates, 5, dtype="float64") @ tables[1],
        )
        scores = tf.reduce_sum(u[:, None] * v, axis=2)
        loss = -tf.reduce_sum(tf.math.log(tf.sigmoid(scores[:, 0])))
        loss -= tf.reduce_sum(tf.math.log(tf.sigmoid(-scores[:, 1:])))
    for ours, theirs in zip(by_hand, tape.gradient(loss, tables), strict=True):
        np.testing.assert_allclose(to_dense(ours), theirs, rtol=1e-11, atol=1e-13)


def lengths_in_graph(function: Callable[..., Any]) -> set[int]:
    graph = tf.function(function).get_concrete_function(tf.constant([1, 1, 2])).graph
    outputs = [output for operation in graph.get_operations() for output in operation.outputs]
    return {output.shape[0] for output in outputs if output.shape.rank}


def by_row() -> Any:
    return tf.IndexedSlices(tf.ones((1, 3)), [3], tf.constant([777, 3]))


def all_rows() -> Any:
    return tf.ones((777, 3))


@pytest.mark.claim(
    "Trained by gradient descent without XLA, the `Embedding` layer copies its whole table at every step; `tf.gather` "
    "on the variable reads the rows of the batch.",
    chapter="04",
)
@pytest.mark.parametrize("gradient", [by_row, wrong(all_rows, why="a table that is only written whole is lent out")])
def test_embedding_copies_its_whole_table(gradient: Callable[[], Any]) -> None:
    """The layer reads the table whole; and once an optimizer has moved rows, no two such reads share memory."""
    with tf.device("CPU"):
        layer = keras.layers.Embedding(777, 3)
        layer.build()
        assert 777 in lengths_in_graph(layer)
        assert 777 not in lengths_in_graph(lambda ids: tf.gather(layer.embeddings.value, ids))
        for shared in (True, False):
            reads = [tf.convert_to_tensor(layer.embeddings.value) for _ in range(2)]
            one, other = (np.asarray(memoryview(read)).ctypes.data for read in reads)
            assert (one == other) is shared
            keras.optimizers.SGD(0.1).apply([gradient()], [layer.embeddings])


@pytest.mark.claim("Where there is no GPU, Keras leaves XLA off unless you say `jit_compile=True`.", chapter="04")
@pytest.mark.skipif(bool(tf.config.list_physical_devices("GPU")), reason="there is a GPU")
def test_xla_is_off_by_default() -> None:
    model = keras.Sequential([keras.Input((1,)), keras.layers.Dense(1)])
    model.compile("sgd", "mse")
    assert model.jit_compile is False
    model.compile("sgd", "mse", jit_compile=True)
    assert model.jit_compile is True


def step_on_pieces(optimizer: keras.optimizers.Optimizer, pieces: int) -> float:
    """The step of one weight whose gradient is a hundred, told in equal pieces."""
    weight = keras.Variable(np.zeros((1, 1)), dtype="float64")
    rows = tf.fill((pieces, 1), tf.constant(100 / pieces, "float64"))
    optimizer.apply([tf.IndexedSlices(rows, [0] * pieces, tf.constant([1, 1]))], [weight])
    return float(weight.numpy()[0, 0])


def adagrad(rate: float) -> keras.optimizers.Optimizer:
    return keras.optimizers.Adagrad(rate, initial_accumulator_value=0.0)


@pytest.mark.claim(
    "When an id repeats in a batch, Adam, Adagrad and RMSprop square each occurrence by itself, and their first step "
    "is √n times too long for a row that occurs n times alike.",
    chapter="04",
)
@pytest.mark.parametrize("pieces", [2, 9, 50])
@pytest.mark.parametrize(
    "make",
    [
        keras.optimizers.Adam,
        keras.optimizers.RMSprop,
        adagrad,
        wrong(keras.optimizers.SGD, why="it adds"),
        wrong(lambda rate: companion.CoalesceGradients(keras.optimizers.Adam(rate)), why="the repair"),
    ],
)
def test_first_step_is_too_long(make: Callable[[float], Any], pieces: int) -> None:
    ratio = step_on_pieces(make(0.1), pieces) / step_on_pieces(make(0.1), 1)
    assert ratio == pytest.approx(np.sqrt(pieces), rel=1e-5)


@pytest.mark.claim("Where the occurrences pull against each other, the step can come out too short.", chapter="04")
@pytest.mark.parametrize("make", [keras.optimizers.Adam, keras.optimizers.RMSprop, adagrad])
def test_first_step_is_too_short(make: Callable[[float], Any]) -> None:
    """By the root of the sum of squares over the sum, as a first step divides by it."""
    weight = keras.Variable(np.zeros((1, 1)), dtype="float64")
    pieces = np.array([500.0, -300, -200, 400])
    make(0.1).apply([tf.IndexedSlices(pieces[:, None], [0] * 4, tf.constant([1, 1]))], [weight])
    judge = keras.Variable(np.zeros((1, 1)), dtype="float64")
    make(0.1).apply([tf.constant([[pieces.sum()]])], [judge])
    expected = abs(pieces.sum()) / np.sqrt((pieces**2).sum())
    assert weight.numpy() / judge.numpy() == pytest.approx(expected, rel=1e-5)
    assert expected < 1


@pytest.mark.claim(
    "Gradient descent only adds, so for it a row that repeats in a batch is as good as the sum of its occurrences.",
    chapter="04",
)
@pytest.mark.parametrize("make", [keras.optimizers.SGD, companion.SGD, wrong(keras.optimizers.Adam, why="it squares")])
def test_gradient_descent_adds(make: Callable[[float], Any]) -> None:
    assert step_on_pieces(make(0.1), 8) == pytest.approx(step_on_pieces(make(0.1), 1), rel=1e-12)


@pytest.mark.claim("`SkipGram` sums rows that share an id by itself, wherever the optimizer would not.", chapter="04")
@pytest.mark.parametrize("gradients", ["closed_form", "autodiff"])
@pytest.mark.parametrize("make", [keras.optimizers.Adam, adagrad, keras.optimizers.SGD])
def test_skip_gram_sums_rows(make: Callable[[float], Any], gradients: str) -> None:
    """A batch that holds one pair six times, without negatives of its own, against the dense gradient, six times it."""
    model = companion.SkipGram(4, 2, negatives=1, gradients=gradients, dtype="float64")
    random = np.random.default_rng(0)
    u, v = random.normal(size=(2, 4, 2))
    model.set_weights([u, v])
    model.compile(make(0.1))
    model.train_on_batch((np.array([1] * 6), np.array([[2, 3]] * 6)))
    errors = 1 / (1 + np.exp(-v[2:] @ u[1])) - [1, 0]
    gradient = np.zeros((4, 2))
    gradient[1] = 6 * errors @ v[2:]
    judge = keras.Variable(u, dtype="float64")
    make(0.1).apply([tf.constant(gradient)], [judge])
    np.testing.assert_allclose(model.get_weights()[0], judge.numpy(), rtol=1e-7)


@pytest.mark.claim("Under Adam a row that is not in the batch moves too: its momentum has not run out.", chapter="04")
@pytest.mark.parametrize("make", [keras.optimizers.Adam, wrong(keras.optimizers.SGD, why="it has no momentum")])
def test_row_outside_the_batch_moves(make: Callable[[float], Any]) -> None:
    table = keras.Variable(np.zeros((3, 1)), dtype="float64")
    optimizer = make(0.1)
    places = []
    for row in (0, 1):
        gradient = tf.IndexedSlices(tf.ones((1, 1), "float64"), [row], tf.constant([3, 1]))
        optimizer.apply([gradient], [table])
        places.append(table.numpy().ravel())
    assert places[1][0] < places[0][0] < 0
    assert places[1][2] == 0


def softplus(score: np.ndarray) -> np.ndarray:
    return np.log1p(np.exp(score))


TEXT = np.array([[3, 1, 2, 1, 0, 4], [0, 0, 1, 2, 3, 2]], "int32")
LEFT, RIGHT = np.array([[1, 2], [0, 1]], "int32"), np.array([[2, 1], [1, 2]], "int32")
PAIRS = [  # piece, centre, neighbour, read off the text by hand: two centres, in places two and three of each piece
    *[(0, 2, 1), (0, 2, 1), (0, 2, 0), (0, 1, 1), (0, 1, 2), (0, 1, 0)],
    *[(1, 1, 2), (1, 2, 1), (1, 2, 3), (1, 2, 2)],
]


def all_weights_one(centres: Any, candidates: Any, near: Any, weight: Any) -> Any:
    return centres, candidates, near, tf.ones_like(weight)


@pytest.mark.claim(
    "A batch in windows has the gradient of all its pairs, written out and weighted.",
    chapter="04",
)
@pytest.mark.parametrize(
    "counted", [lambda *read: read, wrong(all_weights_one, why="as if every candidate were a pair")]
)
def test_windows_have_the_gradient_of_their_pairs(counted: Callable[..., Any]) -> None:
    drawn = np.array([[4, 1, 3], [2, 0, 0]], "int32")
    model = companion.SkipGram(5, 3, negatives=2, dtype="float64")
    u, v = np.random.default_rng(0).normal(size=(2, 5, 3))
    model.set_weights([u, v])
    du, dv = np.zeros((2, 5, 3))
    for piece, centre, neighbour in PAIRS:
        for word, y, weight in [(neighbour, 1, 1), *((n, 0, 2 / 3 * (n != neighbour)) for n in drawn[piece])]:
            error = weight * (1 / (1 + np.exp(-u[centre] @ v[word])) - y)
            du[centre] += error * v[word]
            dv[word] += error * u[centre]
    read = read_windows(*map(tf.constant, (TEXT, LEFT, RIGHT, drawn)), 2, "float64")
    _, gradients = model.closed_form(*counted(*read))
    for found, expected in zip(gradients, (du, dv), strict=True):
        np.testing.assert_allclose(tf.convert_to_tensor(found), expected, rtol=1e-11, atol=1e-13)


@pytest.mark.claim(
    "The random words are shared, so their noise is; the loss on average is that of pairs with five random words each, "
    "less those that equal the neighbour.",
    chapter="04",
)
@pytest.mark.parametrize("count", [5, wrong(1, why="each shared word counts once")])
def test_expected_loss_is_that_of_five_words(count: int) -> None:
    """Every word that one place may draw, by its probability, against the sum over pairs; equal ones are left out."""
    noise = np.array([0.4, 0.3, 0.15, 0.1, 0.05])
    u, v = np.random.default_rng(0).normal(size=(2, 5, 3))
    model = companion.SkipGram(5, 3, negatives=count, dtype="float64")
    model.set_weights([u, v])
    found = 0.0
    for word, share in enumerate(noise):
        drawn = np.full((2, 1), word, "int32")
        read = read_windows(*map(tf.constant, (TEXT, LEFT, RIGHT, drawn)), count, "float64")
        found += share * float(model.closed_form(*read)[0])
    expected = 0.0
    for _, centre, neighbour in PAIRS:
        negatives = noise * softplus(v @ u[centre])
        expected += softplus(-v[neighbour] @ u[centre]) + 5 * (negatives.sum() - negatives[neighbour])
    assert found == pytest.approx(expected, rel=1e-12)


@pytest.mark.claim("`SkipGram`, trained on windows, does not rank these 46 pairs worse than gensim does.", chapter="04")
@pytest.mark.parametrize("sign", [1, wrong(-1, why="the other way round they would be")])
def test_vectors_are_not_worse(sign: int) -> None:
    """Welch's interval of the difference over seeds: not below zero by more than a hundredth."""
    found = stats.ttest_ind(correlations("companion"), correlations("gensim"), equal_var=False).confidence_interval()
    assert sign * (found.low if sign > 0 else found.high) > -0.01
