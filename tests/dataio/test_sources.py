"""Claims about the sources: each kind is read exactly, damage and attacks are refused by name, and what cannot be read lists what can."""

import gzip
import io
import json
import os
import pickle
import struct
import tarfile
from pathlib import Path
from typing import Any
from urllib.error import URLError

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from corpus import encode, picture, pillow
from hypothesis import given, settings
from hypothesis import strategies as st

from dataio import sources
from dataio.sources import Balanced, Sample, SourceError, held_out, hostile, load_cifar_pickle, open_source
from dataio.sources.hostile import CIFAR_TRAIN

CIFAR_CLASSES = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]


def read(path: Path | str, **options: Any) -> sources.Source:
    return open_source(str(path), **({"root": Path("/nonexistent"), "test_fraction": 0.2} | options))


def pixels(sample: Sample) -> np.ndarray:
    return pillow(sample.data)


# CIFAR


def cifar_content(name: str, count: int = 6, *, filenames: bool = True) -> dict[str, Any]:
    rng = np.random.default_rng(sum(name.encode()))
    content: dict[str, Any] = {
        "batch_label": name,
        "labels": [int(label) for label in rng.integers(0, 10, count)],
        "data": rng.integers(0, 256, (count, 3072)).astype(np.uint8),
    }
    return content | ({"filenames": [f"{name}_{index}.png" for index in range(count)]} if filenames else {})


def python2_pickle(content: dict[str, Any]) -> bytes:
    """The bytes that Python 2 and numpy 1 wrote for the real archive: protocol 2, texts as byte strings."""

    def text(value: str) -> bytes:
        return b"U" + bytes([len(value)]) + value.encode()

    def integer(value: int) -> bytes:
        return b"K" + bytes([value]) if value < 256 else b"M" + struct.pack("<H", value)

    def value(item: Any) -> bytes:
        if isinstance(item, str):
            return text(item)
        if isinstance(item, int):
            return integer(item)
        if isinstance(item, list):
            return b"]q\x05(" + b"".join(value(part) for part in item) + b"e"
        raw = item.tobytes()
        shape = b"".join(integer(side) for side in item.shape) + b"\x86"
        dtype = b"cnumpy\ndtype\n" + text("u1") + b"K\0K\1\x87R(K\3" + text("|") + b"NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\0tb"
        empty = b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\0\x85" + text("b") + b"\x87R"
        return empty + b"(K\1" + shape + dtype + b"\x89T" + struct.pack("<I", len(raw)) + raw + b"tb"

    return b"\x80\x02}q\x01(" + b"".join(text(key) + value(item) for key, item in content.items()) + b"u."


def cifar_members(dump: Any = python2_pickle, **options: Any) -> dict[str, bytes]:
    members = {name: dump(cifar_content(name, **options)) for name in (*CIFAR_TRAIN, "test_batch")}
    return members | {"batches.meta": dump({"num_cases_per_batch": 6, "label_names": CIFAR_CLASSES, "num_vis": 3072})}


def write_tar(path: Path, members: dict[str, bytes], extra: list[tarfile.TarInfo] | None = None, mode: str = "w:gz") -> Path:
    with tarfile.open(path, mode) as archive:
        for name in reversed(members):  # the real archive is in no order either
            info = tarfile.TarInfo(f"cifar-10-batches-py/{name}")
            info.size = len(members[name])
            archive.addfile(info, io.BytesIO(members[name]))
        for info in extra or []:
            archive.addfile(info, io.BytesIO(bytes(info.size)) if info.size else None)
    return path


def check_cifar(source: sources.Source, *, keys: bool = True) -> None:
    assert source.classes == tuple(CIFAR_CLASSES)
    for split, names in (("train", CIFAR_TRAIN), ("test", ("test_batch",))):
        expected = [(name, index) for name in names for index in range(6)]
        samples = list(source.samples(split))
        assert source.count(split) == len(samples) == len(expected)
        for sample, (name, index) in zip(samples, expected, strict=True):
            content = cifar_content(name)
            assert sample.key == (f"{name}_{index}.png" if keys else f"{name}/{index:05d}")
            assert sample.label == content["labels"][index]
            assert np.array_equal(pixels(sample), content["data"][index].reshape(3, 32, 32).transpose(1, 2, 0))


def python3_pickle(protocol: int) -> Any:
    return lambda content: pickle.dumps(content, protocol=protocol)


