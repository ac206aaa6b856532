"""Exercises of chapter 03: right answers are right, wrong ones get a hint that helps, and nothing raises."""

from typing import Any

import keras
import numpy as np

import companion
from companion.exercises.chapter_03 import resumed_runs
from tests.exercises.judge import judged


class _Variant(companion.Momentum):
    """Nesterov's form with room for mistakes."""

    def step(self, v: Any, g: Any, h: Any) -> Any:
        return self.momentum * v - h * g

    def update_step(self, gradient: Any, variable: Any, learning_rate: Any) -> None:
        h = keras.ops.cast(learning_rate, variable.dtype)
        v = self.velocities[self._get_variable_index(variable)]
        self.assign(v, self.momentum * v - h * gradient)
        self.assign_add(variable, self.step(v, gradient, h))


class _Plain(_Variant):
    def step(self, v: Any, g: Any, h: Any) -> Any:
        return v


class _SignError(_Variant):
    def step(self, v: Any, g: Any, h: Any) -> Any:
        return self.momentum * v + h * g


class _Brake(_Variant):
    def step(self, v: Any, g: Any, h: Any) -> Any:
        return -self.momentum * v - h * g


class _NoGradient(_Variant):
    def step(self, v: Any, g: Any, h: Any) -> Any:
        return self.momentum * v


class _Twice(_Variant):
    def step(self, v: Any, g: Any, h: Any) -> Any:
        return v - h * g


class _NoVelocity(_Variant):
    def step(self, v: Any, g: Any, h: Any) -> Any:
        return -h * g


class _NotKept(companion.Momentum):
    def update_step(self, gradient: Any, variable: Any, learning_rate: Any) -> None:
        h = keras.ops.cast(learning_rate, variable.dtype)
        self.assign_add(variable, -self.momentum * h * gradient - h * gradient)


class _InNumPy(companion.Momentum):
    def update_step(self, gradient: Any, variable: Any, learning_rate: Any) -> None:
        h, v = float(learning_rate), self.velocities[self._get_variable_index(variable)]
        self.assign(v, self.momentum * v - h * gradient)
        self.assign_add(variable, self.momentum * v - h * gradient)


class _Idle(companion.Momentum):
    def update_step(self, gradient: Any, variable: Any, learning_rate: Any) -> None:
        pass


class _OtherSignature(companion.Momentum):
    def update_step(self, gradient: Any) -> None:  # type: ignore[override]
        pass


class _Forced(companion.Momentum):
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs, nesterov=True)


class _ForcedLate(companion.Momentum):
    def update_step(self, gradient: Any, variable: Any, learning_rate: Any) -> None:
        self.nesterov = True
        super().update_step(gradient, variable, learning_rate)


class _VelocitySign(companion.Momentum):
    weight_sign = -1

    def update_step(self, gradient: Any, variable: Any, learning_rate: Any) -> None:
        h = keras.ops.cast(learning_rate, variable.dtype)
        v = self.velocities[self._get_variable_index(variable)]
        self.assign(v, self.momentum * v + h * gradient)
        self.assign_add(variable, self.momentum * v + self.weight_sign * h * gradient)


class _BothSigns(_VelocitySign):
    weight_sign = 1


class _FixedRate(_Variant):
    def update_step(self, gradient: Any, variable: Any, learning_rate: Any) -> None:
        super().update_step(gradient, variable, 0.01)


class _FixedMomentum(_Variant):
    def build(self, variables: list[Any]) -> None:
        super().build(variables)
        self.momentum = 0.9


class _Double(_Variant):
    def step(self, v: Any, g: Any, h: Any) -> Any:
        return 2 * v


RIGHT = [
    ("03.1", 0.64),
    ("03.1", np.float32(0.638)),
    ("03.2", _Variant),
    ("03.3", {"A": "counter", "B": "nothing", "C": "both", "D": "velocity"}),
    ("03.4", (4.75, 5.25)),
    ("03.4", [np.float64(4.75), 5.2501]),
    ("03.4", np.array([4.75, 5.25])),
]

