"""What every optimizer that wraps another one hands on to it."""

from collections.abc import Iterator
from typing import Any

import keras


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
