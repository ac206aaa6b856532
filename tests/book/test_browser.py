"""Every built page as a reader meets it: in Chromium, light, dark and on a phone, with no host but its own."""

import json
import re
from typing import Any

import pytest
import yaml
from axe_playwright_python.sync_playwright import Axe

from tests.kit import ROOT

_TOC = yaml.safe_load((ROOT / "_toc.yml").read_text())
PAGES = [_TOC["root"], *(page["file"] for part in _TOC["parts"] for page in part["chapters"])]
CHAPTERS = [page for page in PAGES if page.startswith("notebooks/")]
VIEWS = {
    "light": {"color_scheme": "light", "viewport": {"width": 1280, "height": 900}},
    "dark": {"color_scheme": "dark", "viewport": {"width": 1280, "height": 900}},
    "phone": {"color_scheme": "light", "viewport": {"width": 360, "height": 740}},
}
# axe takes long over code and formulas, a node for each sign: they look alike on every page, as the phone's parts do.
IN_FULL = {PAGES[0], CHAPTERS[0], "book/api"}
# One style sheet colours all pages: these have what a page can have, explorers, tables, code, notes, lists of works.
COLOURED = {*IN_FULL, "notebooks/18_listening_in", "book/keras", "book/symptoms", "book/bibliography"}
ENTRIES = 20  # of the API, whose colours and narrow looks are measured: all are made alike, and have been seen
FLATTEN = "blocks => blocks.forEach(block => { block.textContent = block.textContent; })"
PLAIN = "formulas => formulas.forEach(formula => formula.replaceWith('x'))"
# Formulas in a line that are wider than their place, which would cut them off.
CUT = """() => [...document.querySelectorAll("article span.math")].filter(each =>
  each.querySelector("mjx-math").getBoundingClientRect().right > each.getBoundingClientRect().right + 2
).map(each => each.textContent)"""
# Signs of formulas that may wrap: of those of two marks, such as that of a second derivative, the second would vanish.
WRAPPED = """() => [...document.querySelectorAll("article mjx-c")].filter(each =>
  getComputedStyle(each).whiteSpace != "nowrap").length"""
# Tables that a wide window cuts off.
HIDDEN = """() => [...document.querySelectorAll("article .pst-scrollable-table-container")].filter(each =>
  each.scrollWidth > each.clientWidth + 1).map(each => each.textContent.slice(0, 80))"""
# Boxes of code that scroll sideways and do not show it.
UNMARKED = """() => [...document.querySelectorAll("article div.highlight")].filter(each => {
  const box = each.querySelector("pre");
  return box.scrollLeft + box.clientWidth < box.scrollWidth - 1 && !each.classList.contains("scrolls");
}).length"""
# The sizes of a heading and of one below it.
SIZES = """() => ["h2", "h3"].map(kind => document.querySelector(`article section > ${kind}`))
  .map(each => each ? parseFloat(getComputedStyle(each).fontSize) : 0)"""
# What a reader loads, before it is compressed on the way.
BYTES = """() => ["navigation", "resource"].flatMap(kind => performance.getEntriesByType(kind))
  .reduce((sum, each) => sum + each.encodedBodySize, 0)"""
# How many characters the longest line of a long paragraph has: how far one can go before the next line begins.
LONGEST = """() => Math.max(0, ...[...document.querySelectorAll("article section > p")].filter(each =>
  each.textContent.length > 150 && !each.querySelector("code, mjx-container, img")).flatMap(each => {
    const range = document.createRange(), counts = {};
    for (const walker = document.createTreeWalker(each, NodeFilter.SHOW_TEXT); walker.nextNode();)
      for (let i = 0; i < walker.currentNode.length; i++) {
        range.setStart(walker.currentNode, i);
        range.setEnd(walker.currentNode, i + 1);
        const line = Math.round(range.getBoundingClientRect().top / 10);
        counts[line] = (counts[line] || 0) + 1;
      }
    return Object.values(counts);
  }))"""
