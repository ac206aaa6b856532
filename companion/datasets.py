"""Real data that is already on the reader's disk, so that a notebook downloads nothing. Every chapter trains on it."""

from typing import NamedTuple

import numpy as np


class Digits(NamedTuple):
    """The digits, split for training and for testing."""

    x_train: np.ndarray
    """Images for training, shape ``(1440, 64)``, pixels in [0, 1]."""
    y_train: np.ndarray
    """Their labels, shape ``(1440,)``, integers from 0 to 9."""
    x_test: np.ndarray
    """Images for testing, shape ``(357, 64)``."""
    y_test: np.ndarray
    """Their labels, shape ``(357,)``."""


def digits(dtype: str = "float32") -> Digits:
    """Loads the handwritten digits that come inside scikit-learn: 8 × 8 pixels, 1,797 images, shuffled once.

    Args:
        dtype: the floating type of the images. Defaults to ``"float32"``.

    Returns:
        A :class:`Digits` tuple of 1,440 images for training and 357 for testing, always the same ones.

    Raises:
        ModuleNotFoundError: scikit-learn is not installed; the message says how to install it.

    Example:
        >>> data = digits()
        >>> data.x_train.shape, data.y_test.shape, float(data.x_train.max())
        ((1440, 64), (357,), 1.0)

    References:
        Alpaydin and Kaynak, 1998, "Optical recognition of handwritten digits", UCI machine learning repository.

    Used from chapter 01 on, :doc:`/notebooks/01_what_is_an_optimizer`.
    """
    try:
        from sklearn.datasets import load_digits
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "`companion.datasets.digits` reads the data inside scikit-learn: pip install scikit-learn"
        ) from error
    images, labels = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(images))
    images, labels = (images[order] / 16).astype(dtype), labels[order].astype("int64")
    return Digits(images[:1440], labels[:1440], images[1440:], labels[1440:])
