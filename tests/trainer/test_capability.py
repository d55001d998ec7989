"""What `auto` becomes: a pure choice from what the nodes report and what the run was started with."""

import dataclasses
from itertools import product

import pytest
import torch
import torchvision
from hypothesis import given
from hypothesis import strategies as st

from trainer.drive import capability as caps
from trainer.drive.capability import Capability, as_started, decide, of_cpu, of_gpu, parse_gpus, weakest
from trainer.models.vision import has_depthwise
from trainer.settings.cli import parse
from trainer.settings.toml import from_toml, to_toml
from trainer.settings.tree import RunConfig, TrainConfig

AUTO = TrainConfig(precision="auto", channels_last="auto")
H200, V100 = of_gpu("NVIDIA H200", (9, 0), 140 << 30), of_gpu("Tesla V100", (7, 0), 16 << 30)
P100 = of_gpu("Tesla P100", (6, 0))
EPYC = of_cpu("flags : fpu avx2 avx512f avx512_bf16\n")
XEON, OLD = of_cpu("flags\t\t: fpu avx2 amx_bf16 avx512_bf16\n"), of_cpu("processor : 0\nflags : fpu sse2 avx2 avx512f\n")


@pytest.mark.parametrize(
    ("device", "precision", "layout", "small_maps"),
    [
        (H200, "bf16", "on", "convolution"),
        (V100, "fp32", "on", "convolution"),
        (P100, "fp32", "off", "convolution"),
        (XEON, "bf16", "on", "convolution"),
        (EPYC, "bf16", "on", "product"),
        (OLD, "fp32", "on", "convolution"),
    ],
    ids=lambda value: value.name if isinstance(value, Capability) else value,
)
def test_auto_is_bf16_where_the_device_computes_in_it(device: Capability, precision: str, layout: str, small_maps: str) -> None:
    decision = decide(AUTO, device, has_depthwise=False)
    assert (decision.train.precision, decision.train.channels_last, decision.train.small_maps) == (precision, layout, small_maps)
    said = [f"train.precision=auto: {precision}", f"train.channels_last=auto: {layout}"]
    said += ["train.small_maps=auto: product"] * (small_maps == "product")
    assert [line.split(" (")[0] for line in decision.said] == said
    assert all(device.name in line for line in decision.said)
    assert not decision.warnings


def test_depthwise_convolutions_stay_in_fp32_on_a_cpu_only() -> None:
    assert decide(AUTO, XEON, has_depthwise=True).train.precision == "fp32"
    assert decide(AUTO, H200, has_depthwise=True).train.precision == "bf16"


@given(
    precision=st.sampled_from(["auto", "fp32", "bf16"]),
    layout=st.sampled_from(["auto", "on", "off"]),
    small_maps=st.sampled_from(["auto", "convolution", "product"]),
    device=st.sampled_from([H200, V100, P100, XEON, EPYC, OLD]),
    saved=st.none()
    | st.tuples(st.sampled_from(["fp32", "bf16"]), st.sampled_from(["on", "off"]), st.sampled_from(["convolution", "product"])),
    depthwise=st.booleans(),
)
def test_nothing_stays_open_a_users_word_counts_first_and_what_the_run_was_started_with_second(
    precision: str, layout: str, small_maps: str, device: Capability, saved: tuple[str, str, str] | None, depthwise: bool
) -> None:
    asked = TrainConfig(precision=precision, channels_last=layout, small_maps=small_maps, epochs=7)  # type: ignore[arg-type]
    known = asked
    if saved:
        known = as_started(asked, TrainConfig(precision=saved[0], channels_last=saved[1], small_maps=saved[2]))  # type: ignore[arg-type]
    decision = decide(known, device, has_depthwise=depthwise)
    found = decision.train
    decided = {name: getattr(asked, name) for name in ("precision", "channels_last", "small_maps")}
    assert dataclasses.replace(found, **decided) == asked  # nothing else changed
    assert found.precision == (precision if precision != "auto" else saved[0] if saved else found.precision) != "auto"
    assert found.channels_last == (layout if layout != "auto" else saved[1] if saved else found.channels_last) != "auto"
    assert found.small_maps == (small_maps if small_maps != "auto" else saved[2] if saved else found.small_maps) != "auto"
    of_no_use = found.small_maps == "product" and (device.device == "cuda" or found.precision == "fp32" or found.channels_last == "off")
    assert len(decision.warnings) == (found.precision == "bf16" and not device.has_bf16) + of_no_use
    is_product = small_maps == "auto" and found.small_maps == "product"
    assert len(decision.said) == (0 if saved else (precision == "auto") + (layout == "auto") + is_product)
    assert decide(found, device, has_depthwise=depthwise).train == found


def test_a_run_that_goes_on_on_another_machine_keeps_its_precision_and_is_told_that_it_is_slow() -> None:
    begun = decide(AUTO, XEON, has_depthwise=False).train
    decision = decide(as_started(AUTO, begun), OLD, has_depthwise=False)
    assert decision.train == begun
    assert not decision.said
    (warning,) = decision.warnings
    assert "train.precision=bf16 is emulated here and slow (CPU without bf16 instructions)" in warning
    assert "--train.precision fp32" in warning


