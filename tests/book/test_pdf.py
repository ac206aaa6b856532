"""The book as one file: everything in it once, every link inside leads somewhere, nothing wider than the paper."""

import pathlib
import re
from typing import Any

import pytest
from bs4 import BeautifulSoup

from tools.pdf import Part, article, contents, link_from, sheets, whole, write

CHAPTER = "notebooks/09_injecting_heun"
SHORT = [Part("", ["book/index"]), Part("One part", [CHAPTER]), Part("Reference", ["book/bibliography"])]


def outline(pdf: bytes) -> list[str]:
    """The titles of a file's outline."""
    found = []
    for plain, coded in re.findall(rb"/Title (?:\(([^\n]*)\)|<FEFF([0-9A-F]+)>)\n/Dest", pdf):
        found.append(bytes.fromhex(coded.decode()).decode("utf-16-be") if coded else plain.decode("latin-1"))
    return found


@pytest.fixture(scope="module")
def page(site: pathlib.Path) -> Any:
    return BeautifulSoup(whole(site, SHORT), "html.parser")


def test_names_are_unique_and_every_link_inside_leads_somewhere(page: Any) -> None:
    names = [tag["id"] for tag in page.select("[id]") if tag.find_parent("svg") is None]
    assert len(names) == len(set(names))
    inside = [link["href"][1:] for link in page.select("a[href^='#']")]
    assert inside
    assert set(inside) <= set(names)
    assert {tag["data-sheet"] for tag in page.select("[data-sheet]")} <= set(names)
    assert not [link["href"] for link in page.select("a[href]") if not re.match("#|https?:", link["href"])]


def test_solutions_stand_at_the_end_and_folded_code_nowhere(page: Any) -> None:
    assert not page.select("details:not([open]), button, .headerlink")
    (solved,) = page.select(".solutions")
    exercises = page.select("#\\30 9_injecting_heun--try-it h4")
    assert [each.get_text() for each in solved.select("h4")] == [each.get_text() for each in exercises]
    assert len(page.select(".pointer")) == len(exercises) >= 3
    assert "Does nothing where" not in page.get_text(), "the setup cell"
    assert all("section" not in tag.attrs for tag in page.select("svg.drawing"))
    assert page.select("figure svg.drawing")


def test_words_have_one_size_in_all_figures_and_fit_on_the_paper(site: pathlib.Path) -> None:
    drawings = [
        each
        for part in contents()[1:3]
        for page in part.pages
        for each in article(site, page, set())[0].select("svg.drawing")
    ]
    assert len(drawings) > 10
    for each in drawings:
        drawn, printed = float(each["viewbox"].split()[2]), float(each["width"].removesuffix("pt"))
        assert printed / drawn == pytest.approx(0.75, rel=0.01)
        assert printed < 174 / 25.4 * 72


def test_only_long_code_is_cut(site: pathlib.Path) -> None:
    found, _ = article(site, "notebooks/05_the_soft_batch_bug", set())
    lengths = [code.get_text().count("\n") for code in found.select("pre")]
    assert [length for length in lengths if length > 28]
    assert [code.get("class") == "long" for code in found.select("pre")] == [length > 28 for length in lengths]


def test_every_page_of_the_contents_is_printed_in_order() -> None:
    parts = contents()
    pages = [page for part in parts for page in part.pages]
    assert pages[0] == "book/index"
    assert pages.index("notebooks/01_what_is_an_optimizer") < pages.index("book/api")
    assert [part.caption for part in parts][1] == "I · Anatomy"


def test_without_a_font_for_chinese_its_paragraphs_are_left_out(site: pathlib.Path) -> None:
    with_it, without = (article(site, "book/index", set(), chinese)[0].get_text() for chinese in (True, False))
    assert "中文" in with_it
    assert "中文" not in without


def test_a_short_book_is_printed(site: pathlib.Path, tmp_path: pathlib.Path, browser: Any) -> None:
    assert write(whole(site, SHORT), site, tmp_path / "short.pdf", browser) == []
    printed = (tmp_path / "short.pdf").read_bytes()
    assert b"/MediaBox [0 0 594.95996 841.91998]" in printed, "A4"
    titles = outline(printed)
    assert {"Contents", "One part", "9. Injecting Heun", "Try it", "Bibliography", "Solutions"} <= set(titles)
    lies = sheets(printed)
    assert 2 < lies["index"] < lies["part-1"] == lies["09_injecting_heun"] < lies["bibliography"] < lies["part-3"]
    assert lies["09_injecting_heun--solution-1"] >= lies["part-3"]
    assert not (site / "print.html").exists()


def test_the_first_page_leads_to_the_file_where_there_is_one(site: pathlib.Path, tmp_path: pathlib.Path) -> None:
    before = (site / "book" / "index.html").read_text()
    assert before.count("<!-- pdf -->") == 1
    copy, file = tmp_path / "site", tmp_path / "printed.pdf"
    (copy / "book").mkdir(parents=True)
    (copy / "book" / "index.html").write_text(before)
    file.write_bytes(b"%PDF")
    for _ in range(2):
        link_from(copy, file, 264)
    assert (copy / file.name).exists()
    after = (copy / "book" / "index.html").read_text()
    assert after.count('href="../printed.pdf"') == 1
    assert "264 pages" in after


@pytest.mark.slow
def test_the_whole_book_has_at_most_300_pages(site: pathlib.Path, tmp_path: pathlib.Path, browser: Any) -> None:
    assert write(whole(site, contents()), site, tmp_path / "book.pdf", browser) == []
    printed = (tmp_path / "book.pdf").read_bytes()
    assert 200 < len(re.findall(rb"/Type /Page\b", printed)) <= 300
    pages = [pathlib.PurePosixPath(page).name for part in contents() for page in part.pages]
    lies = sheets(printed)
    assert [lies[page] for page in pages] == sorted(lies[page] for page in pages)
    assert len(outline(printed)) > 400
