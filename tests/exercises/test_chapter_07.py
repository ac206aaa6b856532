"""Exercises of chapter 07: right answers are right, wrong ones get a hint that helps, and nothing raises."""

import pathlib
from typing import Any

import keras
import numpy as np
import pytest

import companion
from companion import exercises
from companion.exercises.chapter_07 import errors_by_situation

RIGHT: dict[str, dict[str, Any]] = {
    "07.1": {"A": "examples", "B": "tokens", "C": "positions", "D": "tokens", "E": "impossible"},
    "07.2": {"flush": 5, "carry": 3, "drop": 0},
    "07.3": {"everything": 2, "steps=2": 1, "steps=8": 6, "weights": 4},
    "07.4": {"A": "plain", "B": "undivided", "C": "told", "D": "Keras"},
}


def but(number: str, **changes: Any) -> dict[str, Any]:
    """The right answer with some entries changed; ``steps_2`` stands for ``"steps=2"``."""
    return RIGHT[number] | {key.replace("_", "="): value for key, value in changes.items()}


@pytest.mark.parametrize("number", RIGHT)
def test_right_answers(number: str) -> None:
    assert exercises.check(number, RIGHT[number]).correct


def test_counts_may_come_from_numpy() -> None:
    assert exercises.check("07.2", {name: np.int64(n) for name, n in RIGHT["07.2"].items()}).correct


@pytest.mark.parametrize(
    ("number", "answer", "hint"),
    [
        ("07.1", but("07.1", A="tokens"), "A is not weighed by that: one class"),
        ("07.1", but("07.1", B="positions"), "ignore_class masks"),
        ("07.1", but("07.1", C="tokens"), "Does the default reduction know"),
        ("07.1", but("07.1", D="positions"), "sum of the weights"),
        ("07.1", but("07.1", E="tokens"), "What one number"),
        ("07.1", but("07.1", E="words"), "each value is one of"),
        ("07.1", but("07.1", E=["tokens"]), "each value is one of"),
        ("07.2", but("07.2", flush=4), "at the end of each epoch"),
        ("07.2", but("07.2", flush=3), '"flush" is not right'),
        ("07.2", but("07.2", carry=4), "an open window makes no update"),
        ("07.2", but("07.2", carry=5), "How often does eight go"),
        ("07.2", but("07.2", drop=3), "the epoch's end forgets"),
        ("07.2", but("07.2", drop="none"), "whole number"),
        ("07.2", but("07.2", drop=False), "whole number"),
        ("07.2", (5, 3, 0), "dictionary with the keys 'flush'"),
        ("07.3", but("07.3", everything=4), "wait in the next one"),
        ("07.3", but("07.3", steps_2=0), "loading moves nothing"),
        ("07.3", but("07.3", steps_2=2), "who makes the update"),
        ("07.3", but("07.3", steps_8=8), "grows to eight"),
        ("07.3", but("07.3", weights=2), "that was not saved"),
        ("07.3", but("07.3", weights=2.5), "whole number"),
        ("07.4", but("07.4", A="Keras", D="plain"), "A was not made by what you say. Keras is exact"),
        ("07.4", but("07.4", B="told", C="undivided"), "has no error in any situation"),
        ("07.4", but("07.4", C="plain", A="told"), "no error"),
        ("07.4", but("07.4", C="plain"), "all parts weigh alike"),
        ("07.4", but("07.4", D="undivided"), "wrong on equal parts already"),
        ("07.4", but("07.4", D="optax"), "each value is one of"),
    ],
)
def test_wrong_answers_get_a_hint(number: str, answer: Any, hint: str) -> None:
    verdict = exercises.check(number, answer)
    assert not verdict.correct
    assert hint in verdict.message


@pytest.mark.parametrize("number", RIGHT)
@pytest.mark.parametrize("answer", [None, "flush", 5, [], {}, {"A": None}, lambda: None, np.ones(3)])
def test_what_is_no_answer_gets_a_hint(number: str, answer: Any) -> None:
    verdict = exercises.check(number, answer)
    assert not verdict.correct
    assert "dictionary" in verdict.message


@pytest.mark.parametrize("number", RIGHT)
def test_not_answered_yet(number: str) -> None:
    assert "not answered yet" in exercises.check(number, ...).message


# ---- the answers are what happens -----------------------------------------------------------------------------------


def model(optimizer: Any) -> keras.Model:
    network = keras.Sequential([keras.Input((1,)), keras.layers.Dense(1)])
    network.compile(optimizer, "mse", run_eagerly=True)
    return network


@pytest.mark.parametrize(("remainder", "updates"), RIGHT["07.2"].items())
def test_updates_are_as_many_as_the_answer_says(remainder: str, updates: int) -> None:
    network = model(companion.GradientAccumulation(keras.optimizers.SGD(), 8, remainder=remainder))
    callbacks = [companion.FlushAtEpochEnd()]
    network.fit(np.ones((6, 1)), np.ones((6, 1)), 1, epochs=5, verbose=0, callbacks=callbacks)
    assert int(network.optimizer.iterations) == updates


@pytest.mark.parametrize(("kept", "more"), RIGHT["07.3"].items())
def test_the_next_update_comes_when_the_answer_says(kept: str, more: int, tmp_path: pathlib.Path) -> None:
    one = np.ones((1, 1))
    stopped = model(companion.GradientAccumulation(keras.optimizers.SGD(), 4))
    for _ in range(6):
        stopped.train_on_batch(one, one)
    stopped.save(tmp_path / "stopped.keras")
    resumed = keras.saving.load_model(tmp_path / "stopped.keras")
    if kept == "weights":
        resumed = model(companion.GradientAccumulation(keras.optimizers.SGD(), 4))
        resumed.set_weights(stopped.get_weights())
    elif kept.startswith("steps="):
        resumed = model(companion.GradientAccumulation(keras.optimizers.SGD(), int(kept.removeprefix("steps="))))
        resumed.optimizer.build(resumed.trainable_variables)
        stopped.save_weights(tmp_path / "stopped.weights.h5")
        resumed.load_weights(tmp_path / "stopped.weights.h5")
    before, count = int(resumed.optimizer.iterations), 0
    while int(resumed.optimizer.iterations) == before:
        resumed.train_on_batch(one, one)
        count += 1
    assert count == more


def test_the_errors_tell_their_makers_apart() -> None:
    found = {name: [error < 1e-12 for error in row.values()] for name, row in errors_by_situation().items()}
    assert found["A"] == [True, False, True]
    assert found["B"] == [False] * 3
    assert found["C"] == [True] * 3
    assert found["D"] == [True, False, False]


@pytest.mark.parametrize(
    ("name", "options"),
    [("B", {"ignore_class": -1}), ("C", {}), ("D", {"reduction": "mean_with_sample_weight"})],
)
def test_keras_divides_by_what_the_answer_says(name: str, options: dict[str, Any]) -> None:
    """Two texts of four positions, of which five count."""
    labels, counts = np.array([[1, 0, 1, 1], [0, -1, -1, -1]]), {"examples": 2, "positions": 8, "tokens": 5}
    logits = np.random.default_rng(0).normal(size=(2, 4, 2))
    log_probabilities = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
    places = [tuple(place) for place in np.argwhere(labels >= 0)]
    total = -sum(log_probabilities[place][labels[place]] for place in places)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True, dtype="float64", **options)
    weight = None if name == "B" else (labels >= 0).astype("float64")
    value = float(loss(labels if name == "B" else np.maximum(labels, 0), logits, sample_weight=weight))
    fits = [choice for choice, count in counts.items() if np.isclose(value, total / count)]
    assert fits == [RIGHT["07.1"][name]]
