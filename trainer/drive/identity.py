"""A run's identity: its name, whether a command means the same run as before, and the commit it goes on from. Called by start.py,
session.py, stages.py, dry_run.py and trainer/run.py.

A run's identity is what decides its weights: the settings listed by trainer.settings.identity, and the content of its data. The automatic
name is a hash of it, so the same command goes on with the same run. A named run that was started with another identity is refused. All
errors are ValueErrors that say what to do. This file only reads the storage, and writes only journal lines about damaged checkpoints.
"""

import dataclasses
import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from cluster.journal import Journal
from cluster.storage import Storage
from cluster.store import Commit, NoValidCheckpoint, Store
from dataio.codecs.image.decode import DECODER_VERSIONS, FIRST_VERSIONS
from dataio.manifest import Manifest, resizes
from trainer.drive.capability import as_started
from trainer.settings.identity import deciding_changes, deciding_settings
from trainer.settings.rules import validate
from trainer.settings.toml import from_toml
from trainer.settings.tree import RunConfig


@dataclass(frozen=True, kw_only=True, slots=True)
class Found:
    """What the storage holds of a run."""

    saved: RunConfig | None
    """The settings that the run was started with; None if it never was."""
    summary: Mapping[str, Any] | None
    """The summary that its last driver wrote."""

    @property
    def has_finished(self) -> bool:
        return self.summary is not None and self.summary.get("status") == "finished"


@dataclass(frozen=True, kw_only=True, slots=True)
class Resolved:
    """A run's settings with a name, and what the storage holds under that name."""

    config: RunConfig
    found: Found


def identity(config: RunConfig, fingerprint: str) -> dict[str, Any]:
    """All that decides a run's weights: settings and data."""
    return deciding_settings(config) | {"dataset": fingerprint}


def run_prefix(config: RunConfig, recipes: tuple[str, ...]) -> str:
    """How an automatic name begins: the recipes' names, or the model's."""
    return "-".join(recipes) or config.model.name.replace("/", "-")


def automatic_name(config: RunConfig, fingerprint: str, prefix: str) -> str:
    """A name made from the run's identity, so that the same command given again goes on with the same run."""
    digest = hashlib.sha256(json.dumps(identity(config, fingerprint), sort_keys=True, default=list).encode()).hexdigest()
    return f"{prefix}-{digest[:8]}"


def find(storage: Storage, run: str) -> Found:
    """What `storage` holds of the run with this name; nothing for "", a run that has no name yet."""
    return Found(saved=_saved_config(storage, run), summary=_summary(storage, run)) if run else Found(saved=None, summary=None)


def _saved_config(storage: Storage, run: str) -> RunConfig | None:
    name = f"{run}/config.toml"
    if not storage.exists(name):
        return None
    config = from_toml(storage.read(name).decode(), origin=name)
    # A release that had only convolutions did not write this setting.
    small_maps = "convolution" if config.train.small_maps == "auto" else config.train.small_maps
    return dataclasses.replace(config, train=dataclasses.replace(config.train, small_maps=small_maps))


def _summary(storage: Storage, run: str) -> Mapping[str, Any] | None:
    name = f"{run}/summary.json"
    if not storage.exists(name):
        return None
    summary: dict[str, Any] = json.loads(storage.read(name))
    return summary


def resolved(config: RunConfig, storage: Storage, *, workers: int, fingerprint: str, prefix: str, image_size: tuple[int, int]) -> Resolved:
    """`config` with everything decided that needs no device: virtual ranks, the run's name, the storage's full address. A run that goes on
    takes what is left at auto from its first settings; a new run leaves it to the devices. ValueError if the settings do not fit
    together."""
    found = find(storage, config.run)
    virtual_ranks = config.train.virtual_ranks or _virtual_ranks_of(found.saved, workers) or workers
    config = dataclasses.replace(config, train=dataclasses.replace(config.train, virtual_ranks=virtual_ranks), storage=storage.uri)
    validate(config, workers=workers, image_size=image_size)
    if not config.run:
        # Name the run before the autos are decided, so that the command means the same run on every machine.
        config = dataclasses.replace(config, run=automatic_name(config, fingerprint, prefix))
        found = find(storage, config.run)
    if found.saved is not None:
        config = dataclasses.replace(config, train=as_started(config.train, found.saved.train))
    return Resolved(config=config, found=found)


def _virtual_ranks_of(saved: RunConfig | None, workers: int) -> int:
    """The virtual ranks that a named run was started with, if they are enough for `workers`; else 0. The number of workers may change."""
    return saved.train.virtual_ranks if saved is not None and saved.train.virtual_ranks >= workers else 0


def check_same_run(config: RunConfig, saved: RunConfig | None) -> None:
    """ValueError if the run with this name was started with other settings than `config`, namely `saved`."""
    if saved is None:
        return
    # The run decides what is left at auto, as in `resolved`.
    now = dataclasses.replace(config, train=as_started(config.train, saved.train))
    changed = [f"{key}: {before!r} then, {after!r} now" for key, (before, after) in deciding_changes(saved, now).items()]
    if changed and saved.train.virtual_ranks < config.train.virtual_ranks:
        changed.append(f"it can go on with at most {saved.train.virtual_ranks} workers")
    if changed:
        raise ValueError(
            f"run {config.run!r} was started with other settings ({'; '.join(changed)}); "
            "give the same settings to go on, or another --run NAME to start anew"
        )


def check_same_data(config: RunConfig, saved: str, fingerprint: str) -> None:
    """ValueError if the run with this name was trained on another data set: `saved` is its fingerprint, `fingerprint` the present one."""
    if saved != fingerprint:
        raise ValueError(
            f"run {config.run!r} was trained on the data set {saved[:12]}, this is {fingerprint[:12]}; "
            "give the same --data.path to go on, or another --run NAME to start anew"
        )


def check_same_decoder(config: RunConfig, manifest: Manifest, start: Commit | None, device: str) -> None:
    """ValueError if another version of the decoder on this type of device (cpu, cuda) resized this run's images before."""
    if start is None or not resizes(manifest, config.data):  # images of the right size are the same in all versions
        return
    saved, now = start.meta.get("decoder", FIRST_VERSIONS)[device], DECODER_VERSIONS[device]
    if saved != now:
        raise ValueError(
            f"run {config.run!r} has resized its images (data.fit={config.data.fit}) by version {saved} of the {device} decoder, this is "
            f"version {now}: their pixels differ, and it would not be the same run; give another --run NAME to start anew, or go on with "
            "the release that started it"
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

    def on_corrupt(path: str, reason: str) -> None:
        journal.write("checkpoint_corrupt", path=path, reason=reason)
        tell(f"checkpoint {path} is damaged ({reason}); going back to the one before")

    try:
        commit = store.newest_valid(on_corrupt)
    except NoValidCheckpoint as error:
        raise ValueError(str(error)) from None
    if commit is None:
        return None
    check_same_data(config, commit.meta["dataset_fingerprint"], fingerprint)
    return commit
