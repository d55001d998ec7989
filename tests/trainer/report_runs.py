"""Run folders as trainer.run leaves them, for the tests of report and comparison: all made by hand, but for the images."""

import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from dataio.config import DataConfig
from dataio.parquet import open_dataset
from trainer.rank.history import CURVE_SCHEMA
from trainer.runs.summary import accounting
from trainer.settings.toml import to_toml
from trainer.settings.tree import OptimConfig, RunConfig
from trainer.tasks.predictions import About, Predictions

SAMPLE = Path(__file__).resolve().parents[2] / "dataio" / "samples" / "fashion_mnist"
MANIFEST = open_dataset(SAMPLE).manifest
BEGAN = 1_700_000_000.0
STEPS = 160


def predictions_of(*, seed: int = 0, right: float = 0.8, step: int = STEPS, keys: Sequence[str] | None = None) -> Predictions:
    """Of the sample's 500 test images: about `right` of the answers are right."""
    split = open_dataset(SAMPLE).split("test")
    draw = np.random.default_rng(seed)
    labels = split.labels()
    answers = np.where(draw.random(split.count) < right, labels, draw.integers(0, 10, split.count))
    ids = np.arange(split.count)
    return Predictions(
        about=About(step=step, split="test", dataset_fingerprint=MANIFEST.fingerprint, count=split.count),
        ids=ids,
        keys=split.keys(ids) if keys is None else keys,
        columns={
            "label": labels.astype(np.int32),
            "prediction": answers.astype(np.int32),
            "confidence": (0.2 + 0.8 * draw.random(split.count)).astype(np.float32),
            "loss": draw.random(split.count).astype(np.float32),
        },
    )


def at(seconds: float, event: str, **fields: Any) -> dict[str, Any]:
    return {"time": BEGAN + seconds, "event": event, **fields}


def story(evaluated: Sequence[tuple[int, float]] = ((40, 0.5), (80, 0.7), (120, 0.75), (160, 0.8))) -> list[dict[str, Any]]:
    """Two drivers: the first loses a rank at step 57, stops at step 100; the second finishes. 200 s in all, and a night in between."""
    tests = {step: {"step": step, "epoch": step / 40, "test_loss": 1 - accuracy, "test_accuracy": accuracy} for step, accuracy in evaluated}
    night = 40_000.0
    first = [
        at(8, "run_started", process_started=BEGAN, command="python -m trainer.run --config quickstart"),
        at(10, "attempt_started", attempt=1, workers=2, start_step=0),
        *(at(14, "worker_registered", attempt=1, rank=rank, host=f"node-{rank}", pid=4711) for rank in (0, 1)),
        at(20, "training_started", attempt=1, step=0),
        at(60, "evaluation", **tests[40]),
        at(60, "checkpoint_committed", step=40),
        at(80, "attempt_failed", attempt=1, rank=1, kind="infrastructure", message="killed (SIGKILL)", last_step=57, lost_steps=17),
        at(80, "resumed", step=40),
        at(81, "attempt_started", attempt=2, workers=2, start_step=40),
        at(85, "training_started", attempt=2, step=40),
        at(112, "evaluation", **tests[80]),
        at(125, "checkpoint_committed", step=100),
        at(126, "run_stopped", step=100, signal="SIGTERM"),
    ]
    second = [
        at(night, "run_started", process_started=BEGAN + night - 5, command="python -m trainer.run --config quickstart"),
        at(night, "resumed", step=100),
        at(night + 1, "attempt_started", attempt=3, workers=2, start_step=100),
        *(at(night + 4, "worker_registered", attempt=3, rank=rank, host=f"node-{rank}", pid=4712) for rank in (0, 1)),
        at(night + 7, "training_started", attempt=3, step=100),
        at(night + 30, "evaluation", **tests[120]),
        at(night + 60, "evaluation", **tests[160]),
        at(night + 60, "checkpoint_committed", step=160),
        at(night + 62, "run_finished", steps=160),
    ]
    return first + second


def write_pictured(
    folder: Path,
    predictions: Predictions | None = None,
    *,
    config: RunConfig | None = None,
    events: list[dict[str, Any]] | None = None,
    **changes: Any,
) -> Path:
    """A finished run on the sample images, with everything that a report can show. `changes` are summary.json's."""
    folder.mkdir(parents=True)
    predictions = predictions or predictions_of()
    events = story() if events is None else events
    confusion = predictions.confusion(10)
    hits, support, claimed = confusion.diagonal(), confusion.sum(1), confusion.sum(0)
    history = {"step_seconds": 110.0, "data_wait_seconds": 4.0, "exchange_wait_seconds": 6.0, "evaluation_seconds": 9.0}
    ranks = [
        {
            "steps": 60.0,
            "images": 3000.0 * share,
            "step_seconds": 42.0,
            "data_wait_seconds": 1.0,
            "exchange_wait_seconds": wait,
            "checkpoint_stall_seconds": 0.5,
        }
        for share, wait in ((0.5, 12.0), (0.5, 2.0))
    ]
    summary = {
        "run": folder.name,
        "status": "finished",
        "steps": STEPS,
        "epochs": 4.0,
        "workers": 2,
        "virtual_ranks": 2,
        "restarts": 1,
        "quarantined": 1,
        "test_accuracy": float(hits.sum() / support.sum()),
        "test_loss": 0.61,
        "images_per_second": 71.0,
        "goodput": 0.52,
        "seconds": 193.0,
        "recovery_seconds": 5.0,
        "weights_sha256": "ab" * 32,
        "dataset_fingerprint": MANIFEST.fingerprint,
        "classes": list(MANIFEST.classes),
        "per_class": [
            {"recall": float(h / s), "precision": float(h / max(1, c)), "f1": float(2 * h / (s + c)), "support": int(s)}
            for h, s, c in zip(hits, support, claimed, strict=True)
        ],
        "confusion": confusion.tolist(),
        "accounting": accounting(events, history),
        "ranks": ranks,
        "versions": {"torch": "2.15.0", "ray": "2.60.0"},
        "command": "python -m trainer.run --config quickstart",
    } | changes
    (folder / "summary.json").write_text(json.dumps(summary))
    (folder / "predictions.parquet").write_bytes(predictions.to_parquet())
    (folder / "journal.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
    rows = [
        {
            "step": step,
            "epoch": step / 40,
            "attempt": 1 if step <= 40 else 2 if step <= 100 else 3,
            "time": BEGAN + 20 + step,
            "train_loss": 2.3 / (1 + step / 40),
            "learning_rate": 0.02,
            "images_per_second": 70.0 + step % 3,
            "data_wait_seconds": 0.01,
            "step_seconds": 0.7,
        }
        for step in range(1, STEPS + 1)
    ]
    sink = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows, schema=CURVE_SCHEMA), sink)
    (folder / "curves.parquet").write_bytes(sink.getvalue())
    bad = {"split": "train", "key": "train/00007", "reason": "truncated: no IEND", "sample_id": 7}
    (folder / "quarantine.jsonl").write_text(json.dumps(bad) + "\n")
    config = config or RunConfig(run=folder.name, data=DataConfig(path=str(SAMPLE)), optim=OptimConfig(lr=0.02))
    (folder / "config.toml").write_text(to_toml(config))
    return folder
