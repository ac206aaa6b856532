"""Holds `companion.gradient_flow` against SciPy, diffrax, closed forms and finite differences."""

import dataclasses
import functools
import json
from typing import Any

import numpy as np
import pytest

from companion import RungeKutta, gradient_flow
from companion.gradient_flow import (
    TABLEAUX,
    ButcherTableau,
    chebyshev,
    chebyshev_coefficients,
    heavy_ball,
    integrate,
    modified_gradient,
    modified_loss,
    nesterov,
    observed_order,
    order_of,
    oscillation,
    quadratic_flow,
    stability_limit,
    stability_polynomial,
    tableau,
)
from tests.kit.processes import output_of

ORDERS = {
    "euler": 1,
    "midpoint": 2,
    "heun": 2,
    "ralston": 2,
    "extragradient": 1,
    "kutta3": 3,
    "rk4": 4,
    "bogacki_shampine": 3,
    "dormand_prince": 5,
}
EMBEDDED = [name for name, each in TABLEAUX.items() if each.b_embedded is not None]


def altered(method: ButcherTableau, name: str, place: tuple[int, ...], by: float = 1e-6) -> dict[str, Any]:
    """A tableau's fields with one number changed, and `c` still the row sums."""
    fields = {key: np.array(value) for key, value in dataclasses.asdict(method).items() if value is not None}
    fields[name][place] += by
    return {**fields, "c": fields["a"].sum(1), "order": method.order}


# Tableaux


def test_every_tableau_has_its_rows() -> None:
    """In the tables of this file, in their order, and in the words of who takes a name."""
    assert list(ORDERS) == list(TABLEAUX), "ORDERS must name the tableaux, in the order of TABLEAUX"
    for name in TABLEAUX:
        assert name in POLYNOMIALS, f"{name}: no row in POLYNOMIALS"
        assert name in REAL_LIMITS, f"{name}: no row in REAL_LIMITS"
        assert f'``"{name}"``' in (RungeKutta.__doc__ or ""), f"{name} is not named in the docstring of RungeKutta"


def test_the_methods_and_their_orders() -> None:
    assert {name: method.order for name, method in TABLEAUX.items()} == ORDERS
    assert {name: order_of(method.a, method.b) for name, method in TABLEAUX.items()} == ORDERS
    embedded = {name: order_of(TABLEAUX[name].a, TABLEAUX[name].b_embedded) for name in EMBEDDED}
    assert embedded == {name: ORDERS[name] - 1 for name in EMBEDDED}


@pytest.mark.parametrize(("name", "theirs"), [("rk23", "RK23"), ("rk45", "RK45")])
def test_coefficients_are_those_of_scipy(name: str, theirs: str) -> None:
    import scipy.integrate

    method, scipy_method = tableau(name), getattr(scipy.integrate, theirs)
    stages, columns = scipy_method.A.shape  # SciPy leaves out the stage that is the next step's first
    np.testing.assert_array_equal(np.array(method.a)[:stages, :columns], scipy_method.A)
    np.testing.assert_array_equal(method.b, [*scipy_method.B, 0])
    np.testing.assert_array_equal(method.a[-1], [*scipy_method.B, 0])
    np.testing.assert_array_equal(method.c, [*scipy_method.C, 1])
    np.testing.assert_allclose(np.subtract(method.b_embedded, method.b), scipy_method.E, rtol=0, atol=1e-16)
    assert method.order == scipy_method.error_estimator_order + 1


def test_the_order_conditions_written_out() -> None:
    """Hairer, Nørsett and Wanner, table II.2.2, up to order 4."""
    generator = np.random.default_rng(0)
    for a, b in [
        *[(np.array(method.a), np.array(method.b)) for method in TABLEAUX.values()],
        *[(np.tril(generator.normal(size=(4, 4)), -1), np.array([0.25] * 4)) for _ in range(3)],
    ]:
        c = a.sum(1)
        conditions = [
            [b.sum() - 1],
            [b @ c - 1 / 2],
            [b @ c**2 - 1 / 3, b @ a @ c - 1 / 6],
            [b @ c**3 - 1 / 4, (b * c) @ a @ c - 1 / 8, b @ a @ c**2 - 1 / 12, b @ a @ a @ c - 1 / 24],
        ]
        holds = [max(map(abs, each)) < 1e-10 for each in conditions]
        assert order_of(a, b, up_to=4) == [*holds, False].index(False)


