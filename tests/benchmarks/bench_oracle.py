"""What `inject(model, micro_batches=N)` costs and saves: time in turns in one process, peak memory each in its own.

Memory is the peak of two training steps over what the built model holds, as Linux counts it, with TensorFlow as it is
delivered: with oneDNN, without which a convolution takes as much scratch memory as the processor has cache, whatever
the batch. A model that is mostly activations needs little for N parts. One that is mostly parameters needs more than
for the batch in one piece: the gradients of the parts so far are kept while those of the next are computed.
"""

import multiprocessing
import os
import pathlib
import statistics
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from typing import Any
from unittest import mock

import keras
import numpy as np
import tensorflow as tf

from companion.injection import inject
from tests.benchmarks.pairs import compare

ROWS, WIDTH, IDS = 500_000, 64, 16
TIME_RUNS, SLOW_RUNS, MEMORY_RUNS = 51, 15, 3
TABLE = f"{ROWS} × {WIDTH} embedding"
STATUS, CLEAR = pathlib.Path("/proc/self/status"), pathlib.Path("/proc/self/clear_refs")


def convolutional(size: int, channels: int) -> keras.Model:
    """Mostly activations."""
    hidden = [keras.layers.Conv2D(channels, 3, padding="same", activation="relu") for _ in range(4)]
    layers = [keras.Input((size, size, 3)), *hidden, keras.layers.GlobalAveragePooling2D(), keras.layers.Dense(10)]
    return keras.Sequential(layers)


def dense(width: int) -> keras.Model:
    """Mostly parameters."""
    hidden = [keras.layers.Dense(width, activation="relu") for _ in range(4)]
    return keras.Sequential([keras.Input((width,)), *hidden, keras.layers.Dense(10)])


def embedding() -> keras.Model:
    """A large table, of which a batch needs a few rows. Random numbers for it would need more memory than training."""
    layers = keras.layers
    lookup = [layers.Embedding(ROWS, WIDTH, "zeros"), layers.GlobalAveragePooling1D(), layers.Dense(10)]
    return keras.Sequential([keras.Input((IDS,), dtype="int32"), *lookup])


