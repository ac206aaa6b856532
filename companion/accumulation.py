r"""Many small batches, one update: the soft batch across calls of the training step, around any Keras optimizer.

The model only fits a batch of 16, and you want the step that a batch of 64 would give. :class:`GradientAccumulation`
collects the gradients of four batches and hands their mean, once, to the optimizer that it wraps. Chapters 05 to 07 of
the book teach it.

What it must not do is the mistake of chapter 05: an assignment that is created outside a branch runs whatever the
condition says. Here every branch creates its assignments inside itself. Under ``tf.distribute`` the branches are taken
across replicas, where TensorFlow allows a branch that holds what replicas do together; sums are kept by each replica
for itself, and replicas talk once for an update.
"""

import contextlib
import functools
import math
import operator
import warnings
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import keras
import numpy as np
import tensorflow as tf
from keras import ops

from companion.gradients import all_finite, coalesce
from companion.replicas import brought_by_one
from companion.sums import GradientSums
from companion.wrapping import WrappingOptimizer, wrapped_by

_CHOICES = {
    "normalize": ("mean", "sum", "weight"),
    "accumulator_dtype": ("float32", "float64"),
    "on_nonfinite": ("skip_micro_batch", "skip_window", "raise"),
    "remainder": ("flush", "carry", "drop"),
}
_MICRO_BATCHES, _WEIGHT = 0, 1  # the rows of `window`
_NOT_FINITE = (
    "A gradient of this micro-batch is infinite or NaN, and nothing was changed. Find its cause "
    "(tf.debugging.enable_check_numerics names the operation), or leave such micro-batches out: "
    'GradientAccumulation(..., on_nonfinite="skip_micro_batch").'
)


def _checked_steps(steps: Any) -> Any:
    """Returns ``steps`` as an int ≥ 1, or as the callable that it is, tried at update 0."""
    try:
        if callable(steps):
            first = float(ops.convert_to_numpy(steps(ops.convert_to_tensor(0, "int64"))))
        else:
            first = math.nan if isinstance(steps, bool) else operator.index(steps)
    except (TypeError, ValueError):
        first = math.nan
    if not first >= 1:
        raise ValueError(
            "`steps` must be an integer >= 1, or a callable that takes the index of the update (0, 1, ...) and returns "
            f"a number >= 1. Received: steps={steps!r}" + (f", steps(0)={first}" if callable(steps) else "")
        )
    return steps if callable(steps) else operator.index(steps)


def _checked_optimizer(optimizer: Any) -> Any:
    """Returns the optimizer, or raises the ``ValueError`` that says why it cannot be wrapped."""
    if not isinstance(optimizer, keras.optimizers.Optimizer):
        raise ValueError(
            "`optimizer` must be a keras.optimizers.Optimizer; for a name use keras.optimizers.get(name). "
            f"Received: optimizer={optimizer!r}"
        )
    for layer in wrapped_by(optimizer):
        if isinstance(layer, GradientAccumulation):
            problem = "`optimizer` accumulates already: wrap it once, with the product of both `steps`."
        elif isinstance(layer, keras.optimizers.LossScaleOptimizer):
            problem = (
                "Loss scaling belongs outside, where it sees every micro-batch: write LossScaleOptimizer("
                "GradientAccumulation(optimizer, ...)), or leave it to `compile` and the mixed_float16 policy."
            )
        elif layer.gradient_accumulation_steps:
            problem = (
                "`gradient_accumulation_steps` must not be set on the wrapped optimizer, which would accumulate a "
                f"second time: leave it out, and give `steps` here. Found {layer.gradient_accumulation_steps}."
            )
        else:
            continue
        raise ValueError(f"{problem} Received: optimizer={optimizer!r}")
    return optimizer


def _nothing() -> None:
    """The branch in which nothing happens."""


