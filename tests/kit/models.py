"""Models of the kinds that people train, each with a batch: `CASES[name]()` makes one, compiled, from one seed."""

import dataclasses
from collections.abc import Callable
from typing import Any

import keras
import numpy as np
import tensorflow as tf
from keras import ops

L = keras.layers
SGD = keras.optimizers.SGD


@dataclasses.dataclass
class Case:
    """A compiled model and its data.

    Attributes:
        model: the model.
        batch: one batch of (x, y, sample_weight), or a shorter tuple.
        parts: whether a batch in parts is "exact", "drawn" (it trains, on other draws or statistics), or "refused".
        again: whether several questions of one batch can be asked of it.
        has_rows: whether there is an embedding, whose repeated rows are summed.
        others: objects with variables that neither the model nor its optimizer knows.
    """

    model: Any
    batch: Any
    parts: str = "exact"
    again: bool = True
    has_rows: bool = False
    others: tuple[Any, ...] = ()


CASES: dict[str, Callable[[], Case]] = {}


def case(function: Callable[[], Case]) -> Callable[[], Case]:
    def make() -> Case:
        if not tf.distribute.has_strategy():
            keras.utils.clear_session(free_memory=False)
        keras.utils.set_random_seed(7)
        return function()

    CASES[function.__name__.replace("_", " ")] = make
    return make


def numbers(*shape: int, seed: int = 0) -> Any:
    return tf.constant(np.random.default_rng(seed).normal(size=shape).astype("float32"))


def ids(*shape: int, below: int = 5, seed: int = 0) -> Any:
    return tf.constant(np.random.default_rng(seed).integers(0, below, shape).astype("int32"))


def compiled(layers: Any, loss: Any = "mse", optimizer: Any = None, **options: Any) -> Any:
    model = keras.Sequential(layers) if isinstance(layers, list) else layers
    model.compile(optimizer or SGD(0.1, momentum=0.9), loss, **options)
    return model


X, Y = numbers(6, 4), numbers(6, 1, seed=1)


@case
def dense_with_regularizers_and_constraints() -> Case:
    norm = keras.constraints.MaxNorm(0.5)
    dense = L.Dense(3, "tanh", kernel_regularizer="l2", activity_regularizer="l1", kernel_constraint=norm)
    optimizer = keras.optimizers.AdamW(0.1, clipnorm=0.1, use_ema=True, ema_overwrite_frequency=2)
    return Case(compiled([keras.Input((4,)), dense, L.Dense(1)], optimizer=optimizer, metrics=["mae"]), (X, Y))


@case
def not_built() -> Case:
    return Case(compiled([L.Dense(3, "relu"), L.Dense(1)], metrics=["mae"]), (X, Y))


@case
def batch_norm_and_dropout() -> Case:
    layers = [keras.Input((4,)), L.BatchNormalization(), L.Dropout(0.5), L.Dense(1)]
    return Case(compiled(layers), (X, Y), parts="drawn")


@case
def stateful_gru() -> Case:
    layers = [keras.Input(batch_shape=(6, 3, 2)), L.GRU(4, stateful=True, dropout=0.2), L.Dense(1)]
    return Case(compiled(layers), (numbers(6, 3, 2), Y), parts="refused")


class Sampling(L.Layer):
    """Draws without a seed, and adds a divergence."""

    def call(self, inputs: Any) -> Any:
        mean, log_variance = inputs
        self.add_loss(-0.5 * ops.mean(1 + log_variance - mean**2 - ops.exp(log_variance)))
        return mean + ops.exp(0.5 * log_variance) * keras.random.normal(ops.shape(mean))


@case
def variational_autoencoder() -> Case:
    inputs = keras.Input((4,))
    code = Sampling()([L.Dense(2)(inputs), L.Dense(2)(inputs)])
    return Case(compiled(keras.Model(inputs, L.Dense(4)(code))), (X, X), parts="drawn")


class Graph(keras.Model):
    """Nodes and edges: two inputs of different lengths."""

    def __init__(self) -> None:
        super().__init__()
        self.dense = L.Dense(1)

    def call(self, inputs: Any) -> Any:
        nodes, edges = inputs
        sent = ops.segment_sum(ops.take(nodes, edges[:, 0], 0), edges[:, 1], num_segments=6)
        return self.dense(nodes + sent)


