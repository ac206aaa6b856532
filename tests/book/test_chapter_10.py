"""Chapter 10: the data under its figures, and the tests that hold its sentences."""

import fractions
import functools
import itertools
import re
from collections.abc import Callable
from typing import Any

import keras
import numpy as np
import pytest
from numpy.polynomial import Chebyshev, Polynomial
from scipy.integrate import RK23, RK45, solve_ivp

import companion
from companion import datasets, gradient_flow
from companion.gradient_flow import TABLEAUX
from tests.book.reading import figure_data, line, notebook
from tests.kit.cases import wrong
from tests.kit.network import Digits

CHAPTER = "10"
Array = np.ndarray
Step = Callable[[Callable[[Array], Array], Array, float], Array]


# ---- the methods, written out ---------------------------------------------------------------------------------------


def euler(f: Any, theta: Array, h: float) -> Array:
    return theta - h * f(theta)


def heun(f: Any, theta: Array, h: float) -> Array:
    k1 = f(theta)
    return theta - h / 2 * (k1 + f(theta - h * k1))


def kutta3(f: Any, theta: Array, h: float) -> Array:
    k1 = f(theta)
    k2 = f(theta - h / 2 * k1)
    return theta - h / 6 * (k1 + 4 * k2 + f(theta - h * (2 * k2 - k1)))


def rk4(f: Any, theta: Array, h: float, weights: Any = (1 / 6, 1 / 3, 1 / 3, 1 / 6)) -> Array:
    k1 = f(theta)
    k2 = f(theta - h / 2 * k1)
    k3 = f(theta - h / 2 * k2)
    k4 = f(theta - h * k3)
    return theta - h * sum(weight * k for weight, k in zip(weights, (k1, k2, k3, k4), strict=True))


def scipys(solver: Any, f: Any, theta: Array, h: float) -> tuple[Array, Array]:
    """A step with SciPy's coefficients, and its estimate of the error."""
    slopes: list[Array] = []
    for row in solver.A:
        slopes.append(f(theta - h * sum(a * k for a, k in zip(row, slopes, strict=False))))
    end = theta - h * sum(b * k for b, k in zip(solver.B, slopes, strict=True))
    return end, h * sum(e * k for e, k in zip(solver.E, [*slopes, f(end)], strict=True))


equal_weights = functools.partial(rk4, weights=[1 / 4] * 4)
STEPS: dict[str, Step] = {
    "Euler": euler,
    "Heun": heun,
    "Kutta 3": kutta3,
    "RK4": rk4,
    "RK45": lambda f, theta, h: scipys(RK45, f, theta, h)[0],
    "RK4, equal weights": equal_weights,
}
FACTORS = {  # Taylor's series of the exponential, and Dormand and Prince's last term
    "Euler": ([1, 1], 1),
    "Heun": ([1, 1, 1 / 2], 2),
    "Kutta 3": ([1, 1, 1 / 2, 1 / 6], 3),
    "RK4": ([1, 1, 1 / 2, 1 / 6, 1 / 24], 4),
    "RK45": ([1, 1, 1 / 2, 1 / 6, 1 / 24, 1 / 120, 1 / 600], 6),
}


def limit(factor: Callable[[Array], Array], upper: float) -> float:
    """Where |R(−x)| first passes 1."""
    x = np.linspace(0, upper, 400_001)
    return float(x[np.abs(factor(-x)) > 1 + 1e-9].min())


def chebyshev(stages: int, damping: float = 0.05) -> tuple[Any, float]:
    """The factor of a step by its definition, T(w₀ + w₁z) / T(w₀), and its limit, where the argument is −w₀."""
    t, w0 = Chebyshev.basis(stages), 1 + damping / stages**2
    w1 = t(w0) / t.deriv()(w0)
    return (lambda z: t(w0 + w1 * z) / t(w0)), 2 * w0 / w1


# ---- the smallest network -------------------------------------------------------------------------------------------

X, Y = np.array([0.5, 1.0, 2.0]), np.array([0.25, 0.875, 0.75])
START = np.array([1.0, -0.5])


def loss(theta: Array) -> float:
    return float(np.mean((theta[1] * np.tanh(theta[0] * X) - Y) ** 2))


