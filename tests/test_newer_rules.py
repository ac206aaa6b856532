"""Holds Lion, Muon and schedule-free AdamW against their papers, written down here in NumPy and float64."""

import json
from collections.abc import Callable
from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import ops

import companion
from tests.kit.cases import thinned, wrong
from tests.kit.dtypes import set_dtype
from tests.kit.numbers import distance, identical
from tests.kit.processes import on_devices

pytestmark = pytest.mark.usefixtures("dtype_put_back")

SHAPES = [(5,), (6, 4), (3, 7), (3, 2, 4), (2, 3, 2, 3)]
UPDATES = 400
ADAM = {"beta_1": 0.875, "beta_2": 0.9375}  # exact in float32, through which companion.Adam casts them, as Keras's


# The papers


def lion(
    theta: Any, state: dict[str, Any], g: Any, h: float, b1: float = 0.9, b2: float = 0.99, decay: float = 0
) -> Any:
    """Chen et al. 2023, Algorithm 2."""
    m = state.get("m", 0 * g)
    c = b1 * m + (1 - b1) * g
    state["m"] = b2 * m + (1 - b2) * g
    return theta - h * (np.sign(c) + decay * theta)


def newton_schulz(matrix: np.ndarray, steps: int = 5) -> np.ndarray:
    """Jordan et al. 2024, on singular values: an odd polynomial of a matrix keeps its singular vectors."""
    left, s, right = np.linalg.svd(matrix, full_matrices=False)
    s = s / (np.sqrt(np.sum(s**2)) + 1e-7)
    for _ in range(steps):
        s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
    return (left * s) @ right


def adam(theta: Any, state: dict[str, Any], g: Any, h: float, b1: float, b2: float, epsilon: float) -> Any:
    """Kingma and Ba 2015, with the epsilon of their Section 2.1."""
    t = state["t"] = state.get("t", 0) + 1
    state["m"] = b1 * state.get("m", 0) + (1 - b1) * g
    state["v"] = b2 * state.get("v", 0) + (1 - b2) * g**2
    return theta - h * np.sqrt(1 - b2**t) / (1 - b1**t) * state["m"] / (np.sqrt(state["v"]) + epsilon)


def muon(
    theta: Any,
    state: dict[str, Any],
    g: Any,
    h: float,
    mu: float = 0.95,
    decay: float = 0,
    nesterov: bool = True,
    scale: Callable[[int, int], float] = lambda n, m: 0.2 * np.sqrt(max(n, m)),
    steps: int = 5,
) -> Any:
    """Jordan et al. 2024 with the scale and the decay of Liu et al. 2025; a filter is a column."""
    if g.ndim < 2:
        return adam((1 - h * decay) * theta, state, g, h, *ADAM.values(), 1e-7)
    state["m"] = mu * state.get("m", 0) + g
    ahead = g + mu * state["m"] if nesterov else state["m"]
    matrix = ahead.reshape(-1, g.shape[-1])
    step = scale(*matrix.shape) * newton_schulz(matrix, steps)
    return theta - h * (step.reshape(g.shape) + decay * theta)


def schedule_free(
    theta: Any,
    state: dict[str, Any],
    g: Any,
    h: float,
    b1: float = 0.9,
    b2: float = 0.999,
    epsilon: float = 1e-8,
    decay: float = 0,
    warmup: int = 0,
) -> Any:
    """AdamWScheduleFree of the package schedulefree 1.4.1: y moves, and x is only read off at the end."""
    k, z = state.get("k", 0), state.get("z", theta)
    h = h * min(1, (k + 1) / warmup) if warmup else h
    largest = state["largest"] = max(h, state.get("largest", -1))
    total = state["total"] = state.get("total", 0) + largest**2
    c = largest**2 / total if total else 0
    state["v"] = b2 * state.get("v", 0) + (1 - b2) * g**2
    normalized = g / (np.sqrt(state["v"] / (1 - b2 ** (k + 1))) + epsilon) + decay * theta
    y = theta + c * (z - theta) + h * (b1 * (1 - c) - 1) * normalized
    state["z"], state["k"] = z - h * normalized, k + 1
    state["x"] = y + (1 - 1 / b1) * (state["z"] - y)
    return y


