r"""Starts one script as several workers on this machine. Chapter 15 teaches it.

.. code-block:: bash

   python -m companion.launch --workers 3 script.py its arguments
   python -m companion.launch --workers 3 -m package.module its arguments

Each worker is a process of its own and finds its place in the environment variable ``TF_CONFIG``, as on a cluster, so
that the same script runs there unchanged. The launcher shows what the workers print, each line behind the number of its
worker. If one fails, it stops all others, and ends with that worker's exit status. Workers do not outlive it.

Their addresses are on loopback, but once they are connected TensorFlow's server listens on every interface, and asks
nobody who he is: start workers on machines whose network you trust.
"""

import argparse
import contextlib
import ctypes
import json
import os
import pathlib
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from companion.arguments import integer, number

_PR_SET_PDEATHSIG = 1
_LONGEST_LINE = 65_536  # a worker that never ends its line must not fill the launcher's memory


def launch(
    workers: int,
    script: str | os.PathLike[str],
    arguments: Sequence[str] = (),
    grace: float = 5.0,
    out: Any = None,
    module: bool = False,
) -> int:
    """Runs a script as several workers that reach each other on this machine, and waits for them.

    Args:
        workers: how many, at least 1.
        script: the path of a Python file, or the name of a module.
        arguments: what it is given on its command line, a list. Defaults to none.
        grace: seconds between asking workers to end and ending them, when one has failed. Defaults to 5.
        out: the stream for what the workers print. What it cannot encode is written with backslashes. If it breaks,
            the workers are stopped. Defaults to ``None``, standard output.
        module: whether ``script`` is the name of a module, as behind ``python -m``. Defaults to ``False``.

    Returns:
        0 if all workers have ended well, or the exit status of the one that failed first. As in a shell, that is 128
        plus the signal if it was killed by one.

    Raises:
        FileNotFoundError: there is no such script.
        ValueError: an argument is not one of the above.
        OSError: writing to ``out`` has failed; it is a ``BrokenPipeError`` if its reader has gone.
        RuntimeError: this machine does not let so many workers start; none is left running.

    Example:
        >>> import io, pathlib, tempfile
        >>> script = pathlib.Path(tempfile.mkdtemp(), "hello.py")
        >>> _ = script.write_text("print('hello')")
        >>> shown = io.StringIO()
        >>> launch(2, script, out=shown)
        0
        >>> sorted(shown.getvalue().splitlines())
        ['[0] hello', '[1] hello']

    Taught in chapter 15, :doc:`/notebooks/15_local_sgd`.
    """
    workers, grace = integer("workers", workers, 1), number("grace", grace, 0)
    is_list = isinstance(arguments, Iterable) and not isinstance(arguments, (str, bytes))
    given: list[Any] = list(arguments) if is_list else [None]  # an iterator yields them once
    if not all(isinstance(each, (str, os.PathLike)) for each in given):
        raise ValueError(f"`arguments` must be a list of strings. Received: arguments={arguments!r}")
    if not isinstance(script, (str, os.PathLike)) or not os.fspath(script):
        raise ValueError(f"`script` must be a path, or the name of a module. Received: script={script!r}")
    if not module and not pathlib.Path(script).is_file():
        raise FileNotFoundError(f"`script` must be the path of a Python file. Received: script={str(script)!r}")
    command = [*(["-m"] if module else []), os.fspath(script), *map(os.fspath, given)]
    stage = _Stage(sys.stdout if out is None else out)
    running: list[subprocess.Popen[str]] = []
    with _raise_on_termination():
        try:
            with _enough_for(workers):
                addresses = [f"127.0.0.1:{port}" for port in _free_ports(workers)]
                for rank in range(workers):
                    running.append(_start(rank, addresses, command))
                    stage.show(running[rank], rank)
            while not (stage.error or any(worker.poll() for worker in running)):
                if None not in [worker.poll() for worker in running]:
                    break
                time.sleep(0.05)
            codes = [worker.poll() for worker in running]
            for rank, code in enumerate(codes):
                if code:
                    how = (
                        f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit status {code}"
                    )
                    stage.write(f"Worker {rank} of {workers} {how}: the others are stopped.\n")
                    break
        finally:
            _stop(running, grace)
        stage.close(grace)
    if stage.error:
        raise stage.error
    return next((code if code > 0 else 128 - code for code in codes if code), 0)


class _Stage:
    """Where workers are seen. Their output is read to its end, whether or not it can be shown."""

    def __init__(self, out: Any) -> None:
        self.out, self.error = out, None  # type: Any, Exception | None
        self.readers: list[threading.Thread] = []
        self.moved = time.monotonic()  # when a line was last read or written; infinity during a write
        self.lock = threading.Lock()

    def show(self, worker: subprocess.Popen[str], rank: int) -> None:
        """Begins to copy a worker's output, line by line."""

        def copy() -> None:
            assert worker.stdout is not None
            for line in iter(lambda: worker.stdout.readline(_LONGEST_LINE), ""):  # type: ignore[union-attr]
                self.write(f"[{rank}] " + line.removesuffix("\n") + "\n")

        self.readers.append(threading.Thread(target=copy, daemon=True))
        self.readers[-1].start()

    def write(self, text: str) -> None:
        """Writes a line, unless an earlier one could not be written."""
        with self.lock:
            if self.error is None and self.out is not None:  # a process may have no standard output
                self.moved = float("inf")
                try:
                    try:
                        self.out.write(text)
                    except UnicodeEncodeError:
                        encoding = self.out.encoding
                        self.out.write(text.encode(encoding, "backslashreplace").decode(encoding))
                    self.out.flush()
                except Exception as error:  # a full disk, a reader that has gone, a closed stream
                    self.error = error
            self.moved = time.monotonic()

    def close(self, grace: float) -> None:
        """Waits for the last lines, but not for a process that has left its worker and only holds its output open."""
        while any(reader.is_alive() for reader in self.readers) and time.monotonic() < self.moved + grace:
            time.sleep(0.01)


