r"""How long a step may be: the polynomial that multiplies a mode, and where it leaves the unit disk.

Chapter 10 of the book teaches it. ``companion.gradient_flow`` is where to import it from.
"""

import itertools
from typing import Any

import numpy as np
from numpy.polynomial import Polynomial

from companion.tableaux import tableau


def stability_polynomial(method: Any) -> Polynomial:
    r"""What one step multiplies a mode by: :math:`R(z)` with :math:`z = -h\lambda` on a curvature :math:`\lambda`.

    .. math::

       R(z) = 1 + \sum_{k \ge 1} z^k\, b^\top A^{k-1} \mathbf{1}

    Args:
        method: a name or a :class:`~companion.gradient_flow.ButcherTableau`.

    Returns:
        A ``numpy.polynomial.Polynomial``. Called with real or complex numbers it goes through the stages, where a sum
        of powers would cancel: of 50 stages no digit would be left.

    Raises:
        ValueError: there is no such method.

    Example:
        >>> stability_polynomial("heun").coef
        array([1. , 1. , 0.5])

    Taught in chapter 10, :doc:`/notebooks/10_runge_kutta`.
    """
    method = tableau(method)
    a, b, ones = np.array(method.a), np.array(method.b), np.ones(len(method.b))
    powers = itertools.accumulate(range(len(b) - 1), lambda vector, _: a @ vector, initial=ones)
    coefficients = np.array([1.0, *(float(b @ vector) for vector in powers)])
    polynomial = _ByStages(np.trim_zeros(coefficients, "b"))
    polynomial.method = method
    return polynomial


class _ByStages(Polynomial):
    """A stability polynomial that is calculated as a step is. What is made of it is a plain polynomial."""

    method: Any = None

    @property  # type: ignore[misc]
    def __class__(self) -> Any:
        return Polynomial  # which it compares in sums and products, and makes their results of

    def __reduce__(self) -> Any:
        return stability_polynomial, (self.method,)

    def __call__(self, arg: Any) -> Any:
        if isinstance(arg, Polynomial):
            return super().__call__(arg)
        with np.errstate(over="ignore", invalid="ignore"):
            found = _factor(self.method, np.asarray(arg))
            return np.where(np.isfinite(found), found, super().__call__(arg))[()]


def _factor(method: Any, z: Any) -> Any:
    """What a step multiplies a mode by, stage by stage."""
    factor, stages = 1.0, list[Any]()
    for row, weight in zip(method.a, method.b, strict=True):
        stages.append(1 + z * sum(a * stage for a, stage in zip(row, stages, strict=False)))
        factor = factor + z * weight * stages[-1]
    return factor


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

    Taught in chapter 10, :doc:`/notebooks/10_runge_kutta`.
    """
    if axis not in ("real", "imaginary"):
        raise ValueError(f'`axis` must be "real" or "imaginary". Received: axis={axis!r}')
    method, direction = tableau(method), -1 if axis == "real" else 1j

    def grows(distance: Any) -> Any:
        return np.abs(_factor(method, direction * distance)) > 1 + 1e-11

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
