"""Checks for the answers that readers write: right, or a hint. One module for each chapter holds the checks.

A check is a function of the answer that returns a hint, or ``None`` if the answer is right.
"""

import importlib
import pkgutil
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


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
        return self.message


def check(number: str, *answer: Any) -> Verdict:
    """Checks the answer to one exercise.

    Args:
        number: chapter and exercise, such as ``"01.2"``.
        *answer: what the exercise asks for; ``...`` stands for not answered yet.

    Returns:
        A :class:`Verdict`. A wrong answer gets a hint; an answer that raises gets the exception's name and a hint.

    Raises:
        ValueError: there is no exercise of that number.

    Example:
        >>> check("01.4", ...)
        Exercise 01.4: not answered yet.
    """
    checks = all_checks()
    if number not in checks:
        raise ValueError(f"`number` must be one of {', '.join(checks)}. Received: number={number!r}")
    if any(part is ... for part in answer):
        return Verdict(False, f"Exercise {number}: not answered yet.")
    try:
        hint = checks[number](*answer)
    except Exception as error:  # the answer is a reader's code: whatever it raises becomes a hint
        hint = f"your code raised {type(error).__name__}: {str(error).strip().splitlines()[0] if str(error) else ''}"
    if hint is None:
        return Verdict(True, f"Exercise {number}: right.")
    return Verdict(False, f"Exercise {number}: not yet. Hint: {hint}")


def all_checks() -> dict[str, Callable[..., str | None]]:
    """The checks of every chapter, by exercise number.

    Returns:
        A dictionary from numbers such as ``"01.2"`` to functions of the answer.
    """
    chapters = [importlib.import_module(f"{__name__}.{found.name}") for found in pkgutil.iter_modules(__path__)]
    return {number: function for chapter in chapters for number, function in chapter.CHECKS.items()}
