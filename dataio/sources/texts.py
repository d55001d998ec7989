"""Reads texts: tables (CSV, TSV), JSON lines and Parquet files with a row a text, and folders of .txt files with a folder a class.

`data.text_column` names the column of the texts, or the two of pairs; other columns are targets (cells.py), a column `split` says which
split a row is of. In a folder the files' names say it: train.csv, test-00000-of-00002.parquet. A row's text may be anything: one that is
missing, or not UTF-8, is a sample that the conversion refuses. Files are read twice, for the targets and for the texts, and never held.
"""

import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dataio.config import text_columns_of
from dataio.foreign import MAX_ROW_BYTES, json_of, open_regular
from dataio.manifest import MANIFEST_NAME
from dataio.sources.cells import (
    SEPARATOR,
    SPLIT_COLUMN,
    TEXT_COLUMNS,
    UNKNOWN_LABELS,
    Cells,
    alike,
    chosen_columns,
    listed,
    split_of,
    typed,
)
from dataio.sources.columns import batches_of, metadata_names, open_parquet
from dataio.sources.folder import TextFolder
from dataio.sources.hostile import table_rows
from dataio.sources.huggingface import find_parquet
from dataio.sources.image_column import key_of_row
from dataio.sources.layout import find_layout, scan, split_meant
from dataio.sources.source import ACCEPTED_TEXTS, Options, Sample, Source, SourceError, identities_of, plan_of, stat_hash
from dataio.sources.splits import ALIASES, Rows, divide, recognised, strata
from dataio.sources.table import DELIMITERS
from dataio.sources.targets import values_at
from dataio.texts import BETWEEN

JSON_LINES = (".jsonl", ".ndjson")
PARQUET = ".parquet"
ROWS_AT_ONCE = 1024
_NAMED_SPLIT = re.compile(rf"({'|'.join(name for names in ALIASES.values() for name in names)})(?![A-Za-z])")


def open_texts(path: str, options: Options) -> Source:
    """Recognises the kind of a source of texts. SourceError that lists what is accepted and says what was found."""
    where = Path(path).expanduser()
    if not where.exists():
        raise SourceError(f"data.path={path!r} does not exist; of texts {ACCEPTED_TEXTS}")
    if where.is_file():
        if not is_row_file(where):
            raise SourceError(f"{where} is no file of texts; {ACCEPTED_TEXTS}")
        return Texts(where.parent, {"": [where]}, options)
    if (where / MANIFEST_NAME).exists():
        raise SourceError(f"{path} is converted already; read it as it is: --data.path {path}")
    if (where / "conversion.json").exists():
        raise SourceError(f"{path} is an unfinished conversion; run the same dataio.convert command again to finish it")
    if parquet := find_parquet(where):
        return Texts(where, parquet, options)
    if files := _tables_in(where):
        return Texts(where, files, options)
    tree = scan(where, is_text_file)
    layout = find_layout(tree, nested=not options.targets.endswith(":labels"))
    if layout is None:
        names = sorted(entry.name + "/" * entry.is_dir() for entry in where.iterdir())
        raise SourceError(f"data.path={path!r} is no data set of texts: it holds {listed(names) if names else 'nothing'}; {ACCEPTED_TEXTS}")
    return TextFolder(tree, layout, options)


def is_text_file(path: Path) -> bool:
    return path.suffix.lower() == ".txt"


def is_row_file(path: Path) -> bool:
    """Whether a file holds a text a row."""
    return path.suffix.lower() in (*DELIMITERS, *JSON_LINES, PARQUET)


def _tables_in(folder: Path) -> dict[str, list[Path]]:
    """Split's name in the file names -> tables and JSON lines directly in the folder; "" for the only one. Empty if there are none."""
    tables = sorted(path for path in folder.iterdir() if path.is_file() and path.suffix.lower() in (*DELIMITERS, *JSON_LINES))
    if len(tables) == 1:
        return {"": tables}
    files: dict[str, list[Path]] = {}
    for path in tables:
        match = _NAMED_SPLIT.match(path.name)
        files.setdefault(match[1] if match else split_meant(path.stem) or "", []).append(path)
    if unnamed := files.pop("", []):
        if files:  # a README's table, a sample submission: listed as not read
            return files
        raise SourceError(
            f"{folder} holds several tables, {unnamed[0].name} and {unnamed[1].name}; name the one to read, --data.path {unnamed[0]}, or "
            "name them by their splits: train.csv, test.csv"
        )
    return files


