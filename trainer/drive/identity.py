"""Is it the same run, what is it called, and where does it go on. Called by trainer/drive/start.py and dry_run.py.

A run is what decides its weights: its settings (trainer.settings.identity says which), and the content of its data. Its automatic name is
made of that, so that the same command goes on with the same run; a run of a given name is refused where it was started as another. What is
wrong is a ValueError that says what to do. Reads the storage, and writes nothing but what a damaged checkpoint leaves in the journal.
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
    """The settings that it was started with; None where it never was."""
    summary: Mapping[str, Any] | None
    """Of its last end."""

    @property
    def has_finished(self) -> bool:
        return self.summary is not None and self.summary.get("status") == "finished"


@dataclass(frozen=True, kw_only=True, slots=True)
class Resolved:
    """A run's settings with a name, and what the storage holds of that name."""

    config: RunConfig
    found: Found


def identity(config: RunConfig, fingerprint: str) -> dict[str, Any]:
    """What decides a run's weights."""
    return deciding_settings(config) | {"dataset": fingerprint}


def run_prefix(config: RunConfig, recipes: tuple[str, ...]) -> str:
    """How the name of a run begins that was given none."""
    return "-".join(recipes) or config.model.name.replace("/", "-")


def automatic_name(config: RunConfig, fingerprint: str, prefix: str) -> str:
    """A name made of what the run is, so that the same command given again goes on with the same run."""
    digest = hashlib.sha256(json.dumps(identity(config, fingerprint), sort_keys=True, default=list).encode()).hexdigest()
    return f"{prefix}-{digest[:8]}"


def find(storage: Storage, run: str) -> Found:
    """What `storage` holds of the run of this name; "" is a run without a name yet, of which it holds nothing."""
    return Found(saved=_saved_config(storage, run), summary=_summary(storage, run)) if run else Found(saved=None, summary=None)


def _saved_config(storage: Storage, run: str) -> RunConfig | None:
    name = f"{run}/config.toml"
    if not storage.exists(name):
        return None
    config = from_toml(storage.read(name).decode(), origin=name)
    # A release that knew no other way said nothing of it.
    small_maps = "convolution" if config.train.small_maps == "auto" else config.train.small_maps
    return dataclasses.replace(config, train=dataclasses.replace(config.train, small_maps=small_maps))


def _summary(storage: Storage, run: str) -> Mapping[str, Any] | None:
    name = f"{run}/summary.json"
    if not storage.exists(name):
        return None
    summary: dict[str, Any] = json.loads(storage.read(name))
    return summary


def resolved(config: RunConfig, storage: Storage, *, workers: int, fingerprint: str, prefix: str, image_size: tuple[int, int]) -> Resolved:
    """`config` with everything decided that needs no device: virtual ranks, the run's name, the storage's full address. What is left at
    auto is as the run was started; a new run leaves it to the devices. ValueError where the settings do not go together."""
    found = find(storage, config.run)
    virtual_ranks = config.train.virtual_ranks or _virtual_ranks_of(found.saved, workers) or workers
    config = dataclasses.replace(config, train=dataclasses.replace(config.train, virtual_ranks=virtual_ranks), storage=storage.uri)
    validate(config, workers=workers, image_size=image_size)
    if not config.run:
        # Before what is left at auto is decided: the command means the same run on every machine.
        config = dataclasses.replace(config, run=automatic_name(config, fingerprint, prefix))
        found = find(storage, config.run)
    if found.saved is not None:
        config = dataclasses.replace(config, train=as_started(config.train, found.saved.train))
    return Resolved(config=config, found=found)


def _virtual_ranks_of(saved: RunConfig | None, workers: int) -> int:
    """Those that a named run was started with, if `workers` can carry them: it may go on with another number of workers. Else 0."""
    return saved.train.virtual_ranks if saved is not None and saved.train.virtual_ranks >= workers else 0


def check_same_run(config: RunConfig, saved: RunConfig | None) -> None:
    """ValueError if the run of this name was started with other settings, which are `saved`."""
    if saved is None:
        return
    # What is left at auto is taken from the run, see `resolved`.
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
    """ValueError if the run of this name was trained on the data set `saved`, and that is another."""
    if saved != fingerprint:
        raise ValueError(
            f"run {config.run!r} was trained on the data set {saved[:12]}, this is {fingerprint[:12]}; "
            "give the same --data.path to go on, or another --run NAME to start anew"
        )


def check_same_decoder(config: RunConfig, manifest: Manifest, start: Commit | None, device: str) -> None:
    """ValueError if this run's images were resized by another version of the decoder on this type of device (cpu, cuda)."""
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
    """ValueError where --resume forbids what was found."""
    if config.resume == "must" and not has_checkpoint:
        raise ValueError(f"--resume must, but run {config.run!r} in {config.storage} has no checkpoint; give --run NAME of one that has")
    if config.resume == "never" and has_checkpoint:
        raise ValueError(f"--resume never, but run {config.run!r} in {config.storage} has a checkpoint; give another --run NAME")


def check_may_show(config: RunConfig, summary: Mapping[str, Any], fingerprint: str) -> None:
    """ValueError where a finished run, of which this is the summary, is not what the command asks for."""
    check_same_data(config, summary["dataset_fingerprint"], fingerprint)
    if config.resume == "never":
        raise ValueError(f"--resume never, but run {config.run!r} in {config.storage} has finished; give another --run NAME")


def find_start(config: RunConfig, store: Store, journal: Journal, fingerprint: str, tell: Callable[[str], None]) -> Commit | None:
    """The commit to go on from; None starts at zero. `tell` is told of damaged ones."""

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
