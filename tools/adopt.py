"""Sets the repository's address everywhere it stands: configuration, install cells, badges, citation, package.

Usage: python -m tools.adopt owner/name
"""

import pathlib
import re
import sys
import tomllib

ROOT = pathlib.Path(__file__).parent.parent
FILES = (
    "_config.yml",
    "pyproject.toml",
    "CITATION.cff",
    "README.md",
    "CONTRIBUTING.md",
    "book/*.md",
    "notebooks/*.ipynb",
)
# What GitHub accepts as an account: so the placeholder, which has an underscore, can never be anybody's.
_OWNER = r"[A-Za-z0-9](?:[A-Za-z0-9]|-(?=[A-Za-z0-9])){0,38}"


def address(root: pathlib.Path = ROOT) -> str:
    """The present address, ``owner/name``, from pyproject.toml."""
    url: str = tomllib.loads((root / "pyproject.toml").read_text())["project"]["urls"]["Repository"]
    return url.removeprefix("https://github.com/")


def adopt(repository: str, root: pathlib.Path = ROOT) -> list[str]:
    """Replaces the address in every file that holds it.

    Args:
        repository: ``owner/name`` on GitHub.
        root: the checkout to change.

    Returns:
        The files that were changed.

    Raises:
        ValueError: ``repository`` is not of the form ``owner/name``.
    """
    if not re.fullmatch(rf"{_OWNER}/[A-Za-z0-9._-]+", repository) or repository.endswith(".git"):
        raise ValueError(f"`REPO` must be owner/name as GitHub spells them. Received: REPO={repository!r}")
    old, changed = address(root), []
    for path in (path for pattern in FILES for path in sorted(root.glob(pattern))):
        text = path.read_text()
        # \b does not separate a name from its extension: name must not run on, so that owner/name-two stays.
        replaced = re.sub(rf"{re.escape(old)}(?![A-Za-z0-9_-])", repository, text)
        if replaced != text:
            path.write_text(replaced)
            changed.append(path.relative_to(root).as_posix())
    return changed


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("Usage: make adopt REPO=owner/name")
    try:
        print("\n".join(adopt(sys.argv[1])))
    except ValueError as error:
        sys.exit(str(error))
