r"""The gradient oracle: asked at weights :math:`\theta`, it answers :math:`\nabla L(\theta)` for one batch.

The answer is that of the whole batch, however many parts the batch is processed in and on however many replicas. With
:math:`S_i` the *sum* of a loss over part :math:`i` and :math:`D_i` what its mean divides by there (examples, unmasked
tokens, or sample weights, as the loss's reduction says), the gradient of the whole is

.. math::

   \nabla L(\theta) = \frac{1}{\sum_i D_i} \sum_i \nabla S_i(\theta)

All denominators are needed before the first gradient. They depend on the data and on masks only, so that in a compiled
step nothing else of the model is computed for them. Chapters 06 and 07 of the book teach it.
"""

import contextlib
import functools
from collections.abc import Callable
from typing import Any

import keras
import tensorflow as tf
from keras import ops, tree

from companion.batches import copied, divisible, examples, part_of, sum_over_parts, unpacked
from companion.denominators import activity_as_mean, compiled_loss, loss_shares, no_common_denominator, standing_in
from companion.gradients import along, coalesce, kind_of, scaled, shaped, widened
from companion.merging import weighted_mean
from companion.questions import (
    Recorder,
    build,
    check_question,
    denominator_by,
    fitting_values,
    in_mode,
    is_own,
    loss_tracker,
    merged_by_rule,
    refuse_overwritten,
    within,
)
from companion.replicas import all_reduce, replicas_of


