"""Races L-BFGS against Adam on a differential equation, from five starts, for chapter 17. About two minutes.

A thousand steps magnify the last digit of a processor's arithmetic, so the chapter shows what is recorded here, and a
test holds the two together. Usage, from the repository's root: python -m tests.benchmarks.race_on_equation
"""

import datetime
import importlib.metadata
import json
import os
import pathlib
from typing import Any

import keras
import numpy as np
import tensorflow as tf

import companion
from tests.benchmarks.__main__ import processor

OUTPUT = pathlib.Path(__file__).parent.parent.parent / "book" / "data" / "equation.json"
GRADIENTS, RATES, SEEDS = 1000, (0.003, 0.01, 0.03), (0, 1, 2, 3, 4)
POINTS, GRID = np.linspace(0, 1, 66)[1:-1, None], np.linspace(0, 1, 201)[:, None]


class Residual(keras.Model):
    """What is left of u'' = -π² sin πx, as in the chapter."""

    def __init__(self) -> None:
        super().__init__()
        hidden = [keras.layers.Dense(20, "tanh") for _ in range(2)]
        self.net = keras.Sequential([keras.Input((1,)), *hidden, keras.layers.Dense(1)])

    def u(self, x: Any) -> Any:
        return x * (1 - x) * self.net(x)

    def call(self, x: Any) -> Any:
        with tf.GradientTape() as outer:
            outer.watch(x)
            with tf.GradientTape() as inner:
                inner.watch(x)
                u = self.u(x)
            slope = inner.gradient(u, x)
        return outer.gradient(slope, x) + np.pi**2 * tf.sin(np.pi * x)


def solver(seed: int, optimizer: Any = "sgd") -> Residual:
    keras.utils.set_random_seed(seed)
    model = Residual()
    model.compile(optimizer, "mse")
    return model


def result(model: Residual) -> dict[str, float]:
    """The loss, and the largest error of u."""
    loss = float(tf.reduce_mean(model(tf.constant(POINTS)) ** 2))
    error = np.abs(model.u(tf.constant(GRID)).numpy() - np.sin(np.pi * GRID)).max()
    return {"loss": float(f"{loss:.3g}"), "error": float(f"{error:.3g}")}


def by_adam(seed: int, rate: float) -> dict[str, float]:
    model = solver(seed, keras.optimizers.Adam(rate))
    for _ in range(GRADIENTS):
        model.train_on_batch(POINTS, np.zeros_like(POINTS))
    return {"rate": rate, **result(model)}


def by_lbfgs(seed: int, pairs: int) -> dict[str, float]:
    model, options = solver(seed), {"maxcor": pairs}
    zeros = np.zeros_like(POINTS)
    companion.minimize(model, POINTS, zeros, max_gradients=GRADIENTS, tolerance=0, verbose=0, options=options)
    return result(model)


def main() -> None:
    """Runs all, prints a line for each start and writes the record."""
    keras.config.set_floatx("float64")
    results = []
    for seed in SEEDS:
        adams = [by_adam(seed, rate) for rate in RATES]
        results.append({"seed": seed, "adam": adams, "lbfgs": by_lbfgs(seed, 10), "lbfgs_20": by_lbfgs(seed, 20)})
        print(results[-1], flush=True)
    report = {
        "date": datetime.datetime.now(tz=datetime.UTC).date().isoformat(),
        "processor": processor(),
        "cores": os.cpu_count(),
        "versions": {name: importlib.metadata.version(name) for name in ("tensorflow", "keras", "scipy")},
        "gradients": GRADIENTS,
        "results": results,
    }
    OUTPUT.write_text(json.dumps(report) + "\n")


if __name__ == "__main__":
    main()
