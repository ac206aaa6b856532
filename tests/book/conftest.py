"""Builds the book once for the tests of its pages, and serves it on this machine."""

import functools
import http.server
import pathlib
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from tests.kit import ROOT
from tests.kit.shared import folder, once_a_run


@once_a_run
def built() -> dict[str, Any]:
    """What a fresh build of the whole book said, every warning an error, and the folder of its pages."""
    source = folder() / "book"
    keep_out = shutil.ignore_patterns(".*", "_build", "build", "__pycache__", "*.egg-info", "node_modules")
    shutil.copytree(ROOT, source, ignore=keep_out)
    command = [sys.executable, "-m", "tools.book", "-W", "-n", "--keep-going"]
    outcome = subprocess.run(command, capture_output=True, text=True, cwd=source)
    said = re.sub(r"\x1b\[[0-9;]*m", "", outcome.stdout + outcome.stderr)
    return {"status": outcome.returncode, "said": said, "site": source / "_build" / "html"}


def warnings(said: str) -> str:
    """The lines of a build that matter, or its end."""
    return "\n".join(line for line in said.splitlines() if re.search("WARNING|ERROR", line)) or said[-3000:]


@pytest.fixture(scope="session")
def build() -> dict[str, Any]:
    return built()


@pytest.fixture(scope="session")
def site(build: Any) -> pathlib.Path:
    """The folder of the built pages."""
    assert build["status"] == 0, warnings(build["said"])
    return build["site"]


@pytest.fixture(scope="session")
def address(site: pathlib.Path) -> Iterator[str]:
    """The address at which the built book is served."""

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *arguments: Any) -> None:
            pass

    handler = functools.partial(Quiet, directory=str(site))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.fixture(scope="session")
def browser() -> Iterator[Any]:
    """A headless Chromium."""
    from playwright.sync_api import sync_playwright

    from tools.browser import advice, find

    found = find()
    assert found, advice()
    with sync_playwright() as playwright:
        arguments = ["--no-sandbox", "--disable-background-networking", "--disable-component-update", "--disable-sync"]
        arguments.append("--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1")
        chromium = playwright.chromium.launch(executable_path=found, args=arguments)
        yield chromium
        chromium.close()
