"""What the checks of several chapters ask of an answer first."""

import inspect
import math
from typing import Any


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
    """The value as a float, or ``None`` if it is not one finite number.

    Args:
        value: anything.
    """
    try:
        found = math.nan if isinstance(value, (bool, str)) else float(value)
    except (TypeError, ValueError):
        return None
    return found if math.isfinite(found) else None
