r"""The implicit Euler method: a step against the gradient where it ends. Chapter 10 of the book uses it."""

from typing import Any

import keras
import numpy as np
from keras import ops

from companion.gradients import moved
from companion.injection import InjectedOptimizer

_SOLVERS = ("newton_krylov", "fixed_point")


@keras.saving.register_keras_serializable(package="companion")
class ImplicitEuler(InjectedOptimizer):
    r"""Implicit Euler: the step against the gradient at its own end, which is the proximal step.

    .. math::

       \theta^+ = \theta - h \nabla L(\theta^+) \qquad\Longleftarrow\qquad
       \theta^+ = \operatorname*{arg\,min}_\vartheta\ L(\vartheta) + \frac{1}{2h} \lVert \vartheta - \theta \rVert^2

    On a convex loss it is stable for every :math:`h`; where :math:`h\lambda \le -1` for a negative curvature, the
    equation may have no solution or several. The equation is solved as far as ``iterations`` go, not further:

    - ``"newton_krylov"``: each iteration is a step of Newton's method, with the linear system
      :math:`(I + h \nabla^2 L)\,\delta = r` solved by ``krylov_iterations`` conjugate gradients. A product with
      the Hessian is a difference of two gradients, which float32 computes to three digits or so. It stops where it
      meets a direction of negative curvature.
    - ``"fixed_point"``: :math:`d \leftarrow \nabla L(\theta - h d)`, which converges for :math:`h\lambda < 1` only.

    Needs :func:`~companion.inject`. Gradients a step: ``iterations * (1 + krylov_iterations)``, or
    ``1 + iterations`` with ``"fixed_point"``.

    Args:
        learning_rate: :math:`h`, see :class:`~companion.SGD`. Defaults to 0.01.
        solver: ``"newton_krylov"`` or ``"fixed_point"``. Defaults to ``"newton_krylov"``.
        iterations: an integer of at least 1. Defaults to 2.
        krylov_iterations: an integer of at least 1. Defaults to 5.
        **kwargs: those of ``keras.optimizers.Optimizer``.

    Raises:
        ValueError: an argument is not as above.

    Example:
        >>> model = keras.Sequential([keras.Input((1,)), keras.layers.Dense(1, None, False, "ones")])
        >>> model.compile(ImplicitEuler(learning_rate=1.5), loss="mse")
        >>> model = model.optimizer.inject(model)
        >>> loss = model.train_on_batch(np.ones((1, 1)), np.zeros((1, 1)))
        >>> print(model.layers[0].kernel.numpy().round(3))  # 1 / (1 + 1.5 * 2)
        [[0.25]]

    References:
        Rockafellar, 1976, "Monotone operators and the proximal point algorithm". Knoll and Keyes, 2004,
        "Jacobian-free Newton–Krylov methods".

    Taught in chapter 10, :doc:`/notebooks/10_runge_kutta`.
    """

    def __init__(
        self,
        learning_rate: Any = 0.01,
        solver: str = "newton_krylov",
        iterations: int = 2,
        krylov_iterations: int = 5,
        **kwargs: Any,
    ) -> None:
        if solver not in _SOLVERS:
            raise ValueError(f"`solver` must be one of {_SOLVERS}. Received: solver={solver!r}")
        for name, value in (("iterations", iterations), ("krylov_iterations", krylov_iterations)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"`{name}` must be an integer of at least 1. Received: {name}={value!r}")
        super().__init__(learning_rate=learning_rate, **kwargs)
        self.solver, self.solver_iterations, self.krylov_iterations = solver, iterations, krylov_iterations

    def direction(self, oracle: Any, values: list[Any], learning_rate: Any) -> list[Any]:
        """The gradient at the end of the step, as far as the iterations find it."""
        slopes = oracle(values)
        if self.solver == "fixed_point":
            for _ in range(self.solver_iterations):
                slopes = oracle(moved(values, -learning_rate, slopes))
            return slopes
        point, direction = values, [ops.zeros_like(value) for value in values]
        for iteration in range(self.solver_iterations):
            if iteration:
                point = moved(values, -learning_rate, direction)
                slopes = oracle(point)
            residual = moved(slopes, -1, direction)
            direction = moved(direction, 1, self._solve(oracle, point, slopes, learning_rate, residual))
        return direction

    def _solve(self, oracle: Any, point: list[Any], slopes: list[Any], h: Any, residual: list[Any]) -> list[Any]:
        r"""Conjugate gradients for :math:`(I + h \nabla^2 L)\,\delta = r`."""
        precision = np.finfo(keras.backend.standardize_dtype(h.dtype)).eps ** 0.5
        near = precision * (1 + ops.sqrt(_dot(point, point)))
        solution, search, length = [ops.zeros_like(r) for r in residual], residual, _dot(residual, residual)
        for _ in range(self.krylov_iterations):
            distance = ops.divide_no_nan(near, ops.sqrt(_dot(search, search)))
            differences = moved(oracle(moved(point, distance, search)), -1, slopes)
            product = moved(search, ops.divide_no_nan(h, distance), differences)
            curvature = _dot(search, product)
            factor = ops.where(curvature > 0, ops.divide_no_nan(length, curvature), ops.zeros_like(length))
            solution, residual = moved(solution, factor, search), moved(residual, -factor, product)
            before, length = length, _dot(residual, residual)
            search = moved(residual, ops.divide_no_nan(length, before), search)
        return solution

    def get_config(self) -> dict[str, Any]:
        """Returns the constructor's arguments, for saving."""
        return {
            **super().get_config(),
            "solver": self.solver,
            "iterations": self.solver_iterations,
            "krylov_iterations": self.krylov_iterations,
        }


def _dot(left: list[Any], right: list[Any]) -> Any:
    return sum(ops.sum(a * b) for a, b in zip(left, right, strict=True))
