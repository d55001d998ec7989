"""A source with the corrections of its labels that a person has decided (`data.corrections`): a CSV file that a command proposes, and that
a person edits.

    key,action,label
    cats/17.png,relabel,dog
    cats/18.png,drop,
    cats/19.png,keep,

The key is a sample's name as predictions.parquet and quarantine.jsonl have it. `relabel` gives it another label, `drop` leaves it out,
`keep` changes nothing. A column `split` says which split is meant, where several have the key. Data with several targets have, instead of
`label`, a column for each target that is corrected; there an empty cell leaves the value as it is. Further columns are for the reader.

`open_source` wraps a source in it. The file is read as if an attacker had written it (hostile.py). Convert applies the changes, once a key
is as unique as it will be stored, and asks at the end whether all rows were met; of a source of files both are known before. A sample stays
in the split that it had: labels that change later would otherwise move samples between training and test.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, NoReturn, get_args

import numpy as np

from dataio.foreign import MAX_CORRECTIONS_BYTES
from dataio.schema import LABEL, SPLITS, Target
from dataio.sources.cells import NUMBER, SEPARATOR, SPLIT_COLUMN, UNKNOWN_LABELS
from dataio.sources.hostile import rows_of_text, text_bytes
from dataio.sources.source import HasFiles, Sample, Source, SourceError, SourceFile, hashed
from dataio.sources.splits import split_named
from dataio.sources.table import DELIMITERS
from dataio.sources.targets import is_finite_float32

Action = Literal["keep", "relabel", "drop"]
ACTIONS: tuple[Action, ...] = get_args(Action)
KEY, ACTION = "key", "action"
_SHOWN_CLASSES = 20
_KEEP = object()
"""In place of a value: it stays as it is."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Change:
    """A row of the file."""

    line: int
    key: str
    split: str
    """"" where the row does not say."""
    action: Action
    values: tuple[Any, ...] = ()
    """Of `relabel`: one for each target, as in source.Sample, or _KEEP."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Corrections:
    """The content of the file."""

    path: str
    changes: Mapping[str, tuple[Change, ...]]
    """By key."""

    @property
    def identity(self) -> str:
        """A hash of what is changed; "" if nothing is. Rows that keep, their order, and the file's name play no part in it."""
        told = [
            (change.key, change.split, change.action, [_told(value) for value in change.values])
            for change in self._all
            if change.action != "keep"
        ]
        return hashlib.sha256(json.dumps(sorted(told)).encode()).hexdigest() if told else ""

    @property
    def counts(self) -> dict[str, int]:
        """Samples that are relabelled, and that are dropped; without zeros."""
        found = {"relabelled": "relabel", "dropped": "drop"}
        counted = {word: sum(change.action == action for change in self._all) for word, action in found.items()}
        return {word: count for word, count in counted.items() if count}

    @property
    def _all(self) -> Iterator[Change]:
        return (change for changes in self.changes.values() for change in changes)


class Applying:
    """Applies corrections to the samples of a source, split after split, and knows which rows were met."""

    def __init__(self, corrections: Corrections | None) -> None:
        self._corrections = corrections
        self._met: dict[int, str] = {}  # line -> split

    def met(self, split: str, key: str) -> Change | None:
        """The row about this sample, which counts as met. Raises SourceError if the row is about one of another split too."""
        if self._corrections is None:
            return None
        for change in self._corrections.changes.get(key, ()):
            if change.split not in ("", split):
                continue
            before = self._met.setdefault(change.line, split)
            if before != split:
                _refuse(
                    self._corrections.path,
                    change.line,
                    KEY,
                    key,
                    f"names a sample of {before} and one of {split}; say which one is meant in a column {SPLIT_COLUMN}, or write a row for "
                    "each",
                )
            return change
        return None

    def values(self, split: str, key: str, values: tuple[Any, ...]) -> tuple[Any, ...] | None:
        """The values of a sample as corrected; None if it is dropped."""
        change = self.met(split, key)
        if change is None or change.action == "keep":
            return values
        if change.action == "drop":
            return None
        return tuple(old if new is _KEEP else new for old, new in zip(values, change.values, strict=True))

    def finish(self) -> None:
        """Raises SourceError if a row is about no sample that there was."""
        if self._corrections is None:
            return
        for key, changes in self._corrections.changes.items():
            for change in changes:
                if change.line not in self._met:
                    where = f" in {change.split}" if change.split else ""
                    _refuse(
                        self._corrections.path,
                        change.line,
                        KEY,
                        key,
                        f"names no sample{where} of the data; write the key as predictions.parquet or the report has it, or remove the row",
                    )


