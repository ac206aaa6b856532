"""Chapter 11: the data under its figures, and the tests that hold its sentences."""

import ast
import re
from collections.abc import Callable
from typing import Any

import keras
import numpy as np
import pytest
import scipy.special

import companion
from companion import datasets
from tests.book.reading import figure_data, line, notebook
from tests.kit.cases import wrong
from tests.kit.network import Digits

CHAPTER = "11"


def class_of_chapter(name: str) -> Any:
    """A class as the chapter defines it."""
    for cell in notebook(CHAPTER).cells:
        if cell.cell_type == "code" and f"class {name}(" in cell.source:
            (found,) = [node for node in ast.parse(cell.source).body if getattr(node, "name", None) == name]
            names: dict[str, Any] = {"companion": companion, "keras": keras}
            exec(ast.unparse(found), names)
            return names[name]
    raise AssertionError(f"no class {name}")


# ---- references, in NumPy -------------------------------------------------------------------------------------------


def ball(friction: float, times: Any, curvature: float = 1.0) -> np.ndarray:
    """Position and velocity of a ball let go at 1, from the exponential of its matrix; shape (2, times)."""
    matrix = np.array([[0.0, 1.0], [-curvature, -friction]]) + np.diag([0.0, 1e-9])  # never defective
    values, vectors = np.linalg.eig(matrix.astype(complex))
    share = np.linalg.solve(vectors, np.array([1.0, 0.0]))
    return ((vectors * share) @ np.exp(np.outer(values, times))).real


def heavy_ball(gradient: Callable[[Any], Any], h: float, beta: float, steps: int, start: Any = 1.0) -> np.ndarray:
    """Positions and velocities by Polyak's recursion in positions alone."""
    path = [np.asarray(start, float)] * 2
    for _ in range(steps):
        path.append(path[-1] - h * gradient(path[-1]) + beta * (path[-1] - path[-2]))
    return np.array([path[1:], np.diff(path, axis=0)])


def identity(theta: Any) -> Any:
    return theta


def step_matrix(curvature: float, h: float, beta: float) -> np.ndarray:
    """One step of momentum on the state (θ, v), written out."""
    return np.array([[1 - h * curvature, beta], [-h * curvature, beta]])


def factor(matrix: Any) -> float:
    return float(np.abs(np.linalg.eigvals(matrix)).max())


# ---- figures --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("beta", "friction"), [(0.97, 0.3), (0.8, 2.0), (0.4, 6.0)])
def test_balls_and_their_curves(beta: float, friction: float) -> None:
    (axes,) = figure_data(CHAPTER)[0]
    time, exact = line(axes, f"exact, γ = {friction}")
    np.testing.assert_allclose(time, 0.1 * np.arange(121), atol=1e-6)
    np.testing.assert_allclose(exact, ball(friction, time)[0], atol=1e-4)
    time, found = line(axes, f"Keras, β = {beta}")
    np.testing.assert_allclose(found, heavy_ball(identity, 0.01, beta, 120)[0][::3], atol=1e-4)
    assert np.abs(found - ball(friction, time)[0]).max() < 0.05


def test_three_balls_after_a_schedule() -> None:
    """Where h falls from 0.01 to 0.0001 after 21 steps, by the rules written out."""
    (axes,) = figure_data(CHAPTER)[4]
    time, exact = line(axes, "ball")
    np.testing.assert_allclose(exact, ball(1.0, time)[0], atol=1e-4)
    for name in ("β = 0.9", "only β follows", "KeptFriction"):
        position, way, path = 1.0, 0.0, [1.0]
        for step in range(500):
            tick = 0.1 if step < 21 else 0.01
            if step == 21 and name == "KeptFriction":
                way = way / 10
            beta = 0.9 if name == "β = 0.9" else 1 - tick
            way = beta * way - tick**2 * position
            position = position + way
            path.append(position)
        np.testing.assert_allclose(line(axes, name)[1], path[::4], atol=1e-4)


