"""Holds `companion.word_pairs`: pairs and windows against their definition, and what is drawn against its shares."""

import collections
import itertools
from typing import Any

import numpy as np
import pytest
import tensorflow as tf
from hypothesis import given
from hypothesis import strategies as st

from companion import word2vec
from companion.word_pairs import read_windows, skip_gram_pairs, skip_gram_windows, vocabulary

# ---- pairs ----------------------------------------------------------------------------------------------------------


def all_pairs(data: tf.data.Dataset) -> tuple[np.ndarray, np.ndarray]:
    batches = [batch for (batch,) in data.as_numpy_iterator()]
    return tuple(np.concatenate(arrays) for arrays in zip(*batches, strict=True))  # type: ignore[return-value]


@given(
    lengths=st.lists(st.integers(0, 12), min_size=2, max_size=6),
    window=st.integers(1, 4),
    negatives=st.integers(1, 3),
    seed=st.integers(0, 99),
)
def test_pairs_stand_near_each_other_and_negatives_are_none(
    lengths: list[int], window: int, negatives: int, seed: int
) -> None:
    """Every word of the text occurs once, so that a pair says where it comes from."""
    words = [f"w{number}" for number in range(sum(lengths) + 12)]
    ends = list(itertools.accumulate([12, *lengths]))
    texts = [words[start:end] for start, end in itertools.pairwise([0, *ends])]
    arguments: dict[str, Any] = {"window": window, "negatives": negatives, "batch_size": 2, "subsample": None}
    data = skip_gram_pairs(texts, words, **arguments, seed=seed)
    centres, candidates = all_pairs(data)
    text_of = np.repeat(np.arange(len(texts)), [len(text) for text in texts])
    contexts, drawn = candidates[:, 0], candidates[:, 1:]
    assert (np.abs(centres - contexts) <= window).all()
    assert (centres != contexts).all()
    assert (text_of[centres] == text_of[contexts]).all()
    assert (drawn != contexts[:, None]).all()
    assert len(centres) == 2 * len(list(data))


def test_each_pass_draws_anew_and_each_dataset_alike() -> None:
    texts = [["a", "b", "c", "d"] * 50]
    words = vocabulary(texts)
    first, second = (skip_gram_pairs(texts, words, batch_size=16, seed=3) for _ in range(2))
    one, other = all_pairs(first), all_pairs(second)
    assert all((a == b).all() for a, b in zip(one, other, strict=True))
    assert any(a.shape != b.shape or (a != b).any() for a, b in zip(one, all_pairs(first), strict=True))
    assert (all_pairs(skip_gram_pairs(texts, words, batch_size=16, seed=4))[0] != one[0]).any()


def test_windows_and_negatives_are_drawn_as_defined() -> None:
    """Shares of distances, and of random words, against their probabilities; five standard deviations."""
    random = np.random.default_rng(0)
    text = [f"w{number}" for number in np.minimum(random.geometric(0.3, 40_000), 8)]
    words = vocabulary([text])
    centres, candidates = all_pairs(skip_gram_pairs([text], words, window=3, negatives=4, subsample=None))
    counts = np.array([collections.Counter(text)[word] for word in words])
    noise = counts**0.75 / (counts**0.75).sum()
    drawn, size = candidates[:, 1:], candidates[:, 1:].size
    expected = sum(
        (candidates[:, 0] == context).mean()
        * np.where(np.arange(len(words)) == context, 0, noise)
        / (1 - noise[context])
        for context in range(len(words))
    )
    assert (np.abs(np.bincount(drawn.ravel()) / size - expected) < 5 * np.sqrt(expected / size)).all()

    numbered = [[f"n{number}" for number in range(40_000)]]
    centres, candidates = all_pairs(skip_gram_pairs(numbered, numbered[0], window=3, subsample=None))
    shares = np.bincount(np.abs(centres - candidates[:, 0]))[1:] / len(centres)
    np.testing.assert_allclose(shares, [3 / 6, 2 / 6, 1 / 6], atol=5 * 0.5 / np.sqrt(len(centres)))
    assert abs(len(centres) - 4 * 40_000) < 2000


@pytest.mark.parametrize("subsample", [0.01, None])
def test_frequent_words_are_thinned_by_the_rule(subsample: float | None) -> None:
    """In one long text without order, a word's share of the pairs is its share of what is kept."""
    is_rare = np.random.default_rng(0).random(100_000) < 0.1
    text = list(np.where(is_rare, "rare", "often"))
    share = np.array([1 - is_rare.mean(), is_rare.mean()])
    keep = np.ones(2) if subsample is None else np.sqrt(subsample / share) + subsample / share
    centres, _ = all_pairs(skip_gram_pairs([text], ["often", "rare"], window=1, subsample=subsample, batch_size=64))
    kept = keep * share
    assert abs((centres == 1).mean() - kept[1] / kept.sum()) < 5 * 0.5 / np.sqrt(len(centres))
    assert abs(len(centres) / (2 * 100_000 * kept.sum()) - 1) < 0.02


