"""The checks of chapter 01 tell right from wrong, and say something useful about each wrong answer."""

import linecache
from typing import Any

import keras
import numpy as np
import pytest
from keras import ops

from companion import exercises


def optimizer(rule: Any) -> type:
    """An optimizer class whose ``update_step`` is ``rule(self, gradient, variable, learning_rate)``."""
    return type("Answer", (keras.optimizers.Optimizer,), {"update_step": rule})


def lars(dtype: str | None = None, epsilon: float = 1e-8, assign: str = "optimizer", sign: float = 1.0) -> type:
    """LARS that computes in ``dtype`` (that of the weights if ``None``)."""

    def rule(self: Any, gradient: Any, variable: Any, learning_rate: Any) -> None:
        g, value = ops.cast(gradient, dtype or variable.dtype), ops.cast(variable, dtype or variable.dtype)
        ratio = sign * ops.norm(value) / (ops.norm(g) + epsilon)
        step = ops.multiply(ops.multiply(g, ratio), ops.cast(learning_rate, g.dtype))
        if assign == "optimizer":
            self.assign_sub(variable, step)
        else:
            variable.assign_sub(step)

    return optimizer(rule)


def half_precision_norm(self: Any, gradient: Any, variable: Any, learning_rate: Any) -> None:
    """LARS in float32, except that the weight is cast after its norm is taken."""
    g = ops.cast(gradient, "float32")
    ratio = ops.cast(ops.norm(variable), "float32") / (ops.norm(g) + 1e-8)
    self.assign_sub(variable, learning_rate * ratio * g)


def draft(self: Any, gradient: Any, variable: Any, learning_rate: Any) -> None:
    """The chapter's own, which works in float32."""
    ratio = ops.norm(variable) / (ops.norm(gradient) + 1e-8)
    variable.assign_sub(learning_rate * ratio * gradient)


class NonNegative(keras.constraints.Constraint):
    def __call__(self, w: Any) -> Any:
        return ops.maximum(w, 0.0)


class Flipping(keras.constraints.Constraint):
    def __call__(self, w: Any) -> Any:
        return ops.abs(w)


class Silent(keras.constraints.Constraint):
    def __call__(self, w: Any) -> Any:
        pass


class Unary(keras.constraints.Constraint):
    def __call__(self) -> Any:
        return 0.0


class AtLeastOne(keras.constraints.Constraint):
    def __call__(self, w: Any) -> Any:
        return ops.maximum(w, 1.0)


def divided_by_magnitude(self: Any, gradient: Any, variable: Any, learning_rate: Any) -> None:
    self.assign_sub(variable, learning_rate * gradient / ops.abs(gradient))


def positive_for_zero(self: Any, gradient: Any, variable: Any, learning_rate: Any) -> None:
    self.assign_sub(variable, learning_rate * ops.where(gradient >= 0, 1.0, -1.0))


