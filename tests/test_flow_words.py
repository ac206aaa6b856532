"""Holds that `gradient_flow` copies what it is given, stays finite where the motion is, and refuses in words."""

import ast
import copy
import pathlib
import pickle
from collections.abc import Callable
from typing import Any

import mpmath
import numpy as np
import pytest
import scipy.linalg
from numpy.polynomial import Polynomial

import companion
from companion.gradient_flow import (
    TABLEAUX,
    ButcherTableau,
    chebyshev_coefficients,
    heavy_ball,
    integrate,
    modified_gradient,
    nesterov,
    observed_order,
    oscillation,
    quadratic_flow,
    stability_polynomial,
)


@pytest.mark.parametrize("method", TABLEAUX)
def test_a_gradient_may_return_one_buffer_every_time(method: str) -> None:
    buffer = np.empty(2)

    def reuses(values: Any) -> Any:
        return np.multiply([2.0, 3.0], values, out=buffer)

    fresh = integrate(lambda values: np.array([2.0, 3.0]) * values, [1.0, -1.0], 0.1, 3, method)
    np.testing.assert_array_equal(integrate(reuses, [1.0, -1.0], 0.1, 3, method), fresh)
    moving = integrate(heavy_ball(reuses, 0.5), [[1.0, -1.0], [0.0, 0.0]], 0.1, 3, method)
    right = integrate(heavy_ball(lambda v: np.array([2.0, 3.0]) * v, 0.5), [[1.0, -1.0], [0.0, 0.0]], 0.1, 3, method)
    np.testing.assert_array_equal(moving, right)


def exact(curvature: float, friction: float, start: float, speed: float, time: float) -> Any:
    """The textbook's formula with sixty digits."""
    with mpmath.workdps(60):
        λ, γ, x, v, t = map(mpmath.mpf, (curvature, friction, start, speed, time))
        root = mpmath.sqrt(γ**2 / 4 - λ)
        sine = mpmath.sinh(root * t) / root if root else t
        return float(mpmath.re(mpmath.exp(-γ * t / 2) * (x * (mpmath.cosh(root * t) + γ / 2 * sine) + v * sine)))


@pytest.mark.parametrize("friction", [0.0, 1e-6, 2.0, 2 + 1e-9, 2 - 1e-9, 50.0, 1e6, 1e150])
@pytest.mark.parametrize("time", [0.0, 1e-9, 1.0, 40.0, 1e4])
def test_an_oscillation_is_right_for_any_friction_and_time(friction: float, time: float) -> None:
    for start, speed in ((1.0, 0.0), (0.0, 1.0), (-0.5, 2.0)):
        found = oscillation(1.0, friction, start, time, speed)
        assert found == pytest.approx(exact(1.0, friction, start, speed, time), rel=1e-9, abs=1e-11)


def test_what_grows_without_a_bound_leaves_the_rest_alone() -> None:
    saddle = quadratic_flow(np.diag([-1.0, 1.0]), [0.0, 1.0], [1.0, 1000.0])
    np.testing.assert_allclose(saddle, [[0, np.exp(-1)], [0, 0]], atol=1e-15)
    assert quadratic_flow(np.diag([-1.0, 1.0]), [1.0, 1.0], 1000.0).tolist() == [np.inf, 0.0]
    assert oscillation(-1.0, 0.0, 1.0, 1000.0, -1.0) == 0.0  # from the ridge's own approach
    assert oscillation([-1.0, 1.0], 0.0, [1.0, 1.0], 1000.0).tolist() == [np.inf, pytest.approx(np.cos(1000.0))]


def test_of_what_grows_the_fastest_says_which_way() -> None:
    turn = np.array([[0.6, -0.8], [0.8, 0.6]])
    matrix = turn @ np.diag([-1.0, -2.0]) @ turn.T
    start = turn @ [-3.0, 1e-3]  # 1e-3 e^(2t) along (-0.8, 0.6), and -3 e^t along (0.6, 0.8)
    assert quadratic_flow(matrix, start, 2000.0).tolist() == [-np.inf, np.inf]
    assert quadratic_flow([[1.0, 0.0], [0.0, 0.0]], [1.0, 1.0], np.inf).tolist() == [0.0, 1.0]


def test_a_number_has_a_modified_gradient() -> None:
    modified = modified_gradient(lambda theta: theta**3, lambda theta: 3 * theta**2, 0.5)
    assert modified(np.float64(2.0)) == 8 + 0.25 * 12 * 8


