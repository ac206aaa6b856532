r"""An optimizer in the shape of 2018, on a TensorFlow graph of its own. Chapter 02 of the book runs it beside today's.

In Keras 2.2 an optimizer did not change weights. Its ``get_updates`` returned assignments for the training function to
run: a plan. ``tf.compat.v1`` is here on purpose, because that is where such plans still run; nothing outside sees it.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import tensorflow as tf

from companion.arguments import choice, integer, number


@contextlib.contextmanager
def _private_graph(initial: Sequence[np.ndarray], variables: str = "ref") -> Iterator[tuple[Any, list[Any]]]:
    """Opens a session on a new graph and yields it with one variable for each array.

    The caller adds operations, then runs ``global_variables_initializer``. ``variables`` is ``"ref"``, the kind that
    2018 had (a read is the variable's own memory), or ``"resource"``, the kind since TensorFlow 2.
    """
    with tf.Graph().as_default(), tf.compat.v1.Session() as session:
        yield session, [tf.compat.v1.Variable(value, use_resource=variables == "resource") for value in initial]


class GraphSGD:
    r"""Gradient descent as a plan: it returns assignments and leaves it to the caller to run them.

    .. math::

       \theta \leftarrow \theta - h g

    Args:
        lr: :math:`h \ge 0`, a number, under its name of 2018. It is written into the graph when the plan is built.
            Defaults to 0.01.

    Raises:
        ValueError: ``lr`` is negative, not finite, or not a number.

    Example:
        >>> with tf.Graph().as_default(), tf.compat.v1.Session() as session:
        ...     weight = tf.compat.v1.Variable(1.0)
        ...     plan = GraphSGD(lr=0.25).get_updates(weight**2, [weight])
        ...     session.run(weight.initializer)
        ...     print(session.run(weight))  # the plan exists and nothing has moved
        ...     _ = session.run(plan)
        ...     print(session.run(weight))
        1.0
        0.5

    Unlike :class:`~companion.SGD` it is no Keras optimizer: today's ``compile`` refuses this shape.

    References:
        Su Jianlin, 2018, "Make Keras cooler: niche custom optimizers" (in Chinese), https://kexue.fm/archives/5879.

    Taught in chapter 02, :doc:`/notebooks/02_from_get_updates_to_update_step`.
    """

    def __init__(self, lr: float = 0.01) -> None:
        self.lr = number("lr", lr, 0)

    def get_gradients(self, loss: Any, params: Sequence[Any]) -> list[Any]:
        """Returns one symbolic gradient for each variable; TensorFlow allows that only while a graph is being built."""
        gradients = tf.gradients(loss, params)
        if None in gradients:
            raise ValueError(
                f"`loss` must depend on every variable. Received: no gradient for variable {gradients.index(None)}"
            )
        return gradients

    def get_updates(self, loss: Any, params: Sequence[Any]) -> list[Any]:
        """Returns the plan: one assignment for each variable."""
        gradients = self.get_gradients(loss, params)
        pairs = zip(params, gradients, strict=True)
        new_values = [p - self.lr * g for p, g in pairs]
        # A plan has no order of its own. Without this line the assignment to one
        # layer can run while the gradient of another is still reading that layer,
        # and two runs of the same code differ. So: read all, then write.
        with tf.control_dependencies([loss, *new_values]):
            pairs = zip(params, new_values, strict=True)
            return [tf.compat.v1.assign(p, new_value) for p, new_value in pairs]


class Step(NamedTuple):
    """One step of :func:`run_plan`: the loss before it, and where it led."""

    loss: float
    """The loss before the step."""
    values: list[np.ndarray]
    """The variables after the step, one array for each."""


def run_plan(
    optimizer: Any,
    loss: Callable[[list[Any]], Any],
    initial: Sequence[Any],
    steps: int,
    execute_updates: bool = True,
) -> list[Step]:
    """Trains as Keras 2.2 did: builds the loss and the plan once, then fetches both in every step.

    Graph, session and variables are new for each call and gone after it; TensorFlow's global state is not touched.

    Args:
        optimizer: a :class:`GraphSGD`, or any object with ``get_updates(loss, params)`` that returns assignments.
        loss: a function of the list of variables that returns a scalar tensor; called once, to build the graph.
        initial: the starting values, floating-point arrays; each keeps its shape and dtype.
        steps: how many steps, at least 1.
        execute_updates: ``False`` fetches the loss but never the plan: it trains and never learns. Defaults to
            ``True``.

    Returns:
        One :class:`Step` for each step.

    Raises:
        ValueError: an argument is not as described, or ``loss`` does not depend on every variable.

    Example:
        >>> for step in run_plan(GraphSGD(lr=0.25), lambda variables: variables[0] ** 2, [np.array(1.0)], steps=3):
        ...     print(step.loss, step.values[0])
        1.0 0.5
        0.25 0.25
        0.0625 0.125

    Taught in chapter 02, :doc:`/notebooks/02_from_get_updates_to_update_step`.
    """
    if not callable(getattr(optimizer, "get_updates", None)):
        raise ValueError(f"`optimizer` must have a method get_updates(loss, params). Received: optimizer={optimizer!r}")
    if not callable(loss):
        raise ValueError(f"`loss` must be a function of the list of variables. Received: loss={loss!r}")
    integer("steps", steps, 1)
    arrays = [np.asarray(value) for value in initial] if isinstance(initial, (list, tuple)) else []
    if not arrays or not all(np.issubdtype(array.dtype, np.floating) for array in arrays):
        raise ValueError(f"`initial` must be a list of floating-point arrays. Received: initial={initial!r}")
    with _private_graph(arrays) as (session, variables):
        loss_tensor = loss(variables)
        if not tf.is_tensor(loss_tensor) or loss_tensor.shape.rank != 0:
            raise ValueError(f"`loss` must return a scalar tensor. Received: {loss_tensor!r}")
        plan = optimizer.get_updates(loss_tensor, variables)
        session.run(tf.compat.v1.global_variables_initializer())
        fetches = [loss_tensor, plan if execute_updates else []]
        return [Step(float(session.run(fetches)[0]), session.run(variables)) for _ in range(steps)]


class SoftBatchStep(NamedTuple):
    """What one step of :func:`trace_soft_batch` left behind, read after it."""

    parameter: Any
    """The weight."""
    accumulator: Any
    """The sum of gradients that the next update is to use."""
    iterations: int
    """How many steps have run."""


def _switch(condition: Any, then: Any, otherwise: Any, name: str) -> Any:
    """``K.switch`` of 2018: a choice between two tensors, both of which exist before it.

    These are the operations that ``tf.cond`` made of it then; what it makes today depends on a global setting.
    """

    def branch(value: Any) -> Any:
        value = tf.convert_to_tensor(value)
        operation = tf.raw_ops.RefSwitch if value.dtype._is_ref_dtype else tf.raw_ops.Switch
        return operation(data=value, pred=condition)

    return tf.raw_ops.Merge(inputs=[branch(otherwise).output_false, branch(then).output_true], name=name)[0]


def _assign(variable: Any, value: Any, name: str) -> Any:
    return tf.compat.v1.assign(variable, value, name=name)


def _copy(variable: Any) -> Any:
    return tf.raw_ops.DeepCopy(x=tf.convert_to_tensor(variable))


_Rule = Callable[[list[Any], Any], list[Any]]
_Memory = tuple[list[Any], Any, Any]
_Plan = list[Any]


def _published(memory: _Memory, gradient: Any, steps: int, rule: _Rule) -> _Plan:
    """The soft batch of 2018: a choice between assignments."""
    weights, total, iterations = memory
    new_weights = rule(weights, total)
    due = tf.equal(iterations % steps, 0, name="due")
    plan = [iterations.assign_add(1, name="count")]
    for weight, new_weight in zip(weights, new_weights, strict=True):
        move = _assign(weight, new_weight, name="move")
        plan.append(_switch(due, move, weight, name="move_or_not"))
    restart = _assign(total, gradient, name="restart")
    grow = _assign(total, total + gradient, name="grow")
    plan.append(_switch(due, restart, grow, name="restart_or_grow"))
    return plan


def _masked(memory: _Memory, gradient: Any, steps: int, rule: _Rule) -> _Plan:
    """The repair from the post's comments: an assignment of a choice."""
    weights, total, iterations = memory
    new_weights = rule(weights, total)
    due = tf.equal(iterations % steps, 0, name="due")
    plan = [iterations.assign_add(1, name="count")]
    for weight, new_weight in zip(weights, new_weights, strict=True):
        chosen = _switch(due, new_weight, weight, name="new_or_old")
        plan.append(_assign(weight, chosen, name="move"))
    chosen = _switch(due, gradient, total + gradient, name="restart_or_grow")
    plan.append(_assign(total, chosen, name="accumulate"))
    return plan


def _ordered(memory: _Memory, gradient: Any, steps: int, rule: _Rule) -> _Plan:
    """The same with an order: read, compute with what was read, then write."""
    weights, total, iterations = memory
    # Copies, since a read of a variable of 2018 is that variable's own memory.
    old = [_copy(weight) for weight in weights]
    old_total = _copy(total)
    count = _copy(iterations)

    due = tf.equal(count % steps, 0, name="due")
    moved = rule(old, old_total)
    new = [tf.where(due, *pair) for pair in zip(moved, old, strict=True)]
    new_total = tf.where(due, gradient, old_total + gradient)
    new_count = count + 1

    with tf.control_dependencies([*new, new_total, new_count]):
        moves = zip(weights, new, strict=True)
        plan = [_assign(*move, name="move") for move in moves]
        plan.append(_assign(total, new_total, name="accumulate"))
        plan.append(_assign(iterations, new_count, name="count"))
    return plan


PLANS = {"published": _published, "masked": _masked, "ordered": _ordered}
"""The variants of :func:`trace_soft_batch`, as functions that build their plan."""


class _SoftBatch(NamedTuple):
    graph: Any
    initialise: Any
    step: Any
    gradient: Any
    variables: list[Any]


def _build_soft_batch(
    steps: int, learning_rate: float, variant: str, variables: str, initial: np.ndarray, momentum: float
) -> _SoftBatch:
    steps, momentum = integer("steps", steps, 1), number("momentum", momentum, 0, 1)
    learning_rate = number("learning_rate", learning_rate, 0)
    choice("variant", variant, tuple(PLANS))
    choice("variables", variables, ("ref", "resource"))

    def rule(weights: list[Any], accumulator: Any) -> list[Any]:
        step = learning_rate * accumulator / steps
        if not momentum:
            return [weights[0] - step]
        parameter, velocity = weights
        new_velocity = momentum * velocity - step
        return [parameter + new_velocity, new_velocity]

    def variable(value: Any, name: str) -> Any:
        return tf.compat.v1.Variable(value, name=name, use_resource=variables == "resource")

    with tf.Graph().as_default() as graph, tf.device("CPU:0"):
        gradient = tf.compat.v1.placeholder(tf.float64, initial.shape, name="gradient")
        weights = [variable(initial, "parameter")]
        weights += [variable(np.zeros_like(initial), "velocity")] if momentum else []
        accumulator = variable(np.zeros_like(initial), "accumulator")
        iterations = variable(np.int64(0), "iterations")
        plan = PLANS[variant]((weights, accumulator, iterations), gradient, int(steps), rule)
        step = tf.group(*plan, name="step")
        initialise = tf.compat.v1.global_variables_initializer()
    return _SoftBatch(graph, initialise, step, gradient, [weights[0], accumulator, iterations])


def soft_batch_graph(
    steps: int, learning_rate: float, variant: str, variables: str = "ref", momentum: float = 0.0
) -> tf.Graph:
    """Returns the graph that :func:`trace_soft_batch` runs, for a weight that is a single number; to look at.

    Its operation ``step`` is what a training step runs. The other operations of interest are named as in the source
    of the plans: ``gradient``, ``parameter``, ``accumulator``, ``iterations``, ``due``, ``move`` and so on.

    Args:
        steps: as in :func:`trace_soft_batch`.
        learning_rate: as in :func:`trace_soft_batch`.
        variant: as in :func:`trace_soft_batch`.
        variables: as in :func:`trace_soft_batch`.
        momentum: as in :func:`trace_soft_batch`.

    Returns:
        A ``tf.Graph`` of its own.

    Raises:
        ValueError: an argument is not as described.

    Example:
        >>> graph = soft_batch_graph(steps=3, learning_rate=0.1, variant="published")
        >>> graph.get_operation_by_name("move").type
        'Assign'

    Taught in chapter 05, :doc:`/notebooks/05_the_soft_batch_bug`.
    """
    return _build_soft_batch(steps, learning_rate, variant, variables, np.zeros(()), momentum).graph


def trace_soft_batch(
    gradients: Sequence[Any] | np.ndarray,
    steps: int,
    learning_rate: float,
    variant: str,
    variables: str = "ref",
    initial: Any = 0.0,
    momentum: float = 0.0,
) -> list[SoftBatchStep]:
    r"""Runs the soft batch of 2018, gradient by gradient, and reads its variables after each of them.

    What it means to do with the gradients :math:`g_1, g_2, \ldots`, with a window of :math:`N` and an accumulator
    :math:`s`, is

    .. math::

       s \leftarrow s + g_i, \qquad
       \text{after every } N \text{th:} \quad \theta \leftarrow \theta - \frac{h}{N} s, \quad s \leftarrow 0 .

    None of the variants does just that. All of them decide by ``iterations % steps == 0`` *before* counting the step
    and move by the accumulator *without* the current gradient, so the first update applies nothing, and the last
    complete window waits for a gradient that does not come. Besides:

    - ``"published"`` creates its assignments outside the choice, so every one of them runs in every step, in an
      order that nothing fixes. Two runs may differ.
    - ``"masked"``, the repair from the comments on the post, assigns a choice of values; its reads and its writes
      still race. Two runs may differ.
    - ``"ordered"`` copies all it reads, computes, then writes. Two runs do not differ.

    Graph, session and variables are new for each call and gone after it; TensorFlow's global state is not touched.
    It computes in float64, on the CPU.

    Args:
        gradients: one for each micro-step, fed in this order: finite numbers, or arrays of one shape. At least one.
        steps: :math:`N \ge 1`, the length of the window: how many gradients one update is meant to use. (How many
            steps are run is the length of ``gradients``.)
        learning_rate: :math:`h \ge 0`.
        variant: ``"published"``, ``"masked"`` or ``"ordered"``.
        variables: ``"ref"``, the kind that 2018 had, or ``"resource"``, the kind since TensorFlow 2. Defaults to
            ``"ref"``.
        initial: :math:`\theta` at the start: a number, or an array of the gradients' shape. Defaults to 0.
        momentum: :math:`\beta` in :math:`[0, 1)`. If not 0, an update is :math:`v \leftarrow \beta v - h s / N` and
            :math:`\theta \leftarrow \theta + v`, chosen or not as above. Defaults to 0.

    Returns:
        One :class:`SoftBatchStep` for each gradient.

    Raises:
        ValueError: an argument is not as described.

    Example:
        >>> for step in trace_soft_batch([1, 10, 100, 1000], steps=2, learning_rate=2, variant="ordered"):
        ...     print(step.iterations, step.parameter + 0, step.accumulator)
        1 0.0 1.0
        2 0.0 11.0
        3 -11.0 100.0
        4 -11.0 1100.0

    References:
        Su Jianlin, 2018, "Make Keras cooler: niche custom optimizers" (in Chinese), its section on the soft batch, its
        correction of 2019 and its comments, https://kexue.fm/archives/5879.

    Taught in chapter 05, :doc:`/notebooks/05_the_soft_batch_bug`.
    """
    values = _finite(gradients)
    if values is None or values.ndim == 0 or len(values) == 0:
        raise ValueError(
            f"`gradients` must be a sequence of finite numbers, or of arrays of one shape. Received: "
            f"gradients={gradients!r}"
        )
    start = _finite(initial)
    if start is None or start.shape not in ((), values.shape[1:]):
        raise ValueError(
            f"`initial` must be a finite number or an array of the gradients' shape {values.shape[1:]}. Received: "
            f"initial={initial!r}"
        )
    start = np.broadcast_to(start, values.shape[1:])
    built = _build_soft_batch(steps, learning_rate, variant, variables, start, momentum)
    trace = []
    with tf.compat.v1.Session(graph=built.graph) as session:
        session.run(built.initialise)
        for value in values:
            session.run(built.step, {built.gradient: value})
            parameter, accumulator, iterations = session.run(built.variables)
            # A copy, because what was read may be the variable's own memory.
            trace.append(SoftBatchStep(np.copy(parameter)[()], np.copy(accumulator)[()], int(iterations)))
    return trace


def _finite(value: Any) -> np.ndarray | None:
    """The value as finite float64 numbers, or ``None`` if it is not numbers of one shape."""
    try:
        array = np.asarray(value)
    except (TypeError, ValueError):
        return None
    if array.dtype.kind not in "iuf" or not np.isfinite(array).all():
        return None
    return array.astype("float64")
