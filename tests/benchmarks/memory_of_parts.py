"""Measures the memory that training in N parts takes, for chapter 07: a network of activations, and one of parameters.

Memory is the peak in training over what the built model takes, as Linux tells it, each figure from a process of its
own, the median of three. It depends on the machine, so the chapter draws what was recorded here and a test holds the
two together. Usage, from the repository's root: python -m tests.benchmarks.memory_of_parts
"""

import datetime
import importlib.metadata
import json
import os
import pathlib
import statistics
import subprocess
import sys
from collections.abc import Callable

import keras
import numpy as np
import tensorflow as tf

from companion.injection import inject
from tests.benchmarks.__main__ import processor

ROOT = pathlib.Path(__file__).parent.parent.parent
OUTPUT = ROOT / "book" / "data" / "memory_of_parts.json"
BATCH, PARTS, RUNS, STEPS = 256, (1, 2, 4, 8, 16), 3, 3
STATUS, CLEAR = pathlib.Path("/proc/self/status"), pathlib.Path("/proc/self/clear_refs")


def convolutional() -> keras.Model:
    """Mostly activations."""
    hidden = [keras.layers.Conv2D(32, 3, padding="same", activation="relu") for _ in range(4)]
    layers = [keras.Input((64, 64, 3)), *hidden, keras.layers.GlobalAveragePooling2D(), keras.layers.Dense(10)]
    return keras.Sequential(layers)


def dense() -> keras.Model:
    """Mostly parameters."""
    hidden = [keras.layers.Dense(2048, activation="relu") for _ in range(4)]
    return keras.Sequential([keras.Input((2048,)), *hidden, keras.layers.Dense(10)])


NETWORKS: dict[str, Callable[[], keras.Model]] = {"convolutional": convolutional, "dense": dense}


def peak() -> float:
    """The most memory that this process has held since it was told to forget its peak, in MB of 1024² bytes."""
    (line,) = (line for line in STATUS.read_text().splitlines() if line.startswith("VmHWM:"))
    return int(line.split()[1]) / 1024


def megabytes_here(network: str, parts: int) -> float:
    """What training takes over the built model in this process, which must have trained nothing before."""
    model, generator = NETWORKS[network](), np.random.default_rng(0)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.SGD(1e-6), loss, jit_compile=False)
    model.optimizer.build(model.trainable_variables)
    if parts > 1:
        inject(model, micro_batches=parts)
    images = tf.constant(generator.normal(size=(BATCH, *model.input_shape[1:])), tf.float32)
    labels = tf.constant(generator.integers(0, 10, BATCH))
    step = tf.function(model.train_step, autograph=False)
    CLEAR.write_text("5")  # forgets the peak
    built = peak()
    for _ in range(STEPS):
        step((images, labels))
    return peak() - built


def megabytes(network: str, parts: int) -> float:
    """The same in a process of its own, with TensorFlow as it is delivered."""
    command = [sys.executable, "-m", "tests.benchmarks.memory_of_parts", network, str(parts)]
    environment = {**os.environ, "TF_ENABLE_ONEDNN_OPTS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr[-2000:])
    return float(done.stdout.split()[-1])


def main() -> None:
    """Measures all, prints a line for each and writes the record."""
    results = []
    for network in NETWORKS:
        for parts in PARTS:
            found = sorted(megabytes(network, parts) for _ in range(RUNS))
            results.append({"network": network, "parts": parts, "megabytes": [round(value, 1) for value in found]})
            print(network, parts, round(statistics.median(found)), flush=True)
    report = {
        "date": datetime.datetime.now(tz=datetime.UTC).date().isoformat(),
        "processor": processor(),
        "cores": os.cpu_count(),
        "versions": {name: importlib.metadata.version(name) for name in ("tensorflow", "keras")},
        "batch": BATCH,
        "steps": STEPS,
        "parameters": {network: build().count_params() for network, build in NETWORKS.items()},
        "results": results,
    }
    OUTPUT.write_text(json.dumps(report) + "\n")


if __name__ == "__main__":
    if len(sys.argv) > 1:
        print(megabytes_here(sys.argv[1], int(sys.argv[2])))
    else:
        main()
