"""Checks for the answers that readers write: right, or a hint. One module for each chapter holds the checks.

A check is a function of the answer that returns a hint, or ``None`` if the answer is right.
"""

import importlib
import importlib.util
import inspect
import re
import textwrap
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import keras
import numpy as np


@dataclass(frozen=True)
class Verdict:
    """What :func:`check` found. A notebook shows its message.

    Attributes:
        correct: whether the answer is right.
        message: what a reader sees.
    """

    correct: bool
    message: str

    def __repr__(self) -> str:
        return textwrap.fill(self.message, width=80)


def check(number: str, *answer: Any) -> Verdict:
    """Checks the answer to one exercise.

    Args:
        number: chapter and exercise, such as ``"01.2"``.
        *answer: what the exercise asks for; ``...`` stands for not answered yet.

    Returns:
        A :class:`Verdict`. A wrong answer gets a hint; an answer that raises gets the exception's name, the line of the
        notebook, and what was said; and more or fewer answers than the exercise asks for are counted.

    Raises:
        ValueError: there is no exercise of that number.

    Example:
        >>> check("01.4", ...)
        Exercise 01.4: not answered yet.
    """
    checks = checks_of(number.partition(".")[0]) if isinstance(number, str) else {}
    if not isinstance(number, str) or number not in checks:
        raise ValueError(f"`number` must be that of an exercise, such as '01.2'. Received: number={number!r}")
    if any(part is ... for part in answer):
        return Verdict(False, f"Exercise {number}: not answered yet.")
    asked = list(inspect.signature(checks[number]).parameters)
    if len(answer) != len(asked):
        one = len(asked) == 1
        names = "" if one else f" ({', '.join(asked)})"
        return Verdict(
            False,
            f"Exercise {number}: it asks for {len(asked)} answer{'' if one else 's'}{names}, and {len(answer)} "
            f"{'was' if len(answer) == 1 else 'were'} given: check({number!r}, {', '.join(asked)}).",
        )
    try:  # a keras.Variable can be read, but not gone through to its end
        hint = checks[number](*(np.array(part) if isinstance(part, keras.Variable) else part for part in answer))
    except Exception as error:  # the answer is a reader's code: whatever it raises becomes a hint
        hint = f"your code raised {type(error).__name__}{_where(error)}: {_said(error)}"
    if hint is None:
        return Verdict(True, f"Exercise {number}: right.")
    return Verdict(False, f"Exercise {number}: not yet. Hint: {hint}")


def _where(error: Exception) -> str:
    """The last line of a notebook's cell on the way to an error, if there is one."""
    frames = traceback.extract_tb(error.__traceback__)
    lines = [frame.line for frame in frames if re.search(r"^<ipython-input|ipykernel_", frame.filename) and frame.line]
    return f", in `{textwrap.shorten(lines[-1], 80, placeholder=' …')}`" if lines else ""


def _said(error: Exception) -> str:
    """The one line of an error's message that says what was wrong."""
    message = str(error).strip()
    if bold := re.search("\x1b\\[1m(.*?)\x1b", message, re.DOTALL):  # so Keras marks it, between two lists
        message = bold[1].strip()
    lines = message.splitlines() or [""]
    return (lines[-1] if lines[0] == "in user code:" else lines[0]).strip()  # there a traceback comes first


def checks_of(chapter: str) -> dict[str, Callable[..., str | None]]:
    """The checks of one chapter, by exercise number.

    Args:
        chapter: two digits, such as ``"01"``.

    Returns:
        A dictionary from numbers such as ``"01.2"`` to functions of the answer; empty if there is no such chapter.
    """
    if importlib.util.find_spec(f"{__name__}.chapter_{chapter}") is None:
        return {}
    checks: dict[str, Callable[..., str | None]] = importlib.import_module(f"{__name__}.chapter_{chapter}").CHECKS
    return checks
