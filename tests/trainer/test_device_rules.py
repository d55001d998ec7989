"""What `data.augment_backend=auto` and `train.cuda_graphs=auto` become, from the devices and the data; and that a run keeps the first."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.storage import open_storage
from dataio.codecs.image.decode import SMALL_SIDE
from dataio.config import DataConfig
from dataio.loader import choose_cache
from dataio.parquet import open_dataset
from trainer.drive.capability import of_cpu, of_gpu, settled
from trainer.drive.device_rules import CAPTURED_PIXELS, Images, augment_backend, captures, images_of
from trainer.drive.identity import automatic_name, resolved
from trainer.settings.augmentation import augments
from trainer.settings.identity import deciding_settings
from trainer.settings.rules import validate
from trainer.settings.toml import from_toml, to_toml
from trainer.settings.tree import ModelConfig, RunConfig, TrainConfig

SAMPLE = Path(__file__).resolve().parents[2] / "dataio" / "samples" / "fashion_mnist"
GIB = 1 << 30
H200, CPU = of_gpu("NVIDIA H200", (9, 0), 140 * GIB), of_cpu("flags : amx_bf16\n")
MANY, FEW = Images(count=1_281_167, height=224, width=224), Images(count=10_000, height=224, width=224)
STREAMED = DataConfig(crop="resized", fit="crop", image_size=224)


def decided(config: RunConfig, device: Any, images: Images | None, *, workers: int = 1) -> tuple[RunConfig, list[str]]:
    said: list[str] = []
    found = settled(config, device, has_depthwise=False, images=images, workers=workers, tell=said.append)
    return found, [line for line in said if "augment_backend" in line or "cuda_graphs" in line]


# --- the library that augments ----------------------------------------------------------------------------------------------------------


def test_dali_augments_what_a_gpu_decodes_for_each_epoch_and_the_run_says_so() -> None:
    found, said = decided(RunConfig(data=STREAMED), H200, MANY)
    assert found.data.augment_backend == "dali"
    room = "193 GB of decoded images do not stay on the GPU, whose room for them is 60.1 GB"
    assert said == [f"data.augment_backend=auto: dali ({room})"]
    found, said = decided(RunConfig(data=replace(STREAMED, cache="none")), H200, FEW)
    assert found.data.augment_backend == "dali"
    assert "data.cache=none" in said[0]


@pytest.mark.parametrize(
    ("data", "device", "images"),
    [
        (STREAMED, CPU, MANY),
        (STREAMED, H200, FEW),
        (replace(STREAMED, cache="host"), H200, MANY),
        (replace(STREAMED, cache="device"), H200, MANY),
        (replace(STREAMED, fit="refuse", cache="none"), H200, Images(count=10**9, height=SMALL_SIDE, width=SMALL_SIDE)),
        (STREAMED, of_gpu("GPU of unknown memory", (9, 0)), MANY),
        (replace(STREAMED, crop="pad"), H200, MANY),
    ],
    ids=["cpu", "fits", "host", "device", "decoded by the CPU", "unknown", "nothing to augment"],
)
def test_pytorch_augments_everywhere_else(data: DataConfig, device: Any, images: Images) -> None:
    found, said = decided(RunConfig(data=data), device, images)
    assert found.data.augment_backend == "torch"
    said = [line for line in said if "augment_backend" in line]
    assert len(said) == augments(data), "there is a line where there is something to do"


@given(
    count=st.integers(1, 10**7),
    side=st.integers(1, 512),
    cache=st.sampled_from(["auto", "device", "host", "none"]),
    memory=st.integers(GIB, 200 * GIB),
)
def test_what_is_streamed_is_what_the_loader_does_not_keep(count: int, side: int, cache: Any, memory: int) -> None:
    """On a GPU of which everything is free; the run's own part of it only makes the room smaller."""
    import torch

    data, images = replace(STREAMED, cache=cache), Images(count=count, height=side, width=side)
    backend, _ = augment_backend(data, images, on_gpu=True, gpu_bytes=memory)
    kept = choose_cache(
        data,
        torch.device("cuda"),
        decoded_bytes=images.decoded_bytes,
        memory_bytes=0,
        free_device_bytes=memory,
    )
    assert backend == ("dali" if kept == "none" else "torch")


