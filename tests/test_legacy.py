"""The optimizer of 2018: its trajectory against NumPy, its isolation, its arguments."""

import inspect
import itertools
import warnings

import numpy as np
import pytest
import tensorflow as tf
from hypothesis import given
from hypothesis import strategies as st

import companion
from companion import legacy
from tests.kit.processes import output_of, warm


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


def numpy_soft_batch(gradients, steps, h, momentum=0.0, initial=0.0):
    """The ordered plan, written from its description: asks before it counts, moves without the current gradient."""
    parameter, velocity, total, rows = np.array(initial, "float64"), 0.0, 0.0, []
    for count, gradient in enumerate(np.asarray(gradients, "float64")):
        if count % steps == 0:
            velocity = momentum * velocity - h * total / steps
            parameter, total = parameter + velocity, gradient
        else:
            total = total + gradient
        rows.append((parameter, total, count + 1))
    return rows


@given(
    gradients=st.lists(st.floats(-100, 100), min_size=1, max_size=8),
    steps=st.integers(1, 5),
    h=st.floats(0, 4),
    momentum=st.sampled_from([0.0, 0.5, 0.9]),
    initial=st.floats(-10, 10),
    variables=st.sampled_from(["ref", "resource"]),
)
def test_ordered_soft_batch_is_its_description(gradients, steps, h, momentum, initial, variables) -> None:
    found = legacy.trace_soft_batch(gradients, steps, h, "ordered", variables, initial, momentum)
    expected = numpy_soft_batch(gradients, steps, h, momentum, initial)
    for step, (parameter, total, count) in zip(found, expected, strict=True):
        np.testing.assert_allclose(step.parameter, parameter, rtol=1e-12, atol=1e-9)
        np.testing.assert_allclose(step.accumulator, total, rtol=1e-12, atol=1e-9)
        assert step.iterations == count


def possible_results(variant, parameter, total, count, gradient, steps, h):
    """What one step of a plan may leave behind, by its reads and writes in every order that respects each write."""
    due = {count % steps == 0, (count + 1) % steps == 0}  # the counter may be read before or after its write
    if variant == "published":
        # The sum is read for the growth before or after the restart, and one of the two writes comes last.
        ends = {
            (2 * gradient, (total, gradient, 2 * gradient)),  # restart, read, grow
            (total + gradient, (total, gradient, total + gradient)),  # read, restart, grow
            (gradient, (total, total + gradient, gradient)),  # read, grow, restart
        }
        return {(parameter - h * used / steps, end, count + 1) for end, seen in ends for used in seen}
    results = set()
    for is_due in due:
        if is_due:  # the sum is read for the move before or after its restart
            results |= {(parameter - h * used / steps, gradient, count + 1) for used in (total, gradient)}
        else:
            results.add((parameter, total + gradient, count + 1))
    return results


@pytest.mark.parametrize("variables", ["ref", "resource"])
@pytest.mark.parametrize("variant", ["published", "masked"])
def test_racing_soft_batches_do_only_what_their_graph_allows(variant: str, variables: str) -> None:
    gradients = [10.0**k for k in range(7)]
    for _ in range(15):
        state = (0.0, 0.0, 0)
        for gradient, step in zip(
            gradients, legacy.trace_soft_batch(gradients, 3, 3.0, variant, variables), strict=True
        ):
            allowed = possible_results(variant, *state, gradient, 3, 3.0)
            state = (float(step.parameter), float(step.accumulator), step.iterations)
            assert state in allowed


@pytest.mark.parametrize("variables", ["ref", "resource"])
@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize(
    "variant",
    ["ordered", pytest.param("published", marks=pytest.mark.xfail(strict=True, reason="assigned outside the branch"))],
)
def test_weight_rests_between_updates(variant: str, momentum: float, variables: str) -> None:
    trace = legacy.trace_soft_batch([1, 10, 100, 1000, 10000], 3, 3.0, variant, variables, momentum=momentum)
    weights = [float(step.parameter) for step in trace]
    assert weights[1] == weights[2]
    assert weights[3] == weights[4]
    assert weights[2] != weights[3]


@pytest.mark.parametrize("variables", ["ref", "resource"])
def test_published_soft_batch_moves_at_every_step(variables: str) -> None:
    for momentum in (0.0, 0.9):
        for _ in range(5):
            trace = legacy.trace_soft_batch([1.0] * 6, 4, 1.0, "published", variables, momentum=momentum)
            weights = [float(step.parameter) for step in trace]
            assert all(after < before for before, after in itertools.pairwise(weights))


@pytest.mark.parametrize("variables", ["ref", "resource"])
def test_ordered_soft_batch_does_not_race(variables: str) -> None:
    gradients = np.outer(10.0 ** np.arange(7), np.ones(200_000))
    expected = numpy_soft_batch(gradients[:, 0], 3, 3.0)
    for _ in range(3):
        trace = legacy.trace_soft_batch(gradients, 3, 3.0, "ordered", variables)
        for step, (parameter, total, _) in zip(trace, expected, strict=True):
            assert (step.parameter == parameter).all()
            assert (step.accumulator == total).all()


def test_traces_are_copies() -> None:
    """A read may hand out the variable's own memory; what an earlier step returned must not change with it."""
    trace = legacy.trace_soft_batch(np.ones((6, 1000)), 1, 1.0, "ordered", initial=np.full(1000, 5.0))
    assert [float(step.parameter[0]) for step in trace] == [5.0, 4.0, 3.0, 2.0, 1.0, 0.0]
    trace[0].parameter[:] = 7.0
    assert trace[1].parameter[0] == 4.0


