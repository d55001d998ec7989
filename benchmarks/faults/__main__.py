"""The fault campaign: injects every fault of docs/fault-tolerance.md into real runs, and checks what was promised.

    python -m benchmarks.faults [ROW ...] [--trials N] [--json] [--out FILE]

ROW is a part of a row's name. The rows: storage (benchmarks/faults/storage.py), the control plane (control.py, and sampled.py with Ray),
whole runs on S3 without their service (outages.py), signals (stops.py), a soak (soak.py), runs and nodes (runs.py), number of workers, and
plain Ray Train as the peer for the faults that it can handle. The whole campaign takes some hours on two idle cores. Exit status 1 means
that a promise did not hold.
"""

import argparse
import json
import os
import platform
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.faults import control, outages, ray_train, sampled, soak, stops, storage
from benchmarks.faults.harness import Nodes
from benchmarks.faults.runs import ROWS, Campaign
from cluster.versions import versions

WORKERS = {
    "workers 1, 2, 3, 4, fp32": ("--train.precision", "fp32"),
    "workers 1, 2, 3, 4, bf16": ("--train.precision", "bf16"),
}
RESNET = (
    *("--model.name", "resnet18", "--model.stem", "native", "--train.max-steps", "60", "--train.ema", "0.99", "--train.virtual-ranks", "4"),
    *("--data.batch-size", "20", "--cluster.threads-per-worker", "1", "--train.eval-every-epochs", "10"),
)
JOBS = 4
"""Trials of the control plane at a time. They sleep most of the time."""
PEER = {
    "plain Ray Train: kill, as it comes": ("kill", ""),
    "plain Ray Train: kill, health check 0.5 s": ("kill", "0.5"),
    "plain Ray Train: node lost": ("node", ""),
}


def say(text: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {text}", file=sys.stderr, flush=True)


def rows(wanted: list[str], trials: int, every: int) -> Iterator[dict[str, Any]]:
    def chosen(name: str) -> bool:
        return not wanted or any(part.lower() in name.lower() for part in wanted)

    for name, function in storage.CAMPAIGN.items():
        if chosen(f"storage {name}"):
            say(name)
            yield from function(trials)
    if any(chosen(name) for name in control.NAMES):
        with control.opened(jobs=JOBS, places=control.PLACES, say=say) as trials_of:
            yield from control.rows(trials_of, chosen, every=every, say=say)
    with tempfile.TemporaryDirectory(prefix="finetune-sampled-") as scratch:
        yield from sampled.rows(Path(scratch), chosen, say)
    with tempfile.TemporaryDirectory(prefix="finetune-outages-") as scratch:
        yield from outages.rows(Path(scratch), chosen, say)
    with tempfile.TemporaryDirectory(prefix="finetune-stops-") as scratch:
        yield from stops.rows(Path(scratch), trials, chosen, say)
    with tempfile.TemporaryDirectory(prefix="finetune-soak-") as scratch:
        yield from soak.rows(Path(scratch), chosen, say)
    runs = [name for name in ROWS if chosen(name)]
    workers = [name for name in WORKERS if chosen(name)]
    peers = [name for name in PEER if chosen(name)]
    if not (runs or workers or peers):
        return
    with tempfile.TemporaryDirectory(prefix="finetune-faults-") as scratch:
        nodes = Nodes(2, Path(scratch))
        try:
            if runs or workers:
                campaign = Campaign(nodes, Path(scratch) / "runs", say=say)
                for name in workers:
                    yield campaign.any_number_of_workers((*RESNET, *WORKERS[name]), (1, 2, 3, 4))
                for name in runs:
                    one, usual, promise = ROWS[name]
                    yield campaign.row(name, trials or usual, lambda number, one=one: one(campaign, number), promise)
            for name in peers:
                fault, interval = PEER[name]
                say(name)
                yield ray_train.measure(nodes, fault, trials or 3, health_interval_seconds=interval)
        finally:
            nodes.close()


def table(found: list[dict[str, Any]]) -> str:
    def shown(values: dict[str, float] | None) -> str:
        return f"{values['median']:.1f} ({values['min']:.1f}-{values['max']:.1f})" if values else ""

    lines = [f"{'fault':62} {'trials':>6} {'violations':>10} {'detected after, s':>18} {'training again after, s':>23}"]
    for row in found:
        times = f"{shown(row.get('detection_seconds')):>18} {shown(row.get('recovery_seconds')):>23}"
        lines.append(f"{row['fault'][:62]:62} {row['trials']:>6} {row['violations']:>10} {times}")
        if row["detail"]:
            lines.append(f"    {row['detail'][:300]}")
    return "\n".join(lines)


def markdown(found: list[dict[str, Any]]) -> str:
    def shown(values: dict[str, float] | None) -> str:
        return f"{values['median']:.1f} ({values['min']:.1f}-{values['max']:.1f})" if values else ""

    lines = ["| fault | trials | violations | detected after, s | training again after, s |", "|---|---|---|---|---|"]
    for row in found:
        times = f"{shown(row.get('detection_seconds'))} | {shown(row.get('recovery_seconds'))}"
        lines.append(f"| {row['fault']} | {row['trials']} | {row['violations']} | {times} |")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.faults", description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("rows", nargs="*", help="parts of the names of the rows; all of them if none is given")
    parser.add_argument("--trials", type=int, default=0, help="of each row; 0 takes the campaign's own numbers")
    parser.add_argument("--every", type=int, default=1, help="of the control plane, try each N-th call alone")
    parser.add_argument(
        "--hardware", default=f"{os.cpu_count()} CPUs, {platform.machine()}", help="what to call this machine (%(default)s)"
    )
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--out", type=Path, help="write the JSON there too, after each row")
    parser.add_argument("--show", type=Path, help="print the table of an earlier result, as Markdown, and do nothing else")
    options = parser.parse_args()
    if options.show:
        print(markdown(json.loads(options.show.read_text())["rows"]))
        return 0
    known = [
        *(f"storage {name}" for name in storage.CAMPAIGN),
        *control.NAMES,
        *sampled.NAMES,
        *outages.NAMES,
        stops.NAME,
        soak.NAME,
        *ROWS,
        *WORKERS,
        *PEER,
    ]
    for part in options.rows:
        if not any(part.lower() in name.lower() for name in known):
            parser.error(f"no row is called {part!r}; give a part of one of these names: {'; '.join(known)}")
    result: dict[str, Any] = {
        "command": "python -m benchmarks.faults",
        "hardware": options.hardware,
        "versions": versions(),
        "rows": [],
    }
    for row in rows(options.rows, options.trials, options.every):
        result["rows"].append(row)
        say(f"{row['fault']}: {row['trials']} trials, {row['violations']} violations in {row['seconds']:.0f} s {row['detail'][:200]}")
        if options.out:
            options.out.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1) if options.json else table(result["rows"]))
    return int(any(row["violations"] for row in result["rows"]))


if __name__ == "__main__":
    sys.exit(main())
