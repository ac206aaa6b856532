r"""Gradient descent as integration: the flow :math:`\theta' = -\nabla L(\theta)` and the methods that follow it.

One Euler step of size :math:`h` along the flow is one step of gradient descent with learning rate :math:`h`. This
module needs NumPy only. Its tableaux are those of ``companion.RungeKutta``. Chapters 08 and 10 to 13 of the book teach
it. Everything here descends: a ``gradient`` goes in, and the values move against it.
"""

import functools
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.polynomial import Polynomial

Array = np.ndarray[Any, np.dtype[Any]]
Gradient = Callable[[Array], Array]
_TOLERANCE = 1e-10


@dataclass(frozen=True)
class ButcherTableau:
    r"""An explicit Runge–Kutta method: where it asks for gradients, and how it weighs the answers.

    .. math::

       k_i = \nabla L\Bigl(\theta - h \sum_{j < i} a_{ij} k_j\Bigr) \qquad
       \theta \leftarrow \theta - h \sum_i b_i k_i

    Attributes:
        a: a square matrix, zero on its diagonal and above: row :math:`i` says where question :math:`i` is asked.
        b: the weights of the answers.
        c: the times of the questions, in steps: the row sums of ``a``.
        order: the order that the method claims. It is checked.
        b_embedded: weights of a second result from the same answers, of order ``order - 1``. The distance between the
            two estimates the error of a step. Defaults to ``None``: no estimate.

    Raises:
        ValueError: the shapes do not fit, a stage uses a later one, ``c`` are not the row sums, or an order condition
            does not hold.

    Example:
        >>> heun = ButcherTableau(a=[[0, 0], [1, 0]], b=[0.5, 0.5], c=[0, 1], order=2)
        >>> ButcherTableau(a=heun.a, b=heun.b, c=heun.c, order=3)
        Traceback (most recent call last):
        ...
        ValueError: `order` claims 3, but the tableau has order 2. Received: order=3

    References:
        Butcher, 1963, "Coefficients for the study of Runge–Kutta integration processes". Hairer, Nørsett and Wanner,
        1993, *Solving ordinary differential equations I*, chapter II.2 for the order conditions.

    Taught in chapter 10, :doc:`/notebooks/10_runge_kutta`.
    """

    a: Any
    b: Any
    c: Any
    order: int
    b_embedded: Any = None

    def __post_init__(self) -> None:
        for name in ("a", "b", "c", "b_embedded"):
            value = getattr(self, name)
            try:
                array = None if value is None else np.array(value, float)
            except (TypeError, ValueError):
                array = np.array(np.nan)
            shape = (len(np.atleast_1d(self.b)),) * (2 if name == "a" else 1)
            if array is not None and (array.shape != shape or not np.isfinite(array).all()):
                raise ValueError(f"`{name}` must hold numbers in the shape {shape}. Received: {name}={value!r}")
            object.__setattr__(self, name, _frozen(array))
        a, c = np.array(self.a), np.array(self.c)
        if np.triu(a).any():
            raise ValueError(
                f"`a` must be zero on its diagonal and above: the method is explicit. Received: a={self.a}"
            )
        if np.abs(a.sum(1) - c).max() > _TOLERANCE:
            raise ValueError(f"`c` must be the row sums of `a`, {_frozen(a.sum(1))}. Received: c={self.c}")
        if isinstance(self.order, bool) or not isinstance(self.order, int) or self.order < 1:
            raise ValueError(f"`order` must be an integer of at least 1. Received: order={self.order!r}")
        if (found := order_of(a, self.b, self.order)) < self.order:
            raise ValueError(
                f"`order` claims {self.order}, but the tableau has order {found}. Received: order={self.order}"
            )
        if self.b_embedded is not None and (found := order_of(a, self.b_embedded, self.order - 1)) < self.order - 1:
            raise ValueError(
                f"`b_embedded` must have order {self.order - 1}, one less than `b`, but has order {found}. "
                f"Received: b_embedded={self.b_embedded}"
            )

    def stages(self, embedded: bool = False) -> tuple[int, ...]:
        """The stages that the result depends on, and no others.

        Args:
            embedded: whether the error estimate is wanted, too.

        Returns:
            Their indices, ascending. Each costs a gradient.
        """
        weights = np.abs(self.b) + (np.abs(self.b_embedded) if embedded else 0)
        needed: set[int] = set()
        for stage in reversed(range(len(self.b))):
            if weights[stage] or any(self.a[later][stage] for later in needed):
                needed.add(stage)
        return tuple(sorted(needed))


