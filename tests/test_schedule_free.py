"""What a model holds, and when, that schedule-free AdamW trains: the point of gradients, or the average."""

import warnings
from typing import Any

import keras
import numpy as np
import pytest

import companion
from companion import ScheduleFreeAdamW, SwapAverage
from tests.kit.cases import thinned
from tests.kit.numbers import distance, identical

pytestmark = pytest.mark.usefixtures("dtype_put_back")

DRAW = np.random.default_rng(0)
X, Y = DRAW.normal(size=(24, 3)).astype("float32"), DRAW.normal(size=(24, 1)).astype("float32")
FIT: dict[str, Any] = {"batch_size": 8, "shuffle": False, "verbose": 0}


def model(optimizer: Any = None, **compiled: Any) -> keras.Model:
    keras.utils.set_random_seed(1)
    made = keras.Sequential([keras.Input((3,)), keras.layers.Dense(4, "tanh"), keras.layers.Dense(1)])
    made.compile(ScheduleFreeAdamW(0.1, warmup_steps=2) if optimizer is None else optimizer, "mse", **compiled)
    return made


def core(made: keras.Model) -> ScheduleFreeAdamW:
    (found,) = (
        layer for layer in companion.wrapping.wrapped_by(made.optimizer) if isinstance(layer, ScheduleFreeAdamW)
    )
    return found


def averages(made: keras.Model) -> list[np.ndarray]:
    return [slot.numpy() for slot in core(made).averages]


def state(made: keras.Model) -> list[np.ndarray]:
    return [*made.get_weights(), *(variable.numpy() for variable in made.optimizer.variables)]


def loss_at(weights: list[np.ndarray]) -> float:
    other = model()
    other.set_weights(weights)
    return float(other.evaluate(X, Y, verbose=0))


class Look(keras.callbacks.Callback):
    """Notes what the model holds."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: dict[str, list[Any]] = {"batch": [], "epoch": []}

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        self.seen["batch"].append(self.model.get_weights())

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        self.seen["epoch"].append((self.model.get_weights(), averages(self.model)))


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Four epochs with and without the callback, with validation, a checkpoint, and notes."""
    path = str(tmp_path_factory.mktemp("saved") / "{epoch}.keras")
    found: dict[str, Any] = {"path": path}
    for name in ("shown", "hidden"):
        look, made = Look(), model()
        saved = keras.callbacks.ModelCheckpoint(path)
        callbacks = [SwapAverage(), saved, look] if name == "shown" else [look]
        history = made.fit(X, Y, epochs=4, validation_data=(X, Y), callbacks=callbacks, **FIT)
        found[name] = (made, look.seen, history.history)
    return found


def test_what_is_looked_at_is_the_average(runs: dict[str, Any]) -> None:
    made, seen, history = runs["shown"]
    for epoch, (weights, average) in enumerate(seen["epoch"]):
        assert identical(weights, average)
        assert history["val_loss"][epoch] == pytest.approx(loss_at(average), rel=1e-5)
        file = keras.saving.load_model(runs["path"].format(epoch=epoch + 1))
        assert identical(file.get_weights(), average)
    assert identical(made.get_weights(), averages(made))


def test_training_does_not_notice(runs: dict[str, Any]) -> None:
    (shown, with_it, one), (hidden, without, other) = runs["shown"], runs["hidden"]
    assert one["loss"] == other["loss"]
    assert one["val_loss"] != other["val_loss"]
    assert all(identical(*pair) for pair in zip(with_it["batch"], without["batch"], strict=True))
    assert distance(shown.get_weights(), hidden.get_weights()) > 1e-3
    assert core(hidden).eval() is True
    assert core(hidden).eval() is False
    assert identical(state(shown), state(hidden))
    assert core(hidden).train() is True
    assert identical(hidden.get_weights(), without["batch"][-1])
    core(hidden).eval()


@pytest.mark.claim("The file then holds $x$, with a mark that says so; loaded, training goes on from θ.", chapter="16")
def test_a_file_that_holds_the_average_goes_on(runs: dict[str, Any]) -> None:
    """Also one of the second epoch."""
    resumed = keras.saving.load_model(runs["path"].format(epoch=2))
    look = Look()
    resumed.fit(X, Y, epochs=4, initial_epoch=2, callbacks=[SwapAverage(), look], **FIT)
    assert all(identical(*pair) for pair in zip(look.seen["batch"], runs["shown"][1]["batch"][6:], strict=True))
    assert identical(state(resumed), state(runs["shown"][0]))


