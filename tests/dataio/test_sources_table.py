"""Claims about tables of images: cells are read exactly, errors name file, line, column and value, nothing outside the folder is opened."""

import math
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from corpus import encode, picture
from hypothesis import given, settings
from hypothesis import strategies as st
from made import read, write_table

from dataio.schema import SPLITS, Target
from dataio.sources import Source, SourceError


def values(source: Source, name: str) -> dict[str, Any]:
    """Key -> value of the target, over all splits; labels as a list."""
    number = [target.name for target in source.targets].index(name)
    found = {sample.key: sample.values[number] for split in source.splits() for sample in source.samples(split)}
    return {key: value.tolist() if isinstance(value, np.ndarray) else value for key, value in sorted(found.items())}


def test_a_table_gives_each_image_its_values_and_its_split(tmp_path: Path):
    path = write_table(
        tmp_path,
        """split,image,label,tags,age
train,{0},cat,a|b,1.5
train,./images//1.png,dog,,

val,{2},,?,-.5
test,{3}," cat ",b,3.
unlabelled,{4},nonsense,|,what
""",
    )
    source = read(path, targets="label,tags:labels,age")
    assert (source.kind, source.splits(), source.ignored) == ("table", SPLITS, ())
    assert source.targets == (
        Target(name="label", kind="label", classes=("cat", "dog")),
        Target(name="tags", kind="labels", classes=("a", "b")),
        Target(name="age", kind="number"),
    )
    assert source.classes == ("cat", "dog")
    assert {split: [sample.key for sample in source.samples(split)] for split in SPLITS} == {
        "train": ["images/0.png", "images/1.png"],
        "validation": ["images/2.png"],
        "test": ["images/3.png"],
        "unlabelled": ["images/4.png"],
    }
    keys = [f"images/{number}.png" for number in range(5)]
    assert values(source, "label") == dict(zip(keys, [0, 1, -1, 0, -1], strict=True))
    assert values(source, "tags") == dict(zip(keys, [[1, 1], [0, 0], [255, 255], [0, 1], [255, 255]], strict=True))
    assert repr(values(source, "age")) == repr(dict(zip(keys, [1.5, math.nan, -0.5, 3.0, math.nan], strict=True)))
    for split in SPLITS:
        for sample in source.samples(split):
            assert (sample.data, sample.refusal) == (encode(picture(int(sample.key[7:-4]), 4, 4)), None)
        assert [sample.key for sample in source.samples(split, 1)] == [sample.key for sample in source.samples(split)][1:]
        assert source.count(split) == len(list(source.samples(split)))


@pytest.mark.parametrize(
    ("header", "cells", "kind", "classes"),
    [
        ("label", ["b", "a", "b"], "label", ("a", "b")),
        ("label", ["10", "9", "-1"], "label", ("-1", "9", "10")),
        ("label", ["10", "9", "x"], "label", ("10", "9", "x")),
        ("label", ["1.5", "2", ""], "label", ("1.5", "2")),
        ("label", ["1.5", "2.0", ""], "number", ()),
        ("label", ["a|c", "b", ""], "labels", ("a", "b", "c")),
        ("labels", ["c", "b", ""], "labels", ("b", "c")),
        ("tags", ["c", "?", ""], "labels", ("c",)),
    ],
)
def test_without_targets_the_column_and_its_cells_say_what_is_learnt(
    tmp_path: Path, header: str, cells: list[str], kind: str, classes: Any
):
    rows = "".join(f"{{{number}}},other,{cell}\n" for number, cell in enumerate(cells))
    (target,) = read(write_table(tmp_path, f"image,other,{header}\n" + rows)).targets
    assert (target.name, target.kind, target.classes) == (header, kind, classes)


