"""What chapter 05 claims, tried on real graphs and the real Keras; and the data under its figures against NumPy."""

import functools
import itertools
from collections.abc import Callable
from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import ops

import companion
from companion import datasets, legacy
from tests.book.reading import figure_data, line, notebook
from tests.kit.soft_batch import drawn_and_true_edges, record, recorded, upstream, writes

GRADIENTS = [10**k for k in range(9)]
MEANT = [sum(GRADIENTS[: step - step % 3]) for step in range(1, 10)]


def hits(uses: Callable[[list[Any]], Any], rate: float = 0.5) -> float:
    """Test accuracy of softmax regression whose update number k uses what ``uses`` makes of the gradients so far."""
    data = datasets.digits("float64")
    kernel, gradients = np.zeros((64, 10)), []
    for k in range(450):
        batch = np.arange(32 * k, 32 * k + 32) % len(data.x_train)
        images, labels = data.x_train[batch], data.y_train[batch]
        scores = np.exp(images @ kernel)
        error = scores / scores.sum(axis=1, keepdims=True) - np.eye(10)[labels]
        gradients.append(images.T @ error / 32)
        kernel = kernel - rate / 3 * uses(gradients)
    return float(np.mean(np.argmax(data.x_test @ kernel, axis=1) == data.y_test))


def as_meant(gradients: list[Any]) -> Any:
    return sum(gradients[-3:]) if len(gradients) % 3 == 0 else 0


@pytest.mark.parametrize(
    "uses",
    [
        pytest.param(lambda gradients: sum(gradients[-2:]), id="recorded"),
        pytest.param(as_meant, id="meant", marks=pytest.mark.xfail(strict=True)),
    ],
)
@pytest.mark.claim(
    "A soft batch that uses its gradients twice and at every step reads more of the test images than the one that was "
    "meant.",
    chapter="05",
)
def test_the_recorded_rule_learns_better(uses: Callable[[list[Any]], Any]) -> None:
    assert hits(uses) > hits(as_meant) > 0.9
    assert hits(uses) == pytest.approx(hits(as_meant, rate=1.0), abs=0.005)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("variables", ["ref", "resource"])
@pytest.mark.parametrize(
    "variant",
    ["published", *[pytest.param(name, marks=pytest.mark.xfail(strict=True)) for name in ("masked", "ordered")]],
)
@pytest.mark.claim("Not one of the published writes waits for the condition.", chapter="05")
def test_no_published_write_waits(variant: str, variables: str, momentum: float) -> None:
    graph = legacy.soft_batch_graph(3, 3.0, variant, variables, momentum)
    assert len(writes(graph)) == 4 + (momentum > 0)
    assert not any("due" in upstream(graph, name) for name in writes(graph))


@pytest.mark.claim("From the second step on, the published weight moves at every step.", chapter="05")
def test_published_moves_at_every_step() -> None:
    for steps, variables in itertools.product((2, 3, 5), ("ref", "resource")):
        weights = [s.parameter for s in legacy.trace_soft_batch(GRADIENTS, steps, 1.0, "published", variables)]
        assert all(after < before for before, after in itertools.pairwise(weights))


@pytest.mark.parametrize("condition", [False, True])
@pytest.mark.claim("A tensor made outside a branch is computed before the branch.", chapter="05")
def test_what_is_made_outside_a_branch_runs_anyway(condition: bool) -> None:
    def outside(weight: Any, due: Any) -> Any:
        move = tf.compat.v1.assign(weight, 2.0)
        return tf.cond(due, lambda: move, lambda: tf.constant(-1.0))

    def switched(weight: Any, due: Any) -> Any:
        return legacy._switch(due, tf.compat.v1.assign(weight, 2.0), tf.constant(-1.0), name="choice")

    def inside(weight: Any, due: Any) -> Any:
        return tf.cond(due, lambda: tf.compat.v1.assign(weight, 2.0), lambda: tf.constant(-1.0))

    for build, expected in ((outside, 2.0), (switched, 2.0), (inside, 2.0 if condition else 1.0)):
        with tf.Graph().as_default(), tf.compat.v1.Session() as session:
            weight, due = tf.compat.v1.Variable(1.0), tf.compat.v1.placeholder(tf.bool, ())
            session.run(weight.initializer)
            assert session.run(build(weight, due), {due: condition}) == (2.0 if condition else -1.0)
            assert session.run(weight) == expected