class Kill(keras.callbacks.Callback):
    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        if int(self.model.optimizer.iterations) == 8:
            raise KeyboardInterrupt


@pytest.mark.parametrize("order", thinned([1, -1], 1))
def test_killed_and_restored(order: int, runs: dict[str, Any], tmp_path: Any) -> None:
    backup = lambda: keras.callbacks.BackupAndRestore(tmp_path, double_checkpoint=True)  # noqa: E731
    with pytest.raises(KeyboardInterrupt):
        model().fit(X, Y, epochs=4, callbacks=[*[SwapAverage(), backup()][::order], Kill()], **FIT)
    again = model()
    again.fit(X, Y, epochs=4, callbacks=[SwapAverage(), backup()][::order], **FIT)
    assert identical(state(again), state(runs["shown"][0]))


def multi(optimizer: Any) -> Any:
    paths = keras.optimizers.OptimizerMap(companion.SGD(0.01), {".*kernel": optimizer})
    return keras.optimizers.MultiOptimizer(paths)


WRAPPED = {
    "accumulation, an open window": lambda optimizer: companion.GradientAccumulation(optimizer, 2),
    "loss scale": lambda optimizer: keras.optimizers.LossScaleOptimizer(companion.CoalesceGradients(optimizer)),
    "several": multi,
    "EMA": lambda optimizer: ScheduleFreeAdamW(0.1, use_ema=True),
    "EMA that overwrites": lambda optimizer: ScheduleFreeAdamW(0.1, use_ema=True, ema_overwrite_frequency=2),
}


@pytest.mark.parametrize("wrap", thinned(WRAPPED.values(), *list(WRAPPED.values())[:4]), ids=WRAPPED)
def test_wrapped(wrap: Any) -> None:
    if wrap is multi and not hasattr(keras.optimizers, "MultiOptimizer"):
        pytest.skip("new in Keras 3.14")
    made = model(wrap(ScheduleFreeAdamW(0.1)))
    made.fit(X, Y, epochs=2, callbacks=[SwapAverage()], **FIT)
    assert identical([w.numpy() for w in core(made)._trainable_variables], averages(made))
    assert len(averages(made)) == (2 if wrap is multi else 4)
    assert distance(made.get_weights(), model().get_weights()) > 1e-2


def test_best_weights_stay_restored(runs: dict[str, Any]) -> None:
    best = keras.callbacks.EarlyStopping("val_loss", patience=9, restore_best_weights=True, mode="max")  # the worst
    made = model()
    made.fit(X, Y, epochs=4, validation_data=(X, Y), callbacks=[SwapAverage(), best], **FIT)
    weights, _ = runs["shown"][1]["epoch"][int(np.argmax(runs["shown"][2]["val_loss"]))]
    assert distance(made.get_weights(), weights) == 0
    assert distance(made.get_weights(), averages(made)) > 1e-3
    core(made).train()
    core(made).eval()
    assert distance(made.get_weights(), weights) < 1e-6  # the method goes on from them


def test_evaluate_alone_puts_back(runs: dict[str, Any]) -> None:
    made = model()
    made.fit(X, Y, **FIT)
    before = state(made)
    core(made).eval()
    shown = made.get_weights()
    core(made).train()
    assert identical(state(made), before)
    assert made.evaluate(X, Y, verbose=0, callbacks=[SwapAverage()]) == pytest.approx(loss_at(shown), rel=1e-6)
    predicted = made.predict(X, verbose=0, callbacks=[SwapAverage()])
    assert identical(state(made), before)
    core(made).eval()
    np.testing.assert_array_equal(predicted, made.predict(X, verbose=0))
    made.evaluate(X, Y, verbose=0, callbacks=[SwapAverage()])
    assert identical(made.get_weights(), shown)


