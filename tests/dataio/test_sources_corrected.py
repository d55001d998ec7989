"""Corrections of labels: what a person decides of single samples is done when a source is converted, whatever its kind. Nothing else is."""

import csv
import io
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from corpus import encode, picture
from made import hf_rows, read, write_folder, write_hf, write_idx, write_table
from test_sources_cifar import cifar_members, write_tar

from dataio.codecs.image import decode
from dataio.config import DataConfig
from dataio.conversion import convert
from dataio.convert import main
from dataio.parquet import Dataset, open_dataset
from dataio.prepared import prepared
from dataio.scan import look_at
from dataio.sources import Source, SourceError
from dataio.sources.corrected import read_corrections

HEADER = "key,action,label\n"


def written(path: Path, rows: list[tuple[str, ...]], header: str = HEADER) -> str:
    out = io.StringIO(header)
    out.seek(0, io.SEEK_END)
    csv.writer(out).writerows(rows)
    path.write_text(out.getvalue(), newline="")
    return str(path)


def converted(source: Source, dest: Path) -> Dataset:
    convert(source, dest, max_bad_fraction=0.5, max_image_pixels=10_000)
    return open_dataset(dest)


def samples(dataset: Dataset) -> dict[tuple[str, str], tuple[Any, bytes]]:
    """(split, key) -> (class, content's hash)."""
    names = dataset.manifest.classes
    return {
        (split, key): (names[int.from_bytes(values[:8], "little")], sha256)
        for split in dataset.manifest.splits
        for key, values, sha256 in dataset.split(split).content()
    }


def write_source(kind: str, folder: Path) -> Path:
    match kind:
        case "folder":
            write_folder(folder, {"0": 20, "1": 20, "2": 20})
        case "idx":
            write_idx(folder)
        case "cifar":
            folder.mkdir()
            return write_tar(folder / "cifar-10-python.tar.gz", cifar_members())
        case "huggingface":
            write_hf(folder / "train-0.parquet", hf_rows(30))
            write_hf(folder / "test-0.parquet", hf_rows(6, first=40))
        case "table":
            write_table(folder, "image,label\n" + "".join(f"{{{n}}},{n % 3}\n" for n in range(20)) + "{0},1\n")  # one of them twice
    return folder


@pytest.mark.parametrize("kind", ["folder", "idx", "huggingface", "table", "cifar"])
def test_exactly_the_named_samples_are_relabelled_and_dropped(kind: str, tmp_path: Path) -> None:
    path = write_source(kind, tmp_path / "source")
    plain = converted(read(path), tmp_path / "plain")
    before = samples(plain)
    train = [place for place in before if place[0] == "train"]
    relabel, drop, keep = train[0], train[-1], train[3]
    other = next(name for name in plain.manifest.classes if name != before[relabel][0])
    rows = [(relabel[1], "relabel", other), (drop[1], "drop", ""), (keep[1], " Keep ", "whatever")]
    dataset = converted(read(path, corrections=written(tmp_path / "c.csv", rows)), tmp_path / "corrected")
    expected = {place: seen for place, seen in before.items() if place != drop} | {relabel: (other, before[relabel][1])}
    assert samples(dataset) == expected
    assert dataset.manifest.fingerprint != plain.manifest.fingerprint
    assert dataset.manifest.identity != plain.manifest.identity
    assert dataset.reading is not None
    assert dataset.reading.corrected == {"relabelled": 1, "dropped": 1}
    if kind == "table":
        assert ("train", "images/0.png#2") in before, "a key that comes twice is corrected under the name that it is stored by"
        again = read(path, corrections=written(tmp_path / "twice.csv", [("images/0.png#2", "drop", "")]))
        left = samples(converted(again, tmp_path / "twice"))
        assert left == {place: seen for place, seen in before.items() if place[1] != "images/0.png#2"}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_folder(tmp_path / "source", {"ant": 20, "bee": 20})
    for number, file in enumerate(sorted((tmp_path / "source").glob("*/*.png"))):
        file.write_bytes(encode(picture(number, 4, 4)))
    return tmp_path / "source"


