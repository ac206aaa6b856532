"""A work that a chapter names leads to its entry in the bibliography."""

import re
from typing import Any

import pytest
from citations import named, works

from tests.book.reading import CHAPTERS, markdown
from tests.kit import ROOT


@pytest.mark.parametrize(
    ("text", "in_sources", "expected"),
    [
        ("P. J. van der Houwen, 1980, ", True, {"P. J. van der Houwen, 1980": "houwen1980"}),
        ("S. Smith, D. Barrett and S. De, 2021, ", True, {"S. Smith, D. Barrett and S. De, 2021": "smith2021"}),
        (", I; E. Hairer, G. Wanner, 1996, ", True, {"E. Hairer, G. Wanner, 1996": "hairer1996"}),
        ("B. O’Donoghue, E. Candès, 2015, ", True, {"B. O’Donoghue, E. Candès, 2015": "odonoghue2015"}),
        ("the update of D. Kingma, J. Ba, 2015", True, {}),
        ("minimisation (Foret et al., 2021) asks", False, {"Foret et al., 2021": "foret2021"}),
        ("One cannot do better (Patarasuk and Yuan, 2009).", False, {"Patarasuk and Yuan, 2009": "patarasuk2009"}),
        ("Foret et al., 2020, and Su in 2018", False, {}),
    ],
)  # fmt: skip
def test_where_a_text_names_works(text: str, in_sources: bool, expected: dict[str, str]) -> None:
    assert {text[start:end]: key for start, end, key in named(text, in_sources)} == expected


def test_no_two_works_have_the_same_name() -> None:
    assert len(works()) == (ROOT / "book" / "references.bib").read_text().count("\n@") + 1
    assert len(set(works().values())) == len(works())


def test_every_link_to_a_work_leads_to_it(site: Any) -> None:
    entries = set(re.findall(r'id="(work-\w+)"', (site / "book" / "bibliography.html").read_text()))
    assert entries == {f"work-{key}" for key in works()}
    for chapter, path in CHAPTERS.items():
        page = (site / "notebooks" / f"{path.stem}.html").read_text()
        linked = set(re.findall(r'bibliography\.html#(work-\w+)"', page))
        assert linked <= entries
        sources = markdown(chapter).split("## Sources")[1]
        lines = [re.sub(r"\[(.*?)\]\(.*?\)", r"\1", line[2:]) for line in sources.split("\n") if line.startswith("- ")]
        assert {f"work-{key}" for line in lines for *_, key in named(line, in_sources=True)} <= linked
