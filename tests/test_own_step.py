"""Holds the law of the house on any list of models: in one part, an injected step leaves everything as Keras's own."""

from collections.abc import Callable, Iterator
from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from keras.src.random.seed_generator import global_seed_generator

from companion import CoalesceGradients, InjectedOptimizer, inject
from tests.kit.models import CASES, RANDOM_LAYERS, RANDOM_LOSSES, SGD, Case
from tests.kit.processes import on_devices
from tests.kit.ready import ready

pytestmark = pytest.mark.filterwarnings("ignore:Gradients do not exist")


def variables_of(*roots: Any) -> Iterator[Any]:
    """Every Keras variable that can be reached from some objects, in the order in which they are found."""
    seen, waiting = set[int](), list(roots)
    while waiting:
        item = waiting.pop(0)
        if id(item) in seen or isinstance(item, (str, bytes, type, np.ndarray, tf.Tensor, tf.TypeSpec)):
            continue
        seen.add(id(item))
        if isinstance(item, keras.Variable):
            yield item
        elif isinstance(item, dict):
            waiting.extend(item.values())
        elif isinstance(item, (list, tuple, set)):
            waiting.extend(item)
        elif type(item).__module__.startswith(("keras.", "tests.", "companion.")) and hasattr(item, "__dict__"):
            waiting.extend(value for key, value in vars(item).items() if "node" not in key)


def numbers_of(case: Case) -> list[tuple[str, Any]]:
    """What a step may have moved, without the names that a wrapper changes."""
    optimizer = case.model.optimizer
    theirs = {id(variable) for variable in variables_of(optimizer)}
    model = [variable for variable in variables_of(case.model, *case.others) if id(variable) not in theirs]
    everything = [*model, *optimizer.variables, global_seed_generator().state]
    return [(variable.path, variable.numpy()) for variable in everything]


def steps(case: Case, prepare: Callable[[Any], Any], how: str = "eager", count: int = 3) -> tuple[Any, Any]:
    """What every step shows, and what everything is afterwards."""
    prepare(case.model if how == "eager" else ready(case.model))
    step = case.model.train_step
    if how != "eager":
        step = tf.function(step, autograph=False, jit_compile=how == "XLA", reduce_retracing=True)
    logs = [{name: np.array(value) for name, value in step(case.batch).items()} for _ in range(count)]
    return logs, numbers_of(case)


def keras_alone(case: Case) -> None:
    if case.has_rows:
        case.model.optimizer = CoalesceGradients(case.model.optimizer)


def assert_identical(found: tuple[Any, Any], expected: tuple[Any, Any]) -> None:
    (logs, numbers), (expected_logs, expected_numbers) = found, expected
    for mine, theirs in zip(logs, expected_logs, strict=True):
        assert mine.keys() == theirs.keys()
        for name, value in theirs.items():
            np.testing.assert_array_equal(mine[name], value, err_msg=name)
    assert [name for name, _ in numbers] == [name for name, _ in expected_numbers]
    for (name, mine), (_, theirs) in zip(numbers, expected_numbers, strict=True):
        np.testing.assert_array_equal(mine, theirs, err_msg=name)


def some(*names: str) -> Any:
    """Every case, of which those that are not named run with ``--slow`` only."""
    return pytest.mark.parametrize(
        "name", [name if name in names else pytest.param(name, marks=pytest.mark.slow) for name in CASES]
    )


def plain_and_injected(name: str, how: str) -> None:
    case = CASES[name]()
    expected = steps(case, lambda model: keras_alone(case), how)
    assert_identical(steps(CASES[name](), inject, how), expected)


@pytest.mark.parametrize("name", CASES)
def test_one_part_is_keras_own_step(name: str) -> None:
    plain_and_injected(name, "eager")


COMPILED = ["not built", "stateful gru", "variational autoencoder", "tracker in compute loss", "loss with state"]


@pytest.mark.parametrize("name", [*COMPILED, "compute metrics of its own", "draws in a branch", "masked transformer"])
def test_one_part_is_keras_own_step_in_a_graph(name: str) -> None:
    plain_and_injected(name, "graph")


@pytest.mark.parametrize("name", ["batch norm and dropout", "variational autoencoder", "two outputs"])
def test_one_part_is_keras_own_step_under_xla(name: str) -> None:
    plain_and_injected(name, "XLA")