def test_many_stages_in_linear_time_and_any_damping() -> None:
    coefficients = chebyshev_coefficients(20_000)
    assert len(coefficients) == 20_000
    assert np.isfinite(coefficients).all()
    before, now = 0.0, coefficients[0][2]
    for mu, nu, step in coefficients[1:]:
        before, now = now, mu * now + nu * before + step
    assert now == pytest.approx(1, rel=1e-6)  # a step of order 1 goes h far
    assert np.isfinite(chebyshev_coefficients(50, 1e308)).all()


IDENTITY = np.eye(2)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: integrate(lambda v: v[None], [1.0, 2.0], 0.1, 2), r"`gradient` must return real numbers in the shape"),
        (lambda: integrate(lambda v: v[:1], [1.0, 2.0], 0.1, 2), r"in the shape \(2,\)"),
        (lambda: integrate(lambda v: 1.0, [1.0, 2.0], 0.1, 2), "Received: 1.0"),
        (lambda: integrate(lambda v: None, 1.0, 0.1, 2), "Received: None"),
        (lambda: integrate(lambda v: 1j * v, 1.0, 0.1, 2), "Received: 1j"),
        (lambda: integrate(None, 1.0, 0.1, 2), "`gradient` must be a function"),  # type: ignore[arg-type]
        (lambda: integrate(lambda v: v, None, 0.1, 2), "`values` must be numbers. Received: values=None"),
        (lambda: integrate(lambda v: v, ["a"], 0.1, 2), "`values` must be numbers"),
        (lambda: integrate(lambda v: v, 1.0, np.nan, 2), "`step_size` must be a number"),
        (lambda: integrate(lambda v: v, 1.0, None, 2), "Received: step_size=None"),  # type: ignore[arg-type]
        (lambda: integrate(heavy_ball(lambda v: v[:1], 1.0), np.ones((2, 3)), 0.1, 2), "`gradient` must return"),
        (lambda: heavy_ball(lambda v: v, np.inf), "`friction` must be a number"),
        (lambda: integrate(nesterov(lambda v: v), [1.0, 0.0, 0.0], 0.1, 2), "`time`, the last of the state"),
        (lambda: integrate(nesterov(lambda v: v), [1.0, 0.0], 0.1, 2), "`values` must be np.stack"),
        (lambda: integrate(heavy_ball(lambda v: v, 1.0), [1.0, 0.0, 1.0], 0.1, 2), r"np.stack\(\[position, velocity\]"),
        (lambda: integrate(heavy_ball(lambda v: v, 1.0), 1.0, 0.1, 2), "`values` must be np.stack"),
        (lambda: modified_gradient(lambda v: v, lambda v: v, 0.1)(np.ones(2)), r"`hessian` must return real numbers"),
        (lambda: modified_gradient(lambda v: v, lambda v: np.ones((2,) * 4), 0.1)(np.ones((2, 2))), "in one dimension"),
        (lambda: oscillation(1.0, np.inf, 1.0, 1.0), "`friction` must be a number in .* Received: friction=inf"),
        (lambda: oscillation(1.0, -1.0, 1.0, 1.0), "Received: friction=-1.0"),
        (
            lambda: oscillation([1.0, 2.0], 1.0, np.ones(3), 1.0),
            r"`curvature` must be real numbers in the shape \(3,\)",
        ),
        (lambda: oscillation(1.0, 1.0, np.ones(3), 1.0, [1.0]), r"`velocity` must be real numbers in the shape \(3,\)"),
        (lambda: oscillation(1.0, 1.0, None, 1.0), "`values` must be real numbers. Received: values=None"),
        (lambda: quadratic_flow(IDENTITY, np.ones(3), 1.0), r"`values` must be real numbers in the shape \(2,\)"),
        (lambda: quadratic_flow(IDENTITY, 1.0, 1.0), r"`values` must be real numbers in the shape \(2,\)"),
        (lambda: quadratic_flow(IDENTITY, np.ones(2), 1.0, [1.0]), "`minimum` must be"),
        (lambda: quadratic_flow(IDENTITY * np.nan, np.ones(2), 1.0), "`matrix` must be symmetric and finite"),
        (lambda: quadratic_flow(IDENTITY, np.ones(2), None), "`times` must be"),
        (lambda: observed_order([0.1], [0.1]), "`step_sizes` must hold two different sizes"),
        (lambda: observed_order([0.1, 0.1], [0.1, 0.2]), "two different sizes"),
        (lambda: observed_order([0.1, np.nextafter(0.1, 1)], [0.1, 0.2]), "two different sizes"),
        (lambda: quadratic_flow(np.zeros((0, 0)), [], 1.0), "`matrix` must be symmetric and finite"),
        (lambda: observed_order([0.1, 0.2], [0.1, 0.0]), "`errors` must be a list of finite numbers greater than 0"),
        (lambda: observed_order([0.1, -0.2], [0.1, 0.2]), "`step_sizes` must be a list of finite numbers"),
        (lambda: observed_order([0.1, 0.2], [0.1, np.nan]), "`errors` must be a list"),
        (lambda: observed_order([0.1, 0.2], [0.1]), r"`errors` must be real numbers in the shape \(2,\)"),
        (lambda: chebyshev_coefficients(3, np.inf), "Received: damping=inf"),
        (lambda: chebyshev_coefficients(3, "a"), "`damping` must be a number in .* Received: damping='a'"),  # type: ignore[arg-type]
        (lambda: ButcherTableau([[0]], [1], [0], order=0), "`order` must be an integer of at least 1"),
    ],
)
def test_what_cannot_be_followed_is_said(call: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


def test_integers_of_numpy_are_integers() -> None:
    assert len(chebyshev_coefficients(np.int64(3))) == 3
    assert integrate(lambda v: v, 1, 0.5, np.int32(2)).shape == (3,)


def test_the_flow_is_computed_with_numpy_alone() -> None:
    rooms = ["gradient_flow", "tableaux", "stability", "arguments"]
    for room in rooms:
        source = (pathlib.Path(companion.__file__).parent / f"{room}.py").read_text()
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.Import):
                assert {alias.name for alias in node.names} <= {"numpy", "math", "functools", "itertools"}
            elif isinstance(node, ast.ImportFrom) and str(node.module).startswith("companion"):
                names = [a.name for a in node.names] if node.module == "companion" else [str(node.module)[10:]]
                assert set(names) <= set(rooms)
            elif isinstance(node, ast.ImportFrom):
                assert str(node.module).split(".")[0] in {"numpy", "typing", "collections", "dataclasses"}


