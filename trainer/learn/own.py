"""A loss and an augmentation of the user's own, in the place of the built-in ones. trainer.learn.build puts them into the step, and the
model check tries both before a run starts (trainer.drive.check).

`optim.loss`: `loss(logits, labels)` with logits (n, classes) float32 and labels (n,) int64 gives each sample's loss, (n,). It may be
compiled with the step. `data.augment`: `transform(images, generator)` with images (n, 3, H, W) uint8 on the device gives images of the
same shape and type; whatever it draws it draws from the generator, so that it is a function of (seed, step, virtual rank).
"""

import hashlib
from collections.abc import Callable

import torch
from torch import Tensor

from dataio.batch import Targets
from dataio.loader import BAD
from trainer.models.own import OwnCodeError, called, own_function
from trainer.tasks.info import CLASSIFICATION
from trainer.tasks.task import Task

SummedLoss = Callable[[Tensor, Targets], Tensor]
Augment = Callable[[Tensor, int, int], Tensor]
"""(images, step, virtual rank) -> images."""
_TRIED = 3  # samples


def own_loss(name: str, task: Task) -> SummedLoss | None:
    """The loss that `optim.loss` names, summed over the samples whose label is known; None for "". ValueError for another task."""
    if not name:
        return None
    if task.info.name != CLASSIFICATION.name:
        raise ValueError(
            f"optim.loss={name} takes logits and labels of a classification, but the task is {task.info.name}; leave it out, or write a "
            "task of your own (docs/extending.md)"
        )
    function, target = own_function("optim.loss", name), task.targets[0].name

    def loss_sum(outputs: Tensor, targets: Targets) -> Tensor:
        labels = targets[target]
        each = function(outputs, labels.clamp(min=0))  # a label that is not known counts 0, whatever it would have cost
        if not isinstance(each, Tensor) or each.shape != labels.shape:
            raise OwnCodeError(f"optim.loss={name} is to return one loss for each sample, of shape {tuple(labels.shape)}; {_got(each)}")
        return torch.where(labels != BAD, each.float(), 0.0).sum()

    return loss_sum


def own_augment(name: str, seed: int) -> Augment | None:
    """The augmentation that `data.augment` names; None for ""."""
    if not name:
        return None
    function = own_function("data.augment", name)

    def augment(images: Tensor, step: int, virtual_rank: int) -> Tensor:
        generator = torch.Generator(images.device).manual_seed(_seed(seed, step, virtual_rank))
        result = called("data.augment", name, function, images, generator)
        if not isinstance(result, Tensor) or (result.shape, result.dtype, result.device) != (images.shape, images.dtype, images.device):
            raise OwnCodeError(
                f"data.augment={name} is to return images of the shape {tuple(images.shape)} and the type {images.dtype} that it got, on "
                f"their device; {_got(result)}"
            )
        return result

    return augment


def try_own(task: Task, *, loss: str, augment: str, outputs: int, image_hw: tuple[int, int]) -> None:
    """Call both once on blank images. OwnCodeError or ValueError for what would have failed in the first step."""
    images = torch.zeros(_TRIED, 3, *image_hw, dtype=torch.uint8).contiguous(memory_format=torch.channels_last)
    if (transform := own_augment(augment, seed=0)) is not None:
        transform(images, 0, 0)
    if (loss_sum := own_loss(loss, task)) is not None:
        logits = torch.zeros(_TRIED, outputs, requires_grad=True)
        value = called("optim.loss", loss, loss_sum, logits, task.blank(_TRIED, torch.device("cpu")))
        if not value.requires_grad:
            raise OwnCodeError(f"optim.loss={loss} returns a loss that does not depend on the logits, so nothing would be learnt")


def _got(value: object) -> str:
    return (
        f"it returned a tensor {tuple(value.shape)} of {value.dtype}"
        if isinstance(value, Tensor)
        else f"it returned {type(value).__name__}"
    )


def _seed(seed: int, step: int, virtual_rank: int) -> int:
    digest = hashlib.blake2b(f"{seed}/augment/{step}/{virtual_rank}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1
