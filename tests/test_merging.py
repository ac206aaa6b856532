"""Holds `companion.merging` against NumPy, and training on three replicas by a rule against one replica's."""

import contextlib
import functools
import json
from collections.abc import Callable
from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from companion import merging
from companion.accumulation import GradientAccumulation
from companion.injection import InjectedModel, inject
from companion.oracle import GradientOracle
from companion.runge_kutta import Heun
from tests.kit import ROOT
from tests.kit.cases import thinned
from tests.kit.processes import on_devices

L, P = keras.layers, keras.optimizers

# The rules


REFERENCES: dict[str, Callable[[np.ndarray, np.ndarray], np.ndarray]] = {
    "weighted_mean": lambda rows, weights: np.average(rows, axis=0, weights=weights),
    "mean": lambda rows, weights: rows.mean(0),
    "sum": lambda rows, weights: rows.sum(0),
    "median": lambda rows, weights: np.median(rows, axis=0),
    "sign": lambda rows, weights: np.sign(np.sign(rows).sum(0)),
}
rule_by_name = pytest.mark.parametrize("name", REFERENCES)
ROWS = st.integers(1, 6).flatmap(
    lambda devices: st.tuples(
        hnp.arrays("float64", (devices, 2, 3), elements=st.integers(-9, 9).map(lambda n: n / 4)),
        hnp.arrays("float64", (devices,), elements=st.integers(1, 50)),
    )
)


def test_every_rule_has_a_reference_a_formula_a_chapter_and_an_entry() -> None:
    rules = {name: each for name, each in vars(merging).items() if getattr(each, "__module__", "") == merging.__name__}
    page = (ROOT / "book" / "api.md").read_text()
    for name in (name for name in rules if not name.startswith("_")):
        assert name in REFERENCES, f"{name}: no reference in REFERENCES"
        for part in (".. math::", "chapter 14, :doc:"):
            assert part in (rules[name].__doc__ or ""), f"{name}: no {part} in its docstring"
        assert f"companion.merging.{name}\n" in page, f"{name}: no entry in book/api.md"


def merged(name: str, rows: np.ndarray, weights: np.ndarray) -> np.ndarray:
    (found,) = getattr(merging, name)([tf.constant(rows)], tf.constant(weights))
    return found.numpy()


@rule_by_name
@given(case=ROWS)
def test_rule_is_that_of_numpy(name: str, case: tuple[np.ndarray, np.ndarray]) -> None:
    np.testing.assert_allclose(merged(name, *case), REFERENCES[name](*case), rtol=0, atol=1e-13)


@rule_by_name
@given(case=ROWS, data=st.data())
def test_the_order_of_devices_does_not_matter(name: str, case: tuple[np.ndarray, np.ndarray], data: Any) -> None:
    order = data.draw(st.permutations(range(len(case[1]))))
    shuffled = [array[list(order)] for array in case]
    np.testing.assert_allclose(merged(name, *shuffled), merged(name, *case), rtol=0, atol=1e-13)


@pytest.mark.parametrize("name", ["weighted_mean", "mean", "median"])
@given(row=hnp.arrays("float64", 3, elements=st.floats(-5, 5)), weights=ROWS.map(lambda case: case[1]))
def test_devices_that_agree_are_heard(name: str, row: np.ndarray, weights: np.ndarray) -> None:
    np.testing.assert_allclose(merged(name, np.tile(row, (len(weights), 1)), weights), row, rtol=1e-12, atol=1e-300)


@pytest.mark.parametrize("faulty", [1e30, -1e30, np.inf, -np.inf, np.nan])
@pytest.mark.parametrize(
    "name",
    [
        "median",
        "sign",
        *(pytest.param(n, marks=pytest.mark.xfail(strict=True)) for n in ("weighted_mean", "mean", "sum")),
    ],
)
def test_one_faulty_device_of_five_moves_nothing_out_of_range(name: str, faulty: float) -> None:
    rows = np.random.default_rng(0).normal(2.0, 0.1, (5, 4))
    rows[3] = faulty
    found = merged(name, rows, np.ones(5))
    assert np.isfinite(found).all()
    assert (np.abs(found - 1.5) < 1).all()


@rule_by_name
def test_dtype_stays(name: str) -> None:
    compiled = tf.function(lambda rows, weights: getattr(merging, name)([rows], weights))
    for dtype in ("float16", "float32", "float64"):
        assert merged(name, np.ones((3, 2), dtype), np.ones(3, "float32")).dtype == dtype
        assert compiled(tf.ones((3, 2), dtype), tf.ones(3))[0].dtype == dtype


