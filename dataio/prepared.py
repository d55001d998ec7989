"""The converted data set of `data.path`: found, or made once in `data.root`. Called by everything that opens one."""

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from dataio.codecs.text.form import TextForm, text_form
from dataio.config import DataConfig
from dataio.conversion import RULES, Progress, conversion_identities, convert, intact
from dataio.foreign import MAX_MANIFEST_BYTES, read_regular
from dataio.known_good import known_good
from dataio.manifest import MANIFEST_NAME, Manifest, ManifestError
from dataio.parquet import Dataset, open_dataset
from dataio.remote import is_remote, is_uri, local_path
from dataio.sources import Applying, Corrected, Source, open_source
from dataio.staging import write_text
from dataio.text import address

ORIGIN_NAME = "origin.txt"
"""Says of which path a folder in `data.root` was made."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Prepared:
    """A converted data set, opened."""

    location: str
    """As any process opens it: an absolute path or a URI."""
    dataset: Dataset
    by_earlier_rule: bool = False
    """It was converted by an earlier rule, and a conversion made now might hold something else. It stays as it is: older runs go on with
    it."""


def prepared(
    config: DataConfig,
    on_progress: Callable[[Progress], None] | None = None,
    *,
    whole: bool = False,
    source: Callable[[], Source] | None = None,
) -> Prepared:
    """Opens the converted data set of `config.path`. With `whole`, nothing is held out of a source that has no split to be tested on.
    `source` opens the source in another way than `source_of`.

    A remote location (s3://...) must be converted already; `prepare` handles all others. Raises what `prepare` and open_dataset raise.
    """
    if is_remote(config.path):
        refuse_corrections(config)
        return Prepared(location=config.path, dataset=open_dataset(config.path))
    folder, by_earlier_rule = _prepare(config, on_progress, source or partial(source_of, config, whole=whole))
    location = str(folder.resolve())
    return Prepared(location=location, dataset=open_dataset(location), by_earlier_rule=by_earlier_rule)


def open_prepared(config: DataConfig, on_progress: Callable[[Progress], None] | None = None) -> tuple[str, Dataset]:
    """As `prepared`: the location and the data set alone."""
    found = prepared(config, on_progress)
    return found.location, found.dataset


def prepare(config: DataConfig, on_progress: Callable[[Progress], None] | None = None) -> Path:
    """The converted folder of `config.path`: the path itself if it is one, else a folder in `config.root`, made once.

    Raises what convert and open_source raise, and ValueError for a remote URI (see open_prepared).
    """
    return _prepare(config, on_progress, partial(source_of, config))[0]


def already_prepared(config: DataConfig) -> Dataset | None:
    """The converted data set of `config.path` if there is one; converts nothing. None too where the source is gone."""
    try:
        if is_remote(config.path):
            return open_dataset(config.path)
        path = (local_path(config.path) if is_uri(config.path) else None) or Path(config.path).expanduser()
        if (path / MANIFEST_NAME).is_file():
            return open_dataset(path)
        source = source_of(config)
        names = (f"{source.kind}-{identity[:16]}" for identity in conversion_identities(source, config.max_image_pixels, text_form(config)))
        folder = next((made for name in names if intact(made := Path(config.root).expanduser() / name) is not None), None)
        return None if folder is None else open_dataset(folder)
    except (ValueError, OSError):
        return None


def is_converted(path: str | Path) -> bool:
    """Whether `path` is a complete converted folder of this version. For a remote URI it raises what open_dataset raises instead."""
    if is_remote(path):
        open_dataset(path)
        return True
    try:
        if is_uri(path):
            path = local_path(str(path)) or path
        Manifest.from_json(read_regular(Path(path).expanduser() / MANIFEST_NAME, MAX_MANIFEST_BYTES))
    except (OSError, ManifestError):
        return False
    return True


def source_of(config: DataConfig, *, whole: bool = False) -> Source:
    """The source at `config.path`, read according to the settings. Raises what open_source raises."""
    return open_source(
        config.path,
        root=Path(config.root).expanduser(),
        test_fraction=config.test_fraction,
        validation_fraction=config.validation_fraction,
        targets=config.targets,
        image_column=config.image_column,
        label_column=config.label_column,
        text_column=config.text_column,
        holds_texts=bool(config.tokenizer),
        whole=whole,
        corrections=config.corrections,
    )


def _prepare(config: DataConfig, on_progress: Callable[[Progress], None] | None, open_it: Callable[[], Source]) -> tuple[Path, bool]:
    """The converted folder, and whether it was made by an earlier rule."""
    if is_remote(config.path):
        raise ValueError(f"data.path={address(config.path)} is remote: it has no folder here; open it where it is")
    path = (local_path(config.path) if is_uri(config.path) else None) or Path(config.path).expanduser()
    if (path / MANIFEST_NAME).is_file():
        open_dataset(path)  # raises if it is damaged
        refuse_corrections(config)
        return path, False
    root = Path(config.root).expanduser()
    source = open_it()
    texts = text_form(config)
    dests = [root / f"{source.kind}-{identity[:16]}" for identity in conversion_identities(source, config.max_image_pixels, texts)]
    dest = next((made for made in dests if intact(made) is not None), dests[0])
    origin = str(path.resolve()) if path.exists() else config.path
    if isinstance(source, Corrected) and intact(dest) is None:
        _check_keys(source, root, config.max_image_pixels, texts)
    convert(
        source,
        dest,
        max_bad_fraction=config.max_bad_fraction,
        max_image_pixels=config.max_image_pixels,
        on_progress=on_progress,
        force=intact(dest) is None,
        known=lambda: known_good(root, source.kind, origin, rules=RULES, origin_name=ORIGIN_NAME) if texts is None else frozenset(),
        texts=texts,
    )
    if not (dest / ORIGIN_NAME).exists():
        with contextlib.suppress(OSError):  # a root that may be read only: the note is for `dataio.caches` and `known_good`
            write_text(dest / ORIGIN_NAME, origin)
    return dest, dest != dests[0]


def _check_keys(source: Corrected, root: Path, max_image_pixels: int, texts: TextForm | None) -> None:
    """Raises SourceError for a correction of a sample that is not there, before anything is converted: where the same source without
    corrections was converted already, its keys are known."""
    for identity in conversion_identities(source.source, max_image_pixels, texts):
        try:
            dataset = open_dataset(root / f"{source.kind}-{identity[:16]}")
            left_out = dataset.left_out()
        except (ValueError, OSError):
            continue
        applying = Applying(source.corrections)
        for name in dataset.manifest.splits:
            split = dataset.split(name)
            for key in split.keys(range(split.count)):
                applying.met(name, key)
        for bad in left_out:
            applying.met(bad.split, bad.key)
        applying.finish()
        return


def refuse_corrections(config: DataConfig) -> None:
    """ValueError if corrections are asked for, of data that are converted already."""
    if config.corrections:
        raise ValueError(
            f"data.corrections={config.corrections!r:.300} is applied when a source is converted, and data.path={address(config.path)} is "
            "converted already; give the source that it was made of as data.path, or leave the corrections out"
        )