@pytest.mark.parametrize(
    "variant",
    ["ordered", pytest.param("as meant", marks=pytest.mark.xfail(strict=True, reason="this one does what was meant"))],
)
@pytest.mark.claim("The first update of the ordered plan, at step one, applies an empty sum.", chapter="05")
@pytest.mark.claim("The last complete window of the ordered plan is never applied", chapter="05")
def test_off_by_one(variant: str) -> None:
    if variant == "ordered":
        weights = [-s.parameter for s in legacy.trace_soft_batch(GRADIENTS, 3, 3.0, "ordered")]
        # An update at step one: momentum and a start away from zero would show it; a growing count does here.
        assert legacy.trace_soft_batch([1.0], 1000, 3.0, "ordered")[0] == (0.0, 1.0, 1)
    else:
        weights = [float(value) for value in MEANT]
    late = [0.0, 0.0, 0.0, *[111.0] * 3, *[111111.0] * 3]
    np.testing.assert_allclose(weights, late)


def choose_between_results(weight: Any, due: Any) -> Any:
    moved = weight.assign(weight - 1.0)
    return ops.cond(due, lambda: moved, lambda: weight.value)


def where_of_an_assignment(weight: Any, due: Any) -> Any:
    return ops.where(due, weight.assign(weight - 1.0), weight)


def assign_inside_the_branch(weight: Any, due: Any) -> Any:
    return ops.cond(due, lambda: weight.assign(weight - 1.0), lambda: weight.value)


def assignment_of_a_where(weight: Any, due: Any) -> Any:
    return weight.assign(ops.where(due, weight - 1.0, weight))


MODES: dict[str, Callable[[Any], Any]] = {
    "eager": lambda function: function,
    "function": tf.function,
    "xla": functools.partial(tf.function, jit_compile=True),
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    "way",
    [
        choose_between_results,
        where_of_an_assignment,
        pytest.param(assign_inside_the_branch, marks=pytest.mark.xfail(strict=True, reason="right")),
        pytest.param(assignment_of_a_where, marks=pytest.mark.xfail(strict=True, reason="right")),
    ],
)
@pytest.mark.claim(
    "An assignment made before `ops.cond` or `ops.where` runs whatever they choose: eagerly, in a `tf.function` and "
    "under XLA.",
    chapter="05",
)
def test_the_bug_of_today(way: Callable[..., Any], mode: str) -> None:
    weight = keras.Variable(5.0)
    MODES[mode](functools.partial(way, weight))(tf.constant(False))
    assert float(weight.numpy()) == 4.0


@pytest.mark.parametrize("way", [assign_inside_the_branch, assignment_of_a_where])
def test_the_right_ways_still_move_when_due(way: Callable[..., Any]) -> None:
    for mode in MODES.values():
        weight = keras.Variable(5.0)
        mode(functools.partial(way, weight))(tf.constant(True))
        assert float(weight.numpy()) == 4.0


@pytest.mark.claim("The true branch of the wrong step holds nothing but an identity", chapter="05")
def test_what_a_branch_holds() -> None:
    for way, expected in ((assign_inside_the_branch, True), (choose_between_results, False)):
        weight = keras.Variable(5.0)
        concrete = tf.function(functools.partial(way, weight)).get_concrete_function(tf.TensorSpec((), tf.bool))
        (choice,) = [o for o in concrete.graph.get_operations() if o.type in ("If", "StatelessIf")]
        library = {f.signature.name: f for f in concrete.graph.as_graph_def().library.function}
        body = [node.op for node in library[choice.get_attr("then_branch").name].node_def]
        assert any("Assign" in name for name in body) == expected
        if not expected:
            assert body == ["Identity"]


