"""What test modules share. They import from here, and never from each other."""

import pathlib

ROOT = pathlib.Path(__file__).parent.parent.parent
