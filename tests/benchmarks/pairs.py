"""How two functions are compared: in pairs of neighbouring runs, so that what slows the machine slows both."""

import gc
import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np

RUNS = 151
SECONDS_A_RUN = 0.01


def seconds(function: Callable[[], Any], calls: int) -> float:
    started = time.perf_counter()
    for _ in range(calls):
        function()
    return time.perf_counter() - started


def compare(name: str, what: str, ours: Callable[[], Any], other: Callable[[], Any]) -> dict[str, Any]:
    """Times both functions `RUNS` times, in random order within each pair, and returns quartiles of ours / other."""
    order, ratios = np.random.default_rng(0), []
    for function in (ours, other):
        seconds(function, 20)
    calls = max(1, round(SECONDS_A_RUN / (seconds(other, 20) / 20)))
    gc.collect()
    gc.disable()
    try:
        for _ in range(RUNS):
            if order.random() < 0.5:
                mine = seconds(ours, calls)
                theirs = seconds(other, calls)
            else:
                theirs = seconds(other, calls)
                mine = seconds(ours, calls)
            ratios.append(mine / theirs)
    finally:
        gc.enable()
    lower, median, upper = (round(quartile, 3) for quartile in statistics.quantiles(ratios, n=4))
    return {
        "name": name,
        "what": what,
        "ratio_median": median,
        "ratio_q1": lower,
        "ratio_q3": upper,
        "runs": RUNS,
    }
