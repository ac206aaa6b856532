"""Holds `companion.launch`: real processes, what they print, how they end, and that none is left."""

import contextlib
import io
import json
import os
import pathlib
import resource
import signal
import subprocess
import sys
import time
from typing import Any

import pytest

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


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGKILL])
def test_workers_do_not_outlive_the_launcher(script: Any, tmp_path: pathlib.Path, number: signal.Signals) -> None:
    path = script("open(sys.argv[1] + os.environ['TF_CONFIG'][-3], 'w').write('here')\ntime.sleep(100)")
    command = [sys.executable, "-m", "companion.launch", "--workers", "2", str(path), str(tmp_path / "process-")]
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
        (["--workers", "2"], "give a script, or -m and the name of a module"),
        (["--workers", "2", "-m"], "expected one argument"),
        (["--work", "2", "{script}"], "--work"),
    ],
)
def test_command_line_says_what_is_wrong(script: Any, capsys: Any, arguments: list[str], words: str) -> None:
    path = script("print('never')")
    with pytest.raises(SystemExit) as ended:
        main([argument.replace("{script}", str(path)) for argument in arguments])
    assert ended.value.code == 2
    assert words in capsys.readouterr().err


def test_more_workers_than_files_can_be_open(script: Any, capsys: Any) -> None:
    most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")) + 20, most[1]))
    try:
        with pytest.raises(SystemExit) as ended:
            main(["--workers", "100", str(script("print('never')"))])
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, most)
    words = capsys.readouterr().err
    assert (ended.value.code, "`workers` must be no more than" in words, "shown" in words) == (1, True, False)


def test_main_runs_a_script(script: Any, capfd: Any) -> None:
    assert main(["--workers", "1", str(script("print(sys.argv[1:])")), "--workers", "x"]) == 0
    assert capfd.readouterr().out == "[0] ['--workers', 'x']\n"


def test_environment_is_handed_on(script: Any, monkeypatch: Any) -> None:
    monkeypatch.setenv("OF_THE_TEST", "yes")
    assert ran(1, script("print(os.environ['OF_THE_TEST'])")) == (0, ["[0] yes"])
    assert "TF_CONFIG" not in os.environ


@pytest.mark.parametrize("given", [["--", "a"], ["a", "--", "b", "--"], ["-m", "x"], ["--workers=3", "-h"], [""]])
@pytest.mark.parametrize("how", ["script", "module", "mmodule", "dashes"])
def test_arguments_are_those_of_the_script(
    script: Any, capfd: Any, monkeypatch: Any, given: list[str], how: str
) -> None:
    path = script("print(sys.argv[1:], __name__)")
    monkeypatch.chdir(path.parent)
    what = {"script": [str(path)], "module": ["-m", "script"], "mmodule": ["-mscript"], "dashes": ["--", str(path)]}[
        how
    ]
    assert main(["--workers=1", *what, *given]) == 0
    assert capfd.readouterr().out == f"[0] {given} __main__\n"


def test_arguments_of_an_iterator_arrive(script: Any) -> None:
    out = io.StringIO()
    assert launch(1, script("print(sys.argv[1:])"), map(str, [1, 2]), out=out) == 0  # type: ignore[arg-type]
    assert out.getvalue() == "[0] ['1', '2']\n"


@pytest.mark.parametrize("arguments", ["abc", b"abc", [1], [None], ["a", b"b"], 5])
def test_arguments_are_a_list_of_strings(script: Any, arguments: Any) -> None:
    with pytest.raises(ValueError, match=r"`arguments` must be a list of strings\. Received: arguments="):
        launch(1, script("print('never')"), arguments)


