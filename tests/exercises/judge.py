"""The two tests that the exercises of a chapter have in common."""

from collections.abc import Callable
from typing import Any

import pytest

from companion import exercises


def judged(right: list[Any], wrong: list[Any], unpack: bool = False) -> tuple[Callable[..., None], Callable[..., None]]:
    """Tests that right answers are right and that wrong ones get a hint with these words.

    ``right`` holds pairs of number and answer, ``wrong`` triples with words of the hint. With ``unpack`` an answer is a
    tuple of what the exercise asks for.
    """

    @pytest.mark.parametrize(("number", "answer"), right)
    def test_right(number: str, answer: Any) -> None:
        verdict = exercises.check(number, *(answer if unpack else [answer]))
        assert verdict.correct, verdict

    @pytest.mark.parametrize(("number", "answer", "words"), wrong)
    def test_wrong(number: str, answer: Any, words: str) -> None:
        verdict = exercises.check(number, *(answer if unpack else [answer]))
        assert not verdict.correct, verdict
        assert words in verdict.message, verdict

    return test_right, test_wrong
