"""The optimizer of 2018: its trajectory against NumPy, its isolation, its arguments."""

import warnings

import numpy as np
import pytest
import tensorflow as tf
from hypothesis import given, settings
from hypothesis import strategies as st

import companion
from companion import legacy


def network(seed: int = 0) -> tuple[list[np.ndarray], np.ndarray, np.ndarray]:
    """Two layers, so that one layer's gradient reads the other layer's weights."""
    rng = np.random.default_rng(seed)
    return [rng.normal(size=(5, 64)), rng.normal(size=(64, 3))], rng.normal(size=(40, 5)), rng.normal(size=(40, 3))


def numpy_trajectory(initial, x, y, h, steps):
    """Gradient descent on the mean square error of tanh(x a) b, backpropagated by hand in float64."""
    a, b = (value.copy() for value in initial)
    rows = []
    for _ in range(steps):
        hidden = np.tanh(x @ a)
        error = hidden @ b - y
        slope = 2 * error / error.size
        gradient_b = hidden.T @ slope
        gradient_a = x.T @ (slope @ b.T * (1 - hidden**2))
        rows.append((np.mean(error**2), a - h * gradient_a, b - h * gradient_b))
        a, b = rows[-1][1:]
    return rows


def network_loss(x, y):
    return lambda variables: tf.reduce_mean((tf.tanh(x @ variables[0]) @ variables[1] - y) ** 2)


class Climbs(legacy.GraphSGD):
    def get_gradients(self, loss, params):
        return [-gradient for gradient in super().get_gradients(loss, params)]


class OneLayerAfterTheOther(legacy.GraphSGD):
    """The race of the plan without an order, with the loser chosen: the last layer sees the first one's new weights."""

    def get_updates(self, loss, params):
        first = tf.compat.v1.assign(params[0], params[0] - self.lr * self.get_gradients(loss, params)[0])
        with tf.control_dependencies([first]):
            gradient = tf.gradients(self.rebuild([tf.identity(params[0]), params[1]]), params)[1]
            return [first, tf.compat.v1.assign(params[1], params[1] - self.lr * gradient)]


@pytest.mark.parametrize(
    ("optimizer", "fetched"),
    [
        (legacy.GraphSGD, True),
        pytest.param(legacy.GraphSGD, False, marks=pytest.mark.xfail(strict=True, reason="the plan is not fetched")),
        pytest.param(Climbs, True, marks=pytest.mark.xfail(strict=True, reason="sign error")),
        pytest.param(OneLayerAfterTheOther, True, marks=pytest.mark.xfail(strict=True, reason="written, then read")),
    ],
)
def test_trajectory_is_that_of_gradient_descent(optimizer, fetched) -> None:
    initial, x, y = network()
    optimizer = optimizer(lr=0.05)
    optimizer.rebuild = network_loss(x, y)
    found = legacy.run_plan(optimizer, network_loss(x, y), initial, 20, execute_updates=fetched)
    for step, (loss, a, b) in zip(found, numpy_trajectory(initial, x, y, 0.05, 20), strict=True):
        np.testing.assert_allclose(step.loss, loss, rtol=1e-12)
        np.testing.assert_allclose(step.values[0], a, rtol=0, atol=1e-12)
        np.testing.assert_allclose(step.values[1], b, rtol=0, atol=1e-12)


def test_equals_todays_sgd() -> None:
    import keras

    initial, x, y = network(1)
    variables = [keras.Variable(value, dtype="float64") for value in initial]
    h = 0.0625  # exact in float32, in which Keras stores the learning rate
    optimizer = companion.SGD(learning_rate=h)
    for step in legacy.run_plan(legacy.GraphSGD(lr=h), network_loss(x, y), initial, 10):
        with tf.GradientTape() as tape:
            loss = network_loss(x, y)([variable.value for variable in variables])
        gradients = tape.gradient(loss, [variable.value for variable in variables])
        optimizer.apply(gradients, variables)
        for value, variable in zip(step.values, variables, strict=True):
            np.testing.assert_allclose(value, variable.numpy(), rtol=0, atol=1e-12)


def test_runs_do_not_differ() -> None:
    rng = np.random.default_rng(2)  # large enough for the operations of a step to overlap on two cores
    initial = [0.1 * rng.normal(size=(64, 256)), 0.1 * rng.normal(size=(256, 10))]
    x, y = rng.normal(size=(500, 64)), rng.normal(size=(500, 10))
    runs = [legacy.run_plan(legacy.GraphSGD(lr=0.1), network_loss(x, y), initial, 5) for _ in range(5)]
    assert len({tuple(round(step.loss, 12) for step in run) for run in runs}) == 1