def test_order_conditions_are_as_many_as_rooted_trees() -> None:
    from companion.tableaux import _trees

    assert [len(_trees(order)) for order in range(1, 8)] == [1, 1, 2, 4, 9, 20, 48]  # OEIS A000081


@pytest.mark.parametrize("name", TABLEAUX)
def test_a_wrong_coefficient_is_refused(name: str) -> None:
    method, refused = TABLEAUX[name], 0
    for field in ("a", "b", "b_embedded"):
        for place in zip(*np.nonzero(np.array(getattr(method, field) or [])), strict=True):
            if name == "extragradient" and field == "a":
                continue  # every point asked at gives a method of order 1
            with pytest.raises(ValueError, match=r"the tableau has order|must have order"):
                ButcherTableau(**altered(method, field, place))
            refused += 1
    assert refused >= 1
    if method.order > 1:
        with pytest.raises(ValueError, match=f"claims {method.order + 1}, but the tableau has order {method.order}"):
            ButcherTableau(method.a, method.b, method.c, method.order + 1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"c": [0, 0.9]}, r"`c` must be the row sums of `a`, \(0.0, 1.0\). Received: c=\(0.0, 0.9\)"),
        ({"a": [[0, 0], [1, 0.5]], "c": [0, 1.5]}, "the method is explicit"),
        ({"a": [[0, 0.5], [1, 0]], "c": [0.5, 1]}, "the method is explicit"),
        ({"a": [[0, 0]]}, r"`a` must hold numbers in the shape \(2, 2\)"),
        ({"a": [[0], [1]]}, r"`a` must hold numbers in the shape \(2, 2\)"),
        ({"a": [[0, 0], [1]]}, r"`a` must hold numbers in the shape \(2, 2\)"),
        ({"b": [1]}, r"must hold numbers in the shape"),
        ({"b": 0.5}, r"must hold numbers in the shape"),
        ({"b": [0.5, None]}, r"`b` must hold numbers in the shape \(2,\)"),
        ({"b": "half"}, r"must hold numbers in the shape"),
        ({"b": [np.nan, 0.5]}, r"`b` must hold numbers"),
        ({"c": [0, np.inf]}, r"`c` must hold numbers"),
        ({"c": [0, 1, 1]}, r"`c` must hold numbers in the shape \(2,\)"),
        ({"b_embedded": [1]}, r"`b_embedded` must hold numbers in the shape \(2,\)"),
        ({"b_embedded": [0.4, 0.4]}, "`b_embedded` must have order 1, one less than `b`, but has order 0"),
        ({"order": 0}, "Received: order=0"),
        ({"order": 2.0}, "Received: order=2.0"),
        ({"order": True}, "Received: order=True"),
        ({"order": "two"}, "Received: order='two'"),
    ],
)
def test_a_wrong_tableau_is_refused(change: dict[str, Any], message: str) -> None:
    heun: dict[str, Any] = {"a": [[0, 0], [1, 0]], "b": [0.5, 0.5], "c": [0, 1], "order": 2}
    with pytest.raises(ValueError, match=message):
        ButcherTableau(**{**heun, **change})


def test_a_tableau_of_the_users_own() -> None:
    """The rule of three eighths (Kutta 1901), given as lists, arrays and integers."""
    a = np.array([[0, 0, 0, 0], [1 / 3, 0, 0, 0], [-1 / 3, 1, 0, 0], [1, -1, 1, 0]])
    mine = ButcherTableau(a, [1 / 8, 3 / 8, 3 / 8, 1 / 8], [0, 1 / 3, 2 / 3, 1], order=4)
    a[:] = 7  # the tableau keeps numbers of its own
    assert mine == ButcherTableau(mine.a, mine.b, mine.c, 4)
    assert hash(mine) == hash(ButcherTableau(**dataclasses.asdict(mine)))
    assert tableau(mine) is mine
    assert mine.stages() == (0, 1, 2, 3)
    np.testing.assert_allclose(stability_polynomial(mine).coef, stability_polynomial("rk4").coef, atol=1e-15)
    with pytest.raises(dataclasses.FrozenInstanceError):
        mine.order = 3  # type: ignore[misc]
    assert ButcherTableau(mine.a, mine.b, mine.c, order=2).order == 2  # it may claim less than it has


