"""A run is claimed before anything of it is written; a command that is refused leaves no trace, and takes nothing over."""

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from PIL import Image
from rich.console import Console

from cluster import claims as claims_module
from cluster.claims import Claims
from cluster.journal import read_journal
from cluster.launch import ClusterHardware, Resources
from cluster.storage import Storage, open_storage
from cluster.store import Store
from dataio.parquet import Dataset
from tests.cluster.test_store import objects
from tests.trainer.configs import configs
from trainer.drive.data import open_data
from trainer.drive.identity import find
from trainer.drive.record import Identity, bit_changes, changes, identity_of, record_of, told_bit_changes, told_changes
from trainer.drive.set_up import SetUp
from trainer.drive.stages import Begun, Decided, Environment
from trainer.drive.start import begin
from trainer.runs.events import words_of
from trainer.settings.fields import as_begun
from trainer.settings.identity import deciding_changes, deciding_settings
from trainer.settings.spec import ResumePoint, WorkerSpec
from trainer.settings.toml import from_toml
from trainer.settings.tree import RunConfig, TrainConfig
from trainer.tasks.info import CLASSIFICATION

HERE = Environment(ray_address="", in_job=False, is_verbose=False, cpus=2, process_started=0.0)
RESOURCES = Resources(workers=2, fewest=2, most=2, cpus_per_worker=1.0, gpus_per_worker=0, threads_per_worker=1)
CONFIG = RunConfig(run="r", train=TrainConfig(virtual_ranks=2, precision="fp32", channels_last="on", small_maps="convolution"))


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    root = tmp_path_factory.mktemp("photos")
    for number in range(40):
        file = root / "photos" / ("cat", "dog")[number % 2] / f"{number:02d}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((8, 8, 3), 6 * number, dtype=np.uint8)).save(file)
    data = replace(RunConfig().data, path=str(root / "photos"), root=str(root), batch_size=4)
    return open_data(RunConfig(data=data), Console(quiet=True))[1]


@pytest.fixture(params=["local", "objects"])
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> Storage:
    return open_storage(tmp_path / "runs") if request.param == "local" else objects()


@pytest.fixture
def deciding(storage: Storage, dataset: Dataset) -> Callable[..., Decided]:
    """What is decided of a run with these settings."""

    def decided(config: RunConfig = CONFIG, *, resources: Resources = RESOURCES, **changed: Any) -> Decided:
        identity = identity_of(config, dataset.manifest, weights="", device="cpu", threads=resources.threads_per_worker)
        return Decided(
            config=config,
            command="",
            dataset=dataset,
            location=str(dataset.where),
            is_shared=True,
            storage=storage,
            hardware=ClusterHardware(local=True, nodes=1, cpus=2, gpus=0),
            resources=resources,
            task=CLASSIFICATION,
            identity=replace(identity, **changed),
        )

    return decided


def start(decided: Decided) -> tuple[Begun, str]:
    console = Console(width=400, record=True, file=open(os.devnull, "w"))  # noqa: SIM115
    return begin(decided, HERE, console, SetUp(console)), console.export_text()


def with_lr(lr: float) -> RunConfig:
    return replace(CONFIG, optim=replace(CONFIG.optim, lr=lr))


def commit(decided: Decided, begun: Begun, step: int, **meta: Any) -> None:
    """As the ranks and the coordinator do it."""
    said = {"dataset_fingerprint": decided.fingerprint, "threads": 1, "versions": {}, "world_size": 2} | meta
    receipt = begun.store.stage(step, begun.generation, "model.safetensors", [b"weights"], attempt=1)
    begun.store.commit(step, begun.generation, [receipt], {**said, "identity": decided.identity.record()} | meta, attempt=1)


def names(storage: Storage) -> list[str]:
    return [entry.name for entry in storage.list("r")]


def events(storage: Storage) -> list[str]:
    return [event["event"] for event in read_journal(storage, "r")]