def _frozen(array: Any) -> Any:
    if array is None:
        return None
    return tuple(map(_frozen, array)) if np.ndim(array) > 1 else tuple(np.asarray(array, float).tolist())


@functools.cache
def _trees(order: int) -> tuple[tuple[Any, ...], ...]:
    """All rooted trees with ``order`` nodes; a tree is the sorted tuple of the trees that hang off its root."""

    def forests(nodes: int, largest: int) -> Iterator[tuple[Any, ...]]:
        if nodes == 0:
            yield ()
        for size in range(1, min(nodes, largest) + 1):
            for tree in _trees(size):
                for rest in forests(nodes - size, size):
                    yield (tree, *rest)

    return tuple(sorted({tuple(sorted(forest)) for forest in forests(order - 1, order - 1)}))


def order_of(a: Any, b: Any, up_to: int = 6) -> int:
    r"""The order of an explicit Runge–Kutta method, from the order conditions.

    There is one condition for each rooted tree :math:`t`: :math:`\sum_i b_i \Phi_i(t) = 1 / \gamma(t)`.

    Args:
        a: the matrix of a tableau.
        b: its weights.
        up_to: the highest order to look for.

    Returns:
        The highest order, at most ``up_to``, up to which all conditions hold.

    Example:
        >>> order_of([[0, 0], [0.5, 0]], [0, 1])
        2
    """
    a, b = np.array(a, float), np.array(b, float)

    def weights(tree: tuple[Any, ...]) -> Any:
        return functools.reduce(np.multiply, (a @ weights(branch) for branch in tree), np.ones(len(b)))

    def nodes(tree: tuple[Any, ...]) -> int:
        return 1 + sum(map(nodes, tree))

    def density(tree: tuple[Any, ...]) -> int:
        return functools.reduce(int.__mul__, map(density, tree), nodes(tree))

    for order in range(1, up_to + 1):
        if any(abs(b @ weights(tree) - 1 / density(tree)) > _TOLERANCE for tree in _trees(order)):
            return order - 1
    return up_to