@pytest.mark.parametrize(
    ("name", "plain", "embedded"),
    [
        ("euler", 1, 1),
        *[(name, 2, 2) for name in ("heun", "midpoint", "ralston", "extragradient")],
        ("kutta3", 3, 3),
        ("rk4", 4, 4),
        ("bogacki_shampine", 3, 4),
        ("dormand_prince", 6, 7),
    ],
)
def test_a_stage_that_nothing_depends_on_is_left_out(name: str, plain: int, embedded: int) -> None:
    method = TABLEAUX[name]
    assert (len(method.stages()), len(method.stages(embedded=method.b_embedded is not None))) == (plain, embedded)
    asked: list[Any] = []
    integrate(lambda theta: asked.append(theta) or theta, 1.0, 0.1, 5, name)
    assert len(asked) == 5 * plain


def test_a_stage_without_weight_that_others_need_is_kept() -> None:
    assert ButcherTableau([[0, 0], [0, 0]], [0, 1], [0, 0], order=1).stages() == (1,)
    assert tableau("midpoint").stages() == (0, 1)


def test_names_and_aliases() -> None:
    assert tableau("rk23") is TABLEAUX["bogacki_shampine"]
    assert tableau("rk45") is TABLEAUX["dormand_prince"]
    assert all(tableau(name) is method for name, method in TABLEAUX.items())
    names = ", ".join(map(repr, [*ORDERS, "rk23", "rk45"]))
    for wrong in ("Heun", None, 4, ["heun"]):
        with pytest.raises(ValueError) as error:  # noqa: PT011 (the whole text is compared)
            tableau(wrong)
        assert str(error.value) == f"`method` must be a ButcherTableau or one of {names}. Received: method={wrong!r}"


# Order


def pendulum(state: Any) -> Any:
    """With friction; what it does in time is minus this, as with a gradient."""
    angle, speed = state
    return np.array([-speed, 4 * np.sin(angle) + 0.2 * speed])


@functools.cache
def pendulum_end() -> Any:
    import scipy.integrate

    solution = scipy.integrate.solve_ivp(
        lambda time, state: -pendulum(state), (0, 1), [1.0, 0.5], "DOP853", rtol=1e-13, atol=1e-15
    )
    return solution.y[:, -1]


def slope_of(method: Any) -> float:
    sizes = np.array([1 / 20, 1 / 40, 1 / 80])
    ends = [integrate(pendulum, [1.0, 0.5], h, round(1 / h), method)[-1] for h in sizes]
    return observed_order(sizes, [np.linalg.norm(end - pendulum_end()) for end in ends])


@pytest.mark.parametrize(("name", "order"), [*ORDERS.items(), ("chebyshev", 1)])
def test_observed_order(name: str, order: int) -> None:
    assert slope_of(chebyshev(5) if name == "chebyshev" else name) == pytest.approx(order, abs=0.1)


@pytest.mark.parametrize("name", EMBEDDED)
def test_the_embedded_weights_have_their_order(name: str) -> None:
    method = TABLEAUX[name]
    lower = ButcherTableau(method.a, method.b_embedded, method.c, method.order - 1)
    assert slope_of(lower) == pytest.approx(method.order - 1, abs=0.1)


def test_observed_order_is_the_slope_of_a_line() -> None:
    assert observed_order([0.1, 0.2], [3 * 0.1**2.5, 3 * 0.2**2.5]) == pytest.approx(2.5)
    sizes, errors = [0.1, 0.2, 0.4, 0.8], [0.3, 0.5, 2.0, 3.0]
    assert observed_order(sizes, errors) == pytest.approx(np.polyfit(np.log(sizes), np.log(errors), 1)[0])


# Against diffrax, in a process of its own: it needs 64 bits in all of JAX


@functools.cache
def diffrax_ends() -> dict[str, list[float]]:
    code = """
import json, jax, jax.numpy as jnp, diffrax
jax.config.update("jax_enable_x64", True)
jax.config.update("jax_platforms", "cpu")
def field(t, state, args):
    angle, speed = state
    return jnp.stack([speed, -4 * jnp.sin(angle) - 0.2 * speed])
found = {}
for name in ("Euler", "Heun", "Midpoint", "Ralston", "Bosh3", "Dopri5"):
    solution = diffrax.diffeqsolve(
        diffrax.ODETerm(field), getattr(diffrax, name)(), t0=0.0, t1=1.0, dt0=0.1, y0=jnp.array([1.0, 0.5]),
        stepsize_controller=diffrax.ConstantStepSize(), saveat=diffrax.SaveAt(steps=True), max_steps=10,
    )
    found[name] = solution.ys[-1].tolist()
    assert int(solution.stats["num_steps"]) == 10
print(json.dumps(found))
"""
    return json.loads(output_of(code).splitlines()[-1])


