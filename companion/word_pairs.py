r"""Who stands near whom: the data that a model of words learns from. Chapter 04 teaches it.

The same pairs come in two layouts. :func:`skip_gram_pairs` writes each pair out, with random words of its own.
:func:`skip_gram_windows` leaves the text as it is: a window is a band in the table of all words of a piece of text by
all words of it, and all its pairs share their random words.
"""

import contextlib
import itertools
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from companion.arguments import integer, number

CHUNK = 2**17
"""Words of running text from which pairs are made and shuffled together."""

NO_LISTS = (str, bytes, dict, set, frozenset)
"""What has no order, or another one than its own numbers, or letters for words."""

SECTION = CHUNK // 8
"""Words after which a document is cut: what stands before a cut and what stands behind it are no neighbours."""


def vocabulary(documents: Iterable[Iterable[Any]], min_count: int = 5, max_size: int | None = None) -> list[Any]:
    """Lists the words of a text, the most frequent first; equally frequent ones in the order of the alphabet.

    Args:
        documents: lists of words; or of the numbers of items, if that is what stands near each other. Of one kind, so
            that they have an order.
        min_count: how often a word must occur. Defaults to 5.
        max_size: how many words at most. Defaults to ``None``, all.

    Returns:
        A list of words.

    Raises:
        ValueError: ``documents`` are strings and not lists of words, words are of several kinds or none that has an
            order, or a number is not what it should be.

    Example:
        >>> vocabulary([["b", "a", "b"], ["c", "a"]], min_count=2)
        ['a', 'b']

    Taught in chapter 04, :doc:`/notebooks/04_gradients_by_hand`.
    """
    integer("min_count", min_count, 0)
    if max_size is not None:
        integer("max_size", max_size, 1)
    with words_in("documents"):
        counts = Counter(itertools.chain.from_iterable(_lists(documents)))
        ranked = sorted((-count, word) for word, count in counts.items() if count >= min_count)
    return [word for _, word in ranked[:max_size]]


def skip_gram_pairs(
    documents: Iterable[Iterable[Any]],
    words: Sequence[Any],
    window: int = 5,
    negatives: int = 5,
    batch_size: int = 1024,
    subsample: float | None = 1e-3,
    power: float = 0.75,
    seed: int | None = 0,
) -> tf.data.Dataset:
    r"""Makes the pairs that a :class:`~companion.SkipGram` is trained on, anew in each pass.

    Words that are not in the vocabulary are left out first, then frequent ones at random: one that makes up the share
    :math:`f` of the text is kept with probability :math:`\sqrt{t/f} + t/f`. Around each word a window of random size
    is drawn, and it is paired with every word in it. Each pair gets random words, drawn with probability proportional
    to their counts to the power of 0.75; one that equals the neighbour is drawn again. Documents come in another order
    in each pass, those of more than 16,384 words in parts of that length, and pairs are shuffled within about 130,000
    words of text. The number of batches is the expected one, so that ``fit`` can tell how long it takes; say
    ``fit(pairs, shuffle=False)``, or Keras warns that it does not shuffle a dataset.

    Args:
        documents: lists of words, which are read once. A window does not reach into another document.
        words: the vocabulary, a list, all different: the place of a word in it is its number.
        window: the largest distance of a pair; each is as likely as any smaller one. Defaults to 5.
        negatives: random words for each pair. Defaults to 5.
        batch_size: pairs in a batch. Defaults to 1024.
        subsample: :math:`t`, or ``None`` to keep every word. Defaults to 1e-3.
        power: the exponent of the counts. Defaults to 0.75.
        seed: of all that is drawn; with ``None`` every dataset draws differently. Defaults to 0.

    Returns:
        A dataset of batches ``((centres, candidates),)`` of numbers, of shapes ``(batch_size,)`` and
        ``(batch_size, 1 + negatives)``, the neighbour first. A second pass draws anew.

    Raises:
        ValueError: an argument is not what it should be; the text has not two different words of the vocabulary, or
            is too short for one batch.

    Example:
        >>> documents, words = [["a", "b", "c", "a", "b", "c"]], ["a", "b", "c"]
        >>> pairs = skip_gram_pairs(documents, words, window=1, negatives=2, batch_size=4, subsample=None)
        >>> ((centres, candidates),) = next(iter(pairs))
        >>> tuple(centres.shape), tuple(candidates.shape)
        ((4,), (4, 3))

    Taught in chapter 04, :doc:`/notebooks/04_gradients_by_hand`.

    References:
        Mikolov, Sutskever, Chen, Corrado and Dean, 2013, "Distributed representations of words and phrases and their
        compositionality"; the rule for frequent words is that of their program, ``word2vec.c``.
    """
    window, negatives, batch_size = _integers(window=window, negatives=negatives, batch_size=batch_size)
    text = _Text(documents, words, window, subsample, power, seed)

    def arrays(word: np.ndarray, left: np.ndarray, right: np.ndarray, random: np.random.Generator) -> list[np.ndarray]:
        place = np.arange(len(word))
        farthest = max(left.max(initial=0), right.max(initial=0))  # a window may be longer than any document
        shifts = [shift for shift in range(-farthest, farthest + 1) if shift]
        is_pair = [(shift <= right) & (-shift <= left) for shift in shifts]
        centres = np.concatenate([word[:0], *(word[near] for near in is_pair)])
        beside = (word[place[near] + shift] for shift, near in zip(shifts, is_pair, strict=True))
        contexts = np.concatenate([word[:0], *beside])
        order = random.permutation(len(centres))
        centres, contexts = centres[order], contexts[order]
        drawn = text.draw(random, len(centres) * negatives).reshape(-1, negatives)
        pair, place = np.nonzero(drawn == contexts[:, None])
        drawn[pair, place] = text.draw_others(random, contexts[pair])
        return [centres, np.column_stack([contexts, drawn])]

    return text.batches(arrays, [(), (1 + negatives,)], batch_size, text.pairs, "pairs")


