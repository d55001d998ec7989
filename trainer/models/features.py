"""What a model makes of an image right before its head: the features by which images are like each other. Called by trainer.rank.novelty
and `trainer.predict`."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from trainer.models.vision import head_of


class Features:
    """The features of the newest pass."""

    def __init__(self) -> None:
        self._newest: list[Tensor] = []

    def hook(self, module: nn.Module, arguments: Any) -> None:
        self._newest[:] = [arguments[0]]

    def taken(self) -> Tensor:
        """(n, features) float32, each of length 1."""
        (given,) = self._newest
        self._newest.clear()
        given = given.float()
        if given.ndim == 4:  # a convolution as head: the mean over its places
            given = given.mean((2, 3))
        elif given.ndim == 3:
            given = given.mean(1)
        length = given.square().sum(1, keepdim=True).sqrt()
        return given / length.clamp(min=1e-12)


@contextmanager
def features_of(model: nn.Module) -> Iterator[Features]:
    """Inside the context each pass of `model` leaves its features."""
    features = Features()
    _, head = head_of(model)
    handle = head.register_forward_pre_hook(features.hook)
    try:
        yield features
    finally:
        handle.remove()
