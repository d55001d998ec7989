"""Is it the same run, where does it go on, what is it called: the decisions of a run's start that need no cluster."""

import hashlib
import json
import math
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from cluster.journal import Journal, read_journal
from cluster.storage import Storage, open_storage
from cluster.store import Commit, Store
from dataio.codecs.image.decode import DECODER_VERSIONS, FIRST_VERSIONS
from dataio.config import DataConfig
from dataio.manifest import Manifest, SplitInfo
from dataio.schema import single_label
from trainer.drive.capability import of_cpu, of_gpu, settled
from trainer.drive.device_rules import Images
from trainer.drive.ending import finite
from trainer.drive.identity import (
    Found,
    automatic_name,
    check_may_show,
    check_resume,
    check_same_decoder,
    check_same_run,
    find,
    find_start,
    identity,
    resolved,
)
from trainer.drive.record import Identity, identity_of
from trainer.settings.fields import settings
from trainer.settings.toml import from_toml, to_toml
from trainer.settings.tree import OptimConfig, RunConfig, TrainConfig

DATA, OTHER_DATA = "a" * 64, "b" * 64


def changed(config: RunConfig, key: str) -> RunConfig:
    """`config` with another value for one setting."""
    table, _, leaf = key.rpartition(".")
    owner: Any = config
    parents = []
    for name in table.split(".") if table else []:
        parents.append((owner, name))
        owner = getattr(owner, name)
    value = getattr(owner, leaf)
    match value:
        case bool():
            value = not value
        case int() | float():
            value = value + 1
        case tuple():
            value = tuple(item + 0.25 for item in value)
        case str():
            value = CHOICES.get(key, value + "-other")
    result: Any = replace(owner, **{leaf: value})
    for parent, name in reversed(parents):
        result = replace(parent, **{name: result})
    assert isinstance(result, RunConfig)
    return result


CHOICES = {
    "resume": "must",
    "data.backend": "numpy",
    "data.augment_backend": "dali",
    "data.cache": "none",
    "data.fit": "crop",
    "model.stem": "native",
    "model.interpolation": "bicubic",
    "model.normalise": "weights",
    "model.freeze": "backbone",
    "optim.name": "adamw",
    "optim.schedule": "constant",
    "train.precision": "fp32",
    "train.reduction": "ddp",
    "train.select": "best",
    "task.loss": "asymmetric",
    "task.head_weights": "learned",
}
ALL = sorted(settings(RunConfig()))
# What a run may change on its way, and nothing else: where things are, how fast they go, how often they are saved, looked at and told.
MAY_CHANGE = {
    *("workers", "run", "storage", "resume", "track", "data.path", "data.root", "data.cache", "data.backend", "data.max_bad_fraction"),
    *("data.targets", "data.image_column", "data.label_column", "data.validation_fraction", "data.corrections"),
    *("data.text_column", "data.tokenizer", "data.max_tokens", "data.too_long"),
    *("data.test_fraction", "train.checkpoint_every", "train.eval_every_epochs", "train.ledger"),
    *("train.verify_every", "train.profile", "train.cuda_graphs", "train.explain", "train.novelty", "train.control"),
    *(key for key in ALL if key.startswith("cluster.")),
}


DECIDED = RunConfig(
    data=DataConfig(remainder="last", background="white", augment_backend="torch"),
    optim=OptimConfig(warmup_fraction=0.0),
    train=TrainConfig(select="last"),
)
"""Nothing is left at auto that the data decide (trainer.settings.length)."""
HERE = Images(count=100, height=32, width=32)


@pytest.fixture
def storage(tmp_path: Path) -> Storage:
    return open_storage(tmp_path / "runs")


def started(storage: Storage, config: RunConfig) -> RunConfig:
    """A run that got as far as writing its settings."""
    config = replace(config, storage=storage.uri)
    storage.write_atomic(f"{config.run}/config.toml", to_toml(config).encode())
    return config


def ready(config: RunConfig, *, workers: int = 1, data: str = DATA, weights: str = "", recipe: str = "best") -> RunConfig:
    """`config` with its name."""
    storage = open_storage(config.storage)
    return resolved(config, storage, workers=workers, fingerprint=data, weights=weights, prefix=recipe, shape=(32, 32)).config


def check_same(config: RunConfig, storage: Storage) -> None:
    check_same_run(config, find(storage, config.run), "")


def images_of(*sizes: str) -> Manifest:
    splits = {"train": SplitInfo(count=len(sizes), shards=()), "test": SplitInfo(count=0, shards=())}
    counts = {size: sizes.count(size) for size in sizes}
    return Manifest(
        targets=single_label("a"),
        splits=splits,
        fingerprint=DATA,
        image_sizes=counts,
        quarantined=0,
        source="folder",
        identity="c" * 64,
    )


