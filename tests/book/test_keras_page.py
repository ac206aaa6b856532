"""The page on Keras's faults is true of the Keras that it names, and of the lock's."""

import re

import keras
import pytest
import tensorflow as tf

from tests.book.reading import ROOT
from tests.kit.processes import warm
from tools.programs import Program, outputs, programs

PAGE = ROOT / "book" / "keras.md"
FAULTS = programs(PAGE.read_text())


@pytest.fixture(scope="module")
def printed() -> dict[str, str]:
    named = re.search(r"\*\*Keras (\S+)\*\* with\s+\*\*TensorFlow (\S+)\*\*", PAGE.read_text())
    assert named
    assert {f"keras=={named[1]}", f"tensorflow=={named[2]}"} <= set((ROOT / "requirements.txt").read_text().split())
    if (keras.__version__, tf.__version__) != named.groups():
        pytest.skip(f"the page is about Keras {named[1]} and TensorFlow {named[2]}")
    return {fault.heading: output for fault, output in zip(FAULTS, outputs(PAGE, warm()), strict=True)}


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.heading)
def test_keras_still_does_what_the_page_says(fault: Program, printed: dict[str, str]) -> None:
    assert printed[fault.heading] == fault.output, "if Keras has mended this, say so on the page, or drop the entry"


def test_every_entry_has_a_program_the_right_value_and_a_remedy() -> None:
    entries = re.split(r"^## ", PAGE.read_text(), flags=re.MULTILINE)[1:]
    assert len(entries) == len(FAULTS) >= 20
    for entry in entries:
        assert "**Remedy.**" in entry
        assert len(entry.split("```python\n")[1].split("```")[0].splitlines()) <= 30, entry[:60]


def learned(code: str) -> str:
    """How one learns of a fault, by what its program has to catch."""
    return "An error" if "except " in code else "A warning" if "catch_warnings" in code else "Nothing"


def test_tables_at_the_top_have_every_entry_once_the_silent_ones_first() -> None:
    page = PAGE.read_text()
    labels = re.findall(r"^\((keras-.+)\)=\n## ", page, re.MULTILINE)
    assert len(labels) == len(FAULTS)
    top, *sections = re.split(r"^## ", page, flags=re.MULTILINE)
    entries = dict(zip(labels, sections, strict=True))
    tables = re.split(r"^\*\*(Nothing|A warning|An error)\b.*:\*\*$", top, flags=re.MULTILINE)[1:]
    assert tables[::2] == ["Nothing", "A warning", "An error"]
    seen = []
    for kind, table in zip(tables[::2], tables[1::2], strict=True):
        rows = re.findall(r"^\| \{ref\}`([^`<]+) <(.+?)>` \| .+? \| (.+?) \|$", table, re.MULTILINE)
        for words, label, remedy in rows:
            seen.append(label)
            assert entries[label].splitlines()[0].lower().endswith(words.lower()), "the heading says it in other words"
            assert kind == learned(entries[label].split("```")[1]), label
            for name in re.findall("`(.+?)`", remedy):
                assert name in entries[label].split("**Remedy.**")[1], (label, name)
    assert sorted(seen) == sorted(labels)
