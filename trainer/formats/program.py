"""The model as a program of torch.export (`.pt2`): PyTorch opens it without this program and without the network's source. Called by
trainer.formats.command.
"""

import io

import torch
from torch import Tensor

from trainer.export.model_folder import Exported
from trainer.formats.made import Made, graph_of, takes_of
from trainer.formats.quiet import quietly
from trainer.formats.traced import traced

PROGRAM_FILE = "model.pt2"


def make_program(exported: Exported, *, is_prepared_inside: bool) -> Made:
    """ValueError if torch.export cannot trace the network."""
    graph, example = graph_of(exported, is_prepared_inside=is_prepared_inside)
    program = traced(graph, example)
    buffer = io.BytesIO()
    with quietly():
        torch.export.save(program, buffer)
        buffer.seek(0)
        opened = torch.export.load(buffer).module()

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
