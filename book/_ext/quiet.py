"""Imports the package before its documentation is read, without what TensorFlow writes about the machine.

TensorFlow writes to the process's standard error before it has a level of logging to obey. The import is done once,
only where a page is read anew, and what was written is shown if it fails.
"""

import contextlib
import os
import sys
import tempfile
from collections.abc import Iterator
from typing import Any


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Holds back what the process writes to its standard error, until something fails."""
    sys.stderr.flush()
    kept = os.dup(2)
    with tempfile.TemporaryFile() as held:
        os.dup2(held.fileno(), 2)
        try:
            yield
        except BaseException:
            held.seek(0)
            os.write(kept, held.read())
            raise
        finally:
            sys.stderr.flush()
            os.dup2(kept, 2)
            os.close(kept)


def _import_the_package(app: Any, env: Any, docnames: list[str]) -> None:
    if docnames:
        with quiet():
            import tensorflow as tf

            import companion

            dir(companion)
            tf.constant(0)  # the first tensor looks for devices, and says what it misses


def setup(app: Any) -> dict[str, bool]:
    """Registers the extension with Sphinx."""
    app.connect("env-before-read-docs", _import_the_package)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
