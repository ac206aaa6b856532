"""Ways to accumulate gradients that look right and are not. They go through the tests of the right one, and must fail.

Each takes the optimizer to wrap and the number of micro-batches in a window, and has ``build`` and ``apply`` as an
optimizer has.
"""

from typing import Any

import numpy as np
import tensorflow as tf

from companion.accumulation import GradientAccumulation


class _Wrapper:
    def __init__(self, optimizer: Any, steps: int) -> None:
        self.inner_optimizer, self.steps = optimizer, steps
        self.count = tf.Variable(0)

    def build(self, variables: list[Any]) -> None:
        self.inner_optimizer.build(variables)
        self.sums = [tf.Variable(tf.zeros_like(variable.value)) for variable in variables]

    def accumulate(self, gradients: list[Any]) -> Any:
        """Adds the gradients to the sums. Returns whether the window is full."""
        for total, gradient in zip(self.sums, gradients, strict=True):
            total.assign_add(gradient)
        self.count.assign_add(1)
        return self.count % self.steps == 0

    def clear(self, full: Any) -> None:
        for total in self.sums:
            total.assign(tf.where(full, tf.zeros_like(total), total))


class ZeroGradientsBetween(_Wrapper):
    """gradient-accumulator's way: between updates the optimizer steps with zeros, and its momentum moves on."""

    def apply(self, gradients: list[Any], variables: list[Any]) -> None:
        full = self.accumulate(gradients)
        self.inner_optimizer.apply([tf.where(full, s / self.steps, tf.zeros_like(s)) for s in self.sums], variables)
        self.clear(full)


class StoppedLearningRate(_Wrapper):
    """accum_optimizer_for_keras's way: between updates the learning rate is 0 and the momentum almost 1."""

    def build(self, variables: list[Any]) -> None:
        super().build(variables)
        self.rate, self.momentum = float(self.inner_optimizer.learning_rate), self.inner_optimizer.momentum

    def apply(self, gradients: list[Any], variables: list[Any]) -> None:
        full = self.accumulate(gradients)
        self.inner_optimizer.learning_rate = tf.where(full, self.rate, 0.0)
        self.inner_optimizer.momentum = tf.where(full, self.momentum, 1 - 1e-7)
        self.inner_optimizer.apply([total / self.steps for total in self.sums], variables)
        self.clear(full)


class AssignedOutsideTheBranch(_Wrapper):
    """The mistake of 2018 in today's words: the branch chooses between results, and both have been assigned."""

    def apply(self, gradients: list[Any], variables: list[Any]) -> None:
        full = self.accumulate(gradients)
        before = [variable.value.read_value() for variable in variables]
        moved = self.inner_optimizer.apply([total / self.steps for total in self.sums], variables)
        tf.cond(full, lambda: moved, lambda: None if moved is None else before)
        self.clear(full)


def mean_of_means(optimizer: Any, steps: int) -> Any:
    """What Keras, and most trainers of language models until 2024, do: every micro-batch weighs alike."""

    class Unweighted(GradientAccumulation):
        def apply(self, grads: Any, trainable_variables: Any = None, weight: Any = None) -> None:
            super().apply(grads, trainable_variables, weight=np.float64(weight > 0))

    return Unweighted(optimizer, steps, normalize="weight")