def config_of(folder: Path, corrections: str = "") -> DataConfig:
    return DataConfig(path=str(folder), root=str(folder.parent / "root"), corrections=corrections)


def test_the_content_of_the_file_decides_and_not_its_name_or_order(folder: Path, tmp_path: Path) -> None:
    rows = [("ant/1.png", "relabel", "bee"), ("ant/2.png", "drop", ""), ("bee/3.png", "keep", "")]
    first = read(folder, corrections=written(tmp_path / "a.csv", rows)).identity
    assert read(folder, corrections=written(tmp_path / "b.csv", rows[::-1])).identity == first
    assert read(folder, corrections=written(tmp_path / "c.csv", rows[:2])).identity == first
    assert read(folder, corrections=written(tmp_path / "d.csv", rows[:1])).identity != first
    assert read(folder, corrections=written(tmp_path / "e.csv", [("ant/1.png", "keep", "bee")])).identity == read(folder).identity
    (tmp_path / "f.csv").write_bytes(b"\xef\xbb\xbf" + (tmp_path / "a.csv").read_bytes())
    assert read(folder, corrections=str(tmp_path / "f.csv")).identity == first


def test_corrected_data_are_another_conversion_that_decodes_nothing_again(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = prepared(config_of(folder))
    decoded: list[int] = []
    check = decode.Checker.check

    def counted(self: decode.Checker, encoded: list[bytes]) -> object:
        decoded.append(len(encoded))
        return check(self, encoded)

    monkeypatch.setattr(decode.Checker, "check", counted)
    config = config_of(folder, written(folder.parent / "c.csv", [("ant/1.png", "drop", ""), ("bee/2.png", "relabel", "ant")]))
    found = prepared(config)
    assert found.location != plain.location
    assert sum(decoded) == 0
    assert sum(split.count for split in found.dataset.manifest.splits.values()) == 39
    assert prepared(config).location == found.location
    assert prepared(config_of(folder)).location == plain.location


def test_what_a_look_at_the_source_sees_is_what_the_conversion_holds(folder: Path) -> None:
    config = config_of(folder, written(folder.parent / "c.csv", [("ant/1.png", "drop", ""), ("bee/2.png", "relabel", "ant")]))
    looked = look_at(config)
    dataset = prepared(config).dataset
    assert looked.manifest is not None
    assert {name: split.count for name, split in looked.manifest.splits.items()} == {
        name: split.count for name, split in dataset.manifest.splits.items()
    }
    assert dataset.reading is not None
    assert looked.class_counts is not None
    assert {name: tuple(counts) for name, counts in looked.class_counts.items()} == dataset.reading.class_counts
    assert looked.corrected == look_at(config).corrected == {"relabelled": 1, "dropped": 1}


def test_a_stopped_conversion_goes_on_and_holds_the_same(folder: Path, tmp_path: Path) -> None:
    """The second of two equal keys keeps its name where the first was dropped before the stop."""
    table = write_table(tmp_path / "t", "image,label\n{0},a\n{0},b\n{1},a\n{2},b\n{3},a\n{4},b\n{5},a\n{6},b\n")
    rows = [("images/0.png", "drop", ""), ("images/3.png", "relabel", "b")]
    corrections = written(tmp_path / "c.csv", rows)
    whole = converted(read(table, corrections=corrections), tmp_path / "whole")
    source = read(table, corrections=corrections)
    stop = {"at": 3}

    class Stopped(Exception):
        pass

    def on_progress(progress: Any) -> None:
        stop["at"] -= 1
        if not stop["at"]:
            raise Stopped

    def go(on: Any = None) -> None:
        convert(source, tmp_path / "d", max_bad_fraction=0.5, max_image_pixels=10_000, shard_bytes=1, on_progress=on)

    import dataio.conversion as module

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(module, "ROWS_PER_GROUP", 1)
        with pytest.raises(Stopped):
            go(on_progress)
        assert list((tmp_path / "d.partial").glob("*.part.json"))
        go()
    assert samples(open_dataset(tmp_path / "d")) == samples(whole)
    assert ("train", "images/0.png#2") in samples(whole) or ("test", "images/0.png#2") in samples(whole)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        (HEADER + "ant/99.png,drop,\n", "line 2, column 'key': 'ant/99.png' names no sample of the data; write the key as predictions"),
        (HEADER + "ant/1.png,delete,\n", "line 2, column 'action': 'delete' is no action; those are keep, relabel, drop"),
        (HEADER + "ant/1.png,relabel,wasp\n", "line 2, column 'label': 'wasp' is no class of the data; those are ant, bee"),
        (HEADER + "ant/1.png,relabel,\n", "line 2, column 'label': '' is no class of the data"),
        (HEADER + "ant/1.png,keep,\n\nant/1.png,drop,\n", "line 4, column 'key': 'ant/1.png' is in line 2 already; leave one row"),
        (HEADER + "ant/99.png,keep,\n", "names no sample of the data"),
        (HEADER + ",drop,\n", "line 2, column 'key': '' names no sample"),
        (HEADER + "ant/1.png,drop\n", "line 2: there are 2 cells, the header names 3 columns"),
        ("key,label\nant/1.png,bee\n", "line 1: there is no column 'action'; corrections have key, action, label, separated by commas"),
        ("key;action;label\nant/1.png;drop;\n", "its columns are 'key;action;label'"),
        ("key,action\nant/1.png,drop\n", "line 1: no column has the labels; corrections have key, action, label"),
        ("key,action,label,key\n", "there are two columns named 'key'"),
        ("key,action,label,split\nant/1.png,drop,,dev2\n", "column 'split': 'dev2' is no split of the data; those are train, test"),
        ("", "there is no column 'key'"),
        (HEADER + 'ant/1.png,"drop,\n', "unexpected end of data"),
        (HEADER + "ant/1.png,dr\0op,\n", "line 2: there is a NUL byte"),
        (HEADER + "\x1b[31m\x07,drop,\n", r"'\x1b[31m\x07' names no sample"),
    ],
)
def test_a_row_that_cannot_be_applied_is_named_with_value_rule_and_fix(folder: Path, text: str, told: str) -> None:
    path = folder.parent / "c.csv"
    path.write_text(text, newline="")
    with pytest.raises(SourceError) as caught:
        read(folder, corrections=str(path))
    assert told in str(caught.value)
    assert str(caught.value).startswith(str(path))
    assert "\x1b" not in str(caught.value)


