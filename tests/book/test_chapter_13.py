"""Chapter 13: the data under its figures, and the tests that hold its sentences."""

import itertools
from collections.abc import Callable
from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf
from scipy.sparse.linalg import LinearOperator, eigsh

from companion import gradient_flow
from tests.book.reading import figure_data, line
from tests.kit.cases import wrong
from tests.kit.network import Digits, loss_and_gradient

CHAPTER = "13"
Y, START = 0.6, np.array([2.8, 3.5])
Field = Callable[[np.ndarray], np.ndarray]


def slope_of(sizes: Any, errors: Any) -> float:
    return float(np.polyfit(np.log(sizes), np.log(errors), 1)[0])


def derivative(loss: Callable[[np.ndarray], Any], small: float = 1e-5) -> Field:
    """The gradient by central differences."""
    return lambda v: np.array([(loss(v + e) - loss(v - e)) / (2 * small) for e in small * np.eye(len(v))])


def classical(field: Field, values: np.ndarray, step: float, steps: int) -> np.ndarray:
    """The path of v' = -field(v) by Kutta's classical method, written out."""
    path = [values]
    for _ in range(steps):
        v = path[-1]
        k1 = field(v)
        k2 = field(v - step / 2 * k1)
        k3 = field(v - step / 2 * k2)
        k4 = field(v - step * k3)
        path.append(v - step / 6 * (k1 + 2 * k2 + 2 * k3 + k4))
    return np.array(path)


def descend(field: Field, values: np.ndarray, step: float, steps: int, method: str = "euler") -> np.ndarray:
    if method == "rk4":
        return classical(field, values, step, steps)
    path = [values]
    for _ in range(steps):
        slope = field(path[-1])
        if method == "heun":
            slope = (slope + field(path[-1] - step * slope)) / 2
        path.append(path[-1] - step * slope)
    return np.array(path)


# ---- figures: the valley --------------------------------------------------------------------------------------------


def valley(values: np.ndarray) -> np.ndarray:
    a, b = values
    return np.array([(a * b - Y) * b, (a * b - Y) * a])


def modified_valley(h: float) -> Field:
    """By hand: ‖∇L‖² = r²(a² + b²)."""

    def field(values: np.ndarray) -> np.ndarray:
        a, b = values
        r, size = Y - a * b, a * a + b * b
        return valley(values) + h / 4 * np.array([-2 * r * b * size + 2 * r * r * a, -2 * r * a * size + 2 * r * r * b])

    return field


def flow_curvature() -> float:
    """a² + b² where the flow ends: it keeps a² − b², and there ab = y."""
    kept = START[0] ** 2 - START[1] ** 2
    return float(np.sqrt(kept**2 + 4 * Y**2))


def test_paths() -> None:
    (axes,) = figure_data(CHAPTER)[0]
    a, b = line(axes, "flow of L")
    np.testing.assert_allclose(a**2 - b**2, START[0] ** 2 - START[1] ** 2, rtol=1e-4)
    a, b = line(axes, "flow of the modified loss")
    expected = classical(modified_valley(0.025), START, 0.0005, 5999)[::30]
    np.testing.assert_allclose(np.transpose([a, b]), expected, atol=2e-5)
    a, b = line(axes, "gradient descent")
    np.testing.assert_allclose(np.transpose([a, b]), descend(valley, START, 0.025, 320), atol=2e-5)
    a, b = line(axes, "floor")
    np.testing.assert_allclose(a * b, Y, rtol=1e-4)


