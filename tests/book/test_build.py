"""The book builds without a warning, from the sources as they stand."""

from typing import Any

from tests.kit import ROOT


def test_build_has_no_warning(build: Any) -> None:
    assert build.returncode == 0, build.stdout[-3000:] + build.stderr[-3000:]
    assert "WARNING: " not in build.stdout.replace("WARNING: All log messages before absl", "")


def test_every_page_of_the_contents_is_built(site: Any) -> None:
    import yaml

    contents = yaml.safe_load((ROOT / "_toc.yml").read_text())
    pages = [contents["root"], *(page["file"] for part in contents["parts"] for page in part["chapters"])]
    assert [page for page in pages if not (site / f"{page}.html").exists()] == []


def test_root_leads_to_the_first_page(site: Any) -> None:
    assert "book/index.html" in (site / "index.html").read_text()


def test_claims_page_links_each_claim_to_its_test(site: Any) -> None:
    page = (site / "book" / "claims.html").read_text()
    assert "tests/book/test_chapter_01.py#L" in page
    assert "notebooks/01_what_is_an_optimizer.html" in page
