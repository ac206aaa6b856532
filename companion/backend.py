"""Which Keras the package works with."""

import keras


def environment() -> None:
    """Raises where Keras is another one than the package works with.

    Raises:
        RuntimeError: Keras runs on another backend than TensorFlow, or is older than 3.13.
    """
    if keras.backend.backend() != "tensorflow":
        raise RuntimeError(
            "This part of `companion` works on TensorFlow only: set KERAS_BACKEND=tensorflow before Keras is imported. "
            f"Received: backend={keras.backend.backend()!r}"
        )
    if tuple(int(number) for number in keras.__version__.split(".")[:2]) < (3, 13):
        raise RuntimeError(
            "`companion` needs Keras 3.13 or later: install it with pip install 'keras>=3.13'. Received: "
            f"keras.__version__={keras.__version__!r}"
        )
