"""Holds what the oracle answers besides a compiled model's gradient: the loss, and a loss function of one's own."""

from collections.abc import Callable
from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import ops

import companion
from companion import GradientOracle, Heun, InjectedOptimizer, inject
from tests.kit.models import CASES, SGD

L = keras.layers


def numbers(*shape: int, seed: int = 0) -> Any:
    return np.random.default_rng(seed).normal(size=shape).astype("float32")


# The loss


WITH_A_LOSS = ["dense with regularizers and constraints", "captcha by add loss", "two outputs", "masked transformer"]


@pytest.mark.parametrize("parts", [1, 4])
@pytest.mark.parametrize("name", WITH_A_LOSS)
def test_the_loss_is_what_keras_reports(name: str, parts: int) -> None:
    case = CASES[name]()
    right = float(case.model.train_step(case.batch)["loss"])
    case = CASES[name]()
    oracle = GradientOracle(case.model, case.batch, parts)
    loss, gradients = oracle.value_and_gradient()
    assert float(loss) == pytest.approx(right, rel=1e-5)
    assert len(gradients) == len(case.model.trainable_variables)
    assert float(oracle.value_and_gradient(case.model.trainable_variables)[0]) == pytest.approx(right, rel=1e-5)


def test_the_loss_elsewhere_is_a_number_to_search_along() -> None:
    model = keras.Sequential(
        [keras.Input((2,)), L.Dense(1, use_bias=False, kernel_regularizer=keras.regularizers.L2(0.1))]
    )
    model.compile("sgd", "mse")
    x, y, kernel = numbers(5, 2), numbers(5, 1, seed=1), numbers(2, 1, seed=2)
    loss, _ = GradientOracle(model, (x, y), 2).value_and_gradient([kernel])
    assert float(loss) == pytest.approx(float(np.mean((x @ kernel - y) ** 2) + 0.1 * np.sum(kernel**2)), rel=1e-5)


# A loss function of one's own


class Autoencoder(keras.Model):
    """A variational autoencoder with the training step of the Keras examples, or one that asks an oracle."""

    def __init__(self, parts: int | None, optimizer: Any) -> None:
        super().__init__()
        self.encoder, self.decoder = L.Dense(4), L.Dense(3)
        self.shown, self.parts = keras.metrics.Mean(name="reconstruction"), parts
        self.compile(optimizer=optimizer)

    def call(self, inputs: Any) -> Any:
        return self.decoder(self.encoder(inputs)[:, :2])

    def loss_of(self, x: Any, y: Any, sample_weight: Any) -> Any:
        mean, log_variance = ops.split(self.encoder(x), 2, axis=-1)
        code = mean + ops.exp(log_variance / 2) * 0.3
        reconstruction = ops.mean(ops.sum((self.decoder(code) - x) ** 2, -1))
        self.shown.update_state(reconstruction)
        return reconstruction - 0.5 * ops.mean(1 + log_variance - mean**2 - ops.exp(log_variance))

    def train_step(self, data: Any) -> dict[str, Any]:
        data, _, _ = keras.utils.unpack_x_y_sample_weight(data)
        if self.parts is None:
            with tf.GradientTape() as tape:
                loss = self.loss_of(data, None, None)
            self.optimizer.apply(tape.gradient(loss, self.trainable_variables), self.trainable_variables)
            return {"loss": loss}
        oracle = GradientOracle(self, data, self.parts, loss=self.loss_of)
        if isinstance(self.optimizer, InjectedOptimizer):
            return {"loss": self.optimizer.step(oracle)}
        loss, gradients = oracle.value_and_gradient()
        self.optimizer.apply(gradients, self.trainable_variables)
        return {"loss": loss}


class HandWrittenHeun(Autoencoder):
    """Heun's method by two tapes."""

    def train_step(self, data: Any) -> dict[str, Any]:
        data, _, _ = keras.utils.unpack_x_y_sample_weight(data)

        def slopes() -> Any:
            with tf.GradientTape() as tape:
                loss = self.loss_of(data, None, None)
            return tape.gradient(loss, self.trainable_variables)

        start, here = [tf.identity(v) for v in self.trainable_variables], slopes()
        for variable, slope in zip(self.trainable_variables, here, strict=True):
            variable.assign_sub(0.1 * slope)
        for variable, value, one, two in zip(self.trainable_variables, start, here, slopes(), strict=True):
            variable.assign(value - 0.05 * (one + two))
        return {"loss": ops.sum(here[0])}


