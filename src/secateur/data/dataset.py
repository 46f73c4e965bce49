"""Images held in memory as bytes, and three disjoint sets of their indices."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from secateur.types import DataError

TEST_SEED = 20_221  # the test images of a source without a test part are the same for every recipe seed


@dataclass(frozen=True, eq=False)
class Source:
    """What a source file returns: all images (training part first), labels and class names.

    ``images`` is uint8 of shape (n, channels, height, width); ``white`` is the byte that stands for 1.0;
    ``test_from`` is the index of the first image of the official test part, ``None`` when there is none.
    """

    name: str
    images: torch.Tensor
    labels: torch.Tensor
    classes: tuple[str, ...]
    test_from: int | None = None
    white: float = 255.0

    def __post_init__(self) -> None:
        n = len(self.images)
        if self.images.ndim != 4 or self.images.dtype != torch.uint8 or self.labels.shape != (n,):
            raise DataError(
                f"dataset {self.name!r}: images are uint8 (n, channels, height, width), each with a label; "
                f"found {self.images.dtype} {tuple(self.images.shape)}, labels {tuple(self.labels.shape)}."
            )
        low, high = (int(self.labels.min()), int(self.labels.max())) if n else (0, -1)
        if n == 0 or low < 0 or high >= len(self.classes):
            raise DataError(
                f"dataset {self.name!r}: {n} images with labels {low}..{high} for {len(self.classes)} "
                "classes; labels must be 0 .. classes - 1."
            )


@dataclass(frozen=True, eq=False)
class Dataset:
    """A source with its disjoint ``train``, ``validation`` and ``test`` indices and its input scaling.

    The input of a model is ``(byte / white - mean) / std`` per channel.
    """

    source: Source
    train: torch.Tensor
    validation: torch.Tensor
    test: torch.Tensor
    mean: tuple[float, ...]
    std: tuple[float, ...]

    @property
    def classes(self) -> tuple[str, ...]:
        """Class names in label order."""
        return self.source.classes

    @property
    def shape(self) -> tuple[int, int, int]:
        """(channels, height, width) of one image."""
        _, channels, height, width = self.source.images.shape
        return channels, height, width

    def part(self, name: str) -> torch.Tensor:
        """Return the indices of ``train``, ``validation`` or ``test``."""
        return {"train": self.train, "validation": self.validation, "test": self.test}[name]

    def to(self, device: torch.device) -> Dataset:
        """Return the same dataset with its images and labels on ``device``."""
        s = self.source
        moved = Source(s.name, s.images.to(device), s.labels.to(device), s.classes, s.test_from, s.white)
        return Dataset(moved, self.train, self.validation, self.test, self.mean, self.std)

    def batch(self, indices: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return float32 inputs of shape (n, channels, height, width) and int64 labels of ``indices``."""
        images = self.source.images[indices.to(self.source.images.device)]
        labels = self.source.labels[indices.to(self.source.labels.device)]
        return scaled(images, self.source.white, self.mean, self.std), labels

    def batches(self, part: str, size: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Yield the batches of ``train``, ``validation`` or ``test`` in order; the last may be smaller."""
        for indices in self.part(part).split(size):
            yield self.batch(indices)


def scaled(images: torch.Tensor, white: float, mean: tuple[float, ...], std: tuple[float, ...]) -> torch.Tensor:
    """Return the input of byte images (n, channels, height, width): ``(images / white - mean) / std``."""
    shift = torch.tensor(mean, device=images.device).view(-1, 1, 1)
    width = torch.tensor(std, device=images.device).view(-1, 1, 1)
    return (images.float() / white - shift) / width


def split(
    source: Source,
    *,
    validation: float = 0.1,
    test: float = 0.2,
    seed: int = 0,
    limit: int | None = None,
    normalize: bool = False,
) -> Dataset:
    """Cut a source into seeded, disjoint training, validation and test sets.

    ``validation`` is the fraction of the images outside the test set, drawn by ``seed``.  ``test`` is used
    only when the source has no test part of its own, and then draws the same images for every seed.
    ``limit`` caps the training set; ``normalize`` takes mean and standard deviation per channel from the
    training set alone.

    Raises ``DataError`` when a set would be empty.
    """
    n = len(source.images)
    if source.test_from is None:
        order = torch.randperm(n, generator=torch.Generator().manual_seed(TEST_SEED))
        cut = n - round(n * test)
    else:
        order, cut = torch.arange(n), source.test_from
    rest = order[:cut][torch.randperm(cut, generator=torch.Generator().manual_seed(seed))]
    held = round(cut * validation)
    train, held_out, tested = rest[held:][:limit], rest[:held].sort().values, order[cut:].sort().values
    for name, part in (("training", train), ("validation", held_out), ("test", tested)):
        if len(part) == 0:
            raise DataError(
                f"dataset {source.name!r}: the {name} set is empty ({n} images, validation={validation}, "
                f"test={test}, limit={limit}); each of the three sets needs at least one image."
            )
    channels = source.images.shape[1]
    mean, std = _moments(source, train) if normalize else ((0.0,) * channels, (1.0,) * channels)
    return Dataset(source, train, held_out, tested, mean, std)


def _moments(source: Source, train: torch.Tensor) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return mean and standard deviation per channel over the training images, in units of white."""
    channels = source.images.shape[1]
    pixels = source.images[train].transpose(0, 1).reshape(channels, -1)
    levels = torch.arange(256, dtype=torch.float64) / source.white
    counts = torch.stack([torch.bincount(row.long(), minlength=256) for row in pixels]).double()
    counts /= counts.sum(1, keepdim=True)
    mean = counts @ levels
    std = (counts @ levels.square() - mean.square()).clamp_min(1e-12).sqrt()
    return tuple(mean.tolist()), tuple(std.tolist())