def test_a_users_word_counts_and_what_the_run_began_with_is_kept_elsewhere(tmp_path: Path) -> None:
    asked = RunConfig(data=STREAMED, storage=str(tmp_path))
    with_name: Any = {"workers": 1, "fingerprint": "ab" * 32, "weights": "", "prefix": "x", "shape": (224, 224)}
    storage = open_storage(str(tmp_path))
    first, _ = decided(resolved(asked, storage, **with_name).config, H200, MANY)
    storage.write_atomic(f"{first.run}/config.toml", to_toml(first).encode())
    again, said = decided(resolved(asked, storage, **with_name).config, CPU, MANY)
    assert (again.data.augment_backend, again.run, said) == ("dali", first.run, [])
    for word in ("torch", "dali"):
        found, said = decided(RunConfig(data=replace(STREAMED, augment_backend=word)), H200, FEW)
        assert (found.data.augment_backend, said) == (word, [])


def test_a_run_of_a_release_that_knew_no_choice_goes_on_with_pytorch_and_under_its_name(tmp_path: Path) -> None:
    asked = RunConfig(data=STREAMED, storage=str(tmp_path), train=TrainConfig(virtual_ranks=1))
    name = automatic_name(asked, "ab" * 32, "x")
    assert "data.augment_backend" not in deciding_settings(asked)
    assert deciding_settings(RunConfig(data=replace(STREAMED, augment_backend="dali")))["data.augment_backend"] == "dali"
    text = to_toml(replace(asked, run=name)).replace('augment_backend = "auto"\n', "")
    assert "augment_backend" not in text
    storage = open_storage(str(tmp_path))
    storage.write_atomic(f"{name}/config.toml", text.encode())
    again = resolved(asked, storage, workers=1, fingerprint="ab" * 32, weights="", prefix="x", shape=(224, 224)).config
    assert (again.run, again.data.augment_backend) == (name, "torch")
    assert decided(again, H200, MANY)[0].data.augment_backend == "torch"


def test_without_data_nothing_is_decided() -> None:
    found, said = decided(RunConfig(data=STREAMED, train=TrainConfig(compile=True)), H200, None)
    assert (found.data.augment_backend, found.train.cuda_graphs, said) == ("auto", "auto", [])


def test_the_images_of_a_run_are_those_of_all_its_splits() -> None:
    manifest = open_dataset(SAMPLE).manifest
    found = images_of(manifest, DataConfig())
    assert (found.count, found.height, found.width) == (sum(split.count for split in manifest.splits.values()), 28, 28)
    assert images_of(manifest, DataConfig(image_size=56, fit="crop")).decoded_bytes == 4 * found.decoded_bytes


# --- CUDA graphs ------------------------------------------------------------------------------------------------------------------------

SMALL = Images(count=50_000, height=32, width=32)
AS_H200: dict[str, Any] = {"precision": "bf16", "channels_last": "on", "small_maps": "convolution"}


def run_of(batch: int, *, data: dict[str, Any] | None = None, model: dict[str, Any] | None = None, **train: Any) -> RunConfig:
    of_data = DataConfig(batch_size=batch, **(data or {}))
    return RunConfig(data=of_data, model=ModelConfig(**(model or {})), train=TrainConfig(**{"compile": True, **train}))


@pytest.mark.parametrize(
    ("config", "workers", "word", "why"),
    [
        (run_of(512, virtual_ranks=8), 1, "on", "64 images of 32x32 pixels go through the model at once, which takes the GPU less"),
        (run_of(512, virtual_ranks=8), 8, "on", "64 images of 32x32 pixels"),  # a pass is a virtual rank's, however many a rank carries
        (run_of(100, virtual_ranks=1), 1, "on", "100 images of 32x32 pixels"),
        (run_of(512, virtual_ranks=1), 1, "off", "512 images of 32x32 pixels go through the model at once, which keeps the GPU busy"),
        (run_of(100, virtual_ranks=1, model={"image_size": 224}), 1, "off", "100 images of 224x224 pixels"),
        (run_of(512, virtual_ranks=8, reduction="ddp"), 1, "off", "512 images of 32x32 pixels"),  # all of them at once
        (run_of(100, virtual_ranks=2, reduction="ddp"), 2, "off", "train.reduction=ddp exchanges gradients in the step"),
        (run_of(512, virtual_ranks=8, accumulate=2), 1, "off", "train.accumulate adds up gradients that a replay would overwrite"),
        (run_of(512, virtual_ranks=8, data={"unlabelled": "x"}), 1, "off", "data.unlabelled counts guesses in the step"),
    ],
)
def test_a_compiled_step_is_captured_where_the_host_is_slower_and_the_run_says_why(
    config: RunConfig, workers: int, word: str, why: str
) -> None:
    found, said = decided(config, H200, SMALL, workers=workers)
    assert found.train.cuda_graphs == word
    (line,) = [each for each in said if "cuda_graphs" in each]
    assert line.startswith(f"train.cuda_graphs=auto: {word} ({why}")


