"""The images that all contenders read: JPEGs cropped at random from real pictures, as an ImageFolder with an index.

Called by the benchmark, in the interpreter that has scikit-image and scikit-learn (`python -m benchmarks.streaming.pictures`), and by its
tests with pictures of their own. The contenders read the images.
"""

import argparse
import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import numpy as np
from PIL import Image

INDEX = "index.json"
QUALITY = 90
LEAST_SIDE, MOST_SIDE = 256, 500
"""Sides of a crop, in pixels."""
SKIMAGE = ("astronaut", "chelsea", "coffee", "hubble_deep_field", "immunohistochemistry", "retina", "rocket")
SKLEARN = ("china", "flower")


@dataclass(frozen=True, kw_only=True, slots=True)
class Images:
    """An ImageFolder: `train/CLASS/NUMBER.jpg`, and `test` with one image a class (our converter wants a test split)."""

    folder: Path
    paths: tuple[str, ...]
    """Paths of the training images, sorted; an image's place in it is its id."""
    sha256: str
    """Hash of paths and bytes of all training images."""
    encoded_bytes: int
    made_of: Mapping[str, str]

    @property
    def classes(self) -> tuple[str, ...]:
        return tuple(sorted({path.split("/")[1] for path in self.paths}))

    def labels(self) -> np.ndarray:
        """(count,) int64, by id."""
        numbers = {name: number for number, name in enumerate(self.classes)}
        return np.array([numbers[path.split("/")[1]] for path in self.paths], dtype=np.int64)

    def read(self, image_id: int) -> bytes:
        return (self.folder / self.paths[image_id]).read_bytes()


def sample_pictures() -> dict[str, np.ndarray]:
    """Photographs in scikit-image and scikit-learn, (H, W, 3) uint8 by name: people, animals, things, stars, cells, a temple."""
    import skimage.data
    from sklearn.datasets import load_sample_images

    pictures = {name: np.asarray(getattr(skimage.data, name)()) for name in SKIMAGE}
    left, _, _ = skimage.data.stereo_motorcycle()
    pictures["motorcycle"] = np.asarray(left)
    loaded = load_sample_images()
    pictures |= {Path(name).stem: np.asarray(image) for name, image in zip(loaded.filenames, loaded.images, strict=True)}
    assert set(SKLEARN) <= set(pictures), sorted(pictures)
    return pictures


def make_images(
    folder: Path, pictures: Mapping[str, np.ndarray], *, count: int, seed: int, size: int, made_of: Mapping[str, str]
) -> Images:
    """Fills `folder`, or opens it if it was filled before. Image i is a crop of picture i modulo their number; its class is that picture.

    Each side is drawn independently from LEAST_SIDE..MOST_SIDE pixels, limited by the picture; half of the crops are mirrored. With a
    `size` of at most 64 the crop is scaled to size x size, like CIFAR's images. The same seed and versions (`made_of`) give the same bytes.
    """
    if (folder / INDEX).is_file():
        return open_images(folder)
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    names = sorted(pictures)
    for split in ("train", "test"):
        for name in names:
            (partial / split / name).mkdir(parents=True)
    for split, first, stop in (("train", 0, count), ("test", count, count + len(names))):
        for number in range(first, stop):
            name = names[number % len(names)]
            crop = _crop(pictures[name], np.random.default_rng([seed, number]), size)
            crop.save(partial / split / name / f"{number:06d}.jpg", quality=QUALITY)
    paths = sorted(path.relative_to(partial).as_posix() for path in (partial / "train").glob("*/*.jpg"))
    digest, encoded_bytes = hashlib.sha256(), 0
    for path in paths:
        data = (partial / path).read_bytes()
        digest.update(f"{path} {len(data)}\n".encode() + data)
        encoded_bytes += len(data)
    index = {"paths": paths, "sha256": digest.hexdigest(), "encoded_bytes": encoded_bytes, "made_of": dict(made_of)}
    (partial / INDEX).write_text(json.dumps(index))
    os.rename(partial, folder)
    return open_images(folder)


def open_images(folder: Path) -> Images:
    index = json.loads((folder / INDEX).read_text())
    return Images(
        folder=folder,
        paths=tuple(index["paths"]),
        sha256=index["sha256"],
        encoded_bytes=index["encoded_bytes"],
        made_of=index["made_of"],
    )


def _crop(picture: np.ndarray, rng: np.random.Generator, size: int) -> Image.Image:
    height, width = (int(rng.integers(min(LEAST_SIDE, side), min(MOST_SIDE, side) + 1)) for side in picture.shape[:2])
    top, left = int(rng.integers(picture.shape[0] - height + 1)), int(rng.integers(picture.shape[1] - width + 1))
    pixels = picture[top : top + height, left : left + width]  # (height, width, 3)
    if rng.integers(2):
        pixels = pixels[:, ::-1]
    image = Image.fromarray(np.ascontiguousarray(pixels))
    return image.resize((size, size), Image.Resampling.LANCZOS) if size <= 64 else image


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.streaming.pictures", description="Makes the images; once.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--count", type=int, required=True)
    parser.add_argument("--seed", type=int, required=True)
    parser.add_argument("--size", type=int, required=True)
    options = parser.parse_args()
    made_of = {name: version(name) for name in ("scikit-image", "scikit-learn", "pillow", "numpy")}
    make_images(options.folder, sample_pictures(), count=options.count, seed=options.seed, size=options.size, made_of=made_of)


if __name__ == "__main__":
    main()
