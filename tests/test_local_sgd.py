"""Holds `companion.local_sgd` against NumPy, with real processes on loopback that train, fail, and go on."""

import json
import os
import pathlib
import re
import subprocess
import time
from typing import Any

import keras
import numpy as np
import pytest

import companion
from companion import local_sgd, teams
from companion.launch import _free_ports as free_ports
from tests.kit.processes import warm
from tests.kit.teams import BATCH, BY_NAME, EXAMPLES, RATE, WORKER, examples, found, launched, result, slope


def by_hand(scenario: dict[str, Any], begin: np.ndarray) -> list[np.ndarray]:
    """The mean of the workers' weights after each step; their own weights where they have not been averaged."""
    workers, batch, local = scenario["workers"], scenario.get("batch", BATCH), scenario["local"]
    momentum = scenario["arguments"].get("momentum", 0.0)
    outer = local.get("outer_optimizer")
    x, y = examples()
    order = np.arange(EXAMPLES).reshape(-1, workers, batch)
    theta, velocity = np.tile(begin, (workers, 1)), np.zeros((workers, 10))
    anchor, outer_velocity, path, step = begin.copy(), np.zeros(10), [], 0
    for _ in range(2):
        for places in order:
            step += 1
            for rank in range(workers):
                velocity[rank] = momentum * velocity[rank] - RATE * slope(theta[rank], x[places[rank]], y[places[rank]])
                theta[rank] += velocity[rank]
            warmup = local.get("warmup", 0)
            if step <= warmup or (step - warmup) % local["every"] == 0:
                average = theta.mean(0)
                if outer:
                    delta, m = anchor - average, outer.get("momentum", 0.0)
                    outer_velocity = m * outer_velocity - outer["learning_rate"] * delta
                    nesterov = outer.get("nesterov", False)
                    anchor = anchor + (
                        m * outer_velocity - outer["learning_rate"] * delta if nesterov else outer_velocity
                    )
                    average = anchor
                theta[:] = average
                if local.get("average_slots"):
                    velocity[:] = velocity.mean(0)
            path.append(theta.copy())
    return path


NUMERICAL = [
    "every step",
    "every step, momentum",
    "every third",
    "every fourth, momentum",
    "slots",
    "every seventh",
    "warmup",
    "outer plain",
    "outer Nesterov",
    "XLA and eager",
    "three, every step",
    "three, every fourth",
]