@case
def graph_with_edges() -> Case:
    return Case(compiled(Graph()), ((X, ids(14, 2)), Y), parts="refused")


def list_wise(targets: Any, outputs: Any) -> Any:
    return -ops.sum(ops.softmax(targets, 0) * ops.log_softmax(outputs, 0))


@case
def one_list_to_rank() -> Case:
    return Case(compiled([keras.Input((4,)), L.Dense(1)], list_wise), (X, Y), parts="refused")


@case
def lists_to_rank() -> Case:
    loss = lambda y, p: -ops.sum(ops.softmax(y, 1) * ops.log_softmax(p, 1), 1)  # noqa: E731
    layers = [keras.Input((5, 4)), L.Dense(1), L.Reshape((5,))]
    return Case(compiled(layers, loss), (numbers(6, 5, 4), numbers(6, 5, seed=1)))


class CTC(L.Layer):
    """Adds a loss for each example."""

    def call(self, labels: Any, outputs: Any) -> Any:
        lengths = [ops.ones((ops.shape(labels)[0],), "int32") * n for n in (2, 6)]
        self.add_loss(ops.ctc_loss(labels, outputs, lengths[0], lengths[1], 0)[:, None])
        return outputs


@case
def captcha_by_add_loss() -> Case:
    x, labels = keras.Input((6, 4), name="image"), keras.Input((2,), dtype="int32", name="label")
    model = keras.Model([x, labels], CTC()(labels, L.Dense(4)(x)))
    return Case(compiled(model, None), ([numbers(6, 6, 4), 1 + ids(6, 2, below=3)],))


@case
def sparse_input() -> Case:
    x = tf.sparse.from_dense(np.eye(6, 4, dtype="float32"))
    return Case(compiled([keras.Input((4,), sparse=True), L.Dense(2), L.Dense(1)]), (x, Y))


class RaggedMean(keras.Model):
    def __init__(self) -> None:
        super().__init__()
        self.dense = L.Dense(1)

    def call(self, inputs: Any) -> Any:
        return self.dense(tf.reduce_mean(inputs, 1))


@case
def ragged_input() -> Case:
    lengths = np.array([1, 3, 2, 5, 1, 2])
    x = tf.RaggedTensor.from_row_lengths(numbers(14, 4), lengths)
    return Case(compiled(RaggedMean()), (x, Y))


class Running(keras.losses.Loss):
    """A loss that counts its calls, in a variable of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.count = keras.Variable(0.0, trainable=False)

    def call(self, targets: Any, outputs: Any) -> Any:
        self.count.assign_add(1.0)
        return ops.mean((targets - outputs) ** 2, -1) * self.count


@case
def loss_with_state() -> Case:
    loss = Running()
    return Case(compiled([keras.Input((4,)), L.Dense(1)], loss), (X, Y), parts="drawn", others=(loss,))


class Tracked(keras.Model):
    """Reports two numbers from a ``compute_loss`` of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.dense, self.kl = L.Dense(1), keras.metrics.Mean(name="kl")

    def call(self, inputs: Any) -> Any:
        return self.dense(inputs)

    def compute_loss(self, x: Any, y: Any, y_pred: Any, sample_weight: Any, training: bool) -> Any:
        assert training
        loss = ops.mean((y - y_pred) ** 2)
        self.kl.update_state(2 * loss)
        return loss


@case
def tracker_in_compute_loss() -> Case:
    return Case(compiled(Tracked(), None), (X, Y), parts="refused")


class OwnMetrics(keras.Sequential):
    """What ``fit`` shows: one number added, one renamed, one removed; one that only the moved weights say."""

    def compute_metrics(self, x: Any, y: Any, y_pred: Any, sample_weight: Any = None) -> Any:
        logs = super().compute_metrics(x, y, y_pred, sample_weight)
        logs.pop("mae")
        return {"my_loss": logs["loss"], "largest": ops.max(y_pred), "norm": ops.sum(self.layers[-1].kernel)}


@case
def compute_metrics_of_its_own() -> Case:
    return Case(compiled(OwnMetrics([keras.Input((4,)), L.Dense(1)]), metrics=["mae"]), (X, Y), parts="drawn")


