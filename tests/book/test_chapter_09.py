"""Chapter 09: the data under its figures, and the tests that hold its sentences."""

from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf
from scipy.linalg import expm

import companion
from companion import gradient_flow
from tests.book.reading import figure_data, line, notebook
from tests.kit.cases import wrong

CHAPTER = "09"


# ---- figures --------------------------------------------------------------------------------------------------------


CURVATURE, START = np.diag([1.0, 4.0]), np.array([2.0, 1.0])


def test_one_step_of_heun_and_of_the_flow() -> None:
    (axes,) = figure_data(CHAPTER)[1]
    labels = ("flow", "first slope", "second slope", "Heun", "two halves")
    h, to = 0.2, {label: np.array(line(axes, label)).T[-1] for label in labels}
    probe, half = START - h * CURVATURE @ START, START - h / 2 * CURVATURE @ START
    np.testing.assert_allclose(to["flow"], expm(-h * CURVATURE) @ START, atol=1e-5)
    np.testing.assert_allclose(to["first slope"], probe, atol=1e-5)
    np.testing.assert_allclose(to["second slope"], START - h * CURVATURE @ probe, atol=1e-5)
    np.testing.assert_allclose(to["Heun"], (to["first slope"] + to["second slope"]) / 2, atol=1e-5)
    np.testing.assert_allclose(to["two halves"], half - h / 2 * CURVATURE @ half, atol=1e-5)
    np.testing.assert_allclose(np.array(line(axes, "between")).T, [to["first slope"], to["second slope"]], atol=1e-5)


@pytest.mark.claim("For long steps two half steps of Euler are better; for short steps Heun is better.", chapter="09")
@pytest.mark.parametrize(("h", "winner"), [(0.3, "euler"), (0.2, "heun"), (0.1, "heun"), (0.01, "heun")])
def test_who_ends_closer_to_the_flow_for_two_gradients(h: float, winner: str) -> None:
    def off(method: str, size: float, steps: int) -> float:
        end = gradient_flow.integrate(lambda theta: CURVATURE @ theta, START, size, steps, method)[-1]
        return float(np.linalg.norm(end - expm(-h * CURVATURE) @ START))

    distances = {"heun": off("heun", h, 1), "euler": off("euler", h / 2, 2)}
    assert min(distances, key=distances.__getitem__) == winner
    assert distances["heun"] < off("euler", h, 1)


def test_two_masks_and_one() -> None:
    """Each net's answer is one that Keras's dropout gives; two of them have the mean that the figure says."""
    (axes,) = figure_data(CHAPTER)[2]
    labels = [entry["label"].split(": ") for entry in axes["lines"] if ": " in entry["label"]]
    slopes = {name: float(value) for name, value in labels if "mean" not in name}
    means = {name: value for name, value in labels if "mean" in name}
    weights, possible = tf.Variable([1.0, 1.0]), set()
    for seed in range(30):
        with tf.GradientTape() as tape:
            inputs = keras.layers.Dropout(0.5, seed=seed)(tf.constant([[3.0, 2.0]]), training=True)
            loss = tf.reduce_sum(inputs * weights)
        possible.add(tuple(tape.gradient(loss, weights).numpy()))
    for row in ("two masks", "one mask"):
        answers = [tuple(slopes[f"{row}, {question}, {w}"] for w in "uv") for question in ("first", "second")]
        assert set(answers) <= possible
        assert (answers[0] == answers[1]) == (row == "one mask")
        assert means[f"{row}, mean"] == "({:g}, {:g})".format(*np.mean(answers, axis=0))
    dropped = [entry for entry in axes["lines"] if entry["label"] == "dropped"]
    assert len(dropped) == sum(value == 0 for value in slopes.values())


def test_gradients_a_step_are_those_of_the_literature() -> None:
    outputs = [out for cell in notebook(CHAPTER).cells for out in cell.get("outputs", [])]
    texts = [out.get("data", {}).get("text/plain", "") for out in outputs]
    (table,) = (text for text in texts if text.startswith("method"))
    found = {name: costs for name, *costs in map(str.split, table.splitlines()[1:])}
    known = {"Euler": ["1", "–"], "Heun": ["2", "–"], "RK23": ["3", "4"], "RK4": ["4", "–"], "RK45": ["6", "7"]}
    assert found == known


