"""The command line `python -m trainer.predict RUN IMAGE...`: a finished run's predictions for images. Reads `model/` in the run's folder,
or a copy of it anywhere.

Images are decoded and resized by the same code and rules as in training. trainer.export writes and loads the model folder.
"""

from dataio.leaving import Leaving
from dataio.terminal import prepare_output

if __name__ == "__main__":
    leaving = Leaving()
    prepare_output()

import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import tyro
from torch import Tensor

from cluster.text import shown
from dataio.codecs.image.decode import Decoder
from dataio.config import Colour, Fit
from dataio.foreign import MAX_IMAGE_BYTES, read_regular
from dataio.formats import images_below
from trainer.export.model_folder import load_export
from trainer.models.features import features_of
from trainer.rank.explain import Explainer
from trainer.runs.folder import RunFolder
from trainer.runs.model_files import find_model
from trainer.settings.cli import fail
from trainer.settings.programs import program
from trainer.settings.say import complain, say, say_json
from trainer.settings.tree import RunConfig
from trainer.tasks.score_log import calibrated_answers
from trainer.tasks.task import Task

BATCH = 64
LONGEST_PATH = 4096


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Ask the model of a finished run about images."""

    run: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
    """The run's folder (path or URI), or its name under --storage; or its model folder, wherever that was copied to."""
    images: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="IMAGE...")]
    """Image files, or folders of them."""
    top: int = 3
    """Number of classes or labels to show for each image."""
    json: tyro.conf.FlagCreatePairsOff[bool] = False
    """Print one JSON object per image and line instead of text."""
    raw: tyro.conf.FlagCreatePairsOff[bool] = False
    """Probabilities as the network gives them, not calibrated by the temperature that the run fitted. The answers are the same."""
    explain: str = ""
    """Folder, which is made if it is not there, for a picture of each image beside a map of where in it the answer comes from (Grad-CAM; of
    tokens, LayerCAM)."""
    fit: Literal["run", "refuse", "stretch", "crop"] = "run"
    """How to handle images whose size differs from the one the model was trained on. `run` uses the run's own `data.fit`."""
    storage: str = RunConfig().storage
    """Folder or URI that holds the runs' folders."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto uses a GPU if there is one."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Prediction:
    """The model's answer for one image, or the reason why there is none."""

    image: str
    answer: Mapping[str, Any] = field(default_factory=dict)
    """In the task's own format. A classification has `predictions`: classes with their probabilities, the most probable first."""
    error: str = ""
    is_unlike: bool | None = None
    """Whether the image is unlike anything seen in training; None if the model cannot tell (train.novelty)."""
    explanation: str = ""
    """The file that shows where the answer comes from, if that was asked for."""

    def to_json(self) -> dict[str, Any]:
        """A line of `--json`."""
        found: dict[str, Any] = {"image": self.image, **({"error": self.error} if self.error else self.answer)}
        if self.is_unlike is not None:
            found["unlike_training"] = self.is_unlike
        if self.explanation:
            found["explanation"] = self.explanation
        return found


