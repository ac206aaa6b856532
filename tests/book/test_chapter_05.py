"""What chapter 05 claims, tried on real graphs and the real Keras; and the data under its figures against NumPy."""

import ast
import functools
import itertools
import json
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
from tests.kit import ROOT

GRADIENTS = [10**k for k in range(9)]
MEANT = [sum(GRADIENTS[: step - step % 3]) for step in range(1, 10)]


@functools.cache
def record() -> dict[str, Any]:
    """What tests/benchmarks/race_soft_batch.py wrote."""
    return json.loads((ROOT / "book" / "data" / "soft_batch_race.json").read_text())


def recorded(variant: str, variables: str, size: int) -> dict[str, Any]:
    (result,) = [
        entry
        for entry in record()["results"]
        if (entry["variant"], entry["variables"], entry["size"]) == (variant, variables, size)
    ]
    return result


def upstream(graph: tf.Graph, name: str) -> set[str]:
    """The names of all nodes that a node waits for, from the serialised graph."""
    nodes = {node.name: node for node in graph.as_graph_def().node}
    found: set[str] = set()
    waiting = [name]
    while waiting:
        for entry in nodes[waiting.pop()].input:
            earlier = entry.lstrip("^").partition(":")[0]
            if earlier not in found:
                found.add(earlier)
                waiting.append(earlier)
    return found


def writes(graph: tf.Graph) -> list[str]:
    in_step = upstream(graph, "step")
    return [node.name for node in graph.as_graph_def().node if "Assign" in node.op and node.name in in_step]


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


@pytest.mark.claim("The published weight moves at every step.", chapter="05")
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


def outcomes(variant: str, s: float, i: int, g: float) -> tuple[int, set[tuple[float, float, int]]]:
    """One step from θ = 0 with N = h = 3, its reads and writes by hand in every order: how many, and the results."""
    a = "accumulator"

    def choose(t: dict[str, Any], yes: float, no: float) -> float:
        return yes if t["i"] % 3 == 0 else no

    # name: (what it waits for, what it does to memory m and the values t that were read)
    count = {"count": ([], lambda m, t: m.update(i=m["i"] + 1))}
    reads = {
        "read p": ([], lambda m, t: t.update(p=m["p"])),
        "read s": ([], lambda m, t: t.update(s=m[a])),
        "read s again": ([], lambda m, t: t.update(again=m[a])),
    }
    actions: dict[str, tuple[list[str], Callable[..., Any]]] = {
        "published": count
        | reads
        | {
            "move": (["read p", "read s"], lambda m, t: m.update(p=t["p"] - t["s"])),
            "restart": ([], lambda m, t: m.update({a: g})),
            "grow": (["read s again"], lambda m, t: m.update({a: t["again"] + g})),
        },
        "masked": count
        | reads
        | {
            "read p again": ([], lambda m, t: t.update(old=m["p"])),
            "read i": ([], lambda m, t: t.update(i=m["i"])),
            "move": (
                ["read p", "read p again", "read s", "read i"],
                lambda m, t: m.update(p=choose(t, t["p"] - t["s"], t["old"])),
            ),
            "accumulate": (["read s again", "read i"], lambda m, t: m.update({a: choose(t, g, t["again"] + g)})),
        },
    }[variant]  # type: ignore[assignment]
    orders, results = 0, set()
    for order in itertools.permutations(actions):
        place = {name: position for position, name in enumerate(order)}
        if all(place[before] < place[name] for name, (waits, _) in actions.items() for before in waits):
            memory: dict[str, Any] = {"p": 0.0, a: s, "i": i}
            seen: dict[str, Any] = {}
            for name in order:
                actions[name][1](memory, seen)
            orders += 1
            results.add((memory["p"], memory[a], memory["i"]))
    return orders, results


@functools.cache
def printed() -> str:
    cells = [cell for cell in notebook("05").cells if cell.cell_type == "code"]
    return "\n".join(output.get("text", "") for cell in cells for output in cell.outputs)


