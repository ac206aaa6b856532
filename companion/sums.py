"""Sums of gradients over micro-batches, one for each variable. What a sparse gradient costs is its rows.

Each replica keeps sums of its own, in variables that are local to it. Such variables have no method for scattering, so
the raw operations stand here. ``companion.accumulation`` decides when a sum is added to, read and cleared.
"""

from typing import Any

import keras
import numpy as np
import tensorflow as tf


class GradientSums:
    r"""For each variable the sum :math:`A = \sum_i w_i g_i` on this replica.

    Args:
        variables: the Keras variables that the gradients are of.
        dtype: ``"float32"`` or ``"float64"``; a sum has the wider of this and its variable's dtype.

    Attributes:
        accumulators: a Keras variable for each sum.
        touched: a Keras variable with a number for each row of each variable: 0 where the sum is zero.
        sparse: the indices of the variables whose gradients are sparse. To be set before their first gradient.
    """

    def __init__(self, variables: list[Any], dtype: str) -> None:
        rows = [int(variable.shape[0]) if len(variable.shape) else 1 for variable in variables]
        self._first_rows = tuple(np.cumsum([0, *rows]).tolist())
        self.accumulators = [
            _local_variable(f"accumulator_{index}", variable.shape, dtype, variable.dtype)
            for index, variable in enumerate(variables)
        ]
        self.touched = _local_variable("touched", self._first_rows[-1:], "float32")
        self.sparse: frozenset[int] = frozenset()

    def terms(self, subset: tuple[int, ...], gradients: list[Any], weight: Any) -> list[Any]:
        """What would be added.

        Args:
            subset: the indices of the variables.
            gradients: a gradient for each of them.
            weight: :math:`w_i`, a scalar tensor, or ``None`` for 1.

        Returns:
            The numbers of each gradient times the weight, in the dtype of its sum: all, or the rows of a sparse one.
        """
        return [self._term(index, gradient, weight) for index, gradient in zip(subset, gradients, strict=True)]

    def _term(self, index: int, gradient: Any, weight: Any) -> Any:
        values = gradient.values if isinstance(gradient, tf.IndexedSlices) else gradient
        values = tf.cast(values, self.accumulators[index].dtype)
        return values if weight is None else tf.math.multiply_no_nan(values, tf.cast(weight, values.dtype))

    def add(self, subset: tuple[int, ...], gradients: list[Any], weight: Any) -> None:
        """Adds the gradients of a micro-batch; the arguments are those of :meth:`terms`."""
        for index, gradient in zip(subset, gradients, strict=True):
            accumulator, values = self.accumulators[index].value, self._term(index, gradient, weight)
            if isinstance(gradient, tf.IndexedSlices):
                tf.raw_ops.ResourceScatterAdd(resource=accumulator.handle, indices=gradient.indices, updates=values)
                self._touch(index, gradient.indices, 1.0)
            else:
                accumulator.assign_add(values)
                if index in self.sparse:
                    self._touch(index, tf.range(accumulator.shape[0]), 1.0)

    def read(self, subset: tuple[int, ...], gradients: list[Any] | None = None, weight: Any = None) -> list[Any]:
        """The sums, with the gradients of a last micro-batch; the arguments are those of :meth:`terms`.

        A sum of sparse gradients is a ``tf.IndexedSlices`` of the rows that were touched.
        """
        last = dict(zip(subset, gradients or (), strict=False))
        # A dense one is added on the way: to write it would be to read it once and clear it.
        written = tuple(index for index in last if index in self.sparse or isinstance(last[index], tf.IndexedSlices))
        self.add(written, [last.pop(index) for index in written], weight)
        return [self._read(i) + self._term(i, last[i], weight) if i in last else self._read(i) for i in subset]

    def _read(self, index: int) -> Any:
        accumulator = self.accumulators[index].value
        if index not in self.sparse:
            return tf.convert_to_tensor(accumulator)
        rows = self._touched_rows(index)
        values = tf.raw_ops.ResourceGather(resource=accumulator.handle, indices=rows, dtype=accumulator.dtype)
        return tf.IndexedSlices(values, rows, tf.constant(accumulator.shape.as_list(), "int64"))

    def clear(self, subset: tuple[int, ...]) -> None:
        """Sets the sums of the variables with these indices to zero."""
        for index in subset:
            accumulator = self.accumulators[index].value
            if index in self.sparse:
                rows = self._touched_rows(index)
                zeros = tf.zeros([tf.size(rows), *accumulator.shape[1:]], accumulator.dtype)
                tf.raw_ops.ResourceScatterUpdate(resource=accumulator.handle, indices=rows, updates=zeros)
                self._touch(index, rows, 0.0)
            else:
                accumulator.assign(tf.zeros(accumulator.shape, accumulator.dtype))

    def _touch(self, index: int, rows: Any, mark: float) -> None:
        places = rows + tf.constant(self._first_rows[index], rows.dtype)
        marks = tf.fill(tf.shape(rows), mark)
        tf.raw_ops.ResourceScatterUpdate(resource=self.touched.value.handle, indices=places, updates=marks)

    def _touched_rows(self, index: int) -> Any:
        touched = tf.convert_to_tensor(self.touched.value)
        return tf.where(touched[self._first_rows[index] : self._first_rows[index + 1]] > 0)[:, 0]


def _local_variable(name: str, shape: Any, *dtypes: Any) -> keras.Variable:
    """Zeros that each replica changes for itself and that are saved as their sum, in a dtype for sums."""
    wide = "float64" in [keras.backend.standardize_dtype(dtype) for dtype in dtypes]
    return keras.Variable(
        "zeros",
        shape=tuple(shape),
        dtype="float64" if wide else "float32",
        trainable=False,
        aggregation="sum",
        synchronization="on_read",
        name=name,
    )
