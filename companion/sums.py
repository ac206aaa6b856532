"""What a window of micro-batches holds: how many have come, and the sums of their gradients.

Each replica keeps sums of its own, in variables that are local to it. Such variables have no method for scattering, so
the raw operations stand here; what a sparse gradient costs is its rows. ``companion.accumulation`` decides when a
window is added to, read and ended.
"""

import functools
import zlib
from collections.abc import Callable
from typing import Any, NamedTuple

import keras
import numpy as np
import tensorflow as tf

from companion.gradients import all_finite, values_of, with_values

_SUBSETS = 256  # places for the counts of different subsets
_KEY = 2.0**20  # a count, below this, stands behind the key of its subset


class MicroBatch(NamedTuple):
    """What one call of ``apply`` brings; without gradients, whose sums are meant."""

    subset: tuple[int, ...]  # the indices of the variables, in order
    gradients: tuple[Any, ...] = ()  # one for each of them
    weight: Any = None  # w_i, a scalar tensor, or None for 1


def fitting_weight(weight: Any) -> Any:
    """Returns the weight of a micro-batch as a scalar float64 tensor, in which a negative one is NaN.

    Args:
        weight: what was given.

    Raises:
        ValueError: there is none, it is not one number, or it is known to be negative.
    """
    if weight is None:
        raise ValueError(
            '`normalize="weight"` needs the denominator of each loss, which the training step supplies: call '
            "companion.inject(model) after compile, or apply(grads, variables, weight=...). Received: weight=None"
        )
    wrong = f"`weight` must be a number of at least 0. Received: weight={weight!r}"
    try:  # not by TensorFlow, which rounds a number of Python's to float32
        given = tf.convert_to_tensor(weight if hasattr(weight, "dtype") else np.asarray(weight))
    except (TypeError, ValueError):
        raise ValueError(wrong) from None
    if not (given.dtype.is_floating or given.dtype.is_integer or given.dtype.is_bool):
        raise ValueError(wrong)
    known = tf.get_static_value(given)
    if given.shape.num_elements() not in (1, None) or (known is not None and np.any(known < 0)):
        raise ValueError(wrong)
    scalar = tf.reshape(tf.cast(given, "float64"), ())
    return tf.where(scalar < 0, tf.constant(np.nan, "float64"), scalar)


