"""Finds the facts that decide whether a run can begin (problems.py), without starting, converting or leaving anything. Called by start.py,
which then begins the run, and by dry_run.py, which does not.

Whatever cannot be found is a problem among the others, not the end of the search.
"""

import os
import tempfile
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Protocol, TypeVar

from cluster.exporter import serve_discovery
from cluster.shared_port import SharedPort
from cluster.spill import is_another_disk
from cluster.storage import Storage, is_outage, open_storage
from cluster.store import Store
from dataio.scan import look_at
from dataio.unlabelled import look_at_unlabelled
from trainer.drive.identity import find
from trainer.drive.problems import Facts, Room
from trainer.runs.model_files import pinned
from trainer.settings.packages import lacking
from trainer.settings.trackers import lacking_for_trackers
from trainer.settings.tree import RunConfig

T = TypeVar("T")


class Call(Protocol):
    """SetUp.call: waits for a storage that is away."""

    def __call__(self, what: str, operation: Callable[[], T]) -> T: ...


def at_once(what: str, operation: Callable[[], T]) -> T:
    """For a dry run, which waits for nothing."""
    return operation()


class _Search:
    """Problems that come up while the facts are looked for."""

    def __init__(self) -> None:
        self.wrong: list[str] = []

    def tried(self, operation: Callable[[], T]) -> T | None:
        """What `operation()` returns; None if it says that something is wrong. An outage says nothing, and ends the search."""
        try:
            return operation()
        except ValueError as error:
            self.wrong.append(str(error))
        except OSError as error:
            if is_outage(error):
                raise
            self.wrong.append(str(error))
        return None


def survey(config: RunConfig, *, workers: Callable[[], int | None], in_job: bool, call: Call = at_once) -> Facts:
    """Everything but the model, which start.py and dry_run.py build each in its own way. `workers()` finds the largest number of them."""
    search = _Search()
    if in_job:
        search.tried(lambda: check_storage_outlives_job(config.storage))
    storage = search.tried(lambda: call("the storage", lambda: open_storage(config.storage, config.cluster.storage_retry_seconds)))
    if storage is not None and storage.is_local:
        search.tried(partial(check_can_hold, storage))
    if storage is not None and config.train.ledger:
        search.tried(partial(storage.local_path, "", "--train.ledger"))
    search.wrong += lacking(config.model)
    search.wrong += lacking_for_trackers(config.track)
    if config.train.teacher:
        teacher = search.tried(lambda: call("the teacher", lambda: pinned_teacher(config)))
        config = replace(config, train=replace(config.train, teacher=teacher or config.train.teacher))
    looked = search.tried(lambda: look_at(config.data))
    unlabelled = (
        search.tried(lambda: call("the unlabelled images", lambda: look_at_unlabelled(config.data))) if config.data.unlabelled else None
    )
    if looked is not None and not looked.is_converted:
        search.tried(lambda: check_can_convert(config.data.root))
    most = search.tried(workers)
    search.tried(lambda: check_ports(config.cluster.metrics_host, config.cluster.discovery_port))
    # Which run an automatic name means is known once converted data have given it one.
    is_new, has_checkpoint, saved = looked is None or not looked.is_converted, None, None
    if storage is not None and config.run and search.tried(partial(Store.open, storage, config.run)) is not None and not search.wrong:
        found = call("the run's folder", partial(find, storage, config.run))
        is_new, saved = found.is_new, found.saved
        has_checkpoint = bool(call("the run's checkpoints", Store(storage, config.run).commits))
    is_local = storage is not None and storage.is_local
    return Facts(
        config=config,
        workers=most,
        is_new=is_new,
        saved=saved,
        found_wrong=tuple(search.wrong),
        looked=looked,
        unlabelled=unlabelled,
        storage_room=room_of(storage.root) if storage is not None and is_local else None,
        has_spill=storage is not None and is_local and is_another_disk(config.cluster.spill_dir, storage),
        root_room=room_of(config.data.root),
        has_checkpoint=has_checkpoint,
    )


def pinned_teacher(config: RunConfig) -> str:
    """`train.teacher` as the location of a model with its hash. ValueError if there is no model."""
    try:
        return pinned(config.train.teacher, config.storage)
    except ValueError as error:
        raise ValueError(f"train.teacher={config.train.teacher}: {error}") from None


def check_storage_outlives_job(storage: str) -> None:
    """ValueError for a relative folder: a job's working directory is a copy that Ray deletes."""
    if "://" not in storage and not Path(storage).expanduser().is_absolute():
        raise ValueError(
            f"--storage {storage} is relative, and a job's working directory is a copy that Ray deletes after it; "
            "give an absolute path that every node mounts, or s3://..., gs://..."
        )


def check_ports(host: str, discovery_port: int) -> None:
    """ValueError if the coordinator, which will serve on this node, cannot listen, or if the discovery port is taken by anything but
    another run."""
    serve_discovery(host, 0, list).close()
    if discovery_port:
        SharedPort(host, discovery_port, list).close()


def check_can_hold(storage: Storage) -> None:
    """ValueError if the folder of a local storage cannot be made. Leaves nothing."""
    if reason := _why_not(storage.root):
        raise ValueError(f"storage {storage.uri!r} cannot be made ({reason}); give a folder that can with --storage")


def check_can_convert(root: str) -> None:
    """ValueError if data cannot be converted into `root`. Leaves nothing."""
    if reason := _why_not(root):
        raise ValueError(f"{root} cannot be made ({reason}); name a folder that can be written: --data.root")


def room_of(folder: str) -> Room | None:
    """None if nobody can tell."""
    try:
        found = os.statvfs(_nearest(folder))
    except OSError:
        return None
    return Room(where=folder, free_bytes=found.f_bavail * found.f_frsize)


def _why_not(folder: str) -> str:
    """Why a folder cannot be made and written to; "" if it can."""
    nearest = _nearest(folder)
    try:
        os.rmdir(tempfile.mkdtemp(prefix=".finetune-try-", dir=nearest))
    except OSError as error:
        return error.strerror or str(error)
    return ""


def _nearest(folder: str) -> str:
    """The folder, or the nearest one above it that exists; a file in its place counts, and makes the attempt to write fail."""
    path = Path(folder).expanduser().absolute()
    while not os.path.lexists(path) and path != path.parent:
        path = path.parent
    return str(path)
