"""What a call of ``apply`` may bring, in every wrapper: what does not fit changes nothing, what is frozen stays."""

import itertools
import pathlib
import zlib
from collections.abc import Callable
from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf

import companion
from companion import CoalesceGradients, GradientAccumulation, ParameterGroups, ScheduleFreeAdamW, SwapAverage

SGD = keras.optimizers.SGD
ONE = np.ones(1, "float32")
X, Y = np.random.default_rng(0).normal(size=(8, 3)).astype("float32"), np.ones((8, 1), "float32")
WRAPPERS: dict[str, Callable[..., Any]] = {
    **{
        how: lambda inner, how=how: GradientAccumulation(inner, 3, on_nonfinite=how) for how in ("raise", "skip_window")
    },
    "sums": lambda inner: GradientAccumulation(inner, 3),
    "rows": CoalesceGradients,
    "groups": lambda inner: ParameterGroups(inner, {"head": 0.5}),
}
every_wrapper = pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS)


def scalars(count: int) -> list[keras.Variable]:
    return [keras.Variable([0.0], name=f"v{index}") for index in range(count)]


def values(variables: Any) -> list[np.ndarray]:
    return [np.asarray(variable) for variable in variables]


def rows(ids: Any, count: int | None = None) -> tf.IndexedSlices:
    return tf.IndexedSlices(tf.ones((len(ids) if count is None else count, 2)), tf.constant(ids), tf.constant([4, 2]))


def head_and_table() -> list[keras.Variable]:
    return [keras.Variable([0.0], name="head"), keras.Variable(np.zeros((4, 2), "float32"), name="table")]


# What does not fit


@every_wrapper
@pytest.mark.parametrize("brought", [[1, 7], [-1, 2]], ids=["above", "below"])
def test_rows_that_are_not_there_leave_no_trace(wrap: Any, brought: list[int]) -> None:
    """Two rows are brought. In a graph their ids are known late, when others could have been changed already."""
    variables = head_and_table()
    optimizer = wrap(SGD(1.0, momentum=0.9, weight_decay=0.1))
    optimizer.build(variables)

    @tf.function(autograph=False, input_signature=[tf.TensorSpec([None], "int32")])
    def step(ids: Any) -> None:
        optimizer.apply([tf.constant(ONE), tf.IndexedSlices(tf.ones((2, 2)), ids, tf.constant([4, 2]))], variables)

    step([1, 1])
    before = values([*variables, *optimizer.variables])
    for _ in range(3):
        with pytest.raises(tf.errors.InvalidArgumentError, match=r"table.*rows that are there"):
            step(brought)
    for wrong in (rows(brought), rows([1, 2, 3], 2), rows([[1, 2]], 1)):
        with pytest.raises(ValueError, match=r"for 'table'.*rows that are there\. Received: shape="):
            optimizer.apply([ONE, wrong], variables)
    assert all(map(np.array_equal, values([*variables, *optimizer.variables]), before))


@every_wrapper
def test_gradients_that_do_not_fit_leave_no_trace(wrap: Any) -> None:
    """Also where Keras would stretch a gradient to its variable, or leave the rest of the variables out."""
    variables = [keras.Variable([0.0], name="head"), keras.Variable([0.0, 0.0], name="b")]
    optimizer = wrap(SGD(1.0, momentum=0.9))
    optimizer.build(variables)
    before = values([*variables, *optimizer.variables])
    for wrong, words in (
        ([ONE], "Received: 1 gradients for 2"),
        ([ONE, ONE], r"\(2,\) for 'b'.*Received: "),
        ([ONE, np.ones(3)], r"\(2,\) for 'b'.*Received: "),
        ([ONE, object()], r"\(2,\) for 'b'.*Received: "),
        ([ONE, [1.0, [2.0]]], r"\(2,\) for 'b'.*Received: "),
    ):
        with pytest.raises(ValueError, match=words):
            optimizer.apply(wrong, variables)
    assert all(map(np.array_equal, values([*variables, *optimizer.variables]), before))


def test_a_shape_that_is_known_late_comes_before_any_window_counts() -> None:
    a, b = keras.Variable([0.0]), keras.Variable([0.0, 0.0])
    optimizer = GradientAccumulation(SGD(1.0), 3, on_nonfinite="skip_window")
    optimizer.build([a, b])
    signature = [tf.TensorSpec(None, "float32")] * 2
    call = tf.function(lambda *g: optimizer.apply(list(g), [a, b]), input_signature=signature, autograph=False)
    for _ in range(4):
        with pytest.raises((ValueError, tf.errors.InvalidArgumentError)):
            call(ONE, np.ones(3, "float32"))
    assert not any(np.any(variable) for variable in values([a, b, optimizer.window, *optimizer._accumulators]))