def read_texts(path: Path, text_column: str = "") -> Iterator[tuple[str, bytes, str | None]]:
    """Yields (key, text, refusal or None) of each row of a file, whatever else it holds: for texts whose labels are not known. SourceError
    for a file that cannot be read."""
    for row, (_, cells) in enumerate(rows_of(path, columns_meant(path, column_names(path), text_column))):
        sample = sample_of(key_of_row(None, path.stem, row), cells, ())
        yield sample.key, sample.data, sample.refusal


class Texts:
    """The rows of tables, JSON lines or Parquet files, in the order of files and rows. Keys are the file's name and the row."""

    kind = "texts"

    def __init__(self, folder: Path, files: Mapping[str, list[Path]], options: Options) -> None:
        """`files`: the name of a split, or "" -> its files."""
        train = files.get("train") or files.get("")
        if not train:
            raise SourceError(f"{folder} holds files for {', '.join(files)}, but none for training (train.csv, train-*.parquet)")
        by_split = {"train": train} | {split: files[name] for split, name in recognised(files).items() if split != "train"}
        self._files = [(path, split) for split, paths in by_split.items() for path in paths]
        read = {path for path, _ in self._files}
        self.ignored = tuple(
            sorted(str(path.relative_to(folder)) for path in folder.iterdir() if path.is_file() and is_row_file(path) and path not in read)
            if len(files) > 1 or "" not in files
            else ()
        )
        self._texts = columns_meant(train[0], column_names(train[0]), options.text_column)
        content, self._starts = _read(self._files, self._texts, options)
        columns = [typed(content, number) for number in range(len(content.asked))]
        self.targets = tuple(target for target, _ in columns)
        self._columns = [column for _, column in columns]
        self.classes = self.targets[0].classes
        self._keys = content.files
        stored = {split: np.flatnonzero(np.array(content.splits) == split) for split in dict.fromkeys(content.splits)}
        if "train" not in stored:
            raise SourceError(f"{train[0]} has no row of split train, but of {', '.join(stored)}; there must be texts to train with")
        self._plan = plan_of(stored, options)
        self._rows: dict[str, Rows] = stored
        if self._plan.held:
            own = stored["train"]
            divided = divide([self._keys[row] for row in own.tolist()], strata(self.targets[0], self._columns[0][own]), self._plan.held)
            self._rows = stored | {split: own[rows] for split, rows in divided.items()}
        self.identities = identities_of(stat_hash(folder, read), stored, options)
        self.identity = self.identities[0]

    @property
    def held_out(self) -> Mapping[str, float]:
        return self._plan.held

    def splits(self) -> tuple[str, ...]:
        return self._plan.splits

    def count(self, split: str) -> int | None:
        return len(self._rows[split])

    def samples(self, split: str, start: int = 0) -> Iterator[Sample]:
        wanted = self._rows[split][start:]
        for (path, _), first, end in zip(self._files, self._starts, [*self._starts[1:], len(self._keys)], strict=True):
            here = set(wanted[(wanted >= first) & (wanted < end)].tolist())
            if not here:
                continue
            last = max(here)
            for row, (_, cells) in enumerate(rows_of(path, self._texts), first):
                if row > last:
                    break
                if row in here:
                    yield sample_of(self._keys[row], cells, values_at(self.targets, self._columns, row))


def sample_of(key: str, cells: Sequence[Any], values: tuple[Any, ...]) -> Sample:
    """The text of a row, or of its pair of texts; with the reason to refuse it, if its cells hold none."""
    for cell in cells:
        if cell is not None and not isinstance(cell, str):
            return Sample(key=key, data=b"", values=values, refusal=f"no text: {type(cell).__name__} {cell!s:.60}")
        if cell is not None and BETWEEN in cell:
            return Sample(key=key, data=b"", values=values, refusal="undecodable: a NUL, which is in no text")
    return Sample(key=key, data=BETWEEN.encode().join(_bytes(cell or "") for cell in cells), values=values)


