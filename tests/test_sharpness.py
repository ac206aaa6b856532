"""Holds `companion.sharpness` against the eigenvalues of the whole Hessian, which small models allow to write down."""

import gc
import sys
import weakref
from typing import Any

import keras
import numpy as np
import pytest
import scipy.sparse
import tensorflow as tf

import companion
from companion.oracle import GradientOracle
from tests.kit import cases as kit
from tests.kit.dtypes import set_dtype
from tests.kit.network import Digits, flat, loss_and_gradient

L = keras.layers
GENERATOR = np.random.default_rng(0)
X, CLASSES, WEIGHTS = GENERATOR.normal(size=(20, 5)), GENERATOR.integers(0, 3, 20), GENERATOR.uniform(0.5, 2, 20)
pytestmark = pytest.mark.usefixtures("float64")


def compiled(layers: list[Any], loss: Any = None, **options: Any) -> Any:
    keras.utils.set_random_seed(1)
    model = keras.Sequential(layers)
    loss = loss or keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile("adam", loss, metrics=["accuracy"], **options)
    return model


def classifier(activation: str = "tanh", **options: Any) -> Any:
    kernel = {"kernel_regularizer": keras.regularizers.L2(0.05)}
    return compiled([keras.Input((5,)), L.Dense(4, activation, **kernel), L.Dense(3)], **options)


def hessian(model: Any, x: Any = X, y: Any = CLASSES, sample_weight: Any = None) -> np.ndarray:
    """By differentiating each entry of the gradient of what Keras computes in an evaluation."""
    values = [variable.value for variable in model.trainable_variables]
    with tf.GradientTape(persistent=True) as outer:
        with tf.GradientTape() as inner:
            loss = model.compute_loss(x, y, model(x, training=False), sample_weight, training=False)
        found = inner.gradient(loss, values)
        entries = tf.unstack(tf.concat([tf.reshape(tf.convert_to_tensor(each), [-1]) for each in found], 0))
    rows = [outer.gradient(entry, values, unconnected_gradients="zero") for entry in entries]
    matrix = np.array([flat([tf.convert_to_tensor(each).numpy() for each in row]) for row in rows], "float64")
    return (matrix + matrix.T) / 2


def steepest(model: Any, *data: Any) -> float:
    return float(np.linalg.eigvalsh(hessian(model, *data))[-1])


def differences(model: Any, x: Any, y: Any, distance: float = 1e-2) -> float:
    """What a difference of gradients makes of it, along the vector that belongs to the eigenvalue."""
    weights = model.get_weights()
    vector = np.linalg.eigh(hessian(model, x, y))[1][:, -1]
    cuts = np.cumsum([weight.size for weight in weights])[:-1]
    along = [part.reshape(w.shape) for part, w in zip(np.split(vector, cuts), weights, strict=True)]
    ends = [[w + sign * distance * a for w, a in zip(weights, along, strict=True)] for sign in (1, -1)]
    oracle = GradientOracle(model, (x, y), training=False)
    there, back = (flat([each.numpy() for each in oracle(end)]) for end in ends)
    return float(vector @ (there - back) / (2 * distance))


@pytest.mark.parametrize(
    "measure", [companion.sharpness, kit.wrong(differences, why="a ReLU has its kink between the two points")]
)
def test_it_is_the_largest_eigenvalue(measure: Any) -> None:
    model = classifier("relu")
    assert measure(model, X, CLASSES) == pytest.approx(steepest(model), rel=1e-6)