@pytest.mark.parametrize(
    ("name", "theirs"),
    {
        "euler": "Euler",
        "heun": "Heun",
        "midpoint": "Midpoint",
        "ralston": "Ralston",
        "bogacki_shampine": "Bosh3",
        "dormand_prince": "Dopri5",
    }.items(),
)
def test_ten_steps_equal_diffrax(name: str, theirs: str) -> None:
    found = integrate(pendulum, [1.0, 0.5], 0.1, 10, name)[-1]
    np.testing.assert_allclose(found, diffrax_ends()[theirs], rtol=0, atol=1e-12)


# Trajectories


def test_a_trajectory_has_the_shape_of_its_values() -> None:
    start = np.arange(6).reshape(2, 3)  # integers
    found = integrate(lambda theta: theta, start, 0.5, 4, "rk4")
    assert found.shape == (5, 2, 3)
    assert found.dtype == np.float64
    np.testing.assert_array_equal(found[0], start)
    np.testing.assert_array_equal(start, np.arange(6).reshape(2, 3))
    assert integrate(lambda theta: theta, 3, 0.5, 0).tolist() == [3.0]


def test_complex_values_follow_a_rotation() -> None:
    found = integrate(lambda z: -1j * z, 1 + 0j, np.pi / 200, 100, "rk4")
    assert found[-1] == pytest.approx(1j, abs=1e-7)


@pytest.mark.parametrize("steps", [-1, 2.0, True, "3", None])
def test_a_wrong_number_of_steps_is_refused(steps: Any) -> None:
    with pytest.raises(ValueError, match=r"`steps` must be an integer of at least 0. Received: steps="):
        integrate(lambda theta: theta, 1.0, 0.1, steps)


@pytest.mark.parametrize("name", [*TABLEAUX, "chebyshev"])
def test_on_a_quadratic_a_step_multiplies_by_the_stability_polynomial(name: str) -> None:
    method = chebyshev(7) if name == "chebyshev" else name
    curvatures = np.array([0.3, 1.0, 2.5, -0.4])
    found = integrate(lambda theta: curvatures * theta, np.ones(4), 0.7, 6, method)
    factors = stability_polynomial(method)(-0.7 * curvatures)
    np.testing.assert_allclose(found, factors ** np.arange(7)[:, None], rtol=1e-11)


# Stability


TAYLOR = [1, 1, 1 / 2, 1 / 6, 1 / 24, 1 / 120]
POLYNOMIALS = {
    "euler": TAYLOR[:2],
    **dict.fromkeys(("midpoint", "heun", "ralston"), TAYLOR[:3]),
    "extragradient": [1, 1, 1],
    **dict.fromkeys(("kutta3", "bogacki_shampine"), TAYLOR[:4]),
    "rk4": TAYLOR[:5],
    "dormand_prince": [*TAYLOR, 1 / 600],
}


@pytest.mark.parametrize("name", TABLEAUX)
def test_stability_polynomials(name: str) -> None:
    np.testing.assert_allclose(stability_polynomial(name).coef, POLYNOMIALS[name], rtol=0, atol=1e-15)


def first_root(coefficients: Any) -> float:
    """The smallest positive real root."""
    roots = np.roots(coefficients[::-1])
    return float(min(root.real for root in roots if abs(root.imag) < 1e-9 and root.real > 1e-9))


CUBE = (4 + 17**0.5) ** (1 / 3)
REAL_LIMITS = {
    **dict.fromkeys(("euler", "midpoint", "heun", "ralston"), 2.0),
    "extragradient": 1.0,
    **dict.fromkeys(("kutta3", "bogacki_shampine"), 1 + CUBE - 1 / CUBE),
    "rk4": first_root([0, -1, 1 / 2, -1 / 6, 1 / 24]),
    "dormand_prince": first_root([0, -1, 1 / 2, -1 / 6, 1 / 24, -1 / 120, 1 / 600]),
}
IMAGINARY_LIMITS = {
    **dict.fromkeys(("euler", "midpoint", "heun", "ralston"), 0.0),
    "extragradient": 1.0,
    **dict.fromkeys(("kutta3", "bogacki_shampine"), 3**0.5),
    "rk4": 8**0.5,
}


