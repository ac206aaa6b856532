"""Glossary, notation, the page in Chinese and the table of the API: what is looked up is there, once."""

import inspect
import re
import sys

import companion
from tests.book.reading import CHAPTERS, ROOT

sys.path.insert(0, str(ROOT / "book" / "_ext"))
from book_pages import api_table

BOOK = ROOT / "book"


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


def chapters_of(cell: str) -> list[str]:
    """The chapters of a row of the notation, such as ``01, 08–13``."""
    if cell == "all":
        return list(CHAPTERS)
    found = []
    for piece in cell.split(", "):
        first, _, last = piece.partition("–")
        found += [f"{n:02}" for n in range(int(first), int(last or first) + 1)]
    return found


def test_a_letter_has_one_meaning_in_a_chapter() -> None:
    rows = re.findall(r"^\| (\$.+?) \| (.+?) \| (.+) \| ([^|]+) \|$", (BOOK / "notation.md").read_text(), re.MULTILINE)
    assert len(rows) >= 50
    seen: dict[tuple[str, str], str] = {}
    for symbols, _, meaning, cell in rows:
        for symbol in re.findall(r"\$(.+?)\$", symbols.replace(", ", "$, $").replace("$$", "$")):
            for chapter in chapters_of(cell):
                assert (symbol, chapter) not in seen, (
                    f"{symbol} in chapter {chapter}: {meaning}; {seen[symbol, chapter]}"
                )
                seen[symbol, chapter] = meaning


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