def test_files_that_are_none_are_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SourceError, match=r"data.corrections='.*gone.csv' does not exist; name a CSV file"):
        read(folder, corrections=str(folder.parent / "gone.csv"))
    with pytest.raises(SourceError, match="cannot be read: Is a directory"):
        read(folder, corrections=str(folder))
    os.mkfifo(folder.parent / "pipe.csv")
    with pytest.raises(SourceError, match="cannot be read: not a regular file"):
        read(folder, corrections=str(folder.parent / "pipe.csv"))
    (folder.parent / "latin.csv").write_bytes(HEADER.encode() + b"caf\xe9,drop,\n")
    with pytest.raises(SourceError, match=r"line 2: b'\\xe9.*' is not UTF-8"):
        read(folder, corrections=str(folder.parent / "latin.csv"))
    monkeypatch.setattr("dataio.sources.corrected.MAX_CORRECTIONS_BYTES", 10)
    with pytest.raises(SourceError, match="more than 10 bytes"):
        read(folder, corrections=written(folder.parent / "c.csv", [("ant/1.png", "drop", "")]))


def test_a_key_of_no_sample_is_found_where_only_reading_shows_the_keys(tmp_path: Path) -> None:
    """And before anything is converted where the source was converted without corrections."""
    write_idx(tmp_path / "source")
    corrections = written(tmp_path / "c.csv", [("train/99999", "drop", "")])
    config = DataConfig(path=str(tmp_path / "source"), root=str(tmp_path / "root"), corrections=corrections)
    with pytest.raises(SourceError, match="line 2, column 'key': 'train/99999' names no sample"):
        prepared(config)
    assert not list((tmp_path / "root").glob("*")), "nothing is left that no corrected file would go on with"
    prepared(replace(config, corrections=""))
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("dataio.prepared.convert", lambda *args, **more: pytest.fail("it is known before"))
        with pytest.raises(SourceError, match="names no sample"):
            prepared(config)


