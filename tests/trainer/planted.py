"""A data set of real images in which something was planted: copies, changed as people's tools change them."""

import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image

from dataio.config import DataConfig
from dataio.parquet import Dataset, open_dataset
from dataio.prepared import prepare

SAMPLE = Path(__file__).resolve().parents[2] / "dataio" / "samples" / "fashion_mnist"


@cache
def real(split: str, count: int) -> tuple[tuple[bytes, str], ...]:
    """(PNG, class) of the first images of the shipped sample."""
    dataset = open_dataset(SAMPLE)
    group = dataset.split(split).read_group(0)
    return tuple(
        (image.tobytes(), dataset.manifest.classes[label].replace("/", "-"))
        for image, label in zip(group.encoded[:count], group.labels[:count].tolist(), strict=True)
    )


def changed(encoded: bytes, how: str, *, seed: int = 0) -> bytes:
    """An image changed by each word of `how`: mirrored, resized, compressed, stored (again: other bytes, the same pixels)."""
    rng = np.random.default_rng(seed)
    with Image.open(io.BytesIO(encoded)) as opened:
        picture = opened.convert("RGB")
    if "mirrored" in how:
        picture = picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    if "resized" in how:
        side = int(rng.integers(20, 45))
        picture = picture.resize((side, side), Image.Resampling.BICUBIC)
    if "compressed" in how:
        return _saved(picture, "JPEG", quality=int(rng.integers(50, 86)))
    return _saved(picture, "PNG", compress_level=1)


def _saved(picture: Image.Image, kind: str, **options: int) -> bytes:
    sink = io.BytesIO()
    picture.save(sink, kind, **options)
    return sink.getvalue()


@dataclass(frozen=True, kw_only=True)
class Plant:
    """A folder of class folders, split by split, to be converted."""

    root: Path
    keys: dict[tuple[str, str], str] = field(default_factory=dict)
    """(split, name) -> the class folder it is in."""

    def add(self, split: str, name: str, encoded: bytes, label: str) -> None:
        suffix = "jpg" if encoded.startswith(b"\xff\xd8") else "png"
        file = self.root / split / label / f"{name}.{suffix}"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(encoded)
        self.keys[split, name] = label

    def fill(self, counts: Mapping[str, int]) -> "Plant":
        for split, count in counts.items():
            for number, (encoded, label) in enumerate(real(split, count)):
                self.add(split, f"{number:04d}", encoded, label)
        return self

    def converted(self) -> Dataset:
        config = DataConfig(path=str(self.root), root=str(self.root.with_name("converted")), fit="stretch")
        return open_dataset(prepare(config))


def names_in(found: Sequence[Mapping[str, object]]) -> set[str]:
    """`train/0003`: split and file without folder and suffix."""
    return {f"{image['split']}/{Path(str(image['key'])).stem}" for image in found}


def groups_of(findings: str) -> list[tuple[set[str], Mapping[str, object]]]:
    """(names, group) for each group of copies in a findings.json."""
    return [(names_in(group["images"]), group) for group in json.loads(findings)["copies"]]
