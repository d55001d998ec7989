"""Augmentation on the device: each operation against torchvision's on a real photograph, each draw's purity and statistics, mixing and its
loss. tests/trainer/test_step.py trains with all of it on 1, 2, 3 and 4 workers; tests/gpu compares the devices."""

import math
from collections.abc import Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision.transforms.v2 as transforms
import torchvision.transforms.v2.functional as functional
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torchvision.transforms import InterpolationMode

from dataio.batch import Batch
from dataio.config import DataConfig
from dataio.loader import Loader
from dataio.order import Order
from dataio.parquet import open_dataset
from dataio.schema import Target
from tests.trainer.photographs import photographs
from trainer.learn.augment import colour, draws, geometry
from trainer.learn.augment.batches import augmented
from trainer.learn.augment.draws import ONE, Key, Round
from trainer.learn.augment.mix import Mix, Mixing, draw_mixing, make_mix, mixed, mixed_loss, with_partners
from trainer.learn.augment.tables import BINS, Op, Policy, magnitudes
from trainer.learn.augment.views import after_round, erased, jittered, make_views
from trainer.settings.identity import deciding_settings
from trainer.settings.rules import validate
from trainer.settings.tree import RunConfig, TaskConfig, TrainConfig
from trainer.tasks.make import make_task

SAMPLE = Path(__file__).resolve().parents[2] / "dataio" / "samples" / "fashion_mnist"
SIDE = 48
EVERYTHING = DataConfig(crop="resized", rotate=20, policy="rand", jitter=(0.4, 0.4, 0.4, 0.1), erase=0.5)
MANY = Key(seed=3, epoch=1, ids=np.arange(20_000))
THEIRS: dict[Policy, Any] = {
    "trivial": transforms.TrivialAugmentWide(interpolation=InterpolationMode.BILINEAR),
    "rand": transforms.RandAugment(interpolation=InterpolationMode.BILINEAR),
}
EXACT = (Op.IDENTITY, Op.POSTERISE, Op.SOLARISE, Op.EQUALISE)


def batch_of(images: Tensor, *, ids: Sequence[int] | None = None, epoch: int = 0, step: int = 0, virtual_rank: int = 0) -> Batch:
    chosen = np.arange(len(images)) if ids is None else np.array(ids, dtype=np.int64)
    return Batch(samples=images, targets={}, ids=chosen, epoch=epoch, step=step, virtual_rank=virtual_rank)


def differences(one: Tensor, other: Tensor) -> tuple[int, float]:
    """(the largest, the part of the levels that differ)."""
    apart = (one.int() - other.int()).abs()
    return int(apart.max()), float((apart > 0).float().mean())


# --- operations, against torchvision ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", THEIRS)
def test_magnitudes_are_torchvisions(policy: Policy) -> None:
    theirs, ours = THEIRS[policy]._AUGMENTATION_SPACE, magnitudes(policy, 40, 60)
    assert len(theirs) == len(Op)
    for op, (of, is_signed) in zip(Op, theirs.values(), strict=True):
        expected = of(BINS, 40, 60)
        assert ours[op].tolist() == ([0.0] * BINS if expected is None else expected.double().tolist()), op
        assert is_signed == (op in draws.SIGNED), op


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("op", Op)
def test_each_operation_is_torchvisions_in_every_bin(op: Op, sign: int) -> None:
    """Exact where torchvision computes in whole numbers. Elsewhere its floats, or ours, are a level apart where they round."""
    if sign < 0 and op not in draws.SIGNED:
        pytest.skip("it has no direction")
    images, theirs = photographs(BINS, SIDE), THEIRS["trivial"]
    strengths = magnitudes("trivial", SIDE, SIDE)[op] * sign
    ours = after_round(images, Round(ops=np.full(BINS, op), magnitudes=strengths))
    name = list(theirs._AUGMENTATION_SPACE)[op]
    expected = torch.stack(
        [
            theirs._apply_image_or_video_transform(image, name, strength, InterpolationMode.BILINEAR, theirs._fill)
            for image, strength in zip(images.contiguous(), strengths.tolist(), strict=True)
        ]
    )
    most, part = differences(ours, expected)
    assert ours.dtype == torch.uint8
    assert (most, part) == (0, 0.0) if op in EXACT else most <= 1 and part < 0.03, (most, part)