class OwnLoss(keras.Model):
    """Its only metric is its own, and is called "loss"."""

    def __init__(self) -> None:
        super().__init__()
        self.dense, self.mean = L.Dense(1), keras.metrics.Mean(name="loss")

    def call(self, inputs: Any) -> Any:
        return self.dense(inputs)

    def compute_loss(self, x: Any = None, y: Any = None, y_pred: Any = None, sample_weight: Any = None) -> Any:
        each = (y - y_pred) ** 2
        self.mean.update_state(each)
        return ops.sum(each)

    def compute_metrics(self, x: Any, y: Any, y_pred: Any, sample_weight: Any = None) -> Any:
        return {"loss": self.mean.result()}

    @property
    def metrics(self) -> Any:
        return [self.mean]


@case
def metric_of_its_own_called_loss() -> Case:
    return Case(compiled(OwnLoss(), None, SGD(0.01)), (X, Y), parts="refused")


@case
def two_outputs() -> Case:
    inputs = keras.Input((4,))
    model = keras.Model(inputs, {"a": L.Dense(1, name="a")(inputs), "b": L.Dense(3, "softmax", name="b")(inputs)})
    losses = {"a": "mse", "b": "sparse_categorical_crossentropy"}
    compiled(model, losses, loss_weights={"a": 0.5, "b": 2.0}, metrics={"a": ["mae"], "b": ["accuracy"]})
    return Case(model, (X, {"a": Y, "b": ids(6, 1, below=3)}))


@case
def output_without_a_loss() -> Case:
    inputs = keras.Input((4,))
    model = keras.Model(inputs, {"a": L.Dense(2, name="a", activity_regularizer="l2")(inputs)})
    return Case(compiled(model, {"a": None}), (X,))


@case
def shared_towers() -> Case:
    one, two = keras.Input((4,)), keras.Input((4,))
    tower = keras.Sequential([L.Dense(3, "relu"), L.Dense(2)])
    model = keras.Model([one, two], L.Dot(1, normalize=True)([tower(one), tower(two)]))
    return Case(compiled(model), ([X, numbers(6, 4, seed=3)], Y))


class Transformer(keras.Model):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.attend = L.Embedding(5, 4, mask_zero=True), L.MultiHeadAttention(2, 2)
        self.norm, self.out = L.LayerNormalization(), L.Dense(5)

    def call(self, inputs: Any, training: bool = False) -> Any:
        x = self.embed(inputs)
        return self.out(self.norm(x + self.attend(x, x, use_causal_mask=True, training=training)))


@case
def masked_transformer() -> Case:
    model = Transformer()
    model(ids(2, 3))
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    optimizer = keras.optimizers.Adam(0.1)
    compiled(model, loss, optimizer, weighted_metrics=["accuracy"])
    return Case(model, (ids(6, 5), ids(6, 5, seed=1), tf.abs(numbers(6, 5))), has_rows=True)


@case
def embeddings() -> Case:
    layers = [keras.Input((3,), dtype="int32"), L.Embedding(5, 2), L.Flatten(), L.Dense(1)]
    return Case(compiled(layers, optimizer=keras.optimizers.Adagrad(0.1)), (ids(6, 3), Y), has_rows=True)


@case
def sample_weights() -> Case:
    loss = keras.losses.MeanSquaredError(reduction="mean_with_sample_weight")
    model = compiled([keras.Input((4,)), L.Dense(1)], loss, metrics=["mse"], weighted_metrics=["mae"])
    return Case(model, (X, Y, tf.abs(numbers(6))))


@case
def mixed_precision() -> Case:
    layers = [keras.Input((4,)), L.Dense(3, "relu", dtype="mixed_float16"), L.Dense(1, dtype="float32")]
    optimizer = keras.optimizers.LossScaleOptimizer(SGD(0.1), initial_scale=2.0**15, dynamic_growth_steps=2)
    return Case(compiled(layers, optimizer=optimizer), (X, Y), parts="drawn")


@case
def loss_scale_factor() -> Case:
    return Case(compiled([keras.Input((4,)), L.Dense(1)], optimizer=SGD(0.1, loss_scale_factor=10.0)), (X, Y))


@case
def bag_of_instances() -> Case:
    inputs = keras.Input((4,))
    bag = L.Lambda(lambda t: ops.mean(t, 0, keepdims=True), output_shape=(4,))(inputs)
    return Case(compiled(keras.Model(inputs, L.Dense(1)(bag))), (X, Y[:1]), parts="refused")


