"""Holds ImplicitEuler's Newton steps in every precision, and conjugate gradients that stop, against linear algebra."""

from typing import Any

import keras
import numpy as np
import pytest

from companion import ImplicitEuler, inject

X = np.random.default_rng(5).normal(size=(16, 3)).astype("float32")
MINIMUM = np.array([1.0, -2.0, 0.5])
HESSIAN = 2 / 16 * X.T.astype(float) @ X


def resolvent(h: float, steps: int) -> Any:
    """Where implicit Euler is on the least squares, from ones."""
    point = np.ones(3)
    for _ in range(steps):
        point = MINIMUM + np.linalg.solve(np.eye(3) + h * HESSIAN, point - MINIMUM)
    return point


class TwoDtypes(keras.layers.Layer):
    """One product in bfloat16 and one in float64: the kernel is their sum."""

    def __init__(self) -> None:
        super().__init__(dtype="float64")
        options = {"use_bias": False, "kernel_initializer": keras.initializers.Constant(0.5)}
        self.parts = [keras.layers.Dense(1, dtype=dtype, **options) for dtype in ("mixed_bfloat16", "float64")]

    def call(self, inputs: Any) -> Any:
        return sum(keras.ops.cast(part(inputs), "float64") for part in self.parts)


@pytest.mark.parametrize(
    ("dtype", "loss_dtype", "tolerance"),
    [
        ("float32", None, 1e-3),
        ("float64", None, 1e-3),
        ("float64", "float64", 1e-5),
        ("mixed_bfloat16", None, 0.05),
        ("mixed_float16", None, 0.01),
        ("bfloat16", None, 0.05),
        ("float64", "bfloat16", 0.1),
        ("several", None, 0.1),
    ],
)
def test_on_least_squares_it_is_the_resolvent_in_every_precision(dtype: str, loss_dtype: Any, tolerance: float) -> None:
    h = 2.5 if dtype == "several" else 5.0  # two kernels move for one
    layer = TwoDtypes() if dtype == "several" else keras.layers.Dense(1, None, False, "ones", dtype=dtype)
    model = keras.Sequential([keras.Input((3,)), layer])
    model.compile(ImplicitEuler(h), keras.losses.MeanSquaredError(dtype=loss_dtype), run_eagerly=True)
    inject(model)
    for _ in range(3):
        model.train_on_batch(X, (X @ MINIMUM[:, None]).astype("float32"))
    found = sum(weight.astype(float).ravel() for weight in model.get_weights())
    np.testing.assert_allclose(found, resolvent(5.0, 3), rtol=0, atol=tolerance)


def test_keras_still_names_all_layers() -> None:
    inner = keras.Sequential([keras.Input((1,)), keras.layers.Dense(1, dtype="mixed_bfloat16")])
    model = keras.Sequential([keras.Input((1,)), inner])
    assert {"float32", "bfloat16"} <= {layer.compute_dtype for layer in model._flatten_layers()}


# Where the loss is not convex


def truncated(hessian: Any, start: Any, h: float, iterations: int) -> Any:
    """Conjugate gradients for (I + hA) δ = A θ that stop where the curvature is not positive."""
    found, residual = np.zeros(len(start)), hessian @ start
    search = residual
    for _ in range(iterations):
        product = search + h * hessian @ search
        if search @ product <= 0 or residual @ residual < 1e-24:
            break
        factor, before = residual @ residual / (search @ product), residual @ residual
        found, residual = found + factor * search, residual - factor * product
        search = residual + residual @ residual / before * search
    return found


def directions(hessian: Any, start: Any, h: float, iterations: int) -> Any:
    """What ImplicitEuler makes of ½ θᵀ A θ."""

    def loss(y: Any, p: Any) -> Any:
        return 0.5 * keras.ops.sum(p * keras.ops.matmul(p, keras.ops.convert_to_tensor(hessian)), -1)

    keras.config.set_floatx("float64")
    try:
        dense = keras.layers.Dense(len(start), use_bias=False, dtype="float64")
        model = keras.Sequential([keras.Input((1,), dtype="float64"), dense])
        model.compile(ImplicitEuler(h, iterations=1, krylov_iterations=iterations), loss, run_eagerly=True)
        model.set_weights([start[None]])
        inject(model).train_on_batch(np.ones((1, 1)), np.ones((1, len(start))))
        return (start - model.get_weights()[0][0]) / h
    finally:
        keras.config.set_floatx("float32")


@pytest.mark.parametrize("seed", range(6))
def test_conjugate_gradients_stop_at_negative_curvature(seed: int) -> None:
    random = np.random.default_rng(seed)
    axes = np.linalg.qr(random.normal(size=(5, 5)))[0]
    hessian = axes @ np.diag(random.uniform(-2, 4, size=5)) @ axes.T
    start = random.normal(size=5)
    right = truncated(hessian, start, 1.0, 8)
    found = directions(hessian, start, 1.0, 8)
    np.testing.assert_allclose(found, right, rtol=0, atol=1e-5 * (1 + np.abs(right).max()))


def test_if_the_first_direction_bends_down_nothing_moves_and_a_smaller_step_does() -> None:
    hessian, start = np.diag([-2.0, -3.0]), np.array([1.0, 0.5])
    np.testing.assert_array_equal(directions(hessian, start, 1.0, 5), [0.0, 0.0])
    right = np.linalg.solve(np.eye(2) + 0.25 * hessian, hessian @ start)
    np.testing.assert_allclose(directions(hessian, start, 0.25, 5), right, atol=1e-5)


@pytest.mark.parametrize("start", [(1.0, 1e-3), (1.0, 1.0), (1e-3, 1.0)])
def test_it_stays_near_where_the_equation_has_no_solution(start: tuple[float, float]) -> None:
    """Where h λ is −1, what is left of the curvature is rounding: steps were as long as its inverse, or NaN."""
    for h in (1.0, 1 + 1e-12, 1 - 1e-9):
        assert np.abs(directions(np.diag([1.0, -1.0]), np.array(start), h, 5)).max() < 2


@pytest.mark.parametrize("h", [1e-30, 1e-6, 1e6, 1e30])
def test_it_stays_finite_whatever_the_step(h: float) -> None:
    model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(1, None, False, "ones")])
    model.compile(ImplicitEuler(h), "mse", run_eagerly=True)
    inject(model)
    for _ in range(2):
        model.train_on_batch(X, (X @ MINIMUM[:, None]).astype("float32"))
    assert np.isfinite(model.get_weights()[0]).all()


@pytest.mark.parametrize(("h", "scale"), [(1e20, 1e-10), (1e10, 1e5), (1e30, 1.0), (1e-30, 1.0)])
def test_a_step_on_a_loss_of_any_scale(h: float, scale: float) -> None:
    """Squares of its gradient, or h over the distance of two questions, are no float32: it did not move at all."""
    dense = keras.layers.Dense(1, None, False, "ones")
    model = keras.Sequential([keras.Input((2,)), dense])
    model.compile(ImplicitEuler(h), "mse", run_eagerly=True)
    x = scale * np.array([[1.0, 0.0], [0.0, 2.0]])
    inject(model).train_on_batch(x, np.zeros((2, 1)))
    np.testing.assert_allclose(dense.kernel.numpy()[:, 0], 1 / (1 + h * (x**2).sum(0)), atol=2e-3)
