"""Wrong answers to the exercises of chapter 02 get a hint that says where to look."""

import inspect

import keras
import numpy as np
import pytest
from keras import ops

from companion import exercises
from companion.exercises import chapter_02

NON_ANSWERS = [None, "SGD", 3.0, object(), [], lambda: None, lambda a, b, c: None, int, np.array([])]


class RightRMSprop(keras.optimizers.Optimizer):
    name_of_slot = "mean"

    def __init__(self, learning_rate=0.001, rho=0.9, epsilon=1e-7, **kwargs):
        super().__init__(learning_rate=learning_rate, **kwargs)
        self.rho = rho
        self.epsilon = epsilon

    def build(self, variables):
        if not self.built:
            super().build(variables)
            self.means = self.add_optimizer_variables(variables, self.name_of_slot)

    def new_mean(self, a, gradient):
        return self.rho * a + (1 - self.rho) * ops.square(gradient)

    def divisor(self, a):
        return ops.sqrt(a) + self.epsilon

    def update_step(self, gradient, variable, learning_rate):
        a = self.means[self._get_variable_index(variable)]
        self.assign(a, self.new_mean(a, gradient))
        self.assign_sub(variable, learning_rate * gradient / self.divisor(a))

    def get_config(self):
        return {**super().get_config(), "rho": self.rho, "epsilon": self.epsilon}


class Returns(RightRMSprop):
    def update_step(self, gradient, variable, learning_rate):
        a = self.means[self._get_variable_index(variable)]
        return variable - learning_rate * gradient / self.divisor(self.new_mean(a, gradient))


class EpsilonUnderTheRoot(RightRMSprop):
    def divisor(self, a):
        return ops.sqrt(a + self.epsilon)


class Forgets(RightRMSprop):
    def update_step(self, gradient, variable, learning_rate):
        a = self.means[self._get_variable_index(variable)]
        self.assign_sub(variable, learning_rate * gradient / self.divisor(self.new_mean(a, gradient)))


class NewSlotInEachStep(RightRMSprop):
    def update_step(self, gradient, variable, learning_rate):
        a = keras.Variable(ops.zeros_like(variable))
        self.assign(a, self.new_mean(a, gradient))
        self.assign_sub(variable, learning_rate * gradient / self.divisor(a))


class Climbs(RightRMSprop):
    def update_step(self, gradient, variable, learning_rate):
        super().update_step(gradient, variable, -learning_rate)


class DividesByTheOldMean(RightRMSprop):
    def update_step(self, gradient, variable, learning_rate):
        a = self.means[self._get_variable_index(variable)]
        self.assign_sub(variable, learning_rate * gradient / self.divisor(a))
        self.assign(a, self.new_mean(a, gradient))


class SharesOneSlot(RightRMSprop):
    def update_step(self, gradient, variable, learning_rate):
        self.assign(self.means[0], self.new_mean(self.means[0], gradient))
        self.assign_sub(variable, learning_rate * gradient / self.divisor(self.means[0]))


class KeepsHalf(RightRMSprop):
    def update_step(self, gradient, variable, learning_rate):
        super().update_step(gradient, variable, learning_rate)
        a = self.means[self._get_variable_index(variable)]
        self.assign(a, a / 2)


class UnknownSlots(RightRMSprop):
    def build(self, variables):
        super(RightRMSprop, self).build(variables)
        self._slots = {id(variable): np.zeros(variable.shape, "float32") for variable in variables}
        self._order = [id(variable) for variable in variables]

    def update_step(self, gradient, variable, learning_rate):
        key = self._order[self._get_variable_index(variable)]
        self._slots[key] = ops.convert_to_numpy(self.new_mean(self._slots[key], gradient))
        self.assign_sub(variable, learning_rate * gradient / self.divisor(self._slots[key]))


class NoConfig(RightRMSprop):
    def get_config(self):
        return super(RightRMSprop, self).get_config()


class OnlyItsOwnConfig(RightRMSprop):
    def get_config(self):
        return {"rho": self.rho, "epsilon": self.epsilon}


class ConfigReturnsNothing(RightRMSprop):
    def get_config(self):
        super().get_config()


class SlotsAreTensors(RightRMSprop):
    def build(self, variables):
        keras.optimizers.Optimizer.build(self, variables)
        self.means = [ops.zeros(variable.shape) for variable in variables]


class SquaresInNumPy(RightRMSprop):
    def new_mean(self, a, gradient):
        return self.rho * a + (1 - self.rho) * np.square(gradient)


class OtherArguments(keras.optimizers.Optimizer):
    def __init__(self, lr=0.1):
        super().__init__(learning_rate=lr)


class NoUpdateStep(RightRMSprop):
    update_step = keras.optimizers.Optimizer.update_step


@pytest.mark.parametrize(
    ("answer", "hint"),
    [
        (Returns, "no weight moves"),
        (EpsilonUnderTheRoot, "after the square root"),
        (keras.optimizers.RMSprop, "after the square root"),
        (Forgets, "forgets"),
        (NewSlotInEachStep, "make it in `build`"),
        (Climbs, "climbs"),
        (DividesByTheOldMean, "first step is already off"),
        (SharesOneSlot, "a slot of its own"),
        (KeepsHalf, "what is kept"),
        (UnknownSlots, "0 slots"),
        (NoConfig, "get_config"),
        (OnlyItsOwnConfig, "forget the learning rate"),
        (ConfigReturnsNothing, "returns no dictionary"),
        (SlotsAreTensors, "self.add_optimizer_variables(variables, name), in `build`"),
        (SquaresInNumPy, "right when called directly"),
        (OtherArguments, "TypeError"),
        (NoUpdateStep, "NotImplementedError"),
        (keras.optimizers.SGD, "ValueError"),
        (RightRMSprop(), "without parentheses"),
        *[(answer, "derived from keras.optimizers.Optimizer") for answer in NON_ANSWERS],
    ],
)
def test_rmsprop(answer, hint) -> None:
    verdict = exercises.check("02.1", answer)
    assert not verdict.correct
    assert hint in verdict.message


