"""Holds the tools that choose tests, break the package, and keep the project: and the files that others rely on."""

import re
from typing import Any

import pytest

from tests.kit import ROOT
from tests.kit.cases import thinned
from tools import browser, changed, mutants


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("companion/oracle.py", {"tests/test_oracle.py", "companion/oracle.py"}),
        ("companion/exercises/chapter_05.py", {"tests/exercises/test_chapter_05.py"}),
        ("notebooks/03_momentum_and_state.ipynb", {"tests/book/test_chapter_03.py", "tests/book/test_prose.py"}),
        ("book/api.md", {"tests/book/test_pages.py"}),
        ("tools/adopt.py", {"tests/test_adopt.py"}),
    ],
)
def test_what_a_change_concerns(path: str, expected: set[str]) -> None:
    assert expected <= changed.tests_of(path)


def test_notebooks_of_a_change() -> None:
    assert changed.notebooks_of(["README.md"]) == [changed.SAMPLE]
    assert "notebooks/15_local_sgd.ipynb" in changed.notebooks_of(["companion/local_sgd.py"])
    assert changed.notebooks_of(["notebooks/05_the_soft_batch_bug.ipynb"]) == ["notebooks/05_the_soft_batch_bug.ipynb"]


def test_a_mutant_differs_in_one_place() -> None:
    source = "def f(a, b):\n    if a < b and b:\n        return a + 2\n    raise ValueError(1)"
    found = mutants.mutants(source, 99, 0)
    assert len(found) == len({changed for _, changed in found}) == 5
    assert "a - 2" in " ".join(changed for _, changed in found)


def test_thinning_keeps_what_it_names() -> None:
    cases: list[Any] = thinned(["a", pytest.param("b", 1, marks=pytest.mark.xfail)], "a")
    assert [[mark.name for mark in case.marks] for case in cases] == [[], ["xfail", "slow"]]
    with pytest.raises(AssertionError, match="not among"):
        thinned(["a"], "c")


def test_every_thinned_matrix_is_written_down() -> None:
    table = (ROOT / "CONTRIBUTING.md").read_text()
    for path in (ROOT / "tests").glob("test_*.py"):
        if re.search(r"thinned\(|mark\.slow|getoption\(.slow", path.read_text()) and path.name != "test_tools.py":
            assert f"`{path.stem}`" in table, path.name


def test_who_has_no_browser_is_told_what_to_type() -> None:
    assert re.search(r"chromium|playwright install", browser.advice())


def test_actions_are_pinned_and_may_do_nothing_else() -> None:
    for path in (ROOT / ".github" / "workflows").glob("*.yml"):
        text = path.read_text()
        assert "\npermissions: {contents: read}\n" in text, path.name
        assert "\nconcurrency: " in text, path.name
        for action in re.findall(r"uses: (\S+)", text):
            assert action.startswith("./") or re.search(r"@[0-9a-f]{40}$", action), action


@pytest.mark.parametrize("name", ["requirements.txt", "tools/requirements-colab.txt", "tools/requirements-uv.txt"])
def test_locks_have_the_hash_of_every_file(name: str) -> None:
    entries = re.split(r"\n(?=[a-z0-9])", (ROOT / name).read_text())[1:]
    assert entries
    assert all("--hash=sha256:" in entry for entry in entries if "==" in entry.split("\n")[0])