@settings(max_examples=15, deadline=None)
@given(h=st.floats(0, 1.5), curvature=st.floats(0.1, 2), start=st.floats(-10, 10))
def test_quadratic_has_its_closed_form(h: float, curvature: float, start: float) -> None:
    found = legacy.run_plan(
        legacy.GraphSGD(lr=h), lambda variables: curvature / 2 * variables[0] ** 2, [np.array(start)], 4
    )
    expected = [(1 - h * curvature) ** k * start for k in range(5)]
    np.testing.assert_allclose([step.values[0] for step in found], expected[1:], rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(
        [step.loss for step in found], curvature / 2 * np.square(expected[:-1]), rtol=1e-9, atol=1e-9
    )


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_shapes_and_dtypes_are_kept(dtype: str) -> None:
    initial = [np.ones((2, 3), dtype), np.ones((), dtype)]
    found = legacy.run_plan(
        legacy.GraphSGD(lr=0.5), lambda variables: tf.reduce_sum(variables[0]) * variables[1], initial, 1
    )
    assert [(value.shape, value.dtype) for value in found[0].values] == [((2, 3), dtype), ((), dtype)]
    assert isinstance(found[0].loss, float)
    assert (initial[0] == 1).all()  # the caller's arrays stay as they are
    assert initial[1] == 1


def test_building_a_plan_moves_nothing_and_fetching_it_does() -> None:
    with tf.Graph().as_default(), tf.compat.v1.Session() as session:
        weight = tf.compat.v1.Variable(1.0)
        plan = legacy.GraphSGD(lr=0.25).get_updates(weight**2, [weight])
        session.run(weight.initializer)
        assert session.run(weight) == 1.0
        for expected in (0.5, 0.25):
            session.run(plan)
            assert session.run(weight) == expected


def test_any_optimizer_of_that_shape_runs() -> None:
    class SignDescent:
        def get_updates(self, loss, params):
            return [
                tf.compat.v1.assign_sub(p, 0.5 * tf.sign(g))
                for p, g in zip(params, tf.gradients(loss, params), strict=True)
            ]

    found = legacy.run_plan(SignDescent(), lambda variables: variables[0] ** 2, [np.array(2.0)], 3)
    assert [float(step.values[0]) for step in found] == [1.5, 1.0, 0.5]


def _global_state() -> tuple:
    return (
        tf.executing_eagerly(),
        tf.compat.v1.resource_variables_enabled(),
        tf.compat.v1.get_default_session(),
        id(tf.compat.v1.get_default_graph()),
        len(tf.compat.v1.get_default_graph().get_operations()),
    )


@pytest.mark.parametrize("fails", [False, True])
def test_nothing_outside_notices(fails: bool, capfd: pytest.CaptureFixture[str]) -> None:
    def loss(variables):
        assert not tf.executing_eagerly()
        if fails:
            raise KeyError("a loss that fails while the graph is being built")
        return variables[0] ** 2

    variable = tf.Variable(3.0)
    tf.random.set_seed(5)
    expected = tf.random.normal([3]).numpy()
    tf.random.set_seed(5)
    before = _global_state()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        try:
            legacy.run_plan(legacy.GraphSGD(), loss, [np.array(1.0)], 2)
        except KeyError:
            assert fails
    assert _global_state() == before
    np.testing.assert_array_equal(tf.random.normal([3]).numpy(), expected)
    variable.assign_sub(1.0)
    assert variable.numpy() == 2.0
    captured = capfd.readouterr()
    assert captured.out == ""
    assert "deprecat" not in captured.err.lower()


def test_it_runs_inside_another_graph() -> None:
    with tf.Graph().as_default() as outer:
        found = legacy.run_plan(legacy.GraphSGD(lr=0.25), lambda variables: variables[0] ** 2, [np.array(1.0)], 1)
        assert not outer.get_operations()
    assert found[0].values[0] == 0.5


@pytest.mark.parametrize(("kind", "name"), [("ref", "RefVariable"), ("resource", "ResourceVariable")])
def test_private_graph_makes_both_kinds_of_variables(kind: str, name: str) -> None:
    with legacy._private_graph([np.array(1.0)], kind) as (session, variables):
        assert [type(variable).__name__ for variable in variables] == [name]
        session.run(tf.compat.v1.global_variables_initializer())
        assert session.run(variables) == [1.0]


@pytest.mark.parametrize("lr", [-0.1, float("nan"), float("inf"), "0.1", None, True, [0.1]])
def test_learning_rate_is_checked(lr) -> None:
    with pytest.raises(ValueError, match=r"`lr` .*Received: lr="):
        legacy.GraphSGD(lr=lr)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("optimizer", None),
        ("optimizer", companion.SGD()),
        ("loss", 3.0),
        ("initial", []),
        ("initial", np.zeros(3)),
        ("initial", None),
        ("initial", [np.array([1, 2])]),
        ("initial", [np.array(1.0), "two"]),
        ("steps", 0),
        ("steps", -1),
        ("steps", 2.0),
        ("steps", True),
        ("steps", "3"),
    ],
)
def test_arguments_are_checked(name: str, value) -> None:
    arguments = {
        "optimizer": legacy.GraphSGD(),
        "loss": lambda variables: variables[0] ** 2,
        "initial": [np.array(1.0)],
        "steps": 1,
        name: value,
    }
    with pytest.raises(ValueError, match=rf"`{name}` (?s:.*)Received: {name}="):
        legacy.run_plan(**arguments)


def test_loss_is_checked() -> None:
    optimizer, initial = legacy.GraphSGD(), [np.ones(2), np.array(1.0)]
    with pytest.raises(ValueError, match="no gradient for variable 1"):
        legacy.run_plan(optimizer, lambda variables: tf.reduce_sum(variables[0]), initial, 1)
    with pytest.raises(ValueError, match="`loss` must return a scalar tensor"):
        legacy.run_plan(optimizer, lambda variables: variables[0] * variables[1], initial, 1)
    with pytest.raises(ValueError, match="`loss` must return a scalar tensor"):
        legacy.run_plan(optimizer, lambda variables: None, initial, 1)