class GradientOracle:
    r"""Answers the gradient of a model's loss on one batch, in as many parts as memory asks for.

    .. math::

       \nabla L(\theta) = \frac{1}{\sum_i D_i} \sum_i \nabla S_i(\theta)

    The first question moves what a training step moves besides the weights: metrics, and every variable that the model
    or its loss assigns, whoever owns it, such as BatchNorm's statistics, the seeds of dropout, and a recurrent state.
    Later questions start from what the first one started from and move nothing.

    In one part, the batch is left as it is, and the answer is that of Keras's own step. In several, every tensor must
    have a row for each example. BatchNorm normalises each part by the part's own statistics, and dropout draws anew for
    each part: these two are not those of the whole batch. A scalar added by ``add_loss`` counts as a mean over
    examples, anything else as a sum. A metric that is neither a count nor a mean over examples becomes a mean over
    parts; what ``compute_metrics`` computes itself is that of the last part. A loss of one's own that mixes examples is
    found out on a few made-up rows and refused. In a layer that calls ``add_loss``, under ``weight_fn``, or where
    made-up rows mean nothing to a loss, mixing cannot be found out. State that is not a Keras variable cannot be put
    back: each question moves it. Where ``keras.remat`` or a custom gradient is over weights, it answers at the current
    ones only.

    Args:
        model: a ``keras.Model``, compiled unless ``loss`` is given.
        data: one batch: ``x``, ``(x, y)`` or ``(x, y, sample_weight)``.
        micro_batches: an integer :math:`\ge 1`: the number of parts. They are of equal size, rounded up, so the last
            one may be smaller, and a small batch may have fewer. Defaults to 1.
        weight_fn: for a loss with a denominator of its own, on one replica: a function of ``(x, y, sample_weight)``
            that returns the denominator of a part, or ``"sum"`` for a loss that is a sum. Defaults to ``None``.
        merge: a rule of :mod:`companion.merging` or a function like them, for what replicas do with their gradients.
            With any but the default, each replica holds the gradients of all, and answers are dense. Defaults to
            :func:`~companion.merging.weighted_mean`, the formula above.
        loss: for a training step of your own, what it differentiates: a function of ``(x, y, sample_weight)`` that
            calls whatever it likes and returns a scalar, a mean over examples unless ``weight_fn`` says otherwise.
            The model's own loss and metrics play no part then. Defaults to ``None``, the model's ``compute_loss``.
        training: ``False`` asks layers as ``evaluate`` does, and moves nothing. Defaults to ``True``.

    Raises:
        TypeError: ``model`` is not a ``keras.Model``.
        ValueError: an argument is wrong, the model is not compiled or has no loss, or the batch is to be split and a
            tensor of it has not as many rows as the others, or the loss mixes examples or does not say what it divides
            by, without ``weight_fn``; or it is to be merged by another rule than the default, and losses do not divide
            by one number.

    Example:
        >>> model = keras.Sequential([keras.Input((1,)), keras.layers.Dense(1, kernel_initializer="ones")])
        >>> model.compile("sgd", "mse")
        >>> batch = np.array([[1.0], [2.0], [3.0]], "float32"), np.array([[0.0], [0.0], [0.0]], "float32")
        >>> oracle = GradientOracle(model, batch, micro_batches=2)
        >>> [round(float(gradient.numpy().squeeze()), 4) for gradient in oracle()]
        [9.3333, 4.0]

    References:
        Nemirovski and Yudin, 1983, *Problem complexity and method efficiency in optimization*, for the oracle.

    Taught in chapter 06, :doc:`/notebooks/06_the_fix`.
    """

    def __init__(
        self,
        model: keras.Model,
        data: Any,
        micro_batches: int = 1,
        weight_fn: Callable[[Any, Any, Any], Any] | str | None = None,
        merge: Callable[[list[Any], Any], list[Any]] = weighted_mean,
        loss: Callable[[Any, Any, Any], Any] | None = None,
        training: bool = True,
    ) -> None:
        self.micro_batches = check_question(model, micro_batches, weight_fn, merge, loss)
        self.model, self.merge = model, merge
        #: Whether nothing is divided, so that the first question can be Keras's own.
        self.is_whole = self.micro_batches * replicas_of(model) == 1
        # What is merged with the weights of the whole adds up; any other rule wants the gradient of each share alone.
        self._totals = all_reduce if merge is weighted_mean else list
        self._weight_fn, self._loss = weight_fn, loss  # type: Any, Any
        self._weigh = functools.partial(denominator_by, self._weight_fn)
        self._has_own_loss = loss is not None or is_own(model, "compute_loss")
        self._takes_loss_as_it_is = weight_fn is not None or self._has_own_loss
        self._batch = unpacked(data)
        if self.micro_batches > 1:
            self._batch = divisible(self._batch)
        takes_targets = not self._has_own_loss and any(each is not None for each in tree.flatten(model.loss))
        if self._batch[1] is None and takes_targets:
            raise ValueError("`data` must hold targets, because the model was compiled with a loss. Received: y=None")
        self._examples = examples(self._batch[0])
        # Under XLA, rows of parts whose sizes are not known cannot be joined: they are summed, as dense gradients.
        self._joins = self.micro_batches == 1 or isinstance(self._examples, int) or not getattr(model, "jit_compile", 1)
        if not self.is_whole:
            (self._all_examples,) = self._totals([tf.cast(self._examples, keras.config.floatx())])
        self._moving, self._start, self._added, self._outputs = list[Any](), list[Any](), list[Any](), None
        self._shares, self._are_sums, self._adds_losses, self._is_prepared = list[Any](), list[bool](), False, False
        self._asked, self._reports, self._training, self._graph = False, training, training, within(None)
        #: Pairs of a variable and its value, which whoever asks may put back; and the scope of the last question.
        self.kept, self._scope = list[Any](), Recorder([], [])
        #: A function of a part's gradients and its number of examples, called in the first question; and the sum of it.
        self.listener, self.heard, self._direction = None, None, None  # type: Any, Any, Any

    def __call__(self, values: list[Any] | None = None) -> list[Any]:
        """Answers the gradient at ``values``.

        Args:
            values: a tensor for each of ``model.trainable_weights``. Defaults to their current values.

        Returns:
            The gradients in the same order, merged over micro-batches and replicas. Each is a tensor, for embeddings a
            ``tf.IndexedSlices`` without repeated rows, and ``None`` where the loss does not depend on the variable.
            None is scaled: ``apply`` of an optimizer that scales the loss wants ``optimizer.scale_loss`` of each.
        """
        return self.value_and_gradient(values)[1]

    def value_and_gradient(self, values: list[Any] | None = None) -> tuple[Any, list[Any]]:
        """Answers the loss and its gradient at ``values``.

        Args:
            values: a tensor for each of ``model.trainable_weights``. Defaults to their current values.

        Returns:
            The loss of the whole batch as Keras reports it, with regularizers and added losses; and the gradients as
            :meth:`__call__` returns them.
        """
        self.prepare()
        is_first, points = not self._asked, fitting_values(self.model, values)
        ask = functools.partial(sum_over_parts, self._examples, self.micro_batches, None if is_first else self._start)
        try:
            sums, rows, carried = ask(functools.partial(self._part, points, is_first))
        except Exception:
            if values is not None or not self._scope.is_bound:
                raise
            sums, rows, carried = ask(functools.partial(self._part, [], is_first))
        shapes = [tf.shape(point) for point, kind in zip(points, self._kinds, strict=True) if kind == "sparse"]
        slices = [tf.IndexedSlices(*pieces) for pieces in zip(rows[1::2], rows[::2], shapes, strict=True)]
        if is_first and self.listener:
            (self.heard,) = all_reduce([sums.pop()])
        state = carried[: len(self._moving)]
        start = [tf.identity(variable) for variable in self._moving] if is_first else self._start
        if replicas_of(self.model) > 1:  # one without an example has nothing to say, where BatchNorm says 0 / 0
            sums = [tf.where(self._examples > 0, total, 0) for total in sums]
            state = [tf.where(self._examples > 0, *pair) for pair in zip(state, start, strict=True)]
        *dense, losses = sums
        found = {"sparse": iter(slices), "dense": iter(dense)}
        gradients = [next(found[kind]) for kind in self._kinds if kind != "none"]
        is_mean = self.merge is weighted_mean
        merge = all_reduce if is_mean else functools.partial(merged_by_rule, self.merge, self._denominator)
        *gradients, losses = merge([*gradients, losses])
        losses = tf.unstack(losses)
        if is_first:
            for variable, value in zip(self._moving, state, strict=True) if self._training else ():
                variable.assign(value)
            self._asked, self._start, self._told = True, start, (losses, carried[len(state) :])
            if self._reports:
                self.report()
        merged = map(coalesce, gradients)
        return losses[0], [None if kind == "none" else next(merged) for kind in self._kinds]

    def curvature(self, direction: list[Any], values: list[Any] | None = None) -> list[Any]:
        r"""Answers how the gradient changes along a direction: :math:`\nabla^2 L(\theta)\, d`, differentiated twice.

        Args:
            direction: a tensor for each of ``model.trainable_weights``.
            values: as in :meth:`__call__`.

        Returns:
            A tensor for each, merged as gradients are.
        """
        self._direction = fitting_values(self.model, direction)
        try:
            return self.value_and_gradient(values)[1]
        finally:
            self._direction = None

    def take_back(self, unless: Any, but: Any = ()) -> None:
        """Puts back what the first question has moved, unless a condition holds.

        Args:
            unless: a boolean tensor.
            but: the ids of variables that stay as they are. Defaults to none.
        """
        for variable, value in zip(self._moving, self._start, strict=True):
            if id(variable) not in but:
                variable.assign(tf.where(unless, variable, value))

    def plain(self) -> list[Any]:
        """Asks the first question as Keras's own step does, on the variables themselves, which move as they do there.

        Returns:
            The gradients at the current weights, of the loss as the optimizer scales it. Nobody may ask again.
        """
        with tf.GradientTape() as tape:
            (total,), self._outputs = self._losses(self._batch, 1)
            scaled_loss = self._scale(total)
        variables = self.model.trainable_weights
        self._asked, self._told = True, ([total], [])
        return [coalesce(gradient) for gradient in tape.gradient(scaled_loss, variables)] if variables else []

    def defer(self) -> None:
        """Leaves the report to the one who asks: Keras's step makes it when the weights have moved."""
        self._reports = False

    def report(self) -> dict[str, Any]:
        """Reports the first answer to the model's metrics, as Keras's step does at its end.

        Returns:
            What ``compute_metrics`` returned, which ``fit`` shows; nothing for a ``loss`` of one's own.
        """
        if self._loss is not None:
            return {}
        (x, y, sample_weight), model, (total, *each), logs = self._batch, self.model, *self._told
        shown = list(zip(getattr(compiled_loss(model), "metrics", []), each, strict=False))
        for metric, value in shown:
            metric.update_state(value, sample_weight=self._examples if isinstance(self._examples, int) else None)
        if self.micro_batches == 1:
            loss_tracker(model).update_state(total, sample_weight=self._examples)
            for each in self._added:  # which `compute_metrics` may read in `model.losses`
                keras.Layer.add_loss(model, each)
            return model.compute_metrics(x, y, self._outputs, sample_weight=sample_weight)
        if not logs:
            return model.get_metrics_result()
        found = tree.pack_sequence_as(self._structure, logs)
        return found | {metric.name: metric.result() for metric, _ in shown if metric.name in found}

    @property
    def loss(self) -> Any:
        """The loss that the first question found."""
        if not self._asked:
            raise ValueError("There is no loss yet: ask first, by calling the oracle.")
        within(self._graph)
        return self._told[0][0]

    @property
    def denominator(self) -> Any:
        """Says what the loss of the whole batch, on all replicas, divides by, which is its weight among other batches.

        Raises:
            ValueError: there is no such number: a loss is a sum, or two losses divide by different numbers.
        """
        return self._denominator if self.merge is weighted_mean else all_reduce([self._denominator])[0]

    @property
    def _denominator(self) -> Any:
        self.prepare()
        if callable(self._weight_fn):
            return self._weigh(*self._batch) if self.is_whole else self._weight
        if self.is_whole and not self._shares and not self._takes_loss_as_it_is:
            self._measure()
        shares, is_known = self._shares, not self._takes_loss_as_it_is
        is_mean = self._loss is not None and self._weight_fn is None
        if is_mean or (is_known and all(share.counts_examples for share in shares)):
            if shares and is_known:
                return shares[0].rows
            return tf.cast(self._examples, keras.config.floatx()) if self.is_whole else self._all_examples
        if is_known and len(shares) == 1 and shares[0].denominator is not None and not self._adds_losses:
            return shares[0].denominator
        raise no_common_denominator(shares, self._adds_losses, self._weight_fn)

    def prepare(self) -> None:
        """Builds the model, and finds what the first part needs: what the losses divide by."""
        self._graph = within(self._graph, stays=self._asked)
        if self._is_prepared:
            return
        build(self.model, self._batch, self._loss, self._training)
        if not self.is_whole:
            refuse_overwritten(self.model)
        if not self.is_whole and self._loss is None:
            self._measure()
        if callable(self._weight_fn) and not self.is_whole:

            def weigh(begin: Any, size: Any, state: Any) -> Any:
                return [self._weigh(*self._slice(begin, size))], [], []

            (self._weight,), *_ = sum_over_parts(self._examples, self.micro_batches, [], weigh)
        self._is_prepared = True

    def _measure(self) -> None:
        """Lets each loss say what it divides by on the whole batch, as far as it is asked."""
        self._shares = loss_shares(compiled_loss(self.model), self.micro_batches, self.is_whole)
        if self._has_own_loss:
            return
        n, size, look = self._examples, self._examples, self._look if tf.executing_eagerly() else self._look_only
        if not tf.executing_eagerly() or self.micro_batches == 1:
            denominators = look(self._batch)
        else:  # by parts, or the memory that they save would be needed here; of at least two rows, to know rows
            size = max(-(-n // self.micro_batches), 2)
            found = [look(self._slice(begin, min(size, n - begin))) for begin in range(0, max(n, 1), size)]
            denominators = [tf.add_n(each) for each in zip(*found, strict=True)]
        if self.micro_batches > 1 and any(self._are_sums) and isinstance(n, int) and n > 1:
            likely = self._are_sums  # a loss for each example has fewer entries if there is one example less
            look(self._slice(0, min(size, n) - 1))
            self._are_sums = [one and other for one, other in zip(likely, self._are_sums, strict=True)]
        totals = iter(self._totals(denominators))
        for share in self._shares:
            share.denominator = None if share.denominator is None else next(totals)
        for share in self._shares:
            share.rows = None if share.rows is None else next(totals)

    def _look(self, batch: Any) -> list[Any]:
        """What a call of the model adds to the loss; the denominators, then the rows, as far as there are."""
        (x, y, sample_weight), compiled = batch, compiled_loss(self.model)
        with Recorder([], self.model.trainable_weights) as scope:
            outputs = in_mode(self._training, self.model.call, self.model)(x)
            self._adds_losses, rows = bool(scope.losses), examples(x)
            known = (None, rows if isinstance(rows, int) else None)
            self._are_sums = [len(loss.shape) > 0 and loss.shape[0] in known for loss in self.model.losses]
            if self._shares and self._weight_fn is None:
                with standing_in(compiled, [share.measure for share in self._shares]):
                    compiled(y, outputs, sample_weight)
        found = [*(share.denominator for share in self._shares), *(share.rows for share in self._shares)]
        return [number for number in found if number is not None]

    def _look_only(self, batch: Any) -> list[Any]:
        """The same in a graph, where nothing else is computed: no assertion on the shape of a model's outputs."""
        traced = tf.compat.v1.wrap_function(lambda: self._look(copied(batch)), [])
        return traced.prune([], traced.outputs)() if traced.outputs else []

    def _scale(self, loss: Any) -> Any:
        optimizer = getattr(self.model, "optimizer", None)  # a model that was not compiled has none
        return loss if optimizer is None else optimizer.scale_loss(loss)

    def _part(
        self, values: list[Any], is_first: bool, begin: Any, size: Any, carried: list[Any] | None
    ) -> tuple[list[Any], list[Any], list[Any]]:
        """One part's dense gradients, and losses; ids and rows of its sparse gradients; what the next part starts from.

        That is the variables that the part has assigned, and at the end what ``compute_metrics`` says so far. Without
        ``values``, it is about the variables themselves.
        """
        batch, model, is_new, logs = self._slice(begin, size), self.model, carried is None, list[Any]()
        share = 1 if self.is_whole else tf.cast(examples(batch[0]), self._all_examples.dtype) / self._all_examples
        variables, held = model.trainable_weights, [variable.value for variable in model.trainable_weights]
        points, standing = values or held, list(zip(variables, values, strict=False))
        with tf.GradientTape() if self._direction else contextlib.nullcontext() as second:
            if second:
                second.watch(points)
            with tf.GradientTape() as tape:
                tape.watch(points)
                known = [*standing, *zip(self._moving, carried or [], strict=False)]
                scope = self._scope = Recorder(known, variables)  # no `:=`, which AutoGraph does not know
                with scope:
                    losses, outputs = self._losses(batch, share)
                    scaled_loss = self._scale(losses[0])
            with scope:  # where `keras.remat` calculates again, it reads and assigns as it did the first time
                found = tape.gradient(scaled_loss, [*points, *(held if values else [])])
                if is_first and self.micro_batches > 1 and self._loss is None and self._training:
                    logs = self._report_part(batch, outputs, losses[0], share)
            pairs, unscale = zip(found, points, strict=False), 1 / self._scale(1.0)
            gradients = [scaled(widened(shaped(*pair), self._joins), unscale) for pair in pairs]
            scope.refuse_traced(found[len(points) :])
            bend = along(gradients, self._direction) if second else None
        if second:
            found = second.gradient(bend, points, unconnected_gradients="zero")
            gradients = [tf.convert_to_tensor(widened(product)) for product in found]
        self._kinds = [kind_of(gradient) for gradient in gradients]
        if is_new:
            told = [] if self.is_whole else getattr(compiled_loss(model), "metrics", [])  # of the whole, at the end
            self._moving, is_one = scope.moved(model, told), self.micro_batches == 1
            self._outputs, self._added = (outputs, list(scope.losses)) if is_one else (None, [])
        heard = [self.listener(gradients, examples(batch[0]))] if is_first and self.listener else []
        dense, sparse = ([each for each in gradients if kind_of(each) == kind] for kind in ("dense", "sparse"))
        rows = [piece for gradient in sparse for piece in (gradient.indices, gradient.values)]
        state = [scope.get_current_value(variable) for variable in self._moving]
        return [*dense, tf.stack(losses), *heard], rows, [*state, *logs]

    def _losses(self, batch: Any, share: Any) -> tuple[list[Any], Any]:
        """This part's share of the loss of the whole batch, then of each compiled loss alone; and the outputs."""
        (x, y, sample_weight), model, compiled, outputs = batch, self.model, compiled_loss(self.model), None
        if self._loss is not None:
            total = tf.convert_to_tensor(self._loss(x, y, sample_weight))
            if total.shape.rank != 0:
                raise ValueError(f"`loss` must return a scalar. Received: a tensor of shape {tuple(total.shape)}")
        else:
            with contextlib.nullcontext() if self.is_whole else activity_as_mean(model, share):
                outputs = in_mode(self._training, model.call, model)(x)
        if self.is_whole or self._has_own_loss:
            with standing_in(compiled, [] if self.is_whole else self._shares):
                if self._loss is None:
                    total = in_mode(self._training, *[model.compute_loss] * 2)(x, y, outputs, sample_weight)
            if self.is_whole:
                return [total], outputs
            terms, added = [total], [tf.zeros((), share.dtype)]
        else:
            with standing_in(compiled, self._shares):
                terms = [] if compiled is None else [compiled(y, outputs, sample_weight)]
            terms = [term for term in terms if term is not None]
            sums = [ops.sum(ops.cast(loss, share.dtype)) for loss in model.losses]
            added = [each * (1 if is_sum else share) for each, is_sum in zip(sums, self._are_sums, strict=True)]
            if not terms + added:
                raise ValueError("The model has no loss: pass `loss` to `compile`, or call `add_loss` in a layer.")
        weight = share if self._loss is not None and self._weight_fn is None else tf.ones((), share.dtype)
        if callable(self._weight_fn):
            weight = tf.math.divide_no_nan(self._weigh(x, y, sample_weight), self._weight)
        told = [each.value for each in self._shares if each.value is not None]
        terms, told = ([ops.sum(tf.cast(one, share.dtype)) * weight for one in some] for some in (terms, told))
        return [sum([*terms, *added]), *told], outputs

    def _report_part(self, batch: Any, outputs: Any, loss: Any, share: Any) -> list[Any]:
        """Reports a part to the metrics; returns what ``compute_metrics`` said, if it is one's own."""
        (x, y, sample_weight), model = batch, self.model
        loss_tracker(model).update_state(tf.math.divide_no_nan(loss, share), sample_weight=examples(x))
        logs = model.compute_metrics(x, y, outputs, sample_weight=sample_weight)
        if not is_own(model, "compute_metrics"):
            return []
        self._structure = tree.map_structure(lambda leaf: None, logs)
        return [tf.convert_to_tensor(leaf) for leaf in tree.flatten(logs)]

    def _slice(self, begin: Any, size: Any) -> Any:
        if self.micro_batches == 1:
            return self._batch
        return tree.map_structure(lambda x: None if x is None else part_of(x, begin, size), self._batch)
