"""Holds `companion.injection` against Keras's own `fit` on the whole batch: weights, losses, metrics, in every mode."""

import contextlib
import functools
import inspect
import io
import json
import pathlib
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf

from companion import injection
from companion.accumulation import GradientAccumulation
from companion.injection import eject, inject
from companion.launch import launch
from companion.oracle import GradientOracle
from companion.wrapping import CoalesceGradients
from tests.kit import cases as kit
from tests.kit.processes import on_devices, warm_workers
from tests.kit.ready import ready
from tests.kit.shared import once_a_run

L, K, P = keras.layers, keras.losses, keras.optimizers
pytestmark = pytest.mark.usefixtures("float64")


# Twelve updates, on batches of 14, 14 and 12


GENERATOR = np.random.default_rng(0)
X, IDS = GENERATOR.normal(size=(40, 5)), GENERATOR.integers(0, 9, (40, 6))
CLASSES, TOKENS = GENERATOR.integers(0, 3, 40), GENERATOR.integers(0, 3, (40, 6))
WEIGHTS, TOKEN_WEIGHTS = GENERATOR.uniform(size=40), GENERATOR.uniform(size=(40, 6))
for row, length in zip(IDS, GENERATOR.integers(0, 7, 40), strict=True):
    row[length:] = 0


def cross_entropy(**options: Any) -> Any:
    return K.SparseCategoricalCrossentropy(from_logits=True, **options)


def classifier() -> Any:
    norm = keras.constraints.MaxNorm(0.9)
    dense = L.Dense(4, "tanh", kernel_regularizer="l2", activity_regularizer="l2", kernel_constraint=norm)
    return keras.Sequential([keras.Input((5,)), dense, L.Dense(3)])


def tagger(mask_zero: bool = True) -> Any:
    return keras.Sequential([keras.Input((6,), dtype="int32"), L.Embedding(9, 4, mask_zero=mask_zero), L.Dense(3)])


def adam(**options: Any) -> Any:
    return P.Adam(0.02, **options)


def train(
    build: Callable[[], Any],
    prepare: Callable[[Any], Any] = lambda model: model,
    x: Any = X,
    y: Any = CLASSES,
    optimizer: Callable[[], Any] = adam,
    loss: Any = None,
    sample_weight: Any = None,
    strategy: Any = None,
    fit: dict[str, Any] | None = None,
    **options: Any,
) -> tuple[Any, dict[str, list[float]]]:
    """A model that was made, compiled, prepared and fitted; and its history."""
    keras.utils.set_random_seed(0)
    with strategy.scope() if strategy else contextlib.nullcontext():
        model = build()
        model.compile(optimizer(), loss or cross_entropy(), **{"jit_compile": False, **options})
    prepare(model if strategy else ready(model))
    fit = {"batch_size": 14, "epochs": 4, "shuffle": False, "verbose": 0, **(fit or {})}
    history = model.fit(x, y, sample_weight=sample_weight, **fit)
    return model, history.history


def assert_same(found: Any, expected: Any, tolerance: float = 1e-12) -> None:
    (model, history), (reference, expected_history) = found, expected
    for mine, theirs in zip(model.weights, reference.weights, strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=0, atol=tolerance)
    assert history.keys() == expected_history.keys()
    for name, values in history.items():
        np.testing.assert_allclose(values, expected_history[name], rtol=tolerance, err_msg=name)


def parts(count: int, **options: Any) -> Callable[[Any], Any]:
    return functools.partial(inject, micro_batches=count, **options)


inject_3 = parts(3)


# Every optimizer, with everything on


