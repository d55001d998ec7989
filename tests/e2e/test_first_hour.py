"""The first hour: a folder of photographs as people have it becomes a model, a report and predictions, by an installed command, in a folder
that is no checkout, with two flags that only replace a download and one that ends it sooner. Every line that is said on the way is
right."""

import json
import shlex
from collections.abc import Iterator
from pathlib import Path

import matplotlib
import numpy as np
import pytest
from PIL import Image

from tests.installed import Installed, install

pytestmark = [pytest.mark.ray, pytest.mark.timeout(400)]

PHOTOGRAPH = Path(matplotlib.get_data_path()) / "sample_data" / "grace_hopper.jpg"  # 512 x 600, in the public domain
PARTS = {"face": (180, 130, 340, 330), "flag": (20, 20, 150, 420), "uniform": (90, 400, 430, 600)}  # left, upper, right, lower
EACH = 20
OFFLINE = ("--model.name", "timm/tf_efficientnet_lite0", "--model.weights", "package:efficientnet_lite0")
"""Without a network the default's weights cannot be had."""
SOONER = ("--train.epochs", "20")
"""These few images would come 139 times (trainer/settings/photos.py); they are learned long before."""


def crops(part: str, count: int, seed: int) -> Iterator[Image.Image]:
    """Cuts of one part of the photograph, each of another size and shape."""
    whole = Image.open(PHOTOGRAPH).convert("RGB")
    left, upper, right, lower = PARTS[part]
    generator = np.random.default_rng(seed)
    for _ in range(count):
        width, height = generator.integers(48, 80, 2)  # small, so that the test is quick
        x, y = generator.integers(left, right - width + 1), generator.integers(upper, lower - height + 1)
        yield whole.crop((x, y, x + width, y + height))


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for each class: JPEG and PNG, upright and turned by EXIF, colour, gray, palette, CMYK, transparent; and what lies about in
    folders of photographs: two damaged images, a note, thumbnails of a file manager."""
    home = tmp_path_factory.mktemp("home")
    for number, part in enumerate(PARTS):
        folder = home / "photos" / part
        folder.mkdir(parents=True)
        for index, image in enumerate(crops(part, EACH, seed=number)):
            name = folder / f"IMG_{1000 + 37 * index}"
            match index % 8:
                case 0:
                    image.save(f"{name}.png")
                case 1:
                    image.convert("L").save(f"{name}.JPG", format="jpeg")
                case 2:
                    image.quantize(64).save(f"{name}.png")
                case 3:
                    image.convert("CMYK").save(f"{name}.jpeg")
                case 4:
                    exif = Image.Exif()
                    exif[0x0112] = 6  # stored on its side
                    image.rotate(90, expand=True).save(f"{name}.jpg", exif=exif)
                case 5:
                    image.save(f"{name}.webp")
                case _:
                    image.save(f"{name}.jpg", quality=85)
        (folder / "Thumbs.db").write_bytes(b"\xd0\xcf\x11\xe0")
    (home / "photos" / "notes.txt").write_text("taken in 1984")
    whole = next((home / "photos" / "face").glob("*.jpg")).read_bytes()
    (home / "photos" / "face" / "copy failed.jpg").write_bytes(whole[: len(whole) // 3])
    (home / "photos" / "flag" / "page.jpg").write_text("<html>404</html>")
    return home


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Installed:
    return install(tmp_path_factory.mktemp("copy"), tmp_path_factory.mktemp("installed"))


def test_a_folder_of_photographs_becomes_a_model_a_report_and_predictions(installed: Installed, photos: Path) -> None:
    begun = installed.finetune("run", "photos", *OFFLINE, *SOONER, home=photos, timeout=360)
    said = begun.stdout + begun.stderr
    assert begun.returncode == 0, said
    assert "settings of the recipe photos; --print-config shows them" in said
    assert "2 images that could not be used are left out" in said
    for word in ("Traceback", "Warning", "python -m", "libpng"):
        assert word not in said, said
    [warning] = [line for line in said.splitlines() if "warning" in line]
    assert warning.startswith("warning: Fewer than 10 test images of face (2), flag (2), uniform (2)"), "six test images tell little"
    (run,) = (photos / "finetune-runs").iterdir()
    assert run.name.startswith("photos-")
    summary = json.loads((run / "summary.json").read_text())
    assert (summary["status"], summary["test_count"]) == ("finished", 6), "a tenth of each class, and at least one image, is held out"
    assert summary["test_accuracy"] >= 5 / 6
    assert "<html" in (run / "report.html").read_text()
    exported = json.loads((run / "model" / "config.json").read_text())
    assert (exported["mean"], exported["std"], exported["classes"]) == ([0.5] * 3, [0.5] * 3, sorted(PARTS)), "as its weights were trained"

    predict = next(line for line in said.splitlines() if "finetune predict " in line)
    command = shlex.split(predict[predict.index("finetune predict ") :])
    assert command == ["finetune", "predict", str(run), "IMAGE..."]
    new = photos / "new"
    new.mkdir()
    for number, part in enumerate(PARTS):
        for index, image in enumerate(crops(part, 4, seed=100 + number)):
            image.save(new / f"{part}-{index}.jpg")
    asked = installed.finetune(*command[1:-1], "new", "--json", home=photos)
    assert asked.returncode == 0, asked.stderr
    answers = [json.loads(line) for line in asked.stdout.splitlines()]
    right = [answer["predictions"][0]["class"] == Path(answer["image"]).name.partition("-")[0] for answer in answers]
    assert (len(right), sum(right) >= 10) == (12, True), asked.stdout

    again = installed.finetune("run", "photos", *OFFLINE, *SOONER, home=photos)
    assert again.returncode == 0
    assert f"run {run.name} has finished already; --run NAME starts another" in again.stdout
