"""A run's identity: its name, whether a command means the same run as before, and the commit it goes on from. Called by start.py,
session.py, stages.py, dry_run.py and trainer/run.py.

A run's identity is what decides its weights: the settings listed by trainer.settings.identity, the content of its weights file and that of
its data. The automatic name is a hash of it, so the same command goes on with the same run. A named run that was started with another
identity is refused. record.py defines how claims and commits say it. All errors are ValueErrors that say what to do. This file only reads
the storage, and writes only journal lines about damaged checkpoints.

Runs of the first releases know their weights file by its path only, and are named by its name. What that path holds now is compared. If it
is gone, such a run goes on only if the user gives its name and a file of the same name.
"""

import dataclasses
import hashlib
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cluster.journal import Journal
from cluster.storage import Storage, is_uri, join_uri
from cluster.store import Commit, NoValidCheckpoint, Store
from dataio.codecs.image.decode import FIRST_VERSIONS
from trainer.drive.capability import as_started
from trainer.drive.record import Identity, changes, record_of, told_changes
from trainer.settings.fields import as_begun, settings, with_autos_of
from trainer.settings.identity import deciding_changes, deciding_settings, first_deciding_settings, weights_sha256
from trainer.settings.rules import validate
from trainer.settings.texts import is_text
from trainer.settings.toml import from_toml
from trainer.settings.tree import RunConfig


@dataclass(frozen=True, kw_only=True, slots=True)
class Found:
    """What the storage holds of a run."""

    saved: RunConfig | None
    """The settings that the run was started with; None if it never was."""
    summary: Mapping[str, Any] | None
    """The summary that its last driver wrote."""
    record: Mapping[str, Any] | None = None
    """The identity record in its newest claim; None if there is none, or an older release wrote it."""

    @property
    def has_finished(self) -> bool:
        return self.summary is not None and self.summary.get("status") == "finished"

    def has_finished_as(self, config: RunConfig) -> bool:
        """Whether it has finished, and has not been made longer since by `config`, which means the same run (check_same_run). One that
        its evaluations ended would have ended there however long it was."""
        summary = self.summary or {}
        epochs, is_early = summary.get("epochs"), bool(summary.get("stopped_early"))
        return self.has_finished and (config.train.max_steps > 0 or is_early or epochs is None or epochs >= config.train.epochs)

    @property
    def is_new(self) -> bool:
        """The run was never started."""
        return self.saved is None and self.record is None

    @property
    def weights(self) -> str:
        """SHA-256 of its weights file; "" if it has none, or if nobody knows."""
        if self.record is not None:
            return str(self.record["weights"])
        try:
            return weights_sha256(self.saved.model.weights) if self.saved is not None else ""
        except (ValueError, OSError):  # the file is gone
            return ""


@dataclass(frozen=True, kw_only=True, slots=True)
class Resolved:
    """A run's settings with a name, and what the storage holds under that name."""

    config: RunConfig
    found: Found


def identity(config: RunConfig, fingerprint: str, weights: str = "") -> dict[str, Any]:
    """What a run's name is made of: the settings that decide its weights, and its data. `weights` is the SHA-256 of its weights file."""
    return deciding_settings(config, weights) | {"dataset": fingerprint}


def run_prefix(config: RunConfig, recipes: tuple[str, ...]) -> str:
    """How an automatic name begins: the recipes' names, or the model's."""
    name = f"hf/{Path(config.model.name).name}" if is_text(config.model) else config.model.name
    return "-".join(recipes) or re.sub(r"[^A-Za-z0-9._-]", "-", name)


def automatic_name(config: RunConfig, fingerprint: str, prefix: str, weights: str = "") -> str:
    """A name made from the run's identity, so that the same command given again goes on with the same run."""
    return _name(identity(config, fingerprint, weights), prefix)


def _first_name(config: RunConfig, fingerprint: str, prefix: str) -> str:
    """The name that the first releases gave."""
    return _name(first_deciding_settings(config) | {"dataset": fingerprint}, prefix)


def _name(deciding: Mapping[str, Any], prefix: str) -> str:
    return f"{prefix}-{hashlib.sha256(json.dumps(deciding, sort_keys=True, default=list).encode()).hexdigest()[:8]}"


def find(storage: Storage, run: str) -> Found:
    """What `storage` holds of the run with this name; nothing for "", a run that has no name yet."""
    if not run:
        return Found(saved=None, summary=None)
    there = {entry.name for entry in storage.list(run)}
    return Found(
        saved=_saved_config(storage, run) if "config.toml" in there else None,
        summary=_summary(storage, run) if "summary.json" in there else None,
        record=_claimed(Store(storage, run)) if "generations" in there else None,
    )


def _claimed(store: Store) -> Mapping[str, Any] | None:
    newest = store.newest_generation()
    try:
        return record_of(store.claim(newest).note) if newest else None
    except FileNotFoundError:  # its driver was refused, and has withdrawn it
        return None


