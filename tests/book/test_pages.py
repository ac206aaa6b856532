"""The pages that are built from the tests: every claim stands in its chapter, every chapter has claims."""

import fnmatch
import html
import itertools
import json
import math
import pathlib
import re
import statistics

import pytest
from book_pages import Claim, amounts, claims_page, collect_claims, overview_rows, performance_page
from ratio_charts import chart, ratio

from tests.benchmarks import bench_oracle, memory_of_parts
from tests.book.reading import CHAPTERS, markdown, plain_text
from tests.kit import ROOT

CLAIMS = collect_claims()
PERFORMANCE = (ROOT / "book" / "performance.md").read_text()


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
def test_chapter_is_in_the_contents_and_on_the_first_page(chapter: str) -> None:
    name = CHAPTERS[chapter].stem
    assert f"- file: notebooks/{name}\n" in (ROOT / "_toc.yml").read_text(), "no line in _toc.yml"
    row = rf"^\| {chapter.upper()} \| .+ \| {{doc}}`/notebooks/{name}` \|$"
    assert re.search(row, (ROOT / "book" / "index.md").read_text(), re.MULTILINE), "no row in book/index.md"


@pytest.mark.parametrize("chapter", CHAPTERS)
def test_chapter_has_claims(chapter: str) -> None:
    held = [claim.sentence for claim in CLAIMS if claim.chapter == chapter]
    assert len(held) >= (5 if chapter.isdigit() else 3), "too few tests with @pytest.mark.claim"


def test_claims_are_collected_from_decorators(tmp_path: pathlib.Path) -> None:
    tests = tmp_path / "tests"
    tests.mkdir()
    (tests / "test_it.py").write_text('@pytest.mark.claim("It holds.", chapter="07")\ndef test_it():\n    pass\n')
    assert collect_claims(tests) == [Claim("07", "It holds.", "tests/test_it.py", "test_it", 2)]


def test_claims_page_has_every_claim() -> None:
    page = claims_page("https://example.org/repository")
    assert all(claim.sentence in page and f"{claim.path}#L{claim.line}" in page for claim in CLAIMS)


def rows_of(page: str) -> list[tuple[str, str, str, list[float]]]:
    """The rows of all charts of a page: the group, what is measured, what is said, and where the points are."""
    found = []
    for table in re.findall(r'<table class="table ratios">.*?</table>', page):
        for group, body in re.findall(r'scope="rowgroup">(.*?)</th></tr>(.*?)</tbody>', table):
            label = ""
            for row in re.findall(r"<tr>(.*?)</tr>", body):
                label = "".join(re.findall(r'<th scope="row".*?>(.*?)</th>', row)) or label
                (said,) = re.findall(r'<td class="said">(.*?)</td>', row)
                points = [float(place) for place in re.findall(r'class="dot \w+" style="left: ([\d.]+)%"', row)]
                plain = (html.unescape(re.sub("<.*?>", "", text)) for text in (group, label, said))
                found.append((*plain, points))
    return found


def test_performance_page_shows_what_was_measured(tmp_path: pathlib.Path) -> None:
    row = {"name": "sgd", "what": "sgd, <b>: over `it`", "ratio_median": 0.987, "ratio_q1": 0.9, "ratio_q3": 1.1}
    row["measured"] = "2026-01-02 on a processor, with keras 3.15.1"
    (tmp_path / "performance.json").write_text(json.dumps([row]))
    page = performance_page(tmp_path / "performance.json")
    assert [row[:3] for row in rows_of(page)] == [("over it", "<b>", "0.99 (0.90–1.10)")]
    assert "Measured on 2026-01-02 on a processor, with keras 3.15.1." in page


def test_performance_page_has_every_result_once(tmp_path: pathlib.Path) -> None:
    row = {"ratio_median": 1.0, "ratio_q1": 1.0, "ratio_q3": 1.0, "runs": 3, "measured": "a day"}
    results = [row | {"name": name, "what": f"{name}, {i}"} for name in ("SGD", "minimize") for i in range(2)]
    (tmp_path / "performance.json").write_text(json.dumps(results))
    page = (ROOT / "book" / "performance.md").read_text()
    filled = performance_page(tmp_path / "performance.json", page)
    assert "<!--" not in filled
    _, folds = filled.split("## The measurements behind the chart")
    before, after = folds.split("<details><summary>L-BFGS")
    assert [row[:2] for row in rows_of(before)] == [("0", "SGD"), ("1", "SGD")]
    assert ("1", "minimize") in [row[:2] for row in rows_of(after)]