OPTIMIZERS: dict[str, Callable[..., Any]] = {
    "SGD": functools.partial(P.SGD, momentum=0.9, nesterov=True),
    "Adam": functools.partial(P.Adam, amsgrad=True),
    "AdamW": P.AdamW,
    "Adamax": P.Adamax,
    "Nadam": P.Nadam,
    "Adagrad": P.Adagrad,
    "Adadelta": P.Adadelta,
    "RMSprop": functools.partial(P.RMSprop, momentum=0.9, centered=True),
    "Ftrl": functools.partial(P.Ftrl, l1_regularization_strength=0.01),
    "Lion": P.Lion,
    "Lamb": P.Lamb,
    "Adafactor": P.Adafactor,
    "Muon": functools.partial(P.Muon, rms_rate=None),  # which does not do float64
}
if hasattr(P, "ScheduleFreeAdamW"):  # new in Keras 3.14
    OPTIMIZERS["ScheduleFreeAdamW"] = P.ScheduleFreeAdamW
CLIPS = [{"clipnorm": 0.1}, {"global_clipnorm": 0.2}, {"clipvalue": 0.02}]


def test_every_optimizer_of_keras_is_tested() -> None:
    wrappers = {"LossScaleOptimizer", "MultiOptimizer", "Optimizer"}
    theirs = {name for name, value in vars(P).items() if inspect.isclass(value) and issubclass(value, P.Optimizer)}
    assert theirs - wrappers == set(OPTIMIZERS)


@pytest.mark.parametrize("name", kit.thinned(OPTIMIZERS, "SGD", "Adam", "Adagrad", "Muon"))
def test_every_optimizer_with_everything_on(name: str) -> None:
    clip = CLIPS[list(OPTIMIZERS).index(name) % 3]
    options = {"weight_decay": 0.01, "use_ema": True, "ema_momentum": 0.8, "ema_overwrite_frequency": 5, **clip}

    def optimizer() -> Any:
        rate = 0.05 if name == "Muon" else P.schedules.ExponentialDecay(0.05, 1, 0.9)  # Muon's schedules are float32
        return OPTIMIZERS[name](learning_rate=rate, **options)

    assert_same(train(classifier, inject_3, optimizer=optimizer), train(classifier, optimizer=optimizer))


# Masks, weights, sums and ragged batches: and who gets them wrong


def ours(build: Any, count: int, **options: Any) -> tuple[Any, Any]:
    return train(build, parts(count), **options)


