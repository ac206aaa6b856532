"""Chapter 14: the data under its figures, and the tests that hold its sentences.

What several devices do is computed in a process of its own: logical devices must be set before TensorFlow starts.
"""

import functools
from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf

import companion
from companion import datasets, merging
from tests.book.reading import figure_data, line
from tests.kit.cases import wrong
from tests.kit.processes import on_devices

CHAPTER = "14"
DEVICES = 5


# ---- a linear classifier of digits, in NumPy ------------------------------------------------------------------------


@functools.cache
def digits() -> tuple[np.ndarray, np.ndarray]:
    """1,400 images with a one for the bias, and the one-hot labels."""
    data = datasets.digits("float64")
    return np.c_[data.x_train[:1400], np.ones(1400)], np.eye(10)[data.y_train[:1400]]


def log_probabilities(weights: np.ndarray, rows: Any) -> np.ndarray:
    logits = digits()[0][rows] @ weights
    logits -= logits.max(1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(1, keepdims=True))


def gradient(weights: np.ndarray, rows: Any) -> np.ndarray:
    x, y = (array[rows] for array in digits())
    return x.T @ (np.exp(log_probabilities(weights, rows)) - y) / len(x)


def loss(weights: np.ndarray) -> float:
    return float(-np.sum(log_probabilities(weights, slice(None)) * digits()[1], axis=1).mean())


RULES: dict[str, Any] = {
    "mean": lambda rows: rows.mean(0),
    "median": lambda rows: np.median(rows, axis=0),
    "vote": lambda rows: np.sign(np.sign(rows).sum(0)),
    "trimmed": lambda rows: np.sort(rows, axis=0)[1:-1].mean(0),
}


def train(rule: str, shards: np.ndarray, factor: float = 1.0, rate: float | None = None) -> list[float]:
    """The loss before the first of 28 steps and after each; what the third device says is multiplied by the factor."""
    weights = np.r_[np.random.default_rng(1).normal(size=(64, 10)) / 100, np.zeros((1, 10))]
    path = [loss(weights)]
    for k in range(28):
        rows = np.array([gradient(weights, chosen) for chosen in shards[k % len(shards)]])
        rows[2] *= factor
        weights = weights - (rate or (0.03 if rule == "vote" else 1.0)) * RULES[rule](rows)
        path.append(loss(weights))
    return path


def shuffled() -> np.ndarray:
    return np.arange(1400).reshape(14, 5, 20)


