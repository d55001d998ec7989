"""The best weights, not the last: whole runs in this process, killed wherever an evaluation may be cut short."""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from tests.trainer.lives import TINY, Killed, Lives, write_images
from trainer.learn.state import weights_sha256
from trainer.rank.best import BEST_FILE

BATCHES = ("--data.batch-size", "20", "--data.pad", "0", "--train.virtual-ranks", "2")
ROUGH = ("--optim.lr", "0.4", "--optim.schedule", "constant")
"""Row 15: nothing settles, and the last epoch is as good as it happens to be."""


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """train/, val/ and test/, a folder a class."""
    return write_images(tmp_path_factory.mktemp("photos"), {"train": 60, "val": 45, "test": 30})


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def run_of(folder: Path, photos: Path, *flags: str) -> Lives:
    return Lives.of(folder, "--data.path", str(photos), *BATCHES, *TINY, *flags)


def validated(lives: Lives) -> list[dict[str, Any]]:
    """The evaluations of the validation split as the journal has them, each step once, in order."""
    by_step = {event["step"]: event for event in lives.events if event["event"] == "evaluation" and event.get("split") == "validation"}
    return [by_step[step] for step in sorted(by_step)]


def exported_tensors(lives: Lives) -> dict[str, torch.Tensor]:
    return dict(safetensors.torch.load_file(lives.folder / "model" / "model.safetensors"))


def test_validation_chooses_and_the_test_split_is_read_once_at_the_end(photos: Path, tmp_path: Path) -> None:
    """Rows 5 and 15."""
    lives = run_of(tmp_path, photos, *ROUGH, "--train.epochs", "8")
    assert lives.live()
    assert lives.evaluated == ["validation"] * 8 + ["validation", "test"]
    values = [event["validation_accuracy"] for event in validated(lives)]
    assert max(values) > values[-1], "the last epoch is the best one here: another seed shows more"
    best = values.index(max(values))
    chosen = [each for each in validated(lives) if each["validation_accuracy"] == max(values)]
    kept = lives.result["selection"]["kept"]
    assert kept["value"] == max(values)
    assert kept["step"] == min(chosen, key=lambda each: each["validation_loss"])["step"]
    assert best < len(values) - 1
    # What is exported is what was chosen: read again at the end, it gives the number by which it was chosen.
    assert lives.result["evaluation"]["validation_accuracy"] == max(values)
    assert lives.result["evaluation"]["step"] == kept["step"]
    assert weights_sha256(exported_tensors(lives)) == lives.result["weights_sha256"] == lives.exported()["weights_sha256"]
    (tested,) = [event for event in lives.events if event["event"] == "evaluation" and "test_accuracy" in event]
    assert (tested["split"], tested["step"]) == ("test", kept["step"])


def test_a_run_killed_at_every_evaluation_chooses_the_same_weights_to_the_bit(photos: Path, tmp_path: Path) -> None:
    """Once after the evaluation, before its checkpoint, and once more while that is on its way; and before the test split is read. What is
    evaluated, chosen and exported is the average of the weights."""
    flags = (*ROUGH, "--train.epochs", "12", "--train.patience", "3", "--train.ema", "0.5")
    whole = run_of(tmp_path / "whole", photos, *flags)
    assert whole.live()
    steps = [event["step"] for event in validated(whole)]
    assert 3 < len(steps) < 12, "it is to end early"

    killed, strikes = run_of(tmp_path / "killed", photos, *flags), set()
    places = [(step, where) for step in steps for where in ("evaluated", "saved")] + [(None, "final")]

    def until(step: int, where: str) -> None:
        place = (step if where != "final" else None, where)
        if place in places and place not in strikes:
            strikes.add(place)
            raise Killed

    while not killed.live(until):
        assert killed.attempts <= len(places)
    assert strikes == set(places)
    assert killed.result["selection"] == whole.result["selection"]
    assert killed.result["selection"]["stopped_early"]
    assert killed.result["steps_done"] == whole.result["steps_done"] == steps[-1]
    assert killed.result["evaluation"] == whole.result["evaluation"]
    for key in ("weights_sha256", "file_sha256"):
        assert killed.exported()[key] == whole.exported()[key]
    assert (killed.evaluated[-1], killed.evaluated.count("test")) == ("test", 1)  # the other lives did not come to it


