"""Answers images or texts with an export's graph, as `finetune predict` does with the run's model: the same preparation, the same task's
answers. Called by `app`, in each replica of `model`, from one thread. It knows no Ray and no HTTP. `images` and `texts` prepare what was
sent.
"""

import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from deploy.serve.exports import Export, read_model
from deploy.serve.images import Images
from deploy.serve.questions import NOT_FINITE, Answer, Inputs, Preparation, Question
from deploy.serve.settings import ServeConfig
from trainer.settings.tree import TaskConfig
from trainer.tasks.calibration import Temperature
from trainer.tasks.make import make_task
from trainer.tasks.score_log import calibrated_answers

NEEDS = "serving needs onnxruntime and Ray Serve: pip install -c constraints.txt -e '.[serve]'"


class Predictor:
    """An opened export. Not thread-safe."""

    def __init__(self, export: Export, config: ServeConfig) -> None:
        """ValueError if the model's file is missing, is not the manifest's, or is no graph."""
        threshold = config.threshold if config.threshold is not None else export.manifest.get("threshold", TaskConfig().threshold)
        self._task = make_task(TaskConfig(threshold=threshold), export.targets)
        self._classes = {target.name: {name: index for index, name in enumerate(target.classes)} for target in export.targets}
        self._temperatures = {name: Temperature(value=value, split="", count=0) for name, value in export.manifest["temperatures"].items()}
        torch.set_num_threads(config.threads)
        self.preparation = preparation_of(export, config)
        self._session = session_of(read_model(export), config.threads)
        outputs = self.outputs(self.preparation.first())  # also the first run, which is slower than all others
        if outputs.shape != (1, self._task.outputs):
            raise ValueError(f"{export.folder}: the graph gives {outputs.shape[1:]} outputs, the manifest says {self._task.outputs}")

    def outputs(self, inputs: Inputs) -> npt.NDArray[np.float32]:
        """(n, outputs) float32."""
        (found,) = self._session.run(None, dict(inputs))
        answers: npt.NDArray[np.float32] = found
        return answers

    def answers(self, questions: Sequence[Question]) -> list[Answer]:
        """An answer for each question, in order. One that is refused does not touch the others."""
        began = time.perf_counter()
        prepared = self.preparation.prepared(questions)
        reasons = dict(prepared.bad)
        good = [index for index in range(len(questions)) if index not in reasons]
        said: dict[int, Mapping[str, Any]] = {}
        if good:
            for index, row in zip(good, self.outputs(prepared.inputs), strict=True):
                if np.isfinite(row).all():
                    said[index] = self._said(row, questions[index].top) | ({"cut": True} if index in prepared.cut else {})
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


def preparation_of(export: Export, config: ServeConfig) -> Preparation:
    """Of images or of texts. ValueError if a file that it needs is not the manifest's."""
    if export.takes_texts:
        from deploy.serve.texts import Texts  # here: it imports tokenizers

        return Texts(export)
    return Images(export.manifest["input"], config)


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
