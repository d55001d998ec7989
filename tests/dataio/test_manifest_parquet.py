"""Claims about the manifest and the shards: strict to read, whole or not at all, and no flipped bit goes unnoticed."""

import hashlib
import json
import shutil
import threading
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from corpus import encode, picture
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dataio.manifest import MANIFEST_NAME, Fingerprint, Manifest, ManifestError, SplitInfo
from dataio.parquet import ROWS_PER_GROUP, CorruptShard, Dataset, ShardWriter, Split, open_dataset
from dataio.schema import single_label

COUNTS = {"train": 1300, "test": 5}


def packed(label: int) -> bytes:
    return label.to_bytes(8, "little", signed=True)


def make_dataset(folder: Path, rows_per_shard: int = 1024) -> Dataset:
    """A converted folder with tiny images; sample i of a split has label i % 7 and key split/i."""
    folder.mkdir()
    images = [encode(picture(seed, 3, 3)) for seed in range(5)]
    splits, fingerprint = {}, Fingerprint(single_label(map(str, range(7))))
    for split, count in COUNTS.items():
        shards = []
        for number, begin in enumerate(range(0, count, rows_per_shard)):
            writer = ShardWriter(folder / f"{split}-{number:05d}.parquet")
            for at in range(begin, min(begin + rows_per_shard, count), ROWS_PER_GROUP):
                ids = range(at, min(at + ROWS_PER_GROUP, count))
                data = [images[index % 5] for index in ids]
                hashes = [hashlib.sha256(image).digest() for image in data]
                writer.write_group(data, {"label": [index % 7 for index in ids]}, [f"{split}/{index}" for index in ids], hashes)
                for index, digest in zip(ids, hashes, strict=True):
                    fingerprint.add(split, f"{split}/{index}", packed(index % 7), digest)
            shards.append(writer.close())
        splits[split] = SplitInfo(count=count, shards=tuple(shards))
    manifest = Manifest(
        targets=single_label(map(str, range(7))),
        splits=splits,
        fingerprint=fingerprint.hexdigest(),
        image_sizes={"3x3": sum(COUNTS.values())},
        quarantined=0,
        source="idx",
        identity="0" * 64,
    )
    (folder / MANIFEST_NAME).write_text(manifest.to_json())
    return open_dataset(folder)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "set"
    make_dataset(path)
    return path


def content(dataset: Dataset, name: str) -> list[tuple[bytes, int, str]]:
    rows = []
    for group in range(dataset.split(name).groups):
        read = dataset.split(name).read_group(group)
        rows += [(image.tobytes(), int(label), key) for image, label, key in zip(read.encoded, read.labels, read.keys, strict=True)]
    return rows


def test_what_was_written_is_read_in_order(folder: Path):
    dataset = open_dataset(folder)
    for name, count in COUNTS.items():
        split = dataset.split(name)
        assert split.count == count
        assert content(dataset, name) == [(encode(picture(index % 5, 3, 3)), index % 7, f"{name}/{index}") for index in range(count)]
        assert split.labels().tolist() == [index % 7 for index in range(count)]
        assert split.labels().dtype == np.int64
    assert dataset.split("train").group_offsets.tolist() == [0, 512, 1024, 1300]
    assert dataset.split("test").group_offsets.tolist() == [0, 5]
    assert len(dataset.manifest.splits["train"].shards) == 2
    assert dataset.size_bytes == sum(path.stat().st_size for path in folder.glob("*.parquet"))


def test_images_are_views_of_one_buffer_not_copies(folder: Path):
    encoded = open_dataset(folder).split("train").read_group(0).encoded
    assert not any(view.flags.owndata or view.flags.writeable for view in encoded)
    assert all(view.dtype == np.uint8 and view.flags.c_contiguous for view in encoded)
    addresses = [view.__array_interface__["data"][0] for view in encoded]
    # Where the shard has them: each image follows the four bytes of its length.
    assert all(after - before == len(view) + 4 for before, after, view in zip(addresses, addresses[1:], encoded, strict=False))


def test_files_in_memory_are_the_same_dataset(folder: Path):
    on_disk = open_dataset(folder)
    files = {name: path.read_bytes() for name, path in on_disk.files().items() if isinstance(path, Path)}
    for shipped in (files, {name: pa.py_buffer(data) for name, data in files.items()}):
        in_memory = open_dataset(shipped)
        assert in_memory.manifest == on_disk.manifest
        assert content(in_memory, "train") == content(on_disk, "train")
        assert set(in_memory.files()) == set(on_disk.files())


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.integers(0, COUNTS["train"] - 1), max_size=20))
def test_keys_are_given_for_any_ids_in_any_order(folder: Path, ids: list[int]):
    assert open_dataset(folder).split("train").keys(ids) == [f"train/{index}" for index in ids]


