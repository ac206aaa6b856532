"""What every optimizer that wraps another one hands on to it: what is asked of it, set on it, saved and built."""

import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import keras
import tensorflow as tf

from companion.backend import environment
from companion.gradients import coalesce, fitting_gradient, values_of

# The arguments of every Keras optimizer; `learning_rate` and `name` aside. Whoever wraps has none of them himself.
SETTINGS = (
    *("weight_decay", "clipnorm", "clipvalue", "global_clipnorm", "use_ema", "ema_momentum", "ema_overwrite_frequency"),
    *("loss_scale_factor", "gradient_accumulation_steps"),
)

_NO_VARIABLES = (
    "`trainable_variables` must be given to the first `apply`, or to `optimizer.build` before it. "
    "Received: trainable_variables=None"
)


class WrappingOptimizer(keras.optimizers.Optimizer):
    """Base class of optimizers around another one, which has the settings, the learning rate and the counter.

    What is set here is set there, and what is asked here is answered there: clipping, decay, averages, and the wrapped
    optimizer's own parameters, such as ``momentum``.

    Args:
        optimizer: the optimizer to wrap.
        name: a name for the wrapper. Defaults to one made from the class.

    Attributes:
        inner_optimizer: the wrapped optimizer.

    Raises:
        ValueError: ``optimizer`` is not an optimizer, or must not be wrapped.
    """

    inner_optimizer: Any
    _holder = "inner_optimizer"  # the attribute in which the optimizer is that everything is asked of

    def __init__(self, optimizer: Any, name: str | None = None) -> None:
        environment()
        if not isinstance(optimizer, keras.optimizers.Optimizer):
            raise ValueError(
                "`optimizer` must be an instance of keras.optimizers.Optimizer, such as keras.optimizers.Adam(); for a "
                f"name use keras.optimizers.get(name). Received: optimizer={optimizer!r} of {type(optimizer)}"
            )
        for layer in wrapped_by(optimizer):
            if isinstance(layer, keras.optimizers.LossScaleOptimizer):
                raise ValueError(
                    "`optimizer` must not be a LossScaleOptimizer, which belongs outside, where it sees every gradient:"
                    f" put that outside, LossScaleOptimizer({type(self).__name__}(...)), or leave it to `compile` and "
                    f"the mixed_float16 policy. Received: optimizer={optimizer!r}"
                )
            if isinstance(layer, type(self)):
                raise ValueError(f"{self._twice} Received: optimizer={optimizer!r}")
        super().__init__(learning_rate=0.0, name=name)
        setattr(self, self._holder, optimizer)

    _twice = "`optimizer` is wrapped already."  # what to say then

    @property
    def _inner(self) -> Any:
        return vars(self).get(self._holder)

    def wrapped(self) -> list[Any]:
        """The optimizers that are wrapped: one, or several that share the variables among them."""
        return [self._inner]

    def _shares(self, variables: list[Any]) -> list[tuple[Any, list[Any]]]:
        """The wrapped optimizers, each with those of the variables that it moves."""
        return [(self._inner, variables)]

    def __getattr__(self, name: str) -> Any:
        """Asks the wrapped optimizer for what is not here."""
        inner = self._inner
        if inner is None or name.startswith("_"):
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        return getattr(inner, name)

    def __setattr__(self, name: str, value: Any) -> None:
        """Sets on the wrapped optimizer what is its own."""
        inner = self._inner
        if name in SETTINGS:
            if inner is not None:  # the base class's constructor sets its defaults before there is one
                self._set_there(name, value)
        elif (
            inner is None
            or name[0] == "_"
            or hasattr(type(self), name)
            or name in vars(self)
            or not hasattr(inner, name)
        ):
            super().__setattr__(name, value)
        else:
            setattr(inner, name, value)

    def _set_there(self, name: str, value: Any) -> None:
        for inner in self.wrapped():
            if name != "loss_scale_factor" and hasattr(inner, "optimizers"):
                raise ValueError(
                    f"`{name}` is a setting of each optimizer in a MultiOptimizer: set it on those, "
                    f"`optimizer.inner_optimizer.optimizers`. Received: {name}={value!r}"
                )
            needs_slots = name in ("use_ema", "gradient_accumulation_steps")
            if inner.built and value and needs_slots and not getattr(inner, name):
                raise ValueError(
                    f"`{name}` needs variables that are made when an optimizer is built, and this one is built: give "
                    f"it to the constructor of a new one. Received: {name}={value!r}"
                )
        for inner in self.wrapped():
            setattr(inner, name, value)

    @property
    def iterations(self) -> Any:
        """The wrapped optimizer's count of updates."""
        return self._inner.iterations

    @property
    def learning_rate(self) -> Any:
        """The wrapped optimizer's learning rate, which can be set here."""
        return self._inner.learning_rate

    @learning_rate.setter
    def learning_rate(self, value: Any) -> None:
        self._inner.learning_rate = value

    def scale_loss(self, loss: Any) -> Any:
        """Scales the loss as the wrapped optimizer does."""
        return self._inner.scale_loss(loss)

    def exclude_from_weight_decay(self, var_list: Any = None, var_names: Any = None) -> None:
        """Excludes variables from the wrapped optimizer's weight decay."""
        for optimizer in self.wrapped():
            optimizer.exclude_from_weight_decay(var_list=var_list, var_names=var_names)

    # Private names of Keras from here on: `_model_variables_moving_average`, which SwapEMAWeights asks for,
    # `_trainable_variables`, `_trainable_variables_indices`, `_var_key`, `_get_variable_index`. Checked on 3.13.2 and
    # 3.15.1; tests/test_wrappers.py notices.

    @property
    def _model_variables_moving_average(self) -> list[Any]:
        """The averages of the wrapped optimizer, in the order of the wrapper's variables."""
        known: list[Any] = self._trainable_variables
        found: dict[int, Any] = {}
        for optimizer, variables in self._shares(known):
            averages = optimizer._model_variables_moving_average if variables else []
            found |= {index_in(self, variable): averages[index_in(optimizer, variable)] for variable in variables}
        return [found[index] for index in range(len(known))]

    def finalize_variable_values(self, var_list: Any) -> None:
        """Lets the wrapped optimizer put its moving averages into those weights that are trained, and by it."""
        moved = [variable for variable in var_list if self._knows(variable) and not self._stays(variable)]
        for optimizer, theirs in self._shares(moved):
            trained, known = {index_in(optimizer, variable) for variable in theirs}, optimizer._trainable_variables
            with _standing_still([variable for index, variable in enumerate(known) if index not in trained]):
                optimizer.finalize_variable_values(known)  # all: Keras pairs variables and averages by their places

    def _knows(self, variable: Any) -> bool:
        return self._var_key(variable) in self._trainable_variables_indices

    def _frozen_stay(self) -> Any:
        """A context in which frozen variables keep their values, though Keras puts averages into all that it knows."""
        overwrites = any(layer.use_ema and layer.ema_overwrite_frequency for layer in wrapped_by(self))
        known = [v for optimizer in self.wrapped() for v in optimizer._trainable_variables] if overwrites else []
        return _standing_still([variable for variable in known if self._stays(variable)])

    def _stays(self, variable: Any) -> bool:
        """Whether a variable is to be left as it is."""
        return not variable.trainable

    def apply_gradients(self, grads_and_vars: Any) -> Any:
        """As in Keras: ``apply`` for pairs; returns the count of updates."""
        super().apply_gradients(grads_and_vars)
        return self.iterations

    def build(self, variables: list[Any]) -> None:
        """Builds the wrapped optimizer. If it has been in use before, it must know the variables."""
        shares = self._shares(variables)
        for optimizer, theirs in shares:
            for variable in theirs if optimizer.built else ():
                index_in(optimizer, variable)
        for optimizer, theirs in shares:
            if not optimizer.built:
                optimizer.build(theirs)
        own = self.__dict__
        own.update(use_ema=False, gradient_accumulation_steps=None)  # or the base class would make slots of its own
        super().build(variables)
        del own["use_ema"], own["gradient_accumulation_steps"]
        # For tf.train.Checkpoint, which does not look into a MultiOptimizer.
        self._parts = [part for each in self.wrapped() for part in getattr(each, "optimizers", [])]

    def _matched(self, gradients: list[Any], variables: Any) -> tuple[list[Any], list[tuple[Any, Any]], Any]:
        """The variables of an ``apply``, those with a gradient, before it, and a context in which all gradients fit.

        Builds what is not built. In a graph nothing happens in the context before what is known late is known.

        Raises:
            ValueError: there are no variables, or no gradients; they do not match; a variable is unknown.
        """
        if variables is None and not self.built:
            raise ValueError(_NO_VARIABLES)
        variables = list(self._trainable_variables if variables is None else variables)
        if len(variables) != len(gradients):
            raise ValueError(
                f"`grads` must hold a gradient for each variable. Received: {len(gradients)} gradients for "
                f"{len(variables)} variables"
            )
        self.build(variables)
        for variable in variables:
            index_in(self, variable)
        pairs = list(zip(gradients, variables, strict=True))
        given = [(fitting_gradient(gradient, v, name_of(v)), v) for gradient, v in pairs if gradient is not None]
        if not given:
            raise ValueError(f"No gradients provided for any variable. Received: grads={gradients}")
        missing = [name_of(variable) for gradient, variable in pairs if gradient is None]
        if missing:
            warnings.warn(f"Gradients do not exist for variables {missing}; they are left as they are.", stacklevel=3)
        brought = [id(gradient) for gradient in gradients]
        late = [] if tf.executing_eagerly() else [values_of(g) for g, _ in given if id(g) not in brought]
        return variables, given, tf.control_dependencies([tf.group(*late)] if late else [])

    @property
    def variables(self) -> list[Any]:
        """The wrapper's own variables, then those of the wrapped optimizer."""
        return [*super().variables, *(slot for optimizer in self.wrapped() for slot in optimizer.variables)]

    def set_weights(self, weights: Any) -> None:
        """Sets the variables, in the order of ``variables``."""
        for variable, value in zip(self.variables, weights, strict=True):
            variable.assign(value)

    def get_config(self) -> dict[str, Any]:
        """Returns the constructor's arguments, for saving."""
        return {"name": self.name, "optimizer": keras.saving.serialize_keras_object(self._inner)}

    @classmethod
    def from_config(cls, config: dict[str, Any], custom_objects: dict[str, Any] | None = None) -> Any:
        """Creates an optimizer from what ``get_config`` has returned."""
        make = keras.saving.deserialize_keras_object  # of a word it would make what a custom object scope calls so
        objects = {
            name: make(value, custom_objects) if isinstance(value, dict) else value for name, value in config.items()
        }
        return cls(**objects)


