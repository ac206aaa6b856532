"""Real data that is already on the reader's disk, so that a notebook downloads nothing. Every chapter trains on it."""

import ast
import collections
import contextlib
import gc
import gzip
import hashlib
import importlib.util
import os
import pathlib
import re
import sys
import tempfile
import warnings
import zlib
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np


class Digits(NamedTuple):
    """The digits, split for training and for testing."""

    x_train: np.ndarray
    """Images for training, shape ``(1440, 64)``, pixels in [0, 1]."""
    y_train: np.ndarray
    """Their labels, shape ``(1440,)``, integers from 0 to 9."""
    x_test: np.ndarray
    """Images for testing, shape ``(357, 64)``."""
    y_test: np.ndarray
    """Their labels, shape ``(357,)``."""


def digits(dtype: str = "float32") -> Digits:
    """Loads the handwritten digits that come inside scikit-learn: 8 × 8 pixels, 1,797 images, shuffled once.

    Args:
        dtype: of the images, a floating type that NumPy has. Defaults to ``"float32"``.

    Returns:
        A :class:`Digits` tuple of 1,440 images for training and 357 for testing, always the same ones.

    Raises:
        ValueError: ``dtype`` is another.
        ModuleNotFoundError: scikit-learn is not installed; the message says how to install it.

    Example:
        >>> data = digits()
        >>> data.x_train.shape, data.y_test.shape, float(data.x_train.max())
        ((1440, 64), (357,), 1.0)

    References:
        Alpaydin and Kaynak, 1998, "Optical recognition of handwritten digits", UCI machine learning repository.

    Used from chapter 01 on, :doc:`/notebooks/01_what_is_an_optimizer`.
    """
    try:
        is_floating = dtype is not None and np.issubdtype(np.dtype(dtype), np.floating)
    except TypeError:
        is_floating = False
    if not is_floating:
        raise ValueError(f"`dtype` must be 'float16', 'float32' or 'float64'. Received: dtype={dtype!r}")
    try:
        from sklearn.datasets import load_digits
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "`companion.datasets.digits` reads the data inside scikit-learn: pip install scikit-learn"
        ) from error
    images, labels = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(images))
    images, labels = (images[order] / 16).astype(dtype), labels[order].astype("int64")
    return Digits(images[:1440], labels[:1440], images[1440:], labels[1440:])


_WORD = re.compile(r"[a-z]+(?:'[a-z]+)?")


def documentation_corpus(
    packages: Iterable[str] = ("numpy", "keras", "tensorflow", "matplotlib"),
    cache_folder: str | os.PathLike[str] | None = None,
) -> list[list[str]]:
    """Reads the docstrings of installed packages: text in the millions of words, and nothing to download.

    The source files are found and parsed, never imported. Of docstrings with the same words the first one counts.
    The text is that of the versions installed, so no two readers need have the same. What was read is kept on disk
    until a source file changes.

    Args:
        packages: names of top-level packages or modules. Defaults to NumPy, Keras, TensorFlow and Matplotlib.
        cache_folder: where to keep what was read. Defaults to ``companion`` in the user's cache folder; if nothing
            can be written there, nothing is kept.

    Returns:
        A list of documents, one for each docstring, each a list of words in lower case, in the order of the packages,
        their files and the definitions in them.

    Raises:
        ValueError: a name is that of a submodule or no name at all, ``packages`` is empty, or ``cache_folder`` is no
            path.
        ModuleNotFoundError: a package is not installed.

    Example:
        >>> corpus = documentation_corpus(["this_package"])
        Traceback (most recent call last):
            ...
        ModuleNotFoundError: `packages`: 'this_package' is not installed, or not as source files

    Used in chapter 04, :doc:`/notebooks/04_gradients_by_hand`.
    """
    is_list = isinstance(packages, Iterable) and not isinstance(packages, str | bytes)
    names: list[Any] = list(packages) if is_list else [packages]
    if not names or not all(isinstance(name, str) and name.isidentifier() for name in names):
        raise ValueError(f"`packages` must be names of top-level packages. Received: packages={names!r}")
    if not isinstance(cache_folder, str | os.PathLike | None):
        raise ValueError(f"`cache_folder` must be a path, or None. Received: cache_folder={cache_folder!r}")
    files = [file for name in dict.fromkeys(names) for file in _source_files(name)]
    folder = pathlib.Path(cache_folder) if cache_folder is not None else _user_cache_folder()
    cache = folder / f"documentation-{_fingerprint(files)}.txt.gz"
    documents = _read_documents(cache)
    if documents is None:
        with _no_garbage_collection():
            documents = list(dict.fromkeys(_documents_of(files)))
        with contextlib.nullcontext() if cache_folder is not None else contextlib.suppress(OSError):
            _write_documents(cache, documents)
    return [[sys.intern(word) for word in document.split()] for document in documents]


