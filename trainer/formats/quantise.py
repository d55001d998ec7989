"""Int8 weights and activations for ONNX Runtime (`--int8`): post-training quantisation, one scale for each output channel of a weight.
Called by trainer.formats.command with a graph that onnx_graph.py made.

Models of images: static, QDQ. Scales of activations come from images of the training split, chosen by their place alone, so the same run
gives the same file; or from a folder that the user names. Models of texts: dynamic, as is usual for encoders. Each scale of activations is
measured as they come, so no texts are needed. What int8 does to the answers is measured on the test set by trainer.formats.check, and
refused past a limit.

Weights have 7 bits of the 8 (`reduce_range`): on processors without VNNI two products of 8 bits overflow the 16 bits that add them, and the
model would answer differently there from here (ONNX Runtime's documentation of quantisation).
"""

import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from dataio.batch import Ids
from dataio.codecs.image.decode import Decoder
from dataio.foreign import MAX_IMAGE_BYTES, read_regular
from dataio.formats import images_below
from trainer.export.model_folder import Exported
from trainer.formats.graph import graph_of
from trainer.formats.made import INPUT, ONNX_FILE, Made
from trainer.formats.onnx_graph import made_of_onnx
from trainer.formats.quiet import quietly
from trainer.formats.traced import first_line

IMAGES = 256
"""To calibrate by. The scales are the extremes seen in them."""
BATCH = 32
_WEIGHTS = "int8, 7 bits used, a scale for each channel"
_LEARNED = ("Conv", "Gemm", "MatMul")
"""Operations with weights. What lies between the input and the first of them is preparation, and stays exact."""


def quantised(made: Made, exported: Exported, images: Sequence[Tensor], *, is_prepared_inside: bool, threads: int) -> Made:
    """`made`, an ONNX graph, in int8. `images`: batches of (n, 3, H, W) uint8 as decoded, to calibrate by. ValueError if ONNX Runtime
    cannot quantise it."""
    import onnx
    from onnxruntime.quantization import CalibrationMethod, QuantFormat, QuantType, quantize_static

    given = [each[INPUT] for each in map(graph_of(exported, is_prepared_inside=is_prepared_inside).given, images)]

    def to_int8(plain: Path, small: Path) -> None:
        quantize_static(
            plain,
            small,
            _Reader(given),
            quant_format=QuantFormat.QDQ,
            per_channel=True,
            reduce_range=True,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
            calibrate_method=CalibrationMethod.MinMax,
            nodes_to_exclude=preparation(onnx.load(plain)),
        )

    how = {
        "weights": _WEIGHTS,
        "activations": "uint8, a scale for each tensor, of the extremes seen",
        "calibrated_by": sum(len(each) for each in images),
    }
    return _small(made, exported, to_int8, how, is_prepared_inside=is_prepared_inside, threads=threads)


def quantised_as_it_goes(made: Made, exported: Exported, *, threads: int) -> Made:
    """`made`, an ONNX graph of a model of texts, in int8, its embeddings too. ValueError if ONNX Runtime cannot quantise it."""
    from onnxruntime.quantization import QuantType, quantize_dynamic

    def to_int8(plain: Path, small: Path) -> None:
        quantize_dynamic(plain, small, per_channel=True, reduce_range=True, weight_type=QuantType.QInt8)

    how = {"weights": _WEIGHTS, "activations": "uint8, a scale for each tensor, measured as it comes"}
    return _small(made, exported, to_int8, how, is_prepared_inside=False, threads=threads)


def _small(
    made: Made,
    exported: Exported,
    to_int8: Callable[[Path, Path], None],
    how: Mapping[str, Any],
    *,
    is_prepared_inside: bool,
    threads: int,
) -> Made:
    """What `to_int8` makes of the graph, from one file to another."""
    from onnxruntime.quantization.shape_inference import quant_pre_process

    with tempfile.TemporaryDirectory(prefix="finetune-int8-") as scratch, torch.inference_mode(), quietly():
        plain, ready, small = (Path(scratch) / name for name in ("plain.onnx", "ready.onnx", "small.onnx"))
        plain.write_bytes(made.files[ONNX_FILE])
        try:
            quant_pre_process(plain, ready, skip_symbolic_shape=True)
            to_int8(ready, small)
        except Exception as error:
            raise ValueError(f"{first_line(error)}: ONNX Runtime cannot quantise this network; export it without --int8") from error
        data = small.read_bytes()
    found = made_of_onnx(data, graph_of(exported, is_prepared_inside=is_prepared_inside), threads=threads)
    return replace(found, about={**made.about, "quantised": dict(how)})


def preparation(graph: Any) -> list[str]:
    """Names of the nodes through which the input goes before the first one with weights."""
    learned = {node.name for node in graph.graph.node if node.op_type in _LEARNED}
    reached = {INPUT}
    found = []
    for node in graph.graph.node:  # ONNX lists them in the order of execution
        if node.name not in learned and reached & set(node.input):
            reached |= set(node.output)
            found.append(node.name)
    return found


class _Reader:
    """ONNX Runtime's CalibrationDataReader: one batch of inputs after the other, then None."""

    def __init__(self, batches: Sequence[Tensor]) -> None:
        self._left = iter(batches)

    def get_next(self) -> dict[str, npt.NDArray[Any]] | None:
        batch = next(self._left, None)
        return None if batch is None else {INPUT: np.ascontiguousarray(batch.numpy())}


def places(count: int, wanted: int) -> Ids:
    """`wanted` places spread evenly over `count`: of a data set that is stored by class, the same share of each."""
    wanted = min(count, wanted)
    return (np.arange(wanted, dtype=np.int64) * count + count // 2) // max(wanted, 1)


def images_of_folder(exported: Exported, folder: str, wanted: int) -> Iterator[Tensor]:
    """Batches of (n, 3, H, W) uint8: images below a folder, spread evenly over those that are there. ValueError if there is none, or if
    one cannot be read."""
    found = sorted(images_below(folder)) if Path(folder).is_dir() else []
    if not found:
        raise ValueError(f"--calibration {folder} is no folder with images (.jpg, .png, .webp, ...); name one, or leave it out")
    height, width = exported.image_size
    decoder = Decoder(
        height=height,
        width=width,
        fit="stretch" if exported.fit == "refuse" else exported.fit,
        background=exported.background,
        max_pixels=exported.max_image_pixels,
        batch_size=BATCH,
    )
    chosen = [found[place] for place in places(len(found), wanted)]
    for start in range(0, len(chosen), BATCH):
        paths = chosen[start : start + BATCH]
        decoded = decoder.decode([read_regular(path, MAX_IMAGE_BYTES) for path in paths])
        if decoded.bad:
            index, reason = dict(decoded.bad).popitem()
            raise ValueError(f"--calibration {folder}: {paths[index]} cannot be read ({reason}); remove it")
        yield torch.from_numpy(decoded.images).permute(0, 3, 1, 2)