def test_what_steps_take_away() -> None:
    """The product of the steps' factors, by hand."""
    (axes,) = figure_data(CHAPTER)[1]
    for h in (0.001, 0.025, 0.05):
        times, found = line(axes, f"h = {h}")
        points = descend(valley, START, h, len(times) - 1)
        factors = 1 - (h * (Y - np.prod(points[:-1], axis=1))) ** 2
        expected = abs(START[0] ** 2 - START[1] ** 2) * np.cumprod([1, *factors])
        np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_one_step_beside_two_flows() -> None:
    """On ½ (x² + 3 y²): the flows by small steps, and the end of the modified one is the nearer to the arrow's tip."""
    (axes,) = figure_data(CHAPTER)[2]
    curvatures, begin, h = np.array([1.0, 3.0]), np.array([2.2, 1.6]), 0.2
    tip, away = begin * (1 - h * curvatures), []
    for label, penalty in (("flow of L", 0.0), ("flow of the modified loss", h / 4)):
        field = derivative(lambda v, c=penalty: curvatures @ v**2 / 2 + c * np.sum((curvatures * v) ** 2))
        expected = classical(field, begin, h / 49, 49)
        np.testing.assert_allclose(np.transpose(line(axes, label)), expected, rtol=1e-4)
        away.append(np.linalg.norm(expected[-1] - tip))
    assert away[1] < away[0] / 2


def test_errors_of_one_step() -> None:
    (axes,) = figure_data(CHAPTER)[7]
    sizes = 0.008 / 2.0 ** np.arange(7)
    expected: dict[str, list[float]] = {"Euler, flow of L": [], "Euler, modified": [], "Heun, flow of L": []}
    for h in sizes:
        flow = classical(valley, START, h / 100, 100)[-1]
        modified = classical(modified_valley(h), START, h / 100, 100)[-1]
        euler, heun = (descend(valley, START, h, 1, method)[-1] for method in ("euler", "heun"))
        for errors, error in zip(expected.values(), (euler - flow, euler - modified, heun - flow), strict=True):
            errors.append(float(np.linalg.norm(error)))
    for label, errors in expected.items():
        x, y = line(axes, label)
        np.testing.assert_allclose(x, sizes, rtol=1e-5)
        np.testing.assert_allclose(y, errors, rtol=1e-3)
        assert abs(slope_of(x, y) - (2 if label == "Euler, flow of L" else 3)) < 0.1


def test_where_the_methods_end() -> None:
    (axes,) = figure_data(CHAPTER)[3]
    np.testing.assert_allclose(line(axes, "flow")[1], flow_curvature(), rtol=1e-5)
    for method in ("rk4", "heun", "euler"):
        rates, found = line(axes, method)
        ends = [descend(valley, START, h, round(8 / h), method)[-1] for h in rates]
        np.testing.assert_allclose(found, np.sum(np.square(ends), axis=1), rtol=1e-5)
    rates, found = line(axes, "predicted")
    ends = [classical(modified_valley(h), START, 0.002, 4000)[-1] for h in rates]
    np.testing.assert_allclose(found, np.sum(np.square(ends), axis=1), rtol=1e-4)


def test_the_jump_in_the_valley() -> None:
    """Up the walls and down where the valley is wide; what is left of a² − b² is what the steps' factors leave."""
    (axes,) = figure_data(CHAPTER)[5]
    h, points = 0.5, np.transpose(line(axes, "gradient descent"))
    np.testing.assert_allclose(points, descend(valley, np.array([0.2, 2.2]), h, 12), atol=2e-5)
    residual = Y - np.prod(points, axis=1)
    assert residual.argmax() == 6
    assert residual[6] ** 2 > 20 * residual[0] ** 2
    left = np.prod(1 - (h * residual[:-1]) ** 2) * (points[0, 0] ** 2 - points[0, 1] ** 2)
    assert points[-1, 0] ** 2 - points[-1, 1] ** 2 == pytest.approx(left, abs=1e-3)
    a, b = line(axes, "limit")
    np.testing.assert_allclose([a[0] * b[0], h * (a[0] ** 2 + b[0] ** 2)], [Y, 2], rtol=1e-4)
    assert h * np.sum(points[0] ** 2) > 2 > h * np.sum(points[-1] ** 2)