@pytest.mark.parametrize("unit", [1e-150, 1e-9, 1.0, 1e150])
def test_symmetric_is_symmetric_in_any_unit(unit: float) -> None:
    matrix = unit * np.array([[2.0, 1.0], [1.0, 3.0]])
    expected = scipy.linalg.expm(-matrix / unit) @ [1.0, 2.0]
    np.testing.assert_allclose(quadratic_flow(matrix, [1.0, 2.0], 1 / unit), expected, rtol=1e-12)
    with pytest.raises(ValueError, match="`matrix` must be symmetric"):
        quadratic_flow(matrix * [[1.0, 1.0001], [1.0, 1.0]], [1.0, 2.0], 1 / unit)


def test_an_oscillation_far_back_is_finite_as_long_as_it_is() -> None:
    """One rate is -2e6: its exponential passes the largest number, and the ball has a tiny share of it."""
    motion = {"curvature": 1e-2, "friction": 2e6}
    found = oscillation(**motion, values=1.0, times=-3.6e-4, velocity=0.0)
    assert found == pytest.approx(exact(**motion, start=1.0, speed=0.0, time=-3.6e-4), rel=1e-9)


def test_a_stability_polynomial_is_a_polynomial() -> None:
    found, plain = stability_polynomial("rk4"), Polynomial([1, 1, 1 / 2, 1 / 6, 1 / 24])
    for each in (found, copy.copy(found), pickle.loads(pickle.dumps(found))):
        assert isinstance(each, Polynomial)
        np.testing.assert_allclose(each([-1.0, 2.0j]), plain(np.array([-1.0, 2.0j])), rtol=1e-15)
    np.testing.assert_allclose((found - plain).coef, 0, atol=1e-15)
    np.testing.assert_allclose((plain * found).coef, (found**2).coef)
    assert found.deriv()(-1.0) == pytest.approx(plain.deriv()(-1.0))
    assert found(-1e200) == np.inf  # where stages would say inf - inf