def _start(rank: int, addresses: list[str], command: list[str]) -> subprocess.Popen[str]:
    """Starts one worker."""
    place = {"cluster": {"worker": addresses}, "task": {"type": "worker", "index": rank}}
    return subprocess.Popen(
        [sys.executable, "-u", *command],
        env=os.environ | {"TF_CONFIG": json.dumps(place)},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,  # Ctrl-C reaches the launcher alone, which stops them; so do processes of their own
        preexec_fn=_end_with_parent if sys.platform == "linux" else None,
    )


def _end_with_parent() -> None:
    """Asks the kernel to kill this process when the launcher is gone, however it went."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def _stop(running: list[subprocess.Popen[str]], grace: float) -> None:
    """Asks those that still run to end, and after a while ends them, with all processes that they have started."""
    try:
        for worker in running:
            _signal(worker, signal.SIGTERM)
        deadline = time.monotonic() + grace
        for worker in running:
            with contextlib.suppress(subprocess.TimeoutExpired):
                worker.wait(max(0.0, deadline - time.monotonic()))
    finally:  # also at a second Ctrl-C
        for worker in running:
            _signal(worker, signal.SIGKILL)
            worker.wait()


def _signal(worker: subprocess.Popen[str], number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):  # nobody is left
        os.killpg(worker.pid, number)


@contextlib.contextmanager
def _raise_on_termination() -> Iterator[None]:
    """Lets SIGTERM and the end of the terminal end the launcher as Ctrl-C does, unless it runs in a thread."""

    def end(number: int, _: Any) -> None:
        raise SystemExit(128 + number)

    here = threading.current_thread() is threading.main_thread()
    before = {each: signal.getsignal(each) for each in (signal.SIGTERM, signal.SIGHUP) if here}
    before = {each: handler for each, handler in before.items() if handler is not signal.SIG_IGN}  # nohup
    try:
        for each in before:
            signal.signal(each, end)
        yield
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)


@contextlib.contextmanager
def _enough_for(workers: int) -> Iterator[None]:
    """Says in words that the machine has no more ports, files, processes or threads."""
    try:
        yield
    except (OSError, RuntimeError, OverflowError) as error:
        raise RuntimeError(
            "`workers` must be no more than this machine lets start: give fewer, or raise its limits of open files and "
            f"of processes (`ulimit -n`, `ulimit -u`). Received: workers={workers} ({error})"
        ) from error


def _free_ports(count: int) -> list[int]:
    sockets: list[socket.socket] = []
    try:
        for _ in range(count):
            sockets.append(socket.socket())
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]
    finally:
        for each in sockets:
            each.close()


def main(arguments: Sequence[str] | None = None) -> int:
    """What ``python -m companion.launch`` does; see :func:`launch`.

    Args:
        arguments: the command line. Defaults to ``None``, that of the process.

    Returns:
        The exit status.
    """
    parser = argparse.ArgumentParser(
        prog="python -m companion.launch",
        usage="%(prog)s [-h] --workers WORKERS (script | -m module) [arguments ...]",
        description=(__doc__ or "").split(". ")[0],
        allow_abbrev=False,
    )
    parser.add_argument("--workers", type=int, required=True, help="how many processes")
    parser.add_argument("-m", dest="module", help="the name of a module, instead of a script")
    parser.add_argument("script", nargs="?", help="a Python file; what follows are its arguments, whatever they are")
    # What comes behind the script is its own; argparse would take a `--` out of it.
    words, end = list(sys.argv[1:] if arguments is None else arguments), 0
    while end < len(words) and words[end].startswith("-") and not words[end].startswith("-m"):
        end += 2 if words[end] == "--workers" else 1
    end += 2 if words[end : end + 1] == ["-m"] else 1
    given = parser.parse_args(words[:end])
    if not given.module and not given.script:
        parser.error("give a script, or -m and the name of a module")
    try:
        return launch(given.workers, given.module or given.script, words[end:], module=bool(given.module))
    except (ValueError, FileNotFoundError) as error:
        parser.error(str(error))
    except RuntimeError as error:
        parser.exit(1, f"{parser.prog}: {error}\n")
    except BrokenPipeError:
        raise
    except OSError as error:
        parser.exit(1, f"{parser.prog}: the workers are stopped, for what they print cannot be shown: {error}\n")
    except KeyboardInterrupt:
        return 128 + signal.SIGINT


def _run_and_exit() -> None:
    """Ends as the shell expects of any program, whatever still hangs on a stream that nobody reads."""
    try:
        try:
            status = main()
        except SystemExit as ended:
            status = ended.code  # type: ignore[assignment]
        if threading.active_count() == 1 and sys.stdout:
            sys.stdout.flush()
    except BrokenPipeError:  # `| head`
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGPIPE)
    os._exit(status)


if __name__ == "__main__":
    _run_and_exit()