def keras_accumulation(build: Any, count: int, x: Any, y: Any, sample_weight: Any = None, **options: Any) -> Any:
    """Keras's ``gradient_accumulation_steps``, on the parts of the same batches."""
    arrays = [array for array in (x, y, sample_weight) if array is not None]

    def micro_batches() -> Iterator[Any]:
        for batch in (slice(0, 14), slice(14, 28), slice(28, 40)):
            size = -(-len(x[batch]) // count)
            for begin in range(0, len(x[batch]), size):
                yield tuple(array[batch][begin : begin + size] for array in arrays)

    specs = tuple(tf.TensorSpec([None, *array.shape[1:]], array.dtype) for array in arrays)
    dataset = tf.data.Dataset.from_generator(micro_batches, output_signature=specs)
    optimizer = functools.partial(adam, gradient_accumulation_steps=count)
    return train(build, x=dataset, y=None, optimizer=optimizer, fit={"batch_size": None}, **options)


def mean_of_means(build: Any, count: int, **options: Any) -> tuple[Any, Any]:
    """Every part weighs alike."""
    return train(build, parts(count, weight_fn=lambda x, y, w: 1.0), **options)


def mean_by_examples(build: Any, count: int, **options: Any) -> tuple[Any, Any]:
    """A part weighs as many examples as it has."""
    return train(build, parts(count, weight_fn=lambda x, y, w: tf.shape(x)[0]), **options)


who = functools.partial(kit.who, "how")


def coalesced() -> Any:
    """The reference for embeddings: inside it, an optimizer steps as with a dense lookup."""
    return CoalesceGradients(adam())


CASES: dict[str, Callable[[], dict[str, Any]]] = {
    "masked weighted tokens": lambda: {
        "loss": cross_entropy(reduction="mean_with_sample_weight", ignore_class=1),
        "sample_weight": TOKEN_WEIGHTS,
    },
    "a sum": lambda: {"loss": cross_entropy(reduction="sum")},
    "ragged batches": lambda: {"build": functools.partial(tagger, False)},
}


@functools.cache
def whole(case: str) -> tuple[Any, Any]:
    return train(**{"build": tagger, "x": IDS, "y": TOKENS, "optimizer": coalesced, **CASES[case]()})


def check(how: Any, case: str) -> None:
    options = {"build": tagger, "x": IDS, "y": TOKENS, **CASES[case]()}
    assert_same(how(options.pop("build"), 3, **options), whole(case))


@who(ours, wrong=(keras_accumulation, mean_of_means, mean_by_examples))
def test_masked_weighted_tokens(how: Any) -> None:
    check(how, "masked weighted tokens")


@who(ours, wrong=(keras_accumulation, mean_of_means))
def test_a_sum(how: Any) -> None:
    check(how, "a sum")


@who(ours, mean_by_examples, wrong=(keras_accumulation, mean_of_means))
def test_ragged_batches(how: Any) -> None:
    check(how, "ragged batches")


# Every way to run


@functools.cache
def whole_classifier() -> tuple[Any, Any]:
    return train(classifier)


@pytest.mark.parametrize("count", [1, 4, 14, 64])
def test_any_number_of_parts(count: int) -> None:
    assert_same(train(classifier, parts(count)), whole_classifier())


@pytest.mark.parametrize("options", [{"run_eagerly": True}, {"steps_per_execution": 2}], ids=str)
def test_modes_of_fit(options: dict[str, Any]) -> None:
    assert_same(train(classifier, inject_3, **options), whole_classifier())


@pytest.mark.parametrize("options", [{"jit_compile": True}, {"jit_compile": False}], ids=str)
@pytest.mark.parametrize("build", [classifier, tagger])
def test_static_batches(build: Any, options: dict[str, Any]) -> None:
    x, y = (X, CLASSES) if build is classifier else (IDS, TOKENS)
    dataset = tf.data.Dataset.from_tensor_slices((x, y)).batch(10, drop_remainder=True)
    fit = {"batch_size": None, "epochs": 2}
    found = train(build, inject_3, dataset, None, optimizer=adam, fit=fit, **options)
    assert_same(found, train(build, x=dataset, y=None, optimizer=coalesced, fit=fit))


def test_train_on_batch_and_the_size_of_a_batch_may_change() -> None:
    models = [classifier_compiled(prepare) for prepare in (parts(4), lambda model: model)]
    for size in (3, 14, 1, 40):
        results = [model.train_on_batch(X[:size], CLASSES[:size], WEIGHTS[:size], return_dict=True) for model in models]
        mine, theirs = ({name: float(value) for name, value in logs.items()} for logs in results)
        assert mine == pytest.approx(theirs, rel=1e-12)
    for mine, theirs in zip(models[0].weights, models[1].weights, strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=0, atol=1e-12)


def classifier_compiled(prepare: Callable[[Any], Any], **options: Any) -> Any:
    keras.utils.set_random_seed(0)
    model = classifier()
    model.compile(**{"optimizer": adam(), "loss": cross_entropy(), "jit_compile": False, **options})
    return prepare(model)


# What fit shows


class CountsCalls(L.Layer):
    """Has a metric of its own, which its call updates."""

    def __init__(self) -> None:
        super().__init__()
        self.mean = keras.metrics.Mean(name="mean")

    def call(self, inputs: Any) -> Any:
        self.mean.update_state(inputs)
        return inputs


def two_outputs() -> Any:
    inputs = keras.Input((5,))
    hidden = CountsCalls()(L.Dense(4, "tanh")(inputs))
    return keras.Model(inputs, {"a": L.Dense(1, name="a")(hidden), "b": L.Dense(3, name="b")(hidden)})


def test_losses_and_metrics_of_every_output() -> None:
    options: dict[str, Any] = {
        "y": {"a": X[:, :1], "b": CLASSES},
        "loss": {"a": "mse", "b": cross_entropy(ignore_class=1)},
        "loss_weights": {"a": 0.3, "b": 2.0},
        "metrics": {"a": ["mae"], "b": [keras.metrics.SparseCategoricalCrossentropy(from_logits=True)]},
        "weighted_metrics": {"a": ["mse"], "b": ["accuracy"]},
        "sample_weight": {"a": WEIGHTS, "b": 1 - WEIGHTS},
        "fit": {"validation_data": (X[:9], {"a": X[:9, :1], "b": CLASSES[:9]})},
    }
    found = train(two_outputs, inject_3, **options)
    assert len(found[1]) == 16
    options["metrics"]["b"] = [keras.metrics.SparseCategoricalCrossentropy(from_logits=True)]  # a new one
    assert_same(found, train(two_outputs, **options))


def test_class_weights_and_masked_metrics() -> None:
    options: dict[str, Any] = {"weighted_metrics": ["accuracy"], "metrics": ["accuracy"]}
    fit = {"class_weight": {0: 0.1, 1: 2.0, 2: 0.7}}
    assert_same(train(classifier, inject_3, fit=fit, **options), train(classifier, fit=fit, **options))
    options |= {"x": IDS, "y": TOKENS, "sample_weight": TOKEN_WEIGHTS}
    assert_same(train(tagger, inject_3, **options), train(tagger, optimizer=coalesced, **options))


# Half precision


def half(policy: str) -> Any:
    keras.config.set_floatx("float32")
    keras.config.set_dtype_policy(policy)
    return keras.Sequential([keras.Input((5,)), L.Dense(16, "tanh"), L.Dense(3, dtype="float32")])


@pytest.mark.parametrize(("policy", "tolerance"), [("mixed_float16", 2e-4), ("mixed_bfloat16", 2e-3)])
def test_mixed_precision(policy: str, tolerance: float) -> None:
    build, optimizer = functools.partial(half, policy), functools.partial(P.SGD, 0.1)
    assert_same(train(build, parts(4), optimizer=optimizer), train(build, optimizer=optimizer), tolerance)


@pytest.mark.parametrize(("size", "updates"), [(1.0, 2), (6.0, 2), (1e4, 0)])
def test_no_overflow_that_the_whole_batch_would_not_have(size: float, updates: int) -> None:
    """Scaled by 2¹⁵, gradients of sums that are not yet divided would overflow float16 in all three cases."""
    build = functools.partial(half, "mixed_float16")
    options = {"y": X[:, :3] * size, "loss": "mse", "fit": {"batch_size": 40, "epochs": 2}, "optimizer": P.SGD}
    found, expected = (train(build, prepare, **options)[0].optimizer for prepare in (parts(8), lambda model: model))
    assert float(found.dynamic_scale) == float(expected.dynamic_scale)
    assert int(found.iterations) == int(expected.iterations) == updates


def test_loss_scaling_by_a_factor() -> None:
    optimizer = functools.partial(adam, loss_scale_factor=128.0)
    assert_same(train(classifier, inject_3, optimizer=optimizer), train(classifier, optimizer=optimizer))


# Together with an accumulation of several batches


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("count", [1, 3])
def test_an_accumulation_by_weight_gets_the_denominators(count: int, scaled: bool) -> None:
    """Four batches of 10 and their 12 parts, each with another number of tokens, as one batch of 40."""

    def accumulating() -> Any:
        optimizer = GradientAccumulation(adam(), 4, normalize="weight")
        return P.LossScaleOptimizer(optimizer) if scaled else optimizer

    options: dict[str, Any] = {"x": IDS, "y": TOKENS, "sample_weight": TOKEN_WEIGHTS}
    options["loss"] = cross_entropy(reduction="mean_with_sample_weight")
    fit = {"epochs": 3, "batch_size": 10}
    found, _ = train(tagger, parts(count), optimizer=accumulating, fit=fit, **options)
    expected, _ = train(tagger, optimizer=coalesced, fit={**fit, "batch_size": 40}, **options)
    for mine, theirs in zip(found.weights, expected.weights, strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=0, atol=1e-12)
    accumulation = found.optimizer.inner_optimizer if scaled else found.optimizer
    assert int(accumulation.iterations) == 3
    assert "apply" not in vars(accumulation)


def test_losses_that_one_weight_cannot_merge() -> None:
    optimizer = GradientAccumulation(adam(), 4, normalize="weight")
    model = classifier_compiled(parts(2), optimizer=optimizer, loss=cross_entropy(reduction="sum"))
    before = [weight.numpy() for weight in model.weights]
    with pytest.raises(ValueError, match=r"divide by the same.*reduction='sum'"):
        model.fit(X, CLASSES, verbose=0)
    for weight, value in zip(model.weights, before, strict=True):
        np.testing.assert_array_equal(weight, value)


# Errors, before any weight moves


class OwnStep(keras.Sequential):
    def train_step(self, data: Any) -> Any:
        return {}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"micro_batches": 0}, "an integer of at least 1. Received: micro_batches=0"),
        ({"micro_batches": 2.5}, "Received: micro_batches=2.5"),
        ({"micro_batches": "4"}, "Received: micro_batches='4'"),
        ({"micro_batches": True}, "Received: micro_batches=True"),
        ({"micro_batches": 2, "weight_fn": 3}, "Received: weight_fn=3"),
    ],
)
def test_wrong_arguments(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        inject(classifier_compiled(lambda model: model), **arguments)


def test_wrong_models() -> None:
    with pytest.raises(TypeError, match="Received: model='model'"):
        inject("model")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="must be compiled"):
        inject(classifier(), 2)
    model = OwnStep([L.Dense(3)])
    model.compile("sgd", "mse")
    with pytest.raises(ValueError, match=r"`train_step` of its own.*of class OwnStep"):
        inject(model, 2)
    model = classifier_compiled(lambda model: model)
    model.train_step = lambda data: {}
    with pytest.raises(ValueError, match="`train_step` of its own"):
        inject(model, 2)


