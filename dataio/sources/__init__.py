"""Labelled images as they come, under one interface: CIFAR-10, Hugging Face Parquet, folders by class, IDX files.

Called by convert, which judges the images; here they are bytes. Archives and pickles are treated as hostile (hostile).
"""

import functools
from pathlib import Path

from dataio.manifest import MANIFEST_NAME
from dataio.sources.cifar import CIFAR10, Cifar, download, torchvision_cifar10
from dataio.sources.folder import IMAGE_SUFFIXES, ImageFolder, find_folders
from dataio.sources.hostile import CIFAR_MEMBERS, load_cifar_pickle, read_archive, read_batches
from dataio.sources.huggingface import HuggingFace, find_parquet
from dataio.sources.idx import Idx, find_idx
from dataio.sources.source import ACCEPTED, Balanced, Renamed, Sample, Source, SourceError, hashed, stat_hash
from dataio.sources.splits import held_out

__all__ = [
    "ACCEPTED",
    "IMAGE_SUFFIXES",
    "Balanced",
    "Sample",
    "Source",
    "SourceError",
    "held_out",
    "load_cifar_pickle",
    "open_source",
]


def open_source(path: str, *, root: Path, test_fraction: float, classes: tuple[str, ...] | None = None) -> Source:
    """Recognises what `path` is. `root` is where a download goes; `test_fraction` of the keys is held out where there is no test split.

    `classes` replaces the source's class names. Raises SourceError (a ValueError) that lists what is accepted and says what was found.
    """
    if not 0.0 < test_fraction < 1.0:
        raise ValueError(
            f"data.test_fraction={test_fraction} leaves nothing to train or to test with; use a number between 0 and 1, such as 0.1"
        )
    source = _open_source(path, root, test_fraction)
    return source if classes is None else Renamed(source, classes)


def _open_source(path: str, root: Path, test_fraction: float) -> Source:
    if path == CIFAR10:
        return Cifar(kind="cifar10", identity=hashed(CIFAR10, torchvision_cifar10().tgz_md5), read=lambda: read_archive(download(root)))
    where = Path(path).expanduser()
    if not where.exists():
        raise SourceError(f"data.path={path!r} does not exist; {ACCEPTED}")
    if where.is_file():
        return _open_file(where, test_fraction)
    if (where / MANIFEST_NAME).exists():
        raise SourceError(f"{path} is converted already; read it as it is: --data.path {path}")
    if (where / "conversion.json").exists():
        raise SourceError(f"{path} is an unfinished conversion; run the same dataio.convert command again to finish it")
    for folder in (where, where / "cifar-10-batches-py"):
        if (folder / "data_batch_1").is_file():
            files = [file for name in CIFAR_MEMBERS if (file := folder / name).is_file()]
            return Cifar(kind="cifar-batches", identity=stat_hash(folder, files), read=functools.partial(read_batches, files))
    if (where / "cifar-10-python.tar.gz").is_file():
        return _open_file(where / "cifar-10-python.tar.gz", test_fraction)
    if idx := find_idx(where):
        return Idx(where, idx, test_fraction)
    if parquet := find_parquet(where):
        return HuggingFace(where, parquet, test_fraction)
    if (folders := find_folders(where)) is not None:
        return ImageFolder(where, *folders, test_fraction)
    names = sorted(entry.name + "/" * entry.is_dir() for entry in where.iterdir())
    found = ", ".join(names[:10]) + (f" and {len(names) - 10} more" if len(names) > 10 else "") if names else "nothing"
    raise SourceError(f"data.path={path!r} is no data set that can be read: it holds {found}; {ACCEPTED}")


def _open_file(file: Path, test_fraction: float) -> Source:
    with open(file, "rb") as opened:
        start = opened.read(512)
    if start[:4] == b"PAR1":
        return HuggingFace(file.parent, {"": [file]}, test_fraction)
    if start[:2] == b"\x1f\x8b" or start[257:262] == b"ustar":
        return Cifar(kind="cifar-tar", identity=stat_hash(file.parent, [file]), read=lambda: read_archive(file))
    raise SourceError(f"{file} is neither a Parquet file nor a tar archive (it begins with {start[:8]!r}); {ACCEPTED}")
