"""Prints the built book as one file with an outline: `_build/pdf/keras-optimizers-inside.pdf`.

The pages become one page of HTML, in the order of the contents, which Chromium prints twice: the first print tells on
which sheet each chapter begins, the second has these numbers in its table of contents. Solutions go to the end, folded
code is left out. Usage, after `make book`: python -m tools.pdf
"""

import html
import pathlib
import re
import shutil
import subprocess
import sys
import tomllib
from typing import Any, NamedTuple

import yaml
from bs4 import BeautifulSoup, Tag
from playwright.sync_api import sync_playwright

from tools.browser import advice, find

ROOT = pathlib.Path(__file__).parent.parent
OUTPUT = ROOT / "_build" / "pdf" / "keras-optimizers-inside.pdf"
STYLE = pathlib.Path(__file__).with_name("pdf.css")
TITLE = "Keras Optimizers from the Inside"
NOTES = (
    "Solutions of the exercises stand at the end.",
    "Code that is folded on the site, such as what draws the figures, is left out: the notebooks have it.",
    "What can be moved on the site is here the figure that it starts from.",
)
_CHINESE = re.compile("[\u3000-\u30ff\u4e00-\u9fff\uff00-\uffef]+")
_MATHJAX = '{loader: {load: ["input/tex", "output/chtml"]}, options: {processHtmlClass: "math"}}'
_WIDER = """width => [...document.querySelectorAll("body *")]
  .filter(each => each.getBoundingClientRect().right > width + 1 && !each.closest("mjx-assistive-mml"))
  .map(each => each.closest("[id]")?.id + ": " + each.outerHTML.slice(0, 80))"""
_FILL = "s => document.querySelectorAll('[data-sheet]').forEach(e => { e.textContent = s[e.dataset.sheet]; })"
_FOOT = (
    '<p style="font: 8px sans-serif; margin: 0; text-align: center; width: 100%"><span class="pageNumber"></span></p>'
)
# An A4 page without its margins, in CSS pixels: Chromium makes everything smaller if something is wider.
_WIDTH = 657
# A figure is drawn in points, with words of 9.5 of them.
_SCALE = 0.75
# Lines of code that are no longer kept on one page.
_LONG = 28


class Part(NamedTuple):
    """A part of the book and its pages, as the contents name them."""

    caption: str
    pages: list[str]


def contents(root: pathlib.Path = ROOT) -> list[Part]:
    """The parts of the book in their order; the first page is a part without a caption."""
    toc = yaml.safe_load((root / "_toc.yml").read_text())
    parts = [Part(part["caption"], [page["file"] for page in part["chapters"]]) for part in toc["parts"]]
    return [Part("", [toc["root"]]), *parts]


def anchor(page: str, place: str = "") -> str:
    """The name of a place in the whole book: two pages may have headings of one name."""
    name = pathlib.PurePosixPath(page).name
    return f"{name}--{place}" if place else name


