"""Answers images with an export's graph, as `finetune predict` does with the run's model: the same decoder, the same preparation, the same
task's answers. Called by `app`, in each replica of `model`, from one thread. It knows no Ray and no HTTP.
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from dataio.codecs.image.decode import Decoder
from dataio.config import DataConfig
from deploy.serve.exports import Export, read_model
from deploy.serve.settings import ServeConfig
from trainer.models.vision import Preprocess
from trainer.settings.tree import TaskConfig
from trainer.tasks.calibration import Temperature
from trainer.tasks.make import make_task
from trainer.tasks.score_log import calibrated_answers

NOT_FINITE = "not finite: the model gives no numbers for this image"
NEEDS = "serving needs onnxruntime and Ray Serve: pip install -c constraints.txt -e '.[serve]'"


@dataclass(frozen=True, kw_only=True, slots=True)
class Question:
    """What `front` asks a replica."""

    image: bytes = field(repr=False)
    """As the client has sent it."""
    top: int
    """How many of the most probable classes to name."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Answer:
    """What a replica answers."""

    said: Mapping[str, Any] = field(default_factory=dict)
    """JSON, in the format of `finetune predict --json`, with each class's index. Empty if the image was refused."""
    refusal: str = ""
    """Why there is no answer: `kind: detail`, of dataio.codecs.image.sniff.KINDS, or NOT_FINITE."""
    batch_images: int = 0
    """Images of the batch that it was part of, in its first answer; 0 in the others, so that each batch counts once."""
    batch_seconds: float = 0.0
    """Time that this batch took, decoding included; as above."""


class Predictor:
    """An opened export. Not thread-safe."""

    def __init__(self, export: Export, config: ServeConfig) -> None:
        """ValueError if the model's file is missing, is not the manifest's, or is no graph."""
        self._input = export.manifest["input"]
        threshold = config.threshold if config.threshold is not None else export.manifest.get("threshold", TaskConfig().threshold)
        self._task = make_task(TaskConfig(threshold=threshold), export.targets)
        self._classes = {target.name: {name: index for index, name in enumerate(target.classes)} for target in export.targets}
        self._temperatures = {name: Temperature(value=value, split="", count=0) for name, value in export.manifest["temperatures"].items()}
        height, width = self._input["decoded_to"]
        torch.set_num_threads(config.threads)
        self._decoder = Decoder(
            height=height,
            width=width,
            fit=self._input["fit"],
            background=self._input.get("background", ""),
            threads=config.threads,
            max_pixels=config.max_image_pixels or self._input.get("max_image_pixels", DataConfig().max_image_pixels),
            batch_size=config.max_batch,
        )
        self._preprocess = (
            None
            if self._input["prepared"] == "in the graph"
            else Preprocess(
                mean=self._input["mean"],
                std=self._input["std"],
                image_size=self._input.get("resized_to", (0,))[0],
                interpolation=self._input.get("resized_by", "bilinear"),
                channels_last=True,
            )
        )
        self._session = session_of(read_model(export), config.threads)
        outputs = self.outputs(np.zeros((1, height, width, 3), np.uint8))  # also the first run, which is slower than all others
        if outputs.shape != (1, self._task.outputs):
            raise ValueError(f"{export.folder}: the graph gives {outputs.shape[1:]} outputs, the manifest says {self._task.outputs}")
        self._decoder.warm_up()

    def outputs(self, images: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
        """(n, H, W, 3) uint8 decoded images -> (n, outputs) float32."""
        pixels = torch.from_numpy(images).permute(0, 3, 1, 2)  # (n, 3, H, W) uint8 channels_last, as `predict` has it
        with torch.inference_mode():
            given = pixels if self._preprocess is None else self._preprocess(pixels)
        (found,) = self._session.run(None, {self._input["name"]: np.ascontiguousarray(given.numpy())})
        answers: npt.NDArray[np.float32] = found
        return answers

    def answers(self, questions: Sequence[Question]) -> list[Answer]:
        """An answer for each question, in order. An image that is refused does not touch the others."""
        began = time.perf_counter()
        decoded = self._decoder.decode([question.image for question in questions])
        reasons = dict(decoded.bad)
        good = [index for index in range(len(questions)) if index not in reasons]
        said: dict[int, Mapping[str, Any]] = {}
        if good:
            outputs = self.outputs(decoded.images[good])
            for index, row in zip(good, outputs, strict=True):
                if np.isfinite(row).all():
                    said[index] = self._said(row, questions[index].top)
                else:
                    reasons[index] = NOT_FINITE
        seconds = time.perf_counter() - began
        return [
            Answer(
                said=said.get(index, {}),
                refusal=reasons.get(index, ""),
                batch_images=0 if index else len(questions),
                batch_seconds=0.0 if index else seconds,
            )
            for index in range(len(questions))
        ]

    def _said(self, row: npt.NDArray[np.float32], top: int) -> dict[str, Any]:
        """(outputs,) float32 -> the answer."""
        (answer,) = calibrated_answers(self._task, torch.from_numpy(row[None]), self._temperatures, top=top)
        if "heads" in answer:
            return {"heads": {name: self._with_index(name, each) for name, each in answer["heads"].items()}}
        return self._with_index(self._task.targets[0].name, answer)

    def _with_index(self, target: str, answer: Mapping[str, Any]) -> dict[str, Any]:
        """`predictions` of one label with each class's index among the outputs, the first of them also by itself."""
        if "predictions" not in answer:
            return dict(answer)
        found = [
            {"class": each["class"], "index": self._classes[target][each["class"]], "probability": each["probability"]}
            for each in answer["predictions"]
        ]
        best = found[0]
        return {"label": best["class"], "index": best["index"], "probability": best["probability"], "predictions": found}


def session_of(model: bytes, threads: int) -> Any:
    """A session of ONNX Runtime on the CPU. ValueError for what is no graph that it can run."""
    try:
        import onnxruntime
    except ImportError as error:
        raise ValueError(NEEDS) from error

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    options.log_severity_level = 3
    # Its threads would go on spinning after each batch, on the CPUs that decode the next one.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    try:
        return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # of kinds that onnxruntime does not name
        raise ValueError(f"ONNX Runtime cannot open the model ({str(error).strip()[:300]}); export the run again") from error