def test_single_examples() -> None:
    (axes,) = figure_data(CHAPTER)[6]
    h, random, (a, b), path = 0.025, np.random.default_rng(1), START, []
    for _ in range(6000):
        path.append(a * a + b * b)
        for shift in random.permutation([1.0, -1.0]):
            r = Y + shift - a * b
            a, b = a + h * r * b, b + h * r * a
    epoch, found = line(axes, "SGD")
    np.testing.assert_allclose(found, np.array(path)[epoch.astype(int)], rtol=1e-5)

    def field(values: np.ndarray) -> np.ndarray:
        """The penalty of the mean loss, plus that of the disagreement: the examples' residuals vary by 1."""
        return modified_valley(h)(values) + h / 2 * values

    predicted = np.sum(classical(field, START, h / 2, 24000)[::4] ** 2, axis=1)
    epoch, found = line(axes, "predicted")
    np.testing.assert_allclose(found, predicted[epoch.astype(int)], rtol=1e-2)
    np.testing.assert_allclose(line(axes, "full batch")[1], np.sum(descend(valley, START, h, 400)[-1] ** 2), rtol=1e-5)
    np.testing.assert_allclose(line(axes, "flattest")[1], 2 * Y)


# ---- figures: the network, in NumPy ---------------------------------------------------------------------------------


class Network(Digits):
    """64 pixels, 16 tanh units, 10 outputs, squared error on 200 digits, in float64 from Keras's initial weights."""

    def __init__(self, seed: int) -> None:
        super().__init__(16, seed, rows=200)
        self.y = np.eye(10)[self.y]

    def __call__(self, weights: Any, rows: slice = slice(None)) -> Any:
        return loss_and_gradient(weights, self.x, self.y, squares=True)

    def sharpness(self, values: np.ndarray) -> float:
        size = len(values)
        hessian = LinearOperator((size, size), matvec=lambda v: self.hessian_times(values, np.ravel(v)), dtype=float)
        return float(eigsh(hessian, k=1, which="LA", v0=np.ones(size), tol=1e-5, return_eigenvectors=False)[0])

    def train(self, h: float, weight: float) -> list[np.ndarray]:
        """The weights after each 16 units of time, up to 128."""
        values, path, steps = self.start, [], round(16 / h)
        for step in range(1, 8 * steps + 1):
            slope = self.gradient(values)
            if weight:
                slope = slope + 2 * weight * self.hessian_times(values, slope)
            values = values - h * slope
            if step % steps == 0:
                path.append(values)
        return path


@pytest.mark.parametrize("seed", [1, 2, 3])
@pytest.mark.parametrize(("name", "h", "weight"), [("small", 0.1, 0), ("penalty", 0.1, 0.7 / 4), ("large", 0.8, 0)])
def test_sharpness_at_equal_loss(name: str, h: float, weight: float, seed: int) -> None:
    (axes,) = figure_data(CHAPTER)[4]
    loss, sharpness = line(axes, f"{name} {seed}")
    network = Network(seed)
    path = network.train(h, weight)
    np.testing.assert_allclose(loss, [network.loss(values) for values in path], rtol=5e-3)
    chosen = [0, 3, 7]
    np.testing.assert_allclose(sharpness[chosen], [network.sharpness(path[i]) for i in chosen], rtol=5e-3)
    np.testing.assert_allclose(line(axes, "2/h")[1], 2.5)


@pytest.mark.claim(
    "Single images flatten this network, and at twice the rate about twice as much.",
    chapter="13",
)
@pytest.mark.parametrize("batch", [1, wrong(20, why="the larger the batch, the less")])
def test_small_batches_flatten(batch: int) -> None:
    """In other orders than the chapter's; where the loss of all images passes 0.04, the mean of three starts."""

    def sharpness(seed: int, h: float, batch: int) -> float:
        network, random, loss = Network(seed), np.random.default_rng(10 + seed), np.inf
        x, y, values, order = network.x, network.y, network.start, np.array([], int)
        while loss >= 0.04:
            for _ in range(round(8 / h)):
                order = order if len(order) else random.permutation(200)
                network.x, network.y, order = x[order[:batch]], y[order[:batch]], order[batch:]
                values = values - h * network.gradient(values)
            network.x, network.y = x, y
            loss = network.loss(values)
        return network.sharpness(values)

    found = [[sharpness(seed, *run) for run in ((0.2, 200), (0.1, batch), (0.2, batch))] for seed in (1, 2, 3)]
    full, one, two = np.transpose(found)
    assert np.mean(one / full) < 0.9
    assert 1.6 < np.mean(1 - two / full) / np.mean(1 - one / full) < 2.6


