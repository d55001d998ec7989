"""Whole runs in this process: the rank's own story (trainer.rank.worker) over a real coordinator and store, without a driver, for the tests
of what survives a death. A life is one attempt; the next one goes on from the newest commit, as the driver's would.

`python -m tests.trainer.lives FOLDER FLAGS...` is a life on two workers: it forks the second rank.
"""

import json
import os
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
from PIL import Image
from torch import nn

from cluster.coordinator import Coordinator
from cluster.rank import Placement, RankContext
from cluster.storage import open_storage
from cluster.store import Commit, Store
from dataio.prepared import prepared
from dataio.selection import selected
from trainer.rank import evaluation, saving
from trainer.rank.worker import train_rank
from trainer.settings.cli import parse
from trainer.settings.fields import replaced
from trainer.settings.length import length_of
from trainer.settings.spec import ResumePoint, WorkerSpec
from trainer.settings.tree import RunConfig

PLACE = Placement(host="localhost", address="127.0.0.1", node_id="test", local_rank=0, local_world_size=1, device_index=None)


class Killed(Exception):
    """What a test raises to end a life."""


@dataclass(kw_only=True)
class Lives:
    """A run, and the lives that it has had. `evaluated` lists the (split, samples) of each evaluation that was made."""

    config: RunConfig
    results: list[dict[str, Any]] = field(default_factory=list)
    events: list[dict[str, Any]] = field(default_factory=list)
    evaluated: list[str] = field(default_factory=list)
    attempts: int = 0

    @classmethod
    def of(cls, folder: Path, *flags: str, workers: int = 1) -> "Lives":
        """The run of the command line `flags`, with its settings decided as the driver decides them."""
        config = parse([*flags, "--storage", str(folder / "runs"), "--run", "run", "--data.root", str(folder / "root")]).config
        for key, value in (("train.precision", "fp32"), ("train.channels_last", "off"), ("train.small_maps", "convolution")):
            config = replaced(config, key, value)
        config = replaced(config, "train.virtual_ranks", config.train.virtual_ranks or 2)
        config = replaced(config, "storage", open_storage(config.storage).uri)
        return cls(config=length_of(config, selected(prepared(config.data).dataset, config.data).manifest, workers=workers).config)

    @property
    def store(self) -> Store:
        return Store.open(open_storage(self.config.storage), self.config.run)

    @property
    def newest(self) -> Commit | None:
        return self.store.newest_valid(lambda path, reason: None)

    @property
    def result(self) -> dict[str, Any]:
        (result,) = self.results
        return result

    def spec(self, generation: int) -> WorkerSpec:
        start = self.newest
        return WorkerSpec(
            config=self.config,
            dataset=prepared(self.config.data).location,
            generation=generation,
            attempt=self.attempts,
            resume=ResumePoint.at(start) if start is not None else None,
            threads=1,
        )

    def live(self, until: Callable[[int, str], None] = lambda step, where: None, peer: Connection | None = None) -> bool:
        """One life. `until(step, where)` may raise Killed before (`evaluating`) and after (`evaluated`) an evaluation of the watched split,
        once a checkpoint is on its way (`saved`), and before the last evaluations (`final`). Returns whether the life came to its end by
        itself. `peer`: to the process that is rank 1."""
        self.attempts += 1
        storage = open_storage(self.config.storage)
        generation = self.store.claim_generation()
        coordinator = Coordinator(storage, self.config.run, generation, self.config.cluster.keep_checkpoints)
        spec = self.spec(generation)
        workers = 1 if peer is None else 2
        coordinator.start_attempt(self.attempts, workers, spec.resume.step if spec.resume else 0)
        if peer is not None:
            peer.send(spec)
            threading.Thread(target=answer, args=(peer, coordinator), daemon=True).start()
        context = RankContext(rank=0, world_size=workers, attempt=self.attempts, place=PLACE, files={}, call=self._call(coordinator))  # type: ignore[arg-type]
        run, final, evaluate, save = evaluation.Evaluator.run, evaluation.Evaluator.final, evaluation.evaluate, saving.Saver.save

        def watched(evaluator: evaluation.Evaluator, step: int, late: Any = ()) -> None:
            until(step, "evaluating")
            run(evaluator, step, late)
            until(step, "evaluated")

        def saved(saver: saving.Saver, step: int, late: Any) -> None:
            save(saver, step, late)
            until(step, "saved")

        def last(evaluator: evaluation.Evaluator, split: str, step: int, **more: Any) -> dict[str, Any]:
            until(step, "final")
            return final(evaluator, split, step, **more)

        def counted(*args: Any, **more: Any) -> Any:
            self.evaluated.append(more["split"])
            return evaluate(*args, **more)

        try:
            with (
                patch.object(evaluation.Evaluator, "run", watched),
                patch.object(evaluation.Evaluator, "final", last),
                patch.object(evaluation, "evaluate", counted),
                patch.object(saving.Saver, "save", saved),
            ):
                train_rank(spec, context)
        except Killed:
            return False
        finally:
            coordinator.close()
        return True

    def _call(self, coordinator: Coordinator) -> Callable[..., Any]:
        def call(method: str, *args: Any, **kwargs: Any) -> Any:
            if method == "put_result":
                self.results.append(args[1])
                return None
            if method == "event":
                self.events.append({"event": args[0], **kwargs})
            return getattr(coordinator, method)(*args, **kwargs)

        return call

    @property
    def folder(self) -> Path:
        return Path(open_storage(self.config.storage).at(self.config.run))

    def exported(self) -> dict[str, Any]:
        """model/config.json: its `file_sha256` is of the exported weights."""
        described: dict[str, Any] = json.loads((self.folder / "model" / "config.json").read_text())
        return described