def test_a_declared_kind_is_taken_as_it_is(tmp_path: Path):
    path = write_table(tmp_path, "file,year,score,note\n{0},1999,0.5,a\n{1},2001,1.5,b\n")
    source = read(path, targets="year:number,score:label,note:labels")
    assert [(target.name, target.kind, target.classes) for target in source.targets] == [
        ("year", "number", ()),
        ("score", "label", ("0.5", "1.5")),
        ("note", "labels", ("a", "b")),
    ]
    assert read(path, targets="year").targets[0].classes == ("1999", "2001")
    assert read(path, targets="year").identity != read(path, targets="year:number").identity


@pytest.mark.parametrize("column", ["image", "file", "filename", "path", "image_path"])
def test_tabs_quotes_byte_order_marks_and_line_ends_of_all_kinds_are_read(tmp_path: Path, column: str):
    path = write_table(tmp_path, f'\ufeff{column}\tlabel\r\n{{0}}\t"a\nb, ""c"""\r\n{{1}}\td\r\n', "labels.TSV")
    assert read(path).classes == ('a\nb, "c"', "d")


def test_a_table_without_a_test_split_is_held_out_by_its_first_target(tmp_path: Path):
    rows = "".join(f"{{{number}}},{'ab'[number % 2]},{number / 7:.2f}\n" for number in range(20))
    path = write_table(tmp_path, "image,label,age\n" + rows)
    source = read(path, targets="label,age", validation_fraction=0.25)
    assert {split: source.count(split) for split in source.splits()} == {"train": 12, "validation": 4, "test": 4}
    assert sorted(sample.values[0] for sample in source.samples("test")) == [0, 0, 1, 1]
    assert read(path, targets="age,label").count("test") == 10  # one of each bin of two
    assert source.identities == (source.identity,)
    assert len({read(path, targets="label", test_fraction=fraction).identity for fraction in (0.1, 0.2)}) == 2


def test_the_identity_changes_with_the_table_and_with_its_images(tmp_path: Path):
    path = write_table(tmp_path, "image,label,split\n{0},a,train\n{1},b,test\n")
    before = read(path).identity
    assert read(path).identity == before
    os.utime(tmp_path / "images" / "2.png", ns=(0, 0))  # of no row
    assert read(path).identity == before
    os.utime(tmp_path / "images" / "1.png", ns=(0, 0))
    after = read(path).identity
    assert after != before
    os.utime(path, ns=(0, 0))
    assert read(path).identity not in (before, after)


def test_a_table_of_texts_that_is_taken_for_one_of_images_says_so_at_once(tmp_path: Path):
    path = write_table(tmp_path, "id,text,label\nt7,good,a\nt8,bad,b\n")
    with pytest.raises(SourceError, match=r"none of the 2 files that it names, such as 't7'.*--model\.name hf/FOLDER"):
        read(path, targets="label")
    of_images = read(write_table(tmp_path / "other", "image,label\ngone,a\n"))
    assert [sample.refusal for sample in of_images.samples("train")] == ["unreadable: No such file or directory"]


