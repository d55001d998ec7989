"""Augmentation by DALI: the same draws give the pixels that PyTorch's operations give, exactly where they compute in whole numbers and to a
level elsewhere, whatever the batch. All of it on a CPU; that a GPU would take the same graph is looked at without one, and tests/gpu runs
it there."""

import tempfile
from collections.abc import Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dataio.batch import Batch
from dataio.config import DataConfig
from dataio.loader import Loader
from dataio.order import Order
from dataio.parquet import open_dataset
from tests.trainer.photographs import photographs
from trainer.learn.augment import dali, draws, geometry
from trainer.learn.augment.dali import DaliAugmentation, Segment
from trainer.learn.augment.draws import Drawn, Key, Round
from trainer.learn.augment.tables import BINS, SIGNED, Op, magnitudes
from trainer.learn.augment.views import MOVES, Views, after_round, erased, jittered, make_views

SAMPLE = Path(__file__).resolve().parents[2] / "dataio" / "samples" / "fashion_mnist"
SIDE = 48
EVERYTHING = DataConfig(
    crop="resized", rotate=20, policy="rand", policy_ops=3, jitter=(0.4, 0.4, 0.4, 0.1), erase=0.5, augment_backend="dali"
)
NOTHING = Drawn(boxes=None, angles=None, rounds=(), jitter=None, erased=None)
ALL = Segment(stored=(40, 48), crops_to=(32, 36), turns=True, has_round=True, jitters=(True,) * 4, erases=True, erased_level=(1, 2, 3))
"""A pipeline of all that there is."""


def by_dali(images: Tensor, drawn: Drawn, size: tuple[int, int], jitters: Sequence[bool] = (True,) * 4) -> Tensor:
    done = DaliAugmentation(erased_level=(1, 2, 3), jitters=jitters)(images, drawn, size)
    assert done.dtype == torch.uint8
    assert done.is_contiguous(memory_format=torch.channels_last)
    return done


def differences(one: Tensor, other: Tensor) -> tuple[int, float]:
    """(the largest, the part of the levels that differ)."""
    apart = (one.int() - other.int()).abs()
    return int(apart.max()), float((apart > 0).float().mean())


def views_of(data: DataConfig, *, seed: int = 2, image_size: int = 0) -> Views:
    views = make_views(data, seed=seed, image_size=image_size)
    assert views is not None
    return views


def batch_of(images: Tensor, *, ids: Sequence[int] | None = None, epoch: int = 0, step: int = 0) -> Batch:
    chosen = np.arange(len(images)) if ids is None else np.array(ids, dtype=np.int64)
    return Batch(samples=images, targets={}, ids=chosen, epoch=epoch, step=step, virtual_rank=0)


# --- the pixels of PyTorch's operations -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("op", Op)
def test_an_operation_has_the_same_pixels_in_every_bin(op: Op, sign: int) -> None:
    if sign < 0 and op not in SIGNED:
        pytest.skip("it has no direction")
    images = photographs(BINS, SIDE)
    each = Round(ops=np.full(BINS, op), magnitudes=magnitudes("trivial", SIDE, SIDE)[op] * sign)
    most, part = differences(by_dali(images, replace(NOTHING, rounds=(each,)), (SIDE, SIDE)), after_round(images, each))
    assert most <= 1 and part < 2e-3 if op in MOVES else most == 0, (most, part)


@pytest.mark.parametrize("strengths", [(0.9, 0.0, 0.0, 0.0), (0.0, 0.9, 0.0, 0.0), (0.0, 0.0, 0.9, 0.0), (0.9, 0.9, 0.9, 0.0)], ids=str)
def test_jitters_without_hue_have_the_same_bytes(strengths: tuple[float, float, float, float]) -> None:
    images = photographs(24, SIDE)
    drawn = draws.jitter(Key(seed=5, epoch=2, ids=np.arange(24)), strengths)
    ours = by_dali(images, replace(NOTHING, jitter=drawn), (SIDE, SIDE), [strength > 0 for strength in strengths])
    assert torch.equal(ours, jittered(images, drawn, strengths))


