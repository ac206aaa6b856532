"""Holds `companion.datasets`: the digits are scikit-learn's, whole, shuffled once, and the same for every reader."""

import sys
import zlib

import numpy as np
import pytest
from sklearn.datasets import load_digits

from companion import datasets


def test_shapes_and_ranges() -> None:
    data = datasets.digits()
    assert [array.shape for array in data] == [(1440, 64), (1440,), (357, 64), (357,)]
    assert [array.dtype for array in data] == ["float32", "int64", "float32", "int64"]
    assert (data.x_train.min(), data.x_train.max()) == (0, 1)
    assert set(data.y_train) == set(data.y_test) == set(range(10))


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_every_image_of_the_source_once_with_its_label(dtype: str) -> None:
    data = datasets.digits(dtype)
    assert data.x_train.dtype == data.x_test.dtype == dtype
    found = np.column_stack([np.concatenate([data.x_train, data.x_test]), np.concatenate([data.y_train, data.y_test])])
    images, labels = load_digits(return_X_y=True)
    expected = np.column_stack([images / 16, labels])
    assert not np.array_equal(found, expected)
    np.testing.assert_array_equal(found[np.lexsort(found.T)], expected[np.lexsort(expected.T)])


def test_the_same_split_for_every_reader() -> None:
    data = datasets.digits()
    assert [zlib.crc32(array.astype("uint8").tobytes()) for array in (data.y_train, data.y_test)] == [
        1248838851,
        1163825279,
    ]
    assert zlib.crc32((data.x_train * 16).astype("uint8").tobytes()) == 3969449489


def test_a_reader_who_writes_into_the_data_hurts_nobody() -> None:
    before = np.random.get_state()[1].copy()  # noqa: NPY002
    datasets.digits().x_train[:] = -1
    assert datasets.digits().x_train.min() == 0
    np.testing.assert_array_equal(np.random.get_state()[1], before)  # noqa: NPY002


def test_without_scikit_learn_the_message_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(ModuleNotFoundError, match=r"companion\.datasets\.digits.*pip install scikit-learn") as caught:
        datasets.digits()
    assert isinstance(caught.value.__cause__, ModuleNotFoundError)