def test_a_number_in_the_text_is_that_of_the_record(tmp_path: pathlib.Path) -> None:
    row = {"name": "SGD", "ratio_q1": 1, "ratio_q3": 1, "measured": "a day"}
    results = [row | {"what": f"SGD, {size}", "ratio_median": median} for size, median in ((1, 0.9), (2, 1.104))]
    (tmp_path / "performance.json").write_text(json.dumps(results))
    texts = ("SGD, 2", "SGD, *", "Adam, *; SGD, 1", "Adam, *")
    page = "; ".join(f"<!-- ratio: {text} -->" for text in texts)
    assert performance_page(tmp_path / "performance.json", page) == "1.10; 0.90–1.10; 0.90; not measured yet"
    page = "<!-- overview\nA group\n`a` | b | SGD, * | SGD, 2\nnothing | c | Adam, *\n-->"
    shown = rows_of(performance_page(tmp_path / "performance.json", page))
    assert [row[:2] for row in shown] == [("A group", "a over b")] * 2
    assert [row[2] for row in shown] == ["time 0.90–1.10", "memory 1.10"]
    assert shown[0][3][1] == shown[1][3][0] > shown[0][3][0]


def test_numbers_in_the_text_of_performance_have_a_benchmark() -> None:
    results = json.loads((ROOT / "book" / "performance.json").read_text())
    page = (ROOT / "book" / "performance.md").read_text()
    benchmarks = "".join(path.read_text() for path in (ROOT / "tests" / "benchmarks").glob("bench_*.py"))
    (overview,) = re.findall("<!-- overview\n(.+?)-->", page, re.DOTALL)
    names = [name for _, (_, _, *names) in overview_rows(overview) for name in names]
    assert len(names) > 15
    patterns = [each for text in re.findall("<!-- ratio: (.+?) -->", page) + names for each in text.split("; ")]
    for pattern in patterns:
        measured = any(fnmatch.fnmatchcase(row["what"], pattern) for row in results)
        assert measured or f'"{pattern.removeprefix("inject, ")}":' in benchmarks, pattern
    plain = re.sub("<!--.*?-->", "", page, flags=re.DOTALL)
    assert not re.search(r"\d\.\d", plain), "a ratio that no record fills in"


def test_other_numbers_of_performance_are_those_of_the_records() -> None:
    page = plain_text((ROOT / "book" / "performance.md").read_text())
    record = json.loads((ROOT / "book" / "data" / "time_of_vocabulary.json").read_text())
    times = {way: values[-1] / 1000 for way, values in record["microseconds"].items()}
    layer, compiled = times["Embedding, autodiff"], times["Embedding, autodiff, XLA"]
    assert f"less than {math.ceil(compiled)} milliseconds instead of {layer:.0f}." in page
    assert f"{times['by hand']:.0f} milliseconds instead of {layer:.0f}." in page


def test_networks_of_performance_are_those_that_were_measured() -> None:
    page = (ROOT / "book" / "performance.md").read_text()
    said = dict(re.findall(r"^\| the (.+?) \|.*\| ([\d,]+(?: million)?) \| [\d,]+ \|$", page, re.MULTILINE))
    built = {
        "CNN": bench_oracle.convolutional(128, 8).count_params(),
        "tiny network": 64 * 32 + 32 + 32 * 10 + 10,
        "dense network": 4 * (2048 + 1) * 2048 + 2049 * 10,
        "embedding": bench_oracle.ROWS * bench_oracle.WIDTH,
    }
    for name, count in built.items():
        assert said.pop(name) in (f"{count:,}", f"{count / 1e6:.0f} million"), name
    assert not said


def test_what_performance_counts_is_in_the_networks_that_were_measured() -> None:
    """Activations of the four layers, and weights: the figures of which the page makes its estimate."""
    page = (ROOT / "book" / "performance.md").read_text()
    networks = bench_oracle.convolutional(128, 8), bench_oracle.dense(2048)
    activations = [256 * sum(math.prod(layer.output.shape[1:]) for layer in net.layers[:4]) for net in networks]
    assert "| activations | {} million | {} million |\n".format(*(round(n / 1e6) for n in activations)) in page
    cnn, dense = (network.count_params() for network in networks)
    assert f"| weights | {cnn:,} | {dense / 1e6:.0f} million |\n" in page
    assert f"{1024 // 8 * bench_oracle.IDS:,} words a small batch" in page.replace("\n", " ")


