r"""Runge–Kutta methods as tableaux: what they hold, which order they have, and those that have a name.

Chapter 10 of the book teaches them. ``companion.gradient_flow`` is where to import them from.
"""

import functools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from companion import arguments

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
        object.__setattr__(self, "order", arguments.integer("order", self.order, 1))
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

    Taught in chapter 10, :doc:`/notebooks/10_runge_kutta`.
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

    Taught in chapter 10, :doc:`/notebooks/10_runge_kutta`.
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

    Example:
        >>> chebyshev_coefficients(stages=2, damping=0)
        [(1.0, 0.0, 0.25), (2.0, -1.0, 0.5)]

    References:
        van der Houwen and Sommeijer, 1980, "On the internal stability of explicit, m-stage Runge–Kutta methods for
        large m-values".

    Taught in chapter 10, :doc:`/notebooks/10_runge_kutta`.
    """
    stages, damping = arguments.integer("stages", stages, 1), arguments.number("damping", damping, 0)
    beyond = damping / stages**2  # the centre less 1
    rise = math.sqrt(beyond) * math.sqrt(2 + beyond)
    angle = math.log1p(
        beyond + rise
    )  # the centre is its cosh, and T_j is cosh(j * angle): what follows never overflows
    scale = rise / math.tanh(stages * angle) / stages if rise else 1 / stages**2  # T_s / T_s', at the centre
    coefficients = [(1.0, 0.0, scale / (1 + beyond))]
    for j in range(2, stages + 1):
        ratio = (
            math.exp(-angle) * (1 + math.exp(-2 * (j - 1) * angle)) / (1 + math.exp(-2 * j * angle))
        )  # T_{j-1} / T_j
        mu = 2 * ((1 + beyond) * ratio)
        coefficients.append((mu, 1 - mu, 2 * (scale * ratio)))
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
        >>> from companion.gradient_flow import stability_limit
        >>> round(stability_limit(chebyshev(5)), 1)
        48.5

    Taught in chapter 10, :doc:`/notebooks/10_runge_kutta`.
    """
    coefficients = chebyshev_coefficients(stages, damping)
    rows = [np.zeros(stages)]  # of the points: how much of each slope they have gone along
    for j, (mu, nu, step) in enumerate(coefficients, start=1):
        row = mu * rows[j - 1] + (nu * rows[j - 2] if j > 1 else 0)
        row[j - 1] += step
        rows.append(row)
    a = np.array(rows[:-1])
    return ButcherTableau(a, rows[-1], a.sum(1), order=1)