# What the theme itself gets wrong, by rule and page ("" stands for every page).
UPSTREAM = {
    ("", "label-content-name-mismatch"),
    ("", "region"),
    ("book/bibliography", "aria-required-children"),
    ("book/bibliography", "aria-allowed-role"),
    ("book/bibliography", "aria-deprecated-role"),
}


@pytest.fixture
def visit(browser: Any, address: str) -> Any:
    """Opens a page; collects console errors and every request that fails or leaves the page's own host."""
    contexts = []

    def open_page(page_name: str) -> tuple[Any, list[str]]:
        context = browser.new_context(**VIEWS["light"])
        contexts.append(context)
        page, complaints = context.new_page(), []

        def requested(request: Any) -> None:
            if not request.url.startswith((address, "data:", "blob:")):
                complaints.append(f"request to {request.url}")

        page.on("request", requested)
        page.on("console", lambda message: message.type == "error" and complaints.append(f"console: {message.text}"))
        page.on("pageerror", lambda error: complaints.append(f"exception: {error}"))
        page.on("response", lambda response: response.status >= 400 and complaints.append(f"missing: {response.url}"))
        page.goto(f"{address}/{page_name}.html")
        page.evaluate("window.MathJax?.startup.promise")
        return page, complaints

    yield open_page
    for context in contexts:
        context.close()


@pytest.mark.parametrize("name", PAGES)
def test_page_is_clean(visit: Any, name: str, request: pytest.FixtureRequest) -> None:
    """Loaded once and looked at as a reader may: light, dark as the system turns dark, narrow as on a phone, opened."""
    page, complaints = visit(name)
    assert page.evaluate(BYTES) <= 2.35e6, "half of what the heaviest page once was"
    page.add_style_tag(content="* { transition: none !important; }")  # no colour is measured on its way to another
    formulas = page.locator(".math").count()
    assert page.locator("mjx-merror, .MathJax_Error").count() == 0
    assert page.locator("mjx-container").count() == formulas, "formulas that MathJax did not render"
    assert page.evaluate(WRAPPED) == 0, "u″ would be shown as u′"
    text = page.evaluate(
        """() => { const copy = document.querySelector('article').cloneNode(true);
        copy.querySelectorAll('pre, code, mjx-container').forEach(node => node.remove()); return copy.textContent; }"""
    )
    assert not re.search(r"\$\$|\\\(|\\frac|\\theta|\{doc\}", text), "raw markup in the text"
    for view in VIEWS:
        turn(page, view)
        wide = page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth")
        assert wide <= 0, f"overflow, {view}"
        assert page.evaluate(CUT) == [], f"formulas that are cut off, {view}"
        assert view == "phone" or page.evaluate(HIDDEN) == [], f"tables that are cut off, {view}"
        assert page.evaluate(UNMARKED) == 0, f"code that goes on without a sign, {view}"
    turn(page, "light")
    heading, below = page.evaluate(SIZES)
    assert heading > 1.2 * below or not heading
    assert page.evaluate(LONGEST) <= 80, "75 characters in this font; others are a little narrower"
    code = "article div.highlight pre" if name not in IN_FULL else "article dl.py ~ dl.py div.highlight pre"
    page.locator(code).evaluate_all(FLATTEN)  # axe walks over each token, also where it is told to leave code out
    page.locator("mjx-container" if name not in IN_FULL else "article dl.py mjx-container").evaluate_all(PLAIN)
    no_colour = {"rules": {"color-contrast": {"enabled": False}}}
    assert (found := violations(page, name, no_colour)) == {}, json.dumps(found, indent=1)
    page.locator("article dl.py").evaluate_all(f"entries => entries.slice({ENTRIES}).forEach(one => one.remove())")
    for view in ["light", "dark"] if name in COLOURED or request.config.getoption("slow") else []:
        turn(page, view)
        found = violations(page, name, {"runOnly": ["color-contrast"]})
        assert found == {}, f"{view}: {json.dumps(found, indent=1)}"
    if name in IN_FULL:
        turn(page, "phone")
        assert (found := violations(page, name, no_colour)) == {}, json.dumps(found, indent=1)
    assert complaints == []
    if name in CHAPTERS:
        page.set_viewport_size(VIEWS["light"]["viewport"])
        figures_have_words_and_solutions_unfold(page, is_appendix="/a" in name)


