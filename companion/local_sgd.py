r"""Several processes that train apart and average their weights every few steps. Chapter 15 of the book teaches it.

Each worker has a model of its own, an ordinary one, and trains it on its own data with its own optimizer. All that
travels is what :class:`LocalSGD` averages. ``tf.distribute.MultiWorkerMirroredStrategy`` carries it: its collectives
notice a worker that died or does not answer. The model is not made under its scope.
"""

import functools
import os
import pathlib
from collections.abc import Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf

# A private name of Keras, which its BackupAndRestore sets, too; checked on 3.13.2 and 3.15.1.
_INITIAL_EPOCH = "_initial_epoch"


class Team:
    """The workers, this one among them. :func:`~companion.connect` makes it.

    Args:
        strategy: the strategy that carries what they exchange, or ``None`` for one worker alone.
        timeout: see :func:`~companion.connect`.

    Attributes:
        rank: the number of this worker, from 0.
        size: how many there are.
    """

    def __init__(self, strategy: Any = None, timeout: float = 60.0) -> None:
        self.strategy, self.timeout = strategy, timeout
        self.size = 1 if strategy is None else strategy.num_replicas_in_sync
        self.rank = 0 if strategy is None else int(tf.function(lambda: strategy.run(_my_rank))())

    def total(self, tensors: Sequence[Any]) -> list[Any]:
        """Returns the sums over workers. All call it with tensors of the same shapes and dtypes.

        Args:
            tensors: a list of tensors.

        Raises:
            RuntimeError: a worker has died or does not answer.
        """
        if self.strategy is None or not tensors:
            return list(tensors)
        try:
            return self._total(list(tensors))
        except tf.errors.OpError as error:
            raise RuntimeError(
                f"Worker {self.rank} of {self.size} has lost the others in an exchange: one of them has "
                f"died, or has not answered for {self.timeout:g} s. No weight was changed by it. Start all workers "
                f"anew; with `backup_dir` they go on from the last epoch that all of them finished. "
                f"({type(error).__name__})"
            ) from error

    def gather(self, numbers: Sequence[float]) -> np.ndarray:
        """Returns an array with a row of numbers from each worker.

        Args:
            numbers: the row of this worker.
        """
        row = tf.constant([numbers], tf.float64) * tf.one_hot([self.rank], self.size, dtype=tf.float64, axis=0)
        return self.total([row])[0].numpy()

    @functools.cached_property
    def _total(self) -> Any:
        """One collective for each dtype: what they cost most is the wait for each other."""

        def add_up(tensors: list[Any]) -> list[Any]:
            merged: dict[int, Any] = {}
            for dtype in sorted({tensor.dtype.name for tensor in tensors}):
                alike = {index: tensor for index, tensor in enumerate(tensors) if tensor.dtype.name == dtype}
                flat = tf.concat([tf.reshape(tensor, [-1]) for tensor in alike.values()], 0)
                flat = tf.distribute.get_replica_context().all_reduce(tf.distribute.ReduceOp.SUM, flat)
                pieces = tf.split(flat, [tensor.shape.num_elements() for tensor in alike.values()])
                merged |= {
                    index: tf.reshape(piece, alike[index].shape) for index, piece in zip(alike, pieces, strict=True)
                }
            return [merged[index] for index in range(len(tensors))]

        return tf.function(lambda tensors: self.strategy.run(add_up, args=(tensors,)), autograph=False)


_teams: list[Team] = []  # a process connects once


def connect(timeout: float = 60.0) -> Team:
    """Connects this process with the others that train with it. Call it before anything else of TensorFlow's runs.

    Each worker finds its place in the environment variable ``TF_CONFIG``, which ``python -m companion.launch`` sets, or
    a cluster's scheduler. Without it the worker is alone.

    Args:
        timeout: seconds after which a worker that does not answer counts as hung. It must be longer than the slowest
            worker may be behind the others. Defaults to 60. A second call returns the same team.

    Returns:
        A :class:`~companion.local_sgd.Team`, whose ``rank`` is the number of this worker, and ``size`` how many there
        are.

    Raises:
        RuntimeError: TensorFlow has run before.
        ValueError: ``timeout`` is not a number above 0; a worker has more than one device.

    Example:
        >>> team = connect()
        >>> team.rank, team.size
        (0, 1)

    Taught in chapter 15, :doc:`/notebooks/15_local_sgd`.
    """
    if isinstance(timeout, bool) or not isinstance(timeout, (int, float)) or not timeout > 0:
        raise ValueError(f"`timeout` must be a number of seconds > 0. Received: timeout={timeout!r}")
    if not _teams:
        cluster = tf.distribute.cluster_resolver.TFConfigClusterResolver().cluster_spec().as_dict()
        strategy, size = None, sum(map(len, cluster.values()))
        if size > 1:
            options = tf.distribute.experimental.CommunicationOptions(timeout_seconds=float(timeout))
            try:
                strategy = tf.distribute.MultiWorkerMirroredStrategy(communication_options=options)
            except RuntimeError as error:
                raise RuntimeError(
                    "Workers can be connected before anything else of TensorFlow's runs, and not later: call "
                    "`companion.connect()` at the top of the script, before models, optimizers, tensors and seeds."
                ) from error
            if strategy.num_replicas_in_sync != size:
                raise ValueError(
                    "Each worker must have one device: start a worker for each GPU, with that one alone in "
                    f"CUDA_VISIBLE_DEVICES. Received: {strategy.num_replicas_in_sync} devices for {size} workers"
                )
        _teams.append(Team(strategy, timeout))
    return _teams[0]


