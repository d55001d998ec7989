"""Converts a source into a folder of Parquet shards with checked images, or with texts made into tokens; the manifest is written last.

Called by the command (dataio.convert) and by dataio.prepared. The work happens in DEST.partial, shard after shard. Each complete shard is
recorded next to it, so a stopped conversion continues after its last complete shard. DEST appears complete, by one rename. The codec judges
the samples, dataio.values the values of targets, and sources reads both.
"""

import errno
import hashlib
import itertools
import json
import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Sequence, Set
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from dataio.codecs.codec import Facts, Refusal
from dataio.codecs.make import looked_at, make_checker
from dataio.codecs.text.form import TextForm
from dataio.codecs.text.tokens import Checker as TextChecker
from dataio.codecs.text.tokens import TextFacts
from dataio.known_good import RULES_NAME
from dataio.manifest import MANIFEST_NAME, Fingerprint, Manifest, ShardInfo, SplitInfo, TextInfo, fault_of_splits
from dataio.parquet import QUARANTINE_NAME, ROWS_PER_GROUP, ShardWriter, Split, open_dataset
from dataio.quarantine import BadSample, Quarantine
from dataio.reading import READING_NAME, REPEATS_NAME, Reading, Repeats, examples_of, lines_of, repeats_text
from dataio.schema import SPLITS, UNLABELLED, fault_of_targets, is_single_label
from dataio.sources import Applying, Corrected, Sample, Source, SourceError, unique
from dataio.staging import STATE_NAME, locked, publish, write_text
from dataio.values import checked_values, class_counts, measured

SHARD_BYTES = 64 << 20
SMALL_SOURCE = 5_000  # samples; a source as small as this is read to its end, so that the error about bad samples can count them all
RULES = "2"
"""Of what is usable; parts that an attempt by other rules left are made again."""
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
    with locked(staging):
        if dest.exists() and not force:
            if not any(staging.iterdir()):
                staging.rmdir()
            existing = intact(dest)
            if existing is None or existing.identity not in identities:
                raise ValueError(
                    f"{dest} exists and is not this source, converted with these settings; name another folder, remove it, "
                    f"or add --force to replace it"
                )
            check_limit(dest, existing, max_bad_fraction)
            return existing
        try:
            manifest = _Conversion(
                source, staging, identities[0], max_bad_fraction, max_image_pixels, on_progress, shard_bytes, threads, known(), texts
            ).run()
            publish(staging, dest)
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


def intact(dest: Path) -> Manifest | None:
    """The manifest of a converted folder if all of its files are there."""
    try:
        return open_dataset(dest).manifest
    except (ValueError, OSError):
        return None


def check_limit(dest: Path, manifest: Manifest, max_bad_fraction: float) -> None:
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
        state = self._staging / STATE_NAME
        kept: list[_Part] = []
        names = {STATE_NAME}
        if state.is_file() and state.read_text() == f"{self._identity} {RULES}":
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
        write_text(state, f"{self._identity} {RULES}")
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
            write_text(self._staging / _part_name(split, len(done) + len(parts)), part.to_json())
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
        write_text(self._staging / QUARANTINE_NAME, "".join(record.to_line() for part in parts for record in part.bad))
        self._tell_of(stored, repeats, sum(part.transparent for part in parts))
        write_text(self._staging / RULES_NAME, RULES)
        write_text(self._staging / MANIFEST_NAME, manifest.to_json())
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
            class_counts=class_counts(splits, targets),
            transparent=transparent,
            corrected=self._corrections.counts if self._corrections is not None else {},
            copies=dict(Counter(pair.split for pair in pairs if pair.is_copy)),
            contradictory=sum(pair.differs for pair in pairs),
            copied=examples_of([line for pair, line in zip(pairs, lines, strict=True) if pair.is_copy]),
            contradicted=examples_of([line for pair, line in zip(pairs, lines, strict=True) if pair.differs]),
        )
        write_text(self._staging / READING_NAME, reading.to_json())
        if lines:
            write_text(self._staging / REPEATS_NAME, repeats_text(lines))


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


def _shard_name(split: str, index: int) -> str:
    return f"{split}-{index:05d}.parquet"


def _part_name(split: str, index: int) -> str:
    return f"{split}-{index:05d}.part.json"
