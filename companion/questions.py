"""What a question to the oracle is: its arguments, its points, and what variables hold and assign meanwhile.

Chapter 06 of the book teaches it.
"""

import functools
import inspect
from collections.abc import Callable
from typing import Any

import keras
import tensorflow as tf

from companion import arguments
from companion.backend import environment
from companion.denominators import compiled_loss, is_built
from companion.gradients import all_finite
from companion.merging import weighted_mean
from companion.replicas import gather, replicas_of

_WATCHER = "variable_watcher"  # in TensorFlow 2.21's `custom_gradient` while it calls; test_parts.py notices if it goes
_PLAIN = "train in one part with an optimizer that asks once, and without `check_finite`"  # as Keras itself does


class Recorder(keras.StatelessScope):
    """During a question: what variables hold. It notes which of them the question assigns, whoever owns them.

    Args:
        known: pairs of a variable and its value.
        trained: the trainable variables; those that are not known are what they are.

    Attributes:
        assigned: the variables that were assigned, by their ids.
        is_bound: whether an error was about what knows variables themselves only, and no values that stand for them.
            AutoGraph and Keras raise the error anew, so that its class cannot say it.
    """

    def __init__(self, known: list[Any], trained: list[Any]) -> None:
        super().__init__(known, collect_losses=True)
        self.assigned, self.is_bound = dict[int, Any](), False
        self._variables, self._trained = trained, {id(variable): variable.value for variable in trained}

    def __enter__(self) -> Any:
        self._graph = _graph()
        return super().__enter__()

    def __exit__(self, *raised: Any) -> None:
        super().__exit__(*raised)
        if isinstance(raised[1], AttributeError) and "'handle'" in str(raised[1]):  # a tape wants a variable's
            self.refuse_bound(self._variables)

    def get_current_value(self, variable: Any) -> Any:
        """What a variable holds in the question, which Keras asks for here instead of there."""
        value, itself = super().get_current_value(variable), self._trained.get(id(variable))
        if value is None:
            return itself
        is_inside = _graph() is not self._graph
        if is_inside and type(_graph()).__name__ == "FuncGraph":
            self.is_bound = itself is not None
            raise ValueError(
                "A `tf.function` inside the model or the loss reads a variable. It would keep the value that the "
                "variable has in one question for all others: leave `tf.function` out, which `fit` does not need, or "
                f"{_PLAIN}. Received: variable={variable.path!r}"
            )
        if itself is not None and not is_inside:
            tf.convert_to_tensor(itself)  # read, so that a custom gradient over it shows itself by one
        elif itself is not None and _is_in_custom_gradient():  # in a loop, what is only read has a gradient of zeros
            self.refuse_bound([variable])
        return value

    def refuse_traced(self, gradients: list[Any]) -> None:
        """Raises where a question is about variables, which custom gradients know, and functions traced before.

        Args:
            gradients: the gradients for the trained variables, none or ``None`` where all is well.
        """
        found = zip(self._variables, gradients, strict=False)
        self.refuse_bound([variable for variable, gradient in found if gradient is not None])

    def refuse_bound(self, variables: list[Any]) -> None:
        """Raises if there are variables that the question cannot replace by values.

        Args:
            variables: the variables.
        """
        if variables:
            self.is_bound = True
            raise ValueError(
                "A `tf.function` inside the model or the loss was traced before, or a tape or a custom gradient "
                "(`keras.remat`, `tf.recompute_grad`, `tf.custom_gradient`) in it is over variables: they know nothing "
                "else, and questions cannot be asked elsewhere. Leave it out, or train with an optimizer that asks "
                "once. Received: "
                f"{', '.join(variable.path for variable in variables)}"
            )

    def add_update(self, update: tuple[Any, Any]) -> None:
        """Notes an assignment, which Keras sends here instead of to the variable."""
        if _graph() is not self._graph:
            raise ValueError(
                "A variable is assigned in a branch, in a loop, or in a `tf.function` inside the model or the loss, "
                "where its value cannot be followed from part to part and from question to question: assign outside, "
                f"or {_PLAIN}. Received: an assignment to {update[0].path!r}"
            )
        self.assigned[id(update[0])] = update[0]
        super().add_update((update[0], tf.stop_gradient(update[1])))  # as for a variable, which is read without one

    def moved(self, model: keras.Model, told: list[Any]) -> list[Any]:
        """The variables that the question has assigned.

        Args:
            model: whose trainable variables must not be among them.
            told: metrics whose variables do not count.
        """
        theirs = {id(variable) for variable in model.trainable_weights}
        names = [variable.path for key, variable in self.assigned.items() if key in theirs]
        if names:
            raise ValueError(
                "A call of the model assigns to variables that are trainable. An oracle cannot say at which of their "
                f"values to take the gradient then: {_PLAIN}. Received: {', '.join(names)}"
            )
        left_out = {id(variable) for metric in told for variable in metric.variables}
        return [variable for key, variable in self.assigned.items() if key not in left_out]


