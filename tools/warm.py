"""A Python that starts at once: what takes long to import is there already, and TensorFlow has started no device.

``interpreter`` gives the path of a command that is used as Python is, with ``-u``, ``-c``, ``-m`` or a file. It hands
its words, environment, folder and streams to a process that has imported the packages once, the nest, which forks
another one for it. That one ends with the command, and the command ends as it did. What is to be seen of an import, of
a signal from outside or of a process's own number needs a Python of its own.
"""

import array
import atexit
import fcntl
import gc
import importlib
import json
import os
import pathlib
import resource
import runpy
import select
import signal
import socket
import subprocess
import sys
import traceback
import types
from typing import NoReturn

FOR_TESTS = ("keras", "tensorflow", "scipy.stats", "sklearn.datasets", "pytest", "hypothesis")
"""What tests of the package import, and none of their own."""
_COMMAND = """#!{python} -IS
import array, json, os, signal, socket, sys
signal.signal(signal.SIGINT, signal.SIG_DFL)
nest = socket.socket(socket.AF_UNIX)
nest.connect({address!r})
words = json.dumps([sys.argv[1:], dict(os.environ), os.getcwd()]).encode()
streams = array.array("i", [0, 1, 2])
nest.sendmsg([len(words).to_bytes(8, "big")], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, streams)])
nest.sendall(words)
code = int(nest.makefile().readline())
if code < 0:
    if -code != signal.SIGKILL:
        signal.signal(-code, signal.SIG_DFL)
    os.kill(os.getpid(), -code)
os._exit(code)
"""


def interpreter(folder: pathlib.Path, python: str, *packages: str) -> str:
    """The path of such a command. The first who asks makes it; it works until the folder is removed.

    That is also what ends the nest, or an hour without a command.
    """
    command, address = folder / "python", folder / "nest"
    if sys.platform != "linux":
        return python
    with (folder / "nest.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not command.exists():
            nest = subprocess.Popen(
                [python, __file__, str(address), *packages],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                start_new_session=True,
            )
            assert nest.stdout is not None
            with nest.stdout as said:
                assert said.read().endswith(b"ready")
            command.write_text(_COMMAND.format(python=python, address=str(address)))
            command.chmod(0o755)
    return str(command)


def seconds(folder: pathlib.Path, who: str) -> float:
    """The processor seconds that have been used for the commands of one of pytest's processes."""
    used = folder / f"seconds-{who}"
    return sum(map(float, used.read_text().split())) if used.exists() else 0.0


def _nest(address: pathlib.Path, *packages: str) -> None:
    for name in packages:
        importlib.import_module(name)
    gc.freeze()
    door = socket.socket(socket.AF_UNIX)
    door.bind(str(address))
    door.listen(64)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    os.write(1, b"ready")
    os.dup2(0, 1)
    idle = 0
    while address.exists() and idle < 3600:
        idle += 1
        if select.select([door], [], [], 1.0)[0]:
            idle = 0
            command, _ = door.accept()
            if not os.fork():
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                door.close()
                _serve(command, address.parent)
            command.close()


def _serve(command: socket.socket, folder: pathlib.Path) -> NoReturn:
    """Forks the process for a command, and ends it with the command, or the command with it."""
    streams = array.array("i")
    size, ((_, _, sent),), *_ = command.recvmsg(8, socket.CMSG_SPACE(3 * streams.itemsize))
    streams.frombytes(sent)
    words, environment, here = json.loads(command.makefile("rb").read(int.from_bytes(size, "big")))
    pid = os.fork()
    if not pid:
        command.close()
        os.setsid()
        for number, stream in enumerate(streams):
            os.dup2(stream, number)
            os.close(stream)
        _run(words, environment, here)
    for stream in streams:
        os.close(stream)
    process = os.pidfd_open(pid)
    ended = process in select.select([command.fileno(), process], [], [])[0]
    if not ended:
        os.killpg(pid, signal.SIGKILL)
    _, status = os.waitpid(pid, 0)
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    with (folder / f"seconds-{environment.get('PYTEST_XDIST_WORKER', '')}").open("a") as record:
        record.write(f"{used.ru_utime + used.ru_stime}\n")
    if ended:
        command.sendall(f"{os.waitstatus_to_exitcode(status)}\n".encode())
    os._exit(0)


def _run(words: list[str], environment: dict[str, str], here: str) -> NoReturn:
    """What Python does with its command line; but at the end nothing is taken apart, which took a second."""
    before = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    after = environment.get("PYTHONPATH", "").split(os.pathsep)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(here)
    sys.path[:] = [*filter(None, after), *(place for place in sys.path[1:] if place not in before)]
    if words[0] == "-u":
        words = words[1:]
        sys.stdout.reconfigure(write_through=True)  # type: ignore[union-attr]
    code = 0
    try:
        _program(*words)
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
        if not isinstance(end.code, int | None):
            print(end.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
        code = 1
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _program(what: str, *others: str) -> None:
    if what == "-c":
        sys.argv = ["-c", *others[1:]]
        sys.path.insert(0, "")
        sys.modules["__main__"] = main = types.ModuleType("__main__")
        exec(compile(others[0], "<string>", "exec"), main.__dict__)
    elif what == "-m":
        sys.argv = ["-m", *others[1:]]
        sys.path.insert(0, os.getcwd())
        runpy.run_module(others[0], run_name="__main__", alter_sys=True)
    else:
        sys.argv = [what, *others]
        sys.path.insert(0, str(pathlib.Path(what).resolve().parent))
        runpy.run_path(what, run_name="__main__")


if __name__ == "__main__":
    _nest(pathlib.Path(sys.argv[1]), *sys.argv[2:])
