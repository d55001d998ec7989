"""Holds the model of a finished run, and answers batches of images with it.

Images are decoded and resized by the same code and rules as in training. trainer.export writes and loads the model folder.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dataio.codecs.image.decode import Decoded, Decoder
from dataio.config import Colour, Fit
from dataio.foreign import MAX_IMAGE_BYTES, read_regular
from trainer.export.model_folder import load_export
from trainer.models.features import features_of
from trainer.rank.explain import Explainer
from trainer.runs.folder import RunFolder
from trainer.tasks.score_log import calibrated_answers

BATCH = 64


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
        threads: int = 1,
    ) -> None:
        """`explain`: a folder, into which each answer's explanation is drawn. NoPlacesError if the model has none. `threads` decode."""
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
            threads=threads,
            batch_size=BATCH,
        )

    def predict(self, paths: Sequence[str], *, top: int) -> Iterator[Prediction]:
        """One Prediction for each of `paths`, in order, batch by batch."""
        for start in range(0, len(paths), BATCH):
            yield from self._batch(paths[start : start + BATCH], top=top)

    @property
    def knows_novelty(self) -> bool:
        """Whether the model can tell what is unlike anything seen in training (train.novelty)."""
        return self._novelty is not None

    def decode(self, encoded: Sequence[bytes]) -> Decoded:
        """Decode and resize. Not thread-safe, but another thread may call `ask` meanwhile."""
        return self._decoder.decode(list(encoded))

    @torch.inference_mode()
    def ask(self, decoded: Decoded, *, top: int) -> tuple[Sequence[Mapping[str, Any]], Sequence[bool | None]]:
        """The answer for each image, and whether it is unlike anything seen in training. Those of a bad image mean nothing."""
        self.transparent += decoded.transparent
        images = torch.from_numpy(decoded.images).permute(0, 3, 1, 2).to(self._device)  # (n, 3, H, W) uint8 channels_last
        outputs, unlike = self._asked(images)
        return calibrated_answers(self.task, outputs, self._temperatures, top=top), unlike

    def explained(self, reason: str) -> str:
        """The decoder's reason. If only the image's size is wrong, it also names the flag that resizes it."""
        if reason.startswith("wrong size") and self._fit == "refuse":
            height, width = self._size
            return f"{reason}; the model was trained on {width}x{height}: add --fit crop or --fit stretch to have it resized"
        return reason

    def _batch(self, paths: Sequence[str], *, top: int) -> Iterator[Prediction]:
        results: dict[str, Prediction] = {}
        encoded: dict[str, bytes] = {}
        for path in paths:
            try:
                encoded[path] = read_regular(path, MAX_IMAGE_BYTES)
            except OSError as error:
                results[path] = Prediction(image=path, error=f"cannot be read: {error.strerror or error}")
        if encoded:
            decoded = self.decode(list(encoded.values()))
            reasons = dict(decoded.bad)
            answers, unlike = self.ask(decoded, top=top)
            good = [index for index in range(len(encoded)) if index not in reasons]
            names = list(encoded)
            drawn = self._explainer.draw(decoded.images[good], [names[index] for index in good]) if self._explainer else [""] * len(good)
            for index, explanation in zip(good, drawn, strict=True):
                results[names[index]] = Prediction(
                    image=names[index], answer=answers[index], is_unlike=unlike[index], explanation=explanation
                )
            for index, reason in reasons.items():
                results[names[index]] = Prediction(image=names[index], error=self.explained(reason))
        for path in paths:
            yield results[path]

    def _asked(self, images: Tensor) -> tuple[Tensor, Sequence[bool | None]]:
        """The outputs, and of each image whether it is unlike anything seen in training."""
        if self._novelty is None:
            return self._model(self._preprocess(images)), [None] * len(images)
        with features_of(self._model) as features:
            outputs = self._model(self._preprocess(images))
        return outputs, self._novelty.told(self.task, outputs.cpu(), features.taken().cpu()).tolist()
