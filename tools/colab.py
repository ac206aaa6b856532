"""Runs every notebook as Colab would: Colab's versions, an empty folder, and the install cell exactly as it stands.

And, where they are those that the page on Keras names as the older ones, the programs of that page.

The repository's address is redirected to a copy of this checkout, in which the release's tag points to the present
state, so nothing has to be published first. The first notebook runs in a Python of its own, the others in some forked
from one that has imported Keras (tools/warm.py). Usage: python -m tools.colab PYTHON [pytest arguments …] where PYTHON
is an interpreter that has tools/requirements-colab.txt installed and `companion` not.
"""

import concurrent.futures
import json
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile
import tomllib

from tools import programs, warm
from tools.kernel import prepare_environment

ROOT = pathlib.Path(__file__).parent.parent


def _git(*arguments: str, cwd: pathlib.Path = ROOT) -> str:
    return subprocess.run(["git", *arguments], cwd=cwd, check=True, capture_output=True, text=True).stdout.strip()


def main(python: str, arguments: list[str]) -> int:
    """Returns the exit status of nbval on all notebooks."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        mirror, content = folder / "mirror.git", folder / "content"
        _git("clone", "--quiet", "--bare", str(ROOT), str(mirror))
        state = _git("stash", "create") or _git("rev-parse", "HEAD")
        _git("push", "--quiet", "--force", str(mirror), f"{state}:refs/tags/v{project['version']}")
        shutil.copytree(ROOT / "notebooks", content, ignore=shutil.ignore_patterns(".*"))
        for helper in ("conftest.py", "tools"):
            source = ROOT / helper
            (shutil.copytree if source.is_dir() else shutil.copy)(source, folder / helper)
        redirect = {
            "GIT_CONFIG_COUNT": "1",
            "GIT_CONFIG_KEY_0": f"url.{mirror.as_uri()}.insteadOf",
            "GIT_CONFIG_VALUE_0": project["urls"]["Repository"],
        }
        if not _companion_is_absent(python):
            subprocess.run([python, "-m", "pip", "uninstall", "-q", "-y", "keras-optimizer-companion"], check=True)
        command = [python, "-m", "pytest", "--nbval", "-p", "no:cacheprovider", "-c", os.devnull, "--rootdir", name]
        *others, first = map(str, sorted(content.glob("*.ipynb"), key=_length, reverse=True))
        prepare_environment()
        with concurrent.futures.ThreadPoolExecutor(1) as beside:
            differing = beside.submit(_other_faults, python)
            # The first notebook, a short one, installs `companion`, alone: two would get into each other's way.
            with subprocess.Popen([*command, first], cwd=folder, env=os.environ | redirect) as alone:
                kernels = {"JUPYTER_PATH": str(_warm_kernels(folder, python))}  # meanwhile: it takes as long
            run = [*command, *arguments, *others]
            status = max(
                alone.returncode, subprocess.run(run, cwd=folder, env=os.environ | redirect | kernels).returncode
            )
        for heading in differing.result():
            print(f"book/keras.md: the older versions print something else under {heading!r}")
        return status or int(bool(differing.result()))


def _other_faults(python: str) -> list[str]:
    """The faults of Keras that the older versions named on their page do not have as it shows them."""
    page = ROOT / "book" / "keras.md"
    named = re.findall(r"On Keras (\S+) with TensorFlow (\S+) they print the same", page.read_text())
    versions = "from importlib.metadata import version; print(version('keras'), version('tensorflow'))"
    found = subprocess.run([python, "-I", "-c", versions], check=True, capture_output=True, text=True).stdout.split()
    return programs.differing(page, python) if [tuple(found)] == named else []


def _warm_kernels(folder: pathlib.Path, python: str) -> pathlib.Path:
    """Where Jupyter finds the kernel of that Python, forked."""
    place = folder / "jupyter" / "kernels" / "python3"
    place.mkdir(parents=True)
    interpreter = warm.interpreter(folder, python, "keras", "tensorflow", "sklearn.datasets")
    start = [interpreter, "-m", "ipykernel_launcher", "-f", "{connection_file}"]
    (place / "kernel.json").write_text(json.dumps({"argv": start, "display_name": "Python 3", "language": "python"}))
    return folder / "jupyter"


def _length(notebook: pathlib.Path) -> int:
    """The seconds that a notebook takes, by its own words."""
    return int(re.findall(r"about (\d+) seconds", notebook.read_text())[0])


def _companion_is_absent(python: str) -> bool:
    test = "import importlib.util, sys; sys.exit(importlib.util.find_spec('companion') is not None)"
    return subprocess.run([python, "-I", "-c", test]).returncode == 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], sys.argv[2:]))
