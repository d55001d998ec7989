"""What gradients sent in bfloat16 do to accuracy: the quickstart recipe with sums in float32 and in bfloat16.

    python -m benchmarks.compression [--virtual-ranks 5] [--seeds 0 1 2] [--epochs 2] [--json] [--out FILE] [-- SETTINGS OF trainer.run]

`train.reduce_dtype bf16` sends half the bytes and rounds every sum of gradients. The tree gives the same bits for any number of workers,
so one worker that carries all virtual ranks ends with the same weights as that many GPUs. Seeds are paired: both runs of a seed see the
same images in the same order. Two runs with the same dtype do not differ; the effect of a seed on the accuracy is shown as the scale.
"""

import json
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.common import add_arguments, described, finish, interleave, median_interval, parser_of, run_process, spread, target

EXACT, ROUNDED = "fp32", "bf16"
KEYS = ("test_accuracy", "test_loss", "test_count", "images_per_second", "weights_sha256")
GOAL_POINTS = 1.0
"""Percentage points of accuracy that may be lost, in the median over the seeds; one of 500 test images is 0.2."""


def measure(storage: Path, *, virtual_ranks: int, seeds: Sequence[int], epochs: int, extra: Sequence[str]) -> dict[str, Any]:
    """dtype -> the key numbers of the summaries, by seed."""
    found: dict[str, list[dict[str, Any]]] = {EXACT: [], ROUNDED: []}
    for number, dtype in interleave(list(found), len(seeds)):
        seed, run = seeds[number], f"{dtype}-{seeds[number]}"
        command = [
            *("-m", "trainer.run", "--config", "quickstart", "--storage", str(storage), "--run", run, "--train.seed", str(seed)),
            *("--workers", "1", "--train.virtual-ranks", str(virtual_ranks), "--train.reduce-dtype", dtype),
            *("--train.epochs", str(epochs), *extra),
        ]
        run_process(command, timeout_seconds=7200).checked()
        summary = json.loads((storage / run / "summary.json").read_text())
        found[dtype].append({"seed": seed} | {key: summary[key] for key in KEYS})
        print(f"seed {seed}, {dtype}: {summary['test_accuracy']:.2%}, loss {summary['test_loss']:.4f}", file=sys.stderr, flush=True)
    return found


def judged(rows: Mapping[str, Sequence[Mapping[str, Any]]]) -> dict[str, Any]:
    """Differences by seed; ValueError if the two runs of a seed are the same run, which would prove nothing."""
    for exact, rounded in zip(rows[EXACT], rows[ROUNDED], strict=True):
        if exact["weights_sha256"] == rounded["weights_sha256"]:
            raise ValueError(
                f"seed {exact['seed']}: both runs end in the same weights, so nothing was rounded; give 2 virtual ranks or more"
            )
    pairs = list(zip(rows[EXACT], rows[ROUNDED], strict=True))
    lost = [100 * (exact["test_accuracy"] - rounded["test_accuracy"]) for exact, rounded in pairs]
    points, losses = median_interval(lost), median_interval([rounded["test_loss"] - exact["test_loss"] for exact, rounded in pairs])
    goal = target("percentage points of accuracy lost to sums in bf16", points["median"], at_most=GOAL_POINTS, interval=_whole(points))
    return {
        "runs": {dtype: list(each) for dtype, each in rows.items()},
        "accuracy": {dtype: spread([row["test_accuracy"] for row in each]) for dtype, each in rows.items()},
        "points_lost": points,
        "test_loss_added": losses,
        "targets": [goal],
    }


def _whole(interval: Mapping[str, Any]) -> tuple[float, float]:
    return interval["low"], interval["high"]


def lines_of(result: Mapping[str, Any]) -> list[str]:
    lines = []
    for dtype, each in result["accuracy"].items():
        lines.append(f"{dtype}: test accuracy {each['median']:.2%} ({each['least']:.2%} to {each['most']:.2%} over {each['rounds']} seeds)")
    for name, key in (("points of accuracy lost to bf16", "points_lost"), ("test loss added by bf16", "test_loss_added")):
        each = result[key]
        lines.append(f"{name}: {each['median']:+.4f} ({each['low']:+.4f} to {each['high']:+.4f}, each seed with itself)")
    return lines


def main() -> int:
    parser = parser_of("compression", __doc__)
    parser.add_argument("--virtual-ranks", type=int, default=5, help="parts of a batch whose gradients are summed (%(default)s)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--epochs", type=int, default=2)
    add_arguments(parser)
    parser.add_argument("settings", nargs="*", help="further settings of trainer.run, after --")
    options = parser.parse_args()
    result = described("compression", options)
    with tempfile.TemporaryDirectory(prefix="finetune-compression-") as temp:
        rows = measure(
            Path(temp), virtual_ranks=options.virtual_ranks, seeds=options.seeds, epochs=options.epochs, extra=options.settings
        )  # fmt: skip
        result |= judged(rows)
    return finish(result, options, lines_of(result))


if __name__ == "__main__":
    sys.exit(main())
