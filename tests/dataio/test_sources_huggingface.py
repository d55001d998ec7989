"""Claims about Parquet files in the Hugging Face layout."""

import json
import math
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from corpus import encode, picture
from made import former_identity, hf_rows, pixels, read, write_hf

from dataio.schema import Target
from dataio.sources import SourceError


@pytest.mark.parametrize(
    ("image", "label", "below"), [("image", "label", ""), ("img", "fine_label", "data"), ("image", "label", "plain_text")]
)
def test_hugging_face_parquet_is_read_in_the_order_of_files_and_rows(tmp_path: Path, image: str, label: str, below: str):
    names = ["cat", "dog", "emu"]
    for number in (0, 1):
        write_hf(tmp_path / below / f"train-{number:05d}-of-00002.parquet", hf_rows(7, 7 * number), image=image, label=label, names=names)
    write_hf(tmp_path / below / "test-00000-of-00001.parquet", hf_rows(4, 50, paths=True), image=image, label=label, names=names)
    source = read(tmp_path)
    assert (source.kind, source.classes) == ("huggingface", ("cat", "dog", "emu"))
    assert (source.count("train"), source.count("test")) == (14, 4)
    train = list(source.samples("train"))
    assert [sample.key for sample in train] == [f"train-{n:05d}-of-00002/{row:08d}" for n in (0, 1) for row in range(7)]
    assert [sample.label for sample in train] == [index % 3 for index in range(7)] * 2
    assert all(np.array_equal(pixels(sample), picture(index, 4, 4)) for index, sample in enumerate(train))
    assert [sample.key for sample in source.samples("test")] == ["50.png", "51.png", "52.png", "53.png"]
    for start in (0, 3, 6, 7, 8, 14):
        assert list(source.samples("train", start)) == train[start:]


def test_null_images_keep_their_place_with_a_reason(tmp_path: Path):
    rows = hf_rows(6)
    rows[1] = (None, None, 1)
    rows[2] = (None, "elsewhere/2.png", 2)
    rows[4] = (rows[4][0], None, None)
    write_hf(tmp_path / "train-0.parquet", rows, null_structs=(3,))
    write_hf(tmp_path / "test-0.parquet", hf_rows(3))
    samples = list(read(tmp_path).samples("train"))
    assert [sample.refusal for sample in samples] == [
        None,
        "no image: null",
        "no image: the row holds a path, but no bytes",
        "no image: null",
        "bad label: null",
        None,
    ]
    assert [sample.data for sample in samples if sample.refusal is None] == [rows[0][0], rows[5][0]]


def test_validation_is_a_split_of_its_own_and_never_the_test_split(tmp_path: Path):
    names = ["a", "b", "c"]
    write_hf(tmp_path / "train-0.parquet", hf_rows(12), names=names)
    write_hf(tmp_path / "validation-0.parquet", hf_rows(2, 20), names=names)
    write_hf(tmp_path / "dev-0.parquet", hf_rows(2, 25), names=names)
    write_hf(tmp_path / "extra-0.parquet", hf_rows(2, 30), names=names)
    source = read(tmp_path)
    assert source.splits() == ("train", "validation", "test")
    assert [source.count(split) for split in source.splits()] == [9, 2, 3]
    assert [sample.key for sample in source.samples("validation")] == ["validation-0/00000000", "validation-0/00000001"]
    assert {sample.key for split in ("train", "test") for sample in source.samples(split)} == {f"train-0/{row:08d}" for row in range(12)}
    assert set(source.ignored) == {"dev-0.parquet", "extra-0.parquet"}
    files = [tmp_path / "train-0.parquet", tmp_path / "validation-0.parquet"]
    assert source.identities[1:] == (former_identity(tmp_path, files, ""),)
    write_hf(tmp_path / "test-0.parquet", hf_rows(3, 40), names=names)
    source = read(tmp_path)
    assert [source.count(split) for split in source.splits()] == [12, 2, 3]
    assert source.identities[1:] == (former_identity(tmp_path, [tmp_path / "train-0.parquet", tmp_path / "test-0.parquet"], ""),)
    assert [sample.key for sample in source.samples("test")] == [f"test-0/{row:08d}" for row in range(3)]


def test_a_source_of_train_and_test_has_the_identity_that_it_ever_had(tmp_path: Path):
    for name in ("train", "test"):
        write_hf(tmp_path / f"{name}-0.parquet", hf_rows(3))
    files = [tmp_path / "train-0.parquet", tmp_path / "test-0.parquet"]
    assert read(tmp_path).identities == (former_identity(tmp_path, files, ""),)


