"""`python -m trainer.evaluate` on the folder of a run that was really trained, in this process: the run's own numbers come out again."""

import json
import shutil
from contextlib import closing
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from cluster.storage import open_storage
from dataio.codecs.image.codec import ImageCodec
from dataio.config import DataConfig
from dataio.conversion import convert
from dataio.parquet import RowGroup, Split, open_dataset
from dataio.resident import decode_split
from dataio.sources import open_source
from tests.trainer.small_run import train
from trainer.evaluate import main
from trainer.export.model_folder import load_export
from trainer.models.vision import Preprocess
from trainer.runs.model_files import find_model
from trainer.settings.toml import to_toml
from trainer.settings.tree import ModelConfig, OptimConfig, RunConfig, TrainConfig
from trainer.tasks.matching import class_mapping
from trainer.tasks.predictions import Predictions

SAMPLE = Path(__file__).resolve().parents[2] / "dataio" / "samples" / "fashion_mnist"
CLASSES = open_dataset(SAMPLE).manifest.classes
SHOWN = 200  # of the 500 test images; all classes are among them
BASE = RunConfig(
    run="sample",
    data=DataConfig(path=str(SAMPLE), batch_size=50, pad=2),
    model=ModelConfig(name="shufflenet_v2_x0_5", weights="none", stem="native", image_size=32),
    optim=OptimConfig(name="adamw", lr=0.01),
    train=TrainConfig(virtual_ranks=2, precision="bf16", channels_last="on", ema=0.5),
)


pytestmark = pytest.mark.usefixtures("threads_kept")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(tmp_path_factory.mktemp("runs"), BASE)


def asked(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    assert main([*arguments, "--device", "cpu", "--json"]) == 0
    answer: dict[str, Any] = json.loads(capsys.readouterr().out)
    return answer


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    with pytest.raises(SystemExit) as caught:
        main([*arguments, "--device", "cpu"])
    assert caught.value.code == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    return captured.err


def folders(root: Path, *, side: int = 28) -> Path:
    """The first test images as an ImageFolder, for training too. A folder's name has no slash."""
    pixels, labels = decoded("test")
    for split in ("train", "test"):
        for index in range(SHOWN):
            folder = root / split / CLASSES[labels[index]].replace("/", "-")
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels[index]).resize((side, side)).save(folder / f"{index:05d}.png")
    return root


@lru_cache
def decoded(split: str) -> tuple[np.ndarray, np.ndarray]:
    with closing(ImageCodec(height=28, width=28, config=DataConfig(), device=torch.device("cpu"))) as codec:
        images = decode_split(open_dataset(SAMPLE).split(split), codec, on_bad=lambda bad: pytest.fail(str(bad)))
    return images, open_dataset(SAMPLE).split(split).labels()


