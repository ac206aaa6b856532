"""Chapter 03: the data under its figures, and the tests that hold its sentences."""

import re
import warnings
from collections.abc import Callable
from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import ops
from keras.optimizers.schedules import InverseTimeDecay

import companion
from companion import datasets
from tests.book.reading import figure_data, line, notebook
from tests.kit.cases import wrong

CHAPTER = "03"


def walk(
    optimizer: keras.optimizers.Optimizer,
    oracle: Callable[[np.ndarray], Any],
    start: Any,
    steps: int,
    dtype: str = "float64",
) -> np.ndarray:
    weight = keras.Variable(start, dtype=dtype)
    path = [weight.numpy()]
    for _ in range(steps):
        optimizer.apply([np.asarray(oracle(path[-1]), dtype)], [weight])
        path.append(weight.numpy())
    return np.array(path)


# ---- known-wrong variants --------------------------------------------------------------------------------------------


class AdamWithoutBiasCorrection(companion.Adam):
    def update_step(self, gradient: Any, variable: Any, learning_rate: Any) -> None:
        m = self.momentums[self._get_variable_index(variable)]
        v = self.velocities[self._get_variable_index(variable)]
        self.assign(m, self.beta_1 * m + (1 - self.beta_1) * gradient)
        self.assign(v, self.beta_2 * v + (1 - self.beta_2) * gradient**2)
        self.assign_sub(variable, ops.cast(learning_rate, variable.dtype) * m / (ops.sqrt(v) + self.epsilon))


class NesterovWithSignError(companion.Momentum):
    def update_step(self, gradient: Any, variable: Any, learning_rate: Any) -> None:
        if not self.nesterov:
            return super().update_step(gradient, variable, learning_rate)
        h = ops.cast(learning_rate, variable.dtype)
        v = self.velocities[self._get_variable_index(variable)]
        self.assign(v, self.momentum * v - h * gradient)
        self.assign_add(variable, self.momentum * v + h * gradient)


