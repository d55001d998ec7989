"""Sources of labelled images and texts, under one interface: CIFAR-10, Hugging Face Parquet, folders by class, tables, IDX files.

What lives here: `open_source`, which recognises the kind of a path; a file for each kind of source (cifar, idx, huggingface, folder,
table, texts); `cells`, which makes targets of a table's cells; `corrected`, labels that a person has put right; `layout`, the splits and
classes of a folder; `source`, their common interface; `targets`, the labels to read; `splits`, the held-out samples; `hostile` and
`pickled`, which read archives, tables and pickles as if an attacker had written them. Imported by convert, and by code that needs the
classes of a source before its conversion. Outside of the package, import only the names below. Codecs decide whether bytes are a usable
image or text; convert and parquet store them.
"""

import functools
from pathlib import Path

from dataio.foreign import open_regular
from dataio.manifest import MANIFEST_NAME
from dataio.sources.cifar import CIFAR10, Cifar, download, torchvision_cifar10
from dataio.sources.corrected import Applying, Corrected, Corrections, unique, with_corrections
from dataio.sources.folder import ImageFolder, RefusedFolder
from dataio.sources.hostile import CIFAR_MEMBERS, read_archive, read_batches, read_below
from dataio.sources.huggingface import HuggingFace, find_parquet
from dataio.sources.idx import Idx, find_idx
from dataio.sources.layout import find_layout, formerly_found, scan
from dataio.sources.pickled import load_cifar_pickle
from dataio.sources.source import (
    ACCEPTED,
    Balanced,
    HasFiles,
    Options,
    Renamed,
    Sample,
    Source,
    SourceError,
    SourceFile,
    hashed,
    name_of,
    stat_hash,
)
from dataio.sources.table import DELIMITERS, Table, find_table
from dataio.sources.texts import is_row_file, is_text_file, open_texts

__all__ = [
    "ACCEPTED",
    "Applying",
    "Balanced",
    "Corrected",
    "Corrections",
    "HasFiles",
    "Sample",
    "Source",
    "SourceError",
    "SourceFile",
    "load_cifar_pickle",
    "name_of",
    "open_source",
    "read_below",
    "unique",
]


def open_source(
    path: str,
    *,
    root: Path,
    test_fraction: float,
    classes: tuple[str, ...] | None = None,
    validation_fraction: float = 0.0,
    targets: str = "",
    image_column: str = "",
    label_column: str = "",
    text_column: str = "",
    holds_texts: bool = False,
    whole: bool = False,
    corrections: str = "",
) -> Source:
    """Recognises the kind of source at `path`. Downloads go to `root`.

    Where there is no test split, `test_fraction` of the training images is held out; where there is no validation split,
    `validation_fraction` of the rest (0: none). Both are chosen by class and by a hash of the key: see splits. With `whole`, for a source
    to be evaluated, nothing is held out if it stores `train` alone. `targets` names the targets to learn, as
    NAME[:label|labels|number],...; empty means the source's own label, which `label_column` names where it
    has another name than usual, as `image_column` does for the images and `text_column` for the texts. `holds_texts`: it is a source of
    texts, of which other kinds are accepted. `classes` replaces the source's class names. `corrections` is a file
    of changed labels and dropped samples (corrected.py). Raises SourceError (a ValueError) that lists what is accepted and says what was
    found.
    """
    if not 0.0 < test_fraction < 1.0:
        raise ValueError(
            f"data.test_fraction={test_fraction} leaves nothing to train or to test with; use a number between 0 and 1, such as 0.1"
        )
    if not 0.0 <= validation_fraction < 1.0:
        raise ValueError(
            f"data.validation_fraction={validation_fraction} is no fraction of the training images; use 0 (none) or one below 1, like 0.1"
        )
    if targets.strip() and label_column:
        raise ValueError(f"data.targets={targets!r} and data.label_column={label_column!r} both say what is learnt; give one of them")
    options = Options(
        test_fraction=test_fraction,
        validation_fraction=validation_fraction,
        targets=targets.strip(),
        image_column=image_column,
        label_column=label_column,
        text_column=text_column,
        holds_texts=holds_texts,
        whole=whole,
    )
    if text_column and not holds_texts:
        raise ValueError(
            f"data.text_column={text_column!r} is of texts, and the source is read as images: texts need a tokenizer, which a model of "
            "texts brings (--model.name hf/FOLDER), or --data.tokenizer"
        )
    if image_column and holds_texts:
        raise ValueError(f"data.image_column={image_column!r} is of images, and the source is read as texts; leave it out")
    source: Source = open_texts(path, options) if holds_texts else _open_source(path, root, options)
    source = source if classes is None else Renamed(source, classes)
    return with_corrections(source, corrections) if corrections else source


