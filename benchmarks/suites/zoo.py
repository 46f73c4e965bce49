"""torchvision: every classification, segmentation, video and detection model, with random weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torchvision import models

import secateur as sc
from benchmarks.suites.case import Case, Inputs

# networks with a fixed input, or one below which their pools are empty; all others take 64 pixels
SIZES = {"inception_v3": 299, "maxvit_t": 224, "vit_": 224, "alexnet": 80, "swin_v2": 64, "googlenet": 96}
CLASSES = 7


def _size(name: str) -> int:
    return next((size for start, size in SIZES.items() if name.startswith(start)), 64)


def images(size: int, *, listed: bool = False) -> Inputs:
    """Return a maker of square images, as a batch or (``listed``) as a list."""
    if listed:
        return lambda batch: ([torch.rand(3, size, size) for _ in range(batch)],)
    return lambda batch: torch.randn(batch, 3, size, size)


def _classification(name: str) -> Case:
    options: dict[str, Any] = {"init_weights": True} if name in ("googlenet", "inception_v3") else {}
    return Case("classification", name, lambda: sc.build(f"torchvision:{name}", **options), images(_size(name)))


def _segmentation(name: str) -> Case:
    options = {} if name.startswith("lraspp") else {"aux_loss": True}
    return Case(
        "segmentation",
        name,
        lambda: sc.build(f"torchvision:{name}", num_classes=CLASSES, **options),
        images(64),
    )


def _clip(frames: int, size: int) -> Inputs:
    return lambda batch: torch.randn(batch, 3, frames, size, size)


def _resnet3d_34() -> nn.Module:
    """Return the 34-layer network of torchvision's own video blocks."""
    from torchvision.models.video import resnet as r

    return r.VideoResNet(r.BasicBlock, [r.Conv3DSimple] * 4, [3, 4, 6, 3], r.BasicStem)


def _video(name: str) -> Case:
    frames, size = (16, 224) if name == "s3d" or name.startswith("mvit") else (4, 64)
    return Case("video", name, lambda: sc.build(f"torchvision:{name}"), _clip(frames, size), batches=(1, 2))


def _targets(size: int) -> Callable[[int], Any]:
    def make(batch: int) -> Any:
        images = [torch.rand(3, size, size) for _ in range(batch)]
        targets = []
        for _ in range(batch):
            corner = torch.rand(2, 2) * size * 0.4
            boxes = torch.cat([corner, corner + size * (0.2 + 0.3 * torch.rand(2, 2))], 1)
            keypoints = torch.rand(2, 17, 3) * size
            keypoints[..., 2] = 1
            masks = (torch.rand(2, size, size) > 0.5).to(torch.uint8)
            targets.append({"boxes": boxes, "labels": torch.tensor([1, 2]), "masks": masks, "keypoints": keypoints})
        return images, targets

    return make


def _detection(name: str) -> Case:
    """Few boxes, but every score counts: with random weights none would pass the usual threshold."""
    if name.startswith(("fcos", "retinanet")):
        options = {
            "score_thresh": 0.0,
            "topk_candidates": 50,
            "detections_per_img": 20,
            "min_size": 96,
            "max_size": 128,
        }
    elif name.startswith("ssd"):
        options = {"score_thresh": 0.0, "topk_candidates": 20, "detections_per_img": 20}
    else:
        options = {"box_score_thresh": 0.0, "box_detections_per_img": 10, "min_size": 96, "max_size": 128}
        options |= {"rpn_post_nms_top_n_test": 30, "rpn_pre_nms_top_n_test": 60}
    size = 300 if name == "ssd300_vgg16" else 320 if name.startswith("ssdlite") else 96
    if name.startswith("keypoint"):
        options["num_classes"] = 2
    return Case(
        "detection",
        name,
        lambda: sc.build(f"torchvision:{name}", **options),
        images(size, listed=True),
        train_inputs=_targets(size),
        batches=(1, 2),
    )


CASES = {
    "classification": [_classification(name) for name in models.list_models(module=models)],
    "segmentation": [_segmentation(name) for name in models.list_models(module=models.segmentation)],
    "video": [
        *(_video(name) for name in models.list_models(module=models.video)),
        Case("video", "r3d_34", _resnet3d_34, _clip(4, 64), batches=(1, 2)),
    ],
    "detection": [_detection(name) for name in models.list_models(module=models.detection)],
}
