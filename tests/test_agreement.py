"""Holds what `companion.LocalSGD` promises of all workers' weights, and who is named when they cannot be alike."""

import io
import json
import pathlib
import tempfile
from typing import Any

import keras
import numpy as np
import pytest

from companion.agreement import names_of
from companion.launch import launch
from tests.kit.processes import warm_workers
from tests.kit.shared import once_a_run

WORKER = pathlib.Path(__file__).parent / "agreement_worker.py"


@once_a_run
def results() -> list[dict[str, Any]]:
    """What all scenarios came to on two workers, in one launch."""
    with tempfile.TemporaryDirectory() as folder:
        out = io.StringIO()
        with warm_workers():
            assert launch(2, WORKER, [folder], out=out) == 0, out.getvalue()[-3000:]
        return [json.loads(pathlib.Path(folder, f"{rank}.json").read_text()) for rank in range(2)]


def weights(name: str) -> list[np.ndarray]:
    """Those of both workers."""
    found = [result[name] for result in results()]
    assert [each["error"] for each in found] == ["", ""]
    return [np.concatenate(each["weights"]) for each in found]


ALIKE = ["window", "average", "average, outer", "no mean", "other numbers", "unfrozen", "unfrozen, outer", "large"]


@pytest.mark.parametrize("name", [*ALIKE, "stopped together", "stopped together at an end"])
def test_workers_end_on_the_same_weights(name: str) -> None:
    mine, other = weights(name)
    assert np.isfinite(mine).all()
    np.testing.assert_array_equal(mine, other)


@pytest.mark.parametrize("name", ["average", "unfrozen"])
def test_an_outer_rate_of_one_is_the_plain_average(name: str) -> None:
    """Also where an average is put in place at the end, and for a layer that joins those that are trained."""
    np.testing.assert_allclose(weights(f"{name}, outer")[0], weights(name)[0], rtol=1e-5)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        (
            "frozen",
            "`weights`|dense/kernel (3, 3) float32 trained, sequential/dense/kernel (3, 3) float32 not trained]",
        ),
        ("shapes", "`weights`|[sequential/dense_1/bias (2,) float32 trained, a slot"),
        ("order", "`weights`|[sequential/a/kernel (3, 3) float32 trained, sequential/b/kernel"),
        ("dtypes", "`weights`|(3, 1) float64 trained, sequential/dense/kernel (3, 1) float32"),
        ("optimizers", "`optimizer`|optimizer=[SGD, Adam], by worker"),
        ("slots", "`weights`|[nothing, a slot (3, 1) float32], by worker"),
        ("outer optimizers", "`outer_optimizer`|[learning_rate=0.69"),
        ("unbuilt", "The model must be built|(worker 1)"),
        ("initial epochs", "`initial_epoch`|initial_epoch=[0, 1], by worker"),
        ("no epoch", "`initial_epoch`|initial_epoch=[2, 0], by worker"),
        ("steps per epoch", "`steps`|steps=[5, 6], by worker"),
        ("broken backup", "The backup cannot be read. Empty this folder|worker-1-of-2-epoch-2.npz"),
    ],
)
def test_what_differs_is_said_by_all_before_the_first_step(name: str, words: str) -> None:
    errors = [result[name]["error"] for result in results()]
    for error in errors:
        assert error.startswith("ValueError: ")
        for part in words.split("|"):
            assert part in error
    assert errors[0] == errors[1]


@pytest.mark.parametrize(
    ("name", "rank", "steps"),
    [
        ("in an epoch", 0, "[2, 3]"),
        ("on an exchange", 0, "[3, 6]"),
        ("before the last", 0, "[2, 12]"),
        ("at an end", 0, "[6, 12]"),
        ("with backups", 0, "[2, 6]"),
        ("at an end, with backups", 0, "[6, 12]"),
        ("other at the last", 1, "[12, 11]"),
    ],
)
def test_who_stops_alone_is_named_by_all(name: str, rank: int, steps: str) -> None:
    """At once: whoever goes on hears it in the place of what it waits for."""
    for me, result in enumerate(results()):
        assert result[name]["error"].startswith(f"RuntimeError: Worker {me} of 2 cannot go on: worker {rank} has ended")
        assert f"They are at steps {steps}, by worker." in result[name]["error"]


def test_of_the_numbers_in_names_only_the_order_counts() -> None:
    def names(*layers: str) -> list[str]:
        model = keras.Sequential([keras.Input((2,)), *(keras.layers.Dense(2, name=name) for name in layers)], name="m")
        return [name.split("/")[1] for name in names_of(model.weights)][::2]

    assert names("dense", "dense_1", "b_2") == names("dense_7", "dense_10", "b_9")
    assert names("dense_9", "dense_10") != names("dense_10", "dense_9")
    assert names("a", "b") != names("b", "a")
