"""Holds `companion.minimize` against closed forms, SciPy on a loss in NumPy, and Keras's loss of all in one batch."""

import contextlib
import pathlib
import sys
from collections.abc import Callable, Iterator
from typing import Any

import keras
import numpy as np
import pytest
import scipy.optimize
import tensorflow as tf
from keras import ops

import companion
from companion import minimize
from tests.kit.cases import thinned, wrong
from tests.kit.dtypes import set_dtype
from tests.kit.integrators import START, X, Y, arrays, sequential
from tests.kit.models import CASES
from tests.kit.network import flat, loss_and_gradient, unflat
from tests.kit.numbers import assert_close

pytestmark = pytest.mark.usefixtures("float64")
L = keras.layers
REDUCTION = "mean_with_sample_weight"
METHODS = ("L-BFGS-B", "BFGS", "CG", "Newton-CG", "TNC", "SLSQP", "trust-constr")


def network(run_eagerly: bool = True, **options: Any) -> Any:
    """Three inputs, four hidden units, two outputs, from weights that NumPy knows."""
    model = sequential()
    model.compile(**{"loss": "mse", "run_eagerly": run_eagerly, **options})
    return model


def quietly(model: Any, x: Any = X, y: Any = Y, **options: Any) -> Any:
    """Minimises without a word."""
    if isinstance(x, (tf.data.Dataset, keras.utils.PyDataset)):
        return minimize(model, x, verbose=0, **options)
    return minimize(model, x, y, verbose=0, **options)


def in_numpy(vector: Any) -> tuple[float, Any]:
    loss, gradient = loss_and_gradient(unflat(vector, START), X, Y, squares=True)
    return loss, flat(gradient)


# What is found


@pytest.mark.parametrize("method", thinned(METHODS, "L-BFGS-B", "CG"))
def test_linear_least_squares(method: str) -> None:
    model = keras.Sequential([keras.Input((3,)), L.Dense(2)])
    model.compile(loss="mse", run_eagerly=True)
    history = quietly(model, method=method, tolerance=1e-7, max_gradients=300)
    solution = np.linalg.lstsq(np.c_[X, np.ones(len(X))], Y, rcond=None)[0]
    assert_close(arrays(model), [solution[:3], solution[3]], 1e-6)
    assert history.result.success
    assert np.abs(history.result.jac).max() <= 1e-7


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("L-BFGS-B", {"run_eagerly": False}),
        pytest.param("L-BFGS-B", {"run_eagerly": False, "jit_compile": True}, marks=pytest.mark.slow),
        *(pytest.param(method, {}, marks=pytest.mark.slow) for method in ("BFGS", "CG", "Newton-CG")),
    ],
)
def test_the_iterates_are_those_of_scipy_on_a_loss_in_numpy(method: str, options: dict[str, Any]) -> None:
    model, losses = network(**options), list[float]()
    history = quietly(model, method=method, max_gradients=300 if method == "Newton-CG" else 60)
    no_end = {"L-BFGS-B": {"ftol": 0.0, "gtol": 1e-8}, "Newton-CG": {"xtol": 0.0}}.get(method, {"gtol": 1e-8})
    scipy.optimize.minimize(
        in_numpy,
        flat(START),
        jac=True,
        method=method,
        options={"maxiter": 12, **no_end},
        callback=lambda point: losses.append(in_numpy(point)[0]),
    )
    assert len(losses) == 12
    np.testing.assert_allclose(history.history["loss"][:12], losses, rtol=1e-5 if method == "Newton-CG" else 1e-9)
    if method != "Newton-CG":  # which may have seen a better loss in the middle of an iteration
        lowest = np.argmin(history.history["loss"])
        best = loss_and_gradient(arrays(model), X, Y, squares=True)
        assert best[0] == pytest.approx(history.history["loss"][lowest], rel=1e-12)
        assert np.linalg.norm(flat(best[1])) == pytest.approx(history.history["gradient_norm"][lowest], rel=1e-6)


# The loss of all data


class Uneven(keras.utils.PyDataset):
    """Batches of 7, 5 and 1."""

    def __init__(self, *data: Any) -> None:
        super().__init__()
        self.data = data

    def __len__(self) -> int:
        return 3

    def __getitem__(self, index: int) -> Any:
        rows = slice(*([0, 7], [7, 12], [12, 13])[index])
        return tuple(np.asarray(each)[rows] for each in self.data)