PAPERS: dict[str, tuple[Callable[..., Any], Callable[..., Any], dict[str, Any], dict[str, Any]]] = {
    "Lion": (companion.Lion, lion, {}, {}),
    "Lion, decay": (companion.Lion, lion, {"beta_1": 0.7, "weight_decay": 0.3}, {"b1": 0.7, "decay": 0.3}),
    "Muon": (companion.Muon, muon, ADAM, {}),
    "Muon, original scale, decay": (
        companion.Muon,
        muon,
        {"scale": "original", "weight_decay": 0.3, "nesterov": False, "steps": 4, "momentum": 0.8, **ADAM},
        {"scale": lambda n, m: max(1, m / n) ** 0.5, "decay": 0.3, "nesterov": False, "steps": 4, "mu": 0.8},
    ),
    "schedule-free": (companion.ScheduleFreeAdamW, schedule_free, {}, {}),
    "schedule-free, decay, warm-up": (
        companion.ScheduleFreeAdamW,
        schedule_free,
        {"weight_decay": 0.3, "warmup_steps": 60, "beta_1": 0.8, "beta_2": 0.97, "epsilon": 1e-4},
        {"decay": 0.3, "warmup": 60, "b1": 0.8, "b2": 0.97, "epsilon": 1e-4},
    ),
}
RULES = {"Lion": companion.Lion, "Muon": companion.Muon, "schedule-free": companion.ScheduleFreeAdamW}
every_rule = pytest.mark.parametrize("make", RULES.values(), ids=RULES)


def problem(updates: int = UPDATES) -> tuple[list[np.ndarray], list[np.ndarray], list[list[np.ndarray]]]:
    """Starts, curvatures of a quadratic, and noise on its gradient."""
    draw = np.random.default_rng(1)
    starts = [draw.normal(size=shape) for shape in SHAPES]
    curvatures = [draw.uniform(0.1, 2, size=shape) for shape in SHAPES]
    return starts, curvatures, [[draw.normal(0, 0.5, size=shape) for shape in SHAPES] for _ in range(updates)]


def followed(optimizer: Any, dtype: str = "float64", updates: int = UPDATES, jit: bool = False) -> list[np.ndarray]:
    """Where an optimizer takes the weights."""
    starts, curvatures, noise = problem(updates)
    weights = [keras.Variable(start, dtype=dtype) for start in starts]
    slopes = [tf.constant(curvature, dtype) for curvature in curvatures]
    optimizer.build(weights)

    @tf.function(autograph=False, jit_compile=jit)
    def step(noise: list[Any]) -> None:
        gradients = [slope * weight.value + n for slope, weight, n in zip(slopes, weights, noise, strict=True)]
        optimizer.apply(gradients, weights)

    for each in noise:
        step([tf.constant(n, dtype) for n in each])
    return [ops.convert_to_numpy(ops.cast(weight, "float64")) for weight in weights]


def by_paper(
    rule: Callable[..., Any], h: float, updates: int = UPDATES, **settings: Any
) -> tuple[list[Any], list[Any]]:
    """The same in NumPy: the weights, and what the rule remembers."""
    weights, curvatures, noise = problem(updates)
    states: list[dict[str, Any]] = [{} for _ in weights]
    for each in noise:
        gradients = [c * w + n for c, w, n in zip(curvatures, weights, each, strict=True)]
        weights = [rule(w, s, g, h, **settings) for w, s, g in zip(weights, states, gradients, strict=True)]
    return weights, states