def article(site: pathlib.Path, page: str, printed: set[str], chinese: bool = True) -> tuple[Tag, list[Tag]]:
    """What a page says, made ready to stand in the whole book: names unique, links inside, headings one level down.

    Args:
        site: the folder of the built pages.
        page: such as ``"book/index"``.
        printed: the pages that are in the file; a link to another becomes plain text.
        chinese: whether paragraphs in Chinese stay.

    Returns:
        The article, and the solutions that were taken out of it.
    """
    text = (site / f"{page}.html").read_text()
    found = BeautifulSoup(text[text.index("<article") : text.rindex("</article>")], "html.parser").article
    assert isinstance(found, Tag)
    for fold in found.select("details.hide"):  # of what is folded, the figures are printed
        fold.replace_with(*(each for each in fold.select(".cell_output") if each.select("figure")))
    for drawing in found.select("svg.drawing"):
        drawing["width"] = f"{_SCALE * float(str(drawing['viewbox']).split()[2]):.0f}pt"
    for code in found.select("pre"):
        if code.get_text().count("\n") > _LONG:
            code["class"] = "long"
    for useless in found.select(".headerlink, .viewcode-link, script, .start"):
        useless.decompose()
    for paragraph in found.select("p"):
        if not chinese and _CHINESE.match(paragraph.get_text()):
            paragraph.decompose()
    for named in found.select("[id]"):
        if named.find_parent("svg") is None:
            named["id"] = anchor(page, str(named["id"]))
    for link in found.select("a[href]"):
        target, _, place = str(link["href"]).partition("#")
        leads = _followed(page, target) if target else page
        if re.match(r"\w+:", target):
            continue
        if leads in printed and "?" not in place:
            link["href"] = f"#{anchor(leads, place)}"
        else:
            link.name, link.attrs = "span", {}
    solutions: list[Tag] = []
    for fold in found.select("details"):
        if fold.summary is None or fold.summary.get_text() != "Solution":
            fold["open"] = ""
            continue
        number = len(solutions) + 1
        name, heading = anchor(page, f"solution-{number}"), fold.find_previous("h3")
        pointer = f'<p class="pointer"><a href="#{name}">Solution</a>: page <span data-sheet="{name}"></span></p>'
        fold.summary.decompose()
        fold.replace_with(BeautifulSoup(pointer, "html.parser"))
        fold.name, fold.attrs = "section", {"id": name}
        fold.insert(0, BeautifulSoup(f"<h3>{heading.decode_contents() if heading else number}</h3>", "html.parser"))
        solutions.append(fold)
    for each in [found, *solutions]:
        for heading in each.select("h1, h2, h3, h4"):
            heading.name = f"h{int(heading.name[1]) + 1}"
    found.name, found.attrs = "section", {"id": anchor(page), "class": "page"}
    return found, solutions


def _followed(page: str, target: str) -> str:
    place = list(pathlib.PurePosixPath(page).parent.parts)
    for step in target.removesuffix(".html").split("/"):
        place = place[:-1] if step == ".." else [*place, step]
    return "/".join(place)


def whole(site: pathlib.Path, parts: list[Part], chinese: bool = True) -> str:
    """The book as one page of HTML, to lie in the folder of the site.

    Args:
        site: the folder of the built pages.
        parts: what is printed.
        chinese: whether there is a font for Chinese. Without one its characters are left out.
    """
    printed = {page for part in parts for page in part.pages}
    body: list[str] = []
    solved: list[str] = []
    listed: list[tuple[str, str, str]] = []

    def begin(number: int, caption: str) -> None:
        body.append(f'<h1 class="part" id="part-{number}">{html.escape(caption)}</h1>')
        listed.append(("part", f"part-{number}", html.escape(caption)))

    for number, part in enumerate(parts):
        if part.caption:
            begin(number, part.caption)
        for page in part.pages:
            found, solutions = article(site, page, printed, chinese)
            title = found.h2.decode_contents() if found.h2 else page
            body.append(str(found))
            listed.append(("entry", anchor(page), title if part.caption else "About this book"))
            if solutions:
                solved.append(f'<section class="solutions"><h2>{title}</h2>{"".join(map(str, solutions))}</section>')
    if solved:
        begin(len(parts), "Solutions")
    entries = "".join(
        f'<li class="{kind}"><a href="#{name}">{title}</a><span data-sheet="{name}"></span></li>'
        for kind, name, title in listed
    )
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    notes = "".join(f"<li>{note}</li>" for note in NOTES)
    page = f"""<!DOCTYPE html>
<html lang="en" data-theme="light"><head><meta charset="utf-8"><title>{TITLE}</title>
<link rel="stylesheet" href="_static/pygments.css"><style>{STYLE.read_text()}</style>
<script>window.MathJax = {_MATHJAX}</script>
<script defer src="_static/mathjax/startup.js"></script></head>
<body class="mathjax_ignore">
<header class="cover"><img src="_static/logo.svg" alt=""><p class="title">{TITLE.replace(" from", "<br>from")}</p>
<p>Every number, formula and figure is held by a test.</p><p>Version {version}</p><ul>{notes}</ul></header>
<nav><h1>Contents</h1><ul>{entries}</ul></nav>
{"".join(body + solved)}</body></html>"""
    return page if chinese else _CHINESE.sub("", page)