class AdamWithDecayThroughTheSlot(companion.Adam):
    def __init__(self, *args: Any, weight_decay: float = 0.0, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.penalty = weight_decay

    def update_step(self, gradient: Any, variable: Any, learning_rate: Any) -> None:
        super().update_step(gradient + self.penalty * variable, variable, learning_rate)


# ---- figures ---------------------------------------------------------------------------------------------------------


def test_bars_are_sums_of_gradients() -> None:
    powers = 0.9 ** np.arange(30)
    for axes, sign, end in zip(figure_data(CHAPTER)[0], (1, -1), (10, 1 / 1.9), strict=True):
        gradients = np.resize([1.0, sign], 30)
        expected = [gradients[: k + 1][::-1] @ powers[: k + 1] for k in range(30)]
        np.testing.assert_allclose([height for _, height in axes["bars"]], expected, rtol=1e-4)
        np.testing.assert_array_equal(line(axes, "SGD")[1], gradients)
        assert abs(expected[-1]) == pytest.approx(end, rel=0.05)


def test_ravine_paths_are_the_closed_forms() -> None:
    """Each coordinate of each rule is a linear recurrence of (θ, v): powers of a 2 × 2 matrix give its path."""
    panels = figure_data(CHAPTER)[1]
    for axes, (name, beta) in zip(panels, [("SGD", 0.0), ("momentum 0.5", 0.5), ("momentum 0.9", 0.9)], strict=True):
        for found, curvature, start in zip(line(axes, name), (1.0, 25.0), (10.0, 1.5), strict=True):
            velocity = np.array([-0.075 * curvature, beta])  # the new v from (θ, v)
            step = np.array([np.add([1.0, 0.0], velocity), velocity])
            expected = [(np.linalg.matrix_power(step, k) @ [start, 0.0])[0] for k in range(31)]
            np.testing.assert_allclose(found, expected, atol=1e-5 * start)
        assert len(axes["contours"]) == 9
        for contour in axes["contours"]:
            height = 0.5 * np.square(contour["points"]) @ [1.0, 25.0]
            np.testing.assert_allclose(height, contour["level"], rtol=0.02)


def test_adam_steps_are_the_closed_forms() -> None:
    (axes,) = figure_data(CHAPTER)[2]
    t = np.arange(1, 61)
    closed_form = (1 - 0.9**t) / np.sqrt(1 - 0.999**t)
    np.testing.assert_array_equal(line(axes, "with correction")[0], t)
    np.testing.assert_allclose(line(axes, "with correction")[1], 1, atol=2e-5)
    np.testing.assert_allclose(line(axes, "without correction")[1], closed_form, rtol=2e-5)
    np.testing.assert_allclose(line(axes, "closed form")[1], closed_form[::4], rtol=1e-5)


class NumpyRun:
    """The run of the checkpoint section in float64, from the formulas: a network of two layers, and Adam."""

    def __init__(self) -> None:
        glorot = keras.initializers.GlorotUniform
        kernels = glorot(seed=1)((64, 32)), glorot(seed=2)((32, 10))
        first, second = (np.array(ops.convert_to_numpy(kernel), "float64") for kernel in kernels)
        self.weights = [first, np.zeros(32), second, np.zeros(10)]
        self.m = self.v = [np.zeros_like(weight) for weight in self.weights]
        self.t = 0
        self.data = datasets.digits("float64")

    def loss_and_gradients(self, x: np.ndarray, y: np.ndarray) -> tuple[float, list[np.ndarray]]:
        first, first_bias, second, second_bias = self.weights
        before = x @ first + first_bias
        hidden = np.maximum(before, 0)
        logits = hidden @ second + second_bias
        shifted = logits - logits.max(axis=1, keepdims=True)
        log_probabilities = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
        rows = np.arange(len(y))
        error = np.exp(log_probabilities)
        error[rows, y] -= 1
        error /= len(y)
        back = (error @ second.T) * (before > 0)
        return -log_probabilities[rows, y].mean(), [x.T @ back, back.sum(0), hidden.T @ error, error.sum(0)]

    def train(self, first: int, last: int) -> np.ndarray:
        losses = []
        for number in range(first, last):
            rows = np.arange(96) + 96 * number % 1440
            _, gradients = self.loss_and_gradients(self.data.x_train[rows], self.data.y_train[rows])
            h = 0.03 / (1 + self.t / 30)
            self.t += 1
            self.m = [0.9 * m + 0.1 * g for m, g in zip(self.m, gradients, strict=True)]
            self.v = [0.999 * v + 0.001 * g**2 for v, g in zip(self.v, gradients, strict=True)]
            alpha = h * np.sqrt(1 - 0.999**self.t) / (1 - 0.9**self.t)
            moved = zip(self.weights, self.m, self.v, strict=True)
            self.weights = [w - alpha * m / (np.sqrt(v) + 1e-7) for w, m, v in moved]
            losses.append(self.loss_and_gradients(self.data.x_train, self.data.y_train)[0])
        return np.array(losses)

    def forget(self, lost: str) -> None:
        if "slots" in lost:
            self.m = self.v = [np.zeros_like(weight) for weight in self.weights]
        if "counter" in lost:
            self.t = 0


@pytest.mark.parametrize("lost", ["nothing", "slots", "counter", "slots and counter"])
def test_resumed_runs_are_those_of_numpy(lost: str) -> None:
    (axes,) = figure_data(CHAPTER)[3]
    run = NumpyRun()
    before = run.train(0, 120)
    run.forget(lost)
    expected = np.concatenate([before[-1:], run.train(120, 180)])
    updates, found = line(axes, lost)
    np.testing.assert_array_equal(updates, np.arange(120, 181))
    np.testing.assert_allclose(found, expected, rtol=5e-3)
    if lost == "nothing":
        updates, found = line(axes, "uninterrupted")
        np.testing.assert_array_equal(updates, np.arange(100, 181))
        np.testing.assert_allclose(found, np.concatenate([before[-21:], expected[1:]]), rtol=5e-3)
        np.testing.assert_array_equal(found[20:], line(axes, "nothing")[1])


# ---- sentences: momentum ---------------------------------------------------------------------------------------------


def shrinks(make: Callable[..., Any], beta: float, nesterov: bool, limit: float) -> list[bool]:
    curvature = limit * np.array([0.99, 1.01])
    path = walk(make(1.0, momentum=beta, nesterov=nesterov), lambda theta: curvature * theta, [1.0, 1.0], 300)
    return (np.abs(path[-1]) < 1).tolist()


@pytest.mark.claim(r"Momentum *widens* the stable range on a quadratic: $h\lambda < 2(1+\beta)$.", chapter="03")
@pytest.mark.parametrize("make", [companion.Momentum, keras.optimizers.SGD])
def test_momentum_widens_the_stable_range(make: Callable[..., Any]) -> None:
    assert shrinks(make, 0.75, False, 2 * 1.75) == [True, False]


@pytest.mark.claim(
    r"Nesterov's form *narrows* the stable range: $h\lambda < \frac{2(1+\beta)}{1+2\beta}$.", chapter="03"
)
@pytest.mark.parametrize(
    "make",
    [companion.Momentum, keras.optimizers.SGD, wrong(NesterovWithSignError, why="θ moves with the gradient")],
)
def test_nesterov_narrows_the_stable_range(make: Callable[..., Any]) -> None:
    assert shrinks(make, 0.75, True, 2 * 1.75 / 2.5) == [True, False]


@pytest.mark.claim(
    r"On a quadratic, Nesterov's form is momentum with $\beta(1 - h\lambda)$ in the place of $\beta$.", chapter="03"
)
@pytest.mark.parametrize(
    "make",
    [companion.Momentum, keras.optimizers.SGD, wrong(NesterovWithSignError, why="θ moves with the gradient")],
)
def test_nesterov_is_momentum_with_another_memory(make: Callable[..., Any]) -> None:
    h, beta, curvature = 0.125, 0.75, np.array([0.5, 4.0, 8.0, 11.0])  # the last h λ is above 1
    optimizer = make(h, momentum=beta, nesterov=True)
    weight = keras.Variable([1.0, 2.0, -1.0, 1.0], dtype="float64")
    theta, v = weight.numpy(), np.zeros(4)
    for _ in range(20):
        optimizer.apply([curvature * weight.numpy()], [weight])
        v = beta * (1 - h * curvature) * v - h * curvature * theta
        theta = theta + v
        np.testing.assert_allclose(weight.numpy(), theta + beta * v, rtol=1e-9, atol=1e-12)  # the weights lie ahead


@pytest.mark.claim(
    "Given the same gradients, momentum and Nesterov's form remember the same velocity, and use it differently.",
    chapter="03",
)
@pytest.mark.parametrize(("make", "slots"), [(companion.Momentum, "velocities"), (keras.optimizers.SGD, "momentums")])
def test_momentum_and_nesterov_remember_the_same(make: Callable[..., Any], slots: str) -> None:
    weights = [keras.Variable([1.0, -2.0], dtype="float64") for _ in range(2)]
    optimizers = [make(0.25, momentum=0.5, nesterov=nesterov) for nesterov in (False, True)]
    for gradient in np.random.default_rng(0).normal(size=(5, 2)):
        for optimizer, weight in zip(optimizers, weights, strict=True):
            optimizer.apply([gradient], [weight])
        velocities = [getattr(optimizer, slots)[0].numpy() for optimizer in optimizers]
        np.testing.assert_array_equal(*velocities)
        assert np.all(weights[0].numpy() != weights[1].numpy())


@pytest.mark.claim("The longer the ravine, the more memory pays.", chapter="03")
def test_the_longer_the_ravine_the_more_memory_pays() -> None:
    """The steps that the chapter prints, by powers of the matrix of one step in each direction."""
    texts = [
        output.get("data", {}).get("text/plain", "")
        for cell in notebook(CHAPTER).cells
        for output in cell.get("outputs", [])
    ]
    rows = re.findall(r"(\d+) : 1" + 4 * r" +(\d+)", "\n".join(texts))
    assert [row[0] for row in rows] == ["25", "100", "500"]
    gains = []
    for kappa, *printed in (map(int, row) for row in rows):
        for beta, steps in zip((0.0, 0.5, 0.9, 0.97), printed, strict=True):
            losses = np.zeros(700)
            for curvature, start in ((1, 10.0), (kappa, 1.5)):
                velocity = np.array([-1.875 / kappa * curvature, beta])
                matrix, state = np.array([np.add([1.0, 0.0], velocity), velocity]), np.array([start, 0.0])
                for k in range(700):
                    losses[k] += curvature * state[0] ** 2 / 2
                    state = matrix @ state
            assert np.flatnonzero(losses >= losses[0] / 1000).max() + 1 == steps
        gains.append(printed[0] / printed[2])
    assert gains[0] < 1 < gains[1] < gains[2]


@pytest.mark.claim("Where gradients keep their sign, momentum 0.9 multiplies your learning rate by ten.", chapter="03")
@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("make", [companion.Momentum, keras.optimizers.SGD])
def test_momentum_multiplies_the_learning_rate(make: Callable[..., Any], nesterov: bool) -> None:
    gradients = iter([1.0] + 249 * [0.0])
    path = walk(make(0.5, momentum=0.9, nesterov=nesterov), lambda theta: [next(gradients)], [0.0], 250)
    np.testing.assert_allclose(path[-1], -0.5 * 10, rtol=1e-5)


# ---- sentences: slots ------------------------------------------------------------------------------------------------


@pytest.mark.claim(
    "`add_optimizer_variables` gives each weight its **slot**: one more variable, of the weight's shape and dtype, "
    "filled with zeros.",
    chapter="03",
)
@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_slots_have_shape_and_dtype_of_the_weight(dtype: str) -> None:
    weights = [keras.Variable(np.ones((3, 2)), dtype=dtype), keras.Variable(np.ones(2), dtype=dtype)]
    optimizer = companion.Momentum()
    optimizer.build(weights)
    assert len(optimizer.velocities) == 2
    for weight, slot in zip(weights, optimizer.velocities, strict=True):
        assert slot.shape == weight.shape
        assert slot.dtype == dtype
        assert not slot.numpy().any()
        assert any(slot is variable for variable in optimizer.variables)


@pytest.mark.claim("Adam keeps two numbers for every one you train.", chapter="03")
@pytest.mark.parametrize("make", [companion.Adam, keras.optimizers.Adam])
def test_adam_keeps_two_numbers_for_each_weight(make: Callable[..., Any]) -> None:
    optimizer = make()
    own = sum(v.numpy().size for v in optimizer.variables)
    optimizer.build([keras.Variable(np.ones((3, 2))), keras.Variable(np.ones(5))])
    assert sum(v.numpy().size for v in optimizer.variables) - own == 2 * (3 * 2 + 5)


@keras.saving.register_keras_serializable(package="tests_chapter_03")
class Counting(companion.Momentum):
    """Counts its steps twice: in a variable and in a Python attribute."""

    calls = 0

    def build(self, variables: list[Any]) -> None:
        if not self.built:
            super().build(variables)
            self.tally = self.add_variable((), name="tally")

    def apply(self, *args: Any, **kwargs: Any) -> None:
        self.calls += 1
        super().apply(*args, **kwargs)
        self.tally.assign_add(1.0)


@pytest.mark.claim(
    "A checkpoint holds what is in `optimizer.variables`. A plain Python attribute of the optimizer is in it only if "
    "`get_config` returns it, and then only in a `.keras` file.",
    chapter="03",
)
def test_a_checkpoint_holds_variables_and_not_attributes(tmp_path: Any) -> None:
    model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1)])
    model.compile(optimizer=Counting(momentum=0.75), loss="mse", run_eagerly=True)
    model.fit(np.ones((4, 2)), np.ones((4, 1)), batch_size=1, verbose=0)
    model.save(tmp_path / "model.keras")
    model.save_weights(tmp_path / "model.weights.h5")
    loaded = keras.models.load_model(tmp_path / "model.keras").optimizer
    assert (model.optimizer.calls, float(model.optimizer.tally)) == (4, 4.0)
    assert (loaded.calls, float(loaded.tally), loaded.momentum) == (0, 4.0, 0.75)
    model.compile(optimizer=Counting(momentum=0.5), loss="mse", run_eagerly=True)
    model.optimizer.build(model.trainable_variables)
    model.load_weights(tmp_path / "model.weights.h5")
    assert (float(model.optimizer.tally), model.optimizer.momentum) == (4.0, 0.5)


