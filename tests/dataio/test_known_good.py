"""Another split of the same files decodes none of them again, and holds what a conversion from nothing holds."""

import io
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dataio.codecs.image import decode
from dataio.config import DataConfig
from dataio.known_good import RULES_NAME
from dataio.parquet import Dataset
from dataio.prepared import open_prepared, prepared


@pytest.fixture
def config(tmp_path: Path) -> DataConfig:
    """Forty images of two classes, one of which is damaged where only decoding shows it."""
    draw = np.random.default_rng(0)
    for number in range(40):
        out = io.BytesIO()
        Image.fromarray(draw.integers(0, 256, (12, 12, 3), dtype=np.uint8)).save(out, "PNG")
        data = bytearray(out.getvalue())
        if number == 7:
            data[data.index(b"IDAT") + 30] ^= 0xFF
        path = tmp_path / "images" / ("ant", "bee")[number % 2] / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return DataConfig(path=str(tmp_path / "images"), root=str(tmp_path / "root"), max_bad_fraction=0.5)


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many images each batch had that a checker decoded."""
    counts: list[int] = []
    check = decode.Checker.check

    def counted(self: decode.Checker, encoded: list[bytes]) -> object:
        counts.append(len(encoded))
        return check(self, encoded)

    monkeypatch.setattr(decode.Checker, "check", counted)
    return counts


def content(dataset: Dataset) -> object:
    manifest = dataset.manifest
    splits = {name: list(dataset.split(name).content()) for name in manifest.splits}
    return splits, manifest.fingerprint, manifest.image_sizes, [record.to_line() for record in dataset.left_out()]


@pytest.mark.parametrize(
    "change", [{"test_fraction": 0.3}, {"validation_fraction": 0.2}, {"test_fraction": 0.3, "max_image_pixels": 10_000}]
)
def test_another_split_decodes_only_what_was_bad(config: DataConfig, decoded: list[int], tmp_path: Path, change: dict[str, float]) -> None:
    open_prepared(config)
    assert sum(decoded) == 40
    decoded.clear()
    other = replace(config, **change)  # type: ignore[arg-type]
    again = open_prepared(other)[1]
    assert sum(decoded) == 1, "the damaged image alone"
    decoded.clear()
    alone = open_prepared(replace(other, root=str(tmp_path / "elsewhere")))[1]
    assert sum(decoded) == 40
    assert content(again) == content(alone)


def test_all_images_for_an_evaluation_are_not_decoded_again_either(config: DataConfig, decoded: list[int]) -> None:
    open_prepared(config)
    decoded.clear()
    prepared(config, whole=True)
    assert sum(decoded) == 1


def test_what_other_rules_found_good_and_what_other_files_hold_counts_for_nothing(
    config: DataConfig, decoded: list[int], tmp_path: Path
) -> None:
    folder = Path(open_prepared(config)[0])
    (folder / RULES_NAME).write_text("1")
    decoded.clear()
    open_prepared(replace(config, test_fraction=0.3))
    assert sum(decoded) == 40
    changed = tmp_path / "images" / "ant" / "0.png"
    Image.fromarray(np.zeros((12, 12, 3), np.uint8)).save(changed)
    decoded.clear()
    open_prepared(replace(config, test_fraction=0.3))
    assert sum(decoded) == 2, "the image that is another now, and the damaged one"
    Path(folder / RULES_NAME).unlink()  # of an earlier version
    changed.write_bytes(b"")
    decoded.clear()
    with pytest.raises(ValueError, match="bad"):
        open_prepared(replace(config, max_bad_fraction=0.0))


def test_a_limit_that_is_lower_now_counts_for_known_images_too(config: DataConfig) -> None:
    open_prepared(config)
    with pytest.raises(ValueError, match="bad"):
        open_prepared(replace(config, test_fraction=0.3, max_image_pixels=100))
