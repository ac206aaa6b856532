r"""Minimises the loss of all data by methods that ask as often as they like, such as L-BFGS. Chapter 17 teaches them.

On all data the oracle is a function of the weights. It can be asked again near the last question, and what two answers
say together holds: so a line search works, and differences of gradients tell the curvature.
"""

import collections
import functools
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import keras
import numpy as np
import tensorflow as tf
from keras import tree

from companion import arguments
from companion.batches import examples, part_of, tensors
from companion.denominators import of_metrics
from companion.oracle import GradientOracle
from companion.questions import Recorder, check_question
from companion.replicas import replicas_of

# SciPy's methods that take a gradient and need no Hessian; and what keeps each from stopping early, by a criterion of
# its own that is not `tolerance`.
_METHODS: dict[str, dict[str, float]] = {
    "L-BFGS-B": {"ftol": 0.0},
    "BFGS": {},
    "CG": {},
    "Newton-CG": {"xtol": 0.0},  # and the distance over which it takes differences of gradients, see `_options`
    "TNC": {"ftol": 0.0, "gtol": 0.0, "xtol": 0.0},
    "SLSQP": {"ftol": 0.0},
    "trust-constr": {"xtol": 0.0},
}
_HAVE_GTOL = ("L-BFGS-B", "BFGS", "CG", "trust-constr")  # the largest entry of the gradient
_HAVE_MAXFUN = ("L-BFGS-B", "TNC")
_REMEMBERED = 40  # answers: the longest line search is shorter


