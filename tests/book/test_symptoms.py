"""Every cause on the page of symptoms is real: a test here, or a program of the page on Keras, reproduces it."""

import itertools
import json
import re
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import ops

import companion
from tests.book.reading import ROOT, markdown, notebook
from tools.programs import programs

SYMPTOMS = re.findall(r"^\| (?!you see|---)(.*?) \|", (ROOT / "book" / "symptoms.md").read_text(), re.MULTILINE)

SHOWN_ON_THE_PAGE_ON_KERAS = {
    "`optimizer.lr = …` changes nothing": "`optimizer.lr` is ignored",
    "Every epoch has the same batches": "With a seed, every epoch has the same batches",
    "The first epoch learns nothing": "A short epoch makes no update",
    "The loss jumps when training goes on": "Memory is lost when weights are loaded before build",
    "A resumed run with dropout is another run": "A resumed run repeats its first masks, or draws others",
    "The resumed run ends at once with `OSError`": "Half a backup ends the resumed run",
    "After loading, weights decay that were excluded from it": "After loading, every weight decays again",
    "Under `mixed_float16`, `optimizer.set_weights` brings no memory back": (
        "`set_weights` of a LossScaleOptimizer copies only the scale"
    ),
    "`ValueError: Attempt to convert a value (None) …` at the end of `fit`": (
        "fit ends with an error where float8 meets `use_ema`"
    ),
    "After loading, `MultiOptimizer` has no memory": "Rules that name a whole path are lost at loading",
    "Accumulation was switched on, and the optimizer's memory is gone after loading": (
        "Memory is lost when accumulation is switched on"
    ),
    "The schedule runs out N times too early": "A schedule runs out N times too early",
    "Another result than with the large batch, and the last part is smaller": (
        "A small batch weighs as much as a large one"
    ),
    "Another result than with the large batch, and sentences are padded": ("Few tokens weigh as much as many"),
    "SGD: a loss that is a sum learns N times too slowly": "A sum is divided by N",
    "Weights move between two updates": "Constraints move weights between updates",
    "In bfloat16, long windows learn too slowly": "Sums stop growing in bfloat16",
    "Adam: repeated words move too far, or not far enough": "Words that repeat in a batch take wrong steps",
    "In float64 only eight digits agree": "In float64 only eight digits are right",
    "A constraint is broken after `fit` with `use_ema`": "What a constraint forbids comes back",
    "A schedule-free model evaluates worse than it should": "The model shows the wrong weights",
    "Another result than on one device, and the last batch is smaller": (
        "In a ragged batch some samples count too much"
    ),
    "SGD: on R devices a step is up to R times as long as rate × `clipnorm`": "A step is longer than clipnorm",
    "`InvalidArgumentError` on the first batch": "A first batch that cannot be shared evenly ends the run",
    "``RuntimeError: `merge_call` called while defining a new graph …``": (
        "Accumulation does not run under MirroredStrategy"
    ),
    "Another result than on one device, and sentences are padded": (
        "Few words of one device weigh as much as many of another"
    ),
    "`ValueError` about `PerReplica`": "fit does not run on several machines",
}

HELD_BY_TESTS_OF_THE_PACKAGE = {
    "`RuntimeError: … did not come`": "test_joining.py: test_who_does_not_come_is_named",
    "`RuntimeError: … cannot open its port`": "test_joining.py: test_a_taken_port_is_said",
    "`RuntimeError: … has lost the others in an exchange`": "test_local_sgd.py: test_who_does_not_answer_is_noticed",
    "`RuntimeError: … has ended`": "test_agreement.py: test_who_stops_alone_is_named_by_all",
}

RUNS_OF_CHAPTER_18 = {
    "All dials are zero under `mixed_float16`": "float16 underflow",
    "SGD: rate × sharpness is above 2, before training or after": "exploding gradients",
    "SGD: the update ratio is 0.1 or more, in any epoch": "decay too strong",
    "SGD: the update ratio is below 0.0001": "rate too low",
    "A layer has no gradient norm at all": "frozen by mistake",
}

reproduced: dict[str, Callable[..., None]] = {}


def reproduces(symptom: str) -> Callable[[Any], Any]:
    """Notes which symptom a test is about."""
    return lambda test: reproduced.setdefault(symptom, test)