@pytest.mark.parametrize(("variant", "results", "orders"), [("published", 9, "840"), ("masked", 3, "3,072")])
@pytest.mark.claim(
    "From one and the same memory, one step of the published plan can end in nine ways, and one of the repair in "
    "three.",
    chapter="05",
)
def test_how_many_ways_a_step_can_end(variant: str, results: int, orders: str) -> None:
    number, found = outcomes(variant, 111.0, 3, 1000.0)
    assert len(found) == results
    assert f"{number:,}" == orders
    (line_of_variant,) = [row for row in printed().splitlines() if row.startswith(variant) and "accesses" in row]
    assert line_of_variant.split("accesses, ")[1].split() == [orders, "orders,", str(results), "results"]
    if variant == "published":  # why the chapter's first table begins with step two
        assert {weight for weight, _, _ in outcomes(variant, 0.0, 0, 1.0)[1]} == {0.0, -1.0, -2.0}
    if variant == "masked":
        assert found == {(-111.0, 1000.0, 4), (-1000.0, 1000.0, 4), (0.0, 1111.0, 4)}


def digits_of(path: list[list[int]]) -> list[tuple[float, float, int]]:
    return [(-float(weight), float(total), step) for step, (weight, total) in enumerate(path, start=1)]


@pytest.mark.parametrize("variables", ["ref", "resource"])
@pytest.mark.parametrize("variant", ["published", "masked"])
def test_the_record_holds_only_what_can_happen(variant: str, variables: str) -> None:
    for path in recorded(variant, variables, 1)["trajectories"]:
        weight, total = 0.0, 0.0
        for count, (gradient, (after, new_total, _)) in enumerate(zip(GRADIENTS, digits_of(path), strict=True)):
            moves = {(p, s) for p, s, _ in allowed(variant, total, count % 3, float(gradient))}
            assert (after - weight, new_total) in moves
            weight, total = after, new_total


@functools.cache
def allowed(variant: str, s: float, i: int, g: float) -> set[tuple[float, float, int]]:
    return outcomes(variant, s, i, g)[1]


@pytest.mark.claim("The ordered graph allows 36 orders, and all of them give one result.", chapter="05")
def test_the_ordered_plan_has_one_result() -> None:
    graph = legacy.soft_batch_graph(3, 3.0, "ordered", "resource")
    nodes = {node.name: node for node in graph.as_graph_def().node}
    reads = {name for name in upstream(graph, "step") if nodes[name].op == "ReadVariableOp"}
    assert len(reads) == len(writes(graph)) == 3
    for name in writes(graph):
        assert reads <= upstream(graph, name)  # every write waits for every read, so 3! orders of each remain
        assert not set(writes(graph)) & upstream(graph, name)
    assert 6 * 6 == 36
    for variables in ("ref", "resource"):
        runs = {tuple(map(tuple, legacy.trace_soft_batch(GRADIENTS, 3, 3.0, "ordered", variables))) for _ in range(15)}
        assert len(runs) == 1


@pytest.mark.claim(
    "With a weight of realistic size, 400 identical runs of the published code gave 393 different trajectories.",
    chapter="05",
)
@pytest.mark.claim("In 397 of 400 runs of the published code the weight or its sum was *torn*", chapter="05")
@pytest.mark.claim(
    "On the variables of TensorFlow 2, 160 of 400 runs of the repair lost two gradients out of three in every window",
    chapter="05",
)
def test_the_record_is_quoted_rightly() -> None:
    assert record()["runs"] == 400
    assert all(sum(entry["counts"]) == 400 for entry in record()["results"])
    assert len(recorded("published", "ref", 200_000)["counts"]) == 393
    assert recorded("published", "ref", 200_000)["torn"] == 397
    assert recorded("masked", "ref", 200_000)["torn"] == 21
    assert recorded("ordered", "ref", 200_000)["torn"] == 0
    repair = recorded("masked", "resource", 1)
    lossy = [1, 1, 1, 1001, 1001, 1001, 1001001, 1001001, 1001001]
    assert [
        n for n, path in zip(repair["counts"], repair["trajectories"], strict=True) if lossy == [w for w, _ in path]
    ] == [160]


