"""Every chapter has its frame, no orphan number, exercises that are checked, and solutions that are right."""

import ast
import copy
import itertools
import re
from typing import Any

import nbformat
import pytest

from companion import exercises
from tests.book.prose import numbers, orphans
from tests.book.reading import CHAPTERS, markdown, notebook, plain_text
from tests.kit import ROOT

HEADINGS = ("## In one minute", "## Try it", "## In practice", "## Sources")
APPENDICES = [name for name in CHAPTERS if not name.isdigit()]
FOLDED = {"hide-input", "hide-cell", "remove-input", "remove-cell"}


def code_cells(chapter: str) -> list[Any]:
    return [cell for cell in notebook(chapter).cells if cell.cell_type == "code"]


def exercise_cells(chapter: str) -> list[tuple[str, str]]:
    """The code of each exercise's cell, and the solution behind the fold that follows it."""
    found, cells = [], notebook(chapter).cells
    for cell, following in itertools.pairwise(cells):
        if cell.cell_type == "code" and "exercises.check(" in cell.source:
            fold = re.search(
                r"<details>\s*<summary>Solution</summary>\n\n(.*?)\n\n</details>", following.source, re.DOTALL
            )
            assert fold, f"no solution after: {cell.source[-60:]}"
            (solution,) = re.findall(r"```python\n(.*?)```", fold[1], re.DOTALL)
            found.append((cell.source, solution))
    return found


EXERCISES = [
    pytest.param(chapter, code, solution, id=re.findall(r'exercises\.check\(\s*"([\d.]+)"', code)[-1])
    for chapter in CHAPTERS
    for code, solution in exercise_cells(chapter)
]


@pytest.mark.parametrize("chapter", CHAPTERS)
def test_frame(chapter: str) -> None:
    text = markdown(chapter)
    assert re.match(r"# [A-Z`]", text)
    assert len(re.findall(r"^# ", re.sub(r"```.*?```", "", text, flags=re.DOTALL), re.MULTILINE)) == 1
    assert all(f"\n**{part}**" in text for part in ("You will", "You need", "Run time"))
    positions = [
        text.index(f"\n{heading}\n") for heading in HEADINGS if chapter not in APPENDICES or "Try" not in heading
    ]
    assert positions == sorted(positions)
    assert re.findall(r"^## .*", text, re.MULTILINE)[0] == HEADINGS[0]
    assert text.rstrip().endswith("[claims](../book/claims.md).")
    assert len(exercise_cells(chapter)) in (range(3) if chapter in APPENDICES else range(3, 6))
    assert "5879" in text or chapter == "01", "the post of 2018 is the origin"


def words(text: str) -> int:
    return len(re.sub(r"<details>.*?</details>", "", text, flags=re.DOTALL).split())


@pytest.mark.parametrize("chapter", CHAPTERS)
def test_a_chapter_is_read_in_25_minutes(chapter: str) -> None:
    cells = notebook(chapter).cells
    assert sum(words(cell.source) for cell in cells if cell.cell_type == "markdown") <= 2400
    shown = [cell for cell in code_cells(chapter) if not FOLDED & set(cell.metadata.get("tags", []))]
    lengths = [len(cell.source.splitlines()) for cell in shown]
    assert sum(lengths) <= 160
    assert max(lengths) <= 20


@pytest.mark.parametrize("chapter", CHAPTERS)
def test_a_chapter_says_itself_in_a_minute_and_what_to_remember(chapter: str) -> None:
    cells = notebook(chapter).cells
    (at,) = (i for i, cell in enumerate(cells) if re.search(r"^## In one minute$", cell.source, re.MULTILINE))
    assert words(cells[at].source.split("## In one minute")[1]) <= 120
    assert cells[at + 1].cell_type == "code"
    assert len(cells[at + 1].source.splitlines()) <= 12
    assert cells[at + 1].outputs, "the number is missing"
    practice = markdown(chapter).split("\n## In practice\n")[1].split("\n## Sources\n")[0]
    assert re.search(r"^\| you have \| use \| why \|$", practice, re.MULTILINE)
    remember = practice.split("**To remember**")[1]
    assert len(re.findall(r"^\d\. ", remember, re.MULTILINE)) == 3


@pytest.mark.parametrize("chapter", CHAPTERS)
def test_folded_cells_have_a_title_and_exercises_show_no_answer(chapter: str) -> None:
    for cell in code_cells(chapter):
        tags = set(cell.metadata.get("tags", []))
        if FOLDED & tags:
            assert cell.metadata.get("cellView") == "form", cell.source[:60]
            assert re.match(r"# @title \S", cell.source), cell.source[:60]
        if "exercises.check(" in cell.source:
            assert "remove-output" in tags


@pytest.mark.parametrize("chapter", CHAPTERS)
def test_the_packages_source_is_shown_as_code(chapter: str) -> None:
    for cell in code_cells(chapter):
        assert not re.search(r"print\(.*getsource", cell.source), "shown without colours: use figures.source"


@pytest.mark.parametrize("page", [*CHAPTERS, "book/recipes.md"])
def test_a_private_name_that_is_shown_is_called_private(page: str) -> None:
    if page.endswith(".md"):
        seen = (ROOT / page).read_text()
        code = "".join(re.findall(r"```python\n(.*?)```", seen, re.DOTALL))
    else:
        cells = [cell for cell in notebook(page).cells if not FOLDED & set(cell.metadata.get("tags", []))]
        code = "".join(cell.source for cell in cells if cell.cell_type == "code")
        shown = (cell for cell in code_cells(page) if "Source(" in cell.source)
        code += "".join(out["data"]["text/plain"] for cell in shown for out in cell.outputs)
        seen = re.sub(r"<details>.*?</details>", "", "".join(cell.source for cell in cells), flags=re.DOTALL)
    assert not re.search(r"\w\._[a-z]", code) or "private" in seen