def stepped(optimizer: Any, gradient: Callable[[float], float], start: float, steps: int) -> float:
    """Where an optimizer takes one weight."""
    weight = keras.Variable([start])
    for _ in range(steps):
        optimizer.apply([ops.convert_to_tensor([gradient(float(weight.numpy()[0]))], "float32")], [weight])
    return float(weight.numpy()[0])


def first_step(optimizer: Any, gradient: float, start: float = 0.0) -> float:
    return stepped(optimizer, lambda _: gradient, start, 1) - start


def linear(optimizer: Any) -> keras.Model:
    """A compiled model with one weight, which has gradient −2 at 0 on the batch below."""
    model = keras.Sequential([keras.Input((1,)), keras.layers.Dense(1, use_bias=False, kernel_initializer="zeros")])
    model.compile(optimizer, "mse")
    return model


BATCH = np.ones((2, 1)), np.ones((2, 1))


def test_every_symptom_has_a_test_or_a_program() -> None:
    assert len(SYMPTOMS) >= 25
    elsewhere = (SHOWN_ON_THE_PAGE_ON_KERAS, HELD_BY_TESTS_OF_THE_PACKAGE, RUNS_OF_CHAPTER_18)
    assert sorted(SYMPTOMS) == sorted([*reproduced, *itertools.chain(*elsewhere)])
    for symptom, test in HELD_BY_TESTS_OF_THE_PACKAGE.items():
        file, name = test.split(": ")
        (body,) = re.findall(rf"^def {name}\(.*?(?=^def |\Z)", (ROOT / "tests" / file).read_text(), re.M | re.DOTALL)
        assert symptom.split("… ")[1].removesuffix("`") in body, symptom
    headings = {program.heading for program in programs((ROOT / "book" / "keras.md").read_text())}
    assert set(SHOWN_ON_THE_PAGE_ON_KERAS.values()) <= headings


@reproduces("`loss: nan` from the first epoch on")
def test_one_gradient_that_is_not_finite_is_enough() -> None:
    x = np.array([[1.0], [np.nan]])
    for is_watched in (False, True):
        model = linear(keras.optimizers.SGD(0.1))
        if is_watched:
            companion.inject(model, check_finite=True)
            with pytest.raises(ValueError, match="infinite or NaN at update 1"):
                model.fit(x, x, verbose=0)
        else:
            model.fit(x, x, verbose=0)
        assert np.isfinite(model.get_weights()[0]).all() == is_watched


@reproduces("The loss grows, then shows `inf` or `nan`")
def test_numbers_overflow_at_a_rate_that_is_too_high() -> None:
    found = [stepped(keras.optimizers.SGD(rate), lambda x: x, 1.0, 15) for rate in (1.0, 1e4)]
    assert found[0] == 0.0
    assert np.isnan(found[1])


@reproduces("`loss: nan` after many good epochs")
@pytest.mark.parametrize("function", [ops.log, ops.sqrt, ops.reciprocal])
def test_derivatives_that_are_infinite_at_zero(function: Callable[[Any], Any]) -> None:
    for added in (0.0, 1e-3):
        x = tf.constant(0.0)
        with tf.GradientTape() as tape:
            tape.watch(x)
            loss = function(x + added)
        assert bool(np.isfinite(tape.gradient(loss, x))) == (added > 0)


@reproduces("`loss: nan` or `inf` in float16 only")
def test_where_float16_ends() -> None:
    ends = {dtype: float(ops.cast(300.0, dtype) * ops.cast(300.0, dtype)) for dtype in ("float16", "bfloat16")}
    assert np.isinf(ends["float16"])
    assert ends["bfloat16"] == pytest.approx(90_000, rel=0.01)


@reproduces("`ResourceExhaustedError: … OOM when allocating …`")
def test_activations_are_those_of_the_whole_batch_or_of_a_part() -> None:
    sizes = []

    class Watched(keras.layers.Layer):
        def call(self, x: Any) -> Any:
            sizes.append(x.shape[0])
            return x

    model = keras.Sequential([keras.Input((1,)), Watched(), keras.layers.Dense(1)])
    model.compile("sgd", "mse", run_eagerly=True)
    x = np.ones((8, 1))
    for parts, largest in ((None, 8), (4, 2)):
        if parts:
            companion.inject(model, micro_batches=parts)
        model.train_on_batch(x, x)
        sizes.clear()  # shapes were found out
        model.train_on_batch(x, x)
        assert max(sizes) == largest