@pytest.mark.parametrize(("shape", "initial"), [((), 2), ((2, 3), 2.0), ((2, 3), np.ones((2, 3)))])
def test_soft_batch_keeps_shapes_and_arguments(shape, initial) -> None:
    gradients = np.ones((2, *shape), "float32")
    start = np.array(initial)
    trace = legacy.trace_soft_batch(list(gradients), 2, 0.5, "masked", initial=initial)
    assert all(np.shape(step.parameter) == np.shape(step.accumulator) == shape for step in trace)
    assert all(step.parameter.dtype == "float64" for step in trace)
    assert (gradients == 1).all()
    np.testing.assert_array_equal(initial, start)


@pytest.mark.parametrize("variables", ["ref", "resource"])
@pytest.mark.parametrize("variant", ["published", "masked", "ordered"])
def test_nothing_outside_notices_a_soft_batch(variant: str, variables: str, capfd: pytest.CaptureFixture[str]) -> None:
    variable = tf.Variable(3.0)
    tf.random.set_seed(5)
    expected = tf.random.normal([3]).numpy()
    tf.random.set_seed(5)
    before = (*_global_state(), tf.compat.v1.control_flow_v2_enabled())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        legacy.trace_soft_batch([1.0, 2.0], 2, 0.1, variant, variables)
        legacy.soft_batch_graph(2, 0.1, variant, variables)
        with pytest.raises(ValueError, match="learning_rate"):
            legacy.trace_soft_batch([1.0, 2.0], 2, -0.1, variant, variables)
    assert (*_global_state(), tf.compat.v1.control_flow_v2_enabled()) == before
    np.testing.assert_array_equal(tf.random.normal([3]).numpy(), expected)
    variable.assign_sub(1.0)
    assert variable.numpy() == 2.0
    captured = capfd.readouterr()
    assert captured.out == ""
    assert "deprecat" not in captured.err.lower()
    with tf.Graph().as_default() as outer:
        legacy.trace_soft_batch([1.0], 2, 0.1, variant, variables)
        assert not outer.get_operations()


def test_switch_is_what_cond_was_in_2018() -> None:
    """``tf.cond`` with the control flow of TensorFlow 1, in a process of its own, makes the same data operations."""
    code = """
from collections import Counter
import tensorflow as tf
from companion import legacy
tf.compat.v1.disable_control_flow_v2()
for kind in (False, True):
    found = []
    for choose in (legacy._switch, lambda c, then, otherwise, name: tf.cond(
            c, lambda: tf.convert_to_tensor(then), lambda: tf.convert_to_tensor(otherwise))):
        with tf.Graph().as_default() as graph:
            weight = tf.compat.v1.Variable(1.0, use_resource=kind)
            condition = tf.compat.v1.placeholder(tf.bool, (), name="condition")
            choose(condition, tf.compat.v1.assign(weight, 2.0), weight, name="choice")
            operations = [o for o in graph.get_operations() if o.type in ("Switch", "RefSwitch", "Merge", "Assign")]
            # The old tf.cond also sends the condition itself through a switch, to hang the insides of branches on.
            found.append(Counter(o.type for o in operations if not o.inputs[0].dtype.base_dtype == tf.bool))
    assert found[0] == found[1], found
print("same")
"""
    assert output_of(code, python=warm()) == "same\n"


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("variant", ["published", "masked", "ordered"])
def test_soft_batch_graph_is_the_graph_that_runs(variant: str, momentum: float) -> None:
    graph = legacy.soft_batch_graph(3, 0.5, variant, momentum=momentum)
    built = legacy._build_soft_batch(3, 0.5, variant, "ref", np.zeros(()), momentum)
    assert graph.as_graph_def() == built.graph.as_graph_def()
    names = {operation.name for operation in graph.get_operations()}
    assert {"gradient", "parameter", "accumulator", "iterations", "due", "move", "count", "step"} <= names
    assert ("velocity" in names) == (momentum > 0)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *[("gradients", value) for value in (None, [], 3.0, "123", [1.0, None], [1.0, [2.0]], [1.0, np.nan], [True])],
        *[("steps", value) for value in (0, -1, 2.0, True, "3", None)],
        *[("learning_rate", value) for value in (-0.1, np.nan, np.inf, "0.1", None, True)],
        *[("variant", value) for value in ("fixed", None, 1, ["masked"])],
        *[("variables", value) for value in ("Ref", None, True, ["ref"])],
        *[("initial", value) for value in (None, "0", np.inf, [1.0], True)],
        *[("momentum", value) for value in (-0.1, 1.0, np.nan, "0.9", None, True)],
    ],
)
def test_arguments_of_the_soft_batch_are_checked(name: str, value) -> None:
    arguments = {"gradients": [1.0, 2.0], "steps": 2, "learning_rate": 0.1, "variant": "ordered", name: value}
    with pytest.raises(ValueError, match=rf"`{name}` (?s:.*)Received: {name}="):
        legacy.trace_soft_batch(**arguments)
    if name not in ("gradients", "initial"):
        del arguments["gradients"]
        with pytest.raises(ValueError, match=rf"`{name}` (?s:.*)Received: {name}="):
            legacy.soft_batch_graph(**arguments)


def test_sources_that_the_book_prints_fit_its_page() -> None:
    for plan in legacy.PLANS.values():
        assert max(map(len, inspect.getsource(plan).splitlines())) <= 84