@rule_by_name
@pytest.mark.parametrize("devices", [1, 2, 3, 4, 6])
@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_large_numbers_and_none_at_all(name: str, devices: int, dtype: str) -> None:
    """Sums on the way pass the largest float16 where the result does not; what no device knows is not known."""
    rows = np.full((devices, 4), 60_000.0) * np.where(np.arange(devices) % 2, -1, 1)[:, None]
    rows[:, 1], rows[:, 2] = 50_000, np.nan
    expected = REFERENCES[name](rows, np.ones(devices))
    if name == "sum" and dtype == "float16" and devices > 1:
        expected[1] = np.inf
    with np.errstate(over="ignore", invalid="ignore"):
        found = merged(name, rows.astype(dtype), np.ones(devices, "float32"))
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-3)  # of numbers of 60,000


@pytest.mark.parametrize("name", ["median", "mean", "weighted_mean"])
@pytest.mark.parametrize("devices", [2, 3, 4])
def test_of_the_largest_float(name: str, devices: int) -> None:
    rows = np.full((devices, 1), np.finfo("float32").max)
    rows[0] /= 2
    expected = REFERENCES[name](rows.astype("float64"), np.ones(devices))
    np.testing.assert_allclose(merged(name, rows.astype("float32"), np.ones(devices)), expected, rtol=1e-6)


