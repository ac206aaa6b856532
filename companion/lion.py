r"""Lion: the sign of a mean of gradients. Chapter 16 of the book teaches it."""

from typing import Any

import keras
from keras import ops

from companion import arguments


@keras.saving.register_keras_serializable(package="companion")
class Lion(keras.optimizers.Optimizer):
    r"""Lion: every weight moves by one learning rate, in the direction on which gradient and memory agree.

    .. math::

       \theta &\leftarrow \theta - h \operatorname{sign}(\beta_1 m + (1 - \beta_1) g) \\
       m &\leftarrow \beta_2 m + (1 - \beta_2) g

    The step looks at the gradient with one weight, the memory keeps it with another, and the memory is written last.
    The decay :math:`\lambda` is that of the base class, :math:`\theta \leftarrow (1 - h \lambda) \theta` before the
    step, which is the paper's.

    Slots: ``momentum`` :math:`m`, of the variable's shape and dtype, zero at the start.

    Args:
        learning_rate: :math:`h`, see :class:`~companion.SGD`. A third to a tenth of Adam's, since no step is ever
            shorter; with a ``weight_decay`` as much larger. Defaults to 0.001, as Keras's.
        beta_1: a number in [0, 1), what the step keeps of the memory. Defaults to 0.9.
        beta_2: a number in [0, 1), what the memory keeps of itself. Defaults to 0.99.
        weight_decay: :math:`\lambda`, a number :math:`\ge 0`. Defaults to ``None``.
        **kwargs: those of ``keras.optimizers.Optimizer``, see :class:`~companion.SGD`.

    Raises:
        ValueError: an argument is outside its interval or not a number.

    Example:
        >>> weight = keras.Variable([0.0, 0.0])
        >>> Lion(learning_rate=0.5).apply([np.array([4.0, -0.25])], [weight])
        >>> weight.numpy().tolist()
        [-0.5, 0.5]

    Equal to ``keras.optimizers.Lion``, but for :math:`\beta_1 = 0`, the sign of the gradient alone, which that refuses,
    and numbers such as 0.9, which that rounds to float32. It has one slot where Adam has two. Nothing in it is small:
    where the gradient is noise, it moves as far as where it is not, so the learning rate must fall at the end.

    References:
        Chen, Liang, Huang, Real, Wang, Liu, Pham, Dong, Luong, Hsieh, Lu and Le, 2023, "Symbolic discovery of
        optimization algorithms".

    Taught in chapter 16, :doc:`/notebooks/16_one_answer_newer_rules`.
    """

    def __init__(
        self,
        learning_rate: Any = 0.001,
        beta_1: float = 0.9,
        beta_2: float = 0.99,
        weight_decay: float | None = None,
        **kwargs: Any,
    ) -> None:
        rate, decay = arguments.learning_rate(learning_rate), arguments.weight_decay(weight_decay)
        super().__init__(learning_rate=rate, weight_decay=decay, **kwargs)
        self.beta_1 = arguments.number("beta_1", beta_1, 0, 1)
        self.beta_2 = arguments.number("beta_2", beta_2, 0, 1)

    def build(self, variables: list[Any]) -> None:
        """Creates one memory for each variable."""
        if not self.built:
            super().build(variables)
            self.momentums = self.add_optimizer_variables(variables, "momentum")

    def update_step(self, gradient: Any, variable: Any, learning_rate: Any) -> None:
        """Moves ``variable`` by one step of the rule."""
        gradient = ops.cast(gradient, variable.dtype)
        h = ops.cast(learning_rate, variable.dtype)
        m = self.momentums[self._get_variable_index(variable)]

        mean = ops.add(ops.multiply(m, self.beta_1), ops.multiply(gradient, 1 - self.beta_1))
        self.assign_sub(variable, ops.multiply(ops.sign(mean), h))
        self.assign(m, ops.add(ops.multiply(m, self.beta_2), ops.multiply(gradient, 1 - self.beta_2)))

    def get_config(self) -> dict[str, Any]:
        """Returns the constructor's arguments, for saving."""
        return {**super().get_config(), "beta_1": self.beta_1, "beta_2": self.beta_2}