def test_unlabelled_files_need_no_column_of_labels(tmp_path: Path):
    write_hf(tmp_path / "train-0.parquet", hf_rows(6))
    write_hf(tmp_path / "test-0.parquet", hf_rows(3, 10))
    write_hf(tmp_path / "unlabelled-0.parquet", hf_rows(4, 20), label="something_else")
    source = read(tmp_path)
    assert (source.splits(), source.count("unlabelled")) == (("train", "test", "unlabelled"), 4)
    samples = list(source.samples("unlabelled"))
    assert [(sample.values, sample.refusal) for sample in samples] == [((-1,), None)] * 4
    assert [sample.data for sample in samples] == [row[0] for row in hf_rows(4, 20)]
    write_hf(tmp_path / "test-0.parquet", hf_rows(3, 10), label="something_else")
    with pytest.raises(SourceError, match=r"test-0\.parquet lacks the column 'label'; all files of a source need the same columns"):
        read(tmp_path)


def test_one_parquet_file_is_split_by_class_and_classes_are_numbered_or_taken_from_text(tmp_path: Path):
    rows = [(data, f"{index}.png" if index % 2 else None, ["cat", "ape"][label % 2]) for index, (data, _, label) in enumerate(hf_rows(40))]
    write_hf(tmp_path / "pets.parquet", rows, label_type=pa.string())
    source = read(tmp_path / "pets.parquet")
    train, test = list(source.samples("train")), list(source.samples("test"))
    assert (source.classes, source.targets) == (("ape", "cat"), (Target(name="label", kind="label", classes=("ape", "cat")),))
    assert Counter(sample.label for sample in test) == {0: 3, 1: 5}  # of 13 and 27
    assert (source.count("train"), source.count("test")) == (len(train), len(test))
    assert sorted(sample.key for sample in train + test) == sorted(path or f"pets/{row:08d}" for row, (_, path, _) in enumerate(rows))
    assert all(sample.data in {row[0] for row in rows} for sample in train + test)
    for start in (0, 5, len(train)):
        assert list(source.samples("train", start)) == train[start:]
    assert list(source.samples("test", 2)) == test[2:]
    assert source.identities[1:] == (former_identity(tmp_path, [tmp_path / "pets.parquet"], "0.2"),)
    assert read(tmp_path / "pets.parquet", test_fraction=0.3).identity != source.identity
    write_hf(tmp_path / "numbers.parquet", hf_rows(10))
    assert read(tmp_path / "numbers.parquet").classes == ("0", "1", "2")


def test_validation_is_taken_from_what_test_left(tmp_path: Path):
    write_hf(tmp_path / "all.parquet", hf_rows(60))
    plain, source = read(tmp_path / "all.parquet"), read(tmp_path / "all.parquet", validation_fraction=0.25)
    keys = {split: {sample.key for sample in source.samples(split)} for split in source.splits()}
    assert {split: len(found) for split, found in keys.items()} == {"train": 36, "validation": 12, "test": 12}
    assert keys["test"] == {sample.key for sample in plain.samples("test")}
    assert keys["train"] | keys["validation"] == {sample.key for sample in plain.samples("train")}
    assert source.identities == (source.identity,)


KINDS: dict[str, tuple[Any, list[Any]]] = {
    "kind": (pa.int64(), [0, 1, None, -1, 1]),
    "animal": (pa.string(), ["cat", "dog", None, "cat", "ape"]),
    "tags": (pa.list_(pa.int64()), [[0, 2], [], None, [1], [5]]),
    "words": (pa.large_list(pa.string()), [["b", "a"], [], None, ["a"], ["b", None]]),
    "age": (pa.float64(), [1.5, float("nan"), None, -2.0, float("inf")]),
    "count": (pa.int32(), [3, 7, None, 0, 1]),
    "round": (pa.bool_(), [True, False, None, True, True]),
    "when": (pa.date32(), [None] * 5),
}


def write_kinds(path: Path) -> None:
    images = pa.array([{"bytes": encode(picture(index, 4, 4))} for index in range(5)], pa.struct([("bytes", pa.binary())]))
    features = {
        "kind": {"names": ["x", "y"], "_type": "ClassLabel"},
        "tags": {"feature": {"names": ["p", "q", "r"], "_type": "ClassLabel"}, "_type": "Sequence"},
    }
    table = pa.table({"image": images} | {name: pa.array(cells, kind) for name, (kind, cells) in KINDS.items()})
    for name in ("train", "test"):
        pq.write_table(
            table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})}), path / f"{name}.parquet"
        )


