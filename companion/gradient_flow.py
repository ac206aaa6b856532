r"""Gradient descent as integration: the flow :math:`\theta' = -\nabla L(\theta)` and the methods that follow it.

One Euler step of size :math:`h` along the flow is one step of gradient descent with learning rate :math:`h`. This
module computes with NumPy alone, whatever else an import of ``companion`` loads. Its tableaux are those of
``companion.RungeKutta``. Chapters 08 and 10 to 13 of the book teach it. Everything here descends: a ``gradient`` goes
in, and the values move against it.
"""

from collections.abc import Callable
from typing import Any

import numpy as np

from companion import arguments
from companion.stability import stability_limit, stability_polynomial
from companion.tableaux import TABLEAUX, ButcherTableau, chebyshev, chebyshev_coefficients, order_of, tableau

__all__ = [
    "TABLEAUX",
    "ButcherTableau",
    "chebyshev",
    "chebyshev_coefficients",
    "heavy_ball",
    "integrate",
    "modified_gradient",
    "modified_loss",
    "nesterov",
    "observed_order",
    "order_of",
    "oscillation",
    "quadratic_flow",
    "stability_limit",
    "stability_polynomial",
    "tableau",
]

Array = np.ndarray[Any, np.dtype[Any]]
Gradient = Callable[[Array], Array]


def integrate(gradient: Gradient, values: Any, step_size: float, steps: int, method: Any = "euler") -> Array:
    r"""Follows the flow :math:`\theta' = -\nabla L(\theta)` in fixed steps.

    Args:
        gradient: a function from values to :math:`\nabla L` of the same shape.
        values: the start, a number or an array. Calculated with in float64, or in complex128 if complex.
        step_size: :math:`h`, a finite number; backwards in time if negative.
        steps: how many.
        method: a name or a :class:`~companion.gradient_flow.ButcherTableau`. Defaults to ``"euler"``, gradient descent.

    Returns:
        The trajectory, of shape ``(steps + 1, *values.shape)``.

    Raises:
        ValueError: ``gradient`` returns something else than numbers in the shape of the values, ``values`` are not
            numbers, ``steps`` is not an integer of at least 0, or there is no such method.

    Example:
        >>> integrate(lambda theta: 2 * theta, 1.0, step_size=0.25, steps=3)
        array([1.   , 0.5  , 0.25 , 0.125])

    Taught in chapter 08, :doc:`/notebooks/08_gradient_descent_is_euler`.
    """
    method, steps = tableau(method), arguments.integer("steps", steps, 0)
    step_size = arguments.number("step_size", step_size, -np.inf, include_low=False)
    gradient, start = _checked(gradient), _numbers("values", values)
    trajectory = np.empty((steps + 1, *start.shape), start.dtype)
    trajectory[0] = start
    stages = method.stages()
    for step in range(steps):
        start, slopes = trajectory[step], dict[int, Array]()
        for stage in stages:
            along = sum(weight * slopes[j] for j, weight in enumerate(method.a[stage]) if weight)
            slopes[stage] = gradient(start - step_size * along)
        trajectory[step + 1] = start - step_size * sum(method.b[j] * slope for j, slope in slopes.items())
    return trajectory


def _numbers(name: str, value: Any, shape: tuple[int, ...] | None = None, is_real: bool = False) -> Array:
    """An array of float64, or of complex128 if complex and that is allowed; of the shape, if one is given."""
    try:
        array = np.asarray(value)
        found = array.astype(complex if np.iscomplexobj(array) else float)
        is_right = array.dtype.kind in "iuf" + "c" * (not is_real) and (shape is None or found.shape == shape)
    except (TypeError, ValueError):
        is_right = False
    if not is_right:
        what = "real numbers" if is_real else "numbers"
        where = "" if shape is None else f" in the shape {shape}"
        raise ValueError(f"`{name}` must be {what}{where}. Received: {name}={value!r}")
    return found


