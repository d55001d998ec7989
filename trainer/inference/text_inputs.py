"""What a job on texts answers: .txt files, and the rows of tables (CSV, TSV, JSON lines) and Parquet files. inputs.py lists and reads them
by this.
"""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa

from dataio.config import text_columns_of
from dataio.foreign import MAX_TEXT_FILE_BYTES
from dataio.formats import JUNK
from dataio.sources.image_column import key_of_row
from dataio.sources.source import text_of
from dataio.sources.table import DELIMITERS
from dataio.sources.texts import JSON_LINES, column_names, columns_meant, is_text_file, rows_of, sample_of
from trainer.inference.inputs import KEY_COLUMNS, Cell, Sort


def text_files_below(folder: str) -> Iterator[str]:
    for where, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".") and name.lower() not in JUNK]
        yield from (os.path.join(where, name) for name in names if not name.startswith(".") and is_text_file(Path(name)))


def _column_of(schema: Any, name: str, column: str) -> str:
    return ",".join(columns_meant(name, schema.names, column))


def _holds(schema: Any, column: str) -> bool:
    return all(name in schema.names for name in text_columns_of(column))


def _cells(batch: pa.RecordBatch, column: str) -> Iterator[Cell]:
    columns = [batch.column(name).to_pylist() for name in text_columns_of(column)]
    for cells in zip(*columns, strict=True):
        yield _cell(list(cells))


def _cell(cells: list[Any]) -> Cell:
    sample = sample_of("", cells, ())
    return None, sample.data, sample.refusal or ""


def _column_of_table(path: str, column: str) -> str:
    return ",".join(columns_meant(path, column_names(Path(path)), column))


def _rows_of_table(path: str, column: str) -> Iterator[tuple[str, Cell]]:
    where, texts = Path(path), text_columns_of(column)
    keys = next((key for key in KEY_COLUMNS if key not in texts and key in column_names(where)), None)
    for row, (_, cells) in enumerate(rows_of(where, [*texts, *([keys] if keys else [])])):
        key = cells.pop() if keys else None
        yield text_of(str(key)) if key not in (None, "") else key_of_row(None, where.stem, row), _cell(cells)


TEXTS = Sort(
    unit="texts",
    one="text",
    files=".txt files",
    suffixes=frozenset({".txt"}),
    max_bytes=MAX_TEXT_FILE_BYTES,
    below=text_files_below,
    column_of=_column_of,
    columns=text_columns_of,
    holds=_holds,
    cells=_cells,
    tables=frozenset({*DELIMITERS, *JSON_LINES}),
    column_of_table=_column_of_table,
    rows_of_table=_rows_of_table,
)