@reproduces("`ValueError: Each worker must have one device`")
def test_a_process_with_two_devices_is_refused(monkeypatch: Any) -> None:
    place = {"cluster": {"worker": ["a:1", "b:1"]}, "task": {"type": "worker", "index": 0}}
    monkeypatch.setenv("TF_CONFIG", json.dumps(place))
    monkeypatch.setattr("companion.teams._teams", [])
    monkeypatch.setattr("companion.teams._has_run", lambda: False)
    monkeypatch.setattr("companion.teams.wait_for_all", lambda *_: None)
    seen = SimpleNamespace(num_replicas_in_sync=4)
    monkeypatch.setattr("tensorflow.distribute.MultiWorkerMirroredStrategy", lambda **_: seen)
    with pytest.raises(ValueError, match="Each worker must have one device"):
        companion.connect()


@reproduces("`optimizer.momentum = …` changes nothing after the first `fit`")
def test_momentum_is_compiled_in() -> None:
    model = linear(keras.optimizers.SGD(0.1, momentum=0.5))
    model.optimizer.build(model.trainable_variables)
    moved = []
    for momentum, again in ((0.5, False), (0.0, False), (0.0, True)):
        model.optimizer.momentum = momentum
        if again:
            model.compile(model.optimizer, "mse")
        model.layers[0].kernel.assign([[0.0]])
        model.optimizer.variables[2].assign([[1.0]])  # the velocity
        model.train_on_batch(*BATCH)
        moved.append(float(model.layers[0].kernel.numpy()[0, 0]))
    np.testing.assert_allclose(moved, [0.7, 0.7, 0.2], rtol=1e-5)


@reproduces("My optimizer counts updates and no weight moves")
def test_returned_value_is_thrown_away() -> None:
    class Planner(keras.optimizers.SGD):
        def update_step(self, gradient: Any, variable: Any, learning_rate: Any) -> Any:
            return variable - learning_rate * gradient

    optimizer = Planner(0.1)
    assert first_step(optimizer, 1.0) == 0.0
    assert int(optimizer.iterations) == 1


@reproduces("The first step does nothing")
def test_warm_up_starts_at_zero() -> None:
    warm_up = {"decay_steps": 10, "warmup_target": 0.1, "warmup_steps": 5}
    schedule = keras.optimizers.schedules.CosineDecay(0.0, **warm_up)
    assert first_step(keras.optimizers.SGD(schedule), 1.0) == 0.0


@reproduces("A frozen layer goes on training")
def test_frozen_after_compile() -> None:
    model = linear("sgd")
    model.train_on_batch(*BATCH)
    model.layers[0].trainable = False
    before = model.get_weights()[0]
    model.train_on_batch(*BATCH)
    assert (model.get_weights()[0] != before).all()
    model.compile("sgd", "mse")
    before = model.get_weights()[0]
    with pytest.warns(UserWarning, match="trainable weights"):  # nothing is left to train here
        model.train_on_batch(*BATCH)
    assert (model.get_weights()[0] == before).all()


@reproduces("`RuntimeError: Heun asks for gradients itself, …`")
def test_forgotten_inject() -> None:
    with pytest.raises(RuntimeError, match="Heun asks for gradients itself, "):
        linear(companion.Heun(0.1)).train_on_batch(*BATCH)


@reproduces("`ValueError: Unknown variable: …`")
def test_an_optimizer_knows_the_weights_that_it_was_built_with() -> None:
    layers = [keras.layers.Dense(1), keras.layers.Dense(1)]
    model = keras.Sequential([keras.Input((1,)), *layers])
    optimizer = keras.optimizers.Adam()
    layers[0].trainable = False
    model.compile(optimizer, "mse")
    model.train_on_batch(*BATCH)
    layers[0].trainable = True
    model.compile(optimizer, "mse")
    with pytest.raises(ValueError, match="Unknown variable: "):
        model.train_on_batch(*BATCH)


