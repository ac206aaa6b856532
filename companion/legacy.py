r"""An optimizer in the shape of 2018, on a TensorFlow graph of its own. Chapter 02 of the book runs it beside today's.

In Keras 2.2 an optimizer did not change weights. Its ``get_updates`` returned assignments for the training function to
run: a plan. ``tf.compat.v1`` is here on purpose, because that is where such plans still run; nothing outside sees it.
"""

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import tensorflow as tf


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

    Unlike :class:`~companion.optimizers.SGD` it is no Keras optimizer: today's ``compile`` refuses this shape.

    References:
        Su Jianlin, 2018, "Make Keras cooler: niche custom optimizers" (in Chinese), https://kexue.fm/archives/5879.

    Taught in chapter 02, :doc:`/notebooks/02_from_get_updates_to_update_step`.
    """

    def __init__(self, lr: float = 0.01) -> None:
        if isinstance(lr, bool) or not isinstance(lr, (int, float, np.number)) or not 0 <= lr < math.inf:
            raise ValueError(f"`lr` must be a number in [0, inf). Received: lr={lr!r}")
        self.lr = float(lr)

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
    if isinstance(steps, bool) or not isinstance(steps, (int, np.integer)) or steps < 1:
        raise ValueError(f"`steps` must be an integer >= 1. Received: steps={steps!r}")
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