def training(
    model: keras.Model,
    batch: int,
    steps: int = 1,
    parts: int | None = None,
    ignored: int | None = None,
    optimizer: Any = None,
    **options: Any,
) -> Callable[[], None]:
    """A function that trains on ``batch`` examples: in one step, in parts, or in several steps."""
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True, ignore_class=ignored)
    model.compile(optimizer or keras.optimizers.SGD(1e-6, **options), loss, jit_compile=False)
    model.optimizer.build(model.trainable_variables)
    if parts is not None:
        inject(model, parts)
    generator, shape = np.random.default_rng(0), (batch // steps, *model.input_shape[1:])
    is_lookup = isinstance(model.layers[0], keras.layers.Embedding)
    x = generator.integers(0, ROWS, shape) if is_lookup else generator.normal(size=shape)
    data = tf.constant(x, model.inputs[0].dtype), tf.constant(generator.integers(0, 10, batch // steps))
    any_size = tuple(tf.TensorSpec([None, *tensor.shape[1:]], tensor.dtype) for tensor in data)  # as in `fit`
    step = tf.function(model.train_step, autograph=False, input_signature=[any_size])

    def train() -> None:
        for _ in range(steps):
            step(data)

    return train


WORKLOADS: dict[str, Callable[[], Callable[[], None]]] = {
    "CNN": lambda: training(convolutional(128, 8), 256),
    "CNN, N=8": lambda: training(convolutional(128, 8), 256, parts=8),
    "CNN, N=16": lambda: training(convolutional(128, 8), 256, parts=16),
    "dense": lambda: training(dense(2048), 256),
    "dense, N=8": lambda: training(dense(2048), 256, parts=8),
    "embedding, N=8": lambda: training(embedding(), 1024, parts=8),
    "embedding, 8 steps": lambda: training(embedding(), 1024, steps=8),
    "embedding, built-in": lambda: training(embedding(), 1024, steps=8, gradient_accumulation_steps=8),
}
TIME = {  # of the same training as the memory, and with oneDNN, so that one can be weighed against the other
    "N=8, CNN, time: over the batch of 256 in one piece": ("CNN, N=8", "CNN"),
    "N=8, dense network, time: over the batch of 256 in one piece": ("dense, N=8", "dense"),
}
MEMORY = {
    "N=8, CNN, memory: over the batch of 256 in one piece": ("CNN, N=8", "CNN"),
    "N=16, CNN, memory: over the batch of 256 in one piece": ("CNN, N=16", "CNN"),
    "N=8, dense network, memory: over the batch of 256 in one piece": ("dense, N=8", "dense"),
    f"N=8, {TABLE}, memory: over 8 steps without accumulation": ("embedding, N=8", "embedding, 8 steps"),
    f"N=8, {TABLE}, memory: over the built-in, which makes it dense": ("embedding, N=8", "embedding, built-in"),
}


def peak() -> int:
    """The most memory that this process has held since it was told to forget its peak, in kB."""
    (line,) = (line for line in STATUS.read_text().splitlines() if line.startswith("VmHWM:"))
    return int(line.split()[1])


def memory(workload: str) -> int:
    """What two training steps take over the built model, in kB."""
    train = WORKLOADS[workload]()
    CLEAR.write_text("5")  # forgets the peak
    built = peak()
    for _ in range(2):
        train()
    return peak() - built


def time(what: str) -> dict[str, Any]:
    """The ratio of two workloads' times."""
    parts, whole = (WORKLOADS[workload]() for workload in TIME[what])
    return compare("inject", f"inject, {what}", parts, whole, SLOW_RUNS)


def results_of_own_processes() -> Iterator[dict[str, Any]]:
    """Each figure is from a process of its own, forked from one that has imported TensorFlow and done nothing."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    figures: dict[str, list[int]] = {workload: [] for workload in WORKLOADS}
    with (
        mock.patch.dict(os.environ, TF_ENABLE_ONEDNN_OPTS="1", TF_CPP_MIN_LOG_LEVEL="3"),
        ProcessPoolExecutor(1, context, max_tasks_per_child=1) as pool,
    ):
        for what in TIME:
            yield pool.submit(time, what).result()
        for _ in range(MEMORY_RUNS):
            for workload in WORKLOADS:
                figures[workload].append(pool.submit(memory, workload).result())
    for what, (ours, other) in MEMORY.items():
        ratios = [mine / theirs for mine, theirs in zip(figures[ours], figures[other], strict=True)]
        lower, median, upper = (round(quartile, 3) for quartile in statistics.quantiles(ratios, method="inclusive"))
        row = {"name": "inject", "what": f"inject, {what}", "ratio_median": median}
        yield row | {"ratio_q1": lower, "ratio_q3": upper, "runs": MEMORY_RUNS}


def results() -> Iterator[dict[str, Any]]:
    networks = {"CNN": lambda: convolutional(16, 32), "dense network": lambda: dense(256)}
    for network, build in networks.items():
        ours = training(build(), 128, parts=8)
        builtin = training(build(), 128, steps=8, gradient_accumulation_steps=8)
        what = f"inject, N=8, {network}, time of a batch of 128: over the built-in"
        yield compare("inject", what, ours, builtin, TIME_RUNS)
    for network, build in networks.items():  # with targets that are ignored, so that the data must be counted first
        ours, plain = training(build(), 128, parts=1, ignored=0), training(build(), 128, ignored=0)
        what = f"inject, N=1, {network}, time of a batch of 128: over a step without it"
        yield compare("inject", what, ours, plain, TIME_RUNS)
    ours = training(embedding(), 1024, parts=8)
    plain = training(embedding(), 1024, steps=8)
    builtin = training(embedding(), 1024, steps=8, gradient_accumulation_steps=8)
    what = f"inject, N=8, {TABLE}, time"
    yield compare("inject", f"{what}: over 8 steps without accumulation", ours, plain, SLOW_RUNS)
    yield compare("inject", f"{what}: over the built-in, which makes it dense", ours, builtin, SLOW_RUNS)
    if CLEAR.exists():  # on Linux
        yield from results_of_own_processes()
