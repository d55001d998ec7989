"""The quickstart's job: EfficientNet-Lite0 with ImageNet weights on small images of clothes. Everybody's command."""

import sys
from collections.abc import Mapping
from pathlib import Path

from benchmarks.common import SAMPLE
from benchmarks.peers.contenders import OURS, PEERS, Contender, Job, Kind, of_journal, of_log, of_summary, our_run
from benchmarks.timm_weights import write_weights
from dataio.parquet import open_dataset

TUTORIAL_EPOCHS = 10
"""The tutorial's own; everybody else has the job's."""


def lay_out(folder: Path, counts: Mapping[str, int]) -> None:
    """The sample's first images of each split as PNG files: SPLIT/CLASS/NUMBER.png."""
    dataset = open_dataset(SAMPLE)
    for split, count in counts.items():
        source, written = dataset.split(split), 0
        labels = source.labels()
        for group in range(source.groups):
            for image in source.read_group(group).encoded:
                if written < count:
                    place = folder / split / dataset.manifest.classes[labels[written]].replace("/", "-")
                    place.mkdir(parents=True, exist_ok=True)
                    (place / f"{written:05d}.png").write_bytes(bytes(image))
                    written += 1
        if written < count:
            raise ValueError(f"the sample has {written} {split} images and not {count}; ask for fewer")


def contenders(job: Job, timm_script: Path | None, peers_python: str) -> dict[str, Contender]:
    """Everybody who can be run; timm needs its script."""
    known = [
        Contender(name=OURS, command=lambda place: our_run("quickstart", job, place), accuracies=of_journal),
        Contender(name="hf trainer", command=lambda place: own("hf_trainer", job, place, peers_python), accuracies=of_log),
        Contender(name="plain ray train", command=lambda place: own("plain_ray", job, place, sys.executable), accuracies=of_log),
        Contender(name="tutorial", command=lambda place: tutorial(job), accuracies=of_log),
    ]
    if timm_script is not None:
        known.insert(1, Contender(name="timm", command=lambda place: timm(job, place, timm_script), accuracies=of_summary))
    return {contender.name: contender for contender in known}


def own(script: str, job: Job, place: Path, python: str) -> list[str]:
    words = [python, str(PEERS / f"{script}.py"), "--images", str(job.data), "--weights", str(job.pretrained)]
    return [*words, "--output", str(place / "run"), "--epochs", str(job.epochs)]


def tutorial(job: Job) -> list[str]:
    words = [sys.executable, str(PEERS / "tutorial.py"), "--images", str(job.data), "--weights", str(job.pretrained)]
    return [*words, "--epochs", str(TUTORIAL_EPOCHS)]


def timm(job: Job, place: Path, script: Path) -> list[str]:
    """timm's training script with the quickstart's recipe, as far as it has it. Its checkpoint of the last epoch is resumed as its help
    says: `--resume`."""
    last = place / "run" / "last.pth.tar"
    return [
        *(sys.executable, str(script), "--data-dir", str(job.data), "--train-split", "train", "--val-split", "test"),
        *("--model", "tf_efficientnet_lite0", "--pretrained", "--pretrained-path", str(job.pretrained), "--num-classes", "10"),
        *("--input-size", "3", "96", "96", "--mean", "0.5", "0.5", "0.5", "--std", "0.5", "0.5", "0.5", "--crop-pct", "1.0"),
        *("--interpolation", "bicubic", "--train-interpolation", "bicubic", "--scale", "0.8", "1.0", "--ratio", "1.0", "1.0"),
        *("--color-jitter", "0", "-b", "50", "--opt", "sgd", "--momentum", "0.9", "--lr", "0.02", "--weight-decay", "5e-4"),
        *("--smoothing", "0.05", "--sched", "cosine", "--sched-on-updates", "--warmup-epochs", "1", "--warmup-lr", "0.001"),
        *("--epochs", str(job.epochs), "--cooldown-epochs", "0", "--device", "cpu", "--workers", "1"),
        *("--output", str(place), "--experiment", "run"),
        *(("--resume", str(last)) if last.exists() else ()),
    ]


KIND = Kind(
    recipe="quickstart",
    unit="images",
    peers=("timm", "hf trainer", "plain ray train", "tutorial"),
    accuracy=0.83,
    epochs=4,
    samples={"train": 2000, "test": 500},
    lay_out=lay_out,
    pretrained=lambda folder: write_weights(folder / "weights.pth"),
    contenders=contenders,
)
