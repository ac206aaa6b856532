"""Checks for the exercises of chapter 13: a modified loss, a flow through given points, a penalty, and its say."""

from typing import Any

import numpy as np

from companion.exercises.answers import takes, truth

# ---- 1 --------------------------------------------------------------------------------------------------------------

_POINTS, _STEP_SIZES = np.array([-1.7, -0.6, 0.3, 1.4]), (0.1, 0.5)


def _modified(answer: Any) -> str | None:
    if not takes(answer, 2):
        return "give the function `modified` itself: it takes theta and h."
    found = [[answer(float(theta), h) for theta in _POINTS] for h in _STEP_SIZES]
    if any(value is None for row in found for value in row):
        return "`modified` returns None. It must return the value of the modified loss at theta."
    values = np.array(found, "float64")
    if values.shape != (2, 4):
        return f"for one theta and one h it must return one number. It returned the shape {values.shape[2:]}."
    loss, slope = (_POINTS**2 - 1) ** 2 / 4, _POINTS**3 - _POINTS
    h = np.array(_STEP_SIZES)[:, None]
    if np.allclose(values, loss + h / 4 * slope**2, rtol=1e-5):
        return None
    known = {
        "that is L itself. What do steps of size h add to it?": loss + 0 * h,
        "that is the penalty alone. The modified loss is L plus the penalty.": h / 4 * slope**2,
        "the penalty has the weight h/2 here. That weight belongs into the gradient; in the loss it is h/4.": (
            loss + h / 2 * slope**2
        ),
        "the penalty has the weight h here; Euler's is a quarter of that.": loss + h * slope**2,
        "the sign: gradient descent behaves as if steep places cost more, not less.": loss - h / 4 * slope**2,
        "the slope must be squared.": loss + h / 4 * slope,
        "the penalty takes the square of the slope, not its absolute value.": loss + h / 4 * np.abs(slope),
        "the penalty is made of the gradient of L; you have squared L itself.": loss + h / 4 * loss**2,
        "that is a gradient, not a loss.": slope + h / 2 * (3 * _POINTS**2 - 1) * slope,
        "the weight does not depend on h as it should: it is h/4, not h²/4.": loss + h**2 / 4 * slope**2,
        "derive L once more: (1/4)(θ² − 1)² has an inner derivative, 2θ.": (loss + h / 4 * ((_POINTS**2 - 1) / 2) ** 2),
    }
    for hint, wrong in known.items():
        if np.allclose(values, wrong, rtol=1e-6):
            return hint
    return "at theta = 0.3 and h = 0.1 the modified loss is 0.2089. Write L, then its derivative, then L + (h/4)(L′)²."


# ---- 2 --------------------------------------------------------------------------------------------------------------


def _flow_through(answer: Any) -> str | None:
    if not takes(answer, 2):
        return "give the function `flow_through` itself: it takes the curvature and h."
    stable = [(1.0, 0.1), (4.0, 0.2), (19.0, 0.05)]
    found = [answer(*pair) for pair in stable]
    if any(value is None for value in found):
        return "it returns None where hλ is below 1. There is a flow there: set its factor per step equal to Euler's."
    values = np.array(found, "float64")
    if values.shape != (3,):
        return f"it must return one number. It returned the shape {values.shape[1:]}."
    curvature, h = np.array(stable).T
    log = np.log(1 - h * curvature)
    if not np.allclose(values, -log / h, rtol=1e-5):
        return _hint_for_flow(values, curvature, h)
    for hopeless, why in (
        ((15.0, 0.1), "beyond hλ = 1 the points change sides at every step, and a flow cannot cross its minimum"),
        ((10.0, 0.1), "at hλ = 1 one step lands on the minimum, and no flow gets there in finite time"),
    ):
        try:
            with np.errstate(all="ignore"):
                given = answer(*hopeless)
        except (ValueError, ZeroDivisionError):  # of math.log
            given = 0.0
        if given is not None:
            return f"right below hλ = 1. But {why}: return None."
    return None


def _hint_for_flow(values: np.ndarray, curvature: np.ndarray, h: np.ndarray) -> str:
    x = h * curvature
    known = {
        "that is the curvature of L. Its flow passes beside the points, not through them.": curvature,
        "that is the first term of the series, the modified loss. The question is for all terms.": (
            curvature * (1 + x / 2)
        ),
        "that is a series cut off after its third term. The whole one has a closed form, a logarithm.": (
            curvature * (1 + x / 2 + x**2 / 3)
        ),
        "the sign: the flow must decay, as the points do.": np.log(1 - x) / h,
        "that is what happens in one step. Divide it by the time that a step takes.": -np.log(1 - x),
        "that is the factor of one step; which curvature has a flow with that factor?": 1 - x,
        "Euler's factor is 1 − hλ, not 1 + hλ.": np.log(1 + x) / h,
    }
    for hint, wrong in known.items():
        if np.allclose(values, wrong, rtol=1e-6):
            return hint
    return "a flow of curvature μ multiplies by exp(−μh) in the time of a step, Euler by 1 − hλ. Solve for μ."