@pytest.mark.parametrize("name", NUMERICAL)
def test_every_step_of_every_worker_is_that_of_numpy(name: str) -> None:
    path = by_hand(BY_NAME[name], result(name)[0]["before"])
    for rank, mine in enumerate(result(name)):
        assert mine["error"] == ""
        np.testing.assert_allclose(mine["seen"], [theta[rank] for theta in path], rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("name", "other"),
    [
        pytest.param("every third", {"every": 4}, id="another k"),
        pytest.param("slots", {"every": 4}, id="slots kept apart"),
        pytest.param(
            "outer Nesterov", {"every": 3, "outer_optimizer": {"learning_rate": 0.75, "momentum": 0.75}}, id="outer"
        ),
        pytest.param("warmup", {"every": 6}, id="no warmup"),
    ],
)
@pytest.mark.xfail(strict=True, raises=AssertionError)
def test_another_rule_is_told_from_it(name: str, other: dict[str, Any]) -> None:
    path = by_hand({**BY_NAME[name], "local": other}, result(name)[0]["before"])
    for rank, mine in enumerate(result(name)):
        np.testing.assert_allclose(mine["seen"], [theta[rank] for theta in path], rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", ["every step", "every step, momentum", "three, every step"])
def test_an_exchange_after_every_step_is_synchronous_training(name: str) -> None:
    """One model in Keras, on the batches of all workers together."""
    scenario = BY_NAME[name]
    begin = result(name)[0]["before"]
    layer = keras.layers.Dense(2, dtype="float64")
    model = keras.Sequential([keras.Input((4,), dtype="float64"), layer])
    layer.set_weights([begin[:8].reshape(4, 2), begin[8:]])
    model.compile(keras.optimizers.SGD(**scenario["arguments"]), "mse", jit_compile=False)
    x, y = examples()
    for _ in range(2):
        for places in np.arange(EXAMPLES).reshape(-1, scenario["workers"] * scenario.get("batch", BATCH)):
            model.train_on_batch(x[places], y[places])
    for mine in result(name):  # `train_on_batch` hands float64 over as float32
        np.testing.assert_allclose(mine["weights"], np.concatenate([w.ravel() for w in model.get_weights()]), atol=1e-6)


@pytest.mark.parametrize("name", [*NUMERICAL, "deep", "single", "together"])
def test_workers_end_on_the_same_weights(name: str) -> None:
    first, *others = result(name)
    assert not np.array_equal(first["before"], others[0]["before"])
    for other in others:
        np.testing.assert_array_equal(other["weights"], first["weights"])


def test_steps_in_one_execution_change_nothing() -> None:
    path = by_hand(BY_NAME["together"], result("together")[0]["before"])
    for rank, mine in enumerate(result("together")):
        np.testing.assert_allclose(mine["seen"], [theta[rank] for theta in path[2::3]], rtol=0, atol=1e-12)


def test_training_can_go_on() -> None:
    """Two calls of `fit`, of 12 steps each and an exchange every third, are as one."""
    for twice, once in zip(result("twice"), result("every third"), strict=True):
        np.testing.assert_array_equal(twice["weights"], once["weights"])


@pytest.mark.parametrize(("name", "every"), [("every step", 1), ("every third", 3), ("three, every fourth", 4)])
def test_calls_and_bytes_fall_by_k(name: str, every: int) -> None:
    steps = 24 if BY_NAME[name]["workers"] == 2 else 20
    for mine in result(name):
        assert mine["exchanges"] == steps // every
        assert mine["bytes"] == steps // every * 10 * 8


@pytest.mark.parametrize(
    ("name", "after"),
    [("every seventh", [7, 14, 21]), ("warmup", [1, 2, 3, 4, 5, 11, 17, 23]), ("together", [6, 12, 18, 24])],
)
def test_when_weights_are_exchanged(name: str, after: list[int]) -> None:
    steps = np.arange(1, 25)[2::3] if name == "together" else np.arange(1, 25)
    for mine in result(name):
        counts = np.concatenate([[0], mine["exchanges after"]])
        assert steps[np.diff(counts) > 0].tolist() == after
        assert mine["exchanges"] == len(after) + (after[-1] < 24)  # and once more at the end
        assert mine["counters"].tolist() == [24, 24]


def test_single_precision_is_near_double() -> None:
    path = by_hand(BY_NAME["single"], result("single")[0]["before"].astype("float64"))
    for mine in result("single"):
        np.testing.assert_allclose(mine["weights"], path[-1][0], atol=1e-6)


def test_slots_are_averaged_where_that_is_asked_for() -> None:
    (one, other), (mine, theirs) = result("slots"), result("every fourth, momentum")
    np.testing.assert_array_equal(one["slots"], other["slots"])
    assert np.abs(mine["slots"] - theirs["slots"]).max() > 1e-3


# What is refused


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("uneven steps", "ValueError: All workers must have the same `steps`.*steps=[12, 8], by worker"),
        ("uneven epochs", "ValueError: All workers must have the same `epochs`.*epochs=[2, 3], by worker"),
        ("uneven every", "ValueError: All workers must have the same `every`.*every=[3, 4], by worker"),
        ("unknown steps", "ValueError: `fit` cannot tell how many steps.*pass `steps_per_epoch`"),
        ("unbuilt", "ValueError: The model must be built and compiled"),
        ("no multiple", "ValueError: `every` and `warmup` must be multiples of `steps_per_execution`=3.*every=4"),
    ],
)
def test_refused_by_all_before_the_first_step(name: str, words: str) -> None:
    for mine in result(name):
        first, _, second = words.partition(".*")
        assert mine["error"].startswith(first), mine["error"]
        assert second in mine["error"]
        np.testing.assert_array_equal(mine["weights"], mine["before"])
        assert mine["exchanges"] == mine["iterations"] == 0


