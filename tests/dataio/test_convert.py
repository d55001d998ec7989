"""Claims about conversions: only good images come through, a stopped one ends in the same bytes, and nothing is ever half there."""

import errno
import json
import os
import signal
import subprocess
import sys
import tarfile
import threading
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
import torch
from corpus import MAX_PIXELS, Bad, bad, encode, good, picture, pillow
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dataio import convert as command
from dataio.codecs.image.codec import ImageCodec
from dataio.config import DataConfig
from dataio.conversion import DiskFull, Progress, convert
from dataio.convert import main
from dataio.manifest import Manifest
from dataio.parquet import ShardWriter, open_dataset
from dataio.prepared import is_converted, prepare
from dataio.quarantine import BadSample, TooManyBadSamples
from dataio.resident import decode_split
from dataio.schema import Target, single_label
from dataio.sources import Sample, open_source
from dataio.staging import locked

ROOT = Path(__file__).resolve().parents[2]
TINY = [encode(picture(seed, 2, 2)) for seed in range(16)]


class Memory:
    """A source in memory: sample i of a split has key k<i>, an image by i, label i % 4; every `bad_every`-th is empty."""

    kind = "memory"
    ignored = ()
    held_out: ClassVar = {}
    classes = ("a", "b", "c", "d")

    def __init__(self, train: int = 2600, test: int = 600, *, bad_every: int = 0, known: bool = True, identity: str = "one") -> None:
        self._counts, self._bad_every, self._known, self.identity = {"train": train, "test": test}, bad_every, known, identity
        self.identities = (identity,)
        self.read: list[int] = []

    @property
    def targets(self) -> tuple[Target, ...]:
        return single_label(self.classes)

    def splits(self) -> tuple[str, ...]:
        return ("train", "test")

    def count(self, split: str) -> int | None:
        return self._counts[split] if self._known else None

    def samples(self, split: str, start: int = 0) -> Iterator[Sample]:
        self.read.append(start)
        for index in range(start, self._counts[split]):
            is_bad = self._bad_every and index % self._bad_every == self._bad_every - 1
            yield Sample(key=f"k{index}", data=b"" if is_bad else TINY[index % 16], values=(index % 4,))


def run(source: object, dest: Path, **options: object) -> Manifest:
    settings = {"max_bad_fraction": 0.5, "max_image_pixels": MAX_PIXELS, "shard_bytes": 100_000}
    return convert(source, dest, **(settings | options))  # type: ignore[arg-type]


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def records(folder: Path) -> list[BadSample]:
    return [BadSample.from_json(json.loads(line)) for line in (folder / "quarantine.jsonl").read_text().splitlines()]


def stop_at(call: int, error: BaseException) -> Callable[[Progress], None]:
    calls = 0

    def on_progress(_: Progress) -> None:
        nonlocal calls
        calls += 1
        if calls == call:
            raise error

    return on_progress


def test_a_corpus_of_bad_images_is_quarantined_by_key_and_reason_and_the_rest_is_unharmed(tmp_path: Path):
    cases = [case for case in (*good(), *bad()) if not (isinstance(case, Bad) and case.kind == "wrong size")]
    for split in ("train", "test"):
        for index, case in enumerate(cases):
            folder = tmp_path / "source" / split / f"class{index % 3}"
            folder.mkdir(parents=True, exist_ok=True)
            (folder / f"{index:03d}.png").write_bytes(case.data)
    source = open_source(str(tmp_path / "source"), root=tmp_path, test_fraction=0.1)
    manifest = run(source, tmp_path / "dest", max_bad_fraction=0.6)
    dataset = open_dataset(tmp_path / "dest")
    expected_bad = {f"train/class{index % 3}/{index:03d}.png": case.kind for index, case in enumerate(cases) if isinstance(case, Bad)}
    assert {record.key: record.kind for record in records(tmp_path / "dest") if record.split == "train"} == expected_bad
    assert manifest.quarantined == 2 * len(expected_bad) == len(records(tmp_path / "dest"))
    split = dataset.split("train")
    assert split.count == len(good())
    config = DataConfig(max_image_pixels=MAX_PIXELS, background="")
    with closing(ImageCodec(height=24, width=40, config=config, device=torch.device("cpu"))) as codec:
        images = decode_split(split, codec, on_bad=lambda record: pytest.fail(str(record)))
    for key, label, image in zip(split.keys(range(split.count)), split.labels(), images, strict=True):
        case = cases[int(key[-7:-4])]
        assert label == int(key[len("train/class")])
        assert np.abs(image.astype(int) - pillow(case.data)).max() <= case.tolerance
    assert manifest.image_sizes == {"24x40": 2 * len(good())}


