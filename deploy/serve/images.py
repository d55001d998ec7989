"""Prepares images for an export's graph: the run's own decoder, and what the graph leaves to the caller. Called by `predictor`."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from dataio.codecs.image.decode import Decoder
from dataio.config import DataConfig
from deploy.serve.questions import Inputs, Prepared, Question
from deploy.serve.settings import ServeConfig
from trainer.models.vision import Preprocess


class Images:
    """Not thread-safe."""

    def __init__(self, takes: Mapping[str, Any], config: ServeConfig) -> None:
        """`takes`: the manifest's description of the input."""
        self._name = takes["name"]
        self._height, self._width = takes["decoded_to"]
        self._decoder = Decoder(
            height=self._height,
            width=self._width,
            fit=takes["fit"],
            background=takes.get("background", ""),
            threads=config.threads,
            max_pixels=config.max_image_pixels or takes.get("max_image_pixels", DataConfig().max_image_pixels),
            batch_size=config.max_batch,
        )
        self._preprocess = (
            None
            if takes["prepared"] == "in the graph"
            else Preprocess(
                mean=takes["mean"],
                std=takes["std"],
                image_size=takes.get("resized_to", (0,))[0],
                interpolation=takes.get("resized_by", "bilinear"),
                channels_last=True,
            )
        )

    def first(self) -> Inputs:
        self._decoder.warm_up()
        return self.inputs(np.zeros((1, self._height, self._width, 3), np.uint8))

    def prepared(self, questions: Sequence[Question]) -> Prepared:
        decoded = self._decoder.decode([question.body for question in questions])
        reasons = dict(decoded.bad)
        good = [index for index in range(len(questions)) if index not in reasons]
        return Prepared(inputs=self.inputs(decoded.images[good]) if good else {}, bad=reasons)

    def inputs(self, images: npt.NDArray[np.uint8]) -> Inputs:
        """Of decoded images, (n, H, W, 3) uint8."""
        pixels = torch.from_numpy(images).permute(0, 3, 1, 2)  # (n, 3, H, W) uint8 channels_last, as `predict` has it
        with torch.inference_mode():
            given = pixels if self._preprocess is None else self._preprocess(pixels)
        return {self._name: np.ascontiguousarray(given.numpy())}
