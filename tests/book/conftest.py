"""Builds the book once for the tests of its pages, and serves it on this machine."""

import functools
import http.server
import os
import pathlib
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from tests.kit import ROOT


@pytest.fixture(scope="session")
def build(tmp_path_factory: pytest.TempPathFactory) -> subprocess.CompletedProcess[str]:
    """The outcome of a fresh build of the whole book, every warning an error."""
    source = tmp_path_factory.mktemp("book") / "source"
    keep_out = shutil.ignore_patterns(".*", "_build", "build", "__pycache__", "*.egg-info")
    shutil.copytree(ROOT, source, ignore=keep_out)
    program = pathlib.Path(sys.executable).parent / "jupyter-book"
    command = [str(program), "build", str(source), "-W", "-n", "--keep-going"]
    outcome = subprocess.run(command, capture_output=True, text=True, cwd=source)
    outcome.site = source / "_build" / "html"  # type: ignore[attr-defined]
    return outcome


@pytest.fixture(scope="session")
def site(build: Any) -> pathlib.Path:
    """The folder of the built pages."""
    assert build.returncode == 0, build.stdout[-3000:] + build.stderr[-3000:]
    return build.site


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
    """A headless Chromium; where there is none a loud skip, and a failure if ``CI=true``."""
    from playwright.sync_api import sync_playwright

    found = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
    if found is None:
        reason = "No Chromium: the pages are NOT checked. Install it (Debian: apt-get install chromium)."
        (pytest.fail if os.environ.get("CI") == "true" else pytest.skip)(reason)
    with sync_playwright() as playwright:
        arguments = ["--no-sandbox", "--disable-background-networking", "--disable-component-update", "--disable-sync"]
        chromium = playwright.chromium.launch(executable_path=found, args=arguments)
        yield chromium
        chromium.close()
