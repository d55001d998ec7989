"""A network traced by torch.export, with a free batch dimension: what both the ONNX graph and the program of PyTorch are made of."""

import inspect
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from trainer.formats.made import BATCH, MOST_IN_A_BATCH
from trainer.formats.quiet import quietly


def traced(graph: nn.Module, example: Tensor) -> torch.export.ExportedProgram:
    """ValueError if the network cannot be traced, or if it works for one size of batch alone.

    The two ways of tracing fail on different networks: the first takes `len(images)` for a constant, the second follows less of Python."""
    (name,) = parameter_names(graph)
    sizes = {name: {0: torch.export.Dim(BATCH, min=1, max=MOST_IN_A_BATCH)}}
    first: Exception | None = None
    for strict in (False, True):
        try:
            with quietly(), torch.no_grad():
                return torch.export.export(graph, (example,), dynamic_shapes=sizes, strict=strict)
        except Exception as error:  # of many kinds, which torch does not name
            first = first or error
    assert first is not None
    raise ValueError(f"torch.export cannot trace the network ({first_line(first)}); export its weights: --to safetensors") from first


def parameter_names(graph: nn.Module) -> Sequence[str]:
    """The names of what `forward` takes, which torch.export wants for its dynamic shapes. ValueError for more than one."""
    names = [
        name
        for name, parameter in inspect.signature(graph.forward).parameters.items()
        if parameter.default is inspect.Parameter.empty and parameter.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD
    ]
    if len(names) != 1:
        raise ValueError(f"the network's forward takes {', '.join(names) or 'nothing'}; only one of a single input can be exported")
    return names


def first_line(error: Exception) -> str:
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0][:300]}" if text else type(error).__name__
