"""The rule for photographs: what it chooses follows from the images alone, never changes what a user gives, and renames no run."""

import math
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from rich.console import Console

from cluster.storage import open_storage
from dataio.manifest import Manifest, SplitInfo
from dataio.schema import single_label
from trainer.drive.dry_run import dry_run
from trainer.drive.set_up import SetUp
from trainer.drive.stages import Asked, Environment, WithData
from trainer.drive.start import place, with_data
from trainer.models.stem import is_resnet_like
from trainer.settings.cli import Invocation, parse
from trainer.settings.fields import declared, replaced, settings
from trainer.settings.photos import CHOSEN, LEAST_SEEN, MOST_EVALUATIONS, RATES_AT_32, TABLE, choice_of, is_enlarged, row_of
from trainer.settings.toml import load, to_toml
from trainer.settings.tree import RunConfig

QUIET = Console(quiet=True)
SEVERAL = {"40x60": 30, "50x50": 3}


def manifest_of(train: int, sizes: dict[str, int] | None = None) -> Manifest:
    return Manifest(
        targets=single_label(("ant", "bee")),
        splits={"train": SplitInfo(count=train, shards=()), "test": SplitInfo(count=10, shards=())},
        fingerprint="ab" * 32,
        image_sizes=SEVERAL if sizes is None else sizes,
        quarantined=0,
        source="folder",
        identity="cd" * 32,
    )


# --- the table ------------------------------------------------------------------------------------------------------------------------


@given(st.integers(1, 10_000_000), st.integers(1, 10_000_000))
def test_more_images_never_mean_smaller_batches_or_more_epochs_and_never_less_training(one: int, other: int) -> None:
    few, many = row_of(min(one, other)), row_of(max(one, other))
    assert few.batch_size <= many.batch_size
    assert few.epochs >= many.epochs
    assert few.images <= min(one, other)
    seen = [row.images * row.epochs for row in TABLE]
    assert seen == sorted(seen)
    steps = [each / row.batch_size for each, row in zip(seen, TABLE, strict=True)]
    assert steps == sorted(steps)


@given(st.integers(1, 499))
def test_few_images_come_as_often_as_it_takes_and_are_not_evaluated_after_each_short_epoch(images: int) -> None:
    found = choice_of(RunConfig(), manifest_of(images), given=set(), recipes=()).config
    assert LEAST_SEEN <= images * found.train.epochs < LEAST_SEEN + images
    evaluations = found.train.epochs / found.train.eval_every_epochs
    assert MOST_EVALUATIONS / 2 <= min(evaluations, found.train.epochs) <= MOST_EVALUATIONS
    if found.train.eval_every_epochs > 1:
        assert found.train.checkpoint_every == found.train.eval_every_epochs * math.ceil(images / found.data.batch_size)


def test_evaluations_follow_the_epochs_that_a_user_gives() -> None:
    assert chosen(["--data.path", "pets", "--train.epochs", "3"], manifest_of(40)).train.eval_every_epochs == 1
    assert chosen(["--data.path", "pets", "--train.epochs", "200"], manifest_of(1_200)).train.eval_every_epochs == 10
    assert chosen(["--data.path", "pets", "--train.eval-every-epochs", "2"], manifest_of(40)).train.eval_every_epochs == 2


# --- what is chosen -------------------------------------------------------------------------------------------------------------------


def chosen(words: list[str], manifest: Manifest, **known: Any) -> RunConfig:
    asked = parse(words)
    return choice_of(asked.config, manifest, given=asked.given, recipes=asked.recipes, **known).config


def test_a_folder_of_several_sizes_gets_the_recipe_and_what_its_number_of_images_asks_for() -> None:
    found = chosen(["--data.path", "pets"], manifest_of(1_200))
    photos = settings(load("photos", RunConfig()))
    numbers = {"data.batch_size": 32, "train.epochs": 12, "optim.lr": 0.01, "optim.warmup_fraction": 0.1, "data.pad": 6}
    assert settings(found) == photos | numbers | {"data.path": "pets"}
    assert settings(chosen(["--data.path", "pets", "--optim.name", "adamw"], manifest_of(60)))["optim.lr"] == RATES_AT_32["adamw"] / 2


