"""Layer-wise decay: each parameter has one place, later layers are never shallower, and earlier blocks learn slower."""

import re
from typing import Any

import pytest
import torch
import torchvision.models
from torch import nn

from dataio.schema import single_label
from tests.trainer.test_optim import small_model
from trainer.drive.check import Question, Refused, built
from trainer.learn.depth import BLOCKS, depths_of
from trainer.learn.optim import build_optimizer, parameter_groups, set_learning_rate
from trainer.models.vision import head_of
from trainer.settings.identity import deciding_settings
from trainer.settings.tree import ModelConfig, OptimConfig, RunConfig, TaskConfig

FAMILIES = {
    "resnet18": 10,  # stem, 8 blocks, head
    "resnet50": 18,
    "resnext50_32x4d": 18,
    "wide_resnet50_2": 18,
    "efficientnet_b0": 19,  # stem, 16 blocks, last convolution, head
    "mobilenet_v2": 20,
    "mobilenet_v3_small": 14,
    "mnasnet0_5": 18,
    "vit_b_32": 14,  # stem, 12 blocks, head
    "convnext_tiny": 23,  # stem, 18 blocks, 3 reductions, head
    "swin_t": 17,
    "shufflenet_v2_x0_5": 19,
    "regnet_y_400mf": 18,
    "densenet121": 64,
}
TIMM = {"tf_efficientnet_lite0": 18, "resnet18": 10, "vit_tiny_patch16_224": 14, "mobilenetv3_small_050": 15}


def architecture_of(name: str) -> nn.Module:
    """Without drawing random weights, where the model can be built so."""
    if name.startswith("regnet"):  # it computes its widths with tensors
        return torchvision.models.get_model(name, weights=None)
    with torch.device("meta"):
        model: nn.Module = torchvision.models.get_model(name, weights=None)
    return model


def check_places(model: nn.Module, name: str, number: int) -> None:
    """Each parameter has exactly one place; the first has none before it; the head is the last; no place is empty."""
    head, _ = head_of(model)
    depths = depths_of(model, name, head)
    names = [key for key, _ in model.named_parameters()]
    assert list(depths) == names
    assert set(depths.values()) == set(range(number)), name
    assert {key for key, depth in depths.items() if depth == number - 1} == {key for key in names if key.startswith(f"{head}.")}
    assert depths[names[0]] == 0
    groups = parameter_groups(model, OptimConfig(layer_decay=0.5), head, depths)
    held = [id(parameter) for group in groups for parameter in group["params"]]
    assert sorted(held) == sorted(map(id, model.parameters()))


@pytest.mark.parametrize("name", FAMILIES)
def test_each_parameter_of_torchvisions_models_has_one_place_and_they_go_from_the_input_to_the_head(name: str) -> None:
    model = architecture_of(name)
    check_places(model, name, FAMILIES[name])
    head, _ = head_of(model)
    depths = list(depths_of(model, name, head).values())
    assert depths == sorted(depths), "torchvision registers layers in the order in which they compute"


def test_every_family_that_is_known_is_in_the_table_above() -> None:
    assert {family for family in BLOCKS for name in FAMILIES if name.startswith(family)} == set(BLOCKS)


@pytest.mark.parametrize("name", TIMM)
def test_timms_models_say_themselves_how_deep_they_are(name: str) -> None:
    timm = pytest.importorskip("timm")
    model = timm.create_model(name, pretrained=False)
    check_places(model, f"timm/{name}", TIMM[name])
    numbers = re.compile(r"(?:blocks|layer)\.?(\d+)(?:\.(\d+))?")
    found: dict[tuple[int, ...], int] = {}
    for key, depth in depths_of(model, f"timm/{name}", head_of(model)[0]).items():
        if match := numbers.match(key):
            found[tuple(int(each or 0) for each in match.groups())] = depth
    ordered = [depth for _, depth in sorted(found.items())]
    assert ordered == sorted(ordered)


@pytest.mark.parametrize(("name", "model"), [("vgg11", "vgg11"), ("mine:net", "resnet18")])
def test_a_model_whose_blocks_nobody_knows_is_refused_with_the_fix(name: str, model: str) -> None:
    with pytest.raises(ValueError, match=rf"model.name={name}; it knows torchvision's resnet, .*--optim.layer-decay 1"):
        depths_of(nn.Linear(2, 2), name, "head")


def test_the_check_before_a_run_refuses_it_and_asks_nothing_where_it_is_off() -> None:
    def asked(layer_decay: float) -> Any:
        model = ModelConfig(name="squeezenet1_1", weights="none", image_size=64)
        return built(
            Question(
                task=TaskConfig(),
                targets=single_label(("a", "b")),
                label_smoothing=0.0,
                model=model,
                shape=(64, 64),
                seed=0,
                layer_decay=layer_decay,
            )
        )

    refused = asked(0.9)
    assert isinstance(refused, Refused)
    assert "model.name=squeezenet1_1" in refused.message
    assert not isinstance(asked(1.0), Refused)


def test_each_block_learns_as_much_slower_as_the_setting_says_at_every_step() -> None:
    model, config = small_model(), OptimConfig(lr=0.1, layer_decay=0.5, head_lr_factor=5, weight_decay=0.1)
    depths = {"0.weight": 0, "0.bias": 0, "1.weight": 1, "1.bias": 1, "3.weight": 2, "3.bias": 2}
    optimizer = build_optimizer(model, config, "3", depths)
    for step in (0, 7):
        rate = set_learning_rate(optimizer, config, step, 10)
        found = [(group["lr"] / rate, group["weight_decay"]) for group in optimizer.param_groups]
        assert found == [pytest.approx(pair) for pair in ((0.5, 0.1), (0.5, 0.0), (1.0, 0.0), (5.0, 0.1), (5.0, 0.0))]


@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_many_groups_are_torchs_optimiser_to_the_bit(name: Any) -> None:
    """The optimisers in blocks read each group's own rate."""
    depths = {"0.weight": 0, "0.bias": 0, "1.weight": 1, "1.bias": 1, "3.weight": 2, "3.bias": 2}
    config = OptimConfig(name=name, lr=0.1, layer_decay=0.5, momentum=0.9, weight_decay=0.01)
    ours, theirs = small_model(), small_model()
    mine = build_optimizer(ours, config, "3", depths)
    groups = parameter_groups(theirs, config, "3", depths)
    reference: torch.optim.Optimizer = (
        torch.optim.SGD(groups, lr=0.1, momentum=0.9) if name == "sgd" else torch.optim.AdamW(groups, lr=0.1, betas=(0.9, 0.999))
    )
    for step in range(4):
        for optimizer, model in ((mine, ours), (reference, theirs)):
            set_learning_rate(optimizer, config, step, 4)
            generator = torch.Generator().manual_seed(step)
            for parameter in model.parameters():
                parameter.grad = torch.randn(parameter.shape, generator=generator)
            optimizer.step()
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.equal(a, b)


def test_off_is_the_groups_of_before_and_renames_no_run() -> None:
    model = small_model()
    assert [len(group["params"]) for group in parameter_groups(model, OptimConfig(), "3")] == [1, 3, 1, 1]
    assert "optim.layer_decay" not in deciding_settings(RunConfig())
