"""Holds that adaptive steps stay finite: a rejected step moves nothing, and no step is longer than was said."""

import itertools
from collections.abc import Callable
from typing import Any

import hypothesis
import keras
import numpy as np
import pytest
import tensorflow as tf
from hypothesis import strategies as st

import companion
from companion import RK23, RK45, Heun, InjectedOptimizer, RungeKutta, inject
from companion.gradient_flow import ButcherTableau

ADAPTIVE: dict[str, Callable[..., Any]] = {
    "RK23": RK23,
    "RK45": RK45,
    "Heun": lambda h, **options: Heun(h, **{"rtol": 1e-3, **options}),
    "kutta3": lambda h, **options: RungeKutta(h, "kutta3", **{"rtol": 1e-3, **options}),
}


def line(optimizer: Any, loss: Any = "mse", dtype: str = "float32", **options: Any) -> Any:
    """A model of one weight, 1 at the start."""
    dense = keras.layers.Dense(1, None, False, "ones", dtype=dtype, **options)
    model = keras.Sequential([keras.Input((1,)), dense])
    model.compile(optimizer, loss, run_eagerly=True)
    return inject(model)


def bits(model: Any) -> list[bytes]:
    """Everything but the control of the step, and what counts batches."""
    own = {"step_size", "rejected", "largest_step", "shown_learning_rate", "learning_rate"}
    optimizer = getattr(model.optimizer, "inner_optimizer", model.optimizer)
    kept = [*model.weights, *(v for v in optimizer.variables if v.name not in own)]
    return [v.numpy().tobytes() for v in kept]


def one(value: float) -> Any:
    return np.full((1, 1), value, "float32")


@hypothesis.settings(deadline=None)
@hypothesis.given(
    st.sampled_from([*ADAPTIVE]),
    st.sampled_from(["float32", "float64", "bfloat16", "float16", "mixed_float16", "mixed_bfloat16"]),
    st.floats(-30, 30),
    st.lists(st.sampled_from([0.0, 1.0, -1e3, 1e19, 1e38, np.inf, np.nan]), min_size=4, max_size=6),
    st.sampled_from([{}, {"use_ema": True, "ema_overwrite_frequency": 1}, {"clipnorm": 1.0}, {"global_clipnorm": 0.1}]),
)
def test_a_rejected_step_leaves_every_bit(
    method: str, dtype: str, exponent: float, inputs: list[float], options: dict[str, Any]
) -> None:
    """Over methods, dtypes, step sizes from 1e-30 to 1e30, and what batches may hold; others stay finite."""
    optimizer = ADAPTIVE[method](10.0**exponent, **options)
    model = line(optimizer, dtype=dtype, kernel_constraint=keras.constraints.MaxNorm(1e3))
    model.train_on_batch(one(0.5), one(0.0))
    for value in inputs:
        before, rejected = bits(model), int(optimizer.rejected)
        model.train_on_batch(one(value), one(1.0))
        assert bits(model) == before or int(optimizer.rejected) == rejected
        assert np.isfinite(model.get_weights()[0].astype(float)).all()
        assert 0 <= float(optimizer.step_size) <= max(1e4, 10.0**exponent * 1.000001)


@pytest.mark.parametrize("options", [{"jit_compile": False}, {"jit_compile": True}], ids=str)
def test_in_a_graph_and_scaled_it_moves_nothing_either(options: dict[str, Any]) -> None:
    for wrap in (lambda optimizer: optimizer, keras.optimizers.LossScaleOptimizer):
        optimizer = RK23(8.0, use_ema=True, ema_overwrite_frequency=1)
        model = line(wrap(optimizer))
        model.compile(model.optimizer, "mse", **options)
        inject(model)
        model.train_on_batch(one(100.0), one(0.0))
        assert model.get_weights()[0] == 1.0
        assert (int(optimizer.rejected), int(optimizer.iterations)) == (1, 0)
        for _ in range(12):
            model.train_on_batch(one(100.0), one(0.0))
        assert int(optimizer.rejected) + int(optimizer.iterations) == 13
        assert int(optimizer.iterations) > 0
        assert np.isfinite(model.get_weights()[0]).all()


