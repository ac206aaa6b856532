"""A worker of `tests/test_local_sgd.py`: trains in as many ways as its command line lists, and writes what came out.

Usage: python -m companion.launch --workers N tests/local_sgd_worker.py OUTPUT SCENARIOS, the latter as JSON.
"""

import json
import os
import pathlib
import signal
import sys
import threading
import time
from typing import Any

import companion

OUTPUT, SCENARIOS = pathlib.Path(sys.argv[1]), json.loads(sys.argv[2])
TEAM = companion.connect(timeout=SCENARIOS[0].get("timeout", 30))

# The team comes first.
import keras  # noqa: E402
import numpy as np  # noqa: E402

L = keras.layers
EXAMPLES, FEATURES, TARGETS = 120, 4, 2


def data() -> tuple[np.ndarray, np.ndarray]:
    """A noisy linear problem, the same on every worker."""
    generator = np.random.default_rng(0)
    x = generator.normal(size=(EXAMPLES, FEATURES))
    return x, x @ generator.normal(size=(FEATURES, TARGETS)) + generator.normal(size=(EXAMPLES, TARGETS))


def part(rank: int, size: int, batch: int) -> np.ndarray:
    """The places of a worker's examples: its batches and the others' make up batches of the whole in turn."""
    return np.arange(EXAMPLES).reshape(-1, size, batch)[:, rank].ravel()


def build(kind: str, rank: int) -> keras.Model:
    """A model; each worker begins with weights of its own."""
    keras.utils.set_random_seed(rank)
    layers: dict[str, list[Any]] = {
        "linear": [L.Dense(TARGETS, kernel_initializer="normal", bias_initializer="normal")],
        "deep": [L.Dense(6, "tanh"), L.BatchNormalization(), L.Dropout(0.3), L.Dense(TARGETS)],
    }
    return keras.Sequential([keras.Input((FEATURES,)), *layers[kind]])


class Saboteur(keras.callbacks.Callback):
    """Kills, stops or hangs this worker at a moment of a scenario."""

    def __init__(self, what: str, count: int, local: companion.LocalSGD) -> None:
        super().__init__()
        self.what, self.left, self.local = what, count, local
        if what == "in exchange":
            self.total, TEAM.total = TEAM.total, self.die_in_total  # type: ignore[method-assign]
        elif what == "in backup":
            self.gather, local._state = local._state, self.die_in_state  # type: ignore[method-assign]

    def due(self) -> bool:
        self.left -= 1
        return self.left == 0

    def on_train_batch_begin(self, batch: int, logs: Any = None) -> None:
        if self.what in ("kill", "stop", "hang") and self.due():
            {"kill": die, "stop": lambda: os.kill(os.getpid(), signal.SIGSTOP), "hang": lambda: time.sleep(600)}[
                self.what
            ]()

    def die_in_total(self, tensors: Any) -> Any:
        if self.due():
            threading.Timer(0.002, die).start()
        return self.total(tensors)

    def die_in_state(self) -> Any:
        if self.due():
            (self.local.backup_dir / "worker-0-of-0.unfinished").write_text("half")  # type: ignore[operator]
            die()
        return self.gather()


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


class StopAt(keras.callbacks.Callback):
    def __init__(self, step: int) -> None:
        super().__init__()
        self.step = step

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        self.model.stop_training = self.model.stop_training or batch + 1 == self.step


class Seen(keras.callbacks.Callback):
    """The weights after each step, and how many exchanges there had been."""

    def __init__(self, local: companion.LocalSGD) -> None:
        super().__init__()
        self.local, self.weights, self.exchanges = local, [], []

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        self.weights.append(flat([variable.numpy() for variable in self.model.trainable_variables]))
        self.exchanges.append(self.local.exchanges)


def flat(arrays: list[np.ndarray]) -> np.ndarray:
    return np.concatenate([np.zeros(0), *(array.ravel() for array in arrays)])


def mine(value: Any) -> Any:
    """The entry of this worker, where a scenario gives one to each."""
    return value[TEAM.rank] if isinstance(value, list) else value


def run(scenario: dict[str, Any]) -> dict[str, Any]:
    """Trains, and returns arrays."""
    dtype = scenario.get("dtype", "float64")
    keras.config.set_floatx(dtype)
    keras.config.set_dtype_policy(dtype)
    options = {name: mine(value) for name, value in scenario.get("local", {}).items()}
    if "backup_dir" in options:
        options["backup_dir"] = OUTPUT / options["backup_dir"]
    if "outer_optimizer" in options:
        options["outer_optimizer"] = keras.optimizers.SGD(**options["outer_optimizer"])
    local = companion.LocalSGD(**options)
    model = build(scenario.get("model", "linear"), 0 if scenario.get("alike") else TEAM.rank)
    if scenario.get("unbuilt"):
        model = keras.Sequential([L.Dense(TARGETS)])
    optimizer = getattr(keras.optimizers, scenario.get("optimizer", "SGD"))(**scenario.get("arguments", {}))
    compiled = {"jit_compile": False, **scenario.get("compile", {})}
    model.compile(optimizer, "mse", **compiled)
    x, y = data()
    batch = scenario.get("batch", 5)
    places = part(TEAM.rank, TEAM.size, batch)[: mine(scenario.get("examples"))]
    x, y = x[places].astype(dtype), y[places].astype(dtype)
    seen = Seen(local)
    callbacks: list[Any] = [local, seen]
    if scenario.get("saboteur") and scenario["saboteur"][0] == TEAM.rank:
        callbacks.insert(0, Saboteur(*scenario["saboteur"][1:], local))
    if mine(scenario.get("stop at")):
        callbacks.insert(0, StopAt(mine(scenario["stop at"])))
    before = [w.copy() for w in model.get_weights()]
    fit: dict[str, Any] = {"epochs": mine(scenario.get("epochs", 2)), "shuffle": False, "verbose": 0}
    if scenario.get("generator"):
        fit |= {"x": ((x[i : i + batch], y[i : i + batch]) for i in range(0, len(x), batch))}
    else:
        fit |= {"x": x, "y": y, "batch_size": batch}
    if scenario.get("validates"):
        fit["validation_data"] = data()
        callbacks.insert(0, keras.callbacks.EarlyStopping("val_loss", mode="max"))  # it falls: ends the second epoch
    error = None
    try:
        for _ in range(2 if scenario.get("again") else 1):
            model.fit(callbacks=callbacks, **fit)
    except (RuntimeError, ValueError) as raised:
        error = raised
        if scenario.get("fatal"):
            raise
    after = model.get_weights()
    return {
        "error": f"{type(error).__name__}: {error}" if error else "",
        "weights": flat(after),
        "before": flat(before),
        "seen": np.array(seen.weights),
        "exchanges after": np.array(seen.exchanges),
        "exchanges": local.exchanges,
        "bytes": local.bytes,
        "slots": flat([variable.numpy() for variable in optimizer.variables[2:]]),
        "iterations": int(optimizer.iterations),
        "validation": np.array(model.history.history["val_loss"] if scenario.get("validates") else []),
        "counters": [local._step, local._step_of_last_exchange],
    }


if __name__ == "__main__":
    for scenario in SCENARIOS:
        np.savez(OUTPUT / f"{scenario['name']}-{TEAM.rank}.npz", **run(scenario))