def _saved_config(storage: Storage, run: str) -> RunConfig:
    name = f"{run}/config.toml"
    saved: RunConfig = as_begun(from_toml(storage.read(name).decode(), origin=name))
    return saved


def _summary(storage: Storage, run: str) -> Mapping[str, Any]:
    summary: dict[str, Any] = json.loads(storage.read(f"{run}/summary.json"))
    return summary


def resolved(
    config: RunConfig, storage: Storage, *, workers: int, fingerprint: str, weights: str, prefix: str, shape: tuple[int, ...]
) -> Resolved:
    """`config` with everything decided that needs no device: virtual ranks, the run's name, the storage's full address. A run that goes on
    takes what is left at auto from its first settings; a new run leaves it to the devices. `weights`: SHA-256 of the weights file.
    ValueError if the settings do not fit together."""
    found = find(storage, config.run)
    virtual_ranks = config.train.virtual_ranks or _virtual_ranks_of(found.saved, workers) or workers
    config = dataclasses.replace(config, train=dataclasses.replace(config.train, virtual_ranks=virtual_ranks), storage=storage.uri)
    validate(config, workers=workers, shape=shape)
    if not config.run:
        # Name the run before the autos are decided, so that the command means the same run on every machine.
        config, found = _named(config, storage, fingerprint=fingerprint, weights=weights, prefix=prefix)
    if found.saved is not None:
        config = as_it_began(config, found.saved)
    elif found.record is not None:  # its driver died before it wrote its settings down
        config = with_autos_of(config, found.record["settings"])
    return Resolved(config=config, found=found)


def _named(config: RunConfig, storage: Storage, *, fingerprint: str, weights: str, prefix: str) -> tuple[RunConfig, Found]:
    """`config` with its automatic name, and what is there under it. A run that an older release named goes on under its name. ValueError
    if nobody can say whether that is this run."""
    name, first_name = automatic_name(config, fingerprint, prefix, weights), _first_name(config, fingerprint, prefix)
    named = dataclasses.replace(config, run=name)
    found = find(storage, name)
    if name == first_name or not found.is_new:
        return named, found
    older = find(storage, first_name)
    if older.saved is None or _changes(config, older.saved, (older.weights, weights)):
        return named, found
    if weights and not older.weights:
        raise ValueError(
            f"run {first_name!r} in {storage.address} may be this one, or not: it was named by an older release, which did not look into "
            f"its weights file, and {older.saved.model.weights} is gone; say --run {first_name} to go on with it, or "
            "--run NAME to start anew"
        )
    return dataclasses.replace(config, run=first_name), older


def _virtual_ranks_of(saved: RunConfig | None, workers: int) -> int:
    """The virtual ranks that a named run was started with, if they are enough for `workers`; else 0. The number of workers may change."""
    return saved.train.virtual_ranks if saved is not None and saved.train.virtual_ranks >= workers else 0


def check_same_run(config: RunConfig, found: Found, weights: str) -> None:
    """ValueError if the run with this name, of which `found` is there, was started with other settings than `config`, or other weights.
    `weights`: SHA-256 of the weights file."""
    saved = found.saved
    if saved is None:
        return  # what its claim says is compared once everything is decided
    changed = _changes(config, saved, (found.weights, weights))
    if is_longer(settings(config), changed):
        return
    if changed.keys() == {"train.epochs"} and found.has_finished and config.train.epochs > saved.train.epochs:
        raise ValueError(_train_on(config, saved))
    more = []
    if changed and saved.train.virtual_ranks < config.train.virtual_ranks:
        more.append(f"it can go on with at most {saved.train.virtual_ranks} workers")
    _refuse(config.run, changed, more)


def _changes(config: RunConfig, saved: RunConfig, weights: tuple[str, str]) -> dict[str, tuple[Any, Any]]:
    # The run decides what is left at auto, as in `resolved`.
    return deciding_changes(saved, as_it_began(config, saved), weights)


def as_it_began(config: RunConfig, saved: RunConfig) -> RunConfig:
    """`config` with all that it leaves at auto as in `saved`, the run's first settings."""
    config = dataclasses.replace(config, train=as_started(config.train, saved.train))
    began: RunConfig = with_autos_of(config, settings(saved))
    return began


def check_same_identity(run: str, record: Mapping[str, Any] | None, now: Identity) -> None:
    """ValueError if the run with this name has the identity `record` and not `now`. None, of an older release, is compared otherwise."""
    if record is not None and not is_longer(now.settings, found := changes(record, now)):
        _refuse(run, found, [])


def is_longer(now: Mapping[str, Any], changed: Mapping[str, tuple[Any, Any]]) -> bool:
    """Whether a run of the settings `now` is the one before made longer: it does the same steps, and more. A constant schedule does not
    depend on the number of epochs; another one would have had other learning rates from the first step on."""
    if changed.keys() != {"train.epochs"} or now["optim.schedule"] != "constant" or now["train.max_steps"]:
        return False
    then, epochs = changed["train.epochs"]
    return bool(epochs > then)