def _checked(function: Any, name: str = "gradient", axes: int = 1) -> Gradient:
    """A function of values that must return numbers in their shape, and real ones if they are; a copy of them."""
    if not callable(function):
        raise ValueError(f"`{name}` must be a function of values. Received: {name}={function!r}")

    def checked(values: Array) -> Array:
        answer, shape, is_real = function(values), axes * np.shape(values), not np.iscomplexobj(values)
        try:
            return _numbers(name, answer, shape, is_real).copy()  # it may reuse what it returns
        except ValueError:
            raise ValueError(
                f"`{name}` must return {'real ' * is_real}numbers in the shape {shape} for values in the shape "
                f"{np.shape(values)}. Received: {answer!r}"
            ) from None

    return checked


def observed_order(step_sizes: Any, errors: Any) -> float:
    r"""The exponent :math:`p` in error :math:`\propto h^p`: the slope of a line through the logarithms.

    Args:
        step_sizes: step sizes greater than 0, of which two differ by more than rounding.
        errors: the error that each led to, greater than 0 as well.

    Returns:
        The slope.

    Raises:
        ValueError: an argument is not as above, or they are not equally many.

    Example:
        >>> round(observed_order([0.1, 0.2, 0.4], [0.03, 0.12, 0.48]), 6)
        2.0

    Taught in chapter 08, :doc:`/notebooks/08_gradient_descent_is_euler`.
    """
    sizes = _numbers("step_sizes", step_sizes, is_real=True)
    found = _numbers("errors", errors, sizes.shape, is_real=True)
    for name, array in (("step_sizes", sizes), ("errors", found)):
        if array.ndim != 1 or not (np.isfinite(array) & (array > 0)).all():
            raise ValueError(f"`{name}` must be a list of finite numbers greater than 0. Received: {name}={array}")
    powers = np.log(sizes)
    if not sizes.size or np.ptp(powers) < 1e-8:
        raise ValueError(f"`step_sizes` must hold two different sizes at least. Received: step_sizes={step_sizes!r}")
    return float(np.polynomial.polynomial.polyfit(powers, np.log(found), 1)[1])


# On a quadratic.


def quadratic_flow(matrix: Any, values: Any, times: Any, minimum: Any = 0.0) -> Array:
    r"""The exact flow of :math:`L(\theta) = \frac12 (\theta - m)^\top A (\theta - m)`.

    .. math::

       \theta(t) = m + e^{-At} (\theta(0) - m)

    Args:
        matrix: :math:`A`, symmetric; a number is a matrix of one row.
        values: :math:`\theta(0)`.
        times: an array of times.
        minimum: :math:`m`, a number or in the shape of the values. Defaults to 0.

    Returns:
        The points, of shape ``(*times.shape, *values.shape)``.

    Raises:
        ValueError: ``matrix`` is not symmetric and finite, or an argument is not of its shape.

    Example:
        >>> quadratic_flow(np.diag([1.0, 2.0]), [1.0, 1.0], [0.0, np.log(2)])
        array([[1.  , 1.  ],
               [0.5 , 0.25]])

    Taught in chapter 08, :doc:`/notebooks/08_gradient_descent_is_euler`.
    """
    a = np.atleast_2d(_numbers("matrix", matrix, is_real=True))
    if not a.size or a.shape != a.T.shape or not np.isfinite(a).all() or np.abs(a - a.T).max() > 1e-8 * np.abs(a).max():
        raise ValueError(f"`matrix` must be symmetric and finite. Received: matrix={matrix!r}")
    start = _numbers("values", values, () if np.ndim(values) == 0 and len(a) == 1 else (len(a),), is_real=True)
    centre = np.zeros(start.shape) + _numbers("minimum", minimum, np.shape(minimum) and start.shape, is_real=True)
    moments = _numbers("times", times, is_real=True)
    curvatures, axes = np.linalg.eigh(a)
    along = axes * (axes.T @ np.atleast_1d(start - centre))  # of each mode, what each value has
    with np.errstate(over="ignore", invalid="ignore"):
        powers = np.where(curvatures == 0, 0, -np.multiply.outer(moments, curvatures))
        decay = np.exp(powers)
        moved = decay @ along.T if np.isfinite(decay).all() else _grown(powers, along)
    return moved.reshape(moments.shape + start.shape) + centre


