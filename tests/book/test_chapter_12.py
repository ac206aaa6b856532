"""Chapter 12: the data under its figures, the record that it shows, and the tests that hold its sentences."""

import ast
import functools
import json
import math
import re
from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf

import companion
from companion import datasets, gradient_flow
from tests.benchmarks.race_integrators import Network, network, stepper
from tests.book.reading import figure_data, line, notebook
from tests.kit import ROOT
from tests.kit.cases import wrong

CHAPTER = "12"


def record() -> dict[str, Any]:
    """What tests/benchmarks/race_integrators.py wrote."""
    return json.loads((ROOT / "book" / "data" / "integrators.json").read_text())


def in_chapter(name: str) -> Any:
    """The literal that a cell of the chapter assigns to a name."""
    for cell in notebook(CHAPTER).cells:
        if cell.cell_type == "code" and f"{name} = {{" in cell.source:
            for node in ast.parse(cell.source).body:
                if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", None) == name:
                    return ast.literal_eval(node.value)
    raise AssertionError(f"no cell assigns {name}")


def race(name: str) -> dict[str, Any]:
    (found,) = [entry for entry in record()["races"] if entry["name"] == name]
    return {result["method"]: result for result in found["results"]}


NAMES = {
    "Euler": "euler", "Heun": "heun", "RK4": "rk4", "RK45": "dormand_prince",
    "Adams–Bashforth": "adams_bashforth", "Chebyshev": "chebyshev", "momentum": "momentum", "Adam": "adam",
    "Kutta 3": "kutta3",
}  # fmt: skip


# ---- the record -----------------------------------------------------------------------------------------------------


def test_the_chapter_shows_the_record() -> None:
    for name, row in in_chapter("record").items():
        for shown, which in zip(row, ("logistic", "full batch", "batches of 32"), strict=True):
            found = race(which).get(NAMES[name])
            assert (found is None) == (shown is None)
            if found is None:
                continue
            assert shown == pytest.approx((found["h"], found["mean"], found["spread"]), rel=1e-3, abs=6e-5)


def test_the_record_is_what_its_runs_say() -> None:
    for entry in record()["races"]:
        for result in entry["results"]:
            finals = [run["final"] for run in result["runs"]]
            assert result["mean"] == pytest.approx(np.mean(finals))
            assert result["spread"] == pytest.approx(np.std(finals, ddof=1))
            assert all(run["spent"][-1] == entry["budget"] // result["cost"] * result["cost"] for run in result["runs"])
            tried = {h: value for h, value in result["grid"] if value is not None}
            assert min(tried.values()) == pytest.approx(result["mean"])
            assert min(h for h, _ in result["grid"]) < result["h"] < max(h for h, _ in result["grid"])


def keras_network(hidden: int, theta: np.ndarray) -> keras.Model:
    """The same network in Keras, with given weights."""
    layers = [keras.Input((64,), dtype="float64"), keras.layers.Dense(10, dtype="float64")]
    if hidden:
        layers.insert(1, keras.layers.Dense(hidden, activation="tanh", dtype="float64"))
    model = keras.Sequential(layers)
    shapes = [weight.shape for weight in model.get_weights()]
    cuts = np.cumsum([math.prod(shape) for shape in shapes])[:-1]
    model.set_weights([part.reshape(shape) for part, shape in zip(np.split(theta, cuts), shapes, strict=True)])
    return model


@pytest.mark.parametrize("method", ["euler", "momentum", wrong("heun", why="another method")])
def test_keras_repeats_the_race(method: str) -> None:
    """The recorded losses of the first 90 gradients, by Keras's own SGD."""
    name = "euler" if method == "heun" else method
    result = race("batches of 32")[name]
    run = result["runs"][0]
    data, net = datasets.digits("float64"), network(32)
    model = keras_network(32, net.start(run["seed"]))
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True, dtype="float64")
    optimizer = keras.optimizers.SGD(result["h"], momentum=0.9 if method == "momentum" else 0.0)
    if method == "heun":
        optimizer = companion.Heun(result["h"])
    model.compile(optimizer, loss)
    if method == "heun":
        optimizer.inject(model)
    order = np.random.default_rng(run["seed"]).permutation(1440).reshape(-1, 32)[::-1]
    losses = []
    for part in range(1, 4):
        rows = order[(part - 1) * 15 : part * 15].ravel()  # the recorded points are 30 gradients apart
        batches = tf.data.Dataset.from_tensor_slices((data.x_train[rows], data.y_train[rows])).batch(32)
        model.fit(batches, verbose=0, shuffle=False)
        losses.append(float(loss(data.y_train, model(data.x_train))))
    assert run["spent"][1] == 30
    assert losses[1] == pytest.approx(run["losses"][1], rel=1e-4)