def gradient(theta: Array) -> Array:
    """Of the loss, by complex differences: exact to rounding, and nothing to derive."""

    def part(place: int) -> float:
        a, b = theta.astype(complex) + 1e-30j * np.eye(2)[place]
        return float(np.mean((b * np.tanh(a * X) - Y) ** 2).imag / 1e-30)

    return np.array([part(0), part(1)])


@functools.cache
def exact() -> Array:
    return solve_ivp(lambda _, theta: -gradient(theta), (0, 1), START, "DOP853", rtol=1e-13, atol=1e-15).y[:, -1]


def error(step: Step, h: float) -> float:
    theta = START
    for _ in range(round(1 / h)):
        theta = step(gradient, theta, h)
    return float(np.linalg.norm(theta - exact()))


# ---- figures --------------------------------------------------------------------------------------------------------


def test_one_step_of_rk4() -> None:
    """Where the method written out asks, and where it ends."""
    (axes,) = figure_data(CHAPTER)[0]
    asked: list[Array] = []
    end = rk4(lambda theta: asked.append(theta) or np.array([1, 3]) * theta, np.array([2.2, 1.6]), 0.5)
    np.testing.assert_allclose(np.transpose(line(axes, "asked at")), asked, rtol=1e-5)
    np.testing.assert_allclose(np.ravel(line(axes, "end")), end, rtol=1e-5)
    assert line(axes, "flow")[0][-1] == pytest.approx(2.2 * np.exp(-0.5), rel=1e-5)


@pytest.mark.parametrize("name", STEPS)
def test_errors_of_the_methods(name: str) -> None:
    (axes,) = figure_data(CHAPTER)[4]
    h, found = line(axes, name)
    np.testing.assert_allclose(h, [1 / 4, 1 / 8, 1 / 16, 1 / 32, 1 / 64])
    np.testing.assert_allclose(found, [error(STEPS[name], each) for each in h], rtol=1e-4, atol=5e-14)


@pytest.mark.parametrize("name", ["Heun", "RK4", "RK4, equal weights"])
def test_errors_in_keras_lie_on_the_lines(name: str) -> None:
    (axes,) = figure_data(CHAPTER)[4]
    (h, found), (_, numpys) = line(axes, f"{name} in Keras"), line(axes, name)
    np.testing.assert_allclose(found, numpys[: len(h)], rtol=1e-5)


def test_factors_of_the_family() -> None:
    (axes,) = figure_data(CHAPTER)[1]
    for name in FACTORS:
        x, y = line(axes, name)
        np.testing.assert_allclose(y, Polynomial(FACTORS[name][0])(-x), rtol=1e-4, atol=1e-5)
    x, y = line(axes, "flow")
    np.testing.assert_allclose(y, np.exp(-x), rtol=1e-4)


def test_regions_of_stability() -> None:
    """Every point of a drawn boundary is one."""
    (axes,) = figure_data(CHAPTER)[6]
    drawn = [contour for contour in axes["contours"] if contour["level"] == 1]
    drawn = [contour for contour in drawn if contour["points"]]
    assert len(drawn) >= len(FACTORS)
    found = set()
    for contour in drawn:
        points = np.array(contour["points"], float)
        z = points[:, 0] + 1j * points[:, 1]
        for name, (coefficients, _) in FACTORS.items():
            if np.allclose(np.abs(Polynomial(coefficients)(z)), 1, atol=0.02):
                found.add(name)
    assert found == set(FACTORS)


def test_factors_on_the_real_axis() -> None:
    (axes,) = figure_data(CHAPTER)[3]
    expected = {
        "flow": lambda x: np.exp(-x),
        "five Euler steps": lambda x: (1 - x / 5) ** 5,
        "RK45": lambda x: Polynomial(FACTORS["RK45"][0])(-x),
        "Chebyshev": lambda x: chebyshev(5)[0](-x),
    }
    for name, function in expected.items():
        x, y = line(axes, name)
        np.testing.assert_allclose(y, function(x), rtol=1e-4, atol=1e-5)
    assert line(axes, "Chebyshev")[0].max() > 48