@pytest.mark.parametrize("other", [np.inf, -np.inf, 7.0])
@pytest.mark.parametrize("silent", [1, 2])
def test_median_orders_as_numpy_does(other: float, silent: int) -> None:
    """Not a number is the largest of all, beyond infinity."""
    rows = np.array([[np.nan]] * silent + [[other]] * 2 + [[1.0]])
    count = len(rows)
    ordered = np.sort(rows, axis=0)
    expected = (ordered[(count - 1) // 2] + ordered[count // 2]) / 2
    np.testing.assert_array_equal(merged("median", rows, np.ones(count)), expected)


# On one replica


def regression(**options: Any) -> keras.Model:
    keras.utils.set_random_seed(0)
    layers = [L.Dense(4, "tanh", kernel_regularizer="l2"), L.Dense(2)]
    model = keras.Sequential([keras.Input((3,)), *layers])
    model.compile(**{"optimizer": P.SGD(0.1), "loss": "mse", "jit_compile": False, **options})
    return model


GENERATOR = np.random.default_rng(1)
X, Y = GENERATOR.normal(size=(37, 3)).astype("float32"), GENERATOR.normal(size=(37, 2)).astype("float32")


def test_one_replica_is_asked_alone() -> None:
    shapes: list[Any] = []

    def rule(gradients: list[Any], weights: Any) -> list[Any]:
        shapes.append([tuple(gradient.shape) for gradient in gradients] + [tuple(weights.shape)])
        return merging.mean(gradients, weights)

    weights = []
    for options in ({}, {"merge": rule}):
        model = inject(regression(jit_compile=True), 2, **options)
        model.fit(X[:32], Y[:32], batch_size=16, shuffle=False, verbose=0)
        weights.append(model.get_weights())
    for mine, theirs in zip(*weights, strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=0, atol=1e-6)
    assert shapes[0] == [(1, 3, 4), (1, 4), (1, 4, 2), (1, 2), (1,)]


def test_gradient_whose_shape_a_graph_does_not_know() -> None:
    class ByNumPy(L.Layer):
        def build(self, shape: Any) -> None:
            self.kernel = self.add_weight(shape=(shape[-1], 2))

        def call(self, x: Any) -> Any:
            @tf.custom_gradient
            def product(x: Any, kernel: Any) -> Any:
                return x @ kernel, lambda up: (None, tf.numpy_function(lambda x, up: x.T @ up, [x, up], "float32"))

            return product(x, tf.convert_to_tensor(self.kernel))

    model = keras.Sequential([keras.Input((3,)), ByNumPy()])
    model.compile(P.SGD(0.1), "mse")
    start = model.get_weights()
    inject(model, 2, merge=merging.mean).fit(X[:8], Y[:8], batch_size=8, verbose=0)
    expected = start[0] - 0.1 / 8 * X[:8].T @ (X[:8] @ start[0] - Y[:8])
    np.testing.assert_allclose(model.get_weights()[0], expected, rtol=0, atol=1e-6)


def test_rule_sees_weights_and_gradients_in_the_order_of_variables() -> None:
    seen: list[Any] = []

    def rule(gradients: list[Any], weights: Any) -> list[Any]:
        seen.append(([g.numpy() for g in gradients], weights.numpy().tolist()))
        return merging.weighted_mean(gradients, weights)

    ids = np.array([[1, 1], [2, 3]])
    keras.utils.set_random_seed(0)
    layers = [L.Embedding(5, 3), L.Flatten(), L.Dense(2)]
    model = keras.Sequential([keras.Input((2,), dtype="int32"), *layers])
    model.compile(loss="mse", run_eagerly=True)
    answer = GradientOracle(model, (ids, np.ones((2, 2))), merge=rule)()
    expected = GradientOracle(model, (ids, np.ones((2, 2))))()
    ((gradients, weights),) = seen
    assert weights == [2.0]
    for one, other, mine in zip(answer, expected, gradients, strict=True):
        np.testing.assert_allclose(one, tf.convert_to_tensor(other), rtol=1e-6)
        np.testing.assert_allclose(mine[0], one, rtol=1e-6)


def test_a_class_may_have_a_rule() -> None:
    class Voting(InjectedModel, keras.Sequential):
        merge = staticmethod(merging.sign)

    model = Voting([keras.Input((3,)), L.Dense(2)])
    model.compile(P.SGD(0.5), "mse")
    before = model.get_weights()
    model.fit(X[:8], Y[:8], batch_size=8, verbose=0)
    for old, new in zip(before, model.get_weights(), strict=True):
        np.testing.assert_allclose(np.abs(new - old), 0.5, rtol=1e-5)


# Bad input


@pytest.mark.parametrize("merge", [None, "mean", 3])
def test_what_is_no_rule_is_refused(merge: Any) -> None:
    with pytest.raises(ValueError, match=r"`merge` must be a function of \(gradients, weights\).*Received: merge="):
        inject(regression(), merge=merge)


@pytest.mark.parametrize(
    "wrong", [lambda g, w: None, lambda g, w: g, lambda g, w: [row[0] for row in g[:-1]], lambda g, w: [1.0] * len(g)]
)
def test_what_a_rule_returns_is_checked_before_a_weight_moves(wrong: Any) -> None:
    model = inject(regression(), merge=wrong)
    before = model.get_weights()
    with pytest.raises(ValueError, match="`merge` must return a list with a tensor for each variable, of its shape"):
        model.fit(X, Y, verbose=0)
    for old, new in zip(before, model.get_weights(), strict=True):
        np.testing.assert_array_equal(old, new)
    assert int(model.optimizer.iterations) == 0


def test_losses_without_one_denominator_need_the_default() -> None:
    model = regression(loss=keras.losses.MeanSquaredError(reduction="sum"))
    before = model.get_weights()
    with pytest.raises(ValueError, match=r"One number cannot weigh this batch.*leave `merge` at its default"):
        inject(model, merge=merging.median).fit(X, Y, verbose=0)
    for old, new in zip(before, model.get_weights(), strict=True):
        np.testing.assert_array_equal(old, new)


# On three replicas, in a process of its own: TensorFlow must divide the processor before it starts


AT_THREE = {"weighted mean, in parts", "masked tokens", "masked tokens, mean", "clipped", "asked"}
AT_THREE |= {f"faulty, {name}" for name in ("mean", "median", "sign")}


def on_three_replicas(slow: bool) -> dict[str, Any]:
    """For each case the greatest difference to one replica in weights and history, or the error."""
    strategy = tf.distribute.MirroredStrategy(["CPU:0", "CPU:1", "CPU:2"])
    tokens = GENERATOR.integers(0, 4, (37, 5))
    targets = np.where(GENERATOR.random((37, 5)) < np.linspace(0, 0.9, 37)[:, None], -1, tokens % 3)

    def train(on: Any, prepare: Any, build: Any, x: Any, y: Any, batch: int) -> Any:
        with on.scope() if on else contextlib.nullcontext():
            model = build()
        if prepare:
            prepare(model)
        history = model.fit(x, y, batch_size=batch, epochs=2, shuffle=False, verbose=0)
        return [*model.get_weights(), *history.history.values()]

    def tagger() -> Any:
        keras.utils.set_random_seed(0)
        loss = keras.losses.SparseCategoricalCrossentropy(
            from_logits=True, ignore_class=-1, reduction="mean_with_sample_weight"
        )
        model = keras.Sequential([keras.Input((5,), dtype="int32"), L.Embedding(4, 3), L.Dense(3)])
        model.compile(P.SGD(0.1), loss, jit_compile=False)
        return model

    def difference(
        prepare: Any, build: Any = regression, x: Any = X, y: Any = Y, batch: int = 10, alone: Any = (None, None)
    ) -> float:
        reference = train(None, alone[0], alone[1] or build, x, y, batch)
        pairs = zip(train(strategy, prepare, build, x, y, batch), reference, strict=True)
        return max(float(np.abs(np.array(mine) - np.array(theirs)).max()) for mine, theirs in pairs)

    def shown(rule: Callable[..., Any]) -> Callable[..., Any]:
        """The same rule, but not the default by identity, so that gradients are gathered."""
        return lambda gradients, weights: rule(gradients, weights)

    def asked() -> list[Any]:
        """How many devices a rule hears, for a batch of ten, and for the last one, of one example."""
        heard: list[Any] = []

        def rule(gradients: list[Any], weights: Any) -> list[Any]:
            tf.py_function(lambda w: heard.append(w.numpy().tolist()), [weights], [])
            return merging.weighted_mean(gradients, weights)

        train(strategy, functools.partial(inject, merge=rule), regression, X[:11], Y[:11], 10)
        return [json.loads(text) for text in sorted({json.dumps(weights) for weights in heard})]

    def faulty(rule: Callable[..., Any]) -> float:
        """The loss after training in which one of three devices answers with a gradient ten times too large, turned."""

        def broken(gradients: list[Any], weights: Any) -> list[Any]:
            factors = tf.constant([1.0, -10.0, 1.0])
            return rule([g * tf.reshape(factors, [3, *[1] * (len(g.shape) - 1)]) for g in gradients], weights)

        y = np.tanh(X @ np.ones((3, 2), "float32"))
        *_, loss = train(strategy, functools.partial(inject, merge=broken), regression, X[:36], y[:36], 36)
        return loss[-1] - loss[0]

    def clipped() -> keras.Model:
        return regression(optimizer=P.SGD(0.1, global_clipnorm=0.05))

    def heun() -> keras.Model:
        return regression(optimizer=Heun(0.1))

    def accumulating() -> keras.Model:
        return regression(optimizer=GradientAccumulation(P.SGD(0.1), 1, normalize="weight"))

    with_rule = functools.partial(inject, merge=shown(merging.weighted_mean))
    masked = {"build": tagger, "x": tokens, "y": targets}
    cases: dict[str, Callable[[], Any]] = {
        "weighted mean, in parts": lambda: difference(functools.partial(with_rule, micro_batches=2)),
        "masked tokens": lambda: difference(with_rule, **masked),
        "masked tokens, mean": lambda: difference(functools.partial(inject, merge=merging.mean), **masked),
        "clipped": lambda: difference(with_rule, clipped),
        "clipped, Keras": lambda: difference(None, clipped, x=X[:36], y=Y[:36], batch=12),
        "Heun": lambda: difference(with_rule, heun, alone=(inject, heun)),
        "accumulation": lambda: difference(with_rule, accumulating, alone=(None, regression)),
        "asked": asked,
        **{f"faulty, {r.__name__}": functools.partial(faulty, r) for r in (merging.mean, merging.median, merging.sign)},
    }
    found: dict[str, Any] = {}
    for name, case in cases.items():
        try:
            found |= {} if slow is (name in AT_THREE) else {name: case()}
        except Exception as error:  # the test shows it
            found[name] = f"{type(error).__name__}: {str(error)[-2000:]}"
    return found


def three_replicas(slow: bool = False) -> dict[str, Any]:
    return on_devices(3, f"from tests import test_merging; print(json.dumps(test_merging.on_three_replicas({slow})))")


WRONG = pytest.mark.xfail(strict=True, raises=(AssertionError, TypeError))


@pytest.mark.parametrize(
    "case",
    thinned(
        [
            "weighted mean, in parts",
            "masked tokens",
            "clipped",
            "Heun",
            "accumulation",
            pytest.param("masked tokens, mean", marks=WRONG),
            pytest.param("clipped, Keras", marks=WRONG),
        ],
        *(name for name in AT_THREE if name != "asked" and not name.startswith("faulty")),
    ),
)
def test_three_replicas_are_as_one(case: str) -> None:
    found = three_replicas(case not in AT_THREE)[case]
    assert found < 1e-6, found


def test_a_device_without_examples_is_not_asked() -> None:
    assert sorted(three_replicas()["asked"]) == [[1.0], [4.0, 4.0, 2.0]]


@pytest.mark.parametrize("rule", ["median", "sign", pytest.param("mean", marks=WRONG)])
def test_training_survives_a_faulty_device(rule: str) -> None:
    found = three_replicas()[f"faulty, {rule}"]
    assert found < 0, found


@rule_by_name
def test_numbers_of_any_kind_are_merged_or_refused(name: str) -> None:
    """Integers would be divided as integers: a mean of 1 and 2 was 1, and weights of a half were 0."""
    rule, rows = getattr(merging, name), [[1.0, 5.0], [2.0, 6.0]]
    expected = REFERENCES[name](np.array(rows), np.ones(2))
    for weights in ([1, 1], np.ones(2), np.full(2, 60_000, "float16")):
        np.testing.assert_allclose(rule([rows], weights)[0], expected)
    with pytest.raises(ValueError, match="`gradients` must be of floating point numbers"):
        rule([np.array([[1, 5], [2, 6]])], np.ones(2))