@pytest.mark.parametrize("variables", ["ref", pytest.param("resource", marks=pytest.mark.xfail(strict=True))])
@pytest.mark.claim(
    'A variable of 2018 was read by handing out its own memory, so a value "read" before a write could still change '
    "with it.",
    chapter="05",
)
def test_a_read_of_2018_changes_with_a_later_write(variables: str) -> None:
    with tf.Graph().as_default(), tf.compat.v1.Session() as session:
        weight = tf.compat.v1.Variable(np.ones(1000), use_resource=variables == "resource")
        value = weight.read_value()
        with tf.control_dependencies([value]):
            write = weight.assign_add(np.ones(1000))
        with tf.control_dependencies([write]):
            later = tf.raw_ops.DeepCopy(x=value)
        session.run(weight.initializer)
        assert (session.run(later) == 2.0).all()


@pytest.mark.parametrize(
    "variant",
    ["ordered", pytest.param("as meant", marks=pytest.mark.xfail(strict=True, reason="this one does what was meant"))],
)
@pytest.mark.claim("The first update of the soft batch, at step one, applies an empty sum.", chapter="05")
@pytest.mark.claim("The last complete window of the soft batch is never applied", chapter="05")
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
@pytest.mark.claim("On the digits, Keras's `gradient_accumulation_steps` does what was meant.", chapter="05")
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
    late, meant_again = map(points, figure_data("05")[5])
    assert meant_again == windows
    assert late == {(gradient, step + 1) for gradient, step in windows if step < 9}


@pytest.mark.parametrize(("place", "variant"), [(1, "published"), (2, "masked"), (4, "ordered")])
def test_drawn_edges_are_those_of_the_graph(place: int, variant: str) -> None:
    (axes,) = figure_data("05")[place]
    drawn = {tuple(entry["label"].split(" → ")) for entry in axes["lines"]}
    graph = legacy.soft_batch_graph(3, 3.0, variant)
    named = {name for edge in drawn for name in edge} | set(writes(graph))
    nodes = {node.name: node for node in graph.as_graph_def().node}

    def direct(name: str) -> set[str]:
        """The named nodes that a node waits for with no other named node between."""
        earlier = {entry.lstrip("^").partition(":")[0] for entry in nodes[name].input}
        return {before for before in earlier if before in named}.union(*(direct(b) for b in earlier - named))

    assert drawn == {(before, name) for name in named for before in direct(name)}
    assert {"due", "move", "gradient", "accumulator/read"} <= named
    for start, end in drawn:
        (x0, x1), _ = line(axes, f"{start} → {end}")
        assert x0 < x1  # from left to right, as the text says


def test_bars_are_the_record() -> None:
    (axes,) = figure_data("05")[3]
    keys = [
        ("published", "ref", 1), ("published", "ref", 200_000), ("masked", "ref", 1), ("masked", "ref", 200_000),
        ("masked", "resource", 1), ("ordered", "ref", 1), ("ordered", "ref", 200_000),
    ]  # fmt: skip
    widths = [count for key in keys for count in recorded(*key)["counts"]]
    assert [round(width) for width, _ in axes["bars"]] == widths


def test_the_literals_of_the_chapter_are_the_record() -> None:
    sources = [cell.source for cell in notebook("05").cells if cell.cell_type == "code"]
    (cell,) = [source for source in sources if "torn = {" in source]
    values = {
        ast.unparse(node.targets[0]): eval(compile(ast.Expression(node.value), "chapter", "eval"))
        for node in ast.parse(cell).body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) in ("record", "torn")
    }
    assert values["torn"] == {name: recorded(name, "ref", 200_000)["torn"] for name in values["torn"]}
    assert values["record"]["masked, TF 2\none number"] == recorded("masked", "resource", 1)["counts"]
    for variant in ("published", "masked", "ordered"):
        assert values["record"][f"{variant}\none number"] == recorded(variant, "ref", 1)["counts"]
        assert values["record"][f"{variant}\n200,000 numbers"] == recorded(variant, "ref", 200_000)["counts"]
