"""The rules of the house: who may import whom, what an import costs and leaves alone, what is public and documented."""

import ast
import inspect
import operator
import pathlib
import re
import tomllib

import pytest

import companion
from tests.kit import ROOT
from tests.kit.processes import output_of, warm

PACKAGE = ROOT / "companion"
# Rooms that others stand on import none of them but each other; and these ways are never taken, at any distance.
GROUND = {"arguments", "gradients", "replicas"}
NEVER = {("oracle", "injection"), ("accumulation", "injection"), ("accumulation", "oracle")}
# An exercise is checked with what its chapter teaches, so its module may use every floor.
CHECKS = re.compile(r"exercises/chapter_\d\d\.py")


def imports_of(source: str) -> set[str]:
    """The modules of ``companion`` that a source file imports."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "companion":
            parts = node.module.split(".")
            found |= {parts[1]} if len(parts) > 1 else {alias.name for alias in node.names}
        elif isinstance(node, ast.Import):
            found |= {alias.name.split(".")[1] for alias in node.names if alias.name.startswith("companion.")}
    return found


def breaches(sources: dict[str, str]) -> list[str]:
    """Circles, and imports that are not allowed."""
    rooms = {name: imports_of(source) - {name} for name, source in sources.items()}
    reached = {name: set(others) for name, others in rooms.items()}
    for _ in rooms:
        for name in reached:
            reached[name] |= {far for near in reached[name] for far in reached.get(near, ())}
    return [
        *(f"{name} imports itself, by way of others" for name in reached if name in reached[name]),
        *(f"{name} imports {other}" for name in GROUND & set(rooms) for other in rooms[name] - GROUND),
        *(f"{name} leads to {other}" for name in rooms for other in reached[name] if (name, other) in NEVER),
        *(f"{name} imports exercises" for name, others in rooms.items() if "exercises" in others),
    ]


def test_no_file_imports_upwards() -> None:
    sources: dict[str, str] = {}
    for path in PACKAGE.rglob("*.py"):
        relative = path.relative_to(PACKAGE).as_posix()
        if relative != "__init__.py" and not CHECKS.fullmatch(relative):
            room = relative.removesuffix(".py").split("/")[0]
            sources[room] = sources.get(room, "") + path.read_text()
    assert breaches(sources) == []


@pytest.mark.parametrize(
    ("sources", "breach"),
    [
        ({"oracle": "import companion.injection", "injection": ""}, "oracle leads to injection"),
        ({"gradients": "from companion.oracle import GradientOracle"}, "gradients imports oracle"),
        (
            {"sums": "import companion.wrapping", "wrapping": "import companion.sums"},
            "sums imports itself, by way of others",
        ),
        ({"legacy": "from companion import exercises"}, "legacy imports exercises"),
        (
            {"accumulation": "import companion.runge_kutta", "runge_kutta": "from companion.injection import inject"},
            "accumulation leads to injection",
        ),
    ],
)
def test_a_breach_would_be_found(sources: dict[str, str], breach: str) -> None:
    assert breach in " ".join(breaches(sources))


def test_test_modules_import_no_other() -> None:
    """What they share stands in tests/kit, tests/book/reading.py and the like."""
    for path in (ROOT / "tests").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import | ast.ImportFrom) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not [name for name in names if re.search(r"(^|\.)test_", name)], path


def test_autograph_knows_what_a_step_is_made_of() -> None:
    """Where a step stands in a ``tf.function`` of one's own, AutoGraph warns of each function with ``:=`` in it."""
    no_steps = {"joining", "sharpness", "tableaux", "word2vec"}
    for path in PACKAGE.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())) if path.stem not in no_steps else ():
            if isinstance(node, ast.FunctionDef) and not (node.name == "__init__" or node.name.startswith("on_")):
                assert not any(isinstance(each, ast.NamedExpr) for each in ast.walk(node)), f"{path.stem}.{node.name}"


def test_the_face_shows_the_public_names_and_nothing_else() -> None:
    rooms = {path.stem for path in PACKAGE.glob("*.py")} - {"__init__"} | {"exercises"}
    hidden = rooms - set(dir(companion))
    assert {"oracle", "sums", "wrapping", "denominators", "arguments", "gradients", "replicas"} <= hidden
    for name in dir(companion):
        assert getattr(companion, name) is not None
    with pytest.raises(AttributeError, match="nonsense"):
        companion.nonsense  # noqa: B018


def test_import_leaves_global_state_alone() -> None:
    code = """
import random, sys, warnings
for name in ("matplotlib", "sklearn", "IPython"):
    sys.modules[name] = None  # as where they are not installed: only notebooks need them
import keras, numpy as np, tensorflow as tf
def state():
    return (random.getstate(), str(np.random.get_state()), keras.config.floatx(), keras.config.dtype_policy().name,
            tf.executing_eagerly(), str(np.get_printoptions()), len(warnings.filters), keras.config.image_data_format())
before = state()
import companion, companion.exercises, companion.datasets, companion.figures, companion.legacy
assert state() == before
print("quiet")
"""
    assert output_of(code) == "quiet\n"


