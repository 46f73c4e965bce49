"""Augmentation of whole batches on the device, each image by its own draw."""

from __future__ import annotations

import torch
import torch.nn.functional as F


def flip(images: torch.Tensor) -> torch.Tensor:
    """Mirror each image left to right with probability 1/2."""
    chosen = torch.rand(len(images), 1, 1, 1, device=images.device) < 0.5
    return torch.where(chosen, images.flip(-1), images)


def crop(images: torch.Tensor, pad: int = 4) -> torch.Tensor:
    """Reflect-pad each image by ``pad`` pixels and cut the original size at its own random place."""
    n, _, height, width = images.shape
    padded = F.pad(images, (pad,) * 4, mode="reflect")
    device = images.device
    top, left = torch.randint(0, 2 * pad + 1, (2, n, 1), device=device)
    rows = (top + torch.arange(height, device=device)).view(n, 1, height, 1)
    columns = (left + torch.arange(width, device=device)).view(n, 1, 1, width)
    sample = torch.arange(n, device=device).view(n, 1, 1, 1)
    channel = torch.arange(images.shape[1], device=device).view(1, -1, 1, 1)
    return padded[sample, channel, rows, columns]


def flip_crop(images: torch.Tensor) -> torch.Tensor:
    """Mirror, then crop: the usual augmentation of CIFAR (He et al. 2016, section 4.2)."""
    return crop(flip(images))


AUGMENTATIONS = {"none": None, "flip": flip, "flip_crop": flip_crop}
