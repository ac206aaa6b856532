"""Puts a training step into a compiled model that asks a gradient oracle: once, or as often as the optimizer wants.

Keras hands an optimizer one gradient a step. A method that needs more, such as Heun's, is an
:class:`InjectedOptimizer`: it receives the oracle and returns a direction. Chapters 06 and 09 of the book teach it.
"""

import functools
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import keras
import tensorflow as tf

from companion import arguments
from companion.backend import environment
from companion.denominators import of_metrics
from companion.diagnostics import Listening, detach, listener_for, listener_of, quiet
from companion.gradients import scaled
from companion.merging import weighted_mean
from companion.oracle import GradientOracle
from companion.questions import check_question, direction_of, functions_of
from companion.replicas import brought_by_one, has_workers, replicas_of
from companion.wrapping import weighed, wrapped_by

# Private names of Keras, checked on 3.13.2 and 3.15.1; tests/test_injection.py notices when they move.
_BUILD_FROM_ITERATOR = "_maybe_symbolic_build"
_BUILD_FROM_BATCH = "_symbolic_build"


def inject(
    model: keras.Model,
    micro_batches: int = 1,
    weight_fn: Callable[[Any, Any, Any], Any] | str | None = None,
    merge: Callable[[list[Any], Any], list[Any]] = weighted_mean,
    diagnostics: tuple[str, ...] = (),
    check_finite: bool = False,
) -> keras.Model:
    r"""Makes ``fit`` process each batch in parts and apply one gradient, that of the whole batch.

    .. math::

       \nabla L(\theta) = \frac{1}{\sum_i D_i} \sum_i \nabla S_i(\theta)

    In one part, the step leaves everything as Keras's own would: the weights, what ``fit`` shows, and every variable
    that anything assigns; only repeated rows of an embedding are summed, as by :class:`~companion.CoalesceGradients`.
    In several parts, peak memory is that of a part, and the weights, the loss, the metrics and the history are those of
    the whole batch: with masks, sample weights, several outputs, a ragged last batch, and on several replicas: devices
    of one machine (``tf.distribute.MirroredStrategy``), or of several (``MultiWorkerMirroredStrategy``, which Keras's
    own step does not support). Exceptions, BatchNorm among them, are listed in :class:`~companion.GradientOracle`.

    Args:
        model: a compiled model with the training step of ``keras.Model``.
        micro_batches: an integer :math:`\ge 1`: the number of parts, see
            :class:`~companion.GradientOracle`. Defaults to 1.
        weight_fn: for a loss with a denominator of its own, on one replica: a function of ``(x, y, sample_weight)``
            that returns the denominator of a part, or ``"sum"`` for a loss that is a sum. Defaults to ``None``.
        merge: a rule of :mod:`companion.merging`, or a function like them, by which several replicas merge their
            gradients. The optimizer clips what has been merged. Defaults to
            :func:`~companion.merging.weighted_mean`, the formula above.
        diagnostics: what ``fit`` shows besides, as it shows a metric: ``"gradient_norm"``, ``"update_ratio"`` and
            ``"noise_scale"``, or a number for each layer: ``"gradient_norm_per_layer"`` and so on; see
            :class:`~companion.diagnostics.Listener`. Defaults to none.
        check_finite: whether the first gradient that is infinite or NaN is a ``ValueError`` that names the layer and
            the update, with weights, slots and counters as before it. Where the loss is scaled, an overflow is none
            until the scale has fallen to 1. Defaults to ``False``.

    Returns:
        The same model. :func:`~companion.eject` restores it. Cloning and loading lose the injection, so call
        ``inject`` again after them.

    Raises:
        TypeError: ``model`` is not a ``keras.Model``.
        ValueError: an argument is wrong, the model is not compiled or has a training step of its own, or its optimizer
            has ``gradient_accumulation_steps`` or wraps an :class:`InjectedOptimizer` that must not be wrapped.

    Example:
        >>> model = keras.Sequential([keras.layers.Dense(1)])
        >>> model.compile("sgd", "mse")
        >>> history = inject(model, micro_batches=4).fit(np.ones((16, 2)), np.ones((16, 1)), batch_size=16, verbose=0)

    Taught in chapters 06, 07 and 09, :doc:`/notebooks/06_the_fix`, :doc:`/notebooks/07_accumulation_in_practice` and
    :doc:`/notebooks/09_injecting_heun`.
    """
    micro_batches = check_question(model, micro_batches, weight_fn, merge)
    listener = listener_for(model, diagnostics, check_finite, micro_batches, merge)
    _check(model)
    eject(model)
    model.train_step = functools.partial(_train_step, model, micro_batches, weight_fn, merge, listener)
    model.train_function = None
    if replicas_of(model) > 1:
        setattr(model, _BUILD_FROM_ITERATOR, functools.partial(_build_from_one_shard, model, listener))
    if listener:
        listener.attach(model)
    if listener or has_workers(model):
        model.test_step, model.test_function = functools.partial(_test_step, model, listener), None
    return model


