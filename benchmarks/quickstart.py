"""The value of pretrained weights: the quickstart recipe with them and from random weights.

    python -m benchmarks.quickstart [--storage DIR] [--json] [--out FILE]

Runs `python -m trainer.run --config quickstart` twice, with and without `--model.weights none`, and compares the two summaries.
`--storage` uses existing runs (a finished run is not repeated).
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.common import add_arguments, described, finish, parser_of, run_process

VARIANTS = {"pretrained": [], "random": ["--model.weights", "none"]}
KEYS = ("test_accuracy", "test_count", "images_per_second", "seconds", "goodput", "weights_sha256", "accounting", "versions")
RUN_SECONDS = 3600.0


def with_and_without(recipe: str, storage: Path) -> dict[str, Any]:
    """Variant -> the key numbers of its summary, and by how many points of accuracy the pretrained one is ahead."""
    result: dict[str, Any] = {}
    for variant, flags in VARIANTS.items():
        name = f"{recipe}-{variant}"
        words = ["-m", "trainer.run", "--config", recipe, "--storage", str(storage), "--run", name, *flags]
        run_process(words, timeout_seconds=RUN_SECONDS).checked()
        summary = json.loads((storage / name / "summary.json").read_text())
        result[variant] = {key: summary[key] for key in KEYS}
    result["points_gained"] = 100 * (result["pretrained"]["test_accuracy"] - result["random"]["test_accuracy"])
    return result


def lines_of(result: dict[str, Any]) -> list[str]:
    lines = []
    for variant in VARIANTS:
        row = result[variant]
        seconds = row["accounting"]["steps"]
        lines.append(f"{variant:10}  test accuracy {row['test_accuracy']:.2%} of {row['test_count']}  {seconds:.0f} s of steps")
    return [*lines, f"{result['points_gained']:.1f} points above random weights"]


def parsed(name: str, doc: str | None) -> argparse.Namespace:
    parser = parser_of(name, doc)
    parser.add_argument("--storage", type=Path, help="where the runs are kept; a temporary folder if not given")
    add_arguments(parser)
    return parser.parse_args()


def main() -> int:
    options = parsed("quickstart", __doc__)
    result = described("quickstart", options)
    with tempfile.TemporaryDirectory() as temp:
        result |= with_and_without("quickstart", options.storage or Path(temp))
    return finish(result, options, lines_of(result))


if __name__ == "__main__":
    sys.exit(main())