def tokens() -> tuple[Any, Any, Any]:
    generator = np.random.default_rng(1)
    ids = generator.integers(1, 5, (13, 6)) * (np.arange(6) < generator.integers(1, 7, (13, 1)))
    return ids, generator.integers(0, 3, (13, 6)), generator.uniform(0.1, 2, (13, 6))


def tagger(**options: Any) -> Any:
    """Embeddings, a mask, a regularizer; a class for each token."""
    keras.utils.set_random_seed(1)
    dense = L.Dense(3, kernel_regularizer=keras.regularizers.L2(0.01))
    model = keras.Sequential(
        [keras.Input((6,), dtype="int32"), L.Embedding(5, 4, mask_zero=True), L.Dense(3, "tanh"), dense]
    )
    model.compile(
        loss=keras.losses.SparseCategoricalCrossentropy(True, reduction=REDUCTION), metrics=["accuracy"], **options
    )
    return model


def whole(model: Any, x: Any, y: Any, sample_weight: Any) -> tuple[float, Any]:
    """Loss and gradient of all data in one batch, by Keras."""
    with tf.GradientTape() as tape:
        loss = model.compute_loss(x, y, model(x, training=True), sample_weight)
    answers = tape.gradient(loss, model.trainable_variables)
    return float(loss), flat([np.asarray(tf.convert_to_tensor(answer)) for answer in answers])


FORMS: dict[str, Callable[..., tuple[Any, dict[str, Any]]]] = {
    "arrays": lambda *data: (data, {}),
    "batches of 5": lambda *data: (data, {"batch_size": 5}),
    "parts": lambda *data: (data, {"micro_batches": 4}),
    "batches in parts": lambda *data: (data, {"batch_size": 6, "micro_batches": 2}),
    "tf.data": lambda *data: (tf.data.Dataset.from_tensor_slices(data).batch(4), {}),
    "PyDataset": lambda *data: (Uneven(*data), {}),
}


@pytest.mark.parametrize("form", thinned(FORMS, "batches of 5", "batches in parts", "PyDataset"))
def test_batches_add_up_to_the_whole(form: str) -> None:
    """Masks, weights of tokens, a ragged last batch; regularizers count once. A gradient is the first answer."""
    data = tokens()
    model = tagger()
    x, options = FORMS[form](*data)
    expected = whole(model, *map(tf.constant, data))
    arguments = x if isinstance(x, tuple) else (x,)
    found = minimize(model, *arguments, verbose=0, max_gradients=1, **options).result
    assert found.fun == pytest.approx(expected[0], rel=1e-12)
    np.testing.assert_allclose(found.jac, expected[1], rtol=0, atol=1e-14)


def by_examples(batch: Any) -> float:
    return float(len(batch[0]))


def by_batches(batch: Any) -> float:
    return 1.0


def by_weights(batch: Any) -> float:
    return float((batch[2] * (batch[0] > 0)).sum())


@pytest.mark.parametrize(
    "weigh",
    [by_weights, wrong(by_examples, why="each example counts the same"), wrong(by_batches, why="a mean of means")],
)
def test_what_weighs_a_batch(weigh: Callable[[Any], float]) -> None:
    data, model = Uneven(*tokens()), tagger(run_eagerly=True)
    batches = [data[index] for index in range(3)]
    losses = [whole(model, *map(tf.constant, batch))[0] for batch in batches]
    found = minimize(model, data, verbose=0, max_gradients=1).result.fun
    assert found == pytest.approx(np.average(losses, weights=[weigh(batch) for batch in batches]), rel=1e-12)


def test_training_on_batches_is_training_on_the_whole() -> None:
    ends = []
    for options in ({}, {"batch_size": 7}):
        model = network()
        quietly(model, max_gradients=12, **options)
        ends.append(arrays(model))
    assert_close(ends[0], ends[1], 1e-9)


