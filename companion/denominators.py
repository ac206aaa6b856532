r"""What a compiled loss divides by, so that its parts can be added up. Chapter 06 of the book teaches it.

A Keras loss is the sum of the weighted losses of the examples, :math:`S`, over a denominator :math:`D` that its
``reduction`` chooses: the number of values, of unmasked values, or the sum of the sample weights. The mean of the means
of parts is not the mean of the whole. Their sums over the denominator of the whole add up to it:

.. math::

   L = \sum_i \frac{S_i}{D} \qquad D = \sum_i D_i

All that the package knows of the insides of Keras's losses is here.
"""

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf
from keras import ops

# Private names, checked on Keras 3.13.2 and 3.15.1; tests/test_oracle.py notices when they move.
_COMPILED_LOSS = "_compile_loss"
_LOSSES = "_flat_losses"
_LAYERS = "_flatten_layers"
_MASK = "_keras_mask"


def compiled_loss(model: keras.Model) -> Any:
    """The function that adds up a model's compiled losses, or ``None``.

    Args:
        model: a compiled model.
    """
    return getattr(model, _COMPILED_LOSS)


def of_metrics(model: keras.Model) -> set[int]:
    """The ids of all variables of a model's metrics, those of Keras among them, whatever a subclass calls its metrics.

    Args:
        model: a compiled model.
    """
    metrics = [*model.metrics, *keras.Model.metrics.fget(model), *getattr(compiled_loss(model), "metrics", [])]
    return {id(variable) for metric in metrics for variable in metric.variables}


def layers_of(model: keras.Model) -> list[Any]:
    """A model and all the layers in it, at any depth.

    Args:
        model: the model.
    """
    return list(getattr(model, _LAYERS)())


def is_built(model: keras.Model) -> bool:
    """Whether all that a model consists of has its variables, whether or not the model has been called itself.

    Args:
        model: the model.
    """
    return all(layer.built for layer in layers_of(model) if layer is not model)


def loss_shares(compiled: Any, micro_batches: int, is_whole: bool) -> list["LossShare"]:
    """A stand-in for each loss.

    Args:
        compiled: what :func:`compiled_loss` returned, once it has been called.
        micro_batches: in how many parts the batch is, on each replica.
        is_whole: whether there is one part only, so that a loss that cannot be split may stay as it is.
    """
    return [LossShare(entry.loss, entry.name, micro_batches, is_whole) for entry in getattr(compiled, _LOSSES, [])]


def no_common_denominator(shares: list["LossShare"], adds_losses: bool, weight_fn: Any) -> ValueError:
    """The error that says why one number does not weigh a batch among others.

    Args:
        shares: the losses.
        adds_losses: whether layers add others.
        weight_fn: what was to say it.
    """
    losses = [f"{share.output!r} with reduction={share.loss.reduction!r}" for share in shares]
    return ValueError(
        "One number cannot weigh this batch among others: all losses would have to divide by the same, also those "
        "of `add_loss`, which are means over examples. Pass `weight_fn`, let `micro_batches` do without another "
        f"accumulation, or leave `merge` at its default. Received: {', '.join(losses)}"
        + " and losses added in layers" * adds_losses
        + f" and weight_fn={weight_fn!r}" * (weight_fn is not None)
    )


@contextlib.contextmanager
def standing_in(compiled: Any, functions: Sequence[Callable[..., Any]]) -> Iterator[None]:
    """Puts functions in the place of the losses, and at the end the losses back.

    Args:
        compiled: what :func:`compiled_loss` returned.
        functions: one of (targets, outputs, sample_weight) for each loss; none leaves all as it is.
    """
    entries = getattr(compiled, _LOSSES) if functions else []
    if functions:
        replaced = [entry._replace(loss=function) for entry, function in zip(entries, functions, strict=True)]
        setattr(compiled, _LOSSES, replaced)
    try:
        yield
    finally:
        if functions:
            setattr(compiled, _LOSSES, entries)