def trained(make: Callable[[], Any]) -> list[Any]:
    keras.utils.set_random_seed(0)
    model, x = make(), numbers(6, 3)
    model(x)
    model.fit(x, batch_size=6, epochs=3, verbose=0)
    return model.get_weights()


@pytest.mark.parametrize("parts", [1, 4])
@pytest.mark.parametrize(
    ("optimizer", "reference"),
    [
        (lambda: SGD(0.1), lambda: Autoencoder(None, SGD(0.1))),
        (lambda: Heun(0.1), lambda: HandWrittenHeun(None, SGD(0.1))),
    ],
    ids=["SGD", "Heun"],
)
def test_an_autoencoder_with_its_own_train_step(optimizer: Any, reference: Any, parts: int) -> None:
    mine, theirs = trained(lambda: Autoencoder(parts, optimizer())), trained(reference)
    for one, other in zip(mine, theirs, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-6)


def test_a_tracker_in_ones_own_loss_counts_one_question() -> None:
    model = Autoencoder(4, Heun(0.1))
    x = numbers(6, 3)
    model.optimizer.step(GradientOracle(model, x, 4, loss=model.loss_of))
    assert float(model.shown.count) == 3.0  # parts of two rows, once each


class Players(keras.Model):
    """A generator and a discriminator, two optimizers, each step by its own loss; neither player is compiled."""

    def __init__(self, parts: int | None, make: Callable[[], Any]) -> None:
        super().__init__()
        self.generator = keras.Sequential([keras.Input((2,)), L.Dense(3)])
        self.discriminator = keras.Sequential([keras.Input((3,)), L.Dense(4, "tanh"), L.Dense(1)])
        self.parts, self.optimizers = parts, {player: make() for player in ("generator", "discriminator")}
        self.compile(optimizer="sgd")

    def discriminator_loss(self, x: Any, y: Any, sample_weight: Any) -> Any:
        real, noise = x
        return ops.mean(
            ops.softplus(-self.discriminator(real)) + ops.softplus(self.discriminator(self.generator(noise)))
        )

    def generator_loss(self, x: Any, y: Any, sample_weight: Any) -> Any:
        return ops.mean(ops.softplus(-self.discriminator(self.generator(x[1]))))

    def train_step(self, data: Any) -> dict[str, Any]:
        (data,) = data if len(data) == 1 else (data,)
        for player in ("discriminator", "generator"):
            model, loss = getattr(self, player), getattr(self, f"{player}_loss")
            optimizer, variables = self.optimizers[player], getattr(self, player).trainable_variables
            if self.parts is None:
                with tf.GradientTape() as tape:
                    value = loss(data, None, None)
                optimizer.apply(tape.gradient(value, variables), variables)
            elif isinstance(optimizer, InjectedOptimizer):
                optimizer.step(GradientOracle(model, (data,), self.parts, loss=loss))
            else:
                optimizer.apply(GradientOracle(model, (data,), self.parts, loss=loss)(), variables)
        return {}


@pytest.mark.parametrize("parts", [1, 3])
@pytest.mark.parametrize("graph", [True, False])
def test_two_players_with_two_optimizers(parts: int, graph: bool) -> None:
    def weights(parts: int | None, make: Callable[[], Any]) -> Any:
        keras.utils.set_random_seed(0)
        model = Players(parts, make)
        step = tf.function(model.train_step, autograph=False) if graph else model.train_step
        for _ in range(3):
            step(((tf.constant(numbers(6, 3)), tf.constant(numbers(6, 2))),))
        return [variable.numpy() for variable in model.trainable_variables]

    for one, other in zip(weights(parts, lambda: SGD(0.1)), weights(None, lambda: SGD(0.1)), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-6)
    euler = lambda: companion.RungeKutta(method="euler", learning_rate=0.1)  # noqa: E731
    for one, other in zip(weights(parts, euler), weights(None, lambda: SGD(0.1)), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-6)


def test_a_sum_of_ones_own() -> None:
    model = keras.Sequential([keras.Input((2,)), L.Dense(1)])
    x = numbers(5, 2)
    total = lambda x, y, sample_weight: ops.sum(model(x) ** 2)  # noqa: E731
    whole, *_ = GradientOracle(model, x, loss=total)()
    parts, *_ = GradientOracle(model, x, 2, weight_fn="sum", loss=total)()
    by_rows, *_ = GradientOracle(model, x, 2, weight_fn=lambda x, y, w: 1.0, loss=lambda *batch: total(*batch) * 2)()
    np.testing.assert_allclose(parts, whole, rtol=1e-5)
    np.testing.assert_allclose(by_rows, whole, rtol=1e-5)


# Words


