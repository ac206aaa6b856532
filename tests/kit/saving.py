"""Every way to save a model and its optimizer. Each takes a model, a function that makes a fresh one, and a folder."""

import pathlib
from collections.abc import Callable
from typing import Any

import keras
import numpy as np
import tensorflow as tf


def everything(model: Any) -> list[Any]:
    """The variables of a model and of its optimizer."""
    return [*model.variables, *model.optimizer.variables]


def by_file(model: Any, fresh: Callable[[], Any], folder: pathlib.Path) -> Any:
    model.save(folder / "model.keras")
    return keras.saving.load_model(folder / "model.keras")


def by_weights(model: Any, fresh: Callable[[], Any], folder: pathlib.Path) -> Any:
    model.save_weights(folder / "model.weights.h5")
    other = fresh()
    other.load_weights(folder / "model.weights.h5")
    return other


def by_checkpoint(model: Any, fresh: Callable[[], Any], folder: pathlib.Path) -> Any:
    path = tf.train.Checkpoint(model=model, optimizer=model.optimizer).save(str(folder / "checkpoint"))
    other = fresh()
    tf.train.Checkpoint(model=other, optimizer=other.optimizer).restore(path).assert_consumed()
    return other


def by_list(model: Any, fresh: Callable[[], Any], folder: pathlib.Path) -> Any:
    """As a backup of LocalSGD: the variables, one by one."""
    other = fresh()
    pairs = zip(everything(other), [np.asarray(variable) for variable in everything(model)], strict=True)
    for variable, value in pairs:
        variable.assign(value)
    return other


def by_backup(model: Any, fresh: Callable[[], Any], folder: pathlib.Path) -> Any:
    keep = keras.callbacks.BackupAndRestore(str(folder), delete_checkpoint=False)
    keep.set_model(model)
    keep.on_epoch_end(0)
    other = fresh()
    restore = keras.callbacks.BackupAndRestore(str(folder))
    restore.set_model(other)
    restore.on_train_begin()
    return other


WAYS = {"file": by_file, "weights": by_weights, "checkpoint": by_checkpoint, "list": by_list, "backup": by_backup}
