"""Images per CPU-second: our loader with each backend and cache, and the tutorial's (torchvision transforms on PIL images, DataLoader).

    python -m benchmarks.loader [--rounds 5] [--images 6000] [--data FOLDER] [--json] [--out FILE]

All make float32 batches, normalised on the CPU, from the same decoded images; "backend alone" stops at uint8, without labels or thread.
The rounds are interleaved. The best round of each counts, because other work on the machine only makes a round slower; the worst is shown
next to it. CPU time includes all threads and worker processes. The tutorial's data set holds decoded images in memory, as torchvision's
CIFAR10 does; ours with cache=none does more work, because it decodes PNG in every epoch. The ratios are to the tutorial's loader with its
two worker processes, and also to the same loader without workers.
"DALI, 40x40 and one kernel" is not one of our backends: images padded once, then a single CropMirrorNormalize, the fastest use of DALI
here.
"""

import argparse
import contextlib
import resource
import sys
import tempfile
import time
from collections.abc import Callable, Generator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

from benchmarks.bare import refuse
from benchmarks.common import (
    add_arguments,
    best_source,
    cifar_like,
    cpu_of_all,
    described,
    finish,
    interleave,
    parser_of,
    spread,
    target,
)
from dataio.codecs.image import augment
from dataio.codecs.image.backends import make_backend
from dataio.config import DataConfig
from dataio.loader import Loader
from dataio.order import Order
from dataio.parquet import open_dataset
from trainer.models.vision import Preprocess

PAD = 4
TUTORIAL, TUTORIAL_ALONE = "tutorial, 2 workers", "tutorial, 0 workers"
BACKENDS = ("numpy", "torch", "dali")
ONE_KERNEL = "DALI, 40x40 and one kernel"
TARGETS = {"numpy, cache=host": 40.0, "dali, cache=host": 12.0, "dali, cache=none": 3.0}
"""Multiple of the tutorial's images per CPU-second."""