# ---- sentences: Adam -------------------------------------------------------------------------------------------------


@pytest.mark.claim(
    "With Adam's correction, a gradient that stays the same gives steps of length $h$, however large the gradient is.",
    chapter="03",
)
@pytest.mark.parametrize(
    "make", [companion.Adam, keras.optimizers.Adam, wrong(AdamWithoutBiasCorrection, why="a missing bias correction")]
)
def test_corrected_steps_have_the_length_h(make: Callable[..., Any]) -> None:
    gradient = np.array([1e8, 1e4, -1.0, 1e-2])
    path = walk(make(0.01), lambda theta: gradient, np.zeros(4), 20)
    np.testing.assert_allclose(np.diff(path, axis=0), -0.01 * np.sign(gradient) * np.ones((20, 1)), rtol=1e-3)


@pytest.mark.claim(
    r"The two forms of Adam are one formula with $\epsilon = \hat\epsilon / \sqrt{1 - \beta_2^t}$: at the first update "
    r"Keras's epsilon weighs 31.6 times what you typed, and the factor fades as $t$ grows.",
    chapter="03",
)
@pytest.mark.parametrize("make", [companion.Adam, keras.optimizers.Adam])
def test_epsilon_is_epsilon_hat(make: Callable[..., Any]) -> None:
    beta_1, beta_2, typed, gradient, m, v, theta = 0.875, 1023 / 1024, 2.0**-10, 2.0**-9, 0.0, 0.0, 0.0
    path = walk(make(1.0, beta_1=beta_1, beta_2=beta_2, epsilon=typed), lambda theta: [gradient], [0.0], 30)[:, 0]
    factors = []
    for t in range(1, 31):
        m, v = beta_1 * m + (1 - beta_1) * gradient, beta_2 * v + (1 - beta_2) * gradient**2
        factors.append(1 / np.sqrt(1 - beta_2**t))
        m_hat, v_hat = m / (1 - beta_1**t), v / (1 - beta_2**t)
        theta -= m_hat / (np.sqrt(v_hat) + factors[-1] * typed)  # Algorithm 1 of the paper, with that epsilon
        np.testing.assert_allclose(path[t], theta, rtol=1e-12)
    assert np.all(np.diff(factors) < 0)
    assert round(1 / np.sqrt(1 - 0.999), 1) == 31.6


