"""Run folders as trainer.run leaves them, for the tests of report and comparison: all made by hand, but for the images."""

import io
import json
from collections.abc import Sequence
from dataclasses import replace
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
from trainer.tasks.explanations import AboutMaps, Explanations
from trainer.tasks.info import Measure, TaskInfo
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


def maps_of_all(**changes: Any) -> Explanations:
    """Maps of all test images: the place in the upper right corner."""
    about = AboutMaps(
        step=STEPS,
        split="test",
        dataset_fingerprint=MANIFEST.fingerprint,
        method="Grad-CAM",
        layer="<b>layer</b>",
        grid=(4, 4),
        image_hw=(28, 28),
    )
    maps = np.zeros((500, 4, 4), dtype=np.uint8)
    maps[:, 0, 3] = 255
    return Explanations(about=replace(about, **changes), ids=np.arange(500), maps=maps)


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
    """A finished classification on the sample images, with everything that a report can show. `changes` are summary.json's."""
    predictions = predictions or predictions_of()
    confusion = predictions.confusion(10)
    hits, support, claimed = confusion.diagonal(), confusion.sum(1), confusion.sum(0)
    said = {
        "test_accuracy": float(hits.sum() / support.sum()),
        "classes": list(MANIFEST.classes),
        "per_class": [
            {"recall": float(h / s), "precision": float(h / max(1, c)), "f1": float(2 * h / (s + c)), "support": int(s)}
            for h, s, c in zip(hits, support, claimed, strict=True)
        ],
        "confusion": confusion.tolist(),
    }
    return write_folder(folder, said | changes, predictions, config=config, events=story() if events is None else events)


def write_folder(
    folder: Path, said: dict[str, Any], predictions: Predictions, *, config: RunConfig | None = None, events: list[dict[str, Any]]
) -> Path:
    """A run's folder; `said` is what the task's evaluation adds to summary.json, or changes."""
    folder.mkdir(parents=True)
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
        "test_loss": 0.61,
        "images_per_second": 71.0,
        "goodput": 0.52,
        "seconds": 193.0,
        "recovery_seconds": 5.0,
        "weights_sha256": "ab" * 32,
        "dataset_fingerprint": MANIFEST.fingerprint,
        "accounting": accounting(events, history),
        "ranks": ranks,
        "versions": {"torch": "2.15.0", "ray": "2.60.0"},
        "command": "python -m trainer.run --config quickstart",
    } | said
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


# --- tasks that are no classification -------------------------------------------------------------------------------------------------

LABELS = ("boot", "sneaker", "bag", "shirt", "sleeves", "dark", "formal", "rare")
MULTILABEL = TaskInfo(
    name="multilabel",
    measures=(
        Measure(name="map", title="mAP"),
        Measure(name="micro_f1", title="Micro F1"),
        Measure(name="exact_match", title="Exact match"),
    ),
    panels=("labels", "examples"),
)
MULTITASK = TaskInfo(
    name="multitask",
    measures=(
        Measure(name="score", title="Score"),
        Measure(name="kind_accuracy", title="kind accuracy"),
        Measure(name="weight_mae", title="weight MAE", unit="number", higher_is_better=False),
    ),
    panels=("heads", "examples"),
)


