"""The model as a program of torch.export (`.pt2`): PyTorch opens it without this program and without the network's source. Called by
trainer.formats.command.
"""

import io

import torch
from torch import Tensor

from trainer.export.model_folder import Exported
from trainer.formats.made import BATCH, MOST_IN_A_BATCH, Made, graph_of, takes_of
from trainer.formats.onnx_graph import first_line, parameter_names
from trainer.formats.quiet import quietly

PROGRAM_FILE = "model.pt2"


def make_program(exported: Exported, *, is_prepared_inside: bool) -> Made:
    """ValueError if torch.export cannot trace the network."""
    graph, example = graph_of(exported, is_prepared_inside=is_prepared_inside)
    (name,) = parameter_names(graph)
    batch = torch.export.Dim(BATCH, min=1, max=MOST_IN_A_BATCH)
    buffer = io.BytesIO()
    try:
        with quietly(), torch.no_grad():
            torch.export.save(torch.export.export(graph, (example,), dynamic_shapes={name: {0: batch}}), buffer)
            buffer.seek(0)
            opened = torch.export.load(buffer).module()
    except Exception as error:
        raise ValueError(f"{first_line(error)}: torch.export cannot trace the network; export its weights (--to safetensors)") from error

    def ask(images: Tensor) -> Tensor:
        outputs: Tensor = opened(images if is_prepared_inside else exported.preprocess(images))
        return outputs

    return Made(
        format="torch",
        files={PROGRAM_FILE: buffer.getvalue()},
        main=PROGRAM_FILE,
        takes=takes_of(exported, example, is_prepared_inside=is_prepared_inside),
        ask=ask,
        code=(
            "import torch",
            "",
            f'model = torch.export.load("{PROGRAM_FILE}").module()',
            "with torch.inference_mode():",
            "    outputs = model(images)  # images: a tensor as described above",
        ),
        about={"torch": torch.__version__},
    )