class MultipliesByZero(RK23):
    """Known wrong: a rejected step is h times a direction of zero."""

    def direction(self, oracle: Any, values: Any, learning_rate: Any) -> Any:
        found = super().direction(oracle, values, learning_rate)
        self._is_taken = None
        return found


@pytest.mark.parametrize(
    "kind", [RK23, pytest.param(MultipliesByZero, marks=pytest.mark.xfail(strict=True, raises=AssertionError))]
)
def test_an_average_does_not_move_with_a_rejected_step(kind: Any) -> None:
    model = line(kind(8.0, use_ema=True, ema_overwrite_frequency=1), kernel_constraint=keras.constraints.MaxNorm(0.5))
    before = bits(model)
    model.train_on_batch(one(np.nan), one(0.0))
    assert bits(model)[: len(before)] == before


@pytest.mark.parametrize(("start", "rate"), [(1.0, 10.0), (-3e38, 1.0)], ids=["step", "sum"])
def test_what_overflows_is_rejected_where_the_estimate_does_not(start: float, rate: float) -> None:
    model = line(RK23(rate), lambda y, p: p)
    model.set_weights([one(start)])
    model.train_on_batch(one(1e38), one(1.0))
    assert (model.get_weights()[0][0, 0], int(model.optimizer.rejected)) == (np.float32(start), 1)


# Five separable problems


def separable(name: str) -> tuple[Any, Any, Any, int]:
    """Inputs, labels, a loss, and how many outputs."""
    random = np.random.default_rng(1)
    x = np.concatenate([random.normal(size=(20, 2)) + 3, random.normal(size=(20, 2)) - 3]).astype("float32")
    labels = np.repeat([1.0, 0.0], 20).astype("float32")[:, None]
    losses = keras.losses
    return {
        "hinge": (x, 2 * labels - 1, "hinge", 1),
        "squared hinge": (x, 2 * labels - 1, "squared_hinge", 1),
        "logistic": (x, labels, losses.BinaryCrossentropy(from_logits=True), 1),
        "softmax": (x, labels, losses.SparseCategoricalCrossentropy(from_logits=True), 2),
        "focal": (x, labels, losses.BinaryFocalCrossentropy(from_logits=True), 1),
    }[name]


def trained(optimizer: Any, name: str, steps: int) -> tuple[Any, float]:
    x, y, loss, outputs = separable(name)
    keras.utils.set_random_seed(0)
    model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(outputs)])
    model.compile(optimizer, loss, jit_compile=False)
    inject(model).fit(tf.data.Dataset.from_tensors((x, y)).repeat(steps), verbose=0)
    return model, float(model.evaluate(x, y, verbose=0))


@pytest.mark.parametrize(
    ("name", "method", "steps"),
    [
        ("hinge", "RK23", 300),
        *(
            pytest.param(name, method, 2000, marks=pytest.mark.slow)
            for name, method in itertools.product(
                ["hinge", "squared hinge", "logistic", "softmax", "focal"], ["RK23", "RK45", "Heun"]
            )
        ),
    ],
)
def test_on_a_separable_problem_it_ends_as_well_as_the_fixed_method(name: str, method: str, steps: int) -> None:
    model, loss = trained(ADAPTIVE[method](0.01), name, steps)
    _, fixed = trained(ADAPTIVE[method](0.01, rtol=None), name, steps)
    assert all(np.isfinite(weight).all() for weight in model.get_weights())
    assert float(model.optimizer.step_size) <= 1e4
    assert loss <= fixed


# Who says how long a step may be


