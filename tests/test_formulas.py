"""Formula equals code: the LaTeX in each optimizer's docstring is parsed, run in NumPy and compared with `update_step`.

The docstring is the one source of a rule. SymPy reads it, without knowing the code; the last test finds the same lines
in the chapter that teaches the rule.
"""

import inspect
import json
import pathlib
import re
from typing import Any, NamedTuple

import keras
import numpy as np
import pytest
import sympy
from sympy.parsing.latex import parse_latex

import companion
from companion.wrapping import WrappingOptimizer

NOTEBOOKS = pathlib.Path(__file__).parent.parent / "notebooks"
STEPS = 12

HYPERPARAMETERS = {"learning_rate": 0.125, "momentum": 0.875, "beta_1": 0.75, "beta_2": 0.9375, "epsilon": 2.0**-10}
"""Exactly representable in float32, through which Keras casts them."""

SYMBOLS = {
    "h": "learning_rate",
    "beta": "momentum",
    "beta_{1}": "beta_1",
    "beta_{2}": "beta_2",
    "epsilon": "epsilon",
}
"""What SymPy calls the letters of the formulas, and the constructor's argument that each letter stands for."""


class Rule(NamedTuple):
    """One displayed formula: the class in whose docstring it stands, which of its blocks, and the flags it is for."""

    optimizer: str
    block: int
    flags: dict[str, Any]


RULES = {
    "SGD": Rule("SGD", 0, {}),
    "Momentum": Rule("Momentum", 0, {"nesterov": False}),
    "Nesterov": Rule("Momentum", 1, {"nesterov": True}),
    "Adam": Rule("Adam", 0, {}),
}


pytestmark = pytest.mark.usefixtures("float64")


def blocks(optimizer: type) -> list[str]:
    """The LaTeX of each `.. math::` block of a docstring."""
    found = re.findall(r"^\.\. math::\n\n((?:[ ]+.*\n)+)", inspect.getdoc(optimizer) or "", re.MULTILINE)
    return [block.strip() for block in found]


def lines(latex: str) -> list[str]:
    """The lines of an aligned formula, without its alignment marks."""
    return [line.replace("&", "").strip() for line in latex.split(r"\\")]


def parsed(latex: str) -> sympy.Expr:
    """Parses an expression, after writing out the one product that SymPy's grammar cannot read: `(…) g^2`."""
    return parse_latex(re.sub(r"\)\s*(?=[A-Za-z])", r") \\cdot ", latex), backend="lark")


def assignments(latex: str) -> list[tuple[str, sympy.Expr]]:
    """The name assigned to and the expression assigned, line by line."""
    sides = [line.split(r"\leftarrow") for line in lines(latex)]
    return [(str(parsed(left)), parsed(right)) for left, right in sides]


def run_formula(latex: str, start: np.ndarray, gradients: np.ndarray) -> dict[str, np.ndarray]:
    """Runs the assignments in order, once for each gradient, with everything that is assigned to zero at the start."""
    rule = assignments(latex)
    values = {name: np.zeros_like(start) for name, _ in rule} | {"theta": start}
    values |= {symbol: np.float64(HYPERPARAMETERS[argument]) for symbol, argument in SYMBOLS.items()}
    for t, gradient in enumerate(gradients, start=1):
        values |= {"t": np.float64(t), "g": gradient}
        for name, expression in rule:
            symbols = sorted(expression.free_symbols, key=str)
            values[name] = sympy.lambdify(symbols, expression, "numpy")(*(values[str(symbol)] for symbol in symbols))
    return values


def assert_formula_equals_code(rule: Rule, latex: str) -> None:
    optimizer_class = getattr(companion, rule.optimizer)
    known = {name: HYPERPARAMETERS[name] for name in HYPERPARAMETERS.keys() & set(arguments_of(optimizer_class))}
    optimizer = optimizer_class(**known, **rule.flags)
    generator = np.random.default_rng(0)
    start, gradients = generator.normal(size=5), generator.normal(size=(STEPS, 5))
    variable = keras.Variable(start, dtype="float64")
    for gradient in gradients:
        optimizer.apply([gradient], [variable])
    expected = run_formula(latex, start, gradients)
    np.testing.assert_allclose(variable.numpy(), expected["theta"], rtol=0, atol=1e-13)
    for slot, letter in slots(optimizer_class).items():
        (found,) = (slot_variable for slot_variable in optimizer.variables if slot_variable.name.endswith(slot))
        np.testing.assert_allclose(found.numpy(), expected[letter], rtol=0, atol=1e-13)