def test_the_parabolas() -> None:
    """By steps on a mode, with one more question at four shares of a step."""
    (axes,) = figure_data(CHAPTER)[2]
    for share in (2, 4, 8, 16):

        def step(f: Any, theta: Any, h: Any, share: int = share) -> Any:
            return theta - h * f(theta - h / share * f(theta))

        x, y = line(axes, f"1/{share}")
        drawn = ~np.isnan(y)
        expected = [step(lambda theta: theta, 1.0, h) for h in x]
        np.testing.assert_array_equal(drawn, np.abs(expected) < 1.8)
        np.testing.assert_allclose(y[drawn], np.array(expected)[drawn], rtol=1e-4, atol=1e-5)
        reach = limit(lambda z, step=step: step(lambda theta: theta, 1.0, -z), 10)
        assert line(axes, f"1/{share}, limit")[0] == pytest.approx([reach], rel=1e-4)


def test_the_table_of_shares() -> None:
    """The lowest point of a parabola, and where it leaves the band."""
    (cell,) = (each for each in notebook(CHAPTER).cells if each.source.startswith("# @title Four shares"))
    rows = [row.split() for row in cell.outputs[0].data["text/plain"].replace("−", "-").splitlines()[1:]]
    for (share, at, lowest, reach), c in zip(rows, (1 / 2, 1 / 4, 1 / 8, 1 / 16), strict=True):
        x = np.linspace(0, 20, 2_000_001)
        factor = 1 - x + c * x**2
        assert float(fractions.Fraction(share)) == c
        assert float(at) == pytest.approx(x[factor.argmin()])
        assert float(fractions.Fraction(lowest)) == pytest.approx(factor.min())
        assert float(reach) == pytest.approx(x[np.abs(factor) > 1 + 1e-9][0], abs=0.0051)


def test_adaptive_steps_ride_along_the_limit() -> None:
    """The whole run in NumPy, with SciPy's coefficients and the control written out."""
    (axes,) = figure_data(CHAPTER)[5]
    number, found = line(axes, "h tried")
    network = Digits(drawn="float64")
    theta, h, tried, rejected, curvatures = network.start, 0.01, [], [], {}
    for step in range(len(number)):
        if step in (0, 40, 80):
            curvatures[step] = network.largest_curvature(theta)
        tried.append(h)
        end, difference = scipys(RK23, network.gradient, theta, h)
        allowed = 1e-6 + 1e-3 * np.maximum(np.abs(theta), np.abs(end))
        e = np.sqrt(np.mean((difference / allowed) ** 2))
        if e <= 1:
            theta = end
        else:
            rejected.append(step)
        h *= np.clip(0.9 * e ** (-1 / 3), 0.2, 5.0 if e <= 1 else 1.0)
    np.testing.assert_allclose(found, tried, rtol=5e-3)
    np.testing.assert_array_equal(line(axes, "rejected")[0], rejected)
    limits = dict(zip(*line(axes, "limit"), strict=True))
    for step, curvature in curvatures.items():
        assert limits[step] == pytest.approx(2.51275 / curvature, rel=0.01)


# ---- order ----------------------------------------------------------------------------------------------------------


def smallest_network(optimizer: Any) -> Any:
    options = {"use_bias": False, "dtype": "float64"}
    model = keras.Sequential(
        [keras.Input((1,)), keras.layers.Dense(1, "tanh", **options), keras.layers.Dense(1, **options)]
    )
    model.compile(optimizer, "mse")
    return companion.inject(model)


@pytest.mark.claim(
    "Over the same time, half the step makes the error of a method of order $p$ about $2^p$ times smaller.",
    chapter="10",
)
@pytest.mark.parametrize(
    ("method", "order"),
    [
        ("euler", 1),
        ("heun", 2),
        ("bogacki_shampine", 3),
        ("rk4", 4),
        wrong("rk4", 3, why="another order"),
        wrong("extragradient", 2, why="two gradients, order one"),
    ],
)
def test_half_the_step_in_keras(float64: None, method: str, order: int) -> None:
    optimizer = companion.RungeKutta(0.1, method)
    model, errors = smallest_network(optimizer), []
    for steps in (16, 32):
        model.set_weights([START[:1, None], START[1:, None]])
        optimizer.learning_rate = 1 / steps
        model.fit(np.tile(X, steps)[:, None], np.tile(Y, steps)[:, None], 3, shuffle=False, verbose=0)
        errors.append(np.linalg.norm(np.ravel(model.get_weights()) - exact()))
    assert np.log2(errors[0] / errors[1]) == pytest.approx(order, abs=0.15)


