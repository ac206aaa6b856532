"""Holds `companion.runge_kutta` against the methods written out in NumPy, on a network differentiated by hand."""

import copy
import functools
import re
from collections.abc import Callable, Iterator
from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf

import companion
from companion import RK23, RK45, Heun, RungeKutta, RungeKuttaChebyshev, gradient_flow, inject
from companion.gradient_flow import ButcherTableau
from companion.oracle import GradientOracle

L = keras.layers


@pytest.fixture(autouse=True)
def float64() -> Iterator[None]:
    """Computes in float64, and puts back what a test may change for the whole process."""
    floatx, policy = keras.config.floatx(), keras.config.dtype_policy()
    set_dtype("float64")
    yield
    keras.config.set_floatx(floatx)
    keras.config.set_dtype_policy(policy)


def set_dtype(dtype: str) -> None:
    keras.config.set_floatx(dtype)
    keras.config.set_dtype_policy(dtype)


# A network in NumPy: three inputs, four hidden units, two outputs, the mean of squares


GENERATOR = np.random.default_rng(0)
X, Y = GENERATOR.normal(size=(24, 3)), GENERATOR.normal(size=(24, 2))
START = [GENERATOR.normal(size=shape) * 0.7 for shape in ((3, 4), (4,), (4, 2), (2,))]
BATCHES = [slice(begin, begin + 6) for begin in range(0, 24, 6)]

CLASSES = (Y[:6, :1] > 0).astype(float)

Values = list[Any]


def loss(values: Values, x: Any = X[:6], y: Any = Y[:6]) -> float:
    kernel, bias, out_kernel, out_bias = values
    return float(np.mean((np.tanh(x @ kernel + bias) @ out_kernel + out_bias - y) ** 2))


def gradient(values: Values, x: Any = X[:6], y: Any = Y[:6]) -> Values:
    kernel, bias, out_kernel, out_bias = values
    hidden = np.tanh(x @ kernel + bias)
    error = 2 * (hidden @ out_kernel + out_bias - y) / y.size
    inner = (error @ out_kernel.T) * (1 - hidden**2)
    return [x.T @ inner, inner.sum(0), hidden.T @ error, error.sum(0)]


def test_the_gradient_by_hand_is_that_of_the_loss() -> None:
    for index, slope in enumerate(gradient(START)):
        for place in np.ndindex(slope.shape):
            ends = []
            for small in (1e-6, -1e-6):
                values = [value.copy() for value in START]
                values[index][place] += small
                ends.append(loss(values))
            assert slope[place] == pytest.approx((ends[0] - ends[1]) / 2e-6, abs=1e-8)


# The methods, written out


def go(values: Values, h: float, *weighted: tuple[float, Values]) -> Values:
    """The values less h times the weighted slopes."""
    return [v - h * sum(w * slopes[i] for w, slopes in weighted) for i, v in enumerate(values)]


def euler(f: Any, y: Values, h: float) -> Values:
    return go(y, h, (1, f(y)))


def midpoint(f: Any, y: Values, h: float) -> Values:
    return go(y, h, (1, f(go(y, h / 2, (1, f(y))))))


def heun(f: Any, y: Values, h: float) -> Values:
    k1 = f(y)
    return go(y, h / 2, (1, k1), (1, f(go(y, h, (1, k1)))))


def ralston(f: Any, y: Values, h: float) -> Values:
    k1 = f(y)
    return go(y, h, (1 / 4, k1), (3 / 4, f(go(y, h * 2 / 3, (1, k1)))))


def extragradient(f: Any, y: Values, h: float) -> Values:
    return go(y, h, (1, f(go(y, h, (1, f(y))))))


def kutta3(f: Any, y: Values, h: float) -> Values:
    k1 = f(y)
    k2 = f(go(y, h / 2, (1, k1)))
    k3 = f(go(y, h, (-1, k1), (2, k2)))
    return go(y, h / 6, (1, k1), (4, k2), (1, k3))


def rk4(f: Any, y: Values, h: float) -> Values:
    k1 = f(y)
    k2 = f(go(y, h / 2, (1, k1)))
    k3 = f(go(y, h / 2, (1, k2)))
    k4 = f(go(y, h, (1, k3)))
    return go(y, h / 6, (1, k1), (2, k2), (2, k3), (1, k4))