def skip_gram_windows(
    documents: Iterable[Iterable[Any]],
    words: Sequence[Any],
    window: int = 5,
    length: int = 22,
    shared: int = 16,
    batch_size: int = 16,
    subsample: float | None = 1e-3,
    power: float = 0.75,
    seed: int | None = 0,
) -> tf.data.Dataset:
    r"""Makes the pairs of :func:`skip_gram_pairs` without writing them out, for a pass several times as fast.

    The text is cut into pieces of ``length`` centres, with all their neighbours, and each piece has ``shared`` random
    words for all its pairs. With the model's ``negatives`` :math:`= K`, a random word counts :math:`K` / ``shared`` in
    each pair, and nothing in a pair whose neighbour it is. So the expected loss is that of :math:`K` words for each
    pair, of which those that equal the neighbour are left out, as in ``word2vec.c``. What is saved is looking up rows:
    a word with six neighbours is looked up as a centre once, not six times. A batch is one step with all its pairs: for
    a vocabulary of a few words take small pieces and batches, or the step is too long.

    Args:
        documents: lists of words, which are read once. A window does not reach into another document.
        words: the vocabulary, a list, all different: the place of a word in it is its number.
        window: the largest distance of a pair; each is as likely as any smaller one. Defaults to 5.
        length: centres in a piece. Defaults to 22.
        shared: random words for each piece. Defaults to 16.
        batch_size: pieces in a batch. Defaults to 16.
        subsample: as for :func:`skip_gram_pairs`. Defaults to 1e-3.
        power: the exponent of the counts. Defaults to 0.75.
        seed: of all that is drawn; with ``None`` every dataset draws differently. Defaults to 0.

    Returns:
        A dataset of batches ``((text, left, right, drawn),)``. ``text`` holds numbers of words, ``(batch_size, window +
        length + window)``; ``left`` and ``right`` how far the window of each centre reaches, ``(batch_size, length)``;
        ``drawn`` numbers of random words, ``(batch_size, shared)``. A second pass draws anew.

    Raises:
        ValueError: as for :func:`skip_gram_pairs`.

    Example:
        >>> documents, words = [["a", "b", "c", "a", "b", "c"]], ["a", "b", "c"]
        >>> pieces = skip_gram_windows(documents, words, window=1, length=3, shared=2, batch_size=2, subsample=None)
        >>> ((text, left, right, drawn),) = next(iter(pieces))
        >>> tuple(text.shape), tuple(left.shape), tuple(right.shape), tuple(drawn.shape)
        ((2, 5), (2, 3), (2, 3), (2, 2))

    References:
        Ji, Satish, Li and Dubey, 2016, "Parallelizing word2vec in shared and distributed memory".

    Taught in chapter 04, :doc:`/notebooks/04_gradients_by_hand`.
    """
    window, length, shared, batch_size = _integers(window=window, length=length, shared=shared, batch_size=batch_size)
    text = _Text(documents, words, window, subsample, power, seed)

    def arrays(word: np.ndarray, left: np.ndarray, right: np.ndarray, random: np.random.Generator) -> list[np.ndarray]:
        rest = -len(word) % length
        padded = np.pad(word, (window, rest + window))
        starts = np.arange(0, len(word), length)
        pieces = padded[starts[:, None] + np.arange(length + 2 * window)]
        left, right = (np.pad(reach, (0, rest)).reshape(-1, length) for reach in (left, right))
        drawn = text.draw(random, len(pieces) * shared).reshape(-1, shared)
        order = random.permutation(len(pieces))
        return [pieces[order], left[order], right[order], drawn]

    lengths = (length + 2 * window, length, length, shared)
    return text.batches(arrays, [(each,) for each in lengths], batch_size, text.length / length, "pieces")


