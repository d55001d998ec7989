"""Rewrites the table of results in benchmarks/README.md from benchmarks/results/*.json: `python -m benchmarks.readme [--check]`.

It changes only the text between the two markers. A result is a file that a benchmark wrote with --out; its `targets` become lines. Run it
after a measurement. --check returns exit status 1 if the page does not match the files.
"""

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).resolve().parent
BEGIN, END = "<!-- results: begin (python -m benchmarks.readme) -->", "<!-- results: end -->"
HEADER = ("| benchmark | what | measured | target | | hardware | commit |", "|---|---|---|---|---|---|---|")


def rows_of(name: str, result: Mapping[str, Any]) -> list[str]:
    """The table's lines for one result: one for each of its targets, or one that names the file if it has none."""
    hardware, commit = _cell(str(result.get("hardware", "")) or "unknown"), _cell(str(result.get("commit", "")) or "not said")
    targets = result.get("targets")
    if not isinstance(targets, list) or not targets:
        return [f"| `{name}` | [figures](results/{name}.json) | | | | {hardware} | {commit} |"]
    lines = []
    for row in targets:
        word = {True: "met", False: "**missed**", None: "undecided" if row["measured"] is not None else "not measured"}[row["met"]]
        measured = _number(row["measured"])
        if row.get("interval"):
            low, high = row["interval"]
            measured += f" ({_number(low)} to {_number(high)})"
        sign = {">=": "≥", "<=": "≤"}[row["rule"]]
        lines.append(f"| `{name}` | {_cell(row['name'])} | {measured} | {sign} {_number(row['goal'])} | {word} | {hardware} | {commit} |")
    return lines


def table(results: Mapping[str, Mapping[str, Any]]) -> str:
    lines = [*HEADER]
    for name in sorted(results):
        lines += rows_of(name, results[name])
    return "\n".join(lines)


def rewritten(page: str, results: Mapping[str, Mapping[str, Any]]) -> str:
    """`page` with a new table between the markers; ValueError if a marker is missing, repeated or out of order."""
    if page.count(BEGIN) != 1 or page.count(END) != 1 or page.index(BEGIN) > page.index(END):
        raise ValueError(f"the page needs the line {BEGIN!r}, and after it {END!r}, each once; put them where the table belongs")
    before, _, rest = page.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n{table(results)}\n{END}{after}"


def read_results(folder: Path) -> dict[str, Mapping[str, Any]]:
    """File name without its suffix -> result, for files with one JSON object."""
    found = {path.stem: json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))}
    return {name: result for name, result in found.items() if isinstance(result, dict)}


def _number(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.readme", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--page", type=Path, default=FOLDER / "README.md")
    parser.add_argument("--results", type=Path, default=FOLDER / "results")
    parser.add_argument("--check", action="store_true", help="change nothing; exit status 1 if the page does not fit the results")
    options = parser.parse_args(argv)
    page = options.page.read_text()
    new = rewritten(page, read_results(options.results))
    if options.check:
        return int(new != page)
    options.page.write_text(new)
    return 0


if __name__ == "__main__":
    sys.exit(main())