@pytest.mark.parametrize("name", PAPERS)
def test_400_updates_are_the_papers(name: str) -> None:
    set_dtype("float64")  # so that the learning rate is one
    make, rule, ours, theirs = PAPERS[name]
    optimizer = make(0.01, **ours)
    weights, states = by_paper(rule, 0.01, **theirs)
    assert distance(followed(optimizer), weights) <= 1e-10
    if make is companion.ScheduleFreeAdamW:
        assert distance([x.numpy() for x in optimizer.averages], [state["x"] for state in states]) <= 1e-10


def keras_one_over_t(theta: Any, state: dict[str, Any], g: Any, h: float, **settings: Any) -> Any:
    state["largest"], state["total"] = 1e9, state.get("k", 0) * 1e18
    return schedule_free(theta, state, g, h, **settings)


def decayed_before(theta: Any, state: dict[str, Any], g: Any, h: float, decay: float = 0, **settings: Any) -> Any:
    return schedule_free((1 - h * decay) * theta, state, g, h, **settings)


def read_after_write(theta: Any, state: dict[str, Any], g: Any, h: float, b1: float = 0.9, **settings: Any) -> Any:
    schedule_free(theta, state, g, h, b1, **settings)
    x, c = (theta - (1 - b1) * state["z"]) / b1, 1 / state["k"]
    return (1 - b1) * state["z"] + b1 * ((1 - c) * x + c * state["z"])


def memory_first(theta: Any, state: dict[str, Any], g: Any, h: float, **settings: Any) -> Any:
    lion(theta, state, g, h, **settings)
    return lion(theta, {"m": state["m"]}, g, h, **settings)


def orthogonal_gradient(theta: Any, state: dict[str, Any], g: Any, h: float, **settings: Any) -> Any:
    if g.ndim < 2:
        return muon(theta, state, g, h, **settings)
    state["m"] = 0.95 * state.get("m", 0) + newton_schulz(g.reshape(-1, g.shape[-1])).reshape(g.shape)
    rows, columns = g.size // g.shape[-1], g.shape[-1]
    return theta - h * 0.2 * np.sqrt(max(rows, columns)) * (g + 0.95 * state["m"])


def kernels_by_the_first_axis(theta: Any, state: dict[str, Any], g: Any, h: float, **settings: Any) -> Any:
    if g.ndim < 3:
        return muon(theta, state, g, h, **settings)
    flat = muon(theta.reshape(len(g), -1), state, g.reshape(len(g), -1), h, **settings)
    return flat.reshape(g.shape)


MISTAKES = {
    "iterates weighed alike": ("schedule-free, decay, warm-up", keras_one_over_t),
    "decay before the step": ("schedule-free, decay, warm-up", decayed_before),
    "a read after the write": ("schedule-free", read_after_write),
    "memory written first": ("Lion", memory_first),
    "the gradient orthogonalised": ("Muon", orthogonal_gradient),
    "a kernel's first axis for its rows": ("Muon", kernels_by_the_first_axis),
}


@pytest.mark.parametrize(("name", "rule"), [wrong(*case, why=why) for why, case in MISTAKES.items()])
def test_another_rule_is_noticed(name: str, rule: Callable[..., Any]) -> None:
    set_dtype("float64")
    make, _, ours, theirs = PAPERS[name]
    weights, _ = by_paper(rule, 0.01, 20, **theirs)
    assert distance(followed(make(0.01, **ours), updates=20), weights) <= 1e-4


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [("float32", 2e-5), ("float16", 0.01), ("bfloat16", 0.1)], ids=lambda value: str(value)
)
@every_rule
def test_every_dtype(make: Callable[..., Any], dtype: str, tolerance: float) -> None:
    """Up to the rounding of 40 updates of weights about one."""
    rule = {companion.Lion: lion, companion.Muon: muon, companion.ScheduleFreeAdamW: schedule_free}[make]
    weights, states = by_paper(rule, 2.0**-6, 40)
    optimizer = make(2.0**-6, **(ADAM if make is companion.Muon else {}))
    found = followed(optimizer, dtype, 40)
    assert distance(found, problem()[0]) > 0.3
    apart = np.concatenate([np.abs(a - b).ravel() for a, b in zip(found, weights, strict=True)])
    assert np.quantile(apart, 0.8) <= tolerance
    assert np.max(apart) <= tolerance + 0.3  # a sign near zero may be another one; a small singular value grows
    if make is companion.ScheduleFreeAdamW:
        assert np.max(apart) <= tolerance
        assert {slot.dtype for slot in optimizer.averages} == {"float32"}
        assert distance([x.numpy() for x in optimizer.averages], [state["x"] for state in states]) <= tolerance


