"""`--dry-run`: what it says must be what a run does."""

import hashlib
import io
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from cluster.interval import AUTO, SharedInterval
from dataio.manifest import Manifest, ShardInfo, SplitInfo
from dataio.order import Order
from dataio.schema import Target, single_label
from trainer.drive.plan import Devices, ModelFacts, describe, model_facts, table
from trainer.models.vision import build_model
from trainer.settings.spec import total_steps_of
from trainer.settings.tree import DataConfig, ModelConfig, OptimConfig, RunConfig, TaskConfig, TrainConfig
from trainer.tasks.make import make_task
from trainer.tasks.task import Task

CPU = Devices(workers=1, name="CPU")
FACTS = ModelFacts(parameters=1000, trainable=1000, buffer_bytes=80, flops_per_image=1e6)


def manifest_of(train: int = 2000, test: int = 500, sizes: tuple[str, ...] = ("28x28",)) -> Manifest:
    def split(count: int, name: str) -> SplitInfo:
        digest = hashlib.sha256(name.encode()).hexdigest()
        shard = ShardInfo(name=f"{name}.parquet", rows=count, row_group_rows=(count,), size_bytes=1, sha256=digest, footer_sha256=digest)
        return SplitInfo(count=count, shards=(shard,))

    histogram = dict.fromkeys(sizes[1:], 1) | {sizes[0]: train + test - len(sizes) + 1}
    return Manifest(
        targets=single_label("abc"),
        splits={"train": split(train, "train"), "test": split(test, "test")},
        fingerprint="0" * 64,
        image_sizes=histogram,
        quarantined=0,
        source="idx",
        identity="0" * 64,
    )


def classification(classes: int) -> Task:
    return make_task(TaskConfig(), (Target(name="label", kind="label", classes=tuple(map(str, range(classes)))),))


def shown(plan: Any) -> str:
    written = io.StringIO()
    Console(file=written, width=160).print(table(plan))
    return written.getvalue()


@given(
    train=st.integers(1, 5000),
    batch_per_virtual_rank=st.integers(1, 64),
    virtual_ranks=st.integers(1, 8),
    epochs=st.integers(1, 20),
    max_steps=st.integers(0, 300),
    checkpoint_every=st.integers(0, 50),
)
@settings(max_examples=50)
def test_planned_steps_are_those_of_the_run(
    train: int, batch_per_virtual_rank: int, virtual_ranks: int, epochs: int, max_steps: int, checkpoint_every: int
) -> None:
    batch_size = batch_per_virtual_rank * virtual_ranks
    config = RunConfig(
        data=DataConfig(batch_size=batch_size),
        train=TrainConfig(epochs=epochs, max_steps=max_steps, virtual_ranks=virtual_ranks, checkpoint_every=checkpoint_every),
    )
    plan = describe(config, manifest_of(train), CPU, FACTS)
    order = Order(seed=0, fingerprint="0" * 64, count=train, batch_size=batch_size, virtual_ranks=virtual_ranks)
    assert plan.steps_per_epoch == order.steps_per_epoch
    assert plan.total_steps == total_steps_of(config, order.steps_per_epoch)
    assert plan.checkpoint_every == SharedInterval(checkpoint_every, start_step=0, steps_per_epoch=order.steps_per_epoch).steps
    assert plan.batch_per_virtual_rank == batch_per_virtual_rank


def test_an_interval_that_measurements_will_say_is_not_made_up() -> None:
    plan = describe(RunConfig(train=TrainConfig(checkpoint_every=AUTO)), manifest_of(), CPU, FACTS)
    assert plan.checkpoint_every is None
    assert "as often as measurements say" in shown(plan)


@pytest.mark.parametrize(
    ("optim", "ema", "copies_in_memory", "copies_on_disk"),
    [
        (OptimConfig(momentum=0.0), 0.0, 2, 1),  # weights and gradients; weights
        (OptimConfig(momentum=0.9), 0.0, 3, 2),
        (OptimConfig(name="adamw"), 0.0, 4, 3),
        (OptimConfig(name="adamw"), 0.999, 5, 4),
    ],
)
def test_memory_and_checkpoints_count_every_copy_of_the_weights(
    optim: OptimConfig, ema: float, copies_in_memory: int, copies_on_disk: int
) -> None:
    plan = describe(RunConfig(optim=optim, train=TrainConfig(ema=ema)), None, CPU, FACTS)
    buffers = 80 * (2 if ema else 1)
    assert plan.model_bytes == copies_in_memory * 4000 + buffers
    assert plan.checkpoint_bytes == copies_on_disk * 4000 + buffers