def _graph() -> Any:
    return None if tf.executing_eagerly() else tf.compat.v1.get_default_graph()


def within(graph: Any, stays: bool = False) -> Any:
    """The graph that is being made, if there is one. It must be a given one, or lie inside it.

    Args:
        graph: where tensors were made that are needed; ``None`` for eagerly.
        stays: whether ``graph`` is returned all the same.
    """
    here = inside = _graph()
    while graph not in (None, inside):
        if inside is None:
            raise ValueError(
                "A GradientOracle that was made or asked in a `tf.function` holds tensors that nothing else can read, "
                "nor the function when it is traced again: make it and ask it there, and return what you need. "
                f"Received: a question {'outside' if here is None else 'in another one'}"
            )
        inside = getattr(inside, "outer_graph", None)
    return graph if stays else here


def _is_in_custom_gradient() -> bool:
    """Whether a function with a custom gradient is being called, which then asks for that of the variables it reads."""
    frame, file = inspect.currentframe(), tf.custom_gradient.__code__.co_filename
    while frame and not (frame.f_code.co_filename == file and _WATCHER in frame.f_locals):
        frame = frame.f_back
    return frame is not None


class Questions:
    """What an :class:`~companion.InjectedOptimizer` is handed: asked at weights, it answers the gradients there.

    Args:
        oracle: the :class:`~companion.GradientOracle` of the batch.

    Attributes:
        model: the model.
        dtypes: those of the weights.
        dtype: that of points and answers: the widest of the weights', and at least float32.
        values: the current weights in it.
        answers: what the oracle has answered so far.
    """

    def __init__(self, oracle: Any) -> None:
        self.model, self.answers, self._oracle = oracle.model, list[list[Any]](), oracle
        self.dtypes = [variable.dtype for variable in self.model.trainable_weights]
        self.dtype = keras.backend.result_type("float32", *self.dtypes)
        self.values = [tf.cast(variable, self.dtype) for variable in self.model.trainable_weights]

    def __call__(self, values: list[Any] | None = None) -> list[Any]:
        """Answers at the constrained ``values``, or at the current ones as they are: dense, zeros for ``None``."""
        answers = self._oracle(None if values is None else self.constrained(values))
        self.answers.append(answers)
        return [
            tf.zeros(value.shape, self.dtype)
            if answer is None
            else tf.ensure_shape(tf.cast(tf.convert_to_tensor(answer), self.dtype), value.shape)
            for answer, value in zip(answers, self.values, strict=True)
        ]

    def constrained(self, values: list[Any]) -> list[Any]:
        """What the constraints make of ``values``; the current ones stay, as in the first question of any step."""
        constraints = [variable.constraint for variable in self.model.trainable_weights]
        return [
            value if constraint is None or value is current else tf.cast(constraint(value), value.dtype)
            for value, current, constraint in zip(values, self.values, constraints, strict=True)
        ]