@reproduces("Fewer updates than batches under `mixed_float16`")
def test_overflow_skips_the_step() -> None:
    optimizer = keras.optimizers.LossScaleOptimizer(keras.optimizers.SGD(1.0), initial_scale=8.0)
    assert first_step(optimizer, float("inf"), 3.0) == 0.0
    assert float(optimizer.dynamic_scale.numpy()) == 4.0
    assert int(optimizer.inner_optimizer.iterations) == 0


@reproduces("``TypeError: This optimizer was created with a `LearningRateSchedule` …``")
def test_schedule_refuses_to_be_set() -> None:
    optimizer = keras.optimizers.SGD(keras.optimizers.schedules.ExponentialDecay(0.1, 10, 0.9))
    with pytest.raises(TypeError, match="This optimizer was created with a `LearningRateSchedule`"):
        optimizer.learning_rate = 0.01


@reproduces("SGD: the loss explodes within a few steps")
def test_limit_of_stability() -> None:
    curvature, ends = 10.0, {}
    for rate in (0.19, 0.21):  # 2/10 is the limit
        ends[rate] = abs(stepped(keras.optimizers.SGD(rate), lambda x: curvature * x, 1.0, 40))
    assert ends[0.19] < 0.1 < 10 < ends[0.21]


@reproduces("SGD: it explodes since `nesterov=True`")
def test_nesterov_bears_less() -> None:
    ends = [
        abs(stepped(keras.optimizers.SGD(rate, momentum=0.9, nesterov=nesterov), lambda x: x, 1.0, 60))
        for rate, nesterov in ((2.5, False), (2.5, True), (2.5 / 3, True))
    ]
    assert max(ends[0], ends[2]) < 1 < 1000 < ends[1]


@reproduces("SGD: it explodes, or jumps about, since momentum was switched on")
def test_momentum_multiplies_the_rate() -> None:
    optimizer = keras.optimizers.SGD(0.01, momentum=0.9)
    before = stepped(optimizer, lambda _: 1.0, 0.0, 60)
    weight = keras.Variable([0.0])
    fast = keras.optimizers.SGD(0.01, momentum=0.9)
    for _ in range(61):
        fast.apply([ops.ones(1)], [weight])
    assert float(weight.numpy()[0]) - before == pytest.approx(-0.1, rel=0.01)


@reproduces("The loss hovers and falls as soon as the rate is cut")
def test_jumps_from_side_to_side() -> None:
    def slope(x: float) -> float:  # of √(1 + x²): curvature 1 at the bottom, and the limit of the rate 2
        return x / np.sqrt(1 + x * x)

    hovering = stepped(keras.optimizers.SGD(3.0), slope, 0.1, 60)
    further = stepped(keras.optimizers.SGD(3.0), slope, hovering, 1)
    assert abs(hovering) > 0.5
    assert further == pytest.approx(-hovering, rel=1e-3)
    assert abs(stepped(keras.optimizers.SGD(1.0), slope, hovering, 20)) < 1e-3


@reproduces("In a GAN both losses swing, wider and wider")
def test_rotation() -> None:
    radii = []
    for optimizer in (keras.optimizers.SGD(0.3), companion.OptimisticSGD(0.3)):
        players = keras.Variable([1.0, 0.0])
        for _ in range(60):
            x, y = players.numpy()
            optimizer.apply([ops.convert_to_tensor([y, -x])], [players])
        radii.append(float(np.linalg.norm(players.numpy())))
    assert radii[1] < 0.5 < 5 < radii[0]


@reproduces("With `LocalSGD` the loss stops falling too early")
def test_drift() -> None:
    curvatures, minima = np.array([1.0, 4.0]), np.array([0.0, 1.0])
    best = (curvatures * minima).sum() / curvatures.sum()

    def resting_place(every: int) -> float:
        theta = 0.0
        for _ in range(200):
            workers = np.full(2, theta)
            for _ in range(every):
                workers -= 0.1 * curvatures * (workers - minima)
            theta = workers.mean()
        return theta

    assert resting_place(1) == pytest.approx(best)
    assert resting_place(10) < best - 0.1