@pytest.mark.parametrize("strengths", [(0.0, 0.0, 0.0, 0.5), (0.4, 0.4, 0.4, 0.1)], ids=str)
def test_jitters_with_hue_differ_by_a_level_in_few_places(strengths: tuple[float, float, float, float]) -> None:
    images = photographs(24, SIDE)
    drawn = draws.jitter(Key(seed=5, epoch=2, ids=np.arange(24)), strengths)
    ours = by_dali(images, replace(NOTHING, jitter=drawn), (SIDE, SIDE), [strength > 0 for strength in strengths])
    theirs = jittered(images, drawn, strengths)
    assert not torch.equal(theirs, images)
    most, part = differences(ours, theirs)
    assert part < 1e-3
    assert most <= (1 if strengths[0] == 0 else 3)  # later jitters multiply what the hue's level is apart


@pytest.mark.parametrize(("stored", "size"), [(48, (48, 48)), (64, (24, 40)), (30, (48, 48)), (256, (224, 224)), (9, (5, 3))], ids=str)
def test_a_resized_crop_differs_by_a_level_also_at_its_edges(stored: int, size: tuple[int, int]) -> None:
    images = photographs(24, stored)
    boxes = draws.crops(Key(seed=0, epoch=0, ids=np.arange(24)), size=(stored, stored), scale=(0.08, 1.0), ratio=(0.75, 4 / 3))
    ours = by_dali(images, replace(NOTHING, boxes=boxes), size)
    most, part = differences(ours, geometry.crops_by_products(images, boxes, size))
    assert most <= 1
    assert part < 0.02
    most, part = differences(ours, geometry.resized_crops(images, boxes, size))  # a CPU's kernel rounds between rows and columns
    assert most <= 1
    assert part < 0.25


def test_a_crop_of_all_is_the_image() -> None:
    images = photographs(3, SIDE)
    whole = draws.Boxes(top=np.zeros(3, int), left=np.zeros(3, int), height=np.full(3, SIDE), width=np.full(3, SIDE))
    assert torch.equal(by_dali(images, replace(NOTHING, boxes=whole), (SIDE, SIDE)), images)


def test_rotated_and_erased_images_are_the_same() -> None:
    images, key = photographs(24, SIDE), Key(seed=3, epoch=1, ids=np.arange(24))
    angles = draws.angles(key, 90)
    matrices = geometry.affine_matrices(np.full(24, Op.ROTATE), angles, (SIDE, SIDE))
    most, part = differences(by_dali(images, replace(NOTHING, angles=angles), (SIDE, SIDE)), geometry.moved(images, matrices))
    assert most <= 1
    assert part < 1e-3
    gone = draws.erased(key, size=(SIDE, SIDE), probability=0.5)
    assert 0 < (gone.height > 0).sum() < 24
    assert torch.equal(by_dali(images, replace(NOTHING, erased=gone), (SIDE, SIDE)), erased(images, gone, (1, 2, 3)))


@pytest.mark.parametrize("size", [(1, 1), (2, 5), (5, 2), (3, 3), (7, 40)], ids=str)
def test_images_of_a_few_pixels_are_the_same_too(size: tuple[int, int]) -> None:
    images = photographs(len(Op) * 2, 64)[:, :, 5 : 5 + size[0], 7 : 7 + size[1]].contiguous(memory_format=torch.channels_last)
    ops = np.tile(np.arange(len(Op)), 2)
    each = Round(ops=ops, magnitudes=magnitudes("trivial", *size)[ops, 20])
    assert differences(by_dali(images, replace(NOTHING, rounds=(each,)), size), after_round(images, each))[0] <= 1
    data = replace(EVERYTHING, policy="none", rotate=0, jitter=(0.4, 0.4, 0.4, 0.0), crop="pad")
    ours, theirs = (views_of(replace(data, augment_backend=name))(batch_of(images)) for name in ("dali", "torch"))  # type: ignore[arg-type]
    assert torch.equal(ours, theirs)