@given(
    st.lists(st.sampled_from([H200, V100, P100]), min_size=1, max_size=5) | st.lists(st.sampled_from([XEON, EPYC]), min_size=1, max_size=5)
)
def test_the_weakest_of_several_decides(seen: list[Capability]) -> None:
    found = weakest(seen)
    assert found.likes_products == all(one.likes_products for one in seen)
    assert found.has_bf16 == all(one.has_bf16 for one in seen)
    assert found.likes_channels_last == all(one.likes_channels_last for one in seen)
    assert found.name in {one.name for one in seen}
    known = [one.memory_bytes for one in seen if one.memory_bytes is not None]
    assert found.memory_bytes == (min(known) if known else None)
    if not found.has_bf16:
        assert found.name != H200.name


def test_cpus_are_told_apart_by_their_flags_and_by_no_part_of_another() -> None:
    assert XEON.has_bf16
    assert XEON.name == "CPU with amx_bf16"
    assert of_cpu("flags : avx512_bf16x\nmodel name : amx_bf16\n").has_bf16 is False
    assert of_cpu("").has_bf16 is False


def test_gpus_are_read_from_nvidia_smis_lines() -> None:
    found = parse_gpus("9.0, 143771 MiB, NVIDIA H200\n12.1, [N/A], NVIDIA GB10\n")
    assert found == [of_gpu("NVIDIA H200", (9, 0), 143771 * 2**20), of_gpu("NVIDIA GB10", (12, 1))]
    assert parse_gpus("12.0, 97887 MiB, NVIDIA RTX, PRO\n")[0].name == "NVIDIA RTX, PRO"
    assert parse_gpus("[N/A], [N/A], Old\n\nNo devices were found\n") == []


def test_here_knows_this_cpu_and_says_so_where_no_gpu_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    found = caps.here(use_gpus=False)
    assert found.device == "cpu"
    assert found.has_bf16 == bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())
    monkeypatch.setenv("PATH", "")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(ValueError, match=r"neither nvidia-smi nor torch .*--train.precision bf16"):
        caps.here(use_gpus=True)


@pytest.mark.parametrize(
    ("name", "expected"), [("resnet18", False), ("mobilenet_v3_small", True), ("resnext50_32x4d", False), ("vit_b_16", False)]
)
def test_depthwise_convolutions_are_told_from_grouped_ones(name: str, expected: bool) -> None:
    with torch.device("meta"):
        assert has_depthwise(torchvision.models.get_model(name, weights=None)) is expected


# --- as settings ----------------------------------------------------------------------------------------------------------------------


def train_of(*words: str) -> TrainConfig:
    return parse(list(words)).config.train


@pytest.mark.parametrize(
    ("words", "value"),
    [
        (["--train.channels-last"], "on"),
        (["--train.no-channels-last"], "off"),
        (["--train.no_channels_last"], "off"),
        (["--train.channels-last", "true"], "on"),
        (["--train.channels-last", "False"], "off"),
        (["--train.channels-last=false"], "off"),
        (["--train.channels_last", "off"], "off"),
        (["--train.channels-last", "auto"], "auto"),
    ],
)
def test_channels_last_takes_the_words_that_it_took_as_a_boolean(words: list[str], value: str) -> None:
    for before, after in product(([], ["--train.epochs", "3"]), ([], ["--train.seed", "4"])):
        train = train_of(*before, *words, *after)
        assert train.channels_last == value
        assert (train.epochs, train.seed) == (3 if before else TrainConfig().epochs, 4 if after else TrainConfig().seed)


@pytest.mark.parametrize(("text", "value"), [("true", "on"), ("false", "off"), ('"auto"', "auto"), ('"off"', "off")])
def test_a_saved_config_with_a_boolean_is_read_as_before(text: str, value: str) -> None:
    config = from_toml(f"[train]\nchannels_last = {text}\n")
    assert config.train.channels_last == value
    assert from_toml(to_toml(config)) == config


def test_a_wrong_word_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match=r"train.channels_last = 'yes'; it must be one of auto, on, off"):
        from_toml('[train]\nchannels_last = "yes"\n')
    with pytest.raises(ValueError, match=r"train.precision = True"):
        from_toml("[train]\nprecision = true\n")


def test_profile_is_short_for_its_setting() -> None:
    assert train_of("--profile").profile is True
    assert train_of("--train.profile").profile is True
    assert RunConfig().train.profile is False


def test_micro_batches_must_be_equal(capsys: pytest.CaptureFixture[str]) -> None:
    assert train_of("--train.accumulate", "5", "--data.batch-size", "100", "--workers", "2").accumulate == 5
    with pytest.raises(SystemExit):
        train_of("--train.accumulate", "4", "--data.batch-size", "100", "--workers", "2")
    assert "train.accumulate=4 does not cut the 50 images of a virtual rank into equal micro-batches; use 2" in capsys.readouterr().err


def test_cuda_graphs_are_refused_where_workers_have_no_gpu() -> None:
    wanted = dataclasses.replace(AUTO, compile=True, cuda_graphs="on")
    assert decide(wanted, H200, has_depthwise=False).train.cuda_graphs == "on"
    with pytest.raises(ValueError, match=r"train.cuda_graphs=on needs a GPU, and the workers have none"):
        decide(wanted, XEON, has_depthwise=False)
