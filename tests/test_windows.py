"""Holds the windows of `GradientAccumulation` against loops in NumPy: subsets, frozen layers, and calls that fail."""

import functools
from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf
from hypothesis import given
from hypothesis import strategies as st

from companion import Adam, AdamsBashforth2, GradientAccumulation, OptimisticSGD

SGD = keras.optimizers.SGD
ONE = np.array([1.0], "float32")


def scalars(count: int) -> list[keras.Variable]:
    return [keras.Variable([0.0], name=f"v{index}") for index in range(count)]


def values(variables: Any) -> list[float]:
    return [float(variable.numpy().ravel()[0]) for variable in variables]


# Subsets


def in_numpy(calls: list[tuple[int, ...]], gradients: list[list[float]], steps: int, count: int) -> list[float]:
    """A step of 1 along the mean: as soon as all have `steps` gradients, or the subset has come `steps` times."""
    weights, received = np.zeros(count), [list[float]() for _ in range(count)]
    came: dict[Any, int] = {}
    for subset, found in zip(calls, gradients, strict=True):
        for index, gradient in zip(subset, found, strict=True):
            received[index].append(gradient)
        came[subset] = came.get(subset, 0) + 1
        if min(len(received[index]) for index in subset) >= steps or came[subset] >= steps:
            for index in subset:
                weights[index] -= np.mean(received[index])
                received[index] = []
            came[subset] = 0
    return weights.tolist()


subsets = st.lists(st.integers(0, 2), min_size=1, max_size=3, unique=True).map(lambda chosen: tuple(sorted(chosen)))


@given(st.lists(subsets, min_size=1, max_size=24), st.integers(1, 4), st.integers(0, 99))
def test_any_order_of_subsets_is_that_of_numpy(calls: list[tuple[int, ...]], steps: int, seed: int) -> None:
    generator = np.random.default_rng(seed)
    found = [generator.normal(size=len(subset)).tolist() for subset in calls]
    variables, optimizer = scalars(3), GradientAccumulation(SGD(1.0), steps)
    optimizer.build(variables)
    for subset, gradients in zip(calls, found, strict=True):
        optimizer.apply([np.array([g], "float32") for g in gradients], [variables[index] for index in subset])
    np.testing.assert_allclose(values(variables), in_numpy(calls, found, steps, 3), atol=1e-5)
    before = values(variables)
    open_now = optimizer.window.numpy()[0]
    optimizer.flush()
    moved = np.array(values(variables)) != before
    assert moved.tolist() == (open_now > 0).tolist()
    assert not optimizer.window.numpy().any()


@pytest.mark.parametrize("how", ["eager", "one function", "two functions", "XLA"])
def test_who_is_in_every_second_call_is_trained(how: str) -> None:
    a, b = variables = scalars(2)
    optimizer = GradientAccumulation(SGD(1.0), 4)
    optimizer.build(variables)

    def together() -> None:
        optimizer.apply([tf.constant(ONE)] * 2, [a, b])

    def alone() -> None:
        optimizer.apply([tf.constant(ONE)], [a])

    def both() -> None:
        together()
        alone()

    function = functools.partial(tf.function, autograph=False, jit_compile=how == "XLA")
    if how == "two functions":
        together, alone = function(together), function(alone)
    step = both if how in ("eager", "two functions") else function(both)
    for _ in range(24):
        step()
    assert values(variables) == [-12.0, -6.0]
    assert int(optimizer.iterations) == 48 / 4


def test_without_a_gradient_every_second_time() -> None:
    a, b = variables = scalars(2)
    optimizer = GradientAccumulation(SGD(1.0), 3)
    for index in range(18):
        with pytest.warns(UserWarning, match="v1") if index % 2 else tf.name_scope("quiet"):
            optimizer.apply([ONE, None if index % 2 else ONE], variables)
    assert values([b]) == [-3.0]
    assert values([a])[0] <= -6.0


