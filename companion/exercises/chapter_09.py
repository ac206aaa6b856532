"""Checks for the exercises of chapter 09: a Heun step, SAM, what an injection survives, the number of passes."""

from typing import Any

import keras
import numpy as np

import companion
from companion.exercises.answers import number as _number

# ---- 1 --------------------------------------------------------------------------------------------------------------


def _step(answer: Any) -> str | None:
    number = _number(answer)
    if number is None:
        return "give a number: the weight after one step."
    if abs(number - 1) < 1e-5:
        return None
    hints = {
        -1.0: "that is where gradient descent goes, which is only the probe. Ask there, take the mean of both.",
        3.0: "that is a step with the second answer alone. Heun takes the mean of both.",
        0.0: "0 is the mean of the two answers. Where does the weight end?",
    }
    near = [hint for value, hint in hints.items() if abs(number - value) < 1e-5]
    return near[0] if near else "the first answer is λθ = 4. The probe is at θ − h times that. Ask there, too."


# ---- 2 --------------------------------------------------------------------------------------------------------------

_CURVATURES = (np.array([[1.0], [2.0]]), np.array([3.0]))


class _Bowl(keras.layers.Layer):
    """A loss with known gradients: half the curvature times the squared weight, for each of two tensors."""

    def build(self, shape: Any) -> None:
        starts = [np.array([[2.0], [-1.0]]), np.array([0.5])]
        self.points = [
            self.add_weight(shape=start.shape, initializer=keras.initializers.Constant(start)) for start in starts
        ]

    def call(self, inputs: Any) -> Any:
        for point, curvature in zip(self.points, _CURVATURES, strict=True):
            self.add_loss(keras.ops.sum(curvature.astype("float32") * point**2) / 2)
        return inputs


def _after_step(optimizer: Any, start: float = 1.0) -> list[np.ndarray]:
    """The weights after one injected step."""
    model = keras.Sequential([keras.Input((1,), dtype="float32"), _Bowl(dtype="float32")])
    for variable in model.trainable_variables:
        variable.assign(variable * start)
    model.compile(optimizer)
    companion.inject(model)
    model.train_on_batch(np.zeros((1, 1)))
    return [variable.numpy().astype(float) for variable in model.trainable_variables]


def _expected(rho: float, h: float, norm: str = "all") -> list[np.ndarray]:
    starts = [np.array([[2.0], [-1.0]]), np.array([0.5])]
    slopes = [c * s for c, s in zip(_CURVATURES, starts, strict=True)]
    whole = np.sqrt(sum((k**2).sum() for k in slopes))
    norms = [{"all": whole, "each": np.sqrt((k**2).sum()), "none": 1.0, "square": whole**2}[norm] for k in slopes]
    far = [s + rho * k / n for s, k, n in zip(starts, slopes, norms, strict=True)]
    return [s - h * c * f for s, c, f in zip(starts, _CURVATURES, far, strict=True)]


def _sam(answer: Any) -> str | None:
    if not (isinstance(answer, type) and issubclass(answer, companion.InjectedOptimizer)):
        return "give the class itself, a subclass of companion.InjectedOptimizer."
    h, rho = 0.1, 0.5
    try:
        optimizer = answer(h, rho=rho)
    except TypeError:
        return "the class must be called as SAM(learning_rate, rho=...)."
    found = _after_step(optimizer)

    def same(expected: list[np.ndarray]) -> bool:
        return all(np.allclose(f, e, atol=1e-5) for f, e in zip(found, expected, strict=True))

    if same(_expected(0.0, h)):
        return "this is gradient descent: return the second answer, the one from θ + ρ g / ‖g‖."
    if same(_expected(-rho, h)):
        return "you look where the loss is lower. SAM looks where it is higher: θ plus, not minus."
    if same(_expected(rho, h, "each")):
        return "each tensor has a norm of its own here. ‖g‖ is one number: the root of the sum over all tensors."
    if same(_expected(rho, h, "none")):
        return "g is not divided by its norm, so that you look further away where the slope is steeper."
    if same(_expected(rho, h, "square")):
        return "g is divided by the square of its norm: the root is missing."
    if same(_expected(0.05, h)):
        return "that is right for rho=0.05, but rho was 0.5 here: use what `__init__` received."
    if not same(_expected(rho, h)):
        return "the step is not −h ∇L(θ + ρ g / ‖g‖). Print `values` and `oracle(values)`, and do one step by hand."
    if not all(np.isfinite(point).all() for point in _after_step(answer(h, rho=rho), start=0.0)):
        return "right, but a gradient of zero makes it NaN. `keras.ops.divide_no_nan` gives 0 there."
    if not all(np.allclose(*pair, atol=1e-6) for pair in zip(_after_step(answer(h)), _expected(0.05, h), strict=True)):
        return "right with rho=0.5. But without the argument rho must be 0.05."
    if optimizer.get_config().get("rho") != rho:
        return "it steps rightly, but a file would forget rho: add it to what super().get_config() returns."
    return None


# ---- 3 --------------------------------------------------------------------------------------------------------------


def _survivors(answer: Any) -> str | None:
    try:
        letters = {str(letter).strip().lower() for letter in answer} - {"", ","}
    except TypeError:
        letters = {""}
    if not letters <= set("abcd"):
        return 'give the letters of those that can call `fit`, such as "abcd".'
    hints = (
        ("b" in letters, "b: a clone is a new object. Does the configuration it is made from know of the injection?"),
        ("c" in letters, "c: a file holds the configuration, the weights and the optimizer. Is the step among them?"),
        ("a" not in letters, "a: compiling again replaces the optimizer. Does it replace the step of the model?"),
        ("d" not in letters, "d: loading weights changes numbers. Is it still the same object, with the same step?"),
    )
    return next((hint for applies, hint in hints if applies), None)


# ---- 4 --------------------------------------------------------------------------------------------------------------


def _passes(answer: Any) -> str | None:
    number = _number(answer)
    if number is None:
        return "give an integer."
    hints = {
        12 * 4: "those are the questions. Each is put to eight parts of the batch.",
        12 * 8: "that would be for a method that asks once. RK4 asks four times.",
        11 * 4 * 8: "the last batch is smaller than the others, but it is a batch: round up.",
        1440 * 4 * 8 // 128: "the last batch is smaller than the others, but has as many parts: round up.",
        12 * 4 * 8 * 2: "forward and backward together are one pass here.",
    }
    if number == 12 * 4 * 8:
        return None
    return hints.get(int(number), "multiply: batches in the epoch, questions for each batch, parts for each question.")


CHECKS = {"09.1": _step, "09.2": _sam, "09.3": _survivors, "09.4": _passes}
