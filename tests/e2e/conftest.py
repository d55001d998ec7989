"""A small folder of real images, one of them broken: what every end-to-end run trains on."""

from pathlib import Path

import pytest

from dataio.parquet import open_dataset
from tests.e2e.running import PROJECT

TRAIN_IMAGES, TEST_IMAGES = 240, 60


@pytest.fixture(scope="session")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An ImageFolder tree of Fashion-MNIST, 240 training and 60 test images, and one file in it that is no image."""
    root = tmp_path_factory.mktemp("images")
    dataset = open_dataset(PROJECT / "dataio" / "samples" / "fashion_mnist")
    for split, count in (("train", TRAIN_IMAGES), ("test", TEST_IMAGES)):
        source = dataset.split(split)
        stride = source.count // count
        labels = source.labels()
        sample = 0
        for group in range(source.groups):
            for image in source.read_group(group).encoded:
                if sample % stride == 0 and sample // stride < count:
                    folder = root / split / dataset.manifest.classes[labels[sample]].replace("/", "-")
                    folder.mkdir(parents=True, exist_ok=True)
                    (folder / f"{sample:05d}.png").write_bytes(bytes(image))
                sample += 1
    (root / "train" / "Bag" / "broken.png").write_bytes(b"this is no image")
    return root
