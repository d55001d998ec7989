"""The model as an ONNX graph, for ONNX Runtime and whatever else reads ONNX (extra `onnx`). trainer.formats.command calls it.

torch.export traces the network and its exporter writes the graph, with a free batch dimension, and of texts a free length. ONNX Runtime
then opens the bytes that are to be written, on a CPU, and it is that session which is checked.
"""

import re
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from trainer.export.model_folder import Exported
from trainer.formats.graph import graph_of
from trainer.formats.made import ONNX_FILE, Axis, Graph, Made
from trainer.formats.quiet import quietly
from trainer.formats.traced import first_line, traced

OPSET = 20
LARGEST_BYTES = 2_000_000_000
"""Of a model in one file: protobuf, in which ONNX is written, ends at 2 GiB."""
NEEDS = "ONNX needs three packages: pip install onnx onnxruntime onnxscript (extra `onnx`); --to torch and --to safetensors need none"


def make_onnx(exported: Exported, *, is_prepared_inside: bool, threads: int) -> Made:
    """ValueError if the network cannot be written as ONNX."""
    require_onnx()
    graph = graph_of(exported, is_prepared_inside=is_prepared_inside)
    program = traced(graph.network, list(graph.example.values()), graph.free)
    try:
        with quietly():
            written = torch.onnx.export(
                program, input_names=list(graph.example), output_names=[graph.output], opset_version=OPSET, verbose=False
            )
        assert written is not None
        proto = written.model_proto
        _name_axes(proto.graph, graph.free)
        data = proto.SerializeToString()
    except Exception as error:  # of many kinds, which the exporter does not name
        raise ValueError(
            f"the network cannot be written as ONNX ({first_line(error)}); export it for PyTorch (--to torch), or its weights "
            "(--to safetensors)"
        ) from error
    for number, axis in graph.free.items():
        if not all(each.type.tensor_type.shape.dim[number].dim_param for each in proto.graph.input):
            raise ValueError(f"the ONNX graph takes one size of {axis.name} alone; export the network for PyTorch: --to torch")
    if len(data) > LARGEST_BYTES:
        raise ValueError(f"the model takes {len(data):,} bytes, and one ONNX file holds at most {LARGEST_BYTES:,}; use --to torch")
    return made_of_onnx(data, graph, threads=threads)


def made_of_onnx(data: bytes, graph: Graph, *, threads: int) -> Made:
    session = session_of(data, threads)
    return Made(
        format="onnx",
        files={ONNX_FILE: data, **graph.files},
        main=ONNX_FILE,
        takes=graph.takes,
        ask=lambda samples: run(session, graph.given(samples)),
        code=graph.code["onnx"],
        output=graph.output,
        about={"opset": OPSET},
    )


def _name_axes(written: Any, free: Mapping[int, Axis]) -> None:
    """Call the free dimensions by their names, which the exporter replaces by numbered ones."""
    first = written.input[0].type.tensor_type.shape
    names = {dim.dim_param: axis.name for number, axis in free.items() if (dim := first.dim[number]).dim_param}
    for each in (*written.input, *written.output, *written.value_info):
        for dim in each.type.tensor_type.shape.dim:
            if dim.dim_param:  # perhaps a formula
                dim.dim_param = re.sub(r"\w+", lambda word: names.get(word[0], word[0]), dim.dim_param)


def session_of(data: bytes, threads: int) -> Any:
    """A session of ONNX Runtime on the CPU."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])


def run(session: Any, inputs: Mapping[str, Tensor]) -> Tensor:
    """(n, outputs) float32 of a session's answers."""
    (found,) = session.run(None, {name: np.ascontiguousarray(each.numpy()) for name, each in inputs.items()})
    return torch.from_numpy(found)


def require_onnx() -> None:
    """ValueError if a package of the extra is missing."""
    from importlib.util import find_spec

    if any(find_spec(name) is None for name in ("onnx", "onnxscript", "onnxruntime")):
        raise ValueError(NEEDS)
