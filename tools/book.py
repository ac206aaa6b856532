"""Builds the book with Jupyter Book, and keeps what TensorFlow says of the machine out of it.

Usage: python -m tools.book [options of `jupyter-book build` …], in the folder of the book
"""

import pathlib
import shutil
import sys

from tools.kernel import prepare_environment

STATIC, COPIES = pathlib.Path("book/_static"), pathlib.Path("_build/html/_static")


def main(arguments: list[str]) -> None:
    """Builds the book of this folder."""
    prepare_environment()
    from jupyter_book.cli.main import main as jupyter_book

    if COPIES.exists():  # Sphinx copies styles and scripts only where it has a page to write
        shutil.copytree(STATIC, COPIES, dirs_exist_ok=True)
    jupyter_book(["build", ".", *arguments])


if __name__ == "__main__":
    main(sys.argv[1:])
