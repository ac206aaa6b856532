"""Appendix a3: the data under its figures. The tests that hold its sentences stand with those of chapter 10."""

import numpy as np
from scipy.integrate import solve_ivp

from tests.book.reading import figure_data, line

CHAPTER = "a3"
X, Y = np.array([0.5, 1.0, 2.0]), np.array([0.25, 0.875, 0.75])


def test_one_step_of_each() -> None:
    """The implicit end solves its equation."""
    (axes,) = figure_data(CHAPTER)[0]
    curvatures, h = np.array([1.0, 10.0]), 0.25
    start, euler, implicit = (np.ravel(line(axes, name)) for name in ("start", "Euler", "implicit Euler"))
    np.testing.assert_allclose(euler, start - h * curvatures * start, rtol=1e-5)
    np.testing.assert_allclose(implicit, start - h * curvatures * implicit, rtol=1e-5)


def test_line_through_two_answers() -> None:
    (axes,) = figure_data(CHAPTER)[2]
    (times, answers), (middle, used) = line(axes, "answers"), line(axes, "used")
    np.testing.assert_allclose(np.polyval(np.polyfit(times, answers, 1), middle), used)
    np.testing.assert_allclose(1.5 * answers[1] - 0.5 * answers[0], used)


def test_factors() -> None:
    (axes,) = figure_data(CHAPTER)[1]
    for name, factor in (
        ("Euler", lambda z: 1 - z),
        ("implicit Euler", lambda z: 1 / (1 + z)),
        ("flow", lambda z: np.exp(-z)),
    ):
        z, found = line(axes, name)
        np.testing.assert_allclose(found, factor(z), atol=1e-5)


def test_errors_with_and_without_memory() -> None:
    """Both rules written out, beside SciPy's path."""
    (axes,) = figure_data(CHAPTER)[3]

    def slope(theta: np.ndarray) -> np.ndarray:
        a, b = theta
        hidden = np.tanh(a * X)
        error = 2 * (b * hidden - Y) / len(X)
        return np.array([error @ (b * (1 - hidden**2) * X), error @ hidden])

    start = np.array([1.0, -0.5])
    end = solve_ivp(lambda _, theta: -slope(theta), (0, 1), start, "DOP853", rtol=1e-13, atol=1e-15).y[:, -1]
    for name, memory in (("Euler", 0.0), ("Adams–Bashforth", 0.5)):
        for h, found in zip(*line(axes, name), strict=True):
            theta, last = start, slope(start)
            for _ in range(round(1 / h)):
                now = slope(theta)
                theta, last = theta - h * ((1 + memory) * now - memory * last), now
            np.testing.assert_allclose(found, np.linalg.norm(theta - end), rtol=1e-3)
