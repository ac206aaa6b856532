"""Holds how workers find their place and wait for each other: in time, in words, and without TensorFlow."""

import json
import os
import pathlib
import signal
import socket
import subprocess
import sys
import threading
import time
from typing import Any

import pytest

from companion.joining import place, wait_for_all

TWO = ["127.0.0.1:1", "127.0.0.1:2"]


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("", ([], 0)),
        ("{}", ([], 0)),
        ({"cluster": {"worker": TWO}, "task": {"type": "worker", "index": 1}}, (TWO, 1)),
        ({"cluster": {"worker": TWO}, "task": {"type": "worker", "index": "1"}}, (TWO, 1)),
        ({"cluster": {"worker": TWO[:1]}, "task": {"type": "worker", "index": 0}}, (TWO[:1], 0)),
        ({"cluster": {"worker": TWO, "chief": ["c:3"]}, "task": {"type": "worker", "index": 1}}, (["c:3", *TWO], 2)),
        ({"cluster": {"worker": TWO, "chief": ["c:3"]}, "task": {"type": "chief", "index": 0}}, (["c:3", *TWO], 0)),
    ],
)
def test_place(monkeypatch: Any, given: Any, expected: Any) -> None:
    monkeypatch.setenv("TF_CONFIG", given if isinstance(given, str) else json.dumps(given))
    assert place() == expected


TASK = {"type": "worker", "index": 0}


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ("{'cluster': 1}", "it is not JSON"),
        ("[1]", "it has no `cluster`"),
        ({"task": TASK}, "it has no `cluster`"),
        ({"cluster": {"worker": TWO}}, "`task` must say which of the cluster this process is"),
        ({"cluster": {"worker": TWO}, "task": {"type": "ps", "index": 0}}, "`task` must say which"),
        ({"cluster": {"worker": TWO}, "task": {"type": ["worker"], "index": 0}}, "`task` must say which"),
        ({"cluster": {"worker": TWO}, "task": {"type": "worker"}}, "must be an integer from 0 to 1"),
        ({"cluster": {"worker": TWO}, "task": {"type": "worker", "index": 2}}, "must be an integer from 0 to 1"),
        ({"cluster": {"worker": TWO}, "task": {"type": "worker", "index": -1}}, "must be an integer from 0 to 1"),
        ({"cluster": {"worker": TWO, "ps": ["a:1"]}, "task": TASK}, r"leave out \['ps'\]"),
        ({"cluster": {"worker": TWO, "evaluator": ["a:1"]}, "task": TASK}, r"leave out \['evaluator'\]"),
        ({"cluster": {"worker": ["here", "there"]}, "task": TASK}, "addresses, each with its port"),
        ({"cluster": {"worker": ["a:1", "b:65536"]}, "task": TASK}, "addresses, each with its port"),
        ({"cluster": {"worker": "a:1"}, "task": TASK}, "addresses, each with its port"),
        ({"cluster": {"worker": [TWO[0], TWO[0]]}, "task": TASK}, "an address of its own for each worker"),
        ({"cluster": {"worker": []}, "task": TASK}, "an address of its own for each worker"),
    ],
)
def test_a_wrong_place_is_refused_in_words(monkeypatch: Any, given: Any, words: str) -> None:
    monkeypatch.setenv("TF_CONFIG", given if isinstance(given, str) else json.dumps(given))
    with pytest.raises(ValueError, match=f"TF_CONFIG must be like .*{words}.*Received: "):
        place()


def addresses(count: int) -> list[str]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    found = [f"127.0.0.1:{each.getsockname()[1]}" for each in sockets]
    for each in sockets:
        each.close()
    return found


def waited(ranks: list[int], size: int, timeout: float, disturb: Any = None) -> dict[int, Any]:
    """What came of it for each worker, a thread here."""
    found: dict[int, Any] = {}
    where = addresses(size)

    def wait(rank: int) -> None:
        try:
            time.sleep(0.2 * (size - rank))  # the others come before worker 0, and after it
            wait_for_all(where, rank, timeout)
            found[rank] = ""
        except RuntimeError as error:
            found[rank] = str(error)

    threads = [threading.Thread(target=wait, args=(rank,)) for rank in ranks]
    for thread in threads:
        thread.start()
    if disturb:
        disturb(where)
    for thread in threads:
        thread.join(20)
    return found


def test_all_go_on_when_all_are_there() -> None:
    def knock(where: list[str]) -> None:
        """Somebody who does not belong to them."""
        host, _, port = where[0].rpartition(":")
        for words in (b"", b"GET / HTTP/1.1\r\n\r\n", b"companion 7 of 3\n", b"companion 1 of 2\n", b"\xff"):
            deadline = time.monotonic() + 5
            while time.monotonic() < deadline:
                try:
                    with socket.create_connection((host, int(port)), timeout=1) as door:
                        door.sendall(words)
                    break
                except OSError:
                    time.sleep(0.02)

    assert waited([0, 1, 2], 3, 10) == {0: "", 1: "", 2: ""}
    assert waited([0, 1, 2], 3, 10, knock) == {0: "", 1: "", 2: ""}


def test_who_does_not_come_is_named() -> None:
    found = waited([0, 2], 3, 1.5)
    assert "Worker 0 of 3 has waited 1.5 s for the others: workers [1] did not come." in found[0]
    assert "Worker 2 of 3 has waited 1.5 s for the others: worker 0 is there, but another one is not." in found[2]
    alone = waited([1], 2, 0.5)[1]
    assert "for the others: worker 0 does not answer at 127.0.0.1:" in alone
    assert "if this process is to be alone, unset TF_CONFIG." in alone


def test_a_taken_port_is_said() -> None:
    with socket.create_server(("", 0)) as taken:
        where = [f"127.0.0.1:{taken.getsockname()[1]}", "127.0.0.1:1"]
        with pytest.raises(
            RuntimeError, match=r"Worker 0 cannot open its port.*another run or another program may have"
        ):
            wait_for_all(where, 0, 5)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_wait(number: signal.Signals) -> None:
    program = "from companion import joining; import sys; print('waits', flush=True)\n"
    program += "joining.wait_for_all(sys.argv[1:], 1, 100)"
    code = (
        f"import sys, types; sys.modules['companion'] = p = types.ModuleType('companion'); p.__path__ = [{PACKAGE!r}]\n"
    )
    command = [sys.executable, "-c", code + program, *addresses(2)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as worker:
        assert worker.stdout is not None
        assert worker.stdout.readline() == b"waits\n"
        time.sleep(0.3)
        worker.send_signal(number)
        assert worker.wait(10) != 0


PACKAGE = os.fspath(pathlib.Path(__file__).parents[1] / "companion")