def test_every_checkpoint_holds_the_weights_of_the_choice_that_its_history_makes(photos: Path, tmp_path: Path) -> None:
    """So retention, damage and another driver have nothing to do with it: any checkpoint is enough."""
    lives = run_of(tmp_path, photos, *ROUGH, "--train.epochs", "6", "--train.checkpoint-every", "2", "--cluster.keep-checkpoints", "50")
    assert lives.live()
    commits = [lives.store.load(each.step, each.generation, path=each.path) for each in lives.store.commits()]
    own = {commit.step: commit.read("model.safetensors") for commit in commits}
    carried = 0
    for commit in commits:
        best = commit.meta.get("best_step")
        assert (best is None) == (commit.step < 3)  # there was no evaluation yet
        assert (BEST_FILE in commit.files) == (best is not None and best != commit.step)
        if BEST_FILE in commit.files:
            carried += 1
            assert commit.read(BEST_FILE) == own[best]
    assert carried > 3


def test_a_run_whose_newest_checkpoints_are_damaged_goes_back_and_chooses_the_same(photos: Path, tmp_path: Path) -> None:
    flags = (*ROUGH, "--train.epochs", "6")
    whole, damaged = run_of(tmp_path / "whole", photos, *flags), run_of(tmp_path / "damaged", photos, *flags)
    assert whole.live()

    def kill_before_the_end(step: int, where: str) -> None:
        if where == "final":
            raise Killed

    assert not damaged.live(kill_before_the_end)
    newest = damaged.newest
    assert newest is not None
    model = Path(newest.storage.at(newest.path)) / "model.safetensors"
    model.write_bytes(model.read_bytes()[:-1] + bytes([model.read_bytes()[-1] ^ 1]))
    assert damaged.live()
    assert damaged.result["weights_sha256"] == whole.result["weights_sha256"]
    assert damaged.result["selection"] == whole.result["selection"]


def test_without_a_validation_split_test_is_watched_and_the_last_weights_are_kept(tmp_path: Path) -> None:
    photos = write_images(tmp_path / "photos", {"train": 60, "test": 30})
    lives = run_of(tmp_path, photos, *ROUGH, "--train.epochs", "3")
    assert lives.config.train.select == "last"
    assert lives.live()
    assert lives.evaluated == ["test"] * 3
    assert lives.result["selection"] is None
    newest = lives.newest
    assert newest is not None
    assert sorted(newest.files) == ["curves.parquet", "history.json", "model.safetensors", "optimizer.safetensors", "rank-00000.json"]
    assert "best_step" not in newest.meta


def test_select_last_keeps_the_last_weights_and_still_reads_test_once(photos: Path, tmp_path: Path) -> None:
    lives = run_of(tmp_path, photos, *ROUGH, "--train.epochs", "3", "--train.select", "last", "--train.ema", "0.5")
    assert lives.live()
    assert lives.evaluated == ["validation"] * 4 + ["test"]
    newest = lives.newest
    assert newest is not None
    assert BEST_FILE not in newest.files
    average = safetensors.torch.load(newest.read("ema.safetensors"))
    assert all(torch.equal(tensor, average[name]) for name, tensor in exported_tensors(lives).items())
    assert lives.result["evaluation"]["step"] == 9
    assert lives.result["selection"]["kept"]["step"] == 9


def test_a_run_that_goes_on_with_other_workers_chooses_the_same_weights_to_the_bit(photos: Path, tmp_path: Path) -> None:
    flags = (*ROUGH, "--train.epochs", "12", "--train.patience", "3", "--train.select-measure", "loss")
    whole, resized = run_of(tmp_path / "whole", photos, *flags), run_of(tmp_path / "resized", photos, *flags)
    assert whole.live()
    best = whole.result["selection"]["kept"]["step"]

    def until(step: int, where: str) -> None:
        if (step, where) == (best + 3, "evaluating"):  # the best is one epoch old
            raise Killed

    assert not resized.live(until)
    command = [sys.executable, "-m", "tests.trainer.lives", str(tmp_path / "resized"), "--data.path", str(photos)]
    done = subprocess.run([*command, *BATCHES, *TINY, *flags], stdout=subprocess.PIPE, check=True, timeout=120)
    there = json.loads(done.stdout)
    assert there["evaluated"][-2:] == ["validation", "test"]
    assert there["result"]["selection"] == whole.result["selection"], "every loss has the same bits"
    assert there["result"]["selection"]["stopped_early"]
    assert there["result"]["steps_done"] == whole.result["steps_done"]
    assert there["exported"] == whole.exported()