@pytest.mark.parametrize("make", RULES.values(), ids=RULES)
def test_compiled_by_xla(make: Callable[..., Any]) -> None:
    set_dtype("float64")
    decay = {"weight_decay": 0.1}
    assert (
        distance(followed(make(0.01, **decay), updates=30), followed(make(0.01, **decay), updates=30, jit=True)) < 1e-12
    )


# What the base class gives, and what stands around a rule


def pair(make: Callable[..., Any], **settings: Any) -> tuple[Any, list[Any]]:
    return make(0.05, **settings), [keras.Variable(np.ones(shape), dtype="float64") for shape in ((3, 2), (2,))]


def gradients(steps: int = 6) -> list[list[np.ndarray]]:
    draw = np.random.default_rng(3)
    return [[draw.normal(size=(3, 2)), draw.normal(size=2)] for _ in range(steps)]


def after(optimizer: Any, weights: list[Any], all_gradients: list[Any]) -> list[np.ndarray]:
    for each in all_gradients:
        optimizer.apply(each, weights)
    return [weight.numpy() for weight in weights]


@every_rule
def test_what_the_base_class_does_to_a_gradient(make: Callable[..., Any]) -> None:
    set_dtype("float64")
    given = gradients()
    plain = after(*pair(make), given)
    clipped = [[g * min(1, 0.1 / np.linalg.norm(g)) for g in each] for each in given]
    assert distance(after(*pair(make, clipnorm=0.1), given), after(*pair(make), clipped)) <= 1e-12
    scaled = [[8 * g for g in each] for each in given]
    assert identical(after(*pair(make, loss_scale_factor=8.0), scaled), plain)
    halves = [[2 * share * g for g in each] for each in given for share in (0.25, 0.75)]
    assert distance(after(*pair(make, gradient_accumulation_steps=2), halves), plain) <= 1e-12
    optimizer, weights = pair(make, use_ema=True, ema_momentum=0.5)
    average = None
    for each in given:
        (first, *_) = after(optimizer, weights, [each])
        average = first if average is None else 0.5 * average + 0.5 * first
    optimizer.finalize_variable_values(weights)
    assert distance([weights[0].numpy()], [average]) <= 1e-12


@every_rule
def test_accumulated_and_coalesced(make: Callable[..., Any]) -> None:
    set_dtype("float64")
    given, plain = gradients(), after(*pair(make), gradients())
    optimizer, weights = pair(make)
    halves = [[2 * share * g for g in each] for each in given for share in (0.25, 0.75)]
    assert distance(after(companion.GradientAccumulation(optimizer, 2), weights, halves), plain) <= 1e-12
    rows = tf.constant([2, 0, 2, 1])  # the third row in two pieces
    sparse = [
        [tf.IndexedSlices(tf.constant(np.stack([0.5 * g[2], g[0], 0.5 * g[2], g[1]])), rows, tf.constant([3, 2])), b]
        for g, b in given
    ]
    optimizer, weights = pair(make)
    assert distance(after(companion.CoalesceGradients(optimizer), weights, sparse), plain) <= 1e-12
    assert distance(after(*pair(make), sparse), plain) <= 1e-12


@every_rule
def test_excluded_from_decay(make: Callable[..., Any]) -> None:
    set_dtype("float64")
    found = {}
    for decay in (None, 0.5):
        optimizer, weights = pair(make, weight_decay=decay)
        optimizer.exclude_from_weight_decay(var_list=[weights[1]])
        found[decay] = after(optimizer, weights, gradients())
    assert distance(found[None][:1], found[0.5][:1]) > 0.01
    assert identical(found[None][1:], found[0.5][1:])


