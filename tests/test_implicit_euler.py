"""Holds `companion.implicit_euler` against linear algebra, a root finder, and the proximal step."""

import functools
from typing import Any

import keras
import numpy as np
import pytest

from companion import ImplicitEuler, inject
from companion.gradient_flow import observed_order, quadratic_flow
from tests.kit.dtypes import set_dtype
from tests.kit.integrators import (
    BATCHES,
    START,
    X,
    Y,
    arrays,
    fitted,
    go,
    gradient,
    loss,
    prepared,
)
from tests.kit.numbers import assert_close

pytestmark = pytest.mark.usefixtures("float64")
A = np.array([[1.0, 0.5, 0.0], [0.5, 2.0, -0.5], [0.0, -0.5, 30.0]])
"""The Hessian of a valley."""


def valley(optimizer: Any) -> Any:
    """A model whose loss is ½ θᵀ A θ, from 1, 1, 1."""
    model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(1, None, False, "ones")])
    model.compile(optimizer, lambda y, p: keras.ops.sum(p**2) / 2, run_eagerly=True)
    return inject(model)


ROOT_OF_A = np.linalg.cholesky(A).T


def after(optimizer: Any, steps: int = 1) -> Any:
    model = valley(optimizer)
    for _ in range(steps):
        model.train_on_batch(ROOT_OF_A, np.zeros((3, 1)))
    return arrays(model)[0][:, 0]


@pytest.mark.parametrize("h", [0.25, 4.0, 256.0])
def test_on_a_quadratic_one_newton_step_is_the_resolvent(h: float) -> None:
    """As many conjugate gradients as dimensions solve (I + h A) θ⁺ = θ: gradient descent would need h < 1/15."""
    found = after(ImplicitEuler(h, iterations=1, krylov_iterations=3))
    np.testing.assert_allclose(found, np.linalg.solve(np.eye(3) + h * A, np.ones(3)), rtol=0, atol=1e-6)


def test_more_conjugate_gradients_than_dimensions_do_no_harm() -> None:
    found = after(ImplicitEuler(4.0, iterations=3, krylov_iterations=8))
    np.testing.assert_allclose(found, np.linalg.solve(np.eye(3) + 4 * A, np.ones(3)), rtol=0, atol=1e-7)


def test_it_stays_stable_far_beyond_the_limit_of_gradient_descent() -> None:
    assert np.abs(after(ImplicitEuler(64.0), steps=5)).max() < 1e-6


def test_observed_order() -> None:
    sizes, errors = np.array([1 / 16, 1 / 32, 1 / 64]), []
    for h in sizes:
        end = after(ImplicitEuler(float(h), iterations=1, krylov_iterations=3), round(1 / h))
        errors.append(np.linalg.norm(end - quadratic_flow(A, np.ones(3), 1.0)))
    assert observed_order(sizes, errors) == pytest.approx(1, abs=0.1)


def flat(values: Any) -> Any:
    return np.concatenate([value.ravel() for value in values])


def like_start(vector: Any) -> Any:
    parts = np.split(vector, np.cumsum([value.size for value in START])[:-1])
    return [part.reshape(value.shape) for part, value in zip(parts, START, strict=True)]


@functools.cache
def implicit_end(h: float) -> Any:
    """The solution of θ⁺ = θ - h ∇L(θ⁺) on the network, by SciPy."""
    import scipy.optimize

    found = scipy.optimize.root(lambda v: v - flat(START) + h * flat(gradient(like_start(v))), flat(START), tol=1e-13)
    assert found.success
    return found.x


@pytest.mark.parametrize(
    ("h", "arguments"),
    [
        (0.25, {"iterations": 4, "krylov_iterations": 10}),
        (0.0625, {"solver": "fixed_point", "iterations": 40}),
    ],
    ids=str,
)
def test_on_a_network_it_is_what_a_root_finder_finds(h: float, arguments: dict[str, Any]) -> None:
    model = prepared(ImplicitEuler(h, **arguments), run_eagerly=True)
    model.train_on_batch(X[:6], Y[:6])
    np.testing.assert_allclose(flat(arrays(model)), implicit_end(h), rtol=0, atol=1e-9)


