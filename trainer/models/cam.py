"""Where in an image a model's answer comes from: class activation maps for any network that keeps places. Called by trainer.rank.explain
and trainer.predict; the caller says what is explained (trainer.tasks.explained) and draws the maps (trainer.report.overlay).

The layer is found by running the model with hooks, not by names: the last output whose positions are places of the image, and on whose
places the answer depends. In a CNN that is the last map before pooling; in a ViT that answers by a class token, the tokens before the last
attention, since those after it no longer reach the answer.

On maps it is Grad-CAM (Selvaraju et al. 2017, equation 2): channels weighted by the mean of their gradient, summed, and cut at 0. On
tokens, whose gradient differs from place to place, it is LayerCAM (Jiang et al. 2021, equation 4): each activation is weighted by its own
gradient where that is positive.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

MOST_PREFIX = 16
"""Tokens that are no places: of a class, of registers."""
_MOST_SIDE = 64
"""Larger maps are those of the first layers, which say little of what is seen."""

Score = Callable[[Tensor], Tensor]
"""(n, outputs) -> (n,): what is to be explained, the higher the surer."""
Layout = Literal["NCHW", "NHWC", "tokens"]


class NoPlacesError(ValueError):
    """No layer of the model keeps places of the image, so its answers cannot be explained by a map."""

    failure_kind = "user"


@dataclass(frozen=True, kw_only=True, slots=True)
class Layer:
    """The output that is looked at."""

    module: str
    """Its qualified name in the model."""
    call: int
    """Which of the module's calls in one pass, from 0: some share a module."""
    layout: Layout
    grid: tuple[int, int]
    """(rows, columns) of places."""

    @property
    def method(self) -> str:
        return "LayerCAM" if self.layout == "tokens" else "Grad-CAM"

    def places(self, output: Tensor) -> Tensor:
        """(n, rows, columns, channels)."""
        rows, columns = self.grid
        match self.layout:
            case "NCHW":
                return output.permute(0, 2, 3, 1)
            case "NHWC":
                return output
            case "tokens":
                patches = output[:, output.shape[1] - rows * columns :]
                return patches.reshape(len(patches), rows, columns, -1)


@torch.inference_mode(False)
def find_layer(model: nn.Module, images: Tensor, score: Score) -> Layer:
    """The layer to look at, found with `images`: one or more, (n, 3, H, W), as the model takes them; `model` in eval mode. NoPlacesError if
    there is none."""
    two = images[:1].repeat(2, 1, 1, 1)  # so that the first dimension of an output shows whether it is one of images
    seen: list[tuple[str, int, Tensor]] = []
    calls: dict[str, int] = {}

    def remember(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, arguments: Any, output: Any) -> None:
            call = calls[name] = calls.get(name, -1) + 1
            if isinstance(output, Tensor) and output.requires_grad and output.ndim in (3, 4) and len(output) == 2:
                seen.append((name, call, output))

        return hook

    with _hooked([(module, remember(name)) for name, module in model.named_modules() if name]):
        total = _scored(model, two, score)
    hw = (two.shape[2], two.shape[3])
    layers = list(_layers(seen, hw))
    # Of tokens only the stream that the model passes on counts, and not what an attention makes of it for itself.
    width = next((output.shape[2] for layer, output in reversed(layers) if layer.layout == "tokens"), 0)
    layers = [(layer, output) for layer, output in layers if layer.layout != "tokens" or output.shape[2] == width]
    if layers:
        gradients = torch.autograd.grad(total, [output for _, output in layers], allow_unused=True)
        for (layer, _), gradient in zip(reversed(layers), reversed(gradients), strict=True):
            if gradient is not None and _reaches(layer.places(gradient)):
                return layer
    raise NoPlacesError(
        f"{type(model).__name__} has no layer whose positions are places of the image and that its answer depends on, so there is nothing "
        "to show; explanations need a CNN or a transformer on patches"
    )


@torch.inference_mode(False)
def explained(model: nn.Module, images: Tensor, score: Score, layer: Layer) -> Tensor:
    """Maps of (n, 3, H, W) images, (n, rows, columns) float32 from 0 to 1; all 0 where nothing speaks for the answer. `model` in eval mode.
    An image's map does not depend on the others but for the last bits."""
    found: list[Tensor] = []
    calls = 0

    def hook(module: nn.Module, arguments: Any, output: Tensor) -> None:
        nonlocal calls
        if calls == layer.call:
            found.append(output)
        calls += 1

    with _hooked([(model.get_submodule(layer.module), hook)]):
        total = _scored(model, images, score)
    (gradient,) = torch.autograd.grad(total, found)
    with torch.no_grad():
        activations, slopes = layer.places(found[0]).float(), layer.places(gradient).float()  # (n, rows, columns, channels)
        weights = slopes.clamp(min=0) if layer.layout == "tokens" else slopes.mean((1, 2), keepdim=True)
        maps = (weights * activations).sum(3).clamp(min=0)
        return maps / maps.amax((1, 2), keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)


def _scored(model: nn.Module, images: Tensor, score: Score) -> Tensor:
    """The sum of the scores, with a graph from the images on: the parameters may be frozen."""
    assert not model.training, "statistics of a batch would mix its images"
    with torch.enable_grad():
        return score(model(images.detach().clone().requires_grad_())).sum()


def _layers(seen: list[tuple[str, int, Tensor]], hw: tuple[int, int]) -> Iterator[tuple[Layer, Tensor]]:
    """Those outputs that are laid out as an image is, in the order in which they were done with. An output that several modules return,
    each changing it in place, is what the last of them made of it."""
    grids: list[tuple[int, int]] = []
    last = {id(output): index for index, (_, _, output) in enumerate(seen)}
    for index, (name, call, output) in enumerate(seen):
        if last[id(output)] != index:
            continue
        if output.ndim == 4:
            _, one, two, three = output.shape
            options: list[tuple[Layout, tuple[int, int]]] = [("NCHW", (two, three)), ("NHWC", (one, two))]
            for layout, grid in options:
                if _is_like(grid, hw):
                    grids.append(grid)
                    yield Layer(module=name, call=call, layout=layout, grid=grid), output
                    break
        elif tokens := _token_grid(output.shape[1], grids, hw):
            yield Layer(module=name, call=call, layout="tokens", grid=tokens), output


def _is_like(grid: tuple[int, int], hw: tuple[int, int]) -> bool:
    """Whether a map of this size may be one of an image of `hw`: more than a point, and of its shape but for rounding."""
    rows, columns = grid
    return 1 < max(grid) <= _MOST_SIDE and rows <= hw[0] and columns <= hw[1] and abs(rows * hw[1] - columns * hw[0]) <= max(hw)


def _token_grid(count: int, grids: list[tuple[int, int]], hw: tuple[int, int]) -> tuple[int, int] | None:
    """The grid of patches behind `count` tokens: one that an earlier map had, or a square."""
    for rows, columns in reversed(grids):
        if 0 <= count - rows * columns <= MOST_PREFIX:
            return rows, columns
    for prefix in range(MOST_PREFIX + 1):
        side = round(max(0, count - prefix) ** 0.5)
        if side * side == count - prefix and _is_like((side, side), hw):
            return side, side
    return None


def _reaches(gradient: Tensor) -> bool:
    """Whether the answer depends on at least half of the places."""
    return bool((gradient != 0).any(3).float().mean() >= 0.5)


@contextmanager
def _hooked(hooks: list[tuple[nn.Module, Callable[..., None]]]) -> Iterator[None]:
    handles = [module.register_forward_hook(hook) for module, hook in hooks]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
