"""Small exports for the tests of deploy/serve: one that `finetune export` wrote, and one made by hand in no time."""

import hashlib
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from tests.trainer.small_run import train
from tests.trainer.test_evaluate import BASE
from trainer.formats.__main__ import main
from trainer.settings.tree import ModelConfig

CLASSES = ("ant", "bee", "cat", "dog", "eel", "fox", "gnu", "hen", "ibis", "jay")


def export(folder: Path, *flags: str, run: str = "plain", image_size: int = 0) -> Path:
    """An ONNX export, in a folder of its own for these flags, of a run of some steps on the sample's images in `folder`/runs/`run`."""
    out = folder / "-".join(["out", run, *flags])
    before = torch.get_num_threads()
    try:
        if not (folder / "runs" / run).exists():
            network = ModelConfig(
                name="timm/test_efficientnet", weights="none", stem="native", image_size=image_size, interpolation="bicubic"
            )
            train(folder / "runs", replace(BASE, run=run, model=network, train=replace(BASE.train, precision="fp32")), 5)
        if not out.exists():
            assert main([str(folder / "runs" / run), *flags, "--out", str(out)]) == 0
    finally:
        torch.set_num_threads(before)
    return out / "onnx"


def by_hand(folder: Path) -> Path:
    """What an export of ten classes looks like. The network: each channel's mean, and a linear layer."""
    from onnx import TensorProto, helper, numpy_helper

    draw = np.random.default_rng(0)
    weight, bias = draw.standard_normal((3, 10), np.float32), draw.standard_normal(10, np.float32)
    graph = helper.make_graph(
        [
            helper.make_node("GlobalAveragePool", ["images"], ["means"]),
            helper.make_node("Flatten", ["means"], ["rows"]),
            helper.make_node("Gemm", ["rows", "weight", "bias"], ["outputs"]),
        ],
        "by hand",
        [helper.make_tensor_value_info("images", TensorProto.FLOAT, ["batch", 3, 28, 28])],
        [helper.make_tensor_value_info("outputs", TensorProto.FLOAT, ["batch", 10])],
        [numpy_helper.from_array(weight, "weight"), numpy_helper.from_array(bias, "bias")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10).SerializeToString()
    folder.mkdir(parents=True)
    (folder / "model.onnx").write_bytes(model)
    manifest = {
        "manifest_version": 1,
        "format": "onnx",
        "file": "model.onnx",
        "files": {"model.onnx": {"sha256": hashlib.sha256(model).hexdigest(), "bytes": len(model)}},
        "of": {"run": "by hand", "model_sha256": "0" * 64},
        "input": {
            "name": "images",
            "shape": ["batch", 3, 28, 28],
            "type": "float32",
            "prepared": "by the caller",
            "decoded_to": [28, 28],
            "colours": "RGB",
            "fit": "crop",
            "mean": [0.5, 0.5, 0.5],
            "std": [0.25, 0.25, 0.25],
            "formula": "(pixel / 255 - mean) / std",
        },
        "output": {"name": "outputs", "shape": ["batch", 10], "type": "float32", "meaning": "before softmax or sigmoid"},
        "classes": list(CLASSES),
        "targets": [{"name": "label", "kind": "label", "classes": list(CLASSES), "outputs": [0, 10]}],
        "temperatures": {"label": 1.5},
    }
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder
