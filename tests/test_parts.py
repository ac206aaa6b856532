"""Holds what is divided into parts, and what is refused because it is not known to be divisible."""

import re
from collections.abc import Callable
from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import ops
from keras.src.losses.losses import LossFunctionWrapper

from companion import GradientAccumulation, GradientOracle, Heun, inject
from companion.denominators import mixes_examples
from tests.kit.models import CASES, SGD

L, K = keras.layers, keras.losses


def numbers(*shape: int, seed: int = 0) -> Any:
    return np.random.default_rng(seed).normal(size=shape).astype("float32")


def linear(loss: Any = "mse", width: int = 1) -> Any:
    keras.utils.set_random_seed(0)
    model = keras.Sequential([keras.Input((4,)), L.Dense(width)])
    model.compile(SGD(0.1), loss)
    return model


def in_a_graph(model: Any, batch: Any) -> Callable[[], Any]:
    """A training step whose number of rows is not known, as in ``fit``."""
    loose = lambda t: tf.TensorSpec([None, *t.shape[1:]], t.dtype)  # noqa: E731
    specs = keras.tree.map_structure(
        lambda t: (
            tf.SparseTensorSpec([None, *t.shape[1:]], t.dtype)
            if isinstance(t, tf.SparseTensor)
            else tf.RaggedTensorSpec([None, *t.shape[1:]], t.dtype, t.ragged_rank)
            if isinstance(t, tf.RaggedTensor)
            else loose(t)
        ),
        batch,
    )
    step = tf.function(model.train_step, autograph=False, input_signature=[specs])
    return lambda: step(batch)


# Rows


@pytest.mark.parametrize("graph", [False, True])
@pytest.mark.parametrize(
    ("batch", "named"),
    [
        (((numbers(6, 4), numbers(1, 4)), numbers(6, 1)), r"`x\[1\]`.*x\[1\].*1.*x\[0\].*6"),
        (({"a": numbers(6, 4), "b": numbers(7, 4)}, numbers(6, 1)), r"`x\[\W+b\W+`.*x\[\W+b\W.*7.*6"),
        ((numbers(6, 4), numbers(1, 1)), "`y`.*y.*1.*x.*6"),
        ((numbers(6, 4), numbers(6, 1), numbers(3)), "`sample_weight`.*3.*6"),
    ],
    ids=["tuple", "dict", "y", "weights"],
)
def test_tensors_of_different_length_are_named_and_nothing_moves(batch: Any, named: str, graph: bool) -> None:
    class Sum(keras.Model):
        def __init__(self) -> None:
            super().__init__()
            self.dense, self.norm = L.Dense(1), L.BatchNormalization()

        def call(self, inputs: Any, training: bool = False) -> Any:
            first, *others = keras.tree.flatten(inputs)
            return self.dense(self.norm(first, training=training) + sum(ops.sum(other) for other in others))

    model = Sum()
    model(batch[0])
    model.compile(SGD(0.1), "mse")
    inject(model, 3)
    before = model.get_weights()
    batch = keras.tree.map_structure(tf.constant, batch)
    step = in_a_graph(model, batch) if graph else lambda: model.train_step(batch)
    with pytest.raises(tf.errors.InvalidArgumentError if graph else ValueError, match=f"(?s){named}") as error:
        step()
    for word in ("`micro_batches` at 1", "tf.repeat", "GradientAccumulation"):
        assert word in str(error.value)
    assert all(np.array_equal(one, other) for one, other in zip(before, model.get_weights(), strict=True))


def test_a_scalar_among_the_inputs_has_no_rows() -> None:
    model = CASES["subclass without training"]().model
    with pytest.raises(ValueError, match=re.escape("x[1] with no rows, of shape ()")):
        GradientOracle(model, ((numbers(4, 4), np.float32(2)), numbers(4, 1)), 2)


