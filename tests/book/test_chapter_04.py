"""What chapter 04 claims, tried on the real Keras; and the data under its figures against the record and a formula."""

import functools
import json
from collections.abc import Callable
from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf

import companion
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
    return [float(f"{value / 1000:.2f}") for value in record()["microseconds"][name]]


@pytest.mark.parametrize("name", ["Embedding, autodiff", "gather, autodiff", "by hand", "by hand, XLA"])
def test_figure_of_times_is_the_record(name: str) -> None:
    (axes,) = figure_data(CHAPTER)[2]
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


def test_picture_of_a_pair_has_the_rows_that_one_pair_reads() -> None:
    """Of 26 rows in each table one on the left, and on the right the neighbour and five negatives."""
    (axes,) = figure_data(CHAPTER)[1]
    for side, read in (([0, 1.2], 1), ([2.4, 3.6], 6)):
        rows = [entry for entry in axes["lines"] if entry["x"] == side]
        assert sorted(entry["y"][0] for entry in rows) == list(range(26))
        assert sum(entry["label"] != "not read" for entry in rows) == read


def test_picture_of_the_copy_has_every_row_twice_where_take_reads_and_once_where_gather_does() -> None:
    for axes, copied in zip(figure_data(CHAPTER)[3], (20, 0), strict=True):
        drawn = [entry["label"] for entry in axes["lines"]]
        assert [drawn.count(name) for name in ("table", "copy", "rows")] == [20, copied, 3]


@pytest.mark.parametrize("name", ["Adam", "RMSprop", "Adagrad"])
def test_figure_of_first_steps_is_the_square_root(name: str) -> None:
    (axes,) = figure_data(CHAPTER)[0]
    occurrences, steps = line(axes, name)
    np.testing.assert_allclose(steps, np.sqrt(occurrences), rtol=1e-4)
    assert occurrences.max() == 100
    np.testing.assert_allclose(line(axes, "CoalesceGradients(Adam)")[1], 1, rtol=1e-4)


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


def test_layer_of_rows_reads_rows_and_survives_a_file(tmp_path: Any) -> None:
    """The chapter's subclass: the table's output and gradient, and nothing as long as the table."""
    (code,) = (cell.source for cell in notebook(CHAPTER).cells if "class RowEmbedding(" in cell.source)
    names: dict[str, Any] = {"keras": keras, "tf": tf}
    exec(code.partition("\n\n\ndef ")[0], names)
    layer = names["RowEmbedding"](777, 3)
    layer.build()
    assert 777 not in lengths_in_graph(layer)
    ids = tf.constant([[1, 1, 5]])
    with tf.GradientTape() as tape:
        found = layer(ids)
    gradient = tape.gradient(found, layer.embeddings.value)
    np.testing.assert_array_equal(found, layer.embeddings.numpy()[ids])
    np.testing.assert_array_equal(gradient.indices, [1, 1, 5])
    keras.Sequential([keras.Input((3,), dtype="int32"), layer]).save(tmp_path / "model.keras")
    np.testing.assert_array_equal(keras.saving.load_model(tmp_path / "model.keras")(ids), found)


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
    "is √n times too long for a row that occurs n times with the same gradient.",
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
    "Gradient descent only adds, so it makes the same step from rows that repeat in a batch as from one row with their "
    "sum.",
    chapter="04",
)
@pytest.mark.parametrize("make", [keras.optimizers.SGD, companion.SGD, wrong(keras.optimizers.Adam, why="it squares")])
def test_gradient_descent_adds(make: Callable[[float], Any]) -> None:
    assert step_on_pieces(make(0.1), 8) == pytest.approx(step_on_pieces(make(0.1), 1), rel=1e-12)


@pytest.mark.claim("`SkipGram` adds up the rows of each id for you, whatever the optimizer.", chapter="04")
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