def answer(peer: Connection, coordinator: Coordinator) -> None:
    """Carries the calls of another process to the coordinator."""
    with suppress(EOFError):
        while True:
            method, args, kwargs = peer.recv()
            peer.send(getattr(coordinator, method)(*args, **kwargs))


def be_rank_1(peer: Connection) -> None:
    lock = threading.Lock()

    def call(method: str, *args: Any, **kwargs: Any) -> Any:
        with lock:
            peer.send((method, args, kwargs))
            return peer.recv()

    spec: WorkerSpec = peer.recv()
    context = RankContext(rank=1, world_size=2, attempt=spec.attempt, place=PLACE, files={}, call=call)  # type: ignore[arg-type]
    train_rank(spec, context)


def main() -> None:
    ours, theirs = Pipe()
    if (child := os.fork()) == 0:  # first of all: nothing has a thread yet
        ours.close()
        be_rank_1(theirs)
        os._exit(0)
    theirs.close()
    lives = Lives.of(Path(sys.argv[1]), *sys.argv[2:])
    lives.attempts = 100
    assert lives.live(peer=ours)
    assert os.waitpid(child, 0)[1] == 0
    print(json.dumps({"result": lives.result, "exported": lives.exported(), "evaluated": lives.evaluated}))


def tiny(classes: int, image_size: tuple[int, int]) -> nn.Module:
    """A model of a user's own that learns in milliseconds; its BatchNorm gives it buffers."""
    return nn.Sequential(nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.BatchNorm1d(48), nn.Linear(48, classes))


TINY = ("--model.name", "tests.trainer.lives:tiny", "--model.weights", "none", "--workers", "1")


def write_images(root: Path, counts: dict[str, int], *, noise: float = 60.0, classes: int = 3) -> Path:
    """Folders of `counts` small images by split, `classes` of them, each of its class's colour with much noise."""
    draw = np.random.default_rng(0)
    colours = draw.integers(60, 190, (classes, 3))
    for split, count in counts.items():
        for number in range(count):
            label = number % classes
            path = root / split / f"class-{label}" / f"{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            pixels = colours[label] + draw.normal(0, noise, (8, 8, 3)) + draw.normal(0, noise / 2, 3)
            Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(path)
    return root


if __name__ == "__main__":
    main()