@pytest.mark.parametrize(("name", "tick", "beta"), [("descent", 0.02, 0.0), ("momentum", 0.18, 0.82**2)])
def test_two_clocks(name: str, tick: float, beta: float) -> None:
    """Each at the border of what κ = 100 allows; late, both divide by e in about the time 1."""
    (axes,) = figure_data(CHAPTER)[1]
    time, found = line(axes, name)
    h = tick if name == "descent" else tick**2
    np.testing.assert_allclose(found, heavy_ball(identity, h, beta, len(time) - 1)[0], rtol=1e-3)
    np.testing.assert_allclose(time, tick * np.arange(len(time)), atol=1e-5)
    assert 0.96 < 100 * h / (2 * (1 + beta)) <= 1
    assert -1 / np.polyfit(time[time > 3.5], np.log(found[time > 3.5]), 1)[0] == pytest.approx(1, abs=0.2)


@pytest.mark.parametrize(("name", "lasts"), [("h", 0.1), ("√h", 1.0), ("h/(1 − β)", 0.5)])
def test_three_rulers(name: str, lasts: float) -> None:
    """Ten updates with h = 0.01 and β = 0.8."""
    (axes,) = figure_data(CHAPTER)[2]
    np.testing.assert_allclose(line(axes, name)[0], np.linspace(0, lasts, 11), atol=1e-6)


def test_where_nesterov_asks() -> None:
    """Keras's own steps, on the weight for momentum and on the point ahead for Nesterov, end where the arrows do."""
    (axes,) = figure_data(CHAPTER)[6]
    curvatures, h, beta, here, v = np.array([1.0, 25.0]), 0.02, 0.9, np.array([2.0, 0.2]), np.array([-1.0, -0.8])
    ends = {}
    for name, nesterov in (("momentum", False), ("Nesterov", True)):
        optimizer = keras.optimizers.SGD(h, momentum=beta, nesterov=nesterov)
        weight = keras.Variable(here + beta * v if nesterov else here, dtype="float64")
        optimizer.build([weight])
        (slot,) = optimizer.momentums
        slot.assign(v)
        optimizer.apply([curvatures * weight.numpy()], [weight])
        # Keras's weight is the point ahead: the point itself is βv behind
        ends[name] = weight.numpy() - (beta * slot.numpy() if nesterov else 0)
        x, y = line(axes, name)
        np.testing.assert_allclose([x[0], y[0]], here + beta * v, rtol=1e-5)
        np.testing.assert_allclose([x[1], y[1]], ends[name], rtol=1e-4)
    assert abs(ends["Nesterov"][1]) < abs(ends["momentum"][1]) / 2
    np.testing.assert_allclose(ends["momentum"] - ends["Nesterov"], h * curvatures * beta * v, rtol=1e-5)


def test_spirals() -> None:
    (axes,) = figure_data(CHAPTER)[8]
    position, speed = line(axes, "exact")
    expected = ball(0.125, np.linspace(0, 12.5, 400))
    np.testing.assert_allclose(position, expected[0], atol=1e-4)
    np.testing.assert_allclose(speed, expected[1], atol=0.02)
    position, speed = line(axes, "momentum")
    expected = heavy_ball(identity, 0.0625, 0.96875, 50)
    np.testing.assert_allclose([position, 0.25 * speed], expected, atol=1e-4)
    euler = np.array([[1.0, 0.25], [-0.25, 0.96875]])  # on (position, velocity)
    outwards = [np.linalg.matrix_power(euler, k) @ [1.0, 0.0] for k in range(51)]
    np.testing.assert_allclose(np.transpose(line(axes, "swapped")), outwards, atol=1e-4)