def test_workers_at_different_steps_notice() -> None:
    for mine in result("stopped early"):
        assert mine["error"].startswith("RuntimeError: Worker "), mine["error"]
        assert "[5, 6], by worker. Has a callback ended training on one of them? No weight was changed" in mine["error"]
    np.testing.assert_array_equal(result("stopped early")[0]["weights"], result("stopped early")[0]["seen"][-1])


@pytest.mark.parametrize(("at", "every", "met"), [(8, 7, 12), (8, 5, 10), (9, 7, 14), (12, 7, 14), (12, 30, 24)])
def test_who_ends_early_meets_the_others_at_a_backup_or_an_exchange(at: int, every: int, met: int) -> None:
    for mine in result(f"stopped at {at}, every {every}"):
        assert mine["error"].startswith("RuntimeError: Worker "), mine["error"]
        assert f"[{at}, {met}], by worker. Has a callback ended training on one of them?" in mine["error"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"every": 0}, "`every` must be an integer of at least 1. Received: every=0"),
        ({"every": 2.5}, "`every` must be an integer of at least 1. Received: every=2.5"),
        ({"every": True}, "Received: every=True"),
        ({"every": 2, "warmup": -1}, "`warmup` must be an integer of at least 0. Received: warmup=-1"),
        ({"every": 2, "outer_optimizer": "sgd"}, "`outer_optimizer` must be a keras.optimizers.Optimizer"),
        ({"every": 2, "average_slots": "yes"}, "`average_slots` must be True or False. Received: average_slots='yes'"),
        ({"every": 2, "backup_dir": __file__}, "`backup_dir` must be the path of a folder, or None. Received: backup_"),
        ({"every": 2, "backup_dir": 3}, "`backup_dir` must be the path of a folder, or None. Received: backup_dir=3"),
    ],
)
def test_bad_arguments(arguments: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=re.escape(words)):
        companion.LocalSGD(**arguments)


@pytest.mark.parametrize("timeout", [0, -1, "60", True, None, float("nan"), float("inf")])
def test_bad_timeout(timeout: Any) -> None:
    with pytest.raises(ValueError, match=r"`timeout` must be a number in \(0, inf\)\. Received: timeout="):
        companion.connect(timeout)


def test_outer_optimizer_must_be_another_one() -> None:
    optimizer = keras.optimizers.SGD()
    model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1)])
    model.compile(optimizer, "mse")
    with pytest.raises(ValueError, match="`outer_optimizer` must be another one than the model's"):
        model.fit(
            np.ones((4, 2)), np.ones((4, 1)), verbose=0, callbacks=[companion.LocalSGD(2, outer_optimizer=optimizer)]
        )


def test_an_outer_optimizer_goes_on_in_another_callback() -> None:
    x = np.random.default_rng(0).normal(size=(12, 2))
    ends = []
    for is_new in (False, True):
        model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1, kernel_initializer="ones")])
        model.compile("sgd", "mse")
        local = companion.LocalSGD(2, outer_optimizer=keras.optimizers.SGD(0.5, momentum=0.9))
        for _ in range(2):
            model.fit(x, x.sum(1), batch_size=3, shuffle=False, verbose=0, callbacks=[local])
            if is_new:
                local = companion.LocalSGD(2, outer_optimizer=local.outer_optimizer)
        ends.append(model.get_weights()[0])
    np.testing.assert_array_equal(*ends)


def test_team_must_come_first(monkeypatch: Any) -> None:
    keras.ops.ones(1)
    place = {"cluster": {"worker": ["127.0.0.1:1", "127.0.0.1:2"]}, "task": {"type": "worker", "index": 0}}
    monkeypatch.setenv("TF_CONFIG", json.dumps(place))
    monkeypatch.setattr(teams, "_teams", [])
    with pytest.raises(RuntimeError, match=r"call `companion.connect\(\)` at the top of the script"):
        companion.connect()


