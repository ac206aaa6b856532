"""Chapter 08: the data under its figures, and the tests that hold its sentences."""

from collections.abc import Callable
from typing import Any

import keras
import numpy as np
import pytest
from keras.optimizers import SGD, Adam
from keras.optimizers.schedules import ExponentialDecay

from companion import datasets, gradient_flow
from tests.book.reading import figure_data, line
from tests.kit.cases import wrong
from tests.kit.network import Digits, softmax

CHAPTER = "08"


# ---- figures: the valley --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("panel", "h"), list(enumerate([0.05, 0.1, 0.19, 0.21])))
def test_polygons_are_geometric(panel: int, h: float) -> None:
    along, across = line(figure_data(CHAPTER)[0][panel], f"h = {h}")
    k = np.arange(round(2 / h) + 1)
    np.testing.assert_allclose(along, 3 * (1 - h) ** k, rtol=1e-5)
    np.testing.assert_allclose(across, (1 - 10 * h) ** k, atol=1e-5)


def test_exact_path_is_a_power() -> None:
    """On the flow, across = (along / 3)¹⁰: both are exponentials of the same time."""
    for axes in figure_data(CHAPTER)[0]:
        along, across = line(axes, "the exact path")
        np.testing.assert_allclose(across, (along / 3) ** 10, atol=2e-5)  # of six digits, to the tenth
        np.testing.assert_allclose(along[[0, -1]], [3, 3 * np.exp(-2)], rtol=1e-5)


# ---- figures: the network, in NumPy ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def network() -> Digits:
    return Digits(drawn="float64")


def descend(network: Digits, h: float, time: float) -> np.ndarray:
    path = [network.start]
    for _ in range(round(time / h)):
        path.append(path[-1] - h * network.gradient(path[-1]))
    return np.array(path)


@pytest.fixture(scope="module")
def paths(network: Digits) -> dict[float, np.ndarray]:
    """The small rates only for a while: they take many steps."""
    return {h: descend(network, h, time=1.0 if h < 0.1 else 24.0) for h in (0.025, 0.05, 0.1, 0.2, 0.4, 0.8, 1.6)}


@pytest.mark.parametrize("h", [0.025, 0.05, 0.1, 0.2, 0.4, 1.6])
def test_losses_are_those_of_numpy(h: float, network: Digits, paths: Any) -> None:
    above, below = figure_data(CHAPTER)[1]
    time, found = line(below, f"h = {h}")
    k = np.round(time / h).astype(int)
    np.testing.assert_allclose(time, h * k, rtol=1e-5)
    known = k[k < len(paths[h])]
    np.testing.assert_allclose(found[: len(known)], [network.loss(paths[h][i]) for i in known], rtol=1e-3)
    steps, same = line(above, f"h = {h}")
    np.testing.assert_array_equal(steps, k[1:])
    np.testing.assert_array_equal(same, found[1:])


def test_five_curves_are_one(network: Digits, paths: Any) -> None:
    """What the text says of the collapse: within 0.02 everywhere; the weights within 1.3 % of the way."""
    _, below = figure_data(CHAPTER)[1]
    losses = {h: line(below, f"h = {h}")[1][:: 4 if h < 0.2 else round(0.4 / h)] for h in (0.025, 0.05, 0.1, 0.2, 0.4)}
    assert all(len(loss) == 61 and np.abs(loss - losses[0.025]).max() < 0.02 for loss in losses.values())
    apart = np.linalg.norm(paths[0.4][-1] - paths[0.1][-1]) / np.linalg.norm(paths[0.1][-1] - network.start)
    assert apart < 0.0135
    assert network.loss(paths[1.6][-1]) > losses[0.025][-1] + 0.5


def test_errors_are_those_of_numpy(network: Digits, paths: Any) -> None:
    theta, h = network.start, 0.2
    for _ in range(120):
        a = network.gradient(theta)
        b = network.gradient(theta - h / 2 * a)
        c = network.gradient(theta - h / 2 * b)
        d = network.gradient(theta - h * c)
        theta = theta - h / 6 * (a + 2 * b + 2 * c + d)
    (axes,) = figure_data(CHAPTER)[2]
    rates, errors = line(axes, "network")
    known = [np.linalg.norm(paths[h][-1] - theta) for h in (0.1, 0.2, 0.4)]
    np.testing.assert_allclose(errors[2:], known, rtol=1e-2)
    np.testing.assert_allclose(errors[1:3] / errors[:2], 2, rtol=0.02)
    rates, errors = line(axes, "valley")
    k = np.round(2 / rates)
    along, across = 3 * ((1 - rates) ** k - np.exp(-2)), (1 - 10 * rates) ** k - np.exp(-20)
    np.testing.assert_allclose(errors, np.hypot(along, across), rtol=1e-4)
    x, y = line(axes, "slope 1")
    assert np.diff(np.log(y)) / np.diff(np.log(x)) == pytest.approx(1)