@pytest.mark.parametrize(
    ("words", "manifest"),
    [
        (["--data.path", "pets"], manifest_of(1_200, {"32x32": 1_210})),
        (["--data.path", "pets", "--data.image-size", "64"], manifest_of(1_200)),
        (["--data.path", "pets", "--data.fit=stretch"], manifest_of(1_200)),
        (["--data.path", "pets", "--config", "best"], manifest_of(1_200)),
        (["--config", "best", "--config", "photos"], manifest_of(1_200)),
        ([], manifest_of(0)),
    ],
)
def test_a_run_that_worked_without_the_rule_is_what_it_was(words: list[str], manifest: Manifest) -> None:
    asked = parse(words)
    choice = choice_of(asked.config, manifest, given=asked.given, recipes=asked.recipes)
    assert (choice.config, choice.takes_recipe, choice.said) == (asked.config, False, ())


GIVEN = {
    "data.batch_size": 24,
    "data.flip": False,
    "data.pad": 0,
    "train.epochs": 3,
    "optim.lr": 0.5,
    "optim.warmup_fraction": 0.25,
    "model.normalise": "data",
    "optim.nesterov": False,
    "optim.momentum": 0.5,
}
"""Some of these are the defaults."""


@given(st.sets(st.sampled_from(sorted(GIVEN))), st.integers(1, 3_000), st.sampled_from([(), ("photos",)]))
def test_what_the_user_gives_is_never_changed_even_to_the_default(keys: set[str], images: int, recipes: tuple[str, ...]) -> None:
    config = load("photos", RunConfig()) if recipes else RunConfig()
    for key in keys:
        config = replaced(config, key, GIVEN[key])
    after = settings(choice_of(config, manifest_of(images), given=keys, recipes=recipes).config)
    assert {key: after[key] for key in keys} == {key: GIVEN[key] for key in keys}
    assert "optim.lr" in keys or after["optim.lr"] == pytest.approx(0.01 * after["data.batch_size"] / 32, rel=0.01)


def test_flags_of_all_forms_are_given() -> None:
    given = parse(["--data.no-flip", "--data.pad=4", "--train.epochs", "10", "--optim.nesterov"]).given
    assert given == {"data.flip", "data.pad", "train.epochs", "optim.nesterov"}


def test_a_warm_up_in_steps_is_a_users_warm_up() -> None:
    found = chosen(["--data.path", "pets", "--optim.warmup-steps", "7"], manifest_of(1_200))
    assert found.optim.warmup_of(400) == 7


@given(st.integers(1, 40), st.integers(1, 100_000))
def test_the_batch_can_be_shared_among_any_number_of_workers(workers: int, images: int) -> None:
    found = choice_of(RunConfig(), manifest_of(images), given=set(), recipes=(), workers=workers)
    assert found.config.data.batch_size % workers == 0


@pytest.mark.parametrize(
    ("words", "side", "enlarged"),
    [
        (["--model.name", "timm/tf_efficientnet_lite0", "--model.weights", "w.pth"], 28, 96),
        (["--model.name", "mobilenet_v3_small"], 64, 96),
        (["--model.name", "mobilenet_v3_small"], 65, 0),
        (["--model.name", "mobilenet_v3_small", "--model.image-size", "48"], 28, 48),
        (["--model.name", "mobilenet_v3_small", "--model.weights", "none"], 28, 0),
        (["--model.name", "resnet18"], 28, 0),
        (["--model.name", "resnet18", "--model.stem", "native"], 28, 96),
    ],
)
def test_small_images_are_enlarged_for_a_network_that_was_pretrained_on_larger_ones(words: list[str], side: int, enlarged: int) -> None:
    manifest = manifest_of(1_200, {f"{side}x{side}": 1_210})
    found = chosen(["--config", "photos", *words], manifest)
    assert (found.model.image_size, found.model.interpolation == "bicubic") == (enlarged, enlarged == 96)
    assert chosen(["--config", "photos", *words], manifest, saved=found) == found
    said = " ".join(choice_of(parse(words).config, manifest, given=parse(words).given, recipes=("photos",)).said)
    assert ("enlarged, by model.image_size=96" in said) == (enlarged == 96)


def test_networks_that_fold_their_stem_are_known_by_their_names() -> None:
    import torch
    import torchvision

    for name in torchvision.models.list_models(module=torchvision.models):
        if "res" in name:
            with torch.device("meta"):
                folds = is_resnet_like(torchvision.models.get_model(name))
            assert is_enlarged(28, parse(["--model.name", name]).config) != folds, name
    for name in ("timm/resnet18", "timm/resnet50.a1_in1k", "timm/resnext50_32x4d"):
        assert not is_enlarged(28, parse(["--model.name", name]).config)
    assert is_enlarged(28, parse(["--model.name", "timm/resnet50d"]).config), "its stem is another one"


