"""Puts a training step into a compiled model that asks a gradient oracle. Chapters 06 and 09 of the book teach it."""

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import keras
import tensorflow as tf

from companion.oracle import GradientOracle, check_question, scaled

# Private names of Keras, checked on 3.13.2 and 3.15.1; tests/test_injection.py notices when they move.
_BUILD_FROM_ITERATOR = "_maybe_symbolic_build"
_BUILD_FROM_BATCH = "_symbolic_build"


def inject(
    model: keras.Model, micro_batches: int = 1, weight_fn: Callable[[Any, Any, Any], Any] | None = None
) -> keras.Model:
    r"""Makes ``fit`` process each batch in parts and apply one gradient, that of the whole batch.

    .. math::

       \nabla L(\theta) = \frac{1}{\sum_i D_i} \sum_i \nabla S_i(\theta)

    Peak memory is that of a part, and the weights, the loss, the metrics and the history are those of the whole batch:
    with masks, sample weights, several outputs, a ragged last batch, and on several replicas. See
    :class:`~companion.oracle.GradientOracle` for the exceptions, among them BatchNorm and dropout.

    Args:
        model: a compiled model with the training step of ``keras.Model``.
        micro_batches: an integer :math:`\ge 1`: the number of parts, see
            :class:`~companion.oracle.GradientOracle`. Defaults to 1.
        weight_fn: for a loss with a denominator of its own, on one replica: a function of ``(x, y, sample_weight)``
            that returns the denominator of a part. Defaults to ``None``.

    Returns:
        The same model. :func:`~companion.injection.eject` restores it. Cloning and loading lose the injection: call
        ``inject`` again.

    Raises:
        TypeError: ``model`` is not a ``keras.Model``.
        ValueError: an argument is wrong, the model is not compiled or has a training step of its own, or its optimizer
            has ``gradient_accumulation_steps``.

    Example:
        >>> model = keras.Sequential([keras.layers.Dense(1)])
        >>> model.compile("sgd", "mse")
        >>> history = inject(model, micro_batches=4).fit(np.ones((16, 2)), np.ones((16, 1)), batch_size=16, verbose=0)

    Taught in chapters 06 and 07, :doc:`/notebooks/06_the_fix` and :doc:`/notebooks/07_accumulation_in_practice`.
    """
    _check(model, micro_batches, weight_fn)
    model.train_step = functools.partial(_train_step, model, micro_batches, weight_fn)
    model.train_function = None
    if model.distribute_strategy.num_replicas_in_sync > 1:
        setattr(model, _BUILD_FROM_ITERATOR, functools.partial(_build_from_one_shard, model))
    return model


def eject(model: keras.Model) -> keras.Model:
    """Gives a model back the training step of ``keras.Model``.

    Args:
        model: a model, injected or not.

    Returns:
        The same model.

    Example:
        >>> model = keras.Sequential([keras.layers.Dense(1)])
        >>> model.compile("sgd", "mse")
        >>> eject(inject(model)).train_step == type(model).train_step.__get__(model)
        True

    Taught in chapter 06, :doc:`/notebooks/06_the_fix`.
    """
    if _is_injected(model):
        del model.train_step
        model.train_function = None
        vars(model).pop(_BUILD_FROM_ITERATOR, None)
    return model


def _train_step(model: Any, micro_batches: int, weight_fn: Any, data: Any) -> dict[str, Any]:
    """What ``fit`` does with a batch."""
    _check(model, micro_batches, weight_fn)  # once more: the model may have been compiled anew
    optimizer, oracle = model.optimizer, GradientOracle(model, data, micro_batches, weight_fn)
    variables = model.trainable_variables
    if (
        not optimizer.built
    ):  # or the first question would be asked at another loss scale than the answer is applied with
        optimizer.build(variables)
    gradients = [scaled(gradient, optimizer.scale_loss(1.0)) for gradient in oracle()]
    with _weighed(optimizer, oracle) as is_weighed:
        optimizer.apply(gradients if is_weighed else _brought_by_one(gradients), variables)
    return model.get_metrics_result()


def _build_from_one_shard(model: Any, iterator: Any = None, data_batch: Any = None) -> None:
    """Builds as Keras's ``fit`` does on several replicas, which fails there if the first batch's shards are uneven."""
    for _, _, batches in iterator or ():
        first_shard = lambda shards: model.distribute_strategy.experimental_local_results(shards)[0]  # noqa: E731
        data_batch = keras.tree.map_structure(first_shard, next(batches))
        break
    with model.distribute_strategy.scope():
        getattr(model, _BUILD_FROM_BATCH)(data_batch=data_batch)


def _brought_by_one(gradients: list[Any]) -> list[Any]:
    """The merged gradients on one replica and zeros on the others: ``apply`` clips on each replica, then sums."""
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


@contextmanager
def _weighed(optimizer: Any, oracle: GradientOracle) -> Iterator[bool]:
    """Hands the batch's weight to an accumulation that wants it, however it is wrapped; yields whether one does."""
    accumulations = [layer for layer in _wrapped_by(optimizer) if getattr(layer, "normalize", None) == "weight"]
    for layer in accumulations:
        replicas = tf.distribute.get_strategy().num_replicas_in_sync  # each brings the merged gradient, and its share
        layer.apply = functools.partial(type(layer).apply, layer, weight=oracle.denominator / replicas)
    try:
        yield bool(accumulations)
    finally:
        for layer in accumulations:
            vars(layer).pop("apply", None)


def _wrapped_by(optimizer: Any) -> Iterator[Any]:
    """The optimizer and all that it wraps."""
    while optimizer is not None:
        yield optimizer
        yield from getattr(optimizer, "optimizers", ())
        optimizer = getattr(optimizer, "inner_optimizer", None)


def _is_injected(model: Any) -> bool:
    return getattr(vars(model).get("train_step"), "func", None) is _train_step


def _check(model: Any, micro_batches: Any, weight_fn: Any) -> None:
    check_question(model, micro_batches, weight_fn)
    if type(model).train_step is not keras.Model.train_step or (
        "train_step" in vars(model) and not _is_injected(model)
    ):
        raise ValueError(
            "`model` has a `train_step` of its own, which an injection would replace. Ask a `companion.GradientOracle` "
            f"there instead. Received: model={model.name!r} of class {type(model).__name__}"
        )
    for layer in _wrapped_by(model.optimizer):
        if layer.gradient_accumulation_steps:
            raise ValueError(
                "`gradient_accumulation_steps` on the optimizer and `inject` do not go together: leave it out and pass "
                f"`micro_batches`. Received: gradient_accumulation_steps={layer.gradient_accumulation_steps!r} on "
                f"{layer.name!r}"
            )
