"""Claims about foreign files: what is no regular file is refused at once, what is too large is refused before it is read, and what was made
to fill time or memory fills neither."""

import contextlib
import io
import json
import os
import time
import zlib
from collections import deque
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from corpus import chunk, encode, picture
from hypothesis import example, given
from hypothesis import strategies as st
from made import read, write_folder, write_idx, write_table

from cluster.journal import read_journal
from cluster.storage import open_storage
from dataio.codecs.codec import Refusal
from dataio.codecs.image.sniff import MAX_SCANS, sniff
from dataio.foreign import json_of, open_regular, read_regular
from dataio.sources import SourceError, load_cifar_pickle
from dataio.sources.source import key_of, name_of
from trainer.runs.__main__ import table
from trainer.runs.folder import RunFolder
from trainer.runs.progress import final_table
from trainer.runs.status import look
from trainer.settings.say import Terminal
from trainer.settings.toml import load
from trainer.settings.tree import RunConfig

SECONDS = 2.0  # each took hours, or all memory


def pipe(at: Path) -> None:
    os.mkfifo(at)


def zeros(at: Path) -> None:
    at.symlink_to("/dev/zero")


IRREGULAR = pytest.mark.parametrize("make", [pipe, zeros])


@IRREGULAR
def test_what_is_no_regular_file_is_refused_without_waiting(make: Callable[[Path], None], tmp_path: Path) -> None:
    make(tmp_path / "x")
    for read_it in (open_regular, lambda path: read_regular(path, 10), lambda path: open_storage(tmp_path).read("x")):
        with pytest.raises(OSError, match="not a regular file"):
            read_it(tmp_path / "x")


