"""Executes notebooks in place and normalises them, so that a run without a change leaves no difference.

Usage: python -m tools.execute [notebooks/01_….ipynb …]   (default: every notebook)
"""

import pathlib
import sys
import time

import nbformat
from nbclient import NotebookClient

from tools.kernel import prepare_environment

NOTEBOOKS = pathlib.Path(__file__).parent.parent / "notebooks"


def normalise(notebook: nbformat.NotebookNode) -> None:
    """Removes what changes from run to run and joins pieces of one stream; refuses output on stderr."""
    notebook.metadata = {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
    }
    notebook.nbformat_minor = 5
    count = 0
    for index, cell in enumerate(notebook.cells):
        cell.id = f"cell-{index:03}"
        cell.metadata.pop("execution", None)
        if cell.cell_type != "code":
            continue
        count += 1
        cell.execution_count = count
        joined: list[nbformat.NotebookNode] = []
        for output in cell.outputs:
            if output.output_type == "stream" and output.name == "stderr":
                raise RuntimeError(f"Cell {index} wrote to stderr:\n{output.text}")
            if "execution_count" in output:
                output.execution_count = count
            if joined and output.output_type == joined[-1].output_type == "stream":
                joined[-1].text += output.text
            else:
                joined.append(output)
        cell.outputs = joined


def main(paths: list[pathlib.Path]) -> None:
    """Executes each notebook in its own folder and writes it back."""
    prepare_environment()
    for path in paths:
        started = time.perf_counter()
        notebook = nbformat.read(path, as_version=4)
        NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(path.parent)}}).execute()
        normalise(notebook)
        nbformat.write(notebook, path)
        print(f"{path.name}: {time.perf_counter() - started:.0f} s, {path.stat().st_size / 1e3:.0f} kB")


if __name__ == "__main__":
    main([pathlib.Path(argument) for argument in sys.argv[1:]] or sorted(NOTEBOOKS.glob("*.ipynb")))
