"""Exercises of chapter 11: right answers are right, wrong ones get a hint that helps, and nothing raises."""

from typing import Any

import keras
import numpy as np
import pytest

import companion
from tests.exercises.judge import judged

# ---- 3 --------------------------------------------------------------------------------------------------------------


def _centred(tick: float, friction: float) -> tuple[float, float]:
    half = friction * tick / 2
    return tick**2 / (1 + half), (1 - half) / (1 + half)


def _chapter(tick: float, friction: float) -> tuple[float, float]:
    return tick**2, 1 - friction * tick


def _swapped(tick: float, friction: float) -> tuple[float, float]:
    h, beta = _centred(tick, friction)
    return beta, h


def _h_not_divided(tick: float, friction: float) -> tuple[float, float]:
    return tick**2, _centred(tick, friction)[1]


def _beta_not_centred(tick: float, friction: float) -> tuple[float, float]:
    return _centred(tick, friction)[0], 1 - friction * tick


def _wrong_sign(tick: float, friction: float) -> tuple[float, float]:
    return -(tick**2), 1 - friction * tick


def _exponential(tick: float, friction: float) -> tuple[float, float]:
    return tick**2, float(np.exp(-friction * tick))


# ---- 4 --------------------------------------------------------------------------------------------------------------


class _Brake(companion.Momentum):
    def update_step(self, gradient: Any, variable: Any, learning_rate: Any) -> None:
        h = keras.ops.cast(learning_rate, variable.dtype)
        v = self.velocities[self._get_variable_index(variable)]
        old = keras.ops.where(self.uphill(gradient, v), keras.ops.zeros_like(v), v)
        self.assign(v, self.momentum * old - h * gradient)
        self.assign_add(variable, v)

    def uphill(self, gradient: Any, v: Any) -> Any:
        return keras.ops.sum(gradient * v) > 0


class _EachEntry(_Brake):
    def uphill(self, gradient: Any, v: Any) -> Any:
        return gradient * v > 0


class _Downhill(_Brake):
    def uphill(self, gradient: Any, v: Any) -> Any:
        return keras.ops.sum(gradient * v) < 0


class _Sometimes(_Brake):
    def uphill(self, gradient: Any, v: Any) -> Any:
        return keras.ops.sum(gradient * v) > 0.5


class _Stops(_Brake):
    def update_step(self, gradient: Any, variable: Any, learning_rate: Any) -> None:
        h = keras.ops.cast(learning_rate, variable.dtype)
        v = self.velocities[self._get_variable_index(variable)]
        new = self.momentum * v - h * gradient
        self.assign(v, keras.ops.where(self.uphill(gradient, v), keras.ops.zeros_like(v), new))
        self.assign_add(variable, v)


class _NewVelocity(_Brake):
    def update_step(self, gradient: Any, variable: Any, learning_rate: Any) -> None:
        h = keras.ops.cast(learning_rate, variable.dtype)
        v = self.velocities[self._get_variable_index(variable)]
        self.assign(v, self.momentum * v - h * gradient)
        self.assign(v, keras.ops.where(self.uphill(gradient, v), keras.ops.zeros_like(v), v))
        self.assign_add(variable, v)


class _Nothing(companion.Momentum):
    def update_step(self, gradient: Any, variable: Any, learning_rate: Any) -> None: ...


class _RunsAway(companion.Momentum):
    def update_step(self, gradient: Any, variable: Any, learning_rate: Any) -> None:
        self.assign_add(variable, gradient)


class _If(_Brake):
    """Right when called directly; a compiled step has no `if` on a tensor."""

    def update_step(self, gradient: Any, variable: Any, learning_rate: Any) -> None:
        v = self.velocities[self._get_variable_index(variable)]
        if float(keras.ops.sum(gradient * v)) > 0:
            self.assign(v, keras.ops.zeros_like(v))
        super().update_step(gradient, variable, learning_rate)


class _OtherSignature(companion.Momentum):
    def update_step(self, gradient: Any) -> None:  # type: ignore[override]
        pass


H, BETA = (2 / (np.sqrt(0.2) + np.sqrt(20))) ** 2, (9 / 11) ** 2

RIGHT: list[tuple[str, Any]] = [
    ("11.1", (H, BETA)),
    ("11.1", (0.1653, 0.669)),
    ("11.1", np.array([H, BETA])),
    ("11.2", (0.95, 200)),
    ("11.2", [0.95, 200.0]),
    ("11.3", _centred),
    ("11.4", _Brake),
]