def minimize(
    model: keras.Model,
    x: Any,
    y: Any = None,
    sample_weight: Any = None,
    *,
    method: str = "L-BFGS-B",
    batch_size: int | None = None,
    micro_batches: int = 1,
    max_gradients: int = 1000,
    tolerance: float = 1e-8,
    callbacks: Any = None,
    verbose: Any = "auto",
    options: dict[str, Any] | None = None,
) -> Any:
    r"""Minimises the loss of all data, asking for loss and gradient as often as the method likes.

    .. math::

       L(\theta) = \frac{1}{\sum_b D_b} \sum_b D_b L_b(\theta)

    with the loss :math:`L_b` of each batch and what it divides by, :math:`D_b`. This is the loss of all data in one
    batch: with masks, sample weights, a ragged last batch, and regularizers once. SciPy sees it in float64, whatever
    the weights are.

    The loss has to be a function of the weights. So nothing may draw at random or move a state: dropout, noise,
    BatchNorm that is not frozen. The model's optimizer plays no part, with its clipping and decay. Metrics stay as they
    are. The weights move at the end of an iteration if there are ``callbacks``, otherwise once, at the end. Whatever
    happens (an interrupt, an error, a line search that fails), the model holds the best weights that were seen.

    Args:
        model: a compiled model, on one replica. What is trainable in it is trained.
        x: the inputs: arrays, sparse ones of SciPy too; a ``tf.data.Dataset`` or ``keras.utils.PyDataset`` of batches,
            which is gone through for each gradient.
        y: the targets, unless ``x`` holds them. Defaults to ``None``.
        sample_weight: the weights of examples, unless ``x`` holds them. Defaults to ``None``.
        method: one of SciPy's that take a gradient: ``"L-BFGS-B"``, ``"BFGS"``, ``"CG"``, ``"Newton-CG"``, ``"TNC"``,
            ``"SLSQP"``, ``"trust-constr"``. All but the first, ``"CG"`` and ``"TNC"`` need memory for the square of the
            number of weights, or many gradients an iteration. Defaults to ``"L-BFGS-B"``.
        batch_size: how many examples of arrays are asked about at once. Defaults to ``None``: all.
        micro_batches: in how many parts a batch is processed, see :class:`~companion.GradientOracle`. Defaults to 1.
        max_gradients: the number of gradients of all data that are asked for at most. The first is asked for twice, to
            see whether the loss is a function. Defaults to 1,000.
        tolerance: it is enough when no entry of the gradient is larger. Defaults to 1e-8.
        callbacks: those of ``fit``; an epoch is an iteration of the method. Defaults to ``None``.
        verbose: as in ``fit``. Defaults to ``"auto"``.
        options: those of SciPy's method, such as ``{"maxcor": 30}``. They replace what is set here: ``tolerance`` is
            the only reason to be satisfied. Defaults to ``None``.

    Returns:
        A ``keras.callbacks.History``. For each iteration it holds the ``loss``, the ``gradient_norm`` and the number of
        ``gradients`` asked for so far; as attribute ``result`` what SciPy says, where ``success`` is whether
        ``tolerance`` holds.

    Raises:
        ImportError: SciPy is not installed.
        TypeError: ``model`` is not a ``keras.Model``.
        ValueError: an argument is wrong, the model has nothing to train or constraints, loss or gradient are not finite
            at the start, the loss is not a function of the weights, or several batches cannot be added up. No weight
            has moved.

    Example:
        >>> model = keras.Sequential([keras.Input((1,)), keras.layers.Dense(1)])
        >>> model.compile(loss="mse")
        >>> x = np.array([[0.0], [1.0], [2.0]])
        >>> history = minimize(model, x, 3 * x + 1, verbose=0)
        >>> print(model.layers[0].kernel.numpy().round(3), history.history["gradients"][-1] < 20)
        [[3.]] True

    References:
        Liu and Nocedal, 1989, "On the limited memory BFGS method for large scale optimization". Byrd, Lu, Nocedal and
        Zhu, 1995, "A limited memory algorithm for bound constrained optimization".

    Taught in chapter 17, :doc:`/notebooks/17_asking_until_satisfied`.
    """
    check_question(model)
    if replicas_of(model) > 1:
        raise ValueError(f"`model` must be on one replica. Received: a model on {replicas_of(model)} replicas")
    micro_batches = arguments.integer("micro_batches", micro_batches, 1)
    method = arguments.choice("method", method, tuple(_METHODS))
    max_gradients = arguments.integer("max_gradients", max_gradients, 1)
    tolerance = arguments.number("tolerance", tolerance, 0)
    if options is not None and not isinstance(options, dict):
        raise ValueError(f"`options` must be a dict. Received: options={options!r}")
    scipy_minimize, scipy_result, limits = _scipy()
    moves = bool(callbacks)
    loss = _Loss(model, _batches(x, y, sample_weight, batch_size), micro_batches, max_gradients, moves)
    if not isinstance(callbacks, keras.callbacks.CallbackList):
        parameters = {"verbose": verbose, "epochs": max_gradients, "steps": 1}
        callbacks = keras.callbacks.CallbackList(callbacks, True, verbose != 0, model, **parameters)
    model.stop_training = False
    callbacks.on_train_begin()
    start = loss.begin()
    logs: dict[str, Any] = {}

    def after_iteration(point: Any, *_: Any) -> None:
        loss.here = here = loss.answer_at(point)
        if moves and here.point is not loss.held:
            loss.put(tf.constant(here.point))
        logs.update(loss=here.loss, gradient_norm=float(np.linalg.norm(here.gradient)), gradients=loss.asked)
        loss.open_iteration()
        for callback in callbacks.callbacks:  # the list itself would convert logs, at the cost of a small gradient
            callback.on_epoch_end(loss.iterations, logs)
        loss.close_iteration()
        reasons = {
            "The largest entry of the gradient is within `tolerance`.": np.abs(here.gradient).max() <= tolerance,
            "A callback set `model.stop_training`.": model.stop_training,
            "`max_gradients` is reached.": loss.asked >= max_gradients,
        }
        loss.reason = next((reason for reason, holds in reasons.items() if holds), "")
        if loss.reason:
            raise StopIteration

    loss.on_iteration_begin = callbacks.on_epoch_begin
    settings = _options(method, tolerance, max_gradients) | (options or {})
    try:
        with limits(1, "blas"):  # vectors are short, and BLAS's waiting threads would take TensorFlow's processors
            result = scipy_minimize(loss, start, jac=True, method=method, callback=after_iteration, options=settings)
    except StopIteration:
        result = scipy_result(nit=loss.iterations, nfev=loss.asked, status=99)
    finally:
        loss.put(tf.constant(loss.best.point))
    if loss.reason:
        last = loss.best if loss.is_open else loss.here  # in the middle of an iteration, or at its end
        result.update(x=last.point, fun=last.loss, jac=last.gradient, message=loss.reason)
    end = loss.answer_at(result.x)
    result.success = bool(np.abs(end.gradient).max() <= tolerance)
    if result.success and end.loss <= loss.first.loss:
        loss.put(tf.constant(end.point))
    callbacks.on_train_end(logs)
    model.history.result = result
    return model.history


