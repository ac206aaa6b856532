"""Measures how long an exchange through loopback takes, by its size and the number of workers, for chapter 15.

Sizes take turns in random order, and launches of two and of three workers alternate. The times depend on the machine,
so the chapter draws what was recorded here and a test holds the two together. Usage, from the repository's root:
python -m tests.benchmarks.exchange_times
"""

import datetime
import importlib.metadata
import json
import os
import pathlib
import statistics
import sys
import tempfile
import time

OUTPUT = pathlib.Path(__file__).parent.parent.parent / "book" / "data" / "exchange_times.json"
SIZES = (1_000, 10_000, 100_000, 1_000_000, 4_000_000)
WORKERS, LAUNCHES, TURNS, WARM_UP = (2, 3), 3, 20, 3


def work(output: str) -> None:
    """What each worker does: exchanges of all sizes, many times. Worker 0 writes its seconds, by size."""
    os.environ["CUDA_VISIBLE_DEVICES"] = "-1"
    import companion

    team = companion.connect()
    import numpy as np
    import tensorflow as tf

    tensors = {size: tf.ones(size) for size in SIZES}
    order = np.random.default_rng(0)  # the same on each worker
    found: dict[int, list[float]] = {size: [] for size in SIZES}
    for turn in range(-WARM_UP, TURNS):
        for size in order.permutation(SIZES).tolist():
            team.total([tf.ones(1)])  # all begin together
            started = time.perf_counter()
            team.total([tensors[size]])
            if turn >= 0:
                found[size].append(time.perf_counter() - started)
    if team.rank == 0:
        pathlib.Path(output).write_text(json.dumps(list(found.values())))


def main() -> None:
    """Launches the workers, prints the medians and writes the record."""
    from companion.launch import launch
    from tests.benchmarks.__main__ import processor

    seconds: dict[int, list[list[float]]] = {workers: [[] for _ in SIZES] for workers in WORKERS}
    with tempfile.TemporaryDirectory() as folder:
        for number in range(LAUNCHES):
            for workers in WORKERS:
                output = pathlib.Path(folder, f"{workers}-{number}.json")
                if launch(workers, __file__, [str(output)], out=sys.stderr):
                    raise RuntimeError(f"a launch of {workers} workers has failed")
                for all_of_size, new in zip(seconds[workers], json.loads(output.read_text()), strict=True):
                    all_of_size += new
    milliseconds = {
        str(workers): [round(1e3 * statistics.median(times), 2) for times in by_size]
        for workers, by_size in seconds.items()
    }
    for workers, medians in milliseconds.items():
        print(workers, "workers:", dict(zip(SIZES, medians, strict=True)))
    report = {
        "date": datetime.datetime.now(tz=datetime.UTC).date().isoformat(),
        "processor": processor(),
        "cores": os.cpu_count(),
        "versions": {name: importlib.metadata.version(name) for name in ("tensorflow", "keras")},
        "exchanges": LAUNCHES * TURNS,
        "sizes": SIZES,
        "milliseconds": milliseconds,
    }
    OUTPUT.write_text(json.dumps(report) + "\n")


if __name__ == "__main__":
    work(sys.argv[1]) if "TF_CONFIG" in os.environ else main()
