"""Holds `companion.datasets`: the digits are scikit-learn's, the corpus is what the docstrings of source files say."""

import ast
import gc
import os
import pathlib
import sys
import unittest.mock
import zlib
from typing import Any

import numpy as np
import pytest
from sklearn.datasets import load_digits

from companion import datasets
from tests.kit.processes import output_of


def test_shapes_and_ranges() -> None:
    data = datasets.digits()
    assert [array.shape for array in data] == [(1440, 64), (1440,), (357, 64), (357,)]
    assert [array.dtype for array in data] == ["float32", "int64", "float32", "int64"]
    assert (data.x_train.min(), data.x_train.max()) == (0, 1)
    assert set(data.y_train) == set(data.y_test) == set(range(10))


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_every_image_of_the_source_once_with_its_label(dtype: str) -> None:
    data = datasets.digits(dtype)
    assert data.x_train.dtype == data.x_test.dtype == dtype
    found = np.column_stack([np.concatenate([data.x_train, data.x_test]), np.concatenate([data.y_train, data.y_test])])
    images, labels = load_digits(return_X_y=True)
    expected = np.column_stack([images / 16, labels])
    assert not np.array_equal(found, expected)
    np.testing.assert_array_equal(found[np.lexsort(found.T)], expected[np.lexsort(expected.T)])


def test_the_same_split_for_every_reader() -> None:
    data = datasets.digits()
    assert [zlib.crc32(array.astype("uint8").tobytes()) for array in (data.y_train, data.y_test)] == [
        1248838851,
        1163825279,
    ]
    assert zlib.crc32((data.x_train * 16).astype("uint8").tobytes()) == 3969449489


def test_a_reader_who_writes_into_the_data_hurts_nobody() -> None:
    before = np.random.get_state()[1].copy()  # noqa: NPY002
    datasets.digits().x_train[:] = -1
    assert datasets.digits().x_train.min() == 0
    np.testing.assert_array_equal(np.random.get_state()[1], before)  # noqa: NPY002


def test_without_scikit_learn_the_message_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(ModuleNotFoundError, match=r"companion\.datasets\.digits.*pip install scikit-learn") as caught:
        datasets.digits()
    assert isinstance(caught.value.__cause__, ModuleNotFoundError)


# ---- the corpus -----------------------------------------------------------------------------------------------------

PACKAGE = {
    "__init__.py": '"""The package, isn\'t it: 3 words of np.dot_products."""\nraise ImportError("imported")\n',
    "a.py": '"""A  module\n   of one_two."""\nclass C:\n    r"""Class \\\\d."""\n    def f(self):\n        """F."""\n',
    "b/c.py": "async def g():\n    'Coroutine.'\n    def inner(): 'Inner one'\n\nx = 1\n'no docstring'\n",
    "d.py": '"""a module of\none two!"""\ndef h(): "F?"\ndef empty(): "123 —"\ndef formatted(): f"no"\n',
    "broken.py": "def (:\n",
    "null.py": "x = '\0'\n",
    "escape.py": "'Stray \\d escape'\n",
}
DOCUMENTS = [
    "the package isn't it words of np dot products",
    "a module of one two",
    "class d",
    "f",
    "coroutine",
    "inner one",
    "stray d escape",
]


