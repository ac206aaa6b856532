"""Holds `exercises.check` itself: numbers of any kind, as many answers as are asked for, readers' own settings."""

import inspect
from collections.abc import Iterator
from fractions import Fraction
from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import ops

import companion
from companion import exercises
from companion.exercises.answers import number, truth, whole
from tests.kit import ROOT

CHAPTERS = sorted(path.stem[-2:] for path in (ROOT / "companion" / "exercises").glob("chapter_*.py"))
EVERY = {number: check for chapter in CHAPTERS for number, check in exercises.checks_of(chapter).items()}


def test_every_chapter_has_tests_of_its_exercises() -> None:
    missing = [chapter for chapter in CHAPTERS if not (ROOT / f"tests/exercises/test_chapter_{chapter}.py").exists()]
    assert not missing, "no tests/exercises/test_chapter_NN.py"


@pytest.mark.parametrize("given", [1.4, 1, None, ..., ["01.4"], b"01.4", "01", "1.4", "01.9", "", ".", "01.4 ", "99.1"])
def test_number_of_no_exercise(given: Any) -> None:
    with pytest.raises(ValueError, match=r"`number` must be that of an exercise, such as '01\.2'\. Received: number="):
        exercises.check(given, 1)


@pytest.mark.parametrize("name", EVERY)
@pytest.mark.parametrize("extra", [-1, 1, 3])
def test_too_few_and_too_many_answers_are_counted(name: str, extra: int) -> None:
    asked = len(inspect.signature(EVERY[name]).parameters)
    verdict = exercises.check(name, *[92] * (asked + extra))
    assert not verdict.correct
    assert f"asks for {asked} answer" in verdict.message
    assert f"and {asked + extra} w" in verdict.message
    assert "_" not in verdict.message.split("check(")[0].partition("(")[0]


@pytest.mark.parametrize(
    "value",
    [
        *(92, 92.0, np.int8(92), np.float16(92), np.array(92), np.array([92.0]), Fraction(92)),
        *(tf.constant(92), tf.Variable(92.0), keras.Variable(92.0)),
    ],
)
def test_number_of_any_kind(value: Any) -> None:
    assert number(value) == whole(value) == 92
    assert exercises.check("01.4", value).correct
    assert truth(value) is None


@pytest.mark.parametrize(
    "value", [None, ..., "92", b"92", True, np.True_, np.array(True), [92], (92,), np.array([9, 2])]
)
@pytest.mark.parametrize("more", [np.nan, np.inf, 1j, np.array([]), {}, int, np.datetime64(92, "D"), object()])
def test_what_is_no_number(value: Any, more: Any) -> None:
    for each in (value, more):
        assert number(each) is None
        assert whole(each) is None


def test_what_is_no_whole_number() -> None:
    assert whole(92.5) is whole(np.array(0.1)) is None


@pytest.mark.parametrize("value", [True, np.True_, np.array(True), tf.constant(True)])
def test_truth_of_any_kind(value: Any) -> None:
    assert truth(value) is True
    assert truth([value]) is None


ARRAYS: list[tuple[str, tuple[Any, ...]]] = [
    ("02.2", (np.array([False, True, True, False]),)),
    ("02.2", ([np.array(False), np.True_, tf.constant(True), False],)),
    ("02.4", (np.array([0, 5, 1, 5, 1]),)),
    ("03.4", (np.array([4.75, 5.25]),)),
    ("05.2", (np.array([0, 11, 11, 1111, 1111, 111111]),)),
    ("07.2", ({"flush": np.array(5), "carry": 3.0, "drop": np.int64(0)},)),
    ("13.4", ({"A": np.array(False), "B": np.True_, "C": False, "D": tf.constant(False), "E": True},)),
]


@pytest.mark.parametrize(("name", "answer"), ARRAYS)
def test_arrays_are_read_as_lists_are(name: str, answer: tuple[Any, ...]) -> None:
    """The same verdict, to the word, as for plain Python."""

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: plain(entry) for key, entry in value.items()}
        if isinstance(value, list):
            return [plain(entry) for entry in value]
        found = np.asarray(value).tolist()
        return int(found) if isinstance(found, float) and found == round(found) and name == "07.2" else found

    assert exercises.check(name, *answer) == exercises.check(name, *map(plain, answer))