def test_a_variable_is_given_once() -> None:
    (v,) = scalars(1)
    optimizer = GradientAccumulation(SGD(1.0), 1)
    with pytest.raises(
        ValueError, match=r"`trainable_variables` must not hold a variable twice. Received: \['v0', 'v0"
    ):
        optimizer.apply([ONE, 2 * ONE], [v, v])


def test_weights_of_calls() -> None:
    """A number of Python's is taken as it is; TensorFlow would round it to float32."""
    weight = keras.Variable(np.zeros(1), dtype="float64")
    optimizer = GradientAccumulation(SGD(1.0), 2, normalize="weight")
    for gradient, share in ((1.0, 0.1), (3.0, 0.7)):
        optimizer.apply([np.array([gradient])], [weight], weight=share)
    np.testing.assert_allclose(weight.numpy(), -2.2 / 0.8, rtol=1e-15)
    for wrong in ("2", b"2", 1j, object(), [1.0, [2.0]], [], 10**400):
        with pytest.raises(ValueError, match=r"`weight` must be a number of at least 0\. Received: weight="):
            optimizer.apply([np.array([1.0])], [weight], weight=wrong)
    for right in (True, np.int64(3), np.uint8(200), 2**31 + 5, [1.0], tf.constant(2), keras.Variable(2.0)):
        before = optimizer.window.numpy()[1, 0]
        optimizer.apply([np.array([1.0])], [weight], weight=right)
        assert optimizer.window.numpy()[1, 0] == before + np.asarray(right, "float64").ravel()[0]
        optimizer.drop()


# Kinds of gradients, subsets


def resumed(optimizer: Any, make: Callable[[], Any], variables: list[Any]) -> Any:
    other = make()
    other.build(variables)
    other.set_weights(values(optimizer.variables))
    return other


@pytest.mark.parametrize("order", sorted(set(itertools.permutations("dss")) | set(itertools.permutations("dds"))))
@pytest.mark.parametrize("at", [1, 2])
def test_another_process_may_begin_with_another_kind(order: tuple[str, ...], at: int) -> None:
    """A table that is looked up in some calls, and read as a matrix in others: tied weights."""
    make = lambda: GradientAccumulation(SGD(1.0), 3)  # noqa: E731
    table, optimizer = keras.Variable(np.zeros((4, 2), "float32")), make()
    optimizer.build([table])
    expected = np.zeros((4, 2), "float32")
    for index, kind in enumerate(order * 2):
        if index == at:
            optimizer = resumed(optimizer, make, [table])
        optimizer.apply([rows([1, 1]) if kind == "s" else np.ones((4, 2), "float32")], [table])
        expected -= np.array([[0], [2], [0], [0]]) / 3 if kind == "s" else 1 / 3
    np.testing.assert_allclose(table.numpy(), expected, rtol=1e-6)


def test_subsets_are_told_apart_in_every_process() -> None:
    """Two whose numbers would be the same: each has its own count, whichever comes first."""
    places: dict[int, Any] = {}
    for pair in itertools.combinations(range(40), 2):
        other = places.setdefault((zlib.crc32(repr(pair).encode()) + 1) % 256, pair)
        if other != pair and not set(other) & set(pair):
            break
    ends = []
    for stopped in (False, True):
        variables, make = scalars(40), lambda: GradientAccumulation(SGD(1.0), 4)
        optimizer = make()
        optimizer.build(variables)
        for index, subset in enumerate([other] * 3 + [pair] + [other[:1]] * 4 + [pair, other]):
            if stopped and index == 8:
                optimizer = resumed(optimizer, make, variables)
            optimizer.apply([ONE] * len(subset), [variables[i] for i in subset])
        ends.append([*np.ravel(values(variables)), int(optimizer.iterations)])
    assert ends[0] == ends[1]


