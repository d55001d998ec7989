"""Quantisation-aware training: a layer computes with what the int8 export will hold, and one that is not trained is as it was."""

import copy
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
import torchvision
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from dataio.config import DataConfig
from trainer.learn.build import build_learner
from trainer.learn.state import weights_sha256
from trainer.models.rounded import INPUT_STEPS, WEIGHT_STEPS, Rounded, round_layers, rounded_input, rounded_weight
from trainer.settings.tree import ModelConfig, RunConfig, TrainConfig
from trainer.tasks.make import make_task

SEEDS = st.integers(0, 2**32)
SCALES = st.sampled_from([0.0, 1e-30, 1e-3, 1.0, 1e4])


def drawn(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# --- what is rounded to -----------------------------------------------------------------------------------------------------------------


@given(seed=SEEDS, scale=SCALES, out=st.integers(1, 5), rest=st.lists(st.integers(1, 4), min_size=1, max_size=3))
def test_a_weight_has_129_values_for_each_output_channel_and_keeps_its_gradient(seed: int, scale: float, out: int, rest: list[int]) -> None:
    weight = (scale * drawn(seed, out, *rest)).requires_grad_()
    found = rounded_weight(weight)
    steps = weight.detach().abs().flatten(1).amax(1) / WEIGHT_STEPS  # (O,)
    for row, exact, step in zip(found.detach().flatten(1), weight.detach().flatten(1), steps.tolist(), strict=True):
        assert len(row.unique()) <= 2 * WEIGHT_STEPS + 1
        assert bool(((row - exact).abs() <= 0.501 * step).all())
        assert torch.allclose(row.abs().max(), exact.abs().max())
    upstream = drawn(seed + 1, *weight.shape)
    found.backward(upstream)  # type: ignore[no-untyped-call]
    assert torch.equal(weight.grad, upstream)  # type: ignore[arg-type]


@given(seed=SEEDS, scale=SCALES, offset=st.sampled_from([-5.0, 0.0, 5.0]), dtype=st.sampled_from([torch.float32, torch.bfloat16]))
def test_an_input_has_256_values_with_zero_among_them_and_keeps_its_gradient(
    seed: int, scale: float, offset: float, dtype: torch.dtype
) -> None:
    exact = (scale * (drawn(seed, 3, 40) + offset)).to(dtype)
    exact[0, 0] = 0
    exact.requires_grad_()
    found = rounded_input(exact)
    assert found.dtype == dtype
    assert len(found.detach().unique()) <= INPUT_STEPS + 1
    assert found[0, 0] == 0, "so that what ReLU and padding made 0 stays 0"
    span = float(exact.detach().max().clamp_min(0) - exact.detach().min().clamp_max(0))
    slack = 0.6 if dtype == torch.float32 else 3.0  # bf16 itself has 256 steps to a power of two
    assert float((found - exact).detach().abs().max()) <= slack * span / INPUT_STEPS + 1e-30
    upstream = drawn(seed + 1, 3, 40).to(dtype)
    found.backward(upstream)  # type: ignore[no-untyped-call]
    assert torch.equal(exact.grad, upstream)  # type: ignore[arg-type]


def test_what_is_not_finite_stays_so() -> None:
    """A loss that is not finite is found, and its step undone."""
    for bad in (float("nan"), float("inf")):
        assert not rounded_input(torch.tensor([1.0, bad])).isfinite().all()
        assert not rounded_weight(torch.tensor([[1.0, bad]])).isfinite().all()


@given(seed=SEEDS)
def test_a_norm_may_be_folded_in_before_or_after_rounding(seed: int) -> None:
    """As the export does: it multiplies each output channel by a number of either sign."""
    weight, factor = drawn(seed, 6, 3, 3, 3), drawn(seed + 1, 6, 1, 1, 1)
    assert torch.allclose(rounded_weight(weight * factor), rounded_weight(weight) * factor, rtol=1e-4, atol=1e-6)


def test_the_exports_weights_are_those_that_were_trained_with(tmp_path: Path) -> None:
    """ONNX Runtime's own int8 numbers times its scales, against the layer's rounded weight."""
    onnx = pytest.importorskip("onnx")
    quantization = pytest.importorskip("onnxruntime.quantization")
    conv = nn.Conv2d(3, 8, 3, bias=False)
    with torch.no_grad():
        conv.weight.copy_(drawn(0, 8, 3, 3, 3) * torch.logspace(-3, 1, 8).view(-1, 1, 1, 1))
    plain, small = tmp_path / "plain.onnx", tmp_path / "small.onnx"
    weight = onnx.numpy_helper.from_array(conv.weight.detach().numpy(), "weight")
    images, outputs = (onnx.helper.make_tensor_value_info(name, 1, [1, channels, side, side]) for name, channels, side in SIDES)
    graph = onnx.helper.make_graph([onnx.helper.make_node("Conv", ["x", "weight"], ["y"])], "conv", [images], [outputs], [weight])
    onnx.save(onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 20)], ir_version=9), plain)
    quantization.quantize_static(
        plain,
        small,
        Once(drawn(1, 1, 3, 8, 8).numpy()),
        quant_format=quantization.QuantFormat.QDQ,
        per_channel=True,
        reduce_range=True,
        activation_type=quantization.QuantType.QUInt8,
        weight_type=quantization.QuantType.QInt8,
    )
    held = {each.name: onnx.numpy_helper.to_array(each) for each in onnx.load(small).graph.initializer}
    exported = held["weight_quantized"].astype(np.float32) * held["weight_scale"].reshape(-1, 1, 1, 1)
    assert np.allclose(exported, rounded_weight(conv.weight).detach().numpy(), rtol=1e-5, atol=0)


