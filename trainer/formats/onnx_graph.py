"""The model as an ONNX graph, for ONNX Runtime and whatever else reads ONNX (extra `onnx`). trainer.formats.command calls it.

torch.export traces the network and its exporter writes the graph, with a free batch dimension. ONNX Runtime then opens the bytes that are
to be written, on a CPU, and it is that session which is checked.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from trainer.export.model_folder import Exported
from trainer.formats.made import BATCH, INPUT, MOST_IN_A_BATCH, OUTPUT, Made, graph_of, takes_of
from trainer.formats.quiet import quietly

ONNX_FILE = "model.onnx"
OPSET = 20
LARGEST_BYTES = 2_000_000_000
"""Of a model in one file: protobuf, in which ONNX is written, ends at 2 GiB."""
NEEDS = 'ONNX needs the packages onnx, onnxscript and onnxruntime; install the extra: pip install "ray-finetune[onnx]"'


def make_onnx(exported: Exported, *, is_prepared_inside: bool, threads: int) -> Made:
    """ValueError if the network cannot be written as ONNX."""
    require_onnx()
    graph, example = graph_of(exported, is_prepared_inside=is_prepared_inside)
    batch = torch.export.Dim(BATCH, min=1, max=MOST_IN_A_BATCH)
    (name,) = parameter_names(graph)
    try:
        with quietly(), torch.inference_mode():
            program = torch.onnx.export(
                graph,
                (example,),
                dynamo=True,
                dynamic_shapes={name: {0: batch}},
                input_names=[INPUT],
                output_names=[OUTPUT],
                opset_version=OPSET,
                verbose=False,
            )
        assert program is not None
        data = program.model_proto.SerializeToString()
    except Exception as error:
        raise ValueError(
            f"{first_line(error)}: the network cannot be written as ONNX; export it for PyTorch (--to torch), or its weights "
            "(--to safetensors)"
        ) from error
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


def parameter_names(graph: torch.nn.Module) -> Sequence[str]:
    """The names of what `forward` takes, which torch.export wants for its dynamic shapes. ValueError for more than one."""
    import inspect

    names = [
        name
        for name, parameter in inspect.signature(graph.forward).parameters.items()
        if parameter.default is inspect.Parameter.empty and parameter.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD
    ]
    if len(names) != 1:
        raise ValueError(f"the network's forward takes {', '.join(names) or 'nothing'}; only one of a single input can be exported")
    return names


def require_onnx() -> None:
    """ValueError if a package of the extra is missing."""
    from importlib.util import find_spec

    if any(find_spec(name) is None for name in ("onnx", "onnxscript", "onnxruntime")):
        raise ValueError(NEEDS)


def first_line(error: Exception) -> str:
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0][:300]}" if text else type(error).__name__