def of(config: RunConfig, manifest: Manifest | None = None, *, weights: str = "", device: str = "cpu") -> Identity:
    return identity_of(config, manifest or images_of("32x32"), weights=weights, device=device, threads=1)


# --- the same run -----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("key", ALL)
def test_a_run_goes_on_with_a_changed_setting_only_if_that_does_not_touch_its_weights(storage: Storage, key: str) -> None:
    config = started(storage, replace(DECIDED, run="r", train=TrainConfig(virtual_ranks=4, small_maps="product", select="last")))
    check_same(config, storage)
    now = replace(changed(config, key), run="r")
    if key in MAY_CHANGE:
        check_same(now, storage)
        return
    with pytest.raises(ValueError, match="started with other settings") as caught:
        check_same(now, storage)
    assert key in str(caught.value)
    assert "--run NAME" in str(caught.value)
    assert f"{settings(config)[key]!r} then, {settings(now)[key]!r} now" in str(caught.value)


def weights_in(folder: Path, content: bytes) -> tuple[str, str]:
    """A weights file and its SHA-256."""
    folder.mkdir(exist_ok=True)
    (folder / "model.safetensors").write_bytes(content)
    return str(folder / "model.safetensors"), hashlib.sha256(content).hexdigest()


def with_weights(config: RunConfig, weights: str) -> RunConfig:
    return replace(config, model=replace(config.model, weights=weights))


def test_weights_are_known_by_their_content_not_by_their_name_or_where_they_lie(storage: Storage, tmp_path: Path) -> None:
    """A run of a release that saved their path alone: what lies there is looked at."""
    (mine, sha256), (other, other_sha256) = weights_in(tmp_path / "a", b"mine"), weights_in(tmp_path / "b", b"other")
    copied, _ = weights_in(tmp_path / "c", b"mine")
    config = RunConfig(run="r")
    started(storage, with_weights(config, mine))
    found = find(storage, "r")
    assert found.weights == sha256
    check_same_run(with_weights(config, copied), found, sha256)
    with pytest.raises(ValueError, match=f"model.weights: 'sha256:{sha256[:12]}' then, 'sha256:{other_sha256[:12]}' now.*--run NAME"):
        check_same_run(with_weights(config, other), found, other_sha256)
    Path(mine).unlink()  # nobody knows any more: who says the run's name and gives a file of that name is believed
    check_same_run(with_weights(config, other), find(storage, "r"), other_sha256)
    renamed = str(Path(copied).rename(tmp_path / "c" / "renamed.safetensors"))
    with pytest.raises(ValueError, match=r"model.weights: 'model.safetensors' then, 'renamed.safetensors' now"):
        check_same_run(with_weights(config, renamed), find(storage, "r"), sha256)


