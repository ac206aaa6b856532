r"""Three optimizers, each as short as its rule. Chapters 01 and 03 of the book teach them.

Everything that is not the rule (clipping, weight decay, constraints, moving averages, loss scaling, schedules, the
step counter) is done by the base class, ``keras.optimizers.Optimizer``; so are the keyword arguments for them.
In the rules, :math:`\theta` is one weight tensor, :math:`g` its gradient and :math:`h` the learning rate; every
operation is elementwise.
"""

from typing import Any

import keras
from keras import ops

from companion import arguments
from companion.wrapping import name_of


@keras.saving.register_keras_serializable(package="companion")
class SGD(keras.optimizers.Optimizer):
    r"""Gradient descent: one step against the gradient, no memory.

    .. math::

       \theta \leftarrow \theta - h g

    Args:
        learning_rate: :math:`h \ge 0`; a number, a ``keras.optimizers.schedules.LearningRateSchedule``, or a callable
            without arguments. Defaults to 0.01.
        **kwargs: those of ``keras.optimizers.Optimizer``: ``weight_decay``, ``clipnorm``, ``clipvalue``,
            ``global_clipnorm``, ``use_ema``, ``ema_momentum``, ``ema_overwrite_frequency``, ``loss_scale_factor``,
            ``gradient_accumulation_steps``, ``name``.

    Raises:
        ValueError: ``learning_rate`` is negative, not finite, or not a number.

    Example:
        >>> weight = keras.Variable([1.0, 2.0])
        >>> SGD(learning_rate=0.5).apply([np.array([1.0, -1.0])], [weight])
        >>> weight.numpy().tolist()
        [0.5, 2.5]

    Unlike ``keras.optimizers.SGD`` it has no momentum; that is :class:`Momentum`.

    References:
        Robbins and Monro, 1951, "A stochastic approximation method".

    Taught in chapter 01, :doc:`/notebooks/01_what_is_an_optimizer`.
    """

    def __init__(self, learning_rate: Any = 0.01, **kwargs: Any) -> None:
        super().__init__(learning_rate=arguments.learning_rate(learning_rate), **kwargs)

    def update_step(self, gradient: Any, variable: Any, learning_rate: Any) -> None:
        """Moves ``variable`` by one step of the rule."""
        gradient = ops.cast(gradient, variable.dtype)
        h = ops.cast(learning_rate, variable.dtype)
        self.assign_sub(variable, ops.multiply(gradient, h))


@keras.saving.register_keras_serializable(package="companion")
class Momentum(keras.optimizers.Optimizer):
    r"""Gradient descent with a velocity: each step keeps a share :math:`\beta` of the step before.

    .. math::

       v &\leftarrow \beta v - h g \\
       \theta &\leftarrow \theta + v

    and with ``nesterov=True`` the last line looks one velocity ahead:

    .. math::

       v &\leftarrow \beta v - h g \\
       \theta &\leftarrow \theta + \beta v - h g

    Slots: ``velocity`` :math:`v`, of the variable's shape and dtype, zero at the start.

    Args:
        learning_rate: :math:`h \ge 0`; a number, a ``keras.optimizers.schedules.LearningRateSchedule``, or a callable
            without arguments. Defaults to 0.01.
        momentum: :math:`\beta`, a number in [0, 1). Defaults to 0.9.
        nesterov: whether to use the second form. Defaults to ``False``.
        **kwargs: those of ``keras.optimizers.Optimizer``, see :class:`SGD`.

    Raises:
        ValueError: an argument is outside its interval or not a number.

    Example:
        >>> weight = keras.Variable([0.0])
        >>> optimizer = Momentum(learning_rate=1.0, momentum=0.5)
        >>> for _ in range(3):
        ...     optimizer.apply([np.array([-1.0])], [weight])
        ...     print(weight.numpy()[0])
        1.0
        2.5
        4.25

    Equal to ``keras.optimizers.SGD(momentum=...)``. PyTorch's SGD keeps :math:`v` without the factor :math:`h`, so the
    two differ as soon as the learning rate changes.

    References:
        Polyak, 1964, "Some methods of speeding up the convergence of iteration methods". Nesterov, 1983, "A method of
        solving a convex programming problem with convergence rate O(1/k²)". The second form is that of Sutskever,
        Martens, Dahl and Hinton, 2013, "On the importance of initialization and momentum in deep learning".

    Taught in chapter 03, :doc:`/notebooks/03_momentum_and_state`.
    """

    def __init__(self, learning_rate: Any = 0.01, momentum: float = 0.9, nesterov: bool = False, **kwargs: Any) -> None:
        super().__init__(learning_rate=arguments.learning_rate(learning_rate), **kwargs)
        self.momentum = arguments.number("momentum", momentum, 0, 1)
        if not isinstance(nesterov, bool):
            raise ValueError(f"`nesterov` must be True or False. Received: nesterov={nesterov!r}")
        self.nesterov = nesterov

    def build(self, variables: list[Any]) -> None:
        """Creates one velocity for each variable."""
        if not self.built:
            super().build(variables)
            self.velocities = self.add_optimizer_variables(variables, "velocity")

    def update_step(self, gradient: Any, variable: Any, learning_rate: Any) -> None:
        """Moves ``variable`` by one step of the rule."""
        gradient = ops.cast(gradient, variable.dtype)
        h = ops.cast(learning_rate, variable.dtype)
        beta = ops.cast(self.momentum, variable.dtype)
        v = self.velocities[self._get_variable_index(variable)]

        step = ops.multiply(gradient, h)
        self.assign(v, ops.subtract(ops.multiply(v, beta), step))
        if self.nesterov:
            self.assign_add(variable, ops.subtract(ops.multiply(v, beta), step))
        else:
            self.assign_add(variable, v)

    def get_config(self) -> dict[str, Any]:
        """Returns the constructor's arguments, for saving."""
        return {**super().get_config(), "momentum": self.momentum, "nesterov": self.nesterov}


