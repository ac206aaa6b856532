"""Holds the tools that choose tests, break the package, and keep the project: and the files that others rely on."""

import pathlib
import re
import subprocess
import sys
import time
from typing import Any

import pytest

from tests.kit import ROOT
from tests.kit.cases import thinned
from tools import browser, changed, mutants, warm


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


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere it is Python itself")
def test_a_warm_python_does_as_python_does(tmp_path: pathlib.Path) -> None:
    script = tmp_path / "script.py"
    program = "import os, sys; print(sys.argv[1:], __name__, os.getcwd(), *os.environ, 'colorsys' in sys.modules)"
    script.write_text(program)
    here: Any = {"cwd": tmp_path, "env": {"X": "1"}, "capture_output": True, "text": True}
    found = []
    for python in (sys.executable, warm.interpreter(tmp_path, sys.executable, "colorsys")):
        words = [["script.py", "a"], ["-u", "-m", "script", "a"], ["-c", program, "a"], ["-c", "nonsense"]]
        words += [["-c", f"import sys; sys.exit({status!r})"] for status in (None, 3, "words")]
        words += [["-c", f"import os; os.kill(os.getpid(), {number})"] for number in (9, 15)]
        done = [subprocess.run([python, *each], **here) for each in words]
        found.append([(each.returncode, each.stdout, each.stderr.splitlines()[-1:]) for each in done])
    (tmp_path / "nest").unlink()
    assert found[1] == [(code, out.replace("False", "True"), error) for code, out, error in found[0]]


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere it is Python itself")
def test_a_warm_python_ends_with_its_command(tmp_path: pathlib.Path) -> None:
    beating = f"import time\nwhile True: open({str(tmp_path / 'heart')!r}, 'a').write('x'); time.sleep(0.01)"
    with subprocess.Popen([warm.interpreter(tmp_path, sys.executable), "-c", beating]) as command:
        while not (tmp_path / "heart").exists():
            time.sleep(0.01)
        command.kill()
    (tmp_path / "nest").unlink()
    time.sleep(0.1)
    beats = (tmp_path / "heart").stat().st_size
    time.sleep(0.1)
    assert (tmp_path / "heart").stat().st_size == beats