def test_limits_of_the_network(network: Digits, paths: Any) -> None:
    """2/λ on three ways: the text says where it lies between the rates, where it rises, and where it falls."""
    (axes,) = figure_data(CHAPTER)[6]
    limits = {}
    for h in (0.4, 0.8, 1.6):
        times, limits[h] = line(axes, f"limit, h = {h}")
        assert set(line(axes, f"rate {h}")[1]) == {h}
        known = [2 / network.largest_curvature(paths[h][round(time / h)]) for time in times]
        np.testing.assert_allclose(limits[h], known, atol=0.015)  # 30 rounds of power iteration
    assert limits[0.4].min() > 0.4
    assert 0.4 < limits[0.8][0] < 0.8 < limits[0.8][-2] < limits[0.8][-1]
    assert limits[1.6][1:-1].max() < limits[1.6][0]
    assert limits[1.6].max() < 0.6
    assert network.loss(paths[0.8][-1]) == pytest.approx(0.325, abs=6e-4)


def test_factors() -> None:
    (axes,) = figure_data(CHAPTER)[3]
    z, flow = line(axes, "flow")
    np.testing.assert_allclose(flow, np.exp(-z), rtol=1e-5)
    np.testing.assert_allclose(line(axes, "Euler")[1], 1 - z, atol=1e-6)
    assert [float(value[0]) for value in line(axes, "limit")] == [2.0, -1.0]


# ---- figures: logistic regression, in NumPy -------------------------------------------------------------------------


class Logistic:
    """Logistic regression on the digits with the penalty 0.01 ‖W‖², without a bias."""

    def __init__(self) -> None:
        data = datasets.digits("float64")
        self.x, self.targets = data.x_train, np.eye(10)[data.y_train]

    def loss(self, w: np.ndarray) -> float:
        share = softmax(self.x @ w)
        return float(-np.log((share * self.targets).sum(1)).mean() + 0.01 * np.sum(w**2))

    def descend(self, h: float, steps: int, w: Any = None) -> np.ndarray:
        w = np.zeros((64, 10)) if w is None else w
        for _ in range(steps):
            w = w - h * (self.x.T @ (softmax(self.x @ w) - self.targets) / len(self.x) + 0.02 * w)
        return w

    def curvatures(self, w: np.ndarray) -> np.ndarray:
        """All eigenvalues of the Hessian, from the matrix itself."""
        share, n = softmax(self.x @ w), len(self.x)
        hessian = np.zeros((10, 64, 10, 64))
        for i in range(10):
            for j in range(10):
                weight = share[:, i] * ((i == j) - share[:, j])
                hessian[i, :, j, :] = self.x.T @ (weight[:, None] * self.x) / n
        return np.linalg.eigvalsh(hessian.reshape(640, 640) + 0.02 * np.eye(640))


@pytest.fixture(scope="module")
def logistic() -> Logistic:
    return Logistic()


@pytest.fixture(scope="module")
def optimum(logistic: Logistic) -> tuple[np.ndarray, float]:
    """The minimum, and 2 over the largest curvature there."""
    w = logistic.descend(1.7, 1000)
    return w, 2 / float(logistic.curvatures(w).max())


def test_cliff_is_where_the_hessian_says(logistic: Logistic, optimum: Any) -> None:
    (axes,) = figure_data(CHAPTER)[4]
    w, limit = optimum
    np.testing.assert_allclose(line(axes, "2/λ")[0], limit, rtol=1e-5)
    below, arrived = line(axes, "below")
    above, never = line(axes, "above")
    assert below.max() < limit < above.min()
    for rates, gaps in ((below, arrived), (above, never)):
        expected = [logistic.loss(logistic.descend(h, 300)) - logistic.loss(w) for h in rates]
        np.testing.assert_allclose(gaps, np.maximum(expected, 1e-15), rtol=2e-2, atol=2e-14)