@contextmanager
def _standing_still(variables: list[Any]) -> Iterator[None]:
    """A context after which variables have the values that they had before."""
    before = [(variable, tf.identity(variable)) for variable in variables]
    yield
    for variable, value in before:
        variable.assign(value)


def name_of(variable: Any) -> str:
    """The path of a Keras variable, or the name of another one.

    Args:
        variable: either.
    """
    return getattr(variable, "path", variable.name)


def index_in(optimizer: Any, variable: Any) -> int:
    """The place of a variable among those that an optimizer was built with.

    Args:
        optimizer: a ``keras.optimizers.Optimizer`` that is built.
        variable: a ``keras.Variable``.

    Raises:
        ValueError: the optimizer does not know it.
    """
    try:
        return optimizer._get_variable_index(variable)
    except KeyError:
        raise ValueError(
            f"Unknown variable: {optimizer.name!r} was built with other ones. Create a new optimizer for a new set of "
            f"variables. Received: variable={name_of(variable)!r}"
        ) from None


def averages_of(optimizer: Any) -> list[tuple[Any, Any]]:
    """Pairs of a variable and its moving average, of an optimizer and all that it wraps.

    Args:
        optimizer: a ``keras.optimizers.Optimizer``.
    """
    layers = [layer for layer in wrapped_by(optimizer) if "_model_variables_moving_average" in vars(layer)]
    return [p for o in layers for p in zip(o._trainable_variables, o._model_variables_moving_average, strict=True)]