@case
def shared_input_first() -> Case:
    anchors, image = keras.Input((4,), name="anchors"), keras.Input((4,), name="image")
    output = L.Dense(1)(L.Multiply()([anchors, image]))
    model = keras.Model({"anchors": anchors, "image": image}, output)
    return Case(compiled(model), ({"anchors": X[:1], "image": X}, Y), parts="refused")


class NoTraining(keras.Model):
    """Its ``call`` takes no ``training``, so Keras's step leaves the dropout inside out."""

    def __init__(self) -> None:
        super().__init__()
        self.drop, self.dense = L.Dropout(0.5), L.Dense(1)

    def call(self, inputs: Any) -> Any:
        return self.dense(self.drop(inputs))


@case
def subclass_without_training() -> Case:
    return Case(compiled(NoTraining()), (X, Y))


class WithTraining(NoTraining):
    def call(self, inputs: Any, training: bool = False) -> Any:
        return self.dense(self.drop(inputs, training=training)) * (2.0 if training else 1.0)


@case
def subclass_with_training() -> Case:
    return Case(compiled(WithTraining()), (X, Y), parts="drawn")


@case
def assigns_to_its_weights() -> Case:
    layers = [keras.Input((4,)), L.SpectralNormalization(L.Dense(1))]
    return Case(compiled(layers), (X, Y), parts="refused", again=False)


class Branch(L.Layer):
    """Draws in a branch."""

    def __init__(self) -> None:
        super().__init__()
        self.seed = keras.random.SeedGenerator(3)

    def call(self, inputs: Any) -> Any:
        draw = lambda: inputs + keras.random.normal(ops.shape(inputs), seed=self.seed)  # noqa: E731
        return ops.cond(ops.sum(inputs) < 1e9, draw, lambda: inputs)


@case
def draws_in_a_branch() -> Case:
    return Case(compiled([keras.Input((4,)), Branch(), L.Dense(1)]), (X, Y), parts="drawn")


class Traced(L.Layer):
    """Its call is a function of TensorFlow."""

    def build(self, shape: Any) -> None:
        self.kernel = self.add_weight(shape=(shape[-1], 2))

    @tf.function(autograph=False)
    def call(self, inputs: Any) -> Any:
        return inputs @ self.kernel.value


@case
def function_of_tensorflow() -> Case:
    return Case(compiled([keras.Input((4,)), Traced(), L.Dense(1)]), (X, Y), again=False)


class Recomputed(L.Layer):
    """Its gradient calculates it again, which saves memory: a custom gradient over variables."""

    def build(self, shape: Any) -> None:
        self.kernel = self.add_weight(shape=(shape[-1], 3), regularizer="l2")

    def call(self, inputs: Any) -> Any:
        return keras.remat(lambda x: ops.tanh(ops.matmul(x, self.kernel)))(inputs)


@case
def recomputed_in_the_gradient() -> Case:
    return Case(compiled([keras.Input((4,)), Recomputed(), L.Dense(1)]), (X, Y), again=False)


class Loop(Recomputed):
    def call(self, inputs: Any) -> Any:
        body = lambda i, x: (i + 1, ops.tanh(ops.matmul(x, self.kernel) @ ops.transpose(self.kernel)))  # noqa: E731
        return ops.while_loop(lambda i, x: i < 3, body, (0, inputs), maximum_iterations=3)[1]


@case
def weights_in_a_loop() -> Case:
    return Case(compiled([keras.Input((4,)), Loop(), L.Dense(1)]), (X, Y))


class Auxiliary(keras.Model):
    """One layer is called in training only; ``compute_metrics`` shows what was added to the loss."""

    def __init__(self) -> None:
        super().__init__()
        self.dense, self.aside, self.out = L.Dense(3, kernel_regularizer="l2"), L.Dense(3, "tanh"), L.Dense(1)

    def call(self, inputs: Any, training: bool = False) -> Any:
        hidden = self.dense(inputs)
        self.add_loss(ops.mean(hidden**2))
        return self.out(self.aside(hidden) if training else hidden)

    def compute_metrics(self, x: Any, y: Any, y_pred: Any, sample_weight: Any = None) -> Any:
        added = dict(zip("ab", self.losses, strict=True))
        return {**super().compute_metrics(x, y, y_pred, sample_weight), **added}


