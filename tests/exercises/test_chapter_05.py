"""Wrong answers to the exercises of chapter 05 get a hint that says where to look."""

import inspect

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import ops

from companion import exercises
from companion.exercises import chapter_05

NON_ANSWERS = [None, "right", 3.0, object(), [], int, np.array([])]
RIGHT = [False, True, False, True, False, True]


@pytest.mark.parametrize(
    ("answer", "hint"),
    [
        *[
            ([guess != (place == index) for place, guess in enumerate(RIGHT)], f"1 of 6 is off. Look at {letter}")
            for index, letter in enumerate("ABCDEF")
        ],
        ([not guess for guess in RIGHT], "6 of 6"),
        (RIGHT[:5], "6 booleans"),
        ([0, 1, 0, 1, 0, 1], "True (right) or False"),
        ([False, True, ..., True, False, True], "True (right) or False"),
        *[(answer, "6 booleans") for answer in NON_ANSWERS],
    ],
)
def test_right_or_wrong(answer, hint) -> None:
    verdict = exercises.check("05.1", answer)
    assert not verdict.correct
    assert hint in verdict.message


def test_right_or_wrong_right() -> None:
    assert exercises.check("05.1", RIGHT).correct


def test_snippets_do_not_tell_their_answers() -> None:
    for snippet in chapter_05.SNIPPETS:
        source = inspect.getsource(snippet)
        assert "#" not in source
        assert snippet.__doc__ is None
        assert max(map(len, source.splitlines())) <= 84
        for due in (False, True):
            assert all(isinstance(float(value), float) for value in snippet(due))


EAGER = [0, 2, 22, 222, 2222, 22222]


@pytest.mark.parametrize(
    ("answer", "hint"),
    [
        ([-value for value in EAGER], "asked is -θ"),
        ([0, 1, 11, 111, 1111, 11111], "step 2 is the first"),
        ([0, 0, 22, 22, 2222, 2222], "slip of paper"),
        ([1, *EAGER[1:]], "step 1 is the first"),
        ([*EAGER[:5], 0], "step 6 is the first"),
        (EAGER[:5], "the answer is a list of 6"),
        (["0"] * 6, "each entry is a number"),
        ([True] * 6, "each entry is a number"),
        *[(answer, "the answer is a list of 6") for answer in NON_ANSWERS],
    ],
)
def test_predict(answer, hint) -> None:
    verdict = exercises.check("05.2", answer)
    assert not verdict.correct
    assert hint in verdict.message


def test_predict_right() -> None:
    assert exercises.check("05.2", EAGER).correct


class Right(keras.optimizers.Optimizer):
    steps = 3
    offset = 1

    def build(self, variables):
        super().build(variables)
        self.sums = self.add_optimizer_variables(variables, "sum")

    def step(self, learning_rate, grown):
        return learning_rate * grown / self.steps

    def next_sum(self, due, grown, gradient):
        return ops.where(due, ops.zeros_like(grown), grown)

    def update_step(self, gradient, variable, learning_rate):
        total = self.sums[self._get_variable_index(variable)]
        due = ops.equal((self.iterations + self.offset) % self.steps, 0)
        grown = total + gradient
        step = self.step(learning_rate, grown)
        self.write(variable, due, step)
        self.assign(total, self.next_sum(due, grown, gradient))

    def write(self, variable, due, step):
        self.assign_sub(variable, ops.where(due, step, ops.zeros_like(step)))


class WithCond(Right):
    def write(self, variable, due, step):
        ops.cond(due, lambda: variable.assign(variable - step), lambda: ops.convert_to_tensor(variable))


class AsInTheChapter(Right):
    def write(self, variable, due, step):
        ops.cond(due, lambda: variable.assign(variable - step), lambda: variable.value)


class Outside(Right):
    def write(self, variable, due, step):
        moved = variable.assign(variable - step)
        ops.cond(due, lambda: moved, lambda: ops.convert_to_tensor(variable))


class Never(Right):
    def write(self, variable, due, step):
        pass


class NeverRestarts(Right):
    def next_sum(self, due, grown, gradient):
        return grown


class AlwaysRestarts(Right):
    def next_sum(self, due, grown, gradient):
        return ops.zeros_like(grown)


class KeepsTheLast(Right):
    def next_sum(self, due, grown, gradient):
        return ops.where(due, gradient, grown)


class OneSlotTooMany(Right):
    """Right weights, and more to remember than the sums."""

    def build(self, variables):
        super().build(variables)
        self.more = self.add_optimizer_variables(variables, "more")