@pytest.mark.claim("A wrong coefficient costs a Runge–Kutta method orders, and the slope shows how many.", chapter="10")
@pytest.mark.parametrize(
    ("weights", "order"),
    [
        ([1 / 4] * 4, 2),
        ([1 / 3, 1 / 3, 1 / 6, 1 / 6], 1),
        ([1 / 6, 1 / 3, 1 / 3, 1 / 6], 4),
        wrong([1 / 4] * 4, 4, why="what is promised, and not kept"),
    ],
)
def test_the_slope_of_rk4_with_other_weights(weights: list[float], order: int) -> None:
    coarse, fine = (error(functools.partial(rk4, weights=weights), h) for h in (1 / 32, 1 / 64))
    assert np.log2(coarse / fine) == pytest.approx(order, abs=0.1)
    four = TABLEAUX["rk4"]
    gradient_flow.ButcherTableau(four.a, weights, four.c, order=order)
    with pytest.raises(ValueError, match=f"has order {order}"):
        gradient_flow.ButcherTableau(four.a, weights, four.c, order=order + 1)


@pytest.mark.claim("The distance between a run and the run with half its step shrinks by the same $2^p$.", chapter="10")
@pytest.mark.parametrize(
    ("step", "order"),
    [(heun, 2), (kutta3, 3), (rk4, 4), (equal_weights, 2), wrong(equal_weights, 4, why="the mistake")],
)
def test_no_exact_end_is_needed(step: Step, order: int) -> None:
    ends = []
    for steps in (16, 32, 64):
        theta = START
        for _ in range(steps):
            theta = step(gradient, theta, 1 / steps)
        ends.append(theta)
    coarse, fine = (np.linalg.norm(later - earlier) for earlier, later in itertools.pairwise(ends))
    assert np.log2(coarse / fine) == pytest.approx(order, abs=0.15)


# ---- stability ------------------------------------------------------------------------------------------------------


def reach(method: str, curvature: float = 2.0) -> float:
    """The longest stable h·λ, found by steps on a quadratic, in 1 % steps."""
    end = 0.0
    for z in np.arange(0.05, 6, 0.05):
        path = gradient_flow.integrate(lambda theta: curvature * theta, 1.0, z / curvature, 400, method)
        if abs(path[-1]) > 1.001:
            return end
        end = float(z)
    return end


@pytest.mark.claim(
    "Divided by the number of gradients, no other method of this table reaches as far in $h\\lambda$ as Euler.",
    chapter="10",
)
@pytest.mark.parametrize("is_divided", [True, wrong(False, why="for one step RK45 reaches furthest")])
def test_euler_wins_its_family(is_divided: bool) -> None:
    def asked(method: str) -> int:
        questions: list[Any] = []
        gradient_flow.integrate(lambda theta: questions.append(1) or theta, 1.0, 0.1, 1, method)
        return len(questions)

    worth = {name: reach(name) / (asked(name) if is_divided else 1) for name in TABLEAUX}
    assert all(worth[name] < worth["euler"] for name in TABLEAUX if name != "euler")


def test_table_of_limits_has_every_tableau() -> None:
    (cell,) = (
        each for each in notebook(CHAPTER).cells if each.source.startswith("# @title The limits of all tableaux")
    )
    rows = [re.split(" {2,}", row) for row in cell.outputs[0].data["text/plain"].splitlines()[1:]]
    limits = [[method.order, gradient_flow.stability_limit(method)] for method in TABLEAUX.values()]
    shown = [[float(order), float(limit)] for _, order, _, limit, _ in rows]
    assert len(shown) == len(limits), "the chapter prints another number of tableaux: execute it"
    np.testing.assert_allclose(shown, limits, rtol=0, atol=0.0051)


@pytest.mark.claim(
    "On the imaginary axis Euler's limit is zero: whatever the step, a rotation spirals outwards.", chapter="10"
)
@pytest.mark.parametrize("method", ["euler", wrong("rk4", why="holds up to 2.83")])
@pytest.mark.parametrize("h", [0.01, 0.1, 1.0])
def test_rotations_spiral_outwards(method: str, h: float) -> None:
    turned = gradient_flow.integrate(lambda theta: 1j * theta, 1.0 + 0j, h, 50, method)
    assert (np.diff(np.abs(turned)) > 0).all()