def _grown(powers: Array, along: Array) -> Array:
    """What grows without a bound is infinite in the values that have a share of it; the fastest mode says which way."""
    values = []
    for row in along:
        top = np.where(row == 0, -np.inf, powers).max(-1, keepdims=True)
        beside = np.where(powers == top, 1, np.exp(powers - top))
        total = np.where(row == 0, 0, beside * row).sum(-1)
        values.append(np.where(total == 0, 0, total * np.exp(top[..., 0])))
    return np.stack(values, -1)


def oscillation(curvature: Any, friction: float, values: Any, times: Any, velocity: Any = 0.0) -> Array:
    r"""The exact motion of :math:`\theta'' + \gamma\theta' + \lambda\theta = 0`: a ball with friction in a valley.

    Args:
        curvature: :math:`\lambda`, a number, or one for each of the values.
        friction: :math:`\gamma \ge 0`, a finite number. At :math:`2\sqrt\lambda` the motion just stops to swing.
        values: :math:`\theta(0)`.
        times: an array of times.
        velocity: :math:`\theta'(0)`, a number, or one for each of the values. Defaults to 0.

    Returns:
        The positions, of shape ``(*times.shape, *values.shape)``.

    Raises:
        ValueError: an argument is not as above.

    Example:
        >>> oscillation(1.0, 0.0, 1.0, [0.0, np.pi]).round(6).tolist()
        [1.0, -1.0]

    Taught in chapter 11, :doc:`/notebooks/11_momentum_is_an_ode`.
    """
    half = arguments.number("friction", friction, 0) / 2
    start = _numbers("values", values, is_real=True)
    times = _numbers("times", times, is_real=True)
    bend, speed = (
        np.zeros(start.shape) + _numbers(name, value, np.shape(value) and start.shape, is_real=True)
        for name, value in (("curvature", curvature), ("velocity", velocity))
    )
    t = times.reshape(times.shape + (1,) * start.ndim)
    with np.errstate(all="ignore"):
        square = np.square(half) - bend
        root = np.where(np.isfinite(square), np.sqrt(square.astype(complex)), half)  # the two rates are -half ± root
        fast = -half - root
        slow = np.where(fast == 0, 0, -bend / np.where(fast == 0, 1, -fast))  # their product is the curvature
        # Close rates: one exponential times a series. Others: the sum of two, each with a share that may be 0.
        gap = 2 * root * np.abs(t)
        near, tail = np.exp(np.where(t < 0, fast, slow) * t), np.exp(-gap)
        sine = t * np.where(np.abs(gap) < 1e-12, 1, -np.expm1(-gap) / np.where(gap == 0, 1, gap))
        joint = start * ((1 + tail) / 2 + half * sine) + speed * sine
        joint = np.where(joint == 0, 0, near * joint)
        shares = ((speed - fast * start) / (2 * root), slow), ((slow * start - speed) / (2 * root), fast)
        halves = ((share, np.exp(rate * t / 2)) for share, rate in shares)  # a factor alone may pass the largest number
        apart = sum(np.where(share == 0, 0, share * half_way * half_way) for share, half_way in halves)
        return np.where(np.abs(gap) > 1, apart, joint).real


# Fields that ``integrate`` follows as it follows a gradient.


def _parts(state: Array, names: str) -> Array:
    if np.ndim(state) == 0 or len(state) != names.count(",") + 1:
        raise ValueError(f"`values` must be np.stack([{names}]). Received: values={state!r}")
    return state


def heavy_ball(gradient: Gradient, friction: float) -> Gradient:
    r"""The motion :math:`\theta'' + \gamma \theta' + \nabla L(\theta) = 0`, to be followed by ``integrate``.

    Args:
        gradient: a function from values to :math:`\nabla L`.
        friction: :math:`\gamma`, a finite number.

    Returns:
        The field of the state ``np.stack([position, velocity])``.

    Raises:
        ValueError: ``friction`` is not a finite number.

    Example:
        >>> field = heavy_ball(lambda theta: theta, friction=2.0)
        >>> integrate(field, [1.0, 0.0], 0.01, 100, "rk4")[-1, 0].round(6)  # 2 / e
        np.float64(0.735759)

    Taught in chapter 11, :doc:`/notebooks/11_momentum_is_an_ode`.
    """
    gradient, friction = _checked(gradient), arguments.number("friction", friction, -np.inf, include_low=False)

    def field(state: Array) -> Array:
        position, velocity = _parts(state, "position, velocity")
        return np.stack([-velocity, friction * velocity + gradient(position)])

    return field


