"""What a checkpoint costs the steps: the stall of Checkpointer.save against torch.save + fsync of the same state, and the stages after it.

    python -m benchmarks.checkpoint [--rounds 15] [--folder DIR] [--json FILE|-]

The state is ResNet-18 with a head of 10 classes and SGD's momentum: 89.5 MB, channels_last as the trainer keeps it. The rounds are
interleaved; each quantity is reported as median and quartiles. Stage, commit, verify and load are off the step path.
"""

import argparse
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torchvision
from torch import nn

from benchmarks.common import cpu_model, told_words
from cluster.checkpointer import Buffers, Checkpointer, Files
from cluster.storage import open_storage
from cluster.store import Receipt, Store
from trainer.learn.state import TrainState, weights_sha256

GOAL = 0.1


def main() -> None:
    parser = argparse.ArgumentParser(description="The cost of a checkpoint.")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=0, help="torch threads; 0 leaves torch's choice")
    parser.add_argument("--folder", default="", help="where to write; the file system decides the times. Empty: the temporary folder")
    parser.add_argument("--json", default="", help="write the result there; - prints it")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory(prefix="finetune-checkpoint-", dir=options.folder or None) as folder:
        result = measure(Path(folder), rounds=options.rounds)
    text = json.dumps(result, indent=1)
    if options.json == "-":
        print(text)
        return
    print(f"{result['hardware']}; load {result['load_average']}")
    print(f"{result['state_bytes'] / 1e6:.1f} MB; {result['rounds']} rounds; median (quartiles)")
    for name, row in result["seconds"].items():
        low, high = row["quartiles"]
        print(f"{name:22} {1e3 * row['median']:8.2f} ms  ({1e3 * low:.2f} to {1e3 * high:.2f})")
    for name in ("ratio", "ratio_to_save_alone"):
        print(f"{name:22} {result[name]:8.3f}     goal {GOAL}")
    if options.json:
        Path(options.json).write_text(text + "\n")


def measure(folder: Path, *, rounds: int) -> dict[str, Any]:
    """All measurements, JSON-able; `seconds` by stage."""
    model = torchvision.models.resnet18(num_classes=10).to(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.001, momentum=0.9)
    step(model, optimizer)
    state = TrainState(model, optimizer)
    store = Store.open(open_storage(folder), "run")
    generation = store.claim_generation()
    staged: list[Receipt] = []
    load_before = os.getloadavg()[0]
    seconds: dict[str, list[float]] = {
        name: [] for name in ("stall", "torch_save", "torch_save_fsync", "stage", "commit", "verify", "load")
    }

    def ack(step: int, receipts: list[Receipt], meta: dict[str, Any]) -> None:
        staged[:] = receipts

    def staged_in(step: int, taken: float, size_bytes: int) -> None:
        seconds["stage"].append(taken)

    checkpointer = Checkpointer(
        stage=lambda step, name, buffers: store.stage(step, generation, name, buffers, attempt=1), ack=ack, on_staged=staged_in
    )
    for number in range(-2, rounds):  # two to warm up: they allocate the private buffers
        step(model, optimizer)
        expected = weights_sha256(model)
        checkpointer.wait()
        stall = checkpointer.save(number + 3, lambda: files_of(state), {})
        checkpointer.wait()
        commit_seconds = timed(lambda number=number: store.commit(number + 3, generation, staged, {}, attempt=1))  # type: ignore[misc]
        reader = Store.open(store.storage, "run")
        verify_seconds = timed(lambda number=number, reader=reader: reader.load(number + 3, generation))  # type: ignore[misc]
        commit = reader.load(number + 3, generation)
        load_seconds = timed(lambda commit=commit: state.load(commit.read))  # type: ignore[misc]
        assert weights_sha256(model) == expected
        store.prune(2, generation)
        step(model, optimizer)
        save_seconds, fsync_seconds = torch_save(folder / "peer.pt", model, optimizer)
        for name, value in (
            ("stall", stall),
            ("commit", commit_seconds),
            ("verify", verify_seconds),
            ("load", load_seconds),
            ("torch_save", save_seconds),
            ("torch_save_fsync", save_seconds + fsync_seconds),
        ):
            seconds[name].append(value)
    rows = {name: summary(values[2:]) for name, values in seconds.items()}
    return {
        "hardware": f"{cpu_model()}, {os.cpu_count()} cores, {torch.get_num_threads()} torch threads",
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
        "command": ["python", "-m", "benchmarks.checkpoint", *told_words(sys.argv[1:])],
        "load_average": [round(load_before, 1), round(os.getloadavg()[0], 1)],  # other work makes every figure larger and wider
        "rounds": rounds,
        "state_bytes": sum(receipt.size_bytes for receipt in staged),
        "seconds": rows,
        "ratio": rows["stall"]["median"] / rows["torch_save_fsync"]["median"],
        "ratio_to_save_alone": rows["stall"]["median"] / rows["torch_save"]["median"],
        "goal": GOAL,
    }


def step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Does a real step, so that memory and caches hold the state as after a real one."""
    optimizer.zero_grad()
    images = torch.randn(4, 3, 64, 64).to(memory_format=torch.channels_last)
    nn.functional.cross_entropy(model(images), torch.arange(4)).backward()
    optimizer.step()


def files_of(state: TrainState) -> Files:
    snapshot = state.snapshot()

    def files() -> Iterator[tuple[str, Buffers]]:
        try:
            yield from snapshot.files().items()
        finally:
            snapshot.release()

    return files


def torch_save(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[float, float]:
    """(seconds of torch.save into the page cache, seconds of the fsync after it)"""
    begin = time.perf_counter()
    with path.open("wb") as file:
        torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
        file.flush()
        middle = time.perf_counter()
        os.fsync(file.fileno())
    return middle - begin, time.perf_counter() - middle


def timed(act: Callable[[], object]) -> float:
    begin = time.perf_counter()
    act()
    return time.perf_counter() - begin


def summary(values: list[float]) -> dict[str, Any]:
    low, median, high = statistics.quantiles(values, n=4, method="inclusive")
    return {"median": median, "quartiles": [low, high], "least": min(values), "most": max(values)}


if __name__ == "__main__":
    main()
