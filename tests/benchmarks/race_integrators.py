"""Races integrators against each other for an equal number of gradients, for chapter 12. About ten minutes.

Everything is NumPy in float64, written from the formulas, so that the book's optimizers can be held against it. The
chapter shows what is recorded here and repeats a small part. Usage, from the repository's root:
python -m tests.benchmarks.race_integrators
"""

import datetime
import functools
import importlib.metadata
import itertools
import json
import os
import pathlib
from collections.abc import Callable
from typing import Any

import numpy as np
from scipy.sparse.linalg import LinearOperator, eigsh

from companion import datasets, gradient_flow

OUTPUT = pathlib.Path(__file__).parent.parent.parent / "book" / "data" / "integrators.json"
SEEDS = (1, 2, 3, 4, 5)
RATIO = 2**0.5  # between neighbouring learning rates
RULES = ("momentum", "adam", "adams_bashforth")  # one gradient a step; everything else is a tableau
POINTS = 31  # of a recorded curve
Gradient = Callable[[np.ndarray, Any], np.ndarray]


class Network:
    """A network with one hidden layer of tanh, or none: its loss and gradient for one long vector of weights."""

    def __init__(self, hidden: int, loss: str, images: np.ndarray, labels: np.ndarray) -> None:
        self.loss_name, self.x, self.labels = loss, images, labels
        self.targets = np.eye(10)[labels]
        sizes = [64, hidden, 10] if hidden else [64, 10]
        self.shapes = [s for pair in itertools.pairwise(sizes) for s in (pair, pair[1:])]
        self.cuts = np.cumsum([int(np.prod(shape)) for shape in self.shapes])

    def start(self, seed: int) -> np.ndarray:
        """Glorot's uniform weights, as Keras draws them but from another generator; zeros for the biases."""
        random = np.random.default_rng(seed)
        parts = [
            random.uniform(-1, 1, shape) * np.sqrt(6 / sum(shape)) if len(shape) == 2 else np.zeros(shape)
            for shape in self.shapes
        ]
        return np.concatenate([part.ravel() for part in parts])

    def __call__(self, theta: np.ndarray, rows: Any = slice(None)) -> tuple[float, np.ndarray]:
        """Loss and gradient on some of the images: cross-entropy, or the mean squared error to one-hot labels."""
        *layers, (weights, bias) = self._layers(theta)
        x, targets = self.x[rows], self.targets[rows]
        hidden = np.tanh(x @ layers[0][0] + layers[0][1]) if layers else x
        output = hidden @ weights + bias
        if self.loss_name == "squares":
            error = output - targets
            loss = (error**2).mean()
            error = error / 5
        else:
            output = output - output.max(axis=1, keepdims=True)
            total = np.exp(output).sum(axis=1, keepdims=True)
            error = np.exp(output) / total - targets
            loss = (np.log(total[:, 0]) - (output * targets).sum(axis=1)).mean()
        error = error / len(x)
        gradient = [hidden.T @ error, error.sum(axis=0)]
        if layers:
            back = (error @ weights.T) * (1 - hidden**2)
            gradient = [x.T @ back, back.sum(axis=0), *gradient]
        return float(loss), np.concatenate([part.ravel() for part in gradient])

    def _layers(self, theta: np.ndarray) -> list[tuple[np.ndarray, np.ndarray]]:
        parts = [p.reshape(s) for p, s in zip(np.split(theta, self.cuts[:-1]), self.shapes, strict=True)]
        return list(zip(parts[::2], parts[1::2], strict=True))

    def accuracy(self, theta: np.ndarray, images: np.ndarray, labels: np.ndarray) -> float:
        """The fraction of images that it reads."""
        *layers, (weights, bias) = self._layers(theta)
        hidden = np.tanh(images @ layers[0][0] + layers[0][1]) if layers else images
        return float(np.mean(np.argmax(hidden @ weights + bias, axis=1) == labels))

    def sharpness(self, theta: np.ndarray, before: np.ndarray | None = None) -> tuple[float, np.ndarray]:
        """The largest eigenvalue of the Hessian and its vector, by Lanczos."""
        unit = 1e-4

        def product(vector: np.ndarray) -> np.ndarray:
            ahead, behind = (self(theta + sign * unit * vector.ravel())[1] for sign in (1, -1))
            return (ahead - behind) / (2 * unit)

        operator = LinearOperator((theta.size,) * 2, matvec=product, dtype=float)
        vector = np.random.default_rng(0).normal(size=theta.size) if before is None else before
        values, vectors = eigsh(operator, k=1, which="LA", v0=vector / np.linalg.norm(vector), tol=1e-4, ncv=8)
        return float(values[0]), vectors[:, 0]


