"""What a gradient can be, and what is done with it: a tensor, rows of one as ``tf.IndexedSlices``, or ``None``."""

from collections.abc import Callable
from typing import Any

import keras
import numpy as np
import tensorflow as tf


def scaled(gradient: Any, factor: Any) -> Any:
    """Multiplies a gradient by a number.

    Args:
        gradient: a tensor, a ``tf.IndexedSlices``, or ``None``, which stays ``None``.
        factor: a number or a scalar tensor.

    Returns:
        A gradient of the same kind and dtype.
    """
    if gradient is None or (isinstance(factor, float) and factor == 1.0):
        return gradient
    return with_values(gradient, lambda values: values * tf.cast(factor, values.dtype))


def with_values(gradient: Any, function: Callable[[Any], Any]) -> Any:
    """Changes the numbers of a gradient, dense or sparse, and keeps its kind.

    Args:
        gradient: a tensor or a ``tf.IndexedSlices``.
        function: what its numbers become, of the same shape.
    """
    if isinstance(gradient, tf.IndexedSlices):
        return tf.IndexedSlices(function(gradient.values), gradient.indices, gradient.dense_shape)
    return function(gradient)


def values_of(gradient: Any) -> Any:
    """The numbers of a gradient, dense or sparse.

    Args:
        gradient: a tensor or a ``tf.IndexedSlices``.
    """
    return gradient.values if isinstance(gradient, tf.IndexedSlices) else gradient


def shaped(gradient: Any, point: Any) -> Any:
    """The gradient that is given, of which a graph now knows the shape if it is dense, as of one by ``numpy_function``.

    Args:
        gradient: a tensor, a ``tf.IndexedSlices``, or ``None``.
        point: the tensor of which it is the gradient.
    """
    if kind_of(gradient) == "dense":
        gradient.set_shape(point.shape)
    return gradient


def widened(gradient: Any, sparse: bool = True) -> Any:
    """A gradient in at least float32, so that a sum over parts keeps what half precision would lose.

    Args:
        gradient: a tensor, a ``tf.IndexedSlices``, or ``None``, which stays ``None``.
        sparse: whether a sparse one stays sparse.
    """
    if isinstance(gradient, tf.IndexedSlices) and not sparse:
        gradient = tf.convert_to_tensor(gradient)
    if gradient is None or gradient.dtype not in (tf.float16, tf.bfloat16):
        return gradient
    return with_values(gradient, lambda values: tf.cast(values, tf.float32))


def fitting_gradient(gradient: Any, variable: Any, name: str) -> Any:
    """Returns a gradient as a tensor or a ``tf.IndexedSlices``, or raises if it cannot be that of a variable.

    Args:
        gradient: what was given.
        variable: a Keras variable.
        name: what to call it.

    Raises:
        ValueError: the shape, the kind of number or an index is wrong. What is not known yet fails later: the tensor
            that is returned is then another one, and waits for that.
    """
    sparse = isinstance(gradient, tf.IndexedSlices)
    wrong = (
        f"A gradient must have the shape of its variable, {tuple(variable.shape)} for {name!r}, and "
        "floating-point numbers; a sparse one rows that are there. Received: "
    )
    try:
        values = tf.convert_to_tensor(gradient.values if sparse else gradient)
        indices: Any = tf.convert_to_tensor(gradient.indices) if sparse else None
    except (TypeError, ValueError):
        raise ValueError(f"{wrong}{gradient!r}") from None
    if not sparse or indices is not gradient.indices or values is not gradient.values:
        gradient = tf.IndexedSlices(values, indices, gradient.dense_shape) if sparse else values
    shape = tf.TensorShape([None, *variable.shape[1:]] if sparse else variable.shape)
    fits = values.dtype.is_floating and shape.is_compatible_with(values.shape)
    if fits and sparse:
        fits = indices.shape.is_compatible_with(values.shape[:1])
        if fits and tf.executing_eagerly():
            fits = not np.any(indices.numpy() < 0) and not np.any(indices.numpy() >= variable.shape[0])
    if not fits:
        raise ValueError(
            f"{wrong}shape={'unknown' if values.shape.rank is None else tuple(values.shape)}, "
            f"dtype={values.dtype.name}" + (f", indices={indices}" if sparse else "")
        )
    if values.shape.rank is None or not values.shape[1 if sparse else 0 :].is_fully_defined():
        gradient = with_values(gradient, lambda values: tf.ensure_shape(values, shape))
    if sparse and not tf.executing_eagerly():
        there = tf.reduce_all((indices >= 0) & (indices < variable.shape[0]))
        with tf.control_dependencies([tf.debugging.Assert(there, [wrong, "indices=", indices])]):
            gradient = with_values(gradient, tf.identity)
    return gradient


def kind_of(gradient: Any) -> str:
    """Says what a gradient is: ``"dense"``, ``"sparse"``, or ``"none"``.

    Args:
        gradient: a tensor, a ``tf.IndexedSlices``, or ``None``.
    """
    return "none" if gradient is None else "sparse" if isinstance(gradient, tf.IndexedSlices) else "dense"