def check_question(
    model: Any, micro_batches: Any = 1, weight_fn: Any = None, merge: Any = weighted_mean, loss: Any = None
) -> int:
    """Raises the error that says what is wrong with the arguments of a :class:`~companion.GradientOracle`.

    Args:
        model: what should be a ``keras.Model``, compiled unless there is a ``loss``.
        micro_batches: what should be an integer of at least 1.
        weight_fn: what should be ``None``, ``"sum"`` or a function.
        merge: what should be a function.
        loss: what should be ``None`` or a function.

    Returns:
        ``micro_batches``.

    Raises:
        RuntimeError: Keras runs on another backend than TensorFlow, or is too old.
        TypeError: ``model`` is not a ``keras.Model``.
        ValueError: anything else is wrong.
    """
    environment()
    if not isinstance(model, keras.Model):
        raise TypeError(f"`model` must be a keras.Model. Received: model={model!r}")
    micro_batches = arguments.integer("micro_batches", micro_batches, 1)
    if weight_fn not in (None, "sum") and not callable(weight_fn):
        raise ValueError(
            '`weight_fn` must be a function of (x, y, sample_weight), or "sum" for a loss that is a sum. Received: '
            f"weight_fn={weight_fn!r}"
        )
    if loss is not None and not callable(loss):
        raise ValueError(f"`loss` must be a function of (x, y, sample_weight). Received: loss={loss!r}")
    if not callable(merge):
        raise ValueError(
            "`merge` must be a function of (gradients, weights), such as companion.merging.median. "
            f"Received: merge={merge!r}"
        )
    if loss is None and (not model.compiled or model.optimizer is None):
        raise ValueError(
            "`model` must be compiled with an optimizer first: call `model.compile(...)`. Received: "
            f"model={model.name!r}, optimizer={getattr(model, 'optimizer', None)!r}"
        )
    replicas = replicas_of(model)
    has_own_loss = loss is None and is_own(model, "compute_loss")
    if has_own_loss and weight_fn is None and micro_batches * replicas > 1:
        raise ValueError(
            f"`model` has a `compute_loss` of its own, {type(model).__name__}.compute_loss, which does not say what it "
            'divides by: pass `weight_fn`, a function of (x, y, sample_weight) that returns it for a part, or "sum" '
            "if it is a sum."
        )
    for name, function in (("weight_fn", weight_fn), ("loss", loss)):
        if replicas > 1 and function is not None:
            raise ValueError(
                f"`{name}` works on one replica only: Keras divides some losses by the number of replicas and leaves "
                f"others as they are. Received: {name}={function!r} on {replicas} replicas"
            )
    return micro_batches


def loss_tracker(model: keras.Model) -> Any:
    """Keras's own metric of the loss, which is the first of a compiled model, whatever a subclass calls its metrics.

    Args:
        model: a compiled model.
    """
    return keras.Model.metrics.fget(model)[0]


def in_mode(training: bool, signature: Callable[..., Any], function: Callable[..., Any]) -> Callable[..., Any]:
    """``function`` with ``training`` where it can be told, which Keras decides by the signature.

    Args:
        training: whether layers act as in training.
        signature: whose arguments count.
        function: what is to be called.
    """
    takes_it = "training" in inspect.signature(signature).parameters
    return functools.partial(function, training=training) if takes_it else function


def build(model: keras.Model, batch: tuple[Any, Any, Any], loss: Any, training: bool) -> None:
    """Has layers and losses make their variables, in Keras's order; nothing is computed.

    Args:
        model: the model.
        batch: a batch of (x, y, sample_weight).
        loss: a function of them that is asked instead of the model, or ``None``.
        training: whether layers act as in training: some are called only then.
    """
    (x, y, sample_weight), compiled = batch, compiled_loss(model)

    def trace(training: bool) -> None:
        @tf.function(autograph=False)
        def call() -> Any:
            if loss is not None:
                return loss(x, y, sample_weight)
            outputs = in_mode(training, model.call, model)(x)
            return compiled(y, outputs, sample_weight) if compiled else outputs

        call.get_concrete_function()

    if not (is_built(model) if loss else model.built and getattr(compiled, "built", True)):
        trace(False)
    if training and not loss and not is_built(model):
        trace(True)


def denominator_by(weight_fn: Any, *batch: Any) -> Any:
    """What a ``weight_fn`` says of a part, as a scalar of Keras's float type, which its losses have.

    Args:
        weight_fn: the function.
        batch: the part: x, y and the sample weights.

    Raises:
        ValueError: it does not return one number.
    """
    found = weight_fn(*batch)
    try:
        weight = tf.cast(found, keras.config.floatx())
        fits = weight.shape.rank is None or weight.shape.num_elements() == 1
    except (TypeError, ValueError, tf.errors.OpError):
        fits = False
    if not fits:
        raise ValueError(
            "`weight_fn` must return one number, what the loss of a part divides by: of sample weights their sum, "
            f"`keras.ops.sum(sample_weight)`. Received: {found!r} from weight_fn={weight_fn!r}"
        )
    return tf.reshape(weight, ())


def is_own(model: keras.Model, method: str) -> bool:
    """Whether a method is another one than that of ``keras.Model``: in the model's class, or set on the model.

    Args:
        model: the model.
        method: its name.
    """
    return getattr(getattr(model, method), "__func__", None) is not getattr(keras.Model, method)


def functions_of(model: keras.Model) -> tuple[Any, Any]:
    """The ``weight_fn`` and the ``merge`` of a model or of its class, as they were set: not bound to the model.

    Args:
        model: an :class:`~companion.InjectedModel`.
    """
    own, common = vars(model), type(model)
    return own.get("weight_fn", common.weight_fn), own.get("merge", common.merge)