def test_a_data_set_is_always_read_to_its_end() -> None:
    """What was begun and left stays in a cache behind a `prefetch`, now and then, as all of the data."""
    passes = {"begun": 0, "ended": 0}

    def batches() -> Iterator[Any]:
        passes["begun"] += 1
        yield from ((X[begin : begin + 5], Y[begin : begin + 5]) for begin in range(0, 24, 5))
        passes["ended"] += 1

    signature = tuple(tf.TensorSpec((None, size), "float64") for size in (3, 2))
    quietly(network(), tf.data.Dataset.from_generator(batches, output_signature=signature), max_gradients=3)
    assert passes["begun"] == passes["ended"] > 3


def two_losses() -> Any:
    inputs = keras.Input((3,))
    model = keras.Model(inputs, {"a": L.Dense(1, name="a")(inputs), "b": L.Dense(1, name="b")(inputs)})
    model.compile(loss={"a": keras.losses.MeanSquaredError(REDUCTION), "b": "mae"}, run_eagerly=True)
    return model


def test_losses_that_divide_by_different_numbers_are_added_up_in_one_batch_only() -> None:
    model, y = two_losses(), {"a": Y[:, :1], "b": Y[:, 1:]}
    weights = {"a": np.arange(24.0), "b": np.ones(24)}
    expected = whole(model, tf.constant(X), y, weights)
    before = arrays(model)
    with pytest.raises(ValueError, match=r"let all data be one batch, with `batch_size=None`"):
        minimize(model, X, y, weights, batch_size=10, verbose=0)
    assert_close(arrays(model), before, 0)
    found = minimize(model, X, y, weights, micro_batches=5, verbose=0, max_gradients=1).result
    assert found.fun == pytest.approx(expected[0], rel=1e-12)
    np.testing.assert_allclose(found.jac, expected[1], atol=1e-14)


# Which weights move, and of which type


class Unused(L.Layer):
    def build(self, shape: Any) -> None:
        self.unused = self.add_weight(shape=(2,), initializer="ones", name="unused")

    def call(self, inputs: Any) -> Any:
        return inputs


def test_what_is_frozen_stays_and_what_the_loss_does_not_see() -> None:
    unused, layers = Unused(), sequential().layers
    model = keras.Sequential([keras.Input((3,)), *layers, unused])
    model.compile(loss="mse", run_eagerly=True)
    model.layers[0].trainable = False
    quietly(model, max_gradients=40)
    assert_close([np.asarray(v.value) for v in model.layers[0].variables], START[:2], 0)
    assert np.asarray(unused.unused.value).tolist() == [1, 1]
    hidden = np.tanh(X @ START[0] + START[1])
    solution = np.linalg.lstsq(np.c_[hidden, np.ones(24)], Y, rcond=None)[0]
    assert_close(arrays(model.layers[1])[:2], [solution[:4], solution[4]], 1e-6)


@pytest.mark.parametrize("policy", ["float32", "mixed_float16", "bfloat16"])
def test_other_types_of_weights(policy: str) -> None:
    set_dtype("float32")
    keras.config.set_dtype_policy(policy)
    model = network()
    start = loss_and_gradient(arrays(model), X, Y, squares=True)[0]
    history = quietly(model, max_gradients=40)
    assert all(variable.dtype == ("bfloat16" if policy == "bfloat16" else "float32") for variable in model.variables)
    assert history.result.x.dtype == np.float64
    end = loss_and_gradient(arrays(model), X, Y, squares=True)[0]
    assert end < (0.5 * start if policy == "float32" else start)


# Callbacks


class Notes(keras.callbacks.Callback):
    """What a callback is told, and the model's loss then."""

    def __init__(self) -> None:
        super().__init__()
        self.told: list[Any] = []

    def on_train_begin(self, logs: Any = None) -> None:
        self.told.append("train")

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        self.told.append(("begin", epoch))

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        self.told.append(("end", epoch))
        assert logs["loss"] == pytest.approx(loss_and_gradient(arrays(self.model), X, Y, squares=True)[0], rel=1e-9)

    def on_train_end(self, logs: Any = None) -> None:
        self.told.append("over")


def test_callbacks_find_the_accepted_weights_also_where_the_last_question_was_rejected() -> None:
    history = quietly(network(), method="trust-constr", max_gradients=60, callbacks=[Notes()])
    assert len(set(history.history["loss"])) < len(history.epoch)