@pytest.mark.claim(
    "Each step of gradient descent leads away from the solution of this game, each step of extragradient towards it.",
    chapter="09",
)
def test_the_game() -> None:
    (axes,) = figure_data(CHAPTER)[0]
    h, k = 0.5, np.arange(13)  # the game turns a + ib; a step multiplies by one complex number
    for name, factor in (("gradient descent", 1 + h * 1j), ("extragradient", 1 + h * 1j * (1 + h * 1j))):
        a, b = line(axes, name)
        np.testing.assert_allclose(a + 1j * b, factor**k, atol=1e-4)
        assert (np.diff(np.hypot(a, b)) > 0).all() == (abs(factor) > 1)


# ---- a loss that is linear in the weights ---------------------------------------------------------------------------


class TwoPasses(keras.Sequential):
    """Heun as two passes, one after the other: each has its own noise, and `apply` is not called."""

    def train_step(self, data: Any) -> Any:
        x, y, *_ = data
        variables, h = self.trainable_variables, self.optimizer.learning_rate
        answers = []
        for _ in range(2):
            with tf.GradientTape() as tape:
                predicted = self(x, training=True)
                loss = self.compute_loss(x, y, predicted)
            logs = self.compute_metrics(x, y, predicted)
            answers.append(tape.gradient(loss, variables))
            for variable, answer in zip(variables, answers[-1], strict=True):
                variable.assign_sub(h * answer if len(answers) == 1 else h * answer / 2)
        for variable, answer in zip(variables, answers[0], strict=True):
            variable.assign_add(h * answer / 2)
        return logs


BATCH = np.linspace(-1, 2, 32).reshape(4, 8).astype("float32"), np.zeros((4, 1), "float32")


def model(kind: type = keras.Sequential, *layers: Any, **options: Any) -> Any:
    keras.utils.set_random_seed(7)
    return kind([keras.Input((8,)), *layers, keras.layers.Dense(1, **options)])


def step(model: Any, optimizer: Any, loss: Any = "mse", **options: Any) -> np.ndarray:
    """The weights after one step."""
    model.compile(optimizer, loss, run_eagerly=True, **options)
    if isinstance(optimizer, companion.InjectedOptimizer) and type(model) is keras.Sequential:
        optimizer.inject(model)
    model.train_on_batch(*BATCH)
    return np.concatenate([np.ravel(variable) for variable in model.trainable_variables])


def linear(y_true: Any, y_pred: Any) -> Any:
    return y_pred


def heun_by_hand(model: Any, h: float) -> np.ndarray:
    """The weights of a model of one dense layer after a step of Heun on the squared error, in float64."""
    start = np.concatenate([np.ravel(weight) for weight in model.get_weights()]).astype(float)
    x, y = (part.astype(float) for part in BATCH)

    def gradient(theta: np.ndarray) -> np.ndarray:
        error = 2 * (x @ theta[:8, None] + theta[8] - y) / len(x)
        return np.append(x.T @ error, error.sum())

    return gradient_flow.integrate(gradient, start, h, 1, "heun")[-1]


@pytest.mark.claim(
    "Heun's second question must be about the same batch and the same dropout mask as its first.", chapter="09"
)
@pytest.mark.parametrize("kind", [keras.Sequential, wrong(TwoPasses, why="a mask for each pass")])
def test_on_a_linear_loss_heun_is_euler(kind: type) -> None:
    optimizer = companion.Heun(0.5) if kind is keras.Sequential else keras.optimizers.SGD(0.5)
    dropout = keras.layers.Dropout
    euler = step(model(keras.Sequential, dropout(0.5, seed=1)), keras.optimizers.SGD(0.5), linear)
    np.testing.assert_array_equal(step(model(kind, dropout(0.5, seed=1)), optimizer, linear), euler)