def test_the_ways_out_of_different_lengths_work() -> None:
    """One part; a row for each example; smaller batches to an accumulation. All give Keras's weights."""
    batch = {"anchors": numbers(1, 4), "image": numbers(6, 4)}
    y = numbers(6, 1, seed=1)

    def weights(change: Callable[[Any], Any], *batches: Any) -> Any:
        model = CASES["shared input first"]().model
        model.optimizer = SGD(0.1)
        change(model)
        for each in batches:
            model.train_step(each)
        return model.get_weights()

    right = weights(lambda model: model, (batch, y))
    repeated = {**batch, "anchors": np.repeat(batch["anchors"], 6, 0)}
    halves = [({**batch, "image": batch["image"][half]}, y[half]) for half in (slice(0, 3), slice(3, 6))]

    def accumulate(model: Any) -> None:
        model.optimizer = GradientAccumulation(SGD(0.1), steps=2)

    for found in (
        weights(inject, (batch, y)),
        weights(lambda model: inject(model, 3), (repeated, y)),
        weights(accumulate, *halves),
    ):
        for one, other in zip(found, right, strict=True):
            np.testing.assert_allclose(one, other, rtol=1e-5)


@pytest.mark.parametrize("kind", ["features", "tokens"])
def test_batches_that_do_not_divide_are_divided_in_fit_under_xla(kind: str) -> None:
    """Where `fit` has seen two sizes of batches, a graph knows none, and XLA slices past the end unless it is told."""
    x, y, found = numbers(40, 4), numbers(40, 1, seed=1) > 0, []
    if kind == "tokens":
        x, y = np.argsort(x), y.repeat(4, axis=1)[..., None]
    for prepare in (lambda model: model, lambda model: inject(model, 3)):
        keras.utils.set_random_seed(0)
        first = [L.Embedding(4, 3)] if kind == "tokens" else []
        model = keras.Sequential([keras.Input((4,)), *first, L.Dense(1)])
        metric, loss = keras.metrics.BinaryAccuracy(threshold=0), K.BinaryCrossentropy(from_logits=True)
        model.compile(SGD(0.5), loss, metrics=[metric], jit_compile=True)
        history = prepare(model).fit(x, y, batch_size=14, epochs=2, shuffle=False, verbose=0).history
        found.append([*model.get_weights(), *history.values()])
    for one, other in zip(*found, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["sparse input", "ragged input"])
def test_sparse_and_ragged_rows_are_divided_in_a_graph(name: str) -> None:
    right = CASES[name]()
    right.model.train_step(right.batch)
    case = CASES[name]()
    in_a_graph(inject(case.model, 4), case.batch)()
    for one, other in zip(case.model.get_weights(), right.model.get_weights(), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-7)


# Memory


class HidesZeros(L.Layer):
    """Returns its input as it is, with a mask of its own."""

    def call(self, x: Any) -> Any:
        return x

    def compute_mask(self, x: Any, mask: Any = None) -> Any:
        return ops.not_equal(x[..., 0], 0)


def test_a_mask_on_the_input_itself_stays_in_its_part() -> None:
    x, y = numbers(6, 3, 4), numbers(6, 3, 1)
    x[:2, 1:] = 0
    ends = []
    for prepare in (lambda model: None, lambda model: inject(model, micro_batches=3)):
        keras.utils.set_random_seed(0)
        model = keras.Sequential([keras.Input((3, 4)), HidesZeros(), L.Dense(1)])
        model.compile(SGD(0.1), "mse", jit_compile=False)
        prepare(model)
        model.fit(x, y, batch_size=6, epochs=2, shuffle=False, verbose=0)
        ends.append(model.get_weights())
    for mine, theirs in zip(*ends, strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=1e-5, atol=1e-6)


def test_nothing_runs_the_layers_on_more_than_a_part() -> None:
    seen = []

    class Watched(L.Layer):
        def call(self, inputs: Any) -> Any:
            if tf.executing_eagerly():
                seen.append(len(inputs))
            return inputs

    model = keras.Sequential([keras.Input((4,)), Watched(), L.Dense(1)])
    model.compile("sgd", "mse")
    seen.clear()
    oracle = GradientOracle(model, (numbers(8, 4), numbers(8, 1)), micro_batches=4)
    assert seen == []
    oracle()
    assert set(seen) == {2}


# Added losses


class Adds(L.Layer):
    def __init__(self, loss: Callable[[Any], Any]) -> None:
        super().__init__()
        self.loss = loss

    def call(self, inputs: Any) -> Any:
        self.add_loss(self.loss(inputs))
        return inputs