@pytest.mark.claim(
    "With $s$ gradients a step a Chebyshev method is stable up to nearly $2s^2$, where $s$ Euler steps reach $2s$.",
    chapter="10",
)
@pytest.mark.parametrize("stages", [2, 5, 10])
@pytest.mark.parametrize(
    ("share", "is_stable"), [(0.96, True), (1.01, False), wrong(1.01, True, why="beyond"), wrong(0.96, False, why="on")]
)
def test_how_far_chebyshev_steps(stages: int, share: float, is_stable: bool) -> None:
    """With Keras, on a quadratic of curvature 2."""
    model = keras.Sequential([keras.Input((1,)), keras.layers.Dense(1, None, False, "ones")])
    model.compile(companion.RungeKuttaChebyshev(share * 2 * stages**2 / 2, stages=stages), "mse", run_eagerly=True)
    companion.inject(model)
    questions = []
    found = [1.0]
    for _ in range(4):
        model.train_on_batch(np.ones((1, 1)), np.zeros((1, 1)))
        found.append(abs(float(model.layers[0].kernel.numpy().item())))
    gradient_flow.integrate(
        lambda theta: questions.append(1) or theta, 1.0, 0.1, 1, gradient_flow.chebyshev(stages, 0.05)
    )
    assert len(questions) == stages
    assert all(now <= before for before, now in itertools.pairwise(found)) == is_stable
    assert limit(lambda z: (1 + z / stages) ** stages, 3 * stages) == pytest.approx(2 * stages, rel=1e-3)


@pytest.mark.claim(
    "A step of ten Chebyshev stages that is a tenth too long multiplies the steepest direction by 242. Ten steps of "
    "gradient descent, each a tenth too long, multiply it by six.",
    chapter="10",
)
@pytest.mark.parametrize("share", [1.1, wrong(1.05, why="half as far beyond")])
def test_how_fast_chebyshev_diverges(share: float) -> None:
    reach = chebyshev(10)[1]
    one_step = gradient_flow.integrate(lambda theta: theta, 1.0, share * reach, 1, gradient_flow.chebyshev(10))
    assert abs(one_step[-1]) == pytest.approx(242, abs=0.5)
    assert abs(gradient_flow.integrate(lambda theta: theta, 1.0, share * 2, 10)[-1]) == pytest.approx(6, abs=0.5)


# ---- logistic regression on the digits ------------------------------------------------------------------------------


class Logistic:
    """The chapter's regression in NumPy."""

    def __init__(self) -> None:
        data = datasets.digits("float64")
        self.x, self.y = data.x_train, data.y_train

    def loss_and_gradient(self, theta: Array) -> tuple[float, Array]:
        logits = self.x @ theta
        share = np.exp(logits - logits.max(1, keepdims=True))
        share /= share.sum(1, keepdims=True)
        rows = np.arange(len(self.y))
        with np.errstate(divide="ignore"):
            value = float(-np.log(share[rows, self.y]).mean())
        share[rows, self.y] -= 1
        return value, self.x.T @ share / len(self.y)

    def gradient(self, theta: Array) -> Array:
        return self.loss_and_gradient(theta)[1]

    @property
    def steepest(self) -> float:
        """Of the Hessian at zero, (I / 10 − 11ᵀ / 100) ⊗ XᵀX / n."""
        shares = np.eye(10) / 10 - np.full((10, 10), 1 / 100)
        return float(np.linalg.eigvalsh(shares).max() * np.linalg.eigvalsh(self.x.T @ self.x / len(self.x)).max())

    def trained(self, method: Any, steps: int, h: float) -> float:
        end = gradient_flow.integrate(self.gradient, np.zeros((64, 10)), h, steps, method)[-1]
        return self.loss_and_gradient(end)[0]


@pytest.fixture(scope="module")
def logistic() -> Logistic:
    return Logistic()