@pytest.mark.parametrize(
    "name", ["batch norm and dropout", "two outputs", "compute metrics of its own", "frozen layer"]
)
def test_the_graph_of_a_step_in_one_part_is_keras_own(name: str) -> None:
    def operations(prepare: Callable[[Any], Any]) -> list[str]:
        case = CASES[name]()
        prepare(case.model)
        specs = keras.tree.map_structure(lambda t: tf.TensorSpec([None, *t.shape[1:]], t.dtype), case.batch)
        step = tf.function(case.model.train_step, autograph=False, input_signature=[specs])
        definition = step.get_concrete_function().graph.as_graph_def()
        functions = [node for function in definition.library.function for node in function.node_def]
        return sorted(node.op for node in [*definition.node, *functions])

    assert operations(inject) == operations(lambda model: model)


@pytest.mark.parametrize("name", ["recomputed in the gradient", "layer called in training only"])
def test_one_part_that_is_checked_is_keras_own_step(name: str) -> None:
    expected = steps(CASES[name](), lambda model: model)
    assert_identical(steps(CASES[name](), lambda model: inject(model, check_finite=True)), expected)


def test_one_part_is_keras_own_fit_with_several_steps_at_a_time() -> None:
    def fit(prepare: Callable[[Any], Any]) -> tuple[Any, Any]:
        case = CASES["variational autoencoder"]()
        case.model.compile(SGD(0.1), "mse", steps_per_execution=2)
        prepare(case.model)
        x, y = case.batch
        history = case.model.fit(x, y, batch_size=2, epochs=2, class_weight=None, verbose=0).history
        return [history], numbers_of(case)

    assert_identical(fit(inject), fit(lambda model: model))


# Later questions


class Twice(InjectedOptimizer):
    """Asks twice, here and elsewhere, and goes where the first answer says."""

    def direction(self, oracle: Any, values: Any, learning_rate: Any) -> Any:
        first = oracle(values)
        oracle([value + 0.5 for value in values])
        for one, other in zip(first, oracle(values), strict=True):
            tf.debugging.assert_equal(one, other)
        return first


@some(
    "batch norm and dropout",
    "stateful gru",
    "variational autoencoder",
    "captcha by add loss",
    "loss with state",
    "state that is read again",
    "tracker in compute loss",
    "compute metrics of its own",
    "masked transformer",
    "subclass without training",
    "assigns to its weights",
    "function of tensorflow",
    "recomputed in the gradient",
    "layer called in training only",
)
def test_the_first_of_several_questions_is_keras_own_step_and_the_others_move_nothing(name: str) -> None:
    def steps_of(make: Callable[[], Any], prepare: Callable[[Any], Any]) -> tuple[Any, Any]:
        case = CASES[name]()
        case.model.optimizer = make()
        logs, numbers = steps(case, prepare)
        *others, seed = numbers
        return logs, [*others[: -len(case.model.optimizer.variables)], seed]

    expected = steps_of(lambda: SGD(0.1), lambda model: model)
    ours = lambda: steps_of(lambda: Twice(0.1), inject)  # noqa: E731
    if CASES[name]().again:
        for (mine, numbers), (theirs, reference) in [(ours(), expected)]:
            for one, other in zip(mine, theirs, strict=True):
                assert one.keys() == other.keys()
                for key in one:
                    np.testing.assert_allclose(one[key], other[key], rtol=1e-5, err_msg=key)
            for (path, one), (_, other) in zip(numbers, reference, strict=True):
                np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6, err_msg=path)
    else:
        with pytest.raises(ValueError, match="with an optimizer that asks once"):
            ours()


# Several parts


