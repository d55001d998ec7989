"""`finetune predict RUN --out`, killed and resumed: each image answered once? And images/s against a bare loop over the same images.

    python -m benchmarks.inference RUN [--images 100000] [--rounds 3] [--kills 2] [--json] [--out FILE]

Images are those of the sample in the repository, again and again, as rows of Parquet files. First a job over --images of them is killed
--kills times, with all its processes, at moments spread over its work, and the same command goes on. Then, in turns, a job and the bare
loop answer a tenth of them. The bare loop is what anybody would write around the same model: read rows, decode, ask, keep the answers; one
process, the same threads. A job's seconds are those that its workers worked; what Ray and the imports take before that is told by itself,
as it does not grow with the images.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.dataset as pads
import pyarrow.parquet as pq
import torch

from benchmarks.common import PROJECT, add_arguments, described, finish, interleave, parser_of, spread, target
from cluster.machine import usable_cpus
from trainer.inference.inputs import encoded, listed
from trainer.inference.job import MAX_THREADS
from trainer.inference.plan import SUMMARY
from trainer.inference.predictor import Predictor
from trainer.runs.model_files import find_model

ROWS_A_GROUP = 500
ROWS_A_FILE = 10_000
PART = 10
OVERHEAD_GOAL = 0.10


def main() -> int:
    parser = parser_of("inference", __doc__)
    parser.add_argument("run", help="a finished run's folder, of images of any size")
    parser.add_argument("--images", type=int, default=100_000, help="(%(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="of the job and of the bare loop, in turns (%(default)s)")
    parser.add_argument("--kills", type=int, default=2, help="of the large job (%(default)s)")
    add_arguments(parser)
    options = parser.parse_args()
    result = described("inference", options) | measure(options)
    return finish(result, options, table(result))


def measure(options: argparse.Namespace) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(prefix="finetune-inference-") as folder:
        images, few = Path(folder, "images"), Path(folder, "few")
        made(images, options.images)
        made(few, options.images // PART)
        killed = kill_and_resume(options.run, images, Path(folder, "answers"), options.images, options.kills)
        rows: dict[str, list[Mapping[str, float]]] = {"job": [], "bare loop": []}
        for number, name in interleave(list(rows), options.rounds):
            row = job(options.run, few, Path(folder, f"answers-{number}")) if name == "job" else bare(options.run, few)
            rows[name].append(row)
    return judged(rows, killed, options.images)


def made(folder: Path, count: int) -> None:
    """`count` images of the sample as rows of Parquet files."""
    folder.mkdir()
    sample = pq.read_table(PROJECT / "dataio" / "samples" / "fashion_mnist" / "train-00000.parquet", columns=["image"])
    for number, start in enumerate(range(0, count, ROWS_A_FILE)):
        rows = min(ROWS_A_FILE, count - start)
        chosen = sample.take([(start + row) % sample.num_rows for row in range(rows)])
        named = chosen.append_column("key", pa.array([f"{start + row:08d}" for row in range(rows)]))
        pq.write_table(named, folder / f"{number:05d}.parquet", row_group_size=ROWS_A_GROUP)


def command_of(run: str, images: Path, out: Path) -> list[str]:
    return [sys.executable, "-m", "trainer.predict", run, str(images), "--out", str(out), "--fit", "stretch", "--json"]


def kill_and_resume(run: str, images: Path, out: Path, count: int, kills: int) -> dict[str, Any]:
    """Kill a job so many times, let it end, and look at what it wrote."""
    seconds, killed_at = 0.0, []
    for kill in range(1, kills + 1):
        began = time.monotonic()
        process = subprocess.Popen(
            command_of(run, images, out), cwd=PROJECT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
        )
        wanted = kill / (kills + 1) * count
        try:
            while process.poll() is None and (answered := rows_in(out)) < wanted:
                time.sleep(0.5)
            if process.poll() is not None:
                raise RuntimeError("the job ended before it was to be killed; ask for more --images")
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        killed_at.append(answered)
        seconds += time.monotonic() - began
    began = time.monotonic()
    last = subprocess.run(command_of(run, images, out), cwd=PROJECT, capture_output=True, text=True, check=False)
    seconds += time.monotonic() - began
    if last.returncode:
        raise RuntimeError(f"the job failed: {last.stderr[-2000:]}")
    found = pads.dataset(out).to_table(columns=["row", "key", "error"])
    keys = found.column("key").to_pylist()
    return {
        "killed_at_images": killed_at,
        "seconds": seconds,
        "answers": found.num_rows,
        "once_and_in_order": found.column("row").to_pylist() == list(range(count)) and keys == sorted(set(keys)) and len(keys) == count,
        "errors": found.num_rows - found.column("error").null_count,
        "last": json.loads(last.stdout),
    }


def rows_in(out: Path) -> int:
    return sum(pq.read_metadata(path).num_rows for path in out.glob("predictions-*.parquet"))


def job(run: str, images: Path, out: Path) -> dict[str, float]:
    began = time.monotonic()
    subprocess.run(command_of(run, images, out), cwd=PROJECT, check=True, capture_output=True)
    wall = time.monotonic() - began
    ended = json.loads((out / SUMMARY).read_text())
    worked = sum(ended["spent"].values()) / ended["workers"]
    return {"images_per_second": ended["here"] / worked, "worked_seconds": worked, "other_seconds": wall - worked}


def bare(run: str, images: Path) -> dict[str, float]:
    """In a process of its own, as the job's workers are."""
    done = subprocess.run([sys.executable, "-c", BARE, run, str(images)], cwd=PROJECT, check=True, capture_output=True, text=True)
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