def test_a_run_that_goes_on_keeps_what_was_chosen_for_it() -> None:
    """A later release may have another table."""
    words = ["--config", "photos", "--data.path", "pets", "--run", "r"]
    began = replace(parse(words).config, optim=replace(parse(words).config.optim, lr=0.02, warmup_fraction=0.0))
    found = chosen(words, manifest_of(60), saved=began)
    assert {key: settings(found)[key] for key in CHOSEN} == {key: settings(began)[key] for key in CHOSEN}


def test_each_choice_is_a_setting() -> None:
    assert set(CHOSEN) <= set(declared(RunConfig))


# --- a run and its dry run ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Forty images of several sizes, one in forty broken: more than the default allows, less than the recipe does."""
    root = tmp_path_factory.mktemp("pets")
    rng = np.random.default_rng(0)
    for number in range(420):
        folder = root / ("ant", "bee")[number % 2]
        folder.mkdir(exist_ok=True)
        file = folder / f"{number:03d}.png"
        Image.fromarray(rng.integers(0, 256, (20 + number % 3, 24, 3), dtype=np.uint8)).save(file)
        if number % 35 == 0:
            file.write_bytes(file.read_bytes()[:-30])  # its header is sound
    return root


def invocation_of(pets: Path, tmp_path: Path, *more: str) -> Invocation:
    model = ["--model.name", "shufflenet_v2_x0_5", "--model.weights", "none", "--workers", "1"]
    return parse(["--data.path", str(pets), "--data.root", str(tmp_path / "root"), "--storage", str(tmp_path / "runs"), *model, *more])


def opened(asked: Invocation, seen: RunConfig | None = None) -> WithData:
    here = Environment(ray_address="", in_job=False, is_verbose=False, cpus=2, process_started=0.0)
    wanted = Asked(config=asked.config, prefix="shufflenet", command="", environment=here, recipes=asked.recipes, given=asked.given)
    return with_data(wanted, QUIET, SetUp(QUIET), seen)


def test_a_folder_of_photographs_needs_no_flag_but_its_path_and_dry_run_and_run_choose_alike(pets: Path, tmp_path: Path) -> None:
    console = Console(width=200, record=True, file=open(os.devnull, "w"))  # noqa: SIM115
    asked = invocation_of(pets, tmp_path)
    dry_run(asked.config, asked.recipes, console, given=asked.given)
    said = " ".join(console.export_text().split())
    assert "the images have several sizes: they are cropped to 22 x 22 pixels, and the run takes the recipe photos" in said
    assert "chosen for 366 training images of 3 sizes: data.batch_size=16, train.epochs=21, optim.lr=0.005" in said
    seen = choice_of(asked.config, manifest_of(366), given=asked.given, recipes=()).config
    data = opened(asked, seen)
    assert data.dataset.manifest.quarantined == 12
    placed = place(data, 1)
    assert placed.config.run.startswith("photos-")
    assert (placed.config.data.batch_size, placed.config.train.epochs, data.shape) == (16, 21, (22, 22))
    assert any("chosen for" in line for line in placed.said)
    # the second time the data are converted, and the name is the same
    again = place(opened(asked, seen), 1)
    assert again.config.run == placed.config.run
    open_storage(placed.config.storage).write_atomic(f"{placed.config.run}/config.toml", to_toml(placed.config).encode())
    goes_on = settings(place(opened(asked, seen), 1).config)
    assert {key: goes_on[key] for key in CHOSEN} == {key: settings(placed.config)[key] for key in CHOSEN}


def test_the_documented_table_is_the_rule() -> None:
    text = (Path(__file__).parents[2] / "docs" / "photographs.md").read_text()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("| f")]
    shown = [f"fewer than {TABLE[1].images}", *(f"from {row.images:,}" for row in TABLE[1:])]
    epochs = [f"{LEAST_SEEN:,} / images, rounded up", *(str(row.epochs) for row in TABLE[1:])]
    assert rows == [[name, str(row.batch_size), each] for name, row, each in zip(shown, TABLE, epochs, strict=True)]
