r"""Several processes that train apart and average their weights every few steps. Chapter 15 of the book teaches it.

Each worker has a model of its own, an ordinary one, and trains it on its own data with its own optimizer. All that
travels is what :class:`LocalSGD` averages.
"""

import functools
import itertools
import os
import pathlib
import zlib
from collections.abc import Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from companion.agreement import description, kind_of_optimizer, names_of, settings_of
from companion.arguments import integer
from companion.backend import environment
from companion.backups import Backups
from companion.gradients import widened
from companion.teams import connect

# A private name of Keras, which its BackupAndRestore sets, too; checked on 3.13.2 and 3.15.1.
_INITIAL_EPOCH = "_initial_epoch"

_OWN = ("learning_rate", "shown_learning_rate", "dynamic_scale")  # of an optimizer's variables: those not averaged


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

    At the beginning of ``fit`` all start from the weights of worker 0, whatever their dtype. At its end, after a number
    of steps that is no multiple of :math:`k`, weights are averaged once more; and again, plainly, where Keras has
    written something after that, such as an open window of an accumulation or a moving average. What has no mean, such
    as an integer, is then that of worker 0. In between, metrics, and what callbacks decide on them, are each worker's
    own. Put this callback last in the list: it does not see what one behind it does at the end.

    What must be the same everywhere is compared by name before the first step: steps, epochs, settings, the optimizer's
    class and slots, and each weight's name, shape, dtype and whether it is trained. (Keras numbers names, ``dense_7``;
    only the order of these numbers matters.)

    Args:
        every: :math:`k \ge 1`, the number of steps between two exchanges.
        warmup: the number of first steps with an exchange after each of them, as in post-local SGD. Defaults to 0.
        outer_optimizer: a ``keras.optimizers.Optimizer`` for :math:`\Delta`, the same on all workers. After layers were
            frozen or unfrozen, or if it was in use before, the attribute is another one of its kind, with the state of
            what is still trained. Defaults to ``None``, the plain average.
        average_slots: whether the floating point variables of the model's optimizer are averaged as well, such as
            momentum. Defaults to ``False``.
        backup_dir: a folder where each worker keeps all of its state at the end of each whole epoch: the variables of
            the model and of both optimizers, with a learning rate that a callback has set. A run that was cut off goes
            on from the last epoch that all workers finished, and ends on the weights of an uninterrupted one, if its
            data come in the same order. Numbers that a callback keeps for itself, such as the patience of
            ``EarlyStopping`` or ``ReduceLROnPlateau`` and their best value, the history, and Keras's global seed are
            not in it and begin anew. A run that had ended is at its end at once: give another run another folder.
            Defaults to ``None``, no backup.

    Attributes:
        team: what :func:`~companion.connect` returns.
        exchanges: how many times weights were averaged.
        bytes: how many bytes this worker has given into these averages.

    Raises:
        ValueError: an argument is wrong; at the beginning of ``fit``, before the first step: the model is not built,
            ``fit`` cannot tell how many steps it makes, workers differ in what they must have alike, or backups cannot
            be read or are not of this run. All workers raise it.
        RuntimeError: see :func:`~companion.connect`; in ``fit``: a worker has died, does not answer, or has ended
            training alone; the error says which. No weight was moved by the exchange that failed.

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
        environment()
        super().__init__()
        self.every, self.warmup = integer("every", every, 1), integer("warmup", warmup, 0)
        if outer_optimizer is not None and not isinstance(outer_optimizer, keras.optimizers.Optimizer):
            raise ValueError(
                "`outer_optimizer` must be a keras.optimizers.Optimizer, or None for the plain average. "
                f"Received: outer_optimizer={outer_optimizer!r}"
            )
        if not isinstance(average_slots, bool):
            raise ValueError(f"`average_slots` must be True or False. Received: average_slots={average_slots!r}")
        if backup_dir is not None and (
            not isinstance(backup_dir, (str, os.PathLike)) or os.path.isfile(backup_dir) or not os.fspath(backup_dir)
        ):
            raise ValueError(f"`backup_dir` must be the path of a folder, or None. Received: backup_dir={backup_dir!r}")
        self.average_slots, self.outer_optimizer = average_slots, outer_optimizer
        self.backup_dir = None if backup_dir is None else pathlib.Path(backup_dir)
        self.team = connect()
        self.exchanges = self.bytes = 0
        self._step = self._step_of_last_exchange = 0
        self._anchors: list[Any] = []
        self._resumed: Any = None
        self._epoch: int | None = None

    def on_train_begin(self, logs: dict[str, Any] | None = None) -> None:
        """Checks that all workers are about to do the same; brings them to the same weights, or to their backups."""
        self._forget_epoch()
        self._check()
        self._epoch, self._batch, self._told = None, -1, False
        trainable = self.model.trainable_weights
        self._anchor()
        if not self._restore():
            weights = self.model.weights
            values = [_sent(weight) for weight in _floating(weights)]
            values = values if self.team.rank == 0 else [tf.zeros_like(value) for value in values]
            _assign(_floating(weights), self.team.total(values))
            self._take_from_first([weight for weight in weights if not _floating([weight])])
            for anchor, variable in zip(self._anchors, trainable, strict=False):
                anchor.assign(variable)

    def on_epoch_begin(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        """Begins to count the epoch's batches."""
        if self._epoch is None:
            self._compare_first_epochs(epoch)
        self._epoch, self._batch, self._told = epoch, -1, False

    def on_train_batch_end(self, batch: int, logs: dict[str, Any] | None = None) -> None:
        """Averages the weights if it is time. With ``steps_per_execution`` several steps have gone by."""
        steps = range(self._step + 1, self._step + 1 + batch - self._batch)
        self._step, self._batch = steps[-1], batch
        if any(self._is_due(step) for step in steps):
            self._exchange()

    def on_epoch_end(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        """Writes the backup of a whole epoch, and averages what the last one has left."""
        if self.params["steps"] is not None and self._batch + 1 < self.params["steps"]:
            self._end_early()
        elif self.backup_dir is not None:
            self._back_up(epoch + 1)
        if epoch + 1 == self.params["epochs"]:
            self._exchange_rest()

    def on_train_end(self, logs: dict[str, Any] | None = None) -> None:
        """Averages the weights once more, unless all workers hold the same."""
        if self._epoch is None:
            self._compare_first_epochs(self.params["epochs"])
        elif self._epoch + 1 < self.params["epochs"] and not self._told:
            self._end_early()
        self._exchange_rest()
        if self.team.size == 1:
            return
        digest = functools.reduce(lambda crc, w: zlib.crc32(w.numpy().tobytes(), crc), self.model.weights, 0)
        if len(set(self._report(digest))) > 1:  # by what Keras has written since: a window, a moving average
            floating = _floating(self.model.weights)
            _assign(floating, self._means([_sent(weight) for weight in floating]))
            self._take_from_first([weight for weight in self.model.weights if not _floating([weight])])

    # What all workers must do alike

    def _check(self) -> None:
        """Raises the error that says why training cannot begin: the same one on every worker."""
        for rank, problem in enumerate(self.team.texts(self._problem())):
            if problem:
                raise ValueError(problem if self.team.size == 1 else f"{problem} (worker {rank})")
        for name, facts in self.team.differing(self._facts()).items():
            lines = itertools.zip_longest(*(fact.split("\n") for fact in facts), fillvalue="nothing")
            first = next(line for line in lines if len(set(line)) > 1)
            raise ValueError(
                f"All workers must have the same `{name}`, or some would wait for exchanges that never come, or what "
                f"does not belong together would be averaged. Received: {name}=[{', '.join(first)}], by worker"
            )

    def _problem(self) -> str:
        """Says what this worker alone can know to be wrong."""
        model, steps = self.model, self.params["steps"]
        if not model.built or model.optimizer is None:
            return (
                "The model must be built and compiled with an optimizer before `fit`: let it begin with a keras.Input, "
                f"or call it on a batch. Received: model={model.name!r}"
            )
        if model.distribute_strategy.num_replicas_in_sync > 1:
            return (
                "LocalSGD needs an ordinary model on each worker: make it outside the scope of a strategy. Received: "
                f"model={model.name!r} under {type(model.distribute_strategy).__name__}"
            )
        if self.outer_optimizer is not None and self.outer_optimizer is model.optimizer:
            return "`outer_optimizer` must be another one than the model's. Received: the same object"
        together = model.steps_per_execution
        if self.every % together or self.warmup % together:
            return (
                f"`every` and `warmup` must be multiples of `steps_per_execution`={together}, within which nothing can "
                f"be exchanged. Received: every={self.every}, warmup={self.warmup}"
            )
        if steps is None and self.team.size > 1:
            return (
                "`fit` cannot tell how many steps an epoch has, so it is not certain that all workers make the same "
                "number: pass `steps_per_epoch`. Received: steps=None"
            )
        try:
            if self.backup_dir is not None:
                self.backup_dir.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            return f"`backup_dir` must be a folder, or one that can be made. Received: {self.backup_dir} ({error})"
        return ""

    def _facts(self) -> dict[str, str]:
        """What must be the same on all workers."""
        return {
            "steps": str(self.params["steps"]),
            "epochs": str(self.params["epochs"]),
            "steps_per_execution": str(self.model.steps_per_execution),
            "every": str(self.every),
            "warmup": str(self.warmup),
            "average_slots": str(self.average_slots),
            "outer_optimizer": settings_of(self.outer_optimizer),
            "backup_dir": "a folder" if self.backup_dir else "None",
            "step": str(self._step),
            "optimizer": kind_of_optimizer(self.model.optimizer),
            "weights": description(self.model, self.outer_optimizer).partition("\n")[2],
        }

    def _compare_first_epochs(self, epoch: int) -> None:
        """Keras has told nobody of ``initial_epoch``: whoever begins no epoch at all says its last."""
        self._forget_epoch()
        found = self._report(epoch)
        if len(set(found)) > 1:
            raise ValueError(
                "All workers must have the same `initial_epoch`, or some would wait for exchanges that never come. "
                f"Received: initial_epoch={found}, by worker"
            )

    def _end_early(self) -> None:
        """Says that this worker's training, or its epoch, ends before its time: as others say what they say next."""
        self._told = True
        if self.team.size > 1:
            if self._others_exchange_next():
                self._exchange(early=True)
            else:
                self._report(0, early=True)

    def _others_exchange_next(self) -> bool:
        """Whether those who go on will next exchange weights, and not just numbers: at a backup, or at the end."""
        if self.backup_dir is None:
            return True
        until_backup = self.params["steps"] - self._batch - 1 or self.params["steps"]
        return any(self._is_due(self._step + 1 + k) for k in range(until_backup))

    def _report(self, number: int, early: bool = False) -> list[int]:
        """Exchanges a number, and no weights."""
        table = self.team.gather([self._step, int(early), number]).astype("int64").T.tolist()
        self._refuse_apart(table[0], table[1])
        return table[2]

    def _refuse_apart(self, steps: list[int], early: list[int]) -> None:
        if len(set(zip(steps, early, strict=True))) > 1:
            alone = [rank for rank, ended in enumerate(early) if ended]
            raise RuntimeError(
                f"Worker {self.team.rank} of {self.team.size} cannot go on: "
                + (f"worker {', '.join(map(str, alone))} has ended early, and others have not. " if alone else "")
                + f"They are at steps {steps}, by worker. Has a callback ended training on one of them? No weight was "
                "changed. Let `EarlyStopping` and its like decide by what is equal on all workers, and give all of "
                "them data for as many steps."
            )

    # Exchanges

    def _is_due(self, step: int) -> bool:
        return step <= self.warmup or (step - self.warmup) % self.every == 0

    def _exchange(self, early: bool = False) -> None:
        """Averages, or raises and leaves everything as it is. Who ends early averages nothing."""
        trainable, optimizer = self.model.trainable_weights, self.model.optimizer
        others = _floating(self.model.non_trainable_weights)
        if self.average_slots:
            others += [v for v in _floating(optimizer.variables) if v.name not in _OWN]
        values = [_sent(variable) for variable in (*trainable, *others)]
        dtype = values[0].dtype if values else tf.float32
        mine = tf.constant([[*divmod(self._step, 2**20), int(early)]], dtype)  # float32 counts no further than 2²⁴
        *sums, table = self.team.total(
            [*values, mine * tf.one_hot([self.team.rank], self.team.size, dtype=dtype, axis=0)]
        )
        high, low, ended = table.numpy().astype("int64").T
        self._refuse_apart((high * 2**20 + low).tolist(), ended.tolist())
        if early:
            return
        means = [total / self.team.size for total in sums]
        if self.outer_optimizer is not None:
            moved = [tf.cast(mean, anchor.dtype) for anchor, mean in zip(self._anchors, means, strict=False)]
            self.outer_optimizer.apply(
                [a.value - mean for a, mean in zip(self._anchors, moved, strict=True)], self._anchors
            )
            means[: len(trainable)] = self._anchors
        _assign([*trainable, *others], means)
        self._count(values)

    def _exchange_rest(self) -> None:
        if self._step > self._step_of_last_exchange:
            self._exchange()

    def _means(self, values: list[Any]) -> list[Any]:
        self._count(values)
        return [total / self.team.size for total in self.team.total(values)]

    def _count(self, values: list[Any]) -> None:
        self._step_of_last_exchange = self._step
        self.exchanges += 1
        self.bytes += sum(value.dtype.size * int(tf.size(value)) for value in values)

    def _take_from_first(self, variables: list[Any]) -> None:
        """Gives all workers what worker 0 has, byte by byte, since collectives know few dtypes."""
        found = [np.asarray(variable.numpy()) for variable in variables]
        letters = [tf.constant(np.frombuffer(value.tobytes(), "uint8"), tf.int32) for value in found]
        letters = letters if self.team.rank == 0 else [tf.zeros_like(each) for each in letters]
        for variable, value, of_first in zip(variables, found, self.team.total(letters), strict=True):
            same = np.frombuffer(of_first.numpy().astype("uint8").tobytes(), value.dtype).reshape(value.shape)
            if value.tobytes() != same.tobytes():
                variable.assign(same)

    def _anchor(self) -> None:
        """Gives the outer optimizer variables of its own, and another optimizer of its kind when they are others."""
        trainable, outer = self.model.trainable_weights, self.outer_optimizer
        weights = self.model.weights  # all of them: names must not change with what is trained
        name_of = dict(zip(map(id, weights), names_of(weights), strict=True))
        names = ["_".join([name_of[id(v)].replace("/", "_"), *map(str, v.shape), v.dtype]) for v in trainable]
        if outer is None or names == [anchor.name for anchor in self._anchors]:
            return
        kept = {}
        if outer.built:
            kept = {variable.name: variable for variable in outer.variables}
            self.outer_optimizer = outer = type(outer).from_config(outer.get_config())
        pairs = zip(names, trainable, strict=True)
        self._anchors = [keras.Variable(v.numpy(), dtype=v.dtype, name=name) for name, v in pairs]
        outer.build(self._anchors)
        for variable in outer.variables:
            if variable.name in kept:
                variable.assign(kept[variable.name])

    # Backups

    def _restore(self) -> bool:
        """Goes back to the last epoch that all workers finished; says whether there is one."""
        if self.backup_dir is None:
            return False
        files = Backups(self.backup_dir, self.team.rank, self.team.size)
        others = files.of_others()
        found = self.team.gather([max(files.by_epoch(), default=0), len(others)]).astype(int)
        epoch = int(found[:, 0].min())
        if found[:, 0].max() > epoch + 1 or found[:, 1].any():
            raise ValueError(
                f"`backup_dir` must hold the backups of one run, of {self.team.size} workers: give another folder, or "
                f"empty this one. Received: backup_dir={str(self.backup_dir)!r} with backups of epochs "
                f"{found[:, 0].tolist()}, by worker, and {others} of other runs"
            )
        if not epoch:
            return False
        state = self._state()
        problem, values, counters = files.read(epoch, description(self.model, self.outer_optimizer), state)
        if not problem and epoch >= self.params["epochs"] and self._step == counters[0]:
            problem = (
                "The run in `backup_dir` has ended, and nothing would be trained: give the next `fit` another folder, "
                f"or more `epochs`. Received: backup_dir={str(self.backup_dir)!r}, epochs={self.params['epochs']}"
            )
        for words in self.team.texts(problem):
            if words:
                raise ValueError(words)
        _assign(state, values)
        self._step, self._step_of_last_exchange, self.exchanges, self.bytes = counters
        self._resumed = self.model, getattr(self.model, _INITIAL_EPOCH)
        setattr(self.model, _INITIAL_EPOCH, epoch)
        if epoch >= self.params["epochs"]:
            self._exchange_rest()
        return True

    def _forget_epoch(self) -> None:
        """Takes the epoch back that a resumed run begins with: Keras has read it, and would begin there again."""
        if self._resumed is not None:
            setattr(self._resumed[0], _INITIAL_EPOCH, self._resumed[1])
        self._resumed = None

    def _back_up(self, epoch: int) -> None:
        """Writes this worker's backup, waits until all have written theirs, and deletes older ones."""
        assert self.backup_dir is not None
        files = Backups(self.backup_dir, self.team.rank, self.team.size)
        counters = [self._step, self._step_of_last_exchange, self.exchanges, self.bytes]
        files.write(epoch, description(self.model, self.outer_optimizer), self._state(), counters)
        self._report(epoch)
        files.keep_only(epoch)

    def _state(self) -> list[Any]:
        """Every variable that training changes, seeds of dropout included."""
        outer = [] if self.outer_optimizer is None else self.outer_optimizer.variables
        return [*self.model.variables, *self.model.optimizer.variables, *self._anchors, *outer]


def _floating(variables: Sequence[Any]) -> list[Any]:
    """Those that have a mean."""
    return [variable for variable in variables if variable.dtype in ("float16", "bfloat16", "float32", "float64")]


def _sent(variable: Any) -> Any:
    """A variable as it travels: a sum in half precision could pass its largest number."""
    return widened(tf.convert_to_tensor(variable))


def _assign(variables: Sequence[Any], values: Sequence[Any]) -> None:
    for variable, value in zip(variables, values, strict=True):
        variable.assign(value)
