"""Which settings decide a run's weights, and so its name: as they did when runs were first named, whatever was added since."""

import dataclasses
import hashlib
import json
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

import pytest
from hypothesis import example, given

from dataio.config import FREE, LATER, PATH, Mark
from tests.trainer.configs import configs
from trainer.settings.fields import declared, settings
from trainer.settings.identity import PINNED, deciding_changes, deciding_settings, weights_sha256
from trainer.settings.sources import OWN
from trainer.settings.toml import load, recipe_names
from trainer.settings.tree import ModelConfig, RunConfig, TaskConfig

# --- how the first release that named runs did it, and what it knew; never to be changed ----------------------------------------------

FIRST_KEYS = frozenset(
    f"{table}.{name}"
    for table, names in {
        "data": "path root batch_size backend cache image_size fit pad flip mean std shuffle_window max_bad_fraction test_fraction "
        "max_image_pixels",
        "model": "name weights stem image_size interpolation freeze lp_epochs",
        "optim": "name lr momentum nesterov weight_decay decay_all schedule warmup_steps final_lr_fraction head_lr_factor label_smoothing "
        "clip_norm",
        "train": "epochs max_steps seed precision channels_last small_maps compile cuda_graphs accumulate reduce_dtype profile "
        "virtual_ranks reduction checkpoint_every spike_factor verify_every eval_every_epochs ema ledger",
    }.items()
    for name in names.split()
)
FIRST_FREE = {
    *("data.path", "data.root", "data.cache", "data.backend", "data.max_bad_fraction"),
    *("data.max_image_pixels", "data.test_fraction", "train.checkpoint_every", "train.eval_every_epochs", "train.ledger"),
    *("train.verify_every", "train.profile", "train.cuda_graphs"),
}


def first_identity(config: RunConfig, fingerprint: str) -> dict[str, Any]:
    everything = settings(config)
    flat = {key: everything[key] for key in FIRST_KEYS - FIRST_FREE}
    if flat["train.small_maps"] == "auto":
        del flat["train.small_maps"]
    return flat | {"dataset": fingerprint, "model.weights": Path(config.model.weights).name}


def digest(identity: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(identity, sort_keys=True, default=list).encode()).hexdigest()


def same_name(config: RunConfig) -> bool:
    return digest(deciding_settings(config) | {"dataset": "ab" * 32}) == digest(first_identity(config, "ab" * 32))


# --- names are kept -------------------------------------------------------------------------------------------------------------------


YOUNGER = {"photos", "texts", "text-quickstart"}  # they use settings that the first release did not know


@pytest.mark.parametrize("recipe", ["", *(name for name in recipe_names() if name not in YOUNGER)])
def test_a_shipped_recipe_has_the_name_it_always_had(recipe: str) -> None:
    config = load(recipe, RunConfig()) if recipe else RunConfig()
    assert same_name(config)
    assert same_name(replace(config, train=replace(config.train, virtual_ranks=4, small_maps="product")))


GOLDEN = {
    "": "809539ede214c2c4",
    "article": "8d3389b1b021b7d7",
    "best": "d1d581c3101f76e1",
    "quickstart": "d15c865a001de058",
}


@pytest.mark.parametrize("recipe", GOLDEN)
def test_the_digests_themselves_are_kept(recipe: str) -> None:
    config = load(recipe, RunConfig()) if recipe else RunConfig()
    assert digest(deciding_settings(config) | {"dataset": "ab" * 32})[:16] == GOLDEN[recipe]


@given(configs())
@example(RunConfig(model=ModelConfig(name="mine.py:build")))
def test_any_settings_of_the_first_release_have_the_name_they_always_had(config: RunConfig) -> None:
    later = {key: setting.default for key, setting in declared(RunConfig).items() if LATER in setting.notes and key != "train.small_maps"}
    for key, default in later.items():
        config = with_setting(config, key, default)
    for key in set(OWN) & FIRST_KEYS:  # a colon names a function of the user's, which the first release did not know
        config = with_setting(config, key, str(settings(config)[key]).replace(":", ""))
    assert same_name(config)


def test_whatever_was_added_since_is_marked() -> None:
    """The mark that is missing here would rename every run."""
    for key, setting in declared(RunConfig).items():
        new = key not in FIRST_KEYS and key not in ("workers", "run", "storage", "resume") and not key.startswith("cluster.")
        assert not new or LATER in setting.notes or FREE in setting.notes, key


# --- a setting that is added ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True, slots=True)
class Table:
    depth: int = 3
    told: Annotated[bool, FREE] = False


@dataclass(frozen=True, kw_only=True, slots=True)
class NextRelease(RunConfig):
    twist: Annotated[float, LATER] = 0.5
    table: Annotated[Table, LATER] = field(default_factory=Table)
    hint: Annotated[str, FREE] = ""