def sheets(pdf: bytes) -> dict[str, int]:
    """On which sheet of a file that Chromium printed each named place lies, the first being 1."""
    objects = dict(re.findall(rb"\n(\d+) 0 obj\n(.*?)\nendobj", pdf, re.DOTALL))

    def pages(number: bytes) -> list[bytes]:
        kids = re.search(rb"/Kids \[(.*?)\]", objects[number], re.DOTALL)
        return [page for kid in re.findall(rb"(\d+) 0 R", kids[1]) for page in pages(kid)] if kids else [number]

    catalogue = next(content for content in objects.values() if b"/Type /Catalog" in content)
    (root,), (names,) = re.findall(rb"/Pages (\d+)", catalogue), re.findall(rb"/Dests (\d+)", catalogue)
    order = {page: sheet for sheet, page in enumerate(pages(root), 1)}
    places = re.findall(rb"/([^\s/\[]+) \[(\d+) 0 R /XYZ", objects[names])
    return {re.sub(r"#(..)", lambda c: chr(int(c[1], 16)), n.decode()): order[page] for n, page in places}


def write(page: str, site: pathlib.Path, output: pathlib.Path, browser: Any) -> list[str]:
    """Prints a page of HTML as if it lay in the folder of the site.

    Args:
        page: what ``whole`` makes.
        site: the folder of the built pages.
        output: the file to write.
        browser: Playwright's, a Chromium.

    Returns:
        What is too wide for the paper, which should be nothing.
    """
    output.parent.mkdir(parents=True, exist_ok=True)
    source = site / "print.html"
    source.write_text(page)
    options: dict[str, Any] = {"path": output, "prefer_css_page_size": True, "print_background": True, "outline": True}
    options |= {"display_header_footer": True, "header_template": "<p></p>", "footer_template": _FOOT, "tagged": True}
    tab = browser.new_page(color_scheme="light", viewport={"width": _WIDTH, "height": 900})
    try:
        tab.set_default_timeout(300_000)
        tab.emulate_media(media="print")
        tab.goto(source.as_uri(), wait_until="load")
        tab.evaluate("MathJax.startup.promise")
        wide: list[str] = tab.evaluate(_WIDER, _WIDTH)
        tab.pdf(**options)
        tab.evaluate(_FILL, sheets(output.read_bytes()))
        tab.pdf(**options)
    finally:
        tab.close()
        source.unlink()
    return wide


def link_from(site: pathlib.Path, file: pathlib.Path, pages: int) -> None:
    """Puts a file into a site, and a link to it on the first page, in the place that is kept for it.

    Args:
        site: the folder of the built pages.
        file: the book as one file.
        pages: how many pages it has, for the link.
    """
    shutil.copy(file, site)
    index = site / "book" / "index.html"
    link = f'<p>Or take it along, <a href="../{file.name}">as one file to print</a>, {pages} pages.</p>'
    index.write_text(index.read_text().replace("<!-- pdf -->", link))


def has_chinese() -> bool:
    """Whether a font of this machine has Chinese characters, as far as fontconfig knows."""
    try:
        return bool(subprocess.run(["fc-list", ":lang=zh"], capture_output=True).stdout)
    except FileNotFoundError:
        return True


def main() -> int:
    """Prints the book, and says what it left out."""
    site, parts = ROOT / "_build" / "html", contents()
    if not (site / "index.html").exists():
        sys.exit("There is no book to print. Build it first: make book")
    if not (chinese := has_chinese()):
        parts = [Part(part.caption, [page for page in part.pages if page != "book/zh"]) for part in parts]
        print("No font here has Chinese characters: the page in Chinese is left out. (On Debian: fonts-noto-cjk)")
    if (found := find()) is None:
        sys.exit(advice())
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=found, args=["--no-sandbox"])
        for complaint in write(whole(site, parts, chinese), site, OUTPUT, browser):
            print("wider than the paper:", complaint, file=sys.stderr)
        browser.close()
    pages = len(re.findall(rb"/Type /Page\b", OUTPUT.read_bytes()))
    link_from(site, OUTPUT, pages)
    print(f"The book as one file, {pages} pages: {OUTPUT}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