def test_a_file_is_read_up_to_its_limit(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(bytes(10))
    assert read_regular(tmp_path / "x", 10) == bytes(10)
    with pytest.raises(OSError, match="more than 9 bytes"):
        read_regular(tmp_path / "x", 9)
    with pytest.raises(OSError, match="more than 9 bytes"):
        read_regular("/proc/self/maps", 9)  # says that it has 0 bytes
    with pytest.raises(IsADirectoryError):
        read_regular(tmp_path, 9)


@IRREGULAR
def test_a_folder_of_images_with_such_a_file_has_one_bad_sample(make: Callable[[Path], None], tmp_path: Path) -> None:
    write_folder(tmp_path / "train", {"a": 4, "b": 4})
    make(tmp_path / "train" / "a" / "x.png")
    source = read(tmp_path)
    refused = {sample.key: sample.refusal for split in source.splits() for sample in source.samples(split) if sample.refusal}
    assert refused == {"train/a/x.png": "unreadable: not a regular file"}


@IRREGULAR
@pytest.mark.parametrize("name", ["labels.csv", "train.parquet", "a.tar", "x.idx"])
def test_no_source_waits_for_such_a_file(make: Callable[[Path], None], name: str, tmp_path: Path) -> None:
    make(tmp_path / name)
    for path in (tmp_path, tmp_path / name):
        with pytest.raises((SourceError, OSError)):
            read(path)


@IRREGULAR
@pytest.mark.parametrize("name", ["journal.jsonl", "summary.json", "config.toml"])
def test_a_foreign_runs_folder_is_listed_with_what_is_wrong(make: Callable[[Path], None], name: str, tmp_path: Path) -> None:
    (tmp_path / "run" / "model").mkdir(parents=True)
    make(tmp_path / "run" / name)
    status = look(RunFolder(storage=open_storage(tmp_path), name="run"), is_live=False)
    assert status is not None
    assert any("not a regular file" in problem for problem in status.problems), status.problems


@pytest.mark.parametrize("value", ["x", [], {}, True, 10**400, 1e308])
def test_a_foreign_runs_folder_is_listed_whatever_its_values_are(value: object, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    said = {"run": "run", "status": "finished", "steps": value, "seconds": value, "accounting": value, "test_loss": value}
    (tmp_path / "run" / "summary.json").write_text(json.dumps(said))
    deep = '{"time": 1e9, "event": "x", "a": ' + "[" * 100_000
    (tmp_path / "run" / "journal.jsonl").write_text(f'{deep}\n{{"time": {10**400}, "event": "run_started"}}\n')
    assert read_journal(open_storage(tmp_path), "run") == []
    status = look(RunFolder(storage=open_storage(tmp_path), name="run"), is_live=False)
    assert status is not None
    assert status.problems
    assert len(table([status], width=80, now=1e9)) > 1
    Terminal(file=io.StringIO()).print(final_table(said))


def test_a_runs_file_that_is_too_large_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    with open(tmp_path / "run" / "config.toml", "wb") as file:
        file.truncate(2 << 20)
    with pytest.raises(ValueError, match=r"run/config.toml has more than 1048576 bytes"):
        RunFolder(storage=open_storage(tmp_path), name="run").read("config.toml")


@IRREGULAR
def test_settings_are_a_regular_file_of_moderate_size_and_depth(make: Callable[[Path], None], tmp_path: Path) -> None:
    make(tmp_path / "x.toml")
    (tmp_path / "large.toml").write_bytes(b"#" * (2 << 20))
    (tmp_path / "deep.toml").write_text("a = " + "[" * 100_000)
    for name, why in (("x", "not a regular file"), ("large", "more than 1048576 bytes"), ("deep", "nested too deeply")):
        with pytest.raises(ValueError, match=why):
            load(str(tmp_path / f"{name}.toml"), RunConfig())


def test_json_of_any_depth_is_a_value_or_a_value_error() -> None:
    for text in ("[" * 100_000, '{"a":' * 100_000, "9" * 10_000):
        with pytest.raises(ValueError, match=r"nested|integer"):
            json_of(text)


# --- names --------------------------------------------------------------------------------------------------------------------------------


@given(st.binary(max_size=20) | st.text("\\x5cf0é", max_size=12).map(str.encode))
@example(b"\\xff")
@example(b"\\\xff")
@example(b"\\x5c\\xff")
def test_a_key_names_its_file_whatever_its_bytes(name: bytes) -> None:
    key = key_of(name)
    key.encode()
    assert name_of(key) == name


@given(st.text(st.characters(codec="utf-8")).filter(lambda name: "\\x" not in name))
def test_a_name_in_utf8_is_its_own_key(name: str) -> None:
    assert key_of(name.encode()) == name


# --- bombs --------------------------------------------------------------------------------------------------------------------------------


def doubled(levels: int) -> bytes:
    """`levels` tuples, each of the one before, twice."""
    return b"\x80\x02K\x01" + b"q\x00h\x00\x86" * levels


@pytest.mark.parametrize(
    "raw",
    [
        b"\x80\x02}" + doubled(60)[2:] + b"K\x01s.",  # as a key, which is hashed
        b"\x80\x02}U\x04data"
        + b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\0\x85U\x01b\x87R(K\x01"
        + doubled(60)[2:]
        + b"cnumpy\ndtype\nU\x02u1K\0K\x01\x87RK\0U\x01xtbs.",  # as a shape, which is shown
        b"\x80\x02}U\x04dataccnumpy\ndtype\n" + doubled(60)[2:] + b"\x85Rs.",
        b"\x80\x02}U\x04data" + doubled(60)[2:] + b"s.",
    ],
)
def test_a_pickle_of_values_that_hold_one_another_takes_no_time(raw: bytes) -> None:
    began = time.process_time()
    with contextlib.suppress(SourceError):
        load_cifar_pickle("data_batch_1", raw)
    assert time.process_time() - began < SECONDS


def parquet_bomb(path: Path, rows: int = 20_000) -> Path:
    """Some hundred bytes that say a value of 1 MB for each row."""
    column = pa.DictionaryArray.from_arrays(pa.array([0] * rows, pa.int32()), pa.array([b"a" * (1 << 20)], pa.binary()))
    pq.write_table(pa.table({"image": column, "label": [0] * rows}), path, compression="zstd", store_schema=False)
    return path


def test_a_parquet_file_of_some_bytes_does_not_fill_memory(tmp_path: Path) -> None:
    path = parquet_bomb(tmp_path / "train.parquet")
    assert path.stat().st_size < 3000
    pool = pa.default_memory_pool()
    before = pool.max_memory()
    with pytest.raises(SourceError, match="unpacks to more than"):
        deque(read(path).samples("train"), maxlen=0)
    assert pool.max_memory() - before < 512 << 20


def test_labels_of_idx_files_are_limited_before_they_are_read(tmp_path: Path) -> None:
    write_idx(tmp_path)
    (tmp_path / "train-labels-idx1-ubyte").write_bytes(bytes([0, 0, 8, 1]) + b"\xff\xff\xff\xff")
    with pytest.raises(SourceError, match="says it has 4294967295 labels"):
        read(tmp_path)


def tiff(entries: int, values: int) -> bytes:
    """A directory of `entries` times the same tag, each of the same `values` numbers."""
    head = b"II*\0" + (8).to_bytes(4, "little") + entries.to_bytes(2, "little")
    entry = (273).to_bytes(2, "little") + (3).to_bytes(2, "little") + values.to_bytes(4, "little") + (8).to_bytes(4, "little")
    return head + entry * entries + bytes(4) + bytes(2 * values)


def progressive(scans: int) -> bytes:
    data = encode(picture(), "JPEG", progressive=True)
    at = data.rindex(b"\xff\xda")
    return data[:at] + data[at:-2] * scans + data[-2:]


HEADER = encode(picture())[:33]


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (tiff(60_000, 200_000), "damaged: a TIFF that has tag 273 twice"),
        (tiff(1, 2_000_000), "damaged: TIFF tag 273 has 2000000 values"),
        (HEADER + chunk(b"teXt", b"") * 300_000, "damaged: a PNG of more than 262144 chunks"),
        (b"\xff\xd8\xff" + b"\xff" * (8 << 20), "damaged: a JPEG whose header has no end"),
        (b"\xff\xd8" + b"\xff\x01" * 300_000 + b"\xff\xd9", "damaged: a JPEG of more than 262144 segments"),
        (progressive(MAX_SCANS + 1), "unsupported: a JPEG of 2"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "unknown format"),
        (HEADER[:16] + b"\xff\xff\xff\xff" * 2 + HEADER[24:29] + zlib.crc32(b"").to_bytes(4, "big"), "damaged: the CRC"),
    ],
)
def test_an_image_that_was_made_to_take_time_is_refused_at_once(data: bytes, reason: str) -> None:
    began = time.process_time()
    found = sniff(data, max_pixels=1 << 24)
    assert isinstance(found, Refusal)
    assert found.reason.startswith(reason), found.reason
    assert time.process_time() - began < 4 * SECONDS


def test_usual_progressive_images_are_accepted() -> None:
    assert not isinstance(sniff(progressive(1), max_pixels=1 << 24), Refusal)


def test_a_table_larger_than_its_limit_is_refused_unread(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dataio.sources.hostile.MAX_TABLE_BYTES", 10)
    with pytest.raises(SourceError, match="more than 10 bytes"):
        read(write_table(tmp_path, "image,label\n{0},a\n{1},b\n"))