class _Answer(NamedTuple):
    point: Any
    loss: float
    gradient: Any

    def is_finite(self) -> bool:
        return bool(np.isfinite(self.loss) and np.isfinite(self.gradient).all())


class _Enough(StopIteration):
    """`max_gradients` have been asked for, and SciPy wants another one."""


class _Loss:
    """The loss of all data and its gradient, as a function of one vector: all weights, in float64."""

    def __init__(self, model: Any, data: Iterable[Any], micro_batches: int, most: int, moves: bool) -> None:
        self.model, self.data, self.micro_batches, self.most = model, data, micro_batches, most
        first, count = None, 0
        for batch in data:  # to the end: a `tf.data` cache that was begun may be taken for whole
            first, count = (first if count else batch), count + 1
        if not count:
            raise ValueError("`x` is a data set without a batch.")
        self.is_several, self.is_fixed = count > 1, isinstance(data, list) and count == 1
        GradientOracle(model, first).prepare()  # builds the model, if it is not
        self.variables = list(model.trainable_weights)
        _check_weights(self.variables)
        self.sizes = [int(np.prod(variable.shape)) for variable in self.variables]
        self.moves, self.held = moves and self.is_fixed, None  # the point that a question has left in the model
        self.ask: Any = (lambda point: self._question(point, first)[0]) if self.is_fixed else self._question
        self.put: Any = self._put
        if not model.run_eagerly:
            compiled, vector = (
                functools.partial(tf.function, autograph=False),
                tf.TensorSpec([sum(self.sizes)], "float64"),
            )
            self.ask = compiled(self.ask, reduce_retracing=True, jit_compile=model.jit_compile)
            self.put = compiled(self._put).get_concrete_function(vector)
            if self.is_fixed:  # a call then costs what that of a bare function does
                self.ask = self.ask.get_concrete_function(vector)
        self.asked = self.iterations = 0
        self.is_open, self.reason = False, ""
        self.on_iteration_begin: Callable[[int], Any] = lambda iteration: None
        self.recent: collections.deque[_Answer] = collections.deque(maxlen=_REMEMBERED)

    def begin(self) -> Any:
        """The vector to start from, once it is certain that the loss is a finite function there."""
        start = np.concatenate([np.ravel(tf.cast(variable.value, "float64")) for variable in self.variables])
        self.here = self.best = self.first = first = self._answer(start)
        self.recent.append(first)
        if not first.is_finite():
            raise ValueError(
                "Loss and gradient must be finite at the weights to start from. Look at the data, the initial weights, "
                "and logarithms of 0 in the loss; under mixed_float16 the scaled loss overflows easily, where float32 "
                f"and mixed_bfloat16 do not. Received: loss={first.loss!r}, with a gradient of which "
                f"{np.count_nonzero(~np.isfinite(first.gradient))} of {start.size} entries are not finite"
            )
        if self.asked < self.most:
            again, precision = self._answer(start).loss, min(1e3 * np.finfo(keras.config.floatx()).eps, 1e-2)
            if not abs(again - first.loss) <= precision * (abs(again) + abs(first.loss)):
                raise ValueError(
                    "The loss must depend on the weights alone, but asked twice at the same weights it gave two "
                    "numbers: something draws at random, in a layer, in the loss, or in the data (augmentation, or a "
                    "data set that brings others each time). Take it out, or use `fit`, which is made for it. "
                    "Received: "
                    f"{first.loss!r}, then {again!r}"
                )
        return start

    def __call__(self, point: Any) -> tuple[float, Any]:
        """What SciPy asks for: the loss and its gradient."""
        last = self.recent[-1]
        if not np.array_equal(point, last.point):
            if self.asked >= self.most:
                self.reason = "`max_gradients` is reached."
                raise _Enough
            self.open_iteration()
            last = self._answer(np.array(point, "float64"))
            if not last.is_finite():
                last = self._far_too_high(last.point)
            elif last.loss < self.best.loss:
                self.best = last
            self.recent.append(last)
        return last.loss, last.gradient.copy()

    def _answer(self, point: Any) -> _Answer:
        self.asked += 1
        if self.is_fixed:
            found = self.ask(tf.constant(point)).numpy()
            self.held = point if self.moves else None
            return _Answer(point, float(found[0]), found[1:])
        found, weights = np.zeros(point.size + 1), 0.0
        for batch in self.data:
            share, weight = self.ask(tf.constant(point), tensors(batch))
            found, weights = found + float(weight) * share.numpy(), weights + float(weight)
        with np.errstate(invalid="ignore", divide="ignore"):
            return _Answer(point, float(found[0] / weights), found[1:] / weights)

    def _far_too_high(self, point: Any) -> _Answer:
        """Where the loss is not finite: a parabola, from which a line search learns to go a tenth of the way."""
        rise = abs(self.here.gradient @ (point - self.here.point))
        return _Answer(point, self.here.loss + 4 * rise, -9 * self.here.gradient)

    def _values(self, point: Any) -> list[Any]:
        """A tensor for each weight."""
        pieces = zip(tf.split(point, self.sizes), self.variables, strict=True)
        return [tf.cast(tf.reshape(piece, variable.shape), variable.dtype) for piece, variable in pieces]

    def _put(self, point: Any) -> None:
        """Puts a point into the model."""
        self._assign(self._values(point))

    def _assign(self, values: list[Any]) -> None:
        for variable, value in zip(self.variables, values, strict=True):
            variable.assign(value)

    def _question(self, point: Any, batch: Any) -> tuple[Any, Any]:
        """A batch's loss, followed by its gradient; and what weighs it among the others."""
        try:
            oracle = GradientOracle(self.model, batch, self.micro_batches)
            oracle.defer()
            with Recorder([], []) as scope:  # what the question assigns goes here, and nowhere else
                values = self._values(point)
                loss, answers = oracle.value_and_gradient(values)
                weight = oracle.denominator if self.is_several else tf.ones(())
        except ValueError as error:
            if "`weight_fn`" not in str(error):
                raise
            raise ValueError(
                "The loss does not say what it divides by, or its parts divide by different numbers, so that batches "
                "cannot be added up: let all data be one batch, with `batch_size=None`, or compile the model with a "
                "loss that returns one value for each example and has a `reduction` that is a mean. Where several "
                "losses divide by different numbers, one batch can be processed in `micro_batches`. Received: "
                f"micro_batches={self.micro_batches}, {'several batches' if self.is_several else 'one batch'}. {error}"
            ) from error
        _check_state(self.model, scope)
        if self.moves:  # on the way: at the end of an iteration the last point asked about is nearly always the one
            self._assign(values)
        if all(answer is None for answer in answers):
            raise ValueError(f"The loss depends on no trainable weight. Received: model={self.model.name!r}")
        flat = [
            tf.zeros([size], "float64")
            if answer is None
            else tf.reshape(tf.cast(tf.convert_to_tensor(answer), "float64"), [size])
            for answer, size in zip(answers, self.sizes, strict=True)
        ]
        return tf.concat([[tf.reduce_sum(tf.cast(loss, "float64"))], *flat], 0), weight

    def answer_at(self, point: Any) -> _Answer:
        """What was answered at the point that SciPy has accepted: one of the last, or the nearest to it."""
        for answer in reversed(self.recent):
            if np.array_equal(answer.point, point):
                return answer
        return min(self.recent, key=lambda answer: float(np.abs(answer.point - point).max()))

    def open_iteration(self) -> None:
        """Lets callbacks know, once, that an iteration begins."""
        if not self.is_open:
            self.is_open = True
            self.on_iteration_begin(self.iterations)

    def close_iteration(self) -> None:
        """Counts an iteration, and lets go what was answered on the way: one is as long as two sets of weights."""
        self.is_open, self.iterations = False, self.iterations + 1
        self.recent = collections.deque([self.here, self.recent[-1]], maxlen=_REMEMBERED)