def test_map_is_that_of_the_eigenvalues() -> None:
    axes = figure_data(CHAPTER)[5][0]
    (image,) = axes["images"]
    x, y = np.linspace(0, 2, 101), np.linspace(0, 1, 51)
    matrices = [[step_matrix(across**2, 1.0, up**2) for across in x] for up in y]
    expected = np.minimum(np.abs(np.linalg.eigvals(matrices)).max(axis=-1), 1)
    np.testing.assert_allclose(image, expected, atol=1e-5)

    across, up = line(axes, "critical")
    for h_lambda, beta in zip(across[5:-5] ** 2, up[5:-5] ** 2, strict=True):  # two equal roots
        assert np.ptp(np.linalg.eigvals(step_matrix(h_lambda, 1.0, beta))) == pytest.approx(0, abs=1e-2)
    across, up = line(axes, "edge")
    for h_lambda, beta in zip(across**2, up**2, strict=True):
        assert factor(step_matrix(h_lambda * 0.999, 1.0, beta)) < 1.001 < factor(step_matrix(h_lambda * 1.1, 1.0, beta))

    across, up = line(axes, "momentum, κ = 100")
    np.testing.assert_allclose(up, np.abs(1 - across), atol=1e-4)  # both ends touch the V
    assert (across[1] / across[0]) ** 2 == pytest.approx(100, rel=1e-3)
    across, up = line(axes, "descent, κ = 100")
    np.testing.assert_allclose(np.abs(1 - across**2), 99 / 101, atol=1e-4)
    assert (across[1] / across[0]) ** 2 == pytest.approx(100, rel=1e-3)


def bessel(curvature: float, times: Any) -> np.ndarray:
    """The motion with friction 3/t from rest at 1: 2 J₁(√λ t) / (√λ t)."""
    z = np.sqrt(curvature) * np.asarray(times, float)
    return np.where(z == 0, 1, 2 * scipy.special.j1(z) / np.where(z == 0, 1, z))


def su_boyd_candes(curvature: Any, h: float, steps: int) -> np.ndarray:
    """The points x of Nesterov's method, in the form of Su, Boyd and Candès."""
    x = y = np.ones_like(curvature)
    path = [x]
    for k in range(1, steps + 1):
        x, last = y - h * curvature * y, x
        y = x + (k - 1) / (k + 2) * (x - last)
        path.append(x)
    return np.array(path)


@pytest.mark.parametrize(("panel", "curvature"), [(0, 0.04), (1, 0.01)])
def test_nesterov_and_its_equation(panel: int, curvature: float) -> None:
    axes = figure_data(CHAPTER)[7][panel]
    time, found = line(axes, "the equation")
    np.testing.assert_allclose(found, bessel(curvature, time), atol=1e-5)
    for h, every in ((1.0, 2), (0.0625, 8)):
        time, found = line(axes, f"h = {h:g}")
        expected = su_boyd_candes(np.array(curvature), h, round(60 / np.sqrt(h)))[::every]
        np.testing.assert_allclose(found, expected, atol=1e-4)
        np.testing.assert_allclose(time, np.sqrt(h) * every * np.arange(len(expected)), atol=1e-6)


class NumpyDigits(Digits):
    """The chapter's network on digits and momentum, in float64, from the formulas."""

    def train(self, h: float, beta: float, updates: Any, after: tuple[float, float] | None = None) -> np.ndarray:
        """The training loss after each of these numbers of updates; `after` 451 of them h and β may be others.

        The velocity of a ball is kept: what is stored is that of one tick.
        """
        weights, velocity = self.weights, [np.zeros_like(w) for w in self.weights]
        losses = []
        for update in range(int(max(updates)) + 1):
            if update == 451 and after:
                share = np.sqrt(after[0] / h) if after[1] != beta else 1.0
                velocity, (h, beta) = [share * v for v in velocity], after
            if update in updates:
                losses.append(self(weights, slice(None))[0])
            start = 32 * (update % 45)
            _, gradient = self(weights, slice(start, start + 32))
            velocity = [beta * v - h * g for v, g in zip(velocity, gradient, strict=True)]
            weights = [w + v for w, v in zip(weights, velocity, strict=True)]
        return np.array(losses)


