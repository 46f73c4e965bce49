"""What a saved model says: classes of image files, and its accuracy on the data it was made for."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import nn

from secateur import resolve
from secateur.checkpoint import load, read_header
from secateur.data import Dataset
from secateur.data.dataset import scaled
from secateur.data.parquet import BROKEN_IMAGE
from secateur.measure.accuracy import logits
from secateur.measure.quality import Quality
from secateur.measure.task import evaluate as measure
from secateur.runtime.budget import bias_for
from secateur.runtime.gates import FBS, Steered
from secateur.runtime.gates.choice import Gate
from secateur.runtime.gates.cost import meter
from secateur.runtime.gates.fbs import quota
from secateur.runtime.macs import spent
from secateur.sections import Data
from secateur.types import CheckpointError, DataError

MODES = {1: "L", 3: "RGB"}


@dataclass(frozen=True)
class Guess:
    """One answer for one image: class index, class name, probability."""

    image: str
    index: int
    name: str
    probability: float


@dataclass(frozen=True, eq=False)
class Reader:
    """A model together with what its checkpoint says about its inputs and classes."""

    model: nn.Module
    classes: tuple[str, ...]
    shape: tuple[int, int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    data: Data
    seed: int


def open_model(path: str | Path, trust: Iterable[str] = ()) -> Reader:
    """Return the model of a run's checkpoint; raises ``CheckpointError`` when it lacks classes or input."""
    extra: Any = read_header(path).extra
    try:
        form = extra["input"]
        channels, height, width = (int(n) for n in form["shape"])
        classes = tuple(str(name) for name in extra["classes"])
        mean, std = (tuple(float(x) for x in form[key]) for key in ("mean", "std"))
        data, seed = Data.model_validate(extra["data"]), int(extra["seed"])
        if channels not in MODES or len(mean) != channels or len(std) != channels or not classes:
            raise ValueError(f"{channels} channels, {len(mean)} means, {len(classes)} classes")
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"{path} does not say what its inputs and classes are ({error}); checkpoints that `secateur run` writes do."
        ) from error
    return Reader(load(path, trust=trust), classes, (channels, height, width), mean, std, data, seed)


def predict(reader: Reader, images: Sequence[str | Path], *, top: int = 1, invert: bool = False) -> list[Guess]:
    """Return the ``top`` best classes of each image file, best first; ``invert`` swaps dark and bright.

    Images are turned grey or RGB and resized to the size that the model was trained on.
    Raises ``DataError`` for a file that is no image.
    """
    pixels = torch.stack([_pixels(reader, Path(path), invert) for path in images])
    with torch.no_grad():
        scores = logits(reader.model(scaled(pixels, 255.0, reader.mean, reader.std)))
    if scores.shape[1] != len(reader.classes):
        raise CheckpointError(f"the model returns {scores.shape[1]} scores for {len(reader.classes)} class names.")
    best = scores.softmax(1).topk(min(top, scores.shape[1]), dim=1)
    rows = zip(images, best.indices.tolist(), best.values.tolist(), strict=True)
    return [
        Guess(str(path), index, reader.classes[index], chance)
        for path, indices, chances in rows
        for index, chance in zip(indices, chances, strict=True)
    ]


def _pixels(reader: Reader, path: Path, invert: bool) -> torch.Tensor:
    channels, height, width = reader.shape
    try:
        with Image.open(path) as image:
            image = ImageOps.exif_transpose(image).convert(MODES[channels])
            if image.size != (width, height):
                image = ImageOps.fit(image, (width, height), Image.Resampling.BILINEAR)
            array = np.array(ImageOps.invert(image) if invert else image)
    except BROKEN_IMAGE as error:
        raise DataError(f"{path} cannot be read as an image: {error}.") from error
    return torch.from_numpy(array.reshape(height, width, channels)).permute(2, 0, 1)


def set_density(reader: Reader, density: float) -> None:
    """Set the density of every gate of FBS that is below 1 in the file; raises ``CheckpointError`` without any."""
    gates = [module for module in reader.model.modules() if isinstance(module, FBS)]
    if not gates:
        raise CheckpointError("the model has no gates of FBS; --density is for runs with fbs, --budget for rnp.")
    quota(density, 1)
    for gate in gates:
        if gate.density < 1 or all(other.density == 1 for other in gates):
            gate.density = density


def set_budget(reader: Reader, budget: float, *, root: str | None = None) -> float:
    """Set the bias with which the model computes ``budget`` of its multiply-accumulates; return it.

    The mean is taken over up to 1,024 validation images of the data that the model was made for (``root``: where it
    is now).  Raises ``CheckpointError`` for a model without a controller, ``PlanError`` for a budget out of reach.
    """
    if not isinstance(reader.model, Steered):
        raise CheckpointError("the model has no controller; --budget is for runs with rnp, --density for fbs.")
    images = [inputs for inputs, _ in _data(reader, root).batches("validation", 256)][:4]
    reader.model.bias = bias_for(reader.model, images, budget)
    return reader.model.bias


@dataclass(frozen=True, eq=False)
class Work:
    """Multiply-accumulates of each image (n,) under the choices of a model's gates, and of one that all computes."""

    macs: torch.Tensor
    whole: float


def work(reader: Reader, data: Dataset, part: str = "test") -> Work | None:
    """Return what the images of ``part`` compute; None for a model without gates."""
    if not any(isinstance(module, Gate) for module in reader.model.modules()):
        return None
    count = meter(reader.model, data.batch(data.part(part)[:2])[0])
    return Work(spent(reader.model, count, (inputs for inputs, _ in data.batches(part, 256))), count.dense)


def evaluate(reader: Reader, part: str = "test", *, root: str | None = None) -> tuple[Quality, Dataset]:
    """Return loss and accuracy, or the ELBO, on a part of the data that the model was made for, and that data.

    ``root`` is where the data is now, when it moved.
    """
    data = _data(reader, root)
    return measure(reader.model, data.batches(part, 256)), data


def _data(reader: Reader, root: str | None) -> Dataset:
    data = resolve.dataset(reader.data.model_copy(update={"root": root} if root else {}), reader.seed)
    if data.shape != reader.shape:
        raise DataError(f"the images are {data.shape}, the model was made for {reader.shape}; check --root.")
    return data