def test_words_outside_the_vocabulary_close_the_gap() -> None:
    texts = [["a", "?", "b"]] * 20
    centres, candidates = all_pairs(skip_gram_pairs(texts, ["a", "b"], window=1, batch_size=4, subsample=None))
    assert set(zip(centres, candidates[:, 0], strict=True)) == {(0, 1), (1, 0)}


def test_vocabulary_is_ranked() -> None:
    texts = [list("bbba"), list("aacccd")]
    assert vocabulary(texts, min_count=3) == ["a", "b", "c"]
    assert vocabulary(texts, min_count=1, max_size=2) == ["a", "b"]
    assert vocabulary([[*"aab"]], min_count=2) == ["a"]


# ---- windows --------------------------------------------------------------------------------------------------------


def pieces_of(data: tf.data.Dataset) -> list[np.ndarray]:
    batches = [batch for (batch,) in data.as_numpy_iterator()]
    return [np.concatenate(arrays) for arrays in zip(*batches, strict=True)]


def reached(text: np.ndarray, left: np.ndarray, right: np.ndarray) -> list[tuple[int, list[int]]]:
    """Each centre, and the neighbours of its window from left to right."""
    window = (text.shape[1] - left.shape[1]) // 2
    found = []
    for words, before, behind in zip(text, left, right, strict=True):
        for place, (to_left, to_right) in enumerate(zip(before, behind, strict=True), window):
            near = [*words[place - to_left : place], *words[place + 1 : place + to_right + 1]]
            found.append((int(words[place]), [int(word) for word in near]))
    return found


@given(
    lengths=st.lists(st.integers(0, 12), min_size=2, max_size=6),
    window=st.integers(1, 4),
    length=st.integers(1, 7),
    seed=st.integers(0, 99),
)
def test_windows_hold_each_word_once_and_stay_in_its_text(
    lengths: list[int], window: int, length: int, seed: int
) -> None:
    """Every word of the text occurs once, and is a centre once; its window ends early only where its text does."""
    lengths = [12, *lengths, 2 * length - (12 + sum(lengths)) % length]  # the last piece is full
    words = [f"w{number}" for number in range(sum(lengths))]
    ends = list(itertools.accumulate(lengths, initial=0))
    texts = [words[start:end] for start, end in itertools.pairwise(ends)]
    data = skip_gram_windows(texts, words, window, length=length, shared=3, batch_size=1, subsample=None, seed=seed)
    text, left, right, drawn = pieces_of(data)
    assert drawn.shape == (len(text), 3)
    seen = reached(text, left, right)
    assert sorted(centre for centre, _ in seen) == list(range(len(words)))
    for centre, near in seen:
        start, end = next(pair for pair in itertools.pairwise(ends) if pair[0] <= centre < pair[1])
        windows = (range(max(start, centre - reach), min(end, centre + reach + 1)) for reach in range(1, window + 1))
        assert near in [[word for word in numbers if word != centre] for numbers in windows]


def test_windows_and_their_noise_are_drawn_as_defined() -> None:
    """Shares of distances, and of random words, against their probabilities; five standard deviations."""
    numbered = [[f"n{number}" for number in range(44_000)]]
    text, left, right, _ = pieces_of(skip_gram_windows(numbered, numbered[0], window=3, subsample=None))
    centres, _, near, _ = read_windows(*map(tf.constant, (text, left, right, text[:, :2])), 5)
    piece, place, other = np.nonzero(near.numpy())
    shares = np.bincount(np.abs(text[piece, other] - centres.numpy()[piece, place]))[1:] / len(piece)
    np.testing.assert_allclose(shares, [3 / 6, 2 / 6, 1 / 6], atol=5 * 0.5 / np.sqrt(len(piece)))
    assert abs(len(piece) - 4 * text.shape[0] * 22) < 2000

    random = np.random.default_rng(0)
    skewed = [f"w{number}" for number in np.minimum(random.geometric(0.3, 40_000), 8)]
    words = vocabulary([skewed])
    *_, drawn = pieces_of(skip_gram_windows([skewed], words, shared=7, subsample=None))
    counts = np.array([collections.Counter(skewed)[word] for word in words])
    noise = counts**0.75 / (counts**0.75).sum()
    assert (np.abs(np.bincount(drawn.ravel()) / drawn.size - noise) < 5 * np.sqrt(noise / drawn.size)).all()