@pytest.mark.claim(
    "Ten percent above its limit, logistic regression does not explode: it jumps for ever between the same two points.",
    chapter="08",
)
@pytest.mark.parametrize("factor", [1.1, wrong(0.9, why="below the limit there is one point, not two")])
def test_a_rate_above_the_limit_bounces(logistic: Logistic, optimum: Any, factor: float) -> None:
    w, limit = optimum
    points = [logistic.descend(factor * limit, 600)]
    for _ in range(2):
        points.append(logistic.descend(factor * limit, 1, points[-1]))
    assert logistic.loss(points[0]) < 2 * logistic.loss(w)
    np.testing.assert_allclose(points[2], points[0], atol=1e-9)
    assert np.abs(points[1] - points[0]).max() > 0.01


def test_plateau_lies_above_the_minimum(logistic: Logistic, optimum: Any) -> None:
    (axes,) = figure_data(CHAPTER)[5]
    w, limit = optimum
    point, expected = np.zeros((64, 10)), []
    for _ in range(121):
        expected.append(logistic.loss(point))
        point = logistic.descend(1.1 * limit, 1, point)
    np.testing.assert_allclose(line(axes, "raw")[1], expected, rtol=1e-4)
    smoothed = line(axes, "smoothed")[1]
    np.testing.assert_allclose(smoothed, np.convolve(expected, np.ones(10) / 10, "valid"), rtol=1e-4)
    np.testing.assert_allclose(line(axes, "minimum")[1], logistic.loss(w), rtol=1e-4)
    assert np.ptp(smoothed[-40:]) < 0.002 < np.min(np.abs(np.diff(expected[-40:])))
    assert smoothed.min() > logistic.loss(w) + 0.02


# ---- the sentences --------------------------------------------------------------------------------------------------


def quartic(theta: np.ndarray) -> np.ndarray:
    """The gradient of Σ θ⁴ / 4. Its flow is θ / √(1 + 2 t θ²)."""
    return theta**3


def quartic_flow(theta: np.ndarray, time: float) -> np.ndarray:
    return theta / np.sqrt(1 + 2 * time * theta**2)


START = np.array([1.5, -0.5])


def run(
    optimizer: Any, gradient: Callable[[np.ndarray], np.ndarray], steps: int, start: np.ndarray = START
) -> np.ndarray:
    """Every point of a Keras optimizer on a gradient in float64."""
    variable = keras.Variable(start, dtype="float64")
    path = [variable.numpy()]
    for _ in range(steps):
        optimizer.apply([keras.ops.convert_to_tensor(gradient(path[-1]), "float64")], [variable])
        path.append(variable.numpy())
    return np.array(path)


@pytest.mark.claim(
    "A step of plain SGD with learning rate h is a step of Euler's method of length h along the gradient flow.",
    chapter="08",
)
@pytest.mark.parametrize(
    "optimizer",
    [
        SGD,
        wrong(lambda h: SGD(h, momentum=0.5), why="momentum adds the steps before"),
        wrong(lambda h: SGD(h, weight_decay=0.1), why="decay is another velocity"),
        wrong(Adam, why="Adam rescales each weight"),
    ],
)
def test_sgd_is_euler(optimizer: Any) -> None:
    path, theta = run(optimizer(0.125), quartic, 5), START
    for found in path[1:]:
        theta = theta + 0.125 * -quartic(theta)  # Euler: the present velocity, kept for the time h
        np.testing.assert_allclose(found, theta, rtol=1e-14)


@pytest.mark.claim(
    "Well below the rate that blows up, halving the learning rate and doubling the number of steps leads to nearly "
    "the same weights.",
    chapter="08",
)
@pytest.mark.parametrize(
    "part_of_limit",
    [0.02, 0.2, wrong(1.05, why="above the limit"), wrong(2.5, why="both above the limit")],
)
def test_half_the_rate_twice_the_steps(logistic: Logistic, optimum: Any, part_of_limit: float) -> None:
    """Within 2 % of the way travelled, on logistic regression; at least 12 steps."""
    h = part_of_limit * optimum[1]
    steps = round(max(12, 12 / part_of_limit / 20))
    coarse, fine = logistic.descend(h, steps), logistic.descend(h / 2, 2 * steps)
    assert np.linalg.norm(coarse - fine) < 0.02 * np.linalg.norm(fine)


