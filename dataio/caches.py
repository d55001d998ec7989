"""Lists the folders that runs have converted their data into, and removes those that are named.

    python -m dataio.caches                       # what there is, of what it was made, what it takes
    python -m dataio.caches --remove NAME...      # frees it, and says how much

A run converts a source into `data.root` once; another `data.test_fraction`, or a file that changes, makes another folder, and none is ever
removed by itself. Only what a conversion made is listed and removed here, nothing else that lies in the folder: what was removed is made
again when it is needed.
"""

from dataio.leaving import Leaving
from dataio.terminal import prepare_output

if __name__ == "__main__":
    leaving = Leaving()
    prepare_output()

import argparse
import fcntl
import os
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from dataio.config import DataConfig
from dataio.foreign import MAX_MANIFEST_BYTES, MAX_SETTINGS_BYTES, read_regular
from dataio.manifest import MANIFEST_NAME, Manifest, ManifestError
from dataio.prepared import ORIGIN_NAME
from dataio.reading import targets_described
from dataio.terminal import tell
from dataio.text import shown

_PARTIAL = ".partial"


@dataclass(frozen=True, kw_only=True, slots=True)
class Cache:
    """A folder that a conversion made."""

    path: Path
    size_bytes: int
    made: float
    """When it was complete, or last written to, in seconds since 1970."""
    what: str

    @property
    def line(self) -> str:
        day = time.strftime("%Y-%m-%d", time.localtime(self.made))
        return f"{shown(self.path.name)}  {size(self.size_bytes)}  {day}  {self.what}"


def caches(root: Path) -> list[Cache]:
    """What conversions have made in this folder, the largest first. Raises OSError if it cannot be read."""
    found = []
    for path in root.iterdir():
        if path.is_dir() and not path.is_symlink() and (what := _described(path)) is not None:
            files = [file.stat() for file in path.rglob("*") if file.is_file()]
            newest = max((facts.st_mtime for facts in files), default=path.stat().st_mtime)
            found.append(Cache(path=path, size_bytes=sum(facts.st_blocks for facts in files) * 512, made=newest, what=what))
    return sorted(found, key=lambda cache: (-cache.size_bytes, cache.path.name))


def remove(cache: Cache) -> None:
    """Removes the folder. Raises ValueError while a conversion writes it."""
    with _held(cache.path):
        shutil.rmtree(cache.path)


def size(count: int) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"


def _described(path: Path) -> str | None:
    """What a folder holds; None if no conversion made it."""
    if path.name.endswith(_PARTIAL):
        return "unfinished; the same command goes on with it" if (path / "conversion.json").is_file() else None
    try:
        manifest = Manifest.from_json(read_regular(path / MANIFEST_NAME, MAX_MANIFEST_BYTES))
    except ManifestError:
        return "of another version, or damaged"
    except OSError:
        return None
    splits = ", ".join(f"{split.count:,} {name}" for name, split in manifest.splits.items())
    try:
        origin = read_regular(path / ORIGIN_NAME, MAX_SETTINGS_BYTES).decode(errors="backslashreplace").strip()
    except OSError:
        origin = f"a {manifest.source}"
    return f"{shown(origin)}: {splits}, {targets_described(manifest.targets)}"


@contextmanager
def _held(path: Path) -> Iterator[None]:
    """The lock of a conversion."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    except BlockingIOError:
        raise ValueError(f"{path} is being written by a conversion; let it end first") from None
    finally:
        os.close(descriptor)


def main(arguments: list[str] | None = None) -> int:
    """Returns 0; 1 if something could not be removed, 2 for a name that is none of the list."""
    parser = argparse.ArgumentParser(
        prog="python -m dataio.caches", description="Lists the folders that data were converted into, and removes those that are named."
    )
    parser.add_argument("--root", type=Path, default=Path(DataConfig().root), help="where they are: data.root (%(default)s)")
    parser.add_argument("--remove", nargs="+", metavar="NAME", default=[], help="remove these of the list; `all` removes all of them")
    options = parser.parse_args(arguments)
    root = options.root.expanduser()
    try:
        found = caches(root) if root.exists() else []
    except OSError as error:
        tell(f"error: {root} cannot be read: {error.strerror}", sys.stderr)
        return 1
    named = found if options.remove == ["all"] else [cache for cache in found if cache.path.name in options.remove]
    if unknown := set(options.remove) - {"all"} - {cache.path.name for cache in found}:
        tell(f"error: {sorted(unknown)[0]} is no converted folder in {root}; without --remove they are listed", sys.stderr)
        return 2
    if not options.remove:
        for cache in found:
            tell(cache.line, sys.stdout)
        total = size(sum(cache.size_bytes for cache in found))
        tell(
            f"{len(found)} in {root}, {total}; --remove NAME... frees what it takes, and the next run makes it again where it needs it",
            sys.stdout,
        )
        return 0
    freed, failed = 0, 0
    for cache in named:
        try:
            remove(cache)
        except (OSError, ValueError) as error:
            tell(f"error: {error}", sys.stderr)
            failed += 1
        else:
            freed += cache.size_bytes
            tell(f"removed {cache.line}", sys.stdout)
    tell(f"{size(freed)} freed", sys.stdout)
    return 1 if failed else 0


if __name__ == "__main__":
    leaving.by(main)
