"""What the tests of jobs of answers share: images of noise, and what a job wrote. The run that answers is conftest's `exported_run`."""

from collections.abc import Iterable
from pathlib import Path

import numpy as np
from PIL import Image

from tests.trainer.test_predict import SIDE


def put_noise(paths: Iterable[Path]) -> None:
    """A picture of noise at each path, of the exported run's size; the same ones each time."""
    generator = np.random.default_rng(0)
    for path in paths:
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(generator.integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)).save(path)


def parts_in(out: Path) -> dict[str, bytes]:
    """The files of answers."""
    return {path.name: path.read_bytes() for path in sorted(out.glob("predictions-*.parquet"))}