@reproduces("Fewer updates in an epoch than batches / N, rounded up")
def test_the_last_window_stays_open() -> None:
    keras_own = keras.optimizers.SGD(0.1, gradient_accumulation_steps=4)
    stepped(keras_own, lambda _: 1.0, 0.0, 10)
    assert int(keras_own.iterations) == 2
    ours = companion.GradientAccumulation(keras.optimizers.SGD(0.1), 4)
    stepped(ours, lambda _: 1.0, 0.0, 10)
    ours.flush()
    assert int(ours.iterations) == 3


@reproduces("The schedule begins anew")
def test_new_optimizer_counts_from_zero() -> None:
    def optimizer() -> Any:
        return keras.optimizers.SGD(keras.optimizers.schedules.ExponentialDecay(1.0, 1, 0.5))

    model = linear(optimizer())
    for _ in range(3):
        model.train_on_batch(*BATCH)
    assert float(model.optimizer.learning_rate) == 0.125
    model.compile(optimizer(), "mse")  # weights stay
    assert float(model.optimizer.learning_rate) == 1.0


@reproduces("Memory grows instead of falling")
def test_sums_are_as_large_as_the_weights() -> None:
    weight = keras.Variable(ops.zeros((20, 30)))
    sizes = []
    for optimizer in (keras.optimizers.SGD(), companion.GradientAccumulation(keras.optimizers.SGD(), 4)):
        optimizer.build([weight])
        sizes.append(sum(np.prod(variable.shape) for variable in optimizer.variables))
    assert sizes[1] - sizes[0] >= 600


@reproduces("With BatchNorm, parts are not the whole")
def test_statistics_of_parts() -> None:
    x = np.array([[0.0], [1.0], [10.0], [14.0]], "float32")
    layer = keras.layers.BatchNormalization()
    whole = layer(x, training=True).numpy()
    parts = np.concatenate([layer(part, training=True).numpy() for part in (x[:2], x[2:])])
    assert abs(whole - parts).max() > 0.3


@reproduces("SGD: a step is longer than rate × `clipnorm`")
def test_decay_comes_after_clipping() -> None:
    optimizer = keras.optimizers.SGD(1.0, clipnorm=0.1, weight_decay=0.5)
    assert first_step(optimizer, 0.0, start=10.0) == pytest.approx(-5.0)


@reproduces("Adam: an L2 penalty hardly shrinks some weights")
def test_adam_divides_the_penalty() -> None:
    steps = [first_step(keras.optimizers.Adam(0.1), strength * 10.0, start=10.0) for strength in (0.01, 1.0)]
    assert steps == pytest.approx([-0.1, -0.1], rel=1e-4)


@reproduces("AdamW shrinks weights though nobody asked")
def test_default_decay() -> None:
    assert keras.optimizers.AdamW().weight_decay == 0.004
    assert first_step(keras.optimizers.AdamW(1.0), 0.0, start=10.0) == pytest.approx(-0.04, rel=1e-4)


@reproduces("Adam: small gradients move less than in PyTorch")
def test_place_of_epsilon() -> None:
    gradient = 1e-6
    keras_step = -first_step(keras.optimizers.Adam(1.0), gradient)
    assert keras_step == pytest.approx(0.2403, abs=2e-4)
    assert gradient / (gradient + 1e-8) == pytest.approx(0.990, abs=1e-3)  # PyTorch's, after the correction


@reproduces("With BatchNorm, a schedule-free model evaluates worse than it trains")
def test_statistics_are_those_of_another_point() -> None:
    keras.utils.set_random_seed(0)
    x = 2 + np.random.default_rng(0).normal(size=(32, 2))
    y = np.sin(x[:, :1])
    layers = [keras.layers.Dense(8, "tanh"), keras.layers.BatchNormalization(momentum=0.5), keras.layers.Dense(1)]
    model = keras.Sequential([keras.Input((2,)), *layers])
    model.compile(companion.ScheduleFreeAdamW(0.1), "mse", run_eagerly=True)
    with pytest.warns(UserWarning, match="gathers its statistics"):
        model.fit(x, y, 16, epochs=10, verbose=0, callbacks=[companion.SwapAverage()])
    before = model.evaluate(x, y, verbose=0)
    for _ in range(40):
        model(x, training=True)
    assert model.evaluate(x, y, verbose=0) < 0.8 * before


