"""Glossary, notation, the page in Chinese and the table of the API: what is looked up is there, once."""

import inspect
import itertools
import re
import string
import sys
from typing import NamedTuple

import pytest

import companion
from tests.book.reading import CHAPTERS, ROOT, markdown

sys.path.insert(0, str(ROOT / "book" / "_ext"))
from book_pages import api_table

BOOK = ROOT / "book"
# fmt: off
GREEK = {  # by name in LaTeX, in the order of the alphabet
    "alpha": "α", "beta": "β", "gamma": "γ", "delta": "δ", "epsilon": "[ϵε]", "varepsilon": "ε", "eta": "η",
    "theta": "θ", "kappa": "κ", "lambda": "λ", "mu": "μ", "nu": "ν", "pi": "π", "rho": "ρ", "sigma": "σ",
    "tau": "τ", "varphi": "φ", "chi": "χ", "psi": "ψ", "omega": "ω", "Gamma": "Γ", "Delta": "Δ", "Sigma": "Σ",
    "Omega": "Ω", "ell": "ℓ",
}
# fmt: on
ALPHABET = {*string.ascii_letters, *GREEK}


def terms() -> set[str]:
    (block,) = re.findall(r"```\{glossary\}\n(.*?)```", (BOOK / "glossary.md").read_text(), re.DOTALL)
    return {line for line in block.splitlines() if line and not line.startswith(" ")}


def test_glossary_is_in_order_and_each_term_has_a_chapter() -> None:
    (block,) = re.findall(r"```\{glossary\}\n(.*?)```", (BOOK / "glossary.md").read_text(), re.DOTALL)
    entries = block.strip().split("\n\n")
    assert len(entries) >= 60
    first = [entry.splitlines()[0].lower() for entry in entries]
    assert first == sorted(first)
    for entry in entries:
        assert "</notebooks/" in entry or entry.startswith("schedule-free\n"), entry


def test_a_term_leads_to_a_chapter_that_has_the_word() -> None:
    """A word of the term, inflected or not, or what its entry says that the chapters say: *in italics* or as code."""
    missing = []
    (block,) = re.findall(r"```\{glossary\}\n(.*?)```", (BOOK / "glossary.md").read_text(), re.DOTALL)
    for entry in block.strip().split("\n\n"):
        names = " ".join(line.lower() for line in entry.splitlines() if not line.startswith(" "))
        stems = [rf"\b{word[: max(4, len(word) - 3)]}" for word in re.findall(r"\w+", names) if word != "method"]
        said = [re.escape(one or other) for one, other in re.findall(r"\*([^*]+)\*|(?<!\})`([^`]+)`", entry)]
        for chapter in re.findall(r"\{doc\}`(\w+) </notebooks/", entry):
            if not re.search("|".join(stems + said), markdown(chapter.lower()), re.IGNORECASE):
                missing.append((names, chapter))
    assert missing == []


def test_what_a_practitioner_looks_up_is_in_the_index() -> None:
    looked_up = "bias correction,ragged batch,clipping,stiff,sharpness,edge of stability,resume,warm-up,slot,mode,order"
    assert set(looked_up.split(",")) <= terms()


def test_terms_of_the_chinese_page_are_those_of_the_glossary() -> None:
    page = (BOOK / "zh.md").read_text()
    rows = re.findall(r"^\| \{term\}`(.+?)` \| (.+?) \|$", page, re.MULTILINE)
    assert len(rows) >= 40
    assert {english for english, _ in rows} <= terms()
    assert len({english for english, _ in rows}) == len(rows)
    assert all(re.search(r"[\u4e00-\u9fff]", chinese) for _, chinese in rows)
    assert set(re.findall(r"\{term\}`(.+?)`", page)) == {english for english, _ in rows}


class Meaning(NamedTuple):
    """A row of the notation: its symbols, what they mean, and in which chapters."""

    symbols: list[str]
    meaning: str
    chapters: list[str]


def chapters_of(cell: str) -> list[str]:
    """The chapters of a row of the notation, such as ``01, 08–13, A3``."""
    if cell == "all":
        return list(CHAPTERS)
    found = []
    for piece in cell.lower().split(", "):
        first, _, last = piece.partition("–")
        found += [f"{n:02}" for n in range(int(first), int(last) + 1)] if last else [first]
    return found


def notation(section: str = "") -> list[Meaning]:
    """The rows of the notation, or those below a heading."""
    page = (BOOK / "notation.md").read_text()
    if section:
        page = page.split(f"## {section}\n")[1].split("\n## ")[0]
    rows = re.findall(r"^\| (\$.+?) \| (.+) \| ([^|]+) \|$", page, re.MULTILINE)
    return [Meaning(re.findall(r"\$(.+?)\$", row[0]), row[1], chapters_of(row[2])) for row in rows]


def chapters_in(heading: str) -> set[str]:
    """The chapters that a heading of the notation names, such as ``Steps along a flow: 08 to 10, 12, and A3``."""
    return set(chapters_of(re.sub(r",? and ", ", ", heading.split(": ")[1]).replace(" to ", "–")))


