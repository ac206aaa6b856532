r"""Runge–Kutta methods for Keras: several gradients a step, all on one batch, from the tableaux of ``gradient_flow``.

Chapters 09, 10 and 12 of the book teach them, and say what they are good for: mostly not for training. They follow the
flow :math:`\theta' = -\nabla L(\theta)` more closely, which training does not ask for.
"""

import dataclasses
import math
from typing import Any

import keras
import numpy as np
import tensorflow as tf
from keras import ops

from companion import gradient_flow
from companion.gradient_flow import ButcherTableau
from companion.gradients import all_finite, moved
from companion.injection import InjectedOptimizer

_SAFETY, _SLOWEST, _FASTEST = 0.9, 0.2, 5.0  # Hairer, Nørsett and Wanner, II.4
_FLOOR = 1e-6  # of the first step
_LARGEST = 1e4
_TINY = 1e-37  # what is allowed at least; and the largest ratio to it whose square float32 can hold many of
_HUGE = 1e9


@keras.saving.register_keras_serializable(package="companion")
class RungeKutta(InjectedOptimizer):
    r"""An explicit Runge–Kutta method: asks at several points, then moves once along a weighted mean of the answers.

    .. math::

       k_i = \nabla L\Bigl(\theta - h \sum_{j < i} a_{ij} k_j\Bigr) \qquad
       \theta \leftarrow \theta - h \sum_i b_i k_i

    With ``rtol`` the step size adapts itself (integral control). A second set of weights :math:`\hat b` estimates the
    error of the step, in proportion to what is allowed of each weight :math:`n`:

    .. math::

       \delta = \sqrt{\frac1N \sum_n \Bigl(\frac{h \sum_i (b_i - \hat b_i) k_{i,n}}
       {\mathtt{atol} + \mathtt{rtol} \max(|\theta_n|, |\theta_n^{\text{new}}|)}\Bigr)^2} \qquad
       h \leftarrow h \cdot \min\bigl(5, \max(0.2,\ 0.9\, \delta^{-1/p})\bigr)

    A step with :math:`\delta > 1`, or where anything is infinite or NaN, is rejected: nothing moves, no weight, no
    average, no statistic, no seed, not ``iterations``, and the next step is shorter. At a millionth of the first step
    size it stays, and every finite step is accepted. It never exceeds ``max_step``; what sets the learning rate from
    outside (an assignment, ``LearningRateScheduler``, ``ReduceLROnPlateau``) sets the largest step from then on, up to
    ``max_step``, unless it sets what the learning rate is already. The estimate is of the rule alone: it sees neither
    clipping nor the constraint at the end. Under ``mixed_float16`` an overflow is a rejected step.

    Needs :func:`~companion.inject`: see :class:`~companion.InjectedOptimizer`.

    Args:
        learning_rate: :math:`h`, the step size; with ``rtol`` that of the first step, a number, and as an attribute the
            size of the step just tried. Defaults to 0.01.
        method: ``"euler"``, ``"midpoint"``, ``"heun"``, ``"ralston"``, ``"extragradient"``, ``"kutta3"``, ``"rk4"``,
            ``"bogacki_shampine"`` or ``"rk23"``, ``"dormand_prince"`` or ``"rk45"``, or a
            :class:`~companion.gradient_flow.ButcherTableau`. Defaults to ``"heun"``.
        rtol: the relative error that a step may make, a number greater than 0, for a method with embedded weights.
            Defaults to ``None``: every step has size ``learning_rate``.
        atol: the absolute error that a step may make, a number of at least 0. Defaults to 1e-6.
        max_step: with ``rtol``, the largest step size, at least ``learning_rate``. Defaults to ``None``: 10,000, or
            ``learning_rate`` if that is larger.
        **kwargs: those of ``keras.optimizers.Optimizer``; ``weight_decay`` only without ``rtol``.

    Attributes:
        tableau: the method's :class:`~companion.gradient_flow.ButcherTableau`.
        step_size: with ``rtol``, a variable: the size of the next step.
        rejected: with ``rtol``, a variable: the number of steps rejected.

    Raises:
        ValueError: an argument is not as above.

    Example:
        >>> model = keras.Sequential([keras.Input((1,)), keras.layers.Dense(1, kernel_initializer="ones")])
        >>> optimizer = RungeKutta(learning_rate=0.1, method="rk4")
        >>> model.compile(optimizer, loss="mse")
        >>> model = optimizer.inject(model)
        >>> loss = model.train_on_batch(np.ones((1, 1)), np.zeros((1, 1)))
        >>> print(model.layers[0].kernel.numpy().round(4))  # (1 + exp(-4 h)) / 2 = 0.8352 is the flow
        [[0.8352]]

    References:
        Runge, 1895, "Über die numerische Auflösung von Differentialgleichungen". Kutta, 1901, "Beitrag zur
        näherungsweisen Integration totaler Differentialgleichungen". Hairer, Nørsett and Wanner, 1993, *Solving
        ordinary differential equations I*, chapter II.4 for the control of the step.

    Taught in chapter 10, :doc:`/notebooks/10_runge_kutta`.
    """

    def __init__(
        self,
        learning_rate: Any = 0.01,
        method: Any = "heun",
        rtol: float | None = None,
        atol: float = 1e-6,
        max_step: float | None = None,
        **kwargs: Any,
    ) -> None:
        tableau = gradient_flow.tableau(method)
        if rtol is not None:
            _check_control(tableau, learning_rate, method, rtol, atol, max_step, kwargs.get("weight_decay"))
        elif max_step is not None:
            raise ValueError(f"`max_step` needs `rtol`, which makes steps adapt. Received: max_step={max_step!r}")
        super().__init__(learning_rate=learning_rate, **kwargs)
        self.tableau, self.method, self.rtol, self.atol, self.max_step = tableau, method, rtol, atol, max_step
        if rtol is not None:
            self._first = float(learning_rate)
            self.step_size = self._number("step_size", np.float32(self._first))  # as Keras keeps a learning rate
            self.rejected = self._number("rejected", 0, "int64")
            self._bound = max(_LARGEST, self._first) if max_step is None else float(max_step)
            self._largest = self._number("largest_step", self._bound)
            self._shown = self._number("shown_learning_rate", float(ops.cast(self._learning_rate, "float64")))

    def _number(self, name: str, value: Any, dtype: str = "float64") -> Any:
        return self.add_variable(
            (), lambda shape, dtype: tf.constant(value, dtype), dtype, aggregation="only_first_replica", name=name
        )

    def direction(self, oracle: Any, values: list[Any], learning_rate: Any) -> list[Any]:
        """The weighted mean of the answers."""
        is_adaptive, h = self.rtol is not None, learning_rate
        if is_adaptive:  # `apply` reads the learning rate once there is a direction
            h = ops.cast(self._next_step(), learning_rate.dtype)
        slopes: dict[int, list[Any]] = {}
        for stage in self.tableau.stages(embedded=is_adaptive):
            weights = self.tableau.a[stage]
            slopes[stage] = oracle(_combine(weights, slopes, -h, values) if any(weights) else values)
        direction = _combine(self.tableau.b, slopes)
        if is_adaptive:
            return self._controlled(values, h, direction, slopes)
        return direction

    def _next_step(self) -> Any:
        """Shows the size of the step as the learning rate, which is the largest if it was set from outside."""
        _check_decay(self.weight_decay)  # set later
        rate = self.learning_rate
        if not isinstance(rate, keras.Variable):
            raise ValueError(
                "`learning_rate` must be a number where `rtol` chooses the steps: assign one, the largest step, or use "
                f"`rtol=None`. Received: learning_rate={self._learning_rate!r}"
            )
        given = ops.cast(rate, "float64")
        largest = ops.clip(given, 0, ops.convert_to_tensor(self._bound, "float64"))
        self._largest.assign(ops.where(ops.equal(given, self._shown), self._largest, largest))
        size = ops.convert_to_tensor(self.step_size)  # not a number where that was the learning rate set before
        self.step_size.assign(ops.where(size <= self._largest, size, self._largest))
        rate.assign(ops.cast(ops.cast(self.step_size, "float32"), rate.dtype))
        self._shown.assign(ops.cast(rate, "float64"))
        return rate

    def _controlled(self, values: list[Any], h: Any, direction: list[Any], slopes: dict[int, list[Any]]) -> list[Any]:
        """The direction; zeros, and nothing will move, if the step is rejected. Sets the size of the next step."""
        weights = [b - other for b, other in zip(self.tableau.b, self.tableau.b_embedded, strict=True)]
        dtypes = self._questions.dtypes if self._questions else [value.dtype for value in values]
        squares, seen = [], []
        for value, step, slope, dtype in zip(values, direction, _combine(weights, slopes), dtypes, strict=True):
            end = ops.cast(value - h * step, value.dtype)
            allowed = self.atol + self.rtol * ops.maximum(ops.abs(value), ops.abs(end))
            ratio = ops.abs(h * slope) / ops.maximum(allowed, _TINY)
            squares.append(ops.sum(ops.minimum(ratio, _HUGE) ** 2))
            arrives = ops.cast(value, dtype) - ops.cast(h * step, dtype)  # as `update_step` will
            seen += [h * slope, ops.cast(arrives, value.dtype)]
            if self.clipnorm or self.global_clipnorm:
                seen.append(ops.sum(step**2))
        count = sum(math.prod(value.shape) for value in values)
        error = ops.sqrt(ops.cast(sum(squares), "float64") / count)
        is_finite = ops.logical_and(all_finite(seen), ops.isfinite(error))
        size, floor = (ops.convert_to_tensor(x, "float64") for x in (self.step_size, _FLOOR * self._first))
        is_taken = ops.logical_and(is_finite, ops.logical_or(error <= 1, size <= floor))
        factor = ops.clip(_SAFETY * error ** (-1 / self.tableau.order), _SLOWEST, _FASTEST)
        factor = ops.where(is_finite, ops.where(is_taken, factor, ops.minimum(factor, 1.0)), _SLOWEST)
        self.rejected.assign_add(ops.cast(ops.logical_not(is_taken), "int64"))
        self.step_size.assign(ops.minimum(ops.maximum(size * factor, floor), self._largest))
        self._is_taken = is_taken
        return [ops.where(is_taken, step, ops.zeros_like(step)) for step in direction]

    def get_config(self) -> dict[str, Any]:
        """Returns the constructor's arguments, for saving."""
        config = super().get_config()
        if self.rtol is not None:
            config["learning_rate"] = self._first
        method = dataclasses.asdict(self.method) if isinstance(self.method, ButcherTableau) else self.method
        return {**config, "method": method, "rtol": self.rtol, "atol": self.atol, "max_step": self.max_step}

    @classmethod
    def from_config(cls, config: dict[str, Any], custom_objects: dict[str, Any] | None = None) -> Any:
        """Creates an optimizer from what ``get_config`` has returned."""
        if isinstance(config.get("method"), dict):
            config = {**config, "method": ButcherTableau(**config["method"])}
        return super().from_config(config, custom_objects=custom_objects)


