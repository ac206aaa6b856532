"""Counts how many different trajectories identical runs of the soft batch of 2018 give, for chapter 05.

The counts depend on the machine and on what else it does, so the chapter draws the ones recorded here and a test holds
the two together. Usage, from the repository's root: python -m tests.benchmarks.race_soft_batch
"""

import collections
import datetime
import hashlib
import importlib.metadata
import json
import os
import pathlib
from typing import Any

import numpy as np

from companion import legacy

OUTPUT = pathlib.Path(__file__).parent.parent.parent / "book" / "data" / "soft_batch_race.json"
RUNS = 400
STEPS = 3
GRADIENTS = [10**k for k in range(9)]
SIZE = 200_000


def count(variant: str, variables: str, size: int) -> dict[str, Any]:
    """Repeats one experiment: how often each trajectory occurred, and how often one array held two of them."""
    shape = () if size == 1 else (size,)
    gradients = [np.full(shape, gradient, "float64") for gradient in GRADIENTS]
    seen: collections.Counter[bytes] = collections.Counter()
    first: dict[bytes, list[list[int]]] = {}
    torn = 0
    for _ in range(RUNS):
        trace = legacy.trace_soft_batch(gradients, STEPS, float(STEPS), variant, variables)
        digest = hashlib.sha256(b"".join(step.parameter.tobytes() + step.accumulator.tobytes() for step in trace))
        torn += any(np.ptp(array) > 0 for step in trace for array in (step.parameter, step.accumulator))
        seen[digest.digest()] += 1
        # Minus the weight: its digits say how often each gradient was used.
        first[digest.digest()] = [] if shape else [[round(-s.parameter), round(s.accumulator)] for s in trace]
    ranked = seen.most_common()
    result = {"variant": variant, "variables": variables, "size": size, "counts": [number for _, number in ranked]}
    if shape:
        return result | {"torn": torn}
    return result | {"trajectories": [first[key] for key, _ in ranked]}


def main() -> None:
    """Runs all the experiments, prints a line for each and writes the record."""
    results = []
    for size in (1, SIZE):
        for variables in ("ref", "resource"):
            for variant in ("published", "masked", "ordered"):
                results.append(count(variant, variables, size))
                counts = results[-1]["counts"]
                print(variant, variables, size, len(counts), counts[:5], results[-1].get("torn", ""), flush=True)
    report = {
        "date": datetime.datetime.now(tz=datetime.UTC).date().isoformat(),
        "cores": os.cpu_count(),
        "tensorflow": importlib.metadata.version("tensorflow"),
        "runs": RUNS,
        "steps": STEPS,
        "gradients": GRADIENTS,
        "results": results,
    }
    OUTPUT.write_text(json.dumps(report) + "\n")


if __name__ == "__main__":
    main()