@pytest.mark.parametrize("parts", [2, 3, 6])
@pytest.mark.parametrize("graph", [False, True])
@pytest.mark.parametrize(
    "loss",
    [
        lambda t: ops.mean(t**2),
        lambda t: ops.mean(t**2, -1),
        lambda t: t**2,
        lambda t: ops.mean(t**2, keepdims=True),
        lambda t: ops.mean(t**2, axis=0),
    ],
    ids=["scalar", "vector", "matrix", "mean of one entry", "mean of each column"],
)
def test_an_added_loss_adds_up_to_that_of_the_whole_batch(loss: Any, graph: bool, parts: int) -> None:
    def step(parts: int) -> Any:
        keras.utils.set_random_seed(0)
        model = keras.Sequential([keras.Input((4,)), L.Dense(3), Adds(loss)])
        model.compile(SGD(0.1))
        inject(model, parts)
        batch = (tf.constant(numbers(6, 4)),)
        logs = in_a_graph(model, batch)() if graph else model.train_step(batch)
        return [float(logs["loss"]), *model.get_weights()]

    for one, other in zip(step(parts), step(1), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6)


# Losses that mix examples


def triplet(targets: Any, outputs: Any) -> Any:
    distances = ops.sum((outputs[:, None] - outputs[None]) ** 2, -1)
    alike = ops.cast(ops.equal(ops.reshape(targets, (-1, 1)), ops.reshape(targets, (1, -1))), "float32")
    farthest, nearest = ops.max(distances * alike, 1), ops.min(distances + 1e3 * alike, 1)
    return ops.maximum(farthest - nearest + 1.0, 0.0)


def in_batch(targets: Any, outputs: Any) -> Any:
    logits = ops.matmul(targets, ops.transpose(outputs))
    return K.sparse_categorical_crossentropy(ops.arange(ops.shape(logits)[0]), logits, from_logits=True)


def over_the_hardest(targets: Any, outputs: Any) -> Any:
    each = ops.mean((targets - outputs) ** 2, -1)
    return each / ops.max(each)


def by_the_size(targets: Any, outputs: Any) -> Any:
    return ops.sum((targets - outputs) ** 2, -1) / ops.cast(ops.shape(outputs)[0], "float32")


class CenteredByTheBatch(K.Loss):
    def call(self, targets: Any, outputs: Any) -> Any:
        return ops.mean((targets - (outputs - ops.mean(outputs, 0))) ** 2, -1)


def of_pairs(targets: Any, outputs: Any) -> Any:
    return ops.mean((outputs[:, None] - outputs[None]) ** 2, -1)


class Hardest(K.MeanSquaredError):
    def call(self, targets: Any, outputs: Any) -> Any:
        return over_the_hardest(targets, outputs)


MIXING = [triplet, in_batch, over_the_hardest, by_the_size, CenteredByTheBatch(), of_pairs, Hardest()]


@pytest.mark.parametrize("graph", [False, True])
@pytest.mark.parametrize("loss", MIXING, ids=lambda loss: getattr(loss, "__name__", "class"))
def test_a_loss_that_mixes_examples_is_refused_before_a_weight_moves(loss: Any, graph: bool) -> None:
    y = np.arange(6) % 2 if loss is triplet else numbers(6, 4, seed=1)
    model = inject(linear(loss, 4), 3)
    model.run_eagerly = not graph
    before = model.get_weights()
    with pytest.raises(ValueError, match=r"(?s)mixes the examples.*`micro_batches` at 1.*GradientAccumulation.*not"):
        model.train_on_batch(numbers(6, 4), y)
    assert all(np.array_equal(one, other) for one, other in zip(before, model.get_weights(), strict=True))
    inject(model).train_on_batch(numbers(6, 4), y)  # what the error advises


def noisy(targets: Any, outputs: Any) -> Any:
    return ops.mean((targets - outputs + keras.random.normal(ops.shape(outputs))) ** 2, -1)


def with_tensorflow_noise(targets: Any, outputs: Any) -> Any:
    return tf.reduce_mean((targets - outputs + tf.random.normal(tf.shape(outputs))) ** 2, -1)