@pytest.mark.claim("On plain dense layers two passes are Heun's method, to rounding.", chapter="09")
@pytest.mark.parametrize("kind", [keras.Sequential, TwoPasses])
def test_without_noise_two_passes_are_heun(kind: type) -> None:
    optimizer = companion.Heun(0.1) if kind is keras.Sequential else keras.optimizers.SGD(0.1)
    found = step(model(kind), optimizer)
    np.testing.assert_allclose(found, heun_by_hand(model(), 0.1), atol=1e-6)


@pytest.mark.claim("A constraint holds at the end of a step", chapter="09")
@pytest.mark.parametrize("kind", [keras.Sequential, wrong(TwoPasses, why="goes past the optimizer")])
def test_constraint_holds_at_the_end_of_a_step(kind: type) -> None:
    optimizer = companion.Heun(2.0) if kind is keras.Sequential else keras.optimizers.SGD(2.0)
    trained = model(kind, kernel_constraint="non_neg", kernel_initializer="ones")
    step(trained, optimizer, linear)
    assert trained.layers[-1].kernel.numpy().min() >= 0
    assert int(optimizer.iterations) == 1


# ---- no trace of the second question --------------------------------------------------------------------------------


def traces(kind: type, optimizer: Any) -> list[np.ndarray]:
    keras.utils.set_random_seed(7)  # before the layers draw their seeds
    layers = keras.layers
    trained = model(kind, layers.Dense(6), layers.BatchNormalization(), layers.Dropout(0.5, seed=2))
    trained.compile(optimizer, "mse", metrics=["mae"], run_eagerly=True)
    if isinstance(optimizer, companion.InjectedOptimizer):
        optimizer.inject(trained)
    logs = trained.train_on_batch(*BATCH, return_dict=True)
    moved = [variable.numpy() for variable in trained.non_trainable_variables]
    return [np.array(list(logs.values())), *moved]


@pytest.mark.claim(
    "After one RK4 step the logs, the BatchNorm statistics and the seeds are those of one SGD step.", chapter="09"
)
@pytest.mark.parametrize("kind", [keras.Sequential, wrong(TwoPasses, why="both passes leave their traces")])
def test_only_the_first_question_leaves_a_trace(kind: type) -> None:
    optimizer = companion.RungeKutta(0.1, "rk4") if kind is keras.Sequential else keras.optimizers.SGD(0.1)
    for found, expected in zip(
        traces(kind, optimizer), traces(keras.Sequential, keras.optimizers.SGD(0.1)), strict=True
    ):
        np.testing.assert_allclose(found, expected, rtol=1e-5)


@pytest.mark.claim(
    "So the second question is asked at $\\theta - h k_1$ while the weights still hold $\\theta$.", chapter="09"
)
def test_weights_hold_still_between_the_questions() -> None:
    seen: list[tuple[float, float]] = []

    class Watching(keras.layers.Layer):
        def build(self, shape: Any) -> None:
            self.weight = self.add_weight(shape=(), initializer="ones")

        def call(self, inputs: Any) -> Any:
            if held and tf.executing_eagerly():
                seen.append((float(self.weight.value), float(held[0])))
            return inputs * self.weight

    held: list[Any] = []
    watched = keras.Sequential([keras.Input((1,)), Watching()])
    watched.compile(companion.Heun(0.25), "mse", run_eagerly=True)
    companion.inject(watched)
    held.append(watched.trainable_variables[0].value)  # the variable itself, whatever a scope says
    watched.train_on_batch(np.ones((1, 1)), np.zeros((1, 1)))
    assert {at for at, _ in seen} == {1.0, 0.5}
    assert {value for _, value in seen} == {1.0}
    assert float(watched.trainable_variables[0].numpy()) == 0.625


# ---- what a copy forgets --------------------------------------------------------------------------------------------