def _train_on(config: RunConfig, saved: RunConfig) -> str:
    """How to train a finished run's model for more epochs."""
    where = join_uri(config.storage, config.run)
    weights = f"a copy of {where}/model" if is_uri(config.storage) else where
    return (
        f"run {config.run!r} has finished its {saved.train.epochs} epochs, and its learning rates (optim.schedule={config.optim.schedule}) "
        f"were laid out for them: with train.epochs={config.train.epochs} it would have been another run from its first step on. To train "
        f"on, start a new run from its weights, whose schedule begins anew: --run {config.run}-more --model.weights {weights}. (Only a run "
        "of a constant schedule can be made longer.)"
    )


def _refuse(run: str, changed: Mapping[str, tuple[Any, Any]], more: list[str]) -> None:
    if changed:
        raise ValueError(
            f"run {run!r} was started with other settings ({'; '.join([told_changes(changed), *more])}); "
            "give the same settings to go on, or another --run NAME to start anew"
        )


def check_same_commit(config: RunConfig, meta: Mapping[str, Any], now: Identity) -> None:
    """ValueError if the commit with this meta is not of the run that `config` and `now` describe. An older commit is compared by what it
    says."""
    check_same_data(config, meta["dataset_fingerprint"], now.dataset)
    check_same_decoder(config, meta, now)
    check_same_identity(config.run, record_of(meta), now)
    then, virtual_ranks = meta.get("virtual_ranks"), config.train.virtual_ranks
    if then not in (None, virtual_ranks):  # the one setting that a commit without a record names
        _refuse(config.run, {"train.virtual_ranks": (then, virtual_ranks)}, [])


def check_same_data(config: RunConfig, saved: str, fingerprint: str) -> None:
    """ValueError if the run with this name was trained on another data set: `saved` is its fingerprint, `fingerprint` the present one."""
    if saved != fingerprint:
        raise ValueError(
            f"run {config.run!r} was trained on the data set {saved[:12]}, this is {fingerprint[:12]}; "
            "give the same --data.path to go on, with the files that it had then (a file that was added, changed or removed makes other "
            "data; python -m dataio.caches lists the folders that data were converted into, and each of them can be --data.path), "
            "or another --run NAME to train on these"
        )


def check_same_decoder(config: RunConfig, meta: Mapping[str, Any], now: Identity) -> None:
    """ValueError if another version of the decoder that resizes the run's images resized them before the commit with this meta. Decoders of
    other types of device are told (record.bit_changes)."""
    if not now.decoder:  # images of the right size are the same in all versions
        return
    saved, version = meta.get("decoder", FIRST_VERSIONS)[now.decoded_on], now.decoder[now.decoded_on]
    if saved != version:
        raise ValueError(
            f"run {config.run!r} has resized its images (data.fit={config.data.fit}) by version {saved} of the {now.decoded_on} decoder, "
            f"this is version {version}: their pixels differ, and it would not be the same run; give another --run NAME to start anew, or "
            "go on with the release that started it"
        )


def check_resume(config: RunConfig, *, has_checkpoint: bool) -> None:
    """ValueError if --resume does not allow what was found."""
    if config.resume == "must" and not has_checkpoint:
        raise ValueError(f"--resume must, but run {config.run!r} in {config.storage} has no checkpoint; give --run NAME of one that has")
    if config.resume == "never" and has_checkpoint:
        raise ValueError(f"--resume never, but run {config.run!r} in {config.storage} has a checkpoint; give another --run NAME")


def check_may_show(config: RunConfig, summary: Mapping[str, Any], fingerprint: str) -> None:
    """ValueError if the command asks for something else than this finished run, whose summary is `summary`."""
    check_same_data(config, summary["dataset_fingerprint"], fingerprint)
    if config.resume == "never":
        raise ValueError(f"--resume never, but run {config.run!r} in {config.storage} has finished; give another --run NAME")


def find_start(config: RunConfig, store: Store, journal: Journal, fingerprint: str, tell: Callable[[str], None]) -> Commit | None:
    """The newest valid commit, to go on from; None starts at step 0. `tell` is called for each damaged one."""
    commit = newest_start(store, lambda path, reason: journal.write("checkpoint_corrupt", path=path, reason=reason), tell)
    if commit is not None:
        check_same_data(config, commit.meta["dataset_fingerprint"], fingerprint)
    return commit


def newest_start(store: Store, damaged: Callable[[str, str], None], tell: Callable[[str], None]) -> Commit | None:
    """The newest valid commit. `damaged(path, reason)` and `tell(line)` are called for each damaged one."""

    def on_corrupt(path: str, reason: str) -> None:
        damaged(path, reason)
        tell(f"checkpoint {path} is damaged ({reason}); going back to the one before")

    try:
        return store.newest_valid(on_corrupt)
    except NoValidCheckpoint as error:
        raise ValueError(str(error)) from None
