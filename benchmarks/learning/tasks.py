"""The data on which features are measured: real images, made into a folder that trainer.run takes. Each seed has its own subset.

quickstart   the 2,000 images of Fashion-MNIST that are part of this repository, as in the recipe
longtail     Fashion-MNIST whose classes shrink by a factor of 100 from the first to the last (Cao et al. 2019); all are tested alike
noise        Fashion-MNIST of whose training labels 20 % are wrong, each any other class
few          ten images of each class of Fashion-MNIST, by the recipe photos and what its rule chooses for a hundred images
folder       pictures of many sizes in a folder for each class: --folder DIR, or Debian's tuxpaint-stamps-default, divided as in
             benchmarks/photos.py
"""

import gzip
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from benchmarks.common import FASHION_MNIST, SAMPLE
from benchmarks.photos import STAMPS, lay_out, pictures_of

Images = npt.NDArray[np.uint8]
Labels = npt.NDArray[np.uint8]
Arrays = dict[str, tuple[Images, Labels]]
"""Split (train, t10k) -> images (n, 28, 28), labels (n,)."""

LONGTAIL_FACTOR = 100
NOISE = 0.2
FEW = 10
NAMES = ("T-shirt", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot")


@dataclass(frozen=True, kw_only=True, slots=True)
class Sizes:
    """How much of the data is used. `small` is for two cores, `full` for a GPU."""

    largest_class: int
    train: int
    test: int
    flags: tuple[str, ...]
    is_small: bool = False


SMALL = Sizes(largest_class=500, train=1000, test=1000, flags=("--model.image-size", "32", "--train.epochs", "10"), is_small=True)
FULL = Sizes(largest_class=6000, train=60_000, test=10_000, flags=())


@dataclass(frozen=True, kw_only=True, slots=True)
class Task:
    """What is learned. `make(folder, seed, sizes, given)` returns the path for --data.path, or None if the data are not installed."""

    name: str
    measure: str
    """The measure by which a feature is judged (trainer.tasks.info.Measure.name)."""
    make: Callable[[Path, int, Sizes, Path | None], Path | None]
    flags: tuple[str, ...] = ("--config", "quickstart")
    small: tuple[str, ...] = ()
    """Flags that win over those of the small sizes."""

    def at(self, sizes: Sizes) -> tuple[str, ...]:
        return (*self.flags, *sizes.flags, *(self.small if sizes.is_small else ()))


def fashion_mnist() -> Arrays:
    """All images of Debian's package, or those of the repository."""
    if FASHION_MNIST.is_dir():
        return {split: (_idx(split, "images-idx3"), _idx(split, "labels-idx1")) for split in ("train", "t10k")}
    from benchmarks.bare import loader_of
    from dataio.parquet import open_dataset
    from trainer.settings.cli import parse

    dataset = open_dataset(SAMPLE)
    loader = loader_of(parse(["--data.path", str(SAMPLE), "--train.virtual-ranks", "1"]).config, dataset, torch.device("cpu"))
    found = {}
    for split, name in (("train", "train"), ("test", "t10k")):
        (batch,) = loader.evaluate(split, range(dataset.split(split).count), dataset.split(split).count)
        found[name] = batch.samples[:, 0].numpy(), batch.targets["label"].numpy().astype(np.uint8)
    return found


def longtail_counts(largest: int, classes: int, factor: float = LONGTAIL_FACTOR) -> list[int]:
    """Images of each class: they shrink from `largest` by `factor` in equal ratios, and no class has none."""
    return [max(1, round(largest * factor ** (-number / (classes - 1)))) for number in range(classes)]


def longtailed(arrays: Arrays, seed: int, sizes: Sizes) -> Arrays:
    images, labels = arrays["train"]
    random = np.random.default_rng(seed)
    # The classes' order is drawn too, so that a seed's result does not hang on which garment happens to be rare.
    order = random.permutation(len(NAMES))
    there = int(np.bincount(labels, minlength=len(NAMES)).min())
    kept = [
        random.permutation(np.flatnonzero(labels == label))[:count]
        for label, count in zip(order, longtail_counts(min(sizes.largest_class, there), len(NAMES)), strict=True)
    ]
    chosen = np.sort(np.concatenate(kept))
    return {"train": (images[chosen], labels[chosen]), "t10k": _first(arrays["t10k"], sizes.test)}


def noisy(arrays: Arrays, seed: int, sizes: Sizes) -> Arrays:
    images, labels = arrays["train"]
    random = np.random.default_rng(seed)
    chosen = random.permutation(len(labels))[: sizes.train]
    wrong = random.random(len(chosen)) < NOISE
    other = (labels[chosen] + random.integers(1, len(NAMES), len(chosen))) % len(NAMES)
    return {
        "train": (images[chosen], np.where(wrong, other, labels[chosen]).astype(np.uint8)),
        "t10k": _first(arrays["t10k"], sizes.test),
    }


def few(arrays: Arrays, seed: int, sizes: Sizes) -> Arrays:
    images, labels = arrays["train"]
    order = np.random.default_rng(seed).permutation(len(labels))
    chosen = np.concatenate([order[labels[order] == label][:FEW] for label in range(len(NAMES))])
    return {"train": (images[chosen], labels[chosen]), "t10k": _first(arrays["t10k"], sizes.test)}


def write_idx(folder: Path, arrays: Arrays) -> Path:
    """As dataio.convert reads them, with the classes' names."""
    folder.mkdir(parents=True, exist_ok=True)
    for split, (images, labels) in arrays.items():
        (folder / f"{split}-images-idx3-ubyte").write_bytes(struct.pack(">BBBB3I", 0, 0, 8, 3, *images.shape) + images.tobytes())
        (folder / f"{split}-labels-idx1-ubyte").write_bytes(struct.pack(">BBBBI", 0, 0, 8, 1, len(labels)) + labels.tobytes())
    (folder / "classes.txt").write_text("".join(f"{name}\n" for name in NAMES))
    return folder


def _first(pair: tuple[Images, Labels], count: int) -> tuple[Images, Labels]:
    return pair[0][:count], pair[1][:count]


def _idx(split: str, what: str) -> Images:
    data = gzip.decompress((FASHION_MNIST / f"{split}-{what}-ubyte.gz").read_bytes())
    shape = struct.unpack_from(f">{data[3]}I", data, 4)
    return np.frombuffer(data, np.uint8, offset=4 + 4 * len(shape)).reshape(shape)


def _sample(folder: Path, seed: int, sizes: Sizes, given: Path | None) -> Path | None:
    return SAMPLE


def _made(rule: Callable[[Arrays, int, Sizes], Arrays]) -> Callable[[Path, int, Sizes, Path | None], Path | None]:
    def make(folder: Path, seed: int, sizes: Sizes, given: Path | None) -> Path | None:
        return write_idx(folder, rule(fashion_mnist(), seed, sizes))

    return make


def _folder(folder: Path, seed: int, sizes: Sizes, given: Path | None) -> Path | None:
    if given is not None:
        return given
    if not STAMPS.is_dir():
        return None
    lay_out(folder, pictures_of(STAMPS))
    return folder / "ours"


TASKS: Mapping[str, Task] = {
    task.name: task
    for task in (
        Task(name="quickstart", measure="accuracy", make=_sample),
        Task(name="longtail", measure="balanced_accuracy", make=_made(longtailed)),
        Task(name="noise", measure="accuracy", make=_made(noisy)),
        Task(
            name="few",
            measure="accuracy",
            make=_made(few),
            flags=(
                *("--config", "photos", "--model.name", "timm/tf_efficientnet_lite0", "--model.weights", "package:efficientnet_lite0"),
                *("--model.stem", "native", "--model.interpolation", "bicubic", "--model.image-size", "224", "--train.precision", "fp32"),
                *("--data.batch-size", "16", "--optim.lr", "0.005", "--optim.warmup-fraction", "0.1", "--data.pad", "3"),
            ),
            small=("--model.image-size", "64", "--train.epochs", "20"),
        ),
        Task(
            name="folder",
            measure="balanced_accuracy",
            make=_folder,
            flags=(
                *("--config", "quickstart", "--data.image-size", "224", "--model.image-size", "224"),
                *("--data.fit", "crop", "--data.background", "white"),
            ),
            small=("--data.image-size", "64", "--model.image-size", "64"),
        ),
    )
}
