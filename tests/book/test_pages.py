"""The pages that are built from the tests: every claim stands in its chapter, every chapter has claims."""

import fnmatch
import html
import json
import math
import pathlib
import re

import pytest
from book_pages import Claim, claims_page, collect_claims, performance_page
from ratio_charts import ratio

from tests.book.reading import CHAPTERS, markdown, plain_text
from tests.kit import ROOT

CLAIMS = collect_claims()


def missing(claim: Claim, text: str) -> bool:
    """Whether a chapter's text lacks the sentence of a claim."""
    return plain_text(claim.sentence) not in plain_text(text)


@pytest.mark.parametrize("claim", CLAIMS, ids=lambda claim: f"{claim.chapter}-{claim.test}")
def test_claim_stands_in_its_chapter(claim: Claim) -> None:
    assert not missing(claim, markdown(claim.chapter)), claim.sentence


def test_a_claim_that_drifted_is_found() -> None:
    claim = CLAIMS[0]
    assert missing(claim, markdown(claim.chapter).replace(claim.sentence.split()[-1], "nothing"))


@pytest.mark.parametrize("chapter", CHAPTERS)
def test_chapter_has_claims(chapter: str) -> None:
    assert sum(claim.chapter == chapter for claim in CLAIMS) >= (5 if chapter.isdigit() else 3)


def test_claims_are_collected_from_decorators(tmp_path: pathlib.Path) -> None:
    tests = tmp_path / "tests"
    tests.mkdir()
    (tests / "test_it.py").write_text('@pytest.mark.claim("It holds.", chapter="07")\ndef test_it():\n    pass\n')
    assert collect_claims(tests) == [Claim("07", "It holds.", "tests/test_it.py", "test_it", 2)]


def test_claims_page_has_every_claim() -> None:
    page = claims_page("https://example.org/repository")
    assert all(claim.sentence in page and f"{claim.path}#L{claim.line}" in page for claim in CLAIMS)


def test_performance_page_shows_what_was_measured(tmp_path: pathlib.Path) -> None:
    row = {"name": "sgd", "what": "SGD", "ratio_median": 0.987, "ratio_q1": 0.9, "ratio_q3": 1.1, "runs": 40}
    row["measured"] = "2026-01-02 on a processor, with keras 3.15.1"
    (tmp_path / "performance.json").write_text(json.dumps([row]))
    page = performance_page(tmp_path / "performance.json")
    assert "| SGD | **0.99** | 0.90 – 1.10 |" in page
    assert "Measured on 2026-01-02 on a processor, with keras 3.15.1." in page


def test_performance_page_has_every_result_once(tmp_path: pathlib.Path) -> None:
    row = {"ratio_median": 1.0, "ratio_q1": 1.0, "ratio_q3": 1.0, "runs": 3, "measured": "a day"}
    results = [row | {"name": name, "what": f"{name}, {i}"} for name in ("SGD", "minimize") for i in range(2)]
    (tmp_path / "performance.json").write_text(json.dumps(results))
    page = (ROOT / "book" / "performance.md").read_text()
    filled = performance_page(tmp_path / "performance.json", page)
    assert "<!--" not in filled
    places = [filled.index(f"| {result['what']} |") for result in results]
    assert places[1] < filled.index("## L-BFGS") < places[2]
    assert filled.count("**1.00**") == len(results)


def test_a_number_in_the_text_is_that_of_the_record(tmp_path: pathlib.Path) -> None:
    row = {"name": "SGD", "ratio_q1": 1, "ratio_q3": 1, "measured": "a day"}
    results = [row | {"what": f"SGD, {size}", "ratio_median": median} for size, median in ((1, 0.9), (2, 1.104))]
    (tmp_path / "performance.json").write_text(json.dumps(results))
    texts = ("SGD, 2", "SGD, *", "Adam, *; SGD, 1", "Adam, *")
    page = "; ".join(f"<!-- ratio: {text} -->" for text in texts)
    assert performance_page(tmp_path / "performance.json", page) == "1.10; 0.90–1.10; 0.90; not measured yet"


def test_numbers_in_the_text_of_performance_have_a_benchmark() -> None:
    results = json.loads((ROOT / "book" / "performance.json").read_text())
    page = (ROOT / "book" / "performance.md").read_text()
    benchmarks = "".join(path.read_text() for path in (ROOT / "tests" / "benchmarks").glob("bench_*.py"))
    patterns = [each for text in re.findall("<!-- ratio: (.+?) -->", page) for each in text.split("; ")]
    assert len(patterns) > 10
    for pattern in patterns:
        measured = any(fnmatch.fnmatchcase(row["what"], pattern) for row in results)
        assert measured or f'"{pattern.removeprefix("inject, ")}":' in benchmarks, pattern
    assert not re.search(r"\d\.\d", re.sub("<!--.*?-->", "", page)), "a ratio that no record fills in"


