"""What chapter 02 claims, tried on the real Keras; and the data under its figures against NumPy."""

import contextlib
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import ops
from tensorflow.keras import backend as tf_backend

import companion
from companion import datasets, legacy
from tests.book.reading import figure_data, line, notebook


def model_of(optimizer: Any, **compile_arguments: Any) -> keras.Model:
    model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(2, kernel_initializer="ones")])
    model.compile(optimizer, "mse", **compile_arguments)
    return model


def fit(model: keras.Model, epochs: int = 3) -> list[float]:
    x = np.linspace(-1, 1, 24).reshape(8, 3)
    return model.fit(x, np.zeros((8, 2)), epochs=epochs, batch_size=8, shuffle=False, verbose=0).history["loss"]


def with_step(update_step: Callable[..., Any], **methods: Any) -> keras.optimizers.Optimizer:
    return type("Custom", (keras.optimizers.Optimizer,), {"update_step": update_step, **methods})(learning_rate=0.5)


@contextlib.contextmanager
def plain_graph(start: float = 1.0) -> Iterator[tuple[Any, Any]]:
    with tf.Graph().as_default(), tf.compat.v1.Session() as session:
        weight = tf.compat.v1.Variable(start)
        session.run(weight.initializer)
        yield session, weight


@pytest.mark.parametrize("line_of_2018", ["from keras.optimizers import Optimizer", "from keras import backend as K"])
@pytest.mark.claim("Two of the three imports of 2018 survive in Keras 3, `Optimizer` and `backend`.", chapter="02")
def test_two_imports_survive(line_of_2018: str) -> None:
    names: dict[str, Any] = {}
    exec(line_of_2018, names)
    with pytest.raises(ImportError):
        exec("from keras.legacy import interfaces", names)
    if "K" in names:
        assert not any(hasattr(names["K"], name) for name in ("variable", "update", "update_add", "zeros"))


@pytest.mark.parametrize(
    "new_slot",
    [
        pytest.param(lambda self, weight: tf_backend.zeros(tf_backend.int_shape(weight)), id="K.zeros"),
        pytest.param(
            lambda self, weight: self.add_variable_from_reference(weight, "velocity"),
            id="today",
            marks=pytest.mark.xfail(strict=True, reason="Keras knows this one"),
        ),
    ],
)
@pytest.mark.claim(
    "A slot made by `K.zeros` of `tensorflow.keras.backend` works in Keras 3 and is not saved.", chapter="02"
)
def test_a_slot_of_the_old_backend_is_not_saved(new_slot: Callable[..., Any]) -> None:
    def build(self: Any, variables: Any) -> None:
        keras.optimizers.Optimizer.build(self, variables)
        self.slot = new_slot(self, variables[0])

    def update_step(self: Any, gradient: Any, variable: Any, learning_rate: Any) -> None:
        self.slot.assign(0.5 * ops.convert_to_tensor(self.slot) - learning_rate * gradient)
        self.assign_add(variable, ops.convert_to_tensor(self.slot))

    optimizer, weight = with_step(update_step, build=build), keras.Variable([1.0])
    for expected in (0.5, -0.25):  # v = -0.5, then -0.75: it remembers
        optimizer.apply([ops.convert_to_tensor([1.0])], [weight])
        assert weight.numpy() == [expected]
    store: dict[str, Any] = {}
    optimizer.save_own_variables(store)
    assert len(store) == len(optimizer.variables) == 2  # the step counter and the learning rate


@pytest.mark.claim("Keras 3 never calls `get_updates`.", chapter="02")
def test_get_updates_is_never_called() -> None:
    calls = []

    def get_updates(self: Any, loss: Any, params: Any) -> list[Any]:
        calls.append(loss)
        return []

    for eagerly in (False, True):
        fit(model_of(with_step(assigns, get_updates=get_updates), run_eagerly=eagerly))
    half = type("Half", (keras.optimizers.Optimizer,), {"get_updates": get_updates})(learning_rate=0.5)
    with pytest.raises(NotImplementedError):
        fit(model_of(half))
    assert calls == []
    assert not hasattr(keras.optimizers.Optimizer, "get_updates")


