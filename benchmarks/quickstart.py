"""The value of pretrained weights: the quickstart recipe with them and from random weights.

    python -m benchmarks.quickstart [--seeds 1] [--storage DIR] [--json] [--out FILE]

Runs `python -m trainer.run --config quickstart` with and without `--model.weights none`, in turns, and compares the summaries. `--storage`
uses existing runs (a finished run is not repeated).
"""

import argparse
import json
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.common import add_arguments, described, finish, mean_interval, parser_of, run_process

VARIANTS = {"pretrained": [], "random": ["--model.weights", "none"]}
KEYS = ("test_accuracy", "test_count", "images_per_second", "seconds", "goodput", "weights_sha256", "accounting", "versions")
RUN_SECONDS = 3600.0


def with_and_without(recipe: str, storage: Path, seeds: int) -> dict[str, Any]:
    """Variant -> its accuracy over all seeds and the key numbers of each run's summary; and by how many points the pretrained is ahead."""
    runs: dict[str, list[dict[str, Any]]] = {variant: [] for variant in VARIANTS}
    for seed in range(seeds):
        for variant, flags in VARIANTS.items():
            name = f"{recipe}-{variant}" + (f"-{seed}" if seed else "")
            words = ["-m", "trainer.run", "--config", recipe, "--storage", str(storage), "--run", name, "--train.seed", str(seed), *flags]
            run_process(words, timeout_seconds=RUN_SECONDS).checked()
            summary = json.loads((storage / name / "summary.json").read_text())
            runs[variant].append({key: summary[key] for key in KEYS})
    return joined(runs)


def joined(runs: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """`runs`: variant -> for each seed, the key numbers."""
    accuracies = {variant: [run["test_accuracy"] for run in each] for variant, each in runs.items()}
    gained = mean_interval([100 * (one - other) for one, other in zip(accuracies["pretrained"], accuracies["random"], strict=True)])
    return {
        variant: {"test_accuracy": statistics.fmean(accuracies[variant]), "test_count": each[0]["test_count"], "runs": each}
        for variant, each in runs.items()
    } | {"points_gained": gained["mean"], "interval": gained}


def lines_of(result: dict[str, Any]) -> list[str]:
    lines = []
    for variant in VARIANTS:
        row = result[variant]
        seconds = statistics.fmean(run["accounting"]["steps"] for run in row["runs"])
        all_seeds = " ".join(f"{run['test_accuracy']:.2%}" for run in row["runs"])
        lines.append(
            f"{variant:10}  test accuracy {row['test_accuracy']:.2%} of {row['test_count']} ({all_seeds})  {seconds:.0f} s of steps"
        )
    low, high = result["interval"]["low"], result["interval"]["high"]
    return [*lines, f"{result['points_gained']:.1f} points above random weights" + ("" if low is None else f" ({low:.1f} to {high:.1f})")]


def parsed(name: str, doc: str | None) -> argparse.Namespace:
    parser = parser_of(name, doc)
    parser.add_argument("--seeds", type=int, default=1, help="runs of each kind (%(default)s)")
    parser.add_argument("--storage", type=Path, help="where the runs are kept; a temporary folder if not given")
    add_arguments(parser)
    return parser.parse_args()


def main() -> int:
    options = parsed("quickstart", __doc__)
    result = described("quickstart", options)
    with tempfile.TemporaryDirectory() as temp:
        result |= with_and_without("quickstart", options.storage or Path(temp), options.seeds)
    return finish(result, options, lines_of(result))


if __name__ == "__main__":
    sys.exit(main())
