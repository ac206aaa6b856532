"""Leads from a work that a chapter names, by author and year, to its entry in the bibliography.

Notebooks are plain Markdown, so that they read well in Colab: they name "P. Foret et al., 2021" in words. Here, where
the page is built, the words become a link. The entries have stable names: ``bibtex_cite_id`` in ``_config.yml``.
"""

import functools
import pathlib
import re
from collections.abc import Iterator
from typing import Any

from docutils import nodes

WORKS = pathlib.Path(__file__).parent.parent / "references.bib"
PAGE = "book/bibliography"


@functools.cache
def works(path: pathlib.Path = WORKS) -> dict[str, tuple[str, str]]:
    """The works of a bibliography: first author's family name and year, by key."""
    found = re.findall(r"@\w+\{(\S+),\s*author = \{(.+?)\},\n.*?\byear = \{(\d{4})\}", path.read_text(), re.DOTALL)
    return {key: (re.split(r",| and ", re.sub(r"[{}]", "", author))[0].strip(), year) for key, author, year in found}


def named(text: str, in_sources: bool) -> Iterator[tuple[int, int, str]]:
    """Where a text names works: start, end and key of each.

    Args:
        text: a piece of a paragraph, without markup.
        in_sources: whether a work stands there as a list of authors, at the beginning or behind a semicolon; elsewhere
            it is "Foret et al., 2021", "Yin and others (2018)", or the like.
    """
    found = []
    for key, (author, year) in works().items():
        name = re.escape(author).replace("'", "['’]")
        if in_sources:
            pattern = rf"(?:^|(?<=; )|(?<=: ))(?:[A-Z][\w-]*\.[\s-]?)*{name}\b[^;:\d]*?\b{year}\b"
        else:
            pattern = rf"\b{name}(?:,? and [A-Z][\w’'-]+| et al\.| and others)?,? \(?{year}\b"
        found += [(match.start(), match.end(), key) for match in re.finditer(pattern, text)]
    end = 0
    for first, last, key in sorted(found):
        if first >= end:
            yield first, last, key
            end = last


def _link(app: Any, doctree: Any) -> None:
    page = app.env.docname
    if not page.startswith("notebooks/") or app.builder.format != "html":
        return
    where = app.builder.get_relative_uri(page, PAGE)
    sources = next((s for s in doctree.findall(nodes.section) if "sources" in s["ids"]), None)
    inside = set(sources.findall(nodes.Text)) if sources else set()
    for text in list(doctree.findall(nodes.Text)):
        parent = text.parent
        if not isinstance(parent, nodes.paragraph | nodes.emphasis | nodes.strong):
            continue
        pieces: list[Any] = []
        done = 0
        for first, last, key in named(str(text), text in inside):
            link = nodes.reference("", text[first:last], refuri=f"{where}#work-{key}", internal=True)
            pieces += [nodes.Text(text[done:first]), link]
            done = last
        if pieces:
            parent.replace(text, [*pieces, nodes.Text(text[done:])])


def setup(app: Any) -> dict[str, bool]:
    """Registers the extension with Sphinx."""
    app.connect("doctree-read", _link)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
