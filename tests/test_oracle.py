"""Holds `companion.oracle` against Keras's own loss on the whole batch, differentiated in one piece."""

import functools
import inspect
import itertools
import pathlib
import re
from collections.abc import Callable
from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

import companion
from companion import denominators
from companion.oracle import GradientOracle
from tests.kit import cases as kit

L, K = keras.layers, keras.losses
REDUCTIONS = ["sum_over_batch_size", "sum", "mean", "mean_with_sample_weight"]
pytestmark = pytest.mark.usefixtures("float64")


# Who is asked: ours, and mistakes that must fail the same tests


def ours(model: Any, batch: Any, micro_batches: int) -> list[Any]:
    return GradientOracle(model, batch, micro_batches)()


def parts_of(batch: Any, micro_batches: int) -> list[Any]:
    n = len(keras.tree.flatten(batch)[0])
    size = -(-n // micro_batches)
    cut = lambda begin: keras.tree.map_structure(lambda t: None if t is None else t[begin : begin + size], batch)  # noqa: E731
    return [cut(begin) for begin in range(0, n, size)]


def mean_of_means(model: Any, batch: Any, micro_batches: int) -> list[Any]:
    """Every part weighs alike."""
    answers = [whole_batch(model, *part) for part in parts_of(batch, micro_batches)]
    return [sum(each) / len(answers) for each in zip(*answers, strict=True)]


def mean_by_examples(model: Any, batch: Any, micro_batches: int) -> list[Any]:
    """A part weighs as many examples as it has, whatever they weigh and however many tokens are masked."""
    parts = parts_of(batch, micro_batches)
    shares = [len(keras.tree.flatten(part)[0]) / len(keras.tree.flatten(batch)[0]) for part in parts]
    answers = [whole_batch(model, *part) for part in parts]
    return [sum(share * g for share, g in zip(shares, each, strict=True)) for each in zip(*answers, strict=True)]


who = functools.partial(kit.who, "ask")


def whole_batch(model: Any, x: Any, y: Any = None, sample_weight: Any = None) -> list[Any]:
    """The gradient of the loss that Keras computes for a batch in one piece."""
    x, y, sample_weight = keras.tree.map_structure(
        lambda t: None if t is None else tf.convert_to_tensor(t), (x, y, sample_weight)
    )
    with tf.GradientTape() as tape:
        loss = model.compute_loss(x, y, model(x, training=True), sample_weight)
    return [dense(g) for g in tape.gradient(loss, [variable.value for variable in model.trainable_variables])]


def dense(gradient: Any) -> Any:
    return None if gradient is None else tf.convert_to_tensor(gradient).numpy()


def assert_same(found: list[Any], expected: list[Any], tolerance: float = 1e-13) -> None:
    assert len(found) == len(expected)
    for mine, theirs in zip(map(dense, found), expected, strict=True):
        assert (mine is None) == (theirs is None)
        if mine is not None:
            np.testing.assert_allclose(mine, theirs, rtol=tolerance, atol=tolerance * max(1, abs(theirs).max()))


def compiled(layers: Any, loss: Any = None, **options: Any) -> Any:
    keras.utils.set_random_seed(0)
    model = keras.Sequential(layers) if isinstance(layers, list) else layers
    model.compile(keras.optimizers.SGD(), loss, jit_compile=False, **options)
    return model


def data(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


# Every loss of Keras, every reduction

IDS = lambda r: r.integers(0, 3, 7)  # noqa: E731
ONE_HOT = lambda r: np.eye(3)[r.integers(0, 3, 7)]  # noqa: E731
SIGNS = lambda r: r.choice([-1.0, 1.0], (7, 3))  # noqa: E731
ZERO_ONE = lambda r: r.integers(0, 2, (7, 3)).astype(float)  # noqa: E731
POSITIVE = lambda r: r.uniform(0.5, 2, (7, 3))  # noqa: E731
EXACT: dict[str, tuple[Any, str, Any]] = {
    "MeanSquaredError": (K.MeanSquaredError, "linear", POSITIVE),
    "MeanAbsoluteError": (K.MeanAbsoluteError, "linear", POSITIVE),
    "MeanAbsolutePercentageError": (K.MeanAbsolutePercentageError, "linear", POSITIVE),
    "MeanSquaredLogarithmicError": (K.MeanSquaredLogarithmicError, "softplus", POSITIVE),
    "CosineSimilarity": (K.CosineSimilarity, "linear", POSITIVE),
    "Huber": (K.Huber, "linear", POSITIVE),
    "LogCosh": (K.LogCosh, "linear", POSITIVE),
    "Hinge": (K.Hinge, "linear", SIGNS),
    "SquaredHinge": (K.SquaredHinge, "linear", SIGNS),
    "CategoricalHinge": (K.CategoricalHinge, "linear", ONE_HOT),
    "KLDivergence": (K.KLDivergence, "softmax", ONE_HOT),
    "Poisson": (K.Poisson, "softplus", POSITIVE),
    "BinaryCrossentropy": (K.BinaryCrossentropy, "sigmoid", ZERO_ONE),
    "BinaryFocalCrossentropy": (
        functools.partial(K.BinaryFocalCrossentropy, apply_class_balancing=True),
        "sigmoid",
        ZERO_ONE,
    ),
    "CategoricalCrossentropy": (functools.partial(K.CategoricalCrossentropy, label_smoothing=0.1), "softmax", ONE_HOT),
    "CategoricalFocalCrossentropy": (K.CategoricalFocalCrossentropy, "softmax", ONE_HOT),
    "CategoricalGeneralizedCrossEntropy": (K.CategoricalGeneralizedCrossEntropy, "softmax", IDS),
    "SparseCategoricalCrossentropy": (
        functools.partial(K.SparseCategoricalCrossentropy, ignore_class=1),
        "softmax",
        IDS,
    ),
    "Dice": (functools.partial(K.Dice, axis=-1), "sigmoid", ZERO_ONE),
    "Tversky": (functools.partial(K.Tversky, axis=-1), "sigmoid", ZERO_ONE),
}
ELSEWHERE = {"Loss", "CTC", "Circle"}


def test_every_loss_of_keras_is_tested() -> None:
    classes = {name for name, value in vars(K).items() if inspect.isclass(value) and issubclass(value, K.Loss)}
    assert classes == set(EXACT) | ELSEWHERE


IN_EVERY_WAY = ("MeanSquaredError", "SparseCategoricalCrossentropy", "Dice")


@who(ours, wrong=(mean_of_means,))
@pytest.mark.parametrize("name", EXACT)
def test_gradient_is_that_of_the_whole_batch_for_every_loss(name: str, ask: Any, pytestconfig: pytest.Config) -> None:
    make, activation, targets = EXACT[name]
    random = data()
    x, y, weights = random.normal(size=(7, 4)), targets(random), random.uniform(size=7)
    model = compiled([keras.Input((4,)), L.Dense(3, activation)])
    ways = list(itertools.product(REDUCTIONS, (None, weights)))
    if name not in IN_EVERY_WAY and not pytestconfig.getoption("slow"):
        ways = [("sum_over_batch_size", None), ("mean_with_sample_weight", weights)]
    for reduction, sample_weight in ways:
        compiled(model, make(reduction=reduction))
        assert_same(ask(model, (x, y, sample_weight), 3), whole_batch(model, x, y, sample_weight))


@who(ours, wrong=(mean_of_means,))
def test_ctc(ask: Any) -> None:
    random = data()
    x, y = random.normal(size=(5, 6, 4)), random.integers(1, 3, (5, 2))
    model = compiled([keras.Input((6, 4)), L.Dense(3)], K.CTC())
    assert_same(ask(model, (x, y), 2), whole_batch(model, x, y), tolerance=1e-6)  # TensorFlow's CTC is float32


# Masks and weights of every shape


def tokens(n: int, length: int = 5, seed: int = 0) -> tuple[Any, Any, Any]:
    """Ids with zeros at the end, targets, and weights, some of them zero."""
    random = data(seed)
    ids = random.integers(1, 9, (n, length))
    ids[np.arange(length) >= random.integers(0, length + 1, (n, 1))] = 0
    return (
        ids,
        random.integers(0, 3, (n, length)),
        random.uniform(size=(n, length)) * random.integers(0, 2, (n, length)),
    )


def token_model(mask_zero: bool = True, **options: Any) -> Any:
    return compiled(
        [keras.Input((None,), dtype="int32"), L.Embedding(9, 3, mask_zero=mask_zero), L.Dense(3)], **options
    )


@who(ours, wrong=(mean_of_means, mean_by_examples))
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize(("mask_zero", "ignore_class"), [(True, None), (False, 1), (True, 1)])
def test_masked_tokens(reduction: str, mask_zero: bool, ignore_class: int | None, ask: Any) -> None:
    ids, y, weights = tokens(7)
    ids[:3], y[:3] = 0, 1  # the first part has no token at all
    model = token_model(mask_zero, loss=K.SparseCategoricalCrossentropy(True, ignore_class, reduction))
    for sample_weight in (None, weights[:, :1], weights):
        expected = whole_batch(model, ids, y, sample_weight)
        assert_same(ask(model, (ids, y, sample_weight), 3), expected)


@who(ours, wrong=(mean_of_means, mean_by_examples))
def test_any_batch_in_any_number_of_parts(ask: Any) -> None:
    models = {
        reduction: token_model(loss=K.SparseCategoricalCrossentropy(True, reduction=reduction))
        for reduction in REDUCTIONS
    }

    @settings(phases=[Phase.generate])
    @given(
        st.integers(1, 9), st.integers(1, 12), st.integers(0, 99), st.sampled_from(REDUCTIONS), st.booleans(), st.data()
    )
    def check(n: int, parts: int, seed: int, reduction: str, weighted: bool, permuted: Any) -> None:
        ids, y, weights = tokens(n, seed=seed)
        batch = ids, y, weights if weighted else None
        expected = whole_batch(models[reduction], *batch)
        order = np.array(permuted.draw(st.permutations(range(n))))
        batch = keras.tree.map_structure(lambda t: None if t is None else t[order], batch)
        assert_same(ask(models[reduction], batch, parts), expected)

    check()


# Models of every shape


def two_outputs(names: bool, inputs: str = "one") -> Any:
    first, second = keras.Input((4,), name="p"), keras.Input((2,), name="q")
    hidden = L.Dense(5, "tanh")(first if inputs == "one" else L.Concatenate()([first, second]))
    a, b = L.Dense(1, name="a")(hidden), L.Dense(3, name="b")(hidden)
    taken = {"one": first, "list": [first, second], "dict": {"p": first, "q": second}}[inputs]
    return keras.Model(taken, {"a": a, "b": b} if names else [a, b])


@who(ours, wrong=(mean_of_means,))
@pytest.mark.parametrize("inputs", ["one", "list", "dict"])
@pytest.mark.parametrize("names", [True, False])
def test_several_inputs_and_outputs(names: bool, inputs: str, ask: Any) -> None:
    random = data()
    p, q = random.normal(size=(7, 4)), random.normal(size=(7, 2))
    x = {"one": p, "list": [p, q], "dict": {"p": p, "q": q}}[inputs]
    y: Any = {"a": random.normal(size=(7, 1)), "b": random.integers(0, 3, 7)}
    weights: Any = {"a": random.uniform(size=7), "b": random.uniform(size=7)}
    losses: Any = {
        "a": K.MeanSquaredError("mean_with_sample_weight"),
        "b": K.SparseCategoricalCrossentropy(True, ignore_class=1),
    }
    factors: Any = {"a": 0.3, "b": 2.0}
    if not names:
        y, weights, losses, factors = (list(each.values()) for each in (y, weights, losses, factors))
    model = compiled(two_outputs(names, inputs), losses, loss_weights=factors)
    for sample_weight in (None, weights):
        assert_same(ask(model, (x, y, sample_weight), 3), whole_batch(model, x, y, sample_weight))


class AddsLoss(L.Layer):
    """Adds the mean of its input's squares, as a variational autoencoder adds a mean divergence."""

    def call(self, inputs: Any) -> Any:
        self.add_loss(0.3 * keras.ops.mean(keras.ops.square(inputs)))
        return inputs


@who(ours, wrong=(mean_of_means,))
@pytest.mark.parametrize("loss", [None, "mse"])
def test_regularizers_and_added_losses(loss: str | None, ask: Any) -> None:
    layers = [
        keras.Input((4,)),
        L.Dense(3, "tanh", kernel_regularizer="l2", activity_regularizer=keras.regularizers.L1L2(0.1, 0.1)),
        AddsLoss(),
    ]
    model = compiled(layers, loss)
    x = data().normal(size=(7, 4))
    y = None if loss is None else x[:, :3]
    assert_same(ask(model, (x, y), 3), whole_batch(model, x, y))


def test_a_model_that_is_not_built_gets_the_weights_it_would_have_had() -> None:
    x = data().normal(size=(7, 4))
    built, unbuilt = compiled([keras.Input((4,)), L.Dense(3)], "mse"), compiled([L.Dense(3)], "mse")
    assert_same(GradientOracle(unbuilt, (x, x[:, :3]), 2)(), whole_batch(built, x, x[:, :3]))


def test_weights_without_influence_have_no_gradient() -> None:
    inputs = keras.Input((4,))
    model = compiled(keras.Model(inputs, [L.Dense(3)(inputs), L.Dense(2)(inputs)]), ["mse", None])
    x = data().normal(size=(7, 4))
    found = GradientOracle(model, (x, [x[:, :3], x[:, :2]]), 3)()
    assert [gradient is None for gradient in found] == [False, False, True, True]


def test_a_model_that_assigns_to_its_weights_is_refused() -> None:
    model = compiled([keras.Input((4,)), L.SpectralNormalization(L.Dense(3))], "mse")
    with pytest.raises(ValueError, match=r"trainable.*Received: .*kernel"):
        GradientOracle(model, (np.ones((2, 4)), np.ones((2, 3))))()


# In a graph


def traced(model: Any, specs: Any, parts: int) -> Any:
    @tf.function(input_signature=[specs], autograph=False)
    def ask(batch: Any) -> Any:
        return [tf.convert_to_tensor(gradient) for gradient in GradientOracle(model, batch, parts)()]

    return ask


SPECS = (
    tf.TensorSpec([None, None], tf.int64),
    tf.TensorSpec([None, None], tf.int64),
    tf.TensorSpec([None, None], "float64"),
)


def test_one_graph_serves_every_size() -> None:
    model = token_model(loss=K.SparseCategoricalCrossentropy(True))
    ask = traced(model, SPECS, 4)
    for n, length in ((1, 5), (3, 2), (4, 5), (7, 5), (8, 1), (13, 6)):
        batch = tokens(n, length)
        assert_same(ask(batch), whole_batch(model, *batch))


@pytest.mark.parametrize(("n", "jit_compile"), [(3, False), (7, False), (8, False), (7, True)])
def test_static_shapes(n: int, jit_compile: bool) -> None:
    model, batch = token_model(loss=K.SparseCategoricalCrossentropy(True, 1)), tokens(n)
    ask = tf.function(lambda: GradientOracle(model, batch, 4)(), autograph=False, jit_compile=jit_compile)
    assert_same(ask(), whole_batch(model, *batch))


class Diary(L.Layer):
    """Writes down the rows of each forward and backward pass. TensorFlow may leave it out where it is not needed."""

    def __init__(self) -> None:
        super().__init__()
        self.supports_masking = True
        self.entries: list[tuple[str, int]] = []

    def _write(self, name: str, inputs: Any) -> Any:
        def write(array: Any) -> Any:
            self.entries.append((name, len(array)))
            return array

        return tf.ensure_shape(tf.numpy_function(write, [inputs], inputs.dtype, stateful=False), inputs.shape)

    def call(self, inputs: Any) -> Any:
        @tf.custom_gradient
        def wrapped(inputs: Any) -> Any:
            return self._write("forward", inputs), functools.partial(self._write, "backward")

        return wrapped(inputs)


LOSSES: dict[str, Callable[[], Any]] = {
    "of Keras": lambda: K.SparseCategoricalCrossentropy(True),
    "with classes to ignore": lambda: K.SparseCategoricalCrossentropy(True, 1),
    "with sample weights": lambda: K.SparseCategoricalCrossentropy(True, reduction="mean_with_sample_weight"),
    "of one's own": lambda: lambda y, p: K.sparse_categorical_crossentropy(y, p, from_logits=True),
}


@pytest.mark.parametrize("static", [True, False])
@pytest.mark.parametrize("loss", LOSSES)
def test_every_example_is_computed_once_and_one_part_after_the_other(loss: str, static: bool) -> None:
    diary = Diary()
    layers = [keras.Input((None,), dtype="int32"), L.Embedding(9, 3, mask_zero=True), diary, L.Dense(3)]
    model, batch = compiled(layers, LOSSES[loss]()), tokens(8)
    specs = keras.tree.map_structure(lambda t: tf.TensorSpec(t.shape, t.dtype), batch) if static else SPECS
    ask = traced(model, specs, 3)
    diary.entries.clear()
    ask(batch)
    assert diary.entries == [(name, rows) for rows in (3, 3, 2) for name in ("forward", "backward")]


# Embeddings


def test_the_gradient_of_an_embedding_stays_sparse_with_every_row_once() -> None:
    model, (ids, y, _) = token_model(False, loss=K.SparseCategoricalCrossentropy(True)), tokens(7)
    found, *_ = GradientOracle(model, (ids, y), 3)()
    assert isinstance(found, tf.IndexedSlices)
    assert sorted(found.indices.numpy()) == sorted(set(ids.ravel()))
    assert tuple(found.dense_shape.numpy()) == (9, 3)


# Later questions


class Slope(K.Loss):
    """Linear in the outputs, so that the gradient of a linear model does not depend on its weights."""

    def call(self, targets: Any, outputs: Any) -> Any:
        return keras.ops.sum(targets * outputs, axis=-1)


def moving_model() -> Any:
    layers = [keras.Input((4,)), L.BatchNormalization(momentum=0.5), L.Dropout(0.5, seed=1), L.Dense(3)]
    return compiled(layers, Slope(), metrics=["mae"])


@pytest.mark.parametrize("graph", [True, False])
def test_later_questions_see_the_same_dropout_and_move_nothing(graph: bool) -> None:
    model, random = moving_model(), data()
    x, y = random.normal(size=(8, 4)), random.normal(size=(8, 3))
    kernel = model.layers[-1].kernel

    def ask() -> Any:
        oracle = GradientOracle(model, (x, y), 2)
        first = oracle()[-2:]
        before = [tf.identity(variable) for variable in (*model.non_trainable_variables, *model.metrics_variables)]
        values = [v + 1 if v is kernel else v for v in model.trainable_variables]
        later, again = oracle(values)[-2:], oracle(values)[-2:]
        after = [tf.identity(variable) for variable in (*model.non_trainable_variables, *model.metrics_variables)]
        return first, later, again, before, after

    start = [variable.numpy() for variable in model.variables]
    model.compute_metrics(x, y, model(x))  # builds the metrics
    model.reset_metrics()
    first, later, again, before, after = (tf.function(ask, autograph=False) if graph else ask)()
    assert_same(later, [g.numpy() for g in first])
    for one, other in zip((*again, *before), (*later, *after), strict=True):
        np.testing.assert_array_equal(one, other)
    moved = [not np.array_equal(old, new) for old, new in zip(start, (v.numpy() for v in model.variables), strict=True)]
    names = [variable.name for variable, has_moved in zip(model.variables, moved, strict=True) if has_moved]
    assert sorted(names) == ["moving_mean", "moving_variance", "seed_generator_state"]


def test_values_are_where_the_gradient_is_taken() -> None:
    model, batch = token_model(loss=K.SparseCategoricalCrossentropy(True)), tokens(7)
    oracle = GradientOracle(model, batch, 3)
    start = [variable.numpy() for variable in model.trainable_variables]
    elsewhere = [value + data().normal(size=value.shape) for value in start]
    assert_same(oracle(), whole_batch(model, *batch))
    found = oracle(elsewhere)
    for variable, old, new in zip(model.trainable_variables, start, elsewhere, strict=True):
        np.testing.assert_array_equal(variable, old)
        variable.assign(new)
    assert_same(found, whole_batch(model, *batch))


def test_batch_norm_and_dropout_belong_to_a_part() -> None:
    x = data().normal(size=(8, 4))
    model = compiled([keras.Input((4,)), L.BatchNormalization(momentum=0.5), L.Dense(3)], "mse")
    layer, mean, variance = model.layers[0], np.zeros(4), np.ones(4)
    GradientOracle(model, (x, x[:, :3]), 2)()
    for part in (x[:4], x[4:]):  # two parts, two steps of the running averages
        mean, variance = (mean + part.mean(0)) / 2, (variance + part.var(0)) / 2
    np.testing.assert_allclose(layer.moving_mean, mean)
    np.testing.assert_allclose(layer.moving_variance, variance)

    same, ones = [np.ones((4, 50))] * 2, np.ones((8, 50))
    model = compiled([keras.Input((50,)), L.Dropout(0.5, seed=1), L.Dense(1)], Slope())
    parts = [whole_batch(model, part, np.ones((4, 1)))[0] for part in same]  # the seed moves from one to the next
    model = compiled([keras.Input((50,)), L.Dropout(0.5, seed=1), L.Dense(1)], Slope())
    assert_same(GradientOracle(model, (ones, np.ones((8, 1))), 2)()[:1], [(parts[0] + parts[1]) / 2])
    assert not np.array_equal(*parts)


def test_alone_it_answers_and_shows_metrics() -> None:
    model = token_model(loss=K.SparseCategoricalCrossentropy(True), weighted_metrics=["accuracy"])
    batch, start = tokens(7), [variable.numpy() for variable in model.trainable_variables]
    assert_same(GradientOracle(model, batch, 3)(), whole_batch(model, *batch))
    found = {name: float(value) for name, value in model.get_metrics_result().items()}
    ids, y, weights = batch
    evaluated = model.evaluate(ids, y, sample_weight=weights, batch_size=7, verbose=0, return_dict=True)
    assert found == pytest.approx(evaluated, rel=1e-12)
    for variable, value in zip(model.trainable_variables, start, strict=True):
        np.testing.assert_array_equal(variable, value)


# What a batch weighs


@pytest.mark.parametrize(
    ("reduction", "weighted", "masked", "expected"),
    [
        ("sum_over_batch_size", True, False, lambda ids, w: len(ids)),
        ("mean", True, True, lambda ids, w: np.sum(ids > 0)),
        ("mean_with_sample_weight", True, True, lambda ids, w: np.sum((ids > 0) * w)),
        ("mean_with_sample_weight", False, False, lambda ids, w: len(ids)),
    ],
)
def test_denominator(reduction: str, weighted: bool, masked: bool, expected: Any) -> None:
    ids, y, weights = tokens(7)
    model = token_model(masked, loss=K.SparseCategoricalCrossentropy(True, reduction=reduction))
    found = GradientOracle(model, (ids, y, weights if weighted else None), 3).denominator
    assert float(found) == pytest.approx(expected(ids, weights), rel=1e-14)


def test_losses_with_different_denominators_have_no_common_one() -> None:
    x = data().normal(size=(7, 4))
    batch = x, [x[:, :1], np.zeros(7)]
    means = [K.MeanSquaredError(), K.SparseCategoricalCrossentropy(True)]
    assert float(GradientOracle(compiled(two_outputs(False), means), batch).denominator) == 7
    for other in (K.SparseCategoricalCrossentropy(True, 1), K.SparseCategoricalCrossentropy(True, reduction="sum")):
        with pytest.raises(ValueError, match=r"divide by the same.*'b' with reduction"):
            _ = GradientOracle(compiled(two_outputs(False), [means[0], other]), batch).denominator
    with pytest.raises(ValueError, match="reduction='sum'"):
        _ = GradientOracle(compiled([keras.Input((4,)), L.Dense(4)], K.MeanSquaredError("sum")), (x, x)).denominator


# Losses that do not say what they divide by


def mean_of_all(targets: Any, outputs: Any) -> Any:
    return keras.ops.mean(keras.ops.square(targets - outputs))


class OwnCall(K.Loss):
    def __call__(self, targets: Any, outputs: Any, sample_weight: Any = None) -> Any:
        return mean_of_all(targets, outputs)

    def call(self, targets: Any, outputs: Any) -> Any:
        return keras.ops.square(targets - outputs)


OPAQUE: dict[str, Callable[[], Any]] = {
    "Dice": K.Dice,
    "Tversky": K.Tversky,
    "Dice over examples": lambda: K.Dice(axis=0),
    "Circle": K.Circle,
    "Circle summed": lambda: K.Circle(reduction="sum"),
    "circle": lambda: K.circle,
    "function": lambda: mean_of_all,
    "own call": OwnCall,
    "no reduction": lambda: K.MeanSquaredError(reduction=None),
    "flat": lambda: lambda y, p: keras.ops.reshape(keras.ops.square(y - p), (-1,)),
}


def opaque_case(name: str) -> tuple[Any, tuple[Any, Any]]:
    model = compiled([keras.Input((4,)), L.Dense(3, "sigmoid")], OPAQUE[name]())
    random = data()
    y = random.integers(0, 3, 7) if "ircle" in name else random.integers(0, 2, (7, 3)).astype("float64")
    return model, (random.normal(size=(7, 4)), y)


@pytest.mark.parametrize("name", OPAQUE)
def test_an_opaque_loss_is_refused_unless_the_batch_is_whole(name: str) -> None:
    model, batch = opaque_case(name)
    with pytest.raises(ValueError, match=r"does not say what it divides by.*`weight_fn`.*Received: loss="):
        GradientOracle(model, batch, 2)()
    assert_same(GradientOracle(model, batch)(), whole_batch(model, *batch))


@pytest.mark.parametrize("name", OPAQUE)
def test_an_opaque_loss_is_merged_by_weight_fn(name: str) -> None:
    model, batch = opaque_case(name)
    weight = lambda x, y, w: keras.ops.sum(keras.ops.square(x))  # noqa: E731
    parts = parts_of((*batch, None), 3)
    weights = [float(np.sum(part[0] ** 2)) for part in parts]
    answers = [[w * g for g in whole_batch(model, *part)] for w, part in zip(weights, parts, strict=True)]
    expected = [sum(each) / sum(weights) for each in zip(*answers, strict=True)]
    oracle = GradientOracle(model, batch, 3, weight)
    assert_same(oracle(), expected)
    assert float(oracle.denominator) == pytest.approx(sum(weights))


def test_a_flat_loss_of_unknown_length_is_refused_when_it_runs() -> None:
    flat = lambda y, p: tf.reshape(K.sparse_categorical_crossentropy(y, p, True), (-1,))  # noqa: E731
    ids, y, _ = tokens(7)
    with pytest.raises(tf.errors.InvalidArgumentError, match="does not say what it divides by"):
        traced(token_model(False, loss=flat), SPECS[:2], 2)((ids, y))


class TokenMean(keras.Model):
    """Divides by the tokens that are not 0, in a ``compute_loss`` of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.out = L.Embedding(9, 3), L.Dense(3)

    def call(self, inputs: Any) -> Any:
        return self.out(self.embed(inputs))

    def compute_loss(self, x: Any = None, y: Any = None, y_pred: Any = None, sample_weight: Any = None) -> Any:
        valid = keras.ops.cast(x > 0, "float64")
        return keras.ops.sum(K.sparse_categorical_crossentropy(y, y_pred, True) * valid) / keras.ops.sum(valid)


@pytest.mark.parametrize("graph", [True, False])
def test_a_compute_loss_of_ones_own(graph: bool) -> None:
    model, batch = TokenMean(), tokens(8)
    model.compile()
    with pytest.raises(ValueError, match=r"TokenMean\.compute_loss.*pass `weight_fn`"):
        GradientOracle(model, batch, 3)
    ask = functools.partial(GradientOracle, weight_fn=lambda x, y, w: tf.math.count_nonzero(x))
    model(batch[0])
    answer = lambda: ask(model, batch, 3)()  # noqa: E731
    found = (tf.function(answer, autograph=False) if graph else answer)()
    assert_same(found, whole_batch(model, *batch))
    assert_same(GradientOracle(model, batch)(), whole_batch(model, *batch))


# Half precision


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "mixed_bfloat16"])
def test_half_precision_is_added_up_in_single(dtype: str) -> None:
    keras.config.set_floatx("float32")
    x, y = data().normal(size=(64, 8)).astype("float32"), data(1).normal(size=(64, 3)).astype("float32")
    layers = lambda policy: [keras.Input((8,)), L.Dense(3, dtype=policy, kernel_regularizer="l2")]  # noqa: E731
    model, reference = compiled(layers(dtype), "mse"), compiled(layers("float32"), "mse")
    reference.set_weights([weight.numpy().astype("float32") for weight in model.weights])
    found = GradientOracle(model, (x, y), 16)()
    assert {gradient.dtype for gradient in found} == {tf.float32}
    assert_same(found, whole_batch(reference, x, y), tolerance=2e-2 if "b" in dtype else 2e-3)


# Arguments


@pytest.mark.parametrize("value", [0, -1, 2.5, "4", True, None])
def test_a_wrong_number_of_parts(value: Any) -> None:
    model = compiled([keras.Input((4,)), L.Dense(4)], "mse")
    with pytest.raises(ValueError, match=re.escape(f"Received: micro_batches={value!r}")):
        GradientOracle(model, (np.ones((2, 4)), np.ones((2, 4))), value)


def test_wrong_models() -> None:
    x = np.ones((2, 4))
    with pytest.raises(TypeError, match=r"must be a keras\.Model\. Received: model='model'"):
        GradientOracle("model", (x, x))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"must be compiled .*call `model\.compile"):
        GradientOracle(keras.Sequential([L.Dense(4)]), (x, x))
    model = keras.Sequential([L.Dense(4)])
    model.compile(optimizer=None, loss="mse")
    with pytest.raises(ValueError, match="must be compiled with an optimizer"):
        GradientOracle(model, (x, x))
    with pytest.raises(ValueError, match="has no loss: pass `loss`"):
        GradientOracle(compiled([keras.Input((4,)), L.Dense(4)]), (x, x), 2)()
    with pytest.raises(ValueError, match=r"must be a function of .* Received: weight_fn=3"):
        GradientOracle(compiled([keras.Input((4,)), L.Dense(4)], "mse"), (x, x), 2, 3)  # type: ignore[arg-type]


# What is private in Keras


def test_private_names_are_where_they_were() -> None:
    model = token_model(loss="mse")
    ids, *_ = tokens(2)
    outputs = model(ids)
    loss = denominators.compiled_loss(model)
    assert isinstance(loss, K.Loss)
    assert loss.built is False
    loss(tf.zeros_like(outputs), outputs)
    assert loss.built is True
    (entry,) = getattr(loss, denominators._LOSSES)
    assert entry._fields == ("path", "loss", "loss_weights", "name")
    assert isinstance(entry.loss, K.Loss)
    np.testing.assert_array_equal(getattr(outputs, denominators._MASK), ids > 0)
    assert {model, *model.layers} <= set(getattr(model, denominators._LAYERS)())


def test_private_names_of_losses_stand_in_one_file() -> None:
    folder = pathlib.Path(companion.__file__).parent
    names = [getattr(denominators, name) for name in ("_COMPILED_LOSS", "_LOSSES", "_LAYERS", "_MASK")]
    for path in folder.glob("*.py"):
        if path.stem != "denominators":
            assert not [name for name in names if name in path.read_text()], path


def test_keras_divides_activity_regularizers_by_the_examples_since_3_14() -> None:
    layer = L.ActivityRegularization(l1=1.0)
    layer(np.ones((2, 1)))
    is_new = tuple(map(int, keras.__version__.split(".")[:2])) >= (3, 14)
    assert float(layer.losses[0]) == (1.0 if is_new else 2.0)


@pytest.mark.parametrize("asked", [False, pytest.param(True, marks=pytest.mark.xfail(strict=True, reason="the model"))])
def test_denominators_compute_nothing_of_the_model(asked: bool) -> None:
    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(3), keras.layers.Dense(5)])
    model.compile("sgd", keras.losses.SparseCategoricalCrossentropy(from_logits=True, ignore_class=0))

    @tf.function(input_signature=[tf.TensorSpec((None, 4)), tf.TensorSpec((None,), tf.int64)], autograph=False)
    def step(x: Any, y: Any) -> Any:
        oracle = GradientOracle(model, (x, y), micro_batches=2)
        return oracle() if asked else oracle.denominator

    graph = step.get_concrete_function().graph.as_graph_def()
    functions = [node for function in graph.library.function for node in function.node_def]
    assert "MatMul" not in {node.op for node in [*graph.node, *functions]}
