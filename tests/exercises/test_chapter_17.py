"""Exercises of chapter 17: right answers are right, wrong ones get a hint that helps, and nothing raises."""

from collections.abc import Callable
from typing import Any

import numpy as np
from scipy.optimize import LbfgsInvHessProduct

from tests.exercises.judge import judged


def by_scipy(gradient: Any, pairs: Any) -> Any:
    """SciPy's operator begins with the identity: the scaling of the newest pair goes into the gradients."""
    if not pairs:
        return gradient
    s, y = map(np.array, zip(*pairs, strict=True))
    scale = np.sqrt((s[-1] @ y[-1]) / (y[-1] @ y[-1]))
    return LbfgsInvHessProduct(s / scale, y * scale).matvec(gradient * scale) * scale


def two_loop(order: int = 1, scale: int | None = -1, sign: int = 1, second: bool = True) -> Callable[..., Any]:
    """The two loops, with one thing changed."""

    def answer(gradient: Any, pairs: Any) -> Any:
        q, shares, pairs = np.array(gradient), [], pairs[::order]
        for s, y in reversed(pairs):
            shares.append(s @ q / (s @ y))
            q = q - shares[-1] * y
        if pairs and scale is not None:
            s, y = pairs[::order][scale]
            q = q * (s @ y) / (y @ y)
        for (s, y), share in zip(pairs if second else [], reversed(shares), strict=False):
            q = q + s * (share - y @ q / (s @ y))
        return sign * q

    return answer


def in_place(gradient: Any, pairs: Any) -> Any:
    for s, y in pairs[::-1]:
        gradient -= y * (s @ gradient / (s @ y))
    return gradient


test_right, test_wrong = judged(
    [
        ("17.1", two_loop()),
        ("17.1", by_scipy),
        ("17.1", lambda gradient, pairs: list(two_loop()(gradient, pairs))),
        ("17.2", "ac"),
        ("17.2", ["C", "a"]),
        ("17.3", -0.14),
        ("17.3", np.float32(-0.14).astype(float).round(6)),
    ],
    [
        ("17.1", "two_loop", "without parentheses"),
        ("17.1", lambda gradient: gradient, "two arguments"),
        ("17.1", lambda gradient, pairs: None, "returns nothing"),
        ("17.1", lambda gradient, pairs: gradient, "the gradient itself"),
        ("17.1", lambda gradient, pairs: 1.0, "the shape is ()"),
        ("17.1", two_loop(sign=-1), "the direction"),
        ("17.1", two_loop(scale=None), "scaling between the loops is missing"),
        ("17.1", two_loop(scale=0), "scale with the newest pair"),
        ("17.1", two_loop(order=-1), "turned round"),
        ("17.1", two_loop(second=False), "it is not H g"),
        ("17.1", in_place, "changes what it was given"),
        ("17.1", lambda gradient, pairs: pairs[-1] and two_loop()(gradient, pairs), "With none there is no newest"),
        ("17.1", lambda gradient, pairs: gradient / 0 if pairs[5] else 0, "IndexError"),
        ("17.2", 3, "give the letters"),
        ("17.2", "abc", "b: with dropout"),
        ("17.2", "acd", "statistics of BatchNorm"),
        ("17.2", "ace", "the angle is drawn anew"),
        ("17.2", "c", "a: more points"),
        ("17.2", "a", "c: must data fit"),
        ("17.3", "left", "give a number"),
        ("17.3", 0.06, "gradient descent"),
        ("17.3", 0.36, "begins at the weight"),
        ("17.3", 0.26, "downhill"),
        ("17.3", -0.02, "whatever the slope is"),
        ("17.3", 1.0, "where is uphill of 0.1"),
    ],
)