def test_an_iteration_is_an_epoch_and_the_history_is_that_of_fit() -> None:
    model, notes = network(), Notes()
    history = quietly(model, tolerance=1e-2, callbacks=[notes])
    count = len(history.epoch)
    assert notes.told == ["train", *(each for k in range(count) for each in (("begin", k), ("end", k))), "over"]
    assert model.history is history
    assert set(history.history) == {"loss", "gradient_norm", "gradients"}
    assert history.result.nit == count
    assert history.history["gradients"] == sorted(history.history["gradients"])
    assert np.abs(in_numpy(flat(arrays(model)))[1]).max() <= 1e-2
    assert history.result.success


def test_callbacks_of_keras(tmp_path: pathlib.Path) -> None:
    model = network()
    stopping = keras.callbacks.EarlyStopping("loss", min_delta=1e9, patience=4, restore_best_weights=True)
    saving = keras.callbacks.ModelCheckpoint(
        tmp_path / "best.weights.h5", "loss", save_best_only=True, save_weights_only=True
    )
    table = keras.callbacks.CSVLogger(tmp_path / "table.csv")
    history = quietly(model, callbacks=[stopping, saving, table])
    assert len(history.epoch) == 5
    assert model.stop_training
    assert "model.stop_training" in history.result.message
    assert_close(arrays(model), [np.asarray(each) for each in stopping.best_weights], 0)  # those of the first iteration
    model.load_weights(tmp_path / "best.weights.h5")
    losses = history.history["loss"]
    assert loss_and_gradient(arrays(model), X, Y, squares=True)[0] == pytest.approx(min(losses), rel=1e-12)
    assert (tmp_path / "table.csv").read_text().startswith("epoch,gradient_norm,gradients,loss")


def test_progress_is_shown_as_by_fit(capsys: pytest.CaptureFixture[str]) -> None:
    minimize(network(), X, Y, max_gradients=5, verbose=2)
    shown = capsys.readouterr().out
    assert "Epoch 1/5" in shown
    assert "gradient_norm: " in shown
    quietly(network(), max_gradients=5)
    assert capsys.readouterr().out == ""


def test_what_was_restored_at_the_beginning_is_where_it_starts() -> None:
    class Restores(keras.callbacks.Callback):
        def on_train_begin(self, logs: Any = None) -> None:
            self.model.set_weights([0.5 * value for value in START])

    model = network()
    found = quietly(model, max_gradients=1, callbacks=[Restores()]).result
    np.testing.assert_allclose(found.x, 0.5 * flat(START))


# How many gradients


class Counts(keras.losses.Loss):
    """Squares; and how often it was asked, which is no state of Keras's."""

    def __init__(self, spoil: Any = None) -> None:
        super().__init__()
        self.asked, self.spoil = 0, spoil

    def call(self, targets: Any, outputs: Any) -> Any:
        self.asked += tf.executing_eagerly()  # to build a model it is traced
        return ops.mean((outputs - targets) ** 2, -1) + (self.spoil(self.asked) if self.spoil else 0.0)


@pytest.mark.parametrize("method", thinned(METHODS, "L-BFGS-B", "CG"))
@pytest.mark.parametrize("most", [1, 2, 3, 8, 23])
def test_no_more_gradients_than_allowed(method: str, most: int) -> None:
    loss = Counts()
    model = network(loss=loss)
    history = quietly(model, method=method, max_gradients=most, tolerance=0)
    assert loss.asked == most
    assert history.history.get("gradients", [1])[-1] <= most
    assert "`max_gradients` is reached" in history.result.message
    assert not history.result.success


# Never worse than the start


@contextlib.contextmanager
def never_worse(model: Any) -> Iterator[list[float]]:
    """The weights are the best of those that were seen, whose losses the test notes."""
    seen = [loss_and_gradient(arrays(model), X, Y, squares=True)[0]]
    yield seen
    assert loss_and_gradient(arrays(model), X, Y, squares=True)[0] <= min(seen) * (1 + 1e-12)