def bogacki_shampine(f: Any, y: Values, h: float) -> Values:
    return bogacki_shampine_pair(f, y, h)[0]


def bogacki_shampine_pair(f: Any, y: Values, h: float) -> tuple[Values, Values]:
    """The result of order 3, and that of order 2."""
    k1 = f(y)
    k2 = f(go(y, h / 2, (1, k1)))
    k3 = f(go(y, h * 3 / 4, (1, k2)))
    end = go(y, h / 9, (2, k1), (3, k2), (4, k3))
    return end, go(y, h / 24, (7, k1), (6, k2), (8, k3), (3, f(end)))


def dormand_prince(f: Any, y: Values, h: float) -> Values:
    k1 = f(y)
    k2 = f(go(y, h / 5, (1, k1)))
    k3 = f(go(y, h / 40, (3, k1), (9, k2)))
    k4 = f(go(y, h / 45, (44, k1), (-168, k2), (160, k3)))
    k5 = f(go(y, h / 6561, (19372, k1), (-76080, k2), (64448, k3), (-1908, k4)))
    k6 = f(go(y, h, (9017 / 3168, k1), (-355 / 33, k2), (46732 / 5247, k3), (49 / 176, k4), (-5103 / 18656, k5)))
    return go(y, h, (35 / 384, k1), (500 / 1113, k3), (125 / 192, k4), (-2187 / 6784, k5), (11 / 84, k6))


def chebyshev_5(f: Any, y: Values, h: float) -> Values:
    """Hundsdorfer and Verwer 2003, V.1: the recurrence of the first-order method, with damping 0.05."""
    s, w0 = 5, 1 + 0.05 / 25
    angle = np.arccosh(w0)
    t = [np.cosh(j * angle) for j in range(s + 1)]
    w1 = t[s] * np.sinh(angle) / (s * np.sinh(s * angle))
    before, now = y, go(y, h * w1 / w0, (1, f(y)))
    for j in range(2, s + 1):
        mu, nu = 2 * w0 * t[j - 1] / t[j], -t[j - 2] / t[j]
        stepped = go(now, h * 2 * w1 / mu * t[j - 1] / t[j], (1, f(now)))
        before, now = now, [mu * a + nu * b + (1 - mu - nu) * c for a, b, c in zip(stepped, before, y, strict=True)]
    return now


METHODS: dict[str, tuple[Callable[..., Values], int]] = {
    "euler": (euler, 1),
    "midpoint": (midpoint, 2),
    "heun": (heun, 2),
    "ralston": (ralston, 2),
    "extragradient": (extragradient, 1),
    "kutta3": (kutta3, 3),
    "rk4": (rk4, 4),
    "bogacki_shampine": (bogacki_shampine, 3),
    "dormand_prince": (dormand_prince, 5),
    "chebyshev": (chebyshev_5, 1),
}


def optimizer_of(method: str, h: float = 0.25) -> Any:
    return RungeKuttaChebyshev(h) if method == "chebyshev" else RungeKutta(h, method)


def test_every_method_is_tested() -> None:
    assert set(METHODS) == {*gradient_flow.TABLEAUX, "chebyshev"}


# The same network in Keras


@keras.saving.register_keras_serializable("tests")
class FromArray(keras.initializers.Initializer):
    """Weights that a test knows."""

    def __init__(self, array: Any) -> None:
        self.array = np.array(array)

    def __call__(self, shape: Any, dtype: Any = None) -> Any:
        return keras.ops.convert_to_tensor(self.array, dtype)

    def get_config(self) -> dict[str, Any]:
        return {"array": self.array.tolist()}


def layers() -> list[Any]:
    kernels = [
        {"kernel_initializer": FromArray(k), "bias_initializer": FromArray(b)} for k, b in (START[:2], START[2:])
    ]
    return [L.Dense(4, "tanh", **kernels[0]), L.Dense(2, **kernels[1])]


def sequential() -> Any:
    return keras.Sequential([keras.Input((3,)), *layers()])


def functional() -> Any:
    inputs = keras.Input((3,))
    hidden, out = layers()
    return keras.Model(inputs, out(hidden(inputs)))


class Subclassed(keras.Model):
    def __init__(self) -> None:
        super().__init__()
        self.hidden, self.out = layers()

    def call(self, inputs: Any) -> Any:
        return self.out(self.hidden(inputs))


def unbuilt() -> Any:
    return keras.Sequential(layers())