@keras.saving.register_keras_serializable(package="companion")
class GradientAccumulation(WrappingOptimizer):
    r"""Wraps an optimizer so that it takes one step for every ``steps`` micro-batches, on their mean gradient.

    For micro-batches :math:`i` with weights :math:`w_i`, all gradients :math:`g_i` at the same :math:`\theta`:

    .. math::

       A = \sum_i w_i g_i \qquad W = \sum_i w_i \qquad G = A / W

    and then, once for each update, the wrapped optimizer does with :math:`G` what it would do with the gradient of the
    large batch: unscale, clip, decay, step with the learning rate of *this update*, constrain, average, count. Between
    updates the weights, the slots, the averages and the counters do not change in a single bit.

    Args:
        optimizer: any ``keras.optimizers.Optimizer``. Clipping, decay, averages and schedules are set there, and
            follow updates. Loss scaling goes outside, where ``compile`` puts it under the ``mixed_float16`` policy.
        steps: :math:`N \ge 1`, the number of micro-batches in a window; or a callable (such as a
            ``keras.optimizers.schedules.LearningRateSchedule``) that takes the index of the update, an int64 tensor,
            and returns a number, which is rounded. So it changes at the boundary of a window.
        normalize: ``"mean"``: every :math:`w_i = 1`, right for micro-batches of one size and a loss that is a mean over
            examples. ``"sum"``: :math:`G = A`, for losses with ``reduction="sum"``. ``"weight"``: :math:`w_i` is the
            denominator of the micro-batch's loss (its examples, its valid tokens, its sum of sample weights), right
            for ragged and masked batches; the training step must supply it, as that of ``companion.inject`` does. A
            micro-batch of weight 0 adds nothing, even if its gradient is NaN; a window of weight 0 makes no update.
            Defaults to ``"mean"``.
        accumulator_dtype: ``"float32"`` or ``"float64"``: sums are kept in the wider of this and the variable's dtype.
            Defaults to ``"float32"``.
        on_nonfinite: what becomes of a micro-batch whose gradients hold an infinity or NaN, or overflow when added up.
            ``"skip_micro_batch"``: as if it had not come; the window still waits for ``steps`` others.
            ``"skip_window"``: its window makes no update, as the large batch would not. ``"raise"``:
            ``tf.errors.InvalidArgumentError``, before anything changes (XLA has no assertions, so that with
            ``jit_compile=True`` it is skipped). Defaults to ``"skip_micro_batch"``.
        remainder: what :class:`FlushAtEpochEnd` does with an open window at the end of an epoch, and
            ``finalize_variable_values`` at the end of ``fit``. ``"flush"``: update with what is there. ``"carry"``:
            keep it for the next epoch. ``"drop"``: forget it. Defaults to ``"flush"``.
        **kwargs: ``name``.

    Attributes:
        inner_optimizer: the wrapped optimizer.
        window: for each variable, the number of micro-batches since its last update, and their weight :math:`W`.
        skipped: how many micro-batches ``on_nonfinite`` has left out.

    Raises:
        ValueError: an argument is not one of the above, or ``optimizer`` accumulates already.

    Example:
        >>> weight = keras.Variable([0.0])
        >>> optimizer = GradientAccumulation(keras.optimizers.SGD(learning_rate=1.0), steps=2)
        >>> for gradient in (1.0, 3.0, 5.0):
        ...     optimizer.apply([np.array([gradient])], [weight])
        ...     print(weight.numpy()[0])
        0.0
        -2.0
        -2.0
        >>> optimizer.flush()
        >>> print(weight.numpy()[0])
        -7.0

    Variables may be applied in subsets. Each variable has its own window, and a call updates its variables together, as
    soon as every one of them has received ``steps`` micro-batches since its own last update. With disjoint subsets that
    is a window for each subset; ``iterations`` counts the updates of all subsets, as in Keras.

    The gradient of an embedding stays sparse: the wrapped optimizer receives the rows that the window has touched, each
    once, however often its id occurred.

    The state can be saved at any position of a window, and loaded with another ``steps``, 1 included. A run that began
    without accumulation goes on with ``model.compile(GradientAccumulation(model.optimizer, steps), ...)``, which keeps
    the state of ``model.optimizer``.

    Keras's ``gradient_accumulation_steps`` lets schedules, averages and constraints follow micro-batches, loses what is
    left at the end, and does not run under ``tf.distribute.MirroredStrategy``. Here it does; there ``"mean"`` and
    ``"sum"`` take gradients that add up to the global one, as ``fit`` computes them, and ``"weight"`` takes the
    gradient of each replica's own mean.

    References:
        Ott, Edunov, Grangier and Auli, 2018, "Scaling neural machine translation".

    Taught in chapters 06 and 07, :doc:`/notebooks/06_the_fix` and :doc:`/notebooks/07_accumulation_in_practice`.
    """

    def __init__(
        self,
        optimizer: Any,
        steps: int | Callable[[Any], Any],
        normalize: str = "mean",
        accumulator_dtype: str = "float32",
        on_nonfinite: str = "skip_micro_batch",
        remainder: str = "flush",
        **kwargs: Any,
    ) -> None:
        if others := sorted(set(kwargs) - {"name"}):
            raise ValueError(f"Arguments of an optimizer are set on the wrapped `optimizer`. Received: {others}")
        optimizer, steps = _checked_optimizer(optimizer), _checked_steps(steps)
        chosen = dict(zip(_CHOICES, (normalize, accumulator_dtype, on_nonfinite, remainder), strict=True))
        for name, value in chosen.items():
            if value not in _CHOICES[name]:
                raise ValueError(f"`{name}` must be one of {_CHOICES[name]}. Received: {name}={value!r}")
        super().__init__(**kwargs)
        self.inner_optimizer = optimizer
        self.steps = steps
        self.normalize, self.accumulator_dtype = normalize, accumulator_dtype
        self.on_nonfinite, self.remainder = on_nonfinite, remainder
        self.skipped = self.add_variable((), dtype="int64", aggregation="only_first_replica", name="skipped")
        self._strategy = tf.distribute.get_strategy()
        self._given_weight: Any = None
        self._subsets: frozenset[tuple[int, ...]] = frozenset()  # of variables that came together so far

    @property
    def variables(self) -> list[Any]:
        """The variables of the window, then those of the wrapped optimizer."""
        return [*super().variables, *self.inner_optimizer.variables]

    def finalize_variable_values(self, var_list: Any) -> None:
        """Does at the end of training what ``remainder`` says, then what the wrapped optimizer does."""
        self.end_epoch()
        super().finalize_variable_values(var_list)

    # The state of the window.

    def build(self, variables: list[Any]) -> None:
        """Creates an accumulator for each variable, and the wrapped optimizer's slots."""
        if self.built:
            return
        if any(getattr(variable, "overwrite_with_gradient", False) for variable in variables):
            raise ValueError(
                "The scales of float8 layers are overwritten by their gradients, which have no mean: train a float8 "
                "model without GradientAccumulation."
            )
        if not self.inner_optimizer.built:
            self.inner_optimizer.build(variables)
        super().build(variables)
        with keras.name_scope(self.name):
            self._sums = GradientSums(variables, self.accumulator_dtype)
        # Keras saves the variables that are attributes.
        self._accumulators, self._touched = self._sums.accumulators, self._sums.touched
        self.window = self.add_variable((2, len(variables)), dtype="float64", name="window")

    def _in_window(self, row: int, subset: tuple[int, ...], reduce: Callable[..., Any]) -> Any:
        """The least or the largest of the numbers that ``window`` holds for a subset."""
        numbers = ops.convert_to_tensor(self.window)[row]
        return reduce(numbers if len(subset) == len(self._accumulators) else tf.gather(numbers, subset))

    def _members(self, subset: tuple[int, ...]) -> np.ndarray:
        """1 for the variables of a subset and 0 for the others, in the shape of ``window``."""
        return np.tile(np.isin(np.arange(len(self._accumulators)), subset).astype("float64"), (2, 1))

    # A call of the training step.

    @contextlib.contextmanager
    def weighed(self, weight: Any) -> Iterator[None]:
        """During this context, ``apply`` takes ``weight`` if it is given none: for a step that wraps this optimizer."""
        self._given_weight = weight
        try:
            yield
        finally:
            self._given_weight = None

    def apply(self, grads: Iterable[Any], trainable_variables: Any = None, weight: Any = None) -> None:
        r"""Adds the gradients of a micro-batch to the window, and updates the variables if that fills it.

        Args:
            grads: a gradient for each variable; ``None`` where there is none.
            trainable_variables: the variables. Defaults to those that the optimizer was built with.
            weight: :math:`w_i \ge 0`, a number or a scalar tensor; used with ``normalize="weight"`` alone.

        Raises:
            ValueError: the optimizer is not built and there are no variables; variables and gradients do not match; a
                variable is unknown; ``normalize="weight"`` without a weight.
        """
        if tf.distribute.in_cross_replica_context():
            raise ValueError("apply() must be called in a replica context: in the function given to strategy.run().")
        if self.normalize == "weight":
            weight = self._given_weight if weight is None else weight
            if weight is None:
                raise ValueError(
                    '`normalize="weight"` needs the denominator of each loss, which the training step supplies. Call '
                    "companion.inject(model) after compile, or apply(grads, variables, weight=...) in your own loop. "
                    "Received: weight=None"
                )
            weight = tf.reshape(tf.cast(weight, "float64"), ())
        else:
            weight = None
        grads = list(grads)
        if grads:
            pairs = self._pairs(grads, trainable_variables)
            subset = tuple(sorted(pairs))
            known = {index for other in self._subsets for index in other}
            if not self.loss_scale_factor:  # Keras cannot divide a sparse gradient by it
                # The kind of gradient that comes first stays the variable's kind in this process.
                self._sums.sparse |= {i for i in subset if isinstance(pairs[i], tf.IndexedSlices)} - known
            self._subsets |= {subset}
            self._across_replicas(functools.partial(self._micro_step, subset), [pairs[i] for i in subset], weight)

    def _pairs(self, gradients: list[Any], variables: Any) -> dict[int, Any]:
        """Returns the gradients that are not ``None`` by the index of their variable. Builds what is not built."""
        if variables is None and not self.built:
            raise ValueError(
                "The optimizer does not know its variables yet: call optimizer.build(variables) first, or give them: "
                "optimizer.apply(grads, variables)."
            )
        # `_trainable_variables` and `_get_variable_index` are private in Keras; checked on 3.13.2 and 3.15.1.
        variables = list(self._trainable_variables if variables is None else variables)
        if len(variables) != len(gradients):
            raise ValueError(
                f"`grads` must hold a gradient for each variable. Received: {len(gradients)} gradients for "
                f"{len(variables)} variables"
            )
        self.build(variables)
        pairs, missing = {}, []
        for gradient, variable in zip(gradients, variables, strict=True):
            name = getattr(variable, "path", variable.name)
            try:
                index = self._get_variable_index(variable)
            except KeyError:
                raise ValueError(
                    "The optimizer was built with other variables: create a new one for a new set of variables. "
                    f"Received: variable={name!r}"
                ) from None
            if gradient is None:
                missing.append(name)
            else:
                sparse = isinstance(gradient, tf.IndexedSlices)
                pairs[index] = gradient if sparse else tf.convert_to_tensor(gradient)
        if not pairs:
            raise ValueError(f"No gradients provided for any variable. Received: grads={gradients}")
        if missing:
            warnings.warn(f"Gradients do not exist for variables {missing}; they are left as they are.", stacklevel=3)
        return pairs

    def _across_replicas(self, function: Callable[..., None], *args: Any) -> None:
        """Calls ``function(strategy, *args)`` where a branch may hold what replicas do together."""
        if tf.distribute.in_cross_replica_context():
            function(tf.distribute.get_strategy(), *args)
        elif tf.distribute.has_strategy() or self._strategy is tf.distribute.get_strategy():
            tf.distribute.get_replica_context().merge_call(function, args=args)
        else:  # flush() outside the scope of the optimizer's strategy
            with self._strategy.scope():
                function(self._strategy, *args)

    def _everywhere(self, strategy: Any, condition: Callable[..., Any], *args: Any) -> Any:
        """Whether a condition holds on every replica: one answer for all of them."""
        answers = strategy.extended.call_for_each_replica(condition, args=args)
        if strategy.num_replicas_in_sync == 1:
            return answers
        failures = strategy.extended.call_for_each_replica(lambda answer: tf.cast(~answer, "float32"), args=(answers,))
        return strategy.reduce("SUM", failures, axis=None) == 0

    def _micro_step(self, subset: tuple[int, ...], strategy: Any, gradients: list[Any], weight: Any) -> None:
        """Does one of three things: leaves the micro-batch out, accumulates it, or updates with it."""

        def count() -> None:
            added = self._members(subset)
            if weight is not None:
                shares = tf.stack([[1.0], [strategy.reduce("SUM", weight, axis=None)]])
                added = tf.math.multiply_no_nan(shares, added)  # a weight that is NaN is NaN in its own windows only
            self.window.assign_add(added)

        def accumulate() -> None:
            strategy.extended.call_for_each_replica(self._sums.add, args=(subset, gradients, weight))
            count()

        def update() -> None:
            count()
            self._end_window(subset, strategy, gradients, weight)

        steps = self.steps
        if callable(steps):
            steps = tf.cast(steps(ops.convert_to_tensor(self.iterations)), "float64")
        fills = self._in_window(_MICRO_BATCHES, subset, tf.reduce_min) >= steps - 1.5  # rounded, and this one counts
        if self.on_nonfinite == "skip_window":
            tf.cond(fills, update, accumulate)
            return
        finite = self._everywhere(strategy, self._is_usable, subset, gradients, weight)
        if self.on_nonfinite == "raise":
            with tf.control_dependencies([tf.debugging.Assert(finite, [_NOT_FINITE])]):
                finite = tf.identity(finite)
        choice = tf.where(finite, tf.where(fills, 2, 1), 0)
        tf.switch_case(choice, [lambda: self._skip(1), accumulate, update])

    def _end_window(self, subset: tuple[int, ...], strategy: Any, gradients: Any = None, weight: Any = None) -> None:
        """Updates with what the window holds, and with the gradients of a last micro-batch; then empties it."""
        replicas = strategy.extended.call_for_each_replica
        sums = replicas(self._sums.read, args=(subset, gradients, weight))

        def update() -> None:
            replicas(self._update, args=(subset, sums))

        conditions = []
        if self.normalize == "weight":
            conditions.append(self._in_window(_WEIGHT, subset, tf.reduce_max) > 0)
        if self.on_nonfinite == "skip_window":
            finite = self._everywhere(strategy, all_finite, sums)
            lost = tf.cast(self._in_window(_MICRO_BATCHES, subset, tf.reduce_min), "int64")
            tf.cond(finite, _nothing, lambda: self._skip(lost))
            conditions.append(finite)
        if conditions:
            tf.cond(tf.reduce_all(conditions), update, _nothing)
        else:
            update()
        self._empty_window(subset, strategy)

    def _empty_window(self, subset: tuple[int, ...], strategy: Any) -> None:
        strategy.extended.call_for_each_replica(self._sums.clear, args=(subset,))
        self.window.assign(tf.math.multiply_no_nan(ops.convert_to_tensor(self.window), 1 - self._members(subset)))

    def _skip(self, micro_batches: Any) -> None:
        self.skipped.assign_add(micro_batches)

    def _is_usable(self, subset: tuple[int, ...], gradients: list[Any], weight: Any) -> Any:
        finite = all_finite(self._sums.terms(subset, gradients, weight))
        return finite if weight is None else finite & tf.math.is_finite(weight)

    def _update(self, subset: tuple[int, ...], sums: list[Any]) -> None:
        """Hands the gradient of the window to the wrapped optimizer."""
        context = tf.distribute.get_replica_context()
        if context.num_replicas_in_sync > 1:
            sums = brought_by_one([coalesce(total) for total in context.all_reduce(tf.distribute.ReduceOp.SUM, sums)])
        weights = ops.convert_to_tensor(self.window)[_WEIGHT]
        weights = tf.unstack(tf.where(weights > 0, weights, 1))
        merged, variables = [], [self._trainable_variables[index] for index in subset]
        for index, total, variable in zip(subset, sums, variables, strict=True):
            sparse = isinstance(total, tf.IndexedSlices)
            values = total.values if sparse else total
            if self.normalize != "sum":
                values = values / tf.cast(weights[index], values.dtype)
            values = tf.cast(values, keras.backend.standardize_dtype(variable.dtype))
            merged.append(tf.IndexedSlices(values, total.indices, total.dense_shape) if sparse else values)
        self.inner_optimizer.apply(merged, variables)

    # The end of a window that is not full.

    def flush(self) -> None:
        """Updates with the micro-batches that are there, as with one short batch. Without any, does nothing."""
        self._end_open_windows(update=True)

    def drop(self) -> None:
        """Forgets the micro-batches that are there."""
        self._end_open_windows(update=False)

    def end_epoch(self) -> None:
        """Does what ``remainder`` says: ``flush()``, ``drop()``, or nothing."""
        if self.remainder != "carry":
            self._end_open_windows(update=self.remainder == "flush")

    def _end_open_windows(self, update: bool) -> None:
        if not self.built:
            return
        everything = tuple(range(len(self._accumulators)))
        if not tf.executing_eagerly():
            self._end_windows(tuple(sorted(self._subsets)) or (everything,), self._sums.sparse, update)
            return
        is_open, groups = set(np.flatnonzero(self.window.numpy()[_MICRO_BATCHES]).tolist()), []
        for subset in (*sorted(self._subsets), everything):
            groups.append(tuple(index for index in subset if index in is_open))
            is_open -= set(subset)
        if any(groups):
            # Replicas meet in compiled functions only; a single one needs none for what happens once in an epoch.
            end = self._end_windows if self._strategy.num_replicas_in_sync == 1 else self._compiled_end_windows
            end(tuple(group for group in groups if group), self._sums.sparse, update)

    @functools.cached_property
    def _compiled_end_windows(self) -> Any:
        return tf.function(self._end_windows, autograph=False)

    def _end_windows(self, groups: tuple[tuple[int, ...], ...], sparse: frozenset[int], update: bool) -> None:
        """Ends the windows that hold a micro-batch. ``sparse`` is there because a compiled function depends on it."""
        end = self._end_window if update else self._empty_window

        def end_if_open(strategy: Any, subset: tuple[int, ...]) -> None:
            is_open = self._in_window(_MICRO_BATCHES, subset, tf.reduce_min) > 0
            tf.cond(is_open, lambda: end(subset, strategy), _nothing)

        for group in groups:
            self._across_replicas(functools.partial(end_if_open, subset=group))

    # Saving.

    def get_config(self) -> dict[str, Any]:
        """Returns the constructor's arguments, for saving."""
        return {
            "name": self.name,
            "optimizer": keras.saving.serialize_keras_object(self.inner_optimizer),
            "steps": keras.saving.serialize_keras_object(self.steps),
            **{name: getattr(self, name) for name in _CHOICES},
        }

    @classmethod
    def from_config(cls, config: dict[str, Any], custom_objects: dict[str, Any] | None = None) -> Any:
        """Creates an optimizer from what ``get_config`` has returned."""
        objects = {
            name: keras.saving.deserialize_keras_object(config[name], custom_objects=custom_objects)
            for name in ("optimizer", "steps")
        }
        return cls(**{**config, **objects})