@pytest.mark.parametrize("kind", [KeyboardInterrupt, ArithmeticError])
@pytest.mark.parametrize("method", thinned(METHODS, "L-BFGS-B"))
def test_after_an_interrupt_in_a_question(method: str, kind: Any) -> None:
    def interrupt(asked: int) -> float:
        if asked == 9:
            raise kind
        return 0.0

    model, best = network(loss=Counts(interrupt)), []
    with never_worse(model) as seen:
        with pytest.raises(kind):
            quietly(model, method=method)
        seen += model.history.history["loss"]
        best.append(min(seen))
    assert best[0] < seen[0] or method in ("Newton-CG", "SLSQP")


def test_after_an_interrupt_in_a_callback() -> None:
    class Interrupts(keras.callbacks.Callback):
        def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
            if epoch == 3:
                raise KeyboardInterrupt

    model = network()
    with never_worse(model) as seen:
        with pytest.raises(KeyboardInterrupt):
            quietly(model, callbacks=[Interrupts()])
        seen += model.history.history["loss"]
        seen.append(loss_and_gradient(arrays(model), X, Y, squares=True)[0])
    assert seen[-1] < seen[0]


@tf.custom_gradient
def upside_down(loss: Any) -> Any:
    return loss, lambda slope: -slope


def test_after_a_line_search_that_fails() -> None:
    """The gradient of this loss points downhill, so that no step makes it smaller."""
    model = network(loss=lambda y, p: upside_down(ops.mean((p - y) ** 2, -1)))
    with never_worse(model):
        history = quietly(model, max_gradients=80)
    assert not history.result.success
    assert_close(arrays(model), START, 0)


@pytest.mark.parametrize("method", thinned(METHODS, "L-BFGS-B"))
def test_where_the_loss_is_not_finite_the_line_search_turns_back(method: str) -> None:
    """The loss w - log w has its minimum at 1, and is NaN below 0, where the first steps lead."""
    model = keras.Sequential(
        [keras.Input((1,)), L.Dense(1, use_bias=False, kernel_initializer=keras.initializers.Constant(9.0))]
    )
    model.compile(loss=lambda y, p: 30 * (p - ops.log(p)), run_eagerly=True)
    quietly(model, np.ones((2, 1)), np.ones((2, 1)), method=method, tolerance=1e-6, max_gradients=200)
    assert arrays(model)[0].item() == pytest.approx(1, abs=1e-5)


# What is refused, and nothing has moved


def with_layer(layer: Any, **options: Any) -> Any:
    model = keras.Sequential([keras.Input((3,)), layer, L.Dense(2)])
    model.compile(**{"loss": "mse", "run_eagerly": False, **options})
    return model


class OwnLoss(keras.Sequential):
    def compute_loss(self, x: Any, y: Any, y_pred: Any, sample_weight: Any) -> Any:
        return ops.mean((y - y_pred) ** 2)


def own_loss() -> Any:
    model = OwnLoss([keras.Input((3,)), L.Dense(2)])
    model.compile()
    return model


def noisy(y: Any, p: Any) -> Any:
    return ops.mean((p - y) ** 2, -1) + tf.random.uniform((), dtype=p.dtype)


def frozen() -> Any:
    model = network()
    model.trainable = False
    return model


