"""Data sets of several targets and of any splits: written, read and served as given; those of one label exactly as they always were."""

import hashlib
import json
import struct
import zlib
from collections.abc import Iterator, Mapping
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from corpus import encode, picture
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dataio.config import DataConfig
from dataio.conversion import conversion_identities, convert
from dataio.known_good import RULES_NAME
from dataio.loader import Loader
from dataio.manifest import MANIFEST_NAME, Fingerprint, Manifest, ManifestError, SplitInfo
from dataio.order import Order, blocks_of_virtual_ranks
from dataio.parquet import CorruptShard, Dataset, ShardWriter, Split, open_dataset
from dataio.prepared import prepare
from dataio.quarantine import BadSample
from dataio.reading import READING_NAME, REPEATS_NAME
from dataio.schema import Target, single_label
from dataio.sources import Sample
from dataio.values import measured

SPECIES = Target(name="species", kind="label", classes=("ant", "bee", "cat"))
TAGS = Target(name="tags of größe", kind="labels", classes=("wet", "old", "red", "big"))
AGE = Target(name="age", kind="number")
MIXED = (SPECIES, TAGS, AGE)
TINY = [encode(picture(seed, 2, 2)) for seed in range(16)]


class Given:
    """A source of the given splits: of each, the values of its samples."""

    kind, ignored, identity = "given", (), "given"
    held_out: ClassVar = {}

    def __init__(self, targets: tuple[Target, ...], splits: Mapping[str, list[tuple[Any, ...]]]) -> None:
        self.targets, self._splits = targets, splits
        self.classes, self.identities = targets[0].classes, (self.identity,)

    def splits(self) -> tuple[str, ...]:
        return tuple(self._splits)

    def count(self, split: str) -> int | None:
        return len(self._splits[split])

    def samples(self, split: str, start: int = 0) -> Iterator[Sample]:
        for index, values in enumerate(self._splits[split][start:], start=start):
            yield Sample(key=f"{split}/{index}", data=TINY[index % 16], values=values)


def run(source: Any, dest: Path) -> Dataset:
    convert(source, dest, max_bad_fraction=0.9, max_image_pixels=1000)
    return open_dataset(dest)


def flags(*values: int) -> np.ndarray:
    return np.array(values, np.uint8)


def some(count: int, seed: int = 0) -> list[tuple[Any, ...]]:
    """Values of MIXED, some of them unknown, one of them always known."""
    rng = np.random.default_rng(seed)
    rows = []
    for index in range(count):
        age = float("nan") if index % 5 == 1 else float(rng.normal(40, 10))
        tags = rng.choice(np.array([0, 1, 255], np.uint8), 4)
        rows.append((index % 3 if index % 4 else -1, tags, age if index % 4 or index % 5 != 1 else 7.0))
    return rows


# --- one label a sample: pinned by the code before there were targets -----------------------------------------------------------------


