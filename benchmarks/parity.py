"""Our `article` recipe against the tutorial in plain PyTorch (`benchmarks/article.py`): the same losses, step by step?

    python -m benchmarks.parity --source /usr/share/datasets/fashion-mnist --json

It writes the source's images in CIFAR-10's own archive format (32x32 RGB, five training batches), runs `python -m trainer.run --config
article` on that archive for some steps, and `benchmarks.article` from the same initial weights on the same batches. This module cuts those
batches from the archive with the slow reference of `dataio.codecs.image.augment`, so that the two programs do not share an input pipeline.
"""

import argparse
import io
import json
import os
import pickle
import platform
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch

from cluster.preflight import versions
from dataio.codecs.image.augment import draw, reference
from dataio.order import Order
from dataio.parquet import open_dataset
from dataio.prepared import prepare
from dataio.sources import open_source
from trainer.models.vision import build_model
from trainer.settings.toml import load
from trainer.settings.tree import RunConfig

PROJECT = Path(__file__).resolve().parents[1]
FOLDER = "cifar-10-batches-py"


def write_cifar_archive(path: Path, source: str, *, train: int, test: int) -> None:
    """Writes the source's first `train` and `test` images (28x28 gray gets a black border of 2 pixels) as cifar-10-python.tar.gz."""
    from PIL import Image

    images = open_source(source, root=path.parent, test_fraction=0.1)

    def pixels(split: str, count: int) -> tuple[np.ndarray, list[int]]:
        rows, labels = np.zeros((count, 3, 32, 32), np.uint8), []
        for row, sample in zip(rows, _first(images.samples(split), count), strict=True):
            image = np.asarray(Image.open(io.BytesIO(sample.data)).convert("RGB"))  # (H, W, 3)
            top, left = (32 - image.shape[0]) // 2, (32 - image.shape[1]) // 2
            row[:, top : top + image.shape[0], left : left + image.shape[1]] = image.transpose(2, 0, 1)
            labels.append(int(sample.label))
        return rows, labels

    batches: dict[str, Any] = {"batches.meta": {"label_names": list(images.classes), "num_cases_per_batch": train // 5, "num_vis": 3072}}
    rows, labels = pixels("train", train)
    for number in range(5):
        part = slice(train // 5 * number, train // 5 * (number + 1))
        batches[f"data_batch_{number + 1}"] = _batch(f"training batch {number + 1} of 5", rows[part], labels[part])
    batches["test_batch"] = _batch("testing batch 1 of 1", *pixels("test", test))
    with tarfile.open(path, "w:gz", compresslevel=1) as archive:
        for name, content in batches.items():
            data = pickle.dumps(content, protocol=2)
            member = tarfile.TarInfo(f"{FOLDER}/{name}")
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))


def _batch(label: str, rows: np.ndarray, labels: list[int]) -> dict[bytes, Any]:
    names = [f"image_{label.replace(' ', '_')}_{i:05d}.png".encode() for i in range(len(rows))]
    return {b"batch_label": label.encode(), b"labels": labels, b"data": rows.reshape(len(rows), 3072), b"filenames": names}


def _first(samples: Iterator[Any], count: int) -> Iterator[Any]:
    for _, sample in zip(range(count), samples, strict=False):
        yield sample


def archive_images(path: Path) -> np.ndarray:
    """(N, 32, 32, 3) uint8 training images of an archive written by this module, in its order."""
    parts = {}
    with tarfile.open(path) as archive:
        for member in archive:
            if "data_batch_" in member.name:
                file = archive.extractfile(member)
                assert file is not None
                parts[member.name] = pickle.load(file)[b"data"]
    stacked = np.concatenate([parts[name] for name in sorted(parts)])
    return np.ascontiguousarray(stacked.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1))


def compare(archive: Path, folder: Path, *, steps: int, threads: int) -> dict[str, Any]:
    """Runs both on `archive`; returns their losses and the largest difference."""
    overrides = {"path": str(archive), "root": str(folder / "data")}
    config = load("article", RunConfig())
    flags = [
        "--config",
        "article",
        "--model.weights",
        "none",
        "--train.max-steps",
        str(steps),
        "--train.virtual-ranks",
        "1",
        "--workers",
        "1",
    ]
    flags += ["--data.path", overrides["path"], "--data.root", overrides["root"], "--storage", str(folder / "runs"), "--run", "article"]
    flags += ["--cluster.threads-per-worker", str(threads)]
    ours = subprocess.run([sys.executable, "-m", "trainer.run", *flags], cwd=PROJECT, capture_output=True, text=True, check=False)
    if ours.returncode:
        raise RuntimeError(f"trainer.run ended with {ours.returncode}:\n{ours.stdout}{ours.stderr}")
    curves = pq.read_table(folder / "runs" / "article" / "curves.parquet").sort_by("step")
    assert curves["step"].to_pylist() == list(range(steps))

    import dataclasses

    model_config = dataclasses.replace(config.model, weights="none")
    torch.save(build_model(model_config, classes=10, seed=config.train.seed, image_hw=(32, 32)).state_dict(), folder / "initial.pth")
    dataset = open_dataset(prepare(dataclasses.replace(config.data, **overrides)))
    split = dataset.split("train")
    order = Order(seed=config.train.seed, fingerprint=dataset.manifest.fingerprint, count=split.count, batch_size=100, virtual_ranks=1)
    images, labels = archive_images(archive), split.labels()
    pixels, targets = [], []
    for step in range(steps):
        epoch, step_in_epoch = divmod(step, order.steps_per_epoch)
        ids = order.samples(epoch, step_in_epoch, 0)
        drawn = draw(seed=config.train.seed, epoch=epoch, ids=ids, pad=config.data.pad, flip=config.data.flip)
        pixels.append(reference(images[ids], drawn, config.data.pad))
        targets.append(labels[ids])
    np.savez(folder / "batches.npz", images=np.stack(pixels), labels=np.stack(targets))
    peer = subprocess.run(
        [
            *(sys.executable, "-m", "benchmarks.article", "--data", str(archive), "--weights", str(folder / "initial.pth")),
            *("--batches", str(folder / "batches.npz"), "--steps", str(steps), "--threads", str(threads), "--json"),
        ],
        cwd=PROJECT,
        capture_output=True,
        text=True,
        check=True,
    )
    theirs = json.loads(peer.stdout)["losses"]
    mine = curves["train_loss"].to_pylist()
    return {
        "images": split.count,
        "steps": steps,
        "ours": mine,
        "tutorial": theirs,
        "largest_difference": max(abs(a - b) for a, b in zip(mine, theirs, strict=True)),
    }


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.parity", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--source", default="/usr/share/datasets/fashion-mnist", help="a source of dataio.convert (%(default)s)")
    parser.add_argument("--train", type=int, default=60_000)
    parser.add_argument("--test", type=int, default=10_000)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temp:
        archive = Path(temp) / "cifar-10-python.tar.gz"
        write_cifar_archive(archive, args.source, train=args.train, test=args.test)
        result = compare(archive, Path(temp), steps=args.steps, threads=args.threads)
    result |= {"command": " ".join(sys.argv), "versions": versions(), "hardware": f"{platform.machine()}, {os.cpu_count()} CPUs"}
    if args.json:
        print(json.dumps(result, indent=1))
    else:
        for step, (mine, theirs) in enumerate(zip(result["ours"], result["tutorial"], strict=True)):
            print(f"step {step:3d}  ours {mine:.7f}  tutorial {theirs:.7f}  difference {abs(mine - theirs):.1e}")
        print(f"largest difference {result['largest_difference']:.1e}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
