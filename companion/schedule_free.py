r"""Schedule-free AdamW: gradients at one point, the answer at another. Chapter 16 of the book teaches it.

The weights hold the point of gradients while training. The average, which is the method's answer, stands in a slot, and
:class:`SwapAverage` puts it into the model wherever ``fit`` looks at it.
"""

import math
import warnings
from typing import Any

import keras
from keras import ops

from companion import arguments
from companion.denominators import layers_of
from companion.wrapping import name_of, wrapped_by

_UPDATES, _LARGEST, _SUM, _SHOWN = range(4)  # what `memory` holds


@keras.saving.register_keras_serializable(package="companion")
class ScheduleFreeAdamW(keras.optimizers.Optimizer):
    r"""AdamW without a schedule: its answer is an average of its iterates, and gradients are asked between the two.

    .. math::

       q &\leftarrow \beta_2 q + (1 - \beta_2) g^2 \\
       z &\leftarrow z - h \Bigl(\frac{g}{\sqrt{q / (1 - \beta_2^t)} + \epsilon} + \lambda \theta\Bigr) \\
       x &\leftarrow (1 - c) x + c z \\
       \theta &\leftarrow (1 - \beta_1) z + \beta_1 x

    with :math:`t = 1, 2, \dots` the number of the variable's update and :math:`c = H_t^2 / \sum_{s \le t} H_s^2`, where
    :math:`H_t` is the largest learning rate so far: iterates of a warm-up hardly count. At the start
    :math:`z = x = \theta`. This is the form of the authors' package, schedulefree 1.4.1.

    **The weights hold** :math:`\theta`, **the answer is** :math:`x`. Train with :class:`SwapAverage`, and validation,
    checkpoints and the model after ``fit`` have :math:`x`; in a loop of your own, call :meth:`eval` before you evaluate
    or save and :meth:`train` before you go on. (:class:`SwapAverage` says what BatchNorm needs.)

    Slots, of at least float32 and zero before the first update: ``average`` :math:`x`, ``iterate`` :math:`z` and
    ``velocity`` :math:`q`, of the variable's shape, and ``memory``, four numbers: :math:`t`, :math:`H_t`, the sum, and
    whether the weights hold :math:`x`. The authors keep no :math:`x`, and get it from the weights; here those follow
    from the slots, so nothing is lost by showing :math:`x`, also in half precision.

    A frozen layer stays as it is: freeze it while the weights hold :math:`x`.

    What else moves the weights, such as a constraint that is no convex set, ``set_weights`` or
    :class:`~companion.LocalSGD`, moves :math:`x` and :math:`z` as far.

    Args:
        learning_rate: :math:`h`, see :class:`~companion.SGD`; 1 to 10 times as large as with a schedule. Defaults to
            0.0025.
        beta_1: a number in [0, 1), the share of :math:`x` in the point of gradients. Defaults to 0.9.
        beta_2: a number in [0, 1). Defaults to 0.999.
        epsilon: a number > 0, added to the corrected root. Defaults to 1e-8.
        warmup_steps: an integer :math:`T \ge 0`: in update :math:`t \le T` the learning rate is :math:`h t / T`.
            Defaults to 0.
        weight_decay: :math:`\lambda`, a number :math:`\ge 0`. It acts inside the step, not before it. Defaults to
            ``None``.
        **kwargs: those of ``keras.optimizers.Optimizer``, see :class:`~companion.SGD`.

    Raises:
        ValueError: an argument is outside its interval or not a number.

    Example:
        >>> weight, optimizer = keras.Variable([0.0]), ScheduleFreeAdamW(learning_rate=1.0)
        >>> for _ in range(3):
        ...     optimizer.apply([np.array([-1.0])], [weight])
        ...     print(round(float(weight[0]), 3))
        1.0
        1.55
        2.1
        >>> _ = optimizer.eval()
        >>> float(weight[0])  # the mean of 1, 2 and 3
        2.0

    Keras 3.15 has a ``ScheduleFreeAdamW`` with none of the last two lines: it reads :math:`z` after it was overwritten,
    weighs all iterates alike, decays :math:`\theta` behind the method's back, and never gives :math:`x`.

    References:
        Defazio, Yang, Mehta, Mishchenko, Khaled and Cutkosky, 2024, "The road less scheduled".

    Taught in chapter 16, :doc:`/notebooks/16_one_answer_newer_rules`.
    """

    def __init__(
        self,
        learning_rate: Any = 0.0025,
        beta_1: float = 0.9,
        beta_2: float = 0.999,
        epsilon: float = 1e-8,
        warmup_steps: int = 0,
        weight_decay: float | None = None,
        **kwargs: Any,
    ) -> None:
        rate, decay = arguments.learning_rate(learning_rate), arguments.weight_decay(weight_decay)
        super().__init__(learning_rate=rate, weight_decay=decay, **kwargs)
        self.beta_1 = arguments.number("beta_1", beta_1, 0, 1)
        self.beta_2 = arguments.number("beta_2", beta_2, 0, 1)
        self.epsilon = arguments.number("epsilon", epsilon, 0, include_low=False)
        self.warmup_steps = arguments.integer("warmup_steps", warmup_steps, 0)

    def build(self, variables: list[Any]) -> None:
        """Creates the slots of each variable."""
        if self.built:
            return
        super().build(variables)
        self.averages, self.iterates, self.velocities, self.memories = (
            [self._slot(variable, name) for variable in variables]
            for name in ("average", "iterate", "velocity", "memory")
        )
        self._constraints = tuple(getattr(variable, "constraint", None) for variable in variables)

    def _slot(self, variable: Any, name: str) -> Any:
        dtype, shape = (
            keras.backend.result_type(variable.dtype, "float32"),
            (4,) if name == "memory" else variable.shape,
        )
        return self.add_variable(shape, dtype=dtype, name=f"{name_of(variable).replace('/', '_')}_{name}")

    def update_step(self, gradient: Any, variable: Any, learning_rate: Any) -> None:
        """Moves ``variable`` by one step of the rule."""
        index = self._get_variable_index(variable)
        memory, velocity = self.memories[index], self.velocities[index]
        x, z = self._where(variable, index)
        point, wide = self._between(x, z), x.dtype
        t, largest, total = memory[_UPDATES] + 1, memory[_LARGEST], memory[_SUM]
        h = ops.cast(learning_rate, wide)
        if self.warmup_steps:
            h = ops.multiply(h, ops.minimum(t / self.warmup_steps, 1))
        largest = ops.maximum(largest, h)
        total = total + ops.square(largest)

        gradient = ops.add(ops.zeros_like(x), ops.cast(gradient, wide))  # dense, repeated rows summed
        q = ops.add(ops.multiply(velocity, self.beta_2), ops.multiply(ops.square(gradient), 1 - self.beta_2))
        correction = -ops.expm1(ops.multiply(t, math.log(self.beta_2 or 1e-300)))  # 1 - β₂ᵗ, exact in float32, too
        step = ops.divide(gradient, ops.add(ops.sqrt(ops.divide(q, correction)), self.epsilon))
        if self.weight_decay is not None and self._use_weight_decay(variable):
            step = ops.add(step, ops.multiply(point, float(self.weight_decay)))
        z = ops.subtract(z, ops.multiply(step, h))
        if self._constraints[index] is not None:
            z = self._constraints[index](z)  # where it is convex, x and the point between meet it, too
        x = ops.add(x, ops.multiply(ops.subtract(z, x), ops.divide_no_nan(ops.square(largest), total)))

        for slot, value in ((self.averages[index], x), (self.iterates[index], z), (velocity, q)):
            self.assign(slot, value)
        self.assign(memory, ops.stack([t, largest, total, ops.zeros_like(t)]))
        self.assign(variable, self._between(x, z))

    def _between(self, x: Any, z: Any) -> Any:
        """The point of gradients."""
        return ops.add(z, ops.multiply(ops.subtract(x, z), self.beta_1))

    def _where(self, variable: Any, index: int) -> tuple[Any, Any]:
        """Average and iterate, as far from where they were as somebody else has moved the weights."""
        x, z = (ops.convert_to_tensor(slots[index]) for slots in (self.averages, self.iterates))
        left = ops.where(ops.equal(self.memories[index][_SHOWN], 1), x, self._between(x, z))
        moved = ops.subtract(ops.cast(variable, x.dtype), ops.cast(ops.cast(left, variable.dtype), x.dtype))
        return ops.add(x, moved), ops.add(z, moved)

    def eval(self) -> bool:
        """Puts the average into the weights; returns whether it was not there."""
        return self._show(1)

    def train(self) -> bool:
        """Puts the point of gradients into the weights; returns whether it was not there."""
        return self._show(0)

    def _show(self, average: int) -> bool:
        has_changed = False
        for index, variable in enumerate(self._trainable_variables if self.built else ()):
            *numbers, shown = self.memories[index].numpy()
            if shown != average and variable.trainable:
                has_changed = True
                x, z = self._where(variable, index)
                variable.assign(ops.cast(x if average else self._between(x, z), variable.dtype))
                for slot, value in ((self.averages[index], x), (self.iterates[index], z)):
                    slot.assign(value)
                self.memories[index].assign([*numbers, average])
        return has_changed

    def finalize_variable_values(self, var_list: Any) -> None:
        """Does what Keras does at the end of ``fit``, unless the weights hold the average of this method."""
        trained = [self._get_variable_index(v) for v in self._trainable_variables if v.trainable] if self.built else []
        if not any(self.memories[index].numpy()[_SHOWN] for index in trained):
            super().finalize_variable_values(var_list)

    # Private names of Keras, checked on 3.13.2 and 3.15.1: this one, `_use_weight_decay` and `_trainable_variables`.
    # tests/test_schedule_free.py notices when they move.
    def _apply_weight_decay(self, variables: list[Any]) -> None:
        """Does nothing: decay is a part of the step."""

    def get_config(self) -> dict[str, Any]:
        """Returns the constructor's arguments, for saving."""
        own = ("beta_1", "beta_2", "epsilon", "warmup_steps")
        return {**super().get_config(), **{name: getattr(self, name) for name in own}}


