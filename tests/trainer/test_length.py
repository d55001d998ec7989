"""How long a run is on its data: the remainder, the warm-up, what is told, and that a run begun before keeps what it began with."""

import dataclasses
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.storage import open_storage
from cluster.store import Store
from dataio.config import LATER, Before, DataConfig
from dataio.parquet import open_dataset
from tests.trainer.test_step import SAMPLE
from trainer.drive.identity import check_same_run, find, resolved
from trainer.drive.plan import Devices, ModelFacts, describe
from trainer.drive.record import changes, identity_of, told_threads
from trainer.settings.cli import parse
from trainer.settings.fields import as_begun, declared, settings, with_autos_of
from trainer.settings.identity import deciding_settings
from trainer.settings.length import WARMUP_MOST, length_of
from trainer.settings.spec import make_order
from trainer.settings.toml import load, to_toml
from trainer.settings.tree import OptimConfig, RunConfig, TrainConfig

RECIPE = frozenset({"optim.warmup_steps"})
STOPPED = Path(__file__).parents[1] / "golden" / "run_of_86cc2bf"


def manifest_of(count: int) -> Any:
    return SimpleNamespace(fingerprint="ab" * 32, texts=None, splits={"train": SimpleNamespace(count=count)})


def config_of(batch_size: int, *, epochs: int = 4, max_steps: int = 0, virtual_ranks: int = 1, **optim: Any) -> RunConfig:
    return RunConfig(
        data=DataConfig(batch_size=batch_size),
        optim=OptimConfig(**optim),
        train=TrainConfig(epochs=epochs, max_steps=max_steps, virtual_ranks=virtual_ranks),
    )


# --- the remainder ------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("count", "batch_size", "virtual_ranks", "wanted"),
    [(65, 32, 1, "spread"), (64, 32, 1, "last"), (80, 32, 1, "last"), (79, 32, 1, "spread"), (80, 32, 4, "last"), (9, 8, 8, "spread")],
)
def test_a_new_run_decides_once_what_becomes_of_the_remainder(count: int, batch_size: int, virtual_ranks: int, wanted: str) -> None:
    config = config_of(batch_size, virtual_ranks=virtual_ranks)
    decided = length_of(config, manifest_of(count), workers=1).config
    assert decided.data.remainder == wanted
    assert length_of(decided, manifest_of(count), workers=1).config == decided
    dataset: Any = SimpleNamespace(manifest=manifest_of(count))
    assert make_order(config, dataset) == make_order(decided, dataset)  # whoever asks before it is decided finds the same order


def test_no_recipe_that_is_shipped_and_no_pinned_run_has_another_order_than_before() -> None:
    for name, count in (("article", 50_000), ("best", 50_000), ("quickstart", 2_000)):
        assert length_of(load(name, RunConfig()), manifest_of(count), workers=1).config.data.remainder == "last"


@pytest.mark.parametrize("recipe", ["", "article", "best", "quickstart"])
def test_what_was_added_renames_nobody(recipe: str) -> None:
    config = load(recipe, RunConfig()) if recipe else RunConfig()
    assert not {"data.remainder", "optim.warmup_fraction", "data.background"} & deciding_settings(config).keys()


def test_a_setting_that_runs_begun_before_do_not_name_is_later_and_its_default_is_an_auto() -> None:
    known = declared(RunConfig)
    found = {key: setting for key, setting in known.items() if any(isinstance(note, Before) for note in setting.notes)}
    assert found.keys() == {
        "train.small_maps",
        "train.select",
        "data.remainder",
        "optim.warmup_fraction",
        "data.background",
        "data.augment_backend",
    }
    for setting in found.values():
        assert LATER in setting.notes
        assert setting.before != setting.default


@given(st.sampled_from(["auto", "spread", "last"]), st.sampled_from(["auto", "spread", "last"]))
def test_a_users_word_counts_first_and_what_the_run_began_with_second(asked: str, began: str) -> None:
    saved = as_begun(RunConfig(data=DataConfig(remainder=began)))  # type: ignore[arg-type]
    assert saved.data.remainder == ("last" if began == "auto" else began)
    now = with_autos_of(RunConfig(data=DataConfig(remainder=asked)), settings(saved))  # type: ignore[arg-type]
    assert now.data.remainder == (saved.data.remainder if asked == "auto" else asked)


