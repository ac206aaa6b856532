"""What replicas do together. On one replica nothing happens here."""

from collections.abc import Callable
from typing import Any

import tensorflow as tf


def replicas_of(model: Any) -> int:
    """How many replicas a model trains on.

    Args:
        model: a ``keras.Model``.
    """
    return model.distribute_strategy.num_replicas_in_sync


def has_workers(model: Any) -> bool:
    """Whether a model was made under a strategy that spans several processes.

    Args:
        model: a ``keras.Model``.
    """
    resolver = model.distribute_strategy.cluster_resolver
    return resolver is not None and bool(resolver.cluster_spec().jobs)


def gather(tensors: list[Any]) -> list[Any]:
    """A row from each replica, on every replica.

    Args:
        tensors: each replica's own.
    """
    context = tf.distribute.get_replica_context()
    count = 1 if context is None else context.num_replicas_in_sync
    is_mine = tf.range(count) == (0 if context is None else context.replica_id_in_sync_group)
    rows = [tf.reshape(is_mine, [-1, *[1] * len(tensor.shape)]) for tensor in tensors]
    return all_reduce([tf.where(row, tensor[None], 0) for row, tensor in zip(rows, tensors, strict=True)])


def all_reduce(tensors: list[Any]) -> list[Any]:
    """The sums over replicas, on every replica; the tensors themselves where there is one replica.

    Args:
        tensors: each replica's own.
    """
    context = tf.distribute.get_replica_context()
    if not tensors or context is None or context.num_replicas_in_sync == 1:
        return tensors
    merged: dict[int, Any] = {}
    for dtype in sorted({tensor.dtype.name for tensor in tensors}):  # tensors that travel together are of one dtype
        alike = {index: tensor for index, tensor in enumerate(tensors) if tensor.dtype.name == dtype}
        merged |= zip(alike, context.all_reduce(tf.distribute.ReduceOp.SUM, list(alike.values())), strict=True)
    return [merged[index] for index in range(len(tensors))]


def brought_by_one(gradients: list[Any]) -> list[Any]:
    """Keeps merged gradients on one replica and puts zeros on the others.

    Keras's ``apply`` clips on each replica and sums over replicas afterwards. A clipped zero is zero, and the sum is
    the clipped gradient to the last bit.

    Args:
        gradients: the same on every replica; sparse ones without repeated rows.

    Returns:
        The gradients, or zeros, or sparse gradients without rows.
    """
    context = tf.distribute.get_replica_context()
    if context.num_replicas_in_sync == 1:
        return gradients
    rows = tf.cast(context.replica_id_in_sync_group == 0, "int32")

    def here(gradient: Any) -> Any:
        if not isinstance(gradient, tf.IndexedSlices):
            return None if gradient is None else tf.where(rows == 1, gradient, 0)
        end = rows * tf.size(gradient.indices)
        return tf.IndexedSlices(gradient.values[:end], gradient.indices[:end], gradient.dense_shape)

    return [here(gradient) for gradient in gradients]


def replica_id() -> Any:
    """The number of the replica that asks; ``None`` across replicas, and where it is not known before the step runs."""
    context = tf.distribute.get_replica_context()
    number = context and tf.get_static_value(context.replica_id_in_sync_group)
    return None if number is None else int(number)


def across_replicas(own: Any, function: Callable[..., None], *args: Any) -> None:
    """Calls ``function(strategy, *args)`` where a branch may hold what replicas do together: across them.

    Args:
        own: the strategy to use where none is entered.
        function: what to call.
        *args: a replica's own arguments.
    """
    if tf.distribute.in_cross_replica_context():
        function(tf.distribute.get_strategy(), *args)
    elif tf.distribute.has_strategy() or own is tf.distribute.get_strategy():
        tf.distribute.get_replica_context().merge_call(function, args=args)
    else:
        with own.scope():
            function(own, *args)


def everywhere(strategy: Any, condition: Callable[..., Any], *args: Any) -> Any:
    """Whether a condition holds on every replica: one answer for all of them, across replicas.

    Args:
        strategy: the strategy.
        condition: a function that returns a boolean tensor.
        *args: its arguments, each replica's own.
    """
    answers = strategy.extended.call_for_each_replica(condition, args=args)
    if strategy.num_replicas_in_sync == 1:
        return answers
    failures = strategy.extended.call_for_each_replica(lambda answer: tf.cast(~answer, "float32"), args=(answers,))
    return strategy.reduce("SUM", failures, axis=None) == 0