def test_there_may_be_any_number_of_subsets() -> None:
    """Layers that are left out at random. Where counts have no place any more, what a variable has received counts."""
    variables = scalars(3)
    optimizer = GradientAccumulation(SGD(1.0), 2)
    optimizer.build(variables)
    for other in itertools.combinations(range(24), 2):
        optimizer._windows.note(other[::-1])
    for _ in range(3):
        optimizer.apply([ONE, ONE], variables[:2])
        optimizer.apply([ONE], variables[:1])
    assert np.ravel(values(variables)).tolist() == [-3.0, -1.0, 0.0]


# What is frozen


def test_a_frozen_variable_in_the_list_stays() -> None:
    """A loop of one's own that made its list before the layer was frozen, inside a window."""
    a, b = scalars(2)
    optimizer = GradientAccumulation(SGD(1.0), 3)
    optimizer.apply([ONE, ONE], [a, b])
    b.trainable = False
    for _ in range(2):
        with pytest.warns(UserWarning, match=r"\['v1'\] are not trainable"):
            optimizer.apply([ONE, ONE], [a, b])
    optimizer.flush()
    assert np.ravel(values([a, b])).tolist() == [-1.0, 0.0]


@every_wrapper
def test_averages_do_not_move_what_is_frozen(wrap: Any) -> None:
    """Keras's own step puts the average of every variable that it knows into it."""
    variables = [keras.Variable(np.linspace(1, 2, 5), name=name) for name in ("head", "body")]
    optimizer = wrap(SGD(0.1, use_ema=True, ema_momentum=0.75, ema_overwrite_frequency=2))
    optimizer.build(variables)
    for _ in range(3):
        optimizer.apply([np.ones(5)] * 2, variables)
    variables[1].trainable = False
    before = values(variables)
    for _ in range(9):
        optimizer.apply([np.ones(5)], variables[:1])
    head, body = values(variables)
    assert np.array_equal(body, before[1])
    assert not np.array_equal(head, before[0])


def test_schedule_frees_average_does_not_move_what_is_frozen() -> None:
    keras.utils.set_random_seed(0)
    model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(2), keras.layers.Dense(1)])
    model.compile(ScheduleFreeAdamW(0.1), "mse", run_eagerly=True)
    show = SwapAverage()
    show.set_model(model)
    for average in (True, False):  # frozen while the weights hold x, and while they hold θ
        model.layers[0].trainable = True
        model.compile(model.optimizer, "mse", run_eagerly=True)
        show.on_train_begin()
        for _ in range(3):
            model.train_on_batch(X, Y)
        if average:
            show.on_train_end()
        model.layers[0].trainable = False
        model.compile(model.optimizer, "mse", run_eagerly=True)
        frozen, head = values(model.layers[0].weights), values(model.layers[1].weights)
        for event in (
            show.on_train_begin,
            show.on_epoch_end,
            show.on_epoch_begin,
            show.on_test_begin,
            show.on_test_end,
        ):
            event(*([0] if "epoch" in event.__name__ else []))
            assert all(map(np.array_equal, values(model.layers[0].weights), frozen))
        model.train_on_batch(X, Y)
        show.on_train_end()
        assert all(map(np.array_equal, values(model.layers[0].weights), frozen))
        assert not np.array_equal(values(model.layers[1].weights)[0], head[0])


def test_schedule_free_in_several_groups() -> None:
    variables = scalars(3)
    optimizer = ParameterGroups(SGD(1.0), {"v0": ScheduleFreeAdamW(1.0), "v1": ScheduleFreeAdamW(0.5)})
    for _ in range(3):
        optimizer.apply([-ONE] * 3, variables)
    before = values(variables)
    assert CoalesceGradients(optimizer).eval()
    np.testing.assert_allclose(np.ravel(values(variables)), [2.0, 1.0, 3.0], rtol=1e-6)
    assert optimizer.train()
    assert not optimizer.train()
    np.testing.assert_allclose(values(variables), before, rtol=1e-6)
    assert not hasattr(ParameterGroups(SGD(), {}), "eval")


def test_muon_is_loaded_with_a_frozen_layer(tmp_path: pathlib.Path) -> None:
    """Of which nothing is left among the variables that are trained, where `exclude` is searched."""
    layers = [keras.layers.Dense(2, name=name) for name in ("body", "head")]
    model = keras.Sequential([keras.Input((3,)), *layers], name="net")
    model.compile(companion.Muon(0.1, exclude=["net/head"]), "mse", run_eagerly=True)
    model.train_on_batch(X, np.ones((8, 2)))
    layers[1].trainable = False
    model.compile(model.optimizer, "mse")
    for path in (tmp_path / "once.keras", tmp_path / "twice.keras"):
        model.save(path)
        model = keras.saving.load_model(path)
        assert "velocity" not in "".join(v.path for v in model.optimizer.variables if "kernel" in v.path)


