"""Mutation testing: small changes to the code, each of which some test should notice.

::

    python tests/mutation.py src/flowmo/model/flow.py tests/test_flow_and_sampler.py tests/test_golden.py --sample 40

Comparisons, arithmetic, constants, conditions and returned values of a file are changed one at a time, and the tests
run in a forked process in which the changed file is imported in place of the real one. What survives is printed.
"""

from __future__ import annotations

import argparse
import ast
import copy
import importlib.util
import os
import random
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

SECONDS = 600
SWAPS: dict[type, type] = {
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.Div,
    ast.Div: ast.Mult,
    ast.FloorDiv: ast.Mult,
    ast.Mod: ast.Mult,
    ast.LShift: ast.RShift,
    ast.RShift: ast.LShift,
    ast.BitAnd: ast.BitOr,
    ast.BitOr: ast.BitAnd,
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


def mutants(tree: ast.Module) -> Iterator[tuple[int, str, ast.Module]]:
    """Line, what was changed, and the changed module."""
    skipped = {id(node) for top in ast.walk(tree) for node in _not_run(top)}
    for i, node in enumerate(ast.walk(tree)):
        if id(node) in skipped:
            continue
        for name, change in _changes(node):
            changed = copy.deepcopy(tree)
            change(next(other for j, other in enumerate(ast.walk(changed)) if j == i))
            yield node.lineno, name, ast.fix_missing_locations(changed)


def _not_run(top: ast.AST) -> Iterator[ast.AST]:
    """Annotations, docstrings and messages, which no test can be asked to tell apart."""
    parts = [getattr(top, name, None) for name in ("annotation", "returns")]
    parts += [top] if isinstance(top, ast.JoinedStr) else []
    for part in parts:
        if isinstance(part, ast.AST):
            yield from ast.walk(part)


def _changes(node: ast.AST) -> Iterator[tuple[str, object]]:
    if isinstance(node, ast.BinOp | ast.BoolOp | ast.AugAssign) and type(node.op) in SWAPS:
        other = SWAPS[type(node.op)]
        yield f"{type(node.op).__name__} -> {other.__name__}", lambda n: setattr(n, "op", other())
    elif isinstance(node, ast.Compare) and type(node.ops[0]) in SWAPS:
        swapped = SWAPS[type(node.ops[0])]
        yield f"{type(node.ops[0]).__name__} -> {swapped.__name__}", lambda n: n.ops.__setitem__(0, swapped())
    elif isinstance(node, ast.Constant) and isinstance(node.value, bool):
        yield f"{node.value} -> {not node.value}", lambda n: setattr(n, "value", not n.value)
    elif isinstance(node, ast.Constant) and isinstance(node.value, int | float):
        yield f"{node.value} -> {node.value + 1}", lambda n: setattr(n, "value", n.value + 1)
    elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub | ast.Not):
        plus = ast.UAdd if isinstance(node.op, ast.USub) else None
        if plus:
            yield "-x -> +x", lambda n: setattr(n, "op", ast.UAdd())
    elif isinstance(node, ast.If | ast.IfExp):
        yield "if c -> if not c", lambda n: setattr(n, "test", ast.UnaryOp(ast.Not(), n.test))
    elif isinstance(node, ast.Return) and node.value is not None:
        yield "return x -> return None", lambda n: setattr(n, "value", ast.Constant(None))


class Finder:
    """Imports one module from a tree."""

    def __init__(self, name: str, path: Path, tree: ast.Module):
        self.name, self.path, self.tree = name, path, tree

    def find_spec(self, name: str, *_: object) -> object:
        if name != self.name:
            return None
        package = self.path.name == "__init__.py"
        spec = importlib.util.spec_from_loader(name, self, origin=str(self.path), is_package=package)
        if package:
            spec.submodule_search_locations = [str(self.path.parent)]
        return spec

    def create_module(self, spec: object) -> None:
        return None

    def exec_module(self, module: object) -> None:
        module.__file__ = str(self.path)
        exec(compile(self.tree, str(self.path), "exec"), module.__dict__)


def survives(name: str, path: Path, tree: ast.Module, tests: list[str]) -> bool:
    """Whether all tests pass with the changed module."""
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, 1)
            os.dup2(null, 2)
            sys.meta_path.insert(0, Finder(name, path, tree))
            status = int(pytest.main(["-x", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", *tests]))
        finally:
            os._exit(status)
    until = time.monotonic() + SECONDS
    while time.monotonic() < until:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return status == 0
        time.sleep(0.02)
    os.kill(pid, signal.SIGKILL)  # a loop without end is noticed, too
    os.waitpid(pid, 0)
    return False


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("file", type=Path)
    parser.add_argument("tests", nargs="+")
    parser.add_argument("--sample", type=int, default=0, help="so many of the changes, spread at random; 0 is all")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--lines", type=int, nargs="+", help="changes on these lines only")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    path = arguments.file.resolve()
    name = ".".join(path.with_suffix("").parts[path.parts.index("src") + 1 :]).removesuffix(".__init__")
    tree = ast.parse(path.read_text())
    assert survives(name, path, tree, arguments.tests), "the tests fail without any change"
    every = list(mutants(tree))
    chosen = [mutant for mutant in every if not arguments.lines or mutant[0] in arguments.lines]
    if arguments.sample:
        chosen = random.Random(arguments.seed).sample(chosen, min(arguments.sample, len(chosen)))
    left = 0
    for line, what, changed in sorted(chosen, key=lambda mutant: mutant[0]):
        if survives(name, path, changed, arguments.tests):
            left += 1
            print(f"survived  {path.name}:{line}  {what}", flush=True)
    print(f"{path.name}: {len(chosen) - left} of {len(chosen)} changes noticed ({len(every)} possible)", flush=True)


if __name__ == "__main__":
    main()
