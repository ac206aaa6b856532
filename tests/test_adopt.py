"""The repository's address stands in many files: they agree, and one command changes them all."""

import pathlib
import re
import shutil
import subprocess

import pytest

from tests.kit import ROOT
from tools.adopt import address, adopt


def _tracked(root: pathlib.Path) -> list[pathlib.Path]:
    names = subprocess.run(["git", "ls-files", "-co", "--exclude-standard"], cwd=root, capture_output=True, text=True)
    return [root / name for name in names.stdout.split() if (root / name).exists()]


def _own_addresses(root: pathlib.Path, paths: list[pathlib.Path]) -> dict[str, set[str]]:
    """Every address, by file, under which a file says that this project lives."""
    name = address(root).split("/")[1]
    patterns = [
        rf"([\w.-]+/{re.escape(name)})(?=[@/\s\"'\\)#?.]|$)",
        r"git\+https://github\.com/([\w.-]+/[\w.-]+?)(?=[@\s\"'\\)]|$)",
        r"colab\.research\.google\.com/github/([\w.-]+/[\w.-]+)/",
    ]
    found: dict[str, set[str]] = {}
    for path in paths:
        if path.suffix in {".ipynb", ".md", ".yml", ".toml", ".cff"}:
            matches = {match for pattern in patterns for match in re.findall(pattern, path.read_text())}
            if matches:
                found[path.relative_to(root).as_posix()] = matches
    return found


def test_every_file_gives_the_same_address() -> None:
    found = _own_addresses(ROOT, _tracked(ROOT))
    assert set.union(*found.values()) == {address()}, found
    notebooks = {f"notebooks/{path.name}" for path in (ROOT / "notebooks").glob("*.ipynb")}
    assert notebooks | {"_config.yml", "pyproject.toml", "CITATION.cff", "README.md", "book/api.md"} <= set(found)


def test_adopt_changes_every_file_and_nothing_else(tmp_path: pathlib.Path) -> None:
    for path in _tracked(ROOT):
        target = tmp_path / path.relative_to(ROOT)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, target)
    before = address()
    holding = {
        path.relative_to(ROOT).as_posix() for path in _tracked(ROOT) if before in path.read_text(errors="ignore")
    }
    changed = adopt("some-one/their.book", tmp_path)
    assert address(tmp_path) == "some-one/their.book"
    assert set(changed) == holding - {"tests/test_adopt.py"}
    assert adopt(before.replace("_", "-"), tmp_path) == changed


@pytest.mark.parametrize(
    "wrong", ["", "owner", "owner/", "a/b/c", "OWNER_NAME/book", "https://github.com/a/b", "a/b.git"]
)
def test_wrong_address_is_refused(tmp_path: pathlib.Path, wrong: str) -> None:
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    with pytest.raises(ValueError, match=re.escape(f"REPO={wrong!r}")):
        adopt(wrong, tmp_path)
    assert address(tmp_path) == address()