@functools.cache
def network(hidden: int, loss: str = "entropy") -> Network:
    """On the book's digits."""
    data = datasets.digits("float64")
    return Network(hidden, loss, data.x_train, data.y_train)


@functools.cache
def _test() -> tuple[np.ndarray, np.ndarray]:
    data = datasets.digits("float64")
    return data.x_test, data.y_test


def stepper(method: str, h: float) -> tuple[Callable[[np.ndarray, Gradient], np.ndarray], int]:
    """A function that takes one step, and the gradients that it spends. Momentum is 0.9; Adam is Keras's."""
    state: dict[str, Any] = {"t": 0, "m": 0.0, "v": 0.0, "last": None}

    def rule(theta: np.ndarray, gradient: Any) -> np.ndarray:
        g = gradient(theta)
        state["t"] += 1
        if method == "momentum":
            state["v"] = 0.9 * state["v"] - h * g
            return theta + state["v"]
        if method == "adam":
            state["m"] = 0.9 * state["m"] + 0.1 * g
            state["v"] = 0.999 * state["v"] + 0.001 * g * g
            rate = h * np.sqrt(1 - 0.999 ** state["t"]) / (1 - 0.9 ** state["t"])
            return theta - rate * state["m"] / (np.sqrt(state["v"]) + 1e-7)
        last, state["last"] = (g if state["last"] is None else state["last"]), g
        return theta - h * (1.5 * g - 0.5 * last)

    if method in RULES:
        return rule, 1
    tableau = gradient_flow.chebyshev(5) if method == "chebyshev" else gradient_flow.tableau(method)
    a, b = np.array(tableau.a), np.array(tableau.b)

    def runge_kutta(theta: np.ndarray, gradient: Any) -> np.ndarray:
        slopes = np.zeros((len(b), theta.size))
        for stage in tableau.stages():
            slopes[stage] = gradient(theta - h * (a[stage, :stage] @ slopes[:stage]))
        return theta - h * (b @ slopes)

    return runge_kutta, len(tableau.stages())


