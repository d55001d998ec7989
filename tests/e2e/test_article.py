"""`--config article` is the tutorial: the same losses as an independent plain-PyTorch script, from CIFAR-10's own archive format."""

from pathlib import Path

import pytest

from benchmarks.parity import compare, write_cifar_archive
from tests.e2e.running import PROJECT


@pytest.mark.ray
@pytest.mark.timeout(400)
def test_the_article_recipe_gives_the_tutorials_losses(tmp_path: Path) -> None:
    images = tmp_path / "images"
    write_image_folder(images)
    archive = tmp_path / "cifar-10-python.tar.gz"
    write_cifar_archive(archive, str(images), train=500, test=50)
    result = compare(archive, tmp_path, steps=6, threads=1)  # 5 steps an epoch: the second epoch's order is in it
    assert len(result["ours"]) == 6
    assert result["largest_difference"] <= 1e-5, result


def write_image_folder(root: Path) -> None:
    from dataio.parquet import open_dataset

    dataset = open_dataset(PROJECT / "dataio" / "samples" / "fashion_mnist")
    for split in ("train", "test"):
        source = dataset.split(split)
        group = source.read_group(0)
        for number, (image, label) in enumerate(zip(group.encoded, group.labels, strict=True)):
            folder = root / split / f"class-{label}"
            folder.mkdir(parents=True, exist_ok=True)
            (folder / f"{number:05d}.png").write_bytes(bytes(image))