@pytest.mark.claim(
    "On logistic regression sixty gradients bring the loss lower with both Chebyshev methods than with Euler's, and "
    "lower with Euler's than with RK4.",
    chapter="10",
)
@pytest.mark.parametrize(
    "gradients", [lambda cost: 60 // cost, wrong(lambda cost: 60, why="as many steps for everyone, at any price")]
)
@pytest.mark.parametrize("share", [0.9, 0.45, 1.35])
def test_sixty_gradients(logistic: Logistic, gradients: Callable[[int], int], share: float) -> None:
    part = share / logistic.steepest
    losses = [
        logistic.trained(gradient_flow.chebyshev(10), gradients(10), part * chebyshev(10)[1]),
        logistic.trained(gradient_flow.chebyshev(5), gradients(5), part * chebyshev(5)[1]),
        logistic.trained("euler", gradients(1), part * 2),
        logistic.trained("rk4", gradients(4), part * 2.785),
    ]
    assert losses == sorted(losses)
    if share == 0.9:
        assert losses[2] == pytest.approx(0.272, abs=2e-3)


@pytest.mark.claim(
    "On logistic regression momentum 0.9 with Euler's learning rate ends level with ten Chebyshev stages, for the same "
    "sixty gradients.",
    chapter="10",
)
@pytest.mark.parametrize("momentum", [0.9, wrong(0.0, why="Euler's method")])
def test_momentum_is_level_with_chebyshev(logistic: Logistic, momentum: float) -> None:
    rule = keras.optimizers.SGD(1.8 / logistic.steepest, momentum)
    theta = keras.Variable(np.zeros((64, 10)), dtype="float64")
    for _ in range(60):
        rule.apply([keras.ops.convert_to_tensor(logistic.gradient(theta.numpy()))], [theta])
    found = logistic.loss_and_gradient(theta.numpy())[0]
    stages = logistic.trained(gradient_flow.chebyshev(10), 6, 0.9 * chebyshev(10)[1] / logistic.steepest)
    assert found == pytest.approx(stages, rel=0.1)


@pytest.mark.claim("On a convex loss the implicit Euler method is stable for every learning rate.", chapter="a3")
@pytest.mark.parametrize("h", [1.0, 30.0, 1000.0])
@pytest.mark.parametrize(
    "optimizer", [companion.ImplicitEuler, wrong(companion.RungeKuttaChebyshev, why="its limit is 48.5 / λ")]
)
def test_implicit_euler_is_stable(logistic: Logistic, optimizer: Any, h: float) -> None:
    if optimizer is companion.RungeKuttaChebyshev:
        h = max(h, 200.0)
    model = keras.Sequential([keras.Input((64,)), keras.layers.Dense(10, None, False, "zeros")])
    model.compile(optimizer(h), keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    companion.inject(model)
    batch = logistic.x.astype("float32"), logistic.y
    losses = [np.log(10)]
    for _ in range(4):
        model.train_on_batch(*batch)
        losses.append(logistic.loss_and_gradient(model.layers[0].kernel.numpy().astype(float))[0])
    assert all(later < earlier for earlier, later in itertools.pairwise(losses))


@pytest.mark.claim(
    "Adams–Bashforth has order two for one gradient a step, and half of Euler's stability.", chapter="a3"
)
@pytest.mark.parametrize(
    ("optimizer", "order", "reach"),
    [
        (companion.AdamsBashforth2, 2, 1.0),
        (companion.SGD, 1, 2.0),
        wrong(companion.AdamsBashforth2, 1, 1.0, why="Euler's order"),
        wrong(companion.AdamsBashforth2, 2, 2.0, why="Euler's limit"),
    ],
)
def test_adams_bashforth(optimizer: Any, order: int, reach: float) -> None:
    def end(f: Any, h: float, steps: int, start: Array) -> Array:
        rule, theta = optimizer(h), keras.Variable(start, dtype="float64")
        for _ in range(steps):
            rule.apply([keras.ops.convert_to_tensor(f(theta.numpy()))], [theta])
        return np.array(theta.numpy())

    errors = [np.linalg.norm(end(gradient, 1 / steps, steps, START) - exact()) for steps in (32, 64)]
    assert np.log2(errors[0] / errors[1]) == pytest.approx(order, abs=0.1)
    sizes = [abs(end(lambda theta: theta, share * reach, 80, np.ones(1))[0]) for share in (0.95, 1.05)]
    assert sizes[0] < 0.5
    assert sizes[1] > 2


# ---- adaptive steps -------------------------------------------------------------------------------------------------


def bowl(optimizer: Any) -> Any:
    """A quadratic with the curvatures 2 and 0.02, and its minimum away from zero."""
    model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1, None, False, "zeros", dtype="float64")])
    model.compile(optimizer, "mse")
    return companion.inject(model)


