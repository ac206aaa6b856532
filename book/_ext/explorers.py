"""Puts explorers around the figures that ask for one: what a reader moves is the figure of the notebook, upgraded.

``figures.show(figure, explorer="ravine")`` leaves the name in the output's metadata. Here it becomes a custom element
around the figure, and the page loads the scripts of ``_static/explorers`` that it needs, without what only people read
in them. A link to a setting, ``[β = 0.97](#ravine?beta=0.97)``, stays the plain link that it is.
"""

import functools
import html
import json
import pathlib
import re
import string
from typing import Any

from docutils import nodes
from docutils.transforms import Transform

FOLDER = pathlib.Path(__file__).parent.parent / "_static" / "explorers"
SHARED = ("arithmetic", "kit")  # every explorer needs them, in this order
NAMES = sorted(path.stem for path in FOLDER.glob("*.js") if path.stem not in SHARED)


@functools.lru_cache(maxsize=1)
def _offers(path: str, _changed: float) -> dict[int, dict[str, Any]]:
    cells = json.loads(pathlib.Path(path).read_text())["cells"]
    outputs = ((index, output) for index, cell in enumerate(cells) for output in cell.get("outputs", []))
    return {index: out["metadata"]["explorer"] for index, out in outputs if "explorer" in out.get("metadata", {})}


def opening(offer: dict[str, Any]) -> str:
    """The start tag of an explorer's element.

    Args:
        offer: what ``figures.show`` left: the ``name``, the settings to ``start`` with, whether it comes ``instead`` of
            the figure.

    Returns:
        HTML.

    Raises:
        ValueError: there is no such explorer.
    """
    name, start = offer["name"], html.escape(json.dumps(offer["start"], ensure_ascii=False, sort_keys=True))
    if name not in NAMES:
        raise ValueError(f"`explorer` must be one of {NAMES}. Received: explorer={name!r}")
    stays = "" if offer["instead"] else ' data-figure="stays"'
    return f'<{name}-explorer id="{name}" data-explorer="{name}" data-start="{start}"{stays}>'


class WrapFigures(Transform):
    """Wraps the outputs that offer an explorer, and keeps links to its settings from being looked up as headings."""

    default_priority = 870  # before MyST looks up links that begin with #

    def apply(self, **_: Any) -> None:
        """Changes the document."""
        path = pathlib.Path(self.document["source"])
        offers = _offers(str(path), path.stat().st_mtime) if path.suffix == ".ipynb" else {}
        for cell in self.document.findall(lambda node: isinstance(node, nodes.container) and "cell_index" in node):
            if (offer := offers.get(cell["cell_index"])) is None:
                continue
            (output,) = (child for child in cell.children if child.get("nb_element") == "cell_code_output")
            output.insert(0, nodes.raw("", opening(offer), format="html", explorer=offer["name"]))
            output.append(nodes.raw("", f"</{offer['name']}-explorer>", format="html"))
        settings = tuple(f"#{offer['name']}?" for offer in offers.values())
        for link in self.document.findall(nodes.reference):
            if link.get("id_link") and settings and link["refuri"].startswith(settings):
                del link["id_link"]


def _load(app: Any, _page: str, _template: str, _context: dict[str, Any], doctree: Any) -> None:
    if doctree is None or not (names := {raw["explorer"] for raw in doctree.findall(nodes.raw) if "explorer" in raw}):
        return
    app.add_css_file("explorers/explorers.css")
    for name in (*SHARED, *sorted(names)):
        app.add_js_file(f"explorers/{name}.js", loading_method="defer")