def eject(model: keras.Model) -> keras.Model:
    """Gives a model back the training step of ``keras.Model``.

    Args:
        model: a model, injected or not.

    Returns:
        The same model.

    Raises:
        TypeError: ``model`` is not a ``keras.Model``.

    Example:
        >>> model = keras.Sequential([keras.layers.Dense(1)])
        >>> model.compile("sgd", "mse")
        >>> eject(inject(model)).train_step == type(model).train_step.__get__(model)
        True

    It undoes what chapter 06 teaches, :doc:`/notebooks/06_the_fix`; :doc:`/book/recipes` has it in a program.
    """
    if not isinstance(model, keras.Model):
        raise TypeError(f"`model` must be a keras.Model. Received: model={model!r}")
    if _is_injected(model):
        detach(model)
        del model.train_step
        model.train_function = None
        vars(model).pop(_BUILD_FROM_ITERATOR, None)
    if getattr(vars(model).get("test_step"), "func", None) is _test_step:
        del model.test_step
        model.test_function = None
    return model


class InjectedOptimizer(keras.optimizers.Optimizer):
    r"""Base class of optimizers that ask for several gradients in one step. A subclass writes ``direction``.

    .. math::

       \theta \leftarrow \theta - h\, d \qquad d = \mathtt{direction}(\nabla L, \theta, h)

    All questions of a step are about the same batch, with the same dropout masks and BatchNorm statistics; metrics,
    seeds, and statistics move as if only the first had been asked. The weights move once. Clipping, weight decay,
    averages, loss scaling and ``iterations`` act once, on :math:`d`. Constraints hold at the end of the step, and at
    every point where ``direction`` asks, as in the projected extragradient method.

    Answers are dense, also those for embeddings.

    Args:
        learning_rate: :math:`h`, see :class:`~companion.SGD`. A callable is called once a step.
        **kwargs: those of ``keras.optimizers.Optimizer`` but ``gradient_accumulation_steps``.

    Raises:
        RuntimeError: ``fit`` runs without :func:`inject`.
        ValueError: ``direction`` asks nothing, or does not return a tensor for each value.

    Example:
        Sharpness-aware minimisation (Foret et al., 2021) asks again where the loss is worse; :class:`~companion.SAM`
        does so around any optimizer:

        >>> class SAM(InjectedOptimizer):
        ...     def direction(self, oracle, values, learning_rate):
        ...         slopes = oracle(values)
        ...         norm = keras.ops.sqrt(sum(keras.ops.sum(slope**2) for slope in slopes))
        ...         far = keras.ops.divide_no_nan(0.05, norm)
        ...         return oracle([value + far * slope for value, slope in zip(values, slopes)])
        >>> model = keras.Sequential([keras.layers.Dense(1)])
        >>> model.compile(SAM(0.1), "mse")
        >>> history = inject(model).fit(np.ones((4, 2)), np.ones((4, 1)), verbose=0)

    References:
        Foret, Kleiner, Mobahi and Neyshabur, 2021, "Sharpness-aware minimization for efficiently improving
        generalization", for the example.

    Taught in chapter 09, :doc:`/notebooks/09_injecting_heun`.
    """

    _hands_rate = True  # whether `direction` is told the learning rate, and nobody else asks for it
    _stepping = 0  # how many steps are under way: one for each replica
    _rate: Any = None  # in a step: what a callable or a schedule has said,
    _questions: Any = None  # what `direction` asks,
    _is_taken: Any = None  # and a condition that `direction` may set: unless it holds, nothing moves

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Refuses a class with a second base whose rule would never run."""
        super().__init_subclass__(**kwargs)
        rule = next(base for base in cls.__mro__ if "update_step" in vars(base))
        for other in cls.__mro__:
            related = issubclass(InjectedOptimizer, other) or issubclass(other, InjectedOptimizer)
            if issubclass(rule, InjectedOptimizer) and not related and "update_step" in vars(other):
                raise TypeError(
                    f"{cls.__name__} would move by the rule of {rule.__name__} and never by that of {other.__name__}: "
                    f"name {other.__name__} first among the bases, and it steps along the direction."
                )

    def __init__(self, learning_rate: Any = 0.01, **kwargs: Any) -> None:
        environment()
        super().__init__(learning_rate=arguments.learning_rate(learning_rate), **kwargs)

    def direction(self, oracle: Callable[..., list[Any]], values: list[Any], learning_rate: Any) -> list[Any]:
        """Says where to go. To be written by a subclass.

        Args:
            oracle: a :class:`~companion.questions.Questions`, which is a function of a list of tensors, or of nothing
                for the current weights, that answers a list of gradients there, or at what constraints make of it.
                With one that is no projection (``MinMaxNorm`` with a ``rate``) a method may rest at another point.
            values: the current weights, tensors of one dtype: the widest of the weights', and at least float32.
            learning_rate: the learning rate of this step, a scalar tensor of the same dtype.

        Returns:
            A tensor for each of the values.
        """
        raise NotImplementedError(f"{type(self).__name__} must define `direction(self, oracle, values, learning_rate)`")

    @property
    def learning_rate(self) -> Any:
        """The learning rate: during a step one number, even if a callable would say another when it is asked again."""
        return super().learning_rate if self._rate is None else self._rate

    @learning_rate.setter
    def learning_rate(self, value: Any) -> None:
        keras.optimizers.Optimizer.learning_rate.fset(self, value)

    def update_step(self, gradient: Any, variable: Any, learning_rate: Any) -> None:
        """Moves ``variable`` once. ``gradient`` is its part of the direction."""
        self.assign_sub(variable, keras.ops.cast(learning_rate, gradient.dtype) * gradient)

    def inject(self, model: keras.Model, micro_batches: int = 1) -> keras.Model:
        """Does :func:`inject` on a model that was compiled with this optimizer, and returns it."""
        theirs = getattr(model, "optimizer", None)
        if isinstance(model, keras.Model) and self not in wrapped_by(theirs):
            raise ValueError(
                "`model` must be compiled with this optimizer first: model.compile(optimizer=optimizer, ...). "
                f"Received: model={model.name!r} with optimizer={theirs!r}"
            )
        return inject(model, micro_batches)

    def step(self, oracle: GradientOracle) -> Any:
        """Takes one step on the oracle's batch: for a training step of your own, with two models for example.

        Args:
            oracle: a :class:`~companion.GradientOracle` that has not been asked. Give it a ``loss`` if the step has
                one of its own.

        Returns:
            The loss at the weights from which the step went.
        """
        if not isinstance(oracle, GradientOracle):
            raise TypeError(f"`oracle` must be a companion.GradientOracle. Received: oracle={oracle!r}")
        theirs = getattr(oracle.model, "optimizer", None)  # where the loss is scaled, Keras has wrapped ours to do it
        _take_step(theirs if self in wrapped_by(theirs) else self, oracle)
        return oracle.loss

    def apply(self, grads: Any, trainable_variables: Any = None) -> Any:
        """Applies the direction. Raises ``RuntimeError`` if nobody has asked for it."""
        if not self._stepping:
            raise RuntimeError(
                f"{type(self).__name__} asks for gradients itself, which this training step does not let it: call "
                "`optimizer.inject(model)` or `companion.inject(model)` after `compile`, and again after cloning or "
                "loading. In a `train_step` of your own, call `optimizer.step(oracle)` with "
                "oracle=companion.GradientOracle(model, data, loss=function). Beside others in a MultiOptimizer it "
                "cannot ask: compile the model with it alone. It has changed nothing."
            )
        if self._is_taken is None:
            return super().apply(grads, trainable_variables)
        is_taken, apply = self._is_taken, super().apply

        def choose(strategy: Any, *args: Any) -> None:  # replicas meet in `apply`: a branch must hold all of them
            tf.cond(is_taken, lambda: strategy.extended.call_for_each_replica(apply, args), lambda: None)

        return tf.distribute.get_replica_context().merge_call(choose, args=(grads, trainable_variables))


class InjectedModel(Listening):
    """A mixin that injects at class level, so that clones and loaded models are injected, too.

    Attributes:
        micro_batches: as in :func:`inject`. Defaults to 1.
        weight_fn: as in :func:`inject`. Defaults to ``None``.
        merge: as in :func:`inject`. Defaults to :func:`~companion.merging.weighted_mean`.
        diagnostics: as in :func:`inject`. Defaults to none.
        check_finite: as in :func:`inject`. Defaults to ``False``. All can be set on a model; the next ``fit`` heeds it.

    Example:
        >>> @keras.saving.register_keras_serializable()
        ... class Injected(InjectedModel, keras.Sequential):
        ...     micro_batches = 2
        >>> model = Injected([keras.layers.Dense(1)])
        >>> model.compile("sgd", "mse")
        >>> history = model.fit(np.ones((4, 2)), np.ones((4, 1)), verbose=0)

    Taught in chapter 09, :doc:`/notebooks/09_injecting_heun`.
    """

    micro_batches: int = 1
    weight_fn: Callable[[Any, Any, Any], Any] | str | None = None
    merge: Callable[[list[Any], Any], list[Any]] = staticmethod(weighted_mean)

    def train_step(self, data: Any) -> dict[str, Any]:
        """What ``fit`` does with a batch."""
        return _train_step(self, self.micro_batches, *functions_of(self), listener_of(self), data)

    def test_step(self, data: Any) -> dict[str, Any]:
        """What ``evaluate`` does with a batch."""
        with quiet(listener_of(self)):
            return _logs(self, super().test_step(data))  # type: ignore[misc]

    def _maybe_symbolic_build(self, iterator: Any = None, data_batch: Any = None) -> None:
        if replicas_of(self) > 1:
            _build_from_one_shard(self, listener_of(self), iterator, data_batch)
        else:
            super()._maybe_symbolic_build(iterator=iterator, data_batch=data_batch)  # type: ignore[misc]


def _train_step(model: Any, micro_batches: int, weight_fn: Any, merge: Any, listener: Any, data: Any) -> dict[str, Any]:
    """What ``fit`` does with a batch."""
    _check(model)  # once more: the model may have been compiled anew
    oracle = GradientOracle(model, data, micro_batches, weight_fn, merge)
    with quiet(listener):
        logs = _take_step(model.optimizer, oracle, listener)
    return _logs(model, listener.joined(logs) if listener else logs)


def _test_step(model: Any, listener: Any, data: Any) -> dict[str, Any]:
    """What ``evaluate`` does with a batch where there are several workers, or dials that it does not show."""
    with quiet(listener):
        return _logs(model, type(model).test_step(model, data))


def _logs(model: Any, results: dict[str, Any]) -> dict[str, Any]:
    """Metrics as Keras wants them: of several workers' it takes the mean over the first axis, and scalars have none."""
    return {name: tf.reshape(result, (1,)) for name, result in results.items()} if has_workers(model) else results