@pytest.mark.parametrize(
    "wrap", [lambda optimizer: optimizer, P.LossScaleOptimizer, CoalesceGradients], ids=["", "scaled", "coalesced"]
)
def test_two_accumulations(wrap: Any) -> None:
    optimizer = wrap(adam(gradient_accumulation_steps=4))
    message = "do not go together.*Received: gradient_accumulation_steps=4"
    with pytest.raises(ValueError, match=message):
        classifier_compiled(parts(2), optimizer=optimizer)
    model = classifier_compiled(parts(2))  # compiled anew, it is noticed by fit
    model.compile(wrap(adam(gradient_accumulation_steps=4)), cross_entropy())
    with pytest.raises(ValueError, match=message):
        model.fit(X, CLASSES, verbose=0)


@pytest.mark.parametrize("loss", [K.Dice(), lambda y, p: keras.ops.mean(y - p), None], ids=["Dice", "mean", "None"])
def test_no_weight_moves_before_the_error(loss: Any) -> None:
    model = classifier_compiled(parts(2), loss=loss)
    model.layers[0].kernel_regularizer = model.layers[0].activity_regularizer = None
    model.layers[0].kernel.regularizer = None
    before = [weight.numpy() for weight in model.weights]
    with pytest.raises(ValueError, match=r"does not say what it divides by|The model has no loss"):
        model.fit(X, X[:, :3], verbose=0)
    for weight, value in zip(model.weights, before, strict=True):
        np.testing.assert_array_equal(weight, value)
    assert int(model.optimizer.iterations) == 0