class LocalSGD(keras.callbacks.Callback):
    r"""Lets workers train by themselves and averages their weights every :math:`k` steps.

    After every :math:`k`-th step the weights :math:`\theta_r` of the workers :math:`r = 1, \dots, R` become

    .. math::

       \theta \leftarrow \frac{1}{R} \sum_{r=1}^{R} \theta_r

    so that workers talk :math:`k` times less than if they averaged gradients. With :math:`k = 1` and SGD, with or
    without momentum, the weights are those of synchronous training. What is no weight of the model stays with its
    worker, such as momentum or the seeds of dropout.

    With an outer optimizer, what the workers have moved together is a gradient to it, as in DiLoCo: from the weights
    :math:`\theta_0` after the last exchange it steps along

    .. math::

       \Delta = \theta_0 - \frac{1}{R} \sum_{r=1}^{R} \theta_r

    and ``keras.optimizers.SGD(1.0)`` is the plain average again. Weights that are not trainable are averaged plainly.

    :func:`~companion.connect` comes first in the script, and tells each worker which part of the data is its own,
    ``x[team.rank :: team.size]`` for example.

    At the beginning of ``fit`` all start from the weights of worker 0. At its end, after a number of steps that is no
    multiple of :math:`k`, weights are averaged once more. In between, metrics, and what callbacks decide on them, are
    each worker's own.

    Args:
        every: :math:`k \ge 1`, the number of steps between two exchanges.
        warmup: the number of first steps with an exchange after each of them, as in post-local SGD. Defaults to 0.
        outer_optimizer: a ``keras.optimizers.Optimizer`` for :math:`\Delta`. Defaults to ``None``, the plain average.
        average_slots: whether the floating point variables of the model's optimizer are averaged as well, such as
            momentum. Defaults to ``False``.
        backup_dir: a folder where each worker keeps all of its state at the end of each epoch. A run that was cut off
            goes on from the last epoch that all workers finished, and ends on the weights of an uninterrupted one, if
            its data come in the same order. A run that had ended is at its end at once: give another run another
            folder. Put this callback behind those that change the model or the learning rate. Defaults to ``None``,
            no backup.

    Attributes:
        team: what :func:`~companion.connect` returns.
        exchanges: how many times weights were averaged.
        bytes: how many bytes this worker has given into these averages.

    Raises:
        ValueError: an argument is wrong; at the beginning of ``fit``, before the first step: the model is not built,
            ``fit`` cannot tell how many steps it makes, workers differ in their steps, epochs, settings or models, or
            backups are not of one run.
        RuntimeError: see :func:`~companion.connect`; in ``fit``: a worker has died, does not answer or is at another
            step. No weight was moved by the exchange that failed.

    Example:
        >>> local = LocalSGD(every=5)  # here alone: the average of one
        >>> model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1)])
        >>> model.compile("sgd", "mse")
        >>> history = model.fit(np.ones((40, 2)), np.ones((40, 1)), batch_size=4, callbacks=[local], verbose=0)
        >>> local.exchanges
        2

    References:
        Stich, 2019, "Local SGD converges fast and communicates little". Lin, Stich, Patel and Jaggi, 2020, "Don't use
        large mini-batches, use local SGD", for ``warmup``. Douillard and others, 2023, "DiLoCo: distributed
        low-communication training of language models", for the outer optimizer.

    Taught in chapter 15, :doc:`/notebooks/15_local_sgd`.
    """

    def __init__(
        self,
        every: int,
        warmup: int = 0,
        outer_optimizer: keras.optimizers.Optimizer | None = None,
        average_slots: bool = False,
        backup_dir: str | os.PathLike[str] | None = None,
    ) -> None:
        super().__init__()
        for name, value, least in (("every", every, 1), ("warmup", warmup, 0)):
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ValueError(f"`{name}` must be an integer of at least {least}. Received: {name}={value!r}")
        if outer_optimizer is not None and not isinstance(outer_optimizer, keras.optimizers.Optimizer):
            raise ValueError(
                "`outer_optimizer` must be a keras.optimizers.Optimizer, or None for the plain average. "
                f"Received: outer_optimizer={outer_optimizer!r}"
            )
        self.every, self.warmup, self.average_slots = every, warmup, average_slots
        self.outer_optimizer = outer_optimizer
        self.backup_dir = None if backup_dir is None else pathlib.Path(backup_dir)
        self.team = connect()
        self.exchanges = self.bytes = 0
        self._step = self._step_of_last_exchange = 0
        self._anchors: list[Any] = []

    def on_train_begin(self, logs: dict[str, Any] | None = None) -> None:
        """Checks that all workers are about to do the same; brings them to the same weights, or to their backups."""
        self._check()
        trainable = self.model.trainable_variables
        self.model.optimizer.build(trainable)
        if self.outer_optimizer is not None and not self._anchors:
            self._anchors = [keras.Variable(v.numpy(), dtype=v.dtype, name=v.name) for v in trainable]
            self.outer_optimizer.build(self._anchors)
        if not self._restore():
            weights = _floating(self.model.weights)
            values = [tf.convert_to_tensor(weight) for weight in weights]
            _assign(weights, self.team.total(values if self.team.rank == 0 else [tf.zeros_like(v) for v in values]))
            for anchor, variable in zip(self._anchors, trainable, strict=False):
                anchor.assign(variable)

    def on_epoch_begin(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        """Begins to count the epoch's batches."""
        self._batch = -1

    def on_train_batch_end(self, batch: int, logs: dict[str, Any] | None = None) -> None:
        """Averages the weights if it is time. With ``steps_per_execution`` several steps have gone by."""
        steps = range(self._step + 1, self._step + 1 + batch - self._batch)
        self._step, self._batch = steps[-1], batch
        if any(step <= self.warmup or (step - self.warmup) % self.every == 0 for step in steps):
            self._exchange()

    def on_epoch_end(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        """Writes the backup."""
        if self.backup_dir is not None:
            self._back_up(epoch + 1)

    def on_train_end(self, logs: dict[str, Any] | None = None) -> None:
        """Averages the weights once more, unless the last step did."""
        if self._step > self._step_of_last_exchange:
            self._exchange()

    def _check(self) -> None:
        """Raises the error that says why training cannot begin: the same one on every worker, if they differ."""
        model, steps = self.model, self.params["steps"]
        if not model.built or model.optimizer is None:
            raise ValueError(
                "The model must be built and compiled with an optimizer before `fit`: let it begin with a keras.Input, "
                f"or call it on a batch. Received: model={model.name!r}"
            )
        if model.distribute_strategy.num_replicas_in_sync > 1:
            raise ValueError(
                "LocalSGD needs an ordinary model on each worker: make it outside the scope of a strategy. Received: "
                f"model={model.name!r} under {type(model.distribute_strategy).__name__}"
            )
        if self.outer_optimizer is not None and self.outer_optimizer is model.optimizer:
            raise ValueError("`outer_optimizer` must be another one than the model's. Received: the same object")
        together = model.steps_per_execution
        if self.every % together or self.warmup % together:
            raise ValueError(
                f"`every` and `warmup` must be multiples of `steps_per_execution`={together}, within which nothing can "
                f"be exchanged. Received: every={self.every}, warmup={self.warmup}"
            )
        settings = {
            "steps": -1 if steps is None else steps,
            "epochs": self.params["epochs"],
            "every": self.every,
            "warmup": self.warmup,
            "average_slots": self.average_slots,
            "outer_optimizer": self.outer_optimizer is not None,
            "backup_dir": self.backup_dir is not None,
            "parameters": model.count_params(),
            "step": self._step,
        }
        table = self.team.gather(list(settings.values()))
        for name, values in zip(settings, table.T.astype(int).tolist(), strict=True):
            if len(set(values)) > 1:
                raise ValueError(
                    f"All workers must have the same `{name}`, or some would wait for exchanges that never come. "
                    f"Received: {name}={values}, by worker"
                )
        if steps is None and self.team.size > 1:
            raise ValueError(
                "`fit` cannot tell how many steps an epoch has, so it is not certain that all workers make the same "
                "number: pass `steps_per_epoch`. Received: steps=None"
            )

    def _exchange(self) -> None:
        """Averages, or raises and leaves everything as it is."""
        trainable, optimizer = self.model.trainable_variables, self.model.optimizer
        others = _floating(self.model.non_trainable_weights)
        if self.average_slots:
            others += [v for v in _floating(optimizer.variables) if v is not optimizer.learning_rate]
        values = [tf.convert_to_tensor(variable) for variable in (*trainable, *others)]
        mine = tf.one_hot(self.team.rank, self.team.size) * self._step
        *sums, steps = self.team.total([*values, mine])
        if len(set(steps.numpy().tolist())) > 1:
            raise RuntimeError(
                f"Worker {self.team.rank} exchanges weights after step {self._step}, and others after another one: "
                f"{steps.numpy().astype(int).tolist()}, by worker. Has a callback ended training on one of them? "
                "No weight was changed."
            )
        means = [total / self.team.size for total in sums]
        if self.outer_optimizer is not None:
            moved = zip(self._anchors, means, strict=False)
            self.outer_optimizer.apply([anchor.value - mean for anchor, mean in moved], self._anchors)
            means[: len(trainable)] = self._anchors
        _assign([*trainable, *others], means)
        self._step_of_last_exchange = self._step
        self.exchanges += 1
        self.bytes += sum(value.dtype.size * int(tf.size(value)) for value in values)

    # Backups. Each worker writes one at the end of an epoch, and deletes the one before when all have written theirs:
    # so whenever one is killed, there is an epoch of which all have one.

    def _restore(self) -> bool:
        """Goes back to the last epoch that all workers finished; says whether there is one."""
        if self.backup_dir is None:
            return False
        self.backup_dir.mkdir(parents=True, exist_ok=True)
        mine = self._backups()
        others = [
            path.name for path in self.backup_dir.glob("worker-*.npz") if f"-of-{self.team.size}-" not in path.name
        ]
        found = self.team.gather([max(mine, default=0), len(others)]).astype(int)
        epoch = int(found[:, 0].min())
        if found[:, 0].max() > epoch + 1 or found[:, 1].any():
            raise ValueError(
                f"`backup_dir` must hold the backups of one run, of {self.team.size} workers: give another folder, or "
                f"empty this one. Received: backup_dir={str(self.backup_dir)!r} with backups of epochs "
                f"{found[:, 0].tolist()}, by worker, and {others} of other runs"
            )
        if epoch:
            with np.load(mine[epoch]) as stored:
                values = [stored[str(index)] for index in range(len(stored) - 1)]
                counters = stored["counters"].tolist()
            state = self._state()
            if [value.shape for value in values] != [tuple(variable.shape) for variable in state]:
                raise ValueError(
                    f"The backup is of another model or optimizer: give another `backup_dir`. Received: {mine[epoch]}"
                )
            for variable, value in zip(state, values, strict=True):
                variable.assign(value.view(variable.numpy().dtype))
            self._step, self._step_of_last_exchange, self.exchanges, self.bytes = counters
            setattr(self.model, _INITIAL_EPOCH, epoch)
        return epoch > 0

    def _back_up(self, epoch: int) -> None:
        """Writes this worker's backup, waits until all have written theirs, and deletes older ones."""
        assert self.backup_dir is not None
        values = {str(index): variable.numpy() for index, variable in enumerate(self._state())}
        counters = np.array([self._step, self._step_of_last_exchange, self.exchanges, self.bytes])
        path = self.backup_dir / f"worker-{self.team.rank}-of-{self.team.size}-epoch-{epoch}.npz"
        unfinished = path.with_suffix(".unfinished")
        with unfinished.open("wb") as file:
            np.savez(file, counters=counters, **values)
        unfinished.replace(path)
        self.team.gather([epoch])
        for older, old_path in self._backups().items():
            if older != epoch:
                old_path.unlink()

    def _backups(self) -> dict[int, pathlib.Path]:
        """This worker's backups by their epochs."""
        assert self.backup_dir is not None
        paths = self.backup_dir.glob(f"worker-{self.team.rank}-of-{self.team.size}-epoch-*.npz")
        return {int(path.stem.rpartition("-")[2]): path for path in paths}

    def _state(self) -> list[Any]:
        """Every variable that training changes, seeds of dropout included."""
        outer = [] if self.outer_optimizer is None else self.outer_optimizer.variables
        return [*self.model.variables, *self.model.optimizer.variables, *self._anchors, *outer]


def _my_rank() -> Any:
    return tf.distribute.get_replica_context().replica_id_in_sync_group


def _floating(variables: Sequence[Any]) -> list[Any]:
    """Those that have a mean."""
    return [variable for variable in variables if "float" in str(variable.dtype)]


def _assign(variables: Sequence[Any], values: Sequence[Any]) -> None:
    for variable, value in zip(variables, values, strict=True):
        variable.assign(value)