@pytest.mark.claim(
    "As long as hλ is below 2 at the start, the learning rate hardly changes the sharpness with which this network "
    "reaches a loss of 0.04.",
    chapter="13",
)
@pytest.mark.parametrize(
    ("seed", "rate"),
    [
        (1, 0.2),
        (2, 0.4),
        (3, 0.2),
        pytest.param(1, 0.4, marks=pytest.mark.xfail(strict=True, reason="hλ begins at 2.4")),
        pytest.param(2, 0.8, marks=pytest.mark.xfail(strict=True, reason="hλ begins at 3.6")),
    ],
)
def test_sharpness_below_the_stability_limit(seed: int, rate: float) -> None:
    """Against a rate of 0.1, where the training loss passes 0.04."""
    network = Network(seed)

    def at_the_end(h: float) -> float:
        path = network.train(h, 0)
        losses = [network.loss(values) for values in path]
        i = next(i for i, loss in enumerate(losses) if loss < 0.04)
        last, first = network.sharpness(path[i]), network.sharpness(path[i - 1])
        return float(np.interp(0.04, [losses[i], losses[i - 1]], [last, first]))

    assert at_the_end(rate) == pytest.approx(at_the_end(0.1), rel=0.03)
    assert rate * network.sharpness(network.start) < 2


# ---- sentences ------------------------------------------------------------------------------------------------------


def hilly(v: np.ndarray) -> Any:
    """A loss with curvature that changes, and nothing to do with the valley."""
    return np.cos(v[0] + 0.3) + v[0] ** 2 * v[1] / 3 + np.exp(v[1] / 2) + v[1] ** 4 / 8


def hilly_gradient(v: np.ndarray) -> np.ndarray:
    return np.array([-np.sin(v[0] + 0.3) + 2 * v[0] * v[1] / 3, v[0] ** 2 / 3 + np.exp(v[1] / 2) / 2 + v[1] ** 3 / 2])


def hilly_hessian(v: np.ndarray) -> np.ndarray:
    mixed = 2 * v[0] / 3
    corner = np.exp(v[1] / 2) / 4 + 3 * v[1] ** 2 / 2
    return np.array([[-np.cos(v[0] + 0.3) + 2 * v[1] / 3, mixed], [mixed, corner]])


POINT, SIZES = np.array([1.1, 0.8]), 0.04 / 2.0 ** np.arange(5)


@pytest.mark.claim(
    "Against the flow of the modified loss, the error of one Euler step has slope 3 instead of 2.", chapter="13"
)
@pytest.mark.parametrize(
    "share",
    [1.0, wrong(0.0, why="the flow of L"), wrong(2.0, why="h/2 in the loss"), wrong(-1.0, why="the other sign")],
)
def test_order_beside_the_modified_flow(share: float) -> None:
    errors = []
    for h in SIZES:
        modified = gradient_flow.modified_gradient(hilly_gradient, hilly_hessian, share * h)
        np.testing.assert_allclose(
            modified(POINT),
            derivative(gradient_flow.modified_loss(hilly, derivative(hilly), share * h))(POINT),
            rtol=1e-4,
        )
        end = classical(modified, POINT, h / 50, 50)[-1]
        errors.append(np.linalg.norm(POINT - h * hilly_gradient(POINT) - end))
    assert abs(slope_of(SIZES, errors) - 3) < 0.1


@pytest.mark.claim("What Heun adds to the flow is of size h² only.", chapter="13")
@pytest.mark.parametrize(
    "method",
    ["heun", "midpoint", "ralston", wrong("euler", why="starts at h"), wrong("extragradient", why="starts at h")],
)
def test_the_first_correction_of_heun(method: str) -> None:
    """What a step does beyond the flow is h · (correction): of size h³, and not less."""
    beyond = []
    for h in SIZES:
        step = gradient_flow.integrate(hilly_gradient, POINT, h, 1, method)[-1]
        beyond.append(np.linalg.norm(step - classical(hilly_gradient, POINT, h / 50, 50)[-1]))
    assert abs(slope_of(SIZES, beyond) - 3) < 0.1


