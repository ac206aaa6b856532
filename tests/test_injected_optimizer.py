"""Holds the contract of optimizers that ask several times: what a step may see, what it moves, and who is refused."""

import contextlib
import copy
import json
import pathlib
import pickle
from collections.abc import Callable
from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf

import companion
from companion import GradientOracle, Heun, InjectedOptimizer, RungeKutta, RungeKuttaChebyshev, eject, inject, injection
from tests.kit.cases import thinned
from tests.kit.dtypes import set_dtype
from tests.kit.integrators import (
    BATCHES,
    START,
    FromArray,
    X,
    Y,
    arrays,
    fitted,
    go,
    gradient,
    heun,
    layers,
    numpy_epochs,
    prepared,
    rk4,
    sequential,
)
from tests.kit.numbers import assert_close
from tests.kit.processes import on_devices, output_of

pytestmark = pytest.mark.usefixtures("float64")
L, P = keras.layers, keras.optimizers
WRONG = pytest.mark.xfail(strict=True, raises=AssertionError)


def assert_unmoved(model: Any, before: Any) -> None:
    for weight, value in zip(model.get_weights(), before, strict=True):
        np.testing.assert_array_equal(weight, value)
    assert int(model.optimizer.iterations) == 0


# 1. The same batch and the same noise for every question


class AsksAnew(GradientOracle):
    """Known wrong, the way of 2018: every question is a pass of its own, with a dropout mask of its own."""

    def __call__(self, values: Any = None) -> Any:
        self._asked, self._state = False, [tf.identity(variable) for variable in self._moving]
        return super().__call__(values)


oracles = pytest.mark.parametrize("kind", [GradientOracle, pytest.param(AsksAnew, marks=WRONG)])


def linear_loss(optimizer: Any, **options: Any) -> Any:
    """The weights of a model whose loss is linear in them, but for the dropout mask, after three steps."""
    keras.utils.set_random_seed(0)
    model = keras.Sequential([keras.Input((3,)), L.Dropout(0.5), L.Dense(2)])
    model.compile(optimizer, lambda y, p: keras.ops.mean(y * p), jit_compile=False, **options)
    for batch in BATCHES[:3]:
        inject(model).train_on_batch(X[batch], Y[batch])
    return model.get_weights()