def test_it_is_the_proximal_step() -> None:
    """No point near is better for L + ‖· - θ‖² / 2h."""
    end = like_start(implicit_end(0.25))

    def proximal(values: Any) -> float:
        return loss(values) + float(np.sum((flat(values) - flat(START)) ** 2)) / (2 * 0.25)

    generator = np.random.default_rng(0)
    for _ in range(20):
        near = like_start(flat(end) + 1e-3 * generator.normal(size=22 + 4))
        assert proximal(near) > proximal(end)


@pytest.mark.parametrize("options", [{"jit_compile": True}, {"jit_compile": False}], ids=str)
def test_the_fixed_point_written_out(options: dict[str, Any]) -> None:
    model = fitted(prepared(ImplicitEuler(0.25, "fixed_point", iterations=2), **options))
    values = START
    for batch in BATCHES:
        slopes = gradient(values, X[batch], Y[batch])
        for _ in range(2):
            slopes = gradient(go(values, 0.25, (1, slopes)), X[batch], Y[batch])
        values = go(values, 0.25, (1, slopes))
    assert_close(arrays(model), values)


def test_in_a_graph_and_in_float32() -> None:
    """A difference of float32 gradients gives a product with the Hessian to three digits or so."""
    set_dtype("float32")
    model = prepared(ImplicitEuler(0.25, iterations=3, krylov_iterations=5))
    model.train_on_batch(X[:6], Y[:6])
    np.testing.assert_allclose(flat(arrays(model)), implicit_end(0.25), rtol=0, atol=1e-3)


def test_where_the_curvature_is_negative_it_stays_finite() -> None:
    """On L = cos θ from near its top, with h λ = -4, conjugate gradients stop."""
    model = keras.Sequential([keras.Input((1,)), keras.layers.Dense(1, keras.ops.cos, False)])
    model.compile(ImplicitEuler(4.0), lambda y, p: keras.ops.mean(p), run_eagerly=True)
    inject(model)
    model.set_weights([np.full((1, 1), 0.1)])
    model.train_on_batch(np.ones((1, 1)), np.ones((1, 1)))
    assert np.isfinite(arrays(model)[0]).all()


def test_at_the_minimum_it_stays() -> None:
    model = valley(ImplicitEuler(4.0))
    model.set_weights([np.zeros((3, 1))])
    model.train_on_batch(ROOT_OF_A, np.zeros((3, 1)))
    np.testing.assert_array_equal(arrays(model)[0], np.zeros((3, 1)))


def test_it_comes_back() -> None:
    optimizer = ImplicitEuler(0.5, "fixed_point", iterations=7, krylov_iterations=9, clipnorm=1.0)
    again = keras.optimizers.deserialize(keras.optimizers.serialize(optimizer))
    assert again.get_config() == optimizer.get_config()
    assert (again.solver, again.solver_iterations, again.krylov_iterations) == ("fixed_point", 7, 9)
    assert int(again.iterations) == 0  # Keras's counter of steps, not the argument


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"solver": "newton"}, r"`solver` must be one of .*Received: solver='newton'"),
        ({"solver": None}, "Received: solver=None"),
        ({"iterations": 0}, "`iterations` must be an integer of at least 1. Received: iterations=0"),
        ({"iterations": 2.0}, r"Received: iterations=2\.0"),
        ({"iterations": True}, "Received: iterations=True"),
        ({"krylov_iterations": 0}, "Received: krylov_iterations=0"),
        ({"learning_rate": -1.0}, r"Received: learning_rate=-1\.0"),
    ],
)
def test_wrong_arguments(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ImplicitEuler(**arguments)
