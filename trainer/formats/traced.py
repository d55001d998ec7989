"""A network traced by torch.export, whose batch is free, and of texts their length: what both the ONNX graph and the program of PyTorch are
made of."""

import inspect
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from trainer.formats.made import Axis
from trainer.formats.quiet import quietly


def traced(network: nn.Module, example: Sequence[Tensor], free: Mapping[int, Axis]) -> torch.export.ExportedProgram:
    """`free`: the dimensions of each input whose size is. ValueError if the network cannot be traced, or if it works for one size alone.

    The two ways of tracing fail on different networks: the first takes `len(images)` for a constant, the second follows less of Python."""
    check_parameters(network, len(example))
    axes = {number: torch.export.Dim(axis.name, min=1, max=axis.most) for number, axis in free.items()}
    sizes = tuple(axes for _ in example)
    first: Exception | None = None
    for strict in (False, True):
        try:
            with quietly(), torch.no_grad():
                return torch.export.export(network, tuple(example), dynamic_shapes=sizes, strict=strict)
        except Exception as error:  # of many kinds, which torch does not name
            first = first or error
    assert first is not None
    raise ValueError(f"torch.export cannot trace the network ({first_line(first)}); export its weights: --to safetensors") from first


def check_parameters(network: nn.Module, inputs: int) -> None:
    """ValueError for a network that does not take so many inputs."""
    names = [
        name
        for name, parameter in inspect.signature(network.forward).parameters.items()
        if parameter.default is inspect.Parameter.empty and parameter.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD
    ]
    if len(names) != inputs:
        raise ValueError(f"the network's forward takes {', '.join(names) or 'nothing'}; only one of a single input can be exported")


def first_line(error: Exception) -> str:
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0][:300]}" if text else type(error).__name__