def test_digits_on_two_clocks() -> None:
    digits = NumpyDigits()
    above, below = figure_data(CHAPTER)[3]
    reach = {}
    for beta in (0.0, 0.5, 0.8, 0.9, 0.97):
        updates, found = line(above, f"β = {beta}")
        np.testing.assert_allclose(found, digits.train(0.01, beta, updates), rtol=2e-3)
        clock, again = line(below, f"β = {beta}")
        np.testing.assert_array_equal(found, again)
        np.testing.assert_allclose(clock, 0.01 / (1 - beta) * updates, rtol=1e-5)
        reach[beta] = np.interp(-1.5, -found, clock)
    late = {beta: time - reach[0.0] for beta, time in reach.items()}
    for beta in (0.8, 0.9, 0.97):
        mass = 0.01 / (1 - beta) ** 2
        assert late[beta] == pytest.approx(mass * (1 - np.exp(-reach[beta] / mass)), rel=0.2)
    assert abs(late[0.5]) < 0.1


# ---- the real optimizers --------------------------------------------------------------------------------------------


def walk(optimizer: Any, gradient: Callable[[Any], Any], start: Any, steps: int) -> tuple[np.ndarray, np.ndarray]:
    """Every θ and every v of a real optimizer."""
    weight = keras.Variable(np.atleast_1d(start), dtype="float64")
    optimizer.build([weight])
    path = [(weight.numpy(), optimizer.variables[-1].numpy())]
    for _ in range(steps):
        optimizer.apply([np.asarray(gradient(weight.numpy()))], [weight])
        path.append((weight.numpy(), optimizer.variables[-1].numpy()))
    return np.array([p for p, _ in path]), np.array([v for _, v in path])


def real_step_matrix(optimizer: Any, curvature: Any) -> np.ndarray:
    """What one step does to the states (1, 0) and (0, 1), asked of the optimizer itself, for several curvatures."""
    curvature, columns = np.atleast_1d(curvature), []
    for state in ([1.0, 0.0], [0.0, 1.0]):
        weight = keras.Variable(np.full(curvature.shape, state[0]), dtype="float64")
        optimizer.build([weight])
        slot = optimizer.variables[-1]
        slot.assign(np.full(curvature.shape, state[1]))
        optimizer.apply([curvature * weight.numpy()], [weight])
        columns.append([weight.numpy(), slot.numpy()])
        optimizer = type(optimizer).from_config(optimizer.get_config())
    return np.array(columns).transpose(2, 1, 0)


# ---- sentences ------------------------------------------------------------------------------------------------------


@pytest.mark.claim(
    "Keras's default learning rate, 0.01, with the usual momentum, 0.9, is a ball with friction 1 and a tick of 0.1.",
    chapter="11",
)
@pytest.mark.parametrize("beta", [0.9, wrong(0.8, why="its friction is 2"), wrong(0.95, why="its friction is 1/2")])
def test_friction_of_the_defaults(beta: float) -> None:
    optimizer = keras.optimizers.SGD(momentum=beta)
    assert float(optimizer.learning_rate) == pytest.approx(0.01)
    theta, _ = walk(optimizer, identity, 1.0, 100)
    frictions = np.array([0.25, 0.5, 0.8, 1.0, 1.25, 2.0, 4.0])
    gaps = [np.abs(theta[:, 0] - ball(friction, 0.1 * np.arange(101))[0]).max() for friction in frictions]
    assert frictions[np.argmin(gaps)] == 1.0
    assert min(gaps) < 0.05