def prepared(optimizer: Any, build: Callable[[], Any] = sequential, micro_batches: int = 1, **options: Any) -> Any:
    """A model that was made, compiled and injected."""
    model = build()
    model.compile(optimizer, "mse", **{"jit_compile": False, **options})
    return inject(model, micro_batches)


def arrays(model: Any) -> Values:
    return [np.array(keras.ops.cast(variable, "float64")) for variable in model.trainable_variables]


def assert_close(found: Values, expected: Values, tolerance: float = 1e-12) -> None:
    for mine, theirs in zip(found, expected, strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=0, atol=tolerance)


def numpy_epochs(method: str, h: float = 0.25, epochs: int = 1) -> Values:
    """The weights after steps on each batch."""
    values = START
    for batch in BATCHES * epochs:
        values = METHODS[method][0](lambda v, b=batch: gradient(v, X[b], Y[b]), values, h)
    return values


def fitted(model: Any, **options: Any) -> Any:
    model.fit(X, Y, batch_size=6, shuffle=False, verbose=0, **options)
    return model


@functools.cache
def compiled(method: str, dtype: str) -> Any:
    set_dtype(dtype)
    return prepared(optimizer_of(method))


@pytest.mark.parametrize(("dtype", "tolerance"), [("float64", 1e-12), ("float32", 2e-7)])
@pytest.mark.parametrize("method", METHODS)
def test_every_method_is_that_of_numpy(method: str, dtype: str, tolerance: float) -> None:
    model = compiled(method, dtype)
    model.set_weights(START)
    assert_close(arrays(fitted(model)), numpy_epochs(method), tolerance)
    assert {variable.dtype for variable in model.trainable_variables} == {dtype}


def logistic_gradient(weight: Any) -> Any:
    return X[:6].T @ (1 / (1 + np.exp(-(X[:6] @ weight))) - CLASSES) / 6


@functools.cache
def logistic_flow() -> Any:
    """Where the flow of a logistic regression is at time 4."""
    import scipy.integrate

    return scipy.integrate.solve_ivp(
        lambda time, w: -logistic_gradient(w[:, None])[:, 0], (0, 4), START[0][:, 0], "DOP853", rtol=1e-13, atol=1e-15
    ).y[:, -1:]


@pytest.mark.parametrize("method", METHODS)
def test_observed_order(method: str) -> None:
    model = keras.Sequential([keras.Input((3,)), L.Dense(1, None, False)])
    model.compile(optimizer_of(method), keras.losses.BinaryCrossentropy(from_logits=True), jit_compile=False)
    inject(model)
    batch, errors, counts = tf.data.Dataset.from_tensors((X[:6], CLASSES)), [], np.array([32, 128])
    for count in counts:
        model.set_weights([START[0][:, :1]])
        model.optimizer.learning_rate = 4 / count
        model.fit(batch.repeat(count), verbose=0)
        errors.append(np.linalg.norm(arrays(model)[0] - logistic_flow()))
    assert gradient_flow.observed_order(4 / counts, errors) == pytest.approx(METHODS[method][1], abs=0.1)


# Every kind of model, every way to run


@pytest.mark.parametrize(
    ("build", "options"),
    [
        (sequential, {"jit_compile": True}),
        (functional, {"run_eagerly": True}),
        (Subclassed, {"steps_per_execution": 2}),
        (Subclassed, {"run_eagerly": True}),
        (unbuilt, {"steps_per_execution": 3}),
        (unbuilt, {"jit_compile": True}),
    ],
)
def test_models_and_modes(build: Callable[[], Any], options: dict[str, Any]) -> None:
    model = fitted(prepared(RungeKutta(0.25, "kutta3"), build, **options), epochs=2)
    assert_close(arrays(model), numpy_epochs("kutta3", epochs=2))
    assert int(model.optimizer.iterations) == 8


def test_train_on_batch_and_the_size_of_a_batch_may_change() -> None:
    model, values = prepared(Heun(0.25)), START
    for size in (3, 14, 1, 24):
        shown = model.train_on_batch(X[:size], Y[:size])
        assert shown == pytest.approx(loss(values, X[:size], Y[:size]), rel=1e-9) or size != 3  # later: a running mean
        values = heun(lambda v, n=size: gradient(v, X[:n], Y[:n]), values, 0.25)
    assert_close(arrays(model), values)