@given(configs())
def test_a_later_setting_renames_nobody_and_counts_when_it_is_used(config: RunConfig) -> None:
    values = {each.name: getattr(config, each.name) for each in dataclasses.fields(config)}
    grown = NextRelease(**values)
    assert deciding_settings(grown) == deciding_settings(config)
    assert deciding_settings(replace(grown, hint="x", table=Table(told=True))) == deciding_settings(config)
    used = replace(grown, twist=0.25, table=Table(depth=4))
    assert deciding_settings(used) == deciding_settings(config) | {"twist": 0.25, "table.depth": 4}


def test_a_task_counts_when_it_is_chosen() -> None:
    plain = deciding_settings(RunConfig())
    assert not any(key.startswith("task.") for key in plain)
    chosen = deciding_settings(RunConfig(task=TaskConfig(loss="asymmetric", threshold=0.25)))
    assert chosen == plain | {"task.loss": "asymmetric", "task.threshold": 0.25}


# --- what a run may change ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("before", "now"), [("bce", "asymmetric"), ("asymmetric", "bce")])
def test_a_later_setting_is_a_change_to_its_default_and_from_it(before: Any, now: Any) -> None:
    one, two = RunConfig(task=TaskConfig(loss=before)), RunConfig(task=TaskConfig(loss=now))
    assert deciding_changes(one, two) == {"task.loss": (before, now)}
    assert deciding_changes(one, one) == {}


@given(before=configs(), now=configs())
def test_two_configs_have_the_same_name_just_when_nothing_that_counts_has_changed(before: RunConfig, now: RunConfig) -> None:
    assert (deciding_settings(before) == deciding_settings(now)) == (not deciding_changes(before, now))
    free = {key for key in deciding_changes(before, now) if FREE in declared(RunConfig)[key].notes}
    assert free <= {"train.eval_every_epochs"}, "it counts where evaluations choose, and nothing else that is free does"


def weighing(weights: str) -> RunConfig:
    return RunConfig(model=replace(RunConfig().model, weights=weights))


def test_a_file_of_weights_counts_by_its_content_and_weights_with_a_name_by_that() -> None:
    here, there, renamed = (weighing(f"/{where}.safetensors") for where in ("a/model", "b/model", "b/x"))
    assert deciding_settings(here, "5a" * 32)["model.weights"] == "sha256:" + "5a" * 32
    assert deciding_settings(here, "5a" * 32) == deciding_settings(renamed, "5a" * 32)
    assert deciding_settings(here, "5a" * 32) != deciding_settings(there, "6b" * 32)
    assert deciding_changes(here, there, ("5a" * 32, "6b" * 32)) == {"model.weights": ("sha256:" + "5a" * 32, "sha256:" + "6b" * 32)}
    assert deciding_changes(here, renamed, ("5a" * 32, "5a" * 32)) == {}
    assert deciding_settings(weighing("imagenet"))["model.weights"] == "imagenet"
    assert deciding_settings(weighing("package:efficientnet_lite0"))["model.weights"] == "package:efficientnet_lite0"
    assert deciding_changes(weighing("imagenet"), here, ("", "5a" * 32)) == {"model.weights": ("imagenet", "model.safetensors")}


def test_the_content_of_weights_is_hashed_and_a_file_that_is_not_there_is_refused(tmp_path: Path) -> None:
    (tmp_path / "w.pth").write_bytes(b"weights")
    assert weights_sha256(str(tmp_path / "w.pth")) == hashlib.sha256(b"weights").hexdigest()
    assert [weights_sha256(name) for name in ("imagenet", "none", "package:efficientnet_lite0")] == ["", "", ""]
    for nothing in ("/nowhere.pth", str(tmp_path), "imagenette"):
        with pytest.raises(ValueError, match=r"no such file; weights are imagenet, none, package:"):
            weights_sha256(nothing)


# --- every setting: whether it decides, and why not ------------------------------------------------------------------------------------