BARE = "import sys; from benchmarks.inference import loop; loop(sys.argv[1], sys.argv[2])"


def loop(run: str, images: str) -> None:
    """The bare loop; prints its figures."""
    threads = max(1, min(MAX_THREADS, usable_cpus()))
    torch.set_num_threads(threads)
    predictor = Predictor(find_model(run), fit="stretch", device=torch.device("cpu"), threads=threads)
    found = listed([images])
    answers: list[Any] = []
    began = time.perf_counter()
    for batch in encoded(found.kind, found.places, found.column, found.table):
        answers += predictor.ask(predictor.decode([each.data for each in batch]), top=3)[0]
    seconds = time.perf_counter() - began
    print(json.dumps({"images_per_second": len(answers) / seconds, "worked_seconds": seconds, "other_seconds": 0.0}))


def judged(rows: Mapping[str, Sequence[Mapping[str, float]]], killed: Mapping[str, Any], count: int) -> dict[str, Any]:
    ratios = [ours["worked_seconds"] / theirs["worked_seconds"] for ours, theirs in zip(rows["job"], rows["bare loop"], strict=True)]
    cpus = usable_cpus()
    return {
        "images": count,
        "cpus": cpus,
        "killed": dict(killed),
        "cases": {
            name: {
                "images_per_second": spread([row["images_per_second"] for row in each]),
                "images_per_second_and_cpu": spread([row["images_per_second"] / cpus for row in each]),
                "other_seconds": spread([row["other_seconds"] for row in each]),
            }
            for name, each in rows.items()
        },
        "overhead": spread([ratio - 1 for ratio in ratios]),
        "rounds": {name: list(each) for name, each in rows.items()},
        "targets": [
            target("images not answered exactly once, in order, after the kills", 0 if killed["once_and_in_order"] else 1, at_most=0),
            target("images with an error", killed["errors"], at_most=0),
            target("workers' seconds over the bare loop's", sorted(ratios)[len(ratios) // 2] - 1, at_most=OVERHEAD_GOAL),
        ],
    }


def table(result: Mapping[str, Any]) -> str:
    killed = result["killed"]
    moments = ", ".join(f"{at:,}" for at in killed["killed_at_images"])
    once = "each once, in order" if killed["once_and_in_order"] else "NOT each once"
    lines = [
        f"{killed['answers']:,} answers after SIGKILL at {moments} of {result['images']:,}: {once}; {killed['seconds']:.0f} s in all",
        f"{'':<10} {'images/s':>10} {'a CPU':>8} {'before and after, s':>20}",
    ]
    for name, case in result["cases"].items():
        lines.append(
            f"{name:<10} {case['images_per_second']['median']:>10.0f} {case['images_per_second_and_cpu']['median']:>8.0f} "
            f"{case['other_seconds']['median']:>20.1f}"
        )
    return "\n".join([*lines, f"the job's workers take {100 * result['overhead']['median']:.1f} % more than the bare loop"])


if __name__ == "__main__":
    raise SystemExit(main())