def plain_png(seed: int) -> bytes:
    """1x2 pixels in a stored zlib stream: the same bytes under any zlib."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    row = bytes([0, *(37 * seed + 11 * k & 255 for k in range(6))])
    stored = b"\x78\x01\x01" + struct.pack("<HH", len(row), len(row) ^ 0xFFFF) + row + struct.pack(">I", zlib.adler32(row))
    header = struct.pack(">IIBBBBB", 2, 1, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", stored) + chunk(b"IEND", b"")


class Pinned(Given):
    """One label; some images are empty, some labels out of range, some keys repeated."""

    kind, identity = "memory", "pinned"

    def __init__(self) -> None:
        super().__init__(single_label(("ant", "bée", "cat")), {"train": [()] * 700, "test": [()] * 40})

    def samples(self, split: str, start: int = 0) -> Iterator[Sample]:
        for i in range(start, self.count(split) or 0):
            label = -1 if i % 101 == 7 else i % 3
            yield Sample(key=f"k{i % 650}", data=b"" if i % 97 == 5 else plain_png(i), values=(label,))


@pytest.fixture(scope="module")
def pinned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    dest = tmp_path_factory.mktemp("pinned") / "data"
    convert(Pinned(), dest, max_bad_fraction=0.5, max_image_pixels=1000, shard_bytes=50_000)
    return dest


def test_data_of_one_label_have_the_fingerprint_identity_and_quarantine_that_they_always_had(pinned: Path) -> None:
    value = json.loads((pinned / MANIFEST_NAME).read_text())
    assert list(value) == ["classes", "splits", "fingerprint", "image_sizes", "quarantined", "source", "identity", "version"]
    assert value["version"] == 1
    assert value["fingerprint"] == "010d42893f54b7747df82380a58df0a590be89a6752e0263d71f23c12e3fd48d"
    assert value["identity"] == "1f567518122696b6139a4a71fa096f9460b2d3ea5aea17ce24848824775d54f0"
    assert value["image_sizes"] == {"1x2": 723}
    assert (
        hashlib.sha256((pinned / "quarantine.jsonl").read_bytes()).hexdigest()
        == "e5de1fd567673789fe12eaf22921942aacd7c9ca0648edae372a4537728b3b68"
    )
    schema = pq.read_schema(pinned / "test-00000.parquet")
    assert [(field.name, str(field.type)) for field in schema] == [
        ("image", "binary"),
        ("label", "int64"),
        ("key", "string"),
        ("sha256", "fixed_size_binary[32]"),
    ]


@pytest.mark.skipif(pa.__version__ != "26.0.1", reason="a shard's footer names the Arrow that wrote it, and the pins are Arrow 26.0.1's")
def test_data_of_one_label_are_written_byte_for_byte_as_they_always_were(pinned: Path) -> None:
    told = (READING_NAME, REPEATS_NAME, RULES_NAME)  # beside the data, since this version
    assert {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in pinned.iterdir() if path.name not in told} == {
        "manifest.json": "f03d839b9c80c49992be5d904921cd27b4e4f8e9b3404af0cd3c8e4300b10e47",
        "quarantine.jsonl": "e5de1fd567673789fe12eaf22921942aacd7c9ca0648edae372a4537728b3b68",
        "test-00000.parquet": "df53e47e8973855f68b0b2bc06480d6970661c0873d3fd4ec5d63e7a188f2852",
        "train-00000.parquet": "abb7b2ff55b4ce0ac743e8802b45e082ef4003ddecae953ef3dd45df2412b512",
        "train-00001.parquet": "883761913ee21fca61aa69ee7be9e2add56dbd0301ae5ad1784d3bf94261ae78",
    }


def test_a_manifest_of_version_1_is_written_back_as_it_was_read(pinned: Path) -> None:
    text = (pinned / MANIFEST_NAME).read_text()
    manifest = Manifest.from_json(text)
    assert manifest.to_json() == text
    assert manifest.targets == single_label(("ant", "bée", "cat"))
    assert manifest.classes == ("ant", "bée", "cat")


# --- any targets: written and read ---------------------------------------------------------------------------------------------------

names = st.text(st.characters(exclude_categories=("C", "Z")), min_size=1, max_size=12)
classes = st.integers(1, 5).map(lambda count: tuple(map(str, range(count))))
targets_of = st.lists(
    st.one_of(
        st.builds(Target, name=names, kind=st.just("label"), classes=classes),
        st.builds(Target, name=names, kind=st.just("labels"), classes=classes),
        st.builds(Target, name=names, kind=st.just("number")),
    ),
    min_size=1,
    max_size=4,
    unique_by=lambda target: target.name,
).map(tuple)


def column(draw: st.DrawFn, target: Target, count: int) -> np.ndarray:
    match target.kind:
        case "label":
            value: Any = st.integers(-1, len(target.classes) - 1)
        case "labels":
            value = st.lists(st.sampled_from([0, 1, 255]), min_size=len(target.classes), max_size=len(target.classes))
        case "number":
            value = st.floats(width=32, allow_infinity=False)
    return np.array(draw(st.lists(value, min_size=count, max_size=count)), target.dtype)


@st.composite
def written(draw: st.DrawFn) -> tuple[tuple[Target, ...], list[dict[str, np.ndarray]]]:
    targets = draw(targets_of)
    counts = draw(st.lists(st.integers(1, 9), min_size=1, max_size=3))
    return targets, [{target.name: column(draw, target, count) for target in targets} for count in counts]


def write(path: Path, targets: tuple[Target, ...], groups: list[dict[str, np.ndarray]]) -> SplitInfo:
    writer = ShardWriter(path, targets)
    for number, columns in enumerate(groups):
        rows = range(len(next(iter(columns.values()))))
        data = [TINY[row] for row in rows]
        writer.write_group(data, columns, [f"{number}/{row}" for row in rows], [hashlib.sha256(each).digest() for each in data])
    shard = writer.close()
    return SplitInfo(count=shard.rows, shards=(shard,))


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(of=written(), page_bytes=st.sampled_from([1, 1 << 20]))
def test_what_is_read_is_what_was_written_whatever_the_targets_and_the_pages(
    tmp_path_factory: pytest.TempPathFactory, of: tuple[tuple[Target, ...], list[dict[str, np.ndarray]]], page_bytes: int
) -> None:
    targets, groups = of
    path = tmp_path_factory.mktemp("written") / "train-00000.parquet"
    with pytest.MonkeyPatch.context() as patch:
        writer_of = pq.ParquetWriter
        patch.setattr(pq, "ParquetWriter", lambda *args, **set: writer_of(*args, **set, data_page_size=page_bytes, write_batch_size=4))
        info = write(path, targets, groups)
    split = Split("train", [(shard, path) for shard in info.shards], targets)
    whole = split.targets()
    assert list(whole) == [target.name for target in targets]
    for number, columns in enumerate(groups):
        found = split.read_group(number).targets
        for target in targets:
            assert found[target.name].dtype == target.dtype
            assert found[target.name].tobytes() == columns[target.name].tobytes()  # bit for bit, NaN too
    for target in targets:
        expected = np.concatenate([columns[target.name] for columns in groups])
        assert np.array_equal(whole[target.name], expected, equal_nan=target.kind == "number")
        assert whole[target.name].dtype == target.dtype
    values = [value for _, value, _ in split.content()]
    rows = [(columns, row) for columns in groups for row in range(len(columns[targets[0].name]))]
    assert values == [b"".join(columns[target.name][row].tobytes() for target in targets) for columns, row in rows]


def test_labels_are_views_of_the_row_groups_buffer(tmp_path: Path) -> None:
    rows = np.arange(40, dtype=np.uint8).reshape(10, 4) % 2
    info = write(tmp_path / "train-00000.parquet", (TAGS,), [{TAGS.name: rows}])
    found = Split("train", [(info.shards[0], tmp_path / "train-00000.parquet")], (TAGS,)).read_group(0).targets[TAGS.name]
    assert not found.flags.owndata
    assert not found.flags.writeable
    assert np.array_equal(found, rows)


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(place=st.integers(0, 2**31), bit=st.integers(0, 7))
def test_any_flipped_bit_is_a_corrupt_shard_and_never_another_value(mixed: Path, place: int, bit: int) -> None:
    dataset = open_dataset(mixed)
    expected = {name: column.tobytes() for name, column in dataset.split("test").targets().items()}
    files = {name: path.read_bytes() for name, path in dataset.files().items() if isinstance(path, Path)}
    damaged = bytearray(files["test-00000.parquet"])
    damaged[place % len(damaged)] ^= 1 << bit
    split = open_dataset({**files, "test-00000.parquet": bytes(damaged)}).split("test")
    try:
        found = {name: column.tobytes() for name, column in split.targets().items()}
    except CorruptShard:
        found = expected
    assert found == expected


@pytest.mark.parametrize(
    ("target", "values", "message"),
    [
        (SPECIES, np.array([0, 3]), r"a label is not in -1\.\.2 \(column target\.species\)"),
        (SPECIES, np.array([-2, 0]), r"a label is not in -1\.\.2"),
        (TAGS, np.array([[0, 1, 2, 0]], np.uint8), "a label is neither 0, 1 nor 255"),
        (AGE, np.array([np.inf], np.float32), "a number is infinite"),
    ],
)
def test_a_column_of_values_that_its_kind_does_not_have_is_corrupt(tmp_path: Path, target: Target, values: Any, message: str) -> None:
    info = write(tmp_path / "train-00000.parquet", (target,), [{target.name: values}])
    split = Split("train", [(info.shards[0], tmp_path / "train-00000.parquet")], (target,))
    with pytest.raises(CorruptShard, match=message):
        split.targets()
    with pytest.raises(CorruptShard, match=message):
        split.read_group(0)


@pytest.mark.parametrize("other", [(AGE,), (SPECIES, AGE), (AGE, TAGS), (replace(TAGS, name="other"), AGE), single_label("ab")])
def test_a_shard_of_other_targets_than_the_manifests_is_corrupt(tmp_path: Path, other: tuple[Target, ...]) -> None:
    info = write(tmp_path / "train-00000.parquet", (TAGS, AGE), [{TAGS.name: np.ones((2, 4), np.uint8), "age": np.ones(2, np.float32)}])
    with pytest.raises(CorruptShard):
        Split("train", [(info.shards[0], tmp_path / "train-00000.parquet")], other).targets()


# --- converted, and described by a manifest of version 2 ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    dest = tmp_path_factory.mktemp("mixed") / "data"
    unlabelled = [(-1, flags(255, 255, 255, 255), float("nan"))] * 30
    run(Given(MIXED, {"test": some(20, 1), "unlabelled": unlabelled, "train": some(90), "validation": some(25, 2)}), dest)
    return dest


def test_a_conversion_keeps_all_splits_and_values_and_says_so(mixed: Path) -> None:
    manifest = open_dataset(mixed).manifest
    assert (manifest.version, list(manifest.splits)) == (2, ["train", "validation", "test", "unlabelled"])
    assert [replace(target, mean=0.0, std=1.0) for target in manifest.targets] == list(MIXED)
    assert manifest.classes == ()  # two targets have some
    assert "classes" not in json.loads((mixed / MANIFEST_NAME).read_text())
    for name, rows in (("train", some(90)), ("validation", some(25, 2)), ("test", some(20, 1))):
        found = open_dataset(mixed).split(name).targets()
        assert found["species"].tolist() == [row[0] for row in rows]
        assert np.array_equal(found[TAGS.name], np.stack([row[1] for row in rows]))
        assert np.array_equal(found["age"], np.array([row[2] for row in rows], np.float32), equal_nan=True)
    with pytest.raises(ValueError, match="not one label a sample; its targets are species, tags of größe, age"):
        open_dataset(mixed).split("train").labels()


def test_the_mean_and_deviation_of_a_number_are_those_of_the_training_split(mixed: Path) -> None:
    age = open_dataset(mixed).manifest.targets[2]
    known = np.array([row[2] for row in some(90)], np.float32).astype(np.float64)
    known = known[~np.isnan(known)]
    assert age.mean == pytest.approx(known.mean(), rel=1e-14)
    assert age.std == pytest.approx(known.std(), rel=1e-14)


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(values=st.lists(st.floats(width=32, allow_infinity=False, allow_nan=False), min_size=1, max_size=30), cut=st.integers(1, 30))
def test_the_measures_of_a_number_do_not_depend_on_the_sharding(
    tmp_path_factory: pytest.TempPathFactory, values: list[float], cut: int
) -> None:
    folder = tmp_path_factory.mktemp("measured")
    column = np.array(values, np.float32)
    found = []
    for number, groups in enumerate(([column], [column[:cut], column[cut:]] if cut < len(column) else [column])):
        path = folder / f"train-{number:05d}.parquet"
        writer = ShardWriter(path, (AGE,))
        for group in groups:
            writer.write_group([b"x"] * len(group), {"age": group}, ["k"] * len(group), [bytes(32)] * len(group))
        found.append(measured(AGE, Split("train", [(writer.close(), path)], (AGE,))))
    assert found[0] == found[1]
    assert found[0].std > 0


def test_a_target_of_which_training_knows_nothing_is_an_error(tmp_path: Path) -> None:
    rows = [(index % 3, flags(0, 1, 0, 1), float("nan")) for index in range(9)]
    with pytest.raises(ValueError, match="no training sample has a value of the target 'age'"):
        run(Given(MIXED, {"train": rows, "test": some(9)}), tmp_path / "dest")


def test_bad_values_are_quarantined_with_the_target_and_the_rule(tmp_path: Path) -> None:
    unknown = (-1, flags(255, 255, 255, 255), float("nan"))
    rows = [
        *some(10),
        (3, flags(0, 0, 0, 0), 1.0),
        (0, flags(0, 0, 9, 0), 1.0),
        (0, flags(0, 0, 0, 0), float("inf")),
        unknown,
    ]
    run(Given(MIXED, {"train": rows, "test": some(9)}), tmp_path / "dest")
    lines = (tmp_path / "dest" / "quarantine.jsonl").read_text().splitlines()
    found = [BadSample.from_json(json.loads(line)) for line in lines]
    assert [(bad.key, bad.kind) for bad in found] == [(f"train/{index}", "bad label") for index in range(10, 14)]
    assert found[0].reason == "bad label: species: 3 is not in 0..2"
    assert found[1].reason.startswith("bad label: tags of größe: ")
    assert found[2].reason == "bad label: age: inf is no finite number of 32 bits"
    assert found[3].reason == "bad label: no target is known"


def test_one_label_with_a_validation_split_is_version_2_and_has_three_splits(tmp_path: Path) -> None:
    rows = [(index % 3,) for index in range(12)]
    dataset = run(Given(single_label("abc"), {"train": rows, "test": rows[:5], "validation": rows[:4]}), tmp_path / "dest")
    manifest = dataset.manifest
    assert (manifest.version, list(manifest.splits), manifest.classes) == (2, ["train", "validation", "test"], ("a", "b", "c"))
    assert dataset.split("validation").labels().tolist() == [0, 1, 2, 0]
    assert json.loads((tmp_path / "dest" / MANIFEST_NAME).read_text())["version"] == 2


@pytest.mark.parametrize(
    ("splits", "message"),
    [
        (("test",), "none to train on"),
        (("train", "test", "dev"), "there is a split 'dev'"),
    ],
)
def test_splits_without_which_nothing_can_be_trained_are_refused(tmp_path: Path, splits: tuple[str, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        run(Given(single_label("abc"), {split: [(0,)] for split in splits}), tmp_path / "dest")
    assert list(tmp_path.iterdir()) == []


def test_a_split_that_is_not_there_is_an_error_that_names_those_that_are(tmp_path: Path) -> None:
    rows = [(index % 3,) for index in range(12)]
    dataset = run(Given(single_label("abc"), {"train": rows, "validation": rows[:5]}), tmp_path / "dest")
    with pytest.raises(ValueError, match="there is no split 'test'; the data set has train, validation"):
        list(make(dataset).evaluate("test", range(2), 1))
    assert [batch.targets["label"].tolist() for batch in make(dataset).evaluate("validation", range(5), 5)] == [[0, 1, 2, 0, 1]]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda value: value.update(version=1), r"lacks \['classes'\] and has unknown \['targets'\]"),
        (lambda value: value["targets"].pop(1), None),
        (lambda value: value["targets"].clear(), "0 targets"),
        (lambda value: value["targets"].append(value["targets"][0]), "two targets named 'species'"),
        (lambda value: value["targets"][0].pop("std"), "not an object of name, kind, classes, mean, std"),
        (lambda value: value["targets"][0].update(kind="text"), "not one of label, labels, number"),
        (lambda value: value["targets"][0].update(kind=["label"]), "not one of label, labels, number"),
        (lambda value: value["targets"][0].update(name=3), "not text"),
        (lambda value: value["targets"][0].update(classes=[]), "has 0 classes"),
        (lambda value: value["targets"][0].update(classes=["a", "a"]), "same class twice"),
        (lambda value: value["targets"][2].update(std=0), "std 0.0"),
        (lambda value: value["targets"][2].update(mean=True), "not a number"),
        (lambda value: value["targets"][2].update(mean=10**400), "not a number"),
        (lambda value: value["targets"][2].update(mean=float("nan")), "mean nan"),
        (lambda value: value["splits"].update(dev=value["splits"].pop("test")), "there is a split 'dev'"),
        (lambda value: value["splits"].pop("train"), "none to train on"),
        (lambda value: value.update(targets={}), "not a list"),
    ],
)
def test_a_changed_manifest_of_version_2_is_refused(mixed: Path, change: Any, message: str | None) -> None:
    value = json.loads((mixed / MANIFEST_NAME).read_text())
    change(value)
    if message is None:  # a manifest of fewer targets is one, and then its shards are not
        files = {name: path.read_bytes() for name, path in open_dataset(mixed).files().items() if isinstance(path, Path)}
        with pytest.raises(CorruptShard, match="its columns are"):
            open_dataset({**files, MANIFEST_NAME: json.dumps(value).encode()}).split("train").targets()
        return
    with pytest.raises(ManifestError, match=message):
        Manifest.from_json(json.dumps(value))


def test_what_version_1_can_say_is_not_said_in_version_2(pinned: Path) -> None:
    value = json.loads((pinned / MANIFEST_NAME).read_text())
    target = {"name": "label", "kind": "label", "classes": value.pop("classes"), "mean": 0.0, "std": 1.0}
    with pytest.raises(ManifestError, match="has version 2, its targets and splits are those of 1"):
        Manifest.from_json(json.dumps({**value, "version": 2, "targets": [target]}))


def test_a_manifest_of_version_2_survives_its_json(mixed: Path) -> None:
    manifest = open_dataset(mixed).manifest
    assert Manifest.from_json(manifest.to_json()) == manifest
    assert (mixed / MANIFEST_NAME).read_text() == manifest.to_json()


@settings(max_examples=100, deadline=None)
@given(one=written(), other=written())
def test_different_targets_or_values_have_different_fingerprints(
    one: tuple[tuple[Target, ...], list[dict[str, np.ndarray]]], other: tuple[tuple[Target, ...], list[dict[str, np.ndarray]]]
) -> None:
    def described(of: tuple[tuple[Target, ...], list[dict[str, np.ndarray]]]) -> tuple[list[bytes], str]:
        targets, groups = of
        values = [
            b"".join(columns[target.name][row].tobytes() for target in targets)
            for columns in groups
            for row in range(len(columns[targets[0].name]))
        ]
        made = Fingerprint(targets)
        for number, value in enumerate(values):
            made.add("train", str(number), value, bytes(32))
        return values, made.hexdigest()

    (values, fingerprint), (other_values, other_fingerprint) = described(one), described(other)
    assert ((one[0], values) == (other[0], other_values)) == (fingerprint == other_fingerprint)


# --- a source whose rules changed ---------------------------------------------------------------------------------------------------


class Changed(Given):
    """One label, read by a new rule since: `identities` names the old one behind it."""

    def __init__(self, *identities: str) -> None:
        rows = [(index % 3,) for index in range(12)]
        super().__init__(single_label("abc"), {"train": rows, "test": rows[:5]})
        self.identity, self.identities = identities[0], identities


def test_a_conversion_made_by_an_older_rule_is_found_and_used_and_a_new_one_is_made_by_the_newest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = DataConfig(path="somewhere", root=str(tmp_path / "root"), max_bad_fraction=0.5)
    opened = ["old"]
    monkeypatch.setattr("dataio.prepared.open_source", lambda *_, **__: Changed(*opened))
    old = prepare(config)
    opened[:] = ["new", "old"]
    assert prepare(config) == old
    (old / "train-00000.parquet").unlink()  # no longer intact
    new = prepare(config)
    assert new != old
    assert prepare(config) == new
    opened[:] = ["newest", "new", "old"]
    assert prepare(config) == new
    opened[:] = ["another"]
    assert prepare(config) not in (old, new)


def test_a_destination_converted_by_an_older_rule_is_taken_as_it_is_and_another_sources_is_not(tmp_path: Path) -> None:
    first = run(Changed("old"), tmp_path / "dest").manifest
    assert run(Changed("new", "old"), tmp_path / "dest").manifest == first
    with pytest.raises(ValueError, match="is not this source"):
        run(Changed("new", "older"), tmp_path / "dest")
    fresh = run(Changed("new", "old"), tmp_path / "fresh").manifest
    assert fresh.identity == conversion_identities(Changed("new"), 1000)[0] != first.identity


# --- the loader -----------------------------------------------------------------------------------------------------------------------


def make(
    dataset: Dataset, *, cache: str = "host", virtual_ranks: int = 1, ranks: range | None = None, bad: list[BadSample] | None = None
) -> Loader:
    order = Order(
        seed=5, fingerprint=dataset.manifest.fingerprint, count=dataset.split("train").count, batch_size=12, virtual_ranks=virtual_ranks
    )
    return Loader(
        dataset,
        DataConfig(cache=cache, pad=0),  # type: ignore[arg-type]
        order=order,
        virtual_ranks=range(virtual_ranks) if ranks is None else ranks,
        device=torch.device("cpu"),
        seed=5,
        on_bad=(lambda sample: pytest.fail(str(sample))) if bad is None else bad.append,
        memory_bytes=1 << 30,
    )


def served(loader: Loader, steps: int) -> dict[int, tuple[bytes, ...]]:
    """By sample: the bytes of its targets, in the order of the manifest."""
    found: dict[int, tuple[bytes, ...]] = {}
    with closing(loader.train(0, steps)) as batches:
        for step in batches:
            for batch in step:
                for place, sample in enumerate(batch.ids.tolist()):
                    found[sample] = tuple(batch.targets[target.name][place].numpy().tobytes() for target in loader.targets)
    return found


@pytest.mark.parametrize("cache", ["host", "none"])
@pytest.mark.parametrize(("virtual_ranks", "workers"), [(1, 1), (3, 1), (4, 3), (6, 2)])
def test_each_sample_has_its_targets_whatever_the_cache_and_however_many_virtual_ranks(
    mixed: Path, cache: str, virtual_ranks: int, workers: int
) -> None:
    dataset = open_dataset(mixed)
    stored = dataset.split("train").targets()
    expected = {i: tuple(stored[target.name][i].tobytes() for target in MIXED) for i in range(90)}
    found: dict[int, tuple[bytes, ...]] = {}
    for rank in range(workers):
        ranks = blocks_of_virtual_ranks(virtual_ranks, workers, rank)
        loader = make(dataset, cache=cache, virtual_ranks=virtual_ranks, ranks=ranks)
        found |= served(loader, loader._order.steps_per_epoch)
    assert found == expected


@pytest.mark.parametrize("cache", ["host", "none"])
def test_evaluation_shows_all_targets_of_any_split(mixed: Path, cache: str) -> None:
    dataset = open_dataset(mixed)
    loader = make(dataset, cache=cache)
    for name in dataset.manifest.splits:
        split = dataset.split(name)
        batches = list(loader.evaluate(name, range(split.count), 8))
        for target in MIXED:
            shown = torch.cat([batch.targets[target.name] for batch in batches]).numpy()
            assert shown.dtype == target.dtype
            assert np.array_equal(shown, split.targets()[target.name], equal_nan=target.kind == "number")


@pytest.mark.parametrize("cache", ["host", "none"])
def test_of_a_sample_that_cannot_be_decoded_no_target_is_known(tmp_path: Path, cache: str) -> None:
    info = {}
    for split in ("train", "test"):
        writer = ShardWriter(tmp_path / f"{split}-00000.parquet", MIXED)
        values = {"species": np.ones(16, np.int64), TAGS.name: np.ones((16, 4), np.uint8), "age": np.ones(16, np.float32)}
        data = [b"no image" if split == "train" and index in (3, 9) else TINY[index] for index in range(16)]
        writer.write_group(data, values, [f"{split}/{index}" for index in range(16)], [bytes(32)] * 16)
        info[split] = SplitInfo(count=16, shards=(writer.close(),))
    manifest = Manifest(
        targets=MIXED, splits=info, fingerprint="ab" * 32, image_sizes={"2x2": 32}, quarantined=0, source="x", identity="cd" * 32
    )
    (tmp_path / MANIFEST_NAME).write_text(manifest.to_json())
    bad: list[BadSample] = []
    loader = make(open_dataset(tmp_path), cache=cache, bad=bad)
    whole = [np.int64(1).tobytes(), np.ones(4, np.uint8).tobytes(), np.float32(1).tobytes()]
    missing = [np.int64(-1).tobytes(), np.full(4, 255, np.uint8).tobytes(), np.float32("nan").tobytes()]
    assert served(loader, 2) == {index: tuple(missing if index in (3, 9) else whole) for index in range(16)}
    assert sorted(sample.sample_id for sample in bad) == [3, 9]
