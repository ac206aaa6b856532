"""Compares the data of two figures: what a notebook stored with a picture, and what running it again draws."""

from collections.abc import Sequence
from typing import Any

import numpy as np


def differences(found: Sequence[dict[str, Any]], expected: Sequence[dict[str, Any]], rtol: float = 1e-2) -> list[str]:
    """Compares the :func:`data` of two figures and lists where they differ by more than ``rtol`` of a curve's range.

    Args:
        found: the data of one figure.
        expected: the data of the other.
        rtol: tolerance, relative to the largest absolute value of each list of numbers. Defaults to 1e-2.

    Returns:
        One sentence for each difference; empty if there is none.

    Example:
        >>> differences([{"title": "a"}], [{"title": "b"}])
        ["[0].title: 'a' instead of 'b'"]
    """
    return _differences(list(found), list(expected), rtol, "")


def _differences(found: Any, expected: Any, rtol: float, place: str) -> list[str]:
    if isinstance(found, dict) and isinstance(expected, dict) and found.keys() == expected.keys():
        return [line for key in found for line in _differences(found[key], expected[key], rtol, f"{place}.{key}")]
    if isinstance(found, list) and isinstance(expected, list) and len(found) == len(expected):
        try:
            numbers, wanted = np.array(found, dtype=float), np.array(expected, dtype=float)
        except (TypeError, ValueError):
            pairs = enumerate(zip(found, expected, strict=True))
            return [line for i, (a, b) in pairs for line in _differences(a, b, rtol, f"{place}[{i}]")]
        if numbers.shape != wanted.shape:
            return [f"{place}: shape {numbers.shape} instead of {wanted.shape}"]
        scale = np.nanmax(np.abs(wanted), initial=0.0)
        close = np.allclose(numbers, wanted, rtol=0, atol=rtol * scale, equal_nan=True)
        return [] if close else [f"{place}: numbers differ by up to {np.nanmax(np.abs(numbers - wanted)):.3g}"]
    return [] if found == expected else [f"{place}: {found!r} instead of {expected!r}"]