BOWL = np.sqrt(2) * np.diag([1.0, 0.1]), np.sqrt(2) * np.array([1.0, 0.1])  # minimum at (1, 1)


@pytest.mark.claim(
    "Once the path is smooth, an adaptive step settles at its method's limit of stability.", chapter="10"
)
@pytest.mark.parametrize("rtol", [1e-2, 1e-3, 1e-5])
@pytest.mark.parametrize("limit", [2.5127, wrong(2.0, why="Euler's"), wrong(3.3066, why="that of Dormand and Prince")])
def test_an_adaptive_step_settles(float64: None, rtol: float, limit: float) -> None:
    optimizer = companion.RK23(0.01, rtol=rtol)
    model, sizes = bowl(optimizer), list[float]()

    class Note(keras.callbacks.Callback):
        def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
            sizes.append(float(optimizer.learning_rate))

    steps = 150
    x, y = (np.tile(part, (steps,) + (1,) * (part.ndim - 1)) for part in BOWL)
    model.fit(x, y, batch_size=2, shuffle=False, verbose=0, callbacks=[Note()])
    assert np.median(sizes[50:]) * 2 == pytest.approx(limit, rel=0.06)


@pytest.mark.claim(
    "A step whose error is estimated above the tolerance is rejected: no weight moves, and the next step is shorter.",
    chapter="10",
)
@pytest.mark.parametrize("first", [100.0, wrong(1e-3, why="within the tolerance: it is taken")])
def test_a_rejected_step_moves_nothing(float64: None, first: float) -> None:
    optimizer = companion.RK23(first, rtol=1e-3)
    model = bowl(optimizer)
    model.set_weights([np.array([[2.0], [3.0]])])
    model.train_on_batch(*BOWL)
    np.testing.assert_array_equal(model.get_weights()[0], [[2.0], [3.0]])
    assert int(optimizer.rejected) == 1
    assert float(optimizer.step_size) < first


# ---- first same as last ---------------------------------------------------------------------------------------------


@pytest.mark.claim(
    "With minibatches the last answer of a step is not the first answer of the next, although the weights are the "
    "same.",
    chapter="a3",
)
@pytest.mark.parametrize("following", [1, wrong(0, why="the same batch again: there it would be")])
def test_the_last_answer_is_not_the_first_of_the_next(logistic: Logistic, following: int) -> None:
    asked: list[tuple[Array, Array]] = []

    def oracle(batch: int) -> Callable[[Array], Array]:
        rows = Logistic.__new__(Logistic)
        rows.x, rows.y = (part[32 * batch : 32 * (batch + 1)] for part in (logistic.x, logistic.y))

        def answer(theta: Array) -> Array:
            asked.append((theta, rows.gradient(theta)))
            return asked[-1][1]

        return answer

    end, _ = scipys(RK23, oracle(0), np.zeros((64, 10)), 0.5)
    scipys(RK23, oracle(following), end, 0.5)
    (last_at, last), (first_at, first) = asked[3], asked[4]
    np.testing.assert_array_equal(last_at, first_at)
    assert np.linalg.norm(last - first) > 0.5 * np.linalg.norm(last)


@pytest.mark.claim("With a fixed step it does not even ask, since nothing depends on the answer.", chapter="a3")
@pytest.mark.parametrize(
    ("rtol", "questions"), [(None, 3), (1e-3, 4), wrong(None, 4, why="as the table has rows"), wrong(1e-3, 3, why="")]
)
def test_questions_a_step(rtol: float | None, questions: int) -> None:
    class Counting(companion.RK23):
        asked = 0

        def direction(self, oracle: Any, values: list[Any], learning_rate: Any) -> list[Any]:
            def counted(at: Any) -> Any:
                self.asked += 1
                return oracle(at)

            return super().direction(counted, values, learning_rate)

    optimizer = Counting(0.01, rtol=rtol)
    model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1)])
    model.compile(optimizer, "mse", run_eagerly=True)
    companion.inject(model).train_on_batch(*BOWL)
    assert optimizer.asked == questions