def test_the_named_classes() -> None:
    for named, method in ((Heun, "heun"), (RK23, "bogacki_shampine"), (RK45, "dormand_prince")):
        optimizer = named(0.25, rtol=None)
        assert optimizer.tableau is gradient_flow.TABLEAUX[method]
        model = fitted(prepared(optimizer, run_eagerly=True))
        assert_close(arrays(model), numpy_epochs(method))
    assert RK23().rtol == RK45().rtol == 1e-3
    assert Heun().rtol is None
    assert RungeKutta().tableau is gradient_flow.TABLEAUX["heun"]
    assert RungeKutta(method="rk45").tableau is gradient_flow.TABLEAUX["dormand_prince"]


THREE_EIGHTHS = ButcherTableau(
    [[0, 0, 0, 0], [1 / 3, 0, 0, 0], [-1 / 3, 1, 0, 0], [1, -1, 1, 0]],
    [1 / 8, 3 / 8, 3 / 8, 1 / 8],
    [0, 1 / 3, 2 / 3, 1],
    4,
)


def test_a_tableau_of_the_users_own() -> None:
    model = fitted(prepared(RungeKutta(0.25, THREE_EIGHTHS), run_eagerly=True))
    values = START
    for batch in BATCHES:
        f = lambda v, b=batch: gradient(v, X[b], Y[b])  # noqa: E731
        k1 = f(values)
        k2 = f(go(values, 0.25 / 3, (1, k1)))
        k3 = f(go(values, 0.25 / 3, (-1, k1), (3, k2)))
        k4 = f(go(values, 0.25, (1, k1), (-1, k2), (1, k3)))
        values = go(values, 0.25 / 8, (1, k1), (3, k2), (3, k3), (1, k4))
    assert_close(arrays(model), values)
    again = keras.optimizers.deserialize(keras.optimizers.serialize(model.optimizer))
    assert again.tableau == THREE_EIGHTHS


def test_configurations_come_back() -> None:
    for optimizer in (
        RungeKutta(0.5, "rk4", clipnorm=2.0, name="mine"),
        RungeKutta(0.5, "rk45", rtol=0.01, atol=1e-4),
        RungeKutta(keras.optimizers.schedules.ExponentialDecay(0.5, 10, 0.9), "rk23"),
        Heun(0.5, weight_decay=0.25),
        RK23(0.5, rtol=0.125),
        RK45(0.5, atol=0.0),
        RungeKuttaChebyshev(0.5, stages=3, damping=0.25),
    ):
        serialized = keras.optimizers.serialize(optimizer)
        again = keras.optimizers.deserialize(copy.deepcopy(serialized))  # Keras changes what it reads
        assert type(again) is type(optimizer)
        assert keras.optimizers.serialize(again) == serialized
    assert RK23(0.5).get_config()["learning_rate"] == 0.5


# The number of questions