@pytest.mark.parametrize("subsample", [0.01, None])
def test_windows_are_the_pairs(subsample: float | None) -> None:
    """In one text, each pair of words is as frequent in both layouts; five standard deviations, for two windows."""
    random = np.random.default_rng(1)
    text = [f"w{number}" for number in np.minimum(random.geometric(0.3, 60_000), 4)]
    text[1::2] = text[:-1:2]  # who stands beside whom is no accident
    words = vocabulary([text])
    centres, candidates = all_pairs(skip_gram_pairs([text], words, 2, batch_size=64, subsample=subsample))
    table = np.zeros((4, 4))
    np.add.at(table, (centres, candidates[:, 0]), 1)
    other = np.zeros((4, 4))
    for centre, near in reached(*pieces_of(skip_gram_windows([text], words, 2, subsample=subsample))[:3]):
        np.add.at(other, (centre, near), 1)
    assert abs(other.sum() / table.sum() - 1) < 0.02
    np.testing.assert_allclose(other / other.sum(), table / table.sum(), atol=5 * np.sqrt(0.5 / table.sum()))


def test_each_pass_through_windows_draws_anew_and_each_dataset_alike() -> None:
    texts = [["a", "b", "c", "d"] * 99]
    words = vocabulary(texts)
    first, second = (skip_gram_windows(texts, words, batch_size=2, subsample=None, seed=3) for _ in range(2))
    one, other = pieces_of(first), pieces_of(second)
    assert all((a == b).all() for a, b in zip(one, other, strict=True))
    assert any((a != b).any() for a, b in zip(one, pieces_of(first), strict=True))


def test_old_names_lead_here() -> None:
    assert word2vec.vocabulary is vocabulary
    assert word2vec.skip_gram_pairs is skip_gram_pairs


# ---- errors ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [skip_gram_pairs, skip_gram_windows])
@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"window": 0}, "`window` must be an integer of at least 1"),
        ({"batch_size": 0}, "`batch_size` must be an integer of at least 1"),
        ({"subsample": 0}, r"`subsample` must be a number in \(0, inf\)\. Received: subsample=0"),
        ({"words": ["a"]}, "two different words"),
        ({"documents": []}, "two different words"),
        ({"documents": [[], ["?"]]}, "two different words"),
        ({"batch_size": 9999}, r"give about \d+ (pairs|pieces), less than `batch_size`=9999"),
    ],
)
def test_bad_text(make: Any, arguments: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        make(**{"documents": [["a", "b"] * 99], "words": ["a", "b"], "batch_size": 4, **arguments})


@pytest.mark.parametrize(
    ("make", "name"),
    [(skip_gram_pairs, "negatives"), (skip_gram_windows, "length"), (skip_gram_windows, "shared")],
)
def test_bad_number(make: Any, name: str) -> None:
    with pytest.raises(ValueError, match=f"`{name}` must be an integer of at least 1. Received: {name}=0"):
        make([["a", "b"] * 9], ["a", "b"], **{name: 0})


@pytest.mark.parametrize("subsample", [1e-2, 1e-4])
def test_as_many_batches_as_a_pass_has_where_documents_are_short(subsample: float) -> None:
    """Of documents of two to eleven words hardly any are left: the mean length says nothing about who has pairs."""
    random = np.random.default_rng(0)
    texts = [(random.pareto(0.5, length) % 300).astype(int).tolist() for length in random.integers(2, 12, 4000)]
    data = skip_gram_pairs(texts, range(300), subsample=subsample, batch_size=8, negatives=1)
    counts = np.bincount(np.concatenate(texts), minlength=300) / sum(map(len, texts))
    keep, pairs = np.minimum(np.sqrt(subsample / counts) + subsample / counts, 1), 0.0
    for _ in range(10):
        for text in texts:
            kept = int((random.random(len(text)) < keep[text]).sum())
            pairs += sum(2 * (6 - d) / 5 * max(kept - d, 0) for d in range(1, 6)) / 10
    assert int(data.cardinality()) * 8 == pytest.approx(pairs, rel=0.03)


@pytest.mark.parametrize("words", [{"a": 1, "b": 0}, {"a", "b"}, "ab"])
def test_words_without_an_order_of_their_own_are_refused(words: Any) -> None:
    with pytest.raises(ValueError, match="`words` must be a list of different words"):
        skip_gram_pairs([["a", "b"]] * 99, words)
    with pytest.raises(ValueError, match="`words` must be a list of"):
        word2vec.SkipGram(2, words=words)
