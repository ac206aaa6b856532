"""What every optimizer that wraps another one hands on to it."""

from collections.abc import Iterator
from typing import Any

import keras
import tensorflow as tf

from companion.gradients import coalesce


class WrappingOptimizer(keras.optimizers.Optimizer):
    """Base class of optimizers around another one, which keeps the learning rate, the counter and the loss scale.

    Attributes:
        inner_optimizer: the wrapped optimizer, to be set by the subclass.

    Args:
        **kwargs: those of ``keras.optimizers.Optimizer``; of these a wrapper uses ``name`` only.
    """

    inner_optimizer: Any

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(learning_rate=0.0, **kwargs)

    @property
    def iterations(self) -> Any:
        """The wrapped optimizer's count of updates."""
        return self.inner_optimizer.iterations

    @property
    def learning_rate(self) -> Any:
        """The wrapped optimizer's learning rate, which can be set here."""
        return self.inner_optimizer.learning_rate

    @learning_rate.setter
    def learning_rate(self, value: Any) -> None:
        self.inner_optimizer.learning_rate = value

    @property
    def loss_scale_factor(self) -> Any:
        """The wrapped optimizer's factor on the loss; a ``LossScaleOptimizer`` around this one sets it to ``None``."""
        return self.inner_optimizer.loss_scale_factor

    @loss_scale_factor.setter
    def loss_scale_factor(self, value: Any) -> None:
        if hasattr(self, "inner_optimizer"):  # the base class's constructor sets its default before there is one
            self.inner_optimizer.loss_scale_factor = value

    def scale_loss(self, loss: Any) -> Any:
        """Scales the loss as the wrapped optimizer does."""
        return self.inner_optimizer.scale_loss(loss)

    def exclude_from_weight_decay(self, var_list: Any = None, var_names: Any = None) -> None:
        """Excludes variables from the wrapped optimizer's weight decay."""
        self.inner_optimizer.exclude_from_weight_decay(var_list=var_list, var_names=var_names)

    def finalize_variable_values(self, var_list: Any) -> None:
        """Lets the wrapped optimizer put its moving averages into the weights."""
        self.inner_optimizer.finalize_variable_values(var_list)


def wrapped_by(optimizer: Any) -> Iterator[Any]:
    """Yields an optimizer and all that it wraps, from the outside to the inside.

    Args:
        optimizer: a ``keras.optimizers.Optimizer``, or ``None``, which wraps nothing.
    """
    while optimizer is not None:
        yield optimizer
        yield from getattr(optimizer, "optimizers", ())
        optimizer = getattr(optimizer, "inner_optimizer", None)