def public_objects() -> list[tuple[str, object]]:
    """Every public class and function of every module of the package."""
    import importlib
    import pkgutil

    found = []
    for module in pkgutil.iter_modules(companion.__path__, "companion."):
        members = inspect.getmembers(importlib.import_module(module.name))
        for name, member in members:
            is_own = getattr(member, "__module__", None) == module.name and not name.startswith("_")
            if is_own and (inspect.isclass(member) or inspect.isfunction(member)):
                found.append((f"{module.name}.{name}", member))
    return found


@pytest.mark.parametrize(
    ("name", "member"), public_objects(), ids=lambda value: value if isinstance(value, str) else ""
)
def test_public_name_is_documented(name: str, member: object) -> None:
    text = inspect.getdoc(member) or ""
    assert len(text) > 40
    parameters = [
        parameter
        for parameter in inspect.signature(member).parameters.values()  # type: ignore[arg-type]
        if parameter.name != "self"
    ]
    section = "Attributes:" if hasattr(member, "__dataclass_fields__") else "Args:"
    if parameters and not issubclass(member if inspect.isclass(member) else object, tuple):
        if section not in text:  # functions of one signature: their module describes it once
            text = inspect.getdoc(inspect.getmodule(member)) or ""
        assert section in text
        for parameter in parameters:
            assert re.search(rf"^\s*(\*\*|\*)?{parameter.name}: ", text, re.MULTILINE), (
                f"{parameter.name} is not described"
            )


NAMES = [name for name in companion.__all__ if not inspect.ismodule(getattr(companion, name))]


# What is not called by its name, but handed out; what only serves the book has no chapter of its own.
HANDED_OUT = "teams.Team", "diagnostics.Listener", "questions.Questions", "gradient_flow.TABLEAUX", "launch.main"
ENTRIES = re.findall(r":: companion\.((?!NAME)[\w.]+\w)$", (ROOT / "book" / "api.md").read_text(), re.MULTILINE)
TAUGHT = [
    name
    for name in ENTRIES
    if not name.startswith(("figures.", "exercises.", "datasets.", "legacy.", *HANDED_OUT))
    and not inspect.ismodule(operator.attrgetter(name)(companion))
]


@pytest.mark.parametrize("name", sorted({*NAMES, *TAUGHT}))
def test_public_name_has_example_and_chapter(name: str) -> None:
    text = inspect.getdoc(operator.attrgetter(name)(companion)) or ""
    for part in (">>> ", ":doc:`/notebooks/"):
        assert part in text, f"{name}: no {part}"
    chapter = re.search(r":doc:`/(notebooks/\w+)`", text)
    assert chapter
    assert (ROOT / f"{chapter[1]}.ipynb").exists()


@pytest.mark.parametrize("name", [name for name in NAMES if hasattr(getattr(companion, name), "update_step")])
def test_optimizer_has_rule_errors_and_references(name: str) -> None:
    text = inspect.getdoc(getattr(companion, name)) or ""
    for part in (".. math::", "Raises:", "References:"):
        assert part in text, f"{name}: no {part}"


def test_api_page_names_every_public_module_and_class() -> None:
    page = (ROOT / "book" / "api.md").read_text()
    for name in NAMES:
        assert f":: companion.{name}\n" in page, f"{name}: no entry in book/api.md"
    for path in PACKAGE.glob("[!_]*"):
        if path.suffix == ".py" or (path.is_dir() and (path / "__init__.py").exists()):
            assert f"companion.{path.stem}" in page, f"companion.{path.stem} is not in book/api.md"


def test_versions_agree() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    version = project["version"]
    assert companion.__version__ == version
    assert f"\nversion: {version}\n" in (ROOT / "CITATION.cff").read_text()
    assert f"## {version}" in (ROOT / "CHANGELOG.md").read_text()
    for path in (ROOT / "notebooks").glob("*.ipynb"):
        assert f"@v{version}" in path.read_text()


def test_lock_holds_what_is_declared() -> None:
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())
    lock = (ROOT / "requirements.txt").read_text()
    pins = set(re.findall(r"^([a-z0-9_.-]+)==", lock, re.MULTILINE))
    groups = declared["dependency-groups"]
    project = declared["project"]
    extras = (name for names in project["optional-dependencies"].values() for name in names)
    wanted = [*project["dependencies"], *groups["book"], *groups["test"], *extras]
    assert {re.split(r"[=<>\[]", requirement)[0] for requirement in wanted} <= pins
    exact = [requirement for requirement in wanted if "==" in requirement]
    assert all(re.search(rf"^{re.escape(requirement)}( |$)", lock, re.MULTILINE) for requirement in exact), exact


def test_make_targets_of_the_readme_exist() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    text = (ROOT / "README.md").read_text() + (ROOT / "CONTRIBUTING.md").read_text()
    named = set(re.findall(r"(?:`|^)make ([a-z-]+)", text, re.MULTILINE))
    assert {"book", "test"} <= named <= targets


def test_readme_example_runs() -> None:
    (example,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert len(example.strip().splitlines()) <= 12
    assert "accuracy" in output_of(example, python=warm())


def test_layout_of_the_readme_is_true() -> None:
    (layout,) = re.findall(r"```text\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    for name in re.findall(r"^(\S+)", layout, re.MULTILINE):
        assert pathlib.Path(ROOT / name).exists(), name