# --- the claim comes first --------------------------------------------------------------------------------------------------------------


def test_a_new_run_s_claim_says_what_it_is_and_is_the_first_thing_written(deciding: Callable[..., Decided], storage: Storage) -> None:
    seen: list[list[str]] = []
    write = Storage.write_atomic

    def watched(self: Storage, path: str, data: bytes) -> None:
        seen.append(names(storage))
        write(self, path, data)

    decided = deciding()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Storage, "write_atomic", watched)
        begun, _ = start(decided)
    assert all(there in ([], ["generations"]) or there[:2] == ["config.toml", "generations"] for there in seen)
    assert (begun.generation, begun.start) == (1, None)
    claim = Claims(storage, "r").read(1)
    assert record_of(claim.note) == decided.identity.record()
    assert find(storage, "r").record == decided.identity.record()
    assert events(storage) == ["run_started"]


def test_of_two_commands_on_one_new_name_the_second_says_what_differs_and_leaves_nothing(
    deciding: Callable[..., Decided], storage: Storage
) -> None:
    """Both had found nothing under that name before either claimed it."""
    first, second = deciding(with_lr(0.5)), deciding(with_lr(0.25))
    start(first)
    before = {entry.name: storage.read(f"r/{entry.name}") for entry in storage.list("r") if not entry.is_dir}
    with pytest.raises(
        ValueError, match=r"'r' was started with other settings \(optim.lr: 0.5 then, 0.25 now\); give the same.*--run NAME"
    ):
        start(second)
    assert {entry.name: storage.read(f"r/{entry.name}") for entry in storage.list("r") if not entry.is_dir} == before
    assert from_toml(storage.read("r/config.toml").decode(), origin="r").optim.lr == 0.5
    assert Store(storage, "r").newest_generation() == 1
    assert events(storage) == ["run_started"]


