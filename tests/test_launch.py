"""Holds `companion.launch`: real processes, what they print, how they end, and that none is left."""

import contextlib
import io
import json
import os
import pathlib
import signal
import subprocess
import sys
import time
from typing import Any

import pytest

import companion.launch
from companion.launch import launch, main


@pytest.fixture
def script(tmp_path: pathlib.Path) -> Any:
    def write(text: str) -> pathlib.Path:
        path = tmp_path / "script.py"
        path.write_text("import json, os, signal, sys, time\n" + text)
        return path

    return write


def ran(workers: int, path: pathlib.Path, *arguments: str) -> tuple[int, list[str]]:
    out = io.StringIO()
    status = launch(workers, path, arguments, grace=1.0, out=out)
    return status, out.getvalue().splitlines()


def nobody_has(text: str, seconds: float = 5.0) -> bool:
    """Whether soon no process is left that has a text on its command line, but this one."""

    def left() -> list[str]:
        found = []
        for path in pathlib.Path("/proc").glob("[0-9]*/cmdline"):
            with contextlib.suppress(OSError):
                if text in path.read_text() and path.parent.name != str(os.getpid()):
                    found.append(path.parent.name)
        return found

    deadline = time.monotonic() + seconds
    while left() and time.monotonic() < deadline:
        time.sleep(0.05)
    return not left()


def test_each_worker_finds_its_place(script: Any) -> None:
    path = script("print(os.environ['TF_CONFIG'], sys.argv[1:], __name__)")
    status, lines = ran(3, path, "--epochs", "2")
    assert status == 0
    places = {}
    for line in lines:
        prefix, _, rest = line.partition(" ")
        place, end = json.JSONDecoder().raw_decode(rest)
        assert rest[end:] == " ['--epochs', '2'] __main__"
        places[prefix] = place
    assert places.keys() == {"[0]", "[1]", "[2]"}
    (cluster,) = {json.dumps(place["cluster"]) for place in places.values()}
    addresses = json.loads(cluster)["worker"]
    assert len(set(addresses)) == 3
    assert all(address.startswith("127.0.0.1:") for address in addresses)
    for prefix, place in places.items():
        assert place["task"] == {"type": "worker", "index": int(prefix[1])}


def test_output_comes_line_by_line_from_both_streams(script: Any) -> None:
    status, lines = ran(2, script("print('out')\nprint('err', file=sys.stderr)\nsys.stdout.write('no end')"))
    assert status == 0
    for rank in range(2):
        assert [line for line in lines if line.startswith(f"[{rank}]")] == [
            f"[{rank}] out",
            f"[{rank}] err",
            f"[{rank}] no end",
        ]


FAILS = """
rank = json.loads(os.environ["TF_CONFIG"])["task"]["index"]
open(sys.argv[1] + str(rank), "w").close()
while len([n for n in range(3) if os.path.exists(sys.argv[1] + str(n))]) < 3:
    time.sleep(0.02)
if rank == 1:
    {how}
{others}
time.sleep(100)
"""


@pytest.mark.parametrize(
    ("how", "status", "words"),
    [
        ("sys.exit(3)", 3, "ended with exit status 3"),
        ("raise ValueError('no')", 1, "ended with exit status 1"),
        ("os.kill(os.getpid(), signal.SIGKILL)", 137, "was killed by SIGKILL"),
        ("os.kill(os.getpid(), signal.SIGSEGV)", 139, "was killed by SIGSEGV"),
    ],
)
@pytest.mark.parametrize(
    "others",
    [
        "",
        "signal.signal(signal.SIGTERM, signal.SIG_IGN)",
        "os.kill(os.getpid(), signal.SIGSTOP)",
        "os.posix_spawn(sys.executable, [sys.executable, '-c', 'import time; time.sleep(60)', *sys.argv], {})",
    ],
    ids=["ordinary", "deaf", "stopped", "with a child"],
)
def test_one_fails_and_all_are_stopped(
    script: Any, tmp_path: pathlib.Path, how: str, status: int, words: str, others: str
) -> None:
    started = time.monotonic()
    path = script(FAILS.replace("{how}", how).replace("{others}", others))
    found, lines = ran(3, path, str(tmp_path / "process-"))
    assert found == status
    assert f"Worker 1 of 3 {words}: the others are stopped." in lines
    assert time.monotonic() - started < 30
    assert nobody_has(str(tmp_path))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_workers_do_not_outlive_the_launcher(script: Any, tmp_path: pathlib.Path, number: signal.Signals) -> None:
    path = script("open(sys.argv[1] + os.environ['TF_CONFIG'][-3], 'w').write('here')\ntime.sleep(100)")
    program = ["-m", "companion.launch"] if number == signal.SIGINT else [companion.launch.__file__]
    command = [sys.executable, *program, "--workers", "2", str(path), str(tmp_path / "process-")]
    launcher = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    files = [tmp_path / f"process-{rank}" for rank in range(2)]
    deadline = time.monotonic() + 120
    while not all(file.exists() and file.read_text() for file in files) and time.monotonic() < deadline:
        time.sleep(0.1)
    launcher.send_signal(number)
    assert launcher.wait(20) == (-9 if number == signal.SIGKILL else 128 + number)
    assert nobody_has(str(tmp_path))


def test_worker_that_is_done_early_is_no_failure(script: Any) -> None:
    path = script("rank = json.loads(os.environ['TF_CONFIG'])['task']['index']\ntime.sleep(0.5 * rank)\nprint('done')")
    assert ran(2, path) == (0, ["[0] done", "[1] done"])


@pytest.mark.parametrize("workers", [0, -1, 1.5, True, "2"])
def test_bad_number_of_workers(script: Any, workers: Any) -> None:
    with pytest.raises(ValueError, match=r"`workers` must be an integer of at least 1\. Received: workers="):
        launch(workers, script("print('never')"))


def test_missing_script() -> None:
    with pytest.raises(
        FileNotFoundError, match=r"`script` must be the path of a Python file\. Received: script='no.py'"
    ):
        launch(2, "no.py")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["script.py"], "--workers"),
        (["--workers", "two", "script.py"], "invalid int value"),
        (["--workers", "0", "{script}"], "`workers` must be an integer of at least 1"),
        (["--workers", "2", "no.py"], "`script` must be the path"),
    ],
)
def test_command_line_says_what_is_wrong(script: Any, capsys: Any, arguments: list[str], words: str) -> None:
    path = script("print('never')")
    with pytest.raises(SystemExit) as ended:
        main([argument.replace("{script}", str(path)) for argument in arguments])
    assert ended.value.code == 2
    assert words in capsys.readouterr().err


def test_main_runs_a_script(script: Any, capfd: Any) -> None:
    assert main(["--workers", "1", str(script("print(sys.argv[1:])")), "--workers", "x"]) == 0
    assert capfd.readouterr().out == "[0] ['--workers', 'x']\n"


def test_environment_is_handed_on(script: Any, monkeypatch: Any) -> None:
    monkeypatch.setenv("OF_THE_TEST", "yes")
    assert ran(1, script("print(os.environ['OF_THE_TEST'])")) == (0, ["[0] yes"])
    assert "TF_CONFIG" not in os.environ