def test_ids_and_groups_out_of_range_are_errors(folder: Path):
    split = open_dataset(folder).split("test")
    with pytest.raises(IndexError, match="0 to 4"):
        split.keys([5])
    with pytest.raises(IndexError, match="0 to 4"):
        split.keys([-1])
    with pytest.raises(IndexError, match="0 to 0"):
        split.read_group(1)
    with pytest.raises(ValueError, match="no split 'val'"):
        open_dataset(folder).split("val")


def test_a_split_can_be_read_by_many_threads_at_once(folder: Path):
    dataset = open_dataset(folder)
    expected = [[view.tobytes() for view in dataset.split("train").read_group(group).encoded] for group in range(3)]
    wrong: list[int] = []

    def read(start: int) -> None:
        for step in range(20):
            group = (start + step) % 3
            if [view.tobytes() for view in dataset.split("train").read_group(group).encoded] != expected[group]:
                wrong.append(group)

    threads = [threading.Thread(target=read, args=(start,)) for start in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


@settings(max_examples=250, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(place=st.integers(0, 2**31), bit=st.integers(0, 7), from_end=st.booleans())
def test_any_flipped_bit_of_a_shard_is_a_corrupt_shard_and_never_other_content(folder: Path, place: int, bit: int, from_end: bool):
    dataset = open_dataset(folder)
    files = {name: path.read_bytes() for name, path in dataset.files().items() if isinstance(path, Path)}
    damaged = bytearray(files["test-00000.parquet"])
    damaged[-1 - place % 600 if from_end else place % len(damaged)] ^= 1 << bit
    files["test-00000.parquet"] = bytes(damaged)
    damaged_set = open_dataset(files)
    try:
        found = content(damaged_set, "test")
    except CorruptShard:
        found = content(dataset, "test")
    assert found == content(dataset, "test")
    with pytest.raises(CorruptShard, match=r"test-00000\.parquet"):
        damaged_set.split("test").verify()
    damaged_set.split("train").verify()


def test_a_damaged_image_page_names_its_shard_and_row_group_and_spares_the_others(folder: Path, tmp_path: Path):
    shutil.copytree(folder, tmp_path / "set")
    shard = tmp_path / "set" / "train-00000.parquet"
    raw = bytearray(shard.read_bytes())
    image = encode(picture(512 % 5, 3, 3))
    group_size = sum(len(encode(picture(index % 5, 3, 3))) + 4 for index in range(512))
    place = raw.index(image, group_size)  # within the second row group's image page
    raw[place + 20] ^= 1
    shard.write_bytes(raw)
    split = open_dataset(tmp_path / "set").split("train")
    with pytest.raises(CorruptShard, match=r"row group 1 of shard .*train-00000\.parquet \(split train\).*CRC"):
        split.read_group(1)
    assert len(split.read_group(0).encoded) == len(split.read_group(0).keys) == 512
    assert split.read_group(2).labels.tolist() == [index % 7 for index in range(1024, 1300)]


def test_a_missing_or_shortened_shard_is_found_when_the_folder_is_opened(folder: Path, tmp_path: Path):
    shutil.copytree(folder, tmp_path / "set")
    shard = tmp_path / "set" / "train-00001.parquet"
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-1])
    with pytest.raises(CorruptShard, match=rf"train-00001\.parquet .* has {len(whole) - 1} bytes instead of {len(whole)}"):
        open_dataset(tmp_path / "set")
    shard.unlink()
    with pytest.raises(CorruptShard, match=r"train-00001\.parquet .* is missing"):
        open_dataset(tmp_path / "set")


def test_a_folder_that_is_not_converted_says_how_to_convert(tmp_path: Path):
    with pytest.raises(ValueError, match=r"no manifest\.json.*python -m dataio\.convert"):
        open_dataset(tmp_path)