# ---- 3 --------------------------------------------------------------------------------------------------------------

_MATRIX = np.array([[3.0, 1.0], [1.0, 2.0]])


class _Oracle:
    """The gradient of a quadratic with a quartic term, which counts its questions."""

    def __init__(self, quartic: float) -> None:
        self.quartic, self.questions = quartic, 0

    def __call__(self, values: Any) -> np.ndarray:
        self.questions += 1
        values = np.asarray(values, "float64")
        return _MATRIX @ values + self.quartic * values**3

    def penalised(self, values: np.ndarray, c: float) -> np.ndarray:
        slope = _MATRIX @ values + self.quartic * values**3
        return slope + 2 * c * (_MATRIX + 3 * self.quartic * np.diag(values**2)) @ slope


def _penalised(answer: Any) -> str | None:
    if not takes(answer, 2):
        return "give the function `penalised` itself: it takes the oracle and c."
    values, c = np.array([0.7, -0.4]), 0.01
    oracle = _Oracle(quartic=0.0)
    function = answer(oracle, c)
    if not callable(function):
        return "`penalised` must return a function of the values, as a gradient is one."
    found = function(values.copy())
    if found is None:
        return "the function that `penalised` returns gives None. It must return a gradient."
    found = np.asarray(found, "float64")
    if found.shape != (2,):
        return f"for values of the shape (2,) the answer must have the shape (2,), not {found.shape}."
    if not np.allclose(found, oracle.penalised(values, c), rtol=1e-5):
        return _hint_for_penalised(found, values, c)
    if oracle.questions > 2:
        return f"right, but the oracle was asked {oracle.questions} times. Two questions are enough."
    return _of_second_order(answer)


def _hint_for_penalised(found: np.ndarray, values: np.ndarray, c: float) -> str:
    slope = _MATRIX @ values
    along = _MATRIX @ slope
    known = {
        "that is the gradient of L, without a penalty.": slope,
        "the sign: ask uphill. Downhill, the penalty is taken away, as the midpoint method does.": slope
        - 2 * c * along,
        "you asked c uphill. The gradient of c‖∇L‖² is 2c ∇²L ∇L: go twice as far.": slope + c * along,
        "you asked c/2 uphill. That is half of the chapter's h; here c stands for h/4.": slope + c / 2 * along,
        "you asked 4c uphill, that is h. Half of it is enough.": slope + 4 * c * along,
        "both questions are added up. The second answer alone has the gradient and the penalty.": (
            2 * slope + 2 * c * along
        ),
        "that is the penalty's gradient alone. Add the gradient of L.": 2 * c * along,
        "c‖∇L‖² is a number to be differentiated. Multiplying the gradient by it is not its derivative.": (
            slope * (1 + c * slope @ slope)
        ),
        "that only scales the gradient. The penalty's gradient is 2c ∇²L ∇L, in another direction.": (
            slope * (1 + 2 * c)
        ),
    }
    for hint, wrong in known.items():
        if np.allclose(found, wrong, rtol=1e-6):
            return hint
    return (
        "on a quadratic the answer is not g + 2c∇²L g. Where must you ask so that the oracle itself multiplies by ∇²L?"
    )


def _of_second_order(answer: Any) -> str | None:
    """Right on a quadratic: does the error fall with c² where the curvature changes?"""
    values, oracle = np.array([0.7, -0.4]), _Oracle(quartic=1.0)
    errors = [np.abs(answer(oracle, c)(values.copy()) - oracle.penalised(values, c)).max() for c in (0.02, 0.01)]
    if errors[1] > 1e-6 and errors[0] < 3 * errors[1]:
        return "right on a quadratic. Where the curvature changes, the error does not fall with c²."
    return None


# ---- 4 --------------------------------------------------------------------------------------------------------------

_SAY = {"A": False, "B": True, "C": False, "D": False, "E": True}
_SAY_HINTS = {
    "A": "A has one minimum. Where else could a run end?",
    "B": "B is the valley of this chapter, and its tables say where runs at two rates end.",
    "C": "C has a line of minima, but look at the directions of its gradients: which points can a run reach at all?",
    "D": "D is B with weight decay. Is there still a curve of minima, and can the penalty move a minimum?",
    "E": "E has a curve of minima, and its gradients turn on the way down. Run it with two rates, near 0.001.",
}


def _say(answer: Any) -> str | None:
    if not isinstance(answer, dict) or set(answer) != set(_SAY):
        return "give a dictionary with the keys A, B, C, D and E."
    says = {key: truth(value) for key, value in answer.items()}
    if None in says.values():
        return "each value must be True or False."
    return next((_SAY_HINTS[key] for key, right in _SAY.items() if says[key] != right), None)


CHECKS = {"13.1": _modified, "13.2": _flow_through, "13.3": _penalised, "13.4": _say}
