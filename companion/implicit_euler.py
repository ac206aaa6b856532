r"""The implicit Euler method: a step against the gradient where it ends. Chapter 10 of the book uses it."""

from typing import Any

import keras
import tensorflow as tf
from keras import ops, tree

from companion import arguments
from companion.denominators import layers_of
from companion.gradients import moved
from companion.injection import InjectedOptimizer

_SOLVERS = ("newton_krylov", "fixed_point")
_EPSILON = {"float16": 2.0**-10, "bfloat16": 2.0**-7, "float32": 2.0**-23, "float64": 2.0**-52}


@keras.saving.register_keras_serializable(package="companion")
class ImplicitEuler(InjectedOptimizer):
    r"""Implicit Euler: the step against the gradient at its own end, which is the proximal step.

    .. math::

       \theta^+ = \theta - h \nabla L(\theta^+) \qquad\Longleftarrow\qquad
       \theta^+ = \operatorname*{arg\,min}_\vartheta\ L(\vartheta) + \frac{1}{2h} \lVert \vartheta - \theta \rVert^2

    On a convex loss it is stable for every :math:`h`. The equation is solved as far as ``iterations`` go, not further:

    - ``"newton_krylov"``: each iteration is a step of Newton's method, with the linear system
      :math:`(I + h \nabla^2 L)\,\delta = r` solved by ``krylov_iterations`` conjugate gradients. A product with
      the Hessian is a difference of two gradients, which float32 computes to three digits or so, bfloat16 to one: the
      difference is as long as the coarsest dtype on the way asks for, of the weights, the layers and the loss.
    - ``"fixed_point"``: :math:`d \leftarrow \nabla L(\theta - h d)`, which converges for :math:`h\lambda < 1` only.

    Where the loss is not convex, and :math:`h\lambda \le -1` for a curvature :math:`\lambda`, the equation may have no
    solution or several, and nothing is promised but this: conjugate gradients stop where they meet a direction along
    which :math:`I + h \nabla^2 L` is not positive, or may be so by rounding alone, and the step is what they have found
    before. If that is the first direction, they have found nothing, and Newton's step is zero: a smaller :math:`h`
    moves.

    With constraints the equation is that of the projected step, :math:`\theta^+ = P(\theta - h \nabla L(\theta^+))`.
    Newton's method solves it where they are projections, such as ``NonNeg``, ``MaxNorm`` and ``UnitNorm``; with others,
    such as ``MinMaxNorm`` with a ``rate`` or a division by the sum, it rests elsewhere than gradient descent.

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

    Taught in appendix a3, :doc:`/notebooks/a3_implicit_and_multistep_methods`.
    """

    def __init__(
        self,
        learning_rate: Any = 0.01,
        solver: str = "newton_krylov",
        iterations: int = 2,
        krylov_iterations: int = 5,
        **kwargs: Any,
    ) -> None:
        super().__init__(learning_rate=learning_rate, **kwargs)
        self.solver = arguments.choice("solver", solver, _SOLVERS)
        self.solver_iterations = arguments.integer("iterations", iterations, 1)
        self.krylov_iterations = arguments.integer("krylov_iterations", krylov_iterations, 1)

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
                end = moved(values, -learning_rate, direction)
                point = self._constrained(end)
                if point is not end:  # what was cut off was not gone
                    gone = [ops.divide_no_nan(v - p, learning_rate) for v, p in zip(values, point, strict=True)]
                    is_kept = [ops.abs(p - e) <= 1e-5 * ops.abs(e) for p, e in zip(point, end, strict=True)]
                    direction = [ops.where(*each) for each in zip(is_kept, direction, gone, strict=True)]
                slopes = oracle(point)
            change = self._solve(oracle, point, slopes, learning_rate, moved(slopes, -1, direction))
            direction = moved(direction, 1, change)
        return direction

    def _constrained(self, points: list[Any]) -> list[Any]:
        """The points themselves where there is no constraint."""
        asked = self._questions
        is_free = asked is None or all(variable.constraint is None for variable in asked.model.trainable_weights)
        return points if is_free else asked.constrained(points)

    def _solve(self, oracle: Any, point: list[Any], slopes: list[Any], h: Any, slope: list[Any]) -> list[Any]:
        r"""Conjugate gradients for :math:`(I + h \nabla^2 L)\,\delta = r`, along the constraints that a step meets.

        A step of size :math:`c` against :math:`r` is near enough to meet those only that hold here. With :math:`P` the
        derivative of the constraints at its end, :math:`\delta = P w` solves the equation in the directions that
        :math:`P` leaves; the term :math:`(P - P^2) h / c` is the curvature of the constraints themselves.
        """
        bound = self._precision(h) ** 0.5  # within which the curvature may be rounding
        near = bound * (1 + ops.sqrt(_dot(point, point)))
        unit = tf.reduce_max([tf.reduce_max(tf.abs(each)) for each in slope])  # in which no square over- or underflows
        slope = [ops.divide_no_nan(each, unit) for each in slope]
        c = ops.divide_no_nan(near, ops.sqrt(_dot(slope, slope)))
        project = self._projection(moved(point, -c, slope))
        residual = project(slope)
        rest = [ops.divide_no_nan(c, h) * (all_of_it - along) for all_of_it, along in zip(slope, residual, strict=True)]
        bent = ops.divide_no_nan(h, c) * unit
        solution, search = [ops.zeros_like(r) for r in residual], residual
        length, goes_on = _dot(residual, residual), True
        for _ in range(self.krylov_iterations):
            along = project(search)
            distance = ops.divide_no_nan(near, ops.sqrt(_dot(along, along)))
            differences = moved(oracle(moved(point, distance, along)), -1, slopes)
            bend = moved(along, h, [ops.divide_no_nan(each, distance) for each in differences])
            if along is not search:
                bend = project(moved(bend, bent, moved(search, -1, along)))
            curvature = _dot(search, bend)
            is_positive = curvature > bound * _dot(search, search)
            goes_on = ops.logical_and(goes_on, ops.logical_and(is_positive, ops.isfinite(curvature)))
            factor = ops.divide_no_nan(length, curvature)
            solution = _chosen(goes_on, moved(solution, factor, along), solution)
            residual = _chosen(goes_on, moved(residual, -factor, bend), residual)
            before, length = length, _dot(residual, residual)
            search = moved(residual, ops.divide_no_nan(length, before), search)
        return moved(rest, unit, solution)

    def _projection(self, end: list[Any]) -> Any:
        """The derivative of the constraints at a point, as a function; of none, it is the identity."""
        if self._constrained(end) is end:
            return lambda direction: direction

        def project(direction: list[Any]) -> list[Any]:
            with tf.GradientTape() as tape:
                tape.watch(end)
                constrained = self._constrained(end)
            return tape.gradient(constrained, end, direction, unconnected_gradients="zero")

        return project

    def _precision(self, h: Any) -> float:
        """The distance from 1 to the next number, in the coarsest dtype in which the gradient is computed."""
        names = [h.dtype]
        if self._questions is not None:
            model = self._questions.model
            losses = [getattr(loss, "dtype", None) or keras.config.floatx() for loss in tree.flatten(model.loss)]
            names = [*self._questions.dtypes, *losses, *(each.compute_dtype for each in layers_of(model))]
        known = [_EPSILON.get(keras.backend.standardize_dtype(name), 0.0) for name in names if name]
        has_tensor_cores = (
            tf.config.list_physical_devices("GPU") and tf.config.experimental.tensor_float_32_execution_enabled()
        )
        if has_tensor_cores and _EPSILON["float32"] in known:  # float32 products keep ten bits there
            known.append(_EPSILON["float16"])
        return max(known)

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


def _chosen(condition: Any, there: list[Any], here: list[Any]) -> list[Any]:
    return [ops.where(condition, a, b) for a, b in zip(there, here, strict=True)]
