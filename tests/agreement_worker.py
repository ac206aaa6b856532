"""A worker of `tests/test_agreement.py`: one scenario after the other, and what each came to, as JSON."""

import json
import pathlib
import sys
from typing import Any

import companion

FOLDER = pathlib.Path(sys.argv[1])
TEAM = companion.connect(timeout=40)

# The team comes first.
import keras  # noqa: E402
import numpy as np  # noqa: E402

K, L, P = keras, keras.layers, keras.optimizers
FIRST = TEAM.rank == 0
X = np.random.default_rng(TEAM.rank).normal(size=(24, 3)).astype("float32")
Y = X.sum(1, keepdims=True)


class StopAfter(keras.callbacks.Callback):
    """Ends training after a step of an epoch, or at the end of the epoch."""

    def __init__(self, epoch: int, batch: int | None = None) -> None:
        super().__init__()
        self.end, self.batch = epoch, batch

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        self.epoch = epoch

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        self.model.stop_training |= (self.epoch, batch) == (self.end, self.batch)

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        self.model.stop_training |= (epoch, None) == (self.end, self.batch)


class Counting(keras.layers.Layer):
    """Has weights that have no mean."""

    def build(self, shape: Any) -> None:
        self.count = self.add_weight(shape=(2,), dtype="int64", trainable=False, name="count", initializer="zeros")
        self.flag = self.add_weight(shape=(), dtype="bool", trainable=False, name="flag", initializer="zeros")

    def call(self, x: Any) -> Any:
        return x


def network(*layers: Any, dtype: str = "float32") -> keras.Model:
    keras.utils.set_random_seed(TEAM.rank)
    keras.config.set_dtype_policy(dtype)
    try:
        return keras.Sequential([keras.Input((3,), dtype=dtype), *([f() for f in layers] or [L.Dense(1)])])
    finally:
        keras.config.set_dtype_policy("float32")


def fit(model: Any, local: Any, optimizer: Any = None, stop: Any = None, **options: Any) -> Any:
    """Two epochs of six steps."""
    if optimizer is not False:
        model.compile(optimizer or P.SGD(0.1), "mse", run_eagerly=True)
    callbacks = [StopAfter(*stop), local] if stop else [local]
    arguments = {"x": X, "y": Y, "batch_size": 4, "epochs": 2, "shuffle": False, "verbose": 0, **options}
    model.fit(callbacks=callbacks, **arguments)
    return model


def one(first: Any, other: Any) -> Any:
    return first if FIRST else other


def dense() -> Any:
    return L.Dense(3)


def window() -> Any:
    return fit(network(), companion.LocalSGD(3), companion.GradientAccumulation(P.SGD(0.1), 5))


def average(outer: Any = None) -> Any:
    optimizer = P.SGD(0.1, use_ema=True, ema_momentum=0.5)
    return fit(network(), companion.LocalSGD(5, outer_optimizer=outer), optimizer)


def no_mean() -> Any:
    model = network(Counting, dense)
    model.layers[0].count.assign([7, -(2**60) - 1] if FIRST else [1, 2])
    model.layers[0].flag.assign(FIRST)
    fit(model, companion.LocalSGD(4))
    assert model.layers[0].count.numpy().tolist() == [7, -(2**60) - 1]
    assert bool(model.layers[0].flag.numpy())
    return model


def frozen() -> Any:
    model = network(dense, lambda: L.Dense(1))
    model.layers[0].trainable = FIRST
    return fit(model, companion.LocalSGD(3))


def named(names: str) -> Any:
    return fit(network(*(lambda name=name: L.Dense(3, name=name) for name in names.split())), companion.LocalSGD(3))


def other_numbers() -> Any:
    for _ in range(0 if FIRST else 9):  # Keras names the next layers dense_9, dense_10
        network()
    return fit(network(dense, dense, lambda: L.Dense(1)), companion.LocalSGD(3))


def unfrozen(outer: Any = None) -> Any:
    """An outer rate of 1 is the plain average, also after a layer joined those that are trained."""
    local = companion.LocalSGD(3, outer_optimizer=outer)
    model = network(dense, dense, lambda: L.Dense(1))
    model.layers[0].trainable = False
    fit(model, local)
    model.layers[0].trainable = True
    fit(model, local)
    if outer is not None:
        assert int(local.outer_optimizer.iterations) == 8
    return model


