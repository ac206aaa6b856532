"""Which files differ from the main branch, and which tests and notebooks these concern.

Usage: python -m tools.changed check [FILE … | changed]      the quick core, and in full what concerns these files
       python -m tools.changed notebooks [pytest options …]  the notebooks that changed or whose code did
"""

import ast
import pathlib
import re
import subprocess
import sys

import nbformat

ROOT = pathlib.Path(__file__).parent.parent
SAMPLE = "notebooks/01_what_is_an_optimizer.ipynb"
"""The notebook that runs where none has changed, so that the way to run them is held."""


def _git(*arguments: str) -> list[str]:
    done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True)
    return done.stdout.split() if done.returncode == 0 else []


def changed() -> list[str]:
    """What differs from where this branch left main, or on main itself from the commit before; new files included."""
    (head, *_), here = _git("rev-parse", "HEAD") or [""], ""
    for main in ("origin/main", "main"):
        here = next(iter(_git("merge-base", main, "HEAD")), "") or here
    base = f"{head}~1" if here in ("", head) else here
    return sorted({*_git("diff", "--name-only", base), *_git("ls-files", "--others", "--exclude-standard")})


def rooms(source: str) -> set[str]:
    """The modules of the package that a source imports, the public names of the package by the module they are from."""
    face = ast.parse((ROOT / "companion" / "__init__.py").read_text())
    home = {
        alias.asname or alias.name: node.module.split(".")[-1]
        for node in ast.walk(face)
        if isinstance(node, ast.ImportFrom) and node.module
        for alias in node.names
    }
    found = set()
    for node in ast.walk(ast.parse(re.sub(r"^\s*[%!].*$", "", source, flags=re.MULTILINE))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("companion"):
            _, _, module = (node.module or "").partition(".")
            found |= {module} if module else {home.get(alias.name, alias.name) for alias in node.names}
    found |= {home.get(name, name) for name in re.findall(r"\bcompanion\.(\w+)", source)}  # also in a worker's script
    return {name.split(".")[0] for name in found}


def tests_of(path: str) -> set[str]:
    """The test files and doctests that a changed file concerns most."""
    name, chapter = pathlib.Path(path), re.search(r"[_/](\d\d)[_.]", path)
    if path.startswith("tests/") and name.name.startswith("test_"):
        return {path}
    found = {f"tests/test_{name.stem}.py", f"tests/book/test_{name.stem}.py"}
    if chapter:
        found |= {f"tests/{folder}/test_chapter_{chapter[1]}.py" for folder in ("book", "exercises")}
    if path.startswith(("notebooks/", "book/")):
        found |= {"tests/book/test_prose.py", "tests/book/test_pages.py"}
    if path.startswith("companion/"):
        users = (ROOT / "tests").glob("test_*.py")
        found |= {path} | {f"tests/{u.name}" for u in users if name.stem in rooms(u.read_text())}
    return {test for test in found if (ROOT / test).exists()}


def notebooks_of(paths: list[str]) -> list[str]:
    """The notebooks among the files, and those whose cells name a module of the package that is."""
    modules = {pathlib.Path(path).stem for path in paths if re.fullmatch(r"companion/\w+\.py", path)}
    found = []
    for path in sorted((ROOT / "notebooks").glob("*.ipynb")):
        name = path.relative_to(ROOT).as_posix()
        cells = [cell.source for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"]
        if name in paths or modules & set().union(*map(rooms, cells)):
            found.append(name)
    return found or [SAMPLE]


def main(task: str, arguments: list[str]) -> int:
    """Runs pytest on what was found, and returns its exit status."""
    command = [sys.executable, "-m", "pytest", "-q", "-rfE"]
    if task == "notebooks":
        chosen = notebooks_of(changed())
        print("Notebooks that changed, or whose code did:", *chosen)
        return subprocess.run([*command, *arguments, "--nbval", *chosen], cwd=ROOT).returncode
    paths = changed() if arguments == ["changed"] else arguments
    full = sorted(set().union(*map(tests_of, paths)))
    core = sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "tests").glob("test_*.py"))
    chosen = sorted({*core, "tests/kit", *full})
    if full:
        print("In full:", *full)
    in_full = [f"--in-full={path}" for path in full]
    parallel = ["--numprocesses=2", "--dist=worksteal"]
    return subprocess.run([*command, *parallel, "--core", *in_full, *chosen], cwd=ROOT).returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], sys.argv[2:]))
