"""Reads the committed notebooks for the tests: their prose, their cells, and the data under their figures."""

import functools
from typing import Any

import nbformat
import numpy as np
from book_pages import plain_text as plain_text

from tests.kit import ROOT

CHAPTERS = {path.name[:2]: path for path in sorted((ROOT / "notebooks").glob("*.ipynb"))}


@functools.cache
def notebook(chapter: str) -> nbformat.NotebookNode:
    """The committed notebook of a chapter, such as ``"01"``."""
    return nbformat.read(CHAPTERS[chapter], as_version=4)


def markdown(chapter: str) -> str:
    """All prose of a chapter."""
    return "\n\n".join(cell.source for cell in notebook(chapter).cells if cell.cell_type == "markdown")


def figure_data(chapter: str) -> list[list[dict[str, Any]]]:
    """The data of a chapter's figures in their order; one dictionary for each axes."""
    outputs = [output for cell in notebook(chapter).cells for output in cell.get("outputs", [])]
    return [output.metadata["figure"] for output in outputs if "figure" in output.get("metadata", {})]


def line(axes: dict[str, Any], label: str) -> tuple[np.ndarray, np.ndarray]:
    """The x and y values of the line that carries ``label``."""
    found = [entry for entry in axes["lines"] if entry["label"] == label]
    assert len(found) == 1, f"{len(found)} lines labelled {label!r} among {[e['label'] for e in axes['lines']]}"
    return np.array(found[0]["x"], dtype=float), np.array(found[0]["y"], dtype=float)
