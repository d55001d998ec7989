"""Operations that interpolate, on the device: the random resized crop, rotation, shear and translation. Each takes a batch of uint8 images
with a draw for each and is called once for all of them. Called by views; draws.py draws.

They round to uint8 as torchvision does. Interpolation is bilinear, with antialiasing where a crop is shrunk, and zeros (black) come in from
outside, as with torchvision's own transforms on tensors. Sums of products differ between devices and libraries in their last bit, which
moves a pixel by one level where it lies half-way between two.
"""

import math

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from dataio.codecs.device import upload
from trainer.learn.augment.draws import Boxes, Floats, Ints
from trainer.learn.augment.tables import Op


def resized_crops(images: Tensor, boxes: Boxes, size: tuple[int, int]) -> Tensor:
    """Each image's box, resized to `size`: (n, 3, H, W) uint8 -> (n, 3, *size) uint8, both channels_last.

    On a CPU by PyTorch's own resize of uint8, image by image: 25 us at 32 pixels and 200 at 224, where products for all images at once take
    70 and 4,500. On a GPU it is the other way round: there is no such resize, and calls cost more than zeros.
    """
    if images.device.type != "cpu":
        return crops_by_products(images, boxes, size)
    done = torch.empty((len(images), 3, *size), dtype=torch.uint8, memory_format=torch.channels_last)
    places = zip(boxes.top.tolist(), boxes.left.tolist(), boxes.height.tolist(), boxes.width.tolist(), strict=True)
    for number, (top, left, height, width) in enumerate(places):
        box = images[number : number + 1, :, top : top + height, left : left + width]
        done[number : number + 1] = F.interpolate(box, size=size, mode="bilinear", antialias=True)
    return done


def crops_by_products(images: Tensor, boxes: Boxes, size: tuple[int, int]) -> Tensor:
    """The same for all images at once. A resize of a row is a product with a matrix, of which each row holds the few weights of one pixel.
    All boxes have matrices of one shape, so that two batched products resize all images, whatever the boxes."""
    n, _, height, width = images.shape
    rows, columns = size
    where = upload(np.stack([boxes.top, boxes.height, boxes.left, boxes.width]).astype(np.float32), images.device)  # (4, n)
    down = _weights(where[0], where[1], source=height, target=rows)  # (n, rows, height)
    across = _weights(where[2], where[3], source=width, target=columns)  # (n, columns, width)
    lines = images.permute(0, 2, 3, 1).reshape(n, height, width * 3).float()
    shrunk = torch.bmm(down, lines).view(n, rows, width, 3)
    turned = shrunk.permute(0, 2, 1, 3).reshape(n, width, rows * 3)
    crops = torch.bmm(across, turned).view(n, columns, rows, 3).permute(0, 3, 2, 1)
    return crops.round_().clamp_(0, 255).to(torch.uint8, memory_format=torch.channels_last)


def _weights(first: Tensor, length: Tensor, *, source: int, target: int) -> Tensor:
    """(n, target, source): the weight of each source pixel in each target pixel, for n segments [first, first + length) that become
    `target` pixels. PyTorch's antialiased bilinear weights: a triangle as wide as a target pixel, at least as a source pixel, cut off at
    the ends."""
    scale = (length / target)[:, None]  # (n, 1)
    centres = first[:, None] + scale * (torch.arange(target, device=first.device) + 0.5)  # (n, target)
    pixels = torch.arange(source, device=first.device)
    distances = (pixels + 0.5 - centres[:, :, None]).abs_()  # (n, target, source)
    weights = (1 - distances / scale.clamp(min=1.0)[:, :, None]).clamp_(min=0)
    inside = (pixels >= first[:, None]) & (pixels < (first + length)[:, None])  # (n, source)
    weights *= inside[:, None, :]
    return weights / weights.sum(2, keepdim=True)


def affine_matrices(ops: Ints, magnitudes: Floats, size: tuple[int, int]) -> npt.NDArray[np.float32]:
    """(n, 2, 3): from where in an image each pixel comes, in pixels from its centre, for the operations that move pixels. Those of
    torchvision.transforms.v2.functional.affine and rotate with the arguments that its policies give them."""
    height, width = size
    matrices = np.tile(np.array([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]]), (len(ops), 1, 1))
    for matrix, op, magnitude in zip(matrices, ops.tolist(), magnitudes.tolist(), strict=True):
        match op:
            case Op.SHEAR_X:  # about the upper left corner
                tangent = math.tan(math.radians(math.degrees(math.atan(magnitude))))
                matrix[0, 1:] = tangent, 0.5 * height * tangent
            case Op.SHEAR_Y:
                tangent = math.tan(math.radians(math.degrees(math.atan(magnitude))))
                matrix[1] = tangent, 1.0, 0.5 * width * tangent
            case Op.TRANSLATE_X:
                matrix[0, 2] = -int(magnitude)
            case Op.TRANSLATE_Y:
                matrix[1, 2] = -int(magnitude)
            case _:
                assert op == Op.ROTATE, op
                angle = math.radians(-magnitude)
                matrix[:, :2] = [[math.cos(angle), math.sin(angle)], [-math.sin(angle), math.cos(angle)]]
    return matrices.astype(np.float32)


def moved(images: Tensor, matrices: npt.NDArray[np.float32]) -> Tensor:
    """(n, 3, H, W) uint8 with each pixel taken from where its image's matrix says, bilinearly, black from outside."""
    height, width = images.shape[-2:]
    # grid_sample counts in half sides from the centre.
    theta = upload(matrices / np.array([[[0.5 * width], [0.5 * height]]], dtype=np.float32), images.device)  # (n, 2, 3)
    x = torch.linspace((1.0 - width) * 0.5, (width - 1.0) * 0.5, width, device=images.device)  # (W,)
    y = torch.linspace((1.0 - height) * 0.5, (height - 1.0) * 0.5, height, device=images.device)[:, None, None]  # (H, 1, 1)
    by_x, by_y, shift = (theta[:, None, None, :, column] for column in range(3))  # (n, 1, 1, 2) each
    grid = x[:, None] * by_x + (y * by_y + shift)  # (n, H, W, 2)
    sampled = F.grid_sample(images.float(), grid, mode="bilinear", padding_mode="zeros", align_corners=False)
    return sampled.round_().to(torch.uint8, memory_format=torch.channels_last)
