"""What the checks of several chapters ask of an answer first."""

import inspect
import math
from collections.abc import Callable, Collection, Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf


def takes(function: Any, arguments: int) -> bool:
    """Whether something can be called with so many positional arguments.

    Args:
        function: anything.
        arguments: how many.
    """
    try:
        inspect.signature(function).bind(*[None] * arguments)
    except (TypeError, ValueError):
        return False
    return True


def number(value: Any) -> float | None:
    """The value as a float, or ``None`` if it is not one finite number. An array of one number is a number, too.

    Args:
        value: anything.
    """
    if isinstance(value, (list, tuple)):
        return None
    try:
        array = np.asarray(value)
        found = math.nan if array.size != 1 or array.dtype.kind in "bcmMSU" else float(array.reshape(())[()])
    except (TypeError, ValueError, OverflowError):
        return None
    return found if math.isfinite(found) else None


def whole(value: Any) -> int | None:
    """The value as an int, or ``None`` if it is not one whole number.

    Args:
        value: anything.
    """
    found = number(value)
    return None if found is None or found != round(found) else round(found)


def truth(value: Any) -> bool | None:
    """The value as a bool, or ``None`` if it is not one truth value.

    Args:
        value: anything.
    """
    array = None if isinstance(value, (list, tuple)) else np.asarray(value)
    return bool(array) if array is not None and array.size == 1 and array.dtype.kind == "b" else None


def entries(value: Any) -> list[Any] | None:
    """The entries of a list, a tuple or an array of one dimension, or ``None`` if it is none of them.

    Args:
        value: anything.
    """
    is_row = isinstance(value, (list, tuple)) or (getattr(value, "ndim", 0) == 1 and hasattr(value, "__iter__"))
    return list(value) if is_row else None


def several(value: Any, count: int) -> list[Any] | None:
    """The parts of a list, a tuple or an array, or ``None`` if it is none of them or has not so many.

    Args:
        value: anything.
        count: how many.
    """
    is_row = isinstance(value, (list, tuple)) or (getattr(value, "ndim", 0) > 0 and hasattr(value, "__iter__"))
    return list(value) if is_row and len(value) == count else None


def not_a_choice(answer: Any, keys: Collection[str], choices: Sequence[str]) -> str | None:
    """A hint if something is not a dictionary with these keys, each value one of the choices.

    Args:
        answer: anything.
        keys: the keys that it must have.
        choices: what a value may be.
    """
    if not isinstance(answer, dict) or set(answer) != set(keys):
        return f"the answer is a dictionary with the keys {', '.join(map(repr, keys))}."
    if not all(isinstance(value, str) and value in choices for value in answer.values()):
        return f"each value is one of {', '.join(map(repr, choices))}."
    return None


def not_an_optimizer(answer: Any) -> str | None:
    """A hint if something is not a class of optimizers.

    Args:
        answer: anything.
    """
    if isinstance(answer, keras.optimizers.Optimizer):
        return "hand over the class itself, without parentheses."
    if not (inspect.isclass(answer) and issubclass(answer, keras.optimizers.Optimizer)):
        return "the answer is a class derived from keras.optimizers.Optimizer."
    return None


def in_a_function(step: Callable[[], Any]) -> str | None:
    """A hint if what is right when called directly raises when TensorFlow traces it, as Keras's ``fit`` does.

    Args:
        step: calls a reader's code on tensors.
    """
    try:
        tf.function(step, autograph=False)()
    except Exception as error:
        return (
            f"right when called directly, but in a compiled `fit` it raises {type(error).__name__}: there a tensor has "
            "no value yet, which `if`, len(), int(), float() and NumPy ask for. Use operations on tensors."
        )
    return None


def in_fit(optimizer: keras.optimizers.Optimizer) -> str | None:
    """The same for one step of an optimizer that has made none.

    Args:
        optimizer: an instance of a reader's class.
    """
    weight = keras.Variable([1.0, 2.0], dtype=keras.config.floatx())
    optimizer.name = "answer"  # Keras makes a scope of it, which a class with a leading underscore would spoil
    optimizer.build([weight])
    return in_a_function(lambda: optimizer.apply([keras.ops.ones_like(weight)], [weight]))


def first_wrong(wrong: Sequence[int], hints: Sequence[str]) -> str | None:
    """A hint on the first of the entries that are off, or ``None`` if none is.

    Args:
        wrong: the places of those that are off.
        hints: one for each place.
    """
    if not wrong:
        return None
    verb = "is" if len(wrong) == 1 else "are"
    return f"{len(wrong)} of {len(hints)} {verb} off. Look at {'ABCDEF'[wrong[0]]}: {hints[wrong[0]]}"