@pytest.mark.claim(
    "Lower the learning rate a hundredfold and leave β alone, and the friction grows tenfold.", chapter="11"
)
@pytest.mark.parametrize("beta", [0.9, wrong(0.99, why="this one keeps the friction")])
def test_a_lower_learning_rate_is_more_friction(beta: float) -> None:
    """The share of its speed that a ball loses on level ground per unit of time."""
    frictions = []
    for h, momentum in ((0.01, 0.9), (0.0001, beta)):
        pushes = [[1.0], [0.0]]
        _, v = walk(keras.optimizers.SGD(h, momentum=momentum), lambda _: pushes.pop(0), 0.0, 2)  # noqa: B023
        frictions.append((1 - v[2, 0] / v[1, 0]) / np.sqrt(h))
    assert frictions[1] / frictions[0] == pytest.approx(10, rel=1e-4)


@pytest.mark.claim(
    "With the friction kept, the distance between momentum and the ball's path shrinks like the tick √h", chapter="11"
)
@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("beta_of", [lambda tick: 1 - 1.5 * tick, wrong(lambda tick: 0.85, why="β is kept")])
def test_momentum_is_first_order(beta_of: Callable[[float], float], nesterov: bool) -> None:
    """On a loss that is no quadratic, log cosh, against scipy's integrator."""
    from scipy.integrate import solve_ivp

    def field(_: float, state: Any) -> Any:
        return [state[1], -1.5 * state[1] - np.tanh(state[0])]

    ticks, errors = np.array([0.2, 0.1, 0.05]), []
    for tick in ticks:
        steps = round(4 / tick)
        theta, _ = walk(keras.optimizers.SGD(tick**2, beta_of(tick), nesterov), np.tanh, 2.0, steps)
        exact = solve_ivp(field, (0, 4), [2.0, 0.0], t_eval=tick * np.arange(steps + 1)[:-1], rtol=1e-9, atol=1e-11)
        errors.append(np.abs(theta[:-1, 0] - exact.y[0]).max())
    assert np.polyfit(np.log(ticks), np.log(errors), 1)[0] == pytest.approx(1, abs=0.1)


@pytest.mark.claim("With `KeptFriction` the ball stays the same.", chapter="11")
@pytest.mark.parametrize("name", ["KeptFriction", wrong("Momentum", why="β stays, or v is that of the old tick")])
def test_kept_friction_is_one_ball(name: str) -> None:
    """Where the learning rate falls to a quarter after two units of time."""
    schedule = keras.optimizers.schedules.PiecewiseConstantDecay([19], [0.01, 0.0025])
    options = {} if name == "KeptFriction" else {"momentum": 0.9}
    kind = companion.Momentum if name == "Momentum" else class_of_chapter(name)
    theta, _ = walk(kind(schedule, **options), identity, 1.0, 100)
    times = np.concatenate([0.1 * np.arange(21), 2 + 0.05 * np.arange(1, 81)])
    assert np.abs(theta[:, 0] - ball(1.0, times)[0]).max() < 0.05


@pytest.mark.claim(
    "With its two lines swapped, momentum is Euler's method for position and velocity, and once hλ > 1 − β it spirals "
    "outwards where momentum spirals in.",
    chapter="11",
)
@pytest.mark.parametrize("name", ["Swapped", wrong("Momentum", why="the new velocity moves the weight")])
def test_swapped_lines_are_euler(name: str) -> None:
    kind = companion.Momentum if name == "Momentum" else class_of_chapter(name)
    h, beta = 0.0625, 0.96875
    theta, v = walk(kind(h, momentum=beta), identity, 1.0, 60)
    position, velocity = 1.0, 0.0
    for k in range(61):
        assert theta[k, 0] == pytest.approx(position, abs=1e-9)
        assert v[k, 0] / 0.25 == pytest.approx(velocity, abs=1e-9)
        position, velocity = position + 0.25 * velocity, velocity + 0.25 * (-0.125 * velocity - position)
    momentum, _ = walk(companion.Momentum(h, momentum=beta), identity, 1.0, 60)
    assert np.abs(momentum[40:]).max() < 0.6 < 2 < np.abs(theta[40:]).max()
    settles, _ = walk(kind(0.01, momentum=0.9), identity, 1.0, 80)  # hλ is a tenth of 1 − β
    assert np.abs(settles[60:]).max() < 0.1


