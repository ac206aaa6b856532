"""Methods of integration written out in NumPy, and the small network on which Keras is held against them."""

from collections.abc import Callable
from typing import Any

import keras
import numpy as np

from companion import RungeKutta, RungeKuttaChebyshev, inject
from tests.kit.network import loss_and_gradient
from tests.kit.ready import ready

L = keras.layers

# Three inputs, four hidden units, two outputs, the mean of squares


GENERATOR = np.random.default_rng(0)
X, Y = GENERATOR.normal(size=(24, 3)), GENERATOR.normal(size=(24, 2))
START = [GENERATOR.normal(size=shape) * 0.7 for shape in ((3, 4), (4,), (4, 2), (2,))]
BATCHES = [slice(begin, begin + 6) for begin in range(0, 24, 6)]

CLASSES = (Y[:6, :1] > 0).astype(float)

Values = list[Any]


def loss(values: Values, x: Any = X[:6], y: Any = Y[:6]) -> float:
    return loss_and_gradient(values, x, y, squares=True)[0]


def gradient(values: Values, x: Any = X[:6], y: Any = Y[:6]) -> Values:
    return loss_and_gradient(values, x, y, squares=True)[1]


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
    return inject(ready(model), micro_batches)


def arrays(model: Any) -> Values:
    return [np.array(keras.ops.cast(variable, "float64")) for variable in model.trainable_variables]


def numpy_epochs(method: str, h: float = 0.25, epochs: int = 1) -> Values:
    """The weights after steps on each batch."""
    values = START
    for batch in BATCHES * epochs:
        values = METHODS[method][0](lambda v, b=batch: gradient(v, X[b], Y[b]), values, h)
    return values


def fitted(model: Any, **options: Any) -> Any:
    model.fit(X, Y, batch_size=6, shuffle=False, verbose=0, **options)
    return model