def test_every_group_is_full_but_the_last_whatever_is_left_out(tmp_path: Path):
    manifest = run(Memory(bad_every=7), tmp_path / "dest")
    for split, count in (("train", 2600 - 2600 // 7), ("test", 600 - 600 // 7)):
        groups = [rows for shard in manifest.splits[split].shards for rows in shard.row_group_rows]
        assert manifest.splits[split].count == sum(groups) == count
        assert all(rows == 512 for rows in groups[:-1])
        good_ids = [index for index in range(2600) if index % 7 != 6][:count]
        assert open_dataset(tmp_path / "dest").split(split).keys(range(count)) == [f"k{index}" for index in good_ids]
    assert len(manifest.splits["train"].shards) > 2
    assert [record.sample_id for record in records(tmp_path / "dest") if record.split == "train"] == list(range(6, 2600, 7))


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(stops=st.lists(st.integers(1, 9), min_size=1, max_size=4), bad_every=st.sampled_from([0, 5, 512]))
def test_a_conversion_stopped_anywhere_any_number_of_times_ends_in_the_same_bytes(
    tmp_path_factory: pytest.TempPathFactory, stops: list[int], bad_every: int
):
    folder = tmp_path_factory.mktemp("stops")
    run(Memory(bad_every=bad_every), folder / "straight")
    for stop in stops:
        if not (folder / "stopped").exists():
            try:
                run(Memory(bad_every=bad_every), folder / "stopped", on_progress=stop_at(stop, KeyboardInterrupt()))
            except KeyboardInterrupt:
                assert not (folder / "stopped").exists()
    run(Memory(bad_every=bad_every), folder / "stopped")
    assert files(folder / "stopped") == files(folder / "straight")
    assert not (folder / "stopped.partial").exists()


def test_complete_shards_are_not_read_again(tmp_path: Path):
    with pytest.raises(KeyboardInterrupt):
        run(Memory(), tmp_path / "dest", on_progress=stop_at(5, KeyboardInterrupt()))
    source, seen = Memory(), []
    run(source, tmp_path / "dest", on_progress=seen.append)
    assert source.read[0] >= 1024
    assert seen[0].resumed == source.read[0]
    assert seen[-1] == Progress(split="test", done=600, total=600, bad=0, resumed=0)


KILLED = """
import os, signal, sys
sys.path.insert(0, {tests!r})
from test_convert import Memory, run
from pathlib import Path
from typing import ClassVar
calls = 0
def on_progress(progress):
    global calls
    calls += 1
    if calls == {at}:
        os.kill(os.getpid(), signal.SIGKILL)
run(Memory(bad_every=9), Path({dest!r}), on_progress=on_progress)
"""


def test_a_killed_conversion_goes_on_and_ends_in_the_same_bytes(tmp_path: Path):
    program = KILLED.format(tests=str(Path(__file__).parent), at=5, dest=str(tmp_path / "dest"))
    ended = subprocess.run([sys.executable, "-c", program], cwd=ROOT, timeout=120, check=False)
    assert ended.returncode == -signal.SIGKILL
    assert [path.name for path in tmp_path.iterdir()] == ["dest.partial"]
    run(Memory(bad_every=9), tmp_path / "dest")
    run(Memory(bad_every=9), tmp_path / "straight")
    assert files(tmp_path / "dest") == files(tmp_path / "straight")


def test_a_damaged_shard_of_an_earlier_attempt_is_made_again(tmp_path: Path):
    run(Memory(), tmp_path / "straight")
    for damage in ("flip", "shorten", "remove"):
        dest = tmp_path / damage
        with pytest.raises(KeyboardInterrupt):
            run(Memory(), dest, on_progress=stop_at(6, KeyboardInterrupt()))
        shard = sorted(dest.with_name(damage + ".partial").glob("train-*.parquet"))[0]
        raw = bytearray(shard.read_bytes())
        raw[100] ^= 1
        match damage:
            case "flip":
                shard.write_bytes(raw)
            case "shorten":
                shard.write_bytes(raw[:-1])
            case "remove":
                shard.unlink()
        source = Memory()
        run(source, dest)
        assert source.read[0] == 0
        assert files(dest) == files(tmp_path / "straight")


def test_another_source_or_other_settings_start_anew(tmp_path: Path):
    with pytest.raises(KeyboardInterrupt):
        run(Memory(), tmp_path / "dest", on_progress=stop_at(6, KeyboardInterrupt()))
    source = Memory(identity="another")
    run(source, tmp_path / "dest")
    assert source.read == [0, 0]
    with pytest.raises(KeyboardInterrupt):
        run(Memory(), tmp_path / "other", on_progress=stop_at(6, KeyboardInterrupt()))
    source = Memory()
    run(source, tmp_path / "other", max_image_pixels=MAX_PIXELS - 1)
    assert source.read == [0, 0]


def test_the_same_conversion_again_finds_it_done_and_another_is_refused_unless_forced(tmp_path: Path):
    first = run(Memory(), tmp_path / "dest")
    again = Memory()
    assert run(again, tmp_path / "dest") == first
    assert again.read == []
    before = files(tmp_path / "dest")
    with pytest.raises(ValueError, match=r"dest exists and is not this source.*--force"):
        run(Memory(identity="another"), tmp_path / "dest")
    assert files(tmp_path / "dest") == before
    replaced = run(Memory(train=700, identity="another"), tmp_path / "dest", force=True)
    assert open_dataset(tmp_path / "dest").manifest == replaced
    assert [path.name for path in tmp_path.iterdir()] == ["dest"]


def test_a_folder_of_something_else_is_never_touched(tmp_path: Path):
    (tmp_path / "dest").mkdir()
    (tmp_path / "dest" / "thesis.tex").write_text("years of work")
    with pytest.raises(ValueError, match="exists and is not this source"):
        run(Memory(), tmp_path / "dest")
    assert files(tmp_path / "dest") == {"thesis.tex": b"years of work"}
    assert [path.name for path in tmp_path.iterdir()] == ["dest"]


def test_a_small_source_is_looked_at_to_its_end_so_that_the_error_names_what_is_enough(tmp_path: Path):
    with pytest.raises(TooManyBadSamples, match="32 of 3200 samples are bad, more than the 0 that") as caught:
        run(Memory(bad_every=100), tmp_path / "dest", max_bad_fraction=0.0)
    enough = float(str(caught.value).split("--data.max-bad-fraction ")[1].split(" ")[0])
    assert run(Memory(bad_every=100), tmp_path / "dest", max_bad_fraction=enough).quarantined == 32


@pytest.mark.parametrize("where", ["a file", "nowhere"])
def test_a_folder_that_cannot_be_made_is_the_users_to_change(tmp_path: Path, where: str):
    (tmp_path / "file").write_text("")
    parent = tmp_path / "file" if where == "a file" else Path("/proc/none")
    with pytest.raises(ValueError, match=r"cannot be made \(.*\); name a folder that can be written: --data.root"):
        run(Memory(), parent / "dest")


def test_progress_is_told_in_words():
    assert Progress(split="train", done=512, total=2000, bad=3, resumed=0).describe() == "train: 512 of 2000 images, 3 bad"
    assert Progress(split="test", done=512, total=None, bad=0, resumed=64).describe() == "test: 512 images, 64 of them before"


@pytest.mark.parametrize("known", [True, False])
def test_too_many_bad_samples_fail_naming_the_first_and_a_higher_limit_goes_on(
    tmp_path: Path, known: bool, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("dataio.conversion.SMALL_SOURCE", 100)
    with pytest.raises(TooManyBadSamples) as caught:
        run(Memory(bad_every=100, known=known), tmp_path / "dest", max_bad_fraction=0.005)
    text = str(caught.value)
    assert "of 3200 samples are bad" in text
    assert "train k99: empty: no bytes" in text
    assert "--max-bad-fraction" in text
    assert not (tmp_path / "dest").exists()
    manifest = run(Memory(bad_every=100, known=known), tmp_path / "dest", max_bad_fraction=0.02)
    assert manifest.quarantined == 32
    with pytest.raises(TooManyBadSamples):  # what is there already was made under a laxer limit
        run(Memory(bad_every=100, known=known), tmp_path / "dest", max_bad_fraction=0.005)


def test_a_full_disk_is_a_clear_error_and_loses_no_complete_shard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    write, calls = ShardWriter.write_group, 0

    def full(self: ShardWriter, *arguments: object) -> None:
        nonlocal calls
        calls += 1
        if calls == 4:
            raise OSError(errno.ENOSPC, "No space left on device")
        write(self, *arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(ShardWriter, "write_group", full)
    with pytest.raises(DiskFull, match=r"no space is left .* complete shards are kept: make room"):
        run(Memory(), tmp_path / "dest", shard_bytes=50_000)
    monkeypatch.undo()
    source = Memory()
    run(source, tmp_path / "dest", shard_bytes=50_000)
    assert source.read[0] >= 512


def test_a_conversion_that_could_not_begin_leaves_nothing(tmp_path: Path):
    class Offline(Memory):
        @property
        def classes(self) -> tuple[str, ...]:  # type: ignore[override]
            raise ValueError("no network")

    with pytest.raises(ValueError, match="no network"):
        run(Offline(), tmp_path / "dest")
    assert list(tmp_path.iterdir()) == []


def test_two_conversions_into_one_folder_do_the_work_once(tmp_path: Path):
    sources = [Memory() for _ in range(4)]
    manifests: list[Manifest] = []
    threads = [threading.Thread(target=lambda source=source: manifests.append(run(source, tmp_path / "dest"))) for source in sources]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(manifests) == 4
    assert all(manifest == manifests[0] for manifest in manifests)
    assert sorted(len(source.read) for source in sources) == [0, 0, 0, 2]
    assert [path.name for path in tmp_path.iterdir()] == ["dest"]


def test_the_folder_is_held_by_one_at_a_time_while_others_make_and_remove_it(tmp_path: Path):
    folder, holders, most, failures = tmp_path / "dest.partial", 0, 0, []

    def hold_often() -> None:
        nonlocal holders, most
        try:
            for _ in range(200):
                with locked(folder):
                    holders += 1
                    most = max(most, holders)
                    holders -= 1
                    folder.rmdir()
        except BaseException as error:
            failures.append(error)

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)  # the race is between two system calls of one thread
    try:
        threads = [threading.Thread(target=hold_often) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    assert (failures, most) == ([], 1)


def test_repeated_keys_are_made_unique_in_order_also_across_a_resumption(tmp_path: Path):
    class Repeating(Memory):
        def samples(self, split: str, start: int = 0) -> Iterator[Sample]:
            for sample in super().samples(split, start):
                yield Sample(key=f"k{int(sample.key[1:]) % 700}", data=sample.data, values=sample.values)

    run(Repeating(bad_every=11), tmp_path / "straight")
    with pytest.raises(KeyboardInterrupt):
        run(Repeating(bad_every=11), tmp_path / "dest", on_progress=stop_at(8, KeyboardInterrupt()))
    run(Repeating(bad_every=11), tmp_path / "dest")
    assert files(tmp_path / "dest") == files(tmp_path / "straight")
    split = open_dataset(tmp_path / "dest").split("train")
    keys = split.keys(range(split.count)) + [record.key for record in records(tmp_path / "dest") if record.split == "train"]
    assert len(set(keys)) == len(keys) == 2600
    assert set(keys) == {f"k{index % 700}" + (f"#{index // 700 + 1}" if index >= 700 else "") for index in range(2600)}


def test_labels_outside_the_classes_are_bad_samples(tmp_path: Path):
    class Mislabelled(Memory):
        def samples(self, split: str, start: int = 0) -> Iterator[Sample]:
            for sample in super().samples(split, start):
                label = {"k3": -1, "k5": 4}.get(sample.key, sample.label)
                yield Sample(key=sample.key, data=sample.data, values=(label,))

    run(Mislabelled(20, 10), tmp_path / "dest")
    assert [(record.key, record.reason) for record in records(tmp_path / "dest") if record.split == "train"] == [
        ("k3", "bad label: -1 is not in 0..3"),
        ("k5", "bad label: 4 is not in 0..3"),
    ]


def test_a_split_without_a_usable_image_is_an_error_that_says_what_to_do(tmp_path: Path):
    with pytest.raises(ValueError, match=r"no usable test image.*--test-fraction"):
        run(Memory(10, 0), tmp_path / "a")
    with pytest.raises(ValueError, match="no usable train image"):
        run(Memory(10, 10, bad_every=1), tmp_path / "b", max_bad_fraction=1.0)


def test_the_fingerprint_does_not_depend_on_how_the_shards_are_cut(tmp_path: Path):
    small, large = run(Memory(), tmp_path / "a", shard_bytes=1), run(Memory(), tmp_path / "b", shard_bytes=1 << 30)
    assert len(small.splits["train"].shards) == 6
    assert len(large.splits["train"].shards) == 1
    assert small.fingerprint == large.fingerprint


# prepare


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for split, count in (("train", 12), ("test", 4)):
        for index in range(count):
            path = tmp_path / "source" / split / "ab"[index % 2] / f"{index}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(encode(picture(index, 4, 4)))
    return tmp_path / "source"


def test_prepare_converts_once_and_takes_a_converted_folder_as_it_is(folder: Path, tmp_path: Path):
    config = DataConfig(path=str(folder), root=str(tmp_path / "root"))
    calls: list[Progress] = []
    made = prepare(config, calls.append)
    assert calls
    assert made.parent == tmp_path / "root"
    assert made.name.startswith("folder-")
    assert is_converted(made)
    assert not is_converted(folder)
    assert prepare(config, lambda _: pytest.fail("converted again")) == made
    assert prepare(DataConfig(path=str(made), root="/nonexistent")) == made


def test_prepare_notices_a_changed_source_and_repairs_a_damaged_conversion(folder: Path, tmp_path: Path):
    config = DataConfig(path=str(folder), root=str(tmp_path / "root"))
    made = prepare(config)
    whole = files(made)
    (made / "train-00000.parquet").unlink()
    assert prepare(config) == made
    assert files(made) == whole
    (folder / "train" / "a" / "new.png").write_bytes(encode(picture(99, 4, 4)))
    later = prepare(config)
    assert later != made
    assert open_dataset(later).split("train").count == 13


def test_prepare_refuses_a_damaged_converted_folder(folder: Path, tmp_path: Path):
    made = prepare(DataConfig(path=str(folder), root=str(tmp_path / "root")))
    (made / "test-00000.parquet").write_bytes(b"")
    with pytest.raises(ValueError, match=r"test-00000\.parquet .* has 0 bytes"):
        prepare(DataConfig(path=str(made)))


# Command line


def test_the_command_converts_says_what_came_out_and_the_second_time_that_it_is_there(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    assert main([str(folder), str(tmp_path / "dest")]) == 0
    shown = capsys.readouterr()
    assert "2 classes (a, b): 12 train, 4 test images" in shown.out
    assert "train: 12 of 12 images" in shown.err
    assert main([str(folder), str(tmp_path / "dest")]) == 0
    assert "there already" in capsys.readouterr().out


def test_the_command_takes_names_and_a_balanced_sample(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    arguments = [str(folder), str(tmp_path / "dest"), "--classes", "ant, bee", "--sample", "6", "--sample-test", "2", "--seed", "3"]
    assert main(arguments) == 0
    dataset = open_dataset(tmp_path / "dest")
    assert dataset.manifest.classes == ("ant", "bee")
    assert sorted(dataset.split("train").labels().tolist()) == [0, 0, 0, 1, 1, 1]
    assert sorted(dataset.split("test").labels().tolist()) == [0, 1]
    capsys.readouterr()


def test_the_command_reports_a_users_mistake_in_one_line_and_fails(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert main([str(tmp_path / "gone"), str(tmp_path / "dest")]) == 2
    shown = capsys.readouterr().err
    assert shown.startswith("error: ")
    assert "does not exist" in shown
    assert "Traceback" not in shown
    assert main([str(tmp_path), str(tmp_path / "dest"), "--sample-test", "4"]) == 2
    assert not (tmp_path / "dest").exists()


def test_ctrl_c_says_that_the_same_command_goes_on(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch):
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(command, "convert", interrupted)
    assert main([str(folder), str(tmp_path / "dest")]) == 130
    assert "run the same command again" in capsys.readouterr().err


@pytest.mark.parametrize("program", [["dataio.convert"], ["trainer.command", "convert"]], ids=["module", "finetune"])
def test_a_real_interrupt_of_the_real_command_goes_on_to_the_same_dataset(program: list[str], tmp_path: Path):
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (6000, 28, 28)).astype(np.uint8)
    labels = (np.arange(6000) % 10).astype(np.uint8)
    source = tmp_path / "source"
    source.mkdir()
    for split in ("train", "t10k"):
        for what, array in (("images", images), ("labels", labels)):
            header = bytes([0, 0, 8, array.ndim]) + b"".join(side.to_bytes(4, "big") for side in array.shape)
            (source / f"{split}-{what}-idx{array.ndim}-ubyte").write_bytes(header + array.tobytes())
    command = [sys.executable, "-m", *program, str(source), str(tmp_path / "dest")]
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell's background job has it ignored, and so has its child
    )
    while not (tmp_path / "dest.partial" / "train-00000.parquet").exists():
        assert process.poll() is None
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert "run the same command again" in errors
    assert not (tmp_path / "dest").exists()
    assert main(command[-2:]) == 0
    assert open_dataset(tmp_path / "dest").manifest.splits["train"].count == 6000


# The sample in the repository


def test_the_shipped_sample_is_whole_balanced_and_small():
    folder = ROOT / "dataio" / "samples" / "fashion_mnist"
    dataset = open_dataset(folder)
    assert dataset.manifest.classes[0] == "T-shirt/top"
    assert len(dataset.manifest.classes) == 10
    assert dataset.manifest.image_sizes == {"28x28": 2500}
    assert sum(path.stat().st_size for path in folder.iterdir()) < 1_450_000
    for name, count in (("train", 2000), ("test", 500)):
        split = dataset.split(name)
        split.verify()
        assert np.bincount(split.labels()).tolist() == [count // 10] * 10
    assert "MIT" in (folder / "README.md").read_text()


def test_a_cifar_archive_and_its_folder_convert_to_the_same_fingerprint(tmp_path: Path):
    from test_sources_cifar import cifar_members, write_tar

    archive = write_tar(tmp_path / "cifar-10-python.tar.gz", cifar_members())
    with tarfile.open(archive) as opened:
        opened.extractall(tmp_path / "folder", filter="data")
    made = [
        run(open_source(str(path), root=tmp_path, test_fraction=0.1), tmp_path / f"dest{index}")
        for index, path in enumerate((archive, tmp_path / "folder"))
    ]
    assert made[0].fingerprint == made[1].fingerprint
    assert [manifest.source for manifest in made] == ["cifar-tar", "cifar-batches"]
    assert made[0].image_sizes == {"32x32": 36}