class LossShare(keras.losses.Loss):
    """Stands in for a compiled loss: its sum over a part, divided by what it divides by on the whole batch.

    Args:
        loss: the loss.
        output: its name in the model.
        micro_batches: in how many parts the batch is, on each replica.
        is_whole: whether there is one part only, so that a loss that cannot be split may stay as it is.

    Attributes:
        denominator: the divisor, once it is measured; ``None`` takes the loss as it is.
        rows: how many examples the targets hold, once they are measured.
        counts_examples: whether the divisor is the number of examples, or a fixed multiple of it.
        value: what the last call returned.
    """

    def __init__(self, loss: Any, output: str, micro_batches: int, is_whole: bool) -> None:
        super().__init__(name=loss.name, reduction="sum", dtype=loss.dtype)
        self.loss, self.output, self.micro_batches, self.is_whole = loss, output, micro_batches, is_whole
        self.denominator: Any = None
        self.rows: Any = None
        self.counts_examples = False
        self.value: Any = None

    def __call__(self, targets: Any, outputs: Any, sample_weight: Any = None) -> Any:
        """The part's share of the loss."""
        if self.denominator is None:
            self.value = self.loss(targets, outputs, sample_weight)
        else:
            total = super().__call__(targets, outputs, sample_weight)
            self.value = tf.math.divide_no_nan(tf.cast(total, self.denominator.dtype), self.denominator)
        return self.value

    def call(self, targets: Any, outputs: Any) -> Any:
        """The loss of each example, once it is certain that there is one for each."""
        values = self.loss.call(targets, outputs)
        if not self._has_one_for_each(targets, values):
            raise ValueError(self._error())
        tf.debugging.assert_equal(tf.shape(values), _shape(values, targets), self._error())
        return values

    def measure(self, targets: Any, outputs: Any, sample_weight: Any = None) -> Any:
        """Finds the denominator of this replica's batch, as Keras's ``reduce_weighted_values`` has it."""
        targets = ops.convert_to_tensor(targets, self.dtype)
        values = self.loss.call(targets, ops.convert_to_tensor(outputs, self.dtype))
        dtype = "float64" if self.dtype == "float64" else "float32"
        masks = [getattr(outputs, _MASK, None), getattr(values, _MASK, None)]
        ignored = getattr(self.loss, "ignore_class", None)
        if ignored is not None:  # the same mask, but not reshaped by the outputs' shape
            masks[1] = ops.not_equal(targets, ignored)
        masks = [ops.cast(mask, dtype) for mask in masks if mask is not None]
        if not self._has_one_for_each(targets, values):
            if not self.is_whole:
                raise ValueError(self._error())
            return tf.zeros((), dtype)
        if self.micro_batches > 1 and mixes_examples(self.loss, targets, outputs):
            raise ValueError(
                f"The loss {self.output!r} mixes the examples of a batch: alone, an example has another loss than "
                "beside others. The loss of a batch in parts is another loss, so leave `micro_batches` at 1. "
                "companion.GradientAccumulation, which takes small batches one after the other, would not give the "
                f"large batch's loss, either. Received: loss={self.loss!r}"
            )
        size = math.prod(_shape(values, targets))
        self.rows = ops.cast(_shape(values, targets)[0], dtype)
        if self.loss.reduction == "mean_with_sample_weight" and (masks or sample_weight is not None):
            weights = [] if sample_weight is None else [ops.cast(sample_weight, dtype)]
            self.denominator = ops.sum(_product([*masks, *weights]))
        elif self.loss.reduction != "sum":  # the parts of a sum are sums
            self.denominator = ops.cast(size, dtype) * (ops.mean(_product(masks)) if masks else 1)
            self.counts_examples = not masks and None not in values.shape[1:]
        return tf.zeros((), dtype)

    def _has_one_for_each(self, targets: Any, values: Any) -> bool:
        reduces = type(self.loss).__call__ is keras.losses.Loss.__call__ and self.loss.reduction not in (None, "none")
        is_circle = getattr(self.loss, "fn", None) is keras.losses.circle
        return reduces and not is_circle and len(values.shape) > 0 and values.shape[0] in (None, targets.shape[0])

    def _error(self) -> str:
        return (
            f"The loss {self.output!r} does not say what it divides by, so its parts cannot be merged exactly. Let it "
            "return one value for each example and give it a `reduction`, or pass `weight_fn`: a function of (x, y, "
            'sample_weight) that returns what it divides by on a part, or "sum" for a sum. Received: '
            f"loss={self.loss!r} with reduction={self.loss.reduction!r}"
        )