def refuse_overwritten(model: keras.Model) -> None:
    """Raises where a "gradient" is what a variable becomes, so that sums of several, or steps along it, mean nothing.

    Args:
        model: the model, built.
    """
    names = [v.path for v in model.trainable_weights if getattr(v, "overwrite_with_gradient", False)]
    if names:
        raise ValueError(
            "Layers quantized to float8 have variables that are overwritten with what stands for their gradient, which "
            "cannot be added up over parts, and is nothing to go along: train in one part with an optimizer that asks "
            f"once. Received: {', '.join(names)}"
        )


def fitting_values(model: keras.Model, values: Any) -> list[Any]:
    """The values to ask at, once it is certain that there is one for each variable.

    Args:
        model: the model.
        values: a tensor for each of its trainable variables; ``None`` for what they are.
    """
    if values is not None:
        refuse_overwritten(model)
    variables = model.trainable_weights
    tensors = [tf.convert_to_tensor(value) for value in (variables if values is None else values)]
    shapes = [tuple(variable.shape) for variable in variables]
    if [tuple(tensor.shape) for tensor in tensors] != shapes:
        raise ValueError(
            "`values` must hold a tensor for each of `model.trainable_weights`, of its shape: "
            f"{shapes}. Received: values of shapes {[tuple(tensor.shape) for tensor in tensors]}"
        )
    return [
        tensor if tensor.dtype.is_floating else tf.cast(tensor, variable.dtype)
        for tensor, variable in zip(tensors, variables, strict=True)
    ]


def merged_by_rule(rule: Callable[..., Any], weight: Any, tensors: list[Any]) -> list[Any]:
    """Gradients of all replicas merged by a rule; the losses, which come last, by their weights.

    Args:
        rule: one of :mod:`companion.merging`, or a function like them.
        weight: what the mean of this replica divides by.
        tensors: its gradients and losses.
    """
    rows = gather([tf.convert_to_tensor(tensor) for tensor in [*tensors, weight]])
    if rows[-1].shape[0] > 1:
        weights = rows[-1]
        weights = tf.where(tf.reduce_any(weights > 0), weights, tf.ones_like(weights))
        rows = [tf.gather(row, tf.where(weights > 0)[:, 0]) for row in [*rows[:-1], weights]]
    *gradients, losses, weights = rows
    merged = rule(gradients, weights)
    shapes = [tuple(gradient.shape[1:]) for gradient in gradients]
    if not isinstance(merged, (list, tuple)) or [tuple(getattr(m, "shape", "?")) for m in merged] != shapes:
        raise ValueError(
            f"`merge` must return a list with a tensor for each variable, of its shape: {shapes}. "
            f"Received: {merged!r} from merge={rule!r}"
        )
    merged = [tf.cast(one, gradient.dtype) for one, gradient in zip(merged, gradients, strict=True)]
    return [*merged, *weighted_mean([losses], weights)]


def direction_of(optimizer: Any, oracle: Any, is_scaled: bool) -> list[Any]:
    """What an optimizer that asks itself says; ``None`` where the loss does not depend on the variable.

    Where the loss is scaled, an answer that overflowed shows in the direction whatever the optimizer makes of it: the
    scale has to fall.

    Args:
        optimizer: an :class:`~companion.InjectedOptimizer`.
        oracle: the :class:`~companion.GradientOracle` of the batch.
        is_scaled: whether the loss is scaled.
    """
    ask = optimizer._questions = Questions(oracle)
    rate = tf.cast(tf.convert_to_tensor(optimizer.learning_rate if optimizer._hands_rate else 0.0), ask.dtype)
    directions = optimizer.direction(ask, ask.values, rate)
    name, shapes = type(optimizer).__name__, [tuple(value.shape) for value in ask.values]
    if not isinstance(directions, (list, tuple)) or [tuple(getattr(d, "shape", "?")) for d in directions] != shapes:
        raise ValueError(
            f"`direction` of {name} must return a list with a tensor for each value, of its shape: "
            f"{shapes}. Received: {directions!r}"
        )
    if not ask.answers:
        raise ValueError(f"`direction` of {name} must ask: call `oracle(values)` in it. Received: no question")
    if is_scaled:
        answers = [answer for each in ask.answers for answer in each if answer is not None]
        is_finite = all_finite(answers)
        directions = [tf.where(is_finite, direction, float("nan")) for direction in directions]
    return [None if no is None else direction for no, direction in zip(ask.answers[0], directions, strict=True)]
