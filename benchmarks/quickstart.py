"""The value of pretrained weights: the quickstart recipe with them and from random weights.

    python -m benchmarks.quickstart --json

Runs `python -m trainer.run --config quickstart` twice, with and without `--model.weights none`, and compares the two summaries.
`--storage` uses existing runs (a finished run is not repeated).
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

PROJECT = Path(__file__).resolve().parents[1]
VARIANTS = {"pretrained": [], "random": ["--model.weights", "none"]}
KEYS = ("test_accuracy", "test_count", "images_per_second", "seconds", "goodput", "weights_sha256", "accounting", "versions")


def measure(storage: Path) -> dict[str, Any]:
    """Variant -> the key numbers of its summary."""
    result: dict[str, Any] = {}
    for variant, flags in VARIANTS.items():
        name = f"quickstart-{variant}"
        command = [sys.executable, "-m", "trainer.run", "--config", "quickstart", "--storage", str(storage), "--run", name, *flags]
        subprocess.run(command, cwd=PROJECT, check=True, stdout=sys.stderr)
        summary = json.loads((storage / name / "summary.json").read_text())
        result[variant] = {key: summary[key] for key in KEYS}
    result["points_gained"] = 100 * (result["pretrained"]["test_accuracy"] - result["random"]["test_accuracy"])
    return result


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.quickstart", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--storage", type=Path, help="where the runs are kept; a temporary folder if not given")
    parser.add_argument("--hardware", default=f"{os.cpu_count()} CPUs", help="what to call this machine (%(default)s)")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temp:
        result = measure(args.storage or Path(temp)) | {
            "hardware": args.hardware,
            "python_command": "python -m benchmarks.quickstart --json",
        }
    if args.json:
        print(json.dumps(result, indent=1))
    else:
        for variant in VARIANTS:
            row = result[variant]
            seconds = row["accounting"]["steps"]
            print(f"{variant:10}  test accuracy {row['test_accuracy']:.2%} of {row['test_count']}  {seconds:.0f} s of steps")
        print(f"{result['points_gained']:.1f} points gained")
    return 0


if __name__ == "__main__":
    sys.exit(main())
