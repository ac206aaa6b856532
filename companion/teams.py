"""The workers that train together, and what they tell each other. Chapter 15 of the book teaches it.

``tf.distribute.MultiWorkerMirroredStrategy`` carries it: its collectives notice a worker that died or does not answer.
Its server listens on every interface of the machine, and asks nobody who he is: connect workers only in a network that
you trust, and let no port of theirs be reached from outside.
"""

import functools
import zlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from companion.arguments import number
from companion.backend import environment
from companion.joining import bounded, place, wait_for_all


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
                f"died, or has not answered for {self.timeout:g} s, or has left `fit` by an error that it caught and "
                f"exchanges something else. No weight was changed by it. Start all workers "
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

    def texts(self, text: str) -> list[str]:
        """Returns a text from each worker.

        Args:
            text: the one of this worker.
        """
        letters = list(text.encode())
        counts = self.gather([len(letters)])[:, 0].astype(int)
        if not counts.any():
            return [""] * self.size
        table = self.gather(letters + [0] * (counts.max() - len(letters))).astype("uint8")
        return [row[:count].tobytes().decode() for row, count in zip(table, counts, strict=True)]

    def differing(self, facts: dict[str, str]) -> dict[str, list[str]]:
        """Returns which facts are not the same on all workers, and what each has.

        Args:
            facts: those of this worker, under the same names as those of the others.
        """
        sums = self.gather([zlib.crc32(fact.encode()) for fact in facts.values()]).T
        pairs = zip(facts.items(), sums, strict=True)
        return {name: self.texts(fact) for (name, fact), of_workers in pairs if len(set(of_workers)) > 1}

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


def _my_rank() -> Any:
    return tf.distribute.get_replica_context().replica_id_in_sync_group


_teams: list[Team] = []  # a process connects once


def connect(timeout: float = 60.0) -> Team:
    """Connects this process with the others that train with it. Call it before anything else of TensorFlow's runs.

    Each worker finds its place in the environment variable ``TF_CONFIG``, which ``python -m companion.launch`` sets, or
    a cluster's scheduler. Without it the worker is alone.

    Args:
        timeout: seconds for which workers wait for each other, at the beginning and later: then one that has not
            answered counts as hung. It must be longer than the slowest worker may be behind the others. Defaults to
            60. A second call returns the same team.

    Returns:
        A :class:`~companion.teams.Team`, whose ``rank`` is the number of this worker, and ``size`` how many there
        are.

    Raises:
        RuntimeError: TensorFlow has run before; the others have not come; this worker's port is taken.
        ValueError: ``timeout`` is not a number above 0; ``TF_CONFIG`` is wrong; a worker has more than one device.

    Example:
        >>> team = connect()
        >>> team.rank, team.size
        (0, 1)

    Taught in chapter 15, :doc:`/notebooks/15_local_sgd`.
    """
    environment()
    timeout = number("timeout", timeout, 0, include_low=False)
    if not _teams:
        strategy, (addresses, rank) = None, place()
        if len(addresses) > 1:
            if _has_run():
                raise RuntimeError(
                    "Workers can be connected before anything else of TensorFlow's runs, and not later: call "
                    "`companion.connect()` at the top of the script, before models, optimizers, tensors and seeds."
                )
            wait_for_all(addresses, rank, timeout)
            options = tf.distribute.experimental.CommunicationOptions(timeout_seconds=timeout)
            with bounded(timeout):
                strategy = tf.distribute.MultiWorkerMirroredStrategy(communication_options=options)
            if strategy.num_replicas_in_sync != len(addresses):
                raise ValueError(
                    "Each worker must have one device: start a worker for each GPU, with that one alone in "
                    f"CUDA_VISIBLE_DEVICES. Received: {strategy.num_replicas_in_sync} devices for {len(addresses)} "
                    "workers"
                )
        _teams.append(Team(strategy, timeout))
    return _teams[0]


def _has_run() -> bool:
    """Whether TensorFlow has started: then it refuses another number of threads."""
    threads = tf.config.threading
    count = threads.get_inter_op_parallelism_threads()
    try:
        threads.set_inter_op_parallelism_threads(count + 1)
    except RuntimeError:
        return True
    threads.set_inter_op_parallelism_threads(count)
    return False
