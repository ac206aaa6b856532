"""The page on Keras's faults is true of the Keras that it names, and of the lock's."""

import re
from typing import NamedTuple

import keras
import pytest
import tensorflow as tf

from tests.book.reading import ROOT
from tests.kit.processes import warm
from tools.programs import Program, outputs, programs

PAGE = ROOT / "book" / "keras.md"
PROGRAMS = programs(PAGE.read_text())


@pytest.fixture(scope="module")
def printed() -> dict[str, str]:
    named = re.search(r"\*\*Keras (\S+)\*\* with\s+\*\*TensorFlow (\S+)\*\*", PAGE.read_text())
    assert named
    assert {f"keras=={named[1]}", f"tensorflow=={named[2]}"} <= set((ROOT / "requirements.txt").read_text().split())
    if (keras.__version__, tf.__version__) != named.groups():
        pytest.skip(f"the page is about Keras {named[1]} and TensorFlow {named[2]}")
    return {program.heading: output for program, output in zip(PROGRAMS, outputs(PAGE, warm()), strict=True)}


@pytest.mark.parametrize("program", PROGRAMS, ids=lambda program: program.heading)
def test_keras_still_does_what_the_page_says(program: Program, printed: dict[str, str]) -> None:
    assert printed[program.heading] == program.output, "if Keras has mended this, say so on the page, or drop the entry"


class Entry(NamedTuple):
    """A fault on the page: its label, its heading, and what stands below."""

    label: str
    heading: str
    text: str


def entries(section: str) -> list[Entry]:
    found = re.findall(r"^\(([\w-]+)\)=\n### ([^\n]+)\n(.*?)(?=^\([\w-]+\)=\n|\Z)", section, re.MULTILINE | re.DOTALL)
    return [Entry(*each) for each in found]


# Labels and texts of the sections, each of which holds entries.
SECTIONS = re.findall(
    r"^\(([\w-]+)\)=\n## [^\n]+\n(.*?)(?=^\([\w-]+\)=\n## |\Z)", PAGE.read_text(), re.MULTILINE | re.DOTALL
)


def test_every_entry_has_a_folded_program_and_a_remedy() -> None:
    faults = [entry for _, section in SECTIONS for entry in entries(section)]
    assert len(faults) == PAGE.read_text().count("\n### ") >= 20
    assert len(PROGRAMS) == len(faults) + 2, "the remedies of accumulation, and how a processor poses as two"
    for fault in faults:
        assert "**Remedy.**" in fault.text
        before, program = fault.text.split("<details><summary>The program</summary>")
        assert before.rstrip().endswith((":", ".)")), fault.heading
        assert "</details>\n\n```text\n" in program
    for program in PROGRAMS:
        assert len(program.code.splitlines()) <= 30, program.heading


def learned(code: str) -> str:
    """How one learns of a fault, by what its program has to catch."""
    return "an error" if "except " in code else "a warning" if "catch_warnings" in code else "nothing"


def test_table_at_the_top_counts_the_entries_of_each_section() -> None:
    counts = re.findall(r"^\| \{ref\}`.+? <(.+?)>` \| .+ \| (\d+) \|$", PAGE.read_text(), re.MULTILINE)
    assert counts == [(label, str(len(entries(section)))) for label, section in SECTIONS]


def test_grades_hold_each_fault_once_and_count_the_rest() -> None:
    faults = {entry.label for _, section in SECTIONS for entry in entries(section)}
    first, *others = re.findall(r"^\| \d\. .+ \| (.+?) \|$", PAGE.read_text(), re.MULTILINE)
    graded = [label for grade in others for label in re.findall(r"<(.+?)>`", grade)]
    assert len(graded) == len({*graded} & faults)
    silent = set(re.findall(r"^\| .+ <(.+?)>` \| nothing \|", PAGE.read_text(), re.MULTILINE))
    assert faults - {*graded} == silent - {*graded}, "what is not graded 2 to 4 tells nothing"
    assert f"the {len(faults) - len(graded)} whose row below says" in first
    assert f"This page lists {len(faults)} faults" in PAGE.read_text()


@pytest.mark.parametrize(("label", "section"), SECTIONS, ids=[label for label, _ in SECTIONS])
def test_table_of_a_section_has_its_entries_in_order_the_silent_ones_first(label: str, section: str) -> None:
    rows = re.findall(r"^\| .+ \| \{ref\}`([^`<]+) <(.+?)>` \| (.+?) \| (.+?) \|$", section, re.MULTILINE)
    faults = entries(section)
    assert [row[:2] for row in rows] == [(fault.heading.replace("`", ""), fault.label) for fault in faults]
    for (_, _, told, remedy), fault in zip(rows, faults, strict=True):
        assert told.split(";")[0] == learned(fault.text.split("```")[1]), fault.heading
        for name in re.findall("`(.+?)`", remedy):
            assert name in fault.text.split("**Remedy.**")[1], (fault.heading, name)
    order = ["nothing", "a warning", "an error"]
    told = [order.index(row[2].split(";")[0]) for row in rows]
    assert told == sorted(told)