def measure(data: str, *, images: int, batch_size: int, rounds: int) -> dict[str, Any]:
    """All measurements, JSON-able."""
    dataset = open_dataset(data)
    count = dataset.split("train").count
    order = Order(seed=0, fingerprint=dataset.manifest.fingerprint, count=count, batch_size=batch_size, virtual_ranks=1)
    steps = -(-images // batch_size)
    ours = {f"{backend}, cache={cache}": loader_of(data, order, backend, cache) for cache in ("host", "none") for backend in BACKENDS}
    resident = ours["numpy, cache=host"]
    decoded = np.concatenate([b.samples.permute(0, 2, 3, 1).numpy() for b in resident.evaluate("train", range(count), 500)])
    height, width = resident.image_size
    tutorial = Tutorial(decoded, dataset.split("train").labels())

    runs: dict[str, Callable[[], int]] = {
        TUTORIAL: lambda: consume(tutorial_batches(tutorial, batch_size, steps, workers=2)),
        TUTORIAL_ALONE: lambda: consume(tutorial_batches(tutorial, batch_size, steps, workers=0)),
        **{name: partial(our_round, loader, steps) for name, loader in ours.items()},
        ONE_KERNEL: partial(one_kernel_round, OneKernel(decoded, PAD, batch_size), order, steps),
    }
    runs |= {f"{backend} backend alone": partial(backend_round, backend, decoded, order, steps) for backend in BACKENDS}
    for name, run in runs.items():
        if not name.startswith("tutorial"):
            run()  # builds pipelines, and decodes images that stay decoded
    cpu_us: dict[str, list[float]] = {name: [] for name in runs}
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _, name in interleave(list(runs), rounds):
        began, cpu_began, children = time.perf_counter(), cpu_of_all(), cpu_of_children()
        seen = runs[name]()
        cpu_us[name].append((cpu_of_all() - cpu_began) / seen * 1e6)
        seconds[name].append((time.perf_counter() - began) / seen)
        if name == TUTORIAL and cpu_of_children() - children <= 0:
            raise RuntimeError(
                "the DataLoader's workers ended without their CPU time being counted; this benchmark needs the start method fork"
            )
    best = {name: min(values) for name, values in cpu_us.items()}
    loaders = {
        name: {
            "images_per_cpu_second": 1e6 / best[name],
            "worst_images_per_cpu_second": 1e6 / max(cpu_us[name]),
            "images_per_second": 1 / min(seconds[name]),
            "cpu_us_per_image": best[name],
            "ratio_to_tutorial": best[TUTORIAL] / best[name],
            "ratio_to_tutorial_without_workers": best[TUTORIAL_ALONE] / best[name],
            "cpu_us_per_image_of_rounds": spread(cpu_us[name]),
        }
        for name in runs
    }
    return {
        "image_size": f"{height}x{width}",
        "batch_size": batch_size,
        "images_a_round": images,
        "rounds": rounds,
        "loaders": loaders,
        "targets": [
            target(f"times the tutorial's images per CPU-second: {name}", loaders[name]["ratio_to_tutorial"], at_least=goal)
            for name, goal in TARGETS.items()
        ],
    }


# -- ours -----------------------------------------------------------------------------------------------------------------------------


def loader_of(data: str, order: Order, backend: str, cache: str) -> Loader:
    config = DataConfig(backend=backend, cache=cache, pad=PAD)  # type: ignore[arg-type]
    return Loader(open_dataset(data), config, order=order, virtual_ranks=range(1), device=torch.device("cpu"), seed=0, on_bad=refuse)


def our_round(loader: Loader, steps: int) -> int:
    return consume(normalised(loader, steps))


def normalised(loader: Loader, steps: int) -> Generator[torch.Tensor, None, None]:
    preprocess = Preprocess(mean=(0.5,) * 3, std=(0.5,) * 3)
    with contextlib.closing(loader.train(0, steps)) as batches:
        for (batch,) in batches:
            yield preprocess(batch.samples)


def backend_round(name: str, images: np.ndarray, order: Order, steps: int) -> int:
    """uint8 batches, not normalised, without thread or labels: the part that depends on the backend."""
    height, width = images.shape[1:3]
    backend = make_backend(name, height=height, width=width, pad=PAD, batch_size=order.batch_size, device=torch.device("cpu"))
    return sum(len(backend.batch(images, ids, drawn)) for ids, drawn in draws(order, steps))


def draws(order: Order, steps: int) -> Generator[tuple[np.ndarray, augment.Draw], None, None]:
    for step in range(steps):
        epoch, step_in_epoch = divmod(step, order.steps_per_epoch)
        ids = order.samples(epoch, step_in_epoch, 0)
        yield ids, augment.draw(seed=0, epoch=epoch, ids=ids, pad=PAD, flip=True)


# -- DALI at its fastest --------------------------------------------------------------------------------------------------------------


class OneKernel:
    """Images padded once, and a DALI pipeline that crops, mirrors and normalises them in one kernel: (n, 3, H, W) float32.

    CropMirrorNormalize takes the crop as a fraction of the spare size: dy / (2 * pad).
    """

    def __init__(self, images: np.ndarray, pad: int, batch_size: int) -> None:
        from nvidia.dali import Pipeline, fn, types

        height, width = images.shape[1:3]
        self._padded = np.pad(images, ((0, 0), (pad, pad), (pad, pad), (0, 0)))  # (N, H + 2 pad, W + 2 pad, 3)
        self._pad = pad
        self._pipeline = Pipeline(batch_size=batch_size, num_threads=1, device_id=None, seed=0, prefetch_queue_depth=1, exec_dynamic=True)
        with self._pipeline:
            pixels = fn.external_source(name="images", layout="HWC", dtype=types.UINT8, ndim=3)
            y, x = (fn.external_source(name=name, dtype=types.FLOAT, ndim=0) for name in ("y", "x"))
            mirror = fn.external_source(name="mirror", dtype=types.INT32, ndim=0)
            half = [127.5] * 3
            options = {"crop_pos_y": y, "crop_pos_x": x, "mirror": mirror, "mean": half, "std": half, "dtype": types.FLOAT}
            out = fn.crop_mirror_normalize(pixels, crop=(height, width), output_layout="CHW", **options)
            self._pipeline.set_outputs(out)
        self._pipeline.build()

    def batch(self, ids: np.ndarray, drawn: augment.Draw) -> torch.Tensor:
        self._pipeline.feed_input("images", self._padded[ids])
        for name, values in (("y", drawn.dy), ("x", drawn.dx)):
            self._pipeline.feed_input(name, values.astype(np.float32) / np.float32(2 * self._pad))
        self._pipeline.feed_input("mirror", drawn.flip.astype(np.int32))
        (out,) = self._pipeline.run()
        tensor: torch.Tensor = torch.utils.dlpack.from_dlpack(out.as_tensor())
        return tensor


def one_kernel_round(kernel: OneKernel, order: Order, steps: int) -> int:
    return sum(len(kernel.batch(ids, drawn)) for ids, drawn in draws(order, steps))


# -- the tutorial's -------------------------------------------------------------------------------------------------------------------


class Tutorial(Dataset[tuple[torch.Tensor, int]]):
    """Like torchvision's CIFAR10: an array of images in memory; each sample becomes a PIL image and passes the transforms."""

    def __init__(self, images: np.ndarray, labels: np.ndarray) -> None:
        self._images, self._labels = images, labels.tolist()
        self._transform = transforms.Compose(
            [
                transforms.RandomCrop(images.shape[1:3], padding=PAD),
                transforms.RandomHorizontalFlip(),
                transforms.ToTensor(),
                transforms.Normalize((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
            ]
        )

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        return self._transform(Image.fromarray(self._images[index])), self._labels[index]


def tutorial_batches(dataset: Tutorial, batch_size: int, steps: int, *, workers: int) -> Generator[torch.Tensor, None, None]:
    """Epoch after epoch, as in the tutorial: each epoch starts new worker processes."""
    context = "fork" if workers else None  # children of this process, so that their CPU time is known once they end
    batches = DataLoader(dataset, batch_size=batch_size, shuffle=True, num_workers=workers, multiprocessing_context=context)
    while True:
        for images, _ in batches:
            yield images
            steps -= 1
            if steps == 0:
                return


def consume(batches: Generator[torch.Tensor, None, None]) -> int:
    """Counts the images; whatever made them has ended when this returns."""
    with contextlib.closing(batches):
        return sum(len(batch) for batch in batches)


def cpu_of_children() -> float:
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def lines_of(result: dict[str, Any]) -> list[str]:
    lines = [f"batches of {result['batch_size']}, {result['image_size']}; best (and worst) of {result['rounds']} rounds"]
    for name, row in result["loaders"].items():
        lines.append(
            f"{name:28} {row['images_per_cpu_second']:>9,.0f} ({row['worst_images_per_cpu_second']:>9,.0f}) images/CPU s  "
            f"{row['cpu_us_per_image']:6.1f} us  {row['ratio_to_tutorial']:6.1f} x tutorial "
            f"({row['ratio_to_tutorial_without_workers']:.1f} x without workers)"
        )
    return lines


def main() -> int:
    parser: argparse.ArgumentParser = parser_of("loader", __doc__)
    parser.add_argument("--data", default="", help="a converted data set whose images share one size; empty: Fashion-MNIST at 32x32")
    parser.add_argument("--source", default=best_source(), help="where that comes from, a source of dataio.convert (%(default)s)")
    parser.add_argument("--images", type=int, default=6000, help="images a loader makes in a round")
    parser.add_argument("--batch-size", type=int, default=100, help="the tutorial's is 100")
    parser.add_argument("--rounds", type=int, default=5)
    add_arguments(parser)
    options = parser.parse_args()
    result = described("loader", options)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="finetune-loader-") as temp:
        data = options.data or str(cifar_like(Path(temp), options.source, train=2000, test=100)[1])
        result |= measure(data, images=options.images, batch_size=options.batch_size, rounds=options.rounds)
    return finish(result, options, lines_of(result))


if __name__ == "__main__":
    sys.exit(main())
