"""The dtype in which a test computes. Keras is imported late: pytest's first process reads this and runs no test."""

from collections.abc import Iterator

import pytest


def set_dtype(dtype: str) -> None:
    """What Keras makes from here on has this dtype."""
    import keras

    keras.config.set_floatx(dtype)
    keras.config.set_dtype_policy(dtype)


@pytest.fixture
def dtype_put_back() -> Iterator[None]:
    """Puts back what a test may change for the whole process."""
    import keras

    floatx, policy = keras.config.floatx(), keras.config.dtype_policy()
    yield
    keras.config.set_floatx(floatx)
    keras.config.set_dtype_policy(policy)


@pytest.fixture
def float64(dtype_put_back: None) -> None:
    """Computes in float64: ``pytestmark = pytest.mark.usefixtures("float64")``."""
    set_dtype("float64")
