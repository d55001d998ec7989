"""Looks at a source that is not converted yet: what a conversion of it would hold, from the headers of its files alone.

Called by the driver before it converts anything, and by a dry run. A conversion reads and decodes every image, which takes minutes; this
takes seconds, and tells all that decides whether a run can begin: sizes, classes, splits, and most images that cannot be used. What only
decoding shows is left to the conversion.
"""

import os
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path

from dataio.balance import known_class_counts
from dataio.codecs.codec import Refusal
from dataio.codecs.make import looked_at
from dataio.codecs.text.form import text_form
from dataio.config import DataConfig
from dataio.conversion import conversion_identities
from dataio.foreign import MAX_IMAGE_BYTES, open_regular, read_regular
from dataio.manifest import MANIFEST_NAME, Manifest, SplitInfo
from dataio.parquet import Dataset, open_dataset
from dataio.prepared import refuse_corrections, source_of
from dataio.quarantine import BadSample
from dataio.remote import is_remote, is_uri, local_path
from dataio.schema import SPLITS, UNLABELLED, Target, single_label
from dataio.sources import Corrected, HasFiles, Source, SourceFile
from dataio.values import checked_values

THREADS = 8
GLANCE_BYTES = 1 << 20
"""Of a large JPEG, this much from its beginning is read: far more than its header."""
TAIL_BYTES = 1 << 16
"""And this much of its end, where its end marker is."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Looked:
    """What is known of a run's data before they are converted, or from their conversion."""

    targets: tuple[Target, ...]
    manifest: Manifest | None
    """Of the converted data; or as a conversion would make it, but without shards and fingerprint. None if only a conversion can tell."""
    is_converted: bool
    bad: Sequence[BadSample] = ()
    """Those that count towards data.max_bad_fraction. Of a converted folder that the settings name there are none: what it left out was
    agreed to when it was made."""
    class_counts: Mapping[str, Sequence[int]] | None = None
    """Split -> images of each class of the first target, if it has classes and the files were looked at. Of converted data only those of
    train, if they have one label."""
    source_bytes: int = 0
    """Of the files to convert."""
    not_read: Sequence[str] = ()
    """Files of the source that are not read."""
    corrected: Mapping[str, int] = field(default_factory=dict)
    """Samples that corrections relabel and drop (Reading.corrected)."""

    @property
    def samples(self) -> int:
        """Good and bad ones."""
        return (sum(split.count for split in self.manifest.splits.values()) + self.manifest.quarantined) if self.manifest else 0


def look_at(config: DataConfig) -> Looked:
    """Looks at `config.path`; converts and downloads nothing. Raises what open_source and open_dataset raise."""
    if is_remote(config.path):
        refuse_corrections(config)
        return _given(open_dataset(config.path))
    path = (local_path(config.path) if is_uri(config.path) else None) or Path(config.path).expanduser()
    if (path / MANIFEST_NAME).is_file():
        refuse_corrections(config)
        return _given(open_dataset(path))
    source = source_of(config)
    if (made := _conversion_of(source, config)) is not None:
        return replace(_given(made), bad=made.left_out())
    corrected = source.corrections.counts if isinstance(source, Corrected) else {}
    if isinstance(source, HasFiles) and not config.tokenizer:  # texts have no header that says something
        return replace(scan(source, max_image_pixels=config.max_image_pixels), corrected=corrected)
    # Counting CIFAR's classes would need a download.
    targets = single_label(tuple(map(str, range(10)))) if source.kind.startswith("cifar") else source.targets
    return Looked(targets=targets, manifest=None, is_converted=False, corrected=corrected)


