"""Claims about what a run says of its data before it trains: classes, counts, what is not read, and what to know of them."""

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dataio.config import DataConfig
from trainer.drive.data import about_transparency, open_data
from trainer.settings.say import Terminal
from trainer.settings.tree import RunConfig


def image(path: Path, seed: int, *, alpha: bool = False) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (4, 4, 4 if alpha else 3)).astype(np.uint8)
    Image.fromarray(pixels).save(path, "PNG")


def said(path: Path, **settings: object) -> list[str]:
    out = io.StringIO()
    config = RunConfig(data=DataConfig(path=str(path), root=str(path.parent / "root"), max_bad_fraction=0.5, **settings))  # type: ignore[arg-type]
    open_data(config, Terminal(file=out, width=80))
    return out.getvalue().splitlines()


def test_one_line_says_what_was_found_and_what_was_not_read(tmp_path: Path):
    for number in range(6):
        image(tmp_path / "photos" / "Training" / ("ant" if number < 4 else "bee") / f"{number}", number)
    image(tmp_path / "photos" / "Testing" / "ant" / "8.png", 8)
    image(tmp_path / "photos" / "Testing" / "bee" / "9.png", 9)
    (tmp_path / "photos" / "Testing" / "notes").mkdir()
    (tmp_path / "photos" / "Testing" / "notes" / "readme.txt").write_text("of ants")
    lines = said(tmp_path / "photos")
    assert lines[-1] == (
        "data: 2 classes (ant, bee): 6 train, 2 test images (2 to 4 of a class to train); not read: Testing/notes/ (no image)"
    )
    assert said(tmp_path / "photos") == lines[-1:]  # the second time nothing is converted


def test_what_should_be_known_of_the_data_follows(tmp_path: Path):
    for number in range(4):
        image(tmp_path / "photos" / "train" / "ant" / f"{number}.png", number)
        image(tmp_path / "photos" / "train" / "bee" / f"{number}.png", 10 + number, alpha=number == 0)
    image(tmp_path / "photos" / "val" / "ant" / "0.png", 20)
    image(tmp_path / "photos" / "test" / "ant" / "0.png", 1)
    (tmp_path / "photos" / "test" / "ant" / "bad.png").write_bytes(b"no image")
    line, left_out, copies, untested = said(tmp_path / "photos")[-4:]
    assert line == "data: 2 classes (ant, bee): 8 train, 1 validation, 1 test images (4 of each class to train); 1 could not be used"
    assert left_out.startswith("1 image that could not be used is left out: ")
    assert copies.startswith("warning: 1 of 1 test images are copies of training images")
    assert "test/ant/0.png = train/ant/1.png" in copies
    assert untested == "warning: no test image shows class bee, so the results say nothing of it"


@pytest.mark.parametrize(
    ("background", "words"),
    [
        ("auto", "1 image has an alpha channel: put on white (data.background)"),
        ("black", "1 image has an alpha channel: put on black (data.background)"),
        ("", "1 image has an alpha channel, which is dropped: what is transparent shows the colour stored below it"),
    ],
)
def test_what_becomes_of_transparent_images_is_said(tmp_path: Path, background: str, words: str):
    for number in range(12):
        image(tmp_path / "photos" / ("ant", "bee")[number % 2] / f"{number}.png", number, alpha=number == 0)
    config = RunConfig(data=DataConfig(path=str(tmp_path / "photos"), root=str(tmp_path / "root"), background=background))  # type: ignore[arg-type]
    dataset = open_data(config, Terminal(file=io.StringIO(), width=80))[1]
    (line,) = about_transparency(dataset, config)
    assert line.partition(";")[0] == words


def test_data_that_an_earlier_rule_converted_stay_and_it_is_said(tmp_path: Path):
    for number in range(4):
        image(tmp_path / "photos" / "ant" / f"{number}.png", number)
        image(tmp_path / "photos" / "bee" / f"{number}.png", 10 + number)
    said(tmp_path / "photos")
    image(tmp_path / "photos" / "bee" / "without_suffix", 30)
    line, earlier = said(tmp_path / "photos")[-2:]
    assert "6 train, 2 test images" in line
    assert "converted by an earlier version, whose rules they keep" in earlier


def test_no_name_steers_the_terminal(tmp_path: Path):
    for number in range(4):
        image(tmp_path / "photos" / "\x1b]0;pwned\x07" / f"{number}.png", number)
        image(tmp_path / "photos" / "bee" / f"{number}.png", 10 + number)
    (tmp_path / "photos" / "bee" / "x.\x1b[2J").write_text("no image")
    text = "\n".join(said(tmp_path / "photos"))
    assert "\x1b" not in text
    assert r"\x1b]0;pwned\x07" in text