def test_it_is_that_of_numpys_differences_on_a_smooth_network() -> None:
    model = compiled([keras.Input((5,)), L.Dense(4, "tanh"), L.Dense(3)], jit_compile=False)
    weights = model.get_weights()
    start, size = flat(weights), 1e-5

    def slope(point: np.ndarray) -> np.ndarray:
        parts = np.split(point, np.cumsum([weight.size for weight in weights])[:-1])
        shaped = [part.reshape(weight.shape) for part, weight in zip(parts, weights, strict=True)]
        return flat(loss_and_gradient(shaped, X, CLASSES)[1])

    rows = [(slope(start + step) - slope(start - step)) / (2 * size) for step in size * np.eye(start.size)]
    assert companion.sharpness(model, X, CLASSES) == pytest.approx(np.linalg.eigvalsh(rows)[-1], rel=1e-6)


@pytest.mark.parametrize(
    "options",
    [{"batch_size": 12, "micro_batches": 2}, pytest.param({"batch_size": 7}, marks=pytest.mark.slow)],
    ids=str,
)
def test_batches_do_not_change_it(options: dict[str, int]) -> None:
    model = classifier()
    found = companion.sharpness(model, X, CLASSES, WEIGHTS, **options)
    assert found == pytest.approx(steepest(model, X, CLASSES, WEIGHTS), rel=1e-6)


