"""Numbers that stand in two places agree.

What is one fact has one source where that is possible. Where two sentences of different pages say the same in similar
words, with numbers, all numbers of the one that has fewer must be in the other.
"""

import collections
import itertools
import json
import math
import re
import sys
from typing import NamedTuple

import nbformat
import pytest

from tests.book.prose import Number, numbers, prose
from tests.book.reading import CHAPTERS, ROOT, markdown, notebook

sys.path.insert(0, str(ROOT / "book" / "_ext"))
from book_pages import vocabulary_chart

ALIKE = 0.42  # from which share of their rare words on two sentences speak of one thing


class Sentence(NamedTuple):
    """A sentence with numbers, where it stands, and its words."""

    place: str
    text: str
    numbers: tuple[Number, ...]
    words: frozenset[str]


def sentences(place: str, text: str) -> list[Sentence]:
    """The sentences of a text that say a result: a decimal number, a percentage or a number of several digits."""
    found = []
    for sentence in re.split(r"(?<=[.!?:])\s+|\n\n|\n[-|] ", text):
        results = [number for number in numbers(sentence) if len(re.sub(r"\D", "", number.text)) > 1]
        words = re.findall(r"[a-zà-ÿ_]{3,}", re.sub(r"[$*`\\]", " ", sentence).lower())
        if results and len(words) >= 5:
            stems = frozenset(word[:6] for word in words)
            found.append(Sentence(place, " ".join(sentence.split()), tuple(results), stems))
    return found


def plain(text: str) -> str:
    """A Markdown page as a notebook of one cell, so that what is no result in a chapter is none here."""
    return prose(nbformat.v4.new_notebook(cells=[nbformat.v4.new_markdown_cell(text)]))


def everything() -> list[Sentence]:
    found = [sentence for chapter in CHAPTERS for sentence in sentences(chapter, prose(notebook(chapter)))]
    for path in [*sorted((ROOT / "book").glob("*.md")), ROOT / "README.md"]:
        text = re.sub(r"```.*?```", "", path.read_text(), flags=re.DOTALL)  # programs hold their own numbers
        found += sentences(path.stem, plain(text))
    return found


def agree(one: Number, other: Number) -> bool:
    return abs(one.value - other.value) <= max(one.tolerance, other.tolerance) * (1 + 1e-6)


def disagreements(all_sentences: list[Sentence]) -> list[tuple[Sentence, Sentence]]:
    """Pairs of sentences of different places that speak of one thing, and a number of the one is not the other's."""
    often = collections.Counter(word for sentence in all_sentences for word in sentence.words)
    weight = {word: math.log(len(all_sentences) / count) for word, count in often.items()}
    found = []
    for one, other in itertools.combinations(all_sentences, 2):
        if one.place == other.place:
            continue
        shared = sum(weight[word] for word in one.words & other.words)
        if shared < ALIKE * sum(weight[word] for word in one.words | other.words):
            continue
        few, many = sorted((one.numbers, other.numbers), key=len)
        if not all(any(agree(a, b) for b in many) for a in few):
            found.append((one, other))
    return found


def test_no_two_places_disagree() -> None:
    found = disagreements(everything())
    assert not found, "\n\n".join(f"{a.place}: {a.text}\n{b.place}: {b.text}" for a, b in found)


def test_a_pair_that_disagrees_is_found() -> None:
    texts = {
        "04": "By hand, a step on a million words is 9.5 times faster than through the layer.",
        "page": "Through the layer, a step on a million words is 50.2 times slower than by hand.",
        "05": "A race of 400 runs gave 11 different results on two cores.",
    }
    found = disagreements([sentence for place, text in texts.items() for sentence in sentences(place, text)])
    assert [(a.place, b.place) for a, b in found] == [("04", "page")]
    texts["page"] = texts["page"].replace("50.2", "9.5")
    assert not disagreements([sentence for place, text in texts.items() for sentence in sentences(place, text)])


def test_time_of_a_vocabulary_is_one_record() -> None:
    record = json.loads((ROOT / "book" / "data" / "time_of_vocabulary.json").read_text())
    times = {name: values[-1] for name, values in record["microseconds"].items()}
    faster = times["Embedding, autodiff"] / times["by hand"]
    (said,) = re.findall(r"a step on a million words is ([\d.]+) times faster", markdown("04"))
    assert said == f"{faster:.1f}"
    by_hand = vocabulary_chart().split("<tbody>")[1]
    assert re.search(rf"1,000,000 words.*<b>{1 / faster:.2f}</b></td></tr></tbody>$", by_hand)
    measured = json.loads((ROOT / "book" / "performance.json").read_text())
    assert not [row["what"] for row in measured if row["what"].startswith("step ")], "the record of chapter 04 has them"


@pytest.mark.parametrize("key", ["doi", "url", "title"])
def test_no_work_stands_twice_in_the_bibliography(key: str) -> None:
    text = (ROOT / "book" / "references.bib").read_text()
    values = [re.sub(r"[{}\s]", "", value).lower() for value in re.findall(rf"\b{key} = \{{(.+?)\}}(?:,|\n)", text)]
    assert len(values) == len(set(values))


def cited(chapter: str) -> set[tuple[str, str]]:
    """Surname of the first author, and year, of each work in a chapter's sources."""
    text = markdown(chapter).split("## Sources")[1]
    found = set()
    for piece in re.split(r"\n- |; ", text):
        match = re.match(r"(?:[A-Z]\S*\.\s*(?:-[A-Z]\.)?)*\s*([^,\[]+),? (?:.*?)\b((?:17|18|19|20)\d\d)\b", piece)
        if match and "Keras" not in match[1] and "TensorFlow" not in match[1]:
            names = re.split(r" and |, | et al| in ", match[1].removeprefix("Read for the table: "))[0].split()
            first = names[:2] in (["Su", "Jianlin"], ["Hugging", "Face"])  # names that begin with the family
            surname = " ".join(names) if "der" in names or first else names[-1] if names else ""
            found.add((re.sub(r"^(?:[A-Z]\. )+", "", surname).removesuffix(" Jianlin"), match[2]))
    return found


def test_every_source_of_a_chapter_is_in_the_bibliography() -> None:
    works = {
        (re.split(r",| and ", re.sub(r"[{}]", "", author))[0].strip(), year)
        for author, year in re.findall(
            r"author = \{(.+?)\},\n.*?\byear = \{(\d{4})\}", (ROOT / "book" / "references.bib").read_text(), re.DOTALL
        )
    }
    missing = {(chapter, *work) for chapter in CHAPTERS for work in cited(chapter) if work not in works}
    assert not missing, sorted(missing)