@pytest.mark.parametrize("dump", [python2_pickle, *map(python3_pickle, range(6))], ids=["python2", *map(str, range(6))])
def test_a_cifar_archive_is_read_exactly_whatever_python_wrote_it(tmp_path: Path, dump: Any):
    source = read(write_tar(tmp_path / "cifar-10-python.tar.gz", cifar_members(dump)))
    assert source.kind == "cifar-tar"
    check_cifar(source)


def test_a_plain_tar_the_folder_of_batches_and_their_parent_are_the_same_images(tmp_path: Path):
    members = cifar_members()
    batches = tmp_path / "cifar-10-batches-py"
    batches.mkdir()
    for name, raw in members.items():
        (batches / name).write_bytes(raw)
    check_cifar(read(batches))
    check_cifar(read(tmp_path))
    check_cifar(read(write_tar(tmp_path / "cifar.tar", members, mode="w")))


def test_keys_are_batch_and_index_where_file_names_are_missing_or_repeated(tmp_path: Path):
    check_cifar(read(write_tar(tmp_path / "a.tar.gz", cifar_members(filenames=False))), keys=False)
    members = cifar_members()
    members["data_batch_2"] = python2_pickle(cifar_content("data_batch_2") | {"filenames": ["same.png"] * 6})
    keys = [sample.key for sample in read(write_tar(tmp_path / "b.tar.gz", members)).samples("train")]
    assert keys == [f"{name}/{index:05d}" for name in CIFAR_TRAIN for index in range(6)]


def test_samples_can_start_anywhere(tmp_path: Path):
    source = read(write_tar(tmp_path / "a.tar.gz", cifar_members()))
    samples = list(source.samples("train"))
    for start in (0, 1, 5, 6, 7, 29, 30):
        assert list(source.samples("train", start)) == samples[start:]