TABLEAUX = {
    "euler": ButcherTableau([[0]], [1], [0], order=1),
    "midpoint": ButcherTableau([[0, 0], [1 / 2, 0]], [0, 1], [0, 1 / 2], order=2, b_embedded=[1, 0]),
    "heun": ButcherTableau([[0, 0], [1, 0]], [1 / 2, 1 / 2], [0, 1], order=2, b_embedded=[1, 0]),
    "ralston": ButcherTableau([[0, 0], [2 / 3, 0]], [1 / 4, 3 / 4], [0, 2 / 3], order=2, b_embedded=[1, 0]),
    "extragradient": ButcherTableau([[0, 0], [1, 0]], [0, 1], [0, 1], order=1),
    "kutta3": ButcherTableau(
        [[0, 0, 0], [1 / 2, 0, 0], [-1, 2, 0]], [1 / 6, 2 / 3, 1 / 6], [0, 1 / 2, 1], order=3, b_embedded=[0, 1, 0]
    ),
    "rk4": ButcherTableau(
        [[0, 0, 0, 0], [1 / 2, 0, 0, 0], [0, 1 / 2, 0, 0], [0, 0, 1, 0]],
        [1 / 6, 1 / 3, 1 / 3, 1 / 6],
        [0, 1 / 2, 1 / 2, 1],
        order=4,
    ),
    "bogacki_shampine": ButcherTableau(
        [[0, 0, 0, 0], [1 / 2, 0, 0, 0], [0, 3 / 4, 0, 0], [2 / 9, 1 / 3, 4 / 9, 0]],
        [2 / 9, 1 / 3, 4 / 9, 0],
        [0, 1 / 2, 3 / 4, 1],
        order=3,
        b_embedded=[7 / 24, 1 / 4, 1 / 3, 1 / 8],
    ),
    "dormand_prince": ButcherTableau(
        [
            [0, 0, 0, 0, 0, 0, 0],
            [1 / 5, 0, 0, 0, 0, 0, 0],
            [3 / 40, 9 / 40, 0, 0, 0, 0, 0],
            [44 / 45, -56 / 15, 32 / 9, 0, 0, 0, 0],
            [19372 / 6561, -25360 / 2187, 64448 / 6561, -212 / 729, 0, 0, 0],
            [9017 / 3168, -355 / 33, 46732 / 5247, 49 / 176, -5103 / 18656, 0, 0],
            [35 / 384, 0, 500 / 1113, 125 / 192, -2187 / 6784, 11 / 84, 0],
        ],
        [35 / 384, 0, 500 / 1113, 125 / 192, -2187 / 6784, 11 / 84, 0],
        [0, 1 / 5, 3 / 10, 4 / 5, 8 / 9, 1, 1],
        order=5,
        b_embedded=[5179 / 57600, 0, 7571 / 16695, 393 / 640, -92097 / 339200, 187 / 2100, 1 / 40],
    ),
}
"""The methods by name; ``tableau`` knows ``"rk23"`` and ``"rk45"``, too."""

_ALIASES = {"rk23": "bogacki_shampine", "rk45": "dormand_prince"}


def tableau(method: Any) -> ButcherTableau:
    """Finds a tableau.

    Args:
        method: a name in ``TABLEAUX``, ``"rk23"``, ``"rk45"``, or a tableau, which is returned as it is.

    Returns:
        The tableau.

    Raises:
        ValueError: there is no such method.

    Example:
        >>> tableau("rk45").order
        5
    """
    if isinstance(method, ButcherTableau):
        return method
    found = TABLEAUX.get(_ALIASES.get(method, method)) if isinstance(method, str) else None
    if found is None:
        names = ", ".join(map(repr, [*TABLEAUX, *_ALIASES]))
        raise ValueError(f"`method` must be a ButcherTableau or one of {names}. Received: method={method!r}")
    return found


def chebyshev_coefficients(stages: int, damping: float = 0.05) -> list[tuple[float, float, float]]:
    r"""The recurrence of the first-order Runge–Kutta–Chebyshev method.

    .. math::

       \theta_j = \mu_j \theta_{j-1} + \nu_j \theta_{j-2} - \tilde\mu_j h \nabla L(\theta_{j-1})

    Args:
        stages: the number of stages :math:`s \ge 1`. The method is stable up to
            :math:`h\lambda \approx (2 - \frac{4}{3}\varepsilon)\, s^2`.
        damping: :math:`\varepsilon \ge 0`. Without damping the factor of a step reaches 1 in modulus at some
            :math:`h\lambda` inside. Defaults to 0.05.

    Returns:
        For each stage :math:`(\mu_j, \nu_j, \tilde\mu_j)`.

    Raises:
        ValueError: an argument is not as above.

    References:
        van der Houwen and Sommeijer, 1980, "On the internal stability of explicit, m-stage Runge–Kutta methods for
        large m-values".
    """
    if isinstance(stages, bool) or not isinstance(stages, int) or stages < 1:
        raise ValueError(f"`stages` must be an integer of at least 1. Received: stages={stages!r}")
    if not damping >= 0:
        raise ValueError(f"`damping` must be a number of at least 0. Received: damping={damping!r}")
    first_kind = [np.polynomial.Chebyshev.basis(degree) for degree in range(stages + 1)]
    centre = 1 + damping / stages**2
    scale = first_kind[stages](centre) / first_kind[stages].deriv()(centre)
    at_centre = [float(polynomial(centre)) for polynomial in first_kind]
    coefficients = [(1.0, 0.0, float(scale / centre))]
    for j in range(2, stages + 1):
        mu = 2 * centre * at_centre[j - 1] / at_centre[j]
        coefficients.append((mu, 1 - mu, float(2 * scale * at_centre[j - 1] / at_centre[j])))
    return coefficients