def of_probabilities(targets: Any, outputs: Any) -> Any:
    tf.debugging.assert_less_equal(outputs, 1.0)
    return -ops.sum(targets * ops.log(outputs), -1)


def of_classes(targets: Any, outputs: Any) -> Any:
    return -ops.take_along_axis(ops.log_softmax(outputs), ops.reshape(ops.cast(targets, "int32"), (-1, 1)), -1)[:, 0]


def of_a_fixed_batch(targets: Any, outputs: Any) -> Any:
    return ops.reshape(ops.mean((targets - outputs) ** 2, -1), (6,))


def stable(targets: Any, outputs: Any) -> Any:
    shift = ops.stop_gradient(ops.max(outputs))
    return shift + ops.log(ops.sum(ops.exp(outputs - shift), -1)) - ops.sum(targets * outputs, -1)


class Running(K.Loss):
    def __init__(self) -> None:
        super().__init__()
        self.scale = keras.Variable(1.0, trainable=False)

    def call(self, targets: Any, outputs: Any) -> Any:
        self.scale.assign(0.9 * self.scale + 0.1 * ops.mean(outputs))
        return ops.mean((targets - outputs) ** 2, -1) * self.scale


class Perceptual(K.Loss):
    def __init__(self) -> None:
        super().__init__()
        self.features = keras.Sequential([keras.Input((4,)), L.BatchNormalization(), L.Dense(3, "relu")])

    def call(self, targets: Any, outputs: Any) -> Any:
        return ops.mean((self.features(targets) - self.features(outputs)) ** 2, -1)


QUIET = [noisy, with_tensorflow_noise, of_probabilities, of_classes, of_a_fixed_batch, stable, Running, Perceptual]


@pytest.mark.parametrize("loss", QUIET, ids=lambda loss: loss.__name__)
@pytest.mark.parametrize("kind", ["float32", "int32"])
def test_a_loss_of_single_examples_raises_no_alarm(loss: Any, kind: str) -> None:
    loss = loss() if isinstance(loss, type) else LossFunctionWrapper(loss)
    before = [variable.numpy() for variable in vars(loss).values() if isinstance(variable, keras.Variable)]
    for width in (1, 4):
        assert not mixes_examples(loss, tf.zeros((6, width), kind), tf.zeros((6, width)))
    assert not mixes_examples(loss, tf.zeros(6, kind), tf.zeros((6, 4)))
    after = [variable.numpy() for variable in vars(loss).values() if isinstance(variable, keras.Variable)]
    assert before == after


# Sums


def test_weight_fn_sum_says_that_a_loss_is_a_sum() -> None:
    total = lambda y, p: ops.sum((y - p) ** 2)  # noqa: E731
    x, y = numbers(6, 4), numbers(6, 1, seed=1)
    with pytest.raises(ValueError, match=r'`weight_fn`.*or "sum" for a sum'):
        GradientOracle(linear(total), (x, y), 4)()
    right = GradientOracle(linear(total), (x, y)).value_and_gradient()
    found = GradientOracle(linear(total), (x, y), 4, "sum").value_and_gradient()
    for one, other in zip((found[0], *found[1]), (right[0], *right[1]), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5)
    with pytest.raises(ValueError, match=r"One number cannot weigh.*weight_fn='sum'"):
        _ = GradientOracle(linear(total), (x, y), 4, "sum").denominator


@pytest.mark.parametrize("graph", [False, True])
@pytest.mark.parametrize("wrong", [lambda x, y, w: w, lambda x, y, w: None, lambda x, y, w: [2.0, 3.0]])
def test_weight_fn_returns_one_number(wrong: Any, graph: bool) -> None:
    """Weights that were not summed had made another loss of it, without a word."""
    model = linear(lambda y, p: ops.sum((y - p) ** 2))
    before, batch = model.get_weights(), (numbers(6, 4), numbers(6, 1, seed=1), tf.ones(6))
    ask = lambda *batch: GradientOracle(model, batch, 3, wrong)()  # noqa: E731
    with pytest.raises(ValueError, match=r"`weight_fn` must return one number.*Received: "):
        (tf.function(ask, autograph=False) if graph else ask)(*map(tf.constant, batch))
    assert all(map(np.array_equal, model.get_weights(), before))