def _take_step(optimizer: Any, oracle: GradientOracle, listener: Any = None) -> dict[str, Any]:
    """Asks, applies the answer once, and reports."""
    oracle.defer()
    layers = list(wrapped_by(optimizer))
    injected = [layer for layer in layers if isinstance(layer, InjectedOptimizer)]
    if listener:
        listener.begin(oracle)
    with _step_of(injected):
        plain = not (injected or (listener and listener.checks)) and oracle.is_whole and oracle.merge is weighted_mean
        late = tf.executing_eagerly() and not optimizer.built and any(hasattr(o, "optimizers") for o in layers)
        if late or not plain:
            oracle.prepare()
            variables = _made_ready(optimizer, oracle.model)  # it is known what several hold, and nothing has moved
        if plain:
            gradients, answers = oracle.plain(), None
            variables = _made_ready(optimizer, oracle.model)
        else:
            asks_itself = injected and variables
            if asks_itself and listener and listener.checks:  # what `direction` may assign
                own = keras.optimizers.Optimizer.variables.fget(injected[0])
                oracle.kept = [(variable, tf.identity(variable)) for variable in own]
            found = direction_of(injected[0], oracle, injected[0] is not optimizer) if asks_itself else oracle()
            gradients = [scaled(answer, optimizer.scale_loss(1.0)) for answer in found]
            answers = injected[0]._questions.answers[0] if asks_itself else found
            if asks_itself and injected[0]._is_taken is not None:
                oracle.take_back(unless=injected[0]._is_taken, but=of_metrics(oracle.model))
        if variables:
            with weighed(optimizer, oracle) as is_weighed:

                def apply(found: Any) -> None:
                    brought = found if is_weighed else brought_by_one(found)
                    optimizer.apply_gradients(zip(brought, variables, strict=True))

                if listener:
                    is_taken = injected[0]._is_taken if injected else None
                    listener.step(optimizer, oracle, gradients, answers, apply, is_taken)
                else:
                    apply(gradients)
        else:
            warnings.warn("The model does not have any trainable weights.", stacklevel=2)
    return oracle.report()


