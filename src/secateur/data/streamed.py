"""Images that do not fit the memory of the machine or of the device: fetched batch by batch."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Protocol

import numpy as np
import torch
from torch.utils.data import DataLoader

from secateur.data.decode import Problem, cores, fill, refuse

CPU = torch.device("cpu")
WORKERS = 8  # processes that decode ahead, at most
AHEAD = 2  # batches that each of them prepares


class Reader(Protocol):
    """What knows the images: ``read`` returns those of ``indices`` on the CPU, and what is broken among them."""

    @property
    def name(self) -> str:
        """The name of the dataset."""
        ...

    @property
    def workers(self) -> int:
        """How many processes may read ahead."""
        ...

    def read(self, indices: torch.Tensor, threads: int | None = None) -> tuple[torch.Tensor, list[Problem]]:
        """Return uint8 (n, channels, height, width), and (position in ``indices``, reason) of broken images."""
        ...

    def names(self, indices: torch.Tensor) -> Sequence[str]:
        """Return what to call the images of ``indices`` in a message."""
        ...


@dataclass(frozen=True, eq=False)
class Files:
    """Image files that are decoded whenever they are asked for, by several processes."""

    name: str
    paths: Sequence[str]
    mode: str
    shape: tuple[int, int, int]
    resize: bool
    workers: int = min(WORKERS, cores())

    def read(self, indices: torch.Tensor, threads: int | None = None) -> tuple[torch.Tensor, list[Problem]]:
        """Decode the files of ``indices``."""
        out = np.zeros((len(indices), *self.shape), dtype=np.uint8)
        return torch.from_numpy(out), fill(out, self.names(indices), self.mode, resize=self.resize, threads=threads)

    def names(self, indices: torch.Tensor) -> Sequence[str]:
        """Return the paths of ``indices``."""
        return [self.paths[i] for i in indices.tolist()]


@dataclass(frozen=True, eq=False)
class Held:
    """Images in the memory of the machine, for a device that has no room for all of them."""

    images: torch.Tensor
    name: str = "images"
    workers: int = 0

    def read(self, indices: torch.Tensor, threads: int | None = None) -> tuple[torch.Tensor, list[Problem]]:
        """Return the images of ``indices``."""
        return self.images[indices], []

    def names(self, indices: torch.Tensor) -> Sequence[str]:
        """Return the numbers of the images."""
        return [f"image {i}" for i in indices.tolist()]


@dataclass(frozen=True, eq=False)
class Streamed:
    """Stands for a uint8 tensor (n, channels, height, width) on ``device`` of which only batches ever exist."""

    reader: Reader
    count: int
    image: tuple[int, int, int]
    device: torch.device = CPU
    dtype: ClassVar[torch.dtype] = torch.uint8
    ndim: ClassVar[int] = 4

    @property
    def shape(self) -> torch.Size:
        """(n, channels, height, width)."""
        return torch.Size((self.count, *self.image))

    @property
    def is_cuda(self) -> bool:
        """Whether batches arrive on a CUDA device."""
        return self.device.type == "cuda"

    def __len__(self) -> int:
        return self.count

    def to(self, device: torch.device) -> Streamed:
        """Return the same images, to arrive on ``device``."""
        return replace(self, device=device)

    def __getitem__(self, indices: torch.Tensor) -> torch.Tensor:
        """Return the images of ``indices``; raises ``DataError`` that names the broken ones."""
        return self._sound(indices, *self.reader.read(indices.cpu()))

    def batches(self, indices: Iterable[torch.Tensor]) -> Iterator[torch.Tensor]:
        """Yield the images of each tensor of indices, the next ones being fetched meanwhile.

        The result does not depend on the number of workers, and no random state is touched.
        """
        listed = [part.cpu() for part in indices]
        loader = DataLoader(
            _Fetch(self.reader),
            batch_size=None,
            sampler=listed,
            num_workers=min(self.reader.workers, len(listed)),
            prefetch_factor=AHEAD if self.reader.workers and listed else None,
            pin_memory=self.is_cuda,
            generator=torch.Generator(),
        )
        for part, (images, problems) in zip(listed, loader, strict=True):
            yield self._sound(part, images, problems)

    def _sound(self, indices: torch.Tensor, images: torch.Tensor, problems: Sequence[Problem]) -> torch.Tensor:
        if problems:
            names = self.reader.names(indices)
            refuse(f"dataset {self.reader.name!r}, in one batch", len(indices), problems, names.__getitem__)
        return images.to(self.device, non_blocking=True)


class _Fetch(torch.utils.data.Dataset):
    """One item per batch; what is broken comes back as a value, since an exception would lose its kind."""

    def __init__(self, reader: Reader) -> None:
        self.reader = reader

    def __getitem__(self, index: torch.Tensor) -> tuple[torch.Tensor, list[Problem]]:
        return self.reader.read(index, threads=1)