# In and out


def test_injected_twice_the_last_counts_and_ejected_it_is_as_before() -> None:
    sizes: list[Any] = []

    def weight_fn(x: Any, y: Any, w: Any) -> Any:
        sizes.append(x.shape[0])
        return tf.shape(x)[0]

    model = classifier_compiled(lambda model: inject(inject(model, 2), 5, weight_fn), run_eagerly=True)
    model.train_on_batch(X[:10], CLASSES[:10])
    assert sizes == [2] * 10  # once to know the sum, once for the part
    eject(model).train_on_batch(X[:10], CLASSES[:10])
    assert len(sizes) == 10
    assert "train_step" not in vars(model)
    assert eject(model) is model
    own = lambda data: {}  # noqa: E731
    model.train_step = own
    assert eject(model).train_step is own


def test_compiled_anew_the_injection_stays() -> None:
    model = classifier_compiled(inject_3)
    model.fit(X, CLASSES, batch_size=14, epochs=1, shuffle=False, verbose=0)
    model.compile(P.SGD(0.1), cross_entropy(), jit_compile=False)
    model.fit(X, CLASSES, batch_size=14, epochs=1, shuffle=False, verbose=0)
    assert injection._is_injected(model)
    reference = classifier_compiled(lambda model: model)
    reference.fit(X, CLASSES, batch_size=14, epochs=1, shuffle=False, verbose=0)
    reference.compile(P.SGD(0.1), cross_entropy(), jit_compile=False)
    reference.fit(X, CLASSES, batch_size=14, epochs=1, shuffle=False, verbose=0)
    for mine, theirs in zip(model.weights, reference.weights, strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=0, atol=1e-12)


