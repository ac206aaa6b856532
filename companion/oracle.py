r"""The gradient oracle: asked at weights :math:`\theta`, it answers :math:`\nabla L(\theta)` for one batch.

The answer is that of the whole batch, however many parts the batch is processed in and on however many replicas. With
:math:`S_i` the *sum* of a loss over part :math:`i` and :math:`D_i` what its mean divides by there (examples, unmasked
tokens, or sample weights, as the loss's reduction says), the gradient of the whole is

.. math::

   \nabla L(\theta) = \frac{1}{\sum_i D_i} \sum_i \nabla S_i(\theta)

All denominators are needed before the first gradient. They depend on the data and on masks only, so that in a compiled
step nothing else of the model is computed for them. Chapters 06 and 07 of the book teach it.
"""

import functools
from collections.abc import Callable
from typing import Any

import keras
import tensorflow as tf
from keras import ops, tree

from companion.denominators import activity_as_mean, compiled_loss, loss_shares, standing_in
from companion.gradients import coalesce, kind_of, scaled, widened
from companion.merging import weighted_mean
from companion.replicas import all_reduce, gather, replicas_of


class GradientOracle:
    r"""Answers the gradient of a compiled model's loss on one batch, in as many parts as memory asks for.

    .. math::

       \nabla L(\theta) = \frac{1}{\sum_i D_i} \sum_i \nabla S_i(\theta)

    The first question moves what a training step moves besides the weights: metrics, BatchNorm's statistics, the seeds
    of dropout. Later questions start from the same seeds and statistics as the first did and move nothing.

    BatchNorm normalises each part by the part's own statistics, and dropout draws anew for each part: these two are not
    those of the whole batch. A loss added by ``add_loss`` counts as a mean over examples. A metric that is neither a
    count nor a mean over examples becomes a mean over parts.

    Args:
        model: a compiled ``keras.Model``.
        data: one batch: ``x``, ``(x, y)`` or ``(x, y, sample_weight)``.
        micro_batches: an integer :math:`\ge 1`: the number of parts. They are of equal size, rounded up, so the last
            one may be smaller, and a small batch may have fewer. Defaults to 1.
        weight_fn: for a loss with a denominator of its own, on one replica: a function of ``(x, y, sample_weight)``
            that returns the denominator of a part. Defaults to ``None``.
        merge: a rule of :mod:`companion.merging` or a function like them, for what replicas do with their gradients.
            With any but the default, each replica holds the gradients of all, and answers are dense. Defaults to
            :func:`~companion.merging.weighted_mean`, the formula above.

    Raises:
        TypeError: ``model`` is not a ``keras.Model``.
        ValueError: an argument is wrong, the model is not compiled or has no loss, or the batch is to be split, on a
            loss that does not say what it divides by, without ``weight_fn``; or it is to be merged by another rule
            than the default, and losses do not divide by one number.

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
        weight_fn: Callable[[Any, Any, Any], Any] | None = None,
        merge: Callable[[list[Any], Any], list[Any]] = weighted_mean,
    ) -> None:
        check_question(model, micro_batches, weight_fn, merge)
        self.model, self.micro_batches, self.merge = model, micro_batches, merge
        # What is merged with the weights of the whole adds up; any other rule wants the gradient of each share alone.
        self._totals = all_reduce if merge is weighted_mean else list
        self._weight_fn: Any = weight_fn
        self._takes_loss_as_it_is = weight_fn is not None or type(model).compute_loss is not keras.Model.compute_loss
        self._batch = tree.map_structure(
            lambda x: None if x is None else tf.convert_to_tensor(x), keras.utils.unpack_x_y_sample_weight(data)
        )
        self._examples = _examples(self._batch[0])
        (self._all_examples,) = self._totals([tf.cast(self._examples, keras.config.floatx())])
        self._asked = False
        self._prepare()

    def __call__(self, values: list[Any] | None = None) -> list[Any]:
        """Answers the gradient at ``values``.

        Args:
            values: a tensor for each of ``model.trainable_variables``. Defaults to their current values.

        Returns:
            The gradients in the same order, merged over micro-batches and replicas. Each is a tensor, for embeddings a
            ``tf.IndexedSlices`` without repeated rows, and ``None`` where the loss does not depend on the variable.
        """
        is_first, self._asked = not self._asked, True
        variables = self.model.trainable_variables
        values = [tf.convert_to_tensor(value) for value in (variables if values is None else values)]
        sums, rows, state = self._sum_over_parts(functools.partial(self._part, values, is_first), self._state)
        shapes = [tf.shape(value) for value, kind in zip(values, self._kinds, strict=True) if kind == "sparse"]
        slices = [tf.IndexedSlices(*pieces) for pieces in zip(rows[1::2], rows[::2], shapes, strict=True)]
        if replicas_of(self.model) > 1:  # one without an example has nothing to say, where BatchNorm says 0 / 0
            sums = [tf.where(self._examples > 0, total, 0) for total in sums]
            state = [tf.where(self._examples > 0, *pair) for pair in zip(state, self._state, strict=True)]
        *dense, losses = sums
        found = {"sparse": iter(slices), "dense": iter(dense)}
        gradients = [next(found[kind]) for kind in self._kinds if kind != "none"]
        *gradients, losses = (all_reduce if self.merge is weighted_mean else self._by_rule)([*gradients, losses])
        if is_first:
            for variable, value in zip(self._moving, state, strict=True):
                variable.assign(value)
            self._report(*tf.unstack(losses))
        merged = map(coalesce, gradients)
        return [None if kind == "none" else next(merged) for kind in self._kinds]

    def _by_rule(self, tensors: list[Any]) -> list[Any]:
        """Gradients merged by the rule; the losses, which come last, by their weights."""
        rows = gather([tf.convert_to_tensor(tensor) for tensor in [*tensors, self._denominator]])
        if rows[-1].shape[0] > 1:
            weights = rows[-1]
            weights = tf.where(tf.reduce_any(weights > 0), weights, tf.ones_like(weights))
            rows = [tf.gather(row, tf.where(weights > 0)[:, 0]) for row in [*rows[:-1], weights]]
        *gradients, losses, weights = rows
        merged = self.merge(gradients, weights)
        shapes = [tuple(gradient.shape[1:]) for gradient in gradients]
        if not isinstance(merged, (list, tuple)) or [tuple(getattr(m, "shape", "?")) for m in merged] != shapes:
            raise ValueError(
                f"`merge` must return a list with a tensor for each variable, of its shape: {shapes}. "
                f"Received: {merged!r} from merge={self.merge!r}"
            )
        merged = [tf.cast(one, gradient.dtype) for one, gradient in zip(merged, gradients, strict=True)]
        return [*merged, *weighted_mean([losses], weights)]

    @property
    def denominator(self) -> Any:
        """What the loss of the whole batch, on all replicas, divides by: the batch's weight among other batches.

        Raises:
            ValueError: there is no such number: a loss is a sum, or two losses divide by different numbers.
        """
        if self.merge is weighted_mean:
            return self._denominator
        return all_reduce([self._denominator])[0]

    @property
    def _denominator(self) -> Any:
        shares, is_known = self._shares, not self._takes_loss_as_it_is
        if self._weight_fn is not None:
            return self._weight
        if is_known and all(share.counts_examples for share in shares):
            return self._all_examples
        if is_known and len(shares) == 1 and shares[0].loss.reduction != "sum" and not self._adds_losses:
            return shares[0].denominator
        losses = [f"{share.output!r} with reduction={share.loss.reduction!r}" for share in shares]
        raise ValueError(
            "One number cannot weigh this batch among others: all losses would have to divide by the same, also those "
            "of `add_loss`, which are means over examples. Pass `weight_fn`, let `micro_batches` do without another "
            f"accumulation, or leave `merge` at its default. Received: {', '.join(losses)}"
            + " and losses added in layers"
            * self._adds_losses
        )

    def _prepare(self) -> None:
        """Finds what the first part needs: which variables a call of the model moves, and what the losses divide by."""
        (x, y, sample_weight), model, compiled = self._batch, self.model, compiled_loss(self.model)
        if not (model.built and getattr(compiled, "built", True)):  # traced, to build them; nothing is computed
            call = compiled or (lambda y, outputs, sample_weight: outputs)
            tf.function(lambda: call(y, model(x, training=False), sample_weight)).get_concrete_function()
        self._shares = loss_shares(compiled, is_whole=self.micro_batches * replicas_of(model) == 1)

        def look() -> list[Any]:
            with keras.StatelessScope(collect_losses=True) as scope:
                outputs = model(x, training=True)
                self._adds_losses, moved = bool(scope.losses), scope.get_current_value
                self._assigned = [v.path for v in model.trainable_variables if moved(v) is not None]
                variables = [*model.non_trainable_variables, *model.metrics_variables]
                self._moving = [variable for variable in variables if moved(variable) is not None]
                if self._shares and not self._takes_loss_as_it_is:
                    with standing_in(compiled, [share.measure for share in self._shares]):
                        compiled(y, outputs, sample_weight)
            return [share.denominator for share in self._shares if share.denominator is not None]

        denominators = iter(self._totals(_only(look)))
        for share in self._shares:
            share.denominator = None if share.denominator is None else next(denominators)
        self._state = [tf.identity(variable) for variable in self._moving]
        if self._assigned:
            raise ValueError(
                "A call of the model assigns to variables that are trainable. An oracle cannot say at which of their "
                f"values to take the gradient then: train this model without. Received: {', '.join(self._assigned)}"
            )
        if self._weight_fn is not None:
            (self._weight,), *_ = self._sum_over_parts(
                lambda begin, size, state: ([self._weigh(*self._slice(begin, size))], [], state), []
            )

    def _weigh(self, x: Any, y: Any, sample_weight: Any) -> Any:
        return tf.cast(self._weight_fn(x, y, sample_weight), keras.config.floatx())  # as Keras's losses are

    def _part(
        self, values: list[Any], is_first: bool, begin: Any, size: Any, state: list[Any]
    ) -> tuple[list[Any], list[Any], list[Any]]:
        """One part's dense gradients, and losses; the ids and rows of its sparse gradients; the state after it."""
        model = self.model
        x, y, sample_weight = self._slice(begin, size)
        share = tf.cast(_examples(x), self._all_examples.dtype) / self._all_examples
        known = [*zip(model.trainable_variables, values, strict=True), *zip(self._moving, state, strict=True)]
        with tf.GradientTape(watch_accessed_variables=False) as tape:
            tape.watch(values)
            with keras.StatelessScope(known, collect_losses=True) as scope, activity_as_mean(model, share):
                outputs = model(x, training=True)
                losses = self._losses(x, y, outputs, sample_weight, share)
            scaled_loss = model.optimizer.scale_loss(losses[0])
        unscale = 1 / model.optimizer.scale_loss(1.0)
        gradients = [widened(scaled(gradient, unscale)) for gradient in tape.gradient(scaled_loss, values)]
        if is_first:
            model.compute_metrics(x, y, outputs, sample_weight=sample_weight)
        self._kinds = [kind_of(gradient) for gradient in gradients]
        dense = [gradient for gradient in gradients if kind_of(gradient) == "dense"]
        sparse = [gradient for gradient in gradients if kind_of(gradient) == "sparse"]
        rows = [piece for gradient in sparse for piece in (gradient.indices, gradient.values)]
        return [*dense, tf.stack(losses)], rows, [scope.get_current_value(variable) for variable in self._moving]

    def _losses(self, x: Any, y: Any, outputs: Any, sample_weight: Any, share: Any) -> list[Any]:
        """This part's share of the loss of the whole batch, then of each compiled loss alone."""
        model, compiled, terms, weight = self.model, compiled_loss(self.model), [], 1.0
        with standing_in(compiled, self._shares):
            if self._takes_loss_as_it_is:
                terms.append(ops.sum(model.compute_loss(x, y, outputs, sample_weight)))
            elif compiled is not None:
                terms.append(compiled(y, outputs, sample_weight))
        if not self._takes_loss_as_it_is:
            terms += [ops.sum(ops.cast(loss, share.dtype)) * share for loss in model.losses]
        elif self._weight_fn is not None:
            weight = tf.math.divide_no_nan(self._weigh(x, y, sample_weight), self._weight)
        if not terms:
            raise ValueError("The model has no loss: pass `loss` to `model.compile`, or call `add_loss` in a layer.")
        losses = [sum(terms), *(loss.value for loss in self._shares if loss.value is not None)]
        return [ops.sum(tf.cast(loss, share.dtype)) * weight for loss in losses]

    def _sum_over_parts(self, part: Callable[..., Any], state: list[Any]) -> tuple[list[Any], list[Any], list[Any]]:
        """Calls ``part(begin, size, state)`` along the batch, adds its sums up, joins its rows, hands its state on."""
        n, parts = self._examples, self.micro_batches
        if parts == 1:
            size, count, rest = n, 1, 0
        elif isinstance(n, int):  # every shape is static, as XLA wants it: what is left is one more part, by itself
            size = -(-n // parts)
            count, rest = divmod(n, size) if n else (1, 0)
        else:
            size = tf.maximum(-(-n // parts), 1)
            count, rest = tf.maximum(-(-n // size), 1), 0
        sums, rows, state = part(0, size, state)
        pieces = [[row] for row in rows]
        if not isinstance(count, int) or count > 1:
            arrays = [tf.TensorArray(row.dtype, count - 1, infer_shape=False, element_shape=row.shape) for row in rows]

            def body(index: Any, sums: Any, state: Any, arrays: Any) -> Any:
                more, rows, state = part(index * size, size, state)
                arrays = [array.write(index - 1, row) for array, row in zip(arrays, rows, strict=True)]
                return index + 1, _add(sums, more), state, arrays

            start = _after([*sums, *rows], 1), sums, state, arrays
            _, sums, state, arrays = tf.while_loop(lambda i, *_: i < count, body, start, parallel_iterations=1)
            pieces = [[*piece, array.concat()] for piece, array in zip(pieces, arrays, strict=True)]
        if rest:
            more, rows, state = part(_after([*sums, *rows], count * size), rest, state)
            sums, pieces = _add(sums, more), [[*piece, row] for piece, row in zip(pieces, rows, strict=True)]
        return sums, [tf.concat(piece, 0) for piece in pieces], state

    def _slice(self, begin: Any, size: Any) -> Any:
        return tree.map_structure(lambda x: None if x is None else _slice(x, begin, size), self._batch)

    def _report(self, total: Any, *each: Any) -> None:
        """Updates the loss that ``fit`` shows, and each output's, as Keras weighs them."""
        for metric in self.model.metrics:
            if metric.name == "loss":
                metric.update_state(total, sample_weight=self._examples)
        for metric, value in zip(getattr(compiled_loss(self.model), "metrics", []), each, strict=False):
            metric.update_state(value, sample_weight=self._examples if isinstance(self._examples, int) else None)


def check_question(model: Any, micro_batches: Any, weight_fn: Any, merge: Any) -> None:
    """Raises the error that says what is wrong with the arguments of a :class:`~companion.GradientOracle`.

    Args:
        model: what should be a compiled ``keras.Model``.
        micro_batches: what should be an integer of at least 1.
        weight_fn: what should be ``None`` or a function.
        merge: what should be a function.

    Raises:
        RuntimeError: Keras runs on another backend than TensorFlow.
        TypeError: ``model`` is not a ``keras.Model``.
        ValueError: anything else is wrong.
    """
    if keras.backend.backend() != "tensorflow":
        raise RuntimeError(
            "`companion` asks for gradients in TensorFlow: set KERAS_BACKEND=tensorflow before Keras is imported. "
            f"Received: backend={keras.backend.backend()!r}"
        )
    if not isinstance(model, keras.Model):
        raise TypeError(f"`model` must be a keras.Model. Received: model={model!r}")
    if isinstance(micro_batches, bool) or not isinstance(micro_batches, int) or micro_batches < 1:
        raise ValueError(f"`micro_batches` must be an integer of at least 1. Received: micro_batches={micro_batches!r}")
    if weight_fn is not None and not callable(weight_fn):
        raise ValueError(f"`weight_fn` must be a function of (x, y, sample_weight). Received: weight_fn={weight_fn!r}")
    if not callable(merge):
        raise ValueError(
            "`merge` must be a function of (gradients, weights), such as companion.merging.median. "
            f"Received: merge={merge!r}"
        )
    if not model.compiled or model.optimizer is None:
        raise ValueError(
            "`model` must be compiled with an optimizer first: call `model.compile(...)`. Received: "
            f"model={model.name!r}, optimizer={getattr(model, 'optimizer', None)!r}"
        )
    has_own_loss = type(model).compute_loss is not keras.Model.compute_loss
    if has_own_loss and weight_fn is None and micro_batches * replicas_of(model) > 1:
        raise ValueError(
            f"`model` has a `compute_loss` of its own, {type(model).__name__}.compute_loss, which does not say what it "
            "divides by: pass `weight_fn`, a function of (x, y, sample_weight) that returns it for a part."
        )
    if replicas_of(model) > 1 and weight_fn is not None:
        raise ValueError(
            "`weight_fn` works on one replica only: Keras divides some losses by the number of replicas and leaves "
            f"others as they are. Received: weight_fn={weight_fn!r} on {replicas_of(model)} replicas"
        )


def _examples(x: Any) -> Any:
    """How many there are: an integer where that is static."""
    first = next(tensor for tensor in tree.flatten(x) if tensor is not None)
    return tf.shape(first)[0] if first.shape[0] is None else first.shape[0]


def _slice(tensor: Any, begin: Any, size: Any) -> Any:
    """``size`` examples from ``begin`` on; fewer at the end. Of static size wherever ``size`` is."""
    if isinstance(size, int):
        rest = tensor.shape[1:]
        return tf.ensure_shape(tf.slice(tensor, [begin, *[0] * len(rest)], [size, *[-1] * len(rest)]), [size, *rest])
    return tensor[begin : begin + size]


def _add(sums: list[Any], more: list[Any]) -> list[Any]:
    return [total + term for total, term in zip(sums, more, strict=True)]


def _after(tensors: list[Any], begin: Any) -> Any:
    """``begin``, but not before the tensors are there. Otherwise parts would run, and take memory, side by side."""
    with tf.control_dependencies(tensors):
        return tf.identity(begin)


def _only(function: Callable[[], list[Any]]) -> list[Any]:
    """What a function returns. In a graph, nothing else is computed: no assertion on the shape of a model's outputs."""
    if tf.executing_eagerly():
        return function()
    traced = tf.compat.v1.wrap_function(function, [])
    return traced.prune([], traced.outputs)() if traced.outputs else []