class Corrected:
    """A source with corrections, which convert applies (`Applying`). Its samples come as the source has them: a key is only unique where
    all keys before it are known."""

    def __init__(self, source: Source, corrections: Corrections) -> None:
        self.source, self.corrections = source, corrections
        self.kind, self.ignored, self.targets, self.classes = source.kind, source.ignored, source.targets, source.classes
        changed = corrections.identity
        self.identities = tuple(hashed(identity, "corrections", changed) if changed else identity for identity in source.identities)
        self.identity = self.identities[0]

    @property
    def held_out(self) -> Mapping[str, float]:
        return self.source.held_out

    def splits(self) -> tuple[str, ...]:
        return self.source.splits()

    def count(self, split: str) -> int | None:
        """With those that are dropped."""
        return self.source.count(split)

    def samples(self, split: str, start: int = 0) -> Iterator[Sample]:
        """Not corrected yet."""
        return self.source.samples(split, start)


class CorrectedFiles(Corrected):
    """A source of files with corrections, whose keys are known without reading them."""

    def __init__(self, source: Source, corrections: Corrections) -> None:
        """SourceError if a row names no sample."""
        super().__init__(source, corrections)
        assert isinstance(source, HasFiles)
        applying = Applying(corrections)
        self._files: dict[str, list[SourceFile]] = {}
        for split in source.splits():
            seen: set[str] = set()
            self._files[split] = []
            for file in source.files(split):
                key = unique(file.key, seen)
                if (values := applying.values(split, key, file.values)) is not None:
                    self._files[split].append(replace(file, values=values))
        applying.finish()

    def files(self, split: str) -> list[SourceFile]:
        """Corrected, without those that are dropped."""
        return self._files[split]


def with_corrections(source: Source, path: str) -> Source:
    """The source with the corrections of the file. SourceError that names the line of a row that cannot be applied."""
    corrections = read_corrections(path, source.targets, source.splits())
    return CorrectedFiles(source, corrections) if isinstance(source, HasFiles) else Corrected(source, corrections)


def unique(key: str, seen: set[str]) -> str:
    """The key under which a sample is stored: one that came before gets "#2", "#3", ... Adds it to `seen`."""
    stored, number = key, 1
    while stored in seen:
        number += 1
        stored = f"{key}#{number}"
    seen.add(stored)
    return stored


# --- the file -------------------------------------------------------------------------------------------------------------------------


def read_corrections(path: str, targets: Sequence[Target], splits: Sequence[str]) -> Corrections:
    """Reads the file. SourceError for what cannot be read, and for a row that breaks a rule."""
    where = Path(path).expanduser()
    try:
        content = text_bytes(where, MAX_CORRECTIONS_BYTES)
    except FileNotFoundError:
        raise SourceError(
            f"data.corrections={path!r:.300} does not exist; name a CSV file with the columns {KEY}, {ACTION}, {LABEL}"
        ) from None
    rows = rows_of_text(path, content, DELIMITERS.get(where.suffix.lower(), ","))
    line, header = next(rows, (1, []))
    names = [name.strip() for name in header]
    columns = _columns(path, line, names, targets)
    changes: dict[str, tuple[Change, ...]] = {}
    for line, cells in rows:
        if len(cells) != len(names):
            raise SourceError(
                f"{path}, line {line}: there are {len(cells)} cells, the header names {len(names)} columns; put a cell that holds the "
                "delimiter in quotation marks"
            )
        change = _change(path, line, cells, names, columns, targets, splits)
        others = changes.get(change.key, ())
        for other in others:
            if "" in (other.split, change.split) or other.split == change.split:
                _refuse(path, line, KEY, change.key, f"is in line {other.line} already; leave one row for a sample")
        changes[change.key] = (*others, change)
    return Corrections(path=path, changes=changes)


