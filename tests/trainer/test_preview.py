"""`finetune preview`: its sheet shows the tensors that a step would get, and it refuses what a run refuses."""

from contextlib import closing
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dataio.config import DataConfig
from dataio.loader import Loader
from dataio.parquet import open_dataset
from trainer.learn.augment.mix import make_mix
from trainer.learn.build import views_of
from trainer.learn.gradients import PassConfig, Passes
from trainer.learn.own import own_augment
from trainer.preview import Previewer, main, places, settled
from trainer.settings.spec import order_of
from trainer.settings.tree import ModelConfig, RunConfig, TrainConfig
from trainer.tasks.make import make_task

SAMPLE = Path(__file__).resolve().parents[2] / "dataio" / "samples" / "fashion_mnist"
DATA = DataConfig(path=str(SAMPLE), batch_size=80, policy="trivial", jitter=(0.2, 0.2, 0.2, 0.1), erase=0.5, rotate=10)
CPU = torch.device("cpu")


@pytest.mark.parametrize(
    "config",
    [
        RunConfig(data=DATA),
        RunConfig(data=replace(DATA, crop="resized"), model=ModelConfig(image_size=20)),
        RunConfig(data=DATA, train=TrainConfig(virtual_ranks=4, mixup=0.5, cutmix=1.0)),
        RunConfig(data=replace(DATA, augment="tests.trainer.own_functions:darken"), train=TrainConfig(virtual_ranks=2)),
    ],
    ids=["samples", "resized", "mixed", "own"],
)
def test_a_sheet_shows_what_a_step_gets(config: RunConfig) -> None:
    dataset = open_dataset(SAMPLE)
    config = settled(replace(config, workers="1"), dataset)
    order = order_of(config, dataset.manifest)
    rows = Previewer(config, dataset, CPU).rows(5, 2)
    ids = order.samples(0, 0, 0)[:5]
    loader = Loader(
        dataset,
        replace(config.data, cache="none"),
        order=order,
        virtual_ranks=range(order.virtual_ranks),
        device=CPU,
        seed=config.train.seed,
        on_bad=print,
    )
    with closing(loader.evaluate("train", ids, 5)) as plain:
        (batch,) = plain
    side = config.model.image_size or 28
    if side == 28:
        assert all(np.array_equal(row.plain, image.permute(1, 2, 0)) for row, image in zip(rows, batch.samples, strict=True))
    assert [row.name for row in rows] == [dataset.manifest.classes[label] for label in batch.targets["label"].tolist()]
    train = config.train
    passes = Passes(
        torch.nn.Conv2d(3, 1, 1),
        make_task(config.task, dataset.manifest.targets),
        PassConfig(
            seed=train.seed,
            augment=own_augment(config.data.augment, train.seed),
            views=views_of(config),
            mix=make_mix(seed=train.seed, mixup=train.mixup, cutmix=train.cutmix),
        ),
        eager=lambda samples, targets: samples.sum(),
        compiled=None,
    )
    for epoch in range(2):
        for step, virtual_rank, those in places(order, epoch, ids):
            number = epoch * order.steps_per_epoch + step
            with closing(loader.train(number, number + 1)) as steps:
                [(samples, _)] = passes.cut(next(steps)[virtual_rank])
            batch_ids = order.samples(epoch, step, virtual_rank).tolist()
            for each in those.tolist():
                seen = samples[batch_ids.index(each)].permute(1, 2, 0).numpy()
                shown = rows[ids.tolist().index(each)].epochs[epoch]
                assert shown.shape == (side, side, 3)
                apart = np.abs(seen.astype(int) - shown.astype(int))
                assert apart.max() <= 1  # an image in another batch
                assert (apart > 0).mean() < 1e-3


def test_places_finds_each_sample_once_an_epoch() -> None:
    config = settled(RunConfig(workers="1", data=DATA, train=TrainConfig(virtual_ranks=4)), open_dataset(SAMPLE))
    order = order_of(config, open_dataset(SAMPLE).manifest)
    ids = np.array([3, 1999, 700, 42])
    for epoch in range(3):
        found = [each for _, _, those in places(order, epoch, ids) for each in those.tolist()]
        assert sorted(found) == sorted(ids.tolist())


def test_the_command_writes_a_sheet(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "sheet.png"
    words = ["--config", "quickstart", "--data.path", str(SAMPLE), "--workers", "1", "--data.policy", "rand", "--train.cutmix", "1"]
    assert main([*words, "--samples", "3", "--epochs", "4", "--out", str(out)]) == 0
    with Image.open(out) as picture:
        assert picture.format == "PNG"
        width, height = picture.size
    assert width > height > 3 * 64
    assert "3 images as they are, and in epochs 1 to 4 as the model gets them" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--data.policy", "triviall"], "triviall"),
        (["--data.policy-ops", "3"], "error: data.policy_ops is set, but it belongs to data.policy=rand"),
        (["--data.pad", "28"], "error: data.pad=28 is not below the images' side of 28 pixels"),
        (["--data.augment", "nowhere:at_all"], "error: data.augment=nowhere:at_all: nowhere cannot be imported"),
        (["--samples", "0"], "error: --samples 0 does not fit on a sheet; use 1 to 64"),
        (["--out", "sheet.jpg"], "error: --out sheet.jpg is no PNG file"),
        (["--data.path", "/nowhere/at/all"], "/nowhere/at/all"),
    ],
)
def test_what_a_run_refuses_is_refused(words: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = [] if "--data.path" in words else ["--data.path", str(SAMPLE)]
    out = [] if "--out" in words else ["--out", str(tmp_path / "sheet.png")]
    with pytest.raises(SystemExit) as stop:
        main([*given, *out, *words])
    assert stop.value.code == 2
    assert said in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_folder_that_is_not_there_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--data.path", str(SAMPLE), "--samples", "1", "--epochs", "1", "--out", str(tmp_path / "none" / "sheet.png")]) == 1
    assert "cannot be written: No such file or directory" in capsys.readouterr().err
