"""Folders of image files, one per class, as ImageNet is laid out."""

from __future__ import annotations

from pathlib import Path

import torch

from secateur.data.dataset import Source
from secateur.data.fetch import folder_of
from secateur.data.files import images_of, listed
from secateur.types import DataError

HELD_OUT = ("test", "val", "validation")  # the first of these with class folders is the test part


def imagefolder(root: str | None = None, download: bool = False, size: int | None = None) -> Source:
    """Images in ``root/train/CLASS/`` and, as test set, ``root/test``, ``root/val`` or ``root/validation``.

    Without these the class folders lie in ``root`` itself and the test set is drawn.  Classes are the sorted
    folder names of the training part, images RGB.  Raises ``DataError`` when a folder is missing, a class is
    empty or unknown to the training part, or images are broken.
    """
    home = folder_of("imagefolder", root)
    train, test = _parts(home)
    names = [path.name for path in train]
    strange = sorted({path.name for path in test} - set(names))
    if strange:
        raise DataError(
            f"{test[0].parent} has classes that {train[0].parent} lacks: {_some(strange)}; rename or remove them."
        )
    found = {path: listed(path) for path in (*train, *test)}
    empty = [str(path.relative_to(home)) for path, files in found.items() if not files]
    if empty:
        raise DataError(f"{home}: class folders without images: {_some(empty)}; fill or remove them.")
    paths = [file for files in found.values() for file in files]
    labels = [names.index(path.name) for path, files in found.items() for _ in files]
    test_from = sum(len(found[path]) for path in train) if test else None
    images = images_of("imagefolder", home, paths, "RGB", size)
    return Source("imagefolder", images, torch.tensor(labels), tuple(names), test_from)


def _parts(root: Path) -> tuple[list[Path], list[Path]]:
    """Return the class folders of the training and of the test part."""
    held = [root / part for part in HELD_OUT if (root / part).is_dir()]
    if not (root / "train").is_dir():
        if held:
            raise DataError(f"{root} holds {held[0].name} but no train; an image folder is root/train/CLASS/*.jpg.")
        train = _folders(root)
        if not train:
            raise DataError(f"{root} holds neither train nor class folders; an image folder is root/train/CLASS/*.jpg.")
        return train, []
    train = _folders(root / "train")
    if not train:
        raise DataError(f"{root / 'train'} holds no class folders; an image folder is root/train/CLASS/*.jpg.")
    tests = [folders for part in held if (folders := _folders(part))]
    if held and not tests:
        raise DataError(f"{held[0]} holds no class folders; sort its images into one folder per class, or remove it.")
    return train, tests[0] if tests else []


def _folders(root: Path) -> list[Path]:
    return sorted(path for path in root.iterdir() if path.is_dir() and not path.name.startswith("."))


def _some(names: list[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5:,} more" if len(names) > 5 else "")