def values_of(path: Path, targets: str) -> list[tuple[Any, str | None]]:
    return [
        (sample.values[0].tolist() if isinstance(sample.values[0], np.ndarray) else sample.values[0], sample.refusal)
        for sample in read(path, targets=targets).samples("train")
    ]


def test_targets_are_columns_of_the_kind_that_their_types_say(tmp_path: Path):
    write_kinds(tmp_path)
    source = read(tmp_path, targets="kind,animal,tags,words,age,count,round")
    assert [(target.name, target.kind, target.classes) for target in source.targets] == [
        ("kind", "label", ("x", "y")),
        ("animal", "label", ("ape", "cat", "dog")),
        ("tags", "labels", ("p", "q", "r")),
        ("words", "labels", ("a", "b")),
        ("age", "number", ()),
        ("count", "label", tuple("01234567")),
        ("round", "label", ("false", "true")),
    ]
    assert source.classes == ("x", "y")
    null = "bad label: null"  # where it is the only target
    assert [len(sample.values) for sample in source.samples("test")] == [7] * 5
    assert values_of(tmp_path, "kind") == [(0, None), (1, None), (-1, null), (-1, None), (1, None)]
    assert values_of(tmp_path, "animal") == [(1, None), (2, None), (-1, null), (1, None), (0, None)]
    assert values_of(tmp_path, "round:label") == [(1, None), (0, None), (-1, null), (1, None), (1, None)]
    unknown = [255, 255, 255]
    assert values_of(tmp_path, "tags") == [
        ([1, 0, 1], None),
        ([0, 0, 0], None),
        (unknown, null),
        ([0, 1, 0], None),
        (unknown, "bad label: tags holds 5, which is not in 0..2"),
    ]
    assert values_of(tmp_path, "words")[4] == ([255, 255], "bad label: words holds None, which is not in 0..1")
    assert repr(values_of(tmp_path, "age")) == repr(
        [(1.5, None), (math.nan, None), (math.nan, null), (-2.0, None), (math.nan, "bad label: age is inf, more than a number can be")]
    )
    assert repr(values_of(tmp_path, "count:number")) == repr([(3.0, None), (7.0, None), (math.nan, null), (0.0, None), (1.0, None)])


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        ("kind,colour", "names 'colour', which is no column of .*its columns are image: struct.*, kind: int64"),
        ("when", r"column 'when' of .* is date32\[day\], which is no target"),
        ("animal:number", "column 'animal' of .* is string, which is no number"),
        ("tags:label", "column 'tags' of .* is list<.*>, which is no label; integers and text are of kind label"),
        ("age:label", "which is no label"),
        ("kind:labels", "which is no labels"),
        ("image", "which is no target"),
    ],
)
def test_a_column_that_is_no_such_target_is_refused_with_the_columns_there_are(tmp_path: Path, targets: str, message: str):
    write_kinds(tmp_path)
    with pytest.raises(SourceError, match=message):
        read(tmp_path, targets=targets)


def test_integers_too_large_to_be_classes_are_refused_before_they_are_counted_out(tmp_path: Path):
    write_hf(tmp_path / "all.parquet", [(b"x", None, 2**60)])
    with pytest.raises(SourceError, match=r"holds 1152921504606846977 classes; a target of kind label has at most 100000"):
        read(tmp_path / "all.parquet")
    write_hf(tmp_path / "all.parquet", [(b"x", None, -1)])
    with pytest.raises(SourceError, match=r"column 'label' of .*all\.parquet holds no label"):
        read(tmp_path / "all.parquet")
    write_hf(tmp_path / "all.parquet", [(b"x", None, 2**64 - 1), *hf_rows(9)], names=["a", "b", "c"], label_type=pa.uint64())
    samples = [sample for split in ("train", "test") for sample in read(tmp_path / "all.parquet").samples(split)]
    assert sorted(sample.label for sample in samples)[-1] == 2**64 - 1  # which convert refuses by name