@pytest.mark.parametrize("answer", [keras.Variable(1.0), keras.Variable([1.0, 2.0, 3.0]), [[1, 2], [3]]])
@pytest.mark.parametrize("name", ["08.4", "09.3", "11.1", "11.2", "17.2"])
def test_what_cannot_be_gone_through_is_an_answer(name: str, answer: Any) -> None:
    assert "raised" not in exercises.check(name, answer).message


def test_two_numbers_in_a_variable() -> None:
    two = tuple(np.log(1000) / -np.log1p(-1.8 / across) for across in (1e3, 1e4))
    assert exercises.check("08.4", keras.Variable(two)).correct


# ---- a reader's own settings ----------------------------------------------------------------------------------------


@pytest.fixture(params=["float64", "mixed"])
def own_precision(request: Any) -> Iterator[str]:
    floatx, policy = keras.config.floatx(), keras.config.dtype_policy()
    if request.param == "mixed":
        keras.config.set_dtype_policy("mixed_bfloat16")
    else:
        keras.config.set_floatx(request.param)
        keras.config.set_dtype_policy(request.param)
    yield request.param
    keras.config.set_floatx(floatx)
    keras.config.set_dtype_policy(policy)


class Sign(keras.optimizers.Optimizer):
    """Right for 01.1."""

    def update_step(self, gradient: Any, variable: Any, learning_rate: Any) -> None:
        self.assign_sub(variable, ops.cast(learning_rate, variable.dtype) * ops.sign(gradient))


class NonNegative(keras.constraints.Constraint):
    """Right for 01.3."""

    def __call__(self, weights: Any) -> Any:
        return ops.relu(weights)


class RMSprop(keras.optimizers.Optimizer):
    """Right for 02.1."""

    def __init__(self, learning_rate: Any = 0.001, rho: float = 0.9, epsilon: float = 1e-7, **options: Any) -> None:
        super().__init__(learning_rate, **options)
        self.rho, self.epsilon = rho, epsilon

    def build(self, variables: list[Any]) -> None:
        super().build(variables)
        self.means = self.add_optimizer_variables(variables, "mean")

    def update_step(self, gradient: Any, variable: Any, learning_rate: Any) -> None:
        mean = self.means[self._get_variable_index(variable)]
        self.assign(mean, self.rho * mean + (1 - self.rho) * ops.square(gradient))
        h = ops.cast(learning_rate, variable.dtype)
        self.assign_sub(variable, h * gradient / (ops.sqrt(mean) + self.epsilon))

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "rho": self.rho, "epsilon": self.epsilon}


class Velocity(companion.Momentum):
    """Right for 02.3."""

    def __init__(self, learning_rate: Any = 0.01, **options: Any) -> None:
        super().__init__(learning_rate, momentum=0.9, **options)


class Nesterov(companion.Momentum):
    """Right for 03.2."""

    def update_step(self, gradient: Any, variable: Any, learning_rate: Any) -> None:
        h = ops.cast(learning_rate, variable.dtype)
        v = self.velocities[self._get_variable_index(variable)]
        self.assign(v, self.momentum * v - h * gradient)
        self.assign_add(variable, self.momentum * v - h * gradient)


class SAM(companion.InjectedOptimizer):
    """Right for 09.2."""

    def __init__(self, learning_rate: Any = 0.01, rho: float = 0.05, **options: Any) -> None:
        super().__init__(learning_rate, **options)
        self.rho = rho

    def direction(self, oracle: Any, values: list[Any], learning_rate: Any) -> list[Any]:
        slopes = oracle(values)
        size = ops.sqrt(sum(ops.sum(ops.square(slope)) for slope in slopes))
        return oracle([v + ops.divide_no_nan(self.rho * k, size) for v, k in zip(values, slopes, strict=True)])

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "rho": self.rho}


