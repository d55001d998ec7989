"""Runs on a part of the training images, with a fold held out of them: the same bits for any workers and after a kill, and all is told."""

import json
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from cluster.ledger import read_ledger
from dataio.config import DataConfig
from dataio.prepared import prepared
from dataio.scan import look_at
from dataio.selection import selected
from tests.trainer.lives import TINY, Killed, Lives, write_images
from trainer.drive.data import about_choice
from trainer.drive.problems import Facts, problems_of, with_balance
from trainer.settings.identity import deciding_settings
from trainer.settings.selection import watched_split
from trainer.settings.spec import order_of
from trainer.settings.tree import RunConfig

FLAGS = ("--data.part", "0.5", "--data.fold", "2/4", "--data.batch-size", "8", "--train.epochs", "3", "--train.checkpoint-every", "2")


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_images(tmp_path_factory.mktemp("photos"), {"train": 64, "test": 24})


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def test_the_bits_do_not_depend_on_workers_or_on_a_kill_and_the_fold_is_watched(photos: Path, tmp_path: Path) -> None:
    def of(name: str) -> Lives:
        return Lives.of(tmp_path / name, "--data.path", str(photos), *FLAGS, *TINY, "--train.ledger")

    whole = of("whole")
    assert whole.live()
    assert whole.evaluated == ["validation"] * 3 + ["validation", "test"], "the fold chooses the weights"

    killed = of("killed")

    def until(step: int, where: str) -> None:
        if (step, where) == (4, "saved"):  # in the middle of the second epoch of three steps
            raise Killed

    assert not killed.live(until)
    command = [sys.executable, "-m", "tests.trainer.lives", str(tmp_path / "killed"), "--data.path", str(photos)]
    done = subprocess.run([*command, *FLAGS, *TINY, "--train.ledger"], stdout=subprocess.PIPE, check=True, timeout=300)
    there = json.loads(done.stdout)
    assert there["result"]["weights_sha256"] == whole.result["weights_sha256"]
    assert there["exported"] == whole.exported()

    seen: dict[int, Counter[int]] = {}
    for entry in read_ledger(whole.folder / "ledger"):
        seen.setdefault(entry.epoch, Counter()).update(entry.ids)
    assert seen == {epoch: Counter(range(24)) for epoch in range(3)}, "half of the 48 that the fold leaves, each once an epoch"


def test_a_choice_that_is_off_renames_no_run_and_one_that_is_on_is_another_run() -> None:
    plain = deciding_settings(RunConfig())
    assert not {"data.part", "data.fold", "data.choice_seed"} & plain.keys()
    chosen = deciding_settings(RunConfig(data=DataConfig(part=0.1, fold="1/5", choice_seed=3)))
    assert chosen == plain | {"data.part": 0.1, "data.fold": "1/5", "data.choice_seed": 3}


def test_before_there_is_a_conversion_the_same_is_known_and_told(photos: Path, tmp_path: Path) -> None:
    """What a dry run says is what the run does."""
    data = DataConfig(path=str(photos), root=str(tmp_path / "root"), part=5, fold="2/4", batch_size=4)
    config = RunConfig(data=data)
    before = Facts(config=config, workers=1, looked=look_at(data))
    dataset = selected(prepared(data).dataset, data)
    after = Facts(config=config, workers=1, looked=look_at(data))
    told = list(about_choice(dataset.selected))
    assert told[0] == (
        "trains on 5 of 64 images, stratified by class; fold 2 of 4, 16 images, is the validation split "
        "(data.part=5, data.fold=2/4, data.choice_seed=0)"
    )
    for facts in (before, after):
        assert list(about_choice(facts.selected)) == told
        assert facts.manifest is not None
        assert watched_split(facts.manifest) == "validation"
        assert order_of(config, facts.manifest, 1).count == order_of(config, dataset.manifest, 1).count == 5
        assert facts.train_counts == (dataset.reading.class_counts["train"] if dataset.reading else ())
        assert problems_of(facts) == []
        too_many = replace(facts, config=replace(config, data=replace(data, part=49)))
        (problem,) = problems_of(too_many)
        assert problem == (
            "data.part=49 is more than the 48 training samples that fold 2 of 4 leaves of 64; use at most 48, or a fraction of them, such "
            "as 0.5"
        )
        unequal = replace(facts, config=replace(config, data=replace(data, part=7)))
        assert with_balance(unequal)[1] == (), "the chosen images count, and they are nearly equal"