def _check_weights(variables: list[Any]) -> None:
    if not variables:
        raise ValueError("`model` has no trainable weights, so there is nothing to minimise over.")
    constrained = [variable.path for variable in variables if variable.constraint is not None]
    if constrained:
        raise ValueError(
            "`model` has weights with constraints, which SciPy would not know of: build it without them, or use `fit`. "
            f"Received: constraints on {', '.join(constrained)}"
        )


def _check_state(model: Any, scope: Recorder) -> None:
    """Raises if a question moves anything but metrics."""
    theirs = of_metrics(model)
    moved = [variable.path for key, variable in scope.assigned.items() if key not in theirs]
    if moved:
        raise ValueError(
            "The loss must be a function of the weights, and asking for it moves a state, which the next question "
            "would find changed. Take out what draws at random (dropout, noise, augmentation), or set its rate to 0; "
            "freeze BatchNormalization, which then uses its moving statistics (`layer.trainable = False`); let "
            f"recurrent layers not be stateful. Or use `fit`. Received: {', '.join(moved)} would be assigned"
        )


def _batches(x: Any, y: Any, sample_weight: Any, batch_size: Any) -> Iterable[Any]:
    """All batches, to be gone through any number of times: a list of those of arrays, or the data set."""
    is_python, is_tensorflow = isinstance(x, keras.utils.PyDataset), isinstance(x, tf.data.Dataset)
    if is_python or is_tensorflow:
        for name, value in (("y", y), ("sample_weight", sample_weight), ("batch_size", batch_size)):
            if value is not None:
                raise ValueError(f"`{name}` must be left out: `x` is a data set, which brings it. Received: {value!r}")
        length = x.num_batches if is_python else x.cardinality().numpy()
        if length in (None, tf.data.INFINITE_CARDINALITY):
            raise ValueError("`x` must end, since the loss is that of all data: leave out `repeat`, or `take` batches.")
        return x
    if isinstance(x, Iterator) or x is None:
        raise ValueError(
            "`x` must be arrays, a tf.data.Dataset or a keras.utils.PyDataset: it is gone through many times, which an "
            f"iterator does not allow. Received: x={x!r}"
        )
    for name, value in (("x", x), ("y", y), ("sample_weight", sample_weight)):
        numbers = [leaf for leaf in tree.flatten(value) if isinstance(leaf, (bool, int, float, str, bytes))]
        if numbers:
            raise ValueError(
                f"`{name}` must be an array, or a structure of arrays, where a list is one of inputs or outputs: pass "
                f"`np.array({name})`. Received: {name} with {numbers[0]!r} in it"
            )
    data = tensors((x, y, sample_weight))
    rows = [examples(leaf) for leaf in tree.flatten(data) if leaf is not None]
    if len(set(rows)) != 1 or not rows[0]:
        raise ValueError(
            "`x`, `y` and `sample_weight` must hold a row for each example, and at least one. Received: arrays with "
            f"{', '.join(map(str, rows))} rows"
        )
    size = rows[0] if batch_size is None else arguments.integer("batch_size", batch_size, 1)

    def batch(begin: int) -> Any:
        count = min(size, rows[0] - begin)
        return tree.map_structure(lambda leaf: None if leaf is None else part_of(leaf, begin, count), data)

    return [batch(begin) for begin in range(0, rows[0], size)]


def _options(method: str, tolerance: float, max_gradients: int) -> dict[str, Any]:
    options: dict[str, Any] = {"gtol": tolerance} if method in _HAVE_GTOL else {}
    if method == "Newton-CG":
        options["eps"] = float(np.finfo(keras.config.floatx()).eps ** 0.5)
    return options | {"maxfun" if method in _HAVE_MAXFUN else "maxiter": max_gradients + 10, **_METHODS[method]}


def _scipy() -> tuple[Any, Any, Any]:
    try:
        from scipy.optimize import OptimizeResult, minimize
        from threadpoolctl import threadpool_limits
    except ImportError as error:
        raise ImportError(
            "companion.minimize needs SciPy and threadpoolctl: install them with pip install scipy threadpoolctl."
        ) from error
    return minimize, OptimizeResult, threadpool_limits