@pytest.mark.claim("In a graph of TensorFlow 1 an assignment runs only when somebody fetches it.", chapter="02")
def test_an_assignment_runs_only_when_fetched() -> None:
    with plain_graph() as (session, weight):
        loss = weight**2
        update = weight.assign_add(1.0)
        for _ in range(3):
            session.run(loss)
        assert session.run(weight) == 1.0
        session.run([loss, update])
        assert session.run(weight) == 2.0


def softmax_regression(h: float, steps: int) -> tuple[list[float], list[np.ndarray]]:
    """The chapter's training in float64 NumPy: the loss before each step and the kernel after it."""
    data = datasets.digits("float64")
    x = np.hstack([data.x_train, np.ones((len(data.x_train), 1))])
    target = np.eye(10)[data.y_train]
    weights, losses, kernels = np.zeros((65, 10)), [], []
    for _ in range(steps):
        logits = x @ weights
        probabilities = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
        losses.append(-np.mean(np.log(probabilities[target == 1])))
        weights = weights - h * x.T @ (probabilities - target) / len(x)
        kernels.append(weights[:-1])
    return losses, kernels


def digits_loss(variables: list[Any]) -> Any:
    data = datasets.digits()
    logits = tf.matmul(tf.constant(data.x_train), variables[0]) + variables[1]
    return tf.reduce_mean(tf.nn.sparse_softmax_cross_entropy_with_logits(labels=data.y_train, logits=logits))


def kernels_of_the_plan(fetched: bool) -> list[np.ndarray]:
    zeros = [np.zeros((64, 10), "float32"), np.zeros(10, "float32")]
    steps = legacy.run_plan(legacy.GraphSGD(lr=0.5), digits_loss, zeros, 10, execute_updates=fetched)
    return [step.values[0] for step in steps]