def test_the_launcher_does_not_start_tensorflow(script: Any) -> None:
    command = [
        sys.executable,
        "-X",
        "importtime",
        "-m",
        "companion.launch",
        "--workers",
        "1",
        str(script("print('here')")),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.stdout == "[0] here\n"
    assert "companion.arguments" in done.stderr
    assert "tensorflow" not in done.stderr
    assert "keras." not in done.stderr


# A run ends, whatever closes, dies or floods

WORKERS = {
    "lines": "for i in range(30_000): print('line', i, chr(0x2501))",
    "no line ends": "for _ in range(3_000): sys.stdout.write('x' * 1_000)",
    "dies": "print('x' * 200_000); sys.exit(7)",
    "closes": "print('x'); os.close(1); os.close(2); time.sleep(0.2)",
    "leaves a child": "print('x', flush=True); os.fork() or (os.setsid(), time.sleep(20))",
    "is not text": "sys.stdout.buffer.write(bytes(range(256)) * 500)",
}


class Stream(io.StringIO):
    """Breaks after some lines, in one of several ways."""

    def __init__(self, error: Any, lines: int) -> None:
        super().__init__()
        self.error, self.left = error, lines

    def write(self, text: str) -> int:
        self.left -= 1
        if self.left < 0:
            raise self.error
        return super().write(text)


@pytest.mark.parametrize("stream", ["whole", "ascii", "closed", "reader gone", "disk full"])
@pytest.mark.parametrize("does", WORKERS)
def test_a_run_ends(script: Any, does: str, stream: str) -> None:
    started = time.monotonic()
    errors = {"reader gone": BrokenPipeError(), "disk full": OSError(28, "full"), "closed": ValueError("closed file")}
    out: Any = Stream(errors[stream], 0 if stream == "closed" else 2) if stream in errors else io.StringIO()
    if stream == "ascii":
        out = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    try:
        found: Any = launch(2, script(WORKERS[does]), out=out, grace=1.0)
    except (OSError, ValueError) as error:
        found = error
    assert time.monotonic() - started < 60
    few = does in ("closes", "leaves a child", "is not text", "dies")  # they may end before anything breaks
    if stream in errors:
        assert found is errors[stream] or (few and stream != "closed")
    else:
        assert found == (7 if does == "dies" else 0)
    if does == "lines" and stream == "ascii":
        text = out.buffer.getvalue().decode()
        assert text.count("\n") == 60_000
        assert "line 29999 \\u2501" in text
    if does == "no line ends" and stream == "whole":
        assert out.getvalue().count("x") == 6_000_000


def test_head_ends_it_as_any_program(script: Any, tmp_path: pathlib.Path) -> None:
    path = script("while True: print('line')")
    command = [sys.executable, "-m", "companion.launch", "--workers", "2", str(path), str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as launcher:
        assert launcher.stdout is not None
        assert launcher.stderr is not None
        launcher.stdout.readline()
        launcher.stdout.close()
        assert launcher.wait(60) == -signal.SIGPIPE
        assert launcher.stderr.read() == b""
    assert nobody_has(str(tmp_path))


@pytest.mark.parametrize("closing", [">&-", "> /dev/full"])
def test_no_place_for_output(script: Any, closing: str) -> None:
    command = f"{sys.executable} -m companion.launch --workers 1 {script('print(1)')} {closing}"
    done = subprocess.run(command, shell=True, capture_output=True, text=True, timeout=60)
    assert (done.returncode, "cannot be shown" in done.stderr) == ((0, False) if closing == ">&-" else (1, True))
    assert "Traceback" not in done.stderr


def test_a_reader_that_sleeps_does_not_hold_it(script: Any, tmp_path: pathlib.Path) -> None:
    """Nobody reads, so everything waits; and SIGTERM ends it."""
    path = script("while True: print('line')")
    command = [sys.executable, "-m", "companion.launch", "--workers", "1", str(path), str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as launcher:
        assert launcher.stdout is not None
        launcher.stdout.readline()
        time.sleep(1)
        launcher.terminate()
        assert launcher.wait(60) == 128 + signal.SIGTERM
    assert nobody_has(str(tmp_path))


def test_a_line_is_shown_as_it_is(script: Any) -> None:
    assert ran(1, script("print('a | ', end=' \\n  \\n'); print('\\tend')")) == (
        0,
        ["[0] a |  ", "[0]   ", "[0] \tend"],
    )
