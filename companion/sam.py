r"""Sharpness-aware minimisation: a question asked uphill, around any optimizer. Chapter 17 of the book teaches it."""

from typing import Any

import keras
import tensorflow as tf

from companion import arguments
from companion.gradients import moved
from companion.injection import InjectedOptimizer
from companion.wrapping import WrappingOptimizer


@keras.saving.register_keras_serializable(package="companion")
class SAM(WrappingOptimizer, InjectedOptimizer):
    r"""Any optimizer, handed the gradient where the loss is worst nearby: for minima that are flat.

    .. math::

       \hat\epsilon = \rho\, \frac{\nabla L(\theta)}{\lVert \nabla L(\theta) \rVert} \qquad
       g = \nabla L(\theta + \hat\epsilon)

    It asks twice a step: at the weights, and from there a distance :math:`\rho` uphill, by the norm over all weights.
    The optimizer inside takes its step from :math:`\theta` with :math:`g`. So it costs two gradients a step. Where the
    gradient is zero, both questions are asked at :math:`\theta`. Where weights have constraints, it asks at what they
    make of the point: the nearest one that meets them, if they are projections.

    Both questions are about the same batch, with the same dropout masks; metrics and BatchNorm's statistics move as if
    only the first had been asked. The norm is that of the whole batch, in however many ``micro_batches`` and on however
    many replicas, where implementations of the paper take that of each device.

    Needs :func:`~companion.inject`: see :class:`~companion.InjectedOptimizer`.

    Args:
        optimizer: the ``keras.optimizers.Optimizer`` that takes the step. Its settings stay its own: learning rate,
            clipping, weight decay, moving averages; what is set here later reaches it, from a scheduler, too. Not one
            that asks several times itself.
        rho: :math:`\rho`, how far uphill, a number of at least 0. With 0 it is the optimizer inside, at twice its
            price, if constraints leave alone what meets them. Compiled steps hold it. Defaults to 0.05.
        name: a name. Defaults to one made from the class.

    Attributes:
        inner_optimizer: the optimizer given.

    Raises:
        RuntimeError: ``fit`` runs without :func:`~companion.inject`.
        ValueError: ``optimizer`` is not an optimizer, is a ``SAM`` or a ``LossScaleOptimizer``, which belongs outside;
            or ``rho`` is not as above.

    Example:
        >>> model = keras.Sequential([keras.layers.Dense(1, use_bias=False, kernel_initializer="ones")])
        >>> optimizer = SAM(keras.optimizers.SGD(0.25), rho=0.5)
        >>> model.compile(optimizer, loss=lambda y, p: keras.ops.mean(p**2) / 2)
        >>> model = optimizer.inject(model)
        >>> loss = model.train_on_batch(np.ones((1, 1)), np.zeros((1, 1)))
        >>> print(model.layers[0].kernel.numpy())  # 1 - 0.25 * 1.5: the slope at 1 + 0.5 is 1.5
        [[0.625]]

    References:
        Foret, Kleiner, Mobahi and Neyshabur, 2021, "Sharpness-aware minimization for efficiently improving
        generalization".

    Taught in chapter 17, :doc:`/notebooks/17_asking_until_satisfied`.
    """

    _twice, _hands_rate = "`optimizer` asks uphill already: wrap it once.", False
    rho: Any = None  # what is this class's own, also where the wrapped optimizer has one, as Adadelta does

    def __init__(self, optimizer: Any, rho: float = 0.05, name: str | None = None) -> None:
        super().__init__(optimizer, name)
        self.rho = arguments.number("rho", rho, 0)

    def direction(self, oracle: Any, values: list[Any], learning_rate: Any) -> list[Any]:
        """The gradient uphill, found in units of the largest slope, so that no square over- or underflows."""
        slopes = oracle(values)
        largest = tf.reduce_max([tf.reduce_max(tf.abs(slope)) for slope in slopes])
        units = [tf.math.divide_no_nan(slope, largest) for slope in slopes]
        norm = tf.linalg.global_norm(units)
        far = tf.math.divide_no_nan(tf.constant(self.rho, norm.dtype), norm)
        return oracle(moved(values, far, units))

    def apply(self, grads: Any, trainable_variables: Any = None) -> Any:
        """Lets the wrapped optimizer take its step. Raises ``RuntimeError`` if nobody has asked."""
        if not self._stepping:
            return super().apply(grads, trainable_variables)
        return self.inner_optimizer.apply(grads, trainable_variables)

    @property
    def variables(self) -> list[Any]:
        """The wrapped optimizer's variables: there are no others."""
        return self.inner_optimizer.variables

    def save_own_variables(self, store: Any) -> None:
        """Saves nothing: Keras saves the attribute ``inner_optimizer`` by itself."""

    def load_own_variables(self, store: Any) -> None:
        """Loads nothing: Keras loads the attribute ``inner_optimizer`` by itself."""

    def get_config(self) -> dict[str, Any]:
        """Returns the constructor's arguments, for saving."""
        return {**super().get_config(), "rho": self.rho}