# ---- sentences: the two witnesses ------------------------------------------------------------------------------------


@pytest.mark.claim(
    "Keras turns a Python number into a float32 before it casts it to the variable's dtype, even if that is float64.",
    chapter="03",
)
@pytest.mark.parametrize("number", [0.9, 0.999, 0.1])
def test_python_numbers_are_cast_through_float32(number: float) -> None:
    assert float(ops.cast(number, "float64")) == float(np.float32(number)) != number


def numpy_path(rule: str, betas: tuple[float, float], h: float, curvature: np.ndarray, steps: int) -> np.ndarray:
    """The rules written from the papers, in float64."""
    theta, m, v = np.ones(2), np.zeros(2), np.zeros(2)
    for t in range(1, steps + 1):
        g = curvature * theta
        if rule == "Adam":
            m, v = betas[0] * m + (1 - betas[0]) * g, betas[1] * v + (1 - betas[1]) * g * g
            theta = theta - h * np.sqrt(1 - betas[1] ** t) / (1 - betas[0] ** t) * m / (np.sqrt(v) + 1e-7)
        else:
            v = betas[0] * v - h * g
            theta = theta + (betas[0] * v - h * g if rule == "Nesterov" else v)
    return theta


@pytest.mark.claim(
    "With betas that float32 holds exactly, such as 0.875, the optimizers agree with NumPy to 1e-12.",
    chapter="03",
)
@pytest.mark.parametrize(
    "make",
    [
        companion.Momentum,
        companion.Adam,
        wrong(NesterovWithSignError, why="a sign error in Nesterov's form"),
        wrong(AdamWithoutBiasCorrection, why="a missing bias correction"),
    ],
)
def test_representable_rates_agree_with_numpy(make: Any) -> None:
    curvature, betas, h = np.array([1.0, 25.0]), (0.875, 1023 / 1024), 1 / 32
    for rule in ("Adam",) if issubclass(make, companion.Adam) else ("momentum", "Nesterov"):
        optimizer = make(h, *betas) if rule == "Adam" else make(h, momentum=betas[0], nesterov=rule == "Nesterov")
        path = walk(optimizer, lambda theta: curvature * theta, np.ones(2), 40)
        np.testing.assert_allclose(path[-1], numpy_path(rule, betas, h, curvature, 40), rtol=1e-12, atol=1e-14)