class NoMean(Right):
    def step(self, learning_rate, grown):
        return learning_rate * grown


class Late(Right):
    offset = 0


class StoresOutside(Right):
    """The weight is repaired; both writes of the sum still stand outside the branch."""

    def update_step(self, gradient, variable, learning_rate):
        total = self.sums[self._get_variable_index(variable)]
        due = ops.equal((self.iterations + self.offset) % self.steps, 0)
        grown = total + gradient
        self.write(variable, due, self.step(learning_rate, grown))
        restarted = total.assign(ops.zeros_like(total))
        stored = total.assign(grown)
        ops.cond(due, lambda: restarted, lambda: stored)


class PythonIf(Right):
    def write(self, variable, due, step):
        if due:
            variable.assign_sub(step)


class EagerOnly(Right):
    def write(self, variable, due, step):
        if bool(ops.convert_to_numpy(due)):
            variable.assign_sub(step)


class OtherArguments(keras.optimizers.Optimizer):
    def __init__(self):
        super().__init__(learning_rate=1.0)


@pytest.mark.parametrize(
    ("answer", "hint"),
    [
        (Outside, "moves at every step"),
        (keras.optimizers.SGD, "moves at every step"),
        (Never, "never moves"),
        (NeverRestarts, "the first window is right and the second is not"),
        (KeepsTheLast, "the first window is right and the second is not"),
        (AlwaysRestarts, "not by the right amount"),
        (NoMean, "not by the right amount"),
        (OneSlotTooMany, "the sums are not"),
        (Late, "not after 3 and 6"),
        (StoresOutside, "What has to happen to the sum"),
        (PythonIf, "right when run eagerly. A tf.function records"),
        (AsInTheChapter, "let the branch return ops.convert_to_tensor(variable)"),
        (EagerOnly, "right when run eagerly. A tf.function records"),
        (OtherArguments, "TypeError"),
        (Right(learning_rate=1.0), "without parentheses"),
        (lambda: None, "derived from keras.optimizers.Optimizer"),
        *[(answer, "derived from keras.optimizers.Optimizer") for answer in NON_ANSWERS],
    ],
)
def test_repair(answer, hint) -> None:
    verdict = exercises.check("05.3", answer)
    assert not verdict.correct
    assert hint in verdict.message


@pytest.mark.parametrize("answer", [Right, WithCond])
def test_repair_right(answer) -> None:
    assert exercises.check("05.3", answer).correct


def test_repair_leaves_tensorflow_as_it_was() -> None:
    exercises.check("05.3", Right)
    assert tf.executing_eagerly()


def window(condition, add_first=True, restart=lambda gradient: 0, count_up=1):
    def step(weight, total, count, gradient):
        if condition(count):
            weight, total = weight - total - (gradient if add_first else 0), restart(gradient)
        else:
            total = total + gradient
        return weight, total, count + count_up

    return step


@pytest.mark.parametrize(
    ("answer", "hint"),
    [
        (window(lambda count: count % 3 == 0, add_first=False, restart=lambda gradient: gradient), "one late"),
        (
            window(lambda count: (count + 1) % 3 == 0, add_first=False, restart=lambda gradient: gradient),
            "where is the current gradient",
        ),
        (window(lambda count: (count + 1) % 3 == 0, restart=lambda gradient: gradient), "what does the sum start from"),
        (window(lambda count: True), "at steps [1, 2, 3, 4"),
        (window(lambda count: False), "never moves"),
        (window(lambda count: count % 3 == 0), "at steps [1, 4, 7]"),
        (lambda weight, total, count, gradient: weight, "three values"),
        (lambda weight, total, count, gradient: None, "three values"),
        (lambda *state: (1, 2), "three values"),
        (lambda: None, "TypeError"),
        (int, "TypeError"),
        *[(answer, "the answer is the function") for answer in (None, "step", 3.0, [], np.array([]))],
    ],
)
def test_window(answer, hint) -> None:
    verdict = exercises.check("05.4", answer)
    assert not verdict.correct
    assert hint in verdict.message


def test_window_right_and_its_count() -> None:
    assert exercises.check("05.4", window(lambda count: (count + 1) % 3 == 0)).correct

    def without_count(weight, total, count, gradient):
        weight, total, count = window(lambda count: (count + 1) % 3 == 0)(weight, total, count, gradient)
        return weight, total, count % 3

    assert "`count` should be 9" in exercises.check("05.4", without_count).message
