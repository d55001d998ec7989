"""The graph of an exported model: the network, its inputs, and how another program asks it. onnx_graph, quantise, program and library of
this package call it. Graphs of images are made here, those of texts in texts.py.
"""

from typing import Any

import torch
from torch import Tensor, nn

from trainer.export.model_folder import Exported
from trainer.formats.made import BATCH, INPUT, MOST_IN_A_BATCH, ONNX_FILE, OUTPUT, PROGRAM_FILE, Axis, Graph
from trainer.models.stem import enlarging_of
from trainer.models.vision import Preprocess


class WithPreparation(nn.Module):
    """The network and what is done to an image before it, as one: (n, 3, H, W) uint8 -> (n, outputs)."""

    def __init__(self, preprocess: nn.Module, model: nn.Module) -> None:
        super().__init__()
        self.preprocess, self.model = preprocess, model

    def forward(self, images: Tensor) -> Tensor:
        outputs: Tensor = self.model(self.preprocess(images))
        return outputs


def graph_of(exported: Exported, *, is_prepared_inside: bool) -> Graph:
    """The graph of a model of images, or of texts, which are always prepared outside. `is_prepared_inside`: it takes images as they are
    decoded, and resizes and normalises them itself."""
    if exported.texts is not None:
        from trainer.formats.texts import graph_of_texts  # here: it imports transformers

        return graph_of_texts(exported, exported.texts)
    height, width = exported.image_size
    images = torch.zeros(2, 3, height, width, dtype=torch.uint8)
    network = WithPreparation(exported.preprocess, exported.model).eval() if is_prepared_inside else exported.model.eval()
    example = images if is_prepared_inside else exported.preprocess(images)
    return Graph(
        network=network,
        example={INPUT: example},
        free={0: Axis(name=BATCH, most=MOST_IN_A_BATCH)},
        output=OUTPUT,
        given=lambda given: {INPUT: given if is_prepared_inside else exported.preprocess(given)},
        takes=takes_of(exported, example, is_prepared_inside=is_prepared_inside),
        code={
            "onnx": (
                "import onnxruntime",
                "",
                f'session = onnxruntime.InferenceSession("{ONNX_FILE}")',
                f'(outputs,) = session.run(None, {{"{INPUT}": images}})  # images: a numpy array as described above',
            ),
            "torch": (
                "import torch",
                "",
                f'model = torch.export.load("{PROGRAM_FILE}").module()',
                "with torch.inference_mode():",
                "    outputs = model(images)  # images: a tensor as described above",
            ),
        },
    )


def takes_of(exported: Exported, example: Tensor, *, is_prepared_inside: bool) -> dict[str, Any]:
    """The manifest's description of images."""
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