def test_a_manifest_survives_its_json(folder: Path):
    manifest = open_dataset(folder).manifest
    assert Manifest.from_json(manifest.to_json()) == manifest


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda value: value.pop("classes"), "lacks \\['classes'\\]"),
        (lambda value: value.update(extra=1), "unknown \\['extra'\\]"),
        (lambda value: value.update(version=2), r"lacks \['targets'\] and has unknown \['classes'\]"),
        (lambda value: value.update(version=4), "version 4, this program reads 1, 2 and 3"),
        (lambda value: value.update(version=True), "version True"),
        (lambda value: value.update(fingerprint="xyz"), "64 hexadecimal"),
        (lambda value: value.update(classes=["a", "a"]), "same class twice"),
        (lambda value: value.update(classes="abc"), "not a list"),
        (lambda value: value.update(image_sizes={"3x3": 1}), "add up"),
        (lambda value: value.update(image_sizes={"big": 1305}), "32x32"),
        (lambda value: value["splits"].pop("test"), "splits"),
        (lambda value: value["splits"]["test"].update(count=6), "add up to 6"),
        (lambda value: value["splits"]["test"]["shards"][0].update(name="../../etc/x.parquet"), "plain name"),
        (lambda value: value["splits"]["test"]["shards"][0].update(name="train-00000.parquet"), "names a shard twice"),
        (lambda value: value["splits"]["test"]["shards"][0].update(row_group_rows=[4]), "add up to 5"),
        (lambda value: value["splits"]["test"]["shards"][0].update(rows=True), "a count"),
    ],
)
def test_a_changed_manifest_is_refused(folder: Path, change, message: str):
    value = json.loads((folder / MANIFEST_NAME).read_text())
    change(value)
    with pytest.raises(ManifestError, match=message):
        Manifest.from_json(json.dumps(value))


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(0, 10**6), st.binary(max_size=4))
def test_any_damage_to_a_manifest_is_a_manifest_error_or_harmless(folder: Path, place: int, new: bytes):
    raw = (folder / MANIFEST_NAME).read_bytes()
    at = place % len(raw)
    try:
        manifest = Manifest.from_json(raw[:at] + new + raw[at + 1 :])
    except ManifestError:
        return
    assert [shard.rows for shard in manifest.splits["train"].shards] == [1024, 276]


def test_the_fingerprint_depends_on_content_and_not_on_sharding(tmp_path: Path):
    one, other = make_dataset(tmp_path / "a", 512), make_dataset(tmp_path / "b", 2048)
    assert one.manifest.splits["train"] != other.manifest.splits["train"]
    assert one.manifest.fingerprint == other.manifest.fingerprint


rows = st.lists(st.tuples(st.text(max_size=3), st.integers(-1, 3), st.binary(min_size=32, max_size=32)), max_size=4)


@settings(max_examples=200, deadline=None)
@given(rows, rows, rows, rows)
def test_different_content_has_a_different_fingerprint(train: list, test: list, other_train: list, other_test: list):
    def fingerprint(train: list, test: list) -> str:
        made = Fingerprint(single_label(["a"]))
        for split, samples in (("train", train), ("test", test)):
            for key, label, digest in samples:
                made.add(split, key, packed(label), digest)
        return made.hexdigest()

    same = (train, test) == (other_train, other_test)
    assert (fingerprint(train, test) == fingerprint(other_train, other_test)) == same


written = st.lists(st.tuples(st.binary(max_size=70_000), st.integers(-(2**63), 2**63 - 1), st.text(max_size=9)), min_size=1, max_size=40)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(groups=st.lists(written, min_size=1, max_size=3), page_bytes=st.sampled_from([1, 100_000, 1 << 20]))
def test_what_is_read_is_what_was_written_and_what_arrow_reads_whatever_the_pages(
    tmp_path_factory: pytest.TempPathFactory, groups: list, page_bytes: int
):
    path = tmp_path_factory.mktemp("written") / "train-00000.parquet"
    with pytest.MonkeyPatch.context() as patch:
        writer_of = pq.ParquetWriter  # pages of other sizes than ours, as another version of Arrow may make them
        patch.setattr(pq, "ParquetWriter", lambda *args, **set: writer_of(*args, **set, data_page_size=page_bytes, write_batch_size=4))
        writer = ShardWriter(path)
        for rows in groups:
            images, labels, keys = zip(*rows, strict=True)
            writer.write_group(images, {"label": labels}, keys, [hashlib.sha256(image).digest() for image in images])
        split = Split("train", [(writer.close(), path)])
    for number, rows in enumerate(groups):
        found = split.read_group(number)
        encoded = [view.tobytes() for view in found.encoded]
        assert list(zip(encoded, found.labels.tolist(), found.keys, strict=True)) == rows
        table = pq.ParquetFile(path).read_row_group(number)
        assert encoded == table["image"].to_pylist()
    assert list(split.content()) == [(key, packed(label), hashlib.sha256(image).digest()) for rows in groups for image, label, key in rows]


def test_a_shard_whose_content_was_swapped_for_another_good_shard_is_found(folder: Path):
    dataset = open_dataset(folder)
    info = dataset.manifest.splits["train"].shards
    split = Split("train", [(info[1], folder / info[0].name)])
    with pytest.raises(CorruptShard, match="footer's SHA-256"):
        split.read_group(0)
