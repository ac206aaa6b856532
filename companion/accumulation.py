r"""Many small batches, one update: the soft batch across calls of the training step, around any Keras optimizer.

The mistake of chapter 05 is an assignment that is created outside a branch and runs whatever the condition says. Here
every branch creates its assignments inside itself. Under ``tf.distribute`` the branches are taken across replicas,
where TensorFlow allows a branch that holds what replicas do together; they talk once for an update.
"""

import functools
import itertools
import types
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import keras
import numpy as np
import tensorflow as tf
from keras import ops

from companion import arguments
from companion.gradients import all_finite, coalesce
from companion.replicas import across_replicas, brought_by_one, everywhere, replica_id
from companion.sums import GradientSums, MicroBatch, Windows, fitting_weight, of_subset
from companion.wrapping import WrappingOptimizer, averages_of, index_in, name_of, wrapped_by

_CHOICES = {
    "normalize": ("mean", "sum", "weight"),
    "accumulator_dtype": ("float32", "float64"),
    "on_nonfinite": ("skip_micro_batch", "skip_window", "raise"),
    "remainder": ("flush", "carry", "drop"),
}
_MICRO_BATCHES, _WEIGHT = 0, 1  # the rows of `window`
_NOT_FINITE = (
    "A gradient of this micro-batch is infinite or NaN, and nothing was changed. Find its cause (tf.debugging."
    'enable_check_numerics names the operation), or leave such ones out: on_nonfinite="skip_micro_batch".'
)