def test_gradient_of_the_race_is_that_of_keras() -> None:
    data = datasets.digits("float64")
    for hidden, name in ((0, "entropy"), (32, "entropy"), (32, "squares")):
        net = Network(hidden, name, data.x_train[:50], data.y_train[:50])
        theta = net.start(3)
        model = keras_network(hidden, theta)
        with tf.GradientTape() as tape:
            output = model(data.x_train[:50])
            if name == "squares":
                loss = tf.reduce_mean((output - tf.one_hot(data.y_train[:50], 10, dtype="float64")) ** 2)
            else:
                loss = tf.reduce_mean(
                    tf.nn.sparse_softmax_cross_entropy_with_logits(labels=data.y_train[:50], logits=output)
                )
        slopes = np.concatenate([np.ravel(g) for g in tape.gradient(loss, model.trainable_variables)])
        value, gradient = net(theta)
        assert value == pytest.approx(float(loss))
        np.testing.assert_allclose(gradient, slopes, atol=1e-14)


@pytest.mark.parametrize("method", ["adam", "adams_bashforth"])
def test_rules_of_the_race_are_those_of_the_book(method: str) -> None:
    optimizer = {"adam": keras.optimizers.Adam(0.01), "adams_bashforth": companion.AdamsBashforth2(0.01)}[method]
    weight = keras.Variable(np.array([1.0, -2.0]), dtype="float64")
    step, cost = stepper(method, 0.01)
    theta = weight.numpy()
    for _ in range(5):
        optimizer.apply([np.array([3.0, 0.1]) * weight.numpy()], [weight])
        theta = step(theta, lambda values: np.array([3.0, 0.1]) * values)
    assert cost == 1
    np.testing.assert_allclose(theta, weight.numpy(), rtol=1e-6)


@pytest.mark.parametrize("method", ["chebyshev", "rk4", "dormand_prince"])
def test_steps_of_the_race_are_those_of_integrate(method: str) -> None:
    step, cost = stepper(method, 0.1)
    tableau = gradient_flow.chebyshev(5) if method == "chebyshev" else method
    end = gradient_flow.integrate(lambda t: t**3, np.array([0.5, -1.0]), 0.1, 1, tableau)[-1]
    np.testing.assert_allclose(step(np.array([0.5, -1.0]), lambda t: t**3), end, rtol=1e-14)
    assert cost == {"chebyshev": 5, "rk4": 4, "dormand_prince": 6}[method]


def initial_weights() -> np.ndarray:
    """Those of the chapter's network."""
    keras.utils.set_random_seed(1)
    dense = [keras.layers.Dense(units, dtype="float64") for units in (32, 10)]
    model = keras.Sequential([keras.Input((64,), dtype="float64"), *dense])
    return np.concatenate([np.ravel(weight) for weight in model.get_weights()])


# ---- the race -------------------------------------------------------------------------------------------------------


@pytest.mark.claim(
    "In every race on digits, Euler ends below Heun and Heun below RK4, for an equal number of gradients.",
    chapter="12",
)
@pytest.mark.parametrize("name", ["logistic", "full batch", "batches of 32"])
def test_euler_leads_its_family(name: str) -> None:
    found = race(name)
    euler, heun, rk4, momentum = (found[method]["mean"] for method in ("euler", "heun", "rk4", "momentum"))
    assert momentum < euler < heun < rk4


@pytest.mark.claim(
    "On all images at once, five stages of Chebyshev end below Euler; on batches of 32 they end far above Euler and "
    "Heun.",
    chapter="12",
)
def test_chebyshev_wants_no_noise() -> None:
    for name in ("logistic", "full batch"):
        assert race(name)["chebyshev"]["mean"] < race(name)["euler"]["mean"] / 2
    for name in ("euler", "heun"):
        assert race("batches of 32")["chebyshev"]["mean"] > 3 * race("batches of 32")[name]["mean"]


@pytest.mark.claim(
    "Without L2, logistic regression at h = 8 begins with hλ far above 2, and the loss rises; a hundred steps later hλ "
    "is below 2, and stays there.",
    chapter="12",
)
@pytest.mark.parametrize("h", [8.0, wrong(2.0, why="there the loss falls from the first step")])
def test_logistic_regression_at_a_high_rate(h: float) -> None:
    net, (step, _) = network(0), stepper("euler", h)
    theta, losses, products = net.start(1), [], {}
    for k in range(601):
        losses.append(net(theta)[0])
        if k in (0, 100, 200, 400, 600):
            products[k] = h * net.sharpness(theta)[0]
        theta = step(theta, lambda values: net(values)[1])
    assert products[0] > 4
    assert max(value for k, value in products.items() if k) < 2
    assert losses[1] > losses[0]
    assert losses[600] < losses[100] < losses[0] / 10