@pytest.mark.parametrize(
    ("make", "questions"),
    [
        (lambda: RungeKutta(0.1, "euler"), 1),
        (lambda: Heun(0.1), 2),
        (lambda: Heun(0.1, rtol=0.1), 2),
        (lambda: RungeKutta(0.1, "extragradient"), 2),
        (lambda: RungeKutta(0.1, "rk4"), 4),
        (lambda: RK23(0.1, rtol=None), 3),
        (lambda: RK23(0.1), 4),
        (lambda: RK45(0.1, rtol=None), 6),
        (lambda: RK45(0.1), 7),
        (lambda: RungeKuttaChebyshev(0.1, stages=3), 3),
        (lambda: companion.ImplicitEuler(0.1), 12),
        (lambda: companion.ImplicitEuler(0.1, iterations=1, krylov_iterations=3), 4),
        (lambda: companion.ImplicitEuler(0.1, "fixed_point", iterations=3), 4),
    ],
)
def test_no_needless_question(make: Callable[[], Any], questions: int, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    answer = GradientOracle.__call__

    def counting(self: Any, values: Any = None) -> Any:
        asked.append(values)
        return answer(self, values)

    monkeypatch.setattr(GradientOracle, "__call__", counting)
    fitted(prepared(make(), run_eagerly=True))
    assert len(asked) == 4 * questions


class ReusesTheLastStage(RungeKutta):
    """Known wrong: the last question of a step as the first of the next. That one is about another batch."""

    last: Any = None

    def direction(self, oracle: Any, values: Any, learning_rate: Any) -> Any:
        answers: list[Any] = []

        def ask(at: Any) -> Any:
            answers.append(self.last if not answers and self.last else oracle(at))
            return answers[-1]

        found = super().direction(ask, values, learning_rate)
        self.last = oracle([v - learning_rate * d for v, d in zip(values, found, strict=True)])
        return found


@pytest.mark.parametrize(
    "kind", [RungeKutta, pytest.param(ReusesTheLastStage, marks=pytest.mark.xfail(strict=True, raises=AssertionError))]
)
@pytest.mark.parametrize("method", ["bogacki_shampine", "dormand_prince"])
def test_first_same_as_last_is_not_used_across_batches(kind: Any, method: str) -> None:
    model = fitted(prepared(kind(0.25, method), run_eagerly=True))
    assert_close(arrays(model), numpy_epochs(method))


# Adaptive steps


class Control:
    """Integral control of the pair of Bogacki and Shampine, written from Hairer, Nørsett and Wanner, II.4."""

    def __init__(self, first: float, rtol: float, atol: float) -> None:
        self.size, self.floor, self.rtol, self.atol, self.rejected = first, 1e-6 * first, rtol, atol, 0

    def step(self, f: Any, values: Values) -> Values:
        h = float(np.float32(self.size))  # Keras's learning rate
        end, other = bogacki_shampine_pair(f, values, h)
        shares = [
            (a - b) / (self.atol + self.rtol * np.maximum(abs(v), abs(a)))
            for a, b, v in zip(end, other, values, strict=True)
        ]
        error = float(np.sqrt(np.mean(np.concatenate([share.ravel() for share in shares]) ** 2)))
        factor = min(5.0, max(0.2, 0.9 * error ** (-1 / 3)))
        self.size = max(self.size * factor, self.floor)
        if error <= 1:
            return end
        self.rejected += 1
        return values


@pytest.mark.parametrize(
    ("first", "options"), [(1e-3, {}), (64.0, {"jit_compile": True}), (0.5, {"run_eagerly": True})]
)
def test_adaptive_steps_are_those_of_the_rule(first: float, options: dict[str, Any]) -> None:
    model = prepared(RK23(first, rtol=1e-3, atol=1e-4), **options)
    control, values, sizes = Control(float(np.float32(first)), 1e-3, 1e-4), START, list[float]()
    assert float(model.optimizer.step_size) == control.size
    for index in range(20):
        batch = BATCHES[index % 4]
        model.train_on_batch(X[batch], Y[batch])
        tried, before = control.size, control.rejected
        values = control.step(lambda v, b=batch: gradient(v, X[b], Y[b]), values)
        assert float(model.optimizer.step_size) == pytest.approx(control.size, rel=1e-9)
        assert int(model.optimizer.rejected) == control.rejected
        assert float(model.optimizer.learning_rate) == pytest.approx(tried, rel=1e-7)
        assert_close(arrays(model), values)
        sizes += [tried] if control.rejected == before else []
    assert int(model.optimizer.iterations) == 20
    assert control.rejected >= (2 if first > 1 else 0)
    assert sizes


@pytest.mark.parametrize("options", [{}, {"run_eagerly": True}], ids=str)
def test_what_is_not_finite_is_a_rejected_step(options: dict[str, Any]) -> None:
    model = prepared(RK23(0.25, rtol=10.0), **options)
    bad = X[:6].copy()
    bad[2, 1] = np.nan
    for rejected in (1, 2):
        model.train_on_batch(bad, Y[:6])
        assert_close(arrays(model), START, 0)
        assert int(model.optimizer.rejected) == rejected
        assert float(model.optimizer.step_size) == pytest.approx(0.25 * 0.2**rejected)
    model.train_on_batch(X[:6], Y[:6])
    assert_close(arrays(model), bogacki_shampine(gradient, START, float(np.float32(0.01))), 1e-9)
    assert int(model.optimizer.rejected) == 2
    for _ in range(15):
        model.train_on_batch(bad, Y[:6])
    assert float(model.optimizer.step_size) == pytest.approx(0.25e-6)
    assert all(np.isfinite(value).all() for value in arrays(model))


def test_at_the_floor_every_finite_step_is_taken() -> None:
    model = prepared(RK23(0.25, rtol=1e-30, atol=0.0), run_eagerly=True)
    for _ in range(9):
        model.train_on_batch(X[:6], Y[:6])
    assert int(model.optimizer.rejected) == 9
    assert_close(arrays(model), START, 0)
    assert float(model.optimizer.step_size) == pytest.approx(0.25e-6)
    model.train_on_batch(X[:6], Y[:6])
    assert int(model.optimizer.rejected) == 9
    assert float(model.optimizer.step_size) == pytest.approx(0.25e-6)
    assert_close(arrays(model), go(START, 0.25e-6, (1, gradient(START))), 1e-11)


def test_an_error_of_zero_lets_the_step_grow() -> None:
    model = keras.Sequential([keras.Input((1,)), L.Dense(1, None, False, "ones")])
    model.compile(Heun(0.5, rtol=1e-3), lambda y, p: keras.ops.mean(p), run_eagerly=True)
    inject(model).train_on_batch(np.ones((1, 1)), np.ones((1, 1)))
    assert float(model.optimizer.step_size) == 2.5
    assert float(model.layers[0].kernel[0, 0]) == 0.5
    model.set_weights([np.zeros((1, 1))])  # values of 0, and nothing allowed of them
    model.compile(Heun(0.5, rtol=1e-3, atol=0.0), lambda y, p: keras.ops.sum(0 * p), run_eagerly=True)
    inject(model).train_on_batch(np.ones((1, 1)), np.ones((1, 1)))
    assert float(model.optimizer.step_size) == 2.5
    assert int(model.optimizer.rejected) == 0


def test_adaptive_steps_end_up_at_the_limit_of_stability() -> None:
    """On a quadratic of curvature 2 the mean of h λ is near 2.51, whatever the tolerance."""
    model = keras.Sequential([keras.Input((2,)), L.Dense(1, None, False, "ones")])
    model.compile(RK23(0.01, rtol=1e-3), "mse", jit_compile=False)
    inject(model)
    x, y = np.diag([2**0.5, 0.05]), np.zeros((2, 1))  # curvatures 2 and 0.0025
    sizes = []
    for _ in range(200):
        model.train_on_batch(x, y)
        sizes.append(float(model.optimizer.step_size))
    assert 2.3 < np.median(sizes[100:]) * 2 < 2.7


# Errors


SCHEDULE = keras.optimizers.schedules.ExponentialDecay(0.1, 10, 0.9)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"method": "heum"}, "`method` must be a ButcherTableau or one of 'euler', 'midpoint', 'heun'"),
        ({"method": None}, "Received: method=None"),
        ({"method": "rk4", "rtol": 1e-3}, "needs a method with embedded weights, such as 'midpoint', 'heun'"),
        ({"method": THREE_EIGHTHS, "rtol": 1e-3}, "needs a method with embedded weights"),
        ({"rtol": -1e-3}, "`rtol` must be a finite number greater than 0. Received: rtol=-0.001"),
        ({"rtol": 0.0}, "Received: rtol=0.0"),
        ({"rtol": True}, "Received: rtol=True"),
        ({"rtol": "1e-3"}, "Received: rtol='1e-3'"),
        ({"rtol": float("nan")}, "Received: rtol=nan"),
        ({"rtol": float("inf")}, "Received: rtol=inf"),
        ({"rtol": 1e-3, "atol": -1.0}, "`atol` must be a finite number of at least 0. Received: atol=-1.0"),
        ({"rtol": 1e-3, "atol": None}, "Received: atol=None"),
        ({"rtol": 1e-3, "learning_rate": SCHEDULE}, "`learning_rate` is the size of the first step"),
        ({"rtol": 1e-3, "learning_rate": 0.0}, "greater than 0. Received: learning_rate=0.0"),
        ({"rtol": 1e-3, "weight_decay": 0.01}, "`weight_decay` and `rtol` do not go together"),
        ({"learning_rate": -0.1}, "Received: learning_rate=-0.1"),
        ({"learning_rate": float("nan")}, "Received: learning_rate=nan"),
        ({"learning_rate": "fast"}, "Received: learning_rate='fast'"),
    ],
)
def test_wrong_arguments(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message) if "." in message else message):
        RungeKutta(**arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [({"stages": 0}, "stages=0"), ({"stages": 2.0}, "stages=2.0"), ({"damping": -1}, "damping=-1")],
)
def test_wrong_arguments_of_chebyshev(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"Received: {message}"):
        RungeKuttaChebyshev(**arguments)
