"""Exercises of chapter 09: right answers are right, wrong ones get a hint that helps, and nothing raises."""

from typing import Any

import keras
from keras import ops

import companion
from tests.exercises.judge import judged


def sam(
    norm: str = "all",
    sign: float = 1.0,
    last: str = "second",
    rho: float = 0.05,
    safe: bool = True,
    takes: str = "rho",
    ignores: bool = False,
    saves: bool = True,
) -> type:
    """A subclass in the shape of SAM, with one thing changed."""

    class Answer(companion.InjectedOptimizer):
        def __init__(self, learning_rate: float = 0.01, **options: Any) -> None:
            if set(options) - {takes}:
                raise TypeError("unexpected keyword argument")
            super().__init__(learning_rate)
            self.far = rho if ignores else options.get(takes, rho)

        def direction(self, oracle: Any, values: list[Any], learning_rate: Any) -> list[Any]:
            slopes = oracle(values)
            whole = ops.sqrt(sum(ops.sum(k * k) for k in slopes))
            norms = {
                "all": [whole] * len(slopes),
                "each": [ops.sqrt(ops.sum(k * k)) for k in slopes],
                "none": [ops.ones_like(whole)] * len(slopes),
                "square": [whole**2] * len(slopes),
            }[norm]
            divide = ops.divide_no_nan if safe else ops.divide
            far = [v + sign * divide(self.far * k, n) for v, k, n in zip(values, slopes, norms, strict=True)]
            return oracle(far) if last == "second" else slopes

        def get_config(self) -> dict[str, Any]:
            return {**super().get_config(), **({"rho": self.far} if saves else {})}

    return Answer


class _Returns(companion.InjectedOptimizer):
    def direction(self, oracle: Any, values: list[Any], learning_rate: Any) -> Any:
        return 3


RIGHT = [
    ("09.1", (1,)),
    ("09.1", (1.0,)),
    ("09.2", (sam(),)),
    ("09.3", ("ad",)),
    ("09.3", ("D, A",)),
    ("09.3", (["a", "d"],)),
    ("09.3", ({"d", "a"},)),
    ("09.4", (384,)),
]
WRONG = [
    ("09.1", (-1.0,), "only the probe"),
    ("09.1", (3.0,), "second answer alone"),
    ("09.1", (0,), "mean of the two answers"),
    ("09.1", (0.5,), "first answer"),
    ("09.1", ("here",), "a number"),
    ("09.1", (None,), "a number"),
    ("09.2", (None,), "the class itself"),
    ("09.2", (keras.optimizers.SGD,), "the class itself"),
    ("09.2", (sam()(0.1),), "the class itself"),
    ("09.2", (sam(takes="radius"),), "rho"),
    ("09.2", (sam(last="first"),), "gradient descent"),
    ("09.2", (sam(sign=-1.0),), "plus, not minus"),
    ("09.2", (sam(norm="each"),), "norm of its own"),
    ("09.2", (sam(norm="none"),), "not divided"),
    ("09.2", (sam(norm="square"),), "root is missing"),
    ("09.2", (sam(sign=2.0),), "do one step by hand"),
    ("09.2", (sam(ignores=True),), "rho was 0.5"),
    ("09.2", (sam(safe=False),), "NaN"),
    ("09.2", (sam(rho=0.5),), "0.05"),
    ("09.2", (_Returns,), "raised"),
    ("09.2", (sam(saves=False),), "a file would forget rho"),
    ("09.3", (None,), "the letters"),
    ("09.3", (True,), "the letters"),
    ("09.3", ("all of them",), "the letters"),
    ("09.3", ("",), "replace the step"),
    ("09.3", ("abcd",), "clone"),
    ("09.3", ("acd",), "file"),
    ("09.3", ("d",), "replace the step"),
    ("09.3", ("a",), "same object"),
    ("09.4", (48,), "parts"),
    ("09.4", (96,), "four times"),
    ("09.4", (352,), "round up"),
    ("09.4", (360,), "round up"),
    ("09.4", (768,), "one pass"),
    ("09.4", (7,), "multiply"),
    ("09.4", ("many",), "integer"),
]


test_right_answers, test_wrong_answers_get_a_hint_that_fits = judged(RIGHT, WRONG, unpack=True)
