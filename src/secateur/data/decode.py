"""Encoded images to bytes of one shape, by several threads; what is broken is named and counted."""

from __future__ import annotations

import io
import os
import struct
import zlib
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import chain

import numpy as np
from PIL import Image

from secateur.data.memory import neighbours
from secateur.types import DataError

Encoded = str | bytes | None  # a file, the content of one, or nothing where a row is empty
Problem = tuple[int, str]  # which image, and what is wrong with it

BROKEN_IMAGE = (
    *(OSError, SyntaxError, TypeError, ValueError, EOFError, IndexError, OverflowError),
    *(struct.error, zlib.error, Image.DecompressionBombError),
)
CHANNELS = {"L": 1, "RGB": 3}
ORIENTATION = 0x0112  # the EXIF tag
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
PIECE = 64  # images that a thread takes at a time
SHOWN = 5  # broken images that a message names


def pixels(encoded: Encoded, mode: str, size: int | None = None) -> np.ndarray:
    """Return one image as uint8 of shape (channels, height, width); ``mode`` is Pillow's (``L``, ``RGB``).

    With ``size``, the largest square in the middle is scaled to ``size`` x ``size`` (bilinear over all
    pixels that it covers).  Pictures are turned as their EXIF orientation says.  Raises one of ``BROKEN_IMAGE``.
    """
    with Image.open(io.BytesIO(encoded or b"") if not isinstance(encoded, str) else encoded) as image:
        if image.mode.startswith(("I", "F")):
            raise ValueError(f"pixels of kind {image.mode}; 8 bits per channel are read")
        # JPEG: decode at 1/2, 1/4 or 1/8, still twice what is kept; the box is where the picture ends then
        drafted = image.draft(None, (2 * size, 2 * size)) if size is not None else None
        width, height = drafted[1][2:] if drafted else image.size
        turn = TURNS.get(image.getexif().get(ORIENTATION, 1))
        image = image.convert(mode)
        if size is not None and (width, height) != (size, size):
            side = min(width, height)
            left, top = (width - side) / 2, (height - side) / 2
            box = (left, top, left + side, top + side)
            image = image.resize((size, size), Image.Resampling.BILINEAR, box)
        array = np.asarray(image if turn is None else image.transpose(turn))
    return array[None] if array.ndim == 2 else array.transpose(2, 0, 1)


def fill(
    out: np.ndarray, images: Sequence[Encoded], mode: str, *, resize: bool, threads: int | None = None
) -> list[Problem]:
    """Decode ``images[i]`` into ``out[i]``, (n, channels, height, width); return what could not be."""

    def piece(start: int) -> list[Problem]:
        found = []
        for i in range(start, min(start + PIECE, len(images))):
            try:
                array = pixels(images[i], mode, out.shape[-1] if resize else None)
            except BROKEN_IMAGE as error:
                found.append((i, _reason(error)))
                continue
            if array.shape == out.shape[1:]:
                out[i] = array
            else:
                sizes = f"{_size(array.shape)} pixels, others have {_size(out.shape)}"
                found.append((i, f"{sizes}; sizes must agree, or set data.image_size"))
        return found

    starts, threads = range(0, len(images), PIECE), threads or cores()
    if threads == 1 or len(starts) < 2:
        return list(chain.from_iterable(map(piece, starts)))
    with ThreadPoolExecutor(threads) as pool:
        return list(chain.from_iterable(pool.map(piece, starts)))


def form(images: Iterable[Encoded], mode: str, size: int | None) -> tuple[int, int, int] | None:
    """Return (channels, height, width) of the images: of ``size``, or of the first that can be decoded."""
    if size is not None:
        return CHANNELS[mode], size, size
    for image in images:
        try:
            channels, height, width = pixels(image, mode).shape
        except BROKEN_IMAGE:
            continue
        return channels, height, width
    return None


def grey(image: Encoded) -> bool:
    """Return whether the header says that the image has no colours; a broken image has none either."""
    try:
        with Image.open(io.BytesIO(image or b"") if not isinstance(image, str) else image) as opened:
            return opened.mode in ("1", "L", "LA")
    except BROKEN_IMAGE:
        return True


def refuse(where: object, total: int, problems: Sequence[Problem], name: Callable[[int], str]) -> None:
    """Raise ``DataError`` that counts and names the broken images; nothing where there is none.

    >>> refuse("cats", 9, [(1, "truncated")], ["a.jpg", "b.jpg"].__getitem__)
    Traceback (most recent call last):
    secateur.types.DataError: cats: 1 of 9 images cannot be decoded: b.jpg (truncated); fetch it again or remove it.
    """
    if problems:
        shown = ", ".join(f"{name(i)} ({reason})" for i, reason in problems[:SHOWN])
        more = f" and {len(problems) - SHOWN:,} more" if len(problems) > SHOWN else ""
        which = "it" if len(problems) == 1 else "them"
        raise DataError(
            f"{where}: {len(problems):,} of {total:,} images cannot be decoded: {shown}{more}; "
            f"fetch {which} again or remove {which}."
        )


def cores() -> int:
    """Return how many processors this process may use: its part of them."""
    present = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, present // neighbours())


def _reason(error: BaseException) -> str:
    """Return one line for an exception of Pillow (which repeats the file or the address of a buffer)."""
    text = "no image file" if "cannot identify image" in str(error) else str(error)
    return " ".join(text.split())[:120] or type(error).__name__


def _size(shape: Sequence[int]) -> str:
    return f"{shape[-1]}x{shape[-2]}"