def test_rmsprop_right() -> None:
    assert exercises.check("02.1", RightRMSprop).correct


def test_rmsprop_is_that_of_keras_but_for_epsilon() -> None:
    """The trajectory that the check asks for, against the built-in at an epsilon too small to see."""
    settings = {"learning_rate": 0.1, "rho": 0.75, "epsilon": 1e-12}
    mine, built_in = (
        chapter_02._trajectory(optimizer(**settings)) for optimizer in (RightRMSprop, keras.optimizers.RMSprop)
    )
    np.testing.assert_allclose(mine, built_in, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("answer", "hint"),
    [
        ([True, True, True, False], "1 of 4 is off. Look at A"),
        ([False, False, True, False], "Look at B"),
        ([False, True, False, False], "Look at C"),
        ([False, True, True, True], "Look at D"),
        ([True, False, False, True], "4 of 4 are off"),
        ([False, True, True], "4 booleans"),
        ([0, 1, 1, 0], "True (the weight moves) or False"),
        ([False, True, ..., False], "True (the weight moves) or False"),
        *[(answer, "4 booleans") for answer in NON_ANSWERS],
    ],
)
def test_which_move(answer, hint) -> None:
    verdict = exercises.check("02.2", answer)
    assert not verdict.correct
    assert hint in verdict.message


def test_which_move_right() -> None:
    assert exercises.check("02.2", [False, True, True, False]).correct


@pytest.mark.parametrize("snippet", chapter_02.SNIPPETS)
def test_snippets_do_the_same_inside_fit(snippet) -> None:
    optimizer = type("Snippet", (keras.optimizers.Optimizer,), {"update_step": snippet})(learning_rate=0.5)
    model = keras.Sequential([keras.Input((1,)), keras.layers.Dense(1, use_bias=False, kernel_initializer="ones")])
    model.compile(optimizer, "mse")
    model.fit(np.ones((4, 1)), np.zeros((4, 1)), epochs=1, verbose=0)
    assert (float(model.get_weights()[0][0, 0]) != 1.0) == chapter_02._moves(snippet)


def momentum(keep=True, write=1, early=False, sign=1.0):
    class Answer(keras.optimizers.Optimizer):
        def build(self, variables):
            super().build(variables)
            self.velocities = self.add_optimizer_variables(variables, "velocity")

        def update_step(self, gradient, variable, learning_rate):
            velocity = self.velocities[self._get_variable_index(variable)]
            new = 0.9 * velocity - learning_rate * gradient
            step = ops.copy(velocity) if early else new
            if keep:
                self.assign(velocity, new)
            for _ in range(write):
                self.assign_add(variable, sign * step)

    return Answer


@pytest.mark.parametrize(
    ("answer", "hint"),
    [
        (momentum(keep=False, write=0), "Two lines"),
        (momentum(keep=True, write=0), "the velocity is kept now"),
        (momentum(keep=False, write=1), "plain SGD"),
        (momentum(keep=True, write=2), "exactly once"),
        (momentum(early=True), "first v, then θ with the new v"),
        (momentum(sign=-1.0), "the minus is already in v"),
        (keras.optimizers.SGD, "plain SGD"),
        (OtherArguments, "TypeError"),
        (momentum(keep=True, write=1)(learning_rate=0.1), "without parentheses"),
        *[(answer, "derived from keras.optimizers.Optimizer") for answer in NON_ANSWERS],
    ],
)
def test_never_learns(answer, hint) -> None:
    verdict = exercises.check("02.3", answer)
    assert not verdict.correct
    assert hint in verdict.message


def test_never_learns_right() -> None:
    assert exercises.check("02.3", momentum(keep=True, write=1)).correct


@pytest.mark.parametrize(
    ("answer", "hint"),
    [
        ([5, 5, 1, 5, 1], "1 of 5 is off. Look at A"),
        ([0, 10, 1, 5, 1], "Look at B"),
        ([0, 5, 5, 5, 1], "Look at C"),
        ([0, 5, 1, 0, 1], "Look at D"),
        ([0, 5, 1, 5, 5], "Look at E"),
        ([1, 1, 0, 1, 0], "5 of 5"),
        ([0, 5, 1, 5], "5 whole numbers"),
        ([False, 5, True, 5, True], "whole number"),
        (["0", "5", "1", "5", "1"], "whole number"),
        ([0, 5, ..., 5, 1], "whole number"),
        *[(answer, "5 whole numbers") for answer in NON_ANSWERS],
    ],
)
def test_how_often(answer, hint) -> None:
    verdict = exercises.check("02.4", answer)
    assert not verdict.correct
    assert hint in verdict.message


def test_how_often_right() -> None:
    assert exercises.check("02.4", [0, 5, 1, 5, 1]).correct


def test_snippets_do_not_tell_their_answers() -> None:
    """A reader sees the source; comments and docstrings must leave the question open."""
    for function in (*chapter_02.SNIPPETS, *chapter_02.COUNTS):
        source = inspect.getsource(function)
        assert "#" not in source
        assert inspect.getdoc(function) is None