def wrapped_by(optimizer: Any) -> Iterator[Any]:
    """Yields an optimizer and all that it wraps, from the outside to the inside.

    Args:
        optimizer: a ``keras.optimizers.Optimizer``, or ``None``, which wraps nothing.
    """
    if optimizer is None:
        return
    yield optimizer
    if isinstance(optimizer, WrappingOptimizer):
        inside = optimizer.wrapped()
    else:
        inner = getattr(optimizer, "inner_optimizer", None)
        inside = getattr(optimizer, "optimizers", []) if inner is None else [inner]
    for each in inside:
        yield from wrapped_by(each)


@contextmanager
def weighed(optimizer: Any, oracle: Any) -> Iterator[bool]:
    """Hands a batch's weight to each accumulation that wants it, however it is wrapped; yields whether one does.

    Args:
        optimizer: a ``keras.optimizers.Optimizer``.
        oracle: the :class:`~companion.GradientOracle` of the batch.
    """
    accumulations = [layer for layer in wrapped_by(optimizer) if vars(layer).get("normalize") == "weight"]
    replicas = tf.distribute.get_strategy().num_replicas_in_sync  # each brings the merged gradient, and its share
    with ExitStack() as stack:
        for layer in accumulations:
            stack.enter_context(layer.weighed(oracle.denominator / replicas))
        yield bool(accumulations)