def nesterov(gradient: Gradient) -> Gradient:
    r"""The motion :math:`\theta'' + \frac{3}{t} \theta' + \nabla L(\theta) = 0` that Nesterov's method follows.

    Args:
        gradient: a function from values to :math:`\nabla L`.

    Returns:
        The field of the state ``np.stack([position, velocity, time])``, the time in the shape of the position. It
        begins at a time greater than 0; from rest at time 0 the motion leaves as
        :math:`\theta(t) \approx \theta(0) - \frac{t^2}{8} \nabla L(\theta(0))`.

    Example:
        >>> field = nesterov(lambda theta: theta)
        >>> state = [0.995, -0.05, 0.2]  # from rest at 1, a little later
        >>> integrate(field, state, 0.01, 100, "rk4")[-1, 0].round(2)  # 2 J1(t) / t at t = 1.2
        np.float64(0.83)

    Taught in chapter 11, :doc:`/notebooks/11_momentum_is_an_ode`.

    References:
        Su, Boyd and Candès, 2016, "A differential equation for modeling Nesterov's accelerated gradient method".
    """
    gradient = _checked(gradient)

    def field(state: Array) -> Array:
        position, velocity, time = _parts(state, "position, velocity, time")
        if not (time > 0).all():
            raise ValueError(f"`time`, the last of the state, must be greater than 0. Received: time={time!r}")
        return np.stack([-velocity, 3 / time * velocity + gradient(position), -np.ones_like(time)])

    return field


def modified_loss(loss: Callable[[Array], Any], gradient: Gradient, step_size: float) -> Callable[[Array], Any]:
    r"""The loss that steps of size :math:`h` follow more closely than their own.

    .. math::

       \tilde L(\theta) = L(\theta) + \frac{h}{4} \lVert \nabla L(\theta) \rVert^2

    Args:
        loss: :math:`L`.
        gradient: :math:`\nabla L`.
        step_size: :math:`h`.

    Returns:
        The function :math:`\tilde L`.

    References:
        Barrett and Dherin, 2021, "Implicit gradient regularization".

    Example:
        >>> modified_loss(lambda theta: theta**2 / 2, lambda theta: theta, step_size=0.4)(np.array(1.0)).round(6)
        np.float64(0.6)

    Taught in chapter 13, :doc:`/notebooks/13_what_euler_minimises`.
    """
    gradient, step_size = _checked(gradient), arguments.number("step_size", step_size, -np.inf, include_low=False)
    return lambda values: loss(values) + step_size / 4 * np.sum(np.square(gradient(values)))


def modified_gradient(gradient: Gradient, hessian: Callable[[Array], Array], step_size: float) -> Gradient:
    r"""The gradient of the :func:`~companion.gradient_flow.modified_loss`.

    .. math::

       \nabla\tilde L(\theta) = \nabla L(\theta) + \frac{h}{2} \nabla^2 L(\theta)\, \nabla L(\theta)

    Args:
        gradient: :math:`\nabla L`, of values in one dimension, or of a number.
        hessian: :math:`\nabla^2 L`, a matrix, or a number.
        step_size: :math:`h`.

    Returns:
        The function :math:`\nabla\tilde L`.

    Example:
        >>> modified_gradient(lambda theta: 3 * theta, lambda theta: 3, step_size=0.2)(1.0).round(6)  # 3 + 0.1 * 3 * 3
        np.float64(3.9)

    Taught in chapter 13, :doc:`/notebooks/13_what_euler_minimises`.
    """
    gradient, hessian = _checked(gradient), _checked(hessian, "hessian", axes=2)
    step_size = arguments.number("step_size", step_size, -np.inf, include_low=False)

    def modified(values: Array) -> Array:
        if np.ndim(values) > 1:
            raise ValueError(f"`values` must be in one dimension, or a number. Received: values={values!r}")
        slope = gradient(values)
        return slope + step_size / 2 * np.dot(hessian(values), slope)

    return modified
