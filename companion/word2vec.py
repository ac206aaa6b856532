r"""Words as vectors: skip-gram with negative sampling, its gradient written by hand. Chapter 04 teaches it.

The model has two tables, a row of each for every word. A step needs a few thousand of these rows, however long the
tables are, so what a step costs depends on whether anything in it goes through all of them.
"""

import itertools
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf
from keras import ops

from companion.optimizers import SGD, Momentum
from companion.sparse import coalesce

CHUNK = 2**17
"""Words of running text from which pairs are made and shuffled together."""


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

    Compile it with an optimizer and no loss; train it with ``fit`` on what :func:`skip_gram_pairs` returns. Any Keras
    optimizer will do: rows that occur twice in a batch are summed before an optimizer that would not sum them. But only
    SGD without momentum leaves the rows alone that are not in the batch.

    Args:
        vocabulary_size: number of rows, at least 2.
        dimension: length of a vector. Defaults to 100.
        negatives: :math:`K`, number of random words for each pair. Defaults to 5.
        gradients: ``"closed_form"``, the formulas above, or ``"autodiff"``, two ``Embedding`` layers and a gradient
            tape, as one would write it in Keras. Defaults to ``"closed_form"``.
        words: the words of the rows, for :meth:`most_similar` and :meth:`save_word2vec_format`; they are saved with
            the model. Defaults to ``None``.
        seed: of the initial vectors. Defaults to ``None``.
        **kwargs: those of ``keras.Model``: ``name``, ``dtype``.

    Attributes:
        centres: the ``Embedding`` layer of the :math:`u`, the vectors that one keeps. Initially uniform in
            :math:`\pm 1/2` over the dimension.
        contexts: that of the :math:`v`. Initially zero.

    Raises:
        ValueError: an argument is not what it should be; at the first step, ``compile`` was given a loss or the data
            do not fit ``negatives``.

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
        words: Sequence[str] | None = None,
        seed: int | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.vocabulary_size = _integer("vocabulary_size", vocabulary_size, 2)
        self.dimension = _integer("dimension", dimension, 1)
        self.negatives = _integer("negatives", negatives, 1)
        if gradients not in ("closed_form", "autodiff"):
            raise ValueError(f"`gradients` must be 'closed_form' or 'autodiff'. Received: gradients={gradients!r}")
        self.gradients, self.seed = gradients, seed
        self.vocabulary = None if words is None else tuple(words)
        different = self.vocabulary_size if self.vocabulary is None else len(set(self.vocabulary))
        if not different == self.vocabulary_size == len(self.vocabulary or range(self.vocabulary_size)):
            raise ValueError(f"`words` must have {self.vocabulary_size} different entries. Received: {different}")
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
        centres, candidates = inputs
        return ops.einsum("bd,bkd->bk", self.centres(centres), self.contexts(candidates))

    def closed_form(self, centres: Any, candidates: Any) -> tuple[Any, list[Any]]:
        """Returns loss and gradients by the formulas, a row for each occurrence."""
        u = tf.gather(self.centres.embeddings.value, centres)
        v = tf.gather(self.contexts.embeddings.value, candidates)
        s = tf.einsum("bd,bkd->bk", u, v)
        error = tf.sigmoid(s) - _is_neighbour(s)
        du = tf.einsum("bk,bkd->bd", error, v)
        dv = tf.reshape(error[:, :, None] * u[:, None, :], (-1, self.dimension))
        shape = tf.constant([self.vocabulary_size, self.dimension])
        to_centres = tf.IndexedSlices(du, centres, shape)
        to_contexts = tf.IndexedSlices(dv, tf.reshape(candidates, [-1]), shape)
        return _loss(s), [to_centres, to_contexts]

    def autodiff(self, centres: Any, candidates: Any) -> tuple[Any, list[Any]]:
        """Returns the same as :meth:`closed_form`, with the gradients from a tape around ``call``."""
        with tf.GradientTape() as tape:
            loss = _loss(self((centres, candidates)))
        tables = [self.centres.embeddings.value, self.contexts.embeddings.value]
        return loss, tape.gradient(loss, tables)

    def train_step(self, data: Any) -> dict[str, Any]:
        """Makes one step on a batch of pairs."""
        centres, candidates = self._unpack(data)
        loss, gradients = getattr(self, self.gradients)(centres, candidates)
        if not _adds_up(self.optimizer):
            gradients = [coalesce(gradient) for gradient in gradients]
        tables = (self.centres, self.contexts)
        moved = [(g, table.embeddings) for g, table in zip(gradients, tables, strict=True) if table.trainable]
        self.optimizer.apply(*zip(*moved, strict=True))
        return self._log(loss, centres)

    def test_step(self, data: Any) -> dict[str, Any]:
        """Returns the loss of a batch of pairs."""
        centres, candidates = self._unpack(data)
        return self._log(_loss(self((centres, candidates))), centres)

    def _unpack(self, data: Any) -> tuple[Any, Any]:
        if self.compiled and self.loss is not None:
            raise ValueError(f"`loss` must be left out: a SkipGram has its own. Received: compile(loss={self.loss!r})")
        (centres, candidates), _, _ = keras.utils.unpack_x_y_sample_weight(data)
        if candidates.shape[-1] != 1 + self.negatives:
            found = candidates.shape[-1] - 1
            raise ValueError(
                f"The data must have `negatives` = {self.negatives} random words a pair. Received: {found}"
            )
        return centres, candidates

    def _log(self, loss: Any, centres: Any) -> dict[str, Any]:
        pairs = ops.cast(ops.size(centres), loss.dtype)
        self.loss_of_a_pair.update_state(loss / pairs, sample_weight=pairs)
        return {"loss": self.loss_of_a_pair.result()}

    def most_similar(self, word: str | int, count: int = 10) -> list[tuple[Any, float]]:
        """Returns the words whose vectors make the smallest angle with a word's, and the cosines of the angles.

        Args:
            word: a word, or the number of a row.
            count: how many. Defaults to 10.

        Returns:
            A list of words and cosines, the nearest first; of row numbers and cosines if the model has no words.

        Raises:
            KeyError: there is no such word or row.
        """
        names = self.vocabulary if self.vocabulary is not None else range(self.vocabulary_size)
        is_row = isinstance(word, (int, np.integer)) and 0 <= word < self.vocabulary_size
        if not is_row and word not in names:
            raise KeyError(f"{word!r} is not in the vocabulary")
        row = int(word) if is_row else names.index(word)  # type: ignore[arg-type]
        vectors = self.centres.embeddings.numpy()
        vectors = vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-30)
        cosines = vectors @ vectors[row]
        nearest = [int(other) for other in np.argsort(-cosines, kind="stable") if other != row]
        return [(names[other], float(cosines[other])) for other in nearest[:count]]

    def save_word2vec_format(self, path: str | os.PathLike[str]) -> None:
        """Writes the vectors as text, for gensim's ``KeyedVectors.load_word2vec_format(path)``.

        Args:
            path: the file to write: a line with the size, then for each word a line with its name and its numbers.

        Raises:
            ValueError: the model has no words, or a word has white space in it or nothing.
        """
        if self.vocabulary is None:
            raise ValueError("The model must have been made with `words` to write them into a file")
        if unfit := [word for word in self.vocabulary if word.split() != [word]]:
            raise ValueError(f"The format has no place for words with white space in them. Received: {unfit[:3]}")
        with open(path, "w", encoding="utf-8") as file:
            file.write(f"{self.vocabulary_size} {self.dimension}\n")
            for word, vector in zip(self.vocabulary, self.centres.embeddings.numpy(), strict=True):
                file.write(f"{word} {' '.join(map(str, vector.tolist()))}\n")

    def get_config(self) -> dict[str, Any]:
        """Returns the constructor's arguments, for saving."""
        own = {name: getattr(self, name) for name in ("vocabulary_size", "dimension", "negatives", "gradients", "seed")}
        return {**super().get_config(), **own, "words": self.vocabulary and list(self.vocabulary)}


