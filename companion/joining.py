"""How a worker finds its place among the others, and waits for them. Chapter 15 of the book teaches what comes then.

TensorFlow's own way to join waits an hour for a worker that does not come, and hears no signal while it does. So the
workers meet here first, on the ports that TensorFlow will use: all knock at worker 0, who lets all in at once.
"""

import contextlib
import faulthandler
import json
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator

_LIKE = '{"cluster": {"worker": ["host:port", "host:port"]}, "task": {"type": "worker", "index": 0}}'


def place() -> tuple[list[str], int]:
    """The addresses of all workers and the number of this one, as the environment variable ``TF_CONFIG`` has them.

    Returns:
        No addresses and 0 where it is not set, or empty.

    Raises:
        ValueError: it is not what workers need.
    """
    text = os.environ.get("TF_CONFIG", "").strip()

    def refuse(what: str) -> ValueError:
        return ValueError(f"The environment variable TF_CONFIG must be like {_LIKE}: {what}. Received: {text}")

    try:
        given = json.loads(text or "{}")
    except ValueError as error:
        raise refuse(f"it is not JSON ({error})") from None
    if given == {}:
        return [], 0
    if not isinstance(given, dict) or not isinstance(given.get("cluster"), dict) or not given["cluster"]:
        raise refuse("it has no `cluster`; unset it where a worker is alone")
    cluster, task = given["cluster"], given.get("task")
    if others := sorted(set(cluster) - {"chief", "worker"}):
        raise refuse(f"leave out {others}; all that train here are workers, or one `chief`, who counts as the first")
    for tasks in cluster.values():
        if not isinstance(tasks, list) or not all(
            isinstance(each, str) and (port := each.rpartition(":")[2]).isdecimal() and int(port) < 2**16
            for each in tasks
        ):
            raise refuse("`cluster` must list addresses, each with its port")
    addresses = [*cluster.get("chief", []), *cluster.get("worker", [])]
    if len(set(addresses)) < len(addresses) or len(cluster.get("chief", [])) > 1 or not addresses:
        raise refuse("`cluster` must have an address of its own for each worker, and one chief at most")
    if not isinstance(task, dict) or task.get("type") not in list(cluster):
        raise refuse(
            f"`task` must say which of the cluster this process is: a `type` of {sorted(cluster)} and an `index`"
        )
    index, count = str(task.get("index")), len(cluster[task["type"]])
    if not index.isdecimal() or int(index) >= count:
        raise refuse(f"`index` of the `task` must be an integer from 0 to {count - 1}")
    return addresses, int(index) + (len(addresses) - count if task["type"] == "worker" else 0)


def wait_for_all(addresses: list[str], rank: int, timeout: float) -> None:
    """Returns at about the same time on all workers, when all are there.

    Args:
        addresses: those of all workers.
        rank: the number of this one.
        timeout: seconds.

    Raises:
        RuntimeError: they did not come in time, or this worker's port cannot be opened.
    """
    deadline = time.monotonic() + timeout
    try:
        server = socket.create_server(("", int(addresses[rank].rpartition(":")[2])), backlog=len(addresses))
    except OSError as error:
        raise RuntimeError(
            f"Worker {rank} cannot open its port, {addresses[rank]} ({error}): another run or another program may have "
            "taken it. End that, or give the worker another port in the TF_CONFIG of all."
        ) from None
    with server:
        missing = _let_in(server, len(addresses), deadline) if rank == 0 else _knock(addresses, rank, deadline)
    if missing:
        raise RuntimeError(
            f"Worker {rank} of {len(addresses)} has waited {timeout:g} s for the others: {missing}. Start all workers "
            f"within that time, or give `connect` a longer `timeout`; or, if this process is to be alone, unset "
            f"TF_CONFIG. Addresses: {addresses}"
        )


def _name(rank: int, size: int) -> str:
    return f"companion {rank} of {size}\n"


def _let_in(server: socket.socket, size: int, deadline: float) -> str:
    """Worker 0 waits until all others have knocked, and tells them to go on. Returns who is missing."""
    here: dict[int, socket.socket] = {}
    expected = {_name(rank, size): rank for rank in range(1, size)}
    with contextlib.ExitStack() as stack:
        while len(here) < size - 1:
            server.settimeout(max(0.001, deadline - time.monotonic()))
            try:
                caller = stack.enter_context(server.accept()[0])
                caller.settimeout(1.0)
                name = caller.recv(64).decode()
                if name in expected:  # others may knock at an open port, too
                    here[expected[name]] = caller
            except (OSError, ValueError):
                if time.monotonic() > deadline:
                    return f"workers {sorted(set(range(1, size)) - set(here))} did not come"
        for caller in here.values():
            with contextlib.suppress(OSError):
                caller.sendall(b"go")
    return ""


def _knock(addresses: list[str], rank: int, deadline: float) -> str:
    """Another worker knocks at worker 0 until it may go on. Returns what was wrong at last."""
    host, _, port = addresses[0].rpartition(":")
    problem = ""
    while (left := deadline - time.monotonic()) > 0:
        try:
            with socket.create_connection((host.strip("[]"), int(port)), timeout=left) as door:
                problem = "worker 0 is there, but another one is not"
                door.settimeout(max(0.001, deadline - time.monotonic()))
                door.sendall(_name(rank, len(addresses)).encode())
                if door.recv(2) == b"go":
                    return ""
        except OSError as error:
            problem = problem or f"worker 0 does not answer at {addresses[0]} ({error})"
        time.sleep(0.1)
    return problem


@contextlib.contextmanager
def bounded(timeout: float) -> Iterator[None]:
    """While TensorFlow joins, Python does not run: lets signals end the process, and time, with a traceback.

    Args:
        timeout: seconds.
    """
    ends = (signal.SIGINT, signal.SIGTERM) if threading.current_thread() is threading.main_thread() else ()
    before = {each: signal.signal(each, signal.SIG_DFL) for each in ends}
    if sys.__stderr__ is not None:
        faulthandler.dump_traceback_later(timeout, exit=True, file=sys.__stderr__)
    try:
        yield
    finally:
        faulthandler.cancel_dump_traceback_later()
        for (
            each,
            handler,
        ) in before.items():  # TensorFlow has put in a handler of its own for SIGTERM, which does not end
            signal.signal(each, signal.SIG_DFL if handler is None else handler)
