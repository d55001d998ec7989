"""Chooses the channels of a network that stay, and cuts the others out, by torch-pruning (extra `prune`). __main__.py and trainer.compress
call it.

DepGraph (Fang et al. 2023, https://arxiv.org/abs/2301.12900) finds which channels of which layers have to go together. In each such group
the channels of the smallest L2 norm go, taken over all layers of the group. The choice depends on the weights alone.

What comes out is proven before anybody sees it: the network that trainer.models.narrow cuts to the same widths, with the same weights,
gives the same answers to the bit. An architecture that cannot be cut this way is refused.
"""

import copy
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from trainer.models.narrow import narrow, widths_between
from trainer.models.stem import FOLDED_TIMES, FoldedConv2d
from trainer.models.vision import head_of

NEEDS = 'pruning needs the package torch-pruning: pip install "torch-pruning>=1.6" (extra `prune`)'
MULTIPLE = 8
"""Channels that stay are a multiple of it, rounded down; layers that have no more than that keep all. Matrix units of CPUs and GPUs take
eight at a time."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Pruned:
    """A network without some of its channels."""

    model: nn.Module
    """In eval mode."""
    widths: dict[str, int]
    """Of the layers that are narrower than those of the network it was (`model.widths`)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Cost:
    """What a network costs."""

    parameters: int
    macs: int
    """Multiplications and additions for one image, in pairs."""


def require_torch_pruning() -> Any:
    """The package. ValueError if it is missing."""
    try:
        import torch_pruning
    except ImportError as error:
        raise ValueError(NEEDS) from error
    return torch_pruning


def check_fraction(fraction: float, multiple: int, *, flag: str = "--fraction") -> None:
    """ValueError for what no network can be pruned by. `flag` is the fraction's name on the command line."""
    if not 0 < fraction < 1:
        raise ValueError(f"{flag} {fraction:g} must be above 0 and below 1: the share of a layer's channels that goes; 0.5 halves them")
    if multiple < 1:
        raise ValueError(f"--multiple {multiple}: channels that stay are a multiple of it; use 1 or more, {MULTIPLE} is the default")


def pruned(
    model: nn.Module, rebuilt: Callable[[], nn.Module], *, name: str, fraction: float, seen: tuple[int, int], multiple: int = MULTIPLE
) -> Pruned:
    """`model` without `fraction` of the channels of each group of layers. `rebuilt()` gives the same architecture anew, to prove the result
    on. `seen`: (height, width) of its images. `name` is the model's in errors. The model itself stays as it is. ValueError if the
    architecture cannot be pruned."""
    check_fraction(fraction, multiple)
    cut = _cut(model, name, fraction, seen, multiple)
    widths = widths_between(model, cut)
    if not widths:
        raise ValueError(
            f"--fraction {fraction:g} with --multiple {multiple} takes no channel from model.name={name}; use a larger fraction, or a "
            "smaller multiple"
        )
    narrower = rebuilt()
    head, _ = head_of(narrower)
    try:
        narrow(narrower, widths, head=head, seen=seen)
        narrower.load_state_dict(cut.state_dict(), strict=True)
        images = torch.randn(2, 3, *seen, generator=torch.Generator().manual_seed(0))
        is_same = bool(torch.equal(_answers(narrower, images), _answers(cut, images)))
    except (ValueError, RuntimeError) as error:
        raise ValueError(f"{_not_prunable(name)}: {_first_line(error)}") from error
    if not is_same:
        raise ValueError(f"{_not_prunable(name)}: cut to the same widths and with the same weights it answers otherwise")
    return Pruned(model=narrower.eval(), widths=widths)


def cost_of(model: nn.Module, seen: tuple[int, int]) -> Cost:
    """`seen`: (height, width) of the images."""
    with FlopCounterMode(display=False) as counter:
        _answers(model, torch.zeros(1, 3, *seen))
    return Cost(parameters=sum(each.numel() for each in model.parameters()), macs=counter.get_total_flops() // 2)


def _cut(model: nn.Module, name: str, fraction: float, seen: tuple[int, int], multiple: int) -> nn.Module:
    """A copy of `model`, pruned by torch-pruning."""
    package = require_torch_pruning()
    cut = copy.deepcopy(model).eval()
    times = 1
    folded = getattr(cut, "conv1", None)
    if isinstance(folded, FoldedConv2d):  # the same convolution as the package knows it, on the image that it acts as if it saw
        cut.conv1, times = _unfolded(folded), FOLDED_TIMES
    _, head = head_of(cut)
    outputs = len(head.weight)
    try:
        with warnings.catch_warnings():  # it tells on stderr what it assumes of parameters outside of layers
            warnings.simplefilter("ignore")
            package.pruner.BasePruner(
                cut,
                torch.zeros(1, 3, *(side * times for side in seen)),
                importance=package.importance.GroupMagnitudeImportance(p=2),
                pruning_ratio=fraction,
                ignored_layers=[head],
                round_to=multiple,
            ).step()
    except Exception as error:  # of many kinds: it finds what it cannot follow by failing
        raise ValueError(f"{_not_prunable(name)}: {_first_line(error)}") from error
    assert len(head_of(cut)[1].weight) == outputs
    if isinstance(folded, FoldedConv2d):
        conv = cut.conv1
        assert isinstance(conv, nn.Conv2d)
        folded.weight, folded.bias = conv.weight, conv.bias
        cut.conv1 = folded
    return cut


def _unfolded(folded: FoldedConv2d) -> nn.Conv2d:
    out, channels = folded.weight.shape[:2]
    options: dict[str, Any] = {"kernel_size": 7, "stride": 2, "padding": 3, "bias": folded.bias is not None}
    conv = nn.utils.skip_init(nn.Conv2d, channels, out, **options)  # type: ignore[no-untyped-call]
    assert isinstance(conv, nn.Conv2d)
    conv.weight, conv.bias = folded.weight, folded.bias
    return conv


@torch.no_grad()
def _answers(model: nn.Module, images: Tensor) -> Tensor:
    answers: Tensor = model.eval()(images)
    return answers


def _not_prunable(name: str) -> str:
    return f"model.name={name} cannot be pruned (ResNets, MobileNetV2 and efficientnet_lite can)"


def _first_line(error: Exception) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:300]}" if text else type(error).__name__
