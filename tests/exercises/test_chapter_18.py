"""Exercises of chapter 18: right answers are right, wrong ones get a hint that helps, and nothing raises."""

from typing import Any

import numpy as np
import tensorflow as tf

import companion
from tests.exercises.judge import judged

DIAGNOSES = ("rate too low", "dead ReLUs", "frozen by mistake", "decay too strong", "not shuffled")


def norm(sums: bool = True, root: bool = True, none: bool = True, sparse: str = "coalesced") -> Any:
    """A function that computes the norm of a gradient, with one thing changed."""

    def answer(gradients: list[Any]) -> Any:
        squares = []
        for gradient in gradients:
            if gradient is None and none:
                continue
            if isinstance(gradient, tf.IndexedSlices) and sparse != "not":
                gradient = companion.coalesce(gradient).values if sparse == "coalesced" else gradient.values
            squares.append(float(np.sum(np.square(gradient))))
        total = sum(squares) if sums else sum(np.sqrt(squares)) ** 2
        return np.sqrt(total) if root else total

    return answer


def noise_scale(small: Any, big: Any, b: int, batch: int) -> Any:
    small, big = np.mean(small), np.mean(big)
    return (small - big) / (1 / b - 1 / batch) / ((batch * big - b * small) / (batch - b))


def of_each_step(small: Any, big: Any, b: int, batch: int) -> Any:
    return np.mean([noise_scale(s, g, b, batch) for s, g in zip(small, big, strict=True)])


def of_four_parts(small: Any, big: Any, b: int, batch: int) -> Any:
    noise = (np.mean(small) - np.mean(big)) / 3
    return batch * noise / (np.mean(big) - noise)


def with_noise(small: Any, big: Any, b: int, batch: int) -> Any:
    return (np.mean(small) - np.mean(big)) / (1 / b - 1 / batch) / np.mean(big)


test_right, test_wrong = judged(
    [
        ("18.1", DIAGNOSES),
        ("18.1", tuple(name.upper() for name in DIAGNOSES)),
        ("18.2", (norm(),)),
        ("18.3", (noise_scale,)),
    ],
    [
        ("18.1", ("rate too high", *DIAGNOSES[1:]), "A: its gradient is of ordinary size"),
        ("18.1", (DIAGNOSES[0], "vanishing gradients", *DIAGNOSES[2:]), "B: two layers say exactly zero"),
        ("18.1", (*DIAGNOSES[:2], "dead ReLUs", *DIAGNOSES[3:]), "C: two layers are not there"),
        ("18.1", (*DIAGNOSES[:3], "vanishing gradients", DIAGNOSES[4]), "D: hardly any gradient"),
        ("18.1", (*DIAGNOSES[:4], "exploding gradients"), "E: a loud gradient"),
        ("18.1", (*DIAGNOSES[:4], None), "E: None is no run of the table"),
        ("18.1", (DIAGNOSES[0], "dead units", *DIAGNOSES[2:]), "It has rate too high,"),
        ("18.2", (5.0,), "give the function itself"),
        ("18.2", (lambda gradients: None,), "one number"),
        ("18.2", (lambda gradients: 4.0,), "for (3, 0) and (4) it is 5"),
        ("18.2", (norm(sums=False),), "Add up squares"),
        ("18.2", (norm(root=False),), "the root is missing"),
        ("18.2", (norm(sparse="not"),), "18.2"),
        ("18.2", (norm(sparse="repeated"),), "add them before you square"),
        ("18.3", (3,), "give the function itself"),
        ("18.3", (lambda *numbers: "?",), "one number for all steps"),
        ("18.3", (of_each_step,), "Average first"),
        ("18.3", (with_noise,), "still holds noise"),
        ("18.3", (of_four_parts,), "right for parts of a quarter"),
        ("18.3", (lambda *numbers: 1 / noise_scale(*numbers),), "not the other way round"),
        ("18.3", (lambda *numbers: noise_scale(*numbers) / numbers[3],), "a share of the batch"),
        ("18.3", (lambda s, g, b, n: (np.mean(s) - np.mean(g)) / (1 / b - 1 / n),), "that is tr Σ"),
        ("18.3", (lambda *numbers: 1.0,), "the fold Why these formulas?"),
    ],
    unpack=True,
)