@pytest.mark.parametrize("in_function", [False, True])
@pytest.mark.parametrize("optimizer_class", [keras.optimizers.SGD, companion.SGD])
@pytest.mark.claim("On the powers of ten, Keras's `gradient_accumulation_steps` does what was meant.", chapter="05")
def test_the_built_in_shows_the_right_digits(optimizer_class: type, in_function: bool) -> None:
    optimizer = optimizer_class(learning_rate=3.0, gradient_accumulation_steps=3)
    weight, found = keras.Variable(0.0, dtype="float64"), []
    optimizer.build([weight])

    def apply(gradient: Any) -> None:
        optimizer.apply([gradient], [weight])

    step = tf.function(apply) if in_function else apply
    for gradient in GRADIENTS:
        step(tf.constant(float(gradient), "float64"))
        found.append(round(-float(weight.numpy())))
    assert found == MEANT


def points(axes: dict[str, Any]) -> set[tuple[int, int]]:
    """The dots of a grid as pairs (gradient, step)."""
    (found,) = axes["points"]
    return {(round(gradient), round(step)) for gradient, step in found}


def test_grids_of_used_gradients() -> None:
    used, meant = map(points, figure_data("05")[0])
    windows = {(gradient, 3 * ((gradient + 2) // 3)) for gradient in range(1, 10)}
    assert meant == windows
    assert used == {(k, k) for k in range(1, 10)} | {(k - 1, k) for k in range(2, 10)}
    # The path in the figure is the most frequent one of the record: θ ← θ − (h / N) (g of now + g of before).
    weights = np.cumsum(GRADIENTS) + np.cumsum([0, *GRADIENTS[:-1]])
    assert [weight for weight, _ in recorded("published", "ref", 1)["trajectories"][0]] == weights.tolist()


def test_table_of_the_ordered_plan() -> None:
    """Each window comes whole, a step late, and what waits in the sum is what has come since."""
    (cell,) = (cell for cell in notebook("05").cells if cell.source.startswith("# @title The ordered plan"))
    shown = [list(map(int, row.split())) for row in cell.outputs[0].data["text/plain"].splitlines()[1:]]
    late = [0, *MEANT[:-1]]
    assert [row[1:3] for row in shown] == [list(each) for each in zip(MEANT, late, strict=True)]
    assert [row[3] for row in shown] == [sum(GRADIENTS[:k]) - late[k - 1] for k in range(1, 10)]


def test_picture_of_the_four_ways() -> None:
    """A line joins write and choice where they stand apart; where the write is inside, a frame is around it."""
    (axes,) = figure_data("05")[2]
    frames = {entry["label"]: len(entry["x"]) for entry in axes["lines"]}
    ways = [choose_between_results, where_of_an_assignment, assign_inside_the_branch, assignment_of_a_where]
    assert frames == dict(zip((way.__name__ for way in ways), (2, 2, 5, 2), strict=True))


@pytest.mark.parametrize(("place", "variant"), [(1, "published"), (3, "masked")])
def test_drawn_edges_are_those_of_the_graph(place: int, variant: str) -> None:
    (axes,) = figure_data("05")[place]
    drawn, true = drawn_and_true_edges(axes, variant)
    assert drawn == true
    assert {"due", "move", "gradient", "accumulator/read"} <= {name for edge in drawn for name in edge}
    for start, end in drawn:
        (x0, x1), _ = line(axes, f"{start} → {end}")
        assert x0 < x1  # from left to right, as the text says


def test_the_recorded_run_was_the_most_frequent_one() -> None:
    assert record()["runs"] == 400
    assert recorded("published", "ref", 1)["counts"][0] == 378