@pytest.fixture
def package(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> pathlib.Path:
    """A package that cannot be imported, on the path."""
    root = tmp_path / "site" / "docs_of_mine"
    for name, text in PACKAGE.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    (tmp_path / "site" / "single_module.py").write_text("'Single.'")
    monkeypatch.syspath_prepend(tmp_path / "site")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("LOCALAPPDATA", str(tmp_path / "home"))
    return root


def joined(documents: list[list[str]]) -> list[str]:
    return [" ".join(words) for words in documents]


def test_documents_are_the_docstrings_without_duplicates(package: pathlib.Path, tmp_path: pathlib.Path) -> None:
    assert joined(datasets.documentation_corpus(["docs_of_mine"], tmp_path)) == DOCUMENTS
    assert joined(datasets.documentation_corpus("single_module", tmp_path)) == ["single"]
    both = datasets.documentation_corpus(["docs_of_mine", "single_module", "docs_of_mine"], tmp_path)
    assert joined(both) == [*DOCUMENTS, "single"]
    assert "docs_of_mine" not in sys.modules


def test_kept_text_is_read_back_until_a_file_changes(package: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read = []
    parse = datasets.ast.parse
    monkeypatch.setattr(datasets.ast, "parse", lambda *arguments: read.append(1) or parse(*arguments))
    first = datasets.documentation_corpus(["docs_of_mine"])
    assert len(read) == len(PACKAGE)
    assert datasets.documentation_corpus(["docs_of_mine"]) == first
    assert len(read) == len(PACKAGE)
    (package / "a.py").write_text("'Another'")
    assert "another" in joined(datasets.documentation_corpus(["docs_of_mine"]))


def test_default_place_is_the_users_cache(package: pathlib.Path, tmp_path: pathlib.Path) -> None:
    datasets.documentation_corpus(["docs_of_mine"])
    (kept,) = (tmp_path / "home" / "companion").iterdir()
    assert kept.name.startswith("documentation-")


def test_damaged_file_is_read_anew(package: pathlib.Path, tmp_path: pathlib.Path) -> None:
    folder = tmp_path / "cache"
    datasets.documentation_corpus(["docs_of_mine"], folder)
    (kept,) = folder.iterdir()
    whole = kept.read_bytes()
    for damaged in (b"", whole[:-9], b"no gzip", whole[:20] + b"?" + whole[21:]):
        kept.write_bytes(damaged)
        assert joined(datasets.documentation_corpus(["docs_of_mine"], folder)) == DOCUMENTS
        assert kept.read_bytes() == whole


@pytest.mark.parametrize("file", [ast.__file__, unittest.mock.__file__, datasets.__file__])
def test_definitions_are_those_of_ast_walk(file: str) -> None:
    tree = ast.parse(pathlib.Path(file).read_bytes())
    kinds = ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef
    assert list(datasets._definitions(tree)) == [node for node in ast.walk(tree) if isinstance(node, kinds)]


@pytest.mark.parametrize("enabled", [True, False])
def test_garbage_collection_is_as_before(
    package: pathlib.Path, tmp_path: pathlib.Path, enabled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*_: Any) -> None:
        assert not gc.isenabled()
        raise KeyboardInterrupt

    monkeypatch.setattr(datasets.ast, "parse", stop)
    if not enabled:
        gc.disable()
    try:
        with pytest.raises(KeyboardInterrupt):
            datasets.documentation_corpus(["docs_of_mine"], tmp_path)
        assert gc.isenabled() == enabled
    finally:
        gc.enable()


def test_interrupted_writing_leaves_nothing(
    package: pathlib.Path, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    folder = tmp_path / "cache"
    monkeypatch.setattr(os, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        datasets.documentation_corpus(["docs_of_mine"], folder)
    assert list(folder.iterdir()) == []


def test_place_that_cannot_be_written(
    package: pathlib.Path, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    monkeypatch.setenv("LOCALAPPDATA", str(tmp_path / "file"))
    assert joined(datasets.documentation_corpus(["docs_of_mine"])) == DOCUMENTS
    with pytest.raises(OSError, match="file"):
        datasets.documentation_corpus(["docs_of_mine"], tmp_path / "file")


@pytest.mark.parametrize(
    "names", [[], [""], ["numpy.linalg"], [None], ["../numpy"], "", None, 5, b"numpy", [["numpy"]]]
)
def test_names_that_are_none(names: Any) -> None:
    with pytest.raises(ValueError, match=r"`packages` must be names of top-level packages"):
        datasets.documentation_corpus(names)


@pytest.mark.parametrize("folder", [5, b"folder", ["folder"], True])
def test_folder_that_is_none(folder: Any) -> None:
    with pytest.raises(ValueError, match=r"`cache_folder` must be a path, or None. Received: cache_folder="):
        datasets.documentation_corpus("numpy", folder)


@pytest.mark.parametrize("dtype", ["int32", "float99", None, 3, "bfloat", bool, ["float32"], "complex64"])
def test_dtype_that_is_none(dtype: Any) -> None:
    with pytest.raises(ValueError, match=r"`dtype` must be 'float16', 'float32' or 'float64'. Received: dtype="):
        datasets.digits(dtype)


@pytest.mark.parametrize("name", ["not_installed_anywhere", "sys"])
def test_package_without_sources(name: str) -> None:
    with pytest.raises(ModuleNotFoundError, match=name):
        datasets.documentation_corpus([name])


def test_real_package_is_not_imported(tmp_path: pathlib.Path) -> None:
    """Runs in a process of its own, on the file alone: `companion` itself imports Keras."""
    code = f"""
import importlib.util, sys
spec = importlib.util.spec_from_file_location("datasets", {datasets.__file__!r})
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
corpus = module.documentation_corpus(["keras"], {str(tmp_path)!r})
assert "keras" not in sys.modules and "tensorflow" not in sys.modules
print(sum(map(len, corpus)) > 100_000, any("embedding" in document for document in corpus))
"""
    assert output_of(code) == "True True\n"