def sizes_of(optimizer: Any, steps: int, before: Callable[[int], None] = lambda step: None) -> list[float]:
    """The sizes of steps on a loss without curvature, where each step may be five times as long."""
    model, found = line(optimizer, lambda y, p: p), []
    for step in range(steps):
        before(step)
        model.train_on_batch(one(1e-6), one(1.0))
        found.append(float(optimizer.learning_rate))
    return found


def test_no_step_is_longer_than_max_step() -> None:
    assert sizes_of(RK23(1.0, max_step=20.0), 5) == [1.0, 5.0, 20.0, 20.0, 20.0]
    assert max(sizes_of(RK23(1.0), 9)) == 1e4
    again = keras.optimizers.deserialize(keras.optimizers.serialize(RK23(1.0, max_step=20.0)))
    assert again.max_step == 20.0


def test_a_learning_rate_from_outside_is_the_largest_step() -> None:
    optimizer = RK23(1.0)
    given = {2: 0.5, 4: 0.5, 5: 1e-9, 7: 2.0, 9: 1e9}

    def assign(step: int) -> None:
        if step in given:
            optimizer.learning_rate = given[step]

    found = sizes_of(optimizer, 11, assign)
    assert found[:5] == [1.0, 5.0, 0.5, 0.5, 0.5]
    assert found[5] == found[6] == pytest.approx(1e-9)
    assert found[7:9] == pytest.approx([5e-9, 2.5e-8]) or max(found[7:9]) <= 2.0
    assert found[9] <= 1e4


def test_after_a_learning_rate_that_is_no_number_another_one_holds() -> None:
    optimizer = RK23(1.0)
    given = {1: float("nan"), 3: 2.0}

    def assign(step: int) -> None:
        if step in given:
            optimizer.learning_rate = given[step]

    assert sizes_of(optimizer, 5, assign)[3:] == [2.0, 2.0]
    assert int(optimizer.rejected) == 2


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        (
            "learning_rate",
            keras.optimizers.schedules.ExponentialDecay(0.1, 10, 0.9),
            "`learning_rate` must be a number where `rtol` chooses the steps",
        ),
        ("weight_decay", 0.1, "`weight_decay` and `rtol` do not go together"),
    ],
    ids=["schedule", "decay"],
)
def test_what_does_not_go_with_rtol_is_refused_later_too(name: str, value: Any, message: str) -> None:
    model = line(RK23(0.1))
    setattr(model.optimizer, name, value)
    with pytest.raises(ValueError, match=message):
        model.train_on_batch(one(1.0), one(0.0))
    assert model.get_weights()[0] == 1.0


class CalledOften(Heun):
    """Known wrong: a callable is called for the questions, and again for the step."""

    @property
    def learning_rate(self) -> Any:
        return self._learning_rate()


@pytest.mark.parametrize(
    "kind", [Heun, pytest.param(CalledOften, marks=pytest.mark.xfail(strict=True, raises=AssertionError))]
)
def test_a_callable_is_called_once_a_step(kind: Any) -> None:
    calls = itertools.count(1)
    model = line(kind(lambda: next(calls) / 16, weight_decay=0.25))
    model.train_on_batch(one(1.0), one(0.0))
    h, kept = 1 / 16, 1 - 0.25 / 16  # Keras decays first, then goes along the direction
    assert next(calls) == 2
    assert float(model.get_weights()[0][0, 0]) == pytest.approx(kept - h * (2 + 2 * (1 - 2 * h)) / 2, rel=1e-6)


# What could never work