def network() -> keras.Model:
    keras.utils.set_random_seed(0)
    return keras.Sequential(
        [
            keras.Input((6, 6, 2)),
            keras.layers.Conv2D(3, 3, activation="relu", kernel_constraint=keras.constraints.MaxNorm(1.5)),
            keras.layers.Flatten(),
            keras.layers.Dense(4, name="head"),
        ],
        name="net",
    )


def data(rows: int = 24) -> tuple[np.ndarray, np.ndarray]:
    draw = np.random.default_rng(2)
    return draw.normal(size=(rows, 6, 6, 2)).astype("float32"), draw.integers(0, 4, rows)


LOSS = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
FIT: dict[str, Any] = {"batch_size": 8, "shuffle": False, "verbose": 0}


def weights_of(model: keras.Model) -> list[np.ndarray]:
    return [*model.get_weights(), *(variable.numpy() for variable in model.optimizer.variables)]


@pytest.mark.parametrize("make", RULES.values(), ids=RULES)
def test_in_parts_and_stopped_and_resumed(make: Callable[..., Any], tmp_path: Any) -> None:
    """`inject` on 3 uneven parts, and a file in the middle, which gives variables other paths."""
    models = []
    for parts in (1, 3):
        model = network()
        model.compile(
            make(0.01, weight_decay=0.1, **({"exclude": ["net/head"]} if make is companion.Muon else {})),
            LOSS,
            jit_compile=False,  # to the last bit: XLA rounds differently where sizes of batches are known
        )
        if parts > 1:
            companion.inject(model, parts)
        model.fit(*data(), **FIT)
        models.append(model)
    assert distance(*(model.get_weights() for model in models)) < (0.03 if make is companion.Lion else 1e-5)
    models[0].save(tmp_path / "model.keras")
    resumed = keras.saving.load_model(tmp_path / "model.keras")
    assert type(resumed.optimizer) is make
    assert resumed.optimizer.get_config() == models[0].optimizer.get_config()
    for model in (models[0], resumed):
        model.fit(*data(), **FIT)
    assert identical(weights_of(models[0]), weights_of(resumed))


@pytest.mark.parametrize("make", thinned(RULES.values(), companion.ScheduleFreeAdamW), ids=RULES)
def test_mixed_precision(make: Callable[..., Any]) -> None:
    keras.config.set_dtype_policy("mixed_float16")
    model = network()
    model.compile(make(0.01), LOSS)
    history = model.fit(*data(), epochs=4, **FIT)
    assert isinstance(model.optimizer, keras.optimizers.LossScaleOptimizer)
    assert history.history["loss"][-1] < history.history["loss"][0]


MIRRORED = """
import keras, numpy as np
from tests.test_newer_rules import LOSS, RULES, companion, data, distance, network

two = tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"])
given = np.random.default_rng(0).normal(size=(2, 5, 4, 3)).astype("float32")


def moved(make):
    weights = [keras.Variable(np.ones((4, 3))), keras.Variable(np.ones((4, 3))[0])]
    optimizer = make(0.01, weight_decay=0.1)
    optimizer.build(weights)

    def step(index):
        context = tf.distribute.get_replica_context()
        one = context.replica_id_in_sync_group if context.num_replicas_in_sync == 2 else None
        gradient = tf.constant(given)[:, index]
        gradient = tf.reduce_sum(gradient, 0) if one is None else gradient[one]
        optimizer.apply([gradient, gradient[0]], weights)

    strategy = tf.distribute.get_strategy()
    run = tf.function(lambda index: strategy.run(step, (index,)), autograph=False)
    for index in range(5):
        run(tf.constant(index))
    return [weight.numpy() for weight in weights]


found = {}
for name, make in RULES.items():
    alone = moved(make)
    with two.scope():
        found[name] = distance(alone, moved(make))
averages = []
for strategy in (tf.distribute.get_strategy(), two):
    with strategy.scope():
        model = network()
        model.compile(companion.ScheduleFreeAdamW(0.01, epsilon=1e-3), LOSS)
    model.fit(*data(), epochs=2, batch_size=8, shuffle=False, verbose=0, callbacks=[companion.SwapAverage()])
    averages.append(model.get_weights())
found["fit"] = distance(*averages)
print(json.dumps(found))
"""