class SwapAverage(keras.callbacks.Callback):
    r"""Shows the average of :class:`ScheduleFreeAdamW` wherever ``fit`` looks at the model.

    .. math::

       \theta = (1 - \beta_1) z + \beta_1 x \;\longleftrightarrow\; x

    While batches are trained on, the weights hold :math:`\theta`. In validation, at the end of an epoch, where
    ``ModelCheckpoint`` saves, and after ``fit`` they hold :math:`x`. Training goes on from where it was, to the last
    bit, also from a file: what is saved says which of the two it holds. (Compiled by XLA, to the last digit.)

    Put it before the callbacks that save or watch weights, and after :class:`~companion.FlushAtEpochEnd`. Give it to
    every ``fit``. A checkpoint that is written between batches (``save_freq`` a number) holds :math:`\theta`; load it,
    and the optimizer's :meth:`~ScheduleFreeAdamW.eval` makes it :math:`x`. It can be given to ``evaluate`` and
    ``predict``, too.

    BatchNorm gathers its statistics at :math:`\theta`, also for validation, and with them :math:`x` can be worse than
    :math:`\theta`; training such a model warns. Use another normalization, or let it gather them at :math:`x` after
    ``fit``: call ``model(batch, training=True)`` for a few hundred training batches before you evaluate or save.

    The optimizer may be wrapped: by a ``LossScaleOptimizer``, a :class:`~companion.GradientAccumulation`, or with
    others in a :class:`~companion.ParameterGroups`.

    Raises:
        ValueError: when ``fit``, ``evaluate`` or ``predict`` begins: the model has no :class:`ScheduleFreeAdamW`.

    Example:
        >>> model = keras.Sequential([keras.Input((1,)), keras.layers.Dense(1)])
        >>> model.compile(ScheduleFreeAdamW(0.1), loss="mse")
        >>> history = model.fit(np.ones((4, 1)), np.ones((4, 1)), verbose=0, callbacks=[SwapAverage()])
        >>> bool(np.all(model.get_weights()[0] == model.optimizer.averages[0].numpy()))
        True

    References:
        Defazio, Yang, Mehta, Mishchenko, Khaled and Cutkosky, 2024, "The road less scheduled".

    Taught in chapter 16, :doc:`/notebooks/16_one_answer_newer_rules`.
    """

    _changed: tuple[Any, ...] = ()  # whose weights `evaluate` or `predict` has changed

    def _swap(self, average: bool) -> tuple[Any, ...]:
        optimizer = getattr(self.model, "optimizer", None)
        found = [layer for layer in wrapped_by(optimizer) if isinstance(layer, ScheduleFreeAdamW)]
        if not found:
            raise ValueError(
                "SwapAverage shows the average of a companion.ScheduleFreeAdamW, and the model has none: compile it "
                "with one, or leave the callback out. (Keras's own class gives no access to its average; for `use_ema` "
                f"there is keras.callbacks.SwapEMAWeights.) Received: optimizer={optimizer!r}"
            )
        return tuple(layer for layer in found if (layer.eval() if average else layer.train()))

    def on_train_begin(self, logs: dict[str, Any] | None = None) -> None:
        """Goes on from where training was, whatever the weights have shown since."""
        self._swap(False)
        norms = [layer for layer in layers_of(self.model) if isinstance(layer, keras.layers.BatchNormalization)]
        if gathering := [layer.name for layer in norms if layer.trainable]:
            warnings.warn(
                "BatchNormalization gathers its statistics where gradients are taken, and with them the average can be "
                "worse than it is: use LayerNormalization or GroupNormalization, or, after `fit`, call "
                "model(batch, training=True) for a few hundred training batches before you evaluate or save. "
                f"Received: {gathering}",
                stacklevel=2,
            )

    def on_epoch_begin(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        """Goes on from where training was."""
        self._swap(False)

    def on_epoch_end(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        """Shows the average to the callbacks that follow."""
        self._swap(True)

    def on_train_end(self, logs: dict[str, Any] | None = None) -> None:
        """Leaves the average in the model."""
        self._swap(True)

    def on_test_begin(self, logs: dict[str, Any] | None = None) -> None:
        """Shows the average to ``evaluate``."""
        self._changed = self._swap(True)

    def on_test_end(self, logs: dict[str, Any] | None = None) -> None:
        """Puts back what was there."""
        for layer in self._changed:
            layer.train()

    def on_predict_begin(self, logs: dict[str, Any] | None = None) -> None:
        """Shows the average to ``predict``."""
        self.on_test_begin()

    def on_predict_end(self, logs: dict[str, Any] | None = None) -> None:
        """Puts back what was there."""
        self.on_test_end()