SAME = ButcherTableau([[0, 0], [1, 0]], [0.5, 0.5], [0, 1], 2, [0.5, 0.5])
TWINS = ButcherTableau([[0, 0], [0, 0]], [1, 0], [0, 0], 1, [0, 1])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"method": SAME, "rtol": 1e-3}, "the error estimate would always be 0"),
        ({"method": TWINS, "rtol": 1e-3}, "the error estimate would always be 0"),
        ({"rtol": 1e-3, "max_step": 1e-3}, "`max_step` must be a finite number, at least `learning_rate`"),
        ({"rtol": 1e-3, "max_step": float("nan")}, "Received: max_step=nan"),
        ({"rtol": 1e-3, "max_step": "long"}, "Received: max_step='long'"),
        ({"max_step": 1.0}, "`max_step` needs `rtol`"),
    ],
)
def test_wrong_arguments(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RungeKutta(0.01, **arguments)


def test_a_direction_that_asks_nothing_is_refused() -> None:
    class Silent(InjectedOptimizer):
        def direction(self, oracle: Any, values: Any, learning_rate: Any) -> Any:
            return values

    model = line(Silent(0.1))
    with pytest.raises(ValueError, match="`direction` of Silent must ask"):
        model.train_on_batch(one(1.0), one(0.0))
    assert model.get_weights()[0] == 1.0


def test_the_docstrings_own_method_survives_a_gradient_of_zero() -> None:
    lines = [text.strip() for text in (InjectedOptimizer.__doc__ or "").splitlines()]
    code = [text[4:] for text in lines if text[:4] in (">>> ", "... ")]
    names: dict[str, Any] = {"keras": keras, "np": np, "InjectedOptimizer": InjectedOptimizer, "inject": inject}
    exec("\n".join(code[: next(i for i, text in enumerate(code) if text.startswith("model"))]), names)
    model = line(names["SAM"](0.1))
    model.train_on_batch(one(0.0), one(0.0))
    assert model.get_weights()[0] == 1.0
    assert companion.RungeKuttaChebyshev(0.1, stages=np.int64(3)).stages == 3


@pytest.mark.parametrize("parts", [1, 2])
def test_a_rejected_step_still_tells_what_it_has_seen(parts: int) -> None:
    model = line(RK23(8.0))
    model.compile(model.optimizer, "mse", metrics=["mae"], run_eagerly=True)
    x = np.array([[100.0], [200.0]], "float32")
    seen = inject(model, micro_batches=parts).train_on_batch(x, 0 * x, return_dict=True)
    assert int(model.optimizer.rejected) == 1
    assert {name: float(value) for name, value in seen.items()} == {"loss": 25_000.0, "mae": 150.0}


class LeavesStatistics(RK23):
    """Known wrong: what the first question has moved stays moved."""

    def direction(self, oracle: Any, values: Any, learning_rate: Any) -> Any:
        found = super().direction(oracle, values, learning_rate)
        oracle._oracle._moving, oracle._oracle._start = [], []
        return found


@pytest.mark.parametrize(
    "kind", [RK23, pytest.param(LeavesStatistics, marks=pytest.mark.xfail(strict=True, raises=AssertionError))]
)
def test_a_rejected_step_puts_back_statistics_seeds_and_states(kind: Any) -> None:
    layers = keras.layers
    sequence = [keras.Input((3, 2), batch_size=4), layers.SimpleRNN(2, stateful=True)]
    model = keras.Sequential([*sequence, layers.BatchNormalization(), layers.Dropout(0.5), layers.Dense(1)])
    model.compile(kind(0.01), "mse", run_eagerly=True)
    x, y = np.ones((4, 3, 2), "float32"), np.ones((4, 1))
    inject(model).train_on_batch(x, y)
    kept = [variable.numpy().tobytes() for variable in model.variables]
    model.optimizer.step_size.assign(1e3)  # too long, on a batch that is fine
    for rejected, batch in ((1, np.nan * x), (2, x[::-1] * np.arange(2))):
        model.train_on_batch(batch, 100 * y)
        assert int(model.optimizer.rejected) == rejected
        assert [variable.numpy().tobytes() for variable in model.variables] == kept
    model.optimizer.step_size.assign(1e-6)
    model.train_on_batch(x, y)
    moved = {v.name for v, old in zip(model.variables, kept, strict=True) if v.numpy().tobytes() != old}
    assert {"moving_mean", "moving_variance", "seed_generator_state", "bias"} <= moved