def test_two_devices() -> None:
    found = on_devices(2, MIRRORED)
    assert found.keys() == {*RULES, "fit"}
    assert max(found.values()) < 1e-5


# Muon: which weights, and which matrix


def first_step(optimizer: Any, gradient: np.ndarray, **variable: Any) -> np.ndarray:
    weight = keras.Variable(np.zeros(gradient.shape), dtype="float64", **variable)
    optimizer.apply([gradient], [weight])
    return -weight.numpy()


def test_singular_values_of_a_step() -> None:
    gradient = np.random.default_rng(0).normal(size=(30, 8))
    step = first_step(companion.Muon(1.0, scale="original"), gradient)
    values = np.linalg.svd(step, compute_uv=False)
    assert 0.68 <= values.min() <= values.max() <= 1.14
    wide = first_step(companion.Muon(1.0, scale="original"), gradient.T)
    assert distance([wide / np.sqrt(30 / 8)], [step.T]) <= 1e-12
    for shape in ((5, 6, 8), (5, 3, 2, 8), (5, 3, 2, 1, 8)):
        assert (
            distance(
                [first_step(companion.Muon(1.0, scale="original"), gradient.reshape(shape))], [step.reshape(shape)]
            )
            == 0
        )
    assert not np.any(first_step(companion.Muon(1.0), np.zeros((3, 2))))


def test_kernels_of_attention() -> None:
    """What a head's matrix sums over is the first axis of query, key and value, and the first two of the output."""
    set_dtype("float64")
    layer = keras.layers.MultiHeadAttention(3, 4)
    layer.build((None, 5, 7), (None, 5, 7))
    optimizer = companion.Muon(1.0, scale="original")
    optimizer.build(layer.trainable_variables)
    rows = [number for _, number in optimizer.get_config()["matrices"]]
    found = dict(zip([v.path.split("/", 1)[1] for v in layer.trainable_variables], rows, strict=True))
    kernels = {"query/kernel": 7, "key/kernel": 7, "value/kernel": 7, "attention_output/kernel": 12}
    assert found == {**dict.fromkeys(found, 0), **kernels}
    assert first_step(companion.Muon(1.0, input_axes={"odd": 1}), np.ones((3, 4, 5)), name="odd").shape == (3, 4, 5)


def test_biases_of_any_shape_are_no_matrices() -> None:
    """And a convolution that is called like a part of attention is one all the same."""
    layers = [keras.layers.GRU(2), keras.layers.LayerNormalization(axis=(1, 2)), keras.layers.Conv2D(4, 3, name="key")]
    rows = []
    for layer, shape in zip(layers, [(None, 5, 3), (None, 5, 3), (None, 5, 5, 3)], strict=True):
        layer.build(shape)
        optimizer = companion.Muon(1.0)
        optimizer.build(layer.trainable_variables)
        rows.append([number for _, number in optimizer.get_config()["matrices"]])
    assert rows == [[3, 2, 0], [0, 0], [27, 0]]
    by_name = companion.Muon(1.0, input_axes={"bias": 1})
    by_name.build(layers[0].trainable_variables)
    assert [number for _, number in by_name.get_config()["matrices"]] == [3, 2, 2]