@reproduces("With `merging.median` or a vote, a class is never learned")
def test_median_leaves_out_what_one_knows() -> None:
    rows, weights = [ops.convert_to_tensor([[0.0], [0.0], [9.0]])], ops.ones(3)
    assert float(companion.merging.median(rows, weights)[0][0]) == 0.0
    assert float(companion.merging.weighted_mean(rows, weights)[0][0]) == 3.0


@reproduces("Two runs that should be equal differ")
def test_a_seed_makes_runs_equal() -> None:
    runs = []
    for seed in (None, None, 1, 1):
        if seed:
            keras.utils.set_random_seed(seed)
        model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(2)])
        model.compile("sgd", "mse", run_eagerly=True)
        model.fit(np.eye(3), np.ones((3, 2)), batch_size=1, verbose=0)
        runs.append(model.get_weights()[0])
    assert (runs[0] != runs[1]).any()
    assert (runs[2] == runs[3]).all()


@reproduces("Only the first step is slow")
@reproduces("Every step is slow, with `run_eagerly=True`")
def test_python_runs_a_layer_once_or_at_every_step() -> None:
    calls: dict[bool, list[int]] = {False: [], True: []}

    class Counted(keras.layers.Layer):
        def call(self, x: Any) -> Any:
            calls[self.eager].append(1)
            return x

    for eager, steps in calls.items():
        layer = Counted()
        layer.eager = eager
        model = keras.Sequential([keras.Input((1,)), layer, keras.layers.Dense(1)])
        model.compile("sgd", "mse", run_eagerly=eager)
        model.train_on_batch(*BATCH)
        steps.clear()
        for _ in range(3):
            model.train_on_batch(*BATCH)
    assert {eager: len(steps) for eager, steps in calls.items()} == {False: 0, True: 3}


@reproduces("An `Embedding` with many rows is slow under Adam")
def test_adam_goes_through_rows_that_are_not_in_the_batch() -> None:
    for optimizer, goes_through_all in ((keras.optimizers.Adam(0.1), True), (keras.optimizers.SGD(0.1), False)):
        table, moved = keras.Variable(np.zeros((4, 2))), []
        for row in (1, 2):
            before = table.numpy()
            rows = tf.IndexedSlices(tf.ones((1, 2)), tf.constant([row]), tf.constant([4, 2]))
            optimizer.apply([rows], [table])
            moved.append(set(np.flatnonzero((table.numpy() != before).any(1)).tolist()))
        assert moved == [{1}, {1, 2} if goes_through_all else {2}]


@reproduces("An `Embedding` with many rows is slow under SGD, too")
def test_an_embedding_reads_its_whole_table() -> None:
    layer = keras.layers.Embedding(50, 2)
    layer.build()
    read = tf.function(layer.call).get_concrete_function(tf.TensorSpec((3,), "int32"))
    operations = {operation.type for operation in read.graph.get_operations()}
    assert "ReadVariableOp" in operations
    assert "ResourceGather" not in operations
    of_rows = tf.function(lambda ids: tf.gather(layer.embeddings.value, ids))
    graph = of_rows.get_concrete_function(tf.TensorSpec((3,), "int32")).graph
    assert "ResourceGather" in {operation.type for operation in graph.get_operations()}


# ---- the loss stands still: what the dials say ----------------------------------------------------------------------


def dials(layers: list[Any], x: Any, y: Any, **fit: Any) -> dict[str, float]:
    """What `fit` shows of the third epoch."""
    keras.utils.set_random_seed(1)
    model = keras.Sequential([keras.Input((x.shape[1],)), *layers])
    model.compile(keras.optimizers.SGD(0.1), "mse", jit_compile=False)
    companion.inject(model, 4, diagnostics=("gradient_norm_per_layer", "noise_scale"))
    return {name: values[-1] for name, values in model.fit(x, y, 32, epochs=3, verbose=0, **fit).history.items()}


INPUTS = np.random.default_rng(0).normal(size=(320, 4))
TARGETS = INPUTS[:, :1] + 1