def mixes_examples(loss: Any, targets: Any, outputs: Any) -> bool:
    """Whether a loss of one's own says something else of examples alone than of the same ones together.

    It is asked of three made-up rows. Where it fails on them, or says something else when it is asked again (it draws
    noise, or has a state), this cannot be told, and the answer is no. Keras's own losses are not asked.

    Args:
        loss: the loss.
        targets: a tensor like those that it takes; of its shape, the number of rows does not count.
        outputs: likewise.
    """
    if all(of.__module__.startswith("keras.") for of in (type(loss).call, getattr(loss, "fn", type(loss)))):
        return False
    generator = np.random.default_rng(0)

    def rows(tensor: Any, is_binary: bool) -> Any:
        shape = [3, *(3 if length is None else length for length in tensor.shape[1:])]
        numbers = generator.integers(0, 2, shape) if is_binary else generator.uniform(0.1, 0.9, shape)
        if is_binary and math.prod(shape[1:]) == 1:  # of both classes
            numbers[0], numbers[1] = 0, 1
        return tf.cast(tf.constant(numbers), tensor.dtype)

    for is_binary in (True, False):  # labels; then targets that are numbers
        try:
            with tf.init_scope(), keras.StatelessScope():
                y, p = rows(targets, is_binary), rows(outputs, False)
                together, again = (np.asarray(loss.call(y, p), "float64") for _ in range(2))
                alone = np.concatenate([loss.call(y[row : row + 1], p[row : row + 1]) for row in range(3)])
        except Exception:  # whatever a loss that takes no made-up rows may raise
            continue
        if together.shape != alone.shape:  # of pairs, perhaps
            return True
        if not (np.isfinite(together).all() and np.allclose(together, again, 1e-5)):
            continue
        if not np.allclose(together, alone, rtol=1e-2, atol=1e-2 * np.abs(together).max()):
            return True
    return False


def _shape(values: Any, targets: Any) -> list[Any]:
    """The shape of a loss's values; what is not static, from the targets, so that no output is computed for it."""
    return [tf.shape(targets)[axis] if size is None else size for axis, size in enumerate(values.shape)]


def _product(tensors: list[Any]) -> Any:
    """A last axis of length one, that one has more than the other, does not count: as in Keras's losses."""
    *others, last = tensors
    for other in others:
        longer, shorter = sorted((last, other), key=lambda tensor: -len(tensor.shape))
        has_one_more = len(longer.shape) > len(shorter.shape) and longer.shape[-1] == 1
        last = (ops.squeeze(longer, -1) if has_one_more else longer) * shorter
    return last


@contextlib.contextmanager
def activity_as_mean(model: keras.Model, share: Any) -> Iterator[None]:
    """Makes activity regularizers of a part add up like means over examples, which they are since Keras 3.14.

    Before, they were sums over the batch.

    Args:
        model: the model.
        share: examples of the part over examples of the whole batch.
    """
    is_sum = tuple(map(int, keras.__version__.split(".")[:2])) < (3, 14)
    layers = [layer for layer in layers_of(model) if is_sum and layer.activity_regularizer is not None]
    regularizers = [layer.activity_regularizer for layer in layers]
    for layer, regularizer in zip(layers, regularizers, strict=True):
        layer.activity_regularizer = lambda output, of=regularizer: tf.math.divide_no_nan(
            tf.cast(of(output), share.dtype), share
        )
    try:
        yield
    finally:
        for layer, regularizer in zip(layers, regularizers, strict=True):
            layer.activity_regularizer = regularizer