def test_a_claim_that_is_withdrawn_while_it_is_looked_up_says_nothing(storage: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    started(storage, RunConfig(run="r"))
    Store(storage, "r").claim_generation({"identity": of(RunConfig()).record()})
    monkeypatch.setattr(Store, "newest_generation", lambda self: 2)
    assert find(storage, "r").record is None


def test_what_a_claim_says_of_the_weights_outlives_their_file(storage: Storage, tmp_path: Path) -> None:
    mine, sha256 = weights_in(tmp_path / "a", b"mine")
    config = started(storage, with_weights(RunConfig(run="r"), mine))
    Store(storage, "r").claim_generation({"identity": of(config, weights=sha256).record()})
    Path(mine).unlink()
    found = find(storage, "r")
    assert found.weights == sha256
    check_same_run(with_weights(config, "/mnt/renamed.pth"), found, sha256)
    with pytest.raises(ValueError, match=r"model\.weights"):
        check_same_run(config, found, "c" * 64)


def test_another_file_of_the_same_name_gives_another_run_name_and_names_of_weights_keep_theirs(tmp_path: Path) -> None:
    def name(weights: str, sha256: str) -> str:
        return ready(with_weights(RunConfig(storage=str(tmp_path / "runs")), weights), weights=sha256).run

    (mine, sha256), (other, other_sha256) = weights_in(tmp_path / "a", b"mine"), weights_in(tmp_path / "b", b"other")
    assert name(mine, sha256) == name("/elsewhere/renamed.pth", sha256)
    assert name(mine, sha256) != name(other, other_sha256)
    assert name("imagenet", "") == automatic_name(ready(RunConfig(storage=str(tmp_path))), DATA, "best")


def test_a_run_that_an_older_release_named_by_its_weights_file_s_name_goes_on_if_the_content_is_the_same(tmp_path: Path) -> None:
    (mine, sha256), (other, other_sha256) = weights_in(tmp_path / "a", b"mine"), weights_in(tmp_path / "b", b"other")
    config = with_weights(RunConfig(storage=str(tmp_path / "runs"), train=TrainConfig(virtual_ranks=1)), mine)
    storage = open_storage(config.storage)
    first = ready(config).run  # as they did, who did not look into the file
    new = ready(config, weights=sha256).run
    assert new != first
    started(storage, replace(config, run=first))
    assert ready(config, weights=sha256).run == first
    copied, _ = weights_in(tmp_path / "c", b"mine")
    assert ready(with_weights(config, copied), weights=sha256).run == first
    assert ready(with_weights(config, other), weights=other_sha256).run not in (first, new)
    Path(mine).unlink()
    with pytest.raises(ValueError, match=f"{first!r} in .* may be this one, or not.*{mine} is gone; say --run {first} to go on with it"):
        ready(with_weights(config, copied), weights=sha256)
    assert ready(replace(with_weights(config, copied), run=first), weights=sha256).run == first
    started(storage, replace(config, run=new))
    assert ready(with_weights(config, copied), weights=sha256).run == new


def test_a_limit_of_pixels_that_was_set_when_it_did_not_count_keeps_its_run(tmp_path: Path) -> None:
    config = RunConfig(storage=str(tmp_path), train=TrainConfig(virtual_ranks=1), data=DataConfig(max_image_pixels=10_000))
    first = ready(replace(config, data=DataConfig())).run  # it was no part of the name
    assert ready(config).run != first
    started(open_storage(tmp_path), replace(config, run=first))
    assert ready(config).run == first
    assert ready(replace(config, data=DataConfig(max_image_pixels=20_000))).run != first


def test_a_name_that_was_never_used_is_free(storage: Storage) -> None:
    assert find(storage, "new") == Found(saved=None, summary=None)
    check_same(RunConfig(run="new"), storage)


def test_a_run_without_a_name_is_nowhere(storage: Storage) -> None:
    storage.write_atomic("summary.json", b"{}")  # not a run's
    assert find(storage, "") == Found(saved=None, summary=None)


# --- its name ---------------------------------------------------------------------------------------------------------------------------


def name_of(config: RunConfig, tmp_path: Path, *, workers: int = 2, data: str = DATA, recipe: str = "best") -> str:
    return ready(replace(config, storage=str(tmp_path)), workers=workers, data=data, recipe=recipe).run


def test_the_same_command_has_the_same_name_and_any_other_outcome_another(tmp_path: Path) -> None:
    config = RunConfig()
    name = name_of(config, tmp_path)
    assert name.startswith("best-")
    assert name_of(from_toml(to_toml(config)), tmp_path) == name
    assert name_of(replace(config, resume="must", data=replace(config.data, path="elsewhere", cache="none")), tmp_path) == name
    others = [
        name_of(replace(config, train=replace(config.train, seed=1)), tmp_path),
        name_of(replace(config, optim=replace(config.optim, lr=0.5)), tmp_path),
        name_of(replace(config, model=replace(config.model, name="resnet34")), tmp_path),
        name_of(config, tmp_path, data=OTHER_DATA),
        name_of(config, tmp_path, workers=4),  # as many virtual ranks
        name_of(config, tmp_path, recipe="article"),
    ]
    assert len({name, *others}) == 1 + len(others)


def test_workers_do_not_matter_where_virtual_ranks_are_given(tmp_path: Path) -> None:
    config = RunConfig(train=TrainConfig(virtual_ranks=4))
    assert name_of(config, tmp_path, workers=1) == name_of(config, tmp_path, workers=4)


def test_a_given_name_and_everything_left_open_is_decided(tmp_path: Path) -> None:
    config = RunConfig(run="mine", storage=str(tmp_path))
    done = ready(config, workers=2)
    assert (done.run, done.train.virtual_ranks, done.storage) == ("mine", 2, open_storage(tmp_path).uri)
    with pytest.raises(ValueError, match=r"data\.batch_size=100 is not a multiple of .*=3; use 99 or 102"):
        ready(config, workers=3)


# --- finished already -------------------------------------------------------------------------------------------------------------------


def test_only_a_finished_run_of_the_same_data_is_shown_again_and_not_where_resuming_is_forbidden(storage: Storage) -> None:
    config = started(storage, RunConfig(run="r"))

    def ended(status: str) -> Found:
        summary = {"status": status, "dataset_fingerprint": DATA, "test_accuracy": 0.5}
        storage.write_atomic("r/summary.json", json.dumps(summary).encode())
        return find(storage, "r")

    assert not find(storage, "r").has_finished
    assert not ended("stopped").has_finished
    assert not ended("failed").has_finished
    found = ended("finished")
    assert found.has_finished
    assert found.summary is not None
    assert found.summary["test_accuracy"] == 0.5
    check_may_show(config, found.summary, DATA)
    with pytest.raises(ValueError, match=f"trained on the data set {DATA[:12]}, this is {OTHER_DATA[:12]}.*--run NAME"):
        check_may_show(config, found.summary, OTHER_DATA)
    with pytest.raises(ValueError, match=r"--resume never, but run 'r' in .* has finished; give another --run NAME"):
        check_may_show(replace(config, resume="never"), found.summary, DATA)


# --- where it goes on -------------------------------------------------------------------------------------------------------------------


def no_word(line: str) -> None:
    raise AssertionError(line)


def commit(storage: Storage, *steps: int, **more: Any) -> Store:
    store = Store.open(storage, "r")
    generation = store.claim_generation()
    for step in steps:
        receipt = store.stage(step, generation, "model.safetensors", [b"weights" * 100], attempt=1)
        store.commit(step, generation, [receipt], {"dataset_fingerprint": DATA, **more}, attempt=1)
    return store


def start_of(storage: Storage, resume: Any = "auto", *, fingerprint: str = DATA) -> tuple[Commit | None, str]:
    config = RunConfig(run="r", storage=storage.uri, resume=resume)
    said: list[str] = []
    journal = Journal.open(storage, "r", "driver")
    start = find_start(config, Store.open(storage, "r"), journal, fingerprint, said.append)
    check_resume(config, has_checkpoint=start is not None)
    return start, "\n".join(said)


def test_without_a_commit_auto_and_never_start_from_zero_and_must_refuses(storage: Storage) -> None:
    for resume in ("auto", "never"):
        assert start_of(storage, resume) == (None, "")
    with pytest.raises(ValueError, match=r"--resume must, but run 'r' in .* has no checkpoint; give --run NAME"):
        start_of(storage, "must")


def test_with_commits_auto_and_must_take_the_newest_and_never_refuses(storage: Storage) -> None:
    commit(storage, 10, 20)
    for resume in ("auto", "must"):
        start, said = start_of(storage, resume)
        assert start is not None
        assert (start.step, said) == (20, "")
    with pytest.raises(ValueError, match=r"--resume never, but run 'r' in .* has a checkpoint; give another --run NAME"):
        start_of(storage, "never")


def test_a_damaged_commit_is_passed_over_aloud_and_if_all_are_nothing_starts(storage: Storage, tmp_path: Path) -> None:
    commit(storage, 10, 20)

    def damage(step: int) -> None:
        (file,) = (tmp_path / "runs" / "r" / "checkpoints").glob(f"step-{step:08d}*/model.safetensors")
        file.write_bytes(b"weighty" * 100)

    damage(20)
    start, said = start_of(storage)
    assert start is not None
    assert start.step == 10
    assert "step-00000020" in said
    assert "damaged" in said
    (corrupt,) = (event for event in read_journal(storage, "r") if event["event"] == "checkpoint_corrupt")
    assert "step-00000020" in corrupt["path"]
    damage(10)
    for resume in ("auto", "must", "never"):
        with pytest.raises(ValueError, match="none is intact"):
            start_of(storage, resume)


def test_a_fresh_run_that_forbade_resuming_goes_on_after_its_own_failure(storage: Storage) -> None:
    commit(storage, 10)
    config = RunConfig(run="r", storage=storage.uri, resume="never")
    start = find_start(config, Store.open(storage, "r"), Journal.open(storage, "r", "driver"), DATA, no_word)
    assert start is not None
    assert start.step == 10


def test_a_commit_of_other_data_is_refused(storage: Storage) -> None:
    commit(storage, 10)
    with pytest.raises(ValueError, match=r"was trained on the data set aaaaaaaaaaaa, this is bbbbbbbbbbbb; give the same --data\.path"):
        start_of(storage, fingerprint=OTHER_DATA)


CROP = RunConfig(run="r", data=DataConfig(image_size=32, fit="crop"))


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("meta", [{}, {"decoder": FIRST_VERSIONS}])  # of before versions were kept, and one that says so
def test_only_a_run_that_resizes_is_refused_with_another_decoder_and_only_on_the_device_whose_pixels_changed(
    meta: dict[str, Any], device: str
) -> None:
    mixed, same = images_of("32x32", "64x48"), images_of("32x32", "32x32")
    now = DECODER_VERSIONS[device]
    with pytest.raises(
        ValueError, match=rf"'r' has resized its images \(data\.fit=crop\) by version 1 of the {device} decoder.*version {now}.*--run NAME"
    ):
        check_same_decoder(CROP, meta, of(CROP, mixed, device=device))
    check_same_decoder(CROP, {"decoder": {**FIRST_VERSIONS, device: now}}, of(CROP, mixed, device=device))
    check_same_decoder(CROP, meta, of(CROP, same))  # never resampled
    refuses = RunConfig(run="r", data=DataConfig(image_size=32))
    check_same_decoder(refuses, meta, of(refuses, mixed))


def test_a_run_that_resizes_goes_on_with_the_decoder_that_it_began_with() -> None:
    for device in DECODER_VERSIONS:
        check_same_decoder(CROP, {"decoder": DECODER_VERSIONS}, of(CROP, images_of("8x9"), device=device))


# --- small ones -------------------------------------------------------------------------------------------------------------------------


def test_json_gets_null_for_what_it_does_not_have() -> None:
    value = {"a": [1, math.nan, (math.inf, -math.inf, 0.5)], "b": {"c": math.nan, "d": "nan", "e": True, "f": None}}
    plain = finite(value)
    assert plain == {"a": [1, None, [None, None, 0.5]], "b": {"c": None, "d": "nan", "e": True, "f": None}}
    assert json.loads(json.dumps(plain, allow_nan=False)) == plain


def test_a_process_knows_when_it_began() -> None:
    before = time.time()
    code = "import time; first = time.time(); time.sleep(0.3); from trainer.run import process_started; print(process_started(), first)"
    root = Path(__file__).resolve().parents[2]
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=root).stdout
    began, first = map(float, printed.split())
    assert before - 0.05 <= began <= first + 0.05  # the kernel counts in hundredths of a second