def test_a_key_of_two_splits_needs_its_split(tmp_path: Path) -> None:
    write_hf(tmp_path / "s" / "train-0.parquet", hf_rows(6, paths=True))
    write_hf(tmp_path / "s" / "test-0.parquet", hf_rows(6, paths=True))
    with pytest.raises(SourceError, match=r"line 2, column 'key': '1\.png' names a sample of train and one of test; say which one"):
        converted(read(tmp_path / "s", corrections=written(tmp_path / "c.csv", [("1.png", "drop", "")])), tmp_path / "d")
    named = written(tmp_path / "n.csv", [("1.png", "drop", "", "test"), ("1.png", "relabel", "0", "train")], "key,action,label,split\n")
    found = samples(converted(read(tmp_path / "s", corrections=named), tmp_path / "e"))
    assert ("test", "1.png") not in found
    assert found["train", "1.png"][0] == "0"


def test_other_targets_are_corrected_in_columns_of_their_names(tmp_path: Path) -> None:
    text = "image,tags,size\n" + "".join(f"{{{n}}},{('red', 'red|big', '')[n % 3]},{n}.5\n" for n in range(12))
    table = write_table(tmp_path / "t", text)
    rows = [("images/1.png", "relabel", "big", ""), ("images/2.png", "relabel", "", "-7"), ("images/4.png", "relabel", "?", "")]
    corrections = written(tmp_path / "c.csv", rows, "key,action,tags,size\n")
    source = read(table, targets="tags:labels,size:number", corrections=corrections)
    assert [target.classes for target in source.targets] == [("big", "red"), ()]
    dataset = converted(source, tmp_path / "d")
    found: dict[str, tuple[list[int], float]] = {}
    for name in dataset.manifest.splits:
        split = dataset.split(name)
        targets = split.targets()
        for row, key in enumerate(split.keys(range(split.count))):
            found[key] = (targets["tags"][row].tolist(), float(targets["size"][row]))
    assert [found[f"images/{n}.png"] for n in (0, 1, 2, 4)] == [([0, 1], 0.5), ([1, 0], 1.5), ([0, 0], -7.0), ([255, 255], 4.5)]
    only = read_corrections(
        written(tmp_path / "o.csv", [("images/0.png", "relabel", "")]), (source.targets[0],), ("train",)
    )  # of one target of several labels: none of them
    (change,) = only.changes["images/0.png"]
    assert np.array_equal(change.values[0], [0, 0])
    with pytest.raises(SourceError, match="column 'size': 'tall' is not a number"):
        read(
            table,
            targets="tags:labels,size:number",
            corrections=written(tmp_path / "x.csv", [("images/0.png", "relabel", "", "tall")], "key,action,tags,size\n"),
        )
    with pytest.raises(SourceError, match="'relabel' gives no value"):
        read(
            table,
            targets="tags:labels,size:number",
            corrections=written(tmp_path / "y.csv", [("images/0.png", "relabel", "", "")], "key,action,tags,size\n"),
        )


def test_data_that_are_converted_already_are_not_corrected_silently(folder: Path, tmp_path: Path) -> None:
    converted(read(folder), tmp_path / "d")
    corrections = written(tmp_path / "c.csv", [("ant/1.png", "drop", "")])
    for ask in (prepared, look_at):
        with pytest.raises(ValueError, match=r"data.corrections='.*' is applied when a source is converted, and .* converted already"):
            ask(config_of(tmp_path / "d", corrections))  # type: ignore[operator]


def test_the_command_that_converts_takes_and_tells_them(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    corrections = written(tmp_path / "c.csv", [("ant/1.png", "drop", ""), ("ant/2.png", "drop", ""), ("bee/1.png", "relabel", "ant")])
    assert main([str(folder), str(tmp_path / "d"), "--corrections", corrections, "--threads", "1"]) == 0
    assert "1 relabelled and 2 dropped by corrections" in capsys.readouterr().out
    assert main([str(folder), str(tmp_path / "e"), "--corrections", corrections, "--sample", "4"]) == 2
    assert "--sample may leave out some" in capsys.readouterr().err
