r"""Rules that merge what several devices say, each about its own share of the batch. Chapter 14 teaches them.

A rule is a function ``rule(gradients, weights)``. For each variable ``gradients`` holds one tensor, of shape
``(devices, *variable.shape)``: row :math:`r` is the gradient :math:`g_r` of the mean loss on the share of device
:math:`r`. ``weights``, of shape ``(devices,)``, holds what that mean divides by, :math:`w_r`: the examples of the
share, its unmasked tokens, or the sum of its sample weights. A device whose share is empty is not asked. The rule
returns a tensor of the variable's shape for each variable; every device calls it with the same numbers.

Give a rule to :func:`~companion.inject` as ``merge``. Your own may be any such function.
"""

from typing import Any

import tensorflow as tf


def weighted_mean(gradients: list[Any], weights: Any) -> list[Any]:
    r"""The gradient of the whole batch, however uneven the shares are.

    .. math::

       g = \frac{\sum_r w_r\, g_r}{\sum_r w_r}

    Args:
        gradients: for each variable a tensor of shape ``(devices, *variable.shape)``.
        weights: a tensor of shape ``(devices,)``.

    Returns:
        A tensor of the variable's shape for each variable.

    Example:
        >>> import tensorflow as tf
        >>> (merged,) = weighted_mean([tf.constant([[1.0], [5.0]])], tf.constant([3.0, 1.0]))
        >>> merged.numpy().tolist()
        [2.0]

    Taught in chapter 14, :doc:`/notebooks/14_merging_gradients`.
    """
    shares = weights / tf.reduce_sum(weights)
    return [tf.tensordot(tf.cast(shares, g.dtype), g, 1) for g in gradients]


def mean(gradients: list[Any], weights: Any) -> list[Any]:
    r"""Every device counts alike, as in Keras's own training on several devices. Wrong where shares are uneven.

    .. math::

       g = \frac{1}{R} \sum_{r=1}^{R} g_r

    Args:
        gradients: for each variable a tensor of shape ``(devices, *variable.shape)``.
        weights: a tensor of shape ``(devices,)``; not used.

    Returns:
        A tensor of the variable's shape for each variable.

    Taught in chapter 14, :doc:`/notebooks/14_merging_gradients`.
    """
    return [tf.reduce_mean(g, 0) for g in gradients]


def sum(gradients: list[Any], weights: Any) -> list[Any]:
    r"""A step that grows with the number of devices, as if the learning rate did.

    .. math::

       g = \sum_{r=1}^{R} g_r

    Args:
        gradients: for each variable a tensor of shape ``(devices, *variable.shape)``.
        weights: a tensor of shape ``(devices,)``; not used.

    Returns:
        A tensor of the variable's shape for each variable.

    Taught in chapter 14, :doc:`/notebooks/14_merging_gradients`.
    """
    return [tf.reduce_sum(g, 0) for g in gradients]


def median(gradients: list[Any], weights: Any) -> list[Any]:
    r"""The middle of each coordinate: fewer than half of the devices can say what they like and it stays in range.

    .. math::

       g^{(i)} = \operatorname{median}\bigl(g_1^{(i)}, \dots, g_R^{(i)}\bigr)

    With an even number of devices it is the mean of the two in the middle. Not a number counts as the largest of all.

    Args:
        gradients: for each variable a tensor of shape ``(devices, *variable.shape)``.
        weights: a tensor of shape ``(devices,)``; not used.

    Returns:
        A tensor of the variable's shape for each variable.

    References:
        Yin, Chen, Ramchandran and Bartlett, 2018, "Byzantine-robust distributed learning: towards optimal statistical
        rates".

    Taught in chapter 14, :doc:`/notebooks/14_merging_gradients`.
    """
    devices = tf.size(weights)
    ordered = [tf.sort(tf.where(tf.math.is_nan(g), g.dtype.max, g), 0) for g in gradients]
    return [(g[(devices - 1) // 2] + g[devices // 2]) / 2 for g in ordered]


def sign(gradients: list[Any], weights: Any) -> list[Any]:
    r"""A majority vote on each coordinate: each device says which way, none how far.

    .. math::

       g^{(i)} = \operatorname{sign} \sum_{r=1}^{R} \operatorname{sign} g_r^{(i)}

    Every coordinate moves by the learning rate, or not at all after a tie, so it wants a far smaller one than a
    gradient. One bit for each coordinate is all that has to travel. Not a number has no vote.

    Args:
        gradients: for each variable a tensor of shape ``(devices, *variable.shape)``.
        weights: a tensor of shape ``(devices,)``; not used.

    Returns:
        A tensor of the variable's shape for each variable.

    References:
        Bernstein, Zhao, Azizzadenesheli and Anandkumar, 2019, "signSGD with majority vote is communication efficient
        and fault tolerant".

    Taught in chapter 14, :doc:`/notebooks/14_merging_gradients`.
    """
    votes = [tf.where(tf.math.is_nan(g), tf.zeros_like(g), tf.sign(g)) for g in gradients]
    return [tf.sign(tf.reduce_sum(vote, 0)) for vote in votes]