def chebyshev(stages: int, damping: float = 0.05) -> ButcherTableau:
    r"""The first-order Runge–Kutta–Chebyshev method as a tableau.

    Args:
        stages: the number of stages, see :func:`~companion.gradient_flow.chebyshev_coefficients`.
        damping: how far the method stays inside its limit of stability. Defaults to 0.05.

    Returns:
        The tableau, of order 1. For one stage it is Euler's.

    Raises:
        ValueError: an argument is wrong.

    Example:
        >>> round(stability_limit(chebyshev(5)), 1)
        48.5
    """
    coefficients = chebyshev_coefficients(stages, damping)
    rows = [np.zeros(stages)]  # of the points: how much of each slope they have gone along
    for j, (mu, nu, step) in enumerate(coefficients, start=1):
        row = mu * rows[j - 1] + (nu * rows[j - 2] if j > 1 else 0)
        row[j - 1] += step
        rows.append(row)
    a = np.array(rows[:-1])
    return ButcherTableau(a, rows[-1], a.sum(1), order=1)


def integrate(gradient: Gradient, values: Any, step_size: float, steps: int, method: Any = "euler") -> Array:
    r"""Follows the flow :math:`\theta' = -\nabla L(\theta)` in fixed steps.

    Args:
        gradient: a function from values to :math:`\nabla L` of the same shape.
        values: the start, a number or an array. Calculated with in float64, or in complex128 if complex.
        step_size: :math:`h`.
        steps: how many.
        method: a name or a :class:`~companion.gradient_flow.ButcherTableau`. Defaults to ``"euler"``, gradient descent.

    Returns:
        The trajectory, of shape ``(steps + 1, *values.shape)``.

    Raises:
        ValueError: ``steps`` is not an integer of at least 0, or there is no such method.

    Example:
        >>> integrate(lambda theta: 2 * theta, 1.0, step_size=0.25, steps=3)
        array([1.   , 0.5  , 0.25 , 0.125])
    """
    method = tableau(method)
    if isinstance(steps, bool) or not isinstance(steps, (int, np.integer)) or steps < 0:
        raise ValueError(f"`steps` must be an integer of at least 0. Received: steps={steps!r}")
    values = np.asarray(values)
    trajectory = np.empty((steps + 1, *values.shape), complex if np.iscomplexobj(values) else float)
    trajectory[0] = values
    stages = method.stages()
    for step in range(steps):
        start, slopes = trajectory[step], dict[int, Array]()
        for stage in stages:
            along = sum(weight * slopes[j] for j, weight in enumerate(method.a[stage]) if weight)
            slopes[stage] = np.asarray(gradient(start - step_size * along))
        trajectory[step + 1] = start - step_size * sum(method.b[j] * slope for j, slope in slopes.items())
    return trajectory


def observed_order(step_sizes: Any, errors: Any) -> float:
    r"""The exponent :math:`p` in error :math:`\propto h^p`: the slope of a line through the logarithms.

    Args:
        step_sizes: at least two step sizes.
        errors: the error that each led to.

    Returns:
        The slope.

    Example:
        >>> round(observed_order([0.1, 0.2, 0.4], [0.03, 0.12, 0.48]), 6)
        2.0
    """
    return float(np.polynomial.polynomial.polyfit(np.log(step_sizes), np.log(errors), 1)[1])