@keras.saving.register_keras_serializable(package="companion")
class Adam(keras.optimizers.Optimizer):
    r"""Adam: running means of the gradient and of its square, both corrected for having started at zero.

    .. math::

       m &\leftarrow \beta_1 m + (1 - \beta_1) g \\
       q &\leftarrow \beta_2 q + (1 - \beta_2) g^2 \\
       \theta &\leftarrow \theta - h \frac{\sqrt{1 - \beta_2^t}}{1 - \beta_1^t} \frac{m}{\sqrt{q} + \epsilon}

    with :math:`t = 1, 2, \dots` the number of the update.

    Slots: ``momentum`` :math:`m` and ``velocity`` :math:`q`, of the variable's shape and dtype, zero at the start.
    Weights that are bfloat16 themselves never move, as with Keras's Adam: there 0.999 is 1, and :math:`1 - \beta_2^t`
    is 0. Train them under ``mixed_bfloat16``, where weights are float32, or with ``beta_2=0.99``.

    Args:
        learning_rate: :math:`h \ge 0`; a number, a ``keras.optimizers.schedules.LearningRateSchedule``, or a callable
            without arguments. Defaults to 0.001.
        beta_1: a number in [0, 1). Defaults to 0.9.
        beta_2: a number in [0, 1). Defaults to 0.999.
        epsilon: a number > 0, added to the square root *before* the correction, as in the paper's remark on efficiency
            and in Keras; the paper's Algorithm 1 has it after. Defaults to 1e-7.
        **kwargs: those of ``keras.optimizers.Optimizer``, see :class:`SGD`. With ``weight_decay`` this is AdamW.

    Raises:
        ValueError: an argument is outside its interval or not a number.

    Example:
        >>> weight = keras.Variable([0.0, 0.0])
        >>> Adam(learning_rate=0.5).apply([np.array([4.0, -0.25])], [weight])
        >>> [round(float(value), 4) for value in weight.numpy()]
        [-0.5, 0.5]

    References:
        Kingma and Ba, 2015, "Adam: A method for stochastic optimization".

    Taught in chapter 03, :doc:`/notebooks/03_momentum_and_state`.
    """

    def __init__(
        self,
        learning_rate: Any = 0.001,
        beta_1: float = 0.9,
        beta_2: float = 0.999,
        epsilon: float = 1e-7,
        **kwargs: Any,
    ) -> None:
        super().__init__(learning_rate=arguments.learning_rate(learning_rate), **kwargs)
        self.beta_1 = arguments.number("beta_1", beta_1, 0, 1)
        self.beta_2 = arguments.number("beta_2", beta_2, 0, 1)
        self.epsilon = arguments.number("epsilon", epsilon, 0, include_low=False)

    def build(self, variables: list[Any]) -> None:
        """Creates the two running means for each variable."""
        if not self.built:
            super().build(variables)
            self.momentums, self.velocities = self.add_optimizer_variables(variables, ["momentum", "velocity"])

    def update_step(self, gradient: Any, variable: Any, learning_rate: Any) -> None:
        """Moves ``variable`` by one step of the rule."""
        gradient = ops.cast(gradient, variable.dtype)
        h = ops.cast(learning_rate, variable.dtype)
        t = ops.cast(self.iterations + 1, variable.dtype)
        beta_1, beta_2 = ops.cast(self.beta_1, variable.dtype), ops.cast(self.beta_2, variable.dtype)
        m = self.momentums[self._get_variable_index(variable)]
        q = self.velocities[self._get_variable_index(variable)]

        self.assign_add(m, ops.multiply(ops.subtract(gradient, m), 1 - self.beta_1))
        self.assign_add(q, ops.multiply(ops.subtract(ops.square(gradient), q), 1 - self.beta_2))
        corrected = h * ops.sqrt(1 - ops.power(beta_2, t)) / (1 - ops.power(beta_1, t))
        numerator, denominator = ops.multiply(m, corrected), ops.add(ops.sqrt(q), self.epsilon)
        self.assign_sub(variable, ops.divide(numerator, denominator))

    def get_config(self) -> dict[str, Any]:
        """Returns the constructor's arguments, for saving."""
        return {**super().get_config(), "beta_1": self.beta_1, "beta_2": self.beta_2, "epsilon": self.epsilon}