def test_identity_names_the_data_by_content() -> None:
    assert identity(RunConfig(), DATA) != identity(RunConfig(), OTHER_DATA)
    assert identity(RunConfig(), DATA)["dataset"] == DATA


def test_a_run_of_a_release_that_knew_no_products_goes_on_without_them_and_under_its_name(tmp_path: Path) -> None:
    asked = RunConfig(storage=str(tmp_path), train=TrainConfig(precision="bf16", channels_last="on"))

    first = ready(asked)
    assert "train.small_maps" not in identity(asked, DATA)  # which the name is made of
    text = to_toml(first).replace('small_maps = "auto"\n', "")
    assert "small_maps" not in text
    storage = open_storage(str(tmp_path))
    storage.write_atomic(f"{first.run}/config.toml", text.encode())
    again = ready(asked)
    assert again.run == first.run
    check_same(again, storage)
    epyc = of_cpu("flags : avx512_bf16\n")
    assert settled(again, epyc, has_depthwise=False, images=HERE, workers=1, tell=lambda line: None).train.small_maps == "convolution"
    assert settled(first, epyc, has_depthwise=False, images=HERE, workers=1, tell=lambda line: None).train.small_maps == "product"


def test_auto_is_decided_once_and_kept_where_the_same_command_goes_on_elsewhere(tmp_path: Path) -> None:
    asked = replace(DECIDED, storage=str(tmp_path), train=TrainConfig(precision="auto", channels_last="auto", select="last"))

    said: list[str] = []
    first = settled(ready(asked), of_gpu("H200", (9, 0)), has_depthwise=False, images=HERE, workers=1, tell=said.append)
    assert (first.train.precision, first.train.channels_last) == ("bf16", "on")
    assert said[:2] == ["train.precision=auto: bf16 (H200)", "train.channels_last=auto: on (H200)"]
    assert [line.partition(" (")[0] for line in said[2:]] == ["train.cuda_graphs=auto: off"]
    storage = open_storage(str(tmp_path))
    storage.write_atomic(f"{first.run}/config.toml", to_toml(first).encode())
    again = ready(asked)
    assert replace(again, train=replace(again.train, cuda_graphs=first.train.cuda_graphs)) == first  # the name too
    check_same(again, storage)
    said.clear()
    assert settled(again, of_cpu(""), has_depthwise=True, images=HERE, workers=1, tell=said.append) == first
    assert len(said) == 1
    assert "warning: train.precision=bf16 is emulated here" in said[0]
    other = replace(asked, run=first.run, train=replace(asked.train, precision="fp32"))
    with pytest.raises(ValueError, match=r"train.precision: 'bf16' then, 'fp32' now"):
        check_same(ready(other), storage)
