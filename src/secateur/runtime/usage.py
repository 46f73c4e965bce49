"""What a gated model chooses over many images: densities, saliencies, channels of each class, cost of each image.

Sums are kept, one layer and batch at a time: no mask outlives its batch.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor, nn

from secateur.graph.state import eval_mode
from secateur.runtime.gates import Choice, Prefix, Steered, watch
from secateur.runtime.gates.cost import meter
from secateur.types import DataError, PlanError

BINS = 64  # of a histogram of saliencies; a power of 2
ALIKE = 0.01  # MACs of images that differ by a smaller share of their mean rank nothing


class Labelled(Protocol):
    """Images in batches with their labels: what is asked of a dataset."""

    @property
    def classes(self) -> tuple[str, ...]:
        """Class names in label order."""
        ...

    def batches(self, part: str, size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield inputs and labels of a part, in order."""
        ...


@dataclass(frozen=True, eq=False)
class Histogram:
    """Saliencies of all images and channels in ``BINS`` equal bins over 0 .. ``top``: int64 counts (BINS,) each.

    ``top`` is the power of 2 above the largest (0 where all are 0), so that it does not depend on the batches.
    """

    top: float
    computed: Tensor
    skipped: Tensor


@dataclass(frozen=True, eq=False)
class LayerUsage:
    """What the gate of layer ``path`` chose.

    ``use`` (classes, units) float64 is the share of a class's images that computed a channel, NaN without images.
    ``share`` (units,) float64 is that of all images.  A prefix gate has ``groups``, the number of channels that each
    action computes, and ``actions`` (groups,) float64, the share of images with each; ``saliency`` is for other gates.
    """

    path: str
    use: Tensor
    share: Tensor
    groups: tuple[int, ...] = ()
    actions: Tensor | None = None
    saliency: Histogram | None = None

    @property
    def density(self) -> float:
        """Share of the channels that is computed, mean over the images."""
        return float(self.share.mean())

    @property
    def entropy(self) -> float:
        """Entropy over the images in bits: of the action of a prefix gate, else of a channel being on, mean over them.

        0 where every image gets the same; at most log2(groups), or 1.
        """
        if self.actions is not None:
            return float(_bits(self.actions).sum())
        return float((_bits(self.share) + _bits(1 - self.share)).mean())


@dataclass(frozen=True, eq=False)
class Usage:
    """What a gated model chose on n images: its ``layers``, the multiply-accumulates ``macs`` (n,) float64 of each
    image, their ``labels`` (n,), and the multiply-accumulates ``dense`` of an image for which all is computed.
    """

    layers: tuple[LayerUsage, ...]
    macs: Tensor
    labels: Tensor
    classes: tuple[str, ...]
    dense: float

    @property
    def per_class(self) -> dict[str, Tensor]:
        """Number ``n`` of images of each class (int64), and ``mean``, ``min``, ``max`` of their MACs (NaN for none)."""
        n = self.labels.bincount(minlength=len(self.classes))
        blank = torch.full((len(n),), torch.nan, dtype=torch.float64)
        how = {"mean": "mean", "min": "amin", "max": "amax"}
        return {"n": n} | {
            name: blank.scatter_reduce(0, self.labels, self.macs, reduce, include_self=False)
            for name, reduce in how.items()
        }

    @property
    def ranked(self) -> bool:
        """Whether some images cost more than others: not where all MACs lie within ``ALIKE`` of their mean."""
        return float(self.macs.max() - self.macs.min()) >= ALIKE * float(self.macs.mean())

    def extremes(self, count: int = 8) -> tuple[Tensor, Tensor]:
        """Return the places in the part of the ``count`` cheapest and dearest images; of equal ones the first."""
        cheapest, dearest = (self.macs.sort(descending=down, stable=True).indices for down in (False, True))
        return cheapest[:count], dearest[:count]