def arguments_of(optimizer: type) -> list[str]:
    return [name for name in inspect.signature(optimizer).parameters if name != "kwargs"]


def slots(optimizer: type) -> dict[str, str]:
    """The slots that a docstring names, each with its letter in the formula."""
    sentence = re.search(r"^Slots: .*$", inspect.getdoc(optimizer) or "", re.MULTILINE)
    return dict(re.findall(r"``(\w+)`` :math:`(\w)`", sentence.group())) if sentence else {}


@pytest.mark.parametrize("name", RULES)
def test_formula_equals_code(name: str) -> None:
    rule = RULES[name]
    assert_formula_equals_code(rule, blocks(getattr(companion, rule.optimizer))[rule.block])


def is_a_rule(each: type) -> bool:
    """Whether it moves weights by one gradient: not around another optimizer, and asking once."""
    others = (WrappingOptimizer, companion.InjectedOptimizer)
    return issubclass(each, keras.optimizers.Optimizer) and not issubclass(each, others)


def test_every_formula_of_every_optimizer_is_run() -> None:
    found = inspect.getmembers(companion.optimizers, inspect.isclass)
    here = {name for name, member in found if is_a_rule(member) and name[0] != "_"}
    assert here <= set(companion.__all__), "optimizers that companion/__init__.py does not name"
    public = {name: getattr(companion, name) for name in companion.__all__}
    optimizers = {name for name, each in public.items() if inspect.isclass(each) and is_a_rule(each)}
    displayed = {(name, index) for name in optimizers for index in range(len(blocks(public[name])))}
    run = {(rule.optimizer, rule.block) for rule in RULES.values()}
    elsewhere = {name for name, _ in displayed} & {"AdamsBashforth2", "OptimisticSGD", *NEWER}  # below
    assert {case for case in displayed if case[0] not in elsewhere} == run, "rows of RULES are missing, or too many"
    assert {name for name, _ in displayed} == optimizers, "a docstring without a formula"


@pytest.mark.parametrize("name", sorted({rule.optimizer for rule in RULES.values()}))
def test_every_assigned_letter_but_the_weight_is_a_named_slot(name: str) -> None:
    optimizer = getattr(companion, name)
    for block in blocks(optimizer):
        assert {letter for letter, _ in assignments(block)} - {"theta"} == set(slots(optimizer).values())


@pytest.mark.parametrize(
    ("latex", "expected"),
    [
        (r"\beta_2 v + (1 - \beta_2) g^2", "v*beta_{2} + g**2*(1 - beta_{2})"),
        (r"\frac{\sqrt{1 - \beta_2^t}}{1 - \beta_1^t}", "sqrt(1 - beta_{2}**t)/(1 - beta_{1}**t)"),
        (r"\theta - h g", "theta - h*g"),
    ],
)
def test_the_parser_reads_what_is_written(latex: str, expected: str) -> None:
    plain = {symbol: f"x{number}" for number, symbol in enumerate(("beta_{1}", "beta_{2}"))}
    letters = {symbol: sympy.Symbol(symbol) for symbol in ("theta", "h", "g", "v", "t")}
    letters |= {x: sympy.Symbol(symbol) for symbol, x in plain.items()}
    for symbol, x in plain.items():
        expected = expected.replace(symbol, x)
    assert sympy.simplify(parsed(latex) - sympy.sympify(expected, letters)) == 0


MISTAKES = [
    ("SGD", r"\theta - h g", r"\theta + h g"),
    ("Momentum", r"\beta v - h g", r"\beta v + h g"),
    ("Momentum", r"\theta + v", r"\theta + \beta v - h g"),
    ("Nesterov", r"\theta + \beta v - h g", r"\theta + v"),
    ("Nesterov", r"\theta + \beta v - h g", r"\theta + \beta v + h g"),
    ("Adam", r"\sqrt{1 - \beta_2^t}", "1"),
    ("Adam", r"1 - \beta_1^t", "1"),
    ("Adam", r"\sqrt{q} + \epsilon", r"\sqrt{q + \epsilon}"),
    ("Adam", r"(1 - \beta_1) g", "g"),
    ("Adam", r"(1 - \beta_2) g^2", "g^2"),
    ("Adam", r"\theta - h", r"\theta + h"),
]