def test_saved_loaded_and_cloned_models_are_plain(tmp_path: pathlib.Path) -> None:
    model = classifier_compiled(inject_3)
    model.fit(X, CLASSES, epochs=1, verbose=0)
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    for mine, theirs in zip(loaded.weights, model.weights, strict=True):
        np.testing.assert_array_equal(mine, theirs)
    assert not injection._is_injected(loaded)
    assert not injection._is_injected(keras.models.clone_model(model))
    inject(loaded, 3).fit(X, CLASSES, epochs=1, verbose=0)  # the optimizer's state goes on
    assert int(loaded.optimizer.iterations) == 4


# On two replicas, in a process of its own: TensorFlow must divide the processor before it starts


AT_TWO = {
    "uneven shards from the first batch on",
    "an empty shard",
    "global_clipnorm",
    "scaled accumulation",
    "asked alone",
    "batch norm on an empty shard",
    "Keras, uneven from the first batch on",
    "weight_fn",
}


def on_two_replicas(slow: bool) -> dict[str, Any]:
    """For each case the greatest difference to one replica, in weights and history; or the error."""
    strategy = tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"])

    def difference(build: Any, size: int, prepare: Any = inject_3, reference: Any = None, **options: Any) -> float:
        arrays = [options.pop(name) for name in ("x", "y", "sample_weight") if name in options] or [X, CLASSES]
        batches = tf.data.Dataset.from_tensor_slices(tuple(arrays)).batch(size)
        options |= {"x": batches, "y": None, "fit": {"batch_size": None, "epochs": 2}}
        found, history = train(build, prepare, strategy=strategy, **options)
        expected, expected_history = train(build, **{**options, **(reference or {})})
        pairs = [*zip(found.weights, expected.weights, strict=True)]
        pairs += [(values, expected_history[name]) for name, values in history.items()]
        return max(float(np.max(np.abs(np.array(mine) - np.array(theirs)))) for mine, theirs in pairs)

    def batch_norm() -> Any:
        return keras.Sequential([keras.Input((5,)), L.BatchNormalization(), L.Dropout(0.5), L.Dense(3)])

    def accumulating(wrap: Any = lambda optimizer: optimizer) -> Any:
        return wrap(GradientAccumulation(adam(global_clipnorm=0.1), 2, normalize="weight"))

    def not_finite() -> int:
        batches = tf.data.Dataset.from_tensor_slices((X, CLASSES)).batch(13)
        model, _ = train(batch_norm, inject_3, batches, None, strategy=strategy, fit={"batch_size": None, "epochs": 1})
        return sum(not np.isfinite(weight).all() for weight in model.weights)

    def alone() -> float:
        model, _ = train(classifier, strategy=strategy, fit={"epochs": 0})
        batch = X[:7], CLASSES[:7]
        later = [variable + 0.1 for variable in model.trainable_variables]
        shards = strategy.experimental_distribute_values_from_function(
            lambda context: tuple(a[context.replica_id_in_sync_group * 5 :][:5] for a in batch)
        )
        ask = tf.function(lambda data: GradientOracle(model, data, 2)(later), autograph=False)
        answers = [strategy.experimental_local_results(each) for each in strategy.run(ask, (shards,))]
        expected = GradientOracle(train(classifier, fit={"epochs": 0})[0], batch)(later)
        return max(float(np.abs(a - b).max()) for each, b in zip(answers, expected, strict=True) for a in each)

    masked = {"x": IDS, "y": TOKENS, "sample_weight": TOKEN_WEIGHTS}
    masked["loss"] = cross_entropy(reduction="mean_with_sample_weight", ignore_class=1)
    one_part = {"prepare": parts(1), "optimizer": accumulating}
    cases: dict[str, Callable[[], Any]] = {
        "even shards": lambda: difference(classifier, 20, metrics=["accuracy"]),
        "uneven shards from the first batch on": lambda: difference(classifier, 13, metrics=["accuracy"]),
        "an empty shard": lambda: difference(classifier, 39),
        "loss scaling": lambda: difference(classifier, 13, optimizer=lambda: P.LossScaleOptimizer(adam())),
        "masked tokens": lambda: difference(tagger, 13, reference={"optimizer": coalesced}, **masked),
        "accumulation": lambda: difference(tagger, 10, reference=one_part, optimizer=accumulating, **masked),
        "scaled accumulation": lambda: difference(
            tagger, 10, reference=one_part, optimizer=lambda: accumulating(P.LossScaleOptimizer), **masked
        ),
        "asked alone": alone,
        "batch norm on an empty shard": not_finite,
        "Keras, a last batch of one": lambda: difference(classifier, 38, lambda model: model, x=X[:39], y=CLASSES[:39]),
        "Keras, uneven from the first batch on": lambda: difference(classifier, 13, lambda model: model),
        "weight_fn": lambda: difference(classifier, 20, parts(3, weight_fn=lambda x, y, w: 1.0)),
    }
    for clip in CLIPS:
        optimizer = functools.partial(P.SGD, 0.1, **clip)
        cases[next(iter(clip))] = functools.partial(difference, classifier, 13, optimizer=optimizer)
    found: dict[str, Any] = {}
    for name, case in cases.items():
        try:
            found |= {} if slow is (name in AT_TWO) else {name: case()}
        except Exception as error:  # the test shows it
            found[name] = f"{type(error).__name__}: {str(error)[-2000:]}"
    return found