def test_parquet_without_the_columns_or_damaged_is_a_clear_error(tmp_path: Path):
    pq.write_table(pa.table({"image": [1, 2], "label": [0, 1]}), tmp_path / "train-0.parquet")
    with pytest.raises(SourceError, match=r"no column image or img of struct.*image: int64, label: int64"):
        read(tmp_path)
    write_hf(tmp_path / "train-0.parquet", hf_rows(3), label="mine")
    with pytest.raises(SourceError, match=r"no column label or fine_label.*say which one has the labels: --data\.label-column NAME"):
        read(tmp_path)
    (tmp_path / "train-0.parquet").write_bytes(b"PAR1 and nothing else PAR1")
    with pytest.raises(SourceError, match=r"train-0\.parquet is no readable Parquet file"):
        read(tmp_path)


@pytest.mark.parametrize("listed", [False, True])
def test_names_decide_which_class_a_number_is_in_each_file(tmp_path: Path, listed: bool):
    kind = pa.list_(pa.int64()) if listed else pa.int64()
    for name, names in {"train-0": ["ant", "bee", "cat"], "test-0": ["cat", "bee", "ant"], "validation-0": ["wasp", "ant"]}.items():
        rows = [(encode(picture(number, 4, 4)), None, [number] if listed else number) for number in range(len(names))]
        write_hf(tmp_path / f"{name}.parquet", rows, names=names, label_type=kind)
    source = read(tmp_path, targets="label" if listed else "")
    assert source.classes == ("ant", "bee", "cat", "wasp")

    def found(split: str) -> list[str]:
        values = [sample.values[0] for sample in source.samples(split)]
        return [source.classes[int(value.argmax()) if listed else value] for value in values]

    assert {split: found(split) for split in ("train", "test", "validation")} == {
        "train": ["ant", "bee", "cat"],
        "test": ["cat", "bee", "ant"],
        "validation": ["wasp", "ant"],
    }
    if not listed:
        assert len(source.identities) == 3  # what was converted when numbers were compared is found, and is no conversion made now


def test_a_number_without_a_name_is_refused_in_a_file_of_other_names(tmp_path: Path):
    write_hf(tmp_path / "train-0.parquet", hf_rows(3), names=["ant", "bee", "cat"])
    write_hf(tmp_path / "test-0.parquet", hf_rows(3), names=["cat", "bee"])
    assert [sample.refusal for sample in read(tmp_path).samples("test")] == [None, None, "bad label: 2 is not in 0..1"]


@pytest.mark.parametrize("column", ["label", "target", "class", "mine"])
def test_a_pandas_category_is_a_label_and_its_column_can_be_named(tmp_path: Path, column: str):
    values = pa.array(["dog", "cat", None, "dog"]).dictionary_encode()
    table = pa.table({"image": [encode(picture(number, 4, 4)) for number in range(4)], column: values})
    pq.write_table(table, tmp_path / "train.parquet")
    pq.write_table(table.slice(0, 2), tmp_path / "test.parquet")
    options = {"label_column": "mine"} if column == "mine" else {}
    source = read(tmp_path, **options)
    assert source.targets == (Target(name="label", kind="label", classes=("cat", "dog")),)
    samples = list(source.samples("train"))
    assert [sample.values[0] for sample in samples] == [1, 0, -1, 1]
    assert [sample.refusal for sample in samples] == [None, None, "bad label: null", None]
    if column == "mine":
        with pytest.raises(SourceError, match=r"no column label or fine_label.*mine: dictionary.*--data\.label-column NAME"):
            read(tmp_path)


def test_a_null_is_called_null_where_the_column_was_asked_for_too(tmp_path: Path):
    rows = hf_rows(4)
    rows[2] = (rows[2][0], None, None)
    write_hf(tmp_path / "train-0.parquet", rows)
    write_hf(tmp_path / "test-0.parquet", hf_rows(2))
    assert [sample.refusal for sample in read(tmp_path, targets="label").samples("train")] == [None, None, "bad label: null", None]


def test_the_images_column_can_be_named(tmp_path: Path):
    write_hf(tmp_path / "train-0.parquet", hf_rows(3), image="scan")
    write_hf(tmp_path / "test-0.parquet", hf_rows(3), image="scan")
    with pytest.raises(SourceError, match=r"--data\.image-column NAME"):
        read(tmp_path)
    assert read(tmp_path, image_column="scan").count("train") == 3
    with pytest.raises(SourceError, match="no column label of struct"):
        read(tmp_path, image_column="label")
    with pytest.raises(SourceError, match=r"no column colour of integers or text; its columns are scan: struct.*label: int64"):
        read(tmp_path, image_column="scan", label_column="colour")