@some(
    "dense with regularizers and constraints",
    "stateful gru",
    "captcha by add loss",
    "sparse input",
    "loss with state",
    "compute metrics of its own",
    "two outputs",
    "masked transformer",
    "loss scale factor",
    "draws in a branch",
    "contrastive in batch",
    "function of tensorflow",
    "recomputed in the gradient",
)
def test_in_parts_a_batch_is_divided_exactly_or_not_at_all(name: str) -> None:
    case = CASES[name]()
    expected = steps(case, lambda model: keras_alone(case), count=2)
    case = CASES[name]()
    before = [weight.copy() for weight in case.model.get_weights()]
    divide = lambda model: inject(model, micro_batches=4)  # noqa: E731
    if case.parts == "refused":
        with pytest.raises(ValueError, match=r"`micro_batches`|`weight_fn`|in one part|batch size"):
            steps(case, divide)
        after = case.model.get_weights()[: len(before)]
        assert all(np.array_equal(one, other) for one, other in zip(before, after, strict=True))
        return
    logs, numbers = steps(case, divide, count=2)
    for mine, theirs in zip(logs, expected[0], strict=True):
        assert mine.keys() == theirs.keys()
    if case.parts == "exact":
        for mine, theirs in zip(logs, expected[0], strict=True):
            for key in theirs:
                np.testing.assert_allclose(mine[key], theirs[key], rtol=1e-4, err_msg=key)
        for (path, mine), (_, theirs) in zip(numbers, expected[1], strict=True):
            np.testing.assert_allclose(mine, theirs, rtol=1e-3, atol=1e-5, err_msg=path)
    else:
        moved = [not np.array_equal(one, other) for one, other in zip(before, case.model.get_weights(), strict=False)]
        assert any(moved) or not before  # it was not built


# Replicas


ON_REPLICAS = ["batch norm and dropout", "layer with counter and metric", "two outputs"]


def on_two_replicas() -> dict[str, Any]:
    """State after two steps on two replicas of three rows each, by Keras and injected."""
    found: dict[str, Any] = {}
    strategy = tf.distribute.MirroredStrategy()
    for name in ON_REPLICAS:
        for who, prepare in (("keras", lambda model: model), ("ours", inject), ("twice", inject)):
            with strategy.scope():
                case = CASES[name]()
                case.model.compile(Twice(0.0) if who == "twice" else SGD(0.0), case.model.loss)
                prepare(case.model)
            x, y = case.batch
            history = case.model.fit(x, y, batch_size=6, epochs=2, shuffle=False, verbose=0).history
            state = [variable.numpy().tolist() for variable in case.model.non_trainable_variables]
            found[f"{name}, {who}"] = [history, state]
    return found


def two_replicas() -> dict[str, Any]:
    program = "from tests import test_own_step\nprint(json.dumps(test_own_step.on_two_replicas()))"
    return on_devices(2, program)


@pytest.mark.parametrize("who", ["ours", "twice"])
@pytest.mark.parametrize("name", ON_REPLICAS)
def test_on_replicas_state_is_carried_on_as_by_keras(name: str, who: str) -> None:
    found = two_replicas()
    (history, state), (expected_history, expected_state) = found[f"{name}, {who}"], found[f"{name}, keras"]
    assert history.keys() == expected_history.keys()
    for key, values in expected_history.items():
        np.testing.assert_allclose(history[key], values, rtol=1e-5, err_msg=key)
    for one, other in zip(state, expected_state, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5)


# Random models and batches


@pytest.mark.slow
@settings(max_examples=1000, deadline=None, database=None, derandomize=True, phases=[Phase.generate])
@given(
    width=st.integers(1, 4),
    rows=st.integers(1, 6),
    layers=st.lists(st.sampled_from(sorted(RANDOM_LAYERS)), max_size=4),
    loss=st.sampled_from(sorted(RANDOM_LOSSES)),
    reduction=st.sampled_from(["sum_over_batch_size", "sum", "mean", "mean_with_sample_weight"]),
    optimizer=st.sampled_from(["sgd", "adam", "rmsprop", "lion", "adagrad", "ftrl"]),
    weighted=st.booleans(),
    seed=st.integers(0, 99),
)
def test_random_models_and_batches(
    width: int, rows: int, layers: Any, loss: Any, reduction: str, optimizer: str, weighted: bool, seed: int
) -> None:
    def run(prepare: Callable[[Any], Any]) -> tuple[Any, Any]:
        keras.utils.clear_session(free_memory=False)
        keras.utils.set_random_seed(seed)
        made = [RANDOM_LAYERS[layer]() for layer in layers]
        model = keras.Sequential([keras.Input((width,)), *made, keras.layers.Dense(3, RANDOM_LOSSES[loss][1])])
        model.compile(optimizer, RANDOM_LOSSES[loss][0](reduction=reduction), metrics=["mae"])
        generator = np.random.default_rng(seed)
        x, y, weight = (generator.uniform(size=size).astype("float32") for size in ((rows, width), (rows, 3), rows))
        batch = tuple(map(tf.constant, (x, y, weight) if weighted else (x, y)))
        return steps(Case(model, batch), prepare, count=2)

    assert_identical(run(inject), run(lambda model: model))