# Backups, alone


class CutOff(keras.callbacks.Callback):
    def __init__(self, step: int) -> None:
        super().__init__()
        self.left = step

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        self.left -= 1
        if self.left == 0:
            raise InterruptedError


def alone(folder: Any, epochs: int, outer: bool = False, cut_off_at: int = 0) -> list[np.ndarray]:
    """A run of ten steps an epoch, so that epochs end between exchanges."""
    keras.utils.set_random_seed(3)
    layers = [keras.layers.Dense(4, "tanh"), keras.layers.Dropout(0.3), keras.layers.Dense(2)]
    model = keras.Sequential([keras.Input((4,)), *layers])
    model.compile(keras.optimizers.Adam(0.01), "mse", jit_compile=False)
    optimizer = keras.optimizers.SGD(0.7, momentum=0.9, nesterov=True) if outer else None
    local = companion.LocalSGD(3, outer_optimizer=optimizer, backup_dir=folder)
    x, y = examples()
    callbacks = [CutOff(cut_off_at), local]
    model.fit(x, y, batch_size=12, epochs=epochs, shuffle=False, verbose=0, callbacks=callbacks)
    return model.get_weights()


@pytest.mark.parametrize("outer", [False, True])
def test_a_run_in_pieces_ends_where_one_run_does(tmp_path: pathlib.Path, outer: bool) -> None:
    whole = alone(None, 4, outer=outer)
    with pytest.raises(InterruptedError):
        alone(tmp_path, 4, outer=outer, cut_off_at=25)
    for _ in range(2):  # the second time all is done already
        for mine, theirs in zip(alone(tmp_path, 4, outer=outer), whole, strict=True):
            np.testing.assert_array_equal(mine, theirs)
    assert [path.name for path in tmp_path.iterdir()] == ["worker-0-of-1-epoch-4.npz"]


def test_backups_of_another_run_are_refused(tmp_path: pathlib.Path) -> None:
    alone(tmp_path, 1)
    with pytest.raises(ValueError, match="The backup is of another model or optimizer"):
        alone(tmp_path, 2, outer=True)
    (tmp_path / "worker-0-of-1-epoch-1.npz").rename(tmp_path / "worker-0-of-2-epoch-1.npz")
    with pytest.raises(ValueError, match="`backup_dir` must hold the backups of one run, of 1 workers"):
        alone(tmp_path, 2)


def one_layer(optimizer: Any, local: Any, epochs: int, *callbacks: Any) -> tuple[keras.Model, list[int]]:
    """A model after training, and the epochs that it made."""
    model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1)])
    model.compile(optimizer, "mse", run_eagerly=True)
    x, y = np.ones((8, 2)), np.ones((8, 1))
    return model, model.fit(x, y, epochs=epochs, verbose=0, callbacks=[*callbacks, local]).epoch


def test_what_a_resumed_run_does_and_does_not_bring_back(tmp_path: pathlib.Path) -> None:
    """The rate that a callback has set does, the class of the optimizer must, and Keras's first epoch must not."""

    def local() -> Any:
        return companion.LocalSGD(1, backup_dir=tmp_path)

    halve = keras.callbacks.ReduceLROnPlateau("loss", 0.5, patience=1, min_delta=1e9)
    halved, _ = one_layer(keras.optimizers.SGD(0.5, momentum=0.9), local(), 2, halve)
    with pytest.raises(ValueError, match="backup is of another model or optimizer, with SGD and outside None where"):
        one_layer(keras.optimizers.Lion(0.5), local(), 3)
    again = local()
    model, epochs = one_layer(keras.optimizers.SGD(0.5, momentum=0.9), again, 3)
    assert epochs == [2]
    assert float(model.optimizer.learning_rate) == float(halved.optimizer.learning_rate) < 0.5
    x, y = np.ones((8, 2)), np.ones((8, 1))
    assert model.fit(x, y, epochs=2, verbose=0, callbacks=[companion.LocalSGD(1)]).epoch == [0, 1]
    assert model.fit(x, y, epochs=2, verbose=0).epoch == [0, 1]
    with pytest.raises(ValueError, match="The run in `backup_dir` has ended, and nothing would be trained"):
        model.fit(x, y, epochs=2, verbose=0, callbacks=[again])