@pytest.mark.parametrize("chapter", CHAPTERS)
def test_setup_is_the_same_everywhere(chapter: str) -> None:
    """One folded cell; after what is the same everywhere it holds the chapter's own imports."""
    setups = [code_cells(each)[0].source for each in (next(iter(CHAPTERS)), chapter)]
    same, own = (source.split("# What this chapter uses besides.") for source in setups)
    assert own[0] == same[0]
    assert "--no-deps" in own[0]
    later = [cell.source for cell in code_cells(chapter)[1:] if "companion.connect()" not in cell.source]  # a script
    assert not any("import keras" in source for source in later if "exercises" not in source)


@pytest.mark.parametrize("chapter", CHAPTERS)
def test_prose_is_plain_markdown_and_links_lead_somewhere(chapter: str) -> None:
    text = markdown(chapter)
    assert not re.search(r"\{(?:ref|doc|cite|numref|math|eq)[:}]|^:::|^```\{", text, re.MULTILINE), "shows raw in Colab"
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", text):
        if not target.startswith("http"):
            assert (ROOT / "notebooks" / target).exists(), target


@pytest.mark.parametrize("chapter", CHAPTERS)
def test_notebook_is_normalised(chapter: str) -> None:
    cells = notebook(chapter).cells
    ids = [f"cell-{index:03}" for index in range(len(cells))]
    assert [cell.id for cell in cells] == ids, "execute it: python -m tools.execute notebooks/…"
    counts = [cell.execution_count for cell in code_cells(chapter)]
    assert counts == list(range(1, len(counts) + 1))
    streams = [output.get("name") for cell in code_cells(chapter) for output in cell.outputs]
    assert "stderr" not in streams
    texts = "".join(out.get("data", {}).get("text/plain", "") for cell in code_cells(chapter) for out in cell.outputs)
    assert " at 0x" not in texts, "the address of an object: assign what the last line returns"
    assert not any("execution" in cell.metadata for cell in cells)


@pytest.mark.parametrize("chapter", CHAPTERS)
def test_figures_have_alt_text_and_data(chapter: str) -> None:
    drawn = 0
    for cell in code_cells(chapter):
        for output in cell.outputs:
            if "image/svg+xml" in output.get("data", {}):
                drawn += 1
                assert len(cell.metadata["mystnb"]["image"]["alt"]) > 40
                assert len(cell.metadata["mystnb"]["figure"]["caption"]) > 20
                assert cell.metadata["mystnb"]["figure"]["name"].startswith("fig-")
                for axes in output.metadata["figure"]:
                    assert axes.keys() & {"lines", "points", "bars", "images"} or len(output.metadata["figure"]) > 1
    assert drawn >= (1 if chapter in APPENDICES else 2), "figures of executed cells that end in figures.show"


@pytest.mark.parametrize("chapter", CHAPTERS)
def test_no_orphan_numbers(chapter: str) -> None:
    assert orphans(notebook(chapter)) == []


@pytest.mark.parametrize("chapter", CHAPTERS)
@pytest.mark.parametrize(
    "wrong", ["It reaches 0.7351 here.", "That is 37.19 % less.", "About 4,711 of them.", "$3.7 \\times 10^{-9}$"]
)
def test_a_wrong_number_is_found(chapter: str, wrong: str) -> None:
    broken = copy.deepcopy(notebook(chapter))
    broken.cells[0].source += f"\n\n{wrong}"
    assert orphans(broken) == [number.text for number in numbers(wrong)]


def test_what_counts_as_held() -> None:
    page = nbformat.v4.new_notebook()
    code = nbformat.v4.new_code_cell(
        "print(2 / 3)", outputs=[nbformat.v4.new_output("stream", text="0.6667 and 1.2e-05")]
    )
    page.cells = [
        nbformat.v4.new_markdown_cell("About 0.67, or 67 %, and $1.2 \\times 10^{-5}$; 2018; `0.3`; chapter 11."),
        code,
    ]
    assert orphans(page) == []
    page.cells[0].source = "About 0.68, or 66 %, and $1.3 \\times 10^{-5}$; 12 of them."
    assert orphans(page) == ["0.68", "66 %", "1.3e-5", "12"]


@pytest.mark.usefixtures("dtype_put_back")
@pytest.mark.parametrize(("chapter", "code", "solution"), EXERCISES)
def test_solution_is_right_and_skeleton_is_not(chapter: str, code: str, solution: str) -> None:
    names: dict[str, Any] = {"__name__": "__main__"}
    exec(code_cells(chapter)[0].source, names)
    *given, final = ast.parse(code).body
    assert isinstance(final, ast.Expr)
    verdict = compile(ast.Expression(final.value), "exercise", "eval")
    exec(compile(ast.Module(given, []), "exercise", "exec"), names)
    assert not eval(verdict, names).correct
    exec(solution, names)
    assert eval(verdict, names) == exercises.Verdict(True, eval(verdict, names).message)


def test_every_exercise_stands_in_its_chapter() -> None:
    asked = {
        number
        for chapter in CHAPTERS
        for number in re.findall(r'exercises\.check\(\s*"([\d.]+)"', "".join(c.source for c in code_cells(chapter)))
    }
    assert asked == {number for chapter in CHAPTERS for number in exercises.checks_of(chapter)}


def test_plain_text_drops_markup_only() -> None:
    assert plain_text("A *b* `c`\n  d $e$") == "A b c d e"
