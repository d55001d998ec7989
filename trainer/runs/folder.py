"""Finds a run's folder from what a person typed. Called by the small commands (report, predict, evaluate, runs) and by rank."""

import difflib
import re
from dataclasses import dataclass

from cluster.storage import Storage, is_uri, join_uri, open_storage
from trainer.settings.tree import RunConfig

RUN_MARKS = ("config.toml", "journal.jsonl", "journal", "summary.json", "checkpoints", "model")  # any of them makes a folder a run's
MOST_BYTES = {".toml": 1 << 20, ".json": 64 << 20, ".jsonl": 256 << 20, ".parquet": 1 << 30, ".safetensors": 1 << 40}
"""By the end of a file's name: what is read of a run's file at most."""
MOST_OTHER_BYTES = 64 << 20
_SHOWN = 8


@dataclass(frozen=True, kw_only=True, slots=True)
class RunFolder:
    """A run's folder, `name` inside `storage`."""

    storage: Storage
    name: str

    @property
    def location(self) -> str:
        """The path or URI that the commands take."""
        return join_uri(self.storage.uri, self.name)

    def is_run(self) -> bool:
        return any(entry.name in RUN_MARKS for entry in self.storage.list(self.name))

    def read(self, path: str) -> bytes | None:
        """Reads a file of the run; None if it does not exist. ValueError for one that is larger than such a file of a run can be, since the
        folder may be anyone's."""
        most = next((most for end, most in MOST_BYTES.items() if path.endswith(end)), MOST_OTHER_BYTES)
        pieces, size = [], 0
        try:
            for piece in self.storage.read_chunks(f"{self.name}/{path}"):
                pieces.append(piece)
                if (size := size + len(piece)) > most:
                    raise ValueError(f"{self.name}/{path} has more than {most} bytes, the most that is read of such a file of a run")
        except FileNotFoundError:
            return None
        return b"".join(pieces)

    def write(self, path: str, data: bytes) -> str:
        """Creates or replaces a file of the run; returns its location."""
        self.storage.write_atomic(f"{self.name}/{path}", data)
        return join_uri(self.location, path)


def find_run(run: str, storage: str = RunConfig().storage) -> RunFolder:
    """Finds a run by the path or URI of its folder, or by its name under `storage`. ValueError for an unknown one names those there."""
    if not run:
        raise ValueError("RUN is empty; give a run's folder, or its name under --storage")
    is_location = "/" in run or run in (".", "..")
    if not is_location:
        found = RunFolder(storage=open_storage(storage), name=run)
        if found.is_run():
            return found
    direct = located(run)
    if direct.is_run():
        return direct
    searched = direct.storage if is_location else open_storage(storage)
    raise ValueError(_unknown(direct.name, run, searched))


def located(location: str) -> RunFolder:
    """The folder at a path or URI, whether or not it is a run's."""
    base, question, query = location.partition("?") if is_uri(location) else (location, "", "")
    if not is_uri(base):
        base = open_storage(base).root  # absolute, so that `.` and `..` have a name too
    parent, _, name = base.rstrip("/").rpartition("/")
    if not name or re.fullmatch(r"[A-Za-z0-9+.-]+:/?", parent):
        raise ValueError(f"RUN {location} is a whole storage, not a run; add the run's name to it")
    return RunFolder(storage=open_storage(f"{parent or '/'}{question}{query}"), name=name)


def _unknown(name: str, given: str, storage: Storage) -> str:
    folders = [entry for entry in storage.list("") if entry.is_dir and not entry.name.startswith(".")]
    runs = {entry.name: entry.modified for entry in folders if RunFolder(storage=storage, name=entry.name).is_run()}
    if not runs:
        return f"there is no run {given}, nor any other in {storage.address}; give a run's folder, or say with --storage where the runs are"
    close = difflib.get_close_matches(name, runs, n=_SHOWN)
    newest = sorted(runs, key=lambda other: -runs[other])
    shown = [*close, *(other for other in newest if other not in close)][:_SHOWN]
    more = f" and {len(runs) - len(shown)} more" if len(runs) > len(shown) else ""
    guess = f"did you mean {close[0]}? " if close else ""
    return f"there is no run {given}; {guess}runs in {storage.address}: {', '.join(shown)}{more}"