@pytest.mark.claim(
    "The better the integrator, the less it adds; and in general what Heun adds is not the gradient of any loss.",
    chapter="13",
)
@pytest.mark.parametrize(("method", "power"), [("heun", 3), wrong("euler", 2, why="the slope of the penalty")])
def test_heun_adds_no_loss(method: str, power: int) -> None:
    """What a step adds to the flow, as a field: its Jacobian is symmetric if and only if it is a slope."""
    h = 0.002

    def added(v: np.ndarray) -> np.ndarray:
        step = gradient_flow.integrate(hilly_gradient, v, h, 1, method)[-1]
        return (classical(hilly_gradient, v, h / 8, 8)[-1] - step) / h**power

    jacobian = np.transpose([(added(POINT + e) - added(POINT - e)) / 2e-3 for e in 1e-3 * np.eye(2)])
    assert abs(jacobian[0, 1] - jacobian[1, 0]) > 0.02 * np.abs(jacobian).max()


@pytest.mark.claim("Each step of gradient descent multiplies a² − b² by exactly 1 − h²r².", chapter="13")
@pytest.mark.parametrize(
    "make",
    [lambda: keras.optimizers.SGD(0.02), wrong(lambda: keras.optimizers.SGD(0.02, momentum=0.9), why="momentum")],
)
def test_the_gears_of_the_valley(make: Callable[[], Any]) -> None:
    weights, optimizer = [keras.Variable(value, dtype="float64") for value in START], make()
    for _ in range(5):
        a, b = (float(weight.numpy()) for weight in weights)
        with tf.GradientTape() as tape:
            loss = (Y - weights[0] * weights[1]) ** 2 / 2
        optimizer.apply(tape.gradient(loss, [weight.value for weight in weights]), weights)
        after_a, after_b = (float(weight.numpy()) for weight in weights)
        h = float(np.float32(0.02))
        assert after_a**2 - after_b**2 == pytest.approx((a**2 - b**2) * (1 - h**2 * (Y - a * b) ** 2), rel=1e-12)


@pytest.mark.claim(
    "The penalty vanishes with the gradient: a minimum of L is still a minimum of the modified loss, "
    "with the same value.",
    chapter="13",
)
@pytest.mark.parametrize("penalty", ["modified", wrong("weight decay", why="moves minima")])
@pytest.mark.parametrize("b", [0.5, 0.9, 2.1])
def test_minima_stay(b: float, penalty: str) -> None:
    minimum, h = np.array([Y / b, b]), 0.3

    def loss(v: np.ndarray) -> Any:
        return (Y - v[0] * v[1]) ** 2 / 2

    modified = gradient_flow.modified_loss(loss, valley, h)
    if penalty == "weight decay":
        modified = lambda v: loss(v) + h / 4 * np.sum(v**2)  # noqa: E731
    assert modified(minimum) == pytest.approx(loss(minimum), abs=1e-15)
    np.testing.assert_allclose(derivative(modified)(minimum), 0, atol=1e-9)
    around = minimum + 0.05 * np.random.default_rng(0).normal(size=(100, 2))
    assert all(modified(point) >= modified(minimum) for point in around)


@pytest.mark.claim(
    "Averaged over the shuffles, an epoch of SGD follows the flow of the mean of Lᵢ + (h/4)‖∇Lᵢ‖², up to terms in h³.",
    chapter="13",
)
@pytest.mark.parametrize("form", ["mean of norms", wrong("norm of mean", why="the penalty of the full batch")])
def test_modified_loss_of_sgd(form: str) -> None:
    """All six orders of three batches, against the flow for the time of an epoch."""
    shifts = np.array([[0.9, -0.2], [-0.5, 0.8], [0.2, 0.7]])
    batches: list[Field] = [lambda v, s=shift: hilly_gradient(v + s) for shift in shifts]
    hessians = [lambda v, s=shift: hilly_hessian(v + s) for shift in shifts]

    def field(h: float) -> Field:
        def modified(v: np.ndarray) -> np.ndarray:
            g, hessian = np.array([b(v) for b in batches]), np.array([f(v) for f in hessians])
            if form == "norm of mean":
                g, hessian = g.mean(0, keepdims=True), hessian.mean(0, keepdims=True)
            return g.mean(0) + h / 2 * np.einsum("ijk,ik->j", hessian, g) / len(g)

        return modified

    errors = []
    for h in SIZES / 4:
        ends = []
        for order in itertools.permutations(batches):
            v = POINT
            for batch in order:
                v = v - h * batch(v)
            ends.append(v)
        errors.append(np.linalg.norm(np.mean(ends, axis=0) - classical(field(h), POINT, 3 * h / 50, 50)[-1]))
    assert abs(slope_of(SIZES, errors) - 3) < 0.1


