"""The files in which a worker of :class:`~companion.LocalSGD` keeps all of its state. Chapter 15 of the book tells why.

Each worker writes one at the end of an epoch, and deletes the one before when all have written theirs: so whenever one
is killed, there is an epoch of which all have one.
"""

import itertools
import pathlib
import re
from collections.abc import Sequence
from typing import Any

import numpy as np

_WAY_OUT = "Empty this folder, and the run begins anew, or give another `backup_dir`"


class Backups:
    """The backups of one worker.

    Args:
        folder: where they are.
        rank: the number of the worker.
        size: how many workers there are.
    """

    def __init__(self, folder: pathlib.Path, rank: int, size: int) -> None:
        self.folder, self.rank, self.size = folder, rank, size

    def by_epoch(self) -> dict[int, pathlib.Path]:
        """This worker's files."""
        names = rf"worker-{self.rank}-of-{self.size}-epoch-(\d+)\.npz"
        found = ((re.fullmatch(names, path.name), path) for path in self.folder.iterdir())
        return {int(match[1]): path for match, path in found if match}

    def of_others(self) -> list[str]:
        """Files of runs with another number of workers."""
        return [path.name for path in self.folder.glob("worker-*.npz") if f"-of-{self.size}-" not in path.name]

    def read(self, epoch: int, about: str, variables: Sequence[Any]) -> tuple[str, list[Any], list[int]]:
        """Reads a backup.

        Args:
            epoch: its epoch.
            about: what it must be of, line by line.
            variables: those that it must hold.

        Returns:
            What is wrong with it, or an empty string; the values of the variables; the counters.
        """
        path = self.folder / f"worker-{self.rank}-of-{self.size}-epoch-{epoch}.npz"
        try:
            with np.load(path) as stored:
                files = {name: stored[name] for name in stored.files}
            theirs, counters = str(files.pop("about")), files.pop("counters").tolist()
            values = [files[str(index)] for index in range(len(files))]
        except Exception as error:  # whatever a broken or foreign file may raise
            words = f"The backup cannot be read. {_WAY_OUT}. Received: {path} ({type(error).__name__}: {error})"
            return words, [], []
        lines = itertools.zip_longest(theirs.split("\n"), about.split("\n"), fillvalue="nothing")
        for old, new in lines:
            if old != new:
                words = f"The backup is of another model or optimizer, with {old} where there is now {new}. {_WAY_OUT}"
                return f"{words}. Received: {path}", [], []
        try:
            pairs = zip(values, variables, strict=True)
            values = [value.view(variable.numpy().dtype).reshape(variable.shape) for value, variable in pairs]
        except ValueError as error:
            return f"The backup is of another model or optimizer ({error}). {_WAY_OUT}. Received: {path}", [], []
        return "", values, counters

    def write(self, epoch: int, about: str, variables: Sequence[Any], counters: Sequence[int]) -> None:
        """Writes a backup. While it is not whole it has another name.

        Args:
            epoch: its epoch.
            about: what it is of, line by line.
            variables: those that it holds.
            counters: integers.
        """
        values = {str(index): variable.numpy() for index, variable in enumerate(variables)}
        path = self.folder / f"worker-{self.rank}-of-{self.size}-epoch-{epoch}.npz"
        unfinished = path.with_suffix(".unfinished")
        with unfinished.open("wb") as file:
            np.savez(file, about=np.array(about), counters=np.array(counters), **values)
        unfinished.replace(path)

    def keep_only(self, epoch: int) -> None:
        """Deletes this worker's other backups.

        Args:
            epoch: of which one stays.
        """
        for other, path in self.by_epoch().items():
            if other != epoch:
                path.unlink()