@pytest.mark.parametrize(("device", "compiles", "batch"), [(CPU, True, 100), (CPU, False, 100), (H200, False, 1000)])
def test_where_there_is_no_choice_nothing_is_captured_or_said(device: Any, compiles: bool, batch: int) -> None:
    found, said = decided(run_of(batch, virtual_ranks=1, compile=compiles), device, SMALL)
    assert (found.train.cuda_graphs, said) == ("off", [])


def test_small_passes_that_are_not_compiled_are_captured_by_a_users_word_alone() -> None:
    found, (line,) = decided(run_of(512, virtual_ranks=8, compile=False), H200, SMALL)
    assert found.train.cuda_graphs == "off"
    assert "64 images of 32x32 pixels go through the model at once" in line
    assert "--train.cuda-graphs may help, and no GPU has proven it yet" in line
    asked = run_of(512, virtual_ranks=8, compile=False, cuda_graphs="on")
    assert decided(asked, H200, SMALL) == (
        replace(asked, train=replace(asked.train, **AS_H200), data=replace(asked.data, augment_backend="torch")),
        [],
    )


@given(
    batch=st.integers(1, 64),
    virtual_ranks=st.sampled_from([0, 1, 2, 4, 8]),
    workers=st.sampled_from([1, 2, 4]),
    accumulate=st.integers(1, 3),
    reduction=st.sampled_from(["tree", "ddp"]),
    unlabelled=st.sampled_from(["", "x"]),
    compiles=st.booleans(),
    on_gpu=st.booleans(),
    side=st.integers(1, 400),
)
def test_what_auto_captures_is_never_refused(
    batch: int, virtual_ranks: int, workers: int, accumulate: int, reduction: Any, unlabelled: str, compiles: bool, on_gpu: bool, side: int
) -> None:
    """And it is a pass that is small: so `auto` can be no worse than a user's own `on`."""
    config = run_of(
        batch * 8 * accumulate,
        data={"unlabelled": unlabelled, "pad": 0},
        virtual_ranks=virtual_ranks,
        accumulate=accumulate,
        reduction=reduction,
        compile=compiles,
    )
    images = Images(count=100, height=side, width=side)
    is_captured, why = captures(config, images, on_gpu=on_gpu, workers=workers)
    assert bool(why) or not is_captured
    if is_captured:
        assert compiles
        parts = virtual_ranks or workers if reduction == "tree" else 1
        assert config.data.batch_size // parts * side * side < CAPTURED_PIXELS
        validate(replace(config, train=replace(config.train, cuda_graphs="on")))  # ValueError if they do not fit
        assert on_gpu


def test_it_is_decided_anew_where_a_run_goes_on_as_it_changes_no_result(tmp_path: Path) -> None:
    asked = replace(run_of(100, virtual_ranks=1), storage=str(tmp_path))
    with_name: Any = {"workers": 1, "fingerprint": "ab" * 32, "weights": "", "prefix": "x", "shape": (32, 32)}
    storage = open_storage(str(tmp_path))
    first, _ = decided(resolved(asked, storage, **with_name).config, H200, SMALL)
    assert first.train.cuda_graphs == "on"
    storage.write_atomic(f"{first.run}/config.toml", to_toml(first).encode())
    again, _ = decided(resolved(asked, storage, **with_name).config, CPU, SMALL)
    assert (again.run, again.train.cuda_graphs) == (first.run, "off")


@pytest.mark.parametrize(("text", "value"), [("true", "on"), ("false", "off"), ('"auto"', "auto")])
def test_a_configuration_of_an_earlier_release_is_read_as_before(text: str, value: str) -> None:
    assert from_toml(f"[train]\ncuda_graphs = {text}\n").train.cuda_graphs == value