class Brake(companion.Momentum):
    """Right for 11.4."""

    def update_step(self, gradient: Any, variable: Any, learning_rate: Any) -> None:
        h = ops.cast(learning_rate, variable.dtype)
        v = self.velocities[self._get_variable_index(variable)]
        uphill = ops.sum(gradient * v) > 0
        self.assign(v, self.momentum * ops.where(uphill, ops.zeros_like(v), v) - h * gradient)
        self.assign_add(variable, v)


RIGHT: dict[str, tuple[Any, ...]] = {
    "01.1": (Sign,),
    "01.3": (NonNegative(), [3.0]),
    "02.1": (RMSprop,),
    "02.2": ([False, True, True, False],),
    "02.3": (Velocity,),
    "03.2": (Nesterov,),
    "05.1": ([False, True, False, True, False, True],),
    "09.2": (SAM,),
    "11.4": (Brake,),
}


@pytest.mark.parametrize("name", RIGHT)
def test_right_answers_are_right_in_every_precision(name: str, own_precision: str) -> None:
    verdict = exercises.check(name, *RIGHT[name])
    assert verdict.correct, verdict


def in_place(parts: Any, weights: Any) -> list[Any]:
    """A right merge for 06.1 that writes into what it is given."""
    kept = [(part, weight) for part, weight in zip(parts, weights, strict=True) if weight]
    for part, weight in kept:
        for array in part:
            array *= weight
    return [sum(arrays) / sum(weight for _, weight in kept) for arrays in zip(*(p for p, _ in kept), strict=True)]


def of_tokens(gradients: Any, masks: Any) -> Any:
    """The same for 14.1."""
    return in_place([[gradient] for gradient in gradients], [mask.sum() for mask in masks])[0]


def step(weight: Any, total: Any, count: int, gradient: float) -> list[Any]:
    """Right for 05.4, in a list, with a mean that is rounded."""
    total, count = total + gradient, count + 1
    return [weight - 3 * (total * (1 / 3)), 0, count] if count % 3 == 0 else [weight, total, count]


def traffic(steps: int, every: int, warmup: int, weights: int) -> tuple[int, int]:
    """Right for 15.1."""
    exchanges = min(steps, warmup) - (min(steps, warmup) - steps) // every
    return exchanges, 4 * weights * exchanges


def outer_step(anchor: Any, workers: Any, velocity: Any, rate: float, momentum: float) -> tuple[Any, Any]:
    """Right for 15.2."""
    pull = rate * (anchor - workers.mean(axis=0))
    velocity = momentum * velocity - pull
    return anchor + momentum * velocity - pull, velocity


def lion(theta: Any, m: Any, g: Any, h: float, beta_1: float, beta_2: float) -> tuple[Any, Any]:
    """Right for 16.1."""
    return theta - h * np.sign(beta_1 * m + (1 - beta_1) * g), beta_2 * m + (1 - beta_2) * g


@pytest.mark.parametrize(
    ("name", "answer"),
    [
        ("06.1", in_place),
        ("14.1", of_tokens),
        ("14.1", lambda *given: of_tokens(*given)),  # once more: nothing of the book's was changed
        ("05.4", step),
        ("09.1", np.float32(1) - np.float32(1e-7)),
        ("17.3", np.float32(0.1) - np.float32(0.1) * np.float32(4) * (np.float32(0.1) + np.float32(0.5))),
        ("15.1", lambda *given: np.array([given[0], 4 * given[0] * given[3]]) if given[1] == 1 else traffic(*given)),
        ("15.2", lambda *given: np.stack(outer_step(*given))),
        ("16.1", lambda *given: ops.stack(lion(*given))),
        ("13.1", lambda theta, h: (ops.square(theta) - 1) ** 2 / 4 + h / 4 * (ops.power(theta, 3.0) - theta) ** 2),
        ("13.2", lambda curvature, h: None if h * curvature >= 1 else -ops.log(1 - h * curvature) / h),
    ],
)
def test_right_in_another_form(name: str, answer: Any) -> None:
    assert exercises.check(name, answer).correct, exercises.check(name, answer)
