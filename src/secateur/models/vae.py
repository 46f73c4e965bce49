"""Variational autoencoders: images through a narrow normal code and back."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import nn

from secateur.models.shape import sides


class Reconstruction(NamedTuple):
    """What a ``VAE`` returns: images in [0, 1] like its inputs, and the code's mean and log variance (n, latent)."""

    images: torch.Tensor
    mean: torch.Tensor
    log_variance: torch.Tensor


class VAE(nn.Module):
    """An encoder, two linear layers for mean and log variance of the code, and a decoder."""

    def __init__(self, encoder: nn.Module, features: int, latent: int, decoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder
        self.mean = nn.Linear(features, latent, bias=False)
        self.log_variance = nn.Linear(features, latent, bias=False)
        self.decoder = decoder

    def forward(self, x: torch.Tensor) -> Reconstruction:
        """Return the reconstruction of ``x`` from a drawn code in train mode, from the mean in eval mode."""
        features = self.encoder(x)
        mean, log_variance = self.mean(features), self.log_variance(features)
        code = mean
        if self.training:
            code = mean + (0.5 * log_variance).exp() * torch.randn_like(mean)
        return Reconstruction(self.decoder(code), mean, log_variance)


def vae(
    in_channels: int = 3,
    image_size: int | Sequence[int] = 64,
    channels: Sequence[int] = (32, 64),
    widths: Sequence[int] = (2048, 4096),
    latent: int = 100,
) -> VAE:
    """Return the face autoencoder of train-time pruning (the model is that of Kingma and Welling 2014, 1312.6114).

    Encoder: Conv-ReLU per entry of ``channels`` (4x4, stride 2), Linear-ReLU per width.  Decoder: the same in
    reverse with transposed convolutions, a sigmoid at the end.  Linear layers have no bias.  It has no classes;
    height and width must be multiples of 2 per convolution.

    At 64x64 in colour: 85,183,619 parameters.

    >>> with torch.device("meta"):
    ...     sum(p.numel() for p in vae().parameters())
    85183619
    """
    height, width = sides(image_size)
    step = 2 ** len(channels)
    if not channels or not widths:
        raise ValueError(f"channels and widths need at least one number; got {list(channels)}, {list(widths)}.")
    if height % step or width % step:
        raise ValueError(f"height and width must be multiples of {step}; got {height} x {width}.")
    form = (-1, height // step, width // step)  # the number of channels is left to the tensor, so it may shrink
    flat = channels[-1] * form[1] * form[2]
    sizes = (flat, *widths)
    down, up = (in_channels, *channels), (*channels[::-1], in_channels)
    encoder: list[nn.Module] = []
    for before, after in pairwise(down):
        encoder += [nn.Conv2d(before, after, 4, stride=2, padding=1), nn.ReLU()]
    encoder.append(nn.Flatten())
    encoder += _perceptron(sizes)
    decoder = [*_perceptron((latent, *sizes[::-1])), nn.Unflatten(1, form)]
    for before, after in pairwise(up):
        decoder += [nn.ConvTranspose2d(before, after, 4, stride=2, padding=1), nn.ReLU()]
    decoder[-1] = nn.Sigmoid()
    return VAE(nn.Sequential(*encoder), widths[-1], latent, nn.Sequential(*decoder))


def small_vae(
    in_channels: int = 1,
    image_size: int | Sequence[int] = 28,
    channels: Sequence[int] = (16, 32),
    widths: Sequence[int] = (256,),
    latent: int = 20,
) -> VAE:
    """Return ``vae`` at the size of 28x28 and 32x32 images.

    >>> sum(p.numel() for p in small_vae().parameters())
    835137
    """
    return vae(in_channels, image_size, channels, widths, latent)


def _perceptron(sizes: Sequence[int]) -> list[nn.Module]:
    layers: list[nn.Module] = []
    for before, after in pairwise(sizes):
        layers += [nn.Linear(before, after, bias=False), nn.ReLU()]
    return layers