def vocabulary(documents: Sequence[Sequence[str]], min_count: int = 5, max_size: int | None = None) -> list[str]:
    """Lists the words of a text, the most frequent first; equally frequent ones in the order of the alphabet.

    Args:
        documents: lists of words.
        min_count: how often a word must occur. Defaults to 5.
        max_size: how many words at most. Defaults to ``None``, all.

    Returns:
        A list of words.

    Example:
        >>> vocabulary([["b", "a", "b"], ["c", "a"]], min_count=2)
        ['a', 'b']
    """
    counts = Counter(itertools.chain.from_iterable(documents))
    ranked = sorted((-count, word) for word, count in counts.items() if count >= min_count)
    return [word for _, word in ranked[:max_size]]


def skip_gram_pairs(
    documents: Sequence[Sequence[str]],
    words: Sequence[str],
    window: int = 5,
    negatives: int = 5,
    batch_size: int = 1024,
    subsample: float | None = 1e-3,
    power: float = 0.75,
    seed: int = 0,
) -> tf.data.Dataset:
    r"""Makes the pairs that a :class:`SkipGram` is trained on, anew in each pass.

    Words that are not in the vocabulary are left out first, then frequent ones at random: one that makes up the share
    :math:`f` of the text is kept with probability :math:`\sqrt{t/f} + t/f`. Around each word a window of random size
    is drawn, and it is paired with every word in it. Each pair gets random words, drawn with probability proportional
    to their counts to the power of 0.75; one that equals the neighbour is drawn again. Pairs are shuffled
    within about 130,000 words of text. The number of batches is the expected one, so that ``fit`` can tell how long it
    takes; say ``fit(pairs, shuffle=False)``, or Keras warns that it does not shuffle a dataset.

    Args:
        documents: lists of words. A window does not reach into another document.
        words: the vocabulary: the place of a word in it is its number.
        window: the largest distance of a pair; each is as likely as any smaller one. Defaults to 5.
        negatives: random words for each pair. Defaults to 5.
        batch_size: pairs in a batch. Defaults to 1024.
        subsample: :math:`t`, or ``None`` to keep every word. Defaults to 1e-3.
        power: the exponent of the counts. Defaults to 0.75.
        seed: of all that is drawn. Defaults to 0.

    Returns:
        A dataset of batches ``((centres, candidates),)`` of numbers, of shapes ``(batch_size,)`` and
        ``(batch_size, 1 + negatives)``, the neighbour first. A second pass draws anew.

    Raises:
        ValueError: an argument is not what it should be; the text has not two different words of the vocabulary, or
            is too short for one batch.

    References:
        Mikolov and others, 2013, as above; the rule for frequent words is that of their program, ``word2vec.c``.
    """
    for name, value in {"window": window, "negatives": negatives, "batch_size": batch_size}.items():
        _integer(name, value, 1)
    if subsample is not None and not 0 < subsample < np.inf:
        raise ValueError(f"`subsample` must be a number > 0, or None. Received: subsample={subsample!r}")
    numbers = {word: number for number, word in enumerate(words)}
    texts = [np.array([numbers[word] for word in text if word in numbers], "int32") for text in documents]
    texts = [text for text in texts if len(text)]
    counts = np.bincount(np.concatenate([*texts, np.zeros(0, "int32")]), minlength=len(numbers))
    if (counts > 0).sum() < 2:
        raise ValueError("`documents` must have at least two different words of the vocabulary")
    share = np.maximum(counts, 1) / counts.sum()
    keep = np.ones(len(counts)) if subsample is None else np.sqrt(subsample / share) + subsample / share
    noise = np.where(counts > 0, share**power, 0)
    noise /= noise.sum()
    lengths = np.array([np.minimum(keep[text], 1).sum() for text in texts])
    expected = sum(2 * (1 - (d - 1) / window) * np.maximum(lengths - d, 0).sum() for d in range(1, window + 1))
    if expected < batch_size:
        raise ValueError(f"`documents` give about {expected:.0f} pairs, less than `batch_size`={batch_size}")
    passes = itertools.count()

    def draw(random: np.random.Generator, size: int) -> np.ndarray:
        """Independent draws: how many of each word, then in random order, which is faster than one by one."""
        return random.permutation(np.repeat(np.arange(len(noise), dtype="int32"), random.multinomial(size, noise)))

    def chunks() -> Iterator[tuple[np.ndarray, np.ndarray]]:
        random = np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(next(passes),)))
        order = random.permutation(len(texts))
        last = np.cumsum([len(texts[number]) for number in order])
        for _, group in itertools.groupby(zip(last, order, strict=True), key=lambda entry: (entry[0] - 1) // CHUNK):
            chunk = [texts[number] for _, number in group]
            centres, contexts = _pairs(chunk, keep, window, random)
            drawn = draw(random, len(centres) * negatives).reshape(-1, negatives)
            while (clash := drawn == contexts[:, None]).any():
                drawn[clash] = draw(random, int(clash.sum()))
            yield centres, np.column_stack([contexts, drawn])

    signature = (tf.TensorSpec((None,), tf.int32), tf.TensorSpec((None, 1 + negatives), tf.int32))
    data = tf.data.Dataset.from_generator(chunks, output_signature=signature).prefetch(1)
    batches = int(expected // batch_size)
    data = data.repeat().rebatch(batch_size, drop_remainder=True).take(batches)
    data = data.map(lambda centres, candidates: ((centres, candidates),)).prefetch(8)
    return data.apply(tf.data.experimental.assert_cardinality(batches))


def _pairs(
    texts: list[np.ndarray], keep: np.ndarray, window: int, random: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """All pairs of neighbours in some texts, shuffled."""
    word = np.concatenate(texts)
    text = np.repeat(np.arange(len(texts)), [len(text) for text in texts])
    kept = random.random(len(word)) < keep[word]
    word, text = word[kept], text[kept]
    reach = random.integers(1, window + 1, len(word))
    pairs = [(word[:0], word[:0])]
    for distance in range(1, min(window + 1, len(word))):
        left, right = slice(None, -distance), slice(distance, None)
        for centre, context in ((left, right), (right, left)):
            is_pair = (text[centre] == text[context]) & (reach[centre] >= distance)
            pairs.append((word[centre][is_pair], word[context][is_pair]))
    centres, contexts = (np.concatenate(side) for side in zip(*pairs, strict=True))
    order = random.permutation(len(centres))
    return centres[order], contexts[order]


def _loss(scores: Any) -> Any:
    """The sum of −log σ(s) for neighbours and −log σ(−s) for random words."""
    return tf.reduce_sum(tf.nn.softplus(scores * (1 - 2 * _is_neighbour(scores))))


def _is_neighbour(scores: Any) -> Any:
    """One for the first candidate, zero for the others."""
    return tf.one_hot(0, scores.shape[-1], dtype=scores.dtype)


def _adds_up(optimizer: Any) -> bool:
    """Whether an optimizer does nothing with a gradient but add it, so that rows may come in parts."""
    clips = (optimizer.clipnorm, optimizer.clipvalue, optimizer.global_clipnorm)
    return type(optimizer) in (keras.optimizers.SGD, SGD, Momentum) and clips == (None, None, None)


def _integer(name: str, value: Any, least: int) -> int:
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or value < least:
        raise ValueError(f"`{name}` must be an integer ≥ {least}. Received: {name}={value!r}")
    return int(value)