# ---- sentences: decay ------------------------------------------------------------------------------------------------


@pytest.mark.claim(
    "Keras warns about `decay`, ignores it, and an old script runs on with a learning rate that never falls.",
    chapter="03",
)
@pytest.mark.parametrize("make", [companion.SGD, companion.Adam, keras.optimizers.SGD, keras.optimizers.Adam])
def test_decay_is_ignored_with_a_warning(make: Callable[..., Any]) -> None:
    with pytest.warns(UserWarning, match="decay"):
        with_decay = make(0.5, decay=0.25)
    paths = [walk(optimizer, lambda theta: theta, [1.0], 5) for optimizer in (with_decay, make(0.5))]
    np.testing.assert_array_equal(*paths)
    assert float(with_decay.learning_rate) == 0.5


@pytest.mark.claim("`InverseTimeDecay` with `decay_steps=1` brings the old `decay` back, step for step.", chapter="03")
@pytest.mark.parametrize("make", [companion.SGD, keras.optimizers.SGD])
def test_inverse_time_decay_is_the_old_decay(make: Callable[..., Any]) -> None:
    optimizer = make(InverseTimeDecay(0.5, decay_steps=1, decay_rate=0.25))
    theta, expected = 1.0, [1.0]
    for t in range(20):
        theta -= 0.5 / (1 + 0.25 * t) * theta
        expected.append(theta)
    np.testing.assert_allclose(walk(optimizer, lambda theta: theta, [1.0], 20)[:, 0], expected, rtol=1e-5)