def letters(formula: str) -> set[str]:
    """The letters of a formula, Greek ones by name."""
    formula = formula.replace("\\mathrm{wd}", "w")
    formula = re.sub(r"\\(?:text|mathrm|operatorname\*?|begin|end)\{[^{}]*\}", " ", formula)
    named = {name for name in re.findall(r"\\([A-Za-z]+)", formula) if name in GREEK}
    return named | set(re.sub(r"\\[A-Za-z]+", " ", formula))


def formulas(chapter: str) -> set[str]:
    """The letters in all formulas of a chapter."""
    text = re.sub(r"```.*?```|`[^`\n]*`", "", markdown(chapter), flags=re.DOTALL)
    found = re.findall(r"\$\$(.+?)\$\$|\$([^$\n]+)\$", text, re.DOTALL)
    return set().union(*(letters(block or inline) for block, inline in found))


def test_a_letter_has_one_meaning_in_a_chapter() -> None:
    seen: dict[tuple[str, str], str] = {}
    for symbols, meaning, chapters in notation():
        for key in itertools.product(symbols, chapters):
            assert key not in seen, (*key, meaning, seen[key])
            seen[key] = meaning


def test_a_letter_of_the_notation_stands_in_the_chapters_that_are_named() -> None:
    missing = []
    for symbols, _, chapters in (row for row in notation() if row.chapters != list(CHAPTERS)):
        for symbol, chapter in itertools.product(symbols, chapters):
            text = markdown(chapter)
            for letter in letters(re.sub(r"_.*|\(.*", "", symbol)) & ALPHABET:
                if letter not in formulas(chapter) and not re.search(GREEK.get(letter, rf"\b{letter}\b"), text):
                    missing.append((symbol, chapter))
    assert not missing


@pytest.mark.parametrize("chapter", CHAPTERS)
def test_every_letter_of_a_formula_is_in_the_notation(chapter: str) -> None:
    rows = [row for row in notation() if chapter in row.chapters]
    known = set().union(*(letters(symbol) for row in rows for symbol in row.symbols))
    unknown = formulas(chapter) & ALPHABET - known - {"j", "O"}  # an index; a remainder in Taylor's series
    assert not unknown, "letters without a row of book/notation.md for this chapter"


# The sections of the notation that hold the letters of some chapters.
SECTIONS = re.findall(r"^## (.+: \d.*)$", (BOOK / "notation.md").read_text(), re.MULTILINE)


def test_every_letter_of_the_notation_is_in_the_table_of_its_chapters() -> None:
    named = [chapter for section in SECTIONS for chapter in chapters_in(section)]
    assert sorted(named) == sorted(CHAPTERS), "each chapter must stand in one heading of book/notation.md"
    rows = re.findall(r"^\| (.+) \| \{ref\}`(.+) <", (BOOK / "notation.md").read_text(), re.MULTILINE)
    table = {title: set(chapters_of(cell)) for cell, title in rows}
    assert table == {each.split(": ")[0]: chapters_in(each) for each in SECTIONS}, "the table at the page's top"
    assert len(notation()) == sum(len(notation(section)) for section in ["Letters of all chapters", *SECTIONS]) > 100
    for section in SECTIONS:
        assert {chapter for row in notation(section) for chapter in row.chapters} <= chapters_in(section)


@pytest.mark.parametrize("section", SECTIONS)
def test_letters_of_the_notation_are_in_order(section: str) -> None:
    rows = notation(section)
    assert len(rows) > 3
    order = [*string.ascii_lowercase, *GREEK]
    found = []
    for row in rows:
        (first,) = letters(re.sub(r"_.*|\(.*", "", row.symbols[0])) & ALPHABET
        found.append(order.index("l" if first == "ell" else first.lower()))
    assert found == sorted(found)


def test_table_of_the_api_has_every_public_name_with_its_chapter() -> None:
    table = api_table()
    for name in dir(companion):
        if not name.startswith("_"):
            (row,) = re.findall(rf":py:\w+:`companion\.{name}`\n     - (.+)\n     - (.+)\n", table + "\n")
            assert row[0].endswith((".", "?"))
            assert "</notebooks/" in row[1] or inspect.ismodule(getattr(companion, name)), name


def test_returns_of_public_functions_are_not_taken_for_a_type() -> None:
    scrambled = []
    rooms = re.findall(
        r"`companion\.(\w+)`", (BOOK / "api.md").read_text().split("Behind these stand rooms")[1].split("##")[0]
    )
    for path in sorted(path for path in (ROOT / "companion").rglob("*.py") if path.stem not in rooms):
        for text in re.findall(r"\n +Returns:\n +(.+)", path.read_text()):
            plain = re.sub(r":\w+:`[^`]*`|``[^`]*``", "", text)  # what Sphinx leaves out when it looks for a colon
            if ":" in plain:
                scrambled.append(f"{path.name}: {text}")
    assert not scrambled
