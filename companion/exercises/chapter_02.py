"""Checks for the exercises of chapter 02, and the snippets that two of them ask about.

Readers see the source of the snippets, so these have neither annotations nor docstrings.
"""

# mypy: allow-untyped-defs, allow-untyped-calls
# ruff: noqa: D103

from collections.abc import Callable
from typing import Any

import keras
import numpy as np
import tensorflow as tf
from keras import ops

from companion.exercises.answers import entries, first_wrong, in_fit, not_an_optimizer, truth, whole


def snippet_a(self, gradient, variable, learning_rate):
    variable = variable - learning_rate * gradient
    return variable


def snippet_b(self, gradient, variable, learning_rate):
    self.assign_sub(variable, learning_rate * gradient)
    return None


def snippet_c(self, gradient, variable, learning_rate):
    moved = variable.assign(variable - learning_rate * gradient)
    return ops.where(False, moved, variable)


def snippet_d(self, gradient, variable, learning_rate):
    self.updates = [lambda: self.assign_sub(variable, learning_rate * gradient)]
    return self.updates


SNIPPETS = (snippet_a, snippet_b, snippet_c, snippet_d)
_SNIPPET_HINTS = (
    "`variable = …` gives the name to a new tensor. The weight that the old name stood for has not heard of it.",
    "what a method returns and what it does are two things. Which of them changes a weight today?",
    "when Python reaches `where`, what has already happened?",
    "a lambda in a list is a plan. Who carries it out?",
)


def count_a(steps):
    with tf.Graph().as_default(), tf.compat.v1.Session() as session:
        counter = tf.compat.v1.Variable(0)
        loss = tf.constant(1.0)
        counter.assign_add(1)
        session.run(counter.initializer)
        for _ in range(steps):
            session.run(loss)
        return int(session.run(counter))


def count_b(steps):
    with tf.Graph().as_default(), tf.compat.v1.Session() as session:
        counter = tf.compat.v1.Variable(0)
        update = counter.assign_add(1)
        session.run(counter.initializer)
        for _ in range(steps):
            session.run([update, update])
        return int(session.run(counter))


def count_c(steps):
    counter = tf.Variable(0)
    plan = [counter.assign_add(1)]
    for _ in range(steps):
        for update in plan:
            update.numpy()
    return int(counter)


def count_d(steps):
    counter = tf.Variable(0)

    @tf.function
    def step():
        counter.assign_add(1)

    for _ in range(steps):
        step()
    return int(counter)


def count_e(steps):
    counter = []

    @tf.function
    def step():
        counter.append(1)

    for _ in range(steps):
        step()
    return len(counter)


COUNTS = (count_a, count_b, count_c, count_d, count_e)
_COUNT_HINTS = (
    "the addition is a node of the graph. Does fetching the loss need that node?",
    "a session runs each node at most once in a call, however often you name it.",
    "there is no graph here. When does `assign_add` act, and what is left in the list?",
    "a `tf.function` runs every assignment it has recorded, in every call, fetched or not.",
    "`append` is Python, not TensorFlow. How often does Python run the body of a `tf.function`?",
)

_GRADIENTS = ([-1.0, 0.5], [-2.0, 0.25], [0.5, 0.0], [-1.0, -1.0])


def _trajectory(optimizer: Any) -> np.ndarray:
    """Runs an optimizer on two weights that must not share a slot; returns where they are after each step."""
    dtype = keras.config.floatx()  # a reader's own, as that of the learning rate
    variables = [keras.Variable(start, dtype=dtype) for start in ([1.0, 2.0], [3.0, 4.0])]
    rows = []
    for gradient in _GRADIENTS:
        optimizer.apply([np.array(gradient, dtype), 2 * np.array(gradient[::-1], dtype)], variables)
        rows.append(np.concatenate([variable.numpy() for variable in variables]))
    return np.array(rows, dtype="float64")


def _reference(rule: Callable[[np.ndarray, np.ndarray, Any], tuple[np.ndarray, Any]]) -> np.ndarray:
    """The same trajectory in NumPy, for a rule (weight, gradient, state) -> (weight, state)."""
    weight, state, rows = np.array([1.0, 2.0, 3.0, 4.0]), 0.0, []
    for gradient in _GRADIENTS:
        weight, state = rule(weight, np.array([*gradient, *(2 * np.array(gradient[::-1]))]), state)
        rows.append(weight)
    return np.array(rows)