def _bytes(text: str) -> bytes:
    """As it was in its file, also where that was not UTF-8: the codec judges it."""
    try:
        return text.encode(errors="surrogateescape")
    except UnicodeEncodeError:  # half of a character, as JSON can say it
        return text.encode(errors="surrogatepass")


def _read(files: Sequence[tuple[Path, str]], texts: Sequence[str], options: Options) -> tuple[Cells, list[int]]:
    """The targets of all rows, and the number of each file's first row."""
    names = column_names(files[0][0])
    targets = [name for name in names if name not in (*texts, SPLIT_COLUMN)]
    content = Cells(path=files[0][0], asked=chosen_columns(files[0][0], targets, options))
    content.cells.extend([] for _ in content.asked)
    starts: list[int] = []
    same: dict[str, str] = {}  # one string object for all equal cells
    has_lists = [False] * len(content.asked)
    for path, split_of_file in files:
        starts.append(len(content.files))
        there = column_names(path)
        needed = (*texts, *(() if split_of_file == "unlabelled" else (target.name for target in content.asked)))
        if missing := [name for name in needed if name not in there]:
            raise SourceError(f"{path} lacks the column {missing[0]!r}; all files of a source need the same columns")
        wanted = [target.name for target in content.asked if target.name in there]
        has_split = len(files) == 1 and SPLIT_COLUMN in there
        columns = [*wanted, *([SPLIT_COLUMN] if has_split else [])] or texts
        for row, (line, cells) in enumerate(rows_of(path, columns)):
            split = split_of(path, line, str(cells[-1])) if has_split else split_of_file
            content.lines.append(line)
            content.files.append(key_of_row(None, path.stem, row))
            content.splits.append(split)
            for number, target in enumerate(content.asked):
                cell = cells[wanted.index(target.name)] if target.name in wanted else None
                has_lists[number] = has_lists[number] or isinstance(cell, list)
                text = None if split == "unlabelled" else _cell_text(path, line, target.name, cell)
                content.cells[number].append(None if text is None else same.setdefault(text, text))
    if not content.files:
        raise SourceError(f"{files[0][0]} has no row; a row a text is needed")
    for number, is_list in enumerate(has_lists):
        nothing = UNKNOWN_LABELS if is_list else ""
        content.cells[number][:] = [
            nothing if cell is None and split != "unlabelled" else cell
            for cell, split in zip(content.cells[number], content.splits, strict=True)
        ]
    return content, starts


def _cell_text(path: Path, line: int, column: str, cell: Any) -> str | None:
    """A target's cell as a table would have it; None for nothing."""
    match cell:
        case None:
            return None
        case bool():
            return "true" if cell else "false"
        case str():
            return cell.strip()
        case int():
            return str(cell)
        case float():
            text = repr(cell)
            return None if math.isnan(cell) else text if "." in text else text.replace("e", ".0e", 1)
        case list():
            items = [_cell_text(path, line, column, item) or "" for item in cell]
            if bad := [item for item in items if not item or SEPARATOR in item or item == UNKNOWN_LABELS]:
                raise SourceError(f"{path}, line {line}, column {column!r}: {bad[0]!r:.80} is no label; give it another name")
            return SEPARATOR.join(items)
    raise SourceError(f"{path}, line {line}, column {column!r}: {cell!s:.80} is no label, number or list of labels")


def columns_meant(where: object, names: Sequence[str], given: str) -> tuple[str, ...]:
    """Which of the columns `names` of the file `where` hold the texts: one, or two for pairs. SourceError if none does."""
    asked = text_columns_of(given)
    if asked:
        if missing := [name for name in asked if name not in names]:
            raise SourceError(f"data.text_column names {missing[0]!r}, which is no column of {where}; its columns are {listed(names)}")
        return asked
    found = next((name for name in TEXT_COLUMNS if name in names), None) or alike(names, TEXT_COLUMNS)
    if found is None:
        raise SourceError(
            f"{where} has no column {', '.join(TEXT_COLUMNS[:4])}, ...; its columns are {listed(names)}: --data.text-column NAME"
        )
    return (found,)


