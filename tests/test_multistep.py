"""Holds the two-step rules of `companion.optimizers` against recurrences in NumPy and characteristic roots."""

from collections.abc import Callable
from typing import Any

import keras
import numpy as np
import pytest

from companion import AdamsBashforth2, OptimisticSGD
from companion.gradient_flow import observed_order, quadratic_flow
from tests.kit.dtypes import set_dtype
from tests.kit.integrators import (
    BATCHES,
    START,
    X,
    Y,
    arrays,
    go,
    gradient,
    sequential,
)
from tests.kit.numbers import assert_close

pytestmark = pytest.mark.usefixtures("float64")
METHODS: dict[Any, tuple[float, float]] = {AdamsBashforth2: (3 / 2, -1 / 2), OptimisticSGD: (2, -1)}


def numpy_epochs(kind: Any, h: Callable[[int], float], epochs: int) -> Any:
    (now, before), values, last = METHODS[kind], START, None
    for index, batch in enumerate(BATCHES * epochs):
        slopes = gradient(values, X[batch], Y[batch])
        values = (
            go(values, h(index), (1, slopes)) if last is None else go(values, h(index), (now, slopes), (before, last))
        )
        last = slopes
    return values


@pytest.mark.parametrize(
    ("options", "dtype", "tolerance"),
    [
        ({"jit_compile": False}, "float64", 1e-12),
        ({"jit_compile": True}, "float64", 1e-12),
        ({"run_eagerly": True}, "float64", 1e-12),
        ({"jit_compile": False}, "float32", 2e-7),
    ],
    ids=str,
)
@pytest.mark.parametrize("kind", METHODS)
def test_the_rule_is_that_of_numpy(kind: Any, options: dict[str, Any], dtype: str, tolerance: float) -> None:
    set_dtype(dtype)
    model = sequential()
    model.compile(kind(0.125), "mse", **options)
    model.fit(X, Y, batch_size=6, shuffle=False, epochs=2, verbose=0)
    assert_close(arrays(model), numpy_epochs(kind, lambda index: 0.125, 2), tolerance)
    assert len(model.optimizer.variables) == 10  # iterations, the learning rate, two slots for each weight
    assert {variable.dtype for variable in model.optimizer.variables[2:]} == {dtype}


@pytest.mark.parametrize("kind", METHODS)
def test_a_schedule_scales_the_step_it_is_for(kind: Any) -> None:
    model = sequential()
    model.compile(kind(keras.optimizers.schedules.ExponentialDecay(0.25, 1, 0.5)), "mse", run_eagerly=True)
    model.fit(X, Y, batch_size=6, shuffle=False, verbose=0)
    assert_close(arrays(model), numpy_epochs(kind, lambda index: 0.25 / 2**index, 1))


def on_a_valley(kind: Any, h: float, steps: int, curvatures: Any) -> Any:
    """The weights of L = ½ λ θ², from 1, after each step."""
    weight = keras.Variable(np.ones(len(curvatures)))
    optimizer, found = kind(h), [np.ones(len(curvatures))]
    for _ in range(steps):
        optimizer.apply([keras.ops.convert_to_tensor(curvatures * found[-1])], [weight])
        found.append(weight.value.numpy())
    return np.array(found)


def test_observed_order() -> None:
    """With the exact first gradient already remembered or with Euler's first step, the order is 2."""
    curvatures, sizes, errors = np.array([0.5, 1.0]), np.array([1 / 16, 1 / 32, 1 / 64]), []
    for h in sizes:
        end = on_a_valley(AdamsBashforth2, float(h), round(2 / h), curvatures)[-1]
        errors.append(np.linalg.norm(end - quadratic_flow(np.diag(curvatures), [1.0, 1.0], 2.0)))
    assert observed_order(sizes, errors) == pytest.approx(2, abs=0.1)


@pytest.mark.parametrize("kind", METHODS)
def test_on_a_valley_the_roots_say_how_fast(kind: Any) -> None:
    r"""θ_{k+1} = θ_k - z (a θ_k + b θ_{k-1}), solved by the two roots of r² = r - z (a r + b)."""
    now, before = METHODS[kind]
    z = np.array([0.125, 0.25])
    found = on_a_valley(kind, 0.125, 12, z / 0.125)
    for index in range(len(z)):
        roots = np.roots([1, now * z[index] - 1, before * z[index]])
        first = 1 - z[index]
        weights = np.linalg.solve(np.stack([np.ones(2), roots]), [1, first])
        expected = [np.real(weights @ roots**step) for step in range(13)]
        np.testing.assert_allclose(found[:, index], expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize(("kind", "limit"), [(AdamsBashforth2, 1.0), (OptimisticSGD, 2 / 3)])
def test_limit_of_stability(kind: Any, limit: float) -> None:
    """At z = 1 a root of Adams–Bashforth is -1, at z = 2/3 one of the optimistic rule."""
    now, before = METHODS[kind]
    assert min(np.roots([1, now * limit - 1, before * limit])) == pytest.approx(-1)
    ends = np.abs(on_a_valley(kind, 0.5, 200, np.array([limit - 0.02, limit + 0.02]) * 2)[-1])
    assert ends[0] < 0.1
    assert ends[1] > 10


def test_in_a_game_the_optimistic_step_arrives() -> None:
    """Min over x, max over y of x y: gradient descent leaves, the optimistic rule arrives."""
    for kind, arrives in ((OptimisticSGD, True), (keras.optimizers.SGD, False)):
        weight, optimizer = keras.Variable([1.0, 1.0]), kind(0.25)
        for _ in range(600):
            x, y = weight.value.numpy()
            optimizer.apply([keras.ops.convert_to_tensor([y, -x])], [weight])
        assert (np.linalg.norm(weight.value.numpy()) < 1e-3) == arrives


@pytest.mark.parametrize("kind", METHODS)
def test_it_comes_back_and_starts_anew(kind: Any) -> None:
    optimizer = kind(0.125, clipnorm=1.0, name="mine")
    again = keras.optimizers.deserialize(keras.optimizers.serialize(optimizer))
    assert again.get_config() == optimizer.get_config()
    model = sequential()
    model.compile(again, "mse", run_eagerly=True)
    for weight in (np.ones((2,)), np.ones((2,))):  # a slot is made once
        optimizer.build([keras.Variable(weight)])
    assert len(optimizer.variables) == 4


@pytest.mark.parametrize("kind", METHODS)
@pytest.mark.parametrize("rate", [-0.1, float("nan"), float("inf"), "fast", None])
def test_a_wrong_learning_rate_is_refused(kind: Any, rate: Any) -> None:
    with pytest.raises(ValueError, match="Received: learning_rate="):
        kind(rate)
