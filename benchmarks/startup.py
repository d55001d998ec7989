"""From the command to the end of the first step, itemised; `trainer.run` against plain Ray Train.

    python -m benchmarks.startup [--rounds 5] [--json] [--out FILE]

Both train ResNet-18 with the tutorial's stem on the same converted images in memory, with one worker, and start a Ray of their own. Ours is
`trainer.run` unchanged; an item ends when a line is printed or an event is in the journal. The peer is the shortest script that does the
same with Ray's TorchTrainer; it prints its own marks. Rounds are interleaved, after a warm-up of each that fills the page cache.
"""

import json
import os
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.common import (
    Process,
    add_arguments,
    best_source,
    cifar_like,
    described,
    finish,
    interleave,
    paired,
    parser_of,
    run_process,
    spread,
    target,
)

GOAL_SECONDS = 12.0
OURS, PEER = "trainer.run", "plain Ray Train"
LINES = {"starting a local Ray": "imports, settings, data set found, model checked", "run ": "ray.init, preflight"}
"""Beginning of a line of the driver -> the item that it ends."""
EVENTS = {
    "run_started": "ray.init, preflight",
    "attempt_started": "coordinator, fleet asked for",
    "worker_registered": "placement, agent, zygote's imports, the rank's process",
    "training_started": "data decoded, model, optimiser, process group",
    "first_step": "first step",
}
"""Event in the journal -> the item that it ends; an event that is not listed ends an item of its own name."""
SCRIPT = """
import json, os, sys, time
stamps = {"process": float(sys.argv[3])}
import ray, ray.train, torch
from ray.train import RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer, prepare_model
stamps["imports"] = time.time()

def train(config):
    import time
    stamps = {"placement, the worker's process and its process group": time.time()}
    import numpy, torch, torchvision
    stamps["torchvision imported"] = time.time()
    torch.set_num_threads(config["threads"])
    with numpy.load(config["data"], allow_pickle=False) as file:
        images, labels = torch.from_numpy(file["images"]), torch.from_numpy(file["labels"])
    model = torchvision.models.resnet18(weights=None, num_classes=10)
    model.conv1 = torch.nn.Conv2d(3, 64, 3, 1, 1, bias=False)
    model.maxpool = torch.nn.Identity()
    model = prepare_model(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.001, momentum=0.9)
    stamps["data read, model, optimiser"] = time.time()
    batch = images[: config["batch"]].float().div_(255).sub_(0.5).div_(0.5)
    loss = torch.nn.functional.cross_entropy(model(batch), labels[: config["batch"]])
    loss.backward()
    optimizer.step()
    stamps["first step"] = time.time()
    with open(config["log"], "w") as log:
        json.dump(stamps, log)

settings = json.loads(sys.argv[1])
ray.init(address="local", num_cpus=os.cpu_count(), include_dashboard=False, log_to_driver=False)
stamps["ray.init"] = time.time()
TorchTrainer(
    train, train_loop_config=settings, scaling_config=ScalingConfig(num_workers=1, use_gpu=torch.cuda.is_available()),
    run_config=RunConfig(name="peer", storage_path=sys.argv[2]),
).fit()
with open(settings["log"]) as log:
    stamps |= json.load(log)
print(json.dumps(stamps))
"""