@pytest.mark.xfail(strict=True, raises=AssertionError, reason="a formula with a mistake")
@pytest.mark.parametrize(("name", "right", "wrong"), MISTAKES)
def test_a_mistaken_formula_is_noticed(name: str, right: str, wrong: str) -> None:
    rule = RULES[name]
    latex = blocks(getattr(companion, rule.optimizer))[rule.block]
    if right not in latex:
        raise LookupError(f"{right} is not in {latex}")
    assert_formula_equals_code(rule, latex.replace(right, wrong))


def displayed_lines(notebook: pathlib.Path) -> set[str]:
    """Every formula, line by line, in the Markdown of a notebook, without white space and alignment."""
    cells = json.loads(notebook.read_text())["cells"]
    markdown = "\n\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown")
    formulas = [a or b for a, b in re.findall(r"\$\$(.+?)\$\$|\$([^$]+)\$", markdown, re.DOTALL)]
    inner = [re.sub(r"\\(begin|end)\{\w+\*?\}", "", formula) for formula in formulas]
    return {squeezed(line) for formula in inner for line in lines(formula)}


def squeezed(line: str) -> str:
    return re.sub(r"\s", "", line.replace("&", "")).rstrip(".,;")


@pytest.mark.parametrize("name", RULES)
def test_the_chapter_shows_the_same_formula(name: str) -> None:
    optimizer = getattr(companion, RULES[name].optimizer)
    (chapter,) = re.findall(r":doc:`/notebooks/(\w+)`", inspect.getdoc(optimizer) or "")
    shown = displayed_lines(NOTEBOOKS / f"{chapter}.ipynb")
    for line in lines(blocks(optimizer)[RULES[name].block]):
        assert squeezed(line) in shown, f"{line} is not in chapter {chapter}"


# ---- several gradients: the last one remembered, or those of one step -----------------------------------------------


def plain(latex: str) -> str:
    r"""Without the sizes of brackets, and with `\frac12` and `h (` written out, for SymPy's grammar."""
    latex = re.sub(r"\\frac(\d)(\d)", r"\\frac{\1}{\2}", re.sub(r"\\Big[lr]", "", latex))
    return re.sub(r"\bh\s*\(", r"h \\cdot (", latex)


def one_gradient_back(optimizer: str, latex: str) -> None:
    right = plain(latex).split(r"\leftarrow")[1].replace("g_{k-1}", "p").replace("g_k", "g")
    step = sympy.lambdify(sympy.symbols("theta h g p"), parsed(right), "numpy")
    generator = np.random.default_rng(0)
    theta, gradients = generator.normal(size=5), generator.normal(size=(STEPS, 5))
    variable = keras.Variable(theta, dtype="float64")
    method = getattr(companion, optimizer)(0.125)
    for last, gradient in zip([gradients[0], *gradients], gradients, strict=False):
        method.apply([gradient], [variable])
        theta = step(theta, 0.125, gradient, last)
    np.testing.assert_allclose(variable.numpy(), theta, rtol=0, atol=1e-13)


@pytest.mark.parametrize("optimizer", ["AdamsBashforth2", "OptimisticSGD"])
def test_formula_of_a_method_with_memory_is_the_code(optimizer: str) -> None:
    (latex,) = blocks(getattr(companion, optimizer))
    one_gradient_back(optimizer, latex)
    with pytest.raises(AssertionError):
        one_gradient_back(optimizer, latex.replace("g_k -", "g_k +"))


@pytest.mark.parametrize("optimizer", ["Heun", "RK23", "RK45"])
def test_weights_in_a_formula_are_those_of_the_tableau(optimizer: str) -> None:
    (latex,) = blocks(getattr(companion, optimizer))
    step = sympy.expand(parsed(" ".join(plain(latex).split(r"\leftarrow")[1].split())))
    h, tableau = sympy.Symbol("h"), getattr(companion, optimizer)().tableau
    named = {str(symbol): symbol for symbol in step.free_symbols}
    found = [-step.coeff(named[f"k_{{{i}}}"]) / h if f"k_{{{i}}}" in named else 0 for i in range(1, len(tableau.b) + 1)]
    np.testing.assert_allclose([float(weight) for weight in found], tableau.b, rtol=0, atol=1e-15)


