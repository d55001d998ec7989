"""Draws the picture of the packages in docs/design.md from the code's imports, so that its arrows cannot differ from the code.

    python -m deploy.picture            writes it between its two marks
    python -m deploy.picture --check    status 1 if the page holds another picture

A box is a package, or a subpackage of `trainer`; the command-line modules next to those share one box. Imports inside functions count
too. Imports for type checkers only do not count; import-linter, which decides which arrows are allowed (pyproject.toml), ignores them too.
An arrow that others imply is left out.
"""

import argparse
import ast
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

PROJECT = Path(__file__).resolve().parents[1]
PAGE = PROJECT / "docs" / "design.md"
BEGIN = "<!-- Written by python -m deploy.picture, from the imports. -->\n"
END = "<!-- The end of what deploy.picture writes. -->\n"
IN_ROOMS = "trainer"
PACKAGES = ("benchmarks", "deploy", IN_ROOMS, "cluster", "dataio")
Arrow = tuple[str, str]
"""(importing box, imported box), by their dotted names."""


def picture(project: Path) -> str:
    """The mermaid block for the packages below `project`."""
    boxes = boxes_of(project)
    arrows = reduced(arrows_of(project))
    rooms = [f'    {_id(box)}["{label}"]' for box, label in boxes.items() if box.startswith(IN_ROOMS)]
    others = [f'  {_id(box)}["{label}"]' for box, label in boxes.items() if not box.startswith(IN_ROOMS)]
    drawn = [f"  {_id(source)} --> {_id(target)}" for source, target in sorted(arrows)]
    return "\n".join(["```mermaid", "flowchart TD", f"  subgraph {IN_ROOMS}", *rooms, "  end", *others, *drawn, "```", ""])


def boxes_of(project: Path) -> dict[str, str]:
    """Box -> its text, for the packages that exist."""
    boxes: dict[str, str] = {}
    for package in PACKAGES:
        folder = project / package
        if not folder.is_dir():
            continue
        if package == IN_ROOMS:
            boxes[package] = ", ".join(sorted(path.stem for path in folder.glob("*.py") if path.stem != "__init__"))
            boxes |= {f"{package}.{room.parent.name}": room.parent.name for room in sorted(folder.glob("*/__init__.py"))}
        else:
            boxes[package] = package
    return boxes


def arrows_of(project: Path) -> set[Arrow]:
    """All arrows between boxes."""
    boxes = boxes_of(project)
    found: set[Arrow] = set()
    for package in {box.partition(".")[0] for box in boxes}:
        for path in sorted((project / package).rglob("*.py")):
            module = path.relative_to(project).with_suffix("").parts
            source = _box(".".join(module), boxes)
            assert source is not None, f"{path} lies in a package and has no box"
            found |= {(source, target) for name in _imported(path, module) if (target := _box(name, boxes)) not in (None, source)}
    return found


def reduced(arrows: Iterable[Arrow]) -> set[Arrow]:
    """The fewest arrows from which the same boxes can be reached from everywhere. Without a cycle this choice is unique."""
    kept = set(arrows)
    for arrow in sorted(kept):
        if arrow[1] in reachable(arrow[0], kept - {arrow}):
            kept.remove(arrow)
    return kept


def reachable(start: str, arrows: Iterable[Arrow]) -> set[str]:
    """All boxes that the arrows reach from `start`."""
    arrows = tuple(arrows)
    seen: set[str] = set()
    following = {start}
    while following:
        following = {target for source, target in arrows if source in following} - seen
        seen |= following
    return seen


def _imported(path: Path, module: Sequence[str]) -> Iterator[str]:
    """The dotted names that a file imports, anywhere in it except for type checkers only."""
    for node in _run_nodes(ast.parse(path.read_bytes(), str(path))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = module[: -node.level] if node.level else ()
            base = ".".join([*above, *([node.module] if node.module else [])])
            yield from (f"{base}.{alias.name}" for alias in node.names)


def _run_nodes(node: ast.AST) -> Iterator[ast.AST]:
    """`node` and all nodes below it, except those under `if TYPE_CHECKING:`."""
    yield node
    is_for_types = isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"
    for child in node.orelse if isinstance(node, ast.If) and is_for_types else ast.iter_child_nodes(node):
        yield from _run_nodes(child)


def _box(name: str, boxes: Mapping[str, str]) -> str | None:
    """The box of a module, or of a name in one; None if it is not ours."""
    package, *rest = name.split(".")
    room = f"{package}.{rest[0]}" if rest else package
    return room if room in boxes else package if package in boxes else None


def _id(box: str) -> str:
    """The box's name in mermaid; it must differ from the subgraph, which has the package's own name."""
    return "commands" if box == IN_ROOMS else box.replace(".", "_")


def _replaced(text: str, block: str) -> str:
    """`text` with `block` between the marks. ValueError unless each mark is there once, in order."""
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end) or BEGIN in rest or END in before + after:
        raise ValueError(f"the page lacks the two lines between which the picture stands: {BEGIN.strip()} and {END.strip()}")
    return f"{before}{BEGIN}{block}{END}{after}"


def main(arguments: Sequence[str] | None = None, *, page: Path = PAGE, project: Path = PROJECT) -> int:
    parser = argparse.ArgumentParser(prog="python -m deploy.picture", description="Draw the packages into docs/design.md.")
    parser.add_argument("--check", action="store_true", help="write nothing; status 1 where the page holds another picture")
    options = parser.parse_args(arguments)
    text = page.read_text()
    drawn = _replaced(text, picture(project))
    if not options.check:
        page.write_text(drawn)
        return 0
    if text == drawn:
        return 0
    print(f"{page} does not show the packages as they import each other; run python -m deploy.picture", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
