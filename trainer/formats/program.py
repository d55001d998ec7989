"""The model as a program of torch.export (`.pt2`): PyTorch opens it without this program and without the network's source. Called by
trainer.formats.command.
"""

import io

import torch
from torch import Tensor

from trainer.export.model_folder import Exported
from trainer.formats.graph import graph_of
from trainer.formats.made import PROGRAM_FILE, Made
from trainer.formats.quiet import quietly
from trainer.formats.traced import traced


def make_program(exported: Exported, *, is_prepared_inside: bool) -> Made:
    """ValueError if torch.export cannot trace the network."""
    graph = graph_of(exported, is_prepared_inside=is_prepared_inside)
    program = traced(graph.network, list(graph.example.values()), graph.free)
    buffer = io.BytesIO()
    with quietly():
        torch.export.save(program, buffer)
        buffer.seek(0)
        opened = torch.export.load(buffer).module()

    def ask(samples: Tensor) -> Tensor:
        outputs: Tensor = opened(*graph.given(samples).values())
        return outputs

    return Made(
        format="torch",
        files={PROGRAM_FILE: buffer.getvalue(), **graph.files},
        main=PROGRAM_FILE,
        takes=graph.takes,
        ask=ask,
        code=graph.code["torch"],
        output=graph.output,
        about={"torch": torch.__version__},
    )