def test_the_runs_own_test_split_gives_the_numbers_of_its_summary(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    summary = json.loads((run / "summary.json").read_text())
    answer = asked(capsys, str(run))
    assert answer["accuracy"] == summary["test_accuracy"] == answer["recorded_accuracy"]
    assert answer["loss"] == summary["test_loss"]
    assert answer["confusion"] == summary["confusion"]
    assert answer["per_class"] == summary["per_class"]
    assert (answer["count"], answer["split"], answer["quarantined"]) == (500, "test", [])
    assert answer["accuracy"] > 0.25  # it has learnt something: this is no test of a constant
    assert main([str(run), "--device", "cpu"]) == 0
    shown = capsys.readouterr().out
    assert f"{100 * summary['test_accuracy']:.2f} % (as in summary.json), 95 % interval: " in shown
    assert all(name in shown for name in CLASSES)


def test_a_run_that_was_copied_to_an_object_store_gives_the_same_numbers(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    s3 = pytest.importorskip("tests.s3")
    with s3.serving(s3.Server()) as server:
        server.client().create_bucket(Bucket="evaluated")
        copied = open_storage(server.uri("evaluated/runs"))
        for file in (path for path in run.rglob("*") if path.is_file()):
            copied.write_atomic(f"{run.name}/{file.relative_to(run).as_posix()}", file.read_bytes())
        there = asked(capsys, run.name, "--storage", copied.uri)
    summary = json.loads((run / "summary.json").read_text())
    assert (there["accuracy"], there["loss"], there["confusion"]) == (summary["test_accuracy"], summary["test_loss"], summary["confusion"])


def test_the_answer_to_each_image_can_be_had_and_they_add_up(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    summary = json.loads((run / "summary.json").read_text())
    file = tmp_path / "answers.parquet"
    asked(capsys, str(run), "--predictions", str(file))
    found = Predictions.from_parquet(file.read_bytes())
    assert found.confusion(10).tolist() == summary["confusion"]
    assert found.ids.tolist() == list(range(500))
    assert list(found.keys) == open_dataset(SAMPLE).split("test").keys(range(500))
    assert found.losses.astype(np.float64).mean() == pytest.approx(summary["test_loss"], rel=1e-6)
    assert (found.about.split, found.about.dataset_fingerprint) == ("test", summary["dataset_fingerprint"])


def test_the_numbers_are_those_of_counting_by_hand(tmp_path: Path, run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """In fp32, as bf16 depends on how samples are put into batches; the train split, which the summary says nothing of."""
    config = replace(BASE, train=replace(BASE.train, precision="fp32"))
    exact = tmp_path / "sample"
    exact.mkdir()
    (exact / "model").symlink_to(run / "model")
    (exact / "config.toml").write_text(to_toml(config))
    answer = asked(capsys, "sample", "--storage", str(tmp_path), "--split", "train")
    exported = load_export(find_model(str(exact)), torch.device("cpu"))
    images, labels = decoded("train")
    preprocess = Preprocess(mean=BASE.data.mean, std=BASE.data.std, image_size=32, interpolation="bilinear")
    with torch.inference_mode():
        logits = torch.cat([exported.model(preprocess(part)) for part in torch.tensor(images).permute(0, 3, 1, 2).split(200)])
    hits = int((logits.argmax(1).numpy() == labels).sum())
    assert answer["count"] == len(labels) == 2000
    assert answer["accuracy"] == pytest.approx(hits / 2000, abs=1 / 2000)
    assert answer["loss"] == pytest.approx(float(torch.nn.functional.cross_entropy(logits, torch.tensor(labels))), rel=1e-4)
    assert (answer["recorded_accuracy"], answer["precision"]) == (None, "fp32")


def test_other_data_are_evaluated_in_whatever_order_their_classes_are(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    description = json.loads((run / "model" / "config.json").read_text())
    renamed = [name.replace("/", "-") for name in description["classes"]]
    other = tmp_path / "runs" / "renamed"
    (other / "model").mkdir(parents=True)
    for name in ("config.toml", "summary.json", "model/model.safetensors"):
        (other / name).write_bytes((run / name).read_bytes())
    (other / "model" / "config.json").write_text(json.dumps({**description, "classes": renamed}))
    images = folders(tmp_path / "images")
    converted = ["--data.root", str(tmp_path / "data"), "--data.path", str(images)]
    answer = asked(capsys, str(other), *converted)
    assert answer["classes"] == renamed != sorted(renamed)  # a folder's classes are sorted
    whole = asked(capsys, str(run))
    assert answer["recorded_accuracy"] is None
    assert answer["dataset_fingerprint"] != whole["dataset_fingerprint"]
    _, labels = decoded("test")
    assert [score["support"] for score in answer["per_class"]] == np.bincount(labels[:SHOWN], minlength=10).tolist()
    assert answer["accuracy"] > 0.25

    message = refused(capsys, str(run), *converted)
    assert "the model does not know 'T-shirt-top'; it knows 'T-shirt/top'" in message
    assert "--classes" in message


def test_every_image_of_a_folder_without_splits_is_scored_and_classes_may_be_lacking(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pixels, labels = decoded("test")
    chosen = [index for index in range(SHOWN) if CLASSES[labels[index]] in ("Bag", "Coat")]
    for index in chosen:
        folder = tmp_path / "images" / CLASSES[labels[index]]
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels[index]).save(folder / f"{index:05d}.png")
    (tmp_path / "images" / "notes.txt").write_text("two classes of ten")
    others = ["--data.root", str(tmp_path / "data"), "--data.path", str(tmp_path / "images")]
    answer = asked(capsys, str(run), *others)
    assert (answer["count"], answer["split"]) == (len(chosen), "all")
    names = [name for name, score in zip(CLASSES, answer["per_class"], strict=True) if score["support"]]
    assert names == ["Coat", "Bag"]
    assert main([str(run), *others, "--device", "cpu"]) == 0
    shown = capsys.readouterr().out
    assert f"sample on all {len(chosen)} images of {tmp_path}/images" in shown
    assert "2 classes (Bag, Coat)" in shown
    assert "not read: 1 .txt" in shown
    one = tmp_path / "one" / "Bag"
    one.mkdir(parents=True)
    (one / "only.png").write_bytes(next((tmp_path / "images" / "Bag").iterdir()).read_bytes())
    assert asked(capsys, str(run), "--data.root", str(tmp_path / "data"), "--data.path", str(one.parent))["count"] == 1


def test_images_that_the_run_was_trained_on_are_counted(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    split = open_dataset(SAMPLE).split("train")
    group, labels = split.read_group(0), split.labels()
    (tmp_path / "images" / "Bag").mkdir(parents=True)
    bags = [row for row in range(200) if CLASSES[labels[row]] == "Bag"]
    for row in bags:
        (tmp_path / "images" / "Bag" / f"{row}.png").write_bytes(group.encoded[row].tobytes())
    pixels, of = decoded("test")
    Image.fromarray(pixels[of.tolist().index(CLASSES.index("Bag"))]).save(tmp_path / "images" / "Bag" / "new.png", compress_level=1)
    assert main([str(run), "--data.root", str(tmp_path / "data"), "--data.path", str(tmp_path / "images"), "--device", "cpu"]) == 0
    shown = capsys.readouterr().out
    assert f"all {len(bags) + 1} images" in shown
    assert f"{len(bags)} of these images are copies of images that the run was trained on" in shown


def test_of_data_with_splits_the_one_that_is_not_for_training_is_scored(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pixels, labels = decoded("test")
    for index in range(40):
        folder = tmp_path / "images" / ("Training" if index < 30 else "Valid") / CLASSES[labels[index]].replace("/", "-")
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels[index]).save(folder / f"{index:05d}.png")
    for split in ("Training", "Valid"):
        if (named := tmp_path / "images" / split / "T-shirt-top").is_dir():
            shutil.rmtree(named)  # its name has a slash
    left = len(list((tmp_path / "images" / "Valid").rglob("*.png")))
    answer = asked(capsys, str(run), "--data.root", str(tmp_path / "data"), "--data.path", str(tmp_path / "images"))
    assert (answer["count"], answer["split"]) == (left, "validation")


def test_images_of_another_size_are_refused_with_the_way_out_which_works(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    images = folders(tmp_path / "images", side=40)
    names = sorted(CLASSES, key=lambda name: name.replace("/", "-"))
    source = open_source(str(images), root=tmp_path, test_fraction=0.1, classes=tuple(names))
    convert(source, tmp_path / "large", max_bad_fraction=0.0, max_image_pixels=10_000, on_progress=None)
    large = ["--data.path", str(tmp_path / "large")]
    message = refused(capsys, str(run), *large)
    assert "trained on images of 28x28 (HxW)" in message
    assert "40x40" in message
    assert "--data.fit stretch" in message
    answer = asked(capsys, str(run), *large, "--data.fit", "stretch")
    assert answer["count"] == SHOWN
    assert answer["accuracy"] > 0.25


def test_a_damaged_image_is_named_not_counted_and_above_the_limit_no_result(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    read = Split.read_group

    def spoilt(self: Split, group: int) -> RowGroup:
        held = read(self, group)
        if self.name == "test" and group == 0:
            held = replace(held, encoded=[np.frombuffer(b"no image", np.uint8), *held.encoded[1:]])
        return held

    monkeypatch.setattr(Split, "read_group", spoilt)
    message = refused(capsys, str(run), "--data.max-bad-fraction", "0")
    assert "1 of 500 samples are bad" in message
    assert "--data.max-bad-fraction 0.002" in message
    answer = asked(capsys, str(run), "--data.max-bad-fraction", "0.002")
    assert answer["count"] == 499
    (bad,) = answer["quarantined"]
    assert (bad["split"], bad["sample_id"]) == ("test", 0)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["nosuch"], ["there is no run nosuch"]),
        (["{run}", "--split", "validation"], ["validation"]),
        (["{run}", "--data.path", "/nowhere"], ["/nowhere"]),
        (["{run}/../bare"], ["has no model/config.json", "let it finish first"]),
        (["{run}/../headless"], ["has no config.toml", "give the folder that the run wrote"]),
    ],
    ids=["unknown run", "wrong split", "no data", "no model", "no settings"],
)
def test_a_mistake_is_said_and_ends_with_status_2(
    run: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], said: list[str]
) -> None:
    (run.parent / "bare").mkdir(exist_ok=True)
    (run.parent / "bare" / "config.toml").write_bytes((run / "config.toml").read_bytes())
    (run.parent / "headless" / "model").mkdir(parents=True, exist_ok=True)
    message = refused(capsys, *(argument.replace("{run}", str(run)) for argument in arguments))
    assert all(part in message for part in said), message
    assert "Traceback" not in message


def test_class_names_decide_not_their_order() -> None:
    assert class_mapping(["a", "b", "c"], ["c", "a", "b"], where="d") == [2, 0, 1]
    assert class_mapping(["a", "b", "c"], ["c", "a"], where="d") == [2, 0]  # what the data lack is not asked for
    with pytest.raises(ValueError, match="the model does not know 'z'; it knows 'a', 'b', 'c'"):
        class_mapping(["a", "b", "c"], ["a", "z"], where="d")
