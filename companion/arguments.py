"""What an argument may be. One wording for every wrong one: its name in backticks, what it must be, what it was."""

import math
from typing import Any

import numpy as np


def integer(name: str, value: Any, least: int) -> int:
    """Returns ``value`` as an int, or raises.

    Args:
        name: the argument's name.
        value: what was given: a Python or NumPy integer is right, a bool is not.
        least: the smallest that is allowed.

    Raises:
        ValueError: it is not an integer, or less.
    """
    if isinstance(value, (bool, np.bool_)) or not isinstance(value, (int, np.integer)) or value < least:
        raise ValueError(f"`{name}` must be an integer of at least {least}. Received: {name}={value!r}")
    return int(value)


def number(name: str, value: Any, low: float, high: float = math.inf, include_low: bool = True) -> float:
    """Returns ``value`` as a float, or raises.

    Args:
        name: the argument's name.
        value: what was given.
        low: the left end of its interval.
        high: the right end, which it does not hold. Defaults to infinity.
        include_low: whether the interval holds its left end. Defaults to ``True``.

    Raises:
        ValueError: it is not a number, or outside.
    """
    try:
        number = math.nan if isinstance(value, (bool, np.bool_, str, bytes)) else float(value)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if (low <= number if include_low else low < number) and number < high:
        return number
    raise ValueError(
        f"`{name}` must be a number in {'[' if include_low else '('}{low:g}, {high:g}). Received: {name}={value!r}"
    )


def learning_rate(value: Any) -> Any:
    """Returns a learning rate: a constant checked, schedules and callables as they are, for Keras to handle.

    Args:
        value: what was given.

    Raises:
        ValueError: it is negative, not finite, or not a number; or a variable, which would be read this once only.
    """
    if hasattr(value, "assign") and not callable(value):
        raise ValueError(
            "`learning_rate` must be a number, a schedule or a callable. To follow a variable, give "
            f"`lambda: variable`. Received: learning_rate={value!r}"
        )
    return value if callable(value) else number("learning_rate", value, 0)


def weight_decay(value: Any) -> Any:
    """Returns a weight decay: ``None``, or a number checked, of a kind that TensorFlow does not round to float32.

    Args:
        value: what was given.

    Raises:
        ValueError: it is negative, not finite, or not a number.
    """
    return None if value is None else np.float64(number("weight_decay", value, 0))


def choice(name: str, value: Any, choices: tuple[str, ...]) -> str:
    """Returns ``value``, or raises if it is none of the choices.

    Args:
        name: the argument's name.
        value: what was given.
        choices: what is allowed.

    Raises:
        ValueError: it is something else.
    """
    if value not in choices:
        raise ValueError(f"`{name}` must be one of {choices}. Received: {name}={value!r}")
    return value
