"""Checks for the exercises of chapter 01, by running the reader's code on a few weights."""

import traceback
from typing import Any

import keras
import numpy as np
from keras import ops

import companion
from companion.exercises.answers import entries, in_fit, whole


def _not_an_optimizer(answer: Any) -> str | None:
    if isinstance(answer, keras.optimizers.Optimizer):
        return "give the class itself, not an object made from it: no brackets after its name"
    if not (isinstance(answer, type) and issubclass(answer, keras.optimizers.Optimizer)):
        return "give a class that inherits from `keras.optimizers.Optimizer`"
    return None


def _step(optimizer_class: type, start: list[float], gradient: list[float], h: float, dtype: str) -> np.ndarray:
    """How far one update moves a weight of this ``dtype``, in float64."""
    weight = keras.Variable(np.array(start), dtype=dtype)
    optimizer_class(learning_rate=h).apply([ops.convert_to_tensor(gradient, dtype=dtype)], [weight])
    return np.asarray(ops.convert_to_numpy(ops.cast(weight, "float64"))) - start


def _check_sign_sgd(answer: Any) -> str | None:
    wrong = _not_an_optimizer(answer)
    if wrong:
        return wrong
    start, gradient, h = [1.0, 2.0, 3.0], [0.125, -16.0, 0.0], 0.5
    step, right = _step(answer, start, gradient, h, "float32"), -h * np.sign(gradient) + 0.0  # no zero with a minus
    if np.isnan(step).any():
        return "a gradient of zero gave NaN: dividing by |g| fails there, `ops.sign` does not"
    if not step.any():
        return "the weight did not move: call `self.assign_sub(variable, …)` in `update_step`"
    if np.allclose(step, -h * np.array(gradient)):
        return "that is gradient descent: its step grows with the gradient, yours should keep only the sign"
    if np.allclose(step, -right):
        return "the weight moved uphill: subtract the sign, do not add it"
    if np.allclose(step, right / h):
        return "each step has length 1: multiply by the learning rate"
    if step[2] != 0:
        return "a weight whose gradient is zero moved: sign(0) is 0"
    if not np.allclose(step, right):
        return f"gradients {gradient} with h = {h} moved the weight by {step.round(4).tolist()}, not {right.tolist()}"
    if not np.allclose(_step(answer, start, gradient, h / 2, "float32"), right / 2):
        return "the step does not change with the learning rate: use the argument `learning_rate`"
    return in_fit(answer(learning_rate=h))


def _check_lars(answer: Any) -> str | None:
    wrong = _not_an_optimizer(answer)
    if wrong:
        return wrong
    start, right = [3.0, 4.0], np.array([-1.5, -2.0])  # h = 1/2 times the length 5 times the direction (3, 4)/5
    for dtype, tolerance in {"float32": 1e-3, "float64": 1e-3, "bfloat16": 0.05, "float16": 0.05}.items():
        try:
            step = _step(answer, start, [0.75, 1.0], 0.5, dtype)
        except Exception as error:
            if dtype == "float32":
                why = "look at the rule itself"
            elif any(frame.name == "assign_sub" for frame in traceback.extract_tb(error.__traceback__)):
                why = f"the step is float32, the weight {dtype}. Use `self.assign_sub(variable, step)`, which casts"
            else:
                why = f"the learning rate is float32, the rest is {dtype}. Cast before you multiply"
            return f"with {dtype} weights it raises {type(error).__name__}: {why}"
        if not np.allclose(step, right, rtol=0, atol=tolerance):
            return f"with {dtype} weights the step is {step.round(3).tolist()}, not {right.tolist()}: check the rule"
    for size, why in {100.0: "300² is more than float16 can hold (65504)", 1e-5: "0.00003² is zero in float16"}.items():
        step = _step(answer, start, [3 * size, 4 * size], 0.5, "float16")
        if not np.allclose(step, right, rtol=0, atol=0.05):
            return f"float16 works now, but not with gradients of {3 * size:g}: the step is {step.tolist()}. {why}"
    step = _step(answer, [300.0, 400.0], [0.75, 1.0], 0.5, "float16")
    if not np.allclose(step, [-150, -200], rtol=0, atol=1):
        return (
            f"gradients of any size work now, but not float16 weights of 300: the step is {step.tolist()}. "
            "The norm of the weights squares, too: cast them before you take it"
        )
    if not np.array_equal(_step(answer, start, [0.0, 0.0], 0.5, "float16"), [0, 0]):
        return "a gradient of zero should leave the weight where it is: what is 1e-8 in float16?"
    return None


def _check_constraint(constraint: Any, gradients: Any) -> str | None:
    constraint = constraint() if isinstance(constraint, type) else constraint
    if not isinstance(constraint, keras.constraints.Constraint):
        return "the first answer should be a class that inherits from `keras.constraints.Constraint`"
    kept = constraint(ops.convert_to_tensor([-1.0, 0.0, 2.0]))
    if kept is None:
        return "`__call__` returns nothing: it should return the weights it allows"
    kept = ops.convert_to_numpy(kept).tolist()
    if kept == [1.0, 0.0, 2.0]:
        return "-1 became 1: that flips a weight; the nearest weight that is allowed is 0"
    if kept != [0.0, 0.0, 2.0]:
        return f"[-1, 0, 2] became {kept}: negative weights should become 0, all others stay as they are"
    numbers = entries(gradients)
    if not numbers:
        return "the constraint is right; `gradients` should be a list of numbers, at least one"
    weight = keras.Variable([1.0], dtype="float32")
    weight.constraint = constraint
    optimizer = companion.SGD(learning_rate=1.0, use_ema=True, ema_momentum=0.5)
    for gradient in numbers:
        number = float(np.asarray(gradient).item())  # arrays of one number are numbers, too
        optimizer.apply([ops.convert_to_tensor([number], "float32")], [weight])
    value, average = float(weight.numpy()[0]), float(optimizer.variables[-1].numpy()[0])
    if not average < 0:
        return (
            f"the constraint is right; your gradients leave the weight at {value:g} and its average at {average:g}, "
            "not below zero. The average copies what the rule wrote, before the constraint: push the rule below zero"
        )
    return None


def _check_iterations(answer: Any) -> str | None:
    updates = whole(answer)
    if updates is None:
        return "give a whole number"
    hints = {
        4: "that is the number of epochs; `iterations` counts updates, one a batch",
        22 * 4: "the last batch of an epoch is smaller, and it is still an update",
        1440 * 4 // 64: "an epoch ends with a smaller batch: round up in every epoch, not once at the end",
        23 * 3: "that is after the first `fit`; the second goes on counting",
        23: "that is one epoch; the second `fit` does not start from zero",
        1440 * 4: "that is the number of images seen; an update uses a batch of them",
    }
    if updates == 23 * 4:
        return None
    return hints.get(updates, "count the batches of one epoch, the last one included, then the epochs of both fits")


CHECKS = {
    "01.1": _check_sign_sgd,
    "01.2": _check_lars,
    "01.3": _check_constraint,
    "01.4": _check_iterations,
}