def test_a_run_of_an_earlier_release_goes_on_under_its_name_with_a_short_last_batch(tmp_path: Path) -> None:
    """On 1,999 of 2,000 images its rule would be another one today."""
    dataset = open_dataset(SAMPLE)
    config = dataclasses.replace(config_of(666), run="began", storage=str(tmp_path))
    storage = open_storage(str(tmp_path))
    old = to_toml(config)
    kept = [
        line
        for line in old.splitlines()
        if not line.startswith(("remainder", "warmup_fraction", "small_maps", "background", "augment_backend"))
    ]
    storage.write_atomic("began/config.toml", "\n".join(kept).encode())
    named: Any = {"workers": 1, "fingerprint": "ab" * 32, "weights": "", "prefix": "x", "shape": (28, 28)}
    found = resolved(config, storage, **named)
    check_same_run(found.config, found.found, "")
    length = length_of(found.config, dataset.manifest, workers=1, is_new=found.found.is_new)
    assert (length.config.data.remainder, length.config.data.background) == ("last", "")
    assert [make_order(length.config, dataset).batch_count(step) for step in range(4)] == [666, 666, 666, 2]
    new = resolved(dataclasses.replace(config, run="new"), storage, **named)
    fresh = length_of(new.config, dataset.manifest, workers=1, is_new=new.found.is_new).config
    assert [make_order(fresh, dataset).batch_count(step) for step in range(4)] == [500] * 4
    # Its record, as its claim has it, names none of the settings that were added.
    went_on = identity_of(length.config, dataset.manifest, weights="", device="cpu", threads=1)
    added = ("data.remainder", "data.background", "optim.warmup_fraction")
    record = {**went_on.record(), "settings": {key: value for key, value in went_on.settings.items() if key not in added}}
    assert changes(record, went_on) == {}
    assert changes(record, identity_of(fresh, dataset.manifest, weights="", device="cpu", threads=1)) == {
        "data.background": ("", "white"),
        "data.remainder": ("last", "spread"),
    }


def test_a_run_whose_driver_died_before_it_wrote_its_settings_keeps_what_its_claim_says(tmp_path: Path) -> None:
    storage = open_storage(str(tmp_path))
    Store.open(storage, "r").claim_generation({"identity": {"settings": {"data.batch_size": 32}, "weights": ""}})
    named: Any = {"workers": 1, "fingerprint": "ab" * 32, "weights": "", "prefix": "x", "shape": (28, 28)}
    config = dataclasses.replace(config_of(32), run="r")
    assert find(storage, "r").record is not None
    assert resolved(config, storage, **named).config.data.remainder == "last"


def test_the_run_that_86cc2bf_stopped_is_read_as_it_was_begun() -> None:
    storage = open_storage(str(STOPPED))
    (run,) = (entry.name for entry in storage.list(""))
    saved = find(storage, run).saved
    assert saved is not None
    assert (saved.data.remainder, saved.optim.warmup_fraction, saved.data.background) == ("last", 0.0, "")


@pytest.mark.parametrize(
    ("workers", "virtual_ranks", "threads", "reduction", "device", "is_told"),
    [
        ("1", 2, 0, "tree", "cpu", True),
        ("1", 2, 4, "tree", "cpu", False),  # they are held already
        ("1:2", 2, 0, "tree", "cpu", False),  # a worker has one CPU, however many there are
        ("2", 0, 0, "tree", "cpu", False),  # nobody asked for it
        ("2", 2, 0, "ddp", "cpu", False),
        ("2", 2, 0, "tree", "cuda", False),
    ],
)
def test_who_fixes_the_virtual_ranks_is_told_what_else_the_bits_depend_on(
    workers: str, virtual_ranks: int, threads: int, reduction: Any, device: str, is_told: bool
) -> None:
    config = RunConfig(workers=workers, train=TrainConfig(virtual_ranks=virtual_ranks, reduction=reduction))
    config = dataclasses.replace(config, cluster=dataclasses.replace(config.cluster, threads_per_worker=threads))
    lines = told_threads(config, device=device, threads=3)
    assert len(lines) == is_told
    assert all("--cluster.threads-per-worker 3" in line for line in lines)


# --- warm-up and batches ------------------------------------------------------------------------------------------------------------------