class Attack:
    """Pickles as a call of `function`."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> Any:
        return self.call


MARKER = "/tmp/a-pickle-was-executed"


@pytest.mark.parametrize(
    ("raw", "named"),
    [
        (pickle.dumps(Attack(os.system, f"touch {MARKER}")), "posix.system"),
        (pickle.dumps(Attack(os.system, f"touch {MARKER}"), protocol=0), "posix.system"),
        (pickle.dumps({"data": Attack(eval, "1+1")}), "builtins.eval"),
        (pickle.dumps(Attack(getattr, "", "join")), "builtins.getattr"),
        (b"cnumpy\nload\n(V/etc/passwd\ntR.", "numpy.load"),
        (b"cnumpy.core.multiarray\n_reconstruct.__globals__\n.", "_reconstruct.__globals__"),
        (b"(S'touch x'\nios\nsystem\n.", "INST"),
        (b"(cos\nsystem\nS'touch x'\no.", "OBJ"),
        (b"\x80\x02cnumpy\nndarray\n)\x81.", "NEWOBJ"),
        (b"Pid\n.", "PERSID"),
        (b"\x82\x01.", "EXT1"),
        (b"cnumpy\nndarray\n}S'x'\nS'y'\nsb.", "attribute"),
        (b"cnumpy\ndtype\nN}V_name\nVencode\ns\x86b.", "_name"),
        (b"c_codecs\nencode\n(V1+1\nVrot13\ntR.", "encode"),
        (b"cnumpy.core.multiarray\n_reconstruct\n(I0\ntR.", "_reconstruct"),
        (b"]r\xff\xff\xff\x7f.", "memo"),
        (b"\x80\x04\x8e" + struct.pack("<Q", 2**40) + b"x.", "expected"),
        (b"", "pickle"),
        (b"\x80\x02}q\x01", "pickle"),
        (b"]].", "list"),
        (b"I1\n.", "int"),
    ],
)
def test_a_pickle_with_anything_but_plain_values_and_uint8_arrays_is_refused_by_name(raw: bytes, named: str):
    with pytest.raises(SourceError, match="is not a CIFAR-10 batch") as caught:
        load_cifar_pickle("data_batch_1", raw)
    assert named in str(caught.value)
    assert not Path(MARKER).exists()


@pytest.mark.parametrize(
    ("array", "named"),
    [
        (np.zeros((2, 3072), np.float64), "'f8'"),
        (np.array([["text"]], dtype=object), "'O8'"),
        (np.zeros(3072, np.uint8), "shape"),
        (np.zeros((1, 3072), np.dtype([("a", "u1")])), "'V1'"),
    ],
)
def test_arrays_of_another_type_or_shape_are_refused(array: np.ndarray, named: str):
    with pytest.raises(SourceError, match=named):
        load_cifar_pickle("data_batch_1", pickle.dumps({"data": array}, protocol=2))


def test_an_array_that_claims_more_than_its_bytes_is_refused():
    raw = python2_pickle(cifar_content("data_batch_1"))
    claim = raw.replace(b"K\x06M" + struct.pack("<H", 3072) + b"\x86", b"K\xffM" + struct.pack("<H", 3072) + b"\x86")
    assert claim != raw
    with pytest.raises(SourceError, match=r"shape \(255, 3072\) without its bytes"):
        load_cifar_pickle("data_batch_1", claim)


@settings(max_examples=300, deadline=None)
@given(st.integers(0, 10**6), st.binary(min_size=1, max_size=3))
def test_a_damaged_pickle_is_read_or_refused_and_nothing_else(place: int, new: bytes):
    raw = python2_pickle(cifar_content("data_batch_1", 1))
    head = raw.index(b"T", raw.index(b"dtype"))
    at = place % (head + 10)
    try:
        content = load_cifar_pickle("data_batch_1", raw[:at] + new + raw[at + len(new) :])
    except SourceError:
        return
    assert isinstance(content, dict)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"labels": [1, 2]}, "labels is not a list of 6"),
        ({"labels": ["1"] * 6}, "labels is not a list of 6"),
        ({"data": [1, 2]}, "data is list"),
        ({"data": np.zeros((6, 1024), np.uint8)}, r"data is \(6, 1024\) uint8"),
    ],
)
def test_a_batch_that_does_not_fit_together_is_refused(tmp_path: Path, change: dict[str, Any], named: str):
    members = cifar_members()
    members["data_batch_3"] = pickle.dumps(cifar_content("data_batch_3") | change, protocol=2)
    with pytest.raises(SourceError, match=f"data_batch_3: {named}"):
        list(read(write_tar(tmp_path / "a.tar.gz", members)).samples("train"))


def member(name: str, kind: bytes = tarfile.REGTYPE, size: int = 0, link: str = "") -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.size, info.linkname = kind, size, link
    return info


@pytest.mark.parametrize(
    ("extra", "named"),
    [
        (member("../../data_batch_1", size=4), "'../../data_batch_1' points out"),
        (member("/etc/cron.d/evil", size=4), "'/etc/cron.d/evil' points out"),
        (member("a/test_batch", tarfile.SYMTYPE, link="/etc/passwd"), "is a link"),
        (member("a/test_batch", tarfile.LNKTYPE, link="/etc/passwd"), "is a link"),
        (member("a/test_batch", tarfile.FIFOTYPE), "is a link or a device"),
        (member("b/test_batch", size=4), "two members named test_batch"),
    ],
)
def test_an_archive_that_attacks_is_refused_and_writes_nothing(tmp_path: Path, extra: tarfile.TarInfo, named: str):
    members = cifar_members()
    if "link" in named:
        del members["test_batch"]
    path = write_tar(tmp_path / "a.tar.gz", members, [extra])
    with pytest.raises(SourceError) as caught:
        _ = read(path).classes
    assert named in str(caught.value)
    assert list(tmp_path.iterdir()) == [path]


def test_a_member_that_claims_a_huge_size_is_refused_before_it_is_read(tmp_path: Path):
    header = member("a/data_batch_1", size=2**40).tobuf(tarfile.GNU_FORMAT)
    path = tmp_path / "a.tar.gz"
    path.write_bytes(gzip.compress(header + bytes(10_000)))
    with pytest.raises(SourceError, match=r"claims 1099511627776 bytes"):
        _ = read(path).classes


@pytest.mark.parametrize("kind", [tarfile.REGTYPE, tarfile.GNUTYPE_LONGNAME, tarfile.XHDTYPE], ids=["file", "long name", "pax header"])
def test_a_compressed_bomb_stops_at_the_limit(tmp_path: Path, kind: bytes, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(hostile, "MAX_ARCHIVE_BYTES", 1 << 20)
    path = tmp_path / "a.tar.gz"
    path.write_bytes(gzip.compress(member("a/readme.html", kind, size=2**33).tobuf(tarfile.GNU_FORMAT) + bytes(4 << 20)))
    with pytest.raises(SourceError, match="unpacks to more than 1048576 bytes"):
        _ = read(path).classes


def test_damaged_and_foreign_archives_are_refused(tmp_path: Path):
    whole = write_tar(tmp_path / "a.tar.gz", cifar_members()).read_bytes()
    for name, raw in {"half": whole[: len(whole) // 2], "flipped": whole[:200] + bytes([whole[200] ^ 255]) + whole[201:]}.items():
        (tmp_path / name).write_bytes(raw)
        with pytest.raises(SourceError, match="get it again"):
            _ = read(tmp_path / name).classes
    write_tar(tmp_path / "other.tar.gz", {"something": b"else"})
    with pytest.raises(SourceError, match="holds no CIFAR-10 batches"):
        _ = read(tmp_path / "other.tar.gz").classes
    members = cifar_members()
    del members["data_batch_4"]
    with pytest.raises(SourceError, match="data_batch_4 missing"):
        _ = read(write_tar(tmp_path / "partial.tar.gz", members)).classes


def test_cifar10_is_downloaded_by_torchvision_with_its_hash(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    calls = []

    def download(url: str, root: str, filename: str, md5: str) -> None:
        calls.append((url, filename, md5))
        write_tar(Path(root) / filename, cifar_members())

    monkeypatch.setattr("torchvision.datasets.utils.download_url", download)
    source = read("cifar10", root=tmp_path / "root")
    assert (source.kind, len(source.identity), calls) == ("cifar10", 64, [])  # what it is, is known without it
    check_cifar(source)
    ((url, filename, md5),) = calls
    assert url.startswith("https://")
    assert (filename, md5) == ("cifar-10-python.tar.gz", "c58f30108f718f92721af3b95e74349a")


@pytest.mark.parametrize("failure", [URLError("no network"), RuntimeError("File not found or corrupted."), TimeoutError("slow")])
def test_offline_the_error_says_what_failed_and_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failure: Exception):
    def download(*_: Any) -> None:
        raise failure

    monkeypatch.setattr("torchvision.datasets.utils.download_url", download)
    with pytest.raises(SourceError) as caught:
        list(read("cifar10", root=tmp_path).samples("train"))
    text = str(caught.value)
    assert str(failure) in text
    assert "--data.path /path/to/cifar-10-python.tar.gz" in text
    assert "--config quickstart" in text


# Hugging Face Parquet


def write_hf(path: Path, rows: list[tuple[bytes | None, str | None, Any]], *, null_structs: tuple[int, ...] = (), **options: Any) -> None:
    """Options: image, label (columns' names), names (of the classes), label_type."""
    image, label, names = options.get("image", "image"), options.get("label", "label"), options.get("names")
    path.parent.mkdir(parents=True, exist_ok=True)
    structs = [None if index in null_structs else {"bytes": data, "path": where} for index, (data, where, _) in enumerate(rows)]
    array = pa.array(structs, pa.struct([("bytes", pa.binary()), ("path", pa.string())]))
    table = pa.table({image: array, label: pa.array([row[2] for row in rows], options.get("label_type") or pa.int64())})
    if names is not None:
        info = {"info": {"features": {label: {"names": names, "_type": "ClassLabel"}}}}
        table = table.replace_schema_metadata({"huggingface": json.dumps(info)})
    pq.write_table(table, path, row_group_size=3)


def hf_rows(count: int, first: int = 0, paths: bool = False) -> list[tuple[bytes | None, str | None, Any]]:
    return [(encode(picture(first + index, 4, 4)), f"{first + index}.png" if paths else None, index % 3) for index in range(count)]


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


def test_validation_files_serve_where_there_are_no_test_files_and_others_are_named_as_ignored(tmp_path: Path):
    write_hf(tmp_path / "train-0.parquet", hf_rows(6))
    write_hf(tmp_path / "validation-0.parquet", hf_rows(2, 20))
    write_hf(tmp_path / "extra-0.parquet", hf_rows(2, 30))
    source = read(tmp_path)
    assert source.count("test") == 2
    assert source.ignored == ("extra-0.parquet",)
    write_hf(tmp_path / "test-0.parquet", hf_rows(3, 40))
    source = read(tmp_path)
    assert source.count("test") == 3
    assert set(source.ignored) == {"extra-0.parquet", "validation-0.parquet"}


def test_one_parquet_file_is_split_by_its_keys_and_classes_are_numbered_or_taken_from_text(tmp_path: Path):
    rows = [(data, None, ["cat", "ape"][label % 2]) for data, _, label in hf_rows(40)]
    write_hf(tmp_path / "pets.parquet", rows, label_type=pa.string())
    source = read(tmp_path / "pets.parquet")
    train, test = list(source.samples("train")), list(source.samples("test"))
    assert source.classes == ("ape", "cat")
    assert {sample.label for sample in train} == {0, 1}
    assert len(train) + len(test) == 40
    assert all(held_out(sample.key, 0.2) for sample in test)
    assert not any(held_out(sample.key, 0.2) for sample in train)
    assert list(source.samples("train", 5)) == train[5:]
    write_hf(tmp_path / "numbers.parquet", hf_rows(10))
    assert read(tmp_path / "numbers.parquet").classes == ("0", "1", "2")


def test_parquet_without_the_columns_or_damaged_is_a_clear_error(tmp_path: Path):
    pq.write_table(pa.table({"image": [1, 2], "label": [0, 1]}), tmp_path / "train-0.parquet")
    with pytest.raises(SourceError, match=r"no column image or img of struct.*image: int64, label: int64"):
        read(tmp_path)
    write_hf(tmp_path / "train-0.parquet", hf_rows(3), label="target")
    with pytest.raises(SourceError, match="no column label or fine_label"):
        read(tmp_path)
    (tmp_path / "train-0.parquet").write_bytes(b"PAR1 and nothing else PAR1")
    with pytest.raises(SourceError, match=r"train-0\.parquet is no readable Parquet file"):
        read(tmp_path)


# Folders by class


def write_folder(root: Path, classes: dict[str, int], first: int = 0) -> None:
    for name, count in classes.items():
        (root / name).mkdir(parents=True)
        for index in range(count):
            (root / name / f"{index}.png").write_bytes(encode(picture(first + index, 4, 4)))


@pytest.mark.parametrize("held", ["test", "val", "validation"])
def test_an_image_folder_is_read_by_class_in_sorted_order(tmp_path: Path, held: str):
    write_folder(tmp_path / "train", {"dog": 3, "cat": 2})
    write_folder(tmp_path / held, {"dog": 1}, first=9)
    (tmp_path / "train" / "cat" / "deep").mkdir()
    (tmp_path / "train" / "cat" / "deep" / "a.JPG").write_bytes(encode(picture(5, 4, 4), "JPEG"))
    (tmp_path / "train" / "cat" / "notes.txt").write_text("not an image")
    (tmp_path / "train" / "cat" / ".DS_Store").write_text("hidden")
    source = read(tmp_path)
    assert (source.kind, source.classes, source.ignored) == ("folder", ("cat", "dog"), ("1 .txt",))
    train = [(sample.key, sample.label) for sample in source.samples("train")]
    assert train == [
        ("train/cat/0.png", 0),
        ("train/cat/1.png", 0),
        ("train/cat/deep/a.JPG", 0),
        ("train/dog/0.png", 1),
        ("train/dog/1.png", 1),
        ("train/dog/2.png", 1),
    ]
    ((test),) = source.samples("test")
    assert (test.key, test.label, test.data) == (f"{held}/dog/0.png", 1, encode(picture(9, 4, 4)))
    assert (source.count("train"), source.count("test")) == (6, 1)


def test_class_folders_alone_are_split_by_a_hash_of_the_key_that_other_files_do_not_change(tmp_path: Path):
    write_folder(tmp_path, {"a": 60, "b": 60})
    source = read(tmp_path)
    train, test = ({sample.key for sample in source.samples(split)} for split in ("train", "test"))
    assert len(train) + len(test) == 120
    assert 8 <= len(test) <= 45
    write_folder(tmp_path, {"c": 10})
    later = read(tmp_path)
    assert {sample.key for sample in later.samples("test")} >= test
    assert {sample.key for sample in later.samples("train")} >= train
    assert later.identity != source.identity
    assert read(tmp_path, test_fraction=0.3).identity != later.identity


def test_a_file_that_cannot_be_read_keeps_its_place_with_a_reason(tmp_path: Path):
    write_folder(tmp_path / "train", {"a": 2})
    write_folder(tmp_path / "test", {"a": 1})
    (tmp_path / "train" / "a" / "0b.png").symlink_to(tmp_path / "gone.png")
    samples = list(read(tmp_path).samples("train"))
    assert [(sample.key, sample.refusal) for sample in samples] == [
        ("train/a/0.png", None),
        ("train/a/0b.png", "unreadable: No such file or directory"),
        ("train/a/1.png", None),
    ]


def test_names_that_are_not_utf8_become_printable_keys(tmp_path: Path):
    write_folder(tmp_path / "test", {"a": 1})
    os.makedirs(os.fsencode(tmp_path / "train" / "a"))
    with open(os.fsencode(tmp_path / "train" / "a") + b"/\xff.png", "wb") as file:
        file.write(encode(picture(1, 4, 4)))
    (sample,) = read(tmp_path).samples("train")
    assert sample.key == "train/a/\\xff.png"
    assert sample.refusal is None


def test_a_test_class_that_training_lacks_is_an_error(tmp_path: Path):
    write_folder(tmp_path / "train", {"a": 1})
    write_folder(tmp_path / "test", {"b": 1})
    with pytest.raises(SourceError, match=r"classes that .*train lacks: b"):
        read(tmp_path)


# IDX


def idx(array: np.ndarray) -> bytes:
    return bytes([0, 0, 8, array.ndim]) + b"".join(struct.pack(">I", side) for side in array.shape) + array.tobytes()


def write_idx(folder: Path, *, pattern: str = "{}-{}-idx{}-ubyte", packed: bool = False, counts: dict[str, int] | None = None) -> None:
    folder.mkdir(exist_ok=True)
    for split, count in (counts or {"train": 30, "t10k": 10}).items():
        images = np.stack([picture(index, 8, 9)[..., 0] for index in range(count)])
        labels = np.arange(count, dtype=np.uint8) % 10
        for what, array in (("images", images), ("labels", labels)):
            name = pattern.format(split, what, array.ndim)
            (folder / (name + ".gz" * packed)).write_bytes(gzip.compress(idx(array)) if packed else idx(array))


@pytest.mark.parametrize("pattern", ["{}-{}-idx{}-ubyte", "{}-{}.idx{}-ubyte"])
@pytest.mark.parametrize("packed", [False, True])
def test_idx_files_are_read_exactly(tmp_path: Path, pattern: str, packed: bool):
    write_idx(tmp_path, pattern=pattern, packed=packed)
    source = read(tmp_path)
    assert (source.kind, source.classes) == ("idx", tuple("0123456789"))
    for split, count in (("train", 30), ("test", 10)):
        samples = list(source.samples(split))
        assert source.count(split) == len(samples) == count
        for index, sample in enumerate(samples):
            assert (sample.key, sample.label) == (f"{split}/{index:05d}", index % 10)
            assert np.array_equal(pixels(sample)[..., 1], picture(index, 8, 9)[..., 0])
        assert list(source.samples(split, 4)) == samples[4:]


def test_idx_without_a_test_pair_is_split_and_names_come_from_classes_txt(tmp_path: Path):
    write_idx(tmp_path, counts={"train": 50})
    (tmp_path / "classes.txt").write_text("\n".join(f"class {number}" for number in range(10)) + "\n")
    source = read(tmp_path)
    assert source.classes[3] == "class 3"
    train, test = list(source.samples("train")), list(source.samples("test"))
    assert (source.count("train"), source.count("test")) == (len(train), len(test))
    assert len(train) + len(test) == 50
    assert test
    (tmp_path / "classes.txt").write_text("only one\n")
    with pytest.raises(SourceError, match="names 1 classes, the labels go up to 9"):
        read(tmp_path)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("train-images-idx3-ubyte", lambda raw: raw[:-1], "ends in number 29"),
        ("train-images-idx3-ubyte", lambda raw: raw + b"x", "more bytes"),
        ("train-images-idx3-ubyte", lambda raw: b"\0\0\x09" + raw[3:], "does not begin like an IDX file"),
        ("train-images-idx3-ubyte", lambda raw: raw[:4] + struct.pack(">I", 29) + raw[8:], "29 images, its labels file 30"),
        ("train-images-idx3-ubyte", lambda raw: raw[:8] + struct.pack(">II", 2**31, 2**31) + raw[16:], "2147483648x2147483648"),
        ("train-images-idx3-ubyte", lambda raw: raw[:10], "does not begin"),
        ("train-labels-idx1-ubyte", lambda raw: raw[:-1], "30 labels; it has 29"),
        ("train-labels-idx1-ubyte", lambda raw: raw + b"x", "30 labels; it has more"),
        ("train-labels-idx1-ubyte", lambda raw: gzip.compress(raw)[:-12], "damaged"),
        ("train-images-idx3-ubyte", lambda raw: gzip.compress(raw)[:-12], "damaged|ends in number"),
    ],
)
def test_an_idx_file_whose_header_and_length_disagree_is_refused(tmp_path: Path, name: str, change: Any, message: str):
    write_idx(tmp_path)
    (tmp_path / name).write_bytes(change((tmp_path / name).read_bytes()))
    with pytest.raises(SourceError, match=message):
        list(read(tmp_path).samples("train"))


