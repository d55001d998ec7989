"""What a format is made from, a graph, and what it is made of: the files, and a way to ask them. onnx_graph, quantise, program and library
of this package make it; check and the command use it. graph.py makes graphs.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import Tensor, nn

Format = Literal["onnx", "torch", "safetensors"]
FORMATS: tuple[Format, ...] = ("onnx", "torch", "safetensors")
INPUT, OUTPUT, BATCH = "images", "outputs", "batch"
ONNX_FILE, PROGRAM_FILE = "model.onnx", "model.pt2"
MOST_IN_A_BATCH = 4096


@dataclass(frozen=True, kw_only=True, slots=True)
class Axis:
    """A dimension whose size is free."""

    name: str
    most: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Graph:
    """The network to export, on the CPU in eval mode, and how it is asked."""

    network: nn.Module
    example: Mapping[str, Tensor]
    """By the name of the input, in the order of `forward`."""
    free: Mapping[int, Axis]
    """Of each input, by the number of the dimension."""
    output: str
    given: Callable[[Tensor], Mapping[str, Tensor]]
    """Samples as the loader gives them, images (n, 3, H, W) uint8 or texts (n, T) int32, as the inputs."""
    takes: Mapping[str, Any]
    """The input, as the manifest says it: name, shape, type, and what is left to the caller."""
    code: Mapping[Format, tuple[str, ...]]
    """Python that opens the graph's file without this program, of each format that holds a graph."""
    files: Mapping[str, bytes] = field(default_factory=dict)
    """What lies beside the graph for whoever asks it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Made:
    """A model in a format, not yet written."""

    format: Format
    files: Mapping[str, bytes]
    main: str
    """The file that another program opens, of `files`."""
    takes: Mapping[str, Any]
    """The input, as in `Graph`."""
    ask: Callable[[Tensor], Tensor]
    """What the files answer: images (n, 3, H, W) uint8 as decoded, or texts (n, T) int32 as stored -> (n, outputs) float32. The network is
    that of `files` alone."""
    code: tuple[str, ...]
    """Python that opens it without this program."""
    output: str = OUTPUT
    """The name of what it gives."""
    about: Mapping[str, Any] = field(default_factory=dict)
    """What else the manifest says of this format."""