def test_the_rest_take_adams_step() -> None:
    set_dtype("float64")
    names = {"tokens": (5, 3), "dense/kernel": (3, 3), "dense/bias": (3,), "head/kernel": (3, 2), "head/bias": (2,)}
    found, given = [], [np.random.default_rng(0).normal(size=shape) for shape in names.values()]
    for optimizer in (companion.Muon(0.1, exclude=["^head", "tokens"]), companion.Adam(0.1, beta_2=0.95)):
        with_names = [keras.Variable(np.ones(shape), name=name.replace("/", "_")) for name, shape in names.items()]
        found.append(after(optimizer, with_names, [given, given]))
        slots = [variable.name.rsplit("_", 1)[1] for variable in optimizer.variables[2:]]
        assert slots.count("momentum") == 5
        assert slots.count("velocity") == (4 if isinstance(optimizer, companion.Muon) else 5)
    assert [np.array_equal(*each) for each in zip(*found, strict=True)] == [True, False, True, True, True]


def test_a_pattern_that_matches_nothing() -> None:
    weight = keras.Variable(np.ones((2, 2)), name="kernel")
    optimizer = companion.Muon(exclude=["kern", "haed"])
    with pytest.raises(ValueError, match=r"`exclude` .*\['kernel'\].*Received: exclude=\['haed'\], found in none"):
        optimizer.apply([np.ones((2, 2))], [weight])
    assert np.all(weight.numpy() == 1)
    assert not optimizer.built


# Arguments


SHARES = [1.0, -0.1, "0.9", None, True, float("nan")]
WRONG = {
    **dict.fromkeys([(companion.Lion, "beta_1"), (companion.Lion, "beta_2"), (companion.Muon, "momentum")], SHARES),
    **dict.fromkeys([(companion.ScheduleFreeAdamW, "beta_1"), (companion.ScheduleFreeAdamW, "beta_2")], SHARES),
    **{(make, "learning_rate"): [-0.1, "0.1", None] for make in RULES.values()},
    **{(make, "weight_decay"): [-0.1, "0.1", float("inf")] for make in RULES.values()},
    (companion.ScheduleFreeAdamW, "epsilon"): [0, -1.0],
    (companion.ScheduleFreeAdamW, "warmup_steps"): [-1, 1.5, True],
    (companion.Muon, "steps"): [0, 2.5],
    (companion.Muon, "nesterov"): [1, None],
    (companion.Muon, "scale"): ["spectral", 0.2, None],
    (companion.Muon, "exclude"): ["head", ["("], [3]],
    (companion.Muon, "input_axes"): [{"a": 0}, {"(": 1}, ["a"], {"a": "1"}],
}


@pytest.mark.parametrize(("make", "argument"), WRONG, ids=lambda value: getattr(value, "__name__", value))
def test_a_wrong_argument_is_named(make: Callable[..., Any], argument: str) -> None:
    for value in WRONG[make, argument]:
        with pytest.raises(ValueError, match=rf"^`{argument}` must .* Received: {argument}="):
            make(**{argument: value})


@every_rule
def test_config_makes_the_same_optimizer(make: Callable[..., Any]) -> None:
    schedule = keras.optimizers.schedules.CosineDecay(0.5, 100)
    own = {"exclude": ["head"], "input_axes": {"odd": 1}, "scale": "original"} if make is companion.Muon else {}
    optimizer = make(schedule, weight_decay=0.25, name="one", **own)
    config = optimizer.get_config()
    assert json.loads(json.dumps(config)) == config
    again = keras.optimizers.deserialize(json.loads(json.dumps(keras.optimizers.serialize(optimizer))))
    assert type(again) is make
    assert again.get_config() == config


def test_lion_is_kerass() -> None:
    """With shares that float32 holds exactly, to the last bit, in every dtype."""
    for dtype in ("float64", "bfloat16"):
        set_dtype(dtype)
        settings = {"learning_rate": 2.0**-6, "beta_1": 0.875, "beta_2": 0.96875, "weight_decay": 0.125}
        makes = (companion.Lion, keras.optimizers.Lion)
        assert distance(*(followed(make(**settings), dtype, 40) for make in makes)) == 0


def test_private_names_are_where_they_were() -> None:
    for name in ("_use_weight_decay", "_apply_weight_decay", "_get_variable_index"):
        assert callable(getattr(keras.optimizers.Optimizer, name))
