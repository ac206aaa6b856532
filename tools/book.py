"""Builds the book with Jupyter Book, and keeps what TensorFlow says of the machine out of it.

Usage: python -m tools.book [options of `jupyter-book build` …], in the folder of the book
"""

import sys

from tools.kernel import prepare_environment


def main(arguments: list[str]) -> None:
    """Builds the book of this folder."""
    prepare_environment()
    from jupyter_book.cli.main import main as jupyter_book

    jupyter_book(["build", ".", *arguments])


if __name__ == "__main__":
    main(sys.argv[1:])
