"""What is slow to make is made once a run, by the first of pytest's processes that asks; the others wait for it."""

import fcntl
import functools
import hashlib
import os
import pathlib
import pickle
from collections.abc import Callable
from typing import Any


def folder() -> pathlib.Path:
    """A folder that the processes of this run share, and no other run; the root's conftest.py makes and removes it."""
    return pathlib.Path(os.environ["COMPANION_TESTS_SHARE"])


def once_a_run(function: Callable[..., Any]) -> Callable[..., Any]:
    """Like ``functools.cache``, over all processes of a run; what a function returns must be picklable."""

    @functools.cache
    @functools.wraps(function)
    def shared(*arguments: Any) -> Any:
        name = f"{function.__module__}.{function.__qualname__}.{hashlib.sha256(repr(arguments).encode()).hexdigest()}"
        stored = folder() / f"{name}.pickle"
        with (folder() / f"{name}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not stored.exists():
                made = function(*arguments)
                unfinished = stored.with_suffix(".unfinished")
                unfinished.write_bytes(pickle.dumps(made))
                unfinished.rename(stored)
            return pickle.loads(stored.read_bytes())

    return shared