def read_windows(
    text: Any, left: Any, right: Any, drawn: Any, negatives: int, dtype: str = "float32"
) -> tuple[Any, Any, Any, Any]:
    """Tells of a batch of :func:`skip_gram_windows` who is a centre, who a candidate, and how often two are a pair.

    Args:
        text: the words of each piece.
        left: how far the window of each centre reaches to the left.
        right: how far it reaches to the right.
        drawn: the random words of each piece.
        negatives: how much they count together, for each pair.
        dtype: of the counts. Defaults to ``"float32"``.

    Returns:
        ``(centres, candidates, near, weight)``. Candidates are the words of the piece and then its random words. Of
        shape ``(batch, centres, candidates)``, ``near`` is 1 where a candidate is a neighbour and 0 elsewhere, and
        ``weight`` counts neighbours and random words alike.

    Example:
        >>> text, reach, drawn = (np.array([row]) for row in ([7, 8, 9], [1], [4, 8]))
        >>> centres, candidates, near, weight = read_windows(text, reach, reach, drawn, negatives=2)
        >>> centres.tolist(), candidates.numpy().tolist()
        ([[8]], [[7, 8, 9, 4, 8]])
        >>> near.numpy().tolist(), weight.numpy().tolist()
        ([[[1.0, 0.0, 1.0, 0.0, 0.0]]], [[[1.0, 0.0, 1.0, 2.0, 2.0]]])

    Taught in appendix a1, :doc:`/notebooks/a1_word_vectors_as_fast_as_gensim`.
    """
    length, shared = left.shape[1], drawn.shape[1]
    window = (text.shape[1] - length) // 2
    shift = tf.range(-window, length + window) - tf.range(length)[:, None]
    is_near = (shift != 0) & (-left[:, :, None] <= shift) & (shift <= right[:, :, None])
    near = tf.cast(is_near, dtype)
    is_same = tf.cast(text[:, :, None] == drawn[:, None, :], dtype)
    noise = (tf.reduce_sum(near, axis=2, keepdims=True) - near @ is_same) * (negatives / shared)
    weight = tf.concat([near, noise], axis=2)
    near = tf.pad(near, [(0, 0), (0, 0), (0, shared)])
    return text[:, window : window + length], tf.concat([text, drawn], axis=1), near, weight


