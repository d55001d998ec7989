"""The shape of the code: nothing is too long to be read, and a package says what lives in it."""

import ast
from collections.abc import Iterator
from pathlib import Path

PROJECT = Path(__file__).resolve().parents[1]
PACKAGES = ("trainer", "dataio", "cluster", "deploy", "benchmarks")
LONGEST_FUNCTION = 90  # lines
MOST_ATTRIBUTES = 20  # of a class


def trees() -> Iterator[tuple[str, ast.Module]]:
    for package in PACKAGES:
        for path in sorted((PROJECT / package).rglob("*.py")):
            yield str(path.relative_to(PROJECT)), ast.parse(path.read_text())


def attributes(of: ast.ClassDef) -> set[str]:
    """What an instance holds: fields of a dataclass, and what any method assigns to self."""
    assigned = {
        node.attr
        for node in ast.walk(of)
        if isinstance(node, ast.Attribute)
        and isinstance(node.ctx, ast.Store)
        and isinstance(node.value, ast.Name)
        and node.value.id == "self"
    }
    return assigned | {ast.unparse(node.target) for node in of.body if isinstance(node, ast.AnnAssign)}


def is_settings(of: ast.ClassDef) -> bool:
    """A table of settings has as many rows as there are settings."""
    return of.name.endswith("Config")


def test_no_function_is_longer_than_a_reader_can_hold() -> None:
    long = [
        f"{name}:{node.lineno} {node.name} has {length} lines"
        for name, tree in trees()
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and (length := (node.end_lineno or node.lineno) - node.lineno + 1) > LONGEST_FUNCTION
    ]
    assert not long, "\n".join(long)


def test_no_class_has_more_attributes_than_a_reader_can_hold() -> None:
    wide = [
        f"{name}:{node.lineno} {node.name} has {len(held)} attributes: {', '.join(sorted(held))}"
        for name, tree in trees()
        for node in ast.walk(tree)
        if isinstance(node, ast.ClassDef) and not is_settings(node) and len(held := attributes(node)) > MOST_ATTRIBUTES
    ]
    assert not wide, "\n".join(wide)


def test_each_package_says_what_lives_there() -> None:
    silent = [
        name for name, tree in trees() if name.startswith(("trainer/", "dataio/", "cluster/")) and len(ast.get_docstring(tree) or "") < 20
    ]
    assert not silent, f"no docstring on top: {', '.join(silent)}"
