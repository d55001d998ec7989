"""Converts a source into a folder of Parquet shards with checked images, or with texts made into tokens; the manifest is written last.

    python -m dataio.convert SOURCE DEST

Called by the command line above and, through `prepare` and `open_prepared`, by everything that opens `data.path`. The work happens in
DEST.partial, shard after shard. Each complete shard is recorded next to it, so a stopped conversion continues after its last complete
shard. DEST appears complete, by one rename. The codec judges the samples, schema the values of targets, and sources reads both.
"""

from dataio.leaving import Leaving
from dataio.terminal import prepare_output

if __name__ == "__main__":
    leaving = Leaving()
    prepare_output(survive=True)

import argparse
import contextlib
import errno
import fcntl
import hashlib
import itertools
import json
import math
import os
import shutil
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence, Set
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, get_args

import numpy as np

from dataio.codecs.codec import Facts, Refusal
from dataio.codecs.make import looked_at, make_checker
from dataio.codecs.text.form import TextForm, text_form
from dataio.codecs.text.tokens import Checker as TextChecker
from dataio.codecs.text.tokens import TextFacts
from dataio.config import DataConfig, TooLong
from dataio.foreign import MAX_MANIFEST_BYTES, read_regular
from dataio.known_good import RULES_NAME, known_good
from dataio.manifest import MANIFEST_NAME, Fingerprint, Manifest, ManifestError, ShardInfo, SplitInfo, TextInfo, fault_of_splits
from dataio.parquet import QUARANTINE_NAME, ROWS_PER_GROUP, Dataset, ShardWriter, Split, open_dataset
from dataio.quarantine import BadSample, Quarantine
from dataio.reading import READING_NAME, REPEATS_NAME, Reading, Repeats, described, examples_of, lines_of, repeats_text, warnings
from dataio.remote import is_remote, is_uri, local_path
from dataio.schema import SPLITS, UNLABELLED, Target, fault_of_targets, is_known, is_single_label, value_of
from dataio.sources import Applying, Balanced, Corrected, Sample, Source, SourceError, open_source, unique
from dataio.terminal import tell
from dataio.text import address

SHARD_BYTES = 64 << 20
SMALL_SOURCE = 5_000  # samples; a source as small as this is read to its end, so that the error about bad samples can count them all
ORIGIN_NAME = "origin.txt"
"""Says of which path a folder in `data.root` was made."""
_STATE_NAME = "conversion.json"
_RULES = "2"  # of what is usable; parts that an attempt by other rules left are made again
_FORMAT = 1  # part of a conversion's identity; raise it when the stored form of a source changes


class DiskFull(OSError):
    """No space is left for the shards; complete shards are kept."""

    failure_kind = "storage"

    def __str__(self) -> str:
        return self.strerror or ""


@dataclass(frozen=True, kw_only=True, slots=True)
class Progress:
    """The progress of a conversion."""

    split: str
    done: int
    """Samples of the split seen so far, bad ones included."""
    total: int | None
    """Samples of the split; None if the source does not know."""
    bad: int
    """Bad samples of all splits so far."""
    resumed: int
    """Those of `done` that an earlier attempt converted."""
    unit: str = "images"

    def describe(self) -> str:
        """`train: 512 of 2000 images, 3 bad`."""
        of = "" if self.total is None else f" of {self.total}"
        resumed = f", {self.resumed} of them before" if self.resumed else ""
        bad = f", {self.bad} bad" if self.bad else ""
        return f"{self.split}: {self.done}{of} {self.unit}{resumed}{bad}"