def kernels_of_keras(optimizer: keras.optimizers.Optimizer) -> list[np.ndarray]:
    data, kernels = datasets.digits(), []
    model = keras.Sequential([keras.Input((64,)), keras.layers.Dense(10, kernel_initializer="zeros")])
    model.compile(optimizer, keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    for _ in range(10):
        model.train_on_batch(data.x_train, data.y_train)
        kernels.append(model.get_weights()[0])
    return kernels


@pytest.mark.parametrize(
    "kernels",
    [
        pytest.param(lambda: kernels_of_the_plan(True), id="plan"),
        pytest.param(lambda: kernels_of_keras(companion.SGD(0.5)), id="today"),
        pytest.param(lambda: kernels_of_the_plan(False), id="not fetched", marks=pytest.mark.xfail(strict=True)),
        pytest.param(
            lambda: kernels_of_keras(with_step(lambda self, g, v, h: v - h * g)),
            id="only returned",
            marks=pytest.mark.xfail(strict=True),
        ),
    ],
)
@pytest.mark.claim(
    "For SGD the plan of 2018 and today's `update_step` give the same weights after every step.", chapter="02"
)
def test_plan_and_update_step_give_the_same_weights(kernels: Callable[[], list[np.ndarray]]) -> None:
    for found, expected in zip(kernels(), softmax_regression(0.5, 10)[1], strict=True):
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("optimizer_class", [companion.SGD, keras.optimizers.SGD, keras.optimizers.Adam])
@pytest.mark.claim(
    "Keras 3 accepts `optimizer.lr = 0.5` without a word and goes on using the old learning rate.", chapter="02"
)
def test_setting_lr_changes_nothing(optimizer_class: type) -> None:
    found = []
    for lr in (None, 0.5):
        optimizer, weight = optimizer_class(learning_rate=0.125), keras.Variable([1.0])
        with pytest.raises(AttributeError):
            _ = optimizer.lr
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            if lr:
                optimizer.lr = lr
                assert optimizer.lr == lr
        for _ in range(2):
            optimizer.apply([ops.convert_to_tensor([1.0])], [weight])
        assert float(optimizer.learning_rate) == 0.125
        found.append(weight.numpy()[0])
    assert found[0] == found[1] < 1.0
    with pytest.raises(ValueError, match="lr"):
        optimizer_class(lr=0.1)


def returns(self: Any, gradient: Any, variable: Any, learning_rate: Any) -> Any:
    return variable - learning_rate * gradient


def rebinds(self: Any, gradient: Any, variable: Any, learning_rate: Any) -> None:
    variable = variable - learning_rate * gradient


def plans(self: Any, gradient: Any, variable: Any, learning_rate: Any) -> None:
    self.updates = [lambda: self.assign_sub(variable, learning_rate * gradient)]


def assigns(self: Any, gradient: Any, variable: Any, learning_rate: Any) -> None:
    self.assign(variable, variable - learning_rate * gradient)


@pytest.mark.parametrize("eagerly", [False, True])
@pytest.mark.parametrize(
    "update_step",
    [returns, rebinds, plans, pytest.param(assigns, marks=pytest.mark.xfail(strict=True, reason="this one learns"))],
)
@pytest.mark.claim(
    "If an `update_step` of Keras 3 returns the new value instead of assigning it, training runs without a warning, "
    "but no weight moves, as long as weight decay and constraints are off.",
    chapter="02",
)
@pytest.mark.claim("The step counter counts calls, not changes.", chapter="02")
def test_returning_is_not_assigning(
    update_step: Callable[..., Any], eagerly: bool, capfd: pytest.CaptureFixture[str]
) -> None:
    model = model_of(with_step(update_step), run_eagerly=eagerly)
    before = model.get_weights()
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        losses = fit(model)
    lines = capfd.readouterr().err.lower().splitlines()
    assert not [line for line in lines if "warn" in line and "retracing" not in line]  # of all models of this process
    assert int(model.optimizer.iterations) == 3
    assert len(set(losses)) == 1
    assert all(np.array_equal(a, b) for a, b in zip(before, model.get_weights(), strict=True))


def test_weight_decay_and_constraints_move_a_weight_that_the_rule_does_not() -> None:
    optimizer, weight = with_step(returns), keras.Variable([1.0])
    optimizer.weight_decay = 0.125
    optimizer.apply([ops.convert_to_tensor([1.0])], [weight])
    assert weight.numpy() == [1.0 - 0.5 * 0.125]
    weight = keras.Variable([-1.0])
    weight.constraint = keras.constraints.NonNeg()
    with_step(returns).apply([ops.convert_to_tensor([1.0])], [weight])
    assert weight.numpy() == [0.0]


class Forgetful(keras.optimizers.Optimizer):
    """Momentum whose velocity is computed and never kept: right in its first step."""

    keep = False

    def build(self, variables: Any) -> None:
        super().build(variables)
        self.velocities = self.add_optimizer_variables(variables, "velocity")

    def update_step(self, gradient: Any, variable: Any, learning_rate: Any) -> None:
        velocity = self.velocities[self._get_variable_index(variable)]
        new = 0.5 * velocity - learning_rate * gradient
        if self.keep:
            self.assign(velocity, new)
        self.assign_add(variable, new)


@pytest.mark.claim("One step shows that the weight moves; the second shows that the slots do.", chapter="02")
def test_the_second_step_shows_the_slots() -> None:
    found = {}
    for keep in (True, False):
        optimizer, weight, seen = type("Momentum", (Forgetful,), {"keep": keep})(0.5), keras.Variable([1.0]), []
        for _ in range(2):
            optimizer.apply([ops.convert_to_tensor([1.0])], [weight])
            seen.append(float(weight.numpy()[0]))
        found[keep] = seen
    assert found == {True: [0.5, -0.25], False: [0.5, 0.0]}


@pytest.mark.claim("Symbolic gradients exist in graphs only.", chapter="02")
def test_symbolic_gradients_need_a_graph() -> None:
    weight = tf.Variable(1.0)
    with pytest.raises(RuntimeError):
        tf.gradients(weight**2, [weight])
    with plain_graph() as (session, weight):
        assert session.run(tf.gradients(weight**2, [weight])) == [2.0]


@pytest.mark.claim(
    "Run eagerly, `get_updates` makes its assignments while the plan is being built, once, and never again.",
    chapter="02",
)
def test_an_eager_plan_runs_once_while_it_is_built() -> None:
    class ByHand(legacy.GraphSGD):
        def get_gradients(self, loss: Any, params: Any) -> list[Any]:
            return [2 * p for p in params]

    weight = tf.Variable(1.0)
    plan = ByHand(lr=0.25).get_updates(weight**2, [weight])
    assert weight.numpy() == 0.5
    for _ in range(3):
        assert [update.numpy() for update in plan] == [0.5]
    assert weight.numpy() == 0.5
    with plain_graph() as (session, weight):
        plan = ByHand(lr=0.25).get_updates(weight**2, [weight])
        assert session.run(weight) == 1.0
        for expected in (0.5, 0.25):
            session.run(plan)
            assert session.run(weight) == expected


@pytest.mark.claim(
    "An assignment inside a `tf.function` runs on every call, even if its result is thrown away, and in the order in "
    "which you wrote it.",
    chapter="02",
)
def test_a_function_runs_its_assignments_in_order() -> None:
    weight = tf.Variable(1.0)

    @tf.function
    def step() -> None:
        weight.assign_add(1.0)
        weight.assign(2 * weight)
        weight.assign_sub(3.0)

    expected = 1.0
    for _ in range(5):
        step()
        expected = 2 * (expected + 1) - 3
        assert weight.numpy() == expected


@pytest.mark.claim(
    "During the first step `self.iterations` is 0, so Adam's $t$ is `self.iterations + 1`.", chapter="02"
)
def test_adam_written_with_iterations_is_that_of_keras() -> None:
    seen = []

    def update_step(self: Any, gradient: Any, variable: Any, learning_rate: Any) -> None:
        seen.append(int(self.iterations))

    optimizer, adam, weight = with_step(update_step), keras.optimizers.Adam(0.5, epsilon=0), keras.Variable([1.0])
    m, v, expected = 0.0, 0.0, 1.0
    for gradient in (1.0, 3.0, -0.5):
        for each in (optimizer, adam):
            each.apply([ops.convert_to_tensor([gradient])], [weight])
        m, v, t = 0.9 * m + 0.1 * gradient, 0.999 * v + 0.001 * gradient**2, seen[-1] + 1
        expected -= 0.5 * (m / (1 - 0.9**t)) / np.sqrt(v / (1 - 0.999**t))
        np.testing.assert_allclose(weight.numpy(), expected, rtol=0, atol=1e-4)
    assert seen == [0, 1, 2]


@pytest.mark.claim("Keras 3 warns about `decay` and ignores it.", chapter="02")
def test_decay_is_ignored() -> None:
    with pytest.warns(UserWarning, match="decay"):
        decayed = keras.optimizers.SGD(learning_rate=0.5, decay=0.5)
    weights = [keras.Variable([1.0]) for _ in range(3)]
    schedule = keras.optimizers.schedules.InverseTimeDecay(0.5, decay_steps=1, decay_rate=0.5)
    optimizers = [decayed, keras.optimizers.SGD(learning_rate=0.5), keras.optimizers.SGD(learning_rate=schedule)]
    for optimizer, weight in zip(optimizers, weights, strict=True):
        for _ in range(4):
            optimizer.apply([ops.convert_to_tensor([1.0])], [weight])
    assert weights[0].numpy() == weights[1].numpy() == 1.0 - 4 * 0.5
    # What the old argument did, and what the chapter replaces it by: h / (1 + decay * iterations).
    np.testing.assert_allclose(weights[2].numpy(), 1.0 - sum(0.5 / (1 + 0.5 * t) for t in range(4)), rtol=1e-6)


@pytest.mark.claim("Keras 3 applies constraints after the step.", chapter="02")
def test_constraints_are_applied_after_the_step() -> None:
    seen = []

    def update_step(self: Any, gradient: Any, variable: Any, learning_rate: Any) -> None:
        self.assign_sub(variable, learning_rate * gradient)
        seen.append(float(variable.numpy()[0]))

    weight = keras.Variable([1.0])
    weight.constraint = keras.constraints.NonNeg()
    with_step(update_step).apply([ops.convert_to_tensor([8.0])], [weight])
    assert seen == [-3.0]
    assert weight.numpy() == [0.0]


@pytest.mark.claim(
    "Today's Keras adds RMSprop's epsilon under the square root; the code of 2018 adds it after the root.", chapter="02"
)
def test_where_rmsprop_adds_epsilon() -> None:
    h, rho, epsilon, gradient = 0.1, 0.75, 0.5, 2.0
    weight = keras.Variable([1.0])
    keras.optimizers.RMSprop(learning_rate=h, rho=rho, epsilon=epsilon).apply(
        [ops.convert_to_tensor([gradient])], [weight]
    )
    mean = (1 - rho) * gradient**2
    np.testing.assert_allclose(weight.numpy(), 1 - h * gradient / np.sqrt(mean + epsilon), rtol=1e-6)
    assert abs(float(weight.numpy()[0]) - (1 - h * gradient / (np.sqrt(mean) + epsilon))) > 0.01
    # At Keras's default, on small gradients: not the same number for the same thing.
    weight, gradient, after = keras.Variable([0.0]), 1e-4, 0.001 * 1e-4 / (np.sqrt(0.1) * 1e-4 + 1e-7)
    keras.optimizers.RMSprop(learning_rate=0.001).apply([ops.convert_to_tensor([gradient])], [weight])
    np.testing.assert_allclose(-after / weight.numpy(), 10, rtol=0.01)
    np.testing.assert_allclose(np.sqrt(keras.optimizers.RMSprop().epsilon), 3e-4, rtol=0.1)
    # The chapter's 2018 listing says the other one.
    text = "".join(cell.source for cell in notebook("02").cells)
    assert "(K.sqrt(new_a) + self.epsilon)" in text


@pytest.mark.parametrize("condition", [True, False])
@pytest.mark.claim(
    "`ops.where` picks one of two values; an `assign` among its arguments has already run by then.", chapter="02"
)
def test_where_cannot_hold_back_an_assignment(condition: bool) -> None:
    for run in (lambda f: f, tf.function):
        weight = tf.Variable(1.0)

        @run
        def step(weight: tf.Variable = weight) -> Any:
            return ops.where(condition, weight.assign(2.0), -1.0)

        assert float(step()) == (2.0 if condition else -1.0)
        assert weight.numpy() == 2.0


def test_lengths_of_steps_are_the_closed_form() -> None:
    """Under a constant gradient momentum's n-th step is (1 - βⁿ)/(1 - β) times as long as the plain one."""
    (axes,) = figure_data("02")[1]
    update, kept = line(axes, "saved")
    np.testing.assert_allclose(kept, (1 - 0.9**update) / (1 - 0.9), rtol=1e-4)
    update, lost = line(axes, "not saved")
    np.testing.assert_allclose(lost, (1 - 0.9 ** (update - 10)) / (1 - 0.9), rtol=1e-4)


@pytest.mark.claim(
    "Any other `K.update_add(x, y)` → `self.assign_add(x, y)`, and `K.update_sub` → `self.assign_sub`.", chapter="02"
)
def test_the_translated_class_is_the_formula() -> None:
    (code,) = (cell.source for cell in notebook("02").cells if "class Average(" in cell.source)
    names: dict[str, Any] = {"keras": keras}
    exec(code.split("\n\n\nprint")[0], names)
    optimizer, weight, m, expected = names["Average"](0.25), keras.Variable([1.0]), 0.0, 1.0
    for gradient in (1.0, -3.0, 0.5):
        optimizer.apply([ops.convert_to_tensor([gradient])], [weight])
        m = 0.9 * m + 0.1 * gradient
        expected -= 0.25 * m  # K.update_sub(p, self.lr * new_m)
        np.testing.assert_allclose(weight.numpy(), expected, rtol=1e-6)


def test_dots_say_who_moves_when() -> None:
    (axes,) = figure_data("02")[0]
    moves, rests = ({tuple(point) for point in points} for points in axes["points"])
    learns = [(column, row) for row in (0, 3) for column in range(1, 6)]
    assert moves == {*learns, (0, 2)}
    assert rests == {(column, row) for column in range(6) for row in range(5)} - moves
