"""On a GPU: augmentation draws what it draws on a CPU, gives the same pixels (exactly where it computes in whole numbers, else to a level),
by PyTorch's operations and by DALI, and PyTorch's never make the host wait."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from dataio.batch import Batch
from dataio.config import DataConfig
from tests.trainer.photographs import photographs
from trainer.learn.augment.batches import augmented
from trainer.learn.augment.dali import DaliAugmentation
from trainer.learn.augment.draws import Drawn, Round
from trainer.learn.augment.mix import Mix, with_partners
from trainer.learn.augment.tables import BINS, Op, magnitudes
from trainer.learn.augment.views import MOVES, after_round, make_views

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU: torch.cuda.is_available() is False here"),
]

SIDE = 64
CUDA = torch.device("cuda")


def batch_of(images: Tensor) -> Batch:
    ids = np.arange(len(images))
    return Batch(
        samples=images, targets={"label": torch.arange(len(images), device=images.device)}, ids=ids, epoch=3, step=7, virtual_rank=1
    )


@pytest.mark.parametrize("op", Op)
def test_each_operation_has_the_pixels_of_the_cpu(op: Op) -> None:
    images = photographs(BINS, SIDE)
    drawn = Round(ops=np.full(BINS, op), magnitudes=magnitudes("trivial", SIDE, SIDE)[op])
    apart = (after_round(images.to(CUDA), drawn).cpu().int() - after_round(images, drawn).int()).abs()
    assert apart.max() <= (1 if op in MOVES else 0)
    assert (apart > 0).float().mean() < 1e-3


@pytest.mark.parametrize(
    ("data", "most", "part"),
    [
        (DataConfig(jitter=(0.4, 0.4, 0.4, 0.0), erase=0.5), 0, 0.0),
        (DataConfig(jitter=(0.0, 0.0, 0.0, 0.5)), 1, 1e-3),
        (DataConfig(crop="resized"), 1, 0.5),  # a CPU rounds to uint8 between rows and columns
        (DataConfig(rotate=30), 1, 1e-3),
    ],
    ids=["jitter-erase", "hue", "crop", "rotate"],
)
@pytest.mark.parametrize("mixup", [0.0, 0.5])
def test_a_batch_has_the_pixels_of_the_cpu(data: DataConfig, most: int, part: float, mixup: float) -> None:
    images = photographs(40, SIDE)
    views = make_views(data, seed=2, image_size=48)
    mix = Mix(seed=2, mixup=mixup, cutmix=1.0)
    here, ours = augmented(batch_of(images), views=views, own=None, mix=mix, share_of=1)
    there, theirs = augmented(batch_of(images.to(CUDA)), views=views, own=None, mix=mix, share_of=1)
    assert ours == theirs
    apart = (there.cpu().int() - here.int()).abs()
    assert apart.max() <= most
    assert (apart > 0).float().mean() <= part


@pytest.mark.parametrize("op", Op)
def test_dalis_operations_have_the_pixels_of_the_cpu(op: Op) -> None:
    images = photographs(BINS, SIDE)
    each = Round(ops=np.full(BINS, op), magnitudes=magnitudes("trivial", SIDE, SIDE)[op])
    drawn = Drawn(boxes=None, angles=None, rounds=(each,), jitter=None, erased=None)
    there = DaliAugmentation(erased_level=(0, 0, 0), jitters=(True,) * 4)(images.to(CUDA), drawn, (SIDE, SIDE))
    assert there.device.type == "cuda"
    apart = (there.cpu().int() - after_round(images, each).int()).abs()
    assert apart.max() <= (1 if op in MOVES else 0)
    assert (apart > 0).float().mean() < 2e-3


@pytest.mark.parametrize(
    ("data", "most", "part"),
    [
        (DataConfig(jitter=(0.4, 0.4, 0.4, 0.0), erase=0.5), 0, 0.0),
        (DataConfig(jitter=(0.0, 0.0, 0.0, 0.5)), 1, 1e-3),
        (DataConfig(crop="resized"), 1, 0.02),
        (DataConfig(rotate=30), 1, 2e-3),
        (DataConfig(policy="rand", policy_ops=3), 255, 0.02),  # what equalises after a level's difference may multiply it
    ],
    ids=["jitter-erase", "hue", "crop", "rotate", "policy"],
)
def test_dali_makes_the_batch_that_it_makes_on_a_cpu_and_the_same_bits_again(data: DataConfig, most: int, part: float) -> None:
    """On torch's stream: what is on it before is done first, and what is there is read after."""
    images = photographs(40, SIDE)
    there, again, here = (make_views(replace(data, augment_backend="dali"), seed=2, image_size=48) for _ in range(3))
    assert there is not None
    assert again is not None
    assert here is not None
    expected = here(batch_of(images))
    made = []
    with torch.cuda.stream(torch.cuda.Stream()):
        for views in (there, there, again):
            late = images.pin_memory()
            torch.cuda._sleep(2_000_000)
            made.append(views(batch_of(late.to(CUDA, non_blocking=True))).cpu())
    assert torch.equal(made[0], made[1])
    assert torch.equal(made[0], made[2])
    few = Batch(samples=images[7:11].to(CUDA), targets={}, ids=np.arange(7, 11), epoch=3, step=7, virtual_rank=1)
    assert torch.equal(there(few).cpu(), made[0][7:11]), "an image does not depend on its batch"
    apart = (made[0].int() - expected.int()).abs()
    assert apart.max() <= most
    assert (apart > 0).float().mean() <= part


def test_nothing_makes_the_host_wait_and_it_has_the_same_bits_again() -> None:
    images = photographs(40, SIDE).to(CUDA)
    data = DataConfig(crop="resized", rotate=20, policy="rand", jitter=(0.4, 0.4, 0.4, 0.1), erase=0.5)
    views, mix = make_views(data, seed=2, image_size=48), Mix(seed=2, mixup=0.2, cutmix=1.0)
    assert views is not None
    first = views(batch_of(images))  # libraries start themselves in the first call
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        again = views(batch_of(images))
        batch = batch_of(images)
        _, drawn = augmented(batch, views=views, own=None, mix=mix, share_of=1)
        assert drawn is not None
        with_partners(batch.targets, drawn)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(first, again)
