r"""Methods that remember the last gradient instead of asking for a second one. Chapters 10 and 12 of the book use them.

One gradient a step, so that they are optimizers like any other and need no injection.
"""

from typing import Any

import keras
from keras import ops

from companion.optimizers import _learning_rate


class _OneGradientBack(keras.optimizers.Optimizer):
    r"""Moves by :math:`h ((1 + w) g_k - w g_{k-1})`; in the first step, where nothing came before, by :math:`h g_0`."""

    _weight: float

    def __init__(self, learning_rate: Any = 0.01, **kwargs: Any) -> None:
        super().__init__(learning_rate=_learning_rate(learning_rate), **kwargs)

    def build(self, variables: list[Any]) -> None:
        """Creates a slot for each variable."""
        if self.built:
            return
        super().build(variables)
        self._last_gradients = self.add_optimizer_variables(variables, "last_gradient")

    def update_step(self, gradient: Any, variable: Any, learning_rate: Any) -> None:
        """Moves ``variable`` by one step of the rule."""
        h = ops.cast(learning_rate, variable.dtype)
        last = self._last_gradients[self._get_variable_index(variable)]
        gradient = ops.add(ops.zeros_like(last), ops.cast(gradient, variable.dtype))  # dense, as the slot is
        before = ops.where(ops.equal(self.iterations, 0), gradient, last)
        self.assign_sub(variable, h * ((1 + self._weight) * gradient - self._weight * before))
        self.assign(last, gradient)


@keras.saving.register_keras_serializable(package="companion")
class AdamsBashforth2(_OneGradientBack):
    r"""The Adams–Bashforth method of two steps: order 2 with one gradient a step, for a constant learning rate.

    .. math::

       \theta \leftarrow \theta - h \Bigl(\frac32 g_k - \frac12 g_{k-1}\Bigr)

    The first step is Euler's. Slots: ``last_gradient`` :math:`g_{k-1}`, of the variable's shape and dtype. It is stable
    up to :math:`h\lambda = 1`, half as far as gradient descent.

    Args:
        learning_rate: :math:`h`, see :class:`~companion.optimizers.SGD`. Defaults to 0.01.
        **kwargs: those of ``keras.optimizers.Optimizer``, see :class:`~companion.optimizers.SGD`.

    Raises:
        ValueError: ``learning_rate`` is negative, not finite, or not a number.

    Example:
        >>> weight = keras.Variable([0.0])
        >>> optimizer = AdamsBashforth2(learning_rate=1.0)
        >>> for gradient in (-1.0, -2.0):
        ...     optimizer.apply([np.array([gradient])], [weight])
        ...     print(weight.numpy()[0])
        1.0
        3.5

    References:
        Bashforth and Adams, 1883, *An attempt to test the theories of capillary action*.

    Taught in chapter 10, :doc:`/notebooks/10_runge_kutta`.
    """

    _weight = 0.5


@keras.saving.register_keras_serializable(package="companion")
class OptimisticSGD(_OneGradientBack):
    r"""Optimistic gradient descent: expects the next gradient to differ from this one as this one did from the last.

    .. math::

       \theta \leftarrow \theta - h (2 g_k - g_{k-1})

    The first step is that of gradient descent. Slots: ``last_gradient`` :math:`g_{k-1}`, of the variable's shape and
    dtype. In games, where gradient descent spirals out, it arrives.

    Args:
        learning_rate: :math:`h`, see :class:`~companion.optimizers.SGD`. Defaults to 0.01.
        **kwargs: those of ``keras.optimizers.Optimizer``, see :class:`~companion.optimizers.SGD`.

    Raises:
        ValueError: ``learning_rate`` is negative, not finite, or not a number.

    Example:
        >>> weight = keras.Variable([0.0])
        >>> optimizer = OptimisticSGD(learning_rate=1.0)
        >>> for gradient in (-1.0, -2.0):
        ...     optimizer.apply([np.array([gradient])], [weight])
        ...     print(weight.numpy()[0])
        1.0
        4.0

    References:
        Popov, 1980, "A modification of the Arrow–Hurwicz method for search of saddle points". Daskalakis, Ilyas,
        Syrgkanis and Zeng, 2018, "Training GANs with optimism".

    Taught in chapter 12, :doc:`/notebooks/12_do_integrators_train_better`.
    """

    _weight = 1.0