def moved(points: list[Any], factor: Any, directions: list[Any]) -> list[Any]:
    """Goes from points along directions: where a method asks its next question.

    Args:
        points: a list of tensors.
        factor: how far along; against a direction if negative.
        directions: a tensor for each of the points.

    Returns:
        A tensor ``point + factor * direction`` for each.

    Example:
        >>> moved([np.array([1.0, 2.0])], -0.5, [np.array([2.0, 2.0])])[0].tolist()
        [0.0, 1.0]

    Taught in chapter 09, :doc:`/notebooks/09_injecting_heun`.
    """
    return [point + factor * direction for point, direction in zip(points, directions, strict=True)]


def all_finite(tensors: list[Any]) -> Any:
    """Whether every number is finite.

    Args:
        tensors: dense or sparse gradients, or their numbers.

    Returns:
        A boolean scalar tensor. A sum is the cheapest test: an infinity or NaN never disappears from it.
    """
    sums = []
    for values in tensors:
        values = values_of(values)
        if (values.shape.rank or 0) > 1 and values.shape[-1]:
            values = _row_sums(values)
        sums.append(tf.reduce_sum(values))
    widest = keras.backend.result_type(*(total.dtype.name for total in sums))
    return tf.math.is_finite(tf.add_n([tf.cast(total, widest) for total in sums]))


def along(gradients: list[Any], directions: list[Any]) -> Any:
    """The sum of the products of gradients with directions, a scalar.

    Args:
        gradients: dense, sparse, or ``None``.
        directions: a tensor for each of them.
    """
    terms = [tf.zeros((), directions[0].dtype)]
    for gradient, direction in zip(gradients, directions, strict=True):
        if isinstance(gradient, tf.IndexedSlices):
            gradient, direction = gradient.values, tf.gather(direction, gradient.indices)
        if gradient is not None:
            terms.append(tf.reduce_sum(tf.cast(gradient, terms[0].dtype) * tf.cast(direction, terms[0].dtype)))
    return tf.add_n(terms)


def square(gradient: Any, dtype: str, in_xla: bool) -> Any:
    """The squared norm of a gradient, a scalar; half precision is squared in float32.

    Args:
        gradient: dense, sparse without repeated rows, or ``None``.
        dtype: that of the result.
        in_xla: whether XLA compiles it, which has a slow sum and needs no room for the squares. The number is the same.
    """
    if gradient is None:
        return tf.zeros((), dtype)
    wide = widened(gradient)
    values = values_of(wide)
    if in_xla and (values.shape.rank or 0) > 1 and (values.shape[-1] or 1) > 1:
        return tf.cast(tf.reduce_sum(_row_sums(values * values)), dtype)
    return tf.cast(2 * tf.nn.l2_loss(values), dtype)


def _row_sums(values: Any) -> Any:
    """A product with ones is the fastest sum of a matrix."""
    return tf.reshape(values, [-1, values.shape[-1]]) @ tf.ones([values.shape[-1], 1], values.dtype)


def coalesce(gradient: Any) -> Any:
    r"""Sums the rows of a sparse gradient that have the same id.

    With ids :math:`i_1, \dots, i_n` and rows :math:`r_1, \dots, r_n`, each id :math:`j` keeps one row:

    .. math::

       g_j = \sum_{k\,:\,i_k = j} r_k

    The ids come out in the order of their first occurrence. float16 and bfloat16 rows are summed in float32, so that
    many small rows are not lost to rounding. Works in eager mode, in graphs and under XLA.

    Args:
        gradient: a ``tf.IndexedSlices``. Anything else (a dense tensor, ``None``) is returned as it is.

    Returns:
        A ``tf.IndexedSlices`` with unique ids, of the same dtype and dense shape.

    Raises:
        ValueError: the ids are not a vector; in eager mode this is TensorFlow's ``InvalidArgumentError``.

    Example:
        >>> import tensorflow as tf
        >>> rows = tf.constant([[1.0, 2.0], [10.0, 20.0], [5.0, 5.0]])
        >>> gradient = coalesce(tf.IndexedSlices(rows, indices=[1, 1, 2], dense_shape=[4, 2]))
        >>> gradient.indices.numpy().tolist(), gradient.values.numpy().tolist()
        ([1, 2], [[11.0, 22.0], [5.0, 5.0]])

    PyTorch's sparse tensors have a method of this name. Keras 2 did this in its optimizers; Keras 3 does not.

    References:
        Duchi, Hazan and Singer, 2011, "Adaptive subgradient methods for online learning and stochastic optimization",
        where the squares that repeated rows spoil come from.

    Taught in chapter 07, :doc:`/notebooks/07_accumulation_in_practice`.
    """
    if not isinstance(gradient, tf.IndexedSlices):
        return gradient
    ids, position = tf.unique(gradient.indices)
    dtype = gradient.values.dtype
    rows = tf.cast(gradient.values, tf.float32 if dtype in (tf.float16, tf.bfloat16) else dtype)
    rows = tf.math.unsorted_segment_sum(rows, position, tf.size(ids))
    return tf.IndexedSlices(tf.cast(rows, dtype), ids, gradient.dense_shape)