def test_a_recipes_warm_up_is_shortened_on_few_images_and_a_users_is_refused() -> None:
    config = config_of(50, warmup_steps=48, schedule="triangular")
    length = length_of(config, manifest_of(200), workers=1, from_recipes=RECIPE)  # 4 epochs of 4 steps
    assert (length.config.optim.warmup_fraction, length.config.optim.warmup_of(16)) == (WARMUP_MOST, 5)
    (line,) = length.said
    assert line.startswith("the recipe's warm-up of 48 steps is made for longer runs; this one of 16 steps warms up for 5")
    assert length_of(length.config, manifest_of(200), workers=1, from_recipes=RECIPE).config == length.config
    with pytest.raises(ValueError, match=r"optim\.warmup_steps=48 does not end before the run's 16 steps do; use at most 15"):
        length_of(config, manifest_of(200), workers=1)
    begun = length_of(config, manifest_of(200), workers=1, from_recipes=RECIPE, is_new=False)
    assert (begun.config.optim.warmup_of(16), begun.said) == (48, ())


@pytest.mark.parametrize("max_steps", [0, 10])
def test_the_quickstart_keeps_its_own_warm_up(max_steps: int) -> None:
    config = load("quickstart", RunConfig())
    config = dataclasses.replace(config, train=dataclasses.replace(config.train, max_steps=max_steps))
    length = length_of(config, manifest_of(2000), workers=2, from_recipes=RECIPE)
    assert (length.config.optim.warmup_of(length.total_steps), length.said) == (48, ())


def test_the_run_and_its_dry_run_ask_the_same() -> None:
    """The run asks before its cluster starts (start.place), the dry run in its plan."""
    config, manifest = config_of(1000, warmup_steps=16), open_dataset(SAMPLE).manifest
    facts = ModelFacts(parameters=10, trainable=10, buffer_bytes=0, flops_per_image=None)
    rule = r"optim\.warmup_steps=16 does not end before the run's 8 steps do"
    with pytest.raises(ValueError, match=rule) as of_the_run:
        length_of(config, manifest, workers=1)
    with pytest.raises(ValueError, match=rule) as of_its_dry_run:
        describe(config, manifest, Devices(workers=1, name="CPU"), facts)
    assert str(of_the_run.value) == str(of_its_dry_run.value)


def test_a_batch_that_is_too_large_for_the_data_is_told_with_one_that_is_not() -> None:
    assert length_of(config_of(100), manifest_of(72), workers=1).said == (
        "data.batch_size=100 makes 1 step an epoch of 72 images, 4 in all; --data.batch-size 16 makes 5 an epoch",
    )
    assert length_of(config_of(16), manifest_of(72), workers=1).said == ()
    assert length_of(config_of(100), manifest_of(1000), workers=1).said == ()


@given(st.integers(1, 3000), st.integers(1, 8), st.integers(1, 100))
def test_the_batch_that_is_named_obeys_the_rules(count: int, virtual_ranks: int, each: int) -> None:
    config = config_of(virtual_ranks * each, virtual_ranks=virtual_ranks)
    for line in length_of(config, manifest_of(count), workers=1).said:
        better = int(line.split("--data.batch-size ")[1].split()[0])
        again = length_of(config_of(better, virtual_ranks=virtual_ranks), manifest_of(count), workers=1)
        assert again.steps_per_epoch >= 4
        assert not again.said


def test_only_what_a_shipped_recipe_alone_has_set_is_from_a_recipe(tmp_path: Path) -> None:
    own = tmp_path / "own.toml"
    own.write_text("[optim]\nwarmup_steps = 7\n")
    assert "optim.warmup_steps" in parse(["--config", "quickstart"]).from_recipes
    assert "optim.warmup_steps" not in parse(["--config", "quickstart", "--optim.warmup-steps", "48"]).from_recipes
    assert "optim.warmup_steps" not in parse(["--config", "quickstart", "--optim.warmup-steps=48"]).from_recipes
    assert "optim.warmup_steps" not in parse(["--config", "quickstart", "--config", str(own)]).from_recipes
    assert parse([]).from_recipes == frozenset()
    assert parse(["--config", "quickstart", "--optim.warmup-fraction", "auto"]).config.optim.warmup_fraction == -1