@oracles
def test_on_a_loss_linear_in_the_weights_heun_is_euler(kind: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(injection, "GradientOracle", kind)
    found = linear_loss(Heun(0.25), run_eagerly=True)
    assert_close(found, linear_loss(RungeKutta(0.25, "euler"), run_eagerly=True), 0)


def test_on_a_loss_linear_in_the_weights_heun_is_euler_in_a_graph() -> None:
    assert_close(linear_loss(Heun(0.25)), linear_loss(RungeKutta(0.25, "euler")), 0)


# 2. What fit shows, and all that is not a weight, is as after one pass


def noisy() -> Any:
    return keras.Sequential([keras.Input((3,)), L.Dense(5, "tanh"), L.BatchNormalization(), L.Dropout(0.5), L.Dense(2)])


@oracles
@pytest.mark.parametrize("method", ["heun", "rk4"])
def test_state_and_metrics_are_as_after_a_step_of_sgd(kind: Any, method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(injection, "GradientOracle", kind)
    logs, states = [], []
    for optimizer in (RungeKutta(0.25, method), P.SGD(0.25)):
        keras.utils.set_random_seed(0)
        model = noisy()
        model.compile(optimizer, "mse", metrics=["mae"], run_eagerly=True)
        if isinstance(optimizer, RungeKutta):
            inject(model)
        logs.append(model.train_on_batch(X[:6], Y[:6], return_dict=True))
        states.append([variable.value.numpy() for variable in model.non_trainable_variables])
        states[-1] += [variable.value.numpy() for variable in model.metrics_variables]
    assert logs[0] == logs[1]
    assert len(states[0]) == 7  # two statistics, a seed, and two metrics of two numbers
    for mine, theirs in zip(*states, strict=True):
        np.testing.assert_array_equal(mine, theirs)


# 3. Between the questions the weights stay


class Watches(L.Layer):
    """Calls a function at every call: outside the scope in which a question replaces the weights."""

    look: Callable[[], None] | None = None

    def call(self, inputs: Any) -> Any:
        with keras.StatelessScope():
            if self.look and tf.executing_eagerly():  # not where only a shape is wanted
                self.look()
        return inputs


class StepsInPlace(Heun):
    """Known wrong: moves the weights to ask, and back."""

    model: Any = None

    def direction(self, oracle: Any, values: Any, learning_rate: Any) -> Any:
        first = oracle(values)
        for variable, value, slope in zip(self.model.trainable_variables, values, first, strict=True):
            variable.assign(value - learning_rate * slope)
        second = oracle()
        for variable, value in zip(self.model.trainable_variables, values, strict=True):
            variable.assign(value)
        return [(a + b) / 2 for a, b in zip(first, second, strict=True)]


@pytest.mark.parametrize("kind", [Heun, pytest.param(StepsInPlace, marks=WRONG)])
def test_the_weights_move_once(kind: Any) -> None:
    seen, watches = list[Any](), Watches()
    model = keras.Sequential([keras.Input((3,)), *layers(), watches])
    watches.look = lambda: seen.append(arrays(model))
    optimizer = kind(0.25)
    optimizer.model = model
    model.compile(optimizer, "mse", run_eagerly=True)
    inject(model)
    values = START
    for batch in BATCHES[:2]:
        seen.clear()
        model.train_on_batch(X[batch], Y[batch])
        assert len(seen) >= 2
        for each in seen:
            assert_close(each, values, 1e-14)
        values = arrays(model)
    assert_close(values, heun(lambda v: gradient(v, X[6:12], Y[6:12]), heun(gradient, START, 0.25), 0.25))


# 4. One learning rate for the whole step


@pytest.mark.parametrize("options", [{}, {"run_eagerly": True}], ids=str)
def test_a_schedule_stands_still_during_a_step(options: dict[str, Any]) -> None:
    model = fitted(prepared(Heun(P.schedules.ExponentialDecay(0.5, 1, 0.5)), **options))
    values, h = START, 0.5
    for batch in BATCHES:
        values = heun(lambda v, b=batch: gradient(v, X[b], Y[b]), values, h)
        h /= 2
    assert_close(arrays(model), values)
    assert int(model.optimizer.iterations) == 4


def test_a_callback_sets_the_learning_rate() -> None:
    halved = keras.callbacks.LearningRateScheduler(lambda epoch, rate: 0.5 / 2**epoch)
    model = fitted(prepared(Heun(0.1)), callbacks=[halved], epochs=2)
    values = numpy_epochs("heun", 0.5)
    for batch in BATCHES:
        values = heun(lambda v, b=batch: gradient(v, X[b], Y[b]), values, 0.25)
    assert_close(arrays(model), values)


# 5. Clipping, decay, averages and constraints act once, on the direction


@pytest.mark.parametrize(
    "options",
    [
        {"clipnorm": 0.1},
        {"clipvalue": 0.05},
        {"global_clipnorm": 0.2},
        {"weight_decay": 0.125},
        {"use_ema": True, "ema_momentum": 0.5, "ema_overwrite_frequency": 2},
        {"constraint": 0.9},
        {"loss_scale_factor": 64.0},
    ],
    ids=str,
)
def test_what_keras_does_to_a_gradient_it_does_once_to_the_direction(options: dict[str, Any]) -> None:
    """Keras's SGD is handed the direction of a step in NumPy."""
    options = dict(options)
    constraint = options.pop("constraint", None)

    def build() -> Any:
        model = sequential()
        for layer in model.layers if constraint else ():
            layer.kernel.constraint = keras.constraints.MaxNorm(constraint)
        return model

    model = fitted(prepared(Heun(0.5, **options), build, run_eagerly=True), epochs=2)
    reference, options = build(), {k: v for k, v in options.items() if k != "loss_scale_factor"}
    sgd = P.SGD(0.5, **options)
    sgd.build(reference.trainable_variables)
    for batch in BATCHES * 2:
        values = arrays(reference)
        limits = [layer.kernel.constraint if constraint else None for layer in reference.layers]

        def meets(at: Any, limits: Any = limits, values: Any = values) -> Any:  # kernels, where it asks again
            kernels = [
                limit(kernel) if limit and at is not values else kernel
                for limit, kernel in zip(limits, at[::2], strict=True)
            ]
            return [np.asarray(kernels[0]), at[1], np.asarray(kernels[1]), at[3]]

        end = heun(lambda v, b=batch, meets=meets: gradient(meets(v), X[b], Y[b]), values, 0.5)
        direction = [keras.ops.convert_to_tensor((v - e) / 0.5) for v, e in zip(values, end, strict=True)]
        sgd.apply(direction, reference.trainable_variables)
    assert_close(arrays(model), arrays(reference))
    if options or constraint:
        with pytest.raises(AssertionError):
            assert_close(arrays(model), numpy_epochs("heun", 0.5, 2), 1e-3)


# 6. Who is refused, before a weight moves


INJECTED: dict[str, Callable[..., Any]] = {
    "RungeKutta": RungeKutta,
    "Heun": Heun,
    "RK23": companion.RK23,
    "RK45": companion.RK45,
    "RungeKuttaChebyshev": RungeKuttaChebyshev,
    "ImplicitEuler": companion.ImplicitEuler,
    "SAM": lambda rate: companion.SAM(P.SGD(rate)),
}


def test_every_injected_optimizer_is_tested() -> None:
    public = [getattr(companion, name) for name in companion.__all__]
    found = {each.__name__ for each in public if isinstance(each, type) and issubclass(each, InjectedOptimizer)}
    assert found == {*INJECTED, "InjectedOptimizer"}


def assert_refuses_to_train(model: Any) -> None:
    before = model.get_weights()
    with pytest.raises(
        RuntimeError, match=r"asks for gradients itself.*`optimizer.inject\(model\)`.*It has changed nothing"
    ):
        model.fit(X, Y, verbose=0)
    assert_unmoved(model, before)


@pytest.mark.parametrize("name", INJECTED)
def test_without_injection_nothing_trains(name: str) -> None:
    model = sequential()
    model.compile(INJECTED[name](0.25), "mse", run_eagerly=True)
    assert_refuses_to_train(model)
    with pytest.raises(RuntimeError, match=f"{name} asks for gradients itself"):
        model.optimizer.apply(START, model.trainable_variables)
    assert_close(arrays(model), START, 0)


def test_without_injection_nothing_trains_in_a_graph_or_scaled() -> None:
    model = sequential()
    for optimizer in (Heun(0.25), P.LossScaleOptimizer(Heun(0.25))):
        model.compile(optimizer, "mse", jit_compile=False)
        assert_refuses_to_train(model)


class OwnStep(keras.Sequential):
    def train_step(self, data: Any) -> Any:
        return {}


def test_a_training_step_of_its_own_is_refused() -> None:
    model = OwnStep([keras.Input((3,)), *layers()])
    model.compile(Heun(0.25), "mse")
    with pytest.raises(ValueError, match=r"`train_step` of its own.*GradientOracle.*of class OwnStep"):
        model.optimizer.inject(model)


def test_accumulations_are_refused() -> None:
    model = sequential()
    for optimizer, message in (
        (Heun(0.25, gradient_accumulation_steps=2), "pass `micro_batches`.*gradient_accumulation_steps=2"),
        (companion.GradientAccumulation(Heun(0.25), 2), "must not be wrapped.*wrapped by GradientAccumulation"),
        (
            P.LossScaleOptimizer(companion.GradientAccumulation(Heun(0.25), 2)),
            "must not be wrapped.*wrapped by GradientAccumulation",
        ),
        (companion.CoalesceGradients(Heun(0.25)), "must not be wrapped.*wrapped by CoalesceGradients"),
    ):
        model.compile(optimizer, "mse", run_eagerly=True)
        with pytest.raises(ValueError, match=message):
            inject(model)
        with pytest.raises(RuntimeError, match=r"asks for gradients itself|2"):
            [model.train_on_batch(X, Y) for _ in range(2)]
        assert_close(arrays(model), START, 0)


@pytest.mark.skipif(not hasattr(P, "MultiOptimizer"), reason="this Keras has no MultiOptimizer")
@pytest.mark.parametrize("known", [True, False], ids=["when injected", "when built"])
def test_one_of_several_is_refused_before_another_moves(known: bool) -> None:
    optimizer = Heun(0.25)
    rules = P.OptimizerMap(optimizer, {".*bias": P.SGD(0.25)})
    model = sequential()
    several = P.MultiOptimizer(rules if known else lambda variable: rules[variable.path])
    unbuilt = keras.Sequential([keras.layers.BatchNormalization(), keras.layers.Dense(1)])
    for each in (unbuilt, model):
        each.compile(several, "mse", run_eagerly=True)
        with pytest.raises(ValueError, match=r"one of several: compile the model with it alone.*wrapped by Multi"):
            inject(each).train_on_batch(X, Y)
    assert known or np.all(unbuilt.layers[0].moving_mean == 0)
    assert_close(arrays(model), START, 0)
    with pytest.raises(ValueError, match="compile the model with it alone"):
        optimizer.step(companion.GradientOracle(model, (X, Y)))
    assert_close(arrays(model), START, 0)


def test_wrong_models() -> None:
    optimizer, model = Heun(0.25), sequential()
    for wrong, kind, message in (
        (model, ValueError, "`model` must be compiled with this optimizer first"),
        ("model", TypeError, "`model` must be a keras.Model. Received: model='model'"),
    ):
        with pytest.raises(kind, match=message):
            optimizer.inject(wrong)
    model.compile(Heun(0.25), "mse")  # another one
    with pytest.raises(ValueError, match="must be compiled with this optimizer"):
        optimizer.inject(model)
    with pytest.raises(ValueError, match="must be compiled"):
        inject(sequential())
    model.compile(optimizer, "mse")
    with pytest.raises(ValueError, match="Received: micro_batches=0"):
        optimizer.inject(model, 0)
    assert optimizer.inject(model, 2) is model


# 7. Cloned, copied and loaded models have lost the injection, and say so


def test_clones_and_copies_refuse_to_train(tmp_path: pathlib.Path) -> None:
    model = fitted(prepared(Heun(0.25), run_eagerly=True))
    clone = keras.models.clone_model(model)
    clone.compile(Heun(0.25), "mse", run_eagerly=True)
    assert_refuses_to_train(clone)
    model.save(tmp_path / "model.keras")
    for copied in (
        copy.deepcopy(model),
        pickle.loads(pickle.dumps(model)),
        keras.saving.load_model(tmp_path / "model.keras"),
    ):
        assert_close(arrays(copied), arrays(model), 0)
        before = arrays(copied)
        with pytest.raises(RuntimeError, match="again after cloning or loading"):
            fitted(copied)
        assert_close(arrays(copied), before, 0)
        assert int(copied.optimizer.iterations) == 4
        assert_close(arrays(fitted(inject(copied))), numpy_epochs("heun", epochs=2))


@keras.saving.register_keras_serializable("tests")
class Injected(companion.InjectedModel, keras.Model):
    micro_batches = 2


def injected_at_class_level() -> Any:
    inputs = keras.Input((3,))
    hidden, out = layers()
    return Injected(inputs, out(hidden(inputs)))


def test_a_model_injected_at_class_level_survives(tmp_path: pathlib.Path) -> None:
    model = injected_at_class_level()
    model.compile(Heun(0.25), "mse", jit_compile=False)
    assert_close(arrays(fitted(model)), numpy_epochs("heun"))
    clone = keras.models.clone_model(model)
    assert isinstance(clone, Injected)
    clone.compile(Heun(0.25), "mse", run_eagerly=True)
    clone.set_weights(START)
    assert_close(arrays(fitted(clone)), numpy_epochs("heun"))
    model.save(tmp_path / "model.keras")
    for again in (keras.saving.load_model(tmp_path / "model.keras"), copy.deepcopy(model)):
        assert_close(arrays(fitted(again)), numpy_epochs("heun", epochs=2))


def test_a_class_that_names_the_mixin_last_would_train_as_keras_does_and_is_refused() -> None:
    with pytest.raises(TypeError, match=r"Late must name InjectedModel first .*Received: Sequential, InjectedModel"):
        type("Late", (keras.Sequential, companion.InjectedModel), {"micro_batches": 2})


def test_ejected_it_refuses_and_injected_again_it_trains() -> None:
    model = prepared(Heun(0.25), run_eagerly=True)
    assert eject(model) is model
    assert "train_step" not in vars(model)
    assert_refuses_to_train(model)
    assert_close(arrays(fitted(inject(model))), numpy_epochs("heun"))


def test_after_an_error_in_its_direction_it_is_as_before() -> None:
    class Fails(Heun):
        fails = True

        def direction(self, oracle: Any, values: Any, learning_rate: Any) -> Any:
            oracle(values)
            if self.fails:
                raise ArithmeticError
            return super().direction(oracle, values, learning_rate)

    model = prepared(Fails(0.25), run_eagerly=True)
    with pytest.raises(ArithmeticError):
        fitted(model)
    assert_unmoved(model, START)
    with pytest.raises(RuntimeError, match="asks for gradients itself"):
        model.optimizer.apply(START, model.trainable_variables)
    model.optimizer.fails = False


# Saving and resuming


RESUMED: dict[str, Callable[[], Any]] = {
    "Heun with a schedule and averages": lambda: Heun(P.schedules.ExponentialDecay(0.5, 2, 0.5), use_ema=True),
    "RK23": lambda: companion.RK23(64.0, rtol=1e-2),
    "a tableau": lambda: RungeKutta(0.25, companion.gradient_flow.tableau("kutta3")),
    "RungeKuttaChebyshev": lambda: RungeKuttaChebyshev(0.5, 3),
    "ImplicitEuler": lambda: companion.ImplicitEuler(0.5, iterations=1, krylov_iterations=2),
    "AdamsBashforth2": lambda: companion.AdamsBashforth2(0.25),
    "OptimisticSGD": lambda: companion.OptimisticSGD(0.25),
}


@pytest.mark.parametrize("name", RESUMED)
def test_saved_loaded_and_resumed(name: str, tmp_path: pathlib.Path) -> None:
    model = fitted(prepared(RESUMED[name](), run_eagerly=True))
    model.save(tmp_path / "model.keras")
    loaded = inject(keras.saving.load_model(tmp_path / "model.keras"))
    for each in (model, loaded):
        fitted(each)
    assert_close(arrays(loaded), arrays(model), 0)
    with pytest.raises(AssertionError):
        assert_close(arrays(model), START, 1e-3)
    mine, theirs = ([v.value.numpy() for v in each.optimizer.variables] for each in (loaded, model))
    assert_close(mine, theirs, 0)
    if name == "RK23":
        assert int(loaded.optimizer.rejected) == int(model.optimizer.rejected) > 0
        assert float(loaded.optimizer.step_size) == float(model.optimizer.step_size) != 64.0


def test_weights_alone_resume_it_too(tmp_path: pathlib.Path) -> None:
    """`save_weights` and the optimizer's variables, which the averages of `BackupAndRestore` go through."""
    model = prepared(companion.RK23(64.0, rtol=1e-2), run_eagerly=True)
    backup = keras.callbacks.BackupAndRestore(tmp_path / "backup", delete_checkpoint=False)
    fitted(model, callbacks=[backup])
    other = prepared(companion.RK23(64.0, rtol=1e-2), run_eagerly=True)
    fitted(other, callbacks=[backup], epochs=2)
    assert_close(arrays(other), arrays(fitted(model)), 0)


# Other models: several outputs, embeddings, weights without a gradient


def by_tape(model: Any, x: Any, y: Any) -> Callable[[Any], Any]:
    """The gradient of a model in NumPy's arrays, by moving its weights there and back."""

    def ask(values: Any) -> Any:
        before = model.get_weights()
        for variable, value in zip(model.trainable_variables, values, strict=True):
            variable.assign(value)
        with tf.GradientTape() as tape:
            total = model.compute_loss(x, y, model(x, training=True))
        answers = tape.gradient(total, [variable.value for variable in model.trainable_variables])
        model.set_weights(before)
        return [
            np.zeros(variable.shape) if answer is None else tf.convert_to_tensor(answer).numpy()
            for answer, variable in zip(answers, model.trainable_variables, strict=True)
        ]

    return ask


def two_outputs() -> Any:
    inputs = keras.Input((3,))
    hidden = L.Dense(4, "tanh", kernel_regularizer="l2")(inputs)
    return keras.Model(inputs, {"a": L.Dense(1, name="a")(hidden), "b": L.Dense(3, name="b")(hidden)})


def test_several_outputs() -> None:
    keras.utils.set_random_seed(0)
    y = {"a": Y[:6, :1], "b": np.arange(6) % 3}
    losses = {"a": "mse", "b": keras.losses.SparseCategoricalCrossentropy(from_logits=True)}
    model = two_outputs()
    model.compile(Heun(0.25), losses, loss_weights={"a": 0.5, "b": 2.0}, jit_compile=False)
    expected = heun(by_tape(model, X[:6], y), arrays(model), 0.25)
    inject(model).train_on_batch(X[:6], y)
    assert_close(arrays(model), expected)


@pytest.mark.parametrize("optimizer", [Heun, companion.AdamsBashforth2])
def test_embeddings_are_as_dense_layers(optimizer: Any) -> None:
    ids, table = np.array([[1, 1, 3], [0, 3, 4]] * 3), np.linspace(-1, 1, 10).reshape(5, 2)
    ends = []
    for layer, x in (
        (L.Embedding(5, 2, embeddings_initializer=FromArray(table)), ids),
        (L.Dense(2, use_bias=False, kernel_initializer=FromArray(table)), np.eye(5)[ids]),
    ):
        head = L.Dense(2, kernel_initializer=FromArray(START[2][:2]))
        model = keras.Sequential([layer, L.GlobalAveragePooling1D(), L.Activation("tanh"), head])
        model.compile(optimizer(0.5), "mse", jit_compile=False)
        if optimizer is not companion.AdamsBashforth2:
            inject(model)
        for _ in range(3):
            model.train_on_batch(x, Y[:6])
        ends.append(arrays(model))
    assert_close(ends[0], ends[1])
    np.testing.assert_array_equal(ends[0][0][2], table[2])  # no example has this id


@pytest.mark.filterwarnings("ignore:Gradients do not exist")
@pytest.mark.parametrize("make", [lambda: Heun(0.25, weight_decay=0.25), lambda: companion.RK23(0.25)])
def test_a_weight_without_gradient_stays(make: Callable[[], Any]) -> None:
    class Spare(L.Dense):
        def build(self, shape: Any) -> None:
            super().build(shape)
            self.spare = self.add_weight(shape=(2,), initializer="ones")

    model = keras.Sequential([keras.Input((3,)), Spare(2)])
    model.compile(make(), "mse", run_eagerly=True)
    before = arrays(inject(model))
    model.train_on_batch(X, Y)
    np.testing.assert_array_equal(model.layers[0].spare, [1, 1])
    assert (arrays(model)[0] != before[0]).all()


# Micro-batches and replicas


@pytest.mark.parametrize(
    "make", [lambda: Heun(0.25), lambda: companion.RK23(0.5, rtol=1e-3), lambda: RungeKuttaChebyshev(0.5, 3)]
)
def test_in_parts_it_is_as_on_the_whole_batch(make: Callable[[], Any]) -> None:
    ends = []
    for parts in (1, 4):
        model = prepared(make(), micro_batches=parts, run_eagerly=True)
        model.fit(X[:20], Y[:20], batch_size=10, shuffle=False, verbose=0)
        ends.append(arrays(model))
    assert_close(ends[0], ends[1])


AT_TWO = {"Heun", "at class level", "adaptive", "SAM"}


def on_two_replicas(slow: bool) -> dict[str, Any]:
    """For each case the greatest difference, in a weight or the state, to the whole batch on one replica."""
    strategy = tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"])

    def train(make: Any, parts: int, scope: Any) -> Any:
        with scope:
            model = sequential() if parts else injected_at_class_level()
            model.compile(make(), "mse", jit_compile=False)
        if parts:
            inject(model, parts)
        data = tf.data.Dataset.from_tensor_slices((X, Y)).batch(13)  # shards of 7 and 6, then of 7 and 4
        logs = model.fit(data, epochs=2, verbose=0).history["loss"]
        state = [np.array(v) for v in model.optimizer.variables if v.dtype != "int64" or v.name == "rejected"]
        return [*arrays(model), np.array(logs), *state]

    def difference(make: Any, dtype: str = "float64", parts: int = 3) -> float:
        set_dtype(dtype)
        found, expected = train(make, parts, strategy.scope()), train(make, 1, contextlib.nullcontext())
        return max(float(np.abs(a - b).max()) for a, b in zip(found, expected, strict=True))

    cases: dict[str, Any] = {
        "Heun": (lambda: Heun(0.25),),
        "Heun in float32": (lambda: Heun(0.25), "float32"),
        "at class level": (lambda: Heun(0.25), "float64", 0),
        "clipped": (lambda: Heun(0.25, global_clipnorm=0.1), "float64", 1),
        "adaptive": (lambda: companion.RK23(8.0, rtol=1e-2),),
        "AdamsBashforth2": (lambda: companion.AdamsBashforth2(0.25),),
        "ImplicitEuler": (lambda: companion.ImplicitEuler(0.25, "fixed_point", 2),),
        "SAM": (lambda: companion.SAM(P.Adam(0.01)),),
    }
    found: dict[str, Any] = {}
    for name, case in cases.items():
        try:
            found |= {} if slow is (name in AT_TWO) else {name: difference(*case)}
        except Exception as error:  # the test shows it
            found[name] = f"{type(error).__name__}: {str(error)[-1500:]}"
    return found


def two_replicas(slow: bool) -> Any:
    return on_devices(
        2, f"from tests import test_injected_optimizer as t; print(json.dumps(t.on_two_replicas({slow})))"
    )


@pytest.mark.parametrize(
    "case",
    thinned(
        ["Heun", "Heun in float32", "at class level", "clipped", "adaptive", "AdamsBashforth2", "ImplicitEuler", "SAM"],
        *AT_TWO,
    ),
)
def test_two_replicas_with_micro_batches_are_as_the_whole_batch(case: str) -> None:
    found = two_replicas(case not in AT_TWO)[case]
    assert isinstance(found, float), found
    assert found < (1e-6 if case == "Heun in float32" else 1e-12)


# Half precision


@pytest.mark.parametrize("policy", ["mixed_float16", "mixed_bfloat16", "bfloat16"])
def test_half_precision_trains(policy: str) -> None:
    keras.config.set_floatx("float32")
    keras.config.set_dtype_policy(policy)
    model = fitted(prepared(Heun(0.25)), epochs=2)
    assert_close(arrays(model), numpy_epochs("heun", epochs=2), 0.1 if policy == "bfloat16" else 0.02)
    with pytest.raises(AssertionError):
        assert_close(arrays(model), START, 0.2)
    assert isinstance(model.optimizer, P.LossScaleOptimizer) == (policy == "mixed_float16")


class StepsItself(keras.Sequential):
    """Has a training step of its own, with the optimizer that Keras has wrapped."""

    def train_step(self, data: Any) -> Any:
        self.optimizer.inner_optimizer.step(GradientOracle(self, data))
        return {}


@pytest.mark.parametrize(
    ("make", "build"),
    [
        (lambda: Heun(1e-4), sequential),
        (lambda: companion.RK23(1e-4, rtol=1e-3), sequential),
        (lambda: Heun(1e-4), lambda: StepsItself([keras.Input((3,)), *layers()])),
    ],
    ids=["Heun", "RK23", "Heun in a step of one's own"],
)
def test_an_overflow_lowers_the_scale_and_moves_nothing(make: Callable[[], Any], build: Callable[[], Any]) -> None:
    keras.config.set_floatx("float32")
    keras.config.set_dtype_policy("mixed_float16")
    model = build()
    model.compile(make(), "mse", run_eagerly=True)
    if type(model) is keras.Sequential:
        inject(model)
    model.optimizer.build(model.trainable_variables)
    before, scale = model.get_weights(), float(model.optimizer.dynamic_scale)
    model.train_on_batch(X[:6], Y[:6] * 2e2)
    assert float(model.optimizer.dynamic_scale) == scale / 2
    assert_unmoved(model, before)
    for _ in range(12):
        model.train_on_batch(X[:6], Y[:6] * 2e2)
    assert scale / 2**12 < float(model.optimizer.dynamic_scale) < scale / 2
    assert 0 < int(model.optimizer.iterations) < 12
    assert all(np.isfinite(value).all() for value in arrays(model))
    assert any((mine != theirs).any() for mine, theirs in zip(model.get_weights(), before, strict=True))


# A reader's own method


class SAM(InjectedOptimizer):
    """As in the docstring of InjectedOptimizer."""

    def direction(self, oracle: Any, values: Any, learning_rate: Any) -> Any:
        slopes = oracle(values)
        norm = keras.ops.sqrt(sum(keras.ops.sum(slope**2) for slope in slopes))
        far = keras.ops.divide_no_nan(0.05, norm)
        return oracle([value + far * slope for value, slope in zip(values, slopes, strict=True)])


@pytest.mark.parametrize("options", [{}, {"jit_compile": True}], ids=str)
def test_sharpness_aware_minimisation(options: dict[str, Any]) -> None:
    model, values = fitted(prepared(SAM(0.25), **options)), START
    for batch in BATCHES:
        slopes = gradient(values, X[batch], Y[batch])
        norm = np.sqrt(sum((slope**2).sum() for slope in slopes))
        worse = gradient(go(values, -0.05 / norm, (1, slopes)), X[batch], Y[batch])
        values = go(values, 0.25, (1, worse))
    assert_close(arrays(model), values)


def test_the_oracle_without_values_asks_here_and_answers_are_dense() -> None:
    seen: dict[str, Any] = {}

    class Looks(InjectedOptimizer):
        def direction(self, oracle: Any, values: Any, learning_rate: Any) -> Any:
            seen.update(answers=oracle(), values=values, rate=learning_rate)
            return seen["answers"]

    set_dtype("float32")
    model = keras.Sequential([L.Embedding(5, 2), L.Flatten(), L.Dense(1)])
    model.compile(Looks(0.25), "mse", run_eagerly=True)
    inject(model).train_on_batch(np.array([[1, 1], [3, 0]]), np.ones((2, 1)))
    assert [type(answer).__name__ for answer in seen["answers"]] == ["EagerTensor"] * 3
    assert [answer.shape for answer in seen["answers"]] == [value.shape for value in seen["values"]]
    assert {tensor.dtype for tensor in [*seen["answers"], *seen["values"], seen["rate"]]} == {tf.float32}
    assert float(seen["rate"]) == 0.25


@pytest.mark.parametrize(
    "spoil",
    [
        lambda slopes: slopes[:-1],
        lambda slopes: [slopes[0][:1], *slopes[1:]],
        lambda slopes: [keras.ops.sum(slope) for slope in slopes],
        lambda slopes: [*slopes, slopes[0]],
        lambda slopes: slopes[::-1],
        lambda slopes: None,
        lambda slopes: [*slopes[:-1], None],
        lambda slopes: slopes[1],
    ],
)
def test_a_direction_of_wrong_shape_is_refused(spoil: Callable[[Any], Any]) -> None:
    class Spoiled(InjectedOptimizer):
        def direction(self, oracle: Any, values: Any, learning_rate: Any) -> Any:
            return spoil(oracle(values))

    model = prepared(Spoiled(0.25), run_eagerly=True)
    with pytest.raises(
        ValueError, match=r"`direction` of Spoiled must return a list with a tensor for each value, of its shape"
    ):
        fitted(model)
    assert_unmoved(model, START)


class InRows(L.Dense):
    """A dense layer for one row, of which TensorFlow makes one for all: the gradient of its kernel has no shape."""

    def call(self, inputs: Any) -> Any:
        return tf.vectorized_map(lambda row: keras.ops.matmul(row[None], self.kernel)[0] + self.bias, inputs)


def test_a_gradient_of_unknown_shape_has_that_of_its_weight() -> None:
    models = [keras.Sequential([keras.Input((3,)), layer(2, kernel_initializer="ones")]) for layer in (L.Dense, InRows)]
    for model in models:
        model.compile(Heun(0.25), "mse", jit_compile=False)
        inject(model).fit(X, Y, verbose=0)
    assert_close(models[1].get_weights()[0], models[0].get_weights()[0], 1e-12)


def test_a_direction_has_to_be_written() -> None:
    class Nothing(InjectedOptimizer):
        pass

    model = prepared(Nothing(0.25), run_eagerly=True)
    with pytest.raises(
        NotImplementedError, match=r"Nothing must define `direction\(self, oracle, values, learning_rate\)`"
    ):
        fitted(model)
    assert_unmoved(model, START)


# Two models and a training step of one's own


class Game(keras.Model):
    """A generator x = a z + b against a discriminator with the logit w x + c, each with an optimizer of its own."""

    def __init__(self, make: Callable[[], Any]) -> None:
        super().__init__()
        self.generator = keras.Sequential([keras.Input((1,)), L.Dense(1, kernel_initializer="ones")])
        self.discriminator = keras.Sequential([keras.Input((1,)), L.Dense(1, kernel_initializer="ones")])
        self.both = keras.Sequential([keras.Input((1,)), self.generator, self.discriminator])
        for model in (self.discriminator, self.both):
            model.compile(make(), keras.losses.BinaryCrossentropy(from_logits=True))

    def train_step(self, data: Any) -> Any:
        real, noise = data
        x = tf.concat([real, self.generator(noise)], 0)
        y = tf.concat([tf.ones_like(real), tf.zeros_like(noise)], 0)
        self.discriminator.trainable = True
        self.discriminator.optimizer.step(GradientOracle(self.discriminator, (x, y)))
        self.discriminator.trainable = False
        self.both.optimizer.step(GradientOracle(self.both, (noise, tf.ones_like(noise))))
        self.discriminator.trainable = True
        return {"loss": 0.0}


def numpy_game(step: Any, real: Any, noise: Any, rounds: int) -> Any:
    """The same, by hand: the slope of binary cross-entropy at a logit u is sigmoid(u) - y."""
    (a, b), (w, c) = (1.0, 0.0), (1.0, 0.0)

    def sigmoid(u: Any) -> Any:
        return 1 / (1 + np.exp(-u))

    for _ in range(rounds):
        x, y = np.concatenate([real, a * noise + b]), np.repeat([1.0, 0.0], len(real))

        def discriminator(v: Any, x: Any = x, y: Any = y) -> Any:
            slope = (sigmoid(v[0] * x + v[1]) - y) / len(x)
            return [(slope * x).sum(), slope.sum()]

        w, c = step(discriminator, [w, c], 0.25)

        def generator(v: Any, w: Any = w, c: Any = c) -> Any:
            slope = (sigmoid(w * (v[0] * noise + v[1]) + c) - 1) * w / len(noise)
            return [(slope * noise).sum(), slope.sum()]

        a, b = step(generator, [a, b], 0.25)
    return [a, b, w, c]


@pytest.mark.parametrize(
    ("make", "step", "options"),
    [
        (lambda: Heun(0.25), heun, {"run_eagerly": True}),
        (lambda: RungeKutta(0.25, "rk4"), rk4, {"jit_compile": False}),
    ],
    ids=["heun", "rk4"],
)
def test_two_models_in_a_training_step_of_ones_own(make: Any, step: Any, options: dict[str, Any]) -> None:
    game = Game(make)
    game.compile(**options)
    data = tf.data.Dataset.from_tensors((X[:5, :1] + 3, X[5:10, 1:2])).repeat(3)
    game.fit(data, verbose=0)
    found = [
        float(v.numpy().item()) for model in (game.generator, game.discriminator) for v in model.trainable_variables
    ]
    np.testing.assert_allclose(found, numpy_game(step, X[:5, 0] + 3, X[5:10, 1], 3), rtol=0, atol=1e-12)
    assert int(game.both.optimizer.iterations) == int(game.discriminator.optimizer.iterations) == 3


def test_a_step_needs_an_oracle() -> None:
    with pytest.raises(TypeError, match=r"`oracle` must be a companion.GradientOracle. Received: oracle=3"):
        Heun(0.25).step(3)  # type: ignore[arg-type]


# Another backend


def test_another_backend_is_refused_in_words() -> None:
    """What needs TensorFlow says so at its first use; the three rules, which do not, train."""
    printed = output_of(
        """
import json, keras, numpy as np, companion
model = keras.Sequential([keras.Input((1,)), keras.layers.Dense(1, kernel_initializer="ones")])
model.compile(companion.Adam(0.1), "mse")
before, found = model.get_weights(), {}
for name, attempt in {
    "inject": lambda: companion.inject(model),
    "GradientOracle": lambda: companion.GradientOracle(model, (np.ones((2, 1)), np.ones((2, 1)))),
    "Heun": lambda: companion.Heun(0.1),
    "GradientAccumulation": lambda: companion.GradientAccumulation(keras.optimizers.SGD(), 2),
    "CoalesceGradients": lambda: companion.CoalesceGradients(keras.optimizers.SGD()),
    "SkipGram": lambda: companion.SkipGram(10),
    "LocalSGD": lambda: companion.LocalSGD(1),
    "connect": lambda: companion.connect(),
}.items():
    try:
        attempt()
    except RuntimeError as error:
        found[name] = str(error)
assert all((a == b).all() for a, b in zip(before, model.get_weights()))
ends = []
for library in (companion, keras.optimizers):
    model.compile(library.Adam(0.1), "mse")
    model.set_weights(before)
    model.fit(np.array([[1.0], [2.0]]), np.zeros((2, 1)), epochs=3, verbose=0)
    ends.append([weight.tolist() for weight in model.get_weights()])
print(json.dumps([keras.backend.backend(), found, ends]))
""",
        KERAS_BACKEND="jax",
        CUDA_VISIBLE_DEVICES="",
    )
    backend, found, (ours, keras_own) = json.loads(printed.splitlines()[-1])
    assert (backend, len(found)) == ("jax", 8)
    for message in found.values():
        assert "set KERAS_BACKEND=tensorflow before Keras is imported. Received: backend='jax'" in message
    np.testing.assert_allclose(np.concatenate(ours, axis=None), np.concatenate(keras_own, axis=None), rtol=1e-6)
