r"""Starts one script as several workers on this machine. Chapter 15 teaches it.

.. code-block:: bash

   python -m companion.launch --workers 3 script.py its arguments

Each worker is a process of its own and finds its place in the environment variable ``TF_CONFIG``, as on a cluster, so
that the same script runs there unchanged. The launcher shows what the workers print, each line behind the number of its
worker. If one fails, it stops all others, and ends with that worker's exit status. Workers do not outlive it.
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
from collections.abc import Sequence
from typing import Any

_PR_SET_PDEATHSIG = 1


def launch(
    workers: int, script: str | os.PathLike[str], arguments: Sequence[str] = (), grace: float = 5.0, out: Any = None
) -> int:
    """Runs a script as several workers that reach each other through ports on loopback, and waits for them.

    Args:
        workers: how many, at least 1.
        script: the path of a Python file.
        arguments: what it is given on its command line. Defaults to none.
        grace: seconds between asking workers to end and ending them, when one has failed. Defaults to 5.
        out: the stream for what the workers print. Defaults to ``None``, standard output.

    Returns:
        0 if all workers have ended well, or the exit status of the one that failed first. As in a shell, that is 128
        plus the signal if it was killed by one.

    Raises:
        FileNotFoundError: there is no such script.
        ValueError: ``workers`` is not an integer of at least 1.

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
    if isinstance(workers, bool) or not isinstance(workers, int) or workers < 1:
        raise ValueError(f"`workers` must be an integer of at least 1. Received: workers={workers!r}")
    if not pathlib.Path(script).is_file():
        raise FileNotFoundError(f"`script` must be the path of a Python file. Received: script={str(script)!r}")
    out = sys.stdout if out is None else out
    addresses = [f"127.0.0.1:{port}" for port in _free_ports(workers)]
    running: list[subprocess.Popen[str]] = []
    readers: list[threading.Thread] = []
    before = _raise_on_termination()
    try:
        for rank in range(workers):
            running.append(_start(rank, addresses, [str(script), *arguments]))
            readers.append(threading.Thread(target=_show, args=(running[rank], rank, out), daemon=True))
            readers[rank].start()
        while not any(worker.poll() for worker in running) and None in [worker.poll() for worker in running]:
            time.sleep(0.05)
        for rank, code in enumerate(worker.poll() for worker in running):
            if code:
                how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit status {code}"
                out.write(f"Worker {rank} of {workers} {how}: the others are stopped.\n")
                return code if code > 0 else 128 - code
        return 0
    finally:
        _stop(running, grace)
        for reader in readers:
            reader.join(timeout=grace)
        if before is not None:
            signal.signal(signal.SIGTERM, before)


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


def _show(worker: subprocess.Popen[str], rank: int, out: Any) -> None:
    """Copies a worker's output, line by line."""
    assert worker.stdout is not None
    for line in worker.stdout:
        out.write(f"[{rank}] {line.rstrip()}\n")
        out.flush()


def _stop(running: list[subprocess.Popen[str]], grace: float) -> None:
    """Asks those that still run to end, and after a while ends them, with all processes that they have started."""
    for worker in running:
        _signal(worker, signal.SIGTERM)
    deadline = time.monotonic() + grace
    for worker in running:
        with contextlib.suppress(subprocess.TimeoutExpired):
            worker.wait(max(0.0, deadline - time.monotonic()))
        _signal(worker, signal.SIGKILL)
        worker.wait()


def _signal(worker: subprocess.Popen[str], number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):  # nobody is left
        os.killpg(worker.pid, number)


def _raise_on_termination() -> Any:
    """Lets SIGTERM end the launcher as Ctrl-C does. Returns the handler that was there; ``None`` in a thread."""
    if threading.current_thread() is not threading.main_thread():
        return None

    def end(*_: Any) -> None:
        raise SystemExit(128 + signal.SIGTERM)

    return signal.signal(signal.SIGTERM, end)


def _free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    try:
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
    parser = argparse.ArgumentParser(prog="python -m companion.launch", description=__doc__.split(". ")[0])
    parser.add_argument("--workers", type=int, required=True, help="how many processes")
    parser.add_argument("script", help="a Python file")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="its arguments")
    given = parser.parse_args(arguments)
    try:
        return launch(given.workers, given.script, given.arguments)
    except (ValueError, FileNotFoundError) as error:
        parser.error(str(error))
    except KeyboardInterrupt:
        return 128 + signal.SIGINT


if __name__ == "__main__":
    sys.exit(main())
