"""Cases that must fail: the suite proves that it can tell right from wrong."""

from collections.abc import Callable, Iterable
from typing import Any

import pytest


def wrong(*values: Any, why: str, raises: Any = AssertionError, id: str | None = None) -> Any:
    """The values of a known-wrong variant: the test must fail for it, and not by an accident."""
    return pytest.param(*values, marks=pytest.mark.xfail(strict=True, raises=raises, reason=why), id=id)


def who(
    argument: str, *right: Callable[..., Any], wrong: tuple[Callable[..., Any], ...] = (), raises: Any = AssertionError
) -> Any:
    """Runs a test with each one in turn; those that are wrong must fail it, and not by an accident."""
    mark = pytest.mark.xfail(strict=True, raises=raises)
    failing = [pytest.param(one, marks=mark) for one in wrong]
    return pytest.mark.parametrize(argument, [*right, *failing])


def thinned(cases: Iterable[Any], *kept: Any) -> list[Any]:
    """The cases of a matrix; those that are not kept, each named by its first value, run with ``--slow``."""
    found = []
    for case in cases:
        is_set = isinstance(case, type(pytest.param()))
        values, name, marks = (case.values, case.id, case.marks) if is_set else ((case,), None, ())
        slow = () if values[0] in kept else (pytest.mark.slow,)
        found.append(pytest.param(*values, id=name, marks=(*marks, *slow)))
    missing = set(kept) - {case.values[0] for case in found}
    assert not missing, f"not among the cases: {missing}"
    return found