ENDLESS = tf.data.Dataset.from_tensor_slices((X, Y)).batch(8).repeat()
REFUSED: dict[str, tuple[Callable[[], Any], dict[str, Any], str]] = {
    "dropout": (lambda: with_layer(L.Dropout(0.5)), {}, "must be a function of the weights.*seed_generator_state"),
    "noise": (lambda: with_layer(L.GaussianNoise(0.1)), {}, "must be a function of the weights"),
    "dropout in batches": (lambda: with_layer(L.Dropout(0.5)), {"batch_size": 5}, "must be a function of the weights"),
    "statistics": (lambda: with_layer(L.BatchNormalization()), {}, r"freeze BatchNormalization.*moving_mean"),
    "noise in the loss": (lambda: network(loss=noisy), {}, "asked twice at the same weights it gave two numbers"),
    "constraints": (lambda: with_layer(L.Dense(3, kernel_constraint="non_neg")), {}, "weights with constraints"),
    "nothing to train": (frozen, {}, "no trainable weights"),
    "not compiled": (sequential, {}, "must be compiled"),
    "no such method": (network, {"method": "LBFGS"}, r"`method` must be one of \('L-BFGS-B'.*method='LBFGS'"),
    "without gradient": (network, {"method": "Nelder-Mead"}, "`method` must be one of"),
    "needs a Hessian": (network, {"method": "dogleg"}, "`method` must be one of"),
    "max_gradients": (network, {"max_gradients": 0}, "`max_gradients` must be an integer of at least 1"),
    "tolerance": (network, {"tolerance": -1.0}, "`tolerance` must be a number"),
    "batch_size": (network, {"batch_size": 0}, "`batch_size` must be an integer of at least 1"),
    "micro_batches": (network, {"micro_batches": 1.5}, "`micro_batches` must be an integer"),
    "options": (network, {"options": "maxcor"}, "`options` must be a dict"),
    "rows": (network, {"y": Y[:5]}, "must hold a row for each example.*24, 5 rows"),
    "a list": (network, {"y": Y.tolist()}, r"`y` must be an array.*`np.array\(y\)`"),
    "no rows": (network, {"x": X[:0], "y": Y[:0]}, "at least one"),
    "endless": (network, {"x": ENDLESS}, "`x` must end.*`repeat`"),
    "no batch": (network, {"x": ENDLESS.take(0)}, "without a batch"),
    "a generator": (network, {"x": (each for each in (X, Y)), "y": None}, "an iterator does not allow"),
    "NaN in the data": (network, {"x": np.where(X > 1, np.nan, X)}, "must be finite at the weights to start from.*nan"),
    "own loss in batches": (own_loss, {"batch_size": 5}, "let all data be one batch"),
    "own loss in parts": (own_loss, {"micro_batches": 2}, "let all data be one batch"),
    "a sum in batches": (lambda: network(loss=keras.losses.MeanSquaredError("sum")), {"batch_size": 5}, "one batch"),
    "a scalar in batches": (lambda: network(loss=lambda y, p: ops.mean((p - y) ** 2)), {"batch_size": 5}, "one batch"),
    "no reduction in batches": (
        lambda: network(loss=keras.losses.MeanSquaredError(None)),
        {"batch_size": 5},
        "let all data be one batch",
    ),
    "added losses in batches": (
        lambda: with_layer(L.Dense(3, activity_regularizer="l2"), loss=keras.losses.MeanSquaredError(REDUCTION)),
        {"sample_weight": np.ones(24), "batch_size": 5},
        "one batch.*losses added in layers",
    ),
    "depends on nothing": (lambda: network(loss=lambda y, p: ops.mean(y**2, -1)), {}, "depends on no trainable weight"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused(name: str) -> None:
    make, options, message = REFUSED[name]
    model = make()
    before = [np.asarray(variable.value) for variable in model.variables]
    with pytest.raises(ValueError, match=message):
        quietly(model, **options)
    assert_close([np.asarray(variable.value) for variable in model.variables], before, 0)


@pytest.mark.parametrize("name", ["y", "sample_weight", "batch_size"])
def test_what_a_data_set_brings_must_not_be_given(name: str) -> None:
    data = tf.data.Dataset.from_tensor_slices((X, Y)).batch(8)
    with pytest.raises(ValueError, match=f"`{name}` must be left out"):
        minimize(network(), data, **{name: 3})


def test_the_advice_works() -> None:
    """Rate 0, frozen statistics, one batch: the models that were refused are trained."""
    dropout, statistics, own = with_layer(L.Dropout(0.5)), with_layer(L.BatchNormalization()), own_loss()
    dropout.layers[0].rate = 0.0
    statistics.layers[0].trainable = False
    for model in (dropout, statistics, own):
        losses = quietly(model, max_gradients=10).history["loss"]
        assert losses[-1] < losses[0]


def test_what_is_no_model() -> None:
    with pytest.raises(TypeError, match=r"`model` must be a keras\.Model"):
        minimize("model", X, Y)


def test_without_scipy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "scipy.optimize", None)
    with pytest.raises(ImportError, match="pip install scipy"):
        quietly(network())


def test_several_replicas_are_refused() -> None:
    with tf.distribute.MirroredStrategy(["CPU:0"]).scope():
        one = network()
    quietly(one, max_gradients=2)
    assert companion.replicas.replicas_of(one) == 1


# State


@pytest.mark.parametrize("parts", [1, 3])
def test_metrics_stay_as_they_are(parts: int) -> None:
    data, model = tokens(), tagger(run_eagerly=True)
    for fits_before in (False, True):
        if fits_before:
            model.evaluate(data[0], data[1], sample_weight=data[2], verbose=0)
        before = [np.asarray(variable.value) for metric in model.metrics for variable in metric.variables]
        minimize(model, *data, micro_batches=parts, max_gradients=4, verbose=0)
        after = [np.asarray(variable.value) for metric in model.metrics for variable in metric.variables]
        assert_close(after, before, 0) if fits_before else None


class Tracked(OwnLoss):
    """Counts in a metric of its own, as many do."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.seen = keras.metrics.Mean(name="seen")

    def compute_loss(self, x: Any, y: Any, y_pred: Any, sample_weight: Any) -> Any:
        loss = super().compute_loss(x, y, y_pred, sample_weight)
        self.seen.update_state(loss)
        return loss


def test_a_metric_in_the_loss_is_no_state() -> None:
    model = Tracked([keras.Input((3,)), L.Dense(2)])
    model.compile()
    quietly(model, max_gradients=10)
    assert float(model.seen.count) == 0
    model.fit(X, Y, verbose=0, epochs=1)


REFUSALS = ("function of the weights", "constraints", "a row for each", "asks once", "mixed_float16")


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_every_kind_of_model_is_minimised_or_refused(name: str) -> None:
    set_dtype("float32")
    case = CASES[name]()
    case.model.run_eagerly = True
    x, y, sample_weight = keras.utils.unpack_x_y_sample_weight(case.batch)
    every = lambda: [np.asarray(v.value) for v in case.model.variables]  # noqa: E731
    before = every()
    try:
        history = minimize(case.model, x, y, sample_weight, max_gradients=40, verbose=0)
    except ValueError as error:
        refusal, losses = str(error), [1.0, 0.0]
        assert_close(every()[: len(before)], before, 0)
    else:
        refusal, losses = "", history.history["loss"]
    assert not refusal or any(words in refusal for words in REFUSALS)
    assert losses[-1] < losses[0]


# The figures of chapter 17


def digits_network(optimizer: Any = "sgd") -> tuple[Any, Any]:
    """64-32-10 with a penalty, and the images."""
    set_dtype("float32")
    keras.utils.set_random_seed(0)
    data, decay = companion.datasets.digits(), keras.regularizers.L2(1e-4)
    layers = [L.Dense(32, "tanh", kernel_regularizer=decay), L.Dense(10, kernel_regularizer=decay)]
    model = keras.Sequential([keras.Input((64,)), *layers])
    model.compile(optimizer, loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    return model, data


def test_digits() -> None:
    model, data = digits_network()
    assert minimize(model, data.x_train, data.y_train, max_gradients=320, verbose=0).history["loss"][-1] <= 0.036


@pytest.mark.slow
def test_adam_on_digits() -> None:
    """As many gradients of all images, at the best of four rates that fall to zero."""
    ends = []
    for rate in (0.01, 0.03, 0.1, 0.3):
        model, data = digits_network(keras.optimizers.Adam(keras.optimizers.schedules.CosineDecay(rate, 320)))
        model.fit(data.x_train, data.y_train, len(data.x_train), epochs=320, verbose=0)
        ends.append(model.evaluate(data.x_train, data.y_train, len(data.x_train), verbose=0))
    assert min(ends) >= 0.04


def test_answers_of_earlier_iterations_are_let_go(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each is as long as two sets of weights; of a line search all are kept, of an iteration its end."""
    kept, loss = list[int](), sys.modules["companion.minimize"]._Loss  # type: ignore[attr-defined]
    inherited = loss.close_iteration

    def close_iteration(self: Any) -> None:
        inherited(self)
        kept.append(len(self.recent))

    monkeypatch.setattr(loss, "close_iteration", close_iteration)
    model = keras.Sequential([keras.Input((1,)), keras.layers.Dense(3, "tanh"), keras.layers.Dense(1)])
    model.compile(loss="mse")
    x = np.linspace(-1, 1, 8)[:, None]
    companion.minimize(model, x, x**3, max_gradients=30, verbose=0)
    assert len(kept) > 10
    assert max(kept) <= 2
