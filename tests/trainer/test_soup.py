"""A soup is the mean of its members' weights with statistics of its own, and a folder that the commands take as they take a run."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from cluster.storage import Storage, open_storage
from dataio.config import DataConfig
from dataio.parquet import open_dataset
from dataio.selection import selected
from tests.texts import make_model, rows, write_csv
from tests.trainer.text_run import finished_text_run, manifest_of, text_config
from trainer.export.model_folder import export_model
from trainer.learn.build import task_of
from trainer.rank.finished import evaluate_finished
from trainer.runs.choice import Rule, rule_of
from trainer.runs.folder import RunFolder
from trainer.search.soup import average, mixable, relearn_statistics, soup
from trainer.settings.fields import replaced
from trainer.settings.toml import to_toml
from trainer.settings.tree import RunConfig

SAMPLE = Path(__file__).resolve().parents[2] / "dataio" / "samples" / "fashion_mnist"
CPU = torch.device("cpu")
DATA = DataConfig(path=str(SAMPLE), fold="1/5", part=60, image_size=32, fit="stretch", batch_size=20)


def config_of(name: str) -> RunConfig:
    config = replace(RunConfig(), run=name, data=DATA)
    for key, value in {
        "model.name": "shufflenet_v2_x0_5",
        "model.weights": "none",
        "model.stem": "native",
        "train.precision": "fp32",
        "train.channels_last": "off",
        "train.virtual_ranks": 2,
        "train.select": "best",
        "cluster.threads_per_worker": 1,
    }.items():
        config = replaced(config, key, value)
    return config


def run_that_answers(storage: Storage, name: str, answer: int, *, seed: int = 0) -> RunConfig:
    """A finished run whose model gives every image the class `answer`."""
    config = config_of(name)
    manifest = selected(open_dataset(str(SAMPLE)), DATA).manifest
    task = task_of(config, manifest)
    model = task.build(config.model, seed=seed, shape=(32, 32))
    head = [module for module in model.modules() if isinstance(module, nn.Linear)][-1]
    with torch.no_grad():
        head.weight.zero_()
        head.bias.copy_(torch.eye(len(head.bias))[answer])
    summary = {"status": "finished", "workers": 1, "threads_per_worker": 1, "dataset_fingerprint": manifest.fingerprint, "steps": 4}
    storage.write_atomic(f"{name}/config.toml", to_toml(replace(config, storage=storage.uri)).encode())
    storage.write_atomic(f"{name}/summary.json", json.dumps(summary).encode())
    export_model(storage=storage, run=name, tensors=model.state_dict(), config=config, task=task, data_image_size=(32, 32), summary=summary)
    return config


def rule_and_info(config: RunConfig) -> Rule:
    return rule_of(config.train, task_of(config, open_dataset(str(SAMPLE)).manifest).info)


def test_an_average_is_the_mean_of_each_tensor_and_counters_stay() -> None:
    one, two = {"w": torch.tensor([1.0, 1e8]), "n": torch.tensor(3)}, {"w": torch.tensor([2.0, 1.0]), "n": torch.tensor(9)}
    mixed = average([one, two])
    assert torch.equal(mixed["w"], torch.tensor([1.5, 50000000.5]))
    assert torch.equal(mixed["n"], torch.tensor(3))
    assert torch.equal(average([one])["w"], one["w"])


def test_statistics_are_the_plain_mean_over_the_batches() -> None:
    torch.manual_seed(0)
    norm = nn.BatchNorm2d(3)
    model = nn.Sequential(norm, nn.Dropout(0.5)).eval()
    batches = [torch.randn(8, 3, 4, 4) for _ in range(5)]
    relearn_statistics(model, nn.Identity(), batches)
    means = torch.stack([batch.mean((0, 2, 3)) for batch in batches]).mean(0)
    variances = torch.stack([batch.var((0, 2, 3)) for batch in batches]).mean(0)
    assert torch.allclose(norm.running_mean, means, atol=1e-6)  # type: ignore[arg-type]
    assert torch.allclose(norm.running_var, variances, atol=1e-5)  # type: ignore[arg-type]
    assert not norm.training
    assert norm.momentum == 0.1
    relearn_statistics(nn.Linear(2, 2), nn.Identity(), iter(()))  # a model without such layers: nothing is asked for


def test_only_trials_with_the_best_ones_model_are_mixed() -> None:
    config = config_of("a")
    others = [replaced(config, "optim.lr", 1.0), replaced(config, "model.name", "resnet18"), replaced(config, "model.image_size", 64)]
    assert mixable([config, *others]) == [0, 1]


def test_a_soup_of_two_is_a_folder_like_a_runs(tmp_path: Path) -> None:
    storage = open_storage(tmp_path)
    names = ["trial-001", "trial-000"]
    configs = [run_that_answers(storage, name, answer) for name, answer in zip(names, (1, 0), strict=True)]
    found = soup(storage, names, configs, rule_and_info(configs[0]), CPU)
    assert found.members == ("trial-001", "trial-000"), "each class has a tenth of the images: together they are no worse"
    assert found.score == pytest.approx(0.1)
    again = evaluate_finished(RunFolder(storage=storage, name="soup"), {}, split="test", device=CPU)
    assert again.result.measures["accuracy"] == found.test
    assert again.recorded == found.test
    assert soup(storage, names, configs, rule_and_info(configs[0]), CPU) == found, "the same bits"


def test_a_soup_of_texts_is_a_folder_like_a_runs_too(tmp_path: Path) -> None:
    model, table = make_model(tmp_path / "model"), write_csv(tmp_path / "texts.csv", rows(range(200)))
    storage, names = open_storage(tmp_path), ["trial-001", "trial-000"]
    configs = [text_config(model, table, run=name, data__fold="1/5", train__select="best") for name in names]
    for config, answer in zip(configs, (1, 0), strict=True):
        finished_text_run(storage, config, answer=answer)
    rule = rule_of(configs[0].train, task_of(configs[0], manifest_of(configs[0])).info)
    found = soup(storage, names, configs, rule, CPU)
    assert found.members == ("trial-001", "trial-000"), "each class has half of the texts: together they are no worse"
    again = evaluate_finished(RunFolder(storage=storage, name="soup"), {}, split="test", device=CPU)
    assert again.result.measures["accuracy"] == found.test == again.recorded == 0.5
    assert soup(storage, names, configs, rule, CPU) == found, "the same bits"


def test_a_trial_that_makes_it_worse_is_left_out_and_an_older_soup_goes(tmp_path: Path) -> None:
    storage = open_storage(tmp_path)
    good, bad = (run_that_answers(storage, name, answer, seed=answer) for name, answer in (("trial-001", 1), ("trial-000", 1)))
    path = tmp_path / "trial-000" / "model" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ValueError, match=r"model\.safetensors"):
        soup(storage, ["trial-001", "trial-000"], [good, bad], rule_and_info(good), CPU)
    run_that_answers(storage, "soup", 3)
    other = replaced(bad, "model.image_size", 64)
    found = soup(storage, ["trial-001", "trial-000"], [good, other], rule_and_info(good), CPU)
    assert (found.members, found.tried, found.test) == (("trial-001",), 1, None)
    assert not (tmp_path / "soup").exists()