def test_the_scale_of_the_loss_goes_on(tmp_path: pathlib.Path) -> None:
    """It began anew with each backup and each `fit`, and no run under mixed_float16 could be resumed."""

    def scaled(callback: Any, epochs: int) -> list[tuple[str, float]]:
        optimizer = keras.optimizers.LossScaleOptimizer(keras.optimizers.SGD(0.5), dynamic_growth_steps=3)
        one_layer(optimizer, callback, epochs)
        return [(variable.name, float(variable)) for variable in optimizer.variables]

    scaled(companion.LocalSGD(1, backup_dir=tmp_path), 2)
    resumed, whole = scaled(companion.LocalSGD(1, backup_dir=tmp_path), 5), scaled(keras.callbacks.Callback(), 5)
    assert resumed == whole
    assert ("dynamic_scale", 2.0**16) in whole


@pytest.mark.parametrize("content", [b"", b"PK", b"nothing of the kind", None], ids=["empty", "cut", "foreign", "keys"])
def test_a_broken_backup_is_named(tmp_path: pathlib.Path, content: bytes | None) -> None:
    one_layer("sgd", companion.LocalSGD(1, backup_dir=tmp_path), 1)
    path = tmp_path / "worker-0-of-1-epoch-1.npz"
    if content is None:
        np.savez(path, weights=np.ones(3))
    else:
        path.write_bytes(content)
    (tmp_path / "worker-0-of-1-epoch-x.npz").write_text("no backup of ours")
    words = "The backup cannot be read. Empty this folder, and the run begins anew, or give another `backup_dir`"
    with pytest.raises(ValueError, match=re.escape(f"{words}. Received: {path}")):
        one_layer("sgd", companion.LocalSGD(1, backup_dir=tmp_path), 2)


def test_an_epoch_that_was_not_whole_is_not_backed_up(tmp_path: pathlib.Path) -> None:
    class Stop(keras.callbacks.Callback):
        def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
            self.model.stop_training = True

    model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1)])
    model.compile("sgd", "mse", run_eagerly=True)
    local = companion.LocalSGD(1, backup_dir=tmp_path)
    model.fit(np.ones((8, 2)), np.ones((8, 1)), batch_size=4, epochs=2, verbose=0, callbacks=[Stop(), local])
    assert list(tmp_path.iterdir()) == []


def test_private_name_is_where_it_was() -> None:
    model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1)])
    assert getattr(model, local_sgd._INITIAL_EPOCH) is None


# Failures. A run with dropout, Adam and an outer optimizer, killed again and again, ends as one that was not


RUN: dict[str, Any] = {
    "name": "run",
    "workers": 2,
    "model": "deep",
    "optimizer": "Adam",
    "arguments": {"learning_rate": 0.01},
    "epochs": 5,
    "fatal": True,
    "timeout": 8,
}
LOCAL = {"every": 5, "outer_optimizer": {"learning_rate": 0.7, "momentum": 0.9, "nesterov": True}}


