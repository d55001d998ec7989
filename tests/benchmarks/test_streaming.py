"""The streaming comparison: its images, its equal work, and that a contender which loses or repeats images is found out.

The contenders at the top run in the benchmark's own processes, by their import path. Speeds are measured and not judged.
"""

import inspect
import io
import json
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torchvision import transforms

from benchmarks.common import finite
from benchmarks.streaming.child import strip
from benchmarks.streaming.contenders import Decode, Got, ImageFolder, contender_of, peers_decoder
from benchmarks.streaming.measure import Plan, compare_ids, measure, table
from benchmarks.streaming.pictures import Images, make_images
from benchmarks.streaming.usage import cpu_seconds, memory
from dataio.codecs.image.decode import Decoder

COUNT, BATCH, SIZE = 60, 8, 96
HERE = "tests.benchmarks.test_streaming"


class Broken(ImageFolder):
    """Hands out its first batch twice and never its second, and negatives of all images."""

    def batches(self, state: Any = None) -> Iterator[Got]:
        numbers = [0, 0, *range(2, 1000)]
        kept = [Got(images=255 - each.images, labels=each.labels, ids=each.ids) for each in super().batches(state)]
        yield from (kept[number] for number in numbers[: len(kept)])


class Absent(ImageFolder):
    package = "a-peer-that-nobody-has"


class Crashing(ImageFolder):
    def batches(self, state: Any = None) -> Iterator[Got]:
        raise ConnectionError("its server is gone")
        yield


def pictures() -> dict[str, np.ndarray]:
    """Coarse noise, enlarged: unlike each other everywhere, and still like photographs to a JPEG encoder."""
    rng = np.random.default_rng(0)
    coarse = {name: rng.integers(0, 256, (12, 14, 3), dtype=np.uint8) for name in ("ant", "bee", "cat")}
    return {name: np.asarray(Image.fromarray(pixels).resize((350, 300), Image.Resampling.BICUBIC)) for name, pixels in coarse.items()}


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Images:
    return make_images(tmp_path_factory.mktemp("scratch") / "photos", pictures(), count=COUNT, seed=1, size=SIZE, made_of={})


@pytest.fixture(scope="module")
def result(images: Images) -> dict[str, Any]:
    fakes = [f"{HERE}:{each.__name__}" for each in (Broken, Absent, Crashing)]
    return measure(plan(images, "ours+dali", "imagefolder+pil", *fakes), images, tell=lambda _: None)


def plan(images: Images, *contenders: str, batches: int = 3) -> Plan:
    return Plan(
        contenders=contenders,
        python=sys.executable,
        scratch=images.folder.parent,
        size=SIZE,
        batch_size=BATCH,
        workers=(1,),
        rounds=1,
        warm_up_batches=2,
        batches=batches,
        seed=0,
        window=512,
        memory_bytes=64 << 20,
    )


@pytest.mark.parametrize("name", ["ours+dali", "imagefolder+pil"])
def test_a_sound_contender_hands_out_every_image_once_and_resumes_exactly(result: dict[str, Any], name: str) -> None:
    row = result["contenders"][name]
    assert row["verdict"] == "equal work"
    assert row["epoch"] == {"missing": 0, "repeated": 0, "handed_out": COUNT, "wrong_labels": 0, "workers": 1}
    assert row["resume"]["exact"]
    assert row["resume"]["same_order"]
    assert row["resume"]["after_images"] == 24
    speed = row["speed"]["1"]
    assert speed["images_per_second"]["median"] > 0
    assert row["rounds"][0]["images"] == 3 * BATCH
    assert 0 < speed["import_seconds"]["median"] < speed["first_batch_seconds"]["median"]
    assert 0 < speed["pss_bytes"] <= speed["peak_rss_bytes"]
    assert row["format"]["disk_bytes"] > 0


def test_lost_and_repeated_images_are_found(result: dict[str, Any]) -> None:
    row = result["contenders"][f"{HERE}:Broken"]
    assert row["epoch"]["missing"] == row["epoch"]["repeated"] == BATCH
    assert row["rounds"][0]["repeated"] == BATCH
    assert f"an epoch lacks {BATCH} images and repeats {BATCH}" in row["verdict"]
    assert not row["resume"]["exact"]


def test_pixels_of_another_picture_are_found(result: dict[str, Any]) -> None:
    assert "levels off PIL's" in result["contenders"][f"{HERE}:Broken"]["verdict"]


def test_a_peer_that_is_missing_or_fails_keeps_its_row(result: dict[str, Any]) -> None:
    absent, crashing = (result["contenders"][f"{HERE}:{name}"] for name in ("Absent", "Crashing"))
    assert absent["status"] == "not installed"
    assert crashing["status"].startswith("failed")
    assert "its server is gone" in crashing["status"]
    assert all("verdict" not in row for row in (absent, crashing))


def test_the_table_names_every_contender_and_the_result_is_json(result: dict[str, Any]) -> None:
    text = "\n".join(table({**result, "rounds": 1}, [1]))
    assert all(name in text for name in result["contenders"])
    assert "not installed" in text
    assert json.loads(json.dumps(finite(result), allow_nan=False))["contenders"].keys() == result["contenders"].keys()


def test_more_batches_than_an_epoch_has_are_refused(images: Images) -> None:
    with pytest.raises(ValueError, match="7 batches of 8 are 72 images, an epoch has 60"):
        measure(plan(images, "ours+dali", batches=7), images, tell=lambda _: None)