@pytest.mark.claim(
    r"Weight decay shrinks the *weights*, by a factor $1 - h\,\mathrm{wd}$ before each step, and works without any "
    r"gradient.",
    chapter="03",
)
@pytest.mark.parametrize(
    "make",
    [
        companion.SGD,
        companion.Momentum,
        companion.Adam,
        keras.optimizers.Adam,
        wrong(AdamWithDecayThroughTheSlot, why="decay coupled through the slot"),
    ],
)
def test_weight_decay_shrinks_the_weights(make: Callable[..., Any]) -> None:
    path = walk(make(0.5, weight_decay=0.25), lambda theta: [0.0, 0.0], [1.0, -3.0], 10)
    np.testing.assert_allclose(path[1:], path[:-1] * (1 - 0.5 * 0.25), rtol=1e-12)
    # with a gradient: the weights shrink first, and the rule then moves them as if nothing had happened
    signs = np.resize([1.0, -1.0, -1.0], 10)
    answers, same_answers = iter(signs), iter(signs)
    decayed = walk(make(0.5, weight_decay=0.25), lambda theta: next(answers) * np.array([4.0, 0.1]), [1.0, -3.0], 10)
    plain = walk(make(0.5), lambda theta: next(same_answers) * np.array([4.0, 0.1]), [1.0, -3.0], 10)
    np.testing.assert_allclose(np.diff(plain, axis=0), decayed[1:] - decayed[:-1] * 0.875, rtol=1e-9)


@pytest.mark.claim("For plain SGD, weight decay and an L2 penalty are equal.", chapter="03")
def test_l2_and_weight_decay_are_equal_for_sgd() -> None:
    target = np.array([2.0, -1.0])
    penalised = walk(companion.SGD(0.25), lambda theta: theta - target + 0.5 * theta, [1.0, 1.0], 20)
    decayed = walk(companion.SGD(0.25, weight_decay=0.5), lambda theta: theta - target, [1.0, 1.0], 20)
    shifted = walk(companion.Adam(0.25), lambda theta: theta - target + 0.5 * theta, [1.0, 1.0], 20)
    decoupled = walk(companion.Adam(0.25, weight_decay=0.5), lambda theta: theta - target, [1.0, 1.0], 20)
    # the decay comes first, but both use the gradient at the old θ
    np.testing.assert_allclose(penalised, decayed, rtol=1e-12)
    assert not np.allclose(shifted, decoupled, rtol=1e-2)


@pytest.mark.claim(
    "`companion.Adam(weight_decay=...)` is AdamW; so is `keras.optimizers.Adam(weight_decay=...)`.", chapter="03"
)
@pytest.mark.parametrize(
    "make",
    [companion.Adam, keras.optimizers.Adam, wrong(AdamWithDecayThroughTheSlot, why="decay coupled through the slot")],
)
def test_adam_with_weight_decay_is_adamw(make: Callable[..., Any]) -> None:
    curvature = np.array([1.0, 25.0])
    paths = [
        walk(optimizer, lambda theta: curvature * (theta - 2), [1.0, 1.0], 20)
        for optimizer in (make(0.1, weight_decay=0.5), keras.optimizers.AdamW(0.1, weight_decay=0.5))
    ]
    np.testing.assert_array_equal(*paths)


# ---- sentences: checkpoints ------------------------------------------------------------------------------------------


def small_model(make: Callable[..., Any] = companion.Adam) -> keras.Model:
    glorot = keras.initializers.GlorotUniform(seed=1)
    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(3, kernel_initializer=glorot)])
    model.compile(optimizer=make(0.1), loss="mse")
    return model


def fit(model: keras.Model, epochs: int = 1, **kwargs: Any) -> None:
    generator = np.random.default_rng(0)
    x, y = generator.normal(size=(64, 4)), generator.normal(size=(64, 3))
    model.fit(x, y, batch_size=8, epochs=epochs, verbose=0, **kwargs)


def state(model: keras.Model) -> list[np.ndarray]:
    return [variable.numpy() for variable in [*model.variables, *model.optimizer.variables]]


def equal(some: list[np.ndarray], others: list[np.ndarray]) -> bool:
    return len(some) == len(others) and all(np.array_equal(a, b) for a, b in zip(some, others, strict=True))


@pytest.mark.claim(
    "Without its counter, Adam's first step here goes the right way, but nearly five times as far.", chapter="03"
)
@pytest.mark.parametrize("make", [companion.Adam, keras.optimizers.Adam])
def test_a_step_on_full_slots_without_the_counter(make: Callable[..., Any]) -> None:
    moved = {}
    for count in (120, 0):
        optimizer = make(InverseTimeDecay(0.03, decay_steps=30, decay_rate=1.0))
        weight = keras.Variable([1.0, 1.0], dtype="float64")
        optimizer.build([weight])
        optimizer.iterations.assign(count)
        for slot, value in zip(optimizer.variables[-2:], ([0.3, -0.1], [0.2, 0.01]), strict=True):  # m, q
            slot.assign(value)
        optimizer.apply([np.array([0.5, -0.2])], [weight])
        moved[count] = weight.numpy() - 1
    by_formula = 5 * np.sqrt((1 - 0.999) / (1 - 0.999**121)) * (1 - 0.9**121) / (1 - 0.9)
    np.testing.assert_allclose(moved[0] / moved[120], by_formula, rtol=1e-4)
    assert 4.5 < by_formula < 5


