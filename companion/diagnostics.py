"""What the conversation of optimizer and oracle tells: dials that ``fit`` shows, and which gradient broke first.

Chapter 18 of the book teaches it.
"""

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from companion.gradients import coalesce, square, widened
from companion.merging import weighted_mean
from companion.questions import functions_of
from companion.replicas import across_replicas, replicas_of
from companion.wrapping import wrapped_by

_KINDS = ("gradient_norm", "update_ratio", "noise_scale")
_PER_LAYER = "_per_layer"
_METHODS = ("get_metrics_result", "reset_metrics", "make_train_function")  # of a model: public, and stood in for
_SUM, _WEIGHT, _CALLS = 0, 1, 2  # the rows of what is added up


class Listener:
    r"""Hears a training step, and has its dials shown like metrics: the mean over the steps since the last reset.

    With :math:`g` the merged gradient of the step's first question, unscaled and not clipped, and :math:`\theta`,
    :math:`\theta'` the weights before and after ``apply``, decay and constraints included:

    .. math::

       \mathtt{gradient\_norm} = \lVert g \rVert \qquad
       \mathtt{update\_ratio} = \frac{\lVert \theta' - \theta \rVert}{\lVert \theta \rVert}

    The mean of ``update_ratio`` is over steps that moved a weight: between two updates of an accumulation, and where an
    overflow is skipped, there is nothing to measure; of weights that were all zero it is 1. ``noise_scale`` compares
    the parts :math:`i = 1 \dots k` of the batch, on all replicas. With :math:`n_i` examples and the gradient
    :math:`g_i` of a part, :math:`n = \sum_i n_i` and :math:`g = \sum_i n_i g_i / n`,

    .. math::

       S = \frac{1}{k - 1} \sum_i n_i \lVert g_i - g \rVert^2 \qquad
       G^2 = \lVert g \rVert^2 - \frac{S}{n} \qquad
       \mathtt{noise\_scale} = \frac{\overline{S}}{\overline{G^2}}

    :math:`S` is an unbiased estimate of the trace of the covariance of the gradient of one example, :math:`G^2` of the
    squared norm of the true gradient, and each is averaged over steps before the quotient. For parts of equal size it
    is the estimate of McCandlish et al. A part counts by its examples, whatever the loss divides by, so the unit is
    that of ``batch_size``. It is infinite where noise hides the gradient altogether.

    With ``_per_layer`` there is a number for each layer, named by its path: ``gradient_norm/dense``.

    Args:
        diagnostics: the names.
        check_finite: whether a gradient that is not finite is an error.

    References:
        McCandlish, Kaplan, Amodei and the OpenAI Dota Team, 2018, "An empirical model of large-batch training",
        appendix A.

    Taught in chapter 18, :doc:`/notebooks/18_listening_in`.
    """

    def __init__(self, diagnostics: tuple[str, ...], check_finite: bool) -> None:
        #: Whether a gradient that is not finite is an error.
        self.checks = check_finite
        self.diagnostics = diagnostics
        self._hears = {name.removesuffix(_PER_LAYER) for name in diagnostics}
        self._dials: list[tuple[str, str, list[int]]] = []  # name, kind, and which variables
        self._paths: list[str] | None = None
        self._sums: Any = None
        self._broken: Any = None  # the update at which a gradient was not finite, or 0; was the loss finite, and which
        self._quiet = 0  # how many steps, one for each replica, are asking Keras for metrics

    def build(self, model: keras.Model) -> None:
        """Makes room for the dials of a model that is built, anew if other variables are trained.

        Args:
            model: the model.
        """
        variables = model.trainable_weights
        paths = [variable.path for variable in variables]
        if paths == self._paths:
            return
        layers: dict[str, list[int]] = {}
        for index, path in enumerate(paths):
            layers.setdefault(path.rpartition("/")[0].removeprefix(f"{model.name}/"), []).append(index)
        self._dials = []
        for name in self.diagnostics:
            kind = name.removesuffix(_PER_LAYER)
            groups = {"": list(range(len(paths)))} if kind == name else {f"/{layer}": i for layer, i in layers.items()}
            self._dials += [(kind + layer, kind, indices) for layer, indices in groups.items()]
        dtype = keras.backend.result_type("float32", *(variable.dtype for variable in variables))
        with tf.init_scope():
            make = functools.partial(keras.Variable, "zeros", trainable=False, aggregation="only_first_replica")
            self._sums = make(shape=(3, len(self._dials)), dtype=dtype, name="diagnostics")
            self._broken = make(shape=(2 + len(paths),), dtype="int64", name="broken") if self.checks else None
        self._paths = paths

    def begin(self, oracle: Any) -> None:
        """Listens to the oracle's first question.

        Args:
            oracle: the :class:`~companion.GradientOracle` of the batch.
        """
        if tf.executing_eagerly():  # in a graph nothing has run when `joined` finds out
            self.refuse(metric.name for each in oracle.model.metrics for metric in getattr(each, "metrics", [each]))
        if "noise_scale" in self._hears:
            oracle.listener = functools.partial(_part, _in_xla(oracle.model))

    def step(
        self, optimizer: Any, oracle: Any, gradients: list[Any], answers: Any, apply: Callable[..., Any], is_taken: Any
    ) -> None:
        """Applies, and adds to the dials what is heard.

        Args:
            optimizer: the model's.
            oracle: the oracle, which has been asked.
            gradients: what is to be applied, as the optimizer scales it.
            answers: the answers to the first question, not scaled; ``None`` if they are the ``gradients``.
            apply: a function that applies them.
            is_taken: a condition without which nothing moves anyway, or ``None``.
        """
        self.build(oracle.model)
        variables, dtype, in_xla = oracle.model.trainable_weights, self._sums.dtype, _in_xla(oracle.model)
        scale = tf.cast(optimizer.scale_loss(1.0), dtype)
        is_scaled = any(isinstance(layer, keras.optimizers.LossScaleOptimizer) for layer in wrapped_by(optimizer))
        squares = list[Any]()
        if self._hears & {"gradient_norm", "noise_scale"}:
            squares = [square(gradient, dtype, in_xla) for gradient in (gradients if answers is None else answers)]
            squares = [total if answers is not None else total / scale**2 for total in squares]
        before = list[Any]()
        if "update_ratio" in self._hears:
            before = [widened(tf.identity(tf.convert_to_tensor(variable))) for variable in variables]
        is_heard = tf.constant(True)
        if self.checks:
            limit = scale if is_scaled else None
            is_heard = self._apply_if_finite(optimizer, oracle, gradients, answers, apply, is_taken, limit)
        else:
            apply(gradients)
        after = [widened(tf.convert_to_tensor(variable)) for variable in variables] if before else []
        pairs = [(new - old, old) for new, old in zip(after, before, strict=True)]
        lengths = [[square(each, dtype, in_xla) for each in pair] for pair in pairs]
        if not self._dials:
            return
        columns = []
        for _, kind, indices in self._dials:
            if kind == "update_ratio":
                columns.append(_ratio(*(tf.add_n([lengths[i][k] for i in indices]) for k in (0, 1))))
                continue
            norm = tf.add_n([squares[i] for i in indices])
            pair = (
                (tf.sqrt(norm), tf.ones_like(norm)) if kind == "gradient_norm" else _noise(norm, oracle.heard, indices)
            )
            columns.append(pair)
        if is_scaled and squares:  # an overflow, which is skipped
            is_heard &= tf.math.is_finite(tf.add_n(squares))
        found = [tf.stack(row) for row in zip(*columns, strict=True)]
        found = [tf.where(is_heard, row, tf.zeros_like(row)) for row in found] if is_scaled or self.checks else found
        self._sums.assign_add(tf.stack([*found, tf.ones_like(found[0])]))

    def joined(self, logs: dict[str, Any]) -> dict[str, Any]:
        """The logs of a step with the dials.

        Args:
            logs: what Keras says of the step.
        """
        self.refuse(logs)
        return {**logs, **self._shown()}

    def attach(self, model: keras.Model) -> None:
        """Stands in for the methods of a model that show metrics, reset them, and compile the step.

        Args:
            model: the model.
        """
        for name in _METHODS:
            setattr(model, name, functools.partial(getattr(self, name), getattr(type(model), name).__get__(model)))

    def get_metrics_result(self, inherited: Any) -> dict[str, Any]:
        """What ``fit`` shows at the end of an epoch. In an evaluation nothing is heard, and nothing added.

        Args:
            inherited: the model's own method.
        """
        hears = tf.executing_eagerly() and not self._quiet and self._sums is not None
        return {**inherited(), **(self._shown() if hears and np.any(self._sums.numpy()[_CALLS]) else {})}

    def reset_metrics(self, inherited: Any) -> None:
        """Begins anew.

        Args:
            inherited: the model's own method.
        """
        inherited()
        if self._sums is not None:
            self._sums.assign(tf.zeros_like(self._sums))

    def make_train_function(self, inherited: Any, force: bool = False) -> None:
        """Makes the step, and has looked after it whether a gradient was not finite.

        Args:
            inherited: the model's own method.
            force: as in Keras.
        """
        model = inherited.__self__
        before = model.train_function
        inherited(force)
        function = model.train_function
        if self.checks and function is not before:

            def checked(iterator: Any) -> Any:
                logs = function(iterator)
                self._raise_if_broken(model)
                return logs

            model.train_function = checked

    def refuse(self, names: Any) -> None:
        """Raises where dials have the names of metrics.

        Args:
            names: those that the model shows.
        """
        clash = sorted(set(names) & {*self.diagnostics, *(name for name, *_ in self._dials)})
        if clash:
            raise ValueError(
                "`diagnostics` have the names of metrics that the model shows: give those metrics other names. "
                f"Received: diagnostics={self.diagnostics} and metrics named {clash}"
            )

    def _shown(self) -> dict[str, Any]:
        if not self._dials:
            return {}
        totals, weights = tf.unstack(tf.convert_to_tensor(self._sums)[:_CALLS])
        found = {}
        for index, (name, kind, _) in enumerate(self._dials):
            total, weight = totals[index], weights[index]
            quotient = tf.math.divide_no_nan(total, weight) if kind == "update_ratio" else total / weight
            if kind == "noise_scale":
                quotient = tf.where((weight <= 0) & (total > 0), tf.fill([], tf.cast(np.inf, total.dtype)), quotient)
            found[name] = quotient
        return found

    def _apply_if_finite(
        self, optimizer: Any, oracle: Any, gradients: Any, answers: Any, apply: Any, is_taken: Any, scale: Any
    ) -> Any:
        """Applies unless something is not finite; then notes what, and puts back what the question has moved.

        Returns whether it has applied.
        """
        taken = tf.constant(True) if is_taken is None else is_taken
        pairs = zip(answers, gradients, strict=True)
        flags = [_is_finite(answer) & (_is_finite(given) | ~taken) for answer, given in pairs]
        is_fine = tf.reduce_all(flags)
        if scale is not None:  # an overflow lowers the scale
            is_fine |= scale > 1
        is_whole = tf.equal(self._broken[0], 0)  # also in what is left of several steps in one execution
        found = tf.stack([optimizer.iterations + 1, *(tf.cast(f, "int64") for f in (_is_finite(oracle.loss), *flags))])
        self._broken.assign(tf.where(is_whole & ~is_fine, found, self._broken))
        goes_on = is_whole & is_fine
        oracle.take_back(unless=goes_on)
        for variable, value in oracle.kept:
            variable.assign(tf.where(goes_on, variable, value))

        def choose(strategy: Any, *args: Any) -> None:
            each = strategy.extended.call_for_each_replica
            tf.cond(goes_on, lambda: [each(apply, args=args), None][1], lambda: None)

        across_replicas(tf.distribute.get_strategy(), choose, gradients)
        return goes_on

    def _raise_if_broken(self, model: keras.Model) -> None:
        update, loss_is_finite, *flags = np.asarray(self._broken).tolist() if self._broken is not None else [0, 1]
        if not update:
            return
        self._broken.assign(tf.zeros_like(self._broken))
        paths = self._paths or []
        broken = [path for path, is_finite in zip(paths, flags, strict=True) if not is_finite]
        fine = [path for path, is_finite in zip(paths, flags, strict=True) if is_finite]
        where = (
            f"It was the first on the way back from the loss; these were still finite: {', '.join(fine)}."
            if fine
            else f"So was every other, and the loss was {'finite' if loss_is_finite else 'not finite either'}: look at "
            "the batch, the loss function and the forward pass (tf.debugging.enable_check_numerics names an operation)."
        )
        raise ValueError(
            f"The gradient of {broken[-1]!r} was infinite or NaN at update {update}. {where} Weights, slots and "
            "counters are as before that update. If `gradient_norm` had been growing, lower the learning rate or set "
            "`clipnorm`; otherwise look there for a division by zero, a logarithm or a root of zero. Received: "
            f"gradients that are not finite of {', '.join(broken)} in model={model.name!r}"
        )


