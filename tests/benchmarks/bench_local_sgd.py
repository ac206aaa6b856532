"""What talking less saves: ``fit`` with ``LocalSGD(5)`` and ``LocalSGD(20)`` over ``fit`` with ``LocalSGD(1)``.

Two workers train a network of 2,410 weights through loopback. Both sides of a ratio take turns within one launch, in
an order that is random and the same on both workers.
"""

import json
import os
import pathlib
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import Any

WORKERS, STEPS, RUNS, WARM_UP = 2, 100, 31, 2


def work(output: str) -> None:
    """What each worker does. Worker 0 writes the results."""
    os.environ["CUDA_VISIBLE_DEVICES"] = "-1"
    import companion

    team = companion.connect()
    import keras
    import numpy as np
    import tensorflow as tf

    from companion import datasets

    data = datasets.digits()
    batches = tf.data.Dataset.from_tensor_slices((data.x_train, data.y_train)).batch(36).repeat().take(STEPS).cache()

    def training(every: int | None) -> Callable[[], Any]:
        layers = [keras.Input((64,)), keras.layers.Dense(32, activation="tanh"), keras.layers.Dense(10)]
        model = keras.Sequential(layers)
        model.compile(keras.optimizers.SGD(1e-3), keras.losses.SparseCategoricalCrossentropy(from_logits=True))
        callbacks = [companion.LocalSGD(every)] if every else []
        return lambda: model.fit(batches, shuffle=False, verbose=0, callbacks=callbacks)

    def exchange(size: int) -> Callable[[], Any]:
        tensor = tf.ones(size)
        return lambda: [team.total([tensor]) for _ in range(10)]

    order = np.random.default_rng(0)  # the same on each worker

    def seconds(function: Callable[[], Any]) -> float:
        team.total([tf.ones(1)])  # both begin together
        started = time.perf_counter()
        function()
        return time.perf_counter() - started

    def compare(what: str, ours: Callable[[], Any], other: Callable[[], Any]) -> dict[str, Any]:
        ratios = []
        for run in range(-WARM_UP, RUNS):
            taken = {function: seconds(function) for function in order.permutation([ours, other])}
            if run >= 0:
                ratios.append(taken[ours] / taken[other])
        lower, median, upper = (round(quartile, 3) for quartile in statistics.quantiles(ratios, n=4))
        quartiles = {"ratio_median": median, "ratio_q1": lower, "ratio_q3": upper}
        return {"name": "LocalSGD", "what": what} | quartiles | {"runs": RUNS}

    often = training(1)
    results = [compare(f"LocalSGD, every {every} steps: over every step", training(every), often) for every in (5, 20)]
    results += [
        compare("LocalSGD, every 20 steps: over training without exchanges", training(20), training(None)),
        compare("an exchange of a million weights: over one of a thousand", exchange(1_000_000), exchange(1_000)),
    ]
    if team.rank == 0:
        pathlib.Path(output).write_text(json.dumps(results))


def results() -> Iterator[dict[str, Any]]:
    from companion.launch import launch

    with tempfile.TemporaryDirectory() as folder:
        output = pathlib.Path(folder, "results.json")
        if launch(WORKERS, __file__, [str(output)], out=sys.stderr):
            raise RuntimeError("the launch has failed")
        yield from json.loads(output.read_text())


if __name__ == "__main__":
    work(sys.argv[1])