class _Text:
    """A text in numbers, what is expected of it, and what is drawn from it."""

    def __init__(
        self,
        documents: Iterable[Iterable[Any]],
        words: Sequence[Any],
        window: int,
        subsample: float | None,
        power: float,
        seed: int | None,
    ) -> None:
        if subsample is not None:
            subsample = number("subsample", subsample, 0, include_low=False)
        power = number("power", power, -np.inf, include_low=False)
        if seed is not None:
            seed = integer("seed", seed, 0)
        words = list(words) if isinstance(words, Iterator) else words
        with words_in("words"):
            numbers = {word: place for place, word in enumerate(words)}
        if isinstance(words, NO_LISTS) or len(numbers) != len(words):
            raise ValueError(f"`words` must be a list of different words. Received: words={words!r:.60}")
        with words_in("documents"):
            texts = [np.fromiter((numbers[w] for w in text if w in numbers), "int32") for text in _lists(documents)]
        self.texts = [text[place : place + SECTION] for text in texts for place in range(0, len(text), SECTION)]
        self.sizes = np.array([len(text) for text in self.texts], "int64")
        counts = np.bincount(np.concatenate([*self.texts, np.zeros(0, "int32")]), minlength=len(numbers))
        share = np.maximum(counts, 1) / max(counts.sum(), 1)
        noise = np.where(counts > 0, share**power, 0)
        if (noise > 0).sum() < 2:
            raise ValueError(
                "`documents` must have at least two different words of the vocabulary that `power` lets be drawn. "
                "If documents or words come from a generator, make lists of them: it yields them once."
            )
        self.keep = np.ones(len(counts)) if subsample is None else np.sqrt(subsample / share) + subsample / share
        self.noise = noise / noise.sum()
        self.window = min(window, 2**31 - 1)
        self.seed = np.random.SeedSequence(seed).entropy  # drawn here, once, if it is None
        lengths = np.array([np.minimum(self.keep[text], 1).sum() for text in self.texts])
        self.length = lengths.sum()
        distance = np.arange(1, min(window, max(self.sizes, default=0)) + 1)
        worth = 2 * (1 - (distance - 1) / window)  # how many pairs a word makes with one at that distance
        expected = self.length - distance * len(lengths) + self._missing(lengths, distance)
        self.pairs = max(0.0, float(worth @ expected))

    def _missing(self, lengths: np.ndarray, distance: np.ndarray) -> np.ndarray:
        """How much is expected to be missing to these distances, in documents of which fewer words are kept.

        Of one with many words that is nothing. Of others, :math:`P(n)`, the probability that n words are kept, is
        found word by word, for 10,000 documents at once.
        """
        short = sorted((t for t, n in zip(self.texts, lengths, strict=True) if n < 5 * len(distance) + 40), key=len)
        missing = np.zeros(len(distance))
        for begin in range(0, len(short), 10_000):
            some = short[begin : begin + 10_000][::-1]
            sizes = np.array([len(text) for text in some])
            words, starts = np.concatenate(some), np.cumsum(sizes) - sizes
            few = np.eye(1, len(distance)).repeat(len(some), 0)
            for place in range(sizes[0]):
                there = few[: np.searchsorted(-sizes, -place)]
                kept = there * np.minimum(self.keep[words[starts[: len(there)] + place]], 1)[:, None]
                there -= kept
                there[:, 1:] += kept[:, :-1]
            missing += np.maximum(distance[:, None] - np.arange(len(distance)), 0) @ few.sum(0)
        return missing

    def draw(self, random: np.random.Generator, size: int) -> np.ndarray:
        """Independent draws: how many of each word, then in random order, which is faster than one by one."""
        counts = random.multinomial(size, self.noise)
        return random.permutation(np.repeat(np.arange(len(counts), dtype="int32"), counts))

    def draw_others(self, random: np.random.Generator, words: np.ndarray) -> np.ndarray:
        """For each of these words a draw of all but itself, one by one, however much of the noise the word is."""
        upwards, downwards = np.cumsum(self.noise), np.cumsum(self.noise[::-1])
        below, above = np.append(0, upwards[:-1])[words], np.append(0, downwards[:-1])[::-1][words]
        drawn = random.random(len(words)) * (below + above)
        lower = np.searchsorted(upwards, drawn, side="right")
        higher = len(self.noise) - 1 - np.searchsorted(downwards, drawn - below, side="right")
        return np.where(drawn < below, lower, np.maximum(higher, words + 1))

    def chunk(self, number: int, random: np.random.Generator, order: np.ndarray) -> list[np.ndarray]:
        """One part of the text, in a given order: what is kept of it, and how far each window reaches."""
        last = np.cumsum(self.sizes[order])
        texts = [self.texts[place] for place in order[(last - 1) // CHUNK == number]]
        word = np.concatenate([*texts, np.zeros(0, "int32")])
        text = np.repeat(np.arange(len(texts)), [len(text) for text in texts])
        kept = random.random(len(word)) < self.keep[word]
        word, text = word[kept], text[kept]
        reach = random.integers(1, self.window + 1, len(word), dtype="int32")
        place = np.arange(len(word), dtype="int32")
        before = place - np.searchsorted(text, text).astype("int32")
        behind = np.searchsorted(text, text, side="right").astype("int32") - 1 - place
        return [word, np.minimum(reach, before), np.minimum(reach, behind)]

    def batches(
        self,
        arrays: Callable[..., list[np.ndarray]],
        shapes: Sequence[tuple[int, ...]],
        batch_size: int,
        expected: float,
        what: str,
    ) -> tf.data.Dataset:
        """A dataset of what a function makes of each chunk, as many batches as are expected in one pass.

        Not by ``from_generator``: in TensorFlow 2.21 it tells the allocator to give memory back at once, and every step
        that the process makes from then on may have to ask for it again.
        """
        if expected < batch_size:
            raise ValueError(f"`documents` give about {expected:.0f} {what}, less than `batch_size`={batch_size}")
        passes = itertools.count()
        chunks = -(-int(self.sizes.sum()) // CHUNK)

        def make(turn: np.ndarray, number: np.ndarray) -> list[np.ndarray]:
            seeds = np.random.SeedSequence(self.seed, spawn_key=(int(turn),))
            order = np.random.default_rng(seeds).permutation(len(self.texts))
            random = np.random.default_rng(np.random.SeedSequence(self.seed, spawn_key=(int(turn), int(number))))
            return arrays(*self.chunk(int(number), random, order), random)

        def chunk(turn: tf.Tensor, number: tf.Tensor) -> tuple[tf.Tensor, ...]:
            found = tf.numpy_function(make, (turn, number), [tf.int32] * len(shapes), stateful=False)
            return tuple(tf.ensure_shape(array, (None, *shape)) for array, shape in zip(found, shapes, strict=True))

        def one_pass(_: tf.Tensor) -> tf.data.Dataset:
            turn = tf.numpy_function(lambda: next(passes), (), tf.int64)
            return tf.data.Dataset.range(chunks).map(lambda number: chunk(turn, number))

        batches = int(expected // batch_size)
        data = tf.data.Dataset.range(1).flat_map(one_pass).prefetch(1).repeat()
        data = data.rebatch(batch_size, drop_remainder=True).take(batches)
        data = data.map(lambda *batch: (batch,)).prefetch(8)
        return data.apply(tf.data.experimental.assert_cardinality(batches))


def _lists(documents: Iterable[Iterable[Any]]) -> Iterator[Iterable[Any]]:
    """The documents, as long as none is a string, whose words would be its letters, or has no order."""
    if isinstance(documents, NO_LISTS) or not isinstance(documents, Iterable):
        raise ValueError(f"`documents` must be a list of lists of words. Received: documents={documents!r:.60}")
    for place, document in enumerate(documents):
        if isinstance(document, NO_LISTS) or not isinstance(document, Iterable):
            raise ValueError(
                "Each of `documents` must be a list of words, as `text.split()` gives them. "
                f"Received: documents[{place}]={document!r:.60}"
            )
        yield document


@contextlib.contextmanager
def words_in(name: str) -> Iterator[None]:
    """Says in words which words can be counted, found and brought into an order.

    Args:
        name: the argument that holds them.
    """
    try:
        yield
    except TypeError as error:
        raise ValueError(
            f"`{name}` must hold words: all of them strings, or all of them numbers of items, and no lists or tensors. "
            f"Bring others into one kind, with `str` or `.numpy().tolist()`, for example. ({error})"
        ) from error


def _integers(**arguments: Any) -> list[int]:
    return [integer(name, value, 1) for name, value in arguments.items()]