WRONG: list[tuple[str, Any, str]] = [
    ("11.1", None, "two numbers"),
    ("11.1", 0.669, "two numbers"),
    ("11.1", "momentum", "two numbers"),
    ("11.1", ("a", "b"), "two numbers"),
    ("11.1", (0.1, 0.2, 0.3), "two numbers"),
    ("11.1", (np.nan, 0.9), "two numbers"),
    ("11.1", {0.1, 0.2, 0.3}, "two numbers"),
    ("11.1", lambda: 3, "two numbers"),
    ("11.1", (BETA, H), "wrong order"),
    ("11.1", (0.1, 1.5), "in [0, 1)"),
    ("11.1", (-0.1, 0.5), "in [0, 1)"),
    ("11.1", (H, 9 / 11), "Square it"),
    ("11.1", (H, (99 / 101) ** 2), "√κ only"),
    ("11.1", (2 / 20.2, 0.0), "gradient descent's"),
    ("11.1", (np.sqrt(H), BETA), "its square"),
    ("11.1", (0.3, 0.9), "does not shrink"),
    ("11.1", (0.1, BETA), "the momentum is right"),
    ("11.1", (0.1, 0.5), "sticks out"),
    ("11.1", (0.1, 0.9), "can be lower"),
    ("11.2", None, "two numbers"),
    ("11.2", 0.95, "two numbers"),
    ("11.2", (200, 0.95), "first number"),
    ("11.2", (0.9, 200), "twice as large"),
    ("11.2", (0.975, 200), "clock"),
    ("11.2", (0.8, 200), "wrong way round"),
    ("11.2", (0.99, 200), "friction is 0.2"),
    ("11.2", (0.95, 400), "not by h"),
    ("11.2", (0.95, 50), "not fewer"),
    ("11.2", (0.95, 100), "100 ticks"),
    ("11.3", None, "function"),
    ("11.3", (0.01, 0.9), "function"),
    ("11.3", _Brake, "function"),
    ("11.3", lambda: (1, 2), "TypeError"),
    ("11.3", lambda tick, friction: None, "two numbers"),
    ("11.3", lambda tick, friction: (..., ...), "two numbers"),
    ("11.3", lambda tick, friction: tick, "two numbers"),
    ("11.3", _chapter, "settings of the chapter"),
    ("11.3", _swapped, "wrong order"),
    ("11.3", _h_not_divided, "the momentum is right"),
    ("11.3", _beta_not_centred, "the learning rate is right"),
    ("11.3", _wrong_sign, "signs"),
    ("11.3", _exponential, "measured order"),
    ("11.4", None, "class"),
    ("11.4", "Brake", "class"),
    ("11.4", _Brake(0.1), "class"),
    ("11.4", dict, "class"),
    ("11.4", _centred, "class"),
    ("11.4", companion.Momentum, "without a brake"),
    ("11.4", _EachEntry, "over all entries"),
    ("11.4", _Downhill, "works downhill"),
    ("11.4", _Stops, "stands still"),
    ("11.4", _NewVelocity, "new velocity"),
    ("11.4", _Nothing, "does not move"),
    ("11.4", _RunsAway, "runs away"),
    ("11.4", _Sometimes, "is the first that"),
    ("11.4", _If, "compiled"),
    ("11.4", _OtherSignature, "TypeError"),
]


test_right_answers, test_wrong_answers_get_a_hint = judged(RIGHT, WRONG)


# ---- what the checks rest on ----------------------------------------------------------------------------------------


def test_the_best_ball_is_the_best_of_a_grid() -> None:
    """No pair of a fine grid has a smaller spectral radius, in the worst of the curvatures."""

    def worst(h: float, beta: float) -> float:
        matrices = [[[1 - h * c, beta], [-h * c, beta]] for c in np.geomspace(0.2, 20, 25)]
        return float(np.abs(np.linalg.eigvals(matrices)).max())

    grid = [worst(H * a, b) for a in np.linspace(0.5, 1.3, 33) for b in np.linspace(0.4, 0.95, 45)]
    assert worst(H, BETA) == pytest.approx(9 / 11, abs=1e-6)
    assert min(grid) > 9 / 11 - 1e-9