def test_the_same_place_counts_a_subset_in_every_process() -> None:
    """So that a run that is resumed, and begins with the other player, goes on as it would have."""
    ends = []
    for resumed in (False, True):
        variables, optimizer = scalars(2), GradientAccumulation(SGD(1.0), 3)
        optimizer.build(variables)
        for index in range(12):
            if resumed and index == 7:
                state, optimizer = [v.numpy() for v in optimizer.variables], GradientAccumulation(SGD(1.0), 3)
                optimizer.build(variables)
                optimizer.set_weights(state)
            chosen = variables if index % 2 == 0 else variables[:1]
            optimizer.apply([ONE * (index + 1)] * len(chosen), chosen)
        ends.append([*values(variables), int(optimizer.iterations)])
    assert ends[0] == ends[1]


# Frozen layers


def network() -> keras.Model:
    keras.utils.set_random_seed(0)
    return keras.Sequential([keras.Input((3,)), keras.layers.Dense(2, "tanh"), keras.layers.Dense(1)])


X, Y = np.random.default_rng(0).normal(size=(12, 3)).astype("float32"), np.ones((12, 1), "float32")


@pytest.mark.parametrize("end", ["flush", "drop", "end_epoch", "compiled", "finalize", "fills"])
def test_a_frozen_layer_does_not_move(end: str) -> None:
    model, optimizer = network(), GradientAccumulation(SGD(0.5, momentum=0.9, weight_decay=0.1), 3)
    model.compile(optimizer, "mse", run_eagerly=True)
    for _ in range(4):  # one update, and one micro-batch
        model.train_on_batch(X, Y)
    model.layers[0].trainable = False
    model.compile(optimizer, "mse", run_eagerly=True)
    before = [layer.get_weights() for layer in model.layers]
    slots = [slot.numpy() for slot in optimizer.inner_optimizer.variables if "dense/" in slot.path]
    if end == "finalize":
        optimizer.finalize_variable_values(model.trainable_variables)
    elif end == "fills":
        model.train_on_batch(X, Y)
        assert int(optimizer.iterations) == 1
        model.train_on_batch(X, Y)  # the third that the head has received
    else:
        (tf.function(optimizer.flush, autograph=False) if end == "compiled" else getattr(optimizer, end))()
    assert all(map(np.array_equal, before[0], model.layers[0].get_weights()))
    assert np.array_equal(before[1][0], model.layers[1].get_weights()[0]) == (end == "drop")
    assert all(
        map(np.array_equal, slots, [s.numpy() for s in optimizer.inner_optimizer.variables if "dense/" in s.path])
    )
    assert int(optimizer.iterations) == 2 - (end == "drop")
    assert optimizer.window.numpy()[0].any() == (end == "fills")
    optimizer.flush()
    assert all(map(np.array_equal, before[0], model.layers[0].get_weights()))
    model.layers[0].trainable = True
    model.compile(optimizer, "mse", run_eagerly=True)
    for _ in range(3):
        model.train_on_batch(X, Y)
    assert not np.array_equal(before[0][0], model.layers[0].get_weights()[0])


# Calls that fail leave no trace


def rows(values: Any, indices: Any, shape: Any = (4, 2)) -> tf.IndexedSlices:
    return tf.IndexedSlices(tf.constant(values, "float32"), tf.constant(indices), tf.constant(shape))


