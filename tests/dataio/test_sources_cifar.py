"""Claims about CIFAR-10 and its archives: read exactly, damage and attacks refused by name, nothing of a pickle executed."""

import gzip
import io
import os
import pickle
import struct
import tarfile
from collections import Counter
from pathlib import Path
from typing import Any
from urllib.error import URLError

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from made import pixels, read

from dataio.sources import Source, SourceError, hostile, load_cifar_pickle
from dataio.sources.hostile import CIFAR_TRAIN

CIFAR_CLASSES = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]


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


def check_cifar(source: Source, *, keys: bool = True) -> None:
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


def test_validation_is_held_out_of_the_training_batches(tmp_path: Path):
    path = write_tar(tmp_path / "a.tar.gz", cifar_members())
    whole, source = read(path), read(path, validation_fraction=0.2)
    assert source.splits() == ("train", "validation", "test")
    kept, held = list(source.samples("train")), list(source.samples("validation"))
    assert (source.count("train"), source.count("validation")) == (len(kept), len(held))
    train = list(whole.samples("train"))
    assert [sample for sample in train if sample in held] == held
    assert [sample for sample in train if sample not in held] == kept
    counts = Counter(sample.label for sample in train)
    assert Counter(sample.label for sample in held) == {label: max(1, round(count / 5)) for label, count in counts.items() if count > 1}
    assert list(source.samples("test")) == list(whole.samples("test"))


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
        (b"(cos\nsystem\nS'touch x'\no.", "os.system"),
        (b"\x80\x02cnumpy\nndarray\n)\x81.", "NEWOBJ"),
        (b"Pid\n.", "PERSID"),
        (b"\x82\x01.", "EXT1"),
        (b"cnumpy\nndarray\n}S'x'\nS'y'\nsb.", "attribute"),
        (b"cnumpy\ndtype\nN}V_name\nVencode\ns\x86b.", "sets attributes of dtype"),
        (b"c_codecs\nencode\n(V1+1\nVrot13\ntR.", "encode"),
        (b"cnumpy.core.multiarray\n_reconstruct\n(I0\ntR.", "_reconstruct"),
        (b"]r\xff\xff\xff\x7f.", "list"),
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
