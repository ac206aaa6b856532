"""In which order tests run and which: the longest files first; with ``--core`` some quick cases of each file."""

import json
import os
import pathlib
import sys
from typing import Any

import pytest

from tools import warm

RECORD = pathlib.Path(__file__).parent.parent / "tests" / "durations.json"
QUICK = 1.0
"""Seconds of processor time above which a test is not of the quick core."""
A_FILE = 10
"""As many functions of a file are of the quick core, spread evenly over it."""


def options(parser: pytest.Parser) -> None:
    """Declares what may be asked for."""
    add = parser.addoption
    add("--slow", action="store_true", help="run the whole matrices too, and a thousand random examples")
    add("--core", action="store_true", help="quick cases of each file, no process and no browser")
    add("--in-full", action="append", default=[], metavar="FILE", help="with --core: every case of this file")
    add("--record-durations", action="store_true", help="write tests/durations.json: processor seconds")


def choose(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leaves out what is not asked for, and puts the files that take longest first."""
    record = json.loads(RECORD.read_text()) if RECORD.exists() else {"files": {}, "functions": {}}
    chosen = [item for item in items if config.getoption("slow") or not item.get_closest_marker("slow")]
    if config.getoption("core"):
        first: dict[str, pytest.Item] = {}
        for item in chosen:
            first.setdefault(_function(item), item)
        quick = _some([item for name, item in first.items() if record["functions"].get(name, 0) <= QUICK])
        full = set(config.getoption("in_full"))
        chosen = [i for i in chosen if _file(i) in full or i in quick]
    kept = set(chosen)
    if len(kept) < len(items):
        config.hook.pytest_deselected(items=[item for item in items if item not in kept])
    items[:] = sorted(chosen, key=lambda item: -record["files"].get(_file(item), 0))


def start_no_process() -> None:
    """From here on, a test that would start Python or a browser is skipped instead."""

    def watch(event: str, arguments: Any) -> None:
        if event == "subprocess.Popen" and any(word in str(arguments[0]) for word in ("python", "chrom", "node")):
            pytest.skip("starts a process: not of the quick core")

    sys.addaudithook(watch)


class Recorder:
    """Adds up the processor seconds of tests, children included, and writes them at the end."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self, item: pytest.Item) -> Any:
        """Notes on each report what has been used since the one before."""
        report = yield
        folder, me = pathlib.Path(os.environ["COMPANION_TESTS_SHARE"]), os.environ.get("PYTEST_XDIST_WORKER", "")
        now = sum(os.times()[:4]) + warm.seconds(folder, me)
        report.processor_seconds, self.last = now - getattr(self, "last", now), now
        return report

    def pytest_runtest_logreport(self, report: Any) -> None:
        """Adds a report up, wherever it comes from."""
        self.seconds[report.nodeid] = self.seconds.get(report.nodeid, 0) + report.processor_seconds

    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        """Writes the record, in the process that heard of all tests."""
        if hasattr(session.config, "workerinput"):
            return
        files: dict[str, float] = {}
        functions: dict[str, float] = {}
        for name, seconds in self.seconds.items():
            file, function = name.split("::")[0], name.split("[")[0]
            files[file] = files.get(file, 0) + seconds
            functions[function] = max(functions.get(function, 0), seconds)
        record = {
            "files": {name: round(seconds) for name, seconds in sorted(files.items()) if seconds >= 1},
            "functions": {n: round(s, 1) for n, s in sorted(functions.items()) if s > QUICK},
        }
        RECORD.write_text(json.dumps(record, indent=1) + "\n")


def _some(items: list[pytest.Item]) -> set[pytest.Item]:
    by_file: dict[str, list[pytest.Item]] = {}
    for item in items:
        by_file.setdefault(_file(item), []).append(item)
    return {item for each in by_file.values() for item in each[:: -(-len(each) // A_FILE)]}


def _file(item: pytest.Item) -> str:
    return item.nodeid.split("::")[0]


def _function(item: pytest.Item) -> str:
    return item.nodeid.split("[")[0]
