"""What the gated model of a run chooses on its test images, as a record from which the report is made."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from secateur.pictures import SHOWN, embedded
from secateur.runtime.usage import LayerUsage, Usage, usage
from secateur.session import Run

MAPS = 6  # layers whose channels are recorded class by class: those that differ most between classes
ROWS = 20  # classes of a map
VARIES = 0.01  # standard deviation over classes of the use of a channel, mean over channels: less is no map
LARGEST = 64  # pixels of the side of an image that is shown


def tell(run: Run, model: nn.Module, part: str = "test") -> Usage:
    """Record what ``model`` chooses on a ``part`` of the data, and return it.

    The record ``choices``: per layer density, entropy in bits, how many channels all and none of the images compute,
    and a histogram (of saliencies, or of actions); per class images and multiply-accumulates; ``maps`` of how often
    a class computes a channel (or a group of a prefix gate); the cheapest and dearest images, where costs differ.
    """
    found = usage(model, run.data, part, max(256, run.recipe.train.batch_size))
    run.log.append("choices", part=part, **summary(found), extremes=_extremes(run, found, part))
    return found


def summary(found: Usage) -> dict[str, Any]:
    """Return ``found`` as small JSON values: shares of few digits, maps of the most varied layers only."""
    varied = sorted(found.layers, key=variation, reverse=True)[:MAPS]
    classes = found.per_class
    return {
        "n": len(found.macs),
        "dense": found.dense,
        "mean": float(found.macs.mean()),
        "least": float(found.macs.min()),
        "most": float(found.macs.max()),
        "ranked": found.ranked,
        "layers": [_layer(layer) for layer in found.layers],
        "per_class": [
            {"class": label, "n": n, **{how: float(classes[how][label]) for how in ("mean", "min", "max")}}
            for label, n in enumerate(classes["n"].tolist())
            if n
        ],
        "maps": [_map(layer) for layer in varied if variation(layer) > VARIES],
    }


def columns(layer: LayerUsage) -> Tensor:
    """Return how often each class computes what is decided as one: (classes, units), or (classes, groups).

    All channels of a group are computed together, so the last one stands for it.
    """
    return layer.use[:, [last - 1 for last in layer.groups]] if layer.groups else layer.use


def variation(layer: LayerUsage) -> float:
    """Return the standard deviation over the classes of the use of a channel (or group), mean over them."""
    table = columns(layer)
    return float(table[~table.isnan().any(1)].std(0, correction=0).mean())


def _layer(layer: LayerUsage) -> dict[str, Any]:
    row: dict[str, Any] = {
        "path": layer.path,
        "units": len(layer.share),
        "density": round(layer.density, 4),
        "entropy": round(layer.entropy, 4),
        "always": int((layer.share == 1).sum()),
        "never": int((layer.share == 0).sum()),
    }
    if layer.actions is not None:
        row |= {"groups": list(layer.groups), "actions": _rounded(layer.actions)}
    if layer.saliency is not None:
        bins = {"computed": layer.saliency.computed.tolist(), "skipped": layer.saliency.skipped.tolist()}
        row["saliency"] = {"top": layer.saliency.top, **bins}
    return row


def _map(layer: LayerUsage) -> dict[str, Any]:
    """Return the use of channels or groups by the classes that differ most from the mean, in their order."""
    table = columns(layer)
    apart = (table - table.nanmean(0)).abs().sum(1).nan_to_num(-1.0)
    shown = apart.sort(descending=True, stable=True).indices[: min(ROWS, int((apart >= 0).sum()))].sort().values
    kind = "groups" if layer.groups else "channels"
    return {
        "path": layer.path,
        "of": kind,
        "classes": shown.tolist(),
        "use": [_rounded(row, 2) for row in table[shown]],
    }


def _rounded(values: Tensor, digits: int = 3) -> list[float]:
    return [round(value, digits) for value in values.tolist()]


def _extremes(run: Run, found: Usage, part: str) -> dict[str, list[dict[str, Any]]] | None:
    """Return label, cost and picture of the cheapest and dearest images; None where none is, or none can be shown."""
    if not found.ranked or run.data.shape[0] not in (1, 3):
        return None
    rows = {}
    for name, places in zip(("cheapest", "dearest"), found.extremes(SHOWN), strict=True):
        inputs = run.data.batch(run.data.part(part)[places])[0]
        scale = inputs.new_tensor([run.data.mean, run.data.std])[:, :, None, None]
        images = _small(inputs * scale[1] + scale[0])
        labels, macs = found.labels[places].tolist(), found.macs[places].tolist()
        rows[name] = [
            {"image": place, "class": label, "macs": spent, "png": embedded(image)}
            for place, label, spent, image in zip(places.tolist(), labels, macs, images, strict=True)
        ]
    return rows


def _small(images: Tensor) -> Tensor:
    """Return images (n, C, H, W) with no side longer than ``LARGEST``."""
    height, width = images.shape[2:]
    factor = LARGEST / max(height, width)
    if factor >= 1:
        return images
    size = [max(1, round(side * factor)) for side in (height, width)]
    return F.interpolate(images, size, mode="bilinear", antialias=True)