@pytest.mark.claim(
    "Multiplying batch size and learning rate by the same factor leaves the time that an epoch lasts unchanged.",
    chapter="08",
)
@pytest.mark.parametrize(
    ("batch_size", "h"), [(16, 0.2), (64, 0.8), wrong(16, 0.1, why="the rate stayed"), wrong(16, 0.4, why="squared")]
)
def test_linear_scaling_keeps_the_clock(batch_size: int, h: float) -> None:
    def time_of_an_epoch(batch_size: int, h: float) -> float:
        model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1)])
        model.compile(SGD(h), "mse")
        model.fit(np.ones((64, 2)), np.ones(64), batch_size, verbose=0)
        return int(model.optimizer.iterations) * float(model.optimizer.learning_rate)

    assert time_of_an_epoch(batch_size, h) == pytest.approx(time_of_an_epoch(8, 0.1))


@pytest.mark.claim("Euler's method has order one: half the learning rate, half the distance to the flow.", chapter="08")
@pytest.mark.parametrize("method", ["sgd", "euler", wrong("heun", why="order two"), wrong("rk4", why="order four")])
def test_euler_has_order_one(method: str) -> None:
    def distance(h: float) -> float:
        steps = round(1 / h)
        path = (
            run(SGD(h), quartic, steps)
            if method == "sgd"
            else gradient_flow.integrate(quartic, START, h, steps, method)
        )
        return float(np.linalg.norm(path[-1] - quartic_flow(START, 1.0)))

    assert distance(1 / 64) / distance(1 / 128) == pytest.approx(2, rel=0.03)


@pytest.mark.claim(
    "On a quadratic, and near any minimum, a learning rate is too high when h > 2/\\lambda, with λ the largest "
    "curvature there: then Euler's method is unstable, although the flow is not.",
    chapter="08",
)
@pytest.mark.parametrize(
    "limit",
    [
        lambda curvatures: 2 / curvatures.max(),
        wrong(lambda curvatures: 1 / curvatures.max(), why="there the steepest direction is done in one step"),
        wrong(lambda curvatures: 2 / curvatures.mean(), why="the mean does not set the limit"),
        wrong(lambda curvatures: 2 / curvatures.min(), why="the flattest direction bears more"),
    ],
)
def test_limit_of_a_quadratic(limit: Callable[[np.ndarray], float]) -> None:
    random = np.random.default_rng(0)
    root = random.normal(size=(4, 4))
    hessian, start = root @ root.T, random.normal(size=4)
    h = limit(np.linalg.eigvalsh(hessian))
    stable, unstable = (run(SGD(f * h), lambda theta: hessian @ theta, 40, start) for f in (0.85, 1.15))
    assert np.linalg.norm(stable[-1]) < np.linalg.norm(start)
    assert np.linalg.norm(unstable[-1]) > 20 * np.linalg.norm(start)
    exact = np.linalg.norm(gradient_flow.quadratic_flow(hessian, start, np.linspace(0, 40 * h, 50)), axis=1)
    assert (np.diff(exact) <= 0).all()


@pytest.mark.claim(
    "Drawn against the times of its clock, a run with a decaying learning rate lies on the gradient flow's curve.",
    chapter="08",
)
@pytest.mark.parametrize(
    "clock",
    [
        lambda rates: np.append(0, np.cumsum(rates)),
        wrong(lambda rates: rates[0] * np.arange(len(rates) + 1), why="the first rate for all"),
        wrong(lambda rates: np.append(0, rates * np.arange(1, len(rates) + 1)), why="the last rate for all"),
    ],
)
def test_a_schedule_changes_the_clock_only(clock: Callable[[np.ndarray], np.ndarray]) -> None:
    schedule, steps = ExponentialDecay(0.02, 20, 0.5), 60
    path = run(SGD(schedule), quartic, steps)
    times = clock(np.array([float(schedule(k)) for k in range(steps)]))
    exact = np.array([quartic_flow(START, time) for time in times])
    assert np.abs(path - exact).max() < 0.02


@pytest.mark.claim(
    "As $h$ shrinks, SGD with momentum β follows the gradient flow 1/(1-\\beta) times as fast.", chapter="08"
)
@pytest.mark.parametrize("speed", [10.0, wrong(1.0, why="h·k is not its clock"), wrong(5.0, why="half of it")])
def test_momentum_runs_a_faster_clock(speed: float) -> None:
    def distance(h: float) -> float:
        steps = round(1 / (h * speed))
        return float(np.abs(run(SGD(h, momentum=0.9), quartic, steps)[-1] - quartic_flow(START, 1.0)).max())

    coarse, fine = distance(4e-3), distance(1e-3)
    assert fine < 0.35 * coarse