def test_a_missing_half_of_an_idx_pair_is_named(tmp_path: Path):
    write_idx(tmp_path)
    (tmp_path / "t10k-labels-idx1-ubyte").unlink()
    with pytest.raises(SourceError, match="for test, but not its labels"):
        read(tmp_path)


# Anything


def test_what_cannot_be_read_says_what_was_found_and_what_is_accepted(tmp_path: Path):
    (tmp_path / "flat").mkdir()
    (tmp_path / "flat" / "1.png").write_bytes(b"")
    (tmp_path / "empty").mkdir()
    (tmp_path / "text.txt").write_text("hello")
    for path, found in (
        (tmp_path / "flat", "it holds 1.png"),
        (tmp_path / "empty", "it holds nothing"),
        (tmp_path / "text.txt", "b'hello'"),
        (tmp_path / "gone", "does not exist"),
    ):
        with pytest.raises(SourceError) as caught:
            read(path)
        text = str(caught.value)
        assert found in text
        assert all(word in text for word in ("cifar10", "Parquet", "train/ and test/", "IDX"))


@pytest.mark.parametrize("fraction", [0.0, 1.0, -1.0, float("nan")])
def test_a_test_fraction_that_leaves_nothing_is_refused(fraction: float):
    with pytest.raises(ValueError, match=r"data\.test_fraction"):
        read("cifar10", test_fraction=fraction)