# --- the three kinds of files ---------------------------------------------------------------------------------------------------------


def column_names(path: Path) -> list[str]:
    """The columns of a file of texts. SourceError if it cannot be read, or names one twice."""
    match path.suffix.lower():
        case suffix if suffix in DELIMITERS:
            line, names = next(table_rows(path, DELIMITERS[suffix]), (1, []))
            names = [name.strip() for name in names]
        case suffix if suffix in JSON_LINES:
            line, first = next(_objects(path), (1, {}))
            names = list(first)
        case _:
            line = 0
            with open_parquet(path) as file:
                names = list(file.schema_arrow.names)
    if twice := [name for number, name in enumerate(names) if name in names[:number]]:
        raise SourceError(f"{path}, line {line}: there are two columns named {twice[0]!r}; name each column once")
    if not names:
        raise SourceError(f"{path} is empty; a row a text is needed")
    return names


def rows_of(path: Path, columns: Sequence[str]) -> Iterator[tuple[int, list[Any]]]:
    """Yields (line, cells of these columns) of each row, in order. A cell is None where there is nothing."""
    match path.suffix.lower():
        case suffix if suffix in DELIMITERS:
            return _table(path, DELIMITERS[suffix], columns)
        case suffix if suffix in JSON_LINES:
            return ((line, [row.get(name) for name in columns]) for line, row in _objects(path))
        case _:
            return _parquet(path, columns)


def _table(path: Path, delimiter: str, columns: Sequence[str]) -> Iterator[tuple[int, list[Any]]]:
    rows = table_rows(path, delimiter, errors="surrogateescape")
    _, header = next(rows, (1, []))
    names = [name.strip() for name in header]
    places = [names.index(name) for name in columns]
    for line, cells in rows:
        if len(cells) != len(names):
            raise SourceError(
                f"{path}, line {line}: there are {len(cells)} cells, the header names {len(names)} columns; "
                f"put a cell that holds the delimiter in quotation marks"
            )
        yield line, [cells[place] for place in places]


def _objects(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    try:
        with open_regular(path) as file:
            for line, raw in enumerate(iter(lambda: file.readline(MAX_ROW_BYTES + 1), b""), 1):
                if len(raw) > MAX_ROW_BYTES:
                    raise SourceError(f"{path}, line {line}: more than {MAX_ROW_BYTES} bytes, the most of a row; an object a line is read")
                if not raw.strip():
                    continue
                try:
                    row = json_of(raw.removeprefix(b"\xef\xbb\xbf" if line == 1 else b"").decode(errors="surrogateescape"))
                except ValueError as error:
                    raise SourceError(f"{path}, line {line} is not JSON ({error}); write an object a line") from None
                if not isinstance(row, dict):
                    raise SourceError(f"{path}, line {line} is {json.dumps(row):.60}, not an object; write one a line, with the same keys")
                yield line, row
    except OSError as error:
        raise SourceError(f"{path} cannot be read: {error.strerror or error}") from error


def _parquet(path: Path, columns: Sequence[str]) -> Iterator[tuple[int, list[Any]]]:
    with open_parquet(path) as file:
        named = [metadata_names(file.schema_arrow, name) for name in columns]
        row = 0
        for batch in batches_of(path, file, list(columns), ROWS_AT_ONCE):
            cells = [_named(batch.column(name).to_pylist(), names) for name, names in zip(columns, named, strict=True)]
            for each in zip(*cells, strict=True):
                row += 1
                yield row, list(each)


def _named(cells: list[Any], names: Sequence[str]) -> list[Any]:
    """Class numbers as the names that the hub's metadata give them; a number without a name is nothing."""
    if not names:
        return cells

    def name(cell: Any) -> Any:
        if isinstance(cell, list):
            return [name(each) for each in cell]
        return names[cell] if isinstance(cell, int) and 0 <= cell < len(names) else None

    return [name(cell) for cell in cells]
