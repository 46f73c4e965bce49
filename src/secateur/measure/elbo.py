"""Reconstruction: the evidence lower bound (ELBO) of a variational autoencoder, in nats per image.

-ELBO = R + KL for one image x with values in [0, 1]: R is the binary cross-entropy between x and its reconstruction
from a code drawn from q(z | x), summed over pixels and channels; KL = sum over the code of (mean^2 + variance - 1 - log
variance) / 2 is the divergence of q from the standard normal prior.  The loss is its mean over images.  Source: Kingma
and Welling 2014, arXiv 1312.6114, equation 10 and appendix B.  The reference system adds the same up over the batch,
which Adam does not notice; its figures are 64 times ours.  For grey values R is no likelihood of a discrete image: the
ELBO compares models of the same data, and nothing else.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from torch import nn

from secateur.graph.state import eval_mode
from secateur.measure.quality import Batch, Figures
from secateur.types import Measurement

NOISE = 1312_6114  # first seed of the codes that are drawn to measure; that of batch k is NOISE + k
INACTIVE = 0.01  # nats; a unit of the code below that tells the decoder nothing


@runtime_checkable
class Autoencoder(Protocol):
    """What makes a model one of this task.

    Its forward returns ``images`` like its inputs, from a code drawn in train mode, and ``kl`` (n,), the divergence of
    the code summed over its units; mean and log variance are no outputs, so that units of the code can go.
    """

    def encode(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return mean and log variance of the code, (n, latent) each."""
        ...

    def decode(self, code: torch.Tensor) -> torch.Tensor:
        """Return the images of a code (n, latent)."""
        ...


def divergence(mean: torch.Tensor, log_variance: torch.Tensor) -> torch.Tensor:
    """Return KL(N(mean, variance) || N(0, 1)) of each unit, in nats; exactly 0 where both are 0.

    >>> divergence(torch.tensor([0.0, 2.0]), torch.zeros(2))
    tensor([0., 2.])
    """
    return 0.5 * (mean.square() + (torch.expm1(log_variance) - log_variance))


@dataclass(frozen=True)
class Elbo:
    """Mean over ``n`` images of -ELBO, reconstruction and KL, in nats, with standard deviations over images."""

    loss: float
    reconstruction: float
    kl: float
    spreads: tuple[float, float, float]
    n: int

    def figures(self) -> Figures:
        """Return the figures of a record."""
        return {**self.curve(), "n": self.n}

    def curve(self) -> Figures:
        """Return the figures of an epoch."""
        return {"loss": self.loss, "reconstruction": self.reconstruction, "kl": self.kl}

    def measurements(self, device: str, part: str) -> tuple[Measurement, ...]:
        """Return the ELBO (higher is better), reconstruction and KL with their standard errors."""
        how = f"all {self.n} images of the {part} set, one code drawn for each by a fixed seed; spread: standard error"
        values = (("elbo", -self.loss), ("reconstruction", self.reconstruction), ("kl", self.kl))
        rows = [(name, value, deviation) for (name, value), deviation in zip(values, self.spreads, strict=True)]
        n = self.n
        return tuple(Measurement(f"{part} {a}", b, "nats", n, c / math.sqrt(n), device, how) for a, b, c in rows)