def test_killed_at_random_and_resumed(tmp_path: pathlib.Path, pytestconfig: pytest.Config) -> None:
    """An attempt is killed off a step with an exchange, in one, or while it writes a backup; with --slow, each."""
    generator = np.random.default_rng()
    whole = tmp_path / "whole"
    whole.mkdir()
    assert launched(2, [{**RUN, "local": LOCAL}], whole)[0] == 0
    expected = found(whole, "run", 2)
    backup = {**LOCAL, "backup_dir": str(tmp_path / "backups")}
    moments = {"kill": 20, "in exchange": 8, "in backup": 2}
    if not pytestconfig.getoption("slow"):
        what = generator.choice(list(moments))
        moments = {what: moments[what]}
    for what, latest in moments.items():
        saboteur = [int(generator.integers(2)), what, int(generator.integers(1, latest + 1))]
        started = time.monotonic()
        status, printed = launched(2, [{**RUN, "local": backup, "saboteur": saboteur}], tmp_path)
        assert status == 137, (saboteur, printed[-2000:])
        assert time.monotonic() - started < 120
        assert f"Worker {saboteur[0]} of 2 was killed by SIGKILL: the others are stopped." in printed
    assert launched(2, [{**RUN, "local": backup}], tmp_path)[0] == 0
    for mine, theirs in zip(found(tmp_path, "run", 2), expected, strict=True):
        for key in ("weights", "slots", "exchanges", "bytes", "iterations"):
            np.testing.assert_array_equal(mine[key], theirs[key], err_msg=f"{key} {moments}")


@pytest.mark.parametrize("what", ["hang", "stop"])
def test_who_does_not_answer_is_noticed(tmp_path: pathlib.Path, what: str) -> None:
    started = time.monotonic()
    scenario = {**RUN, "local": {"every": 2}, "saboteur": [1, what, 3]}
    status, printed = launched(2, [scenario], tmp_path)
    assert status == 1
    assert "RuntimeError: Worker 0 of 2 has lost the others in an exchange" in printed
    assert "or has not answered for 8 s, or has left `fit` by an error that it caught" in printed
    assert "Worker 0 of 2 ended with exit status 1: the others are stopped." in printed
    assert time.monotonic() - started < 120


@pytest.mark.parametrize("victim", [0, 1])
def test_survivor_ends_without_a_launcher(tmp_path: pathlib.Path, victim: int) -> None:
    """On a cluster nobody stops it: it notices by itself, also when worker 0 is gone, to which the others report."""
    scenario = {**RUN, "local": {"every": 2}, "saboteur": [victim, "kill", 4]}
    addresses = [f"127.0.0.1:{port}" for port in free_ports(2)]
    running = []
    for rank in range(2):
        place = {"cluster": {"worker": addresses}, "task": {"type": "worker", "index": rank}}
        command = [warm(), str(WORKER), str(tmp_path), json.dumps([scenario])]
        environment = os.environ | {"TF_CONFIG": json.dumps(place)}
        with (tmp_path / f"{rank}.txt").open("w") as out:
            running.append(subprocess.Popen(command, env=environment, stdout=out, stderr=out))
    try:
        assert running[victim].wait(180) == -9
        died = time.monotonic()
        assert running[1 - victim].wait(60) != 0
        assert time.monotonic() - died < 30
    finally:
        for each in running:
            each.kill()
            each.wait()
    printed = (tmp_path / f"{1 - victim}.txt").read_text()
    assert f"RuntimeError: Worker {1 - victim} of 2 has lost the others in an exchange: one of them has died" in printed


class Twin:
    """Stands for two workers: the other one is as far, and all its numbers are thrice as large."""

    rank, size = 0, 2

    def gather(self, numbers: Any) -> np.ndarray:
        return np.tile(np.array(numbers, float), (2, 1))

    def total(self, tensors: Any) -> list[Any]:
        *values, table = tensors
        return [*(4 * value for value in values), keras.ops.tile(table[:1], (2, 1))]


def test_averaged_slots_are_no_learning_rate_from_outside() -> None:
    """Not what an adaptive method remembers of its own learning rate, either: it would think that another was set."""
    model = keras.Sequential([keras.Input((1,)), keras.layers.Dense(1)])
    model.compile(companion.RK23(0.25), "mse")
    model.optimizer.build(model.trainable_variables)
    local = companion.LocalSGD(every=1, average_slots=True)
    local.team = Twin()
    local.set_model(model)
    local.set_params({"steps": 1, "epochs": 2})
    local.on_epoch_begin(0)
    local.on_train_batch_end(0)
    found = {variable.name: float(variable) for variable in model.optimizer.variables}
    assert (found["learning_rate"], found["shown_learning_rate"], found["step_size"]) == (0.25, 0.25, 0.5)