def test_both_errors_for_a_train_step_of_ones_own_name_the_way_out() -> None:
    model = Autoencoder(None, Heun(0.1))
    with pytest.raises(ValueError, match=r"optimizer\.step\(oracle\).*GradientOracle\(model, data, loss=function\)"):
        inject(model)
    with pytest.raises(RuntimeError, match=r"optimizer\.step\(oracle\).*GradientOracle\(model, data, loss=function\)"):
        model.train_on_batch(numbers(6, 3))


def test_the_way_out_for_an_optimizer_of_keras_steps_as_far_where_the_loss_is_scaled() -> None:
    def moved(asks: bool) -> list[Any]:
        keras.utils.set_random_seed(0)
        model = Autoencoder(None, keras.optimizers.LossScaleOptimizer(keras.optimizers.SGD(0.1)))
        x, optimizer = tf.constant(numbers(6, 3)), model.optimizer
        loss = lambda x, y, sample_weight: tf.reduce_mean(model(x) ** 2)  # noqa: E731
        model(x)
        if asks:
            oracle = GradientOracle(model, x, 2, loss=loss)
            slopes = [slope if slope is None else optimizer.scale_loss(slope) for slope in oracle()]
        else:
            with tf.GradientTape() as tape:
                scaled = optimizer.scale_loss(loss(x, None, None))
            slopes = tape.gradient(scaled, model.trainable_variables)
        optimizer.apply(slopes, model.trainable_variables)
        return model.get_weights()

    for mine, theirs in zip(moved(True), moved(False), strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=1e-4, atol=1e-6)


def test_what_is_wrong_with_a_question_is_said() -> None:
    model = keras.Sequential([keras.Input((2,)), L.Dense(1)])
    model.compile("sgd", "mse")
    x, y = numbers(4, 2), numbers(4, 1)
    with pytest.raises(ValueError, match=r"`data` must be one batch.*Received: data=None"):
        GradientOracle(model, None)
    with pytest.raises(ValueError, match=r"`data` must hold targets.*Received: y=None"):
        GradientOracle(model, x)
    with pytest.raises(ValueError, match=r"`values` must hold a tensor for each.*Received: values of shapes"):
        GradientOracle(model, (x, y))([np.ones((2, 1))])
    with pytest.raises(ValueError, match=r"`loss` must be a function.*Received: loss='mse'"):
        GradientOracle(model, (x, y), loss="mse")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"`loss` must return a scalar.*shape \(4, 1\)"):
        GradientOracle(model, x, loss=lambda x, y, w: model(x))()
    with pytest.raises(TypeError, match=r"`model` must be a keras\.Model\. Received: model=None"):
        companion.eject(None)  # type: ignore[arg-type]
    for parts in np.array([1, 2], "int64"):
        assert len(GradientOracle(model, (x, y), parts)()) == 2


def test_after_an_error_the_first_question_is_still_the_first() -> None:
    model = keras.Sequential([keras.Input((2,)), L.BatchNormalization(), L.Dense(1)])
    model.compile("sgd", "mse")
    oracle = GradientOracle(model, (numbers(4, 2), numbers(4, 1)))
    with pytest.raises(ValueError, match="`values`"):
        oracle([])
    before = model.layers[0].moving_mean.numpy()
    oracle()
    assert not np.array_equal(before, model.layers[0].moving_mean)


@pytest.mark.parametrize("parts", [1, 2])
def test_what_a_graph_has_been_answered_is_read_there_only(parts: int) -> None:
    model = keras.Sequential([keras.Input((2,)), L.BatchNormalization(), L.Dense(1)])
    model.compile("sgd", "mse")
    batch = tf.constant(numbers(4, 2)), tf.constant(numbers(4, 1))
    made = list[Any]()

    @tf.function(autograph=False)
    def ask(oracle: Any, factor: Any) -> Any:
        made.append(oracle or GradientOracle(model, batch, parts))
        return made[-1]()[-1] * factor

    before, again = GradientOracle(model, batch, parts), GradientOracle(model, batch, parts)
    right = before()[-1]
    np.testing.assert_allclose(ask(before, tf.constant(1.0)), right, rtol=1e-5)  # what was found eagerly, a graph reads
    ask(again, tf.constant(1.0))
    ask(None, tf.constant(1.0))
    for oracle in (again, made[-1]):
        for read in (oracle, lambda oracle=oracle: oracle.loss, lambda oracle=oracle: ask(oracle, tf.constant([1.0]))):
            with pytest.raises(ValueError, match=r"in a `tf.function` holds tensors that nothing else can read"):
                read()
