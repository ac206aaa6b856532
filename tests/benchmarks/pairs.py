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


def compare(
    name: str, what: str, ours: Callable[[], Any], other: Callable[[], Any], runs: int = RUNS
) -> dict[str, Any]:
    """Times both functions `runs` times, in random order within each pair, and returns quartiles of ours / other."""
    order, ratios = np.random.default_rng(0), []
    warm_up = min(20, max(2, runs // 7))
    for function in (ours, other):
        seconds(function, warm_up)
    calls = max(1, round(SECONDS_A_RUN / (seconds(other, warm_up) / warm_up)))
    gc.collect()
    gc.disable()
    try:
        for _ in range(runs):
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
        "runs": runs,
    }