@pytest.mark.claim(
    "Small steps of size s bring a penalty of weight s/4 of their own, so what is missing is (h − s)/4.", chapter="13"
)
@pytest.mark.parametrize("share", [0.5, wrong(1.0, why="h/4 on top of their own"), wrong(0.0, why="no penalty")])
def test_small_steps_bring_their_share(share: float) -> None:
    """One step of h against two of h/2, with the penalty of weight share · h/4."""
    errors = []
    for h in SIZES:
        field = gradient_flow.modified_gradient(hilly_gradient, hilly_hessian, share * h)
        small = descend(field, POINT, h / 2, 2)[-1]
        errors.append(np.linalg.norm(POINT - h * hilly_gradient(POINT) - small))
    assert abs(slope_of(SIZES, errors) - 3) < 0.1


@pytest.mark.claim(
    "One question asked uphill, at θ + (h/2)∇L(θ), is answered with the gradient of the modified loss, "
    "up to terms in h².",
    chapter="13",
)
@pytest.mark.parametrize(
    "way", [0.5, wrong(-0.5, why="downhill, as the midpoint method"), wrong(1.0, why="twice as far")]
)
def test_the_uphill_question(way: float) -> None:
    g = hilly_gradient(POINT)
    errors = [np.linalg.norm(hilly_gradient(POINT + way * h * g) - g - h / 2 * hilly_hessian(POINT) @ g) for h in SIZES]
    assert abs(slope_of(SIZES, errors) - 2) < 0.1


@pytest.mark.claim(
    "Beyond hλ = 1 gradient descent on ½λθ² jumps from side to side, and no flow in one dimension passes through its "
    "points.",
    chapter="13",
)
@pytest.mark.parametrize("h_curvature", [1.01, 1.5, 1.99, wrong(0.99, why="stays on its side")])
def test_side_to_side(h_curvature: float) -> None:
    """A flow on a line goes one way, or stays: it does not come back to a side that it has left."""
    weight, optimizer, points = keras.Variable(1.0, dtype="float64"), keras.optimizers.SGD(h_curvature), []
    for _ in range(8):
        points.append(float(weight.numpy()))
        optimizer.apply([tf.constant(points[-1], "float64")], [weight])
    assert all(before * after < 0 for before, after in itertools.pairwise(points))


@pytest.mark.claim("Every minimum of the valley is the same function, 0.6 x, whatever its curvature.", chapter="13")
@pytest.mark.parametrize("point", ["minimum", wrong("elsewhere", why="not on the floor")])
def test_all_minima_are_one_function(point: str) -> None:
    x, curvatures = np.linspace(-2, 2, 9).reshape(-1, 1), []
    model = keras.Sequential(
        [keras.Input((1,)), *(keras.layers.Dense(1, use_bias=False, dtype="float64") for _ in "ab")]
    )
    for b in (0.8, 1.5, 2.1):
        a = Y / b if point == "minimum" else 0.5
        model.set_weights([np.array([[a]]), np.array([[b]])])
        np.testing.assert_allclose(model(x), Y * x, atol=1e-12)
        variables = [weight.value for weight in model.trainable_variables]
        with tf.GradientTape(persistent=True) as outer:
            with tf.GradientTape() as inner:
                loss = (Y - model(np.array([[1.0]]))) ** 2 / 2
            slopes = inner.gradient(loss, variables)
        hessian = np.array([[outer.gradient(slope, v).numpy().item() for v in variables] for slope in slopes])
        curvatures.append(np.linalg.eigvalsh(hessian)[-1])
        assert curvatures[-1] == pytest.approx(a * a + b * b)
    assert max(curvatures) > 3 * min(curvatures)