def test_the_closed_forms_are_the_numbers_known() -> None:
    known = {"kutta3": 2.5127, "rk4": 2.7853, "dormand_prince": 3.3066}
    assert {name: round(REAL_LIMITS[name], 4) for name in known} == known


@pytest.mark.parametrize("name", TABLEAUX)
def test_stability_limits(name: str) -> None:
    assert stability_limit(name) == pytest.approx(REAL_LIMITS[name], abs=1e-9)
    if name in IMAGINARY_LIMITS:
        assert stability_limit(name, "imaginary") == pytest.approx(IMAGINARY_LIMITS[name], abs=1e-5)


def test_the_imaginary_limit_of_dormand_and_prince() -> None:
    y = np.polynomial.Polynomial([0, 1])
    real, imaginary = 1 - y**2 / 2 + y**4 / 24 - y**6 / 600, y - y**3 / 6 + y**5 / 120
    expected = first_root((real**2 + imaginary**2 - 1).coef[6:])  # below y⁶ all terms vanish
    assert stability_limit("dormand_prince", "imaginary") == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("axis", ["imag", None, 1])
def test_a_wrong_axis_is_refused(axis: Any) -> None:
    with pytest.raises(ValueError, match=r'`axis` must be "real" or "imaginary". Received: axis='):
        stability_limit("rk4", axis)


@pytest.mark.parametrize(("stages", "rounded"), [(2, None), (5, 48.5), (10, 193.7), (20, None)])
def test_chebyshev_is_stable_to_the_square_of_its_stages(stages: int, rounded: float | None) -> None:
    r"""R(z) = T(w₀ + w₁ z) / T(w₀): it reaches 1 in modulus where its argument is -w₀, so at 2 w₀ / w₁."""
    centre = 1 + 0.05 / stages**2
    angle = np.arccosh(centre)
    scale = np.cosh(stages * angle) * np.sinh(angle) / (stages * np.sinh(stages * angle))
    limit = 2 * centre / scale
    assert stability_limit(chebyshev(stages)) == pytest.approx(limit, rel=1e-8)
    assert rounded is None or round(limit, 1) == rounded
    assert limit == pytest.approx((2 - 4 / 3 * 0.05) * stages**2, rel=0.01)
    inside = np.linspace(0, 2 / scale, 50)
    expected = np.cos(stages * np.arccos(np.clip(centre - scale * inside, -1, 1))) / np.cosh(stages * angle)
    outside = centre - scale * inside > 1
    expected[outside] = np.cosh(stages * np.arccosh(centre - scale * inside[outside])) / np.cosh(stages * angle)
    found = integrate(lambda theta: inside * theta, np.ones(50), 1.0, 1, chebyshev(stages))[-1]
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-10)


def test_chebyshev_without_damping_and_with_one_stage() -> None:
    assert stability_limit(chebyshev(4, 0.0)) == pytest.approx(32.0, rel=1e-6)
    assert dataclasses.astuple(chebyshev(1))[:3] == dataclasses.astuple(tableau("euler"))[:3]
    np.testing.assert_allclose(chebyshev_coefficients(3, 0.0)[0], (1, 0, 1 / 9))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        *[((wrong,), f"stages={wrong!r}") for wrong in (0, 2.5, True, "5")],
        ((5, -0.1), "damping=-0.1"),
        ((5, np.nan), "damping=nan"),
    ],
)
def test_wrong_arguments_of_chebyshev(arguments: Any, message: str) -> None:
    for function in (chebyshev, chebyshev_coefficients):
        with pytest.raises(ValueError, match=f"Received: {message}"):
            function(*arguments)


# Exact motions


def test_quadratic_flow_is_the_matrix_exponential() -> None:
    import scipy.linalg

    generator = np.random.default_rng(1)
    root = generator.normal(size=(4, 4))
    matrix, start, minimum = root @ root.T - np.eye(4), generator.normal(size=4), generator.normal(size=4)
    times = np.array([[0.0, 0.1, 0.5], [1.0, 2.0, -0.3]])
    found = quadratic_flow(matrix, start, times, minimum)
    assert found.shape == (2, 3, 4)
    for place in np.ndindex(2, 3):
        expected = minimum + scipy.linalg.expm(-matrix * times[place]) @ (start - minimum)
        np.testing.assert_allclose(found[place], expected, rtol=1e-10)