class Listening:
    """A model with ``diagnostics`` and ``check_finite`` at class level, as :class:`~companion.InjectedModel` is."""

    diagnostics: tuple[str, ...] = ()
    check_finite: bool = False

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Refuses a class whose training step would be that of ``keras.Model``, and nothing heard or divided."""
        super().__init_subclass__(**kwargs)
        if getattr(cls, "train_step", None) is keras.Model.train_step:
            names = ", ".join(base.__name__ for base in cls.__bases__)
            raise TypeError(f"{cls.__name__} must name InjectedModel first among its bases. Received: {names}")

    def get_metrics_result(self) -> dict[str, Any]:
        """What ``fit`` shows."""
        inherited, listener = super().get_metrics_result, listener_of(self)  # type: ignore[misc]
        return listener.get_metrics_result(inherited) if listener else inherited()

    def reset_metrics(self) -> None:
        """Begins anew."""
        inherited, listener = super().reset_metrics, listener_of(self)  # type: ignore[misc]
        if listener:
            inherited = functools.partial(listener.reset_metrics, inherited)
        inherited()

    def make_train_function(self, force: bool = False) -> None:
        """Makes what ``fit`` calls."""
        inherited, listener = super().make_train_function, listener_of(self)  # type: ignore[misc]
        if listener:
            inherited = functools.partial(listener.make_train_function, inherited)
        inherited(force or vars(self).pop("_is_stale", False))  # a compiled step holds what was set when it was made


def listener_for(model: Any, diagnostics: Any, check_finite: Any, micro_batches: int, merge: Any) -> Listener | None:
    """Makes a listener; ``None`` if nothing is to be heard.

    Args:
        model: the model.
        diagnostics: names.
        check_finite: whether a gradient that is not finite is an error.
        micro_batches: in how many parts a batch is, on each replica.
        merge: the rule by which replicas merge.

    Raises:
        ValueError: a name is unknown, or there is one part only and ``noise_scale`` is asked for.
    """
    known = [kind + suffix for kind in _KINDS for suffix in ("", _PER_LAYER)]
    names = (diagnostics,) if isinstance(diagnostics, str) else diagnostics
    if not isinstance(names, (tuple, list)) or any(name not in known for name in names) or len({*names}) < len(names):
        raise ValueError(f"`diagnostics` must hold some of {known}, each once. Received: diagnostics={diagnostics!r}")
    if not isinstance(check_finite, (bool, np.bool_)):
        raise ValueError(f"`check_finite` must be True or False. Received: check_finite={check_finite!r}")
    noise = [name for name in names if name.startswith("noise_scale")]
    if noise and micro_batches * replicas_of(model) < 2:
        raise ValueError(
            f"{noise[0]!r} in `diagnostics` compares the gradients of parts of a batch: pass `micro_batches` of at "
            f"least 2. Received: micro_batches={micro_batches}"
        )
    if noise and merge is not weighted_mean:
        raise ValueError(
            f"{noise[0]!r} in `diagnostics` compares parts with their mean: leave `merge` at its default. Received: "
            f"merge={merge!r}"
        )
    listener = Listener(tuple(names), bool(check_finite)) if names or check_finite else None
    if listener:
        listener.refuse(_compiled_names(model))
    return listener


def listener_of(model: Any) -> Listener | None:
    """The listener of a model that says at class level what is to be heard.

    Args:
        model: an :class:`~companion.InjectedModel`.
    """
    wanted = (model.diagnostics, model.check_finite, model.micro_batches, *functions_of(model))
    if wanted != vars(model).get("_listens_to"):
        listener = listener_for(model, *wanted[:3], wanted[-1])
        vars(model).update(_listens_to=wanted, _listener=listener, _is_stale=True)  # past Keras, which would track it
    return vars(model)["_listener"]


def detach(model: keras.Model) -> None:
    """Gives a model its own methods back.

    Args:
        model: a model to which a listener may be attached.
    """
    for name in _METHODS:
        if isinstance(getattr(getattr(vars(model).get(name), "func", None), "__self__", None), Listener):
            delattr(model, name)


@contextmanager
def quiet(listener: Listener | None) -> Iterator[None]:
    """A context in which the model shows its own metrics only.

    Args:
        listener: a listener, or ``None``.
    """
    if listener:
        listener._quiet += 1
    try:
        yield
    finally:
        if listener:
            listener._quiet -= 1


def _compiled_names(model: Any) -> set[str]:
    """The names of compiled metrics, and other words, before Keras has made the metrics."""
    try:
        config = model.get_compile_config() or {}
    except Exception:  # of a loss or a metric that cannot be saved: `joined` finds out
        return set()
    leaves = keras.tree.flatten([config.get(kind) for kind in ("metrics", "weighted_metrics")])
    return {leaf for leaf in leaves if isinstance(leaf, str)}


def _in_xla(model: Any) -> bool:
    return bool(model.jit_compile and not model.run_eagerly)


def _part(in_xla: bool, gradients: list[Any], examples: Any) -> Any:
    """What is added up over parts: each variable's squared norm over the number of examples; one part; the examples."""
    known = [gradient.dtype for gradient in gradients if gradient is not None]
    dtype = keras.backend.result_type("float32", *(dtype.name for dtype in known))
    n = tf.cast(examples, dtype)
    squares = [tf.math.divide_no_nan(square(coalesce(gradient), dtype, in_xla), n) for gradient in gradients]
    return tf.stack([*squares, tf.cast(n > 0, dtype), n])


def _ratio(moved: Any, length: Any) -> tuple[Any, Any]:
    """How far weights have moved over how long they were, and whether they have moved; given their squares."""
    length = tf.where(length > 0, length, moved)
    return tf.sqrt(tf.math.divide_no_nan(moved, length)), tf.cast(tf.not_equal(moved, 0), moved.dtype)


def _noise(norm: Any, heard: Any, indices: list[int]) -> tuple[Any, Any]:
    """One step's estimates of the trace and of the squared norm of the true gradient; zeros if there is one part."""
    heard = tf.cast(heard, norm.dtype)
    *parts, count, n = tf.unstack(heard)
    trace = n * (n * tf.add_n([parts[i] for i in indices]) - norm) / (count - 1)
    zero = tf.zeros_like(norm)
    return tf.where(count > 1, trace, zero), tf.where(count > 1, norm - tf.math.divide_no_nan(trace, n), zero)


def _is_finite(gradient: Any) -> Any:
    if gradient is None:
        return tf.constant(True)
    values = gradient.values if isinstance(gradient, tf.IndexedSlices) else gradient
    return tf.reduce_all(tf.math.is_finite(values))
