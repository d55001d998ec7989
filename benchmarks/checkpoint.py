"""What a checkpoint costs the steps: the stall of Checkpointer.save against torch.save + fsync of the same state, the stages after it, and
by how much its writing lengthens the steps that follow.

    python -m benchmarks.checkpoint [--rounds 15] [--turns 9] [--folder DIR] [--json FILE|-]

The state is ResNet-18 with a head of 10 classes and SGD's momentum: 89.5 MB, channels_last as the trainer keeps it. The rounds are
interleaved; each quantity is reported as median and quartiles. Stage, commit, verify and load are off the step path.

The lengthening: the same steps in turns without a checkpoint and after one. It is what the steps take more than those of the same turn
without one, from the end of `save` until the checkpoint is staged, and at least `--steps` steps; its share is of an epoch of 500 such steps
with one checkpoint. The steps are short (4 images), which makes the share large.
"""

import argparse
import json
import os
import platform
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torchvision
from torch import nn

from benchmarks.common import cpu_model, interleave, median_interval, spread, target, told_words, verdict
from cluster.checkpointer import Buffers, Checkpointer, Files
from cluster.storage import open_storage
from cluster.store import Receipt, Store
from trainer.learn.state import TrainState, weights_sha256

GOAL = 0.1
LENGTHENING_GOAL = 0.02
EPOCH_STEPS = 500
WITHOUT, AFTER = "no checkpoint", "a checkpoint"


def main() -> None:
    parser = argparse.ArgumentParser(description="The cost of a checkpoint.")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--turns", type=int, default=9, help="rounds of the lengthening; 0 leaves it out (%(default)s)")
    parser.add_argument("--steps", type=int, default=40, help="steps that are watched after a checkpoint, at least (%(default)s)")
    parser.add_argument("--threads", type=int, default=0, help="torch threads; 0 leaves torch's choice")
    parser.add_argument("--folder", default="", help="where to write; the file system decides the times. Empty: the temporary folder")
    parser.add_argument("--json", default="", help="write the result there; - prints it")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory(prefix="finetune-checkpoint-", dir=options.folder or None) as folder:
        result = measure(Path(folder), rounds=options.rounds)
        if options.turns:
            result |= lengthening(resnet18(), Path(folder) / "lengthening", turns=options.turns, steps=options.steps)
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
    for name, row in result.get("lengthening", {}).items():
        extra, share = row["extra_seconds"], row["share_of_an_epoch"]
        shown = f"{1e3 * extra['median']:8.2f} ms  ({1e3 * extra['low']:.2f} to {1e3 * extra['high']:.2f})"
        print(f"steps after it, {name}: {shown}, {share['median']:.2%} of {EPOCH_STEPS} steps")
    for row in result.get("targets", ()):
        print(verdict(row))
    if options.json:
        Path(options.json).write_text(text + "\n")


def measure(folder: Path, *, rounds: int) -> dict[str, Any]:
    """All measurements, JSON-able; `seconds` by stage."""
    model = resnet18()
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


def lengthening(model: nn.Module, folder: Path, *, turns: int, steps: int) -> dict[str, Any]:
    """What steps take more while a checkpoint is written; the second half of the module's docstring."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.001, momentum=0.9)
    step(model, optimizer)
    state, store = TrainState(model, optimizer), Store.open(open_storage(folder), "run")
    generation = store.claim_generation()
    staged = threading.Event()
    checkpointer = Checkpointer(
        stage=lambda number, name, buffers: store.stage(number, generation, name, buffers, attempt=1),
        ack=lambda number, receipts, meta: staged.set(),
    )
    taken: dict[str, list[tuple[float, int]]] = {WITHOUT: [], AFTER: []}
    for number, (turn, name) in enumerate(interleave(list(taken), turns + 1), start=1):
        for _ in range(3):
            step(model, optimizer)
        staged.clear()
        if name == WITHOUT:
            staged.set()
        else:
            checkpointer.save(number, lambda: files_of(state), {})
        done, begin = 0, time.perf_counter()
        while done < steps or not staged.is_set():
            step(model, optimizer)
            done += 1
        seconds = time.perf_counter() - begin
        checkpointer.wait()
        if turn:  # the first one allocates the buffers
            taken[name].append((seconds, done))
        store.prune(2, generation)
    checkpointer.close()
    return lengthened(taken)


def lengthened(taken: Mapping[str, Sequence[tuple[float, int]]]) -> dict[str, Any]:
    """From (seconds, steps) of each turn and case: the extra seconds, turn by turn, and their share of an epoch with one checkpoint."""
    step_seconds = [seconds / steps for seconds, steps in taken[WITHOUT]]
    rows = {}
    for name in (AFTER,):
        extra = [seconds - steps * alone for (seconds, steps), alone in zip(taken[name], step_seconds, strict=True)]
        shares = [more / (EPOCH_STEPS * alone) for more, alone in zip(extra, step_seconds, strict=True)]
        rows[name] = {
            "extra_seconds": median_interval(extra),
            "share_of_an_epoch": median_interval(shares),
            "steps_watched": spread([steps for _, steps in taken[name]]),
        }
    share = rows[AFTER]["share_of_an_epoch"]
    claim = f"share of an epoch of {EPOCH_STEPS} steps by which a checkpoint's writing lengthens the steps"
    return {
        "lengthening": rows,
        "step_seconds": spread(step_seconds),
        "targets": [target(claim, share["median"], at_most=LENGTHENING_GOAL, interval=(share["low"], share["high"]))],
    }


def resnet18() -> nn.Module:
    model: nn.Module = torchvision.models.resnet18(num_classes=10)
    return model.to(memory_format=torch.channels_last)


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