def _open_source(path: str, root: Path, options: Options) -> Source:
    if path == CIFAR10:
        return Cifar(
            kind="cifar10",
            identity=hashed(CIFAR10, torchvision_cifar10().tgz_md5),
            read=lambda: read_archive(download(root)),
            options=options,
        )
    where = Path(path).expanduser()
    if not where.exists():
        raise SourceError(f"data.path={path!r} does not exist; {ACCEPTED}")
    if where.is_file():
        return _open_file(where, options)
    if (where / MANIFEST_NAME).exists():
        raise SourceError(f"{path} is converted already; read it as it is: --data.path {path}")
    if (where / "conversion.json").exists():
        raise SourceError(f"{path} is an unfinished conversion; run the same dataio.convert command again to finish it")
    for folder in (where, where / "cifar-10-batches-py"):
        if (folder / "data_batch_1").is_file():
            files = [file for name in CIFAR_MEMBERS if (file := folder / name).is_file()]
            return Cifar(
                kind="cifar-batches", identity=stat_hash(folder, files), read=functools.partial(read_batches, files), options=options
            )
    if (where / "cifar-10-python.tar.gz").is_file():
        return _open_file(where / "cifar-10-python.tar.gz", options)
    if idx := find_idx(where):
        return Idx(where, idx, options)
    if parquet := find_parquet(where):
        return HuggingFace(where, parquet, options)
    if (images := _open_images(where, options)) is not None:
        return images
    names = sorted(entry.name + "/" * entry.is_dir() for entry in where.iterdir())
    found = ", ".join(names[:10]) + (f" and {len(names) - 10} more" if len(names) > 10 else "") if names else "nothing"
    raise SourceError(f"data.path={path!r} is no data set that can be read: it holds {found}; {ACCEPTED}")


def _open_images(where: Path, options: Options) -> Source | None:
    """A folder of class folders, or of images and a table that says what they show; None if it is neither."""
    tree = scan(where)
    problem: SourceError | None = None
    layout = None
    try:
        layout = find_layout(tree, nested=not options.targets.endswith(":labels"))
    except SourceError as error:
        problem = error
    if layout is not None and len(layout.classes("train")) > 1:
        return ImageFolder(tree, layout, options)
    if (tree.has_images or problem is not None) and (found := find_table(tree, options)) is not None:
        table, ignored = found
        return Table(table, options, ignored=ignored)
    if problem is None:
        return None if layout is None else ImageFolder(tree, layout, options)
    if (former := formerly_found(tree)) is None:
        raise problem
    return RefusedFolder(problem, former, where, options)


def _open_file(file: Path, options: Options) -> Source:
    with open_regular(file) as opened:
        start = opened.read(512)
    if start[:4] == b"PAR1":
        return HuggingFace(file.parent, {"": [file]}, options)
    if start[:2] == b"\x1f\x8b" or start[257:262] == b"ustar":
        return Cifar(kind="cifar-tar", identity=stat_hash(file.parent, [file]), read=lambda: read_archive(file), options=options)
    if file.suffix.lower() in DELIMITERS:
        return Table(file, options)
    texts = "; texts are for a model of texts: --model.name hf/FOLDER" if is_row_file(file) or is_text_file(file) else ""
    raise SourceError(
        f"{file} is neither a Parquet file nor a tar archive nor a table (.csv, .tsv) (it begins with {start[:8]!r}){texts}; {ACCEPTED}"
    )