def two_replicas(slow: bool = False) -> dict[str, Any]:
    program = f"""
import keras
keras.config.set_floatx("float64")
keras.config.set_dtype_policy("float64")
from tests import test_injection
print(json.dumps(test_injection.on_two_replicas({slow})))
"""
    return on_devices(2, program)


KERAS_FAILS = pytest.mark.xfail(strict=True, raises=(AssertionError, TypeError))


@pytest.mark.parametrize(
    "case",
    kit.thinned(
        [
            "even shards",
            "uneven shards from the first batch on",
            "an empty shard",
            "clipnorm",
            "global_clipnorm",
            "clipvalue",
            "loss scaling",
            "masked tokens",
            "accumulation",
            "scaled accumulation",
            "asked alone",
            "batch norm on an empty shard",
            pytest.param("Keras, a last batch of one", marks=KERAS_FAILS),
            pytest.param("Keras, uneven from the first batch on", marks=KERAS_FAILS),
        ],
        *AT_TWO - {"weight_fn"},
    ),
)
def test_two_replicas_are_as_one(case: str) -> None:
    found = two_replicas(case not in AT_TWO)[case]
    assert isinstance(found, float | int), found
    assert found < 1e-12


def test_weight_fn_on_two_replicas_is_refused() -> None:
    assert "`weight_fn` works on one replica only" in two_replicas()["weight_fn"]