def _length(steps: Any) -> Callable[[Any], Any]:
    """Returns what says how long the window of an update is, tried at update 0."""
    if callable(steps):
        arguments.number("steps(0)", steps(ops.convert_to_tensor(0, "int64")), 1)
        return steps
    length = arguments.integer("steps", steps, 1)
    return lambda update: length


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
            denominator of the micro-batch's loss (examples, valid tokens, sum of sample weights), right for ragged and
            masked batches; the training step must supply it, as that of ``companion.inject`` does. What has weight 0
            adds nothing, even if it is NaN; a window of weight 0 makes no update. Defaults to ``"mean"``.
        accumulator_dtype: ``"float32"`` or ``"float64"``: sums are kept in the wider of this and the variable's dtype.
            Defaults to ``"float32"``.
        on_nonfinite: what becomes of a micro-batch whose gradients hold an infinity or NaN, or overflow when added up.
            ``"skip_micro_batch"``: as if it had not come; the window still waits for ``steps`` others.
            ``"skip_window"``: its window makes no update, as the large batch would not. ``"raise"``:
            ``tf.errors.InvalidArgumentError``, before anything changes (with ``jit_compile=True``, where there are no
            assertions, it is skipped). Defaults to ``"skip_micro_batch"``.
        remainder: what :class:`FlushAtEpochEnd` does with an open window at the end of an epoch, and
            ``finalize_variable_values`` at the end of ``fit``. ``"flush"``: update with what is there. ``"carry"``:
            keep it for the next epoch. ``"drop"``: forget it. Defaults to ``"flush"``.
        **kwargs: ``name``.

    Attributes:
        inner_optimizer: the wrapped optimizer. What is set here but not this class's own (``clipnorm``, ``momentum``)
            is set there. Of its own, ``remainder`` can be set.
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

    Variables may be applied in subsets. Those of a call are updated together, each by the mean of what it has received
    since its own last update, as soon as every one has received ``steps`` micro-batches, or the same subset has come
    ``steps`` times since its last update. So two players have windows of their own, and a variable that is in every
    second call is trained, too. ``iterations`` counts the updates of all subsets, as in Keras. A variable that is no
    longer ``trainable`` does not move, though a gradient comes: what it has received is forgotten when its window ends.
    One whose weights are 0 where another's of the same call are not steps with a gradient of 0.

    The gradient of an embedding stays sparse: the wrapped optimizer receives each row that the window has touched once.

    The state can be saved at any position of a window, and loaded with another ``steps``, 1 included. A run that began
    without accumulation goes on with ``model.compile(GradientAccumulation(model.optimizer, steps), ...)``, which keeps
    the state of ``model.optimizer``. Keras's ``BackupAndRestore`` writes over its only file, which a kill meanwhile
    destroys (``double_checkpoint=True`` keeps the one before), and does not hold dropout's seeds, which begin anew.

    Keras's ``gradient_accumulation_steps`` lets schedules, averages and constraints follow micro-batches, loses what is
    left at the end, and does not run under ``MirroredStrategy``. Here it does; there ``"mean"`` and ``"sum"`` take
    gradients that add up to the global one, as ``fit`` computes them, ``"weight"`` that of each replica's own mean.

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
        super().__init__(optimizer, **kwargs)
        if any(found := [layer.gradient_accumulation_steps for layer in wrapped_by(optimizer)]):
            raise ValueError(
                "`gradient_accumulation_steps` must not be set on the wrapped optimizer, too: leave it out, and give "
                f"`steps` here. Found {found[-1]}. Received: optimizer={optimizer!r}"
            )
        self._length, self.steps = _length(steps), steps
        self.normalize, self.accumulator_dtype = normalize, accumulator_dtype
        self.on_nonfinite, self.remainder = on_nonfinite, remainder
        self.skipped = self.add_variable((), dtype="int64", aggregation="only_first_replica", name="skipped")
        self._strategy = tf.distribute.get_strategy()
        self._given = types.SimpleNamespace(weights={})  # by `weighed`, for each replica; not to be tracked
        self._is_ready = True

    # What is this class's own, and not the wrapped optimizer's.
    steps = skipped = window = normalize = accumulator_dtype = on_nonfinite = remainder = None  # type: Any
    _twice, _is_ready = "`optimizer` accumulates already: wrap it once, with the product of both `steps`.", False

    def __setattr__(self, name: str, value: Any) -> None:
        """Checks what is set, and refuses what a compiled training step would not notice."""
        if self._is_ready and name in ("steps", "inner_optimizer", *_CHOICES) and name != "remainder":
            raise ValueError(
                f"`{name}` cannot be set, since compiled steps hold it: compile the model with a new "
                "GradientAccumulation(optimizer.inner_optimizer, ...), or let `steps` be a callable. "
                f"Received: {name}={value!r}"
            )
        if name == "gradient_accumulation_steps" and value:
            raise ValueError(f"The length of a window is `steps` here. Received: {name}={value!r}")
        super().__setattr__(name, arguments.choice(name, value, _CHOICES[name]) if name in _CHOICES else value)

    def finalize_variable_values(self, var_list: Any) -> None:
        """Does at the end of training what ``remainder`` says, then what the wrapped optimizer does."""
        is_average = (np.array_equal(variable.numpy(), average.numpy()) for variable, average in averages_of(self))
        if self.remainder == "flush" and self.built and self._before and all(is_average):
            for index in np.flatnonzero(self.window.numpy()[_MICRO_BATCHES]):  # SwapEMAWeights put averages there
                self._trainable_variables[index].assign(self._before[index])
        self.end_epoch()
        super().finalize_variable_values(var_list)

    def build(self, variables: list[Any]) -> None:
        """Creates an accumulator for each variable, and the wrapped optimizer's slots."""
        if self.built:
            return
        scales = [name_of(v) for v in variables if getattr(v, "overwrite_with_gradient", False)]
        if scales:  # not `:=`, which AutoGraph does not know
            raise ValueError(
                "A float8 layer cannot be trained with accumulation: its scales' gradients have no mean. Leave it out; "
                f"or use Keras's own `gradient_accumulation_steps`, which keeps the largest. Received: {scales}"
            )
        super().build(variables)
        with keras.name_scope(self.name):
            self._sums = GradientSums(variables, self.accumulator_dtype)
        for variable in (*self._sums.accumulators, self._sums.touched):
            self._track_variable(variable)  # Keras's automatic tracking is off where a LossScaleOptimizer builds
        self._accumulators, self._touched = self._sums.accumulators, self._sums.touched  # for tf.train.Checkpoint
        self._windows = Windows(self.add_variable, len(variables))
        self.window, self._calls = self._windows.received, self._windows.calls
        averaged = any(layer.use_ema for layer in wrapped_by(self.inner_optimizer))
        self._before = self.add_optimizer_variables(variables, "before") if averaged else []  # weights, in open windows

    def apply(self, grads: Iterable[Any], trainable_variables: Any = None, weight: Any = None) -> None:
        r"""Adds the gradients of a micro-batch to the window, and updates the variables if that fills it.

        Args:
            grads: a gradient for each variable; ``None`` where there is none.
            trainable_variables: the variables. Defaults to those that the optimizer was built with.
            weight: :math:`w_i \ge 0`, a number or a scalar tensor; used with ``normalize="weight"`` alone. Defaults to
                that of :meth:`weighed`. One that turns out to be negative in a graph counts as not finite.

        Raises:
            ValueError: the optimizer is not built and there are no variables; variables and gradients do not match; a
                variable is unknown, or given twice; a weight is negative, or missing where it is needed. Nothing was
                added. (``tf.errors.InvalidArgumentError`` in a graph, for what is known late.)
        """
        if tf.distribute.in_cross_replica_context():
            raise ValueError("apply() must be called in a replica context: in the function given to strategy.run().")
        weighs = self.normalize == "weight"
        weight = fitting_weight(self._given.weights.get(replica_id()) if weight is None else weight) if weighs else None
        grads = list(grads)
        if not grads:
            return
        _, given, fitting = self._matched(grads, trainable_variables)
        pairs = {index_in(self, variable): gradient for gradient, variable in given if _is_trained(variable)}
        names = [name_of(variable) for _, variable in given]
        if len(pairs) < len(names):
            frozen = [name_of(variable) for _, variable in given if not _is_trained(variable)]
            if len(pairs) + len(frozen) < len(names):
                raise ValueError(f"`trainable_variables` must not hold a variable twice. Received: {names}")
            warnings.warn(f"Variables {frozen} are not trainable: their gradients are left out.", stacklevel=2)
        self._check_subset(pairs)
        if pairs:
            batch = MicroBatch(tuple(sorted(pairs)), tuple(pairs[index] for index in sorted(pairs)), weight)
            # The kind of gradient that comes first stays the variable's kind in this process.
            sparse = {index for index in pairs if isinstance(pairs[index], tf.IndexedSlices)}
            self._sums.sparse |= sparse - self._windows.known
            self._windows.note(batch.subset)
            with fitting:
                across_replicas(self._strategy, self._micro_step, batch)

    def _check_subset(self, indices: Collection[int]) -> None:
        if len(indices) < len(self._trainable_variables) and self._parts:
            raise ValueError(
                "`grads` must hold a gradient for every variable, since a MultiOptimizer takes no fewer: let a "
                "companion.ParameterGroups do its work. Received: gradients for "
                f"{[name_of(self._trainable_variables[index]) for index in indices]} only"
            )

    @contextmanager
    def weighed(self, weight: Any) -> Iterator[None]:
        """A context in which ``apply`` without a weight uses this one: for who does not call ``apply`` himself.

        Args:
            weight: as in :meth:`apply`; on several replicas each replica's own.
        """
        weights, replica = self._given.weights, replica_id()
        before, weights[replica] = weights.get(replica), weight
        try:
            yield
        finally:
            weights[replica] = before

    def _micro_step(self, strategy: Any, batch: MicroBatch) -> None:
        """Does one of three things: leaves the micro-batch out, accumulates it, or updates with it."""
        subset, windows = batch.subset, self._windows

        def weight() -> Any:
            return None if batch.weight is None else strategy.reduce("SUM", batch.weight, axis=None)

        def accumulate() -> None:
            strategy.extended.call_for_each_replica(self._sums.add, args=(batch,))
            windows.count(subset, weight())
            for index in subset if self._before else ():
                self._before[index].assign(self._trainable_variables[index])

        def update() -> None:
            self._end_window(strategy, batch, windows.counted(subset, weight()))

        fills = windows.fills(subset, tf.cast(self._length(ops.convert_to_tensor(self.iterations)), "float64"))
        if self.on_nonfinite == "skip_window":
            tf.cond(fills, update, accumulate)
            return
        finite = everywhere(strategy, self._sums.can_take, batch)
        if self.on_nonfinite == "raise":
            with tf.control_dependencies([tf.debugging.Assert(finite, [_NOT_FINITE])]):
                finite = tf.identity(finite)
        # Not one choice of three: XLA aborts the process where it looks into one that depends on summed-up rows.
        tf.cond(finite, lambda: tf.cond(fills, update, accumulate), lambda: self._skip(1))

    def _end_window(self, strategy: Any, batch: MicroBatch, window: Any) -> None:
        """Updates with what the window holds and with what the micro-batch, the last one, brings; then empties it."""
        replicas = strategy.extended.call_for_each_replica
        sums = replicas(self._sums.read, args=(batch,))
        window = of_subset(window, batch.subset)

        def update() -> None:
            with self._frozen_stay():
                replicas(self._update, args=(batch.subset, sums, window[_WEIGHT]))

        conditions = [tf.reduce_max(window[_WEIGHT]) > 0] if self.normalize == "weight" else []
        if self.on_nonfinite == "skip_window":
            finite = everywhere(strategy, all_finite, sums)
            lost = tf.cast(tf.reduce_max(window[_MICRO_BATCHES]), "int64")
            tf.cond(finite, _nothing, lambda: self._skip(lost))
            conditions.append(finite)
        if conditions:
            tf.cond(tf.reduce_all(conditions), update, _nothing)
        else:
            update()
        self._empty_window(strategy, batch.subset)

    def _empty_window(self, strategy: Any, subset: tuple[int, ...]) -> None:
        strategy.extended.call_for_each_replica(self._sums.clear, args=(subset,))
        self._windows.end(subset)

    def _skip(self, micro_batches: Any) -> None:
        self.skipped.assign_add(micro_batches)

    def _update(self, subset: tuple[int, ...], sums: list[Any], weights: Any) -> None:
        """Hands the gradient of the window to the wrapped optimizer."""
        context = tf.distribute.get_replica_context()
        if context.num_replicas_in_sync > 1:
            sums = brought_by_one([coalesce(total) for total in context.all_reduce(tf.distribute.ReduceOp.SUM, sums)])
        self._check_subset(subset)
        variables = [self._trainable_variables[index] for index in subset]
        means = self._sums.means(sums, None if self.normalize == "sum" else weights, variables)
        if self.loss_scale_factor:  # which Keras cannot divide a sparse gradient by
            means = [tf.convert_to_tensor(mean) for mean in means]
        self.inner_optimizer.apply(means, variables)

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
        eager, everything = tf.executing_eagerly(), range(len(self._accumulators))
        ended = np.flatnonzero(self.window.numpy()[_MICRO_BATCHES]).tolist() if eager else everything
        frozen = [not _is_trained(variable) for variable in self._trainable_variables]
        together = lambda index: (frozen[index], *(index in subset for subset in self._windows.subsets))  # noqa: E731
        groups = [tuple(group) for _, group in itertools.groupby(sorted(ended, key=together), together)]
        if groups:
            # Replicas meet in compiled functions only; a single one needs none for what happens once in an epoch.
            compiled = eager and self._strategy.num_replicas_in_sync > 1
            updates = tuple(update and not frozen[group[0]] for group in groups)
            (self._compiled_end_windows if compiled else self._end_windows)(tuple(groups), updates, self._sums.sparse)

    @functools.cached_property
    def _compiled_end_windows(self) -> Any:
        return tf.function(self._end_windows, autograph=False)

    def _end_windows(self, groups: tuple[Any, ...], updates: tuple[bool, ...], sparse: frozenset[int]) -> None:
        """Ends the windows that hold a micro-batch. ``sparse`` is there because a compiled function depends on it."""

        def end_if_open(strategy: Any, subset: tuple[int, ...], update: bool) -> None:
            def end() -> None:
                if update:
                    self._end_window(strategy, MicroBatch(subset), ops.convert_to_tensor(self.window))
                else:
                    self._empty_window(strategy, subset)

            received = of_subset(ops.convert_to_tensor(self.window), subset)[_MICRO_BATCHES]
            tf.cond(tf.reduce_min(received) > 0, end, _nothing)

        for group, update in zip(groups, updates, strict=True):
            across_replicas(self._strategy, functools.partial(end_if_open, subset=group, update=update))
        across_replicas(self._strategy, lambda strategy: self._windows.forget())

    def get_config(self) -> dict[str, Any]:
        """Returns the constructor's arguments, for saving."""
        own = {name: getattr(self, name) for name in _CHOICES}
        return {**super().get_config(), "steps": keras.saving.serialize_keras_object(self.steps), **own}