def items_of_run(done: Process, began: float, journal: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Item -> seconds, in order; `began` is the unix time at which the process was started."""
    marks: list[tuple[float, str]] = []
    for seconds, line in done.lines:
        if name := next((item for start, item in LINES.items() if line.startswith(start)), None):
            marks.append((began + seconds, name))
    for event in journal:
        marks.append((float(event["time"]), EVENTS.get(event["event"], event["event"])))
        if event["event"] == "first_step":
            break
    return between(began, marks, until="first step")


def between(began: float, marks: Sequence[tuple[float, str]], *, until: str) -> dict[str, float]:
    """Seconds by the item that each mark ends, in order of time; repeated names are added up. Ends with `until`."""
    items: dict[str, float] = {}
    last = began
    for at, name in sorted(marks):
        items[name] = items.get(name, 0.0) + at - last
        last = at
        if name == until:
            return items
    raise ValueError(f"{until!r} never came; there were {', '.join(name for _, name in marks) or 'no marks'}")


def run_ours(folder: Path, data: Path, number: int, *, batch: int, threads: int, settings: Sequence[str]) -> dict[str, float]:
    run = f"round-{number}"
    began = time.time()
    done = run_process(
        [
            *("-m", "trainer.run", "--data.path", str(data), "--data.batch-size", str(batch), "--model.weights", "none"),
            *("--model.stem", "article", "--train.max-steps", "2", "--workers", "1", "--storage", str(folder / "runs"), "--run", run),
            *("--cluster.threads-per-worker", str(threads), *settings),
        ],
        timeout_seconds=600,
    ).checked()
    lines = (folder / "runs" / run / "journal.jsonl").read_text().splitlines()
    journal = sorted((json.loads(line) for line in lines), key=lambda event: float(event["time"]))
    return items_of_run(done, began, journal)


def run_peer(folder: Path, arrays: Path, number: int, *, batch: int, threads: int) -> dict[str, float]:
    script = folder / "peer.py"
    script.write_text(SCRIPT)
    settings = {"data": str(arrays), "threads": threads, "batch": batch, "log": str(folder / f"peer-{number}.json")}
    began = time.time()
    arguments = [str(script), json.dumps(settings), str(folder / f"peer-storage-{number}"), str(began)]
    done = run_process(arguments, timeout_seconds=600, environment={"RAY_TRAIN_V2_ENABLED": "1"}).checked()
    stamps = json.loads(next(line for _, line in reversed(done.lines) if line.startswith('{"process"')))
    return between(stamps.pop("process"), [(at, name) for name, at in stamps.items()], until="first step")


def measure(options: Any, folder: Path) -> dict[str, Any]:
    """All measurements, JSON-able."""
    from dataio.parquet import open_dataset

    archive, data = cifar_like(folder, options.source, train=options.images, test=100)
    arrays = folder / "images.npz"
    from benchmarks.parity import archive_images

    images = np.ascontiguousarray(archive_images(archive).transpose(0, 3, 1, 2))
    np.savez(arrays, images=images, labels=open_dataset(data).split("train").labels())
    rows: dict[str, list[dict[str, float]]] = {OURS: [], PEER: []}
    for number, name in interleave([OURS, PEER], options.rounds + 1):
        if name == OURS:
            row = run_ours(folder, data, number, batch=options.batch_size, threads=options.threads, settings=options.settings)
        else:
            row = run_peer(folder, arrays, number, batch=options.batch_size, threads=options.threads)
        print(f"round {number}, {name}: {sum(row.values()):.1f} s", file=sys.stderr, flush=True)
        if number:  # the first round reads everything from the disk
            rows[name].append(row)
    return judged(rows)


def judged(rows: Mapping[str, Sequence[Mapping[str, float]]]) -> dict[str, Any]:
    """Spread of each item and of the sums; difference of the sums, round by round."""
    cases: dict[str, Any] = {}
    for name, each in rows.items():
        items = list(dict.fromkeys(item for row in each for item in row))
        cases[name] = {
            "seconds": spread([sum(row.values()) for row in each]),
            "items": {item: spread([row.get(item, 0.0) for row in each]) for item in items},
            "rounds": [dict(row) for row in each],
        }
    sums = {name: [sum(row.values()) for row in each] for name, each in rows.items()}
    return {
        "cases": cases,
        "ours_minus_peer_seconds": paired(sums[OURS], sums[PEER]),
        "targets": [
            target("seconds from the command to the end of the first step", cases[OURS]["seconds"]["median"], at_most=GOAL_SECONDS)
        ],
    }


def lines_of(result: Mapping[str, Any]) -> list[str]:
    lines = ["seconds from the command to the end of the first step; median (least to most)"]
    for name, row in result["cases"].items():
        for item, seconds in {name: row["seconds"], **{f"  {item}": seconds for item, seconds in row["items"].items()}}.items():
            lines.append(f"{item:66} {seconds['median']:6.2f} ({seconds['least']:.2f} to {seconds['most']:.2f})")
    difference = result["ours_minus_peer_seconds"]
    lines.append(f"ours minus the peer's {difference['median']:+.2f} s ({difference['low']:+.2f} to {difference['high']:+.2f})")
    return lines


def main() -> int:
    parser = parser_of("startup", __doc__)
    parser.add_argument("--source", default=best_source(), help="a source of dataio.convert (%(default)s)")
    parser.add_argument("--images", type=int, default=2000, help="training images; a multiple of 5")
    parser.add_argument("--batch-size", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1, help="torch threads of each (%(default)s)")
    add_arguments(parser)
    parser.add_argument("settings", nargs="*", help="further settings of trainer.run, after --")
    options = parser.parse_args()
    result = described("startup", options)
    with tempfile.TemporaryDirectory(prefix="finetune-startup-") as temp:
        result |= measure(options, Path(temp)) | {"batch_size": options.batch_size, "threads": options.threads}
    return finish(result, options, lines_of(result))


if __name__ == "__main__":
    sys.exit(main())
