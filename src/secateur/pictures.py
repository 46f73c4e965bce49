"""What an autoencoder makes, before and after pruning: reconstructions, samples, and what each unit of its code tells.

The pictures are files of the run, and in its records, from which the report is made.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from PIL import Image
from torch import nn

from secateur.graph.state import eval_mode
from secateur.measure.elbo import INACTIVE, NOISE, RECONSTRUCTION, activity, autoencoder
from secateur.session import Run
from secateur.train.resume import atomic_write

SHOWN = 8  # images, and columns of a grid
SAMPLES = 16
LOOK = 2048  # validation images that the KL of each unit is the mean of
GAP = 2  # pixels between two images
FOLDER = "pictures"


def show(run: Run, models: Mapping[str, nn.Module]) -> None:
    """Write pictures of the dense and the pruned autoencoder and record them; nothing for models of another kind.

    Records: ``picture`` (name, what its rows are, PNG in base64, size in pixels) and ``code`` (KL in nats of each unit
    of the code over validation images, numbered as in the dense model; None for a unit that went).
    """
    if run.task is not RECONSTRUCTION:
        return
    images = run.data.batch(run.data.validation[:SHOWN])[0]
    inputs = run.data.batch(run.data.validation[:LOOK])[0]
    units = {name: _units(run, len(activity(model, images))) for name, model in models.items()}
    codes = torch.randn(SAMPLES, len(units["dense"]), generator=torch.Generator().manual_seed(NOISE)).to(images)
    again, drawn, told = {"original": images}, {}, {}
    for name, model in models.items():
        coder = autoencoder(model)
        with eval_mode(model), torch.no_grad():
            again[name] = coder.decode(coder.encode(images)[0])
            drawn[name] = coder.decode(codes[:, units[name]])
        told[name] = dict(zip(units[name], activity(model, inputs).tolist(), strict=True))
    _write(run, "reconstructions", again)
    _write(run, "samples", drawn)
    rows = {name: [found.get(unit) for unit in units["dense"]] for name, found in told.items()}
    run.log.append("code", kl=rows, inactive=INACTIVE, n=len(inputs))


def _units(run: Run, count: int) -> list[int]:
    """Return the ``count`` units of a code by their numbers in the dense one: those that ``mean.weight`` makes."""
    code = {g.name for g in run.dense.groups for m in g.members if m.tensor == "mean.weight" and m.role == "out"}
    kept = [indices for name, _, indices in run.plan.keep if name in code and len(indices) == count]
    return list(kept[0]) if kept else list(range(count))


def _write(run: Run, name: str, rows: Mapping[str, torch.Tensor]) -> None:
    data, (width, height) = picture([*rows.values()])
    (run.folder / FOLDER).mkdir(exist_ok=True)
    atomic_write(run.folder / FOLDER / f"{name}.png", data)
    text = base64.b64encode(data).decode()
    run.log.append("picture", name=name, rows=list(rows), png=text, width=width, height=height)


def picture(rows: Sequence[torch.Tensor]) -> tuple[bytes, tuple[int, int]]:
    """Return a PNG with images (n, 1 or 3, height, width) in [0, 1] beside each other, ``SHOWN`` in a line.

    What does not fit a line goes on in the next.  Second: width and height of the whole.

    >>> picture([torch.zeros(8, 1, 4, 4)] * 2)[1]
    (46, 10)
    """
    lines = [line for images in rows for line in images.split(SHOWN)]
    _, channels, height, width = lines[0].shape
    sheet = np.full((len(lines) * (height + GAP) - GAP, SHOWN * (width + GAP) - GAP, channels), 255, np.uint8)
    for down, line in enumerate(lines):
        for across, image in enumerate(_bytes(line)):
            top, left = down * (height + GAP), across * (width + GAP)
            sheet[top : top + height, left : left + width] = image
    return _png(sheet), (sheet.shape[1], sheet.shape[0])


def embedded(image: torch.Tensor) -> str:
    """Return one image (1 or 3, height, width) in [0, 1] as a PNG in base64, for a page that needs no other file."""
    return base64.b64encode(_png(_bytes(image[None])[0])).decode()


def _bytes(images: torch.Tensor) -> np.ndarray:
    """Return images (n, channels, height, width) in [0, 1] as bytes (n, height, width, channels)."""
    return images.clamp(0, 1).mul(255).round().byte().permute(0, 2, 3, 1).cpu().numpy()


def _png(sheet: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(sheet[:, :, 0] if sheet.shape[2] == 1 else sheet).save(file, "PNG", optimize=True)
    return file.getvalue()