class Predictor:
    """Holds the model of a model folder on its device and predicts batches of image files."""

    def __init__(
        self,
        folder: RunFolder,
        *,
        fit: Fit | None = None,
        device: torch.device | None = None,
        is_calibrated: bool = True,
        explain: str = "",
    ) -> None:
        """`explain`: a folder, into which each answer's explanation is drawn. NoPlacesError if the model has none."""
        self._device = device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
        exported = load_export(folder, self._device)
        self.task = exported.task
        self._model, self._preprocess, self._size = exported.model, exported.preprocess, exported.image_size
        self._temperatures = exported.temperatures if is_calibrated else {}
        self._fit: Fit = fit or exported.fit
        height, width = self._size
        self._novelty = exported.novelty
        self._explainer = Explainer(exported, Path(explain), self._device) if explain else None
        self.background: Colour = exported.background
        self.transparent = 0
        """Images with an alpha channel that were predicted so far."""
        self._decoder = Decoder(
            height=height,
            width=width,
            fit=self._fit,
            background=self.background,
            max_pixels=exported.max_image_pixels,
            batch_size=BATCH,
        )

    def predict(self, paths: Sequence[str], *, top: int) -> Iterator[Prediction]:
        """One Prediction for each of `paths`, in order, batch by batch."""
        for start in range(0, len(paths), BATCH):
            yield from self._batch(paths[start : start + BATCH], top=top)

    @torch.inference_mode()
    def _batch(self, paths: Sequence[str], *, top: int) -> Iterator[Prediction]:
        results: dict[str, Prediction] = {}
        encoded: dict[str, bytes] = {}
        for path in paths:
            try:
                encoded[path] = read_regular(path, MAX_IMAGE_BYTES)
            except OSError as error:
                results[path] = Prediction(image=path, error=f"cannot be read: {error.strerror or error}")
        if encoded:
            decoded = self._decoder.decode(list(encoded.values()))
            reasons = dict(decoded.bad)
            self.transparent += decoded.transparent
            images = torch.from_numpy(decoded.images).permute(0, 3, 1, 2).to(self._device)  # (n, 3, H, W) uint8 channels_last
            outputs, unlike = self._asked(images)
            answers = calibrated_answers(self.task, outputs, self._temperatures, top=top)
            good = [index for index in range(len(encoded)) if index not in reasons]
            names = list(encoded)
            drawn = self._explainer.draw(decoded.images[good], [names[index] for index in good]) if self._explainer else [""] * len(good)
            for index, explanation in zip(good, drawn, strict=True):
                results[names[index]] = Prediction(
                    image=names[index], answer=answers[index], is_unlike=unlike[index], explanation=explanation
                )
            for index, reason in reasons.items():
                results[names[index]] = Prediction(image=names[index], error=self._explained(reason))
        for path in paths:
            yield results[path]

    def _asked(self, images: Tensor) -> tuple[Tensor, Sequence[bool | None]]:
        """The outputs, and of each image whether it is unlike anything seen in training."""
        if self._novelty is None:
            return self._model(self._preprocess(images)), [None] * len(images)
        with features_of(self._model) as features:
            outputs = self._model(self._preprocess(images))
        return outputs, self._novelty.told(self.task, outputs.cpu(), features.taken().cpu()).tolist()

    def _explained(self, reason: str) -> str:
        """The decoder's reason. If only the image's size is wrong, it also names the flag that resizes it."""
        if reason.startswith("wrong size") and self._fit == "refuse":
            height, width = self._size
            return f"{reason}; the model was trained on {width}x{height}: add --fit crop or --fit stretch to have it resized"
        return reason


def main(argv: Sequence[str]) -> int:
    """Return 0 if all images were classified, 1 if some could not be. Exits with 2 (SystemExit) for wrong arguments or an unusable run."""
    arguments = tyro.cli(Arguments, prog=program("predict"), args=argv)
    try:
        if arguments.top < 1:
            raise ValueError(f"--top {arguments.top} shows nothing; use 1 or more")
        paths = list(image_paths(arguments.images))
        folder = find_model(arguments.run, arguments.storage)
        if arguments.device == "cuda" and not torch.cuda.is_available():
            raise ValueError("--device cuda, but PyTorch sees no GPU here; use --device cpu or auto")
        predictor = Predictor(
            folder,
            fit=None if arguments.fit == "run" else arguments.fit,
            device=None if arguments.device == "auto" else torch.device(arguments.device),
            is_calibrated=not arguments.raw,
            explain=arguments.explain,
        )
    except (ValueError, OSError) as error:
        fail(str(error))
    bad = 0
    for prediction in predictor.predict(paths, top=arguments.top):
        bad += bool(prediction.error)
        _show(prediction, predictor.task, as_json=arguments.json)
    if predictor.transparent:
        treated = f"put on {predictor.background}" if predictor.background else "its alpha channel dropped, whatever that shows"
        complain(
            f"{predictor.transparent} of {len(paths)} images with transparency: {treated}, as in this run's training (data.background)"
        )
    if bad:
        complain(f"{bad} of {len(paths)} images could not be classified")
    return 1 if bad else 0


def image_paths(arguments: Sequence[str]) -> Iterator[str]:
    """The image files that the arguments name. A folder stands for all images below it, sorted. ValueError if a folder holds none."""
    if not arguments:
        raise ValueError("no IMAGE given; name image files, or a folder of them")
    for argument in arguments:
        if not os.path.isdir(argument):
            yield argument
            continue
        found = sorted(images_below(argument))
        if not found:
            raise ValueError(f"{argument} holds no image (.jpg, .png, .webp, ...); name another folder, or the files themselves")
        yield from found


def _show(prediction: Prediction, task: Task, *, as_json: bool) -> None:
    if as_json:
        say_json(prediction.to_json())
    elif prediction.error:
        complain(f"{shown(prediction.image, LONGEST_PATH)}: {shown(prediction.error)}")
    else:
        drawn = f"  (why: {shown(prediction.explanation, LONGEST_PATH)})" if prediction.explanation else ""
        strange = "  (unlike anything seen in training)" if prediction.is_unlike else ""
        say(f"{shown(prediction.image, LONGEST_PATH)}: {shown(task.sentence(prediction.answer), LONGEST_PATH)}{strange}{drawn}")


if __name__ == "__main__":
    leaving.by(lambda: main(sys.argv[1:]))