class FlushAtEpochEnd(keras.callbacks.Callback):
    r"""Ends the open window of a :class:`GradientAccumulation` at the end of each epoch, as its ``remainder`` says.

    An optimizer cannot know that an epoch has ended. With this callback the last window of an epoch, of
    :math:`n < N` micro-batches, becomes an update of its own, on

    .. math::

       G = \sum_{i \le n} w_i g_i \Big/ \sum_{i \le n} w_i

    (``remainder="flush"``), or is forgotten (``"drop"``); with ``"carry"`` the callback does nothing. Without the
    callback the window goes on in the next epoch, and ``remainder`` is obeyed once, at the end of ``fit``.

    The window ends before the epoch's validation. Put the callback before those that save the model.

    Raises:
        ValueError: when ``fit`` begins: the model's optimizer is not a :class:`GradientAccumulation`.

    Example:
        >>> model = keras.Sequential([keras.Input((1,)), keras.layers.Dense(1)])
        >>> model.compile(GradientAccumulation(keras.optimizers.SGD(), steps=4), loss="mse")
        >>> inputs, targets = np.ones((6, 1)), np.ones((6, 1))
        >>> history = model.fit(inputs, targets, 1, epochs=3, verbose=0, callbacks=[FlushAtEpochEnd()])
        >>> int(model.optimizer.iterations)  # two in each epoch: of 4 and of 2 micro-batches
        6

    References:
        Ott, Edunov, Grangier and Auli, 2018, "Scaling neural machine translation".

    Taught in chapter 07, :doc:`/notebooks/07_accumulation_in_practice`.
    """

    def on_train_begin(self, logs: dict[str, Any] | None = None) -> None:
        """Finds the optimizer."""
        found = [layer for layer in wrapped_by(self.model.optimizer) if isinstance(layer, GradientAccumulation)]
        if not found:
            raise ValueError(
                "FlushAtEpochEnd needs a model compiled with a GradientAccumulation. "
                f"Received: optimizer={self.model.optimizer!r}"
            )
        self._end_epoch, self._in_epoch = found[0].end_epoch, False

    def on_epoch_begin(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        """Notes that an epoch is running."""
        self._in_epoch = True

    def on_test_begin(self, logs: dict[str, Any] | None = None) -> None:
        """Ends the window before the epoch's validation, which comes before the epoch's end."""
        if getattr(self, "_in_epoch", False):
            self._end_epoch()
            self._in_epoch = False

    def on_epoch_end(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        """Ends the window where there was no validation."""
        self.on_test_begin()