def test_quadratic_flow_of_one_number() -> None:
    assert quadratic_flow(3.0, 2.0, 0.5, 1.0) == pytest.approx(1 + np.exp(-1.5))
    assert quadratic_flow(3.0, 2.0, [0.0, 0.5]).shape == (2,)
    assert quadratic_flow(3.0, [2.0], [0.0, 0.5]).shape == (2, 1)


@pytest.mark.parametrize("matrix", [[[1.0, 2.0], [0.0, 1.0]], [[1.0, 2.0]]])
def test_quadratic_flow_refuses_what_is_not_symmetric(matrix: Any) -> None:
    with pytest.raises(ValueError, match="`matrix` must be symmetric"):
        quadratic_flow(matrix, [1.0, 1.0], 1.0)


@pytest.mark.parametrize("friction", [0.0, 0.3, 2.0, 2.0 * 2**0.5, 5.0])
def test_oscillation_is_what_scipy_finds(friction: float) -> None:
    """Swinging, just not swinging (λ = 1 or 2), and creeping; on a ridge (λ = -0.5), and on a plain."""
    import scipy.integrate

    curvature, times = np.array([1.0, 2.0, 9.0, -0.5, 0.0]), np.linspace(0, 3, 7)
    start, velocity = np.array([1.0, -2.0, 0.5, 1.0, 1.0]), np.array([0.5, 0.0, -1.0, 0.2, -0.7])

    def field(time: float, state: Any) -> Any:
        return np.concatenate([state[5:], -friction * state[5:] - curvature * state[:5]])

    solution = scipy.integrate.solve_ivp(
        field, (0, 3), np.concatenate([start, velocity]), "DOP853", times, rtol=1e-12, atol=1e-12
    )
    found = oscillation(curvature, friction, start, times, velocity)
    np.testing.assert_allclose(found, solution.y[:5].T, rtol=0, atol=1e-9)


def test_the_shape_of_an_oscillation() -> None:
    assert oscillation(1.0, 0.5, 1.0, 0.0).shape == ()
    assert oscillation(1.0, 0.5, 1.0, [0.0, 1.0]).shape == (2,)
    assert oscillation(np.ones((2, 3)), 0.5, np.ones((2, 3)), np.zeros((4, 5))).shape == (4, 5, 2, 3)


def test_heavy_ball_is_the_oscillation() -> None:
    curvature, start = np.array([1.0, 4.0]), np.array([1.0, -1.0])
    field = heavy_ball(lambda theta: curvature * theta, friction=0.6)
    found = integrate(field, np.stack([start, [0.5, 0.0]]), 0.01, 300, "dormand_prince")[::100, 0]
    expected = oscillation(curvature, 0.6, start, [0.0, 1.0, 2.0, 3.0], [0.5, 0.0])
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-10)


def test_momentum_is_the_heavy_ball() -> None:
    """With lr = h² and β = 1 - γh, heavy ball after k steps is near the motion at kh: an error of order 1."""
    errors, sizes = [], [0.1, 0.05, 0.025, 0.0125]
    for h in sizes:
        position, velocity, found = 1.0, 0.0, [1.0]
        for _ in range(round(3 / h)):
            velocity = (1 - 0.6 * h) * velocity - h * h * 4.0 * position
            position += velocity
            found.append(position)
        exact = oscillation(4.0, 0.6, 1.0, h * np.arange(len(found)))
        errors.append(np.abs(found - exact).max())
    assert observed_order(sizes, errors) == pytest.approx(1, abs=0.1)


def test_nesterov_is_a_bessel_function() -> None:
    """Su, Boyd and Candès, section 3.2: X(t) = x₀ · 2 J₁(√λ t) / (√λ t)."""
    from scipy.special import j1, jvp

    curvature, start, begin = np.array([1.0, 3.0]), np.array([1.0, -0.5]), 0.1
    root = np.sqrt(curvature)

    def position(time: float) -> Any:
        return start * 2 * j1(root * time) / (root * time)

    def velocity(time: float) -> Any:
        return start * 2 * (jvp(1, root * time) / time - j1(root * time) / (root * time**2))

    state = np.stack([position(begin), velocity(begin), np.full(2, begin)])
    found = integrate(nesterov(lambda theta: curvature * theta), state, 0.005, 1000, "rk4")[::200]
    for (x, v, t), time in zip(found, begin + np.arange(6.0), strict=True):
        np.testing.assert_allclose(t, time, rtol=1e-12)
        np.testing.assert_allclose(x, position(time), rtol=0, atol=1e-8)
        np.testing.assert_allclose(v, velocity(time), rtol=0, atol=1e-8)
    leaving = start - 1e-4 / 8 * curvature * start  # as the docstring says, at t = 0.01
    np.testing.assert_allclose(position(0.01), leaving, rtol=1e-8)