def train(
    net: Network,
    method: str,
    h: float,
    budget: int,
    seed: int,
    batch: int | None = None,
    steps: int | None = None,
    test: tuple[np.ndarray, np.ndarray] | None = None,
) -> dict[str, Any]:
    """Trains until the budget of gradients, or the number of steps, is spent: the losses on all images on the way."""
    step, cost = stepper(method, h)
    steps = budget // cost if steps is None else steps
    theta, random = net.start(seed), np.random.default_rng(seed)
    order: list[np.ndarray] = []
    marks = set(np.linspace(0, steps, min(POINTS, steps + 1)).round().astype(int).tolist())
    spent, losses = [], []
    with np.errstate(all="ignore"):
        for k in range(steps + 1):
            if k in marks:
                spent.append(k * cost)
                losses.append(net(theta)[0])
            if k == steps or not np.isfinite(theta).all() or (losses and not losses[-1] < 1e3):
                break
            rows: Any = slice(None)
            if batch:
                if not order:
                    order = list(random.permutation(len(net.x))[: len(net.x) // batch * batch].reshape(-1, batch))
                rows = order.pop()
            theta = step(theta, lambda values, rows=rows: net(values, rows)[1])
    test = test or _test()
    is_finite = k == steps and np.isfinite(losses[-1])
    return {
        "h": h,
        "seed": seed,
        "spent": spent,
        "losses": [float(f"{loss:.6g}") for loss in losses],
        "final": float(f"{losses[-1]:.6g}") if is_finite else float("inf"),
        "accuracy": round(net.accuracy(theta, *test), 4) if is_finite else 0.0,
    }


def tuned(
    net: Network,
    method: str,
    budget: int,
    first: float,
    seeds: tuple[int, ...],
    reach: int = 2,
    falling: bool = False,
    **options: Any,
) -> dict[str, Any]:
    """Climbs a grid of learning rates to one with the lowest mean final loss among its neighbours.

    With ``falling``, only rates count at which no recorded loss is above the one before.
    """
    tried: dict[int, tuple[float, list[dict[str, Any]]]] = {}

    def score(k: int) -> float:
        if k not in tried:
            runs = [train(net, method, first * RATIO**k, budget, seed, **options) for seed in seeds]
            is_out = falling and any(np.diff(run["losses"]).max() > 0 for run in runs)
            tried[k] = float("inf") if is_out else float(np.mean([run["final"] for run in runs])), runs
        return tried[k][0]

    best = 0
    while (better := min(range(best - reach, best + reach + 1), key=score)) != best:
        best = better
    runs = tried[best][1]
    finals = [run["final"] for run in runs]
    result = {
        "method": method,
        "cost": stepper(method, 1.0)[1],
        "h": first * RATIO**best,
        "mean": float(np.mean(finals)),
        "spread": float(np.std(finals, ddof=1)) if len(finals) > 1 else 0.0,
        "accuracy": float(np.mean([run["accuracy"] for run in runs])),
        "grid": [[first * RATIO**k, value if np.isfinite(value) else None] for k, (value, _) in sorted(tried.items())],
        "runs": runs,
    }
    print(f"  {method:16} h {result['h']:.4g}  {result['mean']:.5f} ± {result['spread']:.5f}", flush=True)
    return result


FIRST = {  # where the search begins
    "euler": 1.0, "heun": 1.0, "rk4": 1.0, "dormand_prince": 1.0, "adams_bashforth": 0.5,
    "momentum": 0.25, "adam": 0.02, "chebyshev": 4.0,
}  # fmt: skip


EVERYONE = tuple(FIRST)
SIX = ("euler", "heun", "rk4", "adams_bashforth", "chebyshev", "momentum")


def race(name: str, hidden: int, budget: int, methods: tuple[str, ...], seeds: tuple[int, ...], **options: Any) -> Any:
    """Every method at its best constant learning rate, for the same number of gradients."""
    print(name, flush=True)
    net = network(hidden)
    results = [tuned(net, method, budget, FIRST[method], seeds, **options) for method in methods]
    return {"name": name, "budget": budget, "batch": options.get("batch"), "results": results}


def races() -> list[dict[str, Any]]:
    """Experiment 2."""
    return [logistic(), full_batch(), small_batches()]


def logistic() -> Any:
    """No hidden layer, all images at once. The digits are separable: see what an absurd rate does with that."""
    result = race("logistic", 0, 600, SIX, SEEDS[:3], reach=1, falling=True)
    runs = [train(network(0), "euler", 8192.0, 600, seed) for seed in SEEDS[:3]]
    return {
        **result,
        "absurd": {"h": 8192.0, "finals": [run["final"] for run in runs], "worst": max(runs[0]["losses"])},
    }


def full_batch() -> Any:
    """32 hidden units, all images at once."""
    return race("full batch", 32, 600, SIX, SEEDS[:3], reach=1)


def small_batches() -> Any:
    """32 hidden units, 32 images at once."""
    return race("batches of 32", 32, 900, EVERYONE, SEEDS, batch=32)


CLAIM_SEEDS = (1, 2, 3, 4, 5)
CLAIM_RATES = {
    "rk4": [0.25, 0.5, 1.0, 2.0, 4.0], "euler": [0.125, 0.25, 0.5, 1.0, 2.0],
    "momentum": [0.01, 0.02, 0.04, 0.08, 0.16], "adam": [0.0025, 0.005, 0.01, 0.02, 0.04, 0.08],
}  # fmt: skip


def claim() -> list[dict[str, Any]]:
    """Runge-Kutta 4 against Adam by test accuracy: at a small batch and a large one, per step and per gradient.

    Each seed draws its own split into images for training and for testing, the same for every method.
    """
    return [_claim(batch, epochs) for batch, epochs in ((8, 6), (360, 60))]


def _claim(batch: int, epochs: int) -> dict[str, Any]:
    steps = epochs * (1440 // batch)
    print(f"claim: batches of {batch}, {steps} steps", flush=True)
    rows = []
    for name, method, part in (
        ("rk4, per step", "rk4", 1), ("rk4, per gradient", "rk4", 1 / 4), ("adam", "adam", 1),
        ("adam, four times the steps", "adam", 4), ("euler", "euler", 1), ("momentum", "momentum", 1),
    ):  # fmt: skip
        grid = []
        for h in CLAIM_RATES[method]:
            runs = []
            for seed in CLAIM_SEEDS:
                net, test = _split(seed)
                runs.append(train(net, method, h, 0, seed, batch=batch, steps=int(steps * part), test=test))
            accuracies, losses = ([run[key] for run in runs] for key in ("accuracy", "final"))
            loss = float(np.mean(losses))
            grid.append({"h": h, "loss": loss if np.isfinite(loss) else None, "accuracies": accuracies})
        rows.append({"name": name, "method": method, "steps": int(steps * part), "grid": grid})
        best = max(grid, key=lambda row: np.mean(row["accuracies"]))
        print(f"  {name:28} h {best['h']:.4g}  {np.mean(best['accuracies']):.4f}  loss {best['loss']:.5f}", flush=True)
    return {"batch": batch, "epochs": epochs, "seeds": len(CLAIM_SEEDS), "rows": rows}


@functools.cache
def _split(seed: int) -> tuple[Network, tuple[np.ndarray, np.ndarray]]:
    data = datasets.digits("float64")
    images, labels = np.concatenate([data.x_train, data.x_test]), np.concatenate([data.y_train, data.y_test])
    order = np.random.default_rng(1000 + seed).permutation(len(images))
    training, test = order[:1440], order[1440:]
    return Network(32, "entropy", images[training], labels[training]), (images[test], labels[test])


EDGE = {"hidden": 32, "images": 200, "h": 0.4, "steps": 10000, "every": 50}


def edge(h: float | None = None, steps: int | None = None, methods: Any = ("euler", "heun", "kutta3", "rk4")) -> Any:
    """Experiment 4: h times sharpness along a run of each integrator, from the same weights."""
    data = datasets.digits("float64")
    n = int(EDGE["images"])
    net = Network(int(EDGE["hidden"]), "squares", data.x_train[:n], data.y_train[:n])
    h, steps, every = h or EDGE["h"], steps or int(EDGE["steps"]), int(EDGE["every"])
    curves = []
    for method in methods:
        step, _ = stepper(method, h)
        theta, vector, products, losses = net.start(1), None, [], []
        for k in range(steps + 1):
            if k % every == 0:
                value, vector = net.sharpness(theta, vector)
                products.append(float(f"{h * value:.6g}"))
                losses.append(float(f"{net(theta)[0]:.6g}"))
            theta = step(theta, lambda values: net(values)[1])
        settled = float(np.median(products[-len(products) // 4 :]))
        slopes = []  # along the steepest direction, at the end, one step after another
        for _ in range(8):
            slopes.append(float(f"{net(theta)[1] @ vector:.6g}"))
            theta = step(theta, lambda values: net(values)[1])
        curves.append({"method": method, "settled": settled, "products": products, "losses": losses, "slopes": slopes})
        print(f"  edge {method:8} {settled:.3f} loss {losses[-1]:.5f}", products[:: len(products) // 8], flush=True)
    return {**EDGE, "h": h, "steps": steps, "curves": curves}


def main() -> None:
    """Runs all the experiments and writes the record."""
    report = {
        "date": datetime.datetime.now(tz=datetime.UTC).date().isoformat(),
        "cores": os.cpu_count(),
        "numpy": importlib.metadata.version("numpy"),
        "races": races(),
        "claim": claim(),
        "edge": edge(),
    }
    OUTPUT.write_text(json.dumps(report) + "\n")


if __name__ == "__main__":
    main()
