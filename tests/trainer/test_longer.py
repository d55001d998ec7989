"""A run that has finished is trained on: exactly where its schedule is constant, else as a new run from its weights."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from cluster.storage import Storage, open_storage
from tests.trainer.test_run_helpers import of
from trainer.drive.identity import check_same_identity, check_same_run, find, is_longer
from trainer.settings.cli import parse
from trainer.settings.fields import settings
from trainer.settings.toml import to_toml
from trainer.settings.tree import ModelConfig, OptimConfig, RunConfig, TrainConfig

CONSTANT = RunConfig(run="r", optim=OptimConfig(schedule="constant"), train=TrainConfig(epochs=3, virtual_ranks=1))
COSINE = replace(CONSTANT, optim=OptimConfig(schedule="cosine"))


def with_epochs(config: RunConfig, epochs: int, **train: Any) -> RunConfig:
    return replace(config, train=replace(config.train, epochs=epochs, **train))


@pytest.fixture
def storage(tmp_path: Path) -> Storage:
    return open_storage(tmp_path)


def finished(storage: Storage, config: RunConfig, epochs: float | None) -> None:
    storage.write_atomic("r/config.toml", to_toml(config).encode())
    storage.write_atomic("r/summary.json", json.dumps({"status": "finished", "epochs": epochs}).encode())


def test_a_run_of_a_constant_schedule_goes_on_with_more_epochs_until_it_has_them(storage: Storage) -> None:
    finished(storage, CONSTANT, epochs=3.0)
    longer = with_epochs(CONSTANT, 5)
    check_same_run(longer, find(storage, "r"), "")
    assert find(storage, "r").has_finished_as(CONSTANT)
    assert not find(storage, "r").has_finished_as(longer)
    storage.write_atomic("r/config.toml", to_toml(longer).encode())  # killed on its way: the summary is the shorter run's
    assert not find(storage, "r").has_finished_as(longer)
    finished(storage, longer, epochs=5.0)
    assert find(storage, "r").has_finished_as(longer)


def test_a_run_cut_short_by_max_steps_and_a_summary_of_an_older_release_have_finished(storage: Storage) -> None:
    finished(storage, with_epochs(COSINE, 3, max_steps=4), epochs=0.5)
    assert find(storage, "r").has_finished_as(with_epochs(COSINE, 3, max_steps=4))
    finished(storage, COSINE, epochs=None)
    assert find(storage, "r").has_finished_as(COSINE)


def test_claims_and_commits_let_a_constant_run_grow_and_no_other_change_through() -> None:
    record = of(CONSTANT).record()
    check_same_identity("r", record, of(with_epochs(CONSTANT, 5)))
    for other in (
        with_epochs(CONSTANT, 2),  # the rest of a longer run is no shorter run
        with_epochs(CONSTANT, 5, seed=1),
        replace(with_epochs(CONSTANT, 5), optim=OptimConfig(schedule="constant", lr=0.5)),
    ):
        with pytest.raises(ValueError, match="started with other settings"):
            check_same_identity("r", record, of(other))
    with pytest.raises(ValueError, match="started with other settings"):
        check_same_identity("r", of(COSINE).record(), of(with_epochs(COSINE, 5)))


@pytest.mark.parametrize("config", [COSINE, replace(CONSTANT, optim=OptimConfig(schedule="triangular", warmup_steps=1))])
def test_another_schedule_is_told_how_to_train_on(storage: Storage, config: RunConfig) -> None:
    finished(storage, config, epochs=3.0)
    with pytest.raises(ValueError, match="has finished its 3 epochs, and its learning rates") as caught:
        check_same_run(with_epochs(replace(config, storage=storage.uri), 5), find(storage, "r"), "")
    assert f"whose schedule begins anew: --run r-more --model.weights {storage.uri}/r." in str(caught.value)
    with pytest.raises(ValueError, match="started with other settings"):
        check_same_run(with_epochs(config, 2), find(storage, "r"), "")


def test_steps_and_epochs_at_once_are_no_longer_run() -> None:
    now = settings(with_epochs(CONSTANT, 5, max_steps=9))
    assert not is_longer(now, {"train.epochs": (3, 5), "train.max_steps": (0, 9)})
    assert not is_longer(now, {"train.epochs": (3, 5)})


def test_a_runs_folder_and_its_model_folder_stand_for_the_exported_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "runs" / "r" / "model" / "model.safetensors"
    file.parent.mkdir(parents=True)
    file.touch()
    monkeypatch.chdir(tmp_path)
    for given in (tmp_path / "runs" / "r", file.parent, file, "runs/r", "./runs/r/model/"):
        assert parse(["--model.weights", str(given)]).config.model.weights == str(file)
    assert parse(["--model.weights", "runs"]).config.model == ModelConfig(weights="runs")
