"""Workers that train together by local SGD: what they are to do, one launch for all who ask, and what they wrote."""

import io
import json
import pathlib
import tempfile
from typing import Any

import numpy as np

from companion.launch import launch
from tests.kit import ROOT
from tests.kit.processes import warm_workers
from tests.kit.shared import once_a_run

WORKER = ROOT / "tests" / "local_sgd_worker.py"
RATE, BATCH, EXAMPLES = 0.05, 5, 120


def launched(workers: int, scenarios: list[dict[str, Any]], folder: Any) -> tuple[int, str]:
    """The exit status of a launch, and what it printed; the workers have imported Keras already."""
    out = io.StringIO()
    with warm_workers():
        status = launch(workers, WORKER, [str(folder), json.dumps(scenarios)], out=out)
    return status, out.getvalue()


def found(folder: Any, name: str, workers: int) -> list[dict[str, Any]]:
    """What each worker wrote about a scenario."""
    stored = [np.load(pathlib.Path(folder) / f"{name}-{rank}.npz") for rank in range(workers)]
    return [{key: each[key][()] for key in each.files} for each in stored]


def both(name: str, workers: int, **scenario: Any) -> dict[str, Any]:
    return {"name": name, "workers": workers, "arguments": {"learning_rate": RATE}, **scenario}


PLAIN: list[dict[str, Any]] = [
    both("every step", 2, local={"every": 1}),
    both("every step, momentum", 2, local={"every": 1}, arguments={"learning_rate": RATE, "momentum": 0.75}),
    both("every third", 2, local={"every": 3}),
    both("every fourth, momentum", 2, local={"every": 4}, arguments={"learning_rate": RATE, "momentum": 0.75}),
    both("slots", 2, local={"every": 4, "average_slots": True}, arguments={"learning_rate": RATE, "momentum": 0.75}),
    both("every seventh", 2, local={"every": 7}),
    both("warmup", 2, local={"every": 6, "warmup": 5}),
    both("outer plain", 2, local={"every": 3, "outer_optimizer": {"learning_rate": 1.0}}),
    both(
        "outer Nesterov",
        2,
        local={"every": 3, "outer_optimizer": {"learning_rate": 0.75, "momentum": 0.75, "nesterov": True}},
    ),
    both("together", 2, local={"every": 6}, compile={"steps_per_execution": 3}),
    both("XLA and eager", 2, local={"every": 3}, compile={"run_eagerly": True}),
    both("twice", 2, local={"every": 3}, epochs=1, again=True),
    both("single", 2, local={"every": 3}, dtype="float32"),
    both("deep", 2, local={"every": 3}, model="deep", optimizer="Adam"),
    # What is refused, on every worker, before a weight moves
    both("uneven steps", 2, local={"every": 3}, examples=[60, 40]),
    both("uneven epochs", 2, local={"every": 3}, epochs=[2, 3]),
    both("uneven every", 2, local={"every": [3, 4]}),
    both("unknown steps", 2, local={"every": 3}, generator=True),
    both("unbuilt", 2, local={"every": 3}, unbuilt=True),
    both("no multiple", 2, local={"every": 4}, compile={"steps_per_execution": 3}),
    both("stopped early", 2, local={"every": 3}, **{"stop at": [5, None]}),
    *(
        both(f"stopped at {at}, every {k}", 2, local={"every": k, "backup_dir": f"{at} {k}"}, **{"stop at": [at, None]})
        for at, k in ((8, 7), (8, 5), (12, 7), (12, 30))
    ),
    both("stopped at 9, every 7", 2, local={"every": 7}, **{"stop at": [9, None]}),
    both("stopped together", 2, local={"every": 3}, validates=True, epochs=3),
    both("validated apart", 2, local={"every": 7}, validates=True, epochs=3),
]
THREE: list[dict[str, Any]] = [
    both("three, every step", 3, local={"every": 1}, batch=4),
    both("three, every fourth", 3, local={"every": 4}, batch=4),
]
BY_NAME = {scenario["name"]: scenario for scenario in PLAIN + THREE}


@once_a_run
def results(workers: int) -> dict[str, list[dict[str, Any]]]:
    """All scenarios of so many workers, in one launch."""
    scenarios = PLAIN if workers == 2 else THREE
    with tempfile.TemporaryDirectory() as folder:
        status, printed = launched(workers, scenarios, folder)
        assert status == 0, printed[-3000:]
        return {scenario["name"]: found(folder, scenario["name"], workers) for scenario in scenarios}


def result(name: str) -> list[dict[str, Any]]:
    return results(BY_NAME[name]["workers"])[name]


# The reference: linear regression by hand


def examples() -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(0)
    x = generator.normal(size=(EXAMPLES, 4))
    return x, x @ generator.normal(size=(4, 2)) + generator.normal(size=(EXAMPLES, 2))


def slope(theta: np.ndarray, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """The gradient of the mean squared error; the weights are a matrix and a bias, in one vector."""
    error = x @ theta[:8].reshape(4, 2) + theta[8:] - y
    return np.concatenate([(x.T @ error).ravel(), error.sum(0)]) * 2 / error.size
