"""Holds the gradients by hand against differences of the loss."""

import itertools

import numpy as np
import pytest

from tests.kit.network import flat, loss_and_gradient, unflat


@pytest.mark.parametrize("squares", [False, True])
@pytest.mark.parametrize("sizes", [(3, 2), (3, 4, 2), (3, 5, 4, 2)])
def test_the_gradient_by_hand_is_that_of_the_loss(sizes: tuple[int, ...], squares: bool) -> None:
    generator = np.random.default_rng(0)
    weights = [generator.normal(size=shape) for pair in itertools.pairwise(sizes) for shape in (pair, pair[1:])]
    x, y = generator.normal(size=(6, 3)), generator.normal(size=(6, 2)) if squares else generator.integers(0, 2, 6)
    theta, slope = flat(weights), flat(loss_and_gradient(weights, x, y, squares)[1])
    for place, small in enumerate(1e-6 * np.eye(theta.size)):
        ends = [loss_and_gradient(unflat(theta + way * small, weights), x, y, squares)[0] for way in (1, -1)]
        assert slope[place] == pytest.approx((ends[0] - ends[1]) / 2e-6, abs=1e-8)
