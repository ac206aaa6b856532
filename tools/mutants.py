"""Breaks the package in many small ways, one at a time in a copy, and lists the breaks that no test notices.

Usage: python -m tools.mutants [--count 13] [--seed 0] [--own] [ROOM …]   (five rooms by default: 65 mutants)

A mutant that the default suite lets live goes through the whole matrices as well (``--slow``): so the thinned suite is
measured against the full one. Only tests that concern the room are run, and the first failure ends the run. With
``--own``, which takes a minute a mutant, only the room's own files of tests are asked.
"""

import argparse
import ast
import os
import pathlib
import random
import shutil
import subprocess
import sys
import tempfile
import time
from typing import Any

from tools.changed import ROOT, tests_of

ROOMS = ("oracle", "accumulation", "injection", "runge_kutta", "local_sgd")
SWAPS: dict[type, type] = {
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.Div,
    ast.Div: ast.Mult,
    ast.Lt: ast.LtE,
    ast.LtE: ast.Lt,
    ast.Gt: ast.GtE,
    ast.GtE: ast.Gt,
    ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq,
    ast.Is: ast.IsNot,
    ast.IsNot: ast.Is,
    ast.In: ast.NotIn,
    ast.NotIn: ast.In,
    ast.And: ast.Or,
    ast.Or: ast.And,
}
SECONDS = 900


class Break(ast.NodeTransformer):
    """Makes the change of one number, and counts how many there are."""

    def __init__(self, number: int = -1) -> None:
        self.number, self.seen, self.what = number, 0, ""

    def due(self, node: ast.AST, what: str) -> bool:
        """Whether this is the place."""
        self.seen += 1
        if self.seen - 1 != self.number:
            return False
        self.what = f"line {getattr(node, 'lineno', '?')}: {what}"
        return True

    def visit(self, node: Any) -> Any:
        """Changes what is due and goes on below; leaves alone what is raised."""
        if isinstance(node, ast.Raise):
            return node
        if (isinstance(node, ast.BinOp) and type(node.op) in SWAPS and self.due(node, ast.unparse(node))) or (
            isinstance(node, ast.BoolOp) and self.due(node, ast.unparse(node))
        ):
            node.op = SWAPS[type(node.op)]()
        elif isinstance(node, ast.Compare) and type(node.ops[0]) in SWAPS and self.due(node, ast.unparse(node)):
            node.ops[0] = SWAPS[type(node.ops[0])]()
        elif isinstance(node, ast.If | ast.IfExp) and self.due(node, f"not ({ast.unparse(node.test)})"):
            node.test = ast.UnaryOp(ast.Not(), node.test)
        elif isinstance(node, ast.Constant) and isinstance(node.value, int) and self.due(node, f"{node.value}"):
            node.value = not node.value if isinstance(node.value, bool) else node.value + 1
        return self.generic_visit(node)


def mutants(source: str, count: int, seed: int) -> list[tuple[str, str]]:
    """What is changed, and the source with the change; as many as asked for, drawn at random."""
    counting = Break()
    counting.visit(ast.parse(source))
    chosen = random.Random(seed).sample(range(counting.seen), min(count, counting.seen))
    found = []
    for number in sorted(chosen):
        change = Break(number)
        tree = ast.fix_missing_locations(change.visit(ast.parse(source)))
        found.append((change.what, ast.unparse(tree)))
    return found


def is_noticed(folder: pathlib.Path, tests: list[str], *options: str) -> bool:
    """Whether a test fails in a copy of the project; a run that does not end is noticed as well."""
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *options, *tests]
    environment = os.environ | {"PYTHONPATH": str(folder)}  # workers import the copy, too
    try:
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, env=environment, timeout=SECONDS)
    except subprocess.TimeoutExpired:
        return True
    return done.returncode != 0


def main(arguments: list[str]) -> int:
    """Prints a line for each mutant, and the score; returns how many only the whole matrices noticed."""
    parser = argparse.ArgumentParser(prog="python -m tools.mutants")
    parser.add_argument("--count", type=int, default=13, help="mutants a room")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--own", action="store_true", help="ask only the room's own files of tests")
    parser.add_argument("rooms", nargs="*", default=ROOMS)
    asked = parser.parse_args(arguments)
    fates: list[str] = []
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name) / "copy"
        shutil.copytree(ROOT, folder, ignore=shutil.ignore_patterns(".*", "_build", "build", "node_modules"))
        for room in asked.rooms:
            path = folder / "companion" / f"{room}.py"
            source, tests = path.read_text(), sorted(tests_of(f"companion/{room}.py"))
            own = [test for test in tests if room in test]  # they notice most, so they are asked first, alone
            others = [test for test in tests if test not in own]
            assert not is_noticed(folder, own if asked.own else tests), f"{room}: the tests fail without a mutant"
            for what, changed in mutants(source, asked.count, asked.seed):
                path.write_text(changed)
                started = time.monotonic()
                fate = "noticed"
                if asked.own:
                    fate = "noticed" if is_noticed(folder, own) else "not noticed by its own tests"
                elif not (is_noticed(folder, own) or is_noticed(folder, others)):
                    fate = "noticed with --slow only" if is_noticed(folder, tests, "--slow") else "LIVES"
                fates.append(fate)
                print(f"{room}: {fate} ({time.monotonic() - started:.0f} s): {what}", flush=True)
            path.write_text(source)
    for fate in sorted(set(fates)):
        print(f"{fates.count(fate)} of {len(fates)} {fate}")
    return fates.count("noticed with --slow only")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