def test_nesterovs_method_follows_its_motion() -> None:
    """The research of Su, Boyd and Candès: sup |x_k - X(k √s)| falls as √s."""
    from scipy.special import j1

    distances, roots = [], [0.1, 0.05, 0.025]
    for root in roots:
        before, point, found = 1.0, 1.0, []
        for k in range(1, round(10 / root)):
            now = point - root**2 * point
            point, before = now + (k - 1) / (k + 2) * (now - before), now
            found.append(now)
        times = root * np.arange(1, len(found) + 1)
        distances.append(np.abs(found - 2 * j1(times) / times).max())
    assert observed_order(roots, distances) == pytest.approx(1, abs=0.1)


# Backward error


def rosenbrock(theta: Any) -> Any:
    x, y = theta
    return (1 - x) ** 2 / 2 + 2 * (y - x * x) ** 2


def rosenbrock_gradient(theta: Any) -> Any:
    x, y = theta
    return np.array([x - 1 - 8 * x * (y - x * x), 4 * (y - x * x)])


def rosenbrock_hessian(theta: Any) -> Any:
    x, y = theta
    return np.array([[1 - 8 * y + 24 * x * x, -8 * x], [-8 * x, 4.0]])


def test_modified_gradient_is_that_of_the_modified_loss() -> None:
    loss = modified_loss(rosenbrock, rosenbrock_gradient, 0.3)
    gradient = modified_gradient(rosenbrock_gradient, rosenbrock_hessian, 0.3)
    theta, small = np.array([0.4, -0.7]), 1e-6
    differences = [(loss(theta + small * e) - loss(theta - small * e)) / (2 * small) for e in np.eye(2)]
    np.testing.assert_allclose(gradient(theta), differences, rtol=1e-8)
    norm = np.sum(rosenbrock_gradient(theta) ** 2)
    assert loss(theta) == pytest.approx(rosenbrock(theta) + 0.3 / 4 * norm)
    assert modified_loss(rosenbrock, rosenbrock_gradient, 0.0)(theta) == rosenbrock(theta)


def test_euler_follows_the_modified_flow_one_order_closer() -> None:
    """One step against both flows: slopes 2 and 3."""
    sizes, start = [0.004, 0.008, 0.016], np.array([0.4, -0.7])
    errors: dict[str, list[float]] = {"flow": [], "modified": []}
    for h in sizes:
        end = integrate(rosenbrock_gradient, start, h, 1)[-1]
        modified = modified_gradient(rosenbrock_gradient, rosenbrock_hessian, h)
        for name, field in (("flow", rosenbrock_gradient), ("modified", modified)):
            exact = integrate(field, start, h / 20, 20, "dormand_prince")[-1]
            errors[name].append(float(np.linalg.norm(end - exact)))
    assert observed_order(sizes, errors["flow"]) == pytest.approx(2, abs=0.1)
    assert observed_order(sizes, errors["modified"]) == pytest.approx(3, abs=0.1)


@pytest.mark.parametrize("stages", [2, 5, 10, 50, 150])
def test_polynomial_of_chebyshev_is_that_of_chebyshev(stages: int) -> None:
    """R(z) = T_s(w0 + w1 z) / T_s(w0), whose highest coefficients are tiny and carry it all at the limit."""
    first_kind = np.polynomial.Chebyshev.basis(stages)
    centre = 1 + 0.05 / stages**2
    scale = first_kind(centre) / first_kind.deriv()(centre)
    z = -np.linspace(0, gradient_flow.stability_limit(gradient_flow.chebyshev(stages)), 50)
    expected = first_kind(centre + scale * z) / first_kind(centre)
    found = gradient_flow.stability_polynomial(gradient_flow.chebyshev(stages))(z)
    np.testing.assert_allclose(found, expected, atol=1e-6)
