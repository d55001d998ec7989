"""The figures of the README's first screen stand in benchmarks/results, each in the file that its row links to."""

import json
import re
from pathlib import Path
from typing import Any

PROJECT = Path(__file__).resolve().parents[2]


def rows() -> list[list[str]]:
    """The cells of the table's rows."""
    text = (PROJECT / "README.md").read_text()
    table = text[text.index("| measured, in turns with its peer") : text.index("## Laptop")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()[2:] if line.startswith("|")]


def result(name: str) -> Any:
    return json.loads((PROJECT / "benchmarks" / "results" / f"{name}.json").read_text())


def fault(name: str) -> float:
    return float(next(row for row in result("faults")["rows"] if row["fault"] == name)["recovery_seconds"]["median"])


def median(name: str, *keys: str) -> float:
    found = result(name)
    for key in keys:
        found = found[key]
    return float(found["median"])


def expected() -> list[tuple[str, float, float, int]]:
    """For each row the file, our figure, the peer's, and the digits behind the point."""
    speed = ("speed", "1", "images_per_cpu_second")
    peers = [median("streaming", "contenders", name, *speed) for name in result("streaming")["contenders"] if not name.startswith("ours")]
    rate = ("images_per_second",)
    ours = median("end_to_end", "cases", "trainer.run", *rate)
    return [
        ("faults", fault("SIGKILL of a rank, again"), fault("plain Ray Train, as it comes: SIGKILL of a worker"), 1),
        ("startup", median("startup", "cases", "trainer.run", "seconds"), median("startup", "cases", "plain Ray Train", "seconds"), 1),
        ("checkpoint", 1000 * median("checkpoint", "seconds", "stall"), 1000 * median("checkpoint", "seconds", "torch_save_fsync"), 0),
        ("end_to_end", ours, median("end_to_end", "cases", "tutorial", *rate), 0),
        ("end_to_end", ours, median("end_to_end", "cases", "bare loop", *rate), 0),
        ("streaming", median("streaming", "contenders", "ours+dali", *speed), max(peers), 0),
    ]


def test_the_figures_of_the_first_screen_are_those_of_the_results() -> None:
    found = rows()
    assert len(found) == len(expected())
    for (what, ours, peer, hardware, link), (name, one, other, digits) in zip(found, expected(), strict=True):
        assert link == f"[{name}](benchmarks/results/{name}.json)"
        told = [float(re.match(r"[\d,.]*\d", cell)[0].replace(",", "")) for cell in (ours, peer)]  # type: ignore[index]
        assert told == [round(one, digits), round(other, digits)], what
        assert hardware in str(result(name)["hardware"]).replace("(R)", ""), what