WRONG = {
    "01.1": [
        ((None,), "class that inherits"),
        (("sign",), "class that inherits"),
        ((lambda gradient: gradient,), "class that inherits"),
        ((keras.optimizers.Optimizer(0.5),), "class itself"),
        ((optimizer(lambda self: None),), "TypeError"),
        ((optimizer(lambda self, g, v, h: None),), "did not move"),
        ((optimizer(lambda self, g, v, h: self.assign_sub(v, h * g)),), "gradient descent"),
        ((optimizer(lambda self, g, v, h: self.assign_add(v, h * ops.sign(g))),), "uphill"),
        ((optimizer(lambda self, g, v, h: self.assign_sub(v, ops.sign(g))),), "length 1"),
        ((optimizer(lambda self, g, v, h: self.assign_sub(v, 0.5 * ops.sign(g))),), "`learning_rate`"),
        ((optimizer(lambda self, g, v, h: self.assign_sub(v, 3 * h * ops.sign(g))),), "moved the weight by"),
        ((optimizer(lambda self, g, v, h: self.assign(v, -h * ops.sign(g))),), "sign(0)"),
        ((optimizer(divided_by_magnitude),), "NaN"),
        ((optimizer(positive_for_zero),), "sign(0)"),
        ((optimizer(lambda self, g, v, h: self.assign_sub(v, h * ops.sign(g) / 2)),), "not [-0.5, 0.5, 0.0]"),
        ((optimizer(lambda self, g, v, h: self.assign_sub(v, h * np.sign(g))),), "right when called directly"),
        ((optimizer(lambda self, g, v, h: self.assign_sub(v, h * float(g[1] < 0) * ops.sign(g))),), "compiled `fit`"),
    ],
    "01.2": [
        ((None,), "class that inherits"),
        ((3,), "class that inherits"),
        ((lars()(0.1),), "class itself"),
        ((optimizer(lambda self, gradient: None),), "float32 weights it raises TypeError: look at the rule"),
        ((optimizer(draft),), "the learning rate is float32"),
        ((lars("float32", assign="variable"),), "Use `self.assign_sub(variable, step)`"),
        ((lars("float32", sign=-1.0),), "check the rule"),
        ((lars("float16"),), "300"),
        ((lars(),), "300"),
        ((optimizer(half_precision_norm),), "weights of 300"),
        ((lars("float32", epsilon=0.0),), "gradient of zero"),
        ((optimizer(lambda self, g, v, h: self.assign_sub(v, h * g)),), "check the rule"),
    ],
    "01.3": [
        ((None, [2.0]), "inherits from"),
        (("non_neg", [2.0]), "inherits from"),
        ((Silent, [2.0]), "returns nothing"),
        ((Flipping, [2.0]), "-1 became 1"),
        ((AtLeastOne, [2.0]), "became [1.0, 1.0, 2.0]"),
        ((lambda w: ops.relu(w), [2.0]), "inherits from"),
        ((Unary, [2.0]), "TypeError"),
        ((NonNegative, None), "list of numbers"),
        ((NonNegative, []), "list of numbers"),
        ((NonNegative, 2.0), "list of numbers"),
        ((NonNegative, [0.5]), "average at 0.5"),
        ((NonNegative, [2.0, -9.0]), "not below zero"),
        ((NonNegative, ["two"]), "ValueError"),
        ((NonNegative, [[2.0, 3.0]]), "ValueError"),
    ],
    "01.4": [
        ((None,), "whole number"),
        (("92",), "whole number"),
        ((92.5,), "whole number"),
        (([92],), "whole number"),
        ((float("nan"),), "whole number"),
        ((True,), "whole number"),
        ((4,), "epochs"),
        ((88,), "still an update"),
        ((90,), "round up"),
        ((69,), "goes on counting"),
        ((23,), "does not start from zero"),
        ((5760,), "images"),
        ((7,), "count the batches"),
    ],
}


@pytest.mark.parametrize(
    ("number", "answer", "expected"),
    [(number, answer, expected) for number, cases in WRONG.items() for answer, expected in cases],
)
def test_wrong_answers_get_a_hint_that_fits(number: str, answer: tuple[Any, ...], expected: str) -> None:
    verdict = exercises.check(number, *answer)
    assert not verdict.correct
    assert expected in verdict.message


@pytest.mark.parametrize(("number", "answers"), {"01.1": 1, "01.2": 1, "01.3": 2, "01.4": 1}.items())
def test_unanswered(number: str, answers: int) -> None:
    assert exercises.check(number, *[...] * answers).message.endswith("not answered yet.")


@pytest.mark.parametrize(
    ("number", "answer"),
    [
        ("01.2", (lars("float32"),)),
        ("01.2", (lars("float64"),)),
        ("01.3", (NonNegative(), [1.5, 0.25])),
        ("01.3", (NonNegative, (3,))),
        ("01.3", (NonNegative, [np.array([2.0])])),
        ("01.3", (NonNegative, [ops.ones((1,)) * 2])),
        ("01.4", (92.0,)),
        ("01.4", (np.int64(92),)),
    ],
)
def test_right_answers_of_other_kinds_are_right(number: str, answer: tuple[Any, ...]) -> None:
    assert exercises.check(number, *answer).correct, exercises.check(number, *answer).message


def test_hint_says_what_tensorflow_says_after_its_traceback() -> None:
    class Fails(keras.optimizers.Optimizer):
        def update_step(self, gradient: Any, variable: Any, learning_rate: Any) -> None:
            raise ValueError("in user code:\n\n    File ...\n\n    Error: no `if` here")

    verdict = exercises.check("01.1", Fails)
    assert "no `if` here" in verdict.message
    assert "in user code" not in verdict.message


def test_hint_says_what_keras_says_in_bold() -> None:
    class Squares(keras.layers.Layer):
        def call(self, inputs: Any) -> Any:
            raise TypeError("only whole numbers")

    message = exercises.check("01.1", optimizer(lambda self, g, v, h: Squares()(g))).message
    assert "raised TypeError: only whole numbers" in message, message


@pytest.mark.parametrize("name", ["<ipython-input-1-0f00>", "/tmp/ipykernel_7/42.py"])
def test_hint_names_the_line_of_the_notebook(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    source = "def answer(backups):\n    newest = [max(epochs) for epochs in backups]\n    return min(nevest)\n"
    monkeypatch.setitem(linecache.cache, name, (len(source), None, source.splitlines(True), name))
    names: dict[str, Any] = {}
    exec(compile(source, name, "exec"), names)
    message = exercises.check("15.4", names["answer"]).message
    assert "your code raised NameError, in `return min(nevest)`: name 'nevest' is not defined" in message