def test_a_batch_that_was_handed_out_is_not_kept_by_what_is_noted_of_it() -> None:
    """A view of none of its pixels keeps them all: our loader then never gets a used page back, and looks a fifth slower than it is."""
    batch = Got(images=torch.zeros(4, 3, 8, 8, dtype=torch.uint8), labels=torch.arange(4), ids=np.arange(4))
    noted = strip(batch)
    assert noted.images.untyped_storage().nbytes() == 0
    assert noted.labels.data_ptr() != batch.labels.data_ptr()
    assert (noted.labels.tolist(), noted.ids) == ([0, 1, 2, 3], [0, 1, 2, 3])


@given(st.integers(0, 40), st.lists(st.integers(0, 50), max_size=80))
def test_comparing_ids_counts_what_lacks_and_what_is_too_many(count: int, ids: list[int]) -> None:
    found = compare_ids(ids, range(count))
    counts = Counter(ids)
    assert found["missing"] == sum(counts[each] == 0 for each in range(count))
    foreign = sum(number for each, number in counts.items() if each >= count)
    assert found["repeated"] == foreign + sum(max(counts[each] - 1, 0) for each in range(count))


def test_the_same_seed_gives_the_same_images(images: Images, tmp_path: Path) -> None:
    again = make_images(tmp_path / "again", pictures(), count=COUNT, seed=1, size=SIZE, made_of={})
    other = make_images(tmp_path / "other", pictures(), count=COUNT, seed=2, size=SIZE, made_of={})
    small = make_images(tmp_path / "small", pictures(), count=6, seed=1, size=32, made_of={})
    assert again.sha256 == images.sha256 != other.sha256
    assert again.paths == images.paths == tuple(sorted(images.paths))
    assert np.bincount(images.labels()).tolist() == [20, 20, 20]
    assert {Image.open(io.BytesIO(small.read(each))).size for each in range(6)} == {(32, 32)}
    sizes = {Image.open(io.BytesIO(images.read(each))).size for each in range(COUNT)}
    assert len(sizes) > 10
    assert all(256 <= side <= 350 for size in sizes for side in size)


@pytest.mark.parametrize("decoder", ["pil", "torchvision"])
def test_the_peers_decode_as_torchvisions_transforms_do(images: Images, decoder: str) -> None:
    wanted = transforms.Compose([transforms.Resize(SIZE), transforms.CenterCrop(SIZE), transforms.PILToTensor()])
    decode = Decode(SIZE, decoder, flip=False)
    for each in range(0, COUNT, 5):
        data = images.read(each)
        found = decode(data)
        assert found.shape == (SIZE, SIZE, 3)
        assert found.dtype == torch.uint8
        off = (found.permute(2, 0, 1).int() - wanted(Image.open(io.BytesIO(data)).convert("RGB")).int()).abs()
        # Of two decoders and resizers one rounds differently now and then; a cut moved by one pixel is off by several levels everywhere.
        assert off.max() <= (0 if decoder == "pil" else 2)
        assert off.float().mean() < 0.1


def test_a_mirrored_image_is_the_other_one_reversed(images: Images) -> None:
    plain = Decode(SIZE, "torchvision", flip=False)(images.read(0))
    seen = {tuple(Decode(SIZE, "torchvision")(images.read(0)).flatten()[:300].tolist()) for _ in range(40)}
    assert seen == {tuple(each.flatten()[:300].tolist()) for each in (plain, plain.flip(1))}


def test_the_peers_decoder_can_stand_in_for_ours(images: Images) -> None:
    peers = peers_decoder("pil")
    assert inspect.signature(peers.decode).parameters.keys() == inspect.signature(Decoder.decode).parameters.keys()
    encoded = [np.frombuffer(images.read(each), np.uint8) for each in range(3)]
    buffer = np.zeros((4, SIZE, SIZE, 3), np.uint8)
    with peers(height=SIZE, width=SIZE, fit="crop", threads=2, max_pixels=1 << 20) as decoder:
        found = decoder.decode(encoded, out=buffer).images
    wanted = [Decode(SIZE, "pil", flip=False)(data.tobytes()).numpy() for data in encoded]
    assert np.array_equal(found, wanted)
    assert np.array_equal(buffer[:3], wanted)
    assert not buffer[3].any()


def test_an_unknown_contender_or_decoder_is_named() -> None:
    with pytest.raises(ValueError, match="there is no contender 'tfrecords'"):
        contender_of("tfrecords")
    with pytest.raises(ValueError, match="webdataset does not decode by 'dali'"):
        contender_of("webdataset+dali")
    assert [contender_of(name)[1] for name in ("ours", "litdata", "litdata+pil")] == ["dali", "torchvision", "pil"]


def test_cpu_time_and_memory_of_a_living_child_count() -> None:
    before, alone = cpu_seconds(), memory()
    work = """
import sys, time
held = bytearray(b"x") * (64 << 20)
while time.process_time() < 0.5:
    pass
print(1, flush=True)
sys.stdin.read()
"""
    with subprocess.Popen([sys.executable, "-c", work], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
        assert child.stdout is not None
        child.stdout.readline()
        used, both = cpu_seconds() - before, memory()
        assert child.stdin is not None
        child.stdin.close()
    assert used >= 0.45
    assert both.private_bytes - alone.private_bytes >= 60 << 20
    assert cpu_seconds() - before >= 0.45  # now that it was waited for, too
