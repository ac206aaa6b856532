r"""Words as vectors: skip-gram with negative sampling, its gradient written by hand. Chapter 04 teaches it.

The model has two tables, a row of each for every word. A step needs a few thousand of these rows, however long the
tables are, so what a step costs depends on whether anything in it goes through all of them.
"""

import inspect
import os
import pathlib
from collections.abc import Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf
from keras import ops, tree

from companion.arguments import choice, integer
from companion.backend import environment
from companion.gradients import coalesce, scaled
from companion.lion import Lion
from companion.optimizers import SGD, AdamsBashforth2, Momentum, OptimisticSGD
from companion.replicas import all_reduce, brought_by_one
from companion.schedule_free import ScheduleFreeAdamW
from companion.word_pairs import NO_LISTS, read_windows, words_in
from companion.word_pairs import skip_gram_pairs as skip_gram_pairs
from companion.word_pairs import vocabulary as vocabulary
from companion.wrapping import CoalesceGradients, wrapped_by

_ADD_UP = (
    SGD,
    Momentum,
    OptimisticSGD,
    AdamsBashforth2,
    Lion,
    ScheduleFreeAdamW,
    keras.optimizers.SGD,
    keras.optimizers.Lion,
)
_LEAVE_AS_IS = (CoalesceGradients, keras.optimizers.LossScaleOptimizer)