@pytest.mark.parametrize("recurrence", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_masks_and_embeddings(recurrence: bool) -> None:
    ids, tags = GENERATOR.integers(1, 6, (8, 4)), GENERATOR.integers(0, 3, (8, 4))
    ids[3:, 2:] = 0
    layers = [L.SimpleRNN(2, return_sequences=True, unroll=True)] if recurrence else [L.Dense(2, "tanh")]
    model = compiled([keras.Input((4,), dtype="int32"), L.Embedding(6, 2, mask_zero=True), *layers, L.Dense(3)])
    assert companion.sharpness(model, ids, tags) == pytest.approx(steepest(model, ids, tags), rel=1e-6)


def test_layers_act_as_in_inference_and_nothing_moves() -> None:
    layers = [L.Dense(4, "tanh"), L.BatchNormalization(), L.Dropout(0.5), L.GaussianNoise(1.0), L.Dense(3)]
    model = compiled([keras.Input((5,)), *layers])
    model.fit(X, CLASSES, verbose=0)
    variables = [*model.variables, *model.optimizer.variables]
    before = [variable.numpy() for variable in variables]
    found = companion.sharpness(model, X, CLASSES)
    assert all(np.array_equal(old, new.numpy()) for old, new in zip(before, variables, strict=True))
    assert found == companion.sharpness(model, X, CLASSES)
    assert found == pytest.approx(steepest(model), rel=1e-6)


def test_frozen_layers_do_not_count() -> None:
    model = classifier()
    model.layers[0].trainable = False
    assert companion.sharpness(model, X, CLASSES) == pytest.approx(steepest(model), rel=1e-6)
    model.layers[1].trainable = False
    with pytest.raises(ValueError, match="`model` has no trainable weights"):
        companion.sharpness(model, X, CLASSES)


def test_it_is_traced_once_and_heeds_what_has_changed(monkeypatch: pytest.MonkeyPatch) -> None:
    model, traces, inherited = classifier(), list[int](), GradientOracle.curvature

    def curvature(self: Any, direction: Any) -> Any:
        traces.append(1)
        return inherited(self, direction)

    def traced(*data: Any, exact: float | None = None) -> int:
        """How often a call has traced, once it is certain that its answer is right."""
        before = len(traces)
        found = companion.sharpness(model, *data)
        assert found == pytest.approx(exact or steepest(model, *data), rel=1e-6)
        return len(traces) - before

    monkeypatch.setattr(GradientOracle, "curvature", curvature)
    monkeypatch.setattr(sys.modules["companion.sharpness"], "_SHAPES", 2)
    first = steepest(model)
    assert [traced(X, CLASSES, exact=first) for _ in range(3)] == [1, 0, 0]
    model.set_weights([weight * 1.5 for weight in model.get_weights()])
    assert traced(X, CLASSES) == traced(X[::-1] * 2, CLASSES) == 0
    assert [traced(X, CLASSES, WEIGHTS), traced(X, CLASSES)] == [1, 0]
    assert [traced(X[:9], CLASSES[:9]), traced(X, CLASSES)] == [1, 1]  # more than are kept
    model.layers[0].trainable = False
    assert traced(X, CLASSES) == 1
    model.layers[0].trainable = True
    model.compile("sgd", keras.losses.SparseCategoricalCrossentropy(from_logits=True, reduction="sum"))
    assert traced(X, CLASSES) == 1
    model.layers[0].kernel_regularizer.l2, _ = 3.0, model.compile("sgd", model.loss)
    assert traced(X, CLASSES) == 1


def test_a_model_that_was_asked_about_is_not_kept() -> None:
    model = classifier()
    companion.sharpness(model, X, CLASSES)
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None


def test_a_model_whose_loss_is_not_compiled_is_traced_anew() -> None:
    class Bent(keras.Sequential):
        factor = 1.0

        def compute_loss(self, x: Any, y: Any, y_pred: Any, *args: Any, **kwargs: Any) -> Any:
            return self.factor * keras.ops.mean(y_pred**2)

    model = Bent([keras.Input((2,)), L.Dense(1, use_bias=False)])
    model.compile("sgd", "mse")
    assert companion.sharpness(model, np.eye(2), np.zeros((2, 1))) == pytest.approx(1.0)
    for factor in (2.0, 3.0):
        model.factor, _ = factor, model.compile("sgd")
        assert companion.sharpness(model, np.eye(2), np.zeros((2, 1))) == pytest.approx(factor)


@pytest.mark.parametrize(
    ("dtype", "precision"), [("float32", 1e-5), ("bfloat16", 0.02), ("float16", 0.002), ("mixed_float16", 0.002)]
)
def test_every_precision(dtype: str, precision: float) -> None:
    layers = lambda: [keras.Input((5,)), L.Dense(4, "tanh"), L.Dense(3)]  # noqa: E731
    reference = compiled(layers())
    exact = steepest(reference)
    keras.config.set_floatx("float32")
    keras.config.set_dtype_policy(dtype)
    model = compiled(layers())
    model.set_weights(reference.get_weights())
    found = companion.sharpness(model, X, CLASSES, tolerance=precision)
    assert isinstance(found, float)
    assert found == pytest.approx(exact, rel=precision)
    set_dtype("float64")


def test_it_is_the_limit_of_gradient_descent_on_the_digits() -> None:
    """The largest of the ends of the spectrum, and the one that power iteration in NumPy finds."""
    digits = Digits(hidden=8, rows=300)
    model = compiled([keras.Input((64,)), L.Dense(8, "tanh"), L.Dense(10)], jit_compile=False)
    model.set_weights(digits.weights)
    exact = digits.largest_curvature(digits.start)
    assert companion.sharpness(model, digits.x, digits.y, tolerance=1e-4) == pytest.approx(exact, rel=5e-3)


def test_a_long_spectrum_needs_a_restart() -> None:
    """Least squares on a diagonal: the eigenvalues are known, and close to each other."""
    curvatures = np.linspace(1.0, 2.0, 200)
    model = compiled([keras.Input((200,)), L.Dense(1, use_bias=False)], "mse")
    x = np.diag(np.sqrt(curvatures * 200 / 2))
    assert companion.sharpness(model, x, np.zeros((200, 1))) == pytest.approx(2.0, rel=1e-6)
    with pytest.warns(UserWarning, match="raise `max_products` or `tolerance`"):
        companion.sharpness(model, x, np.zeros((200, 1)), max_products=5)


def test_a_loss_that_bends_down_has_a_negative_one() -> None:
    model = compiled([keras.Input((2,)), L.Dense(1, use_bias=False)], lambda y, p: -((y - p) ** 2))
    assert companion.sharpness(model, np.eye(2) * [[1.0], [2.0]], np.zeros((2, 1))) == pytest.approx(-1.0)
    linear = compiled([keras.Input((2,)), L.Dense(1, use_bias=False)], lambda y, p: p)
    assert companion.sharpness(linear, np.eye(2), np.zeros((2, 1))) == 0.0


def test_a_second_derivative_that_is_missing_is_noticed() -> None:
    """TensorFlow has none for bilinear interpolation, and takes it for 0, without a word."""
    images, targets = GENERATOR.normal(size=(4, 4, 4, 1)), GENERATOR.normal(size=(4, 2))

    def model(interpolation: str) -> Any:
        up = L.UpSampling2D(2, interpolation=interpolation)
        return compiled([keras.Input((4, 4, 1)), L.Conv2D(2, 3, activation="tanh"), up, L.Flatten(), L.Dense(2)], "mse")

    with pytest.raises(ValueError, match=r"not symmetric.*for `interpolation=\"nearest\"` it has"):
        companion.sharpness(model("bilinear"), images, targets)
    nearest = model("nearest")
    assert companion.sharpness(nearest, images, targets) == pytest.approx(steepest(nearest, images, targets), rel=1e-6)


def test_data_sets_are_taken() -> None:
    class Batches(keras.utils.PyDataset):
        num_batches = 2

        def __getitem__(self, index: int) -> Any:
            return X[10 * index : 10 * index + 10], CLASSES[10 * index : 10 * index + 10]

    model = classifier()
    exact = pytest.approx(steepest(model), rel=1e-6)
    assert companion.sharpness(model, tf.data.Dataset.from_tensor_slices((X, CLASSES)).batch(8)) == exact
    assert companion.sharpness(model, Batches()) == exact


def test_sparse_inputs() -> None:
    """A table that is mostly zeros, in each form that ``fit`` takes."""
    inputs = keras.Input((5,), sparse=True)
    model = keras.Model(inputs, L.Dense(3)(inputs))
    model.compile("sgd", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    table = np.where(np.abs(X) > 1, X, 0)
    exact = pytest.approx(companion.sharpness(model, table, CLASSES), rel=1e-6)
    sparse = tf.sparse.from_dense(table)
    assert companion.sharpness(model, sparse, CLASSES) == exact
    assert companion.sharpness(model, scipy.sparse.csr_matrix(table), CLASSES, batch_size=7) == exact
    assert companion.sharpness(model, tf.data.Dataset.from_tensor_slices((sparse, CLASSES)).batch(8)) == exact


def test_what_is_wrong_is_said() -> None:
    model = classifier()
    lengths = tf.data.Dataset.from_tensor_slices((np.arange(1, 5), np.zeros(4))).map(lambda n, y: (tf.range(n), y))
    endless = tf.data.Dataset.from_tensor_slices((X, CLASSES)).batch(8).repeat()
    for data, options, message in [
        ((X, CLASSES), {"tolerance": 0.0}, "`tolerance` must be a number"),
        ((X, CLASSES), {"max_products": 0}, "`max_products` must be an integer of at least 1"),
        ((X, CLASSES), {"batch_size": 0}, "`batch_size` must be an integer of at least 1"),
        ((X, CLASSES), {"micro_batches": 1.5}, "`micro_batches` must be an integer of at least 1"),
        ((X,), {}, "`data` must hold targets"),
        ((X * np.nan, CLASSES), {}, "The Hessian is not finite"),
        ((lengths.padded_batch(2),), {}, "pad all to one length"),
        ((object(), CLASSES), {}, "must hold arrays or tensors"),
        ((endless,), {}, "`x` must be a finite data set"),
        ((endless, CLASSES), {}, "`y` and `sample_weight` must be left out"),
    ]:
        with pytest.raises(ValueError, match=message):
            companion.sharpness(model, *data, **options)
    with pytest.raises(TypeError, match=r"`model` must be a keras.Model"):
        companion.sharpness(None, X, CLASSES)
