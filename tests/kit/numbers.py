"""Comparing lists of arrays."""

from collections.abc import Sequence
from typing import Any

import numpy as np


def distance(left: Sequence[Any], right: Sequence[Any], relative: bool = False) -> float:
    """The largest difference; where it is relative, to numbers above 1."""
    assert [array.shape for array in left] == [array.shape for array in right]
    assert all(np.isfinite(array).all() for array in [*left, *right])
    scales = [np.maximum(1, np.abs(array)) if relative else 1 for array in right]
    return max(float(np.max(np.abs(a - b) / s, initial=0)) for a, b, s in zip(left, right, scales, strict=True))


def identical(left: Sequence[Any], right: Sequence[Any]) -> bool:
    """Whether all are equal to the last bit, and of the same kind."""
    return all(a.dtype == b.dtype and np.array_equal(a, b) for a, b in zip(left, right, strict=True))


def assert_close(found: Sequence[Any], expected: Sequence[Any], tolerance: float = 1e-12) -> None:
    for mine, theirs in zip(found, expected, strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=0, atol=tolerance)