def _rmsprop(answer: Any) -> str | None:
    hint = not_an_optimizer(answer)
    if hint:
        return hint
    h, rho, epsilon = 0.1, 0.75, 0.5
    optimizer = answer(learning_rate=h, rho=rho, epsilon=epsilon)
    try:
        found = _trajectory(optimizer)
    except AttributeError as error:
        if "'assign'" not in str(error):
            raise
        return (
            "what you assign to is a tensor, which has no memory. `K.zeros` in a plan made a variable; today that is "
            "self.add_optimizer_variables(variables, name), in `build`."
        )

    def rule(outside: bool = True, memory: bool = True, sign: float = 1.0) -> np.ndarray:
        def step(weight: np.ndarray, g: np.ndarray, a: Any) -> tuple[np.ndarray, Any]:
            a = rho * (a if memory else 0.0) + (1 - rho) * g**2
            scale = np.sqrt(a) + epsilon if outside else np.sqrt(a + epsilon)
            return weight - sign * h * g / scale, a

        return _reference(step)

    def is_(expected: np.ndarray) -> bool:
        return np.allclose(found, expected, rtol=0, atol=1e-5)

    if is_(np.tile([1.0, 2.0, 3.0, 4.0], (len(_GRADIENTS), 1))):
        return "no weight moves. A plan's `K.update(p, new)` is `self.assign(p, new)` now, and `update_step` calls it."
    if is_(rule(outside=False)):
        return "this is RMSprop as Keras has it today. The 2018 code adds epsilon after the square root, not under it."
    if is_(rule(memory=False)):
        return (
            "the running mean forgets. Its new value is not written to its slot with `self.assign`, or the slot is "
            "made anew in each step: make it in `build`."
        )
    if is_(rule(sign=-1.0)):
        return "it climbs: the step goes against the gradient."
    if not is_(rule()):
        right = np.isclose(found[0], rule()[0], rtol=0, atol=1e-5)
        if all(right):
            return "the first step is right and a later one is not. Look at what is kept from step to step, and where."
        if all(right[:2]):
            return "the first weight moves rightly and the second does not. Each weight needs a slot of its own."
        return "the first step is already off. Update the mean of the squares before you divide by its root."
    if len(optimizer.variables) != 4:
        return (
            f"it moves rightly, but Keras knows {len(optimizer.variables) - 2} slots for two weights, so they are not "
            "saved. Create them in `build` with self.add_optimizer_variables(variables, name)."
        )
    config = optimizer.get_config()
    if not isinstance(config, dict):
        return "it moves rightly, but `get_config` returns no dictionary."
    if config.get("rho") != rho or config.get("epsilon") != epsilon:
        return "it moves rightly, but a saved model would forget rho and epsilon: they belong into `get_config`."
    if "learning_rate" not in config:
        return (
            "it moves rightly, but a saved model would forget the learning rate: begin `get_config` with what "
            "super().get_config() returns."
        )
    return in_fit(answer(learning_rate=h, rho=rho, epsilon=epsilon))


def _moves(snippet: Callable[..., Any]) -> bool:
    optimizer = type("Snippet", (keras.optimizers.Optimizer,), {"update_step": snippet})(learning_rate=0.5)
    weight = keras.Variable([1.0], dtype=keras.config.floatx())  # as the learning rate is
    optimizer.apply([ops.ones_like(weight)], [weight])
    return float(weight.numpy()[0]) != 1.0


def _which_move(answer: Any) -> str | None:
    guesses = entries(answer)
    if guesses is None or len(guesses) != len(SNIPPETS):
        return f"the answer is a list of {len(SNIPPETS)} booleans, one for each snippet."
    if None in (guesses := [truth(guess) for guess in guesses]):
        return "each entry is True (the weight moves) or False."
    wrong = [index for index, snippet in enumerate(SNIPPETS) if guesses[index] != _moves(snippet)]
    return first_wrong(wrong, _SNIPPET_HINTS)


def _how_often(answer: Any) -> str | None:
    guesses = entries(answer)
    if guesses is None or len(guesses) != len(COUNTS):
        return f"the answer is a list of {len(COUNTS)} whole numbers, one for each function."
    if None in (guesses := [whole(guess) for guess in guesses]):
        return "each entry is a whole number: how often one is added when the function is called with 5."
    return first_wrong([index for index, count in enumerate(COUNTS) if guesses[index] != count(5)], _COUNT_HINTS)


def _never_learns(answer: Any) -> str | None:
    hint = not_an_optimizer(answer)
    if hint:
        return hint
    h, beta = 0.5, 0.9
    optimizer = answer(learning_rate=h)
    found = _trajectory(optimizer)

    def is_(expected: np.ndarray) -> bool:
        return np.allclose(found, expected, rtol=0, atol=1e-5)

    def rule(keep: bool = True, old: bool = False, sign: float = 1.0) -> np.ndarray:
        def step(weight: np.ndarray, g: np.ndarray, v: Any) -> tuple[np.ndarray, Any]:
            new = beta * v - h * g
            return weight + sign * (v if old else new), new if keep else 0.0

        return _reference(step)

    if is_(np.tile([1.0, 2.0, 3.0, 4.0], (len(_GRADIENTS), 1))):
        slots = [variable.numpy() for variable in optimizer.variables[2:]]
        if any(np.any(slot) for slot in slots):
            return "the velocity is kept now, and no weight moves. What returns a tensor and writes nothing?"
        return "no weight moves. Two lines of `update_step` compute a value that is never written."
    if is_(rule(keep=False)):
        return "the weights move, but without memory: this is plain SGD. Look at the line that computes the velocity."
    if is_(rule(old=True)):
        return "the weights move by the velocity of the step before: first v, then θ with the new v."
    if is_(rule(sign=-1.0)):
        return "it climbs. The step is θ plus v: the minus is already in v."
    if not is_(rule()):
        return "the weights move, but not as v ← 0.9 v − h g, θ ← θ + v. Write each of the two exactly once."
    return in_fit(answer(learning_rate=h))


CHECKS = {"02.1": _rmsprop, "02.2": _which_move, "02.3": _never_learns, "02.4": _how_often}
