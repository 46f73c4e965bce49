"""Small folders of JPEG files, made on the spot."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image


def picture(path: Path, seed: int = 0, size: tuple[int, int] = (24, 20), mode: str = "RGB") -> Path:
    """Write smooth noise (width, height) as the format of the file name; return the path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    coarse = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC).convert(mode).save(path, quality=90)
    return path


def write_folder(root: Path, parts: dict[str, int], classes: tuple[str, ...] = ("cat", "dog")) -> Path:
    """Write ``parts[part]`` JPEG files of slightly different sizes per class into ``root/part/class/``."""
    for p, (part, count) in enumerate(parts.items()):
        for c, name in enumerate(classes):
            for i in range(count):
                picture(root / part / name / f"{i}.jpg", seed=100 * p + 10 * c + i, size=(24 + i % 3, 20 + i % 2))
    return root


def cut_short(path: Path) -> Path:
    """Take the end off an image file, behind its header."""
    path.write_bytes(path.read_bytes()[:-40])
    return path