@pytest.mark.claim(
    "At every rate that the rule leaves to all three, Euler ends below Heun and Heun below RK4.", chapter="12"
)
def test_the_order_is_the_same_at_every_rate() -> None:
    grids = [dict(race("logistic")[method]["grid"]) for method in ("euler", "heun", "rk4")]
    shared = [h for h in grids[0] if all(grid.get(h) is not None for grid in grids)]
    assert len(shared) > 5
    assert all(grids[0][h] < grids[1][h] < grids[2][h] for h in shared)


def test_an_absurd_rate_separates_the_digits() -> None:
    (entry,) = [entry for entry in record()["races"] if entry["name"] == "logistic"]
    absurd = in_chapter("absurd")
    assert absurd["h"] == entry["absurd"]["h"]
    assert max(entry["absurd"]["finals"]) == pytest.approx(absurd["loss"], rel=0.1)
    assert absurd["loss"] < 1e-4
    assert entry["absurd"]["worst"] > 100


def test_the_live_race_is_that_of_numpy() -> None:
    """The curves of the first figure, from the formulas in NumPy, over the first third of the budget."""
    above, below = figure_data(CHAPTER)[0]
    random = np.random.default_rng(1)
    order = np.concatenate([random.permutation(1440) for _ in range(20)]).reshape(900, 32)
    net, shown = network(32), in_chapter("record")
    for name, method in (("Euler", "euler"), ("Heun", "heun"), ("RK4", "rk4"), ("momentum", "momentum")):
        spent, losses = line(below, name)
        steps_shown, again = line(above, name)
        step, cost = stepper(method, shown[name][2][0])
        np.testing.assert_allclose(steps_shown * cost, spent)
        np.testing.assert_allclose(losses, again)
        np.testing.assert_allclose(spent, np.linspace(0, 900, len(spent)))
        theta = initial_weights()
        expected = [net(theta)[0]]
        for k in range(300 // cost):
            theta = step(theta, lambda values, k=k: net(values, order[k])[1])
            if (k + 1) * cost in spent:
                expected.append(net(theta)[0])
        np.testing.assert_allclose(losses[: len(expected)], expected, rtol=2e-3)
        assert len(expected) > 5


# ---- the bowl -------------------------------------------------------------------------------------------------------


def amplification(method: str, z: Any) -> Any:
    """R(z), written out."""
    taylor = {"euler": 1, "heun": 2, "kutta3": 3, "rk4": 4}
    return sum(z**power / math.factorial(power) for power in range(taylor[method] + 1))


@pytest.mark.claim("Heun needs twice as many gradients as Euler, RK4 nearly three times as many", chapter="12")
def test_the_bowl_by_the_formula() -> None:
    counts = {}
    for method, stages in (("euler", 1), ("heun", 2), ("rk4", 4)):
        h = np.linspace(0.01, 0.03, 4001)
        factor = np.abs(amplification(method, -np.multiply.outer(h, np.geomspace(1, 100, 300)))).max(axis=1).min()
        counts[method] = stages * math.log(1e-6) / math.log(factor)
    assert counts["euler"] == pytest.approx(691, abs=2)
    assert counts["heun"] / counts["euler"] == pytest.approx(2, abs=0.03)
    assert 2.8 < counts["rk4"] / counts["euler"] < 3


def test_the_first_hundredth_of_the_time() -> None:
    """Each method's longest steps on the bowl, and as many dots in each as it has stages."""
    (axes,) = figure_data(CHAPTER)[1]
    for name, longest, steps, cost in (("Euler", 0.02, 7, 1), ("Heun", 0.02, 7, 2), ("RK4", 0.027853, 5, 4)):
        edges, asked = line(axes, name)[0], line(axes, f"{name}, gradients")[0]
        np.testing.assert_allclose(edges, longest * np.arange(steps + 1), atol=1e-5)
        np.testing.assert_array_equal(np.histogram(asked, edges)[0], cost)
        assert edges[-1] == pytest.approx(-math.log(1e-6) / 100, rel=0.02)


@pytest.mark.claim(
    "There is a best damping, 2s²/(κ − 1): with it no other method of $s$ stages shrinks the slowest direction faster.",
    chapter="12",
)
@pytest.mark.parametrize(
    ("stages", "factor"),
    [(2, 2), (5, 2), (10, 2), pytest.param(5, 0.2, marks=pytest.mark.xfail(strict=True, reason="less damping"))],
)
def test_tuned_damping_is_the_best(stages: int, factor: float) -> None:
    """Against the best polynomial of that degree with R(0) = 1, by linear programming and in closed form."""
    from scipy.optimize import linprog

    kappa = 100
    method = gradient_flow.chebyshev(stages, factor * stages**2 / (kappa - 1))
    modes = np.geomspace(1, kappa, 500)
    amplify = gradient_flow.stability_polynomial(method)
    rates = np.linspace(0.9, 1, 400) * gradient_flow.stability_limit(method) / kappa
    found = np.abs(amplify(-np.multiply.outer(rates, modes))).max(axis=1).min()
    expected = 1 / np.cosh(stages * np.arccosh((kappa + 1) / (kappa - 1)))
    assert found == pytest.approx(expected, rel=0.02)
    # R in the basis of Chebyshev's polynomials on the interval, and the bound on |R| there, which is minimised
    table = np.polynomial.chebyshev.chebvander((2 * modes - kappa - 1) / (kappa - 1), stages)
    at_zero = np.polynomial.chebyshev.chebvander(-(kappa + 1) / (kappa - 1), stages)
    best = linprog(
        [0] * (stages + 1) + [1],
        A_ub=np.hstack([np.vstack([table, -table]), -np.ones((1000, 1))]),
        b_ub=np.zeros(1000),
        A_eq=np.append(at_zero, 0)[None],
        b_eq=[1],
        bounds=(None, None),
    )
    assert best.fun == pytest.approx(expected, rel=0.01)


def test_what_ten_gradients_leave() -> None:
    """The figure of the waves, by Euler's factor and by Chebyshev's polynomial."""
    (axes,) = figure_data(CHAPTER)[7]
    curvature, left = line(axes, "ten Euler steps")
    np.testing.assert_allclose(left, np.abs(1 - 2 / 101 * curvature) ** 10, atol=5e-3)
    polynomial = np.polynomial.Chebyshev.basis(10)
    for name, damping in (("Chebyshev, damping 0.05", 0.05), ("Chebyshev, tuned", 2 * 10**2 / 99)):
        curvature, left = line(axes, name)
        start = 1 + damping / 10**2
        argument = start - (start + 1) * curvature / 100  # −1 at the limit
        expected = np.abs(polynomial(argument)) / polynomial(start)
        np.testing.assert_allclose(left[curvature < 90], expected[curvature < 90], atol=0.03)  # then it is steep
        assert left.max() == pytest.approx(1 / polynomial(start), rel=0.01)


# ---- noise and truncation -------------------------------------------------------------------------------------------


def test_noise_and_truncation_at_the_start() -> None:
    """The first points of the curves along the race, with scipy for the exact flow."""
    from scipy.integrate import solve_ivp

    (axes,) = figure_data(CHAPTER)[3]
    theta = initial_weights()
    net, h = network(32), in_chapter("record")["Euler"][2][0]
    exact = solve_ivp(lambda t, values: -net(values)[1], (0, h), theta, rtol=1e-8, atol=1e-10).y[:, -1]
    slope = net(theta)[1]
    assert line(axes, "Euler")[1][0] == pytest.approx(np.linalg.norm(theta - h * slope - exact), rel=1e-3)
    epoch = np.random.default_rng(2).permutation(1440).reshape(45, 32)
    off = [net(theta, rows)[1] - slope for rows in epoch]
    assert line(axes, "noise")[1][0] == pytest.approx(h * np.sqrt(np.mean(np.sum(np.square(off), axis=1))), rel=1e-3)


@pytest.mark.claim(
    "At every point of the race the noise of a batch is larger than Euler's truncation error.", chapter="12"
)
def test_noise_dwarfs_truncation() -> None:
    (axes,) = figure_data(CHAPTER)[3]
    ratio = line(axes, "noise")[1] / line(axes, "Euler")[1]
    assert (ratio > 1.2).all()
    assert np.median(ratio) > 4
    assert (line(axes, "RK4")[1] < line(axes, "Euler")[1]).all()


@functools.cache
def after_240() -> tuple[Network, np.ndarray, np.ndarray]:
    """The network, Euler's weights after 240 gradients of the race, and the 45 batches of an epoch."""
    random = np.random.default_rng(1)
    order = np.concatenate([random.permutation(1440) for _ in range(20)]).reshape(900, 32)
    net, theta = network(32), initial_weights()
    for rows in order[:240]:
        theta = theta - net(theta, rows)[1]
    return net, theta, np.random.default_rng(2).permutation(1440).reshape(45, 32)


def test_where_one_step_ends() -> None:
    """Each dot is what a batch adds to Euler's step: along the step, and along what differs most beside it."""
    (axes,) = figure_data(CHAPTER)[2]
    net, theta, epoch = after_240()
    whole = net(theta)[1]
    off = np.array([whole - net(theta, rows)[1] for rows in epoch])
    step = np.linalg.norm(whole)
    across, along = line(axes, "batches")
    np.testing.assert_allclose(along, -off @ whole / step, atol=1e-5)
    aside = off + np.outer(off @ whole, -whole) / step**2
    assert np.sum(across**2) == pytest.approx(np.linalg.eigvalsh(aside @ aside.T)[-1], rel=1e-4)
    assert line(axes, "start")[1][0] == pytest.approx(-step, rel=1e-4)
    exact = gradient_flow.integrate(lambda values: net(values)[1], theta, 0.05, 20, "rk4")[-1]
    missed = exact - theta + whole
    assert line(axes, "flow")[1][0] == pytest.approx(-missed @ whole / step, rel=1e-3)
    (cell,) = (cell for cell in notebook(CHAPTER).cells if cell.source.startswith("# @title Make one step"))
    shown = [float(word) for word in re.findall(r"0\.\d+|\b\d+(?= times)", cell.outputs[0].text)]
    noise = np.sqrt(np.mean(np.sum(off**2, axis=1)))
    error = np.linalg.norm(missed)
    assert shown == [round(error, 3), round(noise, 3), round(noise / error)]


@pytest.mark.claim("After an epoch less than a tenth of the first miss is left.", chapter="12")
def test_errors_shrink_on_all_images() -> None:
    """The table of misses. After ten steps of the flow, by RK4, nine tenths of the first one are gone already."""
    net, begin, _ = after_240()
    (cell,) = (cell for cell in notebook(CHAPTER).cells if cell.source.startswith("# @title Follow Euler's misses"))
    rows = [[float(cell) for cell in row.split()] for row in cell.outputs[0].data["text/plain"].splitlines()[1:]]

    def flow(values: np.ndarray) -> np.ndarray:
        first = net(values)[1]
        second = net(values - first / 2)[1]
        third = net(values - second / 2)[1]
        return values - (first + 2 * second + 2 * third + net(values - third)[1]) / 6

    euler = once = begin - net(begin)[1]
    exact, found = flow(begin), {}
    for steps in range(1, 11):
        found[steps] = [np.linalg.norm(once - exact), np.linalg.norm(euler - exact)]
        once, exact, euler = flow(once), flow(exact), euler - net(euler)[1]
    assert [row[0] for row in rows] == [1, 2, 5, 45]
    for steps, *shown in rows[:3]:
        assert shown == pytest.approx(found[steps], abs=1e-4)
    assert found[2][1] > found[1][1] > found[5][1]
    assert rows[-1][1] < found[10][0] < found[1][0] / 10


@pytest.mark.claim(
    "On batches, four short steps of Euler keep nearer to the flow than one step of RK4, for the same four gradients.",
    chapter="12",
)
def test_four_batches_are_better_than_four_questions() -> None:
    """The table of an epoch, written out; RK4 by its four slopes."""
    net, begin, _ = after_240()
    (cell,) = (cell for cell in notebook(CHAPTER).cells if cell.source.startswith("# @title One epoch of steps"))
    rows = re.findall(r"(Euler|RK4), h = (\S+) +(\d+) +([\d.]+) +([\d.]+)", cell.outputs[0].data["text/plain"])

    def step(values: np.ndarray, method: str, h: float, part: Any) -> np.ndarray:
        first = net(values, part)[1]
        if method == "Euler":
            return values - h * first
        second = net(values - h / 2 * first, part)[1]
        third = net(values - h / 2 * second, part)[1]
        fourth = net(values - h * third, part)[1]
        return values - h / 6 * (first + 2 * second + 2 * third + fourth)

    def run(method: str, h: float, parts: Any) -> np.ndarray:
        values = begin
        for part in parts:
            values = step(values, method, h, part)
        return values

    flow = run("RK4", 1.0, [slice(None)] * 45)  # off by a millionth, as the table says
    found = []
    for method, h, gradients, on_all, on_batches in rows:
        h = {"1": 1.0, "¼": 0.25}[h]
        count = round(45 / h)
        assert int(gradients) == count * (4 if method == "RK4" else 1)
        if h == 1 and method == "Euler":
            off = np.linalg.norm(run(method, h, [slice(None)] * count) - flow)
            assert float(on_all) == pytest.approx(off, rel=0.25)
        ends = []
        for seed in range(3):
            draw = np.random.default_rng(seed)
            order = np.concatenate([draw.permutation(1440).reshape(45, 32) for _ in range(4)])
            ends.append(np.linalg.norm(run(method, h, order[:count]) - flow))
        found.append(np.sqrt(np.mean(np.square(ends))))
        assert float(on_batches) == pytest.approx(found[-1], abs=0.006)
    euler, rk4, short = found
    assert 2 * short < rk4 < euler / 2
    assert float(rows[0][3]) > 100 * float(rows[1][3])


# ---- the edge of stability ------------------------------------------------------------------------------------------


@pytest.mark.claim(
    "In this network, on the full batch, h times sharpness climbs to each integrator's own stability limit and ends "
    "within two percent of it.",
    chapter="12",
)
@pytest.mark.parametrize("name", ["Euler", "Heun", "Kutta 3", "RK4"])
def test_each_stops_at_its_own_limit(name: str) -> None:
    edge = record()["edge"]
    (curve,) = [each for each in edge["curves"] if each["method"] == NAMES[name]]
    limit = gradient_flow.stability_limit(NAMES[name])
    last = np.array(curve["products"][6000 // edge["every"] :])
    assert len(last) == 81
    np.testing.assert_allclose(last, limit, rtol=0.02)
    assert np.median(last) == pytest.approx(limit, rel=0.01)
    assert curve["losses"][-1] < 0.003
    (axes,) = figure_data(CHAPTER)[4]
    steps, products = line(axes, name)
    np.testing.assert_array_equal(steps, np.arange(0, edge["steps"] + 1, 200))
    np.testing.assert_allclose(products, curve["products"][::4], atol=0.006)
    assert line(axes, f"limit of {name}")[1][0] == pytest.approx(limit, rel=1e-5)


@pytest.mark.claim(
    "In a valley that grows sharper on the way down, h times sharpness swings around each integrator's own limit.",
    chapter="12",
)
@pytest.mark.parametrize("method", ["euler", "heun", "kutta3", "rk4"])
@pytest.mark.parametrize("push", [0.5, wrong(0.0, why="nothing leads back, and it explodes")])
def test_a_valley_stabilises_itself(method: str, push: float) -> None:
    """The loss y x²/2 − 0.002 y, whose second weight is the sharpness."""
    table = gradient_flow.tableau(method)
    limit, h = gradient_flow.stability_limit(method), 0.4
    weights, found = np.array([0.03, 0.99 * limit / h]), []
    with np.errstate(all="ignore"):
        for _ in range(1000):
            found.append(h * weights[1])
            answers: list[np.ndarray] = []
            for row in table.a:
                x, y = weights - h * sum((a * k for a, k in zip(row, answers, strict=False)), np.zeros(2))
                answers.append(np.array([x * y, push * x**2 - 0.002]))
            weights = weights - h * sum(b * k for b, k in zip(table.b, answers, strict=True))
    np.testing.assert_allclose(found, limit, rtol=0.02)
    assert np.mean(found) == pytest.approx(limit, rel=2e-3)
    assert min(found) < limit < max(found)


def test_recorded_sharpness_is_that_of_the_hessian() -> None:
    """The first one, by a Hessian-vector product of TensorFlow's, and by `companion.sharpness`."""
    edge, data = record()["edge"], datasets.digits("float64")
    images, labels = data.x_train[: edge["images"]], data.y_train[: edge["images"]]
    net = Network(edge["hidden"], "squares", images, labels)
    model = keras_network(edge["hidden"], net.start(1))
    variables = model.trainable_variables
    targets = tf.one_hot(labels, 10, dtype="float64")

    @tf.function
    def product(vectors: Any) -> Any:
        with tf.autodiff.ForwardAccumulator([v.value for v in variables], vectors) as forward:
            with tf.GradientTape() as tape:
                loss = tf.reduce_mean((model(images) - targets) ** 2)
            slopes = tape.gradient(loss, variables)
        return [forward.jvp(slope) for slope in slopes]

    random = np.random.default_rng(1)
    vectors = [tf.constant(random.normal(size=variable.shape)) for variable in variables]
    for _ in range(200):
        length = tf.sqrt(sum(tf.reduce_sum(vector**2) for vector in vectors))
        vectors = [vector / length for vector in vectors]
        after = product(vectors)
        value = sum(tf.reduce_sum(a * b) for a, b in zip(vectors, after, strict=True))
        vectors = after
    assert edge["curves"][0]["products"][0] == pytest.approx(edge["h"] * float(value), rel=1e-3)
    model.compile(loss="mse")
    assert companion.sharpness(model, images, targets) == pytest.approx(float(value), rel=1e-3)


def sides(method: str, steps: int) -> np.ndarray:
    """The signs of the gradient along the steepest direction, four steps on end, at the edge."""
    data = datasets.digits("float64")
    net = Network(32, "squares", data.x_train[:200], data.y_train[:200])
    end = gradient_flow.integrate(lambda values: net(values)[1], net.start(1), 0.4, steps, method)[-1]
    sharpness, vector = net.sharpness(end)
    assert 0.4 * sharpness == pytest.approx(gradient_flow.stability_limit(method), rel=0.02)
    path = gradient_flow.integrate(lambda values: net(values)[1], end, 0.4, 3, method)
    slopes = np.array([net(point)[1] @ vector for point in path])
    assert np.abs(slopes).min() > 0.9 * np.abs(slopes).max() > 1e-3
    return np.sign(slopes) * np.sign(slopes[0])


@pytest.mark.claim(
    "At its limit Euler throws the weights from wall to wall of the valley; Heun leaves them hanging on one wall.",
    chapter="12",
)
@pytest.mark.parametrize(
    ("method", "expected"),
    [
        ("euler", [1, -1, 1, -1]),
        ("heun", [1, 1, 1, 1]),
        pytest.param("heun", [1, -1, 1, -1], marks=pytest.mark.xfail(strict=True, reason="it stays on one side")),
    ],
)
def test_side_of_the_valley_at_the_edge(method: str, expected: list[int]) -> None:
    np.testing.assert_array_equal(sides(method, 3500), expected)


@pytest.mark.parametrize(("name", "side"), [("Euler", -1), ("Heun", 1), ("Kutta 3", -1), ("RK4", 1)])
def test_slopes_at_the_end_are_the_record(name: str, side: int) -> None:
    (curve,) = [each for each in record()["edge"]["curves"] if each["method"] == NAMES[name]]
    shown = np.array(in_chapter("slopes")[name])
    np.testing.assert_allclose(shown, curve["slopes"][:4], atol=6e-5)
    np.testing.assert_array_equal(np.sign(shown[1:]), side * np.sign(shown[:-1]))
    z = -gradient_flow.stability_limit(NAMES[name])
    assert amplification(NAMES[name], z) == pytest.approx(side, abs=1e-6)


def test_four_steps_across_the_valley() -> None:
    """A slope is λ times the distance, and the height λ/2 times its square; the record has hλ to two digits."""
    for axes, name in zip(figure_data(CHAPTER)[6], ("Euler", "Heun"), strict=True):
        (curve,) = [each for each in record()["edge"]["curves"] if each["method"] == NAMES[name]]
        sharpness = curve["products"][-1] / record()["edge"]["h"]
        distance = np.array(curve["slopes"][:4]) / sharpness
        found = line(axes, name)
        np.testing.assert_allclose(found[0], 1e3 * distance, rtol=5e-3)
        np.testing.assert_allclose(found[1], 1e3 * sharpness * distance**2 / 2, rtol=1e-2)


# ---- games ----------------------------------------------------------------------------------------------------------


def closed_form(method: str, h: float, steps: int) -> np.ndarray:
    """The players as one complex number, a + ib, which each step multiplies by R(ih)."""
    z = 1j * h
    factor = {"euler": 1 + z, "heun": 1 + z + z**2 / 2, "extragradient": 1 + z + z**2}[method]
    points = (1 + 1j) * factor ** np.arange(steps + 1)
    return np.stack([points.real, points.imag])


def test_paths_of_the_game() -> None:
    panels = figure_data(CHAPTER)[5]
    for axes, method, cost in zip(panels, ("euler", "heun", "extragradient"), (1, 2, 2), strict=False):
        name = {"euler": "Euler", "heun": "Heun"}.get(method, method)
        expected = closed_form(method, 0.1, 1000 // cost)
        found = np.stack(line(axes, name))
        np.testing.assert_allclose(found, expected[:, : found.shape[1]], atol=1e-4)
    root = np.roots([1, -(1 + 2j * 0.1), 1j * 0.1])
    a, b = np.linalg.solve([[1, 1], root], [1 + 1j, (1 + 1j) * (1 + 0.1j)])
    points = a * root[0] ** np.arange(1001) + b * root[1] ** np.arange(1001)
    np.testing.assert_allclose(np.stack(line(panels[3], "optimistic")), [points.real, points.imag], atol=1e-4)


@pytest.mark.claim(
    "On a pure rotation, whatever the learning rate, Euler spirals out and Heun does not arrive.",
    chapter="12",
)
@pytest.mark.parametrize("method", ["euler", "heun", wrong("extragradient", why="it arrives")])
def test_rotation_grows(method: str) -> None:
    for h in (1e-3, 0.01, 0.1, 0.5, 1.0, 2.0):
        factor = abs(gradient_flow.stability_polynomial(method)(1j * h))
        expected = {"euler": math.sqrt(1 + h**2), "heun": math.sqrt(1 + h**4 / 4)}.get(method, factor)
        assert factor == pytest.approx(expected, rel=1e-12)
        assert factor > 1
        assert gradient_flow.stability_limit(method, "imaginary") == 0


@pytest.mark.claim(
    "At its best rate RK4 arrives, too, faster than extragradient: by a step so long that it misses the circle.",
    chapter="12",
)
def test_rotation_at_the_best_rate() -> None:
    (cell,) = [cell for cell in notebook(CHAPTER).cells if cell.source.startswith("# @title Each at its best rate")]
    rows = [line.split() for line in cell.outputs[0]["data"]["text/plain"].splitlines()[1:]]
    shown = {(name, h): float(share) for name, h, share in (row for row in rows if row[1] != "–")}
    squared = {  # of the distance from the solution, by hand, where the derivative by h is zero
        ("extragradient", "0.71"): (1 - 0.5 + 0.25) ** 2,
        ("RK4", "2.45"): 1 - 6**3 / 72 + 6**4 / 576,
        ("optimistic", "0.50"): abs((1 - 1j) / 2) ** 8,  # both roots of r² − (1 + 2ih) r + ih
    }
    for row, value in squared.items():
        assert shown[row] == pytest.approx(math.sqrt(value), abs=0.006)
    assert shown[("RK4", "2.45")] < shown[("extragradient", "0.71")]
    z = 1j * math.sqrt(6)
    end = 1 + z + z**2 / 2 + z**3 / 6 + z**4 / 24
    assert abs(end - np.exp(z)) > 0.5


@pytest.mark.parametrize(
    "make", [lambda: companion.RungeKutta(0.1, "extragradient"), lambda: companion.OptimisticSGD(0.1)]
)
@pytest.mark.claim("Extragradient and optimistic steps arrive at the solution of the game.", chapter="12")
def test_who_arrives(make: Any) -> None:
    class Game(keras.layers.Layer):
        def build(self, shape: Any) -> None:
            self.players = self.add_weight(shape=(2,), initializer="ones", dtype="float64")

        def call(self, inputs: Any) -> Any:
            a, b = self.players[0], self.players[1]
            return inputs * a * (2 * keras.ops.stop_gradient(b) - b)

    model = keras.Sequential([keras.Input((1,), dtype="float64"), Game(dtype="float64")])
    optimizer = make()
    model.compile(optimizer, lambda y, product: keras.ops.mean(product), steps_per_execution=600)
    if isinstance(optimizer, companion.InjectedOptimizer):
        optimizer.inject(model)
    batches = tf.data.Dataset.from_tensors((np.ones((1, 1)),) * 2).repeat()
    model.fit(batches, steps_per_epoch=600, shuffle=False, verbose=0)
    assert np.linalg.norm(model.get_weights()[0]) < 0.1


# ---- the claim of 2025 ----------------------------------------------------------------------------------------------


def accuracy(name: str) -> np.ndarray:
    """Test accuracies in per cent at the best rate on batches of 8, one for each split."""
    (found,) = [entry for entry in record()["claim"] if entry["batch"] == 8]
    (row,) = [row for row in found["rows"] if row["name"] == name]
    return 100 * np.array(max((rate["accuracies"] for rate in row["grid"]), key=np.mean))


@pytest.mark.claim(
    "At batches of 8 and the same number of steps, RK4 is right on more test images than Adam on average, and in "
    "three splits of five.",
    chapter="12",
)
def test_runge_kutta_against_adam() -> None:
    rk4, adam = accuracy("rk4, per step"), accuracy("adam")
    assert rk4.mean() > adam.mean()
    assert (rk4 > adam).sum() == 3
    assert accuracy("euler").mean() == pytest.approx(rk4.mean(), abs=0.1)
    shown = in_chapter("claim")
    for row, key in (
        (("RK4", "1", "4"), "rk4, per step"), (("RK4", "1/4", "1"), "rk4, per gradient"),
        (("Adam", "1", "1"), "adam"), (("Adam", "4", "4"), "adam, four times the steps"),
        (("Euler", "1", "1"), "euler"), (("momentum", "1", "1"), "momentum"),
    ):  # fmt: skip
        assert shown.pop(row) == pytest.approx((accuracy(key).mean(), accuracy(key).std(ddof=1)), abs=0.006)
    assert not shown


@pytest.mark.claim("With as many gradients as RK4, Adam is right on more test images in all five splits.", chapter="12")
def test_adam_with_as_many_gradients() -> None:
    assert (accuracy("rk4, per step") < accuracy("adam, four times the steps")).all()