@pytest.mark.parametrize(
    ("pattern", "low", "high"),
    [
        pytest.param("*–*–*", 0.9, 1.1, id="an update costs what Keras's costs"),
        pytest.param("inject, N=8, CNN, memory: *", 0.17, 0.23, id="a fifth of the memory where activations fill it"),
        pytest.param("inject, N=8, CNN, time: *", 0.9, 1.1, id="and hardly more time"),
        pytest.param("inject, N=8, dense network, memory: *", 1, 2, id="costs memory where weights do"),
        pytest.param("inject, N=8, dense network, time: *", 2, 3, id="and more than twice the time"),
        pytest.param("GradientAccumulation, *: over the built-in, batch 16", 0.85, 1.15, id="a window costs as much"),
        pytest.param("*: over the built-in, which makes it dense", 0, 0.7, id="less with a large embedding"),
        pytest.param("inject, *embedding, time: over 8 steps *", 0.1, 0.17, id="eight parts about one step of eight"),
        pytest.param("GradientAccumulation, Embedding layer *", 0.85, 1.15, id="in the layer the table is copied"),
        pytest.param(
            "GradientAccumulation, 256 of *: over 8 steps without accumulation",
            1,
            3,
            id="longer than eight short steps",
        ),
        pytest.param("inject, N=8, *time of a batch of 128: *", 0, 1, id="faster than the built-in"),
        pytest.param("CoalesceGradients, training step, *", 0.95, 1.05, id="nothing that can be seen"),
        pytest.param("RungeKutta, *", 0.9, 1.1, id="k gradients cost k steps"),
        pytest.param("*14,400 examples: a gradient in L-BFGS *", 1, 1.2, id="adds little on much data"),
        pytest.param("*1,440 examples: a gradient in L-BFGS *", 1, 2.3, id="may more than double on little"),
        pytest.param("LocalSGD, every *: over every step", 0, 0.7, id="the fewer exchanges, the faster"),
    ],
)
def test_verdicts_of_performance_are_those_of_the_record(pattern: str, low: float, high: float) -> None:
    results = json.loads((ROOT / "book" / "performance.json").read_text())
    medians = [row["ratio_median"] for row in results if fnmatch.fnmatchcase(row["what"], pattern)]
    assert medians
    assert all(low <= median <= high for median in medians)


def test_charts_of_performance_draw_each_result_where_it_belongs() -> None:
    results = json.loads((ROOT / "book" / "performance.json").read_text())
    page = performance_page(page=(ROOT / "book" / "performance.md").read_text())
    charts = re.findall(r'<figure class="ratios">(.*?)</figure>', page)
    *measured, vocabulary = sorted(charts, key=lambda drawing: "1,000,000 words" in drawing)
    points = [re.findall(r'cx="([\d.]+)"', drawing) for drawing in measured]
    assert sum(map(len, points)) == len(results)
    for drawing, places in zip(measured, points, strict=True):
        said = re.findall(r'text-anchor="end"[^>]*>([\d.]+)', drawing)
        assert re.findall(r": ([\d.]+)[;.]", html.unescape(drawing.split(">")[0])) == said, "read aloud"
        known = sorted((float(value), float(place)) for value, place in zip(said, places, strict=True))
        (low, left), (high, right) = known[0], known[-1]
        for value, place in known if high > 2 * low else []:
            expected = left + (right - left) * math.log(value / low) / math.log(high / low)
            assert place == pytest.approx(expected, abs=8)  # what is said is rounded, what is drawn is not
    assert vocabulary.count("<circle") == 3 * len(re.findall(r"[\d,]+ words, by hand:", vocabulary))


def test_a_row_is_divided_into_what_and_over_what() -> None:
    row = {"ratio_median": 1.0, "ratio_q1": 0.9, "ratio_q3": 1.1}
    texts = {
        ("SGD", "SGD, 64–32–10, XLA"): ("SGD", "64–32–10, XLA"),
        ("inject", "inject, N=8, CNN, memory: over the batch"): ("N=8, CNN, memory", "over the batch"),
        ("LocalSGD", "an exchange of much: over one of little"): ("an exchange of much", "over one of little"),
    }
    assert [tuple(ratio(row | {"name": n, "what": what}))[:2] for n, what in texts] == list(texts.values())


def test_committed_measurements_are_complete() -> None:
    results = json.loads((ROOT / "book" / "performance.json").read_text())
    page = (ROOT / "book" / "performance.md").read_text()
    for name in re.findall("<!-- performance: (.+?) -->", page):
        for each in name.split("; "):
            assert any(result["name"] == each or fnmatch.fnmatchcase(result["what"], each) for result in results), each
    for result in results:
        assert re.match(r"20\d\d-\d\d-\d\d on .+, with python .+, tensorflow .+, keras .+, numpy ", result["measured"])