@keras.saving.register_keras_serializable(package="companion")
class CoalesceGradients(WrappingOptimizer):
    r"""Any Keras optimizer, with the rows of sparse gradients that share an id summed first.

    Keras 3 squares each occurrence of a row by itself. For a row that occurs with gradients :math:`r_1, \dots, r_k`,
    the second moments of Adam, RMSprop, Adagrad and their kin, and every norm that clipping computes, use

    .. math::

       \sum_k r_k^2 \quad\text{(Keras)} \qquad\text{instead of}\qquad
       \Bigl(\sum_k r_k\Bigr)^2 \quad\text{(here, and in a dense lookup)}.

    With this wrapper every built-in optimizer of Keras 3.13 and 3.15 steps as if the lookup were a product with a
    one-hot matrix, weights and slots, clipped or not. That includes the rows that are not in the batch: Keras decays
    their slots whether or not the gradient is sparse. Without the wrapper it holds for SGD, with or without momentum,
    Lion and Muon's own rule, which add up gradients before they do anything else, as long as nothing clips.

    On several replicas Keras merges sparse gradients by concatenating them, which repeats ids anew; so the rows are
    summed once more after the merge. For this, ``build`` wraps the ``update_step`` of the inner optimizer. Clipping
    stays where Keras has it: on each replica, before the merge.

    Args:
        optimizer: a ``keras.optimizers.Optimizer``. Its settings stay its own: clipping, weight decay, moving averages,
            ``loss_scale_factor`` and ``gradient_accumulation_steps`` are given to it, not here. Under
            ``loss_scale_factor``, which Keras cannot divide a sparse gradient by, gradients become dense.
        name: a name for the wrapper. Defaults to one made from the class.

    Attributes:
        inner_optimizer: the optimizer given.

    Raises:
        ValueError: ``optimizer`` is not an optimizer, is already a ``CoalesceGradients``, or is a
            ``LossScaleOptimizer``, which belongs outside (``compile`` puts it there).

    Example:
        >>> import tensorflow as tf
        >>> weight = keras.Variable(np.zeros((3, 1)))
        >>> gradient = tf.IndexedSlices(tf.constant([[3.0], [1.0]]), indices=[2, 2], dense_shape=[3, 1])
        >>> optimizer = CoalesceGradients(keras.optimizers.Adagrad(1.0, initial_accumulator_value=0.0))
        >>> optimizer.apply([gradient], [weight])  # 4 / √(4²); Keras alone: 4 / √(3² + 1²) = 1.26
        >>> weight.numpy().ravel().round(4).tolist()
        [0.0, 0.0, -1.0]

    References:
        Duchi, Hazan and Singer, 2011, "Adaptive subgradient methods for online learning and stochastic optimization".

    Taught in chapter 07, :doc:`/notebooks/07_accumulation_in_practice`.
    """

    def __init__(self, optimizer: Any, name: str | None = None) -> None:
        if not isinstance(optimizer, keras.optimizers.Optimizer):
            raise ValueError(
                "`optimizer` must be an instance of `keras.optimizers.Optimizer`, such as `keras.optimizers.Adam()`. "
                f"Received: optimizer={optimizer!r} (of type {type(optimizer)})"
            )
        if isinstance(optimizer, CoalesceGradients):
            raise ValueError(
                "`optimizer` sums repeated rows already: pass the optimizer inside it, `optimizer.inner_optimizer`. "
                f"Received: optimizer={optimizer!r}"
            )
        if isinstance(optimizer, keras.optimizers.LossScaleOptimizer):
            raise ValueError(
                "`optimizer` must not be a `LossScaleOptimizer`: put that outside, LossScaleOptimizer("
                "CoalesceGradients(...)), or leave it to `model.compile`, which adds one under mixed_float16. "
                f"Received: optimizer={optimizer!r}"
            )
        super().__init__(name=name)
        self.inner_optimizer = optimizer

    def build(self, variables: list[Any]) -> None:
        """Builds the inner optimizer, unless it has been in use before."""
        if self.built:
            return
        if not self.inner_optimizer.built:
            self.inner_optimizer.build(variables)
        super().build(variables)
        if tf.distribute.get_strategy().num_replicas_in_sync > 1:
            for optimizer in getattr(self.inner_optimizer, "optimizers", [self.inner_optimizer]):  # MultiOptimizer
                optimizer.update_step = _coalesce_first(optimizer.update_step)

    def apply(self, grads: Any, trainable_variables: Any = None) -> None:
        """Sums repeated rows and lets the inner optimizer make its step."""
        if trainable_variables is not None:
            trainable_variables = list(trainable_variables)
            self.build(trainable_variables)
        elif not self.built:
            raise ValueError(
                "`trainable_variables` must be given to the first `apply`, or to `build` before it. "
                "Received: trainable_variables=None"
            )
        grads = [coalesce(gradient) for gradient in grads]
        if self.loss_scale_factor is not None:
            grads = [tf.convert_to_tensor(g) if isinstance(g, tf.IndexedSlices) else g for g in grads]
        self.inner_optimizer.apply(grads, trainable_variables)

    @property
    def variables(self) -> list[Any]:
        """The inner optimizer's variables: the wrapper has no state."""
        return self.inner_optimizer.variables

    def set_weights(self, weights: Any) -> None:
        """Sets the inner optimizer's variables."""
        self.inner_optimizer.set_weights(weights)

    def save_own_variables(self, store: Any) -> None:
        """Saves nothing: Keras saves the attribute ``inner_optimizer`` by itself."""

    def load_own_variables(self, store: Any) -> None:
        """Loads nothing: Keras loads the attribute ``inner_optimizer`` by itself."""

    def get_config(self) -> dict[str, Any]:
        """Returns the constructor's arguments, for saving."""
        return {"optimizer": keras.saving.serialize_keras_object(self.inner_optimizer), "name": self.name}

    @classmethod
    def from_config(cls, config: dict[str, Any], custom_objects: dict[str, Any] | None = None) -> "CoalesceGradients":
        """Returns a wrapper made from what :meth:`get_config` returned."""
        optimizer = keras.saving.deserialize_keras_object(config["optimizer"], custom_objects=custom_objects)
        return cls(**{**config, "optimizer": optimizer})


def _coalesce_first(update_step: Any) -> Any:
    """Returns ``update_step`` for a gradient whose rows may repeat."""

    def coalesce_and_update(gradient: Any, variable: Any, learning_rate: Any) -> None:
        update_step(coalesce(gradient), variable, learning_rate)

    return coalesce_and_update
