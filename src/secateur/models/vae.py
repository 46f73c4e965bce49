"""Variational autoencoders: images through a narrow normal code and back."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import nn

from secateur.measure.elbo import divergence
from secateur.models.shape import sides


class Reconstruction(NamedTuple):
    """What a ``VAE`` returns: images in [0, 1] like its inputs, and the divergence of the code from the prior (n,)."""

    images: torch.Tensor
    kl: torch.Tensor


class Pixels(nn.Sigmoid):
    """A sigmoid in float32 at least: in bfloat16 it is exactly 1 from 6.3 on, where the cross-entropy has no slope."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Return values in [0, 1]."""
        return super().forward(_wide(input))


class VAE(nn.Module):
    """An encoder, two linear layers for mean and log variance of the code, and a decoder."""

    def __init__(self, encoder: nn.Module, features: int, latent: int, decoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder
        self.mean = nn.Linear(features, latent, bias=False)
        self.log_variance = nn.Linear(features, latent, bias=False)
        self.decoder = decoder

    def encode(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return mean and log variance of the code, (n, latent) each."""
        features = self.encoder(x)
        return _wide(self.mean(features)), _wide(self.log_variance(features))

    def decode(self, code: torch.Tensor) -> torch.Tensor:
        """Return the images of a code (n, latent)."""
        return self.decoder(code)

    def forward(self, x: torch.Tensor) -> Reconstruction:
        """Return the reconstruction of ``x`` from a drawn code in train mode, from the mean in eval mode."""
        mean, log_variance = self.encode(x)
        code = mean
        if self.training:
            code = mean + (0.5 * log_variance).exp() * torch.randn_like(mean)
        return Reconstruction(self.decode(code), divergence(mean, log_variance).sum(1))


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
    decoder[-1] = Pixels()
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


def _wide(x: torch.Tensor) -> torch.Tensor:
    """Return ``x`` in float32 at least."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