def convert(
    source: Source,
    dest: Path,
    *,
    max_bad_fraction: float,
    max_image_pixels: int,
    on_progress: Callable[[Progress], None] | None = None,
    force: bool = False,
    shard_bytes: int = SHARD_BYTES,
    threads: int = 1,
    known: Callable[[], Set[bytes]] = frozenset,
    texts: TextForm | None = None,
) -> Manifest:
    """Converts `source` into the folder `dest`; does nothing if an earlier call did so. Samples whose SHA-256 is in `known()` are good by
    today's rules and are not decoded (known_good.py). `texts`: how the samples become tokens, where they are texts.

    Bad samples are left out and recorded in quarantine.jsonl. A key that occurs again in its split gets the suffix "#2", "#3", ... in the
    source's order. Raises ValueError if `dest` holds anything else (`force` replaces it once the new folder is complete), TooManyBadSamples
    above max_bad_fraction of the whole source, and DiskFull. After any of these, or a kill, the same call continues where it stopped.
    """
    identities = conversion_identities(source, max_image_pixels, texts)
    dest = dest.expanduser()
    dest = dest.parent.resolve() / dest.name
    if not dest.name:
        raise ValueError(f"DEST {dest} is no folder that can be made; name one")
    try:
        dest.parent.mkdir(parents=True, exist_ok=True)
        if not os.access(dest.parent, os.W_OK | os.X_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise ValueError(
            f"{dest} cannot be made ({error.strerror}); name a folder that can be written: --data.root (of `dataio.convert`: DEST)"
        ) from error
    staging = dest.with_name(dest.name + ".partial")
    with _locked(staging):
        if dest.exists() and not force:
            if not any(staging.iterdir()):
                staging.rmdir()
            existing = _intact(dest)
            if existing is None or existing.identity not in identities:
                raise ValueError(
                    f"{dest} exists and is not this source, converted with these settings; name another folder, remove it, "
                    f"or add --force to replace it"
                )
            _check_limit(dest, existing, max_bad_fraction)
            return existing
        try:
            manifest = _Conversion(
                source, staging, identities[0], max_bad_fraction, max_image_pixels, on_progress, shard_bytes, threads, known(), texts
            ).run()
            _publish(staging, dest)
        except BaseException as error:
            free = shutil.disk_usage(staging.parent).free
            if not any(staging.glob("*.part.json")):  # nothing to continue from
                shutil.rmtree(staging, ignore_errors=True)
            if isinstance(error, OSError) and (error.errno in (errno.ENOSPC, errno.EDQUOT) or "No space left" in str(error)):
                raise DiskFull(
                    error.errno or errno.ENOSPC,
                    f"no space is left for {staging} ({free / 1e6:.1f} MB free); complete shards are kept: make room, "
                    f"then run the same command again; or name a folder elsewhere: --data.root (of `dataio.convert`: DEST)",
                ) from error
            raise
    return manifest


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


@dataclass(frozen=True, kw_only=True, slots=True)
class Prepared:
    """A converted data set, opened."""

    location: str
    """As any process opens it: an absolute path or a URI."""
    dataset: Dataset
    by_earlier_rule: bool = False
    """It was converted by an earlier rule, and a conversion made now might hold something else. It stays as it is: older runs go on with
    it."""


def open_prepared(config: DataConfig, on_progress: Callable[[Progress], None] | None = None) -> tuple[str, Dataset]:
    """As `prepared`: the location and the data set alone."""
    found = prepared(config, on_progress)
    return found.location, found.dataset


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
        folder = next((made for name in names if _intact(made := Path(config.root).expanduser() / name) is not None), None)
        return None if folder is None else open_dataset(folder)
    except (ValueError, OSError):
        return None


def prepare(config: DataConfig, on_progress: Callable[[Progress], None] | None = None) -> Path:
    """The converted folder of `config.path`: the path itself if it is one, else a folder in `config.root`, made once.

    Raises what convert and open_source raise, and ValueError for a remote URI (see open_prepared).
    """
    return _prepare(config, on_progress, partial(source_of, config))[0]


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
    dest = next((made for made in dests if _intact(made) is not None), dests[0])
    origin = str(path.resolve()) if path.exists() else config.path
    if isinstance(source, Corrected) and _intact(dest) is None:
        _check_keys(source, root, config.max_image_pixels, texts)
    convert(
        source,
        dest,
        max_bad_fraction=config.max_bad_fraction,
        max_image_pixels=config.max_image_pixels,
        on_progress=on_progress,
        force=_intact(dest) is None,
        known=lambda: known_good(root, source.kind, origin, rules=_RULES, origin_name=ORIGIN_NAME) if texts is None else frozenset(),
        texts=texts,
    )
    if not (dest / ORIGIN_NAME).exists():
        with contextlib.suppress(OSError):  # a root that may be read only: the note is for `dataio.caches` and `known_good`
            _write(dest / ORIGIN_NAME, origin)
    return dest, dest != dests[0]


def refuse_corrections(config: DataConfig) -> None:
    """ValueError if corrections are asked for, of data that are converted already."""
    if config.corrections:
        raise ValueError(
            f"data.corrections={config.corrections!r:.300} is applied when a source is converted, and data.path={address(config.path)} is "
            "converted already; give the source that it was made of as data.path, or leave the corrections out"
        )


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


def _intact(dest: Path) -> Manifest | None:
    """The manifest of a converted folder if all of its files are there."""
    try:
        return open_dataset(dest).manifest
    except (ValueError, OSError):
        return None


def _check_limit(dest: Path, manifest: Manifest, max_bad_fraction: float) -> None:
    """Applies this limit to the samples that an earlier conversion left out, perhaps under a laxer one."""
    lines = (dest / QUARANTINE_NAME).read_text(encoding="utf-8").splitlines()
    quarantine = Quarantine(max_bad_fraction, sum(split.count for split in manifest.splits.values()) + manifest.quarantined)
    quarantine.restore(BadSample.from_json(json.loads(line)) for line in lines)


def conversion_identities(source: Source, max_image_pixels: int, texts: TextForm | None = None) -> tuple[str, ...]:
    """Hashes of everything that decides the converted folder's content. The first is that of a conversion made now. The others are those of
    earlier rules for reading the source: a folder converted by those rules is still valid, and older runs continue with it."""
    form: Any = max_image_pixels if texts is None else texts.identity
    return tuple(
        hashlib.sha256(json.dumps([_FORMAT, ROWS_PER_GROUP, source.kind, identity, form]).encode()).hexdigest()
        for identity in source.identities
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class _Part:
    """A complete shard and the range of source samples behind it; this is the content of the shard's sidecar file."""

    split: str
    shard: ShardInfo | None
    """None if the split's last samples were all bad."""
    consumed: int
    """Samples of the split seen up to the end of this part."""
    last: bool
    bad: tuple[BadSample, ...]
    image_sizes: dict[str, int]
    transparent: int
    """Samples of the shard that have an alpha channel."""
    dropped: tuple[str, ...] = ()
    """Keys of samples that corrections drop."""
    cut: int = 0
    """Texts of the shard that had more than `data.max_tokens`."""

    def to_json(self) -> str:
        return json.dumps(asdict(self), ensure_ascii=False)

    @classmethod
    def from_json(cls, text: bytes) -> "_Part":
        value: dict[str, Any] = json.loads(text)
        shard = value.pop("shard")
        return cls(
            shard=ShardInfo(**(shard | {"row_group_rows": tuple(shard["row_group_rows"])})) if shard else None,
            bad=tuple(BadSample.from_json(record) for record in value.pop("bad")),
            dropped=tuple(value.pop("dropped", ())),
            **value,
        )


class _Conversion:
    """One call's work in the staging folder, which it holds exclusively."""

    def __init__(
        self,
        source: Source,
        staging: Path,
        identity: str,
        max_bad_fraction: float,
        max_image_pixels: int,
        on_progress: Callable[[Progress], None] | None,
        shard_bytes: int,
        threads: int,
        known: Set[bytes],
        texts: TextForm | None,
    ) -> None:
        self._source, self._staging, self._identity = source, staging, identity
        self._known, self._max_image_pixels = known, max_image_pixels
        self._on_progress, self._shard_bytes = on_progress, shard_bytes
        self._splits = sorted(source.splits(), key=lambda name: SPLITS.index(name) if name in SPLITS else len(SPLITS))
        self._corrections = source.corrections if isinstance(source, Corrected) else None
        self._applying = Applying(self._corrections)
        self._texts, self._unit = texts, "images" if texts is None else "texts"
        self._checker = make_checker(max_image_pixels=max_image_pixels, threads=threads, texts=texts)
        self._max_bad_fraction = max_bad_fraction

    def run(self) -> Manifest:
        if (fault := fault_of_splits(self._splits) or fault_of_targets(self._source.targets)) is not None:
            raise ValueError(f"the source cannot be converted: {fault}")
        parts = self._resume()
        counts = [self._source.count(split) for split in self._splits]
        total = None if None in counts else sum(count or 0 for count in counts)
        self._quarantine = Quarantine(self._max_bad_fraction, None if total is None or total <= SMALL_SOURCE else total)
        self._quarantine.restore(record for part in parts for record in part.bad)
        try:
            for split in self._splits:
                parts += self._convert_split(split, [part for part in parts if part.split == split])
        finally:
            self._checker.close()
        try:
            self._applying.finish()
        except SourceError:
            for path in self._staging.glob("*.part.json"):  # a corrected file is another conversion, and would not go on with these
                path.unlink()
            raise
        self._quarantine.finish(sum(part.consumed for part in parts if part.last))
        return self._finish(parts)

    def _resume(self) -> list[_Part]:
        """Returns an earlier attempt's complete and intact parts, in order; removes everything else in the folder."""
        state = self._staging / _STATE_NAME
        kept: list[_Part] = []
        names = {_STATE_NAME}
        if state.is_file() and state.read_text() == f"{self._identity} {_RULES}":
            for split in self._splits:
                for index in range(1 << 30):
                    part = self._valid_part(split, index)
                    if part is None:
                        break
                    kept.append(part)
                    names |= {_part_name(split, index), _shard_name(split, index)}
                if not kept or not (kept[-1].split == split and kept[-1].last):
                    break
        for path in self._staging.iterdir():
            if path.name not in names:
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        _write(state, f"{self._identity} {_RULES}")
        return kept

    def _valid_part(self, split: str, index: int) -> _Part | None:
        try:
            part = _Part.from_json((self._staging / _part_name(split, index)).read_bytes())
            if part.shard is not None:
                with open(self._staging / part.shard.name, "rb") as file:
                    if hashlib.file_digest(file, "sha256").hexdigest() != part.shard.sha256:
                        return None
        except (OSError, ValueError, KeyError, TypeError):
            return None
        return part

    def _convert_split(self, split: str, done: list[_Part]) -> list[_Part]:
        """Converts the rest of a split; returns its new parts."""
        is_done = bool(done and done[-1].last)
        if is_done and self._corrections is None:
            return []
        resumed = done[-1].consumed if done else 0
        seen = {record.key for part in done for record in part.bad} | self._stored_keys(split, done)
        seen.update(key for part in done for key in part.dropped)
        for key in seen if self._corrections is not None else ():
            self._applying.met(split, key)
        if is_done:
            return []
        reading = _Reading(split=split, samples=self._source.samples(split, resumed), seen=seen, consumed=resumed, resumed=resumed)
        total = self._source.count(split)
        parts: list[_Part] = []
        while not reading.last:
            part = self._convert_part(reading, len(done) + len(parts), total)
            _write(self._staging / _part_name(split, len(done) + len(parts)), part.to_json())
            parts.append(part)
        if total not in (None, reading.consumed):
            raise ValueError(f"{split} of the source has {reading.consumed} samples, and its files say {total}; they are damaged")
        return parts

    def _convert_part(self, reading: "_Reading", index: int, total: int | None) -> _Part:
        """Writes the next shard of a split: a full one, or the split's last samples."""
        path = self._staging / _shard_name(reading.split, index)
        writer = ShardWriter(path, self._source.targets, holds_texts=self._texts is not None)
        bad: list[BadSample] = []
        dropped: list[str] = []
        sizes: Counter[str] = Counter()
        rows = transparent = cut = 0
        try:
            while not reading.last and (not rows or writer.size_bytes < self._shard_bytes):
                group: list[_Good] = []
                while len(group) < ROWS_PER_GROUP and not reading.last:
                    place = reading.consumed
                    batch, left_out = self._corrected(reading.split, reading.next(ROWS_PER_GROUP - len(group)))
                    dropped += left_out.values()
                    offsets = (offset for offset in range(len(batch) + len(left_out)) if offset not in left_out)
                    for offset, sample, verdict in zip(offsets, batch, self._check(reading.split, batch), strict=True):
                        if isinstance(verdict, _Good):
                            group.append(verdict)
                            sizes[verdict.facts.size] += 1
                            transparent += verdict.facts.has_alpha
                            cut += isinstance(verdict.facts, TextFacts) and verdict.facts.was_cut
                        else:
                            bad.append(BadSample(key=sample.key, reason=verdict, split=reading.split, sample_id=place + offset))
                            self._quarantine.add(sample.key, verdict, reading.split, place + offset)
                    self._report(reading.split, reading.consumed, total, reading.resumed)
                if group:
                    self._write_group(writer, group)
                    rows += len(group)
            shard = writer.close()
        except BaseException:
            writer.abort()
            raise
        if not rows:
            path.unlink()
        return _Part(
            split=reading.split,
            shard=shard if rows else None,
            consumed=reading.consumed,
            last=reading.last,
            bad=tuple(bad),
            image_sizes=dict(sorted(sizes.items())),
            transparent=transparent,
            dropped=tuple(dropped),
            cut=cut,
        )

    def _corrected(self, split: str, batch: list[Sample]) -> tuple[list[Sample], dict[int, str]]:
        """The samples that corrections leave, with their corrected values; and place in the batch -> key of those that they drop."""
        if self._corrections is None:
            return batch, {}
        left: list[Sample] = []
        dropped: dict[int, str] = {}
        for place, sample in enumerate(batch):
            if (values := self._applying.values(split, sample.key, sample.values)) is None:
                dropped[place] = sample.key
            else:
                left.append(replace(sample, values=values))
        return left, dropped

    def _write_group(self, writer: ShardWriter, group: Sequence["_Good"]) -> None:
        targets = self._source.targets
        texts = [good.facts for good in group if isinstance(good.facts, TextFacts)]
        writer.write_group(
            [text.stored for text in texts] or [good.sample.data for good in group],
            {target.name: np.stack([good.values[place] for good in group]) for place, target in enumerate(targets)},
            [good.sample.key for good in group],
            [hashlib.sha256(good.sample.data).digest() for good in group],
            [(text.length, text.text) for text in texts],
        )

    def _check(self, split: str, batch: list[Sample]) -> Iterator["_Good | str"]:
        """For each sample its stored form, or the reason to leave it out."""
        unknown = [sample for sample in batch if sample.refusal is None and not self._is_known(sample)]
        decoded = dict(zip(map(id, unknown), self._checker.check([sample.data for sample in unknown]), strict=True))
        for sample in batch:
            if sample.refusal is not None:
                verdict: Facts | Refusal = Refusal(reason=sample.refusal)
            elif id(sample) in decoded:
                verdict = decoded[id(sample)]
            else:
                verdict = looked_at(sample.data, max_image_pixels=self._max_image_pixels)
            if isinstance(verdict, Refusal):
                yield verdict.reason
                continue
            try:
                values = checked_values(self._source.targets, sample.values, may_be_unknown=split == UNLABELLED)
            except ValueError as error:
                yield f"bad label: {error}"
            else:
                yield _Good(sample=sample, values=values, facts=verdict)

    def _is_known(self, sample: Sample) -> bool:
        return bool(self._known) and hashlib.sha256(sample.data).digest() in self._known

    def _stored_keys(self, split: str, done: list[_Part]) -> set[str]:
        shards = tuple(part.shard for part in done if part.shard is not None)
        return {key for key, _, _ in self._stored(split, shards).content()} if shards else set()

    def _stored(self, split: str, shards: tuple[ShardInfo, ...]) -> Split:
        files = [(shard, self._staging / shard.name) for shard in shards]
        return Split(split, files, self._source.targets, holds_texts=self._texts is not None)

    def _report(self, split: str, done: int, total: int | None, resumed: int) -> None:
        if self._on_progress is not None:
            self._on_progress(Progress(split=split, done=done, total=total, bad=self._quarantine.count, resumed=resumed, unit=self._unit))

    def _finish(self, parts: list[_Part]) -> Manifest:
        targets = self._source.targets
        fingerprint = Fingerprint(targets, self._texts.identity if self._texts is not None else ())
        splits: dict[str, SplitInfo] = {}
        stored: dict[str, Split] = {}
        repeats = Repeats()
        for name in self._splits:
            shards = tuple(part.shard for part in parts if part.split == name and part.shard is not None)
            if not shards:
                raise ValueError(
                    f"the source has no usable {name} {self._unit.removesuffix('s')}; "
                    + (
                        "hold out more: --data.test-fraction (of `dataio.convert`: --test-fraction)"
                        if name == "test"
                        else "look at the reasons above"
                    )
                )
            split = self._stored(name, shards)
            for key, values, sha256 in split.content():
                fingerprint.add(name, key, values, sha256)
                repeats.add(name, values, sha256)
            if name == "train":
                targets = tuple(measured(target, split) for target in targets)
            splits[name], stored[name] = SplitInfo(count=split.count, shards=shards), split
        sizes: Counter[str] = Counter()
        for part in parts:
            sizes.update(part.image_sizes)
        manifest = Manifest(
            targets=targets,
            splits=splits,
            fingerprint=fingerprint.hexdigest(),
            image_sizes=dict(sorted(sizes.items())) if self._texts is None else {},
            quarantined=self._quarantine.count,
            source=self._source.kind,
            identity=self._identity,
            texts=self._text_info(sizes, sum(part.cut for part in parts)),
        )
        _write(self._staging / QUARANTINE_NAME, "".join(record.to_line() for part in parts for record in part.bad))
        self._tell_of(stored, repeats, sum(part.transparent for part in parts))
        _write(self._staging / RULES_NAME, _RULES)
        _write(self._staging / MANIFEST_NAME, manifest.to_json())
        return manifest

    def _text_info(self, lengths: Counter[str], cut: int) -> TextInfo | None:
        if self._texts is None:
            return None
        assert isinstance(self._checker, TextChecker)
        return TextInfo(
            tokenizer_sha256=self._texts.sha256,
            vocabulary=self._checker.vocabulary,
            max_tokens=self._texts.max_tokens,
            too_long=self._texts.too_long,
            lengths=dict(sorted(lengths.items(), key=lambda item: int(item[0]))),
            cut=cut,
        )

    def _tell_of(self, splits: dict[str, Split], repeats: Repeats, transparent: int) -> None:
        """Writes down what was found besides the samples."""
        targets = self._source.targets
        pairs = repeats.pairs(labels=is_single_label(targets))
        lines = lines_of(pairs, lambda split, rows: splits[split].keys(rows))
        reading = Reading(
            held_out=dict(self._source.held_out),
            not_read=self._source.ignored,
            class_counts=_class_counts(splits, targets),
            transparent=transparent,
            corrected=self._corrections.counts if self._corrections is not None else {},
            copies=dict(Counter(pair.split for pair in pairs if pair.is_copy)),
            contradictory=sum(pair.differs for pair in pairs),
            copied=examples_of([line for pair, line in zip(pairs, lines, strict=True) if pair.is_copy]),
            contradicted=examples_of([line for pair, line in zip(pairs, lines, strict=True) if pair.differs]),
        )
        _write(self._staging / READING_NAME, reading.to_json())
        if lines:
            _write(self._staging / REPEATS_NAME, repeats_text(lines))


def _class_counts(splits: dict[str, Split], targets: Sequence[Target]) -> dict[str, tuple[int, ...]]:
    """Samples of each class of the only target that has classes; empty if there are several such targets, or none."""
    with_classes = [target for target in targets if target.classes]
    if len(with_classes) != 1:
        return {}
    (target,) = with_classes
    counts = {}
    for name, split in splits.items():
        found = np.zeros(len(target.classes), np.int64)
        for values in split.values(target.name):
            if target.kind == "label":
                found += np.bincount(values[values >= 0], minlength=len(found))
            else:
                found += (values == 1).sum(0)
        counts[name] = tuple(found.tolist())
    return counts


@dataclass(frozen=True, kw_only=True, slots=True)
class _Good:
    """A sample to be stored."""

    sample: Sample
    values: list[np.ndarray]
    """One for each target, in order."""
    facts: Facts


class _Reading:
    """Reads a split of the source and keeps its position."""

    def __init__(self, *, split: str, samples: Iterator[Sample], seen: set[str], consumed: int, resumed: int) -> None:
        self.split, self.consumed, self.resumed, self.last = split, consumed, resumed, False
        self._samples, self._seen = samples, seen

    def next(self, wanted: int) -> list[Sample]:
        """The next `wanted` samples, or all that are left, with unique keys."""
        batch = [_named(sample, unique(sample.key, self._seen)) for sample in itertools.islice(self._samples, wanted)]
        self.consumed += len(batch)
        self.last = len(batch) < wanted
        return batch


def _named(sample: Sample, key: str) -> Sample:
    return sample if key == sample.key else replace(sample, key=key)


def checked_values(targets: Sequence[Target], given: Sequence[Any], *, may_be_unknown: bool) -> list[np.ndarray]:
    """A sample's values in stored form. Raises ValueError for a value that does not fit its kind, or if none is known but one must be."""
    assert len(targets) == len(given), f"a source of {len(targets)} targets gives {len(given)} values"
    is_only = is_single_label(targets)
    values = []
    for target, value in zip(targets, given, strict=True):
        try:
            values.append(value_of(target, value))
        except ValueError as error:
            raise ValueError(str(error) if is_only else f"{target.name}: {error}") from None
    if not may_be_unknown and not any(map(is_known, targets, values)):
        raise ValueError(f"{given[0]} is not in 0..{len(targets[0].classes) - 1}" if is_only else "no target is known")
    return values


def measured(target: Target, train: Split) -> Target:
    """A number target with its mean and (population) standard deviation over the training split; other kinds unchanged.

    Both are sums rounded once (math.fsum), so they do not depend on the machine. Raises ValueError for a target without any known value.
    """

    def known() -> Iterator[np.ndarray]:
        return (values[~np.isnan(values)].astype(np.float64) for values in train.values(target.name))

    if target.kind != "number":
        if not any(is_known(target, values) for values in train.values(target.name)):
            raise ValueError(f"no training sample has a value of the target {target.name!r}; leave it out, or give it one")
        return target
    count = sum(len(values) for values in known())
    if not count:
        raise ValueError(f"no training sample has a value of the target {target.name!r}; leave it out, or give it one")
    mean = math.fsum(itertools.chain.from_iterable(known())) / count
    variance = math.fsum(itertools.chain.from_iterable((values - mean) ** 2 for values in known())) / count
    return replace(target, mean=mean, std=math.sqrt(variance) or 1.0)  # a constant is learned as 0


def _publish(staging: Path, dest: Path) -> None:
    """Renames the complete staging folder to `dest`, replacing what is there; then deletes the sidecar files, which are useless now."""
    _sync_folder(staging)
    if dest.exists():
        old = dest.with_name(f"{dest.name}.old-{os.getpid()}")
        dest.rename(old)
        staging.rename(dest)
        shutil.rmtree(old) if old.is_dir() and not old.is_symlink() else old.unlink()
    else:
        staging.rename(dest)
    for path in [*dest.glob("*.part.json"), dest / _STATE_NAME]:
        path.unlink()
    _sync_folder(dest)
    _sync_folder(dest.parent)


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Locks `folder` against other conversions, creating it if needed. The kernel releases the lock when the process ends in any way."""
    while True:
        with contextlib.suppress(FileExistsError):  # mkdir's own exist_ok checks again, and fails if the folder was removed since
            folder.mkdir()
        try:
            descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        except FileNotFoundError:  # another conversion published or removed it meanwhile
            continue
        try:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX)
            except OSError as error:
                if error.errno not in (
                    errno.ENOSYS,
                    errno.ENOTSUP,
                    errno.ENOLCK,
                ):  # a file system without locks: here the user must avoid two conversions at once
                    raise
            try:
                held = os.path.samestat(os.fstat(descriptor), folder.stat())
            except FileNotFoundError:
                held = False
            if held:
                yield
                return
            # else another conversion finished and renamed it while this one waited
        finally:
            os.close(descriptor)


def _shard_name(split: str, index: int) -> str:
    return f"{split}-{index:05d}.parquet"


def _part_name(split: str, index: int) -> str:
    return f"{split}-{index:05d}.part.json"


def _write(path: Path, text: str) -> None:
    """Writes atomically: the file holds all of `text`, or does not exist."""
    new = path.with_name(path.name + ".new")
    with open(new, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    new.rename(path)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


# Command line


def main(arguments: list[str] | None = None, *, prog: str = "python -m dataio.convert") -> int:
    """Runs `python -m dataio.convert`. Exit status: 0 done, 1 failed (a full disk), 2 a wrong setting or source, 130 interrupted."""
    options = _parser(prog).parse_args(arguments)
    started = time.monotonic()
    worked = False
    try:
        asked = DataConfig(tokenizer=options.tokenizer, max_tokens=options.max_tokens, too_long=options.too_long)
        texts = text_form(asked)
        source: Source = open_source(
            options.source,
            root=options.root.expanduser(),
            test_fraction=options.test_fraction,
            classes=tuple(name.strip() for name in options.classes.split(",")) if options.classes else None,
            validation_fraction=options.validation_fraction,
            targets=options.targets,
            image_column=options.image_column,
            label_column=options.label_column,
            text_column=options.text_column,
            holds_texts=texts is not None,
            corrections=options.corrections,
        )
        if options.sample is not None and options.corrections:
            raise ValueError(f"--corrections {options.corrections} is about samples of which --sample may leave out some; give one of them")
        if options.sample is not None:
            held_out = options.sample // 4 if options.sample_test is None else options.sample_test
            sizes = {split: options.sample if split == "train" else held_out for split in source.splits()}
            source = Balanced(source, sizes=sizes, seed=options.seed)
        elif options.sample_test is not None:
            raise ValueError("--sample-test goes with --sample; give both")
        with _display() as show:

            def on_progress(progress: Progress) -> None:
                nonlocal worked
                worked = True
                show(progress)

            manifest = convert(
                source,
                options.dest,
                max_bad_fraction=options.max_bad_fraction,
                max_image_pixels=options.max_image_pixels,
                on_progress=on_progress,
                force=options.force,
                threads=options.threads,
                texts=texts,
            )
    except (ValueError, OSError) as error:
        tell(f"error: {error}", sys.stderr)
        return 2 if isinstance(error, ValueError) else 1
    except KeyboardInterrupt:
        tell("stopped; run the same command again to go on after the last complete shard", sys.stderr)
        return 130
    if not worked:
        tell(f"{options.dest} is there already, made from this source with these settings", sys.stdout)
    dataset = open_dataset(options.dest)
    for line in warnings(manifest, dataset.reading, dataset.where):
        tell(f"warning: {line}", sys.stderr)
    tell(_summary(dataset, manifest, time.monotonic() - started), sys.stdout)
    return 0


def _parser(prog: str) -> argparse.ArgumentParser:
    defaults = DataConfig()
    parser = argparse.ArgumentParser(
        prog=prog,
        description="Converts labelled images or texts into a folder that training reads. Stopped, it goes on when run again.",
    )
    parser.add_argument("source", help="cifar10, an archive, a table, a folder of Parquet or IDX files, or of class folders")
    parser.add_argument("dest", type=Path, help="the folder to make")
    parser.add_argument("--root", type=Path, default=Path(defaults.root), help="where a download goes (%(default)s)")
    parser.add_argument(
        "--test-fraction", type=float, default=defaults.test_fraction, help="held out where there is no test split (%(default)s)"
    )
    parser.add_argument(
        "--validation-fraction",
        type=float,
        default=defaults.validation_fraction,
        help="held out of train for validation where there is no such split (%(default)s)",
    )
    parser.add_argument("--targets", default=defaults.targets, help="what is learnt: NAME[:label|labels|number],...; else the label alone")
    parser.add_argument(
        "--image-column", default="", help="column of a table or of Parquet files with the images; found by its usual names"
    )
    parser.add_argument("--label-column", default="", help="column with the one label to learn; found by its usual names")
    parser.add_argument(
        "--tokenizer", default="", metavar="FILE", help="the model's tokenizer.json, or a folder with it: the source holds texts then"
    )
    parser.add_argument("--text-column", default="", help="column with the texts, or two for pairs of texts; found by its usual names")
    parser.add_argument("--max-tokens", type=int, default=defaults.max_tokens, help="most tokens of a text (%(default)s)")
    parser.add_argument(
        "--too-long", choices=get_args(TooLong), default=defaults.too_long, help="cut longer texts, or refuse them (%(default)s)"
    )
    parser.add_argument(
        "--max-bad-fraction", type=float, default=defaults.max_bad_fraction, help="bad images tolerated, of all (%(default)s)"
    )
    parser.add_argument("--max-image-pixels", type=int, default=defaults.max_image_pixels, help="larger images are bad (%(default)s)")
    parser.add_argument(
        "--corrections", default="", metavar="FILE", help="CSV of key,action,label: what to relabel or drop (docs/labels.md)"
    )
    parser.add_argument("--classes", help="class names in order, separated by commas, in place of the source's")
    parser.add_argument("--sample", type=int, metavar="N", help="take N training images only, the same number of each class")
    parser.add_argument("--sample-test", type=int, metavar="M", help="and M test images (N/4)")
    parser.add_argument("--seed", type=int, default=0, help="of the sample (%(default)s)")
    parser.add_argument("--threads", type=int, default=max(1, min(4, len(os.sched_getaffinity(0)) - 1)), help="that decode (%(default)s)")
    parser.add_argument("--force", action="store_true", help="replace DEST")
    return parser


def _summary(dataset: Dataset, manifest: Manifest, seconds: float) -> str:
    bad = f" (see {QUARANTINE_NAME})" if manifest.quarantined else ""
    size = f"{dataset.size_bytes / 1e6:.1f} MB, {seconds:.1f} s"
    return f"{described(manifest, dataset.reading)}{bad}; {size}\nfingerprint {manifest.fingerprint}"


@contextlib.contextmanager
def _display() -> Iterator[Callable[[Progress], None]]:
    """Shows a bar per split on a terminal, else a plain line every few seconds."""
    if not sys.stderr.isatty():
        yield _plain_lines()
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
    from rich.progress import Progress as Bars

    timing = (TimeElapsedColumn(), TimeRemainingColumn())
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[bad]}"), *timing)
    with Bars(*columns, console=Console(stderr=True)) as bars:
        tasks: dict[str, Any] = {}

        def show(progress: Progress) -> None:
            if progress.split not in tasks:
                tasks[progress.split] = bars.add_task(progress.split, total=progress.total, bad="")
            bad = f"{progress.bad} bad" if progress.bad else ""
            bars.update(tasks[progress.split], completed=progress.done, total=progress.total, bad=bad)

        yield show


def _plain_lines(every_seconds: float = 5.0) -> Callable[[Progress], None]:
    shown = time.monotonic()

    def show(progress: Progress) -> None:
        nonlocal shown
        finished = progress.done == progress.total
        if not finished and time.monotonic() - shown < every_seconds:
            return
        shown = time.monotonic()
        tell(progress.describe(), sys.stderr)

    return show


if __name__ == "__main__":
    leaving.by(main)