def test_bars_of_what_a_step_holds_are_those_counts() -> None:
    """Activations, their gradient for one layer of four, a gradient as large as the weights, and in parts its sum."""
    (text,) = re.findall("<!-- held: a step of\n(.+?)-->", PERFORMANCE, re.DOTALL)
    held = {row: [float(amount) for amount in parts.values()] for row, parts in amounts(text).items()}
    record = json.loads((ROOT / "book" / "data" / "memory_of_parts.json").read_text())
    runs = {(row["network"], row["parts"]): row["megabytes"] for row in record["results"]}
    built = {
        "CNN": (bench_oracle.convolutional(128, 8), memory_of_parts.convolutional(), "convolutional"),
        "dense network": (bench_oracle.dense(2048), memory_of_parts.dense(), "dense"),
    }
    for name, (*networks, key) in built.items():
        activations, recorded = (256 * sum(math.prod(each.output.shape[1:]) for each in n.layers[:4]) for n in networks)
        assert activations == recorded
        gradient = [networks[0].count_params()] * (name == "dense network")
        assert not gradient or gradient == [networks[1].count_params()]
        for way, parts in {"one piece": 1, "eight parts": 8}.items():
            counts = [activations / parts, activations / 4 / parts, *gradient, *gradient * (parts > 1)]
            (*counted, measured) = held[f"a {name}, in {way}"]
            assert counted == [round(4 * count / 1024**2) for count in counts if 4 * count > 1024**2 / 2]
            assert measured == math.floor(statistics.median(runs[key, parts]) + 0.5)
            assert sum(counted) == pytest.approx(measured, rel=0.35)
    said = [f"{math.floor(value + 0.5)}" for value in runs["dense", 1]]
    assert "three runs took {}, {} and {} megabytes".format(*said) in PERFORMANCE
    assert {math.floor(value + 0.5) for value in runs["dense", 8]} == {119, 120}
    drawn = re.findall(
        r"left: ([\d.]+)%(?:; width: ([\d.]+)%)?", performance_page(page=PERFORMANCE).split("stacked")[1]
    )
    ends = [float(left) + float(width or 0) for left, width in drawn[: sum(map(len, held.values()))]]
    longest = max(max(sum(counted), measured) for (*counted, measured) in held.values())
    running = [[*itertools.accumulate(counted), measured] for (*counted, measured) in held.values()]
    assert ends == pytest.approx([100 * end / longest for row in running for end in row], abs=0.2)


def test_bars_of_all_optimizers_contain_1() -> None:
    results = json.loads((ROOT / "book" / "performance.json").read_text())
    bars = [(row["ratio_q1"], row["ratio_q3"]) for row in results if fnmatch.fnmatchcase(row["what"], "*–*–*")]
    assert len(bars) >= 28
    assert all(low <= 1 <= high for low, high in bars)


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
        pytest.param("*14,400 examples: a gradient in L-BFGS *", 1, 1.15, id="adds about a tenth on much data"),
        pytest.param("diagnostics, *CNN: *", 0.95, 1.05, id="dials cost nothing that one notices"),
        pytest.param("diagnostics, *dense network: *", 0.95, 1.15, id="or a tenth"),
        pytest.param("SAM, *", 0, 1.02, id="no longer than two steps"),
        pytest.param("*1,440 examples: a gradient in L-BFGS *", 1, 2.3, id="may more than double on little"),
        pytest.param("LocalSGD, every *: over every step", 0, 0.7, id="the fewer exchanges, the faster"),
        pytest.param("fit, *, XLA: over autodiff, XLA", 0.9, 1.1, id="by hand just as long under XLA"),
        pytest.param("fit, *: over by hand", 0, 0.7, id="XLA gains more"),
        pytest.param("pass over * in pairs, *", 2, 4, id="gensim more than twice as fast on pairs"),
        pytest.param("pass over * in windows, *", 0, 1, id="slower by the clock on windows"),
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
    overview, *charts = re.findall(r'<table class="table ratios">.*?</table>', page)
    measured = [rows_of(chart) for chart in charts if "1,000,000 words" not in chart]
    assert sum(map(len, measured)) == len(results)
    vocabulary = [row for chart in charts for row in rows_of(chart) if row[1].endswith(" words")]
    assert len(vocabulary) == 3 * sum(group == "by hand" for group, *_ in vocabulary) > 15
    for rows in [rows_of(overview), vocabulary, *measured]:
        known = []
        for *_, said, places in rows:
            values = re.findall(r"[\d.]+", said.split(" (")[0])
            assert len(values) == len(places)
            known += [(float(value), place) for value, place in zip(values, places, strict=True)]
        (low, left), (high, right) = min(known), max(known)
        for value, place in known if high > 2 * low else []:
            expected = left + (right - left) * math.log(value / low) / math.log(high / low)
            assert place == pytest.approx(expected, abs=4)  # what is said is rounded, what is drawn is not


def test_an_axis_keeps_its_1_on_a_phone_and_only_marks_that_are_apart() -> None:
    row = {"name": "SGD", "what": "SGD, it", "ratio_median": 1.0, "ratio_q1": 0.9, "ratio_q3": 1.1}
    for change, hidden in (({}, 2), ({"ratio_q1": 0.3}, 0), ({"ratio_q1": 0.01}, 3)):
        marks = re.findall(r'<b (class="close" )?style="left: ([\d.]+)%">([\d.]+)</b>', chart([ratio(row | change)]))
        kept = [float(left) for close, left, _ in marks if not close]
        assert all(right - left > 25 for left, right in itertools.pairwise(kept))
        assert "1" in [text for close, _, text in marks if not close]
        assert len(marks) - len(kept) == hidden


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