@keras.saving.register_keras_serializable(package="companion")
class SkipGram(keras.Model):
    r"""Predicts from a word which words stand near it, and learns a vector for each word on the way.

    A word :math:`w` has the vector :math:`u` when it is the centre, and :math:`v` when it is in another's context. For
    one pair of neighbours and :math:`K` words drawn at random, candidates :math:`j = 0, \dots, K` of which only the
    first, :math:`y_0 = 1`, is a neighbour,

    .. math::

       s_j = u \cdot v_j, \qquad
       L = -\log \sigma(s_0) - \sum_{j=1}^{K} \log \sigma(-s_j), \qquad
       \frac{\partial L}{\partial u} = \sum_{j=0}^{K} \bigl(\sigma(s_j) - y_j\bigr)\, v_j, \qquad
       \frac{\partial L}{\partial v_j} = \bigl(\sigma(s_j) - y_j\bigr)\, u .

    The loss of a batch is the *sum* over its pairs, so that the learning rate means what it means in the paper, where
    each pair makes a step of its own, whatever the batch size. The progress bar shows the mean.

    Compile it with an optimizer and no loss; train it with ``fit`` on what
    :func:`~companion.word_pairs.skip_gram_pairs` returns, or :func:`~companion.word_pairs.skip_gram_windows`, which is
    several times as fast: there candidate :math:`j` counts :math:`c_{ij}` for centre :math:`i`, :math:`y_{ij}` of it as
    a neighbour, and :math:`\partial L / \partial s_{ij} = c_{ij}\, \sigma(s_{ij}) - y_{ij}`. Any Keras
    optimizer will do: rows that occur twice in a batch, on whatever replicas, are summed before an optimizer that would
    not sum them. But only SGD without momentum leaves the rows alone that are not in the batch.

    Args:
        vocabulary_size: number of rows, at least 2.
        dimension: length of a vector. Defaults to 100.
        negatives: :math:`K`, number of random words for each pair. Defaults to 5.
        gradients: ``"closed_form"``, the formulas above, or ``"autodiff"``, two ``Embedding`` layers and a gradient
            tape, as one would write it in Keras. Defaults to ``"closed_form"``.
        words: the words of the rows, or numbers of items, for :meth:`most_similar` and :meth:`save_word2vec_format`;
            they are saved with the model. Defaults to ``None``.
        seed: of the initial vectors. Defaults to ``None``.
        **kwargs: those of ``keras.Model``: ``name``, ``dtype``.

    Attributes:
        centres: the ``Embedding`` layer of the :math:`u`, the vectors that one keeps. Initially uniform in
            :math:`\pm 1/2` over the dimension.
        contexts: that of the :math:`v`. Initially zero.

    Raises:
        ValueError: an argument is not what it should be; at the first step, ``compile`` was given a loss or metrics,
            nothing is trainable, or the data are not pairs or windows: with labels, with ``sample_weight``, or with
            another number of ``negatives``.

    Example:
        >>> text = [["the", "cat", "sat"], ["the", "dog", "sat"]] * 50
        >>> words = vocabulary(text)
        >>> model = SkipGram(len(words), dimension=8, words=words, seed=0)
        >>> model.compile(keras.optimizers.SGD(0.1))
        >>> pairs = skip_gram_pairs(text, words, batch_size=16, subsample=None)
        >>> _ = model.fit(pairs, epochs=20, shuffle=False, verbose=0)
        >>> model.most_similar("cat", count=1)[0][0]
        'dog'

    References:
        Mikolov, Sutskever, Chen, Corrado and Dean, 2013, "Distributed representations of words and phrases and their
        compositionality".

    Taught in chapter 04, :doc:`/notebooks/04_gradients_by_hand`.
    """

    def __init__(
        self,
        vocabulary_size: int,
        dimension: int = 100,
        negatives: int = 5,
        gradients: str = "closed_form",
        words: Sequence[Any] | None = None,
        seed: int | None = None,
        **kwargs: Any,
    ) -> None:
        environment()
        super().__init__(**kwargs)
        self.vocabulary_size = integer("vocabulary_size", vocabulary_size, 2)
        self.dimension = integer("dimension", dimension, 1)
        self.negatives = integer("negatives", negatives, 1)
        self.gradients, self.seed = choice("gradients", gradients, ("closed_form", "autodiff")), seed
        self.vocabulary: tuple[Any, ...] | None = None
        if words is not None:
            with words_in("words"):
                found = tuple(word.item() if isinstance(word, np.generic) else word for word in words)
                different = len(set(found))
            if isinstance(words, NO_LISTS) or not different == len(found) == self.vocabulary_size:
                raise ValueError(
                    f"`words` must be a list of `vocabulary_size` = {self.vocabulary_size} different words. Received: "
                    f"{different} different entries in words={words!r:.60}"
                )
            self.vocabulary = found
        if self.dtype_policy.name not in ("float32", "float64"):
            raise ValueError(f"`dtype` must be float32 or float64. Received: dtype={self.dtype_policy.name}")
        bound = 0.5 / self.dimension
        uniform = keras.initializers.RandomUniform(-bound, bound, seed=seed)
        size = (self.vocabulary_size, self.dimension)
        self.centres = keras.layers.Embedding(*size, uniform, dtype=self.dtype_policy, name="centres")
        self.contexts = keras.layers.Embedding(*size, "zeros", dtype=self.dtype_policy, name="contexts")
        self.centres.build()
        self.contexts.build()
        self.loss_of_a_pair = keras.metrics.Mean(name="loss")
        self.built = True

    @property
    def metrics(self) -> list[Any]:
        """The mean loss of a pair."""
        return [self.loss_of_a_pair]

    def call(self, inputs: tuple[Any, Any]) -> Any:
        """Returns the scores, of shape ``(batch, 1 + negatives)``: larger for candidates more likely to be near."""
        if len(inputs) != 2:
            raise ValueError(
                "Scores are those of `(centres, candidates)`, as `word_pairs.skip_gram_pairs` makes them; of windows, "
                f"`word_pairs.read_windows(*windows, negatives)[:2]`. Received: {len(inputs)} arrays"
            )
        centres, candidates = inputs
        to_each = "bd,bkd->bk" if len(centres.shape) == 1 else "bcd,bkd->bck"
        return ops.einsum(to_each, self.centres(centres), self.contexts(candidates))

    def closed_form(
        self,
        centres: Any,
        candidates: Any,
        near: Any = None,
        weight: Any = 1,
    ) -> tuple[Any, list[Any]]:
        """Returns loss and gradients by the formulas, a row for each occurrence."""
        if near is None:
            centres, near = tf.expand_dims(centres, 1), self._first(candidates)
        u = tf.gather(self.centres.embeddings.value, centres)
        v = tf.gather(self.contexts.embeddings.value, candidates)
        s = tf.matmul(u, v, transpose_b=True)
        error = weight * tf.sigmoid(s) - near
        du = tf.matmul(error, v)
        dv = tf.matmul(error, u, transpose_a=True)
        return _loss(s, near, weight), [self._rows(du, centres), self._rows(dv, candidates)]

    def autodiff(self, centres: Any, candidates: Any, near: Any = None, weight: Any = 1) -> tuple[Any, list[Any]]:
        """Returns the same as :meth:`closed_form`, with the gradients from a tape around ``call``."""
        with tf.GradientTape() as tape:
            loss = self._forward(centres, candidates, near, weight)
        tables = [self.centres.embeddings.value, self.contexts.embeddings.value]
        return loss, tape.gradient(loss, tables)

    def fit(self, *arguments: Any, **options: Any) -> Any:
        """Trains as every Keras model does, but refuses ``sample_weight``, which Keras drops if there are no labels.

        And numbers of rows that are not there: on a GPU, or where ``compile`` was given ``jit_compile=True``,
        TensorFlow would take other rows without a word.
        """
        return super().fit(**self._looked_at(super().fit, arguments, options))

    def evaluate(self, *arguments: Any, **options: Any) -> Any:
        """Evaluates as every Keras model does, but refuses what :meth:`fit` does."""
        return super().evaluate(**self._looked_at(super().evaluate, arguments, options))

    def _looked_at(self, method: Any, arguments: Any, options: dict[str, Any]) -> dict[str, Any]:
        """The arguments by name, with data whose numbers are compared with the tables before a step."""
        given = inspect.signature(method).bind_partial(*arguments, **options).arguments
        given |= given.pop("kwargs", {})
        for name in ("sample_weight", "class_weight"):
            if given.get(name) is not None:
                raise ValueError(
                    f"`{name}` must be left out: in a SkipGram each pair counts once. Leave pairs out instead. "
                    f"Received: {name}={given[name]!r:.60}"
                )
        for name in ("x", "validation_data"):
            if isinstance(given.get(name), tf.data.Dataset):
                given[name] = given[name].map(self._with_rows)
        if isinstance(given.get("x"), tuple):
            self._with_rows(given["x"])
        return given

    def _with_rows(self, *batch: Any) -> Any:
        """The batch, or an error where a number is that of no row."""
        numbers = tree.flatten(batch)
        rows = numbers[::3] if len(numbers) == 4 else numbers  # of windows, the other two are lengths
        words = f"Numbers of words must be from 0 to `vocabulary_size` - 1 = {self.vocabulary_size - 1}. Received:"
        checks = []
        for each in map(tf.convert_to_tensor, rows):
            is_there = (tf.reduce_min(each) >= 0) & (tf.reduce_max(each) < self.vocabulary_size)
            checks.append(tf.debugging.Assert(is_there, [words, tf.reduce_min(each), "to", tf.reduce_max(each)]))
        with tf.control_dependencies([check for check in checks if check is not None]):
            return tree.map_structure(tf.identity, batch)

    def train_step(self, data: Any) -> dict[str, Any]:
        """Makes one step on a batch of pairs, or of windows."""
        batch, pairs = self._unpack(data)
        layers = list(wrapped_by(self.optimizer))
        if any(getattr(layer, "normalize", None) == "weight" for layer in layers):
            raise ValueError(
                "`normalize` must be 'sum' or 'mean' for a SkipGram: its loss is a sum over pairs, divided by nothing. "
                "Received: normalize='weight'"
            )
        tables = [table for table in (self.centres, self.contexts) if table.trainable]
        if not tables:
            raise ValueError(
                "Nothing is trainable: set `trainable` of the model, or of its `centres` or `contexts`, to True, and "
                f"compile it again. Received: trainable={self.trainable}"
            )
        loss, gradients = getattr(self, self.gradients)(*batch)
        gradients, adds_up = [gradients[table is self.contexts] for table in tables], _adds_up(layers)
        if not adds_up:  # several replicas repeat rows, too
            gradients = all_reduce(gradients)
        if self.optimizer.loss_scale_factor is not None:  # Keras cannot divide a sparse gradient by it
            gradients = [tf.convert_to_tensor(gradient) for gradient in gradients]
        elif not adds_up:
            gradients = [coalesce(gradient) for gradient in gradients]
        factor = self.optimizer.scale_loss(1.0)
        gradients = [scaled(gradient, factor) for gradient in gradients]
        self.optimizer.apply(gradients if adds_up else brought_by_one(gradients), [each.embeddings for each in tables])
        return self._log(loss, pairs)

    def test_step(self, data: Any) -> dict[str, Any]:
        """Returns the loss of a batch of pairs, or of windows."""
        batch, pairs = self._unpack(data)
        return self._log(self._forward(*batch), pairs)

    def _forward(self, centres: Any, candidates: Any, near: Any = None, weight: Any = 1) -> Any:
        near = self._first(candidates) if near is None else near
        return _loss(self((centres, candidates)), near, weight)

    def _first(self, candidates: Any) -> Any:
        """In a pair the first candidate is the neighbour."""
        return tf.one_hot(0, candidates.shape[-1], dtype=self.compute_dtype)

    def _rows(self, rows: Any, ids: Any) -> Any:
        shape = tf.constant([self.vocabulary_size, self.dimension])
        return tf.IndexedSlices(tf.reshape(rows, (-1, self.dimension)), tf.reshape(ids, [-1]), shape)

    def _unpack(self, data: Any) -> tuple[Any, Any]:
        """The arguments of ``closed_form``, and how many pairs they are."""
        if self.compiled and self.loss is not None:
            raise ValueError(f"`loss` must be left out: a SkipGram has its own. Received: compile(loss={self.loss!r})")
        # Keras has no public name for the metrics given to `compile`; it calls them so in 3.13.2 and 3.15.1.
        if any(metric.name == "compile_metrics" for metric in super().metrics):
            raise ValueError("`metrics` must be left out of `compile`: a SkipGram shows the mean loss of a pair")
        batch, *others = data if isinstance(data, (tuple, list)) else (data,)
        if (
            any(other is not None for other in others)
            or not isinstance(batch, (tuple, list))
            or len(batch) not in (2, 4)
        ):
            raise ValueError(
                "The data must be `((centres, candidates),)` or `((text, left, right, drawn),)`, one tuple in another, "
                "as `word_pairs` makes them, without labels and without `sample_weight`: each pair counts once. "
                f"Received: {len(others) + 1} parts"
            )
        if any(part.dtype not in (tf.int32, tf.int64) for part in batch):
            raise ValueError(
                "The data must be numbers of words, in int32 or int64. Received: arrays of "
                f"{', '.join(tf.as_dtype(part.dtype).name for part in batch)}"
            )
        if len(batch) == 4:
            text, left, right, drawn = batch
            batch = read_windows(text, left, right, drawn, self.negatives, self.compute_dtype)
            return batch, tf.reduce_sum(batch[2])
        centres, candidates = batch
        if (len(centres.shape), len(candidates.shape)) != (1, 2):
            raise ValueError(
                "The data must hold a number for each centre, and a row of candidates. Received: arrays of shapes "
                f"{centres.shape} and {candidates.shape}"
            )
        if candidates.shape[-1] != 1 + self.negatives:
            found = candidates.shape[-1] - 1
            raise ValueError(
                f"The data must have `negatives` = {self.negatives} random words a pair. Received: {found}"
            )
        return (centres, candidates), ops.size(centres)

    def _log(self, loss: Any, pairs: Any) -> dict[str, Any]:
        pairs = ops.cast(pairs, loss.dtype)
        self.loss_of_a_pair.update_state(loss / ops.maximum(pairs, 1), sample_weight=pairs)
        return {"loss": self.loss_of_a_pair.result()}

    def most_similar(self, word: str | int, count: int = 10) -> list[tuple[Any, float]]:
        """Returns the words whose vectors make the smallest angle with a word's, and the cosines of the angles.

        Args:
            word: a word; or the number of a row, unless there are words and numbers among them.
            count: how many. Defaults to 10.

        Returns:
            A list of words and cosines, the nearest first; of row numbers and cosines if the model has no words.

        Raises:
            KeyError: there is no such word or row.
            ValueError: ``count`` is not an integer of at least 0.
        """
        count = integer("count", count, 0)
        names = range(self.vocabulary_size) if self.vocabulary is None else self.vocabulary
        is_row = isinstance(word, (int, np.integer)) and not any(isinstance(name, int) for name in names)
        rows: Sequence[Any] = range(self.vocabulary_size) if is_row else names
        if word not in rows:
            raise KeyError(f"{word!r} is not in the vocabulary")
        row = rows.index(word)
        vectors = self.centres.embeddings.numpy()
        for order in (np.inf, 2):  # the largest entry first, so that no square over- or underflows
            norms = np.linalg.norm(vectors, order, axis=1, keepdims=True)
            vectors = vectors / np.where(norms > 0, norms, 1)
        cosines = vectors @ vectors[row]
        nearest = [int(other) for other in np.argsort(-cosines, kind="stable") if other != row]
        return [(names[other], float(cosines[other])) for other in nearest[:count]]

    def save_word2vec_format(self, path: str | os.PathLike[str]) -> None:
        """Writes the vectors as text, for gensim's ``KeyedVectors.load_word2vec_format(path)``.

        Args:
            path: the file to write: a line with the size, then for each word a line with its name and its numbers.
                Whatever happens, it is whole or as it was.

        Raises:
            ValueError: the model has no words, or a word has white space in it or nothing, or is written as another.
        """
        if self.vocabulary is None:
            raise ValueError("The model must have been made with `words` to write them into a file")
        words = [str(word) for word in self.vocabulary]
        if unfit := [word for word in words if word.split() != [word]]:
            raise ValueError(f"The format has no place for words with white space in them. Received: {unfit[:3]}")
        if len(set(words)) != len(words):
            raise ValueError("The format has no place for different words that are written alike, such as 1 and '1'")
        path = os.path.realpath(os.fsdecode(path))  # what a link leads to, not the link
        part = pathlib.Path(f"{path}.part")
        try:
            with part.open("w", encoding="utf-8") as file:
                file.write(f"{self.vocabulary_size} {self.dimension}\n")
                for word, vector in zip(words, self.centres.embeddings.numpy(), strict=True):
                    file.write(f"{word} {' '.join(map(str, vector.tolist()))}\n")
            part.replace(path)
        finally:
            part.unlink(missing_ok=True)

    def get_config(self) -> dict[str, Any]:
        """Returns the constructor's arguments, for saving."""
        own = {name: getattr(self, name) for name in ("vocabulary_size", "dimension", "negatives", "gradients", "seed")}
        return {**super().get_config(), **own, "words": self.vocabulary and list(self.vocabulary)}

    @classmethod
    def from_config(cls, config: dict[str, Any], custom_objects: dict[str, Any] | None = None) -> Any:
        """Creates a model from what ``get_config`` has returned; a file has tuples as lists, and bytes as a dict."""
        read: dict[Any, Any] = {list: tuple, dict: keras.saving.deserialize_keras_object}
        words = [read[type(word)](word) if type(word) in read else word for word in config.get("words") or ()]
        return cls(**{**config, "words": words or None})


def _loss(scores: Any, near: Any, weight: Any) -> Any:
    """The sum of −log σ(s) for neighbours and −log σ(−s) for random words: softplus(s) − s, and softplus(s)."""
    return tf.reduce_sum(weight * tf.nn.softplus(scores) - near * scores)


def _adds_up(layers: list[Any]) -> bool:
    """Whether an optimizer adds the rows of a gradient up before it does anything else, so that they may repeat."""
    clips = any((layer.clipnorm, layer.clipvalue, layer.global_clipnorm) != (None, None, None) for layer in layers)
    return not clips and all(type(layer) in _ADD_UP + _LEAVE_AS_IS for layer in layers)