@pytest.mark.parametrize("limit", [2.0, wrong(1.9, why="it holds longer"), wrong(2.1, why="it does not hold so long")])
def test_momentum_swings_up_to_two(limit: float) -> None:
    def furthest(tick: float) -> float:
        return factor(real_step_matrix(keras.optimizers.SGD(tick**2, momentum=1.0), 1.0)[0])

    assert furthest(limit - 0.01) == pytest.approx(1, abs=1e-6)
    assert furthest(limit + 0.01) > 1.1
    for z, is_stable in ((2.82j, True), (2.84j, False)):
        assert (abs(1 + z + z**2 / 2 + z**3 / 6 + z**4 / 24) <= 1) == is_stable
    assert round(np.sqrt(8), 2) == 2.83


@pytest.mark.claim("Inside the V the distance along every curvature shrinks by the same factor, √β", chapter="11")
@pytest.mark.parametrize("make", [companion.Momentum, keras.optimizers.SGD])
@pytest.mark.parametrize("overshoot", [1.0, wrong(1.1, why="it sticks out of the V")])
def test_one_factor_inside_the_v(make: Callable[..., Any], overshoot: float) -> None:
    for beta in (0.3, 0.67, 0.9):
        arms = (1 - np.sqrt(beta)) ** 2, (1 + np.sqrt(beta)) ** 2
        curvatures = np.geomspace(arms[0] * 1.001 / overshoot, arms[1] * 0.999, 7)
        for matrix in real_step_matrix(make(1.0, momentum=beta), curvatures):
            assert factor(matrix) == pytest.approx(np.sqrt(beta), abs=1e-6)


@pytest.mark.claim("Momentum's best factor is gradient descent's with √κ in the place of κ.", chapter="11")
@pytest.mark.parametrize("power", [0.5, wrong(1.0, why="that would be no gain"), wrong(0.25, why="that is too good")])
def test_best_factor(power: float) -> None:
    """The best of a fine grid over h and β, by the eigenvalues of the step's matrix."""
    for kappa in (10.0, 100.0):
        curvatures = np.geomspace(1, kappa, 9)
        h = np.linspace(0.005, 4 / kappa, 120)[:, None, None]
        beta = np.linspace(0, 0.95, 96)[None, :, None]
        half = (1 + beta - h * curvatures) / 2
        root = np.emath.sqrt(half**2 - beta)
        worst = np.maximum(np.abs(half + root), np.abs(half - root)).max(axis=-1)
        descent = worst[:, 0].min()
        assert descent == pytest.approx((kappa - 1) / (kappa + 1), abs=5e-3)
        assert worst.min() == pytest.approx((kappa**power - 1) / (kappa**power + 1), abs=2e-2)


@pytest.mark.claim("The best friction is, nearly, the critical damping of the flattest direction", chapter="11")
@pytest.mark.parametrize("kappa", [100.0, 1e4, 1e6])
def test_best_friction_is_nearly_critical(kappa: float) -> None:
    flattest, steepest = 3.0, 3.0 * kappa
    h = 4 / (np.sqrt(steepest) + np.sqrt(flattest)) ** 2
    root = np.sqrt(kappa)
    friction = (1 - ((root - 1) / (root + 1)) ** 2) / np.sqrt(h)
    assert friction == pytest.approx(2 * np.sqrt(flattest), rel=1 / root)
    assert friction < 2 * np.sqrt(flattest)


