"""Runs the programs of a Markdown page and writes what they print: ``python -m tools.programs book/recipes.md``.

A program is a block of Python, which may be folded, followed by a block of text, what it prints. All programs of a
page run one after the other in one process, where the processor is two devices, each in an empty folder of its own. A
block of shell between the two is how the program is started, as the file that it names; then it runs in processes of
its own.
"""

import contextlib
import functools
import io
import json
import os
import pathlib
import re
import runpy
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Iterator
from typing import NamedTuple

ROOT = pathlib.Path(__file__).parent.parent
_BLOCK = "((?:(?!```).)*)```"
_PROGRAM = re.compile(
    rf"```python\n{_BLOCK}\n\n(?:```bash\n{_BLOCK}\n\n)?(?:</details>\n\n)?```text\n{_BLOCK}", re.DOTALL
)


class Program(NamedTuple):
    """A program of a page: under which heading it stands, its code, how it is started, and what the page shows."""

    heading: str
    code: str
    command: str
    output: str


def programs(page: str) -> list[Program]:
    """All programs of a page, in their order."""
    return [
        Program(re.findall(r"^##+ (.*)$", page[: match.start()], re.MULTILINE)[-1], match[1], match[2] or "", match[3])
        for match in _PROGRAM.finditer(page)
    ]


def outputs(page: pathlib.Path, python: str = sys.executable) -> list[str]:
    """What each program of a page prints now, or its traceback."""
    here = {"PYTHONPATH": str(ROOT), "TF_CPP_MIN_LOG_LEVEL": "3", "CUDA_VISIBLE_DEVICES": "-1"}
    command = [python, "-m", "tools.programs", "--here", str(page)]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | here, capture_output=True, text=True, timeout=600)
    if not done.stdout:
        raise RuntimeError(done.stderr[-3000:])
    return json.loads(done.stdout.splitlines()[-1])


def differing(page: pathlib.Path, python: str) -> list[str]:
    """The headings under which that Python prints something else than the page shows; not for want of a class."""
    pairs = zip(programs(page.read_text()), outputs(page, python), strict=True)
    return [each.heading for each, printed in pairs if printed != each.output and "has no attribute" not in printed]


def started(program: Program, folder: pathlib.Path) -> str:
    """What a program prints that is started by a command, in processes of its own."""
    (name,) = re.findall(r"\S+\.py", program.command)
    (folder / name).write_text(program.code)
    path = os.pathsep.join([str(pathlib.Path(sys.executable).parent), os.environ["PATH"]])
    environment = os.environ | {"PYTHONPATH": str(ROOT), "PATH": path}
    done = subprocess.run(
        ["bash", "-euc", program.command], cwd=folder, env=environment, capture_output=True, text=True, timeout=300
    )
    noise = re.compile(r"^\[\d\] .*(?:oneDNN|cpu_feature_guard|rebuild TensorFlow|WARNING|E0000|I0000|W0000)")
    shown = [line for line in done.stdout.splitlines(keepends=True) if not noise.match(line)]
    return "".join(shown) if done.returncode == 0 else done.stdout + done.stderr[-3000:]


def _run_here(page: pathlib.Path) -> None:
    import gc

    import keras
    import tensorflow as tf

    gc.disable()  # whoever frees the iterator of a distributed data set waits up to a minute for its thread to wake up
    (processor,) = tf.config.list_physical_devices("CPU")
    tf.config.set_logical_device_configuration(processor, [tf.config.LogicalDeviceConfiguration()] * 2)
    # Two strategies of one process take each other's collectives for their own, and refuse their shapes.
    strategy = functools.cache(lambda devices, mirrored=tf.distribute.MirroredStrategy: mirrored(list(devices)))
    tf.distribute.MirroredStrategy = lambda devices: strategy(tuple(devices))
    printed = []
    for number, program in enumerate(programs(page.read_text())):
        keras.utils.clear_session()
        keras.config.set_dtype_policy("float32")
        with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
            if program.command:
                printed.append(started(program, pathlib.Path(folder)))
                continue
            path = pathlib.Path(folder, f"program_{number}.py")
            path.write_text(program.code)
            with contextlib.redirect_stdout(io.StringIO()) as shown:
                try:
                    runpy.run_path(str(path), run_name="__main__")
                except Exception:
                    traceback.print_exc(file=shown)
            printed.append(shown.getvalue())
    print(json.dumps(printed))
    sys.stdout.flush()
    os._exit(0)


def _filled(page: str, printed: Iterator[str]) -> str:
    def fill(match: re.Match[str]) -> str:
        return f"{page[match.start() : match.start(3)]}{next(printed)}```"

    return _PROGRAM.sub(fill, page)


if __name__ == "__main__":
    if sys.argv[1] == "--here":
        _run_here(pathlib.Path(sys.argv[2]))
    for name in sys.argv[1:]:
        path = pathlib.Path(name)
        path.write_text(_filled(path.read_text(), iter(outputs(path))))
