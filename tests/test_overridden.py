"""Holds that what stands in the place of Keras's own methods is asked, and what cannot be added up is refused."""

from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import ops

from companion import SAM, Heun, inject
from tests.kit.models import SGD, L, X, Y, compiled


def layers() -> list[Any]:
    keras.utils.set_random_seed(0)
    return [keras.Input((4,)), L.Dense(3, "tanh"), L.Dense(1)]


def with_its_own_methods() -> Any:
    """A model on which methods are set, as people do where they do not write a class."""
    model = keras.Sequential(layers())
    loss, metrics = model.compute_loss, model.compute_metrics
    model.compute_loss = lambda x, y, p, weight, training: loss(x, y, p, weight) + ops.mean(ops.abs(p))
    model.compute_metrics = lambda x, y, p, sample_weight=None: {**metrics(x, y, p, sample_weight), "seven": 7.0}
    return compiled(model)


def test_methods_that_are_set_on_a_model_are_its_own() -> None:
    right = with_its_own_methods()
    logs = right.train_step((X, Y))
    for parts, options in [(1, {}), (3, {"weight_fn": lambda x, y, weight: tf.shape(x)[0]})]:
        model = inject(with_its_own_methods(), parts, **options)
        found = model.train_step((X, Y))
        assert found.keys() == logs.keys() == {"loss", "seven"}
        np.testing.assert_allclose(found["loss"], logs["loss"], rtol=1e-5)
        for mine, theirs in zip(model.get_weights(), right.get_weights(), strict=True):
            np.testing.assert_allclose(mine, theirs, rtol=1e-4, atol=1e-6)
    with pytest.raises(ValueError, match=r"`compute_loss` of its own.*`weight_fn`"):
        inject(with_its_own_methods(), 3)


class Chosen(keras.Sequential):
    """Says itself what is trained."""

    @property
    def trainable_weights(self) -> Any:
        return self.layers[-1].trainable_weights


@pytest.mark.parametrize(("parts", "optimizer"), [(1, SGD), (3, SGD), (1, lambda rate: SAM(SGD(rate), rho=0.0))])
def test_trained_is_what_keras_step_trains(parts: int, optimizer: Any) -> None:
    right, model = (Chosen(layers()) for _ in range(2))
    right.compile(SGD(0.1), "mse")
    model.compile(optimizer(0.1), "mse")
    right.train_step((X, Y))
    first = model.layers[0].get_weights()
    inject(model, parts, check_finite=True).train_step((X, Y))
    assert all(map(np.array_equal, model.layers[0].get_weights(), first))
    for mine, theirs in zip(model.get_weights(), right.get_weights(), strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=1e-4, atol=1e-6)


class Centred(SGD):
    """Changes gradients where Keras's step hands them over."""

    def apply_gradients(self, grads_and_vars: Any) -> Any:
        return super().apply_gradients([(gradient - ops.mean(gradient), v) for gradient, v in grads_and_vars])


@pytest.mark.parametrize("parts", [1, 3])
def test_an_optimizer_is_handed_gradients_where_keras_hands_them(parts: int) -> None:
    right, model = (compiled(layers(), optimizer=Centred(0.1)) for _ in range(2))
    right.train_step((X, Y))
    inject(model, parts).train_step((X, Y))
    for mine, theirs in zip(model.get_weights(), right.get_weights(), strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=1e-4, atol=1e-6)


def test_what_overwrites_a_variable_is_not_added_up() -> None:
    def step(optimizer: Any, prepare: Any) -> Any:
        model = keras.Sequential(layers())
        model.layers[0].quantize("float8")
        model = prepare(compiled(model, optimizer=optimizer))
        before = model.get_weights()
        try:
            tf.function(model.train_step, autograph=False)((X, Y))
        finally:
            after = model.get_weights()
            moved = [not np.array_equal(one, other) for one, other in zip(before, after, strict=True)]
            assert not any(moved) or optimizer is right
        return after

    right = SGD(0.1)
    expected = step(right, lambda model: model)
    right = SGD(0.1)
    for mine, theirs in zip(step(right, inject), expected, strict=True):
        np.testing.assert_array_equal(mine, theirs)
    for optimizer, parts in [(SGD(0.1), 2), (Heun(0.1), 1)]:
        with pytest.raises(ValueError, match=r"(?s)float8.*in one part with an optimizer that asks once.*inputs_scale"):
            step(optimizer, lambda model, parts=parts: inject(model, parts))
