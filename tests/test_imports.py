"""Imports inside the package point down: neither its parts nor its files import each other in circles."""

import ast
from graphlib import CycleError, TopologicalSorter

import pytest
from conftest import ROOT

FILES = {
    ".".join(path.relative_to(ROOT / "src").with_suffix("").parts).removesuffix(".__init__"): path
    for path in (ROOT / "src" / "flowmo").rglob("*.py")
}


def imported(name: str) -> set[str]:
    """Modules of this package that a module imports anywhere, inside functions and for types too."""
    found = set()
    for node in ast.walk(ast.parse(FILES[name].read_text())):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name} imports by a relative name"
            paths = {f"{node.module}.{each.name}" for each in node.names}
            found |= {path if path in FILES else node.module for path in paths}
        elif isinstance(node, ast.Import):
            found |= {each.name for each in node.names}
    return found & FILES.keys()


@pytest.mark.parametrize("depth", [2, 9], ids=["parts", "files"])
def test_no_circles(depth):
    """Parts are the packages and files directly in ``flowmo``."""
    graph: dict[str, set[str]] = {}
    for name in FILES:
        node, *others = [".".join(each.split(".")[:depth]) for each in (name, *imported(name))]
        graph.setdefault(node, set()).update(set(others) - {node})
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(" imports ".join(reversed(error.args[1])))
    if depth == 2:
        assert graph["flowmo.model"] <= {f"flowmo.{below}" for below in ("config", "errors", "precision", "streams")}
