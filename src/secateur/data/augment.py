"""Augmentation of whole batches on the device, each image by its own draw.

All draws come from torch's global generator of the images' device, which the training loop seeds at each step, and go
through ``of_batch``, so that several processes that divide a batch draw what one would.
Every function takes inputs of a model, (n, channels, height, width), plain or normalised: what is covered or lies
outside becomes 0, which is black in plain and the mean in normalised inputs.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F

from secateur.data.share import of_batch

Augmentation = Callable[[torch.Tensor], torch.Tensor]


def flip(images: torch.Tensor) -> torch.Tensor:
    """Mirror each image left to right with probability 1/2."""
    chosen = of_batch(len(images), lambda n: torch.rand(n, 1, 1, 1, device=images.device) < 0.5)
    return torch.where(chosen, images.flip(-1), images)


def crop(images: torch.Tensor, pad: int = 4, mode: str = "reflect") -> torch.Tensor:
    """Pad each image by ``pad`` pixels (``mode`` of ``torch.nn.functional.pad``) and cut out the original size.

    The place is random.  Reflection takes at most ``side - 1`` pixels; smaller images are padded by that.
    """
    n, channels, height, width = images.shape
    pad = min(pad, height - 1, width - 1) if mode == "reflect" else pad
    padded = F.pad(images, (pad,) * 4, mode=mode)
    device = images.device
    top, left = of_batch(n, lambda n: torch.randint(0, 2 * pad + 1, (2, n, 1), device=device), axis=1)
    rows = (top + torch.arange(height, device=device)).view(n, 1, height, 1)
    columns = (left + torch.arange(width, device=device)).view(n, 1, 1, width)
    sample = torch.arange(n, device=device).view(n, 1, 1, 1)
    channel = torch.arange(channels, device=device).view(1, -1, 1, 1)
    return padded[sample, channel, rows, columns]


def zero_crop(images: torch.Tensor) -> torch.Tensor:
    """Pad each image by 4 zeros and cut out the original size (He et al. 2016, section 4.2)."""
    return crop(images, mode="constant")


def cutout(images: torch.Tensor, share: float = 0.5) -> torch.Tensor:
    """Cover a square of ``share`` times the shorter side of each image with 0.

    Its middle is any pixel, so that it may lie partly outside (DeVries and Taylor 2017: 16 of 32 pixels).
    """
    n, _, height, width = images.shape
    side, device = round(share * min(height, width)), images.device
    hidden = [_span(n, size, side, device) for size in (height, width)]
    return images.masked_fill((hidden[0][:, :, None] & hidden[1][:, None, :])[:, None], 0.0)


def _span(n: int, size: int, side: int, device: torch.device) -> torch.Tensor:
    """Return bool (n, size): for each image ``side`` places in a row around a random one."""
    start = of_batch(n, lambda n: torch.randint(0, size, (n, 1), device=device)) - side // 2
    place = torch.arange(size, device=device)
    return (place >= start) & (place < start + side)


def resized_crop(images: torch.Tensor, area: tuple[float, float] = (0.08, 1.0), ratio: float = 4 / 3) -> torch.Tensor:
    """Enlarge a random part of each image to the whole size, bilinearly.

    The part has a share ``area`` of the pixels and a width-to-height ratio between 1 / ``ratio`` and ``ratio``,
    log-uniform (Szegedy et al. 2015, section 6).  A side that would be longer than the image is cut to it, where
    torchvision draws again up to ten times; the part starts between pixels, not at one.
    """
    n, device = len(images), images.device
    share = of_batch(n, lambda n: torch.empty(n, device=device).uniform_(*area))
    wide = math.log(ratio)
    stretch = of_batch(n, lambda n: torch.empty(n, device=device).uniform_(-wide, wide)).exp()
    size = torch.stack([(share * stretch).sqrt(), (share / stretch).sqrt()], 1).clamp(max=1)
    middle = (of_batch(n, lambda n: torch.rand(n, 2, device=device)) * 2 - 1) * (1 - size)
    grid = torch.cat([torch.diag_embed(size), middle[:, :, None]], 2)
    places = F.affine_grid(grid.to(images.dtype), list(images.shape), align_corners=False)
    return F.grid_sample(images, places, mode="bilinear", padding_mode="border", align_corners=False)


def light(images: torch.Tensor, strength: float = 0.4) -> torch.Tensor:
    """Change contrast and brightness of each image.

    ``m + c (x - m) + b s``, with mean ``m`` and deviation ``s`` of the image per channel, ``c`` uniform in
    1 - ``strength`` .. 1 + ``strength`` and ``b`` in -``strength`` .. ``strength``: the same change of the picture
    for plain and for normalised inputs.  Values may leave the range of a byte.
    """
    n, device = len(images), images.device
    mean, deviation = images.mean((2, 3), keepdim=True), images.std((2, 3), correction=0, keepdim=True)
    contrast, brightness = of_batch(
        n, lambda n: torch.empty(2, n, 1, 1, 1, device=device).uniform_(-strength, strength), axis=1
    )
    return images + contrast * (images - mean) + brightness * deviation


def chained(*steps: Augmentation) -> Augmentation:
    """Return the augmentation that does ``steps`` one after the other."""

    def all_steps(images: torch.Tensor) -> torch.Tensor:
        for step in steps:
            images = step(images)
        return images

    return all_steps


AUGMENTATIONS: dict[str, Augmentation | None] = {
    "none": None,
    "flip": flip,
    "crop": crop,
    "flip_crop": chained(flip, crop),
    "flip_zero_crop": chained(flip, zero_crop),
    "flip_crop_cutout": chained(flip, crop, cutout),
    "flip_resized_crop": chained(flip, resized_crop),
    "flip_resized_crop_light": chained(flip, resized_crop, light),
}