@contextmanager
def _step_of(optimizers: list[Any]) -> Iterator[None]:
    """Lets optimizers step. What their learning rates say at the beginning holds until all replicas are through."""
    for optimizer in optimizers:
        if not optimizer._stepping and optimizer._hands_rate:
            rate = optimizer.learning_rate
            optimizer._rate = None if isinstance(rate, keras.Variable) else tf.convert_to_tensor(rate)
        optimizer._stepping += 1
    try:
        yield
    finally:
        for optimizer in optimizers:
            optimizer._stepping -= 1
            if not optimizer._stepping:
                optimizer._rate = optimizer._questions = optimizer._is_taken = None


def _build_from_one_shard(model: Any, listener: Any, iterator: Any = None, data_batch: Any = None) -> None:
    """Builds as Keras's ``fit`` does on several replicas, which fails there if the first batch's shards are uneven."""
    for _, _, batches in iterator or ():
        first_shard = lambda shards: model.distribute_strategy.experimental_local_results(shards)[0]  # noqa: E731
        data_batch = keras.tree.map_structure(first_shard, next(batches))
        break
    with model.distribute_strategy.scope():
        getattr(model, _BUILD_FROM_BATCH)(data_batch=data_batch)
        if listener:
            listener.build(model)


def _is_injected(model: Any) -> bool:
    return getattr(vars(model).get("train_step"), "func", None) is _train_step