def test_what_comes_back_from_a_file() -> None:
    """Built or not: the boxes say what the two tests below this one find; their widths are counts."""
    (axes,) = figure_data(CHAPTER)[4]
    boxes = [(*entry["label"].split(": "), max(entry["x"]) - min(entry["x"])) for entry in axes["lines"]]
    assert len(boxes) == 12
    lost = {way: [words.split()[0] for at, words, _ in boxes if at == way and "lost" in words] for way, *_ in boxes}
    everything = ["m", "q", "counter"]
    assert lost == {"in the file": [], "compile, build, load_weights": [], "compile, load_weights": everything}
    widths = [width for _, words, width in boxes if "counter" not in words]
    np.testing.assert_allclose(widths, 64 * 32 + 32 + 32 * 10 + 10, rtol=1e-5)


@pytest.mark.claim(
    "In Keras 3 `save_weights` on a compiled model writes the optimizer's variables as well.",
    chapter="03",
)
def test_save_weights_writes_the_optimizer(tmp_path: Any) -> None:
    model, fresh = small_model(), small_model()
    fit(model)
    model.save_weights(tmp_path / "m.weights.h5")
    fresh.optimizer.build(fresh.trainable_variables)
    fresh.load_weights(tmp_path / "m.weights.h5")
    assert int(fresh.optimizer.iterations) == 8
    assert equal(state(fresh), state(model))


@pytest.mark.claim(
    "`load_weights` drops Adam's slots and its counter if the optimizer has not been built: there are no slots yet to "
    "load into. It says so in one warning, `Skipping variable loading for optimizer …`.",
    chapter="03",
)
@pytest.mark.parametrize("make", [companion.Adam, keras.optimizers.Adam])
def test_load_weights_drops_the_optimizer_that_is_not_built(tmp_path: Any, make: Callable[..., Any]) -> None:
    model, fresh = small_model(make), small_model(make)
    fit(model)
    model.save_weights(tmp_path / "m.weights.h5")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fresh.load_weights(tmp_path / "m.weights.h5")
    (warning,) = caught
    assert str(warning.message).startswith("Skipping variable loading for optimizer ")
    assert equal(fresh.get_weights(), model.get_weights())
    fresh.optimizer.build(fresh.trainable_variables)
    assert int(fresh.optimizer.iterations) == 0
    assert not any(slot.numpy().any() for slot in fresh.optimizer.variables[2:])


@pytest.mark.claim(
    "Without a seed, and with the default `shuffle=True` of `fit`, even a complete file gives you another run.",
    chapter="03",
)
@pytest.mark.parametrize(("shuffle", "same"), [(False, True), (True, False)])
@pytest.mark.usefixtures("unseeded")
def test_the_order_of_batches_is_not_in_the_file(tmp_path: Any, shuffle: bool, same: bool) -> None:
    uninterrupted, stopped = small_model(), small_model()
    fit(uninterrupted, epochs=2, shuffle=shuffle)
    fit(stopped, epochs=1, shuffle=shuffle)
    stopped.save(tmp_path / "m.keras")
    resumed = keras.models.load_model(tmp_path / "m.keras")
    fit(resumed, epochs=1, shuffle=shuffle)
    assert equal(state(resumed), state(uninterrupted)) is same


@pytest.fixture
def unseeded() -> None:
    """Takes TensorFlow's global seed away, which other tests may have set."""
    tf.random.set_seed(None)


@pytest.mark.claim(
    "After `keras.utils.set_random_seed`, `fit` on arrays draws the same order in every epoch, and again in every "
    "later `fit`.",
    chapter="03",
)
@pytest.mark.usefixtures("unseeded")
@pytest.mark.parametrize("seed", [pytest.param(None, marks=pytest.mark.xfail(strict=True)), 1])
def test_a_seed_fixes_the_order_of_every_epoch(seed: int | None) -> None:
    if seed is not None:
        keras.utils.set_random_seed(seed)
    orders = []
    for _ in range(2):
        model = keras.Sequential([keras.Input((1,)), keras.layers.Dense(1)])
        model.compile(
            "sgd", lambda y, outputs: (orders.append(y.numpy().ravel().tolist()), outputs)[1], run_eagerly=True
        )
        numbers = np.arange(32.0).reshape(32, 1)
        model.fit(numbers, numbers, batch_size=32, epochs=2, verbose=0)
    assert sorted(orders[0]) == list(range(32)) != orders[0]
    assert all(order == orders[0] for order in orders)