def _nothing() -> None: ...


def _is_trained(variable: Any) -> bool:
    return bool(getattr(variable, "trainable", True))


class FlushAtEpochEnd(keras.callbacks.Callback):
    r"""Ends the open window of a :class:`GradientAccumulation` at the end of each epoch, as its ``remainder`` says.

    An optimizer cannot know that an epoch has ended. With this callback its last window, of :math:`n < N`
    micro-batches, becomes an update of its own, on

    .. math::

       G = \sum_{i \le n} w_i g_i \Big/ \sum_{i \le n} w_i

    (``remainder="flush"``), or is forgotten (``"drop"``); with ``"carry"`` the callback does nothing. Without it the
    window goes on in the next epoch, and ``remainder`` is obeyed once, at the end of ``fit``.

    The window ends before the epoch's validation. Put the callback before those that save the model or swap weights
    (``SwapEMAWeights``).

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
        """Finds the optimizer, or those in a ``MultiOptimizer``."""
        optimizer, self._in_epoch = self.model.optimizer, False
        self._found = [layer for layer in wrapped_by(optimizer) if isinstance(layer, GradientAccumulation)]
        if not self._found:
            raise ValueError(
                f"The model must be compiled with a GradientAccumulation. Received: optimizer={optimizer!r}"
            )

    def on_epoch_begin(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        """Notes that an epoch is running."""
        self._in_epoch = True

    def on_test_begin(self, logs: dict[str, Any] | None = None) -> None:
        """Ends the window before the epoch's validation, which comes before the epoch's end."""
        if getattr(self, "_in_epoch", False):
            self._in_epoch = False
            for optimizer in self._found:
                optimizer.end_epoch()

    def on_epoch_end(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        """Ends the window where there was no validation."""
        self.on_test_begin()