def test_flat_and_extreme_images_are_the_same() -> None:
    """Where divisors are 0, and where levels overflow."""
    flat = torch.tensor([0, 1, 128, 254, 255], dtype=torch.uint8).view(5, 1, 1, 1).expand(5, 3, 8, 8)
    colours = torch.zeros(6, 3, 8, 8, dtype=torch.uint8)
    for number, channels in enumerate(([0], [1], [2], [0, 1], [1, 2], [0, 2])):
        colours[number, channels] = 255
    images = torch.cat([flat, colours]).contiguous(memory_format=torch.channels_last)
    for op in set(Op) - set(MOVES):
        for sign in (1, -1) if op in SIGNED else (1,):
            each = Round(ops=np.full(11, op), magnitudes=magnitudes("trivial", 8, 8)[op, 20:31] * sign)
            assert torch.equal(by_dali(images, replace(NOTHING, rounds=(each,)), (8, 8)), after_round(images, each)), op
    drawn = draws.jitter(Key(seed=5, epoch=2, ids=np.arange(11)), (0.0, 0.0, 0.0, 0.5))
    ours = by_dali(images, replace(NOTHING, jitter=drawn), (8, 8), (False, False, False, True))
    assert differences(ours, jittered(images, drawn, (0.0, 0.0, 0.0, 0.5)))[0] <= 1


# --- purity -----------------------------------------------------------------------------------------------------------------------------


@settings(max_examples=4, deadline=None)
@given(seed=st.integers(0, 2**63 - 1), epoch=st.integers(0, 10**6), data=st.data())
def test_an_image_follows_from_seed_epoch_and_id_in_any_batch(seed: int, epoch: int, data: st.DataObject) -> None:
    """Whatever its companions, its place among them, and what came before."""
    images, ids = photographs(6, 16), np.array([0, 1, 5, 17, 2**31, 2**40])
    used = views_of(EVERYTHING, seed=seed)
    whole = used(batch_of(images, ids=ids.tolist(), epoch=epoch))
    few = np.array(data.draw(st.lists(st.integers(0, 5), min_size=1, unique=True)))
    some = batch_of(images[torch.from_numpy(few)], ids=ids[few].tolist(), epoch=epoch, step=data.draw(st.integers(0, 99)))
    for views in (used, views_of(EVERYTHING, seed=seed)):
        assert torch.equal(views(some), whole[torch.from_numpy(few)])
    theirs = views_of(replace(EVERYTHING, crop="pad", rotate=0, policy="none", jitter=(0.4, 0.4, 0.4, 0.0)), seed=seed)
    by_torch = views_of(
        replace(EVERYTHING, crop="pad", rotate=0, policy="none", jitter=(0.4, 0.4, 0.4, 0.0), augment_backend="torch"), seed=seed
    )
    assert torch.equal(theirs(some), by_torch(some)), "the same draws"


def test_pieces_and_threads_change_no_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    images = photographs(11, SIDE)
    whole = views_of(EVERYTHING)(batch_of(images))
    threads = torch.get_num_threads()
    monkeypatch.setattr(dali, "PIECE_IMAGES", 4)
    try:
        torch.set_num_threads(3)
        assert torch.equal(views_of(EVERYTHING)(batch_of(images)), whole)
    finally:
        torch.set_num_threads(threads)
    assert views_of(EVERYTHING)(batch_of(images[:0])).shape[0] == 0


def test_a_batch_stays_as_it_is_when_the_next_one_is_made() -> None:
    images, views = photographs(5, SIDE), views_of(EVERYTHING)
    kept = [views(batch_of(images, epoch=epoch)) for epoch in range(4)]
    assert all(torch.equal(views(batch_of(images, epoch=epoch)), batch) for epoch, batch in enumerate(kept))
    assert torch.equal(images, photographs(5, SIDE)), "what comes in, too"


def steps_from(start: int, stop: int, *, carried: range = range(4)) -> list[tuple[Batch, ...]]:
    dataset = open_dataset(SAMPLE)
    order = Order(seed=1, fingerprint=dataset.manifest.fingerprint, count=2000, batch_size=400, virtual_ranks=4)
    data = replace(EVERYTHING, cache="none", backend="numpy")
    loader = Loader(dataset, data, order=order, virtual_ranks=carried, device=torch.device("cpu"), seed=1, on_bad=print)
    with closing(loader.train(start, stop)) as batches:
        return list(batches)