def _check(model: Any) -> None:
    if type(model).train_step not in (keras.Model.train_step, InjectedModel.train_step) or (
        "train_step" in vars(model) and not _is_injected(model)
    ):
        raise ValueError(
            "`model` has a `train_step` of its own, which an injection would replace. Call `optimizer.step(oracle)` in "
            "it, with oracle=companion.GradientOracle(model, data, loss=function), or, for an optimizer of Keras, "
            "optimizer.apply([slope if slope is None else optimizer.scale_loss(slope) for slope in oracle()], "
            f"model.trainable_weights). Received: model={model.name!r} of class {type(model).__name__}"
        )
    _check_optimizer(model.optimizer)


def _made_ready(optimizer: Any, model: Any) -> Any:
    """Builds and checks an optimizer for a model that is built, before the loss is scaled; the variables that move."""
    if model.trainable_weights and not optimizer.built:
        optimizer.build(model.trainable_weights)
    _check_optimizer(optimizer)
    return model.trainable_weights


def _check_optimizer(optimizer: Any) -> None:
    layers = list(wrapped_by(optimizer))
    outermost, *inside = [one for one in layers if not isinstance(one, keras.optimizers.LossScaleOptimizer)]
    for layer in inside:
        if isinstance(layer, InjectedOptimizer):
            raise ValueError(
                f"{type(layer).__name__} asks for several gradients of one batch, and must not be wrapped or be one of "
                "several: compile the model with it alone, and for a batch in parts pass `micro_batches` to `inject`. "
                f"Received: it is wrapped by {type(outermost).__name__}"
            )
    for layer in layers:
        if layer.gradient_accumulation_steps:
            raise ValueError(
                "`gradient_accumulation_steps` on the optimizer and `inject` do not go together: leave it out and pass "
                f"`micro_batches`. Received: gradient_accumulation_steps={layer.gradient_accumulation_steps!r} on "
                f"{layer.name!r}"
            )