def labels_of(*, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """(n, 8) int8 of 0 and 1, and the (n, 8) float32 probabilities that a fair model gives; no image has the last label."""
    draw = np.random.default_rng(seed)
    truth = (draw.random((500, len(LABELS))) < np.array([0.5, 0.4, 0.3, 0.3, 0.2, 0.1, 0.05, 0.0])).astype(np.int8)
    scores = 2.2 * (2.0 * truth - 1.0) + draw.normal(0, 1.0 + np.arange(len(LABELS)) / 3, truth.shape)
    return truth, (1 / (1 + np.exp(-scores))).astype(np.float32)


def label_entries(truth: np.ndarray, probabilities: np.ndarray, threshold: float = 0.5) -> list[dict[str, Any]]:
    """As an evaluation of several labels writes them, but for the average precision, which is made up."""
    given = probabilities >= threshold
    entries = []
    for index, name in enumerate(LABELS):
        hits = int((given[:, index] & (truth[:, index] == 1)).sum())
        support, predicted = int(truth[:, index].sum()), int(given[:, index].sum())
        entries.append(
            {
                "name": name,
                "support": support,
                "predicted": predicted,
                "average_precision": 0.97 - 0.09 * index if support else None,
                "precision": hits / predicted if predicted else None,
                "recall": hits / support if support else None,
                "f1": 2 * hits / (support + predicted) if support + predicted else None,
                "threshold": threshold,
            }
        )
    return entries


def tested(info: TaskInfo, *values: float) -> list[dict[str, Any]]:
    """The story of a run of that task: measures that come to `values`."""
    events = []
    for event in story():
        if event["event"] == "evaluation":
            share = 0.5 + event["step"] / 320
            del event["test_accuracy"]
            event |= {measure.key: value * share for measure, value in zip(info.measures, values, strict=True)}
        events.append(event)
    return events


def recorded(columns: dict[str, np.ndarray]) -> Predictions:
    about = About(step=STEPS, split="test", dataset_fingerprint=MANIFEST.fingerprint, count=500)
    ids = np.arange(500)
    return Predictions(about=about, ids=ids, keys=open_dataset(SAMPLE).split("test").keys(ids), columns=columns)


def write_multilabel(folder: Path, *, seed: int = 0, **changes: Any) -> Path:
    truth, probabilities = labels_of(seed=seed)
    losses = -np.log(np.where(truth == 1, probabilities, 1 - probabilities) + 1e-6).mean(1).astype(np.float32)
    values = (0.7321, 0.68, 0.31)
    said = {
        "test_accuracy": None,
        "task": MULTILABEL.to_json(),
        **{measure.key: value for measure, value in zip(MULTILABEL.measures, values, strict=True)},
        "test_count": 500,
        "labels": label_entries(truth, probabilities),
    } | changes
    found = recorded({"labels": truth, "probabilities": probabilities, "loss": losses})
    return write_folder(folder, said, found, events=tested(MULTILABEL, *values))


def write_multitask(folder: Path, *, seed: int = 0, **changes: Any) -> Path:
    """Heads `kind` (a label), `traits` (several labels) and `weight` (a number)."""
    draw = np.random.default_rng(seed)
    one = predictions_of(seed=seed)
    truth, probabilities = labels_of(seed=seed)
    weight = draw.normal(70, 12, 500).astype(np.float32)
    weight[:20] = np.nan
    said_weight = (70 + 0.8 * (np.nan_to_num(weight, nan=70) - 70) + draw.normal(0, 4, 500)).astype(np.float32)
    confusion = one.confusion(10)
    hits, support, claimed = confusion.diagonal(), confusion.sum(1), confusion.sum(0)
    accuracy = float(hits.sum() / support.sum())
    heads = {
        "kind": {
            "kind": "label",
            "weight": 1.0,
            "loss": 0.52,
            "count": 500,
            "measures": {"accuracy": accuracy},
            "details": {
                "classes": list(MANIFEST.classes),
                "confusion": confusion.tolist(),
                "per_class": [
                    {"recall": float(h / s), "precision": float(h / max(1, c)), "f1": float(2 * h / (s + c)), "support": int(s)}
                    for h, s, c in zip(hits, support, claimed, strict=True)
                ],
            },
        },
        "traits": {
            "kind": "labels",
            "weight": 0.5,
            "loss": 0.31,
            "count": 500,
            "measures": {"map": 0.73, "micro_f1": 0.68},
            "details": {"labels": label_entries(truth, probabilities)},
        },
        "weight": {
            "kind": "number",
            "weight": 2.0,
            "loss": 0.11,
            "count": 480,
            "measures": {"mae": 3.91, "rmse": 5.02, "r2": 0.87},
            "details": {},
        },
        "colour": {"kind": "label", "weight": 1.0, "loss": None, "count": 0, "measures": {}, "details": {}},
    }
    values = (0.8, accuracy, 3.91)
    said = {
        "test_accuracy": None,
        "task": MULTITASK.to_json(),
        **{measure.key: value for measure, value in zip(MULTITASK.measures, values, strict=True)},
        "test_count": 500,
        "heads": heads,
    } | changes
    found = recorded(
        {
            "kind_label": one.columns["label"],
            "kind_prediction": one.columns["prediction"],
            "kind_confidence": one.columns["confidence"],
            "traits_labels": truth,
            "traits_probabilities": probabilities,
            "weight_target": weight,
            "weight_prediction": said_weight,
            "loss": one.columns["loss"],
        }
    )
    return write_folder(folder, said, found, events=tested(MULTITASK, *values))