DECIDES = frozenset(
    f"{table}.{name}"
    for table, names in {
        "data": "batch_size remainder balance class_weights image_size fit background pad flip augment mean std shuffle_window "
        "max_image_pixels part fold choice_seed crop crop_scale crop_ratio rotate policy policy_ops policy_magnitude jitter erase "
        "unlabelled augment_backend sort_steps",
        "model": "name weights stem image_size interpolation normalise widths pooling lora_rank lora_alpha lora_dropout freeze lp_epochs",
        "optim": "name lr momentum nesterov weight_decay decay_all schedule warmup_steps warmup_fraction final_lr_fraction head_lr_factor "
        "layer_decay loss label_smoothing clip_norm",
        "train": "epochs max_steps seed precision channels_last small_maps compile accumulate reduce_dtype virtual_ranks reduction "
        "spike_factor ema select select_measure patience min_delta mixup cutmix teacher teacher_weight teacher_temperature semi "
        "unlabelled_ratio unlabelled_weight unlabelled_policy threshold semi_decay init_seed quantise pad_channels",
        "task": "name loss threshold head_weights weights",
    }.items()
    for name in names.split()
)
DOES_NOT_DECIDE = {
    "workers": "a batch is cut into train.virtual_ranks; with train.reduction=ddp a change is told",
    "run": "a name",
    "storage": "a place",
    "resume": "what may happen, not what comes out",
    "track": "copies the run elsewhere",
    "data.path": "a place: the data's fingerprint counts",
    "data.root": "a place",
    "data.targets": "asked of a conversion: the data's fingerprint counts",
    "data.backend": "all give the same batch",
    "data.cache": "where the same pixels lie",
    "data.max_bad_fraction": "whether the run fails; which samples are bad does not depend on it",
    "data.image_column": "asked of a conversion: the data's fingerprint counts",
    "data.label_column": "asked of a conversion: the data's fingerprint counts",
    "data.corrections": "asked of a conversion: the data's fingerprint counts",
    "data.text_column": "asked of a conversion: the data's fingerprint counts",
    "data.tokenizer": "asked of a conversion: the data's fingerprint counts",
    "data.max_tokens": "asked of a conversion: the data's fingerprint counts",
    "data.too_long": "asked of a conversion: the data's fingerprint counts",
    "data.test_fraction": "asked of a conversion: the data's fingerprint counts",
    "data.validation_fraction": "asked of a conversion: the data's fingerprint counts",
    "train.cuda_graphs": "launches the same kernels",
    "train.profile": "measures",
    "train.checkpoint_every": "when, not what",
    "train.verify_every": "compares",
    "train.eval_every_epochs": "evaluation leaves the model as it was; it counts where evaluations choose (test_selection.py)",
    "train.ledger": "writes down",
    "train.explain": "looks at the finished model",
    "train.novelty": "looks at the finished model",
    "train.control": "another run, for the report",
    "cluster.threads_per_worker": "in the identity record: it may change the last bits, and a change is told",
    "cluster.gpus_per_worker": "the type of device is in the identity record: it may change the last bits, and a change is told",
    **dict.fromkeys(
        (
            *("cluster.address", "cluster.allow_unauthenticated", "cluster.cpus_per_worker", "cluster.metrics_host"),
            *("cluster.discovery_port", "cluster.keep_checkpoints", "cluster.heartbeat_seconds", "cluster.object_store_limit_bytes"),
            *("cluster.hang_seconds", "cluster.start_seconds", "cluster.placement_seconds", "cluster.grow_after_seconds"),
            *("cluster.preemption_notice", "cluster.mtbf_hours", "cluster.storage_retry_seconds", "cluster.spill_dir"),
            *("cluster.stop_grace_seconds", "cluster.metrics_namespace"),
        ),
        "where processes run, how they are watched, when they are given up",
    ),
    **dict.fromkeys(
        (
            *("cluster.faults.max_failures", "cluster.faults.max_failures_without_progress", "cluster.faults.max_preemptions"),
            *("cluster.faults.max_hangs", "cluster.faults.max_rollbacks", "cluster.faults.backoff_seconds"),
            *("cluster.faults.straggler_ratio", "cluster.faults.straggler_steps"),
        ),
        "when the run is given up, or who is named",
    ),
}


def test_every_setting_decides_the_weights_or_has_a_reason_why_it_does_not() -> None:
    """Whoever adds a setting says it here."""
    known = declared(RunConfig)
    assert DECIDES | DOES_NOT_DECIDE.keys() == known.keys()
    assert {key for key, setting in known.items() if FREE not in setting.notes} == DECIDES
    assert DECIDES.isdisjoint(DOES_NOT_DECIDE)
    assert all(DOES_NOT_DECIDE.values())


def test_no_other_file_decides_by_its_name() -> None:
    """A file that decides needs a hash of its content, as the weights have, and what the driver pins."""
    known = declared(RunConfig)
    assert {key for key in DECIDES if PATH in known[key].notes} - set(PINNED) == {"model.weights"}


def test_every_mark_is_used() -> None:
    used = {note for setting in declared(RunConfig).values() for note in setting.notes if isinstance(note, Mark)}
    assert used == set(Mark)


def with_setting(config: Any, key: str, value: Any) -> Any:
    """`config` with another value for the setting of this dotted name."""
    head, _, rest = key.partition(".")
    return replace(config, **{head: with_setting(getattr(config, head), rest, value) if rest else value})