@pytest.mark.claim(
    "Nesterov's method follows the motion with friction 3/t at first order in the tick √h.", chapter="11"
)
@pytest.mark.parametrize("constant", [3, wrong(2, why="friction 2/t"), wrong(4, why="friction 4/t")])
def test_fading_friction_is_first_order(constant: int) -> None:
    """The chapter's class against the motion with friction c/t: Γ((c+1)/2) (2/z)^((c−1)/2) J_((c−1)/2)(z)."""
    curvature, ticks, sups = np.array([0.04, 0.01]), np.array([1.0, 0.5, 0.25]), []
    order = (constant - 1) / 2
    for tick in ticks:
        steps = round(20 / tick)
        optimizer = class_of_chapter("FadingFriction")(tick**2)
        y, v = walk(optimizer, lambda theta: curvature * theta, np.ones(2), steps)
        k = np.arange(steps + 1)[:, None]
        x = y - (k - 1) / (k + 2) * v
        np.testing.assert_allclose(x, su_boyd_candes(curvature, tick**2, steps), atol=1e-6)
        z = np.maximum(np.sqrt(curvature) * tick * k, 1e-9)
        exact = scipy.special.gamma(order + 1) * (2 / z) ** order * scipy.special.jv(order, z)
        sups.append(np.linalg.norm(x - exact, axis=1).max())
    np.testing.assert_allclose(sups, [0.154, 0.0785, 0.0397], rtol=5e-3)
    assert np.polyfit(np.log(ticks), np.log(sups), 1)[0] == pytest.approx(1, abs=0.05)


@pytest.mark.claim("Keras's `nesterov=True` adds friction where the loss is strongly curved.", chapter="11")
@pytest.mark.parametrize("nesterov", [True, wrong(False, why="its friction is the same everywhere")])
def test_nesterov_adds_friction(nesterov: bool) -> None:
    """The determinant of a step is the β that acts; friction is (1 − β) / √h."""
    h, beta, curvature = 0.01, 0.9, np.array([1.0, 25.0, 100.0])
    matrices = real_step_matrix(keras.optimizers.SGD(h, momentum=beta, nesterov=nesterov), curvature)
    frictions = (1 - np.linalg.det(matrices)) / np.sqrt(h)
    np.testing.assert_allclose(frictions, (1 - beta) / np.sqrt(h) + beta * np.sqrt(h) * curvature, rtol=1e-4)


@pytest.mark.claim("To keep the ball is to choose a gentler schedule.", chapter="11")
@pytest.mark.parametrize("kept", [(0.001, 0.99), wrong((0.001, 0.9), why="β stays")])
def test_a_kept_ball_is_a_gentler_schedule(kept: tuple[float, float]) -> None:
    """The chapter's three trainings: after half of the updates h and β change."""
    table = "\n".join(
        output.get("data", {}).get("text/plain", "")
        for cell in notebook(CHAPTER).cells
        for output in cell.get("outputs", [])
    )
    printed = [float(loss) for loss in re.findall(r"^h to a .* (0\.\d{3}) +\d+$", table, re.MULTILINE)]
    digits = NumpyDigits()
    ends = (0.001, 0.9), kept, (0.01, 0.9)
    hard, ball_loss, gentle = (digits.train(0.1, 0.9, [900], after)[0] for after in ends)
    np.testing.assert_allclose([hard, ball_loss, gentle], printed, atol=6e-4)
    assert abs(ball_loss - gentle) < 0.2 * (hard - gentle)


