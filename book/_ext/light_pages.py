"""Keeps pages light: of what the theme and MathJax bring, a page loads what it uses."""

import logging
import pathlib
import re
from typing import Any

from fontTools import subset

# MathJax in parts instead of its bundle: no menu, no second input; what is read aloud stays.
_MATHJAX = {"load": ["input/tex", "output/chtml", "a11y/assistive-mml"]}


def _choose(app: Any, config: Any) -> None:
    config.mathjax_path = "mathjax/startup.js"
    config.mathjax3_config = {**(config.mathjax3_config or {}), "loader": _MATHJAX}


def _keep_used_icons(app: Any, exception: Exception | None) -> None:
    """Leaves in the theme's icon fonts the icons on the pages, and nothing in the script that draws them once more."""
    static = pathlib.Path(app.outdir) / "_static"
    if exception is not None or not (static / "scripts" / "fontawesome.js").stat().st_size:
        return
    pages = "".join(path.read_text() for path in pathlib.Path(app.outdir).rglob("*.html"))
    css = (static / "styles" / "pydata-sphinx-theme.css").read_text()
    codes: dict[str, int] = {}
    for names, code in re.findall(r'((?:\.fa-[\w-]+:before,?)+)\{content:"\\([0-9a-f]+)"\}', css):
        codes |= dict.fromkeys(re.findall(r"fa-[\w-]+", names), int(code, 16))
    used = {codes[name] for name in re.findall(r"\bfa-[\w-]+", pages) if name in codes}
    for path in (static / "vendor" / "fontawesome" / "webfonts").glob("*.ttf"):
        font = subset.load_font(str(path), subset.Options())
        subsetter = subset.Subsetter()
        subsetter.populate(unicodes=used)
        subsetter.subset(font)
        font.flavor = "woff"  # browsers look at what a file holds, not at its name
        font.save(path.with_suffix(".woff2"))
    (static / "scripts" / "fontawesome.js").write_text("")


def _without_search(app: Any, exception: Exception | None) -> None:
    """Leaves the index of all words to the page of search: the theme's other pages would use it as one types."""
    tools = r"(?:_static/searchtools|_static/language_data|searchindex)"
    scripts = re.compile(rf'\s*<script src="[./]*{tools}\.js"></script>')
    for path in [] if exception else pathlib.Path(app.outdir).rglob("*.html"):
        page = path.read_text()
        if path.name != "search.html" and (lighter := scripts.sub("", page)) != page:
            path.write_text(lighter)


def setup(app: Any) -> dict[str, bool]:
    """Registers the extension with Sphinx."""
    logging.getLogger("fontTools").setLevel(logging.WARNING)
    app.connect("config-inited", _choose, priority=900)
    app.connect("build-finished", _keep_used_icons, priority=900)
    app.connect("build-finished", _without_search)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