def large() -> Any:
    """Half precision: the sum of two weights would pass its largest number."""
    model = network(dtype="float16")
    model.set_weights([np.full((3, 1), 40_000 if FIRST else 1, "float16"), np.zeros(1, "float16")])
    fit(model, companion.LocalSGD(5), P.SGD(0.0), x=0 * X)
    assert model.get_weights()[0].ravel().tolist() == [40_000] * 3
    return model


def broken_backup() -> Any:
    folder = FOLDER / "broken"
    fit(network(), companion.LocalSGD(3, backup_dir=folder))
    if not FIRST:
        (folder / "worker-1-of-2-epoch-2.npz").write_bytes(b"PK nothing")
    return fit(network(), companion.LocalSGD(3, backup_dir=folder), epochs=3)


def backed_up() -> Any:
    return companion.LocalSGD(100, backup_dir=FOLDER / "stops")


SCENARIOS: dict[str, Any] = {
    "window": window,
    "average": average,
    "average, outer": lambda: average(P.SGD(1.0)),
    "no mean": no_mean,
    "other numbers": other_numbers,
    "unfrozen": unfrozen,
    "unfrozen, outer": lambda: unfrozen(P.SGD(1.0)),
    "large": large,
    "stopped together": lambda: fit(network(), companion.LocalSGD(4), stop=(0, 2)),
    "stopped together at an end": lambda: fit(network(), companion.LocalSGD(4), stop=(0,)),
    # refused before the first step
    "frozen": frozen,
    "shapes": lambda: fit(
        network(dense, one(lambda: L.Dense(2), lambda: L.Dense(2, use_bias=False))), companion.LocalSGD(3)
    ),
    "order": lambda: named(one("a b", "b a")),
    "dtypes": lambda: fit(network(dtype=one("float64", "float32")), companion.LocalSGD(3)),
    "optimizers": lambda: fit(network(), companion.LocalSGD(3), one(P.SGD(), P.Adam())),
    "slots": lambda: fit(network(), companion.LocalSGD(3), P.SGD(momentum=one(0.0, 0.9))),
    "outer optimizers": lambda: fit(network(), companion.LocalSGD(3, outer_optimizer=P.SGD(one(0.7, 0.5)))),
    "unbuilt": lambda: fit(one(network(), K.Sequential([L.Dense(1)])), companion.LocalSGD(3), batch_size=one(4, 24)),
    "initial epochs": lambda: fit(network(), companion.LocalSGD(3), initial_epoch=one(0, 1)),
    "no epoch": lambda: fit(network(), companion.LocalSGD(3), initial_epoch=one(2, 0)),
    "steps per epoch": lambda: fit(network(), companion.LocalSGD(3), steps_per_epoch=one(5, 6)),
    "broken backup": broken_backup,
    # who stops alone
    "in an epoch": lambda: fit(network(), companion.LocalSGD(3), stop=one((0, 1), None)),
    "on an exchange": lambda: fit(network(), companion.LocalSGD(3), stop=one((0, 2), None)),
    "before the last": lambda: fit(network(), companion.LocalSGD(100), stop=one((0, 1), None)),
    "at an end": lambda: fit(network(), companion.LocalSGD(6), stop=one((0,), None)),
    "with backups": lambda: fit(network(), backed_up(), stop=one((0, 1), None)),
    "at an end, with backups": lambda: fit(network(), backed_up(), stop=one((0,), None)),
    "other at the last": lambda: fit(network(), companion.LocalSGD(12), stop=one(None, (1, 4))),
}


def result(run: Any) -> dict[str, Any]:
    try:
        weights = run().get_weights()
    except (ValueError, RuntimeError, AssertionError) as error:
        return {"error": f"{type(error).__name__}: {error}"}
    return {"weights": [np.asarray(w, "float64").ravel().tolist() for w in weights], "error": ""}


if __name__ == "__main__":
    found = {}
    for name, run in SCENARIOS.items():
        found[name] = result(run)
        (FOLDER / f"{TEAM.rank}.json").write_text(json.dumps(found))
        print(name, found[name]["error"][:300], flush=True)