@dataclass(frozen=True)
class Reconstruction:
    """Images through a code and back; the loss is -ELBO in nats, mean over the images."""

    name: str = "reconstruction"
    parts: tuple[str, ...] = ("reconstruction", "kl")
    columns: int = 7

    def learn(
        self, output: Any, inputs: torch.Tensor, labels: torch.Tensor, targets: torch.Tensor, smoothing: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the mean -ELBO of ``inputs``, and the sums of reconstruction and KL; labels are not used."""
        both = torch.stack([pixels(output.images, inputs), output.kl.float()])
        return both.sum(0).mean(), both.detach().sum(1)

    def row(self, model: nn.Module, batch: Batch, number: int) -> torch.Tensor:
        """Return sums of -ELBO, reconstruction, KL and of their squares, and the number of images.

        One code is drawn for each image, by a generator of its own: the random state stays, and the same model has the
        same ELBO, whichever process sees the batch.
        """
        both = _drawn(autoencoder(model), batch[0], torch.Generator().manual_seed(NOISE + number)).double()
        values = torch.cat([both.sum(0, keepdim=True), both])
        sums = torch.cat([values.sum(1), values.square().sum(1)])
        return torch.cat([sums, sums.new_tensor([len(batch[0])])])

    def quality(self, rows: Sequence[torch.Tensor]) -> Elbo:
        """Return the ELBO from the rows of all batches."""
        *sums, count = sum(rows[1:], rows[0]).tolist()
        means = [value / count for value in sums]
        loss, spent, kl = (math.sqrt(max(0.0, means[3 + k] - means[k] ** 2)) for k in range(3))
        return Elbo(means[0], means[1], means[2], (loss, spent, kl), round(count))

    def scoring(self, half: torch.dtype | None = None) -> Callable[[nn.Module, Any], torch.Tensor]:
        """Return -ELBO of each image of a batch (n,), with codes drawn by a fixed seed from batch to batch."""
        generator = torch.Generator().manual_seed(NOISE)

        def loss(model: nn.Module, batch: Batch) -> torch.Tensor:
            with torch.autocast(batch[0].device.type, half, enabled=half is not None):
                return _drawn(autoencoder(model), batch[0], generator).sum(0)

        return loss

    def drop(self, before: Mapping[str, Any], after: Mapping[str, Any]) -> float:
        """Return by which fraction the loss rose.

        >>> Reconstruction().drop({"loss": 240.0}, {"loss": 252.0})
        0.05
        """
        return (after["loss"] - before["loss"]) / abs(before["loss"])

    def told(self, *figures: Mapping[str, Any]) -> str:
        """Return the losses, and the KL of a single one, in words.

        >>> Reconstruction().told({"loss": 240.123, "kl": 20.0})
        '-ELBO 240.12 nats, KL 20.00'
        """
        losses = " -> ".join(f"{row['loss']:.2f}" for row in figures)
        return f"-ELBO {losses} nats" + (f", KL {figures[0]['kl']:.2f}" if len(figures) == 1 else "")

    def misfit(self, output: Any, inputs: torch.Tensor, classes: int) -> str | None:
        """Return what is wrong with images or KL."""
        images, kl = getattr(output, "images", None), getattr(output, "kl", None)
        if not isinstance(images, torch.Tensor) or not isinstance(kl, torch.Tensor):
            return f"an autoencoder returns `images` and `kl`, this one {type(output).__name__}"
        if images.shape != inputs.shape or kl.shape != inputs.shape[:1]:
            found = f"images {tuple(images.shape)} and kl {tuple(kl.shape)}"
            return f"of inputs {tuple(inputs.shape)} it returns {found}; they must be {tuple(inputs.shape)} and (n,)"
        low, high = float(images.min()), float(images.max())
        return None if low >= 0 and high <= 1 else f"its images go from {low:.3g} to {high:.3g}; they must be in [0, 1]"


RECONSTRUCTION = Reconstruction()


def pixels(images: torch.Tensor, inputs: torch.Tensor) -> torch.Tensor:
    """Return the binary cross-entropy of each image (n,), summed over its pixels and channels, in nats.

    A pixel that is not a number makes its image so, for whoever looks at the loss; torch would stop with an error.
    """
    with torch.autocast(inputs.device.type, enabled=False):
        finite = images.float().nan_to_num(0.5)
        losses = F.binary_cross_entropy(finite, inputs.float(), reduction="none").flatten(1).sum(1)
    return losses + 0 * images.detach().float().flatten(1).sum(1)


@torch.no_grad()
def activity(model: nn.Module, inputs: torch.Tensor) -> torch.Tensor:
    """Return the KL of each unit of the code, mean over ``inputs``, (latent,) in nats."""
    with eval_mode(model):
        return divergence(*autoencoder(model).encode(inputs)).mean(0)


def autoencoder(model: Any) -> Autoencoder:
    """Return ``model`` as what it is."""
    return model


def _drawn(model: Autoencoder, inputs: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Return reconstruction and KL (2, n) of ``inputs``, from codes drawn by ``generator`` (on the CPU)."""
    mean, log_variance = model.encode(inputs)
    noise = torch.randn(mean.shape, generator=generator).to(mean)
    images = model.decode(mean + (0.5 * log_variance).exp() * noise)
    return torch.stack([pixels(images, inputs), divergence(mean, log_variance).float().sum(1)])
