"""Mixup: training on blends of two images with the same blend of their labels."""

from __future__ import annotations

import torch
import torch.nn.functional as F


def mixup(inputs: torch.Tensor, labels: torch.Tensor, classes: int, alpha: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Blend each image of a batch with another one of the batch; draws from torch's random state.

    ``inputs`` (n, ...) float and ``labels`` (n,) integer become w x_i + (1 - w) x_j of the same shape, and the class
    probabilities w y_i + (1 - w) y_j of shape (n, classes).  One w ~ Beta(alpha, alpha) for the batch; the larger of
    w and 1 - w goes to image i, so that i stays the better answer (both ways are equally likely, and every image is
    an i).  Source: Zhang et al. 2018, arXiv 1710.09412, equation 1.

    >>> torch.manual_seed(0)
    <torch._C.Generator object at 0x...>
    >>> mixed, targets = mixup(torch.rand(4, 2), torch.tensor([0, 1, 2, 0]), 3, 0.2)
    >>> mixed.shape, targets.shape, targets.sum(1).tolist()
    (torch.Size([4, 2]), torch.Size([4, 3]), [1.0, 1.0, 1.0, 1.0])
    """
    drawn = float(torch.distributions.Beta(alpha, alpha).sample())
    weight = max(drawn, 1 - drawn)
    other = torch.randperm(len(inputs), device=inputs.device)
    targets = F.one_hot(labels, classes).to(inputs.dtype)
    return inputs.lerp(inputs[other], 1 - weight), targets.lerp(targets[other], 1 - weight)