def test_whoever_of_two_commands_comes_in_between_the_settings_are_those_of_the_one_that_got_the_run(
    deciding: Callable[..., Decided], storage: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second command begins and ends at each call that the first one makes to the storage."""
    monkeypatch.setattr(claims_module, "CLAIM_PATIENCE_SECONDS", 0.01)
    calls, at, outcome = 0, 0, []

    def between(real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == at:
                outcome.append(result_of(deciding(with_lr(0.25))))
            return real(*args, **kwargs)

        return call

    def result_of(decided: Decided) -> float | None:
        try:
            start(decided)
        except ValueError:
            return None
        return decided.config.optim.lr

    for name in ("list", "read", "write_atomic", "delete_file"):
        monkeypatch.setattr(Storage, name, between(getattr(Storage, name)))
    monkeypatch.setattr(claims_module, "_create_whole", between(claims_module._create_whole))
    winners = set()
    while True:
        calls, at = 0, at + 1
        outcome.clear()
        outcome.append(result_of(deciding(with_lr(0.5))))
        if len(outcome) == 1:
            break
        at_all, at = at, 0
        (winner,) = {lr for lr in outcome if lr is not None}
        assert from_toml(storage.read("r/config.toml").decode(), origin="r").optim.lr == winner
        assert events(storage) == ["run_started"]
        assert result_of(deciding(with_lr(winner))) == winner  # the same command goes on
        assert result_of(deciding(with_lr(9.0))) is None
        winners.add(winner)
        storage.delete_dir("r")
        at = at_all
    assert winners == {0.25, 0.5}


def test_with_the_same_settings_the_newer_command_takes_over(deciding: Callable[..., Decided], storage: Storage) -> None:
    assert start(deciding())[0].generation == 1
    free = replace(CONFIG, workers="1", cluster=replace(CONFIG.cluster, hang_seconds=9.0))
    assert start(deciding(free))[0].generation == 2
    assert events(storage) == ["run_started", "run_started"]


# --- a refused command ------------------------------------------------------------------------------------------------------------------


def test_a_command_that_may_not_go_on_takes_nothing_over_and_writes_nothing(
    deciding: Callable[..., Decided], storage: Storage, dataset: Dataset
) -> None:
    running = deciding()
    begun, _ = start(running)
    commit(running, begun, 10)
    before = {entry.name: entry.modified for entry in storage.list("r")}
    refused = {
        r"--resume never, but run 'r' in .* has a checkpoint": deciding(replace(CONFIG, resume="never")),
        r"'r' was trained on the data set .*, this is bbbbbbbbbbbb": deciding(dataset="b" * 64),
        r"data\.batch_size=7": deciding(replace(CONFIG, data=replace(CONFIG.data, batch_size=7))),
        r"optim\.lr: 0\.02 then, 0\.5 now": deciding(with_lr(0.5)),
        r"object_store_limit_bytes=1": replace(
            deciding(replace(CONFIG, cluster=replace(CONFIG.cluster, object_store_limit_bytes=1))), is_shared=False
        ),
    }
    for words, decided in refused.items():
        with pytest.raises(ValueError, match=words):
            start(decided)
    assert {entry.name: entry.modified for entry in storage.list("r")} == before
    assert begun.store.newest_generation() == begun.generation  # it is not fenced off


def test_a_new_run_that_is_refused_does_not_exist(deciding: Callable[..., Decided], storage: Storage) -> None:
    with pytest.raises(ValueError, match="--resume must"):
        start(deciding(replace(CONFIG, resume="must")))
    assert names(storage) == []


def test_damage_is_set_aside_by_the_driver_that_has_claimed_the_run_and_told_with_its_start(
    deciding: Callable[..., Decided], storage: Storage
) -> None:
    decided = deciding()
    begun, _ = start(decided)
    for step in (10, 20):
        commit(decided, begun, step)
    (newest, _) = begun.store.commits()
    storage.write_atomic(f"{newest.path}/model.safetensors", b"WEIGHTS")
    with pytest.raises(ValueError, match="--resume never"):
        start(deciding(replace(CONFIG, resume="never")))
    assert [commit.step for commit in begun.store.commits()] == [20, 10]
    again, said = start(deciding())
    assert again.start is not None
    assert again.start.step == 10
    assert "is damaged" in said
    assert [found.step for found in begun.store.commits()] == [10]
    assert sorted(events(storage)) == ["checkpoint_corrupt", "run_started", "run_started"]


# --- what a run is ----------------------------------------------------------------------------------------------------------------------


def test_a_commit_of_another_run_under_this_name_is_refused(deciding: Callable[..., Decided], storage: Storage) -> None:
    """As when somebody copies a checkpoint into another run's folder."""
    decided = deciding()
    begun, _ = start(decided)
    other = deciding(with_lr(0.5))
    commit(other, begun, 10)
    with pytest.raises(ValueError, match=r"optim\.lr: 0\.5 then, 0\.02 now"):
        start(decided)


def test_a_commit_of_another_run_below_a_damaged_one_is_refused_too(deciding: Callable[..., Decided], storage: Storage) -> None:
    decided = deciding()
    begun, _ = start(decided)
    commit(deciding(with_lr(0.5)), begun, 10)
    commit(decided, begun, 20)
    (newest, _) = begun.store.commits()
    storage.write_atomic(f"{newest.path}/model.safetensors", b"WEIGHTS")
    with pytest.raises(ValueError, match=r"optim\.lr: 0\.5 then, 0\.02 now"):
        start(decided)
    assert "run_started" not in events(storage)[1:]


def test_a_commit_of_an_older_release_is_compared_by_what_it_says(deciding: Callable[..., Decided], storage: Storage) -> None:
    decided = deciding()
    store = Store.open(storage, "r")
    begun = Begun(journal=None, store=store, generation=store.claim_generation(), start=None)  # type: ignore[arg-type]
    old = {"threads": 3, "versions": {"torch": "2.0", "ray": "2.0"}}
    commit(decided, begun, 10, identity=None, **old)
    went_on, said = start(decided)
    assert went_on.start is not None
    assert "threads of a worker: 3 before, 1 now; the weights may differ in their last bits from an uninterrupted run's" in said
    assert "torch: 2.0 before, " in said
    assert "ray" not in said
    (event,) = (event for event in read_journal(storage, "r") if event["event"] == "versions_differ")
    assert event["differs"]["threads"] == [3, 1]
    assert set(event["differs"]) == {"threads", "torch"}
    commit(decided, went_on, 20, identity=None, virtual_ranks=3)
    with pytest.raises(ValueError, match=r"train\.virtual_ranks: 3 then, 2 now"):
        start(decided)
    commit(decided, went_on, 30, dataset_fingerprint="b" * 64)
    with pytest.raises(ValueError, match="was trained on the data set bbbbbbbbbbbb"):
        start(decided)


@pytest.fixture
def identity(deciding: Callable[..., Decided]) -> Identity:
    return deciding().identity


def test_what_decides_must_be_equal_and_what_may_change_the_last_bits_is_told(identity: Identity) -> None:
    now = replace(identity, decoder={"cpu": 2, "cuda": 1}, versions={"torch": "2.15"})
    same = replace(now, device="cuda", threads=8, versions={"torch": "2.14"})
    assert changes(same.record(), now) == {}
    assert same.digest == now.digest
    assert bit_changes({"identity": same.record()}, now, workers=2) == {
        "torch": ("2.14", "2.15"),
        "threads": (8, 1),
        "device": ("cuda", "cpu"),
    }
    assert bit_changes({"identity": now.record(), "threads": 1, "world_size": 4}, now, workers=2) == {}
    ddp = replace(now, settings={**now.settings, "train.reduction": "ddp"})
    assert bit_changes({"identity": ddp.record(), "world_size": 4}, ddp, workers=2) == {"workers": (4, 2)}
    assert told_bit_changes({"threads": (8, 1)}) == [
        "threads of a worker: 8 before, 1 now; the weights may differ in their last bits from an uninterrupted run's "
        "(--cluster.threads-per-worker 8 keeps them)"
    ]


def test_another_device_that_decodes_is_told_and_an_older_record_decoded_where_it_computed(identity: Identity) -> None:
    cuda = replace(identity, device="cuda", decoded_on="cuda")
    small = replace(cuda, decoded_on="cpu")
    older = {key: value for key, value in cuda.record().items() if key != "decoded_on"}

    def found(then: Mapping[str, Any], now: Identity) -> dict[str, tuple[Any, Any]]:
        return bit_changes({"identity": then}, now, workers=1)

    assert found(cuda.record(), identity) == {"device": ("cuda", "cpu"), "decoder": ("cuda", "cpu")}
    assert found(small.record(), identity) == {"device": ("cuda", "cpu")}
    assert found(cuda.record(), small) == found(older, small) == {"decoder": ("cuda", "cpu")}
    assert found(older, cuda) == {}
    assert found({}, cuda) == {}  # a commit without a record
    (line,) = told_bit_changes({"decoder": ("cuda", "cpu")})
    assert line.startswith("decoder: on the cuda before, on the cpu now; pixels of JPEGs and of resized images differ by a few levels")
    assert "by more than their last bits" in words_of({"event": "versions_differ", "differs": {"decoder": ["cuda", "cpu"]}})
    assert "in their last bits" in words_of({"event": "versions_differ", "differs": {"threads": [1, 2]}})


def test_a_runs_decoder_is_compared_by_the_device_that_decodes(identity: Identity) -> None:
    now = replace(identity, device="cuda", decoded_on="cpu", decoder={"cpu": 2, "cuda": 3})
    assert changes({**now.record(), "decoder": {"cpu": 2, "cuda": 7}}, now) == {}
    assert changes({**now.record(), "decoder": {"cpu": 1, "cuda": 3}}, now) == {"decoder": ("version 1", "version 2")}


@pytest.mark.parametrize(
    ("other", "words"),
    [
        ({"dataset": "b" * 64}, "data.path: 'data set bbbbbbbbbbbb' then"),
        ({"decoder": {"cpu": 1, "cuda": 1}}, "decoder: 'version 1' then, 'version 2' now"),
        ({"settings": {"optim.lr": 0.5}}, "optim.lr: 0.5 then, 0.02 now"),
        ({"settings": {"model.weights": "sha256:" + "5a" * 32}}, "model.weights: 'sha256:5a5a5a5a5a5a' then, 'imagenet' now"),
        ({"settings": {"of.a_newer_release": 3}}, "of.a_newer_release: 3 then, None now"),
        ({"settings": {"task.loss": "asymmetric"}}, "task.loss: 'asymmetric' then, 'bce' now"),  # it counts while it is not at its default
    ],
)
def test_what_differs_is_named_with_both_values(identity: Identity, other: dict[str, Any], words: str) -> None:
    now = replace(identity, decoder={"cpu": 2, "cuda": 1})
    then = {**now.record(), **other}
    if "settings" in other:
        then["settings"] = {**now.settings, **other["settings"]}
    assert words in told_changes(changes(then, now))


def test_a_decoder_of_another_device_or_of_images_that_nobody_resizes_does_not_matter(identity: Identity) -> None:
    now = replace(identity, decoder={"cpu": 2, "cuda": 1})
    assert changes({**now.record(), "decoder": {"cpu": 2, "cuda": 7}}, now) == {}
    assert changes({**now.record(), "decoder": {}}, now) == {}


def test_a_setting_at_its_default_is_the_same_whether_a_record_names_it_or_not(identity: Identity) -> None:
    assert changes({**identity.record(), "settings": {**identity.settings, "task.loss": "bce"}}, identity) == {}


def test_a_record_is_the_same_after_a_journey_through_json(identity: Identity) -> None:
    assert json.loads(json.dumps(identity.record())) == identity.record()
    assert len(identity.digest) == 64


@given(before=configs(), now=configs())
@settings(max_examples=20)
def test_two_records_agree_just_when_the_settings_that_decide_do(before: RunConfig, now: RunConfig) -> None:
    before, now = as_begun(before), as_begun(now)  # a record has no autos that each run decides once

    def record(config: RunConfig) -> Identity:
        return Identity(
            settings=json.loads(json.dumps(deciding_settings(config))),
            weights="",
            dataset="a" * 64,
            decoder={},
            device="cpu",
            threads=1,
            versions={},
        )

    found = changes(json.loads(json.dumps(record(before).record())), record(now))
    assert found.keys() == deciding_changes(before, now).keys()
    assert (record(before).digest == record(now).digest) == (not found)


# --- the file on the nodes --------------------------------------------------------------------------------------------------------------


def test_a_rank_that_finds_another_weights_file_than_the_driver_refuses_to_begin_with_it(tmp_path: Path) -> None:
    from trainer.rank.worker import check_weights  # imports torch

    (tmp_path / "w.pth").write_bytes(b"mine")
    known = hashlib.sha256(b"mine").hexdigest()
    config = replace(CONFIG, model=replace(CONFIG.model, weights=str(tmp_path / "w.pth")))
    spec = WorkerSpec(config=config, dataset=None, generation=1, attempt=1, resume=None, threads=1, identity={"weights": known})
    check_weights(spec)
    (tmp_path / "w.pth").write_bytes(b"theirs")
    with pytest.raises(ValueError, match=f"another file .* than where the run was started .{known[:12]}.; put the same file on every node"):
        check_weights(spec)
    check_weights(replace(spec, resume=ResumePoint(step=1, generation=1, path="r/checkpoints/step-00000001.g0001")))
    check_weights(replace(spec, identity={"weights": ""}))