def turn(page: Any, view: str) -> None:
    """Shows the page as a reader of this kind sees it."""
    what = VIEWS[view]
    page.emulate_media(color_scheme=what["color_scheme"])
    page.set_viewport_size(what["viewport"])
    page.wait_for_function(f"document.documentElement.dataset.theme == '{what['color_scheme']}'")


def violations(page: Any, name: str, options: dict[str, Any]) -> dict[str, list[str]]:
    """What axe finds, but for what the theme gets wrong, by rule."""
    context = None if name in IN_FULL else {"exclude": [["div.highlight"]]}
    options = {"resultTypes": ["violations"], "preload": False, **options}
    found = {each["id"]: each for each in Axe().run(page, context, options).response["violations"]}
    return {
        rule: [node["html"][:200] for node in violation["nodes"][:5]]
        for rule, violation in found.items()
        if not {("", rule), (name, rule)} & UPSTREAM
    }


def figures_have_words_and_solutions_unfold(page: Any, is_appendix: bool) -> None:
    drawings = page.locator(".cell_output svg.drawing, figure svg.drawing")
    alts = drawings.evaluate_all("drawings => drawings.map(drawing => drawing.getAttribute('aria-label'))")
    assert alts
    assert all(len(alt) > 40 for alt in alts), alts
    if is_appendix:  # which needs no exercises
        return
    solutions = page.locator("article details:has(summary:text-is('Solution'))")
    assert solutions.count() >= 3
    first = solutions.first
    assert not first.locator("pre").is_visible()
    first.locator("summary").click()
    assert first.locator("pre").is_visible()


def test_search_finds_a_word(visit: Any, address: str) -> None:
    page, complaints = visit("search")
    page.goto(f"{address}/search.html?q=nesterov", wait_until="networkidle")
    page.wait_for_selector("#search-results li a")
    found = page.eval_on_selector_all("#search-results li a", "links => links.map(link => link.href)")
    assert any("03_momentum_and_state" in link for link in found)
    assert complaints == []


def test_a_table_of_sentences_is_a_list_on_a_phone(visit: Any) -> None:
    page, _ = visit("book/symptoms")
    table = page.locator("article table").first
    first, second = table.locator("tbody tr").first.locator("td").all()[:2]
    assert first.bounding_box()["y"] == second.bounding_box()["y"]
    page.set_viewport_size(VIEWS["phone"]["viewport"])
    page.wait_for_selector("table.stacks")
    assert first.bounding_box()["y"] < second.bounding_box()["y"]
    assert second.evaluate("cell => getComputedStyle(cell, '::before').content") == '"because: "'
    assert page.locator("article table.scrolls").count() == 0


def test_copy_button_copies(visit: Any) -> None:
    page, _ = visit(CHAPTERS[0])
    page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    cell = page.locator("div.cell_input div.highlight").nth(1)
    cell.hover()
    cell.locator("button.copybtn").click()
    page.wait_for_timeout(200)
    assert page.evaluate("navigator.clipboard.readText()").strip() == cell.locator("pre").inner_text().strip()


def test_an_outside_request_would_be_noticed(visit: Any) -> None:
    page, complaints = visit("book/index")
    page.evaluate("fetch('http://192.0.2.1/').catch(() => {})")
    page.wait_for_timeout(200)
    assert any("192.0.2.1" in complaint for complaint in complaints)