# What else is asked of a wrapper


@every_wrapper
def test_what_apply_gradients_returns_is_the_count(wrap: Any) -> None:
    variables, optimizer = [keras.Variable([0.0], name="head")], wrap(SGD())
    for _ in range(3):
        count = optimizer.apply_gradients([(ONE, variables[0])])
    assert int(count) == int(optimizer.iterations) > 0


def test_a_word_in_a_configuration_is_a_word() -> None:
    with keras.saving.custom_object_scope({"mean": np.mean, "sgd": SGD, "flush": 3}):
        optimizer = GradientAccumulation(SGD(name="sgd"), 2)
        again = GradientAccumulation.from_config(optimizer.get_config())
    assert again.get_config() == optimizer.get_config()


@pytest.mark.parametrize("wrap", [WRAPPERS["groups"], WRAPPERS["rows"], lambda inner: GradientAccumulation(inner, 1)])
def test_rows_under_a_loss_scale_that_is_set_later(wrap: Any) -> None:
    variables, optimizer = head_and_table(), wrap(SGD(1.0))
    optimizer.apply([ONE, rows([1, 1])], variables)
    optimizer.loss_scale_factor = 4.0
    optimizer.apply([4 * ONE, rows([1, 1])], variables)
    np.testing.assert_allclose(variables[1].numpy()[:, 0], [0, -2.5, 0, 0])


@pytest.mark.skipif(not hasattr(keras.optimizers, "MultiOptimizer"), reason="this Keras has no MultiOptimizer")
def test_what_is_in_a_multi_optimizer(tmp_path: pathlib.Path) -> None:
    """tf.train.Checkpoint finds it; and a call without all of the variables is refused before it counts."""

    def made() -> Any:
        rules = keras.optimizers.OptimizerMap(default_optimizer=SGD(0.1, momentum=0.9))
        rules[".*v1.*"] = keras.optimizers.Adam(0.1)
        optimizer = GradientAccumulation(keras.optimizers.MultiOptimizer(rules), 2)
        optimizer.build(variables)
        return optimizer

    variables = scalars(2)
    optimizer, other = made(), made()
    for _ in range(3):
        optimizer.apply([ONE, ONE], variables)
    tf.train.Checkpoint(o=other).restore(tf.train.Checkpoint(o=optimizer).save(str(tmp_path / "c"))).assert_consumed()
    assert all(map(np.array_equal, values(other.variables), values(optimizer.variables)))
    with pytest.raises(ValueError, match=r"MultiOptimizer takes no fewer.*Received: gradients for \['v0'\] only"):
        optimizer.apply([ONE], variables[:1])
    assert optimizer.window.numpy()[0].tolist() == [1, 1]


@pytest.mark.skipif(not hasattr(keras.optimizers, "MultiOptimizer"), reason="this Keras has no MultiOptimizer")
def test_the_end_of_an_epoch_is_that_of_all_windows() -> None:
    rules = keras.optimizers.OptimizerMap(default_optimizer=GradientAccumulation(SGD(0.1), 4))
    rules[".*bias"] = GradientAccumulation(keras.optimizers.Adam(0.1), 4)
    model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(1)])
    model.compile(keras.optimizers.MultiOptimizer(rules), "mse", run_eagerly=True)
    model.fit(np.ones((6, 3)), np.ones(6), 1, epochs=2, verbose=0, callbacks=[companion.FlushAtEpochEnd()])
    assert [int(optimizer.iterations) for optimizer in model.optimizer.optimizers] == [4, 4]


@pytest.mark.parametrize("kind", [companion.SGD, companion.Adam, companion.OptimisticSGD, companion.Muon])
@pytest.mark.parametrize("variable", [keras.Variable, tf.Variable])
def test_a_variable_is_no_learning_rate_and_the_way_out_works(kind: Any, variable: Any) -> None:
    rate = variable(0.5)
    with pytest.raises(ValueError, match=r"`learning_rate` must be.*`lambda: variable`. Received: learning_rate="):
        kind(rate)
    optimizer = kind(lambda: rate)
    rate.assign(0.25)
    assert float(optimizer.learning_rate) == 0.25
