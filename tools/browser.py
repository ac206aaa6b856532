"""Finds the browser in which the tests read the pages, or gets one: Playwright's Chromium, or Debian's for root.

Usage: python -m tools.browser   (prints its path, or ends with the command that installs one on this system)
"""

import os
import pathlib
import shutil
import subprocess
import sys

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome", "microsoft-edge")
PLACES = (
    "/Applications/Google Chrome.app/Contents/MacOS/Google Chrome",
    "/Applications/Chromium.app/Contents/MacOS/Chromium",
    r"C:\Program Files\Google\Chrome\Application\chrome.exe",
)
DEBIAN = ["apt-get", "install", "-y", "-qq", "--no-install-recommends", "chromium", "fonts-dejavu-core"]


def find() -> str | None:
    """The path of a browser of Chromium's family on this machine, Playwright's own included."""
    known = [shutil.which(name) for name in NAMES] + [place for place in PLACES if pathlib.Path(place).exists()]
    return next(filter(None, known), None) or _of_playwright()


def advice() -> str:
    """What to type where there is no browser and none could be fetched."""
    command = f"{sys.executable} -m playwright install --with-deps chromium"
    if shutil.which("apt-get"):
        command = f"sudo {' '.join(DEBIAN)}   # or: {command}"
    return f"The tests read the pages in Chromium or Chrome, and there is none here. Install one: {command}"


def fetch() -> None:
    """Installs a browser: the system's where that needs no question, else Playwright's, which must start as well."""
    is_root = hasattr(os, "geteuid") and os.geteuid() == 0
    if is_root and shutil.which("apt-get"):
        environment = os.environ | {"DEBIAN_FRONTEND": "noninteractive"}
        for command in (["apt-get", "update", "-qq"], DEBIAN):
            subprocess.run(command, env=environment, stdout=subprocess.DEVNULL, check=False)
    if find() is None:
        subprocess.run([sys.executable, "-m", "playwright", "install", "chromium"], check=False)


def _of_playwright() -> str | None:
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        return None
    with sync_playwright() as playwright:
        path = playwright.chromium.executable_path
        return path if pathlib.Path(path).exists() else None


def main() -> int:
    """Returns 0 if there is a browser now."""
    if find() is None:
        print("Getting a browser …", flush=True)
        fetch()
    found = find()
    print(found or advice(), file=sys.stdout if found else sys.stderr)
    return 0 if found else 1


if __name__ == "__main__":
    sys.exit(main())
