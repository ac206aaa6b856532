"""Finds orphan numbers: numbers in a chapter's text that nothing on the same page printed, defined or cited."""

import re
from typing import NamedTuple

import nbformat

_NUMBER = r"(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?(?:[eE][-+−]?\d+)?"
# What a number in a text may be besides a result.
_EXEMPT = [
    r"```.*?```",  # code, in solutions
    r"`[^`]*`",
    r"\]\([^)]*\)",  # where a link leads
    r"<[^>]*>",
    r"^#+ .*$",  # headings
    r"^\*\*Run time\*\*.*$",
    r"^ *\d+\. ",  # numbered lists
    r"\b(?:Keras|TensorFlow|TF|tf\.keras|Python|NumPy|PyTorch|version)\s+v?\d+(?:\.[\dx]+)*",
    r"\b[Cc]hapters? \d\d(?:(?:–| and |, )\d\d)*",
    r"\b[Ee]xercises? \d",
    r"\b(?:19|20)\d\d\b",
]


class Number(NamedTuple):
    """A number as it stands in a text, its value, and half of its last digit."""

    text: str
    value: float
    tolerance: float


def numbers(text: str) -> list[Number]:
    """All numbers of a text, with the precision to which they are given."""
    found = []
    text = re.sub(r"(?:(\d+(?:\.\d+)?)\s*\\(?:times|cdot)\s*)?10\^\{?\s*([-−]?\d+)\}?", _power, text)
    for match in re.finditer(rf"(?<![\w.\\]){_NUMBER}(?![\w])\s?\\?%?", text):
        token = match.group().replace(",", "").replace("−", "-")
        percent = "%" in token
        mantissa, _, exponent = token.rstrip("\\% ").lower().partition("e")
        unit = 10.0 ** (int(exponent or 0) - len(mantissa.partition(".")[2]) - 2 * percent)
        value = float(mantissa) * 10.0 ** (int(exponent or 0) - 2 * percent)
        found.append(Number(match.group().strip(), value, 0.5 * unit))
    return found


def _power(match: re.Match[str]) -> str:
    return f"{match[1] or 1}e{match[2].replace('−', '-')}"


def evidence(notebook: nbformat.NotebookNode) -> list[float]:
    """The values of all numbers in a notebook's code and in what it printed."""
    texts = []
    for cell in notebook.cells:
        if cell.cell_type == "code":
            texts.append(cell.source.replace("_", ""))
            texts += [output.get("text", "") + output.get("data", {}).get("text/plain", "") for output in cell.outputs]
    text = re.sub(r"[^\d.eE,%+−-]", " ", "\n".join(texts).replace("e-", "e-"))
    return [number.value for number in numbers(text)]


def prose(notebook: nbformat.NotebookNode) -> str:
    """The text of a chapter up to its sources, without what may hold numbers that are not results."""
    text = "\n\n".join(cell.source for cell in notebook.cells if cell.cell_type == "markdown")
    text = text.split("\n## Sources")[0]
    for pattern in _EXEMPT:
        text = re.sub(pattern, " ", text, flags=re.DOTALL if pattern.startswith("```") else re.MULTILINE)
    return text


def orphans(notebook: nbformat.NotebookNode) -> list[str]:
    """The numbers of a chapter's text, other than single digits, that its cells neither print nor contain."""
    known = evidence(notebook)

    def is_held(number: Number) -> bool:
        slack = number.tolerance * (1 + 1e-6) + 1e-12 * abs(number.value)
        return any(abs(value - number.value) <= slack or value == 100 * number.value for value in known)

    return [
        number.text
        for number in numbers(prose(notebook))
        if not (number.text.isdigit() and len(number.text) == 1) and not is_held(number)
    ]