@pytest.mark.claim(
    "Neither a `.keras` file nor `save_weights` holds the random state of a `Dropout` layer: in the loaded model it "
    "starts again.",
    chapter="03",
)
@pytest.mark.parametrize("seed", [3, None])
def test_the_random_state_of_dropout_is_not_in_the_file(tmp_path: Any, seed: int | None) -> None:
    def new_model() -> keras.Model:
        model = keras.Sequential([keras.Input((4,)), keras.layers.Dropout(0.5, seed=seed), keras.layers.Dense(3)])
        model.compile(optimizer=companion.Adam(0.1), loss="mse")
        return model

    def draws(model: keras.Model) -> list[int]:
        return model.layers[0].seed_generator.state.numpy().tolist()

    model, fresh = new_model(), new_model()
    fit(model)
    model.save(tmp_path / "m.keras")
    model.save_weights(tmp_path / "m.weights.h5")
    fresh.optimizer.build(fresh.trainable_variables)
    fresh.load_weights(tmp_path / "m.weights.h5")
    assert draws(model)[1] > 0
    for loaded in (keras.models.load_model(tmp_path / "m.keras"), fresh):
        assert int(loaded.optimizer.iterations) == 8
        assert draws(loaded)[1] == 0
        assert (draws(loaded)[0] == draws(model)[0]) is (seed == 3)


@pytest.mark.claim(
    "With weights in `bfloat16`, Adam's default `beta_2` of 0.999 rounds to 1, and Adam never moves a weight.",
    chapter="03",
)
@pytest.mark.parametrize("make", [companion.Adam, keras.optimizers.Adam])
@pytest.mark.parametrize(("dtype", "beta_2", "moves"), [("bfloat16", 0.999, False), ("bfloat16", 0.875, True)])
def test_adam_stands_still_in_bfloat16(make: Callable[..., Any], dtype: str, beta_2: float, moves: bool) -> None:
    weight = keras.Variable([1.0], dtype=dtype)
    optimizer = make(0.25, beta_2=beta_2)
    for _ in range(3):
        optimizer.apply([np.array([1.0])], [weight])
    assert (float(weight.numpy()[0]) != 1.0) is moves


@pytest.mark.claim(
    "In `bfloat16` a step of 0.001 is lost when it is added to a weight near 1, whatever the optimizer.", chapter="03"
)
@pytest.mark.parametrize(("dtype", "moves"), [("bfloat16", False), ("float32", True)])
@pytest.mark.parametrize(
    "optimizer",
    [
        companion.SGD(0.001),
        companion.Momentum(0.001, momentum=0.0),
        companion.Adam(0.001, beta_2=0.875),
        keras.optimizers.Adam(0.001, beta_2=0.875),
    ],
    ids=lambda optimizer: f"{type(optimizer).__module__.partition('.')[0]}-{type(optimizer).__name__}",
)
@pytest.mark.parametrize("start", [0.9, 1.0, 1.1])
def test_small_steps_are_lost_in_bfloat16(
    optimizer: keras.optimizers.Optimizer, dtype: str, moves: bool, start: float
) -> None:
    weight = keras.Variable([start, -start], dtype=dtype)
    before = np.array(weight.numpy(), "float64")
    optimizer = type(optimizer).from_config(optimizer.get_config())
    for _ in range(5):
        optimizer.apply([np.array([1.0, 1.0])], [weight])
    assert np.any(np.array(weight.numpy(), "float64") != before) == moves


@pytest.mark.claim(
    "`keras.callbacks.BackupAndRestore` brings the optimizer's slots and counter back, and `ModelCheckpoint` saves the "
    "whole model unless you ask it for weights only.",
    chapter="03",
)
def test_what_the_callbacks_save(tmp_path: Any) -> None:
    model, fresh = small_model(), small_model()
    folder, path = str(tmp_path / "backup"), str(tmp_path / "m.keras")
    backup = keras.callbacks.BackupAndRestore(folder, delete_checkpoint=False)
    fit(model, callbacks=[backup, keras.callbacks.ModelCheckpoint(path)])
    fit(fresh, callbacks=[keras.callbacks.BackupAndRestore(folder)])  # its only epoch is done: it just restores
    assert equal(state(fresh), state(model))
    assert equal(state(keras.models.load_model(path)), state(model))