def test_what_the_runs_of_chapter_18_show() -> None:
    def printed(marker: str) -> str:
        (cell,) = (cell for cell in notebook("18").cells if cell.cell_type == "code" and marker in cell.source)
        return "".join(out.get("text") or out["data"]["text/plain"] for out in cell.outputs)

    dials = {}  # of each run in the first and the last epoch: norm, update ratio, noise scale, hλ
    for line in printed("# @title The dials of all runs").splitlines()[1:]:
        name, *found = re.split(r" {2,}", line)
        dials[re.sub(r" \(\d\)", "", name)] = [
            [float(value.replace("∞", "inf").replace("–", "nan")) for value in re.split(r"\s→\s", pair)]
            for pair in found
        ]
    assert all(max(dials[run][1]) < 1e-4 for run in ("rate too low", "float16 underflow"))
    assert min(dials["healthy"][1]) > 1e-4
    assert dials["float16 underflow"][0] == [0]
    norm, ratio, *_ = dials["decay too strong"]
    assert norm[-1] < norm[0]
    assert ratio[-1] > ratio[0]
    assert min(ratio[-1], dials["rate too high"][1][0]) >= 0.1 > max(dials["healthy"][1])
    assert min(dials[run][3][0] for run in ("exploding gradients", "rate too high")) > 2 > max(dials["healthy"][3])
    layers = dict(re.findall(r"^(.+): (.+)$", printed("the smallest number of float16"), re.M))
    assert "hidden" in layers["healthy"]
    assert "hidden" not in layers["frozen by mistake"]


def test_the_list_is_that_of_chapter_18() -> None:
    """The rows have the order of the chapter's list, one for each of its rows."""
    telling = "exactly zero", "missing|has no", "sharpness", "0.1 or", "below 0.0001", "only a few", "the batch"

    def what(row: str) -> str:
        return next((key for key in telling if re.search(key, row)), "zero" if "zero" in row else "vanishing")

    page = (ROOT / "book" / "symptoms.md").read_text()
    group = page.split("(symptoms-stands-still)=")[1].split("(symptoms-stop)=")[0]
    shown = re.findall(r"^\| (?!you see|---)(.*?) \|", group, re.MULTILINE)
    listed = re.findall(r"^\| \d \| (.*? \| .*?) \|", markdown("18"), re.MULTILINE)
    assert len(listed) == 9
    assert [what(row) for row in shown] == [what(row) for row in listed]
    assert len({what(row) for row in listed}) == 9


@reproduces("A layer's gradient norm is exactly zero")
def test_dead_units_pass_nothing_back() -> None:
    hidden = keras.layers.Dense(8, "relu", bias_initializer=keras.initializers.Constant(-20.0), name="hidden")
    found = dials([hidden, keras.layers.Dense(1, name="top")], INPUTS, TARGETS)
    assert found["gradient_norm/hidden"] == 0 < found["gradient_norm/top"]


@reproduces("The gradient norm shrinks severalfold from layer to layer, downwards")
def test_a_gradient_vanishes_in_sigmoids() -> None:
    small = {"kernel_initializer": keras.initializers.RandomNormal(stddev=0.1)}
    layers = [keras.layers.Dense(8, "sigmoid", name=f"h{depth}", **small) for depth in range(3)]
    found = dials([*layers, keras.layers.Dense(1, name="top")], INPUTS, TARGETS)
    norms = [found[f"gradient_norm/{name}"] for name in ("h0", "h1", "h2", "top")]
    assert all(below < above / 3 for below, above in itertools.pairwise(norms))


@reproduces("The noise scale is far above the batch size, and the loss stands still")
def test_wrong_labels_contradict_each_other() -> None:
    wrong = np.random.default_rng(1).normal(size=TARGETS.shape)
    right, found = (dials([keras.layers.Dense(1)], INPUTS, y)["noise_scale"] for y in (TARGETS, wrong))
    assert right < 32
    assert found > 5 * right


@reproduces("The noise scale is only a few examples, in every epoch")
def test_parts_of_a_sorted_batch_are_alike() -> None:
    kinds = np.repeat(np.arange(10.0), 32)[:, None] - 4.5  # a batch of each
    x = np.tanh(kinds * [[1.0, -0.5, 0.3, 0.2]])
    found = [dials([keras.layers.Dense(1)], x, kinds, shuffle=shuffle)["noise_scale"] for shuffle in (True, False)]
    assert found[1] < 1 < found[0]