def test_weights_that_were_set_move_the_method() -> None:
    """As if the problem had been shifted: by a checkpoint, by LocalSGD, by a callback of one's own."""
    weight, shifted = (keras.Variable(np.ones(3), dtype="float64") for _ in range(2))
    one, other = ScheduleFreeAdamW(0.1), ScheduleFreeAdamW(0.1)
    for step in range(6):
        if step == 3:
            shifted.assign(shifted + 5.0)
        given = DRAW.normal(size=3)
        one.apply([given], [weight])
        other.apply([given], [shifted])
    one.eval()
    other.eval()
    np.testing.assert_allclose(shifted.numpy() - 5, weight.numpy(), atol=1e-12)


def test_the_average_meets_a_constraint() -> None:
    weight = keras.Variable([1.0, 1.0], dtype="float64")
    weight.constraint = keras.constraints.NonNeg()
    optimizer, points = ScheduleFreeAdamW(0.5), []
    for _ in range(9):
        optimizer.apply([np.array([1.0, -1.0])], [weight])
        points.append(float(weight[0]))
    optimizer.eval()
    assert points[-1] > 0  # it slows down with the average
    z = np.array([0.5, *np.zeros(8)])
    np.testing.assert_allclose(weight.numpy(), [z.mean(), 1 + 0.5 * 5], rtol=1e-6)


def test_built_before_weights_are_loaded() -> None:
    weight = keras.Variable(np.ones(3), dtype="float64")
    optimizer = ScheduleFreeAdamW(1.0)
    optimizer.build([weight])
    weight.assign([7.0, 8.0, 9.0])
    optimizer.eval()
    np.testing.assert_array_equal(weight.numpy(), [7, 8, 9])
    optimizer.apply([np.ones(3)], [weight])
    np.testing.assert_allclose(weight.numpy(), [6, 7, 8], atol=1e-6)


@pytest.mark.slow
def test_under_xla_to_the_last_digit() -> None:
    made, plain = model(jit_compile=True), model()
    for each in (made, plain):
        each.fit(X, Y, epochs=3, callbacks=[SwapAverage()], **FIT)
    assert distance(made.get_weights(), plain.get_weights()) < 1e-5


@pytest.mark.parametrize("optimizer", ["adam", companion.GradientAccumulation(companion.Lion(), 2)])
def test_without_a_schedule_free_optimizer(optimizer: Any) -> None:
    made = model(optimizer)
    before = made.get_weights()
    for look in (made.fit, made.evaluate):
        with pytest.raises(ValueError, match=r"^SwapAverage .*ScheduleFreeAdamW.* Received: optimizer=<"):
            look(X, Y, verbose=0, callbacks=[SwapAverage()])
    assert identical(made.get_weights(), before)


def test_nothing_decays_twice() -> None:
    """Keras decays before the step by private names, of which this one must have been asked."""
    weight = keras.Variable(np.ones(2), dtype="float64")
    ScheduleFreeAdamW(0.5, weight_decay=0.5).apply([np.zeros(2)], [weight])
    np.testing.assert_array_equal(weight.numpy(), [0.75, 0.75])
    for name in ("_use_weight_decay", "_apply_weight_decay", "_get_variable_index"):
        assert callable(getattr(keras.optimizers.Optimizer, name))


def test_batch_norm_gathers_its_statistics_elsewhere() -> None:
    """At θ; the way out gathers those at x. A frozen one gathers nothing."""
    keras.utils.set_random_seed(1)
    norm = keras.layers.BatchNormalization(momentum=0.9, name="norm")
    made = keras.Sequential([keras.Input((3,)), keras.layers.Dense(2), norm, keras.layers.Dense(1)])
    made.compile(ScheduleFreeAdamW(0.3), "mse", run_eagerly=True)
    with pytest.warns(UserWarning, match=r"statistics.*call model\(batch, training=True\).*Received: \['norm'\]"):
        made.fit(X, Y, epochs=4, callbacks=[SwapAverage()], **FIT)
    exact = made.layers[0](X).numpy().mean(0)
    assert np.abs(norm.moving_mean.numpy() - exact).max() > 0.05
    for _ in range(200):
        made(X, training=True)
    np.testing.assert_allclose(norm.moving_mean.numpy(), exact, atol=1e-6)
    norm.trainable = False
    show = SwapAverage()
    show.set_model(made)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        show.on_train_begin()