def scan(source: Source, *, max_image_pixels: int, threads: int = THREADS) -> Looked:
    """Looks at the header of each of the source's files."""
    assert isinstance(source, HasFiles)
    targets = source.targets
    splits: dict[str, SplitInfo] = {}
    bad: list[BadSample] = []
    sizes: Counter[str] = Counter()
    counts: dict[str, Counter[int]] = {}
    source_bytes = 0
    with ThreadPoolExecutor(threads, thread_name_prefix="scan") as pool:
        for split in sorted(source.splits(), key=SPLITS.index):
            files = source.files(split)
            glances = pool.map(lambda file, split=split: _glance(file, targets, split, max_image_pixels), files)
            good = 0
            counts[split] = Counter()
            for place, (file, glance) in enumerate(zip(files, glances, strict=True)):
                source_bytes += glance.file_bytes
                if glance.refusal:
                    bad.append(BadSample(key=file.key, reason=glance.refusal, split=split, sample_id=place))
                    continue
                good += 1
                sizes[glance.size] += 1
                counts[split].update(_classes_of(targets[0], file))
            splits[split] = SplitInfo(count=good, shards=())
    classes = range(len(targets[0].classes))
    return Looked(
        targets=targets,
        manifest=Manifest(
            targets=targets,
            splits=splits,
            fingerprint="",
            image_sizes=dict(sorted(sizes.items())),
            quarantined=len(bad),
            source=source.kind,
            identity=source.identity,
        ),
        is_converted=False,
        bad=bad,
        class_counts={split: [found[number] for number in classes] for split, found in counts.items()} if classes else None,
        source_bytes=source_bytes,
        not_read=source.ignored,
    )


def _given(dataset: Dataset) -> Looked:
    counts = known_class_counts(dataset)
    return Looked(
        targets=dataset.manifest.targets,
        manifest=dataset.manifest,
        is_converted=True,
        class_counts={"train": counts} if counts else None,
        corrected=reading.corrected if (reading := dataset.reading) is not None else {},
    )


def _conversion_of(source: Source, config: DataConfig) -> Dataset | None:
    """What `dataio.convert.prepare` has made of this source, if it has."""
    for identity in conversion_identities(source, config.max_image_pixels, text_form(config)):
        try:
            return open_dataset(Path(config.root).expanduser() / f"{source.kind}-{identity[:16]}")
        except (ValueError, OSError):
            continue
    return None


@dataclass(frozen=True, kw_only=True, slots=True)
class _Glance:
    size: str = ""
    refusal: str = ""
    file_bytes: int = 0


def _glance(file: SourceFile, targets: Sequence[Target], split: str, max_image_pixels: int) -> _Glance:
    try:
        encoded, file_bytes = _beginning_and_end(file.path)
    except OSError as error:
        return _Glance(refusal=f"unreadable: {error.strerror}")
    facts = looked_at(encoded, max_image_pixels=max_image_pixels)
    if isinstance(facts, Refusal):
        return _Glance(refusal=facts.reason, file_bytes=file_bytes)
    try:
        checked_values(targets, file.values, may_be_unknown=split == UNLABELLED)
    except ValueError as error:
        return _Glance(refusal=f"bad label: {error}", file_bytes=file_bytes)
    return _Glance(size=facts.size, file_bytes=file_bytes)


def _beginning_and_end(path: Path) -> tuple[bytes, int]:
    """Enough of a file to look at it: all of it, but for a large JPEG. Also its size."""
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        if size > MAX_IMAGE_BYTES:
            return read_regular(path, MAX_IMAGE_BYTES), size  # which refuses it in its own words
        head = file.read(GLANCE_BYTES)
        if len(head) < GLANCE_BYTES:
            return head, len(head)
        if head.startswith(b"\xff\xd8\xff") and size > GLANCE_BYTES + TAIL_BYTES:
            file.seek(-TAIL_BYTES, os.SEEK_END)
            return head + file.read(TAIL_BYTES), size
        return head + file.read(MAX_IMAGE_BYTES - len(head)), size


def _classes_of(target: Target, file: SourceFile) -> Sequence[int]:
    match target.kind:
        case "label":
            return (int(file.values[0]),)
        case "labels":
            return [number for number, given in enumerate(file.values[0]) if given == 1]
    return ()