def _source_files(name: str) -> list[tuple[str, pathlib.Path]]:
    """Every source file of a package: how it is known, and where it lies. Finding a package does not import it."""
    found = importlib.util.find_spec(name)
    if found is not None and found.submodule_search_locations:
        roots = [pathlib.Path(root) for root in found.submodule_search_locations]
        files = [(f"{name}/{path.relative_to(root).as_posix()}", path) for root in roots for path in root.rglob("*.py")]
    else:
        origin = pathlib.Path((found.origin if found else None) or "")
        files = [(origin.name, origin)] if origin.suffix == ".py" else []
    if not files:
        raise ModuleNotFoundError(f"`packages`: {name!r} is not installed, or not as source files", name=name)
    return sorted(files)


def _fingerprint(files: list[tuple[str, pathlib.Path]]) -> str:
    """Changes when another version is installed, and when a file is edited."""
    digest = hashlib.sha256(b"1")  # the number of this format
    for name, path in files:
        state = path.stat()
        digest.update(f"{name} {state.st_size} {state.st_mtime_ns}\n".encode())
    return digest.hexdigest()[:16]


def _user_cache_folder() -> pathlib.Path:
    root = os.environ.get("LOCALAPPDATA" if os.name == "nt" else "XDG_CACHE_HOME")
    return pathlib.Path(root or os.path.expanduser("~/.cache")) / "companion"


def _documents_of(files: list[tuple[str, pathlib.Path]]) -> Iterator[str]:
    """The words of every docstring, separated by spaces. A file that is not Python has none."""
    for _, path in files:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a stray backslash in somebody else's file
            try:
                tree = ast.parse(path.read_bytes())
            except (SyntaxError, ValueError, RecursionError):
                tree = ast.Module([], [])
        for definition in _definitions(tree):
            words = _WORD.findall((ast.get_docstring(definition, clean=False) or "").lower())
            if words:
                yield " ".join(words)


def _definitions(tree: ast.Module) -> Iterator[Any]:
    """Modules, classes and functions, level by level, as ``ast.walk`` gives them; expressions have none."""
    nodes: collections.deque[Any] = collections.deque([tree])
    while nodes:
        node = nodes.popleft()
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield node
        for block in ("body", "handlers", "cases", "orelse", "finalbody"):
            nodes.extend(getattr(node, block, ()))


@contextlib.contextmanager
def _no_garbage_collection() -> Iterator[None]:
    """Halves the time of parsing: syntax trees are many objects without a cycle."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _read_documents(cache: pathlib.Path) -> list[str] | None:
    try:
        return gzip.decompress(cache.read_bytes()).decode("ascii").splitlines() or None
    except (OSError, EOFError, zlib.error, UnicodeDecodeError):  # there is none, or something has damaged it
        return None


def _write_documents(cache: pathlib.Path, documents: list[str]) -> None:
    """Writes beside the place and moves: whoever reads finds the whole file or none."""
    cache.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=cache.parent, suffix=".part")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(gzip.compress("\n".join(documents).encode("ascii"), compresslevel=6, mtime=0))
        os.replace(name, cache)
    except BaseException:
        pathlib.Path(name).unlink(missing_ok=True)
        raise