def by_label() -> np.ndarray:
    pairs = [np.flatnonzero(digits()[1].argmax(1) // 2 == pair) for pair in range(5)]
    return np.array([[pair[20 * k : 20 * k + 20] for pair in pairs] for k in range(13)])


# ---- figures --------------------------------------------------------------------------------------------------------


def test_shares_in_the_update() -> None:
    """Widths of the bars, a row after the other: a mean over samples, or a mean over devices of means."""
    (axes,) = figure_data(CHAPTER)[0]
    expected = [[1 / 7] * 7, [1 / 8] * 4 + [1 / 6] * 3, [1 / 10] * 6 + [1 / 5], [1 / 7] * 7]
    np.testing.assert_allclose([width for width, _ in axes["bars"]], np.concatenate(expected), rtol=1e-5)


def test_five_clipped_arrows() -> None:
    """Each is what clipping leaves of a fifth, seen along the sum; together they are four times the limit and more."""
    (axes,) = figure_data(CHAPTER)[1]
    of_device = [gradient(np.zeros((65, 10)), rows).ravel() for rows in np.split(np.arange(1400), DEVICES)]
    clipped = np.array([0.01 * g / np.linalg.norm(g) for g in of_device])
    total = clipped.sum(0)
    length, end = np.linalg.norm(total), np.zeros(2)
    assert length == pytest.approx(0.047, abs=5e-4)
    for k, arrow in enumerate(clipped):
        x, y = line(axes, f"device {k + 1}")
        np.testing.assert_allclose([x[0], y[0]], end, atol=1e-7)
        end = np.array([x[1], y[1]])
        assert x[1] - x[0] == pytest.approx(arrow @ total / length, rel=1e-4)
        assert 0.009 < np.hypot(x[1] - x[0], y[1] - y[0]) < 0.01
    np.testing.assert_allclose(end, [length, 0], atol=1e-7)
    x, _ = line(axes, "inject")
    merged = np.sum(of_device, axis=0)
    assert x[1] - x[0] == pytest.approx(0.01 * merged @ total / length / np.linalg.norm(merged), rel=1e-4)


def test_two_answers_and_two_averages() -> None:
    """From the right average to Keras's it is (p − 1/2)(g₂ − g₁)."""
    (axes,) = figure_data(CHAPTER)[2]
    first, second = (np.array(line(axes, name))[:, 1] for name in ("g1", "g2"))
    right, kerases = (np.array(line(axes, name))[:, 0] for name in ("weighed by samples", "Keras"))
    np.testing.assert_allclose(7 * right, 6 * first + second, rtol=1e-5)
    np.testing.assert_allclose(kerases - right, (6 / 7 - 0.5) * (second - first), rtol=1e-4)


def test_error_of_the_mean_of_means() -> None:
    """Dots: the mean of two means, drawn again. Lines: the expected square of (1/2 − p)(g₁ − g₂)."""
    (axes,) = figure_data(CHAPTER)[3]
    labels, zeros, random = digits()[1].argmax(1), np.zeros((65, 10)), np.random.default_rng(1)
    low, high, everyone = np.flatnonzero(labels < 5), np.flatnonzero(labels >= 5), np.arange(1400)
    size = np.linalg.norm(gradient(zeros, everyone))
    for name, pair in {"shuffled": (everyone, everyone), "sorted": (low, high)}.items():
        counts, found = line(axes, name)
        for n, error in zip(counts.astype(int), found, strict=True):
            squares = []
            for _ in range(5):
                parts = [random.choice(pool, k) for pool, k in zip(pair, (n, 640 - n), strict=True)]
                gap = np.mean([gradient(zeros, rows) for rows in parts], axis=0) - gradient(
                    zeros, np.concatenate(parts)
                )
                squares.append(np.sum(gap**2))
            assert error == pytest.approx(np.sqrt(np.mean(squares)) / size, rel=1e-4, abs=1e-9)
        n, predicted = line(axes, f"{name}, predicted")
        means = [gradient(zeros, pool) for pool in pair]
        spread = [
            np.mean([np.sum((gradient(zeros, [i]) - mean) ** 2) for i in pool])
            for pool, mean in zip(pair, means, strict=True)
        ]
        squares_of_difference = np.sum((means[0] - means[1]) ** 2) + spread[0] / n + spread[1] / (640 - n)
        np.testing.assert_allclose(
            predicted, np.abs(0.5 - n / 640) * np.sqrt(squares_of_difference) / size, rtol=1e-4, atol=1e-9
        )
        np.testing.assert_allclose(found, np.interp(counts, n, predicted), rtol=0.2, atol=0.02)


@pytest.mark.claim(
    "One faulty device of five ruins a mean: with the factor −10, it is stronger than the four others together.",
    chapter="14",
)
def test_one_faulty_device() -> None:
    (axes,) = figure_data(CHAPTER)[4]
    for rule in RULES:
        steps, found = line(axes, rule)
        np.testing.assert_array_equal(steps, np.arange(29))
        np.testing.assert_allclose(found, train(rule, shuffled(), -10), rtol=1e-4)
    np.testing.assert_allclose(line(axes, "mean, no fault")[1], train("mean", shuffled()), rtol=1e-4)
    ends = {rule: line(axes, rule)[1][-1] for rule in RULES}
    assert ends.pop("mean") > 100
    assert max(ends.values()) < 0.75


@pytest.mark.claim("Any factor below −4 turns the step uphill.", chapter="14")
@pytest.mark.parametrize("factor", [-4.01, -10, wrong(-3.99, why="the four still prevail")])
def test_how_loud_one_must_be(factor: float) -> None:
    """All agree; the sum points uphill."""
    (merged,) = merging.mean([tf.constant([[1.0], [1.0], [factor], [1.0], [1.0]])], tf.ones(5))
    assert merged.numpy().item() < 0


@pytest.mark.claim("To a median or a vote, a device with rare data looks like a device with a fault.", chapter="14")
def test_two_digits_to_each_device() -> None:
    (axes,) = figure_data(CHAPTER)[5]
    for rule in ("mean", "median", "vote"):
        np.testing.assert_allclose(line(axes, rule)[1], train(rule, by_label()), rtol=1e-4)
        np.testing.assert_allclose(line(axes, f"{rule}, shuffled")[1], train(rule, shuffled()), rtol=1e-4)
    zeros = np.zeros((65, 10))
    of_devices = np.array([gradient(zeros, rows)[-1] for rows in by_label()[0]])  # the biases, one for each digit
    assert (np.sum(of_devices < 0, axis=0) == 1).all(), "one device wants an output to rise, four want it to fall"
    assert (RULES["median"](of_devices) > 0).all()
    assert line(axes, "mean")[1][-1] < 0.6 < 1.8 < line(axes, "median")[1][-1] < 2 < line(axes, "vote")[1][-1]


@pytest.mark.claim("The vote needs a rate of its own.", chapter="14")
def test_the_vote_at_the_rate_of_the_mean() -> None:
    at_best = {rate: min(train("vote", shuffled(), rate=rate)) for rate in (0.03, 1.0)}
    assert at_best[0.03] < 0.5
    assert 2.0 < at_best[1.0] < np.log(10)


# ---- rules ----------------------------------------------------------------------------------------------------------


def merged(rule: Any, rows: np.ndarray, weights: Any = None) -> np.ndarray:
    (found,) = rule([tf.constant(rows)], tf.constant(np.ones(len(rows)) if weights is None else weights))
    return found.numpy()


def rule_named(name: str) -> Any:
    return {"vote": merging.sign}.get(name) or getattr(merging, name)


@pytest.mark.claim(
    "On shuffled data, the mean of means over shares p and 1 − p is as noisy as a batch of 4p(1 − p)N samples.",
    chapter="14",
)
@pytest.mark.parametrize(
    "worth", ["4p(1-p)N", wrong("N", why="the weighted mean"), wrong("twice the smaller", why="min")]
)
@pytest.mark.parametrize("shares", [(4, 3), (9, 1), (63, 1)])
def test_what_uneven_shares_are_worth(shares: tuple[int, int], worth: str) -> None:
    if worth != "4p(1-p)N" and shares == (4, 3):
        pytest.xfail("too close to tell apart")
    a, b = shares
    samples = np.random.default_rng(0).normal(size=(200_000, a + b))
    noise = np.var((samples[:, :a].mean(1) + samples[:, a:].mean(1)) / 2)
    p = a / (a + b)
    size = {"4p(1-p)N": 4 * p * (1 - p) * (a + b), "N": a + b, "twice the smaller": 2 * min(a, b)}[worth]
    assert noise == pytest.approx(1 / size, rel=0.02)


@pytest.mark.claim(
    "The vote does not know how long a gradient is: a device can lie about the sign of a coordinate, and about "
    "nothing else.",
    chapter="14",
)
@pytest.mark.parametrize("rule", ["vote", wrong("median", why="knows lengths"), wrong("mean", why="knows lengths")])
def test_the_vote_is_deaf_to_length(rule: str) -> None:
    random = np.random.default_rng(0)
    rows = random.normal(size=(5, 200))
    for row in range(5):
        louder = rows.copy()
        louder[row] *= random.uniform(0.01, 1000, size=200)
        np.testing.assert_array_equal(merged(rule_named(rule), louder), merged(rule_named(rule), rows))


@pytest.mark.claim(
    "The median of companion takes NaN for the largest number of all, and its vote gives NaN no vote.", chapter="14"
)
@pytest.mark.parametrize("row", range(5))
def test_not_a_number(row: int) -> None:
    rows = np.random.default_rng(0).normal(size=(5, 200))
    spoilt, largest, silent = rows.copy(), rows.copy(), rows.copy()
    spoilt[row], largest[row], silent[row] = np.nan, 1e300, 0
    np.testing.assert_array_equal(merged(merging.median, spoilt), np.median(largest, axis=0))
    np.testing.assert_array_equal(merged(merging.sign, spoilt), np.sign(np.sign(silent).sum(0)))
    assert np.isnan(merged(merging.mean, spoilt)).all()


@pytest.mark.claim("The median and the vote ignore weights.", chapter="14")
@pytest.mark.parametrize("rule", ["median", "vote", wrong("weighted_mean", why="that is what it is for")])
def test_rules_without_weights(rule: str) -> None:
    rows = np.random.default_rng(0).normal(size=(5, 20))
    weights = np.array([1.0, 60.0, 2.0, 3.0, 4.0])
    np.testing.assert_array_equal(merged(rule_named(rule), rows, weights), merged(rule_named(rule), rows))


@pytest.mark.claim(
    "Where the honest devices agree, a median or a vote is safe while fewer than half of the devices are faulty.",
    chapter="14",
)
@pytest.mark.parametrize("rule", ["median", "vote", wrong("mean", why="one is enough")])
@pytest.mark.parametrize("liars", [1, 2, wrong(3, why="more than half")])
def test_how_many_may_fail(liars: int, rule: str) -> None:
    """The honest agree on the direction; whatever the others say, it stays."""
    random = np.random.default_rng(0)
    rows = random.uniform(1, 2, size=(5, 200))
    rows[:liars] = -(10.0 ** random.uniform(-2, 9, size=(liars, 200)))
    assert (merged(rule_named(rule), rows) > 0).all()


# ---- several devices ------------------------------------------------------------------------------------------------

F64 = {"dtype": "float64"}
UNIT = functools.partial(keras.optimizers.SGD, 1.0)


def strategy_on(devices: int) -> Any:
    if devices == 1:
        return tf.distribute.get_strategy()
    names = [f"CPU:{i}" for i in range(devices)]
    return tf.distribute.MirroredStrategy(names, tf.distribute.ReductionToOneDevice())


def compiled(devices: int, layers: Any, optimizer: Any, loss: Any, merge: Any = None) -> Any:
    with strategy_on(devices).scope():
        model = keras.Sequential(layers())
        model.compile(optimizer(), loss)
    return companion.inject(model, merge=merge) if merge else model


def squared_error(**options: Any) -> Any:
    return keras.losses.MeanSquaredError(**F64, **options)


def zeros(*shape: int, mask: bool = False) -> Any:
    masking = [keras.layers.Masking(**F64)] if mask else []
    dense = keras.layers.Dense(1, use_bias=False, kernel_initializer="zeros", **F64)
    return lambda: [keras.Input(shape, **F64), *masking, dense]


def shares(devices: int, merge: Any, rows: int) -> list[float]:
    """What each of ``rows`` samples counts for in a last batch."""
    full = 2 * devices * rows
    x = np.concatenate([np.zeros((full, rows)), np.eye(rows)])
    y = np.concatenate([np.zeros((full, 1)), np.full((rows, 1), -0.5)])
    model = compiled(devices, zeros(rows), UNIT, squared_error(), merge)
    model.fit(x, y, batch_size=full, shuffle=False, verbose=0)
    return list(map(float, -model.get_weights()[0].ravel()))


def error_of(method: str, devices: int, rows: int) -> str:
    model = compiled(devices, zeros(2), UNIT, squared_error())
    data = np.ones((rows, 2)), np.ones((rows, 1))
    try:
        getattr(model, method)(*data, batch_size=rows, verbose=0)
    except Exception as error:  # the test names it
        return type(error).__name__
    return "none"


def network() -> list[Any]:
    keras.utils.set_random_seed(1)
    return [keras.Input((3,), **F64), keras.layers.Dense(4, "tanh", **F64), keras.layers.Dense(1, **F64)]


def gap(devices: int, merge: Any, samples: int, batch_size: int, **clip: Any) -> float:
    """The largest difference in a weight to one device, after two epochs."""
    random, found = np.random.default_rng(0), []
    data = 10 * random.normal(size=(samples, 3)), random.normal(size=(samples, 1))
    adam = functools.partial(keras.optimizers.Adam, 0.1, **clip)
    for count, rule in ((devices, merge), (1, None)):
        model = compiled(count, network, adam, squared_error(), rule)
        model.fit(*data, batch_size=batch_size, epochs=2, shuffle=False, verbose=0)
        found.append(np.concatenate([np.ravel(weight) for weight in model.get_weights()]))
    return float(np.abs(found[0] - found[1]).max())


def words(merge: Any) -> list[float]:
    """What one word counts for, in a share with 5 and in one with 35 words."""
    x = np.zeros((4, 30, 2))
    for sentence, length in enumerate((2, 3, 5, 30)):
        x[sentence, :length, sentence // 2] = 1
    model = compiled(2, zeros(30, 2, mask=True), UNIT, squared_error(), merge)
    model.fit(x, np.full((4, 30, 1), -0.5), batch_size=4, shuffle=False, verbose=0)
    return list(map(float, -model.get_weights()[0].ravel() / (5, 35)))


def weighted(devices: int, merge: Any, reduction: str) -> list[float]:
    """What each of four samples with weights counts for: two on each of two devices."""
    loss = squared_error(reduction=reduction)
    model = compiled(devices, zeros(4), UNIT, loss, merge)
    weights = np.array([1.0, 2.0, 3.0, 10.0])
    model.fit(np.eye(4), np.full((4, 1), -0.5), sample_weight=weights, batch_size=4, shuffle=False, verbose=0)
    return list(map(float, -model.get_weights()[0].ravel()))


def clipped(devices: int) -> float:
    """The length of the step for a gradient of length 100, the same on all devices, with a limit of 0.1."""
    model = compiled(devices, zeros(1), functools.partial(UNIT, global_clipnorm=0.1), squared_error())
    model.fit(np.ones((10, 1)), np.full((10, 1), 50.0), batch_size=10, verbose=0)
    return float(model.get_weights()[0].item())


def sent() -> dict[str, list[list[int]]]:
    """What is sent between two devices, as a training step is traced: with a rule, and without."""
    from companion import oracle, replicas

    found: dict[str, list[list[int]]] = {"a rule": [], "the default": []}
    send = oracle.all_reduce
    for name, merge in (("a rule", merging.mean), ("the default", merging.weighted_mean)):

        def watched(tensors: Any, name: str = name) -> Any:
            found[name] += [list(tensor.shape) for tensor in tensors]
            return send(tensors)

        oracle.all_reduce = replicas.all_reduce = watched
        model = compiled(2, zeros(7), UNIT, squared_error(), merge)
        model.fit(np.ones((10, 7)), np.ones((10, 1)), batch_size=10, verbose=0)
        oracle.all_reduce = replicas.all_reduce = send
    return found


def on_five_devices() -> dict[str, Any]:
    """Everything the sentences below need."""
    keras_on, inject = None, merging.weighted_mean
    clips: list[dict[str, Any]] = [{"clipnorm": 0.1}, {"global_clipnorm": 0.1}, {"clipvalue": 0.01}]
    reductions = "sum_over_batch_size", "mean_with_sample_weight"
    return {
        "errors": {
            f"{m} {d} {n}": error_of(m, d, n) for m in ("fit", "evaluate") for d, n in ((2, 7), (2, 8), (3, 10))
        },
        "Keras, seven": shares(2, keras_on, 7),
        "Keras, one": shares(2, keras_on, 1),
        "inject, one": shares(2, inject, 1),
        "Keras, even": gap(2, keras_on, 20, 8),
        "Keras, uneven": gap(2, keras_on, 19, 8),
        "inject": {str(devices): gap(devices, inject, 15, 7) for devices in (2, DEVICES)},
        "inject, clipped": {next(iter(clip)): gap(2, inject, 14, 7, **clip) for clip in clips},
        "Keras, clipped": gap(2, keras_on, 16, 8, **clips[0]),
        "Keras, words": words(keras_on),
        "inject, words": words(inject),
        "weighted": {name: [weighted(2, how, name) for how in (keras_on, inject)] for name in reductions},
        "limits": {str(devices): clipped(devices) for devices in (1, DEVICES)},
        "sent": sent(),
    }


def devices() -> dict[str, Any]:
    program = "from tests.book import test_chapter_14 as t; print(json.dumps(t.on_five_devices()))"
    return on_devices(DEVICES, program)


@pytest.mark.claim(
    "On several devices, stock `fit` raises an error if the first batch of a data set does not divide evenly among "
    "them.",
    chapter="14",
)
@pytest.mark.parametrize("case", ["2 7", "3 10", wrong("2 8", why="divides evenly")])
@pytest.mark.parametrize("method", ["fit", "evaluate"])
def test_a_first_batch_that_does_not_divide(method: str, case: str) -> None:
    assert devices()["errors"][f"{method} {case}"] == "InvalidArgumentError"


@pytest.mark.claim(
    "stock `fit` gives the three samples of the smaller share as much weight as the four of the larger one, so each of "
    "the three counts a third more.",
    chapter="14",
)
def test_seven_samples_on_two_devices() -> None:
    np.testing.assert_allclose(devices()["Keras, seven"], [1 / 8] * 4 + [1 / 6] * 3, rtol=1e-12)


@pytest.mark.claim("A last batch of one sample on two devices takes half a step.", chapter="14")
@pytest.mark.parametrize("how", ["Keras", wrong("inject", why="takes a whole one")])
def test_a_last_batch_of_one(how: str) -> None:
    assert devices()[f"{how}, one"] == pytest.approx([0.5], rel=1e-12)


@pytest.mark.claim(
    "Under `inject`, any number of devices takes the step of one device, whatever their shares.", chapter="14"
)
@pytest.mark.parametrize("count", [2, DEVICES, wrong("Keras", why="mean of means")])
def test_any_number_of_devices(count: Any) -> None:
    found = devices()["Keras, uneven"] if count == "Keras" else devices()["inject"][str(count)]
    assert found < 1e-10


@pytest.mark.claim(
    "Stock `fit` under `MirroredStrategy` is exact if every device's loss is divided by the same number (equal shares, "
    "no masks) and nothing is clipped.",
    chapter="14",
)
@pytest.mark.parametrize("sizes", ["even", wrong("uneven", why="mean of means")])
def test_keras_is_exact_on_equal_shares(sizes: str) -> None:
    assert devices()[f"Keras, {sizes}"] < 1e-10


@pytest.mark.claim(
    "With masks, equal numbers of samples are not enough: in Keras a word on the device with 5 words counts seven "
    "times as much as a word on the device with 35.",
    chapter="14",
)
@pytest.mark.parametrize("how", ["Keras", wrong("inject", why="a word is a word")])
def test_words_in_their_company(how: str) -> None:
    alone, in_company = devices()[f"{how}, words"]
    assert alone / in_company == pytest.approx(7)


@pytest.mark.claim(
    "With Keras's default reduction a loss divides by the number of samples, whatever their weights, so that weights "
    'do not make shares uneven; with `reduction="mean_with_sample_weight"` they do.',
    chapter="14",
)
@pytest.mark.parametrize("reduction", ["sum_over_batch_size", "mean_with_sample_weight"])
def test_sample_weights(reduction: str) -> None:
    keras_on_two, inject_on_two = devices()["weighted"][reduction]
    weights = np.array([1.0, 2.0, 3.0, 10.0])
    one = weights / (4 if reduction == "sum_over_batch_size" else 16)
    np.testing.assert_allclose(inject_on_two, one, rtol=1e-12)
    expected = one if reduction == "sum_over_batch_size" else weights / [6, 6, 26, 26]
    np.testing.assert_allclose(keras_on_two, expected, rtol=1e-12)


@pytest.mark.claim("On R devices, Keras's `global_clipnorm=c` limits the step to R times c, not to c.", chapter="14")
@pytest.mark.parametrize("count", [1, DEVICES])
def test_the_limit_grows_with_the_devices(count: int) -> None:
    assert devices()["limits"][str(count)] == pytest.approx(0.1 * count, rel=1e-6)


@pytest.mark.claim(
    "Under `inject` the optimizer gets what has been merged, and clips it as one device would.", chapter="14"
)
@pytest.mark.parametrize(
    "clip", ["clipnorm", "global_clipnorm", "clipvalue", wrong("Keras", why="clips on each device")]
)
def test_clipping_what_has_been_merged(clip: str) -> None:
    found = devices()["Keras, clipped"] if clip == "Keras" else devices()["inject, clipped"][clip]
    assert found < 1e-10


@pytest.mark.claim("The default sends sums; with any other rule, every device gets every gradient.", chapter="14")
@pytest.mark.parametrize("how", ["a rule", wrong("the default", why="adds up")])
def test_a_rule_needs_every_gradient(how: str) -> None:
    assert [2, 7, 1] in devices()["sent"][how]
    assert [7, 1] not in devices()["sent"][how]