class Windows:
    """For each variable what it has received since its last update; for each subset how often it has come.

    Args:
        add_variable: the optimizer's.
        variables: how many variables there are.

    Attributes:
        received: a Keras variable with two rows, the numbers of micro-batches and their weights :math:`W`.
        calls: a Keras variable with the counts of subsets, each behind a key, by which another process finds it.
        subsets: those that have come, and where their calls are counted. Where no place is left, some share one.
        known: the variables in them.
    """

    def __init__(self, add_variable: Callable[..., Any], variables: int) -> None:
        self.received = add_variable((2, variables), dtype="float64", name="window")
        self.calls = add_variable((_SUBSETS,), dtype="float64", name="calls")
        self.subsets: dict[tuple[int, ...], int] = {}
        self.known: set[int] = set()

    def note(self, subset: tuple[int, ...]) -> None:
        """Gives a subset that is new a place: the one that it had in another process, or a free one."""
        if subset in self.subsets:
            return
        self.known.update(subset)
        key, taken = _key_of(subset), self.subsets.values()
        # It cannot be read on replicas, nor where a compiled function has just made it.
        readable = tf.distribute.get_strategy().num_replicas_in_sync == 1
        with tf.init_scope():
            saved = self.calls.numpy() if readable and tf.executing_eagerly() else np.zeros(0)
            readable = saved.size == _SUBSETS
            counts, keys = (saved % _KEY, saved // _KEY * _KEY) if readable else np.zeros((2, _SUBSETS))
            places = [(int(key / _KEY) + step) % _SUBSETS for step in range(_SUBSETS)]
            place = min(places, key=lambda p: (p in taken, keys[p] != key, keys[p] > 0))
            if readable and place not in taken and keys[place] != key:
                saved[place] = key + (0 if keys[place] else counts[place])
                self.calls.assign(saved)
        self.subsets[subset] = place

    def fills(self, subset: tuple[int, ...], length: Any) -> Any:
        """Whether the next micro-batch of a subset is the last of its window: by what came, or by how often it came."""
        received = tf.reduce_min(of_subset(tf.convert_to_tensor(self.received)[0], subset))
        calls = tf.convert_to_tensor(self.calls)[self.subsets[subset]] % _KEY
        return tf.maximum(received, calls) >= length - 1.5  # rounded, and this one counts

    def counted(self, subset: tuple[int, ...], weight: Any) -> Any:
        """What ``received`` is after one more micro-batch."""
        added = self._mask(subset)
        if weight is not None:  # one that is NaN is NaN in its own windows only
            added = tf.math.multiply_no_nan(tf.stack([[1.0], [weight]]), added)
        return tf.convert_to_tensor(self.received) + added

    def count(self, subset: tuple[int, ...], weight: Any) -> None:
        """Counts a micro-batch."""
        if weight is None:
            self.received.assign_add(self._mask(subset))
        else:
            self.received.assign(self.counted(subset, weight))
        self.calls.assign_add(self._place(subset))

    def end(self, subset: tuple[int, ...]) -> None:
        """Begins the windows of a subset anew."""
        others = 1 - self._mask(subset)
        if others.any():
            others = tf.math.multiply_no_nan(tf.convert_to_tensor(self.received), others)
        self.received.assign(others)
        if subset in self.subsets:
            place = self._place(subset)
            self.calls.assign(tf.convert_to_tensor(self.calls) * (1 - place) + _key_of(subset) * place)

    def forget(self) -> None:
        """Forgets how often subsets have come."""
        calls = tf.convert_to_tensor(self.calls)
        self.calls.assign(calls - calls % _KEY)

    def _place(self, subset: tuple[int, ...]) -> np.ndarray:
        return np.eye(1, _SUBSETS, self.subsets[subset])[0]

    def _mask(self, subset: tuple[int, ...]) -> np.ndarray:
        return np.tile(np.isin(np.arange(self.received.shape[1]), subset).astype("float64"), (2, 1))


def _key_of(subset: tuple[int, ...]) -> float:
    return (1 + zlib.crc32(repr(subset).encode())) * _KEY


def of_subset(numbers: Any, subset: tuple[int, ...]) -> Any:
    """Those of numbers, one for each variable in the last axis, that belong to a subset.

    Args:
        numbers: a tensor.
        subset: indices of variables.
    """
    return numbers if len(subset) == numbers.shape[-1] else tf.gather(numbers, subset, axis=-1)


class GradientSums:
    r"""For each variable the sum :math:`A = \sum_i w_i g_i` on this replica.

    Args:
        variables: the Keras variables that the gradients are of.
        dtype: ``"float32"`` or ``"float64"``; a sum has the wider of this and its variable's dtype.

    Attributes:
        accumulators: a Keras variable for each sum.
        touched: a Keras variable with a number for each row of each variable, 0 where no sparse gradient has been, and
            then one for each variable, 0 where no dense one has been.
        sparse: the indices of the variables whose gradients are sparse. To be set before their first gradient.
    """

    def __init__(self, variables: list[Any], dtype: str) -> None:
        rows = [int(variable.shape[0]) if len(variable.shape) else 1 for variable in variables]
        self._first_rows = tuple(np.cumsum([0, *rows]).tolist())
        self.accumulators = [
            _local_variable(f"accumulator_{index}", variable.shape, dtype, variable.dtype)
            for index, variable in enumerate(variables)
        ]
        self.touched = _local_variable("touched", (self._first_rows[-1] + len(variables),), "float32")
        self.sparse: frozenset[int] = frozenset()

    def terms(self, batch: MicroBatch) -> list[Any]:
        """What a micro-batch would add: its gradients times its weight, of a sparse one the rows that it has."""
        return [self._term(index, gradient, batch.weight) for index, gradient in self._pairs(batch)]

    def _pairs(self, batch: MicroBatch) -> list[tuple[int, Any]]:
        return list(zip(batch.subset, batch.gradients, strict=True)) if batch.gradients else []

    def _term(self, index: int, gradient: Any, weight: Any) -> Any:
        values = tf.cast(values_of(gradient), self.accumulators[index].dtype)
        return values if weight is None else tf.math.multiply_no_nan(values, tf.cast(weight, values.dtype))

    def can_take(self, batch: MicroBatch) -> Any:
        """Whether all that a micro-batch would add is finite, and its weight is."""
        finite = all_finite(self.terms(batch))
        return finite if batch.weight is None else finite & tf.math.is_finite(batch.weight)

    def add(self, batch: MicroBatch) -> None:
        """Adds the gradients of a micro-batch."""
        for index, gradient in self._pairs(batch):
            accumulator, values = self.accumulators[index].value, self._term(index, gradient, batch.weight)
            if isinstance(gradient, tf.IndexedSlices):
                tf.raw_ops.ResourceScatterAdd(resource=accumulator.handle, indices=gradient.indices, updates=values)
                self._touch(gradient.indices + tf.constant(self._first_rows[index], gradient.indices.dtype), 1.0)
            else:
                accumulator.assign_add(values)
        dense = [self._first_rows[-1] + i for i, g in self._pairs(batch) if not isinstance(g, tf.IndexedSlices)]
        if dense:  # also where no sparse one has been: another process may begin with one
            self._touch(tf.constant(dense), 1.0)

    def read(self, batch: MicroBatch) -> list[Any]:
        """The sums of the batch's variables, with what the batch itself adds to them.

        A sum of sparse gradients is a ``tf.IndexedSlices`` of the rows that were touched.
        """
        last = dict(self._pairs(batch))
        # A dense one is added on the way: to write it would be to read it once and clear it.
        written = tuple(index for index in last if index in self.sparse or isinstance(last[index], tf.IndexedSlices))
        self.add(batch._replace(subset=written, gradients=tuple(last.pop(index) for index in written)))
        return [
            self._read(i) + self._term(i, last[i], batch.weight) if i in last else self._read(i) for i in batch.subset
        ]

    def _read(self, index: int) -> Any:
        accumulator = self.accumulators[index].value
        if index not in self.sparse:
            return tf.convert_to_tensor(accumulator)
        rows = self._touched_rows(index)
        values = tf.raw_ops.ResourceGather(resource=accumulator.handle, indices=rows, dtype=accumulator.dtype)
        return tf.IndexedSlices(values, rows, tf.constant(accumulator.shape.as_list(), "int64"))

    def means(self, sums: list[Any], weights: Any, variables: list[Any]) -> list[Any]:
        """Sums over weights (those of 0 are 1; ``None``: the sums themselves), in the dtypes of the variables."""
        weights = [1.0] * len(sums) if weights is None else tf.unstack(tf.where(weights > 0, weights, 1))

        def mean(weight: Any, variable: Any, values: Any) -> Any:
            return tf.cast(values / tf.cast(weight, values.dtype), keras.backend.standardize_dtype(variable.dtype))

        triples = zip(sums, weights, variables, strict=True)
        return [with_values(total, functools.partial(mean, weight, variable)) for total, weight, variable in triples]

    def clear(self, subset: tuple[int, ...]) -> None:
        """Sets the sums of the variables with these indices to zero."""
        for index in subset:
            accumulator = self.accumulators[index].value
            if index in self.sparse:
                rows = self._touched_rows(index)
                zeros = tf.zeros([tf.size(rows), *accumulator.shape[1:]], accumulator.dtype)
                tf.raw_ops.ResourceScatterUpdate(resource=accumulator.handle, indices=rows, updates=zeros)
                self._touch(rows + tf.constant(self._first_rows[index], rows.dtype), 0.0)
            else:
                accumulator.assign(tf.zeros(accumulator.shape, accumulator.dtype))
        self._touch(tf.constant([self._first_rows[-1] + index for index in subset]), 0.0)

    def _touch(self, places: Any, mark: float) -> None:
        marks = tf.fill(tf.shape(places), mark)
        tf.raw_ops.ResourceScatterUpdate(resource=self.touched.value.handle, indices=places, updates=marks)

    def _touched_rows(self, index: int) -> Any:
        touched = tf.convert_to_tensor(self.touched.value)
        rows = touched[self._first_rows[index] : self._first_rows[index + 1]] + touched[self._first_rows[-1] + index]
        return tf.where(rows > 0)[:, 0]


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