@case
def layer_called_in_training_only() -> Case:
    model = Auxiliary()
    model(X)
    return Case(compiled(model), (X, Y), parts="drawn")


class Counting(L.Layer):
    """Counts its calls in a weight, and shows the mean of what it has seen."""

    def build(self, shape: Any) -> None:
        self.calls = self.add_weight(shape=(), dtype="int32", initializer="zeros", trainable=False)
        self.seen = keras.metrics.Mean(name="seen")

    def call(self, inputs: Any) -> Any:
        self.calls.assign_add(1)
        self.seen.update_state(inputs)
        return inputs


@case
def layer_with_counter_and_metric() -> Case:
    return Case(compiled([keras.Input((4,)), Counting(), L.Dense(1)]), (X, Y), parts="drawn")


class RunningSize(L.Layer):
    """Divides by a running mean that it has moved in the same call: no gradient goes through a variable."""

    def build(self, shape: Any) -> None:
        self.size = self.add_weight(shape=(), initializer="ones", trainable=False)

    def call(self, inputs: Any) -> Any:
        self.size.assign(0.5 * self.size + 0.5 * ops.mean(ops.abs(inputs)))
        return inputs / self.size


@case
def state_that_is_read_again() -> Case:
    return Case(compiled([keras.Input((4,)), L.Dense(3), RunningSize(), L.Dense(1)]), (X, Y), parts="drawn")


@case
def frozen_layer() -> Case:
    model = keras.Sequential([keras.Input((4,)), L.Dense(3), L.BatchNormalization(), L.Dense(1)])
    model.layers[0].trainable = model.layers[1].trainable = False
    return Case(compiled(model), (X, Y))


@case
def augmentation() -> Case:
    layers = [keras.Input((4, 4, 1)), L.RandomFlip(), L.RandomTranslation(0.2, 0.2), L.Flatten(), L.Dense(1)]
    return Case(compiled(layers), (numbers(6, 4, 4, 1), Y), parts="drawn")


class Contrastive(keras.losses.Loss):
    def call(self, targets: Any, outputs: Any) -> Any:
        logits = ops.matmul(targets, ops.transpose(outputs))
        return keras.losses.sparse_categorical_crossentropy(ops.arange(ops.shape(logits)[0]), logits, from_logits=True)


@case
def contrastive_in_batch() -> Case:
    return Case(compiled([keras.Input((4,)), L.Dense(4)], Contrastive()), (X, X), parts="refused")


class NotScalar(NoTraining):
    def compute_loss(self, x: Any = None, y: Any = None, y_pred: Any = None, sample_weight: Any = None) -> Any:
        return (y - y_pred) ** 2


@case
def compute_loss_that_is_not_scalar() -> Case:
    return Case(compiled(NotScalar(), None), (X, Y), parts="refused")


# What random models are made of

RANDOM_LAYERS: dict[str, Callable[[], Any]] = {
    "dense": lambda: L.Dense(3, "tanh", kernel_regularizer="l2"),
    "active": lambda: L.Dense(2, "relu", activity_regularizer="l1", kernel_constraint="non_neg"),
    "dropout": lambda: L.Dropout(0.3),
    "noise": lambda: L.GaussianNoise(0.1),
    "batch norm": lambda: L.BatchNormalization(),
    "spectral norm": lambda: L.SpectralNormalization(L.Dense(2)),
    "counter": Counting,
    "branch": Branch,
    "adds": lambda: L.ActivityRegularization(0.1),
    "recurrent": lambda: keras.Sequential([L.Reshape((-1, 1)), L.GRU(2, dropout=0.2)]),
    "lookup": lambda: keras.Sequential([L.Dense(2), L.Softmax(), L.Dense(2, use_bias=False)]),
}
RANDOM_LOSSES: dict[str, tuple[Any, str]] = {
    "mse": (keras.losses.MeanSquaredError, "linear"),
    "cosine": (keras.losses.CosineSimilarity, "linear"),
    "binary": (keras.losses.BinaryCrossentropy, "sigmoid"),
    "divergence": (keras.losses.KLDivergence, "softmax"),
    "poisson": (keras.losses.Poisson, "softplus"),
    "dice": (keras.losses.Dice, "sigmoid"),
}
