"""The model as an ONNX graph, for ONNX Runtime and whatever else reads ONNX (extra `onnx`). trainer.formats.command calls it.

torch.export traces the network and its exporter writes the graph, with a free batch dimension. ONNX Runtime then opens the bytes that are
to be written, on a CPU, and it is that session which is checked.
"""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from trainer.export.model_folder import Exported
from trainer.formats.made import INPUT, OUTPUT, Made, graph_of, takes_of
from trainer.formats.quiet import quietly
from trainer.formats.traced import first_line, traced

ONNX_FILE = "model.onnx"
OPSET = 20
LARGEST_BYTES = 2_000_000_000
"""Of a model in one file: protobuf, in which ONNX is written, ends at 2 GiB."""
NEEDS = "ONNX needs three packages: pip install onnx onnxruntime onnxscript (extra `onnx`); --to torch and --to safetensors need none"


def make_onnx(exported: Exported, *, is_prepared_inside: bool, threads: int) -> Made:
    """ValueError if the network cannot be written as ONNX."""
    require_onnx()
    graph, example = graph_of(exported, is_prepared_inside=is_prepared_inside)
    program = traced(graph, example)
    try:
        with quietly():
            written = torch.onnx.export(program, input_names=[INPUT], output_names=[OUTPUT], opset_version=OPSET, verbose=False)
        assert written is not None
        proto = written.model_proto
        data = proto.SerializeToString()
    except Exception as error:  # of many kinds, which the exporter does not name
        raise ValueError(
            f"the network cannot be written as ONNX ({first_line(error)}); export it for PyTorch (--to torch), or its weights "
            "(--to safetensors)"
        ) from error
    if not proto.graph.input[0].type.tensor_type.shape.dim[0].dim_param:
        raise ValueError("the ONNX graph takes batches of one size alone; export the network for PyTorch: --to torch")
    if len(data) > LARGEST_BYTES:
        raise ValueError(f"the model takes {len(data):,} bytes, and one ONNX file holds at most {LARGEST_BYTES:,}; use --to torch")
    return made_of_onnx(data, exported, example=example, is_prepared_inside=is_prepared_inside, threads=threads)


def made_of_onnx(data: bytes, exported: Exported, *, example: Tensor, is_prepared_inside: bool, threads: int) -> Made:
    session = session_of(data, threads)

    def ask(images: Tensor) -> Tensor:
        given = images if is_prepared_inside else exported.preprocess(images)
        return run(session, given)

    return Made(
        format="onnx",
        files={ONNX_FILE: data},
        main=ONNX_FILE,
        takes=takes_of(exported, example, is_prepared_inside=is_prepared_inside),
        ask=ask,
        code=(
            "import onnxruntime",
            "",
            f'session = onnxruntime.InferenceSession("{ONNX_FILE}")',
            f'(outputs,) = session.run(None, {{"{INPUT}": images}})  # images: a numpy array as described above',
        ),
        about={"opset": OPSET},
    )


def session_of(data: bytes, threads: int) -> Any:
    """A session of ONNX Runtime on the CPU."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])


def run(session: Any, images: Tensor) -> Tensor:
    """(n, outputs) float32 of a session's answers."""
    (found,) = session.run(None, {INPUT: np.ascontiguousarray(images.numpy())})
    return torch.from_numpy(found)


def require_onnx() -> None:
    """ValueError if a package of the extra is missing."""
    from importlib.util import find_spec

    if any(find_spec(name) is None for name in ("onnx", "onnxscript", "onnxruntime")):
        raise ValueError(NEEDS)