@pytest.mark.claim("Momentum that is light is only a larger learning rate, h/(1 − β).", chapter="11")
@pytest.mark.parametrize("beta", [0.5, wrong(0.95, why="this ball is heavy")])
def test_light_momentum_is_a_larger_learning_rate(beta: float) -> None:
    """Softmax regression on digits: the same losses as plain SGD with that rate, at the same updates."""
    data = datasets.digits("float64")
    x, y = data.x_train[:400], np.eye(10)[data.y_train[:400]]

    def shares(theta: Any) -> np.ndarray:
        logits = np.exp(x @ np.reshape(theta, (64, 10)))
        return logits / logits.sum(axis=1, keepdims=True)

    def losses(optimizer: Any) -> np.ndarray:
        path, _ = walk(optimizer, lambda theta: (x.T @ (shares(theta) - y) / len(x)).ravel(), np.zeros(640), 60)
        return np.array([-np.log((shares(theta) * y).sum(axis=1)).mean() for theta in path[5:]])

    plain = losses(companion.Momentum(0.05 / (1 - 0.5), momentum=0.0))
    light = losses(companion.Momentum(0.1 * (1 - beta), momentum=beta))
    np.testing.assert_allclose(light, plain, rtol=0.03)
    assert plain[-1] < 0.7 * plain[0]


@pytest.mark.claim(
    "Where descent with ten times the learning rate is thrown out of the valley, a ball with momentum 0.9 still "
    "trains.",
    chapter="11",
)
@pytest.mark.parametrize("h", [0.3, wrong(0.01, why="there descent trains as well")])
def test_momentum_bears_a_faster_clock(h: float) -> None:
    digits = NumpyDigits()
    (start,) = digits.train(h, 0.9, [0])
    (ball_loss,) = digits.train(h, 0.9, [200])
    (descent_loss,) = digits.train(10 * h, 0.0, [200])
    assert ball_loss < 0.3 * start
    assert descent_loss > start


@pytest.mark.claim(
    "If the steepest curvature is 104 where you took it for 100, the factor is 1.220, and the run explodes.",
    chapter="11",
)
@pytest.mark.parametrize("make", [companion.Momentum, keras.optimizers.SGD])
@pytest.mark.parametrize("share", [1.0, wrong(0.95, why="this is on the safe side")])
def test_the_best_pair_stands_beside_a_cliff(make: Callable[..., Any], share: float) -> None:
    optimizer = make(share * (2 / 11) ** 2, momentum=(9 / 11) ** 2)
    factors = [factor(matrix) for matrix in real_step_matrix(optimizer, [1.0, 100.0, 104.0])]
    assert factors[2] == pytest.approx(1.220, abs=1e-3)
    assert max(factors[:2]) == pytest.approx(9 / 11, abs=1e-3)


def test_a_little_less_learning_rate_is_safe() -> None:
    optimizer = keras.optimizers.SGD(0.95 * (2 / 11) ** 2, momentum=(9 / 11) ** 2)
    factors = [factor(matrix) for matrix in real_step_matrix(optimizer, [1.0, 100.0, 104.0])]
    np.testing.assert_allclose(factors, [0.856, 9 / 11, 9 / 11], atol=1e-3)


@pytest.mark.claim("A new `optimizer.momentum`, set after the first `fit`, changes nothing, silently.", chapter="11")
@pytest.mark.parametrize("make", [keras.optimizers.SGD, companion.Momentum])
@pytest.mark.parametrize(
    "when", ["after", wrong("before", why="then it counts"), wrong("compiled", why="it counts again")]
)
def test_momentum_is_compiled_in(make: Callable[..., Any], when: str) -> None:
    def weights_after(new: float | None) -> np.ndarray:
        dense = keras.layers.Dense(1, kernel_initializer="ones")
        model = keras.Sequential([keras.Input((2,)), dense])
        optimizer = make(0.01, momentum=0.9)
        model.compile(optimizer, "mse")
        x, y = np.ones((4, 2), "float32"), np.zeros((4, 1), "float32")
        if new is not None and when == "before":
            optimizer.momentum = new
        model.fit(x, y, verbose=0)
        if new is not None and when != "before":
            optimizer.momentum = new
        if when == "compiled":
            model.compile(optimizer, "mse")
        model.fit(x, y, epochs=3, verbose=0)
        return dense.get_weights()[0]

    np.testing.assert_array_equal(weights_after(0.0), weights_after(None))