@pytest.mark.claim(
    "A clone or a loaded file is a model of Keras's class, with Keras's step, and its optimizer would hear one answer "
    "again.",
    chapter="09",
)
@pytest.mark.parametrize("copy", ["clone", "load"])
def test_a_copy_is_not_injected_and_says_so(copy: str, tmp_path: Any) -> None:
    trained = model()
    step(trained, companion.Heun(0.1))
    if copy == "clone":
        other = keras.models.clone_model(trained)
        other.compile(companion.Heun(0.1), "mse")
    else:
        trained.save(tmp_path / "model.keras")
        other = keras.models.load_model(tmp_path / "model.keras")
        assert int(other.optimizer.iterations) == 1
    before = other.get_weights()
    with pytest.raises(RuntimeError, match="inject"):
        other.fit(*BATCH, verbose=0)
    for now, then in zip(other.get_weights(), before, strict=True):
        np.testing.assert_array_equal(now, then)


@pytest.mark.claim(
    "Compiling an injected model again or changing its weights leaves the step where it is.", chapter="09"
)
@pytest.mark.parametrize("change", ["compile", "load"])
def test_an_injection_survives_compiling_and_loading_weights(change: str, tmp_path: Any) -> None:
    trained = model()
    step(trained, companion.Heun(0.1))
    if change == "compile":
        trained.compile(companion.Heun(0.2), "mse", run_eagerly=True)
    else:
        model().save_weights(tmp_path / "model.weights.h5")
        trained.load_weights(tmp_path / "model.weights.h5")
    expected = heun_by_hand(trained, 0.2 if change == "compile" else 0.1)
    trained.train_on_batch(*BATCH)
    found = np.concatenate([np.ravel(weight) for weight in trained.get_weights()])
    np.testing.assert_allclose(found, expected, atol=1e-5)


@keras.saving.register_keras_serializable(package="chapter09")
class Injected(companion.InjectedModel, keras.Sequential):
    pass


@pytest.mark.claim("Or put the step into the class, with a mixin, and every copy has it", chapter="09")
def test_a_mixin_survives_a_file(tmp_path: Any) -> None:
    trained = model(Injected)
    step(trained, companion.Heun(0.1))
    trained.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    for each in (trained, loaded):
        each.fit(*BATCH, verbose=0)
    assert int(loaded.optimizer.iterations) == 2
    for now, then in zip(loaded.get_weights(), trained.get_weights(), strict=True):
        np.testing.assert_array_equal(now, then)


@pytest.mark.claim("`inject` refuses a model that has its own `train_step`.", chapter="09")
def test_a_model_with_its_own_step_is_refused() -> None:
    trained = model(TwoPasses)
    trained.compile(companion.Heun(0.1), "mse")
    with pytest.raises(ValueError, match="train_step"):
        companion.inject(trained)


# ---- on a quadratic -------------------------------------------------------------------------------------------------


@pytest.mark.claim(
    "In general a step multiplies the weight by $1 - h\\lambda + (h\\lambda)^2/2$, which is 1 again at "
    "$h\\lambda = 2$ and larger beyond.",
    chapter="09",
)
@pytest.mark.parametrize("z", [0.1, 0.5, 1.0, 2.0, 2.5])
def test_factor_of_a_step_on_a_quadratic(z: float) -> None:
    trained = keras.Sequential([keras.Input((1,)), keras.layers.Dense(1, None, False, "ones")])
    trained.compile(companion.Heun(z / 2), "mse")  # of curvature 2
    companion.inject(trained).train_on_batch(np.ones((1, 1)), np.zeros((1, 1)))
    assert trained.layers[0].kernel.numpy()[0, 0] == pytest.approx(1 - z + z**2 / 2, abs=1e-6)


@pytest.mark.claim("Heun can take no longer steps than gradient descent.", chapter="09")
def test_heun_takes_no_longer_steps() -> None:
    for factor in (lambda z: 1 - z, lambda z: 1 - z + z**2 / 2):
        z = np.linspace(0, 4, 400_001)
        assert z[np.abs(factor(z)) <= 1 + 1e-12].max() == pytest.approx(2.0, abs=1e-4)
