"""What steps of a view share: numbers that each image has of its own, and steps that only some images take."""

from collections.abc import Callable

import torch
from torch import Tensor

LUMA = (0.2989, 0.587, 0.114)  # ITU-R 601-2, the weights of PIL's and torchvision's grayscale


def where_due(due: Tensor, op: Callable[..., Tensor], images: Tensor, *parameters: Tensor) -> Tensor:
    """`op(images, *parameters)` for the images that are `due` (B,) bool, the others as they are."""
    if images.is_cpu:  # here it costs nothing to ask which images are due, and much to change all of them
        rows = due.nonzero().squeeze(1)
        if len(rows) == 0:
            return images
        return images.index_copy(0, rows, op(images[rows], *(p[rows] for p in parameters)))
    return torch.where(per_image(due), op(images, *parameters), images)


def per_image(values: Tensor) -> Tensor:
    """(B,) -> (B, 1, 1, 1)."""
    return values.view(-1, 1, 1, 1)


def grayscale(images: Tensor) -> Tensor:
    """(B, 3, h, w) -> the same shape, all three channels equal."""
    r, g, b = images.unbind(1)
    return (LUMA[0] * r + LUMA[1] * g + LUMA[2] * b).unsqueeze(1).expand_as(images)