# On a quadratic.


def quadratic_flow(matrix: Any, values: Any, times: Any, minimum: Any = 0.0) -> Array:
    r"""The exact flow of :math:`L(\theta) = \frac12 (\theta - m)^\top A (\theta - m)`.

    .. math::

       \theta(t) = m + e^{-At} (\theta(0) - m)

    Args:
        matrix: :math:`A`, symmetric; a number is a matrix of one row.
        values: :math:`\theta(0)`.
        times: an array of times.
        minimum: :math:`m`. Defaults to 0.

    Returns:
        The points, of shape ``(*times.shape, *values.shape)``.

    Raises:
        ValueError: ``matrix`` is not symmetric.

    Example:
        >>> quadratic_flow(np.diag([1.0, 2.0]), [1.0, 1.0], [0.0, np.log(2)])
        array([[1.  , 1.  ],
               [0.5 , 0.25]])
    """
    a = np.atleast_2d(np.asarray(matrix, float))
    if a.shape != a.T.shape or not np.allclose(a, a.T):
        raise ValueError(f"`matrix` must be symmetric. Received: matrix={matrix!r}")
    curvatures, axes = np.linalg.eigh(a)
    start = np.asarray(values, float)
    along = axes.T @ np.atleast_1d(start - minimum)
    decay = np.exp(-np.multiply.outer(np.asarray(times, float), curvatures))
    return ((decay * along) @ axes.T).reshape(np.shape(times) + start.shape) + minimum


def oscillation(curvature: Any, friction: float, values: Any, times: Any, velocity: Any = 0.0) -> Array:
    r"""The exact motion of :math:`\theta'' + \gamma\theta' + \lambda\theta = 0`: a ball with friction in a valley.

    Args:
        curvature: :math:`\lambda`, a number, or one for each of the values.
        friction: :math:`\gamma \ge 0`. At :math:`2\sqrt\lambda` the motion just stops to swing.
        values: :math:`\theta(0)`.
        times: an array of times.
        velocity: :math:`\theta'(0)`. Defaults to 0.

    Returns:
        The positions, of shape ``(*times.shape, *values.shape)``.

    Example:
        >>> oscillation(1.0, 0.0, 1.0, [0.0, np.pi]).round(6).tolist()
        [1.0, -1.0]
    """
    start = np.asarray(values, float)
    t = np.asarray(times, float).reshape(np.shape(times) + (1,) * start.ndim)
    root = np.sqrt(np.asarray(friction**2 / 4 - np.asarray(curvature, float), complex))
    with np.errstate(invalid="ignore", divide="ignore"):
        sine = np.where(np.abs(root) < 1e-12, t, np.sinh(root * t) / root)
    motion = start * (np.cosh(root * t) + friction / 2 * sine) + np.asarray(velocity, float) * sine
    return (np.exp(-friction / 2 * t) * motion).real


# Fields that ``integrate`` follows as it follows a gradient.


def heavy_ball(gradient: Gradient, friction: float) -> Gradient:
    r"""The motion :math:`\theta'' + \gamma \theta' + \nabla L(\theta) = 0`, to be followed by ``integrate``.

    Args:
        gradient: a function from values to :math:`\nabla L`.
        friction: :math:`\gamma`.

    Returns:
        The field of the state ``np.stack([position, velocity])``.

    Example:
        >>> field = heavy_ball(lambda theta: theta, friction=2.0)
        >>> integrate(field, [1.0, 0.0], 0.01, 100, "rk4")[-1, 0].round(6)  # 2 / e
        np.float64(0.735759)
    """

    def field(state: Array) -> Array:
        position, velocity = state
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

    References:
        Su, Boyd and Candès, 2016, "A differential equation for modeling Nesterov's accelerated gradient method".
    """

    def field(state: Array) -> Array:
        position, velocity, time = state
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
    """
    return lambda values: loss(values) + step_size / 4 * np.sum(np.square(gradient(values)))