WRONG = [
    ("03.1", None, "one number"),
    ("03.1", "0.64", "one number"),
    ("03.1", True, "one number"),
    ("03.1", [0.1, 0.2], "one number"),
    ("03.1", float("nan"), "one number"),
    ("03.1", 0.8, "β is its square"),
    ("03.1", 1.2, "[0, 1)"),
    ("03.1", -0.5, "[0, 1)"),
    ("03.1", 0.9, "changes its sign"),
    ("03.1", 0.99, "changes its sign"),
    ("03.1", 0.5, "larger"),
    ("03.1", 0.63, "Try 0.01 more"),
    ("03.2", None, "class"),
    ("03.2", "Nesterov", "class"),
    ("03.2", lambda gradient: gradient, "class"),
    ("03.2", dict, "inherits"),
    ("03.2", companion.Momentum(), "not an instance"),
    ("03.2", companion.Momentum, "plain momentum"),
    ("03.2", _Plain, "plain momentum"),
    ("03.2", _InNumPy, "right when called directly"),
    ("03.2", _SignError, "gradient enters"),
    ("03.2", _Brake, "against the gradient"),
    ("03.2", _NoGradient, "missing"),
    ("03.2", _Twice, "multiplied by β"),
    ("03.2", _NoVelocity, "no effect"),
    ("03.2", _NotKept, "not kept"),
    ("03.2", _Idle, "does not move"),
    ("03.2", _Forced, "`nesterov` argument"),
    ("03.2", _ForcedLate, "`nesterov` argument"),
    ("03.2", keras.optimizers.SGD, "inherits"),
    ("03.2", _VelocitySign, "against the gradient"),
    ("03.2", _BothSigns, "both lines"),
    ("03.2", _FixedRate, "always 0.01"),
    ("03.2", _FixedMomentum, "always 0.9"),
    ("03.2", _Double, "update 1 "),
    ("03.2", _OtherSignature, "TypeError"),
    ("03.2", companion.SGD, "inherits"),
    ("03.3", None, "dictionary"),
    ("03.3", "counter", "dictionary"),
    ("03.3", {"A": "counter"}, "dictionary"),
    ("03.3", {"A": "slots", "B": "nothing", "C": "both", "D": "velocity"}, "one of"),
    ("03.3", {"A": [], "B": "nothing", "C": "both", "D": "velocity"}, "one of"),
    ("03.3", {"A": "velocity", "B": "nothing", "C": "both", "D": "counter"}, "run A"),
    ("03.3", {"A": "counter", "B": "both", "C": "nothing", "D": "velocity"}, "run B"),
    ("03.3", {"A": "counter", "B": "nothing", "C": "velocity", "D": "both"}, "run C"),
    ("03.4", None, "two numbers"),
    ("03.4", "4.75", "two numbers"),
    ("03.4", 4.75, "two numbers"),
    ("03.4", (4.75, None), "two numbers"),
    ("03.4", ("4.75", "5.25"), "two numbers"),
    ("03.4", (5.25, 4.75), "direction"),
    ("03.4", np.array(4.75), "two numbers"),
    ("03.4", np.array([[4.75, 5.25], [4.75, 5.25]]), "two numbers"),
    ("03.4", (-995.0, 5.1), "SGD"),
    ("03.4", (5 - 0.25 * 3.1623, 5 + 0.25 * 3.1623), "without the bias corrections"),
    ("03.4", (4.75, 5.0), "second"),
    ("03.4", (4.0, 6.0), "t = 1"),
    ("03.4", (-0.25, 0.25), "It stood at 5"),
]


test_right_answers, test_wrong_answers_get_a_hint = judged(RIGHT, WRONG)


def test_resumed_runs_are_what_they_claim() -> None:
    """Each run, from the formulas in float64."""
    runs = resumed_runs()
    for run, (keeps_velocity, keeps_counter) in {
        "A": (True, False),
        "B": (True, True),
        "C": (False, False),
        "D": (False, True),
    }.items():
        v, t, lengths = 0.0, 0, []
        for update in range(20):
            if update == 10:
                v, t = v * keeps_velocity, t * keeps_counter
            v = 0.75 * v + 1 / (1 + t / 5)
            t += 1
            lengths.append(v)
        np.testing.assert_allclose(runs[run], lengths, rtol=1e-5)