def _columns(path: str, line: int, names: Sequence[str], targets: Sequence[Target]) -> dict[int, int]:
    """Number of a target -> the column that corrects it."""
    wanted = f"{KEY}, {ACTION}, {LABEL}" if len(targets) == 1 else f"{KEY}, {ACTION} and names of targets ({_listed(targets)})"
    found = ", ".join(map(repr, names))
    told = f"its columns are {found[:300]}"
    if twice := [name for number, name in enumerate(names) if name in names[:number]]:
        raise SourceError(f"{path}, line {line}: there are two columns named {twice[0]!r:.80}; name each column once")
    for name in (KEY, ACTION):
        if name not in names:
            raise SourceError(f"{path}, line {line}: there is no column {name!r}; corrections have {wanted}, separated by commas; {told}")
    columns = {number: names.index(target.name) for number, target in enumerate(targets) if target.name in names}
    if len(targets) == 1 and LABEL in names:
        columns = {0: names.index(LABEL)}
    if not columns:
        raise SourceError(f"{path}, line {line}: no column has the labels; corrections have {wanted}; {told}")
    return columns


def _listed(targets: Sequence[Target]) -> str:
    return ", ".join(target.name for target in targets)[:300]


def _change(
    path: str,
    line: int,
    cells: Sequence[str],
    names: Sequence[str],
    columns: Mapping[int, int],
    targets: Sequence[Target],
    splits: Sequence[str],
) -> Change:
    key, action_cell = cells[names.index(KEY)], cells[names.index(ACTION)]
    split_cell = cells[names.index(SPLIT_COLUMN)].strip() if SPLIT_COLUMN in names else ""
    if not key:
        _refuse(path, line, KEY, key, "names no sample; write its key, or remove the row")
    action = next((action for action in ACTIONS if action == action_cell.strip().lower()), None)
    if action is None:
        _refuse(path, line, ACTION, action_cell, f"is no action; those are {', '.join(ACTIONS)}")
    split = split_named(split_cell) or ""
    if split_cell and split not in splits:
        known = ", ".join(name for name in SPLITS if name in splits)
        _refuse(path, line, SPLIT_COLUMN, split_cell, f"is no split of the data; those are {known}")
    if action != "relabel":
        return Change(line=line, key=key, split=split, action=action)
    is_only = len(targets) == 1
    values: list[Any] = [_KEEP] * len(targets)
    for number, column in columns.items():
        cell = cells[column].strip()
        if cell or is_only:
            values[number] = _value(path, line, names[column], cell, targets[number])
    if all(value is _KEEP for value in values):
        _refuse(path, line, ACTION, action_cell, "gives no value; write one in a target's column, or make it keep")
    return Change(line=line, key=key, split=split, action=action, values=tuple(values))


def _value(path: str, line: int, column: str, cell: str, target: Target) -> Any:
    """A cell as a value of the target, as in source.Sample."""
    match target.kind:
        case "label":
            return target.classes.index(_class(path, line, column, cell, target))
        case "labels":
            if cell == UNKNOWN_LABELS:
                return target.blank(1)[0]
            row = np.zeros(len(target.classes), target.dtype)
            for name in cell.split(SEPARATOR) if cell else ():
                row[target.classes.index(_class(path, line, column, name.strip(), target))] = 1
            return row
        case "number":
            if not NUMBER.fullmatch(cell) or not is_finite_float32(float(cell)):
                _refuse(path, line, column, cell, "is not a number of at most 3.4e38; write it like -1.5, or drop the sample")
            return float(cell)


def _class(path: str, line: int, column: str, name: str, target: Target) -> str:
    if name not in target.classes:
        more = ", ..." if len(target.classes) > _SHOWN_CLASSES else ""
        known = ", ".join(each[:60] for each in target.classes[:_SHOWN_CLASSES])
        _refuse(path, line, column, name, f"is no class of the data; those are {known}{more}")
    return name


def _told(value: Any) -> Any:
    """A value as JSON."""
    if value is _KEEP:
        return None
    return value.tolist() if isinstance(value, np.ndarray) else value


def _refuse(path: str, line: int, column: str, value: str, rule: str) -> NoReturn:
    raise SourceError(f"{path}, line {line}, column {column!r}: {value!r:.80} {rule}")