def usage(model: nn.Module, data: Labelled, part: str, size: int = 256) -> Usage:
    """Return what ``model`` chooses on a ``part`` of ``data``, read in batches of ``size``.

    A ``Steered`` model is looked at under its controller, whose work counts; that of FBS predictors does not, nor does
    ``dense`` count either.  Entropies and shares are those of the images that were
    read, so a layer that computes the same for all of them has entropy 0 whatever it would do elsewhere.

    Raises ``PlanError`` for a model without gates, ``DataError`` for a part without images.

    >>> from secateur.data import digits, split
    >>> from secateur.runtime.gates import gate
    >>> chain = nn.Sequential(nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(288, 10))
    >>> data = split(digits())
    >>> found = usage(gate(chain, 0.5, torch.rand(1, 1, 8, 8)).model, data, "test")
    >>> [(layer.path, layer.density, layer.entropy) for layer in found.layers]  # untrained: the same for all images
    [('0', 0.5, 0.0)]
    >>> found.macs.shape, found.ranked, found.layers[0].use.shape
    (torch.Size([359]), False, torch.Size([10, 8]))
    """
    count, dense, tallies = None, 0.0, {}
    macs, labels = [], []
    with eval_mode(model), torch.no_grad(), watch(model) as choices:
        for inputs, truth in data.batches(part, size):
            if not len(inputs):
                continue
            if count is None:
                count, dense = meter(model, inputs), meter(_inner(model), inputs).dense
            model(inputs)
            if not choices:
                raise PlanError("the model has no gates, so it chooses nothing; put some on with gate(model, ...).")
            macs.append(count(choices, len(inputs)).cpu())
            labels.append(truth.cpu())
            for path, choice in choices.items():
                if path not in tallies:
                    tallies[path] = _Tally(len(data.classes), choice.mask.shape[1])
                tallies[path].add(choice, labels[-1])
    if count is None:
        raise DataError(f"the {part} part has no images.")
    layers = tuple(_layer(path, model.get_submodule(f"{path}.gate"), tally) for path, tally in tallies.items())
    if isinstance(model, Steered):  # its gates are those of the model inside
        layers = tuple(replace(layer, path=layer.path.removeprefix("model.")) for layer in layers)
    return Usage(layers, torch.cat(macs), torch.cat(labels), data.classes, dense)


def _inner(model: nn.Module) -> nn.Module:
    return model.model if isinstance(model, Steered) else model


class _Tally:
    """Sums of one layer over the batches so far; they are of integers, so batches of any size give the same."""

    def __init__(self, classes: int, units: int) -> None:
        self.on = torch.zeros(classes, units, dtype=torch.int64)
        self.images = torch.zeros(classes, dtype=torch.int64)
        self.widths = torch.zeros(units + 1, dtype=torch.int64)  # images that compute this many channels
        self.bins, self.top = torch.zeros(2, BINS, dtype=torch.int64), 0.0  # of skipped and computed channels

    def add(self, choice: Choice, labels: Tensor) -> None:
        mask, saliency = choice.mask.cpu(), choice.saliency.double().cpu()
        self.on.index_add_(0, labels, mask.long())
        self.images += labels.bincount(minlength=len(self.images))
        self.widths += mask.sum(1).bincount(minlength=len(self.widths))
        sound = saliency.isfinite()
        self._bin(saliency[sound], mask[sound])

    def _bin(self, saliency: Tensor, mask: Tensor) -> None:
        """Count saliencies (of either sign: those below 0 as 0); for larger ones than before, bins become one."""
        most = float(saliency.max()) if len(saliency) else 0.0
        if most > 0:
            above = 2.0 ** math.frexp(most)[1]
            while 0 < self.top < above:
                self.bins = torch.cat([self.bins.unflatten(1, (-1, 2)).sum(2), torch.zeros_like(self.bins[:, ::2])], 1)
                self.top *= 2
            self.top = max(self.top, above)
        place = (saliency * (BINS / self.top if self.top else 0.0)).long().clamp(0, BINS - 1)
        self.bins += (place + BINS * mask).bincount(minlength=2 * BINS).view(2, BINS)


def _layer(path: str, gate: nn.Module, tally: _Tally) -> LayerUsage:
    images = int(tally.images.sum())
    use, share = tally.on.double() / tally.images[:, None], tally.on.sum(0).double() / images
    if isinstance(gate, Prefix):
        return LayerUsage(path, use, share, tuple(gate.sizes), tally.widths[gate.sizes].double() / images)
    skipped, computed = tally.bins
    return LayerUsage(path, use, share, saliency=Histogram(tally.top, computed, skipped))


def _bits(share: Tensor) -> Tensor:
    """Return -p log2 p, 0 at p = 0."""
    return torch.special.entr(share) / torch.log(torch.tensor(2.0, dtype=share.dtype))
