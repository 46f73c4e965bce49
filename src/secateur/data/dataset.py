"""Images as bytes, in memory or fetched batch by batch, and three disjoint sets of their indices."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from secateur.data.streamed import Held, Streamed
from secateur.types import DataError

TEST_SEED = 20_221  # the test images of a source without a test part are the same for every recipe seed
CHUNK = 4096  # images that are looked at together where all of them are
DEVICE_SHARE = 0.5  # of the free memory of a device that images may take; the rest is for the model


@dataclass(frozen=True, eq=False)
class Source:
    """What a source file returns: all images (training part first), labels and class names.

    ``images`` is uint8 of shape (n, channels, height, width), or ``Streamed`` where that fits no memory;
    ``white`` is the byte that stands for 1.0; ``test_from`` is the index of the first image of the official
    test part, ``None`` when there is none.
    """

    name: str
    images: torch.Tensor | Streamed
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
        """Return the same dataset with its images and labels on ``device``.

        Images that would take more than half of its free memory stay where they are; their batches move.
        """
        s = self.source
        images = s.images
        if isinstance(images, torch.Tensor) and not _room(images, device):
            images = Streamed(Held(images, s.name), len(images), self.shape)
        moved = Source(s.name, images.to(device), s.labels.to(device), s.classes, s.test_from, s.white)
        return Dataset(moved, self.train, self.validation, self.test, self.mean, self.std)

    def batch(self, indices: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return float32 inputs of shape (n, channels, height, width) and int64 labels of ``indices``."""
        images = self._images(indices)
        labels = self.source.labels[indices.to(self.source.labels.device)]
        return scaled(images, self.source.white, self.mean, self.std), labels

    def batches(self, part: str, size: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Yield the batches of ``train``, ``validation`` or ``test`` in order; the last may be smaller."""
        return self.stream(self.part(part).split(size))

    def stream(self, parts: Iterable[torch.Tensor]) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Yield what ``batch`` returns for each tensor of indices; images on disk are decoded ahead."""
        s, parts = self.source, list(parts)
        images = s.images.batches(parts) if isinstance(s.images, Streamed) else (self._images(i) for i in parts)
        for indices, pixels in zip(parts, images, strict=True):
            yield scaled(pixels, s.white, self.mean, self.std), s.labels[indices.to(s.labels.device)]

    def _images(self, indices: torch.Tensor) -> torch.Tensor:
        return self.source.images[indices.to(self.source.images.device)]


def scaled(images: torch.Tensor, white: float, mean: tuple[float, ...], std: tuple[float, ...]) -> torch.Tensor:
    """Return the input of byte images (n, channels, height, width): ``(images / white - mean) / std``."""
    inputs = images.float().div_(white)
    if any(mean):
        inputs.sub_(torch.tensor(mean, device=images.device).view(-1, 1, 1))
    if any(width != 1 for width in std):
        inputs.div_(torch.tensor(std, device=images.device).view(-1, 1, 1))
    return inputs


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


def resized(source: Source, size: int | None) -> Source:
    """Return ``source`` with its images (in memory) scaled to ``size`` x ``size``; None leaves them.

    Bilinear over all pixels that a new one covers, rounded to the nearest byte.
    """
    images = source.images
    if size is None or images.shape[2:] == (size, size) or isinstance(images, Streamed):
        return source
    out = torch.empty(*images.shape[:2], size, size, dtype=torch.uint8)
    for start in range(0, len(images), CHUNK):
        piece = images[start : start + CHUNK].float()
        sized = F.interpolate(piece, (size, size), mode="bilinear", antialias=True)
        out[start : start + CHUNK] = sized.round().clamp(0, source.white).byte()
    return Source(source.name, out, source.labels, source.classes, source.test_from, source.white)


def _room(images: torch.Tensor, device: torch.device) -> bool:
    """Return whether ``images`` may be copied to ``device`` as a whole (or are not copied)."""
    if device.type != "cuda" or images.is_cuda:
        return True
    return images.nbytes <= DEVICE_SHARE * torch.cuda.mem_get_info(device)[0]


def _moments(source: Source, train: torch.Tensor) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return mean and standard deviation per channel over the training images, in units of white."""
    channels, parts = source.images.shape[1], train.split(CHUNK if isinstance(source.images, torch.Tensor) else 256)
    stored = source.images
    chunks = stored.batches(parts) if isinstance(stored, Streamed) else (stored[part] for part in parts)
    counts = torch.zeros(channels, 256, dtype=torch.float64)
    for pixels in chunks:
        rows = pixels.cpu().transpose(0, 1).reshape(channels, -1)
        counts += torch.stack([torch.bincount(row, minlength=256) for row in rows])
    counts /= counts.sum(1, keepdim=True)
    levels = torch.arange(256, dtype=torch.float64) / source.white
    mean = counts @ levels
    std = (counts @ levels.square() - mean.square()).clamp_min(1e-12).sqrt()
    return tuple(mean.tolist()), tuple(std.tolist())