WRONG: dict[str, Any] = {
    "shape": (np.ones(3, "float32"), r"\(2,\) for 'b'.*shape=\(3,\)"),
    "a shape that would broadcast": (np.ones(1, "float32"), r"'b'.*shape=\(1,\)"),
    "rank": (np.ones((2, 1), "float32"), "'b'"),
    "integers": (np.ones(2, "int32"), "'b'.*dtype=int32"),
    "complex": (np.ones(2, "complex64"), "'b'.*dtype=complex64"),
    "words": (np.array(["x", "y"]), "'b'.*dtype=string"),
    "width of rows": (rows(np.ones((1, 3)), [1]), r"\(4, 2\) for 'table'.*shape=\(1, 3\)"),
    "a row that is not there": (rows(np.ones((2, 2)), [1, 4]), r"'table'.*indices=.*\[1 4\]"),
    "a row below zero": (rows(np.ones((1, 2)), [-1]), "'table'"),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_a_gradient_that_does_not_fit_leaves_no_trace(wrong: str) -> None:
    gradient, message = WRONG[wrong]
    a, b, table = (
        keras.Variable(np.zeros(shape, "float32"), name=n) for n, shape in (("a", 1), ("b", 2), ("table", (4, 2)))
    )
    right = [ONE, np.ones(2, "float32"), rows(np.ones((2, 2)), [1, 1])]
    bad = [right[0], right[1], gradient] if isinstance(gradient, tf.IndexedSlices) else [right[0], gradient, right[2]]
    optimizer = GradientAccumulation(SGD(1.0), 2)
    optimizer.build([a, b, table])
    optimizer.apply(right, [a, b, table])
    before = [variable.numpy() for variable in optimizer.variables]
    for brought, words in ((bad, message), (right[:2], "2 gradients for 3 variables")):
        with pytest.raises(ValueError, match=words) as error:
            optimizer.apply(brought, [a, b, table])
        assert "Received" in str(error.value)
        assert all(map(np.array_equal, before, [variable.numpy() for variable in optimizer.variables]))
    optimizer.apply(right, [a, b, table])
    assert [a.numpy().tolist(), b.numpy().tolist(), table.numpy()[1].tolist()] == [[-1.0], [-1.0, -1.0], [-2.0, -2.0]]


def test_a_shape_that_is_known_late_leaves_no_trace() -> None:
    a, b = keras.Variable(np.zeros(1, "float32"), name="a"), keras.Variable(np.zeros(2, "float32"), name="b")
    optimizer = GradientAccumulation(SGD(1.0), 2)
    optimizer.build([a, b])
    signature = [tf.TensorSpec(None, "float32")] * 2
    call = tf.function(lambda *g: optimizer.apply(list(g), [a, b]), input_signature=signature, autograph=False)
    with pytest.raises((ValueError, tf.errors.InvalidArgumentError)):
        call(ONE, np.ones(3, "float32"))
    assert not any(np.any(variable.numpy()) for variable in optimizer._accumulators)
    for _ in range(2):
        call(ONE, np.ones(2, "float32"))
    assert values([a, b]) == [-1.0, -1.0]


@pytest.mark.parametrize("on_nonfinite", ["skip_micro_batch", "skip_window", "raise"])
def test_a_negative_weight_is_refused_or_counted(on_nonfinite: str) -> None:
    (v,) = scalars(1)
    optimizer = GradientAccumulation(SGD(1.0), 2, normalize="weight", on_nonfinite=on_nonfinite)
    optimizer.build([v])
    for wrong in (-1.0, np.array([1.0, 2.0]), tf.constant(-0.5), np.float32(-2)):
        with pytest.raises(ValueError, match=r"`weight` must be a number of at least 0\. Received: weight="):
            optimizer.apply([ONE], [v], weight=wrong)
    assert not optimizer.window.numpy().any()
    call = tf.function(lambda weight: optimizer.apply([tf.constant(ONE)], [v], weight=weight), autograph=False)
    for weight in (1.0, -1.0, 3.0):
        if on_nonfinite == "raise" and weight < 0:
            with pytest.raises(tf.errors.InvalidArgumentError):
                call(tf.constant(weight))
        else:
            call(tf.constant(weight))
    lost = {"skip_micro_batch": (1, -1.0, 0), "raise": (0, -1.0, 0), "skip_window": (2, 0.0, 1)}[on_nonfinite]
    assert (int(optimizer.skipped), values([v])[0], int(optimizer.window.numpy()[0, 0])) == lost


# Words


def test_the_length_of_a_window_in_words() -> None:
    assert GradientAccumulation(SGD(), np.int64(3)).get_config()["steps"] == 3
    for wrong in (np.float32(2), np.bool_(True), 0):
        with pytest.raises(ValueError, match=r"`steps` must be an integer of at least 1\. Received: steps="):
            GradientAccumulation(SGD(), wrong)
    with pytest.raises(ValueError, match=r"`steps\(0\)` must be a number in \[1, inf\)\. Received: steps\(0\)="):
        GradientAccumulation(SGD(), lambda update: 0.5)
    optimizer = GradientAccumulation(SGD(), 2)
    for name, value in (("steps", 4), ("normalize", "sum"), ("on_nonfinite", "raise"), ("inner_optimizer", SGD())):
        with pytest.raises(ValueError, match=rf"`{name}` cannot be set.*Received: {name}="):
            setattr(optimizer, name, value)
    with pytest.raises(ValueError, match="`remainder` must be one of"):
        optimizer.remainder = "yes"
    optimizer.remainder = "drop"
    optimizer.apply([ONE], scalars(1))
    optimizer.end_epoch()
    assert not optimizer.window.numpy().any()


# The first step of each variable


@pytest.mark.parametrize(("kind", "weight"), [(OptimisticSGD, 1.0), (AdamsBashforth2, 0.5)])
def test_the_first_step_of_each_variable_is_the_plain_one(kind: Any, weight: float) -> None:
    """A zero gradient is a gradient; the second player comes late, and after loading it is still the first step."""
    calls = [(0, -1.0), (0, 0.0), (0, 2.0), (1, -1.0), (0, 1.0), (1, 3.0), (1, 0.5)]
    expected, last = np.zeros(2), [None, None]
    for player, gradient in calls:
        before = gradient if last[player] is None else last[player]
        expected[player] -= (1 + weight) * gradient - weight * before
        last[player] = gradient
    for wrap in (lambda o: o, functools.partial(GradientAccumulation, steps=1)):
        for resumed in (None, 3, 4):
            optimizer, variables = wrap(kind(1.0)), scalars(2)
            optimizer.build(variables)
            for index, (player, gradient) in enumerate(calls):
                if index == resumed:
                    state: dict[str, Any] = {}
                    optimizer.save_own_variables(state)
                    optimizer = wrap(kind(1.0))
                    optimizer.build(variables)
                    optimizer.load_own_variables(state)
                optimizer.apply([np.array([gradient], "float32")], [variables[player]])
            np.testing.assert_allclose(values(variables), expected, atol=1e-6)


@pytest.mark.parametrize("kind", [OptimisticSGD, AdamsBashforth2])
def test_every_slot_has_a_path_of_its_own(kind: Any) -> None:
    """As `Model.get_state_tree` and the callback OrbaxCheckpoint want it."""
    model, other = (
        keras.Sequential([keras.Input((2,)), keras.layers.Dense(1, name="dense")], name="net") for _ in range(2)
    )
    for each in (model, other):
        each.compile(kind(0.1, name="rule"), "mse", run_eagerly=True)
        each.optimizer.build(each.trainable_variables)
    model.train_on_batch(np.ones((2, 2)), np.ones((2, 1)))
    tree = model.get_state_tree(value_format="numpy_array")
    other.set_state_tree({"optimizer_variables": tree["optimizer_variables"]})
    for mine, theirs in zip(other.optimizer.variables, model.optimizer.variables, strict=True):
        np.testing.assert_array_equal(mine, theirs)


def test_in_bfloat16_adam_never_moves() -> None:
    """What the docstring of `companion.Adam` says, of Keras's too."""
    for kind, beta_2, moves in ((Adam, 0.999, False), (keras.optimizers.Adam, 0.999, False), (Adam, 0.99, True)):
        weight, optimizer = keras.Variable([1.0], dtype="bfloat16"), kind(0.1, beta_2=beta_2)
        for _ in range(5):
            optimizer.apply([tf.ones(1, "bfloat16")], [weight])
        assert (values([weight]) != [1.0]) is moves