class _OneGradientBack(keras.optimizers.Optimizer):
    r"""Moves a variable by :math:`h ((1 + w) g_k - w g_{k-1})`; in its first step by :math:`h g_0`."""

    _weight: float

    def __init__(self, learning_rate: Any = 0.01, **kwargs: Any) -> None:
        super().__init__(learning_rate=arguments.learning_rate(learning_rate), **kwargs)

    def build(self, variables: list[Any]) -> None:
        """Creates two slots for each variable."""
        if self.built:
            return
        super().build(variables)
        self._last_gradients = self.add_optimizer_variables(variables, "last_gradient")
        names = [f"{name_of(variable).replace('/', '_')}_begun" for variable in variables]
        self._begun = [self.add_variable((), dtype=v.dtype, name=n) for v, n in zip(variables, names, strict=True)]

    def update_step(self, gradient: Any, variable: Any, learning_rate: Any) -> None:
        """Moves ``variable`` by one step of the rule."""
        h = ops.cast(learning_rate, variable.dtype)
        index = self._get_variable_index(variable)
        last, begun = self._last_gradients[index], self._begun[index]
        gradient = ops.add(ops.zeros_like(last), ops.cast(gradient, variable.dtype))  # dense, as the slot is
        before = ops.where(ops.equal(begun, 0), gradient, last)
        self.assign_sub(variable, h * ((1 + self._weight) * gradient - self._weight * before))
        self.assign(last, gradient)
        self.assign(begun, ops.ones_like(begun))


@keras.saving.register_keras_serializable(package="companion")
class AdamsBashforth2(_OneGradientBack):
    r"""The Adams–Bashforth method of two steps: order 2 with one gradient a step, for a constant learning rate.

    .. math::

       \theta \leftarrow \theta - h \Bigl(\frac32 g_k - \frac12 g_{k-1}\Bigr)

    The first step of each variable is Euler's. Slots: ``last_gradient`` :math:`g_{k-1}`, of the variable's shape and
    dtype, and the number ``begun``, 0 before that step. It is stable up to :math:`h\lambda = 1`, half as far as
    gradient descent.

    Args:
        learning_rate: :math:`h`, see :class:`~companion.SGD`. Defaults to 0.01.
        **kwargs: those of ``keras.optimizers.Optimizer``, see :class:`~companion.SGD`.

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

    Taught in appendix a3, :doc:`/notebooks/a3_implicit_and_multistep_methods`.
    """

    _weight = 0.5


@keras.saving.register_keras_serializable(package="companion")
class OptimisticSGD(_OneGradientBack):
    r"""Optimistic gradient descent: expects the next gradient to differ from this one as this one did from the last.

    .. math::

       \theta \leftarrow \theta - h (2 g_k - g_{k-1})

    The first step of each variable is that of gradient descent. Slots: ``last_gradient`` :math:`g_{k-1}`, of the
    variable's shape and dtype, and the number ``begun``, 0 before that step. In games, where gradient descent spirals
    out, it arrives.

    Args:
        learning_rate: :math:`h`, see :class:`~companion.SGD`. Defaults to 0.01.
        **kwargs: those of ``keras.optimizers.Optimizer``, see :class:`~companion.SGD`.

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