def test_class_names_can_be_given_and_must_be_as_many(tmp_path: Path):
    write_idx(tmp_path)
    names = tuple(f"name {number}" for number in range(10))
    source = read(tmp_path, classes=names)
    assert source.classes == names
    assert source.identity != read(tmp_path).identity
    with pytest.raises(SourceError, match="2 class names were given; the source has 10"):
        _ = read(tmp_path, classes=("a", "b")).classes
    with pytest.raises(SourceError, match="differ"):
        read(tmp_path, classes=("a", "a"))


def test_a_balanced_sample_has_as_many_of_each_class_and_depends_on_seed_and_keys_alone(tmp_path: Path):
    write_idx(tmp_path)
    source = read(tmp_path)

    def chosen(seed: int, size: int) -> list[Sample]:
        sample = Balanced(source, sizes={"train": size, "test": 10}, seed=seed)
        assert sample.count("train") == size
        found = list(sample.samples("train"))
        assert list(sample.samples("train", 7)) == found[7:]
        return found

    twenty = chosen(0, 20)
    assert sorted(sample.label for sample in twenty) == sorted([*range(10)] * 2)
    assert twenty == chosen(0, 20)
    assert twenty != chosen(1, 20)
    assert sorted(sample.label for sample in chosen(0, 23)) == sorted([*[*range(10)] * 2, 0, 1, 2])
    assert {sample.key for sample in twenty} < {sample.key for sample in chosen(0, 23)}
    with pytest.raises(SourceError, match="class 0 has 3 train images; a sample of 4"):
        chosen(0, 40)


@settings(max_examples=200)
@given(st.text(), st.floats(0.01, 0.99), st.floats(0.01, 0.99))
def test_a_key_held_out_stays_so_when_more_is_held_out(key: str, one: float, other: float):
    key = key.encode("utf-8", "replace").decode()
    low, high = sorted((one, other))
    assert held_out(key, high) or not held_out(key, low)


def test_about_the_asked_fraction_is_held_out():
    count = sum(held_out(f"train/{index}.png", 0.1) for index in range(20_000))
    assert abs(count / 20_000 - 0.1) < 0.01