def test_steps_see_the_same_images_after_a_kill_and_on_any_number_of_workers() -> None:
    def seen(steps: list[tuple[Batch, ...]]) -> list[list[Tensor]]:
        views = views_of(EVERYTHING, seed=1, image_size=24)  # as a new process would
        return [[views(batch) for batch in step] for step in steps]

    whole = seen(steps_from(3, 7))  # over the end of an epoch
    assert all(map(torch.equal, whole[-1], seen(steps_from(6, 7))[0]))
    for carried in (range(2), range(2, 4)):
        shares = seen(steps_from(3, 7, carried=carried))
        assert all(all(map(torch.equal, all_of[carried.start : carried.stop], share)) for all_of, share in zip(whole, shares, strict=True))


# --- without a GPU ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "segment",
    [ALL, Segment(stored=(1, 1), has_round=True), Segment(stored=(300, 200), crops_to=(224, 224)), Segment(stored=(5, 5), erases=True)],
    ids=["all", "one pixel", "crop", "erase"],
)
def test_a_gpus_graph_is_accepted_and_keeps_pixels_on_the_gpu(segment: Segment) -> None:
    """DALI checks while a graph is defined that there is each operator for its device, and where each input lies."""
    pipeline = dali.graph(segment, batch_size=4, device_id=0)
    (out,) = pipeline._graph_out
    assert out.device == "gpu"


def test_dali_would_refuse_a_graph_whose_inputs_lie_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """So the test above can fail."""
    from nvidia.dali import types

    constant = types.Constant
    monkeypatch.setattr(types, "Constant", lambda value, device="cpu": constant(value))
    with pytest.raises(RuntimeError, match="incompatible device"):
        dali.graph(ALL, batch_size=4, device_id=0)


class OnGpu:
    """Stands for pixels on a GPU."""

    device = torch.device("cuda", 0)

    def __len__(self) -> int:
        return 3

    def __getitem__(self, part: slice) -> str:
        return "pixels"


def test_on_a_gpu_a_pipeline_runs_on_the_steps_stream_and_nothing_is_passed_by_dlpack(monkeypatch: pytest.MonkeyPatch) -> None:
    side, fed, copies = object(), [], []

    def run(stream: object) -> tuple[Any]:
        fed.append(("run", stream))
        return (SimpleNamespace(as_tensor=lambda: "a batch"),)

    def no_dlpack(_: object) -> Tensor:
        raise AssertionError("DALI frees what it gave by DLPack with a synchronisation of the device")

    def copied(made: object, device: torch.device, stream: object) -> str:
        copies.append((made, device, stream))
        return "a copy"

    monkeypatch.setattr("torch.cuda.current_stream", lambda device: side)
    monkeypatch.setattr("torch.utils.dlpack.from_dlpack", no_dlpack)
    monkeypatch.setattr(dali, "copied_from_dali", copied)
    segment, augmentation = Segment(stored=(4, 4), turns=True), DaliAugmentation(erased_level=(0, 0, 0), jitters=(False,) * 4)
    fake = SimpleNamespace(feed_input=lambda name, data, **to: fed.append((name, to.get("cuda_stream"))), run=run)
    augmentation._pipelines[segment, OnGpu.device] = fake
    angles = np.zeros(3)
    made: Any = augmentation._run(segment, OnGpu(), dali._inputs(segment, replace(NOTHING, angles=angles), None))  # type: ignore[arg-type]
    assert made == "a copy"
    assert fed == [("images", side), ("turn", None), ("run", side)]
    assert copies == [("a batch", OnGpu.device, side)]


def _conditional() -> Any:
    """A graph of a function that DALI has not met before."""
    from nvidia.dali import fn, types

    chosen = fn.external_source(name="chosen", dtype=types.BOOL, ndim=0)
    out = fn.external_source(name="number", dtype=types.INT32, ndim=0)
    if chosen:
        out = out + 1
    return out


def test_nothing_is_left_in_the_folder_for_temporary_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    written: list[Path] = []
    remove = dali._remove_sources

    def noted() -> None:
        written.extend(tmp_path.rglob("*.py"))
        remove()

    monkeypatch.setattr(dali, "_remove_sources", noted)
    monkeypatch.setattr(dali, "_augmented", lambda *_: _conditional())
    dali.graph(ALL, batch_size=1, device_id=None)
    assert written, "DALI writes no file any more: then there is nothing to remove"
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]