@keras.saving.register_keras_serializable(package="companion")
class CoalesceGradients(WrappingOptimizer):
    r"""Any Keras optimizer, with the rows of sparse gradients that share an id summed first.

    Keras 3 squares each occurrence of a row by itself. For a row that occurs with gradients :math:`r_1, \dots, r_k`,
    the second moments of Adam, RMSprop, Adagrad and their kin, and every norm that clipping computes, use

    .. math::

       \sum_k r_k^2 \quad\text{(Keras)} \qquad\text{instead of}\qquad
       \Bigl(\sum_k r_k\Bigr)^2 \quad\text{(here, and in a dense lookup)}.

    With this wrapper every built-in optimizer of Keras 3.13 and 3.15 steps as if the lookup were a product with a
    one-hot matrix, weights and slots, clipped or not. That includes the rows that are not in the batch: Keras decays
    their slots whether or not the gradient is sparse. Without the wrapper it holds for SGD, with or without momentum,
    Lion and Muon's own rule, which add up gradients before they do anything else, as long as nothing clips.

    On several replicas Keras merges sparse gradients by concatenating them, which repeats ids anew; so the rows are
    summed once more after the merge. For this, ``build`` wraps the ``update_step`` of the inner optimizer. Clipping
    stays where Keras has it: on each replica, before the merge.

    Args:
        optimizer: a ``keras.optimizers.Optimizer``. Its settings stay its own: clipping, weight decay, moving averages,
            ``loss_scale_factor`` and ``gradient_accumulation_steps`` are given to it; what is set here later reaches
            it. Under ``loss_scale_factor``, which Keras cannot divide a sparse gradient by, gradients become dense.
        name: a name for the wrapper. Defaults to one made from the class.

    Attributes:
        inner_optimizer: the optimizer given.

    Raises:
        ValueError: ``optimizer`` is not an optimizer, is already a ``CoalesceGradients``, or is a
            ``LossScaleOptimizer``, which belongs outside (``compile`` puts it there).

    Example:
        >>> import tensorflow as tf
        >>> weight = keras.Variable(np.zeros((3, 1)))
        >>> gradient = tf.IndexedSlices(tf.constant([[3.0], [1.0]]), indices=[2, 2], dense_shape=[3, 1])
        >>> optimizer = CoalesceGradients(keras.optimizers.Adagrad(1.0, initial_accumulator_value=0.0))
        >>> optimizer.apply([gradient], [weight])  # 4 / √(4²); Keras alone: 4 / √(3² + 1²) = 1.26
        >>> weight.numpy().ravel().round(4).tolist()
        [0.0, 0.0, -1.0]

    References:
        Duchi, Hazan and Singer, 2011, "Adaptive subgradient methods for online learning and stochastic optimization".

    Taught in chapter 07, :doc:`/notebooks/07_accumulation_in_practice`.
    """

    _twice = (
        "`optimizer` sums repeated rows already: pass the optimizer inside it, `optimizer.inner_optimizer`, or leave "
        "out the CoalesceGradients further inside."
    )

    def build(self, variables: list[Any]) -> None:
        """Builds the inner optimizer, unless it has been in use before."""
        if self.built:
            return
        super().build(variables)
        if tf.distribute.get_strategy().num_replicas_in_sync > 1:
            for optimizer in wrapped_by(self.inner_optimizer):
                optimizer.update_step = _coalesce_first(optimizer.update_step)

    def apply(self, grads: Any, trainable_variables: Any = None) -> None:
        """Sums repeated rows and lets the inner optimizer make its step.

        Args:
            grads: a gradient for each variable; ``None`` where there is none.
            trainable_variables: the variables. Defaults to those that the optimizer was built with.

        Raises:
            ValueError: the optimizer is not built and there are no variables; variables and gradients do not match; a
                variable is unknown. Nothing was moved.
        """
        grads = list(grads)
        if not grads:
            return
        variables, given, fitting = self._matched(grads, trainable_variables)
        with fitting, self._frozen_stay():
            ready = iter([coalesce(gradient) for gradient, _ in given])
            grads = [None if gradient is None else next(ready) for gradient in grads]
            if self.loss_scale_factor is not None:
                grads = [tf.convert_to_tensor(g) if isinstance(g, tf.IndexedSlices) else g for g in grads]
            self.inner_optimizer.apply(grads, variables)

    @property
    def variables(self) -> list[Any]:
        """The inner optimizer's variables: the wrapper has no state."""
        return self.inner_optimizer.variables

    def save_own_variables(self, store: Any) -> None:
        """Saves nothing: Keras saves the attribute ``inner_optimizer`` by itself."""

    def load_own_variables(self, store: Any) -> None:
        """Loads nothing: Keras loads the attribute ``inner_optimizer`` by itself."""


def _coalesce_first(update_step: Any) -> Any:
    """Returns ``update_step`` for a gradient whose rows may repeat."""

    def coalesce_and_update(gradient: Any, variable: Any, learning_rate: Any) -> None:
        update_step(coalesce(gradient), variable, learning_rate)

    return coalesce_and_update
