"""What a format is made of: the files, and a way to ask them. onnx_graph, quantise, program and library of this package make it; check and
the command use it.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from trainer.export.model_folder import Exported
from trainer.models.stem import enlarging_of
from trainer.models.vision import Preprocess

Format = Literal["onnx", "torch", "safetensors"]
FORMATS: tuple[Format, ...] = ("onnx", "torch", "safetensors")
INPUT, OUTPUT, BATCH = "images", "outputs", "batch"
MOST_IN_A_BATCH = 4096


@dataclass(frozen=True, kw_only=True, slots=True)
class Made:
    """A model in a format, not yet written."""

    format: Format
    files: Mapping[str, bytes]
    main: str
    """The file that another program opens, of `files`."""
    takes: Mapping[str, Any]
    """The input, as the manifest says it: name, shape, type, and what is left to the caller."""
    ask: Callable[[Tensor], Tensor]
    """What the files answer: (n, 3, H, W) uint8 as decoded -> (n, outputs) float32. The network is that of `files` alone."""
    code: tuple[str, ...]
    """Python that opens it without this program."""
    about: Mapping[str, Any] = field(default_factory=dict)
    """What else the manifest says of this format."""


class WithPreparation(nn.Module):
    """The network and what is done to an image before it, as one: (n, 3, H, W) uint8 -> (n, outputs)."""

    def __init__(self, preprocess: nn.Module, model: nn.Module) -> None:
        super().__init__()
        self.preprocess, self.model = preprocess, model

    def forward(self, images: Tensor) -> Tensor:
        outputs: Tensor = self.model(self.preprocess(images))
        return outputs


def graph_of(exported: Exported, *, is_prepared_inside: bool) -> tuple[nn.Module, Tensor]:
    """The network to export, on the CPU in eval mode, and an input of the right shape for it. `is_prepared_inside`: it takes images as they
    are decoded, and resizes and normalises them itself."""
    height, width = exported.image_size
    images = torch.zeros(2, 3, height, width, dtype=torch.uint8)
    if is_prepared_inside:
        return WithPreparation(exported.preprocess, exported.model).eval(), images
    return exported.model.eval(), exported.preprocess(images)


def takes_of(exported: Exported, example: Tensor, *, is_prepared_inside: bool) -> dict[str, Any]:
    """The manifest's description of the input."""
    height, width = exported.image_size
    _, _, sees_height, sees_width = example.shape
    preprocess = exported.preprocess
    assert isinstance(preprocess, Preprocess)
    mean, std = (buffer.flatten().tolist() for buffer in (preprocess.mean, preprocess.std))
    decoded = {
        "decoded_to": [height, width],
        "colours": "RGB",
        "fit": exported.fit,
        **({"background": exported.background} if exported.background else {}),
    }
    if is_prepared_inside:
        return {
            "name": INPUT,
            "shape": [BATCH, 3, height, width],
            "type": "uint8",
            "prepared": "in the graph",
            **decoded,
        }
    return {
        "name": INPUT,
        "shape": [BATCH, 3, sees_height, sees_width],
        "type": "float32",
        "prepared": "by the caller",
        **decoded,
        **({"resized_to": [sees_height, sees_width]} if (sees_height, sees_width) != (height, width) else {}),
        "mean": mean,
        "std": std,
        "formula": "(pixel / 255 - mean) / std",
    }


def enlarged_by(exported: Exported) -> int:
    return enlarging_of(exported.model)
