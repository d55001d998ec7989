"""Images per CPU-second: our loader with each backend and cache, and the tutorial's (torchvision transforms on PIL images, DataLoader).

    python -m benchmarks.loader [--rounds 3] [--images 6000] [--data FOLDER] [--json FILE|-]

All make float32 batches, normalised on the CPU, of the same decoded images; "backend alone" stops at uint8. The rounds are interleaved and
the best of each counts, as other work on the machine only ever makes a round slower. CPU time is that of all threads and worker processes.
The tutorial's data set holds decoded images in memory, as torchvision's CIFAR10 does; ours with cache=none does more, it decodes them in
every epoch.
"""

import argparse
import contextlib
import json
import os
import platform
import resource
import sys
import time
from collections.abc import Callable, Generator
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

from dataio import augment
from dataio.backends import make_backend
from dataio.config import DataConfig
from dataio.loader import Loader
from dataio.order import Order
from dataio.parquet import open_dataset
from dataio.quarantine import BadSample

SAMPLE = Path(__file__).parents[1] / "dataio" / "samples" / "fashion_mnist"
PAD = 4
TUTORIAL = "tutorial, 0 workers"


def main() -> None:
    parser = argparse.ArgumentParser(description="Images per CPU-second of the loaders.")
    parser.add_argument("--data", default=str(SAMPLE), help="a converted data set whose images share one size")
    parser.add_argument("--images", type=int, default=6000, help="images a loader makes in a round")
    parser.add_argument("--batch-size", type=int, default=100, help="the tutorial's is 100")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", default="", help="write the result there; - prints it")
    options = parser.parse_args()
    torch.set_num_threads(1)
    result = measure(options.data, images=options.images, batch_size=options.batch_size, rounds=options.rounds)
    text = json.dumps(result, indent=1)
    if options.json == "-":
        print(text)
        return
    print(f"{result['hardware']}; batches of {result['batch_size']}, {result['image_size']}; best (and worst) of {result['rounds']} rounds")
    for name, row in result["loaders"].items():
        print(
            f"{name:24} {row['images_per_cpu_second']:>9,.0f} ({row['worst_images_per_cpu_second']:>9,.0f}) images/CPU s  "
            f"{row['cpu_us_per_image']:6.1f} us  {row['ratio_to_tutorial']:6.1f} x tutorial"
        )
    if options.json:
        Path(options.json).write_text(text + "\n")


def measure(data: str, *, images: int, batch_size: int, rounds: int) -> dict[str, Any]:
    """Everything measured, JSON-able."""
    dataset = open_dataset(data)
    count = dataset.split("train").count
    order = Order(seed=0, fingerprint=dataset.manifest.fingerprint, count=count, batch_size=batch_size, virtual_ranks=1)
    steps = -(-images // batch_size)
    ours = {f"{backend}, cache={cache}": loader_of(data, order, backend, cache) for cache in ("host", "none") for backend in BACKENDS}
    resident = ours["numpy, cache=host"]
    decoded = np.concatenate([b.images.permute(0, 2, 3, 1).numpy() for b in resident.evaluate("train", range(count), 500)])
    height, width = resident.image_size
    tutorial = Tutorial(decoded, dataset.split("train").labels())

    runs: dict[str, Callable[[], int]] = {
        TUTORIAL: lambda: consume(tutorial_batches(tutorial, batch_size, steps, workers=0)),
        "tutorial, 2 workers": lambda: consume(tutorial_batches(tutorial, batch_size, steps, workers=2)),
        **{name: partial(our_round, loader, steps) for name, loader in ours.items()},
    }
    runs |= {f"{backend} backend alone": partial(backend_round, backend, decoded, order, steps) for backend in BACKENDS}
    cpu_us: dict[str, list[float]] = {name: [] for name in runs}
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for name, run in runs.items():
        if not name.startswith("tutorial"):
            run()  # builds pipelines, decodes what stays decoded
    for _ in range(rounds):
        for name, run in runs.items():
            began, cpu_began = time.perf_counter(), cpu_seconds()
            seen = run()
            cpu_us[name].append((cpu_seconds() - cpu_began) / seen * 1e6)
            seconds[name].append((time.perf_counter() - began) / seen)
    loaders = {
        name: {
            "images_per_cpu_second": 1e6 / min(cpu_us[name]),
            "worst_images_per_cpu_second": 1e6 / max(cpu_us[name]),
            "images_per_second": 1 / min(seconds[name]),
            "cpu_us_per_image": min(cpu_us[name]),
            "ratio_to_tutorial": min(cpu_us[TUTORIAL]) / min(cpu_us[name]),
        }
        for name in runs
    }
    return {
        "benchmark": "loader",
        "command": " ".join(["python -m benchmarks.loader", *sys.argv[1:]]),
        "hardware": f"{platform.machine()}, {os.cpu_count()} CPUs, {cpu_model()}",
        "versions": {name: version(name) for name in ("torch", "torchvision", "numpy", "nvidia-dali-cuda130", "pyarrow")}
        | {"python": platform.python_version()},
        "image_size": f"{height}x{width}",
        "batch_size": batch_size,
        "images_a_round": images,
        "rounds": rounds,
        "loaders": loaders,
    }


BACKENDS = ("numpy", "torch", "dali")


def loader_of(data: str, order: Order, backend: str, cache: str) -> Loader:
    config = DataConfig(backend=backend, cache=cache, pad=PAD)  # type: ignore[arg-type]
    return Loader(open_dataset(data), config, order=order, virtual_ranks=range(1), device=torch.device("cpu"), seed=0, on_bad=refuse)


def our_round(loader: Loader, steps: int) -> int:
    return consume(normalised(loader, steps))


def backend_round(name: str, images: np.ndarray, order: Order, steps: int) -> int:
    """uint8 batches, not normalised, without thread or labels: what choosing a backend decides."""
    height, width = images.shape[1:3]
    backend = make_backend(name, height=height, width=width, pad=PAD, batch_size=order.batch_size, device=torch.device("cpu"))
    seen = 0
    for step in range(steps):
        epoch, step_in_epoch = divmod(step, order.steps_per_epoch)
        ids = order.samples(epoch, step_in_epoch, 0)
        seen += len(backend.batch(images, ids, augment.draw(seed=0, epoch=epoch, ids=ids, pad=PAD, flip=True)))
    return seen


def refuse(bad: BadSample) -> None:
    raise ValueError(f"{bad.key} is bad ({bad.reason}); measure on a data set that is not")


def normalised(loader: Loader, steps: int) -> Generator[torch.Tensor, None, None]:
    mean, std = torch.full((1, 3, 1, 1), 127.5), torch.full((1, 3, 1, 1), 127.5)
    with contextlib.closing(loader.train(0, steps)) as batches:
        for (batch,) in batches:
            yield batch.images.float().sub_(mean).div_(std)


class Tutorial(Dataset[tuple[torch.Tensor, int]]):
    """As torchvision's CIFAR10: an array of images in memory, a PIL image and the transforms a sample."""

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
    batches = DataLoader(dataset, batch_size=batch_size, shuffle=True, num_workers=workers)
    while True:
        for images, _ in batches:
            yield images
            steps -= 1
            if steps == 0:
                return


def consume(batches: Generator[torch.Tensor, None, None]) -> int:
    with contextlib.closing(batches):
        return sum(len(batch) for batch in batches)


def cpu_seconds() -> float:
    """Of this process and of the workers that have ended."""
    usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def cpu_model() -> str:
    names = [line.split(":", 1)[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    return names[0] if names else "unknown CPU"


if __name__ == "__main__":
    main()
