"""What augmentation costs on one CPU core: ours for a batch, and torchvision's transforms.v2 image by image, in turns on the same pictures.

    python -m benchmarks.augmentation [--rounds 6] [--json] [--out FILE]

CPU time of one thread, in microseconds an image: batches of 100 images of 32 pixels, and of 32 images of 224, which a resized crop takes
out of 256. torchvision draws anew in each call, as we do; so both do the same operations in the mean only, and `policy` scatters most.
Mixing has no peer here: torchvision's mixes float batches.
"""

import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import InterpolationMode, v2

from benchmarks.common import Stopwatch, add_arguments, described, finish, interleave, parser_of, spread
from dataio.batch import Batch
from dataio.config import DataConfig
from trainer.learn.augment.batches import augmented
from trainer.learn.augment.mix import make_mix
from trainer.learn.augment.views import make_views

SIZES = {32: (32, 100), 224: (256, 32)}
"""Side that the model sees -> (side that is stored, images a batch)."""
JITTER = (0.4, 0.4, 0.4, 0.1)
SETTINGS: Mapping[str, Mapping[str, Any]] = {
    "crop resized": {"crop": "resized"},
    "rotate 15": {"rotate": 15.0},
    "policy trivial": {"policy": "trivial"},
    "policy rand": {"policy": "rand"},
    "jitter": {"jitter": JITTER},
    "jitter without hue": {"jitter": (*JITTER[:3], 0.0)},
    "erase 0.25": {"erase": 0.25},
    "mixup": {},
    "cutmix": {},
}


def peer(name: str, side: int) -> Callable[[Tensor], Tensor] | None:
    bilinear = InterpolationMode.BILINEAR
    match name:
        case "crop resized":
            return v2.RandomResizedCrop(side, antialias=True)
        case "rotate 15":
            return v2.RandomRotation(15, interpolation=bilinear)
        case "policy trivial":
            return v2.TrivialAugmentWide(interpolation=bilinear)
        case "policy rand":
            return v2.RandAugment(interpolation=bilinear)
        case "jitter":
            return v2.ColorJitter(*JITTER)
        case "jitter without hue":
            return v2.ColorJitter(*JITTER[:3])
        case "erase 0.25":
            return v2.RandomErasing(0.25)
    return None


def photographs(count: int, side: int) -> Tensor:
    """(count, 3, side, side) uint8 channels_last: parts of a photograph."""
    rng = np.random.default_rng(0)
    with Image.open(Path(matplotlib.get_data_path()) / "sample_data" / "grace_hopper.jpg") as whole:
        corners = rng.integers(0, min(whole.size) // 2, (count, 2)).tolist()
        parts = [np.asarray(whole.resize((side, side), box=(x, y, x + 250, y + 250))) for x, y in corners]
    return torch.from_numpy(np.stack(parts)).permute(0, 3, 1, 2)


def measure(name: str, side: int, rounds: int) -> dict[str, Any]:
    """Who -> microseconds an image."""
    stored, count = SIZES[side]
    images = photographs(count, stored if name == "crop resized" else side)
    views = make_views(DataConfig(**SETTINGS[name]), seed=0, image_size=side)
    mix = make_mix(seed=0, mixup=0.2 if name == "mixup" else 0.0, cutmix=1.0 if name == "cutmix" else 0.0)
    theirs, each = peer(name, side), list(images.contiguous())

    def ours(number: int) -> None:
        batch = Batch(samples=images, targets={}, ids=np.arange(count), epoch=number, step=number, virtual_rank=0)
        augmented(batch, views=views, own=None, mix=mix, share_of=0)

    taken: dict[str, list[float]] = {"ours": []} | ({"torchvision": []} if theirs is not None else {})
    ours(0)
    for number, who in interleave(list(taken), rounds):
        watch = Stopwatch()
        if theirs is None or who == "ours":
            ours(number)
        else:
            torch.stack([theirs(image) for image in each])
        taken[who].append(1e6 * watch.taken().cpu_seconds / count)
    return {who: spread(values) for who, values in taken.items()}


def lines_of(result: Mapping[str, Any]) -> list[str]:
    lines = [f"{'us an image':24}{'ours':>10}{'torchvision':>14}"]
    for side, cases in result["microseconds"].items():
        for name, found in cases.items():
            there = f"{found['torchvision']['median']:14,.0f}" if "torchvision" in found else ""
            lines.append(f"{side:>4} {name:19}{found['ours']['median']:10,.0f}{there}")
    return lines


def main() -> int:
    parser = parser_of("augmentation", __doc__)
    parser.add_argument("--rounds", type=int, default=6)
    add_arguments(parser)
    options = parser.parse_args()
    torch.set_num_threads(1)
    result = described("augmentation", options)
    result["microseconds"] = {str(side): {name: measure(name, side, options.rounds) for name in SETTINGS} for side in SIZES}
    return finish(result, options, lines_of(result))


if __name__ == "__main__":
    sys.exit(main())