def test_what_is_no_regular_file_below_the_table_is_refused_by_sample(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = write_table(
        tmp_path / "data", "image,label\n" + "".join(f"images/{name},a\n" for name in ("gone", "pipe", "out", "in", "sub", "big"))
    )
    images = path.parent / "images"
    (tmp_path / "secret").write_bytes(b"secret")
    (images / "out").symlink_to(tmp_path / "secret")
    (images / "in").symlink_to(images / "3.png")
    (images / "sub").mkdir()
    os.mkfifo(images / "pipe")
    (images / "big").write_bytes(bytes(200_000))
    monkeypatch.setattr("dataio.sources.hostile.MAX_IMAGE_BYTES", 100_000)
    source = read(path)
    found = {sample.key: (sample.data, sample.refusal) for split in source.splits() for sample in source.samples(split)}
    assert found == {
        "images/gone": (b"", "unreadable: No such file or directory"),
        "images/pipe": (b"", "unreadable: not a regular file"),
        "images/out": (b"", "unreadable: leads out of the table's folder"),
        "images/in": (encode(picture(3, 4, 4)), None),
        "images/sub": (b"", "unreadable: Is a directory"),
        "images/big": (b"", "unreadable: more than 100000 bytes, the most that is read of such a file"),
    }


@pytest.mark.parametrize(
    ("text", "targets", "message"),
    [
        ("", "", "line 1: no column names the image files; its columns are none; say which one does"),
        ("who,label\na,b\n", "", r"line 1: no column names the image files; its columns are who, label; .*--data\.image-column NAME"),
        ("image,label\n", "", "has a header, but no row below it"),
        ("image,label,label\n", "", "line 1: there are two columns named 'label'; name each column once"),
        (
            "image,x,y\n{0},1,2\n",
            "",
            r"no column label, labels, tags; .*--data\.label-column NAME,.*--data\.targets NAME.*columns are x, y$",
        ),
        ("image,split\n{0},train\n", "", "its columns are none$"),
        ("image,x\n{0},1\n", "x,z", r"data\.targets names 'z', which is no column of labels in .*; those are x: --data"),
        ("image,x,split\n{0},1,train\n", "split", "names 'split', which is no column of labels"),
        ("image,x,file\n{0},1,a\n", "image", "names 'image', which is no column of labels in .*; those are x, file"),
        ("image,label\n{0},a\n{1}\n", "", "line 3: there are 1 cells, the header names 2 columns; put a cell that holds the delimiter in"),
        ("image,label\n{0},a,b\n", "", "line 2: there are 3 cells"),
        ("image,label\n,a\n", "", "line 2, column 'image': '' names no file; name one, relative to the table"),
        ("image,label\n/etc/passwd,a\n", "", "line 2, column 'image': '/etc/passwd' leads out of the table's folder; name a file below it"),
        ("image,label\n{0},a\n\nimages/../../x,a\n", "", r"line 4, column 'image': 'images/\.\./\.\./x' leads out of the table's folder"),
        ("image,label,split\n{0},a,Here\n", "", "line 2, column 'split': 'Here' is no split; train, validation, test, unlabelled are"),
        ("image,label,split\n{0},a,\n", "", "line 2, column 'split': '' is no split"),
        ("image,label,split\n{0},a,test\n", "", "has no row of split train, but of test; there must be images to train with"),
        ("image,label\n{0},\n", "", "column 'label': all cells are empty; name a target of which something is known"),
        ("image,label,split\n{0},,train\n{1},a,unlabelled\n", "", "column 'label': all cells are empty"),
        ("image,tags\n{0},?\n", "", "column 'tags', names no class: nothing is known; name another target"),
        (
            'image,tags\n{0},a\n{1},"x\ny"\n{2},a||b\n',
            "",
            r"line 5, column 'tags': 'a\|\|b' holds an empty label, or \? among others; write",
        ),
        ("image,tags\n{0},a|?\n", "", r"line 2, column 'tags': 'a\|\?' holds an empty label, or \? among others"),
        (
            "image,n\n{0},1\n{1},nan\n",
            "n:number",
            "line 3, column 'n': 'nan' is not a number of at most 3.4e38; write it like -1.5, or leave",
        ),
        ("image,n\n{0},1_0\n", "n:number", "line 2, column 'n': '1_0' is not a number"),
        ('image,n\n{0},"1,5"\n', "n:number", "line 2, column 'n': '1,5' is not a number"),
        ("image,n\n{0},1e39\n", "n:number", "line 2, column 'n': '1e39' is not a number of at most"),
        ("image,n\n{0},?\n", "n:number", r"line 2, column 'n': '\?' is not a number"),
        ('image,label\n{0},"a\n{1},b\n', "", "line 3: unexpected end of data; write the table as the csv module does"),
        ('image,label\n{0},"a"b\n', "", "line 2: .*expected after"),
        ("image,label\n{0},a\0b\n", "", "line 2: there is a NUL byte"),
    ],
)
def test_what_is_wrong_in_a_table_is_named_with_its_place_and_what_to_do(tmp_path: Path, text: str, targets: str, message: str):
    with pytest.raises(SourceError, match=message) as caught:
        read(write_table(tmp_path, text), targets=targets)
    assert str(tmp_path / "labels.csv") in str(caught.value)


def test_a_table_in_another_encoding_is_refused_by_line(tmp_path: Path):
    path = write_table(tmp_path, "")
    path.write_bytes(b"image,label\nimages/0.png,caf\xe9\n")
    with pytest.raises(SourceError, match=r"line 2: b'\\xe9\\n' is not UTF-8; save the table in UTF-8"):
        read(path)
    path.write_text("image,label\n", encoding="utf-16")
    with pytest.raises(SourceError, match="line 1: there is a NUL byte"):
        read(path)


def test_a_row_is_no_longer_than_its_limit_whatever_is_quoted(tmp_path: Path):
    path = write_table(tmp_path, "")
    path.write_text("image,label\n" + "images/0.png," + "a" * (1 << 20) + "\n")
    with pytest.raises(SourceError, match="line 2: the row has more than 1048576 bytes; is a quotation mark left open"):
        read(path)
    path.write_text("image,label\n" + '"x\n",' * 300_000 + "\n")
    with pytest.raises(SourceError, match=r"line \d+: the row has more than 1048576 bytes"):
        read(path)
    path.write_text('image,label\nimages/0.png,"' + "a\n" * 100_000 + "\n")
    with pytest.raises(SourceError, match="field larger than field limit"):
        read(path)


@pytest.mark.parametrize(("kind", "most"), [("label", 100_000), ("labels", 10_000)])
def test_a_column_of_keys_is_no_column_of_classes(tmp_path: Path, kind: str, most: int):
    path = write_table(tmp_path, "")
    path.write_text("image,label\n" + "".join(f"images/0.png,{row}\n" for row in range(most + 1)))
    with pytest.raises(
        SourceError, match=rf"column 'label', holds {most + 1} classes; a target of kind {kind} has at most {most}: name a column"
    ):
        read(path, targets=f"label:{kind}")


CELLS = st.lists(st.one_of(st.just("?"), st.lists(st.sampled_from("abcd"), unique=True).map("|".join)), min_size=1, max_size=20)


@settings(deadline=None, max_examples=50)
@given(CELLS)
def test_any_labels_come_back_as_they_were_written(tmp_path_factory: pytest.TempPathFactory, cells: list[str]):
    path = tmp_path_factory.mktemp("table") / "labels.csv"
    path.write_text("image,tags\n" + "".join(f"{row}.png,{cell}\n" for row, cell in enumerate(["a|b|c|d", *cells])))
    found = values(read(path), "tags")
    for row, cell in enumerate(cells, 1):
        assert found[f"{row}.png"] == ([255] * 4 if cell == "?" else [int(name in cell) for name in "abcd"])


@settings(deadline=None, max_examples=200)
@given(st.binary(max_size=60))
def test_a_table_of_any_bytes_is_read_or_refused_and_nothing_else(tmp_path_factory: pytest.TempPathFactory, raw: bytes):
    path = tmp_path_factory.mktemp("table") / "labels.csv"
    path.write_bytes(b"image,label\nx.png,a\n" + raw)
    try:
        source = read(path)
    except SourceError:
        return
    assert source.targets


def photographs(folder: Path, names: list[str]) -> None:
    for number, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(encode(picture(number, 4, 4)))


@pytest.mark.parametrize(
    ("header", "cell"),
    [
        ("id,breed", "{stem}"),
        ("Image Name,Class", "{name}"),
        ("image_id,target", "{stem}"),
        ("filename,label", "images/{name}"),
        ("file,y", "{name}"),
    ],
)
def test_a_folder_of_images_with_a_table_of_their_labels_is_read(tmp_path: Path, header: str, cell: str):
    names = [f"{number:02d}.jpg" for number in range(6)]
    photographs(tmp_path / "images", names)
    rows = [f"{cell.format(name=name, stem=name[:2])},{'cat' if number % 2 else 'dog'}" for number, name in enumerate(names)]
    (tmp_path / "train.csv").write_text("\n".join([header, *rows]) + "\n")
    (tmp_path / "sample_submission.csv").write_text(header + "\n99,cat\n")
    (tmp_path / "README").write_text("pets")
    source = read(tmp_path)
    assert (source.kind, source.classes) == ("table", ("cat", "dog"))
    read_samples = [sample for split in source.splits() for sample in source.samples(split)]
    assert {sample.data: sample.values[0] for sample in read_samples} == {
        encode(picture(number, 4, 4)): 1 - number % 2 for number in range(6)
    }
    assert all(sample.refusal is None for sample in read_samples)
    assert set(source.ignored) == {"README", "sample_submission.csv"}
    assert read(tmp_path / "train.csv").identities == source.identities


def test_a_name_that_several_files_have_is_the_one_in_the_tables_folder_or_asked_about(tmp_path: Path):
    photographs(tmp_path, ["train/1.jpg", "train/2.jpg", "test/1.jpg"])
    (tmp_path / "train.csv").write_text("id,label\n1,a\n2,b\n")
    source = read(tmp_path)
    assert {sample.key: sample.data for split in source.splits() for sample in source.samples(split)} == {
        "1": (tmp_path / "train" / "1.jpg").read_bytes(),
        "2": (tmp_path / "train" / "2.jpg").read_bytes(),
    }
    (tmp_path / "train.csv").rename(tmp_path / "labels.csv")
    with pytest.raises(SourceError, match=r"'1' may be test/1\.jpg or train/1\.jpg; write the path of each file"):
        read(tmp_path)


def test_several_tables_are_asked_about_and_class_folders_come_first(tmp_path: Path):
    photographs(tmp_path, ["cat/1.jpg", "cat/2.jpg"])
    for name in ("train_a.csv", "train_b.csv"):
        (tmp_path / name).write_text("file,label\n1.jpg,a\n2.jpg,b\n")
    with pytest.raises(
        SourceError, match=r"several tables, train_a\.csv and train_b\.csv; name the one to read, --data\.path .*train_a\.csv"
    ):
        read(tmp_path)
    photographs(tmp_path, ["dog/3.jpg", "dog/4.jpg"])
    assert read(tmp_path).kind == "folder"


def test_a_table_whose_files_are_where_it_says_keeps_its_identity_and_another_knows_its_former_one(tmp_path: Path):
    photographs(tmp_path, ["images/1.jpg", "images/2.jpg"])
    (tmp_path / "labels.csv").write_text("image,split,label\nimages/1.jpg,train,a\nimages/2.jpg,test,a\n")
    before = read(tmp_path / "labels.csv").identities
    assert len(before) == 1
    (tmp_path / "labels.csv").write_text("image,split,label\nimages/1.jpg,train,a\n2.jpg,test,a\n")
    assert len(read(tmp_path / "labels.csv").identities) == 2


def test_the_columns_can_be_named(tmp_path: Path):
    path = write_table(tmp_path, "where,what,image\n{0},x,7\n{1},y,8\n{2},x,9\n")
    source = read(path, image_column="where", label_column="what")
    assert (source.classes, source.targets[0].name) == (("x", "y"), "what")
    for options, message in (
        ({"image_column": "nowhere"}, r"no column names the image files; .*--data\.image-column NAME"),
        ({"image_column": "where", "label_column": "no"}, "data.label_column names 'no'; the columns of labels in .* are what, image"),
        ({"image_column": "where", "label_column": "what", "targets": "what"}, "both say what is learnt"),
    ):
        with pytest.raises(ValueError, match=message):
            read(path, **options)
    photographs(tmp_path / "folders", ["a/1.jpg", "b/1.jpg"])
    with pytest.raises(SourceError, match=r"data\.label_column='what': class folders have no columns"):
        read(tmp_path / "folders", label_column="what")


def test_splits_are_known_in_any_case(tmp_path: Path):
    path = write_table(tmp_path, "image,split,label\n{0},Train,a\n{1},training,b\n{2},VAL,a\n{3},Testing,b\n")
    assert {split: read(path).count(split) for split in read(path).splits()} == {"train": 2, "validation": 1, "test": 1}
