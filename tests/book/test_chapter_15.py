"""Chapter 15: the data under its figures against NumPy and the records, and the tests that hold its sentences."""

import functools
import itertools
import json
import pathlib
import re
from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf
from scipy.optimize import least_squares

import companion
from tests.book.reading import figure_data, line, notebook
from tests.kit import ROOT
from tests.kit.cases import wrong
from tests.kit.network import Digits, Values, loss_and_gradient
from tests.kit.teams import result, slope

CHAPTER = "15"


def record(name: str) -> dict[str, Any]:
    return json.loads((ROOT / "book" / "data" / f"{name}.json").read_text())


def names_of(beginning: str) -> dict[str, Any]:
    """What the cell of that title defines."""
    (cell,) = (cell for cell in notebook(CHAPTER).cells if cell.source.startswith(f"# @title {beginning}"))
    names: dict[str, Any] = {"np": np, "print": lambda *_: None}
    exec(cell.source, names)
    return names


# ---- figure 1: two lanes --------------------------------------------------------------------------------------------


def test_lanes_and_their_averages() -> None:
    """The distance from a minimum halves with each step; bowls of one shape meet where one process would be."""
    (axes,) = figure_data(CHAPTER)[0]
    middles = 2 - 2 / 8.0 ** np.arange(4)
    for number, begin in enumerate(middles[:3]):
        for worker, minimum in enumerate((8, -4)):
            steps, weight = line(axes, f"worker {worker}, round {number}")
            np.testing.assert_array_equal(steps, 3 * number + np.arange(4))
            np.testing.assert_allclose(weight, minimum + (begin - minimum) / 2.0 ** np.arange(4), atol=1e-5)
    np.testing.assert_allclose(line(axes, "averages"), [np.arange(0, 10, 3), middles], atol=1e-5)
    np.testing.assert_allclose(line(axes, "merged")[1], 2 - 2 / 2.0 ** np.arange(10), atol=1e-5)


# ---- figure 2: local SGD on digits, written out in float64 ----------------------------------------------------------


@functools.cache
def digits() -> tuple[np.ndarray, np.ndarray, Values]:
    """Images, labels and the initial weights, which Keras draws."""
    net = Digits()
    return net.x, net.y, net.weights


@functools.cache
def local_sgd(
    every: int, own_digits: bool = False, warmup: int = 0, outer: bool = False, epochs: int = 5
) -> list[float]:
    """The loss on all images at the beginning and after each epoch of two workers."""
    x, y, initial = digits()
    rows = [np.arange(r, 1440, 2) for r in (0, 1)]
    if own_digits:
        by_label = np.argsort(y, kind="stable")
        rows = [np.sort(by_label[:720]), np.sort(by_label[720:])]
    workers, anchor, velocity = [initial, initial], initial, [0 * w for w in initial]
    losses = [loss_and_gradient(initial, x, y)[0]]
    for step in range(1, 20 * epochs + 1):
        begin = (step - 1) % 20 * 36
        for r in (0, 1):
            batch = rows[r][begin : begin + 36]
            gradient = loss_and_gradient(workers[r], x[batch], y[batch])[1]
            workers[r] = [w - 0.5 * g for w, g in zip(workers[r], gradient, strict=True)]
        if step <= warmup or (step - warmup) % every == 0:
            mean = [(a + b) / 2 for a, b in zip(*workers, strict=True)]
            if outer:
                delta = [a - m for a, m in zip(anchor, mean, strict=True)]
                velocity = [0.9 * v - 0.7 * d for v, d in zip(velocity, delta, strict=True)]
                mean = [a + 0.9 * v - 0.7 * d for a, v, d in zip(anchor, velocity, delta, strict=True)]
            anchor, workers = mean, [mean, mean]
        if step % 20 == 0:
            losses.append(loss_and_gradient(workers[0], x, y)[0])
    return losses