def test_levels_are_looked_up_alike_in_small_and_large_images() -> None:
    images = photographs(3, 96)
    tables = torch.randint(0, 256, (3, 3, 256), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    large = colour.levels_changed(images, tables)
    quarters = [colour.levels_changed(images[:, :, at : at + 24], tables) for at in range(0, 96, 24)]
    assert torch.equal(large, torch.cat(quarters, 2))
    expected = torch.stack([torch.stack([tables[n, c][images[n, c].long()] for c in range(3)]) for n in range(3)])
    assert torch.equal(large, expected)


def test_operations_of_a_round_do_not_meet() -> None:
    """All at once as one after the other."""
    images = photographs(2 * len(Op), SIDE)
    ops = np.tile(np.arange(len(Op)), 2)[np.random.default_rng(1).permutation(2 * len(Op))]
    strengths = magnitudes("rand", SIDE, SIDE)[ops, 20]
    together = after_round(images, Round(ops=ops, magnitudes=strengths))
    for n in range(len(ops)):
        alone = after_round(images[n : n + 1], Round(ops=ops[n : n + 1], magnitudes=strengths[n : n + 1]))
        assert torch.equal(together[n : n + 1], alone), Op(ops[n])
    assert torch.equal(images, photographs(2 * len(Op), SIDE)), "what comes in stays as it is"


@pytest.mark.parametrize(("stored", "size"), [(48, (48, 48)), (64, (24, 40)), (30, (48, 48))], ids=str)
def test_a_resized_crop_is_torchvisions_with_antialias(stored: int, size: tuple[int, int]) -> None:
    images = photographs(24, stored)
    key = Key(seed=0, epoch=0, ids=np.arange(24))
    boxes = draws.crops(key, size=(stored, stored), scale=(0.08, 1.0), ratio=(0.75, 4 / 3))
    ours, products = geometry.resized_crops(images, boxes, size), geometry.crops_by_products(images, boxes, size)
    for n, image in enumerate(images.contiguous()):
        top, left, height, width = (int(each[n]) for each in (boxes.top, boxes.left, boxes.height, boxes.width))
        assert torch.equal(ours[n], functional.resized_crop(image, top, left, height, width, list(size), antialias=True)), n
        box = image[None, :, top : top + height, left : left + width].float()
        in_floats = F.interpolate(box, size=size, mode="bilinear", antialias=True).round().to(torch.uint8)
        most, part = differences(products[n : n + 1], in_floats)
        assert most <= 1, n
        assert part < 0.01, n  # where a factor of two makes halves
        assert differences(ours[n], products[n])[0] <= 1, n


def test_a_crop_of_all_is_the_image() -> None:
    images = photographs(3, SIDE)
    whole = draws.Boxes(top=np.zeros(3, int), left=np.zeros(3, int), height=np.full(3, SIDE), width=np.full(3, SIDE))
    for resized in (geometry.resized_crops, geometry.crops_by_products):
        assert torch.equal(resized(images, whole, (SIDE, SIDE)), images)


@pytest.mark.parametrize("which", range(4))
def test_each_jitter_is_torchvisions(which: int) -> None:
    images = photographs(12, SIDE)
    strengths = tuple(0.5 if number == which else 0.0 for number in range(4))
    drawn = draws.jitter(Key(seed=5, epoch=2, ids=np.arange(12)), strengths)  # type: ignore[arg-type]
    ours = jittered(images, drawn, strengths)  # type: ignore[arg-type]
    change = (functional.adjust_brightness, functional.adjust_contrast, functional.adjust_saturation, functional.adjust_hue)[which]
    for n, image in enumerate(images.contiguous()):
        value = float(drawn.hue[n]) if which == 3 else float(drawn.factors[n, which]) / ONE
        most, part = differences(ours[n], change(image, value))
        assert most <= 1, (n, most)
        assert part < 0.02, (n, part)


def test_jitters_come_in_the_order_that_was_drawn() -> None:
    images = photographs(24, SIDE)
    drawn = draws.Jitter(
        factors=np.tile(np.array([[int(1.3 * ONE), int(0.6 * ONE), int(1.4 * ONE)]]), (24, 1)), hue=np.full(24, 0.1), order=draws.ORDERS
    )
    together = jittered(images, drawn, (0.4, 0.4, 0.4, 0.1))
    for n, order in enumerate(draws.ORDERS.tolist()):
        image = images[n : n + 1]
        for which in order:
            only = tuple(1.0 if number == which else 0.0 for number in range(4))
            one = draws.Jitter(factors=drawn.factors[:1], hue=drawn.hue[:1], order=draws.ORDERS[:1])
            image = jittered(image, one, only)  # type: ignore[arg-type]
        assert torch.equal(together[n : n + 1], image)


def test_grey_stays_grey_at_every_saturation() -> None:
    """Which torchvision's floats do not keep: they lose a level at 0.9."""
    grey = torch.arange(250, dtype=torch.uint8).view(1, 1, 10, 25).expand(1, 3, 10, 25)
    first = colour.saturated(grey, torch.zeros(1, dtype=torch.int32))
    for factor in (0.0, 0.3, 0.9, 1.7):
        assert torch.equal(colour.saturated(first, torch.tensor([int(factor * ONE)], dtype=torch.int32))[..., :1, :1], first[..., :1, :1])
    white = torch.full((1, 3, 4, 4), 200, dtype=torch.uint8)
    assert torch.equal(colour.sharpened(white, torch.tensor([int(1.9 * ONE)], dtype=torch.int32)), white)


def test_dividing_by_26_is_exact_for_every_sum_of_13_pixels() -> None:
    sums = np.arange(13 * 255 + 1, dtype=np.int64)
    assert ((((2 * sums + 13) * colour.TWENTY_SIXTH) >> 20) == np.rint(sums / 13)).all()
    assert (2 * sums.max() + 13) * colour.TWENTY_SIXTH < 2**31


def test_erasing_paints_a_rectangle_and_nothing_else() -> None:
    images = photographs(40, SIDE)
    boxes = draws.erased(Key(seed=1, epoch=0, ids=np.arange(40)), size=(SIDE, SIDE), probability=0.5)
    done = erased(images, boxes, (1, 2, 3))
    expected = images.clone()
    for n in range(40):
        y, x = int(boxes.top[n]), int(boxes.left[n])
        expected[n, :, y : y + int(boxes.height[n]), x : x + int(boxes.width[n])] = torch.tensor([1, 2, 3], dtype=torch.uint8).view(3, 1, 1)
    assert torch.equal(done, expected)
    assert 8 < (boxes.height > 0).sum() < 32


# --- draws: purity ----------------------------------------------------------------------------------------------------------------------


@settings(max_examples=8, deadline=None)
@given(seed=st.integers(0, 2**63 - 1), epoch=st.integers(0, 10**6), data=st.data())
def test_an_image_follows_from_seed_epoch_and_id_in_any_batch(seed: int, epoch: int, data: st.DataObject) -> None:
    """Whatever its companions, its place among them, and what came before."""
    images, ids = photographs(6, 16), np.array([0, 1, 5, 17, 2**31, 2**40])
    views = make_views(EVERYTHING, seed=seed, image_size=0)
    assert views is not None
    whole = views(batch_of(images, ids=ids.tolist(), epoch=epoch))
    few = np.array(data.draw(st.lists(st.integers(0, 5), min_size=1, unique=True)))
    again = make_views(EVERYTHING, seed=seed, image_size=0)
    assert again is not None
    part = again(batch_of(images[torch.from_numpy(few)], ids=ids[few].tolist(), epoch=epoch, step=data.draw(st.integers(0, 99))))
    assert torch.equal(part, whole[torch.from_numpy(few)])
    same = again(batch_of(images, ids=ids.tolist(), epoch=epoch, step=3, virtual_rank=2))
    assert torch.equal(same, whole)


def test_other_seeds_epochs_and_samples_are_other_images() -> None:
    images = photographs(1, 16).expand(8, -1, -1, -1)
    seen = []
    for seed, epoch in ((0, 0), (1, 0), (0, 1)):
        views = make_views(EVERYTHING, seed=seed, image_size=0)
        assert views is not None
        seen += list(views(batch_of(images, epoch=epoch)))
    assert all(not torch.equal(one, other) for at, one in enumerate(seen) for other in seen[:at])


def drawn_of(data: DataConfig, key: Key) -> dict[str, Any]:
    """All draws of a configuration, as plain lists."""
    rounds = draws.policy_rounds(key, "rand", ops=data.policy_ops, magnitude=9, size=(32, 32))
    crops = draws.crops(key, size=(32, 32), scale=data.crop_scale, ratio=data.crop_ratio)
    gone = draws.erased(key, size=(32, 32), probability=0.5)
    jitter = draws.jitter(key, (0.4, 0.4, 0.4, 0.1))
    return {
        "ops": [each.ops.tolist() for each in rounds],
        "crops": [crops.top.tolist(), crops.left.tolist(), crops.height.tolist(), crops.width.tolist()],
        "erased": [gone.top.tolist(), gone.left.tolist(), gone.height.tolist(), gone.width.tolist()],
        "jitter": [jitter.factors.tolist(), jitter.hue.tolist(), jitter.order.tolist()],
        "angles": draws.angles(key, 30).tolist(),
    }


def test_draws_do_not_depend_on_other_draws_or_samples() -> None:
    whole, alone = drawn_of(EVERYTHING, Key(seed=9, epoch=4, ids=np.arange(50))), Key(seed=9, epoch=4, ids=np.array([31]))
    one = drawn_of(EVERYTHING, alone)
    assert one["crops"] == [[column[31]] for column in whole["crops"]]
    assert one["erased"] == [[column[31]] for column in whole["erased"]]
    assert one["jitter"] == [[column[31]] for column in whole["jitter"]]
    assert one["ops"] == [[column[31]] for column in whole["ops"]]
    assert one["angles"] == [whole["angles"][31]]
    fewer = draws.policy_rounds(alone, "rand", ops=1, magnitude=9, size=(32, 32))
    assert [each.ops.tolist() for each in fewer] == one["ops"][:1]


def test_draws_are_those_of_the_first_release() -> None:
    """Golden: with other draws, a run that goes on would not be the same run."""
    key = Key(seed=7, epoch=3, ids=np.array([0, 1, 12345]))
    assert drawn_of(DataConfig(), key) == GOLDEN
    shares = [draw_mixing(seed=7, step=step, virtual_rank=1, mixup=0.2, cutmix=1.0, size=(32, 32)) for step in range(3)]
    assert [(each.kind, each.share, each.box) for each in shares] == GOLDEN_MIXING


# --- draws: statistics ------------------------------------------------------------------------------------------------------------------


def test_operations_bins_and_signs_are_equally_likely() -> None:
    (drawn,) = draws.policy_rounds(MANY, "trivial", ops=1, magnitude=0, size=(32, 32))
    counts = np.bincount(drawn.ops, minlength=len(Op))
    expected = len(MANY.ids) / len(Op)
    assert ((counts - expected) ** 2 / expected).sum() < 35  # chi2 with 13 degrees of freedom: 34.5 in one of a thousand
    turned = drawn.magnitudes[drawn.ops == Op.ROTATE]
    bins = np.rint(np.abs(turned) / 4.5).astype(int)
    expected = len(turned) / BINS
    assert ((np.bincount(bins, minlength=BINS) - expected) ** 2 / expected).sum() < 60  # 30 degrees of freedom: 59.7
    assert 0.45 < (turned[bins > 0] > 0).mean() < 0.55
    first, second = draws.policy_rounds(MANY, "rand", ops=2, magnitude=9, size=(32, 32))
    assert abs((first.ops == second.ops).mean() - 1 / len(Op)) < 0.01, "rounds are independent"


def test_crops_have_the_areas_ratios_and_places_that_are_asked_for() -> None:
    boxes = draws.crops(MANY, size=(200, 200), scale=(0.2, 0.5), ratio=(0.75, 4 / 3))
    area, ratio = boxes.height * boxes.width / 40_000, boxes.width / boxes.height
    assert 0.195 < area.min() < 0.21
    assert 0.49 < area.max() < 0.505
    assert abs(area.mean() - 0.35) < 0.005
    assert abs(np.log(ratio).mean()) < 0.005
    assert 0.73 < ratio.min() < 0.78
    assert abs((boxes.top / (200 - boxes.height)).mean() - 0.5) < 0.01
    assert ((boxes.top >= 0) & (boxes.top + boxes.height <= 200) & (boxes.left >= 0) & (boxes.left + boxes.width <= 200)).all()
    whole = draws.crops(MANY, size=(100, 300), scale=(1.0, 1.0), ratio=(1.0, 1.0))  # never fits: the largest centred square
    assert {(t, x, h, w) for t, x, h, w in zip(whole.top, whole.left, whole.height, whole.width, strict=True)} == {(0, 100, 100, 100)}


def test_what_is_erased_has_its_probability_and_area() -> None:
    boxes = draws.erased(MANY, size=(100, 100), probability=0.25)
    gone = boxes.height > 0
    assert abs(gone.mean() - 0.25) < 0.01
    area = boxes.height[gone] * boxes.width[gone] / 10_000
    assert area.min() > 0.015
    assert area.max() < 0.34
    assert abs(area.mean() - 0.175) < 0.01
    assert not draws.erased(MANY, size=(100, 100), probability=0.0).height.any()


def test_factors_shifts_angles_and_orders_are_uniform() -> None:
    drawn = draws.jitter(MANY, (0.4, 0.4, 1.0, 0.1))
    factors = drawn.factors / ONE
    assert np.allclose(factors.min(0), [0.6, 0.6, 0.0], atol=0.001)
    assert np.allclose(factors.max(0), [1.4, 1.4, 2.0], atol=0.001)
    assert np.allclose(factors.mean(0), 1.0, atol=0.02)
    assert abs(np.corrcoef(factors.T)[0, 1]) < 0.03
    assert np.allclose([drawn.hue.min(), drawn.hue.max()], [-0.1, 0.1], atol=1e-3)
    counts = np.unique(drawn.order, axis=0, return_counts=True)[1]
    assert len(counts) == 24
    assert counts.min() > 700
    angles = draws.angles(MANY, 30)
    assert -30 <= angles.min() < -29.9
    assert abs(angles.mean()) < 0.5


@pytest.mark.parametrize("alpha", [0.1, 0.2, 0.5, 1.0, 4.0])
def test_shares_have_the_moments_of_beta(alpha: float) -> None:
    shares = np.array([draw_mixing(seed=1, step=n, virtual_rank=0, mixup=alpha, cutmix=0, size=(9, 9)).share for n in range(2000)]) / ONE
    assert ((shares >= 0) & (shares <= 1)).all()
    variance = 1 / (4 * (2 * alpha + 1))
    assert abs(shares.mean() - 0.5) < 4 * math.sqrt(variance / 2000)
    assert abs(shares.var() / variance - 1) < 0.12


def test_cutmix_takes_an_area_and_both_kinds_take_turns() -> None:
    drawn = [draw_mixing(seed=1, step=n, virtual_rank=3, mixup=1.0, cutmix=1.0, size=(20, 30)) for n in range(1000)]
    cut = [each for each in drawn if each.kind == "cutmix"]
    assert 430 < len(cut) < 570
    for each in cut:
        top, bottom, left, right = each.box
        assert 0 <= top <= bottom <= 20
        assert 0 <= left <= right <= 30
        assert each.share == round((600 - (bottom - top) * (right - left)) * ONE / 600)


# --- mixing -----------------------------------------------------------------------------------------------------------------------------


def test_mixing_is_a_function_of_seed_step_and_virtual_rank() -> None:
    mix, images = Mix(seed=3, mixup=1.0, cutmix=1.0), photographs(4, 16)

    def seen(mix: Mix, step: int, virtual_rank: int) -> tuple[Tensor, Mixing | None]:
        batch = batch_of(images, step=step, virtual_rank=virtual_rank)
        return augmented(batch, views=None, own=None, mix=mix, share_of=virtual_rank)

    first, drawn = seen(mix, 5, 1)
    again, _ = seen(Mix(seed=3, mixup=1.0, cutmix=1.0), 5, 1)
    assert torch.equal(first, again)
    others = [seen(mix, 6, 1)[1], seen(mix, 5, 2)[1], seen(Mix(seed=4, mixup=1.0, cutmix=1.0), 5, 1)[1]]
    assert drawn not in others


def test_mixed_pixels_are_the_shares_of_both_rounded_once() -> None:
    images = photographs(5, 16)
    partners = images.roll(1, 0)
    half = mixed(images, Mixing(kind="mixup", share=ONE // 4))
    exact = 0.25 * images.double() + 0.75 * partners.double()
    assert (half.double() - exact).abs().max() <= 0.5
    assert torch.equal(mixed(images, Mixing(kind="mixup", share=ONE)), images)
    assert torch.equal(mixed(images, Mixing(kind="mixup", share=0)), partners)
    pasted = mixed(images, Mixing(kind="cutmix", share=ONE, box=(2, 9, 4, 16)))
    assert torch.equal(pasted[:, :, 2:9, 4:16], partners[:, :, 2:9, 4:16])
    assert torch.equal(pasted[:, :, :2], images[:, :, :2])
    assert torch.equal(pasted[:, :, :, :4], images[:, :, :, :4])


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_the_loss_of_a_label_is_the_cross_entropy_of_the_mixed_target(smoothing: float) -> None:
    task = make_task(TaskConfig(), (Target(name="label", kind="label", classes=("a", "b", "c")),), label_smoothing=smoothing)
    labels, logits = torch.tensor([0, 2, 1, 1]), torch.randn(4, 3, generator=torch.Generator().manual_seed(0))
    drawn = Mixing(kind="mixup", share=ONE // 4)
    loss = mixed_loss(task.loss_sum)(logits, with_partners({"label": labels}, drawn))
    soft = 0.25 * F.one_hot(labels, 3) + 0.75 * F.one_hot(labels.roll(1), 3)
    assert loss.item() == pytest.approx(F.cross_entropy(logits, soft, reduction="sum", label_smoothing=smoothing).item(), rel=1e-5)


def test_an_unknown_label_adds_nothing_to_its_part() -> None:
    task = make_task(TaskConfig(), (Target(name="label", kind="label", classes=("a", "b")),))
    logits = torch.zeros(2, 2, requires_grad=True)
    loss = mixed_loss(task.loss_sum)(logits, with_partners({"label": torch.tensor([-1, 1])}, Mixing(kind="mixup", share=ONE // 4)))
    assert loss.item() == pytest.approx(math.log(2))  # a quarter of the second's, three quarters of it as the first's partner
    unknown = mixed_loss(task.loss_sum)(logits, with_partners({"label": torch.tensor([-1, -1])}, Mixing(kind="mixup", share=ONE // 4)))
    assert unknown.item() == 0.0


def test_labels_and_several_targets_are_mixed_too() -> None:
    targets = (
        Target(name="label", kind="label", classes=("a", "b")),
        Target(name="tags", kind="labels", classes=("x", "y", "z")),
        Target(name="age", kind="number", mean=0.0, std=1.0),
    )
    task = make_task(TaskConfig(), targets)
    values = {
        "label": torch.tensor([0, 1, -1]),
        "tags": torch.tensor([[0, 1, 255], [1, 1, 0], [0, 0, 1]], dtype=torch.uint8),
        "age": torch.tensor([0.5, float("nan"), -0.25]),
    }
    outputs = torch.randn(3, 6, generator=torch.Generator().manual_seed(0))
    task.bind(torch.nn.Identity())
    loss = mixed_loss(task.loss_sum)(outputs, with_partners(values, Mixing(kind="cutmix", share=3 * ONE // 4)))
    partners = {name: each.roll(1, 0) for name, each in values.items()}
    assert loss.item() == pytest.approx(0.75 * task.loss_sum(outputs, values).item() + 0.25 * task.loss_sum(outputs, partners).item())
    tags = make_task(TaskConfig(), targets[1:2])
    known = {"tags": torch.tensor([[0, 1, 0], [1, 1, 0], [0, 0, 1]], dtype=torch.uint8)}
    loss = mixed_loss(tags.loss_sum)(outputs[:, :3], with_partners(known, Mixing(kind="mixup", share=ONE // 4)))
    soft = 0.25 * known["tags"] + 0.75 * known["tags"].roll(1, 0)
    assert loss.item() == pytest.approx(F.binary_cross_entropy_with_logits(outputs[:, :3], soft).item() * 3, rel=1e-5)


# --- in a run ---------------------------------------------------------------------------------------------------------------------------


def steps_from(start: int, stop: int, *, virtual_ranks: int = 4, carried: range = range(4)) -> list[tuple[Batch, ...]]:
    dataset = open_dataset(SAMPLE)
    order = Order(seed=1, fingerprint=dataset.manifest.fingerprint, count=2000, batch_size=400, virtual_ranks=virtual_ranks)
    data = replace(EVERYTHING, cache="none", backend="numpy")
    loader = Loader(dataset, data, order=order, virtual_ranks=carried, device=torch.device("cpu"), seed=1, on_bad=print)
    with closing(loader.train(start, stop)) as batches:
        return list(batches)


def test_steps_see_the_same_images_after_a_kill_and_on_any_number_of_workers() -> None:
    mix = make_mix(seed=1, mixup=0.2, cutmix=1.0)

    def seen(step: tuple[Batch, ...]) -> list[Tensor]:
        views = make_views(EVERYTHING, seed=1, image_size=0)  # as a new process would
        return [augmented(batch, views=views, own=None, mix=mix, share_of=batch.virtual_rank)[0] for batch in step]

    whole = [seen(step) for step in steps_from(3, 7)]  # over the end of an epoch
    assert all(map(torch.equal, whole[-1], seen(steps_from(6, 7)[0])))
    for carried in (range(2), range(2, 4)):
        shares = [seen(step) for step in steps_from(3, 7, carried=carried)]
        assert all(all(map(torch.equal, all_of[carried.start : carried.stop], share)) for all_of, share in zip(whole, shares, strict=True))


def test_off_is_nothing_to_call_and_renames_no_run() -> None:
    assert make_views(DataConfig(), seed=0, image_size=64) is None
    assert make_mix(seed=0, mixup=0.0, cutmix=0.0) is None
    images = photographs(2, 16)
    assert augmented(batch_of(images), views=None, own=None, mix=None, share_of=0)[0] is images
    new = {"crop", "crop_scale", "crop_ratio", "rotate", "policy", "policy_ops", "policy_magnitude", "jitter", "erase"}
    counted = deciding_settings(RunConfig())
    assert not {*(f"data.{name}" for name in new), "train.mixup", "train.cutmix"} & counted.keys()
    changed = deciding_settings(RunConfig(data=DataConfig(policy="trivial"), train=TrainConfig(cutmix=1.0)))
    assert (changed["data.policy"], changed["train.cutmix"]) == ("trivial", 1.0)


def test_a_resized_crop_is_of_the_models_size_and_the_codec_leaves_cropping_to_it() -> None:
    views = make_views(DataConfig(crop="resized"), seed=0, image_size=24)
    assert views is not None
    done = views(batch_of(photographs(3, 48)))
    assert done.shape == (3, 3, 24, 24)
    assert done.is_contiguous(memory_format=torch.channels_last)
    assert views(batch_of(photographs(3, 48)[:0])).shape[0] == 0
    assert (DataConfig(crop="resized").padding, DataConfig().padding) == (0, 4)


@pytest.mark.parametrize(
    ("config", "said"),
    [
        (RunConfig(data=DataConfig(crop="resized", crop_scale=(0.5, 0.1))), "data.crop_scale=0.5 0.1 is an empty range"),
        (RunConfig(data=DataConfig(crop="resized", crop_ratio=(2.0, 1.0))), "data.crop_ratio=2 1 is an empty range"),
        (RunConfig(data=DataConfig(crop_scale=(0.5, 1.0))), "add --data.crop resized, or leave it out"),
        (RunConfig(data=DataConfig(policy="trivial", policy_ops=3)), "it belongs to data.policy=rand and data.policy=trivial"),
        (RunConfig(data=DataConfig(policy="rand", policy_magnitude=31)), "data.policy_magnitude=31 must be at least 0 and at most 30"),
        (RunConfig(data=DataConfig(jitter=(0, 0, 0, 0.6))), "which is half the circle"),
        (RunConfig(data=DataConfig(erase=1.5)), "data.erase=1.5 must be at least 0 and at most 1"),
        (RunConfig(data=DataConfig(batch_size=4), train=TrainConfig(virtual_ranks=4, mixup=0.2)), "each has one image of a step"),
    ],
)
def test_settings_that_do_not_fit_are_refused(config: RunConfig, said: str) -> None:
    with pytest.raises(ValueError, match=said.replace("(", r"\(")):
        validate(config)


GOLDEN: dict[str, Any] = {
    "ops": [[2, 2, 7], [11, 4, 4]],
    "crops": [[2, 7, 10], [3, 6, 12], [26, 25, 22], [25, 25, 19]],
    "erased": [[18, 19, 15], [1, 20, 11], [11, 0, 0], [31, 12, 8]],
    "jitter": [
        [[68555, 89435, 55367], [39458, 71610, 58597], [89057, 47181, 88637]],
        [0.090606689453125, -0.023406982421875, 0.094390869140625],
        [[0, 3, 1, 2], [3, 1, 2, 0], [1, 3, 0, 2]],
    ],
    "angles": [-3.4375762939453125, -8.187652587890625, -26.747177124023438],
}
GOLDEN_MIXING = [("cutmix", 64384, (9, 15, 0, 3)), ("cutmix", 36864, (0, 16, 0, 28)), ("mixup", 38028, (0, 0, 0, 0))]
