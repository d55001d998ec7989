"""How deep each parameter lies in its model: the block that it belongs to, counted from the input. trainer.learn.optim gives earlier blocks
lower learning rates by it (`optim.layer_decay`); trainer.drive.check asks before a run starts whether a model's blocks are known.

Models of torchvision register their layers in the order in which they compute, so a pattern that finds a block's name is enough: what comes
before the first block is the stem, what stands between two blocks belongs to the one before. timm's models say themselves
(`group_matcher`), and so may a model of the user's own; models of texts name such a pattern (`blocks`).
"""

import re
from collections.abc import Mapping
from typing import Any

from torch import nn

_STAGED = r"features\.[1-9]\d*"  # features.0 is the stem
BLOCKS: Mapping[str, str] = {
    "resnet": r"layer\d+\.\d+",
    "resnext": r"layer\d+\.\d+",
    "wide_resnet": r"layer\d+\.\d+",
    "efficientnet": rf"{_STAGED}\.\d+(?=\.block\.)|{_STAGED}",
    "mobilenet": _STAGED,
    "mnasnet": r"layers\.(?:8|9|1[0-3])\.\d+",
    "vit": r"encoder\.layers\.encoder_layer_\d+",
    "convnext": rf"{_STAGED}\.\d+(?=\.block\.|\.layer_scale)|{_STAGED}",
    "swin": rf"{_STAGED}\.\d+|{_STAGED}",
    "shufflenet": r"stage\d\.\d+|conv5",
    "regnet": r"trunk_output\.block\d+\.block\d+-\d+",
    "densenet": r"features\.denseblock\d+\.denselayer\d+|features\.transition\d+|features\.norm5",
}
"""Beginning of a torchvision model's name -> a block's name, which a parameter of the block begins with, before a dot."""


def depths_of(model: nn.Module, name: str, head_name: str) -> dict[str, int]:
    """Parameter name -> its depth: 0 for the stem, one more for each block, and most of all for the head. `name`: `model.name`. ValueError
    if nobody knows the model's blocks."""
    if isinstance(pattern := getattr(model, "blocks", None), str):
        found = _by_blocks(model, re.compile(rf"(?:{pattern})(?=\.)"))
    elif callable(getattr(model, "group_matcher", None)):
        found = _by_its_own_groups(model)
    elif (pattern := _pattern(name)) is not None:
        found = _by_blocks(model, re.compile(rf"(?:{pattern})(?=\.)"))
    else:
        raise ValueError(
            f"optim.layer_decay does not know the blocks of model.name={name}; it knows torchvision's {', '.join(BLOCKS)}, all of timm "
            "(timm/NAME), and models of your own that have timm's method group_matcher. Use --optim.layer-decay 1, or one of these"
        )
    backbone = sorted({depth for key, depth in found.items() if not key.startswith(f"{head_name}.")})
    place = {depth: number for number, depth in enumerate(backbone)}  # without gaps
    return {key: len(backbone) if key.startswith(f"{head_name}.") else place[depth] for key, depth in found.items()}


def _pattern(name: str) -> str | None:
    if ":" in name or "/" in name:
        return None
    return next((pattern for family, pattern in BLOCKS.items() if name.startswith(family)), None)


def _by_blocks(model: nn.Module, pattern: re.Pattern[str]) -> dict[str, int]:
    found: dict[str, int] = {}
    depth, block = 0, ""
    for key, _ in model.named_parameters():
        match = pattern.match(key)
        if match is not None and match[0] != block:
            depth, block = depth + 1, match[0]
        found[key] = depth
    return found


def _by_its_own_groups(model: Any) -> dict[str, int]:
    try:
        from timm.models import group_parameters
    except ImportError as error:
        raise ValueError(
            'optim.layer_decay reads the model\'s group_matcher with timm, which is not installed: pip install "timm>=1.0", or use '
            "--optim.layer-decay 1"
        ) from error
    groups = group_parameters(model, model.group_matcher(coarse=False), reverse=True)
    return {key: int(groups[key]) for key, _ in model.named_parameters()}