# ---- newer rules: a function of a matrix, and more than one point --------------------------------------------------


def equal_directions(matrix: np.ndarray) -> np.ndarray:
    left, s, right = np.linalg.svd(matrix, full_matrices=False)
    s = s / np.linalg.norm(s)
    for _ in range(5):
        s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
    return (left * s) @ right


NEWER: dict[str, tuple[Any, tuple[str, ...], dict[str, str]]] = {
    "Lion": (np.sign, (), {"momentum": "m"}),
    "Muon": (equal_directions, (), {"momentum": "M"}),
    "ScheduleFreeAdamW": (None, ("z", "x"), {"velocity": "q", "average": "x", "iterate": "z"}),
}
"""What the named function is, which letters begin at the weight, and the slots with their letters."""


def newer_rule(name: str, latex: str) -> None:
    function, begun, slots = NEWER[name]
    latex = re.sub(r"\\operatorname\{\w+\}", r"\\sin", plain(latex).replace(r"\,", " "))  # a function SymPy knows
    sides = [line.split(r"\leftarrow") for line in lines(latex)]
    rule = [(str(parsed(left)), parsed(right)) for left, right in sides]
    draw = np.random.default_rng(0)
    theta, gradients = draw.normal(size=(6, 4)), draw.normal(size=(STEPS, 6, 4))
    settings = {key: value for key, value in HYPERPARAMETERS.items() if key in arguments_of(getattr(companion, name))}
    if name == "ScheduleFreeAdamW":
        settings["weight_decay"] = 0.25
    optimizer, variable = getattr(companion, name)(**settings), keras.Variable(theta, dtype="float64")
    values: dict[str, Any] = {letter: np.zeros_like(theta) for letter, _ in rule} | {"theta": theta}
    values |= dict.fromkeys(begun, theta) | {"s": 0.2 * np.sqrt(6), "lambda": 0.25, "mu": HYPERPARAMETERS["momentum"]}
    values |= {symbol: HYPERPARAMETERS[argument] for symbol, argument in SYMBOLS.items()}
    for t, gradient in enumerate(gradients, start=1):
        optimizer.apply([gradient], [variable])
        values |= {"t": float(t), "c": 1 / t, "g": gradient, "G": gradient}
        for letter, expression in rule:
            symbols = sorted(expression.free_symbols, key=str)
            run = sympy.lambdify(symbols, expression, [{"sin": function}, "numpy"])
            values[letter] = run(*(values[str(symbol)] for symbol in symbols))
    np.testing.assert_allclose(variable.numpy(), values["theta"], rtol=0, atol=1e-5 if name == "Muon" else 1e-12)
    for slot, letter in slots.items():
        (found,) = (variable for variable in optimizer.variables if variable.name.endswith(slot))
        np.testing.assert_allclose(found.numpy(), values[letter], rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", NEWER)
def test_formula_of_a_newer_rule_is_the_code_and_the_chapters(name: str) -> None:
    latex = blocks(getattr(companion, name))[0]
    newer_rule(name, latex)
    shown = displayed_lines(NOTEBOOKS / "16_one_answer_newer_rules.ipynb")
    for line in lines(latex):
        assert squeezed(line) in shown, f"{line} is not in chapter 16"


@pytest.mark.parametrize(
    ("name", "right", "mistake"),
    [
        ("Lion", r"(\beta_1 m", r"(\beta_2 m"),
        ("Muon", r"G + \mu M)", "M)"),
        ("ScheduleFreeAdamW", r"\lambda \theta", r"\lambda z"),
        ("ScheduleFreeAdamW", "(1 - c) x + c z", "x"),
        ("ScheduleFreeAdamW", r"q / (1 - \beta_2^t)", "q"),
    ],
)
def test_a_mistake_in_a_newer_rule_is_noticed(name: str, right: str, mistake: str) -> None:
    latex = blocks(getattr(companion, name))[0]
    assert right in latex
    with pytest.raises(AssertionError):
        newer_rule(name, latex.replace(right, mistake))
