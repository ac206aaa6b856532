"""A network of tanh layers in NumPy, differentiated by hand: the reference for what Keras's networks learn."""

from collections.abc import Sequence

import keras
import numpy as np

from companion import datasets

Values = list[np.ndarray]


def softmax(logits: np.ndarray) -> np.ndarray:
    odds = np.exp(logits - logits.max(axis=1, keepdims=True))
    return odds / odds.sum(axis=1, keepdims=True)


def forward(weights: Sequence[np.ndarray], x: np.ndarray) -> list[np.ndarray]:
    """The inputs of each layer, and last the outputs; the weights are kernels and biases in turn."""
    kernels, biases, inputs = weights[::2], weights[1::2], [x]
    for kernel, bias in zip(kernels[:-1], biases[:-1], strict=True):
        inputs.append(np.tanh(inputs[-1] @ kernel + bias))
    return [*inputs, inputs[-1] @ kernels[-1] + biases[-1]]


def loss_and_gradient(
    weights: Sequence[np.ndarray], x: np.ndarray, y: np.ndarray, squares: bool = False
) -> tuple[float, Values]:
    """The mean cross-entropy of logits to the numbers of classes, or the mean of all squares, and its gradient."""
    *inputs, output = forward(weights, x)
    if squares:
        loss, error = ((output - y) ** 2).mean(), 2 * (output - y) / output.size
    else:
        share, rows = softmax(output), np.arange(len(y))
        loss, error = -np.log(share[rows, y]).mean(), share / len(y)
        error[rows, y] -= 1 / len(y)
    gradient: Values = []
    for kernel, into in zip(weights[-2::-2], inputs[::-1], strict=True):
        gradient = [into.T @ error, error.sum(axis=0), *gradient]
        error = (error @ kernel.T) * (1 - into**2)
    return float(loss), gradient


def flat(values: Sequence[np.ndarray]) -> np.ndarray:
    """One long vector."""
    return np.concatenate([np.ravel(value) for value in values])


def unflat(vector: np.ndarray, like: Sequence[np.ndarray]) -> Values:
    """A long vector in the shapes of weights."""
    cuts = np.cumsum([value.size for value in like])[:-1]
    return [part.reshape(value.shape) for part, value in zip(np.split(vector, cuts), like, strict=True)]


class Digits:
    """A network with one hidden layer on the digits of the chapters, from the weights that Keras draws; in float64."""

    def __init__(self, hidden: int = 32, seed: int = 1, rows: int | None = None, drawn: str = "float32") -> None:
        data = datasets.digits("float64")
        self.x, self.y = data.x_train[:rows], data.y_train[:rows]
        keras.utils.set_random_seed(seed)
        layers = [keras.layers.Dense(units, dtype=drawn) for units in (hidden, 10)]
        drawn_weights = keras.Sequential([keras.Input((64,)), *layers]).get_weights()
        self.weights: Values = [weight.astype("float64") for weight in drawn_weights]
        self.start = flat(self.weights)

    def __call__(self, weights: Sequence[np.ndarray], rows: slice = slice(None)) -> tuple[float, Values]:
        return loss_and_gradient(weights, self.x[rows], self.y[rows])

    def loss(self, theta: np.ndarray) -> float:
        return self(unflat(theta, self.weights))[0]

    def gradient(self, theta: np.ndarray) -> np.ndarray:
        return flat(self(unflat(theta, self.weights))[1])

    def hessian_times(self, theta: np.ndarray, vector: np.ndarray, small: float = 1e-4) -> np.ndarray:
        """By a difference of gradients, a small way along the vector."""
        step = small / max(float(np.linalg.norm(vector)), 1e-300)
        return (self.gradient(theta + step * vector) - self.gradient(theta - step * vector)) / (2 * step)

    def largest_curvature(self, theta: np.ndarray) -> float:
        """By 30 rounds of power iteration."""
        vector = np.random.default_rng(1).normal(size=theta.size)
        for _ in range(30):
            vector = self.hessian_times(theta, vector / np.linalg.norm(vector))
        return float(np.linalg.norm(vector))
