"""Image files: decoded once into memory or into a memory map beside them, or streamed where neither fits."""

from __future__ import annotations

import hashlib
import math
import os
import shutil
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch

from secateur.data.decode import CHANNELS, Problem, fill, form, refuse
from secateur.data.memory import fits
from secateur.data.streamed import Files, Streamed

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".ppm", ".pgm", ".tif", ".tiff", ".gif")
CACHE = ".secateur"  # folder of the memory maps, in the root of the dataset
CACHE_FROM = 2000  # images; fewer are decoded faster than anybody minds
CACHE_VERSION = 1  # part of a memory map's name: what is decoded differently gets another one
CHUNK = 512  # images that are decoded between two writes


def listed(folder: Path) -> list[str]:
    """Return the image files in ``folder`` and below, sorted; hidden ones and other files are left out."""
    found = []
    for home, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        found += [
            os.path.join(home, name)
            for name in sorted(names)
            if name.lower().endswith(SUFFIXES) and not name.startswith(".")
        ]
    return found


def images_of(name: str, root: Path, paths: Sequence[str], mode: str, size: int | None) -> torch.Tensor | Streamed:
    """Return the images in the files ``paths`` below ``root``: uint8 (n, channels, height, width).

    What takes at most half of the free memory is decoded once: from ``CACHE_FROM`` images on into a memory map
    in ``root/.secateur`` (where that can be written; the next run opens it), else into memory.  More than that is
    ``Streamed``: decoded by worker processes, batch after batch.

    Raises ``DataError`` that counts and names the images that are broken or of another size.
    """
    shape: tuple[int, int, int] = form(paths, mode, size) or (CHANNELS[mode], 1, 1)
    if not fits(len(paths), shape):
        return Streamed(Files(name, paths, mode, shape, size is not None), len(paths), shape)
    if len(paths) >= CACHE_FROM:
        mapped = _mapped(root, paths, mode, shape, size is not None)
        if mapped is not None:
            return mapped
    images = np.empty((len(paths), *shape), dtype=np.uint8)
    refuse(root, len(paths), fill(images, paths, mode, resize=size is not None), _below(root, paths))
    return torch.from_numpy(images)


def _mapped(
    root: Path, paths: Sequence[str], mode: str, shape: tuple[int, int, int], resize: bool
) -> torch.Tensor | None:
    """Return the images as a memory map, which is written first where there is none; None where it can't be."""
    kind = f"{mode}-{'x'.join(map(str, shape))}"
    folder, whole = root / CACHE, (len(paths), *shape)
    made = not folder.exists()
    try:
        file = folder / f"{kind}-{_fingerprint(root, paths, resize)}.npy"
        found = _opened(file, whole)
        if found is not None:
            return found
        folder.mkdir(exist_ok=True)
        if 2 * math.prod(whole) > shutil.disk_usage(folder).free:
            return None
        _write(file, root, paths, mode, shape, resize)
        for old in set(folder.glob(f"{kind}-*.npy")) - {file}:
            old.unlink(missing_ok=True)  # of files that have changed since
        return _opened(file, whole)
    except OSError:  # a folder that can't be written, a disk that is full, a file that is gone: memory will do, or say
        return None
    finally:
        if made and folder.is_dir() and not any(folder.iterdir()):
            folder.rmdir()


def _opened(file: Path, shape: tuple[int, ...]) -> torch.Tensor | None:
    """Return the memory map in ``file`` (writes to it stay in memory), None when it is not there or not whole."""
    try:
        images = np.load(file, mmap_mode="c")
    except (OSError, ValueError, EOFError):
        return None
    return torch.from_numpy(images) if images.dtype == np.uint8 and images.shape == shape else None


def _write(file: Path, root: Path, paths: Sequence[str], mode: str, shape: tuple[int, int, int], resize: bool) -> None:
    """Decode everything into ``file``, which appears whole or not at all."""
    handle, temporary = tempfile.mkstemp(suffix=".tmp", dir=file.parent)
    try:
        with os.fdopen(handle, "wb") as out:
            problems = _decode(out, paths, mode, shape, resize)
            refuse(root, len(paths), problems, _below(root, paths))
            out.flush()
            os.fsync(out.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, file)
    finally:
        Path(temporary).unlink(missing_ok=True)


def _decode(out: BinaryIO, paths: Sequence[str], mode: str, shape: tuple[int, int, int], resize: bool) -> list[Problem]:
    """Write the images to ``out`` as a .npy file; return what could not be decoded."""
    head = {"descr": "|u1", "fortran_order": False, "shape": (len(paths), *shape)}
    np.lib.format.write_array_header_1_0(out, head)
    problems = list[Problem]()
    for start in range(0, len(paths), CHUNK):
        piece = paths[start : start + CHUNK]
        images = np.empty((len(piece), *shape), dtype=np.uint8)
        problems += [(start + i, reason) for i, reason in fill(images, piece, mode, resize=resize)]
        out.write(images.data)
    return problems


def _fingerprint(root: Path, paths: Sequence[str], resize: bool) -> str:
    """Return 16 hex digits that change when a file is added, removed or written."""
    digest = hashlib.sha256(f"{CACHE_VERSION} {resize}".encode())
    for path in paths:
        state = os.stat(path)
        digest.update(f"\0{os.path.relpath(path, root)}\0{state.st_size}\0{state.st_mtime_ns}".encode())
    return digest.hexdigest()[:16]


def _below(root: Path, paths: Sequence[str]) -> Callable[[int], str]:
    """Return what names an image in a message: its path below the root that the message starts with."""
    return lambda i: os.path.relpath(paths[i], root)
