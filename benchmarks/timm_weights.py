"""The quickstart's pretrained weights by timm's names, for timm's own tools. Called by photos.py and peers/.

Their package has names of its own. timm takes a file of which it knows no name with a warning, and begins with random weights; so what is
written here is read as timm's script reads it, and compared.
"""

from pathlib import Path

import timm
import torch

from trainer.models.vision import build_model
from trainer.settings.tree import ModelConfig

NAME = "tf_efficientnet_lite0"


def write_weights(path: Path, *, package: str = "package:efficientnet_lite0") -> Path:
    """Write the weights to `path`. ValueError if timm would not take them."""
    config = ModelConfig(name=f"timm/{NAME}", weights=package, stem="native")
    wanted = build_model(config, classes=10, seed=0, image_hw=(96, 96)).state_dict()
    torch.save(wanted, path)
    check_loads(path, wanted)
    return path


def check_loads(path: Path, wanted: dict[str, torch.Tensor]) -> None:
    """ValueError unless timm's `--pretrained --pretrained-path PATH --num-classes N` begins with `wanted`, but for the head."""
    model = timm.create_model(NAME, pretrained=True, num_classes=7, pretrained_cfg_overlay={"file": str(path), "num_classes": -1})
    found = model.state_dict()
    others = [name for name, value in wanted.items() if "classifier" not in name and not torch.equal(found[name], value)]
    if others:
        raise ValueError(f"timm begins with other weights than those of {path}: {len(others)} of {len(wanted)} tensors, {others[0]} first")