# On two workers, each a process, where Keras's own training step raises (keras issue 20585)


WORKER = """
import contextlib, json, os, pathlib, sys
import tensorflow as tf

strategy = tf.distribute.MultiWorkerMirroredStrategy() if "TF_CONFIG" in os.environ else None
import keras, numpy as np
from companion.injection import InjectedModel, inject
from companion.merging import median


class Injected(InjectedModel, keras.Sequential):
    pass


def run(prepare, kind=keras.Sequential):
    keras.utils.set_random_seed(0)
    generator = np.random.default_rng(0)
    x, y = generator.normal(size=(26, 4)).astype("float32"), generator.normal(size=(26, 2)).astype("float32")
    options = tf.data.Options()
    options.experimental_distribute.auto_shard_policy = tf.data.experimental.AutoShardPolicy.DATA
    batches = tf.data.Dataset.from_tensor_slices((x, y)).batch(7).with_options(options)
    with strategy.scope() if strategy else contextlib.nullcontext():
        model = kind([keras.Input((4,)), keras.layers.Dense(3, "tanh"), keras.layers.Dense(2)])
        optimizer = keras.optimizers.SGD(0.1, momentum=0.9, global_clipnorm=0.5)
        model.compile(optimizer, "mse", metrics=["mae"], jit_compile=False)
    prepare(model)
    history = model.fit(batches, epochs=2, validation_data=batches, shuffle=False, verbose=0)
    outcome = [*model.get_weights(), *history.history.values(), model.evaluate(batches, verbose=0)]
    return np.concatenate([np.ravel(values) for values in outcome]).tolist()


results = {}
for name, arguments in {
    "in parts": (lambda model: inject(model, 2),),
    "class": (lambda model: model, Injected),
    "by a rule": (lambda model: inject(model, merge=median),),
    "Keras": (lambda model: model,),
}.items():
    try:
        results[name] = run(*arguments)
    except Exception as error:
        results[name] = f"{type(error).__name__}: {error}"
me = str(strategy.cluster_resolver.task_id) if strategy else "alone"
pathlib.Path(sys.argv[1]).with_suffix(f".{me}").write_text(json.dumps(results))
"""


@once_a_run
def two_workers() -> list[dict[str, Any]]:
    """What two workers, and last a process alone, ended on in each case, or the error."""
    with tempfile.TemporaryDirectory() as folder:
        script = pathlib.Path(folder) / "worker.py"
        script.write_text(WORKER)
        printed = io.StringIO()
        with warm_workers():
            assert launch(2, script, [str(script)], out=printed) == 0, printed.getvalue()[-3000:]
            subprocess.run([sys.executable, str(script), str(script)], check=True, capture_output=True)
        return [json.loads(script.with_suffix(f".{name}").read_text()) for name in ("0", "1", "alone")]


@pytest.mark.parametrize("case", ["in parts", "class", pytest.param("Keras", marks=KERAS_FAILS)])
def test_two_workers_are_as_one(case: str) -> None:
    *workers, alone = two_workers()
    for found in workers:
        assert not isinstance(found[case], str), found[case]
        np.testing.assert_allclose(found[case], alone["Keras"], rtol=0, atol=1e-6)


def test_workers_merge_by_a_rule() -> None:
    one, other, alone = (found["by a rule"] for found in two_workers())
    assert one == other
    assert np.abs(np.array(one) - alone).max() > 1e-3


def test_private_names_are_where_they_were() -> None:
    model = classifier_compiled(lambda model: model)
    build = getattr(model, injection._BUILD_FROM_ITERATOR)
    assert list(inspect.signature(build).parameters) == ["iterator", "data_batch"]
    assert "data_batch" in inspect.signature(getattr(model, injection._BUILD_FROM_BATCH)).parameters
