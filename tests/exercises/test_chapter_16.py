"""Exercises of chapter 16: right answers are right, wrong ones get a hint that helps, and nothing raises."""

from collections.abc import Callable
from typing import Any

import numpy as np

from tests.exercises.judge import judged


def lion(
    swap: bool = False, first: bool = False, sign: float = 1.0, of: Callable[..., Any] = np.sign, own: bool = True
) -> Callable[..., Any]:
    """A step in the shape of Lion's, with one thing changed."""

    def answer(theta: Any, m: Any, g: Any, h: float, beta_1: float, beta_2: float) -> Any:
        one, two = (beta_2, beta_1) if swap else (beta_1, beta_2)
        new = two * m + (1 - two) * g
        step = of(one * (new if first else m) + (1 - one) * g) if own else of(new)
        return theta - sign * h * step, new

    return answer


def in_place(theta: Any, m: Any, g: Any, h: float, beta_1: float, beta_2: float) -> Any:
    theta -= h * np.sign(beta_1 * m + (1 - beta_1) * g)
    m[:] = beta_2 * m + (1 - beta_2) * g
    return theta, m


def other_memory(theta: Any, m: Any, g: Any, h: float, beta_1: float, beta_2: float) -> Any:
    return lion()(theta, m, g, h, beta_1, beta_2)[0], m + g


SHARE = float(np.sum((np.arange(1, 101) / 100) ** 2))
RIGHT = [
    ("16.1", (lion(),)),
    ("16.2", ("b",)),
    ("16.2", (" B",)),
    ("16.3", (SHARE / (SHARE + 300),)),
    ("16.3", (0.1014,)),
]
WRONG = [
    ("16.1", (None,), "the function itself"),
    ("16.1", (lambda theta, m, g, h: theta,), "the function itself"),
    ("16.1", (lambda *given: given[0],), "two things"),
    ("16.1", (lambda *given: (0.0, 0.0),), "shape"),
    ("16.1", (lion(swap=True),), "changed places"),
    ("16.1", (lion(first=True),), "written last"),
    ("16.1", (lion(own=False),), "mixture of its own"),
    ("16.1", (lion(sign=-1.0),), "minus, not plus"),
    ("16.1", (lion(of=lambda mixed: mixed),), "take the sign"),
    ("16.1", (lion(sign=2.0),), "one entry by hand"),
    ("16.1", (other_memory,), "The memory is not"),
    ("16.1", (in_place,), "in place"),
    ("16.1", (lambda *given: lion()(*given)[::-1],), "theta first"),
    ("16.1", (lambda *given: 1 / 0,), "raised"),
    ("16.2", ("a",), "is the method"),
    ("16.2", ("c",), "factor"),
    ("16.2", ("all",), "one letter"),
    ("16.2", (None,), "one letter"),
    ("16.3", (0.25,), "weigh alike"),
    ("16.3", (50.5 / 350.5,), "not the rate"),
    ("16.3", (100 * SHARE / (SHARE + 300),), "per cent"),
    ("16.3", (SHARE / 300,), "all 400"),
    ("16.3", (0.5,), "Divide the first sum"),
    ("16.3", (0.101,), "one more"),
    ("16.3", ("few",), "a number"),
]


test_right_answers, test_wrong_answers_get_a_hint_that_fits = judged(RIGHT, WRONG, unpack=True)
