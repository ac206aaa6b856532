"""The book builds without a warning, from the sources as they stand, with and without a repository to link to."""

import pathlib
import re
import shutil
import subprocess
import sys
import types
from typing import Any

import pytest
import yaml

import tools.book
from tests.kit import ROOT
from tests.kit.processes import warm
from tests.kit.shared import folder, once_a_run
from tools.adopt import address, adopt

PLACEHOLDER = "OWNER_NAME"
THEIRS = "some-one/their.book"
LINK = re.compile(r"""(?:href|src)=["']([^"']*)["']""")


def test_build_has_no_warning(build: Any) -> None:
    found = [line for line in build["said"].splitlines() if "WARNING" in line]
    assert (build["status"], found) == (0, []), build["said"][-2000:]


def test_a_changed_style_reaches_a_book_whose_pages_have_not_changed(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for place in (tools.book.STATIC, tools.book.COPIES):
        (tmp_path / place / "explorers").mkdir(parents=True)
        (tmp_path / place / "explorers" / "one.js").write_text(f"// {place}")
    calls: list[list[str]] = []
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(tools.book, "prepare_environment", lambda: None)
    monkeypatch.setitem(sys.modules, "jupyter_book.cli.main", types.SimpleNamespace(main=calls.append))
    tools.book.main(["-q"])
    assert calls == [["build", ".", "-q"]]
    assert (tools.book.COPIES / "explorers" / "one.js").read_text() == f"// {tools.book.STATIC}"


def test_build_says_nothing_of_tensorflow(build: Any) -> None:
    assert not re.search("tensorflow|cuda|absl|oneDNN", build["said"], re.IGNORECASE), build["said"][:3000]


def test_every_page_of_the_contents_is_built(site: Any) -> None:
    contents = yaml.safe_load((ROOT / "_toc.yml").read_text())
    pages = [contents["root"], *(page["file"] for part in contents["parts"] for page in part["chapters"])]
    assert [page for page in pages if not (site / f"{page}.html").exists()] == []


def test_a_page_has_an_icon_and_its_number_beside_its_title(site: Any) -> None:
    page = (site / "notebooks" / "11_momentum_is_an_ode.html").read_text()
    assert 'rel="icon" href="../_static/logo.svg"' in page
    assert re.search(r'toctree-l1"><a class="reference internal" href="12_[^"]*">12\. Do integrators', page)
    assert "<title>11. Momentum is an ODE" in page


def test_root_leads_to_the_first_page(site: Any) -> None:
    assert "book/index.html" in (site / "index.html").read_text()


def test_claims_page_names_each_claim_and_its_test(site: Any) -> None:
    page = (site / "book" / "claims.html").read_text()
    assert "test_six_orders_give_the_numbers_of_keras" in page
    assert "notebooks/01_what_is_an_optimizer.html" in page


def links(site: pathlib.Path) -> dict[str, list[str]]:
    """The addresses on each page."""
    return {path.name: LINK.findall(path.read_text()) for path in site.rglob("*.html")}


@pytest.mark.skipif(PLACEHOLDER not in address(), reason="the book has a repository")
def test_no_link_is_dead_before_the_book_has_a_repository(site: Any) -> None:
    for page, targets in links(site).items():
        assert [target for target in targets if PLACEHOLDER in target] == [], page


@pytest.mark.skipif(PLACEHOLDER not in address(), reason="the book has a repository")
@pytest.mark.parametrize("page", ["index", "api"])
def test_before_that_a_page_has_a_command_that_works(site: Any, page: str) -> None:
    text = re.sub(r"<[^>]*>", "", (site / "book" / f"{page}.html").read_text())
    assert text.count("pip install .\n") == 1
    assert "Type this in the top folder of your copy of the repository" in text
    assert PLACEHOLDER not in text


@once_a_run
def adopted() -> pathlib.Path:
    """A chapter and the claims, built by the book's own configuration in a copy that has been adopted."""
    source = folder() / "adopted"
    keep_out = shutil.ignore_patterns(".*", "_build", "build", "__pycache__", "*.egg-info", "node_modules")
    shutil.copytree(ROOT, source, ignore=keep_out)
    adopt(THEIRS, source)
    contents = {
        "format": "jb-book",
        "root": "book/index",
        "parts": [{"chapters": [{"file": "notebooks/01_what_is_an_optimizer"}, {"file": "book/claims"}]}],
    }
    (source / "_toc.yml").write_text(yaml.safe_dump(contents))
    command = [warm(), "-m", "tools.book", "-q"]
    done = subprocess.run(command, cwd=source, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return source / "_build" / "html"


def test_an_adopted_book_offers_colab_edit_issue_and_source() -> None:
    chapter, path = links(adopted())["01_what_is_an_optimizer.html"], "notebooks/01_what_is_an_optimizer.ipynb"
    assert f"https://colab.research.google.com/github/{THEIRS}/blob/main/{path}" in chapter
    assert f"https://github.com/{THEIRS}/edit/main/{path}" in chapter
    assert any(target.startswith(f"https://github.com/{THEIRS}/issues/new") for target in chapter)
    assert any(target.endswith(f"_sources/{path}") for target in chapter)


def test_an_adopted_page_has_an_address_and_a_card(site: pathlib.Path) -> None:
    owner, name = THEIRS.split("/")
    base, path = f"https://{owner.lower()}.github.io/{name}/", "notebooks/01_what_is_an_optimizer.html"
    page = (adopted() / path).read_text()
    assert f'<link rel="canonical" href="{base}{path}"' in page
    for told in (f'og:url" content="{base}{path}', f'og:image" content="{base}_static/readme.png'):
        assert f'<meta property="{told}' in page
    assert '<meta name="twitter:card"' in page
    assert (site / "_static" / "readme.png").exists()
    before = (site / path).read_text()
    assert not re.search("canonical|og:url", before), "an address that nobody has"


def test_an_adopted_book_links_each_claim_to_its_test() -> None:
    found = links(adopted())
    test = f"https://github.com/{THEIRS}/blob/main/tests/book/test_chapter_01.py#L"
    assert any(target.startswith(test) for target in found["claims.html"])
    assert not [target for targets in found.values() for target in targets if PLACEHOLDER in target]