class Asymmetric(keras.losses.Loss):
    """Says itself what it divides by."""

    def __call__(self, targets: Any, outputs: Any, sample_weight: Any = None) -> Any:
        each = ops.mean((targets - outputs) ** 2, -1)
        return ops.sum(each) if self.reduction == "sum" else ops.mean(each)


@pytest.mark.parametrize("graph", [False, True])
@pytest.mark.parametrize("weight_fn", ["sum", lambda x, y, w: tf.shape(x)[0]], ids=["sum", "rows"])
def test_what_layers_add_is_divided_as_ever_where_a_weight_fn_divides_the_loss(weight_fn: Any, graph: bool) -> None:
    def step(**options: Any) -> Any:
        keras.utils.set_random_seed(0)
        added = [Adds(lambda t: ops.mean(t**2)), Adds(lambda t: ops.mean(t**2, -1))]
        model = keras.Sequential([keras.Input((4,)), L.Dense(3, kernel_regularizer="l2"), *added, L.Dense(1)])
        model.compile(SGD(0.1), Asymmetric(reduction="sum" if weight_fn == "sum" else "mean"))
        inject(model, **options)
        batch = tf.constant(numbers(7, 4)), tf.constant(numbers(7, 1, seed=1))
        logs = in_a_graph(model, batch)() if graph else model.train_step(batch)
        return [float(logs["loss"]), *model.get_weights()]

    for one, other in zip(step(micro_batches=3, weight_fn=weight_fn), step(), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6)


# What knows variables only


class CustomInALoop(L.Layer):
    """A gradient of one's own over a weight, in a loop."""

    def build(self, shape: Any) -> None:
        self.kernel = self.add_weight(shape=(shape[-1], shape[-1]))

    def call(self, inputs: Any) -> Any:
        @tf.custom_gradient
        def step(x: Any) -> Any:
            kernel = tf.convert_to_tensor(self.kernel)

            def gradient(upstream: Any, variables: Any = None) -> Any:
                found = upstream @ tf.transpose(kernel)
                return (found, [tf.transpose(x) @ upstream]) if variables else found

            return x @ kernel, gradient

        return ops.while_loop(lambda i, x: i < 2, lambda i, x: (i + 1, step(x)), (0, inputs), maximum_iterations=2)[1]


class Mapped(CustomInALoop):
    """Eagerly, rows are mapped by a function of TensorFlow, which raises errors anew, of its own class."""

    def call(self, inputs: Any) -> Any:
        return tf.vectorized_map(lambda row: tf.linalg.matvec(self.kernel.value, row), inputs)


class OwnTape(CustomInALoop):
    """Takes a step of its own along a gradient over its variable, as meta-learning does."""

    def call(self, inputs: Any) -> Any:
        with tf.GradientTape() as tape:
            energy = ops.sum(self.kernel**4)
        return inputs @ (self.kernel - 0.1 * tape.gradient(energy, self.kernel))


@pytest.mark.parametrize(("layer", "graph"), [(CustomInALoop, True), (Mapped, False), (OwnTape, True)])
def test_what_knows_variables_only_trains_in_parts_and_is_not_asked_elsewhere(layer: Any, graph: bool) -> None:
    batch = tf.constant(numbers(6, 4)), tf.constant(numbers(6, 1, seed=1))

    def step(optimizer: Any, prepare: Callable[[Any], Any]) -> Any:
        keras.utils.set_random_seed(0)
        model = keras.Sequential([keras.Input((4,)), layer(), L.Dense(1)])
        model.compile(optimizer, "mse")
        prepare(model)
        (in_a_graph(model, batch) if graph else lambda: model.train_step(batch))()
        return model.get_weights()

    right, found = step(SGD(0.1), lambda model: model), step(SGD(0.1), lambda model: inject(model, 3))
    for one, other in zip(found, right, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match=r"train (in one part )?with an optimizer that asks once"):
        step(Heun(0.1), inject)


# Control flow


def test_what_is_assigned_in_a_branch_is_refused_in_parts_in_a_graph() -> None:
    case = CASES["draws in a branch"]()
    with pytest.raises(ValueError, match=r"(?s)assigned in a branch.*train in one part with an"):
        in_a_graph(inject(case.model, 2), case.batch)()
