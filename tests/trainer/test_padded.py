"""A first convolution of eight channels computes what one of three does, has the same parameters, and leaves no trace in what is saved."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
import torchvision
from torch import Tensor, nn

from dataio.schema import LABEL, Target
from tests.trainer.test_step import batches_of
from trainer.learn.build import build_learner
from trainer.learn.state import weights_sha256
from trainer.models.padded import CHANNELS, pad_channels, with_zeros
from trainer.models.rounded import round_layers
from trainer.models.stem import FoldedConv2d
from trainer.settings.identity import deciding_settings
from trainer.settings.tree import ModelConfig, RunConfig, TrainConfig
from trainer.tasks.make import make_task

LABELS = Target(name=LABEL, kind="label", classes=tuple(map(str, range(10))))


def resnet(stem: str = "native") -> nn.Module:
    torch.manual_seed(0)
    model = torchvision.models.resnet18(num_classes=10)
    if stem != "native":
        model.conv1 = FoldedConv2d(model.conv1, "nearest" if stem == "folded" else "bilinear")  # type: ignore[assignment,arg-type]
    return model


def with_bias() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3, stride=2, padding=1, padding_mode="reflect"), nn.Flatten(), nn.Linear(4 * 16 * 16, 10))


MODELS: dict[str, Callable[[], nn.Module]] = {
    "native": resnet,
    "folded": lambda: resnet("folded"),
    "folded_bilinear": lambda: resnet("folded_bilinear"),
    "bias, reflecting": with_bias,
    "timm": lambda: timm.create_model("mobilenetv3_small_050", num_classes=10),
}


def gradients_of(model: nn.Module, images: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        outputs = model(images)
        outputs.square().mean().backward()
    return outputs.detach(), {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


@pytest.mark.parametrize("name", MODELS)
def test_outputs_and_gradients_are_those_of_three_channels(name: str) -> None:
    """To the last places of float64, where a kernel adds in another order."""
    plain = MODELS[name]().double().train()
    padded = copy.deepcopy(plain)
    assert pad_channels(padded, name) == 1
    assert pad_channels(padded, name) == 1, "again is the same"
    images = torch.randn(4, 3, 32, 32, dtype=torch.float64).contiguous(memory_format=torch.channels_last)
    (one, ours), (other, theirs) = gradients_of(padded, images), gradients_of(plain, images)
    torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)
    assert ours.keys() == theirs.keys()
    for key, gradient in theirs.items():
        torch.testing.assert_close(ours[key], gradient, rtol=1e-7, atol=1e-11, msg=key)
    assert padded.state_dict().keys() == plain.state_dict().keys()
    assert all(value.shape == plain.state_dict()[key].shape for key, value in padded.state_dict().items())


@pytest.mark.parametrize("name", MODELS)
def test_a_convolution_reads_eight_channels_in_training_and_three_in_eval_mode(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, convolve, seen = MODELS[name](), torch.conv2d, []

    def noted(input: Tensor, *arguments: Any, **named: Any) -> Tensor:
        seen.append((input.shape[1], input.is_contiguous(memory_format=torch.channels_last), input.dtype))
        return convolve(input, *arguments, **named)

    plain = copy.deepcopy(model)
    pad_channels(model, name)
    images = torch.randn(4, 3, 32, 32).contiguous(memory_format=torch.channels_last)
    monkeypatch.setattr("torch.nn.functional.conv2d", noted)
    with torch.autocast("cpu", torch.bfloat16):
        model.train()(images)
    assert seen[0][:2] == (CHANNELS, True)
    if name != "bias, reflecting":  # PyTorch reflects in float32
        assert seen[0][2] == torch.bfloat16
    seen.clear()
    plain.load_state_dict(model.state_dict())
    assert torch.equal(model.eval()(images), plain.eval()(images))
    assert seen[0][0] == 3


def test_the_zeros_are_of_the_type_that_autocast_would_take() -> None:
    given = torch.randn(2, 3, 4, 4)
    assert with_zeros(given).dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        padded = with_zeros(given)
    assert torch.equal(padded[:, :3], given.bfloat16())
    assert not padded[:, 3:].any()


def test_it_goes_with_rounding() -> None:
    model = resnet().train()
    round_layers(model)
    other = copy.deepcopy(model)
    pad_channels(model, "resnet18")
    images = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(model(images), other(images), rtol=1e-3, atol=1e-3)


def test_a_model_without_such_a_convolution_is_refused() -> None:
    with pytest.raises(ValueError, match=r"train.pad_channels=true pads .* 3 channels, and model.name=own:model has none; leave it out"):
        pad_channels(nn.Sequential(nn.Conv2d(4, 8, 3), nn.Linear(3, 3)), "own:model")


def trained(*, pads: bool, virtual_ranks: int = 1) -> tuple[nn.Module, list[Tensor]]:
    train = TrainConfig(precision="fp32", channels_last="on", virtual_ranks=virtual_ranks, pad_channels=pads)
    config = RunConfig(model=ModelConfig(weights="none"), train=train)
    learner = build_learner(config, make_task(config.task, (LABELS,)), (28, 28), torch.device("cpu"))
    stepper = learner.stepper()
    losses = [stepper.step(batches, global_count=16, step=step) for step, batches in enumerate(batches_of((virtual_ranks, 16), 0, 2))]
    return learner.model, losses


def test_a_run_trains_with_it_and_has_a_name_of_its_own() -> None:
    (plain, without), (padded, losses) = trained(pads=False), trained(pads=True)
    assert type(padded.conv1).__name__ == "PaddedFoldedConv2d"
    torch.testing.assert_close(torch.stack(losses), torch.stack(without), rtol=1e-3, atol=1e-3)
    assert plain.state_dict().keys() == padded.state_dict().keys()
    assert weights_sha256(trained(pads=True)[0]) == weights_sha256(padded)
    assert "train.pad_channels" not in deciding_settings(RunConfig())
    assert deciding_settings(RunConfig(train=TrainConfig(pad_channels=True)))["train.pad_channels"] is True
