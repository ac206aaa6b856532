"""Fills pages of the book: claims from the tests, ratios from the benchmarks, the table of names from docstrings."""

import ast
import fnmatch
import importlib
import inspect
import json
import pathlib
import re
from typing import Any, NamedTuple

from ratio_charts import Ratio, Subject, chart, overview, ratio, stacks

ROOT = pathlib.Path(__file__).parent.parent.parent


class Claim(NamedTuple):
    """A sentence of the book and the test that holds it."""

    chapter: str
    sentence: str
    path: str
    test: str
    line: int


def collect_claims(folder: pathlib.Path = ROOT / "tests") -> list[Claim]:
    """Finds every ``@pytest.mark.claim(sentence, chapter=…)`` below a folder, in the order of chapters."""
    claims = []
    for path in sorted(folder.rglob("test_*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            for mark in getattr(node, "decorator_list", []):
                if isinstance(mark, ast.Call) and ast.unparse(mark.func) == "pytest.mark.claim":
                    (sentence,) = (ast.literal_eval(argument) for argument in mark.args)
                    (chapter,) = (ast.literal_eval(keyword.value) for keyword in mark.keywords)
                    name = path.relative_to(folder.parent).as_posix()
                    claims.append(Claim(chapter, sentence, name, node.name, node.lineno))  # type: ignore[attr-defined]
    return sorted(claims, key=lambda claim: claim.chapter)


def plain_text(text: str) -> str:
    """A text without emphasis, code marks and line breaks, so that a sentence can be looked up in it."""
    return re.sub(r"\s+", " ", re.sub(r"[*`$]", "", text))


def claims_page(repository: str) -> str:
    """The claims as Markdown: a section for each chapter, a line for each sentence, a link to its test."""
    claims = collect_claims()
    lines = [f"{len(claims)} claims are held at present.", ""]
    for chapter in sorted({claim.chapter for claim in claims}):
        (path,) = (ROOT / "notebooks").glob(f"{chapter}_*.ipynb")
        text = plain_text("\n".join("".join(cell["source"]) for cell in json.loads(path.read_text())["cells"]))
        lines += [
            f"(claims-{chapter})=",
            f"## {'Chapter' if chapter.isdigit() else 'Appendix'} {chapter.upper()}",
            "",
            f"From {{doc}}`/notebooks/{path.stem}`:",
            "",
        ]
        found = [claim for claim in claims if claim.chapter == chapter]
        for claim in sorted(found, key=lambda claim: text.find(plain_text(claim.sentence))):
            link = f"{repository}/blob/main/{claim.path}#L{claim.line}"
            lines.append(f"- {claim.sentence} — [`{claim.test}`]({link})")
        lines.append("")
    return "\n".join(lines)


def performance_page(
    path: pathlib.Path = ROOT / "book" / "performance.json", page: str = "<!-- performance -->"
) -> str:
    """A page with the measured ratios in the places of its comments.

    ``<!-- performance: RungeKutta -->`` becomes a chart of the results of that name, ``<!-- performance: inject, N=8, *
    -->`` of what is so called, ``<!-- performance -->`` of what has no other place. ``<!-- ratio: SGD, *; Adam, * -->``
    becomes the median of what is so called, or the least and the largest. ``<!-- overview … -->`` becomes the chart of
    all, from lines as ``overview_rows`` reads them, and ``<!-- held: … -->`` bars to scale, as ``amounts`` reads them.
    """
    results = json.loads(path.read_text())
    named = re.compile("<!-- performance: (.+?) -->")
    others = [row for row in results if not any(_is_meant(row, text) for text in named.findall(page))]
    page = page.replace("<!-- performance -->", _chart(others))
    page = page.replace("<!-- vocabulary -->", vocabulary_chart())
    page = re.sub("<!-- ratio: (.+?) -->", lambda match: _ends(_medians(results, match[1])), page)
    page = re.sub("<!-- overview\n(.+?)-->", lambda match: overview(_subjects(results, match[1])), page, flags=re.S)
    page = re.sub("<!-- held: (.+?)\n(.+?)-->", lambda match: stacks(match[1], amounts(match[2])), page, flags=re.S)
    return named.sub(lambda match: _chart([row for row in results if _is_meant(row, match[1])]), page)


def _is_meant(row: dict[str, Any], text: str) -> bool:
    return any(text == row["name"] or fnmatch.fnmatchcase(row["what"], pattern) for pattern in text.split("; "))


def _medians(results: list[dict[str, Any]], text: str) -> list[float]:
    patterns = text.split("; ")
    called = [row for row in results if any(fnmatch.fnmatchcase(row["what"], pattern) for pattern in patterns)]
    return [row["ratio_median"] for row in called]


def _ends(medians: list[float]) -> str:
    ends = [f"{end(medians):.2f}" for end in (min, max)] if medians else ["not measured yet"]
    return "–".join(dict.fromkeys(ends))


def overview_rows(text: str) -> list[tuple[str, list[str]]]:
    """The rows of an overview with the heading above each: what one uses | over what | names of times | of memories."""
    heading, rows = "", []
    for line in text.strip().splitlines():
        if "|" in line:
            rows.append((heading, [cell.strip() for cell in line.split("|")]))
        else:
            heading = line.strip()
    return rows


def amounts(text: str) -> dict[str, dict[str, str]]:
    """The parts of each bar, from lines such as ``a network | activations 2 | gradient 17``."""
    rows = (line.split(" | ") for line in text.strip().splitlines())
    return {label: dict(part.rsplit(" ", 1) for part in parts) for label, *parts in rows}


def _subjects(results: list[dict[str, Any]], text: str) -> dict[str, list[Subject]]:
    groups: dict[str, list[Subject]] = {}
    for heading, (label, over, *names) in overview_rows(text):
        time, memory = (_medians(results, name) for name in (*names, "", "")[:2])
        groups.setdefault(heading, []).append(Subject(label, over, time, memory))
    return groups


def _chart(rows: list[dict[str, Any]]) -> str:
    if not rows:
        return "Not measured yet: run `make bench`."
    where = " ".join(f"Measured on {measured}." for measured in sorted({row["measured"] for row in rows}))
    return f"{chart([ratio(row) for row in rows])}\n\n{where}"


def titled(notebook: str, name: str = "") -> str:
    """A notebook whose folded cells say what they hold, by the title that Colab shows, instead of that they are code.

    Args:
        notebook: the notebook's JSON.
        name: of the file; an appendix, such as ``a1_…``, gets its number into its title, as Sphinx numbers chapters.
    """
    content = json.loads(notebook)
    if appendix := re.match(r"a\d", name):
        first = content["cells"][0]
        first["source"] = re.sub(r"^# ", f"# {appendix[0].upper()}. ", "".join(first["source"]))
    for cell in content["cells"]:
        title = re.match(r"# @title (.+)\n", "".join(cell["source"]))
        if cell["cell_type"] == "code" and title:
            rest = "".join(cell["source"])[title.end() :]
            cell["source"] = rest
            prompts = {"code_prompt_show": title[1], "code_prompt_hide": title[1]}
            cell["metadata"]["mystnb"] = prompts | cell["metadata"].get("mystnb", {})
    return json.dumps(content)


def vocabulary_chart(path: pathlib.Path = ROOT / "book" / "data" / "time_of_vocabulary.json") -> str:
    """What a step of word2vec takes by hand over what it takes through ``Embedding``, from the record of chapter 04."""
    record = json.loads(path.read_text())
    times = record["microseconds"]
    ways = {"by hand": ("by hand", ""), "rows by `tf.gather`": ("gather, autodiff", "")}
    ways |= {"by hand, both in XLA": ("by hand", ", XLA")}
    drawn = []
    for group, (way, xla) in ways.items():
        for place, size in enumerate(record["sizes"]):
            median = times[f"{way}{xla}"][place] / times[f"Embedding, autodiff{xla}"][place]
            drawn.append(Ratio(f"{size:,} words", group, median, median, median))
    return f"{chart(drawn)}\n\nMeasured on {record['date']} on {record['processor']}, {record['cores']} cores."


def api_table() -> str:
    """Every public name, what it is in one line of its docstring, and its chapter, as a table in reStructuredText."""
    companion = importlib.import_module("companion")
    rows = []
    for name in [name for name in companion.__dir__() if not name.startswith("_")]:  # not sorted, as `dir` is
        member = getattr(companion, name)
        text = inspect.getdoc(member) or ""
        summary = re.split(r"(?<=[.!?])\s", " ".join(text.split("\n\n")[0].split()))[0]
        chapters = sorted(set(re.findall(r":doc:`/notebooks/((\d\d|a\d)_\w+)`", text)))
        links = ", ".join(f":doc:`{number} </notebooks/{stem}>`" for stem, number in chapters) or "–"
        role = "mod" if inspect.ismodule(member) else "obj"
        rows.append(f"   * - :py:{role}:`companion.{name}`\n     - {summary}\n     - {links}")
    head = [".. currentmodule:: companion", "", ".. list-table::", "   :header-rows: 1", "   :widths: 30 58 12", ""]
    rows = ["   * - name\n     - what it is\n     - chapter", *rows]
    return "\n".join(["```{eval-rst}", *head, *rows, "```"])


def _fill(app: Any, docname: str, source: list[str]) -> None:
    if docname.startswith("notebooks/"):
        source[0] = titled(source[0], docname.split("/")[1])
    elif docname == "book/claims":
        source[0] = source[0].replace("<!-- claims -->", claims_page(app.config.html_theme_options["repository_url"]))
        for path in sorted((ROOT / "tests").rglob("test_*.py")):
            app.env.note_dependency(str(path))
    elif docname == "book/api":
        source[0] = source[0].replace("<!-- api -->", api_table())
    elif docname == "book/performance":
        source[0] = performance_page(page=source[0])
        app.env.note_dependency(str(ROOT / "book" / "performance.json"))


def setup(app: Any) -> dict[str, bool]:
    """Registers the extension with Sphinx."""
    app.connect("source-read", _fill)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