def test_a_frozen_backbone_needs_neither_gradients_nor_momentum() -> None:
    plan = describe(RunConfig(), None, CPU, replace(FACTS, trainable=10))
    assert plan.model_bytes == 4000 + 80 + 40 + 40


def test_data_and_work_are_counted() -> None:
    plan = describe(RunConfig(train=TrainConfig(epochs=3)), manifest_of(), Devices(workers=2, name="X", flops_per_second=1e9), FACTS)
    assert plan.cache_bytes == 2500 * 28 * 28 * 3
    assert plan.total_flops == 3 * 2000 * 1e6
    assert plan.seconds == 3.0
    assert describe(RunConfig(data=DataConfig(cache="none")), manifest_of(), CPU, FACTS).cache_bytes == 0


def test_a_plan_that_cannot_run_is_an_error() -> None:
    with pytest.raises(ValueError, match="not a multiple of workers=3; use 99 or 102"):
        describe(RunConfig(), manifest_of(), replace(CPU, workers=3), FACTS)
    with pytest.raises(ValueError, match=r"data\.pad=4 is not below"):
        describe(RunConfig(), manifest_of(sizes=("4x4",)), CPU, FACTS)
    with pytest.raises(ValueError, match=r"optim\.warmup_steps=200 does not end before the run's 200 steps"):
        describe(RunConfig(optim=OptimConfig(warmup_steps=200)), manifest_of(), CPU, FACTS)
    with pytest.raises(ValueError, match=r"--data\.fit crop"):
        describe(RunConfig(), manifest_of(sizes=("4x4", "5x5")), CPU, FACTS)


def test_the_table_tells_what_would_run() -> None:
    config = RunConfig(run="pets", storage="s3://bucket/runs/", train=TrainConfig(epochs=4))
    text = shown(describe(config, manifest_of(), replace(CPU, memory_bytes=8_000_000_000), FACTS))
    for words in (
        "2,000 images to train, 500 to test, 3 classes, 28x28 pixels",
        "80: 4 epochs of 20",
        "s3://bucket/runs/pets",
        "8 GB",
        "GFLOP",
    ):
        assert words in text


def test_the_table_without_converted_data_says_so() -> None:
    text = shown(describe(RunConfig(), None, CPU, FACTS))
    assert "not converted yet" in text
    assert "Steps" not in text


def test_facts_of_the_tutorials_resnet18() -> None:
    facts = model_facts(classification(10), ModelConfig(stem="article"), shape=(32, 32))
    model = build_model(ModelConfig(stem="article", weights="none"), classes=10, seed=0, image_hw=(32, 32))
    assert facts.parameters == facts.trainable == sum(p.numel() for p in model.parameters()) == 11_173_962
    # 555.4 MMAC forward, twice that backward but for the first convolution, whose input needs no gradient.
    first = 64 * 3 * 9 * 32 * 32
    assert facts.flops_per_image == 2 * (3 * 555_422_720 - first)


@pytest.mark.parametrize(
    ("name", "side"), [("resnet18", 32), ("mobilenet_v3_small", 64), ("vit_b_32", 64), ("timm/tf_efficientnet_lite0", 96)]
)
def test_work_of_other_models_is_counted_too(name: str, side: int) -> None:
    if name.startswith("timm/"):
        pytest.importorskip("timm")
    facts = model_facts(classification(10), ModelConfig(name=name), shape=(side, side))
    assert facts.flops_per_image is not None
    assert facts.flops_per_image > 2 * facts.parameters


def test_counting_leaves_the_random_state_alone_and_downloads_nothing() -> None:
    before = torch.random.get_rng_state()
    facts = model_facts(classification(7), ModelConfig(weights="/nowhere.pt", freeze="backbone"), shape=(32, 32))
    assert torch.equal(torch.random.get_rng_state(), before)
    assert facts.trainable == 512 * 7 + 7
    whole = model_facts(classification(7), ModelConfig(weights="none"), shape=(32, 32))
    assert facts.flops_per_image is not None
    assert whole.flops_per_image is not None
    assert facts.flops_per_image < whole.flops_per_image / 2.5  # no backward pass through the backbone