_QUOTED = re.compile(r"""("(?:[^"\\\n]|\\.)*"|`(?:[^`\\\n]|\\.)*`)""")
_COMMENT_OR_QUOTED = re.compile(rf"(?s:/\*.*?\*/)|(?:^|(?<=\s))//\s[^\n]*|{_QUOTED.pattern}")
# What needs no space beside it, in a script and in a style sheet; "- -" and "+ +" keep one. `const` is for people, too.
_SPACES = {
    ".js": [
        (r"\s*([,;:{}()\[\]=<>?!|&*/%])\s*", r"\1"),
        (r"(?<![+-])\s*([+-])\s*(?![+-])", r"\1"),
        (r"\s+", " "),
        (r" (?=\.\w)", ""),
        (r"\bconst\b", "let"),
        (r"(?<=[(,=:?>])\((\w+)\)(?==>)", r"\1"),
    ],
    ".css": [(r"\s*([{};,])\s*", r"\1"), (r":\s+", ":"), (r"\s+", " ")],
}
_DECLARED_TWICE = re.compile(rf"(?<=[;{{}}])(let\b(?:{_QUOTED.pattern}|\{{[^;{{}}\"`]*\}}|[^;{{}}\"`])*);let ?")
_COMPUTED = re.compile(r"\$\{([^}]*)\}")
_BOUND = re.compile(
    r"\b(?:const|let|function) (\w+)"  # by itself,
    r"|\b(?:const|let) (\[[^=;()]*?\]) (?:=|of) "  # in a list,
    r"|(?<!if )(?<!for )(?<!while )\(([^()]*)\) (?:=>|\{)|\b(\w+) =>"  # or as what a function takes
)


def _private(script: str) -> list[str]:
    """The names that a script declares and has nowhere else: not as a property, a key, a method or a quoted word."""
    code = _QUOTED.sub(lambda found: f'"" + {"+".join(_COMPUTED.findall(found[0]))}', script)
    quoted = [_COMPUTED.sub(" ", found[0]) for found in _QUOTED.finditer(script)]
    quoted += [found[0] for found in _QUOTED.finditer(code)]  # in what a template computes
    public, inside, before = set(re.findall(r"\w+", " ".join(quoted))), [""], ""
    for token in re.findall(r"\w+|=>|\.{3}|\S", code):
        if token in "([{":
            keys = before in {*"=([,:?|&", "...", "const", "let", "return"}
            named = before.isidentifier() and before != "else"
            inside.append(token if token != "{" else "keys" if keys else "class" if named else token)
        elif token in ")]}":
            inside.pop()
        elif before == "." or (inside[-1] == "keys" and before in "{,") or (inside[-1] == "class" and before in "{;}"):
            public.add(token)
        before = token
    bound = ",".join(",".join(found) for found in _BOUND.findall(code))
    names = dict.fromkeys(re.findall(r"\b[A-Za-z]\w\w+", re.sub(r"= ?[^,)\]]*", "", bound)))
    return [name for name in names if name not in public]


def compact(text: str, kind: str) -> str:
    """A script or a style sheet without comments, the spaces that only people need, and its long names for itself.

    Args:
        text: as this project formats it: with all semicolons, comments behind a space, and quotes that end on their
            line and hold no others.
        kind: ``".js"`` or ``".css"``.

    Returns:
        The same to a browser.

    Raises:
        ValueError: a template in quotes holds another.
    """
    text = _COMMENT_OR_QUOTED.sub(lambda found: found[1] or "", text)
    for place, name in enumerate(_private(text) if kind == ".js" else []):
        text = re.sub(rf"\b{name}\b", f"_{string.ascii_letters[place % 52]}{place // 52 or ''}", text)
    parts = _QUOTED.split(text)
    if kind == ".js" and any("${" in part for part in parts[::2]):
        raise ValueError("A template in quotes holds another: give it a name.")
    for before, after in (*_SPACES[kind], (r"[;,](?=[})\]])", ""), (r"(?<![\w.])0(?=\.\d)", "")):
        parts[::2] = [re.sub(before, after, part) for part in parts[::2]]
    text, found = "".join(parts), kind == ".js"
    while found:  # `let a=1;let b=2;` is `let a=1,b=2;`
        text, found = _DECLARED_TWICE.subn(r"\1,", text)
    return text


def _compact(app: Any, exception: Exception | None) -> None:
    folder = pathlib.Path(app.outdir) / "_static" / "explorers"
    for path in [] if exception else folder.glob("*"):
        path.write_text(compact(path.read_text(), path.suffix))


def setup(app: Any) -> dict[str, bool]:
    """Registers the extension with Sphinx."""
    app.add_transform(WrapFigures)
    app.connect("html-page-context", _load)
    app.connect("build-finished", _compact)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
