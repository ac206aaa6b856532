r"""Rules that merge what several devices say, each about its own share of the batch. Chapter 14 teaches them.

A rule is a function ``rule(gradients, weights)``. For each variable ``gradients`` holds one tensor, of shape
``(devices, *variable.shape)``: row :math:`r` is the gradient :math:`g_r` of the mean loss on the share of device
:math:`r`. ``weights``, of shape ``(devices,)``, holds what that mean divides by, :math:`w_r`: the examples of the
share, its unmasked tokens, or the sum of its sample weights. A device whose share is empty is not asked. The rule
returns a tensor of the variable's shape for each variable; every device calls it with the same numbers.

Give a rule to :func:`~companion.inject` as ``merge``. Your own may be any such function.

Args:
    gradients: for each variable a tensor of shape ``(devices, *variable.shape)``.
    weights: a tensor of shape ``(devices,)``. Only :func:`weighted_mean` looks at it.

Returns:
    A tensor of the variable's shape and dtype for each variable. float16 and bfloat16 are merged in float32.
"""

from collections.abc import Callable
from typing import Any

import tensorflow as tf

from companion.gradients import widened


def _each(gradients: list[Any], rule: Callable[[Any], Any]) -> list[Any]:
    """Merges the rows of each variable, half precision in float32: sums of large numbers would pass its largest."""
    tensors = [tf.convert_to_tensor(rows) for rows in gradients]
    wrong = [rows.dtype.name for rows in tensors if not rows.dtype.is_floating]
    if wrong:
        raise ValueError(
            f"`gradients` must be of floating point numbers. Received: tensors of dtype {', '.join(wrong)}"
        )
    return [tf.cast(rule(widened(rows)), rows.dtype) for rows in tensors]


def weighted_mean(gradients: list[Any], weights: Any) -> list[Any]:
    r"""The gradient of the whole batch, however uneven the shares are.

    .. math::

       g = \frac{\sum_r w_r\, g_r}{\sum_r w_r}

    Example:
        >>> import tensorflow as tf
        >>> (merged,) = weighted_mean([tf.constant([[1.0], [5.0]])], tf.constant([3.0, 1.0]))
        >>> merged.numpy().tolist()
        [2.0]

    Taught in chapter 14, :doc:`/notebooks/14_merging_gradients`.
    """

    def mean_of(rows: Any) -> Any:
        shares = tf.cast(weights, rows.dtype)
        return tf.tensordot(shares / tf.reduce_sum(shares), rows, 1)

    return _each(gradients, mean_of)


def mean(gradients: list[Any], weights: Any) -> list[Any]:
    r"""Every device counts alike, as in Keras's own training on several devices. Wrong where shares are uneven.

    .. math::

       g = \frac{1}{R} \sum_{r=1}^{R} g_r

    Example:
        >>> import tensorflow as tf
        >>> gradients, weights = [tf.constant([[1.0], [5.0], [9.0]])], tf.constant([3.0, 1.0, 1.0])
        >>> mean(gradients, weights)[0].numpy().tolist()
        [5.0]

    Taught in chapter 14, :doc:`/notebooks/14_merging_gradients`.
    """
    return _each(gradients, lambda rows: tf.reduce_sum(rows / tf.cast(tf.shape(rows)[0], rows.dtype), 0))


def sum(gradients: list[Any], weights: Any) -> list[Any]:
    r"""A step that grows with the number of devices, as if the learning rate did.

    .. math::

       g = \sum_{r=1}^{R} g_r

    Example:
        >>> import tensorflow as tf
        >>> gradients, weights = [tf.constant([[1.0], [5.0], [9.0]])], tf.constant([3.0, 1.0, 1.0])
        >>> sum(gradients, weights)[0].numpy().tolist()
        [15.0]

    Taught in chapter 14, :doc:`/notebooks/14_merging_gradients`.
    """
    return _each(gradients, lambda rows: tf.reduce_sum(rows, 0))


def median(gradients: list[Any], weights: Any) -> list[Any]:
    r"""The middle of each coordinate: fewer than half of the devices can say what they like and it stays in range.

    .. math::

       g^{(i)} = \operatorname{median}\bigl(g_1^{(i)}, \dots, g_R^{(i)}\bigr)

    With an even number of devices it is the mean of the two in the middle. Not a number counts as the largest of all,
    and is the answer where it comes to the middle.

    Example:
        >>> import tensorflow as tf
        >>> gradients, weights = [tf.constant([[1.0], [5.0], [-1e9]])], tf.ones(3)
        >>> median(gradients, weights)[0].numpy().tolist()
        [1.0]

    References:
        Yin, Chen, Ramchandran and Bartlett, 2018, "Byzantine-robust distributed learning: towards optimal statistical
        rates".

    Taught in chapter 14, :doc:`/notebooks/14_merging_gradients`.
    """

    def middle(rows: Any) -> Any:
        devices = tf.shape(rows)[0]
        speaks = ~tf.math.is_nan(rows)
        spoken = tf.reduce_sum(tf.cast(speaks, "int32"), 0)
        ordered = tf.sort(tf.where(speaks, rows, float("inf")), 0)  # a number that comes first would be a float32
        low, high = ordered[(devices - 1) // 2], ordered[devices // 2]
        mean = tf.where(low == high, low, low / 2 + high / 2)  # halves first: a sum may pass the largest number
        return tf.where(devices // 2 < spoken, mean, float("nan"))

    return _each(gradients, middle)


def sign(gradients: list[Any], weights: Any) -> list[Any]:
    r"""A majority vote on each coordinate: each device says which way, none how far.

    .. math::

       g^{(i)} = \operatorname{sign} \sum_{r=1}^{R} \operatorname{sign} g_r^{(i)}

    Every coordinate moves by the learning rate, or not at all after a tie, so it wants a far smaller one than a
    gradient. One bit for each coordinate is all that has to travel. Not a number has no vote; where nobody has one, it
    is the answer.

    Example:
        >>> import tensorflow as tf
        >>> gradients, weights = [tf.constant([[1.0], [5.0], [-1e9]])], tf.ones(3)
        >>> sign(gradients, weights)[0].numpy().tolist()
        [1.0]

    References:
        Bernstein, Zhao, Azizzadenesheli and Anandkumar, 2019, "signSGD with majority vote is communication efficient
        and fault tolerant".

    Taught in chapter 14, :doc:`/notebooks/14_merging_gradients`.
    """

    def vote(rows: Any) -> Any:
        speaks = ~tf.math.is_nan(rows)
        votes = tf.reduce_sum(tf.where(speaks, tf.sign(rows), tf.zeros_like(rows)), 0)
        return tf.where(tf.reduce_any(speaks, 0), tf.sign(votes), float("nan"))

    return _each(gradients, vote)