SIDES = (("x", 3, 8), ("y", 8, 6))


class Once:
    """Calibration data of one batch."""

    def __init__(self, batch: npt.NDArray[Any]) -> None:
        self._left = [batch]

    def get_next(self) -> dict[str, npt.NDArray[Any]] | None:
        return {"x": self._left.pop()} if self._left else None


# --- layers -----------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["resnet18", "timm/tf_efficientnet_lite0", "timm/vit_tiny_patch16_224", "mobilenet_v3_small"])
def test_a_model_keeps_its_names_weights_and_answers_and_is_trained_rounded(name: str) -> None:
    if name.startswith("timm/"):
        model = pytest.importorskip("timm").create_model(name.removeprefix("timm/"), num_classes=5)
    else:
        model = getattr(torchvision.models, name)(weights=None, num_classes=5)
    plain = copy.deepcopy(model)
    parameters = list(model.parameters())
    layers = [module for module in model.modules() if isinstance(module, nn.Conv2d | nn.Linear)]
    assert round_layers(model) == len(layers) > 10
    assert all(one is other for one, other in zip(parameters, model.parameters(), strict=True)), "an optimiser has them already"
    assert list(model.state_dict()) == list(plain.state_dict())
    assert weights_sha256(model) == weights_sha256(plain)
    images = drawn(3, 2, 3, 224, 224)
    with torch.no_grad():
        assert torch.equal(model.eval()(images), plain.eval()(images))
        assert weights_sha256(copy.deepcopy(model)) == weights_sha256(plain)
    for each in (model, plain):
        each.train()
        torch.manual_seed(1)  # for dropout
        each(images).square().sum().backward()
    (first, *_), (first_plain, *_) = ([each.grad for each in net.parameters() if each.grad is not None] for net in (model, plain))
    assert not torch.equal(first, first_plain)
    rounded = [module for module in model.modules() if isinstance(module, Rounded)]
    assert len(rounded) == len(layers)
    assert all(torch.equal(module.weight, rounded_weight(module._parameters["weight"])) for module in rounded)  # type: ignore[arg-type]


def test_a_layer_that_rounds_already_stays_as_it_is() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Linear(4, 2))
    assert round_layers(model) == 2
    once = [type(layer) for layer in model]
    assert round_layers(model) == 2
    assert [type(layer) for layer in model] == once


def test_a_network_that_rounding_ruins_learns_to_bear_it() -> None:
    """One channel of the first layer outweighs the others a thousand times, and the second layer makes up for it: the same function, of
    which 256 steps leave nothing but that channel."""
    torch.manual_seed(0)
    images, labels = drawn(1, 400, 8), torch.randint(4, (400,), generator=torch.Generator().manual_seed(2))
    images += 2 * drawn(3, 4, 8)[labels]
    model = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 4))

    def fit(steps: int) -> None:
        optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
        for _ in range(steps):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(images), labels).backward()
            optimizer.step()

    def right() -> float:
        with torch.no_grad():
            return float((model(images).argmax(1) == labels).float().mean())

    fit(200)
    with torch.no_grad():
        model[0].weight[0] *= 1000
        model[0].bias[0] *= 1000
        model[2].weight[:, 0] /= 1000
    exact = right()
    round_layers(model)  # in train mode it answers as in int8
    ruined = right()
    fit(200)
    assert exact > 0.9
    assert ruined < exact - 0.2
    assert right() > exact - 0.05


def test_a_compiled_pass_rounds_as_an_eager_one_does() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 5))
    round_layers(model)
    images = drawn(4, 6, 3, 8, 8)
    eager = model(images)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)(images)
    assert torch.allclose(eager, compiled, atol=1e-6)
    with torch.no_grad():
        assert not torch.allclose(eager, model.eval()(images), atol=1e-6)


# --- the setting ------------------------------------------------------------------------------------------------------------------------


def learner_of(**train: Any) -> Any:
    from dataio.schema import single_label

    config = RunConfig(
        data=DataConfig(batch_size=8),
        model=ModelConfig(name="resnet18", weights="none"),
        train=TrainConfig(precision="bf16", channels_last="on", small_maps="product", virtual_ranks=1, **train),
    )
    return build_learner(config, make_task(config.task, single_label(("a", "b")), label_smoothing=0.0), (32, 32), torch.device("cpu"))


def test_off_no_layer_is_touched_and_on_all_are() -> None:
    plain, rounded = learner_of(), learner_of(quantise="int8")
    assert not [module for module in plain.model.modules() if isinstance(module, Rounded)]
    assert weights_sha256(plain.model) == weights_sha256(rounded.model)
    kinds = {type(module).__name__ for module in rounded.model.modules() if isinstance(module, nn.Conv2d | nn.Linear)}
    assert kinds == {"RoundedConv2d", "RoundedLinear"}


def test_the_seed_of_layers_may_be_another_than_that_of_the_order() -> None:
    same, other = learner_of(seed=3), learner_of(seed=7, init_seed=3)
    assert weights_sha256(same.model) == weights_sha256(other.model) != weights_sha256(learner_of(seed=3, init_seed=4).model)
    assert TrainConfig(seed=3).seed_of_layers == 3
    assert TrainConfig(seed=3, init_seed=0).seed_of_layers == 0