@pytest.mark.parametrize("every", [1, 5, 20])
def test_loss_against_rounds_and_steps(every: int) -> None:
    upper, lower = figure_data(CHAPTER)[1]
    rounds, losses = line(upper, f"k={every}")
    np.testing.assert_array_equal(rounds, np.arange(1, 6) * 20 // every)
    np.testing.assert_allclose(losses, local_sgd(every)[1:], rtol=1e-4)
    steps, losses = line(lower, f"k={every}")
    np.testing.assert_array_equal(steps, np.arange(0, 101, 20))
    np.testing.assert_allclose(losses, local_sgd(every), rtol=1e-4)


@pytest.mark.parametrize("every", [5, 20])
def test_loss_where_workers_have_digits_of_their_own(every: int) -> None:
    _, lower = figure_data(CHAPTER)[1]
    np.testing.assert_allclose(line(lower, f"own k={every}")[1], local_sgd(every, own_digits=True), rtol=1e-4)


def table(title: str) -> list[list[str]]:
    """The rows of the table that the cell of that title shows."""
    (cell,) = (cell for cell in notebook(CHAPTER).cells if cell.source.startswith(f"# @title {title}"))
    (text,) = (output.data["text/plain"] for output in cell.outputs if "data" in output)
    return [re.split(r"  +", row.strip()) for row in text.splitlines()[1:]]


def momentum(rate: float) -> float:
    """The loss after 100 steps with momentum on the joint batches."""
    x, y, weights = digits()
    velocity = [0 * w for w in weights]
    for step in range(100):
        batch = slice(step % 20 * 72, step % 20 * 72 + 72)
        gradient = loss_and_gradient(weights, x[batch], y[batch])[1]
        velocity = [0.9 * v - rate * g for v, g in zip(velocity, gradient, strict=True)]
        weights = [w + v for w, v in zip(weights, velocity, strict=True)]
    return loss_and_gradient(weights, x, y)[0]


def test_table_of_remedies() -> None:
    rows = {run: (int(exchanges), float(loss)) for run, exchanges, loss in table("The loss after 100 steps, with")}
    expected = {
        "own digits, k = 20": (5, local_sgd(20, own_digits=True)),
        "own digits, k = 20, warm-up": (24, local_sgd(20, own_digits=True, warmup=20)),
        "own digits, k = 5": (20, local_sgd(5, own_digits=True)),
        "mixed, k = 20": (5, local_sgd(20)),
        "mixed, k = 20, outer momentum": (5, local_sgd(20, outer=True)),
        "mixed, k = 1, momentum, h = 0.1": (100, [momentum(0.1)]),
        "mixed, k = 1, momentum, h = 0.5": (100, [momentum(0.5)]),
    }
    assert rows == {name: (count, round(losses[-1], 3)) for name, (count, losses) in expected.items()}


@pytest.mark.claim(
    "Where every worker has digits of its own, k = 20 ends at almost twice the loss of k = 1.", chapter="15"
)
@pytest.mark.parametrize("own_digits", [True, wrong(False, why="fair samples")])
def test_price_of_own_digits(own_digits: bool) -> None:
    ratio = local_sgd(20, own_digits)[-1] / local_sgd(1, own_digits)[-1]
    assert 1.8 < ratio < 2


@pytest.mark.claim("after twice as many steps the loss of own digits with k = 20 is lower by a third.", chapter="15")
def test_own_digits_are_slow_and_go_on() -> None:
    losses = local_sgd(20, own_digits=True, epochs=10)
    assert losses[10] < 2 / 3 * losses[5]


@pytest.mark.claim("On mixed digits, twenty times fewer exchanges raise the loss by one percent.", chapter="15")
@pytest.mark.parametrize("own_digits", [False, wrong(True, why="workers differ")])
def test_price_with_fair_samples(own_digits: bool) -> None:
    assert round(local_sgd(20, own_digits)[-1] / local_sgd(1, own_digits)[-1], 2) == 1.01


@pytest.mark.claim("It needs 24 exchanges; 20 that are spread evenly (k = 5) end lower.", chapter="15")
def test_warm_up_against_even_exchanges() -> None:
    assert local_sgd(5, own_digits=True)[-1] < local_sgd(20, own_digits=True, warmup=20)[-1]


# ---- figure 3: two bowls --------------------------------------------------------------------------------------------

MINIMA = np.array([[-1.0, -0.5], [1.0, 1.0]])
CURVATURES = np.array([[1.0, 0.1], [0.1, 1.0]])  # each worker's, along both axes
LOWEST = (CURVATURES * MINIMA).sum(0) / CURVATURES.sum(0)  # of the mean loss


def rest(k: int, h: float, curvatures: np.ndarray = CURVATURES) -> np.ndarray:
    """Where θ = mean over r of c + (1 − hλ)^k (θ − c)."""
    pull = 1 - (1 - h * curvatures) ** k
    return (pull * MINIMA).sum(0) / pull.sum(0)


def test_forks_and_resting_places() -> None:
    (axes,) = figure_data(CHAPTER)[2]
    theta = np.array([1.2, -0.7])
    for number in range(9):
        factors = (1 - 0.1 * CURVATURES[:, None]) ** np.arange(21)[:, None]
        paths = MINIMA[:, None] + factors * (theta - MINIMA)[:, None]
        for worker in (0, 1):
            drawn = np.transpose(line(axes, f"worker {worker}, round {number}"))
            np.testing.assert_allclose(drawn, paths[worker], atol=1e-5)
        theta = paths[:, -1].mean(0)
    expected = [rest(k, 0.1) for k in (1, 2, 3, 5, 10, 20, 40, 100, 400)]
    np.testing.assert_allclose(np.transpose(line(axes, "rest")), expected, atol=1e-5)
    for minimum, colour in zip(MINIMA, ("heun", "rk4"), strict=True):
        np.testing.assert_allclose(np.ravel(line(axes, f"minimum {colour}")), minimum)


@pytest.mark.claim(
    "Where the workers' losses differ in steepness as well as in place, weights averaged every k steps come to rest "
    "beside the minimum of the mean loss. For k = 1 the resting place is that minimum.",
    chapter="15",
)
@pytest.mark.parametrize(
    ("k", "curvatures"),
    [
        (2, CURVATURES),
        (5, CURVATURES),
        (20, CURVATURES),
        (100, CURVATURES),
        wrong(1, CURVATURES, why="the minimum itself"),
        wrong(20, CURVATURES[[0, 0]], why="equal bowls do no harm"),
    ],
)
def test_rest_beside_the_minimum(k: int, curvatures: np.ndarray) -> None:
    """Averaging gradients would end at the minimum; averaging weights after k steps does not."""
    theta, lowest = np.zeros(2), (curvatures * MINIMA).sum(0) / curvatures.sum(0)
    for _ in range(3000):
        workers = np.array([theta, theta])
        for _ in range(k):
            workers = workers - 0.1 * curvatures * (workers - MINIMA)
        theta = workers.mean(0)
    np.testing.assert_allclose(theta, rest(k, 0.1, curvatures), atol=1e-9)
    assert np.linalg.norm(theta - lowest) > 1e-3


@pytest.mark.claim("While hλk is small, a tenth of the rate gives about a tenth of the drift.", chapter="15")
@pytest.mark.parametrize(
    ("k", "largest", "steepness"),
    [
        (2, 0.01, 1),
        (5, 0.01, 1),
        (20, 0.001, 1),
        (5, 0.01 / 16, 16),
        wrong(100, 0.1, 1, why="hλk is 10"),
        wrong(20, 0.001, 100, why="hk is 0.02, but hλk is 2"),
    ],
)
def test_distance_of_first_order(k: int, largest: float, steepness: int) -> None:
    rates = largest / 2.0 ** np.arange(4)
    distances = [np.linalg.norm(rest(k, h, steepness * CURVATURES) - LOWEST) for h in rates]
    assert abs(np.polyfit(np.log(rates), np.log(distances), 1)[0] - 1) < 0.02


@pytest.mark.claim("while hλk is small, the drift is in proportion to h (k − 1).", chapter="15")
@pytest.mark.parametrize("power", [1, wrong(2, why="with its square")])
def test_distance_grows_with_the_steps_beyond_one(power: int) -> None:
    steps = np.array([2, 3, 5, 9])
    distances = [np.linalg.norm(rest(k, 1e-4) - LOWEST) for k in steps]
    assert np.ptp(np.log(distances / (steps - 1.0) ** power)) < 0.01


@pytest.mark.claim("an outer optimizer rests where Δ is zero: in the same place as the plain average.", chapter="15")
@pytest.mark.parametrize("k", [5, 20])
def test_outer_optimizer_rests_there_too(k: int) -> None:
    """Keras's own SGD with Nesterov momentum, on Δ in closed form."""
    theta, outer = keras.Variable(np.zeros(2), dtype="float64"), keras.optimizers.SGD(0.7, 0.9, nesterov=True)
    outer.build([theta])
    for _ in range(1500):
        values = theta.numpy()
        mean = (MINIMA + (1 - 0.1 * CURVATURES) ** k * (values - MINIMA)).mean(0)
        outer.apply([tf.constant(values - mean)], [theta])
    np.testing.assert_allclose(theta.numpy(), rest(k, 0.1), atol=1e-9)


# ---- figure 7: the killed run ---------------------------------------------------------------------------------------


def test_time_line_is_the_record() -> None:
    names = names_of("Recorded: the times of a killed run")
    recorded = record("killed_run")["launches"]
    (axes,) = figure_data(CHAPTER)[6]
    for number, (launch, (started, ended, *workers)) in enumerate(zip(recorded, names["launches"], strict=True)):
        assert (launch["started"], launch["ended"]) == (started, ended)
        for rank, (events, (connected, epochs, exchanges)) in enumerate(zip(launch["workers"], workers, strict=True)):
            assert events["connected"] == [connected]
            assert events["begin"] == [[epoch, begin] for epoch, begin, _, _ in epochs]
            assert events["backup"] == [[epoch, end] for epoch, _, end, finished in epochs if finished]
            assert events["exchange"] == exchanges
            for _, _, end, finished in epochs:
                if not finished:
                    assert end == (events["killed"] or [launch["ended"]])[0]
            bars = [entry for entry in axes["lines"] if entry["label"] == f"launch {number} worker {rank}"]
            spans = [[started, connected], *([begin, end] for _, begin, end, _ in epochs)]
            np.testing.assert_allclose([bar["x"] for bar in bars], spans, rtol=1e-5)
            np.testing.assert_allclose(line(axes, f"exchanges {number} {rank}")[0], exchanges, rtol=1e-5)
    assert recorded[0]["workers"][1]["killed"] == [names["killed"]]
    np.testing.assert_allclose(line(axes, "killed")[0], names["killed"], rtol=1e-5)
    *_, before, last = recorded[0]["workers"][0]["exchange"]
    due, ended = line(axes, "waits")[0]
    np.testing.assert_allclose([due - last, ended], [last - before, recorded[0]["ended"]], rtol=1e-4)
    assert names["killed"] < due < ended


def test_record_says_what_the_text_makes_of_it() -> None:
    """Killed in its third epoch, after nine exchanges; made again from the backups of the second."""
    recorded = record("killed_run")
    first, second = (launch["workers"] for launch in recorded["launches"])
    for events in first:
        assert [epoch for epoch, _ in events["backup"]] == [1, 2]
        assert len(events["exchange"]) == recorded["last_step"] // recorded["every"] == 9
    for events in second:
        assert [epoch for epoch, _ in events["begin"]] == [3, 4]
        assert len(events["exchange"]) == 8
    launches = recorded["launches"]
    starting = launches[1]["workers"][0]["connected"][0] - launches[1]["started"]
    assert starting > first[1]["killed"][0] - first[1]["begin"][-1][1]


# ---- figures 4 to 6: what an exchange costs, and how it goes around -------------------------------------------------


def measured() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Workers, bytes and milliseconds of the record."""
    recorded = record("exchange_times")
    rows = [
        (int(workers), 4 * size, time)
        for workers, times in recorded["milliseconds"].items()
        for size, time in zip(recorded["sizes"], times, strict=True)
    ]
    workers, size, time = np.array(rows, "float64").T
    return workers, size, time


def test_times_are_the_record_and_the_fit_is_the_fit() -> None:
    names = names_of("Recorded: exchange times")
    recorded = record("exchange_times")
    assert names["sizes"] == recorded["sizes"]
    assert {str(workers): times for workers, times in names["milliseconds"].items()} == recorded["milliseconds"]
    workers, size, time = measured()

    def off(logs: np.ndarray) -> np.ndarray:
        latency, per_byte = np.exp(logs)
        return 2 * (workers - 1) * (latency + per_byte * size / workers) / time - 1

    latency, per_byte = np.exp(least_squares(off, np.log([5, 1e-5]), xtol=1e-14, ftol=1e-14).x)
    assert names["latency"] == pytest.approx(latency, rel=1e-4)
    assert names["per_byte"] == pytest.approx(per_byte, rel=1e-4)


def test_figure_of_seconds_is_the_formula() -> None:
    (axes,) = figure_data(CHAPTER)[5]
    for name, k, latency, bandwidth in [
        ("slow", 1, 1e-2, 1e9 / 8),
        ("slow", 20, 1e-2, 1e9 / 8),
        ("slow", 500, 1e-2, 1e9 / 8),
        ("fast", 1, 2e-5, 200e9 / 8),
    ]:
        count, y = line(axes, f"{name} k={k}")
        ring = 2 * (count - 1) * latency + 2 * (count - 1) / count * 4e8 / bandwidth
        np.testing.assert_allclose(y, 0.5 + ring / k, rtol=1e-4)


@pytest.mark.parametrize(("k", "made"), [(1, 10), (20, 58), (65, 65), wrong(20, 60, why="three whole rounds")])
def test_figure_of_waiting(k: int, made: int) -> None:
    """Rounds of k steps of half a second and an exchange of 3.22 s, cut off after the first of 65 steps."""
    begins, last = np.arange(0, 35.71, k / 2 + 3.22), 35.72
    work = np.transpose([begins, np.minimum(begins + k / 2, last)])
    waits = np.transpose([work[:, 1], [*begins[1:], last]])
    (axes,) = figure_data(CHAPTER)[3]
    for label, expected in {"steps": work, "waits": waits}.items():
        drawn = [entry["x"] for entry in axes["lines"] if entry["label"] == f"k={k} {label}"]
        np.testing.assert_allclose(drawn, expected, rtol=1e-4)
    assert (np.ptp(work, axis=1) * 2 + 1e-6).astype(int).sum() == made
    (drawing,) = (cell.outputs[0].data for cell in notebook(CHAPTER).cells if "Draw the waiting" in cell.source)
    assert f"k = {k}: {made} steps made" in drawing["image/svg+xml"]


def test_least_k_by_the_formula() -> None:
    """A tenth of a step of half a second, for 400 megabytes on either network."""
    for row in table("Up to a thousand workers"):
        count = int(row[0].replace(",", ""))
        for column, (latency, bandwidth) in enumerate([(2e-5, 200e9 / 8), (1e-2, 1e9 / 8)], 1):
            seconds = 2 * (count - 1) * (latency + 4e8 / count / bandwidth)
            assert float(row[column]) == round(seconds, 2)
            assert int(row[column + 2]) == max(1, -(-seconds // 0.05))


def test_record_of_times_says_what_the_text_makes_of_it() -> None:
    """Two constants describe it; up to ten thousand weights the latency is almost the whole price."""
    names = names_of("Recorded: exchange times")
    two, three = names["off"]
    assert np.abs(names["off"]).max() < 1 / 6
    assert (three < 0).all()
    assert (two > 0).mean() > 0.5
    for times in names["milliseconds"].values():
        assert times[names["sizes"].index(10_000)] < 1.6 * times[0]
        assert times[-1] > 3 * times[0]


def test_picture_of_the_ring() -> None:
    """Two turns add up and two spread; in each, three pieces arrive, and what a worker ends with is complete."""
    moments = []
    for axes in figure_data(CHAPTER)[4]:
        counts = np.zeros((3, 3), int)
        for shares, points in enumerate(axes["points"], 1):
            for piece, worker in points:
                counts[int(worker), int(piece)] = shares
        moments.append(counts)
        arrived = {(round(np.mean(e["y"][:4])), round(np.mean(e["x"][:4]))) for e in axes.get("lines", [])}
        if len(moments) > 1:
            before, now = moments[-2:]
            assert arrived == {tuple(place) for place in np.argwhere(now != before)}
            assert sorted(worker for worker, _ in arrived) == [0, 1, 2]
            for worker, piece in arrived:
                sent = before[(worker - 1) % 3, piece]
                assert now[worker, piece] == sent + (len(moments) <= 3) * before[worker, piece]
    np.testing.assert_array_equal(moments[0], 1)
    assert (np.sort(moments[2], axis=None)[-3:] == 3).all()
    np.testing.assert_array_equal(moments[4], 3)


@pytest.mark.claim("However many the workers, each sends less than 2n bytes.", chapter="15")
@pytest.mark.parametrize("workers", [2, 3, 7, 40])
@pytest.mark.parametrize("way", ["ring", wrong("everyone to everyone", why="(R − 1) n bytes")])
def test_ring(workers: int, way: str) -> None:
    """A ring, message by message: who holds which sum, and what each has sent."""
    pieces = np.random.default_rng(0).normal(size=(workers, workers, 5))  # worker, piece, numbers
    expected, sent, turns = pieces.sum(0), np.zeros(workers), 0
    if way == "ring":
        for phase, turn in itertools.product(("sum", "spread"), range(workers - 1)):
            shift = 0 if phase == "sum" else 1
            messages = {r: pieces[r, (r - turn + shift) % workers].copy() for r in range(workers)}
            for r, message in messages.items():
                to, piece = (r + 1) % workers, (r - turn + shift) % workers
                pieces[to, piece] = message + (pieces[to, piece] if phase == "sum" else 0)
                sent[r] += message.size
            turns += 1
        assert turns == 2 * (workers - 1)
    else:
        sent += (workers - 1) * expected.size + (workers == 2) * expected.size
        pieces[:] = expected
    np.testing.assert_allclose(pieces, np.broadcast_to(expected, pieces.shape), rtol=1e-12)
    assert (sent < 2 * expected.size).all()


# ---- sentences: what workers do, in the processes of tests/test_local_sgd.py ----------------------------------------


@pytest.mark.claim("Exchanges and bytes are divided by k, exchanges rounded up.", chapter="15")
@pytest.mark.parametrize("k", [1, 5, 20, 30])
def test_exchanges_and_bytes(k: int) -> None:
    model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(4)])
    model.compile("sgd", "mse")
    local = companion.LocalSGD(k)
    model.fit(np.ones((100, 3)), np.ones((100, 4)), batch_size=1, verbose=0, callbacks=[local])
    assert local.exchanges == -(-100 // k)
    assert local.bytes == local.exchanges * 16 * 4
    rows = {int(row[0]): row for row in table("What the workers sent")}
    if 100 % k == 0:
        assert rows[k][1:3] == [str(100 // k), f"{100 // k * 2410 * 4:,}"]


@pytest.mark.claim("after an exchange all workers hold the same weights, to the last bit.", chapter="15")
@pytest.mark.parametrize("name", ["every step", "every third", wrong("every seventh", why="off an exchange")])
def test_the_same_weights_after_an_exchange(name: str) -> None:
    mine, other = result(name)
    np.testing.assert_array_equal(mine["seen"][-1], other["seen"][-1])


def synchronous(begin: np.ndarray, momentum: float) -> tuple[np.ndarray, np.ndarray]:
    """Gradient descent on the joint batches of the two workers: the weights and the velocity at the end."""
    generator = np.random.default_rng(0)
    x = generator.normal(size=(120, 4))
    y = x @ generator.normal(size=(4, 2)) + generator.normal(size=(120, 2))
    theta, velocity = begin, np.zeros(10)
    for _ in range(2):
        for rows in np.arange(120).reshape(-1, 10):
            velocity = momentum * velocity - 0.05 * slope(theta, x[rows], y[rows])
            theta = theta + velocity
    return theta, velocity


@pytest.mark.claim("With k = 1, local SGD is synchronous SGD, with momentum or without.", chapter="15")
@pytest.mark.parametrize(
    ("name", "momentum"),
    [("every step", 0.0), ("every step, momentum", 0.75), wrong("every third", 0.0, why="k = 3")],
)
def test_every_step_is_synchronous(name: str, momentum: float) -> None:
    for mine in result(name):
        np.testing.assert_allclose(mine["weights"], synchronous(mine["before"] * 0 + begin(name), momentum)[0], 1e-10)


def begin(name: str) -> np.ndarray:
    """All begin with the weights of worker 0."""
    return result(name)[0]["before"]


@pytest.mark.claim(
    "the average of the workers' velocities is the velocity that one process with the joint batch would have",
    chapter="15",
)
@pytest.mark.parametrize("who", ["average", wrong("worker 0", why="its own velocity")])
def test_average_of_velocities(who: str) -> None:
    velocities = np.array([mine["slots"] for mine in result("every step, momentum")])
    found = velocities.mean(0) if who == "average" else velocities[0]
    np.testing.assert_allclose(found, synchronous(begin("every step, momentum"), 0.75)[1], rtol=1e-10, atol=1e-15)


@pytest.mark.claim("Averaging weights is not averaging gradients for Adam.", chapter="15")
@pytest.mark.parametrize(
    "optimizer",
    [
        keras.optimizers.Adam,
        keras.optimizers.RMSprop,
        wrong(lambda rate: keras.optimizers.SGD(rate, 0.9), why="linear"),
    ],
)
def test_adam_is_not_linear(optimizer: Any) -> None:
    """Two workers, one process: each with its own optimizer, averaged after each step, against the mean gradient."""
    gradients = np.random.default_rng(0).normal(size=(5, 2, 3))
    apart = [(keras.Variable(np.zeros(3), dtype="float64"), optimizer(0.01)) for _ in range(2)]
    joint, joint_optimizer = keras.Variable(np.zeros(3), dtype="float64"), optimizer(0.01)
    for of_workers in gradients:
        for gradient, (variable, own) in zip(of_workers, apart, strict=True):
            own.apply([tf.constant(gradient)], [variable])
        mean = np.mean([variable.numpy() for variable, _ in apart], axis=0)
        for variable, _ in apart:
            variable.assign(mean)
        joint_optimizer.apply([tf.constant(of_workers.mean(0))], [joint])
    assert np.abs(joint.numpy() - mean).max() > 1e-3


@pytest.mark.claim("its moments stay with each worker.", chapter="15")
@pytest.mark.parametrize("name", ["every fourth, momentum", wrong("slots", why="average_slots=True")])
def test_slots_stay(name: str) -> None:
    mine, other = result(name)
    assert np.abs(mine["slots"] - other["slots"]).max() > 1e-3


@pytest.mark.claim(
    "The mean of two variances is not the variance of both workers' data together.",
    chapter="15",
)
def test_mean_of_variances() -> None:
    first, other = np.random.default_rng(0).normal([[0.0], [2.0]], size=(2, 500))
    together = np.var([first, other])
    between = np.var([first.mean(), other.mean()])
    assert together - np.mean([first.var(), other.var()]) == pytest.approx(between)
    assert between > 0.5


@pytest.mark.claim(
    "Every worker must make the same number of steps; else the callback raises an error on all, before the first step.",
    chapter="15",
)
def test_uneven_steps() -> None:
    for mine in result("uneven steps"):
        assert "ValueError: All workers must have the same `steps`" in mine["error"]
        assert mine["iterations"] == 0
        np.testing.assert_array_equal(mine["weights"], mine["before"])


@pytest.mark.claim(
    "If `EarlyStopping` ends training on one worker alone, the others' next exchange raises an error.", chapter="15"
)
@pytest.mark.parametrize("name", ["stopped early", wrong("every third", why="nobody stops")])
def test_one_stops_early(name: str) -> None:
    for mine in result(name):
        assert mine["error"].startswith("RuntimeError")


@pytest.mark.claim("Then all evaluate the same weights", chapter="15")
@pytest.mark.parametrize("name", ["stopped together", wrong("validated apart", why="12 steps are no multiple of 7")])
def test_stopped_together(name: str) -> None:
    mine, other = result(name)
    assert mine["error"] == other["error"] == ""
    assert mine["iterations"] == other["iterations"] == 24
    np.testing.assert_array_equal(mine["validation"], other["validation"])


# ---- sentences: the killed run --------------------------------------------------------------------------------------


class CutOff(keras.callbacks.Callback):
    def __init__(self, step: int) -> None:
        super().__init__()
        self.left = step

    def on_train_batch_begin(self, batch: int, logs: Any = None) -> None:
        self.left -= 1
        if self.left == 0:
            raise InterruptedError


def train(folder: pathlib.Path | None, step: int = 0, lose: str = "") -> Any:
    """Four epochs of 20 steps with k = 5 and momentum, as in the chapter; `lose` is what a bad resume forgets."""
    keras.utils.set_random_seed(1)
    layers = [keras.Input((64,)), keras.layers.Dense(8, "tanh"), keras.layers.Dropout(0.2), keras.layers.Dense(10)]
    model = keras.Sequential(layers)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.SGD(0.1, momentum=0.9), loss)
    local = companion.LocalSGD(5, backup_dir=folder)
    x, y, _ = digits()
    callbacks: list[Any] = [local]
    if step:
        callbacks.insert(0, CutOff(step))
    if lose == "momentum":
        forget = keras.callbacks.LambdaCallback(
            on_train_begin=lambda logs: [slot.assign(0 * slot) for slot in model.optimizer.momentums]
        )
        callbacks.append(forget)
    fit: dict[str, Any] = {"batch_size": 36, "epochs": 4, "shuffle": False, "verbose": 0, "callbacks": callbacks}
    model.fit(x[:720], y[:720], **fit)
    return np.concatenate([weight.ravel() for weight in model.get_weights()])


@pytest.mark.claim(
    "The killed run ends on the same weights as the run that nobody killed, to the last bit.", chapter="15"
)
@pytest.mark.parametrize("lose", ["", wrong("momentum", why="the velocities are lost")])
def test_the_killed_run(tmp_path: pathlib.Path, lose: str) -> None:
    """By a kill of one of two processes: in the chapter's own cells, and in tests/test_local_sgd.py."""
    with pytest.raises(InterruptedError):
        train(tmp_path, step=47)
    assert [path.name for path in tmp_path.iterdir()] == ["worker-0-of-1-epoch-2.npz"]
    np.testing.assert_array_equal(train(tmp_path, lose=lose), train(None))
    outputs = ["".join(o.get("text", "") for o in cell.get("outputs", [])) for cell in notebook(CHAPTER).cells]
    assert sum("was killed by SIGKILL" in text and "exit status 137" in text for text in outputs) == 1
    assert sum(text.count("nobody killed: True") for text in outputs) == 2


@pytest.mark.claim(
    "Look at each worker's newest backup and take the smallest epoch number: all have finished this epoch, and each "
    "still holds it.",
    chapter="15",
)
@pytest.mark.parametrize("rule", ["wait", wrong("do not wait", why="a worker deletes what another one needs")])
@pytest.mark.parametrize("workers", [2, 3])
def test_there_is_always_an_epoch_to_go_back_to(workers: int, rule: str) -> None:
    """Every moment of every order in which workers can write epochs 1 to 3, wait for all, and delete."""
    start = tuple((frozenset({0}), "write", 1) for _ in range(workers))
    seen, to_see = {start}, [start]
    while to_see:
        state = to_see.pop()
        newest = [max(held) for held, _, _ in state]
        assert max(newest) <= min(newest) + 1
        assert all(min(newest) in held for held, _, _ in state)
        for rank, (held, does, epoch) in enumerate(state):
            written = all(max(other) >= epoch for other, _, _ in state)
            if does == "write" and epoch <= 3:
                after = (held | {epoch}, "wait", epoch)
            elif does == "wait" and (written or rule != "wait"):
                after = (held, "delete", epoch)
            elif does == "delete":
                after = (frozenset({epoch}), "write", epoch + 1)
            else:
                continue
            following = (*state[:rank], after, *state[rank + 1 :])
            if following not in seen:
                seen.add(following)
                to_see.append(following)