class _OneMethod(RungeKutta):
    """A Runge–Kutta method under its own name, which its configuration does not repeat."""

    def get_config(self) -> dict[str, Any]:
        """Returns the constructor's arguments, for saving."""
        config = super().get_config()
        del config["method"]
        return config


@keras.saving.register_keras_serializable(package="companion")
class Heun(_OneMethod):
    r"""Heun's method: the mean of the gradient here and the gradient where one step of gradient descent leads.

    .. math::

       k_1 = \nabla L(\theta) \qquad k_2 = \nabla L(\theta - h k_1) \qquad
       \theta \leftarrow \theta - \frac{h}{2} (k_1 + k_2)

    Two gradients a step, order 2. Needs :func:`~companion.inject`.

    Args:
        learning_rate: :math:`h`, see :class:`RungeKutta`. Defaults to 0.01.
        rtol: see :class:`RungeKutta`. Defaults to ``None``.
        atol: see :class:`RungeKutta`. Defaults to 1e-6.
        max_step: see :class:`RungeKutta`. Defaults to ``None``.
        **kwargs: those of ``keras.optimizers.Optimizer``.

    Raises:
        ValueError: an argument is not as in :class:`RungeKutta`.

    Example:
        >>> model = keras.Sequential([keras.Input((1,)), keras.layers.Dense(1, None, False, "ones")])
        >>> optimizer = Heun(learning_rate=0.25)
        >>> model.compile(optimizer, loss="mse")
        >>> model = optimizer.inject(model)
        >>> loss = model.train_on_batch(np.ones((1, 1)), np.zeros((1, 1)))
        >>> print(model.layers[0].kernel.numpy())  # 1 - 0.25 (2 + 1) / 2
        [[0.625]]

    References:
        Heun, 1900, "Neue Methoden zur approximativen Integration der Differentialgleichungen einer unabhängigen
        Veränderlichen".

    Taught in chapter 09, :doc:`/notebooks/09_injecting_heun`.
    """

    def __init__(
        self,
        learning_rate: Any = 0.01,
        rtol: float | None = None,
        atol: float = 1e-6,
        max_step: float | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(learning_rate, "heun", rtol, atol, max_step, **kwargs)


@keras.saving.register_keras_serializable(package="companion")
class RK23(_OneMethod):
    r"""The method of Bogacki and Shampine with adaptive steps: order 3, and 2 for the error estimate.

    .. math::

       \theta \leftarrow \theta - h \Bigl(\frac29 k_1 + \frac13 k_2 + \frac49 k_3\Bigr)

    Four gradients a step; three with ``rtol=None``. Needs :func:`~companion.inject`.

    Args:
        learning_rate: the size of the first step, see :class:`RungeKutta`. Defaults to 0.01.
        rtol: see :class:`RungeKutta`. Defaults to 1e-3.
        atol: see :class:`RungeKutta`. Defaults to 1e-6.
        max_step: see :class:`RungeKutta`. Defaults to ``None``.
        **kwargs: those of ``keras.optimizers.Optimizer``.

    Raises:
        ValueError: an argument is not as in :class:`RungeKutta`.

    Example:
        >>> model = keras.Sequential([keras.Input((1,)), keras.layers.Dense(1)])
        >>> model.compile(RK23(learning_rate=1e-3), loss="mse")
        >>> history = model.optimizer.inject(model).fit(np.ones((4, 1)), np.zeros((4, 1)), epochs=5, verbose=0)
        >>> bool(model.optimizer.step_size > 1e-3)
        True

    References:
        Bogacki and Shampine, 1989, "A 3(2) pair of Runge–Kutta formulas".

    Taught in chapter 10, :doc:`/notebooks/10_runge_kutta`.
    """

    def __init__(
        self,
        learning_rate: Any = 0.01,
        rtol: float | None = 1e-3,
        atol: float = 1e-6,
        max_step: float | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(learning_rate, "bogacki_shampine", rtol, atol, max_step, **kwargs)


@keras.saving.register_keras_serializable(package="companion")
class RK45(_OneMethod):
    r"""The method of Dormand and Prince with adaptive steps: order 5, and 4 for the error estimate.

    .. math::

       \theta \leftarrow \theta - h \Bigl(\frac{35}{384} k_1 + \frac{500}{1113} k_3 + \frac{125}{192} k_4
       - \frac{2187}{6784} k_5 + \frac{11}{84} k_6\Bigr)

    Seven gradients a step; six with ``rtol=None``. Needs :func:`~companion.inject`.

    Args:
        learning_rate: the size of the first step, see :class:`RungeKutta`. Defaults to 0.01.
        rtol: see :class:`RungeKutta`. Defaults to 1e-3.
        atol: see :class:`RungeKutta`. Defaults to 1e-6.
        max_step: see :class:`RungeKutta`. Defaults to ``None``.
        **kwargs: those of ``keras.optimizers.Optimizer``.

    Raises:
        ValueError: an argument is not as in :class:`RungeKutta`.

    Example:
        >>> RK45().tableau.order
        5

    References:
        Dormand and Prince, 1980, "A family of embedded Runge–Kutta formulae".

    Taught in chapter 10, :doc:`/notebooks/10_runge_kutta`.
    """

    def __init__(
        self,
        learning_rate: Any = 0.01,
        rtol: float | None = 1e-3,
        atol: float = 1e-6,
        max_step: float | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(learning_rate, "dormand_prince", rtol, atol, max_step, **kwargs)


@keras.saving.register_keras_serializable(package="companion")
class RungeKuttaChebyshev(InjectedOptimizer):
    r"""The first-order Runge–Kutta–Chebyshev method: spends its gradients on stability, not on order.

    .. math::

       d_j = \mu_j d_{j-1} + \nu_j d_{j-2} + \tilde\mu_j \nabla L(\theta - h d_{j-1}) \qquad
       \theta \leftarrow \theta - h d_s

    It is stable up to :math:`h\lambda \approx (2 - \frac43\varepsilon)\, s^2` for :math:`s` gradients a step, where
    gradient descent reaches :math:`2s` in as many. Needs :func:`~companion.inject`.

    Args:
        learning_rate: :math:`h`, see :class:`RungeKutta`. Defaults to 0.01.
        stages: :math:`s`, an integer of at least 1. Defaults to 5.
        damping: :math:`\varepsilon`, a number of at least 0. Defaults to 0.05.
        **kwargs: those of ``keras.optimizers.Optimizer``.

    Raises:
        ValueError: an argument is not as above.

    Example:
        >>> model = keras.Sequential([keras.Input((1,)), keras.layers.Dense(1)])
        >>> model.compile(RungeKuttaChebyshev(learning_rate=5.0, stages=5), loss="mse")  # gradient descent: below 0.5
        >>> history = model.optimizer.inject(model).fit(np.ones((4, 1)), np.zeros((4, 1)), epochs=9, verbose=0)
        >>> history.history["loss"][-1] < history.history["loss"][0]
        True

    References:
        van der Houwen and Sommeijer, 1980, "On the internal stability of explicit, m-stage Runge–Kutta methods for
        large m-values".

    Taught in chapter 10, :doc:`/notebooks/10_runge_kutta`.
    """

    def __init__(self, learning_rate: Any = 0.01, stages: int = 5, damping: float = 0.05, **kwargs: Any) -> None:
        coefficients = gradient_flow.chebyshev_coefficients(stages, damping)
        super().__init__(learning_rate=learning_rate, **kwargs)
        self.stages, self.damping, self._coefficients = stages, damping, coefficients

    def direction(self, oracle: Any, values: list[Any], learning_rate: Any) -> list[Any]:
        """Where the recurrence arrives."""
        before = now = [ops.zeros_like(value) for value in values]
        for stage, (mu, nu, step) in enumerate(self._coefficients):
            slopes = oracle(moved(values, -learning_rate, now) if stage else values)
            after = [mu * d + nu * e + step * k for d, e, k in zip(now, before, slopes, strict=True)]
            before, now = now, after
        return now

    def get_config(self) -> dict[str, Any]:
        """Returns the constructor's arguments, for saving."""
        return {**super().get_config(), "stages": self.stages, "damping": self.damping}


def _check_control(
    tableau: ButcherTableau, learning_rate: Any, method: Any, rtol: Any, atol: Any, max_step: Any, weight_decay: Any
) -> None:
    """Raises the error that says why the step size cannot adapt itself."""
    if tableau.b_embedded is None:
        able = [name for name, each in gradient_flow.TABLEAUX.items() if each.b_embedded is not None]
        raise ValueError(
            f"`rtol` needs a method with embedded weights, such as {', '.join(map(repr, able))}. "
            f"Received: rtol={rtol!r}, method={method!r}"
        )
    estimate: dict[Any, float] = {}  # of stages that ask the same, the weights add up
    for row, b, other in zip(tableau.a, tableau.b, tableau.b_embedded, strict=True):
        estimate[row] = estimate.get(row, 0) + b - other
    if max(map(abs, estimate.values())) < 1e-10:
        raise ValueError(
            "`rtol` needs embedded weights that differ from the method's own: the error estimate would always be 0. "
            f"Received: b_embedded={tableau.b_embedded} with b={tableau.b}"
        )
    for name, value, is_right in (("rtol", rtol, _is_number(rtol) and rtol > 0), ("atol", atol, _is_number(atol))):
        if not is_right or not 0 <= value < float("inf"):
            least = "greater than 0" if name == "rtol" else "of at least 0"
            raise ValueError(f"`{name}` must be a finite number {least}. Received: {name}={value!r}")
    if not _is_number(learning_rate) or not learning_rate > 0:
        raise ValueError(
            "`learning_rate` is the size of the first step where `rtol` chooses the others: it must be a number "
            f"greater than 0. Received: learning_rate={learning_rate!r}"
        )
    if max_step is not None and not (_is_number(max_step) and learning_rate <= max_step < float("inf")):
        raise ValueError(
            "`max_step` must be a finite number, at least `learning_rate`, which is the first step. "
            f"Received: max_step={max_step!r}, learning_rate={learning_rate!r}"
        )
    _check_decay(weight_decay)


def _check_decay(weight_decay: Any) -> None:
    if weight_decay:
        raise ValueError(
            "`weight_decay` and `rtol` do not go together: the error estimate would not see the decay. Use a "
            f"regularizer, which is a part of the loss. Received: weight_decay={weight_decay!r}"
        )


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float, np.number)) and not isinstance(value, bool)


def _combine(weights: Any, slopes: dict[int, list[Any]], factor: Any = 1, start: list[Any] | None = None) -> list[Any]:
    """The weighted sum of the answers times a factor, for each variable, from where it starts."""
    used = [(factor * weight, slopes[stage]) for stage, weight in enumerate(weights) if weight]
    terms = [[weight * answer for answer in answers] for weight, answers in used]
    return [tf.add_n(each) for each in zip(*([start] if start else []), *terms, strict=True)]