def modified_gradient(gradient: Gradient, hessian: Callable[[Array], Array], step_size: float) -> Gradient:
    r"""The gradient of the :func:`~companion.gradient_flow.modified_loss`.

    .. math::

       \nabla\tilde L(\theta) = \nabla L(\theta) + \frac{h}{2} \nabla^2 L(\theta)\, \nabla L(\theta)

    Args:
        gradient: :math:`\nabla L`, of values in one dimension.
        hessian: :math:`\nabla^2 L`, a matrix.
        step_size: :math:`h`.

    Returns:
        The function :math:`\nabla\tilde L`.
    """

    def modified(values: Array) -> Array:
        slope = gradient(values)
        return slope + step_size / 2 * hessian(values) @ slope

    return modified


# Stability.


def stability_polynomial(method: Any) -> Polynomial:
    r"""What one step multiplies a mode by: :math:`R(z)` with :math:`z = -h\lambda` on a curvature :math:`\lambda`.

    .. math::

       R(z) = 1 + \sum_{k \ge 1} z^k\, b^\top A^{k-1} \mathbf{1}

    Args:
        method: a name or a :class:`~companion.gradient_flow.ButcherTableau`.

    Returns:
        A ``numpy.polynomial.Polynomial``, to be called with real or complex numbers.

    Raises:
        ValueError: there is no such method.

    Example:
        >>> stability_polynomial("heun").coef
        array([1. , 1. , 0.5])
    """
    method = tableau(method)
    a, b, ones = np.array(method.a), np.array(method.b), np.ones(len(method.b))
    powers = itertools.accumulate(range(len(b) - 1), lambda vector, _: a @ vector, initial=ones)
    coefficients = np.array([1.0, *(float(b @ vector) for vector in powers)])
    return Polynomial(np.trim_zeros(coefficients, "b"))


def stability_limit(method: Any, axis: str = "real") -> float:
    r"""How far :math:`h\lambda` may go before a mode grows: :math:`|R| \le 1` up to there.

    Args:
        method: a name or a :class:`~companion.gradient_flow.ButcherTableau`.
        axis: ``"real"``: for a curvature :math:`\lambda`, where :math:`z = -h\lambda`. ``"imaginary"``: for a rotation
            of frequency :math:`\lambda`, where :math:`z = ih\lambda`. Defaults to ``"real"``.

    Returns:
        The limit; 0 if every step is too long.

    Raises:
        ValueError: an argument is wrong.

    Example:
        >>> [round(stability_limit("rk4", axis), 3) for axis in ("real", "imaginary")]
        [2.785, 2.828]
    """
    if axis not in ("real", "imaginary"):
        raise ValueError(f'`axis` must be "real" or "imaginary". Received: axis={axis!r}')
    method, direction = tableau(method), -1 if axis == "real" else 1j

    def grows(distance: Any) -> Any:
        factor, stages = 1.0, list[Any]()
        for row, weight in zip(method.a, method.b, strict=True):
            stages.append(1 + direction * distance * sum(a * stage for a, stage in zip(row, stages, strict=False)))
            factor = factor + direction * distance * weight * stages[-1]
        return np.abs(factor) > 1 + 1e-11

    along = stability_polynomial(method)(Polynomial([0, direction])).coef
    leaving = (Polynomial(along.real) ** 2 + Polynomial(along.imag) ** 2 - 1).coef  # |R|² - 1, near 0
    if next((term for term in leaving.tolist() if abs(term) > 1e-13), 0.0) > 0:
        return 0.0
    distances = np.linspace(0, 2 * len(method.b) ** 2 + 1, 20_001)  # no method of s stages holds beyond 2s²
    first = int(np.argmax(grows(distances)))
    stable, unstable = distances[first - 1], distances[first]
    for _ in range(60):
        middle = (stable + unstable) / 2
        stable, unstable = (stable, middle) if grows(middle) else (middle, unstable)
    return float(stable)
